"""Start or join Ray, and find out beforehand whether a job fits: it must never wait for ever."""

from __future__ import annotations

import contextlib
import ipaddress
import logging
import os
import secrets
import signal
import socket
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import ray

from cnnray.config import ClusterSettings, ScalingSettings
from cnnray.errors import CnnrayError, IncompleteError, SettingsError

logger = logging.getLogger(__name__)

CONNECT_SECONDS = 10.0
ADDRESS_HINT = "check --cluster.address and RAY_ADDRESS, or leave them out for a local Ray"

READER_CPUS = 1.0
"""What the stages that read data need at least, next to the workers."""


@dataclass(frozen=True)
class WorkerResources:
    """What each training worker reserves."""

    cpus: float
    gpus: float
    threads: int


@contextlib.contextmanager
def ray_cluster(settings: ClusterSettings) -> Iterator[None]:
    """Ray for the length of a job: a running cluster, or a local one that is stopped again.

    A Ray that the process has started before (a test's) is used and left alone.
    Raises ``CnnrayError`` when the cluster cannot be reached, ``SettingsError`` when it is open.
    """
    if ray.is_initialized():
        yield
        return
    address = settings.address or os.environ.get("RAY_ADDRESS") or "local"
    if address not in ("local", "auto"):
        refuse_open_cluster(address, os.environ, trusted_network=settings.trusted_network)
    _require_reachable(address)
    _set_ray_defaults(is_local=address == "local")
    on_sigterm = signal.getsignal(signal.SIGTERM)
    try:
        if address == "local":
            ray.init(
                address="local",
                num_cpus=settings.num_cpus,
                include_dashboard=False,
                log_to_driver=settings.worker_logs,
                logging_level=logging.WARNING,
            )
        else:
            ray.init(
                address=address,
                log_to_driver=settings.worker_logs,
                logging_level=logging.WARNING,
            )
    except Exception as error:  # Ray raises nearly anything here, bare Exception included
        first_line = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        raise CnnrayError(
            f"cannot join Ray at {address}: {first_line}",
            hint=ADDRESS_HINT,
        ) from error
    if on_sigterm is not signal.SIG_DFL:  # Ray has put its own in the place of the job's
        signal.signal(signal.SIGTERM, on_sigterm)
    try:
        if address == "auto":  # only now is it known which Ray that is, and whether it has a token
            found = ray.get_runtime_context().gcs_address
            refuse_open_cluster(found, os.environ, trusted_network=settings.trusted_network)
        resources = ray.cluster_resources()
        logger.info(
            "Ray %s: %g CPUs, %g GPUs, %d nodes",
            address,
            resources.get("CPU", 0),
            resources.get("GPU", 0),
            len(ray.nodes()),
        )
        yield
    finally:
        ray.shutdown()


@contextlib.contextmanager
def stop_on_sigterm() -> Iterator[None]:
    """Let SIGTERM (``ray job stop``) end the job in order, as ``IncompleteError``."""

    def stop(number: int, frame: object) -> None:
        raise IncompleteError(
            "stopped by SIGTERM; what was complete is published",
            hint="submit the same command again: it labels what is left",
        )

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def refuse_open_cluster(
    address: str, environment: Mapping[str, str], *, trusted_network: bool
) -> None:
    """Raise ``SettingsError`` for a Ray on the network that takes code from anybody.

    Whether Ray asks for a token is known by ``RAY_AUTH_MODE``, which every process of a cluster,
    and of what is submitted to it, has from ``ray start``. A tunnel's end on loopback is accepted.
    """
    if trusted_network or environment.get("RAY_AUTH_MODE", "").lower() == "token":
        return
    host, _ = _host_and_port(address)
    with contextlib.suppress(ValueError):
        if host == "localhost" or ipaddress.ip_address(host).is_loopback:
            return
    raise SettingsError(
        f"Ray at {address} asks for no token: whoever reaches its ports can run code there",
        hint="start Ray and the job with RAY_AUTH_MODE=token (README, On a cluster),"
        " or say --cluster.trusted_network",
    )


def _host_and_port(address: str) -> tuple[str, str]:
    """Of ``[scheme://]host:port``; the port is "" where there is none."""
    plain = address.rpartition("://")[2]
    host, separator, port = plain.rpartition(":")
    return (host.strip("[]"), port) if separator else (plain, "")


def _require_reachable(address: str) -> None:
    """Raise ``CnnrayError`` when nobody listens there: Ray itself would try for minutes."""
    host, port = _host_and_port(address)
    if not port.isdecimal():
        return
    try:
        socket.create_connection((host, int(port)), CONNECT_SECONDS).close()
    except OSError as error:
        raise CnnrayError(f"cannot join Ray at {address}: {error}", hint=ADDRESS_HINT) from error


def _set_ray_defaults(*, is_local: bool) -> None:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Torch's threads wait for each other actively by default, which on cores that are shared with
    # the readers is several times slower (measured: 176 against 1,048 img/s on two busy cores).
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # Ray sets CUDA_VISIBLE_DEVICES="" for tasks without a GPU today and warns that it will not.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    if is_local and "RAY_AUTH_MODE" not in os.environ:
        # A local Ray turns its token on by itself; given one of this process's own, it writes none
        # to the home folder, where a later `ray start` would pick it up unasked.
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
        logging.getLogger("ray._private.authentication").setLevel(logging.ERROR)


def node_resources() -> list[dict[str, float]]:
    """What each node that is alive has in all: CPU, GPU, object_store_memory and others."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def plan_workers(scaling: ScalingSettings) -> WorkerResources:
    """What each worker may reserve, so that workers and readers fit side by side.

    Raises ``SettingsError`` when the job cannot run on this cluster at its present size, where Ray
    would wait for ever: workers that take every CPU leave none to read their data.
    """
    nodes = node_resources()
    total = sum(node.get("CPU", 0.0) for node in nodes)
    workers = scaling.num_workers
    gpus = 1.0 if scaling.use_gpu else 0.0
    total_gpus = sum(node.get("GPU", 0.0) for node in nodes)
    if gpus * workers > total_gpus:
        raise SettingsError(
            f"{workers} workers need {workers} GPUs, the cluster has {total_gpus:g}",
            hint="lower --scaling.num_workers, or leave out --scaling.use_gpu",
        )
    cpus = scaling.cpus_per_worker or share_of_cpus(total, workers)
    needed = cpus * workers + READER_CPUS
    places = sum(int(node.get("CPU", 0.0) / cpus + 1e-6) for node in nodes)
    if needed > total + 1e-6 or places < workers:
        raise SettingsError(
            f"{workers} workers of {cpus:g} CPUs and {READER_CPUS:g} CPU to read data need"
            f" {needed:g} CPUs, the cluster has {total:g} on {len(nodes)} nodes",
            hint="lower --scaling.num_workers or --scaling.cpus_per_worker",
        )
    cores = os.cpu_count() or 1
    workers_here = -(-workers // max(1, len(nodes)))
    threads = scaling.threads_per_worker or max(1, cores // workers_here)
    return WorkerResources(cpus=cpus, gpus=gpus, threads=threads)


def share_of_cpus(total: float, workers: int) -> float:
    """Half of the CPUs for the workers, half for reading: 1 of 2, 0.5 each for two on 2."""
    share = total / (2 * workers)
    return float(int(share)) if share >= 1 else int(share * 100) / 100


def find_cause(error: BaseException) -> CnnrayError | None:
    """The cnnray error that a Ray error wraps, however deep, or None."""
    seen: set[int] = set()
    waiting: list[object] = [error]
    while waiting:
        current = waiting.pop()
        if not isinstance(current, BaseException) or id(current) in seen:
            continue
        seen.add(id(current))
        if isinstance(current, CnnrayError):
            return _plain(current)
        waiting += [current.__cause__, current.__context__, getattr(current, "cause", None)]
        failures = getattr(current, "worker_failures", None) or {}
        waiting += list(failures.values())
    return None


def _plain(error: CnnrayError) -> CnnrayError:
    """The error without the remote traceback that Ray adds to its text."""
    text = str(getattr(error, "cause", error))
    if text == str(error):
        return error
    for kind in type(error).__mro__:
        if issubclass(kind, CnnrayError) and kind.__module__ == "cnnray.errors":
            return kind(text)
    return error


def last_line(error: BaseException) -> str:
    """The line of a Ray error's text that says what happened: the last one of its traceback."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
