"""The program of a process that decodes images for another one, and the frames they exchange.

``python -m cnnray.images.decoder_process CHANNELS MIN_SIDE MAX_PIXELS MAX_BYTES MEMORY_BYTES
SECONDS`` (MIN_SIDE 0: never reduce) with a stream socket as standard input: requests come in and
replies go out there, one at a time, until the other end is closed. A request is ``REQUEST`` (its
length) and an image file. A reply is ``REPLY`` and what it announces:

* ``READY`` and zeros: sent once, first
* ``PIXELS``, H, W, 1 if grey, height and width of the file: and the pixels, (H, W, C) uint8
* ``REFUSAL``, index in ``IMAGE_ERROR_CODES``, bytes, zeros: and the detail in UTF-8

The process reads hostile bytes, so it lives within limits: of memory (it ends with
``OUT_OF_MEMORY``), of time for an image (SIGALRM ends it, whoever still listens), no files. When
the machine is short of memory, it is the first to be killed.
"""

from __future__ import annotations

import contextlib
import functools
import os
import resource
import signal
import socket
import struct
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from cnnray.errors import IMAGE_ERROR_CODES, MAX_ERROR_DETAIL, ImageError
from cnnray.images.decode import Decoded, decode_image

REQUEST = struct.Struct("<Q")
REPLY = struct.Struct("<BIIIII")
READY, PIXELS, REFUSAL = range(3)

MAX_DETAIL_BYTES = 4 * MAX_ERROR_DETAIL

OUT_OF_MEMORY = 12
"""Exit status of a process that reached its limit of memory."""


class _Limits(NamedTuple):
    """As they were checked by the process that has sent them."""

    max_pixels: int
    max_bytes: int


def main(arguments: Sequence[str]) -> None:
    """Serve the socket that is standard input until its other end is closed."""
    channels, min_side, max_pixels, max_bytes, memory_bytes = map(int, arguments[:5])
    _limit_process(memory_bytes)
    limits = _Limits(max_pixels=max_pixels, max_bytes=max_bytes)
    decode = functools.partial(
        decode_image, channels=channels, limits=limits, min_side=min_side or None
    )
    with socket.socket(fileno=os.dup(0)) as channel:
        try:
            _serve(channel, decode, seconds=float(arguments[5]))
        except MemoryError:
            os._exit(OUT_OF_MEMORY)  # nothing that still needs memory


def _limit_process(memory_bytes: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the other process
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGALRM})  # a blocked one is inherited
    _lower_limit(resource.RLIMIT_AS, memory_bytes)
    _lower_limit(resource.RLIMIT_CORE, 0)
    _lower_limit(resource.RLIMIT_FSIZE, 0)
    with contextlib.suppress(OSError):  # there is none but on Linux
        Path("/proc/self/oom_score_adj").write_text("1000")


def _lower_limit(kind: int, value: int) -> None:
    _, hard = resource.getrlimit(kind)
    if hard != resource.RLIM_INFINITY:
        value = min(value, hard)
    resource.setrlimit(kind, (value, value))


def _serve(channel: socket.socket, decode: Callable[[bytes], Decoded], *, seconds: float) -> None:
    requests = channel.makefile("rb")
    # Until here, what went wrong went to the log; from here on, hostile files could flood it.
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    channel.sendall(REPLY.pack(READY, 0, 0, 0, 0, 0))
    while len(header := requests.read(REQUEST.size)) == REQUEST.size:
        data = requests.read(*REQUEST.unpack(header))
        signal.setitimer(signal.ITIMER_REAL, seconds)
        reply = _answer(data, decode)
        signal.setitimer(signal.ITIMER_REAL, 0)
        for piece in reply:
            channel.sendall(piece)


def _answer(data: bytes, decode: Callable[[bytes], Decoded]) -> tuple[bytes, memoryview]:
    """A reply and what follows it. Raises ``MemoryError``."""
    try:
        decoded = decode(data)
    except ImageError as error:
        if isinstance(error.__cause__, MemoryError):
            raise error.__cause__ from None
        detail = error.detail.encode(errors="replace")[:MAX_DETAIL_BYTES]
        code = IMAGE_ERROR_CODES.index(error.code)
        return REPLY.pack(REFUSAL, code, len(detail), 0, 0, 0), memoryview(detail)
    rows, columns, _ = decoded.pixels.shape
    header = REPLY.pack(PIXELS, rows, columns, decoded.is_grey, decoded.height, decoded.width)
    return header, decoded.pixels.data


if __name__ == "__main__":
    main(sys.argv[1:])
