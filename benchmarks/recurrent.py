"""Steps of recurrent language models: the LSTM of Penn Treebank's small shape, and minGRU beside LSTM.

The plain loop is what PyTorch's own word language model example does: nn.LSTM with dropout, a decoder tied to the
embedding, plain SGD with clipping, the state carried from step to step.  Tokens are random: the work is the same.
"""

from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

import bmtk  # noqa: F401 - registers the families
from benchmarks.rows import Line, Settings, at_least, row, take_turns
from benchmarks.steps import accelerator_of
from bmtk.models.configuration_bm_rnn import BmRnnConfig
from bmtk.training.optimizers import build_optimizer
from bmtk.training.prepared import Prepared
from bmtk.training.tbptt import TBPTTState
from bmtk.training.updates import Losses, Updater

WORDS, ROWS, CONTEXT, WIDTH, LAYERS, DROPOUT, CLIP = 10_001, 20, 35, 256, 2, 0.2, 0.25
STEPS = 10  # of a turn


@row
def ptb_lstm(settings: Settings) -> list[Line]:
    """Penn Treebank's shape, LSTM 2 x 256, rows of 35: tokens/s beside a plain PyTorch loop, in float32 and bf16."""
    return [ptb_line(precision, settings) for precision in ("fp32", "bf16")]


@row
def mingru(settings: Settings) -> list[Line]:
    """minGRU beside LSTM at context 256, 2 x 256, vocabulary 1,024: tokens/s of the project's loop."""
    lines = []
    for precision in ("fp32", "bf16"):
        rates = turns_of(
            {cell: ours(precision, cell=cell, words=1024, context=256, rows=8) for cell in ("mingru", "lstm")},
            settings,
            tokens=8 * 256,
        )
        work = f"minGRU 2 x 256, context 256, {precision}"
        lines.append(Line(work, "tokens/s", rates["mingru"], rates["lstm"], "LSTM", at_least(2.0)))
    return lines


def ptb_line(precision: str, settings: Settings) -> Line:
    rates = turns_of({"ours": ours(precision), "peer": plain(precision)}, settings, tokens=ROWS * CONTEXT)
    work = f"Penn Treebank LSTM 2 x 256, {precision}"
    return Line(work, "tokens/s", rates["ours"], rates["peer"], "plain loop", at_least(1.2))


def turns_of(
    steps: dict[str, Callable[[torch.Tensor], Any]], settings: Settings, *, tokens: int
) -> dict[str, list[float]]:
    """Tokens per second of each, over turns of some steps."""
    count = 1 if settings.quick else STEPS

    def rate(step: Callable[[torch.Tensor], Any]) -> float:
        started = settings.now()
        for number in range(count):
            step(torch.Generator().manual_seed(number))
        return count * tokens / (settings.now() - started)

    return take_turns({name: lambda step=step: rate(step) for name, step in steps.items()}, settings.turns)


def ours(
    precision: str, *, cell: str = "lstm", words: int = WORDS, context: int = CONTEXT, rows: int = ROWS
) -> Callable[[torch.Generator], Any]:
    """The project's loop, with the settings of recipes/configs/causal_lm/ptb.yaml."""
    torch.manual_seed(0)
    dropped = dict.fromkeys(("input_dropout", "hidden_dropout", "output_dropout"), DROPOUT)
    sizes = {"vocab_size": words, "hidden_size": WIDTH, "num_hidden_layers": LAYERS}
    model = AutoModelForCausalLM.from_config(BmRnnConfig(cell_type=cell, **sizes, **dropped)).train()
    accelerator = accelerator_of(precision)
    optimizer = SimpleNamespace(
        optimizer="sgd", learning_rate=1.0, sgd_momentum=0.0, weight_decay=0.0, layer_lr_decay=1.0
    )
    prepared = Prepared(accelerator.prepare(model), build_optimizer(model, optimizer), accelerator)
    losses = Losses(lambda batch: batch["shift_labels"].numel())
    updater = Updater(prepared, losses, max_grad_norm=CLIP, recurrent=TBPTTState())

    def step(draw: torch.Generator) -> Any:
        tokens = torch.randint(words, (rows, context + 1), generator=draw)
        targets = tokens[:, 1:].contiguous()
        batch = {"input_ids": tokens[:, :-1].contiguous(), "labels": targets, "shift_labels": targets}
        return updater.step([batch])

    return step


class PlainLSTM(nn.Module):
    """Embedding, LSTM, decoder with the embedding's weights; dropout before, between and after."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(WORDS, WIDTH)
        self.lstm = nn.LSTM(WIDTH, WIDTH, LAYERS, dropout=DROPOUT, batch_first=True)
        self.decoder = nn.Linear(WIDTH, WORDS)
        self.decoder.weight = self.embedding.weight
        self.dropout = nn.Dropout(DROPOUT)

    def forward(self, ids: torch.Tensor, state: Any) -> tuple[torch.Tensor, Any]:
        found, state = self.lstm(self.dropout(self.embedding(ids)), state)
        return self.decoder(self.dropout(found)), state


def plain(precision: str) -> Callable[[torch.Generator], Any]:
    torch.manual_seed(0)
    model = PlainLSTM()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    state: Any = None

    def step(draw: torch.Generator) -> float:
        nonlocal state
        tokens = torch.randint(WORDS, (ROWS, CONTEXT + 1), generator=draw)
        with torch.autocast("cpu", torch.bfloat16) if precision == "bf16" else nullcontext():
            logits, state = model(tokens[:, :-1], state)
            loss = F.cross_entropy(logits.reshape(-1, WORDS).float(), tokens[:, 1:].reshape(-1))
        state = tuple(part.detach() for part in state)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        return loss.item()

    return step
