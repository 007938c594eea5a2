"""Training computes what it computed when `golden.json` was recorded, bit for bit: losses, gradient norms and final weights of twenty steps."""

import copy
import json
import sys
from pathlib import Path

import pytest

from tests.parallel import golden, golden_training
from tests.parallel.golden import differences, first_difference, reason_not_to_compare, record_text

RECORD = json.loads((Path(__file__).parent / "golden.json").read_text(encoding="utf-8"))
QUICK = ("one-whole-selective", "tp2-pp2-phase8-low-rank-tied")
EXAMPLE = QUICK[0]


def assert_nothing_differs(pool, names):
    if reason := reason_not_to_compare(RECORD):
        pytest.skip(reason)
    assert list(differences(pool, RECORD, names)) == []


def numbers_of_a_few_steps(name, factor):
    """The first numbers of a case whose learning rate is that of its config times a factor."""
    rate, num_steps = golden_training.learning_rate, golden_training.NUM_STEPS
    golden_training.learning_rate = lambda *arguments, **keywords: factor * rate(*arguments, **keywords)
    golden_training.NUM_STEPS = 6
    try:
        return golden_training.golden_numbers(name)
    finally:
        golden_training.learning_rate, golden_training.NUM_STEPS = rate, num_steps


def test_two_cases_compute_what_was_recorded(pool):
    assert_nothing_differs(pool, QUICK)


@pytest.mark.full
def test_all_cases_compute_what_was_recorded(pool):
    assert_nothing_differs(pool, [name for name in golden_training.CASES if name not in QUICK])


def test_the_record_has_all_cases_and_is_written_as_it_is_read(monkeypatch):
    monkeypatch.setattr(golden, "machine", lambda: RECORD["machine"])
    assert RECORD["cases"].keys() == golden_training.CASES.keys()
    assert record_text(RECORD["cases"]) == (Path(__file__).parent / "golden.json").read_text(encoding="utf-8")


def test_the_same_code_computes_the_same_and_another_learning_rate_is_noticed(pool):
    before, again, after = (pool.run(numbers_of_a_few_steps, EXAMPLE, factor, world_size=1)[0] for factor in (1, 1, 1 + 1e-7))
    assert len(before["loss"]) == 6 and first_difference(before, again) is None
    assert first_difference(before, after).startswith("step ")


def changed(path, value):
    """The numbers of the example with another value at a path of keys; None: without it."""
    numbers = copy.deepcopy(RECORD["cases"][EXAMPLE])
    *parents, leaf = path
    place = numbers
    for parent in parents:
        place = place[parent]
    if value is None:
        del place[leaf]
    else:
        place[leaf] = value
    return numbers


@pytest.mark.parametrize(
    ("path", "value", "expected"),
    [
        (("loss", 4), "0x1.8p+2", "step 5: loss: {old} ({number:.9g}) -> 0x1.8p+2 (6)"),
        (("gradient norm", 19), "0x1.8p+2", "step 20: gradient norm: {old} ({number:.9g}) -> 0x1.8p+2 (6)"),
        (("parameters", "embedding.weight"), "00", "after step 20: embedding.weight: {old} -> 00"),
        (("parameters", "embedding.weight"), None, "after step 20: embedding.weight: {old} -> absent"),
    ],
)
def test_the_first_difference_names_step_quantity_and_both_values(path, value, expected):
    before = RECORD["cases"][EXAMPLE]
    old = before[path[0]][path[1]]
    number = None if path[0] == "parameters" else float.fromhex(old)
    assert first_difference(before, changed(path, value)) == expected.format(old=old, number=number)


def test_a_difference_of_a_step_comes_before_those_of_later_steps_and_of_parameters():
    after = changed(("loss", 7), "0x1.8p+2")
    after["gradient norm"][5] = "0x1.0p+0"
    after["parameters"]["embedding.weight"] = "00"
    assert first_difference(RECORD["cases"][EXAMPLE], after).startswith("step 6: gradient norm: ")


def test_steps_that_one_side_lacks_differ():
    after = copy.deepcopy(RECORD["cases"][EXAMPLE])
    del after["loss"][-1], after["gradient norm"][-1]
    assert first_difference(RECORD["cases"][EXAMPLE], after).endswith(" -> absent")


@pytest.mark.parametrize("names", [("no-such-case",), ()])
class Answers:
    """Stands for a pool: every job returns the numbers of the example."""

    def run(self, *_, **__):
        return [RECORD["cases"][EXAMPLE]]

    def close(self):
        pass


def test_a_case_that_one_side_lacks_differs():
    record = {"cases": {EXAMPLE: RECORD["cases"][EXAMPLE], "no-such-case": RECORD["cases"][EXAMPLE]}}
    assert list(differences(Answers(), record, [EXAMPLE, QUICK[1], "no-such-case"])) == [
        (QUICK[1], "the record lacks it; make a new one"),
        ("no-such-case", "it is in the record, but no longer trained"),
    ]


def test_a_record_of_another_machine_is_not_compared(monkeypatch, capsys):
    ours = {**RECORD["machine"], "torch": "0.1"}
    monkeypatch.setattr(golden, "machine", lambda: ours)
    assert golden.compare(RECORD, list(QUICK)) == golden.EXIT_NOT_COMPARED
    reason = f"torch is 0.1 and was {RECORD['machine']['torch']}; record the code before the change on this machine"
    assert capsys.readouterr().out == f"not compared: {reason}\n"


def test_the_command_records_and_compares(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(golden, "Pool", Answers)

    def run(command, only=EXAMPLE):
        monkeypatch.setattr(sys, "argv", ["golden.py", command, str(tmp_path / "record.json"), "--only", only])
        return golden.main(), capsys.readouterr().out

    assert run("record") == (0, "")
    assert run("compare") == (0, "all equal, bit for bit (cases: 1)\n")
    monkeypatch.setattr(Answers, "run", lambda self, *_, **__: [changed(("parameters", "embedding.weight"), "00")])
    code, output = run("compare")
    assert code == 1 and output.startswith(f"{EXAMPLE}: after step 20: embedding.weight: ") and output.endswith("\ncases that differ: 1 of 1\n")
    with pytest.raises(SystemExit, match="2"):
        run("compare", "no-such-case")
    (tmp_path / "record.json").unlink()
    with pytest.raises(SystemExit, match="2"):
        run("compare")
