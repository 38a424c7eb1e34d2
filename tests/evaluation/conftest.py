from collections.abc import Callable, Sequence

import pyarrow as pa
import pytest

from cnnray.schema import PREDICTIONS_SCHEMA

Row = tuple[str, int, int, float, float, int]


@pytest.fixture(scope="session")
def make_predictions() -> Callable[[Sequence[Row]], pa.Table]:
    """Rows of (key, label, prediction, confidence, loss, label_rank) as a table."""

    def make(rows: Sequence[Row]) -> pa.Table:
        names = PREDICTIONS_SCHEMA.names
        return pa.Table.from_pylist(
            [dict(zip(names, row, strict=True)) for row in rows], schema=PREDICTIONS_SCHEMA
        )

    return make
