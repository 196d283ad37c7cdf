"""Fine-tune a pretrained model on a task, or train one from scratch, with transformers.Trainer; all weights or LoRA.

    accelerate launch recipes/finetune.py --preset smoke                                          # seconds
    accelerate launch recipes/finetune.py --model outputs/pretrain --dataset FOLDER_FILE_OR_HUB_ID
    accelerate launch recipes/finetune.py --model outputs/pretrain --dataset ... --adapter lora --learning_rate 1e-3
    accelerate launch recipes/finetune.py --config my.yaml --dry_run                              # the plan, no training

Stop it whenever you like: the same command goes on where it stopped.
"""

import logging
import sys
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from transformers import Trainer, set_seed

import bmtk  # noqa: F401  registers the model families
from bmtk import arguments
from bmtk.arguments import RunArguments, RunConfig
from bmtk.hub import facts
from bmtk.hub.card import write_card
from bmtk.hub.publish import publish
from bmtk.hub.report import write_report
from bmtk.tasks import task_named
from bmtk.training import finetuning
from bmtk.training.callbacks import RecordHistory, StopOnNonFinite, StopOnRequest, recorded_metrics
from bmtk.training.finetuning import FREE_KEYS, AdapterArguments, FineTuningArguments
from bmtk.training.interruption import noted_signals
from bmtk.training.run_folder import CHECKPOINTS, check_output_dir, locked

CONFIGS = Path(__file__).parent / "configs"


def main(argv: list[str]) -> None:
    values = RunConfig.read(argv, configs=CONFIGS, default="sequence_classification/sst2")
    task_class = task_named(values.get("task", "sequence_classification"))
    architecture_class = arguments.model_fields(finetuning.config_class(values))
    groups = [RunArguments, task_class.arguments, FineTuningArguments, AdapterArguments, architecture_class]
    run, data_args, args, adapter_args, architecture = values.bind(groups, description=__doc__)
    config = arguments.resolved_config(run, data_args, args, adapter_args, architecture)
    folder, started_at = Path(args.output_dir), facts.now()
    args.output_dir = str(folder / CHECKPOINTS)
    is_main = args.process_index == 0

    with ExitStack() as stack:
        if is_main and not run.dry_run:
            free = FREE_KEYS | arguments.FREE_RUN_KEYS | task_class.free_keys
            check_output_dir(folder, config, overwrite=args.overwrite_output_dir, free_keys=free)
            stack.enter_context(locked(folder))
        task = task_class(data_args, model=run.model, seed=args.seed, **finetuning.loading(run))
        set_seed(args.seed)
        model = finetuning.build_model(run, task, arguments.chosen_fields(architecture))
        if adapter_args.adapter:
            model = finetuning.add_adapter(model, adapter_args, task_type=task.peft_task_type)
        if is_main:
            print("".join(f"note: {line}\n" for line in task.notes), end="")
        if run.dry_run:
            return print(finetuning.plan(model, task, args, config) if is_main else "", end="")
        request = stack.enter_context(noted_signals(second_stops_at_once=args.world_size == 1))
        trainer = Trainer(
            model,
            args,
            train_dataset=task.rows["train"],
            eval_dataset=task.rows["validation"],
            processing_class=task.processor,
            data_collator=task.collator(),
            compute_loss_func=partial(task.loss, label_smoothing=args.label_smoothing_factor),
            compute_metrics=task.metrics,
            preprocess_logits_for_metrics=task.reduce_logits,
            callbacks=[RecordHistory(folder), StopOnNonFinite(), StopOnRequest(request)],
        )
        trainer.train(resume_from_checkpoint=finetuning.checkpoint_to_resume(folder, args))
        metrics, samples = evaluate(trainer, task)
        finetuning.save(trainer, folder, merge=adapter_args.merge_adapter)
        if is_main:
            arguments.write_yaml(folder / "recipe.yaml", config)
            facts.write_facts(
                folder,
                recipe="finetune",
                task=run.task,
                started_at=started_at,
                train_seconds=trainer_seconds(folder),
                model=finetuning.model_facts(trainer, run, adapter_args),
                data=task.facts(),
                config=config,
                metrics=metrics,
                environment=facts.environment_facts(trainer.accelerator),
                samples=samples,
            )
            write_card(folder)
            print(summary(folder, write_report(folder), trainer, task, metrics))
        trainer.accelerator.wait_for_everyone()
    if run.push_to_hub and is_main:
        publish(folder, run.push_to_hub, private=run.private, log=print)
