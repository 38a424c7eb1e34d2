"""MNIST's IDX files, plain or gzipped: one file of images and one of labels per split.

The format is that of http://yann.lecun.com/exdb/mnist/: big-endian 32-bit words (a magic number,
then the size of each dimension), then the values as uint8.
"""

from __future__ import annotations

import functools
import gzip
import io
import re
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter

import pyarrow as pa
from PIL import Image

from cnnray.datasets.sources.base import SPLIT_NAMES, STORE_FAILURES, Entry, entry_tables
from cnnray.errors import ChangedObjectError, DataError, MissingObjectError, StorageError
from cnnray.storage import Store, open_store

IMAGES_MAGIC = 0x0803  # uint8, three dimensions
LABELS_MAGIC = 0x0801  # uint8, one dimension
MAX_FILE_BYTES = 4 << 30
"""The largest file, and the largest decompressed one: it is held in memory whole."""

CHUNK_BYTES = 1 << 20

_NAME = re.compile(r"(\w+)-(images[-.]idx3|labels[-.]idx1)-ubyte(\.gz)?")
_SPLITS = SPLIT_NAMES | {"t10k": "test"}


def is_idx_name(name: str) -> bool:
    """Whether a file is named as an IDX file of a known split."""
    return _split_and_kind(name) is not None


def _split_and_kind(name: str) -> tuple[str, str] | None:
    match = _NAME.fullmatch(name)
    if match is None or match[1].lower() not in _SPLITS:
        return None
    return _SPLITS[match[1].lower()], match[2][:6]


@dataclass(frozen=True)
class IdxSource:
    """The pairs of IDX files directly in ``store``, or only the split that ``file`` belongs to.

    Images are read as losslessly encoded 8-bit grey PNG; ``offset`` and ``length`` of an entry
    count the bytes of the pixels, decompressed and without the header; the etag is the file's.
    """

    store: Store
    file: str | None = None
    labelled: bool = True

    def partitions(self) -> list[str]:
        """The image file of each split."""
        images, labels = self._files("images"), self._files("labels")
        if not images:
            raise DataError(
                f"no IDX files directly in {self.store.uri}",
                hint="name the folder that holds train-images-idx3-ubyte and its labels",
            )
        for split, name in images.items():
            if self.labelled and split not in labels:
                wanted = name.replace("images", "labels").replace("idx3", "idx1")
                raise DataError(f"no labels for {self.store.uri}/{name}", hint=f"add {wanted}")
        return [*images.values()]

    def list(self, partition: str) -> Iterator[pa.Table]:
        """The images of one file in its order, keys as ``train/00000``."""
        images, etag = self._load(partition)
        found = _split_and_kind(partition)
        if found is None:
            raise DataError(f"{partition!r} is not the name of an IDX file")
        split, _ = found
        labels = self._labels(split, images=images) if self.labelled else None
        digits = len(str(images.count - 1))
        length = images.rows * images.cols
        yield from entry_tables(
            Entry(
                key=f"{split}/{index:0{digits}}",
                path=partition,
                offset=index * length,
                length=length,
                etag=etag,
                label=None if labels is None else str(labels[index]),
                split=split,
            )
            for index in range(images.count)
        )

    def read(self, entries: pa.Table) -> Iterator[bytes | StorageError]:
        """Each image as PNG; the file is loaded once, and kept for the next call."""
        columns = (entries[name].to_pylist() for name in ("path", "etag", "offset", "length"))
        rows = zip(*columns, strict=True)
        for (path, etag), group in groupby(rows, key=itemgetter(0, 1)):
            try:
                images, found_etag = self._load(path)
                if found_etag != etag:
                    raise ChangedObjectError(f"{self.store.uri}/{path} changed after it was listed")
            except STORE_FAILURES:
                raise
            except (StorageError, DataError) as error:
                failure = error if isinstance(error, StorageError) else StorageError(str(error))
                yield from (failure for _ in group)
                continue
            for _, _, offset, length in group:
                yield images.png(offset, length=length)

    def _files(self, kind: str) -> dict[str, str]:
        """The file of each split; a plain file wins over its gzipped copy."""
        chosen = None if self.file is None else _split_and_kind(self.file)
        files: dict[str, str] = {}
        names = sorted(item.key for item in self.store.list() if "/" not in item.key)
        for name in names:
            found = _split_and_kind(name)
            if found is None or found[1] != kind or (chosen and found[0] != chosen[0]):
                continue
            other = files.setdefault(found[0], name)
            if other.partition("-")[0] != name.partition("-")[0]:
                raise DataError(f"both {other} and {name} in {self.store.uri} are {found[0]!r}")
        return files

    def _load(self, path: str) -> tuple[_Images, str]:
        found = self.store.head(path)
        if found is None:
            raise MissingObjectError(f"no such file: {self.store.uri}/{path}")
        return _load_images(self.store.uri, path, etag=found.etag), found.etag

    def _labels(self, split: str, *, images: _Images) -> memoryview:
        path = self._files("labels").get(split)
        if path is None:
            raise DataError(f"no labels for the split {split!r} in {self.store.uri}")
        where = f"{self.store.uri}/{path}"
        (count,), labels = _parse(_read_file(self.store, path), magic=LABELS_MAGIC, where=where)
        if count != images.count:
            raise DataError(f"{where} has {count} labels for {images.count} images")
        return labels


@dataclass(frozen=True)
class _Images:
    """A loaded file: ``count`` images of ``rows`` x ``cols`` grey pixels, one after the other."""

    count: int
    rows: int
    cols: int
    pixels: memoryview

    def png(self, offset: int, *, length: int) -> bytes | StorageError:
        if length != self.rows * self.cols or not 0 <= offset <= len(self.pixels) - length:
            return ChangedObjectError("the IDX file is not the one that was listed")
        image = Image.frombytes("L", (self.cols, self.rows), self.pixels[offset : offset + length])
        buffer = io.BytesIO()
        image.save(buffer, "PNG", compress_level=1)
        return buffer.getvalue()


@functools.lru_cache(maxsize=1)
def _load_images(store_uri: str, path: str, *, etag: str) -> _Images:
    """Load a file of images; ``etag`` tells apart the versions of a file, here and in the cache."""
    where = f"{store_uri}/{path}"
    data = _read_file(open_store(store_uri), path, etag=etag)
    sizes, pixels = _parse(data, magic=IMAGES_MAGIC, where=where)
    count, rows, cols = sizes
    if not (count and rows and cols):
        raise DataError(f"{where} has {count} images of {rows} x {cols} pixels")
    return _Images(count=count, rows=rows, cols=cols, pixels=pixels)


def _parse(data: bytes, *, magic: int, where: str) -> tuple[tuple[int, ...], memoryview]:
    """The sizes and the values of an IDX file that must have this magic number."""
    num_sizes = magic & 0xFF
    header_bytes = 4 * (1 + num_sizes)
    if len(data) < header_bytes:
        raise DataError(f"{where} is too short for an IDX file: {len(data)} bytes")
    found, *sizes = struct.unpack_from(f">{1 + num_sizes}I", data)
    if found != magic:
        raise DataError(f"{where} has the magic number {found:#010x}, not {magic:#010x}")
    expected = functools.reduce(int.__mul__, sizes, 1)
    values = memoryview(data)[header_bytes:]
    if len(values) != expected:
        raise DataError(f"{where} has {len(values)} bytes of values, its header says {expected}")
    return tuple(sizes), values


def _read_file(store: Store, path: str, *, etag: str | None = None) -> bytes:
    """The whole file, decompressed if it is gzip by its first bytes, within the memory limit."""
    where = f"{store.uri}/{path}"
    found = store.head(path)
    if found is None:
        raise MissingObjectError(f"no such file: {where}")
    _check_size(found.size, where=where)
    data = store.read(path, if_match=etag or found.etag)
    if not data.startswith(b"\x1f\x8b"):
        return data
    buffer = io.BytesIO()
    try:
        reader = gzip.GzipFile(fileobj=io.BytesIO(data))
        while chunk := reader.read(CHUNK_BYTES):
            _check_size(buffer.tell() + len(chunk), where=where)
            buffer.write(chunk)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{where} is damaged: {error}") from error
    return buffer.getvalue()


def _check_size(size: int, *, where: str) -> None:
    if size > MAX_FILE_BYTES:
        raise DataError(f"{where} is larger than {MAX_FILE_BYTES >> 30} GiB")
