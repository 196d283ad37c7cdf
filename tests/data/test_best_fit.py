"""Packing by best fit: as a plain loop packs, nothing lost, pads counted, the index kept."""

import random

import numpy as np
import pytest

from bmtk.data.best_fit import BestFitRows, best_fit_bins, new_index
from bmtk.data.token_store import build_token_store
from bmtk.data.tokenizers import train_tokenizer

TOKENIZER = train_tokenizer(["abcdefg"], kind="char", vocab_size=100)  # a is 2, ..., g is 8; bos, eos and pad are 0


def store_of(directory, lengths, seed=0):
    """Documents of so many letters, and two more tokens."""
    draw = random.Random(seed)
    return build_token_store(["".join(draw.choices("abcdefg", k=k)) for k in lengths], TOKENIZER, directory)


def rooms_by_hand(sizes, capacity):
    """What is left of each bin: item by item, the longest first, into the fullest bin with room for it."""
    rooms = []
    for size in sorted(sizes, reverse=True):
        fitting = [i for i, room in enumerate(rooms) if room >= size]
        if not fitting:
            rooms.append(capacity)
            fitting = [len(rooms) - 1]
        rooms[min(fitting, key=lambda i: rooms[i])] -= size
    return sorted(rooms)


@pytest.mark.parametrize("capacity", [1, 2, 9, 16, 50])
@pytest.mark.parametrize("seed", range(12))
def test_bins_are_those_of_a_plain_loop(seed, capacity):
    draw = random.Random(seed)
    longest = draw.randint(1, capacity)
    sizes = np.array([draw.randint(1, longest) for _ in range(draw.randint(1, 120))])
    bins = best_fit_bins(sizes, capacity)
    filled = np.bincount(bins, weights=sizes)
    assert sorted((capacity - filled).astype(int).tolist()) == rooms_by_hand(sizes.tolist(), capacity)


def test_a_worked_example(tmp_path):
    store = build_token_store(["abcdefg", "ab", "c", "abc", "d"], TOKENIZER, tmp_path / "store")
    rows = BestFitRows(store, 8)  # documents of 9, 4, 3, 5 and 3 tokens: one full row; then 5 + 3, 4 + 3 + 1
    batch = rows[[0, 1, 2]]
    assert batch["input_ids"].tolist() == [
        [0, 2, 3, 4, 5, 6, 7, 8],
        [0, 4, 0, 0, 2, 3, 4, 0],
        [0, 0, 2, 3, 0, 0, 5, 0],
    ]
    assert batch["labels"].tolist() == [
        [2, 3, 4, 5, 6, 7, 8, 0],
        [4, 0, -100, 2, 3, 4, 0, -100],
        [-100, 2, 3, 0, -100, 5, 0, -100],
    ]
    assert batch["position_ids"].tolist() == [
        [0, 1, 2, 3, 4, 5, 6, 7],
        [0, 1, 2, 0, 1, 2, 3, 4],
        [0, 0, 1, 2, 3, 0, 1, 2],
    ]
    assert (len(rows), rows.num_pads) == (3, 0)


def test_the_rest_of_a_row_is_padding_without_a_loss(tmp_path):
    store = build_token_store(["ab", "cde"], TOKENIZER, tmp_path / "store")
    rows = BestFitRows(store, 6)
    batch = rows[[0, 1]]
    assert batch["input_ids"].tolist() == [[0, 4, 5, 6, 0, 0], [0, 2, 3, 0, 0, 0]]
    assert batch["labels"].tolist() == [[4, 5, 6, 0, -100, -100], [2, 3, 0, -100, -100, -100]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 4, 0], [0, 1, 2, 3, 0, 1]]
    assert rows.num_pads == 3
    assert rows.inputs(1).tolist() == [0, 2, 3, 0]


@pytest.mark.parametrize("length", [1, 2, 5, 16, 60])
@pytest.mark.parametrize("seed", range(5))
def test_every_token_is_an_input_once_and_every_target_too(tmp_path, seed, length):
    draw = random.Random(seed)
    store = store_of(tmp_path / "store", [draw.randrange(40) for _ in range(30)], seed)
    rows = BestFitRows(store, length)
    inputs = np.concatenate([rows.inputs(row) for row in range(len(rows))])
    assert sorted(inputs.tolist()) == sorted(store.tokens.tolist())
    assert len(rows) * length - len(inputs) == rows.num_pads
    labels = rows[range(len(rows))]["labels"]
    targets = [token for i in range(store.num_documents) for token in store.document(i)[1:].tolist()]
    assert sorted(labels[labels != -100].tolist()) == sorted(targets)


def test_documents_that_fit_into_a_row_are_whole(tmp_path):
    draw = random.Random(3)
    store = store_of(tmp_path / "store", [draw.randrange(14) for _ in range(200)])
    rows = BestFitRows(store, 16)
    batch = rows[range(len(rows))]
    found = []
    for ids, positions in zip(batch["input_ids"].tolist(), batch["position_ids"].tolist(), strict=True):
        begins = [i for i, position in enumerate(positions) if position == 0]
        found += [tuple(ids[a:b]) for a, b in zip(begins, [*begins[1:], 16], strict=True)]
    documents = [tuple(store.document(i).tolist()) for i in range(store.num_documents)]
    for document in documents:
        found.remove(document)
    assert all(set(pads) == {0} for pads in found)


def test_pads_are_below_one_percent_on_lengths_as_of_web_pages():
    sizes = np.clip(np.random.default_rng(0).lognormal(6.0, 1.3, 50_000), 2, 100_000).astype(np.int64)
    index = new_index(np.concatenate([[0], np.cumsum(sizes)]), 1024)
    assert 0 <= 1 - sizes.sum() / (len(index) * 1024) < 0.001


def test_the_index_is_made_once_and_kept_with_the_store(tmp_path, monkeypatch):
    store = store_of(tmp_path / "store", range(30))
    in_memory = BestFitRows(store, 16, is_kept=False)
    assert not list(store.directory.glob("best_fit*"))
    first = BestFitRows(store, 16)
    monkeypatch.setattr("bmtk.data.best_fit.new_index", None)
    again = BestFitRows(store, 16)
    everything = range(len(first))
    for rows in (in_memory, again):
        assert rows[everything]["input_ids"].tolist() == first[everything]["input_ids"].tolist()
    assert (store.directory / "best_fit-16").is_dir()
    store.verify()


def test_a_store_of_long_documents_alone_has_full_rows_alone(tmp_path):
    rows = BestFitRows(store_of(tmp_path / "store", [6, 14]), 8)
    assert (len(rows), rows.num_pads) == (3, 0)
    assert "position_ids" not in rows[[0, 1, 2]]
