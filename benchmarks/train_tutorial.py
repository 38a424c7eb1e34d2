"""B3: train the tutorial's network on Fashion-MNIST, batches of 32 and of 256.

Contestants: ``jobs/train.py`` with the recipe fashion-mnist.yaml; a plain PyTorch loop with
everything in memory; Keras, if it is installed (``--keras_python`` names the Python that has it).
Samples a second are the median of the epochs, cnnray's by its own history; all epochs are without
start-up. The recipe flips images and the loops do not: ``--variant 'plain=--augment.flip 0'``.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.harness import Contestant, Ratio, race, run_benchmark
from benchmarks.labelling import num_cores
from benchmarks.options import add_count, add_variants, make_parser, scratch_folder, select, settle
from benchmarks.peers.fashion_mnist import write_part
from benchmarks.report import Report, describe_machine, publish
from benchmarks.training import (
    COLUMNS,
    Dataset,
    add_fashion_mnist,
    find_fashion_mnist,
    pack,
    train_job,
    training_peer,
)

RECIPE = "fashion-mnist"
BATCHES = (32, 256)
VALIDATION = "--split.val=0.05"
"""As the recipe says."""


def main(argv: Sequence[str] | None = None) -> int:
    """Race, print, and return the exit code."""
    options = _parse(argv)
    source = find_fashion_mnist(options.data)
    machine = describe_machine()
    with scratch_folder(options.scratch) as scratch:
        images = source
        if options.images:
            images = scratch / "idx"
            images.mkdir()
            write_part(source, images, split="train", images=options.images)
            write_part(source, images, split="t10k", images=options.images)
        dataset = pack(images, scratch, VALIDATION)
        keras = _keras_version(options.keras_python)
        contestants, skipped = _enter(options, dataset, images, keras=keras)
        results = race(select(contestants, options.only), repeats=options.repeats)
    settings = {"images": dataset.num_train, "epochs": options.epochs}
    settings |= {"epochs of loops": options.loop_epochs, "rounds": options.repeats}
    settings |= {} if keras is None else {"peer": keras}
    report = Report(
        benchmark="train, the tutorial's program (B3)",
        results=results,
        columns=COLUMNS,
        ratios=_ratios([name for name, _ in options.variant]),
        settings=settings,
        skipped=skipped,
    )
    return publish(report, machine)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = make_parser(__doc__)
    add_fashion_mnist(parser)
    parser.add_argument("--images", type=int, help="only the first N images (--short: 6,000)")
    add_count(parser, "--epochs", full=10, short=2, what="epochs of cnnray and Keras at batch 32")
    add_count(parser, "--loop_epochs", full=3, short=2, what="epochs of the others")
    parser.add_argument(
        "--keras_python", metavar="PYTHON", default=sys.executable, help="the Python with Keras"
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    add_variants(parser)
    parser.set_defaults(full_images=None, short_images=6_000)
    return settle(parser.parse_args(argv))


def _enter(
    options: argparse.Namespace, dataset: Dataset, images: Path, *, keras: str | None
) -> tuple[list[Contestant], Mapping[str, str]]:
    gpu = ["--scaling.use_gpu"] if options.device == "cuda" else []
    contestants, skipped = [], {}
    for batch in BATCHES:
        is_tutorial = batch == BATCHES[0]
        epochs = options.epochs if is_tutorial else options.loop_epochs
        for name, flags in [("cnnray", []), *options.variant]:
            job_flags = [f"--epochs={epochs}", f"--global_batch_size={batch}", *gpu, *flags]
            contestants.append(
                train_job(
                    dataset, f"{name}, batch {batch}", RECIPE, *job_flags, evaluated=is_tutorial
                )
            )
        flags = [f"--data={images}", f"--images={dataset.num_train}", f"--batch={batch}"]
        for name, adam in (("loop", []), ("loop, fused Adam", ["--fused"])):
            loop_flags = [*flags, f"--epochs={options.loop_epochs}", *adam]
            loop_flags += [f"--threads={num_cores()}", f"--device={options.device}"]
            name = f"{name}, batch {batch}"
            contestants.append(training_peer(name, "tutorial_loop", *loop_flags))
        if is_tutorial and keras is not None:
            name, keras_flags = f"keras, batch {batch}", [*flags, f"--epochs={options.epochs}"]
            contestants.append(
                training_peer(name, "keras_tutorial", *keras_flags, python=options.keras_python)
            )
        elif is_tutorial:
            skipped["keras"] = "not installed: --keras_python names a Python that has it"
    return contestants, skipped


def _keras_version(python: str) -> str | None:
    """Of Keras and of TensorFlow, as that Python has them; None without Keras."""
    code = (
        "from importlib.metadata import distributions as d;"
        "v = {x.name.lower().replace('_', '-'): x.version for x in d()};"
        "print(*(f'{n} {v[n]}' for n in ('keras', 'tensorflow', 'tensorflow-cpu') if n in v))"
    )
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, timeout=60)
    return done.stdout.strip() if done.stdout.startswith("keras") else None


def _ratios(variants: Sequence[str]) -> list[Ratio]:
    """samples/s against the loops; the time of all epochs against Keras, 1 and more is faster."""
    rate, time = "samples_per_second", "epochs_seconds"
    ratios = []
    for name in ["cnnray", *variants]:
        for batch, goal in zip(BATCHES, (0.85, 0.95), strict=True):
            ours = (f"{name}, batch {batch}",)
            ratios.append(Ratio(rate, ours, (f"loop, batch {batch}",), goal))
            ratios.append(Ratio(rate, ours, (f"loop, fused Adam, batch {batch}",)))
        ours = (f"{name}, batch {BATCHES[0]}",)
        keras = (f"keras, batch {BATCHES[0]}",)
        ratios += [Ratio(rate, ours, keras, 1.0), Ratio(time, keras, ours, 1.0)]
    return ratios


if __name__ == "__main__":
    run_benchmark(main)
