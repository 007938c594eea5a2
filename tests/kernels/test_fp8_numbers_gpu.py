"""The kernel that rounds a matrix to fp8: on a GPU bit for bit the reference, through the interpreter to a last bit; and its machine code."""

import pytest
import torch

from phase8.kernels.reference import fp8_numbers as reference
from tests.kernels.offline import OfflineKernel, compile_offline
from tests.kernels.test_fp8_numbers import DTYPES, problem

COMMON = {"x": "*bf16", "of_row": "*fp32", "of_column": "*fp32", "num_rows": 16384, "num_columns": 2048, "PER_ROW": False, "PER_COLUMN": False}
OFFLINE = {
    name: OfflineKernel(
        "phase8.kernels.gpu.fp8_numbers:round_kernel",
        COMMON | {"numbers": kind, "transposed": kind, "LARGEST": largest, "BLOCK_M": 128, "BLOCK_K": 128},
    )
    for name, kind, largest in (("e4m3", "*fp8e4nv", 448.0), ("e5m2", "*fp8e5", 57344.0))
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (63, 65), (130, 257)])
@pytest.mark.parametrize("source", [torch.float32, torch.bfloat16])
def test_the_kernel_is_the_reference(kernel_device, dtype, shape, source):
    from phase8.kernels.gpu.fp8_numbers import fp8_numbers

    x, of_row, of_column, of_all = problem(*shape, dtype=source, device=kernel_device)
    for rows, columns in ((of_row, of_column), (of_all, of_all), (None, of_column)):
        for found, expected in zip(fp8_numbers(x, rows, columns, dtype), reference.fp8_numbers(x, rows, columns, dtype), strict=True):
            if expected is None:
                assert found is None
                continue
            assert found.dtype == dtype and found.shape == expected.shape and found.is_contiguous()
            if kernel_device.type == "cuda":
                assert torch.equal(found.view(torch.uint8), expected.view(torch.uint8))
            else:  # the interpreter forgets the carry of a mantissa that is rounded up to two: half the number, in one of twenty
                torch.testing.assert_close(found.float(), expected.float(), rtol=0.51, atol=torch.finfo(dtype).smallest_normal)
                assert (found.view(torch.uint8) == expected.view(torch.uint8)).float().mean() > 0.9


def test_machine_code():
    for name, found in compile_offline(OFFLINE).items():
        found.check(max_registers=255, contains=["F2FP"])
        assert found.stack == 0, name
