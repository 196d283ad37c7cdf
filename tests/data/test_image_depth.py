"""Images of more than 8 bits: shades by the range of the data set, the same in training and in the saved processor."""

import numpy as np
import PIL.Image
import pytest

from bmtk.data.image_depth import eight_bits, flat_share, range_of
from bmtk.errors import UserError
from bmtk.models.image_processing_bm import BmImageProcessor

RAMP = np.linspace(0, 1, 16).reshape(4, 4)


def image(high, dtype):
    return PIL.Image.fromarray((RAMP * high).round(6).astype(dtype))


@pytest.mark.parametrize(
    ("one", "mode", "expected"),
    [
        (image(65535, np.uint16), "I;16", (0, 65535)),
        (image(50000, np.uint16), "I;16", (0, 65535)),
        (image(3000, np.uint16), "I;16", (0, 4095)),
        (image(1000, np.uint16), "I;16", (0, 1023)),
        (image(255, np.uint16), "I;16", (0, 255)),
        (image(3000, np.int32), "I", (0, 4095)),
        (image(10**6, np.int32), "I", (0, 10**6)),
        (PIL.Image.fromarray((RAMP * 4000 - 1000).astype(np.int32)), "I", (-1000, 3000)),
        (image(0.7, np.float32), "F", (0, 1)),
        (PIL.Image.fromarray((RAMP * 2 - 1).astype(np.float32)), "F", (-1, 1)),
        (image(250, np.float32), "F", (0, 255)),
        (image(9, np.float32), "F", (0, 9)),
    ],
)
def test_shades_are_those_of_the_range_in_training_and_in_the_processor(one, mode, expected, tmp_path):
    assert one.mode == mode
    found, _ = range_of([PIL.Image.new("RGB", (4, 4)), one])
    assert found == expected
    low, high = expected
    shades = np.floor((np.asarray(one, dtype=float) - low) / (high - low) * 255 + 0.5)
    pixels = np.asarray(eight_bits(one, found, "it"))
    assert pixels.dtype == np.uint8
    assert np.abs(pixels - shades).max() <= 1  # halves may go either way
    processor = BmImageProcessor(size={"height": 4, "width": 4}, do_normalize=False)
    processor.image_range = list(found)  # as fine-tuning leaves it
    processor.save_pretrained(tmp_path)
    values = BmImageProcessor.from_pretrained(tmp_path)(one, return_tensors="np")["pixel_values"]
    assert np.allclose(values[0] * 255, pixels[None])  # one range, one result, in all three channels


def test_without_a_range_16_bits_are_read_whole_and_what_is_no_16_bit_image_is_refused():
    deep = image(65535, np.uint16)
    assert np.asarray(eight_bits(deep, None, "it")).ravel().tolist() == np.rint(RAMP.ravel() * 255).tolist()
    processor = BmImageProcessor(size={"height": 4, "width": 4}, do_normalize=False)
    for given in (deep, np.asarray(deep)):
        shown = processor(given, return_tensors="np", input_data_format=None)["pixel_values"][0, 0]
        assert shown.ravel() == pytest.approx(RAMP.ravel(), abs=1 / 255)
    for wrong in (image(1, np.float32), image(10**6, np.int32)):
        with pytest.raises(UserError, match=r"row 1 holds values from 0 to .* set image_range"):
            eight_bits(wrong, None, "row 1")
        with pytest.raises(ValueError, match="pass image_range"):
            processor(wrong)
    shallow = PIL.Image.new("L", (4, 4), 7)
    assert eight_bits(shallow, (0, 4095), "it") is shallow
    assert range_of([shallow]) is None
    with pytest.raises(UserError, match="some images hold whole numbers and others floats"):
        range_of([deep, image(1, np.float32)])


def test_images_of_nearly_one_colour_are_found():
    noise = np.random.default_rng(0).integers(0, 255, (8, 8, 3))
    assert flat_share([np.full((8, 8, 3), 9), np.full((8, 8, 3), 9) + noise % 2, noise]) == pytest.approx(2 / 3)
