"""What trackers have in common: ``mlflow_tracker`` and ``tensorboard_tracker`` are the two kinds.

Both know by themselves which epochs they have, so histories can be written to them again and again,
and by a later process, and each epoch is there once. What they raise is not named in general.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from cnnray.errors import SettingsError
from cnnray.storage.replies import reason

CURVES = (
    "train_loss",
    "train_accuracy",
    "val_loss",
    "val_accuracy",
    "learning_rate",
    "samples_per_second",
    "data_wait_fraction",
)
"""What is tracked of an epoch, at its optimizer step. The last one is never None."""

Epoch = Mapping[str, Any]
"""``EpochResult.to_dict()``."""


class Tracker(Protocol):
    """One place where curves go. Its methods may take their time, and raise anything."""

    @property
    def name(self) -> str:
        """What it is and where, for people."""

    def write_epochs(self, history: Sequence[Epoch]) -> None:
        """Write those epochs that are not there yet."""

    def finish(self, result: Mapping[str, Any]) -> None:
        """Write the train job's result, and close. Comes after the epochs."""

    def fail(self) -> None:
        """Close: the run did not get to its end."""


def root_reason(error: BaseException) -> str:
    """What the network or the disk says, where that is behind an error, else the error's text."""
    root = error
    while (behind := root.__cause__ or root.__context__) is not None:
        root = behind
    return reason(root if isinstance(root, OSError) else error)


def curves_of(epoch: Epoch) -> dict[str, float]:
    """What is tracked of an epoch, without what it has not."""
    return {name: epoch[name] for name in CURVES if epoch[name] is not None}


def numbers_of(result: Mapping[str, Any]) -> dict[str, float]:
    """The numbers among a job's results."""
    return {name: value for name, value in result.items() if isinstance(value, int | float)}


def require_package(package: str, *, extra: str) -> None:
    """Raise ``SettingsError`` unless the package is there."""
    if importlib.util.find_spec(package) is None:
        raise SettingsError(
            f"--tracking.{extra} needs the package {package}",
            hint=f"pip install 'cnnray[{extra}]'",
        )
