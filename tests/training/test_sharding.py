"""Shards of a model on two processes: the losses of DDP, and checkpoints for any ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from cnnray.datasets.order import Batch
from cnnray.models.classifier import Classifier
from cnnray.storage import open_store
from cnnray.training.checkpoints import Checkpoint, load_latest, model_tensors, save_checkpoint
from cnnray.training.freezing import FrozenEpochs
from cnnray.training.loop import EpochData, EpochResult, Trainer, run_epochs
from cnnray.training.losses import cross_entropy
from cnnray.training.optimizers import build_optimizer, restore_optimizer
from cnnray.training.sharding import shard, whole

DEADLINE_SECONDS = 120
CPU = torch.device("cpu")
CUT = 11  # of a batch of 16: the ranks hold unequal parts
OPTIMIZERS = ("adam", "sgd", "lamb")

Wrap = Callable[[nn.Module], nn.Module]


def sharded(model: nn.Module) -> nn.Module:
    return shard(model, device=CPU, num_workers=2)


def begin(optimizer: str, wrap: Wrap, checkpoint: Checkpoint | None = None) -> Trainer:
    """A first epoch with a frozen backbone; three classes, which two ranks cannot share evenly."""
    torch.manual_seed(0)
    backbone = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 3)
    )
    classifier = Classifier(backbone, mean=[0.5], std=[0.25], head="5")
    if checkpoint is not None:
        classifier.load_state_dict(checkpoint.model)
    classifier = classifier.to(memory_format=torch.channels_last)
    model = wrap(classifier)
    trainer = Trainer(
        model=model,
        optimizer=build_optimizer(model, name=optimizer, lr=0.05, weight_decay=0.01),
        loss=cross_entropy,
        learning_rate=lambda step: 0.05,
        device=CPU,
        clip_norm=0.5,
        freeze=FrozenEpochs(classifier, epochs=1),
    )
    if checkpoint is not None:
        restore_optimizer(trainer.optimizer, checkpoint.optimizer)
        trainer.step = checkpoint.step
    return trainer


def batch_of(number: int, rows: slice = slice(0, 16)) -> Batch:
    generator = np.random.default_rng(number)
    whole_batch = {
        "image": generator.integers(0, 256, (16, 1, 4, 4)).astype(np.uint8),
        "label": generator.integers(0, 3, 16),
        "key": np.array([f"{number}/{n}" for n in range(16)]),
    }
    return Batch(**{name: values[rows] for name, values in whole_batch.items()})


def train(trainer: Trainer, *, epochs: Sequence[int], rank: int | None = None) -> list[EpochResult]:
    """On one process, or on one of two, of which the second validates less and less often."""
    rows = {None: slice(0, 16), 0: slice(0, CUT), 1: slice(CUT, 16)}[rank]
    validation = {None: [97, 98, 99], 0: [97, 98], 1: [99]}[rank]

    def data(epoch: int) -> EpochData:
        batches = [batch_of(10 * epoch + step, rows) for step in range(3)]
        return EpochData(batches, np.full(3, 16), [batch_of(number) for number in validation])

    def reduce(sums: Tensor) -> Tensor:
        if rank is not None:
            dist.all_reduce(sums)
        return sums

    results = run_epochs(
        trainer,
        first_epoch=epochs[0],
        epochs=epochs[-1] + 1,
        data=data,
        seed=0,
        rank=rank or 0,
        num_workers=1 if rank is None else 2,
        reduce=reduce,
    )
    return list(results)


def state(trainer: Trainer, results: list[EpochResult]) -> Checkpoint:
    return Checkpoint(
        model=model_tensors(trainer.trained),
        optimizer=whole(trainer.optimizer.state_dict()),
        step=trainer.step,
        history=tuple(result.to_dict() for result in results),
    )


def losses(results: list[EpochResult]) -> list[float]:
    return [loss for result in results for loss in (result.train_loss, result.val_loss)]


def train_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=2,
        timeout=timedelta(seconds=DEADLINE_SECONDS),
    )
    for optimizer in OPTIMIZERS:
        place = Path(folder) / optimizer
        ddp = begin(optimizer, nn.parallel.DistributedDataParallel)
        fsdp = begin(optimizer, sharded)
        held = sum(p.to_local().numel() for p in fsdp.model.parameters())
        results = {
            "ddp": losses(train(ddp, epochs=[0, 1], rank=rank)),
            "held": held,
            "total": sum(p.numel() for p in fsdp.model.parameters()),
        }
        first = train(fsdp, epochs=[0], rank=rank)
        checkpoint = state(fsdp, first)  # of all ranks
        if rank == 0:
            save_checkpoint(open_store(str(place / "fsdp")), checkpoint, keep=1)
        results["fsdp"] = losses(first + train(fsdp, epochs=[1], rank=rank))
        alone = load_latest(open_store(str(place / "alone")))
        results["resumed"] = losses(
            train(begin(optimizer, sharded, alone), epochs=[1, 2], rank=rank)
        )
        torch.save(results, place / f"rank-{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.timeout(2 * DEADLINE_SECONDS)
def test_shards_give_the_losses_of_ddp_and_go_on_from_and_to_a_single_process(
    tmp_path: Path,
) -> None:
    expected = {}
    for optimizer in OPTIMIZERS:
        trainer = begin(optimizer, lambda model: model)
        first = train(trainer, epochs=[0])
        store = open_store(str(tmp_path / optimizer / "alone"))
        save_checkpoint(store, state(trainer, first), keep=1)
        expected[optimizer] = losses(first + train(trainer, epochs=[1, 2]))

    torch.multiprocessing.spawn(train_rank, args=(str(tmp_path),), nprocs=2)

    for optimizer in OPTIMIZERS:
        place = tmp_path / optimizer
        one, other = (torch.load(place / f"rank-{rank}.pt") for rank in (0, 1))
        assert one["fsdp"] == other["fsdp"]
        assert one["held"] + other["held"] == one["total"]
        assert max(one["held"], other["held"]) < 0.6 * one["total"]
        assert one["fsdp"] == pytest.approx(one["ddp"], abs=1e-5)
        assert one["fsdp"] == pytest.approx(expected[optimizer][:4], abs=1e-5)
        assert one["resumed"] == pytest.approx(expected[optimizer][2:], abs=1e-5)

        loaded = load_latest(open_store(str(place / "fsdp")))
        resumed = train(begin(optimizer, lambda model: model, loaded), epochs=[1, 2])
        assert losses(resumed) == pytest.approx(expected[optimizer][2:], abs=1e-5)
