"""A small CNN for small images: what the tutorial's network becomes with what came after it."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from cnnray.errors import ModelError

MIN_IMAGE_SIZE = 8
"""Pixels: three poolings of 2 leave one pixel of 8."""
WIDTHS = ((32,), (64, 64), (128, 128))
"""Channels of the convolutions of each stage; a stage ends with a pooling of 2."""
MORE_WIDTHS = (256, 256)
"""Of one more stage, for larger images: what it looks at is then most of the image, too."""
MORE_SIZE = 40
"""Pixels from which an image is larger in this sense."""


class SmallCNN(nn.Module):
    """Classify images with five padded 3x3 convolutions, seven from 40 px on, and a linear layer.

    Each convolution is followed by batch normalisation (Ioffe and Szegedy 2015) and a ReLU; the
    last stage's features are averaged over the image instead of flattened (Lin et al. 2014), so
    that images of any size from 8 px on do, and most weights are where most is seen. ``dropout``
    is the rate before the last layer.

    forward: (B, C, H, W) -> logits (B, K). Raises ``ModelError`` for images below 8 px.
    """

    def __init__(
        self, num_classes: int, channels: int, image_size: int, *, dropout: float = 0.0
    ) -> None:
        super().__init__()
        if image_size < MIN_IMAGE_SIZE:
            raise ModelError(f"small_cnn needs images of {MIN_IMAGE_SIZE} px, got {image_size}")
        stages = (*WIDTHS, MORE_WIDTHS) if image_size >= MORE_SIZE else WIDTHS
        layers: list[nn.Module] = []
        for widths in stages:
            for width in widths:
                layers += _convolution(channels, width)
                channels = width
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(channels, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        x = self.features(images)  # (B, 128, H/8, W/8) or (B, 256, H/16, W/16), rounded down
        x = F.adaptive_avg_pool2d(x, 1).flatten(1)  # (B, 128) or (B, 256)
        logits: Tensor = self.head(self.dropout(x))
        return logits


def _convolution(channels: int, width: int) -> list[nn.Module]:
    convolution = nn.Conv2d(channels, width, 3, padding=1, bias=False)
    nn.init.kaiming_normal_(convolution.weight, mode="fan_out", nonlinearity="relu")
    return [convolution, nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
