"""The evaluate job: every row of a split once, by actors; metrics are taken from all rows."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import torch

from cnnray import __version__
from cnnray.cluster.core.session import ray_cluster
from cnnray.cluster.core.streaming import map_units
from cnnray.cluster.inference.actors import set_up_actor
from cnnray.cluster.inference.stages import inference_stage
from cnnray.config import EvaluateSettings
from cnnray.console import ProgressLine
from cnnray.datasets.manifest import Manifest, Split, get_split, read_manifest
from cnnray.datasets.shards import read_row_group
from cnnray.errors import CnnrayError, DataError, ImageError, UsageError
from cnnray.evaluation.doctor import diagnose, read_run
from cnnray.evaluation.figures import printable
from cnnray.evaluation.findings import Finding
from cnnray.evaluation.metrics import (
    Metrics,
    compute_metrics,
    predictions_from_logits,
    worst_mistakes,
)
from cnnray.evaluation.report import Mistake, render_report
from cnnray.evaluation.views import DESCRIPTIONS, mean_logits, plan_views
from cnnray.images.decode import decode_image
from cnnray.images.transforms import EvalTransform
from cnnray.models.bundle import BundleSpec, load_bundle
from cnnray.storage import Store, encode_json, encode_parquet, open_store, sha256

logger = logging.getLogger(__name__)

METRICS, PREDICTIONS, REPORT = "metrics.json", "predictions.parquet", "report.html"
UNIT_ROWS = 1024
NUM_MISTAKES = 24


class EvaluateActor:
    """One worker: predicts the rows of its units with its own copy of the model."""

    def __init__(self, *, model: Store, data: Store, settings: EvaluateSettings) -> None:
        bundle = load_bundle(model)
        self.device = set_up_actor(use_gpu=settings.scaling.use_gpu)
        self.predict = partial(
            mean_logits,
            bundle.model.to(self.device, memory_format=torch.channels_last),  # type: ignore[call-overload]
            tta=settings.tta,
            size=bundle.spec.preprocessing.size,
            temperature=bundle.spec.temperature,
        )
        self.transform = EvalTransform(
            plan_views(settings.tta, bundle.spec.preprocessing),
            settings.limits,
        )
        self.data = data
        self.batch_size = settings.batch_size

    def __call__(self, units: pa.Table) -> pa.Table:
        """``PREDICTIONS_SCHEMA`` rows of (path, row_group, start, stop) units."""
        return pa.concat_tables([self._predict(**unit) for unit in units.to_pylist()])

    def _predict(self, *, path: str, row_group: int, start: int, stop: int) -> pa.Table:
        rows = read_row_group(self.data, path, row_group, columns=("key", "image", "label")).slice(
            start, stop - start
        )
        keys = rows["key"].to_pylist()
        logits = [
            self._logits(
                keys[begin : begin + self.batch_size], rows["image"].slice(begin, self.batch_size)
            )
            for begin in range(0, len(keys), self.batch_size)
        ]
        labels = torch.from_numpy(rows["label"].to_numpy().astype(np.int64))
        return predictions_from_logits(keys=keys, labels=labels, logits=torch.cat(logits))

    def _logits(self, keys: Sequence[str], images: pa.ChunkedArray) -> torch.Tensor:
        """(B, K) on the CPU."""
        pixels = [self._decode(key, data.as_py()) for key, data in zip(keys, images, strict=True)]
        batch = torch.from_numpy(np.stack(pixels))
        with torch.inference_mode():
            images = batch.to(self.device, memory_format=torch.channels_last)
            return self.predict(images).cpu()

    def _decode(self, key: str, data: bytes) -> np.ndarray[Any, Any]:
        try:
            return self.transform(data)
        except ImageError as error:
            raise DataError(
                f"{key!r} of {self.data.uri} cannot be decoded any more: {error}"
            ) from error


def evaluate(settings: EvaluateSettings) -> dict[str, Any]:
    """Evaluate, write metrics, rows and report, and return the job's result.

    Raises ``DataError`` when the bundle's classes are not the dataset's, ``UsageError`` when there
    is an evaluation at the output, ``SettingsError`` for views that the model's input has no room
    for.
    """
    started = time.perf_counter()
    model, data, output = (
        open_store(uri) for uri in (settings.model, settings.data, settings.output)
    )
    bundle = load_bundle(model)
    manifest = read_manifest(data)
    _check_classes(bundle.spec, manifest, settings=settings)
    plan_views(settings.tta, bundle.spec.preprocessing)  # refuses before anything is started
    split = get_split(manifest, settings.split, uri=settings.data)
    if output.head(METRICS) is not None and not settings.overwrite:
        raise UsageError(
            f"{output.uri} holds an evaluation already",
            hint="choose another --output, or --overwrite",
        )
    with ray_cluster(settings.cluster):
        predictions = _predict(split, model=model, data=data, settings=settings)
    metrics = compute_metrics(predictions, classes=manifest.classes)
    facts = _facts(settings, digest=bundle.digest, spec=bundle.spec, manifest=manifest)
    mistakes = _mistakes(predictions, split=split, data=data, classes=manifest.classes)
    diagnosis = diagnose(
        read_run(bundle.spec.provenance, classes=manifest.classes),
        per_class=metrics.per_class,
        predictions=None if settings.split == "train" else predictions,
    )
    report = render_report(
        title=f"{bundle.spec.architecture} on {settings.split}",
        metrics=metrics,
        history=_history(bundle.spec),
        mistakes=mistakes,
        diagnosis=diagnosis,
        facts=facts,
    )
    document = {
        "facts": facts,
        **metrics.to_dict(),
        "diagnosis": [finding.to_dict() for finding in diagnosis],
    }
    output.write(PREDICTIONS, encode_parquet(predictions))
    output.write(REPORT, report.encode())
    output.write(METRICS, encode_json(document))
    return _result(metrics, diagnosis, output=output, seconds=time.perf_counter() - started)


def _check_classes(spec: BundleSpec, manifest: Manifest, *, settings: EvaluateSettings) -> None:
    if spec.classes == manifest.classes:
        return
    found = f"{len(spec.classes)} classes in {settings.model}, {len(manifest.classes)}"
    odd = sorted(set(spec.classes) ^ set(manifest.classes))
    named = f" (differing in {', '.join(odd[:5])})" if odd else " (in another order)"
    raise DataError(
        f"the model's classes are not the dataset's: {found} in {settings.data}{named}",
        hint="evaluate on a dataset packed from the same classes",
    )


def _predict(split: Split, *, model: Store, data: Store, settings: EvaluateSettings) -> pa.Table:
    """The predictions of every row, sorted by key. Raises ``CnnrayError`` when a row is missing."""
    tables: list[pa.Table] = []
    arguments = {"model": model, "data": data, "settings": settings}
    done = 0
    with ProgressLine(
        total=split.num_samples,
        unit="images",
        label="evaluate",
        seconds=settings.cluster.progress_seconds,
    ) as progress:
        for table in map_units(
            _units(split),
            [inference_stage(EvaluateActor, arguments, settings.scaling, settings.cluster)],
            stall_seconds=settings.cluster.stall_seconds,
        ):
            tables.append(table)
            done += table.num_rows
            progress.update(done)
    predictions = pa.concat_tables(tables).sort_by("key")
    distinct = len(predictions["key"].unique())
    if not distinct == predictions.num_rows == split.num_samples:
        raise CnnrayError(
            f"{predictions.num_rows} rows of {distinct} keys were evaluated,"
            f" the split has {split.num_samples}"
        )
    return predictions


def _units(split: Split) -> list[pa.Table]:
    units = [
        {
            "path": shard.path,
            "row_group": group,
            "start": start,
            "stop": min(start + UNIT_ROWS, num_rows),
        }
        for shard in split.files
        for group, num_rows in enumerate(shard.row_groups)
        for start in range(0, num_rows, UNIT_ROWS)
    ]
    return [pa.Table.from_pylist([unit]) for unit in units]


def _mistakes(
    predictions: pa.Table, *, split: Split, data: Store, classes: Sequence[str]
) -> list[Mistake]:
    """The most confident mistakes, with their images."""
    rows = worst_mistakes(predictions, count=NUM_MISTAKES).to_pylist()
    images = _find_images({row["key"] for row in rows}, split=split, data=data)
    return [
        Mistake(
            key=row["key"],
            label=classes[row["label"]],
            prediction=classes[row["prediction"]],
            confidence=row["confidence"],
            thumbnail=_thumbnail(images.get(row["key"])),
        )
        for row in rows
    ]


def _find_images(keys: set[str], *, split: Split, data: Store) -> dict[str, bytes]:
    """The encoded images of a few keys: keys are read first, images only where they are."""
    found: dict[str, bytes] = {}
    for shard in split.files:
        for group in range(len(shard.row_groups)):
            if len(found) == len(keys):
                return found
            there = read_row_group(data, shard.path, group, columns=("key",))["key"].to_pylist()
            if keys.isdisjoint(there):
                continue
            images = read_row_group(data, shard.path, group, columns=("image",))["image"]
            found |= {
                key: image.as_py() for key, image in zip(there, images, strict=True) if key in keys
            }
    return found


def _history(spec: BundleSpec) -> list[dict[str, Any]]:
    """The epochs of training, counted from 1; a bundle from elsewhere may not tell them."""
    history = spec.provenance.get("history")
    if not isinstance(history, list):
        return []
    return [
        {**result, "epoch": result["epoch"] + 1}
        for result in history
        if isinstance(result, dict) and isinstance(result.get("epoch"), int)
    ]


def _thumbnail(data: bytes | None) -> np.ndarray[Any, Any] | None:
    if data is None:
        return None
    try:
        return decode_image(data).pixels
    except ImageError:
        return None


def _facts(
    settings: EvaluateSettings, *, digest: str, spec: BundleSpec, manifest: Manifest
) -> dict[str, str]:
    facts = {
        "model": settings.model,
        "architecture": spec.architecture,
        "model digest": digest,
        "input": f"{spec.preprocessing.size} px, {spec.preprocessing.channels} channels",
        "data": settings.data,
        "split": settings.split,
        "dataset digest": sha256(manifest.to_bytes()),
        "versions": f"cnnray {__version__}, torch {torch.__version__}, ray {ray.__version__}",
    }
    if settings.tta != "none":
        facts["test-time augmentation"] = DESCRIPTIONS[settings.tta]
    return facts


def _result(
    metrics: Metrics, diagnosis: Sequence[Finding], *, output: Store, seconds: float
) -> dict[str, Any]:
    values = metrics.to_dict()
    logger.info(
        "accuracy %.4f, top-5 %.4f, loss %s over %s images: %s/%s",
        metrics.accuracy,
        metrics.top5_accuracy,
        values["loss"],
        f"{metrics.samples:,}",
        output.uri,
        REPORT,
    )
    for finding in diagnosis:
        logger.warning("diagnosis: %s", printable(finding.text, max_characters=1500))
    names = (
        "samples",
        "loss",
        "accuracy",
        "top5_accuracy",
        "balanced_accuracy",
        "macro_f1",
        "ece",
        "per_class",
    )
    return {
        **{name: values[name] for name in names},
        "diagnosis": [finding.to_dict() for finding in diagnosis],
        "report": f"{output.uri}/{REPORT}",
        "predictions": f"{output.uri}/{PREDICTIONS}",
        "seconds": round(seconds, 1),
    }
