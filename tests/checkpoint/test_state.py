from __future__ import annotations

import copy
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from phase8.checkpoint import state
from phase8.checkpoint.load import Checkpoint, newest_good_checkpoint, open_checkpoint
from phase8.checkpoint.save import save_checkpoint
from phase8.checkpoint.state import flat_state, require_fit, restore_state
from phase8.errors import CheckpointError, CheckpointMismatchError
from phase8.optim.state import ParameterState, StateTensor


class Model(nn.Module):
    """Tied weights, a persistent buffer, one that is not, a scalar parameter and one that never gets a gradient."""

    def __init__(self, width: int = 4, dtype: torch.dtype = torch.float32):
        super().__init__()
        self.embedding = nn.Embedding(6, width, dtype=dtype)
        self.layers = nn.ModuleList(nn.Linear(width, width, dtype=dtype) for _ in range(2))
        self.head = nn.Linear(width, 6, bias=False, dtype=dtype)
        self.head.weight = self.embedding.weight
        self.scale = nn.Parameter(torch.tensor(2.0, dtype=dtype))
        self.unused = nn.Parameter(torch.zeros(3, dtype=dtype))
        self.register_buffer("counts", torch.zeros(2, dtype=torch.int64))
        self.register_buffer("cache", torch.zeros(2), persistent=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embedding(ids)
        for layer in self.layers:
            x = torch.tanh(layer(x)) * self.scale
        return self.head(x)


def build(seed: int, width: int = 4, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = Model(width, dtype)
    decayed = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    others = [parameter for parameter in model.parameters() if parameter.dim() <= 1]
    return model, torch.optim.AdamW([{"params": decayed}, {"params": others, "weight_decay": 0.0}], lr=1e-2, fused=True)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, *, seed: int) -> None:
    ids = torch.randint(0, 6, (5,), generator=torch.Generator().manual_seed(seed))
    optimizer.zero_grad()
    model(ids).float().square().mean().backward()
    optimizer.step()
    model.counts += 1


@pytest.fixture
def saved(tmp_path: Path) -> Callable[..., Checkpoint]:
    def save(model: nn.Module, optimizer: torch.optim.Optimizer, step: int = 1) -> Checkpoint:
        return open_checkpoint(save_checkpoint(tmp_path / "c", step=step, tensors=flat_state(model, optimizer), metadata={}, attachments={}))

    return save


def snapshot(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in flat_state(model, optimizer).items()}


def assert_same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert tensor.dtype == second[name].dtype and tensor.device == second[name].device and torch.equal(tensor, second[name]), name


def test_names_are_flat_and_tied_weights_are_there_once():
    model, optimizer = build(0)
    assert set(flat_state(model, optimizer)) == {
        *("model." + name for name in ("embedding.weight", "layers.0.weight", "layers.0.bias", "layers.1.weight", "layers.1.bias")),
        *("model." + name for name in ("scale", "unused", "counts")),
    }
    train(model, optimizer, seed=0)
    state = flat_state(model, optimizer)
    assert {name for name in state if name.startswith("optimizer.scale.")} == {f"optimizer.scale.{k}" for k in ("exp_avg", "exp_avg_sq", "step")}
    assert not [name for name in state if name.startswith(("optimizer.unused", "optimizer.head", "model.head"))]
    assert state["model.scale"] is model.scale


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("already_trained", [False, True], ids=["fresh", "trained"])
def test_training_goes_on_bit_for_bit(dtype: torch.dtype, already_trained: bool, saved):
    model, optimizer = build(0, dtype=dtype)
    for seed in range(3):
        train(model, optimizer, seed=seed)
    checkpoint = saved(model, optimizer)
    resumed_model, resumed_optimizer = build(1, dtype=dtype)
    if already_trained:
        train(resumed_model, resumed_optimizer, seed=7)
    addresses = [parameter.data_ptr() for parameter in resumed_model.parameters()]
    restore_state(checkpoint, resumed_model, resumed_optimizer)
    assert [parameter.data_ptr() for parameter in resumed_model.parameters()] == addresses
    assert_same(snapshot(model, optimizer), snapshot(resumed_model, resumed_optimizer))
    for seed in range(3, 6):
        train(model, optimizer, seed=seed)
        train(resumed_model, resumed_optimizer, seed=seed)
    assert_same(snapshot(model, optimizer), snapshot(resumed_model, resumed_optimizer))


def test_going_back_to_before_the_first_step_forgets_the_optimizer_state(saved):
    model, optimizer = build(0)
    checkpoint = saved(model, optimizer)
    before = snapshot(model, optimizer)
    train(model, optimizer, seed=0)
    restore_state(checkpoint, model, optimizer)
    assert_same(snapshot(model, optimizer), before)
    assert all(len(state) == 0 for state in optimizer.state.values())


def test_the_model_alone_can_be_restored(saved):
    model, optimizer = build(0)
    train(model, optimizer, seed=0)
    checkpoint = saved(model, optimizer)
    other, _ = build(1)
    restore_state(checkpoint, other, None)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True))


@pytest.mark.parametrize(
    ("stored", "here", "fits"),
    [
        (torch.bfloat16, torch.float32, True),
        (torch.float16, torch.float32, True),
        (torch.float32, torch.bfloat16, False),
        (torch.float16, torch.bfloat16, False),
    ],
)
def test_weights_are_widened_where_asked_and_never_rounded(stored: torch.dtype, here: torch.dtype, fits: bool, saved):
    model, optimizer = build(0, dtype=stored)
    checkpoint = saved(model, optimizer)
    other, _ = build(1, dtype=here)
    with pytest.raises(CheckpointMismatchError, match=r"is \w+ in the checkpoint and torch\.\w+ here"):
        restore_state(checkpoint, other, None)
    if fits:
        require_fit(checkpoint, other, widen=True)
        restore_state(checkpoint, other, None, widen=True)
        assert all(torch.equal(a.to(here), b) for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True))
        return
    for restore in (lambda: require_fit(checkpoint, other, widen=True), lambda: restore_state(checkpoint, other, None, widen=True)):
        with pytest.raises(CheckpointMismatchError, match="in the checkpoint and"):
            restore()


def test_the_step_of_a_capturable_optimizer_goes_to_its_parameter_and_others_to_the_host(saved):
    model, optimizer = build(0)
    train(model, optimizer, seed=0)
    checkpoint = saved(model, optimizer)
    resumed, resumed_optimizer = build(0)
    restore_state(checkpoint, resumed, resumed_optimizer)
    assert all(state["step"].device.type == "cpu" and state["step"].dtype == torch.float32 for state in resumed_optimizer.state.values())
    on_meta = copy.deepcopy(resumed).to("meta")  # stands for a device with its own memory
    on_meta.head.weight = on_meta.embedding.weight  # the move to meta unties them
    for capturable, expected in ((False, "cpu"), (True, "meta")):
        meta_optimizer = torch.optim.AdamW(on_meta.parameters(), lr=1e-2)
        meta_optimizer.param_groups[0]["capturable"] = capturable
        restore_state(checkpoint, on_meta, meta_optimizer)
        assert {state["step"].device.type for state in meta_optimizer.state.values()} == {expected}
        assert {state["exp_avg"].device.type for state in meta_optimizer.state.values()} == {"meta"}


def other_width(model: nn.Module, optimizer: torch.optim.Optimizer):
    return build(1, width=6)


def other_dtype(model: nn.Module, optimizer: torch.optim.Optimizer):
    return build(1, dtype=torch.bfloat16)


def one_layer_more(model: nn.Module, optimizer: torch.optim.Optimizer):
    other, _ = build(1)
    other.layers.append(nn.Linear(4, 4))
    return other, torch.optim.AdamW(other.parameters())


def one_layer_less(model: nn.Module, optimizer: torch.optim.Optimizer):
    other, _ = build(1)
    del other.layers[1]
    return other, torch.optim.AdamW(other.parameters())


class Momentum(torch.optim.SGD):
    def declare_state(self, name, shape):
        return ParameterState((StateTensor("momentum_buffer"),))


def other_optimizer_in_use(model: nn.Module, optimizer: torch.optim.Optimizer):
    other, _ = build(1)
    momentum = Momentum(other.parameters(), lr=1e-2, momentum=0.9)
    train(other, momentum, seed=1)
    return other, momentum


def layer_not_trained(model: nn.Module, optimizer: torch.optim.Optimizer):
    other, _ = build(1)
    return other, torch.optim.AdamW(other.layers[0].parameters())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (other_width, r"model\.embedding\.weight has shape \[6, 4\] in the checkpoint and \[6, 6\] here; .*; and \d+ more; use the config"),
        (other_dtype, r"model\.scale is F32 in the checkpoint and torch\.bfloat16 here"),
        (one_layer_more, r"model\.layers\.2\.(weight|bias) is not in the checkpoint"),
        (one_layer_less, r"model\.layers\.1\.weight is not in the model"),
        (other_optimizer_in_use, r"optimizer\.\S+\.momentum_buffer is not in the checkpoint"),
        (layer_not_trained, r"optimizer\.scale\.\S+ is the state of no parameter here"),
    ],
)
def test_a_checkpoint_of_another_model_lists_differences_and_changes_nothing(change: Callable, message: str, saved):
    model, optimizer = build(0)
    train(model, optimizer, seed=0)
    checkpoint = saved(model, optimizer)
    other, other_optimizer = change(model, optimizer)
    before = snapshot(other, other_optimizer)
    with pytest.raises(CheckpointMismatchError, match=message):
        restore_state(checkpoint, other, other_optimizer)
    assert_same(snapshot(other, other_optimizer), before)


@pytest.mark.parametrize("already_trained", [False, True], ids=["fresh", "trained"])
@pytest.mark.parametrize("group", ["model", "optimizer"])
@pytest.mark.parametrize("older_steps", [0, 1])
def test_nothing_stays_of_a_damaged_checkpoint(older_steps: int, group: str, already_trained: bool, saved, tmp_path: Path):
    """Bytes are read once, so tensors before the damaged one have been overwritten; the checkpoint before it overwrites all of them again."""
    model, optimizer = build(0)
    for seed in range(older_steps):
        train(model, optimizer, seed=seed)
    saved(model, optimizer, step=older_steps)
    before = snapshot(model, optimizer)
    train(model, optimizer, seed=5)
    path = saved(model, optimizer, step=2).path / f"{group}-00000.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1  # the last tensor
    path.write_bytes(data)
    other, other_optimizer = build(1)
    if already_trained:
        train(other, other_optimizer, seed=7)
    damaged: list[str] = []
    found = newest_good_checkpoint(
        tmp_path / "c",
        on_damaged=lambda _, error: damaged.append(str(error)),
        check=lambda checkpoint: restore_state(checkpoint, other, other_optimizer),
    )
    assert found is not None and found.step == older_steps and len(damaged) == 1 and f"{path} is altered" in damaged[0]
    assert_same(snapshot(other, other_optimizer), before)


def test_state_that_is_no_tensor_is_refused_by_name():
    model, optimizer = build(0)
    train(model, optimizer, seed=0)
    optimizer.state[model.scale]["num_calls"] = 3
    with pytest.raises(CheckpointError, match=r"optimizer\.scale\.num_calls is of type int"):
        flat_state(model, optimizer)


def test_an_optimizer_of_another_model_is_refused():
    with pytest.raises(CheckpointError, match="7 parameters that are not in the model"):
        flat_state(build(0)[0], build(1)[1])


def bytes_read_so_far() -> int:
    for line in Path("/proc/self/io").read_text().splitlines():
        if line.startswith("rchar:"):
            return int(line.split()[1])
    raise AssertionError("no rchar in /proc/self/io")


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="the kernel does not count the bytes a process reads")
def test_loading_as_the_check_of_the_newest_reads_every_byte_once(saved, tmp_path: Path):
    model = nn.Linear(1000, 250)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 1000)).sum().backward()
    optimizer.step()
    saved(model, optimizer)
    resumed = nn.Linear(1000, 250)
    resumed_optimizer = torch.optim.AdamW(resumed.parameters())
    begin = bytes_read_so_far()
    newest_good_checkpoint(tmp_path / "c", on_damaged=pytest.fail, check=lambda c: restore_state(c, resumed, resumed_optimizer))
    read_bytes = bytes_read_so_far() - begin
    model_bytes = sum(parameter.nbytes for parameter in model.parameters())
    # Two moments, and the weights, which are overwritten in place.
    assert 3 * model_bytes <= read_bytes < 3.2 * model_bytes
    assert_same(snapshot(model, optimizer), snapshot(resumed, resumed_optimizer))


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="this system cannot forget")
@pytest.mark.parametrize("is_held_once", [True, False])
def test_what_no_other_rank_reads_is_forgotten_by_the_page_cache_once_it_was_read(saved, monkeypatch: pytest.MonkeyPatch, is_held_once: bool):
    forgotten, real_read = [], Checkpoint.read_region

    def read_region(checkpoint: Checkpoint, name: str, *arguments: object, **options: object) -> torch.Tensor:
        assert name not in [other for other, _ in forgotten]
        reading.append(name)
        tensor = real_read(checkpoint, name, *arguments, **options)
        reading.remove(name)
        return tensor

    reading: list[str] = []
    monkeypatch.setattr(Checkpoint, "read_region", read_region)
    monkeypatch.setattr(os, "posix_fadvise", lambda descriptor, begin, length, advice: forgotten.append((reading[-1], length)))
    monkeypatch.setattr(state, "is_held_once", lambda tensor: is_held_once)
    model, optimizer = build(seed=1)
    train(model, optimizer, seed=1)
    checkpoint = saved(model, optimizer)
    resumed, resumed_optimizer = build(seed=2)
    restore_state(checkpoint, resumed, resumed_optimizer)
    assert_same(snapshot(model, optimizer), snapshot(resumed, resumed_optimizer))
    steps = {name for name in flat_state(model, optimizer) if name.endswith(".step")}  # a few bytes, which all ranks read
    weights_and_moments = {name: tensor.nbytes for name, tensor in flat_state(model, optimizer).items() if name not in steps}
    assert {name: length for name, length in forgotten if name not in steps} == (weights_and_moments if is_held_once else {})


def test_weights_are_read_to_where_they_belong(saved, monkeypatch: pytest.MonkeyPatch):
    """New memory costs more than the copy; a place that does not take the bytes as they are gets a copy all the same."""
    places, real_read = {}, Checkpoint.read_region

    def read_region(checkpoint: Checkpoint, name: str, region: object, *, into: torch.Tensor | None = None, **options: object) -> torch.Tensor:
        places[name] = None if into is None else into.data_ptr()
        return real_read(checkpoint, name, region, into=into, **options)

    monkeypatch.setattr(Checkpoint, "read_region", read_region)
    model, optimizer = build(seed=1)
    checkpoint = saved(model, optimizer)
    resumed, resumed_optimizer = build(seed=2)
    resumed.layers[0].weight.data = resumed.layers[0].weight.data.t()
    restore_state(checkpoint, resumed, resumed_optimizer)
    assert_same(snapshot(model, optimizer), snapshot(resumed, resumed_optimizer))
    for name, parameter in resumed.named_parameters():
        assert places[f"model.{name}"] == (None if name == "layers.0.weight" else parameter.data_ptr())
