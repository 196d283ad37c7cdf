"""The grammar of a search space, its default, and what is said of one that does not fit."""

import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from bmtk.search.space import SearchArguments, default_space, read_space

TYPES = {
    "learning_rate": float,
    "num_hidden_layers": int,
    "hidden_dropout": float,
    "optimizer": str,
    "nesterov": bool,
    "hidden_sizes": list[int],
    "seed": int,
}
REFUSED = {"seed": "decides what is measured"}


def read(*entries):
    return read_space(entries, TYPES, REFUSED)


def test_ranges_and_choices_have_the_type_of_the_field():
    assert read(
        "learning_rate=1e-4..1e-2:log",
        "num_hidden_layers=2..6",
        "hidden_dropout = 0, 0.1,0.2",
        "optimizer=adamw,muon",
        "nesterov=true,false",
    ) == {
        "learning_rate": FloatDistribution(1e-4, 1e-2, log=True),
        "num_hidden_layers": IntDistribution(2, 6),
        "hidden_dropout": CategoricalDistribution([0.0, 0.1, 0.2]),
        "optimizer": CategoricalDistribution(["adamw", "muon"]),
        "nesterov": CategoricalDistribution([True, False]),
    }
    assert read("hidden_dropout=0...5") == {"hidden_dropout": FloatDistribution(0.0, 0.5)}


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("learning_rate", r"'learning_rate' is not understood; write NAME=LOW\.\.HIGH, "),
        ("learning_rate=", "is not understood"),
        ("learing_rate=1..2", r"unknown key 'learing_rate'; did you mean 'learning_rate'\?"),
        ("learning_rate=1e-2..1e-4", r"is not a range: 0\.01 is not below 0\.0001"),
        ("learning_rate=1..1", "is not a range: 1.0 is not below 1.0"),
        ("learning_rate=nan..1", "is not a range"),
        ("learning_rate=0..inf", "is not a range"),
        ("learning_rate=0..1:log", r"has no logarithm at 0\.0; start above 0, or leave out :log"),
        ("learning_rate=1..2:lin", r"'lin' is not a scale; write learning_rate=1\.\.2:log"),
        ("learning_rate=a..1", "learning_rate: 'a' is not of type float"),
        ("num_hidden_layers=1.5..2", r"num_hidden_layers: '1\.5' is not of type int"),
        ("nesterov=yes,no", "nesterov: 'yes' is not of type bool"),
        ("optimizer=a..b", r"optimizer is not a number, but a\.\.b is a range; list its values: optimizer=A,B"),
        ("optimizer=adamw,adamw", "optimizer=adamw,adamw is a single value; name at least two"),
        ("hidden_sizes=1,2", "hidden_sizes is a list, and a search changes single values"),
        ("seed=1,2", "seed cannot be searched: it decides what is measured"),
    ],
)
def test_an_entry_that_does_not_fit_is_told_with_what_would(entry, message):
    with pytest.raises(ValueError, match=message):
        read(entry)


def test_all_problems_are_told_at_once():
    with pytest.raises(ValueError, match=r"(?s)not a range.*'a' is not of type float.*hidden_dropout is named twice"):
        read(
            "learning_rate=2..1",
            "hidden_dropout=0,1",
            "num_hidden_layers=1..2",
            "learning_rate=a,b",
            "hidden_dropout=0,1",
        )


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"search": "grid"}, "search='grid' is unknown; choose optuna"),
        ({"search": "optuna", "trials": 0}, "trials=0 is out of range; give a number of at least 1"),
        ({"search_space": ["a=1,2"]}, "search_space is read by a search only; set search to optuna"),
    ],
)
def test_what_the_arguments_refuse(values, message):
    with pytest.raises(ValueError, match=message):
        SearchArguments(**values)


def test_the_default_space_is_around_what_is_set():
    current = {"learning_rate": 5e-3, "muon_learning_rate": 0.02, "hidden_dropout": 0.1, "lora_dropout": 0.0}
    entries = ["learning_rate=0.0005..0.05:log", "weight_decay=0..0.3", "hidden_dropout=0..0.5"]
    assert default_space({**current, "optimizer": "adamw"}) == entries
    assert default_space({**current, "optimizer": "muon"})[1] == "muon_learning_rate=0.002..0.2:log"
    assert list(read_space(entries, {**TYPES, "weight_decay": float}, {})) == [
        "learning_rate",
        "weight_decay",
        "hidden_dropout",
    ]
