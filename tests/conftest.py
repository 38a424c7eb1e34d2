"""S3 servers for the tests that need one: a real one, and moto."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sysconfig
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

START_SECONDS = 60
STOP_SECONDS = 15


@dataclass(frozen=True)
class S3Server:
    """A running server on this machine, and a bucket in it."""

    endpoint: str
    access_key: str
    secret_key: str
    bucket: str

    @property
    def environment(self) -> dict[str, str]:
        """The AWS variables that lead a client there and nowhere else."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_REGION": "us-east-1",
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def uri(self, prefix: str) -> str:
        """A prefix of the bucket."""
        return f"s3://{self.bucket}/{prefix}"


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


def _free_ports() -> int:
    """A port P such that P to P + 4 and P + 10 to P + 14 are free."""
    for first in range(21_000 + os.getpid() % 1000 * 20, 60_000, 20):
        with contextlib.ExitStack() as stack:
            try:
                for port in (*range(first, first + 5), *range(first + 10, first + 15)):
                    stack.enter_context(socket.socket()).bind(("127.0.0.1", port))
            except OSError:
                continue
            return first
    raise RuntimeError("no free ports")


def _weed_command(folder: Path, port: int) -> list[str]:
    command = [str(Path(sysconfig.get_path("scripts")) / "weed"), "mini", f"-dir={folder}"]
    command += ["-ip=127.0.0.1", "-ip.bind=127.0.0.1", f"-s3.config={folder / 's3.json'}"]
    command += ["-master.telemetry=false", "-webdav=false", "-admin.ui=false"]
    command += ["-s3.port.iceberg=0", "-s3.port.lance=0"]
    for offset, name in enumerate(("s3", "master", "volume", "filer", "admin")):
        command += [f"-{name}.port={port + offset}", f"-{name}.port.grpc={port + 10 + offset}"]
    return command


def _wait_until_up(process: subprocess.Popen[bytes], server: S3Server, log: Path) -> None:
    """Create the bucket as soon as the server lets us."""
    import botocore.config
    import botocore.session

    client = botocore.session.Session().create_client(
        "s3", config=botocore.config.Config(retries={"max_attempts": 0}, connect_timeout=2)
    )
    deadline = time.monotonic() + START_SECONDS
    while True:
        try:
            client.create_bucket(Bucket=server.bucket)
            return
        except Exception as error:
            if process.poll() is not None or time.monotonic() > deadline:
                tail = log.read_text(errors="replace")[-2000:]
                raise RuntimeError(f"the S3 server did not start: {error}\n{tail}") from error
            time.sleep(0.2)


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
def seaweed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """SeaweedFS on loopback, named by the AWS variables of this process while tests run."""
    folder = tmp_path_factory.mktemp("seaweed")
    server = S3Server(
        endpoint=f"http://127.0.0.1:{(port := _free_ports())}",
        access_key="cnnray",
        secret_key="correct-horse-battery",
        bucket="cnnray-tests",
    )
    credentials = {"accessKey": server.access_key, "secretKey": server.secret_key}
    actions = ["Admin", "Read", "List", "Tagging", "Write"]
    identity = {"name": "cnnray", "credentials": [credentials], "actions": actions}
    (folder / "s3.json").write_text(json.dumps({"identities": [identity]}))
    log = folder / "server.log"
    with log.open("wb") as output, _environment(server.environment):
        process = subprocess.Popen(
            _weed_command(folder, port), stdout=output, stderr=output, cwd=folder
        )
        try:
            _wait_until_up(process, server, log)
            yield server
        finally:
            process.terminate()
            try:
                process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(STOP_SECONDS)
