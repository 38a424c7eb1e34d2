"""Evaluate a bundle on a split of a dataset, every row once.

python jobs/evaluate.py --model models/flowers --data data/flowers --output reports/flowers
ray job submit --working-dir . -- python jobs/evaluate.py --model s3://b/m --data s3://b/d ...
"""

from cnnray.cli import run_job
from cnnray.config import EvaluateSettings

if __name__ == "__main__":
    run_job(EvaluateSettings, "cnnray.cluster.evaluate.job:evaluate")
