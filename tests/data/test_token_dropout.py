import numpy as np
import pytest
from datasets import Dataset

from bmtk.data.token_dropout import TokenDropout


def dropout(rows, **settings):
    return TokenDropout(
        Dataset.from_list(rows), **{"share": 0.3, "hidden": 1, "kept": frozenset([0]), "seed": 5, **settings}
    )


def test_what_is_hidden_follows_from_seed_epoch_and_row_alone():
    rows = [{"input_ids": list(range(2, 50)), "labels": label} for label in range(4)]
    one, other = dropout(rows), dropout(rows)
    assert one[2] == other.__getitems__([0, 2])[1]  # whatever was asked for before, and beside it
    assert one[2]["labels"] == 2
    assert one[2]["input_ids"] != one[3]["input_ids"]
    before = one[2]
    one.set_epoch(1)
    assert one[2] != before
    one.set_epoch(0)
    assert one[2] == before
    assert dropout(rows, seed=6)[2] != before


def test_each_row_has_a_generator_of_its_own():
    """As published figures were made: other draws are other runs."""
    rows = [{"input_ids": list(range(2, 50))}, {"input_ids": [list(range(2, 20)), list(range(2, 30))]}]
    for row, lists in enumerate(([rows[0]["input_ids"]], rows[1]["input_ids"])):
        draw = np.random.default_rng([5, 3, row])
        expected = [np.where(draw.random(len(ids)) < 0.3, 1, ids).tolist() for ids in lists]
        hidden = dropout(rows[row : row + 1] if row == 0 else [rows[1], rows[1]])
        hidden.set_epoch(3)
        assert hidden[row]["input_ids"] == (expected if row else expected[0])
    assert list(dropout(rows[:1]).__getitems__([])) == []


def test_the_share_of_tokens_is_hidden_and_the_rest_is_as_it_was():
    ids = [*range(2, 2002), *[0] * 500]
    found = dropout([{"input_ids": ids}])[0]["input_ids"]
    assert found[2000:] == [0] * 500
    assert all(new in (1, old) for new, old in zip(found, ids, strict=True))
    assert found.count(1) / 2000 == pytest.approx(0.3, abs=0.04)


def test_windows_of_a_text_are_hidden_one_by_one():
    found = dropout([{"input_ids": [list(range(2, 40)), list(range(2, 40))]}])[0]["input_ids"]
    assert list(map(len, found)) == [38, 38]
    assert found[0] != found[1]
