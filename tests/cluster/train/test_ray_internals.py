"""Ray still calls what elastic runs override, and other runs import none of it."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ray.train

import cnnray.cluster.train.elastic.ray_internals as ray_internals
from cnnray.cluster.core.resources import WorkerPlan
from cnnray.cluster.train.elastic.policy import ElasticRules
from cnnray.config import ScalingSettings

pytestmark = [pytest.mark.ray, pytest.mark.timeout(420)]

ROOT = Path(__file__).parents[3]
INTERVAL_SECONDS = 10.0


def toy_rules(notes: Path) -> ElasticRules:
    """One worker fits, after two attempts, and then two; every call and its time are noted."""

    class ToyRules(ElasticRules):  # a local class travels to the controller by value
        attempts = 0
        is_running = False

        def note(self, what: str) -> None:
            with notes.open("a") as file:
                file.write(f"{time.time():.2f} {what}\n")

        def count_workers(self, reserved: Any) -> int:
            self.note(f"counted {'running' if self.is_running else 'waiting'}")
            if self.is_running:
                return 2
            return min(1, self.attempts // 2)

        def check_wait(self) -> None:
            self.attempts += 1
            self.note("about to start")

        def end_wait(self) -> None:
            self.is_running = True
            self.note("runs")

    plan = WorkerPlan(num_workers=2, cpus=0.5, gpus=0.0, threads=1, reading_fraction=0.0)
    return ToyRules(ScalingSettings(num_workers="1:2"), plan, wait_seconds=60.0)


def toy_worker(notes: Path) -> Callable[[], None]:
    """Trains for as long as it is the only one; writes checkpoints, as it were, on request."""

    def train() -> None:
        from cnnray.cluster.train.elastic.preemption import PREEMPTION
        from cnnray.cluster.train.elastic.ray_internals import find_preempted_nodes

        def note(what: str) -> None:
            with notes.open("a") as file:
                file.write(f"{time.time():.2f} {what}\n")

        size = ray.train.get_context().get_world_size()
        note(f"{size} train, preempted: {find_preempted_nodes()}")
        deadline = time.monotonic() + 60
        while size == 1 and time.monotonic() < deadline:
            if PREEMPTION.checkpoint_requested():
                note("checkpoint")
                PREEMPTION.written_at = time.monotonic()
                PREEMPTION.resize_requested = False
            time.sleep(0.05)

    return train


def test_ray_calls_every_override_and_looks_at_a_refused_resize_again_at_once(
    ray_session, tmp_path
):
    notes = tmp_path / "notes"
    ray_internals.ElasticTrainer(
        toy_worker(notes),
        rules=toy_rules(notes),
        scaling_config=ray.train.ScalingConfig(
            num_workers=(1, 2),
            resources_per_worker={"CPU": 0.5},
            elastic_resize_monitor_interval_s=INTERVAL_SECONDS,
        ),
        run_config=ray.train.RunConfig(storage_path=str(tmp_path), name="toy"),
    ).fit()
    found = [line.split(" ", 1) for line in notes.read_text().splitlines()]
    steps = [what for _, what in found]
    assert steps[:4] == ["about to start", "counted waiting", "about to start", "counted waiting"]
    for what in ("runs", "1 train, preempted: []", "2 train, preempted: []"):
        assert what in steps
    # Only with a checkpoint is the group resized, and it is asked for again before the interval.
    assert steps.index("checkpoint") < steps.index("2 train, preempted: []")
    counted = [float(at) for at, what in found if what == "counted running"]
    assert len(counted) >= 2
    assert counted[1] - counted[0] < INTERVAL_SECONDS


def test_a_training_of_a_fixed_number_imports_no_internals(dataset, tmp_path):
    code = (
        "import sys\n"
        "from cnnray.cluster.train.job import train\n"
        "from cnnray.config import TrainSettings\n"
        f"settings = TrainSettings(data={str(dataset)!r}, output={str(tmp_path / 'model')!r},"
        " epochs=1, cluster={'num_cpus': 2})\n"
        "train(settings)\n"
        "print([name for name in sys.modules if name.endswith('.ray_internals')])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().splitlines()[-1] == "[]"
