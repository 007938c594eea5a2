"""Processes that start in milliseconds: they are forked from one that has imported what all of them would."""

import functools
import multiprocessing
import multiprocessing.context
import time

PRELOADED = [
    "torch", "torch.distributed.checkpoint", "torch.distributed.fsdp", "torch.distributed.tensor.parallel", "torch.utils.data", "safetensors",
    "pydantic", "rich.console", "rich.progress", "yaml", "torch._dynamo", "phase8.train.build", "phase8.train.loop",
]  # fmt: skip


@functools.cache
def forking_context() -> multiprocessing.context.BaseContext:
    """Where such processes come from; the first call waits for the imports, so that nothing later does."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    first = context.Process(target=time.sleep, args=(0,))
    first.start()
    first.join()
    return context
