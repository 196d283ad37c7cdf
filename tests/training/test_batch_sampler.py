"""Shares of a batch: processes together see what one process would, whatever is left at the end of an epoch."""

import itertools
from types import SimpleNamespace

import pytest
import torch
from accelerate.data_loader import BatchSamplerShard, SeedableRandomSampler
from datasets import Dataset
from torch.utils.data import BatchSampler, RandomSampler
from transformers.trainer_pt_utils import LengthGroupedSampler, get_length_grouped_indices

from bmtk.training.batch_sampler import EpochSampler, EvenBatchSampler, lengths_of

LENGTHS = [row * 7 % 12 for row in range(30)]


@pytest.mark.parametrize(("batch_size", "num_processes"), [(1, 2), (2, 2), (3, 4), (1, 4), (4, 3)])
def test_processes_together_see_the_rows_of_each_step_once(batch_size, num_processes):
    for num_rows, drop_last in itertools.product(range(1, 30), (False, True)):
        whole = list(BatchSampler(range(num_rows), batch_size * num_processes, drop_last))
        shares = EvenBatchSampler(range(num_rows), batch_size, drop_last, num_processes=num_processes)
        options = {"num_processes": num_processes, "even_batches": False}
        shards = [BatchSamplerShard(shares, process_index=rank, **options) for rank in range(num_processes)]
        assert [len(shard) for shard in shards] == [len(whole)] * num_processes
        for step, parts in zip(whole, zip(*map(list, shards), strict=True), strict=True):
            if len(step) < num_processes:
                assert list(parts) == [step] * num_processes
            else:
                assert list(itertools.chain(*parts)) == step
                assert max(map(len, parts)) - min(map(len, parts)) <= 1


@pytest.mark.parametrize(("batch_size", "num_processes"), [(1, 2), (2, 2), (3, 4), (1, 4), (4, 3)])
@pytest.mark.parametrize("num_groups", [1, 2, 3])
def test_each_row_of_an_accumulated_step_weighs_the_same(batch_size, num_processes, num_groups):
    for num_rows, drop_last in itertools.product(range(1, 40), (False, True)):
        sizes = {"num_processes": num_processes, "num_groups": num_groups}
        shares = list(EvenBatchSampler(range(num_rows), batch_size, drop_last, **sizes))
        assert len(EvenBatchSampler(range(num_rows), batch_size, drop_last, **sizes)) == len(shares)
        parts = [
            shares[first : first + num_processes * num_groups]
            for first in range(0, len(shares), num_processes * num_groups)
        ]
        size = batch_size * num_processes
        kept = num_rows // size * size if drop_last else num_rows
        steps = list(BatchSampler(range(kept), size * num_groups, False))
        for step, part in zip(steps, parts, strict=True):
            rows = sorted(itertools.chain(*part))
            assert rows == (step if len(step) >= num_processes else sorted(step * num_processes))
            assert all(part)


def test_the_lengths_of_texts_are_those_of_their_lists():
    lists = [list(range(length)) for length in LENGTHS]
    table = Dataset.from_dict({"input_ids": lists, "labels": LENGTHS})
    chosen = table.select([3, 0, 3])
    assert lengths_of(table, "input_ids") == LENGTHS
    assert lengths_of(chosen, "input_ids") == [LENGTHS[3], LENGTHS[0], LENGTHS[3]]
    assert lengths_of(SimpleNamespace(rows=chosen), "input_ids") == [LENGTHS[3], LENGTHS[0], LENGTHS[3]]
    nested = Dataset.from_dict({"input_ids": [[[1, 2], [3]], [[4]]]})
    assert lengths_of(nested, "input_ids") == [2, 1]
    missing = Dataset.from_dict({"input_ids": [[1], None]})
    for rows, name in (
        (table, "labels"),
        (table, "absent"),
        (missing, "input_ids"),
        ([{"input_ids": [1]}], "input_ids"),
    ):
        assert lengths_of(rows, name) is None


def test_the_order_of_an_epoch_is_a_function_of_seed_and_epoch_whatever_was_drawn_before():
    for seed, epoch in itertools.product((3, 5), (0, 1, 7)):
        random, grouped = (
            EpochSampler(sampler, seed)
            for sampler in (RandomSampler(LENGTHS), LengthGroupedSampler(2, lengths=LENGTHS))
        )
        accelerates = SeedableRandomSampler(LENGTHS, data_seed=seed)
        for sampler in (random, grouped, accelerates):
            sampler.set_epoch(epoch)
        torch.rand(epoch)
        assert len(random) == len(grouped) == 30
        assert list(random) == list(random) == list(accelerates)
        generator = torch.Generator().manual_seed(seed + epoch)
        assert list(grouped) == list(grouped) == get_length_grouped_indices(LENGTHS, 2, generator=generator)
        assert sorted(grouped) == list(range(30))
    assert list(random) != list(EpochSampler(RandomSampler(LENGTHS), seed))
