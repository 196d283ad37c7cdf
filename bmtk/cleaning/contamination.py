"""Documents that hold what a model will be measured on: n-grams of evaluation sets, and the rule that finds them.

datatrove's filter is used; its indexer needs the package lighteval, which would load the sets from the Hub, so the
index is made here from files of any kind that bmtk reads.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from datatrove.pipeline.decont.n_grams import NGramsDecontConfig, NGramsDecontFilter
from datatrove.utils.hashing import create_hash_func
from datatrove.utils.text import ngrams, simplify_text

from bmtk.errors import UserError
from bmtk.files import write_bytes

from .arguments import DecontaminationRule
from .words import Words, hashes

if TYPE_CHECKING:
    from bmtk.data.sources import Texts

NAMED_SET = re.compile(r"(?P<name>[\w.-]+)=(?P<source>[^#]+)(?:#(?P<columns>.+))?")


@dataclass(frozen=True)
class EvaluationSet:
    """The texts of an evaluation set, of one column or several, under its name."""

    name: str
    texts: "tuple[Texts, ...]"

    @property
    def fingerprint(self) -> str:
        return " ".join([self.name, *(texts.fingerprint for texts in self.texts)])

    def __iter__(self) -> Iterator[str]:
        for texts in self.texts:
            yield from texts


def evaluation_sets(settings: DecontaminationRule) -> list[EvaluationSet]:
    """The sets that are named.  Raises: UserError for one that cannot be read."""
    found = [_named(text, settings.evaluation_split) for text in settings.evaluation_sets]
    names = [evaluation.name for evaluation in found]
    if twice := [name for name in names if names.count(name) > 1]:
        raise UserError(f"evaluation_sets names {twice[0]!r} twice; give each set a name of its own")
    return found


def _named(text: str, split: str) -> EvaluationSet:
    from bmtk.data.sources import read_texts  # imports datasets, which a worker does not need

    match = NAMED_SET.fullmatch(text)
    if match is None:
        raise UserError(f"evaluation_sets: {text!r} is not NAME=SOURCE or NAME=SOURCE#COLUMN,COLUMN")
    columns = (match["columns"] or "text").split(",")
    texts = tuple(read_texts(match["source"], split=split, text_column=column, sample_by="line") for column in columns)
    return EvaluationSet(match["name"], texts)


def write_index(sets: list[EvaluationSet], settings: DecontaminationRule, folder: Path) -> list[str]:
    """Write the hashes of the n-grams of each set, as datatrove's filter reads them; remarks on what is too short."""
    config, remarks = _config(settings), []
    hash_of = create_hash_func(config.hash_config)
    for evaluation in sets:
        hashes: set[int] = set()
        num_texts = num_short = 0
        for text in evaluation:
            words = Words().word_tokenize(simplify_text(text, config.norm_config))
            num_texts, num_short = num_texts + 1, num_short + (len(words) < config.n_grams)
            hashes.update(hash_of(" ".join(gram)) for gram in ngrams(words, config.n_grams))
        write_bytes(folder / f"{evaluation.name}.index.hashes", np.array(sorted(hashes), "<u8").tobytes())
        if num_short:
            remarks.append(
                f"{num_short:,} of {num_texts:,} texts of {evaluation.name} have fewer than {config.n_grams} words "
                "and are not looked for"
            )
    return remarks


def decontamination(settings: DecontaminationRule, folder: Path) -> NGramsDecontFilter:
    return NGramsDecontFilter(str(folder), _config(settings), language=Words())


def _config(settings: DecontaminationRule) -> NGramsDecontConfig:
    return NGramsDecontConfig(n_grams=settings.evaluation_ngram, hash_config=hashes())
