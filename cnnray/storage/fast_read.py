"""Reads of objects by a client in Rust, at under a third of the CPU time of botocore's.

One try at an object, and no more: whatever is out of the ordinary is left to
``Connection.request``, which asks again and alone decides what it means. Address, region and
credentials are those of botocore's client. What that client is told to do and this one cannot
(proxies, certificates, other signatures, buckets in the host name) makes it stand back.
"""

from __future__ import annotations

import asyncio
import functools
import os
import re
import threading
import time
import urllib.request
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from cnnray.storage.replies import TRANSIENT_STATUSES, DamagedBodyError, Fault, check_body, etag_of

MAX_BYTES = 8 * 2**20
"""Largest body that is read: at the slowest transfer that is borne, it comes within one try."""

MAX_FAILURES, PAUSE_SECONDS = 8, 60.0
"""Failures in a row after which a bucket is left alone, and for how long."""

CREDENTIALS_SHARE = 0.25
"""Part of the time of a try in which credentials may be renewed."""

CREDENTIALS_LIFETIME = timedelta(minutes=10)
"""How long botocore's are good for at least; object_store asks anew five minutes before."""

_BUCKET = re.compile(r"[a-z0-9][a-z0-9.-]+(?<!--x-s3)", re.ASCII)  # no ARN, no directory bucket
_STATUS = re.compile(r"non-2xx status code: (\d{3})")


class LargeBodyError(Exception):
    """The object is none for this client."""


class FastReader:
    """Makes one obstore client for each bucket, with what botocore's ``client`` has resolved.

    ``filesystem`` is s3fs's, which knows the session and its event loop; a try takes ``seconds``
    at most, ``connect_seconds`` of them for the connection.
    """

    def __init__(
        self, filesystem: Any, client: Any, *, seconds: float, connect_seconds: float
    ) -> None:
        self._filesystem = filesystem
        self._client = client
        self._seconds = seconds
        self._connect_seconds = connect_seconds
        self._lock = threading.Lock()
        self._buckets: dict[str, Bucket | None] = {}

    def bucket(self, name: str, key: str, length: int | None) -> Bucket | None:
        """The bucket to read ``length`` bytes of an object from; None is a word to stand back."""
        if not keeps_its_name(key) or (length is not None and length > MAX_BYTES):
            return None
        with self._lock:
            if name not in self._buckets:
                self._buckets[name] = self._open(name)
            bucket = self._buckets[name]
        return None if bucket is None or bucket.is_paused() else bucket

    def _open(self, name: str) -> Bucket | None:
        if not (_BUCKET.fullmatch(name) and self._is_plain()):
            return None
        try:
            return Bucket(self._make_store(name))
        except Exception:  # an AWS_ variable that obstore does not understand
            return None

    def _make_store(self, bucket: str) -> Any:
        import obstore.store

        session, endpoint = self._filesystem.session, self._client.meta.endpoint_url
        seconds = self._seconds * (1 - CREDENTIALS_SHARE)
        options: Any = {
            "allow_http": endpoint.startswith("http://"),
            "connect_timeout": timedelta(seconds=min(seconds, self._connect_seconds)),
            "timeout": timedelta(seconds=seconds),
        }
        config: Any = {
            # Everything that a GET depends on: obstore fills what is missing from AWS_ variables.
            "aws_endpoint_url_s3": endpoint,  # of all names for it the one that wins
            "region": self._client.meta.region_name,
            "virtual_hosted_style_request": False,
            "skip_signature": False,
            "unsigned_payload": False,
            "request_payer": False,
            "s3_express": False,
        }
        credentials: Any = Credentials(
            session, self._filesystem.loop, self._seconds * CREDENTIALS_SHARE
        )
        return obstore.store.S3Store(
            bucket,
            config=config,
            client_options=options,
            retry_config={"max_retries": 0},
            credential_provider=credentials,
        )

    def _is_plain(self) -> bool:
        """Whether this client can do all that botocore's is told to do, in this process."""
        meta = self._client.meta
        addressing = meta.config.s3 or {}
        return (
            meta.config.signature_version == "s3v4"
            and not addressing.get("use_accelerate_endpoint")
            and addressing.get("addressing_style") != "virtual"
            and not urllib.request.getproxies().keys() - {"no"}
            and (meta.endpoint_url.startswith("http://") or not self._own_certificates())
            and _runtime_process() == os.getpid()
        )

    def _own_certificates(self) -> str | None:
        """The only authorities to trust; obstore would trust those of the system, too."""
        named: str | None = self._filesystem.session.get_config_variable("ca_bundle")
        return named or os.environ.get("REQUESTS_CA_BUNDLE")


class Bucket:
    """One bucket, and how it went of late."""

    def __init__(self, store: Any) -> None:
        self._store = store
        # Counted without a lock: a number that is lost moves a pause by one request.
        self._failures = 0
        self._paused_until = float("-inf")

    def is_paused(self) -> bool:
        """Whether too many reads failed a short while ago."""
        return time.monotonic() < self._paused_until

    def read(self, key: str, *, offset: int, length: int | None, if_match: str | None) -> bytes:
        """The bytes of an object, or of a range of it, of the version ``if_match`` if there is one.

        Raises whatever obstore raises, ``LargeBodyError``, and an error of its own for bytes that
        are not those that the store tells of.
        """
        try:
            data = _read(self._store, key, _options(offset, length, if_match))
        except LargeBodyError:
            raise
        except Exception:
            self._failures += 1
            if self._failures >= MAX_FAILURES:
                self._paused_until = time.monotonic() + PAUSE_SECONDS
            raise
        self._failures = 0
        return data


def _options(offset: int, length: int | None, if_match: str | None) -> dict[str, Any]:
    options: dict[str, Any] = {"if_match": f'"{if_match}"'} if if_match else {}
    if length is not None:
        options["range"] = (offset, offset + length)
    elif offset:
        options["range"] = {"offset": offset}
    return options


def _read(store: Any, key: str, options: dict[str, Any]) -> bytes:
    result = store.get(key, options=options)
    meta, (start, stop) = result.meta, result.range
    if stop - start > MAX_BYTES:
        raise LargeBodyError(key)
    data = bytes(result.bytes())
    reply = {"ETag": meta["e_tag"], "ContentRange": f"bytes {start}-{stop - 1}/{meta['size']}"}
    if len(data) != stop - start:
        raise EOFError(f"{len(data)} of {stop - start} bytes came")
    check_body(reply, data)
    if options.get("if_match") not in (None, f'"{etag_of(reply)}"'):
        raise ValueError("another version came")
    return data


def fault_of(error: Exception) -> Fault | None:
    """What a failed try tells of the store; None where it is the exact path's to find out."""
    if isinstance(error, LargeBodyError):
        return None
    if isinstance(error, DamagedBodyError):
        return Fault.DAMAGED
    found = _STATUS.search(str(error))  # obstore has no other place for it
    if found is None or int(found[1]) in TRANSIENT_STATUSES:
        return Fault.TRANSIENT
    return Fault.THROTTLED if found[1] in ("429", "503") else None


def keeps_its_name(key: str) -> bool:
    """Whether object_store asks for ``key`` as it is: it knows no empty and no relative folders."""
    return key.isprintable() and {"", ".", ".."}.isdisjoint(key.split("/"))


@dataclass(eq=False)
class Credentials:
    """Gives obstore the session's credentials, which botocore renews."""

    session: Any
    loop: Any
    seconds: float
    refused_until: float = float("-inf")

    def __call__(self) -> dict[str, Any]:
        # obstore's threads come here one after the other: they must not all wait for nothing.
        if time.monotonic() < self.refused_until:
            raise TimeoutError
        future = asyncio.run_coroutine_threadsafe(self._ask(), self.loop)
        try:
            return future.result(self.seconds)
        except Exception:
            self.refused_until = time.monotonic() + PAUSE_SECONDS
            raise
        finally:
            future.cancel()

    async def _ask(self) -> dict[str, Any]:
        frozen = await (await self.session.get_credentials()).get_frozen_credentials()
        return {
            "access_key_id": frozen.access_key,
            "secret_access_key": frozen.secret_key,
            "token": frozen.token,
            "expires_at": datetime.now(UTC) + CREDENTIALS_LIFETIME,
        }


@functools.cache
def _runtime_process() -> int:
    """The process that obstore's threads are of: a fork has this memory, yet no such threads."""
    return os.getpid()
