"""Measuring the stages on real JPEG files: what is slow is found, what is bad is counted."""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image
from torch import Tensor

from cnnray.datasets.listing import list_in_order
from cnnray.datasets.sources import Source, open_source
from cnnray.errors import DataError, MissingObjectError, StorageError, UnavailableError
from cnnray.labeling.decoding import SampleDecoder
from cnnray.labeling.forecast import Workers, forecast
from cnnray.labeling.measure import SAMPLE_RUNS, Measurement, measure_stages, take_sample
from cnnray.labeling.prediction import Predictor
from cnnray.models.bundle import Bundle
from cnnray.schema import PLAN_SCHEMA

POISON = Path(__file__).parents[1] / "images" / "poison"
CPU = torch.device("cpu")

pytestmark = pytest.mark.timeout(120)


class ToyEngine:
    """The same logits for every image, after ``seconds`` for each."""

    embeddings = False

    def __init__(self, seconds: float = 0.0) -> None:
        self.seconds = seconds

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        time.sleep(self.seconds * len(images))
        return torch.zeros(len(images), 4), None


class SlowSource:
    """A source whose reads take ``seconds`` each, one after the other."""

    def __init__(self, source: Source, seconds: float) -> None:
        self.source = source
        self.seconds = seconds

    def read(self, entries: pa.Table) -> Iterator[bytes | StorageError]:
        for data in self.source.read(entries):
            time.sleep(self.seconds)
            yield data


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of 40 JPEG files, 64 x 48 pixels."""
    images = tmp_path / "images"
    images.mkdir()
    for number in range(40):
        noise = np.random.default_rng(number).integers(0, 256, (48, 64, 3)).astype(np.uint8)
        Image.fromarray(noise).save(images / f"{number:02d}.jpg", quality=90)
    return images


@pytest.fixture
def measure(make_bundle: Callable[..., Bundle], folder: Path) -> Callable[..., Measurement]:
    """Measure labelling of the folder with a toy engine, four images at a time."""

    def run(engine: Any = None, *, slow_reads: float | None = None, **options: Any) -> Measurement:
        bundle = make_bundle()
        source: Any = open_source(str(folder), format="folder", labelled=False)
        _, entries = take_sample(list_in_order(source), size=100)
        if slow_reads is not None:
            source = SlowSource(source, slow_reads)
        return measure_stages(
            source,
            entries,
            SampleDecoder(bundle.spec.preprocessing),
            Predictor(
                engine or ToyEngine(), bundle.spec, digest=bundle.digest, top_k=3, batch_size=4
            ),
            device=CPU,
            batch_rows=4,
            **{"list_seconds": 1e-5, **options},
        )

    return run


def bottleneck(measured: Measurement) -> str:
    found = forecast(measured.times, Workers(1), images=1000, listed=1000, start_seconds=0)
    return found.bottleneck


def test_every_stage_of_a_worker_takes_some_time(measure: Callable[..., Measurement]) -> None:
    measured = measure()
    times = measured.times
    assert (measured.images, measured.bad) == (40, 0)
    assert 1000 < measured.bytes_per_image < 20_000
    assert times.list == 1e-5
    assert times.transfer == 0  # there is no device to go to
    for stage in ("read", "read_cpu", "decode", "model", "write"):
        assert 0 < getattr(times, stage) < 0.1


def test_a_slow_model_is_the_bottleneck_and_its_time_is_right(
    measure: Callable[..., Measurement],
) -> None:
    measured = measure(ToyEngine(seconds=0.01))
    assert bottleneck(measured) == "model"
    assert 0.01 < measured.times.model < 0.05


def test_a_slow_store_is_the_bottleneck_and_its_time_is_right(
    measure: Callable[..., Measurement],
) -> None:
    measured = measure(slow_reads=0.02)
    assert bottleneck(measured) == "read"
    assert 0.02 < measured.times.read < 0.1
    assert measured.times.read_cpu < 0.01  # it slept


def test_a_slow_listing_is_the_bottleneck(measure: Callable[..., Measurement]) -> None:
    assert bottleneck(measure(list_seconds=0.5)) == "list"


def test_large_images_make_decoding_the_bottleneck(
    measure: Callable[..., Measurement], folder: Path
) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (700, 900, 3)).astype(np.uint8)
    for path in sorted(folder.iterdir())[:38]:
        path.unlink()
    for number in range(3):
        Image.fromarray(noise).save(folder / f"large{number}.jpg", quality=95)
    assert bottleneck(measure()) == "decode"


def test_what_cannot_be_decoded_is_counted_and_ends_nothing(
    measure: Callable[..., Measurement], folder: Path
) -> None:
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "text.jpg").write_bytes(b"hello, I am no image")
    (folder / "cut.jpg").write_bytes((folder / "00.jpg").read_bytes()[:-2000])
    measured = measure()
    assert (measured.images, measured.bad) == (43, 3)


def test_an_image_that_kills_its_decoder_is_counted_and_ends_nothing(
    measure: Callable[..., Measurement], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(POISON))  # of the child; here it would be decoded
    buffer = io.BytesIO()
    Image.new("RGB", (20, 20)).save(buffer, "PNG")
    (folder / "poison.png").write_bytes(buffer.getvalue() + b"cnnray-poison:abort;")
    measured = measure()
    assert (measured.images, measured.bad) == (41, 1)


def test_a_file_that_is_gone_is_counted(
    measure: Callable[..., Measurement], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = SlowSource.read

    def lose_one(self: SlowSource, entries: pa.Table) -> Iterator[bytes | StorageError]:
        for number, data in enumerate(read(self, entries)):
            yield MissingObjectError("no such file: x") if number == 3 else data

    monkeypatch.setattr(SlowSource, "read", lose_one)
    assert measure(slow_reads=0.0).bad == 2  # one of those that warm the connections, and one later


def test_a_store_that_does_not_answer_is_no_fact_about_an_image(
    measure: Callable[..., Measurement], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: SlowSource, entries: pa.Table) -> Iterator[bytes | StorageError]:
        raise UnavailableError("the store did not answer")
        yield b""

    monkeypatch.setattr(SlowSource, "read", fail)
    with pytest.raises(UnavailableError):
        measure(slow_reads=0.0)


def test_a_sample_without_an_image_is_an_error_that_says_so(
    measure: Callable[..., Measurement], folder: Path
) -> None:
    for path in folder.iterdir():
        path.write_bytes(b"text")
    with pytest.raises(DataError, match="none of the 40 images of the sample can be decoded"):
        measure()


def test_the_time_for_measuring_is_bounded(measure: Callable[..., Measurement]) -> None:
    started = time.perf_counter()
    measured = measure(ToyEngine(seconds=0.1), max_seconds=0.5)
    assert time.perf_counter() - started < 0.4 * 10  # not 40 images, each three times
    assert 0.1 < measured.times.model < 0.3


# The sample


def listing(rows: int, *, table_rows: int) -> Iterator[pa.Table]:
    """Inputs whose offset is their place in the listing."""
    for start in range(0, rows, table_rows):
        rows_here = [
            {"key": f"k{place}", "path": "p", "offset": place, "length": -1, "etag": "e"}
            for place in range(start, min(start + table_rows, rows))
        ]
        yield pa.Table.from_pylist(rows_here, PLAN_SCHEMA)


@pytest.mark.parametrize("table_rows", [1, 7, 1000])
@pytest.mark.parametrize("rows", [0, 5, 63, 64, 65, 128, 129, 1000, 5003])
def test_a_sample_has_its_size_and_is_from_all_over_the_listing(rows: int, table_rows: int) -> None:
    listed, sample = take_sample(listing(rows, table_rows=table_rows), size=64)
    assert listed == rows
    places = sample["offset"].to_pylist()
    assert places == sorted(set(places))
    assert 64 - 15 <= len(places) <= 64 if rows > 64 else len(places) == rows
    if rows > 1000:
        assert places[0] == 0
        assert places[-1] > 0.75 * rows


def test_a_sample_is_made_of_runs_of_neighbours() -> None:
    _, sample = take_sample(listing(5000, table_rows=300), size=64)
    places = np.array(sample["offset"].to_pylist())
    assert (np.diff(places) == 1).sum() == 64 - SAMPLE_RUNS
