"""bm_cnn on images against independent oracles: ResNet and ConvNext of transformers, and plain stacks of torch.nn.

Weights are copied over, everything is float32 and in eval mode, and differences stay within TOLERANCE.
"""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import (
    AutoModelForImageClassification,
    AutoModelForMaskedImageModeling,
    BertConfig,
    BertModel,
    ConvNextConfig,
    ResNetBackbone,
    ResNetConfig,
    UperNetConfig,
    UperNetForSemanticSegmentation,
    VisionTextDualEncoderModel,
)

from bmtk.hub.convert import converted, translate
from bmtk.hub.convert_sources import SOURCES
from bmtk.models.configuration_bm_cnn import BmCnnConfig
from bmtk.models.modeling_bm_cnn import BmCnnBackbone, BmCnnModel

TOLERANCE = 1e-5
SIZES = {"hidden_sizes": [16, 32, 64], "depths": [2, 1, 2], "num_labels": 5}
TINY = {"hidden_sizes": [8, 16], "depths": [1, 2], "num_labels": 5}


def shake(model: nn.Module) -> nn.Module:
    """Move biases, norms and running statistics away from the 0 and 1 they start at, so that an oracle sees them."""
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith("running_var"):
                tensor.copy_(torch.rand_like(tensor) + 0.5)
            elif name.endswith("layer_scale_parameter"):
                tensor.copy_(torch.rand_like(tensor) + 0.2)
            elif tensor.is_floating_point() and tensor.ndim == 1:
                tensor.add_(torch.randn_like(tensor) * 0.2)
            elif "convnext" in name and tensor.ndim == 4:
                tensor.mul_(5)
    return model.eval()


def check(record, ours: torch.Tensor, oracle: torch.Tensor) -> None:
    difference = (ours - oracle).abs().max().item()
    record("largest_oracle_difference", difference)
    assert ours.shape == oracle.shape
    assert oracle.std() > 0.05, "the oracle's outputs are too small to say anything"
    assert difference <= TOLERANCE


RESNET = {"embedding_size": 16, **SIZES}
ORACLES = {
    "basic": ResNetConfig(layer_type="basic", **RESNET),
    "bottleneck": ResNetConfig(layer_type="bottleneck", **RESNET),
    "strided-first": ResNetConfig(downsample_in_first_stage=True, downsample_in_bottleneck=True, **RESNET),
    "convnext": ConvNextConfig(num_stages=3, layer_norm_eps=1e-6, **SIZES),
    "convnext-unscaled": ConvNextConfig(num_stages=3, layer_norm_eps=1e-6, layer_scale_init_value=0.0, **SIZES),
}


@pytest.fixture(params=ORACLES)
def pair(request):
    torch.manual_seed(0)
    oracle = shake(AutoModelForImageClassification.from_config(ORACLES[request.param]))
    return oracle, converted(oracle, "AutoModelForImageClassification")


def in_our_names(oracle: nn.Module, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    renamed, unmapped = translate(tensors, SOURCES[oracle.config.model_type])
    assert (len(renamed), unmapped) == (len(tensors), [])
    return renamed


@torch.no_grad()
def test_logits_loss_and_maps_equal_transformers(pair, record_property):
    oracle, ours = pair
    pixels, labels = torch.randn(3, 3, 64, 96), torch.tensor([0, 3, 4])
    theirs = oracle(pixels, labels=labels, output_hidden_states=True)
    mine = ours(pixels, labels=labels, output_hidden_states=True)
    check(record_property, mine.logits, theirs.logits)
    assert abs(mine.loss - theirs.loss) <= TOLERANCE
    assert len(mine.hidden_states) == 4
    for one, other in zip(mine.hidden_states, theirs.hidden_states, strict=True):
        check(record_property, one, other)
    trunk = ours.model(pixels)
    check(record_property, trunk.last_hidden_state, theirs.hidden_states[-1].flatten(2).transpose(1, 2))
    assert [tuple(x.shape[-2:]) for x in trunk.feature_maps] == [
        (64 // stride, 96 // stride) for stride in ours.model.feature_strides
    ]


def test_gradients_in_training_equal_transformers(pair):
    oracle, ours = pair
    pixels, labels = torch.randn(4, 3, 64, 64), torch.tensor([0, 3, 4, 1])
    for model in pair:
        model.train()
        model(pixels, labels=labels).loss.backward()
    for name, gradient in in_our_names(oracle, {name: p.grad for name, p in oracle.named_parameters()}).items():
        scale = gradient.abs().max().clamp(min=1e-3)
        assert (ours.get_parameter(name).grad - gradient).abs().max() <= 1e-4 * scale, name
    for name, buffer in in_our_names(oracle, dict(oracle.named_buffers())).items():
        assert torch.allclose(ours.get_buffer(name), buffer, atol=TOLERANCE), name


@torch.no_grad()
def test_the_backbone_gives_the_maps_of_transformers_backbone(record_property):
    wanted = ["stem", "stage1", "stage3"]
    oracle = shake(ResNetBackbone(ResNetConfig(layer_type="basic", out_features=wanted, **RESNET)))
    backbone = converted(oracle, "AutoBackbone")
    assert isinstance(backbone, BmCnnBackbone)
    pixels = torch.randn(2, 3, 64, 64)
    mine, theirs = (model(pixels, output_hidden_states=True) for model in (backbone, oracle))
    assert backbone.channels == [16, 16, 64]
    assert len(mine.feature_maps) == 3
    for name in ("feature_maps", "hidden_states"):
        for one, other in zip(getattr(mine, name), getattr(theirs, name), strict=True):
            check(record_property, one, other)
    assert backbone(pixels).hidden_states is None


def alexnet(widths, num_labels):
    """torchvision's AlexNet (Krizhevsky 2014), narrower."""
    a, b, c, d, e = widths
    return nn.Sequential(
        nn.Conv2d(3, a, 11, stride=4, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2),
        nn.Conv2d(a, b, 5, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2),
        nn.Conv2d(b, c, 3, padding=1), nn.ReLU(), nn.Conv2d(c, d, 3, padding=1), nn.ReLU(),
        nn.Conv2d(d, e, 3, padding=1), nn.ReLU(), nn.MaxPool2d(3, 2),
        nn.AdaptiveAvgPool2d(6), nn.Flatten(), nn.Dropout(), nn.Linear(e * 36, 20), nn.ReLU(), nn.Dropout(),
        nn.Linear(20, 20), nn.ReLU(), nn.Linear(20, num_labels),
    )  # fmt: skip


def vgg(widths, num_labels):
    """torchvision's VGG-16, narrower."""
    layers, inputs = [], 3
    for width, depth in zip(widths, [2, 2, 3, 3, 3], strict=True):
        for _ in range(depth):
            layers += [nn.Conv2d(inputs, width, 3, padding=1), nn.ReLU()]
            inputs = width
        layers.append(nn.MaxPool2d(2, 2))
    head = [nn.Linear(inputs * 49, 20), nn.ReLU(), nn.Dropout(), nn.Linear(20, 20), nn.ReLU(), nn.Dropout()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(7), nn.Flatten(), *head, nn.Linear(20, num_labels))


def mnist():
    """pytorch/examples, mnist/main.py."""
    return nn.Sequential(
        nn.Conv2d(1, 32, 3), nn.ReLU(), nn.Conv2d(32, 64, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Dropout(0.25),
        nn.Flatten(), nn.Linear(9216, 128), nn.ReLU(), nn.Dropout(0.5), nn.Linear(128, 10),
    )  # fmt: skip


def textbook():
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(),
        nn.MaxPool2d(2), nn.Flatten(), nn.Linear(64 * 8 * 8, 128), nn.ReLU(), nn.Linear(128, 10),
    )  # fmt: skip


def perceptron():
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 10))


NARROW = {"classifier_hidden_sizes": [20, 20], "num_labels": 7}
PLAIN = {
    "alexnet": (
        lambda: alexnet([8, 12, 16, 12, 12], 7),
        {"hidden_sizes": [8, 12, 16, 12, 12], **NARROW},
        (3, 112, 112),
    ),
    "vgg-16": (lambda: vgg([4, 8, 8, 12, 12], 7), {"hidden_sizes": [4, 8, 8, 12, 12], **NARROW}, (3, 64, 96)),
    "mnist-cnn": (mnist, {}, (1, 28, 28)),
    "textbook-cnn": (textbook, {}, (3, 32, 32)),
    "mlp-784-128-10": (perceptron, {}, (1, 28, 28)),
}


@pytest.mark.parametrize("name", PLAIN)
@torch.no_grad()
def test_plain_presets_equal_torch_stacks(name, record_property):
    build, narrower, shape = PLAIN[name]
    oracle = shake(build())
    ours = AutoModelForImageClassification.from_config(BmCnnConfig.from_preset(name, **narrower)).eval()
    weights = [tensor for tensor in oracle.state_dict().values()]
    ours.load_state_dict(dict(zip(ours.state_dict(), weights, strict=True)))
    pixels = torch.randn(2, *shape)
    check(record_property, ours(pixels).logits, oracle(pixels))


def test_average_pooling_is_average_pooling():
    pixels = torch.randn(1, 3, 8, 8)
    maps = []
    for kind in ("max", "avg"):
        torch.manual_seed(0)
        trunk = BmCnnModel(BmCnnConfig(block_type="plain", hidden_sizes=[4], depths=[1], pooling_type=kind)).eval()
        maps.append(trunk(pixels).feature_maps[-1])
        unpooled = trunk.stages[0].blocks[0](pixels)
    assert torch.equal(maps[0], F.max_pool2d(unpooled, 2))
    assert torch.allclose(maps[1], F.avg_pool2d(unpooled, 2))


@pytest.mark.parametrize("kernel_size", [1, 3])
def test_a_stem_that_pools_first_normalizes_what_is_left(kernel_size, record_property):
    torch.manual_seed(0)
    fields = {"stem_type": "conv", "stem_width": 4, "stem_kernel_size": kernel_size, "stem_pools_first": True}
    trunk = BmCnnModel(BmCnnConfig(hidden_sizes=[4], depths=[1], norm_type="batch_norm", **fields)).train()
    (weight, scale, shift), pixels = trunk.stem.parameters(), torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        scale.copy_(torch.tensor([0.5, 1.0, -1.0, 2.0]))
        shift.copy_(torch.tensor([0.1, 0.2, 0.3, 0.4]))
        pooled = F.max_pool2d(F.conv2d(pixels, weight, stride=2, padding=kernel_size // 2), 3, stride=2, padding=1)
        variance, mean = torch.var_mean(pooled, (0, 2, 3), correction=0, keepdim=True)
        normed = (pooled - mean) / (variance + 1e-5).sqrt()
        expected = (normed * scale[:, None, None] + shift[:, None, None]).clamp(min=0)
        check(record_property, trunk.stem(pixels), expected)


def test_a_stage_that_pools_first_normalizes_what_is_left(record_property):
    fields = {"block_type": "plain", "hidden_sizes": [4], "depths": [2], "norm_type": "batch_norm"}
    torch.manual_seed(0)
    trunk = BmCnnModel(BmCnnConfig(pools_first=True, **fields)).train()
    pixels, (first, last) = torch.randn(2, 3, 8, 8), trunk.stages[0].blocks
    with torch.no_grad():
        pooled = F.max_pool2d(last.conv[0](first(pixels)), 2)
        variance, mean = torch.var_mean(pooled, (0, 2, 3), correction=0, keepdim=True)
        expected = ((pooled - mean) / (variance + 1e-5).sqrt()).clamp(min=0)
        check(record_property, trunk(pixels).feature_maps[-1], expected)


def test_dropped_paths_drop_whole_images_and_keep_the_mean():
    config = BmCnnConfig(drop_path_rate=0.5, **TINY)
    block = BmCnnModel(config).stages[1].blocks[1]
    assert block.drop_path.probability == pytest.approx(0.5)
    x = torch.ones(4000, 2, 2, 2)
    dropped = block.drop_path.train()(x)
    assert set(dropped.unique().tolist()) == {0.0, 2.0}
    assert torch.equal(dropped.amax((1, 2, 3)), dropped.amin((1, 2, 3)))
    assert abs(dropped.mean() - 1) < 0.1
    assert torch.equal(block.drop_path.eval()(x), x)


def hidden_cells(rows: int, cells: int) -> torch.Tensor:
    masked = torch.zeros(rows, cells, dtype=torch.bool)
    masked[0, : cells // 2] = True
    masked[1:, ::3] = True
    return masked


@pytest.mark.parametrize("stem_type", ["none", "conv", "patch"])
def test_masked_image_modelling_does_not_read_masked_cells(stem_type):
    config = BmCnnConfig(stem_type=stem_type, stem_width=None, **TINY)
    model = AutoModelForMaskedImageModeling.from_config(config).eval()
    pixels, masked = torch.randn(2, 3, 32, 32), hidden_cells(2, 16)  # cells of 8 x 8 pixels
    hidden = masked.view(2, 1, 4, 4).repeat_interleave(8, 2).repeat_interleave(8, 3)
    outputs = model(pixels, bool_masked_pos=masked)
    assert outputs.reconstruction.shape == pixels.shape
    changed = torch.where(hidden, torch.randn_like(pixels) * 10, pixels)
    assert torch.equal(model(changed, bool_masked_pos=masked).reconstruction, outputs.reconstruction)
    assert not torch.equal(model(changed).reconstruction, outputs.reconstruction)
    expected = (outputs.reconstruction - pixels).abs()[hidden.expand_as(pixels)].mean()
    assert torch.allclose(outputs.loss, expected, atol=1e-6)
    with torch.no_grad():
        model.mask_token += 1
    assert not torch.allclose(model(pixels, bool_masked_pos=masked).reconstruction, outputs.reconstruction)


def test_each_position_paints_its_own_square():
    model = AutoModelForMaskedImageModeling.from_config(BmCnnConfig(stem_type="patch", **TINY))
    with torch.no_grad():
        model.decoder.weight.zero_()
    image = torch.arange(2 * 3 * 16 * 24.0).view(2, 3, 16, 24)
    stride = model.model.output_stride
    assert stride == 8
    tiles = [image[:, :, i : i + 8, j : j + 8].permute(0, 2, 3, 1).flatten(1) for i in (0, 8) for j in (0, 8, 16)]
    assert torch.equal(model.paint(torch.stack(tiles, 1), image), image)


def test_the_pooled_output_is_a_tower_of_a_dual_encoder():
    text = BertModel(
        BertConfig(vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    )
    model = VisionTextDualEncoderModel(vision_model=BmCnnModel(BmCnnConfig(**TINY)), text_model=text)
    outputs = model(input_ids=torch.tensor([[1, 2], [3, 4]]), pixel_values=torch.randn(2, 3, 32, 32), return_loss=True)
    outputs.loss.backward()
    assert outputs.logits_per_image.shape == (2, 2)


def test_the_backbone_serves_a_segmentation_model():
    backbone = BmCnnConfig(
        hidden_sizes=[8, 8, 16, 16], depths=[1, 1, 1, 1], out_features=["stage1", "stage2", "stage3", "stage4"]
    )
    config = UperNetConfig(
        backbone_config=backbone, hidden_size=8, auxiliary_in_channels=16, auxiliary_channels=8, num_labels=3
    )
    logits = UperNetForSemanticSegmentation(config).eval()(torch.randn(1, 3, 64, 64)).logits
    assert logits.shape == (1, 3, 64, 64)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"depths": [1]}, r"depths=\[1\] has 1 entries; hidden_sizes=.* has 3 stages"),
        ({"hidden_sizes": [4, 8], "depths": [1, 0]}, "every stage needs at least 1 block"),
        ({"block_type": "gated"}, "block_type='gated' is not for input_type='pixels'; choose plain, basic"),
        ({"block_type": "plain", "input_type": "tokens"}, "is not for input_type='tokens'; choose residual"),
        ({"block_type": "bottleneck", "hidden_sizes": [4, 6], "depths": [1, 1]}, "multiples of expansion=4"),
        ({"hidden_size": 7}, "hidden_size=7 is not 256, the last of hidden_sizes; leave it out"),
        ({"num_hidden_layers": 7}, "num_hidden_layers=7 is not 3"),
        ({"stem_width": 8}, "stem_width=8 is not 3, num_channels"),
        ({"input_type": "tokens", "norm_type": "batch_norm"}, "would mix positions and padding"),
        (
            {"input_type": "tokens", "block_type": "multi_width", "hidden_size": 8},
            "not a multiple of the 3 filter_widths",
        ),
        ({"drop_path_rate": 1.0}, "drop_path_rate=1.0 is not a probability"),
        ({"hidden_act": "relu7"}, "hidden_act"),
        ({"stem_pools_first": True}, "this has stem_type='none', stem_pooling=True"),
        ({"stem_type": "conv", "stem_pooling": False, "stem_pools_first": True}, "stem_pooling=False"),
        ({"pools_first": True}, "for block_type='plain', with one convolution a block; this is 'basic'"),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_a_wrong_field_is_named_with_its_value(fields, message):
    with pytest.raises(Exception, match=message):
        BmCnnConfig(**fields)


@pytest.mark.parametrize(
    ("auto_class", "given", "message"),
    [
        (AutoModelForImageClassification, {"pixel_values": torch.zeros(1, 1, 8, 8)}, "num_channels=3 wants"),
        (
            AutoModelForImageClassification,
            {},
            "pass pixel_values: this bm_cnn has",
        ),
        (
            AutoModelForMaskedImageModeling,
            {"pixel_values": torch.zeros(1, 3, 8, 8), "bool_masked_pos": torch.zeros(1, 5)},
            "bool_masked_pos has 5 cells, which no square grid over 8 x 8 pixels has",
        ),
        (AutoModelForMaskedImageModeling, {"pixel_values": torch.zeros(1, 3, 9, 8)}, "do not tile it"),
    ],
)
def test_a_wrong_image_is_refused_by_what_is_wrong(auto_class, given, message):
    with pytest.raises(ValueError, match=message):
        auto_class.from_config(BmCnnConfig(**TINY))(**given)


def test_an_image_head_refuses_a_trunk_for_tokens():
    with pytest.raises(ValueError, match=r"BmCnnForImageClassification needs input_type='pixels'.*'tokens'"):
        AutoModelForImageClassification.from_config(BmCnnConfig(input_type="tokens"))
