"""The one door to local disk and object storage: list, read, conditional create, digest.

A ``Store`` is a folder or an S3 prefix; keys are paths below it, opaque and byte-exact. Stores are
small, picklable and connect on first use, so they travel to workers. Credentials, region and
endpoint come from the standard AWS environment and profile on each machine, never from a settings
file.
"""

from cnnray.storage.base import (
    READ_CONCURRENCY,
    Store,
    StoredObject,
    decode_json,
    encode_json,
    encode_parquet,
    read_json,
    sha256,
)
from cnnray.storage.local import LocalStore
from cnnray.storage.s3 import S3Store
from cnnray.storage.uris import child, open_store, split_uri

__all__ = [
    "READ_CONCURRENCY",
    "LocalStore",
    "S3Store",
    "Store",
    "StoredObject",
    "child",
    "decode_json",
    "encode_json",
    "encode_parquet",
    "open_store",
    "read_json",
    "sha256",
    "split_uri",
]
