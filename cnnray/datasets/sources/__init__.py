"""Sources: the ways in which a user's images lie on disk or in a bucket.

A source lists its inputs as tables of ``schema.ENTRY_SCHEMA`` and reads their bytes. It is a frozen
dataclass that travels to workers, and lists in partitions, so that the listing can be distributed.
"""

from cnnray.datasets.sources.base import Source, copy_rows, is_first_of_key
from cnnray.datasets.sources.detect import FORMATS, open_source

__all__ = ["FORMATS", "Source", "copy_rows", "is_first_of_key", "open_source"]
