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

--upcycle-experts E makes a mixture of E experts, two for a token, of a dense SRC: every expert begins as a copy of the dense feed-forward, so that
the mixture computes the same as long as none drops a token. DST is of step 0, without optimizer; start a run from it by
checkpoint.initialise_from, with model.ffn=moe and model.num_experts=E.

SRC is never touched. DST is there when everything was written, read back and compared with SRC. After an interruption (or a kill -9) the
same command goes on: files that were complete are checked and kept, in a hidden directory beside DST.

Exit codes: 0 done; 2 command line, or a layout the model cannot have; 4 damaged or missing SRC, one of a Llama that the baseline is not, or a
DST that cannot be used; 5 DST cannot be written; 130 interrupted.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from rich.progress import DownloadColumn, TimeRemainingColumn, TransferSpeedColumn

from phase8.config.arguments import path_argument
from phase8.errors import ConfigError
from phase8.observe.stage_progress import ProgressDisplay
from phase8.terminal import run_door

if TYPE_CHECKING:
    import torch

    from phase8.checkpoint.huggingface.text_files import ExportedTokenizer
    from phase8.checkpoint.load import Checkpoint
    from phase8.checkpoint.reshard.reshard import ConsolidatedForm
    from phase8.checkpoint.weight_files import WeightFiles
    from phase8.config.model_section import ModelSection
    from phase8.config.schema import ParallelSection, RunConfig
    from phase8.topology import Topology

# The weights of two experts add up to one; that of a single expert would be its score.
UPCYCLED_TOP_K = 2
LAYOUT = ("tensor_parallel_size", "pipeline_parallel_size", "shards", "expert_parallel_size")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit code."""
    return run_door(lambda: _run(arguments), interrupted="interrupted; run the same command again to go on")


def _run(arguments: Sequence[str] | None) -> int:
    options = _parser().parse_args(arguments)
    _check_options(options)
    print(_rewrite(options))
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
    return parser


def _check_options(options: argparse.Namespace) -> None:
    given = {f"--{name.replace('_', '-')}": value for name in LAYOUT if (value := vars(options)[name]) is not None}
    if options.format != "phase8" and given:
        raise ConfigError(f"{next(iter(given))} is for --format phase8, but --format {options.format} is one file for any ranks; leave it out.")
    if options.format == "phase8" and options.dtype is not None:
        raise ConfigError(
            f"--dtype is {options.dtype}, but --format is phase8, from which training goes on bit for bit; leave it out, or choose consolidated."
        )
    for name, value in given.items():
        if value < 1:
            raise ConfigError(f"{name} is {value}, but must be at least 1.")
    shards, experts = options.shards or 1, options.expert_parallel_size or 1
    if shards % experts:
        raise ConfigError(f"--expert-parallel-size {experts} does not divide --shards {shards}, of which these ranks are a part; change one of them.")
    if options.upcycle_experts is not None and options.format != "phase8":
        raise ConfigError(f"--upcycle-experts is for --format phase8, but --format is {options.format}; leave one of them out.")


def _rewrite(options: argparse.Namespace) -> str:
    """Does the rewriting; returns a line that describes the result."""
    # Imported late: --help and a wrong command line need no torch.
    import torch

    from phase8.checkpoint.model_source import open_model
    from phase8.checkpoint.reshard.reshard import consolidate
    from phase8.checkpoint.weight_files import WeightFiles

    with ProgressDisplay(DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn()) as display, ExitStack() as stack:
        source = open_model(_without_pickles(options, stack))
        config = _config_of(source)
        origin = options.source if options.trust_pickle else source.path
        if is_import := isinstance(source, WeightFiles):
            source = _checked(source, config, options, display)
        if options.upcycle_experts is not None:
            source, config = _upcycled(source, config, options.upcycle_experts)
            is_import = True
        if options.format == "phase8":
            copy = _reshard(source, config, options, display, dtype=torch.float32 if is_import else None)  # master weights are fp32
            return f"{copy.path}: step {copy.step}, {len(copy.tensor_names)} tensors in {len(copy.manifest.files)} files, equal to {origin}"
        dtype = {None: None, "bf16": torch.bfloat16, "fp32": torch.float32}[options.dtype]
        form = _consolidated_form(source, config, options)
        path = consolidate(source, options.destination, form=form, dtype=dtype, on_progress=display.show)
    return f"{path}: {path.stat().st_size:,} bytes, the weights of {origin}"


def _without_pickles(options: argparse.Namespace, stack: ExitStack) -> Path:
    """SRC, or the weights of a checkpoint of DeepSpeed in a directory beside DST that goes with the stack.

    Raises:
        ConfigError: SRC is such a checkpoint, and nobody has said that it is trusted, or what its model is; or it is none.
    """
    from phase8.checkpoint.deepspeed_source import consolidate_deepspeed, is_deepspeed
    from phase8.checkpoint.reshard.rewrite import check_destination
    from phase8.config.load import config_to_mapping, load_config

    source: Path = options.source
    if not is_deepspeed(source):
        for option, value in (("--trust-pickle", options.trust_pickle), ("--config", options.config)):
            if value:
                raise ConfigError(f"{option} is for a checkpoint that DeepSpeed wrote, and {source} is none; leave it out.")
        return source
    if not options.trust_pickle:
        raise ConfigError(
            f"{source} is a checkpoint of DeepSpeed, made of pickles, which can run any code when they are read; if you know where it comes from, "
            "give --trust-pickle."
        )
    if options.config is None:
        raise ConfigError(f"{source} does not say what its model is; give the model's config with --config.")
    config = config_to_mapping(load_config(options.config))
    check_destination(source, options.destination)  # before all weights are read
    options.destination.parent.mkdir(parents=True, exist_ok=True)
    directory = Path(stack.enter_context(TemporaryDirectory(dir=options.destination.parent, prefix=f".{options.destination.name}.")))
    consolidate_deepspeed(source, directory, config)
    return directory


def _checked(source: WeightFiles, config: RunConfig, options: argparse.Namespace, display: ProgressDisplay) -> Checkpoint:
    """Checks weights without a manifest and opens them as a checkpoint. Whatever can be refused is refused before they are read."""
    from phase8.checkpoint.reshard.rewrite import check_destination

    if options.format == source.form == "hf":
        raise ConfigError(f"--format is hf, but {source.path} is in that form already; leave it out to import it.")
    _parallel(config, options)
    check_destination(source.path, options.destination)
    return source.with_checksums(_metadata_of_beginning(config), on_progress=display.show)


def _upcycled(source: Checkpoint, config: RunConfig, num_experts: int) -> tuple[Checkpoint, RunConfig]:
    """The weights of a dense model as those of a mixture, and the config of the mixture.

    Raises:
        ConfigError: The model is not dense, or the mixture cannot be built.
    """
    import torch

    from phase8.checkpoint.reshard.upcycle import UpcycledWeights
    from phase8.config.model_keys import KEYS_OF_EXPERTS
    from phase8.config.model_section import ModelSection
    from phase8.config.validate import refuse_problems
    from phase8.model.model import build_model
    from phase8.model.parameters import first_buffers, first_value, iterate_specs

    if config.model.ffn != "swiglu":
        raise ConfigError(f"--upcycle-experts is for dense models, but model.ffn of {source.path} is {config.model.ffn}; give one with ffn swiglu.")
    if num_experts < UPCYCLED_TOP_K:
        raise ConfigError(f"--upcycle-experts is {num_experts}, but {UPCYCLED_TOP_K} experts compute a token; give at least as many.")
    # Whatever the dense model's config says about experts was without effect.
    experts = {name: ModelSection.model_fields[name].default for name in KEYS_OF_EXPERTS} | {
        "ffn": "moe", "num_experts": num_experts, "top_k": UPCYCLED_TOP_K, "expert_ffn_size": config.model.feed_forward_width,
        "routed_scaling_factor": 1.0,
    }  # fmt: skip
    config = config.model_copy(update={"model": config.model.model_copy(update=experts)})
    refuse_problems(config, about=("model.",))
    mixture = build_model(config.model, dtype=torch.float32, device=torch.device("meta"))
    added = {name: first_value(name, each.shape, spec, seed=config.train.seed) for name, each, spec in iterate_specs(mixture) if ".router." in name}
    weights = UpcycledWeights(
        source,
        _metadata_of_beginning(config),
        has_experts=config.model.has_experts,
        num_experts=num_experts,
        added=added | first_buffers(mixture),
    )
    return weights, config


def _metadata_of_beginning(config: RunConfig) -> dict[str, Any]:
    """Metadata of a run at step 0, except its batch, which has not been chosen."""
    import random

    import numpy as np
    import torch

    from phase8.data.sampler import ORDER_VERSION
    from phase8.train.resume import Position, checkpoint_metadata

    # The same in every call, so that the next call can continue the work of an interrupted one.
    random.seed(config.train.seed)
    np.random.seed(config.train.seed % 2**32)
    torch.manual_seed(config.train.seed)
    fingerprint = {"order_version": ORDER_VERSION, "sequence_length": config.model.sequence_length, "sources": []}
    return checkpoint_metadata(config, Position(), global_batch_size=None, fingerprint=fingerprint, device=torch.device("cpu"))


def _config_of(source: Checkpoint) -> RunConfig:
    """The config of a checkpoint; its model section describes the weights."""
    import torch

    from phase8.checkpoint.quantization import require_as_trained
    from phase8.checkpoint.run_metadata import run_metadata
    from phase8.checkpoint.state import require_fit
    from phase8.model.model import build_model

    require_as_trained(source)
    config = run_metadata(source).config
    require_fit(source, build_model(config.model, dtype=torch.float32, device=torch.device("meta")), widen=True)
    return config


def _consolidated_form(source: Checkpoint, config: RunConfig, options: argparse.Namespace) -> ConsolidatedForm:
    from phase8.checkpoint.huggingface.export import hugging_face_form
    from phase8.checkpoint.reshard.reshard import ConsolidatedForm
    from phase8.checkpoint.run_metadata import run_metadata
    from phase8.checkpoint.state import MODEL_PREFIX
    from phase8.config.load import config_to_mapping

    if options.format == "consolidated":
        return ConsolidatedForm(config_to_mapping(config))
    num_parameters = sum(math.prod(source.entry(name).shape) for name in source.tensor_names if name.startswith(MODEL_PREFIX))
    dtype = "bfloat16" if options.dtype == "bf16" else "float32"
    return hugging_face_form(run_metadata(source), _exported_tokenizer(source, config), dtype=dtype, num_parameters=num_parameters)


def _exported_tokenizer(source: Checkpoint, config: RunConfig) -> ExportedTokenizer | None:
    """What exported weights say about the tokenizer stored with them; None: there is none."""
    from phase8.checkpoint.huggingface.text_files import ExportedTokenizer
    from phase8.checkpoint.model_source import tokenizer_of
    from phase8.data.fast_tokenizer import fast_tokenizer
    from phase8.data.tokenizer import SentencePieceTokenizer
    from phase8.generate.restore import restore_tokenizer

    path = tokenizer_of(source)
    if path is None:
        return None
    tokenizer = restore_tokenizer(source, vocab_size=config.model.vocab_size, eod_token=config.data.eod_token)
    content = path.read_bytes()
    pad_id = tokenizer.eod_id if tokenizer.pad_id is None else tokenizer.pad_id
    return ExportedTokenizer(
        sentencepiece=content if isinstance(tokenizer, SentencePieceTokenizer) else None,
        fast=fast_tokenizer(content),
        num_ids=tokenizer.vocab_size,
        end=(tokenizer.eod_token, tokenizer.eod_id),
        padding=(tokenizer.piece_of(pad_id), pad_id),
        unknown=None if tokenizer.unknown_id is None else tokenizer.piece_of(tokenizer.unknown_id),
    )


def _reshard(
    source: Checkpoint, config: RunConfig, options: argparse.Namespace, display: ProgressDisplay, *, dtype: torch.dtype | None
) -> Checkpoint:
    from phase8.checkpoint.reshard.reshard import reshard
    from phase8.config.pipeline import pipeline_of
    from phase8.optim.state import declared_for
    from phase8.plan.chunks import stage_tensors
    from phase8.topology import Topology

    parallel = _parallel(config, options)
    topology = Topology(
        pipeline_parallel_size=parallel.pipeline_parallel_size,
        data_parallel_size=options.shards or 1,
        tensor_parallel_size=parallel.tensor_parallel_size,
        expert_parallel_size=options.expert_parallel_size or 1,
    )
    _check_experts(config.model, topology)
    stages = stage_tensors(config.model, pipeline_of(parallel))
    declare = declared_for(config.optim)
    return reshard(source, options.destination, stages=stages, topology=topology, declare=declare, dtype=dtype, on_progress=display.show)


def _check_experts(model: ModelSection, topology: Topology) -> None:
    """Refuses ranks that cannot share the experts of a model.

    Raises:
        ConfigError: The model has no experts, or the ranks do not divide them.
    """
    num_ranks = topology.expert_parallel_size
    if num_ranks > 1 and model.ffn != "moe":
        raise ConfigError(f"--expert-parallel-size is {num_ranks}, but model.ffn is {model.ffn} and has no experts; leave it out.")
    if num_ranks > 1 and model.num_experts % num_ranks:
        raise ConfigError(f"--expert-parallel-size {num_ranks} does not divide model.num_experts {model.num_experts}; choose a divisor.")


def _parallel(config: RunConfig, options: argparse.Namespace) -> ParallelSection:
    """The parallel section of the target layout.

    Raises:
        ConfigError: The model does not support the layout.
    """
    from phase8.config.schema import ParallelSection, RunConfig
    from phase8.config.validate import validate

    T, P = options.tensor_parallel_size or 1, options.pipeline_parallel_size or 1
    stored = config.parallel  # it describes other ranks; only how their layers were divided matters here
    parallel = ParallelSection(
        tensor_parallel_size=T, pipeline_parallel_size=P, pipeline_schedule=stored.pipeline_schedule, pipeline_chunks=stored.pipeline_chunks
    )
    batch = RunConfig().train.model_copy(update={"global_batch_size": P, "micro_batch_size": 1})  # a batch that fits every schedule
    validate(RunConfig(model=config.model, parallel=parallel, train=batch), world_size=T * P)
    return parallel


if __name__ == "__main__":
    sys.exit(main())
