"""Probabilities and losses of answers, over all windows of a question.  F windows, Q questions, L positions.

Batches are those of `PadWindows`.  Source: Clark & Gardner 2018, arXiv:1710.10723, section 3.3 (one softmax over all
windows of a question).
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

OVERLAPPING = 4  # copies of one answer that windows may hold, at most


def log_probabilities(
    outputs: Mapping[str, torch.Tensor], batch: Mapping[str, Any]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of each position (F, L) to be the start, and the end, of the answer; they sum to 1 over a question's windows."""
    is_text, question_of = batch["char_starts"] >= 0, batch["question_of"]
    found = []
    for name in ("start_logits", "end_logits"):
        logits = outputs[name].float().masked_fill(~is_text, -torch.inf)
        of_window = logits.logsumexp(-1)  # (F,)
        sums = [of_window[question_of == question].logsumexp(0) for question in range(len(batch["contexts"]))]
        of_question = torch.stack(sums).clamp(min=torch.finfo(logits.dtype).min)  # a text without tokens: not -inf
        found.append(logits - of_question[question_of][:, None])
    return found[0], found[1]


def losses_of(starts: torch.Tensor, ends: torch.Tensor, batch: Mapping[str, Any]) -> torch.Tensor:
    """Half the negative log probability of all right answers of each question (Q,), in nats; inf where none is known.

    With one answer in one window it is the mean of the two cross-entropies, as models compute it themselves.
    """
    question, window, start, end = batch["labels"].T
    of_answers = starts[window, start] + ends[window, end]
    losses = [-of_answers[question == one].logsumexp(0) / 2 for one in range(len(batch["contexts"]))]
    return torch.stack(losses)


def span_scores(starts: torch.Tensor, ends: torch.Tensor, longest: int) -> torch.Tensor:
    """(F, L, M): log probability of the answer from a position to m positions later, m < M = `longest`."""
    length = starts.shape[1]
    padded_ends = torch.nn.functional.pad(ends, (0, longest - 1), value=-torch.inf)
    return starts[..., None] + torch.stack([padded_ends[:, more : more + length] for more in range(longest)], dim=-1)


def best_answers(scores: torch.Tensor, question: int, batch: Mapping[str, Any], count: int) -> list[dict[str, Any]]:
    """The `count` likeliest answers to one question, given `span_scores`; an empty one if the text has no token."""
    windows = (batch["question_of"] == question).nonzero().flatten()
    own = scores[windows]
    values, positions = own.flatten().topk(min(count * OVERLAPPING, own.numel()))
    found: dict[tuple[int, int], float] = {}
    for value, position in zip(values.exp().tolist(), positions.tolist(), strict=True):
        window, first, more = map(int, np.unravel_index(position, own.shape))
        start = int(batch["char_starts"][windows[window], first])
        end = int(batch["char_ends"][windows[window], min(first + more, own.shape[1] - 1)])
        if value > 0 and (start, end) not in found:
            found[start, end] = value
    best = list(found.items())[:count] or [((0, 0), 0.0)]
    context = batch["contexts"][question]
    return [{"text": context[start:end], "start": start, "end": end, "score": score} for (start, end), score in best]
