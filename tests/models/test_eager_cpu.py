"""What the models compute on a CPU in a way of their own, beside the plain formula in float64."""

from copy import deepcopy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm

from bmtk.models import attention_bm, dropout_bm, norms_bm, rotary_bm, token_loss_bm
from bmtk.models.attention_bm import CPUAttention, fits_cpu_attention
from bmtk.models.configuration_bm_transformer import BmTransformerConfig
from bmtk.models.dropout_bm import BmDropout
from bmtk.models.eager_cpu_bm import is_eager_on_cpu, is_plain_linear
from bmtk.models.norms_bm import BmRMSNorm
from bmtk.models.recomputed_activations_bm import gated_product
from bmtk.models.rotary_bm import rotate
from bmtk.models.scans_bm import GatedScan
from bmtk.models.token_loss_bm import ChunkedLoss, can_score_in_chunks, token_loss, token_losses
from bmtk.models.transformer_layers_bm import GatedMLP, PlainMLP, added, mlp_of_norm, norm_of_sublayer


def results(function, *inputs: torch.Tensor) -> list[torch.Tensor]:
    """The value of a function and its gradients, whose output is weighed by numbers that differ."""
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    output = function(*inputs)
    weights = torch.linspace(-1, 1, output.numel(), dtype=torch.float64).view(output.shape)
    (output.double() * weights).sum().backward()
    return [output.detach(), *(x.grad for x in inputs)]


def assert_same(found: list[torch.Tensor], expected: list[torch.Tensor], tolerance: float) -> None:
    for one, other in zip(found, expected, strict=True):
        assert (one.double() - other).norm() <= tolerance * other.norm()


@pytest.fixture
def draw():
    """Normal numbers in float64 that bfloat16 holds, too."""
    generator = torch.Generator().manual_seed(0)
    return lambda *shape: torch.randn(*shape, generator=generator).bfloat16().double()


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("ignored", [0, 3])
@pytest.mark.parametrize("size", [1, 100])  # 100: powers of 2 and e of the scores themselves overflow
def test_the_loss_in_chunks_has_the_value_and_gradients_of_the_plain_one(monkeypatch, draw, has_bias, ignored, size):
    monkeypatch.setattr(token_loss_bm, "CHUNK", 64)  # 5 rows of 29 positions at a time
    layer = nn.Linear(5, 37, bias=has_bias)
    hidden, labels = draw(29, 5) * size, torch.arange(29) % 37
    labels[:ignored] = -100
    expected_layer = nn.Linear(5, 37, bias=has_bias).double()
    expected_layer.load_state_dict(layer.state_dict())

    def plain(x):
        return F.cross_entropy(expected_layer(x), labels, reduction="sum")[None] * 3 / 11

    expected = results(plain, hidden)
    found = results(lambda x: token_loss(x, labels, layer, torch.tensor(11))[None] * 3, hidden.float())
    assert_same(found, expected, 1e-6)
    for name, parameter in layer.named_parameters():
        other = expected_layer.get_parameter(name).grad
        assert (parameter.grad - other).norm() <= 1e-6 * other.norm(), name


def test_the_loss_in_chunks_leaves_out_the_gradients_that_nobody_wants(monkeypatch):
    monkeypatch.setattr(token_loss_bm, "CHUNK", 64)
    layer, hidden, labels = nn.Linear(4, 9, bias=False), torch.randn(6, 4, requires_grad=True), torch.arange(6)
    layer.weight.requires_grad_(False)
    loss = token_loss(hidden, labels, layer)
    loss.backward()
    assert layer.weight.grad is None
    expected = hidden.detach().requires_grad_()
    F.cross_entropy(layer(expected), labels).backward()
    torch.testing.assert_close(hidden.grad, expected.grad)


def test_the_losses_of_single_tokens_need_no_logits_of_all_of_them(monkeypatch, draw):
    monkeypatch.setattr(token_loss_bm, "CHUNK", 64)
    layer, hidden, labels = nn.Linear(5, 37), draw(3, 7, 5).float(), torch.arange(21).view(3, 7)
    labels[1, 2] = -100
    sizes = []
    layer.register_forward_hook(lambda module, inputs, output: sizes.append(len(output)))
    losses = token_losses(hidden, labels, layer, 37)
    assert sizes == [5, 5, 5, 5, 1]
    scores = layer(hidden).detach().double()
    expected = scores.logsumexp(-1) - scores.gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    torch.testing.assert_close(losses.double(), expected.masked_fill(labels == -100, 0), rtol=1e-6, atol=1e-6)


def test_an_output_layer_that_does_more_than_multiply_is_called():
    hidden, labels = torch.randn(6, 4), torch.arange(6)
    layer = nn.Linear(4, 9)
    assert can_score_in_chunks(hidden, layer)
    layer.register_forward_hook(lambda module, inputs, output: output * 2)
    assert not is_plain_linear(layer)
    torch.testing.assert_close(token_loss(hidden, labels, layer), F.cross_entropy(layer(hidden), labels))
    assert not can_score_in_chunks(hidden, nn.Sequential(nn.Linear(4, 9)))
    assert not can_score_in_chunks(hidden.double(), nn.Linear(4, 9).double())


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("casts", [False, True])
def test_under_autocast_the_loss_in_chunks_is_as_exact_as_the_logits_allow(monkeypatch, draw, has_bias, casts):
    monkeypatch.setattr(token_loss_bm, "casts_before_products", lambda: casts)
    monkeypatch.setattr(token_loss_bm, "CHUNK", 64)  # chunks of 64 and 36 rows
    layer, hidden, labels = nn.Linear(64, 300, bias=has_bias), draw(100, 64), torch.arange(100)
    weight = layer.weight.detach().bfloat16().double().requires_grad_()
    bias = layer.bias.detach().double().requires_grad_() if has_bias else None
    expected = results(lambda x: F.cross_entropy(F.linear(x, weight, bias), labels)[None], hidden)
    with torch.autocast("cpu", torch.bfloat16):
        found = results(lambda x: token_loss(x, labels, layer)[None], hidden.float())
    pairs = ((layer.weight, weight), (layer.bias, bias))[: 1 + has_bias]
    gradients = [[module.grad for module, _ in pairs], [plain.grad for _, plain in pairs]]
    assert {x.dtype for x in found + gradients[0]} == {torch.float32}
    assert_same(found + gradients[0], expected + gradients[1], 5e-3)
    assert_same(found[:1], expected[:1], 2e-4)  # computed in float32 from the logits on


@pytest.mark.parametrize(("casts", "dtype"), [(False, torch.float32), (True, torch.bfloat16)])
def test_the_processor_decides_in_which_dtype_the_loss_in_chunks_multiplies(monkeypatch, casts, dtype):
    seen = []
    computed = token_loss_bm.loss_and_gradients
    monkeypatch.setattr(token_loss_bm, "casts_before_products", lambda: casts)
    monkeypatch.setattr(token_loss_bm, "loss_and_gradients", lambda *args: seen.append(args[-2]) or computed(*args))
    hidden, labels, layer = torch.randn(3, 8), torch.arange(3), nn.Linear(8, 5)
    token_loss(hidden, labels, layer)
    with torch.autocast("cpu", torch.bfloat16):
        token_loss(hidden, labels, layer)
    assert seen == [torch.float32, dtype]


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("key_heads", [4, 2])
@pytest.mark.parametrize("block", [2**19, 2**7])  # all rows at once; single heads
@pytest.mark.parametrize("queries", [128, 8])  # all at once; eight at a time, and three
@pytest.mark.parametrize("casts", [True, False])
@pytest.mark.parametrize("size", [1, 30])  # 30: most weights are 0 or 1
def test_attention_is_that_of_the_plain_formula(monkeypatch, draw, is_causal, key_heads, block, queries, casts, size):
    monkeypatch.setattr(attention_bm, "BLOCK", block)
    monkeypatch.setattr(attention_bm, "QUERIES", queries)
    monkeypatch.setattr(attention_bm, "casts_before_products", lambda: casts)
    inputs = [draw(3, 19, heads, 16).transpose(1, 2) for heads in (4, key_heads, key_heads)]
    inputs[0] = (inputs[0] * size).bfloat16().double()

    def plain(query, key, value):
        key, value = (x.repeat_interleave(4 // key_heads, dim=1) for x in (key, value))
        scores = query @ key.mT / 4
        later = torch.ones(19, 19, dtype=torch.bool).triu(1)
        return (scores.masked_fill(later, -torch.inf) if is_causal else scores).softmax(-1) @ value

    found = results(lambda q, k, v: CPUAttention.apply(q, k, v, is_causal, 0.25), *(x.bfloat16() for x in inputs))
    assert_same(found, results(plain, *inputs), 6e-3)  # bfloat16 holds three digits


@pytest.mark.parametrize("casts", [True, False])
def test_numbers_of_a_head_may_be_apart_in_memory(monkeypatch, draw, casts):
    monkeypatch.setattr(attention_bm, "casts_before_products", lambda: casts)
    inputs = [draw(2, 4, 16, 9).bfloat16() for _ in range(3)]
    found = results(lambda *x: CPUAttention.apply(*(y.mT for y in x), True, 0.25), *inputs)
    expected = results(lambda *x: CPUAttention.apply(*(y.mT.contiguous() for y in x), True, 0.25), *inputs)
    assert_same(found, expected, 5e-3)


@pytest.mark.parametrize("casts", [True, False])
def test_autocast_rounds_no_scores_of_attention(monkeypatch, draw, casts):
    monkeypatch.setattr(attention_bm, "casts_before_products", lambda: casts)
    inputs = [draw(2, 4, 9, 16).bfloat16() for _ in range(3)]
    expected = results(lambda *x: CPUAttention.apply(*x, True, 0.25), *inputs)
    with torch.autocast("cpu", torch.bfloat16):
        found = results(lambda *x: CPUAttention.apply(*x, True, 0.25), *inputs)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_autocast_rounds_no_gradients_of_the_norm(draw):
    norm, x, gradients = BmRMSNorm(16, eps=1e-3), draw(3, 5, 16).float().requires_grad_(), draw(3, 5, 16).float()
    norm(x).backward(gradients)
    expected, x.grad = x.grad, None
    with torch.autocast("cpu", torch.bfloat16):
        norm(x).backward(gradients)
    assert torch.equal(x.grad, expected)


@pytest.mark.parametrize(("casts", "longest"), [(True, 2048), (False, 256)])
def test_attention_of_its_own_is_for_whole_rows_in_training(monkeypatch, casts, longest):
    monkeypatch.setattr(attention_bm, "casts_before_products", lambda: casts)
    x = torch.randn(1, 2, 8, 16, dtype=torch.bfloat16, requires_grad=True)
    long = torch.randn(1, 2, longest + 1, 16, dtype=torch.bfloat16, requires_grad=True)
    assert fits_cpu_attention(x, x, x, None, 0.0)
    assert fits_cpu_attention(*3 * [long[:, :, 1:]], None, 0.0)
    assert not fits_cpu_attention(x, x, x, torch.ones(1, 1, 8, 8), 0.0)
    assert not fits_cpu_attention(x, x, x, None, 0.1)
    assert not fits_cpu_attention(x[:, :, :1], x, x, None, 0.0)
    assert not fits_cpu_attention(*3 * [x[:, :, :0]], None, 0.0)
    assert not fits_cpu_attention(x.float(), x.float(), x.float(), None, 0.0)
    assert not fits_cpu_attention(long, long, long, None, 0.0)
    with torch.no_grad():
        assert not fits_cpu_attention(x, x, x, None, 0.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_norm_is_that_of_the_plain_formula(draw, dtype):
    norm, x, weight = BmRMSNorm(16, eps=1e-3), draw(3, 5, 16), draw(16)
    norm.weight.data = weight.float()

    def plain(x, weight):
        return x / (x.square().mean(-1, keepdim=True) + 1e-3).sqrt() * weight

    output, of_x = results(norm, x.to(dtype))
    expected, of_expected, of_weight = results(plain, x, weight)
    assert output.dtype == of_x.dtype == dtype
    tolerance = 1e-6 if dtype == torch.float32 else 5e-3
    assert_same([output, of_x, norm.weight.grad], [expected, of_expected, of_weight], tolerance)


def test_a_norm_before_products_casts_for_all_of_them():
    norm, x = BmRMSNorm(8, eps=1e-5), torch.randn(2, 8)
    with torch.autocast("cpu", torch.bfloat16):
        assert norm(x).dtype == torch.float32
    norm.feeds_products = True
    assert norm(x).dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert norm(x).dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 3])  # whose angles are given
def test_pairs_are_rotated_by_their_angles(monkeypatch, draw, dtype, rows):
    monkeypatch.setattr(rotary_bm, "numbers_at_once", lambda: 160)  # two of three rows at a time
    x, angles = draw(3, 5, 2, 8).transpose(1, 2), draw(rows, 1, 5, 4)

    def plain(x):
        turned = torch.view_as_complex(torch.stack(x.chunk(2, dim=-1), -1)) * torch.polar(angles * 0 + 1, angles)
        return torch.cat((turned.real, turned.imag), -1)

    both = torch.cat((angles, angles), -1).float()
    found = results(lambda x: rotate(x, both.cos(), both.sin()), x.to(dtype))
    assert found[0].dtype == dtype
    assert_same(found, results(plain, x), 1e-6 if dtype == torch.float32 else 5e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gated_product_is_that_of_the_plain_formula(draw, dtype):
    gate, up = draw(7, 9), draw(7, 9)
    expected = results(lambda gate, up: gate / (1 + (-gate).exp()) * up, gate, up)
    assert_same(
        results(gated_product, gate.to(dtype), up.to(dtype)), expected, 1e-6 if dtype == torch.float32 else 6e-3
    )


def normed_mlp(hidden_act: str) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    config = BmTransformerConfig(hidden_size=8, intermediate_size=12, num_attention_heads=2, hidden_act=hidden_act)
    mlp, norm = (GatedMLP if hidden_act == "swiglu" else PlainMLP)(config), norm_of_sublayer(config)
    nn.init.uniform_(norm.weight, 0.5, 1.5)
    return mlp, norm


@pytest.mark.parametrize("is_autocast", [False, True])
@pytest.mark.parametrize("hidden_act", ["swiglu", "relu2"])
def test_norm_and_mlp_in_one_function_are_the_modules_one_after_the_other(monkeypatch, draw, hidden_act, is_autocast):
    monkeypatch.setattr(norms_bm, "numbers_at_once", lambda: 24)  # three rows at a time
    (mlp, norm), x = normed_mlp(hidden_act), draw(2, 5, 8)
    wide_mlp, wide_norm = deepcopy(mlp).double(), deepcopy(norm).double()

    def ours(x):
        with torch.autocast("cpu", torch.bfloat16, enabled=is_autocast):
            output = mlp_of_norm(mlp, norm, x)
        assert output.grad_fn.name() == "NormedMLPBackward"
        assert output.dtype == (torch.bfloat16 if is_autocast else torch.float32)
        return output

    found, expected = results(ours, x.float()), results(lambda x: wide_mlp(wide_norm(x)), x)
    found += [weight.grad for weight in (*mlp.parameters(), norm.weight)]
    expected += [weight.grad for weight in (*wide_mlp.parameters(), wide_norm.weight)]
    assert_same(found, expected, 2e-2 if is_autocast else 1e-6)


def doubled(mlp: nn.Module) -> nn.Module:
    """An MLP of a subclass, which computes something else."""
    kind = type(mlp)
    mlp.__class__ = type("Doubled", (kind,), {"forward": lambda self, x: 2 * kind.forward(self, x)})
    return mlp


@pytest.mark.parametrize("hidden_act", ["swiglu", "relu2"])
@pytest.mark.parametrize(
    "change",
    [
        lambda mlp, norm: mlp.up_proj.weight.requires_grad_(False),
        lambda mlp, norm: mlp.up_proj.register_forward_hook(lambda *_: None),
        lambda mlp, norm: mlp.register_forward_hook(lambda *_: None),
        lambda mlp, norm: norm.register_forward_pre_hook(lambda *_: None),
        lambda mlp, norm: setattr(mlp.down_proj, "bias", nn.Parameter(torch.ones(8))),
        lambda mlp, norm: setattr(mlp, "up_proj", nn.Sequential(mlp.up_proj)),
        lambda mlp, norm: doubled(mlp),
    ],
    ids=["frozen", "hook", "hook of the MLP", "hook of the norm", "bias", "another layer", "subclass"],
)
def test_a_norm_and_mlp_that_are_not_plain_run_as_modules(hidden_act, change):
    (mlp, norm), x = normed_mlp(hidden_act), torch.ones(1, 8)
    assert not mlp_of_norm(nn.Identity(), norm, x).isnan().any()
    with torch.no_grad():
        assert torch.equal(mlp_of_norm(mlp, norm, x), mlp(norm(x)))
    change(mlp, norm)
    output = mlp_of_norm(mlp, norm, x)
    assert output.grad_fn.name() != "NormedMLPBackward"
    assert torch.equal(output, mlp(norm(x)))


@pytest.mark.parametrize(
    "change",
    [
        lambda mlp: setattr(mlp, "act", nn.GELU()),
        lambda mlp: mlp.act.register_forward_hook(lambda *_: None),
        lambda mlp: nn.modules.module.register_module_forward_hook(lambda *_: None),
    ],
    ids=["another activation", "hook of the activation", "hook of all modules"],
)
def test_an_activation_that_is_not_plain_runs_as_a_module(change):
    mlp, norm = normed_mlp("relu2")
    handle = change(mlp)
    try:
        assert mlp_of_norm(mlp, norm, torch.ones(1, 8)).grad_fn.name() != "NormedMLPBackward"
    finally:
        if handle is not None:
            handle.remove()


def test_a_weight_that_changes_with_each_reading_is_read_once():
    (mlp, norm), layer, x = normed_mlp("swiglu"), spectral_norm(nn.Linear(8, 9)), torch.ones(3, 8)
    for one in (mlp.up_proj, mlp.gate_proj, mlp.down_proj):
        spectral_norm(one)
    same_mlp, same_layer = deepcopy(mlp), deepcopy(layer)
    assert torch.equal(mlp_of_norm(mlp, norm, x), same_mlp(norm(x)))
    torch.testing.assert_close(token_loss(x, torch.arange(3), layer), F.cross_entropy(same_layer(x), torch.arange(3)))
    for one, other in ((mlp, same_mlp), (layer, same_layer)):
        assert all(torch.equal(*pair) for pair in zip(one.buffers(), other.buffers(), strict=True))


def test_autocast_leaves_float64_alone(draw):
    (mlp, norm), layer, x = normed_mlp("swiglu"), nn.Linear(8, 9).double(), draw(4, 8)
    mlp, norm = mlp.double(), norm.double()
    expected = mlp_of_norm(mlp, norm, x), token_loss(x, torch.arange(4), layer)
    with torch.autocast("cpu", torch.bfloat16):
        found = mlp_of_norm(mlp, norm, x), token_loss(x, torch.arange(4), layer)
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


@pytest.mark.parametrize("shape", [(0, 5, 8), (2, 0, 8)])
def test_no_rows_are_no_error(shape):
    mlp, norm = normed_mlp("swiglu")
    x = torch.ones(shape, requires_grad=True)
    heads, angles = torch.ones(shape).view(*shape[:2], 2, 4).transpose(1, 2), torch.ones(1, 1, shape[1], 4)
    found = mlp_of_norm(mlp, norm, x), BmDropout(0.5)(x), rotate(heads, angles, angles)
    assert [one.numel() for one in found] == [0, 0, 0]
    sum(one.sum() for one in found).backward()
    assert x.grad.shape == shape


@pytest.mark.parametrize("update", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("stream", [torch.float32, torch.bfloat16])
def test_an_update_is_added_to_the_residual_stream_as_by_plain_addition(draw, stream, update):
    inputs = draw(3, 4).to(stream), draw(3, 4).to(update)
    found, expected = results(added, *inputs), results(torch.add, *inputs)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("probability", [0.1, 0.5, 0.999])
def test_dropout_drops_what_it_should_and_scales_the_rest_by_it(dtype, probability):
    torch.manual_seed(0)
    x = torch.ones(500, 1001, dtype=dtype, requires_grad=True)
    y = BmDropout(probability)(x)
    y.sum().backward()
    share = (y == 0).double().mean().item()
    assert abs(share - probability) < 5 * (probability * (1 - probability) / x.numel()) ** 0.5 + 2**-16
    kept = 1 - round(probability * 2**15) / 2**15  # the probability that can be drawn
    assert y.unique().tolist() == [0.0, torch.tensor(1 / kept, dtype=dtype).item()]
    assert torch.equal(x.grad, y.detach())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_dropped_does_not_depend_on_the_size_of_the_pieces(monkeypatch, dtype):
    x, found = torch.randn(7, 13, dtype=dtype).T, []
    for size in (8, 2**18):
        monkeypatch.setattr(dropout_bm, "numbers_at_once", lambda size=size: size)
        torch.manual_seed(0)
        found.append(BmDropout(0.5)(x))
    assert torch.equal(*found)
    assert 20 < (found[0] == 0).sum() < 71
    assert torch.equal(found[0][found[0] != 0], (2 * x)[found[0] != 0])


def test_dropout_is_a_function_of_the_generator_and_moves_it_on():
    dropout, x = BmDropout(0.5), torch.ones(64, 3)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first, second = dropout(x), dropout(x)
    torch.set_rng_state(state)
    with torch.no_grad():  # as in activation checkpointing, whose first pass records nothing
        again = dropout(x)
    assert torch.equal(first, again)
    assert not torch.equal(first, second)


def test_dropout_keeps_its_input_where_it_is_off():
    x = torch.ones(8, 3)
    assert BmDropout(0.5).eval()(x) is x
    assert BmDropout(0.0)(x) is x
    assert BmDropout(0.5)(x.double()).dtype == torch.float64  # torch's own


@pytest.mark.parametrize(
    "function",
    [
        lambda x: BmRMSNorm(8, eps=1e-5)(x),
        lambda x: mlp_of_norm(*normed_mlp("swiglu"), x),
        lambda x: token_loss(x[0], torch.arange(4), nn.Linear(8, 9)),
        lambda x: CPUAttention.apply(*3 * [x[None].bfloat16()], True, 0.25),
        lambda x: gated_product(x, x),
        lambda x: BmDropout(0.5)(x),
        lambda x: GatedScan.apply(x, None),
    ],
    ids=["norm", "MLP", "loss", "attention", "gated product", "dropout", "scan"],
)
def test_second_derivatives_are_an_error_and_not_left_out(function):
    x = torch.randn(2, 4, 8, requires_grad=True)
    total = function(x).sum()  # whose own gradient is a constant
    with pytest.raises(RuntimeError, match=r"create_graph=True: second derivatives .* by torch.func"):
        torch.autograd.grad(total, x, create_graph=True)
    total.backward()


def test_what_is_compiled_or_elsewhere_is_computed_by_plain_operations():
    assert is_eager_on_cpu(torch.ones(2), nn.Parameter(torch.ones(2)))
    assert not is_eager_on_cpu(torch.ones(2), torch.ones(2, device="meta"))
    seen = []
    torch.func.grad(lambda x: seen.append(is_eager_on_cpu(x)) or x.sum())(torch.ones(2))
    assert seen == [False]
    compiled = torch.compile(lambda x: x + 1 if is_eager_on_cpu(x) else x, backend="eager", fullgraph=True)
    assert torch.equal(compiled(torch.ones(2)), torch.ones(2))


def test_a_chunk_is_no_larger_than_the_cache_or_the_matrix():
    assert token_loss_bm.rows_at_once(2**13, 384) == 512
    assert token_loss_bm.rows_at_once(2**15, 768) == 768
    assert issubclass(ChunkedLoss, torch.autograd.Function)
