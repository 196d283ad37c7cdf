"""bm_transformer as encoder-decoder against torch.nn.Transformer, and how it generates."""

import math

import pytest
import torch
from oracle_cases import SEQ2SEQ, TOLERANCE, VOCAB, padded_rows, shake
from torch import nn
from transformers import AutoModelForSeq2SeqLM

import bmtk  # noqa: F401  (registers the families)
from bmtk.models.configuration_bm_transformer import BmTransformerConfig


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
        ours.encoder.stem.embed_tokens.weight[ids] * math.sqrt(32) + sinusoids(ids.shape[1], 32)
        for ids in (source, target)
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
    for model in (tied, untied):
        model.resize_token_embeddings(70)
        assert model(input_ids=torch.tensor([[69]]), decoder_input_ids=torch.tensor([[69]])).logits.shape == (1, 1, 70)


def test_decoder_inputs_are_labels_one_to_the_right():
    labels = torch.tensor([[5, 6, 8, 2], [7, 2, -100, -100]])
    assert seq2seq().prepare_decoder_input_ids_from_labels(labels).tolist() == [[1, 5, 6, 8], [1, 7, 2, 0]]
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
