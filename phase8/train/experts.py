"""What computes the products of experts on this device, and what follows for steps that are recorded."""

from __future__ import annotations

import torch

from phase8.accelerator import records_steps
from phase8.config.dotted import replaced
from phase8.config.schema import RunConfig
from phase8.errors import ConfigError
from phase8.kernels.backends import GROUPED, Backend, expert_backend
from phase8.precision.policy import compute_dtype


def experts_backend(config: RunConfig, device: torch.device) -> Backend:
    """What computes the products of the experts of a rank, and why."""
    model = config.model
    return expert_backend(device, compute_dtype(config.precision), (model.d_model, model.expert_width // config.parallel.tensor_parallel_size))


def with_recordable_experts(config: RunConfig, device: torch.device) -> RunConfig:
    """The config, in which an automatic `train.cuda_graphs` is false where the host counts the rows of experts.

    Raises:
        ConfigError: The config asks for recorded steps there.
    """
    if not any(config.model.has_experts) or not records_steps(device.type) or (found := experts_backend(config, device)).name == GROUPED:
        return config
    if config.train.cuda_graphs is True:
        raise ConfigError(
            f"train.cuda_graphs is true with model.ffn moe, but the host counts the rows of experts on this device: {found.reason}; "
            "set train.cuda_graphs to false."
        )
    return replaced(config, {"train.cuda_graphs": False}) if config.train.cuda_graphs == "auto" else config
