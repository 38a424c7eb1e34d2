"""Checkpoints of a run: tensors as safetensors, the rest as JSON, a digest manifest written last.

    <folder>/epoch-00003/model.safetensors  optimizer.safetensors  state.json  MANIFEST.json

A checkpoint without its manifest does not exist; one whose digests do not match is passed over for
the one before it. Nothing is ever unpickled.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from cnnray.errors import MissingObjectError, StorageError
from cnnray.storage import Store, encode_json, read_json, sha256

logger = logging.getLogger(__name__)

MANIFEST = "MANIFEST.json"
FILES = ("model.safetensors", "optimizer.safetensors", "state.json")
TRAINED = "trained/"
"""Begins the names of weights that go on learning, in the optimizer's file."""
GROUP = "group/"
"""Begins the names of what belongs to a whole group of parameters there."""


@dataclass(frozen=True)
class Checkpoint:
    """The state of training after ``history``'s last epoch."""

    model: dict[str, Tensor]  # what is evaluated, and saved in the bundle
    optimizer: dict[str, Any]  # a torch optimizer's state_dict
    step: int
    history: tuple[dict[str, Any], ...]  # one EpochResult.to_dict() an epoch
    trained: dict[str, Tensor] = field(default_factory=dict)  # where ``model`` is their average

    @property
    def epochs_done(self) -> int:
        """Epochs that are complete."""
        return len(self.history)

    @property
    def best_epoch(self) -> int:
        """The epoch with the lowest validation loss (training loss without validation)."""
        return min(range(len(self.history)), key=lambda epoch: score(self.history[epoch]))


def score(result: Mapping[str, Any]) -> float:
    """What the epochs of a history are ranked by: the validation loss, else the training loss."""
    loss = result["train_loss"] if result["val_loss"] is None else result["val_loss"]
    return math.inf if math.isnan(loss) else float(loss)  # NaN would win or lose by its place


def save_checkpoint(store: Store, checkpoint: Checkpoint, *, keep: int) -> None:
    """Write a checkpoint and remove those that are neither among the last ``keep`` nor the best."""
    folder = _folder(checkpoint.epochs_done - 1)
    tensors, groups = _split_optimizer(checkpoint.optimizer)
    tensors |= {f"{TRAINED}{name}": tensor for name, tensor in checkpoint.trained.items()}
    files = {
        "model.safetensors": safetensors.torch.save(_contiguous(checkpoint.model)),
        "optimizer.safetensors": safetensors.torch.save(_contiguous(tensors)),
        "state.json": encode_json(
            {
                "step": checkpoint.step,
                "history": list(checkpoint.history),
                "optimizer": groups,
            }
        ),
    }
    for name, data in files.items():
        store.write(f"{folder}/{name}", data)
    digests = {name: sha256(data) for name, data in files.items()}
    store.write(f"{folder}/{MANIFEST}", encode_json({"sha256": digests}))
    _prune(store, checkpoint, keep=keep)


def load_latest(store: Store) -> Checkpoint | None:
    """The newest checkpoint that is whole, or None. Damaged ones are named in the log."""
    for epoch in sorted(_epochs(store), reverse=True):
        checkpoint = load_checkpoint(store, epoch)
        if checkpoint is not None:
            return checkpoint
    return None


def load_checkpoint(store: Store, epoch: int) -> Checkpoint | None:
    """The checkpoint after a 0-based epoch, or None when it is damaged or not there."""
    folder = _folder(epoch)
    try:
        digests = read_json(store, f"{folder}/{MANIFEST}")["sha256"]
        files = {name: store.read(f"{folder}/{name}") for name in FILES}
        damaged = [name for name, data in files.items() if sha256(data) != digests[name]]
    except MissingObjectError as error:
        logger.warning("incomplete checkpoint passed over: %s", error)
        return None
    except (StorageError, KeyError, TypeError) as error:
        damaged = [f"{MANIFEST} ({error})"]
    if damaged:
        logger.warning("damaged checkpoint passed over: %s/%s: %s", store.uri, folder, damaged)
        return None
    state = json.loads(files["state.json"])
    tensors = safetensors.torch.load(files["optimizer.safetensors"])
    trained = {name: tensors.pop(name) for name in list(tensors) if name.startswith(TRAINED)}
    return Checkpoint(
        model=safetensors.torch.load(files["model.safetensors"]),
        optimizer=_join_optimizer(tensors, state["optimizer"]),
        step=state["step"],
        history=tuple(state["history"]),
        trained={name.removeprefix(TRAINED): tensor for name, tensor in trained.items()},
    )


def delete_checkpoints(store: Store) -> None:
    """Remove every checkpoint, manifests first."""
    for epoch in _epochs(store):
        _delete(store, epoch)


def _folder(epoch: int) -> str:
    return f"epoch-{epoch:05d}"


def _epochs(store: Store) -> list[int]:
    try:
        names = store.list_folders()
    except MissingObjectError:
        return []
    return [int(name[6:]) for name in names if name.startswith("epoch-") and name[6:].isdecimal()]


def _prune(store: Store, checkpoint: Checkpoint, *, keep: int) -> None:
    newest = checkpoint.epochs_done - 1
    kept = {*range(newest - keep + 1, newest + 1), checkpoint.best_epoch}
    for epoch in _epochs(store):
        if epoch not in kept and epoch < newest:
            _delete(store, epoch)


def _delete(store: Store, epoch: int) -> None:
    for name in (MANIFEST, *FILES):  # the manifest first: a half-deleted checkpoint is none
        store.delete(f"{_folder(epoch)}/{name}")


def _contiguous(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}


def _split_optimizer(state: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An optimizer's state as named tensors and the JSON-able rest."""
    tensors, scalars = _by_kind(_flat(state["state"]))
    of_groups = _flat(dict(enumerate(state["param_groups"])))
    group_tensors, group_scalars = _by_kind(of_groups)  # LAMB counts its steps in a tensor there
    tensors |= {f"{GROUP}{name}": tensor for name, tensor in group_tensors.items()}
    return tensors, {"scalars": scalars, "groups": group_scalars}


def _join_optimizer(tensors: Mapping[str, Tensor], rest: Mapping[str, Any]) -> dict[str, Any]:
    of_groups = {name for name in tensors if name.startswith(GROUP)}
    groups = {name.removeprefix(GROUP): tensors[name] for name in of_groups}
    state = {name: tensor for name, tensor in tensors.items() if name not in of_groups}
    return {
        "state": _nested({**state, **rest["scalars"]}),
        "param_groups": list(_nested({**rest["groups"], **groups}).values()),
    }


def _by_kind(values: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    tensors = {name: value for name, value in values.items() if isinstance(value, Tensor)}
    return tensors, {name: value for name, value in values.items() if name not in tensors}


def _flat(values: Mapping[int, Mapping[str, Any]]) -> dict[str, Any]:
    return {f"{n}.{name}": value for n, named in values.items() for name, value in named.items()}


def _nested(values: Mapping[str, Any]) -> dict[int, dict[str, Any]]:
    nested: dict[int, dict[str, Any]] = {}
    for name, value in values.items():
        index, _, key = name.partition(".")
        nested.setdefault(int(index), {})[key] = value
    return dict(sorted(nested.items()))


def model_tensors(model: torch.nn.Module) -> dict[str, Tensor]:
    """The state of a model, on the CPU."""
    return {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}
