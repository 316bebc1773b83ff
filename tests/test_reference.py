"""Pages on params.yaml, the five choices and an allocation say what the code and the results say."""

import io
import json
import re
import runpy
from contextlib import nullcontext

import numpy as np
import pytest
import yaml
from experiments.tools.reference import markdown
from PIL import Image
from typer.testing import CliRunner

from drank.cli import commands
from drank.cli.params import json_schema
from drank.project.files import read_json
from drank.project.params import Params, ParamsError
from drank.views.pictures import png
from tests.conftest import REPOSITORY

DOCS = REPOSITORY / "docs"
SHIPPED = REPOSITORY / "params.yaml"
PAGES = ("map", "precision", "params", "choices", "reading-an-allocation", "tutorial")
ALLOCATION = read_json(REPOSITORY / "data/allocation/kfac-80.json")


def test_the_committed_reference_is_what_the_types_give():
    schema = CliRunner().invoke(commands, ["params"]).output
    assert (DOCS / "params.schema.json").read_text() == schema, "run: drank params > docs/params.schema.json"
    assert (DOCS / "params.md").read_text() == markdown(), "run: python -m experiments.tools.reference > docs/params.md"


def test_the_comments_of_params_yaml_know_every_answer_that_the_schema_knows():
    comments = "\n".join(line.partition("#")[2] for line in SHIPPED.read_text().splitlines())
    asked = {"Covariance": ["fisher"], "Spectrum": ["metric", "units"], "Preset": ["allocation", "storage", "scores"]}
    for section, keys in asked.items():
        for entry in (json_schema()["$defs"][section]["properties"][key] for key in keys):
            answers = entry.get("enum") or entry["anyOf"][0]["enum"]
            assert [answer for answer in answers if not re.search(rf"\b{answer}\b", comments)] == []


def test_editors_find_the_schema():
    schema = re.fullmatch(r"# yaml-language-server: \$schema=(\S+)", SHIPPED.read_text().splitlines()[0])
    assert (REPOSITORY / schema[1]).samefile(DOCS / "params.schema.json")


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
    folders = ("src", "stages", "experiments/tools")
    files = [
        file.relative_to(REPOSITORY).as_posix() for folder in folders for file in (REPOSITORY / folder).rglob("*.py")
    ]
    assert sorted(file for file, _ in lines) == sorted(files)
    assert [file for file, text in lines if len(text) > 100] == []


# The tutorial's first block stands in the place of whole sections, and the second makes the rest fit them.
@pytest.mark.parametrize(("page", "replacing"), [("choices", 0), ("tutorial", 1)])
def test_parameters_that_a_page_says_to_write_are_read(page, replacing):
    document = yaml.safe_load(SHIPPED.read_text())
    for i, block in enumerate(map(yaml.safe_load, blocks(page, "yaml"))):
        for section, entries in block.items():
            document[section] = entries if replacing and i == 0 else document[section] | entries
        with pytest.raises(ParamsError) if replacing and i == 0 else nullcontext():
            Params.parse(yaml.safe_dump(document).encode(), page)


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
