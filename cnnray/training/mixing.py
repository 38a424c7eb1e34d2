"""MixUp and CutMix: whole batches mixed with themselves on the device, labels as well.

What happens in a step is drawn by (seed, step) alone, never from torch's global state, so a resumed
run repeats it. Ranks mix in the same way, each within its own part of the global batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cnnray.training.losses import distribution

STREAM = 0x6D6978
"""Sets these draws apart from others of the same seed, such as the order's of (seed, epoch)."""

Box = tuple[int, int, int, int]
"""Top, bottom, left, right; pixels, half open."""


@dataclass(frozen=True)
class Mixing:
    """Mix (B, C, H, W) images and their labels: ``mixing(image, label, step)``.

    Each sample keeps the part λ, drawn from Beta(alpha, alpha) once a step, and takes the rest from
    another sample of the batch: by a weighted mean (``mixup_alpha``, Zhang et al. 2018,
    arXiv:1710.09412) or as a rectangle (``cutmix_alpha``, Yun et al. 2019, arXiv:1905.04899). With
    both, either is as likely. ``probability`` is that of a step to be mixed at all.
    """

    num_classes: int
    seed: int
    mixup_alpha: float = 0.0
    cutmix_alpha: float = 0.0
    probability: float = 1.0

    def __call__(self, image: Tensor, label: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """Images, float32 where they are means, and (B, K) targets; or both as they were."""
        draws = np.random.default_rng((self.seed, step, STREAM))
        if draws.random() >= self.probability or len(label) < 2:
            return image, label
        has_both = self.mixup_alpha > 0 and self.cutmix_alpha > 0
        cuts = draws.random() < 0.5 if has_both else self.cutmix_alpha > 0
        alpha = self.cutmix_alpha if cuts else self.mixup_alpha
        kept = draws.beta(alpha, alpha)
        corner = draws.random(2)
        shift = int(draws.integers(1, len(label)))  # last: it alone depends on the size of the part
        if cuts:
            height, width = image.shape[2:]
            box = cut_box(kept, corner, height=height, width=width)
            kept = 1 - (box[1] - box[0]) * (box[3] - box[2]) / (height * width)
            image = paste(image, box, shift=shift)
        else:
            image = blend(image, kept, shift=shift)
        return image, blend(distribution(label, self.num_classes), kept, shift=shift)


def blend(values: Tensor, kept: float, *, shift: int) -> Tensor:
    """(B, …) ``kept`` of each sample and the rest of the one ``shift`` before it, as float32."""
    values = values.float()
    return torch.lerp(values.roll(shift, 0), values, kept)


def paste(image: Tensor, box: Box, *, shift: int) -> Tensor:
    """(B, C, H, W) images with a rectangle of the one ``shift`` before each."""
    top, bottom, left, right = box
    mixed = image.clone()
    mixed[..., top:bottom, left:right] = image[..., top:bottom, left:right].roll(shift, 0)
    return mixed


def cut_box(kept: float, center: np.ndarray, *, height: int, width: int) -> Box:
    """A rectangle of the image's shape and 1 - ``kept`` of its area, cut off at the edges.

    ``center`` is two numbers in [0, 1); rounding down leaves it a little smaller.
    """
    half = 0.5 * (1 - kept) ** 0.5
    y, x = (int(part * side) for part, side in zip(center, (height, width), strict=True))
    high, wide = int(half * height), int(half * width)
    return max(0, y - high), min(height, y + high), max(0, x - wide), min(width, x + wide)
