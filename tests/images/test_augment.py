from __future__ import annotations

import pickle
import random
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy

import numpy as np
import pytest
import torch

from cnnray.errors import ImageError, SettingsError
from cnnray.images.augment import TrainTransform, _image_seed
from cnnray.images.transforms import EvalTransform, Preprocessing
from cnnray.options import Augmentation, DecodeLimits

pytestmark = pytest.mark.filterwarnings("error")

OPTIONS = {
    "random_resized": Augmentation(crop="random_resized"),
    "random_pad": Augmentation(crop="random_pad", pad=4),
    "flip": Augmentation(flip=0.5),
    "vertical_flip": Augmentation(vertical_flip=0.5),
    "rotation": Augmentation(rotation=30),
    "color_jitter": Augmentation(color_jitter=0.5),
    "randaugment": Augmentation(policy="randaugment", policy_magnitude=15, policy_ops=3),
    "trivialaugment": Augmentation(policy="trivialaugment"),
    "augmix": Augmentation(policy="augmix"),
    "erasing": Augmentation(erasing=0.8),
}
EVERYTHING = Augmentation(
    crop="random_resized",
    flip=0.5,
    vertical_flip=0.5,
    rotation=15,
    color_jitter=0.4,
    policy="randaugment",
    erasing=0.5,
)


def make_preprocessing(channels: int = 3) -> Preprocessing:
    return Preprocessing(
        channels=channels,
        size=16,
        resize=18,
        interpolation="bilinear",
        mean=(0.5,) * channels,
        std=(0.25,) * channels,
    )


def make_transform(
    augmentation: Augmentation = EVERYTHING, *, channels: int = 3, seed: int = 0
) -> TrainTransform:
    return TrainTransform(make_preprocessing(channels), augmentation, seed=seed)


@pytest.fixture(scope="module")
def data(encode, picture) -> bytes:
    return encode(picture, "PNG")


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", OPTIONS)
def test_option_varies_the_image_and_keeps_its_shape(name, channels, data):
    transform = make_transform(OPTIONS[name], channels=channels)
    images = [transform(data, epoch=0, key=f"image {i}") for i in range(40)]
    for image in images:
        assert image.shape == (channels, 16, 16)
        assert image.dtype == np.uint8
        assert image.flags.c_contiguous
    assert len({image.tobytes() for image in images}) > 1


@pytest.mark.parametrize("channels", [1, 3])
def test_same_seed_epoch_and_key_give_the_same_pixels(channels, data):
    for augmentation in (*OPTIONS.values(), EVERYTHING):
        first = make_transform(augmentation, channels=channels)
        second = make_transform(augmentation, channels=channels)
        second(data, epoch=7, key="another image in between")
        random.seed(1)
        np.random.seed(1)
        torch.manual_seed(1)
        np.testing.assert_array_equal(first(data, epoch=3, key="a"), second(data, epoch=3, key="a"))


def test_epoch_key_and_seed_each_change_the_pixels(data):
    transform = make_transform()
    images = [
        transform(data, epoch=0, key="a"),
        transform(data, epoch=1, key="a"),
        transform(data, epoch=0, key="b"),
        make_transform(seed=1)(data, epoch=0, key="a"),
    ]
    assert len({image.tobytes() for image in images}) == 4


def test_seed_of_an_image_is_the_same_in_every_process():
    assert _image_seed(5, epoch=2, key="a/b.png") == 6290196075337875345


def test_threads_do_not_take_each_others_numbers(data):
    transform = make_transform()
    keys = [str(i) for i in range(20)]
    expected = [transform(data, epoch=0, key=key) for key in keys]
    with ThreadPoolExecutor(2) as pool:
        images = list(pool.map(lambda key: transform(data, epoch=0, key=key), keys))
    np.testing.assert_array_equal(images, expected)


def test_callers_random_state_is_left_alone(data):
    torch.manual_seed(0)
    random.seed(0)
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    for augmentation in (*OPTIONS.values(), EVERYTHING):
        make_transform(augmentation)(data, epoch=0, key="a")
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    np.testing.assert_array_equal(np.random.get_state()[1], states[2])


def test_callers_random_state_survives_a_failure(data):
    transform = make_transform()
    state = torch.get_rng_state()
    with pytest.raises(ValueError, match="fill"):
        transform.augment(np.zeros((20, 20, 2), dtype=np.uint8), epoch=0, key="a")
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("channels", [1, 3])
def test_identity_equals_evaluation(channels, valid_files):
    train, evaluate = (
        make_transform(Augmentation(), channels=channels),
        EvalTransform(make_preprocessing(channels)),
    )
    for data in valid_files.values():
        np.testing.assert_array_equal(train(data, epoch=0, key="a"), evaluate(data))


def test_options_are_no_identity():
    for augmentation in (*OPTIONS.values(), EVERYTHING):
        assert augmentation != Augmentation()


def test_flip_of_probability_one_mirrors(data):
    evaluated = EvalTransform(make_preprocessing())(data)
    flipped = make_transform(Augmentation(flip=1))(data, epoch=0, key="a")
    np.testing.assert_array_equal(flipped, evaluated[:, :, ::-1])
    flipped = make_transform(Augmentation(vertical_flip=1))(data, epoch=0, key="a")
    np.testing.assert_array_equal(flipped, evaluated[:, ::-1])


def test_random_pad_shows_a_shifted_window(data):
    evaluated = EvalTransform(make_preprocessing())(data)
    padded = np.pad(evaluated, ((0, 0), (4, 4), (4, 4)), mode="reflect")
    windows = {padded[:, y : y + 16, x : x + 16].tobytes() for y in range(9) for x in range(9)}
    transform = make_transform(OPTIONS["random_pad"])
    images = {transform(data, epoch=0, key=str(i)).tobytes() for i in range(30)}
    assert images <= windows
    assert len(images) > 10


def test_erased_rectangle_has_the_mean_color(encode):
    white = encode(np.full((18, 18, 3), 255, dtype=np.uint8), "PNG")
    image = make_transform(Augmentation(erasing=1))(white, epoch=0, key="a")
    assert set(np.unique(image)) == {127, 255}  # 255 * 0.5, cut to a whole number


def test_jitter_of_grey_images_changes_brightness_only(encode):
    flat = encode(np.full((18, 18), 100, dtype=np.uint8), "PNG")
    transform = make_transform(Augmentation(color_jitter=0.5), channels=1)
    images = [transform(flat, epoch=0, key=str(i)) for i in range(10)]
    assert all(len(np.unique(image)) == 1 for image in images)
    assert len({int(image[0, 0, 0]) for image in images}) > 5


def test_augmix_strays_further_from_the_image_the_larger_the_magnitude(data):
    plain = EvalTransform(make_preprocessing())(data).astype(int)
    distances = []
    for magnitude in (0, 9, 30):
        transform = make_transform(Augmentation(policy="augmix", policy_magnitude=magnitude))
        images = [transform(data, epoch=0, key=str(i)).astype(int) for i in range(60)]
        distances.append(np.mean([np.abs(image - plain).mean() for image in images]))
    assert distances == sorted(distances)
    assert distances[-1] > 1.2 * distances[0]


@pytest.mark.parametrize("shape", [(1, 5000), (5000, 1), (1, 1)])
@pytest.mark.parametrize("crop", ["random_resized", "random_pad"])
def test_extreme_shapes_are_cropped_to_the_size(shape, crop, encode):
    data = encode(np.zeros((*shape, 3), dtype=np.uint8), "PNG")
    image = make_transform(Augmentation(crop=crop, pad=2))(data, epoch=0, key="a")
    assert image.shape == (3, 16, 16)


def test_any_text_is_a_key(data):
    transform = make_transform()
    keys = ("", "\0", "naïve/図.png", "\udcff raw byte", "a" * 10_000)
    assert len({transform(data, epoch=0, key=key).tobytes() for key in keys}) == len(keys)


def test_transform_travels_to_a_worker(data):
    transform = make_transform()
    assert pickle.dumps(transform)
    copied = deepcopy(transform)
    np.testing.assert_array_equal(copied(data, epoch=0, key="a"), transform(data, epoch=0, key="a"))


def test_train_transform_keeps_its_limits(data):
    limits = DecodeLimits(max_pixels=599)
    transform = TrainTransform(make_preprocessing(), EVERYTHING, seed=0, limits=limits)
    with pytest.raises(ImageError, match="too_large"):
        transform(data, epoch=0, key="a")


@pytest.mark.parametrize(
    "changes",
    [
        {"crop": "middle"},
        {"policy": "autoaugment"},
        {"scale_min": 0},
        {"scale_min": 1.1},
        {"ratio_max": 0.9},
        {"pad": -1},
        {"flip": 1.5},
        {"vertical_flip": -0.1},
        {"rotation": 181},
        {"color_jitter": 1.1},
        {"color_jitter": float("nan")},
        {"policy_magnitude": 31},
        {"policy_ops": 0},
        {"erasing": 2},
    ],
)
def test_wrong_augmentation_is_refused(changes):
    with pytest.raises(ValueError, match=next(iter(changes))):
        Augmentation(**changes)


def test_pad_as_large_as_the_image_is_refused():
    with pytest.raises(SettingsError, match="augment.pad 16 is not smaller than the image, 16 px"):
        make_transform(Augmentation(crop="random_pad", pad=16))
