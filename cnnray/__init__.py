"""cnnray: train image classifiers on a Ray cluster and label collections of images into Parquet.

Importing this package loads nothing else; see ``cnnray/ARCHITECTURE.md`` for the rooms.
"""

__version__ = "0.1.0"
