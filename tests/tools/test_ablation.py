"""The door of the ablation: real runs as processes, what it prints and writes, and what it refuses."""

import json
import re
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console

from phase8.ablation.runs import RunProcesses
from phase8.ablation.study import VARIANTS, plan_runs
from phase8.observe.metrics import read_metrics
from phase8.train.build import build_run
from phase8.train.loop import train
from tests.tools.doors import load_door

ROOT = Path(__file__).parents[2]
DOOR = ROOT / "tools" / "ablation.py"
NAMES = ["transformer+conv", "window+global"]
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
    assert len(set(losses.values())) == 4
    ratios = [losses["window+global", seed] / losses["transformer+conv", seed] - 1 for seed in (1, 2)]
    assert f"| {50 * sum(ratios):+.2f} % |" in table
    resumed = (out / "logs" / f"{half_trained.name}.log").read_text()
    assert "resumed from" in resumed and "(step 4," in resumed
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")

    (out / "table.md").unlink()
    logs = {path: path.read_bytes() for path in (out / "logs").iterdir()}
    code, again, messages = door(*words)
    assert (code, again) == (0, table) and "4 runs, 4 of them finished earlier" in messages and (out / "table.md").read_text() == table
    assert logs == {path: path.read_bytes() for path in (out / "logs").iterdir()}
    code, _, error = door("--any-size", "--set", *SHORT, "optim.learning_rate=0.3")
    assert code == 2 and "optim.learning_rate was 0.01 and is 0.3" in error


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
    assert (code, table) == (130, "") and "not finished: transformer_conv-seed1; run the same command again to go on" in messages


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
