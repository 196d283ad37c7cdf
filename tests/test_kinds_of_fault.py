"""Kinds of files and runs that other tools get wrong, from the command to the result: `pytest -v` prints each verdict.

Each kind makes a small file of its own and runs a recipe on it.  A kind that can be read has a fact of run.json (or of
what was printed) as its right value; any other has the one error that names it.
"""

import bz2
import contextlib
import csv
import gzip
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from PIL import Image

from bmtk.errors import UserError
from recipes import finetune

ROOT = Path(__file__).parent.parent
ANIMALS = ("cat", "dog")
QUICK = ["--preset", "smoke", "--max_steps", "1", "--disable_tqdm", "true"]
rng = np.random.default_rng(3)


@dataclass(frozen=True)
class Kind:
    """A kind of input: the files of one, the options that read it, and what has to come of it."""

    write: Callable[[Path], list[str]]  # makes files in a folder, and returns the options
    printed: str = ""  # a part of what is printed
    error: str = ""  # or of the error that it ends with
    labels: list[str] = field(default_factory=list)
    rows: int = 0  # training and validation rows together


def sentences(count: int = 40) -> list[tuple[str, str]]:
    return [(f"the {ANIMALS[row % 2]} of house {row} sleeps", ANIMALS[row % 2]) for row in range(count)]


def table(name: str, *, delimiter: str = ",", encoding: str = "utf-8", change: Callable | None = None) -> Callable:
    """Writes the sentences as a table; `change(rows)` returns others."""

    def write(folder: Path) -> list[str]:
        rows = [("text", "label"), *(change or list)(sentences())]
        with (folder / name).open("w", encoding=encoding, newline="") as file:
            if name.endswith(".tsv"):
                file.writelines("\t".join(row) + "\n" for row in rows)
            else:
                csv.writer(file, delimiter=delimiter).writerows(rows)
        return ["--dataset", str(folder / name)]

    return write


def raw(name: str, text: str | bytes, *options: str) -> Callable:
    def write(folder: Path) -> list[str]:
        (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
        return ["--dataset", str(folder / name), *options]

    return write


def json_lines(name: str, rows: list[dict[str, Any]], *options: str) -> Callable:
    return raw(name, "".join(json.dumps(row) + "\n" for row in rows), *options)


def labelled(label: Callable[[int], Any]) -> list[dict[str, Any]]:
    return [{"text": text, "label": label(row)} for row, (text, _) in enumerate(sentences())]


def first_cell(text: str) -> Callable:
    return lambda rows: [(text, rows[0][1]), *rows[1:]]


def plain() -> str:
    return "text,label\n" + "".join(f"{text},{label}\n" for text, label in sentences())


def parquet_of_bytes(folder: Path) -> list[str]:
    columns = {"text": [text.encode() for text, _ in sentences()], "label": [label for _, label in sentences()]}
    pa.parquet.write_table(pa.table(columns), folder / "rows.parquet")
    return ["--dataset", str(folder / "rows.parquet")]


def images(folder: Path, name: str, *, deep: bool = False) -> None:
    """Ten dark and ten bright pictures of 16 x 16, of 8 or 16 bits."""
    for number in range(10):
        for label, level in zip(("dark", "bright"), (30, 200), strict=True):
            path = folder / name / label / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = rng.integers(level, level + 20, (16, 16))
            Image.fromarray((pixels * 257).astype(np.uint16) if deep else pixels.astype(np.uint8)).save(path)


PICTURES = ["--task", "image_classification"]


def deep_images(folder: Path) -> list[str]:
    images(folder, "deep/train", deep=True)
    return [*PICTURES, "--dataset", str(folder / "deep")]


def stray_files(folder: Path) -> list[str]:
    images(folder, "stray/train")
    hidden = folder / "stray" / "train" / ".ipynb_checkpoints"
    hidden.mkdir()
    Image.new("L", (16, 16)).save(hidden / "0-checkpoint.png")
    (folder / "stray" / "train" / "dark" / "._0.png").write_bytes(b"\0" * 64)
    (folder / "stray" / "train" / "dark" / "new.heic").write_bytes(b"\0" * 64)
    return [*PICTURES, "--dataset", str(folder / "stray")]


def corner_boxes(folder: Path) -> list[str]:
    (folder / "boxes" / "train").mkdir(parents=True)
    rows = []
    for number in range(12):
        Image.fromarray(rng.integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(folder / f"boxes/train/{number}.png")
        box = [18, 16, 31 - number % 3, 30]  # left, top, right, bottom: as sizes they would reach beyond the picture
        rows.append({"file_name": f"{number}.png", "objects": {"bbox": [box], "category": ["cell"]}})
    (folder / "boxes" / "train" / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return ["--task", "object_detection", "--dataset", str(folder / "boxes")]


def series(stamps: list[Any], *options: str) -> Callable:
    values = [round(float(np.sin(step / 4)), 3) for step in range(len(stamps))]
    text = "time,load\n" + "".join(f"{stamp},{value}\n" for stamp, value in zip(stamps, values, strict=True))
    sizes = ["--context_length", "24", "--prediction_length", "6"]
    return raw("series.csv", text, "--task", "time_series_forecasting", *sizes, *options)


def hours(pattern: str, start: str = "2024-01-03") -> list[str]:
    return [f"{datetime.fromisoformat(start) + timedelta(hours=step):{pattern}}" for step in range(400)]


def seconds() -> list[int]:
    return [int(datetime(2024, 1, 3, tzinfo=timezone.utc).timestamp()) + 3600 * step for step in range(400)]


def days(pattern: str, count: int = 400) -> list[str]:
    return [f"{datetime(2024, 1, 3) + timedelta(days=step):{pattern}}" for step in range(count)]


HOURLY = "2024-01-03 00:00:00 to 2024-01-19 15:00:00, a step is 1 hour"
DAILY = "2024-01-03 00:00:00 to 2025-02-05 00:00:00, a step is 1 day"
READ = {
    "a cell of TSV begins with a quote": Kind(table("x.tsv", change=first_cell('"Ah, the cat')), rows=40),
    "a cell of CSV holds a line break": Kind(table("x.csv", change=first_cell("a\ncat")), "line break", rows=40),
    "a cell of 300,000 characters": Kind(table("x.csv", change=first_cell("cat " * 75_000)), rows=40),
    "semicolons": Kind(table("x.csv", delimiter=";"), rows=40),
    "pipes, by option": Kind(lambda folder: [*table("x.csv", delimiter="|")(folder), "--delimiter", "pipe"], rows=40),
    "UTF-16 with a mark": Kind(table("x.csv", encoding="utf-16"), rows=40),
    "Cyrillic, by option": Kind(
        lambda folder: [
            *table("x.csv", encoding="windows-1251", change=first_cell("кот спит"))(folder),
            "--encoding",
            "windows-1251",
        ],
        rows=40,
    ),
    "capital suffix, gzip": Kind(raw("X.CSV.GZ", gzip.compress(plain().encode())), rows=40),
    "bzip2": Kind(raw("x.csv.bz2", bz2.compress(plain().encode())), rows=40),
    "labels that look like dates": Kind(
        json_lines("x.jsonl", labelled(lambda row: f"2024-01-0{5 + row % 2}")),
        labels=["2024-01-05", "2024-01-06"],
    ),
    "labels beyond 2^53": Kind(
        json_lines("x.jsonl", labelled(lambda row: 2**53 + row % 2)),
        labels=[str(2**53), str(2**53 + 1)],
    ),
    "labels with blanks": Kind(
        table("x.csv", change=lambda rows: [(rows[0][0], "cat "), *rows[1:]]), "blanks", labels=["cat", "dog"]
    ),
    "text as bytes in Parquet": Kind(parquet_of_bytes, rows=40),
    "pictures of 16 bits": Kind(deep_images, "range", labels=["bright", "dark"], rows=20),
    "hidden and stray files": Kind(stray_files, "1 .heic", labels=["bright", "dark"], rows=20),
    "Unix seconds": Kind(series(seconds()), HOURLY),
    "midnight without a time": Kind(series([s.removesuffix(" 00:00:00") for s in hours("%Y-%m-%d %H:%M:%S")]), HOURLY),
    "the same time twice": Kind(
        series([*hours("%Y-%m-%d %H:%M")[:399], "2024-01-03 05:00"]), "repeated (first: 2024-01-03 05:00"
    ),
    "whole numbers as days": Kind(series(days("%Y%m%d")), DAILY),
    "day first, where a day decides": Kind(series(days("%d.%m.%Y")), DAILY),
}  # fmt: skip
REFUSED = {
    "a column twice": Kind(raw("x.csv", "text,label,label\na,b,c\n" * 9), error="names a column twice: 'label'"),
    "a quote left open": Kind(raw("x.csv", plain() + '"the cat,cat\n' * 3), error=r"x\.csv.*line 4[1-4]"),
    "Windows-1252 without an option": Kind(
        table("x.csv", encoding="windows-1252", change=first_cell("süße Katze")), error="--encoding windows-1252"
    ),
    "a list that is not closed": Kind(
        raw("x.csv", "tokens,tags\n" + "\"['Ada', 'left'\",\"['B-a', 'O']\"\n" * 30, "--task", "token_classification"),
        error="holds a list that was printed as text",
    ),
    "a damaged archive": Kind(
        raw("x.csv.gz", gzip.compress(plain().encode())[:-40]), error="compressed file .* is damaged"
    ),
    "an Excel workbook called CSV": Kind(raw("x.csv", b"PK\x03\x04" + bytes(99)), error="zip archive or an Excel"),
    "boxes by their corners": Kind(corner_boxes, error="box_format"),
    "days that may be months": Kind(
        series([f"0{1 + step % 9}/0{1 + step // 9 % 9}/20{10 + step // 81}" for step in range(400)]),
        error="time_format",
    ),
    "an integration that is not there": Kind(
        lambda folder: [*table("x.csv")(folder), "--report_to", "tensorboard"], error="tensorboard"
    ),
    "a pattern where a file is wanted": Kind(
        lambda folder: ["--train_file", f"{folder}/no*.csv"], error="matches no file that ends in"
    ),
}


def run(folder: Path, *options: str) -> dict[str, Any]:
    """What run.json holds after a run in `folder`/run."""
    with contextlib.chdir(ROOT):
        finetune.main([*options, *QUICK, "--output_dir", str(folder / "run")])
    found: dict[str, Any] = json.loads((folder / "run" / "run.json").read_text(encoding="utf-8"))
    return found


@pytest.mark.parametrize("name", READ)
def test_it_is_read_as_what_it_is(name, tmp_path, capsys):
    kind = READ[name]
    found = run(tmp_path, *kind.write(tmp_path))
    assert kind.printed in capsys.readouterr().out
    config = json.loads((tmp_path / "run" / "config.json").read_text(encoding="utf-8"))
    assert not kind.labels or sorted(config["label2id"]) == kind.labels
    assert not kind.rows or found["data"]["train"]["rows"] + found["data"]["validation"]["rows"] == kind.rows


@pytest.mark.parametrize("name", REFUSED)
def test_it_is_refused_by_one_error_that_names_it(name, tmp_path):
    kind = REFUSED[name]
    with pytest.raises((UserError, OSError), match=kind.error) as error:
        run(tmp_path, *kind.write(tmp_path))
    assert len(str(error.value).splitlines()) <= 2
    assert not (tmp_path / "run").exists(), "nothing is half there"
