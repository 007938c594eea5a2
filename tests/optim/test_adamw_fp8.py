"""AdamW with moments in eight bits: right on average, the same wherever the same is computed. What both short moments share: test_adamw_bf16.py."""

import pytest
import torch
from torch import nn

from phase8.checkpoint.load import open_checkpoint
from phase8.checkpoint.save import save_checkpoint
from phase8.checkpoint.state import flat_state, restore_state
from phase8.config.schema import OptimSection
from phase8.errors import CheckpointMismatchError
from phase8.optim.adamw import build_optimizer
from phase8.optim.adamw_fp8 import AdamWFp8, packed, unpacked
from phase8.optim.state import declared_by
from tests.optim.test_adamw_bf16 import noise, parameters, steps

SECTION = OptimSection(state_dtype="fp8", learning_rate=1e-2)


class Model(nn.Module):
    """A matrix and a vector."""

    def __init__(self):
        super().__init__()
        self.matrix, self.vector = nn.Parameter(noise(40, 24)), nn.Parameter(noise(24, seed=2))


def train(section, num_steps, held=None, optimizer=None, first=0):
    held = parameters() if held is None else held
    optimizer = build_optimizer(held, section, decayed_names={"matrix", "experts"}) if optimizer is None else optimizer
    for step in range(first, first + num_steps):
        for number, parameter in enumerate(held.values()):
            # Gradients that lean to one side, as those of a loss do, by amounts that differ a hundredfold from number to number.
            lean, size = noise(*parameter.shape, seed=number), 1e-3 * 10 ** noise(*parameter.shape, seed=50 + number)
            parameter.grad = size * (noise(*parameter.shape, seed=100 * step + number) + lean)
        optimizer.step()
    return held, optimizer


def test_every_code_stands_for_a_number_that_becomes_the_code_again():
    ratios, squares = torch.cartesian_prod(torch.arange(256), torch.arange(256)).to(torch.uint8).T
    first, second = unpacked(ratios, squares)
    assert first.isfinite().all() and second.isfinite().all() and second[squares == 0].eq(0).all() and second[squares > 0].gt(0).all()
    levels = second[ratios == 0].sort().values
    assert (levels.diff() > 0).all() and levels[1] == 1.25 * 2.0**-56 and levels[-1] == 1.75 * 2.0**7
    for step in steps(3):
        found_ratios, found_squares = packed(first, second, step)
        assert torch.equal(found_squares, squares)
        # Division may leave the last bit of a ratio, and rounding at random may take it for more in one of a million.
        is_number = (squares > 0) & (ratios != 128)
        assert (found_ratios != ratios)[is_number].sum() <= 2


def test_numbers_are_right_on_average_over_steps():
    second = (noise(2000).abs() + 0.01) * 1e-6
    first = second.sqrt() * noise(2000, seed=1)
    found = [unpacked(*packed(first, second, step)) for step in steps(1024)]
    mean_first, mean_second = (torch.stack(each).double().mean(0) for each in zip(*found, strict=True))
    assert (mean_second / second - 1).abs().max() < 0.02 and abs((mean_second / second - 1).mean()) < 5e-4
    error = (mean_first - first) / second.sqrt()
    assert error.abs().max() < 0.01 and abs(error.mean()) < 2e-4
    for one_first, one_second in found[:3]:
        assert ((one_second / second - 1).abs() <= 0.25).all()
        assert (((one_first - first) / second.sqrt()).abs() <= 0.0625 * (first / second.sqrt()).abs() * 1.2 + 1 / 100).all()


def test_what_is_beyond_the_range_stays_a_number_and_never_becomes_zero():
    first, second = torch.tensor([1e-12, -1e3, 0.0, 0.0, 1e-20]), torch.tensor([1e-22, 1e6, 0.0, 1e-30, 1e-38])
    found_first, found_second = unpacked(*packed(first, second, torch.tensor(1.0)))
    assert found_second.tolist() == [1.25 * 2.0**-56, 224.0, 0.0, 1.25 * 2.0**-56, 1.25 * 2.0**-56]
    assert found_first.isfinite().all() and found_first[1] == pytest.approx(-15.5 * 224**0.5) and found_first[2] == 0
    assert ((found_first / found_second.sqrt().clamp(min=1e-30)).abs() <= 15.6).all()


def test_weights_follow_those_of_fp32_moments():
    (found, optimizer), (expected, _) = train(SECTION, 60), train(SECTION.model_copy(update={"state_dtype": "fp32"}), 60)
    assert isinstance(optimizer, AdamWFp8)
    for name, parameter in expected.items():
        moved = parameter - parameters()[name]
        assert ((found[name] - parameter).norm() / moved.norm()).item() < (0.08 if name != "vector" else 1e-6)
        assert abs(((found[name] - parameters()[name]) * moved).sum() / moved.square().sum() - 1) < 0.02  # they move as far


def test_a_moment_that_changes_by_less_than_its_neighbours_are_apart_still_decays():
    """Numbers that are alike are rounded alike in a step, so the average is over runs of twenty steps."""
    last_first, last_second = [], []
    for run in range(128):
        first, second = torch.tensor([3e-4]), torch.tensor([1e-6])
        for step in range(20):
            first, second = unpacked(*packed(0.97 * first, 0.98 * second, torch.tensor(float(20 * run + step))))
        last_first.append(first.item())
        last_second.append(second.item())
    assert sum(last_second) / len(last_second) == pytest.approx(1e-6 * 0.98**20, rel=0.1)
    assert sum(last_first) / len(last_first) == pytest.approx(3e-4 * 0.97**20, rel=0.1)


def test_moments_take_two_bytes_a_number_as_declared():
    held, optimizer = train(SECTION, 1)
    for name, part in held.items():
        declared = declared_by(optimizer)(name, part.shape)
        assert [each.key for each in declared.tensors] == list(optimizer.state[part])
        moments = [value for key, value in optimizer.state[part].items() if key != "step"]
        assert sum(each.nbytes for each in moments) == (2 if part.ndim > 1 else 8) * part.numel()
        sizes = [each.num_bytes(part.numel(), parameter_bytes=4) for each in declared.tensors if not each.is_scalar]
        assert sizes == [each.nbytes for each in moments]


def test_a_run_goes_on_bit_for_bit_and_not_with_another_dtype(tmp_path):
    model = Model()
    held, optimizer = train(SECTION, 3, dict(model.named_parameters()))
    path = save_checkpoint(tmp_path, step=3, tensors=flat_state(model, optimizer), metadata={}, attachments={})
    train(SECTION, 2, held, optimizer, first=3)
    other = Model()
    resumed = build_optimizer(dict(other.named_parameters()), SECTION, decayed_names={"matrix", "experts"})
    restore_state(open_checkpoint(path), other, resumed)
    found, _ = train(SECTION, 2, dict(other.named_parameters()), resumed, first=3)
    assert all(torch.equal(found[name], parameter) for name, parameter in held.items())
    wide = build_optimizer(dict(other.named_parameters()), OptimSection(), decayed_names=set())
    with pytest.raises(CheckpointMismatchError, match=r"matrix.exp_avg is U8 in the checkpoint, but the optimizer keeps F32"):
        restore_state(open_checkpoint(path), other, wide)
