"""Training whose output is closed while it runs: it goes on without, to its end."""

import pytest

NUM_STEPS = 60


@pytest.mark.parametrize("is_launched", [False, pytest.param(True, marks=pytest.mark.full)], ids=["plain", "torchrun"])
def test_a_reader_that_goes_costs_no_step(training, launch, is_launched):
    """As in `launch/pretrain.py ... | grep -m1 "step *37/"`."""
    name = f"unread-{is_launched}"
    settings = (f"train.num_steps={NUM_STEPS}", "checkpoint.every_n_steps=10", "observe.log_every_n_steps=1", "train.evaluate_every_n_steps=0")
    settings = (*settings, "data.validation=null", "observe.report=true", "observe.tensorboard=true")
    launched = launch(training.torchrun(name, *settings, num_ranks=2) if is_launched else training.plain(name, *settings))
    assert any(line.startswith(f"step 37/{NUM_STEPS}") for line in launched.process.stdout)
    launched.process.stdout.close()
    code, _, errors = launched.end()
    assert code == 0, errors
    assert errors.count("standard output is lost (Broken pipe); going on without it\n") == 1 and "Traceback" not in errors
    assert len(training.figures(name)) == NUM_STEPS and training.saved_steps(name)[-1] == NUM_STEPS
    assert (training.directory / "runs" / name / "report" / "index.html").exists()
