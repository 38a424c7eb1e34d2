"""S3 servers for the tests that need one: a real one, and moto."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import pytest

from benchmarks.seaweed import Server
from benchmarks.seaweed import seaweed as start_seaweed


@contextlib.contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@pytest.fixture(scope="session")
def moto() -> Iterator[str]:
    """The endpoint of a moto server on loopback: it takes any credentials and nearly any key."""
    server_module = pytest.importorskip("moto.server")
    server = server_module.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture(scope="session")
def seaweed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """SeaweedFS on loopback, named by the AWS variables of this process while tests run."""
    folder = tmp_path_factory.mktemp("seaweed") / "data"
    with start_seaweed(folder, bucket="cnnray-tests") as server, _environment(server.environment):
        yield server
