"""The Triton kernels: in the interpreter on small shapes, on a GPU on real ones, and their machine code."""

import pytest
import torch

from phase8.kernels import gated_delta_rule as operator
from phase8.kernels.reference import gated_delta_rule as reference
from tests.kernels.offline import OfflineKernel, compile_offline

pytest.importorskip("triton")

SMALL = [(2, 1, 2, 16, 16), (1, 63, 2, 20, 20), (1, 130, 1, 16, 24)]  # batch, tokens, heads, key size, value size
LARGE = [(8, 4096, 4, 64, 64), (1, 8209, 2, 128, 128), (1, 20001, 1, 64, 64), (2, 1000, 3, 96, 64), (3, 257, 5, 32, 32), (1, 300, 2, 20, 50)]
RESULTS = ["y", "state", "dq", "dk", "dv", "dlog_decay", "dbeta", "dinitial"]
VARIANTS = ["plain", "packed with a state"]
# fp32: decays are sums over a chunk, and a document boundary adds 160 to them. bf16: products of rounded numbers.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 1e-2}


@pytest.fixture(autouse=True)
def _exact_fp32_products():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


def problem(shape, variant, dtype=torch.float32):
    """Arguments of the forward and gradients of its results, rounded to `dtype` and kept in fp64.

    Memories of 1 to 1000 tokens; of what a key holds, nearly nothing to all is replaced.
    """
    batch, length, heads, key_size, value_size = shape
    generator = torch.Generator().manual_seed(0)

    def draw(*size):
        return torch.randn(batch, *size, generator=generator).to(dtype).double()

    q, k, v, dy = draw(length, heads, key_size), draw(length, heads, key_size), draw(length, heads, value_size), draw(length, heads, value_size)
    log_decay = -torch.nn.functional.softplus(2 * draw(length, heads) - 9 * torch.linspace(1, 0, heads)).float().double()
    beta = (torch.rand(batch, length, heads, generator=generator) / key_size).double()
    if variant == "plain":
        return (q, k, v, log_decay, beta, None, None), dy, None
    starts = torch.rand(batch, length, generator=generator) < 0.05
    return (q, k, v, log_decay, beta, starts, draw(heads, key_size, value_size)), dy, draw(heads, key_size, value_size)


def moved(x, dtype, device):
    """fp64 to `dtype`; decays, shares and states, which are never rounded, to fp32."""
    if not isinstance(x, torch.Tensor):
        return None if x is None else tuple(moved(y, torch.float32 if i in (3, 4, 6) else dtype, device) for i, y in enumerate(x))
    return x.to(device, dtype if x.is_floating_point() else None)


def run(arguments, dy, dstate, **options):
    """y, the final state and all gradients."""
    from phase8.kernels.gpu.gated_delta_rule import gated_delta_rule
    from phase8.kernels.gpu.gated_delta_rule_backward import gated_delta_rule_backward

    return *gated_delta_rule(*arguments, **options), *gated_delta_rule_backward(dy, dstate, *arguments, **options)


def expect(arguments, dy, dstate):
    return *reference.gated_delta_rule(*arguments), *reference.gated_delta_rule_backward(dy, dstate, *arguments)


def assert_close(found, expected, tolerance):
    for (ours, theirs), name in zip(zip(found, expected, strict=True), RESULTS, strict=False):
        assert ours.isfinite().all(), name
        error, scale = (ours.cpu().double() - theirs.cpu().double()).norm(), theirs.double().norm().cpu()
        assert error <= tolerance * max(scale, 1e-3), f"{name}: {error / scale:.1e}"  # without a past, no decay has a gradient


def check(shape, variant, dtype, device, **options):
    given = problem(shape, variant, dtype)
    arguments, dy, dstate = given
    found = run(moved(arguments, dtype, device), moved(dy, dtype, device), moved(dstate, torch.float32, device), **options)
    assert [x.dtype for x in found] == [dtype, torch.float32, dtype, dtype, dtype, *[torch.float32] * 3]
    assert_close(found, expect(*given), TOLERANCE[dtype])


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("shape", SMALL)
def test_small_shapes_equal_the_reference(shape, variant, kernel_device, poisoned_memory):
    check(shape, variant, torch.float32, kernel_device)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("shape", LARGE)
def test_real_shapes_equal_the_reference(shape, variant, dtype, kernel_device, poisoned_memory):
    check(shape, variant, dtype, kernel_device)


@pytest.mark.gpu
def test_the_widest_heads_equal_the_reference(kernel_device, poisoned_memory):
    check((1, 300, 2, 128, 128), "packed with a state", torch.bfloat16, kernel_device)


@pytest.mark.parametrize("sizes", [(20, 20), (40, 24)])
def test_blocks_of_columns_that_do_not_cover_a_head_evenly(sizes, kernel_device, poisoned_memory):
    from phase8.kernels.gpu.gated_delta_rule import Tiles

    check((1, 70, 1, *sizes), "packed with a state", torch.float32, kernel_device, tiles=Tiles(columns=16, num_warps=4, num_stages=1))


@pytest.mark.parametrize("layout", ["one buffer", "heads before tokens", "columns apart"])
def test_strides_do_not_matter(layout, kernel_device):
    arguments, dy, dstate = problem((2, 9, 2, 16, 16), "packed with a state")
    arguments, dy, dstate = moved(arguments, torch.float32, kernel_device), moved(dy, torch.float32, kernel_device), dstate.to(kernel_device)
    q, k, v, log_decay, beta, starts, state = arguments
    if layout == "one buffer":
        strided = torch.stack((q, k, v, dy), 2).unbind(2)
    elif layout == "heads before tokens":
        strided = tuple(x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v, dy))
    else:
        strided = tuple(torch.stack((x, x), -1)[..., 0] for x in (q, k, v, dy))
    assert not any(x.is_contiguous() for x in strided)
    log_decay, beta = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (log_decay, beta))
    starts, state = starts.T.contiguous().T, state.mT.contiguous().mT
    found = run((*strided[:3], log_decay, beta, starts, state), strided[3], dstate)
    assert all(torch.equal(x, y) for x, y in zip(found, run(arguments, dy, dstate), strict=True))


@pytest.mark.parametrize("split", [1, 64, 100])
def test_pieces_with_carried_state_equal_the_whole(split, kernel_device):
    from phase8.kernels.gpu.gated_delta_rule import gated_delta_rule

    *arguments, _, state = moved(problem((1, 130, 1, 16, 16), "packed with a state")[0], torch.float32, kernel_device)
    whole, final = gated_delta_rule(*arguments, None, state)
    head, carried = gated_delta_rule(*(x[:, :split] for x in arguments), None, state)
    tail, last = gated_delta_rule(*(x[:, split:] for x in arguments), None, carried)
    assert_close((torch.cat((head, tail), 1), last), (whole, final), 1e-5)


def test_later_tokens_do_not_matter_and_earlier_documents_neither(kernel_device):
    from phase8.kernels.gpu.gated_delta_rule import gated_delta_rule

    *arguments, _, _ = moved(problem((1, 90, 2, 16, 16), "plain")[0], torch.float32, kernel_device)
    starts = torch.zeros(1, 90, dtype=torch.bool, device=kernel_device)
    starts[:, 40] = True
    changed = [x.clone() for x in arguments]
    for x in changed[:3]:
        x[:, 20] -= 1
    before, after = (gated_delta_rule(*x, starts, None)[0] for x in (arguments, changed))
    assert torch.equal(after[:, :20], before[:, :20]) and torch.equal(after[:, 40:], before[:, 40:])
    assert (after[:, 20:40] != before[:, 20:40]).any()


def test_decays_of_zero_and_of_one_keep_their_gradients(kernel_device):
    arguments, dy, _ = problem((1, 80, 1, 16, 16), "plain")
    log_decay = arguments[3]
    log_decay[:, 10:20], log_decay[:, 15], log_decay[:, 30:40], log_decay[:, 50:53] = -1e30, -torch.inf, 0.0, -1e-20
    found = run(moved(arguments, torch.float32, kernel_device), moved(dy, torch.float32, kernel_device), None)
    assert_close(found, expect(arguments, dy, None), 1e-4)


def test_memories_of_a_million_tokens_keep_their_precision_and_end_at_documents(kernel_device):
    (*arguments, log_decay, beta, _, _), dy, _ = problem((1, 70, 1, 16, 16), "plain")
    log_decay = (1e-6 * log_decay).float().double()
    starts = torch.zeros(1, 70, dtype=torch.bool)
    starts[:, 50] = True
    state = 1e4 * torch.ones(1, 1, 16, 16, dtype=torch.float64)
    arguments = (*arguments, log_decay, beta, starts, state)
    found = run(moved(arguments, torch.float32, kernel_device), moved(dy, torch.float32, kernel_device), None)
    expected = expect(arguments, dy, None)
    assert_close(found, expected, 1e-4)
    # What the documents before have carried along, which is large, is not in the gradient of a decay that drops it.
    assert (found[5][:, 50:].cpu() - expected[5][:, 50:]).norm() <= 1e-4 * expected[5][:, 50:].norm()


@pytest.fixture
def through_triton(monkeypatch, kernel_device):
    monkeypatch.setattr(operator, "uses_triton", lambda x: True)
    return kernel_device


def test_the_operator_runs_the_kernels_in_fp32_and_the_reference_in_fp64_and_for_wide_heads(through_triton, monkeypatch):
    given = problem((1, 20, 1, 16, 16), "packed with a state")
    arguments, dy, dstate = given
    leaves = [x if x is None or x.dtype == torch.bool else x.requires_grad_() for x in moved(arguments, torch.float32, through_triton)]
    with monkeypatch.context() as without:
        without.delattr(reference, "gated_delta_rule")
        without.delattr(reference, "gated_delta_rule_backward")
        outputs = operator.gated_delta_rule(*leaves)
        inputs = [x for x in leaves if x.requires_grad]
        gradients = torch.autograd.grad(outputs, inputs, [moved(x, torch.float32, through_triton) for x in (dy, dstate)])
    assert_close((*outputs, *gradients), expect(*given), 1e-4)
    for dtype, size in ((torch.float64, 16), (torch.float32, 65)):
        q, k, v = torch.randn(3, 1, 2, 1, size, dtype=dtype, device=through_triton)
        assert not operator._runs_on_triton(q, v)
        operator.gated_delta_rule(q, k, v, *torch.zeros(2, 1, 2, 1, dtype=dtype, device=through_triton))


def test_opcheck_through_the_kernels(through_triton):
    arguments, dy, dstate = problem((1, 6, 1, 16, 16), "packed with a state")
    arguments = moved(arguments, torch.float32, through_triton)
    trained = tuple(x if x.dtype == torch.bool else x.clone().requires_grad_() for x in arguments)
    promises = ("test_schema", "test_faketensor")  # what else opcheck looks at does not depend on the kernels
    torch.library.opcheck(operator._forward, trained, test_utils=promises)
    torch.library.opcheck(operator._backward, (*(moved(x, torch.float32, through_triton) for x in (dy, dstate)), *arguments), test_utils=promises)


@pytest.mark.gpu
def test_twice_the_same_bits():
    arguments, dy, dstate = problem((2, 4096, 8, 64, 64), "packed with a state", torch.bfloat16)
    given = moved(arguments, torch.bfloat16, "cuda"), moved(dy, torch.bfloat16, "cuda"), moved(dstate, torch.float32, "cuda")
    assert all(torch.equal(x, y) for x, y in zip(run(*given), run(*given), strict=True))


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
