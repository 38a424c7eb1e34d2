"""Start or join Ray for the length of a job, and refuse a cluster that is open to anybody."""

from __future__ import annotations

import contextlib
import ipaddress
import logging
import os
import secrets
import signal
import socket
from collections.abc import Iterator, Mapping

import ray

from cnnray.cluster.core.nodes import read_nodes
from cnnray.config import ClusterSettings
from cnnray.errors import CnnrayError, SettingsError

logger = logging.getLogger(__name__)

CONNECT_SECONDS = 10.0
ADDRESS_HINT = "check --cluster.address and RAY_ADDRESS, or leave them out for a local Ray"


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
            len(read_nodes()),
        )
        yield
    finally:
        ray.shutdown()


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
