"""A run of `bmtk clean`: its corpus, divided into shards, and the stages that clean it."""

import dataclasses
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from bmtk.data.corpus_files import CorpusFile
from bmtk.data.fingerprints import FileDigests
from bmtk.data.shard_plan import plan_shards
from bmtk.data.sources import read_texts
from bmtk.data.text_files import TableFormat
from bmtk.errors import UserError
from bmtk.files import read_json, write_json

from .arguments import DOCUMENTS, PACKAGES, WORK, Cleaning
from .contamination import evaluation_sets, write_index
from .executors import RUN
from .filters import check_languages
from .report import WriteReport
from .stages import Plan, Stage

FORMAT = 1  # of the record and the report


class Job:
    """What is to be done in the folder `output`.  Raises: UserError for input that cannot be read."""

    def __init__(self, settings: Cleaning, output: Path):
        self.settings, self.output, self.work = settings, output.absolute(), output.absolute() / WORK
        how = settings.input
        self.texts = read_texts(
            settings.run.input,
            text_column=how.text_column,
            sample_by=how.sample_by,
            layout=TableFormat(how.delimiter, how.encoding),
            digests=FileDigests(output / ".digests.json"),
            on_corrupt=how.on_corrupt,
        )
        if not self.texts.files:
            raise UserError(
                f"input={settings.run.input} names a data set of the Hub; save it as files, and name these"
            )
        if settings.uses("language"):
            check_languages(settings.of_rule["language"].languages)
        self.rule = settings.of_rule["decontaminate"]
        self.evaluation_sets = evaluation_sets(self.rule) if settings.uses("decontaminate") else []

    def record(self) -> dict[str, Any]:
        """What the result depends on."""
        return {
            "format": FORMAT,
            "settings": {**self.settings.identity(), "input": None},  # files are known by name and content
            "inputs": list(self.texts.marks),
            "evaluation_sets": [evaluation.fingerprint for evaluation in self.evaluation_sets],
            "versions": versions(),
        }

    def run(self, log: Callable[[str], None]) -> None:
        remarks = self._index_evaluation_sets()
        plan = Plan(self.settings, self._shards(), self.work, self.output / DOCUMENTS)
        for folder in ("equal", "clusters", "matches", "signatures"):  # datatrove lists them, full or not
            (self.work / folder).mkdir(parents=True, exist_ok=True)
        report = WriteReport(self.output, plan.records, len(plan.shards), self._facts(remarks))
        stages = [*plan.stages, Stage("report", "write the report", [report], 1)]
        RUN[self.settings.run.executor](stages, self.work / "tasks", self.settings, log)

    def _index_evaluation_sets(self) -> list[str]:
        done = self.work / "evaluation.json"
        remarks = read_json(done)
        if not isinstance(remarks, list):
            remarks = write_index(self.evaluation_sets, self.rule, self.work / "evaluation")
            write_json(done, remarks)
        return remarks

    def _shards(self) -> list[tuple[CorpusFile, ...]]:
        """Decided by the files alone; a document is never divided."""
        files = [dataclasses.replace(file, path=str(Path(file.path).absolute())) for file in self.texts.files]
        marks = [mark.rpartition(" ")[2] for mark in self.texts.marks]
        groups = plan_shards(list(zip(files, marks, strict=True)), has_cuts=False)
        return [tuple(unit.file for unit in group) for group in groups]

    def _facts(self, remarks: list[str]) -> dict[str, Any]:
        return {
            "name": self.output.name,
            "rules": self.settings.rules,
            "settings": self.settings.identity(),
            "versions": versions(),
            "remarks": remarks,
            "inputs": [mark.rpartition(" ")[0] for mark in self.texts.marks],
        }


def versions() -> dict[str, str]:
    """Those that decide the result."""
    return {name: version(name) for name in PACKAGES}
