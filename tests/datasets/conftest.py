"""What the tests of every source do: list it all, read it all."""

import pickle

import pyarrow as pa
import pytest

from cnnray.schema import ENTRY_SCHEMA


def _entries_of(source) -> pa.Table:
    tables = [table for name in source.partitions() for table in source.list(name)]
    for table in tables:
        table.validate(full=True)
        assert table.schema.equals(ENTRY_SCHEMA, check_metadata=True)
        assert not any(table[f.name].null_count for f in ENTRY_SCHEMA if not f.nullable)
    return pa.concat_tables(tables) if tables else ENTRY_SCHEMA.empty_table()


@pytest.fixture
def entries_of():
    """List a whole source, checking that every table is of ENTRY_SCHEMA."""
    return _entries_of


@pytest.fixture
def rows_of():
    """The same, as dicts."""
    return lambda source: _entries_of(source).to_pylist()


@pytest.fixture
def read_all():
    """Read every entry of a source, in its order."""
    return lambda source: list(source.read(_entries_of(source)))


@pytest.fixture
def travelled():
    """A source as a worker gets it."""
    return lambda source: pickle.loads(pickle.dumps(source))  # noqa: S301
