"""Candidates for automatic settings: they fit by plan, obey what is explicit, and come in the order of predicted speed."""

import os
from dataclasses import replace
from types import SimpleNamespace

import pytest

from phase8.config.load import load_config
from phase8.observe.devices import find_gpu
from phase8.plan import candidates as module
from phase8.plan.candidates import Device, find_candidates, how_to_fit, nearest_that_fits, smallest_candidate
from phase8.plan.memory import GAPS_BYTES, RECORDING_BYTES, USABLE_SHARE, usable_bytes
from phase8.plan.prediction import predict_step
from phase8.plan.whole_config import plan_stages

SMALL = (
    "model.d_model=64", "model.num_layers=4", "model.num_heads=4", "model.vocab_size=256", "model.sequence_length=128", "model.ffn_size=256",
    "model.local_window_size=32", "train.global_batch_size=16",
)  # fmt: skip
GIB = 2**30
GPU = Device("cuda", "a GPU", memory_bytes=8 << 30, total_bytes=8 << 30)


def config_of(*settings):
    return load_config(os.devnull, [*SMALL, *settings])


def with_usable(num_bytes, *, is_recorded=True):
    """A GPU of which a plan may fill so much."""
    return replace(GPU, memory_bytes=int((num_bytes + GAPS_BYTES + RECORDING_BYTES * is_recorded) / USABLE_SHARE) + 1)


@pytest.fixture
def planned(monkeypatch):
    """A planner by which a microbatch needs a GiB for each sequence, a step 1 GiB besides, and a recomputed block what its budget keeps."""
    configs = []

    def plan(config, **others):
        train = config.train
        configs.append(train)
        kept = {"none": 1.0, "selective": 0.5, "full": 0.05, "budget": 0.8 * train.activation_memory_budget}[train.recompute]
        share = -(-config.model.num_layers // train.recompute_every_n_layers) / config.model.num_layers  # of the layers, recomputed
        kept = share * kept + 1 - share
        return [SimpleNamespace(memory=SimpleNamespace(total_bytes=int((1 + train.micro_batch_size * kept) * GIB)))]

    monkeypatch.setattr(module, "plan_stages", plan)
    return configs


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
    assert candidates and all(candidate.planned_bytes <= usable_bytes(tight.memory_bytes, is_recorded=True) < full for candidate in candidates)
    (stage,) = plan_stages(candidates[0].config, world_size=1, device_type="cuda", device_bytes=tight.total_bytes)
    assert stage.memory.total_bytes == candidates[0].planned_bytes


def test_the_order_is_that_of_the_predicted_step(planned):
    candidates = found(compiles=True, device=replace(GPU, memory_bytes=9 * GIB))
    seconds = [candidate.step_seconds for candidate in candidates]
    assert seconds == sorted(seconds) == [predict_step(candidate.config, 1, GPU.name).seconds for candidate in candidates]
    assert len({candidate.config.train.micro_batch_size for candidate in candidates}) == len(candidates) == 5
    assert candidates == found(compiles=True, device=replace(GPU, memory_bytes=9 * GIB))


def test_a_known_gpu_is_predicted_by_its_rates_and_another_as_an_h100():
    def seconds(name):
        return found(most=1, device=replace(GPU, name=name))[0].step_seconds

    assert find_gpu(GPU.name) is None and seconds(GPU.name) == seconds("NVIDIA H100 80GB HBM3") != seconds("NVIDIA L4")


@pytest.mark.parametrize(
    ("gib", "way"), [(20, "nothing recomputed"), (9, "recompute budget 0.5"), (6.8, "recompute budget 0.35"), (3.2, "recompute full")]
)
def test_each_microbatch_recomputes_as_little_as_fits_and_few_are_planned(planned, gib, way):
    (largest,) = [each for each in found(compiles=True, device=replace(GPU, memory_bytes=int(gib * GIB))) if each.config.train.micro_batch_size == 16]
    assert str(largest) == f"micro batch 16, {way}, compiled, CUDA graphs"
    assert len({train.activation_memory_budget for train in planned if train.micro_batch_size == 16 and train.recompute == "budget"}) <= 4
    assert all(train.recompute != "selective" for train in planned)  # a budget is faster and needs less


def test_where_a_recording_has_no_room_the_step_is_not_recorded(planned):
    (best,) = found(most=1, device=replace(GPU, memory_bytes=int(1.7 * GIB)))
    assert str(best) == "micro batch 4, recompute full"


def test_what_cannot_be_faster_is_not_planned(planned):
    """The larger microbatches of a large model are hardly faster, and would have to recompute here."""
    large = ("model.d_model=2048", "model.num_layers=24", "model.num_heads=16", "model.sequence_length=4096", "model.ffn_size=8192")
    (best,) = found(*large, compiles=True, most=1, device=replace(GPU, memory_bytes=6 * GIB))
    assert str(best) == "micro batch 4, nothing recomputed, compiled"
    assert {(each.micro_batch_size, each.activation_memory_budget) for each in planned if each.recompute == "budget"} == {(8, 0.9), (16, 0.9)}


def test_where_something_was_too_much_all_need_less(planned):
    device = replace(GPU, memory_bytes=9 * GIB)
    best, *_ = found(compiles=True, device=device)
    others = found(compiles=True, device=device, below_bytes=best.planned_bytes)
    assert others and all(other.planned_bytes < best.planned_bytes for other in others)
    before, now = best.config.train, others[0].config.train
    assert now.micro_batch_size == 16 and now.activation_memory_budget < before.activation_memory_budget


def of_two(gib, *settings, **options):
    """The candidate with the largest microbatch of two tensor-parallel ranks, which have no budgets, on devices of which a plan may fill so much."""
    two = {"world_size": 2, "device": with_usable(gib * GIB), "most": 6, **options}
    found = find_candidates(config_of("parallel.tensor_parallel_size=2", *settings), **two)
    return max(found, key=lambda each: each.config.train.micro_batch_size)


# The model has four layers. A microbatch of 16 sequences needs 17 GiB, 15 if one mixer in four is recomputed, 13.2 with one layer in four, 13 with
# every second mixer, 9.4 with every second layer, 9 with all mixers, and 1.8 with all layers.
@pytest.mark.parametrize(
    ("gib", "way"),
    [
        (18, "nothing recomputed"), (16, "recompute selective every 4 layers"), (14, "recompute full every 4 layers"),
        (13.1, "recompute selective every 2 layers"), (10, "recompute full every 2 layers"), (9.2, "recompute selective"), (4, "recompute full"),
    ],
)  # fmt: skip
def test_without_budgets_as_few_layers_are_recomputed_as_fit(planned, gib, way):
    best = of_two(gib)
    assert str(best) == f"micro batch 16, {way}, compiled, CUDA graphs"
    of_largest = [train for train in planned if train.micro_batch_size == 16 and not train.cuda_graphs]
    assert len({(train.recompute, train.recompute_every_n_layers) for train in of_largest}) <= 7


def test_recomputing_some_layers_is_no_option_where_budgets_are_or_where_a_plan_was_too_small(planned):
    for device in (replace(GPU, memory_bytes=int(gib * GIB)) for gib in (17.5, 15, 11, 4)):
        found(compiles=True, device=device)
    assert {train.recompute_every_n_layers for train in planned} == {1}
    whole = of_two(20)
    assert of_two(20, below_bytes=whole.planned_bytes).config.train.recompute_every_n_layers == 1
    assert {train.recompute_every_n_layers for train in planned} == {1}


def test_recomputing_some_layers_is_left_alone_where_the_config_says_what_is_recomputed(planned):
    best = of_two(11, "train.recompute=full")
    assert (best.config.train.recompute, best.config.train.recompute_every_n_layers) == ("full", 1)
    assert of_two(11, "train.recompute=full", "train.recompute_every_n_layers=4").config.train.recompute_every_n_layers == 4


def test_what_is_explicit_stays():
    candidates = found("train.micro_batch_size=4", "train.recompute=selective", "train.compile.enabled=false", "train.cuda_graphs=false")
    assert [str(candidate) for candidate in candidates] == ["micro batch 4, recompute selective"]
    assert found("train.recompute=full", "train.cuda_graphs=true")[0].config.train.cuda_graphs is True


def test_a_small_model_is_recorded_and_a_large_one_is_not():
    assert found()[0].config.train.cuda_graphs is True
    large = ("model.d_model=4096", "model.sequence_length=2048", "model.ffn_size=16384")
    large = found(*large, device=replace(GPU, memory_bytes=1 << 40), compiles=True, most=1)
    assert large[0].config.train.cuda_graphs is False


@pytest.mark.parametrize(
    "settings",
    [("parallel.pipeline_parallel_size=2", "parallel.num_microbatches=4"), ("zero.stage=3", "zero.offload_optimizer=cpu")],
)
def test_what_no_graph_can_hold_is_not_recorded(settings):
    candidates = find_candidates(config_of(*settings), world_size=2, device=GPU, most=3, compiles=False)
    assert candidates and not any(candidate.config.train.cuda_graphs for candidate in candidates)


def test_the_room_of_a_device_is_what_is_free_or_what_the_config_leaves_of_it():
    assert GPU.room == GPU.limited_to(None).room == GPU.limited_to(8).room == GPU.limited_to(100).room == "8 GiB that are free on a GPU"
    assert GPU.limited_to(0.5).room == "512 MiB that train.device_memory_gib 0.5 leaves on a GPU"


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
    device = with_usable(stage.memory.total_bytes - 1, is_recorded=False)
    nearest = nearest_that_fits(config, device, world_size=1, below_bytes=1 << 60)
    assert how_to_fit(config, nearest).startswith("train.micro_batch_size=8 fits with ") and nearest.planned_bytes < stage.memory.total_bytes
    assert nearest_that_fits(config, replace(GPU, memory_bytes=1 << 20), world_size=1, below_bytes=1 << 40) is None


def test_the_smallest_candidate_recomputes_the_most():
    smallest = smallest_candidate(config_of("train.compile.enabled=false"), world_size=1, device=replace(GPU, memory_bytes=1 << 20))
    assert (smallest.config.train.micro_batch_size, smallest.config.train.recompute) == (1, "full")
