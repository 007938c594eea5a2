"""Under DeepSpeed the numbers are those of one process of the fsdp engine, and checkpoints go from one engine to the other."""

import functools
import importlib
import math
import os
import re
import subprocess
import sys
import weakref
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
import yaml
from rich.console import Console

from phase8.checkpoint.load import find_checkpoint, open_checkpoint
from phase8.checkpoint.save import save_checkpoint
from phase8.config.load import config_to_mapping, load_config
from phase8.config.validate import validate
from phase8.distributed.mesh import build_mesh
from phase8.distributed.placement import collected
from phase8.errors import ConfigError
from phase8.kernels.backends import select_kernels
from phase8.plan.rank_memory import fullest
from phase8.plan.whole_config import plan_stages
from phase8.precision.policy import set_matmul_precision
from phase8.train import build, device
from phase8.train.engine.protocol import WEIGHT
from phase8.train.loop import train
from phase8.train.trial import Trial, run_trial
from phase8.zero import async_io
from phase8.zero.async_io import load_async_io, require_async_io
from phase8.zero.deepspeed import import_deepspeed
from phase8.zero.fsdp import shard_size
from tests.parallel.pool import NCCL
from tests.parallel.test_gpu_parity import MODEL as GPU_MODEL
from tests.parallel.test_gpu_parity import TOLERANCE, require_gpus
from tests.parallel.test_parity import BLOCKS, OFFLOADED, ranks
from tests.parallel.training import MODEL, microbatches_of, run_topology, without_auto
from tests.tools.doors import load_door
from tests.train.tiny_run import losses, tiny_config, write_config

pytestmark = pytest.mark.skipif(find_spec("deepspeed") is None, reason="DeepSpeed is not installed")  # it imports triton
NUM_STEPS = 2
# An epsilon of the size of the gradients: without it AdamW makes a full step of every gradient that is nothing but rounding.
FP32 = ("precision.dtype=fp32", "optim.eps=1e-3")
DEEPSPEED = "zero.engine=deepspeed"
OPTIMIZER = "zero.offload_optimizer=cpu"
FULL = "train.recompute=full"
CASES = {
    "one rank zero 3": ("default", ranks(stage=3)),
    "dp2 zero 1, accumulating": ("default", ranks(dp=2, stage=1, more=("train.micro_batch_size=1",))),
    "dp2 zero 2": ("low-rank", ranks(dp=2, stage=2)),
    "dp2 zero 2 offloaded, accumulating": ("delta-options", ranks(dp=2, stage=2, more=("zero.offload_optimizer=cpu", "train.micro_batch_size=1"))),
    "dp2 zero 3, recomputed": ("tied", ranks(dp=2, stage=3, more=(FULL, "train.micro_batch_size=2"))),
    "dp2 zero 3, embedding scalars": ("embedding scalars", ranks(dp=2, stage=3, more=(FULL,))),
    "dp2 zero 3 offloaded": ("whole", ranks(dp=2, more=OFFLOADED)),
    "dp2 zero 3 experts": ("experts", ranks(dp=2, stage=3)),
    "tp2 zero 1": ("transformer", ranks(tp=2, stage=1)),
    "tp2 dp2 zero 2": ("default", ranks(tp=2, dp=2, stage=2)),
    "tp2 dp2 zero 3 offloaded": ("low-rank", ranks(tp=2, dp=2, more=OFFLOADED)),
}


def forget_earlier_engines():
    """DeepSpeed keeps the groups of the first engine of a process, and numbers modules and parameters on, but jobs share processes."""
    import deepspeed.comm.comm
    from deepspeed.runtime.zero.parameter_offload import DeepSpeedZeRoOffload
    from deepspeed.runtime.zero.partition_parameters import Init
    from deepspeed.utils import groups

    for name, value in vars(groups).items():
        if name.startswith("_") and name.endswith(("_GROUP", "_RANKS", "_RANK", "_SIZE")):
            setattr(groups, name, {} if isinstance(value, dict) else None)
    groups.mpu = deepspeed.comm.comm.cdb = None
    Init.param_id = 0
    DeepSpeedZeRoOffload._register_deepspeed_module.__defaults__ = ([0],)


def new_engine(settings, world_size, device_type="cpu"):
    config = without_auto(load_config(os.devnull, [*MODEL, *settings]))
    validate(config, world_size=world_size)
    if config.zero.engine == "deepspeed":
        os.environ |= {"DS_ACCELERATOR": device_type, "LOCAL_RANK": str(dist.get_rank() if device_type == "cuda" else 0)}
        forget_earlier_engines()
    device = torch.device("cuda", torch.cuda.current_device()) if device_type == "cuda" else torch.device("cpu")
    set_matmul_precision(config.precision)
    select_kernels(config.train.kernels, device)
    topology = run_topology(config.parallel, world_size=world_size)
    mesh = build_mesh(topology, device_type=device_type, shard_size=shard_size(config.zero, num_token_ranks=topology.num_token_ranks))
    return build.build_engine(config, mesh=mesh, device=device), config


def step(engine, config, number, **more):
    microbatches = microbatches_of(engine, config, number)
    numbers = {"learning_rate": config.optim.learning_rate, "gradient_clip_norm": config.optim.gradient_clip_norm}
    return engine.update(microbatches, **numbers, **more)


def whole_tensors(engine):
    """Everything that a checkpoint would hold, on the first rank."""
    return {name: tensor.clone() for name, tensor in collected({name: each.detach() for name, each in engine.state().items()}, engine.mesh).items()}


def train_with(settings, world_size, save_to=None, load_from=None, first_step=0):
    """A job: results of the steps and everything that a checkpoint would hold."""
    engine, config = new_engine(settings, world_size)
    if load_from is not None:
        engine.restore(open_checkpoint(Path(load_from)))
    results = [step(engine, config, number) for number in range(first_step, first_step + NUM_STEPS)]
    held_out = engine.evaluate(microbatches_of(engine, config, 100))
    if save_to is not None:
        save_checkpoint(Path(save_to), step=first_step + NUM_STEPS, tensors=engine.state(), metadata={}, attachments={})
    sizes = [tensor.to_local().nbytes if hasattr(tensor, "to_local") else tensor.nbytes for tensor in engine.state().values()]
    assert sorted(sizes) == sorted(engine.state_sizes())
    return [(each.loss, each.grad_norm, *each.auxiliary_losses.values()) for each in results] + [held_out], whole_tensors(engine)


def run(pool, settings, world_size, timeout_seconds=120.0, **more):
    found = pool.run(_train_with, settings, world_size, more, world_size=world_size, timeout_seconds=timeout_seconds)
    assert all(numbers == found[0][0] for numbers, _ in found)  # every rank reports the same
    return found[0]


def _train_with(settings, world_size, more):
    return train_with(settings, world_size, **more)


def assert_same(found, expected):
    """Up to rounding, of which the squares of gradients that almost cancel have most; with the same layout, the engines agree to the last bits."""
    (numbers, tensors), (expected_numbers, expected_tensors) = found, expected
    assert tensors.keys() == expected_tensors.keys()
    for ours, theirs in zip(numbers, expected_numbers, strict=True):
        assert ours == pytest.approx(theirs, rel=2e-5)
    for name, tensor in expected_tensors.items():
        assert (tensors[name] - tensor).norm() <= (1e-3 if name.startswith("optimizer.") else 2e-5) * tensor.norm() + 1e-9, name


@pytest.fixture(scope="module")
def one_process(pool):
    """What a block of that name computes alone, under the other engine."""
    return functools.cache(lambda block: run(pool, (*FP32, *BLOCKS[block]), 1))


@pytest.mark.parametrize("name", CASES)
def test_equals_one_process(pool, one_process, name):
    block, (world_size, settings) = CASES[name]
    expected = one_process(block)
    assert_same(run(pool, (*FP32, *BLOCKS[block], *settings, DEEPSPEED), world_size), expected)


def in_bf16(settings, world_size):
    engine, config = new_engine(("precision.dtype=bf16", "optim.eps=1e-3", *settings), world_size)
    first = whole_tensors(engine)
    return first, [step(engine, config, number).loss for number in range(NUM_STEPS)]


@pytest.mark.parametrize(("stage", "settings"), [(1, ()), (2, (FULL, "train.micro_batch_size=1")), (3, (FULL,))])
def test_bf16_begins_with_the_weights_of_the_seed_and_follows_the_other_engine(pool, stage, settings):
    expected, expected_losses = pool.run(in_bf16, (), 1, world_size=1)[0]
    found, losses = pool.run(in_bf16, (f"zero.stage={stage}", DEEPSPEED, *settings), 2, world_size=2)[0]
    assert found.keys() == expected.keys() and all(torch.equal(found[name], tensor) for name, tensor in expected.items())  # fp32, not rounded
    assert losses == pytest.approx(expected_losses, rel=5e-3)


TURNS = {
    "zero 3 after tp2": (ranks(tp=2), ranks(dp=2, stage=3)),
    "zero 3": (ranks(dp=2, stage=3), ranks(dp=2, stage=3)),
    "tp2 dp2": (ranks(tp=2, dp=2, stage=1), ranks(dp=2, stage=2)),
}


# Another layout and ZeRO 3 in one; the train loop below takes turns under ZeRO 2.
@pytest.mark.parametrize("name", [name if name == "zero 3 after tp2" else pytest.param(name, marks=pytest.mark.full) for name in TURNS])
def test_engines_take_turns_as_if_there_were_one(pool, tmp_path, name):
    (before, own), (after, others) = TURNS[name]
    first = tmp_path / "first"
    run(pool, (*FP32, *own), before, save_to=first)

    def trained(engine):
        """After two steps: two with an engine and perhaps another layout, two more."""
        root = tmp_path / engine
        run(pool, (*FP32, *others, f"zero.engine={engine}"), after, load_from=first / "step-0000000002", first_step=2, save_to=root)
        return run(pool, (*FP32, *own), before, load_from=root / "step-0000000004", first_step=4)

    assert_same(trained("deepspeed"), trained("fsdp"))


def train_a_run(path, settings):
    forget_earlier_engines()
    os.environ |= {"DS_ACCELERATOR": "cpu", "LOCAL_RANK": "0"}
    config = tiny_config(Path(path), "train.check_replicas_every_n_steps=4", "checkpoint.every_n_steps=4", "train.num_steps=8", *settings)
    run = build.build_run(config, device=torch.device("cpu"), resume="auto", console=Console(quiet=True), world_size=2)
    train(run, resume_command="")
    return losses(run) if run.is_main else None


def test_the_train_loop_saves_compares_copies_and_goes_on(pool, tmp_path):
    """As under the fsdp engine, under which it goes on in the end."""
    path = write_config(tmp_path)
    expected = pool.run(train_a_run, str(path), ("run.name=fsdp", "zero.stage=2"), world_size=2)[0]
    for stop, engine in ((3, "deepspeed"), (6, "deepspeed"), (8, "fsdp")):
        settings = ("run.name=turns", "zero.stage=2", f"zero.engine={engine}", f"train.stop_at_step={stop}")
        found = pool.run(train_a_run, str(path), settings, world_size=2)[0]
    assert found.keys() == expected.keys() and list(found.values()) == pytest.approx(list(expected.values()), rel=1e-6)


def skip_a_step(stage, how):
    engine, config = new_engine((*FP32, DEEPSPEED, f"zero.stage={stage}", "train.micro_batch_size=1"), 2)
    first = step(engine, config, 0)
    before = whole_tensors(engine)
    skipped = step(engine, config, 1, **how)
    unchanged = all(torch.equal(tensor, before[name]) for name, tensor in whole_tensors(engine).items())
    return first.skipped, skipped.skipped, skipped.unreadable, skipped.grad_norm, unchanged, step(engine, config, 2).grad_norm


def two_steps(stage):
    engine, config = new_engine((*FP32, DEEPSPEED, f"zero.stage={stage}", "train.micro_batch_size=1"), 2)
    return step(engine, config, 0).grad_norm, step(engine, config, 2).grad_norm


LOSS_TOO_LARGE, UNREADABLE = {"largest_loss": 1.0}, {"unreadable": True}


@pytest.mark.parametrize(
    ("stage", "how"),
    [
        pytest.param(2, LOSS_TOO_LARGE, id="2-loss too large"),
        pytest.param(3, UNREADABLE, id="3-unreadable"),
        pytest.param(2, UNREADABLE, id="2-unreadable", marks=pytest.mark.full),
        pytest.param(3, LOSS_TOO_LARGE, id="3-loss too large", marks=pytest.mark.full),
    ],
)
def test_a_step_that_must_not_count_changes_nothing(pool, stage, how):
    first, skipped, unreadable, norm, unchanged, next_norm = pool.run(skip_a_step, stage, how, world_size=2)[0]
    assert not first and skipped and unchanged and math.isfinite(norm) and unreadable == ("unreadable" in how)
    assert next_norm == pool.run(two_steps, stage, world_size=2)[0][1]  # no gradient is left over


def take_a_step_without_finite_gradients(stage, dtype):
    engine, config = new_engine((f"precision.dtype={dtype}", DEEPSPEED, f"zero.stage={stage}"), 2)
    first = step(engine, config, 0)
    before = whole_tensors(engine)
    (model,) = engine._stage.chunks
    hook = model.get_parameter("blocks.0.mixer_norm.weight").register_hook(lambda gradient: gradient * math.inf)
    spoiled = step(engine, config, 1)
    hook.remove()
    unchanged = all(torch.equal(tensor, before[name]) for name, tensor in whole_tensors(engine).items())
    return first.skipped, spoiled.skipped, math.isfinite(spoiled.loss), math.isfinite(spoiled.grad_norm), unchanged, step(engine, config, 2).skipped


@pytest.mark.parametrize(("stage", "dtype"), [(2, "bf16"), (3, "bf16"), pytest.param(2, "fp32", marks=pytest.mark.full), (3, "fp32")])
def test_a_step_whose_gradients_alone_are_not_finite_is_skipped_and_said_to_be(pool, stage, dtype):
    found = pool.run(take_a_step_without_finite_gradients, stage, dtype, world_size=2)
    assert found == [(False, True, True, False, True, False)] * 2


def memory_after_a_trial(settings):
    """A job: whether what an engine held is there after the trial for which it was built."""
    config, held, build_noted = without_auto(load_config(os.devnull, [*MODEL, *FP32, DEEPSPEED, *settings])), [], build.build_engine
    new_engine((*FP32, DEEPSPEED, *settings), 1)[0].end()  # sets the process up

    def noted(*arguments, **options):
        engine = build_noted(*arguments, **options)
        held.extend(weakref.ref(each) for each in (engine, engine._zero, engine._state._flats[0].untyped_storage()))
        return engine

    mesh = build_mesh(run_topology(config.parallel, world_size=1), device_type="cpu", shard_size=1)
    found = run_trial(config, mesh=mesh, device=torch.device("cpu"), build_engine=noted)
    return isinstance(found, Trial), [reference() is not None for reference in held]


@pytest.mark.parametrize("settings", [("zero.stage=2",), ("zero.stage=3", OPTIMIZER, "zero.offload_params=cpu")], ids=["2", "3 offloaded"])
def test_a_trial_leaves_nothing_of_its_engine(pool, settings):
    assert pool.run(memory_after_a_trial, settings, world_size=1) == [(True, [False] * 3)]


def places_without_torchrun(host, number):
    """A job under mpirun: what DeepSpeed finds in the environment."""
    rank = dist.get_rank()
    with patch.dict(os.environ), patch.object(device.platform, "node", lambda: host.format(rank)):
        os.environ.pop("LOCAL_RANK", None)
        device.name_device_for_deepspeed(torch.device("cpu") if number is None else torch.device("cuda", number))
        return os.environ["LOCAL_RANK"]


@pytest.mark.parametrize(
    ("host", "number", "expected"), [("one", None, ["0", "1", "2"]), ("host {}", None, ["0", "0", "0"]), ("one", 5, ["5", "5", "5"])]
)
def test_deepspeed_is_told_the_place_on_the_host_where_the_launcher_does_not(pool, host, number, expected):
    assert pool.run(places_without_torchrun, host, number, world_size=3) == expected


def copies(stage, tensor_ranks):
    settings = (*FP32, DEEPSPEED, f"zero.stage={stage}", f"parallel.tensor_parallel_size={tensor_ranks}")
    engine, _ = new_engine(settings, 2)
    replicas = engine.replicas()
    return [(axis.size, sorted(names)) for axis, names in replicas.axes], {item.parameter for item in replicas.tensors if item.key == WEIGHT}


def test_copies_of_weights_are_known(pool):
    ((size, names),), held = pool.run(copies, 2, 1, world_size=2)[0]
    assert size == 2 and "embedding.weight" in names and set(names) == held
    ((size, names),), held = pool.run(copies, 3, 2, world_size=2)[0]
    assert size == 2 and "blocks.0.mixer_norm.weight" in names and "embedding.weight" not in names and set(names) == held


def test_without_deepspeed_the_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(ConfigError, match=r"zero\.engine is deepspeed, but DeepSpeed cannot be imported .* pip install 'phase8\[deepspeed\]'"):
        import_deepspeed()


def test_swap_directories_are_empty_and_go_with_the_process(tmp_path):
    """Another process, which ends."""
    (tmp_path / "run.swap").mkdir()
    (tmp_path / "run.swap" / "left").touch()
    code = (
        "import sys, pathlib, torch.distributed as dist\n"
        "from phase8.errors import StorageError\n"
        "from phase8.zero.swap import fresh_swap_directory\n"
        "dist.init_process_group('gloo', store=dist.HashStore(), rank=0, world_size=1)\n"
        "try:\n"
        "    fresh_swap_directory(pathlib.Path(sys.argv[1]), 'full', num_bytes=10**18)\n"
        "except StorageError as error:\n"
        "    print(error)\n"
        "directory = fresh_swap_directory(pathlib.Path(sys.argv[1]), 'run', num_bytes=1000)\n"
        "assert directory.is_dir() and not list(directory.iterdir())\n"
        "(directory / 'swapped').touch()"
    )
    ended = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert ended.returncode == 0, ended.stderr
    assert "888 PiB will be offloaded to" in ended.stdout and not list(tmp_path.iterdir())


def host_bytes(settings):
    """Returns the bytes of all tensors that the engine of DeepSpeed offloads, and their bytes by the plan."""
    engine, config = new_engine(settings, 1)
    step(engine, config, 0)
    zero = engine._zero
    masters = zero.single_partition_of_fp32_groups if config.zero.stage < 3 else zero.fp32_partitioned_groups_flat
    tensors = [*masters, *(master.grad for master in masters if master.grad is not None)]
    tensors += [value for state in zero.optimizer.state.values() for value in state.values()]
    if config.zero.stage < 3:
        tensors += zero.param_buffer_of_bit16_for_cpu_offload_groups
    else:
        tensors += [zero.grad_partitions_flat_buffer, *(zero.param_groups_fp16_flat_cpu_memory if config.zero.offload_params == "cpu" else ())]
    storages = {each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in tensors}
    planned = fullest(plan_stages(config, world_size=1, device_type="cpu")).memory.host_bytes
    return sum(storages.values()), planned


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("settings", [("zero.stage=2", OPTIMIZER), ("zero.stage=3", OPTIMIZER), OFFLOADED], ids=["2", "3", "3 parameters"])
def test_what_is_offloaded_takes_the_host_memory_that_is_planned(pool, settings, precision):
    ((found, planned),) = pool.run(host_bytes, (f"precision.dtype={precision}", DEEPSPEED, *settings), world_size=1, timeout_seconds=120.0)
    assert found == pytest.approx(planned, rel=0.02)


@pytest.mark.full
def test_what_is_offloaded_to_nvme_is_what_is_offloaded_to_the_host(pool, tmp_path):
    """DeepSpeed compiles for two minutes first. Smaller buffers than this it does not offload."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    builder = importlib.import_module("deepspeed.ops.op_builder").AsyncIOBuilder()
    if not builder.is_compatible(verbose=False):
        pytest.skip("a compiler or libaio is missing")
    large = (*FP32, "model.d_model=256", "model.ffn_size=1024", DEEPSPEED)
    on_nvme = ("zero.stage=3", "zero.offload_optimizer=nvme", "zero.offload_params=nvme", f"zero.nvme_path={tmp_path / 'nvme'}")
    found = {}
    for name, settings in {"host": OFFLOADED, "nvme": on_nvme}.items():
        run(pool, (*large, *settings), 1, save_to=tmp_path / name, timeout_seconds=400)
        found[name] = run(pool, (*large, *settings), 1, load_from=tmp_path / name / "step-0000000002", first_step=2)
    (numbers, tensors), (expected_numbers, expected_tensors) = found["nvme"], found["host"]
    assert numbers == expected_numbers and all(torch.equal(tensors[name], value) for name, value in expected_tensors.items())


@pytest.fixture(params=["pin_memory", "async_io"])
def lock(request, monkeypatch, tmp_path):
    """The lock of a compilation that never needs a compiler, of either op, and what is said meanwhile."""
    import_deepspeed()

    def load(self, verbose):
        (tmp_path / "async_io" / "async_io.so").touch()
        return SimpleNamespace(aio_handle=object)

    monkeypatch.setattr("deepspeed.ops.op_builder.AsyncIOBuilder.load", load)
    monkeypatch.setattr(async_io, "_SECONDS_BETWEEN_LOOKS", 0.0)
    monkeypatch.setattr(async_io, "_SECONDS_BEFORE_A_WORD", 0.0)
    monkeypatch.setattr("torch.utils.cpp_extension._get_build_directory", lambda name, verbose: str(tmp_path / name))
    for name in ("pin_memory", "async_io"):
        (tmp_path / name).mkdir()
    said = []
    path = tmp_path / request.param / "lock"
    monkeypatch.setattr(async_io, "warn", said.append)
    return path, said


def test_what_cannot_be_compiled_is_refused(monkeypatch):
    import_deepspeed()
    monkeypatch.setattr("deepspeed.ops.op_builder.AsyncIOBuilder.is_compatible", lambda self, verbose: True)
    require_async_io()
    monkeypatch.setattr("deepspeed.ops.op_builder.AsyncIOBuilder.is_compatible", lambda self, verbose: False)
    with pytest.raises(ConfigError, match=r"^zero\.nvme_path is given, .*apt install g\+\+ ninja-build libaio-dev.* and zero\.nvme_path to null\.$"):
        require_async_io()


def test_a_compilation_says_when_it_begins_and_ends(lock):
    path, said = lock
    load_async_io(speaks=False)
    assert said == []
    (path.parents[1] / "async_io" / "async_io.so").unlink()
    load_async_io()
    assert len(said) == 2 and re.fullmatch(r"compiling DeepSpeed's async_io once, for one to two minutes; later runs find it in \S+", said[0])
    assert re.fullmatch(r"DeepSpeed's async_io is compiled \(\d+ s\)", said[1])
    load_async_io()  # it is there
    assert len(said) == 2


def test_a_compilation_that_was_killed_is_explained(lock):
    path, _ = lock
    path.touch()
    os.utime(path, (0, 0))
    with pytest.raises(ConfigError, match=r"lock is older than any compilation takes, .* delete the file"):
        load_async_io()


@pytest.mark.parametrize("is_held", [True, False])
def test_who_waits_for_a_compilation_says_for_whom_and_since_when(lock, monkeypatch, is_held):
    """The lock goes at the second look after the sentence."""
    path, said = lock
    path.touch()
    looks = []

    def sleep(seconds):
        looks.append(len(said))
        if len(looks) == 3:
            path.unlink()

    monkeypatch.setattr(async_io.time, "sleep", sleep)
    with path.open() if is_held else nullcontext():
        load_async_io()
    since = r"since \d\d:\d\d:\d\d"
    expected = rf"waiting for process {os.getpid()}, which has been compiling DeepSpeed's {path.parent.name} {since}"
    if not is_held:
        expected = rf"waiting for a compilation of DeepSpeed's {path.parent.name} {since}, but no process of this host .* was killed: delete {path}"
    assert re.fullmatch(expected, said[0]) and looks == [1, 1, 1] and [text.split()[0] for text in said[1:]] == ["compiling", "DeepSpeed's"]


@pytest.mark.parametrize("architectures", ["9.0a", None])
def test_names_of_gpus_that_deepspeed_cannot_read_are_put_aside_while_it_compiles(architectures, monkeypatch):
    import_deepspeed()
    name, seen = "TORCH_CUDA_ARCH_LIST", []
    monkeypatch.delenv(name, raising=False)
    if architectures is not None:
        monkeypatch.setenv(name, architectures)

    def load(self, verbose):
        seen.append(os.environ.get(name))
        raise RuntimeError

    monkeypatch.setattr("deepspeed.ops.op_builder.AsyncIOBuilder.load", load)
    with pytest.raises(RuntimeError):
        load_async_io()
    assert seen == [None] and os.environ.get(name) == architectures


def save_as_deepspeed_does(stage, directory):
    engine, config = new_engine((*FP32, DEEPSPEED, f"zero.stage={stage}"), 2)
    step(engine, config, 0)
    engine._engine.save_checkpoint(directory, tag="global_step1")
    return whole_tensors(engine)


def imported(source, destination, *options):
    code = load_door("reshard_checkpoint").main([str(source), str(destination), *options])
    return code, open_checkpoint(find_checkpoint(destination)) if code == 0 else None


@pytest.mark.parametrize("stage", [2, 3])
def test_checkpoints_of_deepspeed_itself_are_imported_if_they_are_trusted(pool, tmp_path, capsys, stage):
    expected = pool.run(save_as_deepspeed_does, stage, str(tmp_path / "theirs"), world_size=2)[0]
    config = tmp_path / "model.yaml"
    config.write_text(yaml.safe_dump({"model": config_to_mapping(load_config(os.devnull, [*MODEL, *FP32]))["model"], "precision": {"dtype": "fp32"}}))
    assert imported(tmp_path / "theirs", tmp_path / "ours")[0] == 2 and "give --trust-pickle." in capsys.readouterr().err
    assert imported(tmp_path / "theirs", tmp_path / "ours", "--trust-pickle")[0] == 2 and "with --config." in capsys.readouterr().err
    sources = {"deep/ours": tmp_path / "theirs"}
    trusted = ("--trust-pickle", "--config", str(config))
    assert imported(tmp_path / "theirs", tmp_path, *trusted)[0] == 4 and "is there already" in capsys.readouterr().err
    if stage == 2:  # DeepSpeed makes no universal checkpoints of stage 3 without more
        universal = tmp_path / "global_step1_universal"
        folders = ("--input_folder", tmp_path / "theirs" / "global_step1", "--output_folder", universal)
        subprocess.run([sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", *folders, "--inject_missing_state"], check=True)
        sources["universal"] = universal
    for name, source in sources.items():
        code, found = imported(source, tmp_path / name, *trusted)
        assert code == 0 and found.step == 0, capsys.readouterr().err
        weights = {key: value for key, value in expected.items() if key.startswith("model.")}
        assert set(found.tensor_names) == set(weights) and all(torch.equal(found.read(key), value) for key, value in weights.items())
    assert not [path for path in tmp_path.rglob(".*") if path.is_dir()]


def test_what_is_for_deepspeed_is_for_nothing_else(tmp_path, capsys):
    assert imported(tmp_path, tmp_path / "x", "--trust-pickle")[0] == 2
    assert "--trust-pickle is for a checkpoint that DeepSpeed wrote" in capsys.readouterr().err


ON_GPUS = {
    "one zero 2": ranks(stage=2, more=("train.micro_batch_size=1",)),
    "one zero 3 compiled, offloaded": ranks(more=(*OFFLOADED, "train.compile.enabled=true")),
    "zero 2": ranks(dp=2, stage=2, more=("train.micro_batch_size=1",)),
    "zero 3 compiled": ranks(dp=2, stage=3, more=("train.compile.enabled=true",)),
    "zero 3 offloaded": ranks(dp=2, more=OFFLOADED),
    "tp2 zero 2": ranks(tp=2, stage=2),
    "tp2 dp2 zero 2": ranks(tp=2, dp=2, stage=2),
    "tp2 dp2 zero 3": ranks(tp=2, dp=2, stage=3),
}


def losses_on_gpus(settings, world_size):
    engine, config = new_engine((*GPU_MODEL, *settings), world_size, "cuda")
    return [(result.loss, result.grad_norm) for result in (step(engine, config, number) for number in range(NUM_STEPS))]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("name", ON_GPUS)
def test_gpus_follow_the_other_engine(pool, dtype, name):
    world_size, settings = ON_GPUS[name]
    require_gpus(world_size)
    precision = f"precision.dtype={dtype}"
    expected = pool.run(losses_on_gpus, (precision,), 1, world_size=1, backend=NCCL, timeout_seconds=240)[0]
    found = pool.run(losses_on_gpus, (precision, *settings, DEEPSPEED), world_size, world_size=world_size, backend=NCCL, timeout_seconds=240)[0]
    for ours, theirs in zip(found, expected, strict=True):
        assert ours == pytest.approx(theirs, rel=TOLERANCE[dtype][0])
