"""The metrics as modules of evaluate: streamed, offline, by name or from their file; against literal values."""

import math

import evaluate
import pytest

from bmtk.metrics import load, metric

ONE = {"boxes": [[0, 0, 4, 4]], "labels": [0]}
TWO = {"boxes": [[2, 2, 4, 4]], "labels": [1]}

CASES = {
    # name: predictions, references, options, what comes of them
    "accuracy": ([0, 1, 1], [0, 1, 0], {}, {"accuracy": 2 / 3, "macro_f1": 2 / 3}),
    "top_accuracy": ([[0, 2], [1, 2], [0, 1]], [2, 0, 0], {}, {"top2_accuracy": 2 / 3}),
    "multi_label": (
        [[0.9, 0.1], [0.7, 0.6]],
        [[1, 0], [0, 1]],
        {"threshold": 0.65},
        {"micro_f1": 0.5, "macro_f1": 1 / 3, "subset_accuracy": 0.5, "map": 1.0},
    ),
    "regression": (
        [1.0, 2.0, 4.0],
        [1.0, 2.0, 3.0],
        {},
        {"mse": 1 / 3, "mae": 1 / 3, "r2": 0.5, "pearson": 9 / math.sqrt(84), "spearman": 1.0},
    ),
    "entity_f1": (
        [["B-a", "I-a"], ["O", "B-b"]],
        [["B-a", "I-a"], ["B-b", "O"]],
        {},
        {"precision": 0.5, "recall": 0.5, "f1": 0.5, "a": 1.0, "b": 0.0},
    ),
    "answers": (["the red cat", "4"], [["Red cat!"], ["four", "about 4 or 5"]], {}, {"exact_match": 0.5, "f1": 0.7}),
    "translation": (
        ["the cat sat down", "a dog ran"],
        ["the cat sat down", "a dog ran"],
        {"lower_case": True},
        {"bleu": 100.0, "chrf": 100.0},
    ),
    "error_rates": (["a b", "c"], ["a b", "d e"], {}, {"wer": 0.5, "cer": 0.5, "exact_match": 0.5}),
    "detection": (
        [{**ONE, "scores": [0.9]}, {**ONE, "scores": [0.8]}],
        [ONE, TWO],
        {},
        {"map": 0.5, "map_50": 0.5, "map_75": 0.5},
    ),
    "forecast": ([[1.0, 2.0], [0.0, 5.0]], [[0.0, 2.0], [2.0, math.nan]], {"seasonal_error": 2.0}, {
        "mse": 5 / 3, "mae": 1.0, "mase": 0.5
    }),
    "quantiles": (
        [[[0.0, 2.0], [1.0, 3.0]]],
        [[1.0, 4.0]],
        {"levels": [0.1, 0.9]},
        {"quantile_loss": (0.1 + 0.1 + 0.3 + 0.9) / 4, "weighted_quantile_loss": 2 * 1.4 / 2 / 5, "coverage": 0.5},
    ),
    "retrieval": ([[3, 1], [2, 0], [5, 6]], [1, 2, 0], {"top": [1, 2]}, {
        "recall_at_1": 1 / 3, "recall_at_2": 2 / 3, "mean_rank": 2.0
    }),
    "likelihood": ([2.0, 4.0], [2, 1], {"num_bytes": 6}, {
        "loss": 2.0, "perplexity": math.exp(2), "bits_per_byte": 1 / math.log(2)
    }),
}  # fmt: skip


def found_by(module, name):
    """What a module computes of a case whose rows come one by one."""
    predictions, references, options, _ = CASES[name]
    for prediction, reference in zip(predictions, references, strict=True):
        module.add_batch(predictions=[prediction], references=[reference])
    found = module.compute(**options)
    return found | {kind: ratios["f1"] for kind, ratios in found.pop("by_type", {}).items()}


@pytest.mark.parametrize("name", metric.KINDS)
def test_a_metric_is_what_it_should_be_by_name_and_from_its_file(name):
    found = found_by(load(name), name)
    if name == "translation":
        assert "case:lc" in found["signatures"]["bleu"]
        del found["signatures"]
    assert found == pytest.approx(CASES[name][3])
    again = found_by(evaluate.load(metric.__file__, name), name)
    again.pop("signatures", None)
    assert again == pytest.approx(found)


def test_rows_may_come_at_once_and_chinese_is_counted_by_characters():
    module = load("answers")
    assert module.compute(predictions=["红猫"], references=[["红色的猫"]], by="characters") == {
        "exact_match": 0.0,
        "f1": pytest.approx(2 * 1 / (2 + 4)),
    }


def test_plain_tags_are_words_of_their_own():
    found = load("entity_f1").compute(predictions=[["noun", "verb"]], references=[["noun", "noun"]])
    assert found["f1"] == 0.5
    assert found["by_type"]["noun"] == {"rows": 2, "precision": 1.0, "recall": 0.5, "f1": pytest.approx(2 / 3)}


def test_an_unknown_metric_is_refused_with_the_list_of_those_there_are():
    with pytest.raises(ValueError, match="metric 'rouge' is unknown; choose one of accuracy, top_accuracy"):
        load("rouge")
