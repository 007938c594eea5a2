"""What the Triton kernels of every gated recurrence must do: in the interpreter on small shapes, on a GPU on real ones."""

import importlib

import pytest
import torch

# Batch, tokens, heads, key size, value size. Keys of 96 are read in parts that divide them, although their block of 128 has one part more.
SMALL = [(2, 1, 2, 16, 16), (1, 63, 2, 20, 20), (1, 130, 1, 16, 24), (1, 70, 1, 96, 24)]
LARGE = [(8, 4096, 4, 64, 64), (1, 8209, 2, 128, 128), (1, 20001, 1, 64, 64), (2, 1000, 3, 96, 64), (3, 257, 5, 32, 32), (1, 300, 2, 20, 50)]
VARIANTS = ["plain", "packed with a state"]
# fp32: decays are sums over a chunk, and a document boundary adds 160 to them. bf16: products of rounded numbers.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 1e-2}


@pytest.fixture(autouse=True)
def exact_fp32_products():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


def moved(x, dtype, device):
    """Fp64 to `dtype`; numbers of tokens and states, which are never rounded, to fp32."""
    if not isinstance(x, torch.Tensor):
        return None if x is None else tuple(moved(y, torch.float32 if i >= 3 else dtype, device) for i, y in enumerate(x))
    return x.to(device, dtype if x.is_floating_point() else None)


class RecurrenceKernelTests:
    """The tests. A subclass names what is tested.

    Attributes:
        operator: Module of the operator.
        reference: Module of the plain version.
        scalars: Names of the numbers that each head and token has, log alpha first.
        widest: Widest heads in bf16.
        too_wide: Heads in fp32 that the kernels leave to the plain version.
    """

    scalars = ("log_decay",)
    widest, too_wide = 256, 129

    @property
    def name(self):
        return self.operator.__name__.rpartition(".")[2]

    def kernel(self, *arguments, **options):
        """The forward."""
        return vars(importlib.import_module(f"phase8.kernels.gpu.{self.name}"))[self.name](*arguments, **options)

    def more_scalars(self, draw, shape):
        """The numbers of tokens after log alpha, fp64 [B, T, H]; `draw` gives uniform ones for their size."""
        return ()

    def problem(self, shape, variant, dtype=torch.float32):
        """Arguments of the forward and gradients of its results, rounded to `dtype` and kept in fp64; memories of 1 to 1000 tokens."""
        batch, length, heads, key_size, value_size = shape
        generator = torch.Generator().manual_seed(0)

        def draw(*size):
            return torch.randn(batch, *size, generator=generator).to(dtype).double()

        q, k, v, dy = draw(length, heads, key_size), draw(length, heads, key_size), draw(length, heads, value_size), draw(length, heads, value_size)
        log_decay = -torch.nn.functional.softplus(2 * draw(length, heads) - 9 * torch.linspace(1, 0, heads)).float().double()
        more = self.more_scalars(lambda *size: torch.rand(*size, generator=generator), shape)
        if variant == "plain":
            return (q, k, v, log_decay, *more, None, None), dy, None
        starts = torch.rand(batch, length, generator=generator) < 0.05
        return (q, k, v, log_decay, *more, starts, draw(heads, key_size, value_size)), dy, draw(heads, key_size, value_size)

    def run(self, arguments, dy, dstate, **options):
        """Y, the final state and all gradients."""
        backward = vars(importlib.import_module(f"phase8.kernels.gpu.{self.name}_backward"))[f"{self.name}_backward"]
        return *self.kernel(*arguments, **options), *backward(dy, dstate, *arguments, **options)

    def expect(self, arguments, dy, dstate):
        plain = vars(self.reference)
        return *plain[self.name](*arguments), *plain[f"{self.name}_backward"](dy, dstate, *arguments)

    def assert_close(self, found, expected, tolerance):
        names = ["y", "state", "dq", "dk", "dv", *(f"d{scalar}" for scalar in self.scalars), "dinitial"]
        for (ours, theirs), name in zip(zip(found, expected, strict=True), names, strict=False):
            assert ours.isfinite().all(), name
            error, scale = (ours.cpu().double() - theirs.cpu().double()).norm(), theirs.double().norm().cpu()
            assert error <= tolerance * max(scale, 1e-3), f"{name}: {error / scale:.1e}"  # without a past, a decay may have no gradient

    def check(self, shape, variant, dtype, device, **options):
        given = self.problem(shape, variant, dtype)
        arguments, dy, dstate = given
        found = self.run(moved(arguments, dtype, device), moved(dy, dtype, device), moved(dstate, torch.float32, device), **options)
        assert [x.dtype for x in found] == [dtype, torch.float32, dtype, dtype, dtype, *[torch.float32] * (len(self.scalars) + 1)]
        self.assert_close(found, self.expect(*given), TOLERANCE[dtype])

    @pytest.mark.parametrize("variant", VARIANTS)
    @pytest.mark.parametrize("shape", SMALL)
    def test_small_shapes_equal_the_reference(self, shape, variant, kernel_device, poisoned_memory):
        self.check(shape, variant, torch.float32, kernel_device)

    @pytest.mark.gpu
    @pytest.mark.parametrize("dtype", TOLERANCE)
    @pytest.mark.parametrize("variant", VARIANTS)
    @pytest.mark.parametrize("shape", LARGE)
    def test_real_shapes_equal_the_reference(self, shape, variant, dtype, kernel_device, poisoned_memory):
        self.check(shape, variant, dtype, kernel_device)

    @pytest.mark.gpu
    def test_the_widest_heads_equal_the_reference(self, kernel_device, poisoned_memory):
        self.check((1, 300, 2, self.widest, self.widest), "packed with a state", torch.bfloat16, kernel_device)

    @pytest.mark.parametrize("sizes", [(20, 20), (40, 24)])
    def test_blocks_of_columns_that_do_not_cover_a_head_evenly(self, sizes, kernel_device, poisoned_memory):
        from phase8.kernels.gpu.gated_linear_attention import Tiles

        self.check((1, 70, 1, *sizes), "packed with a state", torch.float32, kernel_device, tiles=Tiles(columns=16, num_warps=4, num_stages=1))

    @pytest.mark.parametrize("layout", ["one buffer", "heads before tokens", "columns apart"])
    def test_strides_do_not_matter(self, layout, kernel_device):
        arguments, dy, dstate = self.problem((2, 9, 2, 16, 16), "packed with a state")
        arguments, dy, dstate = moved(arguments, torch.float32, kernel_device), moved(dy, torch.float32, kernel_device), dstate.to(kernel_device)
        q, k, v, *scalars, starts, state = arguments
        if layout == "one buffer":
            strided = torch.stack((q, k, v, dy), 2).unbind(2)
        elif layout == "heads before tokens":
            strided = tuple(x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v, dy))
        else:
            strided = tuple(torch.stack((x, x), -1)[..., 0] for x in (q, k, v, dy))
        assert not any(x.is_contiguous() for x in strided)
        scalars = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in scalars]
        starts, state = starts.T.contiguous().T, state.mT.contiguous().mT
        found = self.run((*strided[:3], *scalars, starts, state), strided[3], dstate)
        assert all(torch.equal(x, y) for x, y in zip(found, self.run(arguments, dy, dstate), strict=True))

    @pytest.mark.parametrize("split", [1, 64, 100])
    def test_pieces_with_carried_state_equal_the_whole(self, split, kernel_device):
        *arguments, _, state = moved(self.problem((1, 130, 1, 16, 16), "packed with a state")[0], torch.float32, kernel_device)
        whole, final = self.kernel(*arguments, None, state)
        head, carried = self.kernel(*(x[:, :split] for x in arguments), None, state)
        tail, last = self.kernel(*(x[:, split:] for x in arguments), None, carried)
        self.assert_close((torch.cat((head, tail), 1), last), (whole, final), 1e-5)

    def test_later_tokens_do_not_matter_and_earlier_documents_neither(self, kernel_device):
        *arguments, _, _ = moved(self.problem((1, 90, 2, 16, 16), "plain")[0], torch.float32, kernel_device)
        starts = torch.zeros(1, 90, dtype=torch.bool, device=kernel_device)
        starts[:, 40] = True
        changed = [x.clone() for x in arguments]
        for x in changed[:3]:
            x[:, 20] -= 1
        before, after = (self.kernel(*x, starts, None)[0] for x in (arguments, changed))
        assert torch.equal(after[:, :20], before[:, :20]) and torch.equal(after[:, 40:], before[:, 40:])
        assert (after[:, 20:40] != before[:, 20:40]).any()

    def test_decays_of_zero_and_of_one_keep_their_gradients(self, kernel_device):
        arguments, dy, _ = self.problem((1, 80, 1, 16, 16), "plain")
        log_decay = arguments[3]
        log_decay[:, 10:20], log_decay[:, 15], log_decay[:, 30:40], log_decay[:, 50:53] = -1e30, -torch.inf, 0.0, -1e-20
        found = self.run(moved(arguments, torch.float32, kernel_device), moved(dy, torch.float32, kernel_device), None)
        self.assert_close(found, self.expect(arguments, dy, None), 1e-4)

    def test_memories_of_a_million_tokens_keep_their_precision_and_end_at_documents(self, kernel_device):
        (q, k, v, log_decay, *more, _, _), dy, _ = self.problem((1, 70, 1, 16, 16), "plain")
        log_decay = (1e-6 * log_decay).float().double()
        starts = torch.zeros(1, 70, dtype=torch.bool)
        starts[:, 50] = True
        state = 1e4 * torch.ones(1, 1, 16, 16, dtype=torch.float64)
        arguments = (q, k, v, log_decay, *more, starts, state)
        found = self.run(moved(arguments, torch.float32, kernel_device), moved(dy, torch.float32, kernel_device), None)
        expected = self.expect(arguments, dy, None)
        self.assert_close(found, expected, 1e-4)
        # What the documents before have carried along, which is large, is not in the gradient of a decay that drops it.
        assert (found[5][:, 50:].cpu() - expected[5][:, 50:]).norm() <= 1e-4 * expected[5][:, 50:].norm()

    @pytest.fixture
    def through_triton(self, monkeypatch, kernel_device):
        monkeypatch.setattr(self.operator, "uses_triton", lambda x: True)
        return kernel_device

    def test_the_operator_runs_the_kernels_in_fp32_and_the_reference_in_fp64_and_for_wide_heads(self, through_triton, monkeypatch):
        given, operate = self.problem((1, 20, 1, 16, 16), "packed with a state"), vars(self.operator)[self.name]
        arguments, dy, dstate = given
        leaves = [x if x is None or x.dtype == torch.bool else x.requires_grad_() for x in moved(arguments, torch.float32, through_triton)]
        with monkeypatch.context() as without:
            without.delattr(self.reference, self.name)
            without.delattr(self.reference, f"{self.name}_backward")
            outputs = operate(*leaves)
            inputs = [x for x in leaves if x.requires_grad]
            gradients = torch.autograd.grad(outputs, inputs, [moved(x, torch.float32, through_triton) for x in (dy, dstate)])
        self.assert_close((*outputs, *gradients), self.expect(*given), 1e-4)
        for dtype, size in ((torch.float64, 16), (torch.float32, self.too_wide)):
            q, k, v = torch.randn(3, 1, 2, 1, size, dtype=dtype, device=through_triton)
            assert not self.operator._runs_on_triton(q, v)
            operate(q, k, v, *torch.zeros(len(self.scalars), 1, 2, 1, dtype=dtype, device=through_triton))

    def test_opcheck_through_the_kernels(self, through_triton):
        arguments, dy, dstate = self.problem((1, 6, 1, 16, 16), "packed with a state")
        arguments = moved(arguments, torch.float32, through_triton)
        trained = tuple(x if x.dtype == torch.bool else x.clone().requires_grad_() for x in arguments)
        given = tuple(moved(x, torch.float32, through_triton) for x in (dy, dstate))
        promises = ("test_schema", "test_faketensor")  # what else opcheck looks at does not depend on the kernels
        torch.library.opcheck(self.operator._forward, trained, test_utils=promises)
        torch.library.opcheck(self.operator._backward, (*given, *arguments), test_utils=promises)

    @pytest.mark.gpu
    def test_twice_the_same_bits(self):
        arguments, dy, dstate = self.problem((2, 4096, 8, 64, 64), "packed with a state", torch.bfloat16)
        given = moved(arguments, torch.bfloat16, "cuda"), moved(dy, torch.bfloat16, "cuda"), moved(dstate, torch.float32, "cuda")
        assert all(torch.equal(x, y) for x, y in zip(self.run(*given), self.run(*given), strict=True))
