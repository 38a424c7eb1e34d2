"""An object as a file that seeks, for libraries that read formats."""

from __future__ import annotations

import io
import os
from typing import Any

from cnnray.storage.base import Store, StoredObject


class ObjectReader(io.RawIOBase):
    """One version of an object, read by ranges: each read is one request, nothing is kept.

    Reading raises ``ChangedObjectError`` once the object is another one.
    """

    def __init__(self, store: Store, found: StoredObject) -> None:
        super().__init__()
        self._store = store
        self._found = found
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._found.size}[whence]
        if start + offset < 0:
            raise ValueError(f"a seek to {start + offset}, before the start")
        self._position = start + offset
        return self._position

    def readinto(self, buffer: Any, /) -> int:
        data = self._take(len(memoryview(buffer).cast("B")))
        memoryview(buffer).cast("B")[: len(data)] = data
        return len(data)

    def readall(self) -> bytes:
        return self._take(self._found.size)

    def _take(self, length: int) -> bytes:
        length = max(0, min(length, self._found.size - self._position))
        data = self._store.read(
            self._found.key, offset=self._position, length=length, if_match=self._found.etag
        )
        self._position += len(data)
        return data
