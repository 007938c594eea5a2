"""The state of a mixer after a piece of a sequence. Shapes: B batch, H heads, K head size."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from phase8.kernels.window_state import WindowState


@dataclass(frozen=True)
class GlobalState:
    """The state that the global path carries from token to token, in fp32.

    Args:
        memory: State of the recurrence [B, H, K, K].
        green: The Green function of the last token [B, H, 2]; None without the chain.
    """

    memory: Tensor
    green: Tensor | None

    def copied(self) -> GlobalState:
        """The same state in memory of its own."""
        return GlobalState(self.memory.clone(), None if self.green is None else self.green.clone())


@dataclass(frozen=True)
class MixerState:
    """The state after a piece of a sequence; its size is the same at any context length.

    Args:
        convolution: Last taps - 1 inputs of the convolution [B, taps - 1, 3 H K].
        window: Keys and values of the window and of the global tokens; None: the layer has no window.
        global_path: State of the global path; None: the mixer has none.
    """

    convolution: Tensor
    window: WindowState | None
    global_path: GlobalState | None

    def as_window(self) -> MixerState:
        """The state itself."""
        return self

    def copied(self) -> MixerState:
        """The same state in memory of its own."""
        return MixerState(*(None if part is None else part.clone() if isinstance(part, Tensor) else part.copied() for part in vars(self).values()))
