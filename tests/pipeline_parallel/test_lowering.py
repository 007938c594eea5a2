"""Programs: what is sent is received, in the order of the sends, before it is needed and not earlier than asked."""

from collections import defaultdict

import pytest

from phase8.errors import ConfigError
from phase8.pipeline_parallel.lowering import Channel, Compute, Payload, Receive, Send, channels_of, lower
from phase8.pipeline_parallel.schedules import Action, Kind, Schedule, build_forward_only, build_schedule

SIZES = [
    *((name, P, M, 1) for name in ("gpipe", "1f1b", "forward only") for P in (1, 2, 3, 5) for M in (1, 2, 4, 7)),
    *((name, P, groups * P, V) for name in ("interleaved", "forward only") for P in (1, 2, 3, 4) for groups in (1, 2, 3) for V in (2, 3)),
    ("forward only", 4, 7, 2),
]


def build(name, P, M, V):
    sizes = {"num_stages": P, "num_microbatches": M, "num_chunks": V}
    return build_forward_only(**sizes) if name == "forward only" else build_schedule(name, **sizes)


def split_backward():
    """Two stages, two microbatches, the gradients of the weights last."""
    order = [(Kind.FORWARD, 0), (Kind.FORWARD, 1), (Kind.BACKWARD_INPUT, 0), (Kind.BACKWARD_INPUT, 1), (Kind.BACKWARD_WEIGHT, 0)]
    return Schedule(2, 2, 1, (tuple(Action(kind, m) for kind, m in [*order, (Kind.BACKWARD_WEIGHT, 1)]),) * 2)


@pytest.mark.parametrize("receives_ahead", [0, 1, 3])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_each_channel_receives_what_is_sent_in_the_same_order(size, receives_ahead):
    P = size[1]
    sent, received = defaultdict(list), defaultdict(list)
    for stage, program in enumerate(lower(build(*size), receives_ahead=receives_ahead)):
        for instruction in program:
            if isinstance(instruction, Send):
                step = {Payload.ACTIVATION: 1, Payload.GRADIENT: -1}[instruction.payload]
                position = instruction.chunk * P + stage + step
                assert position % P == instruction.peer != stage
                sent[stage, instruction.peer, instruction.payload].append((instruction.microbatch, position))
            elif isinstance(instruction, Receive):
                position = instruction.chunk * P + stage
                received[instruction.peer, stage, instruction.payload].append((instruction.microbatch, position))
    assert sent == received


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_each_stage_sends_right_after_and_receives_right_before_all_that_crosses_stages(size):
    _, P, M, V = size
    schedule = build(*size)
    last = P * V - 1
    for stage, program in enumerate(lower(schedule)):
        assert [i.action for i in program if isinstance(i, Compute)] == list(schedule.actions[stage])
        for index, instruction in enumerate(program):
            if not isinstance(instruction, Compute):
                continue
            action = instruction.action
            position, is_forward = action.chunk * P + stage, action.kind is Kind.FORWARD
            payload = Payload.ACTIVATION if is_forward else Payload.GRADIENT
            ahead, behind = (stage - 1) % P, (stage + 1) % P
            source, destination = (ahead, behind) if is_forward else (behind, ahead)
            comes_in, goes_out = (position > 0, position < last) if is_forward else (position < last, position > 0)
            before, after = program[index - 1] if index else None, program[index + 1] if index + 1 < len(program) else None
            assert (before == Receive(payload, action.microbatch, action.chunk, source)) == (comes_in and P > 1)
            assert (after == Send(payload, action.microbatch, action.chunk, destination)) == (goes_out and P > 1)
    counts = [sum(isinstance(i, kind) for program in lower(schedule) for i in program) for kind in (Send, Receive)]
    directions = 1 if size[0] == "forward only" else 2
    assert counts == [directions * M * (P * V - 1) if P > 1 else 0] * 2


@pytest.mark.parametrize("receives_ahead", [1, 2, 5])
def test_receives_are_posted_so_many_actions_ahead(receives_ahead):
    schedule = build("interleaved", 3, 6, 2)
    for stage, program in enumerate(lower(schedule, receives_ahead=receives_ahead)):
        computed = 0
        for instruction in program:
            if isinstance(instruction, Compute):
                computed += 1
            elif isinstance(instruction, Receive):
                kind = Kind.FORWARD if instruction.payload is Payload.ACTIVATION else Kind.BACKWARD
                consumer = schedule.actions[stage].index(Action(kind, instruction.microbatch, instruction.chunk))
                assert computed == max(consumer - receives_ahead, 0)


def test_a_stage_that_needs_messages_in_another_order_still_receives_them_in_the_order_of_the_sends():
    in_order, reversed_order = (tuple(Action(Kind.FORWARD, m) for m in order) for order in ((0, 1, 2), (1, 0, 2)))
    receiver = lower(Schedule(2, 3, 1, (in_order, reversed_order)))[1]
    receive = [Receive(Payload.ACTIVATION, m, 0, 0) for m in range(3)]
    compute = [Compute(action) for action in in_order]
    assert receiver == (receive[0], receive[1], compute[1], compute[0], receive[2], compute[2])


def test_gradients_leave_after_the_input_half_of_a_split_backward():
    first, second = lower(split_backward())
    gradients = [second[index - 1] for index, i in enumerate(second) if isinstance(i, Send)]
    assert gradients == [Compute(Action(Kind.BACKWARD_INPUT, m)) for m in range(2)]
    consumers = [first[index + 1] for index, i in enumerate(first) if isinstance(i, Receive)]
    assert consumers == gradients


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        (("1f1b", 1, 3, 1), 0),
        (("interleaved", 1, 3, 3), 0),
        (("gpipe", 4, 3, 1), 2 * 3),
        (("interleaved", 4, 4, 2), 2 * 4),
        (("interleaved", 2, 4, 2), 4),
        (("forward only", 2, 4, 2), 2),
    ],
)
def test_channels_are_one_way_between_neighbours(size, expected):
    channels = channels_of(lower(build(*size)))
    assert len(channels) == len(set(channels)) == expected and list(channels) == sorted(channels)
    for source, destination, payload in channels:
        assert destination == (source + (1 if payload is Payload.ACTIVATION else -1)) % size[1]


def test_two_stages_of_two_chunks_have_four_channels():
    both = [(0, 1), (1, 0)]
    expected = {Channel(*ends, payload) for ends in both for payload in Payload}
    assert set(channels_of(lower(build("interleaved", 2, 2, 2)))) == expected


def test_a_message_that_nobody_sends_is_an_error():
    sender, receiver = (Action(Kind.FORWARD, 0),), (Action(Kind.FORWARD, 0), Action(Kind.FORWARD, 1))
    with pytest.raises(ConfigError, match=r"^stage 1 needs the activation of microbatch 1 for its chunk 0 from stage 0, which never sends it"):
        lower(Schedule(2, 2, 1, (sender, receiver)))
