"""Ray Data for training: units of the planned order are read, decoded and augmented by tasks.

Each worker streams the units of its own lanes, in order. (Ray Data's own splitter would deal blocks
by arrival; see ARCHITECTURE.md, decisions.)
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import ray.data
from ray.data import DataContext

from cnnray.datasets.manifest import Split
from cnnray.datasets.order import Batch, RowGroup, Unit, permutation, row_groups_of
from cnnray.datasets.shards import read_row_group
from cnnray.errors import DataError, ImageError
from cnnray.storage import Store

PREFETCH_BLOCKS = 4
UNIT_BYTES = 16 * 1024 * 1024
"""Decoded bytes of one unit, at most: a worker holds one unit for each of its lanes."""
UNIT_ROWS = 512
"""Rows of one unit, at most: the first batch needs one unit of every lane."""
UNITS_PER_EXECUTION = 4000
KEPT_BYTES = 256 * 1024 * 1024
"""Decoded bytes of a validation split that a worker keeps instead of reading it every epoch."""

Decode = Callable[..., "np.ndarray[Any, Any]"]  # (data, epoch=, key=) -> (C, H, W) uint8


def set_up_data_context(*, stall_seconds: float, preserve_order: bool) -> None:
    """Bound Ray Data's waits in this process, and leave progress to us."""
    context = DataContext.get_current()
    context.execution_options.preserve_order = preserve_order
    context.execution_no_progress_timeout_s = stall_seconds
    context.enable_progress_bars = False
    context.raise_original_map_exception = True  # or its type and text never reach the driver
    context.max_map_retries = 2
    context.retried_map_errors = ["the store gave no usable answer"]  # of an UnavailableError
    logging.getLogger("ray.data").setLevel(logging.ERROR)


@dataclass(frozen=True)
class UnitReader:
    """Ray Data's map function: the number of a unit → its samples, decoded."""

    store: Store
    paths: tuple[str, ...]  # of the shards
    units: tuple[tuple[int, Unit], ...]  # with the epoch that each one is for
    decode: Decode
    seed: int
    shuffle: bool

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        [number] = batch["id"]
        epoch, unit = self.units[int(number)]
        table = read_row_group(
            self.store,
            self.paths[unit.row_group.shard],
            unit.row_group.index,
            columns=("key", "image", "label"),
        ).slice(unit.start, unit.num_rows)
        if self.shuffle:
            table = table.take(permutation(unit, seed=self.seed, epoch=epoch))
        keys = table["key"].to_pylist()
        images = [
            self._decode(data.as_py(), epoch=epoch, key=key)
            for data, key in zip(table["image"], keys, strict=True)
        ]
        return {
            "image": np.stack(images),
            "label": table["label"].to_numpy().astype(np.int64),
            "key": np.array(keys, dtype=object),
            "lane": np.full(len(keys), unit.lane, dtype=np.int32),
        }

    def _decode(self, data: bytes, *, epoch: int, key: str) -> np.ndarray[Any, Any]:
        try:
            return self.decode(data, epoch=epoch, key=key)
        except ImageError as error:
            raise DataError(
                f"{key!r} of {self.store.uri} cannot be decoded any more: {error}",
                hint="pack the dataset again",
            ) from error


@dataclass(frozen=True)
class SplitReader:
    """Reads one split of a dataset on behalf of a worker."""

    store: Store
    split: Split
    decode: Decode
    unit_rows: int
    seed: int

    @property
    def row_groups(self) -> list[RowGroup]:
        """The row groups of the split."""
        return row_groups_of([shard.row_groups for shard in self.split.files])

    def stream_epochs(
        self, epochs: range, units_of: Callable[[int], Sequence[Unit]]
    ) -> Iterator[tuple[int, Batch]]:
        """(lane, samples) of the units of one epoch after another, shuffled.

        One Ray Data execution reads as many epochs as make ``UNITS_PER_EXECUTION`` units, so that
        the next epoch is read ahead while this one ends and is validated.
        """
        pending: list[tuple[int, Unit]] = []
        for epoch in epochs:
            pending += [(epoch, unit) for unit in units_of(epoch)]
            if len(pending) >= UNITS_PER_EXECUTION or epoch == epochs[-1]:
                yield from self._stream(pending, shuffle=True)
                pending = []

    def share(self, rank: int, num_workers: int) -> Iterator[Batch]:
        """This worker's share of the split as it is: each row once over all workers."""
        units = [
            Unit(0, group, start, min(start + self.unit_rows, group.num_rows))
            for group in self.row_groups
            for start in range(0, group.num_rows, self.unit_rows)
        ]
        own = [(0, unit) for unit in units[rank::num_workers]]
        for _, batch in self._stream(own, shuffle=False):
            yield batch

    def _stream(
        self, units: Sequence[tuple[int, Unit]], *, shuffle: bool
    ) -> Iterator[tuple[int, Batch]]:
        if not units:
            return
        reader = UnitReader(
            store=self.store,
            paths=tuple(shard.path for shard in self.split.files),
            units=tuple(units),
            decode=self.decode,
            seed=self.seed,
            shuffle=shuffle,
        )
        dataset = ray.data.range(len(units), override_num_blocks=len(units)).map_batches(
            reader, batch_size=None
        )
        blocks = dataset.iter_batches(
            batch_size=None, batch_format="numpy", prefetch_batches=PREFETCH_BLOCKS
        )
        for block in blocks:
            yield int(block["lane"][0]), cast(Batch, block)


class KeptBatches:
    """The batches of a split that is passed over again and again: kept where they are small."""

    def __init__(self, read: Callable[[], Iterator[Batch]]) -> None:
        self.read = read
        self.kept: list[Batch] | None = None

    def __iter__(self) -> Iterator[Batch]:
        if self.kept is not None:
            yield from self.kept
            return
        batches: list[Batch] = []
        num_bytes = 0
        for batch in self.read():
            num_bytes += batch["image"].nbytes
            if num_bytes <= KEPT_BYTES:
                batches.append(batch)
            yield batch
        if num_bytes <= KEPT_BYTES:
            self.kept = batches
