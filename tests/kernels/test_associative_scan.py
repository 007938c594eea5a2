import pytest
import torch

from phase8.kernels.reference.associative_scan import associative_scan, linear_scan


@pytest.mark.parametrize("length", [1, 2, 3, 7, 8, 63, 64, 65])
def test_prefixes_of_a_non_commutative_product(length):
    matrices = torch.randn(2, length, 2, 2, dtype=torch.float64)
    (prefixes,) = associative_scan(lambda early, late: (late[0] @ early[0],), (matrices,))
    product = torch.eye(2, dtype=torch.float64).expand(2, 2, 2)
    for i in range(length):
        product = matrices[:, i] @ product
        torch.testing.assert_close(prefixes[:, i], product)


@pytest.mark.parametrize("length", [1, 2, 13, 32])
def test_linear_scan_is_the_recurrence(length):
    decay, x = torch.rand(2, length, 1, dtype=torch.float64), torch.randn(2, length, 5, dtype=torch.float64)
    scanned, state = linear_scan(decay, x), torch.zeros(2, 5, dtype=torch.float64)
    for i in range(length):
        state = decay[:, i] * state + x[:, i]
        torch.testing.assert_close(scanned[:, i], state)
