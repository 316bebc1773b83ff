"""Pages as a person sees them: MLflow's pages of a tracked state, and results/report.html, in a real browser."""

import itertools
import json

import pytest

pytestmark = pytest.mark.timeout(900)  # the tiny pipeline runs first, if no other test ran it


# How many points every scatter plot on the page has; they are drawn in WebGL, so there are no elements to count.
POINTS = """[...document.querySelectorAll('.js-plotly-plot')]
    .map(plot => plot.data.filter(trace => trace.type.startsWith('scatter')).flatMap(trace => [...trace.x]).length)
    .filter(count => count > 0)"""


@pytest.fixture(scope="module")
def variants(tracked):
    """The run of every variant, by name."""
    return tracked[2].one_state()[1]


@pytest.fixture(scope="module")
def two(variants):
    """A compressed variant of the published method and of ours, or else the last two."""
    names = [name for name in ("d-rank-80", "kfac-80") if name in variants]
    return [variants[name] for name in (names if len(names) == 2 else list(variants)[-2:])]


def text_of(page, role: str) -> list[str]:
    return [cell.strip() for cell in page.get_by_role(role).all_inner_texts()]


def shown(value: float) -> str:
    """The first digits of a metric as MLflow prints it."""
    return f"{value:.6f}"[:5]


def test_the_view_of_the_experiment_lists_every_variant_with_its_metrics(open_page, tracked, variants):
    page = open_page(tracked[1])
    page.get_by_role("link", name="dense", exact=True).wait_for()
    for name in variants:
        assert page.get_by_role("link", name=name, exact=True).is_visible()
    headings = text_of(page, "columnheader")
    for column in ("preset", "size_ratio", "bytes", "ppl_over_dense/news", "acc/last_word"):
        assert column in headings
    cells = text_of(page, "gridcell")
    for run in variants.values():
        assert str(int(run.data.metrics["bytes"])) in cells
        perplexity = shown(run.data.metrics["ppl_over_dense/news"]).removesuffix(".000")
        assert any(cell.startswith(perplexity) for cell in cells), (perplexity, cells)


def test_the_charts_of_the_view_have_size_against_quality(open_page, tracked, variants):
    page = open_page(tracked[1], compareRunsMode="CHART")
    page.get_by_text("Size and quality").first.wait_for()
    page.locator(".parcoords").first.wait_for()
    page.wait_for_function(f"({POINTS}).length >= 2")
    assert page.evaluate(POINTS)[:2] == [len(variants)] * 2
    assert page.get_by_text("ppl_over_dense/news").first.is_visible()


def compare(open_page, two):
    ids, experiments = json.dumps([run.info.run_id for run in two]), json.dumps([two[0].info.experiment_id])
    page = open_page("/compare-runs", runs=ids, experiments=experiments)
    page.get_by_text("Comparing 2 Runs").wait_for()
    return page


def params_of(page) -> dict[str, list[str]]:
    rows = [row.split("\t") for row in page.get_by_role("row").all_inner_texts()]
    return {row[0].strip(): [cell.strip() for cell in row[1:]] for row in rows}


def metrics_of(page) -> dict[str, list[float]]:
    """The drawn part of the table of metrics, whose rows are no elements: a column of names, then values row by row."""
    heading = page.get_by_role("button", name="Metrics", exact=True)
    lines = heading.evaluate("heading => heading.closest('div[class]').parentElement.innerText").split("\n")
    words = [line.strip() for line in lines[lines.index("Show diff only") + 1 :] if line.strip()]
    names = list(itertools.takewhile(lambda word: not word[0].isdigit(), words))
    values = [float(word) for word in words[len(names) :]]
    return {name: values[2 * number : 2 * number + 2] for number, name in enumerate(names)}


def test_two_variants_are_compared_side_by_side(open_page, two):
    page = compare(open_page, two)
    page.locator(".parcoords").first.wait_for()
    found = params_of(page)
    for key in ("preset", "allocation", "storage", "size_ratio", "sampling.n_windows"):
        assert found[key] == [run.data.params[key] for run in two]
    page.get_by_role("switch").first.click()
    page.wait_for_function("!document.body.innerText.includes('sampling.n_windows')")
    params = [run.data.params for run in two]
    differing = {key for key in params[0] if params[0][key] != params[1][key]}
    assert params_of(page).keys() & params[0].keys() == differing
    for heading in ("Visualizations", "Run details"):
        page.get_by_role("button", name=heading).click()
    page.get_by_text("ppl_over_dense/news", exact=True).wait_for()
    values = metrics_of(page)
    for key in ("ppl_over_dense/news", "acc/last_word", "bytes"):
        assert values[key] == pytest.approx([run.data.metrics[key] for run in two], rel=1e-3)


def test_a_run_says_how_to_rebuild_it_and_what_it_is_by_hash(open_page, two):
    run = two[1]
    page = open_page(f"/experiments/{run.info.experiment_id}/runs/{run.info.run_id}")
    page.get_by_text(f"dvc repro release@{run.info.run_name}").first.wait_for()
    for key in ("allocation.sha256", "model.dvc_md5", "dvc.lock_sha256"):
        assert page.get_by_text(run.data.tags[key]).first.is_visible()


def test_the_ranks_of_a_run_are_a_picture_and_a_table(open_page, two):
    run = two[1].info
    page = open_page(f"/experiments/{run.experiment_id}/runs/{run.run_id}/artifacts/ranks.png")
    picture = page.get_by_alt_text("ranks.png")
    picture.wait_for()
    page.wait_for_function("image => image.complete && image.naturalWidth > 0", arg=picture.element_handle())
    assert picture.is_visible()
    page.get_by_text("ranks.json", exact=True).click()
    page.get_by_text("full_rank", exact=True).first.wait_for()
    assert page.get_by_text("model.layers.0.self_attn.q_proj", exact=True).first.is_visible()


def test_the_report_is_one_page_with_every_variant(page, tracked, variants):
    page.goto((tracked[0] / "results/report.html").as_uri())
    text = page.inner_text("body")
    assert [name for name in variants if name not in text] == []
    sizes = page.evaluate("[...document.images].map(image => image.naturalWidth)")
    assert sizes
    assert min(sizes) > 0
