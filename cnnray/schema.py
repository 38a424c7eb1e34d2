"""Column names, Arrow schemas and versions of every table that cnnray writes."""

import pyarrow as pa

DATASET_VERSION = 1
BUNDLE_VERSION = 1
BUNDLE_KEY = "model.json"
"""The document of a bundle: a folder without it is none."""
LABELS_VERSION = 1
PLAN_VERSION = 1

SPLITS = ("train", "val", "test")

SHARD_SCHEMA = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),
        pa.field("image", pa.binary(), nullable=False),
        pa.field("label", pa.int32(), nullable=False),
        pa.field("width", pa.int32(), nullable=False),
        pa.field("height", pa.int32(), nullable=False),
        pa.field("source", pa.string(), nullable=False),
        pa.field("etag", pa.string(), nullable=False),
    ]
)
"""One packed sample: its encoded bytes untouched, its class index, its size after EXIF rotation."""

ENTRY_SCHEMA = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),
        pa.field("path", pa.string(), nullable=False),  # where the source finds it
        pa.field("offset", pa.int64(), nullable=False),  # bytes into the object at ``path``
        pa.field("length", pa.int64(), nullable=False),  # bytes; -1: the whole object
        pa.field("etag", pa.string(), nullable=False),
        pa.field("label", pa.string()),
        pa.field("split", pa.string()),
    ]
)
"""One input that a source listed: how to name it, find it, and what is known of it."""

PLAN_SCHEMA = pa.schema(
    [ENTRY_SCHEMA.field(name) for name in ("key", "path", "offset", "length", "etag")]
)
"""One input that a labelling run has to label."""

REJECTED_SCHEMA = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),
        pa.field("stage", pa.string(), nullable=False),  # list | read | decode
        pa.field("error_code", pa.string(), nullable=False),
        pa.field("error_detail", pa.string(), nullable=False),
    ]
)
"""One input that was not packed, and why: packed + rejected = inputs."""

TOP_K_TYPE = pa.list_(pa.struct([("label", pa.string()), ("probability", pa.float32())]))

LABELS_SCHEMA = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),
        pa.field("etag", pa.string(), nullable=False),
        pa.field("status", pa.string(), nullable=False),  # ok | error
        pa.field("error_code", pa.string()),
        pa.field("error_detail", pa.string()),
        pa.field("label", pa.string()),
        pa.field("label_index", pa.int32()),
        pa.field("confidence", pa.float32()),
        pa.field("top_k", TOP_K_TYPE),
        pa.field("width", pa.int32()),
        pa.field("height", pa.int32()),
        pa.field("model", pa.string(), nullable=False),
    ]
)
"""One labelled image, or one image that could not be labelled."""


def labels_schema(*, embeddings: bool) -> pa.Schema:
    """The schema of label rows; with an ``embedding``, a list of float16, if asked."""
    if not embeddings:
        return LABELS_SCHEMA
    position = LABELS_SCHEMA.get_field_index("width")
    # Not a list of fixed size: pyarrow cannot read one back from Parquet where a row has none.
    return LABELS_SCHEMA.insert(position, pa.field("embedding", pa.list_(pa.float16())))


PARTS_SCHEMA = pa.schema(
    [
        pa.field("path", pa.string(), nullable=False),  # URI
        pa.field("part", pa.int32(), nullable=False),
        pa.field("rows", pa.int64(), nullable=False),
        pa.field("ok", pa.int64(), nullable=False),
        pa.field("errors", pa.int64(), nullable=False),
        pa.field("bytes", pa.int64(), nullable=False),
        pa.field("etag", pa.string(), nullable=False),
        pa.field("sha256", pa.string(), nullable=False),
    ]
)
"""One part of a committed run: its manifest has a row for each. 0 rows: sealed by an abort."""

PREDICTIONS_SCHEMA = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),
        pa.field("label", pa.int32(), nullable=False),
        pa.field("prediction", pa.int32(), nullable=False),
        pa.field("confidence", pa.float32(), nullable=False),
        pa.field("loss", pa.float32(), nullable=False),
        pa.field("label_rank", pa.int32(), nullable=False),  # 0: the label is the top prediction
    ]
)
"""One evaluated sample: class indices, confidence of the prediction, cross-entropy of the label."""

ORDER_SCHEMA = pa.schema(
    [
        pa.field("epoch", pa.int32(), nullable=False),
        pa.field("step", pa.int32(), nullable=False),  # of the epoch, from 0
        pa.field("rank", pa.int32(), nullable=False),
        pa.field("key", pa.string(), nullable=False),
    ]
)
"""One sample of one epoch of training, and where it was used."""
