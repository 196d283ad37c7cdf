"""Recordings as rows: what is decoded, resampled, kept, refused; and how training rows change from epoch to epoch."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch
from datasets import Dataset
from transformers import Wav2Vec2FeatureExtractor

import bmtk  # noqa: F401  (registers the families)
from bmtk.data.audio_transforms import (
    AudioAugmentationArguments,
    changed_samples,
    masked_frames,
    shifted,
    with_noise,
)
from bmtk.data.media import audio_seconds, decode_audio
from bmtk.models.configuration_bm_cnn import BmCnnConfig
from bmtk.models.feature_extraction_bm import BmFeatureExtractor
from bmtk.tasks.audio_classification import TASK, AudioClassificationArguments, AudioClassificationObjective
from bmtk.tasks.recordings import RecordingRows, pad_features
from bmtk.training.trainer_patches import SetEpoch

RATE = 8000


def tone(seconds: float = 0.5, pitch: float = 440.0, rate: int = RATE) -> np.ndarray:
    return 0.5 * np.sin(2 * np.pi * pitch * np.arange(int(seconds * rate)) / rate)


def loudest(samples: np.ndarray, rate: int) -> float:
    """Hz."""
    power = np.abs(np.fft.rfft(samples * np.hanning(len(samples))))
    return np.fft.rfftfreq(len(samples), 1 / rate)[power.argmax()]


def folder_of(tmp_path: Path) -> Path:
    for split, count in (("train", 4), ("validation", 2)):
        for number in range(count):
            path = tmp_path / split / ("low", "high")[number % 2] / f"{number}.wav"
            path.parent.mkdir(parents=True, exist_ok=True)
            soundfile.write(path, tone(0.3, 300 + 40 * number + 7 * count + 900 * (number % 2)), RATE)
    return tmp_path


def bound(folder: Path, **settings) -> AudioClassificationObjective:
    given = {"dataset": str(folder), "sampling_rate": RATE, **settings}
    data = TASK.read(AudioClassificationArguments(**given))
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_mel_bins": 12}
    return data.bind(BmCnnConfig(**{**data.config_fields, **sizes}))


# ------------------------------------------------------------------------------------ decoding


def test_a_tone_keeps_its_pitch_at_every_rate_and_two_channels_become_their_mean(tmp_path):
    for rate in (8000, 16000, 44100):
        path = tmp_path / f"{rate}.wav"
        soundfile.write(path, np.stack([tone(rate=rate), 0 * tone(rate=rate)], axis=1), rate)
        samples = decode_audio({"bytes": None, "path": str(path)}, "it", sampling_rate=RATE)
        assert samples.shape == (RATE // 2,)
        assert loudest(samples, RATE) == pytest.approx(440, abs=2)
        assert np.abs(samples[500:-500]).max() == pytest.approx(0.25, abs=0.01)
        assert audio_seconds({"bytes": path.read_bytes(), "path": None}, "it") == pytest.approx(0.5)


def broken(folder: Path, kind: str) -> Path:
    path = folder / "train" / "low" / "2.wav"
    content = {"noise": b"not a recording", "empty": b"", "cut": path.read_bytes()[:20]}
    if kind == "silent":
        soundfile.write(path, np.zeros(0), RATE)
    else:
        path.write_bytes(content[kind])
    return path


@pytest.mark.parametrize("kind", ["noise", "empty", "cut", "silent"])
def test_a_bad_recording_is_named_and_stops_the_run_or_is_left_out(tmp_path, kind):
    path = broken(folder_of(tmp_path), kind)
    what = "a recording without a sample" if kind == "silent" else "not a recording that can be read"
    message = rf"the recording of train row 4 is {what}: {path}.*; on_corrupt=skip leaves such rows out"
    with pytest.raises(ValueError, match=message):
        bound(tmp_path)
    objective = bound(tmp_path, on_corrupt="skip")
    assert len(objective.rows["train"]) == 3
    assert objective.rows["train"][2]["labels"] == 1
    assert any("1 of 4 train rows are left out: the recording of train row 4" in note for note in objective.notes)
    table = Dataset.from_dict({"audio": [{"bytes": None, "path": str(path)}]})
    with pytest.raises(ValueError, match=rf"the recording of input row 1 is {what}"):
        objective.encode_inputs(table)


def test_what_is_no_recording_is_refused(tmp_path):
    objective = bound(folder_of(tmp_path))
    with pytest.raises(ValueError, match="audio_column='audio' of input row 1 holds a str, no recording"):
        objective.encode_inputs(Dataset.from_dict({"audio": ["a.wav"]}))
    with pytest.raises(ValueError, match="audio_column='sound' is not in the train data; its columns"):
        bound(tmp_path, audio_column="sound")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"on_corrupt": "drop"}, r"on_corrupt='drop' is unknown; choose one of stop, skip"),
        ({"hop_ms": 0.1}, r"hop_ms=0\.1 is less than one sample at 8000 Hz"),
        ({"speed_change": 1.0}, r"speed_change=1\.0 is not a share"),
        ({"time_masks": -1}, r"time_masks=-1 must be at least 0"),
        ({"noise_snr": [20, 10]}, r"noise_snr=\[20, 10\] must be two numbers, the lowest and the highest ratio in dB"),
    ],
)
def test_wrong_settings_are_one_clear_error(settings, message):
    with pytest.raises(ValueError, match=message):
        AudioClassificationArguments(**{"sampling_rate": RATE, **settings})


def test_a_new_model_reads_frames_as_the_settings_say(tmp_path):
    extractor = bound(folder_of(tmp_path), frame_ms=20, hop_ms=5).extractor
    assert (extractor.feature_size, extractor.frame_length, extractor.hop_length) == (12, 160, 40)
    assert not extractor.normalize_each_band
    assert bound(tmp_path, normalize_each_band=True).extractor.normalize_each_band


# ------------------------------------------------------------------------------------ changes


def rows_of(tmp_path, **changes) -> RecordingRows:
    paths = sorted((folder_of(tmp_path) / "train").rglob("*.wav"))
    rows = Dataset.from_dict({"audio": [{"bytes": None, "path": str(path)} for path in paths], "seconds": [0.3] * 4})
    extractor = BmFeatureExtractor(feature_size=12, sampling_rate=RATE, frame_length=200, hop_length=80)
    args = AudioAugmentationArguments(**changes) if changes else None
    return RecordingRows(rows, "train", extractor=extractor, changes=args, seed=3)


def differ(some: list[np.ndarray], others: list[np.ndarray]) -> bool:
    return not all(np.array_equal(one, other) for one, other in zip(some, others, strict=True))


@pytest.mark.parametrize("kind", ["frames", "samples", "without a mask", "on the left"])
def test_padded_features_are_the_very_ones_of_the_extractor(kind):
    draw = np.random.default_rng(0)
    extractor = BmFeatureExtractor(feature_size=12, sampling_rate=RATE, frame_length=200, hop_length=80)
    rows = [draw.normal(size=(length, 12)).astype(np.float32) for length in (5, 9, 1)]
    if kind == "samples":
        extractor = Wav2Vec2FeatureExtractor(return_attention_mask=True, padding_value=-3.0)
        rows = [draw.normal(size=length) for length in (5, 9, 1)]
    extractor.return_attention_mask = kind != "without a mask"
    extractor.padding_side = "left" if kind == "on the left" else "right"
    theirs = extractor.pad({extractor.model_input_names[0]: list(rows)}, padding=True, return_tensors="pt")
    ours = pad_features(extractor, rows)
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert ours[name].dtype == value.dtype
        assert torch.equal(ours[name], value)


CHANGES = [
    {"time_masks": 2},
    {"frequency_masks": 2},
    {"speed_change": 0.2},
    {"noise_snr": [0, 5], "noise_probability": 1.0},
    {"time_shift": 0.05},
]


@pytest.mark.parametrize("changes", CHANGES, ids=lambda changes: next(iter(changes)))
def test_changes_are_a_function_of_seed_epoch_and_row(tmp_path, changes):
    rows, plain = rows_of(tmp_path, **changes), rows_of(tmp_path)
    first = [rows[row]["input_features"] for row in range(4)]
    assert any(
        x.shape != plain[i]["input_features"].shape or (x != plain[i]["input_features"]).any()
        for i, x in enumerate(first)
    )
    rows.set_epoch(1)
    second = [rows[row]["input_features"] for row in range(4)]
    assert differ(first, second)
    again = rows_of(tmp_path, **changes)
    again.set_epoch(1)
    for row in (3, 0, 2, 1):  # in any order
        assert np.array_equal(again[row]["input_features"], second[row])
    batch = again.__getitems__([3, 0, 2, 1] * 3)  # enough to be seeded together
    assert all(np.array_equal(batch[at]["input_features"], second[row]) for at, row in enumerate([3, 0, 2, 1] * 3))


def test_only_training_rows_change_and_features_are_kept(tmp_path):
    objective = bound(folder_of(tmp_path), time_masks=1, gain=6.0)
    assert objective.rows["train"].changes is objective.args
    assert objective.rows["validation"].changes is None
    rows = objective.rows["validation"]
    before = rows[0]["input_features"]
    for path in (tmp_path / "validation").rglob("*.wav"):
        path.unlink()
    assert np.array_equal(rows[0]["input_features"], before)
    with pytest.raises(ValueError, match="the recording of validation row 2 is not a recording that can be read"):
        rows[1]


def test_masks_are_bands_and_stretches_of_the_mean_no_larger_than_allowed():
    frames = np.random.default_rng(0).normal(size=(40, 12)).astype(np.float32)
    args = AudioAugmentationArguments(time_masks=1, time_mask_size=7)
    sizes = set()
    for seed in range(60):
        masked = masked_frames(frames, args, np.random.default_rng(seed))
        changed = np.flatnonzero((masked != frames).any(axis=1))
        sizes.add(len(changed))
        assert len(changed) == 0 or changed[-1] - changed[0] + 1 == len(changed)
        assert np.allclose(masked[changed], frames.mean(axis=0))
    assert sizes == set(range(8))
    args = AudioAugmentationArguments(frequency_masks=1, frequency_mask_size=3)
    widths = {
        int((masked_frames(frames, args, np.random.default_rng(seed)) != frames).any(axis=0).sum())
        for seed in range(60)
    }
    assert widths == {0, 1, 2, 3}
    masked = masked_frames(frames, args, np.random.default_rng(1))
    changed = np.flatnonzero((masked != frames).any(axis=0))
    assert len(changed)
    assert np.allclose(masked[:, changed], frames.mean(axis=0)[changed])
    wide = AudioAugmentationArguments(time_masks=1, time_mask_size=50)
    draws = [masked_frames(frames[:4], wide, np.random.default_rng(seed)) for seed in range(20)]
    assert max((short != frames[:4]).any(axis=1).sum() for short in draws) == 2


def test_noise_has_the_ratio_that_is_asked_for_and_gain_its_decibels():
    draw = np.random.default_rng(0)
    samples = tone(4.0)
    noise = with_noise(samples, 10.0, draw) - samples
    assert 10 * np.log10(np.mean(samples**2) / np.mean(noise**2)) == pytest.approx(10, abs=0.2)
    args = AudioAugmentationArguments(gain=6.0)
    peaks = [np.abs(changed_samples(samples, RATE, args, np.random.default_rng(seed))).max() for seed in range(40)]
    decibels = 20 * np.log10(np.array(peaks) / np.abs(samples).max())
    assert decibels.max() == pytest.approx(6, abs=0.6)
    assert decibels.min() == pytest.approx(-6, abs=0.6)


def test_speed_changes_length_and_pitch_together_and_a_shift_moves():
    samples = tone(1.0)
    changed = changed_samples(samples, RATE, AudioAugmentationArguments(speed_change=0.2), np.random.default_rng(0))
    factor = len(samples) / len(changed)
    assert 0.8 <= factor <= 1.2
    assert abs(factor - 1) > 0.01
    assert loudest(changed, RATE) == pytest.approx(440 * factor, abs=2)
    assert np.array_equal(shifted(samples, 3)[:4], [0, 0, 0, samples[0]])
    assert np.array_equal(shifted(samples, -3), samples[3:])
    assert len(shifted(samples[:10], -8)) == 5


def test_the_rows_follow_the_epoch_also_where_a_run_is_resumed(tmp_path):
    rows = rows_of(tmp_path, gain=1.0)
    for epoch, expected in ((0, 0), (2.0, 2), (1.75, 1), (2.9999999999, 3), (None, 0)):
        SetEpoch(rows).on_epoch_begin(None, SimpleNamespace(epoch=epoch), None)
        assert rows.epoch == expected


def test_masks_need_frames(tmp_path):
    rows = rows_of(tmp_path, time_masks=1)
    rows._extracted = lambda samples: samples
    with pytest.raises(ValueError, match="time_masks and frequency_masks blank frames, and a BmFeat"):
        rows[0]
