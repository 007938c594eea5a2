"""The largest sizes that the Triton kernels support; larger ones use the references. Plain numbers, for kernels, banner and planner; no torch."""

from __future__ import annotations

MAX_HEAD_SIZE = 256
MAX_RANK = 64  # largest rank of a low-rank feed-forward: for wider ones, separate matrix products pay off
MAX_STEP_HEAD_SIZE = 128  # of a decoding step, which holds the memory of a head in registers
MAX_NORM_WIDTH = 16384  # of the norm of a decoding step, which holds a row in registers
MAX_SCANNED = 2**31  # of the Green scan, which counts the numbers of a sequence in 32 bits
MAX_FEW_TOKENS = 4  # for more tokens torch's matrix products read weights as fast as the kernel of a few
MAX_PRODUCT_WIDTH = 8192  # of the input of a product with few tokens, which holds a row of the weight in registers
# Low-rank q, k and v that `low_rank_mixer_inputs` computes itself: it holds the gradients of a head's weights in registers.
MAX_BOTTLENECK_RANK = 32
MAX_BOTTLENECK_TAPS = 4
BOTTLENECK_HEAD_SIZES = (32, 64)


def takes_bottlenecks(*, rank: int, head_size: int, num_taps: int, num_outputs: int, element_bytes: int) -> bool:
    """Whether `low_rank_mixer_inputs` computes low-rank q, k and v of these sizes; others are formed by a product, for `mixer_inputs`.

    Args:
        rank: R.
        head_size: K.
        num_taps: Taps of the convolution; 1: none.
        num_outputs: Numbers of q, whose positions the kernels count in 32 bits.
        element_bytes: Of a number in the bottlenecks: tiles of fp32 do not fit into registers.
    """
    is_small = rank <= MAX_BOTTLENECK_RANK and num_taps <= MAX_BOTTLENECK_TAPS and num_outputs < 2**31
    return is_small and element_bytes <= 2 and head_size in BOTTLENECK_HEAD_SIZES
