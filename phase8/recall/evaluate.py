"""Measures recall: greedy predictions at the positions of answers, compared with the answers.

Every answer is predicted after the correct tokens before it. All answers of a sequence are right exactly if greedy decoding would write them.

Shapes: B sequences, T tokens, A answers of a sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from phase8.errors import OutOfMemoryError
from phase8.generate.decode import require_finite
from phase8.model.model import LanguageModel
from phase8.recall.tasks import Task
from phase8.recall.write import random_generator

NUM_PARTS = 5
_TOKENS_AT_ONCE = 1 << 15

# Token ids [B, T] and positions of answers [B, A] to the predicted answers [B, A].
Predict = Callable[[np.ndarray, np.ndarray], np.ndarray]


@dataclass(frozen=True, kw_only=True)
class Recall:
    """Recall in sequences of one length and size.

    Attributes:
        length: Tokens of a sequence.
        size: Pairs, or tokens of the passkey.
        num_sequences: Sequences evaluated.
        answer_ratio: Share of the answers that are right.
        sequence_ratio: Share of the sequences whose answers are all right.
        answer_ratio_by_place: The first, by the fifth of the sequence in which the answer was shown; None where none was.
    """

    length: int
    size: int
    num_sequences: int
    answer_ratio: float
    sequence_ratio: float
    answer_ratio_by_place: list[float | None]


def greedy_predictions(model: LanguageModel, device: torch.device) -> Predict:
    """The likeliest token of a model at every answer.

    Args:
        model: A whole model.
        device: Its device.
    """

    @torch.inference_mode()
    def predict(tokens: np.ndarray, answers: np.ndarray) -> np.ndarray:
        try:
            hidden, _ = model(torch.from_numpy(tokens).to(device))
            before = torch.from_numpy(answers - 1).to(device)
            at_answers = hidden.gather(1, before[..., None].expand(-1, -1, hidden.shape[-1]))
            logits = model.logits(at_answers)
            require_finite(logits.sum())
            return logits.argmax(-1).cpu().numpy()
        except torch.OutOfMemoryError as error:
            raise OutOfMemoryError(f"sequences of {tokens.shape[1]} tokens do not fit into the memory of {device}; give shorter --lengths") from error

    return predict


def evaluate_recall(
    task: Task,
    predict: Predict,
    *,
    lengths: Sequence[int],
    num_sequences: int,
    seed: int,
    on_result: Callable[[Recall], None] = lambda _: None,
) -> list[Recall]:
    """Measures recall for every size and length, on sequences drawn apart from those of every training split.

    Args:
        task: The task.
        predict: The model, or what stands in for it.
        lengths: Tokens of a sequence.
        num_sequences: Sequences of each size and length.
        seed: Seed of the sequences.
        on_result: Called with each result.

    Raises:
        ConfigError: A length is too short.
        OutOfMemoryError: A sequence does not fit into the device's memory.
    """
    for length in lengths:
        task.check_length(length)
    found = []
    for size in task.sizes:
        for length in lengths:
            found.append(_evaluate(task, predict, length=length, size=size, num_sequences=num_sequences, seed=seed))
            on_result(found[-1])
    return found


def _evaluate(task: Task, predict: Predict, *, length: int, size: int, num_sequences: int, seed: int) -> Recall:
    generator = random_generator(task, seed=seed, split="evaluation", length=length, size=size)
    at_once = max(1, _TOKENS_AT_ONCE // length)
    right, parts = [], []
    for first in range(0, num_sequences, at_once):
        drawn = task.draw(generator, length=length, size=size, count=min(at_once, num_sequences - first))
        expected = np.take_along_axis(drawn.tokens, drawn.answers, axis=1)
        right.append(predict(drawn.tokens, drawn.answers) == expected)
        parts.append(drawn.shown * NUM_PARTS // length)
    is_right, part = np.concatenate(right), np.concatenate(parts)
    by_place = [float(is_right[part == i].mean()) if (part == i).any() else None for i in range(NUM_PARTS)]
    return Recall(
        length=length,
        size=size,
        num_sequences=num_sequences,
        answer_ratio=float(is_right.mean()),
        sequence_ratio=float(is_right.all(axis=1).mean()),
        answer_ratio_by_place=by_place,
    )


def recall_table(task: Task, found: Sequence[Recall]) -> str:
    """A Markdown table: a row for each size and measure, a column for each length, accuracies in per cent."""
    lengths = sorted({result.length for result in found})
    unit = "pairs" if task.name == "mqar" else "tokens"
    rows = [f"| {task.name}, per cent right | " + " | ".join(map(str, lengths)) + " |", "|---|" + "---|" * len(lengths)]
    by_cell = {(result.size, result.length): result for result in found}
    for size in dict.fromkeys(result.size for result in found):
        cells = [by_cell[size, length] for length in lengths]
        rows.append(f"| {size} {unit}, answers | " + " | ".join(f"{100 * cell.answer_ratio:.1f}" for cell in cells) + " |")
        rows.append(f"| {size} {unit}, whole sequences | " + " | ".join(f"{100 * cell.sequence_ratio:.1f}" for cell in cells) + " |")
    return "\n".join([*rows, f"An answer guessed at random is right in {100 / task.num_values:.2f} % of the cases.", ""])
