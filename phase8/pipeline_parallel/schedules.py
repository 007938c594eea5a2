"""Pipeline schedules as data: which action each stage takes next.

The layers are cut into P x V virtual stages; virtual stage c * P + s is chunk c of stage s. A schedule is, for each stage, a sequence of
actions (forward or backward of one microbatch through one chunk). Nothing here communicates: `lowering.py` adds the sends and receives.
A stage that may not yet go on waits, so a schedule fixes the order and the clock follows. With every action one clock long, 3' the backward
of microbatch 3, and b the second chunk of a stage:

    gpipe, 3 stages, 4 microbatches: all forwards, then all backwards.

        clock    0   1   2   3   4   5   6   7   8   9  10  11
        stage 0  0   1   2   3   .   .   .   .   0'  1'  2'  3'
        stage 1  .   0   1   2   3   .   .   0'  1'  2'  3'  .
        stage 2  .   .   0   1   2   3   0'  1'  2'  3'  .   .

    1f1b, 3 stages, 4 microbatches: the same bubble; stage s holds the activations of P - s microbatches instead of all.

        clock    0   1   2   3   4   5   6   7   8   9  10  11
        stage 0  0   1   2   .   .   0'  3   1'  .   2'  .   3'
        stage 1  .   0   1   .   0'  2   1'  3   2'  .   3'  .
        stage 2  .   .   0   0'  1   1'  2   2'  3   3'  .   .

    interleaved, 2 stages of 2 chunks, 4 microbatches: a chunk is half a stage, so a clock is half as long, and with it the bubble.

        clock    0   1   2   3   4   5   6   7   8   9  10  11  12  13  14  15  16  17
        stage 0  0   1   0b  1b  2   0b' 3   1b' 2b  0'  3b  1'  .   2b' .   3b' 2'  3'
        stage 1  .   0   1   0b  0b' 1b  1b' 2   0'  3   1'  2b  2b' 3b  3b' 2'  3'  .

Every schedule takes the backwards of a chunk in the order of the microbatches, so gradients are summed in one order whichever is chosen.
Fewer microbatches than stages are allowed with gpipe and 1f1b; the pipeline then is never full, and the formulas below still hold.

Source: GPipe, Huang et al. 2019; 1f1b, Narayanan et al. 2019 (PipeDream) with a flush; interleaved, Narayanan et al. 2021.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum

from phase8.config.pipeline import needs_chunks_and_groups, needs_one_chunk
from phase8.errors import ConfigError


class Kind(StrEnum):
    """The kind of an action.

    BACKWARD is the whole backward. A schedule may split it into the gradient of the input, which the previous stage waits for, and later that of
    the weights, which no stage waits for; activations are kept until then.
    """

    FORWARD = "forward"
    BACKWARD = "backward"
    BACKWARD_INPUT = "backward_input"
    BACKWARD_WEIGHT = "backward_weight"


@dataclass(frozen=True, slots=True)
class Action:
    """One computation of a stage.

    Args:
        kind: What is computed.
        microbatch: Which microbatch goes through.
        chunk: Which of the stage's chunks it goes through.
    """

    kind: Kind
    microbatch: int
    chunk: int = 0


@dataclass(frozen=True)
class Schedule:
    """The actions of all stages.

    Args:
        num_stages: P.
        num_microbatches: M.
        num_chunks: V, chunks per stage.
        actions: Actions of each stage, in order.
    """

    num_stages: int
    num_microbatches: int
    num_chunks: int
    actions: tuple[tuple[Action, ...], ...]


@dataclass(frozen=True)
class Rules:
    """The rules of a schedule. All are functions of P, M and V, the last two also of the stage.

    Args:
        requirement: Why the numbers do not fit the schedule, in a sentence; None: they do.
        bubble_ratio: Idle share of the time of all stages, with equal costs everywhere and free communication.
        peak_activations: Most activations a stage holds at once; the unit is one microbatch in one chunk.
        actions: Actions of a stage, in order.
    """

    requirement: Callable[[int, int, int], str | None]
    bubble_ratio: Callable[[int, int, int], float]
    peak_activations: Callable[[int, int, int, int], int]
    actions: Callable[[int, int, int, int], tuple[Action, ...]]


def virtual_stage(stage: int, chunk: int, *, num_stages: int) -> int:
    """Position in the model of a chunk of a stage."""
    return chunk * num_stages + stage


def build_schedule(name: str, *, num_stages: int, num_microbatches: int, num_chunks: int = 1) -> Schedule:
    """Builds the schedule with this name.

    Args:
        name: A key of SCHEDULES.
        num_stages: P, parallel.pipeline_parallel_size.
        num_microbatches: M, parallel.num_microbatches.
        num_chunks: V, parallel.pipeline_chunks.

    Raises:
        ConfigError: There is no such schedule, or the numbers do not fit it.
    """
    rules = _rules(name)
    sizes = (num_stages, num_microbatches, num_chunks)
    _check_positive(*sizes)
    if sentence := rules.requirement(*sizes):
        raise ConfigError(sentence)
    return Schedule(*sizes, tuple(rules.actions(stage, *sizes) for stage in range(num_stages)))


def build_forward_only(*, num_stages: int, num_microbatches: int, num_chunks: int = 1) -> Schedule:
    """The schedule of an evaluation: forwards alone, for any number of microbatches.

    Raises:
        ConfigError: One of the numbers is below 1.
    """
    sizes = (num_stages, num_microbatches, num_chunks)
    _check_positive(*sizes)
    return Schedule(*sizes, (tuple(_forwards(*sizes)),) * num_stages)


def bubble_ratio(name: str, *, num_stages: int, num_microbatches: int, num_chunks: int = 1) -> float:
    """Idle share of the time of all stages by the schedule's formula: equal costs everywhere, free communication."""
    return _rules(name).bubble_ratio(num_stages, num_microbatches, num_chunks)


def peak_activations(name: str, stage: int, *, num_stages: int, num_microbatches: int, num_chunks: int = 1) -> int:
    """Most activations a stage holds at once by the schedule's formula, in units of one microbatch in one chunk."""
    return _rules(name).peak_activations(stage, num_stages, num_microbatches, num_chunks)


def peak_held(schedule: Schedule, stage: int, activation_bytes: Sequence[int] = ()) -> tuple[int, int]:
    """Most activations a stage holds at once, as a count and in bytes.

    Activations are held from the forward to the end of the whole backward, or of the weights' gradient; a forward of an evaluation, without
    backward, holds nothing.
    """
    actions = schedule.actions[stage]
    released = {(a.microbatch, a.chunk) for a in actions if a.kind in (Kind.BACKWARD, Kind.BACKWARD_WEIGHT)}
    count = size = peak_count = peak_size = 0
    for action in actions:
        if action.kind is Kind.BACKWARD_INPUT or (action.microbatch, action.chunk) not in released:
            continue
        step = 1 if action.kind is Kind.FORWARD else -1
        count += step
        size += step * (activation_bytes[virtual_stage(stage, action.chunk, num_stages=schedule.num_stages)] if activation_bytes else 0)
        peak_count, peak_size = max(peak_count, count), max(peak_size, size)
    return peak_count, peak_size


def gpipe(stage: int, P: int, M: int, V: int) -> tuple[Action, ...]:
    """All forwards, then all backwards."""
    return _one_forward_one_backward(P, M, V, num_warmup=M)


def one_f_one_b(stage: int, P: int, M: int, V: int) -> tuple[Action, ...]:
    """As many forwards as it takes to reach the last stage, then forwards and backwards in turn."""
    return _one_forward_one_backward(P, M, V, num_warmup=P - stage - 1)


def interleaved(stage: int, P: int, M: int, V: int) -> tuple[Action, ...]:
    """1f1b over P x V virtual stages, P microbatches at a time.

    Until the first gradient comes back to stage s, the first P microbatches go through all its chunks but the last, (V - 1) * P forwards;
    the first of them goes on through the last chunk and P - 1 - s stages and back through as many, 2 * (P - 1 - s) more.
    """
    return _one_forward_one_backward(P, M, V, num_warmup=2 * (P - 1 - stage) + (V - 1) * P)


def _forwards(P: int, M: int, V: int) -> Iterator[Action]:
    """Groups of P microbatches, each through one chunk after the other; with one chunk simply all in order.

    All stages have the same order, and what a chunk needs comes earlier in it: it can not deadlock.
    """
    for first in range(0, M, P):
        for chunk in range(V):
            for microbatch in range(first, min(first + P, M)):
                yield Action(Kind.FORWARD, microbatch, chunk)


def _one_forward_one_backward(P: int, M: int, V: int, *, num_warmup: int) -> tuple[Action, ...]:
    """The warm-up's forwards, then one forward and one backward in turn, then the backwards that remain."""
    forwards = list(_forwards(P, M, V))
    backwards = [Action(Kind.BACKWARD, action.microbatch, V - 1 - action.chunk) for action in forwards]
    num_pairs = max(len(forwards) - num_warmup, 0)
    num_warmup = len(forwards) - num_pairs
    pairs = [action for pair in zip(forwards[num_warmup:], backwards[:num_pairs], strict=True) for action in pair]
    return (*forwards[:num_warmup], *pairs, *backwards[num_pairs:])


def _bubble_ratio(P: int, M: int, V: int) -> float:
    """Each stage works V * M times and waits P - 1 times for one forward and one backward of a chunk."""
    return (P - 1) / (V * M + P - 1)


SCHEDULES: dict[str, Rules] = {
    "gpipe": Rules(
        requirement=needs_one_chunk,
        bubble_ratio=_bubble_ratio,
        peak_activations=lambda stage, P, M, V: M,
        actions=gpipe,
    ),
    "1f1b": Rules(
        requirement=needs_one_chunk,
        bubble_ratio=_bubble_ratio,
        peak_activations=lambda stage, P, M, V: min(M, P - stage),
        actions=one_f_one_b,
    ),
    "interleaved": Rules(
        requirement=needs_chunks_and_groups,
        bubble_ratio=_bubble_ratio,
        # The warm-up and the forward that follows it.
        peak_activations=lambda stage, P, M, V: min(V * M, 2 * (P - 1 - stage) + (V - 1) * P + 1),
        actions=interleaved,
    ),
}


def _rules(name: str) -> Rules:
    if name not in SCHEDULES:
        raise ConfigError(f"parallel.pipeline_schedule is {name!r}, but it must be one of {', '.join(SCHEDULES)}.")
    return SCHEDULES[name]


def _check_positive(num_stages: int, num_microbatches: int, num_chunks: int) -> None:
    keys: Sequence[tuple[str, int]] = (
        ("parallel.pipeline_parallel_size", num_stages),
        ("parallel.num_microbatches", num_microbatches),
        ("parallel.pipeline_chunks", num_chunks),
    )
    for key, value in keys:
        if value < 1:
            raise ConfigError(f"{key} is {value}, but at least 1 is needed.")
