"""The fast reader: whom it trusts, as whom it asks, and when it stands back."""

from __future__ import annotations

import asyncio
import gc
import hashlib
import ipaddress
import ssl
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cnnray.errors import ChangedObjectError
from cnnray.storage import S3Store, Store, connection, fast_read, open_store, retry
from cnnray.storage.fast_read import Credentials, keeps_its_name
from cnnray.storage.replies import Fault
from cnnray.storage.retry import Deadline

pytestmark = pytest.mark.timeout(120)

DATA = b"the content"
MD5 = hashlib.md5(DATA).hexdigest()


@pytest.fixture(autouse=True)
def new_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "_connections", {})
    monkeypatch.setattr(retry, "FIRST_DELAY_SECONDS", 0.01)


def read_fast(store: Any, key: str, **window: Any) -> bytes | Fault | None:
    """One try of the fast reader alone."""
    window = {"offset": 0, "length": None, "if_match": None} | window
    return connection.connect().read_fast(
        bucket=store.bucket,
        key=f"{store.prefix}/{key}".removeprefix("/"),
        deadline=Deadline(),
        **window,
    )


def use_config(monkeypatch: pytest.MonkeyPatch, file: Path, text: str) -> None:
    """Make ``text`` the user's AWS configuration."""
    file.write_text(text)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(file))


# A server that says what it likes


@dataclass
class Toy:
    """Answers every GET with ``headers`` and ``body``; keeps the headers of the requests."""

    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = DATA
    requests: list[Mapping[str, str]] = field(default_factory=list)
    bucket: str = "bucket"
    prefix: str = ""
    url: str = ""

    def reply_to(self, request: BaseHTTPRequestHandler) -> None:
        self.requests.append(dict(request.headers) | {"path": request.path})
        request.send_response(self.status)
        for name, value in {"content-length": str(len(self.body)), **self.headers}.items():
            request.send_header(name, value)
        request.end_headers()
        request.wfile.write(self.body)


@pytest.fixture
def serve(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Iterator[Callable[[ssl.SSLContext | None], Toy]]:
    """Start a toy server and make it the store of the AWS environment."""
    servers = []

    def start(tls: ssl.SSLContext | None = None) -> Toy:
        toy = Toy()

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            timeout = 10

            def do_GET(self) -> None:
                toy.reply_to(self)

            def log_message(self, *_: object) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.daemon_threads = True
        if tls is not None:
            server.socket = tls.wrap_socket(server.socket, server_side=True)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        toy.url = f"{'http' if tls is None else 'https'}://127.0.0.1:{server.server_port}"
        for name, value in {
            "AWS_ENDPOINT_URL": toy.url,
            "AWS_ACCESS_KEY_ID": "someone",
            "AWS_SECRET_ACCESS_KEY": "hunter2-hunter2",
            "AWS_DEFAULT_REGION": "eu-north-1",
        }.items():
            monkeypatch.setenv(name, value)
        return toy

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


# What it believes


def test_bytes_with_the_digest_of_their_etag_are_good(serve: Any) -> None:
    toy = serve()
    toy.headers = {"etag": f'"{MD5}"'}
    assert read_fast(toy, "key") == DATA
    assert read_fast(toy, "key", if_match=MD5) == DATA


def test_an_etag_that_is_no_digest_is_not_compared(serve: Any) -> None:
    toy = serve()
    toy.headers = {"etag": f'"{MD5[::-1]}-2"'}
    assert read_fast(toy, "key") == DATA


def test_another_version_than_the_one_asked_for_is_changed(serve: Any) -> None:
    toy = serve()  # knows no If-Match
    toy.headers = {"etag": '"another-1"'}
    assert not isinstance(read_fast(toy, "key", if_match="wanted-1"), bytes)
    with pytest.raises(ChangedObjectError):
        open_store("s3://bucket").read("key", if_match="wanted-1")


def test_a_store_without_ranges_is_read_by_the_other_client(serve: Any) -> None:
    toy = serve()
    toy.headers = {"etag": f'"{MD5}"'}
    assert not isinstance(read_fast(toy, "key", offset=4, length=3), bytes)
    assert open_store("s3://bucket").read("key", offset=4, length=3) == DATA[4:7]


def test_an_encrypted_object_whose_etag_looks_like_a_digest_is_read_twice_for_a_while_only(
    serve: Any,
) -> None:
    toy = serve()
    toy.headers = {"etag": f'"{MD5[::-1]}"', "x-amz-server-side-encryption": "aws:kms"}
    store = open_store("s3://bucket")
    for _ in range(20):
        assert store.read("key") == DATA
    assert len(toy.requests) == 20 + fast_read.MAX_FAILURES


def test_compressed_bytes_are_read_as_they_are_stored(serve: Any) -> None:
    toy = serve()
    toy.headers = {"etag": f'"{MD5}"', "content-encoding": "gzip"}
    assert read_fast(toy, "key") == open_store("s3://bucket").read("key") == DATA
    assert "gzip" not in toy.requests[0].get("accept-encoding", "")


# As whom it asks


def test_it_asks_as_botocore_does(serve: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    toy = serve()
    toy.headers = {"etag": f'"{MD5}"'}
    monkeypatch.setenv("AWS_SESSION_TOKEN", "a-token")
    read_fast(toy, "folder/key")
    open_store("s3://bucket").read("folder/key", offset=1)
    fast, slow = toy.requests[0], toy.requests[-1]
    assert fast["path"].partition("?")[0] == slow["path"].partition("?")[0] == "/bucket/folder/key"
    scope = "Credential=someone/"
    for request in ({name.lower(): value for name, value in r.items()} for r in (fast, slow)):
        assert scope in request["authorization"]
        assert "/eu-north-1/s3/aws4_request" in request["authorization"]
        assert request["x-amz-security-token"] == "a-token"


@pytest.mark.s3
def test_variables_that_botocore_does_not_know_change_nothing(
    seaweed: Any, seaweed_store: S3Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    seaweed_store.write("key", DATA)
    for name, value in {
        "AWS_SKIP_SIGNATURE": "true",
        "AWS_S3_EXPRESS": "true",
        "AWS_VIRTUAL_HOSTED_STYLE_REQUEST": "true",
        "AWS_ENDPOINT": "http://127.0.0.1:1",
        "AWS_BUCKET": "another",
        "AWS_TIMEOUT": "1ns",
        "AWS_PROXY_URL": "http://127.0.0.1:1",
    }.items():
        monkeypatch.setenv(name, value)
    assert read_fast(seaweed_store, "key") == DATA


@pytest.mark.s3
def test_credentials_and_region_of_a_profile_are_used(
    seaweed: Any, seaweed_store: S3Store, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    seaweed_store.write("key", DATA)
    text = f"[profile someone]\nregion = us-east-1\nendpoint_url = {seaweed.endpoint}\n"
    text += f"aws_access_key_id = {seaweed.access_key}\n"
    use_config(
        monkeypatch, tmp_path / "config", text + f"aws_secret_access_key = {seaweed.secret_key}"
    )
    for name in ("ENDPOINT_URL", "ACCESS_KEY_ID", "SECRET_ACCESS_KEY", "REGION", "DEFAULT_REGION"):
        monkeypatch.delenv(f"AWS_{name}")
    monkeypatch.setenv("AWS_PROFILE", "someone")
    assert read_fast(seaweed_store, "key") == DATA


@pytest.mark.s3
@pytest.mark.parametrize(
    "key", ["with space.png", "Ünï/猫 🐈.png", "100%25.png", "a+b=c&d?e#f.png"]
)
def test_odd_keys_are_signed_as_the_store_wants_it(seaweed_store: S3Store, key: str) -> None:
    seaweed_store.write(key, DATA)
    assert read_fast(seaweed_store, key) == DATA


def session(*answers: Any) -> tuple[Any, list[Any]]:
    """A session whose credentials are these, one after the other; and those left."""
    left = list(answers)

    async def get_frozen_credentials() -> Any:
        answer = left.pop(0)
        if answer == "hang":
            await asyncio.sleep(60)
        return SimpleNamespace(access_key=answer, secret_key="secret", token=None)

    async def get_credentials() -> Any:
        return SimpleNamespace(get_frozen_credentials=get_frozen_credentials)

    return SimpleNamespace(get_credentials=get_credentials), left


@pytest.fixture
def loop() -> Iterator[asyncio.AbstractEventLoop]:
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    yield loop
    asyncio.run_coroutine_threadsafe(asyncio.sleep(0), loop).result(10)  # what was cancelled ends
    loop.call_soon_threadsafe(loop.stop)
    thread.join(10)
    loop.close()


def test_credentials_are_asked_for_anew_before_botocore_would_let_them_expire(loop: Any) -> None:
    credentials = Credentials(session("first", "second")[0], loop, 5.0)
    first, second = credentials(), credentials()
    assert (first["access_key_id"], second["access_key_id"]) == ("first", "second")
    # botocore renews what has ten minutes left; obstore asks again five minutes before the end
    assert first["expires_at"] - datetime.now(UTC) <= timedelta(minutes=10)


def test_credentials_that_do_not_come_hold_up_one_reader_only(loop: Any) -> None:
    place, left = session("hang", "later")
    credentials = Credentials(place, loop, 0.2)
    started = time.monotonic()
    for _ in range(16):
        with pytest.raises(TimeoutError):
            credentials()
    assert time.monotonic() - started < 2
    assert left == ["later"]


# Whom it trusts


def authority(folder: Path) -> tuple[Path, ssl.SSLContext]:
    """The certificate of a new authority, and a server's context with one that it signed."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    def name(text: str) -> x509.Name:
        return x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, text)])

    def certificate(subject: str, key: Any, *, signer: Any, is_authority: bool) -> Any:
        now = datetime.now(UTC)
        return (
            x509.CertificateBuilder()
            .subject_name(name(subject))
            .issuer_name(name("authority"))
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - timedelta(hours=1))
            .not_valid_after(now + timedelta(hours=1))
            .add_extension(x509.BasicConstraints(is_authority, None), critical=True)
            .add_extension(
                x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]),
                critical=False,
            )
            .sign(signer, hashes.SHA256())
        )

    own, key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    pem = serialization.Encoding.PEM
    trusted, served, private = (folder / name for name in ("ca.pem", "server.pem", "key.pem"))
    root = certificate("authority", own, signer=own, is_authority=True)
    trusted.write_bytes(root.public_bytes(pem))
    leaf = certificate("server", key, signer=own, is_authority=False)
    served.write_bytes(leaf.public_bytes(pem))
    private.write_bytes(
        key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(served, private)
    return trusted, context


@pytest.fixture
def https(serve: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> tuple[Toy, Path]:
    """A server behind TLS, and the authority that nobody is told to trust yet."""
    trusted, context = authority(tmp_path)
    toy = serve(context)
    toy.headers = {"etag": f'"{MD5}"'}
    for name in ("AWS_CA_BUNDLE", "REQUESTS_CA_BUNDLE", "SSL_CERT_FILE", "SSL_CERT_DIR"):
        monkeypatch.delenv(name, raising=False)
    return toy, trusted


def test_the_systems_authorities_are_trusted(
    https: tuple[Toy, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    toy, trusted = https
    monkeypatch.setenv("SSL_CERT_FILE", str(trusted))
    assert read_fast(toy, "key") == DATA


def test_no_other_authority_is_trusted(
    https: tuple[Toy, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    toy, _ = https
    monkeypatch.setenv("AWS_ALLOW_INVALID_CERTIFICATES", "true")  # which obstore knows
    assert read_fast(toy, "key") is Fault.TRANSIENT
    assert toy.requests == []


@pytest.mark.parametrize("variable", ["AWS_CA_BUNDLE", "REQUESTS_CA_BUNDLE"])
def test_authorities_of_ones_own_are_left_to_botocore(
    https: tuple[Toy, Path], monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    toy, trusted = https
    monkeypatch.setenv(variable, str(trusted))
    assert read_fast(toy, "key") is None
    assert open_store("s3://bucket").read("key") == DATA


# When it stands back


@pytest.mark.parametrize(
    "setting",
    ["addressing_style = virtual", "use_accelerate_endpoint = true", "signature_version = s3"],
)
def test_a_configuration_that_asks_for_more_is_left_alone(
    serve: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, setting: str
) -> None:
    toy = serve()
    use_config(monkeypatch, tmp_path / "config", f"[default]\ns3 =\n  {setting}\n")
    assert read_fast(toy, "key") is None


@pytest.mark.parametrize("variable", ["HTTP_PROXY", "https_proxy", "ALL_PROXY"])
def test_proxies_are_left_to_botocore(
    serve: Any, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    monkeypatch.setenv(variable, "http://127.0.0.1:1")
    assert read_fast(serve(), "key") is None


@pytest.mark.parametrize("bucket", ["zone--usw2-az1--x-s3", "arn:aws:s3:::access", "Upper", "a"])
def test_a_bucket_of_another_kind_is_left_alone(serve: Any, bucket: str) -> None:
    toy = serve()
    toy.bucket = bucket
    assert read_fast(toy, "key") is None


@pytest.mark.parametrize("name", ["AWS_SERVER_SIDE_ENCRYPTION", "AWS_CHECKSUM_ALGORITHM"])
def test_a_variable_that_obstore_does_not_understand_is_no_error(
    serve: Any, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    toy = serve()
    toy.headers = {"etag": f'"{MD5}"'}
    monkeypatch.setenv(name, "nonsense")
    assert read_fast(toy, "key") is None
    assert open_store("s3://bucket").read("key") == DATA


@pytest.mark.parametrize("key", ["a", "a b/ü.png", "..a/b..", "%2e%2e", ".hidden", "a\\b"])
def test_a_path_keeps_its_name(key: str) -> None:
    assert keeps_its_name(key)


@pytest.mark.parametrize(
    "key", ["", "/a", "a/", "a//b", ".", "..", "a/./b", "a/..", "a\nb", "\ud800"]
)
def test_what_is_no_path_does_not(key: str) -> None:
    assert not keeps_its_name(key)


# Processes


@pytest.mark.s3
def test_a_fork_reads_without_the_threads_of_its_parent(seaweed_store: Store) -> None:
    seaweed_store.write("key", DATA)
    script = """
import os, signal, sys
from cnnray.storage import connection, open_store
store = open_store(sys.argv[1])
assert store.read("key") == b"the content"
assert connection.connect().fast.bucket(store.bucket, "key", None) is not None
child = os.fork()
if child == 0:
    signal.alarm(30)
    os._exit(0 if store.read("key") == b"the content" else 1)
assert os.waitpid(child, 0)[1] == 0
assert store.read("key") == b"the content"
"""
    command = [sys.executable, "-c", script, seaweed_store.uri]
    subprocess.run(command, check=True, timeout=100, cwd=Path(__file__).parents[2])


@pytest.mark.s3
def test_a_connection_that_is_replaced_is_freed_with_its_sockets(
    seaweed_store: S3Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    seaweed_store.write("key", DATA)
    assert read_fast(seaweed_store, "key") == DATA
    before = weakref.ref(connection.connect().filesystem)
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")  # another environment
    assert seaweed_store.read("key") == DATA
    gc.collect()
    assert before() is None
