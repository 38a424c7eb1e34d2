"""B4: train ResNet-18 at 128 px from encoded colour images, random resized crops and flips.

Contestants: ``jobs/train.py`` with the recipe flowers-scratch.yaml on one and on two workers; and
the same training step fed with one batch that is in memory. Samples a second are the median of the
epochs by the job's own history.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import yaml

from benchmarks.collection import DATA, find_photos
from benchmarks.harness import Contestant, Ratio, race, run_benchmark
from benchmarks.labelling import num_cores
from benchmarks.options import add_count, add_variants, make_parser, scratch_folder, select, settle
from benchmarks.processes import ROOT
from benchmarks.report import Report, describe_machine, publish
from benchmarks.training import COLUMNS, Dataset, pack, train_job, training_peer

RECIPE = "flowers-scratch"
WORKERS = (1, 2)
GOAL = 0.9


def main(argv: Sequence[str] | None = None) -> int:
    """Race, print, and return the exit code."""
    options = _parse(argv)
    photos = find_photos(options.images, name="flowers")
    machine = describe_machine()
    with scratch_folder(options.scratch) as scratch:
        images = Path(options.images or DATA / "flowers")
        if options.count:
            images = _take(images, photos, options.count, scratch / "images")
        dataset = pack(images, scratch)
        contestants = _enter(options, dataset)
        results = race(select(contestants, options.only), repeats=options.repeats)
    settings = {"images": dataset.num_train, "epochs": options.epochs, "steps": options.steps}
    names = ["cnnray", *(name for name, _ in options.variant)]
    report = Report(
        benchmark="train from encoded colour images (B4)",
        results=results,
        columns=COLUMNS[:-1],  # accuracy is another matter
        ratios=[
            Ratio(
                "samples_per_second",
                (_name(name, workers),),
                (_name("limit: cached batch", workers),),
                GOAL,
            )
            for name in names
            for workers in options.workers
        ],
        settings={**settings, "device": options.device, "rounds": options.repeats},
    )
    return publish(report, machine)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("--images", metavar="FOLDER", help="photos, one folder for each class")
    parser.add_argument("--count", type=int, help="only N images (--short: 300)")
    add_count(parser, "--epochs", full=3, short=2, what="epochs")
    add_count(parser, "--steps", full=40, short=5, what="steps with the cached batch")
    parser.add_argument("--workers", type=int, nargs="+", default=WORKERS, help="1 2")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    add_variants(parser)
    parser.set_defaults(full_count=None, short_count=300)
    return settle(parser.parse_args(argv))


def _take(root: Path, photos: Sequence[Path], count: int, folder: Path) -> Path:
    """Links to ``count`` photos of all classes in the same folders."""
    for photo in photos[:: max(1, len(photos) // count)][:count]:
        link = folder / photo.relative_to(root.resolve())
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(photo)
    return folder


def _enter(options: argparse.Namespace, dataset: Dataset) -> list[Contestant]:
    recipe = yaml.safe_load((ROOT / f"jobs/configs/{RECIPE}.yaml").read_text(encoding="utf-8"))
    gpu = ["--scaling.use_gpu"] if options.device == "cuda" else []
    contestants = []
    for workers in options.workers:
        job_flags = [f"--epochs={options.epochs}", f"--scaling.num_workers={workers}", *gpu]
        contestants += [
            train_job(dataset, _name(name, workers), RECIPE, *job_flags, *flags)
            for name, flags in [("cnnray", []), *options.variant]
        ]
        step = {
            "classes": dataset.num_classes,
            "size": recipe["image"]["size"],
            "batch": recipe["global_batch_size"],
            "steps": options.steps,
            "workers": workers,
            "threads": max(1, num_cores() // workers),  # as the job sets them
            "device": options.device,
        }
        flags = [f"--{name}={value}" for name, value in step.items()]
        name = _name("limit: cached batch", workers)
        contestants.append(training_peer(name, "cached_step", *flags))
    return contestants


def _name(contestant: str, workers: int) -> str:
    return f"{contestant}, {workers} worker{'s' if workers > 1 else ''}"


if __name__ == "__main__":
    run_benchmark(main)
