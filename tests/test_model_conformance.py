"""What transformers and the tools around it expect of any model, on every pair of family and head it applies to.

Graphs (torch.export, ONNX, torch.compile), names and order of outputs, the layer that reads an input, vocabularies,
plans of tensor parallelism, weights that are not in memory.  Generation and pipelines are in test_model_serving.py.
"""

import copy
import dataclasses
import inspect
import re
import typing
from functools import lru_cache

import accelerate
import onnxruntime
import peft
import pytest
import torch
from model_cases import (
    CASES,
    KINDS,
    LOSS_CASES,
    TRANSLATING_CASES,
    VOCAB,
    Case,
    output_of,
    over,
)
from torch import nn
from torch.utils import _pytree as pytree
from transformers import AutoModel, DynamicCache, EncoderDecoderCache, PreTrainedModel, StaticCache

CLOSE = 1e-5  # float32, through another kernel
ATTENDING_CASES = {name: case for name, case in CASES.items() if case.family == "bm_transformer"}
# One case for each family, head and kind of input, with and without a loss, beside those of KINDS.
OTHER_HEADS = {(case.family, case.head.auto_name, case.config().input_type): case for case in CASES.values()
               if case not in KINDS.values()}  # fmt: skip


def assert_near(found: torch.Tensor, expected: torch.Tensor, bound: float = CLOSE) -> None:
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= bound * expected.abs().max().clamp(min=1)


def has(case: Case, field: str) -> bool:
    return hasattr(case.config(), field)


def spread(case: Case, **changes) -> PreTrainedModel:
    """A model whose weights are wide enough that every term of an output counts; its output holds no cache."""
    without_cache = {"use_cache": False} if has(case, "use_cache") else {}
    return case.model(seed=2, initializer_range=0.2, **without_cache, **changes)


def main_input(model: PreTrainedModel, inputs: dict) -> str:
    return "input_ids" if model.main_input_name not in inputs else model.main_input_name


# Graphs --------------------------------------------------------------------------------------------------------------


def read_by(model: PreTrainedModel, inputs: dict) -> dict:
    """What the signature names: a bare trunk reads no calendar of the future."""
    return {name: value for name, value in inputs.items() if name in inspect.signature(model.forward).parameters}


def any_number_of_rows(inputs: dict) -> dict:
    return {name: {0: torch.export.Dim.DYNAMIC} for name in inputs}


def more_rows(inputs: dict) -> dict:
    return {name: torch.cat((value, value.flip(0), value)) for name, value in inputs.items()}


@lru_cache(maxsize=8)
def exported(case: Case) -> tuple[PreTrainedModel, dict, torch.export.ExportedProgram]:
    """A model, rows of its, and its graph: traced once, which takes seconds, for the tests of both formats."""
    model = spread(case)
    inputs = read_by(model, case.inputs())
    with torch.no_grad():
        return model, inputs, torch.export.export(model, (), inputs, dynamic_shapes=any_number_of_rows(inputs))


def assert_exported_outputs_are_equal(case: Case) -> None:
    model, inputs, program = exported(case)
    with torch.no_grad():
        for rows in (inputs, more_rows(inputs)):
            assert_near(output_of(program.module()(**rows)), output_of(model(**rows)))


@over(KINDS)
def test_an_exported_graph_takes_any_number_of_rows(case):
    assert_exported_outputs_are_equal(case)


@pytest.mark.slow
@over(OTHER_HEADS)
def test_an_exported_graph_of_every_other_head_takes_any_number_of_rows(case):
    assert_exported_outputs_are_equal(case)


def assert_onnx_outputs_are_equal(case: Case, program: torch.onnx.ONNXProgram, folder) -> None:
    model, inputs, _ = exported(case)
    program.save(folder / "model.onnx")
    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    rows = more_rows(inputs)
    found = session.run(None, {given.name: rows[given.name].numpy() for given in session.get_inputs()})
    with torch.no_grad():
        expected = [value for value in pytree.tree_leaves(dict(model(**rows))) if torch.is_tensor(value)]
    for theirs, mine in zip(found, expected, strict=True):
        assert_near(torch.tensor(theirs), mine)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")  # inside torch's exporter
@over(KINDS)
def test_onnxruntime_gives_the_same_outputs_for_any_number_of_rows(case, tmp_path):
    model, inputs, _ = exported(case)
    with torch.no_grad():
        program = torch.onnx.export(
            model, (), kwargs=inputs, dynamic_shapes=any_number_of_rows(inputs), dynamo=True, verbose=False
        )
    assert_onnx_outputs_are_equal(case, program, tmp_path)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@over(OTHER_HEADS)
def test_onnxruntime_gives_the_same_outputs_of_the_graph_of_every_other_head(case, tmp_path):
    """What torch.onnx.export would trace first is the graph that is there."""
    program = torch.onnx.export(exported(case)[2], dynamo=True, verbose=False)
    assert_onnx_outputs_are_equal(case, program, tmp_path)


@over({case.name: case for case in (CASES["transformer_modern-CausalLM"], CASES["transformer_translator-Seq2SeqLM"])})
@torch.no_grad()
def test_a_step_with_a_static_cache_is_one_graph(case):
    model = case.model(seed=2, initializer_range=0.2)
    ids, found = torch.randint(3, VOCAB, (2, 5)), []
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for one, static in ((model, False), (compiled, True)):
        caches = [StaticCache(config=model.config, max_cache_len=8) if static else DynamicCache(config=model.config)
                  for _ in range(2)]  # fmt: skip
        cache, given, name = caches[0], {}, "input_ids"
        if case.name in TRANSLATING_CASES:
            source = torch.arange(3, 19).view(2, 8)
            cache, name = EncoderDecoderCache(*caches), "decoder_input_ids"
            given = {"encoder_outputs": model.get_encoder()(source)}
        pieces = [one(**{name: piece}, **given, past_key_values=cache, use_cache=True).logits for piece in
                  (ids[:, :3], ids[:, 3:4], ids[:, 4:])]  # fmt: skip
        found.append(torch.cat(pieces, dim=1))
    assert_near(found[1], found[0])


# Outputs -------------------------------------------------------------------------------------------------------------


@over(LOSS_CASES)
@torch.no_grad()
def test_a_tuple_begins_with_the_loss_and_has_the_order_of_the_fields(case):
    model, batch = case.model(), case.batch()
    outputs, found = model(**batch), model(**batch, return_dict=False)
    assert torch.equal(found[0], outputs.loss)
    order = [field.name for field in dataclasses.fields(outputs) if outputs.get(field.name) is not None]
    assert list(outputs.keys()) == order
    assert len(found) == len(order)


@over(CASES)
@torch.no_grad()
def test_forward_is_annotated_by_the_class_that_names_its_outputs(case):
    """sentence-transformers reads the names of outputs from there."""
    model = case.model()
    annotated = typing.get_type_hints(type(model).forward)["return"]
    outputs = model(**case.batch())
    assert isinstance(outputs, annotated)
    assert set(outputs.keys()) <= {field.name for field in dataclasses.fields(annotated)}


@over(CASES)
@torch.no_grad()
def test_every_head_returns_the_attentions_it_has_and_its_hidden_states(case):
    model, inputs = case.model(), case.inputs()
    if case.family == "bm_transformer":
        model.set_attn_implementation("eager")
    outputs = model(**inputs, output_attentions=True, output_hidden_states=True)
    config, rows = model.config, len(next(iter(inputs.values())))
    depths = {"attentions": config.num_hidden_layers}
    if config.is_encoder_decoder:
        layers = getattr(config, "decoder_layers", None)
        depths = {"encoder_attentions": config.num_hidden_layers, "decoder_attentions": layers,
                  "cross_attentions": layers}  # fmt: skip
    if case.family == "bm_rnn":  # but for an attention of the target to the source
        depths = {"cross_attentions": 1} if config.is_encoder_decoder else {}
    if case.family == "bm_cnn":
        depths = {}
    assert {name for name in outputs.keys() if name.endswith("attentions")} == set(depths)
    for name, depth in depths.items():
        assert len(outputs[name]) == depth
        for weights in outputs[name]:
            assert weights.shape[0] == rows
            assert_near(weights.sum(-1), torch.ones(weights.shape[:-1]))
    states = [outputs[name] for name in outputs.keys() if name.endswith("hidden_states")]
    assert [len(found) for found in states] == [config.num_hidden_layers + 1] * (1 + config.is_encoder_decoder)


@over(CASES)
def test_what_is_recorded_is_named_by_one_class_each(case):
    for module in case.model().modules():
        for recorded in (getattr(module, "_can_record_outputs", None) or {}).values():
            assert isinstance(getattr(recorded, "target_class", recorded), type)


# Inputs --------------------------------------------------------------------------------------------------------------


@over(CASES)
@torch.no_grad()
def test_the_main_input_may_stand_first_and_under_the_name_that_the_class_gives_it(case):
    model, inputs = case.model(), case.inputs()
    expected = output_of(model(**inputs))
    first = inputs.pop(main_input(model, inputs))
    assert list(inspect.signature(type(model).forward).parameters)[1] == type(model).main_input_name
    assert torch.equal(output_of(model(first, **inputs)), expected)
    assert torch.equal(output_of(model(**{type(model).main_input_name: first}, **inputs)), expected)


@over(CASES)
@torch.no_grad()
def test_the_input_layer_is_the_one_that_reads_the_input(case):
    """Where no gradient reaches frozen weights, peft and Trainer make the output of this layer require one."""
    model, inputs, seen = case.model(), case.inputs(), []
    before, layer = output_of(model(**inputs)), model.get_input_embeddings()
    handle = layer.register_forward_hook(lambda *_: seen.append(1))
    model(**inputs)
    handle.remove()
    assert seen
    other = copy.deepcopy(layer) if list(layer.parameters()) else nn.Dropout(1.0).train()
    for parameter in other.parameters():
        parameter.copy_(torch.randn_like(parameter))
    model.set_input_embeddings(other)
    assert model.get_input_embeddings() is other
    assert not torch.equal(output_of(model(**inputs)), before)


def test_a_scaled_embedding_is_scaled_where_it_is_read_and_nowhere_else(tmp_path):
    model, ids = CASES["transformer_2017-CausalLM"].model(), torch.arange(3, 9)[None]
    embedding = model.get_input_embeddings()
    assert torch.equal(embedding(ids), embedding.weight[ids] * 32**0.5)
    assert model.lm_head.weight is embedding.weight
    model.save_pretrained(tmp_path)
    unscaled = CASES["transformer_2017-CausalLM"].load(tmp_path, scale_embedding=False)
    assert torch.equal(unscaled.get_input_embeddings().weight, embedding.weight)
    adapter = peft.LoraConfig("CAUSAL_LM", r=2, target_modules=["embed_tokens"], init_lora_weights=False)
    untied = CASES["transformer_2017-CausalLM"].model(tie_word_embeddings=False)
    adapted = peft.get_peft_model(untied, adapter).eval()
    with torch.no_grad():
        expected = adapted(ids).logits
        assert_near(adapted.merge_and_unload()(ids).logits, expected)


# Vocabularies --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@over(TRANSLATING_CASES)
@torch.no_grad()
def test_new_tokens_of_a_translator_are_known_on_both_sides(case, tied, tmp_path):
    model, inputs = case.model(tie_word_embeddings=tied), case.inputs()
    before = model(**inputs).logits
    model.resize_token_embeddings(VOCAB + 5)
    assert torch.equal(model(**inputs).logits[..., :VOCAB], before)
    inputs["input_ids"][0, 0] = inputs["decoder_input_ids"][1, 1] = VOCAB + 4
    expected = model(**inputs).logits
    assert expected.shape[-1] == VOCAB + 5
    sides = [stack.stem.embed_tokens.weight for stack in (model.model.encoder, model.model.decoder)]
    assert [side.shape[0] for side in sides] == [VOCAB + 5] * 2
    assert (sides[0] is sides[1]) == tied
    model.save_pretrained(tmp_path)
    assert torch.equal(case.load(tmp_path)(**inputs).logits, expected)


# Both stacks ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@over(TRANSLATING_CASES)
@torch.no_grad()
def test_both_stacks_of_a_translator_are_opened_by_auto_model(case, tied, tmp_path):
    model, inputs = case.model(tie_word_embeddings=tied), case.inputs()
    expected = model.model(**inputs).last_hidden_state
    model.save_pretrained(tmp_path / "head")
    trunk = AutoModel.from_pretrained(tmp_path / "head")
    assert type(trunk) is type(model.model) is type(AutoModel.from_config(model.config))
    assert torch.equal(trunk(**inputs).last_hidden_state, expected)
    trunk.save_pretrained(tmp_path / "trunk")
    assert list((tmp_path / "trunk").glob("modeling_*.py"))
    assert torch.equal(AutoModel.from_pretrained(tmp_path / "trunk")(**inputs).last_hidden_state, expected)


# Plans and places ----------------------------------------------------------------------------------------------------


@over(ATTENDING_CASES)
def test_the_plan_of_tensor_parallelism_names_every_matrix_of_the_layers_and_nothing_else(case):
    for changes in ({}, {"hidden_act": "swiglu"}, {"hidden_act": "relu"}):
        model = case.model(**changes)
        matrices = {re.sub(r"\d+", "*", name) for name, module in model.named_modules()
                    if isinstance(module, nn.Linear) and "layers." in name}  # fmt: skip
        heads = {"lm_head"} if case.head_name in ("CausalLM", "Seq2SeqLM") else set()
        tables = {name for name, module in model.named_modules()
                  if isinstance(module, nn.Embedding) and name.endswith("stem.embed_tokens")}  # fmt: skip
        norms = {re.sub(r"\d+", "*", name) for name, module in model.named_modules()
                 if name.endswith(("q_norm", "k_norm")) and list(module.parameters())}  # fmt: skip
        assert set(model.tp_plan) == matrices | heads | tables | norms
        trunk = matrices | tables | norms
        assert set(model.config.base_model_tp_plan) == {re.sub("^model[.]", "", name) for name in trunk}


@over(CASES)
def test_the_plan_of_sharding_names_modules_that_the_model_has(case):
    model = case.model()
    names = {re.sub(r"\d+", "*", name) for name, _ in model.named_modules()}
    assert model.fsdp_plan
    assert set(model.fsdp_plan) <= names
    assert model._no_split_modules
    assert model._no_split_modules <= {type(module).__name__ for module in model.modules()}


@over(CASES)
@torch.no_grad()
def test_weights_that_wait_elsewhere_are_fetched_by_the_module_that_needs_them(case):
    model, inputs = case.model(), case.inputs()
    expected = output_of(model(**inputs))
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    assert torch.equal(output_of(model(**inputs)), expected)
