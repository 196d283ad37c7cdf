"""Translation: pairs, loss, search and metrics, against literal values, transformers and a BLEU written out here."""

import csv
import json
import math
import re
from collections import Counter
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    BartConfig,
    BartForConditionalGeneration,
    DataCollatorForSeq2Seq,
    T5Config,
    T5ForConditionalGeneration,
)

from bmtk.data.tokenizers import train_tokenizer
from bmtk.models.configuration_bm_rnn import BmRnnConfig
from bmtk.models.configuration_bm_transformer import BmTransformerConfig
from bmtk.tasks.figures import sentence_scores
from bmtk.tasks.translation import TASK, PadPairs, TranslationArguments
from bmtk.training.finetuning_arguments import FineTuningArguments
from bmtk.training.trainer import build_trainer
from recipes import evaluate, finetune, predict

ROOT = Path(__file__).parents[2]
TRAIN = [("ein Hund", "a dog"), ("zwei Hunde", "two dogs"), ("ein Haus am See", "a house at the lake"), ("Tag", "day")]
OTHERS = [
    ("zwei Häuser", "two houses"),
    ("ein See", "a lake"),
    ("ein Tag am See mit Hund", "a day at the lake with a dog"),
]
SIDES = {"source_language": "de", "target_language": "en"}


def write_pairs(path, rows):
    lines = [json.dumps({"translation": {"de": source, "en": target}}) for source, target in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return [str(path)]


def read_data(tmp_path, train=TRAIN, validation=OTHERS, model=None, **settings):
    files = {"train_file": write_pairs(tmp_path / "train.jsonl", train)}
    files["validation_file"] = write_pairs(tmp_path / "validation.jsonl", validation)
    options = {**files, **SIDES, "vocab_size": 300, "max_target_length": 12, **settings}
    return TASK.read(TranslationArguments(**options), model=model)


def bound(data, config_class=BmTransformerConfig, **fields):
    sizes = {"hidden_size": 16, "num_hidden_layers": 1}
    if config_class is BmTransformerConfig:
        sizes |= {"num_attention_heads": 2, "max_position_embeddings": 64}
    return data.bind(config_class(**{**data.config_fields, **sizes, **fields}))


def built(objective):
    torch.manual_seed(0)
    return AutoModelForSeq2SeqLM.from_config(objective.config).eval()


# Rows ----------------------------------------------------------------------------------------------------------------


def test_pairs_columns_named_after_languages_and_named_columns_give_the_same_rows(tmp_path):
    of_pairs = read_data(tmp_path).rows["train"]
    assert list(of_pairs["source"]) == [source for source, _ in TRAIN]
    assert list(of_pairs["target"]) == [target for _, target in TRAIN]
    for columns, settings in {("de", "en"): SIDES, ("x", "y"): {"source_column": "x", "target_column": "y"}}.items():
        with (tmp_path / "train.csv").open("w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows([columns, *TRAIN])
        args = TranslationArguments(train_file=[str(tmp_path / "train.csv")], **settings, validation_fraction=0.25)
        rows = [row for part in TASK.read(args, seed=1).rows.values() for row in part]
        assert sorted((row["source"], row["target"]) for row in rows) == sorted(TRAIN)


def test_both_sides_end_with_the_one_special_token_and_lower_case_is_in_the_tokenizer(tmp_path):
    objective = bound(read_data(tmp_path, lower_case=True))
    row, tokenizer = objective.rows["train"][2], objective.processor
    assert tokenizer.decode(row["input_ids"]) == "ein haus am see<|endoftext|>"
    assert tokenizer.decode(row["labels"]) == "a house at the lake<|endoftext|>"
    assert row["length"] == len(row["input_ids"]) + len(row["labels"])
    assert tokenizer("Ein Haus am See")["input_ids"] == row["input_ids"]  # all that a user of the model has to do
    objective = bound(read_data(tmp_path))
    assert objective.processor.decode(objective.rows["train"][2]["input_ids"]) == "ein Haus am See<|endoftext|>"


def test_long_texts_are_cut_before_their_end_token_with_a_note(tmp_path):
    objective = bound(read_data(tmp_path, max_length=4, max_target_length=3, tokenizer="char", vocab_size=100))
    assert objective.processor.decode(objective.rows["train"][0]["input_ids"]) == "ein<|endoftext|>"
    assert objective.processor.decode(objective.rows["train"][0]["labels"]) == "a <|endoftext|>"
    assert objective.processor.decode(objective.rows["train"][3]["input_ids"]) == "Tag<|endoftext|>"
    of_sources = "3 of 4 train source texts (75.0%) are longer than 4 tokens and were cut"
    assert {of_sources, "4 of 4 train target texts (100.0%) are longer than 3 tokens and were cut"} <= set(
        objective.notes
    )
    for option in ("max_length", "max_target_length"):
        with pytest.raises(ValueError, match=f"^{option}=65 exceeds the model's limit of 64 tokens; lower it"):
            bound(read_data(tmp_path, **{option: 65}))


def test_rows_without_a_text_on_either_side_are_left_out_with_a_note(tmp_path):
    data = read_data(tmp_path, [*TRAIN, ("", "nothing"), ("nichts", " ")])
    assert len(data.rows["train"]) == 4
    assert data.notes == ["1 of 6 train rows have no text: left out", "1 of 5 train rows have no text: left out"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"source_language": None},
            r"^source_language and source_column are not set: name the language of the source",
        ),
        (
            {"target_language": "fr"},
            r"^target_language='fr' is not in 'translation' of the train data: it has de, en$",
        ),
        ({"target_column": "english"}, r"^target_column='english' is not in the train data; its columns are transl"),
        ({"translation_column": "pairs"}, r"^source_language='de' is not in the train data; its columns are transl"),
        ({"train": [("", "x")]}, r"^source_language='de' of the train data holds no text at all"),
        ({"train": [("x", "")]}, r"^target_language='en' of the train data holds no text at all"),
        ({"num_beams": 0, "preview_rows": 0}, r"^num_beams=0, preview_rows=0 must be at least 1"),
        ({"max_target_length": 0}, r"^max_target_length=0 must be at least 1"),
        ({"max_length": 0}, r"^max_length=0 must be at least 1 token"),
        ({"bleu_tokenizer": "moses"}, r"^bleu_tokenizer='moses' is unknown; choose one of 13a, zh, char, intl, none"),
    ],
)
def test_bad_data_is_one_clear_error(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        read_data(tmp_path, **settings)


def test_a_column_that_is_no_pair_is_refused(tmp_path):
    (tmp_path / "flat.jsonl").write_text('{"translation": "ein Hund"}\n' * 9, encoding="utf-8")
    args = TranslationArguments(train_file=[str(tmp_path / "flat.jsonl")], **SIDES)
    with pytest.raises(
        ValueError, match="source_language='de' is not in 'translation' of the train data: it has no pai"
    ):
        TASK.read(args)


def test_a_checkpoint_that_is_no_encoder_decoder_is_refused(tmp_path):
    data = read_data(tmp_path)
    with pytest.raises(
        ValueError, match=r"\(model_type bm_transformer, is_encoder_decoder=False\); translation needs"
    ):
        bound(data, is_encoder_decoder=False)


# Batches and loss ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_class", [T5ForConditionalGeneration, BartForConditionalGeneration])
def test_a_batch_is_what_transformers_makes_of_it(tmp_path, model_class):
    data = read_data(tmp_path)
    sizes = {"vocab_size": 300, "pad_token_id": 0, "eos_token_id": 0}
    if model_class is T5ForConditionalGeneration:
        config = T5Config(**sizes, d_model=16, d_ff=16, d_kv=8, num_layers=1, num_heads=2, decoder_start_token_id=0)
    else:
        config = BartConfig(**sizes, d_model=16, encoder_layers=1, decoder_layers=1, decoder_start_token_id=2)
    model = model_class(config)
    objective = data.bind(model.config)
    rows = [{name: row[name] for name in ("input_ids", "labels")} for row in objective.rows["train"]]
    ours = objective.collator()(rows)
    theirs = DataCollatorForSeq2Seq(objective.processor, model=model)(rows)
    assert set(ours) == set(theirs)
    for name, values in theirs.items():
        assert torch.equal(ours[name], values), name


def test_rows_without_targets_make_a_batch_without_labels():
    batch = PadPairs(pad_id=9, start_id=1)([{"input_ids": [5, 6]}, {"input_ids": [7]}])
    assert {name: value.tolist() for name, value in batch.items()} == {
        "input_ids": [[5, 6], [7, 9]],
        "attention_mask": [[1, 1], [1, 0]],
    }


@pytest.mark.parametrize("config_class", [BmRnnConfig, BmTransformerConfig])
def test_the_loss_is_the_models_own_and_that_of_parts_adds_up(tmp_path, config_class):
    objective = bound(read_data(tmp_path), config_class)
    model, rows = built(objective), list(objective.rows["train"])
    whole = objective.collator()(rows)
    count = objective.num_items(whole)
    assert count == sum(len(row["labels"]) for row in rows)
    assert objective.num_units(whole) == sum(row["length"] for row in rows)
    outputs = model(**{name: value for name, value in whole.items() if name != "labels"})
    own = model(**whole).loss * count
    assert torch.allclose(objective.criterion(outputs, whole), own, rtol=1e-5)
    parts = [objective.scorer.predict(model, objective.collator()(part)) for part in (rows[:3], rows[3:])]
    predictions = [prediction for part in parts for prediction in part]
    assert sum(p["loss"] for p in predictions) == pytest.approx(own.item(), rel=1e-5)
    assert [p["items"] for p in predictions] == [len(row["labels"]) for row in rows]


def test_label_smoothing_mixes_in_the_mean_over_all_tokens(tmp_path):
    objective = bound(read_data(tmp_path))
    logits, labels = torch.randn(2, 3, 7), torch.tensor([[1, 2, -100], [3, 0, 6]])
    expected = 0.0
    for row, column in (labels != -100).nonzero().tolist():
        log_probability = logits[row, column].double().log_softmax(-1)
        expected -= 0.8 * log_probability[labels[row, column]].item() + 0.2 * log_probability.mean().item()
    loss = objective.criterion({"logits": logits}, {"labels": labels}, label_smoothing=0.2)
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def trained(objective, folder, *, batch_size, accumulation):
    """Weights after one step of plain gradient descent over all training rows."""
    args = FineTuningArguments(
        str(folder), eval_strategy="no", save_strategy="no", optim="sgd", learning_rate=1.0, max_steps=1, use_cpu=True,
        per_device_train_batch_size=batch_size, gradient_accumulation_steps=accumulation, max_grad_norm=0.0,
        disable_tqdm=True, report_to="none", label_smoothing_factor=0.1, lr_scheduler_type="constant",
    )  # fmt: skip
    model = built(objective)
    build_trainer(model, objective, args, folder=folder).train()
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def test_a_step_is_the_same_whatever_the_batch_size_and_accumulation(tmp_path):
    objective = bound(read_data(tmp_path))
    whole = trained(objective, tmp_path, batch_size=4, accumulation=1)
    parts = trained(objective, tmp_path, batch_size=1, accumulation=4)
    assert torch.allclose(whole, parts, atol=1e-5)
    other = trained(objective, tmp_path, batch_size=1, accumulation=2)
    assert not torch.allclose(whole, other, atol=1e-3)


# Search --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config_class", [BmRnnConfig, BmTransformerConfig])
def test_what_a_row_becomes_depends_on_no_other_row(tmp_path, config_class):
    """Padding is the end token here, on both sides."""
    objective = bound(read_data(tmp_path, num_beams=3), config_class, initializer_range=0.5)
    model, predict, collate = built(objective), objective.scorer.predict, objective.collator()
    rows = list(objective.rows["validation"])
    together = predict(model, collate(rows))
    alone = [predict(model, collate([row]))[0] for row in rows]
    assert [p["text"] for p in together] == [p["text"] for p in alone]
    assert len({p["text"] for p in together}) == 3
    unlabelled = [{"input_ids": row["input_ids"]} for row in rows]
    assert predict(model, collate(unlabelled)) == [{"text": p["text"]} for p in together]


def test_beams_find_likelier_translations_than_the_likeliest_token_does(tmp_path):
    objective = bound(read_data(tmp_path, num_beams=4, length_penalty=0.0), initializer_range=0.3)
    model = built(objective)
    batch = objective.collator()(list(objective.rows["validation"]))
    source = {name: batch[name] for name in ("input_ids", "attention_mask")}

    def likelihood(options):
        written = model.generate(**source, **options)
        logits = model(**source, decoder_input_ids=written[:, :-1]).logits.log_softmax(-1)
        taken = logits.gather(-1, written[:, 1:, None]).squeeze(-1)
        ended = (written[:, 1:] == 0).cumsum(1) - (written[:, 1:] == 0).long()
        return taken.masked_fill(ended > 0, 0.0).sum(1)

    greedy, beams = (likelihood(objective.search_options(num_beams)) for num_beams in (1, 4))
    assert (beams >= greedy - 1e-4).all()
    assert (beams > greedy + 1e-2).any()


def test_previews_are_greedy_over_the_first_rows_with_a_note(tmp_path):
    objective = bound(read_data(tmp_path, preview_rows=2, num_beams=4), initializer_range=0.3)
    model, scorer = built(objective), objective.scorer
    assert list(objective.preview_rows()["source"]) == [source for source, _ in OTHERS[:2]]
    assert objective.notes[-1] == (
        "evaluations while training translate the first 2 validation rows with num_beams=1, those in the end all rows "
        "with num_beams=4"
    )
    batch = objective.collator()(list(objective.rows["validation"]))
    source = {name: batch[name] for name in ("input_ids", "attention_mask")}
    for predicted, beams in ((scorer.preview, 1), (scorer.predict, 4)):
        written = model.generate(**source, max_new_tokens=12, num_beams=beams)
        texts = objective.processor.batch_decode(written, skip_special_tokens=True)
        assert [p["text"] for p in predicted(model, batch)] == [text.strip() for text in texts]


def test_an_evaluation_batches_the_longest_rows_first_and_gives_predictions_in_the_rows_order(tmp_path):
    objective = bound(read_data(tmp_path))
    args = FineTuningArguments(
        str(tmp_path), per_device_eval_batch_size=2, use_cpu=True, report_to="none", disable_tqdm=True
    )
    trainer = build_trainer(built(objective), objective, args, folder=tmp_path)
    rows = objective.rows["validation"]
    widths = [batch["input_ids"].shape[1] for batch in trainer.get_eval_dataloader(rows)]
    assert widths == sorted(map(len, rows["input_ids"]), reverse=True)[::2]
    items = [prediction["items"] for prediction in trainer.predict(rows).predictions]
    assert items == list(map(len, rows["labels"]))
    assert items != sorted(items, reverse=True)


def test_a_saved_model_searches_as_the_evaluation_does(tmp_path):
    objective = bound(read_data(tmp_path, num_beams=3, length_penalty=1.5))
    model = built(objective)
    objective.prepare_to_save(model)
    model.save_pretrained(tmp_path / "model")
    saved = json.loads((tmp_path / "model" / "generation_config.json").read_text())
    assert saved.items() >= {"num_beams": 3, "length_penalty": 1.5, "max_new_tokens": 12}.items()
    assert saved["decoder_start_token_id"] == saved["eos_token_id"] == saved["pad_token_id"] == 0


# Metrics -------------------------------------------------------------------------------------------------------------


def bleu(texts, references):
    """Papineni et al. 2002, on words between blanks."""
    pairs = [(text.split(), reference.split()) for text, reference in zip(texts, references, strict=True)]
    logs = []
    for n in range(1, 5):
        hits = total = 0
        for text, reference in pairs:
            found = Counter(zip(*(text[i:] for i in range(n)), strict=False))
            true = Counter(zip(*(reference[i:] for i in range(n)), strict=False))
            hits, total = hits + sum((found & true).values()), total + sum(found.values())
        logs.append(math.log(hits / total))
    lengths = [sum(len(pair[side]) for pair in pairs) for side in (0, 1)]
    return 100 * min(1.0, math.exp(1 - lengths[1] / lengths[0])) * math.exp(sum(logs) / 4)


def predictions_of(texts):
    return [{"text": text, "loss": float(i), "items": 3} for i, text in enumerate(texts)]


def test_bleu_is_its_formula_over_the_whole_split_and_signatures_are_recorded(tmp_path):
    references = ["a dog runs over the green lawn", "two men sit on a bench by the lake", "a boy eats"]
    texts = ["A dog runs on the green lawn", "two men sit on a bench", "a boy eats"]
    pairs = list(zip("xyz", references, strict=True))
    objective = bound(read_data(tmp_path, validation=pairs, lower_case=True))
    scores = objective.scorer.score(predictions_of(texts), objective.rows["validation"])
    assert scores["bleu"] == pytest.approx(bleu([text.lower() for text in texts], references))
    assert scores["loss"] == (0 + 1 + 2) / 9
    assert scores["perplexity"] == pytest.approx(math.exp(1 / 3))
    signatures = objective.data_record()["signatures"]
    assert signatures["bleu"].startswith("nrefs:1|case:lc|eff:no|tok:13a|smooth:exp|version:")
    assert signatures["chrf"].startswith("nrefs:1|case:lc|eff:yes|nc:6|nw:0|space:no|version:")
    exact = bound(read_data(tmp_path, validation=pairs))
    scores = exact.scorer.score(predictions_of(texts), exact.rows["validation"])
    assert scores["bleu"] == pytest.approx(bleu(texts, references))


def test_chinese_is_cut_into_characters(tmp_path):
    pairs = [("let me in", "请让我马上进去吧"), ("day", "日子")]
    objective = bound(read_data(tmp_path, validation=pairs, target_language="en"))
    chinese = TranslationArguments(**SIDES | {"target_language": "zh"})
    predictions = predictions_of(["请让我马上进来吧", "日子"])
    assert objective.scorer.score(predictions, objective.rows["validation"])["bleu"] < 10
    objective.args = chinese
    spaced = [" ".join(text) for text in ("请让我马上进来吧", "日子")], [" ".join(target) for _, target in pairs]
    assert objective.scorer.score(predictions, objective.rows["validation"])["bleu"] == pytest.approx(bleu(*spaced))
    assert "tok:zh" in objective.data_record()["signatures"]["bleu"]


def test_samples_come_from_all_over_and_then_the_worst_by_chrf(tmp_path):
    objective = bound(read_data(tmp_path))
    scorer, rows = objective.scorer, objective.rows["validation"]
    predictions = predictions_of(["two houses", "xyz", "a day at a lake"])
    assert scorer.samples(predictions, rows, count=1) == [
        {"prompt": "zwei Häuser", "text": "\n -> two houses\n    (reference: two houses)"},
        {"prompt": "ein See", "text": "\n -> xyz\n    (reference: a lake)"},
    ]
    table = scorer.table(predictions, rows).splitlines()
    assert re.fullmatch(r"  source tokens +rows +loss +BLEU +chrF", table[0])
    assert sum(int(line.split("  ")[-4]) for line in (re.sub(" {2,}", "  ", line) for line in table[1:])) == 3
    assert scorer.describe(predictions[1]) == {"prediction": "xyz"}


@pytest.mark.parametrize(
    ("lengths", "named"),
    [([3, 5, 5, 8], {"3", "4-5", "6-8"}), ([3, 3, 3, 3], {"3"}), ([2, 3, 9, 9], {"2", "3", "4-9"})],
)
def test_the_figure_puts_every_sentence_under_its_length(lengths, named, monkeypatch):
    groups = {}

    def boxplot(self, values, *, tick_labels, **options):
        groups.update(zip(tick_labels, map(len, values), strict=True))

    monkeypatch.setattr("matplotlib.axes.Axes.boxplot", boxplot)
    figure = sentence_scores([10.0, 50.0, 50.0, 90.0], lengths)
    assert figure["title"] == "Quality of each sentence"
    assert "<svg" in figure["svg"]
    assert set(groups) == named
    assert sum(groups.values()) == 4


# Whole runs ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def in_the_repository(monkeypatch):
    monkeypatch.chdir(ROOT)


def test_the_smoke_run_learns_is_evaluated_and_translates(in_the_repository, tmp_path, capsys):
    folder = tmp_path / "run"
    config = str(ROOT / "recipes" / "configs" / "translation" / "smoke.yaml")
    finetune.main(["--config", config, "--output_dir", str(folder), "--disable_tqdm", "true"])
    out = capsys.readouterr().out
    run = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    assert run["metrics"]["test/bleu"] > 95
    assert "tok:13a" in run["data"]["signatures"]["bleu"]
    evaluate.main(["--model", str(folder)])
    metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))["metrics"]
    assert metrics["test/bleu"] == pytest.approx(run["metrics"]["test/bleu"])
    assert metrics["test/loss"] == pytest.approx(run["metrics"]["test/loss"], rel=1e-4)

    (tmp_path / "new.csv").write_text("english\nFour red birds see five small dogs.\nTwo dogs hear six trees.\n")
    output = tmp_path / "translated.csv"
    predict.main(["--model", str(folder), "--input", str(tmp_path / "new.csv"), "--output", str(output)])
    rows = list(csv.DictReader(output.open(encoding="utf-8")))
    assert [row["prediction"] for row in rows] == [
        "vidas avilo ruji fo kanilo mikki pim.",
        "audas kanilo du arvuro sek.",
    ]
    write_pairs(tmp_path / "pairs.jsonl", [("Two dogs hear six trees.", "?")])
    output = tmp_path / "translated.jsonl"
    argv = ["--source_column", "", "--source_language", "de", "--output", str(output)]
    predict.main(["--model", str(folder), "--input", str(tmp_path / "pairs.jsonl"), *argv])
    assert json.loads(output.read_text(encoding="utf-8")) == {
        "translation": {"de": "Two dogs hear six trees.", "en": "?"},
        "prediction": "audas kanilo du arvuro sek.",
    }
    capsys.readouterr()
    command = re.search(r'^next: python -c "(.*)"$', out, re.MULTILINE)[1]
    exec(command)  # transformers 5 has no pipeline for translation: this is what the run prints instead
    assert re.fullmatch(r"\['[a-z ]+\.'\]\n", capsys.readouterr().out)


@pytest.fixture
def t5(tmp_path):
    """A folder with a tiny T5, whose padding is not its end token."""
    texts = [text for pair in TRAIN for text in pair]
    tokenizer = train_tokenizer(texts, kind="byte_bpe", vocab_size=300)
    tokenizer.add_special_tokens({"eos_token": "</s>"})
    config = T5Config(
        vocab_size=len(tokenizer), d_model=16, d_ff=16, d_kv=8, num_layers=1, num_heads=2,
        pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id, decoder_start_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    T5ForConditionalGeneration(config).save_pretrained(tmp_path / "t5")
    tokenizer.save_pretrained(tmp_path / "t5")
    return tmp_path / "t5"


def test_a_model_of_the_hub_is_fine_tuned_with_its_own_tokens_and_a_prefix(tmp_path, t5, in_the_repository):
    files = ["--train_file", *write_pairs(tmp_path / "train.jsonl", TRAIN)]
    files += ["--validation_file", *write_pairs(tmp_path / "validation.jsonl", OTHERS)]
    sides = ["--source_language", "de", "--target_language", "en", "--prefix", "translate German to English: "]
    short = ["--num_train_epochs", "1", "--max_target_length", "8", "--disable_tqdm", "true"]
    argv = ["--task", "translation", "--model", str(t5), "--output_dir", str(tmp_path / "run"), *files, *sides, *short]
    finetune.main(argv)
    run = json.loads((tmp_path / "run" / "run.json").read_text(encoding="utf-8"))
    assert run["model"]["model_type"] == "t5"
    assert {"validation/bleu", "validation/chrf", "validation/loss", "validation/perplexity"} == set(run["metrics"])
    args = TranslationArguments(test_file=[str(tmp_path / "validation.jsonl")], **SIDES, prefix="translate: ")
    objective = TASK.read(args, model=str(t5), splits=["test"]).bind(T5Config.from_pretrained(t5))
    assert objective.processor.decode(objective.rows["test"][1]["input_ids"]) == "translate: ein See</s>"
    assert objective.processor.decode(objective.rows["test"][1]["labels"]) == "a lake</s>"


def test_a_causal_language_model_is_not_taken_for_a_translator(tmp_path, in_the_repository):
    folder = tmp_path / "causal"
    sizes = {"vocab_size": 300, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    AutoModelForCausalLM.from_config(BmTransformerConfig(**sizes)).save_pretrained(folder)
    train_tokenizer(["a dog"], kind="byte_bpe", vocab_size=300).save_pretrained(folder)
    files = ["--test_file", *write_pairs(tmp_path / "test.jsonl", OTHERS)]
    sides = ["--source_language", "de", "--target_language", "en"]
    with pytest.raises(ValueError, match=r"causal reads and writes one row .* translation needs an encoder-decoder"):
        evaluate.main(["--model", str(folder), "--task", "translation", *files, *sides])
    assert AutoTokenizer.from_pretrained(folder).eos_token_id == 0
