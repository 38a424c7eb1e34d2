"""Every failure cnnray raises on purpose, and the exit code each one ends a job with.

* CnnrayError                 1  a job failed for a reason that is named in the message
  + UsageError                2  a mistake of the user's: what, where and the remedy
    - SettingsError              a flag or a settings file
    - DataError                  a source, dataset or manifest
    - ModelError                 a model name, weights file or bundle
    - StorageError               a path, bucket, permission or endpoint
      . MissingObjectError       an object that is not there
      . AlreadyExistsError       an object that is there, with other content
      . ChangedObjectError       an object that is no longer the one that was listed
      . AccessDeniedError        a key without the permission, or no usable key or address
      . UnavailableError      4  a store that did not answer in time, however often it was asked
  + TooManyBadImagesError     3  more bad images than the budget allows; the rows are kept
  + IncompleteError           4  work is left: submit the same command again
  + ConflictError             5  another run, or other settings, own this output
  + NonFiniteLossError        6  training diverged

``ImageError`` is not a job's failure: it is what is wrong with one image, and becomes a row.
"""

import re
from collections.abc import Mapping
from typing import Any

# Why one image could not be used. ``read`` errors come from the store, the others from its bytes.
READ_ERROR_CODES = ("missing", "changed", "read_failed")
IMAGE_ERROR_CODES = (
    "empty",
    "not_image",
    "format_not_allowed",
    "truncated",
    "corrupt",
    "too_large",
)
DECODER_ERROR_CODES = ("decoder_crash", "decoder_timeout", "decoder_oom")
"""What an image did to the process that decoded it."""

MAX_ERROR_DETAIL = 200
"""Characters kept of an error's detail, so that a hostile file cannot bloat a table."""

_USER_INFO = re.compile(r"//[^/?#\s]*@")


def hide_credentials(text: str) -> str:
    """What a message or a document may hold of a text: the user info of addresses is left out."""
    return _USER_INFO.sub("//", text)


class CnnrayError(Exception):
    """A job failed; ``exit_code`` is the process's exit status."""

    exit_code = 1

    def __init__(
        self,
        message: str,
        *,
        hint: str | None = None,
        result: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(message if hint is None else f"{message}\nhint: {hint}")
        self.result = result  # what a job got done all the same


class UsageError(CnnrayError):
    """A mistake of the user's; nothing was written."""

    exit_code = 2


class SettingsError(UsageError):
    """A flag or a settings file is wrong."""


class DataError(UsageError):
    """A source, a dataset or its manifest is wrong."""


class ModelError(UsageError):
    """A model name, a weights file or a bundle is wrong."""


class StorageError(UsageError):
    """A path or an object store cannot be used as asked."""


class MissingObjectError(StorageError):
    """The object does not exist."""


class AlreadyExistsError(StorageError):
    """The object exists already, with other content."""


class ChangedObjectError(StorageError):
    """The object is not the one that was listed: its etag differs."""


class AccessDeniedError(StorageError):
    """The credentials do not allow this, or the AWS environment holds none that could."""


class UnavailableError(StorageError):
    """The store did not answer within the deadline, after every retry; later it may."""

    exit_code = 4


class TooManyBadImagesError(CnnrayError):
    """More images were bad than the budget allows; their rows were kept."""

    exit_code = 3


class IncompleteError(CnnrayError):
    """Work is left; the same command continues it."""

    exit_code = 4


class ConflictError(CnnrayError):
    """Another run, or other settings, own this output."""

    exit_code = 5


class NonFiniteLossError(CnnrayError):
    """The training loss became NaN or infinite."""

    exit_code = 6


class ImageError(Exception):
    """One image cannot be used; ``code`` is one of ``IMAGE_ERROR_CODES``."""

    def __init__(self, code: str, detail: str = "") -> None:
        super().__init__(f"{code}: {detail}" if detail else code)
        self.code = code
        self.detail = detail

    def __reduce__(self) -> tuple[type["ImageError"], tuple[str, str]]:
        return ImageError, (self.code, self.detail)
