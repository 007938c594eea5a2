"""A text sample of the model, while a run trains and at its end."""

from __future__ import annotations

from contextlib import nullcontext

import torch

from phase8.config.schema import RunConfig
from phase8.data.tokenizer import Tokenizer
from phase8.generate.sampling import SamplingOptions
from phase8.generate.text import prompt_tokens, stream_text
from phase8.model.model import LanguageModel


def sample_text(model: LanguageModel, tokenizer: Tokenizer, config: RunConfig) -> str:
    """Returns `observe.sample_prompt` with the model's continuation. Neither weights nor the random state of training change."""
    observe = config.observe
    prompt = observe.sample_prompt or ""
    tokens = prompt_tokens(tokenizer, prompt, after_document_end=not config.data.reset_at_document_boundaries)
    options = SamplingOptions(seed=config.train.seed)
    # Compiled blocks would be compiled once more, for pieces of one token.
    with torch.compiler.set_stance("force_eager") if config.train.compile.enabled else nullcontext():
        return prompt + "".join(stream_text(model, tokenizer, tokens, max_tokens=observe.sample_tokens, options=options))
