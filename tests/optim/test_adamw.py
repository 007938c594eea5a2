import pytest
import torch
from torch import nn

from phase8.config.model_section import ModelSection
from phase8.config.schema import OptimSection
from phase8.model.model import build_model
from phase8.model.parameters import decayed_parameter_names, initialise
from phase8.optim.adamw import build_optimizer
from tests.optim.steps import RATES, take_steps

SECTION = OptimSection(learning_rate=0.3, betas=(0.8, 0.9), eps=1e-6, weight_decay=0.2)


def decoupled_adam(x, gradients, *, weight_decay):
    """The algorithm of the paper, one scalar operation a line, in fp64."""
    (beta1, beta2), m, v = SECTION.betas, 0.0, 0.0
    for step, (rate, gradient) in enumerate(zip(RATES, gradients, strict=True), start=1):
        x = x - rate * weight_decay * x
        m = beta1 * m + (1 - beta1) * gradient
        v = beta2 * v + (1 - beta2) * gradient**2
        m_hat = m / (1 - beta1**step)
        v_hat = v / (1 - beta2**step)
        x = x - rate * m_hat / (v_hat.sqrt() + SECTION.eps)
    return x


def test_equals_the_algorithm_of_the_paper_in_fp64():
    torch.manual_seed(0)
    model = nn.Linear(5, 3)
    start = {name: p.detach().double() for name, p in model.named_parameters()}
    gradients = {name: [torch.randn(p.shape) for _ in RATES] for name, p in model.named_parameters()}
    optimizer = build_optimizer(dict(model.named_parameters()), SECTION, decayed_names={"weight"})
    take_steps(optimizer, dict(model.named_parameters()), gradients)
    for name, parameter in model.named_parameters():
        expected = decoupled_adam(start[name], [g.double() for g in gradients[name]], weight_decay=0.2 if name == "weight" else 0.0)
        torch.testing.assert_close(parameter.detach().double(), expected, rtol=2e-6, atol=2e-7)


@pytest.mark.parametrize("tie_embeddings", [False, True])
@pytest.mark.parametrize("block", ["phase8", "transformer"])
def test_matrices_of_linear_layers_decay_and_nothing_else(block, tie_embeddings):
    section = ModelSection(block=block, d_model=16, num_layers=2, num_heads=2, vocab_size=32, low_rank_rank=3, tie_embeddings=tie_embeddings)
    model = build_model(section, dtype=torch.float32, device=torch.device("cpu"))
    initialise(model, seed=0)
    optimizer = build_optimizer(dict(model.named_parameters()), SECTION, decayed_names=decayed_parameter_names(model))
    names = {p: name for name, p in model.named_parameters()}
    decayed, others = ([names[p] for p in group["params"]] for group in optimizer.param_groups)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.2, 0.0]
    assert sorted(decayed + others) == sorted(names.values())
    linear = {"q", "k", "v", "out", "gate", "up", "down", "scalars", "head"}
    assert set(decayed) == {name for name in names.values() if name.rsplit(".", 2)[-2] in linear}
    assert all(p.dim() == 2 for p in optimizer.param_groups[0]["params"]) and "embedding.weight" in others


def test_the_section_reaches_the_optimizer():
    optimizer = build_optimizer(dict(nn.Linear(2, 2).named_parameters()), SECTION, decayed_names=())
    for group in optimizer.param_groups:
        assert (group["lr"], group["betas"], group["eps"], group["fused"]) == (0.3, (0.8, 0.9), 1e-6, True)
