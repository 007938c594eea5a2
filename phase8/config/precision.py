"""What eight-bit products of linear layers ask of the rest of a config."""

from __future__ import annotations

from collections.abc import Iterator

from phase8.config.model_section import ModelSection
from phase8.config.schema import RunConfig

# Matrix units take sixteen numbers of a row at once. Thinner products wait for memory, where rounding both factors costs more than it saves.
DIVISOR, LEAST_WIDTH = 16, 256
# The time of a layer's three products in int8, scales included, over that in bf16, on an H200 (tools/bench/eight_bit_products.py). int8 pays below 1.
INT8_OVER_BF16 = 1.10


def precision_problems(config: RunConfig) -> Iterator[str]:
    """Sentences about a format of linear layers that the model or the dtype of the stream rules out."""
    precision, model = config.precision, config.model
    if precision.linear is None:
        return
    begin = f"precision.linear is {precision.linear}, but"
    if precision.linear == "int8":
        yield f"{begin} in training such products take {INT8_OVER_BF16} times as long as those in bf16 (docs/performance.md); set it to fp8 or null."
        return
    if precision.dtype != "bf16":
        yield f"{begin} precision.dtype is {precision.dtype}; set it to bf16, in which results of these products are."
    if model.low_rank_rank:
        yield f"{begin} model.low_rank_rank is {model.low_rank_rank}: products so thin wait for memory; set precision.linear to null."
        return
    if 2 * precision.bf16_layers >= model.num_layers:
        yield (
            f"{begin} precision.bf16_layers is {precision.bf16_layers} at either end of model.num_layers {model.num_layers}, so no block has "
            "such products; lower it, or set precision.linear to null."
        )
    degree = config.parallel.tensor_parallel_size
    for name, width in _widths(model).items():
        share = width // degree if name != "model.d_model" else width
        if share < LEAST_WIDTH or share % DIVISOR:
            of_rank = f" for each of {degree} ranks" if share != width else ""
            yield f"{begin} {name} is {share}{of_rank}; a multiple of {DIVISOR} of at least {LEAST_WIDTH} is needed, or precision.linear null."


def _widths(model: ModelSection) -> dict[str, int]:
    """The widths of the dense layers that are in every block, by the keys that set them."""
    widths = {"model.d_model": model.d_model, "model.num_heads * head size": model.attention_width}
    if model.num_kv_heads is not None:  # queries, keys and values are one product
        widths["(model.num_heads + 2 * model.num_kv_heads) * head size"] = model.attention_width + 2 * model.key_value_width
    return widths if all(model.has_experts) else widths | {"model.ffn_size": model.feed_forward_width}
