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
from bmtk.tasks.speech_recognition import TASK, SpeechRecognitionArguments, SpeechRecognitionData
from bmtk.training.finetuning_arguments import FineTuningArguments
from bmtk.training.trainer import build_trainer
from recipes import evaluate, finetune, predict

ROOT = Path(__file__).parents[2]
TONES = ROOT / "recipes" / "data" / "tones"
TRAIN, OTHERS = ["No, no.", "don't go", "ANNA"], ["go on"]


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch):
    monkeypatch.chdir(ROOT)


def write_recordings(folder: Path, texts: list[str], *, seconds=1.0, seed: int = 0) -> Path:
    """A folder of noise, with transcriptions; `seconds` are those of all, or of each."""
    folder.mkdir(parents=True)
    draw = np.random.default_rng([seed, len(texts)])
    with (folder / "metadata.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["file_name", "transcription"])
        for number, (text, length) in enumerate(zip(texts, np.broadcast_to(seconds, len(texts)), strict=True)):
            soundfile.write(folder / f"{number}.wav", 0.1 * draw.standard_normal(int(8000 * length)), 8000)
            writer.writerow([f"{number}.wav", text])
    return folder


def read_data(tmp_path, train=TRAIN, validation=OTHERS, *, seconds: float = 1.0, **settings) -> SpeechRecognitionData:
    write_recordings(tmp_path / "data" / "train", train, seconds=seconds)
    write_recordings(tmp_path / "data" / "validation", validation, seconds=seconds, seed=1)
    given = {"dataset": str(tmp_path / "data"), "sampling_rate": 8000, **settings}
    return TASK.read(SpeechRecognitionArguments(**given))


def bound(data, **fields):
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_mel_bins": 12}
    return data.bind(BmRnnConfig(**{**data.config_fields, **sizes, **fields}))


# ------------------------------------------------------------------------------------ texts and tokens


def test_characters_become_tokens_and_texts_are_normalised(tmp_path):
    objective = bound(read_data(tmp_path))
    config = objective.config
    assert list(objective.rows["train"].texts) == ["no no", "don't go", "anna"]
    assert list(objective.tokens.ids) == ["'", "a", "d", "g", "n", "o", "t"]
    assert (config.vocab_size, config.pad_token_id) == (10, 0)
    assert objective.rows["validation"][0]["labels"] == [6, 8, 2, 8, 7]
    assert objective.tokens.tokenizer.decode([6, 6, 0, 8, 2, 2, 8, 0, 7, 7]) == "go on"
    kept = bound(read_data(tmp_path / "kept", text_case="keep", keep_punctuation=True))
    assert list(kept.rows["train"].texts) == ["No, no.", "don't go", "ANNA"]


def test_words_become_tokens_if_asked_for(tmp_path):
    objective = bound(read_data(tmp_path, ["yes no", "no no yes", "yes"], ["no"], token_unit="words"))
    assert objective.tokens.ids == {"no ": 3, "yes ": 4}
    assert objective.rows["train"][1]["labels"] == [3, 3, 4]
    scores = np.full((5, 5), -9.0, dtype=np.float32)
    scores[range(5), [3, 0, 3, 4, 4]] = 0
    assert objective.scorer.decode(scores) == "no no yes"


def test_what_the_model_cannot_write_is_noted_and_counts_as_unknown(tmp_path):
    objective = bound(read_data(tmp_path, validation=["go up"]))
    assert objective.rows["validation"][0]["labels"] == [6, 8, 2, 1, 1]
    assert "1 validation rows hold characters that the model cannot write: 'p', 'u'" in objective.notes


def test_rows_without_a_transcription_are_left_out_with_a_note(tmp_path):
    objective = bound(read_data(tmp_path, [*TRAIN, " ... "]))
    assert len(objective.rows["train"]) == 3
    assert "1 of 4 train rows have no transcription: left out" in objective.notes
    with pytest.raises(ValueError, match="transcription_column='transcription' of the train data holds no text at"):
        read_data(tmp_path / "none", ["?", "!"])


# ------------------------------------------------------------------------------------ recordings too short


def test_positions_needed_is_the_length_of_the_shortest_path():
    for labels in ([], [1], [1, 1], [1, 2, 1], [1, 1, 1, 2]):
        lengths = (
            n for n in range(8) if any(collapsed(path) == labels for path in itertools.product(range(3), repeat=n))
        )
        assert positions_needed(labels) == next(lengths)


def test_recordings_too_short_for_their_labels_are_named_with_numbers(tmp_path):
    # 0.2 s are 1,600 samples: 18 frames of 200 every 80, so 5 positions
    with pytest.raises(
        ValueError,
        match=r"2 of 3 train recordings are too short for their labels \(row 2, 0\.20 s, gives 5 positions to 8 "
        r"tokens, which need 8\); too_short_recordings=skip leaves",
    ):
        bound(read_data(tmp_path / "stop", ["no no", "don't go", "annaa"], seconds=0.2))
    data = read_data(
        tmp_path / "skip", ["no no", "don't go", "annaa"], ["annaa"], seconds=0.2, too_short_recordings="skip"
    )
    objective = bound(data)
    assert list(objective.rows["train"].texts) == ["no no"]
    assert list(objective.rows["validation"].texts) == ["annaa"]
    assert any(note.endswith("they count in the error rates, not in the loss") for note in objective.notes)
    predictions = predicted(objective, AutoModelForCTC.from_config(objective.config), "validation")
    assert predictions[0]["loss"] == predictions[0]["items"] == 0
    assert objective.scorer.score(predictions, objective.rows["validation"])["cer"] > 0
    finer = read_data(tmp_path / "finer", ["no no", "don't go", "annaa"], ["annaa"], seconds=0.2, hop_ms=5)
    assert len(bound(finer).rows["train"]) == 3


def test_a_recogniser_of_samples_gets_tokens_lengths_and_losses_like_our_own(tmp_path):
    """Not our frames: this wav2vec 2.0 reads samples, and gives one position for every 100."""
    data = read_data(tmp_path, ["no no", "don't go"], ["go on"], seconds=0.07, too_short_recordings="skip")
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    layers = {"conv_dim": (4, 4), "conv_kernel": (10, 10), "conv_stride": (10, 10), "num_feat_extract_layers": 2}
    config = Wav2Vec2Config(**sizes, **layers, num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2)
    objective = data.bind(config)
    assert (config.vocab_size, config.pad_token_id) == (len(objective.tokens), 0)
    assert list(objective.rows["train"].texts) == ["no no"]  # 5 of 5 positions; the other has 8 tokens
    model = AutoModelForCTC.from_config(config)
    prediction = predicted(objective, model, "validation")[0]
    assert prediction["items"] == 5
    batch = objective.collator()([objective.rows["validation"][0]])
    mean = model.eval()(**batch).loss.item()  # reduction "sum" over one row
    assert prediction["loss"] == pytest.approx(mean, rel=1e-4)


# ------------------------------------------------------------------------------------ loss and decoding


def collapsed(path) -> list[int]:
    """What a path over tokens stands for; 0 is the blank."""
    return [token for i, token in enumerate(path) if token and (i == 0 or token != path[i - 1])]


def likelihoods(log_probabilities: np.ndarray) -> dict[tuple, float]:
    """Every text and its likelihood, summed over all paths."""
    length, num_tokens = log_probabilities.shape
    found: dict[tuple, float] = {}
    for path in itertools.product(range(num_tokens), repeat=length):
        labels = tuple(collapsed(path))
        found[labels] = found.get(labels, 0.0) + math.exp(log_probabilities[range(length), path].sum())
    return found


def drawn(seed: int, length: int, num_tokens: int) -> np.ndarray:
    logits = torch.randn(length, num_tokens, generator=torch.Generator().manual_seed(seed)) * 1.5
    return logits.log_softmax(-1).double().numpy()


@pytest.mark.parametrize("seed", range(6))
def test_prefix_beam_search_finds_the_likeliest_text_of_all(seed):
    scores = drawn(seed, length=5, num_tokens=4)
    texts = likelihoods(scores)
    labels, log_likelihood = prefix_beam_search(scores, blank=0, width=10_000)
    best = max(texts, key=texts.get)
    assert tuple(labels) == best
    assert log_likelihood == pytest.approx(math.log(texts[best]), abs=1e-9)


def test_a_beam_may_beat_the_likeliest_path_and_a_narrow_one_may_miss():
    scores = np.log([[0.6, 0.4], [0.6, 0.4]])  # the likeliest path is blank twice, the likeliest text is "a"
    assert best_path(scores, blank=0) == []
    assert prefix_beam_search(scores, blank=0, width=8) == ([1], pytest.approx(math.log(0.64)))
    assert best_path(np.log(np.eye(3)[[1, 1, 0, 1, 2]] + 1e-9), blank=0) == [1, 1, 2]
    other_blank = prefix_beam_search(scores[:, ::-1], blank=1, width=8)
    assert other_blank == ([0], pytest.approx(math.log(0.64)))


def test_losses_of_rows_are_sums_over_paths_and_infinite_where_there_is_none():
    scores = drawn(3, length=5, num_tokens=4)
    logits = torch.tensor(np.stack([scores, scores, scores]), dtype=torch.float32)
    labels = torch.tensor([[1, 2, -100], [3, -100, -100], [2, 2, 2]])
    losses = row_losses(logits, torch.tensor([5, 4, 4]), labels, blank=0)
    assert losses[0].item() == pytest.approx(-math.log(likelihoods(scores)[1, 2]), abs=1e-5)
    assert losses[1].item() == pytest.approx(-math.log(likelihoods(scores[:4])[3,]), abs=1e-5)
    assert losses[2] == float("inf")


def predicted(objective, model, split):
    batch = objective.collator()([objective.rows[split][row] for row in range(len(objective.rows[split]))])
    with torch.no_grad():
        return objective.scorer.predict(model.eval(), batch)


def uneven(tmp_path):
    """An objective whose training recordings differ in length, and a model for it."""
    texts, seconds = ["no no", "don't go", "anna", "on", "a nod"], (1.0, 0.6, 1.3, 0.3, 0.8)
    write_recordings(tmp_path / "data" / "train", texts, seconds=seconds)
    args = SpeechRecognitionArguments(dataset=str(tmp_path / "data"), sampling_rate=8000)
    objective = bound(TASK.read(args, splits=["train"]))
    torch.manual_seed(0)
    return objective, AutoModelForCTC.from_config(objective.config).eval()


def test_the_loss_of_a_row_does_not_depend_on_its_batch(tmp_path):
    objective, model = uneven(tmp_path)
    together = predicted(objective, model, "train")
    rows = objective.rows["train"]
    with torch.no_grad():
        alone = [objective.scorer.predict(model, objective.collator()([rows[row]]))[0] for row in range(len(rows))]
    for one, other in zip(together, alone, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)
        assert (one["items"], one["text"]) == (other["items"], other["text"])
    assert [p["items"] for p in together] == [len(text) for text in rows.texts]
    batch = objective.collator()([rows[row] for row in range(len(rows))])
    whole = objective.criterion(model(**{k: v for k, v in batch.items() if k != "labels"}), batch)
    assert whole.item() == pytest.approx(sum(p["loss"] for p in together), rel=1e-4)
    assert model(**batch).loss.item() == pytest.approx(whole.item() / int(objective.num_items(batch)), rel=1e-4)


@pytest.mark.parametrize("accumulation", [1, 4])
def test_gradients_do_not_depend_on_micro_batches(tmp_path, accumulation):
    """One step over four rows: whole, and in four parts, against the loss of the four rows together."""
    objective, model = uneven(tmp_path)
    rows = objective.rows["train"]
    size = 4 // accumulation
    batches = [objective.collator()([rows[row] for row in range(first, first + size)]) for first in range(0, 4, size)]
    args = FineTuningArguments(str(tmp_path / "run"), eval_strategy="no", report_to=[], use_cpu=True)
    trainer = build_trainer(model, objective, args, folder=tmp_path / "run")
    count = trainer._get_num_items_in_batch(batches, torch.device("cpu"))
    for batch in batches:
        trainer.compute_loss(model, batch, num_items_in_batch=count).backward()
    gradient = model.lm_head.weight.grad.clone()
    model.zero_grad()
    whole = objective.collator()([rows[row] for row in range(4)])
    model(**whole).loss.backward()  # the head's own: a mean over the tokens
    assert torch.allclose(gradient, model.lm_head.weight.grad, atol=1e-6)
    with pytest.raises(ValueError, match=r"label_smoothing_factor=0\.1 has no effect on CTC"):
        objective.criterion(None, whole, label_smoothing=0.1)


def test_error_rates_are_edits_over_the_length_of_the_transcriptions(tmp_path):
    objective = bound(read_data(tmp_path))
    scorer, rows = objective.scorer, objective.rows["train"]  # no no, don't go, anna
    predictions = [{"text": text, "loss": 2.0, "items": 4} for text in ("no", "don't go", "hanna o")]
    metrics = scorer.score(predictions, rows)
    # words: one missing; none; one changed and one too many; of 5.  Characters: 3, 0 and 3 edits of 5 + 8 + 4
    assert metrics == {
        "loss": 0.5,
        "wer": pytest.approx(3 / 5),
        "cer": pytest.approx(6 / 17),
        "exact_match": pytest.approx(1 / 3),
    }
    assert scorer.table(predictions, rows) == "  words: 3 right, 1 changed, 1 missing, 1 too many"
    assert scorer.samples(predictions, rows, count=1)[0] == {"prompt": "no no", "text": " -> no"}
    (figure,) = scorer.figures(predictions, rows)
    assert figure["title"] == "Spectrograms of the worst recordings"
    assert objective.data_record()["train"] == {"rows": 3, "minutes": 0.1}
    json.dumps(objective.data_record())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"transcription_column": "text"},
            r"transcription_column='text' is not in the train data; its columns",
        ),
        ({"text_case": "title"}, r"text_case='title' is unknown; choose one of lower, upper, keep"),
        ({"token_unit": "bytes"}, r"token_unit='bytes' is unknown; choose one of characters, words"),
        ({"decoding": "best"}, r"decoding='best' is unknown; choose one of greedy, beam"),
        ({"too_short_recordings": "drop"}, r"too_short_recordings='drop' is unknown; choose one of stop, skip"),
        ({"beam_width": 0}, r"beam_width=0 must be at least 1"),
    ],
)
def test_wrong_settings_are_one_clear_error(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        read_data(tmp_path, **settings)


def test_without_training_rows_a_model_must_bring_its_tokens(tmp_path):
    write_recordings(tmp_path / "test", OTHERS)
    args = SpeechRecognitionArguments(dataset=str(tmp_path), sampling_rate=8000)
    with pytest.raises(ValueError, match="the tokens of a recogniser are found in training rows; name a trained"):
        TASK.read(args, splits=["test"])


# ------------------------------------------------------------------------------------ a whole run


def test_a_run_trains_saves_evaluates_predicts_and_serves_the_pipeline(tmp_path, capsys):
    folder = tmp_path / "run"
    argv = ["--task", "speech_recognition", "--preset", "smoke", "--output_dir", folder, "--disable_tqdm", "true"]
    finetune.main([*map(str, argv), "--num_train_epochs", "12"])
    facts = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    assert facts["metrics"]["test/cer"] < 0.3
    assert facts["data"]["train"] == {"rows": 58, "minutes": pytest.approx(0.4, abs=0.11)}
    assert [figure["title"] for figure in facts["figures"]] == ["Spectrograms of the worst recordings"]
    for decoding in ("greedy", "beam"):
        evaluate.main(["--model", str(folder), "--decoding", decoding, "--batch_size", "5"])
        measured = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))["metrics"]
        if decoding == "greedy":
            assert measured["test/wer"] == facts["metrics"]["test/wer"]
        assert measured["test/loss"] == pytest.approx(facts["metrics"]["test/loss"], rel=1e-4)
    output = tmp_path / "heard.csv"
    predict.main(["--model", str(folder), "--input", str(TONES / "test"), "--output", str(output)])
    lines = list(csv.DictReader(output.open(encoding="utf-8")))
    assert list(lines[0]) == ["audio", "transcription", "label", "prediction"]
    samples, rate = soundfile.read(lines[0]["audio"], dtype="float32")
    recognise = pipeline("automatic-speech-recognition", model=str(folder))
    assert recognise({"raw": samples, "sampling_rate": rate})["text"].split() == lines[0]["prediction"].split()
    assert recognise(samples, return_timestamps="char")["chunks"]
    assert type(AutoProcessor.from_pretrained(folder)).__name__ == "Wav2Vec2Processor"
