"""The dry run of a config: topology, parameters, FLOPs, memory, batch and problems, without training."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import cache, partial

from rich.console import Console

from phase8 import accelerator
from phase8.config.batch import batch_shape, run_topology
from phase8.config.schema import RunConfig
from phase8.config.validate import MODEL_SECTIONS, find_problems, refuse_problems
from phase8.config.without_effect import facts_without_effect
from phase8.data.fitting_tokenizer import load_fitting_tokenizer
from phase8.errors import ConfigError, OutOfMemoryError, TopologyError
from phase8.observe.banner import print_banner
from phase8.plan.cost_facts import Fact, batch_fact, communication_fact, memory_facts, model_facts, speed_fact
from phase8.plan.missing_inputs import missing_inputs
from phase8.plan.optimizer_work import optimizer_fact
from phase8.plan.prediction import ASSUMED_GPU, StepPrediction, predict_step
from phase8.plan.rank_memory import StageMemory
from phase8.plan.run_communication import plan_run_communication
from phase8.plan.settle import lacking_room, own_gpu, planned_gpu, settle
from phase8.plan.whole_config import num_parameters, plan_stages

_Plan = tuple[Sequence[StageMemory], str | None]


def dry_run(config: RunConfig, *, world_size: int, console: Console) -> None:
    """Prints what a config would do and cost on `world_size` processes, and which of the paths that it reads lead to nothing on this machine.

    Raises:
        ConfigError: The config cannot run; raised after everything that can be printed has been.
        OutOfMemoryError: No settings fit into the memory of the GPU; raised after everything, too.
        DataError: The tokenizer is here, and cannot be used or has more ids than the model; raised after everything, too.
    """
    problems = find_problems(config, world_size=world_size)
    facts, ineffective = list[Fact](), list[Fact]()
    too_large = None
    if not problems:
        ineffective = facts_without_effect(config)
        settled = settle(config, world_size=world_size)
        config, too_large = settled.config, settled.too_large
        facts += [] if settled.chosen is None else [("settings", settled.chosen)]
    # Each part is printed if the config allows it: a topology that does not fit must not hide the size of the model.
    plan = cache(partial(_planned, config, world_size))
    memory = partial(_memory_facts, plan=plan, tells_room=too_large is None)  # otherwise the sentence about that ends the dry run
    predict = cache(partial(_predicted, config, world_size, plan=plan, has_room=too_large is None))
    optimizer, speed = (partial(each, predict=predict) for each in (_optimizer_facts, _speed_facts))
    for describe in (_topology_facts, _batch_facts, _model_facts, optimizer, memory, _communication_facts, speed):
        try:
            facts += describe(config, world_size)
        except TopologyError:  # it is among the problems, with the world sizes that suit the rest of the config
            continue
        except ConfigError as error:
            problems += [problem for problem in error.problems if problem not in problems]
    missing = missing_inputs(config.data, initialise_from=config.checkpoint.initialise_from)
    facts += [*ineffective, *(("missing here", sentence) for sentence in missing)]
    print_banner(f"dry run: {config.run.name}, world size {world_size}", facts, console)
    if problems:
        raise ConfigError(problems)
    if too_large is not None:
        raise OutOfMemoryError(too_large)
    _check_tokenizer(config)


def _check_tokenizer(config: RunConfig) -> None:
    data = config.data
    if data.train is not None and data.tokenizer is not None and os.path.exists(data.tokenizer):
        load_fitting_tokenizer(data.tokenizer, eod_token=data.eod_token, vocab_size=config.model.vocab_size)


def _topology_facts(config: RunConfig, world_size: int) -> list[Fact]:
    topology = run_topology(config.parallel, world_size=world_size)
    degrees = " x ".join(f"{axis} {degree}" for axis, degree in topology.degrees.items())
    experts = f", experts shared by {topology.expert_parallel_size}" if topology.expert_parallel_size > 1 else ""
    last = ", ".join(f"{axis} {position}" for axis, position in topology.coordinates(world_size - 1).items())
    return [("topology", f"{degrees} = {world_size} ranks{experts}; rank 0 is first on every axis, rank {world_size - 1} is {last}")]


def _batch_facts(config: RunConfig, world_size: int) -> list[Fact]:
    shape = batch_shape(config.train, config.parallel, data_parallel_size=run_topology(config.parallel, world_size=world_size).data_parallel_size)
    steps = config.train.num_steps
    num_tokens = steps * shape.global_batch_size * config.model.sequence_length
    return [batch_fact(shape, sequence_length=config.model.sequence_length), ("run", f"{steps:,} steps, {num_tokens:,} tokens")]


def _model_facts(config: RunConfig, world_size: int) -> list[Fact]:
    return model_facts(config.model, num_parameters=num_parameters(config))


def _planned(config: RunConfig, world_size: int) -> _Plan:
    """The plan of every stage, and the stages that need more than the GPU has, in words; None: there are none."""
    refuse_problems(config, about=MODEL_SECTIONS)
    device = planned_gpu(config)
    planned = plan_stages(config, world_size=world_size, device_type=accelerator.GPU, device_bytes=device.total_bytes)
    return planned, lacking_room(planned, device)


def _predicted(config: RunConfig, world_size: int, *, plan: Callable[[], _Plan], has_room: bool) -> StepPrediction | None:
    """The predicted step; None where it does not fit into the memory of the GPU, since it cannot run."""
    return predict_step(config, world_size, own_gpu() or ASSUMED_GPU) if has_room and plan()[1] is None else None


def _optimizer_facts(config: RunConfig, world_size: int, *, predict: Callable[[], StepPrediction | None]) -> list[Fact]:
    """The optimizer, with its predicted share of a step where the config can run; plain-torch references are not predicted."""
    refuse_problems(config, about=MODEL_SECTIONS)
    share = None
    if config.train.kernels != "reference" and not find_problems(config, world_size=world_size):
        predicted = predict()
        share = None if predicted is None else predicted.optimizer_seconds / predicted.seconds
    return [optimizer_fact(config.optim, config.zero, config.model, share=share)]


def _memory_facts(config: RunConfig, world_size: int, *, plan: Callable[[], _Plan], tells_room: bool) -> list[Fact]:
    planned, lacking = plan()
    is_told = tells_room and lacking is not None
    return memory_facts(planned) + ([("no room", f"{lacking}; `tools/plan.py check` names settings that fit")] if is_told else [])


def _communication_facts(config: RunConfig, world_size: int) -> list[Fact]:
    """Communication of the busiest stage (an upper bound for ranks of other stages and ranks with smaller parts)."""
    if world_size == 1:
        return []
    num_stages = config.parallel.pipeline_parallel_size
    ranks = range(0, world_size, max(world_size // num_stages, 1))
    plans = [plan_run_communication(config, world_size=world_size, rank=rank) for rank in ranks]
    return [communication_fact(*max(plans, key=lambda plan: sum(each.sent_bytes(plan[1].size(each.axis)) for each in plan[0])))]


def _speed_facts(config: RunConfig, world_size: int, *, predict: Callable[[], StepPrediction | None]) -> list[Fact]:
    """Predicted speed on this machine's GPU, or on an H100 if it has no known GPU. Plain-torch references are not predicted."""
    if config.train.kernels == "reference":
        return []
    own, predicted = own_gpu(), predict()
    if predicted is None:
        return [("predicted speed", "none, because the run does not fit into the memory of the GPU")]
    missing = "this machine has no GPU" if own is None else f"{own} is not known"
    return [
        speed_fact(
            tokens_per_second=predicted.tokens_per_second,
            mfu=predicted.mfu,
            run_seconds=predicted.seconds * config.train.num_steps,
            num_gpus=world_size,
            gpu=own if own is not None and predicted.is_known else f"{ASSUMED_GPU}, assumed because {missing}",
        )
    ]
