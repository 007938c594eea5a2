"""A new run begins with the weights of another model: whatever directory holds them, whatever differs that has no shape, and nothing else."""

import hashlib
import re

import pytest
import torch
import yaml
from rich.console import Console

from phase8.data.tokenizer_training import train_sentencepiece
from phase8.errors import CheckpointError, CheckpointMismatchError
from tests.tools.doors import load_door
from tests.train.tiny_run import losses, prepare, records, train_tiny, weights, write_config

TRANSFORMER = "model.block=transformer"
FIVE_STEPS = ("train.num_steps=5", "train.evaluate_every_n_steps=0")


@pytest.fixture(scope="module", params=["phase8", "transformer"])
def source(request, tmp_path_factory):
    """Config file, settings of the model, and a trained run of each block."""
    directory = tmp_path_factory.mktemp(request.param)
    settings = (f"model.block={request.param}",)
    return write_config(directory), settings, train_tiny(directory / "tiny.yaml", "run.name=source", *settings, *FIVE_STEPS)


def begin(source, *settings, name="begun", resume="auto", console=None):
    """A run with the weights of the source, as its banner is printed."""
    config, model, run = source
    run = prepare(config, f"run.name={name}", f"checkpoint.initialise_from={run.directory.path}", *model, *settings, resume=resume, console=console)
    run.lock.close()
    return run


def all_files(directory):
    """Name and content of everything below a directory."""
    return {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(directory.rglob("*")) if path.is_file()}


def train_begun(source, *settings, name):
    config, model, run = source
    return train_tiny(config, f"run.name={name}", f"checkpoint.initialise_from={run.directory.path}", *model, *settings)


def test_step_0_has_the_weights_and_nothing_else(source, capsys):
    _, _, trained = source
    run = begin(source, console=Console(width=400))
    assert run.position.step == run.position.samples_consumed == 0 and run.saved_step is None and not run.engine.train_state.optimizer.state
    assert all(torch.equal(value, weights(trained)[name]) for name, value in weights(run).items())
    where = f"initialised from {trained.directory.checkpoints}/step-0000000005, step 5"
    assert capsys.readouterr().out.count(where) == 2  # a line, and the banner's fact
    assert yaml.safe_load((run.directory.path / "config.yaml").read_text())["checkpoint"]["initialise_from"] == str(trained.directory.path)


def test_the_first_loss_is_that_of_the_source(source):
    _, _, trained = source
    begun = train_begun(source, "train.stop_at_step=1", name="first-loss")
    samples = torch.stack([begun.data.train[number]["tokens"] for number in range(4)])
    with torch.no_grad():
        expected = trained.engine.train_state.model.loss_sum(samples[:, :-1], samples[:, 1:]) / samples[:, 1:].numel()
    assert losses(begun)[1] == pytest.approx(expected.item(), rel=1e-6)
    event = next(record for record in records(begun) if record.get("event") == "initialised")
    assert event == {
        "step": 0, "event": "initialised", "source": f"{trained.directory.checkpoints}/step-0000000005", "source_step": 5, "message": None
    }  # fmt: skip


def test_none_initialises_again_and_a_checkpoint_of_the_run_wins(source, capsys):
    first = train_begun(source, "train.stop_at_step=2", name="again")
    assert len(losses(first)) == 2
    run = train_begun(source, *FIVE_STEPS, name="again")
    assert run.origin is None and len(losses(run)) == 5 and sum(record.get("event") == "initialised" for record in records(run)) == 1
    capsys.readouterr()
    resumed = begin(source, *FIVE_STEPS, name="again", console=Console(width=400))
    assert "initialise_from" not in capsys.readouterr().out and resumed.position.step == 5
    for other in ("/elsewhere", "null"):  # the last one counts: it is the one that `begin` is given
        begin(source, *FIVE_STEPS, f"checkpoint.initialise_from={other}", name="again", console=Console(width=400))
        (line,) = (line for line in capsys.readouterr().out.splitlines() if "initialise_from" in line)
        assert re.fullmatch(rf"  checkpoint.initialise_from: '.*/source' -> '?{other}'?, without effect: the run goes on from a checkpoint", line)
    again = begin(source, *FIVE_STEPS, name="again", resume="none")
    assert again.position.step == 0 and again.origin.step == 5 and run.directory.path.with_name("again.1").is_dir()


def test_the_context_may_be_longer(source):
    config, model, trained = source
    longer = ("model.sequence_length=48", "model.rope_base=50000", "model.local_window_size=12")
    with pytest.raises(CheckpointMismatchError, match=r"sequence_length was 24 and is 48.*checkpoint.initialise_from\."):
        prepare(config, "run.name=source", *model, longer[0], "train.num_steps=6")
    run = train_begun(source, *longer, *FIVE_STEPS, name="longer")
    said = next(record for record in records(run) if record.get("event") == "initialised")["message"].split("; ")
    expected = ["model.sequence_length was 24 and is 48", "model.rope_base was 10000.0 and is 50000.0"]
    assert sorted(said) == sorted(expected if TRANSFORMER in model else [*expected, "model.local_window_size was 6 and is 12"])
    assert len(losses(run)) == 5 and run.data.train[0]["tokens"].shape == (49,)
    tokens = run.data.train[0]["tokens"][None]
    begun = begin(source, longer[0], name="longer-still").engine.train_state.model
    with torch.no_grad():  # of a longer sequence, what comes first is computed as before
        torch.testing.assert_close(begun(tokens[:, :48])[0][:, :24], trained.engine.train_state.model(tokens[:, :24])[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("form", ["consolidated", "hf"])
def test_weights_without_a_manifest_become_fp32_masters(source, tmp_path, form, dtype):
    config, model, trained = source
    if form == "hf" and TRANSFORMER not in model:
        pytest.skip("only the transformer is a Llama")
    arguments = [str(trained.directory.path), str(tmp_path / "weights"), "--format", form, "--dtype", dtype]
    assert load_door("reshard_checkpoint").main(arguments) == 0
    settings = ("run.name=files", f"checkpoint.initialise_from={tmp_path}/weights", *model, "model.memory_tokens=[3.0,9.0]", "train.stop_at_step=2")
    run = train_tiny(config, *settings, resume="none")
    event = next(record for record in records(run) if record.get("event") == "initialised")
    assert (event["source"], event["source_step"]) == (str(tmp_path / "weights"), None)
    run.lock.close()
    begun = prepare(config, *settings, resume="none")
    begun.lock.close()
    for name, value in weights(begun).items():
        expected = weights(trained)[name]
        assert value.dtype == torch.float32 and torch.equal(value, expected.bfloat16().float() if dtype == "bf16" else expected), name
    # What the block does not read is not compared; a first value is said to be without effect.
    said = [] if TRANSFORMER in model else ["model.memory_tokens was [2.0, 500.0] and is [3.0, 9.0], without effect: it sets first values"]
    assert len(begun.origin.differences) == len(said) and all(text in begun.origin.differences[0] for text in said)


OTHER_HEADS = "is of another model: model.num_heads was 4 and is 2, .*model.head_size was 6 and is 12; the run .* --set model.num_heads=4"
BAD = {
    "nothing there": (lambda path, _: None, (), "there is no checkpoint at"),
    "more layers": (None, ("model.num_layers=3",), "model.num_layers was 2 and is 3; the run has its shape with --set model.num_layers=2"),
    "fewer layers": (None, ("model.num_layers=1",), "model.num_layers was 2 and is 1; the run has its shape with --set model.num_layers=2"),
    "wider": (None, ("model.ffn_size=48",), "model.ffn_size was 40 and is 48; the run has its shape with --set model.ffn_size="),
    "experts": (None, ("model.ffn=moe",), r"'moe'; .* --set model.ffn=swiglu, or begin with a mixture that `.* DST --upcycle-experts 8` makes"),
    "other heads": (None, ("model.num_heads=2",), OTHER_HEADS),
    "damaged": (lambda path, run: copied(run, path, damage=True), (), "is altered: tensor"),
    "a directory of something else": (lambda path, _: (path.mkdir(), (path / "config.json").write_text("{}")), (), "model_type is None"),
}


def copied(run, path, *, damage):
    """The checkpoint of a run, one bit of which may be another."""
    path.mkdir()
    for file in (run.directory.checkpoints / "step-0000000005").iterdir():
        data = bytearray(file.read_bytes())
        if damage and file.name.startswith("model-"):
            data[-1] ^= 1
        (path / file.name).write_bytes(data)


def test_a_head_that_is_tied_or_not_is_named_by_its_key(source):
    config, model, _ = source
    tied = train_tiny(config, "run.name=tied", "model.tie_embeddings=true", "train.stop_at_step=1", *model)
    for run, now, said in ((tied, "false", "was true and is false"), (source[2], "true", "was false and is true")):
        with pytest.raises(CheckpointMismatchError, match=f"^checkpoint.initialise_from: .* is of another model: model.tie_embeddings {said}; the"):
            begin((config, model, run), f"model.tie_embeddings={now}", name="never")


def test_a_run_of_another_shape_begins_with_the_settings_that_the_error_has(source):
    _, (block,), trained = source
    other = "transformer" if block != TRANSFORMER else "phase8"
    settings = (f"model.block={other}", "model.d_model=32", "model.num_heads=2", "model.ffn_size=56", "model.norm_eps=0.01", "model.rope_base=500")
    with pytest.raises(CheckpointMismatchError, match=r"model.block was '.*' and is '.*', model.d_model was 24 and is 32, .* more; the") as caught:
        begin(source, *settings, name="never")
    proposed = str(caught.value).partition("--set ")[2].split()
    run = begin(source, *settings, *proposed, name="reshaped")
    assert run.origin.differences == () and all(torch.equal(value, weights(trained)[name]) for name, value in weights(run).items())


@pytest.mark.parametrize("windows", ["0", "[0,6]"])
def test_windows_that_layers_lose_are_named_by_their_key(source, windows):
    if TRANSFORMER in source[1]:
        pytest.skip("its attention has no window")
    now = re.escape(windows.replace(",", ", "))
    said = f"model.local_window_size was 6 and is {now}; the run has its shape with --set model.local_window_size=6$"
    with pytest.raises(CheckpointMismatchError, match=f"^checkpoint.initialise_from: .* is of another model: {said}"):
        begin(source, f"model.local_window_size={windows}", name="never")


@pytest.mark.parametrize("resume", ["auto", "none"])
@pytest.mark.parametrize(("make", "settings", "sentence"), BAD.values(), ids=BAD)
def test_weights_that_cannot_be_are_one_sentence_and_nothing_is_written(source, tmp_path, make, settings, sentence, resume):
    config, model, trained = source
    path = trained.directory.path
    if make is not None:
        path = tmp_path / "bad"
        make(path, trained)
    name = "source" if resume == "none" else "never"  # a run that is there stays where it is
    before = all_files(config.parent)
    with pytest.raises(CheckpointError) as caught:
        prepare(config, f"run.name={name}", f"checkpoint.initialise_from={path}", *model, *settings, resume=resume)
    assert re.fullmatch(f"checkpoint.initialise_from: .*(?:{sentence}).*", str(caught.value)) and caught.value.exit_code == 4  # one line
    after = all_files(config.parent)
    assert {path: digest for path, digest in after.items() if not path.name.endswith(".lock")} == {
        path: digest for path, digest in before.items() if not path.name.endswith(".lock")
    }
    assert not (config.parent / "runs" / "never").exists() and not (config.parent / "runs" / "source.1").exists()


def test_another_tokenizer_is_said(tmp_path):
    config = write_config(tmp_path)
    texts = {"first.model": "def main(): pass\n", "second.model": "for x in many: more\n"}
    first, second = (train_sentencepiece([text * 50], tmp_path / name, vocab_size=280) for name, text in texts.items())
    settings = ("model.vocab_size=300", "train.stop_at_step=1")
    train_tiny(config, "run.name=source", *settings, f"data.tokenizer={first}")
    said = {}
    for key, value in (("same", first), ("other", second), ("none", "null")):
        run = prepare(config, f"run.name={key}", *settings, f"data.tokenizer={value}", f"checkpoint.initialise_from={tmp_path}/runs/source")
        said[key] = run.origin.differences
        run.lock.close()
    stored = tmp_path / "runs/source/checkpoints/step-0000000001/tokenizer.model"
    assert said["same"] == ()
    assert said["other"] == (f"{stored} is the tokenizer of these weights, but that of the run, {second}, is another: an id may mean other text",)
    assert said["none"] == (f"{stored} is the tokenizer of these weights, but the run has none: data.tokenizer is null",)
