"""Ray Data for training: units of the planned order are read, decoded and augmented by tasks.

Each worker streams the units of its own lanes, in order. (Ray Data's own splitter would deal blocks
by arrival; see ARCHITECTURE.md, decisions.) A split that is small, and differs between epochs by
shifts and flips at most, is decoded once instead, into Ray's object store, where the workers of a
node share it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import numpy as np
import ray
import ray.data
from ray.data import DataContext

from cnnray.cluster.tasks import submit_tasks
from cnnray.datasets.manifest import Split
from cnnray.datasets.order import Batch, RowGroup, Unit, permutation, row_groups_of
from cnnray.datasets.shards import read_row_group
from cnnray.errors import DataError, ImageError
from cnnray.images.augment import TrainTransform
from cnnray.storage import Store

PREFETCH_BLOCKS = 4
UNIT_BYTES = 16 * 1024 * 1024
"""Decoded bytes of one unit, at most: a worker holds one unit for each of its lanes."""
UNIT_ROWS = 512
"""Rows of one unit, at most: the first batch needs one unit of every lane."""
UNITS_PER_EXECUTION = 4000
GET_SECONDS = 300.0
"""For a decoded row group to come from another node."""

Decode = Callable[[bytes, str], "np.ndarray[Any, Any]"]  # data and key -> (C, H, W) uint8
Order = np.ndarray[Any, np.dtype[np.int64]]


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
class SplitReader:
    """Reads one split of a dataset on behalf of a worker."""

    store: Store
    split: Split
    transform: TrainTransform
    unit_rows: int
    seed: int
    decoded: Mapping[RowGroup, Any] | None = None  # references of batches, once it is decoded

    @property
    def row_groups(self) -> list[RowGroup]:
        """The row groups of the split."""
        return row_groups_of([shard.row_groups for shard in self.split.files])

    def decode_once(self, *, stall_seconds: float) -> SplitReader:
        """The same reader with its split decoded, if what then is left to do is quick.

        Raises ``CnnrayError`` when nothing moves; reading raises what decoding has met.
        """
        assert self.transform.is_quick

        def prepare(data: bytes, key: str) -> np.ndarray[Any, Any]:
            return self.transform.prepare(data)

        decoded = submit_tasks(
            lambda group: self.read(Unit(0, group, 0, group.num_rows), prepare),
            self.row_groups,
            stall_seconds=stall_seconds,
        )
        return replace(self, decoded=dict(decoded))

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

    def read(self, unit: Unit, decode: Decode, *, order: Order | None = None) -> Batch:
        """Read and decode the samples of a unit here, in an order of offsets from its start."""
        table = read_row_group(
            self.store,
            self.split.files[unit.row_group.shard].path,
            unit.row_group.index,
            columns=("key", "image", "label"),
        ).slice(unit.start, unit.num_rows)
        if order is not None:
            table = table.take(order)
        keys = table["key"].to_pylist()
        images = [
            self._decode(decode, data.as_py(), key)
            for data, key in zip(table["image"], keys, strict=True)
        ]
        return Batch(
            image=np.stack(images),
            label=table["label"].to_numpy().astype(np.int64),
            key=np.array(keys, dtype=object),
        )

    def _decode(self, decode: Decode, data: bytes, key: str) -> np.ndarray[Any, Any]:
        try:
            return decode(data, key)
        except ImageError as error:
            raise DataError(
                f"{key!r} of {self.store.uri} cannot be decoded any more: {error}",
                hint="pack the dataset again",
            ) from error

    def _order(self, unit: Unit, *, epoch: int, shuffle: bool) -> Order | None:
        return permutation(unit, seed=self.seed, epoch=epoch) if shuffle else None

    def _stream(
        self, units: Sequence[tuple[int, Unit]], *, shuffle: bool
    ) -> Iterator[tuple[int, Batch]]:
        if self.decoded is not None:
            yield from self._recall(units, shuffle=shuffle)
        elif units:
            yield from self._read_ahead(units, shuffle=shuffle)

    def _recall(
        self, units: Sequence[tuple[int, Unit]], *, shuffle: bool
    ) -> Iterator[tuple[int, Batch]]:
        """Units of a split that is decoded."""
        assert self.decoded is not None
        for epoch, unit in units:
            group = ray.get(self.decoded[unit.row_group], timeout=GET_SECONDS)
            rows: Any = slice(unit.start, unit.stop)
            if (order := self._order(unit, epoch=epoch, shuffle=shuffle)) is not None:
                rows = unit.start + order
            keys = group["key"][rows]
            images = self.transform.vary(group["image"][rows], epoch=epoch, keys=keys)
            yield unit.lane, Batch(image=images, label=group["label"][rows], key=keys)

    def _read_ahead(
        self, units: Sequence[tuple[int, Unit]], *, shuffle: bool
    ) -> Iterator[tuple[int, Batch]]:
        """Units that Ray Data's tasks read and decode."""

        def read(row: dict[str, Any]) -> dict[str, Any]:
            epoch, unit = units[int(row["id"][0])]
            order = self._order(unit, epoch=epoch, shuffle=shuffle)
            decode = partial(_augmented, self.transform, epoch)
            batch = self.read(unit, decode, order=order)
            return {**batch, "lane": np.full(unit.num_rows, unit.lane, dtype=np.int32)}

        dataset = ray.data.range(len(units), override_num_blocks=len(units)).map_batches(
            read, batch_size=None
        )
        blocks = dataset.iter_batches(
            batch_size=None, batch_format="numpy", prefetch_batches=PREFETCH_BLOCKS
        )
        for block in blocks:
            yield int(block["lane"][0]), cast(Batch, block)


def _augmented(
    transform: TrainTransform, epoch: int, data: bytes, key: str
) -> np.ndarray[Any, Any]:
    return transform(data, epoch=epoch, key=key)
