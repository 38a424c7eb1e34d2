"""One S3 client for each process, and the loop that asks until there is an answer."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from cnnray.errors import AccessDeniedError, StorageError, UnavailableError
from cnnray.storage import retry
from cnnray.storage.base import READ_CONCURRENCY
from cnnray.storage.fast_read import FastReader, fault_of
from cnnray.storage.replies import (
    Fault,
    check_body,
    classify,
    http_status,
    object_name,
    reason,
    storage_error,
)
from cnnray.storage.retry import Deadline, Pacer

CONNECT_SECONDS, SILENCE_SECONDS = 5, 20
"""Longest wait for a connection, and for the next byte on one."""

FIRST_CONTACT_SECONDS = 6.0
"""When a store that never answered this process is given up; an attempt under way may end."""

CLIENT_SECONDS = 30.0
"""Longest time to make a client, which may ask the machine's metadata service for credentials."""

MAX_DAMAGED = 2
"""Wrong bodies of one object that are read before it counts as damaged."""


@dataclass(eq=False)
class Connection:
    """A client of the store that the AWS environment names, and what it has learned of it."""

    filesystem: Any  # of s3fs, which closes the client's sockets when it is collected
    client: Any
    fast: FastReader
    pacer: Pacer
    reached: bool = False

    def read_fast(
        self,
        *,
        bucket: str,
        key: str,
        deadline: Deadline,
        offset: int,
        length: int | None,
        if_match: str | None,
    ) -> bytes | Fault | None:
        """What one try of the fast reader brought: bytes that are right, or the fault that it met.

        None when it was not tried, or met what ``request`` has to name. A fault goes to
        ``request`` as an attempt that was made.
        """
        source = self.fast.bucket(bucket, key, length)
        if source is None:
            return None
        try:
            with self.pacer.slot(deadline.left()):
                if deadline.left() < SILENCE_SECONDS:  # which a try may take
                    return None
                data = source.read(key, offset=offset, length=length, if_match=if_match)
        except Exception as error:
            fault = fault_of(error)
            if fault is Fault.THROTTLED:
                self.pacer.slow_down()
            return fault
        self.reached = True
        self.pacer.succeeded()
        return data

    def request(
        self,
        method: str,
        *,
        bucket: str,
        key: str | None,
        deadline: Deadline,
        earlier: Fault | None = None,
        **arguments: Any,
    ) -> tuple[dict[str, Any], bytes]:
        """The reply of one S3 operation and its whole body, after as many attempts as it takes.

        ``earlier`` is how an attempt before these failed. Raises what ``storage_error`` makes of a
        permanent answer, and ``UnavailableError``.
        """
        arguments |= {"Bucket": bucket} | ({} if key is None else {"Key": key})
        faults: list[Fault] = []
        if earlier is not None:
            faults.append(earlier)
            time.sleep(retry.delay_seconds(1))
        while True:
            try:
                with self.pacer.slot(deadline.left()):
                    answer = self._attempt(method, arguments, deadline)
            except Exception as error:
                faults.append(self._take_note(error))
                if faults[-1] is Fault.PERMANENT or faults.count(Fault.DAMAGED) == MAX_DAMAGED:
                    raise storage_error(error, bucket=bucket, key=key) from error
                delay = retry.delay_seconds(len(faults))
                self._check_hope(error, faults, delay, deadline, object_name(bucket, key))
                time.sleep(delay)
            else:
                self.reached = True
                self.pacer.succeeded()
                return answer

    def _attempt(
        self, method: str, arguments: dict[str, Any], deadline: Deadline
    ) -> tuple[dict[str, Any], bytes]:
        reply = self._wait(getattr(self.client, method)(**arguments), deadline)
        if "Body" not in reply:
            return reply, b""
        deadline.allow(reply.get("ContentLength", 0))
        data = self._wait(_read_all(reply["Body"]), deadline)
        check_body(reply, data)
        return reply, data

    def _wait(self, coroutine: Coroutine[Any, Any, Any], deadline: Deadline) -> Any:
        future = asyncio.run_coroutine_threadsafe(coroutine, self.filesystem.loop)
        try:
            return future.result(deadline.left())
        finally:
            future.cancel()  # closes the socket of a request that nobody waits for any more

    def _take_note(self, error: Exception) -> Fault:
        fault = classify(error)
        self.reached = self.reached or http_status(error) is not None
        if fault is Fault.THROTTLED:
            self.pacer.slow_down()
        elif fault is Fault.PERMANENT:
            self.pacer.succeeded()
        return fault

    def _check_hope(
        self,
        error: Exception,
        faults: Sequence[Fault],
        delay: float,
        deadline: Deadline,
        where: str,
    ) -> None:
        """Raise when it is of no use to wait for ``delay`` seconds and ask again."""
        is_unreachable = faults[-1] is Fault.UNREACHABLE
        if is_unreachable and not self.reached and deadline.elapsed() > FIRST_CONTACT_SECONDS:
            raise UnavailableError(
                f"cannot reach the object store for {where}",
                hint=f"check AWS_ENDPOINT_URL: {reason(error)}",
            ) from error
        # An outage is waited out to the deadline: refused connections are no burden to anyone.
        attempts = len(faults) - faults.count(Fault.UNREACHABLE)
        if attempts >= retry.MAX_ATTEMPTS or delay >= deadline.left():
            raise UnavailableError(
                f"{where}: the store gave no usable answer in {deadline.elapsed():.0f} s "
                f"and {len(faults)} attempts, the last: {reason(error)}",
                hint="run the same command again when the store is well",
            ) from error


async def _read_all(body: Any) -> bytes:
    async with body:
        return bytes(await body.read())


_lock = threading.Lock()
_connections: dict[tuple[object, ...], Connection] = {}


def connect() -> Connection:
    """This process's connection; a new one after a fork or a change of the AWS environment.

    Raises ``AccessDeniedError`` when the environment makes no client, ``UnavailableError`` when
    that may be different later: never what a source could take for a fact about one image.
    """
    names = sorted(name for name in os.environ if name.startswith("AWS_"))
    identity = (os.getpid(), *((name, os.environ[name]) for name in names))
    with _lock:
        if identity not in _connections:
            connection = _open()
            _connections.clear()
            _connections[identity] = connection
        return _connections[identity]


def _open() -> Connection:
    import s3fs

    try:
        filesystem = s3fs.S3FileSystem(
            config_kwargs={
                "connect_timeout": CONNECT_SECONDS,
                "read_timeout": SILENCE_SECONDS,
                "retries": {"mode": "standard", "total_max_attempts": 1},  # retries are ours
                "max_pool_connections": READ_CONCURRENCY,
            },
            skip_instance_cache=True,
            use_listings_cache=False,
        )
        session = filesystem.set_session()
        client = asyncio.run_coroutine_threadsafe(session, filesystem.loop).result(CLIENT_SECONDS)
    except Exception as error:
        raise _no_client(error) from error
    if "@" in urlsplit(client.meta.endpoint_url).netloc:
        raise AccessDeniedError(
            "credentials in the address of the object store are refused",
            hint="take them out of AWS_ENDPOINT_URL; use the AWS environment or a profile",
        )
    fast = FastReader(filesystem, client, seconds=SILENCE_SECONDS, connect_seconds=CONNECT_SECONDS)
    return Connection(
        filesystem=filesystem, client=client, fast=fast, pacer=Pacer(READ_CONCURRENCY)
    )


def _no_client(error: Exception) -> StorageError:
    """Why there is no client: a failure of the whole process, whichever image was asked for."""
    kind = AccessDeniedError if classify(error) is Fault.PERMANENT else UnavailableError
    return kind(
        f"cannot make an S3 client: {reason(error)}",
        hint="check AWS_ENDPOINT_URL, AWS_PROFILE and AWS_REGION",
    )
