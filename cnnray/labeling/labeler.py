"""Encoded images in, label rows out: one row an image, whatever its bytes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from cnnray.errors import ImageError, MissingObjectError, StorageError
from cnnray.images.decode import DecodeLimits, decode_image
from cnnray.images.transforms import fit
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
    ) -> None:
        self.spec = bundle.spec
        self.digest = bundle.digest
        self.model = bundle.model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.classes = np.array(bundle.spec.classes, dtype=object)
        self.top_k = min(top_k, len(self.classes))
        self.embeddings = embeddings
        self.batch_size = batch_size
        self.limits = limits
        self.device = device

    def label(self, samples: Iterable[Sample]) -> pa.Table:
        """Rows of ``labels_schema`` in the order of the samples."""
        rows: list[dict[str, Any]] = []
        iterator = iter(samples)
        while batch := list(islice(iterator, self.batch_size)):
            rows.extend(self._label_batch(batch))
        return pa.Table.from_pylist(rows, labels_schema(embeddings=self.embeddings))

    def _label_batch(self, batch: Sequence[Sample]) -> Iterator[dict[str, Any]]:
        rows: list[dict[str, Any]] = []
        images: list[np.ndarray[Any, Any]] = []
        labelled: list[dict[str, Any]] = []
        for sample in batch:
            row: dict[str, Any] = {"key": sample.key, "etag": sample.etag, "model": self.digest}
            rows.append(row)
            try:
                image, width, height = self._decode(sample.data)
            except ImageError as error:
                detail = error.detail[:MAX_ERROR_DETAIL]
                row |= {"status": "error", "error_code": error.code, "error_detail": detail}
                continue
            row |= {"status": "ok", "width": width, "height": height}
            images.append(image)
            labelled.append(row)
        if images:
            self._infer(np.stack(images), labelled)
        return iter(rows)

    def _decode(self, data: bytes | StorageError) -> tuple[np.ndarray[Any, Any], int, int]:
        if isinstance(data, StorageError):
            code = "missing" if isinstance(data, MissingObjectError) else "read_failed"
            raise ImageError(code, str(data))
        preprocessing = self.spec.preprocessing
        pixels = decode_image(data, channels=preprocessing.channels, limits=self.limits).pixels
        return fit(pixels, preprocessing=preprocessing), pixels.shape[1], pixels.shape[0]

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
