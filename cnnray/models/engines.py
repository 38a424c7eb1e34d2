"""Engines: what computes a model's logits. All take uint8 pixels; normalisation is the model's."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from cnnray.models.classifier import Classifier


class Engine(Protocol):
    """Computes logits, and features if it was made for them (``embeddings``)."""

    embeddings: bool

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Logits (B, K) and features (B, D), float32 on any device, of (B, C, H, W) uint8."""


class EagerEngine:
    """The model as it is, in PyTorch's eager mode on a device."""

    def __init__(self, model: Classifier, *, device: torch.device, embeddings: bool) -> None:
        self.model = model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.device = device
        self.embeddings = embeddings

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        if self.device.type == "cuda":  # from pinned memory, beside what is computed meanwhile
            images = images.pin_memory()
        images = images.to(self.device, non_blocking=True, memory_format=torch.channels_last)
        with torch.inference_mode():
            if self.embeddings:
                features, logits = self.model.features_and_logits(images)
                return logits.float(), features.float()
            return self.model(images).float(), None
