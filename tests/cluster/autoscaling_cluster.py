"""A Ray cluster on this machine whose nodes are real raylets and come on demand, from zero.

``ray.cluster_utils.AutoscalingCluster`` cannot serve: its template is not in the wheel, and its
start and its end call ``ray stop --force``, which ends every Ray on the machine.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

PROVIDER = "ray.autoscaler._private.fake_multi_node.node_provider"
HEAD_ID = "fffffffffffffffffffffffffffffffffffffffffffffffffff00000"  # as that provider has it
HEAD = "ray.head.default"
LISTS = (
    "initialization_commands",
    "setup_commands",
    "head_setup_commands",
    "worker_setup_commands",
    "head_start_ray_commands",
    "worker_start_ray_commands",
    "cluster_synced_files",
    "rsync_exclude",
    "rsync_filter",
)
START_SECONDS = 120.0
STOP_SECONDS = 30.0


def group(max_workers: int, **resources: float) -> dict[str, Any]:
    """Nodes that may come, of which there are none at first."""
    resources["object_store_memory"] = 100_000_000
    return {"resources": resources, "min_workers": 0, "max_workers": max_workers}


@contextlib.contextmanager
def autoscaling_cluster(
    folder: Path, groups: Mapping[str, dict[str, Any]], *, head_cpus: int = 1
) -> Iterator[str]:
    """The address of a head with an autoscaler; it ends with all the nodes that have come."""
    port, dashboard, client = _free_ports(3)
    config = folder / "cluster.json"
    config.write_text(json.dumps(_configure(groups, port=port, head_cpus=head_cpus)))
    environment = {
        **os.environ,
        "RAY_FAKE_CLUSTER": "1",
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_AUTH_MODE": "disabled",
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",
        "RAY_worker_niceness": "0",
        "RAY_raylet_start_wait_time_s": "120",  # on a busy machine
    }
    command = [str(Path(sys.executable).with_name("ray")), "start", "--head", "--block"]
    command += ["--node-ip-address=127.0.0.1", f"--port={port}", f"--num-cpus={head_cpus}"]
    command += [f"--dashboard-port={dashboard}", f"--ray-client-server-port={client}"]
    command += ["--object-store-memory=200000000", f"--autoscaling-config={config}"]
    with (folder / "head.log").open("wb") as log:
        head = subprocess.Popen(
            command, env=environment, start_new_session=True, stdout=log, stderr=log
        )
    try:
        _wait_for(port, head)
        yield f"127.0.0.1:{port}"
    finally:
        _end(head)


def _configure(
    groups: Mapping[str, dict[str, Any]], *, port: int, head_cpus: int
) -> dict[str, Any]:
    kinds = {name: {"node_config": {}, **kind} for name, kind in groups.items()}
    kinds[HEAD] = {"resources": {"CPU": head_cpus}, "node_config": {}, "max_workers": 0}
    return {
        "cluster_name": "tests",
        "max_workers": 8,
        "upscaling_speed": 20.0,
        "idle_timeout_minutes": 10,  # longer than a slow job takes from its end to the look
        "provider": {
            "type": "fake_multinode",
            "module": PROVIDER,
            "head_node_id": HEAD_ID,
            "gcs_address": f"127.0.0.1:{port}",
            "launch_multiple": True,
            # All nodes have one address, by which the autoscaler would know them otherwise, and
            # it cannot log in to one that it takes for lost.
            "use_node_id_as_ip": True,
            "disable_node_updaters": True,
        },
        "available_node_types": kinds,
        "head_node_type": HEAD,
        **dict.fromkeys(("auth", "docker", "file_mounts"), {}),
        **{name: [] for name in LISTS},
    }


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def _wait_for(port: int, head: subprocess.Popen[bytes]) -> None:
    """Until the head's own node can be seen: a job may join, and know what may come."""
    probe = (
        "import ray, sys, time\n"
        "from ray.autoscaler.v2.sdk import get_cluster_status\n"
        f"deadline = time.monotonic() + {START_SECONDS}\n"
        "while time.monotonic() < deadline:\n"
        "    try:\n"
        f"        if get_cluster_status('127.0.0.1:{port}').idle_nodes: sys.exit()\n"
        "    except Exception: pass\n"
        "    time.sleep(0.5)\n"
        "sys.exit('no head')\n"
    )
    environment = {**os.environ, "RAY_AUTH_MODE": "disabled"}
    subprocess.run([sys.executable, "-c", probe], check=True, env=environment)
    assert head.poll() is None


def _end(head: subprocess.Popen[bytes]) -> None:
    """End the session of processes that this head began, and what of it has not ended by then."""
    children = _session_of(head.pid)
    head.send_signal(signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        head.wait(timeout=STOP_SECONDS)
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline and any(map(_is_alive, children)):
        time.sleep(0.2)
    for pid in {*children, *_session_of(head.pid)}:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    head.wait(timeout=STOP_SECONDS)


def _session_of(leader: int) -> set[int]:
    """Everything that descends from the head, by its session."""
    found = set()
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = path.read_text().rpartition(")")[2].split()
            if int(fields[3]) == leader:  # the session; the pid and the name come before
                found.add(int(path.parent.name))
    return found


def _is_alive(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()
