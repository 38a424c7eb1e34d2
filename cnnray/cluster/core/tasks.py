"""Run a function over many items on Ray, with everything bounded: in flight, retries, silence."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import ray

from cnnray.cluster.core.failures import find_cause, last_line
from cnnray.errors import CnnrayError

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
            yield running.pop(done[0]), _result(done[0])
    finally:
        for reference in running:
            ray.cancel(reference, force=False)


def _task(function: Callable[[Item], Any]) -> Any:
    """The function as a task of one CPU; Ray takes no bound methods, so it is wrapped."""

    def call(item: Item) -> Any:
        return function(item)

    return ray.remote(max_retries=MAX_RETRIES, num_cpus=1)(call)


def _result(reference: Any) -> Any:
    try:
        return ray.get(reference)
    except ray.exceptions.RayError as error:
        raise (find_cause(error) or CnnrayError(f"a task failed: {last_line(error)}")) from error


def _stalled(seconds: float) -> CnnrayError:
    return CnnrayError(
        f"no task has finished for {seconds:.0f} s",
        hint="look at the cluster, or raise --cluster.stall_seconds",
    )
