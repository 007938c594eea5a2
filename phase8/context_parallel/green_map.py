"""What a slice of a sequence does to the Green function that enters it, and to the gradient that comes back: slices on different ranks need no more.

Forwards a slice is a Möbius map, a 2 x 2 complex matrix. Backwards it is affine: the gradient of what enters is a factor times the gradient of what
leaves, plus what the slice itself adds. Operators, because complex numbers do not enter a compiled graph.

Shapes: B batch, T tokens, H heads, S slices. Complex numbers cross the interface as a last dim of 2 (real, imaginary).
"""

from __future__ import annotations

import torch
from torch import Tensor

from phase8.kernels.reference.green_scan import compose, coupling


@torch.library.custom_op("phase8::green_map", mutates_args=())
def green_map(potential: Tensor, energy: Tensor, eta: Tensor, hopping: Tensor, starts: Tensor | None) -> Tensor:
    """The map of a slice [B, H, 4, 2], its matrix row by row; arguments as of `green_scan`."""
    denominator = torch.complex(energy - potential, eta.expand_as(potential))
    one, zero = torch.ones_like(denominator), torch.zeros_like(denominator)
    maps = (zero, one, -coupling(hopping, starts, potential).to(denominator.dtype), denominator)
    while maps[0].shape[1] > 1:
        last = tuple(entry[:, -1:] for entry in maps)
        pairs = compose(tuple(entry[:, :-1:2] for entry in maps), tuple(entry[:, 1::2] for entry in maps))
        is_odd = maps[0].shape[1] % 2
        maps = tuple(torch.cat(parts, dim=1) for parts in zip(pairs, last, strict=True)) if is_odd else pairs
    return torch.view_as_real(torch.cat(maps, dim=1).transpose(1, 2)).contiguous()


@green_map.register_fake
def _(potential: Tensor, energy: Tensor, eta: Tensor, hopping: Tensor, starts: Tensor | None) -> Tensor:
    return potential.new_empty(potential.shape[0], potential.shape[2], 4, 2)


@torch.library.custom_op("phase8::value_after_slices", mutates_args=())
def value_after_slices(maps: Tensor) -> Tensor:
    """The Green function after slices with these maps [S, B, H, 4, 2], the first of which begins the sequence [B, H, 2]."""
    value = torch.view_as_complex(maps.new_zeros(*maps.shape[1:3], 2))
    for a, b, c, d in (torch.view_as_complex(each.contiguous()).unbind(-1) for each in maps):
        value = (a * value + b) / (c * value + d)
    return torch.view_as_real(value).contiguous()


@value_after_slices.register_fake
def _(maps: Tensor) -> Tensor:
    return maps.new_empty(*maps.shape[1:3], 2)


@torch.library.custom_op("phase8::gradient_factor", mutates_args=())
def gradient_factor(g: Tensor, hopping: Tensor, starts: Tensor | None) -> Tensor:
    """Gradient of the value that enters a slice for each of the value that leaves it [B, H, 2]; `g` is what `green_scan` returned [B, T, H, 2]."""
    values = torch.view_as_complex(g.contiguous())
    factor = (torch.conj_physical(values * values) * coupling(hopping, starts, values.real)).prod(1)
    return torch.view_as_real(factor).contiguous()


@gradient_factor.register_fake
def _(g: Tensor, hopping: Tensor, starts: Tensor | None) -> Tensor:
    return g.new_empty(g.shape[0], *g.shape[2:])


@torch.library.custom_op("phase8::gradient_before_slices", mutates_args=())
def gradient_before_slices(added: Tensor, factors: Tensor) -> Tensor:
    """The gradient of the value that enters the first of some slices, the last of which ends the sequence [B, H, 2].

    Args:
        added: Gradient that each slice adds, where none comes back to it [S, B, H, 2].
        factors: Results of `gradient_factor` [S, B, H, 2].
    """
    gradient = torch.view_as_complex(added.new_zeros(added.shape[1:]))
    for own, factor in zip(reversed(added.unbind(0)), reversed(factors.unbind(0)), strict=True):
        gradient = torch.view_as_complex(own.contiguous()) + torch.view_as_complex(factor.contiguous()) * gradient
    return torch.view_as_real(gradient).contiguous()


@gradient_before_slices.register_fake
def _(added: Tensor, factors: Tensor) -> Tensor:
    return added.new_empty(added.shape[1:])
