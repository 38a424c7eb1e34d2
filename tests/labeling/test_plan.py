"""The plan: every input once, in parts, named by the digest of all that it says."""

from __future__ import annotations

import dataclasses
import io
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import cnnray.labeling.plan as plan_module
from cnnray.errors import ConflictError, MissingObjectError
from cnnray.labeling.plan import PLAN_FOLDER, LabelPlan, read_plan, write_plan
from cnnray.schema import ENTRY_SCHEMA, PLAN_SCHEMA
from cnnray.storage import Store, encode_json, open_store, sha256

Inputs = Callable[..., pa.Table]
Snapshot = Callable[[], dict[str, tuple[int, bytes]]]

ODD_KEYS = [
    "",
    " ",
    "a\nb",
    "a\0b",
    "\"'<img src=x onerror=alert(1)>",
    "../../etc/passwd",
    "_a/.b//c/",
    "run=7/%2F+%20",
    "caf\u00e9",
    "cafe\u0301",
    "x" * 1024,
]


@dataclass
class CountingStore:
    """A store, and the keys that were read from it."""

    store: Store
    reads: list[str] = field(default_factory=list)

    def read(self, key: str) -> bytes:
        self.reads.append(key)
        return self.store.read(key)


def plan_of(store: Store, *tables: pa.Table, part_rows: int = 3, duplicates: int = 0) -> LabelPlan:
    return write_plan(store, tables, part_rows=part_rows, duplicates=duplicates)


def keys_of(plan: LabelPlan, parts: Iterable[int] | None = None) -> list[list[str]]:
    wanted = range(plan.num_parts) if parts is None else parts
    return [table["key"].to_pylist() for _, table in plan.read_parts(wanted)]


def piece_rows(plan: LabelPlan) -> list[int]:
    pieces = (plan.store.read(f"{PLAN_FOLDER}/{digest}.parquet") for digest in plan.pieces)
    return [pq.read_metadata(io.BytesIO(data)).num_rows for data in pieces]


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces of at most 7 rows: of 6, where parts have 3."""
    monkeypatch.setattr(plan_module, "PIECE_ROWS", 7)


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("part_rows", [1, 3, 4, 7, 8, 100])
@pytest.mark.parametrize("count", [1, 6, 7, 8, 25])
def test_every_input_is_in_one_part_in_the_order_of_the_listing(
    store: Store, inputs: Inputs, part_rows: int, count: int
) -> None:
    keys = [f"k{n}" for n in range(count)]
    plan = plan_of(store, inputs(*keys), part_rows=part_rows)
    parts = keys_of(plan)
    assert [key for part in parts for key in part] == keys
    assert [len(part) for part in parts] == [plan.rows_of(part) for part in range(plan.num_parts)]
    assert {len(part) for part in parts[:-1]} <= {part_rows}
    assert 1 <= len(parts[-1]) <= part_rows


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize(
    ("rows", "pieces"),
    [(5, [5]), (6, [6]), (7, [6, 1]), (12, [6, 6]), (13, [6, 6, 1])],
)
def test_pieces_are_of_whole_parts(
    store: Store, inputs: Inputs, rows: int, pieces: Sequence[int]
) -> None:
    plan = plan_of(store, inputs(*(f"k{n}" for n in range(rows))))
    assert piece_rows(plan) == pieces
    assert sum(len(part) for part in keys_of(plan)) == plan.rows == rows


@pytest.mark.usefixtures("small_pieces")
def test_a_part_larger_than_a_piece_is_a_piece_of_its_own(store: Store, inputs: Inputs) -> None:
    plan = plan_of(store, inputs(*(f"k{n}" for n in range(19))), part_rows=9)
    assert piece_rows(plan) == [9, 9, 1]


@pytest.mark.usefixtures("small_pieces")
def test_parts_are_read_in_any_order(store: Store, inputs: Inputs) -> None:
    plan = plan_of(store, inputs(*(f"k{n}" for n in range(14))))
    order = [4, 0, 3, 0, 2]
    assert [part for part, _ in plan.read_parts(order)] == order
    assert keys_of(plan, order) == [keys_of(plan)[part] for part in order]


@pytest.mark.usefixtures("small_pieces")
def test_neighbours_read_their_piece_once(store: Store, inputs: Inputs) -> None:
    plan = plan_of(store, inputs(*(f"k{n}" for n in range(13))))
    counting = CountingStore(store)
    keys_of(dataclasses.replace(plan, store=counting))
    assert len(counting.reads) == len(plan.pieces) == 3


def test_a_plan_is_read_by_one_that_cuts_pieces_otherwise(
    store: Store, inputs: Inputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_of(store, inputs(*(f"k{n}" for n in range(25))))
    before = keys_of(plan)
    monkeypatch.setattr(plan_module, "PIECE_ROWS", 7)
    assert keys_of(read_plan(store, plan.digest)) == before


def test_all_columns_survive_whatever_the_names_are(store: Store, inputs: Inputs) -> None:
    listing = inputs(*((key, f"etag of {key}") for key in ODD_KEYS))
    plan = plan_of(store, listing, part_rows=100)
    [(_, table)] = plan.read_parts([0])
    assert table.equals(listing)


def test_other_columns_of_a_listing_are_left_out(store: Store) -> None:
    row = {"key": "a", "path": "p", "offset": 7, "length": 9, "etag": "e", "label": "cat"}
    plan = plan_of(store, pa.Table.from_pylist([row], ENTRY_SCHEMA))
    [(_, table)] = plan.read_parts([0])
    assert table.schema.equals(PLAN_SCHEMA)
    assert table.to_pylist() == [{name: row[name] for name in PLAN_SCHEMA.names}]


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("cut", [1, 2, 5, 6, 13])
def test_the_plan_is_the_same_however_the_listing_comes(
    store: Store, inputs: Inputs, cut: int
) -> None:
    listing = inputs(*(f"k{n}" for n in range(13)))
    whole = plan_of(store, listing)
    tables = [listing.slice(start, cut) for start in range(0, 13, cut)]
    assert plan_of(store, inputs(), *tables, inputs()).digest == whole.digest
    assert plan_of(store, pa.concat_tables(tables)).digest == whole.digest


def test_the_plan_is_the_same_wherever_it_is(store: Store, inputs: Inputs, tmp_path: Any) -> None:
    elsewhere = open_store(str(tmp_path / "elsewhere"))
    assert plan_of(store, inputs("a")).digest == plan_of(elsewhere, inputs("a")).digest


def test_other_work_is_another_plan(store: Store, inputs: Inputs) -> None:
    digests = [
        plan_of(store, inputs("a", "b")).digest,
        plan_of(store, inputs("b", "a")).digest,
        plan_of(store, inputs("ab")).digest,
        plan_of(store, inputs(("a", "e"), ("b", "f"))).digest,
        plan_of(store, inputs("a", "b"), part_rows=2).digest,
        plan_of(store, inputs("a", "b"), duplicates=1).digest,
        plan_of(store).digest,
    ]
    assert len(set(digests)) == len(digests)


def test_a_second_driver_writes_nothing_new(
    store: Store, inputs: Inputs, snapshot: Snapshot
) -> None:
    first = plan_of(store, inputs("a", "b", "c", "d"))
    before = snapshot()
    assert plan_of(store, inputs("a", "b", "c", "d")) == first
    assert snapshot() == before


def test_parts_are_named_by_number_and_count(store: Store, inputs: Inputs) -> None:
    plan = plan_of(store, inputs(*"abcdefg"))
    assert plan.num_parts == 3
    assert plan.part_name(2) == "part-00002-of-00003.parquet"


def test_nothing_to_label_is_no_part(store: Store) -> None:
    plan = plan_of(store)
    assert (plan.rows, plan.num_parts, plan.pieces) == (0, 0, [])


# Reading


@pytest.mark.usefixtures("small_pieces")
def test_a_plan_is_found_by_its_digest(store: Store, inputs: Inputs) -> None:
    plan_of(store, inputs("other"))
    plan = plan_of(store, inputs("c", "a", "b", "d"), duplicates=5)
    found = read_plan(store, plan.digest)
    assert found == plan
    assert (found.rows, found.part_rows, found.piece_parts, found.duplicates) == (4, 3, 2, 5)
    assert keys_of(found) == [["c", "a", "b"], ["d"]]


def test_a_changed_plan_is_named(store: Store, inputs: Inputs) -> None:
    digest = plan_of(store, inputs("a")).digest
    key = f"{PLAN_FOLDER}/{digest}.json"
    store.write(key, store.read(key).replace(b'"rows": 1', b'"rows": 2'))
    with pytest.raises(ConflictError, match=f"{key} was changed"):
        read_plan(store, digest)


def test_a_plan_of_another_version_is_refused(store: Store, inputs: Inputs) -> None:
    digest = plan_of(store, inputs("a")).digest
    document = json.loads(store.read(f"{PLAN_FOLDER}/{digest}.json")) | {"version": 99}
    data = encode_json(document)
    store.create(f"{PLAN_FOLDER}/{sha256(data)}.json", data)
    with pytest.raises(ConflictError, match=r"has version 99, not 1\nhint: use the cnnray"):
        read_plan(store, sha256(data))


PLAN_WORDS = ("version", "rows", "part_rows", "piece_parts", "duplicates", "pieces")


@pytest.mark.parametrize(
    "data",
    [
        *(b"", b"\xff", b"[" * 200_000, b"[]", b"7", b'"version"', b"{}"),
        *(
            encode_json({word: 1 for word in PLAN_WORDS if word != left_out} | {"pieces": []})
            for left_out in PLAN_WORDS[:-1]
        ),
        encode_json(dict.fromkeys(PLAN_WORDS, 1)),
    ],
    ids=lambda data: str(data[:9]),
)
def test_what_is_no_plan_is_named(store: Store, data: bytes) -> None:
    key = f"{PLAN_FOLDER}/{sha256(data)}.json"
    store.create(key, data)
    with pytest.raises(ConflictError, match=f"{key} is not a plan"):
        read_plan(store, sha256(data))


def test_a_plan_that_is_gone_is_named(store: Store, inputs: Inputs) -> None:
    digest = plan_of(store, inputs("a")).digest
    store.delete(f"{PLAN_FOLDER}/{digest}.json")
    with pytest.raises(MissingObjectError, match=digest):
        read_plan(store, digest)


def other_piece(data: bytes) -> bytes:
    """A piece with one key changed, as valid as the one it replaces."""
    table = pq.read_table(io.BytesIO(data))
    keys = pa.array(["other", *table["key"].to_pylist()[1:]])
    buffer = io.BytesIO()
    pq.write_table(table.set_column(0, PLAN_SCHEMA.field("key"), keys), buffer)
    return buffer.getvalue()


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize(
    "damage",
    [other_piece, lambda data: data[:-9], lambda data: b"X" + data[1:], lambda data: b""],
    ids=["other rows", "truncated", "flipped", "empty"],
)
def test_a_changed_piece_is_named_when_it_is_needed(
    store: Store, inputs: Inputs, damage: Callable[[bytes], bytes]
) -> None:
    plan = plan_of(store, inputs(*(f"k{n}" for n in range(8))))
    key = f"{PLAN_FOLDER}/{plan.pieces[1]}.parquet"
    store.write(key, damage(store.read(key)))
    assert keys_of(plan, [0, 1]) == [["k0", "k1", "k2"], ["k3", "k4", "k5"]]
    with pytest.raises(ConflictError, match=f"{key} was changed"):
        keys_of(plan, [2])


def test_a_piece_that_is_gone_is_named(store: Store, inputs: Inputs) -> None:
    plan = plan_of(store, inputs("a"))
    store.delete(f"{PLAN_FOLDER}/{plan.pieces[0]}.parquet")
    with pytest.raises(MissingObjectError, match=plan.pieces[0]):
        keys_of(plan)
