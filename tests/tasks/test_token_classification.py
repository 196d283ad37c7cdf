"""Token classification: words and tags, what is learned from, entities found, and a run through every recipe."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, List, Value
from tokenizers.processors import TemplateProcessing
from torch.nn import functional as F
from transformers import AutoModelForTokenClassification, BertConfig, BertTokenizerLegacy, pipeline

from bmtk.models.configuration_bm_transformer import BmTransformerConfig
from bmtk.tasks.sentence_windows import labels_of_tokens, positions_in_windows, positions_of_words
from bmtk.tasks.token_classification import TASK, TokenClassificationArguments
from recipes import evaluate, finetune, predict

ROOT = Path(__file__).parents[2]
TRAIN = [
    (["Ada", "Poe", "left", "Rome"], ["B-person", "I-person", "O", "B-place"]),
    (["nobody", "left"], ["O", "O"]),
]
OTHERS = [(["Ada", "left"], ["B-person", "O"])]


def write(path, rows, columns=("tokens", "tags")):
    path.write_text("\n".join(json.dumps(dict(zip(columns, row, strict=True))) for row in rows), encoding="utf-8")
    return [str(path)]


def read_data(tmp_path, train=TRAIN, validation=OTHERS, **settings):
    files = {"train_file": write(tmp_path / "train.jsonl", train)}
    files["validation_file"] = write(tmp_path / "validation.jsonl", validation)
    return TASK.read(TokenClassificationArguments(**{**files, "tokenizer": "word", **settings}))


def bound(data, **fields):
    sizes = {"max_position_embeddings": 16, "is_causal": False, **fields}
    return data.bind(BmTransformerConfig(**{**data.config_fields, **sizes}))


def test_words_become_tokens_and_the_first_of_each_carries_the_tag(tmp_path):
    objective = bound(read_data(tmp_path, tokenizer="byte_bpe", vocab_size=257, max_length=14))
    assert objective.config.id2label == {0: "B-person", 1: "B-place", 2: "I-person", 3: "O"}
    row = objective.rows["train"][
        0
    ]  # a token for each byte: "Ada Poe left R", and a window that begins 3 before its end
    assert row["windows"] == [14, 6]
    assert row["positions"] == [0, 4, 8, 16]
    assert row["labels"] == [0, *[-100] * 3, 2, *[-100] * 3, 3, *[-100] * 7, 1, *[-100] * 3]
    assert row["truth"] == [0, 2, 3, 1]
    assert objective.notes[-1] == "1 of 2 train texts are read in several windows"


WORDS = [f"w{number}" for number in range(23)]
LONG = [(WORDS, ["B-a" if number % 3 else "O" for number in range(23)]), (WORDS[:2], ["O", "B-a"])]


class ByToken(torch.nn.Module):
    """A model that says of every token what its id says."""

    def forward(self, input_ids, attention_mask):
        return {"logits": torch.stack([input_ids.sin(), input_ids.cos()], dim=-1)}


@pytest.mark.parametrize("has_ends", [False, True])
@pytest.mark.parametrize("side", ["right", "left"])  # of padding, and of truncation: where windows begin
def test_every_word_of_a_long_sentence_is_predicted_once_whatever_the_windows(tmp_path, has_ends, side):
    found = []
    for max_length in (64, 8):
        data = read_data(tmp_path, LONG, [(["w0"], ["O"])], max_length=max_length, stride=2)
        tokenizer = data.tokenizer
        tokenizer.padding_side = tokenizer.truncation_side = side
        if has_ends:
            marks = [(token, tokenizer.convert_tokens_to_ids(token)) for token in [tokenizer.eos_token]]
            template = f"{marks[0][0]} $A {marks[0][0]}"
            tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=template, special_tokens=marks)
        objective = bound(data, max_position_embeddings=64)
        batch, scorer = objective.collator()(list(objective.rows["train"])), objective.scorer
        predictions = scorer.predict(ByToken(), batch)
        loss = objective.criterion(ByToken()(batch["input_ids"], None), batch).item()
        found.append((scorer.score(predictions), [p["tags"] for p in predictions], int(objective.num_items(batch))))
        assert loss == pytest.approx(sum(p["loss"] for p in predictions), rel=1e-5)
        assert len(batch["input_ids"]) == {64: 2, 8: 7 if has_ends else 5}[max_length]
        of_words = torch.cat([row[row != -100] for row in batch["labels"]])
        assert of_words.tolist() == [*objective.rows["train"][0]["truth"], *objective.rows["train"][1]["truth"]]
    assert found[0] == (pytest.approx(found[1][0]), *found[1][1:])
    assert found[0][2] == 25


def test_a_word_is_predicted_where_it_has_most_context_by_brute_force():
    draw = np.random.default_rng(0)
    for _ in range(20):
        words = ["x" * draw.integers(1, 5) for _ in range(draw.integers(1, 30))]
        text, room = " ".join(words), int(draw.integers(2, 12))
        stride = int(draw.integers(room))
        tokens = [(at, at + 1) for at in range(len(text)) if text[at] != " "]  # one for each letter
        windows, first = [], 0
        while not windows or first + stride < len(tokens):
            windows.append([(-1, -1), *tokens[first : first + room], (-1, -1)])
            first += room - stride
        around = []  # of every token of every window: which it is, and its distance from where the window was cut
        for number, window in enumerate(windows):
            for at, (begin, _) in enumerate(window):
                left = at - 1 if number else len(text)
                right = len(window) - 2 - at if number < len(windows) - 1 else len(text)
                around.append((begin, min(left, right)))
        begin = 0
        for word, position in zip(words, positions_in_windows(words, windows, " ", stride), strict=True):
            assert around[position] == (begin, max(distance for at, distance in around if at == begin))
            begin += len(word) + 1


def test_windows_that_share_all_they_have_are_refused(tmp_path):
    data = read_data(tmp_path, max_length=3, stride=3)
    with pytest.raises(
        ValueError, match="stride=3 must be less than the 3 tokens that a window of max_length=3 has for"
    ):
        bound(data)
    with pytest.raises(ValueError, match="stride=-1 must be at least 0 tokens"):
        read_data(tmp_path, stride=-1)


def test_positions_of_words_pass_over_blanks_special_tokens_and_words_without_a_token():
    spans = [(-1, -1), (0, 2), (2, 4), (6, 8), (8, 10)]  # [CLS], "ab", " c", " d" and " e"; none for the third word
    assert positions_of_words(["ab", "c", "\u200b", "d", "e"], spans, " ") == [1, 2, -1, 3, 4]
    assert positions_of_words(["中", "国", "人"], [(0, 2), (2, 3)], "") == [0, -1, 1]
    assert positions_of_words([], [], " ") == []
    assert labels_of_tokens([1, -1, 2], [7, 8, 9], 4) == [-100, 7, 9, -100]


def test_numbers_of_a_class_label_are_named_and_texts_are_cut_at_blanks(tmp_path):
    kind = Features({"tokens": List(Value("string")), "tags": List(ClassLabel(names=["O", "B-x"]))})
    rows = Dataset.from_dict({"tokens": [["a", "b"], ["c"]], "tags": [[0, 1], [0]]}, features=kind)
    rows.to_parquet(tmp_path / "train.parquet")
    data = read_data(tmp_path, validation=[("b a", "B-x O")], train_file=[str(tmp_path / "train.parquet")])
    assert list(data.rows["train"]["label"]) == [["O", "B-x"], ["O"]]
    assert data.rows["validation"][0] == {"words": ["b", "a"], "label": ["B-x", "O"]}


class Fixed(torch.nn.Module):
    """A model that gives the logits it was made with."""

    def __init__(self, logits):
        super().__init__()
        self.logits = logits

    def forward(self, input_ids, attention_mask):
        return {"logits": self.logits[:, : input_ids.shape[1]]}


def predicted(objective, rows, logits):
    batch = objective.collator()([objective.rows["train"][row] for row in rows])
    return objective.scorer.predict(Fixed(logits), batch)


def test_predictions_are_tags_of_words_and_their_loss_is_over_words(tmp_path):
    objective = bound(read_data(tmp_path))
    scorer = objective.scorer
    logits = torch.full((2, 4, 4), -4.0)
    for row, tags in enumerate([[0, 3, 3, 1], [3, 1, 0, 0]]):  # of the second row, two positions are padding
        logits[row, range(4), tags] = 4.0
    first, second = predicted(objective, [0, 1], logits)
    assert (first["tags"], second["tags"]) == ([0, 3, 3, 1], [3, 1])
    expected = F.cross_entropy(logits[0], torch.tensor([0, 2, 3, 1]), reduction="sum").item()
    assert (first["loss"], first["items"]) == (pytest.approx(expected), 4)
    assert scorer.describe(first) == {
        "prediction": ["B-person", "O", "O", "B-place"],
        "entities": [{"type": "person", "start": 0, "end": 1}, {"type": "place", "start": 3, "end": 4}],
    }
    metrics = scorer.score([first, second])
    assert metrics["accuracy"] == 4 / 6
    assert metrics["precision"] == 1 / 3  # Rome, of Ada, Rome and "left"
    assert metrics["recall"] == 1 / 2
    assert metrics["f1"] == pytest.approx(2 / 5)
    lines = scorer.table([first, second]).splitlines()
    assert [line.split() for line in lines[1:]] == [
        ["all", "2", "0.3333", "0.5000", "0.4000"],
        ["person", "1", "0.0000", "0.0000", "0.0000"],
        ["place", "1", "0.5000", "1.0000", "0.6667"],
    ]
    samples = scorer.samples([first, second], objective.rows["train"], count=1)
    assert samples[0] == {
        "prompt": "Ada Poe left Rome",
        "text": " -> Ada (person), Rome (place) [labelled Ada Poe (person), Rome (place)]",
    }
    assert samples[1]["text"] == " -> left (place) [labelled nothing]"


def test_a_batch_of_sentences_without_words_has_predictions_without_tags(tmp_path):
    objective = bound(read_data(tmp_path))
    model = AutoModelForTokenClassification.from_config(objective.config).eval()
    rows = objective.encode_inputs(Dataset.from_dict({"tokens": [[], []]}))
    assert objective.scorer.predict(model, objective.collator()(list(rows))) == [{"tags": []}, {"tags": []}]


def test_tags_without_a_scheme_are_scored_word_by_word(tmp_path):
    objective = bound(read_data(tmp_path, [(["we", "go"], ["PRON", "VERB"])], [(["go"], ["VERB"])]))
    scorer = objective.scorer
    assert scorer.labels == ["PRON", "VERB"]
    predictions = [{"tags": [1, 1], "truth": [0, 1], "loss": 1.0, "items": 2}]
    assert scorer.score(predictions) == {"loss": 0.5, "precision": 0.5, "recall": 0.5, "f1": 0.5, "accuracy": 0.5}


def test_the_loss_is_a_sum_over_words_whatever_the_batches(tmp_path):
    objective = bound(read_data(tmp_path))
    rows, collate = [objective.rows["train"][row] for row in (0, 1)], objective.collator()
    whole, parts = collate(rows), [collate([row]) for row in rows]
    logits = torch.randn(2, 4, 4)
    of_whole = objective.criterion({"logits": logits}, whole)
    of_parts = [
        objective.criterion({"logits": logits[[row], : part["input_ids"].shape[1]]}, part)
        for row, part in enumerate(parts)
    ]
    assert torch.allclose(sum(of_parts), of_whole)
    assert torch.allclose(F.cross_entropy(logits.flatten(0, 1), whole["labels"].flatten(), reduction="sum"), of_whole)
    assert int(objective.num_items(whole)) == 6 == sum(int(objective.num_items(part)) for part in parts)
    assert set(objective.inputs_of(whole)) == {"input_ids", "attention_mask"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"train": [(["a", "b"], ["O"])]}, "train row 1 has 2 words and 1 tags; each word needs one"),
        ({"token_column": "words"}, "token_column='words' is not in the train data; its columns are tokens, tags"),
        ({"label_column": "ner"}, "label_column='ner' is not in the train data; its columns are tokens, tags"),
        ({"train": [(5, ["O"])]}, "token_column='tokens' of train row 1 holds a int; a list is needed"),
        ({"train": [(["a", "b"], ["O", ""])]}, "label_column='tags' of train row 1 is empty"),
        (
            {"validation": [(["a"], ["O"]), (["a"], ["B-x"])]},
            r"validation data has .* does not have: 'B-x' \(first in row 2\)",
        ),
        ({"train": [(["a"], ["O"])]}, "label_column='tags' holds 'O' in all training rows"),
        ({"train": [([], [])]}, "token_column='tokens' of the train data holds no text at all"),
        ({"token_dropout": 1.0}, "token_dropout=1.0 is not a share; choose 0 <= token_dropout < 1"),
    ],
)
def test_bad_data_is_one_clear_error(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        bound(read_data(tmp_path, **settings))


def test_a_tokenizer_without_offsets_is_refused(tmp_path):
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\na\n")
    data = read_data(tmp_path)
    data.tokenizer = BertTokenizerLegacy(str(tmp_path / "vocab.txt"))
    with pytest.raises(ValueError, match=r"BertTokenizerLegacy cannot say which word a token belongs to; .* fast"):
        data.bind(BertConfig())


@pytest.mark.trains
def test_the_smoke_run_learns_and_every_recipe_and_pipeline_reads_it(tmp_path, monkeypatch, capsys, seed_argv):
    monkeypatch.chdir(ROOT)
    folder = tmp_path / "run"
    config = "recipes/configs/token_classification/smoke.yaml"
    finetune.main(["--config", config, "--output_dir", str(folder), "--disable_tqdm", "true", *seed_argv])
    metrics = json.loads((folder / "run.json").read_text(encoding="utf-8"))["metrics"]
    assert metrics["test/f1"] > 0.9
    assert f"model='{folder}', aggregation_strategy='first')" in capsys.readouterr().out
    assert 'tokenizer=tokenizer, aggregation_strategy="first")' in (folder / "README.md").read_text(encoding="utf-8")
    evaluate.main(["--model", str(folder), "--batch_size", "7"])
    assert "person" in capsys.readouterr().out
    again = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))["metrics"]
    assert again["test/f1"] == metrics["test/f1"]
    assert again["test/loss"] == pytest.approx(metrics["test/loss"], rel=1e-4)
    (tmp_path / "rows.jsonl").write_text(
        json.dumps({"tokens": ["tell", "Aunt", "Corina", "it", "is", "in", "Berton"]})
    )
    predict.main(["--model", str(folder), "--input", str(tmp_path / "rows.jsonl"), "--output", f"{tmp_path}/p.jsonl"])
    line = json.loads((tmp_path / "p.jsonl").read_text(encoding="utf-8"))
    assert line["prediction"] == ["O", "B-person", "I-person", "O", "O", "O", "B-place"]
    assert line["tokens"][6] == "Berton"
    tagger = pipeline("token-classification", model=str(folder), aggregation_strategy="first")
    found = tagger("tell Aunt Corina it is in Berton")
    assert [(entity["entity_group"], entity["word"].strip()) for entity in found] == [
        ("person", "Aunt Corina"),
        ("place", "Berton"),
    ]


def test_lists_that_were_printed_are_read_if_all_of_them_can_be(tmp_path):
    lines = ["tokens,tags", "\"['Ada', 'left']\",\"['B-a ', 'O']\"", "\"['I', 'stay']\",\"['O', 'O']\"", ""]
    (tmp_path / "rows.csv").write_text("\n".join(lines))
    files = {"train_file": [str(tmp_path / "rows.csv")], "validation_file": [str(tmp_path / "rows.csv")]}
    data = TASK.read(TokenClassificationArguments(**files, tokenizer="word", leakage="allow"))
    assert list(data.rows["train"]["words"]) == [["Ada", "left"], ["I", "stay"]]
    assert list(data.rows["train"]["label"]) == [["B-a", "O"], ["O", "O"]]
    assert any("1 train labels have blanks around them" in note for note in data.notes)
    (tmp_path / "rows.csv").write_text("\n".join(lines).replace("'stay']", "'stay'"))
    with pytest.raises(
        ValueError, match=r"token_column='tokens' of train row 1 holds a list that was printed as text"
    ):
        TASK.read(TokenClassificationArguments(**files, tokenizer="word"))
