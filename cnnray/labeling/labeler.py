"""Encoded images in, label rows out: one row an image, whatever its bytes."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice

import pyarrow as pa

from cnnray.labeling.decoding import Sample, SampleDecoder
from cnnray.labeling.prediction import Predictor
from cnnray.schema import labels_schema


class Labeler:
    """Decodes and predicts in one process, batch by batch: few pixels are held at a time."""

    def __init__(self, decoder: SampleDecoder, predictor: Predictor) -> None:
        self.decoder = decoder
        self.predictor = predictor

    def close(self) -> None:
        """End the decoder's process, if there is one."""
        self.decoder.close()

    def label(self, samples: Iterable[Sample]) -> pa.Table:
        """Rows of ``labels_schema`` in the order of the samples.

        Raises ``UnavailableError`` and ``AccessDeniedError`` of a sample: no image is at fault.
        """
        schema = labels_schema(embeddings=self.predictor.engine.embeddings)
        tables = [schema.empty_table()]
        iterator = iter(samples)
        while batch := list(islice(iterator, self.predictor.batch_size)):
            tables.append(self.predictor.predict(self.decoder.decode(batch)))
        return pa.concat_tables(tables)
