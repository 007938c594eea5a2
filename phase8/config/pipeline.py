"""The pipeline settings of a config, and the rules for them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from phase8.config.schema import ParallelSection


class Pipeline(NamedTuple):
    """The division of the layers into stages and chunks, and the schedule of the microbatches.

    Args:
        schedule: Name of the schedule.
        num_stages: P.
        num_chunks: V, chunks per stage.
    """

    schedule: str
    num_stages: int
    num_chunks: int


def pipeline_of(parallel: ParallelSection) -> Pipeline:
    """The pipeline of a config. With a single stage the model stays in one piece, so that the config also runs on a single rank."""
    if parallel.pipeline_parallel_size == 1:
        return Pipeline("1f1b", 1, 1)
    return Pipeline(parallel.pipeline_schedule, parallel.pipeline_parallel_size, parallel.pipeline_chunks)


def pipeline_problems(pipeline: Pipeline, *, num_layers: int, num_microbatches: int | None) -> Iterator[str]:
    """Why a model or a batch does not fit a pipeline, one sentence each.

    Args:
        pipeline: The pipeline settings.
        num_layers: Layers of the model.
        num_microbatches: M; None: unknown.
    """
    name, P, V = pipeline
    if problem := too_few_layers(num_layers, P, V):
        yield problem
    requirement = needs_chunks_and_groups if name == "interleaved" else needs_one_chunk
    if problem := requirement(P, P if num_microbatches is None else num_microbatches, V):
        yield problem


def too_few_layers(num_layers: int, P: int, V: int) -> str | None:
    """Why there are too few layers for the chunks, or None."""
    if num_layers >= P * V:
        return None
    return (
        f"model.num_layers {num_layers} is below parallel.pipeline_parallel_size {P} x parallel.pipeline_chunks {V} "
        f"= {P * V}; every chunk needs a layer: use at least {P * V} layers, or fewer stages or chunks."
    )


def needs_one_chunk(P: int, M: int, V: int) -> str | None:
    """The requirement of gpipe and 1f1b on P stages, M microbatches and V chunks."""
    if V == 1:
        return None
    return f"parallel.pipeline_chunks is {V}, but only the interleaved schedule has several chunks; set it to 1, or choose interleaved."


def needs_chunks_and_groups(P: int, M: int, V: int) -> str | None:
    """The requirement of interleaved on P stages, M microbatches and V chunks."""
    if V < 2:
        return f"parallel.pipeline_chunks is {V}, but the interleaved schedule needs at least 2; set it to 2 or more, or choose 1f1b."
    if M % P:
        nearest = f"{M // P * P} or {(M // P + 1) * P}" if M > P else f"{P}"
        return (
            f"parallel.num_microbatches {M} is not a multiple of parallel.pipeline_parallel_size {P}, as the interleaved schedule needs; "
            f"use {nearest} microbatches, or choose 1f1b."
        )
    return None
