"""Measures training speed, one machine, one run, real training steps: data, forward, backward, optimizer, record.

  quickstart   training as configs/quickstart.yaml does it
  speed        what each technique adds: eager fp32 -> + loader -> + bf16 -> + compile -> + kernels -> + CUDA graphs
  model        a config with the Phase 8 block and with the transformer's: tok/s, MFU, memory, parameters side by side
  scaling      tok/s of both blocks against the length of the sequence
  parallel     layouts of several ranks on the GPUs of this host: tok/s per GPU relative to one, memory beside the plan

All but quickstart train on random tokens, written to a temporary directory and read through the real loader. Figures are medians after
3 steps of warm-up (parallel: 2), in which compilation and the recording of the CUDA graph fall. In the ladder, fp32 products may use tf32 (as
precision.tf32 says); `gradients` says how far those of a rung are from those of the rung before, which is rounding or a fault. Compare
ratios, not absolute times, on a machine that does other work. With --json one JSON object is printed and the table goes to stderr. Exit
codes as in launch/pretrain.py; 141 whoever read the output has gone.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import phase8.early_interrupt  # noqa: F401  # first: later imports take time
from phase8.config.arguments import add_device_option, path_argument
from phase8.config.load import config_to_mapping, load_config
from phase8.errors import ConfigError
from phase8.terminal import output_is_the_product, run_door

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = ROOT / "configs"
AT_LEAST_ONE = (
    "iterations", "d_model", "n_layers", "n_seq", "batch_size", "vocab_size", "num_heads", "tokens_per_step", "sequence_lengths",
    "sequences_per_rank", "timeout",
)  # fmt: skip
LAYOUTS = ("one", "tp2", "dp2-zero0", "dp2-zero2", "dp2-zero3", "pp2-gpipe", "pp2-1f1b", "pp2-interleaved")
RESEARCH_SHAPE = {"d_model": 512, "n_layers": 8, "n_seq": 512, "low_rank_rank": 16, "vocab_size": 50257}
RESEARCH_REFERENCE = (
    "published reference (the research code's own figures for this shape, another machine and model, not measured here): "
    "2,839 tok/s at batch 1, 18,416 at batch 16"
)


def main() -> int:
    """Runs the command line and returns the exit code."""
    return run_door(_run)


def _run() -> int:
    arguments = _parser().parse_args()
    with output_is_the_product():
        _check_at_least_one(arguments)
        result = arguments.run(arguments, partial(print, file=sys.stderr if arguments.json else sys.stdout, flush=True))
        if arguments.json:
            print(json.dumps(result))
    return 0


def _quickstart(arguments: argparse.Namespace, show: Callable[[str], None]) -> dict:
    config = load_config(CONFIGS / "quickstart.yaml", arguments.set)
    from phase8.benchmark.throughput import measure_throughput

    result = asdict(measure_throughput(config, device=_device(arguments), num_steps=arguments.iterations))
    for name, value in {**result, "facts": result["facts"]["mixer"]}.items():
        show(f"{name:20s} {f'{value:,.5g}' if isinstance(value, float) else value}")
    return result


def _speed(arguments: argparse.Namespace, show: Callable[[str], None]) -> dict:
    config = load_config(os.devnull, [*_shape_settings(arguments), *arguments.set])
    device, ladders = _device(arguments), {}
    if arguments.use_flash_attn2:
        _require_flash_attn2(device)
    from phase8.benchmark.ladder import climb, total_gain
    from phase8.benchmark.tables import LADDER_HEADER, fact_lines, ladder_line, total_line
    from phase8.config.load import with_settings

    blocks = [config.model.block, *(["transformer"] if arguments.use_flash_attn2 else [])]
    for block in dict.fromkeys(blocks):
        show(f"{block}: {_shape_line(config)}\n{LADDER_HEADER}")
        rungs = []
        of_block = with_settings(config, {"model.block": block})
        for rung in climb(of_block, device=device, num_steps=arguments.iterations, use_compile=arguments.use_compile):
            rungs.append(rung)
            show(ladder_line(rung))
        show(total_line(rungs))
        for line in fact_lines(rung.measurement for rung in rungs):
            show(line)
        ladders[block] = {"rungs": [asdict(rung) for rung in rungs], "total_gain": total_gain(rungs)}
    result = {**_machine(device), "config": config_to_mapping(config), "ladders": ladders}
    if all(vars(arguments)[name] == value for name, value in RESEARCH_SHAPE.items()):
        show(RESEARCH_REFERENCE)
        result["published_reference"] = RESEARCH_REFERENCE
    return result


def _model(arguments: argparse.Namespace, show: Callable[[str], None]) -> dict:
    config = load_config(arguments.config, arguments.set)
    from phase8.benchmark.blocks import compare_blocks, speed_ratio
    from phase8.benchmark.tables import block_lines, fact_lines, speed

    device = _device(arguments)
    show(f"{_shape_line(config)}\n{_settings_line(config)}")
    blocks = {}
    for block, measurement in compare_blocks(config, device=device, num_steps=arguments.iterations, profile_directory=arguments.profile):
        blocks[block] = measurement
        show(f"{block}, tok/s: {speed(measurement)}")
    for line in (*block_lines(blocks), *fact_lines(blocks.values())):
        show(line)
    if arguments.profile is not None:
        show(f"kernels of each block: {arguments.profile}")
    measured = {block: asdict(measurement) for block, measurement in blocks.items()}
    return {**_machine(device), "config": config_to_mapping(config), "blocks": measured, "ratio": speed_ratio(blocks)}


def _scaling(arguments: argparse.Namespace, show: Callable[[str], None]) -> dict:
    config = load_config(arguments.config, arguments.set)
    from phase8.benchmark.blocks import speed_ratio, sweep_lengths
    from phase8.benchmark.tables import LENGTHS_HEADER, fact_lines, length_line

    device, rows, measured = _device(arguments), [], []
    show(f"{_shape_line(config)}\n{_settings_line(config)}\n{LENGTHS_HEADER}")
    lengths = sweep_lengths(
        config, arguments.sequence_lengths, tokens_per_step=arguments.tokens_per_step, device=device, num_steps=arguments.iterations
    )
    for row in lengths:
        show(length_line(row))
        measured += row.blocks.values()
        rows.append({**asdict(row), "ratio": speed_ratio(row.blocks)})
    for line in fact_lines(measured):
        show(line)
    return {**_machine(device), "config": config_to_mapping(config), "lengths": rows}


def _parallel(arguments: argparse.Namespace, show: Callable[[str], None]) -> dict:
    config = load_config(arguments.config, arguments.set)
    from phase8.accelerator import count, is_accelerator
    from phase8.benchmark.layouts import parse_layout
    from phase8.benchmark.parallel import Host, measure_layouts, torchrun
    from phase8.benchmark.parallel_table import LAYOUTS_HEADER, device_lines, host_lines, layout_line
    from phase8.train.device import device_type

    layouts, rows = [parse_layout(name) for name in arguments.layouts], []
    on = device_type(arguments.device)
    num_devices = count(on) if is_accelerator(on) else None  # this process takes none of them, which would take memory of the first
    host = Host(torchrun(ROOT / "launch" / "benchmark_rank.py"), on, num_devices, arguments.timeout)
    show(f"{config.model.block}: {_model_line(config)}\n{_settings_line(config)}\n{LAYOUTS_HEADER}")
    with nullcontext(arguments.logs) if arguments.logs is not None else TemporaryDirectory() as logs:
        options = {"sequences_per_rank": arguments.sequences_per_rank, "num_steps": arguments.iterations, "host": host, "logs": Path(logs)}
        for row in measure_layouts(config, layouts, **options):
            show(layout_line(row))
            rows.append(row)
    for line in (*host_lines(rows), *device_lines(rows)):
        show(line)
    return {"config": config_to_mapping(config), "layouts": [asdict(row) for row in rows]}


def _shape_settings(arguments: argparse.Namespace) -> list[str]:
    """The shape of `speed` as overrides: heads of 64, and with a rank everything but embedding and head low rank, as in the research code."""
    num_heads = arguments.num_heads or max(arguments.d_model // 64, 1)
    return [
        f"model.d_model={arguments.d_model}",
        f"model.num_layers={arguments.n_layers}",
        f"model.num_heads={num_heads}",
        f"model.sequence_length={arguments.n_seq}",
        f"model.vocab_size={arguments.vocab_size}",
        f"model.low_rank_rank={arguments.low_rank_rank}",
        f"model.ffn={'low_rank_swiglu' if arguments.low_rank_rank else 'swiglu'}",
        f"train.global_batch_size={arguments.batch_size}",
    ]


def _require_flash_attn2(device) -> None:
    from phase8.accelerator import has_kernels
    from phase8.kernels.backends import installed_flash_attention

    if 2 not in installed_flash_attention():
        raise ConfigError("--use-flash-attn2 was given, but flash-attn 2 is not installed; install it, or leave the option out.")
    if not has_kernels(device.type):
        raise ConfigError("--use-flash-attn2 was given, but flash-attn needs a GPU; use a machine with one, or leave the option out.")


def _check_at_least_one(arguments: argparse.Namespace) -> None:
    """Refuses counts and sizes below one, each by the name of its option."""
    for name in AT_LEAST_ONE:
        given = vars(arguments).get(name)
        for value in given if isinstance(given, list) else [given]:
            if value is not None and value < 1:
                raise ConfigError(f"--{name.replace('_', '-')} is {value}, but at least 1 is needed.")


def _shape_line(config) -> str:
    from phase8.config.batch import batch_shape

    shape = batch_shape(config.train, config.parallel, data_parallel_size=1)
    return f"{_model_line(config)}, batch {shape.micro_batch_size} x {shape.num_microbatches}"


def _model_line(config) -> str:
    model = config.model
    return (
        f"d {model.d_model}, {model.num_layers} layers, {model.num_heads} heads of {model.head_width}, T {model.sequence_length}, "
        f"rank {model.low_rank_rank}, vocabulary {model.vocab_size}"
    )


def _settings_line(config) -> str:
    train = config.train
    compiled = train.compile.mode if train.compile.enabled else "off"
    return f"{config.precision.dtype}, torch.compile {compiled}, recompute {train.recompute}, kernels {train.kernels}"


def _device(arguments: argparse.Namespace):
    from phase8.train.device import select_device

    return select_device(arguments.device)


def _machine(device) -> dict[str, str]:
    import torch

    from phase8.train.device import device_name

    return {"device": device_name(device), "torch_version": str(torch.__version__)}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="quickstart|speed|model|scaling|parallel")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--set", nargs="+", action="extend", default=[], metavar="a.b=c", help="override config keys")
    add_device_option(common)
    common.add_argument("--json", action="store_true", help="print one JSON object; the table goes to stderr")

    def command(name: str, run: Callable, text: str, *, iterations: int) -> argparse.ArgumentParser:
        added = commands.add_parser(name, parents=[common], help=text, description=text)
        added.add_argument("--iterations", type=int, default=iterations, metavar="N", help=f"measured steps, after those of warm-up ({iterations})")
        added.set_defaults(run=run)
        return added

    command("quickstart", _quickstart, "training as configs/quickstart.yaml does it", iterations=30)
    _add_shape(command("speed", _speed, "what each technique adds on top of those before it, and all of them together", iterations=20))
    model = command("model", _model, "a config with both blocks, side by side", iterations=20)
    model.add_argument("--config", required=True, type=path_argument, metavar="FILE", help="YAML config; model.block is set to each block in turn")
    model.add_argument("--profile", type=path_argument, metavar="DIR", help="write each block's kernels and their times to DIR/<block>.txt")
    scaling = command("scaling", _scaling, "tok/s of both blocks against the length of the sequence", iterations=10)
    scaling.add_argument(
        "--config", type=path_argument, default=CONFIGS / "phase8_1b.yaml", metavar="FILE", help="YAML file, or a name in configs/ (phase8_1b)"
    )
    scaling.add_argument("--sequence-lengths", type=int, nargs="+", default=[4096, 16384, 65536, 131072], metavar="T", help="lengths to measure")
    scaling.add_argument(
        "--tokens-per-step",
        type=int,
        default=16384,
        metavar="N",
        help="the batch is N / T sequences, at least one (16384); where memory runs out, more is recomputed than train.recompute says",
    )
    _add_parallel(command("parallel", _parallel, "layouts of several ranks on the GPUs of this host", iterations=8))
    return parser


def _add_parallel(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", required=True, type=path_argument, metavar="FILE", help="YAML config; degrees and ZeRO are those of each layout")
    parser.add_argument(
        "--layouts",
        nargs="+",
        default=LAYOUTS,
        metavar="NAME",
        help="parts joined by -: one, tpN, ppN, cpN, dpN, epN; gpipe, 1f1b, interleaved, chunksN; zeroN, shardN, offload, nvme, deepspeed; microN "
        "(all of two GPUs)",
    )
    parser.add_argument("--sequences-per-rank", type=int, default=8, metavar="N", help="sequences of a step for each rank (8)")
    parser.add_argument("--timeout", type=float, default=240.0, metavar="SECONDS", help="for each layout, its start included (240)")
    parser.add_argument("--logs", type=path_argument, metavar="DIR", help="keep what the processes print and leave; a new directory")


def _add_shape(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--d-model", type=int, default=512, help="width (512)")
    parser.add_argument("--n-layers", type=int, default=8, help="blocks (8)")
    parser.add_argument("--n-seq", type=int, default=512, help="tokens of a sequence (512)")
    parser.add_argument("--batch-size", type=int, default=16, help="sequences of a step (16)")
    parser.add_argument("--low-rank-rank", type=int, default=16, help="rank of mixer and feed-forward; 0: dense (16)")
    parser.add_argument("--num-heads", type=int, help="heads (d-model / 64)")
    parser.add_argument("--vocab-size", type=int, default=50257, help="token ids (50257)")
    parser.add_argument(
        "--use-compile", action=argparse.BooleanOptionalAction, default=True, help="climb the rung of torch.compile too"
    )
    parser.add_argument(
        "--use-flash-attn2", action="store_true", help="also climb with the transformer of this shape, whose attention flash-attn 2 computes"
    )


if __name__ == "__main__":
    sys.exit(main())
