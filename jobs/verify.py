"""Prove that a table of labels is whole, or end a run that was left open.

python jobs/verify.py --output s3://bucket/labels
python jobs/verify.py --output s3://bucket/labels --abort
"""

from cnnray.cli import run_job
from cnnray.config import VerifySettings

if __name__ == "__main__":
    run_job(VerifySettings, "cnnray.cluster.verify.job:verify")
