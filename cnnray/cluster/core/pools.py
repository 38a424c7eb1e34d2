"""Tables through pools of actors, one pool a stage, each actor with a model of its own.

Everything is bounded: tables in flight, restarts, silence. The pools have fixed sizes and nothing
else runs, so they may take every CPU of the cluster.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import pyarrow as pa
import ray

from cnnray.cluster.core.failures import find_cause, last_line
from cnnray.cluster.core.streaming import Stage
from cnnray.errors import CnnrayError, IncompleteError

CALLS = 2
"""Tables that an actor has at a time: one that it works on, one that is fetched meanwhile."""
FETCH_SECONDS = 60.0
"""For a reference that is there."""
MAX_RESTARTS = 3
"""Of one actor. A table that was with it is tried again as long as there are any: by count, the
tries would be over before Ray knows that a node is gone. (The wait for a result is bounded.)"""


def map_tables(
    tables: Iterable[pa.Table], stages: Sequence[Stage], *, stall_seconds: float
) -> Iterator[pa.Table]:
    """Every table after all stages, in the order in which they are done.

    Tables are taken as there is room for them. A ``CnnrayError`` of an actor is raised as it is, a
    bug as ``CnnrayError``, and ``IncompleteError`` when workers keep dying or nothing moves.
    """
    flow = _Flow(tables, stages)
    try:
        while pending := flow.hand_out():
            done, _ = ray.wait(pending, num_returns=1, timeout=stall_seconds, fetch_local=False)
            if not done:
                raise _stalled(stall_seconds)
            if flow.take(done[0]):
                yield ray.get(done[0], timeout=stall_seconds)
    except ray.exceptions.GetTimeoutError as error:
        raise _stalled(stall_seconds) from error
    except ray.exceptions.RayError as error:
        is_bug = isinstance(error, ray.exceptions.RayTaskError)
        kind = CnnrayError if is_bug else IncompleteError
        raise (find_cause(error) or kind(f"a worker failed: {last_line(error)}")) from error
    finally:
        flow.close()


def _stalled(seconds: float) -> IncompleteError:
    return IncompleteError(
        f"no worker has finished anything for {seconds:.0f} s",
        hint="look at the cluster, or raise --cluster.stall_seconds; the same command goes on",
    )


class _Flow:
    """Tables on their way from a source through pools."""

    def __init__(self, tables: Iterable[pa.Table], stages: Sequence[Stage]) -> None:
        source = iter(tables)
        first = list(itertools.islice(source, stages[0].max_workers))
        self.source = itertools.chain(first, source)
        self.is_ended = False  # the source
        self.pools = [ActorPool(stage, most=len(first)) for stage in stages]

    def hand_out(self) -> list[Any]:
        """Give tables to actors that have room, and return the references of what is under way.

        A stage takes no more than the next one can follow.
        """
        for pool, following in itertools.zip_longest(self.pools, self.pools[1:]):
            while pool.has_room() and (following is None or following.is_hungry()):
                if pool is self.pools[0] and not pool.waiting:
                    pool.waiting.extend(itertools.islice(self.source, 1))
                    self.is_ended = not pool.waiting
                if not pool.waiting:
                    break
                pool.submit(pool.waiting.popleft())
        self._release()
        return [reference for pool in self.pools for reference in (*pool.calls, *pool.starting)]

    def _release(self) -> None:
        """Where nothing will come any more, idle actors give back what they reserve.

        One that was lost may need the room to start again.
        """
        if not self.is_ended:
            return
        for pool in self.pools:
            if pool.waiting:
                return
            pool.release_idle()
            if pool.calls:
                return

    def take(self, reference: Any) -> bool:
        """Whether this, which is there, is a table that is through all stages.

        Raises what an actor raised at its start.
        """
        for pool, following in itertools.zip_longest(self.pools, self.pools[1:]):
            if pool.take(reference):
                if following is None:
                    return True
                following.waiting.append(reference)
        return False

    def close(self) -> None:
        """End all actors."""
        for pool in self.pools:
            pool.close()


class ActorPool:
    """The actors of one stage, and the tables that wait for them or are with them."""

    def __init__(self, stage: Stage, *, most: int) -> None:
        kind: Any = ray.remote(
            num_cpus=stage.num_cpus,
            num_gpus=stage.num_gpus,
            max_restarts=MAX_RESTARTS,
            max_task_retries=-1,
        )(stage.actor)
        actors = [kind.remote(**stage.arguments) for _ in range(min(stage.max_workers, most))]
        # One that has not started, for want of room perhaps, gets no table.
        self.starting = {actor.__ray_ready__.remote(): actor for actor in actors}
        self.load: dict[Any, int] = {}  # tables with each actor that has started
        self.calls: dict[Any, Any] = {}  # the actor of each reference of a result
        self.waiting: deque[Any] = deque()

    def has_room(self) -> bool:
        """Whether an actor could take another table."""
        return any(load < CALLS for load in self.load.values())

    def is_hungry(self) -> bool:
        """Whether fewer tables wait than the actors could take next."""
        return len(self.waiting) < max(1, len(self.load))

    def submit(self, table: Any) -> None:
        """Give a table, or the reference of one, to the actor that has fewest."""
        actor = min(self.load, key=self.load.__getitem__)
        self.calls[actor.__call__.remote(table)] = actor
        self.load[actor] += 1

    def take(self, reference: Any) -> bool:
        """Whether this, which is there, is a result of the pool's, and no sign of a start.

        Raises what an actor raised at its start.
        """
        if reference in self.starting:
            ray.get(reference, timeout=FETCH_SECONDS)
            self.load[self.starting.pop(reference)] = 0
            return False
        actor = self.calls.pop(reference, None)
        if actor in self.load:
            self.load[actor] -= 1
        return actor is not None

    def release_idle(self) -> None:
        """End the actors that have nothing to do, and those that have not started yet."""
        idle = [actor for actor, load in self.load.items() if load == 0]
        for actor in (*idle, *self.starting.values()):
            ray.kill(actor)
        self.load = {actor: load for actor, load in self.load.items() if load > 0}
        self.starting = {}

    def close(self) -> None:
        """End all actors."""
        for actor in (*self.load, *self.starting.values()):
            ray.kill(actor)
