"""Encoded images in, rows of pixels out: what a model needs of each image, or why there is none."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from cnnray.errors import (
    MAX_ERROR_DETAIL,
    AccessDeniedError,
    ChangedObjectError,
    ImageError,
    MissingObjectError,
    StorageError,
    UnavailableError,
)
from cnnray.images.isolation import DEFAULT_SECONDS, Decode
from cnnray.images.safe_decoder import SafeDecoder
from cnnray.images.transforms import Preprocessing, fit_view, min_side
from cnnray.options import DEFAULT_LIMITS, DecodeLimits

FACTS_SCHEMA = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),
        pa.field("etag", pa.string(), nullable=False),
        pa.field("error_code", pa.string()),
        pa.field("error_detail", pa.string()),
        pa.field("width", pa.int32()),
        pa.field("height", pa.int32()),
    ]
)
"""What decoding tells of an image: an error, or the sides that it has in its file."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One image to label: its key, its etag, and its bytes or the error that reading met."""

    key: str
    etag: str
    data: bytes | StorageError


class SampleDecoder:
    """Decodes samples and fits them to a model's input.

    An image that takes longer than ``decode_seconds`` ends the process, as one does that crashes
    it; with ``careful``, which is slower, both are rows with one of ``DECODER_ERROR_CODES``.
    """

    def __init__(
        self,
        preprocessing: Preprocessing,
        *,
        limits: DecodeLimits = DEFAULT_LIMITS,
        careful: bool = False,
        decode_seconds: float = DEFAULT_SECONDS,
    ) -> None:
        self.preprocessing = preprocessing
        self.safe = SafeDecoder(
            careful=careful,
            channels=preprocessing.channels,
            limits=limits,
            min_side=min_side(preprocessing),
            seconds=decode_seconds,
        )

    def close(self) -> None:
        """End the decoder's process, if there is one."""
        self.safe.close()

    def decode(self, samples: Sequence[Sample]) -> pa.Table:
        """A row for each sample: ``FACTS_SCHEMA`` and its ``image``, size x size x channels bytes.

        The image of an error is black. Raises ``UnavailableError`` and ``AccessDeniedError`` of a
        sample: no image is at fault.
        """
        size, channels = self.preprocessing.size, self.preprocessing.channels
        images = np.zeros((len(samples), size, size, channels), np.uint8)
        with self.safe.batch() as decode:
            facts = [
                {"key": sample.key, "etag": sample.etag, **self._decode(sample.data, decode, image)}
                for sample, image in zip(samples, images, strict=True)
            ]
        return _decoded_table(facts, images)

    def fit(self, pictures: Sequence[np.ndarray[Any, Any]]) -> pa.Table:
        """The same rows for pixels, (H, W, C) uint8 of any size, without key and etag."""
        size, channels = self.preprocessing.size, self.preprocessing.channels
        images = np.zeros((len(pictures), size, size, channels), np.uint8)
        facts: list[dict[str, Any]] = []
        for picture, image in zip(pictures, images, strict=True):
            fitted = fit_view(picture, preprocessing=self.preprocessing)  # (C, H, W)
            image[...] = np.moveaxis(fitted, 0, 2)
            height, width = picture.shape[:2]
            facts.append({"key": "", "etag": "", "width": width, "height": height})
        return _decoded_table(facts, images)

    def _decode(
        self, data: bytes | StorageError, decode: Decode, image: np.ndarray[Any, Any]
    ) -> dict[str, Any]:
        """Write the pixels into ``image`` (H, W, C) and return the other facts."""
        try:
            decoded = decode(_require_data(data))
        except ImageError as error:
            return {"error_code": error.code, "error_detail": error.detail[:MAX_ERROR_DETAIL]}
        fitted = fit_view(decoded.pixels, preprocessing=self.preprocessing)  # (C, H, W)
        image[...] = np.moveaxis(fitted, 0, 2)
        return {"width": decoded.width, "height": decoded.height}


def _decoded_table(facts: Sequence[dict[str, Any]], images: np.ndarray[Any, Any]) -> pa.Table:
    """Facts with their images, (N, H, W, C) uint8, whose memory is shared."""
    cell = pa.binary(int(np.prod(images.shape[1:])))
    pixels = pa.Array.from_buffers(cell, len(images), [None, pa.py_buffer(images)])
    return pa.Table.from_pylist(list(facts), FACTS_SCHEMA).append_column("image", pixels)


def images_of(decoded: pa.Table, preprocessing: Preprocessing) -> np.ndarray[Any, Any]:
    """The pixels of decoded rows, (N, H, W, C) uint8, in the table's own memory where it is one."""
    column = decoded["image"]  # combine_chunks copies a single chunk, too
    column = column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()
    size, channels = preprocessing.size, preprocessing.channels
    cell = size * size * channels
    pixels = np.frombuffer(column.buffers()[1], np.uint8)
    start = column.offset * cell
    return pixels[start : start + len(column) * cell].reshape(-1, size, size, channels)


def _require_data(data: bytes | StorageError) -> bytes:
    """The bytes that were read, or the error that reading met as one of ``READ_ERROR_CODES``."""
    if isinstance(data, AccessDeniedError | UnavailableError):
        raise data
    if isinstance(data, StorageError):
        codes = {MissingObjectError: "missing", ChangedObjectError: "changed"}
        raise ImageError(codes.get(type(data), "read_failed"), str(data))
    return data
