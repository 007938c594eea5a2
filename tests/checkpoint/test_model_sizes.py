"""The quick comparison of a stored config with stored tensors accepts every model that can be built, and names what differs."""

import pytest
import torch

from phase8.checkpoint.model_sizes import sizes_problem
from phase8.config.model_section import ModelSection
from phase8.model.model import build_model
from tests.model.small import VARIANT_IDS, VARIANT_SECTIONS, scaled_down


def shapes_of(section):
    model = build_model(section, dtype=torch.float32, device=torch.device("meta"))
    return {name: list(parameter.shape) for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("section", VARIANT_SECTIONS, ids=VARIANT_IDS)
def test_every_model_fits_its_own_tensors(section):
    assert sizes_problem(section, shapes_of(section)) is None


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"num_experts": 5}, "model.num_experts 5 and model.expert_ffn_size 40 make a weight of shape [5, 40, 24], and none has it"),
        ({"num_layers": 4}, "model.num_layers is 4, but there are weights of 3 layers"),
        ({"first_dense_layers": 0}, "layer 2 has other weights than layer 1"),
    ],
)
def test_what_does_not_fit_is_named(changes, sentence):
    section = scaled_down(ModelSection(ffn="moe"), num_layers=3, first_dense_layers=1)
    stored = shapes_of(section.model_copy(update={"num_layers": 3, "moe_every_n_layers": 3}))
    found = sizes_problem(section.model_copy(update={"moe_every_n_layers": 3, **changes}), stored)
    assert found == sentence
