"""FLOPs of a token counted by hand, peaks of known and unknown devices, and a clock that leaves pauses out."""

import itertools

import pytest
import torch
from accelerate import Accelerator
from tiny_run import tiny_model
from transformers import AutoModelForMaskedLM, ResNetConfig, ResNetForImageClassification

from bmtk.models.configuration_bm_transformer import BmTransformerConfig
from bmtk.training import throughput
from bmtk.training.throughput import Meter, build_meter, flops_per_row, flops_per_token, peak_flops


@pytest.mark.parametrize("tied", [False, True])
def test_flops_per_token_count_matrices_head_and_attention(tied):
    matrices = 2 * (4 * 16 * 16 + 3 * 16 * 32) + 23 * 16  # two layers and the head, but no lookup table
    attention = 12 * 2 * 16 * 8  # 12 x layers x width x context
    assert flops_per_token(tiny_model(tied=tied), 8) == 6 * matrices + attention


@pytest.mark.parametrize("tied", [False, True])
def test_of_masked_tokens_alone_the_head_costs_something(tied):
    sizes = {"vocab_size": 30, "hidden_size": 16, "num_hidden_layers": 1, "tie_word_embeddings": tied}
    model = AutoModelForMaskedLM.from_config(BmTransformerConfig(is_causal=False, **sizes))
    ids, labels = torch.zeros(1, 8, dtype=torch.long), torch.full((1, 8), -100)
    labels[0, :2] = 5
    rows = [{"input_ids": ids, "labels": found} for found in (labels, ids)]
    meters = [build_meter(model, "tokens", row, Accelerator(cpu=True)) for row in rows]
    quarter, all_of_them = (meter.flops_per_unit for meter in meters)
    assert all_of_them == flops_per_token(model, 8)
    assert all_of_them - quarter == 6 * 0.75 * 30 * 16


def test_a_model_without_attention_has_no_attention_term():
    model = ResNetForImageClassification(ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1]))
    assert flops_per_token(model, 8) == flops_per_token(model, 80)


def test_the_peak_of_a_known_gpu_is_that_of_its_data_sheet(monkeypatch):
    names = {"NVIDIA H100 PCIe": 756e12, "NVIDIA H100 80GB HBM3": 989e12, "NVIDIA L40S": 362e12, "NVIDIA L4": 121e12}
    for name, peak in names.items():
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        assert peak_flops(torch.device("cuda"), torch.bfloat16) == peak


def test_the_peak_of_an_unknown_device_is_measured(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Acme 1")
    monkeypatch.setattr(throughput, "_measured_flops", lambda device, dtype: 123.0)
    assert peak_flops(torch.device("cuda"), torch.bfloat16) == 123.0
    assert peak_flops(torch.device("cuda"), torch.float32) == 123.0


def test_the_measured_peak_of_this_cpu_is_not_below_what_a_product_reaches():
    measured = throughput._measured_flops(torch.device("cpu"), torch.float32, seconds=0.05)
    assert 1e8 < measured < 1e15


def test_the_measured_peak_of_a_cpu_is_the_best_of_both_libraries(monkeypatch):
    rates = iter([2.0, 5.0])
    monkeypatch.setattr(throughput, "_flops_of", lambda *args: next(rates))
    assert throughput._measured_flops(torch.device("cpu"), torch.float32) == 5.0
    monkeypatch.setattr(throughput, "_flops_of", lambda *args: 3.0)
    assert throughput._measured_flops(torch.device("cuda"), torch.float32) == 3.0
    left, right = torch.randn(2, 4, 4)
    products = [
        multiply(left, right, torch.empty(4, 4))
        for multiply in throughput._products(torch.device("cpu"), torch.float32)
    ]
    torch.testing.assert_close(products, [left @ right, left @ right.T][: 1 + torch.backends.mkldnn.is_available()])


def test_the_measured_peak_counts_two_operations_for_each_product_of_numbers(monkeypatch):
    """By a clock that moves by a second when it is read, the smallest product takes one; larger ones are not tried."""
    clock = itertools.count()
    monkeypatch.setattr(throughput.time, "perf_counter", lambda: float(next(clock)))
    assert throughput._measured_flops(torch.device("cpu"), torch.float32) == 2 * 384**3


def test_the_meter_leaves_pauses_out(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(throughput.time, "perf_counter", lambda: now[0])
    meter = Meter(flops_per_unit=10.0, peak_flops=1000.0)
    meter.start(seconds=50.0)
    now[0] += 2.0
    with meter.paused():
        now[0] += 30.0
    now[0] += 2.0
    assert meter.seconds == pytest.approx(54.0)
    assert meter.lap(40) == pytest.approx({"tokens_per_second": 10.0, "mfu": 0.1})
    assert meter.lap(0)["tokens_per_second"] == 0
    assert meter.seconds == pytest.approx(54.0)


def test_a_peak_is_measured_when_the_first_mfu_needs_it_and_takes_no_training_time(monkeypatch):
    now, measured = [0.0], []

    def measure():
        measured.append(now[0])
        now[0] += 7.0
        return 1000.0

    monkeypatch.setattr(throughput.time, "perf_counter", lambda: now[0])
    meter = Meter(flops_per_unit=10.0, peak_flops=measure)
    now[0] += 1.0
    assert meter.lap(20, warms_up=True) == {"tokens_per_second": 20.0}
    assert measured == []
    now[0] += 2.0
    assert meter.lap(40) == {"tokens_per_second": 20.0, "mfu": 0.2}
    now[0] += 2.0
    assert meter.lap(40) == {"tokens_per_second": 20.0, "mfu": 0.2}
    assert (measured, meter.seconds) == ([3.0], 5.0)


def test_a_meter_that_knows_no_peak_tells_no_mfu():
    assert set(Meter().lap(1)) == {"tokens_per_second"}


def test_the_operations_of_an_image_are_counted_by_hand():
    config = ResNetConfig(
        embedding_size=8,
        hidden_sizes=[8],
        depths=[1],
        layer_type="basic",
        downsample_in_first_stage=False,
        num_labels=5,
    )
    model = ResNetForImageClassification(config).train()
    stem = 2 * 16 * 16 * 8 * 3 * 7 * 7  # 32 pixels a side, stride 2
    block = 2 * (2 * 8 * 8 * 8 * 8 * 3 * 3)  # after 3x3 pooling of stride 2
    row = {"pixel_values": torch.randn(1, 3, 32, 32), "labels": torch.tensor([1])}
    assert flops_per_row(model, row) == 3 * (stem + block + 2 * 8 * 5)
    assert model.training
    assert set(Meter(unit="images").of_run(10, 2.0)) == {"images_per_second", "flops_per_image", "peak_flops"}
