"""The settings of `bmtk clean`: the rules that are used, and one dataclass of settings for each rule that has some."""

import dataclasses
import difflib
from dataclasses import dataclass
from typing import Any

from bmtk.errors import UserError
from bmtk.settings import setting

# Rule -> what it does, in the order in which rules are applied, whatever the order in a config file.
RULES = {
    "unicode": "repair text that was decoded with the wrong encoding (ftfy)",
    "length": "keep documents whose length is within bounds",
    "language": "keep documents in the languages that are named",
    "repetition": "drop documents that repeat lines, paragraphs or n-grams (Gopher)",
    "gopher": "drop documents unlike prose, by words, symbols and stop words (Gopher)",
    "c4": "drop lines that are no sentences, and pages with few of them (C4; for languages in Latin script)",
    "fineweb": "drop lists and menus, by ends, lengths and copies of lines (FineWeb)",
    "decontaminate": "drop documents that share a long n-gram with an evaluation set",
    "scrub": "replace e-mail addresses, phone numbers, public IP addresses and keys",
    "exact": "keep one of documents that are equal but for white space",
    "near": "keep one of documents that are nearly equal (MinHash)",
}
EXECUTORS = ("local", "slurm", "ray")
FORMATS = ("jsonl.gz", "parquet")
SCRUBBED = ("email", "phone", "ip", "key")
PACKAGES = ("datatrove", "ftfy", "py3langid")  # of the extra; their versions decide the result, too
DOCUMENTS, WORK = "documents", ".work"  # folders in output_dir: of the result, and of what leads to it


@dataclass
class CleaningArguments:
    """What is cleaned, by which rules, where to, and by whom."""

    _argument_group_name = "cleaning"

    config: str | None = setting(None, "YAML file of this run; the command line overrides it")
    input: list[str] = setting([], "files, folders, patterns or URLs of .txt, .jsonl, .csv, .tsv, .parquet or .arrow")
    output_dir: str = setting("outputs/clean", "folder for the documents that are kept, and for the report")
    output_format: str = setting("jsonl.gz", f"format of the documents: {' or '.join(FORMATS)}")
    rules: list[str] = setting([], f"which rules to apply: {', '.join(RULES)}")
    num_examples: int = setting(3, "examples in the report, for each reason to remove or change a document")
    overwrite: bool = setting(False, "delete what another run has left in output_dir, and start again")
    executor: str = setting("local", f"who does the work: {', '.join(EXECUTORS)}")
    workers: int | None = setting(
        None, "processes at a time; default: one for each processor (local, ray), or one for each shard (slurm)"
    )
    memory_gb: float = setting(2.0, "memory to ask Slurm or Ray for, in GB for each worker")


@dataclass
class InputArguments:
    """How documents are found in the input."""

    _argument_group_name = "input"

    text_column: str = setting("text", "column or key of the text in tables and JSON lines")
    sample_by: str = setting("document", "what is a document of a .txt file: the whole file (document), or each line")
    delimiter: str | None = setting(None, "of CSV files: one character, or its name; default: found in each file")
    encoding: str | None = setting(None, "of text, CSV and JSON files; default: UTF-8")
    on_corrupt: str = setting("stop", "what to do with rows that cannot be read: stop, or skip and count them")


@dataclass
class SlurmArguments:
    """Where Slurm runs the tasks.  Each is a job of an array; each stage waits for the one before it."""

    _argument_group_name = "slurm"

    slurm_partition: str | None = setting(None, "partition to submit to; needed by Slurm")
    slurm_time: str = setting("04:00:00", "time limit of a job")
    slurm_qos: str = setting("normal", "quality of service")
    slurm_setup: str | None = setting(
        None, "shell command that each job begins with, such as `source .venv/bin/activate`; default: this environment"
    )


@dataclass
class LengthRule:
    """Settings of the rule `length`; a word is a character in scripts without spaces."""

    _argument_group_name = "length rule"

    min_characters: int = setting(1, "least characters of a document")
    max_characters: int | None = setting(None, "most characters of a document")
    min_words: int = setting(1, "least words of a document")
    max_words: int | None = setting(None, "most words of a document")


@dataclass
class LanguageRule:
    """Settings of the rule `language`: py3langid on the first 4,096 characters."""

    _argument_group_name = "language rule"

    languages: list[str] = setting([], "languages to keep, as ISO 639-1 codes: en, or en zh")
    language_confidence: float = setting(0.5, "least probability of the language, 0 to 1")


@dataclass
class RepetitionRule:
    """Settings of the rule `repetition`.  Source: Rae et al. 2021, arXiv:2112.11446, table A1."""

    _argument_group_name = "repetition rule"

    max_duplicate_lines: float = setting(0.3, "largest share of lines that are copies; 0: any")
    max_duplicate_paragraphs: float = setting(0.3, "largest share of paragraphs that are copies; 0: any")
    max_duplicate_line_characters: float = setting(0.2, "largest share of characters in copied lines; 0: any")
    max_duplicate_paragraph_characters: float = setting(
        0.2, "largest share of characters in copied paragraphs; 0: any"
    )
    max_top_ngrams: list[float] = setting(
        [0.2, 0.18, 0.16], "largest share of characters in the most frequent 2-, 3-, 4-gram"
    )
    max_duplicate_ngrams: list[float] = setting(
        [0.15, 0.14, 0.13, 0.12, 0.11, 0.1], "largest share of characters in repeated 5-, 6-, ... 10-grams"
    )


@dataclass
class GopherRule:
    """Settings of the rule `gopher`.  Source: Rae et al. 2021, arXiv:2112.11446, section A1.1."""

    _argument_group_name = "gopher rule"

    gopher_min_words: int = setting(50, "least words, without punctuation; 0: any")
    gopher_max_words: int = setting(100_000, "most words, without punctuation; 0: any")
    gopher_min_word_length: float = setting(3, "least mean characters of a word; 0 for scripts without spaces")
    gopher_max_word_length: float = setting(10, "largest mean characters of a word; 0: any")
    gopher_max_symbols: float = setting(0.1, "most hash signs, or ellipses, for each word; 0: any")
    gopher_max_bullet_lines: float = setting(0.9, "largest share of lines that begin with a bullet; 0: any")
    gopher_max_ellipsis_lines: float = setting(0.3, "largest share of lines that end in an ellipsis; 0: any")
    gopher_min_alphabetic: float = setting(
        0.8, "least share of words and punctuation marks that hold a letter; 0: any"
    )
    gopher_min_stop_words: int = setting(2, "least number of different stop words; 0: any")
    gopher_stop_words: list[str] = setting(
        ["the", "be", "to", "of", "and", "that", "have", "with"], "stop words of the language"
    )


@dataclass
class C4Rule:
    """Settings of the rule `c4`.  Source: Raffel et al. 2020, arXiv:1910.10683, section 2.2."""

    _argument_group_name = "c4 rule"

    c4_terminal_punctuation: bool = setting(True, "drop lines that do not end in one of . ? ! \" '")
    c4_min_sentences: int = setting(5, "least sentences of a document after lines were dropped; -1: any")
    c4_min_words_per_line: int = setting(3, "drop lines with fewer words (between spaces); -1: none")
    c4_max_word_length: int = setting(1000, "drop lines with a longer word; -1: none")
    c4_lorem_ipsum: bool = setting(True, "drop documents with lorem ipsum")
    c4_javascript: bool = setting(True, "drop lines that speak of Javascript")
    c4_curly_bracket: bool = setting(True, "drop documents with a curly bracket")
    c4_policy: bool = setting(True, "drop lines about cookies, terms of use and privacy policies")
    c4_citations: bool = setting(True, "remove citation marks such as [3]")


@dataclass
class FineWebRule:
    """Settings of the rule `fineweb`.  Source: Penedo et al. 2024, arXiv:2406.17557, section 3.6."""

    _argument_group_name = "fineweb rule"

    fineweb_min_punctuated_lines: float = setting(0.12, "least share of lines that end in terminal punctuation")
    fineweb_short_line: int = setting(30, "characters of a short line")
    fineweb_max_short_lines: float = setting(0.67, "largest share of short lines")
    fineweb_max_duplicate_characters: float = setting(0.01, "largest share of characters in copied lines")
    fineweb_max_new_lines: float = setting(0.3, "most line breaks for each word")


@dataclass
class DecontaminationRule:
    """Settings of the rule `decontaminate`."""

    _argument_group_name = "decontaminate rule"

    evaluation_sets: list[str] = setting(
        [], "NAME=SOURCE of each evaluation set, or NAME=SOURCE#COLUMN,COLUMN for other columns than text"
    )
    evaluation_split: str = setting("test", "split of an evaluation set that is a folder or a name on the Hub")
    evaluation_ngram: int = setting(13, "words in a row that no document may share with an evaluation set")


@dataclass
class ScrubRule:
    """Settings of the rule `scrub`."""

    _argument_group_name = "scrub rule"

    scrub: list[str] = setting(list(SCRUBBED), f"what to replace: {', '.join(SCRUBBED)}")


@dataclass
class NearRule:
    """Settings of the rule `near`: two documents are compared if one of the buckets has equal hashes."""

    _argument_group_name = "near rule"

    near_ngram: int = setting(5, "words of a shingle; shorter documents have no near duplicates")
    near_buckets: int = setting(14, "buckets: more find documents that are less alike")
    near_hashes: int = setting(8, "hashes of a bucket: more find only documents that are more alike")
    near_seed: int = setting(1, "seed of the hash functions")


RULE_SETTINGS: dict[str, Any] = {
    "length": LengthRule,
    "language": LanguageRule,
    "repetition": RepetitionRule,
    "gopher": GopherRule,
    "c4": C4Rule,
    "fineweb": FineWebRule,
    "decontaminate": DecontaminationRule,
    "scrub": ScrubRule,
    "near": NearRule,
}
CLASSES: list[Any] = [CleaningArguments, InputArguments, SlurmArguments, *RULE_SETTINGS.values()]
# Settings that decide who does the work, and change no byte of the result.
FREE = {"config", "output_dir", "overwrite", "executor", "workers", "memory_gb"}


@dataclass(frozen=True)
class Cleaning:
    """All settings of a run, checked."""

    run: CleaningArguments
    input: InputArguments
    slurm: SlurmArguments
    of_rule: dict[str, Any]  # the settings of each rule that has some

    def __post_init__(self) -> None:
        _check_names("rules", self.run.rules, tuple(RULES))
        _check_names("executor", [self.run.executor], EXECUTORS)
        _check_names("output_format", [self.run.output_format], FORMATS)
        _check_names("scrub", self.of_rule["scrub"].scrub, SCRUBBED)
        self._check_what_is_missing()
        self._check_numbers()

    def _check_what_is_missing(self) -> None:
        if not self.run.input:
            raise UserError("input is empty; name the files to be cleaned: --input FILE, or `input:` in a config file")
        if not self.run.rules:
            raise UserError(f"rules is empty; choose some of {', '.join(RULES)}")
        for rule, name in (("language", "languages"), ("decontaminate", "evaluation_sets"), ("scrub", "scrub")):
            if self.uses(rule) and not getattr(self.of_rule[rule], name):
                raise UserError(f"the rule {rule} needs {name}; set it, or leave {rule} out of rules")
        if self.run.executor == "slurm" and not self.slurm.slurm_partition:
            raise UserError("executor=slurm needs slurm_partition; `sinfo` lists the partitions")

    def _check_numbers(self) -> None:
        near, repetition = self.of_rule["near"], self.of_rule["repetition"]
        positive = {f"near_{name}": getattr(near, f"near_{name}") for name in ("ngram", "buckets", "hashes")}
        positive |= {"evaluation_ngram": self.of_rule["decontaminate"].evaluation_ngram}
        positive |= {"workers": 1 if self.run.workers is None else self.run.workers, "memory_gb": self.run.memory_gb}
        if wrong := [f"{name}={value}" for name, value in positive.items() if value <= 0]:
            raise UserError(f"{', '.join(wrong)} must be above 0")
        for name, length in (("max_top_ngrams", 3), ("max_duplicate_ngrams", 6)):
            if len(values := getattr(repetition, name)) != length:
                raise UserError(f"{name}={values} must have {length} numbers, one for each length of an n-gram")

    def uses(self, rule: str) -> bool:
        return rule in self.run.rules

    @property
    def rules(self) -> list[str]:
        """Those that are used, in the order in which they are applied."""
        return [rule for rule in RULES if self.uses(rule)]

    def identity(self) -> dict[str, object]:
        """The settings that decide the result: those of rules that are not used do not."""
        used = [self.run, self.input, *(self.of_rule[rule] for rule in self.rules if rule in self.of_rule)]
        values = {name: value for part in used for name, value in dataclasses.asdict(part).items()}
        return {**{name: value for name, value in values.items() if name not in FREE}, "rules": self.rules}

    def unused(self) -> list[str]:
        """A remark on each setting that was changed, though its rule is not used."""
        found = []
        for rule, part in self.of_rule.items():
            names = [f.name for f in dataclasses.fields(part) if getattr(part, f.name) != _default(f)]
            if names and not self.uses(rule):
                found.append(f"{', '.join(names)} is not used: {rule} is not among rules")
        return found


def cleaning(parts: list[Any]) -> Cleaning:
    """The settings from instances of CLASSES, in order.  Raises: UserError."""
    run, source, slurm, *of_rules = parts
    return Cleaning(run, source, slurm, dict(zip(RULE_SETTINGS, of_rules, strict=True)))


def _default(field: dataclasses.Field[Any]) -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def _check_names(name: str, values: list[str], known: tuple[str, ...]) -> None:
    for value in values:
        if value not in known:
            near = difflib.get_close_matches(value, known, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise UserError(f"{name}: {value!r} is unknown; {hint}choose from {', '.join(known)}")
