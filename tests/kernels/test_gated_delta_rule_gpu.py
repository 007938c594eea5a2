"""The Triton kernels: in the interpreter on small shapes, on a GPU on real ones, and their machine code."""

import pytest

from phase8.kernels import gated_delta_rule as operator
from phase8.kernels.reference import gated_delta_rule as reference
from tests.kernels.offline import OfflineKernel, compile_offline
from tests.kernels.recurrence_kernels import RecurrenceKernelTests, exact_fp32_products  # noqa: F401  (a fixture for all tests here)

pytest.importorskip("triton")


class TestGatedDeltaRule(RecurrenceKernelTests):
    operator, reference = operator, reference
    scalars = ("log_decay", "beta")
    widest, too_wide = 128, 65

    def more_scalars(self, draw, shape):
        """Shares beta: nearly nothing to all of what a key holds is replaced."""
        return ((draw(*shape[:3]) / shape[3]).double(),)


def test_blocks_of_columns_are_as_wide_as_registers_allow_and_narrower_where_sequences_are_few(monkeypatch):
    from phase8.kernels.gpu.gated_delta_rule import walk_tiles

    monkeypatch.setattr("triton.knobs.runtime.interpret", False)
    sizes = {"key_size": 128, "value_size": 128, "element_bytes": 2, "num_processors": 132}
    assert [walk_tiles(**sizes, num_sequences=number).columns for number in (1, 16, 24, 25, 64, 512)] == [16, 16, 16, 32, 32, 32]


T, H = 4096, 32
HOPPER_SHARED_BYTES = 227 * 1024
MODULE = "phase8.kernels.gpu.gated_delta_rule"
NAMES = ["inverse", "forward", "again", "packed forward", "back", "packed back", "chunk gradients", "packed chunk gradients"]
CASES = [(name, size) for name in NAMES for size in (64, 128)]


def offline_kernel(name, size):
    """A kernel as it runs in bf16 for heads of a size."""
    from phase8.kernels.gpu.gated_delta_rule import walk_tiles
    from phase8.kernels.gpu.gated_delta_rule_backward import chunk_tiles_for
    from phase8.kernels.gpu.gated_delta_rule_inverse import KEY_COLUMNS

    packed, name = name.startswith("packed"), name.removeprefix("packed ")

    def strided(*tensors):
        return {f"{tensor}_{dim}": stride for tensor in tensors for dim, stride in (("b", T * H * size), ("t", H * size), ("h", size))}

    gates = {f"{tensor}_{dim}": stride for tensor in ("decay", "rate") for dim, stride in (("b", T * H), ("t", H), ("h", 1))}
    gates |= {"decay": "*fp32", "rate": "*fp32", "starts": "*u8" if packed else None, "length": T, "num_heads": H, "num_chunks": T // 64}
    constants = {"K": size, "BLOCK_K": size, "FAST": True, "PRECISION": "tf32"}
    if name == "inverse":
        tensors = {"k": "*bf16", "inverse": "*bf16", "COLUMNS": KEY_COLUMNS}
        del constants["BLOCK_K"]
        return OfflineKernel(f"{MODULE}_inverse:_inverse_kernel", {**gates, **constants, **strided("k"), **tensors}, num_warps=1)
    if name == "chunk gradients":
        tiles = chunk_tiles_for(size, 2)
        tensors = dict.fromkeys(("q", "k", "dy", "written", "dv", "before", "dafter", "dq", "dk"), "*bf16")
        tensors |= {"dlog_decay": "*fp32", "dbeta": "*fp32"}
        strides, kernel = strided("q", "k", "dy"), f"{MODULE}_backward:_chunk_gradients_kernel"
    else:
        tiles = walk_tiles(size, size, 2, num_sequences=128, num_processors=132)
        state = "*fp32" if packed else None
        if name == "back":
            tensors = dict.fromkeys(("q", "k", "dy", "inverse", "dv", "dafter"), "*bf16") | {"dfinal": state, "dinitial": "*fp32"}
            strides, kernel = strided("q", "k", "dy"), f"{MODULE}_backward:_walk_back_kernel"
        else:
            kept = "*bf16" if name == "again" else None
            tensors = dict.fromkeys(("q", "k", "v", "inverse"), "*bf16") | {"initial": state, "written": kept, "before": kept}
            tensors |= {"y": None, "final": None} if name == "again" else {"y": "*bf16", "final": "*fp32"}
            strides, kernel = strided("q", "k", "v"), f"{MODULE}:_walk_kernel"
    arguments = {**gates, **constants, **strides, **tensors, "V": size, "COLUMNS": tiles.columns}
    return OfflineKernel(kernel, arguments, num_warps=tiles.num_warps, num_stages=tiles.num_stages)


@pytest.fixture(scope="module")
def compiled():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("triton.knobs.runtime.interpret", False)  # tiles are not those of the interpreter
        request = {f"{name} {size}": offline_kernel(name, size) for name, size in CASES}
    return compile_offline(request)


@pytest.mark.parametrize(("name", "size"), CASES)
def test_machine_code_has_matrix_products_and_hardly_any_spills(name, size, compiled):
    code = compiled[f"{name} {size}"]
    for opcode in ("HMMA",) if name == "inverse" else ("HGMMA", "MUFU.EX2"):
        assert code.count(opcode) > 0
    assert code.count("STL") <= (12 if "chunk gradients" in name else 0)
    assert code.shared <= HOPPER_SHARED_BYTES
    if "forward" in name or "back" in name:
        assert code.count("LDGSTS") > 0  # a pipeline of loads
        assert max(sum(loop.values()) for loop in code.loops) < 1300
