"""What a conversion is asked for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from phase8.errors import ConfigError

LAYOUT = ("tensor_parallel_size", "pipeline_parallel_size", "shards", "expert_parallel_size")


@dataclass(frozen=True, kw_only=True)
class ConversionOptions:
    """Options of a conversion, each with the name that it has on the command line.

    Args:
        source: A checkpoint, a run (its newest one), or weights in another form.
        destination: The directory to write, which does not exist.
        format: Form of the result.
        dtype: Dtype of the weights of any other form than `phase8`; None: as they are.
        trust_pickle: Whether a checkpoint that DeepSpeed wrote is read, whatever code it contains.
        config: Config of the model of such a checkpoint.
        tensor_parallel_size: Ranks that divide each layer; None, here and below: one.
        pipeline_parallel_size: Stages.
        shards: Data-parallel ranks that divide the model among them.
        expert_parallel_size: Of the shards, those that hold different experts.
        upcycle_experts: Experts of the mixture that is made of a dense model; None: none is made.
        upcycle_top_k: Experts of it that compute a token; None: two.
    """

    source: Path
    destination: Path
    format: Literal["phase8", "consolidated", "hf"] = "phase8"
    dtype: Literal["bf16", "fp32"] | None = None
    trust_pickle: bool = False
    config: Path | None = None
    tensor_parallel_size: int | None = None
    pipeline_parallel_size: int | None = None
    shards: int | None = None
    expert_parallel_size: int | None = None
    upcycle_experts: int | None = None
    upcycle_top_k: int | None = None

    def check(self) -> None:
        """Refuses options that contradict each other.

        Raises:
            ConfigError: Two of them do, or a number is none.
        """
        given = {f"--{name.replace('_', '-')}": value for name in LAYOUT if (value := vars(self)[name]) is not None}
        if self.format != "phase8" and given:
            raise ConfigError(f"{next(iter(given))} is for --format phase8, but --format {self.format} is one file for any ranks; leave it out.")
        if self.format == "phase8" and self.dtype is not None:
            raise ConfigError(
                f"--dtype is {self.dtype}, but --format is phase8, from which training goes on bit for bit; leave it out, or choose consolidated."
            )
        for name, value in given.items():
            if value < 1:
                raise ConfigError(f"{name} is {value}, but must be at least 1.")
        shards, experts = self.shards or 1, self.expert_parallel_size or 1
        if shards % experts:
            raise ConfigError(
                f"--expert-parallel-size {experts} does not divide --shards {shards}, of which these ranks are a part; change one of them."
            )
        if self.upcycle_experts is not None and self.format != "phase8":
            raise ConfigError(f"--upcycle-experts is for --format phase8, but --format is {self.format}; leave one of them out.")
        if self.upcycle_top_k is not None and self.upcycle_experts is None:
            raise ConfigError(f"--upcycle-top-k is {self.upcycle_top_k}, but no mixture is made; give --upcycle-experts too, or leave it out.")
        if self.upcycle_top_k is not None and self.upcycle_top_k < 1:
            raise ConfigError(f"--upcycle-top-k is {self.upcycle_top_k}, but must be at least 1.")
