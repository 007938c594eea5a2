"""The form of weights that are merged into one model: this library's own, or that of Hugging Face's transformers."""

from __future__ import annotations

from phase8.checkpoint.huggingface.export import hugging_face_form
from phase8.checkpoint.huggingface.text_files import ExportedTokenizer
from phase8.checkpoint.load import Checkpoint
from phase8.checkpoint.model_source import tokenizer_of
from phase8.checkpoint.reshard.reshard import ConsolidatedForm
from phase8.checkpoint.run_metadata import run_metadata
from phase8.config.load import config_to_mapping
from phase8.config.schema import RunConfig
from phase8.conversion.options import ConversionOptions
from phase8.data.fast_tokenizer import fast_tokenizer
from phase8.data.tokenizer import SentencePieceTokenizer
from phase8.generate.restore import restore_tokenizer
from phase8.generate.text import text_begin
from phase8.plan.whole_config import num_parameters


def merged_form(source: Checkpoint, config: RunConfig, options: ConversionOptions) -> ConsolidatedForm:
    """The form that the options ask for."""
    if options.format == "consolidated":
        return ConsolidatedForm(config_to_mapping(config))
    dtype = "bfloat16" if options.dtype == "bf16" else "float32"
    count = num_parameters(RunConfig(model=config.model))
    return hugging_face_form(run_metadata(source), _exported_tokenizer(source, config), dtype=dtype, num_parameters=count)


def _exported_tokenizer(source: Checkpoint, config: RunConfig) -> ExportedTokenizer | None:
    """What exported weights say about the tokenizer stored with them; None: there is none."""
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
        begin=None if (begin := config.data.begin_token) is None else (begin, *text_begin(tokenizer, config.data)),
        padding=(tokenizer.piece_of(pad_id), pad_id),
        unknown=None if tokenizer.unknown_id is None else tokenizer.piece_of(tokenizer.unknown_id),
    )
