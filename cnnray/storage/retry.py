"""How often, how long and how hard a store is asked: the one layer of retries."""

from __future__ import annotations

import contextlib
import random
import threading
import time
from collections.abc import Iterator

OBJECT_SECONDS = 60.0
"""Longest time that an empty object may take, retries and waiting included."""

BYTES_PER_SECOND = 2**20
"""Slowest transfer that is borne: each MiB of an object adds a second to its deadline."""

MAX_ATTEMPTS = 10
"""Requests that a store may fail to answer before it counts as unavailable."""

FIRST_DELAY_SECONDS, MAX_DELAY_SECONDS = 0.1, 5.0

PACE_SECONDS = 1.0
"""Requests in flight are halved at most this often: one overload is told by many replies."""


class Deadline:
    """The end of the time that one object may take; a larger object may take longer."""

    def __init__(self, size: int = 0) -> None:
        self._started = time.monotonic()
        self._size = size

    def allow(self, size: int) -> None:
        """Make room for an object of ``size`` bytes."""
        self._size = max(self._size, size)

    @property
    def seconds(self) -> float:
        """The whole time, from the start."""
        return OBJECT_SECONDS + self._size / BYTES_PER_SECOND

    def elapsed(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._started

    def left(self) -> float:
        """Seconds to the end; negative beyond it."""
        return self.seconds - self.elapsed()


def delay_seconds(failures: int) -> float:
    """How long to wait after so many failures: at random, so that clients do not return at once.

    Full jitter, https://aws.amazon.com/blogs/architecture/exponential-backoff-and-jitter.
    """
    longest = min(MAX_DELAY_SECONDS, FIRST_DELAY_SECONDS * 2 ** min(failures - 1, 30))
    # The system's generator: the module's own belongs to whoever seeds it for a training.
    return random.SystemRandom().uniform(0, longest)


class Pacer:
    """Requests in flight: halved when the store says slow down, one more after a good run."""

    def __init__(self, most: int) -> None:
        self._most = self._limit = most
        self._in_flight = 0
        self._run = 0
        self._halved_at = float("-inf")
        self._changed = threading.Condition()

    @property
    def limit(self) -> int:
        """How many requests may be in flight at present."""
        return self._limit

    @contextlib.contextmanager
    def slot(self, seconds: float) -> Iterator[None]:
        """Hold the place of one request; ``TimeoutError`` when none is free within ``seconds``."""
        with self._changed:
            if not self._changed.wait_for(lambda: self._in_flight < self._limit, timeout=seconds):
                raise TimeoutError(f"no place among the {self._limit} requests in flight")
            self._in_flight += 1
        try:
            yield
        finally:
            with self._changed:
                self._in_flight -= 1
                self._changed.notify()

    def slow_down(self) -> None:
        """Take note of a reply that asks for fewer requests."""
        with self._changed:
            self._run = 0
            if time.monotonic() - self._halved_at >= PACE_SECONDS:
                self._halved_at = time.monotonic()
                self._limit = max(1, self._limit // 2)

    def succeeded(self) -> None:
        """Take note of a good reply; as many in a row as may be in flight earn one place more."""
        with self._changed:
            self._run += 1
            if self._run >= self._limit:
                self._run = 0
                self._limit = min(self._most, self._limit + 1)
                self._changed.notify()
