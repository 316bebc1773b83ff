"""Pages on params.yaml, the five choices and an allocation say what the code and the results say."""

import io
import json
import re
import runpy
from functools import reduce
from pathlib import Path

import numpy as np
import pytest
import yaml
from experiments.tools.reference import markdown
from PIL import Image
from typer.testing import CliRunner

from drank.cli import commands
from drank.cli.params import json_schema
from drank.project.files import read_json
from drank.project.params import ParamsError, read_params
from drank.views.pictures import png

REPOSITORY = Path(__file__).parent.parent
DOCS = REPOSITORY / "docs"
SHIPPED = REPOSITORY / "params.yaml"
PAGES = ("map", "precision", "params", "choices", "reading-an-allocation", "tutorial")
COMMITTED = [SHIPPED, REPOSITORY / "study/params.yaml", *sorted((REPOSITORY / "experiments").glob("*.yaml"))]
ALLOCATION = read_json(REPOSITORY / "data/allocation/kfac-80.json")


def test_the_committed_reference_is_what_the_types_give():
    schema = CliRunner().invoke(commands, ["params"]).output
    assert (DOCS / "params.schema.json").read_text() == schema, "run: drank params > docs/params.schema.json"
    assert (DOCS / "params.md").read_text() == markdown(), "run: python -m experiments.tools.reference > docs/params.md"


def test_the_comments_of_params_yaml_know_every_answer_that_the_schema_knows():
    comments = "\n".join(line.partition("#")[2] for line in SHIPPED.read_text().splitlines())
    for section, key in (
        ("Covariance", "fisher"),
        ("Spectrum", "metric"),
        ("Spectrum", "units"),
        ("Preset", "allocation"),
        ("Preset", "storage"),
        ("Preset", "scores"),
    ):
        entry = json_schema()["$defs"][section]["properties"][key]
        answers = entry.get("enum") or entry["anyOf"][0]["enum"]
        assert [answer for answer in answers if not re.search(rf"\b{answer}\b", comments)] == []


def test_editors_find_the_schema():
    schema = re.fullmatch(r"# yaml-language-server: \$schema=(\S+)", SHIPPED.read_text().splitlines()[0])
    assert (REPOSITORY / schema[1]).samefile(DOCS / "params.schema.json")


@pytest.fixture(scope="module")
def validator():
    jsonschema = pytest.importorskip("jsonschema")
    schema = read_json(DOCS / "params.schema.json")
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


def accepted(tmp_path, document):
    path = tmp_path / "params.yaml"
    path.write_text(yaml.safe_dump(document))
    try:
        read_params(path)
    except ParamsError:
        return False
    return True


def changed(change):
    """The shipped document with values set; keys are paths, None removes."""
    document = yaml.safe_load(SHIPPED.read_text())
    for path, value in change.items():
        *parents, last = path.split("/")
        section = reduce(dict.__getitem__, parents, document)
        section[last] = value
        if value is None:
            del section[last]
    return document


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.relative_to(REPOSITORY).as_posix())
def test_committed_parameters_have_the_schema(validator, path):
    assert [error.message for error in validator.iter_errors(yaml.safe_load(path.read_text()))] == []


@pytest.mark.parametrize(
    ("change", "is_valid"),
    [
        ({"sampling/n_window": 3}, False),
        ({"variants/d-rank-80/ratio": 0.8}, False),
        ({"variants/d-rank-80/size_ratio": 0}, False),
        ({"variants/d-rank-80/size_ratio": 1.2}, False),
        ({"variants/d-rank-80/size_ratio": "0.8"}, False),
        ({"variants/..": {"preset": "dense", "spectrum": "input", "size_ratio": 1.0}}, False),
        ({"presets/d-rank/beta": 1.0}, False),
        ({"presets/d-rank/allocation": "efective_rank"}, False),
        ({"presets/d-rank/storage": None}, False),
        ({"spectrum/kfac/cuts": [0.0, 1.0]}, False),
        ({"sampling/calibration_seeds": []}, False),
        ({"sampling/window_length": 1}, False),
        ({"covariance/offload": "some"}, False),
        ({"covariance/targets": "re:.*"}, False),
        ({"evaluation/processes": 1.5}, False),
        ({"model/source": "SmolLM2"}, False),
        ({"model/sha256": "bcc8"}, False),
        ({"model": None}, False),
        ({"variants/d-rank-80/size_ratio": 1}, True),
        ({"presets/svd-llm/floor": 0.1, "presets/svd-llm/multiple_of": 8}, True),
        ({"sampling/calibration_seeds": [0, 1, 2]}, True),
        ({"evaluation/tasks": []}, True),
        ({"covariance/offload": None, "covariance/ignore": None}, True),
        ({"model/sha256": None}, True),
    ],
    ids=str,
)
def test_schema_and_reader_accept_and_refuse_the_same_files(validator, tmp_path, change, is_valid):
    document = changed(change)
    assert accepted(tmp_path, document) == is_valid
    assert validator.is_valid(document) == is_valid


# Pages


def blocks(page, language):
    return re.findall(rf"^```{language}\n(.*?)^```", (DOCS / f"{page}.md").read_text(), re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("page", PAGES)
def test_links_and_pictures_of_a_page_are_there(page):
    links = re.findall(r"\]\(([^)#:]+)\)", (DOCS / f"{page}.md").read_text())
    assert links
    assert [link for link in links if not (DOCS / link).exists()] == []


def test_the_map_has_a_short_line_for_every_file_and_no_other():
    lines = re.findall(r"^\* `(\S+\.py)`: (.+)$", (DOCS / "map.md").read_text(), re.MULTILINE)
    folders = ("src/drank", "stages", "experiments/tools")
    files = [
        file.relative_to(REPOSITORY).as_posix() for folder in folders for file in (REPOSITORY / folder).rglob("*.py")
    ]
    assert sorted(file for file, _ in lines) == sorted(files)
    assert [file for file, text in lines if len(text) > 100] == []


# Of the tutorial, the first block stands in the place of whole sections, and the second makes the rest fit them.
@pytest.mark.parametrize(("page", "replacing"), [("choices", 0), ("tutorial", 1)])
def test_parameters_that_a_page_says_to_write_are_read(tmp_path, page, replacing):
    document = yaml.safe_load(SHIPPED.read_text())
    first, *others = map(yaml.safe_load, blocks(page, "yaml"))
    for section, entries in first.items():
        document[section] = entries if replacing else document[section] | entries
    assert accepted(tmp_path, document) != bool(replacing)
    for block in others:
        for section, entries in block.items():
            document[section] |= entries
        assert accepted(tmp_path, document)


def test_figures_in_the_explanation_are_those_of_the_study():
    said = re.findall(r"`([a-z-]+-\d\d)`\s(\d+\.\d\d)", (DOCS / "choices.md").read_text())
    assert len({name for name, _ in said}) > 5
    for name, figure in said:
        variant, dense = (read_json(REPOSITORY / f"study/results/{n}.json") for n in (name, "dense"))
        assert f"{variant['token_perplexity/news'] / dense['token_perplexity/news']:.2f}" == figure


def test_the_page_on_allocations_names_every_key_of_one():
    page = (DOCS / "reading-an-allocation.md").read_text()
    keys = set(ALLOCATION).union(*(ALLOCATION[key] for key in ("objective", "inputs")))
    keys = keys.union(*(row for key in ("units", "blocks", "left_dense") for row in ALLOCATION.get(key, [])))
    assert len(keys) > 30
    assert [key for key in sorted(keys) if not re.search(rf"[`\".]{re.escape(key)}[`\"]", page)] == []


def test_what_the_page_shows_of_the_allocation_is_in_it():
    (unit,) = map(json.loads, blocks("reading-an-allocation", "json"))
    assert unit in ALLOCATION["units"]
    rows = re.findall(r"^\| `([\w.]+)` \| ([\d.]+) \|", (DOCS / "reading-an-allocation.md").read_text(), re.MULTILINE)
    assert len(rows) > 6
    for key, shown in rows:
        value = ALLOCATION
        for part in key.split("."):
            value = value[part]
        assert float(shown) == pytest.approx(value, abs=5e-5)


DRAWN = runpy.run_path(str(DOCS / "draw.py"))["PICTURES"]


@pytest.mark.parametrize("name", DRAWN)
def test_a_picture_is_drawn_from_what_is_committed(name):
    committed = Image.open(DOCS / f"images/{name}.png").convert("L")
    drawn = Image.open(io.BytesIO(png(DRAWN[name]()))).convert("L")
    assert committed.size == drawn.size
    # Not the bytes: another release of matplotlib may smooth an edge differently.
    difference = np.abs(np.asarray(committed, float) - np.asarray(drawn, float)).mean()
    assert difference < 0.5, "run: python docs/draw.py"
