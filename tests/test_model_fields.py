"""Every field of every configuration class is read: another value changes what field_turns.py says, and that only."""

import typing

import pytest
import torch
from field_turns import TURNS, Turn, own_fields
from model_cases import HEADS, READ, VOCAB, output_of
from torch import nn

from bmtk.models import FAMILIES as REGISTERED
from bmtk.models.image_processing_bm import BmImageProcessor


def turns_of(config_class: type, field: str) -> tuple[Turn, ...]:
    turns = TURNS[config_class].of[field]
    return turns if isinstance(turns, tuple) else (turns,)


@torch.no_grad()
def generated(model: nn.Module) -> list[list[int]]:
    torch.manual_seed(0)
    prompts = torch.randint(2, VOCAB, (6, 3))
    settings = {"max_new_tokens": 8, "do_sample": False}
    answers = model.generate(prompts, attention_mask=torch.ones_like(prompts), **settings).tolist()
    from_bos_alone = [] if model.config.is_encoder_decoder else model.generate(**settings).tolist()
    return answers + from_bos_alone


@torch.enable_grad()
def gradients(model: nn.Module, batch: dict) -> dict[str, list]:
    model(**batch).loss.backward()
    return {
        name: parameter.grad.tolist() for name, parameter in model.named_parameters() if parameter.grad is not None
    }


def behaviour(model: nn.Module, effect: str, head: str):
    """What the effect of that name compares."""
    torch.manual_seed(0)
    inputs = READ[model.config.input_type](model.config)
    answers = HEADS[head].answers(inputs, model.config) if HEADS[head].answers else {}
    torch.manual_seed(0)
    with torch.no_grad():
        return {
            "shapes": lambda: {name: value.shape for name, value in model.named_parameters()},
            "weights": lambda: {name: value.tolist() for name, value in model.named_parameters()},
            "buffers": lambda: {name: value.shape for name, value in model.named_buffers()},
            "outputs": lambda: output_of(model.eval()(**inputs)).tolist(),
            "training": lambda: output_of(model.train()(**inputs)).tolist(),
            "loss": lambda: model.eval()(**inputs, **answers).loss.item(),
            "gradients": lambda: gradients(model.eval(), {**inputs, **answers}),
            "penalty": lambda: model.train()(**inputs, **answers).loss.item(),
            "cache": lambda: model(**inputs).past_key_values is None,
            "tie": lambda: model.get_input_embeddings().weight is model.get_output_embeddings().weight,
            "generation": lambda: generated(model),
            "times": lambda: model.config.inputs_to_logits_ratio,
            "processor": lambda: BmImageProcessor.for_config(model.config).size["height"],
        }[effect]()


EQUAL_BESIDE = {"outputs": ["shapes", "weights"], "training": ["weights", "outputs"], "weights": ["shapes"],
                "loss": ["weights", "outputs"], "gradients": ["weights", "outputs"],
                "buffers": ["weights", "outputs"],
                "penalty": ["weights", "outputs", "loss"],
                "processor": ["weights"], "times": ["weights", "outputs"]}  # fmt: skip


def model_of(config_class: type, turn: Turn, **change) -> nn.Module:
    torch.manual_seed(0)
    head = HEADS[turn.head]
    config = config_class(**{**TURNS[config_class].base, **head.config, **turn.base, **change})
    return head.auto_class.from_config(config).eval()


ALL_TURNS = [
    pytest.param(config_class, field, turn, id=f"{config_class.model_type}-{field}-{turn.value}".replace(" ", ""))
    for config_class in REGISTERED
    for field in TURNS[config_class].of
    for turn in turns_of(config_class, field)
]


@pytest.mark.parametrize("config_class", REGISTERED, ids=lambda config_class: config_class.model_type)
def test_every_field_of_every_family_is_turned_and_no_turn_is_left_of_a_field_that_is_gone(config_class):
    assert TURNS[config_class].of.keys() == own_fields(config_class).keys()


@pytest.mark.parametrize(("config_class", "field", "turn"), ALL_TURNS)
def test_every_config_field_changes_what_it_should(config_class, field, turn):
    if turn.effect == "serves":
        with pytest.raises(ValueError, match=f"needs {field}={turn.value}"):
            model_of(config_class, turn)
        return
    base, turned = model_of(config_class, turn), model_of(config_class, turn, **{field: turn.value})
    assert getattr(turned.config, field) == turn.value != getattr(base.config, field)
    assert behaviour(base, turn.effect, turn.head) != behaviour(turned, turn.effect, turn.head)
    for equal in EQUAL_BESIDE.get(turn.effect, []):
        assert behaviour(base, equal, turn.head) == behaviour(turned, equal, turn.head)


def literals_of(kind) -> tuple:
    """The choices of a field whose annotation is a Literal, or a Literal or None."""
    parts = (kind, *typing.get_args(kind))
    return next((typing.get_args(part) for part in parts if typing.get_origin(part) is typing.Literal), ())


CHOICES = [
    pytest.param(config_class, field, id=f"{config_class.model_type}-{field}")
    for config_class in REGISTERED
    for field, kind in own_fields(config_class).items()
    if literals_of(kind)
]


@pytest.mark.parametrize(("config_class", "field"), CHOICES)
def test_every_choice_of_a_field_behaves_differently(config_class, field):
    turns, left = turns_of(config_class, field), set(literals_of(own_fields(config_class)[field]))
    for turn in turns:
        seen = []
        for choice in turn.choices or literals_of(own_fields(config_class)[field]):
            model = model_of(config_class, turn, **{field: choice})
            seen.append(behaviour(model, "loss" if turn.effect == "loss" else "outputs", turn.head))
            left.discard(choice)
        assert all(one != other for i, one in enumerate(seen) for other in seen[:i])
    assert left == set()
