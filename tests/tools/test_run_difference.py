"""Where two runs differ first: named with step, file, tensor and size; what a clock measures is no difference."""

import json
import math
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from bmtk.tools.run_difference import FINAL, Bounds, Tensors, compare, different_tensors, first_difference, relative

BOUNDS = Bounds(loss=1e-4, grad_norm=1e-3, weights=1e-3)


def write_run(folder, *, losses=(4.0, 3.0, 2.0, 1.5), norm=1.0, weights=None):
    """A run of four steps with checkpoints after the second and the fourth."""
    weights = weights or {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(3)}
    folder.mkdir()
    lines = [
        {"step": step, "loss": loss, "grad_norm": norm, "seconds": id(folder), "tokens_per_second": id(losses)}
        for step, loss in enumerate(losses, 1)
    ]
    (folder / "history.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for step in (2, 4):
        checkpoint = folder / "checkpoints" / f"checkpoint-{step}"
        checkpoint.mkdir(parents=True)
        save_file({name: value * step for name, value in weights.items()}, checkpoint / "model.safetensors")
        torch.save({"state": {0: {"exp_avg": torch.ones(2) * step, "step": step}}}, checkpoint / "optimizer.pt")
    save_file(weights, folder / "model.safetensors")
    return folder


@pytest.fixture
def whole(tmp_path):
    return write_run(tmp_path / "whole")


@pytest.fixture
def other(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "other")


def test_runs_that_differ_by_the_clock_alone_are_equal(whole, tmp_path):
    assert first_difference(whole, write_run(tmp_path / "other")) is None


def test_another_loss_is_named_with_its_step_and_size(whole, tmp_path):
    other = write_run(tmp_path / "other", losses=(4.0, 3.0, 2.25, 1.5))
    expected = "step 3: history.jsonl: loss is 2.0 and 2.25, 0.25 apart"
    assert str(first_difference(whole, other)) == expected


@pytest.mark.parametrize(("cut", "owner"), [("other", "first"), ("whole", "second")])
def test_a_step_that_one_run_has_not_logged_is_named(cut, owner, whole, other, tmp_path):
    path = tmp_path / cut / "history.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:3]))
    assert str(first_difference(whole, other)) == f"step 4: history.jsonl: only the {owner} run has this line"


def test_a_bit_of_an_earlier_checkpoint_comes_before_a_later_loss(whole, tmp_path):
    other = write_run(tmp_path / "other", losses=(4.0, 3.0, 2.25, 1.5))
    b = np.full(3, 2.0, dtype=np.float32)
    b.view(np.uint32)[1] ^= 1  # the last bit of 2.0 in float32 is 2 ** -22
    checkpoint = other / "checkpoints" / "checkpoint-2"
    save_file({"a": torch.arange(6.0).reshape(2, 3) * 2, "b": torch.from_numpy(b)}, checkpoint / "model.safetensors")
    what = f"checkpoints/checkpoint-2/model.safetensors: b differs by up to {2.0**-22:.3g}"
    assert str(first_difference(whole, other)) == f"step 2: {what}"


def test_another_state_of_trainers_optimizer_is_named(whole, other):
    state = {"state": {0: {"exp_avg": torch.ones(2) * 4 + torch.tensor([0, 0.5]), "step": 4}}}
    torch.save(state, other / "checkpoints" / "checkpoint-4" / "optimizer.pt")
    what = "checkpoints/checkpoint-4/optimizer.pt: state/0/exp_avg differs by up to 0.5"
    assert str(first_difference(whole, other)) == f"step 4: {what}"


def test_checkpoints_that_only_one_run_has_kept_are_not_compared(whole, other):
    shutil.rmtree(other / "checkpoints" / "checkpoint-2")
    assert first_difference(whole, other) is None


def test_final_weights_are_compared_to_the_bit(whole, other):
    save_file({"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor([1.0, 1.0, 0.5])}, other / "model.safetensors")
    assert str(first_difference(whole, other)) == "final model: model.safetensors: b differs by up to 0.5"
    (other / "model.safetensors").unlink()
    assert str(first_difference(whole, other)).endswith("model.safetensors: only the first run has this file")


def test_nan_is_itself_and_minus_zero_is_not_zero():
    ours = {"x": torch.tensor([math.nan, 0.0]), "n": torch.tensor(3)}
    assert list(different_tensors(ours, {"x": torch.tensor([math.nan, 0.0]), "n": torch.tensor(3)})) == []
    (found,) = different_tensors(ours, {"x": torch.tensor([math.nan, -0.0]), "n": torch.tensor(3)})
    assert found.startswith("x differs by up to")
    assert next(different_tensors(ours, {**ours, "n": torch.tensor([3])})).startswith("n is () torch.int64 and (1,)")


def test_tensors_of_several_files_are_one_set(tmp_path):
    save_file({"a": torch.ones(2)}, tmp_path / "1.safetensors")
    save_file({"b": torch.zeros(1)}, tmp_path / "2.safetensors")
    found = Tensors(tmp_path.glob("*.safetensors"))
    assert {name: value.tolist() for name, value in found.items()} == {"a": [1.0, 1.0], "b": [0.0]}


# Within bounds -------------------------------------------------------------------------------------------------------


def test_the_largest_relative_differences_are_those_of_numpy(whole, tmp_path):
    weights = {"a": torch.arange(6.0).reshape(2, 3) + 1e-4, "b": torch.ones(3), "n.running_mean": torch.ones(1)}
    other = write_run(tmp_path / "other", losses=(4.0, 3.0, 2.0001, 1.5), norm=1.0005, weights=weights)
    save_file(
        {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(3), "n.running_mean": torch.zeros(1)},
        whole / "model.safetensors",
    )
    found = compare(whole, other, BOUNDS)
    one = np.concatenate([np.arange(6.0), np.ones(3)])
    two = np.concatenate([np.float32(np.arange(6.0)) + np.float32(1e-4), np.ones(3)])
    assert found.loss == pytest.approx(0.0001 / 2.0001)
    assert found.grad_norm == pytest.approx(0.0005 / 1.0005)
    assert found.weights == pytest.approx(np.linalg.norm(one - two) / np.linalg.norm(one), rel=1e-6)
    assert (found.first, found.num_steps, found.left_out) == (None, 4, ["n.running_mean"])


def test_the_first_step_out_of_bounds_is_named(whole, tmp_path):
    other = write_run(tmp_path / "other", losses=(4.0, 3.003, 2.5, 1.5))
    found = compare(whole, other, BOUNDS)
    assert str(found.first) == "step 2: loss is 3.0 and 3.003, 0.001 relative; 1e-04 is allowed"
    assert found.loss == pytest.approx(0.2)


def test_weights_out_of_bounds_are_named_with_the_tensor_that_is_most_apart(whole, other):
    save_file({"a": torch.arange(6.0).reshape(2, 3), "b": torch.full((3,), 1.1)}, other / "model.safetensors")
    found = compare(whole, other, BOUNDS)
    assert found.first.step == FINAL
    assert "the weights are apart, b most" in str(found.first)


@pytest.mark.parametrize(
    ("one", "two", "expected"), [(1.0, 1.1, 0.1 / 1.1), (0.0, 0.0, 0.0), (0.0, 2.0, 1.0), (None, None, 0.0)]
)
def test_a_relative_difference_is_one_of_the_larger_number(one, two, expected):
    assert relative(one, two) == pytest.approx(expected)


def test_a_loss_that_is_not_a_number_is_out_of_bounds(whole, tmp_path):
    other = write_run(tmp_path / "other", losses=(4.0, None, 2.0, 1.5))
    assert compare(whole, other, BOUNDS).first.step == 2
    assert math.isnan(relative(1.0, math.inf))
