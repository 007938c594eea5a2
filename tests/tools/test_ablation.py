"""The door of the ablation: real runs as processes, what it prints and writes, and what it refuses."""

import json
import re
import sys
from pathlib import Path
from statistics import fmean

import pytest
import torch
from rich.console import Console

from phase8.ablation.planned_runs import plan_runs
from phase8.ablation.runs import RunProcesses
from phase8.ablation.study import VARIANTS
from phase8.observe.metrics import read_metrics
from phase8.train.build import build_run
from phase8.train.loop import train
from tests.ablation.stub_runs import MEASURE, STUB
from tests.tools.doors import load_door

ROOT = Path(__file__).parents[2]
DOOR = ROOT / "tools" / "ablation.py"
NAMES = ["transformer+conv+norm", "window+global"]
SHORT = ["train.num_steps=6", "train.evaluate_every_n_steps=3"]


@pytest.fixture
def door(tiny, tmp_path, monkeypatch, capfd):
    """The command in this process, on a tiny config: exit code, output and errors. Its runs are processes."""
    module = load_door("ablation")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")

    def call(*words, variants=NAMES):
        options = ["--config", tiny, "--variants", *variants, "--output", tmp_path / "out", "--device", "cpu", *words]
        monkeypatch.setattr(sys, "argv", [str(DOOR), *map(str, options)])
        code = module.main()
        return code, *capfd.readouterr()

    return call


@pytest.fixture
def half_trained(tiny, tmp_path):
    """One run of the ablation, stopped halfway as if it had been killed after its checkpoint."""
    precision = torch.get_float32_matmul_precision()
    (run,) = plan_runs(tiny, [*SHORT, "train.stop_at_step=4"], {NAMES[0]: VARIANTS[NAMES[0]]}, [2], output=tmp_path / "out")
    train(build_run(run.config, device=torch.device("cpu"), resume="auto", console=Console(quiet=True)), resume_command="")
    torch.set_float32_matmul_precision(precision)
    return run.directory


@pytest.mark.full
def test_variants_and_seeds_are_trained_compared_and_then_skipped(door, half_trained, tmp_path):
    out = tmp_path / "out"
    words = ["--seeds", 1, 2, "--jobs", 2, "--any-size", "--set", *SHORT]
    code, table, messages = door(*words)
    assert code == 0 and (out / "table.md").read_text() == table, messages
    result = json.loads((out / "results.json").read_text())
    assert sorted(result["variants"]) == NAMES and result["config"]["train.num_steps"] == 6
    losses = {}
    for name, found in result["variants"].items():
        assert found["settings"] == list(VARIANTS[name]) and f"{name}: {found['num_parameters']:,} parameters" in messages
        for run in found["runs"]:
            records = read_metrics(out / "runs" / f"{name.replace('+', '_')}-seed{run['seed']}" / "metrics.jsonl")
            evaluations = [(record["step"], record["validation_loss"]) for record in records if "validation_loss" in record]
            assert [record["step"] for record in records if "loss" in record] == [1, 2, 3, 4, 5, 6]
            assert run["curve"] == [[96 * step, loss] for step, loss in evaluations] and run["tokens"] == 6 * 96
            assert run["torch_version"] == torch.__version__ and run["device"].startswith("CPU") and run["jobs"] == 2
            losses[name, run["seed"]] = run["validation_loss"]
            assert f"{run['validation_loss']:.4f}" in table
        # The loss by position is that of the same sequences.
        with open(out / "positions" / f"{name.replace('+', '_')}-seed1.json") as file:
            measured = json.load(file)["total"]
        (position,) = found["runs"][0]["positions"]
        assert position == [0, 24, measured["loss"]] and position[2] == pytest.approx(losses[name, 1], rel=1e-6)
        assert f"{fmean(run['positions'][0][2] for run in found['runs']):.4f}" in table.partition("0 to 23")[2]
    assert len(set(losses.values())) == 4
    ratios = [losses["window+global", seed] / losses["transformer+conv+norm", seed] - 1 for seed in (1, 2)]
    assert f"| {50 * sum(ratios):+.2f} % |" in table
    resumed = (out / "logs" / f"{half_trained.name}.log").read_text()
    assert "resumed from" in resumed and "(step 4," in resumed
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert (out / "positions.png").read_bytes().startswith(b"\x89PNG")

    (out / "table.md").unlink()
    logs = {path: path.read_bytes() for path in (out / "logs").iterdir()}
    code, again, messages = door(*words)
    assert (code, again) == (0, table) and "4 runs, 4 of them finished earlier" in messages and (out / "table.md").read_text() == table
    assert logs == {path: path.read_bytes() for path in (out / "logs").iterdir()}
    code, _, error = door("--any-size", "--set", *SHORT, "optim.learning_rate=0.3")
    assert code == 2 and "optim.learning_rate was 0.01 and is 0.3" in error


@pytest.fixture
def stubbed(tiny, tmp_path, monkeypatch, capfd):
    """The command as `door`, with processes that leave at once what a run leaves; their loss is lowest with a learning rate of 0.01."""
    module, plans = load_door("ablation"), tmp_path / "plans"
    plans.mkdir()
    python = [sys.executable, "-I", "-S", "-c"]
    monkeypatch.setattr(module, "_command", lambda _: lambda settings: [*python, STUB, str(plans), *settings])
    monkeypatch.setattr(module, "_measurement", lambda _: lambda run, result: [*python, MEASURE, str(plans), run.name, str(result)])

    def call(*words, variants=("transformer",), **behaviours):
        for kind in ("", "-lr0.012", "-lr0.05", "-lr0.002", "-lr0.012-steps10", "-lr0.05-steps10"):
            for name in [f"{variant.replace('+', '_')}{kind}-seed{seed}" for variant in variants for seed in (1, 2)]:
                (plans / name).write_text(behaviours.get(name.replace("-", "_").replace(".", "_"), "finish"))
        options = ["--config", tiny, "--variants", *variants, "--output", tmp_path / "out", "--device", "cpu", *words]
        monkeypatch.setattr(sys, "argv", [str(DOOR), *map(str, options)])
        code = module.main()
        return code, *capfd.readouterr()

    return call


def test_learning_rates_are_searched_first_and_the_best_trains_the_seeds(stubbed, tmp_path):
    words = ["--learning-rates", 0.05, 0.012, "--seeds", 1, 2]
    code, table, messages = stubbed(*words)
    assert code == 0, messages
    records = sorted(path.stem for path in (tmp_path / "out" / "records").iterdir())
    assert records == ["transformer-lr0.012-seed1", "transformer-lr0.012-seed2", "transformer-lr0.05-seed1"]
    assert "2 runs of the search for learning rates, 0 of them finished earlier" in messages
    assert "transformer: learning rate 0.012, the smallest of 0.012, 0.05: a smaller one may be better" in messages
    assert "2 runs, 1 of them finished earlier" in messages  # the best one of the search is that of the first seed
    assert "| transformer | 1 | all | **6.0020** | 6.0400 |" in table and "Peak learning rates that were found: transformer 0.012." in table
    assert "| transformer | 0 | " not in table and "6.0020 | 6.0020 | 6.0020 | 0.0000 |" in table

    code, again, messages = stubbed(*words)
    assert (code, again) == (0, table) and "started" not in messages
    code, again, messages = stubbed("--seeds", 2)  # what was found stays
    assert (code, again) == (0, table) and "1 runs, 1 of them finished earlier" in messages
    code, again, messages = stubbed("--learning-rates", 0.002, 0.05)  # rates that were tried before count beside those of a new search
    assert code == 0 and "transformer: learning rate 0.012 of 0.002, 0.012, 0.05\n" in messages
    assert "| transformer | 1 | all | 6.0080 | **6.0020** | 6.0400 |" in again
    code, again, messages = stubbed("--learning-rates", 0.05, 0.012, "--any-size", variants=("transformer+conv",))  # for a variant of its own
    assert code == 0 and "Peak learning rates that were found: transformer 0.012, transformer+conv 0.012." in again


def test_a_search_with_fewer_steps_repeats_the_best_run_with_all_of_them(stubbed, tmp_path):
    code, table, messages = stubbed("--learning-rates", 0.012, 0.05, "--learning-rate-steps", 10, transformer_lr0_05_steps10_seed1="diverge")
    assert code == 0, messages
    records = sorted(path.stem for path in (tmp_path / "out" / "records").iterdir())
    assert records == ["transformer-lr0.012-seed1", "transformer-lr0.012-steps10-seed1", "transformer-lr0.05-steps10-seed1"]
    assert "| transformer | 1 | 10 | **7.0020** | not finite |" in table and "| 1,920 | 6.0020 |" in table


def test_only_variants_whose_search_is_finished_go_on(stubbed, tmp_path):
    names = ("transformer", "transformer+conv")
    words = ["--learning-rates", 0.012, 0.05, "--any-size"]
    code, table, messages = stubbed(*words, variants=names, transformer_conv_lr0_05_seed1="crash")
    assert code == 5 and "not finished: transformer_conv-lr0.05-seed1; run the same command again" in messages
    rows = [line.split(" | ")[0] for line in table.partition("![")[0].splitlines() if line.startswith("| tr")]
    assert rows == ["| transformer"]
    code, table, messages = stubbed(*words, variants=names)
    rows = [line.split(" | ")[0] for line in table.partition("![")[0].splitlines() if line.startswith("| tr")]
    assert code == 0 and rows == ["| transformer", "| transformer+conv"]


def test_no_learning_rate_that_trains_is_a_divergence(stubbed, tmp_path):
    diverging = {f"transformer_lr{rate}_seed1": "diverge" for rate in ("0_012", "0_05")}
    code, table, messages = stubbed("--learning-rates", 0.012, 0.05, **diverging)
    assert (code, table) == (6, "")
    assert "error: transformer has no finite loss with any learning rate that was tried (0.012, 0.05); name smaller ones" in messages


def test_a_stop_in_the_search_begins_no_other_run(stubbed, monkeypatch):
    def stop(self, runs, on_record):
        self.is_stopping = True

    monkeypatch.setattr(RunProcesses, "train", stop)
    code, table, messages = stubbed("--learning-rates", 0.012, 0.05)
    assert (code, table) == (130, "") and "not finished: transformer-lr0.012-seed1, transformer-lr0.05-seed1; run" in messages
    assert " runs, 0 of them" not in messages


@pytest.mark.full
def test_learning_rates_are_searched_with_real_runs(door, tmp_path):
    words = ["--learning-rates", 1e-2, 1e30, "--set", *SHORT, "train.anomaly.policy=stop"]
    code, table, messages = door(*words, variants=NAMES[1:])
    assert code == 0 and "window+global: learning rate 0.01, the smallest of 0.01, 1e+30" in messages, messages
    assert "| window+global | 1 | all | **" in table and "not finite" in table
    records = sorted(path.stem for path in (tmp_path / "out" / "records").iterdir())
    assert records == ["window_global-lr0.01-seed1", "window_global-lr1e30-seed1"]


def test_a_run_that_fails_gives_its_exit_code(door):
    diverges = ("optim.learning_rate=1e30", "train.anomaly.policy=stop")
    code, table, messages = door("--set", *SHORT, *diverges, variants=NAMES[1:])
    assert (code, table) == (6, "")
    assert re.search(r"window_global-seed1: failed at step 2 of 6, loss 4\.\d+: exit code 6; the end of", messages)
    assert "are not both finite" in messages


def test_ids_outside_the_vocabulary_are_found_before_any_run(door):
    code, table, messages = door("--set", *SHORT, "model.vocab_size=30", variants=NAMES[1:])
    assert (code, table) == (3, "") and "holds token id" in messages and "failed at step" not in messages


def test_130_when_stopped_before_all_runs_are_finished(door, monkeypatch):
    monkeypatch.setattr(RunProcesses, "train", lambda self, runs, on_record: None)
    code, table, messages = door(variants=NAMES[:1])
    assert (code, table) == (130, "") and "not finished: transformer_conv_norm-seed1; run the same command again to go on" in messages


@pytest.mark.parametrize(
    ("words", "variants", "code", "text"),
    [
        ([], ["window+globl"], 2, "did you mean window+global?"),
        ([], NAMES, 2, "window+global has "),
        (["--jobs", 0], NAMES, 2, "--jobs is 0, but at least 1 is needed."),
        (["--seeds", 1, 2, 1], NAMES, 2, "--seeds names 1 more than once"),
        (["--seeds", -1], NAMES, 2, "--seeds names -1, but whole numbers of at least 0 are needed"),
        (["--set", "model.colour=red"], NAMES, 2, "unknown key model.colour"),
        (["--set", "optim.warmup_steps=30"], NAMES, 2, "optim.warmup_steps 30 is not below train.num_steps 20"),
        (["--set", "data.validation=null"], NAMES, 2, "data.validation is null, but"),
        (["--set", "data.train=absent"], NAMES, 3, "absent.bin and absent.idx must both exist"),
        (["--set", "train.seed=7"], NAMES, 2, "what an ablation sets for each run: train.seed (set by --seeds); leave"),
        (["--set", "run.name=x", "run.output_dir=/tmp"], NAMES, 2, "run.name (set by --variants and --seeds), run.output_dir (set by --output);"),
        (["--set", "model.block=phase8"], NAMES, 2, "model.block (set by --variants, or a new variant of --define); leave"),
        (["--set", "train.stop_at_step=5"], NAMES, 2, "train.stop_at_step 5 is below train.num_steps 20, but only a run that reaches"),
        (["--define", "a", "transformer", "train.num_steps=4"], ["a"], 2, "--define a: train.num_steps=4 is not about"),
        (["--learning-rates", "1e-3"], NAMES[:1], 2, "--learning-rates names 0.001; name at least two rates"),
        (["--learning-rates", "1e-3", "1e-2", "--learning-rate-steps", 3], NAMES[:1], 2, "optim.warmup_steps 3 is not below train.num_steps 3"),
    ],
)
def test_what_cannot_be_compared_is_refused_before_anything_is_trained(door, tmp_path, words, variants, code, text):
    found, output, errors = door(*words, variants=variants)
    assert found == code and output == "" and errors.startswith("error: ") and text in errors and errors.count("\n") == 1, errors
    assert not (tmp_path / "out").exists()


def test_130_when_interrupted_before_a_run_has_started(door, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("phase8.train.datasets.open_run_data", interrupt)
    assert door() == (130, "", "interrupted; run the same command again to go on\n")
