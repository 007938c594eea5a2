"""`--output` never replaces what it is made from or what training wrote; earlier results and new files are as before."""

import os

import pytest

from phase8.errors import ConfigError
from phase8.train.outputs import require_own_output
from tests.tools.doors import load_door

CHECKPOINT = "run/checkpoints/step-0000000005"
FILES = (
    "run/metrics.jsonl", "run/config.yaml", "run/tokenizer.model", "run/report/index.html", "run/found.json", "run/tensorboard/events.1",
    f"{CHECKPOINT}/manifest.json", f"{CHECKPOINT}/model-0.safetensors", "copy/manifest.json", "copy/model-0.safetensors",
    "hf/config.json", "hf/model.safetensors", "hf/tokenizer.json", "hf/found.json", "hf/model-eval.json",
    "web/manifest.json", "web/config.json", "web/metrics.csv",
    "texts/a.txt", "texts/a.json", "book.txt", "pair.bin", "pair.idx", "pair.meta.json", "found.json",
)  # fmt: skip


@pytest.fixture
def files(tmp_path, monkeypatch):
    """A run, copies of its model, texts and a pair, and earlier results, in the working directory."""
    for name in FILES:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "same").symlink_to("run")
    os.link(tmp_path / "book.txt", tmp_path / "linked.txt")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def check(root, output, **read):
    require_own_output(root / output, **{key: [root / name for name in names] for key, names in read.items()})


@pytest.mark.parametrize(
    ("output", "owner"),
    [
        ("run/metrics.jsonl", "what training wrote of the run {}/run"),
        ("same/config.yaml", "what training wrote of the run {}/run"),
        ("run/tokenizer.model", "what training wrote of the run {}/run"),
        ("run/launchers.json", "what training wrote of the run {}/run"),
        ("run/tensorboard/events.1", "what training wrote of the run {}/run"),
        ("run/checkpoints", "what training wrote of the run {}/run"),
        ("run/checkpoints/new.json", "what training wrote of the run {}/run"),
        (f"{CHECKPOINT}/new.json", f"the checkpoint {{}}/{CHECKPOINT}"),
        ("copy", "the checkpoint {}/copy"),
        ("copy/new.json", "the checkpoint {}/copy"),
        ("hf/config.json", "the model {}/hf"),
        ("hf/model.safetensors", "the model {}/hf"),
        ("hf/tokenizer.json", "the model {}/hf"),
    ],
)
def test_what_training_wrote_is_kept(files, output, owner):
    with pytest.raises(ConfigError) as caught:
        check(files, output)
    assert str(caught.value) == f"--output is {files / output}, which belongs to {owner.format(files)}; give another file."


def test_a_pipe_or_a_device_is_refused_before_any_work(files):
    os.mkfifo(files / "pipe")
    (files / "out").symlink_to("pipe")
    for name in ("pipe", "out"):
        with pytest.raises(ConfigError) as caught:
            check(files, name)
        assert str(caught.value) == (
            f"--output is {files / name}, a device, a pipe or a socket, whose place a file would take; "
            "give a file, and have standard output redirected"
        )


@pytest.mark.parametrize(
    ("output", "read"),
    [
        ("book.txt", {"inputs": ["book.txt"]}),
        ("new.txt", {"inputs": ["new.txt"]}),
        ("linked.txt", {"inputs": ["book.txt"]}),
        ("texts/a.txt", {"inputs": ["texts"]}),
        ("pair.bin", {"pairs": ["pair"]}),
        ("pair.meta.json", {"pairs": ["pair.bin"]}),
        ("pair.idx", {"pairs": ["p*"]}),
    ],
)
def test_inputs_are_kept(files, output, read):
    with pytest.raises(ConfigError, match="which is read as an input and would be replaced; give another file"):
        check(files, output, **read)


@pytest.mark.parametrize(
    "output",
    ["run/found.json", "run/new.json", "run/report/index.html", "run/tensorboard/new.json", "hf/found.json", "hf/new.json", "web/manifest.json",
     "hf/model-eval.json", f"{'long' * 100}/new.json",
     "web/config.json", "web/new.json", "texts/a.json", "texts/new.txt", "found.json", "new.json", "new/deep/x.json", "run"],
)  # fmt: skip
def test_results_are_written_as_before(files, output):
    check(files, output, inputs=["texts", "book.txt"], pairs=["pair"])
    require_own_output(None, inputs=[files])


EVALUATE = ("evaluate", "--checkpoint", "run")
DOORS = {
    "evaluate, the text": (*EVALUATE, "--text", "book.txt", "--output", "book.txt"),
    "evaluate, the pair": (*EVALUATE, "--data", "pair", "--output", "pair.idx"),
    "evaluate, the tokenizer": (*EVALUATE, "--text", "book.txt", "--tokenizer", "pair.bin", "--output", "pair.bin"),
    "recall": ("recall", "evaluate", "--task", "mqar", "--checkpoint", "run", "--output", "run/config.yaml"),
    "recall, data": ("recall", "data", "--task", "mqar", "--length", "64", "--output", "copy"),
    "collect_text": ("collect_text", "prose", "--roots", "texts", "--output", "copy"),
    "report": ("report", "run", "same", "--output", "run/metrics.jsonl"),
    "plan": ("plan", "schedule", "--stages", "2", "--microbatches", "2", "--output", "run/checkpoints/new.png"),
    "ablation": ("ablation", "--variants", "phase8", "--output", "run/checkpoints"),
}


@pytest.mark.parametrize("name", DOORS)
def test_every_tool_asks(files, monkeypatch, capsys, name):
    tool, *words = DOORS[name]
    if tool == "ablation":
        (files / "c.yaml").write_text("run: {name: c}\ndata: {train: pair}\n")
        words += ["--config", "c.yaml", "--seeds", "1"]
    before = {path: path.read_bytes() for path in files.rglob("*") if path.is_file()}
    monkeypatch.setattr("sys.argv", [tool, *words])
    assert load_door(tool).main() == 2
    errors = capsys.readouterr().err
    assert errors.startswith("error: --output is ") and errors.count("\n") == 1
    assert {path: path.read_bytes() for path in files.rglob("*") if path.is_file()} == before
