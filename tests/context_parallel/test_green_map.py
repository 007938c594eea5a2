import pytest
import torch

from phase8.context_parallel.green_map import gradient_before_slices, gradient_factor, green_map, value_after_slices
from phase8.kernels.green_scan import green_scan, green_scan_backward
from tests.kernels.recurrences import random_starts
from tests.kernels.test_green_scan import problem

PARTS = [slice(0, 1), slice(1, 14), slice(14, 40)]


@pytest.mark.parametrize("packed", [False, True])
def test_slices_know_each_other_by_their_maps_and_factors_alone(packed):
    potential, *scalars = problem(40)
    starts = random_starts(40) if packed else None
    hopping, cut = scalars[-1], [None if starts is None else starts[:, part] for part in PARTS]
    whole, _ = green_scan(potential, *scalars, starts)
    grad = torch.randn_like(whole)
    dpotential, dscalars, _ = green_scan_backward(grad, whole, hopping, starts, None)

    maps = torch.stack([green_map(potential[:, part], *scalars, own) for part, own in zip(PARTS, cut, strict=True)])
    entering = [value_after_slices(maps[:place]) for place in range(len(PARTS))]
    g = [green_scan(potential[:, part], *scalars, own, before)[0] for part, own, before in zip(PARTS, cut, entering, strict=True)]
    torch.testing.assert_close(torch.cat(g, 1), whole)

    alone = [green_scan_backward(grad[:, part], g[n], hopping, cut[n], entering[n])[2] for n, part in enumerate(PARTS)]
    factors = torch.stack([gradient_factor(own, hopping, own_starts) for own, own_starts in zip(g, cut, strict=True)])
    found = []
    for n, part in enumerate(PARTS):
        arriving = grad[:, part].clone()
        arriving[:, -1] += gradient_before_slices(torch.stack(alone)[n + 1 :], factors[n + 1 :])
        found.append(green_scan_backward(arriving, g[n], hopping, cut[n], entering[n]))
    torch.testing.assert_close(torch.cat([own for own, _, _ in found], 1), dpotential)
    torch.testing.assert_close(sum(own for _, own, _ in found), dscalars)
