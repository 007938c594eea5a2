r"""Trains variants of the model on the same tokens in the same order and compares their held-out losses.

    python tools/ablation.py --config configs/ablation_30m.yaml --variants transformer+conv+norm phase8 --seeds 1 2 3 --jobs 2 \
        --output runs/ablation --set data.train=data/code_train_text_document data.validation=data/code_validation_text_document

Every variant and seed is an ordinary run of launch/pretrain.py. At its end tools/evaluate.py measures the loss by position on its held-out
data. Run the same command again after a crash or an interruption: finished runs are skipped, the rest continue from their checkpoints. More
variants and seeds may be added to the same output directory; the table shows all there are. Written there: table.md, a page with tables and
the charts curves.png and positions.png; results.json; runs/, logs/ and positions/ of the single runs; records/ and study.json, which alone
make a finished run count. What every run gets from its variant, its seed and --output, --set cannot name.

Variants are made for configs/ablation_30m.yaml, whose widths they set; the variant `config` is the config as it is, for seeds of your own model
and for variants of it (--define NAME config a.b=c).

    python tools/ablation.py --variants transformer+conv+norm phase8 --learning-rates 1e-3 2e-3 4e-3 --seeds 1 2 3 --output runs/ablation

--learning-rates first trains each variant with each rate and the first seed, and then its seeds with the rate of the lowest held-out loss,
which the page shows beside the others. A rate with which training diverges (exit code 6) has lost. Runs that try a rate are those of the
first seed, so the best is not repeated; with --learning-rate-steps N they take N steps, warmup and decay included, and are not. Rates that
earlier commands tried with that seed and as many steps count too. Later commands without --learning-rates keep what was found.

Exit codes: 0 all runs are finished; that of the first run that failed (1 if a signal killed it); 130 stopped before all were finished;
2 to 5 as for launch/pretrain.py.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import phase8.early_interrupt  # noqa: F401  # first: later imports take time
from phase8.config.arguments import add_device_option, path_argument
from phase8.config.load import load_config
from phase8.errors import ConfigError
from phase8.terminal import EXIT_INTERRUPTED, run_door
from phase8.train.outputs import require_own_output

if TYPE_CHECKING:
    import torch

    from phase8.ablation.planned_runs import PlannedRun
    from phase8.ablation.study import Study

ROOT = Path(__file__).resolve().parent.parent


def main() -> int:
    """Runs the command line and returns the exit code."""
    return run_door(_ablate, interrupted="interrupted; run the same command again to go on")


def _ablate() -> int:
    arguments = _parser().parse_args()
    settings, output = arguments.set, arguments.output
    config = load_config(arguments.config, settings)
    _check_numbers(arguments)
    require_own_output(output, inputs=[arguments.config])
    # Imported late: a mistake in the config is answered before torch is loaded.
    from phase8.ablation.learning_rates import check_search
    from phase8.ablation.planned_runs import plan_runs, plan_search
    from phase8.ablation.study import (
        check_shared_settings,
        check_sizes,
        choose_variants,
        count_variant_parameters,
        current_study,
        joined_study,
        overridden_settings,
        record_study,
    )
    from phase8.train.datasets import open_run_data
    from phase8.train.device import select_device

    device = select_device(arguments.device)
    variants = choose_variants(arguments.variants, arguments.define)
    check_shared_settings(config, settings, variants)
    for key, names in overridden_settings(settings, variants).items():
        _say(f"{key} of --set has no effect on {', '.join(names)}, which set it themselves; --define makes a variant with another value")
    rates, num_steps = arguments.learning_rates, arguments.learning_rate_steps
    check_search(rates, num_steps=num_steps, settings=settings, variants=variants)
    search = plan_search(arguments.config, settings, variants, rates, num_steps=num_steps, seed=arguments.seeds[0], output=output)
    plan_runs(arguments.config, settings, variants, arguments.seeds, output=output)  # refused before anything is trained
    data = open_run_data(config, on_progress=lambda stage, done, total: None if done else _say(f"{stage} (once) ..."))
    study = joined_study(current_study(config, data, variants), output)
    num_parameters = count_variant_parameters(arguments.config, settings, study.variants)
    if not arguments.any_size:
        check_sizes(num_parameters)
    record_study(study, output)
    for variant in variants:
        _say(f"{variant}: {num_parameters[variant]:,} parameters, {' '.join(study.variants[variant]) or 'as the config says'}")
    return _train(arguments, study, list(variants), search, num_parameters=num_parameters, device=device)


def _train(
    arguments: argparse.Namespace,
    study: Study,
    names: Sequence[str],
    search: list[PlannedRun],
    *,
    num_parameters: dict[str, int],
    device: torch.device,
) -> int:
    """Trains what is not finished, first the search for learning rates, and returns the exit code."""
    from phase8.ablation.learning_rates import best_rates, describe_choice, losses_by_rate
    from phase8.ablation.planned_runs import plan_runs
    from phase8.ablation.results import write_results
    from phase8.ablation.runs import Machine, RunProcesses, read_records, record_path
    from phase8.ablation.study import record_study
    from phase8.accelerator import has_kernels
    from phase8.train.device import device_name, visible_gpus

    output, gpus = arguments.output, visible_gpus() if has_kernels(device.type) else []
    machine = Machine(_command(arguments), _measurement(arguments), device=device_name(device), jobs=arguments.jobs, gpus=gpus)
    processes = RunProcesses(machine, output, num_parameters=num_parameters, on_message=_say)

    def train(runs: list[PlannedRun], what: str) -> list[str]:
        """Trains the runs that are not finished, and returns the names of those that still are not."""
        waiting = [run for run in runs if not record_path(run, output).exists()]
        _say(f"{len(runs)} {what}, {len(runs) - len(waiting)} of them finished earlier")
        processes.train(waiting, on_record=lambda: write_results(study, read_records(output), output))
        return [run.name for run in waiting if not record_path(run, output).exists()]

    missing = train(search, "runs of the search for learning rates") if search else []
    if search:
        losses = losses_by_rate(search, read_records(output))
        best = best_rates(losses)
        study = replace(study, learning_rates=study.learning_rates | best)
        record_study(study, output)
        for variant, rate in best.items():
            _say(describe_choice(variant, rate, losses[variant]))
        names = list(best)
    if not processes.is_stopping:
        variants = {name: study.variants[name] for name in names}
        runs = plan_runs(arguments.config, arguments.set, variants, arguments.seeds, output=output, learning_rates=study.learning_rates)
        missing += train(runs, "runs")
    if records := read_records(output):
        print(write_results(study, records, output), end="")
    if missing:
        _say(f"not finished: {', '.join(missing)}; run the same command again to go on")
    if processes.failures:
        return max(processes.failures[0], 1)
    return EXIT_INTERRUPTED if missing or processes.is_stopping else 0


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


def _measurement(arguments: argparse.Namespace) -> Callable[[PlannedRun, Path], list[str]]:
    door = [sys.executable, str(ROOT / "tools" / "evaluate.py"), "--held-out", "--device", arguments.device]

    def words(run: PlannedRun, result: Path) -> list[str]:
        num_sequences = run.config.train.evaluation_sequences
        return [*door, "--checkpoint", str(run.directory), "--sequences", str(num_sequences), "--output", str(result)]

    return words


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
    parser.add_argument(
        "--learning-rates",
        nargs="+",
        type=float,
        default=[],
        metavar="RATE",
        help="peak learning rates: each variant is trained with every one and the first seed, and its seeds then with the best",
    )
    parser.add_argument("--learning-rate-steps", type=int, metavar="N", help="steps of the runs that try a rate (default: those of all runs)")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="runs side by side on each GPU, or on the CPU (default: 1)")
    parser.add_argument("--output", required=True, type=path_argument, metavar="DIR", help="where everything is written")
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="a.b=c", help="override config keys of all runs")
    add_device_option(parser)
    parser.add_argument("--any-size", action="store_true", help="compare variants whose numbers of parameters differ by more than 1 %%")
    return parser


if __name__ == "__main__":
    sys.exit(main())
