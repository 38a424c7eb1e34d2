"""Jobs that do not fit a cluster have its autoscaler start nodes, and wait for them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.autoscaling_cluster import autoscaling_cluster, group

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(420)]

ROOT = Path(__file__).parents[2]
ASKED = "asking the autoscaler for "


class Cluster:
    """A head of one CPU, and the nodes that have come."""

    def __init__(self, address: str) -> None:
        self.address = address

    def run(self, job: str, *flags: str, code: int = 0) -> str:
        """Run a job as its users do, and return its log."""
        command = [sys.executable, str(ROOT / f"jobs/{job}.py"), *flags]
        command += ["--cluster.address", self.address, "--cluster.progress_seconds", "2"]
        environment = {**os.environ, "RAY_AUTH_MODE": "disabled", "PYTHONPATH": str(ROOT)}
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=300, check=False
        )
        assert done.returncode == code, done.stderr
        return done.stderr

    def nodes(self) -> list[str]:
        """The groups of the nodes that are alive, without the head."""
        code = (
            "from ray.autoscaler.v2.sdk import get_cluster_status\n"
            f"status = get_cluster_status({self.address!r})\n"
            "print(*[node.ray_node_type_name for node in status.active_nodes + status.idle_nodes])"
        )
        environment = {**os.environ, "RAY_AUTH_MODE": "disabled"}
        done = subprocess.run(
            [sys.executable, "-c", code],
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        )
        return [name for name in done.stdout.split() if not name.startswith("node_")]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Two nodes of two CPUs may come, and one with a GPU that is none."""
    folder = tmp_path_factory.mktemp("autoscaling")
    groups = {"cpu": group(2, CPU=2), "gpu": group(1, CPU=2, GPU=1)}
    with autoscaling_cluster(folder, groups) as address:
        yield Cluster(address)


@pytest.fixture(scope="module")
def trained_there(
    cluster: Cluster, dataset: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path]:
    """The log and the bundle of a training of one worker, which needs a second CPU to read."""
    folder = tmp_path_factory.mktemp("trained") / "model"
    return cluster.run("train", *train_flags(dataset, folder)), folder


def train_flags(dataset: Path, output: Path) -> list[str]:
    return ["--data", str(dataset), "--output", str(output), "--epochs", "1"]


def test_a_training_that_does_not_fit_the_head_has_a_node_started_and_ends(cluster, trained_there):
    log, model = trained_there
    assert f"{ASKED}2 x 1 CPU\n" in log
    assert "1 workers of 1 CPUs" in log
    assert (model / "model.safetensors").exists()
    assert cluster.nodes() == ["cpu"], "and no other one"


def test_what_can_never_fit_is_refused_at_once(cluster, dataset, tmp_path):
    flags = ["--scaling.use_gpu", "--scaling.num_workers", "2"]
    log = cluster.run("train", *train_flags(dataset, tmp_path / "model"), *flags, code=2)
    assert "2 workers need 2 GPUs, the cluster can grow to 1" in log
    assert ASKED not in log


@pytest.mark.soak
def test_labelling_with_more_workers_than_fit_the_head_waits_for_nodes(
    cluster, trained_there, photos, tmp_path
):
    _, model = trained_there
    flags = ["--model", str(model), "--input", str(photos), "--output", str(tmp_path / "labels")]
    log = cluster.run("classify", *flags, "--scaling.num_workers", "5")
    assert f"{ASKED}5 x 1 CPU\n" in log
    assert "labelled 330 + errors 0 = 330 images planned" in log
    assert cluster.nodes() == ["cpu", "cpu"]


@pytest.mark.soak
def test_a_search_has_nodes_started_for_as_many_trials_as_may_run_at_a_time(
    cluster, dataset, tmp_path
):
    space = tmp_path / "space.yaml"
    space.write_text("optimizer.lr: [0.01, 0.02]\n")
    flags = ["--space", str(space), "--trials", "2", "--scaling.cpus_per_worker", "1"]
    log = cluster.run("tune", *train_flags(dataset, tmp_path / "best"), *flags)
    assert "2 trials, 2 at a time" in log
    assert (tmp_path / "best/model.safetensors").exists()


@pytest.mark.soak
@pytest.mark.skipif("__import__('torch').cuda.is_available()", reason="the GPU here is a fake")
def test_a_node_with_a_gpu_comes_for_a_training_on_gpus(cluster, dataset, tmp_path):
    flags = train_flags(dataset, tmp_path / "model")
    log = cluster.run("train", *flags, "--scaling.use_gpu", code=1)
    assert f"{ASKED}1 x 1 CPU + 1 GPU and 1 x 1 CPU\n" in log
    assert "CUDA" in log
    assert "gpu" in cluster.nodes()
