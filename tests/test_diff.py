"""Differences: by hand, as properties, and over real git repositories, DVC experiments and folders anywhere."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from drank.cli.diff import rendered
from drank.project.documents import AllocationDocument, Results, parse_document
from drank.project.files import FileError, write_json
from drank.project.params import read_params
from drank.project.tolerance import DTYPE_TOLERANCE
from drank.steps import release
from drank.views.compared import compare_targets
from drank.views.difference import DifferenceError, Side, compare, heat_map
from tests import tiny
from tests.conftest import run


def unit(layer, kind, rank, full=4, form="factors", members=None):
    mlp = kind in ("up_proj", "down_proj")
    name = f"model.layers.{layer}.{'mlp' if mlp else 'self_attn'}.{kind}"
    return {
        "name": name, "kind": kind, "role": kind.partition("_")[0] if mlp else "query", "layer": layer, "rank": rank,
        "full_rank": full, "form": form, "factors": name, "out_features": 4, "in_features": 6,
        "members": members or [name], "price": 10, "objective_share": 0.0, "relative_loss": 0.0, "effective_rank": 1.0,
    }  # fmt: skip


def block(layer, channels, full=6):
    return {"name": f"model.layers.{layer}.mlp", "channels": channels, "full_channels": full, "loss": 0.0}


def allocation(units, blocks=(), **header):
    return {
        "format_version": 1, "variant": "v", "preset": "dense", "spectrum": "input", "size_ratio": 0.5,
        "allocation": "uniform", "storage": "factors", "kept_ratio": 0.5, "price": 50, "targeted_parameters": 100,
        "budget": 50, "slack": 0, "objective": {"value": 0.0, "bound": 0.0, "gap": 0.0}, "inputs": {},
        "units": units, "blocks": list(blocks), **header,
    }  # fmt: skip


def side(label="a", parameters=None, units=(), blocks=(), results=None, **header):
    text = json.dumps(allocation(list(units), blocks, **header))
    found = parse_document(text, "allocation.json", AllocationDocument) if units else None
    figures = None if results is None else parse_document(json.dumps(results), "results", Results)
    return Side(label, parameters, found, figures)


def test_parameters_and_figures_that_differ_are_listed_where_both_sides_know_them():
    a = side(parameters={"x": "1", "y": {"z": "2"}, "v": "3"},
             results={"token_perplexity/news": 20.0, "acc/x": 0.5, "only": 1, "zero": 0, "preset": "p", "flag": True,
                      "protocol": {"dtype": "float32"}})  # fmt: skip
    b = side(parameters={"x": "1", "y": {"z": "5"}, "w": "4"},
             results={"token_perplexity/news": 30.0, "acc/x": 0.5, "zero": 2, "preset": "q", "flag": False,
                      "protocol": {"dtype": "bfloat16"}})  # fmt: skip
    found, unknown = compare(a, b), compare(a, side())
    assert found["parameters"] == {"v": {"a": "3", "b": None}, "w": {"a": None, "b": "4"}, "y.z": {"a": "2", "b": "5"}}
    assert found["figures"] == {
        "only": {"a": 1, "b": None, "change": None, "ratio": None},
        "token_perplexity/news": {"a": 20.0, "b": 30.0, "change": 10.0, "ratio": 1.5},
        "zero": {"a": 0, "b": 2, "change": 2, "ratio": None},
    }
    assert found["remarks"][-1].startswith("Measured in different types, bfloat16 and float32")
    assert f"{DTYPE_TOLERANCE:.1%}" in found["remarks"][-1]
    assert (unknown["parameters"], unknown["figures"]) == ({}, {})


def test_ranks_forms_and_channels_that_differ_are_summed_up_by_kind():
    a = side(
        units=[unit(n, "q_proj", 2) for n in range(6)] + [unit(n, "down_proj", 4, form="dense") for n in range(6)],
        blocks=[block(n, 6) for n in range(6)],
    )
    b = side(
        units=[unit(n, "q_proj", 2 + (n == 1) - 2 * (n == 5)) for n in range(6)]
        + [unit(n, "down_proj", 4, form="pivot" if n > 2 else "dense") for n in range(6)],
        blocks=[block(n, 6 - 3 * (n == 4)) for n in range(6)],
    )
    found = compare(a, b)
    assert found["units"]["model.layers.5.self_attn.q_proj"] == {
        "kind": "q_proj", "layer": 5, "a": 2, "b": 0, "full_a": 4, "full_b": 4, "form_a": "factors",
        "form_b": "factors", "share": -0.5,
    }  # fmt: skip
    keys = ["n", "n_changed", "full", "mean_a", "mean_b", "least_change", "greatest_change", "forms"]
    assert {kind: list(row.values()) for kind, row in found["kinds"].items()} == {
        "q_proj": [6, 2, 4, 2.0, pytest.approx(11 / 6), -2, 1, ""],
        "down_proj": [6, 3, 4, 4.0, 4.0, 0, 0, "dense to pivot"],
        "channels": [6, 1, 6, 6.0, 5.5, -3, 0, ""],
    }
    assert list(found["kinds"]["q_proj"]) == keys


def test_a_side_without_blocks_keeps_every_channel_and_groups_are_compared_member_by_member():
    a, b = [unit(0, "up_proj", 2), unit(1, "up_proj", 2)], [unit(0, "up_proj", 2, full=3), unit(1, "up_proj", 2)]
    units = compare(side(units=a), side(units=b, blocks=[block(0, 3), block(1, 6)]))["units"]
    mlps = [units[f"model.layers.{n}.mlp"] for n in (0, 1)]
    assert [(row["a"], row["b"]) for row in mlps] == [(6, 3), (6, 6)]
    assert units["model.layers.0.mlp.up_proj"]["share"] == pytest.approx(2 / 3 - 2 / 4)  # of what 3 channels leave
    members = ["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"]
    pair = unit(0, "q_proj", 3, full=6, members=members)
    units = compare(side(units=[pair]), side(units=[unit(0, "q_proj", 2), unit(1, "q_proj", 4)]))["units"]
    found = [(name, row["layer"], row["a"], row["full_a"], row["b"]) for name, row in units.items()]
    assert found == [(members[0], 0, 3, 6, 2), (members[1], 1, 3, 6, 4)]


FORMS = st.sampled_from(["dense", "factors", "pivot"])
RANKS = st.lists(st.tuples(st.integers(1, 4), FORMS), min_size=8, max_size=8)
NUMBERS = st.dictionaries(st.sampled_from(["m", "n", "bytes"]), st.integers(-9, 9) | st.floats(-9, 9))


@st.composite
def sides(draw):
    """Arguments of a side, which is made in the test: type checks of ours draw random numbers, hypothesis minds."""
    places = [(layer, kind) for layer in range(4) for kind in ("q_proj", "up_proj")]
    units = [unit(*place, rank, form=form) for place, (rank, form) in zip(places, draw(RANKS), strict=True)]
    present = draw(st.sets(st.integers(0, 7)))
    blocks = [block(layer, n) for layer, n in enumerate(draw(st.lists(st.integers(1, 6), max_size=4)))]
    texts = draw(st.none() | st.dictionaries(st.sampled_from("abcd"), st.sampled_from("xyz")))
    return ("a", texts, [units[n] for n in sorted(present)], blocks, draw(st.none() | NUMBERS))


@settings(max_examples=15)
@given(sides(), sides())
def test_swapping_the_sides_negates_every_change_and_all_of_it_is_json(a, b):
    assert compare(side(*a), side(*a))["empty"]
    there, back = compare(side(*a), side(*b)), compare(side(*b), side(*a))
    assert there["parameters"] == {key: {"a": p["b"], "b": p["a"]} for key, p in back["parameters"].items()}
    assert all(f["change"] is None or f["change"] == -back["figures"][n]["change"] for n, f in there["figures"].items())
    shares = {name: -row["share"] for name, row in back["units"].items()}
    assert {name: row["share"] for name, row in there["units"].items()} == shares
    assert (set(there["only_a"]), there["empty"]) == (set(back["only_b"]), back["empty"])
    changed = sum((row["a"], row["form_a"]) != (row["b"], row["form_b"]) for row in there["units"].values())
    assert sum(row["n_changed"] for row in there["kinds"].values()) == changed
    assert json.loads(json.dumps(there, allow_nan=False)) == there


def row(text, name):
    (line,) = (line for line in text.splitlines() if line.startswith(f"│ {name} "))
    return [cell.strip() for cell in line.strip("│").split("│")][1:]


def test_the_report_is_read_by_a_person():
    a = side("old", {"size_ratio": "0.8"}, [unit(n, "q_proj", 3) for n in range(9)],
             results={"token_perplexity/news": 20.0, "bytes": 12345})  # fmt: skip
    b = side("new", {}, [unit(n, "q_proj", 3 - n, form="pivot") for n in range(3)], price=40,
             results={"token_perplexity/news": 30.0, "bytes": 12345})  # fmt: skip
    found = compare(a, b)
    console = Console(width=140, highlight=False, markup=False)
    with console.capture() as capture:
        for part in rendered({"only_a": ["v"], "only_b": [], "variants": {"x": found}}):
            console.print(part)
    text = capture.get()
    assert text.startswith("only in A: v\nA  old\nB  new\n")
    assert row(text, "size_ratio") == ["0.8", "–"]
    assert row(text, "price") == ["50", "40", "-10", "0.8"]
    assert row(text, "token_perplexity/news") == ["20", "30", "10", "1.5"]
    assert row(text, "q_proj") == ["3", "3", "4", "3", "2", "-2", "0", "factors to pivot"]
    assert "model.layers.5.self_attn.q_proj and 3 more" in text.replace("\n", " ")
    assert "no difference" not in text


def test_the_picture_has_a_cell_per_matrix_and_needs_ranks_on_both_sides():
    a = side(units=[unit(0, "q_proj", 4, form="dense"), unit(1, "q_proj", 1), unit(0, "up_proj", 2)])
    b = side("b", units=[unit(0, "q_proj", 2), unit(1, "q_proj", 4, form="dense"), unit(0, "up_proj", 2)])
    nothing = compare(side(), side())
    (image,) = heat_map([compare(a, b), nothing]).axes[0].images
    assert np.ma.filled(image.get_array(), 9).tolist() == [[-0.5, 0.0], [0.75, 9]]
    assert image.get_clim() == (-0.75, 0.75)  # white is no change
    with pytest.raises(DifferenceError, match="not drawn: no matrix has a rank on both sides"):
        heat_map([nothing])


# Files and git

SMALL = "svd-llm-80"


def write_variant(root, name, rank, perplexity, **header):
    found = allocation([unit(0, "q_proj", rank), unit(1, "q_proj", 2)], variant=name, **header)
    write_json(root / f"data/allocation/{name}.json", found)
    write_json(root / f"results/{name}.json", {"variant": name, "token_perplexity/news": perplexity, "bytes": 1000})


def write_params(root, change=lambda params: None):
    """Parameters of two variants, at half the size."""
    params = yaml.safe_load(tiny.PARAMS)
    params["variants"] = {name: params["variants"][name] | {"size_ratio": 0.5} for name in (SMALL, "dense")}
    change(params)
    (root / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))


def ranks(found):
    return [(unit["a"], unit["b"]) for unit in found["units"].values()]


def git(root, *arguments):
    return run(root, "git", "-c", "user.name=x", "-c", "user.email=x@example.org", *arguments).stdout.strip()


def commit(root, message):
    git(root, "add", "--all")
    git(root, "commit", "--quiet", "--message", message)


@pytest.fixture(scope="module")
def committed(tmp_path_factory):
    """Two commits, the first tagged `first`, with another size_ratio, rank and perplexity of SMALL."""
    root = tmp_path_factory.mktemp("committed")
    git(root, "init", "--quiet", "--initial-branch", "main")
    write_params(root)
    write_variant(root, SMALL, 3, 20.0, preset="svd-llm")
    write_variant(root, "dense", 1, 40.0)
    commit(root, "first")
    git(root, "tag", "first")
    write_params(root, lambda params: params["variants"][SMALL].update(size_ratio=0.25))
    write_variant(root, SMALL, 1, 30.0, preset="svd-llm", size_ratio=0.25)
    commit(root, "second")
    return root


@pytest.fixture
def project(committed, tmp_path):
    return Path(shutil.copytree(committed, tmp_path / "project"))


def compared(root, a, b, name=SMALL):
    return compare_targets(root, str(a), str(b))["variants"][name]


def test_variants_and_revisions(project):
    found = compared(project, SMALL, "dense")
    assert found["parameters"] == {
        "preset.allocation": {"a": "uniform", "b": "dense"},
        "variant.preset": {"a": "svd-llm", "b": "dense"},
        "variant.size_ratio": {"a": "0.25", "b": "0.5"},
    }
    assert found["figures"]["token_perplexity/news"]["change"] == 10.0
    assert (ranks(found), found["remarks"]) == ([(1, 1), (2, 2)], [])
    both = compare_targets(project, "HEAD~1", "main")["variants"]
    assert list(both) == [SMALL, "dense"]
    assert both[SMALL]["parameters"] == {"variant.size_ratio": {"a": "0.5", "b": "0.25"}}
    assert both[SMALL]["a"] == f"HEAD~1 ({git(project, 'rev-parse', 'first')[:7]}):{SMALL}"
    assert both["dense"]["empty"]
    assert ranks(compared(project, "first", SMALL)) == ranks(both[SMALL]) == [(3, 1), (2, 2)]


def test_a_project_below_the_top_of_its_repository(project):
    (project / "study").mkdir()
    write_params(project / "study")
    write_variant(project / "study", SMALL, 2, 21.0, preset="svd-llm")
    commit(project, "study")
    assert compared(project / "study", "HEAD", SMALL)["empty"]
    with pytest.raises(DifferenceError, match="no variant in common: first has none; HEAD has svd-llm-80, dense"):
        compare_targets(project / "study", "first", "HEAD")


def test_variants_and_results_that_one_side_lacks_are_named(project):
    write_params(project, lambda params: params["variants"].update(new=params["variants"].pop("dense")))
    (project / f"results/{SMALL}.json").unlink()
    commit(project, "third")
    found = compare_targets(project, "first", "HEAD")
    assert (list(found["variants"]), found["only_a"], found["only_b"]) == ([SMALL], ["dense"], ["new"])
    assert found["variants"][SMALL]["remarks"][0].endswith(f":{SMALL}: no metrics there, so none compared")
    assert ranks(found["variants"][SMALL]) == [(3, 1), (2, 2)]


def test_parameters_that_an_allocation_was_not_made_with_and_those_of_another_version_are_remarked(project):
    write_params(project, lambda params: params["variants"][SMALL].update(size_ratio=0.9))
    (remark,) = compared(project, SMALL, "HEAD")["remarks"]
    assert remark == f"{SMALL}: size_ratio is 0.9, but its allocation was made with 0.25; run `dvc repro`"
    write_params(project, lambda params: params["sampling"].update(forgotten_key=1))
    found = compared(project, SMALL, "first")
    assert found["parameters"] == {}
    assert found["remarks"] == [f"{SMALL}: no parameters (of this version) there, so none compared"]
    assert ranks(found) == [(1, 3), (2, 2)]


def test_an_experiment_of_dvc_is_a_revision(project):
    """DVC keeps one at refs/exps/<2 digits>/<38 digits>/<name>, after the commit that it began at."""
    started, made = (git(project, "rev-parse", revision) for revision in ("HEAD", "first"))
    git(project, "update-ref", f"refs/exps/{started[:2]}/{started[2:]}/larger", made)
    assert ranks(compared(project, "HEAD", "larger")) == [(1, 3), (2, 2)]


def write_model(folder, source):
    folder.mkdir(parents=True)
    shutil.copy(source, folder / "allocation.json")


def test_the_folder_of_a_model_anywhere_knows_its_ranks_and_with_provenance_parameters_and_results(project, tmp_path):
    write_model(tmp_path / "far/away", project / f"data/allocation/{SMALL}.json")
    found = compared(project, tmp_path / "far/away", "first")
    assert ranks(found) == [(1, 3), (2, 2)]
    unknown = ("no parameters (of this version)", "no metrics")
    assert found["remarks"] == [f"{tmp_path}/far/away: {part} there, so none compared" for part in unknown]
    parameters = read_params(project / "params.yaml").parameters_of(SMALL)
    parameters["sampling"]["seed"] = 7
    results = {"token_perplexity/news": 33.0, "bytes": 1000}
    made = allocation([], computed_in={})
    statement = release.statement(parameters, {}, {}, made, results | {"protocol": {"dtype": "float32"}}, {})
    write_model(tmp_path / "model", project / f"data/allocation/{SMALL}.json")
    write_json(tmp_path / "model/provenance.json", statement)
    found = compared(project, tmp_path / "model", "HEAD")
    assert found["parameters"] == {"sampling.seed": {"a": "7", "b": "0"}}
    assert found["figures"]["token_perplexity/news"]["change"] == -3.0
    assert found["remarks"] == []


def test_a_folder_goes_before_a_variant_and_a_variant_before_a_revision(project, monkeypatch):
    git(project, "branch", SMALL, "first")
    git(project, "branch", "feature/x", "first")
    assert compared(project, "feature/x", "first")["empty"]
    monkeypatch.chdir(project)
    assert ranks(compared(Path(), SMALL, "dense"))[0] == (1, 1)  # the variant; the branch has 3
    write_model(project / SMALL, project / "data/allocation/dense.json")
    assert compared(Path(), SMALL, "dense", "dense")["remarks"][0].startswith(f"{SMALL}: no parameters")


def damage(path, text):
    return lambda root: (root / path).write_text(text)


@pytest.mark.parametrize(
    ("names", "change", "error", "message"),
    [
        (("smal", "dense"), None, DifferenceError,
         "'smal' is nothing that can be compared:\n  no folder of a model: no smal/allocation.json\n"
         "  no variant: .*params.yaml has svd-llm-80, dense\n  no git revision and no experiment"),
        (("first", "HEAD"), lambda root: write_params(root, lambda p: p.update(variants={"new": {}})),
         DifferenceError, "no variant in common: first has svd-llm-80, dense; HEAD has new"),
        (("first", "HEAD"), lambda root: (root / "params.yaml").unlink(), DifferenceError, "HEAD has none"),
        ((SMALL, "dense"), damage("data/allocation/dense.json", "{"), FileError, "dense.json: the document"),
        (("first", "HEAD"), damage("results/dense.json", "{"), FileError, "HEAD .*: results/dense.json: "),
        ((SMALL, "dense"), damage("params.yaml", "a: 1"), DifferenceError, "params.yaml: not YAML with a section"),
        (("FOLDER", "dense"), damage("allocation.json", "{}"), FileError, "allocation.json: format_version: "),
    ],
)  # fmt: skip
def test_what_cannot_be_compared_ends_in_one_message(project, names, change, error, message):
    if change:
        change(project)
        commit(project, "change")
    with pytest.raises(error, match=message):
        compare_targets(project, *(str(project) if name == "FOLDER" else name for name in names))


def test_a_shallow_clone_cannot_say_what_was_before_it(project, tmp_path):
    git(project, "clone", "--quiet", "--depth", "1", f"file://{project}", str(tmp_path / "shallow"))
    with pytest.raises(DifferenceError, match="is a shallow clone.*`git fetch --unshallow`"):
        compare_targets(tmp_path / "shallow", "HEAD~1", "HEAD")


def test_the_command_prints_draws_and_ends_well(project, tmp_path):
    done = run(project, "drank", "diff", "first", SMALL, "--picture", "diff.png")
    assert row(done.stdout, "token_perplexity/news")[:2] == ["20", "30"]
    assert (project / "diff.png").read_bytes().startswith(b"\x89PNG")
    first, again = (run(project, "drank", "diff", "first", "HEAD", "--json").stdout for _ in range(2))
    assert first == again == json.dumps(json.loads(first), indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    done = run(project, "drank", "diff", "nothing", "dense", check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: 'nothing' is nothing that can be compared:\n")
    with pytest.raises(DifferenceError, match="no variant: .*params.yaml has none.*\n.*no git revision"):
        compare_targets(tmp_path, "HEAD", "HEAD")
