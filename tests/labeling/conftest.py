"""A toy bundle, saved and loaded as it would be, and images for it."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image

from cnnray.images.transforms import Preprocessing
from cnnray.models.bundle import Bundle, BundleSpec, load_bundle, save_bundle
from cnnray.models.classifier import Classifier
from cnnray.models.registry import build_model
from cnnray.schema import ENTRY_SCHEMA
from cnnray.storage import open_store

CLASSES = ("cat", "dog", "Ä/猫", "owl")


@pytest.fixture
def classifier() -> Classifier:
    torch.manual_seed(0)
    backbone = build_model("tutorial_cnn", num_classes=4, channels=3, image_size=12)
    return Classifier(backbone, mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.3), head="head").eval()


@pytest.fixture
def make_bundle(classifier: Classifier, tmp_path: Path) -> Callable[..., Bundle]:
    def make(temperature: float = 1.0) -> Bundle:
        spec = BundleSpec(
            architecture="tutorial_cnn",
            arguments={},
            classes=CLASSES,
            preprocessing=Preprocessing(
                channels=3,
                size=12,
                resize=14,
                interpolation="bilinear",
                mean=(0.4, 0.5, 0.6),
                std=(0.2, 0.25, 0.3),
            ),
            temperature=temperature,
        )
        store = open_store(str(tmp_path / f"bundle-{temperature}"))
        save_bundle(store, classifier, spec)
        return load_bundle(store)

    return make


@pytest.fixture
def photo() -> Callable[[int], bytes]:
    """A PNG file of noise, 20 wide and 16 high."""

    def make(seed: int) -> bytes:
        pixels = np.random.default_rng(seed).integers(0, 256, (16, 20, 3)).astype(np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "PNG")
        return buffer.getvalue()

    return make


@pytest.fixture
def make_entries() -> Callable[..., pa.Table]:
    def make(keys: list[str], etag: str = "e") -> pa.Table:
        rows = [
            {"key": key, "path": f"{n}", "offset": 0, "length": -1, "etag": etag}
            for n, key in enumerate(keys)
        ]
        return pa.Table.from_pylist(rows, ENTRY_SCHEMA)

    return make
