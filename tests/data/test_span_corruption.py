"""Span corruption: every token is kept or cut out, and which ones depends on seed, epoch and row alone."""

import numpy as np
import pytest
import torch

from bmtk.data.packing import PackedRows
from bmtk.data.span_corruption import CorruptedSpans, noise_mask, num_spans, with_sentinels

SENTINELS = range(100, 120)
END = 0


class Store:
    """40 tokens, 1 to 40."""

    tokens, pad_token_id, num_tokens = np.arange(1, 41, dtype=np.uint16), 0, 40


def corrupted(context_length=12, **settings):
    options = {"noise_density": 0.25, "mean_span_length": 1.5, "seed": 7, "sentinels": SENTINELS, "end_token_id": END}
    return CorruptedSpans(PackedRows(Store(), context_length), **{**options, **settings})


def rebuilt(source, target):
    """The row that a source and its target were made of."""
    spans, tokens = {}, []
    for token in target[: target.index(END)]:
        if token in SENTINELS:
            spans[token] = []
        else:
            spans[max(spans)].append(token)
    for token in source:
        tokens += spans.pop(token) if token in SENTINELS else [token]
    assert not spans
    return tokens


def test_a_row_is_cut_as_in_figure_2_of_the_paper():
    tokens, is_noise = np.arange(1, 10), np.array([0, 0, 1, 1, 0, 0, 0, 1, 0], bool)
    assert with_sentinels(tokens, is_noise, np.array(SENTINELS)).tolist() == [1, 2, 100, 5, 6, 7, 101, 9]
    assert with_sentinels(tokens, ~is_noise, np.array(SENTINELS)).tolist() == [100, 3, 4, 101, 8, 102]


def test_source_and_target_hold_every_token_once():
    rows = corrupted()
    batch = rows.batch(range(len(rows)), [0] * len(rows))
    assert len(rows) == 4
    restored = []
    for ids, mask, labels in zip(
        *(batch[key].tolist() for key in ("input_ids", "attention_mask", "labels")), strict=True
    ):
        restored += rebuilt(ids[: sum(mask)], [label for label in labels if label != -100])
    assert restored == list(range(1, 41))
    assert batch["attention_mask"].sum(1).tolist() == [9 + 2] * 3 + [3 + 1]  # 3 of 12 in 2 spans, 1 of 4 in 1
    assert (batch["labels"] != -100).sum(1).tolist() == [3 + 2 + 1] * 3 + [1 + 1 + 1]
    assert batch["input_ids"][3, 4:].tolist() == [0] * 7


def test_the_same_seed_epoch_and_row_are_corrupted_alike_in_any_batch():
    rows = corrupted()
    together = rows.batch([0, 1, 2, 0], [0, 0, 5, 1])
    for place, (row, epoch) in enumerate([(0, 0), (1, 0), (2, 5), (0, 1)]):
        alone = rows.batch([row], [epoch])
        assert all(torch.equal(alone[name][0], together[name][place]) for name in alone)
    assert not torch.equal(together["input_ids"][0], together["input_ids"][3])
    assert not torch.equal(corrupted(seed=8).batch([0], [0])["input_ids"], rows.batch([0], [0])["input_ids"])
    rows.set_epoch(1)
    assert torch.equal(rows.__getitems__([0])["input_ids"], rows.batch([0], [1])["input_ids"])


@pytest.mark.parametrize(
    ("length", "density", "mean", "expected"),
    [
        (512, 0.15, 3.0, (77, 26)),  # T5: 76.8 tokens, 25.7 spans
        (10, 0.5, 1.0, (5, 5)),
        (10, 0.9, 1.0, (9, 1)),  # a token stays before each span
        (2, 0.15, 3.0, (1, 1)),
        (1, 0.15, 3.0, (0, 0)),
    ],
)
def test_numbers_of_tokens_and_spans(length, density, mean, expected):
    assert num_spans(length, density, mean) == expected
    for seed in range(20):
        mask = noise_mask(length, density, mean, np.random.default_rng(seed))
        begins = mask & ~np.concatenate(([False], mask[:-1]))
        assert (len(mask), mask.sum(), begins.sum()) == (length, *expected)


def test_places_inside_a_row_are_cut_out_about_equally_often():
    masks = np.mean([noise_mask(40, 0.25, 2.5, np.random.default_rng(seed)) for seed in range(4000)], axis=0)
    assert (masks[0], masks[-1], masks.mean()) == (0, 1, 0.25)
    assert np.abs(masks[8:32] - masks[8:32].mean()).max() < 0.03


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"noise_density": 1.0}, r"^noise_density=1\.0 must be between 0 and 1, mean_span_length=1\.5 at least 1$"),
        ({"mean_span_length": 0.5}, r"mean_span_length=0\.5 at least 1$"),
        ({"sentinels": [100]}, r"^a row of 12 tokens has 2 spans, the tokenizer 1 sentinels; lower noise_density or"),
    ],
)
def test_what_cannot_be_cut_is_one_clear_error(settings, message):
    with pytest.raises(ValueError, match=message):
        corrupted(**settings)
