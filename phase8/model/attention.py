"""Full causal attention of the transformer baseline.

Shapes: B batch, T tokens, D model width, H heads of queries, J heads of keys and values, K head size, P carried tokens.

With grouped-query attention J is below H, and head h of the queries reads head h J / H of the keys, rounded down.

Source: J. Ainslie et al., "GQA" (2023).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from phase8.config.model_section import ModelSection
from phase8.context_parallel.ring_attention import ring_attention
from phase8.context_parallel.slices import EarlierSlices
from phase8.distributed.collectives import ALONE, Axis
from phase8.exchanges import Exchanges, round_a_ring
from phase8.kernels.decoding_state import MixerConstants
from phase8.kernels.rotary import rotate
from phase8.kernels.running_sum import running_sum
from phase8.kernels.window_state import WindowState
from phase8.model.convolution import ShortConvolution
from phase8.model.mixer_state import MixerState
from phase8.model.mixer_step import MixerStep, SeparateProjections
from phase8.model.norm import QueryKeyNorm
from phase8.model.work import mean_visible_keys
from phase8.precision.formats import NumberFormat
from phase8.tensor_parallel.linear import JointColumnLinear, column_linear, row_linear

# Flash attention is the only backend of torch that shares keys on a GPU and keeps no scores: without a mask, in these dtypes, up to this head size.
_GROUPED_DTYPES = (torch.bfloat16, torch.float16)
_GROUPED_SIZE = 256


@dataclass(frozen=True)
class AttentionState:
    """Keys and values of every earlier token; they grow with the sequence.

    Args:
        keys: Keys [B, P, J, K].
        values: Values [B, P, J, K].
        documents: Number of the document of each key [B, P]; the last token seen so far has number 0, earlier documents less.
        convolution: Last taps - 1 inputs of the convolution [B, taps - 1, (H + 2 J) K].
    """

    keys: Tensor
    values: Tensor
    documents: Tensor
    convolution: Tensor

    def as_window(self) -> MixerState:
        """The same state as that of a window that holds all tokens."""
        none = self.keys[:, :0]
        window = WindowState(self.keys, self.values, none, none, self.documents, self.documents[:, :0], self.keys.shape[1])
        return MixerState(self.convolution, window, None)


class CausalAttention(nn.Module):
    """Scaled dot-product attention to every earlier token.

    Args:
        model: Model section with widths and heads.
        axis: Axis of tensor parallelism, whose ranks divide the heads.
        number_format: Format that computes the products of q, k, v and the output.
        context: Axis of the ranks that share each sequence. Keys and values go round a ring; where documents begin in the sequence, each rank fetches
            those of all slices before its own instead, and masks them, which is right, but no way to go far.
    """

    def __init__(self, model: ModelSection, *, axis: Axis, number_format: NumberFormat, context: Axis = ALONE):
        super().__init__()
        self.earlier = EarlierSlices(context) if context.size > 1 else None
        # Neither is compiled: torch's loop over the ranks looks at their numbers; and the compiler would leave the fetch out of the first slice's
        # recomputation, which gets no keys by it, so that the other ranks would wait for that rank.
        self.ring = torch.compiler.disable(ring_attention)
        self.all_keys = None if self.earlier is None else torch.compiler.disable(self.earlier.all_keys)
        width, inner, keys, rank = model.d_model, model.attention_width, model.key_value_width, model.low_rank_rank
        self.num_key_heads, self.head_size = model.key_value_heads // axis.size, model.head_width
        self.widths = [size // axis.size for size in (inner, keys, keys)]  # of q, k and v on this rank
        self.q, self.k, self.v = (column_linear(width, size, rank=rank, std=model.init_std) for size in (inner, keys, keys))
        self.qkv = JointColumnLinear((self.q, self.k, self.v), axis, number_format)
        self.convolution = ShortConvolution(
            keys, model.convolution_taps, num_ranks=axis.size, head_size=model.head_width, queries_per_key=model.queries_per_key
        )
        self.qk_norm = QueryKeyNorm(model.key_value_heads, model.head_width, eps=model.norm_eps) if model.has_qk_norm else None
        self.eps, self.silu_of_values = model.norm_eps, model.silu_of_values
        std = model.init_std / math.sqrt(2 * model.num_layers)
        self.out = row_linear(inner, width, rank=rank, std=std, axis=axis, number_format=number_format)

    def exchanges(self) -> Exchanges:
        """The exchanges of the joint product of q, k and v, of the slices of a sequence without documents, and of the output layer."""
        keys = round_a_ring(2 * self.convolution.num_channels)
        return self.qkv.exchanges().then(self.convolution.exchanges()).then(keys).then(self.out.exchanges())

    def mixing_flops(self, model: ModelSection) -> dict[str, float]:
        """FLOPs per token and part that a forward takes in addition to the linear layers.

        Args:
            model: Model section with the sequence length and the widths.
        """
        attention = 4 * model.attention_width * mean_visible_keys(model, model.sequence_length)
        return {"convolution": self.convolution.flops_per_token, "attention": attention}

    def empty_state(self, batch_size: int, *, dtype: torch.dtype, device: torch.device) -> AttentionState:
        """The state before the first token: no keys, no values, and zeros for the convolution."""
        nothing = torch.zeros(batch_size, 0, self.num_key_heads, self.head_size, dtype=dtype, device=device)
        documents = torch.zeros(batch_size, 0, dtype=torch.int32, device=device)
        return AttentionState(nothing, nothing, documents, self.convolution.empty_state(batch_size, dtype=dtype, device=device))

    def prepared(self, dtype: torch.dtype, *, has_rotary: bool, capacity: int) -> MixerStep:
        """The layer of one rank for decoding with a residual stream of a dtype: a window of `capacity` tokens, as many as are ever read."""
        queries_per_key = self.convolution.queries_per_key
        lengths = None if self.qk_norm is None else self.qk_norm.weight.detach()
        constants = MixerConstants(
            taps=self.convolution.prepared(dtype),
            scale=None if lengths is None else torch.cat((lengths.repeat_interleave(queries_per_key), lengths)),
            beta=None,
            global_path=None,
            gate_up=None,
            window=capacity,
            global_tokens=0,
            num_heads=queries_per_key * self.num_key_heads,
            num_key_heads=self.num_key_heads,
            has_silu=False,
            has_rotary=has_rotary,
            eps=self.eps,
            silu_of_values=self.silu_of_values,
        )
        return MixerStep(SeparateProjections(self.qkv.prepared(dtype)), constants, self.out.prepared(dtype))

    def forward(
        self, x: Tensor, angles: Tensor, starts: Tensor | None = None, state: AttentionState | None = None
    ) -> tuple[Tensor, AttentionState | None]:
        """Maps [B, T, D] to [B, T, D] (with several ranks, own tokens [n, D] to [n, D]), and returns the next state (None without `state`)."""
        qkv = self.qkv(x)
        qkv = qkv.reshape(-1, len(angles), qkv.shape[-1])
        before, own_starts = None if state is None else state.convolution, starts
        if self.earlier is not None:
            own_starts = self.earlier.own_part(starts, len(angles))
            before = None if self.convolution.taps is None else self.earlier.last_inputs(qkv, self.convolution.num_taps - 1, starts)()
        qkv, convolution = self.convolution(qkv, own_starts, before)
        q, k, v = (part.unflatten(-1, (-1, self.head_size)) for part in qkv.split(self.widths, dim=-1))
        if self.silu_of_values == "all":
            v = F.silu(v)
        if self.qk_norm is not None:
            q, k = self.qk_norm(q), self.qk_norm(k)
        q, k = rotate(q, angles), rotate(k, angles)
        documents = None if own_starts is None else running_sum(own_starts)
        if self.earlier is not None and documents is None:
            y = self.ring(*(part.transpose(1, 2) for part in (q, k, v)), self.earlier.axis)
            return self.out(y.transpose(1, 2).flatten(2)), None
        if self.all_keys is not None and starts is not None:
            keys, values, earlier_documents = self.all_keys(k, v, starts)
            k, v, documents = torch.cat((keys, k), 1), torch.cat((values, v), 1), torch.cat((earlier_documents, documents), 1)
        if state is not None:
            k, v = torch.cat((state.keys, k), 1), torch.cat((state.values, v), 1)
            own = state.documents.new_zeros(q.shape[:2]) if documents is None else documents
            documents = torch.cat((state.documents, own), 1)
        y = _attend(*(part.transpose(1, 2) for part in (q, k, v)), documents)
        carried = None if state is None else AttentionState(k, v, documents - documents[:, -1:], convolution)
        return self.out(y.transpose(1, 2).flatten(2)), carried


def _attend(q: Tensor, keys: Tensor, values: Tensor, documents: Tensor | None) -> Tensor:
    """Attention of the last queries [B, H, T, K] to all keys up to their own [B, J, P + T, K]; with documents [B, P + T], to those of their own."""
    is_whole = documents is None and q.shape[2] == keys.shape[2]
    # torch's mask for "the last queries" without T x (P + T) numbers, `causal_lower_right`, fails under dispatch modes.
    mask = None if is_whole else _mask(q.shape[2], keys.shape[2], documents, q.device)
    num_groups, queries_per_key = keys.shape[1], q.shape[1] // keys.shape[1]
    if queries_per_key == 1:
        return F.scaled_dot_product_attention(q, keys, values, attn_mask=mask, is_causal=is_whole)
    if q.shape[2] == 1:  # the heads that share a key are its queries, so no key is copied while text is generated
        y = F.scaled_dot_product_attention(q.view(len(q), num_groups, queries_per_key, -1), keys, values, attn_mask=mask)
        return y.reshape(q.shape)
    if is_whole and q.dtype in _GROUPED_DTYPES and q.shape[-1] <= _GROUPED_SIZE:
        return F.scaled_dot_product_attention(q, keys, values, is_causal=True, enable_gqa=True)
    keys, values = (x.repeat_interleave(queries_per_key, dim=1) for x in (keys, values))
    return F.scaled_dot_product_attention(q, keys, values, attn_mask=mask, is_causal=is_whole)


def _mask(num_queries: int, num_keys: int, documents: Tensor | None, device: torch.device) -> Tensor:
    """The attention mask [B or 1, 1, T, P + T]: True where a key is not later than the query and belongs to the same document [B, P + T]."""
    query = torch.arange(num_keys - num_queries, num_keys, device=device)
    visible = (torch.arange(num_keys, device=device) <= query[:, None])[None]
    if documents is not None:
        visible = visible & (documents[:, -num_queries:, None] == documents[:, None, :])
    return visible[:, None]
