"""Decode images that may crash, hang or exhaust the process that decodes them.

``guarded_decoder`` decodes in this process, fast. A crash takes the process along, and a watchdog
makes a crash of a hang. Who is started again after such a death uses ``IsolatedDecoder``: the same
results, from a limited child process. Nobody has to look for the culprit by halves: the child gets
one image at a time, so the culprit is the one that it was busy with when it died or fell silent.
"""

from __future__ import annotations

import faulthandler
import math
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Self

import numpy as np

from cnnray.errors import DECODER_ERROR_CODES, IMAGE_ERROR_CODES, CnnrayError, ImageError
from cnnray.images import decoder_process
from cnnray.images.decode import Decoded, decode_image
from cnnray.images.decoder_process import PIXELS, READY, REFUSAL, REPLY, REQUEST
from cnnray.options import DecodeLimits

DEFAULT_SECONDS = 30.0
DEFAULT_MEMORY_BYTES = 4 * 1024**3
MIN_MEMORY_BYTES = 512 * 1024**2
"""The child's interpreter and libraries take about 300 MiB of address space."""

START_SECONDS = 60.0
"""For the child's start, which is no image's fault: a cold disk may take ten."""

EXIT_SECONDS = 5.0
"""For the child to end, from the moment its socket is closed."""

ORPHAN_SECONDS = 1.0
"""After this process's deadline the child ends itself: nobody may be left to end it."""

Decode = Callable[[bytes], Decoded]


@contextmanager
def guarded_decoder(
    *,
    channels: int,
    limits: DecodeLimits,
    min_side: int | None = None,
    seconds: float = DEFAULT_SECONDS,
) -> Iterator[Decode]:
    """``decode_image`` for a batch, in this process; an image that hangs ends the process.

    That happens after ``seconds`` to twice ``seconds`` on one image: exit status 1, and the
    tracebacks of all threads on standard error. One at a time in a process.
    """
    armed = -math.inf

    def decode(data: bytes) -> Decoded:
        nonlocal armed
        # Arming starts a thread; for every small image that would cost as much as decoding it.
        if (now := time.monotonic()) - armed >= seconds:
            # A thread of C: it runs even while a decoder holds the interpreter's lock.
            faulthandler.dump_traceback_later(2 * seconds, exit=True, file=2)
            armed = now
        return decode_image(data, channels=channels, limits=limits, min_side=min_side)

    try:
        yield decode
    finally:
        faulthandler.cancel_dump_traceback_later()


class IsolatedDecoder:
    """Decodes in a child process with little to lose: bounded memory and time, no credentials.

    ``seconds``: wall time for one image; ``memory_bytes``: address space of the child. The child
    is started for the first image, lives until ``close`` and is replaced when it dies. For one
    thread. Raises ``ValueError`` for limits that nothing fits in.
    """

    def __init__(
        self,
        *,
        channels: int,
        limits: DecodeLimits,
        min_side: int | None = None,
        seconds: float = DEFAULT_SECONDS,
        memory_bytes: int = DEFAULT_MEMORY_BYTES,
    ) -> None:
        if not 0 < seconds < math.inf:
            raise ValueError(f"seconds must be positive, got {seconds}")
        if memory_bytes < MIN_MEMORY_BYTES:
            raise ValueError(f"memory_bytes must be {MIN_MEMORY_BYTES} or more, got {memory_bytes}")
        self.channels = channels
        self.limits = limits
        self.min_side = min_side
        self.seconds = seconds
        self.memory_bytes = memory_bytes
        self._child: tuple[subprocess.Popen[bytes], socket.socket] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the child, if there is one."""
        if self._child is not None:
            self._end_child()

    def decode(self, data: bytes) -> Decoded:
        """What ``decode_image`` returns. Raises its ``ImageError``, or one of three more.

        ``decoder_crash``, ``decoder_oom`` and ``decoder_timeout``: what the image did to two
        children in a row. Raises ``CnnrayError`` when no child can be started.
        """
        if len(data) > self.limits.max_bytes:  # refused unseen, so it need not travel
            return decode_image(data, channels=self.channels, limits=self.limits)
        try:
            return self._decode_once(data)
        except ImageError as error:
            if error.code not in DECODER_ERROR_CODES:
                raise
        return self._decode_once(data)  # the first child may have died of something else

    def _decode_once(self, data: bytes) -> Decoded:
        _, channel = self._child or self._start_child()
        deadline = time.monotonic() + self.seconds
        try:
            channel.settimeout(self.seconds)
            channel.sendall(REQUEST.pack(len(data)))
            channel.sendall(data)
            return self._receive_reply(channel, deadline)
        except ImageError:  # the child's answer: it is ready for the next image
            raise
        except TimeoutError:
            self._end_child(patience=0)
            raise self._failure(-signal.SIGALRM) from None
        except (EOFError, ConnectionError):
            raise self._failure(self._end_child()) from None
        except BaseException:  # its answer would be taken for that to the next image
            self._end_child(patience=0)
            raise

    def _receive_reply(self, channel: socket.socket, deadline: float) -> Decoded:
        """The reply to a request; nothing in it is believed that could cost memory."""
        kind, first, second, third, height, width = _receive_header(channel, deadline)
        if kind == PIXELS and 0 < first * second <= height * width <= self.limits.max_pixels:
            pixels = np.empty((first, second, self.channels), np.uint8)
            _receive(channel, pixels.data.cast("B"), deadline)
            return Decoded(pixels, bool(third), height, width)
        if (
            kind == REFUSAL
            and first < len(IMAGE_ERROR_CODES)
            and second <= decoder_process.MAX_DETAIL_BYTES
        ):
            detail = bytearray(second)
            _receive(channel, memoryview(detail), deadline)
            raise ImageError(IMAGE_ERROR_CODES[first], detail.decode(errors="replace"))
        raise EOFError("no reply but noise")

    def _start_child(self) -> tuple[subprocess.Popen[bytes], socket.socket]:
        """Start a child and wait until it is ready. Raises ``CnnrayError``."""
        ours, theirs = socket.socketpair()
        settings = (
            self.channels,
            self.min_side or 0,
            self.limits.max_pixels,
            self.limits.max_bytes,
            self.memory_bytes,
            self.seconds + ORPHAN_SECONDS,
        )
        # -P: a folder that happens to be the current one must not bring code.
        command = [sys.executable, "-P", "-m", decoder_process.__name__, *map(str, settings)]
        with theirs:
            process = subprocess.Popen(
                command, stdin=theirs.fileno(), stdout=subprocess.DEVNULL, env=_child_environment()
            )
        self._child = (process, ours)
        try:
            kind, *_ = _receive_header(ours, time.monotonic() + START_SECONDS)
            if kind != READY:
                raise EOFError("no greeting but noise")
        except BaseException as error:
            status = self._end_child(
                patience=0 if isinstance(error, TimeoutError) else EXIT_SECONDS
            )
            if not isinstance(error, EOFError | OSError):
                raise
            raise CnnrayError(
                f"the process that decodes images does not start: {_describe(status)}",
                hint="what it said is on the standard error of this process",
            ) from error
        return self._child

    def _end_child(self, *, patience: float = EXIT_SECONDS) -> int:
        """Close the child's socket, give it some seconds to end, kill it; its exit status."""
        assert self._child is not None
        (process, channel), self._child = self._child, None
        channel.close()
        try:
            return process.wait(patience)
        except subprocess.TimeoutExpired:
            process.kill()
            return process.wait(EXIT_SECONDS)

    def _failure(self, status: int) -> ImageError:
        """What an exit status says of the image."""
        if status == -signal.SIGALRM:
            return ImageError("decoder_timeout", f"not decoded within {self.seconds:g} s")
        if status == decoder_process.OUT_OF_MEMORY:
            detail = f"the decoder needs more than {self.memory_bytes >> 20} MiB"
            return ImageError("decoder_oom", detail)
        # Who else but the kernel, short of memory, kills a process that it prefers to kill?
        code = "decoder_oom" if status == -signal.SIGKILL else "decoder_crash"
        return ImageError(code, f"the decoder ended: {_describe(status)}")


def _receive_header(channel: socket.socket, deadline: float) -> tuple[Any, ...]:
    header = bytearray(REPLY.size)
    _receive(channel, memoryview(header), deadline)
    return REPLY.unpack(header)


def _receive(channel: socket.socket, view: memoryview, deadline: float) -> None:
    """Fill ``view``. Raises ``EOFError``, ``ConnectionError`` or ``TimeoutError``."""
    while view:
        remaining = deadline - time.monotonic()
        if remaining <= 0:
            raise TimeoutError
        channel.settimeout(remaining)
        count = channel.recv_into(view)
        if not count:
            raise EOFError
        view = view[count:]


def _child_environment() -> dict[str, str]:
    """What finds the same code as this process does, and no credentials."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if name.startswith(("PYTHON", "LD_", "DYLD_")) or name in ("PATH", "VIRTUAL_ENV")
    }
    own = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
    path = os.pathsep.join([*own, *(folder or os.getcwd() for folder in sys.path)])
    # Pillow has one thread; each of a numeric library would cost address space.
    return {**kept, "PYTHONPATH": path, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}


def _describe(status: int) -> str:
    names = {-item.value: item.name for item in signal.Signals}
    return names.get(status, f"exit status {status}" if status >= 0 else f"signal {-status}")
