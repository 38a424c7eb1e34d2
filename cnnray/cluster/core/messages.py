"""Messages from the workers of a training run to the driver: progress, and why the run stopped."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cnnray.training.loop import EpochResult
from cnnray.training.progress import Beginning, Progress

Message = Beginning | Progress | EpochResult | str
"""Workers begin; progress inside an epoch; the result of an epoch; the text of a warning."""

POLL_SECONDS = 0.5


class Mailbox:
    """Holds the messages until the driver fetches them."""

    def __init__(self) -> None:
        self.messages: list[Message] = []
        self.failure: Exception | None = None

    def post(self, message: Message) -> None:
        """Leave a message."""
        self.messages.append(message)

    def fail(self, failure: Exception) -> None:
        """Leave the reason why the run has stopped for good: a restart would not help."""
        self.failure = failure

    def take(self) -> list[Message]:
        """The messages since the last call."""
        messages, self.messages = self.messages, []
        return messages

    def get_failure(self) -> Exception | None:
        """The reason why the run has stopped for good, or None."""
        return self.failure


def start_mailbox() -> Any:
    """A ``Mailbox`` in an actor, which reserves no CPU and shares the fate of this node."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ray.remote(num_cpus=0, scheduling_strategy=here)(Mailbox).remote()


class MailboxHandler(logging.Handler):
    """Posts a worker's warnings, so that they reach the driver's log."""

    def __init__(self, mailbox: Any) -> None:
        super().__init__(level=logging.WARNING)
        self.mailbox = mailbox

    def emit(self, record: logging.LogRecord) -> None:
        """Post the text of the warning."""
        self.mailbox.post.remote(record.getMessage())


class MailboxReader:
    """Calls a function with each message, on a thread of its own while the driver is blocked."""

    def __init__(self, mailbox: Any, show: Callable[[Message], None]) -> None:
        self.mailbox = mailbox
        self.show = show
        self.stopped = threading.Event()
        self.thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Self:
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
        for message in ray.get(self.mailbox.take.remote(), timeout=30):
            self.show(message)
