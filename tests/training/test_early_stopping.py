"""A run that ends early ends where a reading of the whole run's history says, with the model that was best there."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_run import VOCABULARY, Stopping, TinyBatches, arguments, read_history, rows, run, tiny_model

from bmtk.training.checkpoint import TrainState
from bmtk.training.run_log import Hooks, RunLog
from bmtk.training.throughput import Meter

SETTINGS = {"num_train_steps": 12, "eval_steps": 1, "learning_rate": 0.01, "schedule": "constant", "warmup_steps": 0}
PATIENT = SETTINGS | {"early_stopping_patience": 3, "save_steps": 0, "save_total_limit": 1}


class Turning(TinyBatches):
    """The validation rows themselves, four times, and then with wrong answers: the loss must fall and then rise."""

    def __getitem__(self, step: int) -> list[dict[str, torch.Tensor]]:
        batch = rows(range(500, 508))
        if step >= 4:
            wrong = (batch["labels"] + 1) % VOCABULARY
            batch["labels"] = batch["shift_labels"] = wrong.where(batch["labels"] != -100, -100)
        return [batch]


class StoppingTurning(Stopping, Turning):
    """The same, with a signal on the way."""


@pytest.fixture(scope="module")
def whole(tmp_path_factory, training_seed) -> Path:
    """A run that does not end early, with a checkpoint of every step."""
    folder = tmp_path_factory.mktemp("whole")
    started(training_seed, folder, **SETTINGS | {"save_steps": 1})
    return folder


def started(training_seed: int, folder: Path, *, batches=None, **settings) -> dict:
    """The last facts of a run from the weights of that seed."""
    model = tiny_model(dropout=0.2, seed=7 + training_seed)
    return run(arguments(folder, **settings), model=model, batches=batches or Turning(0))


def losses(folder: Path) -> list[float]:
    return [row["validation/loss"] for row in read_history(folder) if "validation/loss" in row]


def ends_at(values: list[float], patience: int) -> tuple[int, int]:
    """The step after which the run ends, and the one that was best."""
    for step in range(1, len(values) + 1):
        best = 1 + min(range(step), key=lambda place: values[place])
        if step - best == patience:
            return step, best
    raise AssertionError("these losses never stop falling")


def weights(folder: Path, step: int | None = None) -> dict[str, torch.Tensor]:
    return load_file((folder / "checkpoints" / f"step-{step:08d}" if step else folder) / "model.safetensors")


def equal(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.mark.trains
def test_the_run_ends_after_the_patience_and_leaves_the_best_model(whole, tmp_path, training_seed):
    last, best = ends_at(losses(whole), patience=3)
    assert 1 < best < last < 12
    first = started(training_seed, tmp_path, **PATIENT)
    assert first["step"] == last
    assert equal(weights(tmp_path), weights(whole, best))
    assert first["metrics"]["validation/loss"] == losses(whole)[best - 1]
    assert losses(tmp_path) == losses(whole)[:last]
    saved = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert saved == [f"step-{best:08d}", f"step-{last:08d}"]
    before = (tmp_path / "history.jsonl").read_bytes()
    assert started(training_seed, tmp_path, batches=StoppingTurning(0), **PATIENT) == first, (
        "there is nothing left to train"
    )
    assert (tmp_path / "history.jsonl").read_bytes() == before


@pytest.mark.trains
@pytest.mark.parametrize("back", [1, 2])
def test_a_stopped_run_goes_on_counting(whole, back, tmp_path, training_seed):
    last, best = ends_at(losses(whole), patience=3)
    with pytest.raises(SystemExit):
        started(training_seed, tmp_path, batches=StoppingTurning(last - 1 - back), **PATIENT)
    assert started(training_seed, tmp_path, **PATIENT)["step"] == last
    assert equal(weights(tmp_path), weights(whole, best))


@pytest.mark.trains
def test_the_best_averaged_weights_are_left(tmp_path, training_seed):
    settings = PATIENT | {"ema_decay": 0.3, "save_total_limit": 0, "save_steps": 1}
    last = started(training_seed, tmp_path, **settings)["step"]
    expected = ends_at(losses(tmp_path), patience=3)
    assert last == expected[0]
    checkpoint = tmp_path / "checkpoints" / f"step-{expected[1]:08d}"
    averages = load_file(checkpoint / "training_state" / "averages.safetensors")
    assert all(torch.equal(value, averages[name]) for name, value in weights(tmp_path).items())


@pytest.mark.trains
def test_a_run_that_is_best_at_its_end_is_left_as_it_is(tmp_path, training_seed):
    assert started(training_seed, tmp_path, **PATIENT | {"num_train_steps": 2})["step"] == 2
    assert losses(tmp_path)[-1] == min(losses(tmp_path))
    state = json.loads((tmp_path / "checkpoints" / "step-00000002" / "training_state" / "state.json").read_text())
    assert (state["progress"]["best_step"], state["progress"]["worse"]) == (2, 0)


@pytest.mark.parametrize(("metric", "best_step"), [("validation/loss", 2), ("validation/accuracy", 3)])
def test_better_is_lower_for_losses_and_higher_for_others_and_never_unknown(metric, best_step, tmp_path):
    args, state = arguments(tmp_path, **PATIENT), TrainState()
    values = [float("nan"), 0.1, 0.9, 0.5, float("nan"), 0.9]
    hooks = Hooks(evaluate=lambda: {metric: values[state.step - 1]}, main_metric=metric)
    progress = RunLog(_Main(), args, state, total=12, meter=Meter(), hooks=hooks)
    for state.step in range(1, 7):
        progress.evaluate_if_due()
    assert (state.best_step, state.worse, progress.is_over) == (best_step, 6 - best_step, True)


class _Main:
    is_main_process, num_processes, process_index = True, 1, 0


def test_what_early_stopping_needs_is_told(tmp_path):
    with pytest.raises(ValueError, match="early_stopping_patience=2 needs evaluations; set eval_steps"):
        arguments(tmp_path, early_stopping_patience=2, eval_steps=0)
    hooks, args = Hooks(evaluate=dict), arguments(tmp_path, **PATIENT)
    progress = RunLog(_Main(), args, TrainState(step=1), total=12, meter=Meter(), hooks=hooks)
    with pytest.raises(ValueError, match=r"goes by validation/loss, and the evaluation has nothing; give validation"):
        progress.evaluate_if_due()


@pytest.mark.trains
def test_a_best_checkpoint_that_is_damaged_is_told(whole, tmp_path, training_seed):
    _, best = ends_at(losses(whole), patience=3)
    started(training_seed, tmp_path, **PATIENT)
    (tmp_path / "checkpoints" / f"step-{best:08d}" / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"the best checkpoint .* is damaged: model\.safetensors is missing"):
        started(training_seed, tmp_path, **PATIENT)
