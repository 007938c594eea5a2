"""Replicas of weights and optimizer: equal in a healthy run on every topology, and one wrong bit is found and named."""

import os
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from phase8.checkpoint.load import open_checkpoint
from phase8.checkpoint.save import save_checkpoint
from phase8.checkpoint.state import flat_state, restore_state
from phase8.config.auto import without_auto
from phase8.config.load import load_config
from phase8.errors import CorruptionError
from phase8.train.engine.fsdp import FsdpEngine
from phase8.train.engine.protocol import WEIGHT, Item
from phase8.train.faults.replicas import Holding, bit_hash, check_replicas, describe_deviation, powers_of_base
from tests.parallel.test_parity import BLOCKS, INTERLEAVED, OFFLOADED, ranks
from tests.parallel.training import MODEL, new_train_state, take_step

BLOCK = (*BLOCKS["tied"], "model.num_layers=2")
DEEP = ("model.num_layers=4",)
NOTHING, ALL, NORMS, TIED = "nothing", "all", "norms", "tied"
EXPERTS = ("model.ffn=moe", "model.num_experts=4", "model.expert_ffn_size=16", "model.first_dense_layers=2", *DEEP)
TOPOLOGIES = {
    "one": ranks(),
    "dp2": ranks(dp=2),
    "dp2 zero 3": ranks(dp=2, stage=3),
    "dp4 zero 3 in pairs": ranks(dp=4, stage=3, more=("zero.shard_size=2",)),
    "dp4": ranks(dp=4),
    "tp2": ranks(tp=2),
    "pp2": ranks(pp=2),
    "pp2 not tied": ranks(pp=2, more=("model.tie_embeddings=false",)),
    "pp4": ranks(pp=4, more=DEEP),
    "tp2 dp2 zero 2": ranks(tp=2, dp=2, stage=2),
    "tp2 dp2": ranks(tp=2, dp=2),
    "pp2 dp2 interleaved": ranks(pp=2, dp=2, more=(*INTERLEAVED, *DEEP)),
    "tp2 pp2": ranks(tp=2, pp=2),
    "dp2 offloaded": ranks(dp=2, more=("zero.offload_optimizer=cpu",)),
    "ep2 dp4": ranks(dp=4, ep=2, more=EXPERTS),
    "ep2 dp4 zero 1 in pairs": ranks(dp=4, ep=2, stage=1, more=(*EXPERTS, "zero.shard_size=2")),
    "dp4 in pairs offloaded": ranks(dp=4, more=("zero.shard_size=2", *OFFLOADED)),
}
SHARED = {
    "one": {NOTHING}, "dp2 zero 3": {NOTHING}, "pp2 not tied": {NOTHING}, "tp2": {NORMS}, "tp2 dp2 zero 2": {NORMS}, "tp2 pp2": {NORMS, TIED},
    "pp2": {TIED}, "pp4": {TIED},
}  # fmt: skip
IN_BF16 = ("dp2", "dp4 zero 3 in pairs", "tp2", "pp2", "tp2 dp2 zero 2")
# In bf16 there are master weights and their copies to compare: of topologies that say it in bf16, float32 is for -m full.
HEALTHY = [pytest.param(name, "float32", marks=[pytest.mark.full] if name in IN_BF16 else []) for name in TOPOLOGIES]
HEALTHY += [(name, "bfloat16") for name in IN_BF16]
EXPERT, ROUTER = "blocks.3.feed_forward.experts.down", "blocks.2.feed_forward.router.load"
EMBEDDING, NORM, MATRIX = "embedding.weight", "blocks.1.mixer_norm.weight", "blocks.1.feed_forward.down.weight"


def start(arguments, world_size, *, num_steps=0, dtype=torch.float32):
    config = without_auto(load_config(os.devnull, [*MODEL, *BLOCK, *arguments]))
    train_state = new_train_state(config, world_size, device_type="cpu", dtype=dtype)
    for step in range(num_steps):
        take_step(train_state, config, step)
    return config, train_state


def run(pool, function, name, *arguments):
    world_size, options = TOPOLOGIES[name]
    return pool.run(function, options, world_size, *arguments, world_size=world_size)


def train_and_check(arguments, world_size, dtype, root):
    """Checks before the first step, after some, and after resuming; what was compared."""
    config, train_state = start(arguments, world_size, dtype=dtype)
    check_replicas(FsdpEngine(train_state, config), step=0)
    for step in range(2):
        take_step(train_state, config, step)
        check_replicas(FsdpEngine(train_state, config), step=step + 1)
    tensors = flat_state(train_state.stage.module, train_state.optimizer, train_state.shards.parts)
    save_checkpoint(root, step=2, tensors=tensors, metadata={}, attachments={})
    _, resumed = start(arguments, world_size, dtype=dtype)
    checkpoint = open_checkpoint(root / "step-0000000002")
    restore_state(checkpoint, resumed.stage.module, resumed.optimizer, resumed.shards.parts, is_part=resumed.mesh.pp.size > 1)
    resumed.shards.read_again()
    check_replicas(FsdpEngine(resumed, config), step=2)
    take_step(resumed, config, 2)
    check_replicas(FsdpEngine(resumed, config), step=3)
    shared = {name for _, names in FsdpEngine(resumed, config).replicas().axes for name in names}
    return [name for name in resumed.shards.whole if name in shared], list(resumed.shards.whole)


@pytest.mark.parametrize(("name", "dtype"), HEALTHY)
def test_healthy_replicas_are_equal(pool, tmp_path, name, dtype):
    for compared, held in run(pool, train_and_check, name, getattr(torch, dtype), tmp_path):
        shared = SHARED.get(name, {ALL})
        norms = [parameter for parameter in held if parameter.endswith("norm.weight") and ".mixer." not in parameter]
        assert norms
        if shared == {ALL}:
            assert compared == held
        else:
            assert set(compared) >= set(norms) or NORMS not in shared
            assert (EMBEDDING in compared) == (TIED in shared and EMBEDDING in held)
            assert not any(parameter.endswith(("q.weight", "feed_forward.down.weight")) for parameter in compared)
            assert NORMS in shared or set(compared) <= {EMBEDDING}


def bits_of(tensor):
    return tensor.detach().view(-1).view(torch.int32)


def item_of(train_state, name, key):
    """The own part of something that a rank holds."""
    if key == "buffer":
        return dict(train_state.stage.module.named_buffers())[name]
    if key == "whole":
        whole = train_state.shards.whole[name]
        return whole.to_local()
    part = train_state.shards.parts[name]
    return part if key == WEIGHT else train_state.optimizer.state[part][key]


def flip_and_check(arguments, world_size, rank, name, key, bit, position):
    """The sentence of the error after a bit of one rank was flipped, and whether a check before was fine."""
    config, train_state = start(arguments, world_size, num_steps=1)
    check_replicas(FsdpEngine(train_state, config), step=1)
    if train_state.mesh.rank == rank:
        bits_of(item_of(train_state, name, key))[position] ^= -(2**31) if bit == 31 else 2**bit
    try:
        check_replicas(FsdpEngine(train_state, config), step=12)
    except CorruptionError as error:
        assert error.exit_code == 8
        return str(error)
    return None


FLIPS = {
    "dp2, a weight": ("dp2", 1, MATRIX, WEIGHT, 0, 7, f"{MATRIX} should be the same on ranks 0 and 1, but is not;"),
    "dp2, a moment": ("dp2", 0, EMBEDDING, "exp_avg", 31, 0, f"exp_avg of {EMBEDDING} should be the same on ranks 0 and 1, but is not;"),
    "dp2, a count": ("dp2", 0, NORM, "step", 22, 0, f"step of {NORM} should be the same on ranks 0 and 1, but is not;"),
    "dp4": ("dp4", 2, MATRIX, "exp_avg_sq", 3, 100, f"exp_avg_sq of {MATRIX} on rank 2 differs from its copies on ranks 0, 1 and 3;"),
    "pairs": ("dp4 zero 3 in pairs", 3, MATRIX, WEIGHT, 30, 5, f"{MATRIX} should be the same on ranks 1 and 3, but is not;"),
    "tp2": ("tp2", 1, NORM, WEIGHT, 12, 23, f"{NORM} should be the same on ranks 0 and 1, but is not;"),
    "tp2 dp2": ("tp2 dp2", 1, NORM, "exp_avg", 0, 0, f"exp_avg of {NORM} on rank 1 differs from its copies on ranks 0"),
    "tp2 dp2, sharded": ("tp2 dp2 zero 2", 3, NORM, WEIGHT, 5, 1, f"{NORM} should be the same on ranks 2 and 3, but is not;"),
    "pp2": ("pp2", 1, EMBEDDING, WEIGHT, 1, 17, f"{EMBEDDING} should be the same on ranks 0 and 1, but is not;"),
    "pp4": ("pp4", 3, EMBEDDING, "exp_avg", 1, 17, f"exp_avg of {EMBEDDING} should be the same on ranks 0 and 3, but is not;"),
    "pp2 dp2": ("pp2 dp2 interleaved", 2, EMBEDDING, WEIGHT, 9, 3, f"{EMBEDDING} on rank 2 differs from its copies on ranks 0"),
    "experts": ("ep2 dp4", 3, EXPERT, WEIGHT, 2, 5, f"{EXPERT} should be the same on ranks 1 and 3, but is not;"),
    "a router's buffer": ("ep2 dp4 zero 1 in pairs", 2, ROUTER, "buffer", 20, 1, f"{ROUTER} on rank 2 differs from its copies on rank"),
    "offloaded": ("dp2 offloaded", 1, MATRIX, WEIGHT, 9, 3, f"the copy in host memory of {MATRIX} should be the same on ranks 0 and 1, but"),
    "offloaded, on the device": ("dp2 offloaded", 1, MATRIX, "whole", 9, 3, f"{MATRIX} should be the same on ranks 0 and 1, but is not;"),
}


@pytest.mark.parametrize("name", FLIPS)
def test_a_flipped_bit_is_found_and_named(pool, name):
    topology, rank, parameter, key, bit, position, sentence = FLIPS[name]
    sentences = run(pool, flip_and_check, topology, rank, parameter, key, bit, position)
    assert len(set(sentences)) == 1 and sentences[0].startswith(f"step 12: {sentence}"), sentences[0]
    assert "resume from a checkpoint of a step up to which this check has passed, and test the memory of cpu of" in sentences[0]


def test_what_has_no_copy_is_not_compared(pool):
    assert run(pool, flip_and_check, "tp2", 1, MATRIX, WEIGHT, 3, 3) == [None, None]
    assert run(pool, flip_and_check, "pp2", 1, "norm.weight", WEIGHT, 3, 3) == [None, None]


def swap_and_check(arguments, world_size):
    """On the last rank two elements of a weight change places."""
    config, train_state = start(arguments, world_size, num_steps=1)
    weight = train_state.shards.parts[NORM].detach()
    assert weight[2] != weight[19]
    if train_state.mesh.rank == world_size - 1:
        weight[[2, 19]] = weight[[19, 2]]
    try:
        check_replicas(FsdpEngine(train_state, config), step=3)
    except CorruptionError as error:
        return str(error)
    return None


def test_two_elements_in_each_others_place_are_found(pool):
    sentences = run(pool, swap_and_check, "dp4")
    assert len(set(sentences)) == 1 and sentences[0].startswith(f"step 3: {NORM} on rank 3 differs from its copies on ranks 0, 1 and 2;")


def flip_and_train(arguments, world_size):
    """Trains on after a bit of a second moment was flipped on rank 1."""
    config, train_state = start(arguments, world_size, num_steps=1)
    if train_state.mesh.rank == 1:
        bits_of(train_state.optimizer.state[train_state.shards.parts[MATRIX]]["exp_avg_sq"])[0] ^= 2**29
    take_step(train_state, config, 1)
    try:
        check_replicas(FsdpEngine(train_state, config), step=2)
    except CorruptionError as error:
        return str(error)
    return None


def test_what_a_wrong_moment_has_spoilt_since_is_counted(pool):
    sentence, *_ = run(pool, flip_and_train, "dp4")
    assert sentence.startswith(f"step 2: {MATRIX} on rank 1 differs from its copies on ranks 0, 2 and 3 (as with 1 other tensor);")


def holding(rank, **digests):
    return Holding(f"cuda:{rank} of a", {Item(name, WEIGHT): value for name, value in digests.items()})


def test_no_majority_names_all_and_a_majority_the_others():
    assert describe_deviation([holding(0), holding(1)]) is None
    part = ([0], [4])
    undecided = describe_deviation([holding(rank, w=(part, rank // 2)) for rank in range(4)])
    assert undecided.startswith("w should be the same on ranks 0, 1, 2 and 3, but is not; ")
    assert undecided.endswith("test the memory of cuda:0 of a, cuda:1 of a, cuda:2 of a and cuda:3 of a.")
    decided = describe_deviation([holding(rank, w=(part, int(rank in (1, 4)))) for rank in range(5)])
    assert decided.startswith("w on ranks 1 and 4 differs from its copies on ranks 0, 2 and 3; ")
    assert decided.endswith("test the memory of cuda:1 of a and cuda:4 of a.")


def test_parts_are_compared_with_their_own_copies_only():
    first, second = ([0], [4]), ([4], [4])
    held = [holding(0, w=(first, 1), v=(first, 1)), holding(1, w=(second, 2), v=(first, 2))]
    held += [holding(2, w=(first, 1), v=(first, 1)), holding(3, w=(second, 3), v=(first, 1))]
    assert describe_deviation(held).startswith("w should be the same on ranks 1 and 3, but is not (as with 1 other tensor); ")


def reference_hash(words):
    return (sum(word * 5**place for place, word in enumerate(words)) + 2**63) % 2**64 - 2**63


INTEGERS = {torch.float64: torch.int64, torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.uint8: torch.uint8}


@st.composite
def tensors(draw, min_size=0, dtypes=tuple(INTEGERS)):
    """Bits of any dtype, and powers that are fewer or more than its words."""
    dtype = draw(st.sampled_from(dtypes))
    integer = INTEGERS[dtype]
    size, low, high = draw(st.integers(min_size, 300)), torch.iinfo(integer).min, torch.iinfo(integer).max
    generator = random.Random(draw(st.integers(0, 2**32)))
    bits = torch.tensor([generator.choice((0, 1, low, high, generator.randint(low, high))) for _ in range(size)], dtype=integer)
    return bits.view(dtype), powers_of_base(draw(st.sampled_from((1, 7, 64, 1000))), torch.device("cpu"))


@settings(max_examples=100, deadline=None)
@given(tensors())
def test_the_hash_is_that_of_the_definition(case):
    tensor, powers = case
    words = tensor.view(-1).view({8: torch.int32, 4: torch.int32, 2: torch.int16, 1: torch.int8}[tensor.element_size()]).tolist()
    assert bit_hash(tensor, powers).item() == reference_hash(words)


def flip(tensor, bit):
    data = tensor.view(torch.uint8)
    data[bit // 8] ^= 1 << bit % 8


@settings(max_examples=300, deadline=None)
@given(tensors(min_size=1), st.data())
def test_any_flipped_bit_and_any_two_change_the_hash(case, data):
    tensor, powers = case
    before, num_bits = bit_hash(tensor, powers), 8 * tensor.element_size() * tensor.numel()
    bits = data.draw(st.lists(st.integers(0, num_bits - 1), min_size=1, max_size=2, unique=True))
    for bit in bits:
        flip(tensor, bit)
    assert bit_hash(tensor, powers) != before


@settings(max_examples=300, deadline=None)
@given(tensors(min_size=2, dtypes=(torch.float32, torch.bfloat16, torch.uint8)), st.data())
def test_any_two_unequal_elements_that_change_places_change_the_hash(case, data):
    tensor, powers = case
    here, there = data.draw(st.lists(st.integers(0, len(tensor) - 1), min_size=2, max_size=2, unique=True))
    bits = tensor.view(INTEGERS[tensor.dtype])
    before, are_equal = bit_hash(tensor, powers), bool(bits[here] == bits[there])
    bits[[here, there]] = bits[[there, here]]
    assert (bit_hash(tensor, powers) == before) == are_equal


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 2**31 - 1), st.integers(0, 2**31 - 1), st.integers(-(2**32) + 1, 2**32 - 1))
def test_swaps_over_the_greatest_distances_change_the_hash(here, there, difference):
    """By arithmetic alone: no test has 2^31 words. The worst is half the range apart, of values that differ in the highest bit."""
    for i, j, d in ((here, there, difference), (here, here ^ 2**30, 2**31)):
        delta = d * (pow(5, i, 2**64) - pow(5, j, 2**64)) % 2**64
        assert (delta == 0) == (i == j or d == 0)


@pytest.mark.parametrize("shape", [(), (0,), (3, 5)])
def test_scalars_empty_parts_and_views_have_a_hash(shape):
    powers = powers_of_base(4, torch.device("cpu"))
    tensor = torch.randn(shape)
    assert bit_hash(tensor, powers).shape == () and bit_hash(tensor, powers) == bit_hash(tensor.clone(), powers)
    if tensor.dim() == 2:
        assert bit_hash(tensor.T, powers) == bit_hash(tensor.T.contiguous(), powers) != bit_hash(tensor, powers)
