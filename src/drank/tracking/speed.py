"""Figures of ``drank bench``, beside what ``track`` logged of the same model folder."""

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from drank.tracking.registry import VariantRun, find_runs
from drank.tracking.store import existing_store


def log_speed(
    root: Path, model_md5: str, figures: Mapping[str, float], conditions: Mapping[str, Any]
) -> VariantRun | None:
    """Add metrics to the newest run that logged a model folder; the run, or None where there is none.

    No run is created: `drank track` makes them. Every call adds a value to a metric's history, and MLflow shows the
    newest. The tag ``speed.conditions`` holds, as JSON, what the figures depend on beside the model: the machine and
    the protocol.

    Args:
        model_md5: DVC's hash of the folder, with its ``.dir``.
        figures: by name of the metric, such as ``speed/decode``.

    Raises:
        TrackingError: a store that cannot be used.
    """
    runs, store = find_runs(root, model_md5), existing_store(root)
    if not runs or store is None:
        return None
    from mlflow.entities import Metric

    now = int(time.time() * 1000)
    metrics = [Metric(figure, value, now, 0) for figure, value in figures.items()]
    store.client.log_batch(runs[0].run_id, metrics=metrics)
    store.client.set_tag(runs[0].run_id, "speed.conditions", json.dumps(conditions, sort_keys=True))
    return runs[0]
