"""What the tasks that read recordings share: a feature extractor, and recordings that are decoded when needed."""

from dataclasses import dataclass
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoFeatureExtractor
from transformers.models.auto.feature_extraction_auto import FEATURE_EXTRACTOR_MAPPING

from bmtk.data.media import decode_audio
from bmtk.data.tables import check_column

from .task import Task, setting


@dataclass
class RecordingArguments:
    """Where the recordings are, and how they are heard."""

    audio_column: str = setting("audio", "column of the recording")
    sampling_rate: int = setting(16000, "samples per second that a new model hears; others are resampled")


class RecordingTask(Task):
    """A task whose rows become `input_features` (or `input_values`).  `read_rows` leaves recordings undecoded."""

    unit = "recordings"
    inputs = ("audio",)
    extractor = None  # made for the model's configuration by `configure`

    def read_recordings(self, table: Dataset, where: str) -> list[dict]:
        """Undecoded recordings.  Raises: ValueError if the column is not there, or holds something else."""
        name = self.args.audio_column
        check_column(table, name, option="audio_column", where=where)
        values = list(table[name])
        for row, value in enumerate(values, 1):
            if not isinstance(value, dict) or not {"bytes", "path"} <= value.keys():
                held = type(value).__name__
                raise ValueError(f"audio_column={name!r} of {where} row {row} holds a {held}, no recording")
        return values

    @property
    def config_fields(self) -> dict[str, object]:
        return {**super().config_fields, "input_type": "audio"}

    def configure(self, config, **options) -> None:
        """Make the feature extractor: the model's own, or for a new model one with the mel bands of `config`."""
        self.extractor = self._extractor(config)
        super().configure(config, **options)

    def _extractor(self, config):
        if self.model is not None and (
            not Path(self.model).is_dir() or (Path(self.model) / "preprocessor_config.json").is_file()
        ):
            return AutoFeatureExtractor.from_pretrained(self.model, **self.loading)
        if type(config) not in FEATURE_EXTRACTOR_MAPPING:
            raise ValueError(f"no feature extractor belongs to a {config.model_type}; is it a model of recordings?")
        rate = self.args.sampling_rate
        return FEATURE_EXTRACTOR_MAPPING[type(config)](
            feature_size=config.num_mel_bins,
            sampling_rate=rate,
            frame_length=rate // 40,  # 25 ms
            hop_length=rate // 100,  # 10 ms
        )

    def features(self, recordings: list) -> dict[str, torch.Tensor]:
        """What the model reads of decoded recordings (N,): padded, with a mask."""
        rate = self.extractor.sampling_rate
        return dict(self.extractor(recordings, sampling_rate=rate, padding=True, return_tensors="pt"))

    def example_input(self) -> str:
        return "'a_recording.wav'"


class RecordingRows(torch.utils.data.Dataset):
    """Rows whose recording is decoded when it is asked for; errors name the row."""

    def __init__(self, rows: Dataset, where: str, *, sampling_rate: int):
        self.rows, self.where, self.sampling_rate = rows, where, sampling_rate

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict:
        row, where = self.rows[index], f"the recording of {self.where} row {index + 1}"
        return {**row, "audio": decode_audio(row["audio"], where, sampling_rate=self.sampling_rate)}
