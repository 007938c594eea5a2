"""The largest sizes that the Triton kernels support; larger ones use the references. Plain numbers, for kernels, banner and planner."""

from __future__ import annotations

MAX_HEAD_SIZE = 256
MAX_RANK = 64  # largest rank of a low-rank feed-forward: for wider ones, separate matrix products pay off
MAX_STEP_HEAD_SIZE = 128  # of a decoding step, which holds the memory of a head in registers
MAX_NORM_WIDTH = 16384  # of the norm of a decoding step, which holds a row in registers
MAX_FEW_TOKENS = 4  # for more tokens torch's matrix products read weights as fast as the kernel of a few
MAX_PRODUCT_WIDTH = 8192  # of the input of a product with few tokens, which holds a row of the weight in registers
# Low-rank q, k and v that `low_rank_mixer_inputs` computes itself: the sums of a head's weights are in registers.
MAX_BOTTLENECK_RANK = 32
MAX_BOTTLENECK_TAPS = 4
BOTTLENECK_HEAD_SIZES = (32, 64)
