"""Recomputation of activations in backward, applied to a model after it is built; only this module knows the modes.

| mode | what is recomputed | where it is applied |
|---|---|---|
| `full`, one tensor-parallel rank | all of a block | inside the block's call |
| `full`, several ranks | all of a block | around the block's call |
| `slices` | all of a block, for one slice of the sequence after the other, from the state that the slice before it leaves | as `full` |
| `selective` | the mixer and its norm | inside the block's call |
| `none`, `budget` | nothing here | nowhere (`budget` is carried out by torch.compile) |

What is kept of a block that is recomputed whole is its input. Where inputs are offloaded, host_copies.py keeps it in host memory.

A block recomputes itself inside its call where it can: torch.compile then sees that backward does not need the last matrix product again and
leaves it out. A compiled block also has several graphs where slices differ, and a recomputation around its call may get another one than the
forward did, which is an error. Torch 2.11 would keep the result of an autograd.Function inside the call, and tensor-parallel layers are such
Functions.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import SAC_IGNORED_OPS, CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from phase8.distributed.collectives import EXCHANGES, Axis
from phase8.model.block import Block, BlockOutput, BlockState, Run, call
from phase8.model.host_copies import HostCopies
from phase8.model.model import LanguageModel

# Operations that begin and end a span for the profiler. FSDP has a span more in a recomputation than in the forward where it gathers experts inside a
# block, because their module comes first there and counts as the root; torch takes an operation that the forward lacked for an error.
_SPANS = frozenset({torch.ops.profiler._record_function_enter_new.default, torch.ops.profiler._record_function_exit._RecordFunction})
# Makes the context in which the input of a recomputed block, or a slice of it, is kept.
Keep = Callable[[Tensor], AbstractContextManager[Any]]


def apply_recomputation(
    model: LanguageModel, mode: str, *, every_n_layers: int = 1, slice_tokens: int | None = None, offload_inputs: bool = False
) -> None:
    """Makes blocks of a model, or of a chunk, recompute their activations in backward.

    Args:
        model: Model without recomputation so far.
        mode: Mode from the table.
        every_n_layers: Distance n of the recomputed layers 0, n, 2n, ... of the whole model.
        slice_tokens: Tokens of a slice in mode `slices`.
        offload_inputs: Whether the inputs of blocks recomputed in modes `full` and `slices` wait for backward in host memory.
    """
    copies = HostCopies()
    without_exchanges = recomputed if model.context.size == 1 else _without_exchanges(model.context)
    for place, (layer, block) in enumerate(model.blocks.items()):
        if int(layer) % every_n_layers:
            continue
        # The pipeline holds the input of a chunk until its backward, and blocks that add the embedding's output hold that: a copy would free nothing.
        is_held = place == 0 and not (model.begins and not model.section.embedding_scalars)
        keep: Keep = copies.keep if offload_inputs and not is_held else nullcontext
        inside = without_exchanges if block.fetches_little else recomputed
        if mode == "selective":
            block.run_mixer = inside
        elif mode in ("full", "slices"):
            run: Run = recomputed
            if model.axis.size == 1:
                block.run_inside, run = inside, call
            if mode == "slices":
                assert slice_tokens is not None  # a config has it
                run = partial(_slice_by_slice, slice_tokens, keep, run)
            elif keep is not nullcontext:
                run = partial(_with_input_kept, keep, run)
            block.run_outside = run


def recomputed(function: Callable[..., Any], *arguments: object, **how: Any) -> Any:
    """Calls the function and returns what it returns; where gradients are enabled, backward calls it again instead of keeping activations.

    Args:
        function: The function.
        arguments: Its arguments.
        how: Options of torch's checkpoint.
    """
    if not torch.is_grad_enabled():
        return function(*arguments)
    return checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False, **how)  # nothing is random


def _without_exchanges(context: Axis) -> Run:
    """`recomputed` for functions that exchange with other slices of a sequence: it keeps what they have sent instead of exchanging again.

    That is little, whatever the length. And the compiler leaves out of a rank's recomputation what this rank does not need, such as what the first
    slice fetches from before it, so that the other ranks would wait for it forever.
    """
    group = context.group.group_name
    SAC_IGNORED_OPS.update(_SPANS)

    def policy(_: object, operation: object, *arguments: object, **__: object) -> CheckpointPolicy:
        return CheckpointPolicy.MUST_SAVE if operation in EXCHANGES and arguments[-1] == group else CheckpointPolicy.MUST_RECOMPUTE

    return partial(recomputed, context_fn=partial(create_selective_checkpoint_contexts, policy))


def _with_input_kept(keep: Keep, run: Run, block: Block, x: Tensor, *arguments: object) -> BlockOutput:
    with keep(x):
        output: BlockOutput = run(block, x, *arguments)
    return output


def _slice_by_slice(
    slice_tokens: int, keep: Keep, run: Run, block: Block, x: Tensor, angles: Tensor, starts: Tensor | None, state: None, embedded: Tensor | None
) -> BlockOutput:
    """What `block(x, angles, starts, state, embedded)` returns; backward recomputes one slice of the sequence after the other.

    What is kept of the block are its input and the state at the beginning of each slice.

    Args:
        slice_tokens: Tokens of a slice; the last one may have fewer.
        keep: Function that makes the context in which a slice of the input is kept.
        run: Function that runs a part of the block, which recomputes itself in backward.
        block: Phase 8 block.
        x: Residual stream [B, T, D].
        angles: Rotary angles [T, K/2].
        starts: True where a token begins a document [B, T]; None: nowhere.
        state: None, because the sequence begins here.
        embedded: Output of the embedding [B, T, D]; None: the block does not add it.
    """
    if x.shape[1] <= slice_tokens:
        return _with_input_kept(keep, run, block, x, angles, starts, state, embedded)
    carried: BlockState = block.mixer.empty_state(x.shape[0], dtype=x.dtype, device=x.device)
    outputs, losses = [], {}
    # `split`, because backward of plain slices would make a gradient of the whole sequence for each of them.
    slices = x.split(slice_tokens, dim=1)
    starts_of_slices = [None] * len(slices) if starts is None else starts.split(slice_tokens, dim=1)
    # These stay views: every block would keep a copy.
    embedded_slices = [None] * len(slices) if embedded is None else embedded.split(slice_tokens, dim=1)
    for piece, own_angles, own_starts, own_embedded in zip(slices, angles.split(slice_tokens), starts_of_slices, embedded_slices, strict=True):
        own = piece.contiguous()  # a copy in host memory is, and torch.compile compiles again for other strides
        with keep(own):
            y, carried, found = run(_slice_of_block, block, own, own_angles, own_starts, carried, own_embedded)
        outputs.append(y)
        losses = {name: losses[name] + loss if name in losses else loss for name, loss in found.items()}
    return torch.cat(outputs, dim=1), None, losses


def _slice_of_block(
    block: Block, x: Tensor, angles: Tensor, starts: Tensor | None, state: BlockState, embedded: Tensor | None
) -> BlockOutput:
    y, state, losses = block(x, angles, starts, state, embedded)
    return y, state.copied(), losses  # parts of it are views, which would keep all keys and values of the slice
