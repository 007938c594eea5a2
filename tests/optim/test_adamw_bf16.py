"""AdamW with moments in bf16: right on average, the same wherever the same is computed, and a step that does not count changes nothing."""

import functools

import pytest
import torch
from torch import nn

from phase8 import page_locked
from phase8.checkpoint.load import open_checkpoint
from phase8.checkpoint.save import save_checkpoint
from phase8.checkpoint.state import flat_state, restore_state
from phase8.config.schema import OptimSection
from phase8.errors import CheckpointMismatchError
from phase8.optim import adamw_bf16, passage
from phase8.optim.adamw import build_optimizer
from phase8.optim.adamw_bf16 import AdamWBf16, Rule, Scalars, compiled_update, rounded_at_random, update
from phase8.optim.adamw_fp8 import AdamWFp8
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


@pytest.mark.parametrize("state_dtype", ["bf16", "fp8"])
def test_a_step_that_does_not_count_changes_nothing(state_dtype):
    section = SECTION.model_copy(update={"state_dtype": state_dtype})
    found, optimizer = train(section, 3, skipped=(2,))
    expected, other = train(section, 2)
    for name, parameter in expected.items():
        assert torch.equal(found[name], parameter)
        assert all(torch.equal(optimizer.state[found[name]][key], value) for key, value in other.state[parameter].items())


@pytest.mark.parametrize(("state_dtype", "tolerance"), [("bf16", 2e-3), ("fp8", 5e-3)])
def test_gradients_are_divided_by_the_scale(state_dtype, tolerance):
    section = SECTION.model_copy(update={"state_dtype": state_dtype})
    (found, _), (expected, _) = train(section, 3, scale=4.0), train(section, 3)
    for name, parameter in expected.items():
        torch.testing.assert_close(found[name], parameter, rtol=0, atol=tolerance)


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
        once = {name: tensor.clone() for name, tensor in flat_state(other, resumed).items()}
        for parameter in other.parameters():
            parameter.grad = noise(*parameter.shape, seed=6)
        resumed.step()
        restore_state(open_checkpoint(saved), other, resumed)  # a rollback before the next save
        assert all(torch.equal(tensor, once[name]) for name, tensor in flat_state(other, resumed).items())


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


def updated(function, kind, device="cpu"):
    """Weights and moments after five steps of a function, the third of which does not count."""
    weights, moments = noise(70_001).to(device), tuple(torch.zeros(70_001, dtype=kind.moment_dtype, device=device) for _ in range(2))
    for step, number in ((1, 1), (2, 2), (3, 3), (4, 3), (5, 4)):
        scalars = (torch.tensor(value, device=device) for value in (0.01, float(number), 4.0, float(step == 3)))
        function(weights, 4 * noise(70_001, seed=step).to(device), moments, Scalars(*scalars))
    return weights, kind.widen(*moments)


def are_close(weights, expected_weights, moments, expected_moments):
    """Last bits may differ, and where they do a moment may be rounded to its other neighbour, which is right on average, too."""
    difference = weights - expected_weights
    assert difference.abs().max() < 4e-3 and difference.square().mean().sqrt() < 2e-4 and difference.mean().abs() < 2e-6
    for found, expected in zip(moments, expected_moments, strict=True):
        found, expected = found.float(), expected.float()
        assert ((found - expected).abs() > 0.3 * expected.abs() + 1e-6).float().mean() < 1e-3
        assert abs(found.abs().mean() / expected.abs().mean() - 1) < 1e-3


@pytest.mark.parametrize("kind", [AdamWBf16, AdamWFp8])
def test_the_update_of_gpus_is_that_of_torch(kind):
    """The function that is one kernel on a GPU, beside torch's fused AdamW with the same rounding."""
    rule, held = Rule((0.9, 0.95), 1e-8, 0.1), {"matrix": nn.Parameter(noise(70_001)[None])}
    optimizer = kind(held, OptimSection(learning_rate=0.01, weight_decay=0.1), decayed_names={"matrix"})
    for step in range(1, 6):
        held["matrix"].grad = 4 * noise(70_001, seed=step)[None]
        optimizer.grad_scale, optimizer.found_inf = torch.tensor(4.0), torch.tensor(float(step == 3))
        optimizer.step()
    state = optimizer.state[held["matrix"]]
    assert state["step"] == 4
    weights, moments = updated(functools.partial(update, rule=rule, widen=kind.widen, shorten=kind.shorten), kind)
    are_close(weights, held["matrix"].detach()[0], moments, kind.widen(state["exp_avg"][0], state["exp_avg_sq"][0]))


def trained_on_host(kind, device="cpu", pin=False):
    """Parameters, in host memory if `pin` says so, and optimizer after four steps of several lengths, clipped, of which the third does not count."""
    values = {"empty": noise(0, 24), "long": noise(70_001)[None], "matrix": noise(40, 24, seed=1), "vector": noise(24, seed=2)}
    held = {name: nn.Parameter(value.pin_memory() if pin else value.to(device)) for name, value in values.items()}
    optimizer = kind(held, OptimSection(learning_rate=0.01, weight_decay=0.1), decayed_names={"empty", "long", "matrix"})
    for step in range(1, 5):
        for number, parameter in enumerate(held.values()):
            gradient = 4 * noise(*parameter.shape, seed=10 * step + number)
            parameter.grad = gradient.pin_memory() if pin else gradient.to(device)
        optimizer.grad_scale, optimizer.found_inf = (
            torch.tensor(4.0, device=parameter.device),
            torch.tensor(float(step == 3), device=parameter.device),
        )
        optimizer.step()
    return held, optimizer


@pytest.mark.parametrize("kind", [AdamWBf16, AdamWFp8])
def test_the_device_updates_offloaded_parameters_in_pieces(kind, monkeypatch):
    """Bit for bit the same for pieces of all lengths, and close to what the host computes."""

    def function(rule, widen, shorten):
        return functools.partial(update, rule=rule, widen=widen, shorten=shorten)

    by_host = trained_on_host(kind)
    monkeypatch.setattr(adamw_bf16, "updating_device", lambda part: torch.device("cpu"))
    monkeypatch.setattr(adamw_bf16, "compiled_update", function)
    whole = trained_on_host(kind)
    monkeypatch.setattr(passage, "PIECE", 1000)
    for (held, optimizer), are_same in ((trained_on_host(kind), torch.equal), (by_host, None)):
        for name, parameter in held.items():
            state, other = optimizer.state[parameter], whole[1].state[whole[0][name]]
            moments, others = ([each[key] for key in ("exp_avg", "exp_avg_sq")] for each in (state, other))
            assert state["step"] == other["step"] == 3
            if are_same is not None or name in ("vector", "empty"):
                assert torch.equal(parameter, whole[0][name]) and all(map(torch.equal, moments, others))
            else:
                are_close(whole[0][name].detach(), parameter.detach(), kind.widen(*others), kind.widen(*moments))


def test_only_page_locked_parameters_are_sent_to_a_gpu(monkeypatch):
    monkeypatch.setattr(adamw_bf16.accelerator, "own_gpu", lambda: torch.device("cuda", 0))
    monkeypatch.setattr(adamw_bf16, "has_triton", lambda device: device.type == "cuda")
    part = noise(40, 24)
    assert adamw_bf16.updating_device(part) is None
    monkeypatch.setattr(adamw_bf16, "is_locked", lambda part: True)
    assert adamw_bf16.updating_device(part) == torch.device("cuda", 0)
    assert adamw_bf16.updating_device(part.double()) is None


@pytest.fixture
def fresh_compiler():
    """torch compiles a function for so many callers only."""
    torch.compiler.reset()
    compiled_update.cache_clear()


@pytest.mark.gpu
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("kind", [AdamWBf16, AdamWFp8])
def test_a_gpu_updates_offloaded_parameters_as_its_own(kind, monkeypatch):
    """Bit for bit; the moments that a checkpoint brings are page-locked by the next step, large and small ones."""
    own, optimizer = trained_on_host(kind, "cuda")
    monkeypatch.setattr(passage, "PIECE", 1000)
    for threshold in (1, 1 << 25):
        monkeypatch.setattr(page_locked, "_OWN_PAGES", threshold)
        held, offloaded = trained_on_host(kind, pin=True)
        for name in ("long", "matrix"):
            assert torch.equal(held[name], own[name].cpu())
            state, other = offloaded.state[held[name]], optimizer.state[own[name]]
            for key in ("exp_avg", "exp_avg_sq"):
                assert state[key].is_pinned() and torch.equal(state[key], other[key].cpu())


@pytest.mark.gpu
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("kind", [AdamWBf16, AdamWFp8])
def test_one_kernel_updates_as_the_operations_do(kind):
    rule = Rule((0.9, 0.95), 1e-8, 0.1)
    operations = functools.partial(update, rule=rule, widen=kind.widen, shorten=kind.shorten)
    expected = updated(operations, kind, "cuda")
    found = updated(compiled_update(rule, kind.widen, kind.shorten), kind, "cuda")
    are_close(found[0], expected[0], found[1], expected[1])
