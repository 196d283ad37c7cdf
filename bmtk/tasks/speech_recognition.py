"""Speech recognition: the words of a recording, by CTC.  Word and character error rates over whole splits."""

import bisect
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jiwer
import numpy as np
import torch
from datasets import Dataset
from transformers import AutoModelForCTC, AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase, Wav2Vec2Processor

from bmtk.data.columns import with_columns
from bmtk.data.labels import some
from bmtk.data.media import ON_CORRUPT
from bmtk.data.number_rows import NumberLists
from bmtk.data.packing import IGNORE_INDEX
from bmtk.data.tables import text_cells
from bmtk.errors import UserError
from bmtk.metrics.texts import error_rates
from bmtk.settings import fact, setting

from .ctc import best_path, positions_needed, prefix_beam_search, row_losses
from .ctc_tokens import SPACE, TOKEN_UNITS, CtcTokens, new_ctc_tokenizer
from .recordings import RecordingArguments, RecordingData, RecordingObjective, RecordingRows, worst_spectrograms
from .scorer import Scorer, mean_loss, spread_and_worst
from .task import Criterion, Prediction, Task
from .task_data import DataArguments, SourceArguments

CASES: dict[str, Callable[[str], str]] = {"lower": str.lower, "upper": str.upper, "keep": str}
DECODINGS = ("greedy", "beam")
APOSTROPHES = "'\u2019"


@dataclass
class SpeechRecognitionArguments(RecordingArguments, DataArguments):
    """Which recordings and transcriptions, and how the one becomes the other."""

    _argument_group_name = "data of speech_recognition"

    transcription_column: str = fact("transcription", "column of the transcription")
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

    free_keys = SourceArguments.free_keys | {"decoding", "beam_width"}

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_recordings()
        choices = {"text_case": CASES, "token_unit": TOKEN_UNITS, "decoding": DECODINGS}
        for name, allowed in {**choices, "too_short_recordings": ON_CORRUPT}.items():
            if getattr(self, name) not in allowed:
                raise UserError(f"{name}={getattr(self, name)!r} is unknown; choose one of {', '.join(allowed)}")
        if self.beam_width < 1:
            raise UserError(f"beam_width={self.beam_width} must be at least 1")

    def settings_that_change(self, metric: str) -> dict[str, str]:
        names = ("transcription_column", "text_case", "keep_punctuation")
        of_loss = {"token_unit": "decides what a token is, and loss is a mean over tokens"} if metric == "loss" else {}
        references = dict.fromkeys(names, "decides what the transcriptions are")
        return {**super().settings_that_change(metric), **references, **of_loss}


class SpeechRecognitionData(RecordingData):
    """Columns "audio" (undecoded), "seconds" and "text", which rows to be predicted lack."""

    def __init__(self, task: Task, args: SpeechRecognitionArguments, **reading: Any):
        super().__init__(task, args, **reading)
        is_folder = self.model is not None and Path(self.model).is_dir()
        has_tokens = not is_folder or (Path(str(self.model)) / "tokenizer_config.json").is_file()
        self.makes_tokens = self.model is None or not has_tokens
        self.tokens = CtcTokens(self._tokenizer())

    def read_rows(self, table: Dataset, where: str, *, labelled: bool) -> Dataset | None:
        """Rows without a transcription are left out."""
        if not labelled:
            return self.read_recordings(table, where, labelled=False)[0]
        column = self.args.transcription_column
        cells = text_cells(table, column, option="transcription_column", where=where)
        texts = [self.normalised(text) for text in cells]
        if not any(texts):
            raise UserError(f"transcription_column={column!r} of the {where} data holds no text at all")
        rows, kept = self.read_recordings(table, where, labelled=True)
        rows = with_columns(rows, {"text": [texts[row] for row in kept]})
        chosen = [index for index, row in enumerate(kept) if texts[row]]
        if len(chosen) < len(kept):
            count = len(kept) - len(chosen)
            self.notes.append(f"{count:,} of {len(kept):,} {where} rows have no transcription: left out")
        return rows.select(chosen)

    def normalised(self, text: str) -> str:
        """One space between words, none at the ends; letters and punctuation as the settings ask for."""
        text = unicodedata.normalize("NFC", text).replace(SPACE, " ")
        if not self.args.keep_punctuation:
            text = "".join(" " if _is_punctuation(character) else character for character in text)
        return " ".join(CASES[self.args.text_case](text).split())

    @property
    def config_fields(self) -> dict[str, object]:
        return {**super().config_fields, "vocab_size": len(self.tokens), "pad_token_id": self.tokens.blank}

    def _tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's own, or one made of the training transcriptions."""
        if not self.makes_tokens:
            return AutoTokenizer.from_pretrained(self.model, **self.loading)
        if "train" not in self.rows:
            raise UserError("the tokens of a recogniser are found in training rows; name a trained model with model")
        return new_ctc_tokenizer(self.rows["train"]["text"], unit=self.args.token_unit)


class SpeechRecognitionObjective(RecordingObjective):
    """Recordings become features, and their transcriptions `labels`.  Loss: nats per token, by CTC."""

    data: SpeechRecognitionData

    def __init__(self, data: SpeechRecognitionData, config: PreTrainedConfig, *, labels: Sequence[str] = ()):
        super().__init__(data, config, labels=labels)
        self.tokens = data.tokens
        config.pad_token_id = self.tokens.blank
        if data.makes_tokens or len(self.tokens) > config.vocab_size:
            config.vocab_size = len(self.tokens)
        with torch.device("meta"):  # only a model has the formula of its positions; weights are not needed
            model = self.auto_class.from_config(config)
        self.num_positions: Callable[[torch.Tensor], torch.Tensor] = model._get_feat_extract_output_lengths

    @property
    def processor(self) -> Wav2Vec2Processor:
        """Saved with the model: feature extractor and tokenizer."""
        return Wav2Vec2Processor(self.extractor, self.tokens.tokenizer)

    # ------------------------------------------------------------------------------------------------ rows

    def encode(self, rows: Dataset, where: str) -> RecordingRows:
        if "text" not in rows.column_names:
            return self.recording_rows(rows, where)
        labels = [self.tokens.encode(text) for text in rows["text"]]
        self._note_unknown(rows["text"], labels, where)
        short = self._too_short(labels, rows["seconds"], where)
        rows = with_columns(rows, {"labels": labels})
        if short and where == "train":
            kept = np.setdiff1d(np.arange(len(rows)), short)
            if not len(kept):
                raise UserError("all training recordings are too short for their transcriptions")
            rows = rows.select(kept)
        changes = self.args if where == "train" else None
        return TranscribedRows(rows, where, extractor=self.extractor, changes=changes, seed=self.data.seed)

    def _note_unknown(self, texts: Sequence[str], labels: list[list[int]], where: str) -> None:
        unknown = self.tokens.tokenizer.unk_token_id
        rows = [row for row, ids in enumerate(labels) if unknown in ids]
        if rows:
            found = some(self.tokens.unknown_parts(texts[row] for row in rows))
            self.notes.append(
                f"{len(rows):,} {where} rows hold {self.tokens.unit} that the model cannot write: {found}"
            )

    def _too_short(self, labels: list[list[int]], seconds: Sequence[float], where: str) -> list[int]:
        """Rows whose labels need more positions than the recording has.  Raises: UserError if these are to stop."""
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
        sentence = f"{len(found):,} of {len(labels):,} {where} recordings are too short for their labels ({example})"
        if self.args.too_short_recordings == "stop":
            raise UserError(
                f"{sentence}; too_short_recordings=skip leaves them out of training and of the loss, a smaller hop_ms "
                "or token_unit=words makes them fit"
            )
        how = "left out of training" if where == "train" else "they count in the error rates, not in the loss"
        self.notes.append(f"{sentence}: {how}")
        return found

    def _positions_of(self, samples: int) -> int:
        name = self.extractor.model_input_names[0]
        found = self.extractor(np.zeros(max(1, samples), np.float32), sampling_rate=self.extractor.sampling_rate)
        return int(self.num_positions(torch.tensor(len(found[name][0]))))

    def _samples_for(self, positions: int) -> int:
        """Length of the shortest recording with this many positions; searched, since each extractor rounds its own."""
        last = self.extractor.sampling_rate // 10
        while self._positions_of(last) < positions:
            last *= 2
        return bisect.bisect_left(range(last + 1), positions, key=self._positions_of)

    def collator(self) -> Callable[[list[dict[str, Any]]], dict[str, Any]]:
        def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
            batch = self.padded(rows)
            if "labels" in rows[0]:
                labels = NumberLists.of([row["labels"] for row in rows])
                batch["labels"] = torch.from_numpy(labels.padded(IGNORE_INDEX))
            return batch

        return collate

    # ------------------------------------------------------------------------------------------------ loss

    def num_items(self, batch: Mapping[str, Any]) -> torch.Tensor:
        """Tokens."""
        labels: torch.Tensor = batch["labels"]
        return (labels != IGNORE_INDEX).sum()

    @property
    def criterion(self) -> Criterion:
        return self._criterion

    def _criterion(
        self, outputs: Mapping[str, torch.Tensor], batch: Mapping[str, Any], *, label_smoothing: float = 0.0
    ) -> torch.Tensor:
        """Losses of a batch, summed; computed here because each CTC head of transformers divides by something else.

        A row that became too short (by speed_change or time_shift) has no path, and gives no gradient.
        """
        if label_smoothing:
            raise UserError(f"label_smoothing_factor={label_smoothing} has no effect on CTC; leave it out")
        lengths = self.lengths(outputs["logits"], batch)
        losses = row_losses(outputs["logits"], lengths, batch["labels"], self.tokens.blank)
        return losses[losses.isfinite() | losses.isnan()].sum()

    def lengths(self, logits: torch.Tensor, batch: Mapping[str, Any]) -> torch.Tensor:
        """Positions (B,) that are not padding."""
        if "attention_mask" not in batch:
            return torch.full((len(logits),), logits.shape[1], device=logits.device)
        return self.num_positions(batch["attention_mask"].long().sum(-1))

    def data_record(self) -> dict[str, object]:
        return {**super().data_record(), "tokens": list(self.tokens.ids)}


class TranscribedRows(RecordingRows):
    """Also `texts`, the transcription of each row."""

    def __init__(self, rows: Dataset, where: str, **options: Any):
        super().__init__(rows.remove_columns("text"), where, **options)
        self.texts = list(rows["text"])


class SpeechRecognitionScorer(Scorer):
    """Error rates of what was recognised, against the transcriptions."""

    objective: SpeechRecognitionObjective

    metrics = ("loss", "wer", "cer", "exact_match")

    def predict(self, model: torch.nn.Module, batch: Mapping[str, Any]) -> list[Prediction]:
        logits = model(**self.objective.inputs_of(batch))["logits"].float()
        lengths = self.objective.lengths(logits, batch)
        scores = logits.log_softmax(-1).cpu().numpy()
        predictions: list[Prediction] = [
            {"text": self.decode(row[:length])} for row, length in zip(scores, lengths.tolist(), strict=True)
        ]
        if "labels" in batch:
            losses = row_losses(logits, lengths, batch["labels"], self.objective.tokens.blank)
            sizes = (batch["labels"] != IGNORE_INDEX).sum(-1).tolist()
            for prediction, loss, size in zip(predictions, losses.tolist(), sizes, strict=True):
                fits = loss != float("inf")
                prediction |= {"loss": loss if fits else 0.0, "items": size if fits else 0}
        return predictions

    def decode(self, log_probabilities: np.ndarray) -> str:
        """The text of one row (L, V)."""
        args, tokens = self.objective.args, self.objective.tokens
        if args.decoding == "greedy":
            return tokens.decode(best_path(log_probabilities, tokens.blank))
        return tokens.decode(prefix_beam_search(log_probabilities, tokens.blank, args.beam_width)[0])

    def score(self, predictions: Sequence[Prediction], rows: TranscribedRows) -> dict[str, float]:
        """Error rates are edits over the length of the transcriptions, summed over all rows."""
        return {"loss": mean_loss(predictions), **error_rates(rows.texts, [p["text"] for p in predictions])}

    def describe(self, prediction: Prediction) -> dict[str, object]:
        return {"prediction": prediction["text"]}

    def samples(
        self, predictions: Sequence[Prediction], rows: TranscribedRows, count: int = 4
    ) -> list[dict[str, str]]:
        chosen = [(rows.texts[row], predictions[row]["text"]) for row in spread_and_worst(predictions, count)]
        return [{"prompt": text, "text": f" -> {predicted or '(nothing)'}"} for text, predicted in chosen]

    def figures(self, predictions: Sequence[Prediction], rows: TranscribedRows) -> list[dict[str, str]]:
        """The recordings with the highest character error rates; among equal ones those with the largest loss."""
        pairs = list(zip(rows.texts, predictions, strict=True))
        rates = [jiwer.cer(text, p["text"]) for text, p in pairs]
        worst = sorted(range(len(rates)), key=lambda row: (-rates[row], -predictions[row]["loss"]))
        return worst_spectrograms(rows, worst, [f"“{text}” heard as “{p['text']}”" for text, p in pairs])

    def table(self, predictions: Sequence[Prediction], rows: TranscribedRows) -> str:
        """Words that are right, changed, missing or too many."""
        found = jiwer.process_words(rows.texts, [p["text"] for p in predictions])
        counts = {"right": found.hits, "changed": found.substitutions, "missing": found.deletions}
        counts["too many"] = found.insertions
        return "  words: " + ", ".join(f"{count:,} {what}" for what, count in counts.items())


def _is_punctuation(character: str) -> bool:
    return unicodedata.category(character)[0] in "PS" and character not in APOSTROPHES


TASK = Task(
    name="speech_recognition",
    auto_class=AutoModelForCTC,
    about={
        "pipeline_tag": "automatic-speech-recognition",
        "auto_class": "AutoModelForCTC",
        "processor_class": "AutoProcessor",
        "noun": "speech recogniser",
        "loss_unit": "nats per token",
        "limits": "It writes only the characters or words of its training transcriptions, and something for every "
        "recording, speech or not. Expect more errors on other voices, microphones and subjects.",
    },
    arguments=SpeechRecognitionArguments,
    data=SpeechRecognitionData,
    objective=SpeechRecognitionObjective,
    scorer=SpeechRecognitionScorer,
    main_metric="wer",
    unit="recordings",
)
