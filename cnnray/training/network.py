"""What is trained: the network and its preprocessing, settled from the dataset's statistics."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from cnnray.datasets.manifest import Statistics
from cnnray.errors import ModelError
from cnnray.images.transforms import Preprocessing
from cnnray.models.bundle import BundleSpec
from cnnray.models.classifier import Classifier
from cnnray.models.registry import build_model, default_preprocessing, head_name
from cnnray.models.weights import load_weights


def plan_preprocessing(
    name: str,
    statistics: Statistics,
    *,
    pretrained: bool,
    size: int | None = None,
    resize: int | None = None,
    interpolation: str | None = None,
    channels: int | None = None,
) -> Preprocessing:
    """Settle what the user left open.

    Pretrained weights bring their own normalisation, filter and crop; a network from scratch is
    normalised by the training split's mean and std. Images that are all the same small square keep
    their size. Raises ``ModelError`` when the settings contradict each other.
    """
    published = default_preprocessing(name, pretrained=pretrained)
    common = statistics.common_size
    if channels is None:
        channels = 1 if statistics.channels == 1 and name == "tutorial_cnn" else 3
    if size is None:
        size = common if not pretrained and common and common <= published.size else published.size
    if resize is None:
        crop_fraction = published.crop_fraction if pretrained else 0.875
        resize = size if common == size else round(size / crop_fraction)
    mean, std = published.mean, published.std
    if not pretrained:
        mean, std = statistics.mean, statistics.std
    try:
        return Preprocessing(
            channels=channels,
            size=size,
            resize=resize,
            interpolation=interpolation or (published.interpolation if pretrained else "bilinear"),
            mean=_for_channels(mean, channels),
            std=_for_channels(std, channels),
        )
    except ValueError as error:
        raise ModelError(
            f"image settings: {error}", hint="see --image.size and --image.resize"
        ) from None


def _for_channels(values: tuple[float, ...], channels: int) -> tuple[float, ...]:
    if len(values) == channels:
        return values
    return (sum(values) / len(values),) * channels


@dataclass(frozen=True)
class Network:
    """How to build the classifier, on any worker, with the same initial weights."""

    name: str
    classes: tuple[str, ...]
    preprocessing: Preprocessing
    weights: str | None
    freeze_backbone: bool
    seed: int

    def build(self, *, with_weights: bool = True) -> Classifier:
        """A classifier of uint8 (B, C, H, W) → logits (B, K).

        ``with_weights`` False leaves the published weights out, for a caller that restores its own.
        """
        torch.manual_seed(self.seed)
        num_classes = len(self.classes)
        backbone = build_model(
            self.name,
            num_classes=num_classes,
            channels=self.preprocessing.channels,
            image_size=self.preprocessing.size,
        )
        if self.weights is not None and with_weights:
            load_weights(backbone, self.weights, num_classes=num_classes)
        return Classifier(
            backbone,
            mean=self.preprocessing.mean,
            std=self.preprocessing.std,
            frozen_backbone=self.freeze_backbone,
            head=head_name(backbone, num_classes),
        )

    def describe(self, *, metrics: dict[str, object], provenance: dict[str, object]) -> BundleSpec:
        """What the bundle will say of this network."""
        return BundleSpec(
            architecture=self.name,
            arguments={},
            classes=self.classes,
            preprocessing=self.preprocessing,
            metrics=metrics,
            provenance=provenance,
        )
