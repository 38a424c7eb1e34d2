"""Checkpoints: what is saved is what is restored, and what is damaged is passed over."""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import math
import threading
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from cnnray.errors import CnnrayError, NonFiniteLossError, StorageError, UnavailableError
from cnnray.storage import LocalStore, Store, open_store
from cnnray.training.checkpoints import (
    FILES,
    MANIFEST,
    Checkpoint,
    CheckpointWriter,
    delete_checkpoints,
    load_checkpoint,
    load_latest,
    model_tensors,
    save_checkpoint,
)
from cnnray.training.loop import EpochData, Trainer, run_epochs
from cnnray.training.places import Place, Tally


def record(epoch: int, *, train: float = 1.0, val: float | None = None) -> dict[str, Any]:
    return {"epoch": epoch, "train_loss": train, "val_loss": val}


def checkpoint(val_losses: list[float | None], *, value: float = 0.0) -> Checkpoint:
    """After so many epochs with these validation losses."""
    return Checkpoint(
        model={"weight": torch.full((2, 3), value)},
        optimizer={"state": {}, "param_groups": [{"lr": 0.1, "params": [0]}]},
        step=10 * len(val_losses),
        history=tuple(record(n, val=loss) for n, loss in enumerate(val_losses)),
    )


def save_epochs(store: Store, val_losses: list[float | None], *, keep: int = 99) -> None:
    for epochs in range(1, len(val_losses) + 1):
        save_checkpoint(store, checkpoint(val_losses[:epochs], value=float(epochs)), keep=keep)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(str(tmp_path / "run"))


def assert_same(left: Any, right: Any) -> None:
    """Equal, bit for bit, at any depth; lists and tuples are alike."""
    if isinstance(left, torch.Tensor):
        assert left.dtype == right.dtype
        assert torch.equal(left, right)
    elif isinstance(left, dict):
        assert left.keys() == right.keys()
        for key in left:
            assert_same(left[key], right[key])
    elif isinstance(left, list | tuple):
        assert len(left) == len(right)
        for one, other in zip(left, right, strict=True):
            assert_same(one, other)
    else:
        assert left == right


@pytest.mark.parametrize("name", ["adam", "adamw", "sgd", "lamb"])
def test_model_optimizer_step_and_history_come_back_bit_for_bit(
    store: Store, make_trainer: Callable[..., Trainer], make_batch: Callable[..., Any], name: str
) -> None:
    trainer = make_trainer(optimizer=name, lr=1 / 3)
    data = EpochData([make_batch(8, seed=1), make_batch(8, seed=2)], torch.tensor([8, 8]), ())
    [result] = run_epochs(trainer, first_epoch=0, epochs=1, data=lambda _: data, seed=0)
    saved = Checkpoint(
        model=model_tensors(trainer.model),
        optimizer=trainer.optimizer.state_dict(),
        step=trainer.step,
        history=(result.to_dict(),),
    )
    save_checkpoint(store, saved, keep=1)
    loaded = load_latest(store)
    assert_same(saved.model, loaded.model)
    assert_same(saved.optimizer, loaded.optimizer)
    assert (loaded.step, loaded.history) == (2, saved.history)
    other = make_trainer(optimizer=name, lr=0.5)
    other.optimizer.load_state_dict(loaded.optimizer)
    assert_same(saved.optimizer, other.optimizer.state_dict())


def test_without_a_checkpoint_there_is_none(store: Store) -> None:
    assert load_latest(store) is None
    store.write("settings.json", b"{}")
    store.write("epoch-x/state.json", b"{}")
    assert load_latest(store) is None


@pytest.mark.parametrize(
    ("val_losses", "keep", "kept"),
    [
        ([5, 4, 3, 2, 1], 2, [3, 4]),
        ([1, 2, 3, 4, 5], 2, [0, 3, 4]),
        ([3, 1, 2, 4, 5], 1, [1, 4]),
        ([3, 1, 2, 0, 5], 1, [3, 4]),
        ([2, 2, 2], 1, [0, 2]),
        ([1, 2], 5, [0, 1]),
    ],
)
def test_the_last_ones_and_the_best_are_kept(
    store: Store, val_losses: list[float | None], keep: int, kept: list[int]
) -> None:
    save_epochs(store, val_losses, keep=keep)
    assert store.list_folders() == [f"epoch-{epoch:05d}" for epoch in kept]
    assert load_latest(store).epochs_done == len(val_losses)


@pytest.mark.parametrize(
    ("history", "best"),
    [
        ([record(0, val=2.0), record(1, val=1.0), record(2, val=3.0)], 1),
        ([record(0, val=1.0), record(1, val=1.0)], 0),
        ([record(0, train=3.0), record(1, train=1.0), record(2, train=2.0)], 1),
        ([record(0, val=math.nan), record(1, val=9.0)], 1),
        ([record(0, val=9.0), record(1, val=math.nan), record(2, val=1.0)], 2),
        ([record(0, val=math.nan), record(1, val=math.inf)], 0),
    ],
)
def test_the_best_epoch_has_the_lowest_loss_and_nan_is_never_low(
    history: list[dict[str, Any]], best: int
) -> None:
    assert Checkpoint(model={}, optimizer={}, step=0, history=tuple(history)).best_epoch == best


def flip(store: Store, key: str, *, at: int) -> None:
    data = bytearray(store.read(key))
    data[at] ^= 1
    store.write(key, bytes(data))


@pytest.mark.parametrize("name", [*FILES, MANIFEST])
@pytest.mark.parametrize("damage", ["first bit", "last bit", "truncated", "empty", "missing"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_is_used(
    store: Store, caplog: pytest.LogCaptureFixture, name: str, damage: str
) -> None:
    save_epochs(store, [3.0, 2.0, 1.0])
    key = f"epoch-00002/{name}"
    if damage == "missing":
        store.delete(key)
    elif damage == "truncated":
        store.write(key, store.read(key)[:-20])
    elif damage == "empty":
        store.write(key, b"")
    else:
        flip(store, key, at=0 if damage == "first bit" else -2)
    with caplog.at_level(logging.WARNING):
        loaded = load_latest(store)
    assert loaded.epochs_done == 2
    assert loaded.model["weight"][0, 0] == 2.0
    assert load_checkpoint(store, 2) is None
    assert "checkpoint passed over" in caplog.text
    assert "epoch-00002" in caplog.text


@pytest.mark.parametrize(
    "manifest",
    ["null", "[]", "3", '"text"', "{}", '{"sha256": 3}', '{"sha256": {}}', '{"sha256": null}'],
)
def test_a_manifest_of_another_shape_is_damage(store: Store, manifest: str) -> None:
    save_epochs(store, [2.0, 1.0])
    store.write(f"epoch-00001/{MANIFEST}", manifest.encode())
    assert load_latest(store).epochs_done == 1


def test_when_all_are_damaged_there_is_none(store: Store) -> None:
    save_epochs(store, [2.0, 1.0])
    for folder in store.list_folders():
        flip(store, f"{folder}/state.json", at=3)
    assert load_latest(store) is None


def test_a_damaged_checkpoint_is_replaced_by_the_repeated_epoch(store: Store) -> None:
    save_epochs(store, [2.0, 1.0])
    flip(store, "epoch-00001/model.safetensors", at=-1)
    save_checkpoint(store, checkpoint([2.0, 1.0], value=7.0), keep=2)
    assert load_latest(store).model["weight"][0, 0] == 7.0


def test_nothing_is_pickled(store: Store) -> None:
    save_epochs(store, [1.0])
    files = {item.key: store.read(item.key) for item in store.list()}
    assert sorted(files) == sorted(f"epoch-00000/{name}" for name in (*FILES, MANIFEST))
    for key, data in files.items():
        if key.endswith(".json"):
            json.loads(data)
        else:  # safetensors: the length of a JSON header, the header
            length = int.from_bytes(data[:8], "little")
            json.loads(data[8 : 8 + length])


def test_the_manifest_is_written_last_and_deleted_first(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[str, str]] = []
    for method in ("write", "delete"):
        original = getattr(type(store), method)

        def spy(self, key, *rest, method=method, original=original):
            calls.append((method, key.rsplit("/", 1)[1]))
            original(self, key, *rest)

        monkeypatch.setattr(type(store), method, spy)
    save_epochs(store, [2.0, 1.0], keep=1)
    writes = [name for method, name in calls if method == "write"]
    deletes = [name for method, name in calls if method == "delete"]
    assert writes[3::4] == [MANIFEST, MANIFEST]
    assert deletes[0] == MANIFEST


def test_delete_removes_every_checkpoint_and_nothing_else(store: Store) -> None:
    save_epochs(store, [2.0, 1.0])
    store.write("settings.json", b"{}")
    delete_checkpoints(store)
    assert [item.key for item in store.list()] == ["settings.json"]
    delete_checkpoints(store)


def test_a_validation_loss_that_is_not_finite_ends_the_run_in_its_own_error(
    make_trainer: Callable[..., Trainer], make_batch: Callable[..., Any]
) -> None:
    trainer = make_trainer(lr=0.0)
    plain = trainer.loss
    trainer.loss = lambda logits, label: (
        plain(logits, label) + (0.0 if trainer.model.training else math.nan)
    )
    batch = make_batch(8, seed=1)
    data = EpochData([batch], torch.tensor([8]), [batch])
    with pytest.raises(NonFiniteLossError, match="validation"):
        list(run_epochs(trainer, first_epoch=0, epochs=1, data=lambda _: data, seed=0))


def inside(val_losses: list[float | None], step: int, *, value: float = 0.0) -> Checkpoint:
    """After so many epochs and ``step`` steps of the next one."""
    place = Place(len(val_losses), step, Tally(1 / 3, 2.0, 3.0))
    return replace(checkpoint(val_losses, value=value), place=place)


def test_a_place_in_the_first_epoch_comes_back_with_its_sums_to_the_bit(store: Store) -> None:
    save_checkpoint(store, inside([], 120, value=4.0), keep=2)
    assert store.list_folders() == ["epoch-00000-step-00000120"]
    loaded = load_latest(store)
    assert loaded.place == Place(0, 120, Tally(1 / 3, 2.0, 3.0))
    assert (loaded.epochs_done, loaded.history) == (0, ())
    assert loaded.model["weight"][0, 0] == 4.0


def test_a_place_is_newer_than_the_epoch_before_it_and_older_than_its_own(store: Store) -> None:
    save_checkpoint(store, checkpoint([3.0]), keep=2)
    save_checkpoint(store, inside([3.0], 7), keep=2)
    assert load_latest(store).position == (1, 7)
    save_checkpoint(store, inside([3.0], 11), keep=2)
    assert load_latest(store).position == (1, 11)
    save_checkpoint(store, checkpoint([3.0, 2.0]), keep=2)
    assert load_latest(store).position == (2, 0)
    assert load_latest(store).place is None


def test_from_damaged_places_one_falls_back_step_by_step(store: Store) -> None:
    save_checkpoint(store, checkpoint([3.0]), keep=2)
    for step in (10, 20):
        save_checkpoint(store, inside([3.0], step), keep=2)
    save_checkpoint(store, checkpoint([3.0, 2.0]), keep=2)
    seen = []
    for folder in ("epoch-00001", "epoch-00001-step-00000020", "epoch-00001-step-00000010"):
        seen.append(load_latest(store).position)
        flip(store, f"{folder}/model.safetensors", at=-1)
    assert [*seen, load_latest(store).position] == [(2, 0), (1, 20), (1, 10), (1, 0)]


def test_the_last_two_places_are_kept_beside_the_epochs(store: Store) -> None:
    for epochs in range(4):
        if epochs:
            save_checkpoint(store, checkpoint([1.0, 2.0, 3.0][:epochs]), keep=1)
        for step in (10, 20, 30):
            save_checkpoint(store, inside([1.0, 2.0, 3.0][:epochs], step), keep=1)
    assert store.list_folders() == [
        "epoch-00000",  # the best
        "epoch-00002",  # the last
        "epoch-00003-step-00000020",
        "epoch-00003-step-00000030",
    ]


def test_a_damaged_place_does_not_outlive_what_is_written_before_it(store: Store) -> None:
    for step in (10, 20):
        save_checkpoint(store, inside([], step), keep=2)
    flip(store, "epoch-00000-step-00000020/state.json", at=3)
    assert load_latest(store).position == (0, 10)
    save_checkpoint(store, inside([], 15), keep=2)
    assert store.list_folders() == ["epoch-00000-step-00000010", "epoch-00000-step-00000015"]


def test_a_checkpoint_of_an_older_version_is_read(store: Store) -> None:
    save_epochs(store, [2.0])
    state = json.loads(store.read("epoch-00000/state.json"))
    assert state.pop("place", "absent") is None
    files = {name: store.read(f"epoch-00000/{name}") for name in FILES}
    files["state.json"] = json.dumps(state).encode()
    store.write("epoch-00000/state.json", files["state.json"])
    digests = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
    store.write(f"epoch-00000/{MANIFEST}", json.dumps({"sha256": digests}).encode())
    assert load_latest(store).position == (1, 0)


def test_places_are_deleted_with_the_rest(store: Store) -> None:
    save_checkpoint(store, inside([], 5), keep=2)
    delete_checkpoints(store)
    assert list(store.list_folders()) == []


@dataclass(frozen=True)
class SlowStore(LocalStore):
    """Waits with each write until it may; fails where it must."""

    may: threading.Event = field(default_factory=threading.Event)
    fails: tuple[str, ...] = ()

    def write(self, key: str, data: bytes) -> None:
        assert self.may.wait(20)
        if any(name in key for name in self.fails):
            raise StorageError(f"no room for {key}")
        super().write(key, data)


@dataclass(frozen=True)
class AwayStore(LocalStore):
    """Cannot be reached."""

    def read(self, key: str, **options: Any) -> bytes:
        raise UnavailableError("no answer")


def test_a_store_that_is_away_is_no_damage(store: Store) -> None:
    save_epochs(store, [1.0])
    with pytest.raises(UnavailableError):
        load_latest(AwayStore(store.root))


def test_training_goes_on_while_a_copy_of_its_state_is_written(
    tmp_path: Path, make_trainer: Callable[..., Trainer], make_batch: Callable[..., Any]
) -> None:
    store = SlowStore(str(tmp_path))
    trainer = make_trainer(optimizer="adam")
    data = EpochData([make_batch(8, seed=1)], torch.tensor([8]), ())
    list(run_epochs(trainer, first_epoch=0, epochs=1, data=lambda _: data, seed=0))
    before = Checkpoint(
        model={name: tensor.clone() for name, tensor in trainer.model.state_dict().items()},
        optimizer=copy.deepcopy(trainer.optimizer.state_dict()),
        step=1,
        history=(),
    )
    with CheckpointWriter(store, keep=2, seconds=20) as writer:
        state = replace(before, model=model_tensors(trainer.model), place=Place(0, 1))
        writer.save(replace(state, optimizer=trainer.optimizer.state_dict()))
        list(run_epochs(trainer, first_epoch=1, epochs=3, data=lambda _: data, seed=0))
        store.may.set()
    loaded = load_latest(store)
    assert_same(before.model, loaded.model)
    assert_same(before.optimizer, loaded.optimizer)
    assert not torch.equal(loaded.model["head.weight"], trainer.model.head.weight)


def test_a_checkpoint_waits_for_the_one_before_it(tmp_path: Path) -> None:
    store = SlowStore(str(tmp_path))
    with CheckpointWriter(store, keep=2, seconds=20) as writer:
        writer.save(inside([], 1))
        second = threading.Thread(target=writer.save, args=(inside([], 2),))
        second.start()
        second.join(0.2)
        assert second.is_alive()
        store.may.set()
        second.join(20)
        assert not second.is_alive()
    assert load_latest(store).position == (0, 2)


def test_an_error_of_the_writer_is_raised_by_the_next_call_and_once(tmp_path: Path) -> None:
    store = SlowStore(str(tmp_path), fails=("step-00000001/state",))
    store.may.set()
    writer = CheckpointWriter(store, keep=2, seconds=20)
    writer.save(inside([], 1))
    with pytest.raises(StorageError, match="no room"):
        writer.save(inside([], 2))
    writer.save(inside([], 3))
    writer.close()
    assert load_latest(store).position == (0, 3)


def test_an_error_of_the_last_checkpoint_is_raised_at_the_end(tmp_path: Path) -> None:
    store = SlowStore(str(tmp_path), fails=("state",))
    store.may.set()
    writer = CheckpointWriter(store, keep=2, seconds=20)
    writer.save(inside([], 1))
    with pytest.raises(StorageError, match="no room"):
        writer.close()


def test_a_checkpoint_that_is_not_written_in_time_is_an_error(tmp_path: Path) -> None:
    store = SlowStore(str(tmp_path))
    writer = CheckpointWriter(store, keep=2, seconds=0.1)
    writer.save(inside([], 1))
    with pytest.raises(CnnrayError, match=r"not written to .* within 0.1 s"):
        writer.save(inside([], 2))
    store.may.set()
    writer.close()


def diverge(store: Store, checkpoint: Checkpoint) -> None:
    with CheckpointWriter(store, keep=2, seconds=20) as writer:
        writer.save(checkpoint)
        raise NonFiniteLossError("the loss is not finite")


def test_a_run_that_diverges_leaves_the_checkpoint_that_was_being_written(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = SlowStore(str(tmp_path))
    threading.Timer(0.2, store.may.set).start()
    with pytest.raises(NonFiniteLossError):
        diverge(store, inside([], 1))
    assert load_latest(store).position == (0, 1)
    with pytest.raises(NonFiniteLossError):
        diverge(replace(store, fails=("state",)), inside([], 2))
    assert "a checkpoint was not written: no room" in caplog.text
