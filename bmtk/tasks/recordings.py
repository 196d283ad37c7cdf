"""What the tasks that read recordings share: a feature extractor, and recordings that are decoded when needed."""

import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import AutoFeatureExtractor, PreTrainedConfig
from transformers.feature_extraction_sequence_utils import SequenceFeatureExtractor
from transformers.models.auto.feature_extraction_auto import FEATURE_EXTRACTOR_MAPPING

from bmtk.data.audio_transforms import AudioAugmentationArguments, changed_samples, masked_frames
from bmtk.data.columns import with_columns
from bmtk.data.epoch_dataset import EpochDataset
from bmtk.data.media import ON_CORRUPT, audio_seconds, decode_audio, media_column
from bmtk.data.row_draws import draws_of_rows
from bmtk.data.tables import check_column
from bmtk.errors import UserError
from bmtk.settings import fact, setting

from .figures import spectrograms
from .objective import Objective
from .task_data import TaskData

CACHED_BYTES = 1 << 30  # features kept of a split, at most
SHOWN = 6  # recordings in a figure


@dataclass
class RecordingArguments(AudioAugmentationArguments):
    """Where the recordings are, how a new model reads them, and what is done to them in training."""

    audio_column: str = fact("audio", "column of the recording")
    sampling_rate: int = fact(
        16000, "samples per second that a new model reads; recordings at other rates are resampled"
    )
    frame_ms: float = setting(25.0, "milliseconds of sound that a frame of a new model holds")
    hop_ms: float = setting(10.0, "milliseconds from frame to frame of a new model")
    normalize_each_band: bool = setting(
        False,
        "a new model reads every mel band of a recording with mean 0 and variance 1, instead of all bands together: "
        "this removes the mean spectrum: that of the microphone, but in short recordings also that of the sound",
    )
    on_corrupt: str = setting(
        "stop", "recordings that cannot be read: stop; or skip, for which all are decoded once beforehand"
    )

    def check_recordings(self) -> None:
        self.check_augmentation()
        if self.on_corrupt not in ON_CORRUPT:
            raise UserError(f"on_corrupt={self.on_corrupt!r} is unknown; choose one of {', '.join(ON_CORRUPT)}")
        for name in ("frame_ms", "hop_ms"):
            if not getattr(self, name) * self.sampling_rate >= 1000:
                raise UserError(f"{name}={getattr(self, name)} is less than one sample at {self.sampling_rate} Hz")


class RecordingData(TaskData):
    """Rows of undecoded recordings: columns "audio" and "seconds"."""

    inputs = ("audio",)

    def read_recordings(self, table: Dataset, where: str, *, labelled: bool) -> tuple[Dataset, list[int]]:
        """Columns "audio" and "seconds" of the rows that can be read, and which those are.

        Raises: UserError if the column does not exist or holds something else, or for an unreadable recording if
        `on_corrupt` is stop.  A row without labels is never left out: each row to be predicted needs an answer.
        """
        name = self.args.audio_column
        check_column(table, name, option="audio_column", where=where)
        rows = media_column(table, name, "audio", where)
        kept, seconds, bad = [], [], []
        for row, value in enumerate(rows["audio"]):
            try:
                seconds.append(self._seconds(value, f"the recording of {where} row {row + 1}"))
                kept.append(row)
            except ValueError as error:
                if not labelled or self.args.on_corrupt == "stop":
                    more = "; on_corrupt=skip leaves such rows out" if labelled else ""
                    raise UserError(f"{error}{more}") from error
                bad.append(str(error))
        if bad:
            self.notes.append(f"{len(bad):,} of {len(rows):,} {where} rows are left out: {'; '.join(bad[:3])}")
        if not kept:
            raise UserError(f"audio_column={name!r} of the {where} data holds no recording that can be read")
        return with_columns(rows.select(kept), {"seconds": seconds}), kept

    def _seconds(self, value: dict[str, Any], where: str) -> float:
        seconds = audio_seconds(value, where)
        if self.args.on_corrupt == "skip":
            decode_audio(value, where, sampling_rate=self.args.sampling_rate)
        return seconds

    @property
    def config_fields(self) -> dict[str, object]:
        return {**super().config_fields, "input_type": "audio"}


class RecordingObjective(Objective):
    """Rows become `input_features` (or `input_values`)."""

    data: RecordingData

    def __init__(self, data: RecordingData, config: PreTrainedConfig, *, labels: Sequence[str] = ()):
        super().__init__(data, config, labels=labels)
        self.extractor = extractor_for(config, data)
        if hasattr(config, "hop_length"):  # pipelines read word times from it
            config.hop_length = self.extractor.hop_length

    @property
    def processor(self) -> Any:
        return self.extractor

    def recording_rows(self, rows: Dataset, where: str) -> "RecordingRows":
        """Rows for the collator; training rows are changed from epoch to epoch as `args` are set."""
        changes = self.args if where == "train" else None
        return RecordingRows(rows, where, extractor=self.extractor, changes=changes, seed=self.data.seed)

    def padded(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """What the model reads of such rows: padded, with a mask."""
        return pad_features(self.extractor, [row[self.extractor.model_input_names[0]] for row in rows])

    def sizes(self) -> dict[str, dict[str, float]]:
        return {
            split: {"rows": len(rows), "minutes": round(rows.seconds / 60, 1)} for split, rows in self.rows.items()
        }

    def next_command(self, directory: Path) -> str:
        """Not pipeline(): it needs ffmpeg, and does not resample without torchaudio."""
        return f"accelerate launch recipes/predict.py --model {shlex.quote(str(directory))} --input a_recording.wav"


def extractor_for(config: PreTrainedConfig, data: RecordingData) -> Any:
    """The model's own feature extractor, or a new one with the mel bands of `config`."""
    args = data.args
    if data.model is not None and (not Path(data.model).is_dir() or _has_extractor(Path(data.model))):
        return AutoFeatureExtractor.from_pretrained(data.model, **data.loading)
    if type(config) not in FEATURE_EXTRACTOR_MAPPING:
        raise UserError(f"no feature extractor belongs to a {config.model_type}; is it a model of recordings?")
    options = {"sampling_rate": args.sampling_rate}
    if hasattr(config, "num_mel_bins"):  # else it reads samples
        options |= {
            "feature_size": config.num_mel_bins,
            "frame_length": round(args.sampling_rate * args.frame_ms / 1000),
            "hop_length": round(args.sampling_rate * args.hop_ms / 1000),
            "normalize_each_band": args.normalize_each_band,
        }
    extractor_class: Any = FEATURE_EXTRACTOR_MAPPING[type(config)]
    return extractor_class(**options)


def pad_features(extractor: Any, rows: Sequence[np.ndarray]) -> dict[str, torch.Tensor]:
    """Rows of features, (T, F) or (T,), as `extractor.pad` gives them, which takes four times as long: row by row."""
    name, kind = extractor.model_input_names[0], type(extractor)
    is_plain = kind.pad is SequenceFeatureExtractor.pad and kind._pad is SequenceFeatureExtractor._pad
    if not is_plain or extractor.padding_side != "right" or (rows[0].ndim == 2) != (extractor.feature_size > 1):
        return dict(extractor.pad({name: list(rows)}, padding=True, return_tensors="pt"))
    lengths = np.array([len(row) for row in rows])
    shape, dtype = (len(rows), lengths.max(), *rows[0].shape[1:]), rows[0].dtype
    batch = np.full(shape, extractor.padding_value, np.float32 if dtype == np.float64 else dtype)
    for place, row in zip(batch, rows, strict=True):
        place[: len(row)] = row
    found = {name: torch.from_numpy(batch)}
    if extractor.return_attention_mask:
        found["attention_mask"] = torch.from_numpy((np.arange(shape[1]) < lengths[:, None]).astype(np.int32))
    return found


def worst_spectrograms(rows: "RecordingRows", worst: Sequence[int], verdicts: Sequence[str]) -> list[dict[str, str]]:
    """A figure of the spectrograms of the first of the `worst` rows; `verdicts` has a sentence for each row."""
    chosen = worst[:SHOWN]
    if not chosen:
        return []
    names = [f"row {row + 1}: {verdicts[row].strip()}" for row in chosen]
    return [spectrograms([rows.recording(row) for row in chosen], names, rows.extractor.sampling_rate)]


class RecordingRows(EpochDataset, torch.utils.data.Dataset[dict[str, Any]]):
    """Rows whose recording is decoded when it is asked for, and its features kept while they fit; errors name the row.

    What `changes` makes of a row is a function of (seed, epoch, row).
    """

    def __init__(
        self,
        rows: Dataset,
        where: str,
        *,
        extractor: Any,
        changes: AudioAugmentationArguments | None = None,
        seed: int = 0,
    ):
        self.recordings, self.where, self.extractor = rows.select_columns("audio"), where, extractor
        names = [name for name in rows.column_names if name not in ("audio", "seconds")]
        self.others = {name: rows[name][:] for name in names}
        self.seconds = sum(rows["seconds"])
        self.changes, self.seed = changes, seed
        self.kept: dict[int, np.ndarray] = {}  # features of rows
        self.kept_bytes = 0

    def __len__(self) -> int:
        return len(self.recordings)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        draws: Iterable[np.random.Generator | None] = repeat(None, len(indices))
        if self.changes:
            draws = draws_of_rows(self.seed, self.epoch, indices)
        features = [self.features(index, draw) for index, draw in zip(indices, draws, strict=True)]
        name = self.extractor.model_input_names[0]
        return [
            {**{key: values[index] for key, values in self.others.items()}, name: found}
            for index, found in zip(indices, features, strict=True)
        ]

    def recording(self, index: int) -> np.ndarray:
        """Samples (N,) as they are on disk, at the model's rate."""
        where = f"the recording of {self.where} row {index + 1}"
        return decode_audio(self.recordings[index]["audio"], where, sampling_rate=self.extractor.sampling_rate)

    def features(self, index: int, draw: np.random.Generator | None) -> np.ndarray:
        """What the model reads: mostly frames (T, F); `draw` is None where nothing is changed."""
        changes = self.changes
        if draw and changes and changes.changes_samples:
            found = self._extracted(changed_samples(self.recording(index), self._rate, changes, draw))
        elif index in self.kept:
            found = self.kept[index]
        else:
            found = self._extracted(self.recording(index))
            if self.kept_bytes + found.nbytes <= CACHED_BYTES:
                self.kept[index], self.kept_bytes = found, self.kept_bytes + found.nbytes
        if not draw or not changes or not changes.changes_frames:
            return found
        if found.ndim != 2:
            name = type(self.extractor).__name__
            raise UserError(f"time_masks and frequency_masks blank frames, and a {name} gives none; set them to 0")
        return masked_frames(found, changes, draw)

    @property
    def _rate(self) -> int:
        return int(self.extractor.sampling_rate)

    def _extracted(self, samples: np.ndarray) -> np.ndarray:
        found = self.extractor(samples, sampling_rate=self._rate, return_tensors="np")
        return np.asarray(found[self.extractor.model_input_names[0]][0])


def _has_extractor(folder: Path) -> bool:
    return (folder / "preprocessor_config.json").is_file() or (folder / "processor_config.json").is_file()
