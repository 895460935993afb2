"""Tracking: sweeps in MLflow, and the pictures that go with them."""

import logging
import os

# MLflow reports its usage to its makers from the first import on, unless it is told not to
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
# and prints two lines of links for every run that ends, which are eighty for a sweep of forty
os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")

# the creation of a database is no news to whoever runs an experiment
logging.getLogger("mlflow.store.db.utils").setLevel(logging.WARNING)
