"""The predicted speed of a step: against everything that was measured on GPUs, and what must hold of it anywhere."""

import json
from pathlib import Path

import pytest

from phase8.config.load import load_config
from phase8.config.model_section import LayerKind, ModelSection
from phase8.errors import ConfigError
from phase8.plan import throughput
from phase8.plan.layer_cost import Microbatch, Rates, layer_cost
from phase8.plan.prediction import predict_step, recorded_where_it_pays

ROOT = Path(__file__).parents[2]
MEASURED = json.loads((Path(__file__).parent / "measured_throughput.json").read_text())
TOLERANCE = 0.10
INPUTS_OFFLOADED = ("train.offload_activations=cpu",)
H100 = "NVIDIA H100 80GB HBM3"


def config_of(name, *settings, tmp_path):
    """A shipped config, or the defaults, with explicit settings of everything that decides about speed."""
    if name is None:
        path = tmp_path / "default.yaml"
        path.write_text("run: {name: defaults}\n")
    else:
        path = ROOT / "configs" / f"{name}.yaml"
    return load_config(path, list(settings))


def predicted(name, *settings, tmp_path, world_size=1, device=H100, host_ratio=1.0):
    explicit = {"train.micro_batch_size": 4, "train.recompute": "none", "train.recompute_every_n_layers": 1}
    explicit |= {"train.compile.enabled": "true", "train.cuda_graphs": "false"} | dict(setting.split("=") for setting in settings)
    config = config_of(name, *(f"{key}={value}" for key, value in explicit.items()), tmp_path=tmp_path)
    return predict_step(config, world_size, device, host_ratio=host_ratio)


def test_every_measured_row_is_predicted_within_a_tenth(tmp_path):
    rows = MEASURED["rows"]
    missed = {}
    for row in rows:
        config = config_of(row["config"], *MEASURED["blocks"][row.get("block", "before")].split(), *row["set"].split(), tmp_path=tmp_path)
        ratio = MEASURED["host_ratios"][row["host"]]
        speed = predict_step(config, row["world_size"], row["device"], host_ratio=ratio).tokens_per_second
        deviation = speed / row["tokens_per_second"] - 1
        if abs(deviation) > TOLERANCE:
            missed[f"{row['source']}: {row['set']}"] = deviation
    assert len(rows) >= 80 and missed == {}


def test_mfu_is_the_flops_of_the_model_over_the_peak(tmp_path):
    found = predicted("phase8_1b", tmp_path=tmp_path)
    assert found.mfu == pytest.approx(0.47, abs=0.03) and found.is_known
    assert found.tokens_per_second * found.seconds == pytest.approx(256 * 4096)
    own = predicted("phase8_1b", "observe.peak_flops=494.75e12", tmp_path=tmp_path)
    assert own.mfu == pytest.approx(2 * found.mfu)


def test_an_unknown_device_is_predicted_as_an_h100_and_says_so(tmp_path):
    unknown, known = (predicted("phase8_small", tmp_path=tmp_path, device=device) for device in ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "h100"))
    assert (unknown.is_known, known.is_known) == (False, True) and unknown.seconds == known.seconds


def test_a_config_that_cannot_run_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="world size 3"):
        predicted("phase8_1b", "parallel.tensor_parallel_size=2", tmp_path=tmp_path, world_size=3)


@pytest.mark.parametrize("recompute", ["full", "selective", "budget"])
def test_recomputation_costs_time(tmp_path, recompute):
    none, some = (predicted("phase8_1b", f"train.recompute={each}", tmp_path=tmp_path) for each in ("none", recompute))
    assert 1.02 < some.seconds / none.seconds < 1.3
    half = predicted("phase8_1b", "train.recompute=selective", "train.recompute_every_n_layers=2", tmp_path=tmp_path)
    whole = predicted("phase8_1b", "train.recompute=selective", tmp_path=tmp_path)
    assert none.seconds < half.seconds < whole.seconds


def test_copies_of_inputs_cost_time_only_where_they_take_longer_than_the_layer(tmp_path, monkeypatch):
    """A token of phase8_1b has 4 KiB and keeps an H100 busy for longer than a PCIe link."""
    copied = 24 * 2 * 256 * 4096 * 2048 * 2 / 1e9  # once to the host and once back for each layer, at 1 GB/s
    kept, hidden = (predicted("phase8_1b", "train.recompute=full", *more, tmp_path=tmp_path).seconds for more in ((), INPUTS_OFFLOADED))
    monkeypatch.setattr(throughput, "HOST_LINK_RATE", 1e9)
    slow = predicted("phase8_1b", "train.recompute=full", *INPUTS_OFFLOADED, tmp_path=tmp_path).seconds
    assert kept == hidden and copied < slow < copied + kept


def test_the_delta_rule_takes_longer_than_the_linear_recurrence(tmp_path):
    for settings in ((), ("model.chain=both",), ("train.recompute=full",)):
        linear, delta = (predicted("phase8_1b", f"model.global_path={path}", *settings, tmp_path=tmp_path) for path in ("linear", "delta"))
        assert 1.005 < delta.seconds / linear.seconds < 1.05
    window, with_path = (predicted("phase8_1b", f"model.global_path={path}", tmp_path=tmp_path) for path in ("none", "linear"))
    assert window.seconds < with_path.seconds


def test_an_embedding_scalar_is_ten_passes_over_the_stream():
    def seconds(**settings):
        batch = Microbatch(ModelSection(**settings), 4, 1, 2, True, Rates(1e15, 3e12))
        return batch, layer_cost(batch, LayerKind(128), recompute="none", budget=1.0).gpu

    (batch, without), (_, added) = seconds(), seconds(embedding_scalars=True)
    assert added - without == pytest.approx(10 * batch.tokens * batch.model.d_model * 2 / 3e12, rel=1e-6)


def test_every_scalar_of_the_global_path_is_a_column_of_a_product():
    def batch(**settings):
        return Microbatch(ModelSection(global_gate="scalar", **settings), 4, 1, 2, True, Rates(1e15, 3e12))

    def layer_seconds(**settings):
        return layer_cost(batch(**settings), LayerKind(128), recompute="none", budget=1.0).gpu

    rows, width, heads = batch().tokens, batch().model.d_model, batch().model.num_heads
    two, three, four = (batch().product(rows, width, scalars * heads) for scalars in (2, 3, 4))
    forward_and_backward = 3
    for path, least, most in (("linear", two, three), ("delta", three, four)):
        chain, without = (layer_seconds(global_path=path, chain=chain) for chain in ("both", "none"))
        assert chain - without == pytest.approx(forward_and_backward * (most - least), rel=1e-6)


def test_low_rank_q_k_and_v_are_written_and_read_only_where_no_operator_computes_them():
    def cost(rank):
        model = ModelSection(d_model=512, num_heads=8, low_rank_rank=rank)
        batch = Microbatch(model, 64, 1, 2, True, Rates(1e15, 3e12))
        return batch, layer_cost(batch, LayerKind(128), recompute="none", budget=1.0).gpu

    (batch, inside), (_, outside) = cost(32), cost(33)
    passes = batch.moved((3 + 6) * batch.tokens * 512)
    assert outside - inside == pytest.approx(3 * batch.product(batch.tokens, 3 * 33, 3 * 512) + passes, rel=0.1)


def test_a_gate_per_channel_takes_time(tmp_path):
    scalar, channel = (predicted("phase8_1b", f"model.global_gate={gate}", tmp_path=tmp_path) for gate in ("scalar", "channel"))
    assert 1.005 < channel.seconds / scalar.seconds < 1.05


def test_a_larger_budget_is_faster_where_the_compiler_makes_another_graph_of_it(tmp_path):
    def seconds(recompute, budget="0.5"):
        return predicted("phase8_1b", f"train.recompute={recompute}", f"train.activation_memory_budget={budget}", tmp_path=tmp_path).seconds

    budgets = [seconds("budget", each) for each in (0.1, 0.2, 0.3, 0.4, 0.5, 0.9)]
    order = [seconds("full"), *budgets, seconds("none")]
    assert order == sorted(order, reverse=True) and len(set(order)) == len(order)
    assert seconds("budget", 0.5) == seconds("budget", 0.7) and seconds("budget", 0.8) == seconds("budget", 0.95)
    assert seconds("budget", 1) == seconds("none")


def test_a_step_is_recorded_where_it_pays_and_can_be(tmp_path):
    def asked(name, *settings, world_size=1):
        explicit = ("train.micro_batch_size=4", "train.recompute=none", "train.compile.enabled=true", "train.cuda_graphs=false", *settings)
        config = config_of(name, *explicit, tmp_path=tmp_path)
        found, prediction = recorded_where_it_pays(config, world_size, H100)
        assert prediction == predict_step(found, world_size, H100)
        return found.train.cuda_graphs, prediction.seconds / predict_step(config, world_size, H100).seconds

    recorded, gain = asked("phase8_small")
    assert recorded is True and gain < 0.2
    assert asked("phase8_1b", "train.micro_batch_size=8") == (False, 1.0)
    assert asked("phase8_small", "parallel.pipeline_parallel_size=2", world_size=2) == (False, 1.0)


def test_without_a_graph_small_models_wait_for_their_host_and_large_ones_do_not(tmp_path):
    def gain(name, size):
        settings = [(f"train.micro_batch_size={size}", f"train.cuda_graphs={each}") for each in ("false", "true")]
        step, graph = (predicted(name, *each, tmp_path=tmp_path).seconds for each in settings)
        return step / graph

    assert gain("phase8_small", 4) > 5 and gain("phase8_1b", 8) < 1.01
    slow, fast = (predicted("phase8_small", tmp_path=tmp_path, host_ratio=ratio).seconds for ratio in (1.0, 0.5))
    assert slow / fast == pytest.approx(2, rel=0.1)


def test_ranks_of_other_hosts_are_reached_through_the_network(tmp_path):
    settings = ["train.global_batch_size=512", "zero.stage=3"]
    near, far = (predicted("phase8_1b", *settings, tmp_path=tmp_path, world_size=ranks) for ranks in (8, 16))
    assert far.tokens_per_second < 2 * near.tokens_per_second * 0.95
    within = predicted("phase8_1b", *settings, "zero.shard_size=8", tmp_path=tmp_path, world_size=16)
    assert within.seconds < far.seconds


def test_what_lies_on_nvme_is_slower_than_what_lies_in_host_memory(tmp_path):
    def seconds(optimizer, params):
        offloaded = ["zero.stage=3", f"zero.offload_optimizer={optimizer}", f"zero.offload_params={params}"]
        offloaded += ["zero.nvme_path=/tmp"] * ("nvme" in (optimizer, params))
        return predicted("phase8_1b", "zero.engine=deepspeed", *offloaded, tmp_path=tmp_path).seconds

    host, states, both = seconds("cpu", "cpu"), seconds("nvme", "cpu"), seconds("nvme", "nvme")
    num_parameters = 1_340_558_464
    assert states - host == pytest.approx(28 * num_parameters / throughput.NVME_RATE)
    assert both > states + 0.15 * 2 * 64 * 4 * num_parameters * (1 / throughput.NVME_RATE - 1 / throughput.HOST_LINK_RATE)


def test_a_pipeline_waits_less_with_more_microbatches_and_with_chunks(tmp_path):
    def speed(*settings):
        stages = ("model.num_layers=23", "parallel.pipeline_parallel_size=4", *settings)
        return predicted("phase8_1b", *stages, tmp_path=tmp_path, world_size=4).tokens_per_second

    few, many = (speed(f"train.global_batch_size={size}") for size in (16, 256))
    chunks = speed("train.global_batch_size=16", "parallel.pipeline_schedule=interleaved", "parallel.pipeline_chunks=2")
    assert few < chunks < many
