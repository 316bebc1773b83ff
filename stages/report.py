"""Report: what evaluation, allocation and spectrum left -> results/: summary.csv, figures/, report.html."""

from pathlib import Path

from drank.project.command import run_stage
from drank.project.dvc import Inputs
from drank.project.files import read_arrays, read_json, replacing_folder, write_text
from drank.project.params import read_params
from drank.project.sources import single_file
from drank.views.page import report


def main(root: Path = Path()) -> None:
    params, inputs = read_params(root / "params.yaml"), Inputs(root)
    rows = [read_json(inputs / f"data/evaluation/{name}.json")["results"] for name in params.variants]
    allocations = [read_json(inputs / f"data/allocation/{name}.json") for name in params.variants]
    summaries = {key: read_json(inputs / f"data/spectrum/{key}/summary.json") for key in params.spectrum}
    values = {key: read_arrays(inputs / f"data/spectrum/{key}/singular_values.safetensors") for key in params.spectrum}
    source = single_file(params.model, root / "data/downloads", root) if any("bits" in row for row in rows) else None
    table, shown, html = report(rows, allocations, summaries, values, source)
    write_text(root / "results/summary.csv", table)
    with replacing_folder(root / "results/figures") as folder:
        for name, picture in shown.items():
            (folder / f"{name}.png").write_bytes(picture.png)
    write_text(root / "results/report.html", html)


if __name__ == "__main__":
    run_stage(main)
