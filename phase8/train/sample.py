"""A text sample of the model, while a run trains and at its end."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import torch

from phase8.config.schema import RunConfig
from phase8.data.tokenizer import Tokenizer
from phase8.generate.memory import memory_errors
from phase8.generate.sampling import SamplingOptions
from phase8.generate.text import continued_text, prompt_tokens, text_begin
from phase8.model.model import LanguageModel

_REMEDIES = ("a shorter observe.sample_prompt", "a smaller observe.sample_tokens", "observe.sample_at_evaluations=false to write none before the end")


def sample_text(whole_model: Callable[[], LanguageModel], tokenizer: Tokenizer, config: RunConfig, device: torch.device) -> str:
    """Returns `observe.sample_prompt` with the model's continuation. Neither weights nor the random state of training change.

    Args:
        whole_model: Puts the model together.
        tokenizer: Its tokenizer.
        config: Config of the run.
        device: Device of the model.

    Raises:
        OutOfMemoryError: The memory does not suffice for the model or its text, beside what training holds.
    """
    observe = config.observe
    prompt = observe.sample_prompt or ""
    tokens = prompt_tokens(tokenizer, prompt, begin=text_begin(tokenizer, config.data))
    options, end_ids = SamplingOptions(seed=config.train.seed), config.data.end_ids or ()
    # Compiled blocks would be compiled once more, for the prompt.
    stance = torch.compiler.set_stance("force_eager") if config.train.compile.enabled else nullcontext()
    with memory_errors("a sample was written", device, _REMEDIES), stance:
        return prompt + continued_text(whole_model(), tokenizer, tokens, max_tokens=observe.sample_tokens, options=options, end_ids=end_ids)
