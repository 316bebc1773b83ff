"""The study runs the stages of the main pipeline, and holds every preset at every size that its page speaks of."""

from itertools import product

from experiments.tools import copies

from drank.project.files import read_json
from drank.project.params import read_params
from tests.conftest import REPOSITORY

PEERS = ("svd", "asvd", "svd-llm", "basis-sharing", "d-rank", "d-rank-released", "kfac")


def test_committed_copies_of_the_pipeline_are_those_that_the_command_writes(tmp_path):
    made = [f"experiments/{name}" for name in copies.STUDIES]
    for file in ("dvc.yaml", *(f"{folder}.yaml" for folder in made)):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_bytes((REPOSITORY / file).read_bytes())
    copies.main(tmp_path)
    for file in ("study/dvc.yaml", *(f"{folder}/{kind}.yaml" for folder in made for kind in ("dvc", "params"))):
        assert (tmp_path / file).read_text() == (REPOSITORY / file).read_text(), (
            "run python -m experiments.tools.copies"
        )
    for folder in made:
        read_params(REPOSITORY / folder / "params.yaml")


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
            assert sizes[f"{preset}-seed{seed}"] >= ({0.8, 0.6} if preset == "kfac" else {0.8})
            assert drawn == own.model_copy(update={"calibration_seed": seed})
            assert other == params.presets[preset].model_copy(update={"spectrum": other.spectrum})


def test_presets_and_sources_are_those_of_the_shipped_parameters():
    shipped, study = (read_params(REPOSITORY / f) for f in ("params.yaml", "study/params.yaml"))
    assert (study.model, study.text, study.covariance.targets) == (
        shipped.model, shipped.text, shipped.covariance.targets,
    )  # fmt: skip
    for name in PEERS:
        assert study.presets[name] == shipped.presets[name]
    assert study.spectrum["input"] == shipped.spectrum["input"]
    fewer = {"cuts": study.spectrum["kfac"].cuts, "gradient_damping": None}  # the shipped run is a quick one
    assert study.spectrum["kfac"] == shipped.spectrum["kfac"].model_copy(update=fewer)


STUDY, HEALING = (
    {path.stem: read_json(path) for path in (REPOSITORY / folder / "results").glob("*.json")}
    for folder in ("study", "experiments/healing")
)
KEYS = ("token_perplexity/news", "token_perplexity/commons")


def over_dense(results, name):
    return [results[name][key] / results["dense"][key] for key in KEYS]


def rows_of(page):
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in page.splitlines() if line.startswith("|")]


BEFORE, _, AFTER = (REPOSITORY / "docs/study.md").read_text().partition("## Healing")


def test_the_figures_of_the_page_are_those_of_the_committed_results():
    shown = {}
    for row in rows_of(BEFORE):
        if row[0] == "preset":
            sizes = row[1:]
        elif row[0].startswith("`"):
            names = [f"{row[0].strip('`')}-{round(float(size) * 100)}" for size in sizes]
            shown |= {name: cell for name, cell in zip(names, row[1:], strict=True) if cell}
    assert set(shown) == set(read_params(REPOSITORY / "study/params.yaml").variants) - {"dense"}
    for name, cell in shown.items():
        figures = over_dense(STUDY, name)
        assert cell == " / ".join(f"{figure:.2f}" if figure < 1000 else f"{figure:.0e}" for figure in figures)


def test_ours_is_never_worse_than_a_peer_of_the_same_size():
    for preset, size, key in product(PEERS[:-1], (90, 80, 70, 60, 50), KEYS):
        assert STUDY[f"kfac-{size}"][key] < STUDY[f"{preset}-{size}"][key], (preset, size, key)


def test_the_experiment_of_healing_compares_presets_of_the_shipped_parameters_by_one_recipe():
    shipped, ours = (read_params(REPOSITORY / f) for f in ("params.yaml", "experiments/healing.yaml"))
    assert (ours.model, ours.text, ours.covariance.targets) == (shipped.model, shipped.text, shipped.covariance.targets)
    assert ours.presets["kfac"] == shipped.presets["kfac-aligned"]
    assert ours.presets["d-rank"] == shipped.presets["d-rank"]
    assert ours.variants["d-rank-60-distilled"].healing == ours.variants["kfac-60-distilled"].healing is not None


def test_the_figures_of_healing_are_those_of_the_committed_results():
    page = AFTER.partition("\n## ")[0]
    shown = {row[0].strip("`"): row[1:] for row in rows_of(page) if row[0].startswith("`")}
    assert shown.keys() == HEALING.keys()
    for name, row in shown.items():
        found = HEALING[name]
        pairs = [
            [found[key] for key in KEYS],
            over_dense(HEALING, name),
            [found["acc/last_word"], found["acc/next_sentence"]],
        ]
        assert row == [f"{found['bytes'] / 1e6:.1f}", *(" / ".join(f"{value:.2f}" for value in pair) for pair in pairs)]


def test_healing_takes_a_third_of_what_kfac_lost_and_kfac_stays_ahead_of_d_rank_at_equal_bytes():
    before, after, other = (HEALING[name] for name in ("kfac-60", "kfac-60-distilled", "d-rank-60-distilled"))
    for key in KEYS:
        dense = HEALING["dense"][key]
        assert after[key] / dense - 1 <= (before[key] / dense - 1) * 2 / 3
        assert after[key] < other[key]
    assert after["bytes"] <= 1.01 * other["bytes"]
    assert after["parameters"] == before["parameters"]


def test_the_figures_of_few_numbers_are_those_of_the_committed_results():
    folder = REPOSITORY / "experiments/scales/results"
    found = {file.stem: read_json(file) for file in folder.glob("*.json")}
    shown = {row[0].strip("`"): row[1:] for row in rows_of(AFTER.partition("\n## Few numbers")[2]) if row[0][0] == "`"}
    assert shown.keys() == found.keys() - {"dense"}
    for name, row in shown.items():
        ratios = over_dense(found, name)
        assert row == [
            " / ".join(f"{found[name][key]:.2f}" for key in KEYS),
            " / ".join(f"{value:.3f}" for value in ratios),
        ]
