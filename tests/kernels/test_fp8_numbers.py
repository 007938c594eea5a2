"""Numbers of a matrix in fp8: the nearest ones, as the matrix lies and transposed, with factors of rows, of columns, or of all."""

import pytest
import torch

from phase8.kernels.fp8_numbers import fp8_numbers
from phase8.kernels.reference import fp8_numbers as reference

DTYPES = [torch.float8_e4m3fn, torch.float8_e5m2]


def problem(num_rows, num_columns, *, dtype=torch.float32, device="cpu"):
    """A matrix, factors of its rows and of its columns, and one of all; what they make of it lies below the largest number, but for one."""
    generator = torch.Generator().manual_seed(num_rows)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    x, of_row, of_column = 3 * draw(num_rows, num_columns), draw(num_rows, 1).abs() * 8, draw(1, num_columns).abs() * 8
    x[-1, -1] = 1e6
    return x.to(device, dtype), of_row.to(device), of_column.to(device), torch.tensor([[5.0]], device=device)


def all_numbers(dtype):
    """Every finite number of fp8, ascending, in fp64."""
    values = torch.arange(256, dtype=torch.uint8).view(dtype).double()
    return values[values.isfinite()].unique()


def distance(found, exact):
    """How much farther numbers are from what they stand for than the nearest ones are."""
    numbers, exact = all_numbers(found.dtype), exact.double().flatten()
    place = torch.searchsorted(numbers, exact).clamp(1, len(numbers) - 1)
    least = torch.minimum((exact - numbers[place - 1]).abs(), (numbers[place] - exact).abs())
    return ((found.double().flatten() - exact).abs() - least).max()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (63, 65), (1, 40)])
def test_every_number_is_the_nearest_one(dtype, shape):
    x, of_row, of_column, of_all = problem(*shape)
    for rows, columns in ((of_row, of_column), (of_all, of_all)):
        lying, transposed = fp8_numbers(x, rows, columns, dtype)
        assert lying.shape == shape and transposed.shape == shape[::-1] and lying.is_contiguous() and transposed.is_contiguous()
        assert distance(lying, x * rows) == 0
        assert distance(transposed, (x * columns).T) == 0
    assert lying[-1, -1].double() == all_numbers(dtype)[-1]  # and not infinity


def test_numbers_that_nobody_wants_are_not_computed():
    x, of_row, of_column, _ = problem(5, 7)
    lying, transposed = fp8_numbers(x, None, of_column, torch.float8_e4m3fn)
    assert lying is None
    assert torch.equal(transposed.float(), fp8_numbers(x, of_row, of_column, torch.float8_e4m3fn)[1].float())


def test_a_matrix_may_lie_in_any_order():
    x, of_row, of_column, _ = problem(6, 9)
    turned = x.T.contiguous().T
    expected_pair = reference.fp8_numbers(x, of_row, of_column, DTYPES[0])
    for found, expected in zip(fp8_numbers(turned, of_row, of_column, DTYPES[0]), expected_pair, strict=True):
        assert found.is_contiguous() and torch.equal(found.float(), expected.float())


@pytest.mark.parametrize("with_rows", [True, False])
def test_the_operator_tells_compilers_the_shapes(with_rows):
    x, of_row, of_column, _ = problem(6, 9)
    arguments = (x, of_row if with_rows else None, of_column, torch.float8_e4m3fn)
    torch.library.opcheck(torch.ops.phase8.fp8_numbers, arguments, test_utils=("test_schema", "test_faketensor"))
