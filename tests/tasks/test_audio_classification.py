"""Audio classification: labels of recordings, and one whole run."""

import csv
import json
from pathlib import Path

import pytest
import soundfile
from transformers import pipeline

import bmtk  # noqa: F401  (registers the families)
from recipes import evaluate, finetune, predict

ROOT = Path(__file__).parents[2]
TONES = ROOT / "recipes" / "data" / "tones"


@pytest.mark.trains
def test_a_run_trains_saves_evaluates_predicts_and_serves_the_pipeline(tmp_path, monkeypatch, seed_argv):
    monkeypatch.chdir(ROOT)
    folder = tmp_path / "run"
    argv = ["--task", "audio_classification", "--preset", "smoke", "--output_dir", folder, "--disable_tqdm", "true"]
    finetune.main([*map(str, argv), *seed_argv])
    facts = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    assert facts["metrics"]["test/accuracy"] > 0.8
    assert facts["data"]["labels"] == ["flute", "reed"]
    assert facts["data"]["train"] == {"rows": 58, "minutes": pytest.approx(0.4, abs=0.11)}
    titles = [figure["title"] for figure in facts["figures"]]
    assert titles == ["Confusion matrix", "Spectrograms of the worst recordings"]
    evaluate.main(["--model", str(folder), "--batch_size", "5"])
    measured = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))["metrics"]
    assert measured["test/loss"] == pytest.approx(facts["metrics"]["test/loss"], rel=1e-4)
    output = tmp_path / "labels.csv"
    predict.main(["--model", str(folder), "--input", str(TONES / "test"), "--output", str(output)])
    lines = list(csv.DictReader(output.open(encoding="utf-8")))
    assert list(lines[0]) == ["audio", "transcription", "label", "prediction", "score"]
    samples, rate = soundfile.read(lines[0]["audio"], dtype="float32")
    best = pipeline("audio-classification", model=str(folder))({"raw": samples, "sampling_rate": rate})[0]
    assert best["label"] == lines[0]["prediction"]
    assert best["score"] == pytest.approx(float(lines[0]["score"]), abs=1e-4)
