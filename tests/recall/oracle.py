"""What recalls everything: it looks the answers up in the sequence."""

import numpy as np

from phase8.recall.tasks import ASK, MARK


def look_up(tokens, answers):
    """Predicted answers [B, A], from the tokens before each answer alone."""
    return np.array([[_next_token(row[:position]) for position in positions] for row, positions in zip(tokens, answers, strict=True)])


def _next_token(before):
    if MARK in before:  # a passkey: as many of its tokens as have been repeated
        return before[list(before).index(MARK) + 1 + len(before) - 1 - list(before).index(ASK)]
    return before[list(before).index(before[-1]) + 1]
