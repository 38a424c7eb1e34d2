"""Images whose colour is their label, and a model that cannot err on them."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image

COLOURS = ("blue", "green", "red")
SIDE = 8


def paint(colour: str, number: int) -> bytes:
    """A noisy PNG of a colour; the number decides its bytes."""
    pixels = np.random.default_rng(number).integers(0, 60, (SIDE, SIDE, 3)).astype(np.uint8)
    pixels[..., 2 - COLOURS.index(colour)] += 180
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def write_images(folder: Path, numbers: range) -> dict[str, str]:
    """Images with awkward names, some of them in sub-folders; key → colour."""
    answers = {}
    for number in numbers:
        colour = COLOURS[number % 3]
        key = f"{number % 4}/{number:06d} %20'ü.png" if number % 4 else f"{number:06d}.png"
        path = folder / key
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(paint(colour, number))
        answers[key] = colour
    return answers


def write_bundle(folder: Path) -> Path:
    """A ``tutorial_cnn`` whose weights are set by hand: it compares the means of the channels."""
    import torch

    from cnnray.images.transforms import Preprocessing
    from cnnray.models.bundle import BundleSpec, save_bundle
    from cnnray.models.classifier import Classifier
    from cnnray.models.registry import build_model
    from cnnray.storage import open_store

    network = build_model("tutorial_cnn", num_classes=3, channels=3, image_size=SIDE)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.zero_()
        for channel in range(3):
            network.conv1.weight[channel, channel, 1, 1] = 1
            network.conv2.weight[channel, channel, 1, 1] = 1
            network.dense.weight[channel, 4 * channel : 4 * channel + 4] = 1 / 4
            network.head.weight[2 - channel, channel] = 20
    model = Classifier(network, mean=(0.0,) * 3, std=(1.0,) * 3, head="head").eval()
    preprocessing = Preprocessing(
        channels=3,
        size=SIDE,
        resize=SIDE,
        interpolation="bilinear",
        mean=(0.0,) * 3,
        std=(1.0,) * 3,
    )
    spec = BundleSpec(
        architecture="tutorial_cnn", arguments={}, classes=COLOURS, preprocessing=preprocessing
    )
    save_bundle(open_store(str(folder)), model, spec)
    return folder
