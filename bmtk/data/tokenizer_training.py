"""Train a tokenizer on a sample of a corpus, check that others can load it, and measure it on text it has not seen."""

import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from bmtk.errors import UserError
from bmtk.files import read_json, write_json

from .fingerprints import FileDigests
from .held_out_texts import hold_out
from .sources import Texts, has_split, read_texts
from .text_files import TableFormat
from .tokenizer_report import MEASURED_CHARACTERS, Measures, measure, table
from .tokenizer_samples import SAMPLE_MB, Sample, counted, draw_sample, units_of
from .tokenizers import TRAINED_ON, check_kind, keep_tokenizer, kept_tokenizer, load_tokenizer, train_tokenizer

REPORT = "tokenizer_report.json"
SHIPPED = {"English": "english.txt", "Chinese": "chinese.txt"}  # names in the report -> files of the samples
PROBES = ("Was it a cat I saw? 12 + 30 = 42;\n\tnaïve", "你好、世界。", " <|endoftext|> 🙂", "")
# What a machine without bmtk does: importing it fails here as it does there.
LOAD_ELSEWHERE = """
import json, sys
sys.modules["bmtk"] = None
from transformers import AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
print(json.dumps([tokenizer(text)["input_ids"] for text in json.load(sys.stdin)]))
"""


@dataclass(frozen=True)
class TextSource:
    """Where the texts are, and how they are read: the settings of `bmtk pretrain` of the same names."""

    train: tuple[str, ...]
    option: str = "train_file"  # or dataset, which may name splits
    validation: tuple[str, ...] = ()
    text_column: str = "text"
    sample_by: str = "document"
    layout: TableFormat = TableFormat()
    on_corrupt: str = "stop"

    @property
    def has_validation(self) -> bool:
        return bool(self.validation) or (self.option == "dataset" and has_split(self.train[0], "validation"))

    def read(self, split: str) -> Texts:
        found = self.validation if split == "validation" and self.validation else self.train
        how: dict[str, Any] = {"text_column": self.text_column, "sample_by": self.sample_by, "layout": self.layout}
        return read_texts(found, split=split, digests=FileDigests(), on_corrupt=self.on_corrupt, **how)


@dataclass(frozen=True)
class TokenizerPlan:
    """What kind of tokenizer; `held_out` is the share of the corpus that is measured on rather than trained on."""

    kind: str = "byte_bpe"
    vocab_size: int = 4096
    special_tokens: tuple[str, ...] = ()
    lower_case: bool = False
    with_mask: bool = False
    sample_mb: int = SAMPLE_MB
    held_out: float = 0.1
    seed: int = 42

    def __post_init__(self) -> None:
        check_kind(self.kind)
        if not 0 <= self.held_out < 1:
            raise UserError(f"validation_fraction={self.held_out} is not a share; choose 0 (none) or more, below 1")
        if self.sample_mb < 1:
            raise UserError(f"sample_mb={self.sample_mb} must be at least 1 (10^6 bytes of text)")

    @property
    def training(self) -> dict[str, Any]:
        """Of `train_tokenizer`."""
        names = ("kind", "vocab_size", "special_tokens", "lower_case", "with_mask")
        found = {name: value for name, value in asdict(self).items() if name in names}
        return {**found, "special_tokens": list(self.special_tokens)}


def train_on_sample(
    texts: Texts | Sequence[str],
    *,
    sample_mb: int | None = None,
    log: Callable[[str], None] = lambda line: None,
    **training: Any,
) -> tuple[PreTrainedTokenizerFast, Sample]:
    """Train a tokenizer on at most `sample_mb` MB of the texts (default: SAMPLE_MB).

    `training` are arguments of `train_tokenizer`.  The recipe for pretraining and `bmtk tokenizer train` share this.
    """
    of_bytes = texts.num_bytes if isinstance(texts, Texts) else None
    units = counted(units_of(texts, training["kind"]), of_bytes, log)
    sample = draw_sample(units, (sample_mb or SAMPLE_MB) * 10**6)
    log(f"training {training['kind']} on {sample} ...")
    began = time.monotonic()
    tokenizer = train_tokenizer(sample, **training)
    log(f"{len(tokenizer):,} tokens after {time.monotonic() - began:,.0f} s")
    return tokenizer, sample


def train_folder(
    source: TextSource, plan: TokenizerPlan, folder: Path, samples: Path, log: Callable[[str], None]
) -> None:
    """Train, check, save and measure a tokenizer; where `folder` has it already, it is only measured.

    `samples` is the folder of the texts that are measured besides the held-out one.
    Raises: UserError if `folder` holds anything else, or the tokenizer cannot be loaded by others.
    """
    texts, held_out = _splits(source, plan, log)
    identity = {**plan.training, "sample_mb": plan.sample_mb, "texts": texts.fingerprint}
    _check_folder(folder, identity)
    tokenizer = kept_tokenizer(folder, identity)
    if tokenizer is not None:
        log(f"{folder} holds this tokenizer already: the same settings and the same text")
    else:
        tokenizer, sample = train_on_sample(texts, sample_mb=plan.sample_mb, log=log, **plan.training)
        check = partial(check_elsewhere, tokenizer)
        keep_tokenizer(tokenizer, folder, {**identity, "sample": str(sample)}, check=check)
        log(f"saved to {folder}: AutoTokenizer loads it in a clean process without bmtk, with the same ids")
    named = {} if held_out is None else {"held out": held_out.head(MEASURED_CHARACTERS)}
    measured = measured_on(tokenizer, {**named, **shipped_samples(samples)})
    write_json(folder / REPORT, {name: found.as_record() for name, found in measured.items()})
    log("\n".join(["", *table(measured)]))
    task = " --task masked_lm" if plan.with_mask else ""
    log(f"\nnext: bmtk pretrain{task} --tokenizer {folder} --{source.option} {shlex.join(source.train)}")


def show_tokenizer(name: str, texts: Texts | None, samples: Path, log: Callable[[str], None]) -> None:
    """Measure any tokenizer (a folder or Hub id) on a text and the samples."""
    tokenizer = load_tokenizer(name)
    log(f"{name}: {type(tokenizer).__name__}, {len(tokenizer):,} tokens; special: {_shown_special(tokenizer)}")
    stamp = read_json(Path(name) / TRAINED_ON)
    if isinstance(stamp, dict) and "sample" in stamp:
        log(f"trained as {stamp['kind']} on {stamp['sample']}")
    named = {} if texts is None else {"text_file": texts.head(MEASURED_CHARACTERS)}
    log("\n".join(["", *table(measured_on(tokenizer, {**named, **shipped_samples(samples)}))]))


def measured_on(tokenizer: PreTrainedTokenizerBase, texts: Mapping[str, Iterable[str]]) -> dict[str, Measures]:
    return {name: measure(tokenizer, parts) for name, parts in texts.items()}


def shipped_samples(folder: Path) -> dict[str, list[str]]:
    return {f"sample: {name}": [(folder / file).read_text(encoding="utf-8")] for name, file in SHIPPED.items()}


def check_elsewhere(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Raise UserError unless a clean process that cannot import bmtk gets the same ids from the folder."""
    wanted = [tokenizer(text)["input_ids"] for text in PROBES]
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    run = subprocess.run(
        [sys.executable, "-c", LOAD_ELSEWHERE, str(folder.resolve())],
        input=json.dumps(PROBES),
        env=kept,
        cwd=folder,
        capture_output=True,
        text=True,
        encoding="utf-8",
    )
    if run.returncode:
        raise UserError(f"the tokenizer cannot be loaded by AutoTokenizer in a clean process:\n{run.stderr.strip()}")
    if json.loads(run.stdout.splitlines()[-1]) != wanted:
        raise UserError("the tokenizer gives other ids when AutoTokenizer loads it in a clean process")


def _splits(source: TextSource, plan: TokenizerPlan, log: Callable[[str], None]) -> tuple[Texts, Texts | None]:
    """What is trained on, and what is measured: validation text, or the share that `bmtk pretrain` holds out, too."""
    texts = source.read("train")
    if source.has_validation:
        return texts, source.read("validation")
    if not plan.held_out:
        return texts, None
    parts = hold_out(texts, plan.held_out, plan.seed)
    log(f"note: {parts.note}, as by bmtk pretrain with the same settings")
    return parts.train, parts.validation


def _check_folder(folder: Path, identity: Mapping[str, object]) -> None:
    """Raise UserError for a folder with anything in it but a tokenizer of the same settings."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    stamp = read_json(folder / TRAINED_ON)
    if not isinstance(stamp, dict):
        raise UserError(f"output_dir={folder} is there and holds no tokenizer of this command; choose another")
    differing = [name for name, value in identity.items() if stamp.get(name) != value]
    if differing:
        raise UserError(
            f"output_dir={folder} holds a tokenizer of another {' and '.join(differing)}; choose another folder, or "
            "delete this one"
        )


def _shown_special(tokenizer: PreTrainedTokenizerBase) -> str:
    return " ".join(tokenizer.all_special_tokens) or "none"
