"""Test-time augmentation: an image's prediction is the mean of those of several views of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from cnnray.errors import SettingsError
from cnnray.images.transforms import Preprocessing

DESCRIPTIONS = {
    "flips": "mean of the probabilities of each image and its mirror image",
    "crops": "mean of the probabilities of five crops of each image and their mirror images",
}


def plan_views(tta: str, preprocessing: Preprocessing) -> Preprocessing:
    """How images are to be fitted for ``views_of``: crops are taken from larger ones.

    Raises ``SettingsError`` where the model's crop is the whole image.
    """
    if tta != "crops":
        return preprocessing
    if preprocessing.size == preprocessing.resize:
        raise SettingsError(
            f"--tta crops takes crops of images larger than the model's {preprocessing.size} px",
            hint="--tta flips, or train with --image.resize above --image.size",
        )
    return replace(preprocessing, size=preprocessing.resize)


def views_of(images: Tensor, *, tta: str, size: int) -> Iterator[Tensor]:
    """(B, C, size, size) views of (B, C, H, W) images: themselves, with their mirrors, or these of
    the centre and the corners (the ten views of Krizhevsky et al. 2012).
    """
    for view in _crops(images, size=size) if tta == "crops" else [images]:
        yield view
        if tta != "none":
            yield view.flip(3)


def _crops(images: Tensor, *, size: int) -> Iterator[Tensor]:
    bottom, right = (side - size for side in images.shape[2:])
    corners = [(0, 0), (0, right), (bottom, 0), (bottom, right)]
    for top, left in [(round(bottom / 2), round(right / 2)), *corners]:
        yield images[..., top : top + size, left : left + size]


def mean_logits(
    model: Callable[[Tensor], Tensor], images: Tensor, *, tta: str, size: int, temperature: float
) -> Tensor:
    """(B, K) logits of one view, or the logarithms of the mean probabilities of several."""
    logits = [model(view).float() / temperature for view in views_of(images, tta=tta, size=size)]
    if len(logits) == 1:
        return logits[0]
    log_probs = torch.stack([one.log_softmax(dim=1) for one in logits])  # (views, B, K)
    return log_probs.logsumexp(dim=0) - math.log(len(logits))
