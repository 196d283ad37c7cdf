"""The image processor: what a model reads of a picture, and of the boxes drawn on it."""

import numpy as np
import PIL.Image
import pytest
import torch
from transformers import AutoImageProcessor, AutoModelForImageClassification, AutoModelForObjectDetection, pipeline
from transformers.image_processing_backends import PilBackend
from transformers.image_utils import SizeDict

import bmtk  # noqa: F401  (registers the families)
from bmtk.models.configuration_bm_cnn import BmCnnConfig
from bmtk.models.image_processing_bm import BmImageProcessor

TINY = {"hidden_sizes": [8, 16], "depths": [1, 1], "num_labels": 3, "image_size": 16}
DETECTOR = {"fpn_size": 16, "num_detection_layers": 1, "num_feature_levels": 3}


@pytest.fixture
def picture() -> PIL.Image.Image:
    return PIL.Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8))


def test_pixels_are_resized_scaled_and_normalised(picture):
    pixels = BmImageProcessor.for_config(BmCnnConfig(**TINY))(picture, return_tensors="pt")["pixel_values"]
    resized = np.array(picture.resize((16, 16), PIL.Image.Resampling.BILINEAR), dtype=np.float32)
    expected = torch.tensor(resized).permute(2, 0, 1)[None] / 255 * 2 - 1
    assert pixels.dtype == torch.float32
    assert (pixels - expected).abs().max() < 1e-6


def test_an_image_of_eight_bits_that_has_its_size_is_kept():
    pixels, size = np.zeros((3, 20, 30), np.uint8), SizeDict(height=20, width=30)
    assert BmImageProcessor().resize(pixels, size) is pixels
    assert BmImageProcessor().resize(pixels, SizeDict(height=30, width=20)).shape == (3, 30, 20)
    assert BmImageProcessor().resize(pixels, SizeDict(shortest_edge=10)).shape == (3, 10, 15)


def test_the_middle_is_cropped(picture):
    processor = BmImageProcessor(
        size={"shortest_edge": 20}, do_center_crop=True, crop_size={"height": 10, "width": 10}, do_normalize=False
    )
    pixels = processor(picture, return_tensors="pt")["pixel_values"][0]
    assert torch.allclose(pixels, torch.tensor(np.array(picture))[5:15, 10:20].permute(2, 0, 1) / 255)


def test_greyscale_is_pillows_luminance_for_pictures_and_arrays(picture):
    processor = BmImageProcessor.for_config(BmCnnConfig(num_channels=1, **TINY), do_resize=False)
    expected = torch.tensor(np.array(picture.convert("L")))[None, None] / 255 * 2 - 1
    for given in (picture, np.array(picture), picture.convert("L"), np.array(picture.convert("L"))):
        assert (processor(given, return_tensors="pt")["pixel_values"] - expected).abs().max() <= 2 / 255 + 1e-6
    assert torch.allclose(processor(picture, return_tensors="pt")["pixel_values"], expected)


def test_a_greyscale_picture_fills_three_channels(picture):
    pixels = BmImageProcessor.for_config(BmCnnConfig(**TINY))(picture.convert("L"), return_tensors="pt")[
        "pixel_values"
    ]
    assert pixels.shape == (1, 3, 16, 16)
    assert torch.equal(pixels[:, 0], pixels[:, 2])


def test_boxes_become_centres_and_sizes_in_parts_of_the_image(picture):
    objects = [
        {"bbox": [3, 5, 6, 10], "category_id": 2, "area": 60},
        {"bbox": [27, 0, 20, 4], "category_id": 1, "area": 80},
        {"bbox": [0, 0, 9, 9], "category_id": 0, "area": 81, "iscrowd": 1},
        {"bbox": [40, 0, 5, 5], "category_id": 0, "area": 25},
    ]
    processor = BmImageProcessor.for_config(BmCnnConfig(**TINY))
    features = processor([picture], annotations={"image_id": 1, "annotations": objects}, return_tensors="pt")
    (label,) = features["labels"]
    assert features["pixel_values"].shape == (1, 3, 16, 16)
    assert label["class_labels"].tolist() == [2, 1]
    expected = [6 / 30, 10 / 20, 6 / 30, 10 / 20, 28.5 / 30, 2 / 20, 3 / 30, 4 / 20]
    assert label["boxes"].flatten().tolist() == pytest.approx(expected)
    model = AutoModelForObjectDetection.from_config(BmCnnConfig(**TINY, **DETECTOR))
    assert model(**features).loss.isfinite()
    empty = processor([picture], annotations=[{"image_id": 1, "annotations": []}], return_tensors="pt")["labels"][0]
    assert (tuple(empty["boxes"].shape), tuple(empty["class_labels"].shape)) == ((0, 4), (0,))


def test_boxes_size_may_be_stated_for_some_images_alone(picture):
    objects, processor = [{"bbox": [3, 5, 6, 10], "category_id": 0}], BmImageProcessor.for_config(BmCnnConfig(**TINY))
    stated = [{}, {"boxes_size": (40, 60)}, {"boxes_size": None}]  # None: as tables fill in what a row has not
    annotations = [{"image_id": 0, "annotations": objects, **size} for size in stated]
    found = processor([picture] * 3, annotations=annotations, return_tensors="pt")["labels"]
    assert [label["orig_size"].tolist() for label in found] == [[20, 30], [40, 60], [20, 30]]
    assert [label["boxes"][0, 3].item() for label in found] == [0.5, 0.25, 0.5]
    with pytest.raises(ValueError, match=r"boxes_size=\(0, 60\) of an annotation is no size; give \(height, width\)"):
        processor([picture], annotations=[{**annotations[0], "boxes_size": (0, 60)}])


@pytest.mark.parametrize(
    ("fields", "count", "message"),
    [
        ({}, 2, "1 images came with 2 annotations"),
        ({"do_center_crop": True, "crop_size": {"height": 8, "width": 8}}, 1, "would move boxes"),
    ],
)
def test_annotations_that_cannot_fit_are_refused(picture, fields, count, message):
    with pytest.raises(ValueError, match=message):
        BmImageProcessor(**fields)([picture], annotations=[{"image_id": 1, "annotations": []}] * count)


def test_a_config_of_two_channels_has_no_processor():
    with pytest.raises(ValueError, match=r"num_channels=2 is neither greyscale \(1\) nor colour \(3\)"):
        BmImageProcessor.for_config(BmCnnConfig(num_channels=2))


def save(model, directory, **fields) -> BmImageProcessor:
    processor = BmImageProcessor.for_config(model.config, **fields)
    model.save_pretrained(directory)
    processor.save_pretrained(directory)
    return processor


def test_a_saved_processor_is_found_by_its_auto_class(picture, tmp_path):
    config = BmCnnConfig(num_channels=1, **TINY)
    processor = save(AutoModelForImageClassification.from_config(config), tmp_path, image_mean=[0.3])
    loaded = AutoImageProcessor.from_pretrained(tmp_path)
    assert type(loaded) is BmImageProcessor
    assert loaded.to_dict() == processor.to_dict()
    assert torch.equal(
        loaded(picture, return_tensors="pt")["pixel_values"], processor(picture, return_tensors="pt")["pixel_values"]
    )


def test_the_pipeline_classifies_from_a_saved_folder(picture, tmp_path):
    model = AutoModelForImageClassification.from_config(BmCnnConfig(**TINY)).eval()
    processor = save(model, tmp_path)
    found = pipeline("image-classification", model=str(tmp_path))(picture)
    with torch.no_grad():
        expected = model(**processor(picture, return_tensors="pt")).logits.softmax(-1)[0]
    assert {entry["label"]: entry["score"] for entry in found} == pytest.approx(
        {f"LABEL_{i}": expected[i].item() for i in range(3)}, abs=1e-5
    )


def test_the_pipeline_detects_from_a_saved_folder(picture, tmp_path):
    model = AutoModelForObjectDetection.from_config(BmCnnConfig(**TINY, **DETECTOR)).eval()
    processor = save(model, tmp_path)
    # The object detection pipeline also asks for a video processor, which would ask for consent to run code.
    detector = pipeline("object-detection", model=str(tmp_path), trust_remote_code=False)
    found = detector(picture, threshold=0.05)
    with torch.no_grad():
        outputs = model(**processor(picture, return_tensors="pt"))
    (expected,) = processor.post_process_object_detection(outputs, threshold=0.05, target_sizes=[(20, 30)])
    assert len(found) == len(expected["scores"]) > 0
    assert [entry["score"] for entry in found] == pytest.approx(expected["scores"].tolist(), abs=1e-5)
    assert list(found[0]["box"].values()) == expected["boxes"][0].int().tolist()


@pytest.mark.parametrize("channels", [1, 3])
def test_values_that_are_looked_up_are_those_that_the_base_class_computes(channels, monkeypatch):
    draw = np.random.default_rng(0)
    images = [draw.integers(256, size=(height, 31, channels), dtype=np.uint8) for height in (17, 40)]
    moments = {"image_mean": [0.1, 0.5, 0.7][:channels], "image_std": [0.3, 0.21, 0.9][:channels]}
    processor = BmImageProcessor(
        size={"height": 24, "width": 20}, do_convert_rgb=channels == 3, do_convert_grayscale=channels == 1, **moments
    )
    found = processor(images, return_tensors="pt")["pixel_values"]
    monkeypatch.setattr(BmImageProcessor, "_features", PilBackend._preprocess)
    expected = processor(images, return_tensors="pt")["pixel_values"]
    assert (found.shape, found.dtype) == ((2, channels, 24, 20), torch.float32)
    assert torch.equal(found, expected)
    assert len(found.unique()) > 100


def test_images_that_have_their_size_become_what_others_become(picture):
    processor = BmImageProcessor.for_config(BmCnnConfig(**TINY), image_mean=[0.1, 0.2, 0.3], image_std=[0.4, 0.5, 0.6])
    ready = [picture.resize((16, 16)), picture.crop((0, 0, 16, 16))]
    annotation = {"annotations": [{"bbox": [3, 5, 6, 10], "category_id": 2}], "boxes_size": (20, 30)}
    for kind in ("pt", "np", None):
        found, expected = (
            processor(ready, annotations=[annotation] * 2, return_tensors=kind, **given)
            for given in ({}, {"do_resize": True})  # with a setting of its own, as every image was read before
        )
        assert type(found["pixel_values"]) is type(expected["pixel_values"])
        pairs = zip(found["pixel_values"], expected["pixel_values"], strict=True)
        assert all(np.array_equal(one, other) for one, other in pairs)
        for one, other in zip(found["labels"], expected["labels"], strict=True):
            assert {name: value.tolist() for name, value in one.items()} == {
                name: value.tolist() for name, value in other.items()
            }


@pytest.mark.parametrize(
    "fields",
    [
        {"do_center_crop": True, "crop_size": {"height": 8, "width": 8}},
        {"do_pad": True, "pad_size": {"height": 20, "width": 20}},
        {"do_convert_grayscale": True, "image_mean": [0.5], "image_std": [0.5]},
        {"size": {"shortest_edge": 16}},
        {"do_normalize": False},
        {"do_rescale": False, "do_normalize": False},
    ],
)
def test_other_settings_and_other_images_are_no_exception(fields, picture):
    processor = BmImageProcessor(size={"height": 16, "width": 16})
    for name, value in fields.items():
        setattr(processor, name, value)
    small = picture.resize((16, 16))
    clear, keyed = small.copy(), small.copy()
    clear.putalpha(100)
    keyed.info["transparency"] = small.getpixel((0, 0))  # of one colour, as PNG has it
    grey = small.convert("L")
    for images in ([small], [small, clear], [small, keyed], [small, grey], [small, picture], (small,), small):
        resample = PIL.Image.Resampling.BILINEAR
        found, expected = (processor(images, **given)["pixel_values"] for given in ({}, {"resample": resample}))
        assert len(found) == len(expected)
        assert all(np.array_equal(one, other) for one, other in zip(found, expected, strict=True))
