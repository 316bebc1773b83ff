"""The study runs the stages of the main pipeline, and holds every preset at every size that its page speaks of."""

from pathlib import Path

from experiments.tools import copies

from drank.project.files import read_json
from drank.project.params import read_params

REPOSITORY = Path(__file__).parent.parent
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


def ratios_to_dense(variant):
    """News / commons, as the page has them."""
    results, dense = (read_json(REPOSITORY / f"study/results/{name}.json") for name in (variant, "dense"))
    figures = [results[f"token_perplexity/{text}"] / dense[f"token_perplexity/{text}"] for text in ("news", "commons")]
    return " / ".join(f"{figure:.2f}" if figure < 1000 else f"{figure:.0e}" for figure in figures)


def test_the_figures_of_the_page_are_those_of_the_committed_results():
    page = (REPOSITORY / "docs/study.md").read_text().partition("## Healing")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in page.splitlines() if line.startswith("|")]
    shown = {}
    for row in rows:
        if row[0] == "preset":
            sizes = row[1:]
        elif row[0].startswith("`"):
            names = [f"{row[0].strip('`')}-{round(float(size) * 100)}" for size in sizes]
            shown |= {name: cell for name, cell in zip(names, row[1:], strict=True) if cell}
    assert set(shown) == set(read_params(REPOSITORY / "study/params.yaml").variants) - {"dense"}
    assert shown == {name: ratios_to_dense(name) for name in shown}


def test_ours_is_never_worse_than_a_peer_of_the_same_size():
    sizes = (90, 80, 70, 60, 50)
    for size in sizes:
        ours = read_json(REPOSITORY / f"study/results/kfac-{size}.json")
        for preset in PEERS[:-1]:
            theirs = read_json(REPOSITORY / f"study/results/{preset}-{size}.json")
            for text in ("news", "commons"):
                assert ours[f"token_perplexity/{text}"] < theirs[f"token_perplexity/{text}"], (preset, size, text)


def test_the_experiment_of_healing_compares_presets_of_the_shipped_parameters_by_one_recipe():
    shipped, ours = (read_params(REPOSITORY / f) for f in ("params.yaml", "experiments/healing.yaml"))
    assert (ours.model, ours.text, ours.covariance.targets) == (shipped.model, shipped.text, shipped.covariance.targets)
    assert ours.presets["kfac"] == shipped.presets["kfac-aligned"]
    assert ours.presets["d-rank"] == shipped.presets["d-rank"]
    assert ours.variants["d-rank-60-distilled"].healing == ours.variants["kfac-60-distilled"].healing is not None


def test_the_figures_of_healing_are_those_of_the_committed_results():
    results = {path.stem: read_json(path) for path in (REPOSITORY / "experiments/healing/results").glob("*.json")}
    page = (REPOSITORY / "docs/study.md").read_text().partition("## Healing")[2].partition("\n## ")[0]
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in page.splitlines() if line.startswith("| `")
    ]
    shown = {row[0].strip("`"): row[1:] for row in rows}
    assert shown.keys() == results.keys()
    for name, row in shown.items():
        found, dense = results[name], results["dense"]
        perplexities = [found[f"token_perplexity/{text}"] for text in ("news", "commons")]
        over = [found[f"token_perplexity/{text}"] / dense[f"token_perplexity/{text}"] for text in ("news", "commons")]
        accuracies = [found["acc/last_word"], found["acc/next_sentence"]]
        told = [" / ".join(f"{value:.2f}" for value in values) for values in (perplexities, over, accuracies)]
        assert row == [f"{found['bytes'] / 1e6:.1f}", *told]


def test_healing_takes_a_third_of_what_kfac_lost_and_kfac_stays_ahead_of_d_rank_at_equal_bytes():
    results = {path.stem: read_json(path) for path in (REPOSITORY / "experiments/healing/results").glob("*.json")}
    for text in ("news", "commons"):
        key = f"token_perplexity/{text}"
        before, after = (results[name][key] / results["dense"][key] - 1 for name in ("kfac-60", "kfac-60-distilled"))
        assert after <= before * 2 / 3
        assert results["kfac-60-distilled"][key] < results["d-rank-60-distilled"][key]
    assert results["kfac-60-distilled"]["bytes"] <= 1.01 * results["d-rank-60-distilled"]["bytes"]
    assert results["kfac-60-distilled"]["parameters"] == results["kfac-60"]["parameters"]
