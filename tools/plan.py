"""Plans a run before it is started.

  schedule   a pipeline schedule as a timeline: when each stage computes and waits, the bubble, the activations it holds
  check      a config on any number of GPUs: builds the first rank of each pipeline stage without memory, and says what it holds
  suggest    a config on any number of GPUs of a kind: the layouts that fit, the fastest by prediction first

    python tools/plan.py schedule --stages 4 --microbatches 16 --schedule interleaved --chunks 2 --output timeline.png
    python tools/plan.py check --config configs/phase8_7b_3d.yaml --world-size 1024
    python tools/plan.py suggest --config configs/phase8_7b_3d.yaml --world-size 32 --gpu h100

The costs of a schedule are those of one microbatch in a whole stage, in any unit; with chunks each has its share. In the text -12 is the
forward and =12 the backward of microbatch 12, a letter behind it names the chunk, blank is idle.

A check builds what the run would build, on a process group that only pretends to be there, and compares it with the plan; the parameters
are those that a rank keeps between steps, the memory is the planned peak of its GPU: this machine's, or an H100. Settings that are `auto` are those
that a run would choose by plan, explicit ones are obeyed; a stage that needs more than the GPU has is named.

A suggestion keeps model, batch and precision, compiles the blocks, and chooses layout, microbatch, recomputation and CUDA graph. Layouts whose
data-parallel ranks cannot divide the batch are left out, which is said with the nearest batch; where all would be, it has that batch. Where nothing
fits, it also puts optimizer, parameters, sums of gradients and, of long sequences, inputs of layers into host memory (the column host, for each
GPU), but for keys that the config sets. How the predicted speed compares with measured ones is in docs/performance.md. Of --memory and
train.device_memory_gib the smaller counts.

With --json one JSON object is printed and the text goes to stderr. Exit codes: 0 done; 1 a rank holds something else than planned; 2 a
schedule that does not exist, numbers that do not suit it, a config that cannot run, or one of which no layout fits; 5 the picture or the
output cannot be written; 9 a check of settings that need more memory than the GPU has; 141 whoever read the output has gone.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import phase8.early_interrupt  # noqa: F401  # first: later imports take time
from phase8.config.arguments import path_argument, require_world_size
from phase8.durable import replace_file
from phase8.errors import ConfigError, OutOfMemoryError
from phase8.formatting import format_bytes, format_ratio, format_seconds
from phase8.observe.schedule_text import Box, timeline_text
from phase8.pipeline_parallel.lowering import lower
from phase8.pipeline_parallel.schedules import SCHEDULES, Schedule, bubble_ratio, build_schedule, peak_activations
from phase8.pipeline_parallel.simulate import Simulation, simulate, uniform_costs
from phase8.terminal import output_is_the_product, run_door
from phase8.train.outputs import require_own_output

if TYPE_CHECKING:
    from phase8.observe.devices import Gpu
    from phase8.plan.rank_memory import StageMemory
    from phase8.plan.suggest import Suggestion


def main() -> int:
    """Runs the command line and returns the exit code."""
    return run_door(_run)


def _run() -> int:
    arguments = _parser().parse_args()
    with output_is_the_product():
        result = arguments.run(arguments, partial(print, file=sys.stderr if arguments.json else sys.stdout, flush=True))
        if arguments.json:
            print(json.dumps(result))
    if result.get("too_large") is not None:
        raise OutOfMemoryError(result["too_large"])
    return 0


def _schedule(arguments: argparse.Namespace, show: Callable[[str], None]) -> dict[str, Any]:
    _check_schedule_options(arguments)
    sizes = {"num_stages": arguments.stages, "num_microbatches": arguments.microbatches, "num_chunks": arguments.chunks}
    costs = {"forward": arguments.forward_cost, "backward": arguments.backward_cost, "communication": arguments.communication_cost}
    schedule = build_schedule(arguments.schedule, **sizes)
    programs = lower(schedule, receives_ahead=arguments.receives_ahead)
    simulation = simulate(schedule, programs, uniform_costs(num_stages=arguments.stages, num_chunks=arguments.chunks, **costs))
    boxes = _boxes(simulation)
    formula = bubble_ratio(arguments.schedule, **sizes)
    peaks = [peak_activations(arguments.schedule, stage, **sizes) for stage in range(arguments.stages)]

    title = f"{arguments.schedule}, {_size_line(schedule)}"
    bubble = f"bubble {format_ratio(simulation.bubble_ratio)} (by the formula {format_ratio(formula)})"
    numbers = f"{', '.join(f'{name} {cost:g}' for name, cost in costs.items())}; makespan {simulation.makespan:g}, {bubble}"
    show(f"{title}\n{numbers}\n\n{timeline_text(boxes, width=shutil.get_terminal_size((160, 24)).columns)}\n")
    for line in _stage_lines(simulation, peaks, arguments.chunks):
        show(line)
    if arguments.output is not None:
        # Imported late: the text needs no matplotlib.
        from phase8.observe.schedule_chart import schedule_png

        peaks_found = enumerate(simulation.peak_activations)
        notes = [f"idle {format_ratio(simulation.idle_ratio(stage))}\n{_count(peak, 'activation')}" for stage, peak in peaks_found]
        replace_file(arguments.output, schedule_png(boxes, title=title, subtitle=numbers, notes=notes))
        show(f"\npicture: {arguments.output}")
    return {
        "schedule": arguments.schedule,
        **sizes,
        "costs": costs,
        "makespan": simulation.makespan,
        "bubble_ratio": simulation.bubble_ratio,
        "bubble_ratio_by_formula": formula,
        "peak_activations": list(simulation.peak_activations),
        "peak_activations_by_formula": peaks,
        "timeline": [box._asdict() for box in boxes],
    }


def _check(arguments: argparse.Namespace, show: Callable[[str], None]) -> dict[str, Any]:
    require_world_size(arguments.world_size)
    # Imported late: schedules need no torch.
    from phase8.config.load import load_config
    from phase8.plan.cost_facts import layers_in_words
    from phase8.train.plan_check import check_plan

    config = load_config(arguments.config, arguments.set)
    checked = check_plan(config, world_size=arguments.world_size)
    settled, stages = checked.settled, checked.stages
    settings = "" if settled.chosen is None else f"settings   {settled.chosen}\n"
    show(f"{config.run.name}, world size {arguments.world_size}: the first rank of each pipeline stage, as built and as planned\n{settings}")
    head = ("stage", "layers", "parameters", *(name.removesuffix("_bytes") for name in _memory(stages[0])))
    rows = [
        (str(each.stage), layers_in_words(each.layers), f"{each.num_parameters:,}", *map(format_bytes, _memory(each).values())) for each in stages
    ]
    for line in _table([head, *rows]):
        show(line)
    return {
        "run": config.run.name,
        "world_size": arguments.world_size,
        "settings": settled.chosen,
        "too_large": checked.too_large,
        "stages": [
            {
                "stage": each.stage,
                "rank": each.stage * arguments.world_size // len(stages),
                "layers": [[layers.start, layers.stop] for layers in each.layers],
                "parameters": each.num_parameters,
                **_memory(each),
            }
            for each in stages
        ],
    }


def _suggest(arguments: argparse.Namespace, show: Callable[[str], None]) -> dict[str, Any]:
    require_world_size(arguments.world_size)
    # Imported late: schedules need no torch.
    from phase8.config.load import load_config
    from phase8.plan.suggest import layouts_left_out, price_of_offloading, suggest

    gpu = _gpu(arguments.gpu)
    whole_gib = gpu.memory_gib if arguments.memory is None else arguments.memory
    if not 0 < whole_gib < float("inf"):
        raise ConfigError(f"--memory is {whole_gib:g}, but it must be above 0, in GiB.")
    config = load_config(arguments.config, arguments.set)
    memory_gib = min(whole_gib, config.train.device_memory_gib or whole_gib)
    found = suggest(config, world_size=arguments.world_size, gpu=gpu, memory_bytes=int(whole_gib * 2**30))
    show(f"{config.run.name} on {_count(arguments.world_size, 'GPU')} ({arguments.gpu}, {memory_gib:g} GiB): layouts that fit, by predicted speed\n")
    has_host = any(each.host_bytes for each in found)
    head = "layout", "micro batch", "recompute", "CUDA graph", "tok/s", "MFU", "planned", *(["host"] if has_host else [])
    for line in _table([head, *(_suggestion_row(each, has_host=has_host) for each in found)], left=1):
        show(line)
    best = found[0]
    left_out, price = layouts_left_out(best, config, gpu), price_of_offloading(best, config, gpu)
    for sentence in filter(None, (left_out, price)):
        show(f"\n{sentence}")
    settings = " ".join(f"{name}={value if isinstance(value, str) else json.dumps(value)}" for name, value in best.changes(config).items())
    seconds = best.prediction.seconds * config.train.num_steps
    show(f"\nthe first: {f'--set {settings}' if settings else 'the config as it is'}")
    show(f"its {config.train.num_steps:,} steps take {format_seconds(seconds)}, evaluations and saves left out")
    return {
        "run": config.run.name,
        "world_size": arguments.world_size,
        "gpu": arguments.gpu,
        "memory_gib": memory_gib,
        "left_out": left_out,
        "price_of_offloading": price,
        "suggestions": [
            {
                "layout": each.layout,
                "set": each.changes(config),
                "step_seconds": each.prediction.seconds,
                "tokens_per_second": each.prediction.tokens_per_second,
                "mfu": each.prediction.mfu,
                "planned_bytes": each.planned_bytes,
                "host_bytes": each.host_bytes,
            }
            for each in found
        ],
    }


def _suggestion_row(each: Suggestion, *, has_host: bool) -> tuple[str, ...]:
    train = each.config.train
    settings = str(train.micro_batch_size), train.recomputation, "yes" if train.cuda_graphs else "no"
    speed = f"{each.prediction.tokens_per_second:,.0f}", format_ratio(each.prediction.mfu)
    return each.layout, *settings, *speed, format_bytes(each.planned_bytes), *([format_bytes(each.host_bytes)] if has_host else [])


def _gpu(name: str) -> Gpu:
    from phase8.observe.devices import find_gpu

    gpu = find_gpu(name)
    if gpu is None:
        raise ConfigError(
            f"--gpu is {name!r}, which is no GPU whose speed is known; give h100, h200, b200, a100, 'rtx 4090' or another name of "
            "phase8/observe/devices.py."
        )
    return gpu


def _memory(stage: StageMemory) -> dict[str, int]:
    """Memory by kind on the device, in all, and on the host, in bytes."""
    plan = stage.memory
    return {
        "weights_bytes": plan.weights_bytes,
        "gradients_bytes": plan.gradients_bytes,
        "optimizer_bytes": plan.optimizer_bytes,
        "activations_bytes": plan.activations_bytes,
        "libraries_bytes": plan.libraries_bytes,
        "total_bytes": plan.total_bytes,
        "host_bytes": plan.host_bytes,
    }


def _table(rows: Sequence[Sequence[str]], *, left: int = 0) -> list[str]:
    """A table of text with columns of minimal width; the first `left` columns are aligned to the left, the rest to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    align = [str.ljust if number < left else str.rjust for number in range(len(widths))]
    return ["   ".join(place(cell, width) for place, cell, width in zip(align, row, widths, strict=True)) for row in rows]


def _boxes(simulation: Simulation) -> list[Box]:
    return [
        Box(stage, interval.start, interval.end, interval.action.kind.value, interval.action.microbatch, interval.action.chunk)
        for stage, timeline in enumerate(simulation.timelines)
        for interval in timeline
    ]


def _size_line(schedule: Schedule) -> str:
    chunks = f" of {schedule.num_chunks} chunks" if schedule.num_chunks > 1 else ""
    return f"{_count(schedule.num_stages, 'stage')}{chunks}, {_count(schedule.num_microbatches, 'microbatch', 'microbatches')}"


def _count(number: int, one: str, many: str | None = None) -> str:
    return f"{number} {one if number == 1 else many or one + 's'}"


def _stage_lines(simulation: Simulation, peaks: Sequence[int], num_chunks: int) -> list[str]:
    """Lines with idle time and held activations of each stage."""
    unit = "microbatches" if num_chunks == 1 else f"microbatches of a chunk, 1/{num_chunks} of the stage's layers"
    lines = [f"stage   idle     peak activations   by the formula   (in {unit})"]
    for stage, (peak, formula) in enumerate(zip(simulation.peak_activations, peaks, strict=True)):
        lines.append(f"{stage:>5}   {format_ratio(simulation.idle_ratio(stage)):>6}   {peak:>16}   {formula:>14}")
    return lines


def _check_schedule_options(arguments: argparse.Namespace) -> None:
    """Refuses invalid counts and costs, each by the name of its option."""
    for name in ("stages", "microbatches", "chunks"):
        if vars(arguments)[name] < 1:
            raise ConfigError(f"--{name} is {vars(arguments)[name]}, but at least 1 is needed.")
    if arguments.receives_ahead < 0:
        raise ConfigError(f"--receives-ahead is {arguments.receives_ahead}, but it must be 0 or more.")
    if arguments.output is not None and arguments.output.suffix.lower() != ".png":
        raise ConfigError(f"--output is {arguments.output}, but the picture is a PNG; give it a name that ends in .png.")
    require_own_output(arguments.output)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="schedule|check|suggest")
    _add_schedule(commands)
    _add_check(commands)
    _add_suggest(commands)
    return parser


def _add_check(commands: Any) -> None:
    text = "a config on any number of GPUs: what the first rank of each pipeline stage holds"
    check = commands.add_parser("check", help=text, description=text)
    check.set_defaults(run=_check)
    _add_config_options(check)


def _add_suggest(commands: Any) -> None:
    text = "the layouts of a config that fit on GPUs of a kind, the fastest by prediction first"
    command = commands.add_parser("suggest", help=text, description=text)
    command.set_defaults(run=_suggest)
    _add_config_options(command)
    command.add_argument("--gpu", default="h100", metavar="NAME", help="kind of the GPUs: h100, h200, a100, 'rtx 4090' ... (h100)")
    command.add_argument("--memory", type=float, metavar="GiB", help="memory of each (that of the kind); train.device_memory_gib limits it")


def _add_config_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--config", required=True, type=path_argument, metavar="FILE", help="YAML file, or a name in configs/")
    command.add_argument("--set", nargs="+", action="extend", default=[], metavar="a.b=c", help="override config keys")
    command.add_argument("--world-size", type=int, default=1, metavar="N", help="processes of the run, one per GPU (1)")
    command.add_argument("--json", action="store_true", help="print one JSON object; the text goes to stderr")


def _add_schedule(commands: Any) -> None:
    text = "a pipeline schedule as a timeline, with its bubble and its activations"
    schedule = commands.add_parser("schedule", help=text, description=text)
    schedule.set_defaults(run=_schedule)
    schedule.add_argument("--schedule", default="1f1b", metavar="NAME", help=f"{', '.join(SCHEDULES)} (1f1b)")
    schedule.add_argument("--stages", type=int, required=True, metavar="P", help="parallel.pipeline_parallel_size")
    schedule.add_argument("--microbatches", type=int, required=True, metavar="M", help="parallel.num_microbatches")
    schedule.add_argument("--chunks", type=int, default=1, metavar="V", help="parallel.pipeline_chunks, of each stage (1)")
    schedule.add_argument("--forward-cost", type=float, default=1.0, metavar="COST", help="of one microbatch in a whole stage (1)")
    schedule.add_argument("--backward-cost", type=float, default=2.0, metavar="COST", help="likewise (2)")
    schedule.add_argument("--communication-cost", type=float, default=0.0, metavar="COST", help="from the start of a transfer to its arrival (0)")
    schedule.add_argument("--receives-ahead", type=int, default=0, metavar="N", help="post a receive N actions before it is waited for (0)")
    schedule.add_argument("--output", type=path_argument, metavar="FILE.png", help="draw the timeline as a picture too")
    schedule.add_argument("--json", action="store_true", help="print one JSON object; the text goes to stderr")


if __name__ == "__main__":
    sys.exit(main())
