"""Times plain DeepSpeed on the model of a config, as a peer of `zero.engine`: a loop as DeepSpeed's own tutorials show it.

    python tools/bench/plain_deepspeed.py --config configs/phase8_1b.yaml --stage 3 --offload cpu --set train.global_batch_size=128

Model, recomputation, compiled blocks and microbatches are those of the config; the buckets and the optimizer are DeepSpeed's own choice
(DeepSpeedCPUAdam where the optimizer is offloaded). Tokens are random. Started by torchrun, its ranks, of one host, divide the batch and the state.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from measure import ROOT, BenchmarkError
from torch import Tensor, nn

from phase8.config.arguments import path_argument
from phase8.config.auto import without_auto
from phase8.config.load import load_config
from phase8.config.schema import RunConfig
from phase8.distributed.mesh import build_mesh
from phase8.formatting import format_bytes
from phase8.kernels.backends import select_kernels
from phase8.kernels.toolchain import without_architectures
from phase8.model.model import LanguageModel
from phase8.model.parameters import initialise, materialise
from phase8.precision.policy import set_matmul_precision
from phase8.terminal import run_door
from phase8.topology import Topology
from phase8.train.device import name_device_for_deepspeed
from phase8.train.engine.compilation import compile_modules
from phase8.train.engine.train_state import build_chunk

SLOW_STEPS = 2  # DeepSpeed learns the order of the parameters in the first, and makes the optimizer's state


class MeanLoss(nn.Module):
    """The module that DeepSpeed calls.

    Args:
        model: Whole model.
    """

    def __init__(self, model: LanguageModel):
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """The mean loss of a microbatch, tokens and targets [B, T]."""
        return self.model.loss_sum(tokens, targets) / targets.numel()


def main() -> int:
    """Runs the command line and returns the exit code."""
    return run_door(_run)


def _run() -> int:
    arguments = _parser().parse_args()
    if not torch.cuda.is_available():
        raise BenchmarkError("DeepSpeed is timed on a GPU only, and torch finds none.")
    # Where torchrun did not start this process, it meets nobody.
    place = {} if dist.is_torchelastic_launched() else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    dist.init_process_group("nccl", **place)
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    device = torch.device("cuda", rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    name_device_for_deepspeed(device)
    import deepspeed

    config = without_auto(load_config(arguments.config, arguments.set))
    engine = _engine(deepspeed, config, arguments, device)
    micro, count = config.train.micro_batch_size, engine.gradient_accumulation_steps()
    tokens = torch.randint(config.model.vocab_size, (micro, config.model.sequence_length + 1), device=device)
    seconds: list[float] = []
    for _ in range(arguments.steps):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(count):
            loss = engine(tokens[:, :-1], tokens[:, 1:])
            engine.backward(loss)
            engine.step()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begin)
        if rank == 0:
            print(f"step {len(seconds)}: {seconds[-1]:.2f} s, loss {loss.item():.3f}", flush=True)
    rate = micro * count * num_ranks * config.model.sequence_length / statistics.median(seconds[SLOW_STEPS:] or seconds[-1:])
    if rank == 0:
        peaks = f"device peak {format_bytes(torch.cuda.max_memory_allocated())}, host peak of a rank {format_bytes(_host_peak_bytes())}"
        where = f"stage {arguments.stage}, offloaded to {arguments.offload}, {num_ranks} ranks"
        print(f"plain DeepSpeed {deepspeed.__version__}, {where}: {rate:,.0f} tok/s, {peaks}")
    dist.destroy_process_group()
    return 0


def _engine(deepspeed: Any, config: RunConfig, arguments: argparse.Namespace, device: torch.device) -> Any:
    set_matmul_precision(config.precision)
    select_kernels(config.train.kernels, device)
    alone = build_mesh(Topology(), device_type="cuda", shard_size=1)
    model = build_chunk(config, range(config.model.num_layers), mesh=alone, dtype=torch.float32)
    materialise(model, device=device, axis=alone.tp)
    initialise(model, seed=0)
    compile_modules([model], config, are_calls_hooked=True)
    optim = config.optim
    settings = {
        "train_micro_batch_size_per_gpu": config.train.micro_batch_size,
        "train_batch_size": config.train.global_batch_size,
        "gradient_clipping": optim.gradient_clip_norm,
        "bf16": {"enabled": True},
        "optimizer": {
            "type": "AdamW",
            "params": {"lr": optim.learning_rate, "betas": optim.betas, "eps": optim.eps, "weight_decay": optim.weight_decay},
        },
        "zero_optimization": _zero(arguments),
        "steps_per_print": 1000000,
    }
    deepspeed.init_distributed(dist_backend=None, auto_mpi_discovery=False, verbose=False)
    module = MeanLoss(model)
    with without_architectures():  # DeepSpeed cannot read all of their names, such as 9.0a
        return deepspeed.initialize(model=module, model_parameters=list(module.parameters()), dist_init_required=False, config=settings)[0]


def _zero(arguments: argparse.Namespace) -> dict[str, Any]:
    if arguments.offload == "none":
        return {"stage": arguments.stage}
    place = {"device": arguments.offload, "pin_memory": True}
    if arguments.offload == "nvme":
        place["nvme_path"] = str(arguments.nvme_path)
    section = {"stage": arguments.stage, "offload_optimizer": place}
    return section | ({"offload_param": {"device": "cpu", "pin_memory": True}} if arguments.stage == 3 else {})


def _host_peak_bytes() -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return 1024 * int(line.split()[1])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    config = ROOT / "configs" / "phase8_1b.yaml"
    parser.add_argument("--config", type=path_argument, default=config, metavar="FILE", help="what to train (configs/phase8_1b.yaml)")
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="a.b=c", help="override config keys")
    parser.add_argument("--stage", type=int, default=3, choices=(1, 2, 3), help="ZeRO stage (3)")
    parser.add_argument("--offload", choices=("none", "cpu", "nvme"), default="cpu", help="where the optimizer goes, in stage 3 parameters too (cpu)")
    parser.add_argument("--nvme-path", type=path_argument, metavar="DIR", help="directory on the disk")
    parser.add_argument("--steps", type=int, default=5, metavar="N", help="optimizer steps (5); the first two are not counted")
    return parser


if __name__ == "__main__":
    sys.exit(main())
