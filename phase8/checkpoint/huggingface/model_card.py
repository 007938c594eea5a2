"""The README.md of exported weights: what the model is and what it was trained on. Names come from configs, and are shown escaped."""

from __future__ import annotations

import html
import json
from collections.abc import Iterator, Sequence

from phase8.checkpoint.run_metadata import RunMetadata
from phase8.checkpoint.untrusted import shortened
from phase8.config.model_keys import keys_in_effect
from phase8.config.model_section import ModelSection

MODEL_CARD_NAME = "README.md"
_MARKUP = str.maketrans({character: f"\\{character}" for character in "\\`*_{}[]()#+-.!|~$:@"})


def model_card(metadata: RunMetadata, *, num_parameters: int, differences: Sequence[str], has_tokenizer: bool) -> bytes:
    """Content of the model card.

    Args:
        metadata: The config and the progress of the run.
        num_parameters: Number of parameters.
        differences: What the model has that no Llama has, in which case its code lies beside the weights; none: it is a Llama.
        has_tokenizer: Whether the tokenizer is exported.
    """
    lines = ["---", "library_name: transformers", "pipeline_tag: text-generation", "tags:", "- phase8", "---", ""]
    lines += [f"# {escaped(metadata.config.run.name)}", "", *_description(metadata, num_parameters), ""]
    lines += ["| training | |", "|---|---|", *(f"| {name} | {value} |" for name, value in _training(metadata)), ""]
    lines += ["```python", *_usage(not differences, has_tokenizer), "```", "", *_remarks(metadata, differences, has_tokenizer)]
    lines += ["", "## Model", "```json", _shown_model(metadata.config.model), "```", ""]
    return "\n".join(lines).encode("ascii", "backslashreplace")


def escaped(text: str) -> str:
    """A text as Markdown that shows it on one line: no markup, no HTML, no link, no control characters."""
    printable = "".join(character if character.isprintable() else ascii(character)[1:-1] for character in shortened(text))
    return html.escape(printable.translate(_MARKUP), quote=False)


def _description(metadata: RunMetadata, num_parameters: int) -> list[str]:
    kind = "Phase 8 block" if metadata.config.model.block == "phase8" else "transformer block"
    num_layers = metadata.config.model.num_layers
    return [f"A language model of {num_layers} layers of the {kind} with {num_parameters:,} parameters, pretrained with phase8."]


def _training(metadata: RunMetadata) -> Iterator[tuple[str, str]]:
    config, position = metadata.config, metadata.position
    if metadata.data_fingerprint is not None and metadata.data_fingerprint["sources"]:
        sources = metadata.data_fingerprint["sources"]
        names = ", ".join(f"{escaped(source['name'])} (weight {source['weight']:.4g})" for source in sources)
        yield "data", "Python's standard library, the embedded corpus" if config.data.train is None else names
    if position is not None and position.step:
        yield "steps", f"{position.step:,}"
        yield "tokens", f"{position.tokens_seen:,}"
    if (losses := metadata.losses) is not None:
        yield "training loss", f"{losses.training:.4f} nats per token, mean of the last {losses.num_steps} steps"
        if losses.validation is not None:
            yield "validation loss", f"{losses.validation:.4f} nats per token, after step {losses.validation_step:,}"
    yield "sequence length", f"{config.model.sequence_length:,} tokens"
    if metadata.global_batch_size is not None:
        yield "sequences in a step", f"{metadata.global_batch_size:,}"
    yield "optimizer", f"{config.optim.name}, learning rate {config.optim.learning_rate:g}, {config.optim.schedule}"
    yield "precision", config.precision.dtype


def _usage(is_llama: bool, has_tokenizer: bool) -> list[str]:
    code = "" if is_llama else ", trust_remote_code=True"
    model = f'model = AutoModelForCausalLM.from_pretrained("DIRECTORY"{code})'
    if not has_tokenizer:
        return ["from transformers import AutoModelForCausalLM", "", model]
    return [
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        model,
        f'tokenizer = AutoTokenizer.from_pretrained("DIRECTORY"{code})',
        'inputs = tokenizer("Once upon a time", return_tensors="pt")',
        "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=50)[0]))",
    ]


def _remarks(metadata: RunMetadata, differences: Sequence[str], has_tokenizer: bool) -> Iterator[str]:
    model, begin = metadata.config.model, metadata.config.data.begin_token
    if differences:
        state = "keys and values of all tokens" if model.block == "transformer" else "a state of constant size"
        yield f"It differs from a Llama by {' and '.join(map(escaped, differences))}, so its code, plain PyTorch, lies beside the weights."
        yield f"Generation keeps {state}. Masked tokens are as if they were not there."
    if has_tokenizer:
        added = "no token" if begin is None else f"{escaped(begin)} before a text"
        yield (
            f"The tokenizer adds {added}, and special pieces inside a text are text, as in training; with `split_special_tokens=False` they are "
            "special. In training, the end-of-document token stood between documents."
        )
    if model.ffn == "moe":
        yield "Experts drop no token, and fine-tuning adds no loss that balances them."


def _shown_model(model: ModelSection) -> str:
    return json.dumps(keys_in_effect(model), indent=1)
