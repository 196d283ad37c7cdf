"""What every head of bm_cnn must do: start well, train in any precision, adapt, split its loss, travel alone."""

import copy
import dataclasses
import math
import subprocess
import sys

import numpy as np
import PIL.Image
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForMaskedImageModeling,
    AutoModelForObjectDetection,
    AutoModelForSequenceClassification,
    AutoModelForTimeSeriesPrediction,
    PreTrainedConfig,
)

import bmtk  # noqa: F401  (registers the families)
from bmtk.models.configuration_bm_cnn import BmCnnConfig
from bmtk.models.convolutions_bm import Convolution
from bmtk.models.image_processing_bm import BmImageProcessor

NUMBERS = torch.Generator().manual_seed(0)
PIXELS = torch.randn(4, 3, 32, 32, generator=NUMBERS)
IDS = torch.randint(1, 30, (4, 12), generator=NUMBERS)
IMAGE = {"hidden_sizes": [8, 16], "depths": [1, 2], "num_labels": 4}
TOKENS = {"input_type": "tokens", "vocab_size": 30, "hidden_size": 12, "num_hidden_layers": 2, "num_labels": 4}
DETECTION = {**IMAGE, "fpn_size": 16, "num_detection_layers": 1, "num_feature_levels": 3, "num_labels": 2}
BOXES = [
    {"class_labels": torch.tensor([row % 2]), "boxes": torch.tensor([[0.3 + 0.1 * row, 0.5, 0.4, 0.3 + 0.1 * row]])}
    for row in range(4)
]
MASKED = torch.arange(16)[None].add(torch.arange(4)[:, None]) % 3 == 0

CASES = {
    "classify-plain": (AutoModelForImageClassification, {**IMAGE, "block_type": "plain",
                                                         "classifier_hidden_sizes": [12]}),
    "classify-basic": (AutoModelForImageClassification, {**IMAGE, "stem_type": "conv", "stem_width": 8}),
    "classify-bottleneck": (AutoModelForImageClassification, {**IMAGE, "block_type": "bottleneck"}),
    "classify-convnext": (AutoModelForImageClassification, {**IMAGE, "block_type": "convnext", "stem_type": "patch",
                                                            "layer_scale_init_value": 0.5}),
    "masked-image": (AutoModelForMaskedImageModeling, {**IMAGE, "norm_type": "layer_norm", "stem_type": "patch"}),
    "detect": (AutoModelForObjectDetection, {**DETECTION, "norm_type": "layer_norm"}),
    "causal-residual": (AutoModelForCausalLM, TOKENS),
    "causal-gated": (AutoModelForCausalLM, {**TOKENS, "block_type": "gated"}),
    "sequence": (AutoModelForSequenceClassification, {**TOKENS, "block_type": "multi_width"}),
}  # fmt: skip
BATCHES = {
    AutoModelForImageClassification: {"pixel_values": PIXELS, "labels": torch.arange(4)},
    AutoModelForMaskedImageModeling: {"pixel_values": PIXELS, "bool_masked_pos": MASKED},
    AutoModelForObjectDetection: {"pixel_values": PIXELS, "labels": BOXES},
    AutoModelForCausalLM: {"input_ids": IDS, "labels": IDS},
    AutoModelForSequenceClassification: {"input_ids": IDS, "labels": torch.arange(4)},
    AutoModelForTimeSeriesPrediction: {
        "past_values": torch.randn(4, 16, 1, generator=NUMBERS), "future_values": torch.ones(4, 5, 1)
    },
}  # fmt: skip


@pytest.fixture(params=CASES)
def case(request):
    auto, fields = CASES[request.param]
    return auto.from_config(BmCnnConfig(**fields)), dict(BATCHES[auto])


def rows(batch: dict, part: slice) -> dict:
    return {name: value[part] for name, value in batch.items()}


def count(model: nn.Module, batch: dict) -> float:
    """Items of a batch, as the loss of its head counts them."""
    if hasattr(model, "count_items"):
        return model.count_items(**batch).item()
    if "bool_masked_pos" in batch:
        return batch["bool_masked_pos"].sum().item()
    return batch["labels"][..., 1:].numel() if batch["labels"].ndim == 2 else len(batch["labels"])


def test_any_split_of_a_batch_gives_the_same_gradient(case):
    model, batch = case
    for module in model.modules():  # whose statistics are of a batch, by their definition
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    gradients = []
    for parts in ([slice(0, 4)], [slice(0, 1), slice(1, 4)]):
        model.zero_grad()
        num_items = sum(count(model, rows(batch, part)) for part in parts)
        for part in parts:
            model(**rows(batch, part), num_items_in_batch=num_items).loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    assert (gradients[0] - gradients[1]).abs().max() <= 1e-5 * gradients[0].abs().max()
    whole, counted = model(**batch).loss, model(**batch, num_items_in_batch=count(model, batch)).loss
    assert torch.allclose(whole, counted)


def test_one_batch_is_learnt(case):
    model, batch = case
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    losses = []
    for _ in range(80):
        optimizer.zero_grad()
        losses.append(model(**batch).loss)
        losses[-1].backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    assert losses[-1] < (0.5 if "bool_masked_pos" in batch else 0.3) * losses[0]


def test_bfloat16_trains(case):
    model, batch = case
    model = model.bfloat16()
    loss = model(**batch).loss
    loss.backward()
    assert loss.isfinite()
    assert all(
        p.grad is None or (p.grad.dtype == torch.bfloat16 and p.grad.isfinite().all()) for p in model.parameters()
    )
    with torch.autocast("cpu", torch.bfloat16):
        assert model.float()(**batch).loss.isfinite()


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_changes_nothing(case, use_reentrant):
    """Also not the running statistics of batch norms, which a recomputation could move twice."""
    model, batch = case
    other = copy.deepcopy(model)
    other.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    if use_reentrant:
        for parameter in batch.values():
            if torch.is_tensor(parameter) and parameter.is_floating_point():
                parameter.requires_grad_()
    losses = []
    for one in (model, other):
        torch.manual_seed(0)
        losses.append(one.train()(**batch).loss)
        losses[-1].backward()
    assert any(getattr(module, "gradient_checkpointing", False) for module in other.modules())
    assert torch.allclose(losses[0], losses[1], atol=1e-6)
    for (name, one), two in zip(model.named_parameters(), other.parameters(), strict=True):
        assert (one.grad is None) == (two.grad is None), name
        assert one.grad is None or torch.allclose(one.grad, two.grad, atol=1e-5), name
    for (name, one), two in zip(model.named_buffers(), other.buffers(), strict=True):
        assert torch.allclose(one, two), name
    if use_reentrant:
        batch[next(iter(batch))].requires_grad_(False)


def test_tracing_for_compilation_changes_no_output(case):
    model, batch = case
    model.eval()
    given = {name: value for name, value in batch.items() if name != "labels"}
    with torch.no_grad():
        expected = model(**given)
        torch.compiler.reset()
        compiled = torch.compile(model, backend="eager")(**given)
    for name, value in expected.items():
        if name in ("logits", "reconstruction", "pred_boxes"):
            assert torch.allclose(compiled[name], value, atol=1e-5), name


def test_what_a_checkpoint_lacks_starts_as_in_a_new_model(case, tmp_path):
    """from_pretrained builds on the meta device: what `_init_weights` does not reach would be raw memory."""
    model, _ = case
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.fill_(7)
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    kept = next(iter(weights))
    save_file({kept: weights[kept]}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded = type(model).from_pretrained(tmp_path)
    torch.manual_seed(0)
    fresh = type(model)(model.config)
    assert set(loaded.state_dict()) == set(fresh.state_dict())
    for name, tensor in fresh.state_dict().items():
        other = loaded.state_dict()[name]
        if name == kept:
            assert (other == 7).all()
        elif tensor.is_floating_point() and tensor.numel() >= 16 and tensor.std() > 0:
            assert 0.5 < other.std() / tensor.std() < 2, name
        elif tensor.numel() < 16 and tensor.is_floating_point() and tensor.std() > 0:
            assert other.abs().max() < 5 * tensor.abs().max().clamp(min=0.05), name
        else:
            assert torch.equal(other, tensor), name


def test_convolutions_start_as_kaiming_has_them():
    model = AutoModelForImageClassification.from_config(
        BmCnnConfig(block_type="plain", hidden_sizes=[64, 64], depths=[1, 1], classifier_hidden_sizes=[256])
    )
    conv = model.model.stages[1].blocks[0].conv[0].weight
    assert conv.std().item() == pytest.approx(math.sqrt(2 / (64 * 9)), rel=0.05)
    assert model.classifier[1].weight.std().item() == pytest.approx(math.sqrt(2 / 64), rel=0.05)
    assert model.classifier[-1].weight.std().item() == pytest.approx(0.02, rel=0.2)
    layers = AutoModelForCausalLM.from_config(BmCnnConfig(input_type="tokens", num_hidden_layers=4)).model.layers
    assert layers[0].first.taps.weight.std().item() == pytest.approx(math.sqrt(2 / (3 * 256)), rel=0.05)
    assert layers[0].second.taps.weight.std().item() == pytest.approx(math.sqrt(2 / (3 * 256)) / 2, rel=0.05)
    depthwise = AutoModelForImageClassification.from_config(
        BmCnnConfig(block_type="convnext", hidden_sizes=[64], depths=[1])
    ).model.stages[0].blocks[0]  # fmt: skip
    assert depthwise.depthwise.weight.std().item() == pytest.approx(math.sqrt(2 / 49), rel=0.05)
    assert (depthwise.layer_scale == torch.tensor(1e-6)).all()


LORA = {
    "classify-basic": None,  # every two-dimensional convolution
    "classify-convnext": r".*(downsample\.1|up|down)",
    "detect": None,
    "causal-residual": "all-linear",
    "causal-gated": "all-linear",
}


@pytest.mark.parametrize("name", LORA)
def test_lora_trains_saves_and_merges(name, tmp_path):
    auto, fields = CASES[name]
    base, batch = auto.from_config(BmCnnConfig(**fields)).eval(), BATCHES[auto]
    target = LORA[name]
    if target is None:
        target = [name for name, module in base.named_modules() if isinstance(module, nn.Conv2d)]
    model = get_peft_model(copy.deepcopy(base), LoraConfig(r=2, target_modules=target))
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    assert trained
    if not name.startswith("causal"):
        kinds = {type(m.base_layer) for m in model.modules() if hasattr(m, "base_layer")}
        assert nn.Conv2d in kinds
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    losses = []
    for _ in range(10):  # in eval mode: batch norms of a frozen base must not move
        optimizer.zero_grad()
        losses.append(model(**batch).loss)
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    given = {key: value for key, value in batch.items() if key != "labels"}
    with torch.no_grad():
        adapted = model(**given).logits
        assert (adapted - base(**given).logits).abs().max() > 1e-3
        with model.disable_adapter():
            assert torch.allclose(model(**given).logits, base(**given).logits, atol=1e-6)
        model.save_pretrained(tmp_path)
        again = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
        assert torch.allclose(again(**given).logits, adapted, atol=1e-5)
        assert torch.allclose(model.merge_and_unload()(**given).logits, adapted, atol=1e-5)


IMAGE_CASE, TOKEN_CASE, DETECT_CASE = CASES["classify-basic"], CASES["causal-residual"], CASES["detect"]
PLAIN_CASE, CONVNEXT_CASE, GATED_CASE = CASES["classify-plain"], CASES["classify-convnext"], CASES["causal-gated"]
SERIES_CASE = (
    AutoModelForTimeSeriesPrediction,
    {
        "input_type": "series", "hidden_size": 12, "num_hidden_layers": 1, "context_length": 16,
        "prediction_length": 5, "series_loss": "mae",
    },
)  # fmt: skip

# Each field: the head it turns, and another value for it.
FIELDS = {
    "block_type": (IMAGE_CASE, {"block_type": "bottleneck"}),
    "hidden_act": (IMAGE_CASE, {"hidden_act": "silu"}),
    "norm_type": (IMAGE_CASE, {"norm_type": "layer_norm"}),
    "norm_eps": (IMAGE_CASE, {"norm_eps": 0.5}),
    "hidden_size": (TOKEN_CASE, {"hidden_size": 18}),
    "num_hidden_layers": (TOKEN_CASE, {"num_hidden_layers": 3}),
    "stem_type": (IMAGE_CASE, {"stem_type": "patch"}),
    "stem_width": (IMAGE_CASE, {"stem_width": 4}),
    "stem_kernel_size": (IMAGE_CASE, {"stem_kernel_size": 5}),
    "stem_stride": (IMAGE_CASE, {"stem_stride": 1}),
    "stem_pooling": (IMAGE_CASE, {"stem_pooling": False}),
    "patch_size": (CONVNEXT_CASE, {"patch_size": 2}),
    "hidden_sizes": (IMAGE_CASE, {"hidden_sizes": [8, 24]}),
    "depths": (IMAGE_CASE, {"depths": [2, 2]}),
    "kernel_sizes": (IMAGE_CASE, {"kernel_sizes": 5}),
    "paddings": (PLAIN_CASE, {"paddings": 0}),
    "strides": (IMAGE_CASE, {"strides": [1, 1]}),
    "pool_sizes": (PLAIN_CASE, {"pool_sizes": [3, 2]}),
    "pool_stride": (PLAIN_CASE, {"pool_stride": 1}),
    "pooling_type": (PLAIN_CASE, {"pooling_type": "avg"}),
    "expansion": (CONVNEXT_CASE, {"expansion": 2}),
    "layer_scale_init_value": (CONVNEXT_CASE, {"layer_scale_init_value": 0.1}),
    "drop_path_rate": (IMAGE_CASE, {"drop_path_rate": 0.9}),
    "pooled_grid": (IMAGE_CASE, {"pooled_grid": 2}),
    "classifier_hidden_sizes": (IMAGE_CASE, {"classifier_hidden_sizes": [5]}),
    "fpn_size": (DETECT_CASE, {"fpn_size": 8}),
    "num_feature_levels": (DETECT_CASE, {"num_feature_levels": 2}),
    "num_detection_layers": (DETECT_CASE, {"num_detection_layers": 2}),
    "center_sampling_radius": (DETECT_CASE, {"center_sampling_radius": 0}),
    "box_loss": (DETECT_CASE, {"box_loss": "iou"}),
    "focal_alpha": (DETECT_CASE, {"focal_alpha": 0.9}),
    "focal_gamma": (DETECT_CASE, {"focal_gamma": 0}),
    "vocab_size": (TOKEN_CASE, {"vocab_size": 40}),
    "kernel_size": (TOKEN_CASE, {"kernel_size": 2}),
    "dilation_cycle": (TOKEN_CASE, {"dilation_cycle": 1}),
    "filter_widths": (CASES["sequence"], {"filter_widths": [2, 3]}),
    "is_causal": (CASES["sequence"], {"is_causal": True, "classifier_pooling": "max"}),
    "position_embedding_type": (TOKEN_CASE, {"position_embedding_type": "sinusoidal"}),
    "embedding_dropout": (TOKEN_CASE, {"embedding_dropout": 0.5}),
    "hidden_dropout": (GATED_CASE, {"hidden_dropout": 0.5}),
    "tie_word_embeddings": (TOKEN_CASE, {"tie_word_embeddings": False}),
    "context_length": (SERIES_CASE, {"context_length": 16, "patch_size": 8}),
    "num_time_features": None,  # inputs of other shapes: see below
    "num_input_channels": None,
    "num_mel_bins": None,
    "num_channels": None,
    "image_size": None,
    "max_position_embeddings": None,
    "input_type": None,
    "prediction_length": None,
    "use_cache": None,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
    "initializer_range": (IMAGE_CASE, {"initializer_range": 0.5}),
    "series_loss": (SERIES_CASE, {"series_loss": "mse"}),
    "quantiles": (
        (SERIES_CASE[0], {**SERIES_CASE[1], "series_loss": "quantile"}), {"quantiles": [0.2, 0.5]}
    ),
    "classifier_dropout": (IMAGE_CASE, {"classifier_dropout": 0.5}),
    "classifier_pooling": (CASES["sequence"], {"classifier_pooling": "mean"}),
}  # fmt: skip


def test_every_field_is_turned_by_a_test():
    own = {field.name for field in dataclasses.fields(BmCnnConfig)} - {
        field.name for field in dataclasses.fields(PreTrainedConfig)
    }
    assert own == set(FIELDS)


def fingerprint(auto, fields: dict) -> tuple:
    """Losses in training and in evaluation, and how many parameters make them."""
    torch.manual_seed(0)
    model, batch = auto.from_config(BmCnnConfig(**fields)), BATCHES[auto]
    losses = []
    for mode in (True, False):
        torch.manual_seed(1)
        losses.append(model.train(mode)(**batch).loss.item())
    return sum(p.numel() for p in model.parameters()), *losses


@pytest.mark.parametrize("field", [name for name, turned in FIELDS.items() if turned])
def test_a_field_changes_what_a_model_computes(field):
    (auto, fields), change = FIELDS[field]
    assert fingerprint(auto, fields) == fingerprint(auto, dict(fields))
    assert fingerprint(auto, fields) != fingerprint(auto, {**fields, **change})


def test_fields_of_inputs_shape_the_model():
    def first(**fields):
        return next(AutoModelForImageClassification.from_config(BmCnnConfig(**IMAGE, **fields)).parameters()).shape

    assert (first()[1], first(num_channels=1)[1]) == (3, 1)
    assert BmImageProcessor.for_config(BmCnnConfig(image_size=40)).size["height"] == 40
    positions = {"position_embedding_type": "learned", "max_position_embeddings": 9}
    trunk = AutoModelForCausalLM.from_config(BmCnnConfig(**TOKENS, **positions)).model
    assert trunk.stem.embed_positions.num_embeddings == 9
    assert (trunk.main_input_name, trunk.config.is_causal) == ("input_ids", True)
    auto, fields = SERIES_CASE
    fields = {**fields, "prediction_length": 3, "num_input_channels": 2, "num_time_features": 1, "patch_size": 2}
    series = auto.from_config(BmCnnConfig(**fields))
    assert series.model.stem.embed_patches.in_features == 2 * (2 * 2 + 1)
    given = {"past_values": torch.randn(1, 16, 2), "past_time_features": torch.randn(1, 16, 1)}
    assert series(**given, future_time_features=torch.randn(1, 3, 1)).prediction.shape == (1, 3, 2)
    audio = BmCnnConfig(**{**TOKENS, "input_type": "audio", "num_mel_bins": 7})
    assert AutoModelForSequenceClassification.from_config(audio).model.stem.num_mel_bins == 7
    assert not audio.is_causal


def test_special_tokens_and_use_cache_reach_generation():
    model = AutoModelForCausalLM.from_config(BmCnnConfig(**TOKENS, use_cache=False)).eval()
    assert model(IDS).past_key_values is None
    fields = {"bos_token_id": 3, "eos_token_id": list(range(1, 30)), "pad_token_id": 0}
    model = AutoModelForCausalLM.from_config(BmCnnConfig(**TOKENS, **fields)).eval()
    assert model(IDS).past_key_values is not None
    with torch.no_grad():
        model.lm_head.weight[0].fill_(0)
    tokens = model.generate(max_new_tokens=5, do_sample=False)
    assert tokens[0, 0] == 3
    model.generation_config.eos_token_id = [int(model.generate(IDS[:1], max_new_tokens=1, do_sample=False)[0, -1])]
    tokens = model.generate(IDS[:2], max_new_tokens=6, do_sample=False)
    assert tokens[0, 12] == model.generation_config.eos_token_id[0]
    assert (tokens[0, 13:] == 0).all()


CHILD = """
import sys


class NoBmtk:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "bmtk":
            raise ImportError("bmtk is not installed here")


sys.meta_path.insert(0, NoBmtk())
import torch
from transformers import AutoBackbone, AutoConfig, AutoImageProcessor, AutoModel, AutoModelForCausalLM
from transformers import AutoModelForImageClassification, AutoModelForObjectDetection, pipeline

folder, trust = sys.argv[1], {"trust_remote_code": True}
pixels = torch.load(f"{folder}/pixels.pt")
for auto, name in ((AutoModelForImageClassification, "classify"), (AutoModelForObjectDetection, "detect")):
    model = auto.from_pretrained(f"{folder}/{name}", **trust)
    assert model.__module__.startswith("transformers_modules.")
    assert torch.equal(model(pixels).logits, torch.load(f"{folder}/{name}.pt")), name
assert AutoModel.from_pretrained(f"{folder}/classify", **trust)(pixels).pooler_output.shape == (4, 16)
config = AutoConfig.from_pretrained(f"{folder}/classify", **trust)
assert len(AutoBackbone.from_config(config, **trust)(pixels).feature_maps) == 1
model = AutoModelForCausalLM.from_pretrained(f"{folder}/write", **trust)
tokens = model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=9, do_sample=False)
assert torch.equal(tokens, torch.load(f"{folder}/write.pt"))
for task, name in (("image-classification", "classify"), ("object-detection", "detect")):
    assert pipeline(task, model=f"{folder}/{name}", **trust)(f"{folder}/picture.png") is not None
assert not any(name.split(".")[0] == "bmtk" for name in sys.modules)
print("loaded without bmtk")
"""


@torch.no_grad()
def test_saved_models_load_and_compute_the_same_where_bmtk_is_not_installed(tmp_path):
    torch.save(PIXELS, tmp_path / "pixels.pt")
    PIL.Image.fromarray(np.zeros((20, 30, 3), dtype=np.uint8)).save(tmp_path / "picture.png")
    for name, case in (("classify", IMAGE_CASE), ("detect", DETECT_CASE)):
        model = case[0].from_config(BmCnnConfig(**case[1], image_size=32)).eval()
        model.save_pretrained(tmp_path / name)
        BmImageProcessor.for_config(model.config).save_pretrained(tmp_path / name)
        torch.save(model(PIXELS).logits, tmp_path / f"{name}.pt")
    model = TOKEN_CASE[0].from_config(BmCnnConfig(**TOKEN_CASE[1])).eval()
    model.save_pretrained(tmp_path / "write")
    tokens = model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=9, do_sample=False)
    torch.save(tokens, tmp_path / "write.pt")
    command = [sys.executable, "-c", CHILD, str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=300)
    assert "loaded without bmtk" in result.stdout, result.stderr[-3000:]


def test_a_convolution_is_a_module_of_its_own_for_adapters():
    """The taps are a linear layer, so that LoRA and quantisation see them."""
    assert isinstance(Convolution(2, 3, kernel_size=2, dilation=1, is_causal=True).taps, nn.Linear)
