"""bm_transformer as encoder and encoder-decoder against independent oracles: BERT and ViT of transformers, and
torch.nn.Transformer; `bmtk convert`; and what presets count.

Weights are copied over, everything is float32 and in eval mode, and differences stay within TOLERANCE.
"""

import dataclasses
import math

import pytest
import torch
import transformers
from huggingface_hub.errors import StrictDataclassClassValidationError
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForSeq2SeqLM

import bmtk  # noqa: F401  (registers the families)
from bmtk.hub.convert import convert, converted
from bmtk.models.configuration_bm_transformer import PRESETS, BmTransformerConfig

TOLERANCE = 1e-5
VOCAB = 61
# The default 0.02 leaves attention nearly uniform: larger weights make every term count.
TINY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 40,
        "initializer_range": 0.2}  # fmt: skip
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


def shake(model: nn.Module) -> nn.Module:
    """Move biases and norm weights away from the 0 and 1 they start at, so that an oracle sees them."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return model.eval()


def oracle_of(name: str) -> nn.Module:
    model_type, config, auto_class = ORACLES[name]
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **config)
    oracle = shake(getattr(transformers, auto_class).from_config(config, attn_implementation="eager"))
    assert type(oracle).__name__ == name
    return oracle


def padded_rows(side: str = "right") -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids (3, 10) and the mask of rows of 10, 7 and 3 real tokens."""
    ids = torch.randint(3, VOCAB, (3, 10))
    lengths, steps = torch.tensor([10, 7, 3])[:, None], torch.arange(10)[None]
    return ids, ((steps < lengths) if side == "right" else (steps >= 10 - lengths)).long()


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
    """As a setting that nobody thought of would do."""
    oracle_of("GPT2LMHeadModel").save_pretrained(tmp_path / "theirs")
    from bmtk.hub import convert as module

    source = module.SOURCES["gpt2"]
    wrong = dataclasses.replace(source, fields=lambda theirs: {**source.fields(theirs), "hidden_act": "relu"})
    monkeypatch.setitem(module.SOURCES, "gpt2", wrong)
    with pytest.raises(ValueError, match=r"its outputs differ by .* nothing was saved"):
        convert(str(tmp_path / "theirs"), tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


# ------------------------------------------------------------------------------------ encoder-decoder: nn.Transformer

SEQ2SEQ = {
    **TINY, "vocab_size": VOCAB, "decoder_layers": 3, "hidden_act": "relu", "norm_type": "layer_norm",
    "position_embedding_type": "sinusoidal", "attention_bias": True, "mlp_bias": True, "scale_embedding": True,
    "is_encoder_decoder": True, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1,
}  # fmt: skip


def seq2seq(**changes) -> nn.Module:
    torch.manual_seed(0)
    return shake(AutoModelForSeq2SeqLM.from_config(BmTransformerConfig(**{**SEQ2SEQ, **changes})))


def sinusoids(length: int, width: int) -> torch.Tensor:
    """Vaswani et al. 2017, section 3.5, written as the paper does, in Python floats."""
    table = torch.zeros(length, width)
    for position in range(length):
        for i in range(width // 2):
            angle = position / 10000 ** (2 * i / width)
            table[position, 2 * i], table[position, 2 * i + 1] = math.sin(angle), math.cos(angle)
    return table


def attention_weights(theirs: str, ours: nn.Module) -> dict[str, torch.Tensor]:
    projections = [ours.q_proj, ours.k_proj, ours.v_proj]
    return {
        f"{theirs}.in_proj_weight": torch.cat([p.weight for p in projections]),
        f"{theirs}.in_proj_bias": torch.cat([p.bias for p in projections]),
        f"{theirs}.out_proj.weight": ours.o_proj.weight,
        f"{theirs}.out_proj.bias": ours.o_proj.bias,
    }


def torch_transformer(ours: nn.Module) -> nn.Transformer:
    """torch.nn.Transformer holding the weights of our trunk; post-norm has no last norms, as in the paper."""
    config = ours.config
    pre_norm = config.norm_position == "pre"
    oracle = nn.Transformer(
        config.hidden_size, config.num_attention_heads, config.num_hidden_layers, config.decoder_layers,
        config.intermediate_size, dropout=0.0, norm_first=pre_norm, batch_first=True, layer_norm_eps=config.norm_eps,
    )  # fmt: skip
    for side in (oracle.encoder, oracle.decoder):
        mine = ours.encoder if side is oracle.encoder else ours.decoder
        for theirs, layer in zip(side.layers, mine.layers, strict=True):
            norms = {"norm1": layer.attention_norm, "norm2": layer.mlp_norm}
            weights = attention_weights("self_attn", layer.self_attn)
            if side is oracle.decoder:
                norms = {"norm1": layer.attention_norm, "norm2": layer.cross_norm, "norm3": layer.mlp_norm}
                weights |= attention_weights("multihead_attn", layer.cross_attn)
            parts = {"linear1": layer.mlp.up_proj, "linear2": layer.mlp.down_proj, **norms}
            weights |= {f"{name}.{key}": v for name, part in parts.items() for key, v in part.state_dict().items()}
            theirs.load_state_dict(weights, strict=True)
        if pre_norm:
            side.norm.load_state_dict(mine.norm.state_dict())
        else:
            side.norm = None
    return oracle.eval()


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("norm_position", ["pre", "post"])
@torch.no_grad()
def test_encoder_decoder_equals_torchs_transformer(norm_position, attention, record_property):
    ours = seq2seq(norm_position=norm_position).model
    ours.set_attn_implementation(attention)
    oracle = torch_transformer(ours)
    source, mask = padded_rows()
    target = torch.randint(3, VOCAB, (3, 8))
    embeds = [
        ours.encoder.stem.embed_tokens(ids) * math.sqrt(32) + sinusoids(ids.shape[1], 32) for ids in (source, target)
    ]
    expected = oracle(
        *embeds,
        tgt_mask=nn.Transformer.generate_square_subsequent_mask(8).isinf(),
        src_key_padding_mask=mask == 0,
        memory_key_padding_mask=mask == 0,
    )
    outputs = ours(input_ids=source, attention_mask=mask, decoder_input_ids=target)
    assert expected.std() > 0.1
    difference = (outputs.last_hidden_state - expected).abs().max().item()
    record_property("largest_oracle_difference", difference)
    assert difference <= TOLERANCE


@pytest.mark.parametrize("positions", ["sinusoidal", "rotary", "learned"])
@torch.no_grad()
def test_decoding_step_by_step_equals_decoding_at_once(positions):
    model = seq2seq(position_embedding_type=positions)
    source, mask = padded_rows()
    target = torch.randint(3, VOCAB, (3, 9))
    expected = model(input_ids=source, attention_mask=mask, decoder_input_ids=target, use_cache=False).logits
    encoder_outputs = model.get_encoder()(input_ids=source, attention_mask=mask)
    cache, pieces, start = None, [], 0
    for size in (1, 4, 1, 3):
        outputs = model(
            encoder_outputs=encoder_outputs, attention_mask=mask, decoder_input_ids=target[:, start : start + size],
            past_key_values=cache, use_cache=True,
        )  # fmt: skip
        cache, start = outputs.past_key_values, start + size
        pieces.append(outputs.logits)
    assert (torch.cat(pieces, 1) - expected).abs().max() <= TOLERANCE


@torch.no_grad()
def test_cross_attention_projects_a_source_once():
    model = seq2seq()
    calls = []
    for layer in model.model.decoder.layers:
        layer.cross_attn.k_proj.register_forward_hook(lambda *_: calls.append(1))
    source, mask = padded_rows()
    model.generate(source, attention_mask=mask, max_new_tokens=6, min_new_tokens=6, do_sample=False)
    assert len(calls) == 3


@pytest.mark.parametrize("num_beams", [1, 3])
def test_generated_text_is_the_most_likely_one_and_ignores_padding(num_beams):
    model = seq2seq()
    settings = {"max_new_tokens": 7, "num_beams": num_beams, "do_sample": False}
    source, mask = padded_rows("left")
    together = model.generate(source, attention_mask=mask, **settings)
    alone = [model.generate(row[real.bool()][None], **settings)[0] for row, real in zip(source, mask, strict=True)]
    for row, expected in zip(together, alone, strict=True):
        assert row[: len(expected)].tolist() == expected.tolist()
        assert set(row[len(expected) :].tolist()) <= {0}
    no_cache = model.generate(source, attention_mask=mask, use_cache=False, **settings)
    assert torch.equal(together, no_cache)
    if num_beams == 1:  # by hand
        written = torch.tensor([[1]])
        while written.shape[1] < together.shape[1] and written[0, -1] != 2:
            logits = model(input_ids=source[:1], attention_mask=mask[:1], decoder_input_ids=written).logits
            written = torch.cat((written, logits[:, -1].argmax(-1, keepdim=True)), dim=1)
        assert together[0, : written.shape[1]].tolist() == written[0].tolist()


def test_what_enters_the_residual_stream_starts_smaller():
    torch.manual_seed(0)
    config = BmTransformerConfig(**{**SEQ2SEQ, "hidden_size": 64, "intermediate_size": 64, "initializer_range": 0.1})
    model = AutoModelForSeq2SeqLM.from_config(config)
    for name, weight in model.named_parameters():
        if name.endswith("proj.weight"):
            smaller = name.endswith(("o_proj.weight", "down_proj.weight"))
            expected = 0.1 / 2 if smaller else 0.1  # sqrt(2 * 2 layers)
            assert abs(weight.std() / expected - 1) < 0.06, name


@torch.no_grad()
def test_hidden_states_and_attentions_of_both_sides_are_recorded():
    model = seq2seq()
    model.set_attn_implementation("eager")
    source, mask = padded_rows()
    outputs = model(
        input_ids=source, attention_mask=mask, decoder_input_ids=source[:, :7], output_hidden_states=True,
        output_attentions=True,
    )  # fmt: skip
    assert [tuple(x.shape) for x in outputs.encoder_hidden_states] == [(3, 10, 32)] * 3
    assert [tuple(x.shape) for x in outputs.decoder_hidden_states] == [(3, 7, 32)] * 4
    assert [tuple(x.shape) for x in outputs.encoder_attentions] == [(3, 4, 10, 10)] * 2
    assert [tuple(x.shape) for x in outputs.decoder_attentions] == [(3, 4, 7, 7)] * 3
    assert [tuple(x.shape) for x in outputs.cross_attentions] == [(3, 4, 7, 10)] * 3
    for weights in outputs.cross_attentions:
        assert (weights.sum(-1) - 1).abs().max() <= TOLERANCE
        assert not weights[1, :, :, 7:].any()  # padding of the second source


def test_all_embeddings_of_an_encoder_decoder_are_one_or_none():
    tied, untied = seq2seq(), seq2seq(tie_word_embeddings=False)
    pointers = [
        {weight.data_ptr() for weight in (m.lm_head.weight, m.model.encoder.stem.embed_tokens.weight,
                                          m.model.decoder.stem.embed_tokens.weight)}
        for m in (tied, untied)
    ]  # fmt: skip
    assert [len(p) for p in pointers] == [1, 3]
    tied.resize_token_embeddings(70)
    assert tied(input_ids=torch.tensor([[69]]), decoder_input_ids=torch.tensor([[69]])).logits.shape == (1, 1, 70)
    with pytest.raises(ValueError, match="tie_word_embeddings=False gives source and target an embedding each"):
        untied.resize_token_embeddings(70)


def test_decoder_inputs_are_labels_one_to_the_right():
    labels = torch.tensor([[5, 6, 2], [7, 2, -100]])
    assert seq2seq().prepare_decoder_input_ids_from_labels(labels).tolist() == [[1, 5, 6], [1, 7, 2]]
    with pytest.raises(ValueError, match="decoder_start_token_id=None and pad_token_id=0"):
        seq2seq(decoder_start_token_id=None).prepare_decoder_input_ids_from_labels(labels)


def test_a_source_sees_both_ways_and_a_target_backwards_only():
    model = seq2seq()
    source, target = torch.randint(3, VOCAB, (1, 6)), torch.randint(3, VOCAB, (1, 6))
    embeds = [model.get_input_embeddings()(ids).detach().requires_grad_() for ids in (source, target)]
    outputs = model(inputs_embeds=embeds[0], decoder_inputs_embeds=embeds[1])
    outputs.logits[0, 3].sum().backward()
    assert (embeds[0].grad[0].abs().sum(-1) > 0).all()
    assert (embeds[1].grad[0].abs().sum(-1) > 0).tolist() == [True] * 4 + [False] * 2


# ------------------------------------------------------------------------------------ what is refused, what counts


@pytest.mark.parametrize(
    ("auto_class", "changes", "message"),
    [
        ("AutoModel", SEQ2SEQ, "is_encoder_decoder=True makes two stacks, and AutoModel one"),
        ("AutoModelForSeq2SeqLM", {}, "needs is_encoder_decoder=True"),
        ("AutoModelForCausalLM", {"is_causal": False}, "needs is_causal=True"),
        ("AutoModelForMaskedLM", {}, "needs is_causal=False: a causal trunk does not see what follows"),
        ("AutoModelForImageClassification", {}, "needs input_type='pixels'"),
        ("AutoModelForCTC", {}, "needs input_type='audio'"),
        ("AutoModelForAudioClassification", {"input_type": "pixels"}, "needs input_type='audio'"),
        ("AutoModelForTimeSeriesPrediction", {}, "needs input_type='series'"),
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


PUBLISHED = {
    "transformer-base-2017": ("AutoModelForSeq2SeqLM", 63_082_496),  # by table 3 and its text; see PRESETS
    "bert-base": ("AutoModel", 109_482_240),
    "gpt2-small": ("AutoModelForCausalLM", 124_439_808),
    "vit-s-16": ("AutoModelForImageClassification", 22_050_664),
    "tinyllama-1.1b": ("AutoModelForCausalLM", 1_100_048_384),
}


@pytest.mark.parametrize("name", PRESETS)
def test_presets_have_as_many_parameters_as_published(name):
    auto_class, expected = PUBLISHED[name]
    with torch.device("meta"):
        model = getattr(transformers, auto_class).from_config(BmTransformerConfig.from_preset(name))
    assert model.num_parameters() == expected


@pytest.mark.parametrize(("name", "model_type"), [("bert-base", "bert"), ("gpt2-small", "gpt2"), ("vit-s-16", "vit")])
def test_presets_are_the_shapes_of_transformers(name, model_type):
    changes = {"vit": {"hidden_size": 384, "num_attention_heads": 6, "intermediate_size": 1536, "num_labels": 1000}}
    auto_class = PUBLISHED[name][0]
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
