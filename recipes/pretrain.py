"""Pretrain a new model, or continue with a pretrained one, and save a Hugging Face repository with a report.

    accelerate launch --config_file accelerate_configs/cpu.yaml recipes/pretrain.py       # tiny Shakespeare, 2 minutes
    accelerate launch recipes/pretrain.py --preset smoke                                  # takes seconds
    accelerate launch recipes/pretrain.py --config my.yaml --learning_rate 1e-3
    accelerate launch recipes/pretrain.py --config my.yaml --dry_run                      # plan only
    accelerate launch recipes/pretrain.py --train_file texts/ --size 10M --budget 30min   # all settings follow from it
    accelerate launch recipes/pretrain.py --config my.yaml --search optuna --trials 30    # tune settings

An interrupted run is resumed by the same command.
"""

import sys

from bmtk.start import begin, imported

if __name__ == "__main__":  # before the imports that take seconds
    begin(__file__, __doc__, sys.argv[1:])

import logging
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import set_seed
from transformers import PreTrainedModel

import bmtk  # noqa: F401  registers the model families
from bmtk import arguments
from bmtk.hub import run_record, summary
from bmtk.hub.credentials import redact_settings
from bmtk.hub.finalize import FinishedRun, check_publishing, finalize_run, is_finished, show_finished
from bmtk.process import clean_errors
from bmtk.search import search_settings
from bmtk.search.space import SearchArguments
from bmtk.settings import about_data
from bmtk.tasks import task_named
from bmtk.tasks.objective import Objective
from bmtk.tasks.task_data import SourceArguments
from bmtk.training.agreement import check_agreement, check_shared, checksum, digest
from bmtk.training.arguments import FREE_KEYS, LoopArguments
from bmtk.training.checkpoint import Checkpoints, TrainState, save_model
from bmtk.training.dial import derive_shape, derive_training
from bmtk.training.evaluation import Evaluator, Results
from bmtk.training.first_process import main_process_first
from bmtk.training.loop import train
from bmtk.training.lr_range_test import suggest_rate
from bmtk.training.micro_batches import choose_micro_batches
from bmtk.training.prepared import Prepared, build_accelerator, prepare
from bmtk.training.profiling import costs, rehearse
from bmtk.training.rollback import data_done, roll_back
from bmtk.training.run_folder import check_data, check_tokenizer, held
from bmtk.training.run_log import Hooks
from bmtk.training.schedules import build_schedule
from bmtk.training.signals import ending_signals
from bmtk.training.sizes import SizeArguments, fill_by_size
from bmtk.training.starting_weights import starting_config, starting_weights
from bmtk.training.throughput import build_meter
from bmtk.training.updates import Losses
from bmtk.training.waits import named_waits

CONFIGS = Path(__file__).parent / "configs"


def read_arguments(argv: list[str]) -> list[Any]:
    """The settings of config file and command line: run, data, loop and architecture of a new model."""
    values = arguments.RunConfig.read(argv, configs=CONFIGS, default="causal_lm/tiny_shakespeare")
    task = task_named(values.get("task", "causal_lm"))
    columns = values.drop_facts_of_other_data(about_data(task.arguments))
    model_type = arguments.model_type_of(values)
    fill_by_size(values, model_type, task.arguments)
    bound = values.bind(
        [
            *(arguments.RunArguments, task.arguments, LoopArguments, SizeArguments, SearchArguments),
            arguments.model_fields(model_type),
        ],
        description=__doc__,
    )
    bound[0].task, bound[0].model_type = task.name, model_type
    bound[1].remarks, bound[1].borrowed_columns, bound[3].given = values.remarks, columns, values.given
    return bound


def main(argv: list[str]) -> None:
    run, data_args, args, dial, search, architecture = read_arguments(argv)
    task, groups = task_named(run.task), [run, data_args, args, dial, architecture]
    if search.search:
        return search_settings(search, groups, task, recipe=__file__, log=print)
    settings = redact_settings(arguments.resolved_config(*groups))
    _ = arguments.chosen_fields(architecture)  # refuses what no architecture has, before any folder is made
    accelerator, folder = build_accelerator(args), Path(args.output_dir)
    if run.is_plan:
        objective, model = start(accelerator, *groups)
        rehearsed = suggest_rate if run.find_lr else partial(plan, redact_settings(arguments.resolved_config(*groups)))
        return accelerator.print(rehearsed(objective, model, args, accelerator))

    check = {
        "overwrite": args.overwrite_output_dir,
        "free_keys": FREE_KEYS | arguments.FREE_RUN_KEYS | data_args.free_keys,
        "default_keys": arguments.default_keys(*groups),
    }
    if accelerator.is_main_process:
        check_publishing(run, log=print)
    with (
        held(folder, settings, is_main=accelerator.is_main_process, **check),
        named_waits(accelerator, "the start or the end of the run"),
    ):
        started_at = run_record.now()
        check_shared(accelerator, folder)
        objective, model = start(accelerator, *groups)
        settings = redact_settings(arguments.resolved_config(*groups))  # with what the start has derived
        if is_finished(folder, {**settings, **objective.decided_settings}, check["default_keys"]):
            return accelerator.on_main_process(show_finished)(folder, run=run, objective=objective, log=print)
        prepared, state, results, speeds = fit(model, objective, args, settings, accelerator)
        save_model(folder, prepared, objective.processor)
        if accelerator.is_main_process:
            finished = FinishedRun(
                recipe="pretrain",
                config=settings,
                environment=run_record.environment_record(accelerator),
                started_at=started_at,
                train_seconds=state.seconds,
                model=run_record.model_record(prepared.unwrapped, base_model=run.model),
                throughput=speeds,
                results=results,
            )
            finalize_run(folder, run=run, objective=objective, finished=finished, log=print)
        accelerator.wait_for_everyone()


def start(
    accelerator: Accelerator,
    run: arguments.RunArguments,
    data_args: SourceArguments,
    args: LoopArguments,
    dial: SizeArguments,
    architecture: object,
) -> tuple[Objective, PreTrainedModel]:
    """The objective, and the model that training starts from: the same on every process.

    `args` and `architecture` get the settings that follow from the size and the budget.
    """
    folder = Path(args.output_dir)
    with main_process_first(accelerator, None if run.is_plan else folder):
        data = task_named(run.task).read(data_args, seed=args.seed, folder=folder, **run.reading)
        is_noted = accelerator.is_main_process and not run.is_plan
        check_data(folder, data, is_main=is_noted)
        derive_shape(dial, architecture, data, run, folder)
        config = starting_config(run, data, arguments.chosen_fields(architecture))
        check_tokenizer(folder, data, is_main=is_noted)
        data.prepare(log=accelerator.print)
    set_seed(args.seed)
    objective = data.bind(config)
    model = starting_weights(objective, config, run)
    derive_training(dial, args, objective, model, accelerator, is_plan=run.is_plan)
    accelerator.print(lines_of("note", objective.notes), end="", flush=True)
    return objective, model


def lines_of(kind: str, lines: Iterable[str]) -> str:
    return "".join(f"{kind}: {line}\n" for line in lines)


def fit(
    model: PreTrainedModel,
    objective: Objective,
    args: LoopArguments,
    settings: dict[str, object],
    accelerator: Accelerator,
) -> tuple[Prepared, TrainState, Results, dict[str, float | None]]:
    """Train to the end, from the newest checkpoint if there is one; return model, last state, results, speeds."""
    one_row = next(objective.batches_in_order(objective.rows["train"], batch_size=1))
    check_agreement(
        accelerator,
        {"the settings": digest(settings), "the rows": digest(one_row), "the weights": checksum(model)},
    )
    meter = build_meter(model, objective.unit, one_row, accelerator)
    prepared = prepare(model, args, accelerator)
    batches = objective.train_batches(**args.batching, **prepared.share)
    choose_micro_batches(args, batches, objective, model, accelerator)
    checkpoints = Checkpoints(
        args.output_dir,
        prepared,
        objective.processor,
        settings,
        keep=args.save_total_limit,
        in_background=args.save_in_background,
    )
    state = checkpoints.resume(log=accelerator.print)
    evaluator = Evaluator(objective, prepared, batch_size=batches.micro_batch_size)
    hooks = Hooks(
        evaluate=evaluator.validate,
        main_metric=f"validation/{objective.scorer.main_metric}",
        save=checkpoints.save,
        saver=checkpoints.saver,
        load_best=checkpoints.load_best,
        account=lambda state: objective.reading.account(data_done(state.step, state.left_out) * batches.batch_size),
        check_micro_batches=objective.check_micro_batches,
        roll_back=partial(roll_back, checkpoints),
    )
    steps = args.total_steps(batches.steps_per_epoch)
    accelerator.print(lines_of("corpus", objective.reading.shares(steps * batches.batch_size)), end="", flush=True)
    train(
        prepared,
        batches,
        Losses.of(objective),
        build_schedule(args, steps),
        args=args,
        state=state,
        hooks=hooks,
        meter=meter,
    )
    return prepared, state, evaluator.results(seed=args.seed), meter.of_run(state.tokens, state.seconds)


def plan(
    settings: dict[str, object],
    objective: Objective,
    model: PreTrainedModel,
    args: LoopArguments,
    accelerator: Accelerator,
) -> str:
    """The run without training it, timed by a rehearsal of its first steps."""
    batches = objective.train_batches(**args.batching)
    choose_micro_batches(args, batches, objective, model, accelerator)
    steps_per_epoch = batches.steps_per_epoch / objective.sampled_share
    steps, found = args.total_steps(steps_per_epoch), rehearse(model, batches, accelerator, Losses.of(objective), args)
    return summary.run_plan(
        settings,
        model,
        steps=steps,
        epochs=steps / steps_per_epoch,
        per_step=round(args.batch_size * objective.units_per_row("train")),
        unit=objective.unit,
        seconds_per_step=found.seconds,
        decided={
            "learning rate": args.learning_rate,
            "rows per step": args.batch_size,
            **costs(model, objective, found, num_rows=steps * args.batch_size),
            **dict(f"corpus {line}".split(": ") for line in objective.reading.shares(steps * args.batch_size)),
            "rows per forward pass": batches.micro_batch_size,
        },
    )


if __name__ == "__main__":
    imported()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    with clean_errors(), ending_signals():
        main(sys.argv[1:])
