"""The average of the weights: its formula, what does not enter it, and that a resumed run ends with the same one."""

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from tiny_run import Stopping, TinyBatches, arguments, digest, num_items, read_history, run, tiny_model
from torch import nn

from bmtk.training.averaging import WeightAverage
from bmtk.training.prepared import prepare
from bmtk.training.updates import Losses, Updater


def names(model: nn.Module) -> dict:
    return {parameter: name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_the_loop_saves_the_average_of_the_weights_that_a_run_without_it_goes_through(tmp_path):
    run(arguments(tmp_path / "raw", save_steps=1))
    run(arguments(tmp_path / "averaged", save_steps=6, ema_decay=0.4))
    average = {name: value.double() for name, value in tiny_model().state_dict().items()}
    for step in range(1, 7):
        decay = min(0.4, (1 + step) / (10 + step))
        raw = load_file(tmp_path / "raw" / "checkpoints" / f"step-{step:08d}" / "model.safetensors")
        average = {name: decay * average[name] + (1 - decay) * raw[name].double() for name in raw}
    checkpoint = tmp_path / "averaged" / "checkpoints" / "step-00000006"
    assert all(torch.equal(value, raw[name]) for name, value in load_file(checkpoint / "model.safetensors").items())
    for name, value in load_file(tmp_path / "averaged" / "model.safetensors").items():
        torch.testing.assert_close(value.double(), average[name], rtol=1e-5, atol=1e-7)
    losses = [
        [row["validation/loss"] for row in read_history(tmp_path / kind) if "validation/loss" in row]
        for kind in ("raw", "averaged")
    ]
    assert all(one != other for one, other in zip(*losses, strict=True))


@pytest.mark.parametrize("tied", [False, True])
def test_a_stopped_run_goes_on_to_the_very_same_average(tied, tmp_path):
    straight = run(arguments(tmp_path / "straight", ema_decay=0.9), model=tiny_model(dropout=0.2, tied=tied))
    args = arguments(tmp_path / "stopped", ema_decay=0.9)
    with pytest.raises(SystemExit):
        run(args, model=tiny_model(dropout=0.2, tied=tied), batches=Stopping(2))
    for _ in range(2):  # to the end, and once more when there is nothing left to do
        assert run(args, model=tiny_model(dropout=0.2, tied=tied)) == straight
    assert read_history(tmp_path / "stopped") == read_history(tmp_path / "straight")


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_step_that_is_not_finite_does_not_enter_the_average(optimizer, tmp_path):
    args = arguments(tmp_path, ema_decay=0.9, optimizer=optimizer)
    prepared = prepare(tiny_model(), args, Accelerator(cpu=True))
    average, factors = prepared.optimizer.average, iter([1.0, torch.nan])

    def criterion(outputs, batch):
        return outputs.logits.square().mean() * next(factors)

    updater = Updater(prepared, Losses(num_items, criterion=criterion), max_grad_norm=1.0)
    updater.step(TinyBatches(0)[0])
    before = {name: value.clone() for name, value in average.state_dict().items()}
    assert updater.step(TinyBatches(0)[1]).rejected
    assert all(torch.equal(value, before[name]) for name, value in average.state_dict().items())
    assert before["num_updates"] == 1


def test_an_unread_flag_decides_as_a_read_one_does():
    models = [tiny_model() for _ in range(2)]
    averages = [WeightAverage(names(model), 0.9) for model in models]
    for skipped in (False, True, False):
        for model in models:
            torch.manual_seed(0)
            with torch.no_grad():
                [parameter.add_(torch.randn_like(parameter)) for parameter in model.parameters()]
        averages[0].update(unless=torch.tensor(skipped))
        averages[1].update(unless=skipped)
    one, other = (average.state_dict() for average in averages)
    assert one["num_updates"] == 2
    assert all(torch.equal(value, other[name]) for name, value in one.items())


def test_only_what_is_trained_is_averaged_and_statistics_are_the_current_ones():
    model = nn.Sequential(nn.Conv2d(3, 2, 3), nn.BatchNorm2d(2)).to(memory_format=torch.channels_last)
    model[0].bias.requires_grad_(False)
    average = WeightAverage(names(model), 0.9)
    model(torch.randn(4, 3, 5, 5) + 3)
    with torch.no_grad():
        [parameter.add_(1) for parameter in model.parameters()]
    average.update()
    raw = {name: value.clone() for name, value in model.state_dict().items()}
    with average.applied():
        inside = {name: value.clone() for name, value in model.state_dict().items()}
    changed = {name for name, value in inside.items() if not torch.equal(value, raw[name])}
    assert changed == {"0.weight", "1.weight", "1.bias"}
    assert set(average.state_dict()) == changed | {"num_updates"}
    assert raw["1.running_mean"].abs().max() > 0
    assert all(torch.equal(value, raw[name]) for name, value in model.state_dict().items())
    assert all(value.is_contiguous() for value in average.state_dict().values())


def test_an_evaluation_that_fails_leaves_the_raw_weights():
    model = tiny_model()
    average, before = WeightAverage(names(model), 0.5), digest(model)
    average.averages = {parameter: value + 1 for parameter, value in average.averages.items()}

    @average.applied()
    def evaluate():
        raise ArithmeticError(digest(model))

    with pytest.raises(ArithmeticError) as failed:
        evaluate()
    assert failed.value.args != (before,)
    assert digest(model) == before


def test_averages_keep_what_bfloat16_weights_would_lose():
    weight = nn.Parameter(torch.ones((), dtype=torch.bfloat16))
    average = WeightAverage({weight: "weight"}, 0.999)
    average.num_updates.fill_(10_000)
    weight.data.add_(1)
    average.update()
    torch.testing.assert_close(average.state_dict()["weight"], torch.tensor(1.001))


def test_averages_of_another_model_are_refused():
    with pytest.raises(ValueError, match=r"are those of another model: lm_head\.weight; resume with the model"):
        WeightAverage(names(tiny_model(tied=True)), 0.9).load_state_dict(
            WeightAverage(names(tiny_model()), 0.9).state_dict()
        )


@pytest.mark.parametrize("decay", [-0.1, 1.0])
def test_a_decay_that_is_none_is_refused(decay):
    with pytest.raises(ValueError, match=f"ema_decay={decay} is out of range; give a number"):
        arguments("unused", ema_decay=decay)
