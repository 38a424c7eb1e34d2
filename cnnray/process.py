"""What the C library does for this process."""

from __future__ import annotations

import contextlib
import ctypes

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3
"""``M_TRIM_THRESHOLD`` and ``M_MMAP_THRESHOLD`` of glibc's <malloc.h>."""

KEPT_BYTES = 2**30


def keep_freed_memory() -> None:
    """Keep memory that tensors have freed for the next ones, up to a GiB a piece.

    By default glibc gives the memory of every large tensor back to the kernel, which has to clear
    the pages of the next one: half of the time of a forward pass on a CPU. (EfficientNet-Lite0,
    64 images of 224 px, one thread: 29 ms an image, and 10 with this.) Elsewhere nothing happens.
    """
    with contextlib.suppress(OSError, AttributeError):  # no glibc
        library = ctypes.CDLL(None)
        library.mallopt(MMAP_THRESHOLD, KEPT_BYTES)
        library.mallopt(TRIM_THRESHOLD, KEPT_BYTES)
