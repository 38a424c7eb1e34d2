"""Encoded images in, label rows out: one row an image, whatever its bytes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from cnnray.errors import (
    AccessDeniedError,
    ChangedObjectError,
    ImageError,
    MissingObjectError,
    StorageError,
    UnavailableError,
)
from cnnray.images.decode import DecodeLimits
from cnnray.images.isolation import DEFAULT_SECONDS, Decode, IsolatedDecoder, guarded_decoder
from cnnray.images.transforms import fit, min_side
from cnnray.models.bundle import Bundle
from cnnray.schema import MAX_ERROR_DETAIL, labels_schema


@dataclass(frozen=True, slots=True)
class Sample:
    """One image to label: its key, its etag, and its bytes or the error that reading met."""

    key: str
    etag: str
    data: bytes | StorageError


class Labeler:
    """Labels images with a bundle's model: decode, fit and infer, batch by batch.

    ``top_k`` labels are kept for each image; ``embeddings`` adds the input of the model's head.
    An image that takes longer than ``decode_seconds`` ends the process, as one does that crashes
    it; with ``careful``, which is slower, both are rows with one of ``DECODER_ERROR_CODES``.
    """

    def __init__(
        self,
        bundle: Bundle,
        *,
        top_k: int,
        embeddings: bool,
        batch_size: int,
        limits: DecodeLimits,
        device: torch.device,
        careful: bool = False,
        decode_seconds: float = DEFAULT_SECONDS,
    ) -> None:
        self.spec = bundle.spec
        self.digest = bundle.digest
        self.model = bundle.model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.classes = np.array(bundle.spec.classes, dtype=object)
        self.top_k = min(top_k, len(self.classes))
        self.embeddings = embeddings
        self.batch_size = batch_size
        self.device = device
        self.decoding: dict[str, Any] = {
            "channels": bundle.spec.preprocessing.channels,
            "limits": limits,
            "min_side": min_side(bundle.spec.preprocessing),
            "seconds": decode_seconds,
        }
        self.isolated = IsolatedDecoder(**self.decoding) if careful else None

    def close(self) -> None:
        """End the decoder's process, if there is one."""
        if self.isolated is not None:
            self.isolated.close()

    def label(self, samples: Iterable[Sample]) -> pa.Table:
        """Rows of ``labels_schema`` in the order of the samples.

        Raises ``UnavailableError`` and ``AccessDeniedError`` of a sample: no image is at fault.
        """
        rows: list[dict[str, Any]] = []
        iterator = iter(samples)
        while batch := list(islice(iterator, self.batch_size)):
            rows.extend(self._label_batch(batch))
        return pa.Table.from_pylist(rows, labels_schema(embeddings=self.embeddings))

    def _label_batch(self, batch: Sequence[Sample]) -> Iterator[dict[str, Any]]:
        rows: list[dict[str, Any]] = []
        images: list[np.ndarray[Any, Any]] = []
        labelled: list[dict[str, Any]] = []
        with self._decoder() as decode:
            for sample in batch:
                row: dict[str, Any] = {"key": sample.key, "etag": sample.etag, "model": self.digest}
                rows.append(row)
                try:
                    image = decode(_require_data(sample.data))
                except ImageError as error:
                    detail = error.detail[:MAX_ERROR_DETAIL]
                    row |= {"status": "error", "error_code": error.code, "error_detail": detail}
                    continue
                row |= {"status": "ok", "width": image.width, "height": image.height}
                images.append(fit(image.pixels, preprocessing=self.spec.preprocessing))
                labelled.append(row)
        if images:
            self._infer(np.stack(images), labelled)
        return iter(rows)

    def _decoder(self) -> AbstractContextManager[Decode]:
        """What decodes a batch."""
        if self.isolated is not None:
            return nullcontext(self.isolated.decode)
        return guarded_decoder(**self.decoding)

    def _infer(self, images: np.ndarray[Any, Any], rows: Sequence[dict[str, Any]]) -> None:
        """Add what the model says of (B, C, H, W) images to their rows."""
        batch = torch.from_numpy(images).to(self.device, memory_format=torch.channels_last)
        embedding: np.ndarray[Any, Any] | None = None
        with torch.inference_mode():
            if self.embeddings:
                features, logits = self.model.features_and_logits(batch)
                embedding = features.half().cpu().numpy()  # (B, D)
            else:
                logits = self.model(batch)
            probs = torch.softmax(logits.float() / self.spec.temperature, dim=1)  # (B, K)
            top, index = (tensor.cpu().numpy() for tensor in probs.topk(self.top_k, dim=1))
        names = self.classes[index]  # (B, top_k)
        for position, row in enumerate(rows):
            row["label"] = names[position, 0]
            row["label_index"] = int(index[position, 0])
            row["confidence"] = float(top[position, 0])
            row["top_k"] = [
                {"label": name, "probability": float(probability)}
                for name, probability in zip(names[position], top[position], strict=True)
            ]
            if embedding is not None:
                row["embedding"] = embedding[position]


def _require_data(data: bytes | StorageError) -> bytes:
    """The bytes that were read, or the error that reading met as one of ``READ_ERROR_CODES``."""
    if isinstance(data, AccessDeniedError | UnavailableError):
        raise data
    if isinstance(data, StorageError):
        codes = {MissingObjectError: "missing", ChangedObjectError: "changed"}
        raise ImageError(codes.get(type(data), "read_failed"), str(data))
    return data
