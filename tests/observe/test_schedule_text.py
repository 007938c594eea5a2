"""The timeline as text: boxes as wide as they are long, with as many numbers as have room."""

from phase8.observe import schedule_text
from phase8.observe.schedule_text import Box, timeline_text

# 1f1b, 2 stages, 3 microbatches: when each forward and each backward of each stage begins.
BEGINNINGS = [((0, 1, 6), (4, 7, 10)), ((1, 4, 7), (2, 5, 8))]
BOXES = [
    Box(stage, start, start + duration, kind, m, 0)
    for stage, beginnings in enumerate(BEGINNINGS)
    for kind, duration, starts in zip(("forward", "backward"), (1, 2), beginnings, strict=True)
    for m, start in enumerate(starts)
]


def test_the_example_at_the_head_of_the_file():
    example = [line[4:] for line in schedule_text.__doc__.splitlines() if line.startswith("    stage")]
    assert timeline_text(BOXES).splitlines() == example


def test_what_is_wider_than_the_page_is_cut_into_pieces():
    whole = timeline_text(BOXES).splitlines()
    pieces = timeline_text(BOXES, width=9 + 10 + 1).split("\n\n")
    assert len(pieces) == 3 and all(len(line) <= 20 for piece in pieces for line in piece.splitlines())
    for stage in range(2):
        joined = "".join(piece.splitlines()[stage][9:-1] for piece in pieces)
        assert joined == whole[stage][9:-1]


def test_boxes_of_unequal_length_keep_their_proportions_and_whole_numbers():
    boxes = [Box(0, 0.1 * m, 0.1 * (m + 1), "forward", m, 0) for m in range(11)] + [Box(0, 1.1, 2.2, "backward", 3, 0)]
    (line,) = timeline_text(boxes).splitlines()
    assert line == "stage 0 |" + "".join(f"{m:->3}" for m in range(11)) + f"{3:=>33}|"


def test_chunks_are_letters_and_halves_of_a_backward_have_their_own_signs():
    boxes = [
        Box(0, 0, 1, "forward", 12, 1),
        Box(0, 1, 2, "backward_input", 12, 0),
        Box(0, 2, 3, "backward_weight", 3, 25),
        Box(0, 3, 5, "backward", 3, 26),
    ]
    assert timeline_text(boxes) == "stage 0 |" + "--12b==12a+++3z======3.26|"


def test_a_step_too_long_for_numbers_is_drawn_without_them():
    boxes = [Box(0, m, m + 1, "forward", m, 0) for m in range(100_000)]
    pieces = timeline_text(boxes, width=60).split("\n\n")
    assert len(pieces) == 12 and set(pieces[0].removeprefix("stage 0 |").removesuffix("|")) == {"-"}
