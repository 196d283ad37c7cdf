"""Predict with a saved model, adapter or Hub model for rows, images or recordings; write CSV or JSON lines.

    accelerate launch recipes/predict.py --model outputs/sst2 --input reviews.csv
    accelerate launch recipes/predict.py --model outputs/fashion --input photographs/ --output labels.jsonl
    accelerate launch recipes/predict.py --model outputs/bccd --input photographs/ --pictures drawn/

Each line of the output is a row of the input with its prediction; for series, a future step.  Data options (names of
columns, lengths) default to those in the model's recipe.yaml; the command line overrides them.
"""

import dataclasses
import logging
import sys
from dataclasses import dataclass, field
from pathlib import Path

import datasets
import torch
import transformers
from accelerate import Accelerator
from tqdm.auto import tqdm
from transformers import set_seed

import bmtk  # noqa: F401  registers the model families
from bmtk import arguments
from bmtk.hub import run_record
from bmtk.tasks import task_named
from bmtk.tasks.inference import PictureFolder, PredictionFile, read_inputs
from bmtk.training import finetuning
from bmtk.training.updates import on_device

# Data settings of a training run that do not concern rows to be predicted.
OF_TRAINING = (
    "tokenizer",
    "vocab_size",
    "dataset",
    "train_file",
    "validation_file",
    "test_file",
    "validation_fraction",
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


def read_arguments(argv: list[str]) -> tuple[PredictionArguments, object]:
    """The model and the rows; how rows are read is taken from the run that made the model."""
    values = arguments.RunConfig({}, argv)
    if not {"-h", "--help"} & set(argv):
        for key, what in (("model", "the folder or Hub id of a model"), ("input", "the file or folder to read")):
            if not values.get(key):
                raise ValueError(f"{key} is not set: name {what}")
    folder = Path(str(values.get("model")))
    run = run_record.read_run(folder) if (folder / "run.json").is_file() else {}
    task_class = task_named(values.get("task", run.get("task", "sequence_classification")))
    recipe = arguments.read_yaml(folder / "recipe.yaml") if (folder / "recipe.yaml").is_file() else {}
    known = {f.name for f in dataclasses.fields(task_class.arguments)} - set(OF_TRAINING)
    values.file_values = {key: value for key, value in recipe.items() if key in known}
    prediction, data_args = values.bind([PredictionArguments, task_class.arguments], description=__doc__)
    prediction.task = task_class.name
    return prediction, data_args


@torch.no_grad()
def main(argv: list[str]) -> None:
    datasets.disable_progress_bars()
    transformers.logging.disable_progress_bar()
    args, data_args = read_arguments(argv)
    loading = {"trust_remote_code": True} if args.trust_remote_code else {}
    table = read_inputs(args.input)
    output = PredictionFile(args.output)
    pictures = PictureFolder(args.pictures, task_named(args.task)) if args.pictures else None
    trained = finetuning.TrainedModel(args.model, **loading)
    task = task_named(args.task)(data_args, model=args.model, splits=(), **loading)
    task.configure(trained.config, labels=trained.labels)
    table = task.usable(table, "input")
    accelerator = Accelerator()
    model = trained.load(task.auto_class).to(accelerator.device).eval()
    rows = task.encode_inputs(table)
    batches = task.batches_in_order(rows, batch_size=args.batch_size)
    set_seed(args.seed)
    with output, tqdm(total=len(rows), desc="predicting", unit="row") as bar:
        for batch in batches:
            predictions = task.predict(model, on_device(batch, accelerator.device))
            for index, prediction in enumerate(predictions, bar.n):
                drawn = pictures and pictures.save(task.drawn(prediction, index, rows), index + 1, table[index])
                for line in task.lines(prediction, index, rows, table):
                    output.write({**line, "picture": drawn} if drawn else line)
            bar.update(len(predictions))
    print("".join(f"note: {line}\n" for line in task.notes), end="")
    print(f"{output.count:,} predictions written to {output.path}")


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    with arguments.clean_errors():
        main(sys.argv[1:])
