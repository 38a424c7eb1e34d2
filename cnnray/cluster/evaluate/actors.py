"""What the workers of the evaluate job read and answer, and what they are made from."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import starmap

import pyarrow as pa
import ray
import torch
from torch import Tensor

from cnnray.cluster.inference.actors import set_up_actor
from cnnray.cluster.inference.choices import batch_size_of, is_split, make_decoder
from cnnray.config import EvaluateSettings
from cnnray.datasets.manifest import Split
from cnnray.datasets.shards import read_row_group
from cnnray.evaluation.metrics import predictions_from_logits
from cnnray.evaluation.views import mean_logits, plan_views
from cnnray.images.transforms import Preprocessing
from cnnray.labeling.agreement import SAMPLE_PARTS, spread
from cnnray.labeling.decoding import Sample, SampleDecoder
from cnnray.labeling.prediction import good_batches, places_of
from cnnray.models.bundle import BundleSpec, load_bundle, read_bundle_spec
from cnnray.models.engines import Engine, PreparedEngine, open_engine
from cnnray.schema import PREDICTIONS_SCHEMA
from cnnray.storage import Store

COLUMNS = ("key", "image", "label")
ANSWERED = ("prediction", "confidence", "loss", "label_rank")


@dataclass(frozen=True)
class EvaluateJob:
    """What every worker is made from; ``engine`` is a ``PreparedEngine``, or eager."""

    model: Store
    data: Store
    split: Split
    settings: EvaluateSettings
    engine: ray.ObjectRef | None = None

    kept = ("label",)
    embeddings = False
    is_bound_to_precision = False

    def fit(self, spec: BundleSpec) -> Preprocessing:
        """How images are fitted: views are taken from larger ones. Raises ``SettingsError``."""
        return plan_views(self.settings.tta, spec.preprocessing)

    def open_reader(self) -> ShardImages:
        """What reads in a worker."""
        chunk_rows = self.settings.chunk_rows if is_split(self.settings) else None
        return ShardImages(self.data, chunk_rows=chunk_rows)

    def open_decoder(self, *, careful: bool) -> SampleDecoder:
        """What decodes in a worker."""
        spec = read_bundle_spec(self.model)
        return make_decoder(self.fit(spec), self.settings, careful=careful)

    def open_predictor(self) -> EvaluationPredictor:
        """What computes in a worker."""
        device = set_up_actor(use_gpu=self.settings.scaling.use_gpu)
        prepared = PreparedEngine() if self.engine is None else ray.get(self.engine)
        bundle, batch_size = load_bundle(self.model), batch_size_of(self.settings)
        return EvaluationPredictor(
            open_engine(prepared, bundle, device=device, embeddings=False, batch_size=batch_size),
            bundle.spec,
            fitted=self.fit(bundle.spec),
            tta=self.settings.tta,
            batch_size=batch_size,
        )

    def read_sample(self, size: int) -> list[Sample]:
        """Some images from all over the split, of a few row groups."""
        groups = [
            (file.path, group) for file in self.split.files for group in range(len(file.row_groups))
        ]
        chosen = [groups[place] for place in spread(len(groups), min(size, SAMPLE_PARTS))]
        samples: list[Sample] = []
        for path, group in chosen:
            rows = read_row_group(self.data, path, group, columns=COLUMNS)
            samples += _samples(rows.take(spread(rows.num_rows, size // len(chosen))))
        return samples


class ShardImages:
    """Reads rows of row groups of shards, in chunks of ``chunk_rows`` or whole."""

    def __init__(self, store: Store, *, chunk_rows: int | None = None) -> None:
        self.store = store
        self.chunk_rows = chunk_rows

    def read(self, units: pa.Table) -> Iterator[tuple[pa.Table, Iterator[Sample]]]:
        """Keys and labels of (path, row_group, start, stop) units, chunk by chunk, and samples.

        Raises ``DataError`` for a shard that is damaged.
        """
        for unit in units.to_pylist():
            start, stop = unit["start"], unit["stop"]
            group = read_row_group(self.store, unit["path"], unit["row_group"], columns=COLUMNS)
            size = self.chunk_rows or stop - start
            for first in range(start, stop, size):
                rows = group.slice(first, min(size, stop - first))
                yield rows.select(["key", "label"]), _samples(rows)


def _samples(rows: pa.Table) -> Iterator[Sample]:
    return starmap(
        lambda key, image: Sample(key.as_py(), "", image.as_py()),
        zip(rows["key"], rows["image"], strict=True),
    )


class EvaluationPredictor:
    """Compares what an engine says of images, in one view of each or several, with their labels."""

    def __init__(
        self, engine: Engine, spec: BundleSpec, *, fitted: Preprocessing, tta: str, batch_size: int
    ) -> None:
        self.engine = engine
        self.spec = spec
        self.fitted = fitted
        self.tta = tta
        self.batch_size = batch_size

    def predict(self, decoded: pa.Table) -> pa.Table:
        """Key, error and ``ANSWERED`` columns of rows with a ``label``; no answers to errors."""
        is_good = decoded["error_code"].is_null()
        good = decoded.select(["key", "label"]).filter(is_good)
        answers = predictions_from_logits(
            keys=good["key"].to_pylist(),
            labels=torch.from_numpy(good["label"].to_numpy().astype("int64")),
            logits=self._logits(decoded),
        )
        rows = decoded.select(["key", "error_code", "error_detail"])
        places = places_of(is_good.to_numpy())
        for name in ANSWERED:
            rows = rows.append_column(name, answers[name].combine_chunks().take(places))
        return rows

    def _logits(self, decoded: pa.Table) -> Tensor:
        """(B, K) of the B rows that have an image."""
        batches = good_batches(decoded, self.fitted, batch_size=self.batch_size)
        logits = [self._mean_logits(batch) for batch in batches]
        # A GPU has all of them to do by now; only here is it waited for.
        return torch.cat([torch.empty(0, len(self.spec.classes)), *(part.cpu() for part in logits)])

    def _mean_logits(self, images: Tensor) -> Tensor:
        with torch.inference_mode():
            return mean_logits(
                lambda view: self.engine(view)[0],
                images,
                tta=self.tta,
                size=self.spec.preprocessing.size,
                temperature=self.spec.temperature,
            )


def split_answers(rows: pa.Table) -> tuple[pa.Table, pa.Table]:
    """The predictions among the workers' rows (``PREDICTIONS_SCHEMA``), and the errors."""
    is_good = rows["error_code"].is_null()
    predictions = rows.filter(is_good).select(PREDICTIONS_SCHEMA.names)
    errors = rows.filter(rows["error_code"].is_valid())
    return (
        predictions.cast(PREDICTIONS_SCHEMA),
        errors.select(["key", "label", "error_code", "error_detail"]),
    )
