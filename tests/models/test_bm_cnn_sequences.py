"""bm_cnn on sequences: convolutions against torch's and against loops, padding, packing, caches and generation."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    DynamicCache,
)

import bmtk  # noqa: F401  (registers the families)
from bmtk.models.configuration_bm_cnn import BmCnnConfig
from bmtk.models.convolutions_bm import Convolution, ConvolutionCacheLayer

TOLERANCE = 1e-5
VOCAB = 37
BLOCKS = ("residual", "gated", "multi_width")


def config(block_type: str, **fields) -> BmCnnConfig:
    """Where a position of a causal trunk sees the 8 (multi_width: 9) before it, fewer than a row has."""
    given = {
        "input_type": "tokens", "block_type": block_type, "vocab_size": VOCAB, "hidden_size": 12, "pad_token_id": 0,
        "num_hidden_layers": 3, "dilation_cycle": 2, "filter_widths": [2, 4], "initializer_range": 0.5,
    }  # fmt: skip
    return BmCnnConfig(**{**given, "kernel_size": 2 if block_type == "residual" else 3, **fields})


def shake(model: nn.Module) -> nn.Module:
    """Move biases and norms away from the 0 and 1 they start at."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return model.eval()


@pytest.fixture(params=BLOCKS)
def causal(request):
    return shake(AutoModelForCausalLM.from_config(config(request.param, is_causal=True)))


@pytest.fixture(params=[(block, is_causal) for block in BLOCKS for is_causal in (True, False)], ids=str)
def trunk(request):
    block, is_causal = request.param
    return shake(AutoModel.from_config(config(block, is_causal=is_causal)))


def torch_weight(conv: Convolution) -> torch.Tensor:
    """The weight as nn.Conv1d has it: (outputs, inputs, taps)."""
    return conv.taps.weight.unflatten(0, (conv.kernel_size, conv.outputs)).permute(1, 2, 0)


def torch_convolution(conv: Convolution, x: torch.Tensor, dilation: int, is_causal: bool) -> torch.Tensor:
    x, weight = x.transpose(1, 2), torch_weight(conv)
    span = (conv.kernel_size - 1) * dilation
    x = F.pad(x, (span, 0)) if is_causal else F.pad(x, (span // 2, span - span // 2))
    return F.conv1d(x, weight, conv.bias, dilation=dilation).transpose(1, 2)


@pytest.mark.parametrize("is_causal", [True, False], ids=["causal", "same"])
@pytest.mark.parametrize(
    ("kernel_size", "dilation"), [(1, 1), (2, 1), (2, 4), (3, 1), (3, 2), (4, 1), (5, 3), (3, 40)]
)
@torch.no_grad()
def test_a_convolution_equals_torchs(kernel_size, dilation, is_causal, record_property):
    conv = shake(Convolution(5, 7, kernel_size=kernel_size, dilation=dilation, is_causal=is_causal))
    x = torch.randn(2, 23, 5)
    expected = torch_convolution(conv, x, dilation, is_causal)
    difference = (conv(x)[0] - expected).abs().max().item()
    record_property("largest_oracle_difference", difference)
    assert difference <= TOLERANCE
    if not is_causal:
        same = F.conv1d(x.transpose(1, 2), torch_weight(conv), conv.bias, dilation=dilation, padding="same")
        assert (expected - same.transpose(1, 2)).abs().max() <= TOLERANCE


@torch.no_grad()
def test_a_causal_dilated_convolution_equals_a_loop_with_documents_and_padding():
    conv = shake(Convolution(3, 2, kernel_size=3, dilation=2, is_causal=True))
    x, weight = torch.randn(1, 11, 3), torch_weight(conv)
    documents = [0, 0, 0, 1, 1, 1, 1, 1, 2, 2, 2]
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4, 0, 1, 2]])
    real = [1] * 9 + [0, 1]
    y = conv(x, positions, torch.tensor(real).float()[None, :, None])[0]
    for t in range(11):
        expected = conv.bias.clone()
        for tap in range(3):
            s = t - (2 - tap) * 2
            if s >= 0 and documents[s] == documents[t] and real[s]:
                expected += weight[:, :, tap] @ x[0, s]
        assert (y[0, t] - expected).abs().max() <= TOLERANCE


def residual_oracle(trunk, x):
    """Bai et al. 2018, fig. 1 (b), with a norm before and no weight norm or last ReLU."""
    for i, layer in enumerate(trunk.layers):
        y = F.layer_norm(x, x.shape[-1:], layer.norm.weight, layer.norm.bias, trunk.config.norm_eps)
        y = torch.relu(torch_convolution(layer.first, y, 2 ** (i % 2), trunk.config.is_causal))
        x = x + torch_convolution(layer.second, y, 2 ** (i % 2), trunk.config.is_causal)
    return F.layer_norm(x, x.shape[-1:], trunk.closing.norm.weight, trunk.closing.norm.bias, trunk.config.norm_eps)


def gated_oracle(trunk, x):
    """van den Oord et al. 2016, eq. 2 and fig. 4."""
    skips = 0
    for i, layer in enumerate(trunk.layers):
        y = F.layer_norm(x, x.shape[-1:], layer.norm.weight, layer.norm.bias, trunk.config.norm_eps)
        y = torch_convolution(layer.filter_and_gate, y, 2 ** (i % 2), trunk.config.is_causal)
        z = torch.tanh(y[..., :12]) * torch.sigmoid(y[..., 12:])
        skips = skips + z @ layer.skip.weight.T + layer.skip.bias
        if i < 2:
            x = x + z @ layer.residual.weight.T + layer.residual.bias
    return torch.relu(trunk.closing.linear(torch.relu(skips)))


def multi_width_oracle(trunk, x):
    """Kim 2014, eq. 2, for every width, and here in three layers with norms."""
    for layer in trunk.layers:
        x = F.layer_norm(x, x.shape[-1:], layer.norm.weight, layer.norm.bias, trunk.config.norm_eps)
        maps = [torch_convolution(conv, x, 1, trunk.config.is_causal) for conv in layer.filters]
        x = torch.relu(torch.cat(maps, dim=-1))
    return F.layer_norm(x, x.shape[-1:], trunk.closing.norm.weight, trunk.closing.norm.bias, trunk.config.norm_eps)


ORACLES = {"residual": residual_oracle, "gated": gated_oracle, "multi_width": multi_width_oracle}


@torch.no_grad()
def test_a_trunk_equals_the_papers_equations_on_torchs_convolution(trunk, record_property):
    ids = torch.randint(1, VOCAB, (2, 19))
    outputs = trunk(input_ids=ids, output_hidden_states=True)
    expected = ORACLES[trunk.config.block_type](trunk, trunk.stem.embed_tokens(ids))
    record_property("largest_oracle_difference", (outputs.last_hidden_state - expected).abs().max().item())
    assert expected.std() > 0.1
    assert (outputs.last_hidden_state - expected).abs().max() <= TOLERANCE
    assert len(outputs.hidden_states) == 4


@torch.no_grad()
def test_kims_classifier_reads_the_largest_value_of_each_filter_over_time():
    """Kim 2014, section 2: a map per filter, max over time, linear layer."""
    fields = {"hidden_size": 12, "vocab_size": VOCAB, "num_labels": 4}
    model = shake(AutoModelForSequenceClassification.from_config(BmCnnConfig.from_preset("kim-cnn", **fields)))
    ids = torch.randint(0, VOCAB, (3, 15))
    x = model.model.stem.embed_tokens(ids)
    maps = [torch.relu(torch_convolution(conv, x, 1, False)) for conv in model.model.layers[0].filters]
    expected = torch.cat([x.amax(1) for x in maps], dim=-1) @ model.score.weight.T + model.score.bias
    assert (model(ids).logits - expected).abs().max() <= TOLERANCE


@torch.no_grad()
def test_learned_positions_say_nothing_before_they_have_learned():
    model = AutoModel.from_config(config("multi_width", position_embedding_type="learned"))
    ids = torch.randint(0, VOCAB, (2, 15))
    assert model.stem.embed_positions.weight.shape == (2048, 12)
    assert torch.equal(model.stem(model.stem.embed_tokens(ids), torch.arange(15)[None]), model.stem.embed_tokens(ids))


def padded(side: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows of 14, 9 and 1 tokens; their mask; and position_ids as transformers' generate() derives them."""
    ids, steps = torch.randint(1, VOCAB, (3, 14)), torch.arange(14)[None]
    lengths = torch.tensor([14, 9, 1])[:, None]
    mask = ((steps < lengths) if side == "right" else (steps >= 14 - lengths)).long()
    return ids, mask, (mask.cumsum(-1) - 1).masked_fill(mask == 0, 0)


@pytest.mark.parametrize("with_positions", [True, False])
@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_padding_on_either_side_changes_no_real_output(trunk, side, with_positions):
    ids, mask, positions = padded(side)
    given = {"position_ids": positions} if with_positions else {}
    outputs = trunk(input_ids=ids, attention_mask=mask, **given)
    for row in range(3):
        real = mask[row].bool()
        alone = trunk(input_ids=ids[row][real][None])
        assert (outputs.last_hidden_state[row][real] - alone.last_hidden_state[0]).abs().max() <= TOLERANCE
        assert (outputs.pooler_output[row] - alone.pooler_output[0]).abs().max() <= TOLERANCE


@pytest.mark.parametrize("lengths", [[14], [5, 1, 8], [1] * 14, [13, 1], [2, 12]], ids=str)
@torch.no_grad()
def test_packed_documents_equal_documents_alone(trunk, lengths):
    ids = torch.randint(1, VOCAB, (2, 14))
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    for given in (positions, positions.expand(2, -1)):
        packed = trunk(input_ids=ids, position_ids=given).last_hidden_state.split(lengths, dim=1)
        for document, x in zip(ids.split(lengths, dim=1), packed, strict=True):
            assert (trunk(input_ids=document).last_hidden_state - x).abs().max() <= TOLERANCE


@pytest.mark.parametrize("chunks", [[1] * 14, [5, 1, 8], [13, 1], [2, 12]], ids=str)
@pytest.mark.parametrize("side", ["none", "left"])
@torch.no_grad()
def test_cached_logits_equal_logits_without_cache(causal, chunks, side):
    ids, mask, positions = padded("left")
    if side == "none":
        mask, positions = torch.ones_like(mask), torch.arange(14)[None].expand(3, -1)
    expected = causal(ids, attention_mask=mask, use_cache=False).logits
    for with_positions in (True, False):
        cache, start, pieces = None, 0, []
        for size in chunks:
            stop = start + size
            given = {"position_ids": positions[:, start:stop]} if with_positions else {}
            given |= {} if side == "none" else {"attention_mask": mask[:, :stop]}
            outputs = causal(ids[:, start:stop], past_key_values=cache, use_cache=True, **given)
            cache, start = outputs.past_key_values, stop
            pieces.append(outputs.logits)
        assert cache.get_seq_length() == 14
        assert isinstance(cache.layers[0], ConvolutionCacheLayer)
        assert (torch.cat(pieces, dim=1) - expected)[mask.bool()].abs().max() <= TOLERANCE


@torch.no_grad()
def test_a_document_that_starts_after_a_cache_does_not_see_it(causal):
    ids = torch.randint(1, VOCAB, (1, 14))
    first = causal(ids[:, :6], use_cache=True, position_ids=torch.arange(6)[None])
    positions = torch.cat((torch.arange(6, 8), torch.arange(6)))[None]
    rest = causal(ids[:, 6:], past_key_values=first.past_key_values, position_ids=positions).logits
    assert (rest[:, 2:] - causal(ids[:, 8:]).logits).abs().max() <= TOLERANCE
    assert (rest[:, :2] - causal(ids[:, :8]).logits[:, 6:]).abs().max() <= TOLERANCE


@torch.no_grad()
def test_the_state_holds_the_receptive_field_and_no_more(causal):
    cache = causal(torch.randint(1, VOCAB, (2, 30)), use_cache=True).past_key_values
    sizes = [layer.keys.numel() for layer in cache.layers]
    cache = causal(torch.randint(1, VOCAB, (2, 3)), use_cache=True).past_key_values
    assert sizes == [layer.keys.numel() for layer in cache.layers]


@pytest.mark.parametrize(
    "settings", [{}, {"num_beams": 3}, {"do_sample": True, "top_k": 5}], ids=["greedy", "beam", "sample"]
)
def test_generated_tokens_are_the_same_without_cache_and_without_padding(causal, settings):
    ids, mask, _ = padded("left")
    tokens = []
    for use_cache in (True, False):
        torch.manual_seed(0)
        settings = {"do_sample": False, "max_new_tokens": 12, **settings}
        tokens.append(causal.generate(ids, attention_mask=mask, use_cache=use_cache, **settings))
    assert tokens[0].shape == (3, 26)
    assert torch.equal(tokens[0], tokens[1])
    if not settings["do_sample"]:
        for row in range(3):
            alone = causal.generate(ids[row][mask[row].bool()][None], **settings)
            assert torch.equal(alone[0, -12:], tokens[0][row, -12:])


def test_generation_continues_from_a_cache_and_returns_many(causal):
    ids = torch.randint(1, VOCAB, (1, 9))
    whole = causal.generate(ids, max_new_tokens=10, do_sample=False, return_dict_in_generate=True)
    cache = DynamicCache(config=causal.config)
    first = causal.generate(ids, max_new_tokens=4, do_sample=False, past_key_values=cache)
    rest = causal.generate(first, max_new_tokens=6, do_sample=False, past_key_values=cache)
    assert torch.equal(rest, whole.sequences)
    assert causal.generate(ids, max_new_tokens=3, do_sample=True, num_return_sequences=4).shape == (4, 12)


def test_cropping_the_cache_is_an_error(causal):
    cache = causal(torch.randint(1, VOCAB, (1, 9)), use_cache=True).past_key_values
    with pytest.raises(RuntimeError, match="cannot be rolled back"):
        cache.layers[0].crop(-1)


def test_a_bidirectional_trunk_keeps_no_cache_and_is_no_language_model():
    trunk = AutoModel.from_config(config("residual", is_causal=False))
    assert trunk(input_ids=torch.tensor([[1, 2]]), use_cache=True).past_key_values is None
    with pytest.raises(ValueError, match="needs is_causal=True"):
        AutoModelForCausalLM.from_config(config("multi_width"))
    with pytest.raises(ValueError, match="needs is_causal=False"):
        AutoModelForMaskedLM.from_config(config("residual"))


def test_the_trunk_takes_tokens_or_embeddings_but_not_both(trunk):
    ids = torch.tensor([[3, 4]])
    for given in ({}, {"input_ids": ids, "inputs_embeds": trunk.stem.embed(ids)}):
        with pytest.raises(ValueError, match="pass input_ids or inputs_embeds, and not both"):
            trunk(**given)
    embeds = trunk(inputs_embeds=trunk.stem.embed(ids)).last_hidden_state
    assert torch.equal(embeds, trunk(input_ids=ids).last_hidden_state)
