"""Ray that starts beside the rest of a job: waited for, stopped, and not started for nothing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import ray
from colours import write_bundle, write_images

from cnnray.cluster import early
from cnnray.cluster.runtime import RayStart
from cnnray.config import ClassifySettings, ClusterSettings
from cnnray.errors import CnnrayError

ROOT = Path(__file__).parents[2]


@pytest.fixture
def settings(tmp_path: Path) -> ClassifySettings:
    write_images(tmp_path / "images", range(3))
    return ClassifySettings(
        model=str(write_bundle(tmp_path / "bundle")),
        input=str(tmp_path / "images"),
        output=str(tmp_path / "labels"),
    )


def test_a_first_run_has_work(settings: ClassifySettings) -> None:
    assert early._has_work(settings)


@pytest.mark.parametrize("wrong", ["model", "input"])
def test_what_is_not_there_is_no_work(settings: ClassifySettings, wrong: str) -> None:
    assert not early._has_work(settings.model_copy(update={wrong: "/nowhere"}))


def test_a_dry_run_is_no_work(settings: ClassifySettings) -> None:
    assert not early._has_work(settings.model_copy(update={"dry_run": True}))


def test_a_table_that_is_there_may_have_all_labels(settings: ClassifySettings) -> None:
    table = Path(settings.output) / "_cnnray/table.json"
    table.parent.mkdir(parents=True)
    table.write_text("{}")
    assert not early._has_work(settings)


def test_nothing_heavy_is_imported_before_ray_is_under_way() -> None:
    code = "import sys, cnnray.cluster.early; print('torch' in sys.modules, 'ray' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.split() == ["False", "True"], done.stderr


@pytest.fixture
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even that of other tests."""
    monkeypatch.setattr(ray, "is_initialized", lambda: False)


@pytest.mark.usefixtures("no_ray")
def test_who_waits_gets_the_error_of_the_start() -> None:
    start = RayStart(ClusterSettings(address="127.0.0.1:1"))
    start.begin()
    with pytest.raises(CnnrayError, match="cannot join Ray at 127.0.0.1:1"):
        start.wait()
    start.close()


@pytest.mark.usefixtures("no_ray")
def test_a_start_that_nobody_waited_for_is_closed() -> None:
    start = RayStart(ClusterSettings(address="127.0.0.1:1"))
    start.begin()
    start.close()
    RayStart(ClusterSettings()).close()  # never begun


@pytest.mark.ray
@pytest.mark.usefixtures("ray_session")
def test_a_ray_that_runs_is_used_and_left_alone() -> None:
    start = RayStart(ClusterSettings())
    start.wait()
    start.wait()
    start.close()
    assert ray.is_initialized()


@pytest.mark.slow
def test_a_job_whose_ray_starts_early_keeps_its_sigterm_handler(tmp_path: Path) -> None:
    code = (
        "import signal\n"
        "from cnnray.cluster.runtime import RayStart, stop_on_sigterm\n"
        "from cnnray.config import ClusterSettings\n"
        "with stop_on_sigterm():\n"
        "    before = signal.getsignal(signal.SIGTERM)\n"
        "    start = RayStart(ClusterSettings(address='local', num_cpus=1))\n"
        "    start.wait()\n"
        "    print(signal.getsignal(signal.SIGTERM) is before)\n"
        "    start.close()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=120
    )
    assert done.stdout.strip() == "True", done.stderr
    assert "SIGTERM" not in done.stderr
