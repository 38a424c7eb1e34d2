"""Build a model by name, freshly initialised: nothing here downloads or reads weights."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn

from cnnray.errors import ModelError
from cnnray.models.small import SmallCNN
from cnnray.models.tutorial import TutorialCNN

OWN_MODELS = {"tutorial_cnn": TutorialCNN, "small_cnn": SmallCNN}
"""cnnray's own, by name. They have no published weights, and take grey images as they are."""

MAX_IMAGE_SIZE = 2048
"""Pixels: layers that flatten an image grow with its square, beyond this to many gigabytes."""

OWN_ARGUMENTS = frozenset(
    {"name", "num_classes", "channels", "image_size", "in_chans", "img_size", "input_size"}
    | {"weights", "checkpoint_path", "cache_dir", "aux_logits", "features_only", "device", "dtype"}
)
"""Arguments that cnnray sets itself, or that would read files, download or drop the head."""

HALF_NORMALISED = ("inception_v3", "googlenet")
"""Their torchvision weights were trained on pixels in [-1, 1]: torchvision converts the ImageNet
normalisation inside the pretrained model (``transform_input``), which is the same function."""


@dataclass(frozen=True, slots=True)
class PretrainedInput:
    """What a model's published weights expect to see.

    ``size``: pixels of the square crop. ``crop_fraction``: crop over resized shorter side.
    ``mean``, ``std``: of RGB pixels scaled to [0, 1].
    """

    size: int
    crop_fraction: float
    interpolation: str
    mean: tuple[float, ...]
    std: tuple[float, ...]


def list_models() -> list[str]:
    """List the names that ``build_model`` takes; timm's only when it is installed."""
    names = [*OWN_MODELS, *_torchvision_models()]
    try:
        return names + [f"timm/{name}" for name in _timm().list_models()]
    except ModelError:
        return names


def build_model(
    name: str, *, num_classes: int, channels: int, image_size: int, **arguments: Any
) -> nn.Module:
    """Build a freshly initialised classifier of K = ``num_classes``, and try it on one image.

    ``name``: one of ``OWN_MODELS``, a torchvision classification model (``resnet18`` or
    ``torchvision/resnet18``) or ``timm/<name>``. ``arguments`` go to its constructor.
    forward: normalised float (B, C, H, W) with H = W = ``image_size`` -> logits (B, K).
    Raises ``ModelError`` for unknown names, refused arguments and sizes the model cannot take.
    """
    check_arguments(arguments)
    family, plain = _resolve(name)
    if num_classes < 1 or channels < 1 or not 1 <= image_size <= MAX_IMAGE_SIZE:
        raise ModelError(
            f"{name}: no model of {channels} x {image_size} px images and {num_classes} classes",
            hint=f"images have 1 to {MAX_IMAGE_SIZE} px and at least one channel and class",
        )
    build = {"own": _build_own, "torchvision": _build_torchvision, "timm": _build_timm}
    try:
        model = build[family](plain, num_classes, channels, image_size, arguments)
        _check_output(model, shape=(1, channels, image_size, image_size), num_classes=num_classes)
    except ModelError:
        raise
    except Exception as error:  # constructors and layers raise whatever they like
        reason = " ".join(str(error).split())[:200]
        raise ModelError(
            f"{name} does not work for {channels} x {image_size} px images: {reason}",
            hint="check the image size and the model's arguments",
        ) from error
    return model


def check_arguments(arguments: Mapping[str, Any]) -> None:
    """Raise ``ModelError`` for constructor arguments that cnnray sets itself or that load files."""
    for name in arguments:
        if name in OWN_ARGUMENTS or name.startswith("pretrained"):
            raise ModelError(f"model argument {name!r} is not allowed: cnnray sets or refuses it")


def head_name(model: nn.Module, num_classes: int) -> str:
    """Name the final classifier: the module that computes the K logits, as a dotted path.

    timm models say which one it is; elsewhere it is the last Linear or 1x1 Conv2d with K outputs.
    Raises ``ModelError`` when there is none, or more than one (distilled models).
    """
    matches: list[str]
    if callable(get_classifier := getattr(model, "get_classifier", None)):
        classifier = get_classifier()
        matches = [name for name, module in model.named_modules() if module is classifier]
    else:
        matches = [name for name, m in model.named_modules() if _num_outputs(m) == num_classes]
    if not matches or not matches[-1]:
        raise ModelError(
            f"{type(model).__name__} has no single classifier layer with {num_classes} outputs",
            hint="choose a model with one classification head",
        )
    return matches[-1]


def stem_name(model: nn.Module) -> str | None:
    """Name the convolution that sees the image: the first Conv2d, as a dotted path."""
    return next((n for n, m in model.named_modules() if isinstance(m, nn.Conv2d)), None)


def default_preprocessing(name: str, *, pretrained: bool) -> PretrainedInput:
    """Describe the input that a model's published weights expect.

    torchvision: of its recommended weights; timm: of its default configuration. Without
    ``pretrained`` only the size is theirs, and pixels are scaled to [-1, 1] without cropping.
    cnnray's own have no published weights: they see 28 px images in [0, 1], as in Keras.
    Raises ``ModelError`` for unknown names.
    """
    family, plain = _resolve(name)
    if family == "own":
        return PretrainedInput(28, 1.0, "bilinear", mean=(0.0,) * 3, std=(1.0,) * 3)
    published = _torchvision_input(plain) if family == "torchvision" else _timm_input(plain)
    if pretrained:
        return published
    return PretrainedInput(published.size, 1.0, "bilinear", mean=(0.5,) * 3, std=(0.5,) * 3)


def _resolve(name: str) -> tuple[str, str]:
    """The family of a model and its name there."""
    if name in OWN_MODELS:
        return "own", name
    family, _, plain = name.rpartition("/")
    if family in ("", "torchvision") and plain in _torchvision_models():
        return "torchvision", plain
    if family == "timm" and plain in _timm_models():
        return "timm", plain
    close = difflib.get_close_matches(name[:100].removeprefix("torchvision/"), list_models(), n=3)
    hint = f"did you mean {' or '.join(close)}?" if close else "cnnray builds torchvision and timm"
    raise ModelError(f"unknown model {name[:100]!r}", hint=hint)


def _torchvision_models() -> list[str]:
    models = _torchvision().models
    return cast(list[str], models.list_models(module=models))


def _torchvision() -> Any:
    import torchvision  # a second, which those who need none of its models do not wait

    return torchvision


def _timm_models() -> set[str]:
    """timm's names, plain and with the tag of their weights (``resnet18.a1_in1k``)."""
    timm = _timm()
    return {*timm.list_models(), *timm.list_models(pretrained=True)}


def _timm() -> Any:
    try:
        import timm
    except ImportError as error:
        raise ModelError(
            "timm models need timm, which is not installed", hint="pip install 'cnnray[timm]'"
        ) from error
    return timm


def _build_own(
    name: str, num_classes: int, channels: int, image_size: int, arguments: Mapping[str, Any]
) -> nn.Module:
    model = OWN_MODELS[name]
    known = set(inspect.signature(model).parameters)
    if unknown := sorted(set(arguments) - known):
        raise ModelError(f"{name} does not take the arguments {unknown}")
    return cast(nn.Module, model(num_classes, channels, image_size, **arguments))


def _build_torchvision(
    name: str, num_classes: int, channels: int, image_size: int, arguments: Mapping[str, Any]
) -> nn.Module:
    if channels not in (1, 3):
        raise ModelError(f"{name} takes images of 1 or 3 channels, got {channels}")
    fixed: dict[str, Any] = {}
    if name.startswith("vit_"):
        fixed = {"image_size": image_size}
    elif name == "maxvit_t":
        fixed = {"input_size": (image_size, image_size)}
    elif name in HALF_NORMALISED:
        fixed = {"aux_logits": False, "init_weights": True}  # as in their papers
    model: nn.Module = _torchvision().models.get_model(
        name, weights=None, num_classes=num_classes, **(fixed | dict(arguments))
    )
    if channels == 1:
        _make_grey(model)
    return model


def _make_grey(model: nn.Module) -> None:
    """Turn the stem into that of a 1-channel model which does what the old one did to R = G = B."""
    stem = model.get_submodule(stem_name(model) or "")
    assert isinstance(stem, nn.Conv2d)
    stem.weight = nn.Parameter(stem.weight.detach().sum(1, keepdim=True))
    stem.in_channels = 1


def _build_timm(
    name: str, num_classes: int, channels: int, image_size: int, arguments: Mapping[str, Any]
) -> nn.Module:
    timm = _timm()
    config = timm.models.get_pretrained_cfg(name)
    fixed = {"img_size": image_size} if config and config.fixed_input_size else {}
    model = timm.create_model(
        name,
        pretrained=False,
        num_classes=num_classes,
        in_chans=channels,
        **fixed,
        **arguments,
    )
    return cast(nn.Module, model)


def _check_output(model: nn.Module, *, shape: tuple[int, ...], num_classes: int) -> None:
    """Run one black image: many networks shrink small images to nothing, and say so only then."""
    was_training = model.training
    device = next(model.parameters()).device
    if device.type == "meta":  # a skeleton without numbers
        return
    with torch.no_grad():
        logits = model.eval()(torch.zeros(shape, device=device))
    model.train(was_training)
    if not isinstance(logits, torch.Tensor) or logits.shape != (1, num_classes):
        raise ModelError(f"{type(model).__name__} does not return ({num_classes},) logits an image")


def _num_outputs(module: nn.Module) -> int | None:
    if isinstance(module, nn.Linear):
        return module.out_features
    if isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1):
        return module.out_channels
    return None


def _torchvision_input(name: str) -> PretrainedInput:
    transform = _torchvision().models.get_model_weights(name).DEFAULT.transforms()
    half = (0.5, 0.5, 0.5)
    return PretrainedInput(
        size=transform.crop_size[0],
        crop_fraction=transform.crop_size[0] / transform.resize_size[0],
        interpolation=transform.interpolation.value,
        mean=half if name in HALF_NORMALISED else tuple(transform.mean),
        std=half if name in HALF_NORMALISED else tuple(transform.std),
    )


def _timm_input(name: str) -> PretrainedInput:
    config = _timm().models.get_pretrained_cfg(name)
    if config is None:
        raise ModelError(f"timm does not say what input {name!r} expects")
    return PretrainedInput(
        size=config.input_size[-1],
        crop_fraction=config.crop_pct,
        interpolation=config.interpolation,
        mean=tuple(config.mean),
        std=tuple(config.std),
    )
