"""Low-rank q, k and v are the same whether a product forms them or the operator that makes the inputs of both paths."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from phase8.config.model_section import ModelSection
from phase8.model.mixer import Phase8Mixer
from phase8.model.model import LanguageModel, build_model
from phase8.model.parameters import initialise
from phase8.model.recomputation import apply_recomputation
from phase8.precision.formats import OPERAND_DTYPE
from tests.model.small import document_starts, perturbed_model, random_tokens, scaled_down

OPERATOR = "phase8::low_rank_mixer_inputs"
KINDS = {
    "default": {},
    "lorentz": {"score": "lorentz", "chain": "both"},
    "dot, one tap": {"score": "dot", "chain": "none", "convolution_size": 1, "global_activation": "none"},
    "window alone": {"global_path": "none"},
    "values": {"value_activation": "silu", "score": "dot"},
    "feed-forward too": {"ffn": "low_rank_swiglu", "global_path": "delta"},
}
values_or_not = pytest.mark.parametrize("kind", ["default", "values"])


class Count(TorchDispatchMode):
    """Counts the calls of the operator."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls += func._schema.name == OPERATOR
        return func(*args, **(kwargs or {}))


def made(kind):
    return perturbed_model(scaled_down(ModelSection(low_rank_rank=5, **KINDS[kind])))


def loss_and_gradients(model, starts):
    tokens = random_tokens()
    loss = model.loss_sum(tokens[:, :-1], tokens[:, 1:], None if starts is None else starts[:, :-1])
    loss.backward()
    return loss.detach(), {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.fixture
def inside(monkeypatch):
    """Chooses whether models on a CPU use the operator, as they do on a GPU."""
    return lambda chosen: monkeypatch.setattr(Phase8Mixer, "_takes_bottlenecks", lambda self, x, state: chosen)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradients_are_the_same_either_way(kind, packed, inside):
    starts = document_starts(0, 11, 13) if packed else None
    found = []
    for chosen in (True, False):
        inside(chosen)
        with Count() as count:
            found.append(loss_and_gradients(made(kind), starts))
        assert count.calls == (2 if chosen else 0)  # of two layers
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5)  # angles are fp32, so a turn back is not quite the inverse


@pytest.mark.parametrize("mode", ["selective", "full"])
@values_or_not
def test_recomputation_changes_no_bit(kind, mode, inside):
    inside(True)
    plain, recomputed = made(kind), made(kind)
    apply_recomputation(recomputed, mode)
    torch.testing.assert_close(loss_and_gradients(recomputed, None), loss_and_gradients(plain, None), rtol=0, atol=0)


@values_or_not
def test_compiled_blocks_have_no_graph_break(kind, inside):
    inside(True)
    torch.compiler.reset()  # of one function only so many graphs are made, and other tests of the process have made some
    plain, compiled = made(kind), made(kind)
    for layer in compiled.blocks.values():
        layer.compile(fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(loss_and_gradients(compiled, None), loss_and_gradients(plain, None), rtol=1e-5, atol=1e-5)


def calls_on(device, *, pieces=False, dtype=torch.bfloat16, **changes):
    """How often two layers call the operator; the device meta stands for every one but a CPU."""
    shape = {"num_layers": 2, "d_model": 128, "num_heads": 2, "sequence_length": 32, "vocab_size": 61, "low_rank_rank": 16}
    with torch.device(device), Count() as count:
        model = LanguageModel(ModelSection(**shape | changes), dtype=dtype, number_format=OPERAND_DTYPE)
        model(torch.zeros(2, 32, dtype=torch.int64), states=model.empty_states(2) if pieces else None)
    return count.calls


def test_the_operator_computes_low_rank_q_k_and_v_of_whole_sequences_where_it_can():
    assert [calls_on("meta"), calls_on("meta", low_rank_rank=32), calls_on("meta", head_size=32)] == [2, 2, 2]
    assert [calls_on("cpu"), calls_on("meta", low_rank_rank=33), calls_on("meta", low_rank_rank=0), calls_on("meta", head_size=128)] == [0] * 4
    assert [calls_on("meta", pieces=True), calls_on("meta", dtype=torch.float32)] == [0, 0]


@pytest.mark.gpu
def test_a_gpu_computes_the_same_either_way(inside):
    device, found = torch.device("cuda"), []
    section = ModelSection(d_model=128, num_heads=2, num_layers=2, sequence_length=96, vocab_size=256, low_rank_rank=16, ffn="low_rank_swiglu")
    tokens = torch.randint(256, (2, 97), generator=torch.Generator().manual_seed(0)).to(device)
    for chosen in (True, False):
        inside(chosen)
        model = build_model(section, dtype=torch.bfloat16, device=device)
        initialise(model, seed=0)
        generator = torch.Generator(device).manual_seed(1)
        with torch.no_grad():
            for parameter in model.parameters():  # some begin as zeros, which would hide what is behind them
                parameter += 0.02 * torch.randn(parameter.shape, device=device, generator=generator)
        model.loss_sum(tokens[:, :-1], tokens[:, 1:], None).backward()
        found.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, ours in found[0].items():
        theirs = found[1][name]
        assert (ours - theirs).norm() <= 0.05 * theirs.norm(), name
