"""Progressive resizing: early epochs train on smaller images, which cost less.

Images come at their final size and are made smaller on the device, so the decoded images, the
bundle and validation know nothing of it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cnnray.errors import SettingsError

GROWING = 0.8
"""Part of the epochs in which images grow; the rest are trained at the final size."""
MULTIPLE = 4
"""Smaller sizes are multiples of so many pixels."""


@dataclass(frozen=True)
class Resizing:
    """Make (B, C, H, W) images of ``size`` smaller: ``resizing(image, label, step)``.

    The first epoch has ``first`` of the size, each one later more, linearly (Howard 2018, in
    DAWNBench; Tan and Le 2021, arXiv:2104.00298).
    """

    size: int  # pixels
    first: float  # fraction of the size
    epochs: int
    steps_per_epoch: int

    def size_in(self, epoch: int) -> int:
        """Height and width of an epoch's images, pixels."""
        growing = int(GROWING * self.epochs)  # so the last epoch is always a whole one
        if epoch >= growing:
            return self.size
        size = self.size * (self.first + (1 - self.first) * epoch / growing)
        return min(self.size, MULTIPLE * max(1, round(size / MULTIPLE)))

    def __call__(self, image: Tensor, label: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """Images, float32 where they are smaller, and the labels as they are."""
        size = self.size_in(step // self.steps_per_epoch)
        if size == self.size:
            return image, label
        small = F.interpolate(image.float(), (size, size), mode="bilinear", antialias=True)
        return small.contiguous(memory_format=torch.channels_last), label


def require_size(model: nn.Module, *, channels: int, size: int) -> None:
    """Raise ``SettingsError`` when a model cannot take images of this size, pixels."""
    model.eval()
    try:
        with torch.inference_mode():
            model(torch.zeros(1, channels, size, size))
    except Exception as error:
        raise SettingsError(
            f"the model takes no images of {size} px, which progressive resizing begins with",
            hint="raise --image.progressive, or choose a model for any size, such as resnet18",
        ) from error
