"""Inside an epoch: when a checkpoint is due, and that a run goes on from it as if uninterrupted."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

import cnnray.training.loop as loop
from cnnray.datasets.order import Batch, Unit, assemble, lanes_of, permutation, plan_epoch
from cnnray.datasets.order import row_groups_of as groups_of
from cnnray.errors import NonFiniteLossError
from cnnray.storage import LocalStore, Store
from cnnray.training.checkpoints import (
    Checkpoint,
    CheckpointWriter,
    load_latest,
    model_tensors,
)
from cnnray.training.finite import MAX_KEY_CHARACTERS, MAX_KEYS
from cnnray.training.loop import (
    FINITE_CHECK_STEPS,
    Cadence,
    EpochData,
    EpochResult,
    Trainer,
    run_epochs,
)
from cnnray.training.optimizers import restore_optimizer
from cnnray.training.order_log import OrderLog, remove_order
from cnnray.training.places import Interval, Pace, Place, Tally

MakeTrainer = Callable[..., Trainer]
MakeBatch = Callable[..., Batch]

SEED = 5
EPOCHS = 2
GROUPS = groups_of([[40, 25], [60]])  # 125 rows


def order_of(epoch: int) -> Any:
    """Of the toy's data: 7 steps, of 16 rows and of 29 at last."""
    return plan_epoch(GROUPS, seed=SEED, epoch=epoch, global_batch_size=16, max_unit_rows=9)


def read(unit: Unit, *, epoch: int) -> Batch:
    """What a reader makes of a unit: dark images and light ones."""
    rows = unit.start + permutation(unit, seed=SEED, epoch=epoch)
    place = f"{unit.row_group.shard}/{unit.row_group.index}"
    noise = np.random.default_rng((unit.row_group.shard, unit.row_group.index))
    images = noise.integers(0, 110, (unit.row_group.num_rows, 1, 4, 4))[rows]
    label = rows % 2
    return Batch(
        image=(images + 140 * label[:, None, None, None]).astype(np.uint8),
        label=label,
        key=np.array([f"{place}/{row}" for row in rows], dtype=object),
    )


def data_of(epoch: int, *, first_step: int = 0, rank: int = 0, num_workers: int = 1) -> EpochData:
    order, lanes = order_of(epoch), lanes_of(rank, num_workers=num_workers)
    units = order.units_of(lanes, first_step=first_step)
    blocks = ((unit.lane, read(unit, epoch=epoch)) for unit in units)
    batches = assemble(order, blocks, lanes=lanes, first_step=first_step)
    return EpochData(batches, order.batch_sizes, ())


def state(trainer: Trainer, history: list[dict[str, Any]], place: Place | None) -> Checkpoint:
    return Checkpoint(
        model=model_tensors(trainer.model),
        optimizer=trainer.optimizer.state_dict(),
        step=trainer.step,
        history=tuple(history),
        place=place,
    )


def restore(trainer: Trainer, checkpoint: Checkpoint) -> None:
    trainer.model.load_state_dict(checkpoint.model)
    restore_optimizer(trainer.optimizer, checkpoint.optimizer)
    trainer.step = checkpoint.step


def run(
    trainer: Trainer, *, begin: Place | None = None, every: int = 0, epochs: int = EPOCHS
) -> Iterator[EpochResult | Place]:
    begin = begin or Place(0)
    return run_epochs(
        trainer,
        first_epoch=begin.epoch,
        epochs=epochs,
        data=lambda epoch: data_of(epoch, first_step=begin.step if epoch == begin.epoch else 0),
        seed=SEED,
        place=begin,
        cadence=Cadence(every_steps=every),
    )


def assert_same_weights(one: Trainer, other: Trainer) -> None:
    for name, tensor in one.model.state_dict().items():
        assert torch.equal(tensor, other.model.state_dict()[name]), name


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_from_any_place_a_run_goes_on_to_the_same_losses_and_weights_bit_for_bit(
    make_trainer: MakeTrainer, tmp_path: Path, optimizer: str
) -> None:
    whole = make_trainer(optimizer=optimizer, dropout=0.5)
    places: list[Path] = []
    results: list[EpochResult] = []
    for reached in run(whole, every=2):
        if isinstance(reached, EpochResult):
            results.append(reached)
            continue
        places.append(tmp_path / f"{len(places)}")
        with CheckpointWriter(LocalStore(str(places[-1])), keep=1, seconds=10) as writer:
            writer.save(state(whole, [r.to_dict() for r in results], reached))
    assert len(places) == 6
    for folder in places:
        torch.manual_seed(12345)  # another process has another generator
        resumed = make_trainer(optimizer=optimizer, dropout=0.5)
        loaded = load_latest(LocalStore(str(folder)))
        restore(resumed, loaded)
        rest = list(run(resumed, begin=loaded.place))
        assert_same_weights(whole, resumed)
        assert [(r.train_loss, r.train_accuracy, r.step) for r in rest] == [
            (r.train_loss, r.train_accuracy, r.step) for r in results[loaded.place.epoch :]
        ]


def test_places_are_counted_in_steps_of_the_run_and_never_where_an_epoch_ends(
    make_trainer: MakeTrainer,
) -> None:
    steps = order_of(0).num_steps
    assert steps == 7
    reached = list(run(make_trainer(), every=3, epochs=3))
    assert [(p.epoch, p.step) for p in reached if isinstance(p, Place)] == [
        (0, 3),
        (0, 6),
        (1, 2),
        (1, 5),
        (2, 1),
        (2, 4),
    ]
    assert [r.step for r in reached if isinstance(r, EpochResult)] == [7, 14, 21]


def test_dropout_differs_between_the_steps_of_an_epoch(
    make_trainer: MakeTrainer, make_batch: MakeBatch
) -> None:
    data = EpochData([make_batch(16, seed=1)] * 4, np.full(4, 16), ())
    reached = run_epochs(
        make_trainer(lr=0.0, dropout=0.5),
        first_epoch=0,
        epochs=1,
        data=lambda _: data,
        seed=0,
        cadence=Cadence(every_steps=1),
    )
    sums = [0.0, *(place.tally.loss_sum for place in reached if isinstance(place, Place))]
    losses = np.diff(sums).round(6)
    assert len(set(losses.tolist())) == 3


def test_without_a_cadence_there_is_no_place(make_trainer: MakeTrainer) -> None:
    assert all(isinstance(reached, EpochResult) for reached in run(make_trainer()))


def long_epoch(make_batch: MakeBatch, steps: int) -> EpochData:
    return EpochData([make_batch(2, seed=1)] * steps, np.full(steps, 2), ())


def test_wishes_are_asked_for_at_fixed_steps_and_the_wish_of_another_rank_is_ours(
    make_trainer: MakeTrainer, make_batch: MakeBatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "LOOK_SECONDS", 1e9)  # however slow this machine is
    steps = 3 * FINITE_CHECK_STEPS
    data = long_epoch(make_batch, steps)
    trainer = make_trainer()
    asked: list[int] = []

    def no_wish() -> bool:
        asked.append(trainer.step)
        return False

    def reduce(shared: torch.Tensor) -> torch.Tensor:
        if trainer.step == 2 * FINITE_CHECK_STEPS and len(shared) == 6:
            return shared + torch.tensor([0.0, 0.0, 0.0, 1.0, 0.0, 0.0])
        return shared

    reached = run_epochs(
        trainer,
        first_epoch=0,
        epochs=1,
        data=lambda _: data,
        seed=0,
        cadence=Cadence(is_wished=no_wish),
        reduce=reduce,
    )
    [place, _] = reached
    assert (place.step, place.tally.num_samples) == (2 * FINITE_CHECK_STEPS, 4 * FINITE_CHECK_STEPS)
    assert asked == [1, FINITE_CHECK_STEPS, 2 * FINITE_CHECK_STEPS]


@pytest.mark.parametrize(("rank", "looks"), [(0, list(range(1, 12))), (1, [1, 4, 8])])
def test_slow_steps_are_looked_at_more_often_as_rank_0_says(
    make_trainer: MakeTrainer,
    make_batch: MakeBatch,
    monkeypatch: pytest.MonkeyPatch,
    rank: int,
    looks: list[int],
) -> None:
    monkeypatch.setattr(loop, "LOOK_SECONDS", 0.0)  # every step is slow
    data = long_epoch(make_batch, 12)
    trainer = make_trainer()
    asked: list[int] = []

    def no_wish() -> bool:
        asked.append(trainer.step)
        return False

    def reduce(shared: torch.Tensor) -> torch.Tensor:  # rank 0, where this is another, says 4
        return shared + torch.tensor([0.0, 0.0, 0.0, 0.0, 0.0, 4.0 * rank])[: len(shared)]

    list(
        run_epochs(
            trainer,
            first_epoch=0,
            epochs=1,
            data=lambda _: data,
            seed=0,
            cadence=Cadence(is_wished=no_wish),
            rank=rank,
            reduce=reduce,
        )
    )
    assert asked == looks


def test_a_pace_is_of_the_steps_since_the_last_look() -> None:
    now = 100.0
    pace = Pace(7, seconds=5, most=50, clock=lambda: now)
    now += 20.0
    assert pace.look(8) == 1  # one step took 20 s
    now += 0.5
    assert pace.look(9) == 10
    now += 1.0
    assert pace.look(19) == 50
    assert pace.look(69) == 50  # in no time


def test_an_interval_is_over_once_its_seconds_have_passed_since_the_last_restart() -> None:
    now = 100.0
    interval = Interval(10, clock=lambda: now)
    assert not interval.is_over()
    now = 110.0
    assert interval.is_over()
    interval.restart()
    assert not interval.is_over()
    never = Interval(0, clock=lambda: now)
    now = 1e9
    assert not never.is_over()


def message(reached: Iterator[Any]) -> str:
    with pytest.raises(NonFiniteLossError) as caught:
        list(reached)
    return str(caught.value)


def test_a_loss_of_nan_is_named_by_its_step_and_its_samples(
    make_trainer: MakeTrainer, make_batch: MakeBatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "LOOK_SECONDS", 1e9)
    steps = FINITE_CHECK_STEPS + 20
    batches = [make_batch(8, seed=step) for step in range(steps)]
    trainer = make_trainer()
    plain = trainer.loss

    def loss(logits: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        losses = plain(logits, label)
        if trainer.step == 33:  # the 34th
            losses[[2, 5]] = math.nan
        return losses

    trainer.loss = loss
    data = EpochData(batches, np.full(steps, 8), ())
    said = message(run_epochs(trainer, first_epoch=0, epochs=1, data=lambda _: data, seed=0))
    assert said.splitlines() == [
        "the loss is not finite at step 34, for 2 of its samples: '33/2', '33/5'",
        "hint: lower --optimizer.lr, or warm up",
    ]
    assert trainer.step == FINITE_CHECK_STEPS


@pytest.mark.parametrize("passes", [1, 3])
def test_keys_of_a_loss_of_nan_are_escaped_shortened_and_few(
    make_trainer: MakeTrainer, make_batch: MakeBatch, passes: int
) -> None:
    batch = make_batch(30, seed=1)
    batch["key"] = batch["key"].astype(object)
    batch["key"][0] = "line\nfeed\x1b[31m\u202e\udc80"
    batch["key"][1] = "ü" * 999
    trainer = make_trainer()
    trainer.accumulate_steps = passes
    trainer.loss = lambda logits, label: logits.sum(dim=1) * math.nan
    data = EpochData([batch], np.array([30]), ())
    said = message(run_epochs(trainer, first_epoch=0, epochs=1, data=lambda _: data, seed=0))
    line, _ = said.splitlines()
    assert line.isprintable()
    names = line.partition("samples: ")[2].split(", ")
    assert names[0] == r"'line\nfeed\x1b[31m\u202e\udc80'"
    assert names[1] == "'" + "ü" * (MAX_KEY_CHARACTERS - 2) + "…"
    assert names[2:] == [f"'1/{n}'" for n in range(2, MAX_KEYS)] + ["…"]


def test_no_place_is_reached_with_weights_that_are_not_finite(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(optimizer="sgd")
    trainer.learning_rate = lambda step: math.inf if step == 3 else 0.01
    reached = run(trainer, every=2)
    assert next(reached).step == 2
    with pytest.raises(NonFiniteLossError, match="weights are not finite at step 4"):
        next(reached)


class Killed(Exception):
    """Stands for SIGKILL: nothing of the process runs after it."""


@dataclass(frozen=True)
class MortalStore(LocalStore):
    """Dies before a write, once it has none left; so do all that share ``left``."""

    left: tuple[list[int], ...] = ()

    def write(self, key: str, data: bytes) -> None:
        [left] = self.left
        if left[0] == 0:
            raise Killed
        left[0] -= 1
        super().write(key, data)


def train(trainer: Trainer, run_store: Store, log_store: Store, *, kill_at: int = -1) -> None:
    """What one worker does, until it is done or killed before a step of its own count."""
    checkpoint = load_latest(run_store)
    history = list(checkpoint.history) if checkpoint else []
    begin = Place(len(history))
    if checkpoint is not None:
        restore(trainer, checkpoint)
        begin = checkpoint.place or begin
    log = OrderLog(log_store, rank=0)
    remove_order(log_store, begin=begin)

    def mortal(batches: Iterator[Batch]) -> Iterator[Batch]:
        for number, batch in enumerate(batches):
            if number == kill_at:
                raise Killed
            yield batch

    def feed(epoch: int) -> EpochData:
        place = begin if epoch == begin.epoch else Place(epoch)
        data = data_of(epoch, first_step=place.step)
        batches = log.record(mortal(iter(data.batches)), begin=place)
        return EpochData(batches, data.global_batch_sizes, ())

    with CheckpointWriter(run_store, keep=2, seconds=10) as writer:
        for reached in run_epochs(
            trainer,
            first_epoch=begin.epoch,
            epochs=5,
            data=feed,
            seed=SEED,
            place=begin,
            cadence=Cadence(every_steps=2),
        ):
            if isinstance(reached, EpochResult):
                history.append(reached.to_dict())
            else:
                log.flush()
            place = reached if isinstance(reached, Place) else None
            writer.save(state(trainer, history, place))


def logged(folder: Path) -> list[dict[str, Any]]:
    return [
        row
        for epoch in sorted(folder.iterdir())
        for row in sorted(pq.read_table(epoch).to_pylist(), key=lambda row: row["step"])
    ]


def test_after_twenty_kills_at_random_the_order_log_and_the_weights_are_the_uninterrupted_ones(
    make_trainer: MakeTrainer, tmp_path: Path
) -> None:
    whole = make_trainer(dropout=0.5)
    train(whole, LocalStore(str(tmp_path / "whole")), LocalStore(str(tmp_path / "whole-log")))

    chance = random.Random(3)
    kills = 0
    while True:
        # At a step, or between two writes of the log or of a checkpoint.
        left = ([chance.randrange(12)],) if kills < 20 and chance.random() < 0.7 else ([10**6],)
        kill_at = chance.randrange(4) if kills < 20 else -1
        trainer = make_trainer(dropout=0.5)
        try:
            train(
                trainer,
                MortalStore(str(tmp_path / "run"), left),
                MortalStore(str(tmp_path / "log"), left),
                kill_at=kill_at,
            )
        except Killed:
            kills += 1
        else:
            break
    assert kills >= 20
    assert_same_weights(whole, trainer)
    assert logged(tmp_path / "log") == logged(tmp_path / "whole-log")
    one, other = (load_latest(LocalStore(str(tmp_path / name))) for name in ("whole", "run"))
    assert [r["train_loss"] for r in one.history] == [r["train_loss"] for r in other.history]


def test_the_order_log_of_three_workers_is_gone_on_with_by_two_without_a_seam(
    tmp_path: Path,
) -> None:
    store = LocalStore(str(tmp_path / "log"))
    for rank in range(3):  # killed after six steps, of which four are safe
        log = OrderLog(store, rank=rank)
        batches = log.record(data_of(0, rank=rank, num_workers=3).batches, begin=Place(0))
        for step in range(6):
            if step == 4:
                log.flush()
            next(batches)
    remove_order(store, begin=Place(0, 4))
    for rank in range(2):
        data = data_of(0, first_step=4, rank=rank, num_workers=2)
        list(OrderLog(store, rank=rank).record(data.batches, begin=Place(0, 4)))
    whole = LocalStore(str(tmp_path / "whole"))
    list(OrderLog(whole, rank=0).record(data_of(0).batches, begin=Place(0)))

    def pairs(folder: Path) -> list[tuple[int, str]]:
        return sorted((row["step"], row["key"]) for row in logged(folder))

    assert len(pairs(tmp_path / "log")) == 125
    assert pairs(tmp_path / "log") == pairs(tmp_path / "whole")


def test_a_place_keeps_the_sums_of_its_epoch(make_trainer: MakeTrainer) -> None:
    place = next(iter(run(make_trainer(), every=4)))
    assert isinstance(place.tally, Tally)
    assert place.tally.num_samples == 4 * 16
    assert 0 < place.tally.loss < 2
