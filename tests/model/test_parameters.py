import pytest
import torch
from torch import nn

from phase8.config.model_section import ModelSection
from phase8.distributed.collectives import ALONE
from phase8.model.model import build_model
from phase8.model.parameters import decayed_parameter_names, initialise, initialised_parts, iterate_specs
from phase8.tensor_parallel.linear import Linear, LowRankColumn
from phase8.tensor_parallel.parameters import ParameterSpec, divided
from tests.model.small import VARIANT_IDS, VARIANT_SECTIONS, scaled_down


def fresh(section, seed=0):
    model = build_model(section, dtype=torch.float32, device=torch.device("cpu"))
    initialise(model, seed=seed)
    return model


@pytest.mark.parametrize("section", VARIANT_SECTIONS, ids=VARIANT_IDS)
def test_every_parameter_is_declared_and_set(section):
    model = build_model(section, dtype=torch.float32, device=torch.device("cpu"))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float("nan"))
    initialise(model, seed=0)
    assert all(p.isfinite().all() for p in model.parameters())
    assert {name for name, _, _ in iterate_specs(model)} == {name for name, _ in model.named_parameters()}


def test_values_depend_on_seed_and_name_only():
    shallow, deep = (dict(fresh(scaled_down(ModelSection(), num_layers=n)).named_parameters()) for n in (1, 3))
    for name in ("embedding.weight", "blocks.0.mixer.q.weight", "blocks.0.feed_forward.gate.weight"):
        assert torch.equal(shallow[name], deep[name])
    assert not torch.equal(deep["blocks.0.mixer.q.weight"], deep["blocks.1.mixer.q.weight"])
    other_seed = fresh(scaled_down(ModelSection()), seed=1).blocks["0"].mixer.q.weight
    assert not torch.equal(deep["blocks.0.mixer.q.weight"], other_seed)


@pytest.mark.parametrize("section", VARIANT_SECTIONS, ids=VARIANT_IDS)
def test_parts_get_memory_and_the_same_values_one_after_the_other(section):
    expected = dict(fresh(section).named_parameters())
    model = build_model(section, dtype=torch.float32, device=torch.device("meta"))
    parts, done = (*model.blocks.values(), model), set()
    for part in initialised_parts(model, parts, device=torch.device("cpu"), seed=0, axis=ALONE):
        done |= set(part.parameters())
        assert {parameter for parameter in model.parameters() if not parameter.is_meta} == done
        for parameter in part.parameters():
            assert parameter.isfinite().all()
    assert all(torch.equal(parameter, expected.pop(name)) for name, parameter in model.named_parameters()) and not expected
    assert all(torch.equal(buffer, dict(fresh(section).named_buffers())[name]) for name, buffer in model.named_buffers())


def test_golden_first_values():
    """A change of the initialisation would silently break the comparison of old and new runs."""
    weight = fresh(scaled_down(ModelSection())).blocks["0"].mixer.q.weight
    torch.testing.assert_close(weight[0, :3], torch.tensor([0.006734195, -0.012459493, -0.063484006]), rtol=0, atol=1e-9)


def test_documented_initial_state_of_the_mixer():
    mixer = fresh(scaled_down(ModelSection(chain="both"))).blocks["0"].mixer
    path = mixer.global_path
    memory = 1 / nn.functional.softplus(path.decay_bias)
    torch.testing.assert_close(memory[[0, -1]], torch.tensor([2.0, 500.0]), rtol=1e-4, atol=0)
    torch.testing.assert_close(path.gate_bias, torch.full((4,), -3.0))
    torch.testing.assert_close(path.chain.energy, torch.linspace(-1.5, 1.5, 4))
    torch.testing.assert_close(nn.functional.softplus(path.chain.hopping_raw), torch.ones(4))
    assert not mixer.out.weight.any() and not path.chain.decay_mix.any() and not path.chain.gate_mix.any()
    assert (mixer.convolution.weight == torch.tensor([0.0, 0, 0, 1])).all()


def test_a_gate_per_channel_begins_as_the_scalar_one_does():
    path = fresh(scaled_down(ModelSection(global_path="delta", global_gate="channel"))).blocks["0"].mixer.global_path
    assert [tuple(p.shape) for p in (path.gate.down.weight, path.gate.up.weight, path.scalars.weight)] == [(6, 24), (24, 6), (4 * 2, 24)]
    torch.testing.assert_close(path.gate_bias, torch.full((4,), -3.0))


@pytest.mark.parametrize(("floor", "first"), [(-5.0, 2.0), (-0.4, 1 / (0.4 * 0.99))])
def test_decays_with_a_floor_begin_as_those_without_unless_the_floor_forbids(floor, first):
    path = fresh(scaled_down(ModelSection(global_path="delta", decay_floor=floor))).blocks["0"].mixer.global_path
    memory = -1 / (floor * torch.sigmoid(path.decay_bias))
    torch.testing.assert_close(memory, torch.tensor([first, *torch.logspace(0.30103, 2.69897, 4)[1:]]), rtol=1e-4, atol=0)


@pytest.mark.parametrize("block", ["phase8", "transformer"])
def test_normalised_queries_and_keys_begin_with_the_length_of_unit_variance(block):
    norm = fresh(scaled_down(ModelSection(block=block, local_qk_norm=True))).blocks["0"].mixer.qk_norm
    torch.testing.assert_close(norm.radius, torch.full((4,), 6**0.5))
    x = torch.randn(3, 4, 6, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(norm(x).norm(dim=-1), torch.full((3, 4), 6**0.5), rtol=1e-4, atol=0)


def test_low_rank_product_has_the_dense_variance():
    pair = LowRankColumn(256, 128, rank=64, std=0.02)
    initialise(pair, seed=0)
    product = pair.up.weight @ pair.down.weight
    assert abs(product.std().item() / 0.02 - 1) < 0.05


def test_only_matrices_of_linear_layers_decay():
    decayed = decayed_parameter_names(fresh(scaled_down(ModelSection())))
    assert {name for name in decayed if not name.startswith("blocks.1")} == {
        "head.weight",
        *(f"blocks.0.mixer.{name}.weight" for name in ("q", "k", "v", "global_path.scalars", "global_path.gate.down", "global_path.gate.up", "out")),
        *(f"blocks.0.feed_forward.{name}.weight" for name in ("gate", "up", "down")),
    }


def test_an_undeclared_parameter_is_an_error():
    class Careless(Linear):
        def __init__(self):
            super().__init__(2, 2, std=1.0)
            self.forgotten = nn.Parameter(torch.empty(1))

    with pytest.raises(TypeError, match="forgotten"):
        initialise(Careless(), seed=0)


def test_spec_values_may_be_tensors():
    class Ramp(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.empty(3))

        def parameter_specs(self):
            return {"weight": ParameterSpec(value=torch.arange(3.0))}

    ramp = Ramp()
    initialise(ramp, seed=0)
    assert ramp.weight.tolist() == [0, 1, 2]


def test_a_parameter_divided_along_an_unknown_axis_is_refused():
    with pytest.raises(TypeError, match="'pp'"):
        divided(nn.Parameter(torch.empty(2, 2, device="meta")), ParameterSpec(divided={"tp": 1, "pp": 0}), ALONE, device=torch.device("cpu"))
