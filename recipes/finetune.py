"""Fine-tune a pretrained model, or train a new one, with transformers.Trainer: all weights, LoRA or DoRA.

    accelerate launch recipes/finetune.py --preset smoke                                     # takes seconds
    accelerate launch recipes/finetune.py --model outputs/pretrain --dataset FOLDER_FILE_OR_HUB_ID
    accelerate launch recipes/finetune.py --model outputs/pretrain --dataset ... --adapter lora --learning_rate 1e-3
    accelerate launch recipes/finetune.py --config my.yaml --dry_run                         # plan only
    accelerate launch recipes/finetune.py --config my.yaml --search optuna --trials 30       # tune settings

An interrupted run is resumed by the same command.
"""

import logging
import sys
from pathlib import Path

import datasets
import transformers
from accelerate import Accelerator
from transformers import set_seed

import bmtk  # noqa: F401  registers the model families
from bmtk import arguments
from bmtk.hub import run_record, summary
from bmtk.hub.finalize import finalize_run
from bmtk.search.study import SearchArguments, search_settings
from bmtk.tasks import task_named
from bmtk.training import finetuning
from bmtk.training.adapters import AdapterArguments, adapt
from bmtk.training.callbacks import RecordHistory, StopOnNonFinite, StopOnRequest
from bmtk.training.lr_range_test import suggest_rate
from bmtk.training.profiling import seconds_per_step
from bmtk.training.run_folder import CHECKPOINTS, held
from bmtk.training.signals import deferred_signals

CONFIGS = Path(__file__).parent / "configs"


def read_arguments(argv: list[str]) -> list:
    """What config file and command line say: run, data, Trainer, adapter and architecture of a new model."""
    values = arguments.RunConfig.read(argv, configs=CONFIGS, default="sequence_classification/sst2")
    task_class = task_named(values.get("task", "sequence_classification"))
    model_type = arguments.model_type_of(values)
    architecture = arguments.model_fields(model_type)
    groups = [arguments.RunArguments, task_class.arguments, finetuning.FineTuningArguments, AdapterArguments]
    bound = values.bind([*groups, SearchArguments, architecture], description=__doc__)
    bound[0].task, bound[0].model_type = task_class.name, model_type
    return bound


def main(argv: list[str]) -> None:
    datasets.disable_progress_bars()
    transformers.logging.disable_progress_bar()  # of files; Trainer's own bar stays
    run, data_args, args, adapter, search, architecture = read_arguments(argv)
    task_class, settings = task_named(run.task), [run, data_args, args, adapter, architecture]
    if search.search:
        return search_settings(search, settings, task_class, recipe=__file__, log=print)
    is_main = args.process_index == 0
    started_at = run_record.now()
    with args.main_process_first():
        task = task_class(data_args, seed=args.seed, **run.reading)
    set_seed(args.seed)
    model = build_model(run, task, adapter, arguments.chosen_fields(architecture))
    finetuning.settle(args, task)
    config = arguments.resolved_config(*settings)
    if is_main:
        print("".join(f"note: {line}\n" for line in task.notes), end="", flush=True)
    if run.find_lr:
        return print(suggest_rate(task, model, finetuning.loop_arguments(args), Accelerator()))
    if run.dry_run:
        return print(plan(config, task, model, args))

    folder = Path(args.output_dir)
    free_keys = finetuning.FREE_KEYS | arguments.FREE_RUN_KEYS | task_class.free_keys
    check = {"overwrite": args.overwrite_output_dir, "resume": args.may_resume, "free_keys": free_keys}
    signals = deferred_signals(second_stops_at_once=args.world_size == 1)
    with held(folder, config, is_main=is_main, **check), signals as request:
        history = RecordHistory(folder, unit=task.unit)
        callbacks = [history, StopOnNonFinite(), StopOnRequest(request)]
        trainer = finetuning.build_trainer(model, task, args, folder=folder / CHECKPOINTS, callbacks=callbacks)
        trainer.accelerator.wait_for_everyone()  # what the main process deletes is gone
        checkpoint = finetuning.checkpoint_to_resume(folder, args.resume_from_checkpoint)
        if checkpoint and is_main:
            print(f"going on from {checkpoint}")
        trainer.train(resume_from_checkpoint=checkpoint)
        results = finetuning.evaluate(trainer, task)
        finetuning.save(trainer, folder, merge=adapter.merge_adapter)
        if is_main:
            finalize_run(
                folder,
                run=run,
                task=task,
                config=config,
                accelerator=trainer.accelerator,
                log=print,
                recipe="finetune",
                started_at=started_at,
                train_seconds=history.seconds,
                model=model_record(trainer, run, adapter),
                throughput=history.throughput,
                **vars(results),
            )
        trainer.accelerator.wait_for_everyone()


def build_model(run, task, adapter, chosen):
    """The model that training starts from: pretrained under the task's head, or new; with its adapter."""
    if adapter.purpose and not run.model:
        raise ValueError(f"{adapter.purpose} a pretrained model; name one with model")
    model = finetuning.starting_model(run, task, chosen, quantize=adapter.quantize)
    if not run.model:
        task.notes.append(f"no model is given: a new {run.model_type} learns from these data alone")
    return adapt(model, adapter, task_type=task.peft_task_type)


def model_record(trainer, run, adapter) -> dict[str, object]:
    model = trainer.model.get_base_model() if hasattr(trainer.model, "get_base_model") else trainer.model
    saved_as = "adapter" if adapter.adapter and not adapter.merge_adapter else "model"
    return {**run_record.model_record(model, base_model=run.model, adapter=adapter.adapter), "saved_as": saved_as}


def plan(config, task, model, args) -> str:
    """What a run would be, timed by a rehearsal of its first step."""
    num_rows, share = len(task.rows["train"]), args.per_device_train_batch_size * args.gradient_accumulation_steps
    sizes = {"batch_size": share, "micro_batch_size": args.per_device_train_batch_size, "seed": args.seed}
    batches = task.train_batches(**sizes)
    steps = finetuning.total_steps(args, num_rows)
    step_rows = share * args.world_size
    losses = {**task.losses, "criterion": finetuning.criterion_of(task, args)}
    return summary.run_plan(
        config,
        model,
        steps=steps,
        epochs=steps * step_rows / num_rows,
        per_step=round(step_rows * task.units_per_row("train")),
        unit=task.unit,
        seconds_per_step=seconds_per_step(model, batches, Accelerator(), **losses),
    )


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    with arguments.clean_errors():
        main(sys.argv[1:])
