"""The tag of the blessed night in the tracking store: a view on the log, moved when the store is there."""

from __future__ import annotations

from service.store.home import Home
from service.store.mlflow_store import configure_mlflow, explain, failures, sqlite_path
from service.store.planned_run import COMPLETE_TAG

BLESSED_TAG = "blessed"
WHY_TAG = "blessed_why"


def move_tag(home: Home, experiment: str, sweep_id: str, why: str) -> bool:
    """Takes the tag from the experiment's other summary runs and gives it to the sweep's; False where that run is not published.

    Raises:
        TrackingError: The store is out of reach.
    """
    uri = home.tracking_uri
    path = sqlite_path(uri)
    if path is not None and not path.exists():
        return False
    configure_mlflow()
    from mlflow.tracking import MlflowClient

    try:
        client = MlflowClient(tracking_uri=uri)
        suites = [found.experiment_id for found in client.search_experiments()]
        summaries = f"tags.role = 'summary' AND tags.`{COMPLETE_TAG}` = 'true' AND tags.experiment = '{experiment}'"
        runs = client.search_runs(suites, f"{summaries} AND tags.sweep_id = '{sweep_id}'")
        if not runs:
            return False
        # The new one first: between the two steps there are two references, never none.
        client.set_tag(runs[0].info.run_id, BLESSED_TAG, "true")
        client.set_tag(runs[0].info.run_id, WHY_TAG, why[:4000])
        for run in client.search_runs(suites, f"{summaries} AND tags.{BLESSED_TAG} = 'true'"):
            if run.info.run_id != runs[0].info.run_id:
                for tag in (BLESSED_TAG, WHY_TAG):
                    if tag in run.data.tags:
                        client.delete_tag(run.info.run_id, tag)
    except failures() as error:
        raise explain(uri, error) from error
    return True
