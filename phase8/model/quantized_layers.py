"""Linear layers of trained models whose weights have eight or four bits."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from phase8.errors import ConfigError
from phase8.model.model import LanguageModel
from phase8.precision.weight_format import IN_WORDS, WeightFormat, WeightProduct
from phase8.tensor_parallel.linear import ColumnParallelLinear, JointColumnLinear, Linear, LowRankColumn, LowRankRow, RowParallelLinear

_DENSE = (Linear, ColumnParallelLinear, RowParallelLinear)  # not the sums in fp32 of routers and scalars


class QuantizedLinear(nn.Module):
    """The layer y = x W^T of whole numbers of few bits and their scales; it is not trained.

    Args:
        linear: Layer whose widths and device this one has; its weights are not read.
        weight_format: Format of its weights.
    """

    weight: Tensor
    scale: Tensor

    def __init__(self, linear: Linear, weight_format: WeightFormat):
        super().__init__()
        self.weight_format = weight_format
        self._product: WeightProduct = weight_format
        for name, (dtype, shape) in weight_format.tensors(linear.out_features, linear.in_features).items():
            self.register_buffer(name, torch.empty(shape, dtype=dtype, device=linear.weight.device))

    def forward(self, x: Tensor) -> Tensor:
        """Maps [..., D] to [..., F]."""
        return self._product.product(x, self.weight, self.scale)

    def arrange(self) -> None:
        """Lays the weights out as this device multiplies them fastest; their shapes are no longer those of the checkpoint."""
        self._product, self.weight, self.scale = self.weight_format.arranged(self.weight, self.scale)

    def prepared(self, dtype: torch.dtype) -> QuantizedLinear:
        """The layer for decoding: itself."""
        return self


@dataclass(frozen=True)
class JointQuantized:
    """Several layers of the same input, in the place of a `JointColumnLinear`."""

    layers: tuple[QuantizedLinear, ...]

    def __call__(self, x: Tensor) -> Tensor:
        """The outputs of the layers, concatenated."""
        return torch.cat([layer(x) for layer in self.layers], dim=-1)

    def prepared(self, dtype: torch.dtype) -> JointQuantized:
        """The layers for decoding: themselves."""
        return self


def hold_quantized(model: LanguageModel, weight_format: WeightFormat) -> list[str]:
    """Replaces the dense linear layers of all blocks by ones of few bits, without values yet.

    Embedding, head, norms, convolutions, scalars and low-rank pairs stay as they are.

    Args:
        model: Model of one rank.
        weight_format: Format of their weights.

    Returns:
        The names of the layers.

    Raises:
        ConfigError: The model has no such layers, or has experts.
    """
    bits = f"{IN_WORDS[weight_format.bits]} bits"
    if any(model.section.has_experts):
        raise ConfigError(f"model.ffn is moe, whose experts cannot have {bits} yet; use the weights as they are.")
    names = []
    for path, owner in list(model.blocks.named_modules(prefix="blocks")):
        if isinstance(owner, LowRankColumn | LowRankRow):
            continue
        replaced: dict[nn.Module, QuantizedLinear] = {}
        for name, layer in list(owner.named_children()):
            if type(layer) in _DENSE:
                replaced[layer] = QuantizedLinear(layer, weight_format)
                setattr(owner, name, replaced[layer])
                names.append(f"{path}.{name}")
        for name, joint in vars(owner).items():
            if isinstance(joint, JointColumnLinear) and joint.layers[0] in replaced:
                setattr(owner, name, JointQuantized(tuple(replaced[layer] for layer in joint.layers)))
    if not names:
        raise ConfigError(
            f"model.low_rank_rank is {model.section.low_rank_rank} and model.ffn is {model.section.ffn}: no block has a dense layer, whose weights "
            f"could have {bits}; use the weights as they are."
        )
    return names


def arrange(model: LanguageModel) -> None:
    """Lays the restored weights of few bits out as their device multiplies them fastest, layer by layer."""
    for module in model.modules():
        if isinstance(module, QuantizedLinear):
            module.arrange()
