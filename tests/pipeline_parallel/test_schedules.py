"""Schedules against an oracle of their own: a clock on which every action takes one tick."""

import re

import pytest

from phase8.errors import ConfigError
from phase8.pipeline_parallel import schedules
from phase8.pipeline_parallel.schedules import SCHEDULES, Action, Kind, Schedule, build_forward_only, build_schedule, peak_held, virtual_stage

PLAIN = [(name, P, M, 1) for name in ("gpipe", "1f1b") for P in (1, 2, 3, 4, 7, 8) for M in (1, 2, 3, 4, 5, 8, 13)]
INTERLEAVED = [("interleaved", P, groups * P, V) for P in (1, 2, 3, 4, 6) for groups in (1, 2, 3) for V in (2, 3, 4)]
CASES = PLAIN + INTERLEAVED


def build(name, P, M, V):
    return build_schedule(name, num_stages=P, num_microbatches=M, num_chunks=V)


def needs(action, position, num_positions):
    """What must be done before an action of a virtual stage: (is it a backward, microbatch, virtual stage)."""
    if action.kind is Kind.FORWARD:
        return [(False, action.microbatch, position - 1)] if position else []
    later = [(True, action.microbatch, position + 1)] if position + 1 < num_positions else []
    return [(False, action.microbatch, position), *later]


def on_the_clock(schedule):
    """The action, or None, of each stage at every tick; an action may begin when its requirements were done in earlier ticks."""
    P, num_positions = schedule.num_stages, schedule.num_stages * schedule.num_chunks
    waiting, done, ticks = [list(actions) for actions in schedule.actions], set(), [[] for _ in range(P)]
    while any(waiting):
        new = []
        for stage, actions in enumerate(waiting):
            position = actions[0].chunk * P + stage if actions else None
            ready = bool(actions) and all(need in done for need in needs(actions[0], position, num_positions))
            ticks[stage].append(actions.pop(0) if ready else None)
            if ready:
                action = ticks[stage][-1]
                new.append((action.kind is not Kind.FORWARD, action.microbatch, position))
        assert new, "no stage can go on"
        done.update(new)
    return ticks


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_action_once_in_an_order_that_finishes_in_the_time_of_the_formula(case):
    name, P, M, V = case
    schedule = build(*case)
    everything = {(kind, m, c) for kind in (Kind.FORWARD, Kind.BACKWARD) for m in range(M) for c in range(V)}
    for stage, actions in enumerate(schedule.actions):
        assert len(actions) == len(everything) and {(a.kind, a.microbatch, a.chunk) for a in actions} == everything
        place = {(a.kind, a.microbatch, a.chunk): index for index, a in enumerate(actions)}
        assert all(place[Kind.FORWARD, m, c] < place[Kind.BACKWARD, m, c] for m in range(M) for c in range(V))
        for chunk in range(V):
            assert [a.microbatch for a in actions if a.kind is Kind.BACKWARD and a.chunk == chunk] == list(range(M))
        held, most = 0, 0
        for action in actions:
            held += 1 if action.kind is Kind.FORWARD else -1
            most = max(most, held)
        assert held == 0
        expected = schedules.peak_activations(name, stage, num_stages=P, num_microbatches=M, num_chunks=V)
        assert (most, most) == (expected, peak_held(schedule, stage)[0])
    ticks = on_the_clock(schedule)
    assert {len(row) for row in ticks} == {2 * (V * M + P - 1)}
    idle = sum(action is None for row in ticks for action in row) / sum(len(row) for row in ticks)
    assert idle == pytest.approx(schedules.bubble_ratio(name, num_stages=P, num_microbatches=M, num_chunks=V), abs=1e-12)


def test_peaks_of_4_stages_and_16_microbatches():
    sizes = {"num_stages": 4, "num_microbatches": 16}
    assert [schedules.peak_activations("gpipe", stage, **sizes) for stage in range(4)] == [16] * 4
    assert [schedules.peak_activations("1f1b", stage, **sizes) for stage in range(4)] == [4, 3, 2, 1]
    assert [schedules.peak_activations("interleaved", stage, **sizes, num_chunks=2) for stage in range(4)] == [11, 9, 7, 5]


def test_the_tables_at_the_head_of_the_file_are_the_schedules():
    tables = re.findall(r"^    (\S+), (\d) stages(?: of (\d) chunks)?, (\d) microbatches.*\n\n((?:        .*\n)+)", schedules.__doc__, re.M)
    assert [table[0] for table in tables] == list(SCHEDULES)
    for name, P, V, M, table in tables:
        ticks = on_the_clock(build(name, int(P), int(M), int(V or 1)))
        assert table.split("\n")[0].split() == ["clock", *map(str, range(len(ticks[0])))]
        drawn = [line.split()[2:] for line in table.split("\n")[1:-1]]
        assert drawn == [[cell(action) for action in row] for row in ticks]


def cell(action):
    if action is None:
        return "."
    return f"{action.microbatch}{' b'[action.chunk].strip()}{'' if action.kind is Kind.FORWARD else chr(39)}"


@pytest.mark.parametrize(("P", "M", "V"), [(1, 1, 1), (1, 5, 3), (4, 6, 1), (4, 2, 1), (4, 7, 2), (3, 1, 4), (2, 8, 2)])
def test_an_evaluation_takes_any_number_of_microbatches_and_holds_nothing(P, M, V):
    schedule = build_forward_only(num_stages=P, num_microbatches=M, num_chunks=V)
    assert {frozenset(actions) for actions in schedule.actions} == {frozenset(Action(Kind.FORWARD, m, c) for m in range(M) for c in range(V))}
    assert all(len(actions) == M * V for actions in schedule.actions)
    on_the_clock(schedule)
    assert [peak_held(schedule, stage, [10] * P * V) for stage in range(P)] == [(0, 0)] * P


def test_bytes_held_are_those_of_the_virtual_stages():
    schedule = build("interleaved", 2, 4, 2)
    # See the table at the head of the file. Stage 0 has virtual stages 0 and 2: in tick 6 it holds 0, 1, 2, 3 of the one and 1b of the other.
    assert peak_held(schedule, 0, [100, 1, 7, 1]) == (5, 407)
    # Stage 1 has virtual stages 1 and 3: 0, 1 and 0b in tick 3, but 0, 1, 2 in tick 7.
    assert peak_held(schedule, 1, [1, 100, 1, 7]) == (3, 300)


def test_activations_are_held_until_the_weights_have_their_gradient():
    kinds = [Kind.FORWARD, Kind.BACKWARD_INPUT, Kind.FORWARD, Kind.BACKWARD_WEIGHT, Kind.BACKWARD_INPUT, Kind.BACKWARD_WEIGHT]
    actions = tuple(Action(kind, m) for kind, m in zip(kinds, [0, 0, 1, 0, 1, 1], strict=True))
    assert peak_held(Schedule(1, 2, 1, (actions,)), 0) == (2, 0)


def test_virtual_stages_go_round_the_stages():
    assert [virtual_stage(stage, chunk, num_stages=3) for chunk in range(2) for stage in range(3)] == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("case", "message"),
    [
        (("zigzag", 2, 4, 1), "parallel.pipeline_schedule is 'zigzag', but it must be one of gpipe, 1f1b, interleaved."),
        (("gpipe", 0, 4, 1), "parallel.pipeline_parallel_size is 0, but at least 1 is needed."),
        (("1f1b", 2, 0, 1), "parallel.num_microbatches is 0, but at least 1 is needed."),
        (("interleaved", 2, 4, -1), "parallel.pipeline_chunks is -1, but at least 1 is needed."),
        (
            ("1f1b", 2, 4, 2),
            "parallel.pipeline_chunks is 2, but only the interleaved schedule has several chunks; set it to 1, or choose interleaved.",
        ),
        (
            ("interleaved", 2, 4, 1),
            "parallel.pipeline_chunks is 1, but the interleaved schedule needs at least 2; set it to 2 or more, or choose 1f1b.",
        ),
        (
            ("interleaved", 4, 10, 2),
            "parallel.num_microbatches 10 is not a multiple of parallel.pipeline_parallel_size 4, as the interleaved schedule needs; "
            "use 8 or 12 microbatches, or choose 1f1b.",
        ),
        (
            ("interleaved", 4, 3, 2),
            "parallel.num_microbatches 3 is not a multiple of parallel.pipeline_parallel_size 4, as the interleaved schedule needs; "
            "use 4 microbatches, or choose 1f1b.",
        ),
    ],
)
def test_what_does_not_suit_is_one_sentence(case, message):
    with pytest.raises(ConfigError) as raised:
        build(*case)
    assert str(raised.value) == message
