"""Steps that spike: found on real curves, skipped without a trace, and left behind where they do not end."""

import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from faults import BACK, Scaled, Without
from safetensors.torch import load_file
from tiny_run import Stopping, arguments, digest, num_items, read_history, run, tiny_model, tiny_recurrent

from bmtk.errors import Diverged
from bmtk.training import loop
from bmtk.training.arguments import LoopArguments
from bmtk.training.prepared import prepare
from bmtk.training.rollback import data_done, data_step
from bmtk.training.spikes import FEWEST, WINDOW, SpikeDetector, levels
from bmtk.training.tbptt import TBPTTState
from bmtk.training.updates import Losses, Updater

CURVES = sorted(Path(__file__).with_name("curves").glob("*.json"))
NEVER = torch.tensor(False)


def found(pairs, sigma: float = 6.0) -> list[int]:
    """The steps, counted from 1, that the detector finds in a curve of losses and gradient norms."""
    detector, steps = SpikeDetector(sigma, torch.device("cpu")), []
    for step, (loss, norm) in enumerate(pairs, start=1):
        if detector.sees_spike(torch.tensor(loss), torch.tensor(norm), bad=~torch.isfinite(torch.tensor(norm))):
            steps.append(step)
    return steps


def found_by_hand(pairs, sigma: float) -> list[int]:
    """The same in a few lines: medians of Python lists."""
    kept: list[tuple[float, float]] = []
    steps = []
    for step, pair in enumerate(pairs, start=1):
        if not all(map(math.isfinite, pair)):
            continue
        recent = kept[-WINDOW:]
        far = []
        for column, value in enumerate(pair):
            values = [each[column] for each in recent]
            middle = float(np.median(values)) if values else 0.0
            deviation = max(1.4826 * float(np.median([abs(v - middle) for v in values] or [0])), 0.01 * abs(middle))
            far.append(deviation > 0 and value > middle + sigma * deviation)
        if len(recent) >= FEWEST and all(far):
            steps.append(step)
        else:
            kept.append(pair)
    return steps


@pytest.mark.parametrize("sigma", [0.1, 1.0])
def test_host_and_device_find_the_same_spikes_and_keep_the_same_window(sigma):
    host, device = (SpikeDetector(sigma, torch.device("cpu")) for _ in range(2))
    pairs = np.random.default_rng(4).standard_t(3, (1500, 2)) + 5
    pairs[[80, 200]] = [[math.nan, 1.0], [3.0, math.inf]]
    seen = []
    for pair in pairs.tolist():
        numbers = torch.tensor(pair, dtype=torch.float64)
        seen.append(host.host_sees_spike(*pair))
        assert bool(device._device_sees_spike(*numbers, bad=~torch.isfinite(numbers).all())) == seen[-1]
        assert torch.equal(host.window, device.window)
    assert 10 < sum(seen) < 900


@pytest.mark.parametrize("sigma", [2.0, 6.0])
def test_the_running_median_and_deviation_are_those_of_brute_force(sigma):
    generator = np.random.default_rng(3)
    pairs = np.abs(generator.standard_t(2, (400, 2)).cumsum(axis=0) * 0.01 + generator.standard_t(2, (400, 2)) + 5)
    pairs[[70, 200, 201]] = [[math.nan, 1.0], [3.0, math.inf], [math.inf, math.nan]]
    pairs[[90, 250, 251, 252, 399]] = [500.0, 900.0]
    pairs = np.float32(pairs).tolist()
    expected = found_by_hand(pairs, sigma)
    assert {91, 251, 252, 253, 400} <= set(expected)
    assert found(pairs, sigma) == expected


def test_the_levels_are_median_and_median_distance_for_every_number_of_steps():
    detector, kept = SpikeDetector(6.0, torch.device("cpu")), []
    for loss, norm in (torch.rand(150, 2, generator=torch.Generator().manual_seed(2)) - 0.3).tolist():
        detector.sees_spike(torch.tensor(loss), torch.tensor(norm), bad=NEVER)
        kept.append((loss, norm))
        recent = np.float32(kept[-128:]).astype(float)
        middle = np.median(recent, axis=0)
        deviation = np.maximum(1.4826 * np.median(abs(recent - middle), axis=0), 0.01 * abs(middle))
        for ours, theirs in zip(levels(detector.window), (middle, deviation), strict=True):
            np.testing.assert_allclose(ours.numpy(), theirs, rtol=1e-12)


def test_a_curve_that_stands_still_or_is_short_has_no_spike():
    assert found([[0.0, 0.0]] * 200 + [[1.0, 1.0]]) == []
    assert found([[2.0, 1.0]] * 200 + [[2.05, 1.05]]) == []
    assert found([[2.0, 1.0]] * 200 + [[2.2, 1.2]]) == [201]
    assert found([[2.0, 1.0]] * 63 + [[90.0, 90.0]]) == []
    assert found([[2.0, 1.0]] * 64 + [[90.0, 90.0]]) == [65]


def test_precision_and_recall_on_real_curves(capsys):
    """Short runs of the shipped data; in some of them the rows of known steps were replaced by noise.

    Rows that repeat one token are not found: they are easy, so the loss does not rise, and the gradient is clipped.
    """
    right = wrong = num_spikes = steps = alone = 0
    lines = []
    for path in CURVES:
        curve = json.loads(path.read_text())
        spikes, seen, pairs = set(curve["spikes"]), set(found(curve["pairs"])), curve["pairs"]
        lines.append(f"{path.stem:<15} {len(pairs)} steps, spikes {sorted(spikes)}, found {sorted(seen)}")
        right, wrong = right + len(spikes & seen), wrong + len(seen - spikes)
        num_spikes, steps = num_spikes + len(spikes), steps + len(pairs)
        for column in (0, 1):
            alone += len(set(found([[pair[column]] * 2 for pair in pairs])) - spikes)
        assert spikes - seen == (spikes if path.stem == "decoder_same" else set())
    precision, recall = right / (right + wrong), right / num_spikes
    lines.append(
        f"precision {precision:.3f}, recall {recall:.3f} in {steps} steps; false alarms of one alone: {alone}"
    )
    with capsys.disabled():
        sys.stdout.write("\n" + "\n".join(lines) + "\n")
    assert (len(CURVES), num_spikes, wrong) == (11, 34, 0)
    assert recall > 0.85
    assert alone > 20  # why both are asked for


def test_a_detector_goes_on_where_another_one_was():
    pairs = torch.rand(200, 2, generator=torch.Generator().manual_seed(1)) + 1
    one, other = (SpikeDetector(6.0, torch.device("cpu")) for _ in range(2))
    for loss, norm in pairs[:150]:
        one.sees_spike(loss, norm, bad=NEVER)
    other.restore(json.loads(json.dumps(one.state())))
    for loss, norm in pairs[150:]:
        one.sees_spike(loss, norm, bad=NEVER)
        other.sees_spike(loss, norm, bad=NEVER)
    assert len(one.state()) == WINDOW
    assert one.state() == other.state()


@pytest.mark.gpu
def test_on_a_gpu_the_host_does_not_wait_for_the_decision():
    pairs = torch.rand(100, 2, generator=torch.Generator().manual_seed(1)) + 1
    pairs[90] = 50.0
    here, there = SpikeDetector(6.0, torch.device("cpu")), SpikeDetector(6.0, torch.device("cuda"))
    expected = [bool(here.sees_spike(loss, norm, bad=NEVER)) for loss, norm in pairs]
    rows, never = [(pair[0], pair[1]) for pair in pairs.cuda()], NEVER.cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        seen = [there.sees_spike(loss, norm, bad=never) for loss, norm in rows]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.stack(seen).tolist() == expected
    assert there.state() == here.state()


class ScaledAndStopping(Scaled, Stopping):
    """The same, with a signal before a step of the data."""

    def __init__(self, model, steps, stop: int):
        Stopping.__init__(self, stop)
        Scaled.__init__(self, model, steps, math.inf)
        self.step = stop


def lazy(monkeypatch) -> None:
    """As on a GPU: the host reads the steps later, when further ones were made."""

    class Lazy(Updater):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.skips_on_device = True

    monkeypatch.setattr(loop, "Updater", Lazy)


@pytest.mark.parametrize("device_side", [False, True])
def test_a_spike_is_skipped_and_leaves_a_bundle(device_side, tmp_path, monkeypatch, caplog):
    if device_side:
        lazy(monkeypatch)
    model = tiny_model(dropout=0.2)
    batches = Scaled(model, [69])
    run(
        arguments(tmp_path, num_train_steps=80, eval_steps=0, save_steps=0, learning_rate=1e-4),
        model=model,
        batches=batches,
    )
    weights = [batches.before[step][0] for step in (69, 70, 71)]
    assert weights[0] == weights[1] != weights[2]
    (folder,) = (tmp_path / "bad_steps").iterdir()
    assert folder.name == "step-00000070-data-00000070"
    event, bundle = json.loads((folder / "event.json").read_text()), load_file(folder / "process-0.safetensors")
    assert (event["what"], event["step"], event["data"]) == ("spike", 70, 70)
    assert event["loss"] > 1000 > 10 * event["loss_median"]
    assert torch.equal(bundle["torch"], batches.before[69][1])
    assert (bundle["rows"].tolist(), bundle["epochs"].tolist()) == (list(range(552, 560)), [0] * 8)
    assert torch.isfinite(bundle["window"]).all(dim=1).sum() == 69
    assert caplog.text.count("step 70: loss ") == 1
    assert "both are 6 robust deviations above the last steps" in caplog.text


def test_a_run_that_is_stopped_before_a_spike_skips_it_too(tmp_path):
    straight, args = tiny_model(), arguments(tmp_path / "straight", num_train_steps=80, learning_rate=1e-4)
    expected = run(args, model=straight, batches=Scaled(straight, [74]))
    model, args = tiny_model(), arguments(tmp_path / "stopped", num_train_steps=80, learning_rate=1e-4)
    with pytest.raises(SystemExit):
        run(args, model=model, batches=Stopping(72))
    model = tiny_model()
    assert run(args, model=model, batches=Scaled(model, [74])) == expected
    assert (tmp_path / "stopped" / "bad_steps" / "step-00000075-data-00000075").is_dir()


def test_the_steps_of_the_data_are_those_that_are_left():
    for left_out in ([], [0], [2, 3, 5], [9, 8, 1, 0]):
        expected = [step for step in range(30) if step not in left_out][:20]
        assert [data_step(step, left_out) for step in range(20)] == expected
        assert [data_done(step, left_out) for step in range(21)] == [0, *(step + 1 for step in expected)]


@pytest.mark.parametrize("device_side", [False, True])
def test_a_row_of_bad_steps_is_as_if_its_data_had_not_been_there(device_side, tmp_path, monkeypatch, caplog):
    expected = run(arguments(tmp_path / "without", **BACK), batches=Without([9, 10, 11]))
    if device_side:
        lazy(monkeypatch)
    model = tiny_model(dropout=0.2)
    assert (
        run(arguments(tmp_path / "run", **BACK), model=model, batches=Scaled(model, [9, 10, 11], math.inf)) == expected
    )
    assert read_history(tmp_path / "run") == read_history(tmp_path / "without")
    assert "steps 10 to 12 were not applied: going back to the checkpoint after step 8" in caplog.text
    note = json.loads((tmp_path / "run" / "bad_steps" / "rollback-00000010-data-00000010.json").read_text())
    assert note == {"what": "rollback", "steps": [10, 11, 12], "back_to": 8, "left_out": [10, 11, 12]}


@pytest.mark.parametrize("stop", [10, 12, 13, 17])
def test_a_run_that_is_stopped_around_a_rollback_ends_with_the_same_bytes(stop, tmp_path):
    expected = run(arguments(tmp_path / "without", **BACK), batches=Without([9, 10, 11]))
    model = tiny_model(dropout=0.2)
    with pytest.raises(SystemExit):
        run(arguments(tmp_path / "run", **BACK), model=model, batches=ScaledAndStopping(model, [9, 10, 11], stop))
    model = tiny_model(dropout=0.2)
    assert (
        run(arguments(tmp_path / "run", **BACK), model=model, batches=Scaled(model, [9, 10, 11], math.inf)) == expected
    )
    assert read_history(tmp_path / "run") == read_history(tmp_path / "without")


def test_checkpoints_of_steps_that_are_made_again_are_replaced(tmp_path):
    settings = {**BACK, "num_train_steps": 12, "save_steps": 1}
    run(arguments(tmp_path / "without", **settings), batches=Without([8, 9, 10]))
    model = tiny_model(dropout=0.2)
    run(arguments(tmp_path / "run", **settings), model=model, batches=Scaled(model, [8, 9, 10], math.inf))
    for step in range(1, 13):
        ours, theirs = (
            tmp_path / name / "checkpoints" / f"step-{step:08d}" / "model.safetensors" for name in ("run", "without")
        )
        assert ours.read_bytes() == theirs.read_bytes(), step


def test_a_second_row_ends_the_run_unless_it_has_got_on_since(tmp_path):
    model = tiny_model()
    with pytest.raises(
        Diverged, match=r"step 12: these are 3 .* in a row.* going back from step 10 did not help.*whole"
    ):
        run(arguments(tmp_path / "stuck", **BACK), model=model, batches=Scaled(model, range(9, 20), math.inf))
    checkpoints = [path.name for path in sorted((tmp_path / "stuck" / "checkpoints").iterdir())]
    assert checkpoints == ["step-00000004", "step-00000008", "step-00000012"]
    model, twice = tiny_model(dropout=0.2), [9, 10, 11, 16, 17, 18]  # the second time after the checkpoint of step 12
    result = run(arguments(tmp_path / "twice", **BACK), model=model, batches=Scaled(model, twice, math.inf))
    assert result == run(arguments(tmp_path / "without", **BACK), batches=Without(twice))


def test_without_a_checkpoint_to_go_back_to_the_run_ends(tmp_path):
    model = tiny_model()
    with pytest.raises(
        Diverged, match=r"step 4: these are 3 such steps in a row, so skipping does not help, and the "
    ):
        run(arguments(tmp_path, **BACK), model=model, batches=Scaled(model, [1, 2, 3], math.inf))
    assert Diverged.exit_code == 65


@pytest.mark.parametrize("device_side", [False, True])
def test_a_skipped_step_leaves_the_recurrent_state_as_it_was(device_side):
    model, carried = tiny_recurrent(), TBPTTState()
    updater = Updater(prepare(model, LoopArguments(), Accelerator(cpu=True)), Losses(num_items), max_grad_norm=1.0)
    updater.recurrent = updater.loss.recurrent = carried
    updater.skips_on_device = device_side
    batches = Scaled(model, [0, 2], math.inf)
    assert bool(updater.step(batches[0]).rejected)
    assert not carried.rows.any()
    assert not bool(updater.step(batches[1]).rejected)
    before = carried.rows.clone()
    assert before.any()
    assert bool(updater.step(batches[2]).rejected)
    assert torch.equal(carried.rows, before)


def test_a_spike_under_a_gradient_scaler_is_not_applied_and_keeps_the_scale():
    model, accelerator = tiny_model(), Accelerator(cpu=True)
    prepared = prepare(model, LoopArguments(learning_rate=1e-4), accelerator)
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    updater = Updater(prepared, Losses(num_items), max_grad_norm=1.0)
    updater.spikes = SpikeDetector(6.0, torch.device("cpu"))
    batches = Scaled(model, [70])
    for step in range(70):
        assert not updater.step(batches[step]).rejected
    before = digest(model)
    assert updater.step(batches[70]).rejected is True
    assert digest(model) == before
    assert accelerator.scaler.get_scale() == 256.0
    assert not updater.step(batches[71]).rejected
    assert digest(model) != before
