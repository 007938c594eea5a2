"""torch.compile of each block and of the final norm, and its settings for the whole process."""

from __future__ import annotations

from torch._functorch import config as functorch_config

from phase8.config.schema import RunConfig
from phase8.train.learner import Learner

# Maps modes of the config to torch.compile's modes without CUDA graphs, which train.cuda_graphs records instead.
COMPILE_MODES = {"default": "default", "max-autotune": "max-autotune-no-cudagraphs"}


def compile_modules(learner: Learner, config: RunConfig) -> None:
    """Makes every block and the final norm compile at their first call, if the config enables it.

    Args:
        learner: Holder of the model.
        config: Config with the mode, and with the activation budget of the blocks.
    """
    train = config.train
    if not train.compile.enabled:
        return
    functorch_config.activation_memory_budget = train.activation_memory_budget if train.recompute == "budget" else 1.0
    chunks = learner.stage.chunks
    for module in (*(block for chunk in chunks for block in chunk.blocks.values()), *(chunk.norm for chunk in chunks if chunk.norm is not None)):
        module.compile(mode=COMPILE_MODES[train.compile.mode], fullgraph=train.compile.fullgraph)
