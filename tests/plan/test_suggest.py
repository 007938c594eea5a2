"""Suggested layouts: all can run, they fit, the fastest comes first, and memory is planned for few of them."""

from types import SimpleNamespace

import pytest

from phase8.config.batch import run_topology
from phase8.config.load import load_config
from phase8.config.validate import find_problems
from phase8.errors import ConfigError
from phase8.observe.devices import find_gpu
from phase8.plan import suggest as module
from phase8.plan.layouts import layout_in_words, layouts, microbatches, offloaded, settings_of
from phase8.plan.memory import free_bytes, usable_bytes
from phase8.plan.prediction import predict_step
from phase8.plan.suggest import Suggestion, layouts_left_out, price_of_offloading, suggest

GIB = 2**30
FIXED_BYTES = 3 * GIB  # optimizer and parameters of the model `large`, each
CONFIG = """
run: {name: small}
model: {d_model: 256, num_layers: 6, num_heads: 4, vocab_size: 1024, sequence_length: 256, local_window_size: 64}
train: {global_batch_size: 64, num_steps: 1000}
"""
H100, RTX = find_gpu("h100"), find_gpu("rtx 4090")


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "small.yaml"
    path.write_text(CONFIG, encoding="utf-8")
    return lambda *settings: load_config(path, settings)


@pytest.fixture
def planned(monkeypatch):
    """A planner by which a rank needs a GiB for each sequence of its microbatch, half of it where something is recomputed, over tensor ranks.

    Of a run named large, optimizer and parameters need memory besides, on the device or on the host.
    """
    configs = []

    def plan(config, **others):
        configs.append(config)
        size = config.train.micro_batch_size / config.parallel.tensor_parallel_size
        activations = int(size * GIB * (1 if config.train.recompute == "none" else 0.5))
        on_host = sum(places(config)[what] != "none" for what in ("offload_optimizer", "offload_params")) * FIXED_BYTES
        is_known = config.run.name == "large"
        return [SimpleNamespace(memory=SimpleNamespace(total_bytes=activations + is_known * (2 * FIXED_BYTES - on_host), host_bytes=on_host))]

    monkeypatch.setattr(module, "plan_stages", plan)
    return configs


def places(config):
    return {key: getattr(config.zero, key) for key in ("offload_optimizer", "offload_params", "offload_gradients")}


def usable_of(memory_bytes, suggestion):
    return usable_bytes(free_bytes(memory_bytes), is_recorded=suggestion.config.train.cuda_graphs)


def test_what_is_suggested_can_run_fits_and_is_sorted_by_speed(config, planned):
    found = suggest(config(), world_size=8, gpu=H100, memory_bytes=5 * GIB)
    assert len(found) == 10 and len({each.layout for each in found}) >= 5
    assert all(find_problems(each.config, world_size=8) == [] and each.planned_bytes <= usable_of(5 * GIB, each) for each in found)
    speeds = [each.prediction.tokens_per_second for each in found]
    assert speeds == sorted(speeds, reverse=True)
    assert found[0].config.train.cuda_graphs  # so small a model waits for its host


def test_what_a_run_may_take_of_a_gpu_is_not_exceeded(config, planned):
    """The limit is that of the process: what the driver takes is beside it."""
    found = suggest(config("train.device_memory_gib=5.5"), world_size=1, gpu=H100, memory_bytes=80 * GIB)
    limits = [usable_bytes(GIB * 11 // 2, is_recorded=each.config.train.cuda_graphs) for each in found]
    assert all(each.planned_bytes <= limit for each, limit in zip(found, limits, strict=True))
    assert max(each.planned_bytes for each in found) == 4 * GIB  # beside the driver's GiB there would be no room for it
    wider = suggest(config("train.device_memory_gib=90"), world_size=1, gpu=H100, memory_bytes=5 * GIB)
    assert wider[0].planned_bytes == suggest(config(), world_size=1, gpu=H100, memory_bytes=5 * GIB)[0].planned_bytes


def test_layouts_keep_the_context_parallelism_of_the_config(config, planned):
    found = suggest(config("parallel.context_parallel_size=4"), world_size=8, gpu=H100, memory_bytes=5 * GIB)
    assert {each.layout.split(" x ")[0] for each in found} >= {"tensor 2 asynchronous", "pipeline 2 (1f1b)", "context 4"}
    assert all("context 4" in each.layout and find_problems(each.config, world_size=8) == [] for each in found)


def test_memory_is_planned_for_few_of_many_and_once(config, planned):
    num_candidates = sum(len(list(microbatches(each, world_size=8))) for each in layouts(config(), world_size=8, has_peer_memory=True))
    numbers = []
    for gib in (80, 2):
        planned.clear()
        suggest(config(), world_size=8, gpu=H100, memory_bytes=gib * GIB)
        assert len(planned) == len(set(planned))
        numbers.append(len(planned))
    assert numbers[0] < 0.15 * num_candidates and numbers[1] < 0.6 * num_candidates


def test_on_one_gpu_all_rows_are_of_it_and_a_larger_memory_is_used(config, planned):
    small, large = (suggest(config(), world_size=1, gpu=H100, memory_bytes=gib * GIB) for gib in (5, 80))
    assert {each.layout for each in (*small, *large)} == {"one GPU"}
    assert small[0].config.train.micro_batch_size <= 8 and large[0].config.train.micro_batch_size > 8
    assert large[0].prediction.tokens_per_second > small[0].prediction.tokens_per_second


def test_the_changes_are_what_the_config_did_not_have(config, planned):
    before = config("train.micro_batch_size=1", "parallel.num_microbatches=64")
    best = suggest(before, world_size=1, gpu=H100, memory_bytes=80 * GIB)[0]
    changes = best.changes(before)
    assert changes["parallel.num_microbatches"] is None and "parallel.tensor_parallel_size" not in changes
    again = config("train.micro_batch_size=1", *(f"{name}={'null' if value is None else str(value).lower()}" for name, value in changes.items()))
    assert settings_of(again) == settings_of(best.config)


def test_without_nvlink_tensor_ranks_do_not_share_memory(config):
    found = [each.parallel for gpu in (H100, RTX) for each in layouts(config(), world_size=2, has_peer_memory=gpu.link >= module.PEER_LINK)]
    assert [each.async_tensor_parallel for each in found if each.tensor_parallel_size == 2] == [True, False]


def test_nothing_fits_is_one_sentence_with_the_smallest_plan(config, planned):
    with pytest.raises(ConfigError) as error:
        suggest(config(), world_size=2, gpu=RTX, memory_bytes=GIB * 13 // 10)
    assert error.value.problems == [
        "no layout of small fits on 2 GPUs of 1.3 GiB: the smallest planned, tensor 2 with train.micro_batch_size 1 and train.recompute full, "
        "takes 256 MiB of 42 MiB that can be used; take more or larger GPUs, or a smaller model."
    ]


def test_where_a_recording_has_no_room_the_step_is_not_recorded(config, planned):
    (best,) = suggest(config(), world_size=1, gpu=H100, memory_bytes=GIB * 19 // 10, most=1)  # 0.6 GiB can be used, and nothing by a recording
    assert best.planned_bytes == GIB // 2 and best.config.train.cuda_graphs is False


@pytest.mark.parametrize(("asked", "batch"), [(64, 66), (60, 55), (4, 11), (11, 11)])
def test_a_batch_that_no_layout_divides_becomes_the_nearest(config, planned, asked, batch):
    before = config(f"train.global_batch_size={asked}")
    best, *_ = suggest(before, world_size=11, gpu=H100, memory_bytes=80 * GIB)
    assert best.config.train.global_batch_size == batch and not find_problems(best.config, world_size=11)
    assert best.changes(before).get("train.global_batch_size", asked) == batch
    sentence = (
        f"no layout of 11 GPUs can divide a batch of {asked} sequences among its data-parallel ranks: these have train.global_batch_size {batch}, "
        "the nearest that one can divide"
    )
    assert layouts_left_out(best, before, H100) == (None if asked == batch else sentence)


@pytest.mark.parametrize(("asked", "batch", "sizes"), [(1, 2, {2}), (7, 8, {2, 4, 8})])
def test_the_nearest_of_all_layouts_is_taken(config, planned, asked, batch, sizes):
    before = config(f"train.global_batch_size={asked}", "model.num_heads=2")  # at most 2 tensor-parallel ranks times 6 stages
    found = suggest(before, world_size=24, gpu=H100, memory_bytes=80 * GIB)
    assert {run_topology(each.config.parallel, world_size=24).data_parallel_size for each in found} == sizes
    assert {each.config.train.global_batch_size for each in found} == {batch}


def test_layouts_that_cannot_divide_the_batch_are_named_with_the_nearest_that_all_can(config, planned):
    before = config()
    best, *_ = suggest(before, world_size=12, gpu=H100, memory_bytes=80 * GIB)
    assert best.config.train.global_batch_size == 64
    assert layouts_left_out(best, before, H100) == (
        "left out are layouts of 3, 6 or 12 data-parallel ranks, which cannot divide a batch of 64 sequences; with train.global_batch_size=60, the "
        "nearest that all can divide, they are compared, too"
    )
    assert layouts_left_out(*(suggest(config(), world_size=8, gpu=H100, memory_bytes=80 * GIB)[:1]), before, H100) is None


def test_layouts_that_could_not_run_anyway_are_not_named(config, planned):
    before = config("model.num_layers=2", "model.num_heads=2", "train.global_batch_size=3")
    best, *_ = suggest(before, world_size=6, gpu=H100, memory_bytes=80 * GIB)
    assert layouts_left_out(best, before, H100).startswith("left out are layouts of 6 data-parallel ranks, ")  # not 2: no head is for 3 ranks


def test_the_real_planner_agrees_with_the_search(config):
    found = suggest(config(), world_size=1, gpu=H100, memory_bytes=4 * GIB, most=1)
    assert 0 < found[0].planned_bytes <= usable_of(4 * GIB, found[0])


OFFLOADED = ("zero.stage=3", "zero.offload_optimizer=cpu", "zero.offload_params=cpu")


@pytest.mark.parametrize("world_size", [1, 4])
@pytest.mark.parametrize(
    ("settings", "least"),
    [
        (OFFLOADED, 3),
        ((*OFFLOADED, "zero.offload_gradients=true"), 3),
        ((*OFFLOADED, "zero.engine=deepspeed"), 3),
        (("zero.engine=deepspeed",), 1),
        (("zero.engine=deepspeed", "zero.offload_optimizer=cpu"), 1),
        (("zero.stage=1", "zero.copy_engine_gather=true"), 1),
        (("zero.offload_optimizer=cpu",), 0),
        (("optim.name=muon", *OFFLOADED), 3),
    ],
)
def test_what_needs_a_stage_gets_it_on_any_number_of_ranks(config, planned, settings, least, world_size):
    before = config(*settings)
    found = suggest(before, world_size=world_size, gpu=H100, memory_bytes=5 * GIB)
    assert {each.config.zero.stage for each in found} >= {least} and min(each.config.zero.stage for each in found) == least
    assert all(find_problems(each.config, world_size=world_size) == [] and places(each.config) == places(before) for each in found)


def test_stages_that_communicate_for_every_microbatch_are_in_pipelines_only_where_they_must(config):
    def stages(*settings):
        found = layouts(config(*settings), world_size=8, has_peer_memory=True)
        return {each.zero.stage for each in found if each.parallel.pipeline_parallel_size == 2}

    assert (stages(), stages(*OFFLOADED)) == ({0, 1}, {3})


def test_what_fits_on_the_gpus_stays_there(config, planned):
    found = suggest(config("run.name=large"), world_size=1, gpu=H100, memory_bytes=16 * GIB)
    assert {each.host_bytes for each in found} == {0} and price_of_offloading(found[0], config("run.name=large"), H100) is None


def test_where_nothing_fits_a_part_goes_to_host_memory_and_the_fastest_comes_first(config, planned):
    before = config("run.name=large")
    found = suggest(before, world_size=1, gpu=H100, memory_bytes=7 * GIB)
    speeds = [each.prediction.tokens_per_second for each in found]
    assert speeds == sorted(speeds, reverse=True) and all(each.planned_bytes <= usable_of(7 * GIB, each) for each in found)
    assert {each.host_bytes // FIXED_BYTES for each in found} == {1, 2}
    assert {tuple(places(each.config).values()) for each in found} == {("cpu", "none", False), ("cpu", "cpu", False), ("cpu", "cpu", True)}
    assert {each.layout for each in found} == {
        "one GPU, optimizer on the host",
        "one GPU, ZeRO 3, optimizer and parameters on the host",
        "one GPU, ZeRO 3, optimizer, parameters and gradients on the host",
    }
    changes = found[0].changes(before)
    assert changes["zero.offload_optimizer"] == "cpu"
    price = price_of_offloading(found[0], before, H100)
    on_device = predict_step(found[0].config.model_copy(update={"zero": before.zero}), 1, H100).tokens_per_second
    assert on_device > speeds[0] and price.endswith(f"would make {on_device:,.0f} tok/s instead of {speeds[0]:,.0f}")


def test_what_travels_beside_computation_is_not_called_slower(config, planned):
    before = config("run.name=large", "model.sequence_length=512", "train.recompute_slice_tokens=128")
    step = ("train.recompute=full", "train.micro_batch_size=1", "train.compile.enabled=true", "train.cuda_graphs=false")
    settled = config("train.offload_activations=cpu", *step)
    price = price_of_offloading(Suggestion(settled, 1, predict_step(settled, 1, H100), 0), before, H100)
    assert price.endswith("so the first is predicted to be no slower") and "steps are slower" not in price


def test_several_ranks_offload_too(config, planned):
    found = suggest(config("run.name=large"), world_size=2, gpu=H100, memory_bytes=7 * GIB)
    assert any(each.layout.startswith("data 2, ZeRO 3, optimizer and parameters on the host") for each in found)


@pytest.mark.parametrize(
    ("settings", "offloaded"),
    [
        (["zero.offload_params=none"], {("cpu", "none", False)}),
        (["zero.offload_gradients=false"], {("cpu", "none", False), ("cpu", "cpu", False)}),
        (["zero.offload_optimizer=cpu"], {("cpu", "none", False)}),
    ],
)
def test_explicit_keys_of_offloading_are_obeyed(config, planned, settings, offloaded):
    found = suggest(config("run.name=large", *settings), world_size=1, gpu=H100, memory_bytes=7 * GIB)
    assert {tuple(places(each.config).values()) for each in found} == offloaded


def test_inputs_of_layers_go_to_host_memory_where_sequences_are_long(config):
    def ways(*settings):
        return [(*places(each).values(), each.train.offload_activations) for each in offloaded(config("zero.offload_params=none", *settings))]

    optimizer = ("cpu", "none", False)
    long = ("model.sequence_length=512", "train.recompute_slice_tokens=128")
    assert ways() == ways(*long, "train.offload_activations=none") == [(*optimizer, "none")]
    assert ways(*long) == [(*optimizer, "none"), ("none", "none", False, "cpu"), (*optimizer, "cpu")]


def test_a_config_that_keeps_its_optimizer_on_the_device_is_not_offloaded(config, planned):
    with pytest.raises(ConfigError, match=r"the smallest planned, one GPU with train.micro_batch_size 1 and .* takes 6\.5 GiB"):
        suggest(config("run.name=large", "zero.offload_optimizer=none"), world_size=1, gpu=H100, memory_bytes=7 * GIB)


def test_a_batch_that_ranks_make_up_is_that_of_the_config(config, planned):
    before = config("train.global_batch_size=null", "train.micro_batch_size=4", "parallel.num_microbatches=8")
    best = suggest(before, world_size=2, gpu=H100, memory_bytes=5 * GIB)[0]
    assert best.config.train.global_batch_size == 64 and best.changes(before)["train.global_batch_size"] == 64


def test_where_no_layout_can_run_the_problem_is_that_of_a_layout(config, planned, monkeypatch):
    problems = {1: [], 2: ["a problem of two tensor-parallel ranks.", "another one."], 4: ["a problem of four."]}

    def find(config, **others):
        is_own = config.train.micro_batch_size == "auto"
        return [] if is_own else problems[config.parallel.tensor_parallel_size] or ["a problem of data parallelism.", "and one more."]

    monkeypatch.setattr(module, "find_problems", find)
    monkeypatch.setattr("phase8.plan.layouts.find_problems", find)
    with pytest.raises(ConfigError) as error:
        suggest(config(), world_size=4, gpu=H100, memory_bytes=5 * GIB)
    assert error.value.problems == ["a problem of four."]


def test_words_for_what_is_offloaded(config):
    found = layout_in_words(config("zero.offload_optimizer=nvme", "zero.offload_params=cpu"), 1)
    assert found == "one GPU, parameters on the host, optimizer on NVMe"
