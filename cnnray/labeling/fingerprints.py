"""Sets of keys too large to hold: 16 bytes a key, compared all at once by sorting.

BLAKE2b to 128 bits: among 10⁹ keys, two share a fingerprint with a probability of about 10⁻²¹.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

import numpy as np
import pyarrow as pa

Fingerprints = np.ndarray[Any, np.dtype[np.uint64]]
"""Shape (N, 2)."""
Mask = np.ndarray[Any, np.dtype[np.bool_]]
"""Shape (N,)."""

DIGEST_BYTES = 16


def key_fingerprints(entries: pa.Table) -> Fingerprints:
    """Of the key of each entry, whatever its content."""
    return _fingerprints(key.encode() for key in entries["key"].to_pylist())


def id_fingerprints(entries: pa.Table) -> Fingerprints:
    """Of the id of each entry: its key and etag, which together name one content of one image."""
    keys, etags = entries["key"].to_pylist(), entries["etag"].to_pylist()
    return _fingerprints(
        f"{len(etag)}:{etag}{key}".encode() for key, etag in zip(keys, etags, strict=True)
    )


def _fingerprints(texts: Iterable[bytes]) -> Fingerprints:
    digest = hashlib.blake2b
    data = b"".join([digest(text, digest_size=DIGEST_BYTES).digest() for text in texts])
    return np.frombuffer(data, np.uint64).reshape(-1, 2)


def join(parts: Iterable[Fingerprints]) -> Fingerprints:
    """All rows in one array."""
    return np.concatenate([np.empty((0, 2), np.uint64), *parts])


def is_repeat(values: Fingerprints) -> Mask:
    """For each row, whether an earlier row is the same."""
    return _first_equal(values) < np.arange(len(values))


def is_member(values: Fingerprints, others: Fingerprints) -> Mask:
    """For each row, whether ``others`` holds it."""
    return _first_equal(np.concatenate([others, values]))[len(others) :] < len(others)


def _first_equal(values: Fingerprints) -> np.ndarray[Any, np.dtype[np.int64]]:
    """For each row, the number of the first row that is the same."""
    order = np.lexsort((values[:, 1], values[:, 0]))  # stable: equal rows stay in their order
    ordered = values[order]
    is_new = np.ones(len(values), np.bool_)
    is_new[1:] = (ordered[1:] != ordered[:-1]).any(axis=1)
    first = np.empty(len(values), np.int64)
    first[order] = order[is_new][np.cumsum(is_new) - 1]
    return first
