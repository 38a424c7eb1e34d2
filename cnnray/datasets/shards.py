"""One shard of a dataset: written from listed entries, read back by row group.

A shard that is written twice (a task that was retried) is the same shard.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from cnnray.datasets.manifest import Shard
from cnnray.datasets.sources import Source
from cnnray.errors import (
    MAX_ERROR_DETAIL,
    DataError,
    ImageError,
    MissingObjectError,
    StorageError,
)
from cnnray.images.isolation import DEFAULT_SECONDS, Decode
from cnnray.images.safe_decoder import SafeDecoder
from cnnray.options import DecodeLimits
from cnnray.schema import REJECTED_SCHEMA, SHARD_SCHEMA
from cnnray.storage import Store, sha256

READ_AHEAD_ROWS = 256
BATCH_BYTES = 8 * 1024 * 1024
"""Encoded images that are decoded in a row; reading goes on meanwhile."""
STATISTICS_SIDE = 512
"""Larger images are sampled at every second, third … pixel for mean and std."""


@dataclass(frozen=True)
class ShardPlan:
    """One shard to write: the entries that go in it, in order, and its place."""

    split: str
    path: str
    entries: pa.Table  # ENTRY_SCHEMA
    row_group_rows: int


@dataclass(frozen=True)
class PackedShard:
    """What was written: small enough to travel to the driver."""

    split: str
    shard: Shard | None  # None: every image was refused
    class_counts: npt.NDArray[np.int64]  # (K,)
    histogram: npt.NDArray[np.int64]  # (3, 256) of pixel values, for mean and std
    is_grey: bool
    sizes: tuple[int, int, int, int]  # min and max width, min and max height
    rejected: pa.Table


def pack_shard(
    plan: ShardPlan,
    *,
    source: Source,
    store: Store,
    classes: Sequence[str],
    limits: DecodeLimits,
    decode_seconds: float = DEFAULT_SECONDS,
    careful: bool = False,
    replace: bool = False,
) -> PackedShard:
    """Read, prove and write one shard; every image is decoded once. Memory: the encoded shard.

    The file is created only if the name is free or holds the same bytes, unless ``replace``. An
    image that crashes its decoder, or takes longer than ``decode_seconds``, ends this process; with
    ``careful``, which is slower, it is rejected with one of ``DECODER_ERROR_CODES``.
    """
    writer = _ShardWriter(plan, class_index={name: index for index, name in enumerate(classes)})
    with SafeDecoder(careful=careful, channels=3, limits=limits, seconds=decode_seconds) as decoder:
        for batch in _batches(_read(plan.entries, source)):
            with decoder.batch() as decode:
                for entry, data in batch:
                    writer.add(entry, data, decode)
    return writer.finish(store, replace=replace)


Entry = dict[str, str]
Read = tuple[Entry, bytes | StorageError]


def _read(entries: pa.Table, source: Source) -> Iterator[Read]:
    """Each entry with its bytes, or the error that reading met."""
    for start in range(0, entries.num_rows, READ_AHEAD_ROWS):
        some = entries.slice(start, READ_AHEAD_ROWS)
        yield from zip(some.to_pylist(), source.read(some), strict=True)


def _batches(images: Iterable[Read]) -> Iterator[list[Read]]:
    """The same in order, by ``BATCH_BYTES`` or a little more."""
    batch: list[Read] = []
    size = 0
    for entry, data in images:
        batch.append((entry, data))
        size += 0 if isinstance(data, StorageError) else len(data)
        if size >= BATCH_BYTES or len(batch) == READ_AHEAD_ROWS:
            yield batch
            batch, size = [], 0
    yield batch


class _ShardWriter:
    """Collects the samples of one shard and what the manifest will say of them."""

    def __init__(self, plan: ShardPlan, *, class_index: dict[str, int]) -> None:
        self.plan = plan
        self.class_index = class_index
        self.buffer = io.BytesIO()
        self.parquet = pq.ParquetWriter(self.buffer, SHARD_SCHEMA, compression="none")
        self.rows: list[dict[str, object]] = []
        self.row_groups: list[int] = []
        self.rejected: list[dict[str, str]] = []
        self.class_counts = np.zeros(len(class_index), dtype=np.int64)
        self.histogram = np.zeros((3, 256), dtype=np.int64)
        self.widths: list[int] = []
        self.heights: list[int] = []
        self.is_grey = True

    def add(self, entry: Entry, data: bytes | StorageError, decode: Decode) -> None:
        if isinstance(data, StorageError):
            code = "missing" if isinstance(data, MissingObjectError) else "read_failed"
            self._reject(entry["key"], "read", code, str(data))
            return
        try:
            decoded = decode(data)
        except ImageError as error:
            self._reject(entry["key"], "decode", error.code, error.detail)
            return
        height, width, _ = decoded.pixels.shape
        label = self.class_index[entry["label"]]
        self.rows.append(
            {
                "key": entry["key"],
                "image": data,
                "label": label,
                "width": width,
                "height": height,
                "source": entry["path"],
                "etag": entry["etag"],
            }
        )
        self.class_counts[label] += 1
        self.histogram += _histogram(decoded.pixels)
        self.is_grey &= decoded.is_grey
        self.widths.append(width)
        self.heights.append(height)
        if len(self.rows) == self.plan.row_group_rows:
            self._write_row_group()

    def _reject(self, key: str, stage: str, code: str, detail: str) -> None:
        row = {"key": key, "stage": stage, "error_code": code}
        self.rejected.append(row | {"error_detail": detail[:MAX_ERROR_DETAIL]})

    def _write_row_group(self) -> None:
        if self.rows:
            self.parquet.write_table(pa.Table.from_pylist(self.rows, SHARD_SCHEMA))
            self.row_groups.append(len(self.rows))
            self.rows = []

    def finish(self, store: Store, *, replace: bool) -> PackedShard:
        self._write_row_group()
        self.parquet.close()
        shard = None
        if self.row_groups:
            data = self.buffer.getvalue()
            (store.write if replace else store.create)(self.plan.path, data)
            shard = Shard(
                path=self.plan.path,
                num_samples=sum(self.row_groups),
                bytes=len(data),
                sha256=sha256(data),
                row_groups=tuple(self.row_groups),
            )
        sizes = (0, 0, 0, 0)
        if shard is not None:
            sizes = (min(self.widths), max(self.widths), min(self.heights), max(self.heights))
        return PackedShard(
            split=self.plan.split,
            shard=shard,
            class_counts=self.class_counts,
            histogram=self.histogram,
            is_grey=self.is_grey,
            sizes=sizes,
            rejected=pa.Table.from_pylist(self.rejected, REJECTED_SCHEMA),
        )


def _histogram(pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.int64]:
    """(3, 256) counts of the values of (H, W, 3) pixels: exact sums that add up in any order."""
    stride = max(1, max(pixels.shape[:2]) // STATISTICS_SIDE)
    sampled = pixels[::stride, ::stride].reshape(-1, 3)
    return np.stack([np.bincount(sampled[:, channel], minlength=256) for channel in range(3)])


def read_row_group(store: Store, path: str, row_group: int, *, columns: Sequence[str]) -> pa.Table:
    """One row group of a shard. Raises ``DataError`` when the file is not what was packed."""
    try:
        with store.open(path) as file:
            table = pq.ParquetFile(file).read_row_group(row_group, columns=list(columns))
            return table.select(list(columns))
    except (pa.ArrowException, IndexError, KeyError, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # the store's, not the file's
            raise
        reason = " ".join(str(error).split())
        raise DataError(f"{store.uri}/{path} is damaged: {reason}", hint="pack it again") from error
