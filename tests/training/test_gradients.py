"""Gradual unfreezing against layers that are really frozen, the L1 penalty against autograd, and a resume of both."""

import pytest
import torch
from accelerate import Accelerator
from tiny_run import Stopping, TinyBatches, arguments, digest, num_items, read_history, run, tiny_model

from bmtk.training.gradients import L1Penalty, gradient_rules
from bmtk.training.optimizers import build_optimizer
from bmtk.training.prepared import prepare
from bmtk.training.updates import Losses, Updater

OPENED = [r"lm_head", r"model.norm", r"layers.1", r"layers.0", r"embed_tokens"]


def opened(name: str, step: int) -> bool:
    """What is open in `step` when a group opens every two steps: head and last norm, layer 1, layer 0, table."""
    position = max(0, next(place for place, text in enumerate(OPENED) if text in name) - 1)
    return step >= 2 * position


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_unfreezing_trains_as_freezing_the_layers_would(optimizer, tmp_path):
    args = arguments(tmp_path, num_train_steps=8, unfreeze_epochs=0.4, optimizer=optimizer, schedule="constant")
    args.warmup_steps = 0
    ours = run(args, dropout=0.0)["digest"]
    model = tiny_model()
    oracle = build_optimizer(model, args)
    for step in range(8):
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(opened(name, step))
        (batch,) = TinyBatches(0)[step]
        model(**batch, use_cache=False, num_items_in_batch=num_items(batch)).loss.backward()
        torch.nn.utils.clip_grad_norm_(oracle.parameters, args.max_grad_norm)  # summed in the same order
        oracle.step()
        oracle.zero_grad()
        frozen = {name for name, parameter in model.named_parameters() if parameter not in oracle.state}
        assert frozen == {name for name, _ in model.named_parameters() if not opened(name, step)}
    assert ours == digest(model)


def test_a_run_stopped_while_layers_are_frozen_ends_with_the_same_bytes(tmp_path):
    settings = {"num_train_steps": 8, "unfreeze_epochs": 0.4, "l1_penalty": 1e-3, "ema_decay": 0.9}
    straight = run(arguments(tmp_path / "straight", **settings))
    args = arguments(tmp_path / "stopped", **settings)
    with pytest.raises(SystemExit):
        run(args, batches=Stopping(4))
    assert run(args) == straight
    assert read_history(tmp_path / "stopped") == read_history(tmp_path / "straight")


def test_layers_that_will_never_open_are_told(caplog):
    args = arguments("unused", unfreeze_epochs=2)
    gradient_rules(tiny_model(), args, steps_per_epoch=5, total=30)
    assert "unfreeze_epochs=2 opens the lowest layers after step 30, and the run ends at 30" in caplog.text
    caplog.clear()
    gradient_rules(tiny_model(), args, steps_per_epoch=5, total=31)
    assert not caplog.text


def test_a_head_alone_cannot_be_unfrozen():
    model = tiny_model()
    model.model.requires_grad_(False)
    with pytest.raises(
        ValueError, match=r"unfreeze_epochs=1 finds nothing to unfreeze: .* in one layer; leave it out"
    ):
        gradient_rules(model, arguments("unused", unfreeze_epochs=1), steps_per_epoch=5, total=30)


@pytest.mark.parametrize("scale", [1.0, 512.0])
def test_the_l1_penalty_has_the_gradient_that_autograd_finds(scale):
    model, oracle = tiny_model(), tiny_model()
    (batch,) = TinyBatches(0)[0]
    for each in (model, oracle):
        loss = each(**batch, use_cache=False, num_items_in_batch=num_items(batch)).loss
        if each is oracle:
            matrices = (p for n, p in oracle.named_parameters() if p.ndim == 2 and "embed" not in n)
            loss = loss + 0.01 * sum(matrix.abs().sum() for matrix in matrices)
        (scale * loss).backward()
    L1Penalty(model, 0.01)(0, scale)
    for (name, parameter), expected in zip(model.named_parameters(), oracle.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, expected.grad, rtol=1e-4, atol=1e-6, msg=name)


def test_the_penalty_is_clipped_with_the_gradient_and_not_in_the_loss():
    norms, losses = [], []
    for factor in (0.0, 0.01):
        args = arguments("unused", l1_penalty=factor)
        prepared = prepare(tiny_model(), args, Accelerator(cpu=True))
        rules = gradient_rules(prepared.model, args, steps_per_epoch=0, total=1)
        assert (rules is None) == (factor == 0)
        updater = Updater(prepared, Losses(num_items), max_grad_norm=1.0, gradient_rules=rules)
        update = updater.step(TinyBatches(3)[0])
        norms.append(update.grad_norm)
        losses.append(update.loss)
    assert norms[1] > norms[0]
    assert losses[0] == losses[1]


@pytest.mark.parametrize("name", ["unfreeze_epochs", "l1_penalty"])
def test_a_negative_setting_is_refused(name):
    with pytest.raises(ValueError, match=f"{name}=-1 is out of range; give a number of at least 0"):
        arguments("unused", **{name: -1})
