"""The largest sizes that the Triton kernels take; what is larger goes to the references. Plain numbers, for kernels, banner and planner."""

from __future__ import annotations

MAX_HEAD_SIZE = 256
MAX_RANK = 64  # of the bottlenecks of a low-rank feed-forward: wider ones are worth matrix products of their own
