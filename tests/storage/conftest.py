"""Stores to test: a folder, and S3 servers that really run."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from cnnray.storage import LocalStore, S3Store, Store, open_store


@pytest.fixture(
    params=[
        "local",
        pytest.param("seaweed", marks=pytest.mark.s3),
        pytest.param("moto", marks=pytest.mark.s3),
    ]
)
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    """An empty store; every test has its own."""
    if request.param == "local":
        return open_store(str(tmp_path / "store"))
    return request.getfixturevalue(f"{request.param}_store")


@pytest.fixture
def seaweed_store(seaweed: Any, tmp_path: Path) -> S3Store:
    return S3Store(bucket=seaweed.bucket, prefix=f"{tmp_path.name}-{time.time_ns()}")


@pytest.fixture
def moto_store(moto: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> S3Store:
    import botocore.session

    monkeypatch.setenv("AWS_ENDPOINT_URL", moto)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "any")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "any")
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    botocore.session.Session().create_client("s3", region_name="us-east-1").create_bucket(
        Bucket="moto-tests"
    )
    return S3Store(bucket="moto-tests", prefix=f"{tmp_path.name}-{time.time_ns()}")


@pytest.fixture
def local(tmp_path: Path) -> LocalStore:
    return LocalStore(root=str(tmp_path / "root"))
