"""Event files for TensorBoard, by tensorboardX: https://github.com/lanpa/tensorboardX."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cnnray.errors import SettingsError
from cnnray.training.trackers import Epoch, curves_of, numbers_of, require_package


class TensorBoardTracker:
    """Event files in a folder; each hides what older ones have from its first step on.

    Writers for general use hand events to a thread that can fail unseen; this is the file below.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.name = f"TensorBoard in {folder}"
        self.file: Any = None
        self.steps: set[int] = set()  # of the epochs that this process has written

    def write_parameters(self, parameters: Mapping[str, str]) -> None:
        """Write them as a text at step 0."""
        self._begin_file(0)
        self._write(0, _text("settings", parameters))
        self.file.flush()

    def write_epochs(self, history: Sequence[Epoch]) -> None:
        """Write those epochs that are not there yet, and once more what comes after them."""
        epochs = {epoch["step"]: curves_of(epoch) for epoch in history}
        missing = epochs.keys() - self.steps
        if not missing:
            return
        first = min(missing)
        if self.file is None or first < max(self.steps, default=0):
            self._begin_file(first)
        try:
            for step, curves in epochs.items():
                if step >= first:
                    self._write(step, _scalars(curves))
            self.file.flush()
        except OSError:
            self.file = None  # the next try begins another one, which hides this one's part
            raise
        self.steps |= missing

    def finish(self, result: Mapping[str, Any]) -> None:
        """The result's numbers and the diagnosis become texts at the last step."""
        step = result["steps"]
        numbers = {name: f"{value:g}" for name, value in numbers_of(result).items()}
        findings = {
            finding["name"]: f"{finding['text']} Try: {'; '.join(finding['advice'])}"
            for finding in result["diagnosis"]
        }
        self._write(step, _text("result", numbers | {"bundle": result["bundle"]}))
        self._write(step, _text("diagnosis", findings or {"healthy": "nothing was found"}))
        self._close()

    def fail(self) -> None:
        """Nothing but to close."""
        self._close()

    def _begin_file(self, first: int) -> None:
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog

        self._close()
        self.folder.mkdir(parents=True, exist_ok=True)
        # Readers go by the names: seconds, host, and what is added here.
        self.file = EventsWriter(str(self.folder / "events"), f".{time.time_ns()}")
        start = SessionLog(status=SessionLog.START)
        self.file.write_event(Event(wall_time=time.time(), step=first, session_log=start))

    def _write(self, step: int, summary: Any) -> None:
        from tensorboardX.proto.event_pb2 import Event

        self.file.write_event(Event(wall_time=time.time(), step=step, summary=summary))

    def _close(self) -> None:
        file, self.file = self.file, None
        if file is not None:
            file.close()


def check_tensorboard() -> None:
    """Raise ``SettingsError`` unless the package is there."""
    require_package("tensorboardX", extra="tensorboard")


def open_tensorboard(folder: Path, parameters: Mapping[str, str]) -> TensorBoardTracker:
    """Event files in ``folder``, where there may be older ones. Raises ``SettingsError``."""
    tracker = TensorBoardTracker(folder)
    if not folder.exists():
        try:
            tracker.write_parameters(parameters)
        except OSError as error:
            raise SettingsError(f"cannot write events to {folder}: {error.strerror}") from error
    return tracker


def _scalars(values: Mapping[str, float]) -> Any:
    from tensorboardX.proto.summary_pb2 import Summary

    return Summary(
        value=[Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
    )


def _text(tag: str, rows: Mapping[str, str]) -> Any:
    """A Markdown table of two columns."""
    from tensorboardX.summary import text

    lines = [f"| {name} | {value} |" for name, value in rows.items()]
    return text(tag, "\n".join(["| | |", "|---|---|", *lines]))
