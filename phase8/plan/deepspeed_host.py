"""Host memory that DeepSpeed takes for what it offloads, as tensors of its releases 0.19 have it (`tests/parallel/test_deepspeed.py` counts them).

For P parameters of the rank, of c bytes in the compute dtype; what is page-locked on a GPU is in brackets, and comes in powers of two:

| | stage 1 and 2 | stage 3 | stage 3, on NVMe |
|---|---|---|---|
| master weights, moments | (4 P), 8 P | 12 P | some groups |
| sums of gradients | | (4 P) | (4 P) |
| gradients that the optimizer reads | (4 P) | (4 P, group by group) | some groups |
| updated parameters | (c P) | (c P) if parameters are offloaded | some parameters, if they are |
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

_FP32_BYTES = 4
# Page-locked buffers of what is on its way from or to NVMe: flat buffers (weights, gradients, two moments), and parameters.
_SWAP_BUFFERS = (4, 5)


class DeepSpeedBuffers(NamedTuple):
    """Sizes of DeepSpeed's copies and buffers.

    Args:
        element_bytes: Bytes of a number in the compute dtype.
        bucket: Numbers in a bucket.
        group: Numbers of a flat buffer, which the optimizer updates together; on NVMe they are on their way together.
        swaps_optimizer: Whether the optimizer's states are on NVMe.
        swaps_params: Whether parameters are.
    """

    element_bytes: int
    bucket: int
    group: int = 0
    swaps_optimizer: bool = False
    swaps_params: bool = False


def deepspeed_host_bytes(
    buffers: DeepSpeedBuffers, numbers: int, *, stage: int, state_bytes: int, largest: int, offload_params: bool, pins_memory: bool
) -> int:
    """Bytes in host memory of a rank whose optimizer is offloaded.

    Args:
        buffers: Sizes of DeepSpeed's buffers.
        numbers: P.
        stage: ZeRO stage.
        state_bytes: What the optimizer keeps of the parameters.
        largest: Numbers of the largest parameter.
        offload_params: Whether parameters are offloaded too.
        pins_memory: Whether memory is page-locked.
    """
    locked: Callable[[int], int] = page_locked_bytes if pins_memory else int
    in_fp32, parameters = _FP32_BYTES * numbers, buffers.element_bytes * numbers
    if stage < 3:
        return 2 * locked(in_fp32) + state_bytes + locked(parameters)
    group = min(buffers.group, numbers)
    if buffers.swaps_optimizer:
        of_optimizer = _SWAP_BUFFERS[0] * _FP32_BYTES * group
    else:
        whole_groups, rest = divmod(numbers, group) if group else (0, numbers)
        of_optimizer = in_fp32 + state_bytes + whole_groups * locked(_FP32_BYTES * group) + (locked(_FP32_BYTES * rest) if rest else 0)
    of_params = buffers.element_bytes * _SWAP_BUFFERS[1] * largest if buffers.swaps_params else locked(parameters)
    return of_optimizer + locked(in_fp32) + (of_params if offload_params else 0)


def page_locked_bytes(num_bytes: int) -> int:
    """The memory that a page-locked tensor takes: the next power of two."""
    return 1 << max(num_bytes - 1, 0).bit_length()
