"""Samplers: what an epoch takes of a split, each row once or all classes equally often.

An epoch has as many samples as the split has rows. They are a pure function of the labels and of
(seed, epoch), and no worker counts in it. To ``plan_epoch`` a row group is as long as the epoch has
samples of it, so all that ``order`` promises of rows holds of samples.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Protocol

import numpy as np
import numpy.typing as npt

from cnnray.datasets.order import Batch, RowGroup, Unit, permutation

STREAM = 0x62616C
"""Sets these draws apart from others of the same seed, such as the order's of (seed, epoch)."""

Numbers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Picks:
    """Samples of one row group, in the order of use."""

    rows: Numbers  # (N,) of the row group
    copies: Numbers  # (N,) which of the epoch's samples of its row each one is, from 0


class Sample(Protocol):
    """What one epoch takes of a split."""

    @property
    def row_groups(self) -> list[RowGroup]:
        """The row groups, as long as there are samples of them."""

    def pick(self, unit: Unit) -> Picks:
        """The samples of a unit."""


class Sampler(Protocol):
    """Says what each epoch takes of a split."""

    def sample(self, epoch: int) -> Sample:
        """A pure function of the epoch."""


@dataclass(frozen=True)
class PlainSampler:
    """Takes each row once, and permutes those of a unit."""

    row_groups: tuple[RowGroup, ...]
    seed: int

    def sample(self, epoch: int) -> PlainSample:
        """All rows."""
        return PlainSample(list(self.row_groups), self.seed, epoch)


@dataclass(frozen=True)
class PlainSample:
    """Each row once."""

    row_groups: list[RowGroup]
    seed: int
    epoch: int

    def pick(self, unit: Unit) -> Picks:
        """The rows of a unit, in an order that is drawn anew in every epoch."""
        order = permutation(unit, seed=self.seed, epoch=self.epoch)
        picks = every_row(unit)
        return Picks(picks.rows[order], picks.copies)


def every_row(unit: Unit) -> Picks:
    """The rows of a unit in the order of the file, each once."""
    rows = np.arange(unit.start, unit.stop)
    return Picks(rows, copies=np.zeros_like(rows))


@dataclass(frozen=True)
class EpochSample:
    """What one epoch takes of each row group."""

    counts: Mapping[RowGroup, Numbers]  # how often each row is taken
    seed: tuple[int, ...]

    @cached_property
    def row_groups(self) -> list[RowGroup]:
        """The row groups, as long as there are samples of them."""
        return [replace(group, num_rows=int(n.sum())) for group, n in self.counts.items()]

    def pick(self, unit: Unit) -> Picks:
        """The samples of a unit. A row's may be anywhere in its row group, not side by side."""
        counts = self._counts_of[unit.row_group]
        place = (unit.row_group.shard, unit.row_group.index)
        order = np.random.default_rng((*self.seed, *place)).permutation(unit.row_group.num_rows)
        samples = order[unit.start : unit.stop]
        rows = np.repeat(np.arange(len(counts)), counts)[samples]
        firsts = np.cumsum(counts) - counts
        return Picks(rows, copies=samples - firsts[rows])

    @cached_property
    def _counts_of(self) -> dict[RowGroup, Numbers]:
        return dict(zip(self.row_groups, self.counts.values(), strict=True))


@dataclass(frozen=True)
class BalancedSampler:
    """Takes each class equally often: frequent ones in part, rare ones many times."""

    labels: Mapping[RowGroup, Numbers]  # of the rows of each row group
    seed: int

    def sample(self, epoch: int) -> EpochSample:
        """As many samples as there are rows.

        The classes that there are get equal numbers of them, up to one, and so do the rows of a
        class. Who gets one more is drawn anew in every epoch.
        """
        seed = (self.seed, epoch, STREAM)
        generator = np.random.default_rng(seed)
        labels = np.concatenate([*self.labels.values(), np.zeros(0, dtype=np.int64)])
        classes, sizes = np.unique(labels, return_counts=True)
        rows_by_class = np.split(np.argsort(labels, kind="stable"), np.cumsum(sizes)[:-1])
        counts = np.zeros(len(labels), dtype=np.int64)
        wanted = _deal(len(labels), len(classes), generator)
        for rows, number in zip(rows_by_class[: len(classes)], wanted.tolist(), strict=True):
            counts[rows] = _deal(number, len(rows), generator)
        ends = np.cumsum([group.num_rows for group in self.labels], dtype=np.int64)
        parts = np.split(counts, ends[:-1])
        return EpochSample(dict(zip(self.labels, parts, strict=False)), seed)


def spread_copies(batch: Batch) -> Batch:
    """A batch of (B, M, C, H, W) images, M copies of each, as one of B x M samples."""
    shape = batch["image"].shape
    if len(shape) == 4:
        return batch
    return Batch(
        image=batch["image"].reshape(-1, *shape[2:]),
        label=np.repeat(batch["label"], shape[1]),
        key=np.repeat(batch["key"], shape[1]),
    )


def _deal(total: int, places: int, generator: np.random.Generator) -> Numbers:
    """``total`` in shares that differ by one at most; who gets one more is drawn."""
    share, rest = divmod(total, places) if places else (0, 0)
    dealt: Numbers = share + (generator.permutation(places) < rest).astype(np.int64)
    return dealt
