"""The contract that every family keeps with every head.  The table is in model_cases.py: a row there is a row here.

How configuration fields act is in test_model_fields.py; what is generated, served and uploaded, in
test_model_serving.py.  No row is skipped: a test runs over the rows that a property of theirs names.
"""

import copy
import json
from contextlib import contextmanager
from pathlib import Path

import peft
import pytest
import torch
from model_cases import (
    CASES,
    CAUSAL_CASES,
    CAUSAL_LM_CASES,
    CHANCE_CASES,
    KINDS,
    LENGTH,
    LOSS_CASES,
    OTHER_PAIRS,
    PADDED_CASES,
    POSITION_CASES,
    TOKEN_CASES,
    VOCAB,
    WRITING_CASES,
    Case,
    output_of,
    over,
    without_answers,
)
from safetensors.torch import load_file, save_file
from starting_values import starting_value
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers.modeling_layers import GradientCheckpointingLayer

from bmtk.models import FAMILIES as REGISTERED

EXACT = 1e-6  # float32, the same sums in another order
CLOSE = 1e-5  # float32, through another kernel


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def assert_near(found: torch.Tensor, expected: torch.Tensor, bound: float, name: str = "") -> None:
    """The largest difference is small beside the largest value, or beside 1."""
    assert found.shape == expected.shape, name
    assert (found - expected).abs().max() <= bound * expected.abs().max().clamp(min=1), name


def assert_all_near(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], bound: float) -> None:
    assert found.keys() == expected.keys()
    for name in found:
        assert_near(found[name], expected[name], bound, name)


def rows(batch: dict, start: int, stop: int) -> dict:
    return {name: value[start:stop] for name, value in batch.items()}


def in_float64(value):
    """A batch whose sums in another order differ by far less than EXACT on every processor."""
    if isinstance(value, dict):
        return {name: in_float64(item) for name, item in value.items()}
    if isinstance(value, list):
        return [in_float64(item) for item in value]
    return value.double() if value.is_floating_point() else value


def summed_gradients(case: Case, cuts: list[int]) -> dict[str, torch.Tensor]:
    """Gradients of one batch that is cut into micro-batches [0, cuts[0]), [cuts[0], cuts[1]), ..., in float64."""
    model, batch = case.model().double(), in_float64(case.batch())
    num_items = case.num_items(model, batch)
    for start, stop in zip([0, *cuts], [*cuts, 4], strict=True):
        model(**rows(batch, start, stop), num_items_in_batch=num_items).loss.backward()
    return gradients(model)


def test_the_table_holds_every_registered_pair_of_family_and_head():
    here = {(case.family, case.head.auto_name) for case in CASES.values()}
    registered = {(config_class.model_type, name) for config_class in REGISTERED for name in config_class.heads}
    assert here == registered


# Initialisation ------------------------------------------------------------------------------------------------------


@contextmanager
def poisoned_memory():
    """Uninitialized memory reads as NaN."""
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3).isnan().all()
        assert torch.utils.deterministic.fill_uninitialized_memory
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def assert_starting_values(model: nn.Module, *, but: str = "") -> None:
    for name, parameter in model.named_parameters():
        if name == but:
            continue
        kind, value = starting_value(model, name)
        if kind == "constant":
            assert torch.equal(parameter, torch.zeros_like(parameter) + value), name
        else:  # within five standard errors
            assert abs(parameter.std() / value - 1) < 5 / (2 * parameter.numel()) ** 0.5, name
            assert abs(parameter.mean()) < 5 * value / parameter.numel() ** 0.5, name


@over(CHANCE_CASES)
def test_a_new_model_has_the_loss_of_chance(case):
    batch = case.batch()
    assert case.model()(**batch).loss.item() == pytest.approx(case.head.chance_loss(batch), abs=0.15)


@over(CASES)
def test_a_new_model_starts_from_the_values_its_family_states(case):
    assert_starting_values(case.model())


@over(CASES)
def test_a_checkpoint_that_lacks_everything_but_one_matrix_loads_fully_initialised(case, tmp_path):
    """`from_pretrained` builds on the meta device: what `_init_weights` skips would be raw memory."""
    model = case.model()
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    matrices = [name for name, value in weights.items() if value.ndim > 1 and "embed" not in name]
    kept = matrices[len(matrices) // 2]
    save_file({kept: weights[kept] + 1}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with poisoned_memory():
        loaded = case.load(tmp_path)
    assert torch.equal(loaded.get_parameter(kept), weights[kept] + 1)
    assert_starting_values(loaded, but=kept)
    assert dict(loaded.named_buffers()).keys() == dict(model.named_buffers()).keys()
    for name, buffer in model.named_buffers():
        assert torch.equal(loaded.get_buffer(name), buffer), name
    loaded.load_state_dict(model.state_dict())  # what is neither parameter nor buffer shows in the outputs
    with torch.no_grad():
        assert torch.equal(output_of(loaded(**case.inputs())), output_of(model(**case.inputs())))


@over(CASES)
def test_weights_are_the_same_for_the_same_seed_only(case):
    one, again, other = (dict(case.model(seed=seed).named_parameters()) for seed in (0, 0, 1))
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert any(not torch.equal(one[name], other[name]) for name in one)


# Saving and loading --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@over(CASES)
def test_what_is_loaded_is_bitwise_what_was_saved(case, dtype, tmp_path):
    model = case.model().to(dtype)
    model.save_pretrained(tmp_path)
    loaded = case.load(tmp_path)
    assert type(loaded) is type(model)
    assert not loaded.training
    assert loaded.dtype == dtype
    saved, again = model.state_dict(), loaded.state_dict()
    assert saved.keys() == again.keys()
    assert all(torch.equal(saved[name], again[name]) for name in saved)
    if dtype == torch.float32:  # `.to(bfloat16)` rounds derived buffers too, loading does not
        with torch.no_grad():
            assert torch.equal(output_of(loaded(**case.inputs())), output_of(model(**case.inputs())))


@over(WRITING_CASES)
def test_tied_weights_stay_one_tensor_and_untied_ones_two(case, tmp_path):
    case.model().save_pretrained(tmp_path)
    loaded = case.load(tmp_path)
    inside, outside = loaded.get_input_embeddings().weight, loaded.get_output_embeddings().weight
    tied = loaded.config.tie_word_embeddings
    assert (inside is outside) == tied
    shared = [name for name in load_file(tmp_path / "model.safetensors") if name.endswith(EMBEDDINGS)]
    assert len(shared) == (1 if tied else 2)


EMBEDDINGS = ("embed_tokens.weight", "lm_head.weight")


@over(CASES)
def test_loading_in_bfloat16_keeps_derived_buffers_in_float32(case, tmp_path):
    model = case.model()
    model.save_pretrained(tmp_path)
    loaded = case.load(tmp_path, dtype=torch.bfloat16)
    derived = {name for name, _ in model.named_buffers()} - model.state_dict().keys()
    assert all(torch.equal(loaded.get_buffer(name), model.get_buffer(name)) for name in derived)


@over(CASES)
def test_every_auto_class_of_the_family_resolves_after_import_bmtk(case, tmp_path):
    model = case.model()
    model.save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert type(config) is case.config_class
    assert {**config.to_dict(), "_name_or_path": ""} == model.config.to_dict()
    assert type(config) in case.head.auto_class._model_mapping
    if case.config_class.heads[case.head.auto_name] == case.config_class.heads["AutoModel"]:
        return
    trunk = AutoModel.from_pretrained(tmp_path).state_dict()
    for name, value in model.base_model.state_dict().items():
        assert torch.equal(trunk[name], value), name


def is_translator(case: Case) -> bool:
    return case.head_name == "Seq2SeqLM"


@over(CASES)
def test_configs_survive_json(case, tmp_path):
    config = case.config()
    config.save_pretrained(tmp_path)
    assert type(config).from_pretrained(tmp_path).to_dict() == config.to_dict()
    assert type(config)(**json.loads(config.to_json_string())).to_dict() == config.to_dict()


# The loss contract ---------------------------------------------------------------------------------------------------


@over(LOSS_CASES)
def test_gradients_do_not_depend_on_accumulation(case):
    whole = summed_gradients(case, [])
    assert max(gradient.abs().max() for gradient in whole.values()) > 1e-3
    for cuts in ([1], [1, 2, 3], [3]):
        assert_all_near(summed_gradients(case, cuts), whole, EXACT)


@over(LOSS_CASES)
def test_the_loss_without_a_count_is_the_mean_over_predicted_elements(case):
    model, batch = case.model(), case.batch()
    num_items = case.num_items(model, batch)
    assert num_items > 1
    counted = model(**batch, num_items_in_batch=num_items).loss.item()
    assert model(**batch).loss.item() == pytest.approx(counted, rel=1e-6)
    assert model(**batch, num_items_in_batch=1).loss.item() == pytest.approx(counted * num_items, rel=1e-6)


BLIND = ("k_proj.bias", "qa_outputs.bias")  # a softmax forgets what is added to all of its inputs


@over(LOSS_CASES)
def test_every_parameter_gets_a_gradient(case):
    model = case.model(seed=3)
    model(**case.batch()).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name  # DistributedDataParallel would wait for it for ever
        assert parameter.grad.abs().sum() > 0 or name.endswith(BLIND), name


class Together(nn.Module):
    """Every row's model in one module, so that one reduction serves all: the sum of their losses of a share."""

    def __init__(self):
        super().__init__()
        self.models = nn.ModuleDict({name: case.model().double() for name, case in LOSS_CASES.items()})

    def forward(self, start: int, stop: int) -> torch.Tensor:
        losses = []
        for name, case in LOSS_CASES.items():
            model, batch = self.models[name], in_float64(case.batch())
            num_items = case.num_items(model, batch)
            losses.append(model(**rows(batch, start, stop), num_items_in_batch=num_items).loss)
        return sum(losses)


def one_of_two_processes(rank: int, folder: str) -> None:
    """Gradients of every case under DistributedDataParallel, this rank taking one row or three; rank 0 saves them."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    together = nn.parallel.DistributedDataParallel(Together())
    loss = together(0, 1) if rank == 0 else together(1, 4)
    (loss * 2).backward()  # DistributedDataParallel averages gradients over the two processes
    if rank == 0:
        save_file(gradients(together.module.models), Path(folder) / "gradients.safetensors")
    torch.distributed.destroy_process_group()


def test_gradients_do_not_depend_on_the_number_of_processes(tmp_path):
    torch.multiprocessing.spawn(one_of_two_processes, args=(tmp_path,), nprocs=2)
    found = load_file(tmp_path / "gradients.safetensors")
    for name, case in LOSS_CASES.items():
        ours = {key.partition(".")[2]: value for key, value in found.items() if key.startswith(f"{name}.")}
        assert_all_near(ours, summed_gradients(case, []), EXACT)


@pytest.mark.trains
@over(LOSS_CASES)
def test_every_model_overfits_one_batch(case, training_seed):
    model, batch = case.model(seed=training_seed).train(), case.batch(seed=1 + training_seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    first = model(**batch).loss.item()
    is_plain = case.family == "bm_transformer" and case.config().input_type == "tokens"  # others have more to learn
    for _ in range(100 if is_plain else 600):
        loss = model(**batch).loss
        if loss < case.head.loss_left * first:
            return
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    pytest.fail(f"of a loss of {first:.3f}, {loss.item():.3f} is left")


# Padding, packing, causality -----------------------------------------------------------------------------------------


def with_attentions(cases: dict[str, Case]):
    """Every row with the kernels of attention it has: eager and sdpa, or none."""
    kernels = {"bm_transformer": ("eager", "sdpa")}
    pairs = [(case, kernel) for case in cases.values() for kernel in kernels.get(case.family, (None,))]
    names = [case.name if kernel is None else f"{case.name}-{kernel}" for case, kernel in pairs]
    return pytest.mark.parametrize(("case", "attention"), pairs, ids=names)


def spread_model(case: Case, attention: str | None = None) -> nn.Module:
    """A model whose weights are wide enough that every term of an output counts."""
    model = case.model(seed=2, initializer_range=0.2)
    if attention:
        model.set_attn_implementation(attention)
    return model


def padded(alone: list[torch.Tensor], side: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows (1, L, ...) of several lengths in one tensor, padded by noise, and its mask."""
    width = max(row.shape[1] for row in alone)
    shape = (len(alone), width, *alone[0].shape[2:])
    together = torch.randint(VOCAB, shape) if alone[0].dtype == torch.long else 7 * torch.randn(shape)
    mask = torch.zeros(len(alone), width, dtype=torch.long)
    for i, row in enumerate(alone):
        real = slice(0, row.shape[1]) if side == "right" else slice(width - row.shape[1], None)
        together[i, real], mask[i, real] = row[0], 1
    return together, mask


@pytest.mark.parametrize("side", ["left", "right"])
@with_attentions(PADDED_CASES)
@torch.no_grad()
def test_padding_changes_no_real_output(case, attention, side):
    model, inputs = spread_model(case, attention), case.inputs()
    given = model.base_model.main_input_name if not is_translator(case) else "input_ids"
    lengths = {"tokens": [LENGTH, 7, 3, 1], "audio": [40, 29, 6, 1]}[model.config.input_type]
    alone = [inputs[given][i : i + 1, :length] for i, length in enumerate(lengths)]
    others = {name: value for name, value in inputs.items() if name not in (given, "attention_mask")}
    together, mask = padded(alone, side)
    found, largest = output_of(model(**others, **{given: together, "attention_mask": mask})), 0.0
    for i, row in enumerate(alone):
        expected = output_of(model(**rows(others, i, i + 1), **{given: row}))[0]
        ours = found[i]
        if case.name in POSITION_CASES:
            ours = ours[mask[i].bool()]
        elif model.config.input_type == "audio":  # whose positions stand on the left, wherever the padding was
            ours = ours[: len(expected)]
        assert_near(ours, expected, CLOSE)
        largest = max(largest, expected.abs().max().item())
    assert largest > 0.02, "outputs are all small: the comparison says little"


def packed_documents() -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]:
    """Two rows of documents, 4 + 5 + 3 and 6 + 6 tokens: the documents, the packed ids and their positions (2, 12)."""
    lengths = [[4, 5, 3], [6, 6]]
    documents = [[torch.randint(2, VOCAB, (1, length)) for length in row] for row in lengths]
    ids = torch.cat([torch.cat(row, dim=1) for row in documents])
    positions = torch.stack([torch.cat([torch.arange(length) for length in row]) for row in lengths])
    return [document for row in documents for document in row], ids, positions


def assert_documents_are_apart(case: Case, attention: str | None, **settings) -> None:
    model = spread_model(case, attention)
    documents, ids, positions = packed_documents()
    packed = output_of(model(input_ids=ids, position_ids=positions, **settings))
    alone = torch.cat([output_of(model(input_ids=document))[0] for document in documents])
    assert_near(packed.flatten(0, 1), alone, CLOSE)
    together = output_of(model(input_ids=ids)).flatten(0, 1)
    assert (together - alone).abs().max() > 0.01, "the documents are too small to disturb each other"


@with_attentions(POSITION_CASES)
@torch.no_grad()
def test_packed_documents_do_not_see_each_other(case, attention):
    assert_documents_are_apart(case, attention)


@with_attentions(CAUSAL_CASES)
@torch.no_grad()
def test_packed_documents_do_not_see_each_other_when_a_cache_is_kept(case, attention):
    settings = {"use_cache": True} if case.head_name in ("Model", "CausalLM") else {}
    assert_documents_are_apart(case, attention, **settings)


@over(CAUSAL_LM_CASES)
def test_packed_gradients_equal_unpacked_ones(case):
    documents, ids, positions = packed_documents()
    labels = ids.masked_fill(positions == 0, -100)  # nothing predicts the first token of the next document
    num_items = sum(document.shape[1] - 1 for document in documents)
    packed, apart = case.model(), case.model()
    packed(ids, position_ids=positions, labels=labels, num_items_in_batch=num_items, use_cache=False).loss.backward()
    for document in documents:
        apart(document, labels=document, num_items_in_batch=num_items).loss.backward()
    assert_all_near(gradients(packed), gradients(apart), EXACT)


@with_attentions(POSITION_CASES)
@torch.no_grad()
def test_later_tokens_change_no_earlier_output_of_a_causal_model_and_do_of_any_other(case, attention):
    model, ids = spread_model(case, attention), torch.randint(2, VOCAB, (2, LENGTH))
    changed = ids.clone()
    changed[:, 8:] = (changed[:, 8:] + 7) % VOCAB
    difference = (output_of(model(input_ids=ids)) - output_of(model(input_ids=changed))).abs()
    assert difference[:, 8:].max() > 0.01
    if case.name in CAUSAL_CASES:
        assert difference[:, :8].max() == 0
    else:
        assert difference[:, :8].amax(dim=(1, 2)).min() > 1e-3, "a bidirectional model sees what follows"


@over({name: case for name, case in TOKEN_CASES.items() if not case.config().is_causal and not is_translator(case)})
def test_a_bidirectional_trunk_is_no_language_model(case):
    with pytest.raises(ValueError, match=f"{case.config_class.__name__[:-6]}ForCausalLM needs is_causal=True"):
        AutoModelForCausalLM.from_config(case.config(tie_word_embeddings=False))


@over(TOKEN_CASES)
@torch.no_grad()
def test_embeddings_give_what_their_tokens_give(case):
    model, inputs = case.model(), case.inputs()
    embedding = model.get_input_embeddings()  # as prompt tuning does, so a scale belongs inside it
    embeds = {name.replace("input_ids", "inputs_embeds"): embedding(inputs.pop(name))
              for name in [*inputs] if name.endswith("input_ids")}  # fmt: skip
    assert torch.equal(output_of(model(**embeds, **inputs)), output_of(model(**case.inputs())))


@over(CAUSAL_LM_CASES)
@torch.no_grad()
def test_logits_to_keep_keeps_the_last_or_the_named_positions(case):
    model, ids = case.model(), case.inputs()["input_ids"]
    logits = model(ids).logits
    assert_near(model(ids, logits_to_keep=2).logits, logits[:, -2:], EXACT)
    assert_near(model(ids, logits_to_keep=torch.tensor([0, 5])).logits, logits[:, [0, 5]], EXACT)


@over({name: case for name, case in TOKEN_CASES.items() if name in LOSS_CASES})
def test_resized_embeddings_keep_old_tokens_and_learn_new_ones(case, tmp_path):
    model, batch = case.model(), case.batch()
    with torch.no_grad():
        before = output_of(model(**batch))
        model.resize_token_embeddings(VOCAB + 5)
        after = output_of(model(**batch))
    width = before.shape[-1]
    assert torch.equal(after[..., :width], before)
    assert after.shape[-1] == (VOCAB + 5 if case.name in WRITING_CASES else width)
    assert model.config.vocab_size == model.get_input_embeddings().weight.shape[0] == VOCAB + 5
    batch["input_ids"][0, 8] = VOCAB + 4
    model(**batch).loss.backward()
    assert model.get_input_embeddings().weight.grad[VOCAB + 4].abs().sum() > 0
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        loaded = case.load(tmp_path)
        assert torch.equal(output_of(loaded(**batch)), output_of(model(**batch)))


@over(TOKEN_CASES)
@torch.no_grad()
def test_embeddings_that_are_set_are_used(case):
    model, inputs = case.model(), case.inputs()
    before = output_of(model(**inputs))
    shifted = nn.Embedding.from_pretrained(model.get_input_embeddings().weight.roll(1, dims=0))
    model.set_input_embeddings(shifted)
    assert model.get_input_embeddings() is shifted
    assert not torch.equal(output_of(model(**inputs)), before)
    if case.name in WRITING_CASES:
        model.set_output_embeddings(nn.Linear(model.get_output_embeddings().in_features, 3))
        assert model(**inputs).logits.shape[-1] == 3


# Training variants ---------------------------------------------------------------------------------------------------


def count_calls(model: nn.Module) -> list[int]:
    """A list that grows by every call of a layer inside what is checkpointed."""
    calls = []
    for layer in model.modules():
        if isinstance(layer, GradientCheckpointingLayer):
            for module in layer.modules():
                if module is not layer and not list(module.children()):
                    module.register_forward_pre_hook(lambda *_: calls.append(1))
    return calls


@pytest.mark.parametrize("use_reentrant", [False, True], ids=["non-reentrant", "reentrant"])
@over(LOSS_CASES)
def test_gradient_checkpointing_changes_no_gradient_and_no_statistic(case, use_reentrant):
    found, buffers, calls = [], [], []
    drops = {name: 0.1 for name in ("embedding_dropout", "hidden_dropout", "drop_path_rate") if has(case, name)}
    for checkpointing in (False, True):
        model, batch = case.model(**drops).train(), case.batch()
        for value in batch.values():  # reentrant checkpoints need an input with a gradient
            if torch.is_tensor(value) and value.is_floating_point() and use_reentrant:
                value.requires_grad_()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        calls.append(count_calls(model))
        torch.manual_seed(5)
        model(**batch).loss.backward()
        found.append(gradients(model))
        buffers.append({name: buffer.float() for name, buffer in model.named_buffers()})
    assert len(calls[1]) > len(calls[0]), "nothing was computed twice: checkpointing is not active"
    assert_all_near(found[1], found[0], EXACT)
    assert_all_near(buffers[1], buffers[0], EXACT)


def has(case: Case, field: str) -> bool:
    return hasattr(case.config(), field)


def assert_compiled_outputs_are_equal(case: Case, **changes) -> None:
    model, inputs = case.model(initializer_range=0.2, **changes), case.inputs()
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        assert_near(output_of(compiled(**inputs)), output_of(model(**inputs)), CLOSE)


@over(KINDS)
def test_a_compiled_graph_gives_the_same_outputs(case):
    """Dynamo traces the forward pass without a break; for kernels see below."""
    assert_compiled_outputs_are_equal(case)


@pytest.mark.slow
@over(OTHER_PAIRS)
def test_a_compiled_graph_of_every_other_head_gives_the_same_outputs(case):
    """Over one layer where the shape has a number of them: Dynamo takes its time for each, and KINDS have more."""
    assert_compiled_outputs_are_equal(case, **({} if "depths" in case.shape_fields else {"num_hidden_layers": 1}))


@pytest.mark.slow
def test_compiled_kernels_change_no_output_and_no_gradient():
    case = CASES["transformer_modern-CausalLM"]
    model, batch = case.model(num_hidden_layers=1, initializer_range=0.2), case.batch()
    twin = copy.deepcopy(model)
    torch._dynamo.reset()
    ours, expected = torch.compile(model)(**batch), twin(**batch)
    assert_near(ours.logits, expected.logits, CLOSE)
    ours.loss.backward()
    expected.loss.backward()
    assert_all_near(gradients(model), gradients(twin), CLOSE)


@pytest.mark.trains
@pytest.mark.parametrize("autocast", [False, True], ids=["bfloat16-weights", "autocast"])
@over(LOSS_CASES)
def test_bfloat16_trains(case, autocast, training_seed):
    model, batch = case.model(seed=training_seed).train(), case.batch(seed=1 + training_seed)
    expected = model(**batch).loss.item()
    if not autocast:
        model = model.bfloat16()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    losses = []
    for _ in range(8):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model(**batch).loss
        assert loss.dtype == torch.float32
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0, error_if_nonfinite=True)
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(expected, rel=0.03)
    assert losses[-1] < 0.97 * losses[0]


# Adapters ------------------------------------------------------------------------------------------------------------


def lora_targets(model: nn.Module) -> dict:
    """The matrices of an RNN's cells; of others, all linear layers, and where no tokens are read convolutions too."""
    matrices = [name for name, _ in model.named_parameters() if "rnn.weight_" in name]
    if matrices:
        endings = {name.partition(".recurrence.")[2] for name in matrices}
        return {"target_modules": [], "target_parameters": sorted(endings)}
    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d)
    convolutions = [
        name for name, module in model.base_model.named_modules()
        if isinstance(module, kinds) and getattr(module, "groups", 1) == 1
    ]  # fmt: skip
    if model.config.input_type != "tokens":
        return {"target_modules": convolutions}
    return {"target_modules": "all-linear"}


LORA_TASKS = {"CausalLM": "CAUSAL_LM", "TokenClassification": "TOKEN_CLS", "SequenceClassification": "SEQ_CLS",
              "MultiLabelClassification": "SEQ_CLS", "Regression": "SEQ_CLS", "Seq2SeqLM": "SEQ_2_SEQ_LM",
              "QuestionAnswering": "QUESTION_ANS"}  # fmt: skip
TRAINED_WHOLE = ("score", "qa_outputs")  # by peft, beside the adapter


def adapter_of(case: Case, base: nn.Module) -> peft.PeftModel:
    task = LORA_TASKS.get(case.head_name)
    # peft leaves the classifier of SEQ_CLS alone, which it trains whole, but not those of other tasks.
    left_out = {"exclude_modules": [*TRAINED_WHOLE, "lm_head"]} if task not in ("SEQ_CLS", "CAUSAL_LM") else {}
    return peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(task, r=4, **lora_targets(base), **left_out))


def train_adapter(model: peft.PeftModel, batch: dict) -> tuple[float, float]:
    """The loss before and after 11 steps, in eval mode: batch statistics of a frozen base must not move.

    Up to 50 where that is little: a detector, whose loss is mostly that of its boxes, is slow to begin.
    """
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    losses = []
    while len(losses) < 11 or (losses[-1] > 0.9 * losses[0] and len(losses) < 50):
        loss = model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses[0], losses[-1]


@pytest.mark.trains
@over(LOSS_CASES)
def test_lora_trains_saves_and_merges(case, tmp_path, training_seed):
    base, batch = case.model(seed=training_seed, initializer_range=0.2), case.batch(seed=1 + training_seed)
    inputs = without_answers(batch)
    frozen = {name: value.clone() for name, value in base.state_dict().items()}
    model = adapter_of(case, base).eval()
    first, last = train_adapter(model, batch)
    assert last < 0.97 * first
    with torch.no_grad():
        trained = output_of(model(**inputs))
        model.save_pretrained(tmp_path / "adapter")
        saved = load_file(tmp_path / "adapter/adapter_model.safetensors")
        assert all("lora_" in name or name.split(".")[-2] in TRAINED_WHOLE for name in saved)
        again = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "adapter").eval()
        assert_near(output_of(again(**inputs)), trained, CLOSE)
        assert all(torch.equal(value, frozen[name]) for name, value in base.state_dict().items())
        exact = output_of(model.double()(**in_float64(inputs)))
        merged = model.merge_and_unload()
        assert_near(output_of(merged(**in_float64(inputs))), exact, CLOSE)
        merged.float().save_pretrained(tmp_path / "merged")
        loaded = case.load(tmp_path / "merged")
        assert torch.equal(output_of(loaded(**inputs)), output_of(merged(**inputs)))
