"""What autograd keeps for backward, counted by tracing one block and the head on fake or meta tensors: exact shapes, no memory, no work."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call

from phase8.config.schema import ModelSection
from phase8.kernels.cross_entropy import linear_cross_entropy
from phase8.kernels.reference.rotary import rotary_angles
from phase8.model.model import build_model


@dataclass(frozen=True)
class ActivationBytes:
    """Bytes kept for one microbatch by one tensor-parallel rank: activations, and weights cast to the compute dtype.

    Args:
        block: By a block that keeps everything.
        block_without_mixer: By a block whose mixer is recomputed.
        block_input: By a block that is recomputed whole.
        head: By final norm and loss, the gradient of the head included.
    """

    block: int
    block_without_mixer: int
    block_input: int
    head: int


def trace_activations(
    model: ModelSection, *, dtype: torch.dtype, micro_batch_size: int, packed: bool, device_type: str, num_tensor_ranks: int = 1
) -> ActivationBytes:
    """Counts the activations of a model with one window size.

    Ranks divide what a block keeps evenly: heads, features, or the tokens of the residual stream. Of low-rank pairs each keeps the
    bottlenecks and their few weights whole, which is not counted.

    Args:
        model: Shapes; of several window sizes, the largest is counted.
        dtype: Of the residual stream.
        micro_batch_size: Sequences of a forward.
        packed: Document boundaries are reset, which adds masks.
        device_type: Where the model will run: on a GPU the operators keep less than autograd does on a CPU.
        num_tensor_ranks: Tensor-parallel ranks.
    """
    one_layer = model.model_copy(update={"num_layers": 1, "local_window_size": max(model.window_sizes)})
    meta = torch.device("meta")
    whole, selective = (build_model(one_layer, dtype=dtype, device=meta, recompute=recompute) for recompute in ("none", "selective"))
    shape = (micro_batch_size, model.sequence_length)
    # Meta tensors go through the operators as on a GPU. Torch's own attention takes its plain form there, but on fake CPU tensors
    # keeps what it keeps on a GPU. (Fake GPU tensors cannot be sliced by a CPU build of torch.)
    on_meta = device_type == "cuda" and model.block == "phase8"
    device = meta if on_meta else torch.device("cpu")
    with nullcontext() if on_meta else FakeTensorMode(), device:
        x = torch.empty(*shape, model.d_model, dtype=dtype, requires_grad=True)
        angles = rotary_angles(model.sequence_length, model.head_width, base=model.rope_base, first_position=0, device=device)
        starts = torch.empty(shape, dtype=torch.bool) if packed else None
        targets = torch.empty(shape, dtype=torch.int64).flatten()
        head = torch.empty(-(-model.vocab_size // num_tensor_ranks), model.d_model, requires_grad=True)
        norm = _saved_bytes(whole.norm, x)
        # Every rank has the gradient of the hidden states of all tokens, from its own share of the vocabulary.
        loss = _saved_by(lambda: linear_cross_entropy(x.flatten(0, 1), head, targets), {head})
        return ActivationBytes(
            block=_saved_bytes(whole.blocks["0"], x, angles, starts) // num_tensor_ranks,
            block_without_mixer=_saved_bytes(selective.blocks["0"], x, angles, starts) // num_tensor_ranks,
            block_input=x.numel() * x.element_size() // num_tensor_ranks,
            head=norm // num_tensor_ranks + loss,
        )


def _saved_bytes(module: nn.Module, *arguments: Tensor | None) -> int:
    """Bytes that the forward of a module keeps, its fp32 weights left out."""
    weights = {name: torch.empty(p.shape, requires_grad=True) for name, p in module.named_parameters()}
    return _saved_by(lambda: functional_call(module, weights, arguments), set(weights.values()))


def _saved_by(forward: Callable[[], object], weights: set[Tensor]) -> int:
    """Bytes of the distinct storages that autograd keeps during a forward, `weights` left out."""
    own = {weight.untyped_storage()._cdata for weight in weights}
    saved: dict[int, torch.UntypedStorage] = {}

    def remember(x: Tensor) -> Tensor:
        if x.untyped_storage()._cdata not in own:
            saved[x.untyped_storage()._cdata] = x.untyped_storage()
        return x

    with torch.autograd.graph.saved_tensors_hooks(remember, lambda x: x):
        forward()
    return sum(storage.nbytes() for storage in saved.values())
