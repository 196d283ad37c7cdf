"""Products of matrices on a CPU: the same numbers by whichever library, and the one that the processor asks for."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from bmtk.models import products_bm
from bmtk.models.products_bm import add_product, float32_product, product, project

INTEL = {"cpu_name": "Intel Xeon", "avx512_f": True, "avx512_bf16": True}
PROCESSORS = {  # whether bfloat16 is cast before products, and whether torch's float32 products are slow
    "intel": (INTEL, True, False),
    "intel with amx": (INTEL | {"amx_bf16": True}, False, False),
    "amd": (INTEL | {"cpu_name": "AMD EPYC"}, True, True),
    "amd of old": ({"cpu_name": "AMD EPYC", "avx512_f": False, "avx512_bf16": False}, False, False),
    "arm": ({"architecture": "aarch64", "bf16": True}, False, False),
    "torch without the list": ({}, False, False),
}


@pytest.fixture(params=[False, True], ids=["torch", "onednn"])
def uses_onednn(monkeypatch, request) -> bool:
    monkeypatch.setattr(products_bm, "has_slow_float32", lambda: request.param)
    monkeypatch.setattr(products_bm, "LEAST_WORK", 0)
    return request.param


def calls_of_onednn(function, *args) -> int:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        function(*args)
    return sum(event.name == "mkldnn::_linear_pointwise" for event in profile.events())


@pytest.mark.parametrize(("found", "casts", "is_slow"), PROCESSORS.values(), ids=PROCESSORS)
def test_the_processor_decides_which_products_are_fast(monkeypatch, found, casts, is_slow):
    monkeypatch.setattr(products_bm, "capabilities", lambda: found)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    assert products_bm.casts_before_products.__wrapped__() is casts
    assert products_bm.has_slow_float32.__wrapped__() is is_slow
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert not products_bm.has_slow_float32.__wrapped__()


def test_what_this_processor_can_do_is_known():
    assert products_bm.capabilities()["architecture"]


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
    torch.testing.assert_close(
        add_product(total.clone(), a, b, 0.5).double(), total.double() + expected / 2, **tolerance
    )
    assert calls_of_onednn(product, a, b) == (uses_onednn and dtype == torch.float32)


@pytest.mark.parametrize("shape", [(6, 8), (2, 3, 8), (0, 8), (2, 0, 8)], ids=str)
@pytest.mark.parametrize("has_bias", [False, True])
def test_a_projection_has_the_value_and_gradients_of_its_layer(monkeypatch, uses_onednn, shape, has_bias):
    monkeypatch.setattr(products_bm, "LEAST_WORK", 1)  # no rows are no work
    torch.manual_seed(0)
    layer, x = nn.Linear(8, 5, bias=has_bias), torch.randn(shape, requires_grad=True)
    found = torch.autograd.grad(project(layer, x).sum(), [x, *layer.parameters()])  # a gradient of strides 0
    expected = torch.autograd.grad(layer(x).sum(), [x, *layer.parameters()])
    torch.testing.assert_close(project(layer, x), layer(x))
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(project(layer, x.detach().transpose(0, -2)), layer(x.detach().transpose(0, -2)))
    assert calls_of_onednn(project, layer, x) == (uses_onednn and x.numel() > 0)


def test_gradients_that_nobody_wants_are_not_computed(monkeypatch):
    monkeypatch.setattr(products_bm, "has_slow_float32", lambda: True)
    monkeypatch.setattr(products_bm, "LEAST_WORK", 0)
    layer, x = nn.Linear(8, 5).requires_grad_(False), torch.randn(3, 8, requires_grad=True)
    loss = project(layer, x).sum()
    assert calls_of_onednn(loss.backward) == 1
    assert layer.weight.grad is None
    assert x.grad is not None


def test_small_products_other_types_and_other_layers_are_left_to_torch(monkeypatch):
    monkeypatch.setattr(products_bm, "has_slow_float32", lambda: True)
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
    monkeypatch.setattr(products_bm, "has_slow_float32", lambda: True)
    monkeypatch.setattr(products_bm, "LEAST_WORK", 0)
    layer, x = nn.Linear(8, 5), torch.randn(3, 8)
    with FlopCounterMode(display=False) as counter:
        project(layer, x)
    assert counter.get_total_flops() == 2 * 3 * 8 * 5
