"""The fault-injecting S3 server in its own process, and every store that the contract is for."""

from __future__ import annotations

import http.client
import importlib.util
import os
import sys
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from cnnray.storage import Store, open_store

REAL_BUCKET = "CNNRAY_TEST_S3_BUCKET"
REAL_ENVIRONMENT = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
"""Read before a fixture of another server changes it."""


def _load_chaos_s3() -> ModuleType:
    """The server's module under its plain name: this folder is no package."""
    if "chaos_s3" not in sys.modules:
        path = Path(__file__).with_name("chaos_s3.py")
        spec = importlib.util.spec_from_file_location("chaos_s3", path)
        assert spec is not None
        assert spec.loader is not None
        sys.modules["chaos_s3"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules["chaos_s3"])
    return sys.modules["chaos_s3"]


chaos_s3 = _load_chaos_s3()


# The server that fails on request


@pytest.fixture(scope="session")
def chaos_process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """One server for all tests; it dies with its lifetime whatever happens to them."""
    with chaos_s3.ChaosProcess(tmp_path_factory.mktemp("chaos")) as process:
        yield process


@dataclass(frozen=True)
class Chaos:
    """The server, and a bucket that is the test's own."""

    server: Any  # ChaosProcess
    bucket: str

    def ask(
        self,
        method: str,
        key: str = "",
        body: bytes | None = None,
        *,
        headers: Mapping[str, str] | None = None,
        timeout: float = 10,
    ) -> tuple[int, http.client.HTTPMessage, bytes]:
        """Send one request on a new connection; ``key`` goes into the path as it is."""
        address = self.server.endpoint.removeprefix("http://")
        connection = http.client.HTTPConnection(address, timeout=timeout)
        try:
            signed = {"Authorization": "AWS4-HMAC-SHA256 Credential=tester/20260101/x"}
            connection.request(method, f"/{self.bucket}/{key}", body, signed | dict(headers or {}))
            reply = connection.getresponse()
            return reply.status, reply.headers, reply.read()
        finally:
            connection.close()

    def operations(self, **wanted: Any) -> list[Any]:
        """The operations on this bucket whose fields have these values."""
        return self.server.operations(bucket=self.bucket, **wanted)


@pytest.fixture
def chaos(chaos_process: Any) -> Iterator[Chaos]:
    """An empty bucket, no rules."""
    bucket = f"bucket-{uuid.uuid4().hex[:12]}"
    chaos_process.create_bucket(bucket)
    yield Chaos(chaos_process, bucket)
    chaos_process.set_rules()
    chaos_process.set_page_size(chaos_s3.PAGE_SIZE)


@pytest.fixture
def killable(tmp_path: Path) -> Iterator[Chaos]:
    """A server that belongs to the test, which may kill it and start it again."""
    with chaos_s3.ChaosProcess(tmp_path / "killable") as process:
        process.create_bucket("bucket")
        yield Chaos(process, "bucket")


@pytest.fixture
def chaos_store(chaos: Chaos, use_environment: Callable[[Mapping[str, str]], None]) -> Store:
    """cnnray's view of the bucket."""
    use_environment(chaos.server.environment)
    return open_store(f"s3://{chaos.bucket}")


# Stores of the contract


@dataclass(frozen=True)
class Target:
    """A store that runs, a bucket in it, the way there, and a botocore client without retries."""

    name: str
    bucket: str
    environment: Mapping[str, str]
    client: Any


@dataclass(frozen=True)
class Place:
    """A prefix of a target that is the test's own."""

    target: Target
    prefix: str

    @property
    def name(self) -> str:
        return self.target.name

    @property
    def bucket(self) -> str:
        return self.target.bucket

    @property
    def client(self) -> Any:
        return self.target.client

    def key(self, name: str) -> str:
        return self.prefix + name

    def call(self, method: str, name: str, **arguments: Any) -> dict[str, Any]:
        """One operation on an object of this place."""
        operation = getattr(self.client, method)
        return operation(Bucket=self.bucket, Key=self.key(name), **arguments)

    def put(self, name: str, body: bytes = b"x", **arguments: Any) -> str:
        """Write an object; its ETag."""
        return self.call("put_object", name, Body=body, **arguments)["ETag"]

    def get(self, name: str, **arguments: Any) -> bytes:
        """Read an object."""
        return self.call("get_object", name, **arguments)["Body"].read()

    def pages(self, prefix: str = "", **arguments: Any) -> list[dict[str, Any]]:
        """All pages of a listing."""
        pages: list[dict[str, Any]] = []
        arguments |= {"Bucket": self.bucket, "Prefix": self.key(prefix)}
        while not pages or pages[-1]["IsTruncated"]:
            assert len(pages) < 100
            pages.append(self.client.list_objects_v2(**arguments))
            arguments["ContinuationToken"] = pages[-1].get("NextContinuationToken", "")
        return pages

    def names(self, prefix: str = "", **arguments: Any) -> list[str]:
        """The listed names, in the order of the listing."""
        pages = self.pages(prefix, **arguments)
        listed = [item["Key"] for page in pages for item in page.get("Contents", ())]
        return [key.removeprefix(self.prefix) for key in listed]


def _set_environment(patch: pytest.MonkeyPatch, environment: Mapping[str, str]) -> None:
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        patch.delenv(name)
    for name, value in environment.items():
        patch.setenv(name, value)


@pytest.fixture
def use_environment(monkeypatch: pytest.MonkeyPatch) -> Callable[[Mapping[str, str]], None]:
    """Make these AWS variables the only ones."""
    return lambda environment: _set_environment(monkeypatch, environment)


def _target(name: str, bucket: str, environment: Mapping[str, str], *, create: bool) -> Target:
    import botocore.config
    import botocore.session

    config = botocore.config.Config(
        retries={"total_max_attempts": 1},
        connect_timeout=5,
        read_timeout=15,
        max_pool_connections=32,
    )
    region = environment.get("AWS_REGION") or environment.get("AWS_DEFAULT_REGION") or "us-east-1"
    with pytest.MonkeyPatch.context() as patch:
        _set_environment(patch, environment)
        session = botocore.session.Session()
        client = session.create_client("s3", region_name=region, config=config)
        if create:
            client.create_bucket(Bucket=bucket)
    return Target(name, bucket, environment, client)


@pytest.fixture(scope="session")
def chaos_target(chaos_process: Any) -> Target:
    return _target("chaos", "contract", chaos_process.environment, create=True)


@pytest.fixture(scope="session")
def seaweed_target(seaweed: Any) -> Target:
    return _target("seaweed", seaweed.bucket, seaweed.environment, create=False)


@pytest.fixture(scope="session")
def moto_target(chaos_process: Any, moto: str) -> Target:
    environment = {**chaos_process.environment, "AWS_ENDPOINT_URL": moto}
    return _target("moto", "contract", environment, create=True)


@pytest.fixture(scope="session")
def real_target() -> Target:
    bucket = os.environ.get(REAL_BUCKET)
    if not bucket:
        pytest.skip(f"no {REAL_BUCKET}")
    return _target("real", bucket, REAL_ENVIRONMENT, create=False)


@pytest.fixture(
    scope="session",
    params=[
        "chaos",
        pytest.param("seaweed", marks=pytest.mark.s3),
        pytest.param("moto", marks=pytest.mark.s3),
        "real",
    ],
)
def target(request: pytest.FixtureRequest) -> Target:
    """Each store that the contract is for."""
    return request.getfixturevalue(f"{request.param}_target")


@pytest.fixture
def place(target: Target) -> Iterator[Place]:
    """An empty prefix; every test has its own, and a real store is left as it was."""
    place = Place(target, f"contract-{uuid.uuid4().hex[:12]}/")
    yield place
    if target.name == "real":
        for name in place.names():
            place.call("delete_object", name)


@pytest.fixture
def store(place: Place, use_environment: Callable[[Mapping[str, str]], None]) -> Store:
    """cnnray's view of the same prefix."""
    use_environment(place.target.environment)
    return open_store(f"s3://{place.bucket}/{place.prefix}")
