"""Packing for real files: everything is accounted for, and an old dataset is never half gone."""

from __future__ import annotations

import gzip
import io
import json
import struct
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import cnnray.cluster.pack.job as pack_module
from cnnray.cluster.pack.job import pack
from cnnray.errors import DataError, StorageError, TooManyBadImagesError, UsageError

pytestmark = [
    pytest.mark.ray,
    pytest.mark.timeout(300),
    pytest.mark.usefixtures("ray_session"),
]


def rows_of(dataset: Path) -> pa.Table:
    manifest = json.loads((dataset / "manifest.json").read_text())
    files = [shard["path"] for split in manifest["splits"].values() for shard in split["files"]]
    return pa.concat_tables([pq.read_table(dataset / path, partitioning=None) for path in files])


def files_of(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_good_and_hostile_files_are_all_accounted_for(painter, pack_settings, tmp_path):
    painter.photos(tmp_path / "photos", 20)
    codes = painter.hostile(tmp_path / "photos/red/deep")
    (tmp_path / "photos/loose.png").write_bytes(painter.image("red", 1))
    result = pack(pack_settings(input=str(tmp_path / "photos"), output=str(tmp_path / "out")))
    rejected = pq.read_table(tmp_path / "out/rejected.parquet").to_pylist()
    assert {row["key"]: (row["stage"], row["error_code"]) for row in rejected} == {
        **{f"red/deep/{name}": ("decode", code) for name, code in codes.items()},
        "loose.png": ("list", "no_label"),
    }
    assert result["inputs"] == 66
    assert result["samples"] == 60
    assert result["rejected"] == len(rejected) == 6
    assert sum(result["splits"].values()) == 60
    rows = rows_of(tmp_path / "out")
    photos = files_of(tmp_path / "photos")
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    assert len(set(rows["key"].to_pylist())) == rows.num_rows == 60
    for row in rows.to_pylist():
        assert row["image"] == photos[row["key"]]
        assert manifest["classes"][row["label"]] == row["key"].split("/")[0]
        assert (row["width"], row["height"]) == (12, 12)


def test_images_that_crash_hang_or_exhaust_their_decoder_are_rejected_with_a_code(
    painter, pack_settings, tmp_path
):
    painter.photos(tmp_path / "photos", 20)
    codes = painter.poison(tmp_path / "photos/red")
    result = pack(
        pack_settings(
            input=str(tmp_path / "photos"), output=str(tmp_path / "out"), decode_seconds=1
        )
    )
    rejected = pq.read_table(tmp_path / "out/rejected.parquet").to_pylist()
    assert {row["key"]: (row["stage"], row["error_code"]) for row in rejected} == {
        f"red/{name}": ("decode", code) for name, code in codes.items()
    }
    assert (result["samples"], result["rejected"]) == (60, 3)
    assert result["seconds"] < 90


def test_the_manifest_is_written_last(painter, pack_settings, tmp_path):
    painter.photos(tmp_path / "photos", 20)
    pack(pack_settings(input=str(tmp_path / "photos"), output=str(tmp_path / "out")))
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.*")}
    assert max(times, key=times.__getitem__).name == "manifest.json"


def test_an_existing_dataset_is_refused_and_replaced_only_when_asked_and_whole(
    painter, pack_settings, tmp_path
):
    painter.photos(tmp_path / "old", 20)
    painter.photos(tmp_path / "new", 25, first=100)
    (tmp_path / "nothing").mkdir()
    (tmp_path / "nothing/readme.txt").write_text("no images here")
    (tmp_path / "bad/red").mkdir(parents=True)
    (tmp_path / "bad/red/1.png").write_bytes(b"not an image")
    output = tmp_path / "out"

    def run(name: str, **changes: object) -> dict[str, object]:
        return pack(pack_settings(input=str(tmp_path / name), output=str(output), **changes))

    run("old")
    before = files_of(output)
    with pytest.raises(UsageError, match="holds a dataset already"):
        run("new")
    for name in ("nothing", "bad", "no such folder"):
        with pytest.raises(UsageError):
            run(name, overwrite=True)
    assert files_of(output) == before
    run("new", overwrite=True)
    assert {key.split("/")[1][:2] for key in rows_of(output)["key"].to_pylist()} == {"01"}
    left = {name for name in files_of(output) if name in before}
    assert left == {"manifest.json", "rejected.parquet"}


def test_a_packing_that_broke_off_can_be_done_again_with_other_images(
    painter, pack_settings, tmp_path, monkeypatch
):
    painter.photos(tmp_path / "photos", 20)
    settings = {"input": str(tmp_path / "photos"), "output": str(tmp_path / "out")}

    def break_off(*_: object, **__: object) -> None:
        raise StorageError("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(pack_module, "_publish", break_off)
        with pytest.raises(StorageError, match="disk is full"):
            pack(pack_settings(**settings))
    painter.photos(tmp_path / "photos", 1, first=50)
    with pytest.raises(UsageError, match="a packing that broke off(.|\n)*--overwrite"):
        pack(pack_settings(**settings))
    assert pack(pack_settings(**settings, overwrite=True))["samples"] == 63


def test_a_table_of_files_is_packed_with_its_labels_and_splits(painter, pack_settings, tmp_path):
    painter.photos(tmp_path / "files", 12)
    lines = ["where,kind,part"]
    for colour in painter.colours:
        for number in range(12):
            name = f"{number:04d}.{('png', 'jpeg')[number % 2]}"
            lines.append(
                f"files/{colour}/{name},{colour.upper()},{'test' if number < 3 else 'train'}"
            )
    lines.append("files/red/none.png,RED,train")
    (tmp_path / "table.csv").write_text("\n".join(lines))
    columns = {"path": "where", "label": "kind", "split": "part"}
    result = pack(
        pack_settings(
            input=str(tmp_path / "table.csv"), output=str(tmp_path / "out"), columns=columns
        )
    )
    assert (result["samples"], result["rejected"], result["splits"]["test"]) == (36, 1, 9)
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    assert manifest["classes"] == ["BLUE", "GREEN", "RED"]
    assert manifest["rejected"]["by_code"] == {"missing": 1}
    for row in rows_of(tmp_path / "out").to_pylist():
        assert manifest["classes"][row["label"]].lower() in row["source"]


def test_a_tar_is_packed(painter, pack_settings, tmp_path):
    with tarfile.open(tmp_path / "photos.tar", "w") as tar:
        for number in range(30):
            colour = painter.colours[number % 3]
            for suffix, data in (
                ("png", painter.image(colour, number)),
                ("cls", str(number % 3).encode()),
            ):
                info = tarfile.TarInfo(f"{number:03d}.{suffix}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    result = pack(pack_settings(input=str(tmp_path / "photos.tar"), output=str(tmp_path / "out")))
    assert (result["samples"], result["rejected"]) == (30, 0)
    for row in rows_of(tmp_path / "out").to_pylist():
        number = int(Path(row["key"]).stem)
        assert row["label"] == number % 3
        assert row["image"] == painter.image(painter.colours[number % 3], number)


def test_idx_files_are_packed_bit_for_bit(pack_settings, tmp_path):
    from cnnray.images.decode import decode_image

    random = np.random.default_rng(0)
    (tmp_path / "idx").mkdir()
    images = {
        name: random.integers(0, 256, (n, 8, 8), np.uint8)
        for name, n in (("train", 50), ("t10k", 20))
    }
    for name, pixels in images.items():
        labels = (np.arange(len(pixels)) % 10).astype(np.uint8)
        for kind, magic, array in (("images-idx3", 0x803, pixels), ("labels-idx1", 0x801, labels)):
            header = struct.pack(f">{1 + array.ndim}I", magic, *array.shape)
            with gzip.open(tmp_path / f"idx/{name}-{kind}-ubyte.gz", "wb") as file:
                file.write(header + array.tobytes())
    result = pack(pack_settings(input=str(tmp_path / "idx"), output=str(tmp_path / "out")))
    assert (result["samples"], result["classes"], result["splits"]["test"]) == (70, 10, 20)
    for row in rows_of(tmp_path / "out").to_pylist():
        split, _, number = row["key"].partition("/")
        pixels = images["t10k" if split == "test" else "train"][int(number)]
        assert (decode_image(row["image"], channels=1).pixels[..., 0] == pixels).all()
        assert row["label"] == int(number) % 10


def test_an_input_without_images_is_an_error_that_writes_nothing(pack_settings, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs/readme.md").write_text("hello")
    for name in ("empty", "docs", "no such folder", "docs/readme.md"):
        with pytest.raises(DataError, match="no images at all"):
            pack(pack_settings(input=str(tmp_path / name), output=str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()


def test_more_bad_images_than_the_budget_is_an_error_with_a_complete_dataset(
    painter, pack_settings, tmp_path
):
    painter.photos(tmp_path / "photos", 10)
    for number in range(4):
        (tmp_path / f"photos/red/bad{number}.jpg").write_bytes(b"not an image")
    settings = {"input": str(tmp_path / "photos"), "budget": {"min_rows": 3, "max_fraction": 0.1}}
    with pytest.raises(TooManyBadImagesError, match="4 of 34 images") as caught:
        pack(pack_settings(**settings, output=str(tmp_path / "out")))
    assert caught.value.exit_code == 3
    assert caught.value.result["samples"] == 30
    codes = Counter(pq.read_table(tmp_path / "out/rejected.parquet")["error_code"].to_pylist())
    assert codes == {"not_image": 4}
    assert rows_of(tmp_path / "out").num_rows == 30
