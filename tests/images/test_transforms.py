from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch
from torchvision.transforms.v2 import functional as F

from cnnray.errors import ImageError
from cnnray.images.transforms import EvalTransform, Preprocessing, fit
from cnnray.options import DecodeLimits

pytestmark = pytest.mark.filterwarnings("error")


def make_preprocessing(channels: int = 3, **changes) -> Preprocessing:
    values = {
        "channels": channels,
        "size": 16,
        "resize": 20,
        "interpolation": "bilinear",
        "mean": (0.5,) * channels,
        "std": (0.25,) * channels,
    }
    return Preprocessing(**{**values, **changes})


def make_pixels(height: int, width: int, channels: int = 3) -> np.ndarray:
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (height, width, channels), dtype=np.uint8)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("shape", [(20, 30), (47, 33), (7, 9), (16, 16), (100, 20), (3, 17)])
def test_fit_equals_torchvision(shape, channels, interpolation):
    pixels = make_pixels(*shape, channels)
    preprocessing = make_preprocessing(channels, interpolation=interpolation)
    image = torch.from_numpy(pixels).permute(2, 0, 1)
    mode = F.InterpolationMode(interpolation)
    expected = F.center_crop(F.resize(image, [20], interpolation=mode), [16])
    np.testing.assert_array_equal(fit(pixels, preprocessing=preprocessing), expected.numpy())


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("shape", [(1, 1), (5, 400), (400, 5), (21, 20), (64, 64)])
def test_fit_returns_contiguous_uint8_of_the_size(shape, channels):
    fitted = fit(make_pixels(*shape, channels), preprocessing=make_preprocessing(channels))
    assert fitted.shape == (channels, 16, 16)
    assert fitted.dtype == np.uint8
    assert fitted.flags.c_contiguous


def test_right_size_leaves_pixels_alone():
    pixels = make_pixels(20, 20)
    fitted = fit(pixels, preprocessing=make_preprocessing(size=20))
    np.testing.assert_array_equal(fitted, pixels.transpose(2, 0, 1))


def test_right_short_side_is_only_cropped():
    pixels = make_pixels(20, 27)
    fitted = fit(pixels, preprocessing=make_preprocessing())
    np.testing.assert_array_equal(fitted, pixels[2:18, 6:22].transpose(2, 0, 1))  # 5.5 to even: 6


@pytest.mark.parametrize("shape", [(1, 20_000), (20_000, 1), (2, 9_999)])
def test_extreme_aspect_is_resized_in_bounded_memory(shape, monkeypatch):
    largest, interpolate = 0, torch.nn.functional.interpolate

    def watched(*arguments, **options):
        nonlocal largest
        image = interpolate(*arguments, **options)
        largest = max(largest, image.numel())
        return image

    monkeypatch.setattr(torch.nn.functional, "interpolate", watched)
    fitted = fit(make_pixels(*shape), preprocessing=make_preprocessing(size=224, resize=224))
    assert fitted.shape == (3, 224, 224)
    assert 0 < largest <= 3 * 224 * 224 * 10


@pytest.mark.parametrize("length", [400, 401])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_extreme_aspect_shows_the_centre(length, interpolation):
    pixels = make_pixels(10, length)
    preprocessing = make_preprocessing(interpolation=interpolation)
    image = torch.from_numpy(pixels).permute(2, 0, 1)
    mode = F.InterpolationMode(interpolation)
    whole = F.center_crop(F.resize(image, [20], interpolation=mode), [16]).numpy()
    fitted = fit(pixels, preprocessing=preprocessing)
    assert np.abs(fitted.astype(int) - whole).max() <= 1


def test_read_only_pixels_are_accepted():
    pixels = make_pixels(30, 40)
    pixels.flags.writeable = False
    assert fit(pixels, preprocessing=make_preprocessing()).shape == (3, 16, 16)


@pytest.mark.parametrize("channels", [1, 3])
def test_eval_transform_decodes_and_fits(channels, encode, picture):
    preprocessing = make_preprocessing(channels)
    image = EvalTransform(preprocessing)(encode(picture, "PNG"))
    pixels = np.asarray(picture.convert("L" if channels == 1 else "RGB")).reshape(20, 30, channels)
    np.testing.assert_array_equal(image, fit(pixels, preprocessing=preprocessing))


def test_eval_transform_keeps_its_limits(encode, picture):
    transform = EvalTransform(make_preprocessing(), DecodeLimits(max_pixels=599))
    with pytest.raises(ImageError, match="too_large"):
        transform(encode(picture, "PNG"))


@pytest.mark.parametrize(
    "changes",
    [
        {"channels": 2},
        {"size": 0},
        {"size": 21},
        {"resize": 10**6},
        {"size": 16.0},
        {"interpolation": "nearest"},
        {"mean": (0.5,)},
        {"mean": [0.5, 0.5, 0.5]},
        {"mean": (0.5, 0.5, float("nan"))},
        {"mean": (0.5, 0.5, "0.5")},
        {"std": (0.5, 0.5, 0.0)},
    ],
)
def test_wrong_preprocessing_is_refused(changes):
    with pytest.raises(ValueError, match=r"channels|size|interpolation|mean|std"):
        make_preprocessing(**changes)


@pytest.mark.parametrize("channels", [1, 3])
def test_preprocessing_survives_json(channels):
    preprocessing = make_preprocessing(channels)
    document = json.loads(json.dumps(preprocessing.to_dict()))
    assert document == preprocessing.to_dict()
    assert Preprocessing.from_dict(document) == preprocessing


def test_unknown_and_missing_keys_are_refused():
    values = make_preprocessing().to_dict()
    with pytest.raises(ValueError, match="crop"):
        Preprocessing.from_dict({**values, "crop": 3})
    del values["std"]
    with pytest.raises(ValueError, match="std"):
        Preprocessing.from_dict(values)


def test_preprocessing_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        make_preprocessing().size = 3
