"""What a recomputed block keeps for backward besides its input: states of the slices that it computes by itself, and what other ranks' slices sent.

Both are independent of the length of a slice.
"""

from __future__ import annotations

from phase8.config.model_section import ModelSection
from phase8.exchanges import SliceExchange
from phase8.plan.chunks import mixer_exchanges
from phase8.plan.memory import FP32_BYTES
from phase8.shared_sequence import wanted_tokens
from phase8.topology import Topology


def states_of_slices(model: ModelSection, *, num_slices: int, batch_size: int, element_bytes: int) -> int:
    """Bytes of the states that a block recomputed in slices keeps, one for each slice.

    Args:
        model: Model section whose layers have one window.
        num_slices: Slices of a sequence.
        batch_size: Sequences of a microbatch.
        element_bytes: Bytes of a number in the residual stream.
    """
    (window,) = set(model.window_sizes)
    numbers = 3 * (model.convolution_taps - 1) * model.attention_width + 2 * min(max(window - 1, 0), model.sequence_length) * model.attention_width
    wide_numbers = model.attention_width * model.head_width if model.has_global_path else 0
    return batch_size * num_slices * (numbers * element_bytes + wide_numbers * max(element_bytes, FP32_BYTES))


def kept_of_exchanges(model: ModelSection, topology: Topology, *, recompute: str, batch_size: int, element_bytes: int) -> int:
    """Bytes of what the last rank of a sequence keeps of a block's exchanges where it recomputes the block without exchanging again.

    Args:
        model: Model section whose layers are all alike, with the length of a rank's slice.
        topology: Topology of the ranks.
        recompute: Mode of recomputation.
        batch_size: Sequences of a microbatch.
        element_bytes: Bytes of a number in the residual stream.
    """
    num_ranks = topology.context_parallel_size
    is_repeated = recompute == "full" and topology.tensor_parallel_size > 1
    if num_ranks == 1 or model.block != "phase8" or recompute not in ("full", "selective") or is_repeated:
        return 0
    found = 0
    for exchange in mixer_exchanges(model):
        if isinstance(exchange, SliceExchange):
            parts = num_ranks if exchange.before is None else _fetched_by_the_last(exchange.before, exchange.first, model.sequence_length, num_ranks)
            numbers = parts * exchange.numbers // (topology.tensor_parallel_size if exchange.is_divided else 1)
            found += numbers * (max(element_bytes, FP32_BYTES) if exchange.is_wide else element_bytes)
    return batch_size * found


def _fetched_by_the_last(before: int, first: int, length: int, num_ranks: int) -> int:
    return sum(map(len, wanted_tokens(length, num_ranks, before=before, first=first)[-1]))
