"""The sample order of training: a pure function of (seed, epoch), the same for any worker count.

An epoch is a shuffled sequence of row groups, cut into ``lanes`` of consecutive rows. Global batch
k takes the next rows of every lane, so it holds the same samples whichever workers own the lanes,
and each row group is read by one worker (two where a lane ends inside it). Within a lane, the rows
of a *unit* (a piece of one row group) are permuted: a reader holds back no more than that.

The idea of a canonical partition that does not depend on the workers is MosaicML Streaming's
("elastic determinism"); here it is cut at row precision, so no sample is dropped or repeated.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypedDict

import numpy as np
import numpy.typing as npt

NUM_LANES = 24
"""Divisible by 1, 2, 3, 4, 6, 8, 12 and 24 workers; other counts get uneven shares, as exact."""


STAGED_BYTES = 1024 * 1024
"""Images that ``assemble`` puts together at a time, at most; one batch at least."""


class Batch(TypedDict):
    """``image`` (B, C, H, W) uint8, ``label`` (B,) int64, ``key`` (B,) of str."""

    image: npt.NDArray[np.uint8]
    label: npt.NDArray[np.int64]
    key: npt.NDArray[np.object_]


@dataclass(frozen=True, slots=True)
class RowGroup:
    """A row group of a shard, by its indices in the manifest, and its rows."""

    shard: int
    index: int
    num_rows: int


@dataclass(frozen=True, slots=True)
class Unit:
    """Rows ``start`` to ``stop`` of a row group, for one lane: what one read task produces."""

    lane: int
    row_group: RowGroup
    start: int
    stop: int

    @property
    def num_rows(self) -> int:
        """Rows of the unit."""
        return self.stop - self.start


def row_groups_of(shards: Iterable[Sequence[int]]) -> list[RowGroup]:
    """The row groups of a split, from the rows of each one in each shard."""
    return [
        RowGroup(shard, index, num_rows)
        for shard, rows in enumerate(shards)
        for index, num_rows in enumerate(rows)
    ]


@dataclass(frozen=True)
class EpochOrder:
    """The order of one epoch."""

    units: tuple[Unit, ...]  # in the order in which they are first needed
    batch_sizes: npt.NDArray[np.int64]  # (steps,) global
    num_lanes: int

    @property
    def num_steps(self) -> int:
        """Optimizer steps of the epoch."""
        return len(self.batch_sizes)

    def units_of(self, lanes: Sequence[int], *, first_step: int = 0) -> list[Unit]:
        """The units of some lanes that steps from ``first_step`` on need, in the order of need."""
        units, _ = self._from(first_step)
        owned = set(lanes)
        return [unit for unit in units if unit.lane in owned]

    def rows_to_skip(self, first_step: int) -> npt.NDArray[np.int64]:
        """(lanes,): rows of the first unit that each lane still needs which earlier steps used."""
        return self._from(first_step)[1]

    def _from(self, first_step: int) -> tuple[list[Unit], npt.NDArray[np.int64]]:
        shares = _shares(self.batch_sizes[:first_step], num_lanes=self.num_lanes)
        used = shares.sum(axis=0)  # (lanes,): rows that are not in a unit left out so far
        needed: list[Unit] = []
        reached: set[int] = set()  # lanes whose first unit that is needed has come
        for unit in self.units:
            if unit.lane not in reached and unit.num_rows <= used[unit.lane]:
                used[unit.lane] -= unit.num_rows
            else:
                reached.add(unit.lane)
                needed.append(unit)
        return needed, used


def plan_epoch(
    row_groups: Sequence[RowGroup],
    *,
    seed: int,
    epoch: int,
    global_batch_size: int,
    max_unit_rows: int,
    num_lanes: int = NUM_LANES,
) -> EpochOrder:
    """The order of an epoch that uses every row once.

    A remainder smaller than two samples a lane joins the last batch instead of making a batch so
    small that its gradient (and batch statistics) would be noise.
    """
    num_rows = sum(group.num_rows for group in row_groups)
    sizes = _batch_sizes(num_rows, global_batch_size, smallest=2 * num_lanes)
    generator = np.random.default_rng((seed, epoch))
    shuffled = [row_groups[index] for index in generator.permutation(len(row_groups))]
    lane_rows = _shares(sizes, num_lanes=num_lanes).sum(axis=0)  # (lanes,)
    ends = np.cumsum(lane_rows)
    placed: list[tuple[float, Unit]] = []
    position = 0  # of a row in the shuffled sequence
    for group in shuffled:
        start = 0
        while start < group.num_rows:
            lane = int(np.searchsorted(ends, position, side="right"))
            rows = min(group.num_rows - start, int(ends[lane]) - position, max_unit_rows)
            done_before = (position - (ends[lane] - lane_rows[lane])) / lane_rows[lane]
            placed.append((float(done_before), Unit(lane, group, start, start + rows)))
            start += rows
            position += rows
    placed.sort(key=lambda item: (item[0], item[1].lane))
    return EpochOrder(tuple(unit for _, unit in placed), sizes, num_lanes)


def _batch_sizes(num_rows: int, size: int, *, smallest: int) -> npt.NDArray[np.int64]:
    full, rest = divmod(num_rows, size)
    sizes = [size] * full
    if rest and (not sizes or rest >= smallest):
        sizes.append(rest)
    elif rest:
        sizes[-1] += rest
    return np.array(sizes, dtype=np.int64)


def _shares(sizes: npt.NDArray[np.int64], *, num_lanes: int) -> npt.NDArray[np.int64]:
    """(steps, lanes): how many rows each lane gives to each global batch."""
    return sizes[:, None] // num_lanes + (np.arange(num_lanes) < sizes[:, None] % num_lanes)


def permutation(unit: Unit, *, seed: int, epoch: int) -> npt.NDArray[np.int64]:
    """The order of a unit's rows, as offsets from its start."""
    place = (unit.row_group.shard, unit.row_group.index, unit.start)
    return np.random.default_rng((seed, epoch, *place)).permutation(unit.num_rows)


def lanes_of(rank: int, *, num_workers: int, num_lanes: int = NUM_LANES) -> list[int]:
    """The lanes that a worker feeds on; dealt in turn, so that uneven lanes spread."""
    return list(range(rank, num_lanes, num_workers))


def assemble(
    order: EpochOrder,
    blocks: Iterable[tuple[int, Batch]],
    *,
    lanes: Sequence[int],
    first_step: int = 0,
) -> Iterator[Batch]:
    """This worker's part of every global batch from ``first_step`` on.

    ``blocks`` are (lane, rows), in the order of the units that those steps need. Raises
    ``ValueError`` when they end before the epoch does: an epoch that is fed fewer rows than it was
    promised must never look finished. Also when a batch has fewer samples than there are workers.
    """
    own = _shares(order.batch_sizes, num_lanes=order.num_lanes)[:, lanes]  # (steps, own lanes)
    if not own[first_step:].any(axis=1).all():
        raise ValueError("a batch has no sample for this worker: there are more workers than that")
    lines = [_Line() for _ in lanes]
    line_of = dict(zip(lanes, lines, strict=True))
    source = iter(blocks)

    def draw(step: int, rows: npt.NDArray[np.int64]) -> None:
        """Have so many rows of each lane."""
        for line, wanted in zip(lines, rows.tolist(), strict=True):
            while line.stored < wanted:
                lane, block = next(source, (-1, None))
                if block is None:
                    raise ValueError(f"the data ended at step {step} of {order.num_steps}")
                line_of[lane].append(block)

    skipped = order.rows_to_skip(first_step)[lanes]
    draw(first_step, skipped)
    for line, count in zip(lines, skipped.tolist(), strict=True):
        line.take(count)
    step = first_step
    while step < order.num_steps:
        draw(step, own[step])
        ready = _steps_ready(lines, own[step:])
        yield from _stage(lines, own[step : step + ready])
        step += ready


class _Line:
    """Rows of one lane that wait for their steps."""

    def __init__(self) -> None:
        self.blocks: deque[Batch] = deque()
        self.stored = 0

    def append(self, block: Batch) -> None:
        self.blocks.append(block)
        self.stored += len(block["label"])

    def take(self, count: int) -> list[Batch]:
        """The next rows, as parts of blocks."""
        self.stored -= count
        parts: list[Batch] = []
        while count:
            block = self.blocks.popleft()
            size = len(block["label"])
            if size > count:
                self.blocks.appendleft(_slice(block, count, size))
                block, size = _slice(block, 0, count), count
            parts.append(block)
            count -= size
        return parts


def _steps_ready(lines: Sequence[_Line], own: npt.NDArray[np.int64]) -> int:
    """How many of the steps of ``own`` (steps, lanes) rows need no more blocks; at least one."""
    first = next(line.blocks[0] for line in lines if line.blocks)
    batch_bytes = int(own[0].sum()) * first["image"][:1].nbytes
    most = max(1, STAGED_BYTES // max(1, batch_bytes))
    stored = np.array([line.stored for line in lines])
    return max(1, int((own[:most].cumsum(axis=0) <= stored).all(axis=1).sum()))


def _stage(lines: Sequence[_Line], own: npt.NDArray[np.int64]) -> Iterator[Batch]:
    """The batches of some steps, put together at once: a lane has but a row or two for each."""
    taken = own.sum(axis=0).tolist()
    rows = _concatenate(
        [part for line, count in zip(lines, taken, strict=True) for part in line.take(count)]
    )
    if len(own) > 1:
        rows = _take(rows, _by_step(own))
    ends = own.sum(axis=1).cumsum().tolist()
    for start, stop in zip([0, *ends], ends, strict=False):
        yield _slice(rows, start, stop)


def _by_step(own: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Where rows that lie lane by lane are for those who want them step by step."""
    lane_of = np.repeat(np.tile(np.arange(own.shape[1]), len(own)), own.ravel())
    places = np.empty(len(lane_of), dtype=np.int64)
    places[np.argsort(lane_of, kind="stable")] = np.arange(len(lane_of))
    return places


def _take(batch: Batch, rows: npt.NDArray[np.int64]) -> Batch:
    return Batch(image=batch["image"][rows], label=batch["label"][rows], key=batch["key"][rows])


def _slice(batch: Batch, start: int, stop: int) -> Batch:
    return Batch(
        image=batch["image"][start:stop],
        label=batch["label"][start:stop],
        key=batch["key"][start:stop],
    )


def _concatenate(parts: Sequence[Batch]) -> Batch:
    if len(parts) == 1:
        return parts[0]
    return Batch(
        image=np.concatenate([part["image"] for part in parts]),
        label=np.concatenate([part["label"] for part in parts]),
        key=np.concatenate([part["key"] for part in parts]),
    )
