"""Planning a million keys, and a run that finds all of them labelled."""

from __future__ import annotations

import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.harness import ContestantFailed, Figures
from benchmarks.labelling import Setting
from benchmarks.memory import MemoryWatch
from benchmarks.processes import run_process

DEADLINE_SECONDS = 1800.0


class KeyTables:
    """Tables of labels in which a million keys are planned and published."""

    def __init__(self, setting: Setting, *, num_keys: int) -> None:
        self.setting = setting
        self.num_keys = num_keys
        self.keys = setting.folder / "keys.parquet"
        self.labels: Path | None = None

    def plan(self) -> Figures:
        """Plan the keys in a new table of labels, which the job itself has begun."""
        self._write_keys()
        self.labels = self.setting.new_folder()
        begin = [*self._job(self.labels), f"--input={self._one_image()}"]
        run_process(begin, seconds=DEADLINE_SECONDS)
        command = [sys.executable, "-m", "benchmarks.growth_plan"]
        command += [f"--keys={self.keys}", f"--labels={self.labels}"]
        result = run_process(command, seconds=DEADLINE_SECONDS).result
        if result.get("planned") != self.num_keys:
            raise ContestantFailed(f"{result.get('planned')} of {self.num_keys} keys were planned")
        return {"seconds": result["seconds"], "driver_mb": result["peak_mb"]}

    def find_nothing_new(self) -> Figures:
        """The whole job over keys that are labelled already."""
        if self.labels is None:
            self.plan()
        assert self.labels is not None
        memory = MemoryWatch()
        command = [*self._job(self.labels), f"--input={self.keys}"]
        finished = run_process(command, seconds=DEADLINE_SECONDS, watch=memory)
        if finished.result.get("planned") != 0:
            raise ContestantFailed(f"it found {finished.result.get('planned')} new images")
        peaks = memory.figures()
        return {"seconds": finished.seconds, "driver_mb": peaks["driver_mb"]}

    def _job(self, labels: Path) -> list[str]:
        job = [sys.executable, "jobs/classify.py", f"--model={self.setting.bundle}"]
        return [*job, f"--output={labels}"]

    def _write_keys(self) -> None:
        if self.keys.exists():
            return
        self.keys.parent.mkdir(parents=True, exist_ok=True)
        urls = [
            f"s3://collection/camera-{number % 97:03d}/2026/11/{number:012d}.jpg"
            for number in range(self.num_keys)
        ]
        etags = [f"{number:032x}" for number in range(self.num_keys)]
        pq.write_table(pa.table({"url": urls, "etag": etags}), self.keys)

    def _one_image(self) -> Path:
        file = self.setting.folder / "one.parquet"
        pq.write_table(pq.read_table(self.setting.table).slice(0, 1), file)
        return file
