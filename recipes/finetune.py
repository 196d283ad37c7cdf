"""Fine-tune a pretrained model, or train a new one, with transformers.Trainer: all weights, LoRA or DoRA.

    accelerate launch recipes/finetune.py --preset smoke                                     # takes seconds
    accelerate launch recipes/finetune.py --model outputs/pretrain --dataset FOLDER_FILE_OR_HUB_ID
    accelerate launch recipes/finetune.py --model outputs/pretrain --dataset ... --adapter lora --learning_rate 1e-3
    accelerate launch recipes/finetune.py --config my.yaml --dry_run                         # plan only
    accelerate launch recipes/finetune.py --config my.yaml --search optuna --trials 30       # tune settings

An interrupted run is resumed by the same command.
"""

import sys

from bmtk.start import begin, imported

if __name__ == "__main__":  # before the imports that take seconds
    begin(__file__, __doc__, sys.argv[1:])

import logging
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import transformers
from accelerate import Accelerator
from peft import PeftModel
from transformers import PreTrainedModel, set_seed

import bmtk  # noqa: F401  registers the model families
from bmtk import arguments
from bmtk.errors import UserError
from bmtk.hub import run_record, summary
from bmtk.hub.credentials import redact_settings
from bmtk.hub.finalize import FinishedRun, check_publishing, finalize_run, is_finished, show_finished
from bmtk.hub.run_record import ModelRecord
from bmtk.process import clean_errors
from bmtk.search import search_settings
from bmtk.search.space import SearchArguments
from bmtk.settings import about_data
from bmtk.tasks import task_named
from bmtk.tasks.objective import Objective
from bmtk.tasks.task_data import TaskData
from bmtk.training import finetuning_arguments
from bmtk.training.adapters import AdapterArguments, adapt
from bmtk.training.callbacks import RecordHistory
from bmtk.training.finetuning_arguments import FineTuningArguments, loop_arguments, resolve_defaults
from bmtk.training.lr_range_test import suggest_rate
from bmtk.training.micro_batches import choose_micro_batches
from bmtk.training.profiling import seconds_per_step
from bmtk.training.run_folder import check_data, check_tokenizer, held
from bmtk.training.signals import ending_signals, on_stop
from bmtk.training.starting_weights import starting_config, starting_weights
from bmtk.training.trainer import TaskTrainer, evaluate, save, train
from bmtk.training.trainer_names import without_replaced
from bmtk.training.updates import Losses

CONFIGS = Path(__file__).parent / "configs"


def read_arguments(argv: list[str]) -> list[Any]:
    """The settings of config file and command line: run, data, Trainer, adapter and architecture of a new model."""
    values = arguments.RunConfig.read(argv, configs=CONFIGS, default="sequence_classification/sst2")
    values.file_values = without_replaced(values.file_values, values.cli_values)
    task = task_named(values.get("task", "sequence_classification"))
    columns = values.drop_facts_of_other_data(about_data(task.arguments))
    model_type = arguments.model_type_of(values)
    architecture = arguments.model_fields(model_type)
    groups = [arguments.RunArguments, task.arguments, FineTuningArguments, AdapterArguments]
    bound = values.bind([*groups, SearchArguments, architecture], description=__doc__)
    bound[0].task, bound[0].model_type = task.name, model_type
    bound[1].remarks, bound[1].borrowed_columns = values.remarks, columns
    return bound


def main(argv: list[str]) -> None:
    datasets.disable_progress_bars()
    transformers.logging.disable_progress_bar()  # of files; Trainer's own bar stays
    run, data_args, args, adapter, search, architecture = read_arguments(argv)
    task, groups = task_named(run.task), [run, data_args, args, adapter, architecture]
    if search.search:
        return search_settings(search, groups, task, recipe=__file__, log=print)
    args.check_engines(merges=adapter.merge_adapter)
    is_main, started_at = args.process_index == 0, run_record.now()
    if is_main and not run.is_plan:
        check_publishing(run, log=print)
    with args.main_process_first():
        data = task.read(data_args, seed=args.seed, **run.reading)
    set_seed(args.seed)
    objective, model = start(run, data, adapter, arguments.chosen_fields(architecture))
    resolve_defaults(args, objective)
    settings = redact_settings(arguments.resolved_config(*groups))
    if is_main:
        print("".join(f"note: {line}\n" for line in objective.notes), end="", flush=True)
    if run.find_lr:
        return print(suggest_rate(objective, model, loop_arguments(args), Accelerator()))
    if run.dry_run:
        return print(plan(settings, objective, model, args))

    folder = Path(args.output_dir)
    check = {
        "overwrite": args.overwrite_output_dir,
        "resume": args.may_resume,
        "free_keys": finetuning_arguments.FREE_KEYS | arguments.FREE_RUN_KEYS | data_args.free_keys,
        "default_keys": arguments.default_keys(*groups),
    }
    with held(folder, settings, is_main=is_main, **check):
        with args.main_process_first():  # before the others look at the folder
            check_data(folder, data, is_main=is_main)
            check_tokenizer(folder, data, is_main=is_main)
            finished_before = is_finished(folder, {**settings, **objective.decided_settings}, check["default_keys"])
        if finished_before:
            return show_finished(folder, run=run, objective=objective, log=print) if is_main else None
        history = RecordHistory(folder, unit=objective.unit)
        trainer = train(model, objective, args, history)
        with on_stop(partial(save, trainer, folder, merge=adapter.merge_adapter)):
            results = evaluate(trainer)
        save(trainer, folder, merge=adapter.merge_adapter)
        if is_main:
            finished = FinishedRun(
                recipe="finetune",
                config=settings,
                environment=run_record.environment_record(trainer.accelerator),
                started_at=started_at,
                train_seconds=history.seconds,
                model=model_record(trainer, run, adapter),
                throughput=history.throughput,
                results=results,
            )
            finalize_run(folder, run=run, objective=objective, finished=finished, log=print)
        trainer.accelerator.wait_for_everyone()


def start(
    run: arguments.RunArguments, data: TaskData, adapter: AdapterArguments, chosen: dict[str, object]
) -> tuple[Objective, PreTrainedModel | PeftModel]:
    """The objective, and the model that training starts from: pretrained under its head, or new; with its adapter."""
    if adapter.purpose and not run.model:
        raise UserError(f"{adapter.purpose} a pretrained model; name one with model")
    config = starting_config(run, data, chosen)
    objective = data.bind(config)
    model = starting_weights(objective, config, run, quantize=adapter.quantize)
    if not run.model:
        objective.notes.append(f"no model is given: a new {run.model_type} learns from these data alone")
    return objective, adapt(model, adapter, task_type=data.task.peft_task_type)


def model_record(trainer: TaskTrainer, run: arguments.RunArguments, adapter: AdapterArguments) -> ModelRecord:
    model = trainer.model.get_base_model() if hasattr(trainer.model, "get_base_model") else trainer.model
    saved_as = "adapter" if adapter.adapter and not adapter.merge_adapter else "model"
    origin = {"base_model": run.model, "adapter": adapter.adapter, "saved_as": saved_as}
    return run_record.model_record(model, **origin)


def plan(
    settings: dict[str, object], objective: Objective, model: PreTrainedModel | PeftModel, args: FineTuningArguments
) -> str:
    """The run without training it, timed by a rehearsal of its first step."""
    num_rows = round(len(objective.rows["train"]) / objective.sampled_share)
    sizes = {"batch_size": args.rows_per_step, "micro_batch_size": args.per_device_train_batch_size}
    batches, accelerator = objective.train_batches(**sizes, seed=args.seed), Accelerator()
    choose_micro_batches(args, batches, objective, model, accelerator)
    steps, step_rows = args.total_steps(num_rows), args.rows_per_step * args.world_size
    losses = Losses.of(objective, label_smoothing=args.label_smoothing_factor)
    return summary.run_plan(
        settings,
        model,
        steps=steps,
        epochs=steps * step_rows / num_rows,
        per_step=round(step_rows * objective.units_per_row("train")),
        unit=objective.unit,
        seconds_per_step=seconds_per_step(model, batches, accelerator, losses),
        decided={
            "learning rate": args.learning_rate,
            "rows per step": step_rows,
            "rows per forward pass": batches.micro_batch_size,
        },
    )


if __name__ == "__main__":
    imported()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    with clean_errors(), ending_signals():
        main(sys.argv[1:])
