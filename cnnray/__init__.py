"""cnnray: train image classifiers on a Ray cluster and label collections of images into Parquet.

Importing this package loads nothing else; see ``cnnray/ARCHITECTURE.md`` for the rooms. For
pipelines of one's own there are two doors, loaded when they are used:

* ``cnnray.read_dataset(uri)``: a packed dataset, or a collection of images, as a
  ``ray.data.Dataset``
* ``cnnray.Classifier(bundle)``: a trained model as a callable class for ``map_batches``
"""

from __future__ import annotations

__version__ = "0.1.0"

TYPE_CHECKING = False  # typing itself would be something that is loaded
if TYPE_CHECKING:
    from typing import Any

_DOORS = ("Classifier", "read_dataset")


def __getattr__(name: str) -> Any:
    if name not in _DOORS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module("cnnray.cluster.doors"), name)


def __dir__() -> list[str]:
    return [*globals(), *_DOORS]
