"""Start or join Ray, and find out beforehand whether a job fits: it must never wait for ever."""

from __future__ import annotations

import contextlib
import ipaddress
import logging
import os
import secrets
import signal
import socket
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

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
    """What each training worker reserves, and how many of them there is room for."""

    num_workers: int  # that fit the cluster as it was planned for
    cpus: float
    gpus: float
    threads: int
    reading_fraction: float  # of all CPUs: what the workers leave for reading, at least

    @property
    def need(self) -> dict[str, float]:
        """What one worker reserves, as Ray counts it."""
        return {"CPU": self.cpus} | ({"GPU": self.gpus} if self.gpus else {})

    def places_on(self, nodes: Iterable[Mapping[str, float]]) -> int:
        """How many workers the nodes could hold, if nothing else ran there."""
        return count_places(nodes, self.need)

    def fitting(self, nodes: Collection[Mapping[str, float]]) -> int:
        """How many workers fit the nodes side by side with what reads their data."""
        total = _total(nodes, "CPU")
        room = total - max(READER_CPUS, self.reading_fraction * total)
        return max(0, min(self.places_on(nodes), _whole(room / self.cpus)))


@contextlib.contextmanager
def ray_cluster(settings: ClusterSettings, *, dashboard: bool = False) -> Iterator[None]:
    """Ray for the length of a job: a running cluster, or a local one that is stopped again.

    A Ray that the process has started before (a test's) is used and left alone. A local one has a
    ``dashboard``, on loopback, only where its interfaces are needed.
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
                include_dashboard=dashboard,
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
            len(node_resources()),
        )
        yield
    finally:
        ray.shutdown()


@contextlib.contextmanager
def stop_on_sigterm() -> Iterator[None]:
    """Let SIGTERM (``ray job stop``) end the job in order, as ``IncompleteError``.

    On its way the stop is a ``KeyboardInterrupt``, which libraries let through. An ``Exception``
    may be caught by one that happens to run: Ray serialises a table the slow way when the fast one
    raises, whatever it raises.
    """
    is_stopped = False

    def stop(number: int, frame: object) -> None:
        nonlocal is_stopped
        is_stopped = True
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    except KeyboardInterrupt:
        if not is_stopped:
            raise
        raise IncompleteError(
            "stopped by SIGTERM; what was complete is published",
            hint="submit the same command again: it labels what is left",
        ) from None
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
    # Torch's threads wait for each other by spinning: for a millisecond by default, which on cores
    # that are shared with the readers halves the speed; for no time, networks with steps of a few
    # milliseconds lose as much. (The tutorial's at batch 32: 10,300, 6,000 and 10,900 img/s for
    # long, never and 20,000 turns; beside two busy processes 1,400, 2,500 and 2,800.)
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")
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


def count_places(nodes: Iterable[Mapping[str, float]], need: Mapping[str, float]) -> int:
    """How many workers that need so much of each resource fit on the nodes."""
    return sum(
        min(_whole(node.get(name, 0.0) / amount) for name, amount in need.items()) for node in nodes
    )


def plan_workers(scaling: ScalingSettings) -> WorkerResources:
    """What each worker may reserve, so that workers and readers fit side by side.

    Where their number may change, it is planned for as many as there is room for now.
    Raises ``SettingsError`` when the least number cannot run on this cluster at its present size,
    where Ray would wait for ever: workers that take every CPU leave none to read their data.
    """
    nodes = node_resources()
    least, most = scaling.min_workers, scaling.max_workers
    total, total_gpus = _total(nodes, "CPU"), _total(nodes, "GPU")
    if scaling.use_gpu and least > total_gpus:
        raise SettingsError(
            f"{least} workers need {least} GPUs, the cluster has {total_gpus:g}",
            hint="lower --scaling.num_workers, or leave out --scaling.use_gpu",
        )
    # On CPUs, more workers only as long as each has a whole one, and its reading another.
    room = total_gpus if scaling.use_gpu else total / 2
    planned = max(least, min(most, int(room)))
    resources = WorkerResources(
        num_workers=planned,
        cpus=scaling.cpus_per_worker or share_of_cpus(nodes, planned, use_gpu=scaling.use_gpu),
        gpus=1.0 if scaling.use_gpu else 0.0,
        threads=1,
        reading_fraction=0.0 if scaling.use_gpu or scaling.cpus_per_worker else 0.5,
    )
    num_workers = min(most, resources.fitting(nodes))
    if num_workers < least:
        needed = resources.cpus * least + READER_CPUS
        raise SettingsError(
            f"{least} workers of {resources.cpus:g} CPUs and {READER_CPUS:g} CPU to read data need"
            f" {needed:g} CPUs, the cluster has {total:g} on {len(nodes)} nodes",
            hint="lower --scaling.num_workers or --scaling.cpus_per_worker",
        )
    cores = os.cpu_count() or 1
    workers_here = -(-num_workers // max(1, len(nodes)))
    threads = scaling.threads_per_worker or max(1, cores // workers_here)
    return replace(resources, num_workers=num_workers, threads=threads)


def share_of_cpus(nodes: Collection[Mapping[str, float]], workers: int, *, use_gpu: bool) -> float:
    """Half of the CPUs for the workers, half for reading: 1 of 2, 0.5 each for two on 2.

    No more than there are beside each GPU.
    """
    share = _total(nodes, "CPU") / (2 * workers)
    if use_gpu:
        beside = [node.get("CPU", 0.0) / node["GPU"] for node in nodes if node.get("GPU", 0.0) >= 1]
        share = min([share, *beside])
    return float(int(share)) if share >= 1 else int(share * 100) / 100


def _total(nodes: Iterable[Mapping[str, float]], name: str) -> float:
    return sum(node.get(name, 0.0) for node in nodes)


def _whole(number: float) -> int:
    """Rounded down, but not for the last bits of a quotient of fractions."""
    return int(number + 1e-6)


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
        waiting += [*failures.values(), getattr(current, "controller_failure", None)]
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
