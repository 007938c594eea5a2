"""The matrices of trained models whose weights have eight or four bits, in the places of those of training.

Shapes: D model width, E experts, F width of a layer, S rows.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from phase8.errors import ConfigError
from phase8.expert_parallel.slots import Slots
from phase8.model.experts import Experts
from phase8.model.feed_forward import GatedStep, LowRankSwiGLU
from phase8.model.global_path import GlobalPath
from phase8.model.model import LanguageModel
from phase8.precision.weight_format import IN_WORDS, WeightFormat, WeightProduct, is_worthwhile
from phase8.tensor_parallel.linear import ColumnParallelLinear, JointColumnLinear, Linear, LowRankColumn, LowRankRow, RowParallelLinear

_DENSE = (Linear, ColumnParallelLinear, RowParallelLinear)  # not the sums in fp32 of routers and scalars


class QuantizedName(NamedTuple):
    """The names in a model of a weight of few bits and of its scales."""

    weight: str
    scale: str


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
        for name, (dtype, shape) in weight_format.tensors(linear.weight.shape).items():
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


class QuantizedPair(nn.Module):
    """The layer y = up(down(x)) of thin matrices, of which at least one has few bits.

    Args:
        down: First product.
        up: Second product.
    """

    def __init__(self, down: nn.Module, up: nn.Module):
        super().__init__()
        self.down, self.up = down, up

    def forward(self, x: Tensor) -> Tensor:
        """Maps [..., D] to [..., F]."""
        return self.up(self.down(x))

    def prepared(self, dtype: torch.dtype) -> QuantizedPair:
        """The layer for decoding: itself."""
        return self


@dataclass(frozen=True)
class JointQuantized:
    """Several layers of the same input, in the place of a `JointColumnLinear`."""

    layers: tuple[nn.Module, ...]

    def __call__(self, x: Tensor) -> Tensor:
        """The outputs of the layers, concatenated."""
        return torch.cat([layer(x) for layer in self.layers], dim=-1)

    def prepared(self, dtype: torch.dtype) -> JointQuantized:
        """The layers for decoding: themselves."""
        return self


class QuantizedSwiGLU(nn.Module):
    """The feed-forward down(silu(gate(x)) * up(x)) of low-rank pairs, in the place of a `LowRankSwiGLU`, whose operator takes no weights of few bits.

    Args:
        gate: Pair of the gate.
        up: Pair of what it multiplies.
        down: Pair of the output.
    """

    def __init__(self, gate: nn.Module, up: nn.Module, down: nn.Module):
        super().__init__()
        self.gate, self.up, self.down = gate, up, down

    def forward(self, x: Tensor) -> Tensor:
        """Maps [..., D] to [..., D]."""
        return self.down(F.silu(self.gate(x)) * self.up(x))

    def prepared(self, dtype: torch.dtype) -> GatedStep:
        """The feed-forward for decoding."""
        return GatedStep(JointQuantized((self.gate, self.up)), self.down)


class QuantizedExperts(nn.Module):
    """The experts of a layer, one product after the other; in the place of `Experts`.

    Args:
        experts: Experts whose widths and device these have; their weights are not read.
        weight_format: Format of their weights.
    """

    PARTS = ("gate", "up", "down")

    def __init__(self, experts: Experts, weight_format: WeightFormat):
        super().__init__()
        self.weight_format, self.num_experts = weight_format, len(experts.gate)
        for name in self.PARTS:
            weight = getattr(experts, name)
            for part, (dtype, shape) in weight_format.tensors(weight.shape).items():
                self.register_buffer(name if part == "weight" else _scale_of(name), torch.empty(shape, dtype=dtype, device=weight.device))

    def forward(self, rows: Tensor, slots: Slots, run: Callable[..., Any]) -> Any:
        """Has the experts computed; arguments as of `Experts.forward`."""
        return run(rows, slots, lambda count: [self._in_order])

    def prepared(self, dtype: torch.dtype) -> QuantizedExperts:
        """The experts for decoding: themselves."""
        return self

    def of_chosen(self, x: Tensor, chosen: Tensor) -> Tensor:
        """What the chosen experts [B, k] make of tokens [B, D]: [B, k, D]; the numbers of these are copied, and no others are read."""
        gate, up, down = (
            partial(self.weight_format.product_of_each, weight=weight[chosen], scale=scale[chosen]) for weight, scale in self._weights()
        )
        x = x[:, None]
        return down(F.silu(gate(x)) * up(x))

    def of_all(self, x: Tensor) -> Tensor:
        """What every expert makes of tokens [B, D]: [E, B, D]."""
        return torch.stack([self._of(expert, x) for expert in range(self.num_experts)])

    def _in_order(self, rows: Tensor, ends: Tensor) -> Tensor:
        """What the experts make of rows [S, D], which come one expert after the other; rows after the last end stay as they are."""
        *sizes, rest = torch.cat((ends, ends.new_tensor([len(rows)]))).diff(prepend=ends.new_zeros(1)).tolist()
        *groups, left = rows.split([*sizes, rest])
        return torch.cat([*(self._of(expert, group) for expert, group in enumerate(groups) if len(group)), left])

    def _of(self, expert: int, x: Tensor) -> Tensor:
        gate, up, down = (partial(self.weight_format.product, weight=weight[expert], scale=scale[expert]) for weight, scale in self._weights())
        return down(F.silu(gate(x)) * up(x))

    def _weights(self) -> Iterator[tuple[Tensor, Tensor]]:
        return ((self.get_buffer(name), self.get_buffer(_scale_of(name))) for name in self.PARTS)


def hold_quantized(model: LanguageModel, weight_format: WeightFormat, *, stored: Collection[str] | None = None) -> list[QuantizedName]:
    """Replaces matrices of all blocks by ones of few bits, without values yet: of dense and of low-rank layers, and of experts.

    Embedding, head, norms, convolutions, scalars, routers and the pair of a gate per channel stay as they are.

    Args:
        model: Model of one rank.
        weight_format: Format of their weights.
        stored: Names of the tensors of a checkpoint: what has a scale there is replaced. None: what takes fewer bytes so.

    Returns:
        The names of the weights.

    Raises:
        ConfigError: No weight of the model takes fewer bytes with few bits.
    """
    names: list[QuantizedName] = []

    def are_chosen(weights: dict[str, Tensor], scale_of: Callable[[str], str]) -> bool:
        found = [QuantizedName(name, scale_of(name)) for name in weights]
        if stored is None:
            is_chosen = all(is_worthwhile(weight_format, weight.shape) for weight in weights.values())
        else:
            is_chosen = all(name.scale in stored for name in found)
        names.extend(found if is_chosen else ())
        return is_chosen

    def replaced(layer: nn.Module, path: str) -> nn.Module:
        """The layer of few bits; or the layer itself."""
        if type(layer) in _DENSE:
            is_chosen = are_chosen({f"{path}.weight": layer.weight}, lambda name: f"{name.removesuffix('weight')}scale")
            return QuantizedLinear(layer, weight_format) if is_chosen else layer
        if isinstance(layer, Experts):
            weights = {f"{path}.{name}": getattr(layer, name) for name in QuantizedExperts.PARTS}
            return QuantizedExperts(layer, weight_format) if are_chosen(weights, _scale_of) else layer
        parts = {LowRankColumn: ("down", "up"), LowRankRow: ("down", "up"), LowRankSwiGLU: ("gate", "up", "down")}.get(type(layer), ())
        made = [replaced(getattr(layer, name), f"{path}.{name}") for name in parts]
        if all(new is getattr(layer, name) for new, name in zip(made, parts, strict=True)):
            return layer
        return QuantizedSwiGLU(*made) if isinstance(layer, LowRankSwiGLU) else QuantizedPair(*made)

    for path, owner in list(model.blocks.named_modules(prefix="blocks")):
        if not isinstance(owner, GlobalPath | LowRankColumn | LowRankRow | LowRankSwiGLU):
            _replace_layers(owner, lambda layer, name, path=path: replaced(layer, f"{path}.{name}"))
    if not names:
        raise ConfigError(
            f"model.d_model is {model.section.d_model}: no weight of a block takes fewer bytes with {IN_WORDS[weight_format.bits]} bits and its "
            "scales than in bf16; use the weights as they are."
        )
    return names


def scale_without_value(model: LanguageModel) -> str | None:
    """The name of a tensor of scales of which one is no finite number; None: there is none."""
    for path, module in model.named_modules():
        if isinstance(module, QuantizedLinear | QuantizedExperts):
            for name, values in module.named_buffers(recurse=False):
                if values.is_floating_point() and not values.isfinite().all():
                    return f"{path}.{name}"
    return None


def arrange(model: LanguageModel) -> None:
    """Lays the restored weights of few bits out as their device multiplies them fastest, layer by layer."""
    for module in model.modules():
        if isinstance(module, QuantizedLinear):
            module.arrange()


def _replace_layers(owner: nn.Module, replaced: Callable[[nn.Module, str], nn.Module]) -> None:
    """Puts other layers in the places of those of an owner, and what computes several of them together in the place of that."""
    changed = {}
    for name, layer in list(owner.named_children()):
        if (new := replaced(layer, name)) is not layer:
            changed[layer] = new
            setattr(owner, name, new)
    for name, joint in vars(owner).items():
        if isinstance(joint, JointColumnLinear) and not changed.keys().isdisjoint(joint.layers):
            setattr(owner, name, JointQuantized(tuple(changed.get(layer, layer) for layer in joint.layers)))


def _scale_of(expert_weight: str) -> str:
    return f"{expert_weight}_scale"
