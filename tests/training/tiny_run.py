"""A whole run of a model of width 16, for the tests and as a script of its own (several processes, kills, signals).

python tiny_run.py OUTPUT_DIR [--field value ...] trains to the end; SECONDS_PER_BATCH makes it slow.
"""

import contextlib
import hashlib
import json
import os
import signal
import sys
import time
from functools import partial
from pathlib import Path

import torch
from accelerate.state import AcceleratorState
from transformers import AutoConfig, AutoModelForCausalLM, HfArgumentParser, LlamaConfig, LlamaForCausalLM

import bmtk  # noqa: F401  registers the model families
from bmtk.training.agreement import check_shared
from bmtk.training.arguments import LoopArguments
from bmtk.training.checkpoint import Checkpoints, TrainState, save_model
from bmtk.training.evaluation import predict_all
from bmtk.training.loop import train
from bmtk.training.prepared import build_accelerator, prepare
from bmtk.training.rollback import roll_back
from bmtk.training.run_folder import locked
from bmtk.training.run_log import Hooks
from bmtk.training.schedules import build_schedule
from bmtk.training.sharding import whole
from bmtk.training.updates import Losses

VOCABULARY, LENGTH = 23, 8


def tiny_model(*, dropout: float = 0.0, tied: bool = False, seed: int = 7) -> LlamaForCausalLM:
    """A decoder with two layers of width 16, equal at every call."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        attention_dropout=dropout,
        tie_word_embeddings=tied,
    )
    return LlamaForCausalLM(config)


def tiny_recurrent(*, cell_type: str = "lstm", dropout: float = 0.0):
    """A recurrent network with two layers of width 16, equal at every call."""
    torch.manual_seed(7)
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 2, "initializer_range": 0.5}
    config = AutoConfig.for_model("bm_rnn", cell_type=cell_type, hidden_dropout=dropout, **sizes)
    return AutoModelForCausalLM.from_config(config)


def rows(numbers) -> dict[str, torch.Tensor]:
    """Row i is a function of i, and has its own number of predicted tokens."""
    inputs, labels = [], []
    for number in numbers:
        generator = torch.Generator().manual_seed(1000 + int(number))
        tokens = torch.randint(0, VOCABULARY, (LENGTH + 1,), generator=generator)
        inputs.append(tokens[:-1])
        labels.append(tokens[1:].clone())
        labels[-1][: int(number) % (LENGTH - 1)] = -100
    shifted = torch.stack(labels)
    return {"input_ids": torch.stack(inputs), "labels": shifted, "shift_labels": shifted}


class TinyBatches:
    """batches[step] is this process's share of eight rows, cut into micro-batches."""

    steps_per_epoch = 5
    carries_state = False

    def __init__(self, micro_batch_size: int, *, rank: int = 0, world_size: int = 1, seconds: float = 0.0):
        self.micro_batch_size, self.seconds = micro_batch_size, seconds
        share = 8 // world_size
        self.share = range(rank * share, (rank + 1) * share)

    def __getitem__(self, step: int) -> list[dict[str, torch.Tensor]]:
        time.sleep(self.seconds)
        numbers = [8 * step + place for place in self.share]
        size = self.micro_batch_size or len(numbers)
        return [rows(numbers[start : start + size]) for start in range(0, len(numbers), size)]


class Stream(TinyBatches):
    """Eight lanes of random text, whose tokens are to be repeated; each row goes on where the one before ended."""

    carries_state = True

    def __getitem__(self, step: int) -> list[dict[str, torch.Tensor]]:
        return [{name: batch["input_ids"] for name in batch} for batch in super().__getitem__(step)]


class Stopping(TinyBatches):
    """Batches that send their process a signal before step `step` (counted from 0) is trained."""

    def __init__(self, step: int, number: signal.Signals = signal.SIGTERM, *, only_rank: int = 0, **share):
        super().__init__(0, **share)
        self.step, self.number, self.here = step, number, share.get("rank", 0) == only_rank

    def __getitem__(self, step: int):
        if step == self.step and self.here:
            signal.raise_signal(self.number)
        return super().__getitem__(step)


class StoppingStream(Stopping, Stream):
    """A stream that sends its process a signal."""


def arguments(directory: str | Path, **changes) -> LoopArguments:
    """Six steps of eight rows, with two checkpoints and an evaluation on the way."""
    settings = dict(num_train_steps=6, batch_size=8, save_steps=2, eval_steps=3, logging_steps=2, save_total_limit=0)
    settings |= dict(learning_rate=0.01, precision="fp32")  # sums in another order are then equal to six digits
    return LoopArguments(output_dir=str(directory), **settings | changes)


def num_items(batch: dict[str, torch.Tensor]) -> int:
    return int((batch["labels"] != -100).sum())


def predict(model, batch: dict[str, torch.Tensor]) -> list[dict]:
    """Loss and predicted tokens of each row."""
    logits = model(batch["input_ids"]).logits.float()
    losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), batch["labels"], reduction="none").sum(-1)
    items = (batch["labels"] != -100).sum(-1)
    return [{"loss": loss, "items": n} for loss, n in zip(losses.tolist(), items.tolist(), strict=True)]


def run(args: LoopArguments, **changes) -> dict:
    """Train in the locked folder, resuming what it holds; return the last facts of the run."""
    AcceleratorState._reset_state()  # another run of this process may have had another precision
    accelerator = build_accelerator(args)
    try:
        Path(args.output_dir).mkdir(parents=True, exist_ok=True)
        check_shared(accelerator, Path(args.output_dir))
        with locked(args.output_dir) if accelerator.is_main_process else contextlib.nullcontext():
            return run_on(accelerator, args, **changes)
    finally:
        AcceleratorState._reset_state()


def run_on(accelerator, args, *, dropout: float = 0.2, model=None, batches=None, seconds: float = 0.0) -> dict:
    """The run itself; batches may be a function of rank and world_size."""
    prepared = prepare(model or tiny_model(dropout=dropout), args, accelerator)
    share = prepared.share
    keeping = {"keep": args.save_total_limit, "in_background": args.save_in_background}
    checkpoints = Checkpoints(args.output_dir, prepared, **keeping)
    batches = batches or TinyBatches(args.micro_batch_size, **share, seconds=seconds)
    batches = batches(**share) if callable(batches) else batches
    newest = checkpoints.newest()
    state = checkpoints.load(newest) if newest else TrainState()
    validation = [rows(range(500, 503)), rows(range(503, 506)), rows(range(506, 508))]
    if share["world_size"] > 1:  # processes may have different numbers of batches, and none
        validation = validation[2 * share["rank"] :][:2]

    def evaluate() -> dict[str, float]:
        torch.rand(3)  # an evaluation that samples text draws random numbers, and must not disturb training
        predictions = predict_all(prepared.model, validation, accelerator, predict, is_copy=prepared.is_copy)
        loss_sum, count = (sum(prediction[key] for prediction in predictions) for key in ("loss", "items"))
        return {"validation/loss": loss_sum / count, "validation/items": count}

    schedule = build_schedule(args, args.total_steps(TinyBatches.steps_per_epoch))
    back = partial(roll_back, checkpoints)
    saving = {"save": checkpoints.save, "saver": checkpoints.saver, "load_best": checkpoints.load_best}
    hooks = Hooks(evaluate=evaluate, roll_back=back, **saving)
    state = train(prepared, batches, Losses(num_items), schedule, args=args, state=state, hooks=hooks)
    save_model(args.output_dir, prepared)
    return {"digest": digest(prepared.unwrapped), "step": state.step, "metrics": state.metrics}


def digest(model: torch.nn.Module) -> str:
    """sha256 of all weights, byte by byte."""
    total = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        total.update(name.encode() + whole(value.detach()).contiguous().numpy().tobytes())
    return total.hexdigest()


def read_history(directory: str | Path) -> list[dict]:
    """Lines of history.jsonl without what a clock has measured."""
    clock = {"seconds", "tokens_per_second"}
    lines = (Path(directory) / "history.jsonl").read_text().splitlines()
    return [{key: value for key, value in json.loads(line).items() if key not in clock} for line in lines]


def main(argv: list[str]):
    seconds = float(os.environ.get("SECONDS_PER_BATCH", "0"))
    (args,) = HfArgumentParser(LoopArguments).parse_args_into_dataclasses(["--output_dir", *argv])
    torch.set_num_threads(1)
    run(args, seconds=seconds)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have told background jobs to ignore it
    main(sys.argv[1:])
