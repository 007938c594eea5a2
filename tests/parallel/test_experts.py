"""Experts shared by ranks where the router is one-sided: no rank waits for another, and the numbers are those of one process."""

import os

import pytest
import torch

from phase8.config.auto import without_auto
from phase8.config.load import load_config
from phase8.distributed.placement import collected
from phase8.model.mixture_of_experts import MixtureOfExperts
from tests.parallel.test_context import WorkDuringExchanges
from tests.parallel.test_parity import BLOCKS, ranks
from tests.parallel.training import MODEL, new_train_state, take_step

# What is added to the scores of the four experts: everything goes to the first rank; to one expert; to all but one.
SIDES = {"one rank": [9.0, 9.0, 0.0, 0.0], "one expert": [9.0, 0.0, 0.0, 0.0], "never one": [0.0, 0.0, 0.0, -9.0]}
DROPLESS = ("model.capacity_factor=null",)
TOPOLOGIES = {
    "padded": ranks(dp=2, ep=2),
    "counted, zero 3": ranks(dp=2, ep=2, stage=3, more=DROPLESS),
    "counted, four ranks": ranks(dp=4, ep=4, stage=1, more=(*DROPLESS, "train.micro_batch_size=1")),
    "padded, tp2, recomputed": ranks(dp=2, tp=2, ep=2, stage=3, more=("train.recompute=full",)),
}


def train_one_sided(settings, world_size, bias):
    """Loss, norm and routing of each step, and the final weights on rank 0; the bias stays as it is."""
    torch.set_default_dtype(torch.float64)
    try:
        config = without_auto(load_config(os.devnull, [*MODEL, *BLOCKS["experts"], "model.router_bias_rate=0", *settings]))
        train_state = new_train_state(config, world_size, device_type="cpu", dtype=torch.float64)
        for module in train_state.stage.module.modules():
            if isinstance(module, MixtureOfExperts):
                module.router.bias.copy_(torch.tensor(bias))
        results = [take_step(train_state, config, step) for step in range(2)]
        weights = collected({name: parameter.detach() for name, parameter in train_state.stage.module.named_parameters()}, train_state.mesh)
    finally:
        torch.set_default_dtype(torch.float32)
    return [(each.loss, each.grad_norm, each.routing) for each in results], {name: weight.clone() for name, weight in weights.items()}


CASES = [(name, side, top_k) for name in TOPOLOGIES for side in SIDES for top_k in (1, 2)]
QUICK = [case for case in CASES if case[1:] in (("one expert", 1), ("never one", 2)) or case[:2] == ("padded", "one rank")]


@pytest.mark.parametrize(("name", "side", "top_k"), [case if case in QUICK else pytest.param(*case, marks=pytest.mark.full) for case in CASES])
def test_equals_one_process(pool, name, side, top_k):
    world_size, settings = TOPOLOGIES[name]
    of_model = (*(each for each in settings if each.startswith("model.")), f"model.top_k={top_k}")
    (steps, weights), *others = pool.run(train_one_sided, (*settings, *of_model), world_size, SIDES[side], world_size=world_size)
    assert all(other == steps for other, _ in others)
    expected_steps, expected_weights = train_one_sided(of_model, 1, SIDES[side])
    for (loss, norm, routing), (expected_loss, expected_norm, expected_routing) in zip(steps, expected_steps, strict=True):
        assert (loss, norm) == pytest.approx((expected_loss, expected_norm), rel=1e-10)
        assert list(routing) == [0, 1]
        for layer, found in routing.items():
            assert (*found.load, *found[1:]) == pytest.approx((*expected_routing[layer].load, *expected_routing[layer][1:]))
    for weight_name, weight in expected_weights.items():
        torch.testing.assert_close(weights[weight_name], weight, rtol=1e-8, atol=1e-9)
    unused = sum(share == 0 for share in steps[0][2][0].load)
    assert unused == {"one rank": 2, "one expert": 3 if top_k == 1 else 0, "never one": 1}[side] or top_k == 1


def products_during_exchanges(settings, num_sequences):
    config = without_auto(load_config(os.devnull, [*MODEL, *BLOCKS["experts"], *settings]))
    train_state = new_train_state(config, 2, device_type="cpu", dtype=torch.float32)
    (layer,) = [module for module in train_state.stage.module.modules() if isinstance(module, MixtureOfExperts)][:1]
    x = torch.randn(num_sequences, config.model.sequence_length, config.model.d_model, requires_grad=True)
    with WorkDuringExchanges() as during:
        layer(x, config.model.sequence_length)[0].square().sum().backward()
    return [number for (number,) in during.products["all_to_all_single"]]


@pytest.mark.parametrize(("num_sequences", "num_groups"), [(1, 2), (2, 4)])
def test_rows_of_one_group_travel_beside_the_products_of_another(pool, num_sequences, num_groups):
    """Groups are the rows for one of a rank's two experts, of one of two sequences. Each has rows sent to it and back, and gradients in the same way.

    Of its exchanges the first and the last have nothing beside them. Before them ranks tell each other how many rows there are.
    """
    for numbers in pool.run(products_during_exchanges, ranks(dp=2, ep=2)[1], num_sequences, world_size=2):
        of_direction = [False, *[True] * (2 * num_groups - 2), False]
        assert [number > 0 for number in numbers] == [False, *of_direction, *of_direction]
