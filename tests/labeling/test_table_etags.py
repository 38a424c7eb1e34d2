"""A table of paths with a column of etags: what has changed is labelled again, and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from cnnray.config import ClassifySettings, load_settings
from cnnray.datasets.listing import list_in_order
from cnnray.datasets.sources import open_source
from cnnray.errors import DataError
from cnnray.labeling.commit import Run, labelled_inputs

Listing = Callable[..., pa.Table]


@pytest.fixture
def listing(tmp_path: Path) -> Listing:
    """The listing of a CSV file as classify makes it, with ``--columns.etag version``."""

    def make(text: str) -> pa.Table:
        path = tmp_path / "photos.csv"
        path.write_text(text)
        flags = [f"--input={path}", "--model=m", "--output=o", "--columns.etag=version"]
        settings = load_settings(ClassifySettings, flags)
        source = open_source(settings.input, labelled=False, **settings.columns.options())
        return pa.concat_tables(list_in_order(source))

    return make


def test_an_etag_that_is_unchanged_is_not_labelled_again(
    listing: Listing, label_all: Callable[..., Run], begin: Callable[..., Any]
) -> None:
    label_all(listing("path,version\na.png,1\nb.png,1\n"))
    # Another order, another column, another etag of the conventional name: the same contents.
    assert begin(listing("etag,path,version\nx,b.png,1\ny,a.png,1\n")) is None


def test_an_etag_that_has_changed_is_labelled_again(
    listing: Listing, label_all: Callable[..., Run]
) -> None:
    label_all(listing("path,version\na.png,1\nb.png,1\n"))
    second = label_all(listing("path,version\na.png,1\nb.png,2\n"))
    [planned] = labelled_inputs(second)
    assert planned.select(["key", "etag"]).to_pylist() == [{"key": "b.png", "etag": "2"}]


def test_an_etag_that_has_changed_stops_the_job_on_request(
    listing: Listing, label_all: Callable[..., Run], begin: Callable[..., Any]
) -> None:
    label_all(listing("path,version\na.png,1\n"))
    with pytest.raises(DataError, match="1 images have changed since .*, 'a.png' first"):
        begin(listing("path,version\na.png,2\n"), on_changed="error")


def test_a_column_that_is_not_there_is_named(listing: Listing) -> None:
    with pytest.raises(DataError, match="no column 'version' in .*photos.csv.*path, etag"):
        listing("path,etag\na.png,1\n")
