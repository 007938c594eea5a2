"""Compilation of each block and of the final norm by torch.compile, and its settings for the whole process."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch._functorch import config as functorch_config

from phase8.config.schema import RunConfig
from phase8.errors import ConfigError
from phase8.model.model import LanguageModel
from phase8.train.engine.source_order import in_source_order

# Maps modes of the config to torch.compile's modes without CUDA graphs, which train.cuda_graphs records instead.
COMPILE_MODES = {"default": "default", "max-autotune": "max-autotune-no-cudagraphs"}
# With and without gradients, of one size and of any, without a state, with an empty one, and with one whose window is full or not yet.
_FORMS_OF_A_LAYER = 16


def compile_modules(chunks: Sequence[LanguageModel], config: RunConfig, *, are_calls_hooked: bool = False) -> None:
    """Marks every block and the final norm for compilation at its first call, if `train.compile.enabled` is set.

    Args:
        chunks: Chunks of the model.
        config: Config with the mode of compilation, its backend, and the budget for the activations that blocks keep.
        are_calls_hooked: Whether hooks that torch.compile cannot trace surround the calls, inside of which it then compiles.

    Raises:
        ConfigError: torch knows no such backend.
    """
    train = config.train
    if not train.compile.enabled:
        return
    functorch_config.activation_memory_budget = train.activation_memory_budget if train.recompute == "budget" else 1.0
    # A warning about operations in place under `context_fn` of a recomputation, of which blocks have none.
    logging.getLogger("torch._higher_order_ops.wrap").addFilter(lambda record: "context_fn" not in record.getMessage())
    from torch._dynamo import config as dynamo_config  # half a second, and triton, which runs that compile nothing do without
    from torch._inductor import config as inductor_config

    # Left to itself, the compiler begins exchanges late and waits for them at once, with nothing beside them, and on each rank in another order.
    exchanges = max(config.parallel.context_parallel_size, config.parallel.expert_parallel_size) > 1
    inductor_config.reorder_for_peak_memory = inductor_config.reorder_for_locality = not exchanges
    inductor_config.reorder_for_compute_comm_overlap = exchanges
    inductor_config.reorder_for_compute_comm_overlap_passes = [in_source_order]
    # All blocks share their code; above the limit torch.compile would leave the others uncompiled.
    dynamo_config.recompile_limit = max(dynamo_config.recompile_limit, _FORMS_OF_A_LAYER * _count_kinds(config))
    options: dict[str, Any] = {"mode": COMPILE_MODES[train.compile.mode], "fullgraph": train.compile.fullgraph}
    if train.compile.backend is not None:
        options["backend"] = _known(train.compile.backend)
    for module in (*(block for chunk in chunks for block in chunk.blocks.values()), *(chunk.norm for chunk in chunks if chunk.norm is not None)):
        if are_calls_hooked:
            module.forward = torch.compile(module.forward, **options)
        else:
            module.compile(**options)


def _count_kinds(config: RunConfig) -> int:
    """The number of kinds of layers, which differ in window, experts, rotary positions, number format or recomputation and are compiled each."""
    model, layers = config.model, range(config.model.num_layers)
    is_fp8 = (layer in config.precision.fp8_layers(model.num_layers) for layer in layers)
    is_recomputed = (layer % config.train.recompute_every_n_layers == 0 for layer in layers)
    return len(set(zip(model.layer_kinds, model.has_rotary, is_fp8, is_recomputed, strict=True)))


def _known(backend: str) -> str:
    if backend not in torch.compiler.list_backends(exclude_tags=()):
        known = ", ".join(torch.compiler.list_backends())  # without those for debugging
        raise ConfigError(f"train.compile.backend is {backend}, but torch knows {known}; name one of these, or install what registers it.")
    return backend
