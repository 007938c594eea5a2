"""Linear layers of trained models whose weights have eight bits."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from phase8.errors import ConfigError
from phase8.model.model import LanguageModel
from phase8.precision.int8 import int8_product
from phase8.tensor_parallel.linear import ColumnParallelLinear, JointColumnLinear, Linear, LowRankColumn, LowRankRow, RowParallelLinear

_DENSE = (Linear, ColumnParallelLinear, RowParallelLinear)  # not the sums in fp32 of routers and scalars


class Int8Linear(nn.Module):
    """The layer y = x W^T of whole numbers of eight bits and a scale for each output; it is not trained.

    Args:
        linear: Layer whose widths and device this one has; its weights are not read.
        is_dynamic: Whether activations are rounded to eight bits too.
    """

    weight: Tensor
    scale: Tensor

    def __init__(self, linear: Linear, *, is_dynamic: bool):
        super().__init__()
        device = linear.weight.device
        self.register_buffer("weight", torch.empty(linear.out_features, linear.in_features, dtype=torch.int8, device=device))
        self.register_buffer("scale", torch.empty(linear.out_features, dtype=torch.float32, device=device))
        self.is_dynamic = is_dynamic

    def forward(self, x: Tensor) -> Tensor:
        """Maps [..., D] to [..., F]."""
        return int8_product(x, self.weight, self.scale, is_dynamic=self.is_dynamic)

    def prepared(self, dtype: torch.dtype) -> Int8Linear:
        """The layer for decoding: itself."""
        return self


@dataclass(frozen=True)
class JointInt8:
    """Several layers of the same input, in the place of a `JointColumnLinear`."""

    layers: tuple[Int8Linear, ...]

    def __call__(self, x: Tensor) -> Tensor:
        """The outputs of the layers, concatenated."""
        return torch.cat([layer(x) for layer in self.layers], dim=-1)

    def prepared(self, dtype: torch.dtype) -> JointInt8:
        """The layers for decoding: themselves."""
        return self


def hold_in_int8(model: LanguageModel, *, is_dynamic: bool) -> list[str]:
    """Replaces the dense linear layers of all blocks by ones of eight bits, without values yet.

    Embedding, head, norms, convolutions, scalars and low-rank pairs stay as they are.

    Args:
        model: Model of one rank.
        is_dynamic: Whether activations are rounded to eight bits too.

    Returns:
        The names of the layers.

    Raises:
        ConfigError: The model has no such layers, or has experts.
    """
    if any(model.section.has_experts):
        raise ConfigError("model.ffn is moe, whose experts cannot have eight bits yet; use the weights as they are.")
    names = []
    for path, owner in list(model.blocks.named_modules(prefix="blocks")):
        if isinstance(owner, LowRankColumn | LowRankRow):
            continue
        replaced: dict[nn.Module, Int8Linear] = {}
        for name, layer in list(owner.named_children()):
            if type(layer) in _DENSE:
                replaced[layer] = Int8Linear(layer, is_dynamic=is_dynamic)
                setattr(owner, name, replaced[layer])
                names.append(f"{path}.{name}")
        for name, joint in vars(owner).items():
            if isinstance(joint, JointColumnLinear) and joint.layers[0] in replaced:
                setattr(owner, name, JointInt8(tuple(replaced[layer] for layer in joint.layers)))
    if not names:
        raise ConfigError(
            f"model.low_rank_rank is {model.section.low_rank_rank} and model.ffn is {model.section.ffn}: no block has a dense layer, whose weights "
            "could have eight bits; use the weights as they are."
        )
    return names
