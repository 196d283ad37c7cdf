"""Batches that are made several in a row are those of their source, in its order."""

import pytest
import torch

from bmtk.training import read_ahead
from bmtk.training.read_ahead import MOST, MOST_BYTES, ReadAhead, num_bytes


def source(count: int, size: int, made: list[int]):
    for number in range(count):
        made.append(number)
        yield {"input_ids": torch.full((size,), number, dtype=torch.uint8), "labels": [{"boxes": torch.zeros(0)}]}


def test_small_batches_are_made_several_in_a_row_after_the_first():
    made: list[int] = []
    reading = ReadAhead(source(12, 3, made))
    assert made == []
    lengths = []
    for number, batch in enumerate(reading):
        assert batch["input_ids"].tolist() == [number] * 3
        lengths.append(len(made))
    assert lengths == [1] + [1 + MOST] * MOST + [12] * 3
    assert next(reading, None) is None


def test_large_batches_are_made_one_by_one_and_others_while_they_fit():
    for size, at_once in ((MOST_BYTES, 1), (MOST_BYTES // 3, 3)):
        made: list[int] = []
        reading = ReadAhead(source(9, size, made))
        next(reading), next(reading)
        assert len(made) == 1 + at_once


def test_batches_that_take_long_are_made_one_by_one(monkeypatch):
    monkeypatch.setattr(read_ahead, "MOST_SECONDS", 0)
    made: list[int] = []
    assert len(list(ReadAhead(source(4, 3, made)))) == 4
    reading = ReadAhead(source(9, 3, made := []))
    next(reading), next(reading)
    assert len(made) == 2


def test_an_error_comes_after_the_batches_before_it():
    def broken():
        for number in range(4):
            yield {"input_ids": torch.tensor([number])}
        raise ValueError("row 4 is broken")

    reading = ReadAhead(broken())
    assert [next(reading)["input_ids"].item() for _ in range(4)] == [0, 1, 2, 3]
    for _ in range(2):
        with pytest.raises(ValueError, match="row 4 is broken"):
            next(reading)


def test_tensors_are_counted_wherever_they_are_in_a_batch():
    assert num_bytes({"a": torch.zeros(3), "b": [{"c": torch.zeros(2, dtype=torch.int64)}, "text"], "d": None}) == 28
