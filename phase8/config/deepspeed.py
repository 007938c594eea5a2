"""Rules for `zero.engine: deepspeed`, and for offloading to NVMe, which only DeepSpeed does."""

from __future__ import annotations

from collections.abc import Iterator

from phase8.config.schema import RunConfig, ZeroSection

_NVME = "nvme"


def deepspeed_problems(config: RunConfig) -> Iterator[str]:
    """The problems of the engine and of NVMe, one sentence each."""
    zero = config.zero
    yield from _nvme(zero)
    if zero.engine != "deepspeed":
        return
    if zero.stage == 0:
        yield "zero.engine is deepspeed, but zero.stage is 0, and DeepSpeed divides from stage 1 on; choose a stage, or set zero.engine to fsdp."
    if zero.shard_size is not None:
        yield f"zero.shard_size is {zero.shard_size}, but zero.engine is deepspeed, which divides over all data-parallel ranks; leave it null."
    if zero.gather_dtype is not None:
        yield f"zero.gather_dtype is {zero.gather_dtype}, but zero.engine is deepspeed, which gathers in precision.dtype; set one of them back."
    if zero.copy_engine_gather:
        yield "zero.copy_engine_gather is true, but zero.engine is deepspeed, which gathers by itself; set it to false, or zero.engine to fsdp."
    if config.optim.name != "adamw":
        yield f"optim.name is {config.optim.name}, but zero.engine is deepspeed, which runs adamw; set one of them back."
    if config.optim.state_dtype != "fp32":
        yield f"optim.state_dtype is {config.optim.state_dtype}, but zero.engine is deepspeed, which keeps fp32; set one of them back."
    if config.train.cuda_graphs is True:
        yield "train.cuda_graphs is true, but zero.engine is deepspeed, whose step no graph can hold; set it to false, or zero.engine to fsdp."
    if config.train.recompute == "slices" and zero.stage == 3:
        yield (
            "train.recompute is slices with zero.stage 3, but zero.engine is deepspeed, which there takes a single gradient of each parameter from a "
            "backward; set recompute to full, or zero.engine to fsdp."
        )
    for axis in ("pipeline", "context", "expert"):
        size = getattr(config.parallel, f"{axis}_parallel_size")
        if size > 1:
            yield (
                f"parallel.{axis}_parallel_size is {size}, but zero.engine is deepspeed, which works with data and tensor parallelism alone; "
                "set zero.engine to fsdp."
            )


def _nvme(zero: ZeroSection) -> Iterator[str]:
    offloaded = {"zero.offload_optimizer": zero.offload_optimizer, "zero.offload_params": zero.offload_params}
    to_nvme = [key for key, where in offloaded.items() if where == _NVME]
    if zero.engine != "deepspeed":
        for key in to_nvme:
            yield f"{key} is nvme, which only DeepSpeed offloads to, but zero.engine is {zero.engine}; set zero.engine to deepspeed, or {key} to cpu."
    elif to_nvme and zero.stage != 3:
        yield f"{to_nvme[0]} is nvme, which needs zero.stage 3, but it is {zero.stage}; set it to 3, or {to_nvme[0]} to cpu."
    elif to_nvme and zero.nvme_path is None:
        yield f"{to_nvme[0]} is nvme, but zero.nvme_path is null; name a directory on the NVMe disk of every host."
    if zero.nvme_path is not None and not to_nvme:
        yield "zero.nvme_path is given, but nothing is offloaded to nvme; set zero.offload_optimizer to nvme, or leave it null."
