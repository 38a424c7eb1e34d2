"""Images for training: units of the planned order are read, decoded and augmented by tasks.

Each rank streams the units of its own lanes, in order, through Ray Data. A split that is small, and
differs between epochs by shifts and flips at most, is decoded once instead, into Ray's object
store, where the ranks of a node share it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple, Protocol

import numpy as np
import pyarrow as pa
import ray

from cnnray.cluster.core.ordered import OrderedStream, ReadAhead, store_in_order
from cnnray.cluster.core.streaming import is_retried
from cnnray.cluster.train.reading import SplitReader, to_batch, to_table
from cnnray.datasets.manifest import Split
from cnnray.datasets.order import Batch, RowGroup, Unit
from cnnray.datasets.sampling import BalancedSampler, Picks, Sampler, every_row
from cnnray.errors import DataError
from cnnray.images.decode import Decoded
from cnnray.images.safe_decoder import SafeDecoder
from cnnray.images.transforms import fit

GET_SECONDS = 300.0
"""For a decoded row group to come from another node."""

Block = tuple[int, Batch]
"""A lane and the next of its samples."""


class ReadRequest(NamedTuple):
    """A unit as an epoch wants it: its samples, in the order of use."""

    epoch: int
    unit: Unit
    picks: Picks


class Source(Protocol):
    """Where the samples of requests come from."""

    def open(self, requests: Iterable[ReadRequest]) -> AbstractContextManager[Iterator[Block]]:
        """A block for each request, in their order; nothing is left running afterwards."""


@dataclass(frozen=True)
class SplitFeed:
    """One split for the ranks of a run: what each epoch takes of it, and from where."""

    reader: SplitReader
    sampler: Sampler
    source: Source
    unit_rows: int
    """Rows of one unit, at most."""

    @property
    def split(self) -> Split:
        """What the manifest says of it."""
        return self.reader.split

    @property
    def repeats(self) -> int:
        """Copies of each sample."""
        return self.reader.repeats

    def row_groups_in(self, epoch: int) -> list[RowGroup]:
        """The row groups of the split, as long as the epoch has samples of them."""
        return self.sampler.sample(epoch).row_groups

    def open_epochs(
        self, epochs: range, units_of: Callable[[int], Sequence[Unit]]
    ) -> AbstractContextManager[Iterator[Block]]:
        """The units of one epoch after another, shuffled.

        The next epoch is read ahead while this one ends and is validated.
        """
        return self.source.open(
            request for epoch in epochs for request in self._requests(epoch, units_of(epoch))
        )

    def share(self, rank: int, num_workers: int) -> Iterator[Batch]:
        """This rank's share of the split as it is: each row once over all ranks."""
        units = [
            Unit(0, group, start, min(start + self.unit_rows, group.num_rows))
            for group in self.reader.row_groups
            for start in range(0, group.num_rows, self.unit_rows)
        ]
        own = [ReadRequest(0, unit, every_row(unit)) for unit in units[rank::num_workers]]
        with self.source.open(own) as blocks:
            for _, batch in blocks:
                yield batch

    def _requests(self, epoch: int, units: Sequence[Unit]) -> list[ReadRequest]:
        sample = self.sampler.sample(epoch)
        return [ReadRequest(epoch, unit, sample.pick(unit)) for unit in units]


@dataclass(frozen=True)
class StreamedSplit:
    """Reads, decodes and augments anew in every epoch, by tasks, ahead of the training."""

    reader: SplitReader
    ahead: ReadAhead
    """Of one rank."""

    @contextmanager
    def open(self, requests: Iterable[ReadRequest]) -> Iterator[Iterator[Block]]:
        """Raises what ``OrderedStream`` raises."""
        stream = OrderedStream(partial(_read, self.reader), requests, ahead=self.ahead)
        with closing(stream) as tables:
            yield map(self._block, tables)

    def _block(self, table: pa.Table) -> Block:
        return table["lane"][0].as_py(), to_batch(table, self.reader.image_shape)


@dataclass(frozen=True)
class DecodedSplit:
    """A split that is decoded in the object store; only shifts and flips are left to do."""

    reader: SplitReader
    tables: Mapping[tuple[int, int], Any]
    """References by shard and row group."""

    @contextmanager
    def open(self, requests: Iterable[ReadRequest]) -> Iterator[Iterator[Block]]:
        """Raises Ray's errors when a row group is lost for good."""
        yield map(self._block, requests)

    def _block(self, request: ReadRequest) -> Block:
        epoch, unit, picks = request
        table = ray.get(
            self.tables[unit.row_group.shard, unit.row_group.index], timeout=GET_SECONDS
        )
        batch = to_batch(table, self.reader.image_shape[-3:])
        keys = batch["key"][picks.rows]
        copies = map(self.reader.keys_of_copies, keys, picks.copies.tolist())
        images = self.reader.transform.vary(
            batch["image"][np.repeat(picks.rows, self.reader.repeats)],
            epoch=epoch,
            keys=itertools.chain.from_iterable(copies),
        )
        image, label = self.reader.with_copies(images), batch["label"][picks.rows]
        return unit.lane, Batch(image=image, label=label, key=keys)


def balance(feed: SplitFeed, *, seed: int, stall_seconds: float) -> SplitFeed:
    """The same split with a sampler that takes each class equally often.

    Reads the labels. Raises ``DataError`` when they are not those of the manifest.
    """
    reader, groups = feed.reader, feed.reader.row_groups
    tables = store_in_order(partial(_read_labels, reader), groups, stall_seconds=stall_seconds)
    labels = [table["label"].to_numpy() for table in ray.get(tables, timeout=GET_SECONDS)]
    counts = np.bincount(np.concatenate(labels), minlength=len(feed.split.class_counts))
    if tuple(counts.tolist()) != feed.split.class_counts:
        raise DataError(
            f"the labels in {reader.store.uri} are not those that its manifest counts",
            hint="pack the dataset again",
        )
    return replace(feed, sampler=BalancedSampler(dict(zip(groups, labels, strict=True)), seed=seed))


def decode_once(feed: SplitFeed, *, stall_seconds: float) -> SplitFeed:
    """The same split decoded, where what then is left to do is quick.

    Raises ``DataError`` for an image that cannot be decoded, and what ``store_in_order`` raises.
    """
    reader, groups = feed.reader, feed.reader.row_groups
    assert reader.transform.is_quick
    tables = store_in_order(partial(_prepare, reader), groups, stall_seconds=stall_seconds)
    places = [(group.shard, group.index) for group in groups]
    return replace(feed, source=DecodedSplit(reader, dict(zip(places, tables, strict=True))))


# What tasks do


def _read(reader: SplitReader, request: ReadRequest) -> pa.Table:
    """The samples of a request, decoded and augmented, and their lane."""
    augment = partial(reader.transform.augment, epoch=request.epoch)
    with _decoder(reader) as decode:

        def variations(data: bytes, keys: Sequence[str]) -> list[np.ndarray[Any, Any]]:
            pixels = decode(data).pixels
            return [augment(pixels, key=key) for key in keys]

        table = to_table(reader.read(request.unit.row_group, request.picks, variations))
    return table.append_column("lane", pa.array(np.full(len(table), request.unit.lane, np.int32)))


def _read_labels(reader: SplitReader, group: RowGroup) -> pa.Table:
    return pa.table({"label": reader.labels(group)})


def _prepare(reader: SplitReader, group: RowGroup) -> pa.Table:
    """A whole row group as it is before shifts and flips, without repeats."""
    once = replace(reader, repeats=1)
    whole = every_row(Unit(0, group, 0, group.num_rows))
    with _decoder(reader) as decode:

        def fitted(data: bytes, keys: Sequence[str]) -> list[np.ndarray[Any, Any]]:
            return [fit(decode(data).pixels, preprocessing=reader.transform.preprocessing)]

        return to_table(once.read(group, whole, fitted))


@contextmanager
def _decoder(reader: SplitReader) -> Iterator[Callable[[bytes], Decoded]]:
    """Decodes in this process, whose end an image may be; after such an end, in a child of it.

    So the job ends with the key of an image that crashes, hangs or takes too much memory.
    """
    transform = reader.transform
    options: dict[str, Any] = {
        "channels": transform.preprocessing.channels,
        "limits": transform.limits,
        "min_side": transform.min_side,
        "seconds": reader.decode_seconds,
    }
    with SafeDecoder(careful=is_retried(), **options) as decoder, decoder.batch() as decode:
        yield decode
