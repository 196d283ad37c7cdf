"""Steps of transformers' Trainer, in a module of its own: other contestants do not import what it does."""

import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import torch
from transformers import Trainer, TrainerCallback, TrainingArguments, default_data_collator

from benchmarks.steps import DECAY, MAX_NORM, RATE, Shape


class Laps(TrainerCallback):
    """The clock at the end of each of Trainer's steps."""

    def __init__(self, now: Callable[[], float]) -> None:
        self.now, self.ends = now, list[float]()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.ends.append(self.now())


def trainer_seconds(shape: Shape, now: Callable[[], float]) -> Iterator[float]:
    """Seconds of one step of Trainer; one run of it for each."""
    model, first = shape.llama(), 0
    while True:
        tokens = torch.cat([shape.batch(first + step) for step in (0, 1)]).cpu()
        rows = [{"input_ids": row_of_tokens[:-1], "labels": row_of_tokens[:-1]} for row_of_tokens in tokens]
        with tempfile.TemporaryDirectory() as folder:
            arguments = TrainingArguments(
                folder, max_steps=2, per_device_train_batch_size=shape.rows, bf16=True, use_cpu=shape.device == "cpu",
                report_to="none", save_strategy="no", logging_strategy="no", disable_tqdm=True, learning_rate=RATE,
                weight_decay=DECAY, max_grad_norm=MAX_NORM, dataloader_pin_memory=False,
            )  # fmt: skip
            laps = Laps(now)
            trainer = Trainer(
                model, arguments, train_dataset=rows, data_collator=default_data_collator, callbacks=[laps]
            )
            trainer.train()
        started, ended = laps.ends
        yield ended - started
        first += 2
