"""Pretrain a model from scratch, or go on with one, and leave a Hugging Face repository with a report.

    accelerate launch --config_file accelerate_configs/cpu.yaml recipes/pretrain.py       # tiny Shakespeare, 3 minutes
    accelerate launch recipes/pretrain.py --preset smoke                                  # seconds
    accelerate launch recipes/pretrain.py --config my.yaml --learning_rate 1e-3
    accelerate launch recipes/pretrain.py --config my.yaml --dry_run                      # the plan, no training

Stop it whenever you like: the same command goes on where it stopped.
"""

import contextlib
import logging
import sys
import tempfile
from functools import partial
from pathlib import Path

from transformers import set_seed

import bmtk  # noqa: F401  registers the model families
from bmtk import arguments
from bmtk.hub import facts, summary
from bmtk.hub.conclusion import conclude
from bmtk.tasks import task_named
from bmtk.training.arguments import FREE_KEYS, LoopArguments
from bmtk.training.checkpoint import TrainState, load_checkpoint, newest_checkpoint, save_checkpoint, save_model
from bmtk.training.finetuning import starting_model
from bmtk.training.loop import build_accelerator, prepare, train
from bmtk.training.predicting import Results, measure, predict_all
from bmtk.training.rehearsal import seconds_per_step
from bmtk.training.run_folder import check_output_dir, locked
from bmtk.training.schedules import build_schedule
from bmtk.training.throughput import build_meter

CONFIGS = Path(__file__).parent / "configs"


def read_arguments(argv: list[str]) -> list:
    """What config file and command line say: run, data, loop and architecture of a new model."""
    values = arguments.RunConfig.read(argv, configs=CONFIGS, default="causal_lm/tiny_shakespeare")
    task_class = task_named(values.get("task", "causal_lm"))
    architecture = arguments.model_fields(values.get("model_type", "bm_transformer"))
    groups = [arguments.RunArguments, task_class.arguments, LoopArguments, architecture]
    bound = values.bind(groups, description=__doc__)
    bound[0].task = task_class.name
    return bound


def main(argv: list[str]) -> None:
    run, data_args, args, architecture = read_arguments(argv)
    config = arguments.resolved_config(run, data_args, args, architecture)
    task_class = task_named(run.task)
    accelerator = build_accelerator(args)
    if run.dry_run:
        with tempfile.TemporaryDirectory() as folder:
            task = task_class(data_args, folder=Path(folder), **of_run(run, args))
            print(plan(config, task, new_model(run, architecture, task, args), args, accelerator))
        return

    folder = Path(args.output_dir)
    free_keys = FREE_KEYS | arguments.FREE_RUN_KEYS | task_class.free_keys
    with contextlib.ExitStack() as stack:
        if accelerator.is_main_process:
            stack.enter_context(locked(folder))
            check_output_dir(folder, config, overwrite=args.overwrite_output_dir, free_keys=free_keys)
        started_at = facts.now()
        with accelerator.main_process_first():
            task = task_class(data_args, folder=folder, **of_run(run, args))
        model = new_model(run, architecture, task, args)
        accelerator.print("".join(f"note: {line}\n" for line in task.notes), end="", flush=True)
        state, results, speeds = fit(model, task, args, config, accelerator)
        if accelerator.is_main_process:
            save_model(folder, model, task.processor)
            conclude(
                folder,
                run=run,
                task=task,
                config=config,
                accelerator=accelerator,
                log=print,
                recipe="pretrain",
                started_at=started_at,
                train_seconds=state.seconds,
                model=facts.model_facts(model, base_model=run.model),
                throughput=speeds,
                **vars(results),
            )
        accelerator.wait_for_everyone()


def of_run(run, args) -> dict[str, object]:
    """What a task takes from the run's settings."""
    trust = {"trust_remote_code": True} if run.trust_remote_code else {}
    return {"model": run.model, "seed": args.seed, **trust}


def new_model(run, architecture, task, args):
    """The model that training starts from, the same on every process."""
    set_seed(args.seed)
    trust = {"trust_remote_code": True} if run.trust_remote_code else {}
    model = starting_model(run, task, arguments.chosen_fields(architecture), **trust)
    task.prepare_to_save(model)
    return model


def fit(model, task, args, config, accelerator) -> tuple[TrainState, Results, dict[str, float]]:
    """Train to the end, from the newest checkpoint if there is one; return the last state, results and speeds."""
    ranks = {"rank": accelerator.process_index, "world_size": accelerator.num_processes}
    batches = task.train_batches(
        batch_size=args.batch_size, micro_batch_size=args.micro_batch_size, seed=args.seed, **ranks
    )
    one_row = next(task.batches_in_order(task.rows["train"], batch_size=1))
    meter = build_meter(model, task.unit, one_row, accelerator)
    wrapped, optimizer = prepare(model, args, accelerator)
    state, newest = TrainState(), newest_checkpoint(args.output_dir)
    if newest:
        state = load_checkpoint(newest, model=wrapped, optimizer=optimizer, accelerator=accelerator)
        accelerator.print(f"going on after step {state.step:,} ({newest})")

    def predict(split: str) -> list:
        rows = task.batches_in_order(task.rows[split], batch_size=batches.micro_batch_size, **ranks)
        return predict_all(wrapped, rows, accelerator, task.predict)

    kept = {}  # predictions of the last evaluation, which is that of the finished model

    def evaluate() -> dict[str, float]:
        kept["validation"] = predict("validation")
        metrics = task.score(kept["validation"], task.rows["validation"])
        return {f"validation/{name}": value for name, value in metrics.items()}

    saved = {"model": wrapped, "optimizer": optimizer, "accelerator": accelerator, "processor": task.processor}
    train(
        wrapped,
        batches,
        optimizer,
        build_schedule(args, args.total_steps(batches.steps_per_epoch)),
        accelerator,
        args=args,
        state=state,
        num_items=task.num_items,
        num_units=task.num_units,
        criterion=task.criterion,
        evaluate=evaluate if "validation" in task.rows else None,
        save=partial(save_checkpoint, args.output_dir, config=config, keep=args.save_total_limit, **saved),
        meter=meter,
    )
    results = measure(task, model, lambda split: kept.get(split) or predict(split), seed=args.seed)
    return state, results, meter.of_run(state.tokens, state.seconds)


def plan(config, task, model, args, accelerator) -> str:
    """What a run would be, timed by a rehearsal of its first step."""
    batches = task.train_batches(batch_size=args.batch_size, micro_batch_size=args.micro_batch_size, seed=args.seed)
    steps = args.total_steps(batches.steps_per_epoch)
    return summary.run_plan(
        config,
        model,
        steps=steps,
        epochs=steps / batches.steps_per_epoch,
        per_step=round(args.batch_size * task.units_per_row("train")),
        unit=task.unit,
        seconds_per_step=seconds_per_step(model, batches[0], accelerator, task.num_items, task.criterion),
    )


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    with arguments.clean_errors():
        main(sys.argv[1:])
