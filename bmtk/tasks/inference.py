"""Rows that predictions are wanted for, and the file that the predictions go to."""

import csv
import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TextIO

from datasets import Dataset

from bmtk.data.tables import read_all
from bmtk.errors import UserError
from bmtk.files import replacing

from .task import Task

SUFFIXES = (".csv", ".jsonl")
LONGEST_CELL = 1000  # characters of an input that are repeated beside its prediction


def read_inputs(source: str) -> Dataset:
    """The rows of a table, or one for each image or recording of a folder.  Raises: as `read_all`."""
    return read_all(source, option="input")


class PredictionFile:
    """A line of CSV or JSON for each row, written beside its final place until it is whole.

    Opened as a context: what an error leaves unfinished is removed, and a former file stays as it was.

    Raises: UserError for another kind of file, FileNotFoundError if its folder does not exist.
    """

    def __init__(self, path: str):
        self.path, self.count = Path(path), 0
        if self.path.suffix not in SUFFIXES:
            raise UserError(f"output={path!r} must end in one of {', '.join(SUFFIXES)}")
        if not self.path.parent.is_dir():
            raise FileNotFoundError(f"the folder of output={path!r} does not exist; make it first")
        self.opened = ExitStack()
        self.file: TextIO | None = None
        self.writer: csv.DictWriter[str] | None = None

    def __enter__(self) -> "PredictionFile":
        beside = self.opened.enter_context(replacing(self.path))
        self.file = self.opened.enter_context(beside.open("w", encoding="utf-8", newline=""))
        return self

    def write(self, row: dict[str, object]) -> None:
        assert self.file is not None, "only inside of the context"
        if self.path.suffix == ".jsonl":
            self.file.write(json.dumps(row, ensure_ascii=False) + "\n")
        else:
            if self.writer is None:
                self.writer = csv.DictWriter(self.file, list(row))
                self.writer.writeheader()
            self.writer.writerow({key: _cell(value) for key, value in row.items()})
        self.count += 1

    def __exit__(self, *failure: Any) -> None:
        self.opened.__exit__(*failure)


class PictureFolder:
    """Images with what was predicted drawn over them, named after the number and the file of their row.

    Raises: ValueError if the task draws nothing, or files of another run could be mistaken for this one's.
    """

    def __init__(self, path: str, task: Task):
        self.path = Path(path)
        if not task.scorer.draws_images:
            raise UserError(f"pictures={path!r}: there is nothing to draw for {task.name}; leave pictures out")
        if self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir())):
            raise UserError(f"pictures={path!r} is not an empty folder; name another, or empty it")
        self.path.mkdir(parents=True, exist_ok=True)

    def save(self, image: Any, number: int, row: dict[str, object]) -> str:
        """The path of the written file, a PNG."""
        names = (value["path"] for value in row.values() if isinstance(value, dict) and value.get("path"))
        name = "_".join([f"{number:05}", *(Path(path).stem for path in names)])
        image.save(self.path / f"{name}.png")
        return str(self.path / f"{name}.png")


def shown(row: dict[str, Any]) -> dict[str, object]:
    """What of an input row is repeated: texts (their beginnings), words, numbers, paths; not pixels or samples."""
    shown: dict[str, object] = {}
    for name, value in row.items():
        if isinstance(value, dict) and isinstance(value.get("path"), str):
            value = value["path"]
        if isinstance(value, str):
            value = value[:LONGEST_CELL]
        if isinstance(value, dict) and all(isinstance(text, str) for text in value.values()):  # a text and its like
            shown[name] = {key: text[:LONGEST_CELL] for key, text in value.items()}
        words = isinstance(value, list) and all(isinstance(item, str) for item in value)
        if value is None or words or isinstance(value, str | int | float | bool):
            shown[name] = value
    return shown


def _cell(value: object) -> object:
    return json.dumps(value, ensure_ascii=False) if isinstance(value, list | dict) else value
