"""The small CNN of the Keras image-classification tutorial."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from cnnray.errors import ModelError

MIN_IMAGE_SIZE = 4
"""Pixels: two poolings of 2 leave one pixel of 4."""

MIN_VALID_SIZE = 10
"""Pixels: two unpadded 3x3 convolutions and two poolings leave one pixel of 10, none of 9."""


class TutorialCNN(nn.Module):
    """Classify images with two convolutions and two dense layers.

    Conv 3x3 32, pool 2, Conv 3x3 64, pool 2, Dense 64, Dense K, each but the last followed by its
    ReLU. From 10 px the convolutions are unpadded, as in the tutorial; from 4 to 9 px they are
    padded by one pixel, because unpadded ones would leave nothing to flatten.

    forward: (B, C, H, W) with H = W = ``image_size`` -> logits (B, K). Raises ``ModelError`` for
    images below 4 px. Source: the Keras tutorial on image classification.
    """

    def __init__(self, num_classes: int, channels: int, image_size: int) -> None:
        super().__init__()
        if image_size < MIN_IMAGE_SIZE:
            raise ModelError(f"tutorial_cnn needs images of {MIN_IMAGE_SIZE} px, got {image_size}")
        padding = 0 if image_size >= MIN_VALID_SIZE else 1
        self.conv1 = nn.Conv2d(channels, 32, 3, padding=padding)
        self.conv2 = nn.Conv2d(32, 64, 3, padding=padding)
        side = image_size
        for _ in range(2):
            side = (side - 2 + 2 * padding) // 2
        self.dense = nn.Linear(64 * side * side, 64)
        self.head = nn.Linear(64, num_classes)
        self._initialise()

    def _initialise(self) -> None:
        """Draw weights as Keras does, so that a run can be compared with the tutorial's.

        Glorot uniform, ±sqrt(6 / (fan in + fan out)) (Glorot and Bengio, 2010), and zero biases.
        PyTorch's default is another distribution, ±1 / sqrt(fan in), for biases too.
        """
        for layer in (self.conv1, self.conv2, self.dense, self.head):
            nn.init.xavier_uniform_(layer.weight)
            assert layer.bias is not None
            nn.init.zeros_(layer.bias)

    def forward(self, images: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.conv1(images)), 2)  # (B, 32, H/2, W/2), rounded down
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)  # (B, 64, H/4, W/4), rounded down
        x = F.relu(self.dense(x.flatten(1)))  # (B, 64)
        logits: Tensor = self.head(x)
        return logits
