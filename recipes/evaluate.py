"""Evaluate a saved model, adapter or Hub model on labelled data: print a table and write metrics.json.

    accelerate launch recipes/evaluate.py --model outputs/sst2                        # on its own test rows
    accelerate launch recipes/evaluate.py --model outputs/sst2 --test_file other.csv
    accelerate launch recipes/evaluate.py --model user/name --dataset owner/name --split validation

Data options default to those in the model's recipe.yaml; the command line overrides them.
"""

import sys

from bmtk.start import begin, imported

if __name__ == "__main__":  # before the imports that take seconds
    begin(__file__, __doc__, sys.argv[1:])

import dataclasses
import logging
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import datasets
import transformers
from accelerate import Accelerator

import bmtk  # noqa: F401  registers the model families
from bmtk import arguments
from bmtk.errors import UserError
from bmtk.files import write_json
from bmtk.hub import run_record, summary
from bmtk.process import clean_errors
from bmtk.tasks import task_named
from bmtk.training.evaluation import predict_all
from bmtk.training.signals import ending_signals
from bmtk.training.trained_model import TrainedModel

OF_TRAINING = (
    "tokenizer",
    "vocab_size",
    "packing",
    "validation_fraction",
    "leakage",
)  # data settings that a finished model has no use for
SOURCES = ("dataset", "corpora", "train_file", "validation_file", "test_file", "data_name", "data_licence")


@dataclass
class EvaluationArguments:
    """Which model, which rows."""

    _argument_group_name = "evaluation"

    model: str | None = field(default=None, metadata={"help": "folder or Hub id of the model or adapter"})
    split: Literal["test", "validation", "train"] = field(
        default="test", metadata={"help": "rows to evaluate on: test, validation or train"}
    )
    batch_size: int = field(default=64, metadata={"help": "rows per process and forward pass; changes no result"})
    output: str | None = field(
        default=None, metadata={"help": "file for the metrics; default: metrics.json in the model's folder, or here"}
    )
    config: str | None = field(default=None, metadata={"help": "YAML file of this evaluation"})
    task: str | None = field(default=None, metadata={"help": "what the model does; default: what its run.json says"})
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Run model code from the Hub or folder: only for sources you have read"}
    )


def read_arguments(argv: list[str]) -> tuple[EvaluationArguments, Any]:
    """The model and the rows; what is left out is taken from the run that made the model."""
    values = arguments.RunConfig({}, argv)
    if values.get("config"):
        path = Path(str(values.get("config")))
        values = arguments.RunConfig(arguments.read_yaml(path), argv, path)
    if not values.get("model") and not {"-h", "--help"} & set(argv):
        raise UserError("model is not set: name the folder or Hub id of the model to evaluate")
    folder = Path(str(values.get("model")))
    is_ours = (folder / run_record.RUN_RECORD).is_file()
    trained_for = run_record.RunRecord.read(folder).task if is_ours else "sequence_classification"
    task = task_named(values.get("task", trained_for))
    recipe = arguments.read_yaml(folder / "recipe.yaml") if (folder / "recipe.yaml").is_file() else {}
    known = {f.name for f in dataclasses.fields(task.arguments)} - set(OF_TRAINING)
    trained_on = Path(str(recipe.get("dataset"))).is_file() and not task.data.cuts_one_table
    if any(values.get(key) for key in SOURCES) or trained_on:
        # Other rows; and a single file was trained on, unless the task cuts it.
        known -= {*SOURCES, "delimiter", "encoding"}
    values.file_values = {**{key: value for key, value in recipe.items() if key in known}, **values.file_values}
    evaluation, data_args = values.bind([EvaluationArguments, task.arguments], description=__doc__)
    evaluation.task = task.name
    return evaluation, data_args


def main(argv: list[str]) -> None:
    datasets.disable_progress_bars()
    transformers.logging.disable_progress_bar()
    evaluation, data_args = read_arguments(argv)
    loading = {"trust_remote_code": True} if evaluation.trust_remote_code else {}
    trained = TrainedModel(str(evaluation.model), **loading)
    reading = {"model": evaluation.model, "splits": [evaluation.split], **loading}
    data = task_named(evaluation.task).read(data_args, **reading)
    if evaluation.split not in data.rows:
        raise UserError(f"the data have no labelled {evaluation.split} rows; choose another split, or name a file")
    objective = data.bind(trained.config, labels=trained.labels)
    accelerator = Accelerator()
    model, rows = trained.load(objective.auto_class).to(accelerator.device), objective.rows[evaluation.split]
    share = {"rank": accelerator.process_index, "world_size": accelerator.num_processes}
    batches = objective.batches_in_order(rows, batch_size=evaluation.batch_size, **share)
    num_batches = -(-len(rows) // evaluation.batch_size // accelerator.num_processes)
    started = time.perf_counter()
    predictions = predict_all(model, batches, accelerator, objective.scorer.predict, num_batches=num_batches)
    speed = len(rows) / (time.perf_counter() - started)
    if accelerator.is_main_process:
        scores = objective.scorer.score(predictions, rows) | objective.scorer.baselines(predictions, rows)
        metrics = {f"{evaluation.split}/{name}": value for name, value in scores.items()}
        print("".join(f"note: {line}\n" for line in objective.notes), end="")
        print(objective.scorer.table(predictions, rows))
        lines = [(key.replace("/", " ").replace("_", " "), value) for key, value in metrics.items()]
        print(summary.text_table([*lines, ("rows per second", speed)]))
        print(f"written to {write_metrics(evaluation, objective.data_record(), metrics, speed)}")


def write_metrics(
    evaluation: EvaluationArguments, data: dict[str, object], metrics: dict[str, float], speed: float
) -> Path:
    folder = Path(str(evaluation.model))
    path = Path(evaluation.output or (folder if folder.is_dir() else Path.cwd()) / "metrics.json")
    content = {"model": evaluation.model, "task": evaluation.task, "data": data, "metrics": metrics}
    content["inference"] = {"rows_per_second": speed}
    write_json(path, {"at": run_record.now(), **content})
    return path


if __name__ == "__main__":
    imported()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    with clean_errors(), ending_signals():
        main(sys.argv[1:])
