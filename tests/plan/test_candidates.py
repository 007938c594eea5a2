"""Candidates for automatic settings: they fit by plan, obey what is explicit, and come in the order of predicted speed."""

import os
from dataclasses import replace

import pytest

from phase8.config.load import load_config
from phase8.plan.candidates import Device, find_candidates, how_to_fit, nearest_that_fits, smallest_candidate, usable_bytes
from phase8.plan.whole_config import plan_stages

SMALL = (
    "model.d_model=64", "model.num_layers=4", "model.num_heads=4", "model.vocab_size=256", "model.sequence_length=128", "model.ffn_size=256",
    "model.local_window_size=32", "train.global_batch_size=16",
)  # fmt: skip
GPU = Device("cuda", "a GPU", memory_bytes=8 << 30, total_bytes=8 << 30, peak_flops=1e14)


def config_of(*settings):
    return load_config(os.devnull, [*SMALL, *settings])


def with_usable(num_bytes):
    return replace(GPU, memory_bytes=int((num_bytes + (256 << 20)) / 0.97) + 1)


def found(*settings, device=GPU, **options):
    return find_candidates(config_of(*settings), world_size=1, device=device, **{"most": 6, "compiles": False, **options})


def test_where_all_fits_nothing_is_recomputed_and_the_largest_microbatch_comes_first():
    sizes = [candidate.config.train.micro_batch_size for candidate in found()]
    assert sizes == [16, 8, 4, 2, 1]
    assert {candidate.config.train.recompute for candidate in found()} == {"none"}


def test_all_fit_by_plan_and_recomputation_makes_room():
    full, least = found()[0].planned_bytes, smallest_candidate(config_of("train.compile.enabled=false"), world_size=1, device=GPU).planned_bytes
    tight = with_usable((full + least) // 2)
    candidates = found(device=tight)
    assert candidates and all(candidate.planned_bytes <= usable_bytes(tight) < full for candidate in candidates)
    assert [candidate.relative_seconds for candidate in candidates] == sorted(candidate.relative_seconds for candidate in candidates)
    (stage,) = plan_stages(candidates[0].config, world_size=1, device_type="cuda", device_bytes=tight.total_bytes)
    assert stage.memory.total_bytes == candidates[0].planned_bytes


def test_what_is_explicit_stays():
    candidates = found("train.micro_batch_size=4", "train.recompute=selective", "train.compile.enabled=false", "train.cuda_graphs=false")
    assert [str(candidate) for candidate in candidates] == ["micro batch 4, recompute selective"]
    assert found("train.recompute=full", "train.cuda_graphs=true")[0].config.train.cuda_graphs is True


def test_a_small_model_is_recorded_and_a_large_one_is_not():
    assert found()[0].config.train.cuda_graphs is True
    large = found("model.d_model=4096", "model.sequence_length=2048", "model.ffn_size=16384", device=replace(GPU, memory_bytes=1 << 40))
    assert large[0].config.train.cuda_graphs is False


@pytest.mark.parametrize(
    "settings",
    [("parallel.pipeline_parallel_size=2", "parallel.num_microbatches=4"), ("zero.stage=3", "zero.offload_optimizer=cpu")],
)
def test_what_no_graph_can_hold_is_not_recorded(settings):
    candidates = find_candidates(config_of(*settings), world_size=2, device=GPU, most=3, compiles=False)
    assert candidates and not any(candidate.config.train.cuda_graphs for candidate in candidates)


def test_a_cpu_takes_few_tokens_at_once_and_nothing_special():
    cpu = Device("cpu", "CPU", 0, 0, can_compile=False)
    (candidate,) = found(device=cpu)
    train = candidate.config.train
    assert (train.micro_batch_size, train.recompute, train.compile.enabled, train.cuda_graphs) == (16, "none", False, False)
    (candidate,) = found("model.sequence_length=1024", device=cpu)
    assert candidate.config.train.micro_batch_size == 4


def test_compilation_is_a_candidate_where_it_is_worth_it():
    assert all(candidate.config.train.compile.enabled for candidate in found(compiles=True, most=2))
    assert not any(candidate.config.train.compile.enabled for candidate in found(device=replace(GPU, can_compile=False), compiles=True, most=2))


def test_the_nearest_setting_that_fits_changes_the_microbatch_first():
    config = config_of("train.micro_batch_size=16", "train.recompute=none", "train.compile.enabled=false", "train.cuda_graphs=false")
    (stage,) = plan_stages(config, world_size=1, device_type="cuda", device_bytes=GPU.total_bytes)
    device = with_usable(stage.memory.total_bytes - 1)
    nearest = nearest_that_fits(config, device, world_size=1, below_bytes=1 << 60)
    assert how_to_fit(config, nearest).startswith("train.micro_batch_size=8 fits with ") and nearest.planned_bytes < stage.memory.total_bytes
    assert nearest_that_fits(config, replace(GPU, memory_bytes=1 << 20), world_size=1, below_bytes=1 << 40) is None


def test_the_smallest_candidate_recomputes_the_most():
    smallest = smallest_candidate(config_of("train.compile.enabled=false"), world_size=1, device=replace(GPU, memory_bytes=1 << 20))
    assert (smallest.config.train.micro_batch_size, smallest.config.train.recompute) == (1, "full")
