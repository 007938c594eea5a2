"""The Phase 8 mixer: local window attention, global gated linear attention, and the Green chain that modulates it.

Every part is local to a head. Shapes: B batch, T tokens, D model width, H heads, K head size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from phase8.config.schema import ModelSection
from phase8.kernels.gated_linear_attention import gated_linear_attention
from phase8.kernels.green_scan import green_scan
from phase8.kernels.mixer_inputs import mixer_inputs
from phase8.kernels.reference.window_state import WindowState, empty_window_state
from phase8.kernels.window_attention import window_attention
from phase8.model.convolution import ShortConvolution
from phase8.model.linear import WideLinear, build_linear, joint_linear
from phase8.model.norm import RMSNorm
from phase8.model.parameters import ParameterSpec

ETA_MIN = 0.1
INITIAL_ETA = 0.5
POTENTIAL_MAX = 2.0
MEMORY_TOKENS = (2.0, 500.0)
INITIAL_RADIUS = 4.0
INITIAL_BETA = 2.0
SMALLEST_WEIGHT_BITS = 120.0


@dataclass(frozen=True)
class MixerState:
    """What decoding keeps: constant memory at any context length.

    Args:
        convolution: The last taps - 1 inputs of the convolution [B, taps - 1, 3 H K].
        green: The Green function of the last token, fp32 [B, H, 2]; None without the chain.
        memory: State of the global path, fp32 [B, H, K, K].
        window: Keys and values of the window and of the global tokens.
    """

    convolution: Tensor
    green: Tensor | None
    memory: Tensor
    window: WindowState


class GreenChain(nn.Module):
    """A short nonlinear filter of a scalar potential per head, and how it modulates decay and gate.

    Args:
        num_heads: H.
        modulates: `decay`, `gate` or `both`.
    """

    def __init__(self, num_heads: int, modulates: str):
        super().__init__()
        self.energy = nn.Parameter(torch.empty(num_heads))
        self.eta_raw = nn.Parameter(torch.empty(num_heads))
        self.hopping_raw = nn.Parameter(torch.empty(num_heads))
        self.decay_mix = nn.Parameter(torch.empty(num_heads, 2)) if modulates in ("decay", "both") else None
        self.gate_mix = nn.Parameter(torch.empty(num_heads, 2)) if modulates in ("gate", "both") else None

    def parameter_specs(self) -> dict[str, ParameterSpec]:
        """Energies spread over the band, unit hopping, and mixing weights of zero: at first the chain changes nothing."""
        specs = {
            "energy": ParameterSpec(value=torch.linspace(-1.5, 1.5, len(self.energy))),
            "eta_raw": ParameterSpec(value=_inverse_softplus(INITIAL_ETA - ETA_MIN)),
            "hopping_raw": ParameterSpec(value=_inverse_softplus(1.0)),
        }
        for name, parameter in (("decay_mix", self.decay_mix), ("gate_mix", self.gate_mix)):
            if parameter is not None:
                specs[name] = ParameterSpec()
        return specs

    def forward(self, u: Tensor, starts: Tensor | None, state: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The chain over raw potentials u, fp32 [B, T, H].

        Returns:
            The state to carry on [B, H, 2], log of the factor on the decay rate [B, T, H], term added to the gate [B, T, H]; the last
            two None where the chain does not modulate.
        """
        potential = POTENTIAL_MAX * torch.tanh(u / POTENTIAL_MAX)
        eta = ETA_MIN + F.softplus(self.eta_raw)
        g, state = green_scan(potential, self.energy, eta, F.softplus(self.hopping_raw), starts, state)
        decay, gate = (None if mix is None else (g * mix).sum(-1) for mix in (self.decay_mix, self.gate_mix))
        return state, decay, gate


class LorentzScore(nn.Module):
    """Curvature and temperature of the hyperbolic score: every q and k lies at a learned radius from the origin.

    Args:
        num_heads: H.
    """

    def __init__(self, num_heads: int):
        super().__init__()
        self.radius_raw = nn.Parameter(torch.empty(num_heads))
        self.beta_raw = nn.Parameter(torch.empty(num_heads))

    def parameter_specs(self) -> dict[str, ParameterSpec]:
        """Radius and temperature whose scores span about as much as those of normalised dot products."""
        return {
            "radius_raw": ParameterSpec(value=_inverse_softplus(INITIAL_RADIUS)),
            "beta_raw": ParameterSpec(value=_inverse_softplus(INITIAL_BETA)),
        }

    @property
    def beta(self) -> Tensor:
        """Inverse temperature [H], low enough that the weight of the farthest key, (2 + 4 radius^2)^-beta, is a normal fp32 number."""
        return torch.minimum(F.softplus(self.beta_raw), SMALLEST_WEIGHT_BITS / torch.log2(2 + 4 * self.radius.square()))

    @property
    def radius(self) -> Tensor:
        """Distance of every query and key from the origin [H]."""
        return F.softplus(self.radius_raw)


class Phase8Mixer(nn.Module):
    """Local path + gate * global path.

    Args:
        model: Widths, heads, window, score and chain.
    """

    def __init__(self, model: ModelSection):
        super().__init__()
        width, inner, rank = model.d_model, model.attention_width, model.low_rank_rank
        self.num_heads, self.head_size = model.num_heads, model.head_width
        self.window, self.global_tokens, self.eps = model.local_window_size, model.global_tokens, model.norm_eps
        self.q, self.k, self.v = (build_linear(width, inner, rank=rank, std=model.init_std) for _ in range(3))
        self.convolution = ShortConvolution(3 * inner, model.convolution_taps)
        self.chain = GreenChain(model.num_heads, model.chain) if model.chain != "none" else None
        # Per head and token: decay step, gate and, with the chain, its potential. Head-major, so that heads shard as rows.
        self.scalars = WideLinear(width, model.num_heads * (3 if self.chain is not None else 2), std=model.init_std)
        self.score = LorentzScore(model.num_heads) if model.score == "lorentz" else None
        self.decay_bias = nn.Parameter(torch.empty(model.num_heads))
        self.gate_bias = nn.Parameter(torch.empty(model.num_heads))
        self.global_norm = RMSNorm(model.num_heads, model.head_width, eps=model.norm_eps)
        self.out = build_linear(inner, width, rank=rank, std=0.0)

    def parameter_specs(self) -> dict[str, ParameterSpec]:
        """Memories spread over the heads on a logarithmic scale; a gate half open."""
        short, long = MEMORY_TOKENS
        memory = torch.logspace(math.log10(short), math.log10(long), self.num_heads, dtype=torch.float64)
        return {"decay_bias": ParameterSpec(value=torch.log(torch.expm1(1 / memory)).float()), "gate_bias": ParameterSpec()}

    def empty_state(self, batch_size: int, *, dtype: torch.dtype, device: torch.device) -> MixerState:
        """The state before the first token."""
        convolution = self.convolution.empty_state(batch_size, dtype=dtype, device=device)
        wide = torch.promote_types(dtype, torch.float32)
        green = None if self.chain is None else torch.zeros(batch_size, self.num_heads, 2, dtype=wide, device=device)
        memory = torch.zeros(batch_size, self.num_heads, self.head_size, self.head_size, dtype=wide, device=device)
        return MixerState(convolution, green, memory, empty_window_state(batch_size, self.num_heads, self.head_size, like=convolution))

    def forward(
        self, x: Tensor, angles: Tensor, starts: Tensor | None = None, state: MixerState | None = None
    ) -> tuple[Tensor, MixerState | None]:
        """The mixer over a sequence or a piece of one.

        Args:
            x: Normalised residual stream [B, T, D].
            angles: Rotary angles of its positions [T, K/2].
            starts: True where a token begins a document [B, T]; None: nowhere.
            state: What earlier pieces carried; None: the sequence begins here and nothing is carried on.

        Returns:
            What is added to the residual stream [B, T, D], and the state to carry on (None without `state`).
        """
        inputs, convolution = mixer_inputs(
            joint_linear(x, self.q, self.k, self.v).unflatten(-1, (3, self.num_heads, self.head_size)),
            self.convolution.taps,
            angles,
            None if self.score is None else self.score.radius,
            eps=self.eps,
            starts=starts,
            initial_state=None if state is None else state.convolution,
        )
        log_decay, gate, green = self._modulation(x, starts, None if state is None else state.green)
        memory = None if state is None else state.memory
        y_global, memory = gated_linear_attention(inputs.global_q, inputs.global_k, inputs.v, log_decay, starts, memory)
        y_global = self.global_norm(y_global)
        y_local, window = window_attention(
            inputs.local_q,
            inputs.local_k,
            inputs.v,
            window=self.window,
            global_tokens=self.global_tokens,
            beta=None if self.score is None else self.score.beta,
            starts=starts,
            state=None if state is None else state.window,
        )
        y = self.out((y_local + gate[..., None].to(y_global.dtype) * y_global).flatten(2))
        return y, None if window is None else MixerState(convolution, green, memory, window)

    def _modulation(self, x: Tensor, starts: Tensor | None, state: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Decay log alpha [B, T, H], gate [B, T, H] and the state of the chain; fp32 from the scalars on."""
        step, gate, *potential = self.scalars(x).unflatten(-1, (self.num_heads, -1)).unbind(-1)
        log_decay, gate = -F.softplus(step + self.decay_bias), gate + self.gate_bias
        if self.chain is not None:
            state, decay_factor, gate_term = self.chain(potential[0], starts, state)
            log_decay = log_decay if decay_factor is None else log_decay * torch.exp(decay_factor)
            gate = gate if gate_term is None else gate + gate_term
        return log_decay, torch.sigmoid(gate), state


def _inverse_softplus(x: float) -> float:
    """The y with softplus(y) = x."""
    return math.log(math.expm1(x))
