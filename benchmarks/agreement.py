"""B1, agreement: cnnray's labels against the reference transform, on a network with real weights.

EfficientNet-Lite0 with its published weights (timm's ``tf_efficientnet_lite0``). The reference is
PIL's decoder, torchvision's resizing and crop, and the network in plain torch; cnnray's labels come
from ``jobs/classify.py``.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import timm
import torch
from PIL import Image
from safetensors.torch import load_file
from torchvision.transforms import InterpolationMode
from torchvision.transforms._presets import ImageClassification

from benchmarks.bundles import LITE0, write_lite0
from benchmarks.collection import DATA, find_photos, write_table
from benchmarks.harness import Contestant, Figures, SkipBenchmark, race, run_benchmark
from benchmarks.options import add_variants, make_parser, scratch_folder, select, settle
from benchmarks.processes import run_process
from benchmarks.report import Column, Report, describe_machine, publish

COLUMNS = (
    Column("top1_agreement", "top-1 agreement", 4),
    Column("images", "images"),
    Column("mean_confidence_difference", "mean |confidence difference|", 4),
    Column("max_confidence_difference", "max", 4),
)
GOAL = 0.995
DEADLINE_SECONDS = 900


def main(argv: Sequence[str] | None = None) -> int:
    """Compare, print, and return the exit code."""
    parser = make_parser(__doc__, repeats=1)
    parser.add_argument("--images", metavar="FOLDER", help="JPEGs to label")
    parser.add_argument("--weights", metavar="FILE", help="tf_efficientnet_lite0.safetensors")
    add_variants(parser)
    options = settle(parser.parse_args(argv))
    photos = find_photos(options.images)
    weights = Path(options.weights or DATA / "weights" / "tf_efficientnet_lite0.safetensors")
    if not weights.is_file():
        raise SkipBenchmark(f"no weights at {weights}: name the file with --weights")
    machine = describe_machine()
    classes, confidences = reference(weights, photos)
    with scratch_folder(options.scratch) as scratch:
        bundle = write_lite0(weights, scratch / "bundle")
        table = write_table([str(photo) for photo in photos], scratch / "images.parquet")

        def enter(name: str, flags: Sequence[str]) -> Contestant:
            def run() -> Figures:
                labels, ours = label(bundle, table, scratch / "labels", flags)
                difference = np.abs(ours - confidences)
                return {
                    "top1_agreement": float(np.mean(labels == classes)),
                    "images": len(photos),
                    "mean_confidence_difference": float(difference.mean()),
                    "max_confidence_difference": float(difference.max()),
                }

            return Contestant(name, run)

        entered = [enter(name, flags) for name, flags in [("cnnray", []), *options.variant]]
        results = race(select(entered, options.only), repeats=options.repeats)
    report = Report(
        benchmark="agreement with the reference transform (B1)",
        results=results,
        columns=COLUMNS,
        settings={"network": "tf_efficientnet_lite0", "goal": GOAL},
    )
    return publish(report, machine)


def reference(weights: Path, photos: Sequence[Path]) -> tuple[np.ndarray, np.ndarray]:
    """(N,) classes and their probabilities, one image at a time."""
    network = timm.create_model("tf_efficientnet_lite0", pretrained=False).eval()
    network.load_state_dict(load_file(weights))
    transform = ImageClassification(
        crop_size=LITE0.size,
        resize_size=LITE0.resize,
        mean=LITE0.mean,
        std=LITE0.std,
        interpolation=InterpolationMode.BICUBIC,
    )
    with torch.inference_mode():
        probs = [
            network(transform(Image.open(photo).convert("RGB"))[None]).softmax(dim=1)[0]
            for photo in photos
        ]
    confidence, classes = torch.stack(probs).max(dim=1)
    return classes.numpy(), confidence.numpy()


def label(
    bundle: Path, table: Path, output: Path, flags: Sequence[str]
) -> tuple[np.ndarray, np.ndarray]:
    """cnnray's classes and confidences, in the order of the table."""
    command = [sys.executable, "jobs/classify.py", f"--model={bundle}", f"--input={table}"]
    run_process([*command, f"--output={output}", *flags], seconds=DEADLINE_SECONDS)
    rows = pq.read_table(output / "data", columns=["key", "label_index", "confidence"])
    shutil.rmtree(output)
    place = {key: number for number, key in enumerate(rows["key"].to_pylist())}
    order = [place[url] for url in pq.read_table(table)["url"].to_pylist()]
    return rows["label_index"].to_numpy()[order], rows["confidence"].to_numpy()[order]


if __name__ == "__main__":
    run_benchmark(main)
