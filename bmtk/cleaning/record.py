"""What the rules have removed and changed: counted in each shard, with the first examples, and added up."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datatrove.data import Document
from datatrove.pipeline.base import PipelineStep

from bmtk.files import read_json, write_json
from bmtk.hub.redaction import scrub_text

from .arguments import SCRUBBED
from .scrubbing import scrubbed

EXAMPLE_CHARACTERS = 280  # of a document that is shown
AROUND = 60  # characters on either side of a change
REMOVED, CHANGED = "removed", "changed"
LOOKED_AT = 1 << 16  # characters of a document that are looked through for an example


@dataclass
class Record:
    """Counts of documents and characters, and what became of them: rule -> removed or changed -> reason."""

    num_examples: int
    counts: dict[str, int] = field(default_factory=dict)
    rules: dict[str, Any] = field(default_factory=dict)
    left_out: dict[str, Any] = field(default_factory=lambda: {"rows": 0, "first": []})  # that could not be read
    languages: dict[str, int] = field(default_factory=dict)  # documents that are kept

    def count(self, kind: str, text: str) -> None:
        """One more document that was "read" or "kept"."""
        self._add(self.counts, {f"{kind}_documents": 1, f"{kind}_characters": len(text)})

    def kept(self, doc: Document) -> None:
        self.count("kept", doc.text)
        if language := doc.metadata.get("language"):
            self._add(self.languages, {language: 1})

    def removed(self, rule: str, reason: str, doc: Document) -> None:
        self._note(rule, REMOVED, reason, len(doc.text), {"id": doc.id, "text": _shown(doc.text)})

    def changed(self, rule: str, reasons: Iterable[str], doc_id: str, before: str, after: str) -> None:
        first, second = _difference(before, after)
        for reason in reasons:
            self._note(rule, CHANGED, reason, len(before), {"id": doc_id, "before": first, "after": second})

    def unreadable(self, message: str) -> None:
        self.left_out["rows"] += 1
        self.left_out["first"] = [*self.left_out["first"], message][: max(1, self.num_examples)]

    def _note(self, rule: str, kind: str, reason: str, num_characters: int, example: dict[str, str]) -> None:
        reasons = self.rules.setdefault(rule, {}).setdefault(kind, {})
        facts = reasons.setdefault(reason, {"documents": 0, "characters": 0, "examples": []})
        self._add(facts, {"documents": 1, "characters": num_characters})
        if len(facts["examples"]) < self.num_examples:
            facts["examples"].append(example)

    @staticmethod
    def _add(counts: dict[str, Any], added: dict[str, int]) -> None:
        for name, number in added.items():
            counts[name] = counts.get(name, 0) + number

    def add(self, other: dict[str, Any]) -> None:
        """Add what `save` has written."""
        self._add(self.counts, other["counts"])
        self._add(self.languages, other["languages"])
        self.left_out["rows"] += other["left_out"]["rows"]
        first = [*self.left_out["first"], *other["left_out"]["first"]]
        self.left_out["first"] = first[: max(1, self.num_examples)]
        for rule, kinds in other["rules"].items():
            for kind, reasons in kinds.items():
                for reason, facts in reasons.items():
                    self._add_reason(self.rules.setdefault(rule, {}).setdefault(kind, {}), reason, facts)

    def _add_reason(self, reasons: dict[str, Any], reason: str, facts: dict[str, Any]) -> None:
        own = reasons.setdefault(reason, {"documents": 0, "characters": 0, "examples": []})
        self._add(own, {name: facts[name] for name in ("documents", "characters")})
        own["examples"] = [*own["examples"], *facts["examples"]][: self.num_examples]

    def to_json(self) -> dict[str, Any]:
        facts = {"counts": self.counts, "languages": dict(sorted(self.languages.items())), "rules": self.rules}
        return {**facts, "left_out": self.left_out}

    def save(self, folder: Path, rank: int) -> None:
        write_json(folder / f"{rank:05}.json", self.to_json())


def merged(folders: Iterable[Path], num_shards: int, num_examples: int) -> Record:
    """The records of all shards together, in the order of the shards."""
    record = Record(num_examples)
    for folder in folders:
        for rank in range(num_shards):
            facts = read_json(folder / f"{rank:05}.json")
            assert isinstance(facts, dict), f"the record {folder / f'{rank:05}.json'} is missing"
            record.add(facts)
    return record


class CountKept(PipelineStep):
    """Counts the documents that are left."""

    type, name = "stats", "kept"

    def __init__(self, folder: Path):
        super().__init__()
        self.folder = folder

    def run(self, data: Any, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        record = Record(0)
        for doc in data:
            record.kept(doc)
            yield doc
        record.save(self.folder, rank)


class Deduplicate(PipelineStep):
    """Applies a filter of datatrove that removes duplicates, and records what it removes."""

    type, name = "filter", "duplicates"

    def __init__(self, step: Any, rule: str, reason: str, folder: Path, num_examples: int):
        super().__init__()
        self.step, self.rule, self.reason = step, rule, reason
        self.folder, self.num_examples = folder, num_examples

    def run(self, data: Any, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        record = Record(self.num_examples)
        self.step.exclusion_writer = _Exclusions(record, self.rule, self.reason)
        yield from self.step.run(data, rank, world_size)
        record.save(self.folder, rank)


class _Exclusions:
    """Stands for the writer that a filter of datatrove hands removed documents to."""

    def __init__(self, record: Record, rule: str, reason: str):
        self.record, self.rule, self.reason = record, rule, reason

    def __enter__(self) -> "_Exclusions":
        return self

    def write(self, document: Document, rank: int = 0) -> None:
        self.record.removed(self.rule, self.reason, document)

    def __exit__(self, *error: object) -> None:
        pass


def _shown(text: str) -> str:
    """The beginning of a text, without what must not be in a report."""
    text = _safe(text.strip())
    return text[:EXAMPLE_CHARACTERS] + (" …" if len(text) > EXAMPLE_CHARACTERS else "")


def _safe(text: str) -> str:
    return scrub_text(scrubbed(text[:LOOKED_AT], SCRUBBED))


def _difference(before: str, after: str) -> tuple[str, str]:
    """The first place where two texts differ; where only scrubbing has changed them, the first place of that."""
    old, new = _safe(before), _safe(after)
    place = next((i for i, (a, b) in enumerate(zip(old, new, strict=False)) if a != b), min(len(old), len(new)))
    if old == new:
        place = min((new.find(f"[{kind}]") for kind in SCRUBBED if f"[{kind}]" in new), default=0)
    first = max(0, place - AROUND)
    old, new = (("… " if first else "") + text[first : first + 2 * AROUND] for text in (old, new))
    return old, new
