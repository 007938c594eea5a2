"""AdamW with moments in bf16: right on average, the same wherever the same is computed, and a step that does not count changes nothing."""

import pytest
import torch
from torch import nn

from phase8.checkpoint.load import open_checkpoint
from phase8.checkpoint.save import save_checkpoint
from phase8.checkpoint.state import flat_state, restore_state
from phase8.config.schema import OptimSection
from phase8.errors import CheckpointMismatchError
from phase8.optim import adamw_bf16
from phase8.optim.adamw import build_optimizer
from phase8.optim.adamw_bf16 import AdamWBf16, rounded_at_random
from phase8.optim.state import declared_by

SECTION = OptimSection(state_dtype="bf16", learning_rate=1e-2)


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def parameters():
    return {"matrix": nn.Parameter(noise(40, 24)), "experts": nn.Parameter(noise(3, 5, 7, seed=1)), "vector": nn.Parameter(noise(24, seed=2))}


def train(section, num_steps, scale=None, skipped=(), chunk=None, monkeypatch=None):
    if chunk is not None:
        monkeypatch.setattr(adamw_bf16, "CHUNK", chunk)
    held = parameters()
    optimizer = build_optimizer(held, section, decayed_names={"matrix", "experts"})
    for step in range(num_steps):
        for number, parameter in enumerate(held.values()):
            parameter.grad = noise(*parameter.shape, seed=100 * step + number) * (1 if scale is None else scale)
        optimizer.grad_scale = None if scale is None else torch.tensor(float(scale))
        optimizer.found_inf = torch.tensor(float(step in skipped))
        optimizer.step()
    return held, optimizer


def steps(number):
    return (torch.tensor(float(step)) for step in range(number))


def test_numbers_are_rounded_to_a_neighbour_and_right_on_average_over_steps():
    x = noise(2000).abs() * 10.0
    x[:1000] *= -1
    below = ((x.view(torch.int32) & ~0xFFFF).view(torch.float32)).to(torch.bfloat16)
    above = (below.view(torch.int16) + 1).view(torch.bfloat16)
    found = torch.stack([rounded_at_random(x, step) for step in steps(1024)]).double()
    assert ((found == below.double()) | (found == above.double())).all()
    error = (found.mean(0) - x.double()) / (above.double() - below.double()).abs()  # in last bits; 0.5 / sqrt(1024) = 0.016 is a deviation
    assert error.abs().max() < 0.08 and error.mean().abs() < 0.002


def test_many_numbers_are_right_on_average_in_every_step():
    x = 1 + torch.arange(1 << 16) / (1 << 20)  # remainders of all sizes
    for step in (*steps(3), torch.tensor(1000.0)):
        error = (rounded_at_random(x, step).double() - x.double()) * 128  # in last bits
        assert error.mean().abs() < 0.01
        for half in (error[x.view(torch.int32) & 0x8000 == 0], error[x.view(torch.int32) & 0x8000 != 0]):
            assert half.mean().abs() < 0.02


def test_what_bf16_holds_is_not_changed():
    x = torch.tensor([0.0, -0.0, 1.0, -1.5, 3e38, 1e-30]).to(torch.bfloat16)
    assert all(torch.equal(rounded_at_random(x.float(), step), x) for step in steps(100))


def test_weights_follow_those_of_fp32_moments():
    (found, optimizer), (expected, _) = train(SECTION, 60), train(SECTION.model_copy(update={"state_dtype": "fp32"}), 60)
    assert isinstance(optimizer, AdamWBf16)
    for name, parameter in expected.items():
        moved = (parameter - parameters()[name]).norm()
        assert ((found[name] - parameter).norm() / moved).item() < (0.01 if name != "vector" else 1e-6)
    dtypes = {name: {key: value.dtype for key, value in optimizer.state[part].items()} for name, part in found.items()}
    assert dtypes["matrix"] == dtypes["experts"] == {"step": torch.float32, "exp_avg": torch.bfloat16, "exp_avg_sq": torch.bfloat16}
    assert dtypes["vector"]["exp_avg"] == torch.float32


def test_a_moment_that_changes_by_less_than_its_last_bit_still_decays():
    """With a decay of 0.999 rounding to the nearest would leave it where it is for ever."""
    section = SECTION.model_copy(update={"betas": (0.9, 0.999)})
    part = nn.Parameter(torch.zeros(64, 64))
    optimizer = build_optimizer({"matrix": part}, section, decayed_names=set())
    part.grad = torch.ones(64, 64)
    optimizer.step()
    first = optimizer.state[part]["exp_avg_sq"].double().mean().item()
    for _ in range(1000):
        part.grad = torch.zeros(64, 64)
        optimizer.step()
    mean = optimizer.state[part]["exp_avg_sq"].double().mean().item()
    assert mean == pytest.approx(first * 0.999**1000, rel=0.2)
    nearest = torch.tensor(first).to(torch.bfloat16)
    assert (nearest.float() * 0.999).to(torch.bfloat16) == nearest


def test_pieces_change_no_number(monkeypatch):
    """Up to rounding: torch's fused AdamW computes the last few numbers of a tensor in another way."""
    (found, optimizer), (expected, other) = (train(SECTION, 5, chunk=chunk, monkeypatch=monkeypatch) for chunk in (50, 1 << 20))
    for name, parameter in expected.items():
        torch.testing.assert_close(found[name], parameter, rtol=1e-4, atol=1e-4)
        for key, value in other.state[parameter].items():
            torch.testing.assert_close(optimizer.state[found[name]][key], value, rtol=0.01, atol=1e-6)


def test_a_step_that_does_not_count_changes_nothing():
    found, optimizer = train(SECTION, 3, skipped=(2,))
    expected, other = train(SECTION, 2)
    for name, parameter in expected.items():
        assert torch.equal(found[name], parameter)
        assert all(torch.equal(optimizer.state[found[name]][key], value) for key, value in other.state[parameter].items())


def test_gradients_are_divided_by_the_scale():
    (found, _), (expected, _) = train(SECTION, 3, scale=4.0), train(SECTION, 3)
    for name, parameter in expected.items():
        torch.testing.assert_close(found[name], parameter, rtol=0, atol=2e-3)


def test_the_state_is_what_is_declared():
    held, optimizer = train(SECTION, 1)
    for name, part in held.items():
        declared = declared_by(optimizer)(name, part.shape)
        assert [each.key for each in declared.tensors] == list(optimizer.state[part])
        names = {torch.bfloat16: "BF16", torch.float32: "F32"}
        assert all(each.dtype in (None, names[optimizer.state[part][each.key].dtype]) for each in declared.tensors)


def test_a_run_may_go_on_with_the_other_dtype(tmp_path):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.matrix, self.vector = nn.Parameter(noise(6, 4)), nn.Parameter(noise(4))

    def build(dtype):
        model = Model()
        return model, build_optimizer(dict(model.named_parameters()), SECTION.model_copy(update={"state_dtype": dtype}), decayed_names=set())

    for before, after, kept in (("fp32", "bf16", torch.bfloat16), ("bf16", "fp32", torch.float32)):
        model, optimizer = build(before)
        for parameter in model.parameters():
            parameter.grad = noise(*parameter.shape, seed=5)
        optimizer.step()
        saved = save_checkpoint(tmp_path / before, step=1, tensors=flat_state(model, optimizer), metadata={}, attachments={})
        other, resumed = build(after)
        restore_state(open_checkpoint(saved), other, resumed)
        for name in ("matrix", "vector"):
            found, expected = resumed.state[getattr(other, name)], optimizer.state[getattr(model, name)]
            assert found["exp_avg"].dtype == (kept if name == "matrix" else torch.float32) and found["step"] == 1
            torch.testing.assert_close(found["exp_avg"].float(), expected["exp_avg"].float(), rtol=0.005, atol=0)


def test_a_counter_of_another_dtype_is_refused(tmp_path):
    model = nn.Linear(4, 3)
    optimizer = build_optimizer(dict(model.named_parameters()), SECTION, decayed_names=set())
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    tensors = {name: tensor.to(torch.bfloat16) if name.endswith(".step") else tensor for name, tensor in flat_state(model, optimizer).items()}
    saved = open_checkpoint(save_checkpoint(tmp_path, step=1, tensors=tensors, metadata={}, attachments={}))
    fresh = build_optimizer(dict(model.named_parameters()), SECTION, decayed_names=set())
    with pytest.raises(CheckpointMismatchError, match="step is BF16 in the checkpoint, but the optimizer keeps F32"):
        restore_state(saved, model, fresh)


@pytest.mark.gpu
def test_one_kernel_rounds_as_the_operations_do():
    for length in (1, 1000, 70_001):
        x = noise(length).cuda() * 1e-3
        for step in steps(3):
            assert torch.equal(adamw_bf16.compiled_rounding()(x, step.cuda()), rounded_at_random(x, step.cuda()))
