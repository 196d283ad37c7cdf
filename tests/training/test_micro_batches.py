"""Too little memory: smaller micro-batches, the same steps, and a run that goes on with them when it is resumed."""

import json
from pathlib import Path
from types import SimpleNamespace

import datasets
import pytest
import torch
from accelerate import Accelerator
from faults import TOO_LITTLE, SmallMemory
from safetensors.torch import load_file
from tiny_run import (
    Stopping,
    Stream,
    TinyBatches,
    arguments,
    num_items,
    read_history,
    rows,
    run,
    tiny_model,
    tiny_recurrent,
)

from bmtk.errors import UserError
from bmtk.training import micro_batches
from bmtk.training.arguments import AUTO, LoopArguments
from bmtk.training.micro_batches import (
    FILE,
    Margin,
    MicroBatches,
    choose_micro_batches,
    fits,
    largest_fitting,
    longest_rows,
    num_rows,
    split_rows,
    step_within_memory,
)
from bmtk.training.prepared import prepare
from bmtk.training.signals import StopRequest
from bmtk.training.updates import Losses, Updater
from recipes import pretrain

ERRORS = [torch.cuda.OutOfMemoryError("CUDA out of memory."), MemoryError(), RuntimeError(TOO_LITTLE)]


def limits(folder) -> list[list[int]]:
    return json.loads((folder / FILE).read_text())["limits"]


def same_up_to_rounding(left, right) -> None:
    for one, other in zip(read_history(left), read_history(right), strict=True):
        assert one == pytest.approx(other, rel=1e-6)


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_micro_batches_are_halved_until_they_fit(error, tmp_path, caplog):
    whole = run(arguments(tmp_path / "whole", micro_batch_size=8), dropout=0.0)
    small = SmallMemory(model := tiny_model(), 3, error)
    assert run(arguments(tmp_path / "run", micro_batch_size=8), model=model)["step"] == whole["step"]
    same_up_to_rounding(tmp_path / "run", tmp_path / "whole")
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("run", "whole")]
    torch.testing.assert_close(*weights, rtol=1e-5, atol=1e-6)
    assert limits(tmp_path / "run") == [[0, 4], [0, 2]]
    assert not (tmp_path / "whole" / FILE).exists()
    assert small.calls[:3] == [8, 4, 2]
    assert "step 1: out of memory with 8 rows in a forward pass; from now on 4 rows" in caplog.text
    assert caplog.text.count("out of memory") == 2


@pytest.mark.parametrize("in_backward", [False, True])
def test_a_step_that_is_tried_again_is_the_step_of_smaller_micro_batches(in_backward, tmp_path):
    """With dropout: the generators, too, are what they were before it.  The whole share is what 0 asks for."""
    expected = run(arguments(tmp_path / "small", micro_batch_size=2))
    model = tiny_model(dropout=0.2)
    SmallMemory(model, 2, in_backward=in_backward)
    assert run(arguments(tmp_path / "run"), model=model, batches=TinyBatches(0)) == expected
    assert read_history(tmp_path / "run") == read_history(tmp_path / "small")


@pytest.mark.parametrize("stop", [2, 4])
def test_a_resumed_run_has_the_sizes_of_the_one_before(stop, tmp_path):
    def memory(model, batches):
        """Too little from the fourth step on, in the backward pass of its second micro-batch."""
        return SmallMemory(model, 3, first=3, in_backward=True).of(batches)

    model = tiny_model(dropout=0.2)
    straight = run(arguments(tmp_path / "straight"), model=model, batches=memory(model, TinyBatches(6)))
    assert limits(tmp_path / "straight") == [[3, 3]]
    model = tiny_model(dropout=0.2)
    stopping = Stopping(stop)
    stopping.micro_batch_size = 6
    with pytest.raises(SystemExit):
        run(arguments(tmp_path / "run"), model=model, batches=memory(model, stopping))
    model = tiny_model(dropout=0.2)
    assert run(arguments(tmp_path / "run"), model=model, batches=memory(model, TinyBatches(6))) == straight
    assert read_history(tmp_path / "run") == read_history(tmp_path / "straight")


def test_the_recurrent_state_is_that_of_smaller_micro_batches(tmp_path):
    expected = run(arguments(tmp_path / "small"), model=tiny_recurrent(), batches=Stream(2))
    model = tiny_recurrent()
    SmallMemory(model, 2, in_backward=True)
    assert run(arguments(tmp_path / "run"), model=model, batches=Stream(0)) == expected
    model = tiny_recurrent()
    later = SmallMemory(model, 3, first=2, in_backward=True).of(Stream(6))
    run(arguments(tmp_path / "later"), model=model, batches=later)
    assert limits(tmp_path / "later") == [[2, 3]]
    same_up_to_rounding(tmp_path / "later", tmp_path / "small")


class Counting(torch.nn.Module):
    """Embeddings that count their calls in a buffer."""

    def __init__(self, embedding):
        super().__init__()
        self.embedding = embedding
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, ids):
        self.calls += 1
        return self.embedding(ids)


def test_buffers_and_gradients_are_those_before_a_step_that_was_given_up():
    model = tiny_model()
    counting = model.model.embed_tokens = Counting(model.model.embed_tokens)
    updater = Updater(prepare(model, LoopArguments(), Accelerator(cpu=True)), Losses(num_items), max_grad_norm=0.0)
    updater.step(TinyBatches(4)[0])
    calls = int(counting.calls)
    SmallMemory(model, 3, in_backward=True)
    with pytest.raises(RuntimeError, match="can't allocate"):
        updater.step([*TinyBatches(3)[1][:1], *TinyBatches(4)[1]])
    assert int(counting.calls) == calls
    assert all(parameter.grad is None for parameter in model.parameters())


def test_one_row_that_does_not_fit_is_an_error_with_remedies(tmp_path):
    SmallMemory(model := tiny_model(), 0)
    message = r"step 1: out of memory with 1 row in a forward pass: set gradient_checkpointing, shorten the rows"
    with pytest.raises(UserError, match=message):
        run(arguments(tmp_path, micro_batch_size=2), model=model)


def test_other_errors_are_not_taken_for_it(tmp_path):
    SmallMemory(model := tiny_model(), 3, RuntimeError("shapes do not fit"))
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        run(arguments(tmp_path), model=model)


def test_micro_batches_that_would_change_the_loss_are_not_halved(tmp_path):
    def check(count: int) -> None:
        if count > 1:
            raise UserError(f"it compares all rows, which would be cut into {count} parts")

    sizes = MicroBatches(tmp_path, Accelerator(cpu=True), check, rows=8)
    with pytest.raises(UserError, match=r"step 3: out of memory with 8 rows .* cut into 2 parts; set gradient_check"):
        sizes.halve(2, 8, share=8, model=torch.nn.Linear(2, 2))
    sizes = MicroBatches(tmp_path, Accelerator(cpu=True), None, rows=8)
    with pytest.raises(UserError, match="the statistics of BatchNorm are those of a micro-batch; choose micro_batch_"):
        sizes.halve(2, 8, share=8, model=torch.nn.Sequential(torch.nn.BatchNorm1d(2)))
    assert sizes.at(9) == 8
    assert not (tmp_path / FILE).exists()


def test_the_size_is_a_function_of_the_step(tmp_path):
    sizes = MicroBatches(tmp_path, Accelerator(cpu=True), None, rows=12)
    sizes.halve(7, 12, share=24, model=torch.nn.Linear(2, 2))
    sizes.halve(9, 3, share=24, model=torch.nn.Linear(2, 2))
    again = MicroBatches(tmp_path, Accelerator(cpu=True), None, rows=12)
    assert [again.at(step) for step in (0, 6, 7, 8, 9, 50)] == [12, 12, 6, 6, 2, 2]
    assert MicroBatches(tmp_path, Accelerator(cpu=True), None, rows=4).at(8) == 4


def test_a_process_whose_memory_ends_later_leaves_half_the_rows_to_the_resumed_run(tmp_path):
    """The others wait for its gradients, so it cannot try again alone."""
    prepared = prepare(model := tiny_model(), LoopArguments(), Accelerator(cpu=True))
    SmallMemory(model, 5)
    sizes = MicroBatches(tmp_path, prepared.accelerator, None, rows=0)
    sizes.accelerator = SimpleNamespace(num_processes=2, process_index=1, is_main_process=False)
    updater = Updater(prepared, Losses(num_items), max_grad_norm=0.0)
    with pytest.raises(UserError, match="process 1 is out of memory; run the same command again: it goes on "):
        step_within_memory(updater, TinyBatches(0), sizes, 4, 4, request=StopRequest())
    assert limits(tmp_path) == [[4, 4]]


def test_a_batch_is_cut_by_rows():
    batch = {**rows(range(5)), "names": list("abcde"), "mean": torch.ones(())}
    parts = split_rows(batch, 2)
    assert [num_rows(part) for part in parts] == [2, 2, 1]
    assert [part["names"] for part in parts] == [["a", "b"], ["c", "d"], ["e"]]
    assert torch.equal(torch.cat([part["labels"] for part in parts]), batch["labels"])
    assert [num_rows(part) for part in split_rows(batch, 5)] == [5]
    for several, count in (({**batch, "odd": torch.ones(3)}, 2), (batch, None)):
        with pytest.raises(UserError, match=r"batches with .*labels.* cannot be cut into smaller ones: lower micro_b"):
            split_rows(several, count)


class Objective(SimpleNamespace):
    """What `auto` reads of one: rows without lengths."""

    criterion = num_units = None
    rows = {"train": range(64)}
    num_items = staticmethod(num_items)

    def inputs_of(self, batch):
        return batch

    def check_micro_batches(self, count: int) -> None:
        pass

    def batches_in_order(self, numbers, *, batch_size: int):
        yield rows(list(numbers)[:batch_size])


@pytest.mark.parametrize(
    ("share", "memory", "expected"), [(24, 5, 4), (24, 99, 8), (16, 16, 16), (7, 9, 1), (6, 1, 1)]
)
def test_auto_is_the_largest_power_of_two_that_divides_the_share_and_fits(share, memory, expected):
    SmallMemory(model := tiny_model(), memory)
    losses = Losses(num_items)
    assert largest_fitting(share, Objective(), model, losses, Accelerator(cpu=True)) == expected
    assert all(parameter.grad is None for parameter in model.parameters())


def test_auto_refuses_what_does_not_fit_at_all_or_would_change_the_loss(monkeypatch):
    SmallMemory(model := tiny_model(), 0)
    with pytest.raises(
        UserError, match="micro_batch_size=auto: not even one row fits into memory: set gradient_check"
    ):
        largest_fitting(8, Objective(), model, Losses(num_items), Accelerator(cpu=True))
    model = tiny_model()
    model.model.norm = torch.nn.Sequential(model.model.norm, torch.nn.BatchNorm1d(8))
    SmallMemory(model, 2)
    with pytest.raises(
        UserError, match="micro_batch_size=auto, and smaller micro-batches would change the loss, beca"
    ):
        largest_fitting(8, Objective(), model, Losses(num_items), Accelerator(cpu=True))


def test_auto_keeps_a_margin(monkeypatch):
    """A trial of n rows takes 10 n MB; 90 % of 100 MB may be filled, less the optimizer's moments of 0.1 MB."""
    peak = 0

    def fitting(model, batch, losses, accelerator):
        nonlocal peak
        peak = num_rows(batch) * 10_000_000
        return True

    monkeypatch.setattr(micro_batches, "fits", fitting)
    monkeypatch.setattr(Margin, "_peak", lambda self: peak)
    for room, expected in ((100e6, 8), (88e6, 4), (79e6, 4), (12e6, 1)):
        peak = 0
        monkeypatch.setattr(micro_batches, "available_memory", lambda room=room: int(room))
        assert largest_fitting(16, Objective(), tiny_model(), Losses(num_items), Accelerator(cpu=True)) == expected
    assert peak == 10_000_000  # two rows were never tried


def test_auto_is_remembered(tmp_path, monkeypatch):
    args = arguments(tmp_path, micro_batch_size=AUTO)
    for memory, expected in ((5, 4), (2, 4)):  # a resumed run takes what was found first
        batches, model = TinyBatches(0), tiny_model()
        batches.batch_size = 8
        SmallMemory(model, memory)
        choose_micro_batches(args, batches, Objective(), model, Accelerator(cpu=True))
        assert batches.micro_batch_size == expected
        if memory == 5:
            run(args, batches=batches)
    assert limits(tmp_path) == [[0, 4]]


def test_a_plan_shows_what_auto_finds(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(Path(__file__).parents[2])
    plan = ["--preset", "smoke", "--dry_run", "--output_dir", str(tmp_path)]
    pretrain.main([*plan, "--batch_size", "24", "--micro_batch_size", "auto"])
    assert "rows per forward pass  8\n" in capsys.readouterr().out
    assert not (tmp_path / FILE).exists()


def test_a_trial_leaves_no_trace():
    model, accelerator = tiny_model(dropout=0.2), Accelerator(cpu=True)
    counting = model.model.embed_tokens = Counting(model.model.embed_tokens)
    generator = torch.get_rng_state()
    assert fits(model.train(), rows(range(3)), Losses(num_items), accelerator)
    SmallMemory(model, 2, in_backward=True)
    assert not fits(model, rows(range(3)), Losses(num_items), accelerator)
    assert torch.equal(torch.get_rng_state(), generator)
    assert int(counting.calls) == 0
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_longest_rows_are_tried():
    lengths = [3, 9, 1, 9, 5, 2]
    table = datasets.Dataset.from_dict({"input_ids": [list(range(length)) for length in lengths]})
    seen = []

    class OfTable(Objective):
        def batches_in_order(self, some, *, batch_size: int):
            seen.append([len(row) for row in some["input_ids"]])
            yield {}

    OfTable.rows = {"train": table}
    longest_rows(OfTable(), 3)
    OfTable.rows = {"train": table.add_column("length", [7, 1, 8, 1, 1, 1])}  # what counts, where it is known
    longest_rows(OfTable(), 2)
    assert seen == [[9, 9, 5], [1, 3]]
