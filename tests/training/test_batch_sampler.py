"""Shares of a batch: processes together see what one process would, whatever is left at the end of an epoch."""

import itertools

import pytest
from accelerate.data_loader import BatchSamplerShard
from torch.utils.data import BatchSampler

from bmtk.training.batch_sampler import EvenBatchSampler


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
