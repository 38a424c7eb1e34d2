"""Shifts and flips of batches of images, fast enough for the thread that feeds the training.

What happens to an image is drawn by a hash of (seed, epoch, key): the same in any batch, anywhere.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

import numpy as np

NUM_DRAWS = 4
"""Of an image: shift down, shift right, flip left-right, flip up-down."""

Images = np.ndarray[Any, np.dtype[np.uint8]]


def shift_and_flip(
    images: Images,
    keys: Iterable[str],
    *,
    seed: int,
    epoch: int,
    pad: int = 0,
    flip: float = 0.0,
    vertical_flip: float = 0.0,
) -> Images:
    """Change (N, C, H, W) images, which are left as they are, and return new ones.

    With ``pad``, that many mirrored pixels are put round each and a window of the old size is cut
    out at random; ``flip`` and ``vertical_flip`` are probabilities.
    """
    draws = _draw(keys, seed=seed, epoch=epoch)
    images = _shift(images, pad, draws[:, :2]) if pad else images.copy()
    for chosen, axis in ((draws[:, 2] < flip, 3), (draws[:, 3] < vertical_flip, 2)):
        images[chosen] = np.flip(images[chosen], axis)
    return images


def _draw(keys: Iterable[str], *, seed: int, epoch: int) -> np.ndarray[Any, Any]:
    """(N, NUM_DRAWS) numbers in [0, 1)."""
    prefix = f"{seed}/{epoch}/"
    digests = b"".join(
        hashlib.blake2b((prefix + key).encode("utf-8", "surrogatepass"), digest_size=32).digest()
        for key in keys
    )
    return (np.frombuffer(digests, "<u8") >> 11).reshape(-1, NUM_DRAWS) * 2.0**-53


def _shift(images: Images, pad: int, draws: np.ndarray[Any, Any]) -> Images:
    padded = np.pad(images, ((0, 0), (0, 0), (pad, pad), (pad, pad)), mode="reflect")
    height, width = images.shape[2:]
    shifted = np.empty_like(images)
    for place, (top, left) in enumerate((draws * (2 * pad + 1)).astype(int)):
        shifted[place] = padded[place, :, top : top + height, left : left + width]
    return shifted
