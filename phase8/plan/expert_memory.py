"""What the ranks that divide experts keep of a layer's activations beyond an even share of what one rank keeps. No torch."""

from __future__ import annotations

from phase8.config.model_section import ModelSection
from phase8.topology import Topology

# Tensors of a row that backward needs: the row, its results of gate and up, what they make together, and the result of the expert.
_ROWS, _INNER_ROWS = 2, 3


def expert_activation_bytes(model: ModelSection, topology: Topology, *, num_tokens: int, element_bytes: int, keeps_weights: bool) -> int:
    """Bytes that a rank keeps of a layer with experts in addition to its share of the activations of one rank; negative where it keeps less.

    Args:
        model: Model section, all of whose layers have experts.
        topology: Topology of the ranks.
        num_tokens: Tokens of a microbatch on the rank.
        element_bytes: Bytes of a number in the residual stream.
        keeps_weights: Whether a block keeps its weights for backward, cast to the dtype of the residual stream.
    """
    tensor, expert = topology.tensor_parallel_size, topology.expert_parallel_size
    rows = num_tokens * model.top_k
    # Tensor-parallel ranks have rows of the whole width D, of which a traced block was divided.
    change = _ROWS * rows * model.d_model * element_bytes * (tensor - 1) // tensor
    if expert == 1:
        return change
    if not model.has_counted_rows(context_parallel_size=topology.context_parallel_size):
        empty = int(num_tokens * model.rows_per_token(model.sequence_length, is_padded=True)) - rows
        change += empty * (_ROWS * model.d_model + _INNER_ROWS * model.expert_width // tensor) * element_bytes
    if keeps_weights:  # but only those of own experts
        change -= 3 * model.num_experts * model.d_model * model.expert_width * element_bytes // tensor * (expert - 1) // expert
    return change
