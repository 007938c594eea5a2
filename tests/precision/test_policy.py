import pytest
import torch

from phase8.config.schema import PrecisionSection
from phase8.precision.policy import COMPUTE_DTYPES, compute_dtype, set_matmul_precision


@pytest.fixture
def restored_matmul_precision():
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize(("name", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_compute_dtype(name, dtype):
    assert compute_dtype(PrecisionSection(dtype=name)) is COMPUTE_DTYPES[name] is dtype


@pytest.mark.parametrize(("tf32", "precision"), [(True, "high"), (False, "highest")])
def test_tf32_is_allowed_or_forbidden_for_fp32_matmuls(restored_matmul_precision, tf32, precision):
    set_matmul_precision(PrecisionSection(tf32=tf32))
    assert torch.get_float32_matmul_precision() == precision
