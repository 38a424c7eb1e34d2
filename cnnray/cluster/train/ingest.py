"""Images for training: units of the planned order are read, decoded and augmented by tasks.

Each worker streams the units of its own lanes, in order. (Why not by Ray Data: see ARCHITECTURE.md,
decisions.) A split that is small, and differs between epochs by
shifts and flips at most, is decoded once instead, into Ray's object store, where the workers of a
node share it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import ray

from cnnray.cluster.core.tasks import map_in_order, run_tasks, submit_tasks
from cnnray.datasets.manifest import Split
from cnnray.datasets.order import Batch, RowGroup, Unit, permutation, row_groups_of
from cnnray.datasets.sampling import BalancedSampler, Numbers, Picks
from cnnray.datasets.shards import read_row_group
from cnnray.errors import DataError, ImageError
from cnnray.images.augment import TrainTransform, copy_key
from cnnray.storage import Store

UNIT_BYTES = 16 * 1024 * 1024
"""Decoded bytes of one unit, at most: a worker holds one unit for each of its lanes."""
UNIT_ROWS = 512
"""Rows of one unit, at most: the first batch needs one unit of every lane."""
GET_SECONDS = 300.0
"""For a decoded row group to come from another node."""

Decode = Callable[[bytes, Sequence[str]], "list[np.ndarray[Any, Any]]"]
"""Data and a key for each copy → (C, H, W) uint8 copies."""


class Portion(NamedTuple):
    """A unit as an epoch wants it; where a sampler chose its samples, with them."""

    epoch: int
    unit: Unit
    picks: Picks | None = None


@dataclass(frozen=True)
class SplitReader:
    """Reads one split of a dataset on behalf of a worker."""

    store: Store
    split: Split
    transform: TrainTransform
    unit_rows: int
    seed: int
    ahead: int
    """Units of a worker that are read at a time, or wait to be used."""
    stall_seconds: float
    decoded: Mapping[tuple[int, int], Any] | None = None
    """References of batches by shard and row group, once the split is decoded."""
    sampler: BalancedSampler | None = None
    """Chooses what an epoch takes of the row groups; without one, each row once."""
    repeats: int = 1
    """Copies of each sample, augmented each in its own way; images are (B, M, C, H, W) if many."""

    @property
    def row_groups(self) -> list[RowGroup]:
        """The row groups of the split."""
        return row_groups_of([shard.row_groups for shard in self.split.files])

    def row_groups_in(self, epoch: int) -> list[RowGroup]:
        """The row groups of the split, as long as the epoch has samples of them."""
        return self.row_groups if self.sampler is None else self.sampler.sample(epoch).row_groups

    def balance(self) -> SplitReader:
        """The same reader with a sampler that takes each class equally often.

        Reads the split's labels. Raises ``DataError`` when they are not those of the manifest.
        """
        labels = dict(run_tasks(self._labels, self.row_groups, stall_seconds=self.stall_seconds))
        counts = np.bincount(
            np.concatenate(list(labels.values())), minlength=len(self.split.class_counts)
        )
        if tuple(counts.tolist()) != self.split.class_counts:
            raise DataError(
                f"the labels in {self.store.uri} are not those that its manifest counts",
                hint="pack the dataset again",
            )
        in_order = {group: labels[group] for group in self.row_groups}  # tasks end in any order
        return replace(self, sampler=BalancedSampler(in_order, seed=self.seed))

    def decode_once(self) -> SplitReader:
        """The same reader with its split decoded, if what then is left to do is quick.

        Raises ``CnnrayError`` when nothing moves; reading raises what decoding has met.
        """
        assert self.transform.is_quick

        def prepare(data: bytes, keys: Sequence[str]) -> list[np.ndarray[Any, Any]]:
            return [self.transform.prepare(data)]

        once = replace(self, repeats=1)
        decoded = submit_tasks(
            lambda group: once.read(group, _in_file_order(group), prepare),
            self.row_groups,
            stall_seconds=self.stall_seconds,
        )
        return replace(
            self, decoded={(group.shard, group.index): batch for group, batch in decoded}
        )

    def stream_epochs(
        self, epochs: range, units_of: Callable[[int], Sequence[Unit]]
    ) -> Iterator[tuple[int, Batch]]:
        """(lane, samples) of the units of one epoch after another, shuffled.

        The next epoch is read ahead while this one ends and is validated.
        """
        portions = (
            portion for epoch in epochs for portion in self._portions(epoch, units_of(epoch))
        )
        return self._stream(portions, shuffle=True)

    def share(self, rank: int, num_workers: int) -> Iterator[Batch]:
        """This worker's share of the split as it is: each row once over all workers."""
        units = [
            Unit(0, group, start, min(start + self.unit_rows, group.num_rows))
            for group in self.row_groups
            for start in range(0, group.num_rows, self.unit_rows)
        ]
        own = [Portion(0, unit) for unit in units[rank::num_workers]]
        for _, batch in self._stream(own, shuffle=False):
            yield batch

    def read(self, group: RowGroup, picks: Picks, decode: Decode) -> Batch:
        """Read and decode samples of a row group here."""
        table = self._table(group, columns=("key", "image", "label")).take(picks.rows)
        keys = table["key"].to_pylist()
        images = [
            self._decode(decode, data.as_py(), key=key, copy=copy)
            for data, key, copy in zip(table["image"], keys, picks.copies.tolist(), strict=True)
        ]
        return Batch(
            image=self._with_copies(np.stack([copy for copies in images for copy in copies])),
            label=table["label"].to_numpy().astype(np.int64),
            key=np.array(keys, dtype=object),
        )

    def _labels(self, group: RowGroup) -> Numbers:
        labels: Numbers = self._table(group, columns=("label",))["label"].to_numpy()
        return labels.astype(np.int64)

    def _table(self, group: RowGroup, *, columns: Sequence[str]) -> pa.Table:
        path = self.split.files[group.shard].path
        return read_row_group(self.store, path, group.index, columns=columns)

    def _decode(
        self, decode: Decode, data: bytes, *, key: str, copy: int
    ) -> list[np.ndarray[Any, Any]]:
        try:
            return decode(data, self._keys_of_copies(key, copy))
        except ImageError as error:
            raise DataError(
                f"{key!r} of {self.store.uri} cannot be decoded any more: {error}",
                hint="pack the dataset again",
            ) from error

    def _keys_of_copies(self, key: str, copy: int) -> list[str]:
        first = copy * self.repeats
        return [copy_key(key, number) for number in range(first, first + self.repeats)]

    def _with_copies(self, images: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """Images with the copies of each, side by side, in a dimension of their own if many."""
        return images.reshape(-1, self.repeats, *images.shape[1:]) if self.repeats > 1 else images

    def _portions(self, epoch: int, units: Sequence[Unit]) -> list[Portion]:
        if self.sampler is None:
            return [Portion(epoch, unit) for unit in units]
        sample = self.sampler.sample(epoch)
        return [Portion(epoch, unit, sample.pick(unit)) for unit in units]

    def _picks(self, portion: Portion, *, shuffle: bool) -> Picks:
        epoch, unit, picks = portion
        if picks is not None:
            return picks
        rows = np.arange(unit.start, unit.stop)
        if shuffle:
            rows = rows[permutation(unit, seed=self.seed, epoch=epoch)]
        return Picks(rows, copies=np.zeros_like(rows))

    def _stream(self, portions: Iterable[Portion], *, shuffle: bool) -> Iterator[tuple[int, Batch]]:
        stream = self._read_ahead if self.decoded is None else self._recall
        return stream(portions, shuffle=shuffle)

    def _recall(self, portions: Iterable[Portion], *, shuffle: bool) -> Iterator[tuple[int, Batch]]:
        """Units of a split that is decoded."""
        assert self.decoded is not None
        for portion in portions:
            group, lane = portion.unit.row_group, portion.unit.lane
            batch = ray.get(self.decoded[group.shard, group.index], timeout=GET_SECONDS)
            picks = self._picks(portion, shuffle=shuffle)
            keys = batch["key"][picks.rows]
            copies = map(self._keys_of_copies, keys, picks.copies.tolist())
            images = self.transform.vary(
                batch["image"][np.repeat(picks.rows, self.repeats)],
                epoch=portion.epoch,
                keys=itertools.chain.from_iterable(copies),
            )
            image, label = self._with_copies(images), batch["label"][picks.rows]
            yield lane, Batch(image=image, label=label, key=keys)

    def _read_ahead(
        self, portions: Iterable[Portion], *, shuffle: bool
    ) -> Iterator[tuple[int, Batch]]:
        """Units that tasks read and decode."""
        reader = replace(self, sampler=None)  # it has chosen; all labels need not travel

        def read(portion: Portion) -> tuple[int, Batch]:
            decode = partial(_augmented, reader.transform, portion.epoch)
            picks = reader._picks(portion, shuffle=shuffle)
            return portion.unit.lane, reader.read(portion.unit.row_group, picks, decode)

        return map_in_order(read, portions, ahead=self.ahead, stall_seconds=self.stall_seconds)


def _in_file_order(group: RowGroup) -> Picks:
    rows = np.arange(group.num_rows)
    return Picks(rows, copies=np.zeros_like(rows))


def _augmented(
    transform: TrainTransform, epoch: int, data: bytes, keys: Sequence[str]
) -> list[np.ndarray[Any, Any]]:
    return transform.variations(data, epoch=epoch, keys=keys)
