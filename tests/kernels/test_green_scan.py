import pytest
import torch

from phase8.kernels.green_scan import _backward, _forward, green_scan
from phase8.kernels.reference.green_scan import compose, coupling

LENGTHS = [1, 2, 63, 257]


def problem(length, *, dtype=torch.float64, batch=2, heads=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    potential = torch.randn(batch, length, heads, generator=generator, dtype=torch.float64)
    energy = torch.linspace(-1.5, 1.5, heads, dtype=torch.float64)
    eta = 0.1 + torch.rand(heads, generator=generator, dtype=torch.float64)
    hopping = 0.5 + torch.rand(heads, generator=generator, dtype=torch.float64)
    return [x.to(dtype) for x in (potential, energy, eta, hopping)]


def initial_state(batch=2, heads=3):
    state = torch.randn(batch, heads, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    state[..., 1] = -state[..., 1].abs()
    return state


def by_linear_algebra(potential, energy, eta, hopping):
    """g_n is the last diagonal element of the inverse of the tridiagonal matrix of tokens 0..n: an oracle that knows no recurrence."""
    batch, length, heads = potential.shape
    g = torch.empty(batch, length, heads, dtype=torch.complex128)
    for h in range(heads):
        for n in range(length):
            diagonal = torch.complex(energy[h] - potential[:, : n + 1, h], eta[h].expand(batch, n + 1))
            matrix = torch.diag_embed(diagonal)
            if n:
                off = hopping[h].sqrt().expand(batch, n).to(torch.complex128)
                matrix = matrix - torch.diag_embed(off, offset=1) - torch.diag_embed(off, offset=-1)
            g[:, n, h] = torch.linalg.inv(matrix)[:, n, n]
    return torch.view_as_real(g)


@pytest.mark.parametrize("length", [1, 2, 17, 63])
def test_equals_the_inverse_of_the_left_truncated_matrices(length):
    arguments = problem(length)
    g, _ = green_scan(*arguments)
    torch.testing.assert_close(g, by_linear_algebra(*arguments), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("length", LENGTHS)
def test_fp32_stays_close_to_fp64(length):
    exact, _ = green_scan(*problem(length))
    approximate, _ = green_scan(*problem(length, dtype=torch.float32))
    assert (approximate.double() - exact).abs().max() < 1e-5


@pytest.mark.parametrize("length", LENGTHS)
def test_imaginary_part_modulus_and_optical_theorem(length):
    potential, energy, eta, hopping = problem(length)
    g, _ = green_scan(potential, energy, eta, hopping)
    real, imaginary = g.unbind(-1)
    assert (imaginary < 0).all()
    square = real**2 + imaginary**2
    assert (square.sqrt() * eta <= 1 + 1e-12).all()
    previous = torch.cat((torch.zeros_like(imaginary[:, :1]), imaginary[:, :-1]), dim=1)
    torch.testing.assert_close(-imaginary, square * (eta - hopping * previous), rtol=1e-11, atol=0)


def test_gradcheck_of_the_adjoint():
    inputs = [x.requires_grad_() for x in (*problem(9), initial_state())]
    starts = torch.zeros(2, 9, dtype=torch.bool)
    starts[0, 4] = starts[1, 7] = True
    assert torch.autograd.gradcheck(lambda a, e, n, b, s: green_scan(a, e, n, b, starts, s)[0], inputs)
    assert torch.autograd.gradcheck(lambda a, e, n, b: green_scan(a, e, n, b)[0], inputs[:4])


@pytest.mark.parametrize("split", [1, 20, 63])
def test_chunks_with_carried_state_equal_the_whole(split):
    potential, *rest = problem(64)
    whole, final = green_scan(potential, *rest, None, initial_state())
    head, carried = green_scan(potential[:, :split], *rest, None, initial_state())
    tail, last = green_scan(potential[:, split:], *rest, None, carried)
    torch.testing.assert_close(torch.cat((head, tail), 1), whole)
    torch.testing.assert_close(last, final)


def test_documents_do_not_see_each_other():
    potential, *rest = problem(40)
    starts = torch.zeros(2, 40, dtype=torch.bool)
    starts[:, 0] = starts[:, 15] = True
    packed, _ = green_scan(potential, *rest, starts, initial_state())
    first, _ = green_scan(potential[:, :15], *rest)
    second, _ = green_scan(potential[:, 15:], *rest)
    torch.testing.assert_close(packed, torch.cat((first, second), 1))


def test_later_tokens_do_not_matter():
    potential, *rest = problem(50)
    changed = potential.clone()
    changed[:, 30] += 1
    before, after = green_scan(potential, *rest)[0], green_scan(changed, *rest)[0]
    torch.testing.assert_close(after[:, :30], before[:, :30], rtol=1e-12, atol=1e-14)
    assert (after[:, 30:] != before[:, 30:]).any()


@pytest.mark.parametrize("with_state", [True, False])
def test_opcheck(with_state):
    arguments = [x.requires_grad_() for x in problem(6)]
    starts = torch.zeros(2, 6, dtype=torch.bool) if with_state else None
    torch.library.opcheck(_forward, (*arguments, starts, initial_state().requires_grad_() if with_state else None))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("with_state", [True, False])
def test_opcheck_of_the_backward(with_state, transposed):
    """Also that a compiled graph calls it to the same result, whatever the strides."""
    potential, energy, eta, hopping = problem(6)
    starts = torch.zeros(2, 6, dtype=torch.bool) if with_state else None
    state = initial_state() if with_state else None
    if transposed:
        potential = potential.transpose(1, 2).contiguous().transpose(1, 2)
    g = _forward(potential, energy, eta, hopping, starts, state)
    grad = torch.randn(2, 3, 6, 2, dtype=torch.float64).transpose(1, 2) if transposed else torch.randn_like(g)
    torch.library.opcheck(_backward, (grad, g, hopping, starts, state))
    torch.library.opcheck(_forward, (potential, energy, eta, hopping, starts, state))


def test_maps_compose_as_their_matrices_up_to_a_scale():
    early, late = torch.randn(2, 2, 2, dtype=torch.complex128)
    found = torch.stack(compose(tuple(early.flatten()), tuple(late.flatten()))).reshape(2, 2)
    torch.testing.assert_close(found / found[0, 0], (late @ early) / (late @ early)[0, 0])


def test_nothing_is_coupled_to_the_token_before_a_document():
    potential, *_, hopping = problem(4)
    starts = torch.tensor([[False, True, False, False]]).expand(2, 4)
    expected = hopping.expand(2, 4, 3).clone()
    expected[:, 1] = 0
    assert torch.equal(coupling(hopping, starts, potential), expected)
