"""A text sample of the model, at the end of a run."""

from __future__ import annotations

from rich.console import Console

from phase8.config.schema import RunConfig
from phase8.data.tokenizer import Tokenizer
from phase8.generate.sampling import SamplingOptions
from phase8.generate.text import continued_text, prompt_tokens
from phase8.model.model import LanguageModel


def write_sample(model: LanguageModel, tokenizer: Tokenizer, config: RunConfig, console: Console) -> str:
    """Prints and returns `observe.sample_prompt` with the model's continuation."""
    observe = config.observe
    prompt = observe.sample_prompt or ""
    tokens = prompt_tokens(tokenizer, prompt, after_document_end=not config.data.reset_at_document_boundaries)
    options = SamplingOptions(seed=config.train.seed)
    text = prompt + continued_text(model, tokenizer, tokens, max_tokens=observe.sample_tokens, options=options)
    console.rule("sample")
    console.print(text, markup=False, highlight=False)
    console.rule()
    return text
