"""How a run starts: what belongs together is compared, what has changed is said, and a start that is refused leaves the run as it was."""

import io
import itertools
import json
import shutil
import stat

import pytest
import torch
from rich.console import Console

from phase8.checkpoint.load import list_checkpoints, open_checkpoint
from phase8.checkpoint.run_metadata import stored_config
from phase8.checkpoint.step_directories import SAVING_PREFIX
from phase8.config.load import config_from_mapping, config_to_mapping
from phase8.data.tokenizer_training import train_sentencepiece
from phase8.errors import CheckpointCorruptError, CheckpointError, CheckpointMismatchError, CommunicationError, ConfigError, DataError, StorageError
from phase8.train import build
from phase8.train.build import build_run
from phase8.train.changed_keys import changed_keys
from phase8.train.loop import train
from phase8.train.run_directory import RunDirectory
from tests.train.tiny_run import prepare, records, tiny_config, train_tiny, write_documents


@pytest.fixture(scope="module")
def trained(_tiny_data, tmp_path_factory):
    """A directory with the run `k` of ten steps, saved after five and ten, with a longer run and with what may be swapped."""
    directory = tmp_path_factory.mktemp("trained")
    for name in ("first", "second"):
        train_sentencepiece([f"def {name}(): pass\n"] * 50, directory / f"{name}.model", vocab_size=280)
    write_documents(directory / "other_data", num_documents=200, seed=7)
    config = directory / "tiny.yaml"
    config.write_text(_tiny_data.read_text().replace(f"{_tiny_data.parent}/runs", f"{directory}/runs"))
    settings = (f"data.tokenizer={directory}/first.model", "model.vocab_size=300")
    train_tiny(config, *settings, "run.name=k", "train.stop_at_step=10")
    train_tiny(config, *settings, "run.name=longer", "train.stop_at_step=12")
    return directory


@pytest.fixture
def runs(trained, tmp_path):
    """A copy of them, for one test."""
    return shutil.copytree(trained / "runs", tmp_path / "runs")


@pytest.fixture
def start(trained, runs):
    """Starts the run `k`, or another one."""

    def start(*overrides, resume="auto", console=None, agents=()):
        config = tiny_config(
            trained / "tiny.yaml", "run.name=k", f"run.output_dir={runs}", f"data.tokenizer={trained}/first.model", "model.vocab_size=300", *overrides
        )
        return build_run(config, device=torch.device("cpu"), resume=resume, console=console or Console(quiet=True), agents=agents)

    return start


def tree(directory):
    """Everything below a directory: kinds, permissions and contents."""
    found = {}
    for path in sorted(directory.rglob("*")):
        mode = path.lstat().st_mode
        found[str(path.relative_to(directory))] = (mode, path.read_bytes() if stat.S_ISREG(mode) else None)
    return found


def flip(path):
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


def damage(runs, *steps):
    for step in steps:
        flip(next((runs / "k" / "checkpoints" / f"step-{step:010d}").glob("model-*.safetensors")))


STEP_5 = "{runs}/k/checkpoints/step-0000000005"
NO_BATCH = ("train.global_batch_size=null", "train.micro_batch_size=2", "parallel.num_microbatches=3")
# Settings, `--resume`, the error and its sentence.
REFUSED = {
    "another model": (["model.num_layers=3"], "auto", CheckpointMismatchError, "model.num_layers was 2 and is 3"),
    "other data": (["data.train={trained}/other_data"], "auto", CheckpointMismatchError, "trained on other data"),
    "another seed": (["train.seed=1"], "auto", CheckpointMismatchError, "train.seed was 1234 and is 1"),
    "boundaries": (
        ["data.reset_at_document_boundaries=true"], "auto", CheckpointMismatchError, "data.reset_at_document_boundaries was false and is true",
    ),
    "another tokenizer": (
        ["data.tokenizer={trained}/second.model"], "auto", CheckpointMismatchError,
        r"its tokenizer is .*/step-0000000010/tokenizer.model, and data.tokenizer is of other content; .* data.allow_fingerprint_change=true",
    ),
    "another end of documents": (["data.eod_token=<|endoftext|>"], "auto", CheckpointMismatchError, "data.eod_token was null and is"),
    "another batch": (NO_BATCH, "auto", CheckpointMismatchError, "was trained with 4 sequences a step"),
    "fewer steps": (["train.num_steps=4"], "auto", ConfigError, "train.num_steps is 4, but the checkpoint is at step 10"),
    "an earlier stop": (["train.stop_at_step=4"], "auto", ConfigError, "train.stop_at_step is 4, but the checkpoint is at step 10"),
    "no data": (["data.train={trained}/missing"], "auto", DataError, "missing"),
    "no data for a new start": (["data.train={trained}/missing"], "none", DataError, "missing"),
    "no data for a new name": (["data.train={trained}/missing", "run.name=new"], "auto", DataError, "missing"),
    "no tokenizer": (["data.tokenizer={trained}/missing.model"], "auto", DataError, "missing"),
    "too small a vocabulary": (["model.vocab_size=100"], "auto", DataError, "model.vocab_size is 100"),
    "keys at odds": (["train.micro_batch_size=3"], "auto", ConfigError, "micro_batch_size"),
    "fewer steps than another run's": (["train.num_steps=4"], "{runs}/longer", ConfigError, "num_steps is 4, but the checkpoint is at step 12"),
    "fewer steps than an earlier checkpoint": (["train.num_steps=4"], STEP_5, ConfigError, "num_steps is 4, but the checkpoint is at step 5"),
    "an earlier checkpoint of another seed": (["train.seed=1"], STEP_5, CheckpointMismatchError, "train.seed was 1234"),
    "another run of another model": (["model.num_layers=3"], "{runs}/longer", CheckpointMismatchError, "another model"),
    "no such checkpoint": ([], "{runs}/nowhere", CheckpointError, "there is no checkpoint at"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_a_start_that_is_refused_leaves_everything_as_it_was(start, runs, trained, name):
    overrides, resume, error, message = REFUSED[name]
    before, console = tree(runs), Console(file=io.StringIO(), width=500)
    with pytest.raises(error, match=message) as caught:
        start(*(override.format(trained=trained) for override in overrides), resume=resume.format(runs=runs), console=console)
    assert "\n" not in str(caught.value) and tree(runs) == before
    assert "resumed" not in console.file.getvalue()


def spoil_record(runs):
    (runs / "k" / "metrics.jsonl").unlink()
    (runs / "k" / "metrics.jsonl").mkdir()


def make_a_file(directory):
    shutil.rmtree(directory)
    directory.touch()


# What is wrong with the files, settings, `--resume`, the error.
SPOILT = {
    "the named checkpoint": (lambda runs: damage(runs, 5), [], STEP_5, CheckpointCorruptError),
    "that of another run": (
        lambda runs: flip(runs / "longer/checkpoints/step-0000000012/tokenizer.model"), [], "{runs}/longer", CheckpointCorruptError,
    ),
    "all checkpoints": (lambda runs: damage(runs, 5, 10), [], "auto", CheckpointCorruptError),
    "the newest, and the one before is past the end": (lambda runs: damage(runs, 10), ["train.num_steps=4"], "auto", ConfigError),
    "checkpoints are no directory": (lambda runs: make_a_file(runs / "k/checkpoints"), [], "auto", CheckpointError),
    "superseded is no directory": (lambda runs: (runs / "k/superseded").touch(), [], STEP_5, StorageError),
    "the run is no directory": (lambda runs: make_a_file(runs / "k"), [], "auto", StorageError),
    "the parent is no directory": (lambda runs: (runs / "file").touch(), ["run.output_dir={runs}/file"], "auto", StorageError),
    "the record of steps": (spoil_record, [], "auto", StorageError),
    "the record of agents": (lambda runs: (runs / "k/launchers.json").write_text("{"), [], "auto", StorageError),
}  # fmt: skip


@pytest.mark.parametrize("name", SPOILT)
def test_what_is_spoilt_is_found_before_anything_changes(start, runs, name):
    spoil, overrides, resume, error = SPOILT[name]
    spoil(runs)
    before, console = tree(runs), Console(file=io.StringIO(), width=500)
    with pytest.raises(error):
        start(*(override.format(runs=runs) for override in overrides), resume=resume.format(runs=runs), agents=["a"], console=console)
    assert tree(runs) == before and "resumed" not in console.file.getvalue()


def refuse(*_, **__):
    raise StorageError("no space left on device; free some space")


@pytest.mark.parametrize("resume", ["none", "{runs}/longer", STEP_5])
@pytest.mark.parametrize("obstacle", ["a rank that refuses", "a place that cannot be written", "a file that cannot be written"])
def test_nothing_moves_before_everything_else_is_done(start, runs, monkeypatch, obstacle, resume):
    settings = [f"checkpoint.initialise_from={runs}/longer"] if resume == "none" else []
    if obstacle == "a rank that refuses":
        monkeypatch.setattr(build, "gather_texts", lambda text: refuse())
    elif obstacle == "a place that cannot be written":
        monkeypatch.setattr(build, "check_place", refuse)
    else:
        monkeypatch.setattr(RunDirectory, "record", refuse)
    before, console = tree(runs), Console(file=io.StringIO(), width=500)
    with pytest.raises((StorageError, CommunicationError)):
        start(*settings, resume=resume.format(runs=runs), console=console)
    assert tree(runs) == before and not {"resumed", "initialised"} & set(console.file.getvalue().split())


def test_a_start_that_has_nothing_to_do_changes_nothing(start, runs):
    before = tree(runs)
    run = start("train.stop_at_step=10", "optim.learning_rate=3e-4")
    assert run.is_complete
    run.lock.close()
    assert tree(runs) == before


def test_what_makes_way_is_told(start, runs):
    console = Console(file=io.StringIO(), width=500)
    run = start(resume=str(runs / "longer"), console=console)
    assert run.position.step == 12 and f"the earlier run of this name is now {runs / 'k.1'}\n" in console.file.getvalue()
    assert sorted(path.name for path in runs.iterdir() if path.name != ".k.lock") == ["k", "k.1", "longer"]
    assert [path.name for path in (runs / "k.1" / "checkpoints").iterdir()] and not list((runs / "k" / "checkpoints").iterdir())


@pytest.mark.parametrize("resume", ["auto", "none"])
def test_what_a_killed_save_left_goes_before_anything_is_written(start, runs, monkeypatch, resume):
    """It may be all that fills the disk, and a run that is set aside would keep it."""
    left, found = runs / "k" / "checkpoints" / f"{SAVING_PREFIX}step-0000000015-00000000", []
    left.mkdir()
    (left / "model-00000.safetensors").write_bytes(b"1")
    original = RunDirectory.record
    monkeypatch.setattr(RunDirectory, "record", lambda *arguments: (found.append(left.exists()), original(*arguments)))
    start(resume=resume)
    assert found == [False] and not list(runs.rglob(f"{SAVING_PREFIX}*"))


def attached(run):
    return {open_checkpoint(path).step: list(open_checkpoint(path).manifest.attachments) for path in list_checkpoints(run.directory.checkpoints)}


def test_a_tokenizer_of_the_same_content_may_have_another_name(start, trained, tmp_path):
    assert start(f"data.tokenizer={shutil.copy(trained / 'first.model', tmp_path / 'renamed.model')}").position.step == 10


def test_another_tokenizer_is_accepted_when_asked_for(start, trained, runs, tmp_path):
    path = shutil.copy(trained / "second.model", tmp_path / "first.model")  # a tokenizer made anew may have the place of the old one
    said, console = f"that of the run, {path}, is another: an id may mean other text", Console(file=io.StringIO(), width=500)
    run = start(f"data.tokenizer={path}", "data.allow_fingerprint_change=true", console=console)
    assert said in console.file.getvalue()
    assert run.position.step == 10 and (runs / "k" / "tokenizer.model").read_bytes() == (trained / "second.model").read_bytes()


def test_the_tokenizer_of_a_checkpoint_stays_with_a_run_that_names_none(start, runs, trained):
    run = start("data.tokenizer=null", "train.stop_at_step=12")
    train(run, resume_command="")
    assert attached(run)[12] == ["tokenizer.model"]
    assert (runs / "k/checkpoints/step-0000000012/tokenizer.model").read_bytes() == (trained / "first.model").read_bytes()


def test_keys_that_have_changed_are_said_and_recorded(start):
    console = Console(file=io.StringIO(), width=500)
    changes = ("optim.learning_rate=3e-4", "optim.betas=[0.9,0.99]", "train.global_batch_size=8", "data.num_workers=1", "observe.log_every_n_steps=7")
    run = start(*changes, "train.num_steps=12", "data.num_workers=0", console=console)
    lines = console.file.getvalue().splitlines()
    first = next(number for number, line in enumerate(lines) if line.startswith("resumed from"))
    assert lines[first + 1 : first + 5] == [
        "  optim.learning_rate: 0.01 -> 0.0003", "  optim.betas: [0.9, 0.95] -> [0.9, 0.99]", "  train.global_batch_size: 4 -> 8",
        "  train.num_steps: 20 -> 12",
    ]  # fmt: skip
    train(run, resume_command="")
    events = [{key: value for key, value in record.items() if key != "event"} for record in records(run) if record.get("event") == "config_changed"]
    assert events == [
        {"step": 10, "key": "optim.learning_rate", "old": 0.01, "new": 0.0003},
        {"step": 10, "key": "optim.betas", "old": "[0.9, 0.95]", "new": "[0.9, 0.99]"},
        {"step": 10, "key": "train.global_batch_size", "old": 4, "new": 8},
        {"step": 10, "key": "train.num_steps", "old": 20, "new": 12},
    ]


def lines_after_resuming(start, *changes):
    console = Console(file=io.StringIO(), width=500)
    start(*changes, console=console).lock.close()
    lines = console.file.getvalue().splitlines()
    first = next(number for number, line in enumerate(lines) if line.startswith("resumed from"))
    return list(itertools.takewhile(lambda line: line.startswith("  "), lines[first + 1 :]))


def test_a_changed_key_that_nothing_reads_and_one_that_removes_checkpoints_are_said(start):
    said = lines_after_resuming(start, "model.num_experts=4", "optim.momentum=0.9", "checkpoint.keep_last=1", "checkpoint.every_n_steps=7")
    assert said == [
        "  model.num_experts: 8 -> 4, without effect: model.ffn is swiglu", "  optim.momentum: 0.95 -> 0.9, without effect: optim.name is adamw",
        "  checkpoint.keep_last: 3 -> 1",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (["train.num_steps=40"], "the learning rate of step 11 is 0.009, after 0.00673 in step 10"),
        (["optim.warmup_steps=15"], "the learning rate of step 11 is 0.00733, after 0.00673 in step 10"),
        (["train.num_steps=10"], None),  # no step follows
        (["optim.weight_decay=0.2"], None),
    ],
)
def test_another_schedule_is_told_by_the_rate_with_which_it_goes_on(start, changes, said):
    *keys, last = lines_after_resuming(start, *changes)
    assert last.strip() == said if said else not keys and "learning rate" not in last


def test_other_data_under_the_path_of_the_evaluations_are_said(tiny, tmp_path):
    """They may change, since no step depends on them; but a jump of the validation loss would look like one of the model."""
    held_out = tmp_path / "held_out"
    write_documents(held_out, num_documents=20, seed=1)
    settings = (f"data.validation={held_out}", "train.num_steps=4")
    train_tiny(tiny, *settings)

    def start():
        console = Console(file=io.StringIO(), width=500)
        prepare(tiny, *settings, console=console).lock.close()
        return console.file.getvalue()

    assert "evaluations are on" not in start()
    write_documents(held_out, num_documents=21, seed=1)
    assert "  evaluations are on other data, whose losses do not compare with those before: source 0 (held_out, now held_out): the number" in start()


def test_what_changes_mean_is_recorded_beside_the_keys(tiny, tmp_path):
    """A report of the run would else compare what does not compare, and say nothing."""
    train_tiny(tiny, "train.stop_at_step=10")
    write_documents(tmp_path / "other", num_documents=200, seed=7)
    changes = (f"data.train={tmp_path / 'other'}", "data.allow_fingerprint_change=true", "train.evaluation_sequences=3", "train.num_steps=12")
    run = train_tiny(tiny, *changes)
    found = [record for record in records(run) if str(record.get("event")).endswith("_changed")]
    events = [(record["event"], record["message"]) for record in found if "message" in record]
    rate = next(record["learning_rate"] for record in records(run) if record["step"] == 11 and "loss" in record)
    assert events == [
        ("data_changed", "data: other begins"),
        ("evaluations_changed", "losses of evaluations do not compare with those before: train.evaluation_sequences was 4 and is 3"),
        ("schedule_changed", f"the learning rate of step 11 is {rate:.3g}, after 0.00673 in step 10"),
    ]


LONGER = {
    "cosine": ([], "the learning rate of step 5 is 0.00689, after 0.001 in step 4"),
    "constant": (["optim.schedule=constant"], None),
    "at the last rate": (["optim.schedule=constant", "optim.learning_rate=1e-3"], None),
}


@pytest.mark.parametrize(("changes", "said"), LONGER.values(), ids=LONGER)
def test_a_run_that_is_made_longer_tells_the_rate_unless_it_stays(tiny, changes, said):
    train_tiny(tiny, "train.num_steps=4", *([] if len(changes) == 2 else changes))
    console = Console(file=io.StringIO(), width=500)
    prepare(tiny, *changes, "train.num_steps=8", console=console).lock.close()
    text = console.file.getvalue()
    assert said in text if said else "learning rate of step" not in text


def test_a_key_that_an_earlier_revision_did_not_have_had_its_default(tiny):
    config = tiny_config(tiny)
    saved = config_to_mapping(config)
    del saved["optim"]["eps"], saved["train"]["anomaly"], saved["zero"]
    saved["train"]["removed_since"] = 3
    assert changed_keys(stored_config(saved), config) == []
    changed = changed_keys(stored_config(saved), tiny_config(tiny, "optim.eps=1e-6", "zero.stage=1", "run.name=x", "train.stop_at_step=3"))
    assert [str(change) for change in changed] == ["zero.stage: 0 -> 1", "optim.eps: 1e-08 -> 1e-06"]


def test_a_value_is_shown_shortly():
    model = stored_config({}).model.model_dump(mode="json")
    tree = {"data": {"train": [{"path": "x" * 50, "weight": 1}] * 1000}, "model": model}
    config = config_from_mapping(tree, source="test")
    (change,) = changed_keys(stored_config({}), config)
    assert len(str(change)) < 600


@pytest.mark.parametrize("metrics", ["steps", "unreadable", "no steps", "none"])
def test_a_run_that_lost_its_checkpoints_is_kept_under_another_name(start, runs, metrics):
    """Its metrics would else be taken for those of steps that are taken again."""
    (runs / "k" / "checkpoints").rename(runs / "elsewhere")
    path = runs / "k" / "metrics.jsonl"
    if metrics == "no steps":
        path.write_text("".join(line for line in path.read_text().splitlines(True) if json.loads(line)["step"] == 0))
    elif metrics == "unreadable":
        path.unlink()
        path.mkdir()
    elif metrics == "none":
        path.unlink()
    before, console = tree(runs / "k"), Console(file=io.StringIO(), width=500)
    run = start(console=console)
    has_moved = metrics in ("steps", "unreadable")
    assert run.position.step == 0 and (runs / "k.1").exists() == has_moved
    if has_moved:
        assert tree(runs / "k.1") == before and not run.directory.metrics.exists()
        told = f"the earlier run of this name has no checkpoint to go on from; it is now {runs / 'k.1'}\n"
        assert told in console.file.getvalue()
