"""WebDataset: tar files whose adjacent members of one name are one sample.

The name of a sample is the member's path up to the first dot of its last part, what follows is the
suffix: ``a/x.jpg`` and ``a/x.cls`` are a labelled image, ``a/x.mask.jpg`` is no image of it. Tars
are listed by their headers alone and never extracted; no body is read but that of the label.
"""

from __future__ import annotations

import io
import itertools
import json
import tarfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import BinaryIO, cast

import pyarrow as pa

from cnnray.datasets.sources.base import SPLIT_NAMES, Entry, entry_tables, is_hidden, read_each
from cnnray.errors import CnnrayError, DataError, MissingObjectError, StorageError
from cnnray.storage import Store

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp", "bmp", "gif")
"""The members that can be the image of a sample, the first of them first."""

LABEL_SUFFIXES = ("cls", "json")
JSON_LABEL_KEYS = ("label", "class", "cls")
COMPRESSED_SUFFIXES = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst")
COMPRESSED_MAGIC = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")

MAX_MEMBERS = 10_000_000
MAX_NAME_BYTES = 4096
MAX_LABEL_BYTES = 64 << 10
MAX_HEADER_BYTES = 1 << 20
"""All the headers of one member: tarfile would read an extended header of any size to memory."""

READ_AHEAD_BYTES = 1 << 20
"""Fewer requests to an object store; a local file has its own, smaller buffer."""


@dataclass(frozen=True)
class WebDatasetSource:
    """The tar ``file`` in ``store``, or every tar below ``store``.

    Keys are ``tar/member``, with ``#2``, ``#3``, ... appended when a tar repeats a name. Tars below
    a folder that is named as a split belong to it. The etag of an entry is that of its tar.
    """

    store: Store
    file: str | None = None
    labelled: bool = True

    def partitions(self) -> list[str]:
        """One partition per tar. Raises ``DataError`` when there is none, or a compressed one."""
        keys = [item.key for item in self.store.list()] if self.file is None else [self.file]
        tars = []
        for key in keys:
            if is_hidden(key):
                continue
            if key.lower().endswith(COMPRESSED_SUFFIXES):
                raise compressed_tar(f"{self.store.uri}/{key}")
            if key.lower().endswith(".tar"):
                tars.append(key)
        if not tars:
            raise DataError(f"no .tar files in {self.store.uri}")
        return tars

    def list(self, partition: str) -> Iterator[pa.Table]:
        """The images of one tar, in its order. Raises ``DataError`` where the tar is broken."""
        try:
            yield from entry_tables(self._entries(partition))
        except OSError as error:
            raise StorageError(f"cannot read {self.store.uri}/{partition}: {error}") from error

    def read(self, entries: pa.Table) -> Iterator[bytes | StorageError]:
        """The bytes of each image member, by range."""
        columns = (entries[name].to_pylist() for name in ("path", "offset", "length", "etag"))
        return read_each(self._read, zip(*columns, strict=True))

    def _read(self, member: tuple[str, int, int, str]) -> bytes:
        path, offset, length, etag = member
        data = self.store.read(path, offset=offset, length=length, if_match=etag)
        if len(data) != length:
            raise StorageError(f"{self.store.uri}/{path} is shorter than it was when listed")
        return data

    def _entries(self, tar: str) -> Iterator[Entry]:
        where = f"{self.store.uri}/{tar}"
        found = self.store.head(tar)
        if found is None:
            raise MissingObjectError(f"no such file: {where}")
        folder, is_nested, _ = tar.partition("/")
        split = SPLIT_NAMES.get(folder.lower()) if is_nested and self.labelled else None
        times_seen: Counter[str] = Counter()
        is_empty = True
        with self.store.open(tar) as file:
            if not isinstance(file, io.BufferedReader):
                file = io.BufferedReader(cast(io.RawIOBase, file), READ_AHEAD_BYTES)
            members = _walk(file, size=found.size, where=where)
            for sample in _samples(members, file=file, labelled=self.labelled):
                image = sample.image
                is_empty = is_empty and not sample.name
                if image is None:
                    continue
                times_seen[image.name] += 1
                repeat = times_seen[image.name]
                yield Entry(
                    key=f"{tar}/{image.name}" + (f"#{repeat}" if repeat > 1 else ""),
                    path=tar,
                    offset=image.offset_data,
                    length=image.size,
                    etag=found.etag,
                    label=sample.label,
                    split=split,
                )
        if not times_seen and not is_empty:
            raise DataError(
                f"no images at all in {where}",
                hint=f"a member must be named as NAME.{{{','.join(IMAGE_SUFFIXES)}}}",
            )


def compressed_tar(where: str) -> DataError:
    """What to tell the user of a compressed tar: its members cannot be read by range."""
    return DataError(f"{where} is a compressed tar", hint="decompress it first (gunzip)")


@dataclass
class _Sample:
    """Adjacent members that share a name: those of known suffixes, and the labels they state."""

    name: str = ""
    members: dict[str, tarfile.TarInfo] = field(default_factory=dict)
    labels: dict[str, str | None] = field(default_factory=dict)

    @property
    def image(self) -> tarfile.TarInfo | None:
        found = (self.members[suffix] for suffix in IMAGE_SUFFIXES if suffix in self.members)
        return next(found, None)

    @property
    def label(self) -> str | None:
        return next(
            (self.labels[suffix] for suffix in LABEL_SUFFIXES if suffix in self.labels), None
        )


def _samples(
    members: Iterator[tarfile.TarInfo], *, file: BinaryIO, labelled: bool
) -> Iterator[_Sample]:
    """Gather members into samples; what precedes a break comes out before the error."""
    sample = _Sample()
    try:
        for member in members:
            folder, slash, basename = member.name.rpartition("/")
            stem, _, suffix = basename.partition(".")
            name, suffix = f"{folder}{slash}{stem}", suffix.lower()
            if not stem:
                continue
            if name != sample.name or suffix in sample.members:
                yield sample
                sample = _Sample(name)
            if suffix in IMAGE_SUFFIXES + LABEL_SUFFIXES:
                sample.members[suffix] = member
            if labelled and suffix in LABEL_SUFFIXES and member.size <= MAX_LABEL_BYTES:
                file.seek(member.offset_data)
                sample.labels[suffix] = _parse_label(file.read(member.size), suffix=suffix)
    except CnnrayError:
        yield sample
        raise
    yield sample


def _parse_label(data: bytes, *, suffix: str) -> str | None:
    """The label that a ``.cls`` or ``.json`` member states, or None if it states none."""
    try:
        text = data.decode()
        if suffix == "cls":
            return text.strip() or None
        document = json.loads(text)
        stated = (document[key] for key in JSON_LABEL_KEYS if key in document)
        label = next(stated, None)
        if not isinstance(label, str | int) or isinstance(label, bool):
            return None
        str(label).encode()  # JSON can hold lone surrogates, which no table can
        return str(label) or None
    except (ValueError, TypeError, LookupError, RecursionError):
        return None


def _walk(file: BinaryIO, *, size: int, where: str) -> Iterator[tarfile.TarInfo]:
    """The regular members of a tar of ``size`` bytes, by its headers alone."""
    if file.read(6).startswith(COMPRESSED_MAGIC):
        raise compressed_tar(where)
    file.seek(0)
    headers = _Headers(file)
    with _named_break(where, offset=0):
        tar = tarfile.TarFile(
            fileobj=cast(BinaryIO, headers), encoding="utf-8", errors="backslashreplace"
        )
    for number in itertools.count(1):
        headers.budget = MAX_HEADER_BYTES
        with _named_break(where, offset=tar.offset):
            member = tar.next()
        if member is None:
            break
        vars(tar)["members"].clear()  # tarfile keeps them all
        is_plain = member.isreg() and not member.issparse()  # no link, device or hole
        with _named_break(where, offset=member.offset):
            if number > MAX_MEMBERS:
                raise tarfile.ReadError(f"more than {MAX_MEMBERS:,} members")
            if len(member.name.encode()) > MAX_NAME_BYTES:
                raise tarfile.ReadError(f"a name of more than {MAX_NAME_BYTES:,} bytes")
            if tar.offset < member.offset_data:
                raise tarfile.ReadError("a negative size")
            if is_plain and not member.size <= size - member.offset_data:
                raise tarfile.ReadError(f"{member.name!r} is cut off")
        if is_plain:
            yield member
    with _named_break(where, offset=tar.offset):
        _require_end_mark(file, offset=tar.offset)


def _require_end_mark(file: BinaryIO, *, offset: int) -> None:
    # tarfile takes a damaged header, or the end of a tar that was cut between members, for the end.
    file.seek(offset)
    block = file.read(tarfile.BLOCKSIZE)
    if not block:
        raise tarfile.ReadError("no end-of-archive mark")
    if any(block):
        raise tarfile.ReadError("a damaged header")


@contextmanager
def _named_break(where: str, *, offset: int) -> Iterator[None]:
    try:
        yield
    except OSError:
        raise
    except Exception as error:  # tarfile meets hostile bytes with any of its errors, and others
        detail = str(error) or type(error).__name__
        raise DataError(
            f"{where} is broken at byte {offset}: {detail}", hint="copy or write the tar again"
        ) from error


@dataclass
class _Headers:
    """The file as tarfile sees it: a member's headers may take up to ``budget`` bytes."""

    file: BinaryIO
    budget: int = MAX_HEADER_BYTES

    def read(self, size: int) -> bytes:
        self.budget -= size
        if self.budget < 0:
            raise tarfile.ReadError(f"headers of more than {MAX_HEADER_BYTES >> 20} MiB")
        return self.file.read(size)

    def seek(self, position: int) -> int:
        return self.file.seek(position)

    def tell(self) -> int:
        return self.file.tell()
