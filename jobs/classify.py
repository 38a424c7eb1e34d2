"""Label a collection of images into Parquet: one row for each image.

python jobs/classify.py --model models/flowers --input photos/ --output labels/photos
ray job submit --working-dir . -- python jobs/classify.py --model s3://b/m --input s3://b/p ...
"""

from cnnray.cli import run_job
from cnnray.config import ClassifySettings

if __name__ == "__main__":
    run_job(ClassifySettings, "cnnray.cluster.classify.job:classify")
