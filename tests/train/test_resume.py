import gc
import io
import multiprocessing
import os
import shutil

import numpy as np
import pytest
import torch
from rich.console import Console

from phase8.checkpoint.load import open_checkpoint
from phase8.checkpoint.reshard.reshard import ConsolidatedForm, consolidate
from phase8.data.indexed import IndexedWriter
from phase8.errors import CheckpointError, CheckpointMismatchError, ConfigError, DataError
from phase8.train.loop import train
from tests.train.tiny_run import assert_same_weights, losses, prepare, records, tiny_config, train_tiny, weights, with_blend, write_documents

SETTINGS = {
    "accumulation": [],
    "recomputation": ["train.recompute=full"],
    "workers": ["data.num_workers=2"],
    "all at once, bf16, packed": [
        "train.recompute=selective", "data.num_workers=1", "precision.dtype=bf16", "data.reset_at_document_boundaries=true",
        "train.deterministic=true",
    ],
    "delta rule": ["model.global_path=delta"],
    "transformer": ["model.block=transformer"],
}  # fmt: skip


@pytest.fixture(autouse=True)
def _determinism_is_global():
    yield
    torch.use_deterministic_algorithms(False)


ALSO = ("recomputation", "workers")  # which "all at once" has too


@pytest.mark.parametrize("settings", [pytest.param(each, id=name, marks=pytest.mark.full if name in ALSO else ()) for name, each in SETTINGS.items()])
def test_twenty_steps_equal_ten_and_ten_resumed(tiny, settings):
    whole = train_tiny(tiny, "run.name=whole", *settings)
    train_tiny(tiny, *settings, "train.stop_at_step=10")
    resumed = train_tiny(tiny, *settings)
    assert resumed.position == whole.position
    assert losses(resumed) == losses(whole) and len(losses(whole)) == 20
    assert_same_weights(resumed, whole)
    for name, parameter in whole.engine.train_state.model.named_parameters():
        ours, theirs = resumed.engine.train_state.optimizer.state[weights(resumed)[name]], whole.engine.train_state.optimizer.state[parameter]
        assert all(torch.equal(ours[key], theirs[key]) for key in ("exp_avg", "exp_avg_sq", "step")), name


def test_no_worker_outlives_the_training_that_it_read_for(tiny):
    """Whatever the garbage collector finds of them later stops everything for five seconds a worker."""
    before = set(multiprocessing.active_children())  # ranks of tests that ran before in this process
    gc.disable()
    try:
        train_tiny(tiny, "data.num_workers=2", "train.stop_at_step=10")
        assert set(multiprocessing.active_children()) <= before
    finally:
        gc.enable()


def test_two_runs_with_one_seed_are_identical_and_another_seed_is_not(tiny):
    a, b, c = (train_tiny(tiny, f"run.name={name}", f"train.seed={seed}", "train.stop_at_step=6") for name, seed in (("a", 1), ("b", 1), ("c", 2)))
    assert losses(a) == losses(b) != losses(c)
    assert_same_weights(a, b)


def test_loss_does_not_depend_on_how_the_batch_is_cut(tiny):
    packed = "data.reset_at_document_boundaries=true"  # microbatches then have unequal numbers of valid targets
    runs = [train_tiny(tiny, f"run.name=m{size}", f"train.micro_batch_size={size}", packed) for size in (1, 4)]
    first = [next(record for record in records(run) if "loss" in record) for run in runs]
    for record in first[1:]:
        assert record["loss"] == pytest.approx(first[0]["loss"], rel=1e-6)
        assert record["grad_norm"] == pytest.approx(first[0]["grad_norm"], rel=1e-5)
    # Later steps drift apart as AdamW enlarges the rounding of gradients that are nearly zero.
    for run in runs[1:]:
        assert list(losses(run).values()) == pytest.approx(list(losses(runs[0]).values()), rel=2e-2)


def test_first_losses_do_not_change_when_the_run_is_extended(tiny):
    constant = ("optim.schedule=constant", "checkpoint.every_n_steps=0")
    short, long = (train_tiny(tiny, f"run.name=n{steps}", f"train.num_steps={steps}", *constant) for steps in (8, 16))
    assert losses(short) == {step: loss for step, loss in losses(long).items() if step <= 8}


def test_batch_size_may_change_at_resume_and_samples_go_on(tiny):
    train_tiny(tiny, "train.stop_at_step=10")
    run = train_tiny(tiny, "train.global_batch_size=8", "train.micro_batch_size=4", "train.stop_at_step=12")
    assert run.position.samples_consumed == 10 * 4 + 2 * 8


def test_damaged_newest_checkpoint_is_named_and_the_one_before_is_used(tiny, capsys):
    from rich.console import Console

    whole = train_tiny(tiny, "run.name=whole")
    run = train_tiny(tiny, "train.stop_at_step=10")
    file = next((run.directory.checkpoints / "step-0000000010").glob("model-*.safetensors"))
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)
    resumed = prepare(tiny, console=Console(width=500))
    assert resumed.position.step == 5
    assert "step-0000000010 is damaged" in capsys.readouterr().out
    finished = train_tiny(tiny)
    assert losses(finished) == losses(whole)
    assert_same_weights(finished, whole)


def test_checkpoint_of_another_model_is_refused(tiny):
    train_tiny(tiny, "train.stop_at_step=5")
    with pytest.raises(CheckpointMismatchError, match=r"another model: model.num_layers was 2 and is 3"):
        prepare(tiny, "model.num_layers=3")
    with pytest.raises(CheckpointMismatchError, match=r"another model: model.global_path was linear and is delta"):
        prepare(tiny, "model.global_path=delta")
    assert prepare(tiny, "model.global_path=true").position.step == 5


def test_windows_that_layers_lose_are_of_another_model_whose_weights_no_run_begins_with(tiny):
    train_tiny(tiny, "train.stop_at_step=2")
    with pytest.raises(CheckpointMismatchError, match=r"window_size was 6 and is 5; .* --resume none, or begin .* checkpoint.initialise_from"):
        prepare(tiny, "model.local_window_size=5")
    for windows in ("0", "[0,6]"):
        with pytest.raises(CheckpointMismatchError, match=r"local_window_size was 6 and is .*0.*; .* or --resume none\.$"):
            prepare(tiny, f"model.local_window_size={windows}")


def test_state_of_another_optimizer_is_refused_by_the_key(tiny):
    train_tiny(tiny, "train.stop_at_step=5")
    for change in ("optim.name was adamw and is muon", "optim.state_dtype was fp32 and is fp8"):
        key, value = change.split(" was ")[0], change.split(" is ")[1]
        with pytest.raises(CheckpointMismatchError, match=f"holds the state of another optimizer: {change}; .* by checkpoint.initialise_from"):
            prepare(tiny, f"{key}={value}")
    assert prepare(tiny, "optim.state_dtype=bf16").position.step == 5


def test_keys_that_the_block_does_not_read_and_other_spellings_are_no_other_model(tiny):
    of_phase8 = ("model.local_window_size=9", "model.score=dot", "model.chain=none", "model.global_path=none", "model.memory_tokens=[1.0,2.0]")
    train_tiny(tiny, "model.block=transformer", "train.stop_at_step=5")
    assert prepare(tiny, "model.block=transformer", *of_phase8, "model.global_tokens=0").position.step == 5
    train_tiny(tiny, "run.name=block", "train.stop_at_step=5")
    assert prepare(tiny, "run.name=block", "model.head_size=6", "model.local_window_size=[6,6]", "model.convolution_size=4").position.step == 5
    with pytest.raises(CheckpointMismatchError, match=r"model.local_window_size was 6 and is \[6, 9\]; .* by checkpoint.initialise_from\.$"):
        prepare(tiny, "run.name=block", "model.local_window_size=[6,9]")


def test_weights_without_a_past_are_named_and_the_ways_to_use_them(tiny):
    run = train_tiny(tiny, "train.stop_at_step=5")
    weights_only = run.directory.path.with_name("weights")
    form = ConsolidatedForm({"model": {}})
    checkpoint = open_checkpoint(run.directory.checkpoints / "step-0000000005")
    consolidate(checkpoint, weights_only, form=form, dtype=None, on_progress=lambda *_: None)
    with pytest.raises(CheckpointError, match=r"holds weights alone .* checkpoint.initialise_from=.* tools/reshard_checkpoint.py"):
        prepare(tiny, resume=str(weights_only))


def test_a_run_goes_on_whose_data_have_names_that_are_no_utf8(tiny, tmp_path):
    for name in (b"part-\xff", b"part-a"):
        write_documents(tmp_path / os.fsdecode(name), num_documents=30, seed=3)
    data = f"data.train={tmp_path}/part-*"
    train_tiny(tiny, data, "train.stop_at_step=5")
    run = prepare(tiny, data)
    assert run.position.step == 5
    assert [pair["name"] for pair in run.data.fingerprint["sources"][0]["files"]] == ["part-a", "part-\udcff"]


def test_a_batch_that_follows_from_the_ranks_does_not_change_by_itself(tiny):
    parts = ("train.global_batch_size=null", "train.micro_batch_size=2")
    train_tiny(tiny, *parts, "parallel.num_microbatches=3", "train.stop_at_step=3")
    assert prepare(tiny, *parts, "parallel.num_microbatches=3").position.samples_consumed == 18
    fewer = "parallel.num_microbatches=2"  # as if a third of the ranks were gone
    with pytest.raises(CheckpointMismatchError, match=r"was trained with 6 sequences a step, but .* null, and 1 .* 4; set it to 6 .* or to 4 "):
        prepare(tiny, *parts, fewer)
    for chosen, microbatches in ((6, 3), (4, 2)):
        run = prepare(tiny, f"train.global_batch_size={chosen}", "train.micro_batch_size=2", "parallel.num_microbatches=null")
        assert (run.position.step, run.shape.num_microbatches) == (3, microbatches)


def test_other_data_are_refused_unless_allowed(tiny, tmp_path):
    train_tiny(tiny, "train.stop_at_step=5")
    write_documents(tmp_path / "other", num_documents=200, seed=7)
    other = f"data.train={tmp_path}/other"
    with pytest.raises(CheckpointMismatchError, match=r"another order of samples"):
        prepare(tiny, other)
    with pytest.raises(CheckpointMismatchError, match=r"train.seed was 1234 and is 1"):
        prepare(tiny, "train.seed=1")
    sentences = {other: "  data: other begins\n", "train.seed=1": "  samples come in the order of another seed", "optim.learning_rate=1e-4": None}
    for change, sentence in sentences.items():
        console = Console(file=io.StringIO(), width=500)
        run = prepare(tiny, change, "data.allow_fingerprint_change=true", console=console)
        said = [each for each in sentences.values() if each and each in console.file.getvalue()]
        assert run.position.step == 5 and said == ([sentence] if sentence else [])


def test_many_differences_are_one_short_sentence(tiny, tmp_path):
    train_tiny(tiny, "train.stop_at_step=2")
    write_documents(tmp_path / "other", num_documents=300, seed=7)
    data = (f"data.train={tmp_path}/other", "train.seed=1", "data.reset_at_document_boundaries=true")
    sentence = r"samples: source 0 \(train, now other\): the number of tokens was \d+ and is \d+; [^;]*; [^;]*; and 1 more; restore .*=true\.$"
    with pytest.raises(CheckpointMismatchError, match=sentence):
        prepare(tiny, *data)
    model = ("model.num_heads=2", "model.ffn_size=48", "model.global_tokens=2", "model.local_window_size=5")
    with pytest.raises(CheckpointMismatchError, match=r"of another model: model\.[^;]* was [^;]*, and 2 more; use its config"):
        prepare(tiny, *model)


def test_a_blend_that_changes_goes_on_where_its_sources_were(tiny, tmp_path):
    """Learning is as good as off, so that losses are those of samples. Stopping once more, or going back to before the change, changes nothing."""
    more, web = tmp_path / "more", tmp_path / "web"
    for path, seed in ((more, 3), (web, 7)):
        write_documents(path, num_documents=30, seed=seed)
    still = (
        "optim.learning_rate=1e-12", "optim.warmup_steps=0", "train.micro_batch_size=1", "train.global_batch_size=1", "train.num_steps=40",
        "train.evaluate_every_n_steps=0", "checkpoint.every_n_steps=5", "checkpoint.keep_last=10",
    )  # fmt: skip
    alone, both = f"data.train={more}", with_blend(tiny, more, web)
    accepted = ("data.allow_fingerprint_change=true", *still)
    run = train_tiny(tiny, alone, *still)
    of_more = list(losses(run).values())
    shutil.rmtree(run.directory.path)
    train_tiny(tiny, alone, *still, "train.stop_at_step=10")
    console = Console(file=io.StringIO(), width=500)
    first = prepare(both, *accepted, "train.stop_at_step=22", console=console)
    read = 10 / first.data.train.order.num_windows[0]
    assert f"  data: more goes on after {read:.4g} epochs, web begins\n" in console.file.getvalue()
    train(first, resume_command="")
    second = train_tiny(both, *still)  # the blend is now that of the checkpoint
    found = list(losses(second).values())
    drawn = [second.data.train.order.blend.locate(number)[0] for number in range(30)]
    assert found[:10] == pytest.approx(of_more[:10], rel=1e-6) and drawn.count(0) == 15
    assert [loss for loss, source in zip(found[10:], drawn, strict=True) if source == 0] == pytest.approx(of_more[10:25], rel=1e-6)
    epochs = second.data.epochs(40)
    assert epochs == {"more": 25 / second.data.train.order.num_windows[0], "web": 15 / second.data.train.order.num_windows[1]}
    # Back to a checkpoint of before the change: the new blend begins there.
    back = prepare(both, *accepted, resume=str(second.directory.checkpoints / "step-0000000005"))
    assert back.data.train.order.begin == 5 and [draws.drawn for draws in back.data.train.order.draws] == [5, 0]


def test_other_data_of_the_same_shape_are_refused(tiny, tmp_path):
    for seed in (1, 2):
        with IndexedWriter(tmp_path / f"same_{seed}", dtype=np.dtype(np.uint16)) as writer:
            for _ in range(40):
                writer.add_document(np.random.default_rng(seed).integers(0, 61, 64))
    one, two = tmp_path / "same_1", tmp_path / "same_2"
    cases = {
        "swapped": (tiny, [f"data.train={one}"], tiny, [f"data.train={two}"], r"source 0 \(same_1, now same_2\): the hash of .bin was"),
        "blend": (with_blend(tiny, one, two), [], with_blend(tiny, two, one), [], "in another order: it was same_1, same_2 and is same_2, same_1"),
        "pattern": (tiny, [f"data.train={tmp_path}/same_*"], tiny, [f"data.train={one}"], "the number of its pairs was 2 and is 1"),
    }
    for name, (old_config, old, new_config, new, sentence) in cases.items():
        train_tiny(old_config, f"run.name={name}", "train.stop_at_step=1", *old)
        with pytest.raises(CheckpointMismatchError, match=sentence):
            prepare(new_config, f"run.name={name}", *new)
        assert prepare(old_config, f"run.name={name}", *old).position.step == 1


def test_a_split_is_trained_on_and_resumed_by_its_own_parts_only(tiny):
    settings = ["data.validation=null", "train.stop_at_step=1"]
    run = train_tiny(tiny, *settings, "data.split=90,9,1")
    assert [part.sources[0].num_documents for part in (run.data.train, run.data.validation)] == [180, 18]
    assert prepare(tiny, *settings, "data.split=900,90,10").position.step == 1
    with pytest.raises(CheckpointMismatchError, match=r"the documents of data.split were 0 to 180 and are 0 to 160"):
        prepare(tiny, *settings, "data.split=80,19,1")
    with pytest.raises(CheckpointMismatchError, match=r"the documents of data.split were 0 to 180 and are all"):
        prepare(tiny, *settings)
    with pytest.raises(DataError, match=r"data.split leaves 0 documents of .*train with 0 tokens for validation"):
        prepare(tiny, *settings, "data.split=999,0.1,1")


def test_training_and_validation_data_are_kept_apart_by_patterns(tiny):
    with pytest.raises(DataError, match=r"data.train and data.validation both hold .*validation, on one side because a pattern matches it"):
        prepare(tiny, f"data.train={tiny_config(tiny).data.validation[:-10]}*")


def test_resume_none_keeps_the_earlier_run_under_another_name(tiny):
    first = train_tiny(tiny, "train.stop_at_step=5")
    second = train_tiny(tiny, "train.stop_at_step=5", resume="none")
    assert second.directory.path == first.directory.path
    aside = first.directory.path.with_name("tiny.1")
    assert (aside / "checkpoints" / "step-0000000005").is_dir() and losses(second)[1] is not None


def test_resume_from_a_named_checkpoint_sets_later_ones_aside(tiny):
    whole = train_tiny(tiny)
    expected = losses(whole)
    back = train_tiny(tiny, "train.stop_at_step=12", resume=str(whole.directory.checkpoints / "step-0000000010"))
    assert back.position.step == 12
    assert sorted(path.name for path in whole.directory.superseded.iterdir()) == ["step-0000000015.0", "step-0000000020.0"]
    assert losses(train_tiny(tiny)) == expected


def test_fewer_steps_than_the_checkpoint_is_one_sentence(tiny):
    train_tiny(tiny, "train.stop_at_step=10")
    with pytest.raises(ConfigError, match=r"train.num_steps is 8, but the checkpoint is at step 10"):
        train_tiny(tiny, "train.num_steps=8")


def test_a_finished_run_starts_and_ends_at_once(tiny):
    first = train_tiny(tiny)
    again = train_tiny(tiny)
    assert again.position.step == 20
    assert_same_weights(first, again)
