"""The study runs the stages of the main pipeline, and holds every preset at every size that its page speaks of."""

import re
from pathlib import Path

import yaml

from drank.workflow.params import read_params

REPOSITORY = Path(__file__).parent.parent
PEERS = ("svd", "asvd", "svd-llm", "basis-sharing", "d-rank", "d-rank-released", "kfac")


def moved(stage):
    """A stage of dvc.yaml as the study has it: other files, the same code."""
    text = yaml.safe_dump(stage)
    text = re.sub(r"^( *- )(data|results)/", r"\1study/\2/", text, flags=re.MULTILINE)
    document = yaml.safe_load(text)
    inner = document.get("do", document)
    inner["cmd"] += " --root study"
    inner["wdir"] = ".."
    if "params" in inner:
        inner["params"] = [{"study/params.yaml": inner["params"]}]
    return document


def test_the_stages_are_those_of_the_main_pipeline_over_other_files():
    main, study = (yaml.safe_load((REPOSITORY / f).read_text())["stages"] for f in ("dvc.yaml", "study/dvc.yaml"))
    assert {name: moved(stage) for name, stage in main.items()} == study


def test_every_preset_is_there_at_every_size_and_the_headline_rows_with_three_draws_of_windows():
    params = read_params(REPOSITORY / "study/params.yaml")
    sizes = {}
    for variant in params.variants.values():
        sizes.setdefault(variant.preset, set()).add(variant.size_ratio)
    assert {preset: sizes[preset] for preset in PEERS} == {preset: {0.9, 0.8, 0.7, 0.6, 0.5} for preset in PEERS}
    for preset in ("svd-llm", "d-rank", "kfac"):
        own = params.spectrum[params.presets[preset].spectrum]
        for seed in (1, 2):
            other = params.presets[f"{preset}-seed{seed}"]
            drawn = params.spectrum[other.spectrum]
            assert {0.8, 0.6} <= sizes[f"{preset}-seed{seed}"]
            assert drawn == own.model_copy(update={"calibration_seed": seed})
            assert other == params.presets[preset].model_copy(update={"spectrum": other.spectrum})


def test_presets_and_sources_are_those_of_the_shipped_parameters():
    shipped, study = (read_params(REPOSITORY / f) for f in ("params.yaml", "study/params.yaml"))
    assert (study.model, study.text, study.covariance) == (shipped.model, shipped.text, shipped.covariance)
    for name in PEERS:
        assert study.presets[name] == shipped.presets[name]
    for name in ("input", "kfac"):
        assert study.spectrum[name] == shipped.spectrum[name]
