"""Times decoding: the prompt, the first token, and tokens per second at several lengths and batch sizes, on random weights.

    python tools/bench/decode.py
    python tools/bench/decode.py --config configs/phase8_1b.yaml --batch 1 64 --prompt 128 8192 131072 --temperature 0
    python tools/bench/decode.py --batch 1 64 --prompt 128 --temperature 0 --profile
    python tools/bench/decode.py --config configs/quickstart.yaml --device cpu --prompt 128 8192 --peer

A row is one loop of its own. `first` is the time from the built model to the first token after the prompt, `ready` that of the next four tokens, in
which a GPU records its step; both contain what is compiled in this process for the first time. tok/s is that of all sequences together: the median of
several runs of tokens, one after the other. --profile shows the kernels of a step, the longest first. --peer times LlamaForCausalLM.generate of
transformers with the same widths beside it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from measure import ROOT, BenchmarkError

from phase8.config.arguments import path_argument
from phase8.config.auto import without_auto
from phase8.config.load import load_config
from phase8.config.schema import RunConfig
from phase8.errors import ConfigError
from phase8.generate.decode import DecodingLoop
from phase8.generate.sampling import SamplingOptions
from phase8.kernels.backends import select_kernels
from phase8.model.model import LanguageModel, build_model
from phase8.model.parameters import initialise
from phase8.observe.step_profile import profile_steps
from phase8.precision.policy import compute_dtype
from phase8.terminal import output_is_the_product, run_door

# What was measured until a loop was ready, and what draws the tokens of a timed run, so many.
Prepared = tuple[dict[str, Any], Callable[[int], None]]
AT_ONCE = 8  # tokens that the host launches before it waits for earlier ones
ROUNDS = 5
PROFILED_STEPS, PROFILE_ROWS = 32, 30


def main() -> int:
    """Runs the command line and returns the exit code."""
    return run_door(_run)


def _run() -> int:
    arguments = _parser().parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise BenchmarkError("decoding is timed on a GPU, and torch finds none; with --device cpu it is timed here.")
    if arguments.tokens % AT_ONCE or arguments.tokens < AT_ONCE:
        raise ConfigError(f"--tokens is {arguments.tokens}, but a multiple of {AT_ONCE} is needed.")
    device = torch.device(arguments.device)
    config = without_auto(load_config(arguments.config, arguments.set))
    with output_is_the_product():
        select_kernels("auto", device)
        if arguments.no_overlap:
            _end_overlap()
        model = _model(config, device)
        rows = _rows(arguments, model)
        num_parameters = sum(parameter.numel() for parameter in model.parameters())
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
        facts = {"config": str(arguments.config), "parameters": num_parameters, "device": name, "torch": torch.__version__}
        print("  ".join(f"{key} {value}" for key, value in facts.items()), file=sys.stderr)
        print(_HEADER, file=sys.stderr, flush=True)
        for row in rows:
            print(_line(row), file=sys.stderr, flush=True)
            print(json.dumps({**facts, **row}), flush=True)
    return 0


def _end_overlap() -> None:
    from phase8.kernels.gpu import overlap

    overlap.IS_WANTED = False


def _rows(arguments: argparse.Namespace, model: LanguageModel) -> Iterator[dict[str, Any]]:
    for batch in arguments.batch:
        for length in arguments.prompt:
            prepared = {"phase8": _ours(arguments, model, batch, length)}
            if arguments.peer:
                prepared["llama"] = _llama(arguments, model, batch, length)
            rates: dict[str, list[float]] = {run: [] for run in prepared}
            for _ in range(ROUNDS):  # in turns, so that what else the machine does meets both
                for run, (_, draw) in prepared.items():
                    begin = arguments.clock()
                    draw(arguments.tokens)
                    rates[run].append(batch * arguments.tokens / (arguments.clock() - begin))
            for run, (figures, _) in prepared.items():
                speed = {"tokens_per_second": statistics.median(rates[run]), "least": min(rates[run]), "most": max(rates[run])}
                yield {"run": run, "batch": batch, "prompt": length, **figures, **speed}
            if arguments.profile:
                _show_profile(prepared["phase8"][1], torch.device(arguments.device))


def _show_profile(draw: Callable[[int], None], device: torch.device) -> None:
    rows = profile_steps(lambda: draw(PROFILED_STEPS), device=device, num_steps=PROFILED_STEPS).kernels
    print(f"{'us a step':>10s} {'calls':>7s} {'us each':>8s}", file=sys.stderr)
    for row in rows[:PROFILE_ROWS]:
        microseconds = 1e6 * row.seconds_per_step
        print(f"{microseconds:10.1f} {row.calls_per_step:7.1f} {microseconds / row.calls_per_step:8.2f}  {row.name[:100]}", file=sys.stderr)
    total, calls = (sum(values) for values in zip(*((row.seconds_per_step, row.calls_per_step) for row in rows), strict=True))
    print(f"{1e6 * total:10.1f} {calls:7.1f}           all kernels; those that overlap count twice", file=sys.stderr, flush=True)


def _model(config: RunConfig, device: torch.device) -> LanguageModel:
    model = build_model(config.model, dtype=compute_dtype(config.precision), device=device)
    initialise(model, seed=0)
    return model.requires_grad_(False)


def _ours(arguments: argparse.Namespace, model: LanguageModel, batch: int, length: int) -> Prepared:
    options, vocab_size = SamplingOptions(arguments.temperature, arguments.top_k, arguments.top_p), model.section.vocab_size
    prompts = torch.randint(vocab_size, (batch, length), generator=torch.Generator().manual_seed(0))
    begin = arguments.clock()
    at_once = AT_ONCE if arguments.device == "cuda" else 1
    loop = DecodingLoop(model, batch_size=batch, options=options, num_ids=vocab_size, most_at_once=at_once)
    loop.admit(range(batch), prompts, range(batch)).wait()
    first = arguments.clock()
    for _ in range(4):
        loop.advance(1).wait()
    ready = arguments.clock()

    def tokens(num_tokens: int) -> None:
        waiting = loop.advance(at_once)
        for _ in range(num_tokens // at_once - 1):
            following = loop.advance(at_once)
            waiting.wait()
            waiting = following
        waiting.wait()

    return {"first": first - begin, "ready": ready - first}, tokens


def _llama(arguments: argparse.Namespace, model: LanguageModel, batch: int, length: int) -> Prepared:
    from transformers import LlamaConfig, LlamaForCausalLM

    section = model.section
    config = LlamaConfig(
        vocab_size=section.vocab_size,
        hidden_size=section.d_model,
        intermediate_size=section.feed_forward_width,
        num_hidden_layers=section.num_layers,
        num_attention_heads=section.num_heads,
        num_key_value_heads=section.key_value_heads,
        tie_word_embeddings=section.tie_embeddings,
        max_position_embeddings=length + (ROUNDS + 1) * arguments.tokens + 8,
        eos_token_id=None,
        bos_token_id=None,
        pad_token_id=None,
    )
    torch.manual_seed(0)
    peer = LlamaForCausalLM(config).to(device=arguments.device, dtype=model.dtype).eval()
    prompts = torch.randint(section.vocab_size, (batch, length), generator=torch.Generator().manual_seed(0)).to(arguments.device)
    sampled = {"do_sample": True, "temperature": arguments.temperature, "top_k": arguments.top_k, "top_p": arguments.top_p}
    options = {"do_sample": False} if arguments.temperature == 0 else sampled

    found: Any = None

    def generate(num_tokens: int) -> None:
        nonlocal found
        cache = {} if found is None else {"past_key_values": found.past_key_values}  # older versions do not know the name `cache`
        count = {"max_new_tokens": num_tokens, "min_new_tokens": num_tokens, "return_dict_in_generate": True}
        with torch.inference_mode():
            found = peer.generate(prompts if found is None else found.sequences, **cache, **count, **options)
        if arguments.device == "cuda":
            torch.cuda.synchronize()

    begin = arguments.clock()
    generate(1)
    first = arguments.clock()
    generate(4)
    parameters = sum(parameter.numel() for parameter in peer.parameters())
    return {"first": first - begin, "ready": arguments.clock() - first, "parameters": parameters}, generate


_HEADER = f"{'run':10s} {'batch':>5s} {'prompt':>7s} {'first s':>9s} {'ready s':>9s} {'tok/s':>9s} {'range':>19s}"


def _line(row: dict[str, Any]) -> str:
    span = f"{row['least']:,.0f}-{row['most']:,.0f}"
    return (
        f"{row['run']:10s} {row['batch']:5d} {row['prompt']:7d} {row['first']:9.3f} {row['ready']:9.3f} {row['tokens_per_second']:9,.0f} {span:>19s}"
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    config = ROOT / "configs" / "phase8_1b.yaml"
    parser.add_argument("--config", type=path_argument, default=config, metavar="FILE", help="model (configs/phase8_1b.yaml)")
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="a.b=c", help="override config keys")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--batch", type=int, nargs="+", default=[1], metavar="B", help="sequences side by side (1)")
    parser.add_argument("--prompt", type=int, nargs="+", default=[128, 8192], metavar="T", help="tokens of a prompt (128 8192)")
    parser.add_argument("--tokens", type=int, default=256, metavar="N", help="tokens of a timed run (256)")
    parser.add_argument(
        "--cpu-time",
        dest="clock",
        action="store_const",
        const=time.process_time,
        default=time.perf_counter,
        help="count the time that cores compute for this process, where other work shares them; one thread only",
    )
    parser.add_argument("--temperature", type=float, default=0.8)
    parser.add_argument("--top-k", type=int, default=0, metavar="K")
    parser.add_argument("--top-p", type=float, default=0.95, metavar="P")
    parser.add_argument("--no-overlap", action="store_true", help="kernels of a GPU's step begin when those before them have ended")
    parser.add_argument("--profile", action="store_true", help="also show the kernels of a step")
    parser.add_argument("--peer", action="store_true", help="also time a Llama of transformers")
    return parser


if __name__ == "__main__":
    sys.exit(main())
