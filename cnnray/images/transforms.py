"""Fit decoded pixels to a model's input: short side, centre crop. Nothing random happens here.

All in uint8, (C, size, size) on the wire; normalisation by ``mean`` and ``std`` is the model's
first layer. C channels, H height, W width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch

from cnnray.images.decode import decode_image
from cnnray.options import DEFAULT_LIMITS, DecodeLimits

INTERPOLATIONS = ("bilinear", "bicubic")

MAX_SIDE = 8192
MAX_ASPECT = 8
"""Of longer images only the middle is resized: the crop cannot see the rest."""


@dataclass(frozen=True, slots=True)
class Preprocessing:
    """What a model expects of its input; travels in its bundle.

    ``size``: height and width in pixels; ``resize``: short side before the centre crop, in pixels;
    ``mean`` and ``std``: one a channel, of values in [0, 1]. Raises ``ValueError``.
    """

    channels: int
    size: int
    resize: int
    interpolation: str
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __post_init__(self) -> None:
        if not all(type(value) is int for value in (self.channels, self.size, self.resize)):
            raise ValueError("channels, size and resize must be whole numbers")
        if self.channels not in (1, 3):
            raise ValueError(f"channels must be 1 or 3, got {self.channels}")
        if not 1 <= self.size <= self.resize <= MAX_SIDE:
            raise ValueError(
                f"want 1 <= size <= resize <= {MAX_SIDE}, got {self.size} and {self.resize}"
            )
        if self.interpolation not in INTERPOLATIONS:
            raise ValueError(
                f"interpolation must be bilinear or bicubic, got {self.interpolation!r}"
            )
        for name, values in (("mean", self.mean), ("std", self.std)):
            if not isinstance(values, tuple) or len(values) != self.channels:
                raise ValueError(f"{name} must hold {self.channels} values, got {values!r}")
            if not all(isinstance(v, int | float) and math.isfinite(v) for v in values):
                raise ValueError(f"{name} must hold finite numbers, got {values!r}")
        if min(self.std) <= 0:
            raise ValueError(f"std must be positive, got {self.std}")

    def to_dict(self) -> dict[str, Any]:
        """The values as JSON knows them."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {**values, "mean": list(self.mean), "std": list(self.std)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Preprocessing:
        """The inverse of ``to_dict``. Raises ``ValueError`` for unknown or missing keys."""
        names = {field.name for field in fields(cls)}
        if set(values) != names:
            wrong = sorted(map(str, set(values) ^ names))
            raise ValueError(f"unknown or missing preprocessing keys: {', '.join(wrong)}")
        sequences = {
            name: tuple(values[name]) if isinstance(values[name], list) else values[name]
            for name in ("mean", "std")
        }
        return cls(**{**values, **sequences})


def min_side(preprocessing: Preprocessing) -> int:
    """Pixels that the short side of a large image should have before ``fit``, at least.

    Three times what it will have after: of 400 photos of 3000 px, EfficientNet-Lite0 then labels
    399 as it does without a reduction while decoding (with twice as many, 396).
    """
    return 3 * preprocessing.resize


def fit(pixels: np.ndarray, *, preprocessing: Preprocessing) -> np.ndarray:
    """Resize the short side of (H, W, C) uint8 pixels, antialiased, and crop the centre.

    Returns (C, size, size) uint8, C-contiguous: what torchvision's ``resize`` and ``center_crop``
    return, without the second that importing torchvision takes every worker. Pixels whose short
    side is right are not touched.
    """
    return np.ascontiguousarray(fit_view(pixels, preprocessing=preprocessing))


def fit_view(pixels: np.ndarray, *, preprocessing: Preprocessing) -> np.ndarray:
    """The same as a view of whatever memory it is in, for who copies it elsewhere anyway."""
    pixels = _middle(pixels)
    if (short := min(pixels.shape[:2])) != preprocessing.resize:
        # As a batch of one in channels-last order: any other is packed and unpacked on the way.
        resized = torch.nn.functional.interpolate(
            as_tensor(pixels.reshape(1, *pixels.shape)).permute(0, 3, 1, 2),
            [preprocessing.resize * side // short for side in pixels.shape[:2]],
            mode=preprocessing.interpolation,
            antialias=True,
        )
        image = resized[0].numpy()  # (C, H, W)
    else:
        image = np.moveaxis(pixels, 2, 0)
    size = preprocessing.size
    top, left = (round((side - size) / 2) for side in image.shape[1:])
    view: np.ndarray = image[:, top : top + size, left : left + size]
    return view


def as_tensor(image: np.ndarray) -> torch.Tensor:
    """Share the memory of an array with torch, or copy it if it is read-only."""
    return torch.from_numpy(np.require(image, requirements="W"))


def _middle(pixels: np.ndarray) -> np.ndarray:
    """Cut a very long image to ``MAX_ASPECT`` about its centre: 1 x 20000 would become huge.

    As many pixels go from either end, so that the centre stays where it was.
    """
    height, width = pixels.shape[:2]
    longest = MAX_ASPECT * min(height, width)
    top, left = max(0, (height - longest) // 2), max(0, (width - longest) // 2)
    return pixels[top : height - top, left : width - left]


@dataclass(frozen=True, slots=True)
class EvalTransform:
    """Decode and fit: what evaluation and labelling feed a model."""

    preprocessing: Preprocessing
    limits: DecodeLimits = DEFAULT_LIMITS

    def __call__(self, data: bytes) -> np.ndarray:
        """(C, size, size) uint8. Raises ``ImageError``."""
        decoded = decode_image(
            data,
            channels=self.preprocessing.channels,
            limits=self.limits,
            min_side=min_side(self.preprocessing),
        )
        return fit(decoded.pixels, preprocessing=self.preprocessing)
