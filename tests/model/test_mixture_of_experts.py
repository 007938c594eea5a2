"""The mixture of experts of a layer against loops over tokens: choices, what is dropped, losses, and what routers learn from a step."""

import math

import pytest
import torch

from phase8.config.model_section import ModelSection
from phase8.distributed.collectives import ALONE
from phase8.model.mixture_of_experts import ROUTING, MixtureOfExperts
from phase8.model.parameters import initialise, materialise
from phase8.precision.formats import OPERAND_DTYPE
from tests.model.oracle import experts_of_a_token
from tests.model.small import perturbed_model, random_tokens, scaled_down

B, T, D, E = 3, 20, 12, 4


def layer(**changes):
    """A layer whose experts differ, in float64."""
    section = ModelSection(ffn="moe", d_model=D, num_heads=2, num_experts=E, expert_ffn_size=8, **changes)
    with torch.device("meta"):
        module = MixtureOfExperts(section, axis=ALONE, number_format=OPERAND_DTYPE)
    materialise(module, device=torch.device("cpu"), axis=ALONE)
    initialise(module, seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.4 * torch.randn(parameter.shape, generator=generator)
    return section, module.double()


def stream():
    return torch.randn(B, T, D, dtype=torch.float64, generator=torch.Generator().manual_seed(2)).requires_grad_()


def parameters_of(module):
    return {f"feed_forward.{name}": value for name, value in module.named_parameters()}


def choices_by_loops(section, module, x):
    """For each sequence and token, whether the expert still takes each of its choices, in the order of scores."""
    capacity = None if section.capacity_factor is None else math.ceil(section.capacity_factor * section.top_k * T / E)
    taken, scores = [], (x @ module.router.scores.weight.T).softmax(-1)
    for sequence in scores:
        counts = [0] * E
        for token in sequence:
            for expert in torch.argsort(token, descending=True)[: section.top_k].tolist():
                taken.append(capacity is None or counts[expert] < capacity)
                counts[expert] += 1
    return torch.tensor(taken).view(B, T, section.top_k)


@pytest.mark.parametrize("changes", [{}, {"capacity_factor": 1.0}, {"top_k": 1}, {"top_k": 4}, {"shared_experts": 1, "capacity_factor": 1.0}])
def test_a_token_is_the_weighted_sum_of_its_experts_that_have_room(changes):
    section, module = layer(**changes)
    x, p = stream(), parameters_of(module)
    y, found = module(x, T)
    taken = choices_by_loops(section, module, x)
    assert found[ROUTING][E] == (~taken).sum() and found[ROUTING][:E].sum() == B * T * section.top_k
    assert taken.all() or section.capacity_factor == 1.0 or section.top_k == 1
    everything = torch.stack([torch.stack([experts_of_a_token(section, p, token) for token in sequence]) for sequence in x])
    is_whole = taken.all(-1)
    torch.testing.assert_close(y[is_whole], everything[is_whole])
    if not taken.all():
        assert (y - everything)[~is_whole].abs().amax(-1).min() > 1e-6
    with torch.no_grad():  # evaluation and generation drop nothing
        torch.testing.assert_close(module(x, T)[0], everything)


def test_gradients_are_those_of_loops():
    section, module = layer(capacity_factor=None)
    x, p = stream(), parameters_of(module)
    weights = torch.randn(B, T, D, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    expected = torch.stack([torch.stack([experts_of_a_token(section, p, token) for token in sequence]) for sequence in x])
    inputs = [x, *module.parameters()]
    found = torch.autograd.grad((module(x, T)[0] * weights).sum(), inputs)
    for ours, theirs in zip(found, torch.autograd.grad((expected * weights).sum(), inputs), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_what_is_dropped_depends_on_earlier_tokens_of_the_sequence_alone():
    _, module = layer(capacity_factor=1.0)
    x = stream().detach()
    before, _ = module(x, T)
    changed = x.clone()
    changed[0, 12] += 3
    after, _ = module(changed, T)
    for ours, theirs in ((after[0, :12], before[0, :12]), (after[1:], before[1:])):  # other numbers of rows are added up in other orders
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("capacity_factor", [None, 1.0])
@pytest.mark.parametrize("bias", [[9.0, 0, 0, 0], [9.0, 0, 0, -9], [0, 0, -9, 9]])
def test_experts_without_tokens_and_with_all_of_them(bias, capacity_factor):
    """Every parameter gets a gradient, zero where no token came by: a rank without one would leave the others waiting."""
    _, module = layer(top_k=1, capacity_factor=capacity_factor)
    module.router.bias.copy_(torch.tensor(bias))
    y, found = module(stream(), T)
    y.sum().backward()
    counts = found[ROUTING][:E]
    assert counts[torch.tensor(bias) < 0].sum() == 0 and (max(bias) < 9 or counts.max() == B * T)
    for name in ("gate", "up", "down"):
        gradient = getattr(module.experts, name).grad
        assert torch.equal(gradient.abs().amax((1, 2)) > 0, counts > 0)
    assert found[ROUTING][E] == (0 if capacity_factor is None else B * (T - T // E) * (max(bias) == 9))


def test_losses_by_their_formulas():
    _, module = layer(balance_loss_weight=0.3, router_z_loss_weight=0.1)
    module.router.load.copy_(torch.tensor([0.4, 0.3, 0.2, 0.1]))
    x = stream()
    _, found = module(x, T)
    logits = (x @ module.router.scores.weight.T).flatten(0, 1)
    scores = logits.softmax(-1)
    torch.testing.assert_close(found["balance"] / (B * T), 0.3 * E * (module.router.load * scores.mean(0)).sum())
    torch.testing.assert_close(found["router_z"] / (B * T), 0.1 * logits.exp().sum(-1).log().square().mean())
    entropy, imbalance = found[ROUTING][-2:].double()
    torch.testing.assert_close(entropy, -(scores * scores.log()).sum().detach(), rtol=1e-6, atol=0)
    torch.testing.assert_close(imbalance, found["balance"].detach() / 0.3, rtol=1e-6, atol=0)


def test_a_router_learns_shares_and_bias_from_a_step_that_counts():
    _, module = layer(router_bias_rate=0.01)
    router, counts = module.router, torch.tensor([6.0, 2.0, 4.0, 4.0], dtype=torch.float64)
    router.learn_from(counts, torch.tensor(False))
    assert router.load.tolist() == [0.25] * 4 and router.bias.tolist() == [0.0] * 4
    router.learn_from(counts, torch.tensor(True))
    assert router.load.tolist() == [0.375, 0.125, 0.25, 0.25]
    torch.testing.assert_close(router.bias, torch.tensor([-0.01, 0.01, 0, 0], dtype=torch.float64))
    router.learn_from(torch.zeros(4, dtype=torch.float64), torch.tensor(True))  # stand-ins for unreadable data choose too; nothing else is empty
    assert router.load.tolist() == [0.375, 0.125, 0.25, 0.25]


def test_a_bias_chooses_experts_and_changes_no_weight_of_theirs():
    section, module = layer(capacity_factor=None)
    bias = torch.tensor([0.0, 0.5, -0.5, 0.0], dtype=torch.float64)
    module.router.bias.copy_(bias)
    x, p = stream(), parameters_of(module)
    expected = torch.stack([torch.stack([experts_of_a_token(section, p, token, bias) for token in sequence]) for sequence in x])
    torch.testing.assert_close(module(x, T)[0], expected)


def test_layers_with_and_without_experts():
    section = scaled_down(ModelSection(ffn="moe"), num_layers=5, first_dense_layers=1, moe_every_n_layers=2)
    assert section.has_experts == (False, True, False, True, False)
    model, measured = perturbed_model(section), {}
    tokens = random_tokens()
    model.loss_sum(tokens[:, :-1], tokens[:, 1:], on_losses=measured.__setitem__)
    assert list(measured) == [1, 3] and all(found.keys() == {"balance", "router_z", ROUTING} for found in measured.values())
