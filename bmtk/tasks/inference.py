"""Rows that predictions are wanted for, and the file that the predictions go to."""

import csv
import datetime
import json
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TextIO

from datasets import Dataset

from bmtk.data.tables import AS_FOUND, files_read, read_all
from bmtk.data.text_files import TableFormat
from bmtk.errors import UserError
from bmtk.files import replacing

from .task import Task

SUFFIXES = (".csv", ".jsonl")
LONGEST_CELL = 1000  # characters of an input that are repeated beside its prediction
FORMULAS = ("=", "+", "-", "@", "\t", "\r")  # what spreadsheets compute instead of showing it


def read_inputs(source: str, layout: TableFormat = AS_FOUND, notes: list[str] | None = None) -> Dataset:
    """The rows of a table, or one for each image or recording of a folder.  Raises: as `read_all`."""
    return read_all(source, option="input", layout=layout, notes=notes)


def refuse_to_overwrite(source: str, output: str) -> None:
    """Raise UserError if `output` is a file that is read as input, under whatever name or link."""
    path = Path(output).expanduser()
    if path.exists() and any(file.exists() and file.samefile(path) for file in files_read(source)):
        raise UserError(f"output={output!r} is one of the files of input={source!r}; name another file")


class PredictionFile:
    """A line of CSV or JSON for each row, written beside its final place until it is whole.

    A CSV file has the columns of all rows: its lines are kept in a temporary file until the last is known.
    Opened as a context: what an error leaves unfinished is removed, and a former file stays as it was.

    Raises: UserError for another kind of file or one that cannot be written, FileNotFoundError if its folder does not
    exist.
    """

    def __init__(self, path: str, *, spreadsheet_safe: bool = False):
        """With `spreadsheet_safe`, an apostrophe goes before texts of a CSV that begin as formulas do."""
        self.path, self.count, self.spreadsheet_safe = Path(path), 0, spreadsheet_safe
        self.suffix = self.path.suffix.lower()
        if self.suffix not in SUFFIXES:
            raise UserError(f"output={path!r} must end in one of {', '.join(SUFFIXES)}")
        if not self.path.parent.is_dir():
            raise FileNotFoundError(f"the folder of output={path!r} does not exist; make it first")
        self.opened = ExitStack()
        self.file: TextIO | None = None
        self.lines: TextIO | None = None  # of a CSV, as JSON
        self.columns: dict[str, None] = {}
        self.num_formulas = 0

    def __enter__(self) -> "PredictionFile":
        beside = self.opened.enter_context(replacing(self.path))
        try:
            self.file = self.opened.enter_context(beside.open("w", encoding="utf-8", newline=""))
        except OSError as error:
            place = f"output={str(self.path)!r} cannot be written ({error.strerror})"
            raise UserError(f"{place}; choose a file that you may write") from error
        self.lines = self.file
        if self.suffix == ".csv":
            self.lines = self.opened.enter_context(tempfile.TemporaryFile("w+", encoding="utf-8", newline="\n"))
        return self

    def write(self, row: dict[str, object]) -> None:
        assert self.lines is not None, "only inside of the context"
        self.columns |= dict.fromkeys(row)
        self.lines.write(json.dumps(row, ensure_ascii=False) + "\n")
        self.count += 1

    @property
    def notes(self) -> list[str]:
        """What users of a spreadsheet should know."""
        if not self.num_formulas:
            return []
        done = "an apostrophe stands before them" if self.spreadsheet_safe else "--spreadsheet_safe quotes them"
        return [f"{self.num_formulas:,} cells of {self.path} begin as formulas do, which a spreadsheet runs: {done}"]

    def __exit__(self, *failure: Any) -> None:
        try:
            if failure[0] is None and self.suffix == ".csv":
                self._write_table()
        except BaseException as error:  # the unfinished file must not replace the former one
            self.opened.__exit__(type(error), error, error.__traceback__)
            raise
        self.opened.__exit__(*failure)

    def _write_table(self) -> None:
        assert self.file is not None, "only inside of the context"
        assert self.lines is not None, "only inside of the context"
        writer = csv.DictWriter(self.file, list(self.columns))
        if self.count:
            writer.writeheader()
        self.lines.seek(0)
        for line in self.lines:
            writer.writerow({key: self._cell(value) for key, value in json.loads(line).items()})

    def _cell(self, value: object) -> object:
        if isinstance(value, list | dict):
            return json.dumps(value, ensure_ascii=False)
        if isinstance(value, str) and value.startswith(FORMULAS) and not _is_number(value):
            self.num_formulas += 1
            return f"'{value}" if self.spreadsheet_safe else value
        return value


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
        if "picture" in row:
            raise UserError("the input has a column of its own called picture; rename or remove it")
        names = (value["path"] for value in row.values() if isinstance(value, dict) and value.get("path"))
        name = "_".join([f"{number:05}", *(Path(path).stem for path in names)])
        image.save(self.path / f"{name}.png")
        return str(self.path / f"{name}.png")


def beside_inputs(row: dict[str, Any], predicted: dict[str, object]) -> dict[str, object]:
    """What is repeated of an input row, and its prediction.

    Raises: UserError if the row has a column that is called like one of the prediction.
    """
    taken = sorted(row.keys() & predicted.keys())
    if taken:
        raise UserError(
            f"the input has columns of its own called {', '.join(taken)}, the names of what is predicted; rename or "
            "remove them"
        )
    return {**shown(row), **predicted}


def shown(row: dict[str, Any]) -> dict[str, object]:
    """What of an input row is repeated: texts (their beginnings), words, numbers, times, paths, short structures;
    not pixels or samples."""
    shown: dict[str, object] = {}
    for name, value in row.items():
        if isinstance(value, dict) and isinstance(value.get("path"), str):
            value = value["path"]
        if isinstance(value, datetime.date | datetime.time | datetime.datetime):
            value = value.isoformat()
        if isinstance(value, str):
            value = value[:LONGEST_CELL]
        words = isinstance(value, list) and all(isinstance(item, str) for item in value)
        if isinstance(value, dict) and value and all(isinstance(text, str) for text in value.values()):
            value = {key: text[:LONGEST_CELL] for key, text in value.items()}  # a text and its like
            words = True
        if value is None or words or isinstance(value, str | int | float | bool) or _is_short(value):
            shown[name] = value
    return shown


def _is_short(value: object) -> bool:
    """Whether a structure is small enough to be repeated, and can be written as JSON."""
    try:
        return len(json.dumps(value)) <= LONGEST_CELL
    except (TypeError, ValueError):  # bytes and the like
        return False


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
