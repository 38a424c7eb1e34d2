"""The fault-injecting S3 server itself: each fault is what it says it is, to a raw client.

That it is an S3 server when it does not fail is what test_store_contract.py says.
"""

from __future__ import annotations

import contextlib
import http.client
import io
import json
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import quote

import chaos_s3
import pytest
from chaos_s3 import ACTIONS, ChaosProcess, ChaosServer

from cnnray.storage import Store

pytestmark = pytest.mark.timeout(60)

BODY = bytes(range(256)) * 4
SOON = 0.5  # seconds that a client waits for what will not come


def _code(body: bytes) -> str:
    match = re.search(b"<Code>(.*)</Code>", body)
    return match[1].decode() if match else ""


def _connect(chaos: Any) -> socket.socket:
    host, port = chaos.server.endpoint.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=10)


def _receive(connection: socket.socket, *, body_bytes: int | None = None) -> tuple[bytes, bytes]:
    """The head and the body of a reply, up to so many bytes or to the end of the connection."""
    received = b""
    while data := connection.recv(1 << 16):
        received += data
        if body_bytes is not None and len(received.partition(b"\r\n\r\n")[2]) >= body_bytes:
            break
    head, _, body = received.partition(b"\r\n\r\n")
    return head, body


# Faults


@pytest.mark.parametrize(
    ("action", "status", "code"),
    [
        ("503", 503, "SlowDown"),
        ("500", 500, "InternalError"),
        ("429", 429, "TooManyRequests"),
        ("412", 412, "PreconditionFailed"),
        ("409", 409, "ConditionalRequestConflict"),
        ("access_denied", 403, "AccessDenied"),
    ],
)
def test_a_refusal_does_nothing(chaos: Any, action: str, status: int, code: str) -> None:
    chaos.server.set_rules({"action": action, "times": 1})
    refused, _, body = chaos.ask("PUT", "key", BODY)
    assert (refused, _code(body)) == (status, code)
    assert chaos.ask("GET", "key")[0] == 404
    assert [item.status for item in chaos.operations()] == [status, 404]


def test_a_reset_is_seen_and_does_nothing(chaos: Any) -> None:
    chaos.server.set_rules({"action": "reset", "times": 1})
    with _connect(chaos) as connection:
        connection.sendall(f"PUT /{chaos.bucket}/key HTTP/1.1\r\n\r\n".encode())
        with pytest.raises(ConnectionResetError):  # at a plain end there would be no error
            connection.recv(1)
    assert chaos.ask("GET", "key")[0] == 404
    (dropped,) = chaos.operations(method="PUT")
    assert (dropped.status, dropped.fault) == (0, "reset")


def test_no_headers_ever_come(chaos: Any) -> None:
    chaos.server.set_rules({"action": "no_headers", "times": 1})
    with pytest.raises(TimeoutError):
        chaos.ask("PUT", "key", BODY, timeout=SOON)
    assert chaos.ask("GET", "key")[0] == 404


@pytest.mark.parametrize("action", ["stall", "truncate"])
def test_half_of_the_body_comes(chaos: Any, action: str) -> None:
    chaos.ask("PUT", "key", BODY)
    chaos.server.set_rules({"action": action})
    with _connect(chaos) as connection:
        connection.sendall(f"GET /{chaos.bucket}/key HTTP/1.1\r\nhost: x\r\n\r\n".encode())
        head, body = _receive(connection, body_bytes=len(BODY) // 2)
        connection.settimeout(SOON)
        if action == "truncate":
            assert connection.recv(1) == b""  # and the connection ends
        else:
            with pytest.raises(TimeoutError):
                connection.recv(1)
    assert b"HTTP/1.1 200 " in head
    assert f"content-length: {len(BODY)}".encode() in head
    assert body == BODY[: len(BODY) // 2]


@pytest.mark.parametrize("action", ["stall", "truncate"])
def test_a_reply_without_a_body_breaks_off_in_its_first_line(chaos: Any, action: str) -> None:
    chaos.server.set_rules({"action": action, "times": 1})
    with pytest.raises((TimeoutError, http.client.HTTPException)):
        chaos.ask("PUT", "key", BODY, timeout=2)
    assert chaos.ask("GET", "key")[2] == BODY


def test_a_body_drips(chaos: Any) -> None:
    chaos.ask("PUT", "key", BODY)
    chaos.server.set_rules({"action": "drip", "bytes_per_second": 20})
    with _connect(chaos) as connection:
        connection.sendall(f"GET /{chaos.bucket}/key HTTP/1.1\r\nhost: x\r\n\r\n".encode())
        received, deadline = b"", time.monotonic() + 1
        while time.monotonic() < deadline:
            received += connection.recv(1 << 16)
    head, _, body = received.partition(b"\r\n\r\n")
    assert f"content-length: {len(BODY)}".encode() in head
    assert body == BODY[: len(body)]
    assert 1 <= len(body) <= 25


def test_a_dripping_body_comes_in_the_end(chaos: Any) -> None:
    chaos.ask("PUT", "key", b"0123456789")
    chaos.server.set_rules({"action": "drip", "bytes_per_second": 100})
    assert chaos.ask("GET", "key")[2] == b"0123456789"


def test_a_delay_is_waited_and_the_operation_done(chaos: Any) -> None:
    chaos.server.set_rules({"action": "delay", "seconds": SOON, "method": "PUT"})
    started = time.monotonic()
    assert chaos.ask("PUT", "key", BODY)[0] == 200
    assert time.monotonic() - started >= SOON
    assert chaos.ask("GET", "key")[2] == BODY


def test_one_bit_flips_and_nothing_tells(chaos: Any) -> None:
    chaos.ask("PUT", "key", BODY)
    good = chaos.ask("GET", "key")
    chaos.server.set_rules({"action": "flip", "times": 1})
    status, headers, body = chaos.ask("GET", "key")
    assert (status, headers.items()) == (200, good[1].items())
    assert len(body) == len(BODY)
    assert sum((a ^ b).bit_count() for a, b in zip(body, BODY, strict=True)) == 1
    assert chaos.ask("GET", "key")[2] == BODY


def test_a_lost_reply_belongs_to_an_operation_that_was_done(chaos: Any) -> None:
    chaos.server.set_rules({"action": "lost_reply", "times": 1})
    with pytest.raises(http.client.RemoteDisconnected):
        chaos.ask("PUT", "key", BODY, headers={"If-None-Match": "*"})
    assert chaos.ask("PUT", "key", b"other", headers={"If-None-Match": "*"})[0] == 412
    assert chaos.ask("GET", "key")[2] == BODY
    assert chaos.server.puts_per_key(chaos.bucket) == {"key": 1}


def test_a_condition_can_be_ignored(chaos: Any) -> None:
    chaos.server.set_rules({"action": "ignore_condition"})
    for body in (b"first", b"second"):
        assert chaos.ask("PUT", "key", body, headers={"If-None-Match": "*"})[0] == 200
    assert chaos.ask("GET", "key")[2] == b"second"
    assert chaos.server.puts_per_key(chaos.bucket) == {"key": 2}
    assert [item.condition for item in chaos.operations(method="PUT")] == ["if-none-match: *"] * 2


def test_a_listing_can_be_stale(chaos: Any) -> None:
    chaos.ask("PUT", "deleted", b"x")
    chaos.ask("PUT", "replaced", b"x")
    time.sleep(2 * SOON)
    changed = time.time()
    chaos.ask("DELETE", "deleted")
    chaos.ask("PUT", "replaced", b"xyz")
    chaos.ask("PUT", "new", b"x")
    age = time.time() - changed + SOON
    chaos.server.set_rules({"action": "stale_list", "seconds": age, "times": 1})
    listings = [chaos.ask("GET", "?list-type=2")[2] for _ in range(2)]
    keys = [re.findall(b"<Key>(.*?)</Key>", listing) for listing in listings]
    sizes = [re.findall(b"<Size>(.*?)</Size>", listing) for listing in listings]
    assert keys == [[b"deleted", b"replaced"], [b"new", b"replaced"]]
    assert sizes == [[b"1", b"1"], [b"1", b"3"]]


# Rules


def _statuses(chaos: Any, number: int, key: str = "key") -> list[int]:
    return [chaos.ask("GET", key)[0] for _ in range(number)]


def test_a_rule_strikes_the_nth_requests(chaos: Any) -> None:
    chaos.server.set_rules({"action": "503", "nth": [1, 3]})
    assert _statuses(chaos, 4) == [503, 404, 503, 404]
    chaos.server.set_rules({"action": "503", "nth": 2})
    assert _statuses(chaos, 3) == [404, 503, 404]


def test_a_rule_strikes_so_many_times(chaos: Any) -> None:
    chaos.server.set_rules({"action": "503", "times": 2})
    assert _statuses(chaos, 3) == [503, 503, 404]


def test_a_seed_decides_what_a_probability_strikes(chaos: Any) -> None:
    def run(seed: int) -> list[int]:
        chaos.server.set_rules({"action": "503", "probability": 0.4, "seed": seed})
        return _statuses(chaos, 40)

    first = run(1)
    assert run(1) == first
    assert run(2) != first
    assert 5 <= first.count(503) <= 27


def test_a_rule_is_for_a_method_an_operation_a_client_and_a_key(chaos: Any) -> None:
    refuse = {"action": "503"}
    chaos.server.set_rules(refuse | {"method": "PUT|DELETE"})
    assert (chaos.ask("PUT", "key", b"x")[0], chaos.ask("GET", "key")[0]) == (503, 404)
    chaos.server.set_rules(refuse | {"operation": "ListObjectsV2"})
    assert (chaos.ask("GET", "?list-type=2")[0], chaos.ask("GET", "key")[0]) == (503, 404)
    chaos.server.set_rules(refuse | {"key": "^part-.*7$"})
    assert (chaos.ask("GET", "part-17")[0], chaos.ask("GET", "part-71")[0]) == (503, 404)
    chaos.server.set_rules(refuse | {"client": "driver-2"})
    signed = {"Authorization": "AWS4-HMAC-SHA256 Credential=driver-2/20260101/us-east-1/s3"}
    assert chaos.ask("GET", "key", headers=signed)[0] == 503
    assert chaos.ask("GET", "key")[0] == 404


def test_a_rule_for_a_prefix_strikes_the_listing_of_it(chaos: Any) -> None:
    chaos.server.set_rules({"action": "503", "key": "^data/"})
    assert chaos.ask("GET", "?list-type=2&prefix=data%2F")[0] == 503
    assert chaos.ask("GET", "?list-type=2&prefix=log%2F")[0] == 200


def test_the_first_rule_that_strikes_takes_the_request(chaos: Any) -> None:
    chaos.server.set_rules({"action": "503", "times": 1}, {"action": "500", "nth": 1})
    assert _statuses(chaos, 3) == [503, 500, 404]
    assert [(rule["seen"], rule["struck"]) for rule in chaos.server.rules()] == [(1, 1), (2, 1)]


@pytest.mark.parametrize(
    "rule", [{"action": "explode"}, {"action": "503", "chance": 1}, {"action": "503", "key": "("}]
)
def test_a_wrong_rule_is_refused_and_the_old_ones_stay(chaos: Any, rule: dict[str, Any]) -> None:
    chaos.server.set_rules({"action": "503"})
    with pytest.raises(ValueError, match="rule|action|terminated"):
        chaos.server.set_rules(rule)
    assert _statuses(chaos, 1) == [503]


def test_every_action_has_a_test() -> None:
    text = Path(__file__).read_text()
    assert [name for name in ACTIONS if f'"{name}"' not in text] == []


# The log


def test_the_log_tells_who_did_what(chaos: Any) -> None:
    etag = json.loads(chaos.ask("PUT", "a/b", BODY, headers={"If-None-Match": "*"})[1]["etag"])
    chaos.ask("GET", "a/b", headers={"If-Match": '"other"'})
    put, get = chaos.operations()
    assert put[2:] == ("PUT", "PutObject", chaos.bucket, "a/b", 200, etag, "tester",
                       "if-none-match: *", "")  # fmt: skip
    assert get[2:] == ("GET", "GetObject", chaos.bucket, "a/b", 412, "", "tester",
                       'if-match: "other"', "")  # fmt: skip
    assert (get.number, get.time >= put.time) == (put.number + 1, True)
    assert chaos.server.operations(since=put.number) == [get]
    assert chaos.operations(status=412) == [get]


def test_steering_is_not_logged(chaos: Any) -> None:
    before = chaos.server.operations()
    chaos.server.set_rules({"action": "503"})
    assert chaos.server.operations() == before


# Keys and bodies


@pytest.mark.parametrize(
    "key",
    ["a/../b", "..", ".", "a//b", "/a", "//", "folder/", "two\nlines", "nul\0", "%2F", "%252F",
     "caf\u00e9", "cafe\u0301", "a+b c", "-", "é" * 512],
)  # fmt: skip
def test_a_key_is_kept_byte_for_byte(chaos: Any, key: str) -> None:
    path = quote(key, safe="/.")  # dots and slashes as they are: nobody may tidy them up
    assert chaos.ask("PUT", path, key.encode())[0] == 200
    assert chaos.ask("GET", path)[2] == key.encode()
    assert chaos.ask("GET", quote(key, safe=""))[2] == key.encode()
    listing = chaos.ask("GET", "?list-type=2&encoding-type=url")[2].decode()
    assert re.findall("<Key>(.*?)</Key>", listing) == [quote(key, safe="/")]
    assert [item.key for item in chaos.operations(method="PUT")] == [key]


@pytest.mark.parametrize("path", ["x" * 1025, "%FF"])
def test_a_key_that_s3_has_not_is_refused(chaos: Any, path: str) -> None:
    assert chaos.ask("PUT", path, b"x")[0] == 400
    assert chaos.ask("GET", "?list-type=2")[2].count(b"<Key>") == 0


def test_pages_are_as_small_as_one_asks(chaos_store: Store, chaos: Any) -> None:
    keys = [f"k{number}" for number in range(7)]
    for key in keys:
        chaos_store.write(key, b"x")
    chaos.server.set_page_size(3)
    assert [item.key for item in chaos_store.list()] == keys
    assert len(chaos.operations(operation="ListObjectsV2")) == 3


def _aws_chunked(data: bytes) -> bytes:
    """A body as botocore streams it, with its checksum at the end."""
    from botocore.httpchecksum import AwsChunkedWrapper, Crc32Checksum

    wrapper = AwsChunkedWrapper(
        io.BytesIO(data), Crc32Checksum, "x-amz-checksum-crc32", chunk_size=300
    )
    return wrapper.read()


AWS_CHUNKED = {
    "x-amz-content-sha256": "STREAMING-UNSIGNED-PAYLOAD-TRAILER",
    "content-encoding": "gzip, aws-chunked",
    "x-amz-decoded-content-length": str(len(BODY)),
    "x-amz-trailer": "x-amz-checksum-crc32",
}


def test_a_body_in_aws_chunks_is_decoded(chaos: Any) -> None:
    assert chaos.ask("PUT", "key", _aws_chunked(BODY), headers=AWS_CHUNKED)[0] == 200
    _, headers, body = chaos.ask("GET", "key")
    assert (body, headers["content-encoding"]) == (BODY, "gzip")


def test_aws_chunks_in_http_chunks_are_decoded(chaos: Any) -> None:
    encoded = _aws_chunked(BODY)
    blocks: Any = iter([encoded[:500], encoded[500:]])  # http.client sends each as a chunk
    assert chaos.ask("PUT", "key", blocks, headers=AWS_CHUNKED)[0] == 200
    assert chaos.ask("GET", "key")[2] == BODY


@pytest.mark.parametrize(
    ("encoded", "code"),
    [
        (_aws_chunked(BODY).replace(b"\x07", b"\x08", 1), "BadDigest"),
        (_aws_chunked(BODY[1:]), "IncompleteBody"),
    ],
)
def test_a_body_that_is_not_what_was_sent_is_refused(chaos: Any, encoded: bytes, code: str) -> None:
    status, _, body = chaos.ask("PUT", "key", encoded, headers=AWS_CHUNKED)
    assert (status, _code(body)) == (400, code)
    assert chaos.ask("GET", "key")[0] == 404


def test_half_an_upload_leaves_nothing(chaos: Any) -> None:
    with _connect(chaos) as connection:
        head = f"PUT /{chaos.bucket}/key HTTP/1.1\r\ncontent-length: 100\r\n\r\n"
        connection.sendall(head.encode() + b"x" * 50)
    assert chaos.ask("GET", "key")[0] == 404


def test_a_client_may_wait_to_be_asked_for_the_body(chaos: Any) -> None:
    with _connect(chaos) as connection:
        head = f"PUT /{chaos.bucket}/key HTTP/1.1\r\ncontent-length: 4\r\nExpect: 100-continue"
        connection.sendall(head.encode() + b"\r\n\r\n")
        assert connection.recv(100) == b"HTTP/1.1 100 Continue\r\n\r\n"
        connection.sendall(b"body")
        assert connection.recv(1000).startswith(b"HTTP/1.1 200 OK\r\n")
    assert chaos.ask("GET", "key")[2] == b"body"


def test_a_connection_serves_many_requests(chaos: Any) -> None:
    request = f"GET /{chaos.bucket}/key HTTP/1.1\r\n\r\n".encode()
    with _connect(chaos) as connection:
        connection.sendall(
            request * 3 + request.replace(b"\r\n\r\n", b"\r\nconnection: close\r\n\r\n")
        )
        assert b"".join(_receive(connection)).count(b"HTTP/1.1 404 ") == 4


def test_a_malformed_request_ends_the_connection_only(chaos: Any) -> None:
    for garbage in (b"\x16\x03\x01\r\n", b"GET / HTTP/1.1\r\nno colon\r\n", b"\r\n" * 9):
        with _connect(chaos) as connection:
            connection.sendall(garbage)
            connection.shutdown(socket.SHUT_WR)
            assert _receive(connection) == (b"", b"")
    assert chaos.ask("GET", "key")[0] == 404


def test_creators_in_one_moment_have_one_winner(chaos: Any) -> None:
    for key in ("a", "b", "c"):
        head = (
            f"PUT /{chaos.bucket}/{key} HTTP/1.1\r\nif-none-match: *\r\ncontent-length: 2\r\n\r\n"
        )
        with contextlib.ExitStack() as stack:
            racers = [stack.enter_context(_connect(chaos)) for _ in range(20)]
            for racer in racers:
                racer.sendall(head.encode() + b"x")
            for racer in racers:  # nothing but the last byte is missing
                racer.sendall(b"x")
            replies = [racer.recv(1000)[9:12] for racer in racers]
        assert sorted(replies) == [b"200"] + [b"412"] * 19


# The process


def _put_until_killed(killable: Any, worker: str, acknowledged: list[str]) -> None:
    for number in range(10_000):
        key = f"{worker}-{number}"
        try:
            status, _, _ = killable.ask("PUT", key, key.encode() * 5000)
        except (OSError, http.client.HTTPException):
            return
        assert status == 200
        acknowledged.append(key)


def _list_keys(chaos: Any) -> list[str]:
    keys, token = [], ""
    while True:
        page = chaos.ask("GET", f"?list-type=2&continuation-token={quote(token)}")[2].decode()
        keys += re.findall("<Key>(.*?)</Key>", page)
        following = re.search("<NextContinuationToken>(.*?)<", page)
        if following is None:
            return keys
        token = following[1]


def test_a_killed_server_comes_back_with_whole_objects_only(killable: Any) -> None:
    endpoint = killable.server.endpoint
    acknowledged: list[str] = []
    for life in ("first", "second"):
        enough = len(acknowledged) + 40
        with ThreadPoolExecutor(4) as pool:
            workers = [
                pool.submit(_put_until_killed, killable, f"{life}-{worker}", acknowledged)
                for worker in range(4)
            ]
            while len(acknowledged) < enough:
                time.sleep(0.01)
            killable.server.kill()
            for worker in workers:
                worker.result(timeout=20)
        killable.server.start()
    assert killable.server.endpoint == endpoint
    listed = _list_keys(killable)
    assert set(acknowledged) <= set(listed)
    assert len(listed) == len(set(listed))
    for key in listed:
        assert killable.ask("GET", key)[2] == key.encode() * 5000


def test_metadata_survives_a_kill(killable: Any) -> None:
    killable.ask("PUT", "key", b"x", headers={"x-amz-meta-colour": "red"})
    killable.server.kill()
    killable.server.start()
    assert killable.ask("HEAD", "key")[1]["x-amz-meta-colour"] == "red"


def test_the_log_goes_on_after_a_kill(killable: Any) -> None:
    killable.ask("PUT", "before", b"x")
    killable.server.kill()
    killable.server.start()
    killable.ask("PUT", "after", b"x")
    assert [item.key for item in killable.operations(operation="PutObject")] == ["before", "after"]
    numbers = [item.number for item in killable.server.operations()]
    assert numbers == list(range(1, len(numbers) + 1))


def test_an_upload_survives_a_kill(killable: Any) -> None:
    upload = re.search(b"<UploadId>(.*)</UploadId>", killable.ask("POST", "key?uploads")[2])
    assert upload is not None
    path = f"key?uploadId={upload[1].decode()}"
    etag = killable.ask("PUT", f"{path}&partNumber=1", BODY)[1]["etag"]
    killable.server.kill()
    killable.server.start()
    part = f"<Part><PartNumber>1</PartNumber><ETag>{etag}</ETag></Part>"
    body = f"<CompleteMultipartUpload>{part}</CompleteMultipartUpload>".encode()
    assert killable.ask("POST", path, body)[0] == 200
    assert killable.ask("GET", "key")[2] == BODY


def test_a_stop_is_prompt_even_with_a_client_that_waits(killable: Any) -> None:
    killable.server.set_rules({"action": "no_headers"})
    with _connect(killable) as connection:
        connection.sendall(b"GET /bucket/key HTTP/1.1\r\n\r\n")
        while not killable.operations(fault="no_headers"):
            time.sleep(0.01)
        started = time.monotonic()
        killable.server.stop()
        assert time.monotonic() - started < 5
        assert connection.recv(1) == b""


@pytest.fixture
def command_line(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    rules = tmp_path / "rules.json"
    rules.write_text(json.dumps([{"action": "503", "nth": 1}]))
    command = [sys.executable, chaos_s3.__file__, f"--folder={tmp_path / 'data'}"]
    command += [f"--rules={rules}", "--port=0", "--lifetime=60"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    yield process
    process.kill()
    process.communicate(timeout=10)


def test_the_command_line_takes_rules(command_line: subprocess.Popen[str]) -> None:
    assert command_line.stdout is not None
    address = command_line.stdout.readline().strip().removeprefix("http://")
    statuses = []
    for _ in range(2):
        with contextlib.closing(http.client.HTTPConnection(address, timeout=10)) as connection:
            connection.request("PUT", "/new-bucket")
            statuses.append(connection.getresponse().status)
    assert statuses == [503, 200]
    command_line.send_signal(signal.SIGTERM)
    assert command_line.wait(10) == 0


def test_the_process_ends_with_its_lifetime(tmp_path: Path) -> None:
    command = [sys.executable, chaos_s3.__file__, f"--folder={tmp_path}", "--lifetime=1"]
    done = subprocess.run(command, capture_output=True, timeout=20, check=False)
    assert done.returncode == -signal.SIGALRM


def _ask(server: ChaosServer, method: str, path: str, body: bytes = b"") -> tuple[int, str]:
    address = server.endpoint.removeprefix("http://")
    with contextlib.closing(http.client.HTTPConnection(address, timeout=10)) as connection:
        connection.request(method, path, body)
        reply = connection.getresponse()
        return reply.status, reply.read().decode()


def test_the_server_runs_in_process_too(tmp_path: Path) -> None:
    with ChaosServer(tmp_path, rules=[{"action": "503", "nth": 2}]) as server:
        server.create_bucket("bucket")
        assert [_ask(server, "PUT", "/bucket/key", b"x")[0] for _ in range(2)] == [200, 503]
        assert [item.status for item in server.operations(key="key")] == [200, 503]
        assert server.puts_per_key("bucket") == {"key": 1}
    with pytest.raises(ConnectionRefusedError):
        _ask(server, "GET", "/bucket/key")


def test_the_order_of_keys_survives_a_restart(tmp_path: Path) -> None:
    keys = ["a", "\uffee", "\U0001f408"]  # as UTF-16, the last two are the other way round
    with ChaosServer(tmp_path) as server:
        server.create_bucket("bucket")
        for key in reversed(keys):
            assert _ask(server, "PUT", f"/bucket/{quote(key)}", b"x")[0] == 200
    with ChaosServer(tmp_path) as server:
        listing = _ask(server, "GET", "/bucket?list-type=2")[1]
    assert re.findall("<Key>(.*?)</Key>", listing) == keys


def test_a_server_that_does_not_start_is_said_so(tmp_path: Path) -> None:
    (tmp_path / "objects").write_text("a file in the way")
    with pytest.raises(RuntimeError, match="did not start"):
        ChaosProcess(tmp_path).start()
