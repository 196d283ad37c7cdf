"""Speech recognition: vocabulary, rows, CTC loss and decoding against brute force, error rates, and one whole run."""

import csv
import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from transformers import AutoModelForCTC, AutoProcessor, Wav2Vec2Config, pipeline

import bmtk  # noqa: F401  (registers the families)
from bmtk.models.configuration_bm_rnn import BmRnnConfig
from bmtk.tasks.ctc import best_path, positions_needed, prefix_beam_search, row_losses
from bmtk.tasks.speech_recognition import SpeechRecognition, SpeechRecognitionArguments, ctc_tokenizer
from bmtk.training.finetuning import FineTuningArguments, build_trainer
from recipes import evaluate, finetune, predict

ROOT = Path(__file__).parents[2]
TONES = ROOT / "recipes" / "data" / "tones"
TRAIN, OTHERS = ["No, no.", "don't go", "ANNA"], ["go on"]


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch):
    monkeypatch.chdir(ROOT)


def write_recordings(folder: Path, texts: list[str], *, seconds: float = 1.0, seed: int = 0) -> Path:
    """A folder of noise, with transcriptions."""
    folder.mkdir(parents=True)
    draw = np.random.default_rng([seed, len(texts)])
    with (folder / "metadata.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["file_name", "transcription"])
        for number, text in enumerate(texts):
            soundfile.write(folder / f"{number}.wav", 0.1 * draw.standard_normal(int(8000 * seconds)), 8000)
            writer.writerow([f"{number}.wav", text])
    return folder


def make_task(tmp_path, train=TRAIN, validation=OTHERS, *, seconds: float = 1.0, **settings) -> SpeechRecognition:
    write_recordings(tmp_path / "data" / "train", train, seconds=seconds)
    write_recordings(tmp_path / "data" / "validation", validation, seconds=seconds, seed=1)
    given = {"dataset": str(tmp_path / "data"), "sampling_rate": 8000, **settings}
    return SpeechRecognition(SpeechRecognitionArguments(**given))


def configured(task, **fields):
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_mel_bins": 12}
    config = BmRnnConfig(**{**task.config_fields, **sizes, **fields})
    task.configure(config)
    return config


# ------------------------------------------------------------------------------------ texts and tokens


def test_characters_become_tokens_and_texts_are_normalised(tmp_path):
    task = make_task(tmp_path)
    config = configured(task)
    assert list(task.rows["train"].texts) == ["no no", "don't go", "anna"]
    assert list(task.ids) == ["'", "a", "d", "g", "n", "o", "t"]
    assert (config.vocab_size, config.pad_token_id) == (10, 0)
    assert task.rows["validation"][0]["labels"] == [6, 8, 2, 8, 7]
    assert task.tokenizer.decode([6, 6, 0, 8, 2, 2, 8, 0, 7, 7]) == "go on"
    kept = make_task(tmp_path / "kept", text_case="keep", keep_punctuation=True)
    configured(kept)
    assert list(kept.rows["train"].texts) == ["No, no.", "don't go", "ANNA"]


def test_words_become_tokens_if_asked_for(tmp_path):
    task = make_task(tmp_path, ["yes no", "no no yes", "yes"], ["no"], token_unit="words")
    configured(task)
    assert task.ids == {"no ": 3, "yes ": 4}
    assert task.rows["train"][1]["labels"] == [3, 3, 4]
    scores = np.full((5, 5), -9.0, dtype=np.float32)
    scores[range(5), [3, 0, 3, 4, 4]] = 0
    assert task.decode(scores) == "no no yes"


def test_what_the_model_cannot_write_is_said_and_counts_as_unknown(tmp_path):
    task = make_task(tmp_path, validation=["go up"])
    configured(task)
    assert task.rows["validation"][0]["labels"] == [6, 8, 2, 1, 1]
    assert "1 validation rows hold characters that the model cannot write: 'p', 'u'" in task.notes


def test_rows_without_a_transcription_are_left_out_and_said(tmp_path):
    task = make_task(tmp_path, [*TRAIN, " ... "])
    configured(task)
    assert len(task.rows["train"]) == 3
    assert "1 of 4 train rows have no transcription: left out" in task.notes
    with pytest.raises(ValueError, match="transcription_column='transcription' of the train data holds no text at"):
        make_task(tmp_path / "none", ["?", "!"])


# ------------------------------------------------------------------------------------ recordings too short


def test_positions_needed_is_the_length_of_the_shortest_path():
    for labels in ([], [1], [1, 1], [1, 2, 1], [1, 1, 1, 2]):
        lengths = (n for n in range(8) if any(collapsed(path) == labels for path in itertools.product(range(3), repeat=n)))
        assert positions_needed(labels) == next(lengths)


def test_recordings_too_short_for_their_labels_are_named_with_numbers(tmp_path):
    # 0.2 s are 1,600 samples: 18 frames of 200 every 80, so 5 positions
    with pytest.raises(
        ValueError,
        match=r"2 of 3 train recordings are too short for their labels \(row 2, 0\.20 s, gives 5 positions to 8 "
        r"tokens, which need 8\); too_short_recordings=skip leaves",
    ):
        configured(make_task(tmp_path / "stop", ["no no", "don't go", "annaa"], seconds=0.2))
    task = make_task(tmp_path / "skip", ["no no", "don't go", "annaa"], ["annaa"], seconds=0.2, too_short_recordings="skip")
    config = configured(task)
    assert list(task.rows["train"].texts) == ["no no"]
    assert list(task.rows["validation"].texts) == ["annaa"]
    assert any(note.endswith("they count in the error rates, not in the loss") for note in task.notes)
    predictions = predicted(task, AutoModelForCTC.from_config(config), "validation")
    assert predictions[0]["loss"] == predictions[0]["items"] == 0
    assert task.score(predictions, task.rows["validation"])["cer"] > 0
    finer = make_task(tmp_path / "finer", ["no no", "don't go", "annaa"], ["annaa"], seconds=0.2, hop_ms=5)
    configured(finer)
    assert len(finer.rows["train"]) == 3


def test_a_recogniser_of_samples_says_how_many_positions_it_has(tmp_path):
    """Not our frames: a wav2vec 2.0 of two convolutions reads samples, and gives one position for every 100."""
    task = make_task(tmp_path, seconds=0.05, too_short_recordings="skip")
    small = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    layers = {"conv_dim": (4, 4), "conv_kernel": (10, 10), "conv_stride": (10, 10), "num_feat_extract_layers": 2}
    config = Wav2Vec2Config(**small, **layers, num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2)
    task.configure(config)
    assert (config.vocab_size, config.pad_token_id) == (10, 0)
    assert list(task.rows["train"].texts) == []
