"""A folder as a store: what is written there is whole or not there, whoever is killed."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import BinaryIO

from cnnray.errors import (
    AlreadyExistsError,
    ChangedObjectError,
    MissingObjectError,
    StorageError,
)
from cnnray.storage.base import StoredObject, shown

TEMPORARY_PREFIX, TEMPORARY_SUFFIX = ".cnnray-", ".tmp"
"""Of a file in the root that is being written: no object yet, so it is never listed."""

FOLDER_TRIES = 10
"""How often a folder is made that others delete, being empty, before a file is in it."""

NO_UNNAMED_FILES = {errno.EOPNOTSUPP, errno.EISDIR, errno.ENOENT, errno.EINVAL}
"""What file systems and kernels without unnamed files say to the wish for one."""


@dataclass(frozen=True)
class LocalStore:
    """A folder on a local or mounted disk."""

    root: str

    @property
    def uri(self) -> str:
        return self.root

    def _path(self, key: str) -> str:
        return os.path.join(self.root, key)

    def read(
        self, key: str, *, offset: int = 0, length: int | None = None, if_match: str | None = None
    ) -> bytes:
        path = self._path(key)
        with self.open(key) as file, _named_errors("read", path):
            _check_etag(file, if_match, path)
            file.seek(offset)
            data = file.read(-1 if length is None else length)
            _check_etag(file, if_match, path)
            return data

    def open(self, key: str) -> BinaryIO:
        path = self._path(key)
        try:
            return _open_regular(path)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise MissingObjectError(f"no such file: {shown(path)}") from error
        except (OSError, ValueError) as error:
            raise _storage_error("read", path, error) from error

    def list(self, prefix: str = "", *, recursive: bool = True) -> Iterator[StoredObject]:
        top = self._path(prefix)
        if not os.path.isdir(top):
            raise MissingObjectError(f"no such folder: {shown(top)}")
        start = len(os.path.join(self.root, ""))  # relpath would take half of the listing's time
        for path, status in _walk(top, recursive=recursive):
            key = _as_text(path[start:])
            yield StoredObject(key=key, size=status.st_size, etag=_etag(status))

    def list_folders(self) -> Sequence[str]:
        if not os.path.isdir(self.root):
            raise MissingObjectError(f"no such folder: {shown(self.root)}")
        with _named_errors("list", self.root), os.scandir(self.root) as entries:
            return sorted(_as_text(entry.name) for entry in entries if os.path.isdir(entry.path))

    def head(self, key: str) -> StoredObject | None:
        path = self._path(key)
        try:
            status = os.stat(path)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (OSError, ValueError) as error:
            raise _storage_error("read", path, error) from error
        if stat.S_ISDIR(status.st_mode):
            return None
        return StoredObject(key=key, size=status.st_size, etag=_etag(status))

    def create(self, key: str, data: bytes) -> None:
        path = self._path(key)
        try:
            with _named_errors("write", path), self._nameless(data) as give_name:
                _in_its_folder(path, lambda: give_name(path))
        except StorageError as error:
            if not isinstance(error.__cause__, FileExistsError):
                raise
            if not self._holds(key, data):
                raise AlreadyExistsError(f"{shown(path)} exists already") from None

    @contextlib.contextmanager
    def _nameless(self, data: bytes) -> Iterator[Callable[[str], None]]:
        """A file of ``data`` and the function that names it; if never called, nothing is left."""
        _make_folder(self.root)
        descriptors = _open_unnamed(self.root)
        if descriptors is None:
            with self._temporary(data) as temporary:
                yield lambda path: os.link(temporary, path)
            return
        unnamed, links = descriptors
        try:
            with open(unnamed, "wb") as file:
                _fill(file, data)
                # By way of the open folder: a path through /proc is on another device.
                yield lambda path: os.link(
                    str(unnamed), path, src_dir_fd=links, follow_symlinks=True
                )
        finally:
            os.close(links)

    def _holds(self, key: str, data: bytes) -> bool:
        try:
            return self.read(key) == data
        except MissingObjectError:
            return False

    def refuses_overwrite(self, key: str) -> bool:
        return True

    def write(self, key: str, data: bytes) -> None:
        path = self._path(key)
        with _named_errors("write", path), self._temporary(data) as temporary:
            _in_its_folder(path, lambda: os.replace(temporary, path))

    @contextlib.contextmanager
    def _temporary(self, data: bytes) -> Iterator[str]:
        """A file of ``data`` in the root, out of the readers' way; it is gone afterwards."""
        name = f"{TEMPORARY_PREFIX}{uuid.uuid4().hex}{TEMPORARY_SUFFIX}"
        temporary = os.path.join(self.root, name)
        _make_folder(self.root)
        try:
            with open(temporary, "xb") as file:
                _fill(file, data)
            yield temporary
        finally:
            with contextlib.suppress(OSError):
                os.unlink(temporary)

    def delete(self, key: str) -> None:
        path = self._path(key)
        try:
            os.unlink(path)
        except (FileNotFoundError, NotADirectoryError):
            pass
        except (OSError, ValueError) as error:
            raise _storage_error("delete", path, error) from error
        with contextlib.suppress(OSError):  # as in an object store, no folder is left empty
            while (path := os.path.dirname(path)) != self.root:
                os.rmdir(path)


def _open_regular(path: str) -> BinaryIO:
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # a pipe would wait for its writer
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "not a regular file", path)
    return os.fdopen(descriptor, "rb")


def _check_etag(file: BinaryIO, if_match: str | None, path: str) -> None:
    if if_match and _etag(os.fstat(file.fileno())) != if_match:
        raise ChangedObjectError(f"{shown(path)} is no longer the file that was listed")


def _walk(top: str, *, recursive: bool) -> Iterator[tuple[str, os.stat_result]]:
    """The files below a folder, each folder sorted by bytes, but for those being written."""
    status = os.stat(top)
    folders = [(iter(_scan(top)), (status.st_dev, status.st_ino))]
    while folders:
        path = next(folders[-1][0], None)
        if path is None:
            folders.pop()
            continue
        found = _status(path)
        if found is None:
            continue
        identity = (found.st_dev, found.st_ino)
        if stat.S_ISDIR(found.st_mode):  # a symbolic link to a folder above would have no end
            if recursive and all(identity != above for _, above in folders):
                folders.append((iter(_scan(path)), identity))
        elif stat.S_ISREG(found.st_mode) and not _is_temporary(path):
            yield path, found


def _scan(folder: str) -> Sequence[str]:
    with _named_errors("list", folder):
        try:
            with os.scandir(folder) as entries:
                return sorted((entry.path for entry in entries), key=os.fsencode)
        except FileNotFoundError:  # deleted since its parent was listed
            return ()


def _status(path: str) -> os.stat_result | None:
    """The file's status; None for a broken link, and for what was deleted since it was listed."""
    with _named_errors("list", path):
        try:
            return os.stat(path)
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ELOOP):
                return None
            raise


def _in_its_folder(path: str, put: Callable[[], None]) -> None:
    """Call ``put`` with the folder of ``path`` in place, and see to it that the name lasts."""
    folder = os.path.dirname(path)
    for tries_left in reversed(range(FOLDER_TRIES)):
        try:
            _make_folder(folder)
            put()
            break
        except FileNotFoundError:  # the empty folder was deleted in between
            if not tries_left:
                raise
    with contextlib.suppress(FileNotFoundError):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _make_folder(folder: str) -> None:
    try:
        os.makedirs(folder, exist_ok=True)
    except FileExistsError as error:  # which here would say that the object exists
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), folder) from error


def _open_unnamed(folder: str) -> tuple[int, int] | None:
    """A new file that a kill removes, and the folder to link it from; None where there is none."""
    if not hasattr(os, "O_TMPFILE"):
        return None
    try:
        links = os.open("/proc/self/fd", os.O_RDONLY | os.O_DIRECTORY)
    except OSError:
        return None
    try:
        return os.open(folder, os.O_TMPFILE | os.O_WRONLY, 0o666), links
    except OSError as error:
        os.close(links)
        if error.errno in NO_UNNAMED_FILES:
            return None
        raise


def _fill(file: BinaryIO, data: bytes) -> None:
    file.write(data)
    file.flush()
    os.fsync(file.fileno())


@contextlib.contextmanager
def _named_errors(action: str, path: str) -> Iterator[None]:
    """Raise the system's errors as ``StorageError``."""
    try:
        yield
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise _storage_error(action, path, error) from error


def _storage_error(action: str, path: str, error: OSError | ValueError) -> StorageError:
    reason = getattr(error, "strerror", None) or error
    return StorageError(f"cannot {action} {shown(path)}: {reason}")


def _is_temporary(path: str) -> bool:
    name = os.path.basename(path)
    return name.startswith(TEMPORARY_PREFIX) and name.endswith(TEMPORARY_SUFFIX)


def _etag(status: os.stat_result) -> str:
    return f"{status.st_mtime_ns:x}-{status.st_size:x}"


def _as_text(name: str) -> str:
    """A file name as text; bytes that are not UTF-8 are shown escaped, and then not readable."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
