"""One token of both paths of the mixer, for each of several sequences: on a GPU one kernel for each layer."""

from __future__ import annotations

from torch import Tensor

from phase8.kernels.backends import uses_triton
from phase8.kernels.decoding_state import MixerConstants, MixerStepState, TokenPlace
from phase8.kernels.limits import MAX_STEP_HEAD_SIZE
from phase8.kernels.reference import mixer_step as reference


def _runs_on_gpu(qkv: Tensor, constants: MixerConstants) -> bool:
    """Whether the kernel computes these layers.

    It knows neither the Lorentz score nor the chain, nor a convolution of keys that several heads share: the programs of those heads would read
    inputs that one of them has moved up.
    """
    path, head_size = constants.global_path, qkv.shape[1] // (constants.num_heads + 2 * constants.num_key_heads)
    is_known = constants.beta is None and (path is None or path.chain is None) and head_size <= MAX_STEP_HEAD_SIZE
    is_alone = constants.num_heads == constants.num_key_heads or constants.taps is None
    return is_known and is_alone and uses_triton(qkv) and qkv.element_size() <= 4


def mixer_step(
    qkv: Tensor, scalars: Tensor | None, channels: Tensor | None, constants: MixerConstants, state: MixerStepState, place: TokenPlace
) -> Tensor:
    """Both paths, and their sum [B, H K]; arguments as in the reference of the same name. It has no gradients."""
    if _runs_on_gpu(qkv, constants):
        from phase8.kernels.gpu import mixer_step as gpu

        return gpu.mixer_step(qkv, scalars, channels, constants, state, place)
    return reference.mixer_step(qkv, scalars, channels, constants, state, place)
