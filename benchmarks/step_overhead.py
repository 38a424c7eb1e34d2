"""B7: what cnnray adds to a small training step: its loop and feeder against a plain loop.

The tutorial's network on grey images of 28 px in memory, batches of 32, on the CPU and without Ray:
``run_epochs`` fed as a worker feeds it (units shuffled and flipped, assembled, prefetched) with the
settings of the recipe fashion-mnist.yaml, against the loop of B3. All train in one process, an
epoch each in turn; a round is short, so that what else the machine does falls on all of them.
Pixels are noise, for which a step takes as long. CPU time is that of the whole process, or of the
thread that trains; where cores are shared it says more than the clock does (with --threads 1 most
of all: torch's threads wait for each other by spinning). With --size 10 a step is hardly more than
what surrounds the computing.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import numpy as np
import torch
from torch import optim

from benchmarks.harness import Contestant, Figures, Ratio, race, run_benchmark
from benchmarks.labelling import num_cores
from benchmarks.options import add_count, make_parser, select, settle
from benchmarks.peers.tutorial_loop import build_network, train_epoch
from benchmarks.report import Column, Report, describe_machine, publish
from cnnray.datasets.order import (
    Batch,
    EpochOrder,
    assemble,
    lanes_of,
    permutation,
    plan_epoch,
    row_groups_of,
)
from cnnray.datasets.sampling import spread_copies
from cnnray.images.augment import TrainTransform
from cnnray.images.transforms import Preprocessing
from cnnray.models.classifier import Classifier
from cnnray.models.tutorial import TutorialCNN
from cnnray.options import Augmentation
from cnnray.process import keep_freed_memory
from cnnray.training.loop import EpochData, Trainer, run_epochs
from cnnray.training.losses import cross_entropy
from cnnray.training.optimizers import build_optimizer
from cnnray.training.prefetch import prefetch
from cnnray.training.schedules import learning_rate_factor

NUM_CLASSES = 10
ROW_GROUP_ROWS = 256
UNIT_ROWS = 512
"""Of the order, as in the train job."""
MEAN, STD = (0.5,), (0.5,)
LEARNING_RATE = 0.001
SEED = 0
COLUMNS = (
    Column("samples_per_second", "img/s"),
    Column("step_us", "step, µs"),
    Column("cpu_step_us", "CPU a step, µs"),
    Column("trainer_step_us", "CPU of its thread, µs"),
)
GOALS = {"loop": 0.9, "loop, fused Adam": 0.85}


def main(argv: Sequence[str] | None = None) -> int:
    """Race, print, and return the exit code."""
    options = _parse(argv)
    machine = describe_machine()
    keep_freed_memory()
    torch.set_num_threads(options.threads)
    data = make_images(options.images, size=options.size)
    runs: dict[str, Iterator[object]] = {
        "cnnray": run_cnnray(data, batch=options.batch, epochs=1 + options.repeats),
        "loop": run_loop(data, batch=options.batch, fused=False),
        "loop, fused Adam": run_loop(data, batch=options.batch, fused=True),
    }
    contestants = [
        Contestant(name, in_epochs(epochs, images=options.images, batch=options.batch))
        for name, epochs in runs.items()
    ]
    results = race(select(contestants, options.only), repeats=options.repeats)
    report = Report(
        benchmark="what is added to a small training step (B7)",
        results=results,
        columns=COLUMNS,
        ratios=[
            Ratio(figure, ("cnnray",), (name,), goal)
            for figure in ("samples_per_second", "samples_per_cpu_second")
            for name, goal in GOALS.items()
        ],
        settings={
            "images": options.images,
            "pixels": options.size,
            "batch": options.batch,
            "threads": options.threads,
            "rounds": options.repeats,
        },
    )
    return publish(report, machine)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = make_parser(__doc__, repeats=15)
    add_count(parser, "--images", full=4_096, short=512, what="images of an epoch")
    parser.add_argument("--size", type=int, default=28, help="pixels; 10: hardly any computing")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--threads", type=int, default=num_cores(), help="of torch (all cores)")
    return settle(parser.parse_args(argv))


def make_images(count: int, *, size: int) -> Batch:
    """Grey noise with labels drawn at random, and keys like those of files."""
    generator = np.random.default_rng(SEED)
    return Batch(
        image=generator.integers(0, 256, (count, 1, size, size), dtype=np.uint8),
        label=generator.integers(0, NUM_CLASSES, count),
        key=np.array([f"train/{number:08d}.png" for number in range(count)], dtype=object),
    )


def in_epochs(epochs: Iterator[object], *, images: int, batch: int) -> Callable[[], Figures]:
    """What measures one epoch, the next one each time; the first one warms up."""

    def run() -> Figures:
        if not is_warm:
            next(epochs)
            is_warm.append(True)
        before = _clocks()
        next(epochs)
        seconds = [now - then for now, then in zip(_clocks(), before, strict=True)]
        wall, cpu, thread = seconds
        steps = images / batch
        return {
            "samples_per_second": images / wall,
            "samples_per_cpu_second": images / cpu,
            "step_us": 1e6 * wall / steps,
            "cpu_step_us": 1e6 * cpu / steps,
            "trainer_step_us": 1e6 * thread / steps,
        }

    is_warm: list[bool] = []
    return run


def _clocks() -> tuple[float, float, float]:
    return time.perf_counter(), time.process_time(), time.thread_time()


def run_loop(data: Batch, *, batch: int, fused: bool) -> Iterator[None]:
    """The epochs of the plain loop, whose images are float32 from the start."""
    torch.manual_seed(SEED)
    images = torch.from_numpy(data["image"]).float() / 255
    labels = torch.from_numpy(data["label"])
    network = build_network(images.shape[3]).to(memory_format=torch.channels_last)
    optimizer = optim.Adam(network.parameters(), lr=LEARNING_RATE, fused=fused)
    while True:
        train_epoch(network, optimizer, images, labels, batch=batch)
        yield


def run_cnnray(data: Batch, *, batch: int, epochs: int) -> Iterator[object]:
    """The epochs of ``run_epochs``."""
    return run_epochs(
        build_trainer(data["image"].shape[3], steps=epochs * len(data["label"]) // batch),
        first_epoch=0,
        epochs=epochs,
        data=partial(feed, data, batch=batch),
        seed=SEED,
    )


def build_trainer(size: int, *, steps: int) -> Trainer:
    """What the train job makes of the recipe."""
    torch.manual_seed(SEED)
    network = TutorialCNN(NUM_CLASSES, channels=1, image_size=size)
    model = Classifier(network, mean=MEAN, std=STD, head="head")
    model = model.to(memory_format=torch.channels_last)
    return Trainer(
        model=model,
        optimizer=build_optimizer(model, name="adam", lr=LEARNING_RATE),
        loss=cross_entropy,
        learning_rate=lambda step: (
            LEARNING_RATE * learning_rate_factor(step, name="cosine", total_steps=steps)
        ),
        device=torch.device("cpu"),
    )


def feed(data: Batch, epoch: int, *, batch: int) -> EpochData:
    """One epoch as a worker feeds it from a split that is decoded."""
    count = len(data["label"])
    groups = [min(ROW_GROUP_ROWS, count - start) for start in range(0, count, ROW_GROUP_ROWS)]
    order = plan_epoch(
        row_groups_of([groups]),
        seed=SEED,
        epoch=epoch,
        global_batch_size=batch,
        max_unit_rows=UNIT_ROWS,
    )
    lanes = lanes_of(0, num_workers=1)
    batches = prefetch(assemble(order, _blocks(data, order, epoch), lanes=lanes))
    return EpochData(map(spread_copies, batches), order.batch_sizes, validation=())


def _blocks(data: Batch, order: EpochOrder, epoch: int) -> Iterator[tuple[int, Batch]]:
    """The units in the order of need, shuffled and flipped."""
    size = data["image"].shape[3]
    preprocessing = Preprocessing(
        channels=1, size=size, resize=size, interpolation="bilinear", mean=MEAN, std=STD
    )
    transform = TrainTransform(preprocessing, Augmentation(flip=0.5), seed=SEED)
    for unit in order.units:
        first = unit.row_group.index * ROW_GROUP_ROWS + unit.start
        rows = first + permutation(unit, seed=SEED, epoch=epoch)
        keys = data["key"][rows]
        images = transform.vary(data["image"][rows], epoch=epoch, keys=keys)
        yield unit.lane, Batch(image=images, label=data["label"][rows], key=keys)


if __name__ == "__main__":
    run_benchmark(main)
