"""What the optimizer does in a step: the FLOPs of Muon are those of its code, ranks share them, and the prediction and the banner have both."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from phase8.config.load import load_config
from phase8.model.parameters import decayed_parameter_names
from phase8.optim.muon import Muon, matrices_of
from phase8.optim.whole_matrices import WholeMatrices
from phase8.plan import throughput
from phase8.plan.layer_cost import PRODUCT_SHARE, Rates
from phase8.plan.optimizer_work import matrices_in, optimizer_fact
from phase8.plan.prediction import predict_step, step_work
from phase8.plan.update_cost import MuonWork, UpdateWork, device_cost, host_bytes, sent_bytes
from phase8.plan.whole_config import shapes_only
from phase8.topology import AxisName

CONFIG = """
run: {name: small}
model: {d_model: 64, num_layers: 4, num_heads: 4, vocab_size: 96, sequence_length: 64, local_window_size: 16}
optim: {name: muon}
train: {global_batch_size: 16, micro_batch_size: 2, num_steps: 1000, recompute: none, cuda_graphs: false, compile: {enabled: true}}
"""
H100 = "NVIDIA H100 80GB HBM3"
MODELS = {
    "dense": (),
    "gate per channel": ("model.global_gate=channel",),
    "low rank": ("model.low_rank_rank=8",),
    "all low rank": ("model.low_rank_rank=8", "model.ffn=low_rank_swiglu"),
    "transformer": ("model.block=transformer", "model.num_kv_heads=2"),
    "experts": ("model.ffn=moe", "model.num_experts=4", "model.expert_ffn_size=48"),
}


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "small.yaml"
    path.write_text(CONFIG, encoding="utf-8")
    return lambda *settings: load_config(path, settings)


def work_of(config, world_size=1):
    return step_work(config, world_size=world_size).stages[0].update


@pytest.mark.parametrize("model", MODELS)
def test_the_flops_are_those_that_muon_computes(config, model):
    asked = config(*MODELS[model])
    built = shapes_only(asked)
    parameters = {name: torch.nn.Parameter(torch.empty(each.shape)) for name, each in built.named_parameters()}
    for part in parameters.values():
        part.grad = torch.ones_like(part)
    matrices = matrices_of(parameters)
    names = {"head_size": asked.model.head_width, "decayed_names": decayed_parameter_names(built)}
    muon = Muon(parameters, asked.optim, wholes=WholeMatrices(matrices, None, device=torch.device("cpu")), **names)
    with FlopCounterMode(display=False) as counter:
        muon.step()
    work = work_of(asked)
    assert work.muon.flops == counter.get_total_flops() > 0
    assert work.muon.num_parts == sum(each.numel() for each in matrices.values()) and work.muon.num_tensors == len(matrices)
    moments = [each for state in muon.state.values() for key, each in state.items() if key.startswith("exp_avg")]
    assert work.moments_bytes == sum(each.nbytes for each in moments)


def test_adamw_orthogonalises_nothing(config):
    work = work_of(config("optim.name=adamw"))
    assert work.muon == type(work.muon)() and work.moments_bytes == 8 * work.num_updated


@pytest.mark.parametrize(("dtype", "least", "most"), [("fp32", 8, 8), ("bf16", 4, 4.4), ("fp8", 2, 2.4)])
def test_moments_take_the_bytes_that_the_optimizer_declares(config, dtype, least, most):
    work = work_of(config("optim.name=adamw", f"optim.state_dtype={dtype}", "model.d_model=256"))
    assert least <= work.moments_bytes / work.num_updated <= most


@pytest.mark.parametrize(
    ("settings", "num_ranks", "axes"),
    [
        (("zero.stage=0",), 1, set()),
        (("zero.stage=1",), 4, {AxisName.SHARD}),
        (("zero.stage=3", "zero.shard_size=2"), 2, {AxisName.SHARD}),
        (("parallel.tensor_parallel_size=4",), 4, {AxisName.TENSOR}),
        (("parallel.tensor_parallel_size=2", "zero.stage=3"), 4, {AxisName.SHARD}),
    ],
)
def test_ranks_that_divide_matrices_share_the_work_and_send_their_parts(config, settings, num_ranks, axes):
    scalar = "model.global_gate=scalar"  # that of a channel has a bottleneck, which tensor-parallel ranks have whole
    alone, shared = work_of(config(scalar)).muon, work_of(config(scalar, *settings), world_size=4).muon
    assert shared.flops == pytest.approx(alone.flops / num_ranks) and shared.num_parts == pytest.approx(alone.num_parts / num_ranks)
    assert {axis for axis, _ in shared.sent} == axes
    assert sum(number for _, number in shared.sent) == pytest.approx(2 * shared.num_parts * (num_ranks - 1) / num_ranks)


def test_no_rank_computes_less_than_a_matrix(config):
    single = max(matrix.flops for matrix in matrices_in(config("model.num_layers=1").model, range(1)).values())
    shared = work_of(config("model.num_layers=1", "zero.stage=1", "train.global_batch_size=128"), world_size=64).muon
    assert shared.flops == single


def test_muon_takes_longer_than_adamw_and_less_where_ranks_share_it(config):
    def seconds(*settings, world_size=1):
        sizes = ("model.d_model=2048", "model.num_heads=16", "model.num_layers=8", "model.sequence_length=1024")
        return predict_step(config(*sizes, *settings), world_size, H100)

    adamw, muon = seconds("optim.name=adamw"), seconds()
    assert muon.seconds > adamw.seconds and muon.optimizer_seconds > 2 * adamw.optimizer_seconds > 0
    assert muon.seconds - adamw.seconds == pytest.approx(muon.optimizer_seconds - adamw.optimizer_seconds)
    whole, shared = (seconds(f"zero.stage={stage}", world_size=8).optimizer_seconds for stage in (0, 1))
    assert shared < 0.4 * whole
    offloaded = seconds("zero.offload_optimizer=cpu")
    assert offloaded.optimizer_seconds > muon.optimizer_seconds


@pytest.mark.parametrize("is_offloaded", [False, True])
def test_products_are_computed_at_their_rate_on_the_device(is_offloaded):
    rates = Rates(1e15, 3e12)

    def seconds(flops):
        return device_cost(UpdateWork(10, 0, MuonWork(10, flops)), rates, element_bytes=2, is_offloaded=is_offloaded).gpu

    assert seconds(1e15) - seconds(0) == pytest.approx(1 / PRODUCT_SHARE)


def test_shorter_moments_are_updated_faster_and_by_the_device_where_they_are_offloaded(config):
    def seconds(dtype, *settings):
        sizes = ("model.d_model=2048", "model.num_heads=16", "model.num_layers=8", "optim.name=adamw", f"optim.state_dtype={dtype}")
        return predict_step(config(*sizes, *settings), 1, H100).optimizer_seconds

    fp32, bf16, fp8 = map(seconds, ("fp32", "bf16", "fp8"))
    assert fp32 > bf16 > fp8
    fp32, bf16, fp8 = (seconds(dtype, "zero.offload_optimizer=cpu") for dtype in ("fp32", "bf16", "fp8"))
    assert fp32 > bf16 > fp8
    work = UpdateWork(num_updated=10.0, moments_bytes=20.0)
    assert (sent_bytes(work), host_bytes(work)) == (10 * 8 + 20, 40)  # weights, gradients and moments; the norm
    assert (sent_bytes(work._replace(moments_bytes=80.0)), host_bytes(work._replace(moments_bytes=80.0))) == (0, 280)


def test_a_slow_network_makes_muon_slower(config, monkeypatch):
    asked = config("zero.stage=1", "train.global_batch_size=32")
    fast = predict_step(asked, 16, H100).optimizer_seconds
    monkeypatch.setattr(throughput, "NETWORK_RATE", 1e6)
    assert predict_step(asked, 16, H100).optimizer_seconds > 2 * fast


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["optim.name=adamw"], "adamw, learning rate 0.0006, moments in fp32"),
        (["optim.name=adamw", "optim.state_dtype=bf16"], "adamw, learning rate 0.0006, moments of matrices in bf16"),
        (["optim.name=adamw", "optim.state_dtype=fp8", "optim.learning_rate=1e-4"], "adamw, learning rate 0.0001, moments of matrices in fp8"),
        (["optim.name=adamw", "zero.offload_optimizer=cpu"], "adamw, learning rate 0.0006, moments in fp32, state in host memory"),
        (["optim.name=adamw", "zero.offload_optimizer=nvme"], "adamw, learning rate 0.0006, moments in fp32, state on NVMe"),
        (
            ["model.num_layers=1", "model.low_rank_rank=8", "model.ffn_size=128", "model.global_path=none"],
            "muon on 11 matrices with momentum 0.95 in fp32, 40 MFLOP a step; adamw on all else, learning rate 0.0006, moments in fp32",
        ),
        (
            ["model.num_layers=2", "model.num_heads=2", "model.ffn_size=128", "model.global_path=none"],
            "muon on 20 matrices (heads apart) with momentum 0.95 in fp32, 114 MFLOP a step; adamw on all else, learning rate 0.0006"
            ", moments in fp32",
        ),
    ],
)
def test_the_optimizer_in_words(config, settings, words):
    asked = config(*settings)
    assert optimizer_fact(asked.optim, asked.zero, asked.model) == ("optimizer", words)
