"""Denoising: what is measured, which tokens stand for gaps, and that a pretrained model fills them in."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from bmtk.data.tables import read_table
from bmtk.data.tokenizers import train_tokenizer
from bmtk.errors import UserError
from bmtk.models.configuration_bm_rnn import BmRnnConfig
from bmtk.models.configuration_bm_transformer import BmTransformerConfig
from bmtk.tasks.denoising import TASK, DenoisingArguments
from recipes import evaluate, predict, pretrain

ROOT = Path(__file__).parents[2]
LINES = ["the cat sat on the mat again", "a dog ran over the hill", "the old man and the sea"] * 8


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("\n".join(LINES) + "\n", encoding="utf-8")
    return path


SIZES = {"hidden_size": 16, "num_hidden_layers": 1}


def read(text, seed=42, model=None, **settings):
    sources = {"train_file": [str(text)], "validation_file": [str(text)], "sample_by": "line", "leakage": "allow"}
    args = DenoisingArguments(**{**sources, "vocab_size": 300, "context_length": 32, **settings})
    return TASK.read(args, folder=text.parent / "run", seed=seed, model=model)


def bind(text, **settings):
    data = read(text, **settings)
    return data.bind(data.new_config("bm_rnn", SIZES))


def test_measured_rows_are_corrupted_alike_whatever_the_seed_and_training_rows_are_not(text):
    one, other = bind(text), bind(text, seed=1)
    for split, same in (("validation", True), ("train", False)):
        batches = [each.rows[split].batch([0, 1], [0, 0])["input_ids"] for each in (one, other)]
        assert torch.equal(*batches) == same
    assert not torch.equal(*(one.rows["train"].batch([0], [epoch])["input_ids"] for epoch in (0, 1)))


def test_gaps_are_tokens_of_their_own_and_the_tokenizer_keeps_them(text, tmp_path):
    objective = bind(text, noise_density=0.3)  # 10 of 32 tokens, 3 spans
    names = objective.processor.convert_ids_to_tokens(objective.sentinels)
    assert names == ["<extra_id_0>", "<extra_id_1>", "<extra_id_2>"]
    batch = objective.rows["train"].batch([0], [0])
    assert [token for token in batch["input_ids"][0].tolist() if token in objective.sentinels] == objective.sentinels
    assert objective.num_units(batch) == objective.units_per_row("train") == 32 + 2 * 3 + 1
    objective.processor.save_pretrained(tmp_path / "saved")
    saved = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert saved("a<extra_id_1>b")["input_ids"][1] == objective.sentinels[1]


@pytest.mark.parametrize("config_class", [BmRnnConfig, BmTransformerConfig])
def test_the_loss_is_the_models_own_over_the_whole_split(text, config_class):
    data = read(text)
    fields = {name: value for name, value in data.config_fields.items() if hasattr(config_class(), name)}
    config = config_class(**{**fields, **SIZES})
    objective = data.bind(config)
    model, rows = AutoModelForSeq2SeqLM.from_config(config).eval(), objective.rows["validation"]
    whole = rows.batch(range(len(rows)), [0] * len(rows))
    parts = [rows.batch([row], [0]) for row in range(len(rows))]
    scorer = objective.scorer
    scores = scorer.score([p for part in parts for p in scorer.predict(model, part)], rows)
    assert scores["loss"] == pytest.approx(model(**whole).loss.item(), rel=1e-5)
    assert scores["tokens"] == int((whole["labels"] != -100).sum())


def test_a_model_or_text_that_knows_no_gaps_is_refused(text, tmp_path):
    with pytest.raises(ValueError, match=r"is_encoder_decoder=False\); denoising needs an encoder-decoder"):
        read(text).bind(BmTransformerConfig(vocab_size=400))
    (tmp_path / "texts.csv").write_text("text\nno gap\n", encoding="utf-8")
    with pytest.raises(ValueError, match="input row 1 has no <extra_id_0> to be filled in; write one"):
        bind(text).encode_inputs(read_table([tmp_path / "texts.csv"]))
    plain = tmp_path / "plain"
    BmTransformerConfig(vocab_size=300).save_pretrained(plain)
    train_tokenizer(LINES, kind="byte_bpe", vocab_size=300).save_pretrained(plain)
    with pytest.raises(ValueError, match="plain has no <extra_id_0>: that model was not trained to fill in 2 spans"):
        _ = read(text, model=str(plain)).tokenizer


def test_noise_that_cannot_be_is_refused_before_any_length_is_computed_with_it():
    with pytest.raises(UserError, match=r"noise_density=0\.15 must be between 0 and 1, mean_span_length=0 at"):
        DenoisingArguments(dataset="anywhere", mean_span_length=0)


@pytest.mark.trains
def test_a_run_learns_is_evaluated_and_fills_in_gaps(text, tmp_path, monkeypatch, seed_argv):
    monkeypatch.chdir(ROOT)
    folder = tmp_path / "out"
    sizes = "--hidden_size 32 --num_hidden_layers 1 --num_attention_heads 2 --num_train_steps 40 --batch_size 8"
    files = [
        "--train_file",
        str(text),
        "--validation_file",
        str(text),
        "--context_length",
        "32",
        "--vocab_size",
        "300",
        "--leakage",
        "allow",
    ]
    argv = ["--task", "denoising", "--preset", "smoke", "--output_dir", str(folder), *files, *sizes.split()]
    pretrain.main([*argv, *seed_argv])
    run = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    assert run["metrics"]["validation/loss"] < 5.0
    assert run["samples"][0]["text"].startswith("\n -> ")
    evaluate.main(["--model", str(folder), "--split", "validation"])
    metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))["metrics"]
    assert metrics["validation/loss"] == pytest.approx(run["metrics"]["validation/loss"], rel=1e-4)
    (tmp_path / "gaps.csv").write_text("text\nthe cat<extra_id_0> the mat\n", encoding="utf-8")
    output = tmp_path / "filled.csv"
    predict.main(["--model", str(folder), "--input", str(tmp_path / "gaps.csv"), "--output", str(output)])
    assert output.read_text(encoding="utf-8").startswith("text,prediction\n")
