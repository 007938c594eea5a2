"""One token of both paths of the mixer, between its linear layers, for each of several sequences, whose state is written in place.

Shapes: B sequences, H heads of queries, J heads of keys and values, K head size, R rank of the gate per channel.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from phase8.kernels.decay_and_gate import bounded_potential
from phase8.kernels.decoding_state import GlobalConstants, GreenConstants, MixerConstants, MixerStepState, TokenPlace
from phase8.kernels.dtypes import at_least_fp32
from phase8.kernels.recurrence_step import delta_rule_step, green_step, linear_attention_step
from phase8.kernels.reference.residual_norm import normalised
from phase8.kernels.rotary import turn
from phase8.kernels.window_ring import ring_attention_step


def mixer_step(
    qkv: Tensor, scalars: Tensor | None, channels: Tensor | None, constants: MixerConstants, state: MixerStepState, place: TokenPlace
) -> Tensor:
    """Both paths, and their sum.

    Args:
        qkv: Projections to queries, keys and values [B, (H + 2 J) K]; what is wider than the state is rounded to its dtype.
        scalars: Scalars of each head, fp32 or wider [B, H * scalars per head]; None without a global path.
        channels: Bottleneck of a gate per channel [B, R]; None: the gate is among the scalars.
        constants: Constants of the layer.
        state: State before the token; after the call it is that after the token.
        place: Places of the tokens.

    Returns:
        The sum of the paths [B, H K], in the dtype of the state.
    """
    qkv = qkv.to(state.convolution.dtype)
    num_heads, num_key_heads = constants.num_heads, constants.num_key_heads
    inputs = _convolved(qkv, constants.taps, state.convolution).unflatten(1, (num_heads + 2 * num_key_heads, -1))
    qk, v = inputs[:, :-num_key_heads], inputs[:, -num_key_heads:]
    v = F.silu(v) if constants.silu_of_values == "all" else v
    y = None
    if constants.window and state.keys is not None and state.values is not None:
        q, k = _local(qk, constants, place).split((num_heads, num_key_heads), dim=1)
        ring = place.ring(constants.window, global_tokens=constants.global_tokens, dtype=qkv.dtype)
        y = ring_attention_step(q, k, v, state.keys, state.values, ring, constants.beta)
    if constants.global_path is not None and scalars is not None:
        q, k = normalised(F.silu(qk) if constants.has_silu else qk, constants.eps).chunk(2, dim=1)
        own = F.silu(v) if constants.silu_of_values == "global" else v
        gates = None if channels is None or constants.gate_up is None else F.linear(channels.to(v.dtype), constants.gate_up).view(v.shape)
        summand = _global(scalars.unflatten(1, (num_heads, -1)), gates, (q, k, own), constants.global_path, state, constants.eps)
        y = summand.to(v.dtype) if y is None else y + summand.to(v.dtype)
    assert y is not None  # a mixer has at least one path
    return y.flatten(1)


def _convolved(x: Tensor, taps: Tensor | None, before: Tensor) -> Tensor:
    """The convolution of one input [B, C] with those before it, which are moved up by one."""
    if taps is None:
        return x
    seen = torch.cat((before, x[:, None]), dim=1)
    before.copy_(seen[:, 1:])
    return (seen * taps).sum(1).to(x.dtype)


def _local(qk: Tensor, constants: MixerConstants, place: TokenPlace) -> Tensor:
    """Queries and keys of the window [B, H + J, K]."""
    if constants.has_rotary:
        qk = turn(qk, place.cos[:, None], place.sin[:, None])
    if constants.scale is None:
        return qk
    return (normalised(at_least_fp32(qk), constants.eps) * constants.scale[:, None]).to(qk.dtype)


def _global(
    scalars: Tensor, channels: Tensor | None, inputs: tuple[Tensor, Tensor, Tensor], constants: GlobalConstants, state: MixerStepState, eps: float
) -> Tensor:
    """The gated global path [B, H, K], in the dtype of the memory."""
    chain, green, memory = constants.chain, state.green, state.memory
    assert memory is not None
    run = None if chain is None or green is None else (lambda u: _chain(u, chain, green))
    log_decay, gate, rate = constants.decay_and_gate.of(scalars, channels, run)
    q, k, v = (at_least_fp32(part) for part in inputs)
    y = linear_attention_step(q, k, v, log_decay, memory) if rate is None else delta_rule_step(q, k, v, log_decay, rate, memory)
    y = y if constants.skip is None else y + constants.skip[:, None] * v
    return gate * (normalised(y, eps) * constants.norm_weight)


def _chain(u: Tensor, constants: GreenConstants, green: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """What the chain adds for raw potentials [B, H]; it writes its state."""
    g = green_step(bounded_potential(u), constants.energy, constants.eta, constants.hopping, green)
    decay, gate = (None if mix is None else (g * mix).sum(-1) for mix in (constants.decay_mix, constants.gate_mix))
    return decay, gate
