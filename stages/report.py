"""Report: what evaluation, allocation and spectrum left -> results/: summary.csv, figures/, report.html."""

from pathlib import Path

from drank.project.command import run_stage
from drank.project.dvc import Inputs
from drank.project.files import read_json, read_tensors, replacing_folder, write_text
from drank.project.params import ModelSource, read_params
from drank.project.sources import file_of, scheme_of
from drank.views.page import page, pictures, summary
from drank.views.pictures import Spectrum, png


def main(root: Path = Path()) -> None:
    params, inputs = read_params(root / "params.yaml"), Inputs(root)
    rows = [read_json(inputs / f"data/evaluation/{name}.json")["results"] for name in params.variants]
    allocations = [read_json(inputs / f"data/allocation/{name}.json") for name in params.variants]
    spectra = {key: read_spectrum(inputs, f"data/spectrum/{key}") for key in params.spectrum}
    table = summary(rows)
    write_text(root / "results/summary.csv", table.to_csv(index=False, lineterminator="\n"))
    source = source_file(params.model, root) if "bits" in table else None
    drawn = pictures(table, allocations, spectra, source)
    shown = {name: (picture, png(picture.figure)) for name, picture in drawn.items()}
    with replacing_folder(root / "results/figures") as folder:
        for name, (_, data) in shown.items():
            (folder / f"{name}.png").write_bytes(data)
    write_text(root / "results/report.html", page(rows, shown))


def source_file(asked: ModelSource, root: Path) -> tuple[str, int] | None:
    """Name and bytes of the model's file where the source is a single one, such as GGUF; of a folder, None."""
    if scheme_of(asked) == "hub":
        return None
    with file_of(asked, root / "data/downloads", root) as path:
        return (path.name, path.stat().st_size) if path.is_file() else None


def read_spectrum(inputs: Inputs, folder: str) -> Spectrum:
    described = read_json(inputs / f"{folder}/summary.json")
    values = read_tensors(inputs / f"{folder}/singular_values.safetensors")
    whole = [matrix for block in described["blocks"] for matrix in block["cuts"][0]["matrices"]]
    return Spectrum(
        metric=described["metric"],
        energies={file: (s**2).numpy() for file, s in values.items()},
        matrices={row["factors"]: (row["kind"], row["layer"]) for row in described["units"] + whole},
    )


if __name__ == "__main__":
    run_stage(main)
