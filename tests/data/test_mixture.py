"""The order of a mixture: shares at every position, ends of corpora, and its batches."""

import json
import random
from fractions import Fraction

import numpy as np
import pytest
import torch

from bmtk.data.batches import GlobalBatches
from bmtk.data.mixed_rows import MixedBatches, MixedRows
from bmtk.data.mixture import MOST_PARTS, Corpus, Mixture, Period, read_corpora, share_names, whole_weights
from bmtk.data.packing import PackedRows
from bmtk.data.token_store import build_token_store
from bmtk.data.tokenizers import train_tokenizer
from bmtk.errors import UserError

TOKENIZER = train_tokenizer(["abcdefg"], kind="char", vocab_size=100)


def weights_of(seed):
    draw = random.Random(seed)
    kinds = [lambda: 1, lambda: draw.randint(1, 60), lambda: draw.randint(1, 99) / 100]
    return [draw.choice(kinds)() for _ in range(draw.randint(1, 9))]


@pytest.mark.parametrize("seed", range(20))
def test_no_corpus_is_ever_a_row_from_its_share(seed):
    weights = weights_of(seed)
    mixture = Mixture([str(i) for i in range(len(weights))], weights, [1000] * len(weights))
    total = sum(map(lambda weight: Fraction(str(weight)), weights))
    shares = [Fraction(str(weight)) / total for weight in weights]
    length = 2 * sum(whole_weights(weights)) + 7
    corpora, numbers = mixture.at(np.arange(length))
    counts = [0] * len(weights)
    for position, (corpus, number) in enumerate(zip(corpora.tolist(), numbers.tolist(), strict=True)):
        assert mixture.counts(position).tolist() == counts
        assert number == counts[corpus]
        counts[corpus] += 1
        assert all(abs(count - share * (position + 1)) < 1 for count, share in zip(counts, shares, strict=True))


def test_weights_become_whole_numbers_of_the_same_ratio():
    assert whole_weights([0.7, 0.2, 0.1]) == [7, 2, 1]
    assert whole_weights([3]) == [1]
    assert whole_weights([300, 150.0, 0.5]) == [600, 300, 1]
    weights = [123456789.5, 987654321, 1]
    parts = whole_weights(weights)  # too fine: rounded, and no corpus is lost
    assert sum(parts) == MOST_PARTS
    assert all(abs(part - MOST_PARTS * w / sum(weights)) < 1 for part, w in zip(parts, weights, strict=True))
    assert parts[2] == 1
    assert sorted(whole_weights([10**9 + 7, 10**9 + 9, 10**9 + 21])) == [21845, 21845, 21846]


def test_a_used_up_corpus_leaves_its_share_to_the_others():
    mixture = Mixture(["a", "b", "c"], [2, 1, 1], [4, 3, 5], [None, 1, 2])
    corpora = mixture.at(np.arange(60))[0].tolist()
    first = [place for place, corpus in enumerate(corpora) if corpus == 1][-1] + 1
    second = [place for place, corpus in enumerate(corpora) if corpus == 2][-1] + 1
    assert (corpora.count(1), corpora.count(2)) == (3, 10)
    assert first < second
    for position in range(60):
        counts = np.bincount(corpora[:position], minlength=3)
        assert mixture.counts(position).tolist() == counts.tolist()
        if position <= first:
            assert np.abs(counts - np.array([0.5, 0.25, 0.25]) * position).max() < 1
        elif position <= second:
            since = counts - np.bincount(corpora[:first], minlength=3)
            assert np.abs(since - np.array([2 / 3, 0, 1 / 3]) * (position - first)).max() < 1
        else:
            assert corpora[position] == 0
    assert mixture.limit is None


def test_a_mixture_whose_corpora_all_end_has_an_end():
    mixture = Mixture(["a", "b"], [3, 1], [4, 10], [0.5, 1.5])
    assert mixture.limit == 2 + 15
    assert np.bincount(mixture.at(np.arange(17))[0]).tolist() == [2, 15]
    mixture.check(17)
    message = (
        r"all are used up after 17 rows \(repeat=0.5 of a, repeat=1.5 of b\), and 18 are asked for; train for fewer"
    )
    with pytest.raises(UserError, match=message):
        mixture.check(18)
    with pytest.raises(UserError, match=message):
        mixture.at(np.array([3, 17]))


def test_what_a_run_reads_is_described():
    mixture = Mixture(["wiki", "code"], [3, 1], [300, 20], [None, 4])
    assert mixture.described(100) == [
        "wiki: weight 3, 75.00% of the rows, 0.25 epochs of 300 rows",
        "code: weight 1, 25.00% of the rows, 1.25 epochs of at most 4 of 20 rows",
    ]
    assert mixture.epochs(100) == {"wiki": 0.25, "code": 1.25}


class Numbers:
    """Rows that are their own numbers, with their epochs."""

    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count

    def batch(self, indices, epochs):
        return {"row": torch.tensor(np.stack([indices, epochs], axis=1))}


def test_one_corpus_has_the_order_that_it_has_alone():
    alone = GlobalBatches(Numbers(23), batch_size=6, seed=5)
    mixed = MixedBatches(Numbers(23), mixture=Mixture(["a"], [0.3], [23]), batch_size=6, seed=5)
    assert mixed.steps_per_epoch == alone.steps_per_epoch
    for step in (0, 1, 3, 4, 999):
        assert torch.equal(mixed[step][0]["row"], alone[step][0]["row"])


def test_within_a_corpus_rows_come_in_its_own_order_epoch_after_epoch():
    sizes = [7, 12, 5]
    mixed = MixedBatches(Numbers(24), mixture=Mixture(list("abc"), [1, 3, 2], sizes), batch_size=12, seed=3)
    rows = torch.cat([mixed[step][0]["row"] for step in range(10)]).tolist()
    for corpus, first in enumerate((0, 7, 19)):
        own = [[row - first, epoch] for row, epoch in rows if first <= row < first + sizes[corpus]]
        alone = GlobalBatches(Numbers(sizes[corpus]), batch_size=len(own), seed=3)
        assert own == alone[0][0]["row"].tolist()
    assert mixed.steps_per_epoch == 2


def test_rows_of_several_stores_are_numbered_one_after_the_other(tmp_path):
    stores = [
        build_token_store(texts, TOKENIZER, tmp_path / str(i)) for i, texts in enumerate((["abc", "de"], ["fg"]))
    ]
    members = [PackedRows(store, 3) for store in stores]
    rows = MixedRows(members)
    assert (len(rows), rows.store.num_documents, rows.store.num_tokens) == (4, 3, 13)
    together = rows[[3, 0, 2]]
    apart = [members[1][[0]], members[0][[0]], members[0][[2]]]
    for name in ("input_ids", "labels"):
        assert together[name].tolist() == [row for batch in apart for row in batch[name].tolist()]


def test_corpora_are_read_from_json():
    items = ['{"path": "a.txt", "weight": 2}', '[{"path": "b", "text_column": "body", "repeat": 0.5}]']
    assert read_corpora(items) == [Corpus("a.txt", 2), Corpus("b", 1.0, "body", 0.5)]


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ({"path": "a", "weight": 0}, "corpora: weight=0 of a must be a number above 0"),
        ({"path": "a", "weight": -1.5}, "weight=-1.5 of a must be"),
        ({"path": "a", "weight": "2"}, 'weight="2" of a must be'),
        ({"path": "a", "weight": True}, "weight=true of a must be"),
        ({"path": "a", "weight": None}, "weight=null of a must be"),
        ({"path": "a", "repeat": 0}, "repeat=0 of a must be"),
        ({"path": "a", "wieght": 2}, "unknown key 'wieght'; did you mean 'weight'"),
        ({"path": "a", "xyz": 2}, "unknown key 'xyz'; there are path, weight, text_column, repeat"),
        ({"weight": 2}, "path=null is not a text; every corpus needs a path"),
        ({"path": 3}, "path=3 is not a text"),
        ("a.txt", 'corpora="a.txt" is not a corpus; give its path, weight, text_column, repeat'),
    ],
)
def test_a_corpus_that_cannot_be_meant_is_refused(item, message):
    with pytest.raises(UserError, match=message):
        read_corpora([json.dumps(item)])


def test_what_is_no_list_of_corpora_is_refused():
    with pytest.raises(UserError, match=r"corpora=a\.txt is not JSON .*give each corpus as \{\"path\":"):
        read_corpora(["a.txt"])
    with pytest.raises(UserError, match="corpora is empty"):
        read_corpora(["[]"])


def test_corpora_get_short_names_of_their_own():
    paths = ["x/wiki.jsonl.gz", "y/wiki.txt", "owner/name:en", "texts/web.2024/", "wiki-2", "s3://b/c/*.parquet"]
    assert share_names(paths) == ["wiki", "wiki-2", "name-en", "web-2024", "wiki-2-2", "corpus"]


def test_a_long_period_is_made_in_no_time():
    period = Period([MOST_PARTS - 5, 1, 4])
    assert np.bincount(period.corpus).tolist() == [MOST_PARTS - 5, 1, 4]
    assert period.position(0, 10**12) > 10**12
