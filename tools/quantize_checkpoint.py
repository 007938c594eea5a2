"""Writes the weights of a trained model in eight or four bits: `python tools/quantize_checkpoint.py runs/quickstart quickstart-int8`.

DST is a directory that tools/generate.py, tools/evaluate.py and tools/recall.py read in the place of a checkpoint; it has no optimizer and is
not trained on. Dense and low-rank layers of blocks and experts have whole numbers of eight bits with a scale for each output, or of four bits
with a scale for each 32 inputs of an output; other matrices are bf16. Exit codes as in launch/pretrain.py.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from rich.progress import DownloadColumn, TimeRemainingColumn, TransferSpeedColumn

import phase8.early_interrupt  # noqa: F401  # first: later imports take time
from phase8.config.arguments import path_argument
from phase8.errors import ConfigError
from phase8.imports import imports_that_stay
from phase8.observe.stage_progress import ProgressDisplay
from phase8.terminal import run_door


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit code."""
    return run_door(lambda: _run(arguments))


def _run(arguments: Sequence[str] | None) -> int:
    print(_quantize(_parser().parse_args(arguments)))
    return 0


def _quantize(options: argparse.Namespace) -> str:
    if options.dynamic and options.bits == 4:
        raise ConfigError("--dynamic is set and --bits is 4, but activations are rounded beside weights of eight bits alone; leave one of both out.")
    with imports_that_stay():
        import torch

        from phase8.checkpoint.model_source import open_model
        from phase8.checkpoint.quantization import as_record, require_as_trained
        from phase8.checkpoint.reshard.quantize import QuantizedWeights
        from phase8.checkpoint.reshard.reshard import ConsolidatedForm, consolidate
        from phase8.checkpoint.run_metadata import run_metadata
        from phase8.checkpoint.state import require_fit
        from phase8.config.load import config_to_mapping
        from phase8.model.model import build_model
        from phase8.model.quantized_layers import hold_quantized
        from phase8.precision.int4 import Int4
        from phase8.precision.int8 import Int8
        from phase8.precision.weight_format import IN_WORDS

    source = open_model(options.source)
    require_as_trained(source)
    config = run_metadata(source).config
    model = build_model(config.model, dtype=torch.float32, device=torch.device("meta"))
    require_fit(source, model, widen=True)
    weight_format = Int8(is_dynamic=options.dynamic) if options.bits == 8 else Int4()
    names = hold_quantized(model, weight_format)
    form = ConsolidatedForm(config_to_mapping(config) | {"quantization": as_record(weight_format)})
    with ProgressDisplay(DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn()) as display:
        weights = QuantizedWeights(source, names, weight_format)
        path = consolidate(weights, options.destination, form=form, dtype=None, on_progress=display.show)
    before = sum(entry.size_bytes for name, entry in source.manifest.tensors.items() if name.startswith("model."))
    after = path.stat().st_size
    made = f"{len(names)} weights of {IN_WORDS[weight_format.bits]} bits"
    return f"{path}: {after:,} bytes instead of {before:,} ({after / before:.0%}), {made}, the weights of {source.path}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=path_argument, metavar="SRC", help="a checkpoint, a run (its newest one), or weights in another form")
    parser.add_argument("destination", type=path_argument, metavar="DST", help="the directory to write; must not exist")
    parser.add_argument("--bits", type=int, choices=(8, 4), default=8, help="bits of a weight (default: 8)")
    dynamic = "with eight bits: round activations too, with a scale for each token: faster on a CPU"
    parser.add_argument("--dynamic", action="store_true", help=dynamic)
    return parser


if __name__ == "__main__":
    sys.exit(main())
