"""One rank of a training run, inside a Ray Train worker."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import ray.train
import ray.train.torch
import torch
import torch.distributed

from cnnray.cluster.core.failures import find_cause
from cnnray.cluster.core.messages import MailboxHandler
from cnnray.cluster.train.build import TrainJob, build_trainer, plan_order
from cnnray.cluster.train.elastic.preemption import PREEMPTION
from cnnray.config import TrainSettings
from cnnray.datasets.order import Unit, assemble, lanes_of
from cnnray.datasets.sampling import spread_copies
from cnnray.errors import CnnrayError, NonFiniteLossError, StorageError
from cnnray.process import keep_freed_memory
from cnnray.training.checkpoints import (
    Checkpoint,
    CheckpointWriter,
    load_at,
    load_latest,
    model_tensors,
)
from cnnray.training.finite import Reduce
from cnnray.training.loop import (
    Cadence,
    EpochData,
    EpochResult,
    Trainer,
    run_epochs,
)
from cnnray.training.order_log import OrderLog, remove_order
from cnnray.training.places import Interval, Place
from cnnray.training.prefetch import prefetch
from cnnray.training.progress import Beginning
from cnnray.training.sharding import is_sharded, whole
from cnnray.training.stopping import has_stalled


def train_worker(config: Mapping[str, Any]) -> None:
    """One rank of Ray Train."""
    job: TrainJob = config["job"]
    context = ray.train.get_context()
    rank, num_workers = context.get_world_rank(), context.get_world_size()
    keep_freed_memory()
    torch.set_num_threads(job.threads)
    if rank == 0:
        logging.getLogger("cnnray").addHandler(MailboxHandler(job.mailbox))
    if job.settings.scaling.is_elastic:
        from cnnray.cluster.train.elastic.ray_internals import find_preempted_nodes

        PREEMPTION.watch(find_preempted_nodes)
    if ray.get(job.mailbox.get_failure.remote(), timeout=60) is not None:
        return  # restarted, but for a reason that a restart does not cure
    try:
        _train(job, rank=rank, num_workers=num_workers)
    except Exception as error:
        cause = find_cause(error)
        if cause is None or isinstance(cause, StorageError):
            raise  # a lost worker, a store that is out of reach: a restart may help
        ray.get(job.mailbox.fail.remote(cause), timeout=60)
        if not isinstance(cause, NonFiniteLossError):
            raise  # on this rank alone: ends the others, too


def _train(job: TrainJob, *, rank: int, num_workers: int) -> None:
    """Train to the end from the last checkpoint, writing new ones."""
    settings = job.settings
    reduce = _all_reduce if num_workers > 1 else lambda tensor: tensor
    checkpoint = _load_together(job, rank=rank, reduce=reduce)
    history = list(checkpoint.history) if checkpoint else []
    if _is_over(settings, history):
        return
    trainer = build_trainer(job, checkpoint)
    begin = checkpoint.place if checkpoint and checkpoint.place else Place(len(history))
    log = None if job.order_log is None else OrderLog(job.order_log, rank=rank)
    if rank == 0:
        _begin(job, begin, num_workers=num_workers)
    clock = Interval(60 * settings.checkpoint.every_minutes)
    with (
        CheckpointWriter(
            job.run, keep=settings.checkpoint.keep, seconds=settings.cluster.stall_seconds
        ) as writer,
        _epoch_feeder(job, begin, log, rank=rank, num_workers=num_workers) as feed,
    ):
        for reached in run_epochs(
            trainer,
            first_epoch=begin.epoch,
            epochs=settings.epochs,
            place=begin,
            data=feed,
            seed=settings.seed,
            cadence=_cadence(settings, clock, rank=rank),
            rank=rank,
            num_workers=num_workers,
            reduce=reduce,
            report_seconds=settings.cluster.progress_seconds,
            on_progress=lambda progress: job.mailbox.post.remote(progress) if rank == 0 else None,
        ):
            place = reached if isinstance(reached, Place) else None
            if isinstance(reached, EpochResult):
                history.append(reached.to_dict())
            elif log is not None:
                log.flush()
                reduce(torch.zeros(1, device=trainer.device)).item()  # until all ranks have
            _save(trainer, history, place, writer=writer, rank=rank)
            clock.restart()
            if isinstance(reached, EpochResult):
                if rank == 0:
                    job.mailbox.post.remote(reached)
                ray.train.report(_numbers(history[-1]))
                if _is_over(settings, history):
                    break


def _begin(job: TrainJob, begin: Place, *, num_workers: int) -> None:
    """Say where this group of workers begins, and let the order log end there."""
    job.mailbox.post.remote(Beginning(num_workers, begin.epoch, begin.step))
    if job.order_log is not None:
        remove_order(job.order_log, begin=begin)


def _cadence(settings: TrainSettings, clock: Interval, *, rank: int) -> Cadence:
    """When to write a checkpoint inside an epoch; the clock and the requests of rank 0 count."""
    every_steps = settings.checkpoint.every_steps
    if rank > 0:
        return Cadence(every_steps)
    return Cadence(every_steps, lambda: clock.is_over() or PREEMPTION.checkpoint_requested())


def _load_together(job: TrainJob, *, rank: int, reduce: Reduce) -> Checkpoint | None:
    """The checkpoint that rank 0 finds, on all ranks: each for itself might find another one.

    Raises ``CnnrayError`` on a rank that cannot read it.
    """
    checkpoint = load_latest(job.run) if rank == 0 else None
    position = checkpoint.position if checkpoint else (0, 0)
    shared = torch.tensor(position, dtype=torch.int64, device=ray.train.torch.get_device())
    epochs_done, step = reduce(shared).tolist()
    if rank > 0 and (epochs_done, step) != (0, 0):
        checkpoint = load_at(job.run, (epochs_done, step))
        if checkpoint is None:
            raise CnnrayError(f"rank {rank} cannot read the checkpoint that rank 0 has read")
    return checkpoint


def _is_over(settings: TrainSettings, history: list[dict[str, Any]]) -> bool:
    return has_stalled(history, **settings.early_stopping.model_dump())


@contextmanager
def _epoch_feeder(
    job: TrainJob, begin: Place, log: OrderLog | None, *, rank: int, num_workers: int
) -> Iterator[Callable[[int], EpochData]]:
    """This rank's data of each epoch, asked for in turn, out of one stream that reads ahead."""
    lanes = lanes_of(rank, num_workers=num_workers)

    def place_in(epoch: int) -> Place:
        return begin if epoch == begin.epoch else Place(epoch)

    def units_of(epoch: int) -> list[Unit]:
        return plan_order(job, epoch=epoch).units_of(lanes, first_step=place_in(epoch).step)

    def feed(epoch: int) -> EpochData:
        order, place = plan_order(job, epoch=epoch), place_in(epoch)
        batches = prefetch(assemble(order, blocks, lanes=lanes, first_step=place.step))
        return EpochData(
            batches=map(
                spread_copies, batches if log is None else log.record(batches, begin=place)
            ),
            global_batch_sizes=order.batch_sizes * job.train.repeats,
            validation=() if val is None else val.share(rank, num_workers),
        )

    val = job.val
    with job.train.open_epochs(range(begin.epoch, job.settings.epochs), units_of) as blocks:
        yield feed


def _all_reduce(tensor: torch.Tensor) -> torch.Tensor:
    torch.distributed.all_reduce(tensor)
    return tensor


def _save(
    trainer: Trainer,
    history: list[dict[str, Any]],
    place: Place | None,
    *,
    writer: CheckpointWriter,
    rank: int,
) -> None:
    """Rank 0 writes a checkpoint; where the model is sharded, all ranks give their parts of it."""
    if rank == 0 or is_sharded(trainer.model):
        state = _state(trainer, history, place)
        if rank == 0:
            PREEMPTION.track(writer.save(state), step=trainer.step)


def _state(trainer: Trainer, history: list[dict[str, Any]], place: Place | None) -> Checkpoint:
    """What a checkpoint holds, sharing its memory with the training."""
    return Checkpoint(
        model=model_tensors(trainer.served),
        optimizer=whole(trainer.optimizer.state_dict()),
        step=trainer.step,
        history=tuple(history),
        trained={} if trainer.average is None else model_tensors(trainer.trained),
        place=place,
        scaler=trainer.precision.scaler.state_dict(),
    )


def _numbers(result: Mapping[str, Any]) -> dict[str, float]:
    return {name: value for name, value in result.items() if value is not None}
