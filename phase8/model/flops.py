"""Floating-point operations of a forward pass per token: the multiply-adds of linear layers, attention and recurrences, two each.

Element-wise work (norms, activations, rotary, the scalar Green chain, softmax) is not counted, as usual. The recurrence is counted
in its recurrent form, whatever a kernel does: MFU must not reward extra work. A backward pass costs twice a forward.
"""

from __future__ import annotations

from phase8.config.schema import ModelSection

BACKWARD_OVER_FORWARD = 2


def forward_flops_per_token(model: ModelSection) -> dict[str, float]:
    """FLOPs of each part, averaged over the positions of a training sequence."""
    layers, width, inner = model.num_layers, model.d_model, model.attention_width
    rank = model.low_rank_rank
    parts = {
        "mixer projections": layers * 4 * _linear(width, inner, rank),
        "convolution": layers * 2 * 3 * inner * model.convolution_taps if model.convolution_taps > 1 else 0,
        "attention": 4 * inner * sum(mean_visible_keys(model, window) for window in model.window_sizes),
        "feed-forward": layers * 3 * _linear(width, model.feed_forward_width, model.feed_forward_rank),
        "head": _linear(width, model.vocab_size, 0),
    }
    if model.has_global_path:
        num_scalars = 2 if model.chain == "none" else 3
        parts["mixer projections"] += layers * _linear(width, num_scalars * model.num_heads, 0)
        # Update S += w k v^T and read-out S^T q, K^2 multiply-adds each.
        parts["recurrence"] = layers * 4 * inner * model.head_width
    return parts


def training_flops_per_token(model: ModelSection) -> float:
    """FLOPs of forward and backward per token; recomputation is not counted (it is model FLOPs, not hardware FLOPs)."""
    return (1 + BACKWARD_OVER_FORWARD) * sum(forward_flops_per_token(model).values())


def layer_flops_per_token(model: ModelSection) -> list[float]:
    """Forward FLOPs of each layer, which differ by their windows."""
    parts = forward_flops_per_token(model)
    attention = [4 * model.attention_width * mean_visible_keys(model, window) for window in model.window_sizes]
    others = (sum(parts.values()) - parts["attention"] - parts["head"]) / model.num_layers
    return [others + own for own in attention]


def mean_visible_keys(model: ModelSection, window: int) -> float:
    """Keys that attention reads in a layer of this window, averaged over the positions of a sequence."""
    length = model.sequence_length
    if model.block == "transformer":
        return (length + 1) / 2
    far = model.global_tokens
    beyond, within = max(length - window, 0), min(length, window)
    near_keys = within * (within + 1) // 2 + beyond * window
    # Position i sees the globals that have left its window: min(i + 1 - W, G) of them.
    ramp = min(beyond, far)
    far_keys = ramp * (ramp + 1) // 2 + (beyond - ramp) * far
    return (near_keys + far_keys) / length


def _linear(in_features: int, out_features: int, rank: int) -> int:
    return 2 * (rank * (in_features + out_features) if rank else in_features * out_features)
