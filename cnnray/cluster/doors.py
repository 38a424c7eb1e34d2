"""cnnray's datasets and models in a user's own Ray Data pipeline.

>>> import cnnray
>>> images = cnnray.read_dataset("work/dataset", split="test")
>>> labelled = images.map_batches(
...     cnnray.Classifier,
...     fn_constructor_args=["work/model"],
...     concurrency=2,
...     batch_size=64,
... )
>>> labelled.select_columns(["key", "class_name", "prediction"]).write_parquet("work/compared")
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import pyarrow as pa
import ray
import torch

from cnnray.cluster.core.streaming import MAX_UNITS, dataset_of
from cnnray.datasets.listing import list_in_order
from cnnray.datasets.manifest import get_split, manifest_exists, read_manifest
from cnnray.datasets.shards import read_row_group
from cnnray.datasets.sources import open_source
from cnnray.errors import DataError, MissingObjectError, SettingsError, StorageError
from cnnray.images.isolation import DEFAULT_SECONDS
from cnnray.labeling.decoding import Sample, SampleDecoder
from cnnray.labeling.prediction import Predictor
from cnnray.models.bundle import load_bundle
from cnnray.models.engines import EagerEngine
from cnnray.schema import ENTRY_SCHEMA
from cnnray.storage import Store, open_store

if TYPE_CHECKING:
    from ray.data import Dataset

UNIT_ROWS = 256
"""Images of a collection that are one block, at least."""

Batch: TypeAlias = dict[str, np.ndarray[Any, Any]] | pa.Table


def read_dataset(
    uri: str, *, split: str | None = None, format: str = "auto", **columns: str | None
) -> Dataset:
    """The images at ``uri``, local or ``s3://``, as a ``ray.data.Dataset`` that is read when used.

    Of a packed dataset each row has a ``key``, the encoded ``image``, its ``label`` (the index) and
    ``class_name``, of one ``split`` or of all; a block is a row group. Of any other collection that
    the classify job takes, which is listed first, it has a ``key``, the ``image`` and an ``error``
    where it cannot be read; ``format`` and ``columns`` are those of ``open_source``.

    Raises ``DataError`` when there are no images, ``SettingsError`` for a split of a collection.
    """
    store = open_store(uri)
    if format in ("auto", "dataset") and not columns and manifest_exists(store):
        return _read_packed(store, split)
    if split is not None:
        raise SettingsError(f"{uri} is no packed dataset: it has no splits", hint="leave out split")
    return _read_collection(uri, format=format, **columns)


def _read_packed(store: Store, split: str | None) -> Dataset:
    manifest = read_manifest(store)
    chosen = (
        [part for part in manifest.splits.values() if part.num_samples]
        if split is None
        else [get_split(manifest, split, uri=store.uri)]
    )
    units = [
        pa.table({"path": [file.path], "row_group": [group]})
        for part in chosen
        for file in part.files
        for group in range(len(file.row_groups))
    ]
    names = pa.array(manifest.classes, pa.string())

    def read(unit: pa.Table) -> pa.Table:
        [place] = unit.to_pylist()
        rows = read_row_group(store, **place, columns=("key", "image", "label"))
        return rows.append_column("class_name", names.take(rows["label"].combine_chunks()))

    return dataset_of(units, read)


def _read_collection(uri: str, **options: Any) -> Dataset:
    source = open_source(uri, labelled=False, **options)
    entries = pa.concat_tables([ENTRY_SCHEMA.empty_table(), *list_in_order(source)])
    if not entries.num_rows:
        raise DataError(f"no images at all in {uri}")
    size = max(UNIT_ROWS, -(-entries.num_rows // MAX_UNITS))
    units = [entries.slice(start, size) for start in range(0, entries.num_rows, size)]

    def read(unit: pa.Table) -> pa.Table:
        found = list(source.read(unit))
        failed = [str(data) if isinstance(data, StorageError) else None for data in found]
        images = [None if isinstance(data, StorageError) else data for data in found]
        return pa.table(
            {
                "key": unit["key"],
                "image": pa.array(images, pa.large_binary()),
                "error": pa.array(failed, pa.string()),
            }
        )

    return dataset_of(units, read)


class Classifier:
    """A bundle as a callable class for ``map_batches``; it can also be called without Ray.

    A batch (numpy or pyarrow) has a column of encoded images, or, in numpy, of pixels: (N, H, W, C)
    uint8, or arrays of (H, W, C). It comes back with four columns more: ``prediction`` (the class),
    ``confidence``, ``top_k`` (a list of labels with their probabilities), and ``error_code`` where
    there is no image to label. On a GPU where the worker has one (``num_gpus=1``).

    An image that takes longer than ``decode_seconds`` or crashes its decoder ends the process: an
    actor that Ray restarts (``max_restarts``) gives it an error code instead.
    """

    def __init__(
        self,
        bundle: str,
        *,
        image_column: str = "image",
        top_k: int = 5,
        batch_size: int | None = None,
        decode_seconds: float = DEFAULT_SECONDS,
    ) -> None:
        loaded = load_bundle(open_store(bundle))
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.image_column = image_column
        self.channels = loaded.spec.preprocessing.channels
        self.decoder = SampleDecoder(
            loaded.spec.preprocessing, careful=_was_restarted(), decode_seconds=decode_seconds
        )
        self.predictor = Predictor(
            EagerEngine(loaded.model, device=device, embeddings=False),
            loaded.spec,
            digest=loaded.digest,
            top_k=top_k,
            batch_size=batch_size or (64 if device.type == "cuda" else 16),
        )

    def __call__(self, batch: Batch) -> Batch:
        """The same batch with the answers beside it. Raises ``DataError`` for other columns."""
        rows = self.predictor.predict(self._decode(batch))
        answers = rows.select(["label", "confidence", "top_k", "error_code"]).rename_columns(
            ["prediction", "confidence", "top_k", "error_code"]
        )
        if isinstance(batch, pa.Table):
            for name in answers.column_names:
                batch = batch.append_column(name, answers[name])
            return batch
        return batch | {
            name: answers[name].combine_chunks().to_numpy(zero_copy_only=False)
            if name == "confidence"
            else _objects(answers[name].to_pylist())
            for name in answers.column_names
        }

    def _decode(self, batch: Batch) -> pa.Table:
        if isinstance(batch, pa.Table):
            return self._decode_files(_column(batch, self.image_column).to_pylist())
        images = _column(batch, self.image_column)
        if images.ndim == 4 or (len(images) and isinstance(images[0], np.ndarray)):
            return self.decoder.fit([self._checked(image) for image in images])
        return self._decode_files(images)

    def _decode_files(self, files: Iterable[Any]) -> pa.Table:
        missing = MissingObjectError("there is no image in this row")
        samples = [Sample("", "", missing if data is None else _bytes(data)) for data in files]
        return self.decoder.decode(samples)

    def _checked(self, image: Any) -> np.ndarray[Any, Any]:
        """The pixels. Raises ``DataError`` for what the model cannot take."""
        wanted = f"(H, W, {self.channels}) uint8"
        if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.ndim != 3:
            raise DataError(f"column {self.image_column} must hold images as files or {wanted}")
        if image.shape[2] != self.channels or not image.size:
            raise DataError(f"an image of shape {image.shape}, the model takes {wanted}")
        return image


def _column(batch: Batch, name: str) -> Any:
    names = batch.column_names if isinstance(batch, pa.Table) else list(batch)
    if name not in names:
        raise DataError(f"no column {name} in the batch", hint=f"it has {', '.join(names)}")
    return batch[name]


def _bytes(data: Any) -> bytes:
    if not isinstance(data, bytes):
        raise DataError(
            f"images must be bytes, not {type(data).__name__}",
            hint='pixels come as numpy: map_batches(..., batch_format="numpy")',
        )
    return data


def _objects(values: Sequence[Any]) -> np.ndarray[Any, Any]:
    """A column of any objects, one for each row."""
    column = np.empty(len(values), object)
    for place, value in enumerate(values):  # numpy would take lists for another dimension
        column[place] = value
    return column


def _was_restarted() -> bool:
    """Whether this is an actor of Ray that has died before."""
    if not ray.is_initialized():
        return False
    context = ray.get_runtime_context()
    return context.get_actor_id() is not None and context.was_current_actor_reconstructed
