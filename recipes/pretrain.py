"""Pretrain a new model, or continue with a pretrained one, and save a Hugging Face repository with a report.

    accelerate launch --config_file accelerate_configs/cpu.yaml recipes/pretrain.py       # tiny Shakespeare, 3 minutes
    accelerate launch recipes/pretrain.py --preset smoke                                  # takes seconds
    accelerate launch recipes/pretrain.py --config my.yaml --learning_rate 1e-3
    accelerate launch recipes/pretrain.py --config my.yaml --dry_run                      # plan only
    accelerate launch recipes/pretrain.py --config my.yaml --search optuna --trials 30    # tune settings

An interrupted run is resumed by the same command.
"""

import logging
import sys
import tempfile
from functools import partial
from pathlib import Path

from transformers import set_seed

import bmtk  # noqa: F401  registers the model families
from bmtk import arguments
from bmtk.hub import run_record, summary
from bmtk.hub.finalize import finalize_run
from bmtk.search.study import SearchArguments, search_settings
from bmtk.tasks import task_named
from bmtk.training import checkpoint
from bmtk.training.arguments import FREE_KEYS, LoopArguments
from bmtk.training.evaluation import Evaluator, Results
from bmtk.training.finetuning import starting_model
from bmtk.training.loop import build_accelerator, prepare, train
from bmtk.training.lr_range_test import suggest_rate
from bmtk.training.profiling import seconds_per_step
from bmtk.training.run_folder import held
from bmtk.training.schedules import build_schedule
from bmtk.training.throughput import build_meter

CONFIGS = Path(__file__).parent / "configs"


def read_arguments(argv: list[str]) -> list:
    """What config file and command line say: run, data, loop and architecture of a new model."""
    values = arguments.RunConfig.read(argv, configs=CONFIGS, default="causal_lm/tiny_shakespeare")
    task_class = task_named(values.get("task", "causal_lm"))
    model_type = arguments.model_type_of(values)
    architecture = arguments.model_fields(model_type)
    groups = [arguments.RunArguments, task_class.arguments, LoopArguments, SearchArguments, architecture]
    bound = values.bind(groups, description=__doc__)
    bound[0].task, bound[0].model_type = task_class.name, model_type
    return bound


def main(argv: list[str]) -> None:
    run, data_args, args, search, architecture = read_arguments(argv)
    task_class, settings = task_named(run.task), [run, data_args, args, architecture]
    if search.search:
        return search_settings(search, settings, task_class, recipe=__file__, log=print)
    config = arguments.resolved_config(*settings)
    accelerator = build_accelerator(args)

    def build(folder: Path) -> tuple:
        """The task, and the model that training starts from: the same on every process."""
        with accelerator.main_process_first():
            task = task_class(data_args, seed=args.seed, folder=folder, **run.reading)
        set_seed(args.seed)
        return task, starting_model(run, task, arguments.chosen_fields(architecture))

    if run.dry_run or run.find_lr:
        with tempfile.TemporaryDirectory() as folder:
            task, model = build(Path(folder))
            accelerator.print((suggest_rate if run.find_lr else partial(plan, config))(task, model, args, accelerator))
        return

    folder = Path(args.output_dir)
    free_keys = FREE_KEYS | arguments.FREE_RUN_KEYS | task_class.free_keys
    check = {"overwrite": args.overwrite_output_dir, "free_keys": free_keys}
    with held(folder, config, is_main=accelerator.is_main_process, **check):
        started_at = run_record.now()
        task, model = build(folder)
        accelerator.print("".join(f"note: {line}\n" for line in task.notes), end="", flush=True)
        state, results, speeds = fit(model, task, args, config, accelerator)
        if accelerator.is_main_process:
            checkpoint.save_model(folder, model, task.processor)
            finalize_run(
                folder,
                run=run,
                task=task,
                config=config,
                accelerator=accelerator,
                log=print,
                recipe="pretrain",
                started_at=started_at,
                train_seconds=state.seconds,
                model=run_record.model_record(model, base_model=run.model),
                throughput=speeds,
                **vars(results),
            )
        accelerator.wait_for_everyone()


def fit(model, task, args, config, accelerator) -> tuple[checkpoint.TrainState, Results, dict[str, float]]:
    """Train to the end, from the newest checkpoint if there is one; return the last state, results and speeds."""
    ranks = {"rank": accelerator.process_index, "world_size": accelerator.num_processes}
    batches = task.train_batches(**args.batching, **ranks)
    one_row = next(task.batches_in_order(task.rows["train"], batch_size=1))
    meter = build_meter(model, task.unit, one_row, accelerator)
    wrapped, optimizer = prepare(model, args, accelerator)
    state, newest = checkpoint.TrainState(), checkpoint.newest_checkpoint(args.output_dir)
    if newest:
        state = checkpoint.load_checkpoint(newest, model=wrapped, optimizer=optimizer, accelerator=accelerator)
        accelerator.print(f"going on after step {state.step:,} ({newest})")
    evaluator = Evaluator(task, wrapped, accelerator, batch_size=batches.micro_batch_size)
    saved = {"model": wrapped, "optimizer": optimizer, "accelerator": accelerator, "processor": task.processor}
    train(
        wrapped,
        batches,
        optimizer,
        build_schedule(args, args.total_steps(batches.steps_per_epoch)),
        accelerator,
        args=args,
        state=state,
        num_units=task.num_units,
        **task.losses,
        evaluate=evaluator.validate,
        main_metric=f"validation/{task.main_metric}",
        load_best=partial(checkpoint.load_best, args.output_dir, model=wrapped, optimizer=optimizer),
        save=partial(checkpoint.save_checkpoint, args.output_dir, config=config, keep=args.save_total_limit, **saved),
        meter=meter,
    )
    return state, evaluator.results(seed=args.seed), meter.of_run(state.tokens, state.seconds)


def plan(config, task, model, args, accelerator) -> str:
    """What a run would be, timed by a rehearsal of its first step."""
    batches = task.train_batches(**args.batching)
    steps = args.total_steps(batches.steps_per_epoch)
    return summary.run_plan(
        config,
        model,
        steps=steps,
        epochs=steps / batches.steps_per_epoch,
        per_step=round(args.batch_size * task.units_per_row("train")),
        unit=task.unit,
        seconds_per_step=seconds_per_step(model, batches, accelerator, **task.losses),
    )


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    with arguments.clean_errors():
        main(sys.argv[1:])
