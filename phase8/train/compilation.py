"""torch.compile of the blocks, one by one, and what it is told about the whole process."""

from __future__ import annotations

import warnings

from torch._functorch import config as functorch_config
from torch.distributed._symmetric_memory import enable_symm_mem_for_group

from phase8.config.schema import RunConfig
from phase8.train.learner import Learner

# By the name in the config: what torch.compile calls a mode that leaves CUDA graphs to train.cuda_graphs.
COMPILE_MODES = {"default": "default", "max-autotune": "max-autotune-no-cudagraphs"}


def compile_blocks(learner: Learner, config: RunConfig) -> None:
    """Has every block compiled when it is called first, if the config says so.

    Args:
        learner: Its blocks.
        config: How, how much of their activations they keep, and whether tensor-parallel ranks exchange tokens beside their products.
    """
    train, mesh = config.train, learner.mesh
    if not train.compile.enabled:
        return
    from torch._inductor import config as inductor_config  # here: it brings Triton along, which few runs need

    functorch_config.activation_memory_budget = train.activation_memory_budget if train.recompute == "budget" else 1.0
    is_asynchronous = config.parallel.async_tensor_parallel and learner.device.type == "cuda"
    inductor_config._micro_pipeline_tp = is_asynchronous
    if is_asynchronous:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # not needed by every torch that this runs on
            enable_symm_mem_for_group(mesh.tp.group.group_name)
    for block in (block for chunk in learner.stage.chunks for block in chunk.blocks.values()):
        block.compile(mode=COMPILE_MODES[train.compile.mode], fullgraph=train.compile.fullgraph)
