import math

import pytest
import torch
from torch import nn

from phase8.config.model_section import ModelSection
from phase8.config.schema import OptimSection
from phase8.model.model import build_model
from phase8.optim.muon import COEFFICIENTS, NUM_ITERATIONS, Muon, matrices_of, orthogonalise
from phase8.optim.whole_matrices import WholeMatrices
from tests.optim.steps import RATES, take_steps

SECTION = OptimSection(name="muon", learning_rate=0.3, betas=(0.8, 0.9), eps=1e-6, weight_decay=0.2, momentum=0.9, momentum_warmup_steps=4)
SHAPES = {
    "blocks.0.mixer.q.weight": (6, 5), "blocks.0.mixer.k.weight": (3, 5), "blocks.0.mixer.v.weight": (9, 5),
    "blocks.0.mixer.out.weight": (5, 6), "blocks.0.feed_forward.experts.up": (3, 4, 7),
    "blocks.0.mixer.global_path.scalars.weight": (4, 5), "embedding.weight": (9, 5), "norm.weight": (5,), "head.weight": (9, 5),
}  # fmt: skip
DECAYED = {*(f"blocks.0.mixer.{name}.weight" for name in ("q", "k", "v", "out")), "blocks.0.feed_forward.experts.up", "head.weight"}
HEAD_SIZE = 3


def iterated(singular_values):
    """The polynomial of the iteration, of numbers."""
    a, b, c = COEFFICIENTS
    s = singular_values / singular_values.norm(dim=-1, keepdim=True)
    for _ in range(NUM_ITERATIONS):
        s = a * s + b * s**3 + c * s**5
    return s


def by_decomposition(matrix):
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    return u @ torch.diag_embed(iterated(s)) @ vh


@pytest.mark.parametrize("shape", [(6, 6), (4, 9), (9, 4), (3, 5, 7)])
def test_the_iteration_acts_on_singular_values_alone(shape):
    matrix = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(orthogonalise(matrix), by_decomposition(matrix), rtol=1e-6, atol=1e-6)
    values = torch.linalg.svdvals(orthogonalise(matrix))
    assert (values > 0.6).all() and (values < 1.3).all()
    assert orthogonalise(torch.zeros(shape)).count_nonzero() == 0


def parameters(dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    return {name: nn.Parameter(torch.randn(shape, dtype=dtype, generator=generator)) for name, shape in SHAPES.items()}


def muon(parts):
    wholes = WholeMatrices(matrices_of(parts), None, device=torch.device("cpu"))
    return Muon(parts, SECTION, wholes=wholes, head_size=HEAD_SIZE, decayed_names=DECAYED)


def by_hand(x, gradients, shape):
    """The formulas of the docstring."""
    m = torch.zeros_like(x)
    for step, (rate, gradient) in enumerate(zip(RATES, gradients, strict=True)):
        mu = 0.85 + (0.9 - 0.85) * min(step / 4, 1)
        m = mu * m + gradient
        update = by_decomposition((gradient + mu * m).view(shape)).view(x.shape)
        x = x - rate * (0.2 * x + 0.2 * math.sqrt(max(shape[-2:])) * update)
    return x


def test_matrices_follow_the_formulas_and_the_rest_adamw():
    """Queries, keys and values are a matrix for each head, however many heads each of them has."""
    parts, begin = parameters(), parameters()
    gradients = {name: [torch.randn_like(part) for _ in RATES] for name, part in parts.items()}
    take_steps(muon(parts), parts, gradients)
    shapes = {name: SHAPES[name] for name in DECAYED - {"head.weight"}}
    shapes |= {f"blocks.0.mixer.{name}.weight": (count, HEAD_SIZE, 5) for name, count in (("q", 2), ("k", 1), ("v", 3))}
    for name, shape in shapes.items():
        torch.testing.assert_close(parts[name].detach(), by_hand(begin[name].detach(), gradients[name], shape), rtol=1e-6, atol=1e-6)
    rest = {name: part for name, part in begin.items() if name not in shapes}
    decays = [[part for name, part in rest.items() if (name in DECAYED) is decayed] for decayed in (True, False)]
    groups = [{"params": params, "weight_decay": decay} for params, decay in zip(decays, (0.2, 0.0), strict=True)]
    take_steps(torch.optim.AdamW(groups, betas=SECTION.betas, eps=SECTION.eps, fused=True), rest, gradients)
    assert len(rest) == 4 and all(torch.equal(parts[name], part) for name, part in rest.items())


def test_gradients_are_divided_and_steps_that_do_not_count_change_nothing():
    parts, others = parameters(), parameters()
    optimizer, plain = muon(parts), muon(others)
    gradients = {name: torch.randn_like(part) for name, part in parts.items()}
    for scale, found_inf in ((4.0, 0.0), (1.0, 1.0), (2.0, 0.0)):
        before = {name: part.detach().clone() for name, part in parts.items()}
        states = {name: {key: value.clone() for key, value in optimizer.state[part].items()} for name, part in parts.items()}
        for name, part in parts.items():
            part.grad = gradients[name] * (torch.nan if found_inf else scale)
            others[name].grad = gradients[name].clone()
        optimizer.grad_scale, optimizer.found_inf = torch.tensor(scale), torch.tensor(found_inf)
        optimizer.step()
        if found_inf:
            assert all(torch.equal(part, before[name]) for name, part in parts.items())
            assert all(torch.equal(value, states[name][key]) for name, part in parts.items() for key, value in optimizer.state[part].items())
        else:
            plain.step()
            for name, part in parts.items():
                torch.testing.assert_close(part, others[name])


def test_the_state_is_what_is_declared():
    parts = parameters()
    optimizer = muon(parts)
    take_steps(optimizer, parts, {name: [torch.ones_like(part)] * len(RATES) for name, part in parts.items()})
    for name, part in parts.items():
        declared = optimizer.declare_state(name, part.shape)
        assert [tensor.key for tensor in declared.tensors] == list(optimizer.state[part]) and declared.is_divisible
        assert optimizer.state[part]["step"] == len(RATES)


def test_matrices_of_experts_are_orthogonalised_and_those_of_routers_are_not():
    """They are parameters of one module, which has no layer for each."""
    model = ModelSection(ffn="moe", num_experts=4, shared_experts=1, num_layers=1)
    built = build_model(model, dtype=torch.float32, device=torch.device("meta"))
    prefix, layers = "blocks.0.feed_forward.", ("gate", "up", "down")
    found = {name.removeprefix(prefix) for name in matrices_of(dict(built.named_parameters())) if name.startswith(prefix)}
    assert found == {*(f"experts.{layer}" for layer in layers), *(f"shared.{layer}.weight" for layer in layers)}
