"""Tables in the order in which they are needed, made by tasks and read ahead through Ray Data.

Training depends on the order: it is a function of the seed, so the results must come in the order
of the items whichever is done first, and a stream that goes on elsewhere needs no state but them.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import pyarrow as pa
import ray
import ray.data
from ray.data import Datasource, TaskPoolStrategy
from ray.data.block import BlockMetadata
from ray.data.datasource import ReadTask

from cnnray.cluster.core.deadline import Drawn
from cnnray.cluster.core.streaming import (
    GRACE_SECONDS,
    MAX_RETRIES,
    MAX_UNITS,
    Pause,
    TrainingPause,
    blocks,
    building,
    data_context,
    references,
    translated_errors,
)
from cnnray.errors import IncompleteError

Item = TypeVar("Item")

FIRST_UNITS = 256
"""Items of a stream's first execution: each costs about a millisecond before the first one runs."""
FUNCTION_SECONDS = 300.0
"""For a function to reach a task: it is fetched once by each process."""


@dataclass(frozen=True)
class ReadAhead:
    """How far a stream runs ahead of who uses it, and for how long nothing may move."""

    tasks: int
    """at a time"""
    num_bytes: float
    """of tables that are being made, or wait"""
    stall_seconds: float


class OrderedStream(Iterator[pa.Table], Generic[Item]):
    """What a function makes of each item, in the order of the items, read ahead from now on.

    Each item is one task of one CPU, anywhere on the cluster, and its table is one block. Items are
    executed by Ray Data in batches of up to ``MAX_UNITS``; the next batch begins before the present
    one ends. ``close`` ends what is under way.

    ``next`` raises a ``CnnrayError`` of the function as it is, in its place or sooner, a bug as
    ``CnnrayError``, and ``IncompleteError`` when a task keeps killing its worker or nothing moves
    for ``stall_seconds``. A store that gave no answer is asked again first.
    """

    def __init__(
        self,
        function: Callable[[Item], pa.Table],
        items: Iterable[Item],
        *,
        ahead: ReadAhead,
        pause: type[Pause] = TrainingPause,
        max_units: int = MAX_UNITS,
    ) -> None:
        self._shared = [ray.put(function)]
        self._items = iter(items)
        self._ahead = ahead
        self._pause = pause
        self._max_units = max_units
        self._following: _Execution | None = None
        self._present = self._begin(min(FIRST_UNITS, max_units))

    def __next__(self) -> pa.Table:
        try:
            with translated_errors(stall_seconds=self._ahead.stall_seconds):
                return self._take()
        except StopIteration:
            raise
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End what is under way; nothing comes any more. Any thread may call it."""
        executions = (self._present, self._following)
        self._present = self._following = None
        self._items = iter(())
        for execution in executions:
            if execution is not None:
                execution.tables.close()

    def _take(self) -> pa.Table:
        while (present := self._present) is not None:
            table = next(present.tables, None)
            if table is not None:
                present.left -= 1
                if self._following is None and present.left <= present.size // 10:
                    self._following = self._begin(self._max_units)
                return table
            if present.left and self._present is not None:
                raise IncompleteError(f"{present.left} of {present.size} tables never came")
            self._present, self._following = self._following, None
        raise StopIteration

    def _begin(self, count: int) -> _Execution | None:
        items = list(itertools.islice(self._items, count))
        return _Execution(self._execute(items), items, self._ahead) if items else None

    def _execute(self, items: Sequence[Item]) -> Iterator[pa.Table]:
        dataset = _dataset(
            self._shared,
            items,
            size=self._ahead.tasks,
            stall_seconds=self._ahead.stall_seconds,
            read_ahead_bytes=self._ahead.num_bytes,
            pause=self._pause,
        )
        yield from blocks(dataset, stall_seconds=self._ahead.stall_seconds)


class _Execution:
    """One execution of Ray Data, which a thread builds and draws from."""

    def __init__(self, tables: Iterator[pa.Table], items: Sequence[Any], ahead: ReadAhead) -> None:
        self.tables = Drawn(tables, seconds=ahead.stall_seconds + GRACE_SECONDS)
        self.size = self.left = len(items)


def store_in_order(
    function: Callable[[Item], pa.Table], items: Sequence[Item], *, stall_seconds: float
) -> list[Any]:
    """References of what a function makes of each item, in the order of the items.

    The tables stay in the object store, where they were made, as long as the references do. Raises
    what ``OrderedStream`` raises.
    """
    if not items:
        return []

    dataset = _dataset([ray.put(function)], items, stall_seconds=stall_seconds)
    drawn = Drawn(references(dataset), seconds=stall_seconds + GRACE_SECONDS)
    try:
        with translated_errors(stall_seconds=stall_seconds):
            stored = list(drawn)
    finally:
        drawn.close()
    if len(stored) != len(items):
        raise IncompleteError(f"{len(stored)} of {len(items)} tables came")
    return stored


def _dataset(
    shared: Sequence[Any],
    items: Sequence[Any],
    *,
    stall_seconds: float,
    size: int | None = None,
    read_ahead_bytes: float | None = None,
    pause: type[Pause] = Pause,
) -> ray.data.Dataset:
    """The tables of some items; nothing runs yet. ``shared`` has the function's reference."""
    context = data_context(
        stall_seconds=stall_seconds, ordered=True, read_ahead_bytes=read_ahead_bytes, pause=pause
    )
    with building(context):
        return ray.data.read_datasource(
            _Items(shared, items),
            override_num_blocks=len(items),  # else Ray Data would split tables
            compute=TaskPoolStrategy(size=min(size or len(items), len(items))),
            num_cpus=1,
            # Anywhere, also when it comes from a trial of Ray Tune, whose reservation has no CPU.
            ray_remote_args={"max_retries": MAX_RETRIES, "scheduling_strategy": "DEFAULT"},
        )


class _Items(Datasource):  # type: ignore[misc]
    """One read task for each item, in order; Ray Data asks for them several times."""

    def __init__(self, shared: Sequence[Any], items: Sequence[Any]) -> None:
        super().__init__()
        self.shared = shared
        self.items = items

    def get_name(self) -> str:
        return "Ordered"

    def estimate_inmemory_data_size(self) -> int | None:
        return None

    def get_read_tasks(
        self, parallelism: int, per_task_row_limit: int | None = None, data_context: Any = None
    ) -> list[ReadTask]:
        unknown = BlockMetadata(num_rows=None, size_bytes=None, input_files=None, exec_stats=None)
        return [
            ReadTask(functools.partial(_make_table, self.shared, item), unknown)
            for item in self.items
        ]


def _make_table(shared: Sequence[Any], item: Any) -> list[pa.Table]:
    """What a task does. The function comes by reference, as it may be large and items are many."""
    return [_fetch(shared[0])(item)]


@functools.lru_cache(maxsize=4)
def _fetch(reference: Any) -> Callable[[Any], pa.Table]:
    function: Callable[[Any], pa.Table] = ray.get(reference, timeout=FUNCTION_SECONDS)
    return function
