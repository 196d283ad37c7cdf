"""bm_transformer against independent oracles: Llama, Qwen3 and GPT-2 of transformers, and torch.nn.TransformerEncoder.

Weights are copied over, everything is float32 and in eval mode, and differences stay within TOLERANCE.
"""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, GPT2Config, LlamaConfig, Qwen3Config

import bmtk  # noqa: F401  (registers the families)
from bmtk.models.configuration_bm_transformer import BmTransformerConfig

TOLERANCE = 1e-5
VOCAB = 61
SHARED = {"vocab_size": VOCAB, "bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0}
# The default 0.02 leaves attention nearly uniform: larger weights make every term count.
WIDE = {"initializer_range": 0.2}
LLAMA = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
         "intermediate_size": 40, "max_position_embeddings": 64, **SHARED, **WIDE}  # fmt: skip
ROPES = {
    "plain": {"rope_type": "default", "rope_theta": 500.0},
    "linear": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0},
    "llama3": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16, "rope_theta": 10000.0,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 10000.0},
}  # fmt: skip


def llama_names(name: str) -> str:
    """The name of a Llama or Qwen3 weight in bm_transformer."""
    for theirs, ours in (
        ("model.embed_tokens", "model.stem.embed_tokens"),
        ("input_layernorm", "attention_norm"),
        ("post_attention_layernorm", "mlp_norm"),
    ):
        name = name.replace(theirs, ours)
    return name


def gpt2_weights(oracle: nn.Module) -> dict[str, torch.Tensor]:
    """GPT-2's weights under our names: Conv1D is transposed, and the three projections stand in one."""
    names = {
        "ln_1": "attention_norm",
        "ln_2": "mlp_norm",
        "attn.c_proj": "self_attn.o_proj",
        "mlp.c_fc": "mlp.up_proj",
        "mlp.c_proj": "mlp.down_proj",
    }
    weights = {
        "model.stem.embed_tokens.weight": oracle.transformer.wte.weight,
        "model.stem.embed_positions.weight": oracle.transformer.wpe.weight,
        "model.norm.weight": oracle.transformer.ln_f.weight,
        "model.norm.bias": oracle.transformer.ln_f.bias,
        "lm_head.weight": oracle.lm_head.weight,
    }
    for i, block in enumerate(oracle.transformer.h):
        for name, tensor in block.named_parameters():
            module, kind = name.rsplit(".", 1)
            if kind == "weight" and not module.startswith("ln_"):
                tensor = tensor.T
            if module == "attn.c_attn":
                for letter, part in zip("qkv", tensor.chunk(3), strict=True):
                    weights[f"model.layers.{i}.self_attn.{letter}_proj.{kind}"] = part
            else:
                weights[f"model.layers.{i}.{names[module]}.{kind}"] = tensor
    return weights


def shake(model: nn.Module) -> nn.Module:
    """Move biases and norm weights away from the 0 and 1 they start at, so that an oracle sees them."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return model.eval()


def copied(oracle: nn.Module, weights: dict[str, torch.Tensor], **config) -> nn.Module:
    """Our model with exactly these weights: every name must exist on both sides."""
    ours = AutoModelForCausalLM.from_config(BmTransformerConfig(**config))
    ours.load_state_dict(weights, strict=True)
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in oracle.parameters())
    return ours.eval()


def llama(**changes):
    config = {**LLAMA, "rope_parameters": dict(ROPES["plain"]), "tie_word_embeddings": False, **changes}
    oracle = shake(AutoModelForCausalLM.from_config(LlamaConfig(rms_norm_eps=1e-5, **config)))
    weights = {llama_names(name): tensor for name, tensor in oracle.state_dict().items()}
    return oracle, copied(oracle, weights, **config)


def qwen3():
    config = {**LLAMA, "head_dim": 12, "rope_parameters": dict(ROPES["plain"]), "tie_word_embeddings": True}
    oracle = shake(AutoModelForCausalLM.from_config(Qwen3Config(rms_norm_eps=1e-6, **config)))
    weights = {llama_names(name): tensor for name, tensor in oracle.state_dict().items()}
    return oracle, copied(oracle, weights, qk_norm=True, norm_eps=1e-6, **config)


def gpt2():
    oracle = GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=64, initializer_range=0.2, **SHARED)
    oracle = shake(AutoModelForCausalLM.from_config(oracle))
    config = {
        "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64,
        "hidden_act": "gelu_new", "position_embedding_type": "learned", "norm_type": "layer_norm",
        "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True, **SHARED,
    }  # fmt: skip
    return oracle, copied(oracle, gpt2_weights(oracle), **config)


ORACLES = {
    "llama": llama,
    "llama-all-biases": lambda: llama(attention_bias=True, mlp_bias=True, num_key_value_heads=1),
    "qwen3": qwen3,
    "gpt2": gpt2,
}


@pytest.fixture(scope="module", params=ORACLES)
def pair(request):
    torch.manual_seed(0)
    oracle, ours = ORACLES[request.param]()
    return SimpleNamespace(name=request.param, oracle=oracle, ours=ours)


@pytest.fixture(params=["eager", "sdpa"])
def attention(request, pair):
    """Ours runs each attention implementation; the oracle stays on its own eager one."""
    pair.oracle.set_attn_implementation("eager")
    pair.ours.set_attn_implementation(request.param)
    return request.param


def check(record, ours: torch.Tensor, oracle: torch.Tensor) -> None:
    difference = (ours - oracle).abs().max().item()
    record("largest_oracle_difference", difference)
    assert oracle.std() > 0.1, "the oracle's outputs are too small to say anything"
    assert difference <= TOLERANCE


def generate_positions(mask: torch.Tensor) -> torch.Tensor:
    """position_ids as transformers' generate() derives them from an attention mask (B, L)."""
    return (mask.long().cumsum(-1) - 1).masked_fill(mask == 0, 0)


def padded_rows(side: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids (3, 10) and the mask of rows of 10, 7 and 3 real tokens, padded on the left or on the right."""
    ids = torch.randint(2, VOCAB, (3, 10))
    lengths = torch.tensor([10, 7, 3])[:, None]
    steps = torch.arange(10)[None]
    return ids, ((steps < lengths) if side == "right" else (steps >= 10 - lengths)).long()


@torch.no_grad()
def test_logits_and_loss_equal_the_oracle(pair, attention, record_property):
    ids = torch.randint(2, VOCAB, (2, 13))
    labels = ids.masked_fill(torch.rand(ids.shape) < 0.3, -100)
    ours, oracle = pair.ours(ids, labels=labels), pair.oracle(ids, labels=labels)
    check(record_property, ours.logits, oracle.logits)
    assert abs(ours.loss - oracle.loss) <= TOLERANCE


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_logits_equal_the_oracle_under_padding(pair, attention, side, record_property):
    ids, mask = padded_rows(side)
    positions = generate_positions(mask)
    oracle = pair.oracle(ids, attention_mask=mask, position_ids=positions).logits
    real = mask.bool()
    check(record_property, pair.ours(ids, attention_mask=mask, position_ids=positions).logits[real], oracle[real])
    # Our positions follow the mask when none are given: the same logits again.
    check(record_property, pair.ours(ids, attention_mask=mask).logits[real], oracle[real])


@pytest.mark.parametrize(
    "chunks", [[1] * 10, [4, 1, 5], [7, 3]], ids=["token-by-token", "chunks", "prefill-then-rest"]
)
@pytest.mark.parametrize("side", ["none", "left"])
@torch.no_grad()
def test_cached_logits_equal_the_oracle_without_cache(pair, attention, chunks, side, record_property):
    ids, mask = padded_rows("left")
    mask = torch.ones_like(mask) if side == "none" else mask
    positions = generate_positions(mask)
    oracle = pair.oracle(ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
    cache, start, pieces = None, 0, []
    for size in chunks:
        stop = start + size
        given = {} if side == "none" else {"attention_mask": mask[:, :stop], "position_ids": positions[:, start:stop]}
        outputs = pair.ours(ids[:, start:stop], past_key_values=cache, use_cache=True, **given)
        cache, start = outputs.past_key_values, stop
        pieces.append(outputs.logits)
    assert cache.get_seq_length() == 10
    check(record_property, torch.cat(pieces, dim=1)[mask.bool()], oracle[mask.bool()])


@pytest.mark.parametrize("num_beams", [1, 3], ids=["greedy", "beam"])
def test_generated_tokens_equal_the_oracle(pair, attention, num_beams):
    ids, mask = padded_rows("left")
    settings = {"max_new_tokens": 12, "num_beams": num_beams, "do_sample": False}
    ours = pair.ours.generate(ids, attention_mask=mask, **settings)
    assert ours.shape == (3, 22)
    assert torch.equal(ours, pair.oracle.generate(ids, attention_mask=mask, **settings))


@pytest.mark.parametrize("kind", ROPES)
@torch.no_grad()
def test_scaled_rotary_positions_equal_llamas(kind, record_property):
    oracle, ours = llama(rope_parameters=dict(ROPES[kind]))
    ids = torch.randint(2, VOCAB, (1, 90))  # longer than max_position_embeddings, where "dynamic" begins to act
    check(record_property, ours(ids).logits, oracle(ids).logits)
    check(record_property, ours(ids[:, :20]).logits, oracle(ids[:, :20]).logits)


@torch.no_grad()
def test_rope_kinds_differ_from_each_other():
    """Guards the test above: a rope type that is read but not used would still equal a Llama that ignores it too."""
    ids = torch.randint(2, VOCAB, (1, 90))
    logits = []
    for kind in ROPES:
        torch.manual_seed(0)
        logits.append(llama(rope_parameters=dict(ROPES[kind]))[1](ids).logits)
    for i, one in enumerate(logits):
        assert all((one - other).abs().max() > 1e-3 for other in logits[:i])


@pytest.mark.parametrize("side", ["none", "left", "right"])
@torch.no_grad()
def test_flex_attention_equals_sdpa(side):
    """Eagerly, on CPU: what its compiled kernels add is a matter of torch and of a GPU."""
    _, ours = llama()
    ids, mask = padded_rows("left" if side == "none" else side)
    given = {} if side == "none" else {"attention_mask": mask}
    real = torch.ones_like(mask).bool() if side == "none" else mask.bool()
    expected = ours(ids, **given).logits[real]
    ours.set_attn_implementation("flex_attention")
    with torch.compiler.set_stance("force_eager"):
        assert (ours(ids, **given).logits[real] - expected).abs().max() <= TOLERANCE


def sinusoids(length: int, width: int) -> torch.Tensor:
    """Vaswani et al. 2017, section 3.5, written as the paper does: PE(pos, 2i) and PE(pos, 2i+1), in Python floats."""
    table = torch.zeros(length, width)
    for position in range(length):
        for i in range(width // 2):
            angle = position / 10000 ** (2 * i / width)
            table[position, 2 * i], table[position, 2 * i + 1] = math.sin(angle), math.cos(angle)
    return table


def torch_encoder(ours: nn.Module, *, activation, norm_first: bool) -> nn.TransformerEncoder:
    """torch.nn.TransformerEncoder holding the weights of our trunk."""
    config = ours.config
    layer = nn.TransformerEncoderLayer(
        config.hidden_size, config.num_attention_heads, config.intermediate_size, dropout=0.0, activation=activation,
        norm_first=norm_first, batch_first=True, layer_norm_eps=config.norm_eps,
    )  # fmt: skip
    encoder = nn.TransformerEncoder(layer, config.num_hidden_layers, enable_nested_tensor=False)
    for theirs, mine in zip(encoder.layers, ours.layers, strict=True):
        attention = mine.self_attn
        projections = [attention.q_proj, attention.k_proj, attention.v_proj]
        theirs.load_state_dict(
            {
                "self_attn.in_proj_weight": torch.cat([p.weight for p in projections]),
                "self_attn.in_proj_bias": torch.cat([p.bias for p in projections]),
                **{f"self_attn.out_proj.{key}": value for key, value in attention.o_proj.state_dict().items()},
                **{f"linear1.{key}": value for key, value in mine.mlp.up_proj.state_dict().items()},
                **{f"linear2.{key}": value for key, value in mine.mlp.down_proj.state_dict().items()},
                **{f"norm1.{key}": value for key, value in mine.attention_norm.state_dict().items()},
                **{f"norm2.{key}": value for key, value in mine.mlp_norm.state_dict().items()},
            }
        )
    return encoder.eval()


@pytest.mark.parametrize("is_causal", [True, False], ids=["decoder", "encoder"])
@pytest.mark.parametrize("norm_position", ["pre", "post"])
@pytest.mark.parametrize(
    ("hidden_act", "activation"),
    [("relu", torch.relu), ("gelu", nn.functional.gelu), ("relu2", lambda x: torch.relu(x) ** 2)],
    ids=["relu", "gelu", "relu2"],
)
@torch.no_grad()
def test_hidden_states_equal_torchs_own_transformer(hidden_act, activation, norm_position, is_causal, record_property):
    """The layer of 2017 (post-norm, sinusoidal, scaled embedding) and its relatives, with one set of weights."""
    config = BmTransformerConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, hidden_act=hidden_act,
        position_embedding_type="sinusoidal", norm_type="layer_norm", norm_position=norm_position, attention_bias=True,
        mlp_bias=True, scale_embedding=True, is_causal=is_causal, **SHARED, **WIDE,
    )  # fmt: skip
    ours = shake(AutoModel.from_config(config))
    encoder = torch_encoder(ours, activation=activation, norm_first=norm_position == "pre")
    ids, mask = padded_rows("right")
    x = ours.stem.embed_tokens.weight[ids] * math.sqrt(32) + sinusoids(10, 32)
    causal = nn.Transformer.generate_square_subsequent_mask(10).isinf() if is_causal else None
    expected = encoder(x, mask=causal, src_key_padding_mask=mask == 0)
    if norm_position == "pre":
        expected = nn.functional.layer_norm(expected, (32,), ours.norm.weight, ours.norm.bias, config.norm_eps)
    real = mask.bool()
    check(record_property, ours(ids, attention_mask=mask).last_hidden_state[real], expected[real])


def test_swiglu_is_silu_of_the_gate_times_up():
    mlp = llama()[1].model.layers[0].mlp
    x = torch.randn(3, 32)
    gate, up, down = (p.weight.detach().double() for p in (mlp.gate_proj, mlp.up_proj, mlp.down_proj))
    gated = x.double() @ gate.T
    expected = (gated / (1 + torch.exp(-gated)) * (x.double() @ up.T)) @ down.T
    assert (mlp(x).double() - expected).abs().max() <= TOLERANCE


def test_hidden_states_and_attentions_are_recorded_like_llamas():
    oracle, ours = llama()
    oracle.set_attn_implementation("eager")
    ours.set_attn_implementation("eager")
    ids = torch.randint(2, VOCAB, (2, 7))
    with torch.no_grad():
        mine, theirs = (m(ids, output_hidden_states=True, output_attentions=True) for m in (ours, oracle))
    assert len(mine.hidden_states) == 3
    assert len(mine.attentions) == 2
    for name in ("hidden_states", "attentions"):
        for one, other in zip(getattr(mine, name), getattr(theirs, name), strict=True):
            assert (one - other).abs().max() <= TOLERANCE


@pytest.mark.parametrize(
    ("gated", "width", "expected"), [(True, 256, 688), (True, 48, 128), (False, 256, 1024)], ids=str
)
def test_default_mlp_width_spends_the_same_parameters(gated, width, expected):
    config = BmTransformerConfig(hidden_size=width, hidden_act="swiglu" if gated else "gelu")
    assert config.intermediate_size == expected


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_attention_heads": 4, "num_key_value_heads": 3}, "num_attention_heads=4 is not a multiple of num_key_"),
        ({"hidden_size": 30, "num_attention_heads": 4}, "hidden_size=30 is not a multiple of num_attention_heads=4"),
        ({"hidden_size": 20, "num_attention_heads": 4}, "head_dim=5 is odd"),
        (
            {"hidden_size": 33, "num_attention_heads": 3, "position_embedding_type": "sinusoidal"},
            "hidden_size=33 is odd",
        ),
        ({"hidden_dropout": 1.0}, "hidden_dropout=1.0 is not a probability"),
        ({"attention_dropout": -0.1}, "attention_dropout=-0.1 is not a probability"),
        ({"hidden_act": "tanh"}, "hidden_act"),
        ({"hidden_size": "wide"}, "hidden_size"),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_a_wrong_field_is_named_with_its_value(fields, message):
    with pytest.raises(Exception, match=message):
        BmTransformerConfig(**fields)


def test_an_explicit_head_width_frees_the_hidden_size():
    """The remedy that the error of an indivisible hidden_size names."""
    config = BmTransformerConfig(hidden_size=30, num_attention_heads=4, head_dim=8, num_hidden_layers=1, vocab_size=7)
    assert AutoModel.from_config(config)(torch.tensor([[1, 2]])).last_hidden_state.shape == (1, 2, 30)


def test_the_trunk_takes_tokens_or_embeddings_but_not_both():
    trunk = llama()[1].model
    ids = torch.tensor([[3, 4]])
    for given in ({}, {"input_ids": ids, "inputs_embeds": trunk.stem.embed(ids)}):
        with pytest.raises(ValueError, match="input_ids or inputs_embeds, and not both"):
            trunk(**given)
    assert torch.equal(
        trunk(inputs_embeds=trunk.stem.embed(ids)).last_hidden_state, trunk(input_ids=ids).last_hidden_state
    )
