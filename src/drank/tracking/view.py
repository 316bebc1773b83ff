"""How MLflow's pages show the experiment: its description, and a saved view of the variants of one state.

MLflow keeps a saved view (menu "Views") as a tag of the experiment, in JSON that its documentation does not describe.
A version of MLflow that reads another format shows its plain table instead; tests/ui looks at it in a browser.
"""

import json

KEY = "variants"
PAGE = f"runs?workflowType=machine_learning&viewStateShareKey={KEY}"
SECTION = "Size and quality"
MOST_COLUMNS, MOST_CHARTS = 6, 3  # of perplexities, and of accuracies; of either measure of perplexity
LONGEST = 5000  # characters that a tag of an experiment holds
DESCRIPTION = (
    "Variants of one model, a run each, under a run for the state of `dvc.lock` that made them. The view **Variants** "
    "(menu Views) has a table and charts of those tracked last. The step of `rank/<kind>` is the layer. Where weights "
    "have less than 16 bits, the artifact `figures/precision.png` of the state's run shows what a byte buys; charts "
    "then have its points, `nats_over_dense/<text>` (nats per token lost) against `bytes` (all weights on disk). "
    "Registered model `drank`: the variants that were promoted; `champion` is the one to ship."
)


def experiment_tags(lock_sha256: str, metrics: list[str], in_nats: bool) -> dict[str, str]:
    """Tags that describe the experiment, and hold the view of a state, whose variants have these metrics.

    Charts show perplexities over dense or, ``in_nats``, their logarithms.
    """
    views = (_view(lock_sha256, metrics, in_nats, most) for most in range(MOST_COLUMNS, -1, -1))
    return {
        "mlflow.experimentKind": "custom_model_development",
        "mlflow.note.content": DESCRIPTION,
        f"mlflow.sharedViewState.{KEY}": next(view for view in views if len(view) <= LONGEST),
    }


def _view(lock_sha256: str, metrics: list[str], in_nats: bool, most: int) -> str:
    def of(kind: str) -> list[str]:
        return [metric for metric in metrics if metric.startswith(f"{kind}/")][:most]

    perplexities, accuracies = of("ppl_over_dense") or of("token_perplexity"), of("acc")
    names = ["bytes", *perplexities, *accuracies]
    columns = ["params.`preset`", "params.`size_ratio`", *(f"metrics.`{metric}`" for metric in names)]
    charts = [
        {"type": "SCATTER", "xaxis": _axis("bytes"), "yaxis": _axis(quality), "runsCountToCompare": 100}
        for quality in (of("nats_over_dense") if in_nats else perplexities)[:MOST_CHARTS]
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
