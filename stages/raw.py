"""data/raw/: the model as a plain bf16 folder and the texts as JSON lines, from the sources in params.yaml."""

from pathlib import Path

from drank.project.command import run_stage
from drank.project.files import replacing_folder
from drank.project.params import read_params
from drank.project.sources import fetch_model, fetch_text


def main(root: Path = Path()) -> None:
    params = read_params(root / "params.yaml")
    downloads = root / "data/downloads"
    with replacing_folder(root / "data/raw/text") as folder:
        for name, text in params.text.items():
            fetch_text(**text.model_dump(), destination=folder / f"{name}.jsonl", downloads=downloads, root=root)
    model = root / "data/raw/model"
    fetch_model(**params.model.model_dump(), destination=model, downloads=downloads, root=root)


if __name__ == "__main__":
    run_stage(main)
