"""Train an image classifier on a packed dataset.

python jobs/train.py --data data/flowers --output models/flowers --model.name resnet18
ray job submit --working-dir . -- python jobs/train.py --config FILE.yaml --data s3://b/d ...
"""

from cnnray.cli import run_job
from cnnray.config import TrainSettings

if __name__ == "__main__":
    run_job(TrainSettings, "cnnray.cluster.train.job:train")
