"""Speech recognition: what is said in a recording, by CTC.  Word and character error rates over whole splits."""

import bisect
import json
import tempfile
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import jiwer
import numpy as np
import torch
from datasets import Dataset
from transformers import AutoModelForCTC, AutoTokenizer, Wav2Vec2CTCTokenizer, Wav2Vec2Processor

from bmtk.data.labels import some
from bmtk.data.media import ON_CORRUPT
from bmtk.data.tables import check_column
from bmtk.metrics.texts import error_rates
from bmtk.settings import setting

from .ctc import best_path, positions_needed, prefix_beam_search, row_losses
from .recordings import RecordingArguments, RecordingRows, RecordingTask
from .task import DataArguments, Prediction, mean_loss, spread_and_worst

BLANK, UNKNOWN, SPACE = "<pad>", "<unk>", "|"
CASES: dict[str, Callable[[str], str]] = {"lower": str.lower, "upper": str.upper, "keep": str}
DECODINGS = ("greedy", "beam")
APOSTROPHES = "'\u2019"
TOKEN_UNITS = ("characters", "words")


@dataclass
class SpeechRecognitionArguments(RecordingArguments, DataArguments):
    """Which recordings and transcriptions, and how the one becomes the other."""

    _argument_group_name = "data of speech_recognition"

    transcription_column: str = setting("transcription", "column of what is said")
    text_case: str = setting("lower", "letters of the transcriptions: lower, upper, or keep them as they are")
    keep_punctuation: bool = setting(False, "leave punctuation and symbols in transcriptions; apostrophes stay")
    token_unit: str = setting("characters", "what a new model writes: characters, or words of its training rows")
    too_short_recordings: str = setting(
        "stop",
        "recordings with fewer positions than their tokens need: stop; or skip: not trained on, and when measured "
        "they count in the error rates but not in the loss",
    )
    decoding: str = setting("greedy", "greedy: the likeliest token at each position; beam: the likeliest text")
    beam_width: int = setting(16, "beginnings of a text that decoding=beam pursues")

    def __post_init__(self):
        super().__post_init__()
        self.check_recordings()
        choices = {"text_case": CASES, "token_unit": TOKEN_UNITS, "decoding": DECODINGS}
        for name, allowed in {**choices, "too_short_recordings": ON_CORRUPT}.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r} is unknown; choose one of {', '.join(allowed)}")
        if self.beam_width < 1:
            raise ValueError(f"beam_width={self.beam_width} must be at least 1")


class SpeechRecognition(RecordingTask):
    """Recordings and their transcriptions.  The loss is the negative log-likelihood of a token, in nats."""

    name = "speech_recognition"
    about: ClassVar[dict[str, str]] = {
        "pipeline_tag": "automatic-speech-recognition",
        "auto_class": "AutoModelForCTC",
        "processor_class": "AutoProcessor",
        "noun": "speech recogniser",
        "loss_unit": "nats per token",
        "limits": "It writes only the characters or words of its training transcriptions, and something for every "
        "recording, speech or not. Expect more errors on other voices, microphones and subjects.",
    }
    arguments = SpeechRecognitionArguments
    auto_class = AutoModelForCTC
    metrics = ("loss", "wer", "cer", "exact_match")
    main_metric = "wer"
    free_keys = RecordingTask.free_keys | {"decoding", "beam_width"}

    @classmethod
    def incomparable(cls, args: SpeechRecognitionArguments, metric: str) -> dict[str, str]:
        names = ("transcription_column", "text_case", "keep_punctuation")
        of_loss = {"token_unit": "decides what a token is, and loss is a mean over tokens"} if metric == "loss" else {}
        return {**dict.fromkeys(names, "decides what is said"), **of_loss}

    # ------------------------------------------------------------------------------------------------ rows

    def read_rows(self, table: Dataset, where: str, *, labelled: bool) -> Dataset | None:
        """Columns "audio" (undecoded), "seconds" and "text"; rows without a transcription are left out."""
        if not labelled:
            return self.read_recordings(table, where, labelled=False)[0]
        column = self.args.transcription_column
        check_column(table, column, option="transcription_column", where=where)
        texts = [self.normalised("" if text is None else str(text)) for text in table[column]]
        with_text = [row for row, text in enumerate(texts) if text]
        if not with_text:
            raise ValueError(f"transcription_column={column!r} of the {where} data holds no text at all")
        rows, kept = self.read_recordings(table, where, labelled=True)
        rows = rows.add_column("text", [texts[row] for row in kept])
        chosen = [index for index, row in enumerate(kept) if texts[row]]
        if len(chosen) < len(kept):
            count = len(kept) - len(chosen)
            self.notes.append(f"{count:,} of {len(kept):,} {where} rows have no transcription: left out")
        return rows.select(chosen)

    def normalised(self, text: str) -> str:
        """One space between words, none at the ends; letters and punctuation as the settings say."""
        text = unicodedata.normalize("NFC", text).replace(SPACE, " ")
        if not self.args.keep_punctuation:
            text = "".join(" " if _is_punctuation(character) else character for character in text)
        return " ".join(CASES[self.args.text_case](text).split())

    def prepare(self) -> None:
        """Find the tokenizer: the model's own, or one made of the training transcriptions."""
        super().prepare()
        self.tokenizer = self._tokenizer()
        vocabulary = self.tokenizer.get_vocab()
        special = set(self.tokenizer.all_special_tokens)
        self.ids = {token: index for token, index in vocabulary.items() if token not in special}
        self.blank = self.tokenizer.pad_token_id

    def _tokenizer(self):
        is_folder = self.model is not None and Path(self.model).is_dir()
        has_tokens = not is_folder or (Path(self.model) / "tokenizer_config.json").is_file()
        self.makes_tokens = self.model is None or not has_tokens
        if not self.makes_tokens:
            return AutoTokenizer.from_pretrained(self.model, **self.loading)
        if "train" not in self.rows:
            raise ValueError("the tokens of a recogniser are found in training rows; name a trained model with model")
        texts = self.rows["train"]["text"]
        if self.args.token_unit == "words":  # a word's token ends in the space after it
            return ctc_tokenizer(sorted({f"{word} " for text in texts for word in text.split()}))
        return ctc_tokenizer(sorted({character for text in texts for character in text} - {" "}))

    @property
    def processor(self) -> Wav2Vec2Processor:
        """Saved with the model: feature extractor and tokenizer."""
        return Wav2Vec2Processor(self.extractor, self.tokenizer)

    @property
    def config_fields(self) -> dict[str, object]:
        return {**super().config_fields, "vocab_size": len(self.tokenizer), "pad_token_id": self.blank}

    def configure(self, config, **options) -> None:
        """Write the tokens into `config`, and see which recordings are too short for their labels."""
        config.pad_token_id = self.blank
        if self.makes_tokens or len(self.tokenizer) > config.vocab_size:
            config.vocab_size = len(self.tokenizer)
        with torch.device("meta"):
            self.num_positions = self.auto_class.from_config(config)._get_feat_extract_output_lengths
        super().configure(config)

    # ------------------------------------------------------------------------------------------------ labels

    def label_ids(self, text: str) -> list[int]:
        """Tokens of a text; the unknown token for what the tokenizer does not have."""
        unknown = self.tokenizer.unk_token_id
        if self._writes_words():
            return [self.ids.get(f"{word} ", unknown) for word in text.split()]
        delimiter = self.tokenizer.convert_tokens_to_ids(SPACE)
        return [delimiter if character == " " else self.ids.get(character, unknown) for character in text]

    def _writes_words(self) -> bool:
        return any(token.endswith(" ") for token in self.ids)

    def encode(self, rows: Dataset, where: str) -> RecordingRows:
        if "text" not in rows.column_names:
            return self.rows_of(rows, where)
        labels = [self.label_ids(text) for text in rows["text"]]
        self._say_what_is_unknown(rows["text"], labels, where)
        short = self._too_short(labels, rows["seconds"], where)
        texts = rows["text"]
        rows = rows.remove_columns("text").add_column("labels", labels)
        if short and where == "train":
            kept = np.setdiff1d(np.arange(len(rows)), short)
            if not len(kept):
                raise ValueError("all training recordings are too short for their transcriptions")
            rows, texts = rows.select(kept), [texts[row] for row in kept]
        encoded = self.rows_of(rows, where)
        encoded.texts = list(texts)
        return encoded

    def _say_what_is_unknown(self, texts: Sequence[str], labels: list[list[int]], where: str) -> None:
        unknown = self.tokenizer.unk_token_id
        rows = [row for row, ids in enumerate(labels) if unknown in ids]
        if rows:
            parts = [texts[row].split() if self._writes_words() else texts[row].replace(" ", "") for row in rows]
            ends = " " if self._writes_words() else ""
            found = {part for parts_of_row in parts for part in parts_of_row if part + ends not in self.ids}
            what = "words" if self._writes_words() else "characters"
            self.notes.append(f"{len(rows):,} {where} rows hold {what} that the model cannot write: {some(found)}")

    def _too_short(self, labels: list[list[int]], seconds: Sequence[float], where: str) -> list[int]:
        """Rows whose labels need more positions than the recording has.  Raises: ValueError if these are to stop."""
        rate, found, example = self.extractor.sampling_rate, [], ""
        needs = [positions_needed(ids) for ids in labels]
        shortest = {needed: self._samples_for(needed) for needed in set(needs)}
        for row, (ids, needed, duration) in enumerate(zip(labels, needs, seconds, strict=True)):
            samples = int(duration * rate + 1e-6)
            if samples < shortest[needed]:
                found.append(row)
                example = example or (
                    f"row {row + 1}, {duration:.2f} s, gives {self._positions_of(samples)} positions to {len(ids)} "
                    f"tokens, which need {needed}"
                )
        if not found:
            return []
        said = f"{len(found):,} of {len(labels):,} {where} recordings are too short for their labels ({example})"
        if self.args.too_short_recordings == "stop":
            raise ValueError(
                f"{said}; too_short_recordings=skip leaves them out of training and of the loss, a smaller hop_ms or "
                "token_unit=words makes them fit"
            )
        how = "left out of training" if where == "train" else "they count in the error rates, not in the loss"
        self.notes.append(f"{said}: {how}")
        return found

    def _positions_of(self, samples: int) -> int:
        name = self.extractor.model_input_names[0]
        found = self.extractor(np.zeros(max(1, samples), np.float32), sampling_rate=self.extractor.sampling_rate)
        return int(self.num_positions(torch.tensor(len(found[name][0]))))

    def _samples_for(self, positions: int) -> int:
        """The shortest recording that gives so many positions; looked for, since extractors round as they like."""
        last = self.extractor.sampling_rate // 10
        while self._positions_of(last) < positions:
            last *= 2
        return bisect.bisect_left(range(last + 1), positions, key=self._positions_of)

    def collator(self):
        def collate(rows: list[dict]) -> dict[str, torch.Tensor]:
            batch = self.padded(rows)
            if "labels" in rows[0]:
                labels = [torch.tensor(row["labels"]) for row in rows]
                batch["labels"] = torch.nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=-100)
            return batch

        return collate

    # ------------------------------------------------------------------------------------------------ training

    @staticmethod
    def num_items(batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Tokens."""
        return (batch["labels"] != -100).sum()

    def criterion(self, outputs, batch: Mapping[str, torch.Tensor], *, label_smoothing: float = 0.0) -> torch.Tensor:
        """Losses of a batch, summed; computed here because the CTC heads of transformers divide in ways of their own.

        A row that became too short (by speed_change or time_shift) has no path, and gives no gradient.
        """
        if label_smoothing:
            raise ValueError(f"label_smoothing_factor={label_smoothing} has no effect on CTC; leave it out")
        losses = row_losses(outputs["logits"], self.lengths(outputs["logits"], batch), batch["labels"], self.blank)
        return losses[losses.isfinite() | losses.isnan()].sum()

    def lengths(self, logits: torch.Tensor, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Positions (B,) that are not padding."""
        if "attention_mask" not in batch:
            return torch.full((len(logits),), logits.shape[1], device=logits.device)
        return self.num_positions(batch["attention_mask"].long().sum(-1))

    # ------------------------------------------------------------------------------------------------ results

    def predict(self, model, batch: dict[str, torch.Tensor]) -> list[Prediction]:
        logits = model(**{name: value for name, value in batch.items() if name != "labels"})["logits"].float()
        lengths = self.lengths(logits, batch)
        scores = logits.log_softmax(-1).cpu().numpy()
        predictions = [
            {"text": self.decode(row[:length])} for row, length in zip(scores, lengths.tolist(), strict=True)
        ]
        if "labels" in batch:
            losses = row_losses(logits, lengths, batch["labels"], self.blank)
            sizes = (batch["labels"] != -100).sum(-1).tolist()
            for prediction, loss, size in zip(predictions, losses.tolist(), sizes, strict=True):
                fits = loss != float("inf")
                prediction |= {"loss": loss if fits else 0.0, "items": size if fits else 0}
        return predictions

    def decode(self, log_probabilities: np.ndarray) -> str:
        """The text of one row (L, V)."""
        if self.args.decoding == "greedy":
            labels = best_path(log_probabilities, self.blank)
        else:
            labels, _ = prefix_beam_search(log_probabilities, self.blank, self.args.beam_width)
        path = [token for label in labels for token in (label, self.blank)]  # what a CTC tokenizer makes a text of
        return " ".join(self.tokenizer.decode(path).split())

    def score(self, predictions: Sequence[Prediction], rows: RecordingRows) -> dict[str, float]:
        """Error rates are edits over the length of what was said, summed over all rows."""
        said, heard = rows.texts, [p["text"] for p in predictions]
        return {
            "loss": mean_loss(predictions),
            **error_rates(said, heard),
        }

    def describe(self, prediction: Prediction) -> dict[str, object]:
        return {"prediction": prediction["text"]}

    def samples(self, predictions: Sequence[Prediction], rows: RecordingRows, count: int = 4) -> list[dict[str, str]]:
        chosen = [(rows.texts[row], predictions[row]["text"]) for row in spread_and_worst(predictions, count)]
        return [{"prompt": said, "text": f" -> {heard or '(nothing)'}"} for said, heard in chosen]

    def figures(self, predictions: Sequence[Prediction], rows: RecordingRows) -> list[dict[str, str]]:
        """The recordings with the highest character error rates; those with the largest loss, where they agree."""
        rates = [jiwer.cer(said, p["text"]) for said, p in zip(rows.texts, predictions, strict=True)]
        worst = sorted(range(len(rates)), key=lambda row: (-rates[row], -predictions[row]["loss"]))
        said = [{**p, "said": text} for p, text in zip(predictions, rows.texts, strict=True)]
        return self.shown_recordings(rows, worst, said)

    @staticmethod
    def verdict(prediction: Prediction) -> str:
        return f"“{prediction['said']}” heard as “{prediction['text']}”"

    def table(self, predictions: Sequence[Prediction], rows: RecordingRows) -> str:
        """Words by what became of them."""
        found = jiwer.process_words(rows.texts, [p["text"] for p in predictions])
        counts = {"right": found.hits, "changed": found.substitutions, "missing": found.deletions}
        counts["too many"] = found.insertions
        return "  words: " + ", ".join(f"{count:,} {what}" for what, count in counts.items())

    def facts(self) -> dict[str, object]:
        return {**super().facts(), "tokens": list(self.ids)}


def ctc_tokenizer(tokens: Sequence[str]) -> Wav2Vec2CTCTokenizer:
    """Blank, unknown, space and `tokens`, with these ids; text without blanks and repetitions is what it decodes."""
    vocabulary = {token: index for index, token in enumerate([BLANK, UNKNOWN, SPACE, *tokens])}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "vocab.json"
        path.write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
        special = {"pad_token": BLANK, "unk_token": UNKNOWN, "word_delimiter_token": SPACE}
        return Wav2Vec2CTCTokenizer(str(path), bos_token=None, eos_token=None, **special)


def _is_punctuation(character: str) -> bool:
    return unicodedata.category(character)[0] in "PS" and character not in APOSTROPHES
