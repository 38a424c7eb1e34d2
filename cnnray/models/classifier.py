"""The model as trained, saved and served: normalisation, then the backbone with its head."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from cnnray.errors import ModelError
from cnnray.models.weights import freeze_backbone


class Normalize(nn.Module):
    """Scale pixels of 0 to 255 to the mean and spread that the backbone expects.

    forward: uint8 or float (B, C, H, W) -> float32 (B, C, H, W), (x / 255 - mean) / std.
    ``mean`` and ``std`` are of pixels scaled to [0, 1], one a channel. Raises ``ModelError`` for
    other numbers of channels, which would broadcast silently.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, *, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        if not 0 < len(mean) == len(std):
            raise ModelError(f"normalisation needs a mean and a std a channel: {mean}, {std}")
        self.register_buffer("mean", _per_channel(mean))
        self.register_buffer("std", _per_channel(std))
        if not (self.std > 0).all():
            raise ModelError(f"normalisation needs positive std, got {std}")

    def forward(self, images: Tensor) -> Tensor:
        if images.shape[1] != self.mean.shape[0]:
            raise ModelError(
                f"the model takes {self.mean.shape[0]} channels, got {images.shape[1]}"
            )
        pixels = images.to(torch.float32, copy=True)  # uint8 until here: 4x less to ship
        mean, std = self.mean, self.std
        if _is_interleaved(pixels):
            mean, std = (_row(values, width=pixels.shape[3]) for values in (mean, std))
        return pixels.div_(255).sub_(mean).div_(std)  # in place: fresh memory costs as much again


def _is_interleaved(pixels: Tensor) -> bool:
    """Whether channels lie side by side, where that matters: one channel does in any format."""
    return (
        pixels.shape[1] > 1
        and pixels.device.type == "cpu"
        and pixels.is_contiguous(memory_format=torch.channels_last)
    )


def _row(values: Tensor, *, width: int) -> Tensor:
    """(C, 1, 1) as the (C, 1, W) of a row of interleaved channels.

    Broadcast over it, a step takes a quarter of the time that it takes over C values at a time.
    """
    return values.reshape(1, 1, -1).expand(1, width, -1).contiguous().permute(2, 0, 1)


class Classifier(nn.Module):
    """Map images of 0 to 255 to logits.

    forward: uint8 or float (B, C, H, W) -> logits (B, K). ``head`` names the backbone's final
    layer (``registry.head_name``). With ``frozen_backbone`` only the head learns, and the rest of
    the backbone stays in eval mode while training, so that its batch-norm statistics do not move.
    """

    def __init__(
        self,
        backbone: nn.Module,
        *,
        mean: Sequence[float],
        std: Sequence[float],
        frozen_backbone: bool = False,
        head: str | None = None,
    ) -> None:
        super().__init__()
        self.normalize = Normalize(mean=mean, std=std)
        self.backbone = backbone
        self.head = head
        self.frozen_backbone = frozen_backbone
        if frozen_backbone:
            freeze_backbone(backbone, self._head_name())
            self.train(self.training)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.backbone(self.normalize(images))
        return logits

    def train(self, mode: bool = True) -> Classifier:
        super().train(mode)
        if mode and self.frozen_backbone:
            self.backbone.eval()
            self.backbone.get_submodule(self._head_name()).train()
        return self

    def features_and_logits(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return the head's input (B, D) and the logits (B, K), of one pass.

        An input with positions (a 1x1 convolution's maps) is averaged over them. Raises
        ``ModelError`` when the classifier was built without ``head``. Not for concurrent threads.
        """
        seen: list[Tensor] = []
        head = self.backbone.get_submodule(self._head_name())
        handle = head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        try:
            logits = self(images)
        finally:
            handle.remove()
        return _pooled(seen[-1], is_map=isinstance(head, nn.Conv2d)), logits

    def embed(self, images: Tensor) -> Tensor:
        """Return the head's input: (B, C, H, W) -> (B, D)."""
        return self.features_and_logits(images)[0]

    def _head_name(self) -> str:
        if self.head is None:
            raise ModelError("this classifier was built without the name of its head")
        return self.head


def _pooled(features: Tensor, *, is_map: bool) -> Tensor:
    """Features as (B, D): a convolution has them in dimension 1, a linear layer in the last."""
    if is_map:
        return features.flatten(2).mean(2)
    return features if features.ndim == 2 else features.flatten(1, -2).mean(1)


def _per_channel(values: Sequence[float]) -> Tensor:
    return torch.tensor([float(value) for value in values], dtype=torch.float32).view(-1, 1, 1)
