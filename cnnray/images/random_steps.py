"""Random crops, colours and policies: torchvision's, which takes seconds to import."""

from __future__ import annotations

from torch import nn
from torchvision.transforms import v2

from cnnray.images.transforms import Preprocessing
from cnnray.options import Augmentation


def build_window(
    preprocessing: Preprocessing, augmentation: Augmentation
) -> v2.RandomResizedCrop | None:
    """A part of the image as it was decoded, resized; None for the whole."""
    if augmentation.crop != "random_resized":
        return None
    return v2.RandomResizedCrop(
        preprocessing.size,
        scale=(augmentation.scale_min, 1.0),
        ratio=(1 / augmentation.ratio_max, augmentation.ratio_max),
        interpolation=v2.InterpolationMode(preprocessing.interpolation),
        antialias=True,
    )


def build_steps(preprocessing: Preprocessing, augmentation: Augmentation) -> list[nn.Module]:
    """What happens to an image after it was shifted and flipped."""
    mean_color = [255 * value for value in preprocessing.mean]
    steps: list[nn.Module] = []
    if augmentation.rotation:
        bilinear = v2.InterpolationMode.BILINEAR
        steps.append(v2.RandomRotation(augmentation.rotation, bilinear, fill=mean_color))
    steps += _policy_steps(augmentation, mean_color)
    if strength := augmentation.color_jitter:
        steps.append(v2.ColorJitter(strength, strength, strength, strength / 4))
    if augmentation.erasing:
        steps.append(v2.RandomErasing(augmentation.erasing, value=mean_color))
    return steps


def _policy_steps(augmentation: Augmentation, fill: list[float]) -> list[nn.Module]:
    bilinear = v2.InterpolationMode.BILINEAR
    if augmentation.policy == "randaugment":
        ops, magnitude = augmentation.policy_ops, augmentation.policy_magnitude
        return [v2.RandAugment(ops, magnitude, interpolation=bilinear, fill=fill)]
    if augmentation.policy == "trivialaugment":
        return [v2.TrivialAugmentWide(interpolation=bilinear, fill=fill)]
    if augmentation.policy == "augmix":
        severity = max(1, round(augmentation.policy_magnitude / 3))  # of 10; the paper's is 3
        return [v2.AugMix(severity, interpolation=bilinear, fill=fill)]
    return []
