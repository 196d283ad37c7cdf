"""The loop: gradients do not depend on how a batch is cut, a run goes on where it was, and bad steps never count."""

import json
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from faults import BACK, Without
from safetensors.torch import load_file
from tiny_run import (
    Stopping,
    StoppingStream,
    Stream,
    TinyBatches,
    arguments,
    digest,
    num_items,
    predict,
    read_history,
    rows,
    run,
    tiny_model,
    tiny_recurrent,
)
from transformers import GPT2Config, GPT2LMHeadModel, ResNetConfig, ResNetForImageClassification
from two_processes import CARRIED, FROZEN

import bmtk
from bmtk.training import loop
from bmtk.training.arguments import LoopArguments
from bmtk.training.evaluation import predict_all
from bmtk.training.guards import SpikeWatch
from bmtk.training.manifest import damages
from bmtk.training.prepared import prepare
from bmtk.training.updates import Losses, LossSum, Updater, accepts_item_count, divides_by_count

BUNDLE = ("event.json", "process-0.safetensors", "process-1.safetensors")
SCRIPT = Path(__file__).with_name("tiny_run.py")
ENVIRONMENT = os.environ | {
    "ACCELERATE_USE_CPU": "true",
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": str(Path(bmtk.__file__).parents[1]),
}


def gradient(micro_batch_size: int) -> dict[str, torch.Tensor]:
    """Gradient of one global batch that is cut into micro-batches of this size, after an update that does nothing."""
    args = LoopArguments(learning_rate=0.0)
    prepared = prepare(model := tiny_model(), args, Accelerator(cpu=True))
    updater = Updater(prepared, Losses(num_items), max_grad_norm=0.0)
    optimizer = prepared.optimizer
    kept, forget = {}, optimizer.zero_grad
    optimizer.zero_grad = lambda **_: kept.update({n: p.grad.clone() for n, p in model.named_parameters()}) or forget()
    update = updater.step(TinyBatches(micro_batch_size)[3])
    return kept | {"loss": update.loss}


@pytest.mark.parametrize("micro_batch_size", [1, 3, 4])
def test_the_gradient_is_the_same_for_every_micro_batch_size(micro_batch_size):
    whole, cut = gradient(0), gradient(micro_batch_size)
    for name, value in whole.items():
        torch.testing.assert_close(cut[name], value, rtol=1e-5, atol=1e-6, msg=name)


def test_the_loss_of_a_step_is_the_mean_over_the_predicted_tokens_of_the_global_batch():
    batch = rows(range(24, 32))
    logits = tiny_model()(batch["input_ids"]).logits
    oracle = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), ignore_index=-100)
    torch.testing.assert_close(gradient(3)["loss"], oracle.detach())


def test_a_model_whose_loss_is_a_mean_is_weighed_by_its_items():
    class MeanLoss(type(tiny_model())):
        accepts_loss_kwargs = False

        def forward(self, *inputs, **kwargs):
            assert "num_items_in_batch" not in kwargs
            return super().forward(*inputs, **kwargs)

    model = MeanLoss(tiny_model().config)
    model.load_state_dict(tiny_model().state_dict())
    prepared = prepare(model, LoopArguments(learning_rate=0.0), Accelerator(cpu=True))
    updater = Updater(prepared, Losses(num_items), max_grad_norm=0.0)
    torch.testing.assert_close(updater.step(TinyBatches(3)[3]).loss, gradient(0)["loss"])


def test_whether_a_loss_is_divided_by_the_count_is_measured():
    """transformers' ResNet accepts num_items_in_batch and drops it; GPT-2 divides by it."""
    ids = torch.randint(0, 8, (2, 6))
    decoder = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=8, n_positions=8))
    assert divides_by_count(decoder, {"input_ids": ids, "labels": ids}, {})
    images = ResNetForImageClassification(
        ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1], num_labels=3)
    ).train()
    batch = {"pixel_values": torch.randn(4, 3, 16, 16), "labels": torch.tensor([0, 1, 2, 1])}
    statistics = {name: buffer.clone() for name, buffer in images.named_buffers()}
    torch.manual_seed(0)
    assert accepts_item_count(images)
    assert not divides_by_count(images, batch, {})
    assert images.training
    assert torch.equal(torch.rand(1), torch.rand(1, generator=torch.Generator().manual_seed(0)))
    assert all(torch.equal(buffer, statistics[name]) for name, buffer in images.named_buffers())
    images.eval()
    losses, count = LossSum(images, images, torch.device("cpu")), torch.tensor(4)
    parts = [{name: value[part] for name, value in batch.items()} for part in (slice(0, 3), slice(3, 4))]
    total = losses(parts[0], 3, count) + losses(parts[1], 1, count)
    torch.testing.assert_close(total, images(**batch).loss)


def test_a_model_says_whether_its_loss_takes_the_count():
    assert accepts_item_count(GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=8)))
    model = ResNetForImageClassification(ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1]))
    model.accepts_loss_kwargs = False
    assert not accepts_item_count(model)


def test_the_loss_of_an_evaluation_does_not_depend_on_the_batch_size():
    accelerator, model, numbers = Accelerator(cpu=True), tiny_model(), range(40, 57)
    results = []
    for size in (1, 2, 5, 17):
        batches = [rows(numbers[start : start + size]) for start in range(0, len(numbers), size)]
        results.append(predict_all(model.train(), batches, accelerator, predict))
        assert model.training
    for predictions in results[1:]:
        assert [row["items"] for row in predictions] == [row["items"] for row in results[0]]
        assert [row["loss"] for row in predictions] == pytest.approx([row["loss"] for row in results[0]], rel=1e-5)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_the_exit_code_names_the_signal(tmp_path, number, code):
    former = signal.getsignal(number)  # a shell starts background jobs with SIGINT ignored
    with pytest.raises(SystemExit) as stopped:
        run(arguments(tmp_path), batches=Stopping(0, number))
    assert stopped.value.code == code
    assert signal.getsignal(number) == former


@pytest.mark.parametrize(("optimizer", "precision"), [("adamw", "fp32"), ("muon", "bf16")])
def test_a_run_that_was_stopped_at_any_step_ends_with_the_same_bytes(tmp_path, optimizer, precision):
    straight = run(arguments(tmp_path / "straight", optimizer=optimizer, precision=precision))
    for step in range(6):
        args = arguments(tmp_path / f"stopped-{step}", optimizer=optimizer, precision=precision)
        with pytest.raises(SystemExit):
            run(args, batches=Stopping(step))
        torch.rand(step + 1)  # another process starts with other generators
        assert run(args) == straight
        assert read_history(args.output_dir) == read_history(tmp_path / "straight")


def test_dropout_is_on_in_the_runs_that_are_compared(tmp_path):
    with_dropout = run(arguments(tmp_path / "with"), dropout=0.2)
    without = run(arguments(tmp_path / "without"), dropout=0.0)
    assert with_dropout["digest"] != without["digest"]


def test_training_does_not_depend_on_how_often_it_is_evaluated_or_saved(tmp_path):
    seldom = run(arguments(tmp_path / "seldom", eval_steps=0, save_steps=0))
    often = run(arguments(tmp_path / "often", eval_steps=1, save_steps=1, logging_steps=1))
    assert seldom == often


def test_recomputed_activations_train_the_same_model(tmp_path):
    kept = run(arguments(tmp_path / "kept"))
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", FutureWarning
        )  # transformers 5.23 has a second name for it, 5.20 (Python 3.10) not
        assert run(arguments(tmp_path / "recomputed", gradient_checkpointing=True)) == kept


def test_history_holds_every_step_once(tmp_path):
    run(arguments(tmp_path))
    history = read_history(tmp_path)
    assert [line["step"] for line in history if "loss" in line] == [2, 4, 6]
    assert [line["step"] for line in history if "validation/loss" in line] == [3, 6]
    tokens = sum(num_items(batch) for step in range(6) for batch in TinyBatches(0)[step])
    assert history[-2]["tokens"] == tokens
    assert set(history[0]) == {"step", "loss", "learning_rate", "grad_norm", "tokens"}


def test_a_finished_run_that_is_started_again_trains_nothing(tmp_path):
    first = run(arguments(tmp_path))
    before = (tmp_path / "history.jsonl").read_bytes()
    assert run(arguments(tmp_path), batches=Stopping(0)) == first
    assert (tmp_path / "history.jsonl").read_bytes() == before


class Poisoned(TinyBatches):
    """Batches whose step 3 (counted from 1) makes a model's loss or gradient not finite."""

    def __init__(self, model, kind: str, *, steps: range = range(2, 3)):
        super().__init__(4)
        self.steps, self.now = steps, -1
        self.factor, self.added = {"spike": (1e4, 0.0), "large": (1.0, 1e25)}.get(kind, (1.0, float("inf")))
        model.register_forward_hook(self.poison if kind != "gradient" else self.poison_gradient)

    def __getitem__(self, step: int):
        self.now = step
        return super().__getitem__(step)

    def poison(self, model, inputs, outputs):
        if self.now in self.steps and model.training:
            outputs.loss = self.factor * outputs.loss + self.added  # a gradient that is finite all the same
        return outputs

    def poison_gradient(self, model, inputs, outputs):
        if self.now in self.steps and model.training:
            outputs.loss.register_hook(lambda gradient: gradient * float("nan"))
        return outputs


@pytest.mark.parametrize("kind", ["loss", "gradient", "large"])
def test_a_step_that_is_not_finite_is_never_applied_and_stops_the_run(tmp_path, kind):
    model = tiny_model()
    with pytest.raises(FloatingPointError, match=r"step 3: loss .*not applied.*'skip'"):
        run(arguments(tmp_path), model=model, batches=Poisoned(model, kind))
    saved = load_file(tmp_path / "checkpoints" / "step-00000002" / "model.safetensors")
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in saved.items())
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-00000002"]


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_skipped_step_leaves_no_trace_in_weights_and_log(tmp_path, optimizer):
    model = tiny_model()
    args = arguments(
        tmp_path, nonfinite="skip", optimizer=optimizer, save_steps=1, schedule="constant", warmup_steps=0
    )
    run(args, model=model, batches=Poisoned(model, "loss"))
    step = {n: load_file(tmp_path / "checkpoints" / f"step-{n:08d}" / "model.safetensors") for n in (2, 3, 4)}
    assert all(torch.equal(step[2][name], step[3][name]) for name in step[2])
    assert not all(torch.equal(step[3][name], step[4][name]) for name in step[3])
    state = json.loads((tmp_path / "checkpoints" / "step-00000006" / "training_state" / "state.json").read_text())
    assert state["progress"]["skipped"] == [3]
    assert all(0 < line["loss"] < 10 for line in read_history(tmp_path) if "loss" in line)


def test_skipping_ends_when_no_step_is_finite_any_more(tmp_path):
    model = tiny_model()
    args = arguments(tmp_path, nonfinite="skip", num_train_steps=40, save_steps=0, eval_steps=0)
    with pytest.raises(FloatingPointError, match="20 such steps in a row"):
        run(args, model=model, batches=Poisoned(model, "loss", steps=range(2, 40)))


@pytest.mark.parametrize("device_side", [False, True])
def test_the_weights_before_a_broken_step_are_saved_and_gone_on_from(device_side, tmp_path, monkeypatch):
    """The host of a GPU reads the steps later, when further ones were made: none of them may be applied."""

    class Lazy(Updater):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.skips_on_device = device_side

    monkeypatch.setattr(loop, "Updater", Lazy)
    settings = {"save_steps": 0, "eval_steps": 0, "logging_steps": 6, "micro_batch_size": 4}
    straight = run(arguments(tmp_path / "straight", **settings))
    model = tiny_model(dropout=0.2)
    message = r"step 5: loss .* not applied, and the weights before it are saved whole: .*step-00000004"
    with pytest.raises(FloatingPointError, match=message):
        run(arguments(tmp_path / "run", **settings), model=model, batches=Poisoned(model, "loss", steps=range(4, 5)))
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000004"]
    assert damages(tmp_path / "run" / "checkpoints" / "step-00000004") == []
    assert run(arguments(tmp_path / "run", **settings)) == straight
    assert read_history(tmp_path / "run") == read_history(tmp_path / "straight")


def test_a_broken_first_step_saves_nothing(tmp_path):
    model = tiny_model()
    with pytest.raises(FloatingPointError, match="not applied, and nothing was saved, as no step was applied before"):
        run(arguments(tmp_path), model=model, batches=Poisoned(model, "loss", steps=range(1)))
    assert not (tmp_path / "checkpoints").exists()


def test_weights_that_are_not_finite_are_never_saved(tmp_path):
    model = tiny_model()

    def spoil(weight: torch.nn.Parameter) -> None:
        weight.data.fill_(math.nan)

    model.lm_head.weight.register_post_accumulate_grad_hook(spoil)  # the gradient stays finite
    message = r"after step 1 the weights are not finite \(lm_head\.weight\), so they were not saved"
    with pytest.raises(FloatingPointError, match=message):
        run(arguments(tmp_path, num_train_steps=1), model=model)
    assert not list((tmp_path / "checkpoints").glob("*"))


class Normed(torch.nn.Module):
    """Embeddings with statistics over their batch."""

    def __init__(self, embedding: torch.nn.Embedding):
        super().__init__()
        self.embedding, self.norm = embedding, torch.nn.BatchNorm1d(embedding.embedding_dim)
        self.factor = 1.0

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.norm((self.embedding(ids) * self.factor).flatten(0, 1)).unflatten(0, ids.shape)


@pytest.mark.parametrize("device_side", [False, True])
def test_a_skipped_step_leaves_running_statistics_as_they_were(device_side):
    model = tiny_model()
    normed = model.model.embed_tokens = Normed(model.model.embed_tokens)
    prepared = prepare(model, LoopArguments(learning_rate=0.01), Accelerator(cpu=True))
    updater = Updater(prepared, Losses(num_items), max_grad_norm=1.0)
    updater.skips_on_device = device_side
    states = []
    for factor in (1.0, math.nan, 1.0):
        normed.factor = factor
        rejected = bool(updater.step(TinyBatches(4)[0]).rejected)
        assert rejected == (not math.isfinite(factor))
        states.append({name: value.clone() for name, value in normed.norm.named_buffers()})
    assert {"running_mean", "running_var", "num_batches_tracked"} == set(states[0])
    for name, value in states[0].items():
        assert torch.equal(states[1][name], value), name
        assert torch.isfinite(value).all()
        assert not torch.equal(states[2][name], value), name


def test_a_loss_that_is_not_finite_is_not_the_business_of_the_gradient_scaler():
    model, accelerator = tiny_model(), Accelerator(cpu=True)
    prepared = prepare(model, LoopArguments(learning_rate=0.01), accelerator)
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    poisoned = Poisoned(model, "loss")
    updater = Updater(prepared, Losses(num_items), max_grad_norm=1.0)
    assert [bool(updater.step(poisoned[step]).rejected) for step in range(4)] == [False, False, True, False]


def test_a_spike_is_warned_of_once(tmp_path, caplog):
    model = tiny_model()
    run(arguments(tmp_path), model=model, batches=Poisoned(model, "spike", steps=range(4, 6)))
    assert caplog.text.count("the step was applied: look at its rows") == 1
    assert "step 5: the loss is " in caplog.text
    assert "and the median of the last 4 was " in caplog.text


def test_the_level_of_a_loss_is_the_median_of_recent_ones(caplog):
    watch = SpikeWatch()
    for step, loss in enumerate([1e9, 2.0, 2.0, 2.0, 2500.0, 2600.0, 2.0, -2500.0, 2.0], 1):
        watch.see(step, loss)
    found = re.findall(r"step (\d+): the loss is (\S+), and the median of the last (\d+) was (\S+);", caplog.text)
    assert found == [("5", "2500", "4", "2"), ("8", "-2500", "7", "2")]


def test_the_optimizer_can_skip_without_the_host_knowing(tmp_path):
    # As on a GPU, where the host does not wait for the flag: the same steps, the same bytes.
    def train_step(device_side: bool, bad: bool) -> str:
        model = tiny_model()
        prepared = prepare(model, LoopArguments(learning_rate=0.01), Accelerator(cpu=True))
        poisoned = Poisoned(model, "loss") if bad else TinyBatches(4)
        updater = Updater(prepared, Losses(num_items), max_grad_norm=1.0)
        updater.skips_on_device = device_side
        rejected = [bool(updater.step(poisoned[step]).rejected) for step in range(4)]
        assert rejected == [False, False, bad, False]
        return digest(model)

    assert train_step(True, bad=False) == train_step(False, bad=False)
    assert train_step(True, bad=True) == train_step(False, bad=True)


def test_an_overflow_of_scaled_gradients_lowers_the_scale_and_is_not_applied():
    model, accelerator = tiny_model(), Accelerator(cpu=True)
    prepared = prepare(model, LoopArguments(learning_rate=0.01), accelerator)
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=3e38)
    updater = Updater(prepared, Losses(num_items), max_grad_norm=1.0)
    before = digest(model)
    assert updater.step(TinyBatches(4)[0]).rejected is False
    assert digest(model) == before
    assert accelerator.scaler.get_scale() == pytest.approx(1.5e38)
    accelerator.scaler.update(256.0)
    scaled = updater.step(TinyBatches(4)[0])
    torch.testing.assert_close(scaled.grad_norm, _first_norm(), rtol=1e-5, atol=0.0)
    assert digest(model) != before


def _first_norm() -> torch.Tensor:
    prepared = prepare(tiny_model(), LoopArguments(), Accelerator(cpu=True))
    updater = Updater(prepared, Losses(num_items), max_grad_norm=1.0)
    return updater.step(TinyBatches(4)[0]).grad_norm


def test_a_signal_lets_the_step_end_saves_and_says_how_to_resume(tmp_path):
    command = [sys.executable, str(SCRIPT), str(tmp_path), "--num_train_steps", "10000", "--batch_size", "8"]
    child = subprocess.Popen(
        command, env=ENVIRONMENT | {"SECONDS_PER_BATCH": "0.02"}, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 60
    while not (tmp_path / "history.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    child.send_signal(signal.SIGINT)
    _, told = child.communicate(timeout=60)
    assert child.returncode == 130, told
    (checkpoint,) = (tmp_path / "checkpoints").iterdir()
    step = int(checkpoint.name.removeprefix("step-"))
    assert step >= 10
    assert f"stopped after step {step} of 10000: saved; run the same command again to resume" in told


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory) -> tuple[dict, Path]:
    """Facts of one launch of two processes over gloo, and the folder of its runs."""
    folder = tmp_path_factory.mktemp("two_processes")
    run(arguments(folder / "one", save_steps=3), dropout=0.0)
    with pytest.raises(SystemExit):
        run(arguments(folder / "resumed"), dropout=0.0, batches=Stopping(2))
    run(arguments(folder / "one frozen", **FROZEN), dropout=0.0)
    run(arguments(folder / "one without", **BACK), model=tiny_model(), batches=Without([9, 10, 11]))
    run(arguments(folder / "one carried", **CARRIED), model=tiny_recurrent(), batches=Stream(0))
    with pytest.raises(SystemExit):
        run(arguments(folder / "resumed carried", **CARRIED), model=tiny_recurrent(), batches=StoppingStream(3))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    command = [*launcher, "--main_process_port", str(port), str(SCRIPT.with_name("two_processes.py")), str(folder)]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1]) | {"log": done.stderr}, folder


def same_up_to_rounding(left: Path, right: Path):
    for one, other in zip(read_history(left), read_history(right), strict=True):
        assert one == pytest.approx(other, rel=1e-6, abs=1e-6)
    weights = load_file(left / "model.safetensors")
    torch.testing.assert_close(load_file(right / "model.safetensors"), weights, rtol=1e-5, atol=1e-6)


def test_two_processes_train_the_same_model_as_one(two_processes):
    _, folder = two_processes
    same_up_to_rounding(folder / "one", folder / "two")


def test_two_processes_unfreeze_penalise_and_average_as_one(two_processes):
    _, folder = two_processes
    same_up_to_rounding(folder / "one frozen", folder / "two frozen")


@pytest.mark.parametrize("run_folder", ["two carried", "resumed carried"])
def test_two_processes_carry_the_state_of_one(two_processes, run_folder):
    _, folder = two_processes
    same_up_to_rounding(folder / "one carried", folder / run_folder)


def test_two_processes_resume_what_one_has_saved_and_the_other_way_round(two_processes, caplog):
    facts, folder = two_processes
    same_up_to_rounding(folder / "one", folder / "resumed")
    assert "saved by 1 processes, and 2 resume it" in facts["log"]
    for step in (4, 6):  # what is left is the checkpoint of two processes after step 2
        shutil.rmtree(folder / "two" / "checkpoints" / f"step-{step:08d}")
    run(arguments(folder / "two"), dropout=0.0)
    same_up_to_rounding(folder / "one", folder / "two")
    assert "saved by 2 processes, and 1 resume it" in caplog.text


def test_two_processes_stop_together_and_resume_bit_by_bit(two_processes):
    facts, folder = two_processes
    assert facts["stopped at"] == ["step-00000002", "step-00000004"]  # one process was asked to, in the fourth step
    assert facts["stopped"] == facts["straight"]
    assert read_history(folder / "stopped") == read_history(folder / "straight")


def test_two_processes_halve_their_micro_batches_where_one_has_too_little_memory(two_processes):
    facts, folder = two_processes
    assert facts["limits"] == [[0, 2]]
    assert facts["log"].count("out of memory with 4 rows in a forward pass; from now on 2 rows") == 1
    same_up_to_rounding(folder / "one", folder / "halved")


def test_two_processes_go_back_together_where_one_has_bad_steps(two_processes):
    facts, folder = two_processes
    same_up_to_rounding(folder / "one without", folder / "rolled back")
    names = [f"rolled back/bad_steps/step-{n:08d}-data-{n:08d}/{name}" for n in (10, 11, 12) for name in BUNDLE]
    assert facts["bundles"] == names
    assert facts["log"].count("going back to the checkpoint after step 8") == 1


def test_a_loss_that_is_not_finite_on_one_process_is_applied_on_none(two_processes):
    facts, _ = two_processes
    assert facts["poisoned"] is False
