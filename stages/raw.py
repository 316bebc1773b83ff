"""data/raw/: the model as a plain bf16 folder and the texts as JSON lines, from the sources in params.yaml."""

from functools import partial
from pathlib import Path

from drank.model.rotation import rotate
from drank.project.command import run_stage
from drank.project.files import replacing_folder
from drank.project.models import fetch_model
from drank.project.params import read_params
from drank.project.texts import fetch_text


def main(root: Path = Path()) -> None:
    params, downloads = read_params(root / "params.yaml"), root / "data/downloads"
    with replacing_folder(root / "data/raw/text") as folder:
        for name, text in params.text.items():
            fetch_text(text, folder / f"{name}.jsonl", downloads, root)
    seed, untie = params.model.rotation_seed, bool(params.model.untie_head)
    rotated = None if seed is None else partial(rotate, seed=seed, untie_head=untie)
    fetch_model(params.model, root / "data/raw/model", downloads, root, rotated)


if __name__ == "__main__":
    run_stage(main)
