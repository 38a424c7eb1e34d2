"""A folder as a store."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from cnnray.errors import AlreadyExistsError, ChangedObjectError, MissingObjectError, StorageError
from cnnray.storage import LocalStore


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


def _watch(monkeypatch: pytest.MonkeyPatch, name: str, look: Callable[[], None]) -> None:
    """Call ``look`` just before each call of this function of os."""
    function = getattr(os, name)

    def watched(*arguments: Any, **named: Any) -> Any:
        look()
        return function(*arguments, **named)

    monkeypatch.setattr(os, name, watched)


def test_a_write_in_progress_is_not_listed(
    local: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    local.write("data/old", b"x")
    (Path(local.root) / "mine.tmp").write_bytes(b"a user's file")
    listed: list[list[str]] = []
    _watch(monkeypatch, "replace", lambda: listed.append([item.key for item in local.list()]))
    local.write("data/new", b"y")
    assert listed == [["data/old", "mine.tmp"]]


def test_a_write_in_progress_is_not_beside_the_data(
    local: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    local.write("data/old", b"x")
    seen: list[list[str]] = []
    _watch(monkeypatch, "replace", lambda: seen.append(os.listdir(f"{local.root}/data")))
    local.write("data/new", b"y")
    assert seen == [["old"]]


def test_a_creation_in_progress_is_nowhere_to_be_seen(
    local: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[str]] = []
    _watch(monkeypatch, "link", lambda: seen.append(sorted(map(str, Path(local.root).rglob("*")))))
    local.create("data/new", b"y")
    assert seen == [[f"{local.root}/data"]]


def test_without_unnamed_files_a_creation_in_progress_is_not_beside_the_data(
    local: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(os, "O_TMPFILE")
    seen: list[list[str]] = []
    _watch(monkeypatch, "link", lambda: seen.append(os.listdir(f"{local.root}/data")))
    local.create("data/new", b"y")
    assert seen == [[]]
    assert os.listdir(local.root) == ["data"]
    with pytest.raises(AlreadyExistsError):
        local.create("data/new", b"other")


@pytest.mark.parametrize("number", [errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL])
def test_a_disk_without_unnamed_files_will_do(
    local: LocalStore, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    real = os.open

    def deny(path: str, flags: int, *arguments: Any, **named: Any) -> int:
        if flags & os.O_TMPFILE == os.O_TMPFILE:
            raise OSError(number, os.strerror(number), path)
        return real(path, flags, *arguments, **named)

    monkeypatch.setattr(os, "open", deny)
    local.create("key", b"x")
    local.create("key", b"x")
    with pytest.raises(AlreadyExistsError):
        local.create("key", b"other")
    assert os.listdir(local.root) == ["key"]


@pytest.mark.parametrize("call", ["fsync", "link"])
def test_a_creator_that_is_killed_leaves_nothing(local: LocalStore, call: str) -> None:
    local.write("data/old", b"x")
    code = (
        "import os, signal, cnnray.storage\n"
        f"os.{call} = lambda *a, **k: os.kill(os.getpid(), signal.SIGKILL)\n"
        f"cnnray.storage.open_store({local.root!r}).create('data/new', b'y' * 100_000)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], timeout=60)
    assert done.returncode == -signal.SIGKILL
    assert os.listdir(local.root) == ["data"]
    assert os.listdir(f"{local.root}/data") == ["old"]


def test_a_created_file_may_be_read_as_any_other(local: LocalStore) -> None:
    local.create("created", b"x")
    Path(local.root, "plain").write_bytes(b"x")
    modes = {os.stat(f"{local.root}/{name}").st_mode for name in ("created", "plain")}
    assert len(modes) == 1


@pytest.mark.parametrize("method", ["write", "create"])
def test_a_folder_may_be_deleted_while_it_is_written_to(local: LocalStore, method: str) -> None:
    os.makedirs(local.root)
    stop = threading.Event()

    def prune() -> None:
        while not stop.is_set():
            local.delete("folder/nothing")
            time.sleep(0.0005)

    with ThreadPoolExecutor(1) as pool:
        pruning = pool.submit(prune)
        try:
            for number in range(100):
                getattr(local, method)("folder/key", b"%d" % number)
                assert local.read("folder/key") == b"%d" % number
                local.delete("folder/key")
        finally:
            stop.set()
        pruning.result(timeout=10)


@pytest.mark.parametrize("method", ["write", "create"])
@pytest.mark.parametrize("call", ["fsync", "replace", "link"])
def test_a_failed_write_leaves_nothing_behind(
    local: LocalStore, monkeypatch: pytest.MonkeyPatch, method: str, call: str
) -> None:
    if (method, call) in (("write", "link"), ("create", "replace")):
        pytest.skip("not used there")

    def full(*arguments: Any, **named: Any) -> None:
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


def test_a_file_that_changes_while_it_is_read_is_not_returned(
    local: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    local.write("key", b"listed")
    etag = local.head("key").etag
    real, calls = os.fstat, []

    def grow(descriptor: int) -> os.stat_result:
        status = real(descriptor)
        calls.append(descriptor)
        if len(calls) == 2:  # after the first look at the etag
            with open(f"{local.root}/key", "ab") as file:
                file.write(b" and more")
        return status

    monkeypatch.setattr(os, "fstat", grow)
    with pytest.raises(ChangedObjectError, match="key is no longer the file that was listed"):
        local.read("key", if_match=etag)


def test_a_pipe_is_not_waited_for(local: LocalStore) -> None:
    os.makedirs(local.root)
    os.mkfifo(f"{local.root}/pipe")
    with pytest.raises(StorageError, match="pipe: not a regular file"):
        local.read("pipe")
    assert list(local.list()) == []


def test_a_thousand_folders_deep_is_listed(local: LocalStore) -> None:
    folder = local.root
    os.mkdir(folder)
    for _ in range(1200):
        folder += "/d"
        os.mkdir(folder)
    Path(folder, "key").write_bytes(b"x")
    try:
        assert [item.key for item in local.list()] == ["d/" * 1200 + "key"]
    finally:  # pytest's own clean-up cannot go that deep
        os.unlink(f"{folder}/key")
        os.removedirs(folder)


def test_a_file_that_vanishes_while_listed_is_left_out(
    local: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    for key in ("a/1", "b/1", "c"):
        local.write(key, b"x")
    found = local.list()
    assert next(found).key == "a/1"
    local.delete("b/1")
    assert [item.key for item in found] == ["c"]


def test_a_file_whose_status_is_denied_is_named_not_left_out(
    local: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    local.write("key", b"x")
    real = os.stat

    def deny(path: str, *arguments: Any, **named: Any) -> os.stat_result:
        if str(path).endswith("/key"):
            raise PermissionError(13, "Permission denied")
        return real(path, *arguments, **named)

    monkeypatch.setattr(os, "stat", deny)
    with pytest.raises(StorageError, match="cannot list .*key: Permission denied"):
        list(local.list())


def test_control_characters_of_a_name_do_not_reach_the_message(local: LocalStore) -> None:
    with pytest.raises(MissingObjectError, match=r"red\\x1b\[31m\\n猫") as caught:
        local.read("red\x1b[31m\n猫")
    assert str(caught.value).replace(" ", "").isprintable()
