"""Encoded images in, rows of answers out: one row an image, whatever its bytes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import islice
from typing import Protocol

import pyarrow as pa

from cnnray.labeling.decoding import Sample, SampleDecoder


class RowPredictor(Protocol):
    """Answers for decoded rows, ``batch_size`` images at a time."""

    @property
    def batch_size(self) -> int:
        """Images of one forward pass, at most."""

    def predict(self, decoded: pa.Table) -> pa.Table:
        """A row for each row of ``SampleDecoder.decode``, in their order; the bad ones, too."""


class Labeler:
    """Decodes and predicts in one process, batch by batch: few pixels are held at a time."""

    def __init__(self, decoder: SampleDecoder, predictor: RowPredictor) -> None:
        self.decoder = decoder
        self.predictor = predictor

    def close(self) -> None:
        """End the decoder's process, if there is one."""
        self.decoder.close()

    def label(self, samples: Iterable[Sample], beside: pa.Table | None = None) -> pa.Table:
        """The predictor's rows in the order of the samples.

        ``beside``: a row for each sample, with columns that the predictor finds beside the decoded
        ones. Raises ``UnavailableError`` and ``AccessDeniedError`` of a sample: no image is at
        fault.
        """
        iterator = iter(samples)
        tables: list[pa.Table] = []
        done = 0
        while (batch := list(islice(iterator, self.predictor.batch_size))) or not tables:
            decoded = self.decoder.decode(batch)
            if beside is not None:
                decoded = with_columns(decoded, beside.slice(done, len(batch)), beside.column_names)
            tables.append(self.predictor.predict(decoded))
            done += len(batch)
        return pa.concat_tables(tables)


def with_columns(rows: pa.Table, others: pa.Table, names: Sequence[str]) -> pa.Table:
    """Rows with some columns of as many others."""
    for name in names:
        rows = rows.append_column(name, others[name])
    return rows
