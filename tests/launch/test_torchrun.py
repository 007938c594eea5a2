"""Training under torchrun: the same whatever the ranks, and checkpoints that go on elsewhere."""

import pytest

from tests.processes.launched import run


@pytest.mark.full
def test_one_process_of_torchrun_is_the_plain_process_bit_for_bit(training, alone):
    code, _, errors = run(training.torchrun("torchrun", "train.stop_at_step=6", num_ranks=1))
    assert code == 0, errors
    assert training.figures("torchrun") == training.figures(alone)[:6]
    assert training.losses_held_out("torchrun") == training.losses_held_out(alone)[:1]


@pytest.mark.parametrize("num_ranks", [2, pytest.param(4, marks=pytest.mark.full)])  # the jobs of tests/parallel have four in every run
def test_ranks_train_as_one_and_one_goes_on_from_their_checkpoint(training, alone, num_ranks):
    name, settings = f"of_{num_ranks}", ("parallel.tensor_parallel_size=2", "zero.stage=3", "observe.wandb=offline")
    code, output, errors = run(training.torchrun(name, *settings, "train.stop_at_step=3", num_ranks=num_ranks))
    assert code == 0, errors
    assert len(list((training.directory / "runs" / name / "wandb").glob("offline-run-*"))) == 1  # only the first rank logs
    assert "tp 2" in output and "ZeRO stage 3" in output
    assert training.in_this_process(name, "train.stop_at_step=6") == 3
    training.assert_same(name, alone, num_steps=6)


@pytest.mark.full
def test_two_ranks_go_on_from_the_checkpoint_of_one(training, alone):
    training.in_this_process("handed_over", "train.stop_at_step=3")
    settings = ("zero.stage=1", "zero.offload_optimizer=cpu", "train.stop_at_step=6")
    code, output, errors = run(training.torchrun("handed_over", *settings, num_ranks=2))
    assert code == 0 and "resumed from" in output, errors
    training.assert_same("handed_over", alone, num_steps=6)


def test_two_ranks_roll_back_as_one_does(training):
    # Weights hardly move, so the losses are noise, of which every tenth or so counts as a spike.
    settings = ("optim.learning_rate=1e-5", "train.anomaly.spike_deviations=1.4", "train.anomaly.policy=rollback",
                "observe.stragglers_every_n_steps=5", "train.check_replicas_every_n_steps=1")  # fmt: skip
    training.in_this_process("back_alone", *settings)
    code, _, errors = run(training.torchrun("back_together", *settings, "zero.stage=3", num_ranks=2))
    assert code == 0, errors
    expected = training.events("back_alone", "rollback")
    assert len(expected) > 3 and len({event["step"] for event in expected}) > 1
    kept = ("step", "from_step", "first_sample_left_out", "last_sample_left_out")
    found = training.events("back_together", "rollback")
    assert [[event[key] for key in kept] for event in found] == [[event[key] for key in kept] for event in expected]
    training.assert_same("back_together", "back_alone", num_steps=24)
    probes = training.events("back_together", "stragglers")
    assert [probe["step"] for probe in probes] == [5, 10, 15, 20] and all(probe["slowest_rank"] in (0, 1) for probe in probes)
    assert not training.events("back_alone", "stragglers")
