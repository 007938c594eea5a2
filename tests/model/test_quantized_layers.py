"""Experts of few bits compute what those of the numbers that they stand for compute, however many tokens there are, and take half of the bytes."""

from itertools import pairwise
from pathlib import Path

import pytest
import torch

from phase8.config.load import load_config
from phase8.config.model_section import ModelSection
from phase8.distributed.collectives import ALONE
from phase8.expert_parallel.exchange import computed_where_experts_are
from phase8.expert_parallel.slots import Slots
from phase8.model.experts import Experts
from phase8.model.quantized_layers import QuantizedExperts, hold_quantized
from phase8.plan.whole_config import shapes_only
from phase8.precision.int4 import Int4
from phase8.precision.int8 import Int8, quantized
from tests.model.small import scaled_down
from tests.precision.test_int4 import weight_of
from tests.precision.test_int8 import numbers

SECTION = scaled_down(ModelSection(ffn="moe"), d_model=64, num_experts=5, expert_ffn_size=40)
FORMATS = {"int8": Int8(is_dynamic=False), "dynamic": Int8(is_dynamic=True), "int4": Int4()}


def experts_and_their_weights(weight_format):
    """Experts of few bits, and by name the weights [E, F, D] that their numbers stand for, in float64."""
    few, weights = QuantizedExperts(Experts(SECTION), weight_format), {}
    for seed, name in enumerate(QuantizedExperts.PARTS):
        shape = few.get_buffer(name).shape if weight_format.bits == 8 else getattr(Experts(SECTION), name).shape
        stored = weight_format.quantized(0.2 * numbers(*shape, seed=seed))
        few.get_buffer(name).copy_(stored["weight"])
        few.get_buffer(f"{name}_scale").copy_(stored["scale"])
        each = [dict(zip(stored, values, strict=True)) for values in zip(*stored.values(), strict=True)]
        of_int8 = [pair["weight"].double() * pair["scale"].double()[:, None] for pair in each] if weight_format.bits == 8 else None
        weights[name] = torch.stack(of_int8 or [weight_of(pair, shape[-1]) for pair in each])
    return few, weights


def of_expert(weight_format, weights, expert, x):
    """What an expert makes of tokens, in float64; with rounded activations where the format rounds them."""

    def rounded(x):
        numbers, scale = quantized(x)
        return numbers * scale.double() if weight_format == FORMATS["dynamic"] else x

    gate, up, down = (weights[name][expert] for name in QuantizedExperts.PARTS)
    x = rounded(x.double())
    return rounded(torch.nn.functional.silu(x @ gate.T) * (x @ up.T)) @ down.T


@pytest.mark.parametrize("weight_format", FORMATS.values(), ids=FORMATS)
def test_rows_go_to_their_experts(weight_format):
    few, weights = experts_and_their_weights(weight_format)
    ends, rows = torch.tensor([3, 3, 14, 20, 21], dtype=torch.int32), numbers(24, 64)  # one has none, and three rows are nobody's
    nothing = torch.empty(0)
    slots = Slots(nothing, nothing, ends)
    found, beside = few(rows, slots, lambda *given: computed_where_experts_are(*given, ALONE, beside=lambda: None))
    groups = pairwise([0, *ends.tolist()])
    expected = [of_expert(weight_format, weights, expert, rows[begin:end]) for expert, (begin, end) in enumerate(groups)]
    assert beside is None and found.shape == (24, 64)
    torch.testing.assert_close(found[:21].double(), torch.cat(expected), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weight_format", FORMATS.values(), ids=FORMATS)
def test_tokens_of_decoding_are_computed_by_chosen_experts_or_by_all(weight_format, dtype):
    few, weights = experts_and_their_weights(weight_format)
    x, chosen = numbers(3, 64).to(dtype), torch.tensor([[1, 4], [0, 1], [3, 2]])
    by_chosen, by_all = few.of_chosen(x, chosen), few.of_all(x)
    assert by_chosen.dtype == by_all.dtype == dtype
    expected = torch.stack([of_expert(weight_format, weights, expert, x) for expert in range(5)])
    bound = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 0.05, "atol": 0.1}
    torch.testing.assert_close(by_all.double(), expected, **bound)
    torch.testing.assert_close(by_chosen.double(), torch.stack([expected[chosen[token], token] for token in range(3)]), **bound)


@pytest.mark.parametrize(("weight_format", "bound"), [(FORMATS["int8"], 0.55), (FORMATS["int4"], 0.33)], ids=str)
def test_a_mixture_of_experts_has_half_of_the_bytes_of_bf16(weight_format, bound):
    config = load_config(Path(__file__).parents[2] / "configs" / "phase8_moe_8x.yaml")
    model = shapes_only(config)
    before = sum(2 * parameter.numel() for parameter in model.parameters())
    names = hold_quantized(model, weight_format)
    after = sum(each.nbytes for each in model.buffers()) + sum(2 * parameter.numel() for parameter in model.parameters())
    assert after <= bound * before and sum(".experts." in name.weight for name in names) == 3 * config.model.num_layers
