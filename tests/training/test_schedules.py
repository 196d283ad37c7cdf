"""Learning-rate factors at chosen steps, worked out by hand, and the arguments that they come from."""

import math

import pytest
from transformers import HfArgumentParser

from bmtk.training.arguments import LoopArguments
from bmtk.training.schedules import build_schedule, schedule_factor


def factors(name: str, steps, **settings) -> list[float]:
    defaults = dict(total=100, warmup=0, decay_fraction=0.2, min_ratio=0.0)
    return [schedule_factor(name, step, **defaults | settings) for step in steps]


@pytest.mark.parametrize(
    ("name", "steps", "expected", "settings"),
    [
        ("constant", [0, 50, 99], [1, 1, 1], {}),
        ("linear", [0, 25, 99], [1, 0.75, 0.01], {}),
        ("linear", [0, 50, 99], [1, 0.6, 0.208], {"min_ratio": 0.2}),
        ("cosine", [0, 50, 75], [1, 0.5, 0.1464466094], {}),
        ("cosine", [0, 50, 75], [1, 0.55, 0.2318019485], {"min_ratio": 0.1}),
        ("wsd", [0, 79, 80, 81, 90, 99], [1, 1, 1, 0.95, 0.5, 0.05], {}),
        ("wsd", [0, 99], [1, 1], {"decay_fraction": 0}),
        ("wsd", [0, 50], [1, 0.5], {"decay_fraction": 1}),
        ("linear", [10, 55, 99], [1, 0.5, 1 / 90], {"warmup": 10}),
        ("wsd", [10, 55, 99], [1, 0.5, 1 / 90], {"warmup": 10, "decay_fraction": 1}),
    ],
)
def test_factors(name, steps, expected, settings):
    assert factors(name, steps, **settings) == pytest.approx(expected)


@pytest.mark.parametrize("name", ["constant", "linear", "cosine", "wsd"])
def test_warm_up_rises_in_equal_parts_and_never_trains_with_a_rate_of_zero(name):
    assert factors(name, range(5), warmup=4) == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert min(factors(name, range(100), warmup=4)) > 0


def test_a_schedule_that_does_not_fit_is_refused():
    with pytest.raises(
        ValueError, match="schedule='polynomial' is unknown; choose one of constant, linear, cosine, wsd"
    ):
        schedule_factor("polynomial", 0, total=10, warmup=0)
    with pytest.raises(ValueError, match="warmup_steps=10 does not end within the run of 10 steps"):
        build_schedule(LoopArguments(warmup_steps=10), 10)


def test_the_schedule_of_a_run_is_that_of_its_arguments():
    args = LoopArguments(schedule="wsd", warmup_steps=0.1, decay_fraction=0.5, min_lr_ratio=0.2)
    schedule = build_schedule(args, 20)
    assert [schedule(step) for step in (0, 2, 10, 15)] == pytest.approx([1 / 3, 1, 1, 0.6])


def test_the_length_of_a_run():
    assert LoopArguments(num_train_steps=7).total_steps(100) == 7
    assert LoopArguments(num_train_epochs=2.5).total_steps(3) == 8
    assert LoopArguments(warmup_steps=12).warmup(100) == 12
    assert LoopArguments(warmup_steps=0.05).warmup(100) == 5


def test_arguments_are_read_from_a_command_line():
    line = ["--learning_rate", "3e-4", "--optimizer", "muon", "--torch_compile", "--warmup_steps", "0.25"]
    (args,) = HfArgumentParser(LoopArguments).parse_args_into_dataclasses(line)
    assert (args.learning_rate, args.optimizer, args.torch_compile, args.warmup_steps) == (3e-4, "muon", True, 0.25)


def test_all_arguments_that_do_not_fit_are_told_at_once():
    with pytest.raises(ValueError, match="do not fit") as told:
        LoopArguments(optimizer="lion", batch_size=0, adam_beta2=1.0, decay_fraction=2.0, num_train_steps=0)
    lines = str(told.value).splitlines()[1:]
    assert lines == [
        "  optimizer='lion' is unknown; choose one of adamw, muon, sgd",
        "  adam_beta2=1.0 is out of range; give a number of at least 0 and below 1",
        "  batch_size=0 is out of range; give a number of at least 1",
        "  num_train_steps=0 is out of range; give at least 1, or -1 for whole epochs",
        "  decay_fraction=2.0 is a fraction; give a number from 0 to 1",
    ]


@pytest.mark.parametrize(
    "changes", [{"learning_rate": math.nan}, {"weight_decay": math.inf}, {"num_train_epochs": 0}, {"save_steps": -1}]
)
def test_numbers_out_of_range_are_refused(changes):
    (name,) = changes
    with pytest.raises(ValueError, match=f"{name}=.* is out of range"):
        LoopArguments(**changes)
