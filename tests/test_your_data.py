"""docs/your_data.md: its example rows are read by its commands."""

import ast
import csv
import io
import json
import re
import shlex
import wave
from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bmtk.tasks import TASKS
from recipes import finetune, pretrain

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "your_data.md").read_text(encoding="utf-8")
FILE = re.compile(r"^```(csv|jsonl|json|txt|text)(?: (\S+))?\n(.*?)^```", re.MULTILINE | re.DOTALL)
SECTIONS = [section for section in re.split(r"^## ", PAGE, flags=re.MULTILINE) if "```bash" in section]
COMMANDS = [
    (section, line)
    for section in SECTIONS
    for line in re.search(r"^```bash\n(.*?)^```", section, re.MULTILINE | re.DOTALL)[1].splitlines()
]
COPIES = 24  # of two rows: enough that some can be held out
NUM_STEPS = 4000  # of a series
RECIPES = {"finetune": finetune.main, "pretrain": pretrain.main}
rng = np.random.default_rng(0)


def varied(value, copy: int):
    """Another value like `value`: lines of sentences end in the number `copy`, a list of words gains one."""
    if isinstance(value, dict):
        return {key: inner if key in ("answers", "objects") else varied(inner, copy) for key, inner in value.items()}
    if isinstance(value, list) and isinstance(value[0], str):
        return [*value, "O" if value[0][:2] in ("B-", "O") else f"word{copy}"]
    if isinstance(value, list) and isinstance(value[0], dict):
        return [varied(inner, copy) for inner in value]
    if isinstance(value, str) and value.startswith("["):
        return str(varied(ast.literal_eval(value), copy))
    if isinstance(value, str) and re.fullmatch(r"\d+\.(png|wav)", value):
        return f"{copy}_{value}"
    return re.sub("$", f" {copy}", value, flags=re.MULTILINE) if isinstance(value, str) and " " in value else value


def continued(rows: list[dict], copies: int) -> list[dict]:
    """More rows like those of the page; a series goes on hour by hour, or is a longer list."""
    if "time" in rows[0]:
        first = datetime.fromisoformat(rows[0]["time"])
        return [
            {name: round(10 + rng.random(), 2) for name in rows[0]}
            | {"time": f"{first + timedelta(hours=step):%Y-%m-%d %H:%M}"}
            for step in range(NUM_STEPS)
        ]
    if "load" in rows[0]:
        return [row | {"load": rng.random(NUM_STEPS).round(2).tolist()} for row in rows]
    same = [{key: row[key] for key in ("start", "freq") if key in row} for row in rows]
    return [varied(row, copy) | kept for copy in range(copies) for row, kept in zip(rows, same, strict=True)]


def table(text: str) -> str:
    rows = continued(list(csv.DictReader(io.StringIO(text))), COPIES)
    file = io.StringIO()
    writer = csv.DictWriter(file, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()


def json_lines(text: str) -> str:
    return "".join(
        json.dumps(row) + "\n" for row in continued([json.loads(line) for line in text.splitlines()], COPIES)
    )


def nested(text: str) -> str:
    found = json.loads(text)
    return json.dumps({"data": [varied(article, copy) for copy in range(COPIES) for article in found["data"]]})


def lines(text: str) -> str:
    return "".join(f"{varied(line, copy)}\n" for copy in range(400) for line in text.splitlines())


CONTENTS: dict[str, Callable[[str], str]] = {"csv": table, "jsonl": json_lines, "json": nested, "txt": lines}


def write_media(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".png":
        Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(path)
        return
    with wave.open(str(path), "wb") as file:
        file.setparams((1, 2, 8000, 0, "NONE", ""))
        file.writeframes((9000 * rng.standard_normal(12000)).clip(-32767, 32767).astype("<i2").tobytes())


def write_files(section: str, folder: Path) -> None:
    for kind, name, text in FILE.findall(section):
        if kind == "text":
            for path in map(Path, text.splitlines()):
                for copy in range(COPIES):
                    write_media(folder / path.with_name(varied(path.name, copy)))
        else:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(CONTENTS[kind](text), encoding="utf-8")


def test_the_page_has_a_command_for_every_task():
    assert {task for task in TASKS if f"`{task}`" in PAGE} == set(TASKS)
    configs = {Path(words[words.index("--config") + 1]).parent.name for _, line in COMMANDS if (words := line.split())}
    assert configs == set(TASKS)


@pytest.mark.parametrize(("section", "line"), COMMANDS, ids=[line.split(" --output")[0] for _, line in COMMANDS])
def test_example_rows_of_the_page_are_read_by_its_command(section, line, tmp_path, monkeypatch, capsys):
    write_files(section, tmp_path)
    monkeypatch.chdir(tmp_path)
    words = [str(ROOT / word) if word.startswith("recipes/") else word for word in shlex.split(line)]
    RECIPES[words[1]]([*words[2:], "--dry_run"])
    assert "parameters" in capsys.readouterr().out
