"""Rows of pixels in, label rows out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from cnnray.images.transforms import Preprocessing, as_tensor
from cnnray.labeling.decoding import images_of
from cnnray.models.bundle import BundleSpec
from cnnray.models.engines import Engine
from cnnray.schema import TOP_K_TYPE, labels_schema


class Predictor:
    """Labels decoded images with an engine, ``batch_size`` at a time.

    ``top_k`` labels are kept for each image, and its features if the engine gives them; ``digest``
    is what the rows say of the model.
    """

    def __init__(
        self, engine: Engine, spec: BundleSpec, *, digest: str, top_k: int, batch_size: int
    ) -> None:
        self.engine = engine
        self.spec = spec
        self.digest = digest
        self.classes = pa.array(spec.classes, pa.string())
        self.top_k = min(top_k, len(spec.classes))
        self.batch_size = batch_size

    def predict(self, decoded: pa.Table) -> pa.Table:
        """Rows of ``labels_schema`` for the rows of ``SampleDecoder.decode``, in their order."""
        is_good = decoded["error_code"].is_null().to_numpy()
        columns = {
            **dict(zip(decoded.column_names, decoded.columns, strict=True)),
            "status": pa.array(np.where(is_good, "ok", "error"), pa.string()),
            "model": pa.repeat(pa.scalar(self.digest), decoded.num_rows),
        }
        if is_good.any():
            place = places_of(is_good)
            answers = self._answers(self._infer(decoded))
            columns |= {name: answer.take(place) for name, answer in answers.items()}
        schema = labels_schema(embeddings=self.engine.embeddings)
        nothing = pa.nulls(decoded.num_rows)
        return pa.table(
            [columns.get(field.name, nothing).cast(field.type) for field in schema], schema=schema
        )

    def _infer(self, decoded: pa.Table) -> Sequence[np.ndarray]:
        """Of the good rows: probabilities (N, top_k), their indices, and features (N, D) if any."""
        batches = good_batches(decoded, self.spec.preprocessing, batch_size=self.batch_size)
        answers = [self._infer_batch(batch) for batch in batches]
        # A GPU has all of them to do by now; only here is it waited for.
        return [torch.cat(parts).cpu().numpy() for parts in zip(*answers, strict=True)]

    def _infer_batch(self, images: Tensor) -> Sequence[Tensor]:
        logits, features = self.engine(images)
        probabilities = torch.softmax(logits / self.spec.temperature, dim=1)  # (B, K)
        answers = tuple(probabilities.topk(self.top_k, dim=1))
        return answers if features is None else (*answers, features.half())

    def _answers(self, inferred: Sequence[np.ndarray]) -> dict[str, pa.Array]:
        """What the model says, as columns."""
        top, index, *features = inferred
        labels = self.classes.take(pa.array(index.ravel()))
        probabilities = pa.array(top.ravel(), pa.float32())
        items = pa.StructArray.from_arrays([labels, probabilities], ["label", "probability"])
        answers = {
            "label": self.classes.take(pa.array(index[:, 0])),
            "label_index": pa.array(index[:, 0], pa.int32()),
            "confidence": pa.array(top[:, 0], pa.float32()),
            "top_k": _lists(items, self.top_k).cast(TOP_K_TYPE),
        }
        for vectors in features:
            answers["embedding"] = _lists(pa.array(vectors.ravel(), pa.float16()), vectors.shape[1])
        return answers


def good_batches(
    decoded: pa.Table, preprocessing: Preprocessing, *, batch_size: int
) -> Iterator[Tensor]:
    """The images of decoded rows that have one, (B, C, H, W) uint8, ``batch_size`` at most."""
    good = np.flatnonzero(decoded["error_code"].is_null().to_numpy())
    images = images_of(decoded, preprocessing)
    for start in range(0, len(good), batch_size):
        chosen = good[start : start + batch_size]
        is_run = chosen[-1] - chosen[0] + 1 == len(chosen)
        batch = images[chosen[0] : chosen[-1] + 1] if is_run else images[chosen]
        yield as_tensor(batch).permute(0, 3, 1, 2)


def places_of(is_good: np.ndarray[Any, Any]) -> pa.Array:
    """Where the answer of each row is among those of the good rows; null of the others."""
    return pa.array(np.cumsum(is_good) - 1, pa.int32(), mask=~is_good)


def _lists(values: pa.Array, size: int) -> pa.ListArray:
    """The values as lists of ``size``."""
    offsets = pa.array(np.arange(0, len(values) + 1, size, dtype=np.int32))
    return pa.ListArray.from_arrays(offsets, values)
