"""Approximate functions as single instructions of the special-function unit, and their replacements off NVIDIA hardware.

Triton's own `log2` is a polynomial of some twenty instructions, which doubles an attention loop. FAST picks the instruction;
the interpreter and other hardware, which know no PTX, take the plain function.
"""

import torch
import triton
import triton.language as tl


def has_fast_math() -> bool:
    """Whether kernels may use PTX instructions: on NVIDIA hardware, and not in the interpreter."""
    return torch.version.hip is None and not triton.knobs.runtime.interpret


def dot_precision() -> str:
    """Precision of matrix products with fp32 inputs, following the process-wide setting for fp32 matmuls."""
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"


def tensor_core_precision() -> str:
    """The same for products that always run on tensor cores: three tf32 products are as exact as scalar ones, and far fewer instructions."""
    return dot_precision().replace("ieee", "tf32x3")


@triton.jit
def exp2(x, FAST: tl.constexpr):
    """Two to the power of x."""
    if FAST:
        return tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
    else:
        return tl.exp2(x)


@triton.jit
def log2(x, FAST: tl.constexpr):
    """Logarithm to base 2."""
    if FAST:
        return tl.inline_asm_elementwise("lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
    else:
        return tl.log2(x)


@triton.jit
def rsqrt(x, FAST: tl.constexpr):
    """Reciprocal of the square root."""
    if FAST:
        return tl.inline_asm_elementwise("rsqrt.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
    else:
        return 1.0 / tl.sqrt(x)


@triton.jit
def sigmoid(x, FAST: tl.constexpr):
    """1 / (1 + exp(-x))."""
    if FAST:
        below = 1.0 + exp2(-1.4426950408889634 * x, FAST)
        return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [below], dtype=tl.float32, is_pure=True, pack=1)
    else:
        return tl.sigmoid(x)


@triton.jit
def silu_slope(x, FAST: tl.constexpr):
    """Derivative of x sigmoid(x)."""
    share = sigmoid(x, FAST)
    return share + x * share * (1.0 - share)
