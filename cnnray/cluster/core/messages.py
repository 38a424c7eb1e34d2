"""What workers tell the driver while a training run is going: progress, and why it stopped."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

POLL_SECONDS = 0.5


class Board:
    """Holds the messages until the driver fetches them."""

    def __init__(self) -> None:
        self.messages: list[Any] = []
        self.failure: Exception | None = None

    def post(self, message: Any) -> None:
        """Leave a message."""
        self.messages.append(message)

    def fail(self, failure: Exception) -> None:
        """Leave the reason why a run stopped for good; restarting would not help."""
        self.failure = failure

    def take(self) -> list[Any]:
        """The messages since the last call."""
        messages, self.messages = self.messages, []
        return messages

    def get_failure(self) -> Exception | None:
        """The reason that was left, if one was."""
        return self.failure


def start_board() -> Any:
    """An actor that holds a board; it takes no CPU, and lives and dies with this process's node."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ray.remote(num_cpus=0, scheduling_strategy=here)(Board).remote()


class BoardHandler(logging.Handler):
    """Sends a worker's warnings to the board, so that they reach the driver's log."""

    def __init__(self, board: Any) -> None:
        super().__init__(level=logging.WARNING)
        self.board = board

    def emit(self, record: logging.LogRecord) -> None:
        """Post the message."""
        self.board.post.remote(record.getMessage())


class BoardReader:
    """Hands the board's messages to a function, from a thread, while the driver is blocked."""

    def __init__(self, board: Any, show: Callable[[Any], None]) -> None:
        self.board = board
        self.show = show
        self.stopped = threading.Event()
        self.thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> BoardReader:
        self.thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stopped.set()
        self.thread.join(timeout=10)

    def _run(self) -> None:
        while not self.stopped.wait(POLL_SECONDS):
            self._show_all()
        self._show_all()

    def _show_all(self) -> None:
        for message in ray.get(self.board.take.remote(), timeout=30):
            self.show(message)
