"""A trained-looking toy classifier and the files around it."""

from pathlib import Path

import pytest
import torch

from cnnray.images.transforms import Preprocessing
from cnnray.models.bundle import BundleSpec
from cnnray.models.classifier import Classifier
from cnnray.models.registry import build_model
from cnnray.storage import Store, open_store


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(str(tmp_path / "bundle"))


@pytest.fixture
def spec() -> BundleSpec:
    return BundleSpec(
        architecture="tutorial_cnn",
        arguments={},
        classes=("cat", "dog", "Ä/\u732b"),
        preprocessing=Preprocessing(
            channels=3,
            size=8,
            resize=9,
            interpolation="bilinear",
            mean=(0.4, 0.5, 0.6),
            std=(0.2, 0.25, 0.3),
        ),
        temperature=1.5,
        metrics={"val_accuracy": 0.75},
        provenance={"seed": 7},
    )


@pytest.fixture
def classifier() -> Classifier:
    torch.manual_seed(0)
    backbone = build_model("tutorial_cnn", num_classes=3, channels=3, image_size=8)
    return Classifier(backbone, mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.3), head="head").eval()
