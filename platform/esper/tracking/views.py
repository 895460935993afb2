"""Two saved views of a sweep in MLflow's web pages: its trials, and its mean curves by arm.

They are tags of the experiment in the form that the pages' own "share view" writes. A release of
MLflow that reads another form shows its default view instead; nothing else depends on them.
"""

import json
from urllib.parse import quote

VIEW_TAG = "mlflow.sharedViewState."


def view_tags(sweep_name: str, parent_run_id: str, metric: str) -> dict[str, str]:
    """Tags for the experiment.

    Args:
        sweep_name: Name of the sweep, which the views are named after.
        parent_run_id: The run whose nested runs to show.
        metric: Final metric that the question is about.
    """
    names = ("arm", "pair", "status")
    finals = (metric, "parameters", "train_seconds")
    trials = {
        "searchFilter": f"tags.`mlflow.parentRunId` = '{parent_run_id}'",
        # any order but the one by time: that one also shows the parent run
        "orderByKey": "tags.`mlflow.runName`",
        "orderByAsc": True,
        "startTime": "ALL",
        "lifecycleFilter": "Active",
        "datasetsFilter": [],
        "modelVersionFilter": "All Runs",
        "selectedColumns": [f"tags.`{name}`" for name in names]
        + [f"metrics.`final/{name}`" for name in finals],
        "runsPinned": [],
        "runsHidden": [],
        "viewMaximized": False,
    }
    by_arm = {
        "aggregateFunction": "average",
        "groupByKeys": [{"groupByData": "arm", "mode": "tag"}],
    }
    curves = trials | {"groupBy": by_arm}
    return {
        f"{VIEW_TAG}{sweep_name}-trials": json.dumps(trials),
        f"{VIEW_TAG}{sweep_name}-curves": json.dumps(curves),
    }


def view_links(sweep_name: str, experiment_id: str) -> str:
    """Markdown links to both views, relative to any page of the same server."""
    page = f"#/experiments/{experiment_id}/runs?workflowType=machine_learning&viewStateShareKey="
    name = quote(sweep_name)
    return (
        f"[All trials]({page}{name}-trials) · "
        f"[Mean curves by arm]({page}{name}-curves&compareRunsMode=CHART)"
    )
