"""Choose a model and its settings: train over a space of settings, keep the best bundle.

python jobs/tune.py --data data/flowers --output models/best --space space.yaml --trials 16
ray job submit --working-dir . -- python jobs/tune.py --config FILE.yaml --space FILE.yaml ...
"""

from cnnray.cli import run_job
from cnnray.config import TuneSettings

if __name__ == "__main__":
    run_job(TuneSettings, "cnnray.cluster.tune.job:tune")
