"""Ray Data as cnnray uses it: its settings, its bounds and its errors, in one place.

Ray Data's defaults suit a notebook: retries without end, a stall that is noticed after half an
hour, a scheduling loop that polls without a pause. A nightly job needs all of it bounded.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import pyarrow as pa
import ray
import ray.data
from ray.cloudpickle import dumps, loads
from ray.data import (
    ActorPoolStrategy,
    DataContext,
    Dataset,
    ExecutionResources,
    TaskPoolStrategy,
)
from ray.data.exceptions import ExecutionTimeoutError

from cnnray.cluster.core.deadline import DeadlineError, end_of_drawing, within
from cnnray.cluster.core.failures import RETRY_ADVICE, alone, find_cause, last_line
from cnnray.errors import CnnrayError, IncompleteError

Item = TypeVar("Item")
Result = TypeVar("Result")

logger = logging.getLogger(__name__)

MAX_UNITS = 2_000
"""Inputs of one execution: each costs the driver about a millisecond before the first one runs."""
TASKS_PER_ACTOR = 2
"""Units that an actor has at a time: one that it works on, one that is fetched meanwhile."""
MAX_RESTARTS = 3
"""Of one actor. (Ray Data's own default is to restart for ever.)"""
MAX_RETRIES = 3
"""Of a task whose worker died. (Ray Data's own default is without end.)"""
MAX_STORE_RETRIES = 2
"""In a task, after the store has given no usable answer: an outage may be over by then."""
GRACE_SECONDS = 60.0
"""Beyond Ray Data's own deadline, which a scheduling step that hangs never reaches."""

_building = threading.Lock()
"""The current context, which a dataset is made with, is the process's, not a thread's."""


@dataclass(frozen=True)
class Stage:
    """A pool of actors of one kind: how each is made, how many there may be, what each reserves.

    ``actor`` is a class; an actor is called with a table and returns one, or several from a
    generator. The pool begins with ``min_workers`` and grows up to ``max_workers`` while there is
    work for more.
    """

    actor: type
    arguments: dict[str, Any]
    min_workers: int
    max_workers: int
    num_cpus: float
    num_gpus: float = 0.0


class UnwantedError(Exception):
    """Ends an execution from within; nobody is left to see it."""


class Pause:
    """Lets no two steps of Ray Data's scheduling loop begin within ``SECONDS``.

    The loop waits only for tasks that are running. While its output waits to be taken there are
    none, and it polls some 600 times a second: 0.85 of a core, and the interpreter's lock, which
    the training needs. A step that has waited is not delayed. And it ends a loop whose output
    nobody wants any more: Ray Data itself would go on, with its actors, until the process ends.
    (An ``ExecutionCallback`` by its methods; it lives in the loop's own thread.)
    """

    SECONDS = 0.02

    def before_execution_starts(self, executor: Any) -> None:
        """Note when the loop begins, in the thread that draws from it."""
        self.is_over = end_of_drawing()
        self.last = time.monotonic()

    def on_execution_step(self, executor: Any) -> None:
        """Sleep for what is left of ``SECONDS`` since the last step; raise if it was the last."""
        if self.is_over.is_set():
            raise UnwantedError
        rest = self.last + self.SECONDS - time.monotonic()
        if rest > 0:
            time.sleep(rest)
        self.last = time.monotonic()

    def after_execution_succeeds(self, executor: Any) -> None:
        """Do nothing."""

    def after_execution_fails(self, executor: Any, error: Exception) -> None:
        """Do nothing."""


class TrainingPause(Pause):
    """A longer pause: units are far ahead of the training, whose process this is."""

    SECONDS = 0.05


def data_context(
    *,
    stall_seconds: float,
    ordered: bool = False,
    read_ahead_bytes: float | None = None,
    block_bytes: int | None = None,
    pause: type[Pause] = Pause,
) -> DataContext:
    """Settings for one dataset; this process's own stay as they are.

    ``read_ahead_bytes`` bounds what waits in the object store: without it Ray Data fills half of
    the store first. ``block_bytes``: what a generator yields is cut into blocks of about that
    size; by default a unit that goes in comes out as one block.
    """
    context = DataContext.get_current().copy()
    options = context.execution_options
    options.preserve_order = ordered
    options.resource_limits = ExecutionResources.for_limits(object_store_memory=read_ahead_bytes)
    context.target_max_block_size = block_bytes
    context.execution_no_progress_timeout_s = stall_seconds
    context.custom_execution_callback_classes = [pause]
    context.raise_original_map_exception = True  # or a CnnrayError loses its type and its text
    context.max_map_retries = MAX_STORE_RETRIES
    context.retried_map_errors = ["the store gave no usable answer"]
    context.max_errored_blocks = 0  # otherwise rows are lost in silence
    context.enable_progress_bars = False  # a job has a line of its own
    context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # it shows every error's stacks, twice
    return context


def map_units(
    units: Sequence[pa.Table],
    stages: Sequence[Stage],
    *,
    stall_seconds: float,
    block_bytes: int | None = None,
) -> Iterator[pa.Table]:
    """Every unit after all stages, in the order in which they are done.

    A unit is a small description of work, such as the rows of a plan; the first stage reads what
    it describes. A ``CnnrayError`` of an actor is raised as it is, a bug as ``CnnrayError``, and
    ``IncompleteError`` when workers keep dying or nothing moves for ``stall_seconds``.
    """
    if not units:
        return
    context = data_context(stall_seconds=stall_seconds, block_bytes=block_bytes)
    with building(context):
        # Not from_arrow, which runs a task for each table to learn what is known here.
        dataset = ray.data.from_blocks(list(units))
        for stage in stages:
            least, most = (
                min(number, len(units)) for number in (stage.min_workers, stage.max_workers)
            )
            dataset = dataset.map_batches(
                _with_late_errors(stage.actor),
                fn_constructor_kwargs=stage.arguments,
                batch_size=None,
                batch_format="pyarrow",
                compute=ActorPoolStrategy(
                    min_size=least,
                    max_size=most,
                    max_tasks_in_flight_per_actor=TASKS_PER_ACTOR,
                ),
                num_cpus=stage.num_cpus,
                num_gpus=stage.num_gpus or None,
                # Tries are not counted: they would be over before Ray knows that a node is gone.
                max_restarts=MAX_RESTARTS,
                max_task_retries=-1,
            )
    yield from _blocks(dataset, stall_seconds=stall_seconds)


def _with_late_errors(actor: type) -> type:
    """The same class, but a ``CnnrayError`` of its constructor is raised by the first call.

    Of an actor that does not come up, Ray prints the stacks, and goes on asking where it is.
    """

    class Late(actor):  # type: ignore[misc]
        mistake: CnnrayError | None = None

        def __init__(self, **arguments: Any) -> None:
            try:
                super().__init__(**arguments)
            except CnnrayError as error:
                self.mistake = error

        def __call__(self, table: pa.Table) -> Any:
            if self.mistake is not None:
                raise self.mistake
            return super().__call__(table)

    Late.__name__ = Late.__qualname__ = actor.__name__
    return Late


def map_items(
    function: Callable[[Item], Result],
    items: Sequence[Item],
    *,
    stall_seconds: float,
    num_cpus: float = 1.0,
    num_gpus: float = 0.0,
) -> Iterator[tuple[int, Result]]:
    """The result of each item with its number, in the order in which they are done.

    Each item is one task. A ``CnnrayError`` of a task is raised as it is. Raises ``CnnrayError``,
    too, when a task has a bug, and ``IncompleteError`` when one keeps killing its worker or nothing
    moves for ``stall_seconds``.
    """
    for first in range(0, len(items), MAX_UNITS):
        for number, result in _map_some(
            function,
            items[first : first + MAX_UNITS],
            stall_seconds=stall_seconds,
            num_cpus=num_cpus,
            num_gpus=num_gpus,
        ):
            yield first + number, result


def _map_some(
    function: Callable[[Item], Result],
    items: Sequence[Item],
    *,
    stall_seconds: float,
    num_cpus: float,
    num_gpus: float,
) -> Iterator[tuple[int, Result]]:
    """``map_items`` in one execution."""

    def call(batch: pa.Table) -> pa.Table:
        numbers, payloads = batch["number"], batch["item"].to_pylist()
        # Between processes of our own, as Ray itself passes arguments on.
        results = [dumps(function(loads(item))) for item in payloads]
        return pa.table({"number": numbers, "result": pa.array(results, pa.large_binary())})

    blocks = [
        pa.table({"number": [number], "item": pa.array([dumps(item)])})
        for number, item in enumerate(items)
    ]
    with building(data_context(stall_seconds=stall_seconds)):
        dataset = ray.data.from_blocks(blocks).map_batches(
            call,
            batch_size=None,
            batch_format="pyarrow",
            compute=TaskPoolStrategy(),
            num_cpus=num_cpus,
            num_gpus=num_gpus or None,
            max_retries=MAX_RETRIES,
        )
    for block in _blocks(dataset, stall_seconds=stall_seconds):
        for row in block.to_pylist():
            yield row["number"], loads(row["result"])


def dataset_of(units: Sequence[pa.Table], read: Callable[[pa.Table], pa.Table]) -> Dataset:
    """A dataset for a user's own pipeline: what ``read`` gives for each unit, when it is needed.

    Its settings are the user's, those of this process.
    """
    return ray.data.from_blocks(list(units)).map_batches(
        read, batch_size=None, batch_format="pyarrow"
    )


def is_retried() -> bool:
    """Whether the worker of an earlier try of this task has died. For a function of ``map_items``.

    Ray tells actors in public that they are reconstructed; of a task, only its core knows.
    """
    worker = ray._private.worker.global_worker
    return bool(worker.core_worker.get_current_task_attempt_number() > 0)


@contextlib.contextmanager
def building(context: DataContext) -> Iterator[None]:
    """Datasets that are made here have these settings; they keep them."""
    with _building, DataContext.current(context), warnings.catch_warnings():
        # Bounds of restarts and retries go through keywords that Ray 2.64 removes; 2.60 has no
        # other way to set them.
        warnings.simplefilter("ignore")
        yield


def blocks(dataset: Dataset, *, stall_seconds: float) -> Iterator[pa.Table]:
    """The blocks of a dataset as they come, drawn by this thread.

    (``iter_batches`` would leave two threads behind for each execution that does not run to its
    end.)
    """
    for reference in references(dataset):
        yield ray.get(reference, timeout=stall_seconds)


def references(dataset: Dataset) -> Iterator[Any]:
    """Of the blocks of a dataset, as they come."""
    for bundle in dataset.iter_internal_ref_bundles():
        yield from bundle.block_refs


def _blocks(dataset: Dataset, *, stall_seconds: float) -> Iterator[pa.Table]:
    """``blocks`` in a thread. Raises what ``map_units`` raises."""
    drawn = within(stall_seconds + GRACE_SECONDS, blocks(dataset, stall_seconds=stall_seconds))
    try:
        with translated_errors(stall_seconds=stall_seconds):
            yield from drawn
    except BaseException:
        # An execution cut short is a circle of references, with actors that keep their CPUs.
        gc.collect()
        raise


@contextlib.contextmanager
def translated_errors(*, stall_seconds: float) -> Iterator[None]:
    """Raise what went wrong on Ray as errors of cnnray."""
    try:
        yield
    except (ExecutionTimeoutError, ray.exceptions.GetTimeoutError, DeadlineError) as error:
        raise IncompleteError(
            f"no worker has finished anything for {stall_seconds:.0f} s",
            hint="look at the cluster, or raise --cluster.stall_seconds; the same command goes on",
        ) from alone(error)
    except ray.exceptions.RayError as error:
        if (cause := find_cause(error)) is not None:
            raise cause from alone(error)
        message = f"a worker failed: {last_line(error)}"
        if isinstance(error, ray.exceptions.RayTaskError):  # a bug: show where
            logger.error("%s", RETRY_ADVICE.sub("", str(error)))
            raise CnnrayError(message) from alone(error)
        raise IncompleteError(message) from alone(error)
