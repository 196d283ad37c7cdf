"""Translation: a text is read, another is written.  BLEU and chrF of sacrebleu; loss in nats per token of the target.

B rows, S source positions, L target positions, V tokens.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForSeq2SeqLM, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from bmtk.data.columns import cells
from bmtk.data.packing import IGNORE_INDEX
from bmtk.data.tables import TextColumn, encoded_rows, text_rows
from bmtk.errors import UserError
from bmtk.metrics.texts import perplexity, sentence_chrf, translation_scores
from bmtk.settings import fact, setting

from .figures import sentence_scores
from .objective import python_command
from .scorer import Scorer, mean_loss, spread_and_worst
from .task import Criterion, Prediction, Task
from .task_data import DataArguments, SourceArguments
from .texts import TextArguments, TextData, TextObjective

TOKENIZERS = ("13a", "zh", "char", "intl", "none")  # of sacrebleu; how it cuts texts into words before it counts them
CUT_BY = {"zh": "zh", "ja": "char", "th": "char"}  # languages without spaces
LENGTHS = ((0, 10), (10, 20), (20, 40), (40, 10**9))  # tokens of a source: where the table is divided


@dataclass
class TranslationArguments(TextArguments, DataArguments):
    """Which texts, and how a translation is searched for."""

    _argument_group_name = "data of translation"

    source_language: str | None = fact(None, "key of the texts that are read, in translation_column: de, en, ...")
    target_language: str | None = fact(None, "key of the texts that are written; columns may be named so, too")
    translation_column: str = fact("translation", 'column of the pairs: {"de": ..., "en": ...}')
    source_column: str | None = fact(None, "column of the texts that are read; over source_language")
    target_column: str | None = fact(None, "column of the texts that are written; over target_language")
    prefix: str = setting("", "text put before every source, such as T5's 'translate English to German: '")
    lower_case: bool = setting(False, "read and write lower case; BLEU and chrF then ignore case")
    max_target_length: int | None = setting(None, "tokens written per text, at most; default: the model's limit")
    num_beams: int = setting(5, "hypotheses that are kept at each token; 1: the likeliest token is taken")
    length_penalty: float = setting(1.0, "beams are ranked by log-probability / tokens ** length_penalty")
    preview_beams: int = setting(1, "num_beams of evaluations while training")
    preview_rows: int | None = setting(
        None, "validation rows of evaluations while training, the first ones; None: all"
    )
    bleu_tokenizer: str | None = fact(None, "how BLEU cuts words: 13a, zh, char, intl, none; default: by language")

    free_keys = SourceArguments.free_keys | {"num_beams", "length_penalty", "bleu_tokenizer"}

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_lengths()
        counts = ("max_target_length", "num_beams", "preview_beams", "preview_rows")
        given = {name: getattr(self, name) for name in counts}
        if wrong := [f"{name}={count}" for name, count in given.items() if count is not None and count < 1]:
            raise UserError(f"{', '.join(wrong)} must be at least 1")
        if self.bleu_tokenizer not in (None, *TOKENIZERS):
            raise UserError(
                f"bleu_tokenizer={self.bleu_tokenizer!r} is unknown; choose one of {', '.join(TOKENIZERS)}"
            )

    def settings_that_change(self, metric: str) -> dict[str, str]:
        """BLEU and chrF are of whole texts, whatever the tokens; the number of beams is part of the model."""
        references = ("translation_column", "target_language", "target_column", "lower_case")
        previews = dict.fromkeys(("preview_rows", "preview_beams"), "decides how trials are measured before their end")
        found = {
            **super().settings_that_change(metric),
            **dict.fromkeys(references, "decides what the references are"),
            **previews,
        }
        if metric in ("loss", "perplexity"):
            tokens = ("tokenizer", "vocab_size", "max_target_length")
            return found | dict.fromkeys(
                tokens, f"decides what a token is, or counts, and {metric} is a mean over tokens"
            )
        return {**found, "bleu_tokenizer": "decides what BLEU counts as a word"}


@dataclass(frozen=True)
class PadPairs:
    """Pads sources and targets; the decoder reads the target one to the right, after `start_id`.

    >>> batch = PadPairs(pad_id=0, start_id=0)([{"input_ids": [5, 6], "labels": [7, 8, 0]}, {"input_ids": [9],
    ...                                          "labels": [7, 0]}])
    >>> batch["labels"].tolist(), batch["decoder_input_ids"].tolist()
    ([[7, 8, 0], [7, 0, -100]], [[0, 7, 8], [0, 7, 0]])
    """

    pad_id: int
    start_id: int

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        sources = [torch.tensor(row["input_ids"]) for row in rows]
        batch = {
            "input_ids": pad_sequence(sources, batch_first=True, padding_value=self.pad_id),
            "attention_mask": pad_sequence([torch.ones_like(source) for source in sources], batch_first=True),
        }
        if "labels" in rows[0]:
            targets = [torch.tensor(row["labels"]) for row in rows]
            batch["labels"] = pad_sequence(targets, batch_first=True, padding_value=IGNORE_INDEX)
            written = pad_sequence([target[:-1] for target in targets], batch_first=True, padding_value=self.pad_id)
            batch["decoder_input_ids"] = F.pad(written, (1, 0), value=self.start_id)
        return batch


@dataclass(frozen=True)
class PairEncoder:
    """A batch of sources, and targets if there are any, as tokens of at most `longest` and `longest_target`.

    "length" is that of both together, "whole" and "whole_target" are the lengths before they are cut.
    """

    tokenizer: PreTrainedTokenizerBase
    prefix: str
    lower_case: bool
    longest: int
    longest_target: int

    def __call__(self, batch: dict[str, list[str]]) -> dict[str, list[Any]]:
        sources = self._token_ids([self.prefix + text for text in batch["source"]])
        cut = self._cut(sources, self.longest)
        lengths, wholes = list(map(len, cut)), list(map(len, sources))
        encoded: dict[str, list[Any]] = {"input_ids": cut, "whole": wholes, "length": lengths}
        if "target" in batch:
            targets = self._token_ids(batch["target"], as_target=True)
            encoded["labels"] = self._cut(targets, self.longest_target)
            encoded["whole_target"] = list(map(len, targets))
            encoded["length"] = [len(s) + len(t) for s, t in zip(cut, encoded["labels"], strict=True)]
        return encoded

    def _token_ids(self, texts: list[str], *, as_target: bool = False) -> list[list[int]]:
        """Tokens of whole texts, each with the end token, which not every tokenizer adds."""
        texts = [text.lower() for text in texts] if self.lower_case else texts
        ids = self.tokenizer(**{"text_target" if as_target else "text": texts}, verbose=False)["input_ids"]
        end = [] if self.tokenizer.eos_token_id is None else [self.tokenizer.eos_token_id]
        return [row if row[-1:] == end else row + end for row in ids]

    @staticmethod
    def _cut(rows: list[list[int]], longest: int) -> list[list[int]]:
        """Rows of at most `longest` tokens; those that are cut keep their end token."""
        return [row if len(row) <= longest else row[: longest - 1] + row[-1:] for row in rows]


class TranslationData(TextData):
    """Columns "source" and "target", which rows to be predicted lack.

    A tokenizer that is trained here serves both sides and has one special token: it ends every source and target, is
    the first token that the decoder reads, and pads.  That does no harm: attention mask and IGNORE_INDEX mark padding.
    """

    inputs = ("source",)

    def read_rows(self, table: Dataset, where: str, *, labelled: bool) -> Dataset:
        """Rows without a text on either side are left out, but not of those to be predicted."""
        sides = ("source", "target") if labelled else ("source",)
        columns = {side: self._column(table, where, side) for side in sides}
        # The texts of a column of pairs become columns of their own; nothing is copied.
        rows = text_rows(table.flatten(), columns, where=where)
        for side, (_, option, _) in columns.items() if labelled else ():
            rows = self.keep_rows_with_text(rows, cells(rows, side), option=option, where=where)
        return rows

    def _column(self, table: Dataset, where: str, side: str) -> TextColumn:
        """The texts of a side, which have a column of their own or are under their language in a column of pairs."""
        pairs, column, language = (
            getattr(self.args, name) for name in ("translation_column", f"{side}_column", f"{side}_language")
        )
        if not (column or language):
            raise UserError(
                f"{side}_language and {side}_column are not set: name the language of the {side} in "
                f"{pairs!r}, or the column that holds it; the {where} data has {', '.join(table.column_names)}"
            )
        if column or pairs not in table.column_names:
            option = f"{side}_column" if column else f"{side}_language"
            return TextColumn(column or language, option)
        languages = table.features[pairs]
        if not isinstance(languages, dict) or language not in languages:
            found = ", ".join(languages) if isinstance(languages, dict) else f"no pairs but {languages}"
            raise UserError(f"{side}_language={language!r} is not in {pairs!r} of the {where} data: it has {found}")
        return TextColumn(f"{pairs}.{language}", f"{side}_language", language)

    @property
    def tokenizer_options(self) -> dict[str, bool]:  # type: ignore[override]  # the settings decide
        return {"lower_case": self.args.lower_case, "adds_end": True}

    def training_texts(self) -> Iterable[str]:
        return chain(cells(self.rows["train"], "source"), cells(self.rows["train"], "target"))

    @property
    def config_fields(self) -> dict[str, object]:
        pad = self.tokenizer.pad_token_id
        ends = {"pad_token_id": pad, "decoder_start_token_id": pad}
        return {**super().config_fields, **ends, "is_encoder_decoder": True}


class TranslationObjective(TextObjective):
    """Sources become `input_ids`, targets `labels`; the loss is over the tokens of the target."""

    data: TranslationData

    def __init__(self, data: TranslationData, config: PreTrainedConfig, *, labels: Sequence[str] = ()):
        if not config.is_encoder_decoder:
            raise UserError(
                f"{data.model or 'the model'} reads and writes one row (model_type {config.model_type}, "
                "is_encoder_decoder=False); translation needs an encoder-decoder"
            )
        super().__init__(data, config, labels=labels)
        self.longest_target = self.longest_of("max_target_length")
        if config.decoder_start_token_id is None:
            config.decoder_start_token_id = config.pad_token_id
        self.start_id: int = config.decoder_start_token_id
        self.signatures: dict[str, str] = {}  # metric -> how sacrebleu computed it in the last `score`

    def encode_splits(self) -> None:
        super().encode_splits()
        if "train" in self.rows and "validation" in self.rows:
            rows, beams = self.args.preview_rows, self.args.preview_beams
            which = f"the first {rows:,}" if rows and rows < len(self.rows["validation"]) else "all"
            self.notes.append(
                f"evaluations while training translate {which} validation rows with num_beams={beams}, those in the "
                f"end all rows with num_beams={self.args.num_beams}"
            )

    def encode(self, rows: Dataset, where: str) -> Dataset:
        """Adds `input_ids` (with the end token), `labels` (likewise) and their `length` together."""

        args = self.args
        encoder = PairEncoder(self.tokenizer, args.prefix, args.lower_case, self.longest, self.longest_target)
        encoded = encoded_rows(rows, encoder)
        self.note_cut_texts(encoded["whole"], f"{where} source")
        if "target" in rows.column_names:
            self.note_cut_texts(encoded["whole_target"], f"{where} target", self.longest_target)
        return encoded.remove_columns([name for name in ("whole", "whole_target") if name in encoded.column_names])

    def collator(self) -> Callable[[list[dict[str, Any]]], dict[str, Any]]:
        return PadPairs(pad_id=self.tokenizer.pad_token_id, start_id=self.start_id)

    def num_items(self, batch: Mapping[str, Any]) -> torch.Tensor:
        """Predicted tokens of a batch."""
        labels: torch.Tensor = batch["labels"]
        return (labels != IGNORE_INDEX).sum()

    def num_units(self, batch: Mapping[str, Any]) -> int:
        return int(batch["attention_mask"].sum() + self.num_items(batch))

    @property
    def criterion(self) -> Criterion:
        return self._criterion

    def _criterion(
        self, outputs: Mapping[str, torch.Tensor], batch: Mapping[str, Any], *, label_smoothing: float = 0.0
    ) -> torch.Tensor:
        """Summed cross-entropy of the target's tokens.  Smoothing: Szegedy et al. 2016, arXiv:1512.00567, sec. 7."""
        logits = outputs["logits"].flatten(0, 1).float()
        return F.cross_entropy(
            logits,
            batch["labels"].flatten(),
            ignore_index=IGNORE_INDEX,
            reduction="sum",
            label_smoothing=label_smoothing,
        )

    def preview_rows(self) -> Dataset | None:
        rows = super().preview_rows()
        return rows if rows is None else rows.select(range(min(len(rows), self.args.preview_rows or len(rows))))

    def prepare_to_save(self, model: PreTrainedModel) -> None:
        """Let `generate()` search as the evaluation does."""
        model.generation_config.update(**self.search_options(self.args.num_beams))

    def search_options(self, num_beams: int) -> dict[str, Any]:
        """Arguments of `generate()`.  Length penalty: a power of the length, not the formula of Wu et al. 2016."""
        options = {"max_new_tokens": self.longest_target, "num_beams": num_beams, "do_sample": False}
        return {**options, "length_penalty": self.args.length_penalty} if num_beams > 1 else options

    def data_record(self) -> dict[str, object]:
        languages = {name: getattr(self.args, name) for name in ("source_language", "target_language")}
        return {**super().data_record(), **languages, "signatures": self.signatures}

    def next_command(self, directory: Path) -> str:
        """transformers 5 has no pipeline that translates; `generate()` searches as `prepare_to_save` sets it."""
        if (directory / "adapter_config.json").is_file():
            return super().next_command(directory)
        folder = str(directory)
        return python_command(
            "import bmtk; from transformers import AutoModelForSeq2SeqLM as M, AutoTokenizer as T; "
            f"t, m = T.from_pretrained({folder!r}), M.from_pretrained({folder!r}); "
            f"print(t.batch_decode(m.generate(**t([{self.example_input()}], return_tensors='pt')), "
            "skip_special_tokens=True))"
        )

    def example_input(self) -> str:
        """A source of the data that no shell would take apart."""
        rows = self.rows.get("test", self.rows.get("validation"))
        sources = chain([] if rows is None else rows["source"], ["A text of your own."])
        plain = next(text for text in sources if not set(text) & set("\"'`$\\!\n"))
        return f"'{self.args.prefix}{plain}'"

    def _num_tokens(self, split: str) -> int:
        return sum(self.rows[split]["length"])


class TranslationScorer(Scorer):
    """BLEU and chrF of whole splits."""

    objective: TranslationObjective

    metrics = ("loss", "perplexity", "bleu", "chrf")

    def predict(self, model: torch.nn.Module, batch: Mapping[str, Any]) -> list[Prediction]:
        return self._translate(model, batch, self.objective.args.num_beams)

    def preview(self, model: torch.nn.Module, batch: Mapping[str, Any]) -> list[Prediction]:
        return self._translate(model, batch, self.objective.args.preview_beams)

    def _translate(self, model: Any, batch: Mapping[str, Any], num_beams: int) -> list[Prediction]:
        source = {name: batch[name] for name in ("input_ids", "attention_mask")}
        written = model.generate(**source, **self.objective.search_options(num_beams))
        texts = self.objective.tokenizer.batch_decode(written, skip_special_tokens=True)
        predictions: list[Prediction] = [{"text": text.strip()} for text in texts]
        if "labels" in batch:
            labels = batch["labels"]
            logits = model(**source, decoder_input_ids=batch["decoder_input_ids"])["logits"].float()
            of_tokens = F.cross_entropy(logits.mT, labels, ignore_index=IGNORE_INDEX, reduction="none")
            losses, items = of_tokens.sum(1).tolist(), (labels != IGNORE_INDEX).sum(1).tolist()
            for prediction, loss, count in zip(predictions, losses, items, strict=True):
                prediction |= {"loss": loss, "items": count}
        return predictions

    def score(self, predictions: Sequence[Prediction], rows: Dataset) -> dict[str, float]:
        loss, args = mean_loss(predictions), self.objective.args
        cut = args.bleu_tokenizer or CUT_BY.get((args.target_language or "")[:2], "13a")
        scores, self.objective.signatures = translation_scores(
            [p["text"] for p in predictions], rows["target"], tokenizer=cut, lower_case=args.lower_case
        )
        return {"loss": loss, "perplexity": perplexity(loss), **scores}

    def describe(self, prediction: Prediction) -> dict[str, object]:
        return {"prediction": prediction["text"]}

    def samples(self, predictions: Sequence[Prediction], rows: Dataset, count: int = 4) -> list[dict[str, str]]:
        """From all over, then those with the lowest chrF."""
        by_chrf = [{"loss": -score} for score in self._sentence_chrf(predictions, rows)]
        return [
            {
                "prompt": rows[row]["source"],
                "text": f"\n -> {predictions[row]['text']}\n    (reference: {rows[row]['target']})",
            }
            for row in spread_and_worst(by_chrf, count)
        ]

    def figures(self, predictions: Sequence[Prediction], rows: Dataset) -> list[dict[str, str]]:
        return [sentence_scores(self._sentence_chrf(predictions, rows), list(map(len, rows["input_ids"])))]

    def table(self, predictions: Sequence[Prediction], rows: Dataset) -> str:
        """Rows, loss, BLEU and chrF by the length of the source."""
        lengths = np.array(list(map(len, rows["input_ids"])))
        lines = [f"  {'source tokens':<14}  {'rows':>7}    loss   BLEU   chrF"]
        for low, high in LENGTHS:
            some = np.flatnonzero((low < lengths) & (lengths <= high)).tolist()
            if len(some):
                score = self.score([predictions[row] for row in some], rows.select(some))
                span = f"{low + 1} to {high}" if high < LENGTHS[-1][1] else f"over {low}"
                lines.append(
                    f"  {span:<14}  {len(some):>7,}  {score['loss']:6.3f}  {score['bleu']:5.1f}  {score['chrf']:5.1f}"
                )
        return "\n".join(lines)

    def _sentence_chrf(self, predictions: Sequence[Prediction], rows: Dataset) -> list[float]:
        return sentence_chrf(
            [p["text"] for p in predictions], rows["target"], lower_case=self.objective.args.lower_case
        )


TASK = Task(
    name="translation",
    auto_class=AutoModelForSeq2SeqLM,
    about={
        "pipeline_tag": "translation",
        "auto_class": "AutoModelForSeq2SeqLM",
        "noun": "translator",
        "loss_unit": "nats per token",
        "limits": "It translates sentences like those it was trained on. It may leave out, add or invent things, the "
        "more so the longer a text and the rarer its words are.",
    },
    arguments=TranslationArguments,
    data=TranslationData,
    objective=TranslationObjective,
    scorer=TranslationScorer,
    main_metric="bleu",
    unit="tokens",
    peft_task_type="SEQ_2_SEQ_LM",
)
