"""The train job: Ray Train runs the loop on every worker, Ray Data feeds it.

The output folder is the bundle, with the run's checkpoints beside it under ``training/``. Workers
checkpoint there by themselves, so a restart (Ray Train's, or a new submission) goes on from the
last epoch that is whole.
"""

from __future__ import annotations

import dataclasses
import logging
import tempfile
import time
from collections.abc import Callable, Mapping
from typing import Any

import ray.train
import ray.train.torch
import torch
import torch.distributed

from cnnray import __version__
from cnnray.cluster.board import BoardHandler, BoardReader, start_board
from cnnray.cluster.ingest import (
    UNIT_BYTES,
    UNIT_ROWS,
    KeptBatches,
    SplitReader,
    set_up_data_context,
)
from cnnray.cluster.runtime import WorkerResources, find_cause, last_line, plan_workers, ray_cluster
from cnnray.config import TrainSettings
from cnnray.console import ProgressLine, format_seconds
from cnnray.datasets.manifest import Manifest, get_split, read_manifest
from cnnray.datasets.order import EpochOrder, assemble, lanes_of, plan_epoch
from cnnray.errors import (
    CnnrayError,
    ConflictError,
    DataError,
    NonFiniteLossError,
    SettingsError,
    StorageError,
    UsageError,
)
from cnnray.images.augment import Augmentation, TrainTransform
from cnnray.images.decode import DecodeLimits
from cnnray.models.bundle import DOCUMENT_KEY, WEIGHTS_KEY, save_bundle
from cnnray.storage import Store, child, encode_json, open_store, read_json, sha256, split_uri
from cnnray.training.checkpoints import (
    Checkpoint,
    delete_checkpoints,
    load_checkpoint,
    load_latest,
    model_tensors,
    save_checkpoint,
)
from cnnray.training.loop import EpochData, Trainer, run_epochs
from cnnray.training.losses import LOSSES
from cnnray.training.network import Network, plan_preprocessing
from cnnray.training.optimizers import build_optimizer, learning_rate_factor
from cnnray.training.order_log import log_order
from cnnray.training.progress import Progress

logger = logging.getLogger(__name__)

SETTINGS_KEY = "settings.json"

RESUMABLE = {
    "data",  # known by its digest
    "output",  # where the run is found
    "epochs",
    "cluster",
    "scaling",
    "checkpoint",
    "overwrite",
    "order_log",
}
"""Settings that may change between a run and its continuation."""


@dataclasses.dataclass(frozen=True)
class TrainJob:
    """Everything a worker needs; it travels to each of them."""

    settings: TrainSettings
    network: Network
    train: SplitReader
    val: SplitReader | None
    run: Store
    order_log: Store | None
    threads: int
    board: Any


def train(settings: TrainSettings) -> dict[str, Any]:
    """Train, and write the bundle of the best epoch. Returns the job's result.

    Raises ``UsageError`` before anything is started for mistakes that can be known by then,
    ``ConflictError`` when the run exists with other settings, ``NonFiniteLossError``.
    """
    started = time.perf_counter()
    data, output = open_store(settings.data), open_store(settings.output)
    manifest = read_manifest(data)
    network = _plan_network(settings, manifest)
    network.build()  # finds a wrong name, size or weights file before anything is started
    run = child(output, f"training/{settings.run_name}")
    _claim_output(settings, output=output, run=run, manifest=manifest)
    with ray_cluster(settings.cluster):
        resources = plan_workers(settings.scaling)
        _warn_of_local_paths(settings)
        job = TrainJob(
            settings=settings,
            network=network,
            train=_reader(data, manifest, "train", settings, network),
            val=_val_reader(data, manifest, settings, network),
            run=run,
            order_log=None if settings.order_log is None else open_store(settings.order_log),
            threads=resources.threads,
            board=start_board(),
        )
        logger.info(
            "training %s on %s images of %d classes, %d px, %d workers of %g CPUs and %d threads",
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
    if smallest < settings.scaling.num_workers:
        raise SettingsError(
            f"{settings.scaling.num_workers} workers share batches of {smallest} images",
            hint="lower --scaling.num_workers or raise --global_batch_size",
        )
    preprocessing = plan_preprocessing(
        settings.model.name,
        manifest.statistics,
        pretrained=settings.model.weights is not None,
        **settings.image.model_dump(),
    )
    return Network(
        name=settings.model.name,
        classes=manifest.classes,
        preprocessing=preprocessing,
        weights=_absolute(settings.model.weights),
        freeze_backbone=settings.model.freeze == "backbone",
        seed=settings.seed,
    )


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
    if len(ray.nodes()) > 1 and not settings.output.startswith("s3://"):
        logger.warning(
            "%s is a local path on a cluster: every node must see the same folder", settings.output
        )


def _reader(
    data: Store, manifest: Manifest, split: str, settings: TrainSettings, network: Network
) -> SplitReader:
    preprocessing = network.preprocessing
    # With augmentation off, the training transform is the evaluation transform, pixel for pixel.
    augmentation = (
        Augmentation(**settings.augment.model_dump()) if split == "train" else Augmentation()
    )
    image_bytes = preprocessing.channels * preprocessing.size**2
    return SplitReader(
        store=data,
        split=get_split(manifest, split, uri=settings.data),
        decode=TrainTransform(
            preprocessing,
            augmentation,
            seed=settings.seed,
            limits=DecodeLimits(**settings.limits.model_dump()),
        ),
        unit_rows=max(1, min(UNIT_ROWS, UNIT_BYTES // image_bytes)),
        seed=settings.seed,
    )


def _val_reader(
    data: Store, manifest: Manifest, settings: TrainSettings, network: Network
) -> SplitReader | None:
    if manifest.splits["val"].num_samples == 0:
        logger.warning("no validation split: the best epoch is chosen by its training loss")
        return None
    return _reader(data, manifest, "val", settings, network)


def _fit(job: TrainJob, resources: WorkerResources) -> None:
    """Run the workers to the end; raises what stopped them."""
    scaling = job.settings.scaling
    reservation = {"CPU": resources.cpus} | ({"GPU": resources.gpus} if resources.gpus else {})
    with tempfile.TemporaryDirectory(prefix="cnnray-train-") as ray_state:
        trainer = ray.train.torch.TorchTrainer(
            _train_worker,
            train_loop_config={"job": job},
            torch_config=ray.train.torch.TorchConfig(
                timeout_s=int(job.settings.cluster.stall_seconds)
            ),
            scaling_config=ray.train.ScalingConfig(
                num_workers=scaling.num_workers,
                use_gpu=scaling.use_gpu,
                resources_per_worker=reservation,
            ),
            run_config=ray.train.RunConfig(
                name="cnnray",
                storage_path=ray_state,  # checkpoints are ours; Ray keeps only its own notes here
                logging_config=ray.train.LoggingConfig(log_level="WARNING"),
                failure_config=ray.train.FailureConfig(
                    max_failures=job.settings.checkpoint.max_restarts, controller_failure_limit=3
                ),
            ),
        )
        with (
            _TrainingDisplay(job.settings.cluster.progress_seconds) as display,
            BoardReader(job.board, display.show),
        ):
            try:
                trainer.fit()
            except Exception as error:
                raise find_cause(error) or _worker_failure(error) from error
        failure = ray.get(job.board.get_failure.remote(), timeout=60)
        if failure is not None:
            raise failure


def _worker_failure(error: Exception) -> CnnrayError:
    logger.error("%s", error)  # Ray puts the worker's traceback in the text
    return CnnrayError(f"training failed: {last_line(error)}")


def _train_worker(config: Mapping[str, Any]) -> None:
    """One rank of Ray Train."""
    job: TrainJob = config["job"]
    settings = job.settings
    context = ray.train.get_context()
    rank, num_workers = context.get_world_rank(), context.get_world_size()
    set_up_data_context(stall_seconds=settings.cluster.stall_seconds, preserve_order=True)
    torch.set_num_threads(job.threads)
    if rank == 0:
        logging.getLogger("cnnray").addHandler(BoardHandler(job.board))
    if ray.get(job.board.get_failure.remote(), timeout=60) is not None:
        return  # restarted, but for a reason that a restart does not cure
    checkpoint = load_latest(job.run)
    trainer = _build_trainer(job, checkpoint)
    history = list(checkpoint.history) if checkpoint else []
    try:
        for result in run_epochs(
            trainer,
            first_epoch=len(history),
            epochs=settings.epochs,
            data=_epoch_feeder(job, len(history), rank=rank, num_workers=num_workers),
            seed=settings.seed,
            rank=rank,
            num_workers=num_workers,
            reduce=_all_reduce if num_workers > 1 else lambda tensor: tensor,
            report_seconds=settings.cluster.progress_seconds,
            on_progress=lambda progress: job.board.post.remote(progress) if rank == 0 else None,
        ):
            history.append(result.to_dict())
            if rank == 0:
                save_checkpoint(job.run, _snapshot(trainer, history), keep=settings.checkpoint.keep)
                job.board.post.remote(result)
            ray.train.report(_numbers(history[-1]))  # every rank waits here for the checkpoint
    except Exception as error:
        cause = find_cause(error)
        if cause is None or isinstance(cause, StorageError):
            raise  # a lost worker, a store that is out of reach: a restart may help
        ray.get(job.board.fail.remote(cause), timeout=60)
        if not isinstance(cause, NonFiniteLossError):
            raise  # on this rank alone: ends the others, too


def _build_trainer(job: TrainJob, checkpoint: Checkpoint | None) -> Trainer:
    settings = job.settings
    device = ray.train.torch.get_device()
    classifier = job.network.build(with_weights=checkpoint is None)
    if checkpoint is not None:
        classifier.load_state_dict(checkpoint.model)
    classifier = classifier.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    model = ray.train.torch.prepare_model(classifier)
    optimizer = build_optimizer(model, **settings.optimizer.model_dump())
    if checkpoint is not None:
        optimizer.load_state_dict(checkpoint.optimizer)
    order = _order(job, epoch=0)

    def learning_rate(step: int) -> float:
        factor = learning_rate_factor(
            step,
            name=settings.schedule.name,
            total_steps=order.num_steps * settings.epochs,
            warmup_steps=round(order.num_steps * settings.schedule.warmup_epochs),
            min_fraction=settings.schedule.min_fraction,
        )
        return settings.optimizer.lr * factor

    return Trainer(
        model=model,
        optimizer=optimizer,
        loss=LOSSES[settings.loss.name],
        learning_rate=learning_rate,
        device=device,
        step=checkpoint.step if checkpoint else 0,
    )


def _order(job: TrainJob, *, epoch: int) -> EpochOrder:
    return plan_epoch(
        job.train.row_groups,
        seed=job.settings.seed,
        epoch=epoch,
        global_batch_size=job.settings.global_batch_size,
        max_unit_rows=job.train.unit_rows,
    )


def _epoch_feeder(
    job: TrainJob, first_epoch: int, *, rank: int, num_workers: int
) -> Callable[[int], EpochData]:
    """This rank's data of each epoch, asked for in turn, out of one stream that reads ahead."""
    lanes = lanes_of(rank, num_workers=num_workers)
    blocks = job.train.stream_epochs(
        range(first_epoch, job.settings.epochs),
        lambda epoch: _order(job, epoch=epoch).units_of(lanes),
    )
    val = job.val
    validation = () if val is None else KeptBatches(lambda: val.share(rank, num_workers))

    def feed(epoch: int) -> EpochData:
        order = _order(job, epoch=epoch)
        batches = assemble(order, blocks, lanes=lanes)
        if job.order_log is not None:
            batches = log_order(
                batches, store=job.order_log, epoch=epoch, rank=rank, num_workers=num_workers
            )
        return EpochData(
            batches=batches,
            global_batch_sizes=order.batch_sizes,
            validation=validation,
        )

    return feed


def _all_reduce(tensor: torch.Tensor) -> torch.Tensor:
    torch.distributed.all_reduce(tensor)
    return tensor


def _snapshot(trainer: Trainer, history: list[dict[str, Any]]) -> Checkpoint:
    classifier = getattr(trainer.model, "module", trainer.model)
    return Checkpoint(
        model=model_tensors(classifier),
        optimizer=trainer.optimizer.state_dict(),
        step=trainer.step,
        history=tuple(history),
    )


def _numbers(result: Mapping[str, Any]) -> dict[str, float]:
    return {name: value for name, value in result.items() if value is not None}


class _TrainingDisplay(ProgressLine):
    """Prints the messages of the workers."""

    def __init__(self, seconds: float) -> None:
        super().__init__(total=0, unit="step", label="train", seconds=seconds)

    def show(self, message: Any) -> None:
        """A ``Progress``, an ``EpochResult`` or the text of a worker's warning."""
        if isinstance(message, str):
            logger.warning("%s", message)
        elif isinstance(message, Progress):
            self._show_progress(message)
        else:
            logger.info("%s", _epoch_line(message))

    def _show_progress(self, progress: Progress) -> None:
        note = (
            f"loss {progress.loss:.4f}, accuracy {progress.accuracy:.4f},"
            f" {progress.samples_per_second:,.0f} img/s,"
            f" waiting {progress.data_wait_fraction:.0%}"
        )
        if self.bar is not None:
            self.bar.total = progress.epochs * progress.steps
            self.update(progress.epoch * progress.steps + progress.step, note)
            return
        logger.info(
            "epoch %d/%d step %d/%d: %s, %s left",
            progress.epoch + 1,
            progress.epochs,
            progress.step,
            progress.steps,
            note,
            format_seconds(progress.eta_seconds),
        )


def _epoch_line(result: Any) -> str:
    validation = ""
    if result.val_loss is not None:
        validation = f", val loss {result.val_loss:.4f}, val accuracy {result.val_accuracy:.4f}"
    return (
        f"epoch {result.epoch + 1} done: train loss {result.train_loss:.4f},"
        f" train accuracy {result.train_accuracy:.4f}{validation}"
        f" ({format_seconds(result.seconds)})"
    )


def _finish(job: TrainJob, *, manifest: Manifest, output: Store, seconds: float) -> dict[str, Any]:
    """Write the bundle of the best epoch and say what came out."""
    last = load_latest(job.run)
    if last is None:
        raise CnnrayError(f"no checkpoint at {job.run.uri} after training")
    best = load_checkpoint(job.run, last.best_epoch)
    if best is None:
        raise CnnrayError(f"the best checkpoint, of epoch {last.best_epoch + 1}, is damaged")
    classifier = job.network.build(with_weights=False)
    classifier.load_state_dict(best.model)
    metrics = dict(last.history[last.best_epoch])
    digest = save_bundle(
        output,
        classifier,
        job.network.describe(
            metrics=metrics, provenance=_provenance(job, manifest, history=last.history)
        ),
    )
    speed = [result["samples_per_second"] for result in last.history]
    waits = [result["data_wait_fraction"] for result in last.history]
    return {
        "bundle": output.uri,
        "model": digest,
        "epochs": last.epochs_done,
        "best_epoch": last.best_epoch + 1,
        "steps": last.step,
        "train_loss": metrics["train_loss"],
        "val_loss": metrics["val_loss"],
        "val_accuracy": metrics["val_accuracy"],
        "samples_per_second": round(sum(speed) / len(speed), 1),
        "data_wait_fraction": round(sum(waits) / len(waits), 4),
        "seconds": round(seconds, 1),
    }


def _provenance(
    job: TrainJob, manifest: Manifest, *, history: tuple[dict[str, Any], ...]
) -> dict[str, Any]:
    return {
        "settings": job.settings.model_dump(mode="json", exclude={"cluster"}),
        "dataset": {"uri": job.settings.data, "sha256": sha256(manifest.to_bytes())},
        "history": list(history),
        "versions": {"cnnray": __version__, "torch": torch.__version__, "ray": ray.__version__},
    }
