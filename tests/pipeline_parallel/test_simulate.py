"""The simulator: the clock of all schedules, what it respects, and the deadlocks it names."""

import random
from itertools import pairwise

import pytest

from phase8.errors import ConfigError
from phase8.pipeline_parallel.lowering import Compute, Receive, Send, lower
from phase8.pipeline_parallel.schedules import Action, Kind, Schedule, bubble_ratio, build_forward_only, build_schedule, peak_activations
from phase8.pipeline_parallel.simulate import Costs, SendMode, simulate, uniform_costs

WITHOUT_WAITING = (SendMode.BUFFERED, SendMode.RENDEZVOUS)
SIZES = [
    *((name, P, M, 1) for name in ("gpipe", "1f1b") for P in (1, 2, 3, 4, 6) for M in (1, 2, 3, 5, 8, 12)),
    *(("interleaved", P, groups * P, V) for P in (1, 2, 3, 4, 5) for groups in (1, 2, 3) for V in (2, 3, 4)),
]


def build(name, P, M, V=1):
    sizes = {"num_stages": P, "num_microbatches": M, "num_chunks": V}
    return build_forward_only(**sizes) if name == "forward only" else build_schedule(name, **sizes)


def run(schedule, costs=None, *, receives_ahead=0, **options):
    costs = costs or uniform_costs(num_stages=schedule.num_stages, num_chunks=schedule.num_chunks)
    return simulate(schedule, lower(schedule, receives_ahead=receives_ahead), costs, **options)


def in_order(*kinds_and_microbatches):
    return tuple(Action(kind, microbatch) for kind, microbatch in kinds_and_microbatches)


def zero_bubble(P, M):
    """1f1b whose stages take the gradient of the weights later, the later the farther down: a schedule with split backwards."""

    def stage_actions(stage):
        forwards = [Action(Kind.FORWARD, m) for m in range(M)]
        num_warmup = min(P - stage - 1, M)
        actions, forwards = forwards[:num_warmup], forwards[num_warmup:]
        for m in range(M):
            actions += [*forwards[:1], Action(Kind.BACKWARD_INPUT, m)]
            forwards = forwards[1:]
            if m >= stage:
                actions.append(Action(Kind.BACKWARD_WEIGHT, m - stage))
        return (*actions, *(Action(Kind.BACKWARD_WEIGHT, m) for m in range(max(M - stage, 0), M)))

    return Schedule(P, M, 1, tuple(stage_actions(stage) for stage in range(P)))


def check_dependencies(schedule, timelines, communication):
    """No action begins before what it needs is there, and a stage does one thing at a time."""
    P, num_positions = schedule.num_stages, schedule.num_stages * schedule.num_chunks
    latency = communication if P > 1 else 0
    ends = {}
    for stage, timeline in enumerate(timelines):
        assert tuple(interval.action for interval in timeline) == schedule.actions[stage]
        assert all(a.end <= b.start for a, b in pairwise(timeline))
        ends |= {(i.action.kind, i.action.microbatch, i.action.chunk * P + stage): i.end for i in timeline}
    for stage, timeline in enumerate(timelines):
        for interval in timeline:
            kind, m, position = interval.action.kind, interval.action.microbatch, interval.action.chunk * P + stage
            if kind is Kind.FORWARD and position > 0:
                assert interval.start >= ends[Kind.FORWARD, m, position - 1] + latency
            elif kind is Kind.BACKWARD_WEIGHT:
                assert interval.start >= ends[Kind.BACKWARD_INPUT, m, position]
            elif kind is not Kind.FORWARD:
                assert interval.start >= ends[Kind.FORWARD, m, position]
                assert position == num_positions - 1 or interval.start >= ends[kind, m, position + 1] + latency


@pytest.mark.parametrize("sends", WITHOUT_WAITING)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_bubble_and_activations_are_those_of_the_formulas(size, sends):
    name, P, M, V = size
    formula = bubble_ratio(name, num_stages=P, num_microbatches=M, num_chunks=V)
    schedule = build(*size)
    for forward, backward in ((1, 2), (3, 1)):
        found = run(schedule, uniform_costs(num_stages=P, num_chunks=V, forward=forward, backward=backward), sends=sends)
        assert found.makespan == pytest.approx((M + (P - 1) / V) * (forward + backward))
        assert [found.bubble_ratio, *map(found.idle_ratio, range(P))] == pytest.approx([formula] * (P + 1), abs=1e-12)
        peaks = tuple(peak_activations(name, stage, num_stages=P, num_microbatches=M, num_chunks=V) for stage in range(P))
        assert found.peak_activations == peaks


@pytest.mark.parametrize("sends", WITHOUT_WAITING)
@pytest.mark.parametrize("receives_ahead", [0, 2])
@pytest.mark.parametrize("size", [*SIZES[::2], ("forward only", 3, 5, 1), ("forward only", 4, 6, 3), ("forward only", 1, 2, 3)], ids=str)
def test_with_any_costs_nothing_deadlocks_and_nothing_begins_too_early(size, receives_ahead, sends):
    choose = random.Random(str(size))
    _, P, _, V = size
    costs = Costs(*(tuple(choose.uniform(0.1, 3) for _ in range(P * V)) for _ in range(2)), communication=choose.uniform(0, 2))
    schedule = build(*size)
    found = run(schedule, costs, receives_ahead=receives_ahead, sends=sends)
    check_dependencies(schedule, found.timelines, costs.communication)
    assert found.makespan == max(timeline[-1].end for timeline in found.timelines)
    for stage, timeline in enumerate(found.timelines):
        for interval in timeline:
            by_kind = costs.forward if interval.action.kind is Kind.FORWARD else costs.backward
            assert interval.end - interval.start == pytest.approx(by_kind[interval.action.chunk * P + stage])


def test_one_microbatch_pays_each_hop_once():
    for sends in SendMode:
        assert run(build("1f1b", 3, 1), Costs((1, 2, 3), (4, 5, 6), communication=10), sends=sends).makespan == 21 + 4 * 10


@pytest.mark.parametrize(("sends", "receives_ahead", "makespan"), [("buffered", 0, 4), ("rendezvous", 0, 5), ("rendezvous", 1, 4)])
def test_a_rendezvous_starts_when_both_ends_are_there(sends, receives_ahead, makespan):
    # Stage 0 sends at 1 and 2. Stage 1 computes from 2 to 3; only then, or one action earlier, it posts its second receive.
    costs = Costs((1, 1), (1, 1), communication=1)
    assert run(build("forward only", 2, 2), costs, sends=SendMode(sends), receives_ahead=receives_ahead).makespan == makespan


@pytest.mark.parametrize(("P", "M"), [(P, M) for P in (2, 3, 4, 8) for M in (2, 3, 8)])
def test_blocking_sends_deadlock_1f1b_but_not_gpipe(P, M):
    with pytest.raises(ConfigError, match=r"^the pipeline deadlocks with blocking sends: stage \d waits to send the act.*to send the gradient"):
        run(build("1f1b", P, M), sends=SendMode.BLOCKING)
    run(build("gpipe", P, M), sends=SendMode.BLOCKING)


@pytest.mark.parametrize("sends", WITHOUT_WAITING)
def test_a_deadlock_names_who_waits_for_what(sends):
    F, B = Kind.FORWARD, Kind.BACKWARD
    schedule = Schedule(2, 2, 1, (in_order((F, 0), (B, 0), (F, 1), (B, 1)), in_order((F, 0), (F, 1), (B, 0), (B, 1))))
    with pytest.raises(ConfigError) as raised:
        run(schedule, sends=sends)
    assert str(raised.value) == (
        f"the pipeline deadlocks with {sends} sends: stage 0 waits for the gradient of microbatch 0 for chunk 0 from stage 1; "
        "stage 1 waits for the activation of microbatch 1 for chunk 0 from stage 0; correct the schedule."
    )


@pytest.mark.parametrize(
    ("actions", "missing"),
    [
        (((Kind.BACKWARD, 0), (Kind.FORWARD, 0)), "activation of microbatch 0 of virtual stage 0"),
        (((Kind.FORWARD, 0), (Kind.BACKWARD_WEIGHT, 0)), "gradient of microbatch 0 of virtual stage 0"),
    ],
)
def test_a_stage_that_needs_what_it_computes_later_is_stuck(actions, missing):
    with pytest.raises(ConfigError, match=f"stage 0 waits for the {missing}, its own, which comes later or never"):
        run(Schedule(1, 1, 1, (in_order(*actions),)))


def test_chunks_of_a_single_stage_hand_over_in_place_and_in_order():
    wrong = tuple(Action(Kind.FORWARD, 0, chunk) for chunk in (1, 0))
    with pytest.raises(ConfigError, match="stage 0 waits for the activation of microbatch 0 of virtual stage 0, its own"):
        run(Schedule(1, 1, 2, (wrong,)))
    forwards = tuple(Action(Kind.FORWARD, 0, chunk) for chunk in (0, 1))
    backwards = tuple(Action(Kind.BACKWARD, 0, chunk) for chunk in (0, 1))
    with pytest.raises(ConfigError, match="stage 0 waits for the gradient of microbatch 0 of virtual stage 1, its own"):
        run(Schedule(1, 1, 2, (forwards + backwards,)))


def test_a_message_that_nobody_receives_is_seen_at_the_flush():
    schedule = build("forward only", 2, 2)
    sender, receiver = lower(schedule)
    programs, costs = (sender, receiver[:-2]), uniform_costs(num_stages=2)
    assert [type(i) for i in receiver[-2:]] == [Receive, Compute]
    simulate(schedule, programs, costs, sends=SendMode.BUFFERED)
    with pytest.raises(ConfigError, match="stage 0 waits to send the activation of microbatch 1 for chunk 0 to stage 1; stage 1 has finished;"):
        simulate(schedule, programs, costs, sends=SendMode.RENDEZVOUS)


def test_a_message_that_nobody_sends_is_waited_for():
    schedule = build("forward only", 2, 2)
    sender, receiver = lower(schedule)
    assert isinstance(sender[-1], Send)
    for sends in SendMode:
        with pytest.raises(ConfigError, match="stage 1 waits for the activation of microbatch 1 for chunk 0 from stage 0; stage 0 has finished;"):
            simulate(schedule, (sender[:-1], receiver), uniform_costs(num_stages=2), sends=sends)


@pytest.mark.parametrize("sends", list(SendMode))
def test_receives_in_another_order_than_the_sends_are_found(sends):
    schedule = build("forward only", 2, 2)
    sender, (first, _, second, _) = lower(schedule)
    computes = tuple(Compute(action) for action in schedule.actions[1])
    with pytest.raises(ConfigError, match=r"^stage 1 would take the activation of microbatch [01] .* its receives are not in the order of the sends"):
        simulate(schedule, (sender, (second, first, *computes)), uniform_costs(num_stages=2), sends=sends)


@pytest.mark.parametrize("sends", WITHOUT_WAITING)
@pytest.mark.parametrize("P", [2, 3, 4, 6])
def test_split_backwards_fill_the_bubble(P, sends):
    M = 2 * P
    schedule = zero_bubble(P, M)
    found = run(schedule, uniform_costs(num_stages=P), sends=sends)
    check_dependencies(schedule, found.timelines, 0)
    # Forward, gradient of the input and of the weights take one unit each: two thirds of the bubble of 1f1b are filled.
    assert found.makespan == 3 * M + P - 1
    assert run(build("1f1b", P, M)).makespan == 3 * (M + P - 1)


def test_halves_of_a_backward_have_their_share_of_its_cost():
    costs = Costs((1.0,), (8.0,), weight_share=0.25)
    assert [costs.of(kind, 0) for kind in Kind] == [1, 8, 6, 2]


def test_an_evaluation_holds_nothing_and_activations_have_bytes():
    assert run(build("forward only", 3, 5), activation_bytes=[5, 6, 7]).peak_activations == (0, 0, 0)
    found = run(build("1f1b", 3, 5), activation_bytes=[5, 6, 7])
    assert (found.peak_activations, found.peak_activation_bytes) == ((3, 2, 1), (15, 12, 7))


@pytest.mark.parametrize(
    ("costs", "message"),
    [
        (((1, 0), (1, 1), 0), "the forward of a virtual stage costs 0, but a cost must be finite and above 0; correct it."),
        (((1, 1), (1, float("nan")), 0), "the backward of a virtual stage costs nan, but a cost must be finite and above 0; correct it."),
        (((1, 1), (1, 1), -1), "the communication costs -1, but it must be finite and not negative; correct it."),
        (((1, 1, 1), (1, 1), 0), "costs of 3 forwards and 2 backwards were given for 2 virtual stages; give one of each for every virtual stage."),
    ],
)
def test_costs_that_are_none_are_refused(costs, message):
    with pytest.raises(ConfigError) as raised:
        run(build("1f1b", 2, 2), Costs(*costs))
    assert str(raised.value) == message
