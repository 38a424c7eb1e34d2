"""Validate, split and pack images into a dataset of Parquet shards.

python jobs/pack.py --input photos/ --output data/photos
ray job submit --working-dir . -- python jobs/pack.py --input s3://b/photos --output s3://b/data
"""

from cnnray.cli import run_job
from cnnray.config import PackSettings

if __name__ == "__main__":
    run_job(PackSettings, "cnnray.cluster.pack.job:pack")
