"""bm_rnn against independent oracles: torch's own nn.RNN, nn.GRU and nn.LSTM, and loops in plain Python.

Weights are copied over and everything is float32; differences stay within TOLERANCE.
"""

import math

import pytest
import torch
import transformers
from model_cases import CASES
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    DynamicCache,
)

import bmtk  # noqa: F401  (registers the families)
from bmtk.models import recurrence_bm, scans_bm
from bmtk.models.configuration_bm_rnn import BmRnnConfig
from bmtk.models.recurrence_bm import Documents, MinGRU, TorchRecurrence
from bmtk.models.recurrent_state_bm import RecurrentState
from bmtk.models.rnn_stems_bm import LockedDropout
from bmtk.models.scans_bm import GatedScan, LinearScan, scan

TOLERANCE = 1e-6
VOCAB = 29
TORCH_CELLS = {"elman": nn.RNN, "gru": nn.GRU, "lstm": nn.LSTM}
CELLS = [*TORCH_CELLS, "mingru"]
DROPOUTS = ("embedding_dropout", "input_dropout", "hidden_dropout", "output_dropout")
PENALTIES = {"activation_regularization": 2.0, "temporal_activation_regularization": 1.0}


def small(cell: str = "lstm", **changes) -> BmRnnConfig:
    """Three layers of 12, 12 and 8 units on embeddings of 8; wide enough weights that every term counts."""
    fields = {
        "vocab_size": VOCAB, "embedding_size": 8, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 3,
        "cell_type": cell, "initializer_range": 1.0, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None,
        "decoder_start_token_id": 1,
    }  # fmt: skip
    return BmRnnConfig(**{**fields, **changes})


def language_model(cell: str = "lstm", **changes):
    return shake(AutoModelForCausalLM.from_config(small(cell, **changes))).eval()


def shake(model: nn.Module) -> nn.Module:
    """Move biases away from the constants they start at, so that an oracle sees them."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


def tokens(*shape: int) -> torch.Tensor:
    return torch.randint(2, VOCAB, shape)


def padded_rows(side: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids (4, 10) and the mask of rows of 10, 7, 3 and 1 real tokens, padded on the left or on the right."""
    lengths, steps = torch.tensor([10, 7, 3, 1])[:, None], torch.arange(10)[None]
    return tokens(4, 10), ((steps < lengths) if side == "right" else (steps >= 10 - lengths)).long()


def packed_row() -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]:
    """Six documents, and two rows that hold three of them each: documents, ids (2, 12), position_ids (2, 12)."""
    lengths = [5, 1, 6, 2, 7, 3]
    documents = [tokens(1, n) for n in lengths]
    positions = torch.cat([torch.arange(n) for n in lengths]).view(2, 12)
    return documents, torch.cat(documents, dim=1).view(2, 12), positions


def check(record, ours: torch.Tensor, oracle: torch.Tensor, tolerance: float = TOLERANCE) -> None:
    difference = (ours - oracle).abs().max().item()
    record("largest_oracle_difference", difference)
    assert oracle.std() > 0.05, "the oracle's outputs are too small to say anything"
    assert difference <= tolerance


def is_close(ours: torch.Tensor, expected: torch.Tensor, tolerance: float = TOLERANCE) -> bool:
    """Whether the largest difference is small beside the largest value (or beside 1)."""
    return bool((ours - expected).abs().max() <= tolerance * expected.abs().max().clamp(min=1))


# ---- oracles -------------------------------------------------------------------------------------------------------


def torch_stack(trunk: nn.Module, cell: str) -> nn.RNNBase:
    """torch's own stack of layers of one width, holding the weights of `trunk`."""
    config = trunk.config
    directions = 1 if config.is_causal else 2
    stack = TORCH_CELLS[cell](
        config.hidden_size, config.hidden_size // directions, config.num_hidden_layers, batch_first=True,
        bidirectional=directions == 2,
    )  # fmt: skip
    weights = {
        name.replace("_l0", f"_l{i}"): weight
        for i, layer in enumerate(trunk.layers)
        for name, weight in layer.recurrence.rnn.state_dict().items()
    }
    stack.load_state_dict(weights, strict=True)
    return stack


@pytest.mark.parametrize("is_causal", [True, False], ids=["causal", "bidirectional"])
@pytest.mark.parametrize("cell", TORCH_CELLS)
@torch.no_grad()
def test_hidden_states_equal_torchs_own_stack(cell, is_causal, record_property):
    trunk = shake(AutoModel.from_config(small(cell, intermediate_size=8, is_causal=is_causal))).eval()
    stack = torch_stack(trunk, cell)
    ids = tokens(3, 11)
    check(record_property, trunk(ids).last_hidden_state, stack(trunk.stem.embed_tokens(ids))[0])


def mingru_by_loop(layer: MinGRU, x: torch.Tensor) -> torch.Tensor:
    """The equations of Feng et al. 2024, one position and one direction after the other, in float64."""
    x, weight, bias = (t.detach().double() for t in (x, layer.in_proj.weight, layer.in_proj.bias))
    units = layer.units // layer.num_directions
    outputs = []
    for direction in range(layer.num_directions):
        rows = slice(2 * units * direction, 2 * units * (direction + 1))
        w_h, w_z = weight[rows].chunk(2)
        b_h, b_z = bias[rows].chunk(2)
        state, states = torch.zeros(len(x), units, dtype=torch.float64), []
        for t in range(x.shape[1]) if direction == 0 else reversed(range(x.shape[1])):
            v = x[:, t] @ w_h.T + b_h
            z = 1 / (1 + torch.exp(-(x[:, t] @ w_z.T + b_z)))
            written = torch.where(v >= 0, v + 0.5, 1 / (1 + torch.exp(-v)))
            state = (1 - z) * state + z * written
            states.append(state)
        outputs.append(torch.stack(states if direction == 0 else states[::-1], dim=1))
    return torch.cat(outputs, dim=-1)


@pytest.mark.parametrize("is_causal", [True, False], ids=["causal", "bidirectional"])
@pytest.mark.parametrize("length", [1, 2, 16, 17, 300])
@torch.no_grad()
def test_mingru_equals_a_loop_over_positions(length, is_causal, record_property):
    layer = shake(MinGRU(5, 6, bidirectional=not is_causal))
    x = torch.randn(2, length, 5) * 2
    check(record_property, layer(x)[0].double(), mingru_by_loop(layer, x))


@torch.no_grad()
def test_mingru_step_by_step_equals_all_positions_at_once():
    layer = MinGRU(5, 6)
    x, state, steps = torch.randn(2, 200, 5), None, []
    for t in range(200):
        y, state = layer(x[:, t : t + 1], state)
        steps.append(y)
    assert (torch.cat(steps, dim=1) - layer(x)[0]).abs().max() <= 1e-5


@pytest.mark.parametrize("length", [1, 5, 16, 33, 700])
def test_the_scan_and_its_gradients_equal_a_loop(length, record_property):
    a, b = torch.rand(2, length, 3), torch.randn(2, length, 3)
    a[:, length // 2] = 0.0  # where a document begins
    a, b = a.double().requires_grad_(), b.double().requires_grad_()
    state, states = torch.zeros(2, 3, dtype=torch.float64), []
    for t in range(length):
        state = a[:, t] * state + b[:, t]
        states.append(state)
    weights = torch.randn(2, length, 3, dtype=torch.float64)
    expected = torch.autograd.grad((torch.stack(states, 1) * weights).sum(), (a, b))
    ours = LinearScan.apply(a, b)
    check(record_property, ours, torch.stack(states, 1), 1e-12)
    for mine, theirs in zip(torch.autograd.grad((ours * weights).sum(), (a, b)), expected, strict=True):
        assert (mine - theirs).abs().max() <= 1e-12


def test_the_scan_has_second_derivatives():
    a, b = (torch.rand(1, 18, 2, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(LinearScan.apply, (a, b))
    assert torch.autograd.gradgradcheck(LinearScan.apply, (a, b))


@pytest.mark.parametrize("length", [1, 2, 19, 49, 131])  # 0, 1, 18, 12 x 4 and 21 x 6 + 4 positions after the first
@pytest.mark.parametrize("has_start", [True, False])
@pytest.mark.parametrize("few", [0, 2**12])
def test_the_gated_scan_and_its_gradients_equal_a_loop(monkeypatch, length, has_start, few):
    monkeypatch.setattr(scans_bm, "FEW", few)
    inputs = [torch.randn(3, length, 8, dtype=torch.float64, requires_grad=True)]
    inputs += [torch.randn(3, 4, dtype=torch.float64, requires_grad=True)] if has_start else []

    def loop(values_and_gates, start=None):
        h, states = 0.0 if start is None else start, []
        for both in values_and_gates.unbind(1):
            values, z = both[:, :4], both[:, 4:].sigmoid()
            h = (1 - z) * h + z * torch.where(values >= 0, values + 0.5, values.sigmoid())
            states.append(h)
        return torch.stack(states, dim=1)

    def ours(values_and_gates, start=None):
        return GatedScan.apply(values_and_gates, start)

    torch.testing.assert_close(ours(*inputs), loop(*inputs), rtol=0, atol=1e-14)
    weights = torch.randn(3, length, 4, dtype=torch.float64)
    found, expected = (torch.autograd.grad((run(*inputs) * weights).sum(), inputs) for run in (ours, loop))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_gated_scan_has_the_derivative_of_the_scan_where_a_value_is_0(dtype):
    x = torch.zeros(1, 2, 2, dtype=dtype, requires_grad=True)  # g'(0) is 1; to the left of it 1/4
    with torch.no_grad():
        x[0, 1, 0] = -1e-3
    found, expected = (
        torch.autograd.grad(run(x).sum(), x) for run in (plain_scan, lambda x: GatedScan.apply(x, None))
    )
    torch.testing.assert_close(found, expected)


def plain_scan(values_and_gates: torch.Tensor) -> torch.Tensor:
    """As MinGRU computes it elsewhere than on a CPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recurrence_bm, "is_eager_on_cpu", lambda *_: False)
        return MinGRU._scan(values_and_gates, None, None)


def test_torch_func_differentiates_a_min_gru_twice_and_row_by_row():
    layer, x = MinGRU(3, 4), torch.randn(5, 20, 3)
    weights = dict(layer.named_parameters())

    def loss(weights, x):
        return torch.func.functional_call(layer, weights, (x,))[0].square().sum()

    layer(x)[0].square().sum().backward()
    of_rows = torch.func.vmap(torch.func.grad(loss), (None, 0))(weights, x[:, None])
    for name, parameter in layer.named_parameters():
        torch.testing.assert_close(of_rows[name].sum(0), parameter.grad, rtol=1e-4, atol=1e-4)

    def steepness(weights):
        return sum(slope.square().sum() for slope in torch.func.grad(loss)(weights, x).values())

    wide, x, direction = layer.double(), x.double(), torch.randn(8, 3, dtype=torch.float64)
    weights = {name: parameter.detach() for name, parameter in wide.named_parameters()}
    beside = [weights | {"in_proj.weight": weights["in_proj.weight"] + size * direction} for size in (1e-6, -1e-6)]
    slope = (torch.func.grad(steepness)(weights)["in_proj.weight"] * direction).sum()
    torch.testing.assert_close(slope, (steepness(beside[0]) - steepness(beside[1])) / 2e-6, rtol=1e-5, atol=0)


@pytest.mark.parametrize(("rows", "operations"), [(2, 120), (2**11, 255)])
def test_a_scan_of_small_positions_takes_fewer_operations(rows, operations):
    x = torch.rand(rows, 256, 4 if rows == 2 else 6)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        GatedScan.apply(x, None)
    assert sum(event.name in ("aten::addcmul_", "aten::addcmul") for event in profile.events()) <= operations


def test_the_scan_stays_exact_over_long_rows():
    """The reason for not scanning logarithms: with them float32 is off by 7e-4 here."""
    z = torch.sigmoid(torch.randn(2, 4096, 8) * 2)
    a, b = 1 - z, z * torch.rand(2, 4096, 8)
    log_a, log_b = a.double().log(), b.double().log()
    total = log_a.cumsum(1)
    expected = (total + torch.logcumsumexp(log_b - total, dim=1)).exp()  # the paper's appendix B, in float64
    assert (scan(a, b) - expected).abs().max() <= 1e-6


# ---- padding and packing -------------------------------------------------------------------------------------------


@pytest.fixture(params=["side by side", "packed"])
def way(request, monkeypatch):
    """How torch's kernels get the documents of padded and packed rows on a CPU."""
    runs = []
    for name in ("_run_side_by_side", "_run_packed"):
        run = getattr(TorchRecurrence, name)
        monkeypatch.setattr(TorchRecurrence, name, lambda *args, run=run: runs.append(run.__name__) or run(*args))
    monkeypatch.setattr(recurrence_bm, "MOST_PADDING", 100 if request.param == "side by side" else 0)
    yield
    assert set(runs) <= {f"_run_{request.param.replace(' ', '_')}"}


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("is_causal", [True, False], ids=["causal", "bidirectional"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("cell", CELLS)
def test_padding_changes_no_real_output_and_no_gradient(cell, side, is_causal):
    trunk = shake(AutoModel.from_config(small(cell, is_causal=is_causal, residual=True))).eval()
    ids, mask = padded_rows(side)
    real = mask.bool()
    weights = torch.randn(4, 10, 8)
    padded = trunk(ids, attention_mask=mask, use_cache=False).last_hidden_state
    (padded * weights)[real].sum().backward()
    gradients = [p.grad.clone() for p in trunk.parameters()]
    trunk.zero_grad()
    alone = [trunk(row[keep][None]).last_hidden_state[0] for row, keep in zip(ids, real, strict=True)]
    (torch.cat(alone) * weights[real]).sum().backward()
    assert is_close(padded[real], torch.cat(alone))
    for mine, theirs in zip(gradients, [p.grad for p in trunk.parameters()], strict=True):
        assert is_close(mine, theirs, 1e-5)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("is_causal", [True, False], ids=["causal", "bidirectional"])
@pytest.mark.parametrize("cell", CELLS)
def test_packed_rows_equal_documents_alone_also_in_their_gradients(cell, is_causal):
    trunk = shake(AutoModel.from_config(small(cell, is_causal=is_causal))).eval()
    documents, ids, positions = packed_row()
    weights = torch.randn(24, 8)
    packed = trunk(ids, position_ids=positions, use_cache=False).last_hidden_state.flatten(0, 1)
    (packed * weights).sum().backward()
    gradients = [p.grad.clone() for p in trunk.parameters()]
    trunk.zero_grad()
    alone = torch.cat([trunk(document).last_hidden_state[0] for document in documents])
    (alone * weights).sum().backward()
    assert is_close(packed, alone)
    for mine, theirs in zip(gradients, [p.grad for p in trunk.parameters()], strict=True):
        assert is_close(mine, theirs, 1e-5)
    assert (trunk(ids).last_hidden_state.flatten(0, 1) - alone).abs().max() > 1e-2, "documents would not matter anyway"


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("is_causal", [True, False], ids=["causal", "bidirectional"])
@pytest.mark.parametrize("cell", CELLS)
@torch.no_grad()
def test_packed_rows_may_be_padded_too(cell, is_causal):
    trunk = AutoModel.from_config(small(cell, is_causal=is_causal)).eval()
    one, other = tokens(1, 3), tokens(1, 4)
    pad = torch.zeros(1, 2, dtype=torch.long)
    ids = torch.cat((pad, one, pad, other, pad), dim=1)
    mask = torch.tensor([[0, 0, 1, 1, 1, 0, 0, 1, 1, 1, 1, 0, 0]])
    positions = torch.tensor([[0, 0, 0, 1, 2, 0, 0, 0, 1, 2, 3, 0, 0]])
    packed = trunk(ids, attention_mask=mask, position_ids=positions, use_cache=False).last_hidden_state
    assert is_close(packed[:, 2:5], trunk(one).last_hidden_state)
    assert is_close(packed[:, 7:11], trunk(other).last_hidden_state)


@pytest.mark.parametrize("cell", CELLS)
@torch.no_grad()
def test_whole_rows_go_through_the_kernel_directly(cell, monkeypatch):
    """Neither a mask of ones nor plain positions make a batch pay for packing."""
    trunk = AutoModel.from_config(small(cell)).eval()
    ids = tokens(2, 6)
    expected = trunk(ids).last_hidden_state
    monkeypatch.setattr(Documents, "__init__", lambda *_: pytest.fail("rows were taken apart"))
    given = {"attention_mask": torch.ones(2, 6), "position_ids": torch.arange(6)[None].expand(2, -1)}
    assert torch.equal(trunk(ids, **given).last_hidden_state, expected)
    cache = trunk(ids, use_cache=True, **given).past_key_values
    given = {"attention_mask": torch.ones(2, 7), "position_ids": torch.full((2, 1), 6)}
    trunk(ids[:, :1], past_key_values=cache, **given)


@pytest.mark.parametrize("cell", CELLS)
@torch.no_grad()
def test_a_batch_of_padding_only_does_not_change_the_state(cell):
    trunk = AutoModel.from_config(small(cell)).eval()
    cache = trunk(tokens(2, 4), use_cache=True).past_key_values
    before = [layer.keys.clone() for layer in cache.layers]
    mask = torch.cat((torch.ones(2, 4), torch.zeros(2, 3)), dim=1)
    assert trunk(tokens(2, 3), attention_mask=mask, past_key_values=cache).last_hidden_state.shape == (2, 3, 8)
    for layer, state in zip(cache.layers, before, strict=True):
        assert torch.equal(layer.keys, state)


# ---- cache and generation ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "chunks", [[1] * 10, [4, 1, 5], [7, 3]], ids=["token-by-token", "chunks", "prefill-then-rest"]
)
@pytest.mark.parametrize("side", ["none", "left", "right"])
@pytest.mark.parametrize("cell", CELLS)
@torch.no_grad()
def test_cached_logits_equal_those_of_whole_rows(cell, side, chunks):
    model = language_model(cell, residual=True, norm_type="layer_norm", output_projection=True)
    ids, mask = padded_rows("left" if side == "none" else side)
    mask = torch.ones_like(mask) if side == "none" else mask
    expected = model(ids, attention_mask=mask, use_cache=False).logits
    cache, start, pieces = None, 0, []
    for size in chunks:
        stop = start + size
        given = {} if side == "none" else {"attention_mask": mask[:, :stop]}
        outputs = model(ids[:, start:stop], past_key_values=cache, use_cache=True, **given)
        cache, start = outputs.past_key_values, stop
        pieces.append(outputs.logits)
    assert cache.get_seq_length() == 10
    assert is_close(torch.cat(pieces, dim=1)[mask.bool()], expected[mask.bool()], 2e-6)


@torch.no_grad()
def test_a_document_that_begins_forgets_the_cache():
    model = language_model()
    cache = model(tokens(2, 5), use_cache=True).past_key_values
    ids = tokens(2, 4)
    fresh = model(ids, position_ids=torch.arange(4)[None], past_key_values=cache).logits
    assert (fresh - model(ids).logits).abs().max() <= TOLERANCE


@pytest.mark.parametrize("cell", CELLS)
@torch.no_grad()
def test_a_packed_row_leaves_the_state_of_its_last_document(cell):
    model = language_model(cell)
    documents, ids, positions = packed_row()
    cache = model(ids, position_ids=positions, use_cache=True).past_key_values
    following = tokens(2, 1)
    ours = model(following, past_key_values=cache).logits
    for row, last in enumerate((documents[2], documents[5])):
        alone = torch.cat((last, following[row : row + 1]), dim=1)
        assert is_close(ours[row], model(alone).logits[0, -1:])


GENERATION = {
    "greedy": {},
    "sampling": {"do_sample": True, "top_k": 5},
    "beams": {"num_beams": 3},
    "several": {"do_sample": True, "num_return_sequences": 2},
    "chunked-prefill": {"prefill_chunk_size": 3},
    "static-cache": {"cache_implementation": "static"},
}


@pytest.mark.parametrize("kind", GENERATION)
@pytest.mark.parametrize("cell", CELLS)
def test_generate_with_a_cache_equals_reading_all_again(cell, kind):
    model = language_model(cell)
    ids, mask = padded_rows("left")
    plain = {k: v for k, v in GENERATION[kind].items() if k not in ("prefill_chunk_size", "cache_implementation")}
    results = []
    for settings in (GENERATION[kind], {**plain, "use_cache": False}):
        torch.manual_seed(3)
        settings = {"do_sample": False, "max_new_tokens": 9, **settings}
        results.append(model.generate(ids, attention_mask=mask, **settings))
    assert torch.equal(*results)
    if kind == "greedy":  # and each row as if it were alone
        for row, keep, many in zip(ids, mask.bool(), results[0], strict=True):
            alone = model.generate(row[keep][None], do_sample=False, max_new_tokens=9)
            assert torch.equal(alone[0, -9:], many[-9:])


def test_a_generation_goes_on_from_its_cache():
    model = language_model()
    ids = tokens(2, 5)
    settings = {"do_sample": False, "return_dict_in_generate": True}
    first = model.generate(ids, max_new_tokens=4, **settings)
    rest = model.generate(first.sequences, past_key_values=first.past_key_values, max_new_tokens=4, **settings)
    assert torch.equal(rest.sequences, model.generate(ids, max_new_tokens=8, **settings).sequences)


def test_a_generated_token_costs_one_step_and_no_memory():
    model = language_model()
    lengths = []
    model.model.layers[0].register_forward_pre_hook(lambda _, args: lengths.append(args[0].shape[1]))
    result = model.generate(tokens(2, 5), do_sample=False, max_new_tokens=6, return_dict_in_generate=True)
    assert lengths == [5, 1, 1, 1, 1, 1]
    assert [layer.keys.shape for layer in result.past_key_values.layers] == [(2, 12), (2, 12), (2, 8)]
    assert [layer.values.shape for layer in result.past_key_values.layers] == [(2, 12), (2, 12), (2, 8)]


@torch.no_grad()
def test_the_state_can_be_repeated_selected_and_reset_but_not_cropped():
    trunk = AutoModel.from_config(small("gru")).eval()
    ids = tokens(2, 5)
    cache = trunk(ids, use_cache=True).past_key_values
    assert isinstance(cache.layers[0], RecurrentState)
    before = cache.layers[2].keys.clone()
    cache.batch_repeat_interleave(2)
    assert torch.equal(cache.layers[2].keys, before[[0, 0, 1, 1]])
    cache.batch_select_indices(torch.tensor([3, 0]))
    assert torch.equal(cache.layers[2].keys, before[[1, 0]])
    with pytest.raises(RuntimeError, match="cannot be rolled back"):
        cache.crop(1)
    cache.crop(0)
    cache.reset()
    assert cache.get_seq_length() == 0
    assert torch.equal(trunk(ids, past_key_values=cache).last_hidden_state, trunk(ids).last_hidden_state)


@torch.no_grad()
def test_a_bidirectional_trunk_never_uses_a_cache():
    trunk = AutoModel.from_config(small(is_causal=False)).eval()
    ids = tokens(2, 5)
    outputs = trunk(ids, use_cache=True, past_key_values=DynamicCache(config=trunk.config))
    assert outputs.past_key_values is None
    changed = ids.clone()
    changed[:, -1] = (ids[:, -1] - 1) % VOCAB
    assert (trunk(changed).last_hidden_state[:, 0] - outputs.last_hidden_state[:, 0]).abs().max() > 1e-6


# ---- regularisers --------------------------------------------------------------------------------------------------


def test_locked_dropout_has_one_mask_for_all_positions_of_a_row():
    x = torch.ones(3, 7, 50)
    y = LockedDropout(0.4)(x)
    assert torch.equal(y, y[:, :1].expand(-1, 7, -1))
    assert not torch.equal(y[0], y[1])
    assert torch.allclose(y.unique(), torch.tensor([0.0, 1 / 0.6]))
    assert torch.equal(LockedDropout(0.4).eval()(x), x)


def test_embedding_dropout_drops_all_occurrences_of_a_word():
    stem = AutoModel.from_config(small(embedding_dropout=0.5)).train().stem
    ids = torch.arange(VOCAB).repeat(2, 1)  # every word in two rows
    ratio = stem.embed(ids) / stem.embed_tokens(ids)  # (2, V, E)
    assert torch.equal(ratio[0], ratio[1])
    assert (ratio - ratio[..., :1]).abs().max() <= TOLERANCE
    assert set(ratio[..., 0].flatten().round().tolist()) == {0.0, 2.0}
    assert torch.equal(stem.eval().embed(ids), stem.embed_tokens(ids))


@pytest.mark.parametrize("cell", TORCH_CELLS)
def test_weight_drop_acts_on_recurrent_weights_only_and_while_training_only(cell):
    layer, whole = TorchRecurrence(cell, 4, 6, weight_drop=0.5), TorchRecurrence(cell, 4, 6)
    whole.load_state_dict(layer.state_dict())
    x = torch.randn(2, 5, 4)
    y = layer(x)[0]
    expected = whole(x)[0]
    assert (y[:, 0] - expected[:, 0]).abs().max() <= TOLERANCE  # from a zero state recurrent weights say nothing
    assert (y[:, 1:] - expected[:, 1:]).abs().max() > 1e-3
    y.square().sum().backward()
    assert layer.rnn.weight_ih_l0.grad.ne(0).all()
    assert 0.2 < layer.rnn.weight_hh_l0.grad.eq(0).float().mean() < 0.8
    assert torch.equal(layer.eval()(x)[0], expected)
    assert dict(layer.named_parameters()).keys() == dict(whole.named_parameters()).keys()


def test_weight_drop_works_on_packed_rows_in_both_directions():
    trunk = AutoModel.from_config(small(is_causal=False, weight_drop=0.5)).train()
    _, ids, positions = packed_row()
    trunk(ids, position_ids=positions).last_hidden_state.sum().backward()
    rnn = trunk.layers[1].recurrence.rnn
    assert all(0.1 < w.grad.eq(0).float().mean() < 0.9 for w in (rnn.weight_hh_l0, rnn.weight_hh_l0_reverse))


@pytest.mark.parametrize("name", DROPOUTS)
def test_every_dropout_acts_while_training_and_never_else(name):
    plain = AutoModel.from_config(small())
    dropped = AutoModel.from_config(small(**{name: 0.5}))
    dropped.load_state_dict(plain.state_dict())
    ids = tokens(3, 6)
    expected = plain.train()(ids).last_hidden_state
    assert (dropped.train()(ids).last_hidden_state - expected).abs().max() > 1e-3
    assert torch.equal(dropped.eval()(ids).last_hidden_state, plain.eval()(ids).last_hidden_state)


def test_the_last_layer_has_output_dropout_instead_of_hidden_dropout():
    trunk = AutoModel.from_config(small(hidden_dropout=0.3, output_dropout=0.6, input_dropout=0.2))
    assert [layer.dropout.p for layer in trunk.layers] == [0.3, 0.3, 0.0]
    assert (trunk.stem.dropout.p, trunk.dropout.p) == (0.2, 0.6)


@torch.no_grad()
def penalties_by_loop(dropped, undropped, predicts, document) -> float:
    """AR and TAR of Merity et al. 2017 as sums over predicting positions, one after the other."""
    total = 0.0
    for b in range(dropped.shape[0]):
        for t in range(dropped.shape[1]):
            if not predicts[b, t]:
                continue
            total += PENALTIES["activation_regularization"] * float(dropped[b, t].square().mean())
            if t and document[b, t] == document[b, t - 1]:
                change = undropped[b, t] - undropped[b, t - 1]
                total += PENALTIES["temporal_activation_regularization"] * float(change.square().mean())
    return total


@pytest.mark.parametrize("rows", ["whole", "packed", "padded-left", "padded-right"])
def test_activation_penalties_equal_a_loop_and_are_added_while_training_only(rows):
    model = language_model(output_dropout=0.4, **PENALTIES)
    ids, given = tokens(2, 12), {}
    document = torch.zeros(2, 12)
    if rows == "packed":
        _, ids, positions = packed_row()
        given, document = {"position_ids": positions}, (positions == 0).cumsum(1)
    elif rows != "whole":
        ids, mask = padded_rows(rows.split("-")[1])
        given, document = {"attention_mask": mask}, mask
    labels = ids.masked_fill(torch.rand(ids.shape) < 0.2, -100)
    if "attention_mask" in given:
        labels = labels.masked_fill(given["attention_mask"] == 0, -100)
    plain = language_model(output_dropout=0.4)
    plain.load_state_dict(model.state_dict())
    losses, kept = {}, {}
    for name, one in (("with", model), ("without", plain)):
        one.model.register_forward_hook(lambda _, args, outputs: kept.update(outputs=outputs))
        one.train()
        torch.manual_seed(5)
        losses[name] = one(ids, labels=labels, **given).loss.item()
    outputs = kept["outputs"]
    predicts = torch.cat((labels[:, 1:] != -100, torch.zeros(len(ids), 1, dtype=torch.bool)), dim=1)
    expected = penalties_by_loop(outputs.last_hidden_state, outputs.undropped_hidden_state, predicts, document)
    assert losses["with"] - losses["without"] == pytest.approx(expected / predicts.sum().item(), abs=1e-5)
    assert not torch.equal(outputs.last_hidden_state, outputs.undropped_hidden_state)
    with torch.no_grad():
        assert torch.equal(
            model.eval()(ids, labels=labels, **given).loss, plain.eval()(ids, labels=labels, **given).loss
        )


def test_gradients_with_penalties_do_not_depend_on_how_a_batch_is_cut():
    """Micro-batches whose losses are divided by the global count sum to the whole, packed or not."""
    model = language_model(**PENALTIES).train()
    documents, ids, positions = packed_row()
    labels = ids.masked_fill(torch.rand(ids.shape) < 0.3, -100)
    labels[0, 5], labels[0, 6], labels[1, 2], labels[1, 9] = -100, -100, -100, -100  # no document predicts the next
    count = (labels[:, 1:] != -100).sum()

    def gradients(batches) -> list[torch.Tensor]:
        model.zero_grad()
        for batch in batches:
            model(**batch, num_items_in_batch=count).loss.backward()
        return [p.grad.clone() for p in model.parameters()]

    whole_batch = {"input_ids": ids, "position_ids": positions, "labels": labels}
    rows = [{key: value[i : i + 1] for key, value in whole_batch.items()} for i in (0, 1)]
    ends = torch.tensor([d.shape[1] for d in documents]).cumsum(0).tolist()
    flat = labels.flatten()
    alone = [
        {"input_ids": d, "labels": flat[end - d.shape[1] : end][None]} for d, end in zip(documents, ends, strict=True)
    ]
    whole = gradients([whole_batch])
    for cut in (rows, alone):
        for mine, theirs in zip(gradients(cut), whole, strict=True):
            assert (mine - theirs).abs().max() <= 1e-5


def test_shifted_labels_bear_the_same_penalties():
    model = language_model(**PENALTIES).train()
    ids = tokens(2, 9)
    shifted = torch.cat((ids[:, 1:], torch.full((2, 1), -100)), dim=1)
    expected = model(ids, labels=ids).loss.item()
    assert model(ids, labels=shifted, shift_labels=shifted).loss.item() == pytest.approx(expected)


# ---- architecture --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "widths"),
    [
        ({}, [(8, 12), (12, 12), (12, 8)]),
        ({"output_projection": True}, [(8, 12), (12, 12), (12, 12)]),
        ({"embedding_size": 6, "tie_word_embeddings": False}, [(6, 12), (12, 12), (12, 8)]),
        ({"num_hidden_layers": 1}, [(8, 8)]),
    ],
    ids=str,
)
def test_layers_have_the_widths_of_the_configuration(changes, widths):
    model = language_model(**changes)
    rnns = [layer.recurrence.rnn for layer in model.model.layers]
    assert [(rnn.input_size, rnn.hidden_size) for rnn in rnns] == widths
    assert model(tokens(2, 3)).logits.shape == (2, 3, VOCAB)


def test_tied_weights_are_one_matrix_and_need_one_width():
    model = language_model(tie_word_embeddings=True)
    assert model.lm_head.weight is model.model.stem.embed_tokens.weight
    untied = language_model(tie_word_embeddings=False)
    assert untied.lm_head.weight is not untied.model.stem.embed_tokens.weight
    with pytest.raises(ValueError, match=r"embedding_size=6 equal to hidden_size=8; widen the layers by intermediate"):
        language_model(embedding_size=6)
    AutoModelForSequenceClassification.from_config(small(embedding_size=6))  # which has nothing to tie


def test_residual_layers_add_their_input_where_widths_agree():
    trunk = AutoModel.from_config(small(residual=True)).eval()
    assert [layer.is_residual for layer in trunk.layers] == [False, True, False]
    layer, x = trunk.layers[1], torch.randn(2, 4, 12)
    assert torch.equal(layer(x)[0], x + layer.recurrence(x)[0])
    assert not any(layer.is_residual for layer in AutoModel.from_config(small()).layers)


@pytest.mark.parametrize(
    ("name", "kind"), [("none", nn.Identity), ("rms_norm", nn.RMSNorm), ("layer_norm", nn.LayerNorm)]
)
def test_norms_are_before_each_layer_and_after_the_last(name, kind):
    trunk = AutoModel.from_config(small(norm_type=name)).eval()
    assert all(type(norm) is kind for norm in [*(layer.norm for layer in trunk.layers), trunk.norm])
    layer, x = trunk.layers[0], torch.randn(2, 4, 8)
    assert torch.equal(layer(x)[0], layer.recurrence(layer.norm(x))[0])


def test_hidden_states_are_recorded_with_the_embeddings_first():
    trunk = AutoModel.from_config(small()).eval()
    outputs = trunk(tokens(2, 5), output_hidden_states=True)
    assert [h.shape[-1] for h in outputs.hidden_states] == [8, 12, 12, 8]
    assert torch.equal(outputs.hidden_states[-1], outputs.last_hidden_state)
    assert outputs.undropped_hidden_state is None
    assert outputs.final_state is None


def test_a_trunk_alone_is_no_encoder_decoder():
    with pytest.raises(ValueError, match="makes two stacks, and BmRnnModel is one; open them by AutoModel"):
        AutoModelForTokenClassification.from_config(small(is_encoder_decoder=True))


def test_the_trunk_takes_tokens_or_embeddings_but_not_both():
    trunk = AutoModel.from_config(small()).eval()
    ids = tokens(1, 2)
    for given in ({}, {"input_ids": ids, "inputs_embeds": trunk.stem.embed(ids)}):
        with pytest.raises(ValueError, match="input_ids or inputs_embeds, and not both"):
            trunk(**given)
    assert torch.equal(trunk(inputs_embeds=trunk.stem.embed(ids)).last_hidden_state, trunk(ids).last_hidden_state)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"hidden_size": 7, "is_causal": False},
            "hidden_size=7 and intermediate_size=12 make one of 7, so choose even",
        ),
        ({"intermediate_size": 9, "is_causal": False}, "intermediate_size=9 make one of 9, so choose even sizes"),
        ({"hidden_dropout": 1.0}, "hidden_dropout=1.0 is not a probability"),
        ({"weight_drop": -0.1}, "weight_drop=-0.1 is not a probability"),
        ({"weight_drop": 0.5, "cell_type": "mingru"}, "weight_drop=0.5 has nothing to act on"),
        ({"num_hidden_layers": 0}, "num_hidden_layers=0 must be at least 1"),
        ({"cell_type": "rwkv"}, "cell_type"),
        (
            {"input_type": "audio", "embedding_size": 7},
            "input_type='audio' reads no tokens: embedding_size=7 must equal",
        ),
        ({"input_type": "series", "is_encoder_decoder": True}, "is_encoder_decoder=True be False; omit both"),
        (
            {"input_type": "series", "context_length": 9, "patch_size": 2},
            "context_length=9 is not a multiple of patch_size=2",
        ),
        ({"hidden_size": "wide"}, "hidden_size"),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_a_wrong_field_is_named_with_its_value(fields, message):
    with pytest.raises(Exception, match=message):
        small(**fields)


# ---- presets -------------------------------------------------------------------------------------------------------


def parameters_on_meta(auto_class, config: BmRnnConfig) -> int:
    with torch.device("meta"):
        return auto_class.from_config(config).num_parameters()


def test_awd_lstm_has_its_published_parameters():
    """24 M (Merity et al. 2017, table 1): embedding, three LSTMs with two biases each; ours has no output bias."""
    embedding, output_bias = 10000 * 400, 10000
    lstms = sum(4 * units * (inputs + units + 2) for inputs, units in ((400, 1150), (1150, 1150), (1150, 400)))
    assert embedding + output_bias + lstms == 24_221_600
    config = BmRnnConfig.from_preset("awd-lstm-ptb")
    assert parameters_on_meta(AutoModelForCausalLM, config) == 24_221_600 - output_bias
    dropouts = [
        getattr(config, name) for name in ("input_dropout", "hidden_dropout", "output_dropout", "embedding_dropout")
    ]
    assert dropouts == [0.4, 0.3, 0.4, 0.1]  # the order and values of the paper's section 5


def test_the_lstm_classifier_has_its_published_parameters():
    """Keras: 20000 x 128 embedding, LSTM(128) with one bias, Dense(1) with a bias: 2,691,713."""
    published = 20000 * 128 + 4 * 128 * (128 + 128 + 1) + 128 + 1
    assert published == 2_691_713
    config = BmRnnConfig.from_preset("lstm-classifier")
    second_bias, second_label = 4 * 128, 128 + 1
    ours = parameters_on_meta(AutoModelForSequenceClassification, config)
    assert ours == published + second_bias + second_label


def test_minigru_small_is_a_language_model_of_its_stated_size():
    config = BmRnnConfig.from_preset("minigru-small", num_hidden_layers=2)
    assert (config.cell_type, config.residual, config.num_hidden_layers) == ("mingru", True, 2)
    layer = 384 * 2 * 384 + 2 * 384 + 384  # values and gates, their biases, a norm
    assert parameters_on_meta(AutoModelForCausalLM, config) == 4096 * 384 + 2 * layer + 384


def test_an_unknown_preset_lists_those_there_are():
    with pytest.raises(ValueError, match="awd-lstm-ptb, lstm-classifier, minigru-small"):
        BmRnnConfig.from_preset("lstm")


# ---- initial weights, saving, loading ------------------------------------------------------------------------------


@pytest.mark.parametrize("cell", TORCH_CELLS)
@pytest.mark.parametrize("is_causal", [True, False], ids=["causal", "bidirectional"])
def test_recurrent_weights_start_orthogonal_gate_by_gate(cell, is_causal):
    trunk = AutoModel.from_config(small(cell, is_causal=is_causal))
    for layer in trunk.layers:
        rnn = layer.recurrence.rnn
        for name, weight in rnn.named_parameters():
            if name.startswith("weight_hh"):
                for gate in weight.split(rnn.hidden_size):
                    assert (gate @ gate.T - torch.eye(rnn.hidden_size)).abs().max() <= 1e-5
            elif name.startswith("weight_ih"):
                limit = math.sqrt(6 / (rnn.input_size + rnn.hidden_size))
                assert 0.5 * limit < weight.abs().max() <= limit
            else:
                forget = name.startswith("bias_ih") and cell == "lstm"
                gates = weight.split(rnn.hidden_size)
                assert [set(gate.tolist()) for gate in gates] == [
                    {1.0 if forget and i == 1 else 0.0} for i in range(len(gates))
                ]


def test_initializer_range_is_the_spread_of_embeddings():
    for std in (0.01, 0.3):
        config = small(vocab_size=500, embedding_size=40, hidden_size=40, initializer_range=std)
        assert AutoModel.from_config(config).stem.embed_tokens.weight.std().item() == pytest.approx(std, rel=0.05)


@pytest.mark.parametrize("cell", CELLS)
def test_what_a_checkpoint_lacks_starts_as_in_a_new_model(cell, tmp_path):
    """from_pretrained builds on the meta device: what _init_weights does not reach would be raw memory."""
    model = language_model(cell, norm_type="layer_norm", output_projection=True)
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    kept = {name: tensor for name, tensor in weights.items() if "layers.1" not in name}
    assert len(kept) < len(weights)
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    for name, parameter in loaded.named_parameters():
        if name in kept:
            assert torch.equal(parameter, kept[name])
        else:
            assert parameter.isfinite().all()
    recurrence = loaded.model.layers[1].recurrence
    if cell == "mingru":
        assert recurrence.in_proj.bias.view(2, -1)[1].eq(-1).all()
        assert 0.05 < recurrence.in_proj.weight.std() < 1
    else:
        gate = recurrence.rnn.weight_hh_l0[:12]
        assert (gate @ gate.T - torch.eye(12)).abs().max() <= 1e-5


# ---- training ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["weights", "autocast"])
@pytest.mark.parametrize("rows", ["whole", "packed"])
@pytest.mark.parametrize("cell", CELLS)
def test_bfloat16_trains_and_stays_near_float32(cell, rows, how):
    model = AutoModelForCausalLM.from_config(small(cell, initializer_range=0.3)).train()
    _, ids, positions = packed_row()
    given = {"labels": ids} | ({"position_ids": positions} if rows == "packed" else {})
    expected = model(ids, **given).loss
    if how == "weights":
        model.to(torch.bfloat16)
        outputs = model(ids, **given)
        assert outputs.logits.dtype == torch.bfloat16
    else:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            outputs = model(ids, **given)
    assert outputs.loss.item() == pytest.approx(expected.item(), rel=0.03)
    outputs.loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("rows", ["whole", "packed"])
@pytest.mark.parametrize("cell", CELLS)
def test_gradient_checkpointing_changes_no_loss_and_no_gradient(cell, rows):
    drops = {"hidden_dropout": 0.3} | ({} if cell == "mingru" else {"weight_drop": 0.3})
    model = AutoModelForCausalLM.from_config(small(cell, **drops)).train()
    _, ids, positions = packed_row()
    given = {"labels": ids} | ({"position_ids": positions} if rows == "packed" else {})
    results = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
            assert all(layer.gradient_checkpointing for layer in model.model.layers)
        model.zero_grad()
        torch.manual_seed(2)
        loss = model(ids, **given).loss
        loss.backward()
        results.append([loss.detach(), *(p.grad.clone() for p in model.parameters())])
    for one, other in zip(*results, strict=True):
        assert is_close(other, one)


@pytest.mark.parametrize("cell", ["lstm", "mingru"])
def test_a_compiled_model_gives_the_same_logits_and_gradients(cell):
    """Traced, with the kernels torch has: what a code generator adds on top is torch's own affair."""
    model = language_model(cell, num_hidden_layers=1)
    _, ids, positions = packed_row()
    compiled = torch.compile(model, backend="aot_eager")
    for given in ({}, {"position_ids": positions}):
        results = []
        for one in (model, compiled):
            model.zero_grad()
            outputs = one(ids, labels=ids, use_cache=False, **given)
            outputs.loss.backward()
            results.append([outputs.logits.detach(), *(p.grad.clone() for p in model.parameters())])
        for mine, theirs in zip(*results, strict=True):
            assert is_close(theirs, mine, 1e-5)


@pytest.mark.parametrize("is_causal", [True, False], ids=["causal", "both-ways"])
@pytest.mark.parametrize("cell", CELLS)
def test_what_a_graph_computes_without_looking_at_data_equals_what_rows_with_known_padding_give(
    cell, is_causal, monkeypatch
):
    """The same operations for all rows, here called as they are; tests of compiled and exported graphs trace them."""
    trunk = AutoModel.from_config(small(cell, is_causal=is_causal, num_hidden_layers=2)).eval()
    ids, mask = tokens(5, 6), torch.tensor([[1] * 6, [1, 1, 1, 0, 0, 0], [0, 0, 1, 1, 0, 1], [0] * 5 + [1], [0] * 6])
    restarts = torch.tensor([[0, 1, 2, 0, 1, 2], [0, 1, 2, 3, 4, 5], [0, 0, 1, 0, 1, 0], [0, 1, 0, 1, 2, 0], [0] * 6])
    masked, packed = {"attention_mask": mask}, {"position_ids": restarts}
    for given in (masked, packed, masked | packed):
        found = []
        for blind in (False, True):
            monkeypatch.setattr(torch.compiler, "is_compiling", lambda blind=blind: blind)
            trunk.zero_grad()
            outputs = trunk(ids, **given, output_state=True, use_cache=False)
            states = [outputs.last_hidden_state]
            if is_causal or given is masked:  # of several documents read both ways there is no one state
                states.append(outputs.final_state)
            sum(state.pow(3).sum() for state in states).backward()
            found.append([*(state.detach() for state in states), *(p.grad.clone() for p in trunk.parameters())])
        for expected, mine in zip(*found, strict=True):
            assert is_close(mine, expected, 1e-5)


LORA = {
    "lstm": {"target_modules": [], "target_parameters": ["rnn.weight_ih_l0", "rnn.weight_hh_l0"]},
    "gru": {"target_modules": [], "target_parameters": ["rnn.weight_hh_l0"]},
    "mingru": {"target_modules": ["in_proj"]},
}


@pytest.mark.trains
@pytest.mark.parametrize("cell", LORA)
def test_lora_on_recurrent_matrices_trains_saves_and_merges(cell, tmp_path):
    peft = pytest.importorskip("peft")
    base = language_model(cell, weight_drop=0.0 if cell == "mingru" else 0.2)
    ids = tokens(2, 8)
    before = base(ids).logits.detach()
    model = peft.get_peft_model(base, peft.LoraConfig(r=2, lora_alpha=8, **LORA[cell]))
    assert is_close(model.eval()(ids).logits, before)
    model.train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    for _ in range(3):
        optimizer.zero_grad()
        model(ids, labels=ids).loss.backward()
        optimizer.step()
    trained = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 3 * 2 * max(len(LORA[cell].get("target_parameters", "x")), 1)
    assert all(gradient.ne(0).any() for gradient in trained.values())
    after = model.eval()(ids).logits.detach()
    assert (after - before).abs().max() > 1e-3
    model.save_pretrained(tmp_path / "adapter")
    with model.disable_adapter():
        assert is_close(model(ids).logits, before)
    merged = model.merge_and_unload()
    assert is_close(merged(ids).logits, after, 1e-5)
    torch.manual_seed(0)
    merged.save_pretrained(tmp_path / "merged")
    assert is_close(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")(ids).logits, after, 1e-5)


# ---- heads ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_causal", [True, False], ids=["causal", "bidirectional"])
@pytest.mark.parametrize("pooling", [None, "first", "last", "mean", "max"])
@torch.no_grad()
def test_a_classifier_reads_real_positions_only(pooling, is_causal):
    config = small(is_causal=is_causal, classifier_pooling=pooling, num_labels=4)
    assert config.classifier_pooling == (pooling or ("last" if is_causal else "mean"))
    model = AutoModelForSequenceClassification.from_config(config).eval()
    ids, mask = padded_rows("right")
    alone = torch.cat([model(row[keep][None]).logits for row, keep in zip(ids, mask.bool(), strict=True)])
    assert alone.shape == (4, 4)
    assert is_close(model(ids, attention_mask=mask).logits, alone)


@torch.no_grad()
def test_the_pooled_position_is_the_one_that_is_asked_for():
    ids = tokens(2, 5)
    for pooling, expected in {
        "first": lambda h: h[:, 0],
        "last": lambda h: h[:, 4],
        "mean": lambda h: h.sum(1) / 5,
        "max": lambda h: h.max(1).values,
    }.items():
        outputs = AutoModel.from_config(small(classifier_pooling=pooling)).eval()(ids)
        assert outputs[1] is outputs.pooler_output
        assert is_close(outputs.pooler_output, expected(outputs.last_hidden_state))


def test_classifier_dropout_acts_on_what_the_head_reads():
    model = AutoModelForSequenceClassification.from_config(small(classifier_dropout=0.7, num_labels=4))
    ids = tokens(2, 5)
    assert (model.train()(ids).logits - model.eval()(ids).logits).abs().max() > 1e-2


def translator(**changes):
    return shake(AutoModelForSeq2SeqLM.from_config(small(is_encoder_decoder=True, **changes))).eval()


@pytest.mark.parametrize("scoring", ["general", "dot"])
@pytest.mark.parametrize("is_causal", [True, False], ids=["causal-encoder", "bidirectional-encoder"])
@pytest.mark.parametrize("cell", TORCH_CELLS)
@torch.no_grad()
def test_translation_equals_torchs_stacks_and_a_loop_over_attention(cell, is_causal, scoring, record_property):
    """Luong et al. 2015: the decoder starts from the encoder's last state; eq. 5, 7 and 8 for each target position."""
    model = translator(cell_type=cell, intermediate_size=8, is_causal=is_causal, attention_scoring=scoring)
    source, target = tokens(2, 7), tokens(2, 5)
    embedding = model.model.encoder.stem.embed_tokens
    memory, state = torch_stack(model.model.encoder, cell)(embedding(source))
    if not is_causal:  # torch's order: layer 0 forward, layer 0 backward, layer 1 forward, ...
        pairs = [torch.cat((s[0::2], s[1::2]), dim=-1) for s in (state if cell == "lstm" else (state,))]
        state = tuple(pairs) if cell == "lstm" else pairs[0]
    hidden, _ = torch_stack(model.model.decoder, cell)(embedding(target), state)
    attention = model.model.attention
    expected = torch.zeros(2, 5, VOCAB)
    for b in range(2):
        for t in range(5):
            h = hidden[b, t]
            query = attention.query.weight @ h if scoring == "general" else h
            scores = [math.exp(float(query @ memory[b, s])) for s in range(7)]
            context = sum(score / sum(scores) * memory[b, s] for s, score in enumerate(scores))
            expected[b, t] = model.lm_head.weight @ torch.tanh(attention.combine.weight @ torch.cat((context, h)))
    check(record_property, model(source, decoder_input_ids=target).logits, expected, 1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("cell", CELLS)
def test_source_padding_changes_no_translation(cell, side):
    model = translator(cell_type=cell, is_causal=False).double()  # its sums differ by less on every processor
    ids, mask = padded_rows(side)
    target = tokens(4, 6)
    alone = torch.cat(
        [model(ids[i][mask[i].bool()][None], decoder_input_ids=target[i : i + 1]).logits for i in range(4)]
    )
    assert is_close(model(ids, attention_mask=mask, decoder_input_ids=target).logits, alone)


@pytest.mark.parametrize("settings", [{}, {"num_beams": 3}, {"do_sample": True}], ids=["greedy", "beams", "sampling"])
@pytest.mark.parametrize("cell", CELLS)
def test_translations_with_a_cache_equal_reading_all_again(cell, settings):
    model = translator(cell_type=cell, is_causal=False)
    ids, mask = padded_rows("right")
    results, steps = [], []
    model.model.decoder.layers[0].register_forward_pre_hook(lambda _, args: steps.append(args[0].shape[1]))
    for use_cache in (True, False):
        torch.manual_seed(3)
        results.append(model.generate(ids, attention_mask=mask, max_new_tokens=8, use_cache=use_cache, **settings))
    assert torch.equal(*results)
    assert steps == [1] * 8 + list(range(1, 9))


@pytest.mark.trains
def test_a_translator_learns_to_reverse():
    model = AutoModelForSeq2SeqLM.from_config(
        small(is_encoder_decoder=True, is_causal=False, embedding_size=24, hidden_size=24, num_hidden_layers=1)
    ).train()
    source = tokens(4, 5)
    labels = source.flip(1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    for _ in range(100):
        loss = model(source, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.1
    for settings in ({}, {"num_beams": 2}):
        assert torch.equal(model.eval().generate(source, max_new_tokens=5, do_sample=False, **settings)[:, 1:], labels)


def test_a_decoder_reads_the_start_token_and_then_its_labels():
    model = translator()
    labels = torch.tensor([[5, 6, 7], [8, -100, -100]])
    expected = torch.tensor([[1, 5, 6], [1, 8, 0]])
    assert torch.equal(model.prepare_decoder_input_ids_from_labels(labels), expected)
    source = tokens(2, 4)
    ours = model(source, labels=labels)
    logits = model(source, decoder_input_ids=expected).logits
    assert torch.equal(ours.logits, logits)
    real = labels != -100
    assert ours.loss.item() == pytest.approx(nn.functional.cross_entropy(logits[real], labels[real]).item())
    half = model(source, labels=labels, num_items_in_batch=8).loss
    assert half.item() == pytest.approx(ours.loss.item() / 2)


def test_a_warning_says_that_target_positions_are_ignored(caplog):
    model, ids = translator(), tokens(2, 4)
    expected = model(ids, decoder_input_ids=ids).logits
    transformers.utils.logging.warning_once.cache_clear()
    with caplog.at_level("WARNING", logger="bmtk.models.modeling_bm_rnn"):
        given = model(ids, decoder_input_ids=ids, decoder_position_ids=torch.arange(4).expand(2, -1)).logits
    assert (
        "decoder_position_ids are ignored: the decoder of a bm_rnn starts from the last state of its encoder"
        in caplog.text
    )
    assert torch.equal(given, expected)


def test_a_translator_shares_one_matrix_or_has_three():
    model = translator()
    embedding = model.get_input_embeddings().weight
    assert model.lm_head.weight is embedding
    assert model.model.decoder.stem.embed_tokens.weight is embedding
    untied = translator(tie_word_embeddings=False)
    weights = {
        untied.lm_head.weight,
        untied.model.decoder.stem.embed_tokens.weight,
        untied.get_input_embeddings().weight,
    }
    assert len(weights) == 3


def test_a_new_token_is_known_on_both_sides_of_a_translation():
    model = translator()
    model.model.set_input_embeddings(nn.Embedding(VOCAB, 8))
    assert model.model.encoder.stem.embed_tokens is model.model.decoder.stem.embed_tokens
    model.resize_token_embeddings(VOCAB + 2, mean_resizing=False)
    new = torch.tensor([[VOCAB + 1, 3]])
    assert model(new, decoder_input_ids=new).logits.shape == (1, 2, VOCAB + 2)
    assert model.lm_head.weight is model.model.decoder.stem.embed_tokens.weight
    untied = translator(tie_word_embeddings=False)
    untied.resize_token_embeddings(VOCAB + 2)
    assert untied(new, decoder_input_ids=new).logits.shape == (1, 2, VOCAB + 2)


def test_a_translator_is_saved_and_loaded_exactly_and_reports_its_attention(tmp_path):
    model = translator(is_causal=False)
    source, target = tokens(2, 6), tokens(2, 4)
    outputs = model(source, decoder_input_ids=target, output_attentions=True, output_hidden_states=True)
    (weights,) = outputs.cross_attentions
    assert weights.shape == (2, 1, 4, 6)
    assert is_close(weights.sum(-1), torch.ones(2, 1, 4))
    assert len(outputs.encoder_hidden_states) == len(outputs.decoder_hidden_states) == 4
    model.save_pretrained(tmp_path)
    loaded = AutoModelForSeq2SeqLM.from_pretrained(tmp_path)
    assert torch.equal(loaded(source, decoder_input_ids=target).logits, outputs.logits)


def test_a_translator_names_what_its_configuration_lacks():
    with pytest.raises(ValueError, match="BmRnnForSeq2SeqLM needs is_encoder_decoder=True"):
        AutoModelForSeq2SeqLM.from_config(small())
    model = translator(decoder_start_token_id=None)
    with pytest.raises(ValueError, match="decoder_start_token_id=None and pad_token_id=0: a decoder needs both"):
        model(tokens(1, 3), labels=tokens(1, 3))


def test_a_head_without_tokens_has_a_first_layer_for_an_embedding_and_names_its_input():
    model, frames = CASES["rnn_audio-AudioClassification"].model(), torch.randn(2, 24, 8)
    assert model.main_input_name == "input_features"
    assert model.get_input_embeddings() is model.model.stem.conv1
    with pytest.raises(ValueError, match="pass input_features or inputs_embeds, and not both"):
        model.model()
    dropped = CASES["rnn_audio-Model"].model(input_dropout=0.5).train()
    one, other = (dropped(input_features=frames).last_hidden_state for _ in range(2))
    assert not torch.equal(one, other)


def test_a_series_may_be_read_from_both_sides_or_from_the_past():
    for is_causal, read in ((True, 32), (False, 4 * 32), (None, 4 * 32)):
        model = CASES["rnn_series-TimeSeriesPrediction"].model(is_causal=is_causal)
        assert model.projection.in_features == read


@pytest.mark.gpu
@pytest.mark.parametrize("cell", CELLS)
def test_a_gpu_gives_the_same_logits_and_gradients(cell):
    model = language_model(cell, is_causal=True, weight_drop=0.0)
    _, ids, positions = packed_row()
    results = []
    for device in ("cpu", "cuda"):
        model.to(device).zero_grad()
        outputs = model(ids.to(device), position_ids=positions.to(device), labels=ids.to(device))
        outputs.loss.backward()
        results.append([outputs.logits.detach().cpu(), *(p.grad.cpu() for p in model.parameters())])
    for one, other in zip(*results, strict=True):
        assert is_close(other, one, 1e-4)
    if cell != "mingru":
        dropped = language_model(cell, weight_drop=0.5).to("cuda").train()
        dropped(ids.cuda(), labels=ids.cuda()).loss.backward()
        assert dropped.model.layers[0].recurrence.rnn.weight_hh_l0.grad.eq(0).any()
