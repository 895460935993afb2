"""Environment variables that Ray reads when it is imported; this module loads nothing of it."""

import os

# Tune's own files are not our evidence, and cost time
VARIABLES = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_USAGE_STATS_REPORT_URL": "http://127.0.0.1:9/",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_GLOBAL_CHECKPOINT_S": "3600",
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
}


def set_variables() -> None:
    """Set those that the user has not set; to be called before Ray is imported."""
    for name, value in VARIABLES.items():
        os.environ.setdefault(name, value)
