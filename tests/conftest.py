"""What all tests share: one thread per process, no windows, and no reports to third parties."""

import os

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["MPLBACKEND"] = "Agg"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ["RAY_USAGE_STATS_REPORT_URL"] = "http://127.0.0.1:9/"
os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"

import torch

torch.set_num_threads(1)
