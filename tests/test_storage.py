"""One contract for every store: a folder, and S3 servers that really run."""

from __future__ import annotations

import os
import pickle
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cnnray import storage
from cnnray.errors import AlreadyExistsError, MissingObjectError, StorageError
from cnnray.storage import (
    LocalStore,
    S3Store,
    Store,
    child,
    encode_json,
    open_store,
    read_json,
    read_many,
    split_uri,
)

ODD_KEYS = (
    "with space.png",
    "Ünï/猫 🐈.png",
    "100%20off%.png",
    'it\'s "quoted".png',
    "a+b=c&d?e#f.png",
    "<tag>/[x]{y}.png",
    "back\\slash.png",
    "..hidden../...png",
)


@pytest.fixture
def fresh_clients(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], None]]:
    """Forget the S3 clients, which remember the server that they were opened for."""
    import s3fs

    def forget() -> None:
        s3fs.S3FileSystem.clear_instance_cache()
        monkeypatch.setattr(storage, "_clients", threading.local())

    forget()
    yield forget
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.fixture(scope="session")
def moto() -> Iterator[str]:
    server_module = pytest.importorskip("moto.server")
    server = server_module.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


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
def seaweed_store(seaweed: Any, fresh_clients: Any, tmp_path: Path) -> Store:
    return open_store(seaweed.uri(f"{tmp_path.name}-{time.time_ns()}"))


@pytest.fixture
def moto_store(
    moto: str, fresh_clients: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Store:
    import botocore.session

    monkeypatch.setenv("AWS_ENDPOINT_URL", moto)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "any")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "any")
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    botocore.session.Session().create_client("s3", region_name="us-east-1").create_bucket(
        Bucket="moto-tests"
    )
    return open_store(f"s3://moto-tests/{tmp_path.name}-{time.time_ns()}")


# Reading and writing


def test_what_was_written_is_read_back(store: Store) -> None:
    store.write("a/b.bin", bytes(range(256)))
    assert store.read("a/b.bin") == bytes(range(256))


@pytest.mark.parametrize(
    ("offset", "length", "expected"),
    [
        (0, 3, b"012"),
        (4, 3, b"456"),
        (4, None, b"456789"),
        (8, 100, b"89"),
        (10, None, b""),
        (10, 5, b""),
        (99, 5, b""),
        (3, 0, b""),
    ],
)
def test_a_range_holds_what_there_is_of_it(
    store: Store, offset: int, length: int | None, expected: bytes
) -> None:
    store.write("digits", b"0123456789")
    assert store.read("digits", offset=offset, length=length) == expected


def test_an_empty_object_is_an_object(store: Store) -> None:
    store.write("empty", b"")
    assert store.read("empty") == b""
    assert store.head("empty").size == 0


def test_write_replaces(store: Store) -> None:
    store.write("key", b"old")
    store.write("key", b"new")
    assert store.read("key") == b"new"


def test_what_is_not_there_is_missing(store: Store) -> None:
    store.write("there", b"x")
    with pytest.raises(MissingObjectError, match="gone"):
        store.read("gone")
    with pytest.raises(MissingObjectError, match="gone"):
        store.read("gone", offset=3, length=4)
    with pytest.raises(MissingObjectError, match="gone"):
        store.open("gone").read()
    with pytest.raises(MissingObjectError, match="under"):
        store.read("there/under")


def test_delete_removes_and_a_missing_key_is_no_error(store: Store) -> None:
    store.write("a/b", b"x")
    store.delete("a/b")
    store.delete("a/b")
    store.delete("never/was")
    assert store.head("a/b") is None


def test_head_knows_the_size_and_a_new_etag_for_new_bytes(store: Store) -> None:
    store.write("key", b"old")
    before = store.head("key")
    store.write("key", b"newer")
    after = store.head("key")
    assert (before.key, before.size, after.size) == ("key", 3, 5)
    assert before.etag != after.etag


def test_head_of_nothing_and_of_a_folder_is_none(store: Store) -> None:
    store.write("folder/key", b"x")
    assert store.head("other") is None
    assert store.head("folder") is None
    assert store.head("folder/key/below") is None


@pytest.mark.parametrize("key", ODD_KEYS)
def test_odd_keys_are_taken_literally(
    store: Store, key: str, request: pytest.FixtureRequest
) -> None:
    if "\\" in key and "seaweed" in request.node.callspec.id:
        pytest.skip("SeaweedFS makes a slash of a backslash")
    store.create(key, key.encode())
    assert store.read(key) == key.encode()
    assert [item.key for item in store.list()] == [key]
    assert store.head(key).size == len(key.encode())
    assert store.open(key).read() == key.encode()
    with pytest.raises(AlreadyExistsError):
        store.create(key, b"other")
    store.delete(key)
    assert store.head(key) is None


# Conditional creation


def test_create_accepts_the_same_bytes_and_refuses_others(store: Store) -> None:
    store.create("key", b"first")
    store.create("key", b"first")
    with pytest.raises(AlreadyExistsError, match="key"):
        store.create("key", b"second")
    assert store.read("key") == b"first"


def test_create_respects_what_write_wrote(store: Store) -> None:
    store.write("key", b"written")
    store.create("key", b"written")
    with pytest.raises(AlreadyExistsError):
        store.create("key", b"created")


def test_of_concurrent_creators_exactly_one_wins(
    store: Store, request: pytest.FixtureRequest
) -> None:
    if "moto" in request.node.callspec.id:
        pytest.skip("moto checks, then sets, without a lock")
    barrier = threading.Barrier(8, timeout=30)

    def create(number: int) -> int | None:
        data = bytes([number]) * 50_000
        store.head("key")  # opens this thread's client
        barrier.wait()
        try:
            store.create("key", data)
        except AlreadyExistsError:
            return None
        return number

    with ThreadPoolExecutor(8) as pool:
        winners = [number for number in pool.map(create, range(8)) if number is not None]
    assert len(winners) == 1
    assert store.read("key") == bytes(winners) * 50_000


# Listing


def test_list_finds_everything_below_with_sizes_and_etags(store: Store) -> None:
    for key in ("z", "a/2", "a/1", "a/b/c"):
        store.write(key, key.encode())
    found = list(store.list())
    assert sorted(item.key for item in found) == ["a/1", "a/2", "a/b/c", "z"]
    assert all(item.size == len(item.key) for item in found)
    assert all(item.etag == store.head(item.key).etag for item in found)


def test_list_goes_over_all_pages(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "LIST_PAGE_SIZE", 3)
    keys = [f"k/{number:02d}" for number in range(10)]
    for key in reversed(keys):
        store.write(key, b"x")
    assert [item.key for item in store.list("k/")] == keys


def test_list_is_in_the_order_of_the_keys_bytes(store: Store) -> None:
    names = ["Z", "a", "a b", "a-b", "B", "é", "猫", "1", "10", "2", "🐈", "\uffee"]
    for name in names:
        store.write(name, b"x")
    assert [item.key for item in store.list()] == sorted(names, key=str.encode)


def test_list_of_a_prefix_leaves_the_rest_out(store: Store) -> None:
    for key in ("a/1", "ab/2", "b/a/3"):
        store.write(key, b"x")
    assert [item.key for item in store.list("a/")] == ["a/1"]


def test_list_folders_names_the_immediate_ones(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "LIST_PAGE_SIZE", 3)
    for key in ("b/1", "a/1", "a/deep/er/2", "c d/3", "é/4", "e/1", "f/1", "file"):
        store.write(key, b"x")
    assert store.list_folders() == ["a", "b", "c d", "e", "f", "é"]


def test_an_object_that_a_console_made_for_a_folder_is_not_listed(store: Store) -> None:
    if isinstance(store, LocalStore):
        pytest.skip("a folder is a folder")
    store._call("put_object", Key=store._key("folder/"), Body=b"")
    store.write("folder/key", b"x")
    assert [item.key for item in store.list()] == ["folder/key"]


# Readers for formats, workers and batches


def test_open_seeks_and_serves_parquet(store: Store) -> None:
    table = pa.table({"n": range(1000), "text": [f"row {n}" for n in range(1000)]})
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, row_group_size=100)
    data = sink.getvalue().to_pybytes()
    store.write("table.parquet", data)
    with store.open("table.parquet") as file:
        assert file.seekable()
        file.seek(-4, os.SEEK_END)
        assert file.read() == b"PAR1"
        parquet = pq.ParquetFile(file)
        assert parquet.read_row_group(7).equals(table.slice(700, 100))
        assert parquet.read(columns=["n"]).equals(table.select(["n"]))


def test_a_store_travels(store: Store) -> None:
    store.write("key", b"x")
    travelled = pickle.loads(pickle.dumps(store))  # noqa: S301
    assert travelled == store
    assert travelled.read("key") == b"x"


def test_read_many_keeps_the_order_and_gives_errors_their_place(store: Store) -> None:
    keys = [f"{number}" for number in range(40)]
    for key in keys:
        store.write(key, key.encode())
    keys.insert(17, "gone")
    results = list(read_many(store, keys))
    assert isinstance(results[17], MissingObjectError)
    assert [r for r in results if isinstance(r, bytes)] == [k.encode() for k in keys if k != "gone"]


def test_a_store_is_found_again_by_its_uri(store: Store) -> None:
    store.write("folder/key", b"x")
    assert open_store(store.uri).read("folder/key") == b"x"
    assert child(store, "folder").read("key") == b"x"
    place, key = split_uri(f"{store.uri}/folder/key")
    assert place.read(key) == b"x"


def test_json_survives_and_what_is_none_is_named(store: Store) -> None:
    value = {"b": [1, 0.1, None], "a": "Ä猫"}
    store.write("good.json", encode_json(value))
    store.write("bad.json", b'{"a": ')
    assert read_json(store, "good.json") == value
    assert list(read_json(store, "good.json")) == ["b", "a"]
    with pytest.raises(StorageError, match=r"bad\.json is not JSON"):
        read_json(store, "bad.json")


# Local only


@pytest.fixture
def local(tmp_path: Path) -> LocalStore:
    store = open_store(str(tmp_path / "root"))
    assert isinstance(store, LocalStore)
    return store


def test_a_name_with_a_newline_is_a_name(local: LocalStore) -> None:
    local.write("two\nlines", b"x")
    assert [item.key for item in local.list()] == ["two\nlines"]
    assert local.read("two\nlines") == b"x"


def test_a_name_that_is_not_utf8_is_listed_escaped(local: LocalStore) -> None:
    local.write("good", b"x")
    Path(os.fsdecode(os.fsencode(local.root) + b"/caf\xe9")).write_bytes(b"y")
    os.mkdir(os.fsencode(local.root) + b"/d\xff")
    keys = [item.key for item in local.list()]
    assert keys == ["caf\\xe9", "good"]
    assert [key.encode() for key in keys]
    assert local.list_folders() == ["d\\xff"]


def test_symbolic_links_are_followed_but_not_in_circles(local: LocalStore) -> None:
    local.write("a/real", b"x")
    os.symlink(local.root, f"{local.root}/a/up")
    os.symlink("itself", f"{local.root}/itself")
    os.symlink("nowhere", f"{local.root}/broken")
    os.symlink("real", f"{local.root}/a/link")
    assert [item.key for item in local.list()] == ["a/link", "a/real"]
    assert local.list_folders() == ["a"]


def test_a_folder_that_may_not_be_read_is_named(
    local: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def deny(folder: str) -> None:
        raise PermissionError(13, "Permission denied")

    local.write("folder/key", b"x")
    monkeypatch.setattr(os, "scandir", deny)
    with pytest.raises(StorageError, match="cannot list .*root.*: Permission denied"):
        list(local.list())


def test_a_write_in_progress_is_not_listed(
    local: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    local.write("old", b"x")
    (Path(local.root) / "mine.tmp").write_bytes(b"a user's file")
    listed: list[list[str]] = []

    def spy(function: Callable[..., None]) -> Callable[..., None]:
        def watched(*arguments: Any) -> None:
            assert any(name not in ("mine.tmp", "old", "new") for name in os.listdir(local.root))
            listed.append([item.key for item in local.list()])
            function(*arguments)

        return watched

    monkeypatch.setattr(os, "replace", spy(os.replace))
    monkeypatch.setattr(os, "link", spy(os.link))
    local.write("new", b"y")
    local.create("new2", b"z")
    assert listed == [["mine.tmp", "old"], ["mine.tmp", "new", "old"]]


@pytest.mark.parametrize("method", ["write", "create"])
@pytest.mark.parametrize("call", ["fsync", "replace", "link"])
def test_a_failed_write_leaves_nothing_behind(
    local: LocalStore, monkeypatch: pytest.MonkeyPatch, method: str, call: str
) -> None:
    if (method, call) in (("write", "link"), ("create", "replace")):
        pytest.skip("not used there")

    def full(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    local.write("kept", b"x")
    monkeypatch.setattr(os, call, full)
    with pytest.raises(StorageError, match="No space left on device"):
        getattr(local, method)("new", b"y")
    assert os.listdir(local.root) == ["kept"]


def test_no_temporary_file_is_left_by_writes(local: LocalStore) -> None:
    local.write("a", b"1")
    local.write("a", b"2")
    local.create("b", b"1")
    local.create("b", b"1")
    with pytest.raises(AlreadyExistsError):
        local.create("b", b"2")
    assert sorted(os.listdir(local.root)) == ["a", "b"]


def test_a_folder_in_the_way_is_named(local: LocalStore) -> None:
    local.write("folder/key", b"x")
    for attempt in (local.write, local.create):
        with pytest.raises(StorageError, match="folder"):
            attempt("folder", b"y")
        with pytest.raises(StorageError, match="key/below"):
            attempt("folder/key/below", b"y")
    with pytest.raises(StorageError, match="folder"):
        local.read("folder")
    with pytest.raises(StorageError, match="folder"):
        local.delete("folder")
    assert [item.key for item in local.list()] == ["folder/key"]
    assert os.listdir(local.root) == ["folder"]


def test_names_that_no_disk_takes_are_errors_of_storage(local: LocalStore) -> None:
    local.write("key", b"x")
    for name in ("nul\0byte", "long" * 100):
        for attempt in (local.read, local.head, local.delete, lambda key: local.write(key, b"")):
            with pytest.raises(StorageError):
                attempt(name)


def test_delete_prunes_empty_folders_but_never_the_root(local: LocalStore) -> None:
    local.write("a/b/c", b"x")
    local.write("a/d", b"x")
    local.delete("a/b/c")
    assert os.listdir(f"{local.root}/a") == ["d"]
    local.delete("a/d")
    assert os.listdir(local.root) == []
    local.delete("nothing")
    assert os.path.isdir(local.root)


def test_a_folder_that_is_not_there_cannot_be_listed(local: LocalStore) -> None:
    with pytest.raises(MissingObjectError, match="no such folder"):
        list(local.list())
    with pytest.raises(MissingObjectError, match="no such folder"):
        local.list_folders()


# S3 only


@pytest.mark.s3
def test_a_bucket_that_is_missing_is_named(seaweed: Any, fresh_clients: Any) -> None:
    store = open_store("s3://no-such-bucket/prefix")
    for attempt in (
        lambda: store.read("key"),
        lambda: list(store.list()),
        lambda: store.list_folders(),
        lambda: store.delete("key"),
        lambda: store.open("key").read(),
    ):
        with pytest.raises(StorageError, match="no such bucket: no-such-bucket\nhint: create it"):
            attempt()


@pytest.mark.s3
def test_nothing_is_created_in_a_bucket_that_is_missing(moto_store: Store) -> None:
    # SeaweedFS, on the other hand, makes the bucket.
    with pytest.raises(StorageError, match="no such bucket: no-such-bucket"):
        open_store("s3://no-such-bucket/prefix").create("key", b"x")


@pytest.mark.s3
def test_a_wrong_secret_is_access_denied_and_is_never_shown(
    seaweed: Any, fresh_clients: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hunter2-hunter2")
    store = open_store(seaweed.uri("prefix"))
    for attempt in (
        lambda: store.read("key"),
        lambda: list(store.list()),
        lambda: store.create("key", b"x"),
        lambda: store.delete("key"),
        lambda: store.open("key").read(),
        lambda: store.head("key"),
    ):
        with pytest.raises(StorageError, match="access denied: s3://cnnray-tests") as caught:
            attempt()
        assert "hunter2" not in str(caught.value)
        assert not isinstance(caught.value, MissingObjectError)


@pytest.mark.s3
def test_an_endpoint_that_nobody_answers_is_named_in_time(
    fresh_clients: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as taken:  # bound, not listening: connections are refused
        taken.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{taken.getsockname()[1]}"
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "someone")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hunter2-hunter2")
        started = time.monotonic()
        with pytest.raises(StorageError, match="cannot reach the object store") as caught:
            open_store("s3://bucket/prefix").read("key")
        assert time.monotonic() - started < 60
    assert endpoint in str(caught.value)
    assert "hunter2" not in str(caught.value)


@pytest.mark.s3
def test_no_credentials_is_said_so(
    seaweed: Any, fresh_clients: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(StorageError, match=r"no credentials for s3://cnnray-tests"):
        open_store(seaweed.uri("prefix")).read("key")


@pytest.mark.s3
def test_the_whole_bucket_can_be_a_store(seaweed: Any, fresh_clients: Any) -> None:
    store = open_store(f"s3://{seaweed.bucket}")
    store.write("whole/key", b"x")
    assert "whole" in store.list_folders()
    assert [item.key for item in store.list("whole/")] == ["whole/key"]


# Opening


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("http://host/data", "only local paths and s3://"),
        ("gs://bucket/data", "only local paths and s3://"),
        ("s3://", "no bucket"),
        ("s3:///prefix", "no bucket"),
        ("s3://KEYID:hunter2@bucket/prefix", "credentials in a URI are refused"),
        ("https://me:hunter2@host/data", "only local paths and s3://"),
        ("", "an empty path"),
        ("file://", "an empty path"),
    ],
)
def test_what_cannot_be_opened_is_refused_with_a_remedy(uri: str, message: str) -> None:
    with pytest.raises(StorageError, match=message) as caught:
        open_store(uri)
    assert "hint: " in str(caught.value)
    assert "hunter2" not in str(caught.value)


def test_uris_name_the_store_that_one_expects(tmp_path: Path) -> None:
    assert open_store("s3://bucket/a/b/") == S3Store(bucket="bucket", prefix="a/b/")
    assert open_store("s3://bucket/a/b/").uri == "s3://bucket/a/b"
    assert open_store("s3://bucket").uri == "s3://bucket"
    assert open_store(f"file://{tmp_path}") == LocalStore(root=str(tmp_path))
    assert open_store("relative") == LocalStore(root=str(Path("relative").absolute()))
    assert split_uri("s3://bucket/a/b") == (S3Store(bucket="bucket", prefix=""), "a/b")
