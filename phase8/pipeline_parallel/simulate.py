"""Simulates a pipeline step: when each stage computes and waits, what it holds, and whether the programs can finish at all.

The simulator runs the programs of `lowering.py` as the engine does, one instruction after the other on each stage, with a cost for each
action and a latency for each message. Messages of a channel are told apart by their order alone, as in a communicator: a receive that would
get another message than it was meant for is an error. Three kinds of send:

    BUFFERED     arrives a latency after it was started, whether or not the receive is posted: an unlimited buffer
    RENDEZVOUS   the transfer begins when both send and receive are posted; the sender goes on and waits at the flush only: NCCL on a stream
    BLOCKING     as rendezvous, but the sender goes on when the transfer is complete; 1f1b then deadlocks, and nothing here uses it
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from phase8.errors import ConfigError
from phase8.pipeline_parallel.lowering import Channel, Instruction, Payload, Program, Receive, Send, input_of, matching_receive
from phase8.pipeline_parallel.schedules import Action, Kind, Schedule, peak_held, virtual_stage


class SendMode(StrEnum):
    """Duration of a send, see the head of the file."""

    BUFFERED = "buffered"
    RENDEZVOUS = "rendezvous"
    BLOCKING = "blocking"


@dataclass(frozen=True)
class Costs:
    """Durations, in any one unit.

    Args:
        forward: Forward of one microbatch, for each virtual stage.
        backward: Whole backward of one microbatch, for each virtual stage.
        communication: Time from the start of a transfer to its arrival.
        weight_share: Share of a backward that is the gradient of the weights, for schedules that separate it.
    """

    forward: tuple[float, ...]
    backward: tuple[float, ...]
    communication: float = 0.0
    weight_share: float = 0.5

    def __post_init__(self) -> None:
        for name, cost in [("forward", c) for c in self.forward] + [("backward", c) for c in self.backward]:
            if not 0 < cost < math.inf:
                raise ConfigError(f"the {name} of a virtual stage costs {cost}, but a cost must be finite and above 0; correct it.")
        if not 0 <= self.communication < math.inf:
            raise ConfigError(f"the communication costs {self.communication}, but it must be finite and not negative; correct it.")

    def of(self, kind: Kind, position: int) -> float:
        """Duration of an action of a virtual stage."""
        if kind is Kind.FORWARD:
            return self.forward[position]
        share = {Kind.BACKWARD: 1.0, Kind.BACKWARD_INPUT: 1.0 - self.weight_share, Kind.BACKWARD_WEIGHT: self.weight_share}[kind]
        return share * self.backward[position]


@dataclass(frozen=True, slots=True)
class Interval:
    """An action with its times."""

    start: float
    end: float
    action: Action


@dataclass(frozen=True)
class Simulation:
    """The simulated step.

    Args:
        timelines: The actions of each stage.
        makespan: Duration of the step.
        bubble_ratio: Idle share of the time of all stages.
        peak_activations: Most activations each stage holds at once; the unit is one microbatch in one chunk.
        peak_activation_bytes: The same in bytes, by `activation_bytes`; 0 without it.
    """

    timelines: tuple[tuple[Interval, ...], ...]
    makespan: float
    bubble_ratio: float
    peak_activations: tuple[int, ...]
    peak_activation_bytes: tuple[int, ...]

    def idle_ratio(self, stage: int) -> float:
        """Idle share of one stage's time."""
        return 1 - sum(interval.end - interval.start for interval in self.timelines[stage]) / self.makespan


def uniform_costs(*, num_stages: int, num_chunks: int = 1, forward: float = 1.0, backward: float = 2.0, communication: float = 0.0) -> Costs:
    """Costs of equal stages: `forward` and `backward` are those of a whole stage, of which each chunk has its share."""
    num_positions = num_stages * num_chunks
    return Costs((forward / num_chunks,) * num_positions, (backward / num_chunks,) * num_positions, communication)


def simulate(
    schedule: Schedule,
    programs: Sequence[Program],
    costs: Costs,
    *,
    sends: SendMode = SendMode.RENDEZVOUS,
    activation_bytes: Sequence[int] = (),
) -> Simulation:
    """Runs the programs of all stages.

    Args:
        schedule: Schedule from which the programs were lowered.
        programs: Program of each stage.
        costs: Durations, for each virtual stage.
        sends: How long a send takes.
        activation_bytes: Bytes that one microbatch keeps in each virtual stage from its forward to its backward.

    Raises:
        ConfigError: The programs deadlock, or a receive gets a message meant for another.
    """
    num_positions = schedule.num_stages * schedule.num_chunks
    if not len(costs.forward) == len(costs.backward) == num_positions:
        raise ConfigError(
            f"costs of {len(costs.forward)} forwards and {len(costs.backward)} backwards were given for {num_positions} virtual stages; "
            "give one of each for every virtual stage."
        )
    run = _Run(schedule, costs, sends)
    stages = [_Stage(index, program) for index, program in enumerate(programs)]
    while any([run.advance(stage) for stage in stages]):
        pass
    _check_finished(stages, sends)
    timelines = tuple(tuple(stage.timeline) for stage in stages)
    makespan = max(stage.clock for stage in stages)
    busy = sum(interval.end - interval.start for timeline in timelines for interval in timeline)
    counts, sizes = zip(*(peak_held(schedule, stage, activation_bytes) for stage in range(schedule.num_stages)), strict=True)
    return Simulation(timelines, makespan, 1 - busy / (len(stages) * makespan), counts, sizes)


# The results that each kind of action needs, and the distance in virtual stages of the stage that computes them.
_INPUTS: dict[Kind, tuple[tuple[Payload, int], ...]] = {
    Kind.FORWARD: ((Payload.ACTIVATION, -1),),
    Kind.BACKWARD: ((Payload.ACTIVATION, 0), (Payload.GRADIENT, 1)),
    Kind.BACKWARD_INPUT: ((Payload.ACTIVATION, 0), (Payload.GRADIENT, 1)),
    Kind.BACKWARD_WEIGHT: ((Payload.GRADIENT, 0),),
}
_Result = tuple[Payload, int, int]  # a result kept on its stage: activation or gradient, microbatch, virtual stage
_Wait = tuple[str, int]  # what a stage waits for, and the stage that must act


@dataclass
class _Link:
    """A channel: messages sent and receives posted, both in order, with their times."""

    channel: Channel
    sent: list[tuple[Receive, float]] = field(default_factory=list)
    posted: list[tuple[Receive, float]] = field(default_factory=list)


@dataclass
class _Stage:
    """A program with its position and time."""

    index: int
    program: Program
    position: int = 0
    clock: float = 0.0
    timeline: list[Interval] = field(default_factory=list)
    results: set[_Result] = field(default_factory=set)
    posted: dict[Receive, tuple[_Link, int]] = field(default_factory=dict)  # place of an expected message: link, position in it
    sends: list[tuple[_Link, int]] = field(default_factory=list)  # places of its own messages
    wait: _Wait | None = None  # why it is blocked


class _Run:
    """The channels of a step, and the rules by which stages proceed."""

    def __init__(self, schedule: Schedule, costs: Costs, sends: SendMode):
        self.schedule, self.costs, self.sends = schedule, costs, sends
        self.links: dict[Channel, _Link] = {}

    def advance(self, stage: _Stage) -> bool:
        """Executes instructions until the stage must wait; True if there were any."""
        before = stage.position
        while stage.position < len(stage.program):
            stage.wait = self._step(stage, stage.program[stage.position])
            if stage.wait:
                return stage.position > before
            stage.position += 1
        stage.wait = self._flush(stage)
        return stage.position > before

    def arrival(self, link: _Link, index: int) -> float | None:
        """The time when a message can be used; None: not known yet."""
        sent = link.sent[index] if index < len(link.sent) else None
        posted = link.posted[index] if index < len(link.posted) else None
        if sent and posted and sent[0] != posted[0]:
            raise ConfigError(
                f"stage {link.channel.destination} would take {_message(sent[0])} from stage {link.channel.source} for {_message(posted[0])}, "
                "because its receives are not in the order of the sends; correct the lowering."
            )
        if sent is None or (posted is None and self.sends is not SendMode.BUFFERED):
            return None
        start = sent[1] if posted is None or self.sends is SendMode.BUFFERED else max(sent[1], posted[1])
        return start + self.costs.communication

    def _step(self, stage: _Stage, instruction: Instruction) -> _Wait | None:
        """Executes one instruction, or records why it must wait."""
        if isinstance(instruction, Receive):
            link = self._link(Channel(instruction.peer, stage.index, instruction.payload))
            stage.posted[instruction] = (link, len(link.posted))
            link.posted.append((instruction, stage.clock))
            return None
        if isinstance(instruction, Send):
            return self._send(stage, instruction)
        return self._compute(stage, instruction.action)

    def _send(self, stage: _Stage, send: Send) -> _Wait | None:
        if not stage.wait:
            link = self._link(Channel(stage.index, send.peer, send.payload))
            stage.sends.append((link, len(link.sent)))
            link.sent.append((matching_receive(send, stage.index, num_stages=self.schedule.num_stages), stage.clock))
        if self.sends is SendMode.BLOCKING:
            arrival = self.arrival(*stage.sends[-1])
            if arrival is None:
                return _sending(*stage.sends[-1])
            stage.clock = arrival
        return None

    def _compute(self, stage: _Stage, action: Action) -> _Wait | None:
        start = stage.clock
        if receive := input_of(action, stage.index, self.schedule):
            arrival = self.arrival(*stage.posted[receive]) if receive in stage.posted else None
            if arrival is None:
                return f"for {_message(receive)} from stage {receive.peer}", receive.peer
            start = max(start, arrival)
        position = virtual_stage(stage.index, action.chunk, num_stages=self.schedule.num_stages)
        for missing in self._local_inputs(action, position) - stage.results:
            return "for the {} of microbatch {} of virtual stage {}, its own, which comes later or never".format(*missing), stage.index
        stage.clock = start + self.costs.of(action.kind, position)
        stage.timeline.append(Interval(start, stage.clock, action))
        if action.kind is not Kind.BACKWARD_WEIGHT:
            stage.results.add((Payload.ACTIVATION if action.kind is Kind.FORWARD else Payload.GRADIENT, action.microbatch, position))
        return None

    def _local_inputs(self, action: Action, position: int) -> set[_Result]:
        """The inputs that an action takes from its own stage; on a single stage, including those that are messages elsewhere."""
        P, V = self.schedule.num_stages, self.schedule.num_chunks
        needed = [(payload, action.microbatch, position + step) for payload, step in _INPUTS[action.kind]]
        return {result for result in needed if 0 <= result[2] < P * V and (P == 1 or result[2] == position)}

    def _flush(self, stage: _Stage) -> _Wait | None:
        """Waits for all sends."""
        if self.sends is SendMode.BUFFERED:
            return None
        return next((_sending(*sent) for sent in stage.sends if self.arrival(*sent) is None), None)

    def _link(self, channel: Channel) -> _Link:
        return self.links.setdefault(channel, _Link(channel))


def _message(receive: Receive) -> str:
    return f"the {receive.payload} of microbatch {receive.microbatch} for chunk {receive.chunk}"


def _sending(link: _Link, index: int) -> _Wait:
    return f"to send {_message(link.sent[index][0])} to stage {link.channel.destination}", link.channel.destination


def _check_finished(stages: Sequence[_Stage], sends: SendMode) -> None:
    """Raises an error that names who waits for whom: around the cycle, or up to a stage that has finished."""
    chain: list[int] = []
    following = next((stage.index for stage in stages if stage.wait), None)
    while following is not None and following not in chain:
        chain.append(following)
        wait = stages[following].wait
        following = wait[1] if wait else None
    if chain:
        named = chain if following is None else chain[chain.index(following) :]
        said = [f"stage {index} waits {wait[0]}" if (wait := stages[index].wait) else f"stage {index} has finished" for index in named]
        raise ConfigError(f"the pipeline deadlocks with {sends} sends: {'; '.join(said)}; correct the schedule.")
