import pytest
import torch

from phase8.kernels import window_attention as kernel
from phase8.kernels.reference.window_attention import ARCCOSH_EPS
from phase8.kernels.window_state import empty_window_state

SETTINGS = [(8, 0), (8, 3), (1, 2), (16, 20), (5, 5)]
# On a CPU the public function is the reference under autograd; the operator has the backward that was derived by hand.
IMPLEMENTATIONS = {"autograd": kernel.window_attention, "operator": kernel._by_operator}


def problem(length, *, dtype=torch.float64, batch=2, heads=3, head_size=4):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(batch, length, heads, head_size, generator=generator, dtype=torch.float64).to(dtype) for _ in range(3)]


def inverse_temperature(score, dtype=torch.float64, heads=3):
    return torch.linspace(0.5, 2.0, heads, dtype=dtype) if score == "lorentz" else None


def dense(q, k, v, *, window, global_tokens, beta, starts=None):
    """Every pair of tokens scored by torch.acosh or by the dot product, then masked."""
    length = q.shape[1]
    dot = torch.einsum("bqhd,bkhd->bhqk", q, k)
    if beta is None:
        scores = dot * q.shape[-1] ** -0.5
    else:
        height_q, height_k = ((1 + x.square().sum(-1)).sqrt().transpose(1, 2) for x in (q, k))
        cosh = height_q[..., None] * height_k[..., None, :] - dot
        # arccosh smoothed as documented: equal to acosh(s / sqrt(1 - eps)) up to a constant.
        scores = -beta[:, None, None] * torch.acosh(cosh.clamp(min=1) / (1 - ARCCOSH_EPS) ** 0.5)
    query, key = torch.arange(length)[:, None], torch.arange(length)[None]
    visible = (key <= query) & ((query - key < window) | (key < global_tokens))
    if starts is not None:
        document = starts.cumsum(1)
        visible = visible & (document[:, :, None] == document[:, None, :])[:, None]
    return torch.einsum("bhqk,bkhd->bqhd", scores.masked_fill(~visible, -torch.inf).softmax(-1), v)


def boundaries(length, packed=True):
    return torch.rand(2, length, generator=torch.Generator().manual_seed(1)) < 0.15 if packed else None


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("score", ["lorentz", "dot"])
@pytest.mark.parametrize(("window", "global_tokens"), SETTINGS)
@pytest.mark.parametrize("length", [1, 7, 16, 63])
@pytest.mark.parametrize("packed", [False, True])
def test_equals_dense_attention_with_every_gradient(length, window, global_tokens, score, packed, implementation):
    arguments = [x.requires_grad_() for x in problem(length)]
    beta = inverse_temperature(score)
    differentiated = arguments if beta is None else [*arguments, beta.requires_grad_()]
    options = {"window": window, "global_tokens": global_tokens, "beta": beta, "starts": boundaries(length, packed)}
    y, _ = IMPLEMENTATIONS[implementation](*arguments, **options, state=None)
    expected = dense(*arguments, **options)
    torch.testing.assert_close(y, expected)
    weights = torch.randn_like(y)
    gradients = [torch.autograd.grad((x * weights).sum(), differentiated) for x in (y, expected)]
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("score", ["lorentz", "dot"])
def test_gradients_reach_the_carried_keys(score):
    """What a piece reads of an earlier one, globals included, is differentiated: context parallelism sends these gradients back."""
    arguments, beta = [x.requires_grad_() for x in problem(30)], inverse_temperature(score)
    options = {"window": 8, "global_tokens": 3, "beta": beta, "starts": None}

    def in_pieces(*tensors):
        state, outputs = empty_window_state(2, 3, 4, like=tensors[1]), []
        for piece in (slice(0, 14), slice(14, 30)):
            y, state = kernel._by_operator(*(x[:, piece] for x in tensors), **options, state=state)
            outputs.append(y)
        return torch.cat(outputs, 1)

    weights = torch.randn_like(arguments[0])
    gradients = [torch.autograd.grad((y * weights).sum(), arguments) for y in (in_pieces(*arguments), dense(*arguments, **options))]
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("score", ["lorentz", "dot"])
@pytest.mark.parametrize(("carried", "packed"), [(False, False), (False, True), (True, True)])
def test_opcheck(carried, packed, score):
    q, k, v = (x.requires_grad_() for x in problem(13))
    beta = inverse_temperature(score)
    documents = boundaries(17).cumsum(1, dtype=torch.int32) if packed else None
    shared = [torch.randn(2, 3, 3, 4, dtype=torch.float64, requires_grad=True) for _ in range(2)] if carried else [None, None]
    if carried:
        k, v = (torch.cat((x[:, :4], x), 1).detach().requires_grad_() for x in (k, v))
    elif packed:
        documents = documents[:, :13]
    shared_documents = torch.zeros(2, 3, dtype=torch.int32) if carried else None
    arguments = (q, k, v, *shared, documents, shared_documents, None if beta is None else beta.requires_grad_(), 4, 3, 9 if carried else 0)
    torch.library.opcheck(kernel._forward, arguments)
    y, log_sum = kernel._forward(*arguments)
    detached = [x.detach() if isinstance(x, torch.Tensor) else x for x in (torch.randn_like(y), y, log_sum, *arguments)]
    torch.library.opcheck(kernel._backward, detached)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("score", ["lorentz", "dot"])
@pytest.mark.parametrize(("window", "global_tokens"), SETTINGS)
@pytest.mark.parametrize("pieces", [[1] * 40, [3, 30, 7], [25, 15]])
def test_pieces_with_carried_state_equal_the_whole(pieces, window, global_tokens, score, implementation):
    arguments = problem(40)
    starts = torch.zeros(2, 40, dtype=torch.bool)
    starts[0, 0] = starts[0, 21] = starts[1, 2] = True
    options = {"window": window, "global_tokens": global_tokens, "beta": inverse_temperature(score)}
    attention = IMPLEMENTATIONS[implementation]
    whole, _ = attention(*arguments, **options, starts=starts, state=None)
    state, outputs, begin = empty_window_state(2, 3, 4, like=arguments[1]), [], 0
    for size in pieces:
        piece = slice(begin, begin + size)
        y, state = attention(*(x[:, piece] for x in arguments), **options, starts=starts[:, piece], state=state)
        outputs.append(y)
        begin += size
    torch.testing.assert_close(torch.cat(outputs, 1), whole)
    assert state.keys.shape[1] == min(window - 1, 40) and state.global_keys.shape[1] == global_tokens


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_coinciding_query_and_key_have_finite_gradients(implementation):
    q, _, v = problem(20, dtype=torch.float32)
    q = q.requires_grad_()
    beta = inverse_temperature("lorentz", torch.float32)
    y, _ = IMPLEMENTATIONS[implementation](q, q, v, window=8, global_tokens=2, beta=beta, starts=None, state=None)
    (gradient,) = torch.autograd.grad(y.square().sum(), q)
    assert gradient.isfinite().all()


def test_memory_is_linear_in_the_length():
    """The largest tensor of the forward grows with T, not with T^2."""

    def largest(length):
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()) or x, lambda x: x):
            kernel.window_attention(*(x.requires_grad_() for x in problem(length, batch=1, heads=1)), window=8, global_tokens=2)
        return max(sizes)

    assert largest(512) <= 2.1 * largest(256)


@pytest.mark.parametrize("packed", [False, True])
def test_dot_scores_are_never_in_memory_on_a_cpu(packed):
    """torch's own attention keeps queries, keys and values for backward, none as large as the scores of all windows."""
    sizes, length, heads, head_size, window = [], 64, 4, 2, 32
    q, k, v = (torch.randn(1, length, heads, head_size, requires_grad=True) for _ in range(3))
    starts = torch.arange(length)[None] == 40 if packed else None
    with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()) or x, lambda x: x):
        kernel.window_attention(q, k, v, window=window, global_tokens=0, starts=starts)
    assert max(sizes) < heads * length * 2 * window
