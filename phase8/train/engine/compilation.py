"""Compilation of each block and of the final norm by torch.compile, and its settings for the whole process."""

from __future__ import annotations

from torch._functorch import config as functorch_config

from phase8.config.schema import RunConfig
from phase8.train.engine.train_state import TrainState

# Maps modes of the config to torch.compile's modes without CUDA graphs, which train.cuda_graphs records instead.
COMPILE_MODES = {"default": "default", "max-autotune": "max-autotune-no-cudagraphs"}


def compile_modules(train_state: TrainState, config: RunConfig) -> None:
    """Marks every block and the final norm for compilation at its first call, if `train.compile.enabled` is set.

    Args:
        train_state: Train state with the model.
        config: Config with the mode of compilation and the budget for the activations that blocks keep.
    """
    train = config.train
    if not train.compile.enabled:
        return
    functorch_config.activation_memory_budget = train.activation_memory_budget if train.recompute == "budget" else 1.0
    chunks = train_state.stage.chunks
    for module in (*(block for chunk in chunks for block in chunk.blocks.values()), *(chunk.norm for chunk in chunks if chunk.norm is not None)):
        module.compile(mode=COMPILE_MODES[train.compile.mode], fullgraph=train.compile.fullgraph)
