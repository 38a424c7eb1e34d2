"""Training as people see it: the messages of the workers, printed by the driver."""

from __future__ import annotations

import logging
from collections.abc import Callable

from cnnray.cluster.core.messages import Message
from cnnray.console import ProgressLine, format_seconds
from cnnray.training.loop import EpochResult
from cnnray.training.progress import Beginning, Progress

logger = logging.getLogger(__name__)

OnEpoch = Callable[[EpochResult], None]
"""Called with the result of each epoch, on a thread of its own."""


class TrainingDisplay(ProgressLine):
    """Prints the messages of the workers, and hands on the results of epochs."""

    def __init__(self, seconds: float, on_epoch: OnEpoch) -> None:
        super().__init__(total=0, unit="step", label="train", seconds=seconds)
        self.on_epoch = on_epoch

    def show(self, message: Message) -> None:
        """Print a message, and hand on an ``EpochResult``."""
        if isinstance(message, str):
            logger.warning("%s", message)
        elif isinstance(message, Beginning):
            logger.info(
                "%d workers begin in epoch %d, after step %d",
                message.num_workers,
                message.epoch + 1,
                message.step,
            )
        elif isinstance(message, Progress):
            self._show_progress(message)
        else:
            logger.info("%s", _epoch_line(message))
            self.on_epoch(message)

    def _show_progress(self, progress: Progress) -> None:
        note = (
            f"loss {progress.loss:.4f}, accuracy {progress.accuracy:.4f},"
            f" {progress.samples_per_second:,.0f} img/s,"
            f" waiting {progress.data_wait_fraction:.0%}"
        )
        if self.bar is not None:
            self.bar.total = progress.epochs * progress.steps
            self.update(progress.epoch * progress.steps + progress.step, note)
            return
        logger.info(
            "epoch %d/%d step %d/%d: %s, %s left",
            progress.epoch + 1,
            progress.epochs,
            progress.step,
            progress.steps,
            note,
            format_seconds(progress.eta_seconds),
        )


def _epoch_line(result: EpochResult) -> str:
    validation = ""
    if result.val_loss is not None:
        validation = f", val loss {result.val_loss:.4f}, val accuracy {result.val_accuracy:.4f}"
    return (
        f"epoch {result.epoch + 1} done: train loss {result.train_loss:.4f},"
        f" train accuracy {result.train_accuracy:.4f}{validation}"
        f" ({format_seconds(result.seconds)})"
    )
