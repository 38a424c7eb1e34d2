"""The networks of the labelling benchmarks as cnnray's bundles, with seeded random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from benchmarks.peers.network import LABELS, MEAN, STD
from cnnray.images.transforms import Preprocessing
from cnnray.models.bundle import BundleSpec, save_bundle
from cnnray.models.classifier import Classifier
from cnnray.models.registry import build_model, head_name
from cnnray.storage import open_store

SIZE = 224
LIKE_TORCHVISION = Preprocessing(
    channels=3, size=SIZE, resize=256, interpolation="bilinear", mean=MEAN, std=STD
)
"""What ``ResNet18_Weights.DEFAULT.transforms()`` does."""

LITE0 = Preprocessing(
    channels=3, size=SIZE, resize=256, interpolation="bicubic", mean=(0.5,) * 3, std=(0.5,) * 3
)
"""What the weights of ``tf_efficientnet_lite0`` expect."""

TINY: dict[str, Any] = {
    "patch_size": 32,
    "embed_dim": 16,
    "depth": 0,
    "num_heads": 1,
    "class_token": False,
    "global_pool": "avg",
    "pos_embed": "none",
}
"""A vision transformer without its blocks: 0.06 ms an image, where decoding takes 1.5 ms."""

NETWORKS: dict[str, tuple[str, dict[str, Any]]] = {
    "tiny": ("timm/vit_tiny_patch16_224", TINY),
    "resnet18": ("resnet18", {}),
    "resnet50": ("resnet50", {}),
}


def write_network(name: str, folder: Path) -> Path:
    """The bundle of one of ``NETWORKS`` with seeded random weights."""
    torch.manual_seed(0)
    architecture, arguments = NETWORKS[name]
    return _save(architecture, arguments, LIKE_TORCHVISION, folder)


def write_lite0(weights: Path, folder: Path) -> Path:
    """The bundle of EfficientNet-Lite0 with its published weights."""
    tensors = safetensors.torch.load_file(weights)
    return _save("timm/tf_efficientnet_lite0", {}, LITE0, folder, tensors)


def _save(
    architecture: str,
    arguments: dict[str, Any],
    preprocessing: Preprocessing,
    folder: Path,
    tensors: dict[str, torch.Tensor] | None = None,
) -> Path:
    backbone = build_model(
        architecture, num_classes=len(LABELS), channels=3, image_size=SIZE, **arguments
    )
    if tensors is not None:
        backbone.load_state_dict(tensors)
    head = head_name(backbone, len(LABELS))
    model = Classifier(backbone, mean=preprocessing.mean, std=preprocessing.std, head=head)
    spec = BundleSpec(
        architecture=architecture,
        arguments=arguments,
        classes=tuple(LABELS),
        preprocessing=preprocessing,
    )
    save_bundle(open_store(str(folder)), model.eval(), spec)
    return folder
