"""What a training run is, before anything is started: its data, its network, its place.

Whatever is wrong with the settings should be said here, in one line, at once.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

from cnnray.cluster.train.build import make_optimizer, plan_resizing
from cnnray.cluster.train.data import make_transforms
from cnnray.config import TrainSettings, absolute_path
from cnnray.datasets.manifest import Manifest, get_split, read_manifest
from cnnray.datasets.order import NUM_LANES
from cnnray.errors import ConflictError, DataError, SettingsError, UsageError
from cnnray.models.bundle import DOCUMENT_KEY, delete_bundle
from cnnray.storage import Store, child, encode_json, open_store, read_json, sha256
from cnnray.training.checkpoints import delete_checkpoints
from cnnray.training.compute import require_computable
from cnnray.training.distillation import TeacherBundle, find_teacher
from cnnray.training.network import Network, plan_preprocessing
from cnnray.training.resizing import require_size
from cnnray.training.tracking import TRACKING_KEY, check_tracking

logger = logging.getLogger(__name__)

SETTINGS_KEY = "settings.json"

RESUMABLE = {
    "data",  # known by its digest
    "output",  # where the run is found
    "epochs",
    "early_stopping",
    "cluster",
    "ingest",
    "scaling",
    "checkpoint",
    "tracking",
    "overwrite",
    "order_log",
    "decode_seconds",
}
"""Settings that may change between a run and its continuation."""


@dataclass(frozen=True)
class TrainPlan:
    """What a run trains on, what it trains, and where its bundle and its checkpoints go."""

    data: Store
    manifest: Manifest
    network: Network
    teacher: TeacherBundle | None
    output: Store
    run: Store


def plan_training(settings: TrainSettings) -> TrainPlan:
    """Settle all that, and claim the output: with ``overwrite`` what is there is removed.

    Raises ``UsageError`` for mistakes that can be known now, ``ConflictError`` when the run exists
    with other settings.
    """
    require_computable(
        **settings.compute.model_dump(),
        num_workers=settings.scaling.max_workers,
        use_gpu=settings.scaling.use_gpu,
        accumulate_steps=settings.accumulate_steps,
        has_average=settings.ema.decay > 0,
        optimizer=settings.optimizer.name,
    )
    check_tracking(**settings.tracking.model_dump())
    data = open_store(settings.data)
    manifest = read_manifest(data)
    network = _plan_network(settings, manifest)
    _try_network(network, settings)
    teacher = _find_teacher(settings, network)
    plan = TrainPlan(
        data,
        manifest,
        network,
        teacher,
        output=open_store(settings.output),
        run=run_folder(settings),
    )
    _claim_output(settings, plan)
    return plan


def run_folder(settings: TrainSettings) -> Store:
    """Where a run keeps its checkpoints."""
    return child(open_store(settings.output), f"training/{settings.run_name}")


def _plan_network(settings: TrainSettings, manifest: Manifest) -> Network:
    train_split = get_split(manifest, "train", uri=settings.data)
    if len(manifest.classes) < 2:
        raise DataError(f"{settings.data} has one class: nothing to tell apart")
    empty = [
        name for name, n in zip(manifest.classes, train_split.class_counts, strict=True) if not n
    ]
    if empty:
        logger.warning("%d classes have no training image: %s", len(empty), ", ".join(empty[:5]))
    smallest = min(settings.global_batch_size, train_split.num_samples)
    most = settings.scaling.max_workers
    if smallest < most:
        raise SettingsError(
            f"{most} workers share batches of {smallest} images",
            hint="lower --scaling.num_workers or raise --global_batch_size",
        )
    if most > NUM_LANES:
        raise SettingsError(
            f"{most} workers share the {NUM_LANES} lanes of the order",
            hint='lower --scaling.num_workers (in YAML, MIN:MAX needs quotes: "MIN:MAX")',
        )
    preprocessing = plan_preprocessing(
        settings.model.name,
        manifest.statistics,
        pretrained=settings.model.weights is not None,
        **settings.image.model_dump(exclude={"progressive"}),
    )
    return Network(
        name=settings.model.name,
        classes=manifest.classes,
        preprocessing=preprocessing,
        weights=absolute_path(settings.model.weights),  # workers have other working folders
        freeze_backbone=settings.model.freeze == "backbone",
        seed=settings.seed,
        dropout=settings.model.dropout,
        drop_path=settings.model.drop_path,
    )


def _try_network(network: Network, settings: TrainSettings) -> None:
    """Find a wrong name, size, pad, weights file or optimizer before anything is started."""
    make_transforms(settings, network)
    classifier = network.build()
    make_optimizer(settings, classifier)
    if settings.image.progressive < 1:
        size = plan_resizing(settings, network, steps_per_epoch=1).size_in(0)
        require_size(classifier, channels=network.preprocessing.channels, size=size)


def _find_teacher(settings: TrainSettings, network: Network) -> TeacherBundle | None:
    if settings.distill.teacher is None:
        return None
    return find_teacher(settings.distill.teacher, classes=network.classes)


def _claim_output(settings: TrainSettings, plan: TrainPlan) -> None:
    """Make sure that what is at output is this run, or nothing."""
    output, run, teacher = plan.output, plan.run, plan.teacher
    if teacher is not None and teacher.store.uri == output.uri:
        raise SettingsError(
            f"the teacher is at --output: {output.uri}", hint="choose another --output"
        )
    if settings.overwrite:
        delete_bundle(output)
        delete_checkpoints(run)
        run.delete(SETTINGS_KEY)
        run.delete(TRACKING_KEY)
    elif output.head(DOCUMENT_KEY) is not None:
        raise UsageError(
            f"{output.uri} holds a bundle already",
            hint="choose another --output, or --overwrite",
        )
    identity = _identity(settings)
    identity["dataset_sha256"] = sha256(plan.manifest.to_bytes())
    if teacher is not None:
        identity["distill"]["teacher"] = teacher.digest  # which one it is, not where
    claim_settings(
        run,
        SETTINGS_KEY,
        identity,
        defaults=_identity(TrainSettings(data=settings.data, output=settings.output)),
        what=f"run {settings.run_name} at {output.uri}",
        hint="choose another --run_name, or --overwrite to start anew",
    )


def claim_settings(
    store: Store,
    key: str,
    identity: dict[str, Any],
    *,
    defaults: dict[str, Any],
    what: str,
    hint: str,
) -> None:
    """Write down what something is begun with. Raises ``ConflictError`` where that is different.

    ``defaults`` are of settings that there may not have been yet when it was written.
    """
    if store.head(key) is None:
        store.create(key, encode_json(identity))
        return
    found = _with_defaults(read_json(store, key), defaults)
    changed = sorted(name for name in identity if found.get(name) != identity[name])
    if changed:
        raise ConflictError(
            f"{what} was started with other settings: {', '.join(changed)}", hint=hint
        )


def _identity(settings: TrainSettings) -> dict[str, Any]:
    """What must stay between a run and its continuation."""
    return settings.model_dump(
        mode="json", exclude=dict.fromkeys(RESUMABLE, True) | {"compute": {"strategy"}}
    )


def _with_defaults(found: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    """``found``, and the defaults of settings that there were not yet when it was written."""
    sections = {
        name: _with_defaults(found.get(name, {}), default)
        for name, default in defaults.items()
        if isinstance(default, dict)
    }
    return defaults | found | sections
