"""The layers of the model. Weights have the names of phase8; `reset_parameters` gives them the values with which a training begins there.

Shapes: B batch, T tokens of a piece, D model width, H heads, J heads of keys and values (H, but for grouped-query attention), K head size,
R low rank.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .cache_phase8 import LayerState
from .configuration_phase8 import Phase8Config
from .operations_phase8 import Piece, at_least_fp32, attention, causal_convolution, first_tokens, green_chain, recurrence, rotate

ETA_MIN, POTENTIAL_MAX, SMALLEST_WEIGHT_BITS = 0.1, 2.0, 120.0
INITIAL_ETA, INITIAL_RADIUS, INITIAL_BETA, INITIAL_GATE, LARGEST_SHARE_OF_FLOOR = 0.5, 4.0, 2.0, -3.0, 0.99


class Linear(nn.Linear):
    """The layer y = x W^T.

    Args:
        in_features: Width of x.
        out_features: Width of y.
        std: Standard deviation of the initial weights.
    """

    def __init__(self, in_features: int, out_features: int, *, std: float):
        self.std = std  # before torch resets the parameters
        super().__init__(in_features, out_features, bias=False)

    def reset_parameters(self) -> None:
        """Draws normal weights."""
        nn.init.normal_(self.weight, std=self.std)


class WideLinear(Linear):
    """The layer y = x W^T in fp32 whatever the dtype of x, for results that are too sensitive to be rounded."""

    def forward(self, x: Tensor) -> Tensor:
        """Maps [..., in_features] to fp32 or wider [..., out_features]."""
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(at_least_fp32(x), at_least_fp32(self.weight))


class LowRankLinear(nn.Module):
    """The layer y = up(down(x)), whose product has the variance of a full matrix.

    Args:
        in_features: Width of x.
        out_features: Width of y.
        rank: Width R between the two.
        std: Standard deviation of the entries of the product.
    """

    def __init__(self, in_features: int, out_features: int, *, rank: int, std: float):
        super().__init__()
        self.down = Linear(in_features, rank, std=1 / math.sqrt(in_features))
        self.up = Linear(rank, out_features, std=std * math.sqrt(in_features / rank))

    def forward(self, x: Tensor) -> Tensor:
        """Maps [..., in_features] to [..., out_features]."""
        return self.up(self.down(x))


def linear(in_features: int, out_features: int, *, rank: int, std: float) -> Linear | LowRankLinear:
    """A full matrix, or a low-rank pair when `rank` is not 0."""
    return LowRankLinear(in_features, out_features, rank=rank, std=std) if rank else Linear(in_features, out_features, std=std)


class RMSNorm(nn.Module):
    """The norm x / rms(x) over the last dim, times a learned weight, computed in fp32.

    Args:
        shape: Shape of the weight.
        eps: Summand of the mean square.
    """

    def __init__(self, *shape: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.empty(shape)), eps

    def reset_parameters(self) -> None:
        """Begins with a plain normalisation."""
        nn.init.ones_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Normalises `x`; the result has its dtype."""
        return (rms_normalise(at_least_fp32(x), self.eps) * self.weight).to(x.dtype)


class QueryKeyNorm(RMSNorm):
    """The norm of queries and keys, with a learned number per head of keys that the head and its queries share."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalises [B, T, any multiple of J, K]."""
        lengths = self.weight.repeat_interleave(x.shape[-2] // len(self.weight))
        return (rms_normalise(at_least_fp32(x), self.eps) * lengths[:, None]).to(x.dtype)


def rms_normalise(x: Tensor, eps: float) -> Tensor:
    """Normalises over the last dim, without a weight."""
    return F.rms_norm(x, x.shape[-1:], eps=eps)


class LorentzScore(nn.Module):
    """Curvature and temperature of the hyperbolic score.

    Args:
        num_heads: Number of heads H.
        eps: Summand of the mean square.
    """

    def __init__(self, num_heads: int, *, eps: float):
        super().__init__()
        self.radius_raw, self.beta_raw, self.eps = nn.Parameter(torch.empty(num_heads)), nn.Parameter(torch.empty(num_heads)), eps

    def reset_parameters(self) -> None:
        """Begins with scores that span about the range of normalised dot products."""
        nn.init.constant_(self.radius_raw, _inverse_softplus(INITIAL_RADIUS))
        nn.init.constant_(self.beta_raw, _inverse_softplus(INITIAL_BETA))

    @property
    def radius(self) -> Tensor:
        """Distance of every query and key from the origin [H]."""
        return F.softplus(at_least_fp32(self.radius_raw))

    @property
    def beta(self) -> Tensor:
        """Inverse temperature [H], low enough that the weight of the farthest key is a normal fp32 number."""
        return torch.minimum(F.softplus(at_least_fp32(self.beta_raw)), SMALLEST_WEIGHT_BITS / torch.log2(2 + 4 * self.radius.square()))

    def forward(self, x: Tensor) -> Tensor:
        """Scales [B, T, H, K] to the radius of each head."""
        scale = self.radius[:, None] * x.shape[-1] ** -0.5
        return (rms_normalise(at_least_fp32(x), self.eps) * scale).to(x.dtype)


class ShortConvolution(nn.Module):
    """The causal depthwise convolution of queries, keys and values.

    Args:
        config: Config of the model.
    """

    def __init__(self, config: Phase8Config):
        super().__init__()
        self.head_size, queries_per_key = config.head_size, config.num_heads // config.key_heads
        self.weight = nn.Parameter(torch.empty(queries_per_key + 2, config.key_heads * config.head_size, config.convolution_size))

    def reset_parameters(self) -> None:
        """Begins as the identity."""
        nn.init.zeros_(self.weight)
        nn.init.ones_(self.weight[..., -1])

    def forward(self, x: Tensor, piece: Piece, state: LayerState | None) -> Tensor:
        """Maps [B, T, (H + 2 J) K] to the same shape."""
        # The heads of queries that share a head of keys stand side by side.
        of_queries = self.weight[:-2].unflatten(1, (-1, self.head_size)).transpose(0, 1).flatten(0, 2)
        taps = torch.cat((of_queries, self.weight[-2:].flatten(0, 1)))
        y, carried = causal_convolution(x, taps, None if state is None else state.convolution, piece)
        if state is not None:
            state.convolution = carried
        return y


class Mixer(nn.Module):
    """Attention to a window, or to everything, plus the gated recurrence; or one of them.

    Args:
        config: Config of the model.
        layer: Number of the layer.
    """

    def __init__(self, config: Phase8Config, layer: int):
        super().__init__()
        width, inner, rank, eps = config.d_model, config.attention_width, config.low_rank_rank, config.norm_eps
        self.head_size, self.widths = config.head_size, [heads * config.head_size for heads in (config.num_heads, config.key_heads, config.key_heads)]
        self.window, self.num_global, self.has_rotary = config.window_of(layer), config.global_tokens, config.has_rotary(layer)
        self.q, self.k, self.v = (linear(width, size, rank=rank, std=config.init_std) for size in self.widths)
        self.convolution = ShortConvolution(config) if config.convolution_size > 1 else None
        is_hyperbolic = config.block == "phase8" and config.score == "lorentz"
        self.has_silu_of_values = config.value_activation == "silu"
        self.score = LorentzScore(config.num_heads, eps=eps) if is_hyperbolic and self.window != 0 else None
        self.qk_norm = QueryKeyNorm(config.key_heads, eps=eps) if config.local_qk_norm and self.window != 0 else None
        self.global_path = GlobalPath(config) if config.has_global_path(layer) else None
        self.out = linear(inner, width, rank=rank, std=0.0 if config.block == "phase8" else config.init_std / math.sqrt(2 * config.num_layers))

    def forward(self, x: Tensor, piece: Piece, state: LayerState | None) -> Tensor:
        """Maps the normalised stream [B, T, D] to a summand for it, and advances the state (None: the sequence begins and ends here)."""
        qkv = torch.cat((self.q(x), self.k(x), self.v(x)), dim=-1)
        qkv = qkv if self.convolution is None else self.convolution(qkv, piece, state)
        q, k, v = (part.unflatten(-1, (-1, self.head_size)) for part in qkv.split(self.widths, dim=-1))
        v = F.silu(v) if self.has_silu_of_values else v
        paths = []
        if self.window != 0:
            paths.append(self._attend(q, k, v, piece, state))
        if self.global_path is not None:
            paths.append(self.global_path(x, q, k, v, piece, state))
        return self.out(sum(paths[1:], start=paths[0]).flatten(2))

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, piece: Piece, state: LayerState | None) -> Tensor:
        """Attention [B, T, H, K]."""
        if self.has_rotary:
            q, k = rotate(q, piece.angles), rotate(k, piece.angles)
        lengths = self.score if self.score is not None else self.qk_norm
        if lengths is not None:
            q, k = lengths(q), lengths(k)
        keys, values, shared = k, v, None
        if state is not None and state.keys is not None:
            keys, values = torch.cat((state.keys, k), dim=1), torch.cat((state.values, v), dim=1)
        if self.num_global and self.window is not None:
            before = (None, None) if state is None else (state.global_keys, state.global_values)
            shared = tuple(first_tokens(new, old, self.num_global, piece) for new, old in zip((k, v), before, strict=True))
        beta = None if self.score is None else self.score.beta
        y = attention(q, keys, values, shared, window=self.window, beta=beta, piece=piece)
        if state is not None:
            num_carried, total = keys.shape[1] - k.shape[1], keys.shape[1]
            kept = total if self.window is None else min(self.window - 1, total)
            state.keys, state.values = (piece.newest(each, num_carried, kept) for each in (keys, values))
            state.global_keys, state.global_values = shared or (None, None)
        return y


class GreenChain(nn.Module):
    """The chain of Green functions over a potential per head; it modulates decay and gate.

    Args:
        num_heads: Number of heads H.
        modulates: What it modulates: decay, gate or both.
    """

    def __init__(self, num_heads: int, modulates: str):
        super().__init__()
        self.energy, self.eta_raw, self.hopping_raw = (nn.Parameter(torch.empty(num_heads)) for _ in range(3))
        self.decay_mix = nn.Parameter(torch.empty(num_heads, 2)) if modulates in ("decay", "both") else None
        self.gate_mix = nn.Parameter(torch.empty(num_heads, 2)) if modulates in ("gate", "both") else None

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Spreads the energies over the band; at first the chain modulates nothing."""
        self.energy.copy_(torch.linspace(-1.5, 1.5, len(self.energy)))
        nn.init.constant_(self.eta_raw, _inverse_softplus(INITIAL_ETA - ETA_MIN))
        nn.init.constant_(self.hopping_raw, _inverse_softplus(1.0))
        for mix in (self.decay_mix, self.gate_mix):
            if mix is not None:
                nn.init.zeros_(mix)

    def forward(self, u: Tensor, piece: Piece, state: LayerState | None) -> tuple[Tensor | None, Tensor | None]:
        """The logarithm of the factor on the decay, and the term of the gate [B, T, H], each None where it is not modulated; u: [B, T, H]."""
        energy, eta_raw, hopping_raw = (at_least_fp32(each) for each in (self.energy, self.eta_raw, self.hopping_raw))
        potential = POTENTIAL_MAX * torch.tanh(u / POTENTIAL_MAX)
        before = None if state is None else state.chain
        g, last = green_chain(potential, energy, ETA_MIN + F.softplus(eta_raw), F.softplus(hopping_raw), before, piece)
        if state is not None:
            state.chain = last
        decay, gate = (None if mix is None else (g * mix).sum(-1) for mix in (self.decay_mix, self.gate_mix))
        return decay, gate


class GlobalPath(nn.Module):
    """The gated recurrence over the whole past, per head: gate * norm(recurrence).

    Args:
        config: Config of the model.
    """

    def __init__(self, config: Phase8Config):
        super().__init__()
        self.config, self.is_delta, self.has_silu = config, config.global_path == "delta", config.global_activation != "none"
        has_channels = config.global_gate == "channel"
        # Each head and token has a decay step, a gate unless every channel has one, with the chain a potential, and for the delta rule a rate.
        num_scalars = 1 + (not has_channels) + (config.chain != "none") + self.is_delta
        self.scalars = WideLinear(config.d_model, config.num_heads * num_scalars, std=config.init_std)
        self.gate = None
        if has_channels:
            self.gate = LowRankLinear(config.d_model, config.attention_width, rank=config.head_size, std=config.init_std)
        self.chain = GreenChain(config.num_heads, config.chain) if config.chain != "none" else None
        self.decay_bias, self.gate_bias = nn.Parameter(torch.empty(config.num_heads)), nn.Parameter(torch.empty(config.num_heads))
        self.skip = nn.Parameter(torch.empty(config.num_heads)) if config.global_skip else None
        self.norm = RMSNorm(config.num_heads, config.head_size, eps=config.norm_eps)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Spreads the memory lengths over the heads; beside a window the gate is nearly closed."""
        first, last = map(math.log10, self.config.memory_tokens)
        memory = torch.logspace(first, last, len(self.decay_bias), dtype=torch.float64)
        floor = self.config.decay_floor
        share = None if floor is None else (-1 / (memory * floor)).clamp(max=LARGEST_SHARE_OF_FLOOR)
        self.decay_bias.copy_(torch.log(torch.expm1(1 / memory)) if share is None else torch.logit(share))
        if self.skip is not None:
            nn.init.ones_(self.skip)
        windows = self.config.local_window_size
        nn.init.constant_(self.gate_bias, 0.0 if windows == 0 or (isinstance(windows, list) and 0 in windows) else INITIAL_GATE)

    def forward(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, piece: Piece, state: LayerState | None) -> Tensor:
        """The path [B, T, H, K] of the normalised stream [B, T, D] and of queries, keys and values; it advances the state."""
        scalars = iter(self.scalars(x).unflatten(-1, (len(self.decay_bias), -1)).unbind(-1))
        step = next(scalars) + self.decay_bias
        logits = (next(scalars)[..., None] if self.gate is None else self.gate(x).unflatten(-1, q.shape[-2:])) + self.gate_bias[:, None]
        factor = None
        if self.chain is not None:
            factor, term = self.chain(next(scalars), piece, state)
            logits = logits if term is None else logits + term[..., None]
        rate = torch.sigmoid(next(scalars)) / q.shape[-1] if self.is_delta else None
        q, k = (rms_normalise(F.silu(each) if self.has_silu else each, self.config.norm_eps) for each in (q, k))
        v = F.silu(v) if self.config.global_activation == "silu_with_values" else v
        y, memory = recurrence(q, k, v, self._log_decay(step, factor), rate, None if state is None else state.memory, piece)
        if state is not None:
            state.memory = memory
        y = self.norm(y if self.skip is None else y + self.skip.to(y.dtype)[:, None] * v)
        gate = F.silu(logits) if self.config.global_gate_activation == "silu" else torch.sigmoid(logits)
        return gate.to(y.dtype) * y

    def _log_decay(self, step: Tensor, factor: Tensor | None) -> Tensor:
        """Logarithm of the decay, from its step and the chain's logarithm of a factor [B, T, H]."""
        if self.config.decay_floor is not None:
            return self.config.decay_floor * torch.sigmoid(step if factor is None else step + factor)
        log_decay = -F.softplus(step)
        return log_decay if factor is None else log_decay * torch.exp(factor)


class SwiGLU(nn.Module):
    """The feed-forward down(silu(gate(x)) * up(x)).

    Args:
        config: Config of the model.
        inner: Width between gate and down.
        rank: Low rank R; 0: full matrices.
    """

    def __init__(self, config: Phase8Config, *, inner: int, rank: int = 0):
        super().__init__()
        self.gate, self.up = (linear(config.d_model, inner, rank=rank, std=config.init_std) for _ in range(2))
        self.down = linear(inner, config.d_model, rank=rank, std=config.init_std / math.sqrt(2 * config.num_layers))

    def forward(self, x: Tensor) -> Tensor:
        """Maps [..., D] to [..., D]."""
        return self.down(F.silu(self.gate(x)) * self.up(x))


def _inverse_softplus(value: float) -> float:
    return math.log(math.expm1(value))
