"""On GPUs over NCCL the numbers are those of one process on one GPU: with fp32 weights in bf16, as in training, and in float32.

Everything is compared with one process that runs the same kernels in the same dtype. In float32, without tf32, only the order of sums
differs, and a wrong collective cannot hide. In bf16 what ranks add up was rounded before: the two runs may differ by as much as rounding
itself costs one process, which is measured beside them (bf16 against float32, and two microbatch sizes).
"""

import functools
import math
from typing import NamedTuple

import pytest
import torch

from tests.parallel import test_parity
from tests.parallel.pool import GLOO, NCCL, RankError
from tests.parallel.test_parity import INTERLEAVED, OFFLOADED, SUMS_OFFLOADED, ranks
from tests.parallel.training import train_steps

NUM_STEPS = 3  # a recorded step is the third
# Heads of 64, sequences of several tiles of the kernels, a vocabulary that does not divide, layers for two stages of two chunks.
MODEL = (
    "model.d_model=128", "model.num_layers=4", "model.num_heads=4", "model.head_size=64", "model.vocab_size=509", "model.sequence_length=256",
    "model.ffn_size=256", "model.local_window_size=[32,96]", "train.global_batch_size=8", "train.seed=3", "precision.tf32=false",
    # An epsilon of the size of the gradients: without it AdamW makes a full step of every gradient that is nothing but rounding.
    "optim.learning_rate=1e-3", "optim.eps=1e-3", "optim.gradient_clip_norm=1.0", "train.micro_batch_size=2",
)  # fmt: skip
# Experts at a width of 128: with the initial weights of the small models, sums in another order already change the choice of some tokens.
BLOCKS = {name: (*keys, "model.init_std=0.05") if name.startswith("experts") else keys for name, keys in test_parity.BLOCKS.items()}
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
SMALLER = {"cuda": (), "cpu": ("model.num_layers=2", "model.sequence_length=128", "train.global_batch_size=4")}
COMPILED = ("train.compile.enabled=true", "train.compile.fullgraph=true")
ASYNCHRONOUS = (*COMPILED, "parallel.async_tensor_parallel=true")
RECORDED = "train.cuda_graphs=true"
BLOCKS["eight bits"] = ("optim.state_dtype=fp8",)
CASES = {
    "offloaded": ("default", ranks(more=OFFLOADED)),
    "sums offloaded, compiled": ("default", ranks(more=(*OFFLOADED, SUMS_OFFLOADED, *COMPILED))),
    "optimizer offloaded, moments of eight bits": ("eight bits", ranks(more=("zero.stage=1", "zero.offload_optimizer=cpu"))),
    "offloaded, moments of eight bits": ("eight bits", ranks(more=OFFLOADED)),
    "tp2": ("default", ranks(tp=2)),
    "tp2 whole": ("whole", ranks(tp=2)),
    "dp2": ("default", ranks(dp=2)),
    "dp2 zero 2": ("default", ranks(dp=2, stage=2)),
    "dp2 zero 3": ("default", ranks(dp=2, stage=3)),
    "dp2 zero 3 offloaded": ("default", ranks(dp=2, more=OFFLOADED)),
    "dp2 zero 3, sums offloaded": ("default", ranks(dp=2, more=(*OFFLOADED, SUMS_OFFLOADED))),
    "pp2 1f1b": ("default", ranks(pp=2)),
    "pp2 interleaved": ("default", ranks(pp=2, more=INTERLEAVED)),
    "tp2 compiled": ("default", ranks(tp=2, more=COMPILED)),
    "tp2 asynchronous": ("default", ranks(tp=2, more=ASYNCHRONOUS)),
    "tp2 recorded": ("default", ranks(tp=2, more=(RECORDED,))),
    "tp2 asynchronous, recorded": ("default", ranks(tp=2, more=(*ASYNCHRONOUS, RECORDED))),
    "dp2 zero 3 gathered by copies": ("default", ranks(dp=2, stage=3, more=("zero.copy_engine_gather=true",))),
    "dp2 zero 3 gathered by copies, recorded": ("default", ranks(dp=2, stage=3, more=("zero.copy_engine_gather=true", *COMPILED, RECORDED))),
    "dp2 recorded": ("default", ranks(dp=2, more=(RECORDED,))),
    "dp2 zero 3 compiled, recorded": ("default", ranks(dp=2, stage=3, more=(*COMPILED, RECORDED))),
    "tp4": ("default", ranks(tp=4)),
    "tp2 dp2": ("default", ranks(tp=2, dp=2)),
    "tp2 dp2 recorded": ("default", ranks(tp=2, dp=2, more=(RECORDED,))),
    "tp2 pp2": ("default", ranks(tp=2, pp=2)),
    "cp2": ("default", ranks(cp=2)),
    "cp2 zero 3 compiled": ("default", ranks(cp=2, stage=3, more=COMPILED)),
    "cp2 zero 3 compiled, recomputed": ("default", ranks(cp=2, stage=3, more=(*COMPILED, "train.recompute=full"))),
    "cp2 compiled, recorded": ("default", ranks(cp=2, more=(*COMPILED, RECORDED))),
    "cp2 delta": ("delta", ranks(cp=2)),
    "cp2 transformer": ("transformer", ranks(cp=2)),
    "cp2 transformer, recorded": ("transformer", ranks(cp=2, more=(RECORDED,))),
    "cp2 tp2 grouped": ("grouped", ranks(cp=2, tp=2)),
    "tp2 grouped, compiled": ("grouped", ranks(tp=2, more=COMPILED)),
    "cp4": ("default", ranks(cp=4)),
    "cp4 zero 3": ("default", ranks(cp=4, stage=3)),
    "cp4 zero 3 compiled, recorded": ("default", ranks(cp=4, stage=3, more=(*COMPILED, RECORDED))),
    "cp2 tp2": ("default", ranks(cp=2, tp=2)),
    "tp2 muon": ("muon", ranks(tp=2)),
    "dp2 zero 3 muon, compiled, recorded": ("muon", ranks(dp=2, stage=3, more=(*COMPILED, RECORDED))),
    "ep2": ("experts", ranks(dp=2, ep=2)),
    "ep2 zero 3 compiled": ("experts", ranks(dp=2, ep=2, stage=3, more=COMPILED[:1])),
    "ep2 zero 3 counted": ("experts-dropless", ranks(dp=2, ep=2, stage=3)),
    "tp2 experts": ("experts", ranks(tp=2)),
    "ep4 zero 1": ("experts", ranks(dp=4, ep=4, stage=1)),
    "ep2 tp2 zero 3": ("experts", ranks(dp=2, tp=2, ep=2, stage=3)),
    "pp2 dp2 zero 3 interleaved, gathered by copies": (
        "default", ranks(pp=2, dp=2, stage=3, more=(*INTERLEAVED, "zero.copy_engine_gather=true"))
    ),
    "dp4 zero 3 in pairs": ("default", ranks(dp=4, stage=3, more=("zero.shard_size=2",))),
}
# Rounding makes tokens choose other experts, so that runs in bf16 differ by more than a mistake may make.
FLOAT32_ALONE = [name for name, (block, _) in CASES.items() if block.startswith("experts")]
MISTAKES = {"never_synchronised": "dp2 zero 3", "same_data_everywhere": "dp2", "no_reduction_in_scatter": "tp2"}


class Difference(NamedTuple):
    """The relative difference of two runs.

    Args:
        steps: Largest of a loss or a gradient norm.
        way: Of the way that all weights together went from the initial ones.
        weight: The same of the weight that differs most.
        where: Its name.
    """

    steps: float
    way: float
    weight: float
    where: str

    def within(self, tolerance):
        """Every part is below the one of the tolerance; no number is not."""
        return all(found < allowed for found, allowed in zip(self[:3], tolerance, strict=True))


# (steps, way, weight). On an H200, in bf16: one process against itself in float32 (8e-3, 0.09, 0.85: a scalar of a head is the worst weight), with
# another microbatch (7e-3, 0.03, 0.08); in float32 with another microbatch (3e-7, 6e-6, 6e-5), of the delta rule (8e-8, 4e-6, 1.3e-3: the last bit of
# a scalar that hardly moves). Two runs that both round differ from each other by more than one from float32.
TOLERANCE = {"bf16": (2e-2, 0.15, 2.5), "fp32": (1e-4, 1e-4, 5e-3)}


def train_on(device_type, dtype, settings, num_steps=NUM_STEPS, world_size=1, mutation=None):
    """A job: losses and gradient norms, and the final weights."""
    settings = (*settings, f"precision.dtype={dtype}", *SMALLER[device_type])
    return train_steps(settings, num_steps, world_size, mutation, device_type=device_type, dtype=DTYPES[dtype], model=MODEL)


@functools.cache
def one_process(device_type, dtype, block, settings=(), num_steps=NUM_STEPS):
    return train_on(device_type, dtype, (*BLOCKS[block], *settings), num_steps)


def difference(found, expected, initial):
    (steps, weights), (expected_steps, expected_weights), (_, initial_weights) = found, expected, initial
    assert weights.keys() == expected_weights.keys() and len(steps) == len(expected_steps)
    of_steps = [abs(ours / theirs - 1) for pair in zip(steps, expected_steps, strict=True) for ours, theirs in zip(*pair, strict=True)]
    errors = {name: (weights[name] - value).norm().item() for name, value in expected_weights.items()}
    ways = {name: (value - initial_weights[name]).norm().item() for name, value in expected_weights.items()}
    assert all(ways.values())  # every weight is trained
    weight, where = max((_finite(errors[name] / way), name) for name, way in ways.items())
    return Difference(max(map(_finite, of_steps)), _finite(math.hypot(*errors.values()) / math.hypot(*ways.values())), weight, where)


def _finite(value):
    """Infinity for what is not a number, which no comparison notices."""
    return math.inf if math.isnan(value) else value


def difference_to_one_process(pool, device_type, dtype, case, mutation=None):
    block, (world_size, settings) = case
    arguments = (device_type, dtype, (*BLOCKS[block], *settings), NUM_STEPS, world_size, mutation)
    found = pool.run(train_on, *arguments, world_size=world_size, backend=NCCL if device_type == "cuda" else GLOO, timeout_seconds=240)
    assert mutation or all(steps == found[0][0] for steps, _ in found)  # every rank reports the same
    return difference(found[0], one_process(device_type, dtype, block), one_process(device_type, dtype, block, (), 0))


def require_gpus(number):
    if torch.cuda.device_count() < number:
        pytest.skip(f"needs {number} GPUs, and this host has {torch.cuda.device_count()}")


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_equals_one_gpu(pool, dtype, name):
    require_gpus(CASES[name][1][0])
    if dtype == "bf16" and name in FLOAT32_ALONE:
        pytest.skip("experts are compared in float32")
    found = difference_to_one_process(pool, "cuda", dtype, CASES[name])
    print(f"{name}, {dtype}: {found}")
    assert found.within(TOLERANCE[dtype]), found


@pytest.mark.gpu
@pytest.mark.parametrize("degrees", [{"dp": 2, "ep": 2, "stage": 1}, {"tp": 2}], ids=str)
def test_recorded_experts_compute_what_those_compute_that_are_not_recorded(pool, degrees):
    """In bf16, where the device counts the rows of experts: float32 cannot be recorded. The kernels are the same, and so is what they compute."""
    require_gpus(2)
    world_size, settings = ranks(**degrees, more=COMPILED[:1])
    settings = (*BLOCKS["experts"], *settings)

    def run(*more):
        arguments = ("cuda", "bf16", (*settings, *more), NUM_STEPS, world_size)
        return pool.run(train_on, *arguments, world_size=world_size, backend=NCCL, timeout_seconds=240)[0]

    found = difference(run(RECORDED), run(), one_process("cuda", "bf16", "experts", (), 0))
    print(f"experts, recorded: {found}")
    assert found.within(TOLERANCE["fp32"]), found


@pytest.mark.gpu
@pytest.mark.parametrize("mutation", MISTAKES)
def test_bf16_does_not_hide_a_mistake(pool, mutation):
    require_gpus(2)
    assert not survives(pool, "cuda", mutation)


def survives(pool, device_type, mutation):
    """Whether parity in bf16 lets a mistake pass; an error is noticed, too."""
    try:
        found = difference_to_one_process(pool, device_type, "bf16", CASES[MISTAKES[mutation]], mutation)
    except (RuntimeError, RankError):
        return False
    print(f"{mutation}: {found}")
    return found.within(TOLERANCE["bf16"])


@pytest.mark.parametrize(
    ("device_type", "block"),
    [
        pytest.param("cpu", "default", marks=pytest.mark.full),
        *(pytest.param("cuda", block, marks=pytest.mark.gpu) for block in ("default", "whole", "delta")),
    ],
)
def test_the_tolerance_is_what_rounding_costs_one_process(device_type, block):
    """What no mistake made is within it: the rounding of bf16 as a whole, and the order of sums over other microbatches."""
    initial = one_process(device_type, "bf16", block, (), 0)
    exact, rounded = (one_process(device_type, dtype, block) for dtype in ("fp32", "bf16"))
    other_sums = {dtype: one_process(device_type, dtype, block, ("train.micro_batch_size=1",)) for dtype in DTYPES}
    costs = {
        "bf16 against fp32": ("bf16", difference(rounded, exact, initial)),
        "bf16, another microbatch": ("bf16", difference(other_sums["bf16"], rounded, initial)),
        "fp32, another microbatch": ("fp32", difference(other_sums["fp32"], exact, initial)),
    }
    for what, (dtype, found) in costs.items():
        print(f"{block}, {device_type}, {what}: {found}")
        assert found.within(TOLERANCE[dtype]), what


def test_a_number_that_is_none_is_within_nothing():
    run = ([(1.0, 2.0)], {"a": torch.ones(2), "b": torch.tensor([3.0])})
    start = ([], {"a": torch.zeros(2), "b": torch.zeros(1)})
    assert difference(run, run, start)[:3] == (0, 0, 0)
    other = ([(1.0, 2.2)], {"a": torch.ones(2), "b": torch.tensor([3.3])})
    found = difference(other, run, start)
    assert found[:3] == pytest.approx((0.1, 0.3 / 11**0.5, 0.1)) and found.where == "b" and found.within((0.2, 0.1, 0.2))
    assert not any(found.within(tolerance) for tolerance in ((0.05, 1, 1), (1, 0.05, 1), (1, 1, 0.05)))
    lost = ([(math.nan, 2.0)], {"a": torch.tensor([1.0, math.nan]), "b": torch.tensor([3.0])})
    assert difference(lost, run, start) == (math.inf, math.inf, math.inf, "a")


@pytest.mark.parametrize(
    ("dtype", "name"), [("bf16", "tp2"), ("fp32", "cp2 transformer"), ("fp32", "ep2 zero 3 counted")]
)
def test_two_ranks_on_the_cpu_are_within_it(pool, dtype, name):
    """This comparison itself, where there is no GPU."""
    found = difference_to_one_process(pool, "cpu", dtype, CASES[name])
    assert found.within(TOLERANCE[dtype]), found


def test_a_mistake_on_the_cpu_is_not(pool):
    assert not survives(pool, "cpu", "never_synchronised")
