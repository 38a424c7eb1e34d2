"""How long the stages of labelling take here, on a sample of a user's own images.

All in this process and on one thread, as in a worker; what the times mean for a collection is
``forecast``'s. No image of the sample is decoded here before a child process has survived it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import numpy as np
import pyarrow as pa
import torch

from cnnray.datasets.sources import Source
from cnnray.errors import DataError, ImageError, StorageError
from cnnray.images.decode import Decoded
from cnnray.images.transforms import as_tensor
from cnnray.labeling.decoding import Sample, SampleDecoder, images_of
from cnnray.labeling.forecast import StageTimes
from cnnray.labeling.parts import PartFooter, encode_part
from cnnray.labeling.prediction import Predictor
from cnnray.schema import PLAN_SCHEMA
from cnnray.storage import READ_CONCURRENCY

SAMPLE_RUNS = 4
"""Places of a listing that a sample is from, each a run of neighbours: workers get such, too."""

PASSES = 3
"""Times that each batch is gone through; the median of each stage counts."""

PART_ROWS = 8192
"""Label rows that are encoded, the sample's again and again: a small file costs more for each.

Rows that differ take about twice as long, 1 µs with top-5: still the least of all stages.
"""

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class Measurement:
    """The times of the stages, and the sample that they are from: images, bad ones, mean bytes."""

    times: StageTimes
    images: int
    bad: int
    bytes_per_image: float


class Lap(NamedTuple):
    """Seconds that a batch took at each stage of a worker."""

    decode: float
    resize: float
    transfer: float
    model: float


def take_sample(listing: Iterable[pa.Table], *, size: int) -> tuple[int, pa.Table]:
    """How many inputs a listing has, and some ``size`` of them (``PLAN_SCHEMA``), from all over it.

    Holds twice as many at a time, however long the listing is.
    """
    run_rows = max(1, size // SAMPLE_RUNS)
    kept, runs = PLAN_SCHEMA.empty_table(), np.zeros(0, np.int64)
    listed, step = 0, 1
    for table in listing:
        numbers = np.arange(listed, listed + table.num_rows) // run_rows
        listed += table.num_rows
        chosen = numbers % step == 0
        if chosen.any():
            table = table.select(PLAN_SCHEMA.names).filter(pa.array(chosen))
            kept, runs = pa.concat_tables([kept, table]), np.append(runs, numbers[chosen])
        while len(kept) > 2 * SAMPLE_RUNS * run_rows:
            step *= 2
            chosen = runs % step == 0
            kept, runs = kept.filter(pa.array(chosen)), runs[chosen]
    found = np.unique(runs)
    if len(found) > SAMPLE_RUNS:
        found = found[np.linspace(0, len(found) - 1, SAMPLE_RUNS).astype(int)]
    return listed, kept.filter(pa.array(np.isin(runs, found)))


def measure_stages(
    source: Source,
    entries: pa.Table,
    decoder: SampleDecoder,
    predictor: Predictor,
    *,
    device: torch.device,
    batch_rows: int,
    list_seconds: float,
    max_seconds: float = 60.0,
) -> Measurement:
    """Read, decode and label a sample, ``batch_rows`` at a time as a worker does.

    ``list_seconds`` is what the listing took for an image. After ``max_seconds`` no more batches
    are begun. Raises ``DataError`` when no image of the sample can be decoded, and what
    ``source.read`` does.
    """
    samples, read, read_cpu = _read(source, entries)
    good = _decodable(samples, decoder)
    if not good:
        raise DataError(f"none of the {len(samples)} images of the sample can be decoded")
    batches = [good[start : start + batch_rows] for start in range(0, len(good), batch_rows)]
    rows = predictor.predict(decoder.decode(batches[0]))  # warm
    laps: list[list[Lap]] = [[] for _ in batches]
    deadline = time.perf_counter() + max_seconds
    for number in [*range(len(batches))] * PASSES:
        if laps[0] and time.perf_counter() > deadline:
            break
        laps[number].append(_lap(batches[number], decoder, predictor, device=device))
    done = sum(len(batch) for batch, lap in zip(batches, laps, strict=True) if lap)
    sums = np.sum([np.median(lap, axis=0) for lap in laps if lap], axis=0)
    stages = Lap(*(float(seconds) / done for seconds in sums))
    return Measurement(
        times=StageTimes(
            list=list_seconds,
            read=read,
            read_cpu=read_cpu,
            **stages._asdict(),
            write=_write_seconds(rows),
        ),
        images=len(samples),
        bad=len(samples) - len(good),
        bytes_per_image=float(np.mean([len(_bytes(sample)) for sample in good])),
    )


def _read(source: Source, entries: pa.Table) -> tuple[list[Sample], float, float]:
    """The samples, and what reading took for an image: seconds, and seconds of a core.

    The first ones, where there are enough, only open the connections.
    """
    warm = READ_CONCURRENCY if entries.num_rows >= 2 * READ_CONCURRENCY else 0
    data = list(source.read(entries.slice(0, warm)))
    started, cpu_started = time.perf_counter(), time.process_time()
    data += source.read(entries.slice(warm))
    seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu_started
    read = entries.num_rows - warm
    keys, etags = entries["key"].to_pylist(), entries["etag"].to_pylist()
    return [*map(Sample, keys, etags, data)], seconds / read, cpu_seconds / read


def _decodable(samples: Sequence[Sample], decoder: SampleDecoder) -> list[Sample]:
    """The samples that a decoder gets through, in a process that they may end."""
    with decoder.safe.as_careful() as careful, careful.batch() as decode:
        return [sample for sample in samples if _decode(decode, sample.data) is not None]


def _decode(decode: Callable[[bytes], Decoded], data: bytes | StorageError) -> Decoded | None:
    try:
        return None if isinstance(data, StorageError) else decode(data)
    except ImageError:
        return None


def _bytes(sample: Sample) -> bytes:
    assert isinstance(sample.data, bytes)
    return sample.data


def _lap(
    batch: Sequence[Sample], decoder: SampleDecoder, predictor: Predictor, *, device: torch.device
) -> Lap:
    """The worker's own functions: resizing is what its decoder takes beyond decoding alone."""
    both, decoded = _timed(lambda: decoder.decode(batch))
    with decoder.safe.batch() as decode:
        decoding, _ = _timed(lambda: [decode(_bytes(sample)) for sample in batch])
    transfer = 0.0
    if device.type == "cuda":
        images = as_tensor(images_of(decoded, decoder.preprocessing))
        transfer, _ = _timed(lambda: images.pin_memory().to(device))
    model, _ = _timed(lambda: predictor.predict(decoded))
    return Lap(decoding, max(0.0, both - decoding), transfer, max(0.0, model - transfer))


def _write_seconds(rows: pa.Table) -> float:
    """What encoding a part takes for a row."""
    many = pa.concat_tables([rows] * -(-PART_ROWS // len(rows))).combine_chunks()
    footer = PartFooter(run="sample", part=0, rows=len(many), ok=len(many))
    seconds, _ = _timed(lambda: encode_part(many, footer))
    return seconds / int(many.num_rows)


def _timed(function: Callable[[], Result]) -> tuple[float, Result]:
    started = time.perf_counter()
    result = function()
    return time.perf_counter() - started, result
