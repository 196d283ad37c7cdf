"""Sequence classification: rows, labels, loss and metrics, against literal values and scikit-learn."""

import json
import re

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Value
from sklearn.dummy import DummyClassifier
from sklearn.metrics import (
    accuracy_score,
    f1_score,
    log_loss,
    precision_recall_fscore_support,
    top_k_accuracy_score,
)
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BertConfig, LlamaConfig

from bmtk.data.number_rows import NumberBatch, NumberRows
from bmtk.data.spelling import most_ngrams, spelled_tokens, spelling_table
from bmtk.data.tokenizers import train_tokenizer
from bmtk.errors import UserError
from bmtk.metrics.labels import scores_by_label
from bmtk.models.configuration_bm_cnn import BmCnnConfig
from bmtk.models.configuration_bm_transformer import BmTransformerConfig
from bmtk.tasks.label_types import class_weights
from bmtk.tasks.sequence_classification import TASK, SequenceClassificationArguments
from bmtk.tasks.texts import pad_texts

TRAIN = [("good soup", "good"), ("bad soup", "bad"), ("good day", "good"), ("bad day", "bad")]
OTHERS = [("fine soup", "good"), ("poor soup", "bad")]


def write_csv(path, rows, columns=("text", "label")):
    lines = [",".join(columns), *(f'"{text}",{label}' for text, label in rows)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return [str(path)]


def read_data(tmp_path, train=TRAIN, validation=OTHERS, **settings):
    """Rows of CSV files, with a byte tokenizer trained on them."""
    files = {"train_file": write_csv(tmp_path / "train.csv", train)}
    if validation:
        files["validation_file"] = write_csv(tmp_path / "validation.csv", validation)
    return TASK.read(SequenceClassificationArguments(**{**files, "vocab_size": 300, **settings}))


def bound(data, **fields):
    return data.bind(BmTransformerConfig(**{**data.config_fields, "max_position_embeddings": 16, **fields}))


def test_words_and_numbers_become_ids_in_a_stable_order(tmp_path):
    objective = bound(read_data(tmp_path))
    config = objective.config
    assert config.id2label == {0: "bad", 1: "good"}
    assert config.label2id == {"bad": 0, "good": 1}
    assert (config.num_labels, config.problem_type) == (2, "single_label_classification")
    assert list(objective.rows["train"]["labels"]) == [1, 0, 1, 0]
    many = bound(read_data(tmp_path, train=[(f"text {i}", i) for i in (10, 9, 2)], validation=[("text", 9)]))
    assert many.labels.names == ["2", "9", "10"]
    assert list(many.rows["validation"]["labels"]) == [1]


def test_a_preset_gives_a_new_model_its_shape_and_the_data_its_tokens(tmp_path):
    data = read_data(tmp_path)
    config = data.new_config("bm_cnn", {"hidden_size": 24}, preset="kim-cnn")
    assert (config.block_type, config.hidden_size) == ("multi_width", 24)
    assert config.filter_widths == BmCnnConfig.from_preset("kim-cnn").filter_widths
    assert config.vocab_size == len(data.tokenizer) != BmCnnConfig.from_preset("kim-cnn").vocab_size


def test_a_new_model_reads_ngrams_and_the_more_labels_there_are_the_fewer(tmp_path):
    data, many = read_data(tmp_path), read_data(tmp_path, train=[(f"text {i}", f"label {i}") for i in range(64)])
    assert data.new_config("bm_cnn", {"input_type": "tokens"}).ngram_buckets == 131_072
    assert many.new_config("bm_rnn", {}).ngram_buckets == 2**20 // 64
    assert data.new_config("bm_transformer", {"ngram_buckets": 0}).ngram_buckets == 0
    assert not hasattr(data.new_config("bert", {}), "ngram_buckets")


def test_a_new_model_reads_how_its_tokens_are_spelled(tmp_path):
    data = read_data(tmp_path, tokenizer="uncased_word", vocab_size=20)
    objective = data.bind(data.new_config("bm_cnn", {"input_type": "tokens", "hidden_size": 8}))
    model = AutoModelForSequenceClassification.from_config(objective.config)
    objective.prepare_to_save(model)
    spelling, token = model.ngrams.spelling, data.tokenizer.convert_tokens_to_ids
    width = min(32, most_ngrams(spelled_tokens(data.tokenizer)))
    assert spelling.shape == (len(data.tokenizer), width)
    assert np.array_equal(spelling[token("soup")], spelling_table(["soup"], width, 131_072)[0])
    assert not spelling[data.tokenizer.all_special_ids].any()
    without = AutoModelForSequenceClassification.from_config(bound(data, ngram_buckets=0).config)
    objective.prepare_to_save(without)  # nothing to write into


def test_rows_are_what_the_tokenizer_makes_of_the_texts(tmp_path):
    objective = bound(read_data(tmp_path))
    first = objective.rows["train"][0]
    assert first["input_ids"] == objective.processor("good soup")["input_ids"]
    assert sorted(first) == ["attention_mask", "input_ids", "labels"]
    batch = objective.collator()([objective.rows["train"][0], {"input_ids": [5], "attention_mask": [1], "labels": 0}])
    width = len(first["input_ids"])
    assert batch["input_ids"][1].tolist() == [5] + [objective.processor.pad_token_id] * (width - 1)
    assert batch["attention_mask"][1].tolist() == [1] + [0] * (width - 1)
    assert batch["labels"].tolist() == [1, 0]


@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl", "parquet"])
def test_every_kind_of_file_gives_the_same_rows(tmp_path, suffix):
    rows = Dataset.from_dict({"text": ["NA", "1e5", 'a "b", c'], "label": ["null", "x", "x"]})
    path = tmp_path / f"train.{suffix}"
    write = {"csv": rows.to_csv, "jsonl": rows.to_json, "parquet": rows.to_parquet}
    if suffix == "tsv":
        rows.to_csv(path, sep="\t")
    else:
        write[suffix](path)
    files = {"train_file": [str(path)], "validation_file": [str(path)]}
    args = SequenceClassificationArguments(**files, vocab_size=300, leakage="allow")
    data = TASK.read(args)
    assert list(data.rows["train"]["text"]) == ["NA", "1e5", 'a "b", c']
    assert list(data.rows["train"]["label"]) == ["null", "x", "x"]


def test_a_folder_is_read_by_the_names_of_its_files(tmp_path):
    write_csv(tmp_path / "train-00000.csv", TRAIN)
    write_csv(tmp_path / "dev.csv", OTHERS[:1])
    (tmp_path / "test").mkdir()
    write_csv(tmp_path / "test" / "part.csv", [*OTHERS, ("new", "good")])
    data = TASK.read(SequenceClassificationArguments(dataset=str(tmp_path), vocab_size=300))
    assert {split: len(rows) for split, rows in data.rows.items()} == {"train": 4, "validation": 1, "test": 3}
    one = write_csv(tmp_path / "other.csv", OTHERS)
    args = SequenceClassificationArguments(dataset=str(tmp_path), test_file=one, vocab_size=300)
    assert len(TASK.read(args).rows["test"]) == 2


def test_without_validation_rows_some_training_rows_are_held_out_and_noted(tmp_path):
    rows = [(f"text {i}", "xy"[i % 2]) for i in range(20)]
    data = read_data(tmp_path, train=rows, validation=None, validation_fraction=0.25)
    assert (len(data.rows["train"]), len(data.rows["validation"])) == (15, 5)
    with_test = read_data(tmp_path, rows, None, test_file=write_csv(tmp_path / "test.csv", OTHERS))
    assert list(with_test.rows) == ["train", "validation", "test"]
    held_out = set(data.rows["validation"]["text"])
    assert not held_out & set(data.rows["train"]["text"])
    assert data.notes == [
        "there are no validation rows: 5 of the 20 training rows are held out (validation_fraction=0.25, seed 42)"
    ]
    with pytest.raises(ValueError, match="1 training rows are too few to hold out 10% of them"):
        read_data(tmp_path, train=TRAIN[:1], validation=None)


def test_the_rows_that_are_held_out_are_those_of_datasets(tmp_path):
    path = write_csv(tmp_path / "train.csv", [(f"text {i}", "xy"[i % 2]) for i in range(20)])
    data = TASK.read(SequenceClassificationArguments(train_file=path, vocab_size=300), seed=7)
    parts = Dataset.from_dict({"text": [f"text {i}" for i in range(20)]}).train_test_split(2, seed=7)
    for split, part in (("train", "train"), ("validation", "test")):
        assert data.rows[split]["text"][:] == parts[part]["text"][:]


def test_rows_of_a_group_are_held_out_together(tmp_path):
    """As scikit-learn's GroupShuffleSplit has it: the share is one of groups."""
    lines = [f"text {i},{'xy'[i % 2]},speaker {i % 7}" for i in range(40)]
    path = tmp_path / "grouped.csv"
    path.write_text("\n".join(["text,label,speaker", *lines]))
    args = {"train_file": [str(path)], "vocab_size": 300, "validation_fraction": 0.3}
    data = TASK.read(SequenceClassificationArguments(**args, group_column="speaker"))
    of = {text: who for text, _, who in (line.split(",") for line in lines)}
    trained, held_out = ({of[text] for text in data.rows[split]["text"]} for split in ("train", "validation"))
    assert (len(trained), len(held_out), trained & held_out) == (5, 2, set())
    assert len(data.rows["train"]) + len(data.rows["validation"]) == 40
    count = len(data.rows["validation"])
    assert data.notes[0] == (
        f"there are no validation rows: {count} of the 40 training rows are held out, the rows of 2 values of "
        "'speaker' (validation_fraction=0.3, seed 42)"
    )
    with pytest.raises(ValueError, match=r"group_column='who' is not in the train data; its columns are text, label"):
        TASK.read(SequenceClassificationArguments(**args, group_column="who"))
    with pytest.raises(ValueError, match="2 values of 'label' are too few to hold out 20% of them"):
        TASK.read(SequenceClassificationArguments(**{**args, "validation_fraction": 0.2}, group_column="label"))


def test_label_names_name_integers(tmp_path):
    data = read_data(tmp_path, [("a", 1), ("b", 0)], [("c", 1)], label_names=["no", "yes"])
    assert list(data.rows["train"]["label"]) == ["yes", "no"]
    assert bound(data).config.id2label == {0: "no", 1: "yes"}
    with pytest.raises(
        ValueError, match=r"of train row 1 holds '2', which is neither one of label_names \('no', 'yes'\)"
    ):
        read_data(tmp_path, [("a", 2), ("b", 0)], [("c", 1)], label_names=["no", "yes"])


def test_class_labels_of_a_data_set_keep_their_names_and_secret_test_labels_are_left_out(tmp_path):
    kind = Features({"text": Value("string"), "label": ClassLabel(names=["neg", "pos"])})
    for split, labels in {"train": [1, 0], "validation": [0, 1], "test": [-1, -1]}.items():
        texts = [f"{split} a", f"{split} b"]
        Dataset.from_dict({"text": texts, "label": labels}, features=kind).to_parquet(tmp_path / f"{split}.parquet")
    data = TASK.read(SequenceClassificationArguments(dataset=str(tmp_path), vocab_size=300))
    assert list(data.rows["train"]["label"]) == ["pos", "neg"]
    assert "test" not in data.rows
    assert data.notes == ["the test rows have no labels and are not used"]


def test_a_fraction_is_no_label(tmp_path):
    rows = Dataset.from_dict({"text": ["a", "b"], "label": [1.0, 0.5]})
    rows.to_parquet(tmp_path / "train.parquet")
    with pytest.raises(ValueError, match=r"of train row 2 holds 0\.5; a label is a string or an integer"):
        read_data(tmp_path, train_file=[str(tmp_path / "train.parquet")], problem_type="single_label_classification")


def classifier_config(labels, data):
    names = {"id2label": dict(enumerate(labels)), "label2id": {name: i for i, name in enumerate(labels)}}
    architectures = ["BertForSequenceClassification"]
    return BertConfig(vocab_size=len(data.tokenizer), architectures=architectures, pad_token_id=0, **names)


def test_a_classifier_keeps_its_own_order_of_the_labels(tmp_path):
    data = read_data(tmp_path)
    objective = data.bind(classifier_config(["good", "so-so", "bad"], data))
    assert objective.labels.names == ["good", "so-so", "bad"]
    assert list(objective.rows["train"]["labels"]) == [0, 2, 0, 2]
    data = read_data(tmp_path, [("a", 0), ("b", 1)], [("c", 1)])
    by_number = data.bind(classifier_config(["good", "bad"], data))
    assert by_number.config.id2label == {0: "good", 1: "bad"}
    assert list(by_number.rows["validation"]["labels"]) == [1]


def test_a_classifier_for_other_labels_is_given_those_of_the_data(tmp_path):
    data = read_data(tmp_path)
    config = classifier_config(["sports", "politics", "arts"], data)
    data.bind(config)
    assert config.id2label == {0: "bad", 1: "good"}
    unnamed = read_data(tmp_path, [("a", 0), ("b", 1)], [("c", 1)])
    config = classifier_config(["LABEL_0", "LABEL_1"], unnamed)
    unnamed.bind(config)
    assert config.id2label == {0: "0", 1: "1"}


def test_evaluation_of_unknown_labels_is_refused(tmp_path):
    tokenizer = train_tokenizer(["some text"], kind="byte_bpe", vocab_size=300)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    args = SequenceClassificationArguments(
        test_file=write_csv(tmp_path / "test.csv", TRAIN), tokenizer=str(tmp_path / "tokenizer")
    )
    data = TASK.read(args, splits=["test"])
    config = classifier_config(["sports", "arts"], data)
    with pytest.raises(
        ValueError, match="the data has labels 'bad', 'good', and the model knows others: 'sports', 'ar"
    ):
        data.bind(config)


def test_long_texts_are_cut_and_their_share_is_noted(tmp_path):
    rows = [("12345678", "good"), ("12345678", "bad"), ("123456789", "good")]  # a token per character
    objective = bound(read_data(tmp_path, rows, [("1", "good")], tokenizer="char", max_length=8))
    assert list(map(len, objective.rows["train"]["input_ids"])) == [8, 8, 8]
    assert objective.notes == [
        "training labels: good 66.7%, bad 33.3%",
        "1 of 3 train texts (33.3%) are longer than 8 tokens and were cut",
    ]
    objective = bound(read_data(tmp_path, rows, [("1", "good")], tokenizer="char"), max_position_embeddings=7)
    assert list(map(len, objective.rows["train"]["input_ids"])) == [7, 7, 7]
    assert objective.notes[1] == "3 of 3 train texts (100.0%) are longer than 7 tokens and were cut"
    data = read_data(tmp_path, max_length=17)
    with pytest.raises(ValueError, match="max_length=17 exceeds the model's limit of 16 tokens; lower it"):
        bound(data)


def test_rows_without_text_are_left_out_and_noted(tmp_path):
    data = read_data(tmp_path, [*TRAIN, ("  ", "good"), ("", "bad")])
    assert len(data.rows["train"]) == 4
    assert data.notes == ["2 of 6 train rows have no text: left out"]
    with pytest.raises(ValueError, match="text_column='text' of the train data holds no text at all"):
        read_data(tmp_path, [(" ", "good")])


def test_an_empty_text_gets_the_prediction_that_it_gets_beside_others(tmp_path):
    objective = bound(read_data(tmp_path))
    scorer = objective.scorer
    model = AutoModelForSequenceClassification.from_config(objective.config).eval()
    rows = objective.encode_inputs(Dataset.from_dict({"text": ["good soup", "", "bad day"]}))
    together = scorer.predict(model, objective.collator()(list(rows)))
    alone = [scorer.predict(model, objective.collator()([row]))[0] for row in rows]
    assert [p["score"] for p in alone] == pytest.approx([p["score"] for p in together], abs=1e-6)
    batch = objective.collator()([rows[0], rows[1]])
    assert batch["attention_mask"].sum(1).tolist() == [len(rows[0]["input_ids"]), 0]


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("names", [["input_ids"], ["input_ids", "attention_mask"], ["input_ids", "token_type_ids"]])
def test_padded_texts_are_the_very_ones_of_the_tokenizer(names, side):
    tokenizer = train_tokenizer([text for text, _ in TRAIN], kind="byte_bpe", vocab_size=300)
    tokenizer.padding_side, tokenizer.model_input_names = side, list(dict.fromkeys([*names, "attention_mask"]))
    rows = [{**{name: list(range(length)) for name in names}, "labels": length} for length in (3, 7, 0)]
    theirs = tokenizer.pad(rows, padding="max_length", max_length=7, return_tensors="pt")
    ours = pad_texts(tokenizer, rows)
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert ours[name].dtype == value.dtype
        assert torch.equal(ours[name], value)
    by_column = NumberRows(Dataset.from_list(rows[:2])).__getitems__([0, 1])
    assert isinstance(by_column, NumberBatch)
    theirs = tokenizer.pad(rows[:2], padding="max_length", max_length=7, return_tensors="pt")
    assert {name: value.tolist() for name, value in pad_texts(tokenizer, by_column).items()} == {
        name: value.tolist() for name, value in theirs.items()
    }
    other = "left" if side == "right" else "right"
    options = {"padding_side": other, "return_attention_mask": "attention_mask" in names}
    theirs = tokenizer.pad(rows, padding="max_length", max_length=7, return_tensors="pt", **options)
    ours = pad_texts(tokenizer, rows, **options)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())


def test_a_tokenizer_without_padding_gets_a_stand_in(tmp_path):
    tokenizer = train_tokenizer(["good soup"], kind="byte_bpe", vocab_size=300)
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    assert AutoTokenizer.from_pretrained(tmp_path / "tokenizer").pad_token is None
    data = read_data(tmp_path, tokenizer=str(tmp_path / "tokenizer"))
    assert data.notes == ["the tokenizer has no padding token: '<|endoftext|>' stands in for it"]
    config = LlamaConfig(vocab_size=300, pad_token_id=None)
    data.bind(config)
    assert config.pad_token_id == data.tokenizer.pad_token_id == 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"text_column": "sentence"}, r"text_column='sentence' is not in the train data; its columns are text, label"),
        ({"label_column": "y"}, r"label_column='y' is not in the train data; its columns are text, label"),
        ({"train_file": ["nowhere.csv"]}, r"data file nowhere\.csv does not exist"),
        (
            {"validation": [("x", "ugly")]},
            r"validation data has .* does not have: 'ugly' \(first in row 1\); known are 'ba",
        ),
        ({"train": [("a", "x"), ("b", "x")]}, r"label_column='label' holds 'x' in all training rows"),
        (
            {"train": [("a", ""), ("b", "x")]},
            r"label_column='label' of train row 1 is empty; label the row or take it out",
        ),
        ({"validation_fraction": 1.0}, r"validation_fraction=1\.0 is not a share"),
        ({"max_length": 0}, r"max_length=0 must be at least 1 token"),
        ({"vocab_size": 100}, r"vocab_size=100 is too small for kind='byte_bpe'"),
        ({"tokenizer": "./nowhere"}, r"no tokenizer can be loaded from '\./nowhere': .*; name one with tokenizer"),
    ],
)
def test_bad_data_is_one_clear_error(tmp_path, settings, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        bound(read_data(tmp_path, **settings))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("train.csv", b"", r"train\.csv: an empty file has no rows"),
        ("train.csv", b"text,label\n", r"train\.csv has no rows, only the columns text, label"),
        (
            "train.csv",
            b"text,label\na,1\nb, c,1\n",
            r"train\.csv, line 3: the row has 3 fields, the header 2; quote the fields that hold ','.*text, label",
        ),
        ("train.csv", b"text,label\n\xff,1\n", r"train\.csv is not a table in UTF-8 with a header line"),
        ("train.jsonl", b'{"text": "a"\n', r"train\.jsonl cannot be read: \w+"),
        ("train.parquet", b"not parquet", r"train\.parquet cannot be read: \w+"),
        ("train.xlsx", b"zip", r"cannot read files that end in \.xlsx; give files of one kind among \.csv"),
    ],
)
def test_a_broken_file_is_one_clear_error(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    args = SequenceClassificationArguments(train_file=[str(tmp_path / name)])
    with pytest.raises(ValueError, match=message):
        TASK.read(args)


def test_no_data_and_folders_without_splits_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no data: set dataset"):
        TASK.read(SequenceClassificationArguments())
    write_csv(tmp_path / "rows.csv", TRAIN)
    with pytest.raises(
        ValueError, match=r"holds no file named after train, validation or test .* there is: rows\.csv"
    ):
        TASK.read(SequenceClassificationArguments(dataset=str(tmp_path)))
    with pytest.raises(FileNotFoundError, match="dataset='nowhere' does not exist"):
        TASK.read(SequenceClassificationArguments(dataset="./nowhere"))
    with pytest.raises(ValueError, match=r"dataset='no/body' \(no folder or file here, so a Hub id\) cannot be read"):
        TASK.read(SequenceClassificationArguments(dataset="no/body"))


class Fixed(torch.nn.Module):
    """A model that gives the logits it was made with, row by row."""

    def __init__(self, logits):
        super().__init__()
        self.logits = logits

    def forward(self, rows):
        return {"logits": self.logits[rows]}


def predicted(logits, truth, scorer):
    return scorer.predict(Fixed(logits), {"rows": torch.arange(len(truth)), "labels": torch.tensor(truth)})


@pytest.fixture
def seven(tmp_path):
    """The scorer of seven labels, and predictions for 57 rows."""
    rows = [(f"text {i}", f"label {i % 7}") for i in range(14)]
    scorer = bound(read_data(tmp_path, rows, [("new", "label 0")])).scorer
    draw = np.random.default_rng(0)
    truth, logits = draw.integers(0, 7, 57), torch.tensor(draw.normal(size=(57, 7)), dtype=torch.float32)
    return scorer, predicted(logits, truth, scorer), truth, logits


def test_metrics_equal_those_of_scikit_learn(seven):
    scorer, predictions, truth, logits = seven
    metrics, best = scorer.score(predictions), logits.argmax(-1).numpy()
    assert metrics["accuracy"] == pytest.approx(accuracy_score(truth, best), abs=1e-12)
    assert metrics["macro_f1"] == pytest.approx(f1_score(truth, best, average="macro"), abs=1e-12)
    assert metrics["loss"] == pytest.approx(log_loss(truth, logits.double().softmax(-1), labels=range(7)), abs=1e-6)
    top = top_k_accuracy_score(truth, logits.numpy(), k=5, labels=range(7))
    assert metrics["top5_accuracy"] == pytest.approx(top, abs=1e-12)
    precision, recall, f1, rows = precision_recall_fscore_support(truth, best)
    scores = scores_by_label(truth, best)
    for name, expected in {"precision": precision, "recall": recall, "f1": f1, "rows": rows}.items():
        assert [row[name] for row in scores] == pytest.approx(list(expected))
    guess = DummyClassifier(strategy="most_frequent").fit(truth[:, None], truth).predict(truth[:, None])
    assert scorer.baselines(predictions) == {
        "majority_accuracy": pytest.approx(accuracy_score(truth, guess), abs=1e-12),
        "majority_macro_f1": pytest.approx(f1_score(truth, guess, average="macro"), abs=1e-12),
    }


def test_a_label_that_is_never_predicted_scores_zero_and_one_that_never_occurs_does_not_count():
    truth, best = np.array([0, 0, 2, 2]), np.array([0, 0, 0, 0])
    scores = scores_by_label(truth, best)
    assert [row["f1"] for row in scores] == [pytest.approx(2 / 3), 0.0]
    assert f1_score(truth, best, average="macro", zero_division=0) == pytest.approx(np.mean([2 / 3, 0.0]))


def test_the_loss_of_parts_adds_up_to_the_loss_of_the_whole(tmp_path):
    objective = bound(read_data(tmp_path))
    logits, labels = torch.randn(7, 2), torch.randint(2, (7,))
    whole = objective.criterion({"logits": logits}, {"labels": labels})
    parts = [
        objective.criterion({"logits": logits[part]}, {"labels": labels[part]}) for part in (slice(0, 5), slice(5, 7))
    ]
    assert torch.allclose(whole, torch.nn.functional.cross_entropy(logits, labels, reduction="sum"))
    assert torch.allclose(sum(parts), whole)


def test_focal_loss_and_class_weights_are_their_formulas(tmp_path):
    rows = [("a", "x"), ("b", "x"), ("c", "x"), ("d", "y")]
    settings = {"loss": "focal", "focal_gamma": 3.0, "class_weights": ["balanced"]}
    objective = bound(read_data(tmp_path, rows, [("new", "x")], **settings))
    assert objective.labels.kind.weights.tolist() == pytest.approx([4 / 2 / 3, 4 / 2 / 1])
    logits, labels = torch.randn(5, 2), torch.tensor([0, 1, 1, 0, 1])
    expected = 0.0
    for row, label in zip(logits.double(), labels.tolist(), strict=True):
        probability = (row[label].exp() / row.exp().sum()).item()
        expected -= [2 / 3, 2.0][label] * (1 - probability) ** 3 * np.log(probability)
    assert objective.criterion({"logits": logits}, {"labels": labels}).item() == pytest.approx(expected, rel=1e-5)
    assert class_weights(["1", "2.5"], ["x", "y"], [3, 1]).tolist() == [1.0, 2.5]
    for given in (["1"], ["1", "heavy"], ["1", "-1"]):
        with pytest.raises(ValueError, match="must be 'balanced', or a number of at least 0 for each of the 2 labels"):
            class_weights(given, ["x", "y"], [3, 1])


def test_samples_show_texts_with_the_label_they_got_and_then_the_worst(tmp_path):
    objective = bound(read_data(tmp_path))
    scorer = objective.scorer
    sure = torch.tensor([[0.0, 4.0], [0.0, 3.0], [0.0, 5.0], [1.0, 0.0]])  # good, good, good, bad
    predictions = predicted(sure, [1, 0, 1, 0], scorer)
    assert scorer.samples(predictions, objective.rows["train"], count=1) == [
        {"prompt": "good soup", "text": " -> good"},
        {"prompt": "bad soup", "text": " -> good (labelled bad)"},
    ]
    assert scorer.describe(predictions[0]) == {"prediction": "good", "score": pytest.approx(0.982014, abs=1e-6)}
    assert objective.data_record()["train"] == {
        "rows": 4,
        "tokens": sum(map(len, objective.rows["train"]["input_ids"])),
    }
    json.dumps(objective.data_record())


def test_training_rows_that_are_measured_on_are_refused_dropped_or_noted(tmp_path):
    rows = [("old news", "good"), *OTHERS]
    found = r"1 of 4 training rows have an input that is among the validation rows \(train row 2 is validation row 1\)"
    with pytest.raises(ValueError, match=found + "; leakage=drop leaves them out of training, leakage=allow trains"):
        read_data(tmp_path, validation=[("bad soup", "bad"), *OTHERS])
    data = read_data(tmp_path, validation=[("bad soup", "bad"), *OTHERS], leakage="drop")
    assert list(data.rows["train"]["text"]) == ["good soup", "good day", "bad day"]
    assert len(data.rows["validation"]) == 3
    assert re.fullmatch(found + ": left out of training", data.notes[-1])
    data = read_data(tmp_path, validation=[("bad soup", "bad"), *OTHERS], leakage="allow")
    assert len(data.rows["train"]) == 4
    assert data.notes[-1].endswith("the results on these are not honest")
    with pytest.raises(ValueError, match="nothing would be left to train on"):
        read_data(tmp_path, rows, rows, leakage="drop")
    with pytest.raises(ValueError, match="leakage='ignore' is unknown; choose one of stop, drop, allow"):
        read_data(tmp_path, leakage="ignore")


def test_settings_of_a_table_reach_its_reader_and_its_notes_the_data(tmp_path):
    content = "text;label\nC'était là;pos \nNon;neg\nOui;pos\n"
    (tmp_path / "rows.csv").write_bytes(content.encode("windows-1252"))
    files = {"train_file": [str(tmp_path / "rows.csv")], "validation_fraction": 0.34, "vocab_size": 300}
    data = TASK.read(SequenceClassificationArguments(**files, encoding="windows-1252"))
    assert data.labels.names == ["neg", "pos"]
    assert {text for rows in data.rows.values() for text in rows["text"]} == {"C'était là", "Non", "Oui"}
    assert data.notes[0] == f"{tmp_path / 'rows.csv'}: cells are divided by ';'"
    assert any("labels have blanks around them, taken off: 'pos '" in note for note in data.notes)
    with pytest.raises(ValueError, match="--encoding windows-1252"):
        TASK.read(SequenceClassificationArguments(**files))
    for name, value in (("delimiter", ";;"), ("encoding", "utf-9")):
        with pytest.raises(ValueError, match=f"{name}='{value}' is"):
            SequenceClassificationArguments(**files, **{name: value})


def test_lists_are_several_labels_but_no_text(tmp_path):
    lines = [f"\"['a', 'b']\",\"['{name}']\"" for name in ("x", "y", "x", "z")]
    (tmp_path / "rows.csv").write_text("\n".join(["words,kinds", *lines, ""]))
    files = {"train_file": [str(tmp_path / "rows.csv")], "validation_file": [str(tmp_path / "rows.csv")]}
    columns = {"text_column": "kinds", "label_column": "words"}
    with pytest.raises(
        ValueError, match=r"text_column='kinds' of train row 1 holds a list \(\['x'\]\), and one text is"
    ):
        TASK.read(SequenceClassificationArguments(**files, **columns))
    lines[2] = "\"['a', 'b'\",\"['x'\""
    (tmp_path / "rows.csv").write_text("\n".join(["words,kinds", *lines, ""]))
    with pytest.raises(
        ValueError, match=r"label_column='words' of train row 1 holds \['a', 'b'\], and a label is one"
    ):
        TASK.read(SequenceClassificationArguments(**files, **columns))


def test_a_new_model_of_every_family_reads_tokens(tmp_path):
    data = read_data(tmp_path)
    config = data.new_config("bm_cnn", {"hidden_size": 8, "num_hidden_layers": 1})
    assert config.input_type == "tokens"  # a bm_cnn's own default is pixels
    model = AutoModelForSequenceClassification.from_config(data.bind(config).config)
    assert model(torch.tensor([[5, 6]])).logits.shape == (1, 2)


def test_a_model_of_another_input_is_refused_by_name(tmp_path):
    data = read_data(tmp_path)
    with pytest.raises(UserError, match="a bm_cnn of input_type='pixels' reads no texts; it needs 'tokens'"):
        data.bind(data.new_config("bm_cnn", {"input_type": "pixels"}))
