"""Shifts and flips of batches: what they do to pixels, how often, and that only the key decides."""

from __future__ import annotations

import numpy as np
import pytest

from cnnray.images.augment import TrainTransform
from cnnray.images.geometry import shift_and_flip
from cnnray.images.transforms import EvalTransform, Preprocessing
from cnnray.options import Augmentation

KEYS = [f"photo {number}.jpg" for number in range(2000)]


def images(count: int) -> np.ndarray:
    """(N, 3, 6, 8) of noise."""
    return np.random.default_rng(0).integers(0, 256, (count, 3, 6, 8)).astype(np.uint8)


@pytest.mark.parametrize(("option", "axis"), [("flip", 3), ("vertical_flip", 2)])
def test_a_flip_mirrors_as_many_images_as_it_says(option: str, axis: int) -> None:
    before = images(len(KEYS))
    after = shift_and_flip(before, KEYS, seed=1, epoch=0, **{option: 0.3})
    mirrored = (after == np.flip(before, axis)).all(axis=(1, 2, 3))
    untouched = (after == before).all(axis=(1, 2, 3))
    assert (mirrored ^ untouched).all()
    assert mirrored.mean() == pytest.approx(0.3, abs=4 * (0.21 / len(KEYS)) ** 0.5)


def test_a_shift_takes_every_window_of_the_mirrored_image_equally_often() -> None:
    image = images(1)
    padded = np.pad(image[0], ((0, 0), (1, 1), (1, 1)), mode="reflect")
    windows = [padded[:, top : top + 6, left : left + 8] for top in range(3) for left in range(3)]
    after = shift_and_flip(np.repeat(image, len(KEYS), axis=0), KEYS, seed=1, epoch=0, pad=1)
    counts = [(after == window).all(axis=(1, 2, 3)).sum() for window in windows]
    assert sum(counts) == len(KEYS)
    assert min(counts) > len(KEYS) / 9 - 60
    assert max(counts) < len(KEYS) / 9 + 60


def test_an_image_gets_the_same_whatever_batch_it_is_in() -> None:
    before = images(64)
    options = {"seed": 3, "epoch": 5, "pad": 2, "flip": 0.5, "vertical_flip": 0.5}
    together = shift_and_flip(before, KEYS[:64], **options)
    backwards = shift_and_flip(before[::-1], KEYS[63::-1], **options)
    alone = [shift_and_flip(before[n : n + 1], [KEYS[n]], **options)[0] for n in range(64)]
    np.testing.assert_array_equal(backwards[::-1], together)
    np.testing.assert_array_equal(alone, together)


@pytest.mark.parametrize("other", [{"seed": 4}, {"epoch": 6}])
def test_seed_and_epoch_each_change_what_happens(other: dict[str, int]) -> None:
    before = images(64)
    options = {"seed": 3, "epoch": 5, "flip": 0.5}
    first = shift_and_flip(before, KEYS[:64], **options)
    assert (shift_and_flip(before, KEYS[:64], **{**options, **other}) != first).any()


def test_the_images_are_left_as_they_are() -> None:
    before = images(8)
    before.setflags(write=False)  # as they come from Ray's object store
    shift_and_flip(before, KEYS[:8], seed=0, epoch=0, pad=2, flip=0.5, vertical_flip=0.5)
    np.testing.assert_array_equal(before, images(8))


def test_prepared_images_are_varied_as_encoded_ones_are_augmented(encode, picture) -> None:
    size = {"size": 16, "resize": 18}
    preprocessing = Preprocessing(
        channels=3, interpolation="bilinear", mean=(0.5,) * 3, std=(0.5,) * 3, **size
    )
    augmentation = Augmentation(crop="random_pad", pad=3, flip=0.5, vertical_flip=0.5)
    transform = TrainTransform(preprocessing, augmentation, seed=7)
    assert transform.is_quick
    data = encode(picture, "PNG")
    prepared = np.stack([EvalTransform(preprocessing)(data)] * 20)
    varied = transform.vary(prepared, epoch=2, keys=KEYS[:20])
    expected = [transform(data, epoch=2, key=key) for key in KEYS[:20]]
    np.testing.assert_array_equal(varied, expected)


@pytest.mark.parametrize(
    "slow",
    [{"crop": "random_resized"}, {"rotation": 5.0}, {"policy": "trivialaugment"}, {"erasing": 0.1}],
)
def test_what_takes_more_than_a_shift_and_a_flip_is_not_quick(slow: dict) -> None:
    preprocessing = Preprocessing(
        channels=1, size=8, resize=8, interpolation="bilinear", mean=(0.5,), std=(0.5,)
    )
    assert not TrainTransform(preprocessing, Augmentation(flip=0.5, **slow), seed=0).is_quick
