"""The evaluate job: every row of a split once, by actors; metrics are taken from all good rows."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import torch

from cnnray import __version__
from cnnray.cluster.core.session import ray_cluster
from cnnray.cluster.core.streaming import MAX_UNITS, map_units
from cnnray.cluster.evaluate.actors import EvaluateJob, split_answers
from cnnray.cluster.inference.choices import decoded_block_bytes, engine_choice
from cnnray.cluster.inference.engine_check import CheckedEngine, check_engine
from cnnray.cluster.inference.stages import plan_stages
from cnnray.config import EvaluateSettings
from cnnray.console import ProgressLine
from cnnray.datasets.manifest import Manifest, Split, get_split, read_manifest
from cnnray.datasets.shards import read_row_group
from cnnray.errors import CnnrayError, DataError, ImageError, TooManyBadImagesError, UsageError
from cnnray.evaluation.doctor import diagnose, read_run
from cnnray.evaluation.figures import printable
from cnnray.evaluation.findings import Finding
from cnnray.evaluation.metrics import Metrics, compute_metrics, worst_mistakes
from cnnray.evaluation.report import Mistake, render_report
from cnnray.evaluation.views import DESCRIPTIONS, plan_views
from cnnray.images.decode import decode_image
from cnnray.models.bundle import BundleSpec, load_bundle
from cnnray.storage import Store, encode_json, encode_parquet, open_store, sha256

logger = logging.getLogger(__name__)

METRICS, PREDICTIONS, REPORT = "metrics.json", "predictions.parquet", "report.html"
UNIT_ROWS = 1024
NUM_MISTAKES = 24


def evaluate(settings: EvaluateSettings) -> dict[str, Any]:
    """Evaluate, write metrics, rows and report, and return the job's result.

    Raises ``DataError`` when the bundle's classes are not the dataset's, ``UsageError`` when there
    is an evaluation at the output, ``SettingsError`` for views that the model's input has no room
    for and for an engine whose labels are not those of eager, ``TooManyBadImagesError`` (everything
    is written) when more images than the budget allows cannot be decoded any more.
    """
    started = time.perf_counter()
    model, data, output = (
        open_store(uri) for uri in (settings.model, settings.data, settings.output)
    )
    bundle = load_bundle(model)
    manifest = read_manifest(data)
    _check_classes(bundle.spec, manifest, settings=settings)
    plan_views(settings.tta, bundle.spec.preprocessing)  # refuses before anything is started
    choice = engine_choice(settings)
    split = get_split(manifest, settings.split, uri=settings.data)
    if output.head(METRICS) is not None and not settings.overwrite:
        raise UsageError(
            f"{output.uri} holds an evaluation already",
            hint="choose another --output, or --overwrite",
        )
    job = EvaluateJob(model, data, split, settings)
    with ray_cluster(settings.cluster):
        engine = check_engine(job, choice)
        job = dataclasses.replace(job, engine=engine.prepared)
        predictions, errors = _predict(job, bundle.spec)
    facts = _facts(settings, digest=bundle.digest, spec=bundle.spec, manifest=manifest)
    facts |= _engine_facts(engine) | _error_facts(errors, split)
    evaluation = Evaluation(predictions, errors, engine, facts)
    result = _publish(evaluation, job, bundle.spec, manifest=manifest, output=output)
    result["seconds"] = round(time.perf_counter() - started, 1)
    _require_few_errors(errors, split, settings=settings, result=result)
    return result


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What the workers found, and with what."""

    predictions: pa.Table  # PREDICTIONS_SCHEMA
    errors: pa.Table  # key, label, error_code, error_detail
    engine: CheckedEngine
    facts: dict[str, str]


def _publish(
    evaluation: Evaluation, job: EvaluateJob, spec: BundleSpec, *, manifest: Manifest, output: Store
) -> dict[str, Any]:
    """Write rows, report and metrics, and return the job's result."""
    predictions, facts, classes = evaluation.predictions, evaluation.facts, manifest.classes
    metrics = compute_metrics(predictions, classes=classes)
    mistakes = _mistakes(predictions, split=job.split, data=job.data, classes=classes)
    diagnosis = diagnose(
        read_run(spec.provenance, classes=classes),
        per_class=metrics.per_class,
        predictions=None if job.settings.split == "train" else predictions,
    )
    report = render_report(
        title=f"{spec.architecture} on {job.settings.split}",
        metrics=metrics,
        history=_history(spec),
        mistakes=mistakes,
        diagnosis=diagnosis,
        facts=facts,
    )
    document = {
        "facts": facts,
        **metrics.to_dict(),
        "errors": evaluation.errors.to_pylist(),
        "diagnosis": [finding.to_dict() for finding in diagnosis],
    }
    output.write(PREDICTIONS, encode_parquet(predictions))
    output.write(REPORT, report.encode())
    output.write(METRICS, encode_json(document))
    return _result(metrics, diagnosis, evaluation, output=output)


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


def _predict(job: EvaluateJob, spec: BundleSpec) -> tuple[pa.Table, pa.Table]:
    """The predictions and the errors of all rows, sorted by key.

    Raises ``CnnrayError`` when a row is missing.
    """
    split, settings = job.split, job.settings
    tables: list[pa.Table] = []
    done = 0
    with ProgressLine(
        total=split.num_samples,
        unit="images",
        label="evaluate",
        seconds=settings.cluster.progress_seconds,
    ) as progress:
        for table in map_units(
            _units(split),
            plan_stages(job, settings),
            stall_seconds=settings.cluster.stall_seconds,
            block_bytes=decoded_block_bytes(job.fit(spec), settings),
        ):
            tables.append(table)
            done += table.num_rows
            progress.update(done)
    rows = pa.concat_tables(tables).sort_by("key")
    distinct = len(rows["key"].unique())
    if not distinct == rows.num_rows == split.num_samples:
        raise CnnrayError(
            f"{rows.num_rows} rows of {distinct} keys were evaluated,"
            f" the split has {split.num_samples}"
        )
    predictions, errors = split_answers(rows)
    if not predictions.num_rows:
        raise DataError(
            f"none of the {rows.num_rows:,} images can be decoded: {_describe(errors)}",
            hint="pack the dataset again",
        )
    return predictions, errors


def _units(split: Split) -> list[pa.Table]:
    """Every row of a split once; a table has several units where there would be too many."""
    units = pa.Table.from_pylist(
        [
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
    )
    size = -(-units.num_rows // MAX_UNITS)
    return [units.slice(first, size) for first in range(0, units.num_rows, size)]


def _describe(errors: pa.Table) -> str:
    """How many errors there are of each code."""
    counts = sorted(Counter(errors["error_code"].to_pylist()).items())
    return ", ".join(f"{code} {number:,}" for code, number in counts)


def _engine_facts(engine: CheckedEngine) -> dict[str, str]:
    if engine.choice.is_reference:
        return {}
    return {"engine": f"{engine.choice}, {engine.agreement}"}


def _error_facts(errors: pa.Table, split: Split) -> dict[str, str]:
    if not errors.num_rows:
        return {}
    left_out = f"{errors.num_rows:,} of {split.num_samples:,} images, which cannot be decoded"
    return {"left out": f"{left_out}: {_describe(errors)}"}


def _require_few_errors(
    errors: pa.Table, split: Split, *, settings: EvaluateSettings, result: dict[str, Any]
) -> None:
    """Raise ``TooManyBadImagesError`` beyond the budget."""
    if not errors.num_rows:
        return
    said = (
        f"{errors.num_rows:,} of {split.num_samples:,} images cannot be decoded any more,"
        f" {errors['key'][0].as_py()!r} first ({_describe(errors)})"
    )
    if settings.budget.exceeded(bad=errors.num_rows, total=split.num_samples):
        raise TooManyBadImagesError(
            f"{said}: see errors in {result['metrics']}",
            hint="the rest is evaluated; raise --budget.max_fraction to accept it",
            result=result,
        )
    logger.warning("%s", printable(said))


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
    metrics: Metrics, diagnosis: Sequence[Finding], evaluation: Evaluation, *, output: Store
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
        "errors": evaluation.errors.num_rows,
        "engine": str(evaluation.engine.choice),
        "agreement": evaluation.engine.agreement and evaluation.engine.agreement.fraction,
        "diagnosis": [finding.to_dict() for finding in diagnosis],
        "metrics": f"{output.uri}/{METRICS}",
        "report": f"{output.uri}/{REPORT}",
        "predictions": f"{output.uri}/{PREDICTIONS}",
    }
