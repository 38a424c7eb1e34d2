"""Reading samples of a split: encoded in its shards, decoded as a batch. No Ray."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from cnnray.datasets.manifest import Split
from cnnray.datasets.order import Batch, RowGroup, row_groups_of
from cnnray.datasets.sampling import Numbers, Picks
from cnnray.datasets.shards import read_row_group
from cnnray.errors import DataError, ImageError
from cnnray.images.augment import TrainTransform, copy_key
from cnnray.images.isolation import DEFAULT_SECONDS
from cnnray.storage import Store

Decode = Callable[[bytes, Sequence[str]], "list[np.ndarray[Any, Any]]"]
"""Data and a key for each copy → (C, H, W) uint8 copies."""


@dataclass(frozen=True)
class SplitReader:
    """Reads one split of a dataset, and says what becomes of its images."""

    store: Store
    split: Split
    transform: TrainTransform
    repeats: int = 1
    """Copies of each sample, augmented each in its own way; images are (B, M, C, H, W) if many."""
    decode_seconds: float = DEFAULT_SECONDS
    """For one image: one that takes longer is refused."""

    @property
    def row_groups(self) -> list[RowGroup]:
        """The row groups of the split."""
        return row_groups_of([shard.row_groups for shard in self.split.files])

    @property
    def image_shape(self) -> tuple[int, ...]:
        """Of what a batch holds for each sample: (C, H, W), or (M, C, H, W)."""
        preprocessing = self.transform.preprocessing
        shape = (preprocessing.channels, preprocessing.size, preprocessing.size)
        return (self.repeats, *shape) if self.repeats > 1 else shape

    def labels(self, group: RowGroup) -> Numbers:
        """The labels of a row group, (N,)."""
        labels: Numbers = self._table(group, columns=("label",))["label"].to_numpy()
        return labels.astype(np.int64)

    def read(self, group: RowGroup, picks: Picks, decode: Decode) -> Batch:
        """Read and decode samples of a row group.

        Raises ``DataError`` with the key of an image that ``decode`` refuses.
        """
        table = self._table(group, columns=("key", "image", "label")).take(picks.rows)
        keys = table["key"].to_pylist()
        images = [
            self._decode(decode, data.as_py(), key=key, copy=copy)
            for data, key, copy in zip(table["image"], keys, picks.copies.tolist(), strict=True)
        ]
        return Batch(
            image=self.with_copies(np.stack([copy for copies in images for copy in copies])),
            label=table["label"].to_numpy().astype(np.int64),
            key=np.array(keys, dtype=object),
        )

    def keys_of_copies(self, key: str, copy: int) -> list[str]:
        """The keys by which the repeats of a sample are augmented."""
        first = copy * self.repeats
        return [copy_key(key, number) for number in range(first, first + self.repeats)]

    def with_copies(self, images: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """Images with the copies of each, side by side, in a dimension of their own if many."""
        return images.reshape(-1, self.repeats, *images.shape[1:]) if self.repeats > 1 else images

    def _table(self, group: RowGroup, *, columns: Sequence[str]) -> pa.Table:
        path = self.split.files[group.shard].path
        return read_row_group(self.store, path, group.index, columns=columns)

    def _decode(
        self, decode: Decode, data: bytes, *, key: str, copy: int
    ) -> list[np.ndarray[Any, Any]]:
        try:
            return decode(data, self.keys_of_copies(key, copy))
        except ImageError as error:
            raise DataError(
                f"{key!r} of {self.store.uri} cannot be decoded any more: {error}",
                hint="pack the dataset again",
            ) from error


def to_table(batch: Batch) -> pa.Table:
    """A batch as Arrow, the pixels of each sample as one cell, in the batch's own memory."""
    images = np.ascontiguousarray(batch["image"])
    cell = pa.binary(images[0].nbytes)
    pixels = pa.Array.from_buffers(cell, len(images), [None, pa.py_buffer(images)])
    return pa.table(
        {
            "key": pa.array(batch["key"], pa.string()),
            "label": pa.array(batch["label"], pa.int64()),
            "image": pixels,
        }
    )


def to_batch(table: pa.Table, shape: Sequence[int]) -> Batch:
    """The inverse, in the table's memory; ``shape`` is that of a sample's images."""
    column = table["image"]  # combine_chunks copies a single chunk, too
    column = column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()
    cell = column.type.byte_width
    pixels = np.frombuffer(column.buffers()[1], np.uint8)
    pixels = pixels[column.offset * cell : (column.offset + len(column)) * cell]
    return Batch(
        image=pixels.reshape(-1, *shape),
        label=table["label"].to_numpy(),
        key=table["key"].to_numpy(),
    )
