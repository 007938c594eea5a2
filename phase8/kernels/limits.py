"""The largest sizes that the Triton kernels support; larger ones use the references. Plain numbers, for kernels, banner and planner."""

from __future__ import annotations

MAX_HEAD_SIZE = 256
MAX_RANK = 64  # largest rank of a low-rank feed-forward: for wider ones, separate matrix products pay off
