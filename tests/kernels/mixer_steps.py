"""Inputs of decoding steps for tests, drawn at random."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from phase8.kernels.decay_and_gate import DecayAndGate
from phase8.kernels.decoding_state import GlobalConstants, MixerConstants, MixerStepState, TokenPlace
from phase8.kernels.rotary import angles_at, rotary_frequencies


@dataclass(frozen=True)
class StepCase:
    """What a layer is like, and where its sequences stand."""

    batch: int = 2
    heads: int = 2
    key_heads: int | None = None  # None: as many
    head_size: int = 8
    window: int = 9
    global_tokens: int = 0
    taps: int = 4
    scaled: bool = True
    rotary: bool = True
    silu: bool = False
    global_path: str | None = "given"
    channels: bool = True
    rank: int = 5  # of the gate per channel
    delta: bool = False
    floor: float | None = None
    silu_values: str = "none"
    silu_gate: bool = False
    skip: bool = False
    positions: tuple[int, ...] = (3, 20)

    def __str__(self):
        default = StepCase()
        return "-".join(f"{name}={value}" for name, value in vars(self).items() if value != vars(default)[name]) or "default"


    @property
    def num_key_heads(self):
        return self.key_heads or self.heads


@dataclass(frozen=True)
class Steps:
    """Inputs of several steps of a layer, and its state."""

    case: StepCase
    inputs: list[tuple[Tensor, Tensor | None, Tensor | None]]
    constants: MixerConstants
    state: MixerStepState
    position: Tensor
    is_joint: bool = False  # one product has computed all inputs, in fp32

    def moved(self, device: torch.device, dtype: torch.dtype) -> "Steps":
        """The same on a device: activations, keys and values in a dtype, all else in fp32, or in fp64 with it."""
        wide = torch.promote_types(dtype, torch.float32)

        def to(x, dtype):
            return None if x is None else x.to(device, dtype, copy=True)

        of_gate = wide if self.is_joint else dtype
        inputs = [(to(qkv, of_gate), to(scalars, wide), to(channels, of_gate)) for qkv, scalars, channels in self.inputs]
        path = self.constants.global_path
        if path is not None:
            gates = replace(path.decay_and_gate, **{name: to(vars(path.decay_and_gate)[name], wide) for name in ("decay_bias", "gate_bias")})
            path = GlobalConstants(gates, None, to(path.norm_weight, wide), to(path.skip, wide))
        constants = self.constants
        taps, scale, gate_up = to(constants.taps, wide), to(constants.scale, wide), to(constants.gate_up, dtype)
        constants = replace(constants, taps=taps, scale=scale, gate_up=gate_up, global_path=path)
        dtypes = {"memory": wide, "arrivals": torch.int32}
        parts = {name: to(x, dtypes.get(name, dtype)) for name, x in vars(self.state).items()}
        return replace(self, inputs=inputs, constants=constants, state=MixerStepState(**parts), position=self.position.to(device))

    def arguments(self, step: int) -> tuple:
        """Arguments of a step."""
        qkv, scalars, channels = self.inputs[step]
        position = self.position + step
        angles = angles_at(position, rotary_frequencies(self.case.head_size, base=1e4, device=position.device))
        wide = torch.promote_types(qkv.dtype, torch.float32)
        return qkv, scalars, channels, self.constants, self.state, TokenPlace(position, angles.cos().to(wide), angles.sin().to(wide))


def draw_step(case: StepCase, dtype: torch.dtype, *, steps: int) -> Steps:
    """Inputs and a state in fp64, which numbers of a dtype can hold."""
    generator, width = torch.Generator().manual_seed(0), case.heads * case.head_size
    row = width + 2 * case.num_key_heads * case.head_size

    def draw(*shape, dtype=dtype):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).double()

    wide, has_path = torch.float32, case.global_path is not None
    num_scalars = 1 + (not case.channels) + case.delta
    inputs = [
        (
            draw(case.batch, row),
            draw(case.batch, case.heads * num_scalars, dtype=wide) if has_path else None,
            draw(case.batch, case.rank) if has_path and case.channels else None,
        )
        for _ in range(steps)
    ]
    delta_size = case.head_size if case.delta else None
    gates = DecayAndGate(draw(case.heads, dtype=wide), draw(case.heads, dtype=wide), case.floor, delta_size, has_silu=case.silu_gate)
    constants = MixerConstants(
        taps=draw(case.taps, row) if case.taps > 1 else None,
        scale=1 + draw(case.heads + case.num_key_heads, dtype=wide).abs() if case.scaled else None,
        beta=None,
        global_path=GlobalConstants(
            gates, None, draw(case.heads, case.head_size, dtype=wide), draw(case.heads, dtype=wide) if case.skip else None
        ) if has_path else None,
        gate_up=draw(width, case.rank) * case.rank**-0.5 if has_path and case.channels else None,
        window=case.window,
        global_tokens=case.global_tokens,
        num_heads=case.heads,
        num_key_heads=case.num_key_heads,
        has_silu=case.silu,
        has_rotary=case.rotary,
        eps=1e-5,
        silu_of_values=case.silu_values,
    )
    slots = (case.batch, case.global_tokens + case.window, case.num_key_heads, case.head_size)
    state = MixerStepState(
        draw(case.batch, case.taps - 1, row),
        draw(*slots) if case.window else None,
        draw(*slots) if case.window else None,
        draw(case.batch, case.heads, case.head_size, case.head_size, dtype=wide) if has_path else None,
        None,
        torch.zeros(case.batch, case.heads, dtype=torch.int32),
    )
    return Steps(case, inputs, constants, state, torch.tensor((case.positions * case.batch)[: case.batch]))
