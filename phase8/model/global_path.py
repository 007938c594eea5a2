"""The global path of the mixer: a gated recurrence over the whole past, and the Green chain that modulates decay and gate.

The recurrence is gated linear attention, which adds each token to its memory, or the gated delta rule, which replaces what a key holds.

Every part is local to a head. Shapes: B batch, T tokens, D model width, H heads, K head size.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from phase8.config.model_section import ModelSection
from phase8.context_parallel.green import NUMBERS_OF_GRADIENT, NUMBERS_OF_MAP
from phase8.context_parallel.linear_attention import begin_linear_attention, linear_attention_exchanges
from phase8.context_parallel.slices import EarlierSlices
from phase8.distributed.collectives import ALONE, Axis, begin_to_gather
from phase8.exchanges import NO_EXCHANGES, Exchanges, gathered, told
from phase8.kernels.decay_and_gate import DecayAndGate, bounded_potential
from phase8.kernels.decoding_state import GlobalConstants, GreenConstants
from phase8.kernels.dtypes import at_least_fp32
from phase8.kernels.gated_delta_rule import gated_delta_rule
from phase8.kernels.gated_linear_attention import gated_linear_attention
from phase8.kernels.green_scan import green_scan
from phase8.kernels.mixer_inputs import MixerInputs
from phase8.kernels.state_map import state_map
from phase8.model.mixer_state import GlobalState
from phase8.model.norm import RMSNorm
from phase8.precision.formats import NumberFormat
from phase8.tensor_parallel.linear import JointColumnLinear, LowRankColumn, WideLinear
from phase8.tensor_parallel.parameters import ParameterSpec, inverse_softplus, local

ETA_MIN = 0.1
INITIAL_ETA = 0.5
# A memory so short that the decay would begin below this share of its floor begins there, where the sigmoid still has a gradient.
LARGEST_SHARE_OF_FLOOR = 0.99
# After its norm the global path is at first ten times as large as the local one: a half-open gate would drown what the local path learns
# (docs/quality.md). Alone in its layer, it has nothing to drown.
INITIAL_GATE = -3.0
INITIAL_GATE_ALONE = 0.0


class Projections(NamedTuple):
    """What the global path computes from the mixer's input by linear layers.

    Args:
        scalars: Function that waits for the scalars of all heads, in fp32 [..., scalars per head * heads], and returns them.
        gate: Logits of a gate per channel for all tokens and the heads of this rank [..., H K]; None: the gate is among the scalars.
    """

    scalars: Callable[[], Tensor]
    gate: Tensor | None


class _Modulation(NamedTuple):
    """What the scalars of a head and token become, in fp32 [B, T, H].

    Args:
        log_decay: Logarithm of the decay, not positive.
        gate: Share of the global path that is added to the local one [B, T, H, 1], or of each of its channels [B, T, H, K].
        rate: Share of what a key holds that the delta rule replaces, over the squared length of a key; None: gated linear attention.
        green: State of the chain after the last token [B, H, 2]; None without the chain.
    """

    log_decay: Tensor
    gate: Tensor
    rate: Tensor | None
    green: Tensor | None


class Prepared(NamedTuple):
    """What the global path has ready before its recurrence.

    Args:
        modulation: Decays, gates and rates.
        recurrence: Function that waits for what was before the first token, and returns y [B, T, H, K] and the memory after the last one; None:
            another rank goes on.
        v: Values [B, T, H, K].
    """

    modulation: _Modulation
    recurrence: Callable[[], tuple[Tensor, Tensor | None]]
    v: Tensor


class GreenChain(nn.Module):
    """A short nonlinear filter of a scalar potential per head; its output modulates decay and gate.

    Args:
        num_heads: Number of heads H.
        modulates: Modulated quantity: `decay`, `gate` or `both`.
        earlier: Slices of the sequence on other ranks; None: this rank has the sequence whole.
    """

    def __init__(self, num_heads: int, modulates: str, *, earlier: EarlierSlices | None):
        super().__init__()
        self.earlier = earlier
        self.energy = nn.Parameter(torch.empty(num_heads))
        self.eta_raw = nn.Parameter(torch.empty(num_heads))
        self.hopping_raw = nn.Parameter(torch.empty(num_heads))
        self.decay_mix = nn.Parameter(torch.empty(num_heads, 2)) if modulates in ("decay", "both") else None
        self.gate_mix = nn.Parameter(torch.empty(num_heads, 2)) if modulates in ("gate", "both") else None

    def parameter_specs(self) -> dict[str, ParameterSpec]:
        """Energies spread over the band, unit hopping, and mixing weights of zero: at first the chain changes nothing."""
        specs = {
            "energy": ParameterSpec(value=torch.linspace(-1.5, 1.5, len(self.energy)), divided={"tp": 0}),
            "eta_raw": ParameterSpec(value=inverse_softplus(INITIAL_ETA - ETA_MIN), divided={"tp": 0}),
            "hopping_raw": ParameterSpec(value=inverse_softplus(1.0), divided={"tp": 0}),
        }
        for name, parameter in (("decay_mix", self.decay_mix), ("gate_mix", self.gate_mix)):
            if parameter is not None:
                specs[name] = ParameterSpec(divided={"tp": 0})
        return specs

    def forward(self, u: Tensor, starts: Tensor | None, state: Tensor | None) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Runs the chain over raw potentials u, fp32 [B, T, H].

        Returns:
            The state for the next piece [B, H, 2] (None: another rank goes on), the log of the factor on the decay rate [B, T, H] and the
            term added to the gate [B, T, H]; each of the last two is None where the chain does not modulate it.
        """
        arguments = (bounded_potential(u), *self.coefficients(), starts)
        g, state = green_scan(*arguments, state) if self.earlier is None else (self.earlier.green_scan(*arguments), None)
        decay, gate = (None if mix is None else (g * local(mix)).sum(-1) for mix in (self.decay_mix, self.gate_mix))
        return state, decay, gate

    def coefficients(self) -> tuple[Tensor, Tensor, Tensor]:
        """Energy, imaginary part of the energy, and squared hopping [H], in fp32 even of an engine that computes with parameters in bf16."""
        energy, eta_raw, hopping_raw = (at_least_fp32(local(each)) for each in (self.energy, self.eta_raw, self.hopping_raw))
        return energy, ETA_MIN + F.softplus(eta_raw), F.softplus(hopping_raw)

    def prepared(self) -> GreenConstants:
        """Constants of the chain of one rank for decoding."""
        mixes = (None if mix is None else mix.detach() for mix in (self.decay_mix, self.gate_mix))
        return GreenConstants(*(each.detach() for each in self.coefficients()), *mixes)


class GlobalPath(nn.Module):
    """The global path, per head: gate * norm(recurrence).

    Args:
        model: Model section of the layer, with widths, heads, recurrence, chain and window.
        axis: Axis of tensor parallelism, whose ranks divide the heads.
        number_format: Format that computes the products of a gate per channel.
        context: Axis of the ranks that share each sequence.
    """

    def __init__(self, model: ModelSection, *, axis: Axis, number_format: NumberFormat, context: Axis = ALONE):
        super().__init__()
        self.earlier = EarlierSlices(context) if context.size > 1 else None
        self.axis = axis
        self.initial_gate = INITIAL_GATE if any(model.window_sizes) else INITIAL_GATE_ALONE
        self.num_heads, self.head_size, self.memory_tokens = model.num_heads // axis.size, model.head_width, model.memory_tokens
        self.chain = GreenChain(model.num_heads, model.chain, earlier=self.earlier) if model.chain != "none" else None
        self.is_delta, self.decay_floor = model.global_path == "delta", model.decay_floor
        self.has_silu_gate = model.global_gate_activation == "silu"
        # Each head and token has a decay step, a gate unless every channel has one, with the chain a potential, and for the delta rule a share.
        # The order is head-major, so that heads shard as rows.
        self.scalars = WideLinear(model.d_model, model.num_heads * model.scalars_per_head, std=model.init_std)
        self.gate = None
        if model.has_channel_gate:
            self.gate = LowRankColumn(model.d_model, model.attention_width, rank=model.head_width, std=model.init_std)
        self.gates = None if self.gate is None else JointColumnLinear((self.gate,), axis, number_format)
        self.decay_bias = nn.Parameter(torch.empty(model.num_heads))
        self.gate_bias = nn.Parameter(torch.empty(model.num_heads))
        self.skip = nn.Parameter(torch.empty(model.num_heads)) if model.global_skip else None
        self.norm = RMSNorm(model.num_heads, model.head_width, eps=model.norm_eps, divided={"tp": 0})

    def parameter_specs(self) -> dict[str, ParameterSpec]:
        """Decays whose memory lengths are spread over the heads on a logarithmic scale, and a gate that is nearly closed beside a window."""
        first, last = map(math.log10, self.memory_tokens)
        memory = torch.logspace(first, last, len(self.decay_bias), dtype=torch.float64)
        if self.decay_floor is None:
            decay_bias = torch.log(torch.expm1(1 / memory)).float()
        else:
            decay_bias = torch.logit((-1 / (memory * self.decay_floor)).clamp(max=LARGEST_SHARE_OF_FLOOR)).float()
        skip = {} if self.skip is None else {"skip": ParameterSpec(value=1.0, divided={"tp": 0})}
        return skip | {
            "decay_bias": ParameterSpec(value=decay_bias, divided={"tp": 0}),
            "gate_bias": ParameterSpec(value=self.initial_gate, divided={"tp": 0}),
        }

    def exchanges(self) -> Exchanges:
        """The gathers of the scalars of all heads, of the bottleneck of a gate per channel, and of what slices do to the chain and to the memory."""
        gate = NO_EXCHANGES if self.gates is None else self.gates.exchanges()
        num_heads = len(self.decay_bias)
        chain = NO_EXCHANGES if self.chain is None else told(NUMBERS_OF_MAP * num_heads, NUMBERS_OF_GRADIENT * num_heads)
        size = self.head_size
        memory = told(2 * num_heads * size * size) if self.is_delta else linear_attention_exchanges(num_heads, size)
        return gathered(self.scalars.weight.shape[0], is_wide=True).then(gate).then(chain).then(memory)

    def empty_state(self, batch_size: int, *, dtype: torch.dtype, device: torch.device) -> GlobalState:
        """The state before the first token, zeros in fp32 or wider."""
        wide = {"dtype": torch.promote_types(dtype, torch.float32), "device": device}
        green = None if self.chain is None else torch.zeros(batch_size, self.num_heads, 2, **wide)
        return GlobalState(torch.zeros(batch_size, self.num_heads, self.head_size, self.head_size, **wide), green)

    def prepared(self) -> GlobalConstants:
        """Constants of the global path of one rank for decoding; the mixer prepares its linear layers."""
        decay_and_gate = self._decay_and_gate(self.decay_bias.detach(), self.gate_bias.detach())
        chain = None if self.chain is None else self.chain.prepared()
        return GlobalConstants(decay_and_gate, chain, self.norm.weight.detach(), None if self.skip is None else self.skip.detach())

    def begin(self, x: Tensor) -> Projections:
        """Computes the scalars of every head and token from the mixer's input x, and begins to gather them; `prepare` waits for them.

        Each rank computes the scalars of all heads for its own tokens; the gather brings it those of all tokens. A gate per channel is computed
        for the rank's own heads.
        """
        scalars = begin_to_gather(self.scalars(x), self.axis)
        return Projections(scalars, None if self.gates is None else self.gates(x))

    def prepare(self, projections: Projections, inputs: MixerInputs, starts: Tensor | None, state: GlobalState | None) -> Prepared:
        """Prepares the recurrence; where ranks share the sequence, they begin to exchange what their slices do to the memory, and `forward` waits.

        Args:
            projections: Result of `begin`.
            inputs: Queries, keys and values.
            starts: Mask that is True where a token begins a document [B, T]; None: nowhere.
            state: State after the earlier pieces of the sequence; None: the sequence begins here.
        """
        own_heads = projections.scalars().chunk(self.axis.size, dim=-1)[self.axis.index]
        scalars = own_heads.reshape(*inputs.v.shape[:3], -1)
        channels = None if projections.gate is None else projections.gate.reshape(inputs.v.shape)
        modulation = self._modulation(scalars, channels, starts, None if state is None else state.green)
        return Prepared(modulation, self._begin_recurrence(modulation, inputs, starts, None if state is None else state.memory), inputs.v)

    def _begin_recurrence(
        self, modulation: _Modulation, inputs: MixerInputs, starts: Tensor | None, memory: Tensor | None
    ) -> Callable[[], tuple[Tensor, Tensor | None]]:
        """Begins what other ranks are needed for, and returns the function of `Prepared`."""
        (q, k, v), log_decay, rate, earlier = (inputs.global_q, inputs.global_k, inputs.v), modulation.log_decay, modulation.rate, self.earlier
        if earlier is None:
            if rate is None:
                return lambda: gated_linear_attention(q, k, v, log_decay, starts, memory)
            return lambda: gated_delta_rule(q, k, v, log_decay, rate, starts, memory)
        if rate is None:
            attended = begin_linear_attention(q, k, v, log_decay, starts, earlier.axis)
            return lambda: (attended(), None)
        entering = earlier.entering_state(state_map(k, v, log_decay, rate, starts))
        return lambda: (gated_delta_rule(q, k, v, log_decay, rate, starts, entering())[0], None)

    def forward(self, prepared: Prepared) -> tuple[Tensor, GlobalState | None]:
        """Returns the summand for the local path [B, T, H, K], and the state after the last token (None: another rank goes on)."""
        y, memory = prepared.recurrence()
        if self.skip is not None:
            y = y + local(self.skip).to(y.dtype)[:, None] * prepared.v
        y, modulation = self.norm(y), prepared.modulation
        return modulation.gate.to(y.dtype) * y, None if memory is None else GlobalState(memory, modulation.green)

    def _modulation(self, scalars: Tensor, channels: Tensor | None, starts: Tensor | None, state: Tensor | None) -> _Modulation:
        """What the scalars [B, T, H, scalars per head] and a gate per channel [B, T, H, K] become, with the chain's state before the first token."""
        carried = [state]

        def chain(u: Tensor) -> tuple[Tensor | None, Tensor | None]:
            assert self.chain is not None
            carried[0], decay, gate = self.chain(u, starts, state)
            return decay, gate

        decay_and_gate = self._decay_and_gate(local(self.decay_bias), local(self.gate_bias))
        log_decay, gate, rate = decay_and_gate.of(scalars, channels, None if self.chain is None else chain)
        return _Modulation(log_decay, gate, rate, carried[0])

    def _decay_and_gate(self, decay_bias: Tensor, gate_bias: Tensor) -> DecayAndGate:
        """How scalars become decay, gate and rate, from biases of this rank's heads."""
        return DecayAndGate(decay_bias, gate_bias, self.decay_floor, self.head_size if self.is_delta else None, self.has_silu_gate)
