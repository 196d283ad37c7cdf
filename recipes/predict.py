"""Predict with a saved model, adapter or Hub model for rows, images or recordings; write CSV or JSON lines.

    accelerate launch recipes/predict.py --model outputs/sst2 --input reviews.csv
    accelerate launch recipes/predict.py --model outputs/fashion --input photographs/ --output labels.jsonl
    accelerate launch recipes/predict.py --model outputs/bccd --input photographs/ --pictures drawn/

Each line of the output is a row of the input with its prediction; for series, a future step.  Data options (names of
columns, lengths) default to those in the model's recipe.yaml; the command line overrides them.
"""

import sys

from bmtk.start import begin, imported

if __name__ == "__main__":  # before the imports that take seconds
    begin(__file__, __doc__, sys.argv[1:])

import dataclasses
import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from accelerate import Accelerator
from transformers import set_seed

import bmtk  # noqa: F401  registers the model families
from bmtk import arguments
from bmtk.errors import UserError
from bmtk.hub import run_record
from bmtk.process import clean_errors
from bmtk.tasks import task_named
from bmtk.tasks.inference import PictureFolder, PredictionFile, read_inputs, refuse_to_overwrite
from bmtk.tasks.scorer import Scorer
from bmtk.tasks.task import Prediction
from bmtk.training.progress import Bar
from bmtk.training.signals import ending_signals
from bmtk.training.trained_model import TrainedModel
from bmtk.training.updates import on_device

# Data settings of a training run that do not concern rows to be predicted.
OF_TRAINING = (
    "tokenizer",
    "vocab_size",
    "packing",
    "dataset",
    "corpora",
    "train_file",
    "validation_file",
    "test_file",
    "validation_fraction",
    "delimiter",
    "encoding",
)


@dataclass
class PredictionArguments:
    """Which model, which rows, where to."""

    _argument_group_name = "prediction"

    model: str | None = field(default=None, metadata={"help": "folder or Hub id of the model or adapter"})
    input: str | None = field(
        default=None,
        metadata={"help": "rows (.csv, .tsv, .jsonl, .json, .parquet), one image or recording, or a folder"},
    )
    output: str = field(default="predictions.csv", metadata={"help": "file to write: .csv or .jsonl"})
    spreadsheet_safe: bool = field(
        default=False, metadata={"help": "in .csv, put an apostrophe before texts that a spreadsheet would run: =1+1"}
    )
    pictures: str | None = field(
        default=None, metadata={"help": "empty or new folder for the images with predicted boxes drawn over them"}
    )
    batch_size: int = field(
        default=32, metadata={"help": "rows per forward pass; changes no result but texts that are sampled"}
    )
    seed: int = field(default=42, metadata={"help": "seed of texts that are sampled, as by causal language models"})
    task: str | None = field(default=None, metadata={"help": "what the model does; default: what its run.json says"})
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Run model code from the Hub or folder: only for sources you have read"}
    )


def read_arguments(argv: list[str]) -> tuple[PredictionArguments, Any]:
    """The model and the rows; how rows are read is taken from the run that made the model."""
    values = arguments.RunConfig({}, argv)
    needed = {"model": "the folder or Hub id of a model", "input": "the file or folder to read"}
    unset = [] if {"-h", "--help"} & set(argv) else [key for key in needed if not values.get(key)]
    if unset:
        raise UserError(f"{unset[0]} is not set: name {needed[unset[0]]}")
    folder = Path(str(values.get("model")))
    is_ours = (folder / run_record.RUN_RECORD).is_file()
    trained_for = run_record.RunRecord.read(folder).task if is_ours else "sequence_classification"
    task = task_named(values.get("task", trained_for))
    recipe = arguments.read_yaml(folder / "recipe.yaml") if (folder / "recipe.yaml").is_file() else {}
    known = {f.name for f in dataclasses.fields(task.arguments)} - set(OF_TRAINING)
    values.file_values = {key: value for key, value in recipe.items() if key in known}
    prediction, data_args = values.bind([PredictionArguments, task.arguments], description=__doc__)
    prediction.task = task.name
    return prediction, data_args


@torch.no_grad()
def main(argv: list[str]) -> None:
    datasets.disable_progress_bars()
    transformers.logging.disable_progress_bar()
    args, data_args = read_arguments(argv)
    loading = {"trust_remote_code": True} if args.trust_remote_code else {}
    refuse_to_overwrite(str(args.input), args.output)
    notes: list[str] = []
    table = read_inputs(str(args.input), data_args.layout, notes)
    output = PredictionFile(args.output, spreadsheet_safe=args.spreadsheet_safe)
    pictures = PictureFolder(args.pictures, task_named(args.task)) if args.pictures else None
    trained = TrainedModel(str(args.model), **loading)
    data = task_named(args.task).read(data_args, model=args.model, splits=(), **loading)
    objective = data.bind(trained.config, labels=trained.labels)
    table = data.readable_rows(table, "input")
    accelerator = Accelerator()
    model = trained.load(objective.auto_class).to(accelerator.device).eval()
    rows = objective.encode_inputs(table)
    batches = objective.batches_in_order(rows, batch_size=args.batch_size)
    scorer = objective.scorer
    set_seed(args.seed)
    with output, Bar(total=len(rows), desc="predicting", unit="row") as bar:
        for batch in batches:
            predictions = scorer.predict(model, on_device(batch, accelerator.device))
            write(predictions, int(bar.n), scorer, (rows, table), output, pictures)
            bar.update(len(predictions))
    print("".join(f"note: {line}\n" for line in [*notes, *objective.notes, *output.notes]), end="")
    print(f"{output.count:,} predictions written to {output.path}")


def write(
    predictions: list[Prediction],
    first: int,
    scorer: Scorer,
    read: tuple[Any, datasets.Dataset],
    output: PredictionFile,
    pictures: PictureFolder | None,
) -> None:
    """Write the lines of some predictions, of which the first is that of row `first`, and their pictures.

    `read` is the rows, encoded and as they were in the input.
    """
    rows, table = read
    for index, prediction in enumerate(predictions, first):
        drawn = pictures and pictures.save(scorer.annotated_image(prediction, index, rows), index + 1, table[index])
        for line in scorer.lines(prediction, index, rows, table):
            output.write({**line, "picture": drawn} if drawn else line)


if __name__ == "__main__":
    imported()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    with clean_errors(), ending_signals():
        main(sys.argv[1:])
