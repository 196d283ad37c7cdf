import random

import numpy as np
import pytest
import torch

from bmtk.data.packing import PackedRows
from bmtk.data.token_store import build_token_store
from bmtk.data.tokenizers import train_tokenizer

TOKENIZER = train_tokenizer(["abcdefg"], kind="char", vocab_size=100)  # a is 2, ..., g is 8; bos, eos and pad are 0


def random_store(directory, seed):
    """Documents of 0 to 14 letters."""
    draw = random.Random(seed)
    texts = ["".join(draw.choices("abcdefg", k=draw.randrange(15))) for _ in range(draw.randrange(1, 12))]
    return build_token_store(texts, TOKENIZER, directory)


def rows_by_hand(store, length):
    """Input ids, labels and position ids of every row, token by token."""
    tokens = [int(token) for i in range(store.num_documents) for token in store.document(i)]
    places = [place for i in range(store.num_documents) for place in range(len(store.document(i)))]
    rows = []
    for start in range(0, len(tokens) - 1, length):
        ids, labels, positions = [], [], []
        for at in range(start, start + length):
            ids.append(tokens[at] if at < len(tokens) else 0)
            has_target = at + 1 < len(tokens) and places[at + 1] > 0
            labels.append(tokens[at + 1] if has_target else -100)
            begins = at == start or at == len(tokens) or (at < len(tokens) and places[at] == 0)
            positions.append(0 if begins else positions[-1] + 1)
        rows.append((ids, labels, positions))
    return rows


@pytest.mark.parametrize("length", [1, 2, 3, 7, 16, 200])
@pytest.mark.parametrize("seed", range(8))
def test_rows_are_those_of_a_plain_loop(tmp_path, seed, length):
    store = random_store(tmp_path / "store", seed)
    rows = PackedRows(store, length)
    expected = rows_by_hand(store, length)
    assert len(rows) == len(expected)
    for i, (ids, labels, positions) in enumerate(expected):
        batch = rows[[i]]
        assert batch["input_ids"].tolist() == [ids]
        assert batch["labels"].tolist() == batch["shift_labels"].tolist() == [labels]
        assert batch.get("position_ids", torch.arange(length)[None]).tolist() == [positions]
    everything = rows[np.arange(len(rows))[::-1]]  # and in one batch, in another order
    assert everything["input_ids"].tolist() == [ids for ids, _, _ in reversed(expected)]
    assert everything["labels"].tolist() == [labels for _, labels, _ in reversed(expected)]


@pytest.mark.parametrize("length", [1, 4, 9])
def test_every_token_but_bos_is_predicted_exactly_once_per_epoch(tmp_path, length):
    store = random_store(tmp_path / "store", 11)
    rows = PackedRows(store, length)
    labels = rows[range(len(rows))]["labels"]
    predicted = labels[labels != -100].tolist()
    assert predicted == [int(token) for i in range(store.num_documents) for token in store.document(i)[1:]]


def test_a_worked_example(tmp_path):
    store = build_token_store(["ab", "c"], TOKENIZER, tmp_path / "store")  # 0 2 3 0 | 0 4 0
    batch = PackedRows(store, 4)[[0, 1]]
    assert batch["input_ids"].tolist() == [[0, 2, 3, 0], [0, 4, 0, 0]]
    assert batch["labels"].tolist() == [[2, 3, 0, -100], [4, 0, -100, -100]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3], [0, 1, 2, 0]]
    assert {name: tensor.dtype for name, tensor in batch.items()} == dict.fromkeys(batch, torch.int64)


def test_position_ids_are_left_out_when_no_document_starts_inside_a_row(tmp_path):
    store = build_token_store(["ab", "c"], TOKENIZER, tmp_path / "store")
    rows = PackedRows(store, 4)
    assert "position_ids" not in rows[[0]]  # the next document starts after the row
    assert "position_ids" in rows[[1]]  # the padding starts inside it
    assert "position_ids" not in PackedRows(store, 2)[[0, 1, 2]]


def test_the_padding_is_the_tokenizers_pad_token(tmp_path):
    tokenizer = train_tokenizer(["ab"], kind="char", vocab_size=100)
    tokenizer.pad_token = "<unk>"
    store = build_token_store(["ab"], tokenizer, tmp_path / "store")
    assert PackedRows(store, 6)[[0]]["input_ids"].tolist() == [[0, 2, 3, 0, 1, 1]]


def test_bad_rows_and_lengths_are_refused(tmp_path):
    store = build_token_store(["ab"], TOKENIZER, tmp_path / "store")
    with pytest.raises(ValueError, match="context_length=0 must be at least 1 token per row"):
        PackedRows(store, 0)
    for row in (-1, 2):
        with pytest.raises(IndexError, match=f"row {row} is not one of the 2 rows"):
            PackedRows(store, 2)[[row]]
