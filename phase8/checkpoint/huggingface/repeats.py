"""Tensors in a Llama's files that repeat what the config or another tensor says: they are compared, and not loaded.

| tensor | what it must be |
|---|---|
| `model.layers.<n>.self_attn.rotary_emb.inv_freq`, `model.rotary_emb.inv_freq` | the config's rotary frequencies, to rounding |
| `lm_head.weight` with `tie_word_embeddings` | `model.embed_tokens.weight`, bit for bit |
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch

from phase8.checkpoint.huggingface.llama import llama_name
from phase8.checkpoint.step_directories import WEIGHTS_CONFIG_NAME
from phase8.checkpoint.tensor_file import DTYPES
from phase8.checkpoint.untrusted import shown_name
from phase8.checkpoint.weight_files import STORED_DTYPES, OpenedFile
from phase8.config.model_section import ModelSection
from phase8.errors import CheckpointMismatchError
from phase8.kernels.rotary import rotary_frequencies

_FREQUENCIES = re.compile(r"model\.(?:layers\.([0-9]{1,9})\.self_attn\.)?rotary_emb\.inv_freq")
_ROUNDING_OF_POWERS = 4e-6  # rounding of the fp32 arithmetic that computes them


def require_repeat(key: str, found: Mapping[str, OpenedFile], model: ModelSection) -> None:
    """Refuses a stored tensor that is no parameter of the model, unless it repeats a value that the model computes with.

    Args:
        key: Name of the tensor.
        found: The file of every tensor.
        model: The model section of the config.

    Raises:
        CheckpointMismatchError: The tensor has no place in the model, or contradicts it.
    """
    opened, embedding, head = found[key], llama_name("embedding.weight"), llama_name("head.weight")
    if key == head and model.tie_embeddings:
        if not _are_equal(opened, head, found[embedding], embedding):
            raise CheckpointMismatchError(
                f"{opened.file.path}: {head!r} differs from {embedding!r}, but tie_word_embeddings of {WEIGHTS_CONFIG_NAME} says that they are one "
                "tensor; set it to false to use both, or use another copy"
            )
        return
    layer = _FREQUENCIES.fullmatch(key)
    if layer is None or int(layer[1] or 0) >= model.num_layers:
        raise CheckpointMismatchError(
            f"{opened.file.path} holds {shown_name(key)}, for which the transformer baseline of {WEIGHTS_CONFIG_NAME} has no place; use another model"
        )
    if not _are_frequencies(opened, key, model):
        raise CheckpointMismatchError(
            f"{opened.file.path}: {key!r} does not hold the {model.head_width // 2} rotary frequencies of base {model.rope_base:g} "
            f"(rope_theta of {WEIGHTS_CONFIG_NAME}; scaling: {model.rope_scaling.type}), with which the transformer baseline would compute; "
            "correct them, or use another model"
        )


def _are_equal(one: OpenedFile, key: str, other: OpenedFile, other_key: str) -> bool:
    """Whether two tensors are the same bit for bit, in constant memory."""
    a, b = one.file.tensors[key], other.file.tensors[other_key]
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    return all(x == y for x, y in zip(one.file.chunks(key), other.file.chunks(other_key), strict=True))


def _are_frequencies(opened: OpenedFile, key: str, model: ModelSection) -> bool:
    """Whether a tensor holds the rotary frequencies of the model, as exactly as its dtype allows."""
    stored = opened.file.tensors[key]
    if stored.shape != [model.head_width // 2] or stored.dtype not in STORED_DTYPES:
        return False
    values = torch.empty(stored.shape, dtype=DTYPES[stored.dtype])
    opened.file.read_into(key, values)
    expected = rotary_frequencies(model.head_width, base=model.rope_base, rope_scaling=model.rope_scaling, device=values.device)
    precision = torch.finfo(values.dtype)
    return torch.allclose(
        values.double(), expected, rtol=max(precision.eps, _ROUNDING_OF_POWERS), atol=precision.smallest_normal * precision.eps
    )
