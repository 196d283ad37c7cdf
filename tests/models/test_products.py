"""Products of matrices on a CPU: the same numbers by whichever library, and the one that the processor asks for."""

import warnings
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.parametrize import register_parametrization
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

import bmtk  # noqa: F401 - registers the families
from bmtk.models import products_bm, token_loss_bm
from bmtk.models.configuration_bm_rnn import BmRnnConfig
from bmtk.models.configuration_bm_transformer import BmTransformerConfig
from bmtk.models.products_bm import (
    add_product,
    float32_product,
    float32_products_of_bfloat16,
    product,
    project,
)
from bmtk.models.token_loss_bm import token_loss

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="needs a torch with oneDNN")

INTEL = {"cpu_name": "Intel Xeon", "avx512_f": True, "avx512_bf16": True}
PROCESSORS = {  # whether bfloat16 is cast before products, and whether torch's float32 products are slow
    "intel": (INTEL, True, False),
    "intel with amx": (INTEL | {"amx_bf16": True}, False, False),
    "amd": (INTEL | {"cpu_name": "AMD EPYC"}, True, True),
    "amd of old": ({"cpu_name": "AMD EPYC", "avx512_f": False, "avx512_bf16": False}, False, False),
    "arm": ({"architecture": "aarch64", "bf16": True}, False, False),
}


@pytest.fixture(params=[False, True], ids=["torch", "onednn"])
def uses_onednn(monkeypatch, request) -> bool:
    monkeypatch.setattr(products_bm, "has_slow_mkl", lambda: request.param)
    monkeypatch.setattr(products_bm, "LEAST_WORK", 0)
    return request.param


def calls_of_onednn(function, *args) -> int:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        function(*args)
    return sum(event.name == "mkldnn::_linear_pointwise" for event in profile.events())


@pytest.mark.parametrize(("found", "casts", "is_slow"), PROCESSORS.values(), ids=PROCESSORS)
def test_the_processor_decides_which_products_are_fast(monkeypatch, found, casts, is_slow):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: found)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    assert products_bm.casts_before_products.__wrapped__() is casts
    assert products_bm.has_slow_mkl.__wrapped__() is is_slow
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert not products_bm.has_slow_mkl.__wrapped__()


def test_torch_knows_the_name_of_a_processor_that_may_have_avx512():
    found = torch.cpu.get_capabilities()
    assert found["architecture"] != "x86_64" or found["cpu_name"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_are_added(uses_onednn, dtype):
    torch.manual_seed(0)
    a, b, total = torch.randn(5, 7).to(dtype), torch.randn(3, 7).to(dtype).T, torch.randn(5, 3)
    expected = a.double() @ b.double()
    tolerance = {"rtol": 1e-2, "atol": 2e-2} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(product(a, b).double(), expected, **tolerance)
    found = float32_product(a, b, torch.empty(5, 3))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, **tolerance)
    added = total.clone()
    add_product(added, a, b, 0.5)
    torch.testing.assert_close(added.double(), total.double() + expected / 2, **tolerance)
    assert calls_of_onednn(product, a, b) == (uses_onednn and dtype == torch.float32)


@pytest.mark.parametrize("shape", [(6, 8), (2, 3, 8), (0, 8), (2, 0, 8)], ids=str)
@pytest.mark.parametrize("has_bias", [False, True])
def test_a_projection_has_the_value_and_gradients_of_its_layer(monkeypatch, uses_onednn, shape, has_bias):
    monkeypatch.setattr(products_bm, "LEAST_WORK", 1)  # no rows are no work
    torch.manual_seed(0)
    layer, x = nn.Linear(8, 5, bias=has_bias), torch.randn(shape, requires_grad=True)
    output, expected, inputs = project(layer, x), layer(x), [x, *layer.parameters()]
    torch.testing.assert_close(output, expected)
    weights = torch.randn(output.shape)
    for whole in (lambda y: (y * weights).sum(), torch.Tensor.sum):  # the second has a gradient of strides 0
        found = torch.autograd.grad(whole(output), inputs, retain_graph=True)
        torch.testing.assert_close(found, torch.autograd.grad(whole(expected), inputs, retain_graph=True))
    strided = torch.randn(*shape[:-1], 2 * shape[-1])[..., ::2]
    torch.testing.assert_close(project(layer, strided), layer(strided))
    torch.testing.assert_close(project(layer, x).add_(1), expected + 1)
    assert calls_of_onednn(project, layer, x) == (uses_onednn and x.numel() > 0)


def test_gradients_that_nobody_wants_are_not_computed(monkeypatch):
    monkeypatch.setattr(products_bm, "has_slow_mkl", lambda: True)
    monkeypatch.setattr(products_bm, "LEAST_WORK", 0)
    layer, x = nn.Linear(8, 5).requires_grad_(False), torch.randn(3, 8, requires_grad=True)
    loss = project(layer, x).sum()
    assert calls_of_onednn(loss.backward) == 1
    assert layer.weight.grad is None
    assert x.grad is not None


def test_a_projection_has_second_derivatives(monkeypatch):
    monkeypatch.setattr(products_bm, "has_slow_mkl", lambda: True)
    monkeypatch.setattr(products_bm, "LEAST_WORK", 1)
    layer, x, found = nn.Linear(8, 5), torch.randn(3, 8, requires_grad=True), []
    for function in (layer, lambda x: project(layer, x)):
        (slope,) = torch.autograd.grad(function(x).square().sum(), x, create_graph=True)
        found.append(torch.autograd.grad(slope.square().sum(), [x, layer.weight]))
    torch.testing.assert_close(*found)


def test_what_a_frozen_layer_does_not_need_is_not_kept(monkeypatch):
    monkeypatch.setattr(products_bm, "has_slow_mkl", lambda: True)
    monkeypatch.setattr(products_bm, "LEAST_WORK", 1)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.shape), lambda tensor: tensor):
        project(nn.Linear(8, 5).requires_grad_(False), torch.randn(3, 8, requires_grad=True))
    assert kept == [(5, 8)]


def test_a_parametrization_is_computed_once(monkeypatch):
    monkeypatch.setattr(products_bm, "has_slow_mkl", lambda: True)
    monkeypatch.setattr(products_bm, "LEAST_WORK", 1)
    calls = []

    class Doubled(nn.Module):
        def forward(self, weight):
            calls.append(weight)
            return weight * 2

    layer, x = nn.Linear(8, 5), torch.randn(3, 8)
    register_parametrization(layer, "weight", Doubled())
    calls.clear()
    found = project(layer, x)
    assert len(calls) == 1
    torch.testing.assert_close(found, layer(x))


def test_threads_that_lower_the_precision_at_once_restore_it():
    setting = torch.backends.mkldnn.matmul
    before, one, other = setting.fp32_precision, float32_products_of_bfloat16(), float32_products_of_bfloat16()
    with one:
        other.__enter__()
        assert setting.fp32_precision == "bf16"
    assert setting.fp32_precision == "bf16"
    other.__exit__(None, None, None)
    assert setting.fp32_precision == before


def test_shapes_of_one_step_get_no_code_of_their_own(uses_onednn):
    a, b, total = torch.randn(5, 7), torch.randn(7, 3), torch.zeros(5, 3)
    for function in (product, lambda a, b, **rare: float32_product(a, b, torch.empty(5, 3), **rare)):
        assert calls_of_onednn(partial(function, is_rare=True), a, b) == 0
        torch.testing.assert_close(function(a, b, is_rare=True), a @ b)
    assert calls_of_onednn(partial(add_product, is_rare=True), total, a, b) == 0


def test_onednn_can_be_switched_off(uses_onednn):
    a, b = torch.randn(5, 7), torch.randn(7, 3)
    with warnings.catch_warnings(action="ignore"), torch.backends.mkldnn.flags(enabled=False):  # of Intel's GPUs
        assert calls_of_onednn(product, a, b) == 0


MODELS = {
    "attention, norm and MLP": BmTransformerConfig(hidden_size=16, num_attention_heads=2, intermediate_size=24),
    "attention and MLP": BmTransformerConfig(
        hidden_size=16, num_attention_heads=2, intermediate_size=24, norm_type="layer_norm", hidden_act="gelu"
    ),
    "minGRU": BmRnnConfig(hidden_size=16, cell_type="mingru"),
}


@pytest.mark.parametrize("config", MODELS.values(), ids=MODELS)
def test_a_step_multiplies_by_onednn_with_the_same_loss_and_gradients(monkeypatch, config):
    monkeypatch.setattr(products_bm, "LEAST_WORK", 1)
    config.update({"vocab_size": 29, "num_hidden_layers": 1})
    torch.manual_seed(0)
    model, ids = AutoModelForCausalLM.from_config(config).train(), torch.randint(29, (3, 40))
    gradients, calls = [], []
    for is_slow in (False, True):
        monkeypatch.setattr(products_bm, "has_slow_mkl", lambda is_slow=is_slow: is_slow)
        model.zero_grad()
        calls.append(calls_of_onednn(lambda: model(ids, labels=ids, skip_logits=True).loss.backward()))
        gradients.append([p.grad.clone() for p in model.parameters()])
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)
    linear = sum(isinstance(module, nn.Linear) for module in model.modules())
    assert calls == [
        0,
        3 * (linear - 1),
    ]  # all but the loss, whose 117 of 120 positions are another number in each step


def test_the_loss_multiplies_by_onednn_where_all_positions_are_scored(monkeypatch):
    monkeypatch.setattr(products_bm, "LEAST_WORK", 1)
    monkeypatch.setattr(token_loss_bm, "CHUNK", 64)
    layer, hidden, labels = nn.Linear(8, 29), torch.randn(20, 8, requires_grad=True), torch.randint(29, (20,))
    found = []
    for is_slow in (False, True):
        monkeypatch.setattr(products_bm, "has_slow_mkl", lambda is_slow=is_slow: is_slow)
        loss = token_loss(hidden, labels, layer)
        found.append((loss, *torch.autograd.grad(loss, [hidden, *layer.parameters()])))
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6)
    assert calls_of_onednn(token_loss, hidden, labels, layer) == 9  # chunks of 8, 8 and 4 rows
    labels[:2] = -100
    assert calls_of_onednn(token_loss, hidden, labels, layer) == 6  # of 8, 8 and 2


def test_small_products_other_types_and_other_layers_are_left_to_torch(monkeypatch):
    monkeypatch.setattr(products_bm, "has_slow_mkl", lambda: True)
    layer, x = nn.Linear(8, 5), torch.randn(3, 8)
    assert calls_of_onednn(project, layer, x) == 0  # 240 operations
    monkeypatch.setattr(products_bm, "LEAST_WORK", 2 * 3 * 8 * 5)
    assert calls_of_onednn(project, layer, x) == 1
    assert calls_of_onednn(project, layer.double(), x.double()) == 0
    layer.float().register_forward_hook(lambda module, args, output: output + 1)
    torch.testing.assert_close(project(layer, x), F.linear(x, layer.weight, layer.bias) + 1)
    with torch.autocast("cpu", torch.bfloat16):
        assert project(nn.Linear(8, 5), x).dtype == torch.bfloat16
    assert project(nn.Identity(), x) is x


def test_operations_are_counted_as_torch_counts_them(monkeypatch):
    monkeypatch.setattr(products_bm, "has_slow_mkl", lambda: True)
    monkeypatch.setattr(products_bm, "LEAST_WORK", 0)
    layer, x = nn.Linear(8, 5), torch.randn(3, 8)
    with FlopCounterMode(display=False) as counter:
        project(layer, x)
    assert counter.get_total_flops() == 2 * 3 * 8 * 5
