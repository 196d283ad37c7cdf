"""Truncated backpropagation through time: what is carried is the state that the unbroken text would have had."""

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from tiny_run import StoppingStream, Stream, arguments, num_items, read_history, run, tiny_model, tiny_recurrent

from bmtk.training.arguments import LoopArguments
from bmtk.training.prepared import prepare
from bmtk.training.profiling import seconds_per_step
from bmtk.training.tbptt import TBPTTState
from bmtk.training.updates import Losses, LossSum, Updater

CELLS = ["lstm", "gru", "elman", "mingru"]


def updater(model, recurrent, **settings) -> Updater:
    prepared = prepare(model, LoopArguments(**settings), Accelerator(cpu=True))
    return Updater(prepared, Losses(num_items), max_grad_norm=0.0, recurrent=recurrent)


@pytest.mark.parametrize("micro_batch_size", [0, 3])
@pytest.mark.parametrize("cell_type", CELLS)
def test_steps_that_carry_the_state_see_what_the_unbroken_text_shows(cell_type, micro_batch_size):
    steps, batches = 4, Stream(micro_batch_size)
    step_by_step = updater(tiny_recurrent(cell_type=cell_type), TBPTTState(), learning_rate=0.0)
    losses = [float(step_by_step.step(batches[step]).loss) for step in range(steps)]
    whole = [Stream(0)[step][0] for step in range(steps)]
    text, labels = (torch.cat([batch[name] for batch in whole], dim=1) for name in ("input_ids", "labels"))
    logits = tiny_recurrent(cell_type=cell_type)(input_ids=text).logits
    expected = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
    assert losses == pytest.approx([part.mean().item() for part in expected.chunk(steps, dim=1)], rel=1e-5)


@pytest.mark.parametrize("cell_type", CELLS)
def test_a_lane_that_begins_anew_forgets(cell_type):
    carried, batch = TBPTTState(), Stream(0)[0][0]
    batch["position_ids"] = torch.arange(batch["input_ids"].shape[1]).expand_as(batch["input_ids"])
    steps = updater(tiny_recurrent(cell_type=cell_type), carried, learning_rate=0.0)
    first, second = (float(steps.step([batch]).loss) for _ in range(2))
    assert second == pytest.approx(first, rel=1e-6)
    del batch["position_ids"]
    assert float(steps.step([batch]).loss) != pytest.approx(first, rel=1e-4)


def test_no_gradient_flows_into_the_step_before():
    carried = TBPTTState()
    steps = updater(tiny_recurrent(), carried, learning_rate=0.01)
    for step in range(3):
        steps.step(Stream(0)[step])  # would fail at the second step: its graph was freed
        assert not carried.rows.requires_grad


def test_a_state_that_is_not_finite_begins_anew():
    carried = TBPTTState()
    carried.add(torch.tensor([[1.0, float("nan")], [float("inf"), 2.0]]))
    carried.turn()
    assert carried.rows.tolist() == [[1.0, 0.0], [0.0, 2.0]]


@pytest.mark.parametrize("model", [tiny_recurrent, tiny_model])
def test_a_batch_of_nothing_but_padding_adds_nothing(model):
    """The last lanes end one row before the others, so a process may have no item to begin with."""
    model = model().train()
    batch = Stream(0)[0][0]
    batch |= {name: torch.full_like(batch["labels"], -100) for name in ("labels", "shift_labels")}
    loss = LossSum(model, model, torch.device("cpu"))(batch, 0, torch.tensor(10))
    loss.backward()
    assert loss.item() == 0
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in model.parameters())


def test_a_state_of_another_width_is_refused():
    batch = Stream(0)[0][0]
    with pytest.raises(ValueError, match="initial_state has width 3, and the state of this model 64; pass the final"):
        tiny_recurrent()(batch["input_ids"], initial_state=torch.zeros(8, 3))


def test_a_plan_refuses_what_the_run_would():
    with pytest.raises(ValueError, match="and LlamaForCausalLM has none; leave it out, or set model_type to bm_rnn"):
        seconds_per_step(tiny_model(), Stream(0), Accelerator(cpu=True), Losses(num_items))


def test_a_model_without_a_state_is_refused():
    with pytest.raises(ValueError, match="carries the state of a causal bm_rnn from row to row, and LlamaForCausalLM"):
        updater(tiny_model(), TBPTTState())


@pytest.mark.parametrize("step", [1, 3])
def test_a_run_that_was_stopped_goes_on_from_the_same_state(tmp_path, step):
    straight = run(arguments(tmp_path / "straight"), model=tiny_recurrent(dropout=0.2), batches=Stream(0))
    with pytest.raises(SystemExit):
        run(arguments(tmp_path / "stopped"), model=tiny_recurrent(dropout=0.2), batches=StoppingStream(step))
    stopped = run(arguments(tmp_path / "stopped"), model=tiny_recurrent(dropout=0.2), batches=Stream(0))
    assert stopped == straight
    assert read_history(tmp_path / "stopped") == read_history(tmp_path / "straight")
    (state,) = load_file(next(tmp_path.glob("straight/checkpoints/step-00000006/training_state/carried.*"))).values()
    assert state.shape == (8, 2 * 2 * 16)  # a row for every lane: hidden state and cell of two layers
    assert state.abs().min() > 0
