"""The door of the planner: the timeline as text, picture and JSON, and what it refuses."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from matplotlib.image import imread

from tests.tools.doors import load_door

DOOR = Path(__file__).parents[2] / "tools" / "plan.py"
INTERLEAVED = ["schedule", "--stages", 4, "--microbatches", 16, "--schedule", "interleaved", "--chunks", 2]
SMALL = ["schedule", "--stages", 2, "--microbatches", 3]


@pytest.fixture
def door(monkeypatch, capfd):
    """The command in this process: exit code, output and errors."""
    module = load_door("plan")
    monkeypatch.setenv("COLUMNS", "100")

    def call(*words):
        monkeypatch.setattr(sys, "argv", [str(DOOR), *map(str, words)])
        code = module.main()
        return code, *capfd.readouterr()

    return call


def test_the_timeline_is_printed_with_bubble_and_activations(door):
    code, text, errors = door(*SMALL)
    assert (code, errors) == (0, "")
    assert text.splitlines() == [
        "1f1b, 2 stages, 3 microbatches",
        "forward 1, backward 2, communication 0; makespan 12, bubble 25.0 % (by the formula 25.0 %)",
        "",
        "stage 0 |-0-1    ===0-2===1  ===2|",
        "stage 1 |  -0===0-1===1-2===2    |",
        "",
        "stage   idle     peak activations   by the formula   (in microbatches)",
        "    0   25.0 %                  2                2",
        "    1   25.0 %                  1                1",
    ]


def test_the_picture_is_drawn_and_long_lines_are_cut(door, tmp_path):
    picture = tmp_path / "new" / "timeline.png"
    code, text, errors = door(*INTERLEAVED, "--output", picture)
    assert (code, errors) == (0, "")
    assert "interleaved, 4 stages of 2 chunks, 16 microbatches" in text and "bubble 8.6 % (by the formula 8.6 %)" in text
    assert max(map(len, text.split("stage   idle")[0].splitlines())) == 100
    assert [line.split()[3:5] for line in text.splitlines() if line.startswith("    ")] == [["11", "11"], ["9", "9"], ["7", "7"], ["5", "5"]]
    assert text.endswith(f"picture: {picture}\n") and imread(picture).shape[1] > 2000


def test_json_has_the_numbers_and_the_text_goes_to_stderr(door):
    costs = ["--forward-cost", 2, "--backward-cost", 3, "--communication-cost", 0.5]
    code, out, text = door(*SMALL, *costs, "--json")
    result = json.loads(out)
    assert code == 0 and text.startswith("1f1b, 2 stages, 3 microbatches\nforward 2, backward 3, communication 0.5; makespan ")
    # (3 + 1) * (2 + 3) without communication; the first forward and the last backward cross once each.
    assert result["makespan"] >= 20 + 2 * 0.5 and result["bubble_ratio"] == pytest.approx(1 - 3 * 5 / result["makespan"])
    timeline = result.pop("timeline")
    assert timeline[0] == {"stage": 0, "start": 0, "end": 2, "kind": "forward", "microbatch": 0, "chunk": 0} and len(timeline) == 2 * 2 * 3
    assert result == {
        "schedule": "1f1b",
        "num_stages": 2,
        "num_microbatches": 3,
        "num_chunks": 1,
        "costs": {"forward": 2, "backward": 3, "communication": 0.5},
        "makespan": result["makespan"],
        "bubble_ratio": result["bubble_ratio"],
        "bubble_ratio_by_formula": 0.25,
        "peak_activations": [2, 1],
        "peak_activations_by_formula": [2, 1],
    }


def test_receives_posted_ahead_hide_the_transfer(door):
    words = ["schedule", "--stages", 4, "--microbatches", 8, "--schedule", "gpipe", "--communication-cost", 0.5, "--json"]
    late, ahead = (json.loads(door(*words, "--receives-ahead", number)[1])["makespan"] for number in (0, 1))
    assert ahead == pytest.approx(33 + 2 * 3 * 0.5) and late > ahead


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--schedule", "zigzag"], "parallel.pipeline_schedule is 'zigzag', but it must be one of gpipe, 1f1b, interleaved."),
        (["--stages", 0], "--stages is 0, but at least 1 is needed."),
        (["--microbatches", -1], "--microbatches is -1, but at least 1 is needed."),
        (["--chunks", 0], "--chunks is 0, but at least 1 is needed."),
        (["--receives-ahead", -1], "--receives-ahead is -1, but it must be 0 or more."),
        (["--output", "picture.svg"], "--output is picture.svg, but the picture is a PNG; give it a name that ends in .png."),
        (["--forward-cost", 0], "the forward of a virtual stage costs 0.0, but a cost must be finite and above 0; correct it."),
        (
            ["--chunks", 2, "--schedule", "interleaved"],
            "parallel.num_microbatches 3 is not a multiple of parallel.pipeline_parallel_size 2, as the interleaved schedule needs; "
            "use 2 or 4 microbatches, or choose 1f1b.",
        ),
    ],
)
def test_what_makes_no_schedule_is_one_sentence(door, words, message):
    assert door(*SMALL, *words) == (2, "", f"error: {message}\n")


def test_a_picture_that_cannot_be_written_is_one_sentence(door, tmp_path):
    (tmp_path / "file").touch()
    code, _, errors = door(*SMALL, "--output", tmp_path / "file" / "timeline.png")
    assert code == 5 and errors.startswith(f"error: cannot write {tmp_path / 'file' / 'timeline.png'}: ")


def test_the_text_needs_neither_torch_nor_matplotlib():
    program = f"import runpy, sys; sys.argv = {['plan.py', *map(str, SMALL)]}; runpy.run_path({str(DOOR)!r})['main']()"
    program += "; print({'torch', 'numpy', 'matplotlib'} & sys.modules.keys())"
    found = subprocess.run([sys.executable, "-c", program], cwd=DOOR.parents[1], capture_output=True, text=True, check=True)
    assert found.stdout.splitlines()[-1] == "set()"
