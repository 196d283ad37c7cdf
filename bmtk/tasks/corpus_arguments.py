"""The settings of the language-modelling tasks about their corpus: which text, which tokenizer, which rows."""

from dataclasses import dataclass
from typing import ClassVar

from bmtk.data.mixture import Corpus, read_corpora, share_names, to_text
from bmtk.data.sources import ON_CORRUPT
from bmtk.errors import UserError
from bmtk.settings import fact, setting

from .task_data import LEAKAGE, SourceArguments

PACKINGS = ("cut", "best_fit")
HELD_OUT = 0.1  # of a corpus without a validation text


@dataclass
class CorpusArguments(SourceArguments):
    """Which text, which tokenizer, how much context."""

    dataset: str | None = setting(None, "folder, file or Hub id (owner/name) with a train and a validation split")
    train_file: list[str] | None = setting(
        None,
        "training text: .txt, .jsonl, .csv, .tsv, .parquet or .arrow files (each also .gz, .bz2, .xz, .zst), folders, "
        "patterns such as 'texts/*.txt', or URLs",
    )
    corpora: list[str] | None = setting(
        None,
        "corpora mixed by weights, instead of dataset or train_file: of each its path (as train_file), its weight "
        "and, if need be, text_column and repeat (the most times it is read); in YAML a list of mappings, here JSON: "
        '\'{"path": "a.txt", "weight": 2}\' \'{"path": "b.txt", "weight": 1, "repeat": 4}\'',
    )
    validation_file: list[str] | None = setting(None, "validation text, likewise")
    test_file: list[str] | None = setting(None, "text of the final test, likewise; default: that of dataset, if any")
    # None stands for a tenth, as below.
    validation_fraction: float | None = setting(
        None,
        f"share of the training text held out if no validation text is given (default {HELD_OUT}): whole documents, "
        "or stretches of a few long ones",
    )
    # None stands for stop, so that runs from before this setting existed can be resumed.
    leakage: str | None = setting(  # type: ignore[assignment]
        None,
        "training text that is also validation or test text: stop (the default), drop (leave out its documents) or "
        "allow",
    )
    # None stands for stop, as above.
    on_corrupt: str | None = setting(
        None,
        "rows and ends of files that cannot be read: stop (the default), or skip (leave them out, and count them)",
    )
    prepare_workers: int | None = setting(
        None, "processes that tokenise the corpus, with the same result; default: one for each processor"
    )
    text_column: str = fact("text", "column that holds the text (.jsonl, .csv, .tsv, .parquet, .arrow, Hub)")
    sample_by: str = fact("document", "make one document of each .txt file ('document') or of each 'line'")
    tokenizer: str = setting(
        "byte_bpe",
        "byte_bpe, unigram, wordpiece, bytes, char, word or uncased_word: train one on the training text (of a large "
        "one on 100 MB from all of it); or folder or Hub id of a finished one",
    )
    vocab_size: int = setting(4096, "tokens of a tokenizer to be trained, at most")
    context_length: int = setting(256, "tokens per row")
    # None stands for cut, as above.
    packing: str | None = setting(
        None,
        "how documents become training rows: cut (the default: laid end to end, without padding) or best_fit (whole "
        "where they fit into a row, with some padding)",
    )
    corpus_dir: str | None = setting(None, "folder for the tokenised text; default: <output_dir>/corpus")

    free_keys: ClassVar[frozenset[str]] = SourceArguments.free_keys | {"corpus_dir", "prepare_workers"}

    def __post_init__(self) -> None:
        self.check_layout()
        if self.leakage not in (None, *LEAKAGE):
            raise UserError(f"leakage={self.leakage!r} is unknown; choose one of {', '.join(LEAKAGE)}")
        if self.on_corrupt not in (None, *ON_CORRUPT):
            raise UserError(f"on_corrupt={self.on_corrupt!r} is unknown; choose one of {', '.join(ON_CORRUPT)}")
        if self.prepare_workers is not None and self.prepare_workers < 0:
            raise UserError(f"prepare_workers={self.prepare_workers} must be 0 (no other process) or more")
        if self.validation_fraction is not None and not 0 < self.validation_fraction < 1:
            raise UserError(f"validation_fraction={self.validation_fraction} is not a share; choose between 0 and 1")
        if self.packing not in (None, *PACKINGS):
            raise UserError(f"packing={self.packing!r} is unknown; choose one of {', '.join(PACKINGS)}")
        if self.context_length < 1:
            raise UserError(f"context_length={self.context_length} must be at least 1 token")
        if self.corpora is not None:
            self._check_corpora()

    def _check_corpora(self) -> None:
        self.corpora = [to_text(corpus) for corpus in read_corpora(self.corpora or [])]
        for name in ("dataset", "train_file"):
            if (value := getattr(self, name)) is not None:
                raise UserError(
                    f"corpora and {name}={value} both name the training text; leave one of them out "
                    f'({name} may be an item of corpora: {{"path": ...}})'
                )

    @property
    def named_corpora(self) -> dict[str, Corpus]:
        """The items of `corpora`, each with a short name."""
        items = read_corpora(self.corpora) if self.corpora else []
        return dict(zip(share_names([item.path for item in items]), items, strict=True))

    @property
    def is_mixture(self) -> bool:
        """Whether rows come in an order that weights or repeats decide."""
        items = list(self.named_corpora.values())
        return len(items) > 1 or any(item.repeat is not None for item in items)

    def settings_that_change(self, metric: str) -> dict[str, str]:
        return {
            **dict.fromkeys(("text_column", "sample_by", "on_corrupt"), "decides which texts are measured"),
            **dict.fromkeys(
                ("tokenizer", "vocab_size"), f"decides what a token is, and {metric} is a mean over tokens"
            ),
            "context_length": "decides how much text the model has to go by where it is measured",
        }

    @property
    def longest_row(self) -> int:
        """Tokens of the longest row that the model reads."""
        return self.context_length
