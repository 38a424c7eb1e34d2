"""A network that processes feed: they decode into shared memory, pinned copies go to the device."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import queue
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import cycle, islice
from multiprocessing.queues import Queue
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.gpu import watch_gpu
from benchmarks.harness import Contestant, Figures, SkipBenchmark
from benchmarks.readiness.engines import Quickest, infer
from benchmarks.readiness.subject import Subject, make_photos, synchronize
from benchmarks.report import Column
from cnnray.images.transforms import Preprocessing
from cnnray.labeling.decoding import Sample, SampleDecoder, images_of
from cnnray.labeling.labeler import Labeler
from cnnray.labeling.prediction import Predictor
from cnnray.models.engines import Engine

COLUMNS = (
    Column("images_per_second", "images/s"),
    Column("of_network", "of the network alone", 3),
    Column("decoded_per_second", "decoding by itself, images/s"),
    Column("waiting", "waiting for pixels", 3),
    Column("gpu_busy_fraction", "GPU busy", 2),
    Column("processes", "decoding processes"),
)
PHOTO_WIDTH, PHOTO_HEIGHT = 640, 480
SPARE_SLOTS = 3
"""Batches beyond one for each process: two on their way to the device, one that waits."""
START_SECONDS = 90.0
"""For the processes to import torch and to decode their first batch."""
POLL_SECONDS = 1.0
TOP_K = 5


@dataclass(frozen=True)
class Slots:
    """Batches in memory that processes share: a file of (slots, B, S, S, C) uint8."""

    file: Path
    shape: tuple[int, ...]

    def open(self) -> np.memmap:
        """The same memory in each process."""
        return np.memmap(self.file, np.uint8, "r+", shape=self.shape)


@dataclass
class Decoders:
    """Processes that fill slots: ``full`` says which ones, ``free`` takes them back."""

    slots: Slots
    free: Queue[int]
    full: Queue[int]
    processes: Sequence[multiprocessing.process.BaseProcess]

    def batches(self, count: int) -> Iterator[int]:
        """Slots as they become full; whoever takes one gives it back to ``free``.

        Raises ``RuntimeError`` when a process has died or is silent for ``START_SECONDS``.
        """
        for _ in range(count):
            deadline = time.monotonic() + START_SECONDS
            while (slot := _take(self.full)) is None:
                if any(process.exitcode is not None for process in self.processes):
                    raise RuntimeError("a decoding process has died; its stderr says why")
                if time.monotonic() > deadline:
                    raise RuntimeError(f"no batch was decoded within {START_SECONDS:.0f} s")
            yield slot


def feed_contestants(
    subject: Subject, quickest: Quickest, files: Sequence[Path], processes: int
) -> list[Contestant]:
    """One process that decodes and infers in turn, and the network fed by decoding processes."""
    entered = {
        "one process, in turn": partial(_in_turn, subject, quickest, files),
        "fed by decoding processes": partial(_fed, subject, quickest, files, processes),
    }
    return [watch_gpu(Contestant(name, run)) for name, run in entered.items()]


def write_photos(folder: Path, count: int) -> list[Path]:
    """Made-up photos as files, for who names none of their own."""
    photos, _ = make_photos(count, width=PHOTO_WIDTH, height=PHOTO_HEIGHT, seed=1)
    files = [folder / f"{number:04d}.jpg" for number in range(count)]
    for file, data in zip(files, photos, strict=True):
        file.write_bytes(data)
    return files


def _fed(subject: Subject, quickest: Quickest, files: Sequence[Path], processes: int) -> Figures:
    engine = _require(quickest)
    begun = time.perf_counter()
    with _decoders(subject, files, processes) as decoders:
        decoded, _ = _measure(decoders, subject, decoders.free.put)
        pipeline = Pipeline(decoders, engine, subject.device)
        fed_after = time.perf_counter() - begun
        rate, waiting = _measure(decoders, subject, pipeline.push, finish=pipeline.finish)
    return {
        "images_per_second": rate,
        "of_network": rate / quickest.rate,
        "decoded_per_second": decoded,
        "waiting": waiting,
        "processes": processes,
        "first_batch_seconds": fed_after,  # from when on the GPU is watched
    }


def _in_turn(subject: Subject, quickest: Quickest, files: Sequence[Path]) -> Figures:
    """cnnray's labeller, as it is in a process that does everything."""
    predictor = Predictor(
        _require(quickest),
        subject.bundle.spec,
        digest=subject.bundle.digest,
        top_k=TOP_K,
        batch_size=subject.batch_size,
    )
    labeler = Labeler(SampleDecoder(subject.preprocessing), predictor)
    paths = list(islice(cycle(files), subject.batch_size))
    samples = [Sample(str(number), "", path.read_bytes()) for number, path in enumerate(paths)]
    labeler.label(samples[:1])
    done, started = 0, time.perf_counter()
    while not done or time.perf_counter() - started < subject.seconds:
        done += labeler.label(samples).num_rows
    rate = done / (time.perf_counter() - started)
    return {"images_per_second": rate, "of_network": rate / quickest.rate}


class Pipeline:
    """Two batches in pinned memory and two on the device: one is computed, one is on its way."""

    def __init__(self, decoders: Decoders, engine: Engine, device: torch.device) -> None:
        self.decoders = decoders
        self.engine = engine
        self.device = device
        self.pixels = decoders.slots.open()
        self.answers: list[Tensor] = []
        self.number = 0
        self.is_cuda = device.type == "cuda"
        if self.is_cuda:
            shape = decoders.slots.shape[1:]
            self.pinned = [torch.empty(shape, dtype=torch.uint8).pin_memory() for _ in range(2)]
            self.landed = [torch.empty(shape, dtype=torch.uint8, device=device) for _ in range(2)]
            self.copies = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            self.copied = _events()
            self.computed = _events()

    def push(self, slot: int) -> None:
        """Send a slot's batch through the network; the slot is free when this returns."""
        if not self.is_cuda:
            self._infer(torch.from_numpy(self.pixels[slot]))
            self.decoders.free.put(slot)
            return
        turn = self.number % 2
        self.number += 1
        self.copied[turn].synchronize()  # the copy of the batch before last has left this memory
        self.pinned[turn].numpy()[...] = self.pixels[slot]
        self.decoders.free.put(slot)
        with torch.cuda.stream(self.copies):
            self.copies.wait_event(self.computed[turn])
            self.landed[turn].copy_(self.pinned[turn], non_blocking=True)
            self.copied[turn].record()
        torch.cuda.current_stream(self.device).wait_event(self.copied[turn])
        self._infer(self.landed[turn])
        self.computed[turn].record()

    def finish(self) -> None:
        """Wait for the labels of all batches."""
        if self.answers:
            torch.stack(self.answers).cpu()
        self.answers.clear()

    def _infer(self, pixels: Tensor) -> None:
        """(B, S, S, C) on the device; the labels stay there."""
        logits = infer(self.engine, pixels.permute(0, 3, 1, 2))
        self.answers.append(logits.argmax(dim=1))


def _measure(
    decoders: Decoders,
    subject: Subject,
    use: Callable[[int], None],
    *,
    finish: Callable[[], None] = lambda: None,
) -> tuple[float, float]:
    """Images a second once every process is at work, and the fraction of time without pixels."""
    for slot in decoders.batches(2 * len(decoders.processes)):
        use(slot)
    finish()
    synchronize(subject.device)
    started, waited, done = time.perf_counter(), 0.0, 0
    while not done or time.perf_counter() - started < 2 * subject.seconds:
        asked = time.perf_counter()
        [slot] = decoders.batches(1)
        waited += time.perf_counter() - asked
        use(slot)
        done += decoders.slots.shape[1]
    finish()
    seconds = time.perf_counter() - started
    return done / seconds, waited / seconds


@contextlib.contextmanager
def _decoders(subject: Subject, files: Sequence[Path], processes: int) -> Iterator[Decoders]:
    """Start processes; end them, and free what they share, whatever happens."""
    preprocessing = subject.preprocessing
    side, channels = preprocessing.size, preprocessing.channels
    shape = (processes + SPARE_SLOTS, subject.batch_size, side, side, channels)
    context = multiprocessing.get_context("spawn")
    with _shared_file(int(np.prod(shape))) as file:
        slots = Slots(file, shape)
        free, full = context.Queue(), context.Queue()
        for slot in range(shape[0]):
            free.put(slot)
        started = [
            context.Process(
                target=_decode_forever,
                args=(preprocessing, list(files[first:]) + list(files[:first]), slots, free, full),
                daemon=True,
            )
            for first in (number * len(files) // processes for number in range(processes))
        ]
        try:
            for process in started:
                process.start()
            yield Decoders(slots, free, full, started)
        finally:
            for process in started:
                if process.pid is not None:
                    process.kill()
                    process.join(10)
            for one in (free, full):
                one.cancel_join_thread()
                one.close()


def _decode_forever(
    preprocessing: Preprocessing,
    files: Sequence[Path],
    slots: Slots,
    free: Queue[int],
    full: Queue[int],
) -> None:
    """One process's work, until it is ended or its parent has gone."""
    torch.set_num_threads(1)
    parent, paths = os.getppid(), cycle(files)
    pixels = slots.open()
    decoder = SampleDecoder(preprocessing)
    while os.getppid() == parent:
        if (slot := _take(free)) is None:
            continue
        batch = [Sample(path.name, "", path.read_bytes()) for path in islice(paths, len(pixels[0]))]
        decoded = decoder.decode(batch)
        if decoded["error_code"].null_count < len(batch):
            raise ValueError(f"not every photo can be decoded: {decoded['error_detail'].unique()}")
        pixels[slot] = images_of(decoded, preprocessing)
        full.put(slot)


@contextlib.contextmanager
def _shared_file(size: int) -> Iterator[Path]:
    """A file in memory where there is room for it, else in the system's scratch folder."""
    memory = Path("/dev/shm")
    has_room = memory.is_dir() and shutil.disk_usage(memory).free > 2 * size
    with tempfile.TemporaryDirectory(
        prefix="cnnray-bench-", dir=memory if has_room else None
    ) as folder:
        file = Path(folder) / "slots"
        with file.open("wb") as opened:
            opened.truncate(size)
        yield file


def _events() -> list[torch.cuda.Event]:
    return [torch.cuda.Event(), torch.cuda.Event()]  # type: ignore[no-untyped-call]


def _take(slots: Queue[int]) -> int | None:
    """A slot, or None after ``POLL_SECONDS``."""
    try:
        return slots.get(timeout=POLL_SECONDS)
    except queue.Empty:
        return None


def _require(quickest: Quickest) -> Engine:
    if quickest.engine is None:
        raise SkipBenchmark("no engine has run that could be fed")
    return quickest.engine
