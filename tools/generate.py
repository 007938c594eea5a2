"""Continues text with a trained model.

    python tools/generate.py --checkpoint runs/quickstart --prompt "def main"
    python tools/generate.py --checkpoint runs/quickstart --prompt "def main" --num-samples 4 --stop "###"
    python tools/generate.py --checkpoint runs/quickstart --batch-file prompts.txt --json > continuations.jsonl
    python tools/generate.py --checkpoint runs/quickstart --interactive

Decoding is recurrent: memory and time per token are constant at any length. Sample i of a prompt draws with --seed plus i, whatever is continued
beside it. With --json each line is an object with prompt, sample, seed, text, tokens (their number), reason (end_of_document, stop or max_tokens),
seconds and tokens_per_second. Blank lines of a --batch-file are left out ({"prompt": ""} is an empty prompt); with --json each object has line, too,
the number of the prompt's line in that file. Standard error gets the number of tokens and their speed. Exit codes as in launch/pretrain.py; 141
whoever read the text has gone.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING

import phase8.early_interrupt  # noqa: F401  # first: later imports take time
from phase8.config.arguments import add_device_option, path_argument
from phase8.data.utf8 import BYTE_ORDER_MARK, lone_surrogate
from phase8.errors import ConfigError
from phase8.imports import imports_that_stay
from phase8.terminal import output_is_the_product, run_door, warn

if TYPE_CHECKING:
    from phase8.generate.prompts import Prompt
    from phase8.generate.text import Continuation, TextWriter


def main() -> int:
    """Runs the command line and returns the exit code."""
    return run_door(_run, interrupted="")


def _run() -> int:
    arguments = _parser().parse_args()
    problems = [
        f"--{name.replace('_', '-')} is {vars(arguments)[name]}, but at least 1 is needed."
        for name in ("max_tokens", "num_samples", "batch_size")
        if vars(arguments)[name] < 1
    ]
    problems += ["--stop is empty, but a text of at least one character is needed."] if "" in arguments.stop else []
    if arguments.interactive and arguments.num_samples > 1:
        problems.append(f"--num-samples is {arguments.num_samples}, but --interactive writes one continuation; leave one of them out.")
    if problems:
        raise ConfigError(problems)
    with output_is_the_product():
        _generate(arguments)
    return 0


def _generate(arguments: argparse.Namespace) -> None:
    with imports_that_stay():
        from phase8.accelerator import is_accelerator
        from phase8.generate.memory import FEWER_BITS, memory_errors
        from phase8.generate.prompts import Prompt, read_prompts
        from phase8.generate.restore import choose_tokenizer, hold_in_compute_dtype, restore_model
        from phase8.generate.sampling import SamplingOptions
        from phase8.generate.text import TextWriter, about_length, prompt_tokens, text_begin
        from phase8.train.device import select_device

    options = SamplingOptions(arguments.temperature, arguments.top_k, arguments.top_p, arguments.seed)
    prompts = [Prompt(arguments.prompt)] if arguments.batch_file is None else read_prompts(arguments.batch_file)
    device = select_device(arguments.device)
    elsewhere = ("--device cpu",) if is_accelerator(device.type) else ()
    with memory_errors("the model was loaded", device, (FEWER_BITS, *elsewhere)):
        model, data, checkpoint = restore_model(arguments.checkpoint, device=device)
        hold_in_compute_dtype(model)
    vocab_size, eod_token = model.section.vocab_size, arguments.eod_token or data.eod_token
    tokenizer = choose_tokenizer(checkpoint, arguments.tokenizer, vocab_size=vocab_size, eod_token=eod_token, on_message=warn)
    begin = text_begin(tokenizer, data)
    batch_size = min(arguments.batch_size, len(prompts) * arguments.num_samples)
    limits = {"max_tokens": arguments.max_tokens, "stops": arguments.stop, "end_ids": data.end_ids or (), "batch_size": batch_size}
    fewer = (f"a --batch-size below {batch_size}",) if batch_size > 1 else ()
    one_or_more = f"{batch_size} sequences were" if batch_size > 1 else "a sequence was"
    with memory_errors(f"{one_or_more} continued", device, (*fewer, "shorter prompts", "a smaller --max-tokens", FEWER_BITS, *elsewhere)):
        output = _Output(arguments, TextWriter(model, tokenizer, options=options, **limits))
        for some in ([Prompt(text)] for text in _typed()) if arguments.interactive else [prompts]:
            tokens = [prompt_tokens(tokenizer, prompt.text, begin=begin) for prompt in some]
            if (sentence := about_length(model.section, tokens, max_tokens=arguments.max_tokens)) is not None:
                warn(sentence)
            output.continue_prompts(some, tokens)
    output.tell_speed()


class _Output:
    """Prints continuations in the order of their prompts, a single one while it is written.

    Args:
        arguments: Arguments of the command line.
        writer: What continues prompts.
    """

    def __init__(self, arguments: argparse.Namespace, writer: TextWriter):
        self._arguments, self._writer = arguments, writer
        self._num_tokens, self._seconds = 0, 0.0

    def continue_prompts(self, prompts: list[Prompt], tokens: list[list[int]]) -> None:
        """Continues prompts, given with their tokens."""
        arguments = self._arguments
        is_streamed = len(prompts) * arguments.num_samples == 1 and not arguments.json

        def end(number: int, continuation: Continuation) -> None:
            self._num_tokens += len(continuation.tokens)
            place, sample = divmod(number, arguments.num_samples)
            if arguments.json:
                self._print_json(prompts[place], sample, continuation)
            elif not is_streamed:
                print(f"[prompt {place + 1}, sample {sample + 1}]\n{prompts[place].text}{continuation.text}", flush=True)

        if is_streamed and not arguments.interactive:
            print(prompts[0].text, end="", flush=True)
        begin = time.perf_counter()
        show = partial(print, end="", flush=True) if is_streamed else (lambda piece: None)
        self._writer.write(tokens, num_samples=arguments.num_samples, on_text=lambda _, piece: show(piece), on_end=end)
        self._seconds += time.perf_counter() - begin
        if is_streamed:
            print(flush=True)

    def tell_speed(self) -> None:
        """Tells the number of tokens and their speed on standard error."""
        if self._num_tokens:
            count = "1 token" if self._num_tokens == 1 else f"{self._num_tokens:,} tokens"
            warn(f"{count} in {self._seconds:.2f} s, {self._num_tokens / self._seconds:,.1f} tok/s")

    def _print_json(self, prompt: Prompt, sample: int, continuation: Continuation) -> None:
        num_tokens, seconds = len(continuation.tokens), continuation.seconds
        facts = {
            "prompt": prompt.text,
            **({} if prompt.line is None else {"line": prompt.line}),
            "sample": sample,
            "seed": self._arguments.seed + sample,
            "text": continuation.text,
            "tokens": num_tokens,
            "reason": continuation.reason,
            "seconds": round(seconds, 4),
            "tokens_per_second": round(num_tokens / seconds, 2),
        }
        print(json.dumps(facts, ensure_ascii=False), flush=True)


def _typed() -> Iterator[str]:
    """Prompts that are typed, or come through a pipe, until the input ends."""
    stream, is_first = sys.stdin, True
    while stream is not None:
        if stream.isatty():
            print("> ", end="", flush=True, file=sys.stderr)
        line = stream.readline()
        if not line:
            return
        if is_first:
            line, is_first = line.removeprefix(BYTE_ORDER_MARK.decode()), False
        if lone_surrogate(line):
            warn("that line is not UTF-8 and is passed over")
        elif line.strip():
            yield line.rstrip("\n")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--checkpoint",
        required=True,
        type=path_argument,
        metavar="DIR",
        help="a checkpoint, a run (its newest one), consolidated weights, or Hugging Face's form",
    )
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--prompt", default="", help="text to continue")
    source.add_argument("--batch-file", type=path_argument, metavar="FILE", help="a prompt on each line, or JSON lines with the key prompt; -: stdin")
    source.add_argument("--interactive", action="store_true", help="continue each line that is typed")
    parser.add_argument("--max-tokens", type=int, default=200, metavar="N", help="tokens written at most for each continuation (200)")
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="text that ends a continuation and is not written; repeatable")
    parser.add_argument("--num-samples", type=int, default=1, metavar="N", help="continuations of each prompt (1)")
    parser.add_argument("--batch-size", type=int, default=32, metavar="B", help="continuations side by side at most (32)")
    parser.add_argument("--json", action="store_true", help="write a JSON object on each line")
    parser.add_argument("--temperature", type=float, default=0.8, help="0: always the likeliest token")
    parser.add_argument("--top-k", type=int, default=0, metavar="K", help="only the K likeliest tokens; 0: all")
    parser.add_argument("--top-p", type=float, default=0.95, metavar="P", help="only the likeliest tokens that together have probability P")
    parser.add_argument("--seed", type=int, default=0, help="of the first sample; each further one has the next")
    parser.add_argument("--tokenizer", type=path_argument, metavar="FILE", help="instead of the one in the checkpoint")
    parser.add_argument("--eod-token", metavar="NAME", help="piece between documents (default: data.eod_token, else the tokenizer's own)")
    add_device_option(parser)
    return parser


if __name__ == "__main__":
    sys.exit(main())
