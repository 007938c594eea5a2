"""Rules about mixtures of experts and the ranks that share experts."""

from __future__ import annotations

from collections.abc import Iterator

from phase8.config.batch import count_token_ranks
from phase8.config.model_section import ModelSection
from phase8.config.schema import RunConfig

# Numbers in bf16 that torch's grouped product reads at once.
ALIGNED_WIDTH = 8


def model_expert_problems(model: ModelSection) -> Iterator[str]:
    """The problems of a model's experts that do not depend on where it runs, one sentence each."""
    if model.ffn != "moe":
        return
    if model.top_k > model.num_experts:
        yield f"model.top_k {model.top_k} is above model.num_experts {model.num_experts}, but a token's experts all differ; choose at most as many."
    if model.capacity_factor is not None and model.capacity_factor < 1:
        yield (
            f"model.capacity_factor {model.capacity_factor} is below 1, so experts would drop tokens even where all get the same number; "
            "choose at least 1, or null for no limit."
        )
    if model.first_dense_layers >= model.num_layers:
        yield (
            f"model.first_dense_layers {model.first_dense_layers} leaves none of model.num_layers {model.num_layers} for experts; "
            "choose fewer, or set model.ffn to swiglu."
        )
    elif model.moe_every_n_layers > model.num_layers:
        yield (
            f"model.moe_every_n_layers {model.moe_every_n_layers} is above model.num_layers {model.num_layers}, so that of all layers only layer "
            f"{model.first_dense_layers} has experts; choose 1 for experts in every layer, or another distance of at most {model.num_layers}."
        )


def expert_problems(config: RunConfig, world_size: int) -> Iterator[str]:
    """The problems of experts on the ranks of a run, one sentence each."""
    model, parallel, num_ranks = config.model, config.parallel, config.parallel.expert_parallel_size
    if model.ffn != "moe":
        if num_ranks > 1:
            yield f"parallel.expert_parallel_size is {num_ranks}, but model.ffn is {model.ffn} and has no experts; set it to 1, or model.ffn to moe."
        return
    if model.num_experts % num_ranks:
        yield f"parallel.expert_parallel_size {num_ranks} does not divide model.num_experts {model.num_experts}; change one of them."
    if model.expert_width % parallel.tensor_parallel_size:
        origin = "" if model.expert_ffn_size is not None else " (null)"
        yield (
            f"parallel.tensor_parallel_size {parallel.tensor_parallel_size} does not divide model.expert_ffn_size{origin} {model.expert_width}; "
            "change one of them."
        )
    yield from _shards(config, world_size)
    yield from _graphs(config)
    yield from _recorded_products(config)
    if config.train.recompute == "slices" and model.capacity_factor is not None:
        yield (
            f"train.recompute is slices, but model.capacity_factor is {model.capacity_factor}, which counts the tokens of whole sequences; "
            "set recompute to full, or the factor to null."
        )


def _shards(config: RunConfig, world_size: int) -> Iterator[str]:
    """ZeRO divides the model width of experts over the ranks that hold the same ones."""
    zero, num_ranks = config.zero, config.parallel.expert_parallel_size
    if zero.stage == 0:
        return
    num_shards = count_token_ranks(config.parallel, world_size=world_size) if zero.shard_size is None else zero.shard_size
    if num_shards % num_ranks:
        if zero.shard_size is not None:  # otherwise the topology is refused
            yield (
                f"zero.shard_size {num_shards} is not a multiple of parallel.expert_parallel_size {num_ranks}, whose ranks hold different experts; "
                "change one of them."
            )
    elif config.model.d_model % (num_shards // num_ranks):
        yield (
            f"zero.stage {zero.stage} divides model.d_model {config.model.d_model} of experts over {num_shards // num_ranks} ranks unevenly; "
            "set zero.shard_size so that its quotient by parallel.expert_parallel_size divides it."
        )


def _recorded_products(config: RunConfig) -> Iterator[str]:
    """A recorded step needs products of experts whose rows the device counts: torch's, for bf16 and aligned widths."""
    if config.train.cuda_graphs is not True:
        return
    if config.precision.dtype != "bf16" or config.train.kernels == "reference":
        name, value = ("precision.dtype", config.precision.dtype) if config.precision.dtype != "bf16" else ("train.kernels", "reference")
        yield (
            f"train.cuda_graphs is true with model.ffn moe, but {name} is {value}, for which the host counts the rows of experts; "
            "set train.cuda_graphs to false."
        )
    for name, width in (("d_model", config.model.d_model), ("expert_ffn_size", config.model.expert_width // config.parallel.tensor_parallel_size)):
        if width % ALIGNED_WIDTH:
            yield (
                f"train.cuda_graphs is true with model.ffn moe, but a rank's part of model.{name} is {width} and no multiple of {ALIGNED_WIDTH}, "
                "as torch's products of experts need it; change the width, or set train.cuda_graphs to false."
            )


def _graphs(config: RunConfig) -> Iterator[str]:
    """Graphs of blocks or of steps that cannot hold what ranks that share experts do."""
    model, parallel, train = config.model, config.parallel, config.train
    if parallel.expert_parallel_size == 1:
        return
    where = f"parallel.expert_parallel_size {parallel.expert_parallel_size}"
    if train.compile.fullgraph:
        yield f"train.compile.fullgraph is true with {where}, where FSDP gathers experts between the graphs of a block; set it to false."
    if train.cuda_graphs is True and model.has_counted_rows(context_parallel_size=parallel.context_parallel_size):
        which = "model.capacity_factor null" if model.capacity_factor is None else f"parallel.context_parallel_size {parallel.context_parallel_size}"
        yield (
            f"train.cuda_graphs is true with {where} and {which}, where ranks exchange as many rows as tokens choose, which the host has to read; "
            "set it to false."
        )
