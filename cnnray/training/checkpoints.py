"""Checkpoints of a run: tensors as safetensors, the rest as JSON, a digest manifest written last.

    <folder>/epoch-00003/model.safetensors  optimizer.safetensors  state.json  MANIFEST.json
    <folder>/epoch-00003-step-00000120/…    the same, inside epoch 3, after 120 of its steps

A checkpoint without its manifest does not exist; one whose digests do not match is passed over for
the one before it. Nothing is ever unpickled.
"""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Mapping
from concurrent import futures
from dataclasses import asdict, dataclass, field, replace
from types import TracebackType
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from cnnray.errors import CnnrayError, MissingObjectError, StorageError, UnavailableError
from cnnray.storage import Store, encode_json, read_json, sha256
from cnnray.training.places import Place, Tally
from cnnray.training.sharding import whole

logger = logging.getLogger(__name__)

MANIFEST = "MANIFEST.json"
FILES = ("model.safetensors", "optimizer.safetensors", "state.json")
TRAINED = "trained/"
"""Begins the names of weights that go on learning, in the optimizer's file."""
GROUP = "group/"
"""Begins the names of what belongs to a whole group of parameters there."""
KEPT_PLACES = 2
"""Latest checkpoints inside epochs that are kept."""
FOLDER = re.compile(r"epoch-(\d+)(?:-step-(\d+))?")

Position = tuple[int, int]
"""Epochs done and steps of the next one: the order of checkpoints."""


@dataclass(frozen=True)
class Checkpoint:
    """The state of training after ``history``'s last epoch, or at a place in the next one."""

    model: dict[str, Tensor]  # what is evaluated, and saved in the bundle
    optimizer: dict[str, Any]  # a torch optimizer's state_dict
    step: int
    history: tuple[dict[str, Any], ...]  # one EpochResult.to_dict() an epoch
    trained: dict[str, Tensor] = field(default_factory=dict)  # where ``model`` is their average
    place: Place | None = None  # None: the last epoch of the history is just done
    scaler: dict[str, Any] = field(default_factory=dict)  # a GradScaler's state_dict

    @property
    def position(self) -> Position:
        """Where it stands among the checkpoints of its run."""
        return self.epochs_done, self.place.step if self.place else 0

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
    """Write a checkpoint and remove older ones.

    Of those after an epoch the last ``keep`` and the best stay, of those inside epochs the last
    ``KEPT_PLACES``.
    """
    _write(store, _snapshot(checkpoint), keep=keep)


class CheckpointWriter:
    """Writes checkpoints on a thread of its own, one after the other.

    Every call raises what the thread died of since the last one, and ``CnnrayError`` when a
    checkpoint takes longer than ``seconds``. Left by an error, it waits for the checkpoint under
    way, which is from before the error, and lets the error pass.
    """

    def __init__(self, store: Store, *, keep: int, seconds: float) -> None:
        self.store = store
        self.keep = keep
        self.seconds = seconds
        self.thread = futures.ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self.pending: futures.Future[None] | None = None

    def save(self, checkpoint: Checkpoint) -> futures.Future[None]:
        """Copy a checkpoint and begin to write the copy, once the one before it is written.

        What is returned is done when all is written.
        """
        self._wait()
        self.pending = self.thread.submit(_write, self.store, _snapshot(checkpoint), keep=self.keep)
        return self.pending

    def close(self) -> None:
        """Wait until all is written."""
        try:
            self._wait()
        finally:
            self.thread.shutdown(wait=False, cancel_futures=True)

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            self.close()
        except Exception as failure:
            if error is None:
                raise
            logger.warning("a checkpoint was not written: %s", failure)

    def _wait(self) -> None:
        pending, self.pending = self.pending, None
        if pending is None:
            return
        futures.wait([pending], timeout=self.seconds)
        if not pending.done():
            raise CnnrayError(
                f"a checkpoint was not written to {self.store.uri} within {self.seconds:g} s",
                hint="raise --cluster.stall_seconds",
            )
        pending.result()


def load_latest(store: Store) -> Checkpoint | None:
    """The newest checkpoint that is whole, or None. Damaged ones are named in the log."""
    for position in sorted(_positions(store), reverse=True):
        checkpoint = load_at(store, position)
        if checkpoint is not None:
            return checkpoint
    return None


def load_checkpoint(store: Store, epoch: int) -> Checkpoint | None:
    """The checkpoint after a 0-based epoch, or None when it is damaged or not there."""
    return load_at(store, (epoch + 1, 0))


def load_at(store: Store, position: Position) -> Checkpoint | None:
    """The checkpoint at a position, or None when it is damaged or not there."""
    folder = _folder(position)
    try:
        digests = read_json(store, f"{folder}/{MANIFEST}")["sha256"]
        files = {name: store.read(f"{folder}/{name}") for name in FILES}
        damaged = [name for name, data in files.items() if sha256(data) != digests[name]]
    except MissingObjectError as error:
        logger.warning("incomplete checkpoint passed over: %s", error)
        return None
    except UnavailableError:
        raise  # later it may be there: no reason to fall back
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
        place=_decode_place(state.get("place")),  # checkpoints of older versions have none
        scaler=state.get("scaler", {}),
    )


def delete_checkpoints(store: Store) -> None:
    """Remove every checkpoint, manifests first."""
    for position in _positions(store):
        _delete(store, position)


def _folder(position: Position) -> str:
    epochs_done, step = position
    return f"epoch-{epochs_done:05d}-step-{step:08d}" if step else f"epoch-{epochs_done - 1:05d}"


def _positions(store: Store) -> list[Position]:
    try:
        names = store.list_folders()
    except MissingObjectError:
        return []
    found = [match.groups() for name in names if (match := FOLDER.fullmatch(name))]
    return [(int(epoch), int(step)) if step else (int(epoch) + 1, 0) for epoch, step in found]


def _write(store: Store, checkpoint: Checkpoint, *, keep: int) -> None:
    folder = _folder(checkpoint.position)
    tensors, groups = _split_optimizer(checkpoint.optimizer)
    tensors |= {f"{TRAINED}{name}": tensor for name, tensor in checkpoint.trained.items()}
    files = {
        "model.safetensors": safetensors.torch.save(checkpoint.model),
        "optimizer.safetensors": safetensors.torch.save(tensors),
        "state.json": encode_json(
            {
                "step": checkpoint.step,
                "place": asdict(checkpoint.place) if checkpoint.place else None,
                "history": list(checkpoint.history),
                "optimizer": groups,
                "scaler": checkpoint.scaler,
            }
        ),
    }
    for name, data in files.items():
        store.write(f"{folder}/{name}", data)
    digests = {name: sha256(data) for name, data in files.items()}
    store.write(f"{folder}/{MANIFEST}", encode_json({"sha256": digests}))
    _prune(store, checkpoint, keep=keep)


def _decode_place(state: Mapping[str, Any] | None) -> Place | None:
    if state is None:
        return None
    return Place(state["epoch"], state["step"], Tally(**state["tally"]))


def _prune(store: Store, checkpoint: Checkpoint, *, keep: int) -> None:
    """Remove what is older than ``checkpoint`` and neither among the last ones nor the best.

    What is newer and inside an epoch goes, too: a run that had found it whole would not be here.
    """
    positions = sorted(_positions(store))
    after_epochs = [position for position in positions if not position[1]]
    inside_epochs = [position for position in positions if position[1]]
    now = checkpoint.position
    kept = {
        *[position for position in after_epochs if position <= now][-keep:],
        *[position for position in after_epochs if position > now],
        *[position for position in inside_epochs if position <= now][-KEPT_PLACES:],
    }
    if checkpoint.history:
        kept.add((checkpoint.best_epoch + 1, 0))
    for position in positions:
        if position not in kept:
            _delete(store, position)


def _delete(store: Store, position: Position) -> None:
    for name in (MANIFEST, *FILES):  # the manifest first: a half-deleted checkpoint is none
        store.delete(f"{_folder(position)}/{name}")


def _snapshot(checkpoint: Checkpoint) -> Checkpoint:
    """The same, sharing no memory with the training that goes on."""
    return replace(
        checkpoint,
        model=_copied(checkpoint.model),
        optimizer=_copied(checkpoint.optimizer),
        trained=_copied(checkpoint.trained),
    )


def _copied(value: Any) -> Any:
    """The same at any depth, its tensors copied to the CPU, contiguous."""
    if isinstance(value, Tensor):
        return torch.empty(value.shape, dtype=value.dtype).copy_(value.detach())
    if isinstance(value, Mapping):
        return {name: _copied(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_copied(item) for item in value]
    return value


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
    """The state of a model, on the CPU; all ranks call it for one that is sharded."""
    return {name: whole(tensor.detach()).cpu() for name, tensor in model.state_dict().items()}
