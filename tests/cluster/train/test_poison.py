"""An image of a packed dataset that kills whatever decodes it, while training reads it."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from cnnray.cluster.core.ordered import ReadAhead
from cnnray.cluster.train.ingest import SplitFeed, StreamedSplit, decode_once
from cnnray.cluster.train.reading import SplitReader
from cnnray.datasets.manifest import Shard, Split
from cnnray.datasets.sampling import PlainSampler
from cnnray.errors import DataError
from cnnray.images.augment import TrainTransform
from cnnray.images.transforms import Preprocessing
from cnnray.options import Augmentation
from cnnray.storage import open_store

pytestmark = [
    pytest.mark.ray,
    pytest.mark.timeout(180),
    pytest.mark.usefixtures("ray_session"),
]

POISON = Path(__file__).parents[2] / "images" / "poison"
AHEAD = ReadAhead(tasks=2, num_bytes=64e6, stall_seconds=100)


class PoisonableTransform(TrainTransform):
    """Has poison act in the process that is about to decode, and in that one's children."""

    @property
    def min_side(self) -> int | None:
        from cnnray.images import decode

        if str(POISON) not in sys.path:
            sys.path.insert(0, str(POISON))
            sys.modules.pop("sitecustomize", None)
            import sitecustomize

            for kind, reader in decode._READERS.items():
                decode._READERS[kind] = sitecustomize.poisonous(reader)
        return super().min_side


def make_feed(folder: Path, action: str) -> SplitFeed:
    """Eight images in two row groups, of which the sixth harms its decoder."""
    images = []
    for number in range(8):
        buffer = io.BytesIO()
        Image.fromarray(np.full((9, 9, 3), 20 * number, np.uint8)).save(buffer, "PNG")
        images.append(buffer.getvalue())
    images[5] += f"cnnray-poison:{action};".encode()
    table = pa.table(
        {
            "key": [f"photo {number}.png" for number in range(8)],
            "image": images,
            "label": pa.array([0, 1] * 4, pa.int32()),
        }
    )
    pq.write_table(table, folder / "shard.parquet", row_group_size=4)
    shard = Shard(path="shard.parquet", num_samples=8, bytes=1, sha256="", row_groups=(4, 4))
    preprocessing = Preprocessing(
        channels=3, size=9, resize=9, interpolation="bilinear", mean=(0.5,) * 3, std=(0.25,) * 3
    )
    reader = SplitReader(
        open_store(str(folder)),
        Split(num_samples=8, class_counts=(4, 4), files=(shard,)),
        PoisonableTransform(preprocessing, Augmentation(), seed=0),
        decode_seconds=3,
    )
    sampler = PlainSampler(tuple(reader.row_groups), 0)
    return SplitFeed(reader, sampler, StreamedSplit(reader, AHEAD), unit_rows=4)


WHAT = r"'photo 5.png' of .* cannot be decoded any more: .*\nhint: pack the dataset again"


@pytest.mark.parametrize(
    ("action", "reason"),
    [
        ("abort", "the decoder ended"),
        ("spin", "not decoded within 3 s"),
        ("bloat", "the decoder needs more than"),
    ],
)
def test_an_image_that_harms_its_decoder_is_named_while_it_is_streamed(tmp_path, action, reason):
    with pytest.raises(DataError, match=WHAT) as failure:
        list(make_feed(tmp_path, action).share(0, 1))
    assert reason in str(failure.value)


def test_an_image_that_kills_its_decoder_is_named_while_a_split_is_decoded_once(tmp_path):
    with pytest.raises(DataError, match=WHAT):
        decode_once(make_feed(tmp_path, "abort"), stall_seconds=100)
