"""The order log: which sample went into which step on which rank, as Parquet.

    <folder>/epoch-00003/step-00000120-rank-00001.parquet

A rank writes a piece when a checkpoint is due and when its epoch ends. A run that goes on from a
checkpoint first removes the pieces that begin there or later, so the log holds each sample once.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

import pyarrow as pa

from cnnray.datasets.order import Batch
from cnnray.errors import MissingObjectError
from cnnray.schema import ORDER_SCHEMA
from cnnray.storage import Store, encode_parquet
from cnnray.training.places import Place

PIECE = re.compile(r"epoch-(\d+)/(?:step-(\d+)-)?rank-\d+\.parquet")
"""Older versions wrote one file for each rank, without a step."""


class OrderLog:
    """One rank's part of the log."""

    def __init__(self, store: Store, *, rank: int) -> None:
        self.store = store
        self.rank = rank
        self.place = Place(0)  # where what is not written yet begins
        self.keys: list[list[str]] = []  # of each step since then

    def record(self, batches: Iterable[Batch], *, begin: Place) -> Iterator[Batch]:
        """The same batches, those of an epoch from a place on; they are written after the last."""
        self.place, self.keys = begin, []
        for batch in batches:
            self.keys.append(batch["key"].tolist())
            yield batch
        self.flush()

    def flush(self) -> None:
        """Write what was recorded and is not written yet (``ORDER_SCHEMA``)."""
        if not self.keys:
            return
        epoch, first_step = self.place.epoch, self.place.step
        steps = [step for step, keys in enumerate(self.keys, first_step) for _ in keys]
        keys = [key for keys in self.keys for key in keys]
        columns = [[epoch] * len(keys), steps, [self.rank] * len(keys), keys]
        self.store.write(
            f"epoch-{epoch:05d}/step-{first_step:08d}-rank-{self.rank:05d}.parquet",
            encode_parquet(pa.table(columns, ORDER_SCHEMA)),
        )
        self.place, self.keys = Place(epoch, first_step + len(self.keys)), []


def remove_order(store: Store, *, begin: Place) -> None:
    """Remove the pieces that begin at a place or later; before a rank trains on from there."""
    try:
        names = [item.key for item in store.list()]
    except MissingObjectError:
        return
    for name in names:
        match = PIECE.fullmatch(name)
        if match and (int(match[1]), int(match[2] or 0)) >= (begin.epoch, begin.step):
            store.delete(name)
