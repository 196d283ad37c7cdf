"""The pipelines that a cleaning consists of, one after the other.

    sieve     read the corpus, apply the rules that look at one document; note what identifies each document
    find      which documents are equal (one task)
    sign      note the MinHash signatures of those that are left (together with `sieve`, without the rule `exact`)
    match     which documents share a bucket of signatures (one task for each bucket)
    cluster   which of them are kept (one task)
    keep      write the documents that are left

Without the rules about duplicates, `sieve` writes them.  A stage has one task for each shard of the corpus, unless it
says otherwise: never for each worker.
"""

from dataclasses import dataclass, field
from pathlib import Path

from datatrove.data import Document
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.dedup.exact_dedup import (
    ExactDedupConfig,
    ExactDedupFilter,
    ExactDedupSignature,
    ExactFindDedups,
)
from datatrove.pipeline.dedup.minhash import (
    MinhashConfig,
    MinhashDedupBuckets,
    MinhashDedupCluster,
    MinhashDedupFilter,
    MinhashDedupSignature,
)

from bmtk.data.corpus_files import CorpusFile

from .arguments import Cleaning, NearRule
from .documents import ReadCorpus, ReadDocuments, WriteDocuments
from .record import CountKept, Deduplicate
from .rules import Sieve, rules_of_documents
from .words import Words, hashes

RECORDS = ("read", "sieve", "exact", "near", "kept")  # folders, in the order of what they count


@dataclass(frozen=True)
class Stage:
    """A pipeline, and how many tasks it consists of."""

    name: str
    purpose: str
    steps: list[PipelineStep]
    num_tasks: int


@dataclass
class Plan:
    """The stages of a cleaning of `shards` in the folder `work`, with the result in `output`."""

    settings: Cleaning
    shards: list[tuple[CorpusFile, ...]]
    work: Path
    output: Path
    stages: list[Stage] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._add("sieve", "read and filter", self._sieve())
        if self.settings.uses("exact"):
            self._add("find", "find equal documents", [self._find_equal()], 1)
        if self.settings.uses("near"):
            self._add_near()
        if self._has_duplicates:
            self._add("keep", "write what is left", [*self._read_unequal(counts=True), *self._keep()])

    @property
    def _has_duplicates(self) -> bool:
        return self.settings.uses("exact") or self.settings.uses("near")

    @property
    def records(self) -> list[Path]:
        """The folders of what the stages have counted."""
        used = {"exact": self.settings.uses("exact"), "near": self.settings.uses("near")}
        return [self.work / "records" / name for name in RECORDS if used.get(name, True)]

    def _record(self, name: str) -> Path:
        return self.work / "records" / name

    def _add(self, name: str, purpose: str, steps: list[PipelineStep], num_tasks: int | None = None) -> None:
        self.stages.append(Stage(name, purpose, steps, num_tasks or len(self.shards)))

    # ---------------------------------------------------------------------------------------- one document at a time

    def _sieve(self) -> list[PipelineStep]:
        num_examples = self.settings.run.num_examples
        rules = rules_of_documents(self.settings, self.work / "evaluation")
        read = ReadCorpus(self.shards, self._record("read"), num_examples)
        sieve = Sieve(rules, self._record("sieve"), num_examples)
        if not self._has_duplicates:
            return [read, sieve, *self._write()]
        sign = self._sign_equal() if self.settings.uses("exact") else self._sign_near()
        return [read, sieve, WriteDocuments(self._documents), sign]

    @property
    def _documents(self) -> Path:
        return self.work / "documents"

    def _keep(self) -> list[PipelineStep]:
        steps: list[PipelineStep] = []
        if self.settings.uses("near"):
            steps.append(self._recorded(MinhashDedupFilter(self._path("clusters")), "near", "near duplicate"))
        return [*steps, *self._write()]

    def _write(self) -> list[PipelineStep]:
        return [CountKept(self._record("kept")), WriteDocuments(self.output, self.settings.run.output_format)]

    def _recorded(self, step: PipelineStep, rule: str, reason: str) -> Deduplicate:
        return Deduplicate(step, rule, reason, self._record(rule), self.settings.run.num_examples)

    def _path(self, name: str) -> str:
        return str(self.work / name)

    # ------------------------------------------------------------------------------------------------ equal documents

    @property
    def _exact(self) -> ExactDedupConfig:
        return ExactDedupConfig(content_getter=text_without_spaces, hash_config=hashes())

    def _sign_equal(self) -> PipelineStep:
        return ExactDedupSignature(self._path("equal-signatures"), self._exact)

    def _find_equal(self) -> PipelineStep:
        return ExactFindDedups(self._path("equal-signatures"), self._path("equal"), self._exact)

    def _read_unequal(self, *, counts: bool) -> list[PipelineStep]:
        """The documents that the rule `exact` leaves."""
        steps: list[PipelineStep] = [ReadDocuments(self._documents)]
        if self.settings.uses("exact"):
            unequal = ExactDedupFilter(self._path("equal"), self._exact)
            steps.append(self._recorded(unequal, "exact", "equal document") if counts else unequal)
        return steps

    # ------------------------------------------------------------------------------------------ nearly equal documents

    def _add_near(self) -> None:
        if self.settings.uses("exact"):
            self._add("sign", "compute MinHash signatures", [*self._read_unequal(counts=False), self._sign_near()])
        config = minhash_config(self.settings.of_rule["near"])
        match = MinhashDedupBuckets(self._path("signatures"), self._path("matches"), config=config)
        self._add("match", "compare signatures", [match], config.num_buckets)
        cluster = MinhashDedupCluster(self._path("matches"), self._path("clusters"), config)
        self._add("cluster", "choose which to keep", [cluster], 1)

    def _sign_near(self) -> PipelineStep:
        config = minhash_config(self.settings.of_rule["near"])
        return MinhashDedupSignature(self._path("signatures"), config, language=Words())


def minhash_config(rule: NearRule) -> MinhashConfig:
    return MinhashConfig(rule.near_ngram, rule.near_buckets, rule.near_hashes, rule.near_seed, hash_config=hashes())


def text_without_spaces(doc: Document) -> str:
    """What two documents must share to be equal."""
    return " ".join(doc.text.split())
