"""Tokens that a model draws after a prompt."""

from phase8.generate.continuations import Request, continue_prompts
from phase8.generate.decode import DecodingLoop


def drawn_tokens(model, prompt, *, max_tokens, options, num_ids=61, stop_id=None):
    """The token ids, until the end of the document, which is left out, or `max_tokens`."""
    drawn: list[int] = []

    def take(_, token):
        if token != stop_id:
            drawn.append(token)
        return token != stop_id

    loop = DecodingLoop(model, options=options, num_ids=num_ids)
    continue_prompts(loop, [Request(0, tuple(prompt), seed=options.seed)], max_tokens=max_tokens, take=take)
    return drawn
