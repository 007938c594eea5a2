"""A checkpoint of DeepSpeed that is truncated, damaged or incomplete is refused in one sentence that names the file."""

import json
from collections import OrderedDict
from importlib.util import find_spec

import pytest
import torch
from safetensors.torch import load_file

from phase8.checkpoint.deepspeed_source import consolidate_deepspeed, is_deepspeed
from phase8.errors import CheckpointCorruptError, CheckpointError, OutOfMemoryError

MODEL_STATES, OPTIMIZER_STATES, UNIVERSAL = "mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_optim_states.pt", "zero/layer.weight/fp32.pt"
WEIGHT = torch.arange(6.0).view(2, 3)


def model_states():
    shapes = [OrderedDict({"layer.weight": WEIGHT.shape})]
    return {"buffer_names": [], "module": {}, "param_shapes": shapes, "shared_params": {}, "ds_version": "0.1"}


def optimizer_states():
    return {"optimizer_state_dict": {"zero_stage": 2, "partition_count": 1, "single_partition_of_fp32_groups": [WEIGHT.flatten()]}}


def zero_checkpoint(parent, of_model, of_optimizer):
    if find_spec("deepspeed") is None:
        pytest.skip("DeepSpeed is not installed")
    (directory := parent / "global_step1").mkdir()
    torch.save(of_model, directory / MODEL_STATES)
    torch.save(of_optimizer, directory / OPTIMIZER_STATES)
    return directory


@pytest.fixture(params=["zero", "universal"])
def step(request, tmp_path):
    """A checkpoint of one step, and the file in it that is damaged."""
    directory = tmp_path / "global_step1"
    if request.param == "zero":
        return zero_checkpoint(tmp_path, model_states(), optimizer_states()), directory / OPTIMIZER_STATES
    (directory / UNIVERSAL).parent.mkdir(parents=True)
    torch.save({"param": WEIGHT}, directory / UNIVERSAL)
    return directory, directory / UNIVERSAL


def read(directory, tmp_path):
    assert is_deepspeed(directory)
    (destination := tmp_path / "destination").mkdir()
    consolidate_deepspeed(directory, destination, {})
    return destination


def test_a_whole_one_is_read(step, tmp_path):
    destination = read(step[0], tmp_path)
    assert json.loads((destination / "config.json").read_text()) == {} and (destination / "model.safetensors").exists()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_without_zero_is_read(tmp_path, dtype):
    (directory := tmp_path / "global_step1").mkdir()
    states = model_states() | {"param_shapes": None, "shared_params": None, "module": OrderedDict({"module.layer.weight": WEIGHT.to(dtype)})}
    torch.save(states, directory / MODEL_STATES)
    found = load_file(read(directory, tmp_path) / "model.safetensors")
    assert list(found) == ["layer.weight"] and torch.equal(found["layer.weight"], WEIGHT)
    torch.save(states | {"module": {"module.layer.weight": [1, 2]}}, directory / MODEL_STATES)
    with pytest.raises(CheckpointCorruptError, match=rf"{MODEL_STATES} holds no weights"):
        consolidate_deepspeed(directory, tmp_path / "destination", {})


def test_a_huge_file_of_the_name_is_not_read_into_memory(tmp_path):
    with (tmp_path / "latest").open("wb") as file:
        file.truncate(2**40)
    assert not is_deepspeed(tmp_path)


DAMAGES = {
    "empty": lambda path: path.write_bytes(b""),
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-200]),
    "no pickle": lambda path: path.write_bytes(b"\x93not a pickle\n" * 40),
    "other content": lambda path: torch.save({"other": 1}, path),
    "no dictionary": lambda path: torch.save([1, 2], path),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_file_is_named(step, tmp_path, name):
    directory, path = step
    DAMAGES[name](path)
    with pytest.raises(CheckpointCorruptError) as caught:
        read(directory, tmp_path)
    message = str(caught.value)
    assert message.startswith(f"{path} ") and message.endswith("; use another checkpoint.") and "\n" not in message
    assert not list((tmp_path / "destination").iterdir())


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")])
def test_too_little_memory_is_no_damage(step, tmp_path, monkeypatch, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(torch, "load", fail)
    with pytest.raises(OutOfMemoryError, match=r"the host has too little memory for .*\.pt; read it on a host with more\.$"):
        read(step[0], tmp_path)


@pytest.mark.parametrize("key", ["param_shapes", "shared_params", "module", "buffer_names"])
def test_a_file_that_lacks_something_is_named(tmp_path, key):
    states = model_states()
    del states[key]
    directory = zero_checkpoint(tmp_path, states, optimizer_states())
    with pytest.raises(CheckpointCorruptError, match=rf"{MODEL_STATES} lacks {key}, so it is damaged or of another kind; use another checkpoint\.$"):
        read(directory, tmp_path)


def test_what_only_deepspeed_understands_is_told_in_its_words(tmp_path):
    directory = zero_checkpoint(tmp_path, model_states(), {"optimizer_state_dict": {"zero_stage": 2}})
    with pytest.raises(CheckpointError, match=r"^DeepSpeed cannot read .*global_step1 \(KeyError: 'partition_count'\); use another checkpoint\.$"):
        read(directory, tmp_path)


def test_a_missing_file_is_named(tmp_path):
    directory = zero_checkpoint(tmp_path, model_states(), optimizer_states())
    (directory / OPTIMIZER_STATES).unlink()
    with pytest.raises(CheckpointError, match=r"DeepSpeed cannot read .*can't find \*_optim_states\.pt files"):
        read(directory, tmp_path)
