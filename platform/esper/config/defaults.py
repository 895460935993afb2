"""Defaults that the command line's help shows, too: this module loads nothing."""

TRACKING_URI = "sqlite:///mlflow.db"  # MLflow's, in the folder one works in
DASHBOARD = "http://127.0.0.1:8265"  # of a Ray cluster whose head is here, or forwarded to here
RESULTS = "~/esper-results"  # on a cluster
