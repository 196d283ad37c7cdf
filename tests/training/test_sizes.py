"""The closed formulas of a size, beside the models that they make and beside what their sources say."""

import math
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from tiny_run import TinyBatches, num_items, tiny_model
from transformers import AutoConfig, AutoModelForCausalLM

import bmtk  # noqa: F401  registers the model families
from bmtk.errors import UserError
from bmtk.training import dial
from bmtk.training.arguments import LoopArguments
from bmtk.training.dial import TrainingDerivation, num_trunk_parameters, shape_of
from bmtk.training.profiling import Rehearsal, kept_for_backward, rehearse
from bmtk.training.rng_state import RngState
from bmtk.training.sizes import (
    SizeArguments,
    batch_for,
    context_for,
    depth_for,
    learning_rate_for,
    parameters_of,
    tokens_for,
    tokens_of_steps,
    vocabulary_for,
)
from bmtk.training.updates import Losses


class Words:
    """Data of a vocabulary."""

    task = SimpleNamespace(auto_class=AutoModelForCausalLM)

    def __init__(self, vocabulary):
        self.vocabulary = vocabulary

    def new_config(self, model_type, chosen, *, preset=None):
        tokens = {"vocab_size": self.vocabulary, "max_position_embeddings": 512}
        return AutoConfig.for_model(model_type, **tokens, **chosen)


def model_of(size, model_type, *, vocabulary=None, **chosen):
    data = Words(vocabulary or vocabulary_for(parameters_of(size)))
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(
            data.new_config(model_type, shape_of(parameters_of(size), data, model_type, chosen))
        )


def counted(model_type, *, vocabulary, width, layers):
    """Parameters by hand; tables are tied."""
    if model_type == "bm_transformer":
        mlp, head = 8 * math.ceil(width / 3), 64 if width >= 256 else 32
        layer = 4 * width**2 + 3 * width * mlp + 2 * width + 2 * head  # attention, SwiGLU, two norms, two of QK
        return vocabulary * width + layers * layer + width
    if model_type == "bm_rnn":
        return vocabulary * width + layers * (2 * width**2 + 2 * width + width) + width  # candidate, gate, norm
    layer = 3 * width * 2 * width + 2 * width + 2 * (width**2 + width) + 2 * width  # taps, skip, residual, norm
    return vocabulary * width + layers * layer - (width**2 + width) + (width**2 + width)  # the last has no residual


@pytest.mark.parametrize("size", ["100K", "300K", "1M", "3M", "10M", "30M", "100M", "1B"])
@pytest.mark.parametrize("model_type", ["bm_cnn", "bm_rnn", "bm_transformer"])
def test_a_model_has_the_parameters_of_its_size_within_a_tenth(model_type, size):
    model = model_of(size, model_type)
    config, number = model.config, model.num_parameters()
    by_hand = counted(
        model_type, vocabulary=config.vocab_size, width=config.hidden_size, layers=config.num_hidden_layers
    )
    assert number == by_hand
    assert number == pytest.approx(parameters_of(size), rel=0.1)


@pytest.mark.parametrize("vocabulary", [65, 5000, 50257])
def test_the_shape_makes_up_for_another_vocabulary(vocabulary):
    assert model_of("10M", "bm_transformer", vocabulary=vocabulary).num_parameters() == pytest.approx(1e7, rel=0.1)


def test_the_curve_goes_through_known_shapes():
    shapes = [
        (config.hidden_size, config.num_hidden_layers, config.num_attention_heads, config.intermediate_size)
        for config in (model_of(size, "bm_transformer").config for size in ("1M", "100M"))
    ]
    assert shapes == [(128, 4, 4, 344), (768, 12, 12, 2048)]  # the second is that of GPT-2 small
    assert depth_for(2048) == pytest.approx(21.1, abs=0.1)


def test_vocabulary_and_context_are_powers_of_two():
    assert [vocabulary_for(1e8, size) for size in (1e6, 15e6, 15e7, 15e9)] == [512, 1024, 4096, 16384]
    sizes = [1e5, 1e6, 1e7, 1e8, 1e9, 1e10]
    assert [vocabulary_for(size) for size in sizes] == [512, 1024, 4096, 16384, 32768, 32768]
    assert [context_for(size) for size in sizes] == [128, 256, 512, 1024, 2048, 4096]


@pytest.mark.parametrize(
    ("chosen", "kept"),
    [
        ({"hidden_size": 192}, {"hidden_size": 192}),
        ({"num_hidden_layers": 10}, {"num_hidden_layers": 10}),
        ({"num_attention_heads": 6}, {"num_attention_heads": 6}),
        ({"hidden_act": "relu2", "qk_norm": False}, {"hidden_act": "relu2", "qk_norm": False}),
    ],
)
def test_a_shape_given_in_part_is_completed_to_the_size(chosen, kept):
    model = model_of("3M", "bm_transformer", **chosen)
    assert {name: getattr(model.config, name) for name in kept} == kept
    assert model.num_parameters() == pytest.approx(3e6, rel=0.15)


def test_the_trunk_has_neither_table_nor_head():
    tied, apart = model_of("1M", "bm_transformer"), model_of("1M", "bm_transformer", tie_word_embeddings=False)
    for model, tables in ((tied, 1), (apart, 2)):
        table = 1024 * model.config.hidden_size
        assert num_trunk_parameters(model) == model.num_parameters() - tables * table


# Training ------------------------------------------------------------------------------------------------------------


def test_batch_and_rate_are_those_of_the_step_law():
    """Li et al. 2025: eta = 1.79 N^-0.713 D^0.307, B = 0.58 D^0.571; here by logarithms to base 10."""
    assert batch_for(1e9) == pytest.approx(0.58 * 10 ** (9 * 0.571))
    assert learning_rate_for(1e8, 1e10) == pytest.approx(1.79 * 10 ** (-8 * 0.713 + 10 * 0.307))
    assert 79_000 < batch_for(1e9) < 80_500
    assert tokens_of_steps(1000) / batch_for(tokens_of_steps(1000)) == pytest.approx(1000)


def test_twenty_tokens_a_parameter_unless_that_is_more_than_four_times_the_data():
    assert tokens_for(1e6, 5e6) == (2e7, "20 a parameter")
    tokens, why = tokens_for(1e6, 4e5)
    assert tokens == 1.6e6
    assert why.startswith("4 times the 400K that the data have, and 1.6 a parameter; 20 a parameter would be 20M")


def derived(size=None, *, budget=None, rows=400_000, given=(), **settings):
    """The training settings of a model of width 32 for rows of 8 tokens."""
    sized, args = SizeArguments(size=size, budget=budget), LoopArguments(**settings)
    sized.given = dict.fromkeys(given)
    objective = SimpleNamespace(units_per_row=lambda split: 8.0, sampled_share=1.0, rows={"train": range(rows)})
    objective.train_batches = lambda **sizes: TinyBatches(0)
    objective.num_items, objective.num_units, objective.criterion = num_items, None, None
    objective.inputs_of = None
    accelerator = Accelerator(cpu=True)
    return TrainingDerivation(sized, args, objective, tiny_model(), accelerator).derive()


def test_training_follows_from_the_tokens():
    settings, notes = derived("1M")
    number = tiny_model().num_parameters()
    tokens = 20 * number
    assert settings["batch_size"] == round(0.58 * tokens**0.571 / 8)
    assert settings["num_train_steps"] == round(tokens / (8 * settings["batch_size"]))
    assert settings["eval_steps"] == settings["save_steps"] == math.ceil(settings["num_train_steps"] / 10)
    assert settings["learning_rate"] == pytest.approx(0.01 * (128 / 16) ** 0.5, rel=0.01)
    assert settings["muon_learning_rate"] == 0.02
    assert (settings["optimizer"], settings["schedule"]) == ("muon", "linear")
    assert "20 a parameter" in notes[0]


def test_the_rate_of_adamw_alone_is_that_of_the_step_law():
    settings, notes = derived("1M", given=["optimizer"], optimizer="adamw")
    tokens, trunk = 20 * tiny_model().num_parameters(), num_trunk_parameters(tiny_model())
    assert settings["learning_rate"] == pytest.approx(1.79 * trunk**-0.713 * tokens**0.307, rel=0.02)
    assert "muon_learning_rate" not in settings
    assert notes[-1] == "given by hand, and kept: optimizer=adamw"
    assert "learning_rate" not in derived("1M", given=["optimizer"], optimizer="sgd")[0]


def test_what_is_given_wins_and_is_named():
    free, _ = derived("1M")
    settings, notes = derived("1M", given=["batch_size", "schedule"], batch_size=4 * free["batch_size"])
    assert not {"batch_size", "schedule"} & settings.keys()
    assert settings["learning_rate"] == pytest.approx(2 * free["learning_rate"], rel=0.02)  # the root of the batch
    assert settings["num_train_steps"] == pytest.approx(free["num_train_steps"] / 4, abs=1)
    assert notes[-1] == f"given by hand, and kept: schedule=cosine, batch_size={4 * free['batch_size']}"
    settings, notes = derived("1M", given=["num_train_steps"], num_train_steps=50)
    assert "num_train_steps" not in settings
    assert settings["batch_size"] == round(0.58 * tokens_of_steps(50) ** 0.571 / 8)
    assert "num_train_steps=50 by hand" in notes[0]
    assert derived("1M", given=["num_train_steps"], num_train_steps=-1)[0] == free
    settings, notes = derived("1M", given=["num_train_epochs"], num_train_epochs=0.01)
    assert settings["num_train_steps"] * settings["batch_size"] == pytest.approx(4000, rel=0.1)


def test_a_large_batch_is_cut_into_forward_passes():
    settings, _ = derived("1M", given=["batch_size"], batch_size=5000)
    assert settings["micro_batch_size"] == 16384 // 8


def test_a_budget_caps_the_steps_by_what_a_step_takes(monkeypatch):
    settings, notes = derived(budget="2h", num_train_steps=-1, num_train_epochs=1000)
    seconds = float(notes[0].split(": ")[1].split(" ms")[0]) / 1000  # as measured here
    assert settings["num_train_steps"] <= 1.01 * 7200 / seconds
    monkeypatch.setattr(dial, "rehearse", lambda *_: Rehearsal(seconds=0.007, num_steps=3, num_bytes=0))
    settings, notes = derived(budget="2s", num_train_steps=-1, num_train_epochs=1000)
    assert notes[0].startswith("budget 2s: 7 ms a step, the mean of 3 measured now: 285 of ")
    assert settings == {"num_train_steps": 285}
    assert derived(budget="2h", rows=64)[0] == {"num_train_steps": 2}  # an epoch of 64 rows by 32 fits
    with pytest.raises(UserError, match=r"budget=0.000001s has no room for a step, which takes "):
        derived(budget="0.000001s")


def test_a_budget_makes_a_size_train_on_fewer_tokens_with_a_batch_for_these(monkeypatch):
    monkeypatch.setattr(dial, "rehearse", lambda *_: Rehearsal(seconds=0.001, num_steps=3, num_bytes=0))
    free, _ = derived("1M")
    settings, _ = derived("1M", budget="0.05s")
    assert settings["num_train_steps"] == 50 < free["num_train_steps"]
    assert settings["batch_size"] < free["batch_size"]
    assert settings["eval_steps"] == math.ceil(settings["num_train_steps"] / 10)


# The rehearsal -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["adamw", "muon", "sgd"])
def test_a_rehearsal_leaves_weights_and_random_numbers_as_they_were(optimizer):
    model = tiny_model(dropout=0.1)
    before, randomness = {k: v.clone() for k, v in model.state_dict().items()}, RngState()
    args = LoopArguments(optimizer=optimizer)
    found = rehearse(model, TinyBatches(0), Accelerator(cpu=True), Losses(num_items), args)
    assert found.seconds > 0
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(torch.equal(randomness[name], value) for name, value in RngState().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert "forward" not in vars(model)
    states = {"adamw": 2, "sgd": 1}.get(optimizer)
    if states:
        assert found.num_bytes > 4 * model.num_parameters() * (2 + states)
        assert found.num_bytes < 4 * model.num_parameters() * (2 + states) + 4e5


def test_what_a_backward_pass_needs_is_counted_once_and_without_the_weights():
    layers = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    with kept_for_backward(layers) as found:
        layers(torch.ones(10, 4))
    assert sum(found.values()) == 10 * 4 * 4 + 10 * 8 * 4  # the input, and the ReLU's output for both of its readers


# What is refused -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("text", "number"), [("1M", 1e6), ("300k", 3e5), ("1.5B", 1.5e9), (" 10m ", 1e7)])
def test_sizes(text, number):
    assert parameters_of(text) == number


@pytest.mark.parametrize(("text", "seconds"), [("90s", 90), ("5min", 300), ("2h", 7200), ("1.5 h", 5400)])
def test_budgets(text, seconds):
    assert SizeArguments(budget=text).seconds == seconds


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"size": "5X"}, "size='5X' is no number of parameters; give one such as 1M"),
        ({"size": "1000000"}, "size='1000000' is no number of parameters"),
        ({"size": "10K"}, "size=10K is out of range; give a size from 100K to 10B"),
        ({"budget": "soon"}, "budget='soon' is no time; give a number with s, min or h"),
        ({"budget": "5"}, "budget='5' is no time"),
        ({"budget": "0min"}, "budget='0min' is no time"),
    ],
)
def test_what_is_neither_a_size_nor_a_time_is_refused(settings, message):
    with pytest.raises(UserError, match=message):
        SizeArguments(**settings)
