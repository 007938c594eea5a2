"""Counts what autograd keeps for backward by tracing one block and the head on fake or meta tensors: exact shapes, no memory, no work.

A compiled block keeps what the partitioner of torch.compile chooses. That choice is made from the graph alone, before any code is
generated, so tracing through it (backend `aot_eager_decomp_partition`) gives the same tensors without a GPU or a compiler.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch._functorch import config as functorch_config
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves

from phase8.accelerator import GPU, has_kernels
from phase8.config.model_section import ModelSection
from phase8.division import part_size
from phase8.kernels.cross_entropy import linear_cross_entropy
from phase8.kernels.rotary import rotary_angles
from phase8.model.model import LanguageModel
from phase8.model.parameters import rounded_parameters
from phase8.model.recomputation import apply_recomputation
from phase8.precision.formats import OPERAND_DTYPE, NumberFormat


@dataclass(frozen=True)
class ActivationBytes:
    """Bytes kept for one microbatch by one tensor-parallel rank: activations, and weights cast to the compute dtype.

    Args:
        block: Kept by a block without recomputation.
        block_without_mixer: Kept by a block whose mixer is recomputed; equal to `block` if that was not asked for.
        block_within_budget: Kept by a compiled block under a budget; equal to `block` without a budget.
        block_input: Kept by a block that is recomputed whole.
        head: Kept by final norm and loss, the gradient of the head included.
    """

    block: int
    block_without_mixer: int
    block_within_budget: int
    block_input: int
    head: int


@lru_cache(maxsize=256)
def trace_activations(
    model: ModelSection,
    *,
    dtype: torch.dtype,
    micro_batch_size: int,
    packed: bool,
    device_type: str,
    number_format: NumberFormat = OPERAND_DTYPE,
    num_tensor_ranks: int = 1,
    is_compiled: bool = False,
    tokens_at_once: int | None = None,
    gathers_rounded: bool = False,
    without_mixer: bool = True,
) -> ActivationBytes:
    """Counts the activations of a model with one window size.

    Ranks divide evenly what a block keeps: heads, features, or the tokens of the residual stream. In low-rank pairs each rank keeps whole
    bottlenecks and their small weights, which are not counted.

    Args:
        model: Model section with the shapes; of several window sizes, the largest is counted.
        dtype: Dtype of the residual stream.
        micro_batch_size: Sequences of a forward.
        packed: Document boundaries are reset, which adds masks.
        device_type: Device of the run: on a GPU the operators keep less than autograd does on a CPU.
        number_format: Format that computes the products of the linear layers.
        num_tensor_ranks: Tensor-parallel ranks.
        is_compiled: The blocks are compiled.
        tokens_at_once: Tokens of a sequence whose activations a block has at the same time; None: all of them.
        gathers_rounded: Weights that layers round to the dtype of the residual stream are gathered in it, and freed between uses.
        without_mixer: Whether a block whose mixer is recomputed is traced too, which takes as long as the block itself: a second if compiled.
    """
    whole = _Forward(_one_layer(model), dtype, micro_batch_size, packed, device_type, number_format, gathers_rounded)
    forward = whole._replace(model=whole.model.model_copy(update={"sequence_length": tokens_at_once or model.sequence_length}))
    block = _block_bytes(forward, is_compiled=is_compiled)
    recomputed = _block_bytes(forward, recompute="selective", is_compiled=is_compiled) if without_mixer else block
    return ActivationBytes(
        block=block // num_tensor_ranks,
        block_without_mixer=recomputed // num_tensor_ranks,
        block_within_budget=block // num_tensor_ranks,
        block_input=micro_batch_size * model.sequence_length * model.d_model * dtype.itemsize // num_tensor_ranks,
        head=_head_bytes(whole, num_tensor_ranks, is_compiled=is_compiled),
    )


def bytes_within_budget(
    model: ModelSection,
    budget: float,
    *,
    dtype: torch.dtype,
    micro_batch_size: int,
    packed: bool,
    number_format: NumberFormat = OPERAND_DTYPE,
    gathers_rounded: bool = False,
) -> int:
    """What a compiled block of a model with one window size keeps on a GPU under a budget.

    Args:
        model: Model section with the shapes; of several window sizes, the largest is counted.
        budget: Share of the activations that may be kept.
        dtype: Dtype of the residual stream.
        micro_batch_size: Sequences of a forward.
        packed: Document boundaries are reset, which adds masks.
        number_format: Format that computes the products of the linear layers.
        gathers_rounded: As for `trace_activations`.
    """
    forward = _Forward(_one_layer(model), dtype, micro_batch_size, packed, GPU, number_format, gathers_rounded)
    return _block_bytes(forward, is_compiled=True, budget=budget)


def _one_layer(model: ModelSection) -> ModelSection:
    return model.of_window(max(model.window_sizes)).model_copy(update={"num_layers": 1})


class _Forward(NamedTuple):
    """A forward of one layer and the head, for tracing.

    Args:
        model: Model section with one layer.
        dtype: Dtype of the residual stream.
        micro_batch_size: Sequences.
        packed: Document boundaries are reset.
        device_type: Device of the run.
        number_format: Format that computes the products of the linear layers.
        gathers_rounded: Weights that layers round have the dtype of the residual stream already.
    """

    model: ModelSection
    dtype: torch.dtype
    micro_batch_size: int
    packed: bool
    device_type: str
    number_format: NumberFormat
    gathers_rounded: bool = False

    @contextmanager
    def traced(self, *, recompute: Literal["none", "selective"] = "none") -> Iterator[tuple[LanguageModel, Tensor]]:
        """The model and its residual stream, on a device without memory."""
        # Meta tensors go through the operators as on a GPU. Torch's own attention takes its plain form there, but on fake CPU tensors
        # keeps what it keeps on a GPU. (Fake GPU tensors cannot be sliced by a CPU build of torch.)
        on_meta = has_kernels(self.device_type) and self.model.block == "phase8"
        with nullcontext() if on_meta else FakeTensorMode():
            with torch.device("meta" if on_meta else "cpu"):
                whole = LanguageModel(self.model, dtype=self.dtype, number_format=self.number_format)
                for parameter in rounded_parameters(whole.blocks) if self.gathers_rounded else ():
                    parameter.data = parameter.data.to(self.dtype)
                apply_recomputation(whole, recompute)
                x = torch.empty(self.micro_batch_size, self.model.sequence_length, self.model.d_model, dtype=self.dtype, requires_grad=True)
            yield whole, x


# Ranks divide what a block keeps, and budgets do not affect what is kept without one, so few traces serve many plans.
@lru_cache(maxsize=256)
def _block_bytes(forward: _Forward, *, recompute: Literal["none", "selective"] = "none", is_compiled: bool, budget: float = 1.0) -> int:
    model = forward.model
    with forward.traced(recompute=recompute) as (whole, x):
        angles = rotary_angles(
            model.sequence_length, model.head_width, base=model.rope_base, rope_scaling=model.rope_scaling, first_position=0, device=x.device
        )
        starts = torch.empty(x.shape[:2], dtype=torch.bool, device=x.device) if forward.packed else None
        embedded = (None, torch.empty_like(x, requires_grad=True)) if model.embedding_scalars else ()
        if is_compiled:
            return _saved_bytes_compiled(whole.blocks["0"], x, angles, starts, *embedded, budget=budget)
        return _saved_bytes(whole.blocks["0"], x, angles, starts, *embedded)


def _head_bytes(forward: _Forward, num_tensor_ranks: int, *, is_compiled: bool) -> int:
    model = forward.model
    with forward.traced() as (whole, x):
        targets = torch.empty(x.shape[:2], dtype=torch.int64, device=x.device).flatten()
        head = torch.empty(part_size(model.vocab_size, num_tensor_ranks), model.d_model, device=x.device, requires_grad=True)
        # Every rank has the gradient of the hidden states of all tokens, from its own share of the vocabulary.
        loss = _saved_by(lambda: linear_cross_entropy(x.flatten(0, 1), head, targets), {head})
        norm = _saved_bytes_compiled(whole.norm, x, budget=1.0) if is_compiled else _saved_bytes(whole.norm, x)
        return norm // num_tensor_ranks + loss


def _saved_bytes(module: nn.Module, x: Tensor, angles: Tensor | None = None, starts: Tensor | None = None, *embedded: Tensor | None) -> int:
    """Bytes that the forward of a module keeps; its fp32 weights, and the embedding's output, which all blocks share, are left out."""
    arguments = (x,) if angles is None else (x, angles, starts, *embedded)
    return _saved_by(lambda: module(*arguments), {*module.parameters(), *(each for each in embedded if each is not None)})


def _saved_bytes_compiled(module: nn.Module, *arguments: Tensor | None, budget: float) -> int:
    """As `_saved_bytes`, for a module that torch.compile partitions; earlier traces are dropped, because every size is a new shape to it."""
    torch.compiler.reset()
    try:
        with functorch_config.patch(activation_memory_budget=budget):
            return _saved_bytes(torch.compile(module, backend="aot_eager_decomp_partition", fullgraph=True), *arguments)
    finally:
        torch.compiler.reset()


def _saved_by(forward: Callable[[], object], weights: set[Tensor]) -> int:
    """Bytes of the distinct storages that autograd keeps during a forward, without those of `weights`."""
    own = {weight.untyped_storage()._cdata for weight in weights}
    saved: dict[int, torch.UntypedStorage] = {}

    def remember(x: Tensor) -> Tensor:
        if x.untyped_storage()._cdata not in own:
            saved[x.untyped_storage()._cdata] = x.untyped_storage()
        return x

    with torch.autograd.graph.saved_tensors_hooks(remember, lambda x: x):
        results = forward()
    for x in _kept_past_hooks(results):
        remember(x)
    return sum(storage.nbytes() for storage in saved.values())


def _kept_past_hooks(results: object) -> Iterator[Tensor]:
    """Tensors that a compiled function keeps on its node of the graph, where hooks of saved tensors do not see them (torch 2.11 to 2.13)."""
    for result in tree_leaves(results):
        if isinstance(result, Tensor) and "_tensors_no_vc_check" in dir(result.grad_fn):
            yield from result.grad_fn._tensors_no_vc_check
