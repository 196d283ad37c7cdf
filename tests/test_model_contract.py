"""The contract that every family keeps with every head.  The table is in model_cases.py: a row there is a row here."""

import copy
import json
import os
import re
import subprocess
import sys
import typing
from contextlib import contextmanager
from pathlib import Path

import peft
import pytest
import torch
from model_cases import (
    CASES,
    CAUSAL_CASES,
    COVERED_ELSEWHERE,
    FAMILIES,
    GENERATING_CASES,
    HEADS,
    LENGTH,
    LOSS_CASES,
    NEEDS,
    PIPELINE_CASES,
    POSITION_CASES,
    SHAPES,
    TURNED_HEADS,
    VOCAB,
    Case,
    answers_of,
    gradients,
    inputs_of,
    output_of,
    own_fields,
    turned_fields,
)
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    PreTrainedTokenizerFast,
    pipeline,
)

from bmtk.models import FAMILIES as REGISTERED

EXACT = 1e-6  # float32, the same sums in another order
CLOSE = 1e-5  # float32, through another kernel


def over(cases):
    """One test per row, called by the row's name."""
    return pytest.mark.parametrize("case", cases.values(), ids=list(cases))


def largest_difference(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    assert one.keys() == other.keys()
    return max((one[name] - other[name]).abs().max().item() for name in one)


def rows(batch: dict[str, torch.Tensor], start: int, stop: int) -> dict[str, torch.Tensor]:
    return {name: value[start:stop] for name, value in batch.items()}


def summed_gradients(case: Case, cuts: list[int]) -> dict[str, torch.Tensor]:
    """Gradients of one batch that is cut into micro-batches [0, cuts[0]), [cuts[0], cuts[1]), ..."""
    model, batch = case.model(), case.batch()
    num_items = case.head.num_items(batch["labels"])
    for start, stop in zip([0, *cuts], [*cuts, len(batch["labels"])], strict=True):
        model(**rows(batch, start, stop), num_items_in_batch=num_items).loss.backward()
    return gradients(model)


# Initialisation ------------------------------------------------------------------------------------------------------


@contextmanager
def poisoned_memory():
    """Memory that nobody wrote to reads NaN."""
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3).isnan().all()
        assert torch.utils.deterministic.fill_uninitialized_memory
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def assert_starting_values(case: Case, model: nn.Module, *, but: str = "") -> None:
    for name, parameter in model.named_parameters():
        if name == but:
            continue
        kind, value = FAMILIES[SHAPES[case.shape][0]].starting_value(name, model.config)
        if kind == "constant":
            assert (parameter == value).all(), name
        else:  # within five standard errors
            assert abs(parameter.std() / value - 1) < 5 / (2 * parameter.numel()) ** 0.5, name
            assert abs(parameter.mean()) < 5 * value / parameter.numel() ** 0.5, name


@over(LOSS_CASES)
def test_a_new_model_has_the_loss_of_chance(case):
    batch = case.batch()
    loss = case.model()(**batch).loss.item()
    assert loss == pytest.approx(case.head.chance_loss(batch["labels"]), abs=0.15)


@over(CASES)
def test_a_new_model_starts_from_the_values_its_family_states(case):
    assert_starting_values(case, case.model())


@over(CASES)
def test_a_checkpoint_that_lacks_everything_but_one_matrix_loads_fully_initialised(case, tmp_path):
    """`from_pretrained` builds on the meta device: what `_init_weights` skips would be raw memory."""
    model = case.model()
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    kept = next(name for name, value in weights.items() if name.endswith("o_proj.weight") or value.ndim > 1)
    save_file({kept: weights[kept] + 1}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with poisoned_memory():
        loaded = case.head.auto_class.from_pretrained(tmp_path)
    assert torch.equal(loaded.get_parameter(kept), weights[kept] + 1)
    assert_starting_values(case, loaded, but=kept)
    assert dict(loaded.named_buffers()).keys() == dict(model.named_buffers()).keys()
    for name, buffer in model.named_buffers():
        assert torch.equal(loaded.get_buffer(name), buffer), name
    loaded.load_state_dict(model.state_dict())  # what is neither parameter nor buffer shows in the outputs
    with torch.no_grad():
        assert torch.equal(output_of(loaded(**case.batch())), output_of(model(**case.batch())))


@over(CASES)
def test_weights_are_the_same_for_the_same_seed_only(case):
    one, again, other = (dict(case.model(seed=seed).named_parameters()) for seed in (0, 0, 1))
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert any(not torch.equal(one[name], other[name]) for name in one)


# Saving and loading --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@over(CASES)
def test_what_is_loaded_is_bitwise_what_was_saved(case, dtype, tmp_path):
    model, batch = case.model().to(dtype), case.batch()
    model.save_pretrained(tmp_path)
    loaded = case.head.auto_class.from_pretrained(tmp_path)
    assert type(loaded) is type(model)
    assert not loaded.training
    assert loaded.dtype == dtype
    saved, again = model.state_dict(), loaded.state_dict()
    assert saved.keys() == again.keys()
    assert all(torch.equal(saved[name], again[name]) for name in saved)
    if dtype == torch.float32:  # `.to(bfloat16)` rounds derived buffers too, loading does not
        with torch.no_grad():
            assert torch.equal(output_of(loaded(**batch)), output_of(model(**batch)))


@over(GENERATING_CASES)
def test_tied_weights_stay_one_tensor_and_untied_ones_two(case, tmp_path):
    case.model().save_pretrained(tmp_path)
    loaded = case.head.auto_class.from_pretrained(tmp_path)
    inside, outside = loaded.get_input_embeddings().weight, loaded.get_output_embeddings().weight
    tied = loaded.config.tie_word_embeddings
    assert (inside is outside) == tied
    assert ("lm_head.weight" in load_file(tmp_path / "model.safetensors")) == (not tied)


@over(POSITION_CASES)
def test_loading_in_bfloat16_keeps_derived_buffers_in_float32(case, tmp_path):
    model = case.model()
    model.save_pretrained(tmp_path)
    loaded = case.head.auto_class.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert all(torch.equal(loaded.get_buffer(name), buffer) for name, buffer in model.named_buffers())


@over(CASES)
def test_every_auto_class_of_the_family_resolves_after_import_bmtk(case, tmp_path):
    model = case.model()
    model.save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert type(config) is SHAPES[case.shape][0]
    assert {**config.to_dict(), "_name_or_path": ""} == model.config.to_dict()
    trunk = AutoModel.from_pretrained(tmp_path)
    expected = model.base_model.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in trunk.state_dict().items())
    for head in HEADS.values():
        assert type(config) in head.auto_class._model_mapping


# The loss contract ---------------------------------------------------------------------------------------------------


@over(LOSS_CASES)
def test_gradients_do_not_depend_on_accumulation(case):
    whole = summed_gradients(case, [])
    assert max(gradient.abs().max() for gradient in whole.values()) > 1e-3
    for cuts in ([1], [1, 2, 3], [3]):
        assert largest_difference(whole, summed_gradients(case, cuts)) <= EXACT


@over(LOSS_CASES)
def test_the_loss_without_a_count_is_the_mean_over_predicted_elements(case):
    model, batch = case.model(), case.batch()
    counted = model(**batch, num_items_in_batch=case.head.num_items(batch["labels"])).loss
    assert model(**batch).loss.item() == pytest.approx(counted.item(), rel=1e-6)
    assert model(**batch, num_items_in_batch=1).loss.item() == pytest.approx(
        counted.item() * case.head.num_items(batch["labels"]), rel=1e-6
    )


@over(LOSS_CASES)
def test_every_parameter_gets_a_gradient(case):
    model = case.model(seed=3)
    model(**case.batch()).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0 or name.endswith("k_proj.bias"), name  # softmax forgets a key bias


def one_of_two_processes(rank: int, folder: str) -> None:
    """Gradients of every case under DistributedDataParallel, this rank taking one row or three; rank 0 saves them."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    found = {}
    for name, case in LOSS_CASES.items():
        model, batch = nn.parallel.DistributedDataParallel(case.model()), case.batch()
        share = rows(batch, 0, 1) if rank == 0 else rows(batch, 1, 4)
        loss = model(**share, num_items_in_batch=case.head.num_items(batch["labels"])).loss
        (loss * 2).backward()  # DistributedDataParallel averages gradients over the two processes
        found |= {f"{name}/{key}": value for key, value in gradients(model.module).items()}
    if rank == 0:
        save_file(found, Path(folder) / "gradients.safetensors")
    torch.distributed.destroy_process_group()


def test_gradients_do_not_depend_on_the_number_of_processes(tmp_path):
    torch.multiprocessing.spawn(one_of_two_processes, args=(str(tmp_path),), nprocs=2)
    found = load_file(tmp_path / "gradients.safetensors")
    for name, case in LOSS_CASES.items():
        ours = {key.partition("/")[2]: value for key, value in found.items() if key.startswith(f"{name}/")}
        assert largest_difference(summed_gradients(case, []), ours) <= EXACT, name


@over(LOSS_CASES)
def test_one_batch_is_learnt_by_heart(case):
    model, batch = case.model().train(), case.batch()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    first = model(**batch).loss.item()
    for _ in range(60):
        loss = model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    assert loss.item() < 0.1 * first


# Padding, packing, causality -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("side", ["left", "right"])
@over(CASES)
@torch.no_grad()
def test_padding_changes_no_real_output(case, side, attention):
    model = case.model(seed=2, initializer_range=0.2)
    model.set_attn_implementation(attention)
    lengths = [LENGTH, 7, 3, 1]
    texts = [torch.randint(2, VOCAB, (1, length)) for length in lengths]
    ids, mask = torch.randint(VOCAB, (4, LENGTH)), torch.zeros(4, LENGTH, dtype=torch.long)
    for row, text in enumerate(texts):
        real = slice(0, text.shape[1]) if side == "right" else slice(LENGTH - text.shape[1], None)
        ids[row, real], mask[row, real] = text[0], 1
    padded, largest = output_of(model(ids, attention_mask=mask)), 0.0
    for row, text in enumerate(texts):
        alone = output_of(model(text))[0]
        largest = max(largest, alone.abs().max().item())
        together = padded[row, mask[row].bool()] if case.head.per_position else padded[row]
        assert (together - alone).abs().max() <= CLOSE
    assert largest > 0.1, "outputs are all small: the comparison says little"  # of one number per row, one may be


def packed_documents() -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]:
    """Two rows of documents, 4 + 5 + 3 and 6 + 6 tokens: the documents, the packed ids and their positions (2, 12)."""
    lengths = [[4, 5, 3], [6, 6]]
    documents = [[torch.randint(2, VOCAB, (1, length)) for length in row] for row in lengths]
    ids = torch.cat([torch.cat(row, dim=1) for row in documents])
    positions = torch.stack([torch.cat([torch.arange(length) for length in row]) for row in lengths])
    return [document for row in documents for document in row], ids, positions


@pytest.mark.parametrize("use_cache", [False, True], ids=["no-cache", "cache"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@over(POSITION_CASES)
@torch.no_grad()
def test_packed_documents_do_not_see_each_other(case, attention, use_cache):
    model = case.model(seed=2, initializer_range=0.2)
    model.set_attn_implementation(attention)
    documents, ids, positions = packed_documents()
    packed = output_of(model(ids, position_ids=positions, use_cache=use_cache))
    alone = torch.cat([output_of(model(document, use_cache=False))[0] for document in documents])
    assert (packed.flatten(0, 1) - alone).abs().max() <= CLOSE
    together = output_of(model(ids, use_cache=False)).flatten(0, 1)
    assert (together - alone).abs().max() > 0.01, "the documents are too small to disturb each other"


@over(GENERATING_CASES)
def test_packed_gradients_equal_unpacked_ones(case):
    documents, ids, positions = packed_documents()
    labels = ids.masked_fill(positions == 0, -100)  # nothing predicts the first token of the next document
    num_items = sum(document.shape[1] - 1 for document in documents)
    packed, apart = case.model(), case.model()
    packed(ids, position_ids=positions, labels=labels, num_items_in_batch=num_items, use_cache=False).loss.backward()
    for document in documents:
        apart(document, labels=document, num_items_in_batch=num_items).loss.backward()
    assert largest_difference(gradients(packed), gradients(apart)) <= EXACT


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@over(POSITION_CASES)
@torch.no_grad()
def test_later_tokens_change_no_earlier_output_of_a_causal_model(case, attention):
    model = case.model(seed=2, initializer_range=0.2)
    model.set_attn_implementation(attention)
    ids = torch.randint(2, VOCAB, (2, LENGTH))
    changed = ids.clone()
    changed[:, 8:] = (changed[:, 8:] + 7) % VOCAB
    difference = (output_of(model(ids)) - output_of(model(changed))).abs()
    assert difference[:, 8:].max() > 0.01
    if case.name in CAUSAL_CASES:
        assert difference[:, :8].max() == 0
    else:
        assert difference[:, :8].amax(dim=(1, 2)).min() > 0.01, "a bidirectional model sees what follows"


@over(LOSS_CASES)
@torch.no_grad()
def test_embeddings_give_what_their_tokens_give(case):
    model, batch = case.model(), case.batch()
    given = {"attention_mask": batch["attention_mask"]}
    embeds = model.base_model.stem.embed(batch["input_ids"])
    assert torch.equal(model(inputs_embeds=embeds, **given).logits, model(batch["input_ids"], **given).logits)


@over(GENERATING_CASES)
@torch.no_grad()
def test_logits_to_keep_keeps_the_last_or_the_named_positions(case):
    model, ids = case.model(), case.batch()["input_ids"]
    logits = model(ids).logits
    assert (model(ids, logits_to_keep=2).logits - logits[:, -2:]).abs().max() <= EXACT
    assert (model(ids, logits_to_keep=torch.tensor([0, 5])).logits - logits[:, [0, 5]]).abs().max() <= EXACT


# Configuration fields ------------------------------------------------------------------------------------------------


@torch.no_grad()
def generated(model) -> list[list[int]]:
    torch.manual_seed(0)
    prompts = torch.randint(2, VOCAB, (6, 3))
    settings = {"max_new_tokens": 8, "do_sample": False}
    answers = model.generate(prompts, attention_mask=torch.ones_like(prompts), **settings).tolist()
    if model.config.is_encoder_decoder:
        return answers
    return [
        *answers,
        *model.generate(**settings).tolist(),  # from bos alone
    ]


def behaviour(model, effect: str):
    """What the effect of that name compares."""
    torch.manual_seed(0)
    inputs = inputs_of(model.config)
    torch.manual_seed(0)
    with torch.no_grad():
        return {
            "shapes": lambda: {name: value.shape for name, value in model.named_parameters()},
            "weights": lambda: {name: value.tolist() for name, value in model.named_parameters()},
            "outputs": lambda: output_of(model.eval()(**inputs)).tolist(),
            "training": lambda: output_of(model.train()(**inputs)).tolist(),
            "loss": lambda: model.eval()(**inputs, **answers_of(model)).loss.item(),
            "cache": lambda: model(**inputs).past_key_values is None,
            "tie": lambda: model.get_input_embeddings().weight is model.get_output_embeddings().weight,
            "generation": lambda: generated(model),
        }[effect]()


def turned_models(config_class: type, field: str) -> tuple[nn.Module, nn.Module]:
    family = FAMILIES[config_class]
    turn = family.turns[field]
    head = TURNED_HEADS[turn.head]
    models = []
    for change in ({}, {field: turn.value}):
        torch.manual_seed(0)
        models.append(
            head.auto_class.from_config(config_class(**{**family.base, **head.config, **turn.base, **change}))
        )
    return models[0].eval(), models[1].eval()


FIELDS = [(config_class, field) for config_class in FAMILIES for field in own_fields(config_class)]


@pytest.mark.parametrize(("config_class", "field"), FIELDS, ids=[f"{c.model_type}-{field}" for c, field in FIELDS])
def test_every_config_field_is_turned_and_changes_what_it_should(config_class, field):
    turns = FAMILIES[config_class].turns
    assert field in turns, f"add {field} to the turns of {config_class.__name__}: another value, and what changes"
    effect = turns[field].effect
    if effect == "serves":
        with pytest.raises(ValueError, match=f"needs {field}={turns[field].value}"):
            turned_models(config_class, field)
        return
    base, turned = turned_models(config_class, field)
    assert getattr(turned.config, field) == turns[field].value != getattr(base.config, field)
    assert behaviour(base, effect) != behaviour(turned, effect)
    for equal in {"outputs": ["shapes", "weights"], "training": ["weights", "outputs"], "weights": ["shapes"],
                  "loss": ["weights", "outputs"]}.get(effect, []):  # fmt: skip
        assert behaviour(base, equal) == behaviour(turned, equal)


@pytest.mark.parametrize("config_class", REGISTERED, ids=lambda config_class: config_class.model_type)
def test_every_field_of_every_family_is_turned_and_no_turn_is_left_of_a_field_that_is_gone(config_class):
    assert turned_fields(config_class) == own_fields(config_class).keys()


def literal_choices() -> list[tuple[type, str, tuple]]:
    found = []
    for config_class in FAMILIES:
        for field, kind in own_fields(config_class).items():
            for part in (kind, *typing.get_args(kind)):
                if typing.get_origin(part) is typing.Literal:
                    found.append((config_class, field, typing.get_args(part)))
    return found


@pytest.mark.parametrize(
    ("config_class", "field", "choices"), literal_choices(), ids=[choice[1] for choice in literal_choices()]
)
def test_every_choice_of_a_field_behaves_differently(config_class, field, choices):
    family = FAMILIES[config_class]
    turn = family.turns[field]
    head = TURNED_HEADS[turn.head]
    seen = []
    for choice in choices:
        torch.manual_seed(0)
        fields = {**family.base, **head.config, **turn.base, field: choice}
        model = head.auto_class.from_config(config_class(**fields))
        seen.append(behaviour(model, "loss" if turn.effect == "loss" else "outputs"))
    assert all(one != other for i, one in enumerate(seen) for other in seen[:i])


@over(CASES)
def test_configs_survive_json(case, tmp_path):
    config = case.config()
    config.save_pretrained(tmp_path)
    assert type(config).from_pretrained(tmp_path).to_dict() == config.to_dict()
    assert type(config)(**json.loads(config.to_json_string())).to_dict() == config.to_dict()


# Training variants ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("use_reentrant", [False, True], ids=["non-reentrant", "reentrant"])
@over(LOSS_CASES)
def test_gradient_checkpointing_changes_no_gradient(case, use_reentrant):
    found, calls = [], []
    for checkpointing in (False, True):
        model = case.model(embedding_dropout=0.1, hidden_dropout=0.1, attention_dropout=0.1).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        counted = []
        model.base_model.layers[0].register_forward_pre_hook(lambda *_, counted=counted: counted.append(1))
        model.base_model.layers[0].mlp.register_forward_pre_hook(lambda *_, counted=counted: counted.append(1))
        torch.manual_seed(5)
        model(**case.batch()).loss.backward()
        found.append(gradients(model))
        calls.append(len(counted))
    assert calls[1] > calls[0], "nothing was computed twice: checkpointing is not active"
    assert largest_difference(*found) <= EXACT


@over({case.shape: case for case in CASES.values()})
@torch.no_grad()
def test_a_graph_without_breaks_gives_the_same_outputs(case):
    """Dynamo traces the whole forward pass; the generated kernels are the matter of the slow test below."""
    model, batch = case.model(initializer_range=0.2, num_hidden_layers=1), case.batch()
    batch.pop("labels", None)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert (output_of(compiled(**batch)) - output_of(model(**batch))).abs().max() <= CLOSE


@pytest.mark.slow
def test_compiled_kernels_change_no_output_and_no_gradient():
    case = next(iter(GENERATING_CASES.values()))
    model, batch = case.model(num_hidden_layers=1, initializer_range=0.2), case.batch()
    twin = copy.deepcopy(model)
    torch._dynamo.reset()
    compiled = torch.compile(model)
    ours, expected = compiled(**batch), twin(**batch)
    assert (ours.logits - expected.logits).abs().max() <= CLOSE
    ours.loss.backward()
    expected.loss.backward()
    assert largest_difference(gradients(model), gradients(twin)) <= CLOSE


@pytest.mark.parametrize("autocast", [False, True], ids=["bfloat16-weights", "autocast"])
@over(LOSS_CASES)
def test_bfloat16_trains(case, autocast):
    model, batch = case.model().train(), case.batch()
    expected = model(**batch).loss.item()
    if not autocast:
        model = model.bfloat16()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    losses = []
    for _ in range(8):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            outputs = model(**batch)
        assert outputs.logits.dtype == torch.bfloat16
        assert outputs.loss.dtype == torch.float32
        optimizer.zero_grad()
        outputs.loss.backward()
        optimizer.step()
        losses.append(outputs.loss.item())
    assert losses[0] == pytest.approx(expected, rel=0.02)
    assert losses[-1] < 0.95 * losses[0]


@over(LOSS_CASES)
def test_lora_trains_saves_and_merges(case, tmp_path):
    task = {"CausalLM": "CAUSAL_LM", "MaskedLM": None, "TokenClassification": "TOKEN_CLS"}.get(
        case.head_name, "SEQ_CLS"
    )
    base, batch = case.model(initializer_range=0.2), case.batch()
    frozen = {name: value.clone() for name, value in base.state_dict().items()}
    # peft leaves the classifier of SEQ_CLS alone, which it trains whole, but not that of TOKEN_CLS
    left_out = {"exclude_modules": ["score"]} if task == "TOKEN_CLS" else {}
    lora = peft.LoraConfig(task, r=4, target_modules="all-linear", **left_out)
    model = peft.get_peft_model(copy.deepcopy(base), lora)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    first = model(**batch).loss.item()
    for _ in range(10):
        optimizer.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.9 * first
    with torch.no_grad():
        model.eval()
        trained = model(**batch).logits
        model.save_pretrained(tmp_path / "adapter")
        assert all(
            "lora_" in name or "score" in name for name in load_file(tmp_path / "adapter/adapter_model.safetensors")
        )
        again = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
        assert (again(**batch).logits - trained).abs().max() <= CLOSE
        plain = {name: value for name, value in again.get_base_model().state_dict().items() if "score" not in name}
        names = {name: name.replace(".base_layer", "") for name in plain if "lora_" not in name}
        assert all(torch.equal(plain[name], frozen[original]) for name, original in names.items())
        merged = model.merge_and_unload()
        assert (merged(**batch).logits - trained).abs().max() <= CLOSE * trained.abs().max()
        merged.save_pretrained(tmp_path / "merged")
        loaded = case.head.auto_class.from_pretrained(tmp_path / "merged")
        assert torch.equal(loaded(**batch).logits, merged(**batch).logits)


@over(LOSS_CASES)
def test_resized_embeddings_keep_old_tokens_and_learn_new_ones(case, tmp_path):
    model, batch = case.model(), case.batch()
    with torch.no_grad():
        before = model(**batch).logits
        model.resize_token_embeddings(VOCAB + 5)
        after = model(**batch).logits
    width = before.shape[-1]
    assert torch.equal(after[..., :width], before)
    assert model.config.vocab_size == VOCAB + 5
    assert model.get_input_embeddings().weight.shape[0] == VOCAB + 5
    assert after.shape[-1] == (VOCAB + 5 if case.head_name in ("CausalLM", "MaskedLM") else width)
    batch["input_ids"][0, 0] = VOCAB + 4
    model(**batch).loss.backward()
    assert model.get_input_embeddings().weight.grad[VOCAB + 4].abs().sum() > 0
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(case.head.auto_class.from_pretrained(tmp_path)(**batch).logits, model(**batch).logits)


@over(CASES)
@torch.no_grad()
def test_embeddings_that_are_set_are_used(case):
    model, batch = case.model(), case.batch()
    before = output_of(model(**batch))
    shifted = nn.Embedding.from_pretrained(model.get_input_embeddings().weight.roll(1, dims=0))
    model.set_input_embeddings(shifted)
    assert model.get_input_embeddings() is shifted
    assert not torch.equal(output_of(model(**batch)), before)
    if case.name in GENERATING_CASES:
        model.set_output_embeddings(nn.Linear(model.config.hidden_size, 3))
        assert model(**{**batch, "labels": None}).logits.shape[-1] == 3


# Classification heads ------------------------------------------------------------------------------------------------

CLASSIFIERS = {name: case for name, case in LOSS_CASES.items() if not case.head.per_position}
TORCH_LOSSES = {
    "SequenceClassification": nn.functional.cross_entropy,
    "MultiLabelClassification": nn.functional.binary_cross_entropy_with_logits,
    "Regression": lambda logits, labels: nn.functional.mse_loss(logits[:, 0], labels),
}


@over(CLASSIFIERS)
@torch.no_grad()
def test_classification_losses_equal_torchs(case):
    model, batch = case.model(initializer_range=0.5), case.batch()
    outputs = model(**batch)
    expected = TORCH_LOSSES[case.head_name](outputs.logits, batch["labels"])
    assert outputs.loss.item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize(
    ("num_labels", "labels", "expected"),
    [
        (3, torch.tensor([0, 2]), "single_label_classification"),
        (3, torch.tensor([[0.0, 1, 1], [1, 0, 0]]), "multi_label_classification"),
        (1, torch.tensor([0.3, -2.0]), "regression"),
    ],
    ids=["single-label", "multi-label", "regression"],
)
def test_the_kind_of_problem_is_read_from_the_labels_once(num_labels, labels, expected):
    model = CASES["transformer_encoder-SequenceClassification"].model(num_labels=num_labels)
    ids = torch.randint(2, VOCAB, (2, 4))
    assert model.config.problem_type is None
    assert torch.isfinite(model(ids, labels=labels).loss)
    assert model.config.problem_type == expected


@torch.no_grad()
def test_ignored_labels_count_for_nothing():
    model = CASES["transformer_encoder-SequenceClassification"].model(initializer_range=0.5)
    ids, labels = torch.randint(2, VOCAB, (3, 4)), torch.tensor([1, -100, 2])
    alone = model(ids[[0, 2]], labels=labels[[0, 2]]).loss
    assert model(ids, labels=labels).loss.item() == pytest.approx(alone.item(), rel=1e-6)


# Generation and pipelines --------------------------------------------------------------------------------------------

STRATEGIES = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "temperature": 1.3},
    "beam": {"do_sample": False, "num_beams": 3},
}


def prompts() -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]:
    """Prompts of 8, 5 and 2 tokens: alone, and together with padding on the left (3, 8)."""
    alone = [torch.randint(2, VOCAB, (1, length)) for length in (8, 5, 2)]
    ids, mask = torch.zeros(3, 8, dtype=torch.long), torch.zeros(3, 8, dtype=torch.long)
    for row, prompt in enumerate(alone):
        ids[row, 8 - prompt.shape[1] :], mask[row, 8 - prompt.shape[1] :] = prompt, 1
    return alone, ids, mask


@pytest.mark.parametrize("strategy", STRATEGIES)
@over(GENERATING_CASES)
def test_the_cache_changes_no_generated_token(case, strategy):
    model = case.model(seed=4, initializer_range=0.3)
    _, ids, mask = prompts()
    found = []
    for settings in ({"use_cache": False}, {"use_cache": True}, {"use_cache": True, "prefill_chunk_size": 3}):
        torch.manual_seed(0)
        tokens = model.generate(ids, attention_mask=mask, max_new_tokens=10, **STRATEGIES[strategy], **settings)
        found.append(tokens[:, 8:].tolist())
    assert found[0] == found[1] == found[2]
    assert len({tuple(row) for row in found[0]}) == 3, "all prompts continue alike: the comparison says little"


@over(GENERATING_CASES)
@torch.no_grad()
def test_greedy_generation_under_left_padding_equals_one_row_at_a_time(case):
    model = case.model(seed=4, initializer_range=0.3)
    alone, ids, mask = prompts()
    together = model.generate(ids, attention_mask=mask, max_new_tokens=10, do_sample=False)
    for row, prompt in enumerate(alone):
        for _ in range(10):
            prompt = torch.cat([prompt, model(prompt, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
        assert together[row, 8:].tolist() == prompt[0, -10:].tolist()


@pytest.fixture(scope="module")
def tokenizer():
    words = ["<pad>", "<bos>", *(f"w{i}" for i in range(2, VOCAB))]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", bos_token="<bos>", padding_side="left")


@over(PIPELINE_CASES)
def test_the_pipeline_runs_from_a_saved_folder(case, tokenizer, tmp_path):
    model = case.model(initializer_range=0.3)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    texts = ["w3 w4 w5 w6", "w9"]
    if case.name in GENERATING_CASES:
        pipe = pipeline("text-generation", model=str(tmp_path), batch_size=2)
        answers = pipe(texts, max_new_tokens=4, do_sample=False)
        for text, answer in zip(texts, answers, strict=True):
            ids = tokenizer(text, return_tensors="pt")
            expected = model.generate(
                ids["input_ids"], attention_mask=ids["attention_mask"], max_new_tokens=4, do_sample=False
            )
            assert "".join(answer[0]["generated_text"].split()) == "".join(tokenizer.decode(expected[0]).split())
    else:
        pipe = pipeline("text-classification", model=str(tmp_path), batch_size=2)
        answers = pipe(texts, function_to_apply="none", top_k=None)
        logits = model(**tokenizer(texts, return_tensors="pt", padding=True)).logits
        for row, answer in zip(logits, answers, strict=True):
            assert sorted(one["score"] for one in answer) == pytest.approx(sorted(row.tolist()), abs=1e-5)


# Uploaded code, in a process that has no bmtk ------------------------------------------------------------------------

WITHOUT_BMTK = """
import importlib.abc, json, sys
from pathlib import Path

class NoBmtk(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "bmtk":
            raise ModuleNotFoundError("bmtk is not installed here")

sys.meta_path.insert(0, NoBmtk())
import torch, transformers
from safetensors.torch import load_file

def output_of(outputs):
    return outputs.logits if "logits" in outputs else outputs.last_hidden_state

def load(auto_name, folder):
    model = getattr(transformers, auto_name).from_pretrained(folder, trust_remote_code=True)
    assert type(model).__module__.startswith("transformers_modules."), type(model).__module__
    return model

found = {}
for folder in sorted(Path(sys.argv[1]).iterdir()):
    saved = load_file(folder / "expected.safetensors")
    expected = saved.pop("output")
    again = Path(sys.argv[2]) / folder.name
    with torch.no_grad():
        auto_name = json.loads((folder / "case.json").read_text())
        model = load(auto_name, folder)
        equal = torch.equal(output_of(model(**saved)), expected)
        model.save_pretrained(again)
        equal_again = torch.equal(output_of(load(auto_name, again)(**saved)), expected)
    heads = {}
    for name in transformers.AutoConfig.from_pretrained(folder, trust_remote_code=True).auto_map:
        try:
            heads[name] = type(load(name, folder)).__name__ if name != "AutoConfig" else "config"
        except ValueError as error:
            heads[name] = str(error)
    found[folder.name] = {"equal": equal, "equal_again": equal_again, "heads": heads}
assert not [name for name in sys.modules if name.split(".")[0] == "bmtk"]
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def uploaded(tmp_path_factory):
    """Every case saved, loaded without bmtk and saved again there: (folders, folders again, what the process said)."""
    root = tmp_path_factory.mktemp("uploaded")
    saved, again, elsewhere = root / "saved", root / "again", root / "elsewhere"
    elsewhere.mkdir()
    for name, case in CASES.items():
        model, batch = case.model(initializer_range=0.2), case.batch()
        batch.pop("labels", None)
        model.save_pretrained(saved / name)
        (saved / name / "case.json").write_text(json.dumps(case.head.auto_class.__name__))
        with torch.no_grad():
            expected = output_of(model(**batch))
        save_file({**batch, "output": expected.contiguous()}, saved / name / "expected.safetensors")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    child = subprocess.run(
        [sys.executable, "-c", WITHOUT_BMTK, str(saved), str(again)],
        cwd=elsewhere, env={**environment, "HF_MODULES_CACHE": str(root / "modules")}, capture_output=True, text=True,
    )  # fmt: skip
    assert child.returncode == 0, child.stderr
    return saved, again, json.loads(child.stdout.splitlines()[-1])


@over(CASES)
def test_uploaded_code_gives_equal_outputs_without_bmtk(case, uploaded):
    assert uploaded[2][case.name]["equal"]


@over(CASES)
def test_every_head_resolves_from_the_uploaded_map_without_bmtk(case, uploaded):
    heads = uploaded[2][case.name]["heads"]
    classes = {auto_name: reference.split(".")[1] for auto_name, reference in case.config().heads.items()}
    assert heads.keys() == {"AutoConfig", *classes}
    assert heads.pop("AutoConfig") == "config"
    for name, found in heads.items():
        field, value = NEEDS.get(name, ("input_type", "tokens"))
        if getattr(case.config(), field) == value:
            assert found == classes[name]
        else:
            assert found.startswith(f"{classes[name]} needs {field}={value!r}"), found


@over(CASES)
def test_a_model_saved_again_keeps_its_code_and_its_map(case, uploaded):
    saved, again, said = uploaded
    assert said[case.name]["equal_again"]
    codes = {path.name: path.read_text() for path in (saved / case.name).glob("*.py")}
    assert len(codes) >= 4
    assert {path.name: path.read_text() for path in (again / case.name).glob("*.py")} == codes
    maps = [json.loads((folder / case.name / "config.json").read_text())["auto_map"] for folder in (saved, again)]
    assert maps[0] == maps[1] == case.config().auto_map


@over(CASES)
def test_a_map_that_points_to_another_repository_does_not_survive(case, tmp_path):
    """transformers would run that repository's newest code, whatever revision of ours was asked for."""
    case.model().save_pretrained(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    content["auto_map"] = {name: f"other/repository--{value}" for name, value in content["auto_map"].items()}
    (tmp_path / "config.json").write_text(json.dumps(content))
    model = case.head.auto_class.from_pretrained(tmp_path)
    assert model.config.auto_map == case.config().auto_map


def test_a_bidirectional_trunk_is_no_language_model():
    with pytest.raises(ValueError, match="BmTransformerForCausalLM needs is_causal=True"):
        AutoModelForCausalLM.from_config(CASES["transformer_encoder-Model"].config())


def test_the_table_covers_every_registered_family_and_head():
    """Every pair of family and head has rows here, or a file of its own that builds it: never both, never neither."""
    here = {(SHAPES[case.shape][0].model_type, case.head.auto_class.__name__) for case in CASES.values()}
    elsewhere = {(family, name) for family, names in COVERED_ELSEWHERE for name in names}
    registered = {(config_class.model_type, name) for config_class in REGISTERED for name in config_class.heads}
    assert here | elsewhere == registered
    assert here & elsewhere == set()
    for (family, names), (files, reason) in COVERED_ELSEWHERE.items():
        assert reason
        text = "".join((Path(__file__).parent / "models" / name).read_text() for name in files)
        config_name = {config_class.model_type: config_class.__name__ for config_class in REGISTERED}[family]
        assert [name for name in (*names, config_name) if not re.search(rf"\b{name}\b", text)] == []
