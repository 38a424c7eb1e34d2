"""The whole path on real images, in about two minutes: pack → train → evaluate → classify.

    python jobs/demo.py --output demo

The images are the 1,797 handwritten digits (8x8, grey) that come with scikit-learn.
"""

import json
import logging
from pathlib import Path
from typing import Any

from PIL import Image
from sklearn.datasets import load_digits

from cnnray.cli import run_job
from cnnray.cluster.classify.job import classify
from cnnray.cluster.core.session import ray_cluster
from cnnray.cluster.evaluate.job import evaluate
from cnnray.cluster.pack.job import pack
from cnnray.cluster.train.job import train
from cnnray.config import (
    ClassifySettings,
    DemoSettings,
    EvaluateSettings,
    PackSettings,
    TrainSettings,
)

logger = logging.getLogger("cnnray.demo")


def demo(settings: DemoSettings) -> dict[str, Any]:
    """Write the digits as PNG files, run the four jobs on them, and say where everything is."""
    root = Path(settings.output)
    images, dataset, model = (str(root / name) for name in ("images", "dataset", "model"))
    write_digits(root / "images")
    with ray_cluster(settings.cluster):
        cluster = settings.cluster
        pack(PackSettings(cluster=cluster, input=images, output=dataset, overwrite=True))
        train(
            TrainSettings(
                cluster=cluster,
                data=dataset,
                output=model,
                epochs=settings.epochs,
                optimizer={"lr": 0.003},
                schedule={"name": "cosine"},
                augment={"rotation": 10},
                overwrite=True,
            )
        )
        evaluation = evaluate(
            EvaluateSettings(
                cluster=cluster,
                model=model,
                data=dataset,
                output=str(root / "evaluation"),
                overwrite=True,
            )
        )
        labels = classify(
            ClassifySettings(
                cluster=cluster, model=model, input=images, output=str(root / "labels")
            )
        )
    _show(model=model, report=evaluation["report"], labels=labels["data"])
    return {
        "accuracy": evaluation["accuracy"],
        "model": model,
        "report": evaluation["report"],
        "labels": labels["data"],
    }


def write_digits(folder: Path) -> None:
    """One PNG file a digit, in one folder a class."""
    digits = load_digits()
    for number, (pixels, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        path = folder / str(label) / f"{number:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((pixels * 255 / 16).astype("uint8")).save(path)


def _show(*, model: str, report: str, labels: str) -> None:
    query = f"SELECT label, count(*), avg(confidence) FROM '{labels}/**/*.parquet' GROUP BY label"
    logger.info("model:   %s", model)
    logger.info("report:  %s", report)
    logger.info("labels:  %s", labels)
    logger.info("read it: python -c %s", json.dumps(f"import duckdb; print(duckdb.sql({query!r}))"))
    logger.info("or:      python -c \"import pandas; print(pandas.read_parquet('%s'))\"", labels)


if __name__ == "__main__":
    run_job(DemoSettings, demo)
