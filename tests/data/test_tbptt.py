import numpy as np
import pytest
import torch
from test_packing import TOKENIZER, random_store

from bmtk.data.packing import PackedRows
from bmtk.data.tbptt import TBPTTBatches
from bmtk.data.token_store import build_token_store


@pytest.mark.parametrize(("num_streams", "length"), [(1, 3), (2, 4), (3, 2), (4, 1), (7, 5), (40, 3)])
@pytest.mark.parametrize("seed", range(3))
def test_every_stream_is_a_stretch_of_the_text_and_every_row_comes_once(tmp_path, seed, num_streams, length):
    rows = PackedRows(random_store(tmp_path / "store", seed), length)
    batches = TBPTTBatches(rows, batch_size=num_streams, seed=1)
    steps = int(batches.steps_per_epoch)
    assert steps == batches.steps_per_epoch
    read = [batches[step][0] for step in range(steps)]
    streams = [[(b["input_ids"][i].tolist(), b["labels"][i].tolist()) for b in read] for i in range(num_streams)]
    padding = ([rows.store.pad_token_id] * length, [-100] * length)
    sizes = [len(part) for part in np.array_split(np.arange(len(rows)), num_streams)]
    assert [stream[size:] for stream, size in zip(streams, sizes, strict=True)] == [
        [padding] * (steps - n) for n in sizes
    ]
    whole = rows[range(len(rows))]
    in_order = [row for stream, size in zip(streams, sizes, strict=True) for row in stream[:size]]
    assert in_order == list(zip(whole["input_ids"].tolist(), whole["labels"].tolist(), strict=True))
    again = batches[steps][0]
    assert all(torch.equal(again[name], read[0][name]) for name in read[0]), "the next epoch begins where this one did"


@pytest.mark.parametrize("seed", range(4))
def test_positions_are_zero_where_a_stream_or_a_document_begins_and_nowhere_else(tmp_path, seed):
    store, length, num_streams = random_store(tmp_path / "store", seed), 4, 3
    rows = PackedRows(store, length)
    batches = TBPTTBatches(rows, batch_size=num_streams, seed=1)
    starts = np.cumsum([0] + [len(part) for part in np.array_split(np.arange(len(rows)), num_streams)])
    for step in range(int(batches.steps_per_epoch)):
        batch = batches[step][0]
        positions = batch.get("position_ids", torch.ones(num_streams, length, dtype=torch.int64))
        for stream in range(num_streams):
            row = starts[stream] + step
            if row >= starts[stream + 1]:
                continue
            for column in range(length):
                place = row * length + column
                begins = place in store.offsets or (step == column == 0)
                assert (positions[stream, column] == 0) == begins
                assert (
                    begins
                    or column == 0
                    or positions[stream, column] == positions[stream, column - 1] + 1
                    or ("position_ids" not in batch)
                )


def test_of_one_long_text_only_the_first_step_of_an_epoch_has_positions(tmp_path):
    store = build_token_store(["abcdefg" * 6], TOKENIZER, tmp_path / "store")
    batches = TBPTTBatches(PackedRows(store, 4), batch_size=2, seed=1)
    steps = int(batches.steps_per_epoch)
    assert steps == 6
    assert ["position_ids" in batches[step][0] for step in range(2 * steps)] == 2 * [True, *[False] * 4, True]
    assert batches[0][0]["position_ids"].tolist() == [[0, 1, 2, 3]] * 2
    alone = TBPTTBatches(PackedRows(store, 4), batch_size=2, seed=1, rank=1, world_size=2)
    assert alone[0][0]["position_ids"].tolist() == [[0, 1, 2, 3]]


def test_processes_and_micro_batches_share_the_streams(tmp_path):
    rows = PackedRows(random_store(tmp_path / "store", 5), 3)
    whole = TBPTTBatches(rows, batch_size=4, seed=1)
    parts = [TBPTTBatches(rows, batch_size=4, micro_batch_size=1, seed=1, rank=rank, world_size=2) for rank in (0, 1)]
    for step in range(2 * int(whole.steps_per_epoch)):
        cut = [micro["input_ids"] for part in parts for micro in part[step]]
        assert torch.equal(torch.cat(cut), whole[step][0]["input_ids"])
    assert whole.carries_state
