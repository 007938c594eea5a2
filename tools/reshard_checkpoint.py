"""Rewrites a checkpoint for other ranks, merges its weights into one file, writes them for Hugging Face's transformers, or imports either form.

    python tools/reshard_checkpoint.py SRC DST --tensor-parallel-size 8 --pipeline-parallel-size 4 --shards 16
    python tools/reshard_checkpoint.py SRC DST --format consolidated --dtype bf16
    python tools/reshard_checkpoint.py SRC DST --format hf --dtype bf16
    python tools/reshard_checkpoint.py CONSOLIDATED DST
    python tools/reshard_checkpoint.py HUGGING_FACE DST
    python tools/reshard_checkpoint.py DEEPSPEED DST --trust-pickle --config FILE

Any checkpoint loads on any ranks as it is: this makes loading read less, each rank of the layout finding its parts in files of its own. What
several ranks hold is stored once, with the first of them. The schedule of the checkpoint's config says how many chunks a stage has.

consolidated: DST has model.safetensors (plain names, no optimizer), config.json and the tokenizer.
hf: the same for AutoModelForCausalLM of Hugging Face's transformers, with generation_config.json, tokenizer_config.json and a model card. A
transformer that is a Llama (no convolution, norm of queries and keys, low rank or experts, rotary positions in every layer) becomes one; every
other model brings its code, plain PyTorch in *_phase8.py, which trust_remote_code=True runs without phase8. bf16 leaves in fp32 what the model
computes in fp32.

SRC may be in either form, too: what --format consolidated wrote; or config.json with model_type llama or phase8, and model.safetensors, or
model.safetensors.index.json with its files. DST is then a checkpoint of step 0 (of a Llama: of the transformer baseline), weights in fp32, no
optimizer: to train from with --resume DST and --set data.allow_fingerprint_change=true. tools/generate.py and checkpoint.initialise_from need no
import. Whatever no model here computes is refused. Links in SRC are not followed, and code in it is not run.

A checkpoint that DeepSpeed itself wrote (ZeRO 1 to 3, or universal) is made of pickles, which can run any code when they are read:
--trust-pickle says that you know its origin, and --config is the config of the model. DST is of step 0, without optimizer, as of any import.

--upcycle-experts E makes a mixture of E experts, two for a token (--upcycle-top-k K), of a dense SRC: every expert begins as a copy of the dense
feed-forward, so that the mixture computes the same as long as none drops a token. With K 1 it computes almost the same: the weight of a single
expert is its score, so experts begin E times as large and routers near zero. DST is of step 0, without optimizer; start a run from it by
checkpoint.initialise_from, with model.ffn=moe, model.num_experts=E and model.top_k=K.

SRC is never touched. DST is there when everything was written, read back and compared with SRC. After an interruption (or a kill -9) the
same command goes on: files that were complete are checked and kept, in a hidden directory beside DST.

Exit codes: 0 done; 2 command line, or a layout the model cannot have; 4 damaged or missing SRC, one of a Llama that the baseline is not, or a
DST that cannot be used; 5 DST cannot be written; 130 interrupted.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from rich.progress import DownloadColumn, TimeRemainingColumn, TransferSpeedColumn

import phase8.early_interrupt  # noqa: F401  # first: later imports take time
from phase8.config.arguments import path_argument
from phase8.conversion.options import ConversionOptions
from phase8.imports import imports_that_stay
from phase8.observe.stage_progress import ProgressDisplay
from phase8.terminal import run_door


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit code."""
    return run_door(lambda: _run(arguments), interrupted="interrupted; run the same command again to go on")


def _run(arguments: Sequence[str] | None) -> int:
    options = ConversionOptions(**vars(_parser().parse_args(arguments)))
    options.check()
    # Imported late: --help and a wrong command line need no torch.
    with imports_that_stay():
        from phase8.conversion.convert import convert

    with ProgressDisplay(DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn()) as display:
        done = convert(options, on_progress=display.show)
    print(done)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=path_argument, metavar="SRC", help="a checkpoint, a run (its newest one), or weights in another form")
    parser.add_argument("destination", type=path_argument, metavar="DST", help="the directory to write; must not exist")
    parser.add_argument("--format", choices=("phase8", "consolidated", "hf"), default="phase8", help="of DST (default: %(default)s)")
    parser.add_argument("--dtype", choices=("bf16", "fp32"), help="convert the weights; not with --format phase8")
    parser.add_argument("--trust-pickle", action="store_true", help="read a checkpoint that DeepSpeed wrote, whatever code it contains")
    parser.add_argument("--config", type=path_argument, metavar="FILE", help="config of the model of a checkpoint that DeepSpeed wrote")
    layout = parser.add_argument_group("the ranks to write for (each 1 by default)")
    layout.add_argument("--tensor-parallel-size", type=int, metavar="T", help="ranks that divide each layer")
    layout.add_argument("--pipeline-parallel-size", type=int, metavar="P", help="stages")
    layout.add_argument("--shards", type=int, metavar="N", help="data-parallel ranks that divide the model among them (zero.stage 1 to 3)")
    layout.add_argument("--expert-parallel-size", type=int, metavar="X", help="of the shards, those that hold different experts")
    parser.add_argument(
        "--upcycle-experts", type=int, metavar="E", help="DST is a mixture of E experts, each of which begins as SRC's dense feed-forward"
    )
    parser.add_argument("--upcycle-top-k", type=int, metavar="K", help="experts of it that compute a token (default: 2)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
