"""Reasons to write a checkpoint now: a node of the group is to go, or the group to be resized."""

from __future__ import annotations

import logging
import math
import time
from concurrent import futures
from functools import partial

import ray
from ray.train.v2._internal.execution.context import get_train_context

logger = logging.getLogger(__name__)

FRESH_SECONDS = 10.0
"""Age of a checkpoint up to which another one is not worth it, unless there is new notice."""


def leaving_nodes() -> list[str]:
    """Ids of the nodes of this worker's group that Ray has word of: they will be taken away.

    Ray Train's watcher looks every 5 s and tells every worker. ``ray.train.get_preemption_info``
    says the same, but it is a barrier over all workers.
    """
    info = get_train_context().preemption_context.preemption_info
    return [] if info is None else list(info.preempted_node_ids)


class Notices:
    """What rank 0 knows of such reasons, and of the checkpoints that it has written for them."""

    def __init__(self) -> None:
        self.is_asked = False  # by the controller, before it resizes the group
        self.writing: futures.Future[None] | None = None
        self.written = -math.inf  # monotonic seconds
        self.announced: set[str] = set()

    def is_wished(self) -> bool:
        """Whether there is a reason, and no checkpoint that will do."""
        if self.writing is not None and not self.writing.done():
            return False
        leaving = set(leaving_nodes())
        is_pressing = self.is_asked or bool(leaving)
        return bool(leaving - self.announced) or (is_pressing and not self.is_fresh())

    def is_fresh(self) -> bool:
        """Whether a checkpoint has just been written."""
        return time.monotonic() - self.written < FRESH_SECONDS

    def ask(self) -> bool:
        """``is_fresh``; if it is not, a checkpoint is wished from now on."""
        self.is_asked = not self.is_fresh()
        return not self.is_asked

    def follow(self, writing: futures.Future[None], *, step: int) -> None:
        """Take note of a checkpoint that is being written, of the run's ``step``."""
        self.writing = writing
        writing.add_done_callback(partial(self._end, step=step))

    def _end(self, writing: futures.Future[None], *, step: int) -> None:
        if writing.cancelled() or writing.exception() is not None:
            return  # whoever saves the next one is told
        self.written, self.is_asked = time.monotonic(), False
        leaving = set(leaving_nodes()) - self.announced
        self.announced |= leaving
        for name in node_names(leaving):
            logger.warning("node %s is going away: checkpoint written at step %d", name, step)


NOTICES = Notices()
"""This process's. A worker's process is of one group: a restart begins with new ones."""


def ask_for_checkpoint() -> bool:
    """Whether there is a fresh one; the controller has rank 0's process run this."""
    return NOTICES.ask()


def node_names(node_ids: set[str]) -> list[str]:
    """Their addresses."""
    if not node_ids:
        return []
    names = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes()}
    return sorted(names.get(node_id, node_id) for node_id in node_ids)
