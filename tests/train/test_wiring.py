"""Every promise of the config and of the loop reaches the run: each test trains for a few steps and looks at what came of it."""

import errno
import io
import math
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import weakref
from dataclasses import replace
from multiprocessing.connection import wait
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from rich.console import Console
from torch._functorch import config as functorch_config

from phase8.checkpoint.load import list_checkpoints, open_checkpoint
from phase8.checkpoint.model_source import tokenizer_of
from phase8.data.indexed import IndexedWriter
from phase8.data.made_with import made_with
from phase8.data.pair_record import record_path
from phase8.data.tokenizer import load_tokenizer
from phase8.data.tokenizer_training import train_sentencepiece
from phase8.errors import ConfigError, CorruptionError, DataError, DivergenceError, StorageError
from phase8.generate import decode
from phase8.model.block import call
from phase8.model.host_copies import HostCopies
from phase8.model.parameters import decayed_parameter_names
from phase8.model.recomputation import recomputed
from phase8.observe.metrics import MetricsWriter
from phase8.optim.schedule import learning_rate
from phase8.shared_sequence import WHOLE
from phase8.train import build, loop, sample, saver, trainer
from phase8.train.datasets import open_run_data
from phase8.train.engine import fsdp
from phase8.train.loop import train
from phase8.train.signals import StopRequest
from tests.train.tiny_run import assert_same_weights, losses, prepare, records, tiny_config, train_tiny, weights, with_blend, write_documents

ROOT = Path(__file__).parents[2]
PROMPT = "def <ma"
NO_CHECKPOINTS = "checkpoint.every_n_steps=0"


@pytest.fixture(autouse=True)
def _torch_settings_are_global():
    precision = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(precision)
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def console():
    """A console that remembers what was printed."""
    return Console(file=io.StringIO(), width=500)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return train_sentencepiece(["def main(): pass\n"] * 50, tmp_path_factory.mktemp("tokenizer") / "small.model", vocab_size=280)


@pytest.fixture
def before_step(monkeypatch):
    """Registers what is to happen at the beginning of a step, after its data were read."""

    def register(run, step, action):
        original = fsdp.train_step

        def train_step(*arguments, **options):
            if run.position.step + 1 == step:
                action()
            return original(*arguments, **options)

        monkeypatch.setattr(fsdp, "train_step", train_step)

    return register


@pytest.fixture
def stopped_before_the_first_step(monkeypatch):
    class EarlyStop(StopRequest):
        def __enter__(self):
            super().__enter__()
            os.kill(os.getpid(), signal.SIGTERM)
            return self

    monkeypatch.setattr(loop, "StopRequest", EarlyStop)


def first_step(run):
    return next(record for record in records(run) if "loss" in record)


def checkpoint_steps(run):
    return [open_checkpoint(path).step for path in list_checkpoints(run.directory.checkpoints)]


def held_out_loss(run, dataset):
    """Mean loss on the windows of an evaluation of four sequences, from the logits."""
    count = dataset.order.num_windows[0]
    tokens = torch.stack([dataset[0, i * count // 4]["tokens"] for i in range(4)])
    with torch.no_grad():
        logits = run.engine.train_state.model.logits(run.engine.train_state.model(tokens[:, :-1])[0])
    return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).item()


def test_the_end_prints_a_sample_and_draws_the_report(tiny, tokenizer, console, tmp_path):
    original = shutil.copy(tokenizer, tmp_path / "mine.model")
    settings = [f"data.tokenizer={original}", "model.vocab_size=300", "observe.report=true", "observe.sample_tokens=8", "train.num_steps=5"]
    run = prepare(tiny, *settings, f"observe.sample_prompt={PROMPT}", console=console)
    (tmp_path / "mine.model").unlink()
    train(run, resume_command="")
    output = console.file.getvalue()
    sample = re.search(r"─ sample ─+\n(.+?)\n─+\n", output, re.DOTALL).group(1)
    page = (run.directory.path / "report" / "index.html").read_text()
    assert sample.startswith(PROMPT) and len(sample) > len(PROMPT)
    assert "<pre>def &lt;ma" in page and "planned memory" in page
    assert (run.directory.path / "report" / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert f"report: {run.directory.path / 'report' / 'index.html'}" in output
    attached = open_checkpoint(list_checkpoints(run.directory.checkpoints)[0]).attachment("tokenizer.model")
    assert attached.read_bytes() == tokenizer.read_bytes()


def test_a_stop_signal_in_the_last_step_still_draws_the_report(tiny, console, before_step):
    run = prepare(tiny, "train.stop_at_step=2", "observe.report=true", console=console)
    before_step(run, 2, lambda: os.kill(os.getpid(), signal.SIGTERM))
    train(run, resume_command="resume with this")
    assert (run.directory.path / "report" / "index.html").exists() and checkpoint_steps(run) == [2]
    assert "resume with this" not in console.file.getvalue()


def test_a_finished_run_without_a_report_draws_it_when_started_again(tiny, console):
    finished = train_tiny(tiny, "train.num_steps=5")
    page = finished.directory.path / "report" / "index.html"
    assert not page.exists()
    train_tiny(tiny, "train.num_steps=5", "observe.report=true")
    assert page.exists()
    page.write_text("kept")
    train(prepare(tiny, "train.num_steps=5", "observe.report=true", console=console), resume_command="")
    assert page.read_text() == "kept" and "has already reached step 5" in console.file.getvalue()


@pytest.fixture
def heeded():
    """Hanging up means something although the tests themselves may have been started by nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.usefixtures("heeded")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1])
def test_a_stop_signal_says_that_it_stops_after_this_step_and_how_to_go_on(tiny, console, before_step, capfd, number):
    run, before = prepare(tiny, console=console), signal.getsignal(number)
    before_step(run, 2, lambda: os.kill(os.getpid(), number))
    train(run, resume_command="resume with this")
    name = signal.Signals(number).name
    assert f"{name}: stopping after this step" in capfd.readouterr().err
    assert f"{name}: saved at step 2; go on with:\n  resume with this" in console.file.getvalue()
    assert checkpoint_steps(run) == [2] and signal.getsignal(number) is before


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGUSR1])
def test_a_signal_that_a_run_was_started_to_ignore_does_not_stop_it(tiny, before_step, number):
    """As nohup does."""
    before = signal.signal(number, signal.SIG_IGN)
    try:
        run = prepare(tiny, "train.stop_at_step=4")
        before_step(run, 2, lambda: os.kill(os.getpid(), number))
        train(run, resume_command="")
    finally:
        signal.signal(number, before)
    assert run.position.step == 4


@pytest.mark.usefixtures("heeded")
def test_a_stop_signal_is_heeded_when_nobody_can_be_told(monkeypatch):
    """The terminal that has closed is also where the notice would go."""

    def gone(descriptor, text):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "write", gone)
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGHUP)
    assert stop.received == "SIGHUP"


@pytest.mark.parametrize("enabled", [True, False])
def test_tensorboard_events_are_written_when_on(tiny, enabled):
    run = train_tiny(tiny, "train.stop_at_step=1", f"observe.tensorboard={str(enabled).lower()}")
    assert len(list(run.directory.path.rglob("events.out.tfevents*"))) == enabled


def test_the_banner_names_what_runs_on_what_and_why(tiny, console):
    run = prepare(tiny, "train.compile.enabled=false", "train.recompute=full", console=console)
    lines = {line[2:].split("  ")[0]: line for line in console.file.getvalue().splitlines() if line.startswith("  ")}
    num_parameters = sum(parameter.numel() for parameter in run.engine.train_state.model.parameters())
    num_tokens = sum(source.num_tokens for source in run.data.train.sources)
    for name, words in (("mixer", "plain torch references (lorentz window"), ("loss", "plain torch references")):
        assert words in lines[name] and lines[name].endswith("the Triton kernels need a GPU")
    assert "CPU" in lines["device"]
    assert f"({num_parameters:,})" in lines["parameters"] and f"{num_tokens:,} tokens, 200 documents" in lines["data"]
    for kind in ("weights", "gradients", "optimizer", "activations"):
        assert f"{kind} " in lines["planned memory"]
    assert "full" in lines["recomputation"] and lines["torch.compile"].endswith("off") and str(run.directory.path) in lines["run directory"]


def test_mfu_is_a_ratio_of_the_given_peak_and_null_without_one(tiny):
    known, unknown = (
        train_tiny(tiny, f"run.name={name}", "train.stop_at_step=1", *settings)
        for name, settings in (("known", ["observe.peak_flops=1e9"]), ("unknown", []))
    )
    record = first_step(known)
    assert record["mfu"] == pytest.approx(record["tokens_per_second"] * trainer.training_flops_per_token(known.config.model) / 1e9)
    assert first_step(unknown)["mfu"] is None


@pytest.mark.parametrize("limit", [0.0, 1e-2])
def test_the_first_update_is_that_of_the_clipped_gradient(tiny, limit):
    settings = ["optim.eps=1.0", "optim.weight_decay=0", "optim.warmup_steps=0", "optim.schedule=constant", "train.stop_at_step=1"]
    run = prepare(tiny, *settings, f"optim.gradient_clip_norm={limit}")
    before = {name: value.detach().clone() for name, value in weights(run).items()}
    tokens = torch.stack([run.data.train[number]["tokens"] for number in range(4)])
    (run.engine.train_state.model.loss_sum(tokens[:, :-1], tokens[:, 1:]) / (4 * 24)).backward()
    gradients = {name: parameter.grad.clone() for name, parameter in run.engine.train_state.model.named_parameters()}
    run.engine.train_state.optimizer.zero_grad()
    norm = math.sqrt(sum(gradient.square().sum().item() for gradient in gradients.values()))
    train(run, resume_command="")
    assert norm > 0.1 and first_step(run)["grad_norm"] == pytest.approx(norm, rel=1e-4)
    scale = limit / norm if limit else 1.0
    for name, gradient in gradients.items():
        clipped = gradient * scale
        # The first step of AdamW: its moments are the gradient and its square.
        expected = before[name] - 1e-2 * clipped / (clipped.abs() + 1.0)
        change = (weights(run)[name] - before[name]).norm()
        assert (weights(run)[name] - expected).norm() <= 1e-2 * change + 1e-6, name


def test_every_step_uses_and_records_the_learning_rate_of_the_schedule(tiny):
    run = prepare(tiny, "train.num_steps=7", NO_CHECKPOINTS)
    used = []
    run.engine.train_state.optimizer.register_step_pre_hook(lambda optimizer, *_: used.append([group["lr"] for group in optimizer.param_groups]))
    train(run, resume_command="")
    expected = [learning_rate(step, run.config.optim, num_steps=7) for step in range(1, 8)]
    assert used == [[rate, rate] for rate in expected] and len(set(expected)) > 4
    assert [record["learning_rate"] for record in records(run) if "loss" in record] == expected


def test_weight_decay_applies_to_the_matrices_alone(tiny):
    run = prepare(tiny, "optim.weight_decay=0.25", "optim.betas=[0.8, 0.7]")
    names = {parameter: name for name, parameter in run.engine.train_state.model.named_parameters()}
    groups = {group["weight_decay"]: {names[p] for p in group["params"]} for group in run.engine.train_state.optimizer.param_groups}
    decayed = decayed_parameter_names(run.engine.train_state.model)
    assert groups == {0.25: decayed, 0.0: set(names.values()) - decayed}
    assert "head.weight" in groups[0.25] and {"embedding.weight", "norm.weight"} <= groups[0.0]
    assert all(group["betas"] == (0.8, 0.7) for group in run.engine.train_state.optimizer.param_groups)


@pytest.mark.parametrize("enabled", [True, False])
def test_compile_compiles_every_block_as_asked(tiny, monkeypatch, enabled):
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module, **options: compiled.append((module, options)))
    run = prepare(tiny, f"train.compile.enabled={str(enabled).lower()}", "train.compile.mode=max-autotune", "train.compile.fullgraph=true")
    options = {"mode": "max-autotune-no-cudagraphs", "fullgraph": True}  # graphs are train.cuda_graphs
    model = run.engine.train_state.model
    assert compiled == ([(module, options) for module in (*model.blocks.values(), model.norm)] if enabled else [])


def test_the_compiler_is_the_one_that_the_config_names(tiny, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module, **options: compiled.append(options))
    prepare(tiny, "train.compile.enabled=true", "train.compile.backend=aot_eager")
    assert compiled == [{"mode": "default", "fullgraph": False, "backend": "aot_eager"}] * 3
    with pytest.raises(ConfigError, match=r"train\.compile\.backend is neuron, but torch knows .*inductor.*; name one of these, or install"):
        prepare(tiny, "train.compile.enabled=true", "train.compile.backend=neuron", "run.name=other")


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ([], ["none", "none", "none"]),
        (["train.recompute=full"], ["full", "full", "full"]),
        (["train.recompute=selective"], ["selective", "selective", "selective"]),
        (["train.recompute=full", "train.recompute_every_n_layers=2"], ["full", "none", "full"]),
    ],
)
def test_recomputation_reaches_the_model(tiny, settings, expected):
    model = prepare(tiny, "model.num_layers=3", *settings).engine.train_state.model
    runs = [(block.run_outside, block.run_inside, block.run_mixer) for block in model.blocks.values()]
    assert runs == [{"none": (call, call, call), "full": (call, recomputed, call), "selective": (call, call, recomputed)}[how] for how in expected]


def test_inputs_are_copied_to_the_host_if_asked(tiny, monkeypatch):
    copied, leave = [], HostCopies._leave
    monkeypatch.setattr(HostCopies, "_leave", lambda copies, x: (copied.append(x.shape), leave(copies, x))[1])
    for where, count in (("none", 0), ("cpu", 3)):
        run = prepare(tiny, "model.num_layers=3", "train.recompute=full", f"train.offload_activations={where}", f"run.name={where}")
        run.engine.train_state.model(torch.zeros(1, 8, dtype=torch.int64))
        assert len(copied) == count


@pytest.mark.parametrize(("recompute", "budget"), [("budget", 0.3), ("full", 1.0), ("none", 1.0)])
def test_the_compiler_is_told_its_budget(tiny, monkeypatch, recompute, budget):
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module, **options: None)
    with functorch_config.patch(activation_memory_budget=0.9):
        prepare(tiny, "train.compile.enabled=true", f"train.recompute={recompute}", "train.activation_memory_budget=0.3")
        assert functorch_config.activation_memory_budget == budget


def test_determinism_and_tf32_are_set(tiny):
    prepare(tiny, "precision.tf32=true")
    assert torch.get_float32_matmul_precision() == "high" and not torch.are_deterministic_algorithms_enabled()
    prepare(tiny, "precision.tf32=false", "train.deterministic=true")
    assert torch.get_float32_matmul_precision() == "highest" and torch.are_deterministic_algorithms_enabled()


def test_evaluation_is_of_the_validation_data_at_the_last_step_too(tiny):
    run = train_tiny(tiny, "train.num_steps=5", "train.evaluate_every_n_steps=3", NO_CHECKPOINTS)
    evaluations = [record for record in records(run) if "validation_loss" in record]
    assert [(record["step"], record["validation_tokens"]) for record in evaluations] == [(3, 96), (5, 96)]
    assert evaluations[1]["validation_loss"] == pytest.approx(held_out_loss(run, run.data.validation), rel=1e-5)
    assert abs(evaluations[1]["validation_loss"] - held_out_loss(run, run.data.train)) > 1e-4


def test_the_same_weights_have_the_same_validation_loss(tiny):
    frozen = ("optim.learning_rate=1e-30", "train.evaluate_every_n_steps=1", "train.stop_at_step=3", NO_CHECKPOINTS)
    found = [record["validation_loss"] for record in records(train_tiny(tiny, *frozen)) if "validation_loss" in record]
    assert len(found) == 3 and len(set(found)) == 1


def test_every_nth_checkpoint_is_kept(tiny):
    run = train_tiny(tiny, "train.num_steps=7", "checkpoint.every_n_steps=2", "checkpoint.keep_last=1", "checkpoint.keep_every_n_steps=4")
    assert checkpoint_steps(run) == [7, 4]


def poison(run):
    original = run.engine.train_state.model.loss_sum
    run.engine.train_state.model.loss_sum = lambda *arguments: original(*arguments) * math.nan


def test_skipped_steps_are_counted_across_a_resume(tiny):
    settings = ("train.anomaly.max_consecutive=3", NO_CHECKPOINTS)
    run = prepare(tiny, "train.stop_at_step=2", *settings)
    poison(run)
    train(run, resume_command="")
    resumed = prepare(tiny, *settings)
    assert (resumed.position.consecutive_skipped, resumed.position.total_skipped) == (2, 2)
    poison(resumed)
    with pytest.raises(DivergenceError, match=r"step 3: .* 3 in a row"):
        train(resumed, resume_command="")


def test_copies_are_compared_before_they_are_evaluated_or_saved(tiny, monkeypatch):
    seen = []

    def check(engine, *, step):
        seen.append(step)
        if step == 10:
            raise CorruptionError("step 10: norm.weight on rank 1 differs.")

    monkeypatch.setattr(trainer, "check_replicas", check)
    run = prepare(tiny, "train.check_replicas_every_n_steps=2")
    with pytest.raises(CorruptionError):
        train(run, resume_command="")
    assert seen == [2, 4, 5, 6, 8, 10] and not any("validation_loss" in record for record in records(run))


def draws():
    return random.random(), np.random.random(), torch.rand(()).item()


def seed_everything(seed):
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def test_the_random_state_goes_on_after_a_resume(tiny):
    seed_everything(5)
    train_tiny(tiny, "train.stop_at_step=2")
    expected = draws()
    seed_everything(6)
    prepare(tiny)
    assert draws() == expected


def test_a_damaged_tokenizer_in_a_checkpoint_is_found_on_resume(tiny, tokenizer, console):
    settings = (f"data.tokenizer={tokenizer}", "model.vocab_size=300", "train.stop_at_step=10")
    run = train_tiny(tiny, *settings)
    attached = run.directory.checkpoints / "step-0000000010" / "tokenizer.model"
    attached.write_bytes(attached.read_bytes()[:-1] + b"\xff")
    assert prepare(tiny, *settings, console=console).position.step == 5
    assert "step-0000000010 is damaged and passed over" in console.file.getvalue()


@pytest.mark.parametrize("name", ["vocabulary", "small.model (copy)", "small.safetensors", "small.json"])
def test_a_tokenizer_goes_with_checkpoints_whatever_its_file_is_called(tiny, tokenizer, tmp_path, name):
    shutil.copy(tokenizer, tmp_path / name)
    run = train_tiny(tiny, f"data.tokenizer={tmp_path / name}", "model.vocab_size=300", "train.num_steps=4")
    (newest,) = list_checkpoints(run.directory.checkpoints)
    assert tokenizer_of(open_checkpoint(newest)) == newest / "tokenizer.model"


def full_disk(*_, **__):
    raise StorageError("no space left on device; free some space")


def test_metrics_and_checkpoints_on_a_full_disk_do_not_stop_training(tiny, console, monkeypatch):
    run = prepare(tiny, console=console)
    for name in ("log_step", "log_evaluation", "log_event"):
        monkeypatch.setattr(MetricsWriter, name, full_disk)
    original = saver.save_checkpoint
    monkeypatch.setattr(saver, "save_checkpoint", lambda root, *, step, **rest: (original if step == 20 else full_disk)(root, step=step, **rest))
    train(run, resume_command="")
    output = console.file.getvalue()
    assert checkpoint_steps(run) == [20] and losses(run) == {}
    assert output.count("metrics are lost, training goes on") == 1 and output.count("checkpoint failed, training goes on") == 3


@pytest.mark.parametrize("foreign", [False, True])
def test_a_token_outside_the_vocabulary_is_found_before_the_first_step(tiny, tmp_path, foreign, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_documents(tmp_path / "bad", num_documents=40, seed=0)
    with IndexedWriter(tmp_path / "bad", dtype=np.dtype(np.uint16)) as writer:
        writer.add_document(np.array([*range(60)] * 40 + [61]))
    if foreign:
        record_path(tmp_path / "bad").unlink()
    for setting in ("data.train", "data.validation"):
        with pytest.raises(DataError, match=r"bad.bin holds token id 61 at position 2400, but model.vocab_size is 61"):
            prepare(tiny, f"{setting}={tmp_path}/bad")
    assert prepare(tiny, f"data.train={tmp_path}/bad", "model.vocab_size=62").position.step == 0
    config = tiny_config(tiny, f"data.train={tmp_path}/bad", f"data.cache_dir={tmp_path}/unused")
    open_run_data(config, on_progress=lambda *_: None, check_ids=False)  # as every rank but the first opens them
    assert not (tmp_path / "unused").exists()


@pytest.mark.parametrize("key", ["data.train", "data.validation"])
def test_ranks_whose_hosts_hold_other_data_do_not_train_together(tiny, tmp_path, key, monkeypatch):
    """Each read the windows of its own files: some came twice in an epoch, others never, and no rank noticed."""
    said = []
    monkeypatch.setattr(build, "broadcast_text", lambda text: said.append(text) or said[0])

    def opened(rank, seed):
        write_documents(tmp_path / "host", num_documents=40, seed=seed)
        return build._open_data(tiny_config(tiny, f"{key}={tmp_path}/host"), Console(quiet=True), SimpleNamespace(rank=rank, own_slice=WHOLE))

    first = opened(0, 0)
    assert opened(1, 0).fingerprint == first.fingerprint
    with pytest.raises(DataError, match=r"^the data on the host of rank 3 are not those of rank 0: source 0 \(host, now host\): the .* every host$"):
        opened(3, 1)
    assert said == [first.fingerprints, None, None]


@pytest.mark.parametrize("key", ["data.train", "data.validation"])
@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({}, None),
        ({"tokenizer_sha256": "0" * 64}, r"made was made with a tokenizer of sha256 0{12}, but that of data.tokenizer .*small.model is [0-9a-f]{12}"),
        ({"eod_id": 7, "eod_token": "<|end|>"}, r"documents of .*made end in token 7, '<\|end\|>', but those of data.tokenizer .* in 1, '<\|endof"),
        ({"eod_id": None, "eod_token": None}, None),
    ],
)
def test_data_that_another_tokenizer_made_are_refused_before_the_first_step(tiny, tokenizer, tmp_path, key, changes, sentence):
    own = load_tokenizer(tokenizer)
    with IndexedWriter(tmp_path / "made", dtype=np.dtype(np.uint16), made_with=replace(made_with(own, eod_id=own.eod_id), **changes)) as writer:
        writer.add_document(np.arange(60).repeat(40))
    settings = [f"{key}={tmp_path}/made", f"data.tokenizer={tokenizer}", "model.vocab_size=280"]
    if sentence is not None:
        with pytest.raises(DataError, match=sentence) as caught:
            prepare(tiny, *settings)
        assert caught.value.exit_code == 3
        settings.append("data.allow_fingerprint_change=true")
    assert prepare(tiny, *settings).position.step == 0


@pytest.mark.parametrize("data", ["train", "many_*", "blend"])
@pytest.mark.parametrize("num_workers", [0, 1])
def test_data_that_shrink_are_named_and_cost_no_finished_step(tiny, tmp_path, before_step, num_workers, data):
    for seed, name in enumerate(("train", "many_0", "many_1")):
        write_documents(tmp_path / name, num_documents=200, seed=seed)
    settings = [f"data.num_workers={num_workers}", "data.prefetch_factor=1", NO_CHECKPOINTS]
    if data == "blend":
        run = prepare(with_blend(tiny, tmp_path / "train", tmp_path / "many_0"), *settings)
    else:
        run = prepare(tiny, f"data.train={tmp_path}/{data}", *settings)

    def shrink():
        for path in tmp_path.glob("*.bin"):
            os.truncate(path, 5)

    before_step(run, 3, shrink)
    kind = message = None
    try:
        train(run, resume_command="")
    except Exception as error:  # kept as text: pytest's record of an exception is a cycle that keeps the workers running
        kind, message = type(error), str(error)
    assert kind is DataError and re.search(r"(train|many_[01])\.bin is shorter than when it was opened", message)
    assert kind.exit_code == 3 and run.position.step >= 3 and checkpoint_steps(run) == [run.position.step]


def test_a_killed_loader_worker_is_one_sentence_and_costs_no_finished_step(tiny, before_step):
    run = prepare(tiny, "data.num_workers=1", "train.evaluate_every_n_steps=0", NO_CHECKPOINTS)
    before = set(multiprocessing.active_children())  # ranks of tests that ran before in this process

    def kill_workers():
        for child in set(multiprocessing.active_children()) - before:
            child.kill()
            wait([child.sentinel])  # not join: that would take the death away from torch, which looks for it

    before_step(run, 3, kill_workers)
    with pytest.raises(DataError, match=r"^a loader worker died \([^\n]*\); check memory and data.num_workers$"):
        train(run, resume_command="")
    assert run.position.step >= 3 and checkpoint_steps(run) == [run.position.step]


def test_resuming_from_another_run_sets_the_own_one_aside_and_saves_at_once(tiny, stopped_before_the_first_step, monkeypatch):
    with monkeypatch.context() as usual:
        usual.setattr(loop, "StopRequest", StopRequest)
        other = train_tiny(tiny, "run.name=other", "train.stop_at_step=10")
        own = train_tiny(tiny, "train.stop_at_step=5")
    assert checkpoint_steps(own) == [5]
    run = train_tiny(tiny, resume=str(other.directory.path))
    assert run.position.step == 10 and checkpoint_steps(run) == [10] and checkpoint_steps(other) == [10, 5]
    aside = own.directory.path.with_name("tiny.1")
    assert [path.name for path in list_checkpoints(aside / "checkpoints")] == ["step-0000000005"] and (aside / "metrics.jsonl").exists()
    assert prepare(tiny).position.step == 10


def test_a_copied_checkpoint_of_another_name_is_neither_later_nor_moved(tiny):
    run = train_tiny(tiny, "train.stop_at_step=10")
    shutil.copytree(run.directory.checkpoints / "step-0000000010", run.directory.checkpoints / "zz")
    assert prepare(tiny, resume=str(run.directory.checkpoints / "step-0000000005")).position.step == 5
    assert sorted(path.name for path in run.directory.checkpoints.iterdir()) == ["step-0000000005", "zz"]
    assert prepare(tiny, resume=str(run.directory.checkpoints / "zz")).position.step == 10
    # Steps before the resumed one stay.
    assert sorted(path.name for path in run.directory.checkpoints.iterdir()) == ["step-0000000005", "zz"]


def test_resuming_a_finished_other_run_saves_it_here(tiny):
    other = train_tiny(tiny, "run.name=other", "train.num_steps=5")
    run = train_tiny(tiny, "train.num_steps=5", "observe.report=true", resume=str(other.directory.path))
    assert checkpoint_steps(run) == [5] and (run.directory.path / "report" / "index.html").exists()
    assert prepare(tiny, "train.num_steps=5").position.step == 5


def test_a_copied_checkpoint_is_saved_under_its_own_name(tiny, stopped_before_the_first_step, monkeypatch):
    with monkeypatch.context() as usual:
        usual.setattr(loop, "StopRequest", StopRequest)
        run = train_tiny(tiny, "train.stop_at_step=10")
    (run.directory.checkpoints / "step-0000000010").rename(run.directory.checkpoints / "zz")
    assert checkpoint_steps(train_tiny(tiny, resume=str(run.directory.checkpoints / "zz"))) == [10, 5]


CLAIM = """
import sys
from multiprocessing.connection import wait
from pathlib import Path
from phase8.errors import StorageError
from phase8.train.run_directory import RunDirectory
try:
    with RunDirectory(Path(sys.argv[1])).lock():
        pass
except StorageError as error:
    print(error)
"""


def claim_elsewhere(run):
    """What another process is told that wants to train in the directory of a run."""
    command = [sys.executable, "-c", CLAIM, str(run.directory.path)]
    return subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=True).stdout


def test_a_run_belongs_to_one_process_until_it_ends(tiny):
    run = prepare(tiny, "train.stop_at_step=1")
    expected = f"another process is training in {run.directory.path}; wait until it has finished or choose another run.name.\n"
    assert claim_elsewhere(run) == expected
    train(run, resume_command="")
    assert claim_elsewhere(run) == ""


def test_generation_does_not_run_the_compiled_blocks(tiny):
    """They would be compiled again for every length of the carried state."""
    run = prepare(tiny)
    for block in run.engine.train_state.model.blocks.values():
        block.compile(backend=lambda *_: pytest.fail("compiled"))
    run.engine.train_state.model(torch.zeros(1, 3, dtype=torch.int64), states=run.engine.train_state.model.empty_states(1))


def test_samples_at_evaluations_are_recorded_and_change_nothing(tiny, tokenizer, console):
    settings = [f"data.tokenizer={tokenizer}", "model.vocab_size=300", "train.num_steps=6", "train.evaluate_every_n_steps=2"]
    plain = train_tiny(tiny, *settings, "run.name=plain")
    sampled = ("observe.sample_at_evaluations=true", f"observe.sample_prompt={PROMPT}", "observe.sample_tokens=4")
    run = prepare(tiny, *settings, *sampled, console=console)
    train(run, resume_command="")
    samples = {record["step"]: record["text"] for record in records(run) if record.get("event") == "sample"}
    assert list(samples) == [2, 4, 6] and all(text.startswith(PROMPT) for text in samples.values()) and len(set(samples.values())) > 1
    assert console.file.getvalue().count("sample ") == 1  # the last one is printed
    assert losses(run) == losses(plain)
    assert_same_weights(run, plain)


@pytest.mark.parametrize("place", ["model", "text"])
def test_a_sample_that_does_not_fit_into_memory_costs_the_sample_and_leaves_its_memory(tiny, tokenizer, console, monkeypatch, place):
    """In a loop in which Python collects no garbage by itself."""
    settings = [f"data.tokenizer={tokenizer}", "model.vocab_size=300", "train.num_steps=4", "train.evaluate_every_n_steps=2"]
    plain = train_tiny(tiny, *settings, "run.name=plain")
    held, given_back = [], []

    def run_out(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.\nSee documentation")

    class Loop(decode.DecodingLoop):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            held.append(weakref.ref(self))

        advance = run_out

    def give_back(device_type):
        given_back.append((device_type, [each() for each in held]))

    run = prepare(tiny, *settings, "observe.sample_at_evaluations=true", f"observe.sample_prompt={PROMPT}", console=console)
    if place == "text":
        monkeypatch.setattr("phase8.generate.text.DecodingLoop", Loop)
    else:
        monkeypatch.setattr(run.engine, "whole_model", lambda: run_out)
    monkeypatch.setattr("phase8.train.trainer.give_back_memory", give_back)
    train(run, resume_command="")
    sentence = "no sample: the memory of cpu did not suffice while a sample was written; give a shorter observe.sample_prompt, or a smaller "
    assert all(f"step {step}: {sentence}" in console.file.getvalue().replace("\n", " ") for step in (2, 4))
    assert given_back == [("cpu", [None] * number if place == "text" else []) for number in (1, 2)]
    assert losses(run) == losses(plain)
    assert_same_weights(run, plain)


def test_samples_of_compiled_blocks_are_taken_from_blocks_that_are_not(tiny, tokenizer, monkeypatch):
    settings = [f"data.tokenizer={tokenizer}", "model.vocab_size=300", "observe.sample_tokens=2", "observe.sample_prompt=def"]
    run = prepare(tiny, *settings, "train.compile.enabled=true", "train.num_steps=4")
    stances = []

    def continued(*_, **__):
        stances.append(torch._dynamo.eval_frame._stance.stance)
        return "x"

    monkeypatch.setattr(sample, "continued_text", continued)
    assert sample.sample_text(run.engine.whole_model(), run.data.tokenizer, run.config, run.device) == "defx" and stances == ["force_eager"]
