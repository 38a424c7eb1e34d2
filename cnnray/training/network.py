"""What is trained: the network and its preprocessing, settled from the dataset's statistics."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from cnnray.datasets.manifest import Statistics
from cnnray.errors import ModelError, SettingsError
from cnnray.images.transforms import Preprocessing
from cnnray.models.bundle import BundleSpec
from cnnray.models.classifier import Classifier
from cnnray.models.registry import OWN_MODELS, build_model, default_preprocessing, head_name
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
        channels = 1 if statistics.channels == 1 and name in OWN_MODELS else 3
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
    dropout: float | None = None  # rates; None: as the model has it
    drop_path: float | None = None

    def build(self, *, with_weights: bool = True) -> Classifier:
        """A classifier of uint8 (B, C, H, W) → logits (B, K).

        ``with_weights`` False leaves the published weights out, for a caller that restores its own.
        Raises ``ModelError``, and ``SettingsError`` for a rate that the model has no place for.
        """
        torch.manual_seed(self.seed)
        num_classes = len(self.classes)
        rates = self._rates()
        try:
            backbone = self._build_backbone(rates.values())
        except ModelError:
            self._refuse_rates(rates)
            raise
        for flag, (_, rate) in rates.items():
            if rate > 0 and not _has_rate(backbone, flag, rate):  # some swallow any argument
                raise self._no_place_for(flag)
        if self.weights is not None and with_weights:
            load_weights(backbone, self.weights, num_classes=num_classes)
        return Classifier(
            backbone,
            mean=self.preprocessing.mean,
            std=self.preprocessing.std,
            frozen_backbone=self.freeze_backbone,
            head=head_name(backbone, num_classes),
        )

    def _rates(self) -> dict[str, tuple[str, float]]:
        """Of each rate that was set, what this model's constructor calls it, and its value."""
        if self.name.startswith("timm/"):
            names = {"dropout": "drop_rate", "drop_path": "drop_path_rate"}
        else:
            dropout = "drop_rate" if "densenet" in self.name else "dropout"
            names = {"dropout": dropout, "drop_path": "stochastic_depth_prob"}
        given = {"dropout": self.dropout, "drop_path": self.drop_path}
        return {flag: (names[flag], rate) for flag, rate in given.items() if rate is not None}

    def _build_backbone(self, rates: Iterable[tuple[str, float]]) -> nn.Module:
        return build_model(
            self.name,
            num_classes=len(self.classes),
            channels=self.preprocessing.channels,
            image_size=self.preprocessing.size,
            **dict(rates),
        )

    def _refuse_rates(self, rates: Mapping[str, tuple[str, float]]) -> None:
        """Raise ``SettingsError`` when it is a rate that the model cannot be built with."""
        self._build_backbone([])
        for flag, rate in rates.items():
            try:
                self._build_backbone([rate])
            except ModelError:
                raise self._no_place_for(flag) from None

    def _no_place_for(self, flag: str) -> SettingsError:
        return SettingsError(
            f"{self.name} has no {flag} that can be set",
            hint=f"leave --model.{flag} out, or choose a model that has it",
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


def _has_rate(backbone: nn.Module, flag: str, rate: float) -> bool:
    """Whether a layer drops as asked, after torchvision's and timm's conventions."""
    if flag == "drop_path":
        kinds = {type(module).__name__ for module in backbone.modules()}
        return not kinds.isdisjoint({"StochasticDepth", "DropPath"})
    return any(
        rate == (module.p if isinstance(module, nn.Dropout) else getattr(module, "drop_rate", None))
        for module in backbone.modules()
    )
