"""Runs that need no cluster: who gets one all the same, and the same rows without one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pyarrow.dataset as ds
import pytest

from benchmarks.bundles import write_network
from cnnray.cluster.classify import job
from cnnray.cluster.classify.small_runs import SmallRunLabeler, may_run_here
from cnnray.config import ClassifySettings
from cnnray.datasets.sources import open_source
from cnnray.errors import ModelError
from cnnray.storage import open_store
from tests.faults.colours import write_bundle, write_images

ROOT = Path(__file__).parents[3]
POISON = ROOT / "tests/images/poison"


@pytest.fixture
def settings(tmp_path: Path) -> ClassifySettings:
    write_images(tmp_path / "images", range(9))
    return ClassifySettings(
        model=str(write_bundle(tmp_path / "bundle")),
        input=str(tmp_path / "images"),
        output=str(tmp_path / "labels"),
    )
