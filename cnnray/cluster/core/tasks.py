"""Run a function over many items on Ray, with everything bounded: in flight, retries, silence."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import ray

from cnnray.cluster.core.failures import find_cause, last_line
from cnnray.errors import CnnrayError, UnavailableError

Item = TypeVar("Item")
Result = TypeVar("Result")

MAX_RETRIES = 3
"""Of a task whose worker died. (Ray's own default for Data tasks is without end.)"""
IN_FLIGHT_PER_CPU = 2


def run_tasks(
    function: Callable[[Item], Result], items: Iterable[Item], *, stall_seconds: float
) -> Iterator[tuple[Item, Result]]:
    """Each item with its result, in the order in which they are done.

    A ``CnnrayError`` of a task is raised as it is. Raises ``CnnrayError``, too, when a task keeps
    killing its worker, and when nothing has finished for ``stall_seconds``.
    """

    for item, reference in submit_tasks(function, items, stall_seconds=stall_seconds):
        yield item, _result(reference)


def submit_tasks(
    function: Callable[[Item], Any], items: Iterable[Item], *, stall_seconds: float
) -> Iterator[tuple[Item, Any]]:
    """Each item with the reference of its result, which stays where it was made.

    In the order in which they are done. Getting a result raises the error of its task. Raises
    ``CnnrayError`` when nothing has finished for ``stall_seconds``.
    """

    task = _task(function)
    limit = max(2, int(IN_FLIGHT_PER_CPU * ray.cluster_resources().get("CPU", 1)))
    running: dict[Any, Item] = {}
    source = iter(items)
    try:
        while True:
            for item in itertools.islice(source, limit - len(running)):
                running[task.remote(item)] = item
            if not running:
                return
            done, _ = ray.wait(
                list(running), num_returns=1, timeout=stall_seconds, fetch_local=False
            )
            if not done:
                raise _stalled(stall_seconds)
            yield running.pop(done[0]), done[0]
    finally:
        for reference in running:
            ray.cancel(reference, force=False)


def map_in_order(
    function: Callable[[Item], Result], items: Iterable[Item], *, ahead: int, stall_seconds: float
) -> Iterator[Result]:
    """The results in the order of the items; ``ahead`` of them are under way or wait to be taken.

    A store that gave no answer is asked again by another try. Raises what ``run_tasks`` raises.
    """

    task = _task(function, retry_exceptions=[UnavailableError])
    source, pending = iter(items), deque[Any]()
    try:
        while True:
            pending += [
                task.remote(item) for item in itertools.islice(source, ahead - len(pending))
            ]
            if not pending:
                return
            yield _result(pending[0], seconds=stall_seconds)
            pending.popleft()
    finally:
        for reference in pending:
            ray.cancel(reference, force=False)


def _task(function: Callable[[Item], Any], **options: Any) -> Any:
    """The function as a task of one CPU; Ray takes no bound methods, so it is wrapped.

    It runs anywhere, also when it comes from a trial of Ray Tune, whose reservation has no CPU.
    """

    def call(item: Item) -> Any:
        return function(item)

    options |= {"max_retries": MAX_RETRIES, "num_cpus": 1, "scheduling_strategy": "DEFAULT"}
    return ray.remote(**options)(call)


def _result(reference: Any, *, seconds: float | None = None) -> Any:
    try:
        return ray.get(reference, timeout=seconds)
    except ray.exceptions.GetTimeoutError as error:
        raise _stalled(seconds) from error
    except ray.exceptions.RayError as error:
        raise (find_cause(error) or CnnrayError(f"a task failed: {last_line(error)}")) from error


def _stalled(seconds: float | None) -> CnnrayError:
    return CnnrayError(
        f"no task has finished for {seconds:.0f} s",
        hint="look at the cluster, or raise --cluster.stall_seconds",
    )
