"""Automatic settings of a run: measured on a GPU (played by others here), kept when it goes on, the same where nothing changed."""

import io
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from rich.console import Console

from phase8.checkpoint.load import list_checkpoints, open_checkpoint
from phase8.checkpoint.step_directories import MANIFEST_NAME, step_directory_name
from phase8.config.auto import automatic_keys, without_auto
from phase8.config.batch import run_topology
from phase8.config.load import load_config
from phase8.config.schema import ZeroSection
from phase8.distributed.mesh import build_mesh
from phase8.errors import OutOfMemoryError
from phase8.plan import candidates
from phase8.plan.candidates import Device
from phase8.train import device, memory_limits, tuning
from phase8.train.build import build_engine
from phase8.train.device import host_settings
from phase8.train.memory_limits import memory_errors, retry_with_less_memory
from phase8.train.run_directory import RunDirectory
from phase8.train.trial import Trial, run_trial
from phase8.train.tuning import COPIES, Chosen, choose_settings
from tests.train.tiny_run import losses, prepare, records, tiny_config, train_tiny, write_config

ROOT = Path(__file__).parents[2]
GPU = Device("cuda", "a GPU", memory_bytes=8 << 30, total_bytes=8 << 30)
HOST = {"data.num_workers": 1, "data.pin_memory": True, "checkpoint.asynchronous": False}
FREE = ("train.micro_batch_size=auto",)


@pytest.fixture
def tiny(tmp_path):
    return write_config(tmp_path)


@pytest.fixture
def mesh(tiny):
    topology = run_topology(tiny_config(tiny).parallel, world_size=1)
    return build_mesh(topology, device_type="cpu", shard_size=1, async_tensor_parallel=False)


@pytest.fixture
def trials(monkeypatch):
    """What trials say, by their micro batch and whether they compile; and the trials that were made."""
    speeds, made = {}, []

    def play(config, *, mesh, device, build_engine):
        made.append((config.train.micro_batch_size, config.train.compile.enabled))
        speed = speeds.get(made[-1], 100.0 * config.train.micro_batch_size)
        return speed if isinstance(speed, str) else Trial(1e3 / speed, speed, 1 << 30, 0.1)

    monkeypatch.setattr(tuning, "run_trial", play)
    monkeypatch.setattr(tuning, "host_settings", lambda config, device_type: HOST)
    return speeds, made


def choose(tiny, mesh, *settings, facts=GPU, recorded=None, **options):
    config = tiny_config(tiny, *FREE, f"data.cache_dir={tiny.parent}/cache", *settings)
    options = {"say": lambda text: None, "recorded": lambda: recorded, **options}
    return choose_settings(config, mesh=mesh, device=torch.device("cpu"), facts=facts, build_engine=build_engine, **options)


def test_the_fastest_that_was_tried_is_taken(tiny, mesh, trials):
    speeds, made = trials
    speeds |= {(4, False): 100.0, (4, True): 300.0, (2, True): 900.0}
    config, chosen = choose(tiny, mesh)
    assert made == [(4, False), (4, True)]  # a run that turns out to be long is worth compiling; a smaller microbatch is predicted to be slow
    assert (config.train.micro_batch_size, config.train.compile.enabled) == (4, True) and automatic_keys(config) == ()
    assert "300 tok/s measured" in chosen.reason and "next best: micro batch 4" in chosen.reason


@pytest.mark.parametrize(
    ("step_seconds", "host_gib", "has_rival", "is_tried"),
    [(100.0, 0, False, False), (100.0, 0, True, True), (1.0, 0, False, True), (1.0, 90, False, False), (1.0, 1, False, True)],
)
def test_a_candidate_without_a_rival_is_taken_untried_if_its_trial_is_long(
    tiny, mesh, trials, monkeypatch, step_seconds, host_gib, has_rival, is_tried
):
    _, made = trials
    find, plan = tuning.find_candidates, tuning.plan_on
    monkeypatch.setattr(tuning, "plan_on", lambda *arguments, **others: replace(plan(*arguments, **others), host_bytes=host_gib << 30))

    def found(config, **others):
        best, second, *_ = find(config, **others)
        return [replace(best, step_seconds=step_seconds), replace(second, step_seconds=step_seconds * (1.05 if has_rival else 1.2))]

    monkeypatch.setattr(tuning, "find_candidates", found)
    config, chosen = choose(tiny, mesh, "train.num_steps=10000000")
    assert bool(made) == is_tried and config.train.micro_batch_size == 4
    assert ("by plan" in chosen.reason) != is_tried


def test_a_short_run_is_not_compiled(tiny, mesh, trials):
    speeds, made = trials
    speeds[4, False] = 1e6
    config, _ = choose(tiny, mesh)
    assert made == [(4, False)] and config.train.compile.enabled is False


def test_what_runs_out_of_memory_or_cannot_be_compiled_gives_way_to_the_next(tiny, mesh, trials):
    speeds, made = trials
    speeds |= {(4, False): "out of memory", (2, False): 1e6}
    said = []
    config, _ = choose(tiny, mesh, say=said.append)
    assert made == [(4, False)] * 3 + [(2, False)] and config.train.micro_batch_size == 2  # more of the larger one is recomputed first
    assert "  out of memory" in said


def test_what_needs_as_much_as_what_ran_out_of_memory_is_not_tried(tiny, mesh, trials, monkeypatch):
    speeds, made = trials
    speeds |= {(2, False): "out of memory", (4, False): 1e6, (1, False): 1e6}
    seen = []
    find = tuning.find_candidates

    def found(config, *, below_bytes, **others):
        seen.append(below_bytes)
        candidates = find(config, below_bytes=below_bytes, **others)
        # The one of two sequences is predicted to be the fastest.
        return sorted(candidates, key=lambda each: each.config.train.micro_batch_size != 2)

    monkeypatch.setattr(tuning, "find_candidates", found)
    config, _ = choose(tiny, mesh)
    assert set(made) == {(2, False), (1, False)} and config.train.micro_batch_size == 1
    assert seen == sorted(seen, reverse=True) and len(set(seen)) == len(seen)


def test_what_was_tried_is_not_tried_again_when_another_runs_out_of_memory(tiny, mesh, trials, monkeypatch):
    speeds, made = trials
    speeds |= {(2, False): 1.0, (4, True): "out of memory"}
    find = tuning.find_candidates

    def found(config, **others):
        return sorted(find(config, **others), key=lambda each: each.config.train.micro_batch_size != 2)

    monkeypatch.setattr(tuning, "find_candidates", found)
    config, _ = choose(tiny, mesh)
    assert made[:3] == [(2, False), (2, True), (4, True)] and made.count((2, True)) == 1 and config.train.micro_batch_size == 2


def test_the_choice_is_remembered_for_such_a_run_and_for_no_other(tiny, mesh, trials):
    _, made = trials
    first = choose(tiny, mesh)
    num_trials = len(made)
    assert choose(tiny, mesh) == first and choose(tiny, mesh, "train.seed=7") == (tiny_config_of(first, seed=7), first[1]) and len(made) == num_trials
    choose(tiny, mesh, "optim.learning_rate=1e-3")
    assert len(made) == num_trials
    for settings, facts in (((), replace(GPU, name="another GPU")), (["optim.state_dtype=fp8"], GPU), (["optim.name=muon"], GPU)):
        choose(tiny, mesh, *settings, facts=facts)
        assert len(made) > num_trials
        num_trials = len(made)


def test_a_remembered_choice_brings_no_settings_of_the_host_with_it(tiny, mesh, trials, monkeypatch):
    """Neither those that another run was given, nor those of a host with another number of cores or less memory."""
    _, made = trials
    first, _ = choose(tiny, mesh, "data.num_workers=7", "checkpoint.asynchronous=true")
    number = len(made)
    again, chosen = choose(tiny, mesh)
    assert len(made) == number and again.train == first.train  # it is remembered
    assert (again.data.num_workers, again.data.pin_memory, again.checkpoint.asynchronous) == (1, True, False)
    monkeypatch.setattr(tuning, "host_settings", lambda config, device_type: HOST | {"data.num_workers": 0})
    assert choose(tiny, mesh)[0].data.num_workers == 0 and len(made) == number
    assert chosen.values["data.num_workers"] == 1  # checkpoints record what the run has


def tiny_config_of(first, *, seed):
    config, _ = first
    return config.model_copy(update={"train": config.train.model_copy(update={"seed": seed})})


def test_a_run_that_goes_on_keeps_its_settings_while_device_and_ranks_are_the_same(tiny, mesh, trials):
    _, made = trials
    config, chosen = choose(tiny, mesh)
    made.clear()
    kept, again = choose(tiny, mesh, "optim.learning_rate=1e-5", recorded=chosen.as_record())
    assert made == [] and kept.train == config.train and again.values == chosen.values and again.reason.startswith("as the run began")
    explicit = ("train.micro_batch_size=1", "train.recompute=full")
    changed, told = choose(tiny, mesh, *explicit, recorded=again.as_record())
    assert changed.train.micro_batch_size == told.values["train.micro_batch_size"] == 1
    assert changed.train.recompute == told.values["train.recompute"] == "full"
    assert told.reason == f"{again.reason}, but for train.micro_batch_size, train.recompute"
    assert choose(tiny, mesh, *explicit, recorded=told.as_record()) == (changed, told)
    said = []
    choose(tiny, mesh, recorded=chosen.as_record() | {"device": "an older GPU"}, say=said.append)
    assert said[0] == "settings are chosen anew: the device was an older GPU and is a GPU"


@pytest.mark.parametrize(
    "forged", [3, {}, {"values": 3}, {"values": {"model.d_model": 4}}, {"values": {"train.micro_batch_size": "many"}, "device": "a GPU"}]
)
def test_a_forged_record_is_no_record(tiny, mesh, trials, forged):
    _, made = trials
    config, _ = choose(tiny, mesh, recorded=forged)
    assert made and automatic_keys(config) == ()


def test_the_plan_alone_decides_when_asked(tiny, mesh, trials):
    _, made = trials
    config, chosen = choose(tiny, mesh, "train.tuning=plan")
    assert made == [] and config.train.micro_batch_size == 4
    found = re.fullmatch(
        r"micro batch 4, nothing recomputed, CUDA graphs, by plan: (\S+)k tok/s predicted; next best: micro batch 2, nothing recomputed, CUDA graphs"
        r", (\S+)k tok/s",
        chosen.reason,
    )
    assert found is not None and float(found[1]) > float(found[2]) > 0, chosen.reason
    off, chosen = choose(tiny, mesh, "train.tuning=off")
    assert off.train.compile.enabled is False and chosen.reason == "train.tuning is off"


def test_several_ranks_say_what_the_next_best_by_plan_would_have_made(tiny):
    config, mesh = tiny_config(tiny, *FREE), SimpleNamespace(topology=SimpleNamespace(world_size=2))

    def reason(facts):
        return tuning._choose(config, mesh, pytest.fail, facts, [], pytest.fail).reason

    assert re.fullmatch(r"micro batch 2, .*, by plan: \S+ tok/s predicted; next best: micro batch 1, .*, \S+ tok/s", reason(GPU))
    assert reason(replace(GPU, type="cpu", name="CPU")).endswith(", by plan")  # predictions are those of GPUs


def test_nothing_fits_is_one_sentence(tiny, mesh, trials):
    with pytest.raises(OutOfMemoryError, match=r"no settings fit into the 1 MiB that are free on a GPU: .* MiB by plan; offload with zero"):
        choose(tiny, mesh, facts=replace(GPU, memory_bytes=1 << 20))
    with pytest.raises(OutOfMemoryError, match=r"into the 102 MiB that train.device_memory_gib 0.1 leaves on a GPU: .* needs 1\d\d MiB"):
        choose(tiny, mesh, facts=GPU.limited_to(0.1))
    with pytest.raises(OutOfMemoryError, match=r"into the 205 MiB .* needs 1\d\d MiB by plan, of which 0 B may be planned; offload"):
        choose(tiny, mesh, facts=GPU.limited_to(0.2))


@pytest.mark.parametrize(
    ("zero", "words"),
    [
        (ZeroSection(), "offload with zero.stage=3 zero.offload_optimizer=cpu zero.offload_params=cpu ("),
        (ZeroSection(stage=1, offload_optimizer="cpu"), "offload with zero.stage=3 zero.offload_optimizer=cpu zero.offload_params=cpu ("),
        (ZeroSection(stage=3, offload_optimizer="cpu", offload_params="cpu"), "offload with zero.offload_gradients=true ("),
        (ZeroSection(stage=3, offload_optimizer="cpu", offload_params="cpu", offload_gradients=True), "make the model smaller, or"),
    ],
)
def test_the_remedy_names_what_a_config_does_not_ask_for_yet(zero, words):
    assert candidates._general_remedy(zero).startswith(words)


def test_a_cpu_follows_a_rule_and_its_checkpoints_tell_it(tiny):
    run = train_tiny(tiny, *FREE, "train.stop_at_step=5")
    assert run.config.train.micro_batch_size == 4 and automatic_keys(run.config) == ()
    (path,) = list_checkpoints(run.directory.checkpoints)
    stored = open_checkpoint(path).metadata
    assert stored["settings"]["values"]["train.micro_batch_size"] == 4 and stored["config"]["train"]["micro_batch_size"] == 4
    console = Console(file=io.StringIO(), width=200)
    resumed = prepare(tiny, *FREE, console=console)
    assert resumed.chosen.values == run.chosen.values and "as the run began" in console.file.getvalue()
    assert [record["event"] for record in records(run) if record.get("event") == "settings"] == ["settings"]


def test_settings_are_those_of_the_checkpoint_from_which_a_run_goes_on(tiny):
    """The newest one may be passed over, since it is damaged."""
    run = train_tiny(tiny, *FREE, "train.stop_at_step=10")
    newest, before = list_checkpoints(run.directory.checkpoints)
    (newest / MANIFEST_NAME).write_bytes(b"damaged")
    console = Console(file=io.StringIO(), width=200)
    resumed = prepare(tiny, *FREE, console=console)
    assert resumed.position.step == open_checkpoint(before).step == 5
    assert resumed.chosen.values == run.chosen.values and "as the run began" in console.file.getvalue()


def test_automatic_settings_train_as_explicit_ones(tiny):
    automatic = train_tiny(tiny, *FREE, "run.name=automatic", "train.stop_at_step=4")
    explicit = train_tiny(tiny, "train.micro_batch_size=4", "run.name=explicit", "train.stop_at_step=4")
    assert losses(automatic) == losses(explicit)


def test_a_trial_is_a_few_real_steps(tiny, mesh):
    config = tiny_config(tiny, "train.tuning=off", "train.recompute=none", "train.compile.enabled=false", "train.cuda_graphs=false")
    trial = run_trial(config, mesh=mesh, device=torch.device("cpu"), build_engine=build_engine)
    assert trial.step_seconds > 0 and trial.tokens_per_second == pytest.approx(4 * 24 / trial.step_seconds)


def raise_out_of_memory():
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (torch.OutOfMemoryError("CUDA out of memory."), r"out of memory on a GPU: the run needs \S+ MiB by plan, and 8 GiB of 8 GiB were free"),
        (MemoryError(), r"the host has too little memory; 0 B a rank are planned"),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:118] DefaultCPUAllocator: can't allocate memory"), "the host has too little memory"),
        (RuntimeError("CUDA error: out of memory"), "the host has too little page-locked memory"),
    ],
)
def test_too_little_memory_is_one_sentence(tiny, mesh, trials, error, sentence):
    config, chosen = choose(tiny, mesh)
    with pytest.raises(OutOfMemoryError, match=sentence) as caught, memory_errors(config, chosen, GPU, world_size=1, has_begun=True):
        raise error
    assert "\n" not in str(caught.value) and caught.value.exit_code == 9 and caught.value.values == chosen.values


def test_the_limit_that_a_config_sets_is_named_where_memory_runs_out(tiny, mesh, trials):
    config, chosen = choose(tiny, mesh)
    sentence = r"needs \S+ MiB by plan, and train.device_memory_gib 0.5 left it 512 MiB; "
    with pytest.raises(OutOfMemoryError, match=sentence), memory_errors(config, chosen, GPU.limited_to(0.5), world_size=1, has_begun=True):
        raise torch.OutOfMemoryError("CUDA out of memory.")


def test_settings_that_nothing_tunes_are_not_tried_again(tiny, mesh, trials):
    config, chosen = choose(tiny, mesh, "train.tuning=off")
    assert chosen.values
    with pytest.raises(OutOfMemoryError) as caught, memory_errors(config, chosen, GPU, world_size=1, has_begun=True):
        raise torch.OutOfMemoryError("CUDA out of memory.")
    assert caught.value.values is None


def test_more_than_the_host_has_is_refused_before_anything_is_taken(tiny, monkeypatch):
    monkeypatch.setattr(memory_limits, "available_bytes", lambda: 64 << 20)
    prepare(tiny)  # has some KiB of weights, gradients and optimizer on a CPU, and nothing else in host memory
    with pytest.raises(OutOfMemoryError, match=r"252 MiB are planned for weights, gradients and optimizer, and 64 MiB are available"):
        prepare(tiny, "run.name=wide", "model.d_model=192", "model.ffn_size=14000")
    settings = ("run.name=large", "zero.stage=3", "zero.offload_optimizer=cpu", "zero.offload_params=cpu", "model.d_model=192")
    settings = (*settings, "model.ffn_size=40000")
    sentence = r"too little memory: 1\.3\d GiB are planned .*, and 64 MiB are available, 1\.2\d GiB too little; use a host with more memory, or .*"
    with pytest.raises(OutOfMemoryError, match=sentence) as caught:
        prepare(tiny, *settings)
    dist.destroy_process_group()  # of one rank, for offloaded parameters: tests after this one are without any
    assert caught.value.exit_code == 9 and caught.value.values is None and not (tiny.parent / "runs" / "large" / "config.yaml").exists()


@pytest.mark.parametrize(
    ("host_gib", "device_gib", "settings", "remedy"),
    [
        (22, 80, (), "set optim.state_dtype=fp8 or zero.offload_optimizer=none zero.offload_params=none or zero.engine=deepspeed "
         "zero.offload_optimizer=nvme zero.offload_params=nvme zero.nvme_path=DIRECTORY."),
        (15, 80, (), "set zero.offload_optimizer=none zero.offload_params=none or zero.engine=deepspeed "
         "zero.offload_optimizer=nvme zero.offload_params=nvme zero.nvme_path=DIRECTORY."),
        (15, 12, (), "set zero.engine=deepspeed zero.offload_optimizer=nvme zero.offload_params=nvme zero.nvme_path=DIRECTORY."),
        (11, 12, ("zero.engine=deepspeed",), "set zero.offload_optimizer=nvme zero.offload_params=nvme zero.nvme_path=DIRECTORY."),
        (10, 12, ("optim.name=muon",), "use a host with more memory, or a smaller model or batch."),
        (11, 80, ("optim.state_dtype=fp8", "zero.offload_gradients=true"), "set zero.offload_optimizer=none zero.offload_params=none "
         "zero.offload_gradients=false or zero.engine=deepspeed zero.offload_optimizer=nvme zero.offload_params=nvme zero.offload_gradients=false "
         "zero.nvme_path=DIRECTORY optim.state_dtype=fp32."),
        (0, 80, ("optim.state_dtype=fp8",), "set zero.offload_optimizer=none zero.offload_params=none."),
    ],
)  # fmt: skip
def test_a_host_with_too_little_memory_is_told_what_fits_it_and_the_device(monkeypatch, host_gib, device_gib, settings, remedy):
    monkeypatch.setattr(memory_limits, "available_bytes", lambda: host_gib << 30)
    offloaded = ("zero.stage=3", "zero.offload_optimizer=cpu", "zero.offload_params=cpu", "train.micro_batch_size=1", "train.recompute=full")
    config = without_auto(load_config(ROOT / "configs/phase8_1b.yaml", [*offloaded, *settings]))
    device = replace(GPU, memory_bytes=device_gib << 30, total_bytes=device_gib << 30)
    with pytest.raises(OutOfMemoryError) as caught:
        memory_limits.require_host_memory(config, device, world_size=1, ranks_of_host=1)
    assert str(caught.value).partition("too little; ")[2] == remedy


@pytest.mark.parametrize(("available", "expected"), [(None, True), (100e9, True), (20e9, False)])
def test_copies_for_checkpoints_take_less_than_half_of_what_the_host_has_left(monkeypatch, available, expected):
    monkeypatch.setattr(device, "available_bytes", lambda: available)
    assert host_settings(load_config(ROOT / "configs/phase8_1b.yaml"), "cuda")["checkpoint.asynchronous"] is expected


def test_other_errors_pass():
    with pytest.raises(RuntimeError, match="shape"), memory_errors(None, Chosen(), GPU, world_size=1, has_begun=True):
        raise RuntimeError("a shape")


def test_settings_that_run_out_of_memory_while_training_give_way_to_the_next_best(tmp_path):
    attempts, said = [], []

    def attempt(refused, resume):
        attempts.append((len(refused), resume))
        if len(refused) < 2:
            raise OutOfMemoryError("too little.", {"train.micro_batch_size": 4 - len(refused)})

    retry_with_less_memory(attempt, RunDirectory(tmp_path), resume="none", is_alone=True, say=said.append)
    assert attempts == [(0, "none"), (1, "auto"), (2, "auto")] and said == ["too little. Trying the next best settings."] * 2


def test_a_run_that_ran_out_before_it_began_is_resumed_as_it_was_asked(tmp_path):
    """The checkpoints in its place are those of an earlier run."""
    directory, attempts = RunDirectory(tmp_path), []
    (directory.checkpoints / step_directory_name(3)).mkdir(parents=True)

    def attempt(refused, resume):
        attempts.append(resume)
        if len(refused) < 2:
            raise OutOfMemoryError("too little.", {"train.micro_batch_size": 4 - len(refused)}, has_begun=bool(refused))

    for asked in ("none", "elsewhere"):
        attempts.clear()
        retry_with_less_memory(attempt, directory, resume=asked, is_alone=True, say=lambda text: None)
        assert attempts == [asked, asked, "auto"]


@pytest.mark.parametrize(("values", "is_alone"), [(None, True), ({"train.micro_batch_size": 4}, False)])
def test_explicit_settings_and_ranks_beside_others_end_the_run(tmp_path, values, is_alone):
    def attempt(refused, resume):
        raise OutOfMemoryError("too little.", values)

    with pytest.raises(OutOfMemoryError):
        retry_with_less_memory(attempt, RunDirectory(tmp_path), resume="auto", is_alone=is_alone, say=lambda text: None)


STEP = {"train.micro_batch_size": 4}


@pytest.mark.parametrize(
    ("of_host", "copies", "expected"),
    [
        (True, True, [COPIES, STEP | {"checkpoint.asynchronous": False}]),
        (True, False, [STEP | {"checkpoint.asynchronous": False}]),
        (False, True, [STEP | COPIES]),
    ],
)
def test_a_host_without_room_does_without_copies_before_anything_else(tmp_path, of_host, copies, expected):
    seen = []

    def attempt(refused, resume):
        seen[:] = refused
        if len(refused) < len(expected):
            raise OutOfMemoryError("too little.", STEP | {"checkpoint.asynchronous": copies and COPIES not in refused}, of_host=of_host)

    retry_with_less_memory(attempt, RunDirectory(tmp_path), resume="none", is_alone=True, say=lambda text: None)
    assert seen == expected


def test_copies_that_were_asked_for_stay_and_the_rest_is_chosen_anew(tmp_path):
    seen = []

    def attempt(refused, resume):
        seen[:] = refused
        raise OutOfMemoryError("too little.", STEP | COPIES, of_host=True)

    with pytest.raises(OutOfMemoryError):
        retry_with_less_memory(attempt, RunDirectory(tmp_path), resume="none", is_alone=True, say=lambda text: None)
    assert seen == [COPIES, STEP | COPIES]


def test_without_copies_steps_are_the_same(tiny, mesh, trials, monkeypatch):
    monkeypatch.setattr(tuning, "host_settings", lambda config, device_type: HOST | COPIES)
    config, chosen = choose(tiny, mesh, "checkpoint.asynchronous=auto")
    assert config.checkpoint.asynchronous is True
    for record in (None, chosen.as_record()):
        without, again = choose(tiny, mesh, "checkpoint.asynchronous=auto", recorded=record, refused=[COPIES])
        assert without.checkpoint.asynchronous is False and without.train == config.train
        assert again.values == chosen.values | {"checkpoint.asynchronous": False}
    explicit, _ = choose(tiny, mesh, "checkpoint.asynchronous=true", refused=[COPIES])
    assert explicit.checkpoint.asynchronous is True


@pytest.mark.parametrize(("error", "of_host"), [(MemoryError(), True), (torch.OutOfMemoryError("CUDA out of memory."), False)])
def test_which_memory_is_lacking_is_known(tiny, mesh, trials, error, of_host):
    config, chosen = choose(tiny, mesh)
    with pytest.raises(OutOfMemoryError) as caught, memory_errors(config, chosen, GPU, world_size=1, has_begun=True):
        raise error
    assert caught.value.of_host is of_host


def test_refused_values_are_not_tried_again(tiny, mesh, trials):
    _, made = trials
    _, chosen = choose(tiny, mesh)
    made.clear()
    config, again = choose(tiny, mesh, refused=[chosen.values])
    assert again.values != chosen.values and config.train != chosen.values
