"""How MLflow's pages show the experiment: its description, and a saved view of the variants of one state.

MLflow keeps a saved view (menu "Views") as a tag of the experiment, in JSON that its documentation does not describe.
A version of MLflow that reads another format shows its plain table instead; tests/ui looks at it in a browser.
"""

import json

KEY = "variants"
PAGE = f"runs?workflowType=machine_learning&viewStateShareKey={KEY}"
SECTION = "Size and quality"
MOST_COLUMNS, MOST_CHARTS = 6, 3  # of perplexities, and of accuracies; of perplexities
LONGEST = 5000  # characters that a tag of an experiment holds
DESCRIPTION = (
    "Variants of one model, a run each, under a run for the state of `dvc.lock` that made them. The view **Variants** "
    "(menu Views) has a table and charts of those tracked last. The step of `rank/<kind>` is the layer. Registered "
    "model `drank`: the variants that were promoted; `champion` is the one to ship."
)


def experiment_tags(lock_sha256: str, metrics: list[str]) -> dict[str, str]:
    """Tags that describe the experiment, and hold the view of a state, whose variants have these metrics."""
    views = (_view(lock_sha256, metrics, most) for most in range(MOST_COLUMNS, -1, -1))
    return {
        "mlflow.experimentKind": "custom_model_development",
        "mlflow.note.content": DESCRIPTION,
        f"mlflow.sharedViewState.{KEY}": next(view for view in views if len(view) <= LONGEST),
    }


def _view(lock_sha256: str, metrics: list[str], most: int) -> str:
    relative = any(metric.startswith("ppl_over_dense/") for metric in metrics)
    perplexities, accuracies = (
        [metric for metric in metrics if metric.startswith(kind)][:most]
        for kind in ("ppl_over_dense/" if relative else "token_perplexity/", "acc/")
    )
    names = ["bytes", *perplexities, *accuracies]
    columns = ["params.`preset`", "params.`size_ratio`", *(f"metrics.`{metric}`" for metric in names)]
    charts = [
        {"type": "SCATTER", "xaxis": _axis("bytes"), "yaxis": _axis(perplexity), "runsCountToCompare": 100}
        for perplexity in perplexities[:MOST_CHARTS]
    ]
    compared = ["bytes", *perplexities[:1], *accuracies[:1]]
    charts.append({"type": "PARALLEL", "selectedParams": ["preset"], "selectedMetrics": compared})
    view = {
        "searchFilter": f"tags.`drank.run` = 'variant' and tags.`dvc.lock_sha256` = '{lock_sha256}'",
        "orderByKey": "metrics.`bytes`",
        "orderByAsc": False,
        "compareRunCharts": [
            {"uuid": f"drank-{number}", "metricSectionId": SECTION, "deleted": False, "isGenerated": False, **chart}
            for number, chart in enumerate(charts)
        ],
        "compareRunSections": [
            {"uuid": SECTION, "name": SECTION, "display": True, "isReordered": False, "deleted": False}
        ],
        "isAccordionReordered": True,
        "selectedColumns": columns,
        "columnOrder": columns,
        # In pixels: wide enough for the heading.
        "columnWidths": {column: max(95, 7 * len(column.split("`")[1]) + 30) for column in columns},
    }
    return json.dumps({"name": "Variants", "createdAt": 0, "updatedAt": 0, "state": json.dumps(view)})


def _axis(metric: str) -> dict[str, str]:
    return {"key": metric, "type": "METRIC"}
