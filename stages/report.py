"""Report: what evaluation, allocation and spectrum left -> results/: summary.csv, figures/, report.html."""

from pathlib import Path

from drank.report import page, perplexity_by_size, png, rank_heat_map, spectra, summary
from drank.workflow.files import read_json, read_tensors, replacing_folder, write_text
from drank.workflow.params import read_params
from drank.workflow.stage import run_stage


def main(root: Path = Path()) -> None:
    params = read_params(root / "params.yaml")
    rows = [read_json(root / "data/evaluation" / f"{name}.json")["results"] for name in params.variants]
    allocations = [read_json(root / "data/allocation" / f"{name}.json") for name in params.variants]
    table = summary(rows)
    write_text(root / "results/summary.csv", table.to_csv(index=False, lineterminator="\n"))
    figures = {
        "perplexity": perplexity_by_size(table),
        "ranks": rank_heat_map([a for a in allocations if a["allocation"] != "dense"] or allocations),
    }
    for key in params.spectrum:
        folder = root / "data/spectrum" / key
        described = read_json(folder / "summary.json")
        whole = [block["cuts"][0]["matrices"] for block in described["blocks"]]
        units = described["units"] + [matrix for matrices in whole for matrix in matrices]
        values = read_tensors(folder / "singular_values.safetensors")
        figures[f"spectra-{key}"] = spectra(
            {unit["name"]: (values[unit["name"]] ** 2).numpy() for unit in units},
            {unit["name"]: unit["kind"] for unit in units},
            {unit["name"]: unit["layer"] for unit in units},
        )
    pictures = {name: png(figure) for name, figure in figures.items()}
    with replacing_folder(root / "results/figures") as folder:
        for name, picture in pictures.items():
            (folder / f"{name}.png").write_bytes(picture)
    write_text(root / "results/report.html", page(table, pictures))


if __name__ == "__main__":
    run_stage(main)
