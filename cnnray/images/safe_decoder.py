"""Decode images that may harm the process that decodes them: one way for every job.

A worker decodes fast at first. An image that crashes it, hangs it or takes all memory ends its
process; the worker that is started in its place is ``careful``, and finds out which image it was.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Self

from cnnray.images.isolation import DEFAULT_SECONDS, Decode, IsolatedDecoder, guarded_decoder
from cnnray.options import DEFAULT_LIMITS, DecodeLimits


class SafeDecoder:
    """Decodes in this process with a watchdog, or, if ``careful``, in a child process.

    Not careful, an image that takes longer than ``seconds`` ends this process, as one does that
    crashes it. Careful, which is slower, it raises ``ImageError`` with a code of
    ``DECODER_ERROR_CODES``. Everything else has the same result. ``channels``, ``limits`` and
    ``min_side`` are those of ``decode_image``.
    """

    def __init__(
        self,
        *,
        careful: bool,
        channels: int,
        limits: DecodeLimits = DEFAULT_LIMITS,
        min_side: int | None = None,
        seconds: float = DEFAULT_SECONDS,
    ) -> None:
        self._options: dict[str, Any] = {
            "channels": channels,
            "limits": limits,
            "min_side": min_side,
            "seconds": seconds,
        }
        self._isolated = IsolatedDecoder(**self._options) if careful else None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def as_careful(self) -> SafeDecoder:
        """Another one with the same limits, that is careful."""
        return SafeDecoder(careful=True, **self._options)

    def close(self) -> None:
        """End the child process, if there is one."""
        if self._isolated is not None:
            self._isolated.close()

    @contextmanager
    def batch(self) -> Iterator[Decode]:
        """What decodes the images of one batch.

        They must be in memory: the watchdog would take a slow read for a slow image.
        """
        if self._isolated is not None:
            yield self._isolated.decode
            return
        with guarded_decoder(**self._options) as decode:
            yield decode
