"""The offline compiler itself: that it sees what it is there to see."""

import importlib.util

import pytest

triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402

from tests.kernels.offline import OfflineKernel, compile_offline  # noqa: E402


@triton.jit
def product_kernel(a, b, c, num_blocks, stride, optional, BLOCK: tl.constexpr, DTYPE: tl.constexpr):
    """The sum of matrix products of blocks, or its logarithm to the base 2."""
    row, column = tl.arange(0, BLOCK)[:, None], tl.arange(0, BLOCK)[None, :]
    total = tl.zeros([BLOCK, BLOCK], tl.float32)
    for block in range(num_blocks):
        x = tl.load(a + block * BLOCK * stride + row * stride + column).to(DTYPE)
        y = tl.load(b + block * BLOCK * BLOCK + row * BLOCK + column).to(DTYPE)
        total += tl.dot(x, y)
    if optional is not None:
        total = tl.inline_asm_elementwise("lg2.approx.ftz.f32 $0, $1;", "=f,f", [total], dtype=tl.float32, is_pure=True, pack=1)
    tl.store(c + row * BLOCK + column, total)


@triton.jit
def copy_kernel(x, y, begin, BLOCK: tl.constexpr):
    """Copies a block."""
    place = begin + tl.arange(0, BLOCK)
    tl.store(y + place, tl.load(x + place))


@triton.jit
def broken_kernel(x):
    """Adds blocks of different sizes."""
    tl.store(x + tl.arange(0, 16), tl.arange(0, 16) + tl.arange(0, 32))


def product(**changes):
    arguments = dict(a="*bf16", b="*bf16", c="*fp32", num_blocks=7, stride=64, optional=None, BLOCK=64, DTYPE="tl.bfloat16")
    return OfflineKernel("tests.kernels.test_offline_compile:product_kernel", arguments | changes)


def copy(begin, **options):
    return OfflineKernel("tests.kernels.test_offline_compile:copy_kernel", {"x": "*fp32", "y": "*fp32", "begin": begin, "BLOCK": 512}, **options)


KERNELS = {
    "product": product(),
    "product, logarithm": product(optional="*fp32"),
    "product in fp32": product(a="*fp32", b="*fp32", DTYPE="tl.float32"),
    "product that spills": product(BLOCK=256),
    "copy from 32": copy(32),
    "copy from 1": copy(1),
    "copy from 7": copy(7),
    "copy by two warps": copy(32, num_warps=2),
}


@pytest.fixture(scope="module")
def compiled():
    return compile_offline(KERNELS)


def test_matrix_instructions_are_counted_whatever_their_modifiers(compiled):
    found = compiled["product"]
    found.check(contains=["HGMMA"], lacks=["MUFU.LG2", "HMMA"])
    assert [found.count(name) for name in ("HGMMA", "HGMMA.64x64x16", "HGMMA.64x64x16.F32.BF16", "HGMMA.64x64x1", "HGM")] == [4, 4, 4, 0, 0]
    assert compiled["product in fp32"].count("HGMMA.64x64x8.F32.TF32") == 8  # the dtype reached the kernel


def test_a_missing_or_unwanted_instruction_fails(compiled):
    compiled["product, logarithm"].check(contains=["MUFU.LG2"])
    with pytest.raises(AssertionError, match=r"missing \['MUFU.LG2'\], unwanted \['HGMMA'\]"):
        compiled["product"].check(contains=["MUFU.LG2"], lacks=["HGMMA"])


def test_spills_and_too_many_registers_fail(compiled):
    assert compiled["product that spills"].stack > 0
    with pytest.raises(AssertionError, match="spills: "):
        compiled["product that spills"].check()
    registers = compiled["product"].registers
    compiled["product"].check(max_registers=registers)
    with pytest.raises(AssertionError, match=f"{registers} registers"):
        compiled["product"].check(max_registers=registers - 1)


def test_the_body_of_a_loop_is_told_from_the_rest(compiled):
    (loop,) = compiled["product"].loops
    assert loop.keys() <= compiled["product"].opcodes.keys()
    assert sum(n for name, n in loop.items() if name.startswith("HGMMA")) == 4
    assert 0 < sum(loop.values()) < sum(compiled["product"].opcodes.values())
    assert compiled["copy from 32"].loops == []


def test_arguments_are_specialised_as_in_a_launch(compiled):
    assert compiled["copy from 32"].count("LDG.E.128") == 1 and compiled["copy from 32"].count("STG.E.128") == 1
    for name in ("copy from 1", "copy from 7"):  # no vector: not divisible by 16
        assert compiled[name].count("LDG.E.128") == 0 and compiled[name].count("LDG") == 4
    assert sum(compiled["copy from 1"].opcodes.values()) < sum(compiled["copy from 7"].opcodes.values())  # 1 is a constant
    assert compiled["copy by two warps"].count("LDG.E.128") == 2


def test_what_does_not_compile_is_named_beside_what_does():
    with pytest.raises(AssertionError) as error:
        compile_offline({"good": copy(32), "bad": OfflineKernel("tests.kernels.test_offline_compile:broken_kernel", {"x": "*fp32"})})
    assert "bad does not compile" in str(error.value) and "good does not" not in str(error.value)


def test_arguments_must_be_those_of_the_kernel():
    with pytest.raises(AssertionError, match=r"missing \['x'\], unknown \['z'\]"):
        compile_offline({"bad": OfflineKernel("tests.kernels.test_offline_compile:broken_kernel", {"z": "*fp32"})})


def test_without_triton_or_without_a_good_assembler_the_test_is_skipped(monkeypatch, tmp_path):
    old = tmp_path / "ptxas"
    old.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 12.8, V12.8.93'\n")
    old.chmod(0o755)
    with monkeypatch.context() as bad:
        bad.setenv("TRITON_PTXAS_PATH", str(old))
        bad.setenv("TRITON_PTXAS_BLACKWELL_PATH", str(old))
        with pytest.raises(pytest.skip.Exception, match=r"ptxas 12.8, which miscompiles"):
            compile_offline({"copy": copy(32)})
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(pytest.skip.Exception, match="triton is not installed"):
        compile_offline({"copy": copy(32)})
