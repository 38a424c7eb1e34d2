"""When an elastic run writes a checkpoint out of turn: before a node goes, and before a resize."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Collection
from concurrent import futures
from functools import partial

import ray

logger = logging.getLogger(__name__)

FRESH_SECONDS = 10.0
"""Maximum age of a checkpoint that makes another one needless, unless one more node is to go."""


class PreemptionState:
    """Requests for a checkpoint as rank 0 knows them, and the checkpoints that it has written.

    There are no requests before ``watch`` is called, which elastic runs do.
    """

    def __init__(self) -> None:
        self.find_preempted: Callable[[], Collection[str]] = tuple
        self.resize_requested = False
        self.writing: futures.Future[None] | None = None
        self.written_at = -math.inf  # monotonic seconds
        self.announced: set[str] = set()

    def watch(self, find_preempted: Callable[[], Collection[str]]) -> None:
        """Take the ids of the group's nodes that are being preempted from this function."""
        self.find_preempted = find_preempted

    def checkpoint_requested(self) -> bool:
        """Whether a checkpoint is requested and none is recent enough or being written."""
        if self.writing is not None and not self.writing.done():
            return False
        preempted = set(self.find_preempted())
        is_pending = self.resize_requested or bool(preempted)
        return bool(preempted - self.announced) or (is_pending and not self.has_fresh_checkpoint())

    def has_fresh_checkpoint(self) -> bool:
        """Whether a checkpoint was written within the last ``FRESH_SECONDS``."""
        return time.monotonic() - self.written_at < FRESH_SECONDS

    def request_for_resize(self) -> bool:
        """Whether there is a fresh checkpoint; if not, request one."""
        self.resize_requested = not self.has_fresh_checkpoint()
        return not self.resize_requested

    def track(self, writing: futures.Future[None], *, step: int) -> None:
        """Follow the writing of a checkpoint, which was taken at ``step`` of the run."""
        self.writing = writing
        writing.add_done_callback(partial(self._finish, step=step))

    def _finish(self, writing: futures.Future[None], *, step: int) -> None:
        if writing.cancelled() or writing.exception() is not None:
            return  # the error is raised by the next save
        self.written_at, self.resize_requested = time.monotonic(), False
        preempted = set(self.find_preempted()) - self.announced
        self.announced |= preempted
        for name in node_names(preempted):
            logger.warning("node %s is going away: checkpoint written at step %d", name, step)


PREEMPTION = PreemptionState()
"""The state of this process. A worker process serves one group, and a restart begins anew."""


def request_checkpoint() -> bool:
    """Whether rank 0 has a fresh checkpoint. The controller runs this in rank 0's process."""
    return PREEMPTION.request_for_resize()


def node_names(node_ids: Collection[str]) -> list[str]:
    """The addresses of nodes, sorted; the id of a node that Ray does not know."""
    if not node_ids:
        return []
    names = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes()}
    return sorted(names.get(node_id, node_id) for node_id in node_ids)
