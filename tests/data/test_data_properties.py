"""Properties of the order of rows and of packing, for sizes, seeds and mixtures that hypothesis chooses."""

from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bmtk.data.batches import GlobalBatches
from bmtk.data.best_fit import BestFitRows
from bmtk.data.mixed_rows import MixedBatches, MixedRows
from bmtk.data.mixture import Mixture
from bmtk.data.packing import PackedRows
from bmtk.data.shuffle import permuted_index

# The same examples in every run, so that a failure is that of a change.
quickly = settings(max_examples=60, derandomize=True, deadline=None, database=None)
SEEDS = st.integers(0, 2**64 - 1)
WEIGHTS = st.one_of(st.integers(1, 50), st.floats(1e-3, 1e3), st.decimals("0.01", "0.99", places=2).map(float))


class Numbers:
    """Rows that are their own numbers, with their epochs."""

    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count

    def batch(self, indices, epochs):
        return {"row": torch.tensor(np.stack([indices, epochs], axis=1))}


@st.composite
def orders(draw):
    """A way to make the batches of one order, for any share of the work, and its mixture."""
    corpora = draw(st.lists(st.tuples(WEIGHTS, st.integers(1, 40)), min_size=1, max_size=6))
    weights, sizes = zip(*corpora, strict=True)
    seed = draw(SEEDS)
    rows = Numbers(sum(sizes))
    if draw(st.booleans()):
        return (lambda **share: GlobalBatches(rows, seed=seed, **share)), None
    mixture = Mixture([str(i) for i in range(len(sizes))], weights, sizes)
    return (lambda **share: MixedBatches(rows, mixture=mixture, seed=seed, **share)), mixture


def rows_of(micro_batches):
    return [tuple(row) for batch in micro_batches for row in batch["row"].tolist()]


@quickly
@given(num_rows=st.integers(1, 3000), seed=SEEDS, epoch=st.integers(0, 10**9))
def test_an_order_is_a_permutation(num_rows, seed, epoch):
    order = permuted_index(np.arange(num_rows), num_rows=num_rows, seed=seed, epoch=epoch)
    assert sorted(order.tolist()) == list(range(num_rows))


@quickly
@given(order=orders())
def test_an_epoch_of_each_corpus_has_all_of_its_rows_once(order):
    batches, mixture = order
    made = batches(batch_size=400)
    sizes = [len(made.rows)] if mixture is None else mixture.sizes.tolist()
    seen = rows_of(made[0]) + rows_of(made[1])
    first = 0
    for size in sizes:
        own = [(row - first, epoch) for row, epoch in seen if first <= row < first + size]
        assert [epoch for _, epoch in own] == [number // size for number in range(len(own))]
        for start in range(0, len(own) - size + 1, size):
            assert sorted(row for row, _ in own[start : start + size]) == list(range(size))
        first += size


@quickly
@given(order=orders(), world_size=st.integers(1, 6), share=st.integers(1, 9), micro=st.integers(0, 10), data=st.data())
def test_any_split_into_processes_and_workers_gives_the_same_sequence(order, world_size, share, micro, data):
    batches, _ = order
    batch_size, num_steps = world_size * share, 8
    alone = [rows_of(batches(batch_size=batch_size)[step]) for step in range(num_steps)]
    ranks = [
        batches(batch_size=batch_size, micro_batch_size=micro, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    num_workers = data.draw(st.integers(1, 4))  # each of which looks up every num_workers-th step
    found = {}
    for worker in range(num_workers):
        for step in range(worker, num_steps, num_workers):
            found[step] = [row for made in ranks for row in rows_of(made[step])]
    assert [found[step] for step in range(num_steps)] == alone


@quickly
@given(order=orders(), batch_size=st.integers(1, 12), stops=st.tuples(st.integers(0, 12), st.integers(0, 12)))
def test_a_run_that_is_stopped_twice_reads_what_an_unbroken_one_does(order, batch_size, stops):
    batches, _ = order
    unbroken = [rows_of(batches(batch_size=batch_size)[step]) for step in range(12)]
    borders = [0, *sorted(stops), 12]
    broken = []
    for first, last in pairwise(borders):
        resumed = batches(batch_size=batch_size)  # a new process
        broken += [rows_of(resumed[step]) for step in range(first, last)]
    assert broken == unbroken


@quickly
@given(weights=st.lists(WEIGHTS, min_size=2, max_size=7), start=st.integers(0, 10**15))
def test_shares_are_kept_to_within_one_row_from_any_position(weights, start):
    mixture = Mixture([str(i) for i in range(len(weights))], weights, [10] * len(weights))
    parts = mixture.phases[0].period.weights.tolist()
    before, corpora = mixture.counts(start), mixture.at(np.arange(start, start + 50))[0]
    for position in range(start, start + 50):
        counts = before + np.bincount(corpora[: position - start], minlength=len(weights))
        for count, part in zip(counts.tolist(), parts, strict=True):
            assert abs(count * sum(parts) - part * position) < sum(parts)  # in whole numbers, exactly
        assert sum(counts) == position


class Store:
    """A token store whose tokens are all different: each is its own place."""

    pad_token_id = 0

    directory = Path("nowhere")

    def __init__(self, lengths, first):
        self.offsets = np.concatenate([[0], np.cumsum(lengths)])
        self.num_documents, self.num_tokens, self.num_bytes = len(lengths), int(sum(lengths)), 0
        self.tokens = first + np.arange(self.num_tokens)

    def starts(self, first, last):
        return self.offsets[(self.offsets >= first) & (self.offsets < last)] - first


DOCUMENTS = st.lists(st.integers(2, 30), min_size=1, max_size=25)


@quickly
@given(corpora=st.lists(DOCUMENTS, min_size=1, max_size=3), length=st.integers(1, 40), fits=st.booleans())
def test_every_token_of_every_document_is_read_and_predicted_once_an_epoch(corpora, length, fits):
    members, firsts = [], []
    for number, lengths in enumerate(corpora):
        store = Store(lengths, 1000 * (number + 1))
        firsts += (1000 * (number + 1) + store.offsets[:-1]).tolist()
        members.append(BestFitRows(store, length, is_kept=False) if fits else PackedRows(store, length))
    rows = MixedRows(members) if len(members) > 1 else members[0]
    tokens = Counter(token for member in members for token in member.store.tokens.tolist())
    batches = GlobalBatches(rows, batch_size=len(rows), seed=1)
    [batch] = batches[0]
    targets = batch["labels"][batch["labels"] != -100].tolist()
    assert Counter(targets) == tokens - Counter(firsts)
    if fits:
        inputs = [token for row in range(len(rows)) for token in rows.inputs(row).tolist()]
        assert Counter(inputs) == tokens
    ids, labels = batch["input_ids"], batch["labels"]
    assert torch.equal(labels[labels != -100], ids[labels != -100] + 1)  # each after the token before it
