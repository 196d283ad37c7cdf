"""Several labels of a row, and numbers: how columns are read, losses and metrics, and a whole run of each."""

import csv
import json

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, List, Value
from sklearn.metrics import average_precision_score, f1_score, r2_score
from torch.nn import functional as F
from transformers import AutoModelForSequenceClassification, BertConfig, pipeline

from bmtk.metrics.labels import several_labels_scores
from bmtk.metrics.numbers import regression_scores
from bmtk.models.configuration_bm_transformer import BmTransformerConfig
from bmtk.tasks.image_classification import mixed_labels
from bmtk.tasks.sequence_classification import TASK, SequenceClassificationArguments
from bmtk.training.updates import divides_by_count
from recipes import evaluate, finetune, predict

TEXTS = ["a", "b", "c", "d"]


def write(path, columns):
    Dataset.from_dict(columns).to_json(path) if path.suffix == ".jsonl" else Dataset.from_dict(columns).to_csv(path)
    return [str(path)]


def bound(tmp_path, labels, validation=None, *, suffix=".jsonl", **settings):
    files = {"train_file": write(tmp_path / f"train{suffix}", {"text": TEXTS[: len(labels)], "label": labels})}
    validation = labels[:1] if validation is None else validation
    columns = {"text": ["e", "f"][: len(validation)], "label": validation}
    files["validation_file"] = write(tmp_path / f"validation{suffix}", columns)
    data = TASK.read(SequenceClassificationArguments(**{**files, "vocab_size": 300, **settings}))
    return data.bind(BmTransformerConfig(**{**data.config_fields, "max_position_embeddings": 16}))


def batch_of(objective, split="train"):
    return objective.collator()(list(objective.rows[split]))


@pytest.mark.parametrize(
    ("labels", "settings"),
    [
        (["a", "b", "a", "b"], {}),
        ([0, 1, 2, 3], {"label_names": list("abcdef")}),
        ([["a"], ["a", "b"], [], ["b"]], {}),
        ([0.5, 1.5, 2, 3], {}),
    ],
)
def test_all_that_is_measured_is_named(tmp_path, labels, settings):
    objective = bound(tmp_path, labels, **settings)
    predictions = objective.labels.kind.predictions(torch.randn(4, len(objective.labels.names)))
    for prediction, truth in zip(predictions, batch_of(objective)["labels"].tolist(), strict=True):
        prediction |= {"truth": truth, "loss": 0.0, "items": 1}
    assert set(objective.scorer.metrics) == set(objective.scorer.score(predictions))


def test_lists_are_several_labels_and_may_be_empty(tmp_path):
    objective = bound(tmp_path, [["red", "round"], [], ["round"], ["old"]], [["old"], []])
    assert (objective.config.problem_type, objective.config.num_labels) == ("multi_label_classification", 3)
    assert objective.labels.names == ["old", "red", "round"]
    labels = batch_of(objective)["labels"]
    assert labels.dtype == torch.float32
    assert labels.tolist() == [[0, 1, 1], [0, 0, 0], [0, 0, 1], [1, 0, 0]]
    assert objective.num_items({"labels": labels}) == 12
    assert objective.scorer.main_metric == "micro_f1"
    assert objective.decided_settings == {"problem_type": "multi_label_classification"}
    assert objective.notes[:2] == [
        "label_column='label' holds several labels a row: problem_type=multi_label_classification",
        "training labels: round 50.0%, old 25.0%, red 25.0% of the rows, 1.00 a row; 1 rows have none",
    ]


def test_a_text_is_cut_at_the_separator_and_numbers_take_names(tmp_path):
    objective = bound(
        tmp_path, ["0|2", "", " 1 | 0", "2"], suffix=".csv", label_separator="|", label_names=["x", "y", "z"]
    )
    assert objective.labels.names == ["x", "y", "z"]
    assert batch_of(objective)["labels"].tolist() == [[1, 0, 1], [0, 0, 0], [1, 1, 0], [0, 0, 1]]


def test_lists_of_class_labels_keep_their_names(tmp_path):
    kind = Features({"text": Value("string"), "label": List(ClassLabel(names=["1", "0"]))})
    rows = Dataset.from_dict({"text": TEXTS, "label": [[0], [1], [0, 1], []]}, features=kind)
    rows.to_parquet(tmp_path / "rows.parquet")
    objective = bound(tmp_path, [["0"]], train_file=[str(tmp_path / "rows.parquet")])
    assert list(objective.rows["train"]["labels"]) == [[0, 1], [1, 0], [1, 1], [0, 0]]  # the first name is "1"


def test_fractions_are_numbers(tmp_path):
    for suffix, labels in ((".jsonl", [1.5, 2.0, -3.0, 0.5]), (".csv", ["1.5", "2", "-3", "5e-1"])):
        objective = bound(tmp_path, labels, suffix=suffix)
        assert (objective.config.problem_type, objective.config.num_labels) == ("regression", 1)
        assert objective.config.id2label == {0: "label"}
        assert batch_of(objective)["labels"].tolist() == [1.5, 2.0, -3.0, 0.5]
        assert objective.notes[:2] == [
            "label_column='label' holds numbers with fractions: problem_type=regression",
            "training targets: -3 to 2, mean 0.25, standard deviation 1.953",
        ]
    assert bound(tmp_path, [1, 2, 3, 2]).config.problem_type == "single_label_classification"
    whole = bound(tmp_path, [1, 2, 3, 2], problem_type="regression")
    assert batch_of(whole)["labels"].tolist() == [1.0, 2.0, 3.0, 2.0]
    assert (whole.scorer.main_metric, whole.about["noun"], TASK.about["noun"]) == (
        "mse",
        "regression model",
        "text classifier",
    )


SEVERAL, NUMBERS = "multi_label_classification", "regression"


@pytest.mark.parametrize(
    ("labels", "settings", "message"),
    [
        ([1.5, None, 2.0], {}, "'label' of train row 2 holds None; regression needs a finite number: mend the row or"),
        (["1.5", "nan", "2"], {"suffix": ".csv"}, "of train row 2 holds 'nan'; regression needs a finite number"),
        (["x", "y"], {"problem_type": NUMBERS}, "of train row 1 holds 'x'; regression needs a finite number"),
        ([2.5, 2.5], {}, r"label_column='label' holds 2\.5 in all training rows"),
        ([1.5, 2.5], {"loss": "focal"}, "loss='focal' is not for regression; choose one of mse, mae, huber"),
        ([1.5, 2.5], {"label_names": ["x"]}, "label_names have no meaning for regression; leave them out"),
        ([1.5, 2.5], {"class_weights": ["balanced"]}, "class_weights have no meaning for regression; leave them out"),
        (
            ["x", "y"],
            {"loss": "mse"},
            "loss='mse' is not for single_label_classification; choose one of cross_entropy",
        ),
        (
            ["x|y", "y"],
            {"problem_type": SEVERAL},
            "of train row 1 holds 'x|y'; multi_label_classification needs a list",
        ),
        ([["x"], None], {}, "of train row 2 holds None; multi_label_classification needs a list of labels"),
        ([["x"], ["y", ""]], {}, "of train row 2 is empty; label the row or take it out"),
        (
            [[0, 1, 1], [1, 0, 0]],
            {},
            r"row 1 holds \[0, 1, 1\], with the same label twice; list the labels that the row",
        ),
        ([[], []], {}, "label_column='label' holds no label in all training rows"),
        (
            [["x"], ["y"]],
            {"validation": [["z"]]},
            r"labels that the training data does not have: 'z' \(first in row 1\)",
        ),
        ([["x"], ["y"]], {"problem_type": "ranking"}, "problem_type='ranking' is unknown; choose one of single_label"),
        ([["x"], ["y"]], {"label_separator": ""}, "label_separator='' separates nothing; name what stands between"),
        ([["x"], ["y"]], {"threshold": 1.0}, r"threshold=1\.0 is not a probability; choose between 0 and 1"),
    ],
)
def test_bad_columns_and_settings_are_one_clear_error(tmp_path, labels, settings, message):
    with pytest.raises(ValueError, match=message.replace("|", r"\|")):
        bound(tmp_path, labels, **settings)


@pytest.mark.parametrize(("problem", "outputs"), [(SEVERAL, 3), (NUMBERS, 1)])
def test_the_sum_over_the_number_of_items_is_the_loss_of_transformers_and_of_our_heads(tmp_path, problem, outputs):
    labels = {SEVERAL: [["x", "z"], [], ["y"], ["x"]], NUMBERS: [1.5, -2.0, 0.0, 4.0]}[problem]
    objective = bound(tmp_path, labels)
    objective.config.classifier_dropout = 0.0
    model = AutoModelForSequenceClassification.from_config(objective.config).eval()
    batch = batch_of(objective)
    assert divides_by_count(model, batch, {})
    logits = model(**objective.inputs_of(batch))["logits"]
    assert logits.shape == (4, outputs)
    ours = objective.criterion({"logits": logits}, batch) / objective.num_items(batch)
    assert ours.item() == pytest.approx(model(**batch).loss.item(), rel=1e-6)
    parts = [
        objective.criterion({"logits": logits[part]}, {"labels": batch["labels"][part]})
        for part in (slice(1), slice(1, 4))
    ]
    assert (sum(parts) / objective.num_items(batch)).item() == pytest.approx(ours.item(), rel=1e-6)
    predictions = objective.scorer.predict(model, batch)
    assert objective.scorer.score(predictions)["loss"] == pytest.approx(ours.item(), rel=1e-6)
    assert len(json.dumps(objective.scorer.describe(predictions[0]))) > 10
    mean = {"mean_value_mse": np.var([1.5, -2.0, 0.0, 4.0]), "mean_value_mae": (0.625 + 2.875 + 0.875 + 3.125) / 4}
    assert objective.scorer.baselines(predictions) == pytest.approx(mean if problem == NUMBERS else {})


def test_training_losses_of_numbers_are_their_formulas(tmp_path):
    logits, truth = torch.tensor([[0.0], [3.0], [-1.0]]), torch.tensor([0.5, 1.0, -1.0])
    expected = {"mse": 0.25 + 4.0, "mae": 0.5 + 2.0, "huber": 0.125 + 1.5}
    for loss, value in expected.items():
        objective = bound(tmp_path, [1.5, 2.5, 3.0], loss=loss)
        assert objective.criterion({"logits": logits}, {"labels": truth}).item() == pytest.approx(value)
    with pytest.raises(ValueError, match="label_smoothing_factor has no meaning for regression; leave it out"):
        objective.criterion({"logits": logits}, {"labels": truth}, label_smoothing=0.1)


def test_training_losses_of_several_labels_are_their_formulas(tmp_path):
    labels = [["x"], ["x", "y"], ["x"], []]
    settings = {"loss": "focal", "focal_gamma": 3.0, "class_weights": ["balanced"]}
    objective = bound(tmp_path, labels, **settings)
    assert objective.labels.kind.weights.tolist() == pytest.approx([1 / 3, 3.0])
    logits, truth, expected = torch.randn(4, 2), batch_of(objective)["labels"], 0.0
    for row, wanted in zip(logits.double().sigmoid().tolist(), truth.tolist(), strict=True):
        for probability, has, weight in zip(row, wanted, (1 / 3, 3.0), strict=True):
            right = probability if has else 1 - probability
            expected -= (weight if has else 1.0) * (1 - right) ** 3 * np.log(right)
    assert objective.criterion({"logits": logits}, {"labels": truth}).item() == pytest.approx(expected, rel=1e-5)
    plain = bound(tmp_path, labels)
    smooth = F.binary_cross_entropy_with_logits(logits, truth * 0.8 + 0.1, reduction="sum")
    assert plain.criterion({"logits": logits}, {"labels": truth}, label_smoothing=0.2).item() == pytest.approx(
        smooth.item(), rel=1e-6
    )


def test_mixed_rows_have_mixed_labels_whatever_these_are():
    shares = torch.tensor([0.25, 1.0])
    several = mixed_labels(torch.tensor([[1.0, 0], [1, 1]]), torch.tensor([[0.0, 1], [0, 0]]), shares, 2)
    assert several.tolist() == [[0.25, 0.75], [1.0, 1.0]]
    assert mixed_labels(torch.tensor([2.0, 4.0]), torch.tensor([6.0, 0.0]), shares, 1).tolist() == [5.0, 4.0]


def test_metrics_of_several_labels_equal_those_of_scikit_learn():
    draw = np.random.default_rng(0)
    truth, scores = draw.random((40, 5)) < 0.3, draw.random((40, 5))
    truth[:, 3] = False  # never true, but found: counts as F1 0, and has no average precision
    found = scores >= 0.6
    ours = several_labels_scores(truth, found, scores)
    assert ours["micro_f1"] == pytest.approx(f1_score(truth, found, average="micro"))
    assert ours["macro_f1"] == pytest.approx(f1_score(truth, found, average="macro", zero_division=0))
    assert ours["subset_accuracy"] == pytest.approx(
        np.mean([(a == b).all() for a, b in zip(truth, found, strict=True)])
    )
    there = [0, 1, 2, 4]
    assert ours["map"] == pytest.approx(average_precision_score(truth[:, there], scores[:, there], average="macro"))
    nothing = np.zeros((2, 3), bool)
    assert several_labels_scores(nothing, nothing, np.zeros((2, 3))) == {
        **dict.fromkeys(("micro_f1", "macro_f1", "map"), 0.0),
        "subset_accuracy": 1.0,
    }


def test_metrics_of_numbers_are_their_formulas():
    truth, predicted = np.array([1.0, 2.0, 4.0, 8.0]), np.array([1.5, 2.0, 3.0, 7.0])
    ours = regression_scores(truth, predicted)
    assert (ours["mse"], ours["mae"]) == (pytest.approx(2.25 / 4), pytest.approx(2.5 / 4))
    assert ours["r2"] == pytest.approx(r2_score(truth, predicted))
    assert ours["pearson"] == pytest.approx(np.corrcoef(truth, predicted)[0, 1])
    assert ours["spearman"] == pytest.approx(1.0)
    assert regression_scores(truth, predicted[::-1])["spearman"] == pytest.approx(-1.0)
    constant = regression_scores(truth, np.full(4, 2.0))
    assert np.isnan(constant["pearson"])
    assert np.isnan(constant["spearman"])
    assert constant["r2"] == pytest.approx(r2_score(truth, np.full(4, 2.0)))


def test_a_finished_model_decides_what_the_labels_of_its_rows_are(tmp_path):
    bound(tmp_path, [1.5, 2.5, 3.0]).processor.save_pretrained(tmp_path / "tokenizer")
    settings = {"tokenizer": str(tmp_path / "tokenizer")}
    whole = write(tmp_path / "test.jsonl", {"text": ["a", "b"], "label": [1, 2]})
    data = TASK.read(SequenceClassificationArguments(test_file=whole, **settings), splits=["test"])
    config = BertConfig(architectures=["BertForSequenceClassification"], id2label={0: "stars"}, vocab_size=300)
    message = "the model is for regression, and label_column='label' is read for single_label_.*; set problem_type=reg"
    with pytest.raises(ValueError, match=message):
        data.bind(config)
    args = SequenceClassificationArguments(test_file=whole, problem_type=NUMBERS, **settings)
    objective = TASK.read(args, splits=["test"]).bind(config)
    assert list(objective.rows["test"]["labels"]) == [1.0, 2.0]
    assert config.id2label == {0: "stars"}
    several = write(tmp_path / "several.jsonl", {"text": ["a", "b"], "label": [["x"], []]})
    data = TASK.read(SequenceClassificationArguments(test_file=several, **settings), splits=["test"])
    objective = data.bind(config, labels=["x", "y"])  # an adapter on that model knows better
    assert list(objective.rows["test"]["labels"]) == [[1.0, 0.0], [0.0, 0.0]]
    config = BertConfig(architectures=["BertForSequenceClassification"], id2label={0: "stars"}, vocab_size=300)
    without_rows = TASK.read(SequenceClassificationArguments(**settings), splits=()).bind(config)
    assert without_rows.labels.kind.name == NUMBERS
    assert without_rows.scorer.describe({"number": 1.23456789}) == {"prediction": 1.23457}


def test_a_loss_of_numbers_is_no_fault_before_rows_or_model_decide_what_the_labels_are(tmp_path):
    bound(tmp_path, [1.5, 2.5, 3.0]).processor.save_pretrained(tmp_path / "tokenizer")
    args = SequenceClassificationArguments(loss="huber", tokenizer=str(tmp_path / "tokenizer"))
    architectures = ["BertForSequenceClassification"]
    numbers = BertConfig(architectures=architectures, id2label={0: "stars"}, vocab_size=300)
    assert TASK.read(args, splits=()).bind(numbers).labels.kind.loss == "huber"
    labels = BertConfig(architectures=architectures, id2label={0: "bad", 1: "good"}, vocab_size=300)
    with pytest.raises(ValueError, match="loss='huber' is not for single_label_classification"):
        TASK.read(args, splits=()).bind(labels)


KINDS = {"food": ("soup", "bread"), "travel": ("train", "ferry"), "music": ("song", "drum")}


def corpus(path, seed, count):
    """Texts about any number of three things, and how many words of praise they hold."""
    draw, rows = np.random.default_rng(seed), []
    for number in range(count):
        kinds = [kind for kind in KINDS if draw.random() < 0.5]
        praise = int(draw.integers(4))
        words = [KINDS[kind][draw.integers(2)] for kind in kinds] + ["fine"] * praise + [f"n{seed}x{number}"]
        text = " ".join(np.array(words)[draw.permutation(len(words))])
        rows.append({"text": text, "about": kinds, "stars": praise / 2 + 1})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def run(tmp_path, column, *more):
    for seed, (name, count) in enumerate({"train": 256, "validation": 32, "test": 64}.items()):
        corpus(tmp_path / f"{name}.jsonl", seed, count)
    folder = tmp_path / "run"
    argv = ["--preset", "smoke", "--dataset", tmp_path, "--output_dir", folder, "--label_column", column, *more]
    finetune.main([*map(str, argv), "--tokenizer", "word", "--disable_tqdm", "true"])
    evaluate.main(["--model", str(folder)])
    facts = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    measured = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))["metrics"]
    assert measured == pytest.approx({key: facts["metrics"][key] for key in measured}, rel=1e-4)
    return folder, facts


@pytest.mark.trains
def test_a_run_of_several_labels_learns_and_serves_the_pipeline(tmp_path, seed_argv):
    folder, facts = run(tmp_path, "about", "--load_best_model_at_end", "true", *seed_argv)
    assert facts["metrics"]["test/micro_f1"] > 0.8
    assert facts["config"]["metric_for_best_model"] == "micro_f1"
    assert facts["config"]["problem_type"] == SEVERAL
    assert facts["figures"][0]["title"] == "Labels found, missed and wrongly given"
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert config["problem_type"] == SEVERAL
    predict.main(
        ["--model", str(folder), "--input", str(tmp_path / "test.jsonl"), "--output", str(tmp_path / "o.csv")]
    )
    line = next(csv.DictReader((tmp_path / "o.csv").open(encoding="utf-8")))
    classify = pipeline("text-classification", model=str(folder))
    scores = {found["label"]: found["score"] for found in classify(line["text"], top_k=None)}
    assert scores == pytest.approx(json.loads(line["scores"]), abs=1e-4)
    assert json.loads(line["prediction"]) == [name for name in sorted(KINDS) if scores[name] >= 0.5]


@pytest.mark.trains
def test_a_run_of_numbers_learns_and_serves_the_pipeline(tmp_path, seed_argv):
    folder, facts = run(tmp_path, "stars", "--loss", "huber", "--load_best_model_at_end", "true", *seed_argv)
    assert facts["metrics"]["test/r2"] > 0.5
    assert facts["metrics"]["test/loss"] == pytest.approx(facts["metrics"]["test/mse"])
    assert facts["config"]["metric_for_best_model"] == "mse"
    assert facts["config"]["greater_is_better"] is False
    assert facts["figures"][0]["title"] == "Predictions and truth"
    predict.main(
        ["--model", str(folder), "--input", str(tmp_path / "test.jsonl"), "--output", str(tmp_path / "o.csv")]
    )
    lines = list(csv.DictReader((tmp_path / "o.csv").open(encoding="utf-8")))
    assert np.corrcoef(*([float(line[key]) for line in lines] for key in ("stars", "prediction")))[0, 1] > 0.7
    found = pipeline("text-classification", model=str(folder))(lines[0]["text"])[0]
    assert found["label"] == "stars"
    assert found["score"] == pytest.approx(float(lines[0]["prediction"]), abs=1e-4)


@pytest.mark.parametrize("labels", [[98.5, 100.5, 103], [-0.5, 1000, 3]])
def test_numbers_far_from_0_are_noted_with_a_remedy(tmp_path, labels):
    notes = "\n".join(bound(tmp_path, labels).notes)
    assert "a new head starts at 0 and may not come this far: subtract the mean, divide by the deviation" in notes


def test_numbers_about_0_are_noted_without_one(tmp_path):
    assert "may not come this far" not in "\n".join(bound(tmp_path, [-0.5, 2.5, 5]).notes)
