"""The training loop: a generator of epoch results, and of places worth a checkpoint.

It knows nothing of Ray. Data comes in as iterables of batches, results go out as values, and the
only thing the ranks share is ``reduce``, which adds a small tensor over them (the identity on one
process).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn, optim
from torch.optim.swa_utils import AveragedModel

from cnnray.datasets.order import Batch
from cnnray.errors import NonFiniteLossError
from cnnray.training.compute import Precision, share_buffers
from cnnray.training.counts import Counts, Pass
from cnnray.training.distillation import Distillation
from cnnray.training.finite import HINT, LossWatch, Ranks, Reduce
from cnnray.training.freezing import FrozenEpochs
from cnnray.training.losses import Loss
from cnnray.training.places import Pace, Place, Tally
from cnnray.training.progress import Meter, Progress
from cnnray.training.sharding import local_part, whole_weights

BatchTransform = Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]]
"""(B, C, H, W) images, (B,) labels and the step → images, and labels or (B, K) targets."""

FINITE_CHECK_STEPS = 50
"""Steps between two looks at what all ranks must know, at most: losses not finite, wishes."""
LOOK_SECONDS = 5.0
"""Seconds between two looks, about, where steps are slow."""


@dataclass(frozen=True)
class EpochResult:
    """What one epoch gave; losses are means over all samples of all ranks."""

    epoch: int  # 0-based
    step: int  # optimizer steps so far
    train_loss: float
    train_accuracy: float
    val_loss: float | None
    val_accuracy: float | None
    learning_rate: float
    samples_per_second: float
    data_wait_fraction: float
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able record of the history."""
        return asdict(self)


@dataclass
class Trainer:
    """A model being trained: what a checkpoint saves and restores."""

    model: nn.Module  # (B, C, H, W) uint8 to (B, K) logits; may be wrapped in DDP, or sharded
    optimizer: optim.Optimizer
    loss: Loss
    learning_rate: Callable[[int], float]  # of a 0-based step
    device: torch.device
    precision: Precision = field(default_factory=Precision)
    step: int = 0
    eval_loss: Loss | None = None  # of validation, where it is not the training's
    accumulate_steps: int = 1  # passes that this rank's part of a global batch is cut into
    clip_norm: float | None = None  # of the gradient of all parameters together, at most
    freeze: FrozenEpochs | None = None
    average: AveragedModel | None = None  # of the model's weights
    transform: BatchTransform | None = None  # of what is trained on, on the device
    distillation: Distillation | None = None  # what is minimised instead of the loss alone

    @property
    def trained(self) -> nn.Module:
        """The model without DDP around it."""
        module: nn.Module = getattr(self.model, "module", self.model)
        return module

    @property
    def served(self) -> nn.Module:
        """What is evaluated and saved: the average of the weights, if there is one."""
        return self.trained if self.average is None else self.average.module

    @property
    def validation_loss(self) -> Loss:
        """The loss without what only regularises training, such as label smoothing."""
        return self.eval_loss or self.loss


def in_turn(transforms: Sequence[BatchTransform]) -> BatchTransform:
    """One transform that does what several do, one after the other."""

    def transform(image: Tensor, label: Tensor, step: int) -> tuple[Tensor, Tensor]:
        for one in transforms:
            image, label = one(image, label, step)
        return image, label

    return transform


@dataclass(frozen=True)
class EpochData:
    """This rank's part of one epoch."""

    batches: Iterable[Batch]  # from the step on at which the epoch is begun
    global_batch_sizes: np.ndarray[Any, Any]  # (steps,) of the whole epoch
    validation: Iterable[Batch]


@dataclass(frozen=True)
class Cadence:
    """When a checkpoint inside an epoch is due: the same on all ranks, so never by their clocks."""

    every_steps: int = 0  # optimizer steps, counted over the whole run; 0: not by steps
    is_wished: Callable[[], bool] = lambda: False
    """Asked on each rank at each look; what one wishes, by its clock, all do."""


def run_epochs(
    trainer: Trainer,
    *,
    first_epoch: int,
    epochs: int,
    data: Callable[[int], EpochData],
    seed: int,
    place: Place | None = None,
    cadence: Cadence = Cadence(),  # noqa: B008  frozen
    rank: int = 0,
    num_workers: int = 1,
    reduce: Reduce = lambda tensor: tensor,
    report_seconds: float = 10.0,
    on_progress: Callable[[Progress], None] = lambda progress: None,
) -> Iterator[EpochResult | Place]:
    """Train for epochs ``first_epoch`` to ``epochs`` - 1, yielding after each one's validation.

    Between two steps of an epoch it yields the ``Place`` on every rank when a checkpoint is due.
    Given one in ``first_epoch``, it goes on from there: ``data`` gives the batches of the steps
    that are left, and the result is of the whole epoch (its speed and times are of the rest).

    Dropout and the like depend on (seed, epoch, step, rank), so that a resumed epoch repeats what
    an uninterrupted run does. Raises ``NonFiniteLossError`` on every rank at the same step.
    """
    ranks = Ranks(rank, num_workers, reduce)
    for epoch in range(first_epoch, epochs):
        started = time.perf_counter()
        begin = place if place is not None and place.epoch == epoch else Place(epoch)
        epoch_data = data(epoch)
        if trainer.freeze is not None:
            trainer.freeze.begin_epoch(epoch)
        meter = Meter(
            epoch=epoch,
            epochs=epochs,
            steps=len(epoch_data.global_batch_sizes),
            first_step=begin.step,
            seconds=report_seconds,
            emit=on_progress,
        )
        tally = yield from _train_epoch(
            trainer, epoch_data, begin=begin, seed=seed, cadence=cadence, meter=meter, ranks=ranks
        )
        train_seconds = time.perf_counter() - started
        share_buffers(trainer.served, ranks)
        validation = evaluate(trainer, epoch_data.validation, reduce=reduce)
        has_validation = validation.num_samples > 0
        if has_validation and not math.isfinite(validation.loss):
            raise NonFiniteLossError(
                f"the validation loss is not finite after epoch {epoch + 1}", hint=HINT
            )
        yield EpochResult(
            epoch=epoch,
            step=trainer.step,
            train_loss=tally.loss,
            train_accuracy=tally.accuracy,
            val_loss=validation.loss if has_validation else None,
            val_accuracy=validation.accuracy if has_validation else None,
            learning_rate=max(group["lr"] for group in trainer.optimizer.param_groups),
            samples_per_second=meter.samples_done / train_seconds,
            data_wait_fraction=meter.wait_seconds / train_seconds,
            seconds=time.perf_counter() - started,
        )


def _train_epoch(
    trainer: Trainer,
    data: EpochData,
    *,
    begin: Place,
    seed: int,
    cadence: Cadence,
    meter: Meter,
    ranks: Ranks,
) -> Generator[Place, None, Tally]:
    """The steps from ``begin`` on; yields where a checkpoint is due, returns the epoch's tally."""
    trainer.model.train()
    # One rank carries on what all had counted.
    counts = Counts(begin.tally if ranks.rank == 0 else Tally())
    watch = LossWatch(steps=FINITE_CHECK_STEPS)
    pace = Pace(trainer.step, seconds=LOOK_SECONDS, most=FINITE_CHECK_STEPS)
    stride = 1  # steps from one look to the next
    first_seed = _mix(seed, begin.epoch, ranks.rank)
    sizes = data.global_batch_sizes[begin.step :]
    batches = zip(meter.timed(data.batches), sizes, strict=True)
    for step, (batch, global_batch_size) in enumerate(batches, begin.step):
        _seed(trainer.device, first_seed + step)
        # DDP averages the gradients of the ranks: with this divisor the average is the gradient of
        # the mean over the global batch, also where ranks hold unequal parts of it.
        divisor = float(global_batch_size) / ranks.num_workers
        passes, losses = _train_step(trainer, batch, divisor=divisor)
        counts.add(passes)
        watch.add(trainer.step, batch, losses)
        meter.step(int(global_batch_size), sums=counts)
        is_due = cadence.every_steps > 0 and trainer.step % cadence.every_steps == 0
        # By count, not by time: all ranks must agree.
        is_looked = trainer.step % stride == 0
        if (is_due or is_looked) and step + 1 < len(data.global_batch_sizes):
            is_wished = is_due or cadence.is_wished()
            tally, is_due, stride = _agree(
                trainer, counts, is_wished=is_wished, pace=pace, watch=watch, ranks=ranks
            )
            if is_due:
                yield Place(begin.epoch, step + 1, tally)
    tally, *_ = _agree(trainer, counts, is_wished=True, pace=pace, watch=watch, ranks=ranks)
    return tally


def _agree(
    trainer: Trainer, own: Counts, *, is_wished: bool, pace: Pace, watch: LossWatch, ranks: Ranks
) -> tuple[Tally, bool, int]:
    """The sums over all ranks, whether one wishes a checkpoint, the steps until the next look.

    Those are rank 0's, by its clock.
    Raises ``NonFiniteLossError`` on all ranks, also when the weights that would be saved are not
    finite: the loss would tell only one step later.
    """
    spoilt = not _has_finite_weights(trainer)  # of what this rank has of them
    stride = pace.look(trainer.step) if ranks.rank == 0 else 0
    numbers = [*own.tolist(), float(is_wished), float(spoilt), float(stride)]
    told = torch.tensor(numbers, dtype=torch.float64, device=trainer.device)
    *counts, wishes, spoilt_ranks, stride = ranks.reduce(told).tolist()
    if not math.isfinite(counts[0]):
        raise watch.failure(ranks)
    if spoilt_ranks:
        raise NonFiniteLossError(f"the weights are not finite at step {trainer.step}", hint=HINT)
    if trainer.precision.is_hopeless:
        raise NonFiniteLossError(
            f"the gradients are not finite in float16 up to step {trainer.step}, at any scale",
            hint="--compute.precision fp32 or bf16, or lower --optimizer.lr",
        )
    return Tally(*counts), wishes > 0, int(stride)


def _has_finite_weights(trainer: Trainer) -> bool:
    weights = (local_part(parameter.detach()) for parameter in trainer.trained.parameters())
    return bool(torch.stack([weight.isfinite().all() for weight in weights]).all())


def _train_step(trainer: Trainer, batch: Batch, *, divisor: float) -> tuple[Sequence[Pass], Tensor]:
    """One optimizer update; returns what to count of it, and what it minimised (B,).

    Both are of this rank's samples, before the update. A step whose gradients the scaler finds
    infinite counts as any other, though the weights stay: the order and the schedule do not depend
    on it.
    """
    lr = trainer.learning_rate(trainer.step)
    for group in trainer.optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]
        for parameter in group["params"]:  # as zero_grad does, which takes ten times as long
            parameter.grad = None
    passes, losses = _add_gradients(trainer, batch, divisor=divisor)
    if trainer.freeze is not None:
        trainer.freeze.drop_gradients()
    scaler = trainer.precision.scaler
    scaler.unscale_(trainer.optimizer)
    if trainer.clip_norm is not None:  # after DDP's average: the same on all ranks
        nn.utils.clip_grad_norm_(trainer.model.parameters(), trainer.clip_norm)
    scaler.step(trainer.optimizer)
    scaler.update()
    if trainer.average is not None:
        trainer.average.update_parameters(trainer.trained)
    trainer.step += 1
    return passes, losses


def _add_gradients(
    trainer: Trainer, batch: Batch, *, divisor: float
) -> tuple[Sequence[Pass], Tensor]:
    """Forward and backward in as many passes as memory asks for; DDP averages in the last."""
    image, label = _to_device(batch, trainer.device)
    if trainer.transform is not None:
        image, label = trainer.transform(image, label, trainer.step)  # or (B, K) targets
    pieces = _cut(image, label, passes=max(1, min(trainer.accumulate_steps, len(label))))
    alone = getattr(trainer.model, "no_sync", nullcontext)
    passes: list[Pass] = []
    seen: list[Tensor] = []
    for number, (image, label) in enumerate(pieces, 1):
        with alone() if number < len(pieces) else nullcontext():
            logits = trainer.precision.forward(trainer.model, image)  # (B, K)
            losses = trainer.loss(logits, label)  # (B,)
            minimised = losses  # what is counted stays comparable to validation
            if trainer.distillation is not None:
                minimised = trainer.distillation(losses, logits, image)
            # The gradient of the sum over the divisor, which need not be computed itself.
            weights = trainer.precision.scaler.scale(torch.ones_like(minimised).div_(divisor))
            minimised.backward(weights)  # type: ignore[no-untyped-call]
        seen.append(minimised.detach())
        passes.append((losses.detach(), _hits(logits.detach(), label)))
    return passes, seen[0] if len(seen) == 1 else torch.cat(seen)


def _cut(image: Tensor, label: Tensor, *, passes: int) -> Sequence[tuple[Tensor, Tensor]]:
    if passes == 1:
        return [(image, label)]
    return list(zip(image.tensor_split(passes), label.tensor_split(passes), strict=True))


def evaluate(trainer: Trainer, batches: Iterable[Batch], *, reduce: Reduce) -> Tally:
    """Loss and accuracy over every sample of ``batches`` on all ranks."""
    model = trainer.served.eval()  # ranks may hold unequal counts: no DDP, no shards
    sums = torch.zeros(3, dtype=torch.float64, device=trainer.device)
    with whole_weights(model), torch.inference_mode():
        for batch in batches:
            image, label = _to_device(batch, trainer.device)
            logits = trainer.precision.forward(model, image)
            sums += _count(logits, trainer.validation_loss(logits, label), label)
    return Tally(*reduce(sums).tolist())


def _count(logits: Tensor, losses: Tensor, target: Tensor) -> Tensor:
    correct = _hits(logits, target).sum()
    samples = torch.tensor(float(len(target)), dtype=torch.float64, device=logits.device)
    return torch.stack([losses.double().sum(), correct.double(), samples])


def _hits(logits: Tensor, target: Tensor) -> Tensor:
    """(B,) whether the label has the highest logit."""
    label = target if target.ndim == 1 else target.argmax(dim=1)  # the larger part of a mixture
    return logits.argmax(dim=1) == label


def _to_device(batch: Batch, device: torch.device) -> tuple[Tensor, Tensor]:
    # Arrays from the object store are read-only, which torch does not know: copies are writable.
    image = torch.from_numpy(np.require(batch["image"], requirements=["C", "W"]))
    label = torch.from_numpy(np.require(batch["label"], requirements=["C", "W"]))
    if device.type == "cuda":  # only from pinned memory does a copy run beside the last step
        image, label = image.pin_memory(), label.pin_memory()
    image, label = image.to(device, non_blocking=True), label.to(device, non_blocking=True)
    # Convolutions are a third faster on channels-last memory, on CPUs and GPUs alike.
    return image.contiguous(memory_format=torch.channels_last), label


def _mix(seed: int, epoch: int, rank: int) -> int:
    return int(np.random.SeedSequence((seed, epoch, rank)).generate_state(1, np.uint64)[0] >> 1)


def _seed(device: torch.device, seed: int) -> None:
    torch.default_generator.manual_seed(seed)  # torch.manual_seed takes 80 µs for every kind
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)
