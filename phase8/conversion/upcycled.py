"""A mixture of experts made of a dense model, each of whose experts begins as the dense feed-forward."""

from __future__ import annotations

import torch

from phase8.checkpoint.load import Checkpoint
from phase8.checkpoint.reshard.upcycle import UpcycledWeights
from phase8.config.model_keys import KEYS_OF_EXPERTS
from phase8.config.model_section import ModelSection
from phase8.config.schema import RunConfig
from phase8.config.validate import refuse_problems
from phase8.conversion.beginning import metadata_of_beginning
from phase8.errors import ConfigError
from phase8.model.model import build_model
from phase8.model.parameters import first_buffers, first_value, iterate_specs

DEFAULT_TOP_K = 2
# Standard deviation of the first weights of a router that chooses a single expert, over that of others: scores are then 1 / E but for a few
# thousandths, and choices are those of larger weights.
_ROUTER_SCALE = 2**-10


def upcycled(source: Checkpoint, config: RunConfig, num_experts: int, *, top_k: int | None) -> tuple[Checkpoint, RunConfig]:
    """The weights of a dense model as those of a mixture, and the config of the mixture.

    Args:
        source: Dense model.
        config: Its config.
        num_experts: Experts of the mixture.
        top_k: Experts that compute a token; None: two.

    Raises:
        ConfigError: The model is not dense, or the mixture cannot be built.
    """
    if config.model.ffn != "swiglu":
        raise ConfigError(f"--upcycle-experts is for dense models, but model.ffn of {source.path} is {config.model.ffn}; give one with ffn swiglu.")
    top_k = DEFAULT_TOP_K if top_k is None else top_k
    if num_experts < top_k:
        raise ConfigError(f"--upcycle-experts is {num_experts}, but {top_k} experts compute a token (--upcycle-top-k); give at least as many.")
    is_single = top_k == 1
    # Whatever the dense model's config says about experts was without effect.
    experts = {name: ModelSection.model_fields[name].default for name in KEYS_OF_EXPERTS} | {
        "ffn": "moe", "num_experts": num_experts, "top_k": top_k, "expert_ffn_size": config.model.feed_forward_width,
        "routed_scaling_factor": 1.0,
    }  # fmt: skip
    config = config.model_copy(update={"model": config.model.model_copy(update=experts)})
    refuse_problems(config, about=("model.",))
    mixture = build_model(config.model, dtype=torch.float32, device=torch.device("meta"))
    added = {name: first_value(name, each.shape, spec, seed=config.train.seed) for name, each, spec in iterate_specs(mixture) if ".router." in name}
    if is_single:
        added = {name: value * _ROUTER_SCALE for name, value in added.items()}
    weights = UpcycledWeights(
        source,
        metadata_of_beginning(config),
        has_experts=config.model.has_experts,
        num_experts=num_experts,
        factor=num_experts if is_single else 1,
        added=added | first_buffers(mixture),
    )
    return weights, config
