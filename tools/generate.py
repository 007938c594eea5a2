"""Writes text with a trained model: `python tools/generate.py --checkpoint runs/quickstart --prompt "def main"`.

Decoding is recurrent: memory and time per token are constant at any length. Exit codes as in launch/pretrain.py; 141 whoever read the text
has gone.
"""

from __future__ import annotations

import argparse
import sys

from phase8.config.arguments import path_argument
from phase8.errors import ConfigError
from phase8.imports import imports_that_stay
from phase8.terminal import output_is_the_product, run_door


def main() -> int:
    """Runs the command line and returns the exit code."""
    return run_door(_run, interrupted="")


def _run() -> int:
    arguments = _parser().parse_args()
    with output_is_the_product():
        _generate(arguments)
    return 0


def _generate(arguments: argparse.Namespace) -> None:
    with imports_that_stay():
        from phase8.data.tokenizer import load_tokenizer
        from phase8.generate.restore import restore_model, restore_tokenizer
        from phase8.generate.sampling import SamplingOptions
        from phase8.generate.text import prompt_tokens, stream_text
        from phase8.train.device import select_device

    if arguments.max_tokens < 1:
        raise ConfigError(f"--max-tokens is {arguments.max_tokens}, but at least 1 is needed.")
    options = SamplingOptions(arguments.temperature, arguments.top_k, arguments.top_p, arguments.seed)
    model, data, checkpoint = restore_model(arguments.checkpoint, device=select_device(arguments.device))
    vocab_size, eod_token = model.section.vocab_size, arguments.eod_token or data.eod_token
    if arguments.tokenizer is None:
        tokenizer = restore_tokenizer(checkpoint, vocab_size=vocab_size, eod_token=eod_token)
    else:
        tokenizer = load_tokenizer(arguments.tokenizer, eod_token=eod_token)
        if tokenizer.vocab_size > vocab_size:
            raise ConfigError(
                f"--tokenizer {arguments.tokenizer} has {tokenizer.vocab_size} ids, but the model has {vocab_size}; "
                "give the tokenizer it was trained with."
            )
    prompt = prompt_tokens(tokenizer, arguments.prompt, after_document_end=not data.reset_at_document_boundaries)
    print(arguments.prompt, end="", flush=True)
    for piece in stream_text(model, tokenizer, prompt, max_tokens=arguments.max_tokens, options=options):
        print(piece, end="", flush=True)
    print()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--checkpoint",
        required=True,
        type=path_argument,
        metavar="DIR",
        help="a checkpoint, a run (its newest one), consolidated weights, or Hugging Face's form",
    )
    parser.add_argument("--prompt", default="", help="text to continue")
    parser.add_argument("--max-tokens", type=int, default=200, metavar="N", help="tokens written at most")
    parser.add_argument("--temperature", type=float, default=0.8, help="0: always the likeliest token")
    parser.add_argument("--top-k", type=int, default=0, metavar="K", help="only the K likeliest tokens; 0: all")
    parser.add_argument("--top-p", type=float, default=0.95, metavar="P", help="only the likeliest tokens that together have probability P")
    parser.add_argument("--seed", type=int, default=0, help="of the drawing")
    parser.add_argument("--tokenizer", type=path_argument, metavar="FILE", help="instead of the one in the checkpoint")
    parser.add_argument("--eod-token", metavar="NAME", help="piece between documents (default: data.eod_token, else the tokenizer's own)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    return parser


if __name__ == "__main__":
    sys.exit(main())
