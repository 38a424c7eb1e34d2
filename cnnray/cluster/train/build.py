"""What a rank trains, made from the settings: model, optimizer, loss, what changes its batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import ray.train
import ray.train.torch
import torch
from torch import nn, optim

from cnnray.cluster.train.ingest import SplitFeed
from cnnray.config import TrainSettings
from cnnray.datasets.order import EpochOrder, plan_epoch
from cnnray.models.classifier import Classifier
from cnnray.storage import Store
from cnnray.training.averaging import build_average, restore_average
from cnnray.training.checkpoints import Checkpoint
from cnnray.training.compute import (
    Precision,
    choose_precision,
    compile_in_place,
    synchronize_batch_norms,
)
from cnnray.training.distillation import Distillation, TeacherBundle
from cnnray.training.freezing import FrozenEpochs
from cnnray.training.imbalance import balance_loss
from cnnray.training.loop import BatchTransform, Trainer, in_turn
from cnnray.training.losses import Loss, build_loss
from cnnray.training.mixing import Mixing
from cnnray.training.network import Network
from cnnray.training.optimizers import build_optimizer, restore_optimizer
from cnnray.training.resizing import Resizing
from cnnray.training.schedules import learning_rate_factor, peak_learning_rate
from cnnray.training.sharding import shard

LearningRate = Callable[[int], float]


@dataclass(frozen=True)
class TrainJob:
    """Everything a worker needs; it travels to each of them."""

    settings: TrainSettings
    network: Network
    train: SplitFeed
    val: SplitFeed | None
    run: Store
    order_log: Store | None
    threads: int
    mailbox: Any  # the handle of a Mailbox
    teacher: TeacherBundle | None = None


def build_trainer(job: TrainJob, checkpoint: Checkpoint | None) -> Trainer:
    """The trainer of this rank, as it begins or as it was at a checkpoint."""
    settings = job.settings
    device = ray.train.torch.get_device()
    classifier = job.network.build(with_weights=checkpoint is None)
    if checkpoint is not None:
        classifier.load_state_dict(checkpoint.trained or checkpoint.model)
    if settings.compute.sync_batch_norm and _num_workers() > 1:
        classifier = cast(Classifier, synchronize_batch_norms(classifier))
    classifier = classifier.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    average = build_average(classifier, decay=settings.ema.decay) if settings.ema.decay else None
    if average is not None and checkpoint is not None:
        restore_average(average, checkpoint.model, step=checkpoint.step)
    model = _prepare(classifier, settings, device)
    optimizer = make_optimizer(settings, model)
    precision = choose_precision(settings.compute.precision, device)
    if checkpoint is not None:
        restore_optimizer(optimizer, checkpoint.optimizer)
        precision.scaler.load_state_dict(checkpoint.scaler)
    order, class_counts = plan_order(job, epoch=0), job.train.split.class_counts
    return Trainer(
        model=model,
        optimizer=optimizer,
        loss=make_loss(settings, class_counts, device),
        eval_loss=make_loss(settings, class_counts, device, is_smoothed=False),
        learning_rate=make_learning_rate(settings, steps_per_epoch=order.num_steps),
        device=device,
        precision=precision,
        step=checkpoint.step if checkpoint else 0,
        accumulate_steps=settings.accumulate_steps,
        clip_norm=settings.optimizer.clip_norm,
        freeze=FrozenEpochs(classifier, epochs=settings.model.frozen_epochs)
        if settings.model.frozen_epochs
        else None,
        average=average,
        transform=make_batch_transform(settings, job.network, steps_per_epoch=order.num_steps),
        distillation=_build_distillation(job, precision, device),
    )


def make_optimizer(settings: TrainSettings, model: nn.Module) -> optim.Optimizer:
    """The optimizer that is asked for. Raises ``SettingsError`` when it cannot train the model."""
    options = settings.optimizer.model_dump(exclude={"clip_norm", "lr_reference_batch"})
    return build_optimizer(model, **options)


def _prepare(classifier: Classifier, settings: TrainSettings, device: torch.device) -> nn.Module:
    """The classifier as this rank trains it: compiled, and tied to the other ranks'."""
    if settings.compute.compile:
        compile_in_place(classifier)
    if settings.compute.strategy == "fsdp" and _num_workers() > 1:
        return shard(classifier, device=device, num_workers=_num_workers())
    model: nn.Module = ray.train.torch.prepare_model(classifier)
    return model


def _num_workers() -> int:
    """How many there are now: their number may change."""
    number: int = ray.train.get_context().get_world_size()
    return number


def make_learning_rate(settings: TrainSettings, *, steps_per_epoch: int) -> LearningRate:
    """The learning rate at each step of the run, from 0 on."""
    schedule = settings.schedule.model_dump(exclude={"warmup_epochs"}) | {
        "total_steps": steps_per_epoch * settings.epochs,
        "warmup_steps": round(steps_per_epoch * settings.schedule.warmup_epochs),
    }
    peak = peak_learning_rate(
        settings.optimizer.lr,
        global_batch_size=settings.global_batch_size,
        reference_batch=settings.optimizer.lr_reference_batch,
    )
    return lambda step: peak * learning_rate_factor(step, **schedule)


def make_batch_transform(
    settings: TrainSettings, network: Network, *, steps_per_epoch: int
) -> BatchTransform | None:
    """What changes whole batches, if anything."""
    transforms: list[BatchTransform] = []
    if settings.image.progressive < 1:
        transforms.append(plan_resizing(settings, network, steps_per_epoch=steps_per_epoch))
    if settings.mix.mixup_alpha or settings.mix.cutmix_alpha:
        transforms.append(Mixing(len(network.classes), settings.seed, **settings.mix.model_dump()))
    return in_turn(transforms) if transforms else None


def plan_resizing(settings: TrainSettings, network: Network, *, steps_per_epoch: int) -> Resizing:
    """How images grow over the epochs."""
    return Resizing(
        size=network.preprocessing.size,
        first=settings.image.progressive,
        epochs=settings.epochs,
        steps_per_epoch=steps_per_epoch,
    )


def make_loss(
    settings: TrainSettings,
    class_counts: Sequence[int],
    device: torch.device,
    *,
    is_smoothed: bool = True,
) -> Loss:
    """The loss of each sample; that of validation is not smoothed."""
    loss = build_loss(
        "focal" if settings.imbalance.method == "focal" else settings.loss.name,
        label_smoothing=settings.loss.label_smoothing if is_smoothed else 0.0,
        focal_gamma=settings.loss.focal_gamma,
    )
    return balance_loss(
        loss,
        **settings.imbalance.model_dump(),
        class_counts=class_counts,
        device=device,
    )


def _build_distillation(
    job: TrainJob, precision: Precision, device: torch.device
) -> Distillation | None:
    if job.teacher is None:
        return None
    options = job.settings.distill.model_dump(exclude={"teacher"})
    teacher = partial(precision.forward, job.teacher.load(device))
    return Distillation(teacher, **options)


def plan_order(job: TrainJob, *, epoch: int) -> EpochOrder:
    """The order of an epoch, the same on every rank."""
    return plan_epoch(
        job.train.row_groups_in(epoch),
        seed=job.settings.seed,
        epoch=epoch,
        global_batch_size=job.settings.global_batch_size,
        max_unit_rows=job.train.unit_rows,
    )
