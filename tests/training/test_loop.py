"""The loop on a toy problem: learning, resuming, exact sums over ranks, divergence."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cnnray.datasets.order import Batch
from cnnray.errors import NonFiniteLossError
from cnnray.models.classifier import Classifier
from cnnray.storage import open_store
from cnnray.training.checkpoints import Checkpoint, load_latest, model_tensors, save_checkpoint
from cnnray.training.freezing import FrozenEpochs
from cnnray.training.loop import (
    FINITE_CHECK_STEPS,
    EpochData,
    EpochResult,
    Tally,
    Trainer,
    evaluate,
    run_epochs,
)
from cnnray.training.losses import cross_entropy
from cnnray.training.mixing import Mixing
from cnnray.training.optimizers import build_optimizer

MakeTrainer = Callable[..., Trainer]
MakeBatch = Callable[..., Batch]


def epoch_data(make_batch: MakeBatch, epoch: int, *, steps: int = 4, size: int = 16) -> EpochData:
    batches = [make_batch(size, seed=1000 * epoch + step) for step in range(steps)]
    return EpochData(batches, np.full(steps, size), [make_batch(32, seed=99)])


def run(
    trainer: Trainer, make_batch: MakeBatch, *, first: int = 0, epochs: int, **options: Any
) -> list[EpochResult]:
    return list(
        run_epochs(
            trainer,
            first_epoch=first,
            epochs=epochs,
            data=lambda epoch: epoch_data(make_batch, epoch),
            seed=5,
            **options,
        )
    )


def test_it_learns_to_tell_dark_from_light(
    make_trainer: MakeTrainer, make_batch: MakeBatch
) -> None:
    results = run(make_trainer(lr=0.03, dropout=0.1), make_batch, epochs=6)
    assert results[0].val_accuracy < 1.0 or results[0].val_loss > 0.1
    assert results[-1].val_accuracy == 1.0
    assert results[-1].val_loss < 0.5 * results[0].val_loss
    assert [result.epoch for result in results] == list(range(6))
    assert [result.step for result in results] == [4, 8, 12, 16, 20, 24]
    assert all(0 <= result.data_wait_fraction <= 1 for result in results)


@pytest.mark.parametrize("optimizer", ["adam", "sgd", "lamb", "muon"])
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(
    make_trainer: MakeTrainer, make_batch: MakeBatch, tmp_path: Path, optimizer: str
) -> None:
    whole = make_trainer(optimizer=optimizer, dropout=0.5)
    results = run(whole, make_batch, epochs=3)

    first = make_trainer(optimizer=optimizer, dropout=0.5)
    [result] = run(first, make_batch, epochs=1)
    store = open_store(str(tmp_path))
    state = Checkpoint(
        model_tensors(first.model), first.optimizer.state_dict(), first.step, (result.to_dict(),)
    )
    save_checkpoint(store, state, keep=1)

    torch.manual_seed(12345)  # another process has another generator
    loaded = load_latest(store)
    resumed = make_trainer(optimizer=optimizer, dropout=0.5)
    resumed.model.load_state_dict(loaded.model)
    resumed.optimizer.load_state_dict(loaded.optimizer)
    resumed.step = loaded.step
    rest = run(resumed, make_batch, first=loaded.epochs_done, epochs=3)

    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, resumed.model.state_dict()[name]), name
    for one, other in zip(results[1:], rest, strict=True):
        assert (one.train_loss, one.val_loss, one.step) == (
            other.train_loss,
            other.val_loss,
            other.step,
        )


def test_dropout_differs_between_epochs_ranks_and_seeds(
    make_trainer: MakeTrainer, make_batch: MakeBatch
) -> None:
    batch = make_batch(16, seed=1)

    def loss(*, epoch: int, rank: int = 0, seed: int = 0) -> float:
        trainer = make_trainer(lr=0.0, dropout=0.5)
        [result] = run_epochs(
            trainer,
            first_epoch=epoch,
            epochs=epoch + 1,
            data=lambda _: EpochData([batch], np.array([16]), ()),
            seed=seed,
            rank=rank,
        )
        return result.train_loss

    assert loss(epoch=0) == loss(epoch=0)
    assert len({loss(epoch=0), loss(epoch=1), loss(epoch=0, rank=1), loss(epoch=0, seed=1)}) == 4


def part(batch: Batch, start: int, stop: int) -> Batch:
    return Batch(**{name: values[start:stop] for name, values in batch.items()})


@pytest.mark.parametrize("cut", [8, 5, 1])
def test_unequal_parts_of_two_ranks_give_the_gradient_of_the_whole_batch(
    make_trainer: MakeTrainer, make_batch: MakeBatch, cut: int
) -> None:
    batch = make_batch(16, seed=3)

    def gradients(piece: Batch, num_workers: int) -> list[torch.Tensor]:
        trainer = make_trainer(optimizer="sgd", lr=0.0)
        data = EpochData([piece], np.array([16]), ())
        list(
            run_epochs(
                trainer,
                first_epoch=0,
                epochs=1,
                data=lambda _: data,
                seed=0,
                num_workers=num_workers,
            )
        )
        return [parameter.grad for parameter in trainer.model.parameters()]

    whole = gradients(batch, 1)
    first, second = gradients(part(batch, 0, cut), 2), gradients(part(batch, cut, 16), 2)
    for expected, one, other in zip(whole, first, second, strict=True):
        averaged = (one + other) / 2  # what DDP does
        torch.testing.assert_close(averaged, expected, rtol=1e-5, atol=1e-7)


def test_results_are_means_over_the_samples_of_all_ranks(
    make_trainer: MakeTrainer, make_batch: MakeBatch
) -> None:
    # The other rank had 4 samples, a loss sum of 100 and none right (and finite weights).
    other = torch.tensor([100.0, 0.0, 4.0, 1.0, 0.0, 0.0], dtype=torch.float64)
    trainer = make_trainer(lr=0.0)
    batch = make_batch(8, seed=1)
    data = EpochData([batch], np.array([12]), [batch])
    [alone] = run_epochs(
        copy.deepcopy(trainer), first_epoch=0, epochs=1, data=lambda _: data, seed=0
    )
    [both] = run_epochs(
        trainer,
        first_epoch=0,
        epochs=1,
        data=lambda _: data,
        seed=0,
        num_workers=2,
        reduce=lambda sums: sums + other[: len(sums)],
    )
    assert both.train_loss == pytest.approx((8 * alone.train_loss + 100) / 12)
    assert both.val_loss == pytest.approx((8 * alone.val_loss + 100) / 12)
    assert both.val_accuracy == pytest.approx(8 * alone.val_accuracy / 12)


def test_evaluate_counts_exactly(make_trainer: MakeTrainer, make_batch: MakeBatch) -> None:
    trainer = make_trainer(dropout=0.9)
    batches = [make_batch(size, seed=size) for size in (7, 1, 13)]
    tally = evaluate(trainer, batches, reduce=lambda sums: sums)
    trainer.model.eval()
    image = torch.from_numpy(np.concatenate([batch["image"] for batch in batches]))
    label = torch.from_numpy(np.concatenate([batch["label"] for batch in batches]))
    with torch.no_grad():
        logits = trainer.model(image)
    assert tally.num_samples == 21
    assert tally.num_correct == (logits.argmax(1) == label).sum().item()
    loss = torch.nn.functional.cross_entropy(logits, label, reduction="sum").item()
    assert tally.loss_sum == pytest.approx(loss, rel=1e-6)
    assert tally.accuracy == tally.num_correct / 21


def test_evaluation_changes_nothing(make_trainer: MakeTrainer, make_batch: MakeBatch) -> None:
    trainer = make_trainer()
    before = copy.deepcopy(trainer.model.state_dict())
    evaluate(trainer, [make_batch(8, seed=1)], reduce=lambda sums: sums)
    assert all(torch.equal(before[name], t) for name, t in trainer.model.state_dict().items())
    assert trainer.step == 0


def test_no_validation_is_none_and_not_zero(
    make_trainer: MakeTrainer, make_batch: MakeBatch
) -> None:
    data = EpochData([make_batch(8, seed=1)], np.array([8]), ())
    [result] = run_epochs(make_trainer(), first_epoch=0, epochs=1, data=lambda _: data, seed=0)
    assert (result.val_loss, result.val_accuracy) == (None, None)


def test_a_tally_of_nothing_has_no_mean() -> None:
    assert math.isnan(Tally().loss)
    assert math.isnan(Tally().accuracy)


def diverging(trainer: Trainer, *, at: int) -> Trainer:
    plain = trainer.loss
    trainer.loss = lambda logits, label: (
        plain(logits, label) + (math.nan if trainer.step == at else 0.0)
    )
    return trainer


def test_a_loss_of_nan_ends_the_epoch_in_its_own_error(
    make_trainer: MakeTrainer, make_batch: MakeBatch
) -> None:
    with pytest.raises(NonFiniteLossError, match="not finite at step 2") as caught:
        run(diverging(make_trainer(), at=1), make_batch, epochs=1)
    assert "--optimizer.lr" in str(caught.value)


def test_a_loss_of_nan_is_found_within_a_bounded_number_of_steps(
    make_trainer: MakeTrainer, make_batch: MakeBatch
) -> None:
    steps = 3 * FINITE_CHECK_STEPS
    batch = make_batch(2, seed=1)
    trainer = diverging(make_trainer(), at=FINITE_CHECK_STEPS + 3)
    data = EpochData([batch] * steps, np.full(steps, 2), ())
    with pytest.raises(NonFiniteLossError):
        list(run_epochs(trainer, first_epoch=0, epochs=1, data=lambda _: data, seed=0))
    assert FINITE_CHECK_STEPS + 3 <= trainer.step <= 2 * FINITE_CHECK_STEPS


@pytest.mark.parametrize("given", [3, 5])
def test_more_or_fewer_batches_than_promised_are_an_error(
    make_trainer: MakeTrainer, make_batch: MakeBatch, given: int
) -> None:
    data = EpochData([make_batch(4, seed=1)] * given, np.full(4, 4), ())
    with pytest.raises(ValueError, match="zip"):
        list(run_epochs(make_trainer(), first_epoch=0, epochs=1, data=lambda _: data, seed=0))


def test_the_learning_rate_is_that_of_the_step(
    make_trainer: MakeTrainer, make_batch: MakeBatch
) -> None:
    trainer = make_trainer()
    asked: list[int] = []
    trainer.learning_rate = lambda step: asked.append(step) or 0.1 * (step + 1)
    results = run(trainer, make_batch, epochs=2)
    assert asked == list(range(8))
    assert [result.learning_rate for result in results] == pytest.approx([0.4, 0.8])


def test_read_only_and_strided_arrays_are_taken(
    make_trainer: MakeTrainer, make_batch: MakeBatch
) -> None:
    batch = make_batch(8, seed=1)
    odd = Batch(image=batch["image"][::2], label=batch["label"][::2], key=batch["key"][::2])
    odd["image"].flags.writeable = False
    odd["label"].flags.writeable = False
    data = EpochData([odd], np.array([4]), [odd])
    [result] = run_epochs(make_trainer(), first_epoch=0, epochs=1, data=lambda _: data, seed=0)
    assert math.isfinite(result.train_loss)


def test_three_steps_give_the_losses_that_they_always_gave(
    make_trainer: MakeTrainer, make_batch: MakeBatch
) -> None:
    trainer = make_trainer(lr=0.05)
    losses = []
    for step in range(3):
        data = EpochData([make_batch(16, seed=step)], np.array([16]), ())
        [result] = run_epochs(
            trainer, first_epoch=step, epochs=step + 1, data=lambda _, data=data: data, seed=0
        )
        losses.append(result.train_loss)
    assert losses == pytest.approx([0.885557, 0.672089, 0.676979], abs=1e-5)


def test_validation_is_measured_without_what_regularises_training(
    make_trainer: MakeTrainer, make_batch: MakeBatch
) -> None:
    trainer = make_trainer(lr=0.0)
    plain = trainer.loss
    trainer.loss = lambda logits, label: plain(logits, label) + 10
    trainer.eval_loss = plain
    batch = make_batch(8, seed=1)
    data = EpochData([batch], np.array([8]), [batch])
    [result] = run_epochs(trainer, first_epoch=0, epochs=1, data=lambda _: data, seed=0)
    assert result.train_loss == pytest.approx(result.val_loss + 10)


def step_once(trainer: Trainer, batch: Batch, *, epoch: int = 0) -> EpochResult:
    data = EpochData([batch], np.array([len(batch["label"])]), ())
    [result] = run_epochs(trainer, first_epoch=epoch, epochs=epoch + 1, data=lambda _: data, seed=0)
    return result


def copies(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


@pytest.mark.parametrize("passes", [2, 3, 16, 99])
def test_a_batch_in_several_passes_gives_the_same_step_as_in_one(
    make_trainer: MakeTrainer, make_batch: MakeBatch, passes: int
) -> None:
    whole, cut = make_trainer(optimizer="sgd", lr=0.1), make_trainer(optimizer="sgd", lr=0.1)
    cut.accumulate_steps = passes
    sizes: list[int] = []
    cut.model.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    batch = make_batch(16, seed=1)
    one, other = step_once(whole, batch), step_once(cut, batch)
    assert (len(sizes), sum(sizes)) == (min(passes, 16), 16)
    assert (other.step, other.train_loss) == (1, pytest.approx(one.train_loss))
    for name, tensor in copies(whole).items():
        torch.testing.assert_close(copies(cut)[name], tensor)


def test_ddp_averages_once_however_many_passes_a_batch_takes(
    make_trainer: MakeTrainer, make_batch: MakeBatch
) -> None:
    alone, wrapped = make_trainer(optimizer="sgd", lr=0.1), make_trainer(optimizer="sgd", lr=0.1)
    averages: list[int] = []

    def count(_, bucket):  # torch reads the annotations, which are texts here
        averages.append(bucket.index())
        done = torch.futures.Future()
        done.set_result(bucket.buffer())
        return done

    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    try:
        wrapped.model = torch.nn.parallel.DistributedDataParallel(wrapped.model)
        wrapped.model.register_comm_hook(None, count)
        wrapped.accumulate_steps = 4
        batch = make_batch(16, seed=1)
        step_once(wrapped, batch)
    finally:
        torch.distributed.destroy_process_group()
    step_once(alone, batch)
    assert averages == [0]
    for name, tensor in copies(alone).items():
        torch.testing.assert_close(copies(wrapped)[f"module.{name}"], tensor)


def test_a_large_gradient_is_cut_to_the_norm_and_a_small_one_is_left(
    make_trainer: MakeTrainer, make_batch: MakeBatch
) -> None:
    batch = make_batch(16, seed=1)

    def gradient(clip_norm: float | None) -> torch.Tensor:
        trainer = make_trainer(optimizer="sgd", lr=0.0)
        trainer.clip_norm = clip_norm
        step_once(trainer, batch)
        return torch.cat([p.grad.flatten() for p in trainer.model.parameters()])

    whole = gradient(None)
    norm = float(whole.norm())
    torch.testing.assert_close(gradient(norm / 4), whole / 4)
    torch.testing.assert_close(gradient(norm * 4), whole)


def test_each_group_learns_at_its_own_part_of_the_rate(
    make_trainer: MakeTrainer, make_batch: MakeBatch
) -> None:
    trainer = make_trainer(optimizer="sgd", lr=0.1)
    trainer.optimizer = build_optimizer(trainer.model, name="sgd", lr=9.0, layer_decay=0.5)
    result = step_once(trainer, make_batch(16, seed=1))
    rates = {group["lr_scale"]: group["lr"] for group in trainer.optimizer.param_groups}
    assert rates == {0.5: pytest.approx(0.05), 1.0: pytest.approx(0.1)}
    assert result.learning_rate == 0.1


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_the_backbone_stays_bit_for_bit_until_its_frozen_epochs_are_over(
    make_batch: MakeBatch, optimizer: str
) -> None:
    torch.manual_seed(0)
    backbone = torch.nn.Sequential(
        torch.nn.Conv2d(1, 4, 3),
        torch.nn.BatchNorm2d(4),
        torch.nn.Flatten(),
        torch.nn.Linear(16, 2),
    )
    classifier = Classifier(backbone, mean=[0.5], std=[0.5], head="3")
    trainer = Trainer(
        model=classifier,
        optimizer=build_optimizer(classifier, name=optimizer, lr=0.1, weight_decay=0.1),
        loss=cross_entropy,
        learning_rate=lambda step: 0.1,
        device=torch.device("cpu"),
        freeze=FrozenEpochs(classifier, epochs=1),
    )

    def moved(epoch: int) -> set[str]:
        before = {name: tensor.clone() for name, tensor in classifier.state_dict().items()}
        step_once(trainer, make_batch(16, seed=1), epoch=epoch)
        after = classifier.state_dict()
        return {name for name in before if not torch.equal(before[name], after[name])}

    assert moved(0) == {"backbone.3.weight", "backbone.3.bias"}
    assert moved(1) >= {"backbone.0.weight", "backbone.1.running_mean", "backbone.3.weight"}


def mixed(trainer: Trainer) -> Trainer:
    trainer.transform = Mixing(num_classes=2, seed=5, mixup_alpha=1.0, cutmix_alpha=1.0)
    return trainer


def test_mixing_is_that_of_the_step_also_after_a_resume(
    make_trainer: MakeTrainer, make_batch: MakeBatch
) -> None:
    whole, resumed = mixed(make_trainer()), mixed(make_trainer())
    plain = run(make_trainer(), make_batch, epochs=2)
    results = run(whole, make_batch, epochs=2)
    assert results[0].train_loss != plain[0].train_loss
    run(resumed, make_batch, epochs=1)
    torch.manual_seed(12345)  # another process has another generator
    [last] = run(resumed, make_batch, first=1, epochs=2)
    assert last.train_loss == results[1].train_loss
    for name, tensor in copies(whole).items():
        assert torch.equal(copies(resumed)[name], tensor), name


def test_a_batch_is_mixed_whole_however_many_passes_it_takes(
    make_trainer: MakeTrainer, make_batch: MakeBatch
) -> None:
    whole, cut = (mixed(make_trainer(optimizer="sgd", lr=0.1)) for _ in range(2))
    cut.accumulate_steps = 3
    batch = make_batch(16, seed=1)
    one, other = step_once(whole, batch), step_once(cut, batch)
    assert other.train_loss == pytest.approx(one.train_loss)
    for name, tensor in copies(whole).items():
        torch.testing.assert_close(copies(cut)[name], tensor)


def test_training_accuracy_is_of_the_larger_part_of_a_mixture(
    make_trainer: MakeTrainer, make_batch: MakeBatch
) -> None:
    trainer = make_trainer(lr=0.0)
    with torch.no_grad():
        trainer.model.head.weight.zero_()
        trainer.model.head.bias.copy_(torch.tensor([1.0, 0.0]))  # always names class 0
    batch = make_batch(4, seed=1)
    batch["label"][:] = 1
    targets = torch.tensor([[0.6, 0.4], [0.4, 0.6], [0.9, 0.1], [0.8, 0.2]])
    trainer.transform = lambda image, label, step: (image, targets)
    assert step_once(trainer, batch).train_accuracy == 0.75


def test_validation_images_are_not_mixed(make_trainer: MakeTrainer, make_batch: MakeBatch) -> None:
    batches = [make_batch(8, seed=1)]
    tallies = [
        evaluate(trainer, batches, reduce=lambda sums: sums)
        for trainer in (make_trainer(), mixed(make_trainer()))
    ]
    assert tallies[0] == tallies[1]


def test_mixing_is_told_the_step_of_the_run(
    make_trainer: MakeTrainer, make_batch: MakeBatch
) -> None:
    trainer = make_trainer()
    told: list[int] = []
    trainer.transform = lambda image, label, step: told.append(step) or (image, label)
    run(trainer, make_batch, epochs=2)
    assert told == list(range(8))
