"""Lowers a schedule to programs by adding the communication between the actions.

    virtual stage      0 (stage 0)      1 (stage 1)   ...   P - 1 (last)      P (stage 0, chunk 1)  ...
    activations             --------------->        ------------>    -------------->
    gradients               <---------------        <------------    <--------------

A stage runs its program from top to bottom:

    Receive   posts the receive of a message; it does not wait.
    Compute   waits for the message that the action consumes, then computes.
    Send      hands the action's result to the channel; it does not wait. All sends are awaited together at the end of the program, the flush.

With `receives_ahead=0` every Receive stands directly before the Compute that waits for it, so that an engine whose receives block may run
the program as well. Sends that block, one by one in this order, deadlock 1f1b (shown in the tests of `simulate.py`).

Messages between two stages carry no label: the first message to arrive on a channel belongs to the receive posted first. The order is right by
construction, for whatever schedule: a program takes its receives from the list of the sends of that channel, in the order of that list, up
to the one it needs. Receiving in this order cannot add a deadlock, for what is taken early was sent before what is needed.

A channel joins two neighbours in one direction for one payload. For more than two stages each pair of neighbours has two of them, one per
direction. Two stages of several chunks are each other's neighbour on both sides and have four, each to be a communicator of its own: the
order is only kept within a channel. A single stage has none, its chunks hand over in place.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

from phase8.errors import ConfigError
from phase8.pipeline_parallel.schedules import Action, Kind, Schedule, virtual_stage


class Payload(StrEnum):
    """The kind of a message: the output of a chunk, or the gradient of its input."""

    ACTIVATION = "activation"
    GRADIENT = "gradient"


@dataclass(frozen=True, slots=True)
class Receive:
    """Posts a receive.

    Args:
        payload: Kind of message.
        microbatch: Microbatch of the message.
        chunk: The receiver's chunk that consumes it.
        peer: Stage it comes from.
    """

    payload: Payload
    microbatch: int
    chunk: int
    peer: int


@dataclass(frozen=True, slots=True)
class Send:
    """Starts a send.

    Args:
        payload: Kind of message.
        microbatch: Microbatch of the message.
        chunk: The sender's chunk that produced it.
        peer: Stage it goes to.
    """

    payload: Payload
    microbatch: int
    chunk: int
    peer: int


@dataclass(frozen=True, slots=True)
class Compute:
    """Executes an action.

    Args:
        action: The action of the schedule.
    """

    action: Action


Instruction = Receive | Send | Compute
Program = tuple[Instruction, ...]


class Channel(NamedTuple):
    """A one-way connection, which keeps the order of its messages.

    Args:
        source: Stage that sends.
        destination: Stage that receives.
        payload: Kind of messages.
    """

    source: int
    destination: int
    payload: Payload


def lower(schedule: Schedule, *, receives_ahead: int = 0) -> tuple[Program, ...]:
    """Lowers a schedule to one program per stage.

    Args:
        schedule: A schedule of training or of evaluation.
        receives_ahead: Number of actions by which a receive is posted before its consumer, to hide the transfer; each costs a buffer.

    Raises:
        ConfigError: A stage needs a message that no stage sends.
    """
    sent: dict[Channel, deque[Receive]] = {}
    for stage, actions in enumerate(schedule.actions):
        for send in filter(None, (output_of(action, stage, schedule) for action in actions)):
            receive = matching_receive(send, stage, num_stages=schedule.num_stages)
            sent.setdefault(Channel(stage, send.peer, send.payload), deque()).append(receive)
    return tuple(_program(stage, schedule, sent, receives_ahead) for stage in range(schedule.num_stages))


def channels_of(programs: Sequence[Program]) -> tuple[Channel, ...]:
    """Every channel of the programs, in one order, in which all ranks can create their communicators."""
    found = {Channel(stage, i.peer, i.payload) for stage, program in enumerate(programs) for i in program if isinstance(i, Send)}
    return tuple(sorted(found))


def input_of(action: Action, stage: int, schedule: Schedule) -> Receive | None:
    """The message that an action consumes; None: its input comes from its own stage."""
    P, position = schedule.num_stages, virtual_stage(stage, action.chunk, num_stages=schedule.num_stages)
    if P == 1:
        return None
    if action.kind is Kind.FORWARD and position > 0:
        return Receive(Payload.ACTIVATION, action.microbatch, action.chunk, (stage - 1) % P)
    if action.kind in (Kind.BACKWARD, Kind.BACKWARD_INPUT) and position < P * schedule.num_chunks - 1:
        return Receive(Payload.GRADIENT, action.microbatch, action.chunk, (stage + 1) % P)
    return None


def output_of(action: Action, stage: int, schedule: Schedule) -> Send | None:
    """The message that an action produces; None: no other stage needs its result."""
    P, position = schedule.num_stages, virtual_stage(stage, action.chunk, num_stages=schedule.num_stages)
    if P == 1:
        return None
    if action.kind is Kind.FORWARD and position < P * schedule.num_chunks - 1:
        return Send(Payload.ACTIVATION, action.microbatch, action.chunk, (stage + 1) % P)
    if action.kind in (Kind.BACKWARD, Kind.BACKWARD_INPUT) and position > 0:
        return Send(Payload.GRADIENT, action.microbatch, action.chunk, (stage - 1) % P)
    return None


def matching_receive(send: Send, stage: int, *, num_stages: int) -> Receive:
    """The receive for a send of `stage`: activations go to the next virtual stage, gradients to the previous one."""
    step = 1 if send.payload is Payload.ACTIVATION else -1
    consumer = virtual_stage(stage, send.chunk, num_stages=num_stages) + step
    return Receive(send.payload, send.microbatch, consumer // num_stages, stage)


def _program(stage: int, schedule: Schedule, sent: Mapping[Channel, deque[Receive]], receives_ahead: int) -> Program:
    actions = schedule.actions[stage]
    needed = [input_of(action, stage, schedule) for action in actions]
    program: list[Instruction] = []
    posted: set[Receive] = set()
    first = 0
    for index, action in enumerate(actions):
        for receive in filter(None, needed[first : index + receives_ahead + 1]):
            program += _receives_until(receive, stage, sent, posted)
        first = index + receives_ahead + 1
        program.append(Compute(action))
        if send := output_of(action, stage, schedule):
            program.append(send)
    return tuple(program)


def _receives_until(receive: Receive, stage: int, sent: Mapping[Channel, deque[Receive]], posted: set[Receive]) -> list[Receive]:
    """The receives to be posted before a message can arrive: none, or those for all earlier sends of its channel and its own."""
    waiting, taken = sent.get(Channel(receive.peer, stage, receive.payload), deque()), []
    while receive not in posted:
        if not waiting:
            raise ConfigError(
                f"stage {stage} needs the {receive.payload} of microbatch {receive.microbatch} for its chunk {receive.chunk} from stage "
                f"{receive.peer}, which never sends it; correct the schedule."
            )
        taken.append(waiting.popleft())
        posted.add(taken[-1])
    return taken
