"""Test-time augmentation: which views there are, and that their probabilities are averaged."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torchvision.transforms import v2

from cnnray.errors import SettingsError
from cnnray.evaluation.views import mean_logits, plan_views, views_of
from cnnray.images.transforms import Preprocessing, fit


def preprocessing(*, size: int = 8, resize: int = 11) -> Preprocessing:
    return Preprocessing(
        channels=3,
        size=size,
        resize=resize,
        interpolation="bilinear",
        mean=(0.5,) * 3,
        std=(0.25,) * 3,
    )


def images(side: int = 8) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (4, 3, side, side), generator=generator).to(torch.uint8)


def network() -> Callable[[torch.Tensor], torch.Tensor]:
    torch.manual_seed(0)
    linear = torch.nn.Linear(3 * 8 * 8, 5)
    return lambda pixels: linear(pixels.float().flatten(1) / 255)


def test_without_it_there_is_one_view_and_the_logits_are_the_models() -> None:
    [view] = views_of(images(), tta="none", size=8)
    assert view.tolist() == images().tolist()
    model = network()
    logits = mean_logits(model, images(), tta="none", size=8, temperature=2.0)
    assert torch.equal(logits, model(images()) / 2.0)


def test_flips_are_the_image_and_its_mirror() -> None:
    image, mirror = views_of(images(), tta="flips", size=8)
    assert torch.equal(image, images())
    assert torch.equal(mirror, v2.functional.horizontal_flip(images()))


def test_crops_are_torchvisions_ten() -> None:
    # of an even margin: of an odd one torchvision's two centres are a pixel apart
    views = list(views_of(images(12), tta="crops", size=8))
    expected = v2.functional.ten_crop(images(12), [8, 8])
    found, wanted = ({view.numpy().tobytes() for view in some} for some in (views, expected))
    assert len(views) == 10
    assert found == wanted


@pytest.mark.parametrize(("tta", "side"), [("flips", 8), ("crops", 11)])
def test_the_probabilities_are_the_mean_of_those_of_the_views(tta: str, side: int) -> None:
    model = network()
    views = list(views_of(images(side), tta=tta, size=8))
    expected = sum(torch.softmax(model(view) / 1.5, dim=1) for view in views) / len(views)
    logits = mean_logits(model, images(side), tta=tta, size=8, temperature=1.5)
    torch.testing.assert_close(logits.exp(), expected)
    torch.testing.assert_close(torch.softmax(logits, dim=1), expected)


def test_the_first_of_the_crops_is_what_the_model_sees_without() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (20, 31, 3)).astype(np.uint8)
    even = preprocessing(resize=12)  # an odd margin is rounded twice, which may move it by a pixel
    plain = fit(pixels, preprocessing=even)
    larger = fit(pixels, preprocessing=plan_views("crops", even))
    assert larger.shape == (3, 12, 12)
    first = next(views_of(torch.from_numpy(larger[None]), tta="crops", size=8))[0]
    np.testing.assert_array_equal(first, plain)


def test_crops_of_an_image_that_is_used_whole_are_refused() -> None:
    with pytest.raises(SettingsError, match="larger than the model's 8 px"):
        plan_views("crops", preprocessing(resize=8))
    assert plan_views("flips", preprocessing(resize=8)) == preprocessing(resize=8)


def test_a_view_without_a_prediction_leaves_none() -> None:
    def model(pixels: torch.Tensor) -> torch.Tensor:
        return torch.full((len(pixels), 5), torch.nan)

    logits = mean_logits(model, images(), tta="flips", size=8, temperature=1.0)
    assert logits.isnan().all()
