"""What is labelled already, and what of a listing is new: by key and etag, never by date.

The ledger is the union of the committed plans without their sealed parts: it needs no state of its
own. A listing is spilled to a file while it is fingerprinted, so that memory is bounded by some 100
bytes an image, whatever the keys are.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import IO, Literal, NamedTuple

import numpy as np
import pyarrow as pa

from cnnray.errors import DataError
from cnnray.labeling.fingerprints import (
    Fingerprints,
    Mask,
    id_fingerprints,
    is_member,
    is_repeat,
    join,
    key_fingerprints,
)
from cnnray.schema import PLAN_SCHEMA

ChangePolicy = Literal["relabel", "ignore", "error"]


class Ledger(NamedTuple):
    """Fingerprints of what a table has labelled."""

    keys: Fingerprints
    ids: Fingerprints


@dataclass(frozen=True)
class Selection:
    """What of a listing is to be labelled."""

    listed: int  # inputs
    duplicates: int  # whose key was listed before
    rows: int  # to label
    spill: IO[bytes]
    keep: Mask

    def tables(self) -> Iterator[pa.Table]:
        """The inputs to label (``PLAN_SCHEMA``), in the order of the listing."""
        row = 0
        for table in _read_spill(self.spill):
            kept = table.filter(pa.array(self.keep[row : row + table.num_rows]))
            row += table.num_rows
            if kept.num_rows:
                yield kept


def make_ledger(labelled: Iterable[pa.Table]) -> Ledger:
    """The ledger of tables of labelled inputs (``PLAN_SCHEMA``)."""
    pairs = [(key_fingerprints(table), id_fingerprints(table)) for table in labelled]
    return join_ledgers(Ledger(keys, ids) for keys, ids in pairs)


def join_ledgers(ledgers: Iterable[Ledger]) -> Ledger:
    """One ledger of them all."""
    ledgers = list(ledgers)
    return Ledger(join(ledger.keys for ledger in ledgers), join(ledger.ids for ledger in ledgers))


def select_new(
    listing: Iterable[pa.Table], ledger: Ledger, *, on_changed: ChangePolicy, spill: IO[bytes]
) -> Selection:
    """The inputs that the ledger has not: of inputs with the same key the first one counts.

    ``spill`` is an empty file, which the selection reads again.

    An image that was labelled with another etag is new under ``relabel``, known under ``ignore``,
    and a ``DataError`` under ``error``.
    """
    keys, ids = [], []
    with pa.ipc.new_stream(spill, PLAN_SCHEMA) as writer:
        for table in listing:
            table = table.select(PLAN_SCHEMA.names)
            keys.append(key_fingerprints(table))
            ids.append(id_fingerprints(table))
            writer.write_table(table)
    all_keys, all_ids = join(keys), join(ids)
    is_duplicate = is_repeat(all_keys)
    is_known = is_member(all_ids, ledger.ids)
    if on_changed != "relabel":
        is_changed = is_member(all_keys, ledger.keys) & ~is_known & ~is_duplicate
        if on_changed == "error" and is_changed.any():
            raise _changed(spill, is_changed)
        is_known |= is_changed
    keep = ~is_duplicate & ~is_known
    return Selection(
        listed=len(keep),
        duplicates=int(is_duplicate.sum()),
        rows=int(keep.sum()),
        spill=spill,
        keep=keep,
    )


def _read_spill(file: IO[bytes]) -> Iterator[pa.Table]:
    file.seek(0)
    with pa.ipc.open_stream(file) as reader:
        for batch in reader:
            yield pa.Table.from_batches([batch])


def _changed(file: IO[bytes], is_changed: Mask) -> DataError:
    first, row = int(np.argmax(is_changed)), 0
    for table in _read_spill(file):
        if first < row + table.num_rows:
            break
        row += table.num_rows
    key = table["key"][first - row].as_py()
    return DataError(
        f"{int(is_changed.sum()):,} images have changed since they were labelled, {key!r} first",
        hint="--on_changed relabel labels them again, ignore keeps their old rows",
    )
