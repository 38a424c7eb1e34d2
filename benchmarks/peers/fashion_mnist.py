"""Fashion-MNIST in memory, as the tutorial has it: numpy and nothing else."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np

Pixels = np.ndarray  # (N, 28, 28) uint8
Labels = np.ndarray  # (N,) uint8


def read_split(folder: str, split: str) -> tuple[Pixels, Labels]:
    """``train`` or ``t10k`` from gzipped IDX files."""
    images = _read(Path(folder) / f"{split}-images-idx3-ubyte.gz", header=16)
    labels = _read(Path(folder) / f"{split}-labels-idx1-ubyte.gz", header=8)
    return images.reshape(len(labels), 28, 28), labels


def write_part(source: Path, folder: Path, *, split: str, images: int) -> None:
    """The first images of a split, for short forms."""
    pixels, labels = read_split(str(source), split)
    write_split(folder, split, pixels[:images], labels[:images])


def write_split(folder: Path, split: str, pixels: Pixels, labels: Labels) -> None:
    """Images and labels as gzipped IDX files."""
    for name, values in (("images-idx3", pixels), ("labels-idx1", labels)):
        header = np.array([0x0800 + values.ndim, *values.shape], dtype=">u4").tobytes()
        data = gzip.compress(header + values.tobytes(), compresslevel=1)
        (folder / f"{split}-{name}-ubyte.gz").write_bytes(data)


def _read(path: Path, *, header: int) -> np.ndarray:
    return np.frombuffer(gzip.decompress(path.read_bytes()), np.uint8, offset=header)
