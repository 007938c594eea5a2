"""What a model becomes for Hugging Face's transformers: a Llama where it is one, and otherwise weights with the code that computes with them."""

from __future__ import annotations

from phase8.checkpoint.huggingface.llama import llama_config, llama_name, reasons_against
from phase8.checkpoint.huggingface.model_card import MODEL_CARD_NAME, model_card
from phase8.checkpoint.huggingface.phase8_model import CODE_FILES, exported_config, exported_name, stays_in_fp32
from phase8.checkpoint.huggingface.text_files import ExportedTokenizer, special_ids, text_files
from phase8.checkpoint.huggingface.text_settings import RESETS
from phase8.checkpoint.reshard.reshard import ConsolidatedForm
from phase8.checkpoint.run_metadata import RunMetadata

MAX_FILE_BYTES = 5 * 10**9  # as transformers divides weights


def hugging_face_form(metadata: RunMetadata, tokenizer: ExportedTokenizer | None, *, dtype: str, num_parameters: int) -> ConsolidatedForm:
    """Names of the weights, and the content of every file beside them.

    Args:
        metadata: The config and the progress of the run.
        tokenizer: The model's tokenizer; None: it has none.
        dtype: Dtype of the weights, by its name in torch.
        num_parameters: Number of parameters.
    """
    model = metadata.config.model
    differences = list(reasons_against(model))
    ids = special_ids(metadata.config.data, tokenizer)
    added = ids | ({RESETS: True} if metadata.config.data.reset_at_document_boundaries else {})
    card = model_card(metadata, num_parameters=num_parameters, differences=differences, has_tokenizer=tokenizer is not None)
    files = text_files(model, tokenizer, ids) | {MODEL_CARD_NAME: card}
    if not differences:
        return ConsolidatedForm(llama_config(model, dtype=dtype) | added, llama_name, files=files, max_file_bytes=MAX_FILE_BYTES)
    return ConsolidatedForm(
        exported_config(model, dtype=dtype) | added,
        exported_name,
        keeps_dtype=stays_in_fp32,
        files=files | {path.name: path.read_bytes() for path in CODE_FILES},
        max_file_bytes=MAX_FILE_BYTES,
    )
