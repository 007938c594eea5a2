r"""Trains variants of the model on the same tokens in the same order and compares their held-out losses.

    python tools/ablation.py --config configs/ablation_30m.yaml --variants transformer+conv+norm phase8 --seeds 1 2 3 --jobs 2 \
        --output runs/ablation --set data.train=data/code_train_text_document data.validation=data/code_validation_text_document

Every variant and seed is an ordinary run of launch/pretrain.py. Run the same command again after a crash or an interruption: finished
runs are skipped, the rest continue from their checkpoints. More variants and seeds may be added to the same output directory; the table
shows all there are. Written there: table.md, results.json, curves.png; runs/ and logs/ of the single runs; records/ and study.json, which
alone make a finished run count. What every run gets from its variant, its seed and --output, --set cannot name.

Exit codes: 0 all runs are finished; that of the first run that failed (1 if a signal killed it); 130 stopped before all were finished;
2 to 5 as for launch/pretrain.py.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from phase8.config.arguments import add_device_option, path_argument
from phase8.config.load import load_config
from phase8.errors import ConfigError
from phase8.terminal import EXIT_INTERRUPTED, run_door
from phase8.train.outputs import require_own_output

ROOT = Path(__file__).resolve().parent.parent


def main() -> int:
    """Runs the command line and returns the exit code."""
    return run_door(_ablate, interrupted="interrupted; run the same command again to go on")


def _ablate() -> int:
    arguments = _parser().parse_args()
    settings = arguments.set
    config = load_config(arguments.config, settings)
    _check_numbers(arguments)
    require_own_output(arguments.output, inputs=[arguments.config])
    # Imported late: a mistake in the config is answered before torch is loaded.
    from phase8.ablation.results import write_results
    from phase8.ablation.runs import Machine, RunProcesses, read_records, record_path
    from phase8.ablation.study import (
        check_shared_settings,
        check_sizes,
        choose_variants,
        count_variant_parameters,
        current_study,
        joined_study,
        plan_runs,
        record_study,
    )
    from phase8.accelerator import has_kernels
    from phase8.train.datasets import open_run_data
    from phase8.train.device import device_name, select_device, visible_gpus

    output, device = arguments.output, select_device(arguments.device)
    variants = choose_variants(arguments.variants, arguments.define)
    check_shared_settings(config, settings, variants)
    runs = plan_runs(arguments.config, settings, variants, arguments.seeds, output=output)
    data = open_run_data(config, on_progress=lambda stage, done, total: None if done else _say(f"{stage} (once) ..."))
    study = joined_study(current_study(config, data, variants), output)
    num_parameters = count_variant_parameters(arguments.config, settings, study.variants)
    if not arguments.any_size:
        check_sizes(num_parameters)
    record_study(study, output)
    for variant in variants:
        _say(f"{variant}: {num_parameters[variant]:,} parameters, {' '.join(study.variants[variant])}")
    waiting = [run for run in runs if not record_path(run, output).exists()]
    _say(f"{len(runs)} runs, {len(runs) - len(waiting)} of them finished earlier")

    gpus = visible_gpus() if has_kernels(device.type) else []
    machine = Machine(_command(arguments), device=device_name(device), jobs=arguments.jobs, gpus=gpus)
    processes = RunProcesses(machine, output, num_parameters=num_parameters, on_message=_say)
    processes.train(waiting, on_record=lambda: write_results(study, read_records(output), output))
    records = read_records(output)
    if records:
        print(write_results(study, records, output), end="")
    missing = [run.name for run in waiting if not record_path(run, output).exists()]
    if missing:
        _say(f"not finished: {', '.join(missing)}; run the same command again to go on")
    if processes.failures:
        return max(processes.failures[0], 1)
    return EXIT_INTERRUPTED if missing else 0


def _check_numbers(arguments: argparse.Namespace) -> None:
    if arguments.jobs < 1:
        raise ConfigError(f"--jobs is {arguments.jobs}, but at least 1 is needed.")
    if min(arguments.seeds) < 0:
        raise ConfigError(f"--seeds names {min(arguments.seeds)}, but whole numbers of at least 0 are needed.")
    repeated = {seed for seed in arguments.seeds if arguments.seeds.count(seed) > 1}
    if repeated:
        raise ConfigError(f"--seeds names {min(repeated)} more than once; name each once.")


def _command(arguments: argparse.Namespace) -> Callable[[Sequence[str]], list[str]]:
    launcher = [sys.executable, str(ROOT / "launch" / "pretrain.py"), "--config", str(arguments.config), "--device", arguments.device]
    return lambda settings: [*launcher, "--set", *settings]


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=path_argument, default=ROOT / "configs" / "ablation_30m.yaml", metavar="FILE", help="what all runs share")
    parser.add_argument("--variants", nargs="+", required=True, metavar="NAME", help="what to compare; an unknown name lists those there are")
    parser.add_argument(
        "--define",
        nargs="+",
        action="append",
        default=[],
        metavar=("NAME", "BASE"),
        help="NAME BASE a.b=c ...: a new variant, BASE with other keys of the model or the optimizer",
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[1], metavar="N", help="seeds of weights and data order (default: 1)")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="runs side by side on each GPU, or on the CPU (default: 1)")
    parser.add_argument("--output", required=True, type=path_argument, metavar="DIR", help="where everything is written")
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="a.b=c", help="override config keys of all runs")
    add_device_option(parser)
    parser.add_argument("--any-size", action="store_true", help="compare variants whose numbers of parameters differ by more than 1 %%")
    return parser


if __name__ == "__main__":
    sys.exit(main())
