"""Measure how fast labelling is on your images and this machine: stages, bottleneck, time, cost.

python jobs/bench.py --model models/flowers --input photos/
python jobs/bench.py --model models/flowers --input photos/ --images 1000000 --price_per_hour 0.34
"""

from cnnray.cli import run_job
from cnnray.config import BenchSettings

if __name__ == "__main__":
    run_job(BenchSettings, "cnnray.cluster.classify.dry_run:bench")
