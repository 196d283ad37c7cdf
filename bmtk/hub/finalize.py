"""The end of every run: its facts, card, report and resolved config beside the weights, then the push."""

from collections.abc import Callable
from pathlib import Path

import yaml

from bmtk.files import write_text
from bmtk.hub.card import write_card
from bmtk.hub.publish import publish
from bmtk.hub.report import write_report
from bmtk.hub.run_record import environment_record, scrub, write_run_record
from bmtk.hub.summary import run_summary


def finalize_run(
    folder: Path,
    *,
    run,
    task,
    config: dict[str, object],
    accelerator,
    log: Callable[[str], None],
    **facts: object,
) -> None:
    """Write run.json, recipe.yaml, README.md and report.html, show the summary, and publish where `run` says so.

    `run` has `task`, `push_to_hub` and `private`; `task` has `about`, `main_metric`, `facts()` and
    `next_command(folder)`, and in `settled` what the data decided of `config`.
    """
    config = {**config, **task.settled}
    chosen = scrub({key: value for key, value in config.items() if value is not None})
    write_text(folder / "recipe.yaml", yaml.safe_dump(chosen, sort_keys=False, allow_unicode=True))
    environment = environment_record(accelerator)
    about = {**task.about, "main_metric": task.main_metric}
    described = {"task": run.task, "about": about, "data": task.facts(), "config": config}
    write_run_record(folder, **described, environment=environment, **facts)
    write_card(folder)
    write_report(folder)
    log(run_summary(folder, next_command=task.next_command(folder)))
    if run.push_to_hub:
        publish(folder, run.push_to_hub, private=run.private, log=log)
