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


def weights_of(model):
    """The keys that decide a model's weights; the others are for cards, which experiments do not write."""
    return model.model_dump(exclude={"license", "language", "base_model"})


def test_presets_and_sources_are_those_of_the_shipped_parameters():
    shipped, study = (read_params(REPOSITORY / f) for f in ("params.yaml", "study/params.yaml"))
    assert (weights_of(study.model), study.text, study.covariance.targets) == (
        weights_of(shipped.model), shipped.text, shipped.covariance.targets,
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


def test_the_experiment_of_healing_has_the_model_text_and_preset_of_the_shipped_parameters():
    shipped, ours = (read_params(REPOSITORY / f) for f in ("params.yaml", "experiments/healing.yaml"))
    assert (weights_of(ours.model), ours.text, ours.covariance.targets) == (
        weights_of(shipped.model), shipped.text, shipped.covariance.targets,
    )  # fmt: skip
    assert ours.presets["kfac"] == shipped.presets["kfac-aligned"]


def test_the_figures_of_healing_are_those_of_the_committed_results():
    shown = {row[0].strip("`"): row[1:] for row in rows_of(AFTER) if row[0].startswith("`")}
    assert shown.keys() == HEALING.keys()
    tokens = dict.fromkeys(shown, "")
    for name, variant in read_params(REPOSITORY / "experiments/healing.yaml").variants.items():
        if healing := variant.healing:
            tokens[name] = f"{healing.n_windows * healing.window_length * healing.epochs / 1000:.0f} k"
    for name, (megabytes, _, read, perplexities, ratios) in shown.items():
        found = HEALING[name]
        assert (megabytes, read) == (f"{found['bytes'] / 1e6:.1f}", tokens[name])
        assert perplexities == " / ".join(f"{found[key]:.2f}" for key in KEYS)
        assert ratios == " / ".join(f"{ratio:.3f}" for ratio in over_dense(HEALING, name))


def test_healing_takes_a_third_of_what_kfac_lost_at_its_size():
    before, after = (HEALING[name] for name in ("kfac-60", "kfac-60-healed"))
    for key in KEYS:
        dense = HEALING["dense"][key]
        assert after[key] / dense - 1 <= (before[key] / dense - 1) * 2 / 3
    assert after["parameters"] == before["parameters"]
