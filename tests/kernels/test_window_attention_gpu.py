"""The Triton kernels: on a GPU on real shapes, without one in the interpreter on small ones, and their machine code."""

import pytest
import torch

from phase8.kernels import window_attention as operator
from phase8.kernels.reference import window_attention as reference
from phase8.kernels.window_state import VisibleKeys, empty_window_state, visible_keys
from tests.kernels.offline import OfflineKernel, compile_offline

ON_GPU = torch.cuda.is_available()
FIELDS = VisibleKeys.__dataclass_fields__
# tokens, window, globals, head size, carried tokens
SMALL = [(40, 16, 5, 16, 0), (33, 8, 20, 20, 0), (1, 4, 2, 16, 0), (17, 1, 1, 16, 0), (50, 64, 4, 16, 0), (20, 10, 3, 16, 30), (5, 10, 3, 16, 3)]
LARGE = [(1, 256, 64, 64, 0), (63, 16, 4, 64, 0), (257, 64, 16, 128, 0), (2048, 512, 64, 128, 0), (1000, 256, 100, 96, 0), (700, 256, 64, 64, 900)]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


@pytest.fixture(autouse=True)
def _exact_fp32_products():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """Memory that a kernel does not write shows as NaN."""
    pytest.importorskip("triton")
    empty, empty_like = torch.empty, torch.empty_like
    for module in ("window_attention", "window_attention_backward"):
        monkeypatch.setattr(f"phase8.kernels.gpu.{module}.torch.empty", lambda *a, **k: _poison(empty(*a, **k)))
        monkeypatch.setattr(f"phase8.kernels.gpu.{module}.torch.empty_like", lambda *a, **k: _poison(empty_like(*a, **k)))


def _poison(x):
    return x.fill_(float("nan")) if x.is_floating_point() else x


def problem(shape, *, score, packed, dtype, batch=2, heads=2):
    """Queries, what they see, the gradient of the output and beta: rounded to `dtype` and kept in fp64."""
    length, window, global_tokens, head_size, num_carried = shape
    generator = torch.Generator().manual_seed(0)

    def draw(tokens, count):
        x = torch.randn(count, batch, tokens, heads, head_size, generator=generator, dtype=torch.float64)
        return (x * head_size**-0.25).to(dtype).double()

    q, k, v, dy = draw(length, 4)
    starts = torch.rand(batch, length, generator=generator) < 0.05 if packed else None
    state = None
    if num_carried:
        earlier = torch.rand(batch, num_carried, generator=generator) < 0.05
        empty = empty_window_state(batch, heads, head_size, like=k)
        before = visible_keys(*draw(num_carried, 2), global_tokens=global_tokens, starts=earlier, state=empty)
        state = before.carried(window, num_carried)
    beta = torch.linspace(0.5, 2.0, heads, dtype=torch.float64) if score == "lorentz" else None
    return q, visible_keys(k, v, global_tokens=global_tokens, starts=starts, state=state), dy, beta


def moved(x, dtype, device):
    if isinstance(x, VisibleKeys):
        return VisibleKeys(*(moved(getattr(x, field), dtype, device) for field in FIELDS))
    return x.to(device, dtype if x.is_floating_point() else None) if isinstance(x, torch.Tensor) else x


def check(shape, device, *, score, packed, dtype):
    from phase8.kernels.gpu.window_attention import attend
    from phase8.kernels.gpu.window_attention_backward import attend_backward

    window = shape[1]
    q, seen, dy, beta = problem(shape, score=score, packed=packed, dtype=dtype)
    y, log_sum = reference.attend(q, seen, beta, window)
    expected = (y, log_sum, *reference.attend_backward(dy, y, log_sum, q, seen, beta, window))
    inputs = [moved(x, dtype, device) for x in (q, seen, dy)]
    on_device = None if beta is None else beta.to(device, torch.float32)
    y, log_sum = attend(*inputs[:2], on_device, window)
    found = (y, log_sum, *attend_backward(inputs[2], y, log_sum, *inputs[:2], on_device, window))
    for name, ours, theirs in zip(("y", "log_sum", "dq", "dk", "dv", "dgk", "dgv", "dbeta"), found, expected, strict=True):
        assert ours.isfinite().all(), name
        # The gradient of beta is a sum over the whole sequence whose terms nearly cancel: it is held to the size of its terms.
        error, scale = (ours.double().cpu() - theirs).norm(), theirs.norm() + 0.2 * (dy.norm() if name == "dbeta" else 1)
        assert error <= TOLERANCE[dtype] * scale, f"{name}: {error / scale:.1e}"


# Every shape with either score, and every score packed and not; all together are for the full tests.
@pytest.mark.parametrize(
    ("shape", "score", "packed"),
    [
        pytest.param(shape, score, packed, marks=[] if packed == ((number + (score == "dot")) % 2 == 0) else [pytest.mark.full])
        for number, shape in enumerate(SMALL)
        for score in ("lorentz", "dot")
        for packed in (False, True)
    ],
)
def test_small_shapes_equal_the_reference(shape, score, packed, kernel_device):
    check(shape, kernel_device, score=score, packed=packed, dtype=torch.float32)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("score", ["lorentz", "dot"])
@pytest.mark.parametrize("shape", LARGE)
def test_real_shapes_equal_the_reference(shape, score, packed, dtype, kernel_device):
    check(shape, kernel_device, score=score, packed=packed, dtype=dtype)


def test_views_of_one_buffer_are_read_in_place(kernel_device):
    from phase8.kernels.gpu.window_attention import attend

    buffer = torch.randn(2, 20, 3, 2, 16, generator=torch.Generator().manual_seed(0)).to(kernel_device)
    q, k, v = buffer.unbind(2)

    def run(q, k, v):
        return attend(q, visible_keys(k, v, global_tokens=3, starts=None, state=None), None, 8)[0]

    assert torch.equal(run(q, k, v), run(q.clone(), k.clone(), v.clone()))


def test_later_tokens_do_not_matter(kernel_device):
    from phase8.kernels.gpu.window_attention import attend

    q, k, v = torch.randn(3, 1, 40, 2, 16, generator=torch.Generator().manual_seed(0)).to(kernel_device)
    beta = torch.ones(2, device=kernel_device)

    def run(keys, values):
        return attend(q, visible_keys(keys, values, global_tokens=3, starts=None, state=None), beta, 8)[0]

    before = run(k, v)
    k, v = k.clone(), v.clone()
    k[:, 23] += 1
    v[:, 23] += 1
    after = run(k, v)
    assert torch.equal(after[:, :23], before[:, :23]) and not torch.equal(after[:, 23:], before[:, 23:])


@pytest.mark.gpu
@pytest.mark.parametrize("score", ["lorentz", "dot"])
def test_operator_runs_the_kernel_and_is_deterministic(score):
    def gradients():
        q, seen, dy, beta = problem((300, 64, 16, 64, 0), score=score, packed=False, dtype=torch.bfloat16)
        q, k, v = (x.to("cuda", torch.bfloat16).requires_grad_() for x in (q, seen.keys, seen.values))
        beta = None if beta is None else beta.to("cuda", torch.float32).requires_grad_()
        y, _ = operator.window_attention(q, k, v, window=64, global_tokens=16, beta=beta)
        return y, *torch.autograd.grad(y, [x for x in (q, k, v, beta) if x is not None], dy.to("cuda", torch.bfloat16))

    assert all(torch.equal(*pair) for pair in zip(gradients(), gradients(), strict=True))


def _offline(kernel, head_size, score):
    """Arguments of a launch at B 4, T 4096, H 16, W 256, G 64."""
    from phase8.kernels.gpu.window_attention import forward_tiles
    from phase8.kernels.gpu.window_attention_backward import column_tiles, row_tiles

    tiles = {"forward": forward_tiles, "row": row_tiles, "column": column_tiles}[kernel](head_size, 2, lorentz=score == "lorentz")
    pointers = {
        "forward": "q k v gk gv k_heights g_heights beta documents g_documents y log_sum",
        "row": "dy y log_sum q k v gk gv k_heights g_heights beta documents g_documents dq dbeta_parts deltas q_heights",
        "column": "dy log_sum deltas q k v q_heights k_heights beta documents k_documents dk dv",
    }[kernel]
    wide = {"k_heights", "g_heights", "q_heights", "beta", "log_sum", "dbeta_parts", "deltas"}
    absent = {"documents", "g_documents", "k_documents"} | (set() if score == "lorentz" else {"k_heights", "g_heights", "beta"})
    arguments = {name: None if name in absent else "*fp32" if name in wide else "*bf16" for name in pointers.split()}
    strides = {"forward": "q k v gk gv y", "row": "dy y q k v gk gv dq", "column": "dy q k v dk"}[kernel]
    width = 16 * head_size
    for name in strides.split():
        arguments |= {f"{name}_b": 4096 * width, f"{name}_t": width, f"{name}_h": head_size}
    sizes = {"num_queries": 4096, "num_carried": 0, "num_globals": 64, "num_seen": 0, "window": 256, "dot_scale": 0.1}
    constants = {"HEAD_SIZE": head_size, "BLOCK_K": head_size, "BLOCK_M": tiles.queries, "BLOCK_N": tiles.keys, "LORENTZ": score == "lorentz"}
    constants |= {"DOCUMENTS": False, "FAST": True, "PRECISION": "tf32"}
    if kernel != "column":
        constants["SPLIT"] = tiles.split
    else:
        arguments |= {"dk_p": 4 * 4096 * width, "num_columns": 4096}
        constants |= {"IS_GLOBAL": False, "PIECE": 512}
    module = "window_attention" if kernel == "forward" else "window_attention_backward"
    return OfflineKernel(f"phase8.kernels.gpu.{module}:_{kernel}_kernel", arguments | sizes | constants, tiles.num_warps, tiles.num_stages)


@pytest.fixture(scope="module")
def compiled():
    pytest.importorskip("triton")
    cases = [(kernel, head_size, score) for kernel in ("forward", "row", "column") for head_size in (64, 128) for score in ("lorentz", "dot")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("triton.knobs.runtime.interpret", False)
        kernels = {f"{kernel}-{head_size}-{score}": _offline(kernel, head_size, score) for kernel, head_size, score in cases}
    return compile_offline(kernels)


def test_machine_code_has_no_spills_and_uses_the_fast_units(compiled):
    for name, code in compiled.items():
        lorentz = name.endswith("lorentz")
        if name == "column-128-lorentz":  # see column_tiles
            assert code.stack <= 96 and code.count("HGMMA")
            continue
        code.check(contains=("HGMMA", "MUFU.EX2", *(("MUFU.LG2", "MUFU.RSQ") if lorentz else ())))
        assert code.shared <= 227 * 1024, name
