"""The average of the weights: its formula, its use, and its way through a checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import nn

from cnnray.datasets.order import Batch
from cnnray.storage import open_store
from cnnray.training.averaging import build_average, restore_average
from cnnray.training.checkpoints import Checkpoint, load_latest, model_tensors, save_checkpoint
from cnnray.training.loop import EpochData, EpochResult, Trainer, evaluate, run_epochs
from cnnray.training.optimizers import restore_optimizer

MakeTrainer = Callable[..., Trainer]
MakeBatch = Callable[..., Batch]


def averaged(make_trainer: MakeTrainer, *, decay: float = 0.8) -> Trainer:
    trainer = make_trainer(lr=0.05)
    trainer.average = build_average(trainer.model, decay=decay)
    return trainer


def run(
    trainer: Trainer, make_batch: MakeBatch, *, first: int = 0, epochs: int
) -> list[EpochResult]:
    def data(epoch: int) -> EpochData:
        batches = [make_batch(16, seed=10 * epoch + step) for step in range(3)]
        return EpochData(batches, np.full(3, 16), [make_batch(32, seed=99)])

    return list(run_epochs(trainer, first_epoch=first, epochs=epochs, data=data, seed=5))


def test_each_step_moves_the_average_by_one_minus_decay_towards_the_weights(
    make_trainer: MakeTrainer, make_batch: MakeBatch
) -> None:
    trainer = averaged(make_trainer, decay=0.8)
    seen: list[torch.Tensor] = []
    trainer.optimizer.register_step_post_hook(
        lambda *_: seen.append(trainer.model.head.weight.detach().clone())
    )
    run(trainer, make_batch, epochs=1)
    expected = seen[0]  # the average begins at the first step's weights
    for weight in seen[1:]:
        expected = 0.8 * expected + 0.2 * weight
    torch.testing.assert_close(trainer.served.head.weight, expected)


def test_the_statistics_of_batch_norm_are_averaged_with_the_weights() -> None:
    model = nn.Sequential(nn.BatchNorm1d(1))
    average = build_average(model, decay=0.75)
    for mean in (4.0, 8.0):
        model[0].running_mean.fill_(mean)
        average.update_parameters(model)
    assert average.module[0].running_mean.item() == 5.0


def test_validation_is_of_the_average(make_trainer: MakeTrainer, make_batch: MakeBatch) -> None:
    trainer = averaged(make_trainer)
    result = run(trainer, make_batch, epochs=1)[-1]
    alone = make_trainer()
    alone.model.load_state_dict(trainer.average.module.state_dict())
    batches = [make_batch(32, seed=99)]
    assert result.val_loss == evaluate(alone, batches, reduce=lambda sums: sums).loss
    alone.model.load_state_dict(trainer.model.state_dict())
    assert result.val_loss != evaluate(alone, batches, reduce=lambda sums: sums).loss


def test_a_resumed_run_with_an_average_is_the_uninterrupted_one_bit_for_bit(
    make_trainer: MakeTrainer, make_batch: MakeBatch, tmp_path: Path
) -> None:
    whole = averaged(make_trainer)
    results = run(whole, make_batch, epochs=3)

    first = averaged(make_trainer)
    [result] = run(first, make_batch, epochs=1)
    state = Checkpoint(
        model=model_tensors(first.served),
        optimizer=first.optimizer.state_dict(),
        step=first.step,
        history=(result.to_dict(),),
        trained=model_tensors(first.trained),
    )
    store = open_store(str(tmp_path))
    save_checkpoint(store, state, keep=1)

    loaded = load_latest(store)
    resumed = averaged(make_trainer)
    resumed.model.load_state_dict(loaded.trained)
    restore_optimizer(resumed.optimizer, loaded.optimizer)
    restore_average(resumed.average, loaded.model, step=loaded.step)
    resumed.step = loaded.step
    rest = run(resumed, make_batch, first=1, epochs=3)

    for one, other in ((whole.trained, resumed.trained), (whole.served, resumed.served)):
        for name, tensor in one.state_dict().items():
            assert torch.equal(tensor, other.state_dict()[name]), name
    assert [r.val_loss for r in results[1:]] == [r.val_loss for r in rest]


def test_a_checkpoint_without_an_average_holds_the_weights_once(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    state = Checkpoint(
        model={"weight": torch.ones(1)},
        optimizer={"state": {}, "param_groups": []},
        step=1,
        history=({"train_loss": 1.0, "val_loss": None},),
    )
    save_checkpoint(store, state, keep=1)
    assert load_latest(store).trained == {}
