"""The train job: Ray Train runs the loop on every worker, Ray Data feeds it.

The output folder is the bundle, with the run's checkpoints beside it under ``training/``. Workers
checkpoint there by themselves, so a restart (Ray Train's, or a new submission) goes on from the
last checkpoint that is whole, at its very step.
"""

from __future__ import annotations

import logging
import os
import tempfile
import time
from typing import Any

import ray.train
import ray.train.torch
import torch
import torch.distributed

from cnnray import __version__
from cnnray.cluster.core.failures import find_cause, last_line
from cnnray.cluster.core.growth import fit
from cnnray.cluster.core.messages import MailboxReader, start_mailbox
from cnnray.cluster.core.nodes import read_nodes
from cnnray.cluster.core.resources import WorkerPlan, plan_workers, worker_bundles
from cnnray.cluster.core.session import ray_cluster
from cnnray.cluster.train.build import TrainJob
from cnnray.cluster.train.data import make_feeds
from cnnray.cluster.train.display import OnEpoch, TrainingDisplay
from cnnray.cluster.train.elastic.policy import (
    ElasticRules,
    find_lack_of_workers,
    plan_failures,
    plan_scaling,
)
from cnnray.cluster.train.plan import TrainPlan, plan_training
from cnnray.cluster.train.worker import train_worker
from cnnray.config import TrainSettings
from cnnray.datasets.manifest import Manifest
from cnnray.errors import (
    CnnrayError,
)
from cnnray.evaluation.doctor import diagnose, read_run
from cnnray.models.bundle import save_bundle
from cnnray.storage import Store, open_store, sha256
from cnnray.training.checkpoints import (
    load_checkpoint,
    load_latest,
)
from cnnray.training.loop import EpochResult
from cnnray.training.tracking import Tracking, open_tracking

logger = logging.getLogger(__name__)

POLL_SECONDS = "0.25"
"""Ray Train fetches a worker's reports one by one, by default one in 2 s: shorter epochs than that
would wait, 200 of 0.2 s each for six minutes."""


def train(settings: TrainSettings, *, on_epoch: OnEpoch = lambda result: None) -> dict[str, Any]:
    """Train, and write the bundle of the best epoch. Returns the job's result.

    ``on_epoch`` is called on a thread of its own.

    Raises ``UsageError`` before anything is started for mistakes that can be known by then,
    ``ConflictError`` when the run exists with other settings, ``NonFiniteLossError``.
    """
    started = time.perf_counter()
    plan = plan_training(settings)
    with ray_cluster(settings.cluster):
        workers = _fit_workers(settings)
        _warn_of_local_paths(settings)
        feeds = make_feeds(
            plan.data, plan.manifest, settings, plan.network, num_workers=workers.num_workers
        )
        job = TrainJob(
            settings=settings,
            network=plan.network,
            train=feeds["train"],
            val=feeds.get("val"),
            run=plan.run,
            order_log=None if settings.order_log is None else open_store(settings.order_log),
            threads=workers.threads,
            mailbox=start_mailbox(),
            teacher=plan.teacher,
        )
        logger.info(
            "training %s on %s images of %d classes, %d px, %s workers of %g CPUs and %d threads",
            plan.network.name,
            f"{plan.manifest.splits['train'].num_samples:,}",
            len(plan.manifest.classes),
            plan.network.preprocessing.size,
            settings.scaling.num_workers,
            workers.cpus,
            workers.threads,
        )
        with _open_tracking(job, plan.output) as tracking:
            _fit(job, workers, on_epoch=_in_turn(tracking.epoch, on_epoch))
            return _finish(job, plan, tracking, started=started)


def _fit_workers(settings: TrainSettings) -> WorkerPlan:
    """The workers, once the cluster holds the least number of them."""
    bundles = worker_bundles(settings.scaling)
    return fit(
        lambda capacity: plan_workers(settings.scaling, capacity),
        need=bundles[0],
        bundles=lambda _: bundles,
        cluster=settings.cluster,
    )


def _warn_of_local_paths(settings: TrainSettings) -> None:
    if len(read_nodes()) > 1 and not settings.output.startswith("s3://"):
        logger.warning(
            "%s is a local path on a cluster: every node must see the same folder", settings.output
        )


def _open_tracking(job: TrainJob, output: Store) -> Tracking:
    settings = job.settings
    return open_tracking(
        job.run,
        name=f"{output.uri.rsplit('/', 1)[-1]}-{settings.run_name}",
        parameters=settings.model_dump(mode="json", exclude={"cluster", "tracking"}),
        **settings.tracking.model_dump(),
    )


def _in_turn(*listeners: OnEpoch) -> OnEpoch:
    """One listener that tells several."""

    def tell(result: EpochResult) -> None:
        for listener in listeners:
            listener(result)

    return tell


def _fit(job: TrainJob, workers: WorkerPlan, *, on_epoch: OnEpoch) -> None:
    """Run the workers to the end; raises what stopped them."""
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", POLL_SECONDS)
    with tempfile.TemporaryDirectory(prefix="cnnray-train-") as ray_state:
        trainer = _make_trainer(
            job,
            workers,
            train_loop_config={"job": job},
            torch_config=ray.train.torch.TorchConfig(
                timeout_s=int(job.settings.cluster.stall_seconds)
            ),
            scaling_config=plan_scaling(job.settings.scaling, workers),
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
            TrainingDisplay(job.settings.cluster.progress_seconds, on_epoch) as display,
            MailboxReader(job.mailbox, display.show),
        ):
            try:
                trainer.fit()
            except Exception as error:
                cause = find_cause(error) or find_lack_of_workers(error)
                raise cause or _worker_failure(error) from error
        failure = ray.get(job.mailbox.get_failure.remote(), timeout=60)
        if failure is not None:
            raise failure


def _make_trainer(
    job: TrainJob, workers: WorkerPlan, **options: Any
) -> ray.train.torch.TorchTrainer:
    scaling = job.settings.scaling
    if not scaling.is_elastic:
        return ray.train.torch.TorchTrainer(train_worker, **options)
    from cnnray.cluster.train.elastic.ray_internals import ElasticTrainer

    rules = ElasticRules(scaling, workers, wait_seconds=job.settings.cluster.stall_seconds)
    return ElasticTrainer(train_worker, rules=rules, **options)


def _worker_failure(error: Exception) -> CnnrayError:
    logger.error("%s", error)  # Ray puts the worker's traceback in the text
    return CnnrayError(f"training failed: {last_line(error)}")


def _finish(
    job: TrainJob, plan: TrainPlan, tracking: Tracking, *, started: float
) -> dict[str, Any]:
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
    provenance = _provenance(job, plan.manifest, history=last.history)
    digest = save_bundle(
        plan.output,
        classifier,
        job.network.describe(metrics=metrics, provenance=provenance),
    )
    speed = [result["samples_per_second"] for result in last.history]
    waits = [result["data_wait_fraction"] for result in last.history]
    result = {
        "bundle": plan.output.uri,
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
        "seconds": round(time.perf_counter() - started, 1),
    }
    tracking.finish(result, history=last.history)
    return result


def _provenance(
    job: TrainJob, manifest: Manifest, *, history: tuple[dict[str, Any], ...]
) -> dict[str, Any]:
    dataset = {
        "uri": job.settings.data,
        "sha256": sha256(manifest.to_bytes()),
        "class_counts": list(manifest.splits["train"].class_counts),
        "num_val": manifest.splits["val"].num_samples,
    }
    provenance: dict[str, Any] = {
        "settings": job.settings.model_dump(mode="json", exclude={"cluster"}),
        "dataset": dataset,
        "teacher": None if job.teacher is None else job.teacher.describe(),
        "history": list(history),
    }
    findings = diagnose(read_run(provenance, classes=manifest.classes))
    for finding in findings:
        logger.warning("diagnosis: %s try: %s", finding.text, "; ".join(finding.advice))
    return {
        **provenance,
        "diagnosis": [finding.to_dict() for finding in findings],
        "versions": {"cnnray": __version__, "torch": torch.__version__, "ray": ray.__version__},
    }
