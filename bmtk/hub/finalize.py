"""The end of every run: its record, card, report and resolved config beside the weights, then the push."""

import json
import shlex
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import yaml

from bmtk.errors import UserError
from bmtk.files import read_json, write_text

from .card import LANGUAGE, write_card
from .connection import check_rights
from .formatting import slug
from .launch import launch_command
from .publish import publish
from .redaction import scrub
from .report import write_report
from .run_record import RUN_RECORD, ModelRecord, RunRecord, bmtk_version
from .summary import run_summary

MODELS = ("config.json", "adapter_config.json")
OF_PUBLISHING = frozenset(("push_to_hub", "private", "trust_remote_code"))


class RunSettings(Protocol):
    """What is read of the settings of a run."""

    @property
    def task(self) -> str: ...

    @property
    def push_to_hub(self) -> str | None:
        """The repository to publish to, USER/NAME; None: nothing is published."""

    @property
    def private(self) -> bool: ...

    @property
    def trust_remote_code(self) -> bool: ...

    @property
    def license(self) -> str | None:
        """Of the model, as the Hub names it."""

    @property
    def language(self) -> list[str] | None:
        """Languages of the model: ISO codes."""


class MainMetric(Protocol):
    """What is read of a scorer."""

    @property
    def main_metric(self) -> str: ...


class DescribedObjective(Protocol):
    """What is read of the objective of a run."""

    @property
    def about(self) -> Mapping[str, Any]:
        """The kind of model in words: the fields of `TaskDescription` that are not its defaults."""

    @property
    def scorer(self) -> MainMetric: ...

    @property
    def decided_settings(self) -> Mapping[str, Any]:
        """The settings that the data have decided."""

    def data_record(self) -> Mapping[str, Any]:
        """Name, source and sizes of the data."""

    def next_command(self, folder: Path) -> str:
        """A command that uses the model in `folder`."""


class FinalResults(Protocol):
    """What is read of the evaluation at the end of a run."""

    @property
    def metrics(self) -> Mapping[str, float]: ...

    @property
    def samples(self) -> list[dict[str, str]]: ...

    @property
    def figures(self) -> list[dict[str, str]]: ...

    @property
    def inference(self) -> Mapping[str, float]: ...


@dataclass(frozen=True)
class FinishedRun:
    """What a recipe knows of a run when its training has ended."""

    recipe: str
    config: Mapping[str, Any]  # resolved settings
    environment: Mapping[str, Any]  # as `environment_record` gives it
    started_at: str
    train_seconds: float
    model: ModelRecord
    throughput: Mapping[str, float | None]
    results: FinalResults


def is_finished(folder: Path, config: Mapping[str, Any], default_keys: Collection[str] = ()) -> bool:
    """Whether `folder` holds model, record and report of the run with just these settings.

    `default_keys` have their default values, and may be absent from the record of a version that did not know them.
    """
    record = read_json(folder / RUN_RECORD)
    has_model = any((folder / name).is_file() for name in MODELS) and any(folder.glob("*.safetensors"))
    if not isinstance(record, dict) or not has_model or not (folder / "report.html").is_file():
        return False
    former, now = record.get("config", {}), json.loads(json.dumps(scrub(dict(config))))
    unknown = {*default_keys} - former.keys()
    return all(former.get(key) == value for key, value in now.items() if key not in {*OF_PUBLISHING, *unknown})


def show_finished(
    folder: Path, *, run: RunSettings, objective: DescribedObjective, log: Callable[[str], None]
) -> None:
    """The results of a run that needs no more steps, how to train its model on, and the push that `run` asks for."""
    log(run_summary(folder, next_command=objective.next_command(folder)))
    log(
        f"\nfinished: the run in {folder} was complete before, so nothing was trained. To train its model on, run the "
        f"recipe with --model {shlex.quote(str(folder))} and another --output_dir; to train it anew, set "
        "--overwrite_output_dir true"
    )
    if run.push_to_hub:
        publish(folder, run.push_to_hub, private=run.private, trust_remote_code=run.trust_remote_code, log=log)


def check_publishing(run: RunSettings, *, log: Callable[[str], None]) -> None:
    """Refuse what `run` could not write into its card or publish in the end, before it trains: in the main process.

    Raises: UserError or PublishError.
    """
    if wrong := [code for code in run.language or () if not LANGUAGE.fullmatch(code)]:
        raise UserError(f"language={wrong[0]!r} is no language code; give codes of ISO 639 such as en, de or zh-Hant")
    if run.license is not None and not slug(run.license):
        raise UserError(f"license={run.license!r} has no name in it; give one of the Hub's, such as apache-2.0 or mit")
    if run.push_to_hub:
        check_rights(run.push_to_hub, private=run.private, log=log)


def finalize_run(
    folder: Path, *, run: RunSettings, objective: DescribedObjective, finished: FinishedRun, log: Callable[[str], None]
) -> None:
    """Write run.json, recipe.yaml, README.md and report.html, show the summary, and publish where `run` asks for it.

    Called by the main process, after the model is saved in `folder`.
    Raises: PublishError if the model cannot be published; the files are written then.
    """
    config = {**finished.config, **objective.decided_settings}
    chosen = scrub({key: value for key, value in config.items() if value is not None})
    write_text(folder / "recipe.yaml", yaml.safe_dump(chosen, sort_keys=False, allow_unicode=True))
    results = finished.results
    record = RunRecord(
        task=run.task,
        bmtk_version=bmtk_version(),
        command=launch_command(),
        about={**objective.about, "main_metric": objective.scorer.main_metric},
        data=objective.data_record(),
        config=config,
        environment=finished.environment,
        recipe=finished.recipe,
        started_at=finished.started_at,
        train_seconds=finished.train_seconds,
        model=finished.model,
        throughput=finished.throughput,
        metrics=results.metrics,
        samples=results.samples,
        inference=results.inference,
        figures=results.figures,
        license=run.license or "",
        language=list(run.language or ()),
    )
    record.write(folder)
    write_card(folder)
    write_report(folder)
    log(run_summary(folder, next_command=objective.next_command(folder)))
    if run.push_to_hub:
        publish(folder, run.push_to_hub, private=run.private, trust_remote_code=run.trust_remote_code, log=log)
