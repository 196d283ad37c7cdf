"""The rules that look at one document at a time, and the step that applies them one after the other."""

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datatrove.data import Document
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.decont.n_grams import NGramsDecontFilter
from datatrove.pipeline.filters import (
    C4QualityFilter,
    FineWebQualityFilter,
    GopherQualityFilter,
    GopherRepetitionFilter,
)
from datatrove.pipeline.filters.base_filter import BaseFilter, get_filter_result
from datatrove.pipeline.formatters import FTFYFormatter
from datatrove.pipeline.formatters.base import BaseFormatter

from .arguments import C4Rule, Cleaning, FineWebRule, GopherRule, RepetitionRule
from .contamination import decontamination
from .filters import Language, Length
from .record import Record
from .scrubbing import Scrub, kinds_scrubbed
from .words import Words

# What datatrove calls a reason -> what it means, where the two differ.
MEANING = {
    "gopher_short_doc": "too few words",
    "gopher_long_doc": "too many words",
    "gopher_below_avg_threshold": "short words",
    "gopher_above_avg_threshold": "long words",
    "gopher_too_many_end_ellipsis": "too many lines end in an ellipsis",
    "gopher_below_alpha_threshold": "too few words with letters",
    "gopher_enough_stop_words": "too few stop words",
    "dup_line_frac": "copied lines",
    "dup_para_frac": "copied paragraphs",
    "dup_line_char_frac": "characters in copied lines",
    "dup_para_char_frac": "characters in copied paragraphs",
    "line_punct_ratio": "too few lines end in punctuation",
    "short_line_ratio": "too many short lines",
    "char_dup_ratio": "characters in copied lines",
    "list_ratio": "too many line breaks",
}
Reasons = Callable[[str, str], Iterable[str]]  # why a text was changed: from the text before and after


@dataclass(frozen=True)
class Rule:
    """A step of datatrove under the name that a config file has for it."""

    name: str
    step: BaseFilter | BaseFormatter
    reasons: Reasons

    def keeps(self, doc: Document, record: Record) -> bool:
        """Apply the rule; whether the document is kept."""
        before = doc.text
        kept, reason = True, None
        if isinstance(self.step, BaseFormatter):
            doc.text = self.step.format(before)
        else:
            kept, reason = get_filter_result(self.step.filter(doc))
        if kept and (not doc.text or doc.text.isspace()):
            kept, reason = False, "nothing is left"
        if not kept:
            if isinstance(self.step, NGramsDecontFilter):
                reason = doc.metadata["contaminated_task"]
            record.removed(self.name, _words(reason or "removed"), Document(before, doc.id))
        elif doc.text != before:
            record.changed(self.name, self.reasons(before, doc.text), doc.id, before, doc.text)
        return kept


class Sieve(PipelineStep):
    """Hands on the documents that every rule keeps, as the rules have changed them.

    The steps could stand in the pipeline themselves, but would say neither which document they changed nor, after a
    run was resumed, how many they had removed before.
    """

    type, name = "filter", "rules"

    def __init__(self, rules: list[Rule], folder: Path, num_examples: int):
        super().__init__()
        self.rules, self.folder, self.num_examples = rules, folder, num_examples

    def run(self, data: Any, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        record = Record(self.num_examples)
        for doc in data:
            record.count("read", doc.text)
            if all(rule.keeps(doc, record) for rule in self.rules):
                yield doc
        record.save(self.folder, rank)


def rules_of_documents(settings: Cleaning, evaluation: Path) -> list[Rule]:
    """Those of `settings` that need no other document; `evaluation` is the folder of its n-grams."""
    builders: dict[str, Callable[[Any], BaseFilter | BaseFormatter]] = {
        "unicode": lambda _: FTFYFormatter(),
        "language": lambda part: Language(part.languages, part.language_confidence),
        "length": Length,
        "repetition": _repetition,
        "gopher": _gopher,
        "c4": _c4,
        "fineweb": _fineweb,
        "decontaminate": lambda part: decontamination(part, evaluation),
        "scrub": lambda part: Scrub(part.scrub),
    }
    reasons: dict[str, Reasons] = {"unicode": _repaired, "c4": _lines_dropped, "scrub": kinds_scrubbed}
    used = [name for name in settings.rules if name in builders]
    return [Rule(name, builders[name](settings.of_rule.get(name)), reasons.get(name, _changed)) for name in used]


def _repetition(part: RepetitionRule) -> BaseFilter:
    return GopherRepetitionFilter(
        dup_line_frac=part.max_duplicate_lines,
        dup_para_frac=part.max_duplicate_paragraphs,
        dup_line_char_frac=part.max_duplicate_line_characters,
        dup_para_char_frac=part.max_duplicate_paragraph_characters,
        top_n_grams=tuple(zip((2, 3, 4), part.max_top_ngrams, strict=True)),
        dup_n_grams=tuple(zip(range(5, 11), part.max_duplicate_ngrams, strict=True)),
        language=Words(),
    )


def _gopher(part: GopherRule) -> BaseFilter:
    return GopherQualityFilter(
        min_doc_words=max(1, part.gopher_min_words),  # a document without words has no mean length of a word
        max_doc_words=part.gopher_max_words,
        min_avg_word_length=part.gopher_min_word_length,
        max_avg_word_length=part.gopher_max_word_length,
        max_symbol_word_ratio=part.gopher_max_symbols,
        max_bullet_lines_ratio=part.gopher_max_bullet_lines,
        max_ellipsis_lines_ratio=part.gopher_max_ellipsis_lines,
        max_non_alpha_words_ratio=part.gopher_min_alphabetic,  # a least share, for all its name
        min_stop_words=part.gopher_min_stop_words,
        stop_words=part.gopher_stop_words,
        language=Words(),
    )


def _c4(part: C4Rule) -> BaseFilter:
    return C4QualityFilter(
        remove_citations=part.c4_citations,
        filter_no_terminal_punct=part.c4_terminal_punctuation,
        min_num_sentences=part.c4_min_sentences,
        min_words_per_line=part.c4_min_words_per_line,
        max_word_length=part.c4_max_word_length,
        filter_lorem_ipsum=part.c4_lorem_ipsum,
        filter_javascript=part.c4_javascript,
        filter_curly_bracket=part.c4_curly_bracket,
        filter_policy=part.c4_policy,
        language=Words(),
    )


def _fineweb(part: FineWebRule) -> BaseFilter:
    return FineWebQualityFilter(
        line_punct_thr=part.fineweb_min_punctuated_lines,
        short_line_thr=part.fineweb_max_short_lines,
        short_line_length=part.fineweb_short_line,
        char_duplicates_ratio=part.fineweb_max_duplicate_characters,
        new_line_ratio=part.fineweb_max_new_lines,
        language=Words(),
    )


def _words(reason: str) -> str:
    named = re.sub(
        r"duplicated_(\d+)_n_grams", r"repeated \1-grams", re.sub(r"top_(\d)_gram", r"a frequent \1-gram", reason)
    )
    return MEANING.get(reason, named.removeprefix("gopher_").replace("_", " "))


def _changed(before: str, after: str) -> list[str]:
    return ["changed"]


def _repaired(before: str, after: str) -> list[str]:
    return ["repaired"]


def _lines_dropped(before: str, after: str) -> list[str]:
    return ["lines dropped"]
