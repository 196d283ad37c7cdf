import pytest
import torch

from bmtk.data.batches import CollatedRows, GlobalBatches, sequential_batches


class Numbers:
    """Rows that are their own numbers."""

    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count

    def batch(self, indices, epochs):
        return {"row": torch.tensor([int(i) for i in indices])}


def rows_of(micro_batches):
    return [row for batch in micro_batches for row in batch["row"].tolist()]


def global_batches(count=10, *, batch_size=4, seed=0, **settings):
    return GlobalBatches(Numbers(count), batch_size=batch_size, seed=seed, **settings)


def test_an_epoch_holds_every_row_once_and_batches_span_its_end():
    batches = global_batches(10, batch_size=4)
    stream = [row for step in range(15) for row in rows_of(batches[step])]
    epochs = [stream[i : i + 10] for i in range(0, 60, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 6  # each epoch has an order of its own
    assert batches.steps_per_epoch == 2.5


@pytest.mark.parametrize("world_size", [2, 3, 4, 6, 12])
def test_the_ranks_together_see_the_batch_of_one_process(world_size):
    alone = global_batches(25, batch_size=12)
    ranks = [global_batches(25, batch_size=12, rank=r, world_size=world_size) for r in range(world_size)]
    for step in range(7):
        shares = [rows_of(batches[step]) for batches in ranks]
        assert [row for share in shares for row in share] == rows_of(alone[step])
        assert {len(share) for share in shares} == {12 // world_size}


def test_a_step_is_looked_up_in_any_order():
    first, second = global_batches(101, batch_size=8), global_batches(101, batch_size=8)
    forward = [rows_of(first[step]) for step in range(40)]
    backward = [rows_of(second[step]) for step in reversed(range(40))]
    assert forward == backward[::-1]
    assert len(rows_of(first[10**12])) == 8


def test_the_order_depends_on_the_seed():
    assert rows_of(global_batches(100, seed=0)[0]) != rows_of(global_batches(100, seed=1)[0])


def test_without_shuffling_rows_come_in_order():
    batches = global_batches(3, batch_size=2, shuffle=False)
    assert [rows_of(batches[step]) for step in range(4)] == [[0, 1], [2, 0], [1, 2], [0, 1]]


@pytest.mark.parametrize(("micro", "sizes"), [(0, [6]), (1, [1] * 6), (4, [4, 2]), (6, [6]), (99, [6])])
def test_the_share_is_cut_into_micro_batches(micro, sizes):
    batches = global_batches(50, batch_size=12, micro_batch_size=micro, rank=1, world_size=2)
    assert [len(batch["row"]) for batch in batches[3]] == sizes
    assert rows_of(batches[3]) == rows_of(global_batches(50, batch_size=12)[3])[6:]


def test_a_batch_may_hold_a_small_corpus_several_times():
    assert sorted(rows_of(global_batches(3, batch_size=9)[5])) == [0, 0, 0, 1, 1, 1, 2, 2, 2]


@pytest.mark.parametrize(
    ("count", "batch_size", "world_size"), [(10, 4, 1), (10, 3, 3), (2, 4, 3), (7, 1, 2), (0, 2, 2)]
)
def test_evaluation_sees_every_row_exactly_once(count, batch_size, world_size):
    rows = Numbers(count)
    shares = [
        list(sequential_batches(rows, batch_size=batch_size, rank=rank, world_size=world_size))
        for rank in range(world_size)
    ]
    assert [row for share in shares for row in rows_of(share)] == list(range(count))
    assert all(1 <= len(batch["row"]) <= batch_size for share in shares for batch in share)
    sizes = [len(rows_of(share)) for share in shares]
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"count": 0}, "there are no rows to make batches of"),
        ({"batch_size": 5, "world_size": 2}, "batch_size=5 must be a multiple of .* 2; the nearest one above is 6"),
        ({"batch_size": 0, "world_size": 2}, "batch_size=0 must be a multiple of .* 2; the nearest one above is 2"),
        ({"micro_batch_size": -1}, "micro_batch_size=-1 must be 0"),
        ({"rank": 2, "world_size": 2}, "rank=2 is not one of world_size=2 processes, 0 to 1"),
    ],
)
def test_sizes_that_do_not_fit_together_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        global_batches(**settings)


def test_bad_steps_and_evaluation_sizes_are_refused():
    with pytest.raises(IndexError, match="step=-1 must be 0 or more"):
        global_batches()[-1]
    with pytest.raises(ValueError, match="batch_size=0 must be at least 1 row"):
        sequential_batches(Numbers(3), batch_size=0)
    with pytest.raises(ValueError, match="rank=-1 is not one of"):
        sequential_batches(Numbers(3), batch_size=1, rank=-1)


class Drawn:
    """Rows of (number, epoch); None before an epoch is set."""

    epoch = None

    def __len__(self):
        return 4

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __getitem__(self, index):
        return index, self.epoch


def test_examples_get_the_epoch_of_each_row_and_only_in_training():
    rows = CollatedRows(Drawn(), list, is_training=True)
    assert rows.batch([3, 1, 2, 0], [0, 0, 1, 1]) == [(3, 0), (1, 0), (2, 1), (0, 1)]
    batches = GlobalBatches(rows, batch_size=3, seed=0)
    seen = [place for step in range(8) for place in batches[step][0]]
    assert [epoch for _, epoch in seen] == [step // 4 for step in range(24)]
    measured = CollatedRows(Drawn(), list)
    assert list(sequential_batches(measured, batch_size=3)) == [[(0, None), (1, None), (2, None)], [(3, None)]]
