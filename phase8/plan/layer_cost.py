"""Cost of one microbatch on a rank, layer by layer: seconds of the GPU, and of the host that launches its kernels. No torch.

A layer is two halves, mixer and feed-forward, each with a forward and a backward; recomputation is one more forward. A half takes a GPU the
time of its products (FLOPs at the sustained rate, or the memory traffic of the operands if that takes longer), of the kernels of the
mixer, of all other passes at the speed of memory, and of the gaps between kernels.

    N  tokens of a microbatch    D  model width    I  mean width of q, k and v    F  feed-forward width    V  vocabulary    R  low rank

A pass reads or writes one tensor in the format of the residual stream. The constants were calibrated on the rows of
tests/plan/measured_throughput.json, within the bounds that their comments give.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

from phase8.config.model_section import LayerKind, ModelSection
from phase8.kernels.limits import MAX_RANK, takes_bottlenecks
from phase8.kernels.loss_chunks import SCRATCH_BYTES, choose_chunk_tokens
from phase8.model.work import BACKWARD_OVER_FORWARD, mean_visible_keys
from phase8.plan.memory import FP32_BYTES

# The first value is for the forward, the second for the backward.
Both = tuple[float, float]

# Shares of the peak FLOP/s. Products: a profile of phase8_1b has 740 of 989 TFLOP/s, single ones reach 800. The kernels of the mixer: the
# slopes of their times over window and head size in docs/performance.md; torch's attention: over the length of the sequence.
PRODUCT_SHARE = 0.69
WINDOW_SHARES: Both = (0.40, 0.29)
RECURRENCE_SHARES: Both = (0.13, 0.13)
CAUSAL_SHARES: Both = (0.48, 0.48)
# Time of the gated delta rule over that of the gated linear recurrence, forward and backward, B 4, T 4096, 16 heads of 128 (docs/performance.md).
DELTA_OVER_LINEAR = 2.15
# Passes over [N, I] by a gate per channel: its logits are read; in backward, their gradient is written, too. Over [N, D] by an embedding scalar.
GATE_PASSES: Both = (1, 2)
EMBEDDING_PASSES: Both = (3, 7)
# Additional passes over [N, I] where ranks share the sequence: keys and values are copied behind those of the neighbour and their gradients taken
# apart, gradients of what neighbours read are added, and the state that a slice adds is a walk over it, in either direction. Counted, not fitted.
SLICE_PASSES: Both = (8, 14)
# A recomputation slice by slice over one of the whole sequence (32 slices of phase8_1b): gradients of weights are summed for every slice, and slices
# are split and joined.
SLICES_OVER_FULL = 1.6
# Additional passes over [N, I] by these kernels: their times extrapolated to window and head size 0.
KERNEL_PASSES: Both = (15, 34)
CAUSAL_PASSES: Both = (6, 14)
# Passes among these that low-rank q, k and v save which are never in memory: they are read; in backward, their gradient is written as well. Counted.
UNWRITTEN_PASSES: Both = (3, 6)
# Passes over the rows of experts [N k, D]: they are filled from tokens and read back. Not measured yet, like the kernels of a router, as pairs.
ROW_PASSES: Both = (4, 6)
# More of these where ranks exchange all slots: those that are filled are brought together, and put in their places again. Counted.
FILLED_PASSES = 4
ROUTER_KERNEL_PAIRS = 4
# fp8: products of phase8_1b's shapes take 0.54 of the time in bf16. Of each input and gradient the largest number is found, then it is rounded twice.
FP8_GAIN = 1.83
FP8_PASSES = 1.6
# How the times of a product's FLOPs and of its operands combine: 1 means one after the other, infinity the longer of both.
OVERLAP = 1.8
# Kernels of a low-rank pair beyond those of one product, with the casts of its weights.
PAIR_KERNELS: Both = (1, 3)
# The part of a low-rank feed-forward between the bottlenecks is one kernel forward and two backward, bound by work other than products.
BOTTLENECK_SHARES: Both = (0.13, 0.10)
# From the end of a small kernel to that of the next one: the profile of the research shape has 11.0 ms for about a thousand kernels,
# most of which do little work.
KERNEL_SECONDS = 2.75e-6
# Adding the gradients of a microbatch to the accumulated ones: two numbers are read, one is written.
ACCUMULATED_BYTES = 3 * FP32_BYTES
ENDS_HOST_SECONDS = 0.5e-3  # in which the host launches embedding and head
# torch.compile recomputes cheap operations first: a budget of one half costs less than a third of full recomputation. It makes one graph for
# all budgets from 0.8 on (little is recomputed), one for those from 0.5 to 0.8 (products are kept), and only below selects tensors one by one.
BUDGET_EXPONENT = 1.45
BUDGET_STEPS = ((1.0, 1.0), (0.8, 0.9), (0.5, 0.5))
# Passes of the loss over the logits of a chunk (0.77 ms for 1 GiB), and of embedding and final norm over [N, D].
LOGIT_PASSES = 2.8
END_PASSES = 8


class Style(NamedTuple):
    """The work of a layer beside products and the kernels of its mixer.

    Args:
        stream: Passes over [N, D]: two norms and two sums.
        gated: Passes over [N, F]: the gated activation.
        mixed: Passes over [N, I]: gate and norm of the global path; rotary positions of the transformer.
        kernels: Number of kernels, without low-rank pairs.
        host: Seconds for the host to launch them. Measured where kernels are short; hosts differ by 20 to 30 %.
        pair_host: Additional seconds for each low-rank pair.
        repeated_host: Launch time of a recomputation over that of a forward: checkpoint hooks add to it, and compiled blocks need none.
        cast_bytes: Bytes moved per weight to cast it to the compute dtype, and per gradient to cast it back.
    """

    stream: Both
    gated: Both
    mixed: Both
    kernels: Both
    host: Both
    pair_host: Both
    repeated_host: float
    cast_bytes: Both


# Fused, each operand is read once and each result written once, and little else (37 ms of a step of phase8_1b). In eager mode, norms and
# rotary positions pass through fp32 tensors several times.
COMPILED = Style(
    stream=(8.4, 10), gated=(2.6, 5.1), mixed=(3.5, 7), kernels=(30, 60), host=(2.9e-3, 3.9e-3), pair_host=(0.04e-3, 0.07e-3), repeated_host=1.0,
    cast_bytes=(8.4, 8.4),
)
EAGER = Style(
    stream=(42, 50), gated=(5.3, 10.6), mixed=(23, 46), kernels=(38, 75), host=(4.0e-3, 2.85e-3), pair_host=(0.21e-3, 0.25e-3), repeated_host=1.6,
    cast_bytes=(14, 14),
)
# Share of the mixer in a layer's kernels and launch time.
MIXER_SHARE = 0.7


class Rates(NamedTuple):
    """Rates of a GPU.

    Args:
        peak: FLOP/s of products in the compute dtype, of which the shares above are sustained.
        memory: Bytes/s of copies.
    """

    peak: float
    memory: float


class Cost(NamedTuple):
    """Seconds of the GPU, and of the host that launches its kernels."""

    gpu: float = 0.0
    host: float = 0.0

    def plus(self, *others: Cost) -> Cost:
        """The sum."""
        return Cost(self.gpu + sum(each.gpu for each in others), self.host + sum(each.host for each in others))


class Half(NamedTuple):
    """Mixer or feed-forward.

    Args:
        forward: Cost of one forward.
        backward: Cost of its gradients.
        last: Cost of its last product, which is never recomputed.
        repeated: Cost of a recomputation, without the last product.
    """

    forward: Cost
    backward: Cost
    last: Cost
    repeated: Cost


@dataclass(frozen=True)
class Microbatch:
    """A microbatch and the rank that computes it.

    Args:
        model: Model section with the shapes.
        size: Sequences of the microbatch.
        tensor_ranks: Ranks that share each layer.
        element_bytes: Bytes of a number in the residual stream.
        is_compiled: Whether blocks are compiled.
        rates: Rates of the GPU.
        context_ranks: Ranks that share each sequence.
        expert_ranks: Ranks that share the experts.
        is_fp8: Whether linear layers compute in fp8.
    """

    model: ModelSection
    size: int
    tensor_ranks: int
    element_bytes: int
    is_compiled: bool
    rates: Rates
    context_ranks: int = 1
    expert_ranks: int = 1
    is_fp8: bool = False

    @property
    def tokens(self) -> int:
        """N, summed over the tensor-parallel ranks."""
        return self.size * self.model.sequence_length // self.context_ranks

    def moved(self, numbers: float) -> float:
        """Seconds to move this many numbers in the format of the residual stream through memory."""
        return numbers * self.element_bytes / self.rates.memory

    def product(self, rows: float, inner: float, columns: float) -> float:
        """Seconds of [rows, inner] times [inner, columns]; the memory traffic of the weight is neglected."""
        arithmetic = 2 * rows * inner * columns / (self.rates.peak * PRODUCT_SHARE * (FP8_GAIN if self.is_fp8 else 1))
        operands = self.moved(rows * (inner + columns))
        return math.pow(arithmetic**OVERLAP + operands**OVERLAP, 1 / OVERLAP) + (FP8_PASSES * operands if self.is_fp8 else 0)


def layer_cost(batch: Microbatch, kind: LayerKind, *, recompute: str, budget: float) -> Cost:
    """Forward, backward and recomputation of one layer.

    Args:
        batch: The microbatch.
        kind: Kind of the layer.
        recompute: `none`, `full`, `slices`, `selective` or `budget`.
        budget: Share of activations that `budget` keeps.
    """
    batch = replace(batch, model=batch.model.of_kind(kind))
    mixer, feed_forward = _mixer(batch, kind.window), _experts(batch) if kind.has_experts else _feed_forward(batch)
    once = mixer.forward.plus(mixer.backward, feed_forward.forward, feed_forward.backward)
    if recompute == "selective":
        return once.plus(mixer.repeated)
    whole = mixer.repeated.plus(mixer.last, feed_forward.repeated)
    kept = next((kept for least, kept in BUDGET_STEPS if budget >= least), budget)
    share = {"full": 1.0, "slices": SLICES_OVER_FULL, "budget": (1 - kept) ** BUDGET_EXPONENT}.get(recompute, 0.0)
    return once.plus(Cost(whole.gpu * share, whole.host * share))


def ends_cost(batch: Microbatch) -> Cost:
    """Embedding, final norm, head and loss, with their gradients."""
    model, N, D = batch.model, batch.tokens, batch.model.d_model
    vocabulary = model.vocab_size / batch.tensor_ranks
    chunk_tokens = choose_chunk_tokens(N, model.vocab_size, D, element_bytes=batch.element_bytes, scratch_bytes=SCRATCH_BYTES)
    # Each chunk of the loss reads and writes the gradient of the head.
    gradient = math.ceil(N / chunk_tokens) * 2 * FP32_BYTES * vocabulary * D / batch.rates.memory
    products = (1 + BACKWARD_OVER_FORWARD) * batch.product(N, D, vocabulary)
    passes = batch.moved(LOGIT_PASSES * N * vocabulary + END_PASSES * N * D / batch.tensor_ranks)
    return Cost(products + gradient + passes, ENDS_HOST_SECONDS)


def weights_cost(batch: Microbatch, numbers: float, *, accumulates: bool) -> Cost:
    """Cost per microbatch of casting this many weights and accumulating their gradients."""
    cast_bytes = sum(_style(batch).cast_bytes) if batch.element_bytes < FP32_BYTES else 0
    return Cost(numbers * (cast_bytes + ACCUMULATED_BYTES * accumulates) / batch.rates.memory)


def _style(batch: Microbatch) -> Style:
    return COMPILED if batch.is_compiled else EAGER


def _mixer(batch: Microbatch, window: int) -> Half:
    model, N, style = batch.model, batch.tokens, _style(batch)
    inner, rank = model.attention_width / batch.tensor_ranks, model.low_rank_rank
    out = _row(batch, inner, rank)
    joint = inner + 2 * model.key_value_width / batch.tensor_ranks
    is_unwritten = _has_unwritten_projections(batch)
    products = out + (batch.product(N / batch.tensor_ranks, model.d_model, 3 * rank) if is_unwritten else _columns(batch, 3, joint, rank))
    has_path, has_gates = model.has_global_path, model.has_channel_gate
    if has_path:
        products += batch.product(N / batch.tensor_ranks, model.d_model, model.scalars_per_head * model.num_heads)
    if has_gates:
        products += _columns(batch, 1, inner, model.head_width)

    def others(direction: int) -> float:
        """Kernels of the mixer, gates and norms."""
        flops = 4 * N * inner * (BACKWARD_OVER_FORWARD if direction else 1) / batch.rates.peak
        is_causal = model.block == "transformer"
        seconds = flops * mean_visible_keys(model, window) / (CAUSAL_SHARES if is_causal else WINDOW_SHARES)[direction]
        if has_path:
            over_linear = DELTA_OVER_LINEAR if model.global_path == "delta" else 1
            seconds += over_linear * flops * model.head_width / RECURRENCE_SHARES[direction]
        passes = (CAUSAL_PASSES if is_causal else KERNEL_PASSES)[direction] + style.mixed[direction] + has_gates * GATE_PASSES[direction]
        if batch.context_ranks > 1 and not is_causal:
            passes += SLICE_PASSES[direction]
        passes -= is_unwritten * UNWRITTEN_PASSES[direction]
        return seconds + batch.moved(N * joint / 3 * passes)

    # Where q, k and v are unwritten, weights are folded and sums added by kernels of about a pair more.
    return _half(batch, products, (others(0), others(1)), out, share=MIXER_SHARE, num_pairs=(4 + is_unwritten if rank else 0) + has_gates)


def _has_unwritten_projections(batch: Microbatch) -> bool:
    """Whether one operator computes q, k and v from their bottlenecks and all that follows, as the mixer chooses where nothing is sliced."""
    model = batch.model
    if not model.low_rank_rank or model.block == "transformer" or batch.context_ranks > 1:
        return False
    sizes = {"rank": model.low_rank_rank, "head_size": model.head_width, "num_taps": model.convolution_taps}
    return takes_bottlenecks(**sizes, num_outputs=batch.tokens * model.attention_width, element_bytes=batch.element_bytes)


def _feed_forward(batch: Microbatch) -> Half:
    model, style = batch.model, _style(batch)
    width, rank = model.feed_forward_width / batch.tensor_ranks, model.feed_forward_rank
    if rank and rank <= MAX_RANK:
        N, own = batch.tokens, batch.tokens / batch.tensor_ranks
        products = batch.product(own, model.d_model, 2 * rank) + batch.product(own, rank, model.d_model)
        flops = 2 * 3 * N * rank * width / batch.rates.peak
        between = (flops / BOTTLENECK_SHARES[0], BACKWARD_OVER_FORWARD * flops / BOTTLENECK_SHARES[1])
        return _half(batch, products, between, batch.product(own, rank, model.d_model), share=1 - MIXER_SHARE, num_pairs=2)
    down = _row(batch, width, rank)
    forward, backward = (batch.moved(batch.tokens * width * passes) for passes in style.gated)
    return _half(batch, _columns(batch, 2, 2 * width, rank) + down, (forward, backward), down, share=1 - MIXER_SHARE, num_pairs=3 if rank else 0)


def _experts(batch: Microbatch) -> Half:
    """A mixture of experts: router, rows copied to experts and back, their products, and those of shared experts."""
    model, style, N = batch.model, _style(batch), batch.tokens
    is_padded = batch.expert_ranks > 1 and not model.has_counted_rows(context_parallel_size=batch.context_ranks)
    filled, rows = N * model.top_k, N * model.rows_per_token(model.sequence_length, is_padded=is_padded)
    width = model.expert_width / batch.tensor_ranks
    shared = model.shared_experts * width
    products = batch.product(N / batch.tensor_ranks, model.d_model, model.num_experts)
    products += 2 * batch.product(filled, model.d_model, width) + batch.product(filled, width, model.d_model)
    if shared:
        products += batch.product(N, model.d_model, 2 * shared) + batch.product(N, shared, model.d_model)
    forward, backward = (
        batch.moved((rows * width + N * shared) * gated + rows * model.d_model * (copied + FILLED_PASSES * is_padded))
        for gated, copied in zip(style.gated, ROW_PASSES, strict=True)
    )
    return _half(batch, products, (forward, backward), 0.0, share=1 - MIXER_SHARE, num_pairs=ROUTER_KERNEL_PAIRS)


def _half(batch: Microbatch, products: float, others: Both, last: float, *, share: float, num_pairs: int) -> Half:
    """Cost of either half of a layer.

    Args:
        batch: The microbatch.
        products: Seconds of the products of the forward.
        others: Seconds of work that only this half has.
        last: Seconds of the last product.
        share: Share of the layer's kernels and of their launch time.
        num_pairs: Number of low-rank linears.
    """
    style = _style(batch)

    def cost(direction: int) -> Cost:
        passes = (style.stream[direction] + EMBEDDING_PASSES[direction] * batch.model.embedding_scalars) / 2
        stream = batch.moved(batch.tokens * batch.model.d_model / batch.tensor_ranks * passes)
        num_kernels = share * style.kernels[direction] + num_pairs * PAIR_KERNELS[direction]
        gpu = products * (BACKWARD_OVER_FORWARD if direction else 1) + others[direction] + stream + num_kernels * KERNEL_SECONDS
        return Cost(gpu, share * style.host[direction] + num_pairs * style.pair_host[direction])

    forward = cost(0)
    return Half(forward, cost(1), Cost(last), repeated=Cost(forward.gpu - last, forward.host * style.repeated_host))


def _columns(batch: Microbatch, count: int, width: float, rank: int) -> float:
    """Seconds of `count` linears with the same input, of so many outputs together."""
    N, D = batch.tokens, batch.model.d_model
    if not rank:
        return batch.product(N, D, width)
    # One product after the bottlenecks, with zeros between its blocks.
    return batch.product(N / batch.tensor_ranks, D, count * rank) + batch.product(N, count * rank, width)


def _row(batch: Microbatch, width: float, rank: int) -> float:
    """Seconds of a linear into the residual stream."""
    N, D = batch.tokens, batch.model.d_model
    if not rank:
        return batch.product(N, width, D)
    return batch.product(N, width, rank) + batch.product(N / batch.tensor_ranks, rank, D)
