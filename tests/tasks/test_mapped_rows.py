"""Rows of a large table stay in a file, some of them are read at a time, and they are those of a small table."""

import json
import tracemalloc

import pyarrow
import pytest

from bmtk.data import columns, row_batches
from bmtk.tasks import question_answering, sequence_classification, token_classification, translation

PAIRS = {"source_language": "de", "target_language": "en"}


def tagged(row: int, size: int = 1) -> dict:
    words = [f"w{row + i}" for i in range(row % 4 + 1)] * size
    return {"tokens": " ".join(words), "tags": [["O", "B-x"][i % 2] for i in range(len(words))]}


def question(row: int, size: int = 1) -> dict:
    context = f"é {row} answer é" * size
    start = [context.index("answer"), 0, context.encode().index(b"answer")][row % 3]
    answers = {"text": ["answer"] * (row % 5 > 0), "answer_start": [start] * (row % 5 > 0)}
    return {"question": None if row == 7 else f"which {row}", "context": context, "answers": answers}


def pair(row: int, size: int = 1) -> dict:
    return {"translation": None if row == 7 else {"de": f"ein {row} " * size, "en": f"one {row} " * size}, "n": row}


def labelled(row: int, size: int = 1) -> dict:
    return {"text": row if row % 2 else None, "label": "ab"[row // 2 % 2]} if size == 1 else {"text": "x " * size}


def located(row: int) -> int:
    return -1 if row % 3 == 1 else f"é {row} answer é".index("answer")


ASKED = [row for row in range(20) if row % 5 and located(row) >= 0]
TASKS = {
    "token_classification": (token_classification, tagged, {}, [
        {"words": [f"w{row + i}" for i in range(row % 4 + 1)], "label": ["O", "B-x", "O", "B-x"][: row % 4 + 1]}
        for row in range(20)
    ]),
    "question_answering": (question_answering, question, {}, [
        {"question": "" if row == 7 else f"which {row}", "context": f"é {row} answer é", "texts": ["answer"],
         "starts": [located(row)]}
        for row in ASKED
    ]),
    "translation": (translation, pair, PAIRS, [
        {"source": f"ein {row} ", "target": f"one {row} "} for row in range(20) if row != 7
    ]),
    "sequence_classification": (sequence_classification, labelled, {"problem_type": "single_label_classification"}, [
        {"text": str(row), "label": "ab"[row // 2 % 2]} for row in range(20) if row % 2
    ]),
}  # fmt: skip


def write(folder, make, rows: int = 20, size: int = 1):
    path = folder / "train.jsonl"
    path.write_text("".join(json.dumps(make(row, size)) + "\n" for row in range(rows)), encoding="utf-8")
    return path


def read(path, module, settings):
    args = module.TASK.arguments(train_file=[str(path)], tokenizer="bytes", leakage="allow", **settings)
    return module.TASK.read(args, splits=("train",))


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("at_once", [1, 7, 1000])
def test_rows_of_a_file_are_those_of_memory_and_of_the_task(tmp_path, monkeypatch, name, at_once):
    module, make, settings, expected = TASKS[name]
    path = write(tmp_path, make)
    small = read(path, module, settings)
    assert small.rows["train"].to_list() == expected
    monkeypatch.setattr(row_batches, "SMALL", 0)
    monkeypatch.setattr(columns, "ROWS_AT_ONCE", at_once)
    large = read(path, module, settings)
    assert large.rows["train"].to_list() == expected
    assert large.notes == small.notes
    assert large.rows["train"].cache_files
    assert not small.rows["train"].cache_files
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    models = [data.new_config("bm_transformer", sizes) for data in (small, large)]
    encoded = [data.bind(config).rows["train"] for data, config in zip((small, large), models, strict=True)]
    assert encoded[1].to_list() == encoded[0].to_list()
    assert encoded[1].cache_files


LARGE = [("token_classification", 1000, 60), ("question_answering", 4000, 60), ("translation", 1000, 500)]


@pytest.mark.parametrize(("name", "rows", "size"), LARGE)
def test_nothing_of_the_texts_is_kept_in_memory(tmp_path, monkeypatch, name, rows, size):
    """Of 3 to 7 MB of texts, or 150,000 words (objects of 60 bytes), a small part is in memory at any time."""
    module, make, settings, _ = TASKS[name]
    monkeypatch.setattr(row_batches, "SMALL", 1 << 16)
    for room in (row_batches, columns):
        monkeypatch.setattr(room, "CHARACTERS_AT_ONCE", 1 << 16)
    path = write(tmp_path, make, rows=rows, size=size)
    before = pyarrow.total_allocated_bytes()
    tracemalloc.start()
    data = read(path, module, settings)
    held, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(data.rows["train"]) > 200
    assert pyarrow.total_allocated_bytes() - before < 1e6
    assert held < 1e6
    assert peak < 4e6
