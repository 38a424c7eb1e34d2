"""The interface of all engines, and PyTorch's eager mode, which the others are compared with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor, nn

from cnnray.models.classifier import Classifier


class Engine(Protocol):
    """Computes logits, and features if it was made for them (``embeddings``)."""

    embeddings: bool

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Logits (B, K) and features (B, D), float32 on any device, of (B, C, H, W) uint8."""


class Network(nn.Module):
    """A classifier with the outputs that an engine has: logits, and features with embeddings."""

    def __init__(self, model: Classifier, *, embeddings: bool) -> None:
        super().__init__()
        self.model = model
        self.embeddings = embeddings

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        if not self.embeddings:
            return (self.model(images),)
        features, logits = self.model.features_and_logits(images)
        return logits, features


class EagerEngine:
    """The model in PyTorch's eager mode on a device, in float32 or with bfloat16 autocast."""

    def __init__(
        self, model: Classifier, *, device: torch.device, embeddings: bool, precision: str = "fp32"
    ) -> None:
        model = model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.network: Callable[[Tensor], tuple[Tensor, ...]]
        self.network = Network(model, embeddings=embeddings)
        self.device = device
        self.embeddings = embeddings
        self.is_bf16 = precision == "bf16"

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        if self.device.type == "cuda":  # from pinned memory, beside what is computed meanwhile
            images = images.pin_memory()
        images = images.to(self.device, non_blocking=True, memory_format=torch.channels_last)
        autocast = torch.autocast(self.device.type, torch.bfloat16, enabled=self.is_bf16)
        with torch.inference_mode(), autocast:
            logits, *features = self.network(images)
        return logits.float(), features[0].float() if features else None
