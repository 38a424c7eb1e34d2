"""The whole recipe box on two processes with DDP takes the steps that one process takes."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import cnnray.training.loop as loop
from cnnray.datasets.order import Batch
from cnnray.errors import NonFiniteLossError
from cnnray.models.classifier import Classifier
from cnnray.training.averaging import build_average
from cnnray.training.freezing import FrozenEpochs
from cnnray.training.imbalance import balance_loss
from cnnray.training.loop import (
    FINITE_CHECK_STEPS,
    Cadence,
    EpochData,
    EpochResult,
    Trainer,
    evaluate,
    run_epochs,
)
from cnnray.training.losses import build_loss, cross_entropy
from cnnray.training.optimizers import build_optimizer
from cnnray.training.places import Place

DEADLINE_SECONDS = 120
CUT = 11  # of a batch of 16: the ranks hold unequal parts


def global_batch(number: int) -> Batch:
    generator = np.random.default_rng(number)
    return Batch(
        image=generator.integers(0, 256, (16, 1, 4, 4)).astype(np.uint8),
        label=generator.integers(0, 2, 16),
        key=np.array([f"{number}/{n}" for n in range(16)]),
    )


def train(
    rows: slice, *, rank: int, num_workers: int, wrap: Callable[[nn.Module], nn.Module]
) -> tuple[list[EpochResult], dict[str, Tensor]]:
    """Three epochs, the first with a frozen backbone; the results and the averaged weights."""
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 2))
    classifier = Classifier(backbone, mean=[0.5], std=[0.25], head="3")
    loss = balance_loss(
        build_loss("focal", label_smoothing=0.1),
        method="class_weights",
        class_counts=[30, 18],
        beta=0.0,
        tau=1.0,
        device=torch.device("cpu"),
    )
    trainer = Trainer(
        model=wrap(classifier),
        optimizer=build_optimizer(classifier, name="sgd", lr=0.5, layer_decay=0.5),
        loss=loss,
        learning_rate=lambda step: 0.5,
        device=torch.device("cpu"),
        accumulate_steps=3,
        clip_norm=0.05,
        freeze=FrozenEpochs(classifier, epochs=1),
        average=build_average(classifier, decay=0.5),
    )

    def data(epoch: int) -> EpochData:
        batches = [
            Batch(**{name: values[rows] for name, values in global_batch(number).items()})
            for number in range(3 * epoch, 3 * epoch + 3)
        ]
        return EpochData(batches, np.full(3, 16), batches)

    def reduce(sums: Tensor) -> Tensor:
        if num_workers > 1:
            dist.all_reduce(sums)
        return sums

    results = run_epochs(
        trainer,
        first_epoch=0,
        epochs=3,
        data=data,
        seed=0,
        rank=rank,
        num_workers=num_workers,
        reduce=reduce,
    )
    return list(results), trainer.served.state_dict()


def join(rank: int, folder: str) -> slice:
    """Make this process one of two ranks; the rows of a batch that are its own."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=2,
        timeout=timedelta(seconds=DEADLINE_SECONDS),
    )
    return slice(0, CUT) if rank == 0 else slice(CUT, 16)


def train_rank(rank: int, folder: str) -> None:
    rows = join(rank, folder)
    results, weights = train(
        rows, rank=rank, num_workers=2, wrap=nn.parallel.DistributedDataParallel
    )
    losses = torch.tensor([[r.train_loss, r.val_loss] for r in results])
    torch.save({"losses": losses, "weights": weights}, f"{folder}/rank-{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.timeout(2 * DEADLINE_SECONDS)
def test_two_unequal_ranks_take_the_steps_of_one_process_whatever_is_switched_on(
    tmp_path: Path,
) -> None:
    torch.multiprocessing.spawn(train_rank, args=(str(tmp_path),), nprocs=2)
    one, other = (torch.load(tmp_path / f"rank-{rank}.pt", weights_only=True) for rank in (0, 1))
    results, weights = train(slice(0, 16), rank=0, num_workers=1, wrap=lambda model: model)
    losses = torch.tensor([[r.train_loss, r.val_loss] for r in results])
    assert torch.equal(one["losses"], other["losses"])  # what early stopping decides by
    torch.testing.assert_close(one["losses"], losses)
    for name, tensor in weights.items():
        assert torch.equal(one["weights"][name], other["weights"][name]), name
        torch.testing.assert_close(one["weights"][name], tensor)


STEPS = 2 * FINITE_CHECK_STEPS + 10


def plain_trainer(wrap: Callable[[nn.Module], nn.Module], *norms: nn.Module) -> Trainer:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), *norms, nn.Linear(16, 2))
    model.register_forward_pre_hook(lambda _, inputs: (inputs[0].float() / 255,))
    model = wrap(model)
    return Trainer(
        model=model,
        optimizer=build_optimizer(model, name="sgd", lr=0.1),
        loss=cross_entropy,
        learning_rate=lambda step: 0.1,
        device=torch.device("cpu"),
    )


def some_steps(rows: slice, *, first_step: int = 0) -> EpochData:
    batches = [
        Batch(**{name: values[rows] for name, values in global_batch(number).items()})
        for number in range(first_step, STEPS)
    ]
    return EpochData(batches, np.full(STEPS, 16), ())


def reach_a_place(rank: int, folder: str) -> None:
    """Rank 0 alone wishes one; then go on to a loss of NaN on rank 1."""
    rows = join(rank, folder)
    loop.LOOK_SECONDS = 1e9  # however slow this machine is
    trainer = plain_trainer(nn.parallel.DistributedDataParallel)

    def loss(logits: Tensor, label: Tensor) -> Tensor:
        losses = cross_entropy(logits, label)
        if rank == 1 and trainer.step == FINITE_CHECK_STEPS + 7:
            losses[2:4] = torch.nan
        return losses

    def reduce(tensor: Tensor) -> Tensor:
        dist.all_reduce(tensor)
        return tensor

    trainer.loss = loss
    reached = run_epochs(
        trainer,
        first_epoch=0,
        epochs=1,
        data=lambda _: some_steps(rows),
        seed=0,
        cadence=Cadence(is_wished=lambda: rank == 0 and trainer.step >= FINITE_CHECK_STEPS),
        rank=rank,
        num_workers=2,
        reduce=reduce,
    )
    place = next(reached)
    assert isinstance(place, Place)
    torch.save(
        {
            "place": (place.epoch, place.step),
            "loss": place.tally.loss,
            "weights": trainer.trained.state_dict(),
        },
        f"{folder}/place-{rank}.pt",
    )
    try:
        next(reached)
    except NonFiniteLossError as error:
        Path(f"{folder}/error-{rank}").write_text(str(error))
    dist.destroy_process_group()


@pytest.mark.timeout(2 * DEADLINE_SECONDS)
def test_two_ranks_stop_at_the_place_that_one_wishes_and_name_the_samples_of_one_loss(
    tmp_path: Path,
) -> None:
    torch.multiprocessing.spawn(reach_a_place, args=(str(tmp_path),), nprocs=2)
    one, other = (torch.load(tmp_path / f"place-{rank}.pt", weights_only=True) for rank in (0, 1))
    assert one["place"] == other["place"] == (0, FINITE_CHECK_STEPS)
    assert one["loss"] == other["loss"]

    trainer = plain_trainer(lambda model: model)
    reached = run_epochs(
        trainer,
        first_epoch=0,
        epochs=1,
        data=lambda _: some_steps(slice(0, 16)),
        seed=0,
        cadence=Cadence(every_steps=FINITE_CHECK_STEPS),
    )
    assert next(reached).tally.loss == pytest.approx(one["loss"])
    for name, tensor in trainer.trained.state_dict().items():
        assert torch.equal(one["weights"][name], other["weights"][name]), name
        torch.testing.assert_close(one["weights"][name], tensor)

    said, also_said = ((tmp_path / f"error-{rank}").read_text() for rank in (0, 1))
    assert said == also_said
    step = FINITE_CHECK_STEPS + 7  # of batches counted from 0
    assert said.splitlines()[0] == (
        f"the loss is not finite at step {step + 1}, for 2 of its samples:"
        f" '{step}/{CUT + 2}', '{step}/{CUT + 3}'"
    )


def validate_rank(rank: int, folder: str) -> None:
    """One epoch of a model with batch norm, of which each rank sees other images."""
    rows = join(rank, folder)
    trainer = plain_trainer(nn.parallel.DistributedDataParallel, nn.BatchNorm1d(16))
    batches = [
        Batch(**{name: values[rows] for name, values in global_batch(number).items()})
        for number in range(3)
    ]

    def reduce(tensor: Tensor) -> Tensor:
        dist.all_reduce(tensor)
        return tensor

    [result] = run_epochs(
        trainer,
        first_epoch=0,
        epochs=1,
        data=lambda _: EpochData(batches, np.full(3, 16), batches),
        seed=0,
        rank=rank,
        num_workers=2,
        reduce=reduce,
    )
    state = {"val_loss": result.val_loss, "model": trainer.trained.state_dict()}
    torch.save(state, f"{folder}/validated-{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.timeout(2 * DEADLINE_SECONDS)
def test_all_ranks_validate_with_the_batch_norm_statistics_that_rank_0_saves(
    tmp_path: Path,
) -> None:
    torch.multiprocessing.spawn(validate_rank, args=(str(tmp_path),), nprocs=2)
    one, other = (torch.load(tmp_path / f"validated-{rank}.pt") for rank in (0, 1))
    for name, tensor in one["model"].items():
        assert torch.equal(tensor, other["model"][name]), name
    alone = plain_trainer(lambda model: model, nn.BatchNorm1d(16))
    alone.model.load_state_dict(one["model"])
    tally = evaluate(alone, map(global_batch, range(3)), reduce=lambda sums: sums)
    assert one["val_loss"] == pytest.approx(tally.loss, rel=1e-6)
