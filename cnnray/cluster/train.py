"""The train job: Ray Train runs the loop on every worker, Ray's tasks feed it.

The output folder is the bundle, with the run's checkpoints beside it under ``training/``. Workers
checkpoint there by themselves, so a restart (Ray Train's, or a new submission) goes on from the
last checkpoint that is whole, at its very step.
"""

from __future__ import annotations

import logging
import tempfile
import time
from typing import Any

import ray.train
import ray.train.torch
import torch
import torch.distributed

from cnnray import __version__
from cnnray.cluster.board import BoardReader, start_board
from cnnray.cluster.elastic import (
    ElasticTrainer,
    find_lack_of_workers,
    plan_failures,
    plan_scaling,
)
from cnnray.cluster.runtime import (
    WorkerResources,
    find_cause,
    last_line,
    node_resources,
    plan_workers,
    ray_cluster,
)
from cnnray.cluster.train_data import make_readers
from cnnray.cluster.train_display import TrainingDisplay
from cnnray.cluster.train_worker import TrainJob, plan_resizing, train_worker
from cnnray.config import TrainSettings
from cnnray.datasets.manifest import Manifest, get_split, read_manifest
from cnnray.datasets.order import NUM_LANES
from cnnray.errors import (
    CnnrayError,
    ConflictError,
    DataError,
    SettingsError,
    UsageError,
)
from cnnray.evaluation.doctor import diagnose, read_run
from cnnray.models.bundle import DOCUMENT_KEY, WEIGHTS_KEY, save_bundle
from cnnray.storage import Store, child, encode_json, open_store, read_json, sha256, split_uri
from cnnray.training.checkpoints import (
    delete_checkpoints,
    load_checkpoint,
    load_latest,
)
from cnnray.training.network import Network, plan_preprocessing
from cnnray.training.resizing import require_size

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
    "overwrite",
    "order_log",
}
"""Settings that may change between a run and its continuation."""


def train(settings: TrainSettings) -> dict[str, Any]:
    """Train, and write the bundle of the best epoch. Returns the job's result.

    Raises ``UsageError`` before anything is started for mistakes that can be known by then,
    ``ConflictError`` when the run exists with other settings, ``NonFiniteLossError``.
    """
    started = time.perf_counter()
    data, output = open_store(settings.data), open_store(settings.output)
    manifest = read_manifest(data)
    network = _plan_network(settings, manifest)
    _try_network(network, settings)
    run = child(output, f"training/{settings.run_name}")
    _claim_output(settings, output=output, run=run, manifest=manifest)
    with ray_cluster(settings.cluster):
        resources = plan_workers(settings.scaling)
        _warn_of_local_paths(settings)
        readers = make_readers(data, manifest, settings, network, num_workers=resources.num_workers)
        job = TrainJob(
            settings=settings,
            network=network,
            train=readers["train"],
            val=readers.get("val"),
            run=run,
            order_log=None if settings.order_log is None else open_store(settings.order_log),
            threads=resources.threads,
            board=start_board(),
        )
        logger.info(
            "training %s on %s images of %d classes, %d px, %s workers of %g CPUs and %d threads",
            network.name,
            f"{manifest.splits['train'].num_samples:,}",
            len(manifest.classes),
            network.preprocessing.size,
            settings.scaling.num_workers,
            resources.cpus,
            resources.threads,
        )
        _fit(job, resources)
    return _finish(job, manifest=manifest, output=output, seconds=time.perf_counter() - started)


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
        weights=_absolute(settings.model.weights),
        freeze_backbone=settings.model.freeze == "backbone",
        seed=settings.seed,
        dropout=settings.model.dropout,
        drop_path=settings.model.drop_path,
    )


def _try_network(network: Network, settings: TrainSettings) -> None:
    """Find a wrong name, size or weights file before anything is started."""
    classifier = network.build()
    if settings.image.progressive < 1:
        size = plan_resizing(settings, network, steps_per_epoch=1).size_in(0)
        require_size(classifier, channels=network.preprocessing.channels, size=size)


def _absolute(path: str | None) -> str | None:
    """The same file for a worker, whose working folder is another one."""
    if path is None:
        return None
    store, key = split_uri(path)
    return f"{store.uri}/{key}"


def _claim_output(
    settings: TrainSettings, *, output: Store, run: Store, manifest: Manifest
) -> None:
    """Make sure that what is at output is this run, or nothing."""
    if settings.overwrite:
        for key in (DOCUMENT_KEY, WEIGHTS_KEY):
            output.delete(key)
        delete_checkpoints(run)
        run.delete(SETTINGS_KEY)
    elif output.head(DOCUMENT_KEY) is not None:
        raise UsageError(
            f"{output.uri} holds a bundle already",
            hint="choose another --output, or --overwrite",
        )
    identity = settings.model_dump(mode="json", exclude=RESUMABLE)
    identity["dataset_sha256"] = sha256(manifest.to_bytes())
    if run.head(SETTINGS_KEY) is None:
        run.create(SETTINGS_KEY, encode_json(identity))
        return
    found = read_json(run, SETTINGS_KEY)
    changed = sorted(name for name in identity if found.get(name) != identity[name])
    if changed:
        raise ConflictError(
            f"run {settings.run_name} at {output.uri} was started with other settings:"
            f" {', '.join(changed)}",
            hint="choose another --run_name, or --overwrite to start anew",
        )


def _warn_of_local_paths(settings: TrainSettings) -> None:
    if len(node_resources()) > 1 and not settings.output.startswith("s3://"):
        logger.warning(
            "%s is a local path on a cluster: every node must see the same folder", settings.output
        )


def _fit(job: TrainJob, resources: WorkerResources) -> None:
    """Run the workers to the end; raises what stopped them."""
    with tempfile.TemporaryDirectory(prefix="cnnray-train-") as ray_state:
        trainer = ElasticTrainer(
            train_worker,
            resources=resources,
            wait_seconds=job.settings.cluster.stall_seconds,
            train_loop_config={"job": job},
            torch_config=ray.train.torch.TorchConfig(
                timeout_s=int(job.settings.cluster.stall_seconds)
            ),
            scaling_config=plan_scaling(job.settings.scaling, resources),
            run_config=ray.train.RunConfig(
                name="cnnray",
                storage_path=ray_state,  # checkpoints are ours; Ray keeps only its own notes here
                logging_config=ray.train.LoggingConfig(log_level="WARNING"),
                failure_config=plan_failures(
                    job.settings.scaling, max_restarts=job.settings.checkpoint.max_restarts
                ),
            ),
        )
        with (
            TrainingDisplay(job.settings.cluster.progress_seconds) as display,
            BoardReader(job.board, display.show),
        ):
            try:
                trainer.fit()
            except Exception as error:
                cause = find_cause(error) or find_lack_of_workers(error)
                raise cause or _worker_failure(error) from error
        failure = ray.get(job.board.get_failure.remote(), timeout=60)
        if failure is not None:
            raise failure


def _worker_failure(error: Exception) -> CnnrayError:
    logger.error("%s", error)  # Ray puts the worker's traceback in the text
    return CnnrayError(f"training failed: {last_line(error)}")


def _finish(job: TrainJob, *, manifest: Manifest, output: Store, seconds: float) -> dict[str, Any]:
    """Write the bundle of the best epoch and say what came out."""
    last = load_latest(job.run)
    if last is None or not last.history:
        raise CnnrayError(f"no checkpoint at {job.run.uri} after training")
    best = load_checkpoint(job.run, last.best_epoch)
    if best is None:
        raise CnnrayError(f"the best checkpoint, of epoch {last.best_epoch + 1}, is damaged")
    classifier = job.network.build(with_weights=False)
    classifier.load_state_dict(best.model)
    metrics = dict(last.history[last.best_epoch])
    provenance = _provenance(job, manifest, history=last.history)
    digest = save_bundle(
        output,
        classifier,
        job.network.describe(metrics=metrics, provenance=provenance),
    )
    speed = [result["samples_per_second"] for result in last.history]
    waits = [result["data_wait_fraction"] for result in last.history]
    return {
        "bundle": output.uri,
        "model": digest,
        "epochs": last.epochs_done,
        "best_epoch": last.best_epoch + 1,
        "steps": last.history[-1]["step"],
        "train_loss": metrics["train_loss"],
        "val_loss": metrics["val_loss"],
        "val_accuracy": metrics["val_accuracy"],
        "diagnosis": provenance["diagnosis"],
        "samples_per_second": round(sum(speed) / len(speed), 1),
        "data_wait_fraction": round(sum(waits) / len(waits), 4),
        "seconds": round(seconds, 1),
    }


def _provenance(
    job: TrainJob, manifest: Manifest, *, history: tuple[dict[str, Any], ...]
) -> dict[str, Any]:
    dataset = {
        "uri": job.settings.data,
        "sha256": sha256(manifest.to_bytes()),
        "class_counts": list(manifest.splits["train"].class_counts),
        "num_val": manifest.splits["val"].num_samples,
    }
    run = read_run({"dataset": dataset, "history": history}, classes=manifest.classes)
    findings = diagnose(run)
    for finding in findings:
        logger.warning("diagnosis: %s try: %s", finding.text, "; ".join(finding.advice))
    return {
        "settings": job.settings.model_dump(mode="json", exclude={"cluster"}),
        "dataset": dataset,
        "history": list(history),
        "diagnosis": [finding.to_dict() for finding in findings],
        "versions": {"cnnray": __version__, "torch": torch.__version__, "ray": ray.__version__},
    }
