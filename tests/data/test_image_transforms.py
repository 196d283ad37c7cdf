"""Augmentation of images, against numpy's padding, literal values and what a share of an image means."""

import numpy as np
import pytest

from bmtk.data.image_transforms import TRANSFORMATIONS, Augmentation, erased, jittered, moved, pasted, rand_augmented


def image_of(channels=3, height=8, width=10, seed=0):
    return np.random.default_rng(seed).integers(256, size=(channels, height, width), dtype=np.uint8)


def draws(seed=0):
    return np.random.default_rng(seed)


@pytest.mark.parametrize("down", [-3, 0, 2])
@pytest.mark.parametrize("right", [-2, 0, 3])
def test_a_moved_image_is_a_crop_of_the_mirrored_one(down, right):
    image = image_of()
    padded = np.pad(image, ((0, 0), (3, 3), (3, 3)), mode="reflect")
    expected = padded[:, 3 - down : 11 - down, 3 - right : 13 - right]
    assert np.array_equal(moved(image, down, right), expected)


def test_every_offset_is_drawn_and_no_other():
    image, augment = image_of(1, 6, 6), Augmentation(random_crop=1)
    seen = {augment(image, draws(seed)).tobytes() for seed in range(100)}
    assert seen == {moved(image, down, right).tobytes() for down in (-1, 0, 1) for right in (-1, 0, 1)}


def test_every_second_image_is_mirrored_and_the_image_itself_stays():
    image, augment = image_of(), Augmentation(horizontal_flip=True)
    before = image.copy()
    flipped = [np.array_equal(augment(image, draws(seed)), image[:, :, ::-1]) for seed in range(200)]
    same = [np.array_equal(augment(image, draws(seed)), image) for seed in range(200)]
    assert all(one != other for one, other in zip(flipped, same, strict=True))
    assert 80 < sum(flipped) < 120
    assert np.array_equal(image, before)


def test_colour_jitter_is_what_its_factors_say():
    image = np.array([[[100, 200]], [[50, 100]], [[0, 40]]], dtype=np.uint8)
    assert np.array_equal(jittered(image, 1, 1, 1), image)
    assert jittered(image, 0.5, 1, 1).ravel().tolist() == [50, 100, 25, 50, 0, 20]
    assert jittered(image, 2, 1, 1).max() == 255
    assert np.unique(jittered(image, 1, 0, 1)).tolist() == [82]  # 490 / 6
    grey = jittered(image, 1, 1, 0)
    assert grey[:, 0].T.tolist() == [[59, 59, 59], [123, 123, 123]]  # 0.299 red + 0.587 green + 0.114 blue
    one = jittered(image[:1], 1, 1, 0)
    assert np.array_equal(one, image[:1])


def test_an_erased_rectangle_is_as_large_as_the_paper_has_it():
    image = np.full((3, 40, 50), 7, dtype=np.uint8)
    shares, places = [], np.zeros((40, 50), dtype=bool)
    for seed in range(200):
        changed = (erased(image, draws(seed)) != 7).any(0)
        rows, columns = np.flatnonzero(changed.any(1)), np.flatnonzero(changed.any(0))
        area = (np.ptp(rows) + 1) * (np.ptp(columns) + 1)
        assert changed.sum() > 0.95 * area  # noise of three channels is seldom 7
        shares.append(area / 2000)
        places |= changed
    assert 0.01 < min(shares) < 0.06
    assert 0.25 < max(shares) < 0.36
    assert places.mean() > 0.95  # corners are seldom reached
    happened = [
        not np.array_equal(Augmentation(random_erasing=0.25)(image, draws(seed)), image) for seed in range(400)
    ]
    assert 70 < sum(happened) < 130


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 1.0])
def test_the_share_after_a_paste_is_that_of_the_pixels_that_are_left(share):
    image, other = np.full((1, 20, 30), 200, dtype=np.uint8), np.full((1, 20, 30), 100, dtype=np.uint8)
    for seed in range(20):
        mixed, left = pasted(image, other, draws(seed), share)
        assert set(np.unique(mixed)) <= {100, 200}
        assert left == pytest.approx((mixed == 200).mean(), abs=1e-12)
        assert left >= share - 0.05
    assert (image == 200).all()


def test_mixup_is_a_mean_by_shares_and_both_kinds_take_turns():
    image, other = np.full((3, 8, 8), 200, dtype=np.uint8), np.full((3, 8, 8), 100, dtype=np.uint8)
    shares = []
    for seed in range(300):
        mixed, share = Augmentation(mixup=0.4).mixed(image, other, draws(seed))
        assert np.unique(mixed).tolist() == [np.rint(100 + 100 * share)]
        shares.append(share)
    assert np.mean(shares) == pytest.approx(0.5, abs=0.06)
    assert np.var(shares) == pytest.approx(1 / (4 * (2 * 0.4 + 1)), abs=0.03)  # of Beta(0.4, 0.4)
    pasted_ones = [np.ptp(Augmentation(mixup=1, cutmix=1).mixed(image, other, draws(seed))[0]) for seed in range(200)]
    assert 60 < np.count_nonzero(pasted_ones) < 120  # half of them, but for rectangles of nothing or everything


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("number", range(len(TRANSFORMATIONS)))
def test_every_transformation_takes_grey_and_colour(number, channels, monkeypatch):
    image = image_of(channels, 40, 40) // 4 + 50  # few greys: something to stretch and to spread
    monkeypatch.setattr("bmtk.data.image_transforms.TRANSFORMATIONS", (TRANSFORMATIONS[number],))
    for seed in (0, 1):
        changed = rand_augmented(image, draws(seed), 1, 1.0)
        assert (changed.shape, changed.dtype) == (image.shape, np.uint8)
    greyscale_has_no_colour = number == 6 and channels == 1
    assert np.array_equal(changed, image) == (number == 0 or greyscale_has_no_colour)
    if number not in (1, 2, 4):  # which know no strength, or invert what is white
        assert np.array_equal(rand_augmented(image, draws(), 1, 0.0), image)


def test_settings_are_off_by_default_and_checked():
    image = image_of()
    assert np.array_equal(Augmentation()(image, draws()), image)
    assert not Augmentation().mixes
    with pytest.raises(ValueError, match=r"mixup=-0\.2 must be at least 0"):
        Augmentation(mixup=-0.2)
    with pytest.raises(ValueError, match=r"random_erasing=1\.5 is out of range; choose 0 <= random_erasing <= 1"):
        Augmentation(random_erasing=1.5)
    with pytest.raises(ValueError, match="random_crop of 8 pixels is too large for an image of 8 x 10"):
        moved(image, 8, 0)
