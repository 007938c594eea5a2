"""The Phase 8 mixer: local window attention plus the gated global path.

Every part is local to a head. Shapes: B batch, T tokens, D model width, H heads, K head size.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from phase8.config.model_section import ModelSection
from phase8.context_parallel.slices import EarlierSlices
from phase8.distributed.collectives import ALONE, Axis
from phase8.exchanges import NO_EXCHANGES, Exchanges, fetched
from phase8.kernels.backends import keeps_for_backward, uses_triton
from phase8.kernels.decoding_state import MixerConstants
from phase8.kernels.limits import takes_bottlenecks
from phase8.kernels.low_rank_mixer_inputs import low_rank_mixer_inputs
from phase8.kernels.mixer_inputs import MixerInputs, mixer_inputs
from phase8.kernels.window_attention import window_attention
from phase8.kernels.window_state import WindowState, empty_window_state
from phase8.model.convolution import ShortConvolution
from phase8.model.global_path import GlobalPath
from phase8.model.mixer_state import MixerState
from phase8.model.mixer_step import JointProjections, MixerStep, SeparateProjections
from phase8.model.norm import QueryKeyNorm
from phase8.model.work import mean_visible_keys
from phase8.precision.formats import NumberFormat
from phase8.tensor_parallel.linear import (
    ColumnParallelLinear,
    JointColumnLinear,
    LowRankColumn,
    PreparedLinear,
    PreparedLowRank,
    column_linear,
    held,
    row_linear,
)
from phase8.tensor_parallel.parameters import ParameterSpec, inverse_softplus, local

INITIAL_RADIUS = 4.0
INITIAL_BETA = 2.0
SMALLEST_WEIGHT_BITS = 120.0


class LorentzScore(nn.Module):
    """Curvature and temperature of the hyperbolic score: every q and k lies at a learned radius from the origin.

    Args:
        num_heads: Number of heads H.
    """

    def __init__(self, num_heads: int):
        super().__init__()
        self.radius_raw = nn.Parameter(torch.empty(num_heads))
        self.beta_raw = nn.Parameter(torch.empty(num_heads))

    def parameter_specs(self) -> dict[str, ParameterSpec]:
        """A radius and a temperature whose scores span about the same range as those of normalised dot products."""
        return {
            "radius_raw": ParameterSpec(value=inverse_softplus(INITIAL_RADIUS), divided={"tp": 0}),
            "beta_raw": ParameterSpec(value=inverse_softplus(INITIAL_BETA), divided={"tp": 0}),
        }

    @property
    def beta(self) -> Tensor:
        """Inverse temperature [H], low enough that the weight of the farthest key, (2 + 4 radius^2)^-beta, is a normal fp32 number."""
        return torch.minimum(F.softplus(local(self.beta_raw)), SMALLEST_WEIGHT_BITS / torch.log2(2 + 4 * self.radius.square()))

    @property
    def radius(self) -> Tensor:
        """Distance of every query and key from the origin [H]."""
        return F.softplus(local(self.radius_raw))


class Phase8Mixer(nn.Module):
    """The Phase 8 mixer: the sum of the local path and the gated global path, or one of them alone.

    Args:
        model: Model section of the layer, with widths, heads, score, global path, chain, and the number of tokens W that the local path sees,
            the token itself included; 0: no local path.
        axis: Axis of tensor parallelism, whose ranks divide the heads.
        number_format: Format that computes the products of q, k, v, a gate per channel and the output.
        context: Axis of the ranks that share each sequence.
    """

    def __init__(self, model: ModelSection, *, axis: Axis, number_format: NumberFormat, context: Axis = ALONE):
        super().__init__()
        width, inner, rank = model.d_model, model.attention_width, model.low_rank_rank
        self.num_heads, self.head_size = model.num_heads // axis.size, model.head_width
        self.window, self.global_tokens, self.eps = model.window_sizes[0], model.global_tokens, model.norm_eps  # the section is that of one layer
        self.q, self.k, self.v = (column_linear(width, inner, rank=rank, std=model.init_std) for _ in range(3))
        self.qkv = JointColumnLinear((self.q, self.k, self.v), axis, number_format)
        for linear in (self.q, self.k, self.v):
            if isinstance(linear, LowRankColumn):
                linear.up.is_rounded = False  # the operator rounds weights, but not their gradients
        self.earlier = EarlierSlices(context) if context.size > 1 else None
        self.convolution = ShortConvolution(inner, model.convolution_taps, num_ranks=axis.size, head_size=model.head_width)
        self.score = LorentzScore(model.num_heads) if model.score == "lorentz" and self.window > 0 else None
        self.qk_norm = QueryKeyNorm(model.num_heads, model.head_width, eps=model.norm_eps) if model.has_qk_norm and self.window > 0 else None
        self.has_silu, self.silu_of_values = model.has_silu, model.silu_of_values
        self.global_path = GlobalPath(model, axis=axis, number_format=number_format, context=context) if model.has_global_path else None
        self.out = row_linear(inner, width, rank=rank, std=0.0, axis=axis, number_format=number_format)

    def exchanges(self) -> Exchanges:
        """The exchanges of the global path, of the joint product of q, k and v, of the slices of a sequence, and of the output layer."""
        path = NO_EXCHANGES if self.global_path is None else self.global_path.exchanges()
        width = self.convolution.num_channels
        window = fetched(2 * width, before=self.window - 1, first=self.global_tokens) if self.window > 0 else NO_EXCHANGES
        return path.then(self.qkv.exchanges()).then(self.convolution.exchanges()).then(window).then(self.out.exchanges())

    def mixing_flops(self, model: ModelSection) -> dict[str, float]:
        """FLOPs per token and part that a forward takes in addition to the linear layers; argument as of `CausalAttention.mixing_flops`.

        The recurrence is counted in its recurrent form, whatever a kernel does: MFU must not reward extra work. The update S += k v^T and the
        read S^T q take K^2 multiply-adds per head each; the delta rule first reads what the key holds, S^T k.
        """
        attention = 4 * model.attention_width * mean_visible_keys(model, self.window)
        parts = {"convolution": self.convolution.flops_per_token, "attention": attention}
        if self.global_path is None:
            return parts
        passes_over_state = 3 if model.global_path == "delta" else 2
        return parts | {"recurrence": 2 * passes_over_state * model.attention_width * model.head_width}

    def empty_state(self, batch_size: int, *, dtype: torch.dtype, device: torch.device) -> MixerState:
        """The state before the first token."""
        convolution = self.convolution.empty_state(batch_size, dtype=dtype, device=device)
        window = None if self.window == 0 else empty_window_state(batch_size, self.num_heads, self.head_size, like=convolution)
        path = self.global_path
        return MixerState(convolution, window, None if path is None else path.empty_state(batch_size, dtype=dtype, device=device))

    def prepared(self, dtype: torch.dtype, *, has_rotary: bool) -> MixerStep:
        """The mixer of one rank for decoding with a residual stream of a dtype."""
        path, lengths = self.global_path, self.score if self.score is not None else self.qk_norm
        scale = None if lengths is None else lengths.radius.detach() * self.head_size**-0.5
        project, gates = self._prepared_projections(dtype)
        constants = MixerConstants(
            taps=self.convolution.prepared(dtype),
            scale=None if scale is None else torch.cat((scale, scale)),
            beta=None if self.score is None else self.score.beta.detach(),
            global_path=None if path is None else path.prepared(),
            gate_up=None if gates is None else gates.up[0],
            window=self.window,
            global_tokens=self.global_tokens,
            num_heads=self.num_heads,
            num_key_heads=self.num_heads,
            has_silu=self.has_silu,
            has_rotary=has_rotary,
            eps=self.eps,
            silu_of_values=self.silu_of_values,
        )
        return MixerStep(project, constants, self.out.prepared(dtype))

    def _prepared_projections(self, dtype: torch.dtype) -> tuple[SeparateProjections | JointProjections, PreparedLowRank | None]:
        """The linear layers before the mixer for decoding, and those of a gate per channel, whose second one the mixer computes itself."""
        path = self.global_path
        if path is None:
            return SeparateProjections(self.qkv.prepared(dtype)), None
        gates = None if path.gates is None else path.gates.prepared(dtype)
        if uses_triton(path.scalars.weight) and isinstance(self.qkv, JointColumnLinear) and isinstance(self.q, ColumnParallelLinear):
            bottleneck = () if path.gate is None else (path.gate.down,)
            weight = held(dtype, self.q, self.k, self.v, *bottleneck, path.scalars)
            return JointProjections(weight, num_scalars=len(path.scalars.weight), rank=0 if gates is None else len(gates.down)), gates
        gate = None if gates is None else PreparedLinear(gates.down)
        return SeparateProjections(self.qkv.prepared(dtype), path.scalars.prepared(dtype), gate), gates

    def forward(
        self, x: Tensor, angles: Tensor, starts: Tensor | None = None, state: MixerState | None = None
    ) -> tuple[Tensor, MixerState | None]:
        """Applies the mixer to a sequence or to a piece of one.

        Args:
            x: Normalised residual stream [B, T, D]; with several ranks, its own tokens [n, D]. Where ranks share the sequence, it is their slice.
            angles: Rotary angles of the positions [T, K/2].
            starts: Mask that is True where a token begins a document [B, T]; None: nowhere. Where ranks share the sequence, that of all of it.
            state: State after the earlier pieces of the sequence; None: the sequence begins here and no state is returned.

        Returns:
            The summand for the residual stream, in the shape of x, and the state for the next piece (None without `state`).
        """
        # Whatever other ranks send is awaited where it is needed, and begun as early as possible.
        own_starts = starts if self.earlier is None else self.earlier.own_part(starts, len(angles))
        finish = self._begin_inputs(x, angles, starts, own_starts, state)
        projections = None if self.global_path is None else self.global_path.begin(x)
        inputs, convolution = finish()
        paths, window, path, prepared = [], None, None, None
        window_before = self._window_before(inputs, starts, state)
        if self.global_path is not None and projections is not None:
            own = inputs._replace(v=F.silu(inputs.v)) if self.silu_of_values == "global" else inputs
            prepared = self.global_path.prepare(projections, own, own_starts, None if state is None else state.global_path)
        if self.window > 0:
            y, window = self._attend(inputs, own_starts, window_before())
            paths.append(y)
        if self.global_path is not None and prepared is not None:
            y, path = self.global_path(prepared)
            paths.append(y)
        return self.out(sum(paths[1:], start=paths[0]).flatten(2)), None if state is None else MixerState(convolution, window, path)

    def _attend(self, inputs: MixerInputs, starts: Tensor | None, before: WindowState | None) -> tuple[Tensor, WindowState | None]:
        """The local path [B, T, H, K], and the state for the next piece (None without `before`)."""
        return window_attention(
            inputs.local_q,
            inputs.local_k,
            inputs.v,
            window=self.window,
            global_tokens=self.global_tokens,
            beta=None if self.score is None else self.score.beta,
            starts=starts,
            state=before,
        )

    def _begin_inputs(
        self, x: Tensor, angles: Tensor, starts: Tensor | None, own_starts: Tensor | None, state: MixerState | None
    ) -> Callable[[], tuple[MixerInputs, Tensor | None]]:
        """Computes what the inputs of both paths are made of; the result makes them, and the convolution's state for the next piece."""
        # Either gives queries and keys of the window a length; without both they keep theirs.
        lengths = self.score if self.score is not None else self.qk_norm
        taps, radius = self.convolution.taps, None if lengths is None else lengths.radius
        fixed = {"eps": self.eps, "silu": self.has_silu, "silu_values": self.silu_of_values == "all", "starts": own_starts}
        if self._takes_bottlenecks(x, state):
            bottlenecks = self.qkv.bottlenecks(x)
            bottlenecks = bottlenecks.reshape(-1, len(angles), bottlenecks.shape[-1])
            ups = [local(linear.up.weight) for linear in (self.q, self.k, self.v)]
            return lambda: (low_rank_mixer_inputs(bottlenecks, ups, taps, angles, radius, num_heads=self.num_heads, **fixed), None)
        qkv = self.qkv(x)
        before = self._inputs_before(qkv.reshape(-1, len(angles), qkv.shape[-1]), starts, state)
        qkv = qkv.reshape(-1, len(angles), 3, self.num_heads, self.head_size)
        return lambda: mixer_inputs(qkv, taps, angles, radius, **fixed, initial_state=before())

    def _takes_bottlenecks(self, x: Tensor, state: MixerState | None) -> bool:
        """Whether q, k and v are computed where the inputs of both paths are: they are of low rank, of whole sequences and of sizes that can be.

        On a CPU they are not: autograd keeps what the operator's backward would recompute.
        """
        if not isinstance(self.q, LowRankColumn) or keeps_for_backward(x) or state is not None or self.earlier is not None:
            return False
        return takes_bottlenecks(
            rank=self.q.down.out_features,
            head_size=self.head_size,
            num_taps=self.convolution.num_taps,
            num_outputs=x.numel() // x.shape[-1] * self.q.up.out_features,  # also of several ranks: each has a part of the tokens
            element_bytes=x.element_size(),
        )

    def _inputs_before(self, qkv: Tensor, starts: Tensor | None, state: MixerState | None) -> Callable[[], Tensor | None]:
        """Waits for the inputs of the convolution before these [B, taps - 1, 3 H K]; None: the sequence begins here."""
        if self.earlier is None or self.convolution.taps is None:
            return lambda: None if state is None else state.convolution
        return self.earlier.last_inputs(qkv, self.convolution.num_taps - 1, starts)

    def _window_before(self, inputs: MixerInputs, starts: Tensor | None, state: MixerState | None) -> Callable[[], WindowState | None]:
        """Waits for keys and values that were before these; None: the sequence begins here."""
        if self.earlier is None or self.window == 0:
            return lambda: None if state is None else state.window
        return self.earlier.window_state(inputs.local_k, inputs.v, window=self.window, global_tokens=self.global_tokens, starts=starts)
