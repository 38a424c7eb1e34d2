"""Progress for people: a bar on a terminal, one plain line every few seconds in a log."""

from __future__ import annotations

import logging
import sys
import time
from types import TracebackType
from typing import Self

from tqdm import tqdm

logger = logging.getLogger(__name__)


class ProgressLine:
    """Shows how much of ``total`` is done; ``initial`` of it was done before."""

    def __init__(
        self, *, total: int, unit: str, label: str, seconds: float, initial: int = 0
    ) -> None:
        self.total = total
        self.initial = initial
        self.unit = unit
        self.label = label
        self.seconds = seconds
        self.started = self.printed = time.monotonic()
        self.bar = None
        if sys.stderr.isatty():
            self.bar = tqdm(
                total=total,
                initial=initial,
                unit=unit,
                desc=label,
                file=sys.stderr,
                dynamic_ncols=True,
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self.bar is not None:
            self.bar.close()

    def update(self, done: int, note: str = "") -> None:
        """Say that ``done`` of the total are done; ``note`` is what else there is to say."""
        if self.bar is not None:
            self.bar.set_postfix_str(note, refresh=False)
            self.bar.update(done - self.bar.n)
            return
        now = time.monotonic()
        if now - self.printed < self.seconds and done < self.total:
            return
        self.printed = now
        rate = (done - self.initial) / max(now - self.started, 1e-9)
        left = (self.total - done) / rate if rate else float("inf")
        logger.info(
            "%s: %s / %s %s, %.0f %s/s, %s left%s",
            self.label,
            f"{done:,}",
            f"{self.total:,}",
            self.unit,
            rate,
            self.unit,
            format_seconds(left),
            f", {note}" if note else "",
        )


def format_seconds(seconds: float) -> str:
    """A duration as people write it: 42 s, 3 min 10 s, 2 h 05 min."""
    if seconds == float("inf"):
        return "unknown time"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
