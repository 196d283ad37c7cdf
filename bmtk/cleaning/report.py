"""What a cleaning has done: report.json, report.html and a table for the terminal, all from the same records."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from datatrove.pipeline.base import PipelineStep
from jinja2 import Environment, FileSystemLoader

from bmtk.files import write_json, write_text
from bmtk.hub.card import TEMPLATES
from bmtk.hub.formatting import format_compact, is_chosen, plural, show

from .arguments import RULES
from .record import CHANGED, REMOVED, merged

MOST_LANGUAGES = 12
Facts = dict[str, Any]


class WriteReport(PipelineStep):
    """The last stage: adds up what the others have recorded.  report.json comes last, and says that all is done."""

    type, name = "writer", "report"

    def __init__(self, output: Path, records: list[Path], num_shards: int, facts: Facts):
        super().__init__()
        self.output, self.records, self.num_shards, self.facts = output, records, num_shards, facts

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> None:
        record = merged(self.records, self.num_shards, self.facts["settings"]["num_examples"]).to_json()
        report = {**self.facts, **record, "rules": steps(self.facts["rules"], record)}
        write_text(self.output / "report.html", html(report))
        write_json(self.output / "report.json", report)


def steps(names: list[str], record: Facts) -> list[Facts]:
    """What became of the documents at each rule, in order: how many came to it, and what it removed and changed."""
    left, found = record["counts"].get("read_documents", 0), []
    for name in names:
        kinds = record["rules"].get(name, {})
        # A document may be changed for several reasons, and is removed for one.
        removed = sum(facts["documents"] for facts in kinds.get(REMOVED, {}).values())
        step = {"rule": name, "purpose": RULES[name], "seen": left, "removed": removed}
        left -= removed
        step |= {"removed_share": removed / max(1, step["seen"]), "left": left}
        found.append({**step, "reasons": {kind: _by_size(kinds.get(kind, {})) for kind in (REMOVED, CHANGED)}})
    return found


def _by_size(reasons: Facts) -> Facts:
    return dict(sorted(reasons.items(), key=lambda item: (-item[1]["documents"], item[0])))


def table(report: Facts) -> Iterator[str]:
    """Lines for a terminal of 80 columns."""
    yield f"{'rule':15}{'documents':>12}{'removed':>11}{'share':>8}  reasons"
    for step in report["rules"]:
        parts = [f"{reason} {facts['documents']:,}" for reason, facts in step["reasons"][REMOVED].items()]
        parts += [f"({reason} {facts['documents']:,})" for reason, facts in step["reasons"][CHANGED].items()]
        reasons = ", ".join(parts)
        reasons = reasons if len(reasons) <= 60 else f"{reasons[:57]}..."
        numbers = f"{step['seen']:12,}{step['removed']:11,}{step['removed_share']:8.1%}"
        yield f"{step['rule']:15}{numbers}  {reasons}".rstrip()
    yield sentence(report)
    if rows := report["left_out"]["rows"]:
        first = report["left_out"]["first"][0]
        yield f"left out: {rows:,} {plural('rows', rows)} that could not be read, the first: {first}"
    yield from report["remarks"]


def sentence(report: Facts) -> str:
    """What is left, in one sentence."""
    names = ("read_documents", "kept_documents", "read_characters", "kept_characters")
    read, kept, of, characters = (report["counts"].get(name, 0) for name in names)
    return (
        f"Of {read:,} {plural('documents', read)} {kept:,} are kept ({kept / max(1, read):.1%}), and of "
        f"{format_compact(of)} characters {format_compact(characters)} ({characters / max(1, of):.1%})."
    )


def html(report: Facts) -> str:
    """The page: loads nothing and runs nothing, in the style of the report of a run."""
    loader = FileSystemLoader([Path(__file__).parent, TEMPLATES])
    environment = Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    languages = sorted(report["languages"].items(), key=lambda item: (-item[1], item[0]))
    settings = {name: value for name, value in report["settings"].items() if is_chosen(name, value)}
    return environment.get_template("report.html").render(
        report=report,
        sentence=sentence(report),
        languages=languages[:MOST_LANGUAGES],
        settings=[(name, show(value)) for name, value in settings.items()],
        versions=list(report["versions"].items()),
    )
