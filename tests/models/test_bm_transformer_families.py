"""bm_transformer against BERT, ViT, GPT-2, Llama, Mistral and Qwen of transformers; `bmtk convert`; presets.

Weights are copied over, everything is float32 and in eval mode, and differences stay within TOLERANCE.
"""

import dataclasses

import pytest
import torch
import transformers
from huggingface_hub.errors import StrictDataclassClassValidationError
from oracle_cases import SEQ2SEQ, TINY, TOLERANCE, VOCAB, padded_rows, shake
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import nn
from transformers import AutoConfig, AutoModel

import bmtk  # noqa: F401  (registers the families)
from bmtk.catalogue import PUBLISHED
from bmtk.hub.convert import convert, converted
from bmtk.models.configuration_bm_transformer import BmTransformerConfig

BERT = {**TINY, "vocab_size": VOCAB, "max_position_embeddings": 64, "num_labels": 3}
VIT = {**TINY, "image_size": 12, "patch_size": 4, "num_labels": 3, "layer_norm_eps": 1e-6}
LLAMA = {**TINY, "vocab_size": VOCAB, "num_key_value_heads": 2, "max_position_embeddings": 64, "head_dim": 8,
         "num_labels": 3, "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "n_inner": 40, "vocab_size": VOCAB,
        "initializer_range": 0.2, "bos_token_id": 1, "eos_token_id": 2, "num_labels": 3}  # fmt: skip

# model type, its configuration, Auto class
ORACLES = {
    "BertModel": ("bert", BERT, "AutoModel"),
    "BertForMaskedLM": ("bert", BERT, "AutoModelForMaskedLM"),
    "BertForSequenceClassification": ("bert", BERT, "AutoModelForSequenceClassification"),
    "BertForTokenClassification": ("bert", BERT, "AutoModelForTokenClassification"),
    "BertForQuestionAnswering": ("bert", {**BERT, "num_labels": 2}, "AutoModelForQuestionAnswering"),
    "ViTModel": ("vit", VIT, "AutoModel"),
    "ViTForImageClassification": ("vit", VIT, "AutoModelForImageClassification"),
    "GPT2Model": ("gpt2", GPT2, "AutoModel"),
    "GPT2LMHeadModel": ("gpt2", GPT2, "AutoModelForCausalLM"),
    "LlamaForCausalLM": ("llama", LLAMA, "AutoModelForCausalLM"),
    "LlamaForSequenceClassification": ("llama", LLAMA, "AutoModelForSequenceClassification"),
    "MistralForCausalLM": ("mistral", {**LLAMA, "sliding_window": None}, "AutoModelForCausalLM"),
    "Qwen2ForCausalLM": ("qwen2", {**LLAMA, "tie_word_embeddings": True}, "AutoModelForCausalLM"),
    "Qwen3ForCausalLM": ("qwen3", {**LLAMA, "head_dim": 12}, "AutoModelForCausalLM"),
}
OUTPUTS = ("last_hidden_state", "pooler_output", "logits", "start_logits", "end_logits")


def oracle_of(name: str) -> nn.Module:
    model_type, config, auto_class = ORACLES[name]
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **config)
    oracle = shake(getattr(transformers, auto_class).from_config(config, attn_implementation="eager"))
    assert type(oracle).__name__ == name
    return oracle


def inputs_of(oracle: nn.Module) -> tuple[dict, torch.Tensor]:
    """A batch, and which positions of it are real."""
    if oracle.main_input_name == "pixel_values":
        return {"pixel_values": torch.randn(3, 3, 12, 12)}, torch.ones(3, 10).bool()
    ids, mask = padded_rows()
    if oracle.config.model_type == "bert":
        return {
            "input_ids": ids,
            "attention_mask": mask,
            "token_type_ids": (torch.arange(10) > 4).long() * mask,
        }, mask == 1
    return {"input_ids": ids[:1]}, mask[:1] == 1


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", ORACLES)
@torch.no_grad()
def test_converted_outputs_equal_the_oracle(name, attention, record_property):
    oracle = oracle_of(name)
    ours = converted(oracle, ORACLES[name][2])
    ours.set_attn_implementation(attention)
    batch, real = inputs_of(oracle)
    expected, found = oracle(**batch), ours(**batch)
    compared = [key for key in OUTPUTS if expected.get(key) is not None]
    assert compared
    for key in compared:
        a, b = found[key], expected[key]
        if a.shape[:2] == real.shape and key != "pooler_output":
            a, b = a[real], b[real]
        assert b.std() > 0.1, "the oracle's outputs are too small to say anything"
        difference = (a - b).abs().max().item()
        record_property(f"largest_oracle_difference_{key}", difference)
        assert difference <= TOLERANCE


@torch.no_grad()
def test_losses_equal_berts():
    """Where BERT's own loss is a mean over one micro-batch without padding, ours is the same."""
    for name, labels in {
        "BertForMaskedLM": {"labels": torch.randint(VOCAB, (3, 10))},
        "BertForTokenClassification": {"labels": torch.randint(3, (3, 10))},
        "BertForSequenceClassification": {"labels": torch.randint(3, (3,))},
        "BertForQuestionAnswering": {
            "start_positions": torch.tensor([1, 2, 9]),
            "end_positions": torch.tensor([4, 2, 9]),
        },
    }.items():
        oracle = oracle_of(name)
        ids, _ = padded_rows()
        ours = converted(oracle, ORACLES[name][2])
        assert abs(ours(input_ids=ids, **labels).loss - oracle(input_ids=ids, **labels).loss) <= TOLERANCE, name


# ------------------------------------------------------------------------------------ convert: folders to folders


@pytest.mark.parametrize(
    "name", ["BertForMaskedLM", "GPT2LMHeadModel", "Qwen2ForCausalLM", "ViTForImageClassification"]
)
@torch.no_grad()
def test_convert_saves_a_folder_with_the_same_outputs(name, tmp_path):
    oracle = oracle_of(name)
    oracle.save_pretrained(tmp_path / "theirs")
    conversion = convert(str(tmp_path / "theirs"), tmp_path / "ours")
    assert conversion.auto_class == ORACLES[name][2]
    assert conversion.difference <= TOLERANCE
    ours = getattr(transformers, conversion.auto_class).from_pretrained(conversion.directory)
    assert conversion.num_parameters == ours.num_parameters()
    batch, real = inputs_of(oracle)
    expected, found = oracle(**batch).logits, ours(**batch).logits
    if expected.ndim == 3:
        expected, found = expected[real], found[real]
    assert (found - expected).abs().max() <= TOLERANCE
    assert ours.config.id2label == oracle.config.id2label


def test_convert_keeps_the_tokenizer(tmp_path):
    oracle_of("GPT2LMHeadModel").save_pretrained(tmp_path / "theirs")
    words = Tokenizer(WordLevel({"<unk>": 0, "a": 1, "b": 2}, unk_token="<unk>"))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>")
    tokenizer.save_pretrained(tmp_path / "theirs")
    convert(str(tmp_path / "theirs"), tmp_path / "ours")
    assert (
        transformers.AutoTokenizer.from_pretrained(tmp_path / "ours")("a b")["input_ids"]
        == tokenizer("a b")["input_ids"]
    )


def test_convert_keeps_one_part_when_asked(tmp_path):
    oracle = oracle_of("BertForSequenceClassification")
    oracle.save_pretrained(tmp_path / "theirs")
    assert convert(str(tmp_path / "theirs"), tmp_path / "ours", auto_class="AutoModel").auto_class == "AutoModel"
    ids, _ = padded_rows()
    ours = AutoModel.from_pretrained(tmp_path / "ours")
    assert (ours(ids).pooler_output - oracle.bert(ids).pooler_output).abs().max() <= TOLERANCE


@pytest.mark.parametrize(
    ("model_class", "config", "message"),
    [
        ("BertForPreTraining", BERT, "BertForPreTraining cannot be converted, but BertModel, .*auto_class="),
        ("GPT2DoubleHeadsModel", GPT2, "GPT2DoubleHeadsModel cannot be converted, but GPT2Model"),
        ("BertModel", {**BERT, "hidden_act": "relu"}, r"hidden_act='relu' \(only 'gelu'\)"),
        ("ViTModel", {**VIT, "qkv_bias": False}, r"qkv_bias=False \(only True\)"),
        ("MistralForCausalLM", {**LLAMA, "sliding_window": 8}, r"sliding_window=8 \(only None\)"),
        ("DistilBertModel", {"dim": 32, "n_heads": 4, "n_layers": 1}, "is a 'distilbert'; convert knows bert, "),
    ],
)
def test_convert_refuses_by_name(model_class, config, message, tmp_path):
    model_class = getattr(transformers, model_class)
    model_class(model_class.config_class(**config)).save_pretrained(tmp_path / "theirs")
    with pytest.raises(ValueError, match=message):
        convert(str(tmp_path / "theirs"), tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


def test_convert_names_weights_without_a_place():
    oracle = oracle_of("BertModel")
    oracle.encoder.layer[0].attention.self.query.register_parameter("extra", nn.Parameter(torch.zeros(2)))
    del oracle.encoder.layer[1].output.dense.bias
    with pytest.raises(ValueError, match="BertModel cannot be converted to BmTransformerModel") as error:
        converted(oracle, "AutoModel")
    assert "layers.0.self_attn.q_proj.extra has no place" in str(error.value)
    assert "layers.1.mlp.down_proj.bias is missing" in str(error.value)


def test_convert_saves_nothing_when_outputs_differ(tmp_path, monkeypatch):
    """Simulates an unsupported setting that the checks do not know."""
    oracle_of("GPT2LMHeadModel").save_pretrained(tmp_path / "theirs")
    from bmtk.hub import convert as module

    source = module.SOURCES["gpt2"]
    wrong = dataclasses.replace(source, fields=lambda theirs: {**source.fields(theirs), "hidden_act": "relu"})
    monkeypatch.setitem(module.SOURCES, "gpt2", wrong)
    with pytest.raises(ValueError, match=r"its outputs differ by .* nothing was saved"):
        convert(str(tmp_path / "theirs"), tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


# ------------------------------------------------------------------------------------ what is refused, what counts


@pytest.mark.parametrize(
    ("auto_class", "changes", "message"),
    [
        ("AutoModelForTokenClassification", SEQ2SEQ, "makes two stacks, and BmTransformerPositions is one"),
        ("AutoModelForSeq2SeqLM", {}, "needs is_encoder_decoder=True"),
        ("AutoModelForCausalLM", {"is_causal": False}, "needs is_causal=True"),
        ("AutoModelForMaskedLM", {}, "needs is_causal=False: a causal trunk does not see what follows"),
        ("AutoModelForImageClassification", {}, "needs input_type='pixels'"),
        ("AutoModelForCTC", {}, "needs input_type='audio'"),
        ("AutoModelForAudioClassification", {"input_type": "pixels"}, "needs input_type='audio'"),
        ("AutoModelForTimeSeriesPrediction", {}, "needs input_type='series'"),
        ("AutoModelForMaskedLM", {"input_type": "audio"}, "needs input_type='tokens'"),
        ("AutoModelForCausalLM", {"input_type": "series"}, "needs input_type='tokens'"),
    ],
)
def test_heads_refuse_trunks_that_cannot_serve_them(auto_class, changes, message):
    config = BmTransformerConfig(**{**TINY, "vocab_size": VOCAB, **changes})
    with pytest.raises(ValueError, match=message):
        getattr(transformers, auto_class).from_config(config)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"is_encoder_decoder": True, "is_causal": False}, "is_encoder_decoder=True reads and writes tokens"),
        ({"is_encoder_decoder": True, "input_type": "audio"}, "input_type='audio'"),
        ({"input_type": "pixels", "image_size": 30}, "image_size=30 is not a multiple of patch_size=16"),
        ({"input_type": "series", "context_length": 10}, "context_length=10 is not a multiple of patch_size=16"),
    ],
)
def test_configurations_that_make_no_sense_are_refused(changes, message):
    with pytest.raises(StrictDataclassClassValidationError, match=message):
        BmTransformerConfig(**changes)


def test_token_types_are_not_dropped_silently(caplog):
    model = AutoModel.from_config(BmTransformerConfig(**TINY, vocab_size=VOCAB))
    transformers.utils.logging.warning_once.cache_clear()
    with caplog.at_level("WARNING", logger="bmtk.models.transformer_stems_bm"):
        model(torch.tensor([[3, 4]]), token_type_ids=torch.tensor([[0, 1]]))
    assert "token_type_ids are ignored: this model has type_vocab_size=0" in caplog.text
    typed = AutoModel.from_config(BmTransformerConfig(**TINY, vocab_size=VOCAB, type_vocab_size=2)).eval()
    a, b = (typed(torch.tensor([[3, 4]]), token_type_ids=torch.tensor([[0, t]])).last_hidden_state for t in (0, 1))
    assert (a - b).abs().max() > 1e-3


@pytest.mark.parametrize(("name", "model_type"), [("bert-base", "bert"), ("gpt2-small", "gpt2"), ("vit-s-16", "vit")])
def test_presets_are_the_shapes_of_transformers(name, model_type):
    changes = {"vit": {"hidden_size": 384, "num_attention_heads": 6, "intermediate_size": 1536, "num_labels": 1000}}
    auto_class = PUBLISHED[name].auto_class
    with torch.device("meta"):
        theirs = AutoConfig.for_model(model_type, **changes.get(model_type, {}))
        theirs = getattr(transformers, auto_class).from_config(theirs)
        ours = getattr(transformers, auto_class).from_config(BmTransformerConfig.from_preset(name))
    assert ours.num_parameters() == theirs.num_parameters()


def test_an_unknown_preset_or_field_is_named():
    with pytest.raises(ValueError, match="no preset 'bert'; there are bert-base"):
        BmTransformerConfig.from_preset("bert")
    with pytest.raises(ValueError, match="did you mean 'hidden_size'"):
        BmTransformerConfig.from_preset("bert-base", hiden_size=3)
