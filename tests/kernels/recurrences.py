"""What every gated recurrence must do: the tests of gated linear attention and of the gated delta rule, on the CPU.

Shapes: B batch, T tokens, H heads, K key size, V value size.
"""

import pytest
import torch

LENGTHS = [1, 63, 64, 65, 257]


def initial_state(batch=2, heads=3, key_size=4, value_size=5):
    return torch.randn(batch, heads, key_size, value_size, dtype=torch.float64, generator=torch.Generator().manual_seed(5))


def random_starts(length, batch=2):
    return torch.rand(batch, length, generator=torch.Generator().manual_seed(3)) < 0.05


def without_earlier_documents(state, starts, i):
    """The state before token i, dropped where the token begins a document."""
    return state if starts is None else state * (~starts[:, i])[:, None, None, None]


def gradients(function, arguments, starts, state):
    """Gradients of a sum over y and the final state, weighted at random with numbers that every dtype represents."""
    arguments = [x.detach().requires_grad_() for x in (arguments if state is None else [*arguments, state])]
    tensors = arguments if state is None else arguments[:-1]
    outputs = function(*tensors, starts, None if state is None else arguments[-1])
    generator = torch.Generator().manual_seed(7)
    weights = [torch.randn(x.shape, generator=generator).bfloat16().to(x.dtype) for x in outputs]
    return torch.autograd.grad(outputs, arguments, weights)


class RecurrenceTests:
    """The tests. A subclass names what is tested.

    Attributes:
        operator: Module of the operator.
        function: The operator.
        reference: Its plain version.
        recurrence: The defining loop over tokens, with the arguments of the operator.
        problem: Makes its tensors up to `starts`: queries, keys, values [B, T, H, K or V], then log alpha and other numbers [B, T, H].
    """

    @pytest.mark.parametrize("carried", [False, True])
    @pytest.mark.parametrize("packed", [False, True])
    @pytest.mark.parametrize("length", LENGTHS)
    def test_equals_the_recurrence_with_every_gradient(self, length, packed, carried):
        arguments, state = self.problem(length), initial_state() if carried else None
        starts = random_starts(length) if packed else None
        for ours, theirs in zip(self.function(*arguments, starts, state), self.recurrence(*arguments, starts, state), strict=True):
            torch.testing.assert_close(ours, theirs)
        found, expected = (gradients(function, arguments, starts, state) for function in (self.function, self.recurrence))
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)

    def test_gradcheck_of_the_backward(self):
        inputs = [x.requires_grad_() for x in (*self.problem(9, heads=1, key_size=2, value_size=3), initial_state(2, 1, 2, 3))]
        starts = torch.zeros(2, 9, dtype=torch.bool)
        starts[0, 4] = starts[1, 0] = starts[1, 7] = True
        assert torch.autograd.gradcheck(lambda *given: self.function(*given[:-1], starts, given[-1]), inputs)
        assert torch.autograd.gradcheck(self.function, inputs[:-1])

    @pytest.mark.parametrize("only", ["y", "state"])
    def test_one_result_may_go_without_a_gradient(self, only, monkeypatch):
        seen = []
        backward = self.operator._backward
        monkeypatch.setattr(self.operator, "_backward", lambda *given: seen.append(given[1]) or backward(*given))
        arguments = [x.requires_grad_() for x in self.problem(70)]
        (y, state), (expected_y, expected_state) = self.function(*arguments), self.recurrence(*arguments)
        pair = (y, expected_y) if only == "y" else (state, expected_state)
        for ours, theirs in zip(*(torch.autograd.grad(x.square().sum(), arguments, allow_unused=True) for x in pair), strict=True):
            torch.testing.assert_close(ours, torch.zeros_like(ours) if theirs is None else theirs, rtol=1e-9, atol=1e-11)
        assert (seen[0] is None) == (only == "y")  # no zeros are made

    @pytest.mark.parametrize("split", [1, 64, 100])
    def test_chunks_with_carried_state_equal_the_whole(self, split):
        arguments = self.problem(130)
        whole, final = self.function(*arguments)
        head, carried = self.function(*(x[:, :split] for x in arguments))
        tail, last = self.function(*(x[:, split:] for x in arguments), None, carried)
        torch.testing.assert_close(torch.cat((head, tail), 1), whole)
        torch.testing.assert_close(last, final)

    def test_decays_of_zero_and_of_one_keep_their_gradients_in_fp32(self):
        arguments = self.problem(80, dtype=torch.float32)
        arguments[3][:, 10:20], arguments[3][:, 30:40], arguments[3][:, 15] = -1e30, 0.0, -torch.inf
        exact = [x.double() for x in arguments]
        exact[3].clamp_(min=-700)
        found, expected = gradients(self.function, arguments, None, None), gradients(self.recurrence, exact, None, None)
        for ours, theirs in zip(found, expected, strict=True):
            assert (ours - theirs).norm() <= 5e-5 * theirs.norm()

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_lower_precision(self, dtype):
        """With decays that vary by orders of magnitude: what short memories carry is not drowned by the rounding of long ones."""
        q, k, v, *scalars = self.problem(257, dtype=torch.float32)
        rounded = [*(x.to(dtype) for x in (q, k, v)), *scalars]
        exact = [x.double() for x in rounded]
        y, state = self.function(*rounded)
        assert y.dtype == dtype and state.dtype == torch.float32
        found = (y, state, *gradients(self.function, rounded, None, None))
        expected = (*self.recurrence(*exact), *gradients(self.recurrence, exact, None, None))
        for ours, theirs in zip(found, expected, strict=True):
            # bf16: one rounding of the result. fp32: sums of log alpha over a chunk are as imprecise as they are large, here around 1000.
            assert (ours.double() - theirs).norm() <= max(torch.finfo(dtype).eps / 2, 5e-5) * theirs.norm()

    def test_decays_at_the_start_of_a_document_carry_no_gradient_of_what_they_drop(self):
        arguments = self.problem(70, dtype=torch.float32)
        arguments[3] *= 1e-6
        starts = torch.zeros(2, 70, dtype=torch.bool)
        starts[:, 50] = True
        state = 1e4 * initial_state().float()
        found = gradients(self.function, arguments, starts, state)[3][:, 50]
        expected = gradients(self.recurrence, [x.double() for x in arguments], starts, state.double())[3][:, 50]
        assert (found - expected).norm() <= 1e-4 * expected.norm()

    def test_later_tokens_do_not_matter_and_earlier_documents_neither(self):
        arguments = self.problem(90)
        starts = torch.zeros(2, 90, dtype=torch.bool)
        starts[:, 40] = True
        changed = [x.clone() for x in arguments]
        for x in changed[:3]:
            x[:, 20] -= 1
        before, after = self.function(*arguments, starts)[0], self.function(*changed, starts)[0]
        assert torch.equal(after[:, :20], before[:, :20]) and torch.equal(after[:, 40:], before[:, 40:])
        assert (after[:, 20:40] != before[:, 20:40]).any()

    @pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
    @pytest.mark.parametrize("with_state", [True, False])
    def test_opcheck(self, with_state, dtype):
        q, k, v, *scalars = self.problem(6, dtype=dtype)
        starts = torch.zeros(2, 6, dtype=torch.bool) if with_state else None
        wide = torch.promote_types(dtype, torch.float32)
        state = initial_state().to(wide) if with_state else None
        inputs = (q, k, v, *(x.to(wide) for x in scalars), starts, state)
        # The gradient of the state has the dtype of the arithmetic, and is not that of a state that is None.
        trained = tuple(x if x is None or x.dtype == torch.bool else x.detach().clone().requires_grad_() for x in inputs)
        torch.library.opcheck(self.operator._forward, trained)
        dy = torch.randn(2, 3, 6, 5, dtype=dtype).transpose(1, 2)
        torch.library.opcheck(self.operator._backward, (dy, initial_state().to(wide) if with_state else None, *inputs))

    def test_compiles_without_a_graph_break(self):
        arguments, state = self.problem(70), initial_state()
        starts = random_starts(70)
        compiled = torch.compile(self.function, fullgraph=True, backend="aot_eager")
        for ours, theirs in zip(*(gradients(function, arguments, starts, state) for function in (compiled, self.recurrence)), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)

    def test_reference_records_its_own_gradients(self):
        """What torch.compile differentiates in the benchmark."""
        arguments, state = self.problem(70), initial_state()
        functions = (self.reference, self.function)
        for ours, theirs in zip(*(gradients(function, arguments, random_starts(70), state) for function in functions), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)
