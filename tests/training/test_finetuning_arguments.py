"""Both recipes call a setting by the same name; Trainer's own names keep working, and two names never contradict."""

import pytest
import torch
from tiny_run import tiny_model
from transformers import TrainingArguments

from bmtk import arguments
from bmtk.errors import UserError
from bmtk.training import finetuning_arguments
from bmtk.training.finetuning_arguments import FineTuningArguments, loop_arguments
from bmtk.training.trainer import TaskTrainer
from bmtk.training.trainer_names import BatchSizes, without_replaced


def finetuning(**settings) -> FineTuningArguments:
    return FineTuningArguments(output_dir="unused", use_cpu=True, **settings)


def given(args: FineTuningArguments) -> dict[str, object]:
    """What a config file of the run would say, beside what both of them always say."""
    always = arguments.changed_settings(finetuning())
    return {name: value for name, value in arguments.changed_settings(args).items() if name not in always}


@pytest.mark.parametrize(
    ("sizes", "processes", "expected"),
    [
        ((None, None, None, None), 1, (8, 1)),
        ((None, None, None, None), 2, (8, 1)),
        ((None, None, 16, 2), 2, (16, 2)),
        ((None, None, None, 4), 1, (8, 4)),
        ((32, None, None, None), 1, (32, 1)),
        ((32, 0, None, None), 4, (8, 1)),
        ((32, 4, None, None), 2, (4, 4)),
        ((32, None, None, 2), 2, (8, 2)),
        ((32, None, 16, None), 2, (16, 1)),
        ((32, 8, 8, 2), 2, (8, 2)),
        ((None, 2, None, None), 3, (2, 4)),
        ((None, 2, None, 3), 3, (2, 3)),
    ],
)
def test_a_global_batch_is_cut_for_processes_and_micro_batches(sizes, processes, expected):
    assert BatchSizes(*sizes).resolve(processes) == expected


@pytest.mark.parametrize(
    ("sizes", "processes", "message"),
    [
        ((32, None, None, None), 3, r"batch_size=32 does not divide over 3 processes; give a multiple of 3"),
        ((32, 5, None, None), 2, r"micro_batch_size=5 does not divide the 16 rows of an optimizer step on each"),
        ((32, None, None, 5), 1, r"gradient_accumulation_steps=5 does not divide the 32 rows"),
        ((32, None, 8, None), 2, r"batch_size=32 and per_device_train_batch_size=8 contradict each other on 2 proc"),
        ((32, 8, None, 3), 1, r"batch_size=32 and micro_batch_size=8 and gradient_accumulation_steps=3 contradict"),
        ((None, 4, 8, None), 1, r"micro_batch_size=4 and per_device_train_batch_size=8 are two names of one setting"),
    ],
)
def test_sizes_that_do_not_fit_are_one_clear_error(sizes, processes, message):
    with pytest.raises(UserError, match=message):
        BatchSizes(*sizes).resolve(processes)


SAME = [
    ({"batch_size": 32, "micro_batch_size": 8}, {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 4}),
    ({"num_train_steps": 7}, {"max_steps": 7}),
    ({"schedule": "constant"}, {"lr_scheduler_type": "constant_with_warmup"}),
    ({"schedule": "linear"}, {"lr_scheduler_type": "linear"}),
    ({"schedule": "cosine"}, {"lr_scheduler_type": "cosine"}),
    ({"precision": "bf16"}, {"bf16": True}),
    ({"precision": "fp32"}, {"bf16": False, "fp16": False}),
    ({"eval_steps": 5}, {"eval_strategy": "steps", "eval_steps": 5}),
    ({"eval_steps": 0}, {"eval_strategy": "no", "eval_steps": 0}),
    ({"save_steps": 5}, {"save_strategy": "steps", "save_steps": 5}),
    ({"eval_steps": 5, "load_best_model_at_end": True}, {"eval_strategy": "steps", "eval_steps": 5}),
]


@pytest.mark.parametrize(("shared", "trainers"), SAME, ids=lambda value: ",".join(value))
def test_a_shared_name_means_what_trainers_name_means_and_is_what_is_recorded(shared, trainers):
    one, other = finetuning(**shared), finetuning(**trainers)
    assert {name: getattr(one, name) for name in trainers} == {name: getattr(other, name) for name in trainers}
    assert given(one) == shared
    assert finetuning(**shared, **{k: v for k, v in trainers.items() if k not in shared}).max_steps == one.max_steps


def test_trainers_defaults_stay_where_nothing_is_given():
    ours, theirs = finetuning(), TrainingArguments(output_dir="unused", use_cpu=True)
    names = set(finetuning_arguments.TRANSLATED) - {"eval_strategy", "save_strategy"}
    assert {name: getattr(ours, name) for name in names} == {name: getattr(theirs, name) for name in names}
    assert (ours.eval_strategy, ours.save_strategy, ours.mixed_precision) == ("epoch", "epoch", "no")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_train_steps": 5, "max_steps": 6}, "num_train_steps=5 and max_steps=6 contradict each other"),
        ({"schedule": "wsd", "lr_scheduler_type": "linear"}, "schedule=wsd and lr_scheduler_type=linear contradict"),
        ({"precision": "fp32", "bf16": True}, "precision=fp32 and bf16=True contradict each other; leave one"),
        ({"precision": "fp16", "fp16": False}, "precision=fp16 and fp16=False contradict"),
        ({"eval_steps": 5, "eval_strategy": "epoch"}, "eval_steps=5 and eval_strategy=epoch contradict"),
        ({"save_steps": 0, "save_strategy": "best"}, "save_steps=0 and save_strategy=best contradict"),
        ({"schedule": "step"}, "schedule='step' is unknown; choose one of constant, linear, cosine, wsd"),
        ({"precision": "fp8"}, "precision='fp8' is unknown"),
        ({"batch_size": 0}, "batch_size=0 is out of range; give a number of at least 1"),
        ({"eval_steps": -1}, "eval_steps=-1 is out of range"),
        ({"num_train_steps": 0}, "num_train_steps=0 is out of range; give at least 1, or -1 for whole epochs"),
        ({"early_stopping_patience": 2, "eval_steps": 0}, "early_stopping_patience=2 needs evaluations"),
        ({"label_smoothing_factor": 3.0}, "label_smoothing_factor=3.0 is not a share; choose between 0 and 1"),
        ({"learning_rate": -1.0}, "learning_rate=-1.0 is out of range; give a number of at least 0"),
        ({"seed": -1}, "seed=-1 is out of range"),
        ({"adam_beta2": 1.0}, "adam_beta2=1.0 is out of range; give a number of at least 0 and below 1"),
        ({"dataloader_num_workers": -1}, "dataloader_num_workers=-1 is out of range"),
        ({"lr_scheduler_type": "foo"}, "foo is not a valid SchedulerType, please select one of"),
        ({"eval_strategy": "foo"}, "foo is not a valid IntervalStrategy, please select one of"),
        ({"lr_scheduler_kwargs": "{bad"}, "Expecting property name enclosed in double quotes"),
    ],
)
def test_two_names_that_contradict_and_values_out_of_range_are_one_clear_error(settings, message):
    with pytest.raises(UserError, match=message):
        finetuning(**settings)


def test_precision_bf16_needs_no_further_setting_on_a_cpu(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    monkeypatch.setattr(finetuning_arguments, "natural_precision", lambda: "bf16")
    for precision in ("bf16", "auto"):
        args = FineTuningArguments(output_dir="unused", precision=precision)
        assert (args.bf16, args.use_cpu) == (True, True)
        assert "use_cpu" not in arguments.resolved_config(args)


def test_precision_fp32_wins_over_the_launcher(monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert finetuning().mixed_precision == "bf16"
    assert finetuning(precision="fp32").mixed_precision == "no"


def test_wsd_is_flat_and_then_falls_to_zero_over_its_fraction():
    args = finetuning(schedule="wsd", decay_fraction=0.4, warmup_steps=2, learning_rate=1.0)
    trainer = TaskTrainer.__new__(TaskTrainer)
    trainer.args, trainer.lr_scheduler = args, None
    trainer.optimizer = torch.optim.SGD(tiny_model().parameters(), lr=1.0)
    scheduler = trainer.create_scheduler(10)
    rates = []
    for _ in range(11):
        rates.append(scheduler.get_last_lr()[0])
        trainer.optimizer.step()
        scheduler.step()
    assert rates == pytest.approx([0, 0.5, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25, 0])


def test_the_command_line_replaces_what_the_file_calls_by_another_name():
    file = {"batch_size": 32, "micro_batch_size": 8, "schedule": "cosine", "eval_steps": 20, "seed": 1}
    assert without_replaced(file, {"seed": "2"}) == file
    replaced = without_replaced(file, {"per_device_train_batch_size": "4", "lr_scheduler_type": "linear"})
    assert replaced == {"eval_steps": 20, "seed": 1}
    assert "eval_steps" not in without_replaced(file, {"eval_strategy": "epoch"})
    assert without_replaced(file, {"eval_strategy": "steps"}) == file
    assert without_replaced({"save_steps": 0}, {"save_strategy": "steps"}) == {}
    old = {"per_device_train_batch_size": 4, "max_steps": 3, "bf16": True, "eval_strategy": "epoch"}
    cli = {"batch_size": "8", "num_train_steps": "5", "precision": "fp32", "eval_steps": "2"}
    assert without_replaced(old, cli) == {}


def test_the_loop_gets_the_batch_and_the_precision_of_trainer():
    args = finetuning(batch_size=32, micro_batch_size=8, precision="bf16", early_stopping_patience=3)
    loop = loop_arguments(args)
    assert (loop.batch_size, loop.micro_batch_size, loop.precision) == (32, 8, "bf16")
