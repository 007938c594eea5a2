"""Ablations: the variants, what may be compared, how runs are started and watched, and what is made of their records."""

import json
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from phase8.ablation import chart
from phase8.ablation.chart import positions_png, validation_png
from phase8.ablation.learning_rates import best_rates, check_search, describe_choice, losses_by_rate
from phase8.ablation.planned_runs import plan_runs, plan_search
from phase8.ablation.results import summarise, write_results
from phase8.ablation.runs import Machine, Record, RunProcesses, read_records, record_path
from phase8.ablation.study import (
    REFERENCE,
    VARIANTS,
    check_shared_settings,
    check_sizes,
    choose_variants,
    count_variant_parameters,
    current_study,
    joined_study,
    overridden_settings,
    record_study,
    reference_of,
)
from phase8.config.describe import iterate_keys
from phase8.config.load import config_to_mapping, load_config
from phase8.errors import ConfigError, DataError, DivergenceError, StorageError
from phase8.train.datasets import open_run_data
from tests.ablation.stub_runs import MEASURE, STUB
from tests.train.tiny_run import write_documents

SHIPPED = Path(__file__).parents[2] / "configs" / "ablation_30m.yaml"
NUM_STEPS = 20


def plan(tiny, output, names=("transformer", "window+global"), seeds=(1, 2), settings=(), definitions=()):
    return plan_runs(tiny, settings, choose_variants(names, definitions), seeds, output=output)


@pytest.fixture
def stub(tiny, tmp_path):
    """Two variants with two seeds whose processes are stubs: the runs, how each is to behave, and a function that trains them."""
    output, plans, messages, recorded = tmp_path / "out", tmp_path / "plans", [], []
    plans.mkdir()
    runs = plan(tiny, output)

    class Stub:
        def __init__(self):
            self.runs, self.output, self.plans, self.messages, self.recorded = runs, output, plans, messages, recorded

        def behave(self, **behaviours):
            for run in runs:
                (plans / run.name).write_text(behaviours.get(run.name.replace("-", "_"), "finish"))

        def train(self, waiting=runs, *, jobs=1, gpus=(), on_message=messages.append):
            def command(settings):
                return [sys.executable, "-I", "-S", "-c", STUB, str(plans), *settings]

            def measure(run, result):
                return [sys.executable, "-I", "-S", "-c", MEASURE, str(plans), run.name, str(result)]

            machine = Machine(command, measure, device="the device", jobs=jobs, gpus=gpus)
            processes = RunProcesses(machine, output, num_parameters={"transformer": 70, "window+global": 71}, on_message=on_message)
            processes.train(waiting, on_record=lambda: recorded.append(len(read_records(output))))
            return processes

        def finished(self):
            return [run.name for run in runs if record_path(run, output).exists()]

        def log(self, name):
            return (output / "logs" / f"{name}.log").read_text()

    ready = Stub()
    ready.behave()
    return ready


def record(variant, seed, loss, **fields):
    curve = [[40, None if loss is None else loss + 1], [80, loss]]
    known = {"num_parameters": 1000, "tokens": 80, "validation_tokens": 48, "tokens_per_second": 500.0, "skipped_steps": 0, "jobs": 2}
    measured = {"validation_loss": loss, "device": "a device", "torch_version": "2.99", "curve": curve}
    return Record(variant=variant, seed=seed, **{**known, **measured, **fields})


def study_of(tiny, names=("transformer", REFERENCE, "window+global"), *overrides, definitions=()):
    config = load_config(tiny, overrides)
    return current_study(config, open_run_data(config, on_progress=lambda *_: None), choose_variants(names, definitions))


# ---- variants


@pytest.mark.parametrize("name", VARIANTS)
def test_every_key_of_a_variant_exists_and_makes_a_valid_run(name):
    keys = [setting.partition("=")[0] for setting in VARIANTS[name]]
    assert set(keys) <= {key for key, _ in iterate_keys()} and len(set(keys)) == len(keys)
    (run,) = plan_runs(SHIPPED, [], {name: VARIANTS[name]}, [1], output=Path("out"))  # validates
    for setting in VARIANTS[name]:
        key, value = setting.removeprefix("model.").split("=")
        found = vars(run.config.model)[key]
        assert (str(list(found)) if isinstance(found, tuple) else str(found)).lower().replace(" ", "") == value


def test_no_two_variants_are_the_same_and_each_block_states_all_its_keys():
    assert len(set(VARIANTS.values())) == len(VARIANTS) and REFERENCE in VARIANTS
    for block in ("transformer", "phase8"):
        stated = [{s.partition("=")[0] for s in settings} for settings in VARIANTS.values() if f"model.block={block}" in settings]
        # Hybrids have windows and parts of their own, gates per channel a narrower feed-forward, some variants embedding scalars or activations; the
        # others have those of the config.
        own = {"embedding_scalars", "value_activation", "local_window_size", "ffn_size", "global_gate_activation", "global_skip"}
        own = {f"model.{name}" for name in own}
        assert len({frozenset(keys - own) for keys in stated}) == 1


def test_hybrids_have_the_parts_of_their_papers():
    """SiLU of q, k and v and of the gate, and a window of 2048 in every second layer; the skip is Mamba-2's."""
    hybrids = {name: VARIANTS[name] for name in ("gated-deltanet", "mamba2")}
    runs = plan_runs(SHIPPED, ["model.sequence_length=4096"], hybrids, [1], output=Path("out"))
    for run, path, has_skip in zip(runs, ("delta", "linear"), (False, True), strict=True):
        model = run.config.model
        assert (model.global_path, model.global_skip) == (path, has_skip) and model.window_sizes == (0, 2048) * 4
        assert model.has_silu and model.silu_of_values == "global" and model.has_channel_gate and model.global_gate_activation == "silu"
        assert model.convolution_taps == 4 and model.chain == "none"


def test_the_shipped_config_is_what_the_ablation_is_defined_as():
    config = load_config(SHIPPED)
    counts = count_variant_parameters(SHIPPED, [], VARIANTS)
    check_sizes(counts)
    assert 29e6 < min(counts.values()) <= max(counts.values()) < 31e6
    candidates = {
        "gates": ("model.global_gate=channel", "model.ffn_size=1324"),  # the feed-forward gives what the gates take
        "floor": ("model.decay_floor=-5",),
        "silu": ("model.global_activation=silu",),
        "norm": ("model.local_qk_norm=true",),
    }
    delta = VARIANTS["window+delta"]
    own = count_variant_parameters(SHIPPED, [], {name: (*delta, *settings) for name, settings in candidates.items()})
    check_sizes({**counts, **own})
    assert own["gates"] == counts["window+delta"]
    assert config.model.sequence_length == 2048 and config.train.num_steps * config.train.global_batch_size * 2048 >= 100e6
    assert config.train.num_steps % config.train.evaluate_every_n_steps == 0


def test_of_one_seed_runs_differ_in_the_variant_alone(tiny, tmp_path):
    runs = plan(tiny, tmp_path, names=list(VARIANTS), seeds=(3, 4), settings=["optim.learning_rate=0.5"])
    assert [(run.variant, run.seed) for run in runs] == [(name, seed) for seed in (3, 4) for name in VARIANTS]
    assert len({run.name for run in runs}) == len(runs) and runs[1].name == "transformer_conv-seed3"
    own = {s.partition("=")[0].removeprefix("model.") for settings in VARIANTS.values() for s in settings}
    trees = [config_to_mapping(run.config) for run in runs if run.seed == 3]
    assert all(tree["train"]["seed"] == 3 and tree["optim"]["learning_rate"] == 0.5 for tree in trees)
    for tree in trees:
        tree["run"]["name"] = None
        tree["model"] = {key: value for key, value in tree["model"].items() if key not in own}
        assert tree == trees[0]
    assert all(load_config(tiny, run.settings) == run.config for run in runs)


def test_a_defined_variant_begins_as_another_one():
    fast = ["fast", "window+global", "optim.learning_rate=1e-2"]
    chosen = choose_variants(["faster", "fast"], [fast, ["faster", "fast", "model.ffn_size=48"]])
    assert chosen == {"faster": (*VARIANTS["window+global"], *fast[2:], "model.ffn_size=48"), "fast": (*VARIANTS["window+global"], *fast[2:])}


@pytest.mark.parametrize(
    ("names", "definitions", "text"),
    [
        (["window+globl"], [], "--variants: unknown variant window+globl; did you mean window+global?"),
        (["nosuch"], [], "--variants: unknown variant nosuch; there are "),
        (["x"], [], "--variants: unknown variant x; there are "),
        (["transformer", "transformer"], [], "--variants names transformer 2 times"),
        (["a"], [["a", "transfomer", "model.ffn_size=4"]], "--define a: unknown variant transfomer; did you mean transformer?"),
        (["a"], [["a"]], "--define a needs"),
        (["a"], [["a", "transformer"]], "--define a needs"),
        (["a"], [["a_b", "transformer", "model.ffn_size=4"]], "--define a_b: a new name is needed"),
        (["a"], [["transformer", "transformer+conv", "model.ffn_size=4"]], "--define transformer: a new name is needed"),
        (["a"], [["a", "transformer", "train.num_steps=4"]], "train.num_steps=4 is not about the model"),
        (["a"], [["a", "transformer", "model.sequence_length=4"]], "model.sequence_length=4 is not about"),
    ],
)
def test_names_that_are_none_are_refused_in_one_sentence(names, definitions, text):
    with pytest.raises(ConfigError) as refusal:
        choose_variants(names, definitions)
    assert text in str(refusal.value) and len(refusal.value.problems) == 1


@pytest.mark.parametrize(
    ("counts", "outside"),
    [
        ({"a": 1000, "b": 1010}, None),
        ({"a": 1000, "b": 1011}, "b has 1,011, but 990 to 1,010 are allowed, 1% around a;"),
        ({"a": 989, REFERENCE: 1000, "b": 2000}, "a has 989, b has 2,000, but 990 to 1,010 are allowed, 1% around transformer+conv+norm;"),
    ],
)
def test_sizes_agree_within_one_per_cent(counts, outside):
    if outside is None:
        check_sizes(counts)
        return
    with pytest.raises(ConfigError) as refusal:
        check_sizes(counts)
    assert outside in str(refusal.value) and "--any-size" in str(refusal.value) and len(refusal.value.problems) == 1


# ---- what one output directory may hold


def test_variants_add_up_in_an_output_directory(tiny, tmp_path):
    study = study_of(tiny, ["transformer"])
    assert joined_study(study, tmp_path) == study
    record_study(study, tmp_path)
    fast = ["fast", "transformer", "optim.eps=1e-6"]
    unimportant = ["run.name=other", "checkpoint.keep_last=1", "train.stop_at_step=5", "train.seed=7", "data.num_workers=2", "model.score=dot"]
    joined = joined_study(study_of(tiny, ["fast"], *unimportant, definitions=[fast]), tmp_path)
    assert joined.variants == {"transformer": VARIANTS["transformer"], "fast": (*VARIANTS["transformer"], "optim.eps=1e-6")}
    assert joined.digest == study.digest != study_of(tiny, ["transformer"], "optim.eps=1e-6").digest
    record_study(joined, tmp_path)
    assert joined_study(study, tmp_path).variants == joined.variants


def test_a_study_that_says_the_global_path_as_earlier_releases_did_goes_on(tiny, tmp_path):
    study = study_of(tiny, ["window", "window+global"])
    said = {"model.global_path=none": "model.global_path=false", "model.global_path=linear": "model.global_path=true"}
    earlier = {name: tuple(said.get(setting, setting) for setting in settings) for name, settings in study.variants.items()}
    assert earlier != study.variants
    record_study(replace(study, variants=earlier), tmp_path)
    assert joined_study(study_of(tiny, ["window", "window+delta"]), tmp_path).variants == {
        name: VARIANTS[name] for name in ("window", "window+global", "window+delta")
    }


def test_the_config_as_it_is_can_be_a_variant_and_begin_others(tiny, tmp_path):
    own = ("model.score=lorentz", "model.ffn_size=48")
    runs = plan(tiny, tmp_path, names=["config", "wide"], seeds=(1,), settings=own, definitions=[["wide", "config", "model.ffn_size=64"]])
    assert [(run.config.model.score, run.config.model.ffn_size) for run in runs] == [("lorentz", 48), ("lorentz", 64)]
    variants = choose_variants(["config"], [])
    assert variants == {"config": ()}
    check_shared_settings(load_config(tiny, own), own, variants)  # nothing of it is without effect


@pytest.mark.parametrize(
    ("names", "other", "said"),
    [
        ((["transformer"], ["transformer"]), "model.ffn_size=48", "model.ffn_size was 40 and is 48"),
        ((["config"], ["config"]), "model.global_path=none", "model.global_path was 'linear' and is 'none'"),
        ((["window+global"], ["lorentz"]), "model.local_window_size=5", "model.local_window_size was 6 and is 5"),
        ((["transformer"], ["transformer"]), "model.local_window_size=5", None),  # it has no window
        ((["phase8"], ["phase8"]), "model.ffn_size=48", None),  # it sets this width itself
    ],
)
def test_what_variants_read_from_the_config_stays_in_an_output_directory(tiny, tmp_path, names, other, said):
    first, second = (study_of(tiny, chosen, "model.ffn_size=40", *settings) for chosen, settings in zip(names, ((), (other,)), strict=True))
    record_study(first, tmp_path)
    if said is None:
        record_study(joined_study(second, tmp_path), tmp_path)
        assert joined_study(first, tmp_path).variants.keys() == first.variants.keys()
        return
    with pytest.raises(ConfigError, match=f"{said}; choose another --output"):
        joined_study(second, tmp_path)
    tree = json.loads((tmp_path / "study.json").read_text())
    del tree["unset"]  # earlier releases did not record them
    (tmp_path / "study.json").write_text(json.dumps(tree))
    assert joined_study(second, tmp_path).unset == second.unset


def test_other_configs_variants_and_data_are_refused(tiny, tmp_path):
    record_study(study_of(tiny, ["a"], definitions=[["a", "transformer", "optim.eps=1e-6"]]), tmp_path)
    with pytest.raises(ConfigError, match=r"optim.learning_rate was 0.01 and is 0.02; choose another --output"):
        joined_study(study_of(tiny, ["transformer"], "optim.learning_rate=0.02"), tmp_path)
    with pytest.raises(ConfigError, match=r"a was .* optim.eps=1e-06 and is|a was .*optim.eps=1e-6 and is .*optim.eps=1e-7"):
        joined_study(study_of(tiny, ["a"], definitions=[["a", "transformer", "optim.eps=1e-7"]]), tmp_path)
    for split in ("train", "validation"):
        write_documents(tmp_path / split, num_documents=9, seed=5)
        with pytest.raises(DataError, match=rf"other data.{split}: .*number of tokens was"):
            joined_study(study_of(tiny, ["transformer"], f"data.{split}={tmp_path / split}"), tmp_path)
    (tmp_path / "study.json").write_text("[]")
    with pytest.raises(ConfigError, match="not the record of an ablation"):
        joined_study(study_of(tiny, ["transformer"]), tmp_path)


@pytest.mark.parametrize("override", ["data.validation=null", "train.evaluate_every_n_steps=0"])
def test_without_held_out_losses_there_is_nothing_to_compare(tiny, override):
    with pytest.raises(ConfigError, match=f"^{override.replace('=', ' is ')}, but an ablation compares losses on held-out data"):
        study_of(tiny, ["transformer"], override)


# ---- processes


def test_every_run_reaches_its_end_and_leaves_a_record(stub):
    processes = stub.train()
    assert processes.failures == [] and stub.recorded == [1, 2, 3, 4]
    records = read_records(stub.output)
    assert [(r.variant, r.seed, r.num_parameters) for r in records] == [
        ("transformer", 1, 70), ("transformer", 2, 70), ("window+global", 1, 71), ("window+global", 2, 71)
    ]  # fmt: skip
    (first, *_) = records
    assert (first.tokens, first.validation_loss, first.validation_tokens, first.skipped_steps) == (96 * NUM_STEPS, 6.0, 48, 1)
    assert first.positions == [[0, 8, 7.0], [8, 24, None]] and (first.learning_rate, first.search_steps, first.is_search) == (None, None, False)
    assert first.curve == [[960, 7.0], [1920, 6.0]] and first.tokens_per_second == 1050 and (first.device, first.jobs) == ("the device", 1)
    assert stub.log("transformer-seed1").startswith("$ ") and "train.seed=1 run.name=transformer-seed1" in stub.log("transformer-seed1")
    assert "transformer-seed1: finished, validation loss 6.0000" in stub.messages


def test_runs_are_side_by_side_but_no_more_than_asked_for(stub):
    names = [run.name for run in stub.runs]
    stub.behave(transformer_seed1=f"together with {names[1]}.here", window_global_seed1=f"together with {names[0]}.here")
    alive = []

    def count(message):
        alive.append((alive[-1] if alive else 0) + message.count(": started") - message.count(": finished"))

    stub.train(jobs=2, on_message=count)
    assert stub.finished() == names and max(alive) == 2


def test_runs_spread_over_the_gpus(stub):
    names = [run.name for run in stub.runs]
    stub.behave(**{name.replace("-", "_"): f"together with {other}.here" for name, other in zip(names, reversed(names), strict=True)})
    stub.train(jobs=2, gpus=["3", "GPU-a1"])
    assert stub.finished() == names
    places = {name: (stub.plans / f"{name}.gpu").read_text() for name in names}
    assert places == {name: (stub.plans / f"{name}.measured").read_text() for name in names}
    assert sorted(places.values()) == ["3", "3", "GPU-a1", "GPU-a1"]
    assert f"{names[0]}: started on GPU 3, log in {stub.output / 'logs' / names[0]}.log" in stub.messages


def test_what_crashes_or_is_killed_is_reported_and_the_others_go_on(stub):
    stub.behave(transformer_seed1="crash", window_global_seed2="kill")
    processes = stub.train(jobs=2)
    assert sorted(processes.failures) == [-9, 5] and stub.finished() == ["window_global-seed1", "transformer-seed2"]
    log = stub.output / "logs" / "transformer-seed1.log"
    failures = [message for message in stub.messages if "failed" in message]
    assert f"transformer-seed1: failed at step 7 of 20, loss 8.300: exit code 5; the end of {log} is: error: the disk is full" in failures
    assert any(message.startswith("window_global-seed2: failed at step 12 of 20, loss 7.800: killed by SIGKILL;") for message in failures)

    stub.behave()
    assert stub.train([run for run in stub.runs if run.name not in stub.finished()]).failures == [] and len(stub.finished()) == 4
    assert stub.log("transformer-seed1").count("$ ") == 3 and stub.log("transformer-seed2").count("$ ") == 2


def test_a_stop_signal_stops_every_run_and_starts_no_other(stub):
    stub.behave(transformer_seed1="stop when asked", window_global_seed1="stop when asked")

    def stop_at_the_second_start(message):
        stub.messages.append(message)
        if message.startswith("window_global-seed1: started"):
            pids = [stub.output / "runs" / name / "metrics.jsonl" for name in ("transformer-seed1", "window_global-seed1")]
            while not all(path.exists() for path in pids):
                pass
            os.kill(os.getpid(), signal.SIGTERM)

    processes = stub.train(jobs=2, on_message=stop_at_the_second_start)
    assert processes.failures == [] and stub.finished() == [] and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert sorted(stub.messages[2:]) == [f"{name}-seed1: stopped at step 7 of 20, loss 8.300" for name in ("transformer", "window_global")]


def test_a_second_interruption_kills_what_is_running(stub):
    stub.behave(transformer_seed1="deaf")
    pid = stub.output / "runs" / "transformer-seed1" / "pid"

    def interrupt_twice(message):
        while not (pid.exists() and pid.read_text()):
            pass
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        stub.train(on_message=interrupt_twice)
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), 0)
    assert stub.finished() == [] and not pid.with_name("metrics.jsonl").exists()


def test_a_run_that_ends_before_its_last_step_is_not_finished(stub):
    stub.train(stub.runs[:1])
    run = stub.runs[0]
    longer = replace(run, config=run.config.model_copy(update={"train": run.config.train.model_copy(update={"num_steps": 30})}))
    record_path(run, stub.output).unlink()
    assert stub.train([longer]).failures == [] and stub.finished() == []
    assert "transformer-seed1: stopped at step 20 of 30, loss 7.000" in stub.messages


def test_a_run_whose_loss_by_position_cannot_be_measured_has_failed_and_is_measured_the_next_time(stub):
    stub.behave(transformer_seed1="immeasurable")
    processes = stub.train(stub.runs[:1])
    assert processes.failures == [9] and stub.finished() == []
    assert stub.messages[-1].startswith("transformer-seed1: failed at step 20 of 20, loss 7.000: exit code 9; the end of")
    stub.behave()
    assert stub.train(stub.runs[:1]).failures == [] and stub.finished() == ["transformer-seed1"]


def test_a_run_that_ends_when_all_stop_is_measured_the_next_time(stub):
    def stop(message):
        stub.messages.append(message)
        if ": started" in message:
            os.kill(os.getpid(), signal.SIGTERM)

    stub.behave(transformer_seed1="finish when asked")
    processes = stub.train(stub.runs[:2], on_message=stop)
    assert processes.is_stopping and processes.failures == [] and stub.finished() == []
    assert not (stub.plans / "transformer-seed1.measured").exists()


def test_records_of_earlier_releases_count(stub):
    stub.train(stub.runs[:1])
    path = record_path(stub.runs[0], stub.output)
    tree = json.loads(path.read_text())
    path.write_text(json.dumps({key: value for key, value in tree.items() if key not in ("positions", "learning_rate", "search_steps", "is_search")}))
    (found,) = read_records(stub.output)
    assert found.validation_loss == 6.0 and found.positions is None
    path.write_text(json.dumps({key: value for key, value in tree.items() if key != "seed"}))
    with pytest.raises(StorageError, match="is not the record of a finished run"):
        read_records(stub.output)


def test_a_damaged_record_is_named(stub):
    stub.train(stub.runs[:1])
    path = record_path(stub.runs[0], stub.output)
    path.write_text(json.dumps({**json.loads(path.read_text()), "colour": "red"}))
    with pytest.raises(StorageError, match=r"transformer-seed1.json is not the record of a finished run"):
        read_records(stub.output)


# ---- results


def test_means_spreads_and_differences_over_the_seeds_of_both():
    runs = {
        "window+global": [record("window+global", *run, tokens_per_second=speed) for *run, speed in ((1, 1.8, 5), (2, 1.9, 7), (3, 9, 6))],
        REFERENCE: [record(REFERENCE, 1, 2.0), record(REFERENCE, 2, 2.0)],
        "transformer": [record("transformer", 1, None), record("transformer", 2, 2.1)],
    }
    ours, theirs, broken = summarise(runs, REFERENCE).values()
    assert ours.mean == pytest.approx(12.7 / 3) and ours.spread == pytest.approx(7.2) and ours.tokens_per_second == 6
    assert ours.difference == pytest.approx(-0.075) and ours.difference_seeds == 2
    assert (theirs.mean, theirs.spread, theirs.difference) == (2.0, 0.0, 0.0)
    assert (broken.mean, broken.spread) == (None, None) and broken.difference == pytest.approx(0.05) and broken.difference_seeds == 1
    assert summarise({"transformer": runs["transformer"]}, REFERENCE)["transformer"].difference is None


def test_without_the_reference_the_first_variant_is_compared_with():
    assert reference_of(["phase8", REFERENCE]) == REFERENCE and reference_of(["phase8", "transformer"]) == "phase8"
    runs = {"phase8": [record("phase8", 1, 2.0)], "transformer": [record("transformer", 1, 2.1)]}
    assert summarise(runs, "phase8")["transformer"].difference == pytest.approx(0.05)


def test_settings_that_some_variants_set_themselves_are_named():
    variants = {"phase8": ("model.ffn_size=1320", "model.block=phase8"), "transformer": ("model.block=transformer",)}
    assert overridden_settings(["model.ffn_size=192", "train.seed=3"], variants) == {"model.ffn_size": ["phase8"]}


def test_the_table_the_figures_and_the_picture(tiny, tmp_path):
    study = study_of(tiny)
    records = [
        record("window+global", 2, 1.9, device="another device", jobs=1),
        record("window+global", 1, 1.8, skipped_steps=4),
        record(REFERENCE, 1, 2.0),
    ]
    text = write_results(study, records, tmp_path)
    assert (tmp_path / "table.md").read_text() == text
    head, _, reference, ours = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    assert head == ["variant", "parameters", "tokens", "seed 1", "seed 2", "mean", "spread", "against transformer+conv+norm", "tok/s"]
    assert reference == [REFERENCE, "1,000", "80", "2.0000", "-", "2.0000", "-", "-", "500"]
    assert ours == ["window+global", "1,000", "80", "1.8000", "1.9000", "1.8500", "0.1000", "-10.00 % (1 of 2 seeds)", "500"]
    num_tokens = study.data["train"]["sources"][0]["num_tokens"]
    assert f"a device, another device, torch 2.99; fp32, T 24, 20 steps, peak learning rate 0.01; training data of {num_tokens:,} tokens" in text
    assert "validation on 48 tokens" in text and study.digest in text and "at most 2 or 1 runs side by side" in text
    assert "window+global seed 1: 4" in text

    tree = json.loads((tmp_path / "results.json").read_text())
    assert tree["config_hash"] == study.digest and tree["config"]["optim.learning_rate"] == 0.01 and tree["reference"] == REFERENCE
    found = tree["variants"]["window+global"]
    assert list(tree["variants"]) == sorted([REFERENCE, "window+global"]) and found["settings"] == list(VARIANTS["window+global"])
    assert found["mean"] == pytest.approx(1.85) and found["difference"] == pytest.approx(-0.1) and found["losses"] == {"1": 1.8, "2": 1.9}
    assert [run["device"] for run in found["runs"]] == ["a device", "another device"] and found["runs"][0]["curve"] == [[40, 2.8], [80, 1.8]]
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


@pytest.fixture
def drawn(monkeypatch):
    """The panels of the pictures drawn."""
    panels = []
    original = chart._draw

    def draw(axes, lines, styles):
        original(axes, lines, styles)
        panels.append(axes)

    monkeypatch.setattr(chart, "_draw", draw)
    return panels


def lines(axes):
    return {line.get_label(): (line.get_xdata().tolist(), line.get_ydata().tolist()) for line in axes.get_lines() if line.get_label()[0] != "_"}


def test_curves_are_means_over_the_seeds_in_a_band_and_relative_seed_by_seed(drawn):
    ours = {1: {10: 4.0, 20: 3.0, 30: 1.0}, 2: {10: 5.5, 30: 2.0}}
    picture = validation_png({"ours": ours, REFERENCE: {1: {10: 4.0, 30: 2.0}, 3: {10: 6.0, 30: 4.0}}}, reference=REFERENCE, speeds={"ours": 2.0})
    upper, lower, timed = drawn
    assert picture.startswith(b"\x89PNG") and upper.get_xscale() == "log"
    assert lines(upper) == {"ours": ([10, 30], [4.75, 1.5]), REFERENCE: ([10, 30], [5.0, 3.0])}
    assert lines(lower) == {"ours": ([10, 30], [0.0, -50.0])}
    assert lines(timed) == {"ours": ([5, 15], [4.75, 1.5])}  # the speed of the reference is not known
    (band,) = [b for b in upper.collections if np.ptp(b.get_paths()[0].vertices[:, 1]) == 4.5]
    assert {(10.0, 4.0), (10.0, 5.5), (30.0, 1.0), (30.0, 2.0)} <= {tuple(point) for point in band.get_paths()[0].vertices}
    (legend,) = upper.figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["1.500  ours", f"3.000  {REFERENCE}"]


def test_the_early_plunge_does_not_squash_the_picture(drawn):
    curve = {tokens: 2 + 100 / tokens for tokens in range(10, 1001, 10)}
    validation_png({"a": {1: curve}}, reference=REFERENCE, speeds={})
    (axes,) = drawn
    low, high = axes.get_ylim()
    assert 1.9 < low < 2.1 and 2.5 < high < 2.6


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("loss", [None, 2.0])
def test_a_single_evaluation_and_a_loss_that_is_not_finite_can_be_drawn(drawn, loss):
    assert validation_png({"a": {1: {10: loss}}, REFERENCE: {2: {10: 2.0}}}, reference=REFERENCE, speeds={}).startswith(b"\x89PNG")
    (axes,) = drawn  # no seed in common: no lower half
    assert [text.get_text() for text in axes.figure.legends[0].get_texts()][-1] == ("not finite  a" if loss is None else f"2.000  {REFERENCE}")


# ---- the search for a learning rate


RATES = [0.05, 0.012, 0.002]


@pytest.mark.parametrize(
    ("rates", "options", "text"),
    [
        ([], {"num_steps": 5}, "--learning-rate-steps is 5, but there is no search without --learning-rates"),
        ([1e-3], {}, "--learning-rates names 0.001; name at least two rates, each once."),
        ([1e-3, 2e-3, 1e-3], {}, "name at least two rates, each once."),
        ([1e-3, 0.0], {}, "--learning-rates names 0; a rate is above 0 and finite."),
        ([1e-3, float("nan")], {}, "--learning-rates names nan; a rate is above 0"),
        ([1e-3, 2e-3], {"num_steps": 0}, "--learning-rate-steps is 0, but at least 1 is needed."),
        ([1e-3, 2e-3], {"settings": ["optim.learning_rate=1"]}, "--set sets optim.learning_rate, which --learning-rates chooses"),
        ([1e-3, 2e-3], {"variants": {"fast": ("optim.learning_rate=1",)}}, "the variant fast sets optim.learning_rate, which --learning-rates"),
    ],
)
def test_searches_that_cannot_be_made_are_refused_in_one_sentence(rates, options, text):
    with pytest.raises(ConfigError) as refusal:
        check_search(rates, **{"num_steps": None, "settings": [], "variants": {"a": ("optim.eps=1e-6",)}, **options})
    assert text in str(refusal.value) and len(refusal.value.problems) == 1


def test_the_runs_of_a_search_are_those_of_the_first_seed_or_shorter(tiny, tmp_path):
    variants = choose_variants(["transformer", REFERENCE], [])
    long, short = (
        plan_search(tiny, ["optim.eps=1e-6"], variants, RATES, num_steps=num_steps, seed=4, output=tmp_path) for num_steps in (None, 7)
    )
    assert [(run.variant, run.learning_rate) for run in long] == [(name, rate) for rate in RATES for name in variants]
    own = {"transformer": variants["transformer"]}
    (same,) = plan_runs(tiny, ["optim.eps=1e-6"], own, [4], output=tmp_path, learning_rates={"transformer": 0.012})
    assert same == replace(long[2], is_search=False) and same.name == "transformer-lr0.012-seed4"
    assert (same.config.optim.learning_rate, same.config.train.num_steps, same.config.train.seed) == (0.012, 20, 4)
    assert short[2].name == "transformer-lr0.012-steps7-seed4" and short[2].config.train.num_steps == short[2].search_steps == 7
    assert all(run.is_search for run in long + short) and len({run.name for run in long + short}) == 12
    with pytest.raises(ConfigError, match=r"optim.warmup_steps 3 is not below train.num_steps 2"):
        plan_search(tiny, [], variants, RATES, num_steps=2, seed=4, output=tmp_path)


def test_the_best_rate_has_the_lowest_loss_of_all_finished_ones(stub, tiny):
    search = plan_search(tiny, [], choose_variants(["transformer", "window+global"], []), RATES, num_steps=None, seed=1, output=stub.output)
    for run in search:
        (stub.plans / run.name).write_text("finish")
    (stub.plans / "window_global-lr0.002-seed1").write_text("crash")
    processes = stub.train(search)
    assert processes.failures == [5] and best_rates(losses_by_rate(search, read_records(stub.output))) == {"transformer": 0.012}
    (stub.plans / "window_global-lr0.002-seed1").write_text("diverge")
    (stub.plans / "window_global-lr0.012-seed1").write_text("diverge")
    record_path(search[3], stub.output).unlink()
    assert stub.train([search[3], search[5]]).failures == []
    found = {(record.variant, record.learning_rate): record for record in read_records(stub.output)}
    diverged = found["window+global", 0.002]
    assert (diverged.validation_loss, diverged.tokens, diverged.curve, diverged.positions) == (None, 96 * 12, [[960, 7.008]], None)
    assert found["transformer", 0.012].positions == [[0, 8, 7.0], [8, 24, None]] and found["transformer", 0.012].is_search
    assert best_rates(losses_by_rate(search, list(found.values()))) == {"transformer": 0.012, "window+global": 0.05}
    none = [replace(record, validation_loss=None) for record in found.values()]
    with pytest.raises(DivergenceError, match=r"transformer has no finite loss with any learning rate that was tried \(0.002, 0.012, 0.05\); name"):
        best_rates(losses_by_rate(search, none))


def test_rates_of_earlier_searches_with_the_same_seed_and_steps_count_too(tiny, tmp_path):
    one = choose_variants(["transformer"], [])
    whole, short = (plan_search(tiny, [], one, [0.05, 0.012], num_steps=steps, seed=1, output=tmp_path) for steps in (None, 7))
    own = [record("transformer", 1, loss, learning_rate=rate, is_search=True) for rate, loss in ((0.05, 2.2), (0.012, 2.1))]
    earlier = record("transformer", 1, 2.0, learning_rate=0.002, is_search=True)
    others = [
        record("transformer", 2, 1.0, learning_rate=0.3, is_search=True),
        record("transformer", 1, 1.0, learning_rate=0.4, search_steps=7, is_search=True),
        record("window", 1, 1.0, learning_rate=0.5, is_search=True),
        record("transformer", 1, 1.0),
        record("transformer", 1, 1.0, learning_rate=0.6),
    ]
    assert losses_by_rate(whole, [earlier, *own, *others]) == {"transformer": {0.002: 2.0, 0.05: 2.2, 0.012: 2.1}}
    assert best_rates(losses_by_rate(whole, [earlier, *own, *others])) == {"transformer": 0.002}
    assert losses_by_rate(whole, [earlier, own[0], *others]) == losses_by_rate(short, [earlier, *own, *others]) == {}  # they are not finished
    trained = replace(own[1], is_search=False)  # as a run that no search asked for then
    assert losses_by_rate(whole, [own[0], trained, *others]) == {"transformer": {0.05: 2.2, 0.012: 2.1}}

def test_a_run_that_diverges_outside_a_search_has_failed(stub):
    stub.behave(transformer_seed1="diverge")
    assert stub.train(stub.runs[:1]).failures == [6] and stub.finished() == []


def test_shortened_runs_are_not_measured_by_position(stub, tiny):
    search = plan_search(tiny, [], choose_variants(["transformer"], []), RATES[:2], num_steps=10, seed=1, output=stub.output)
    for run in search:
        (stub.plans / run.name).write_text("finish")
    assert stub.train(search).failures == []
    assert [(r.search_steps, r.tokens, r.positions) for r in read_records(stub.output)] == 2 * [(10, 960, None)]
    assert not list(stub.plans.glob("*.measured"))


def test_the_choice_says_whether_it_is_at_an_end():
    assert describe_choice("a", 0.002, [0.001, 0.004, 0.002]) == "a: learning rate 0.002 of 0.001, 0.002, 0.004"
    assert describe_choice("a", 0.004, [0.001, 0.004]).endswith("0.004, the largest of 0.001, 0.004: a larger one may be better")
    assert describe_choice("a", 0.001, [0.001, 0.004]).endswith("the smallest of 0.001, 0.004: a smaller one may be better")


def test_a_study_keeps_the_rates_that_were_found_and_one_of_an_earlier_release_has_none(tiny, tmp_path):
    study = study_of(tiny, ["transformer"])
    record_study(replace(study, learning_rates={"transformer": 0.012}), tmp_path)
    assert joined_study(study_of(tiny, ["window"]), tmp_path).learning_rates == {"transformer": 0.012}
    tree = json.loads((tmp_path / "study.json").read_text())
    (tmp_path / "study.json").write_text(json.dumps({key: value for key, value in tree.items() if key != "learning_rates"}))
    assert joined_study(study, tmp_path) == study


def test_the_page_shows_the_search_and_compares_the_runs_with_the_rate_that_was_found(tiny, tmp_path):
    study = replace(study_of(tiny), learning_rates={"window+global": 0.002})
    tried = [record("window+global", 1, loss, learning_rate=rate, is_search=True) for rate, loss in ((0.002, 1.8), (0.004, 1.9), (0.008, None))]
    short = record("transformer", 1, 2.5, learning_rate=0.004, search_steps=7, is_search=True)
    others = [record("window+global", 2, 1.7, learning_rate=0.002), record(REFERENCE, 1, 2.0), record("transformer", 1, 2.2)]
    text = write_results(study, [*tried, short, *others], tmp_path)
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    assert ["window+global", "1,000", "80", "1.8000", "1.7000", "1.7500", "0.1000", "-10.00 % (1 of 2 seeds)", "500"] in rows
    assert ["transformer", "1,000", "80", "2.2000", "-", "2.2000", "-", "+10.00 %", "500"] in rows  # searched, but not yet chosen
    assert rows[-4:] == [
        ["variant", "seed", "steps", "0.002", "0.004", "0.008"],
        ["---", *["---:"] * 5],
        ["window+global", "1", "all", "**1.8000**", "1.9000", "not finite"],
        ["transformer", "1", "7", "-", "2.5000", "-"],
    ]
    assert "peak learning rate 0.01 where none was searched;" in text and "Peak learning rates that were found: window+global 0.002." in text
    tree = json.loads((tmp_path / "results.json").read_text())
    assert tree["learning_rates"] == {"window+global": 0.002} and len(tree["search"]) == 4
    assert "Left out" not in text
    old = [record("window+global", 3, 2.1), record("window+global", 4, 2.2, learning_rate=0.004)]
    text = write_results(study, [*tried, short, *others, *old], tmp_path)
    left_out = "window+global seed 3 with that of the config, window+global seed 4 with 0.004"
    assert f"Left out, because they were trained with another peak learning rate: {left_out}." in text
    assert write_results(replace(study, learning_rates={}), [short], tmp_path).count("![") == 0  # before the first choice


# ---- by position


def test_the_page_has_the_mean_loss_by_position_and_a_chart_of_it(tiny, tmp_path):
    two = [record("window+global", seed, 2.0, positions=[[0, 64, 3.0 + seed], [64, 128, 1.0], [128, 2048, None]]) for seed in (1, 2)]
    text = write_results(study_of(tiny), [*two, record(REFERENCE, 1, 2.0), record("transformer", 1, 2.0, positions=[[0, 64, 5.0]])], tmp_path)
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    head = rows.index(["variant", "0 to 63", "64 to 127", "128 to 2,047"])
    assert rows[head + 2 :] == [["transformer", "5.0000", "-", "-"], [REFERENCE, "-", "-", "-"], ["window+global", "4.5000", "1.0000", "not finite"]]
    assert "![Held-out loss by position in the sequence](positions.png)" in text and (tmp_path / "positions.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((tmp_path / "results.json").read_text())["variants"]["transformer"]["runs"][0]["positions"] == [[0, 64, 5.0]]


def test_the_chart_by_position_shows_all_positions_and_differences(drawn):
    ours, theirs = {1: {64: 5.0, 2048: 2.0}, 2: {64: 5.0, 2048: 3.0}}, {1: {64: 4.0, 2048: 4.0}}
    assert positions_png({"ours": ours, REFERENCE: theirs}, reference=REFERENCE).startswith(b"\x89PNG")
    upper, lower = drawn
    assert lines(upper) == {"ours": ([64, 2048], [5.0, 2.5]), REFERENCE: ([64, 2048], [4.0, 4.0])}
    assert lines(lower) == {"ours": ([64, 2048], [25.0, -50.0])}
    assert upper.get_xlim()[0] < 64 and upper.get_ylim()[1] > 5
    assert upper.get_xlabel() == "end of the range of positions in the sequence"
