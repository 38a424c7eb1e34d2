"""Stable hashes of keys: which split a sample is in, and where it stands in the packed order.

Both are functions of the key alone, so adding images never moves an old one to another split.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

SPLIT_SALT = b"cnnray-split"
ORDER_SALT = b"cnnray-order"


def hash_keys(keys: Iterable[str], *, salt: bytes) -> npt.NDArray[np.uint64]:
    """One uniform 64-bit hash for each key: BLAKE2b, independent for each salt."""
    digests = b"".join(
        hashlib.blake2b(key.encode(), digest_size=8, person=salt).digest() for key in keys
    )
    return np.frombuffer(digests, dtype="<u8")


def assign_splits(keys: Iterable[str], *, val: float, test: float) -> npt.NDArray[np.str_]:
    """``train``, ``val`` or ``test`` for each key.

    Every class is cut at the same thresholds of the hash, so each split holds the same fraction of
    each class up to chance: the closest to stratified that an assignment can be that never changes.
    """
    position = hash_keys(keys, salt=SPLIT_SALT) / np.float64(2**64)
    return np.select([position < test, position < test + val], ["test", "val"], default="train")
