"""What all tests share: one thread per process, no windows, and no reports to third parties.

Without a GPU, kernels run in Triton's interpreter, in the tests that ask for them.
"""

import os

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["MPLBACKEND"] = "Agg"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ["RAY_USAGE_STATS_REPORT_URL"] = "http://127.0.0.1:9/"
os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"

import torch

torch.set_num_threads(1)
if not torch.cuda.is_available():
    # read when triton is imported, so before anything else imports it
    os.environ.setdefault("TRITON_INTERPRET", "1")
