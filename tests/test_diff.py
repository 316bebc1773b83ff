"""What differs: by hand, as properties, and over real git repositories, DVC experiments and folders anywhere."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.image import imread
from rich.console import Console

from drank.cli.diff import rendered, save
from drank.project.documents import AllocationDocument, Results, parse_document
from drank.project.files import FileError, write_json
from drank.project.params import read_params
from drank.project.tolerance import DTYPE_TOLERANCE
from drank.views.compared import DifferenceError, compare_targets
from drank.views.difference import Side, compare, heat_map
from tests import tiny


def unit(layer, kind, rank, full=4, form="factors", members=None):
    name = f"model.layers.{layer}.{'mlp' if kind in ('up_proj', 'down_proj') else 'self_attn'}.{kind}"
    return {
        "name": name, "kind": kind, "layer": layer, "rank": rank, "full_rank": full, "form": form, "factors": name,
        "out_features": 4, "in_features": 6, "members": members or [name], "price": 10, "objective_share": 0.0,
        "relative_loss": 0.0, "effective_rank": 1.0,
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


def whole(*differences):
    names = map(str, range(len(differences)))
    return {"format_version": 1, "only_a": [], "only_b": [], "variants": dict(zip(names, differences, strict=True))}


# By hand -------------------------------------------------------------------------------------------------------------


def test_parameters_that_differ_are_listed_where_both_sides_know_them():
    a = side(parameters={"x": "1", "y": "2", "z": "3"})
    found = compare(a, side(parameters={"x": "1", "y": "5", "w": "4"}))
    assert found["parameters"] == {"w": {"a": None, "b": "4"}, "y": {"a": "2", "b": "5"}, "z": {"a": "3", "b": None}}
    assert compare(a, side())["parameters"] == {}


def test_figures_have_a_change_and_a_ratio():
    a = side(results={"token_perplexity/news": 20.0, "acc/x": 0.5, "only": 1, "zero": 0, "preset": "p", "flag": True})
    b = side(results={"token_perplexity/news": 30.0, "acc/x": 0.5, "zero": 2, "preset": "q", "flag": False})
    assert compare(a, b)["figures"] == {
        "only": {"a": 1, "b": None, "change": None, "ratio": None},
        "token_perplexity/news": {"a": 20.0, "b": 30.0, "change": 10.0, "ratio": 1.5},
        "zero": {"a": 0, "b": 2, "change": 2, "ratio": None},
    }
    assert compare(a, side())["figures"] == {}


def test_metrics_of_different_types_are_remarked_with_the_tolerance():
    a, b = (side(results={"m": 1.0, "protocol": {"dtype": dtype}}) for dtype in ("float32", "bfloat16"))
    (remark,) = compare(a, b)["remarks"]
    assert remark.startswith("Measured in different types, bfloat16 and float32")
    assert f"{DTYPE_TOLERANCE:.1%}" in remark
    assert compare(a, a)["remarks"] == []


def test_ranks_forms_and_channels_that_differ_are_summed_up_by_kind_and_depth():
    a = side(
        units=[unit(n, "q_proj", 2) for n in range(6)] + [unit(n, "down_proj", 4, form="dense") for n in range(6)],
        blocks=[block(n, 6) for n in range(6)],
    )
    b = side(
        units=[unit(n, "q_proj", 2 + (n == 1) - 2 * (n == 5)) for n in range(6)]
        + [unit(n, "down_proj", 4 - n // 3, form="pivot" if n > 2 else "dense") for n in range(6)],
        blocks=[block(n, 6 - 3 * (n == 4)) for n in range(6)],
    )
    kinds = compare(a, b)["kinds"]
    assert list(kinds) == ["q_proj", "down_proj", "mlp channels"]
    q, down, channels = kinds.values()
    assert (q["n"], q["n_changed"], q["mean_a"], q["mean_b"], q["full"]) == (6, 2, 2.0, pytest.approx(11 / 6), 4)
    assert q["mean_change_by_layers"] == {"0-1": 0.5, "2-3": 0.0, "4-5": -1.0}
    assert (q["largest"]["layer"], q["largest"]["a"], q["largest"]["b"], q["largest"]["share"]) == (5, 2, 0, -0.5)
    assert (down["n_changed"], down["forms"]) == (3, {"dense to pivot": 3})
    assert (channels["n_changed"], channels["mean_b"], channels["largest"]["layer"]) == (1, 5.5, 4)


def test_a_matrix_of_the_same_rank_in_another_form_has_changed():
    found = compare(side(units=[unit(0, "q_proj", 4, form="dense")]), side(units=[unit(0, "q_proj", 4, form="pivot")]))
    assert not found["empty"]
    assert (found["kinds"]["q_proj"]["n_changed"], found["kinds"]["q_proj"]["largest"]) == (1, None)


def test_a_side_without_blocks_keeps_every_channel():
    a, b = [unit(0, "up_proj", 2), unit(1, "up_proj", 2)], [unit(0, "up_proj", 2, full=3), unit(1, "up_proj", 2)]
    units = compare(side(units=a), side(units=b, blocks=[block(0, 3), block(1, 6)]))["units"]
    assert [(units[f"model.layers.{n}.mlp"]["a"], units[f"model.layers.{n}.mlp"]["b"]) for n in (0, 1)] == [
        (6, 3),
        (6, 6),
    ]
    share = units["model.layers.0.mlp.up_proj"]["share"]
    assert share == pytest.approx(2 / 3 - 2 / 4)  # rank 2 of what 3 channels leave


def test_groups_are_compared_member_by_member():
    members = ["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"]
    pair = unit(0, "q_proj", 3, full=6, members=members)
    units = compare(side(units=[pair]), side(units=[unit(0, "q_proj", 2), unit(1, "q_proj", 4)]))["units"]
    assert [(n, u["layer"], u["a"], u["full_a"], u["b"]) for n, u in units.items()] == [
        (members[0], 0, 3, 6, 2),
        (members[1], 1, 3, 6, 4),
    ]


@pytest.mark.parametrize(
    ("layers", "expected"),
    [([3], ["3-3"]), ([0, 1], ["0-0", "1-1"]), ([2, 5], ["2-2", "3-3", "4-5"]), (range(7), ["0-1", "2-3", "4-6"])],
)
def test_layers_are_cut_into_thirds(layers, expected):
    same = side(units=[unit(layer, "q_proj", 1) for layer in layers])
    assert list(compare(same, same)["kinds"]["q_proj"]["mean_change_by_layers"]) == expected


# Properties ----------------------------------------------------------------------------------------------------------

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


@given(sides())
def test_nothing_differs_from_itself(a):
    assert compare(side(*a), side(*a))["empty"]


@given(sides(), sides())
def test_swapping_the_sides_negates_every_change_and_all_of_it_is_json(a, b):
    there, back = compare(side(*a), side(*b)), compare(side(*b), side(*a))
    assert there["parameters"] == {key: {"a": p["b"], "b": p["a"]} for key, p in back["parameters"].items()}
    assert all(f["change"] is None or f["change"] == -back["figures"][n]["change"] for n, f in there["figures"].items())
    assert {name: u["share"] for name, u in there["units"].items()} == {
        n: -u["share"] for n, u in back["units"].items()
    }
    assert (set(there["only_a"]), there["empty"]) == (set(back["only_b"]), back["empty"])
    assert json.loads(json.dumps(there, allow_nan=False)) == there


@given(sides(), sides())
def test_every_changed_matrix_is_counted_and_changes_of_the_thirds_add_up(a, b):
    found = compare(side(*a), side(*b))
    units = found["units"].values()
    changed = sum((u["a"], u["form_a"]) != (u["b"], u["form_b"]) for u in units)
    assert sum(row["n_changed"] for row in found["kinds"].values()) == changed
    for kind, row in found["kinds"].items():
        total = 0.0
        for span, mean in row["mean_change_by_layers"].items():
            first, last = map(int, span.split("-"))
            total += (mean or 0.0) * sum(u["kind"] == kind and first <= u["layer"] <= last for u in units)
        assert total == pytest.approx(row["n"] * (row["mean_b"] - row["mean_a"]))


# What is printed and drawn -------------------------------------------------------------------------------------------


def printed(*differences) -> str:
    console = Console(width=140, highlight=False, markup=False)
    with console.capture() as capture:
        for part in rendered(whole(*differences)):
            console.print(part)
    return capture.get()


def row(text, name):
    (line,) = (line for line in text.splitlines() if line.startswith(f"│ {name} "))
    return [cell.strip() for cell in line.strip("│").split("│")]


def test_the_report_is_read_by_a_person():
    a = side("old", {"variant.size_ratio": "0.8"}, [unit(n, "q_proj", 3) for n in range(3)],
             results={"token_perplexity/news": 20.0, "acc/x": 0.5, "acc_stderr/x": 0.05})  # fmt: skip
    b = side("new", {}, [unit(n, "q_proj", 3 - n, form="pivot") for n in range(3)], price=40,
             results={"token_perplexity/news": 30.0, "acc/x": 0.25, "acc_stderr/x": 0.04})  # fmt: skip
    text = printed(compare(a, b))
    assert "A  old\nB  new\n" in text
    assert row(text, "variant.size_ratio") == ["variant.size_ratio", "0.8", "–"]
    assert row(text, "price") == ["price", "50", "40", "-10", "x0.800"]
    assert row(text, "token_perplexity/news") == ["token_perplexity/news", "20.0000", "30.0000", "+10.0000", "x1.500"]
    assert row(text, "acc/x") == ["acc/x", "0.5000 ± 0.0500", "0.2500 ± 0.0400", "-0.2500", "x0.500"]
    assert "acc_stderr" not in text
    ranks = ["q_proj", "3 of 3", "4", "3.0", "2.0", "+0.0", "-1.0", "-2.0", "3 to 1, layer 2", "3 factors to pivot"]
    assert row(text, "q_proj") == ranks


def test_no_difference_is_said_and_a_long_list_is_cut():
    same = side(units=[unit(0, "q_proj", 3)])
    assert "no difference" in printed(compare(same, same))
    text = printed(compare(side(units=[unit(n, "q_proj", 3) for n in range(9)]), same)).replace("\n", " ")
    assert "no difference" not in text
    assert "only in A: model.layers.1.self_attn.q_proj, " in text
    assert "model.layers.3.self_attn.q_proj and 5 more" in text


def test_the_picture_has_a_cell_a_matrix_and_a_dot_where_a_side_alone_is_dense():
    a = side(units=[unit(0, "q_proj", 4, form="dense"), unit(1, "q_proj", 1), unit(0, "up_proj", 2)])
    b = side(units=[unit(0, "q_proj", 2), unit(1, "q_proj", 4, form="dense"), unit(0, "up_proj", 2)])
    axes = heat_map([compare(a, b)]).axes[0]
    (image,) = axes.images
    assert image.get_array().filled(9).tolist() == [[-0.5, 0.0], [0.75, 9]]
    assert image.get_clim() == (-0.75, 0.75)  # white is no change
    in_a, in_b = axes.collections
    assert (in_a.get_label(), in_a.get_offsets().tolist()) == ("dense in A only", [[0, 0]])
    assert (in_b.get_label(), in_b.get_offsets().tolist()) == ("dense in B only", [[0, 1]])


def test_the_picture_leaves_out_what_has_no_ranks_and_says_so_if_nothing_has(tmp_path):
    same, nothing = side(units=[unit(0, "q_proj", 1)]), compare(side(), side())
    save(tmp_path / "new/picture.png", whole(compare(same, same), nothing))
    assert imread(tmp_path / "new/picture.png").ndim == 3
    with pytest.raises(DifferenceError, match="none.png: not drawn: no matrix has a rank on both sides"):
        save(tmp_path / "none.png", whole(nothing))
    assert not (tmp_path / "none.png").exists()


# Files and git -------------------------------------------------------------------------------------------------------

SMALL = "svd-llm-80"


def write_variant(root, name, rank, perplexity, **header):
    found = allocation([unit(0, "q_proj", rank), unit(1, "q_proj", 2)], variant=name, **header)
    write_json(root / f"data/allocation/{name}.json", found)
    write_json(root / f"results/{name}.json", {"variant": name, "token_perplexity/news": perplexity, "bytes": 1000})


def write_params(root, change=lambda params: None):
    """Of two variants, at half the size."""
    params = yaml.safe_load(tiny.PARAMS)
    params["variants"] = {name: params["variants"][name] | {"size_ratio": 0.5} for name in (SMALL, "dense")}
    change(params)
    (root / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))


def set_ratio(ratio):
    return lambda params: params["variants"][SMALL].update(size_ratio=ratio)


def ranks(found):
    return [(unit["a"], unit["b"]) for unit in found["units"].values()]


def git(root, *arguments):
    who = {f"GIT_{role}_{what}": "x" for role in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
    done = subprocess.run(["git", *arguments], cwd=root, env=os.environ | who, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def commit(root, message):
    git(root, "add", "--all")
    git(root, "commit", "--quiet", "--message", message)


@pytest.fixture
def project(tmp_path):
    """Two commits, the first tagged `first`, with another size_ratio, rank and perplexity of SMALL."""
    root = tmp_path / "project"
    root.mkdir()
    git(root, "init", "--quiet", "--initial-branch", "main")
    write_params(root)
    write_variant(root, SMALL, 3, 20.0, preset="svd-llm")
    write_variant(root, "dense", 1, 40.0)
    commit(root, "first")
    git(root, "tag", "first")
    write_params(root, set_ratio(0.25))
    write_variant(root, SMALL, 1, 30.0, preset="svd-llm", size_ratio=0.25)
    commit(root, "second")
    return root


def compared(root, a, b, name=SMALL):
    return compare_targets(root, str(a), str(b))["variants"][name]


def test_two_variants_of_the_working_tree(project):
    found = compared(project, SMALL, "dense")
    assert found["parameters"] == {
        "preset.allocation": {"a": "uniform", "b": "dense"},
        "variant.preset": {"a": "svd-llm", "b": "dense"},
        "variant.size_ratio": {"a": "0.25", "b": "0.5"},
    }
    assert found["figures"]["token_perplexity/news"]["change"] == 10.0
    assert ranks(found) == [(1, 1), (2, 2)]
    assert found["remarks"] == []


def test_two_revisions_are_compared_variant_by_variant(project):
    variants = compare_targets(project, "HEAD~1", "main")["variants"]
    assert list(variants) == [SMALL, "dense"]
    assert variants[SMALL]["parameters"] == {"variant.size_ratio": {"a": "0.5", "b": "0.25"}}
    assert ranks(variants[SMALL]) == [(3, 1), (2, 2)]
    assert variants["dense"]["empty"]
    first = git(project, "rev-parse", "first")
    assert variants[SMALL]["a"] == f"HEAD~1 ({first[:7]}):{SMALL}"
    assert compared(project, first, "HEAD")["a"] == f"{first[:7]}:{SMALL}"


@pytest.mark.parametrize(("a", "b"), [("first", SMALL), (f"first:{SMALL}", "HEAD"), (f"first:{SMALL}", SMALL)])
def test_a_revision_and_a_variant(project, a, b):
    assert ranks(compared(project, a, b)) == [(3, 1), (2, 2)]


def test_the_working_tree_is_read_as_it_is_and_never_checked_out(project):
    write_variant(project, SMALL, 4, 30.0, preset="svd-llm", size_ratio=0.25)
    before = git(project, "status", "--porcelain"), git(project, "rev-parse", "HEAD")
    assert ranks(compared(project, "HEAD", SMALL)) == [(1, 4), (2, 2)]
    assert (git(project, "status", "--porcelain"), git(project, "rev-parse", "HEAD")) == before


def test_a_project_below_the_top_of_its_repository(project):
    (project / "study").mkdir()
    write_params(project / "study")
    write_variant(project / "study", SMALL, 2, 21.0, preset="svd-llm")
    commit(project, "study")
    assert compared(project / "study", f"HEAD:{SMALL}", SMALL)["empty"]
    with pytest.raises(DifferenceError, match="first .*: has no params.yaml at the place of .*study; was it elsewhere"):
        compare_targets(project / "study", "first", "HEAD")


def test_variants_and_results_that_one_side_lacks_are_named(project):
    write_params(project, lambda params: params["variants"].update(new=params["variants"].pop("dense")))
    (project / f"results/{SMALL}.json").unlink()
    commit(project, "third")
    found = compare_targets(project, "first", "HEAD")
    assert (list(found["variants"]), found["only_a"], found["only_b"]) == ([SMALL], ["dense"], ["new"])
    assert found["variants"][SMALL]["remarks"][0].endswith(
        f":{SMALL}: no results/{SMALL}.json, so no metrics to compare"
    )
    assert ranks(found["variants"][SMALL]) == [(3, 1), (2, 2)]


def test_parameters_that_an_allocation_was_not_made_with_are_remarked(project):
    write_params(project, set_ratio(0.9))
    (remark,) = compared(project, SMALL, f"HEAD:{SMALL}")["remarks"]
    assert remark == f"{SMALL}: variant.size_ratio is 0.9, but its allocation was made with 0.25; run `dvc repro`"


def test_the_parameters_of_another_version_are_left_to_dvc_and_the_rest_is_compared(project):
    write_params(project, lambda params: params["sampling"].update(forgotten_key=1))
    commit(project, "an old schema")
    found = compared(project, f"HEAD:{SMALL}", f"first:{SMALL}")
    assert found["parameters"] == {}
    assert "params.yaml is not of this version of drank" in found["remarks"][0]
    assert ranks(found) == [(1, 3), (2, 2)]


def test_an_experiment_of_dvc_is_a_revision(tmp_path):
    root = tmp_path / "project"
    root.mkdir()
    git(root, "init", "--quiet")
    write_params(root)
    write_variant(root, "dense", 3, 20.0)
    program = (
        "import json, yaml\n"
        "share = yaml.safe_load(open('params.yaml'))['variants']['dense']['size_ratio']\n"
        "path = 'data/allocation/dense.json'\n"
        "found = json.load(open('source.json'))\n"
        "found['size_ratio'], found['units'][0]['rank'] = share, int(share * 4)\n"
        "json.dump(found, open(path, 'w'))\n"
    )
    (root / "step.py").write_text(program)
    shutil.copy(root / "data/allocation/dense.json", root / "source.json")
    (root / "data/allocation/dense.json").unlink()
    stage = {
        "cmd": f"{sys.executable} step.py",
        "deps": ["step.py", "source.json"],
        "params": ["variants.dense"],
        "outs": [{"data/allocation/dense.json": {"cache": False}}],
    }
    (root / "dvc.yaml").write_text(yaml.safe_dump({"stages": {"allocation": stage}}))

    def dvc(*arguments):
        environment = os.environ | {"DVC_NO_ANALYTICS": "1"}
        command = [sys.executable, "-m", "dvc", *arguments]
        done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr

    git(root, "config", "user.name", "x")
    git(root, "config", "user.email", "x")
    dvc("init", "--quiet")
    dvc("repro", "--quiet")
    commit(root, "base")
    dvc("exp", "run", "--quiet", "--temp", "--name", "larger", "-S", "variants.dense.size_ratio=0.75")
    found = compare_targets(root, "HEAD", "larger")["variants"]["dense"]
    assert found["parameters"] == {"variant.size_ratio": {"a": "0.5", "b": "0.75"}}
    assert ranks(found) == [(2, 3), (2, 2)]
    commit_of_another = git(root, "commit-tree", "HEAD^{tree}", "-m", "another")
    git(root, "update-ref", f"refs/exps/{commit_of_another[:2]}/{commit_of_another[2:]}/larger", commit_of_another)
    with pytest.raises(
        DifferenceError, match="'larger' names 2 experiments: refs/exps/.*/larger, .*write one of these"
    ):
        compare_targets(root, "HEAD", "larger")


def write_model(folder, source, **files):
    folder.mkdir(parents=True)
    shutil.copy(source, folder / "allocation.json")
    for name, value in files.items():
        write_json(folder / f"{name}.json", value)


def test_the_folder_of_a_model_anywhere_knows_its_ranks(project, tmp_path, monkeypatch):
    write_model(tmp_path / "far/away", project / f"data/allocation/{SMALL}.json")
    monkeypatch.chdir(tmp_path)
    assert compared(Path(), "far/away", "far/away")["empty"]
    found = compared(project, "far/away", "first")
    assert ranks(found) == [(1, 3), (2, 2)]
    assert found["remarks"] == ["far/away: no provenance.json, so neither parameters nor metrics to compare"]


def test_a_folder_with_provenance_has_every_parameter_and_its_results(project, tmp_path):
    parameters = read_params(project / "params.yaml").parameters_of(SMALL)
    parameters["sampling"]["seed"] = 7
    results = {"token_perplexity/news": 33.0, "bytes": 1000}
    statement = {
        "_type": "https://in-toto.io/Statement/v1", "predicateType": "https://slsa.dev/provenance/v1", "subject": [],
        "predicate": {
            "buildDefinition": {"buildType": "", "externalParameters": parameters, "resolvedDependencies": []},
            "runDetails": {
                "builder": {"id": "", "version": {}},
                "byproducts": [{"name": f"results/{SMALL}.json", "annotations": results}],
            },
        },
    }  # fmt: skip
    write_model(tmp_path / "model", project / f"data/allocation/{SMALL}.json", provenance=statement)
    found = compared(project, tmp_path / "model", "HEAD")
    assert found["parameters"] == {"sampling.seed": {"a": "7", "b": "0"}}
    assert found["figures"]["token_perplexity/news"]["change"] == -3.0
    assert found["remarks"] == []


def test_a_folder_goes_before_a_variant_and_a_variant_before_a_revision(project, monkeypatch):
    git(project, "branch", SMALL, "first")
    git(project, "branch", "feature/x", "first")
    assert compared(project, f"feature/x:{SMALL}", f"first:{SMALL}")["empty"]
    monkeypatch.chdir(project)
    assert ranks(compared(Path(), SMALL, "dense"))[0] == (1, 1)  # the variant; the branch has 3
    write_model(project / SMALL, project / "data/allocation/dense.json")
    assert compared(Path(), SMALL, "dense", "dense")["remarks"][0].startswith(f"{SMALL}: no provenance.json")


def damage(path, text):
    return lambda root: (root / path).write_text(text)


@pytest.mark.parametrize(
    ("names", "change", "error", "message"),
    [
        (("smal", "dense"), None, DifferenceError,
         "'smal' is nothing that can be compared:\n  no folder of a model: no smal/allocation.json\n"
         "  no variant: .*params.yaml has svd-llm-80, dense\n  no git revision and no experiment"),
        (("FOLDER", "dense"), None, DifferenceError, "no folder of a model: no .*project/allocation.json"),
        (("first:smal", "dense"), None, DifferenceError, "no variant 'smal' to compare: first .* has svd-llm-80"),
        (("never:dense", "dense"), None, DifferenceError, "no git revision and no experiment"),
        (("first", "HEAD"), lambda root: write_params(root, lambda p: p.update(variants={"new": {}})),
         DifferenceError, "no variant in common: first .* has svd-llm-80, dense, HEAD .* has new; name one of each"),
        ((SMALL, "dense"), damage("data/allocation/dense.json", "{"), FileError, "dense.json: the document"),
        ((SMALL, "dense"), damage("data/allocation/dense.json", "[]"), FileError, "dense.json: the document"),
        (("first:dense", "HEAD:dense"), damage("results/dense.json", "{"), FileError, "HEAD .*: results/dense.json: "),
        ((SMALL, "dense"), damage("params.yaml", "a: ["), DifferenceError, "params.yaml: not YAML"),
        ((SMALL, "dense"), damage("params.yaml", "a: 1"), DifferenceError, "params.yaml: has no section 'variants'"),
        (("HEAD", "first"), lambda root: (root / "params.yaml").unlink(), DifferenceError, "has no params.yaml"),
        (("FOLDER", "dense"), damage("allocation.json", "{}"), FileError, "allocation.json: format_version: "),
    ],
)  # fmt: skip
def test_what_cannot_be_compared_ends_in_one_message(project, names, change, error, message):
    if change:
        change(project)
        commit(project, "change")
    with pytest.raises(error, match=message):
        compare_targets(project, *(str(project) if name == "FOLDER" else name for name in names))


def test_outside_of_a_repository_that_is_said(tmp_path):
    with pytest.raises(DifferenceError, match="no variant: .*params.yaml has none.*\n.*in no git repository"):
        compare_targets(tmp_path, "HEAD", "HEAD")


# The command ---------------------------------------------------------------------------------------------------------


def command(root, *arguments):
    program = [str(Path(sys.executable).parent / "drank"), "diff", *arguments]
    return subprocess.run(program, cwd=root, capture_output=True, text=True)


def test_the_command_prints_draws_and_ends_well(project):
    done = command(project, f"first:{SMALL}", SMALL, "--picture", "diff.png")
    assert (done.returncode, done.stderr) == (0, "")
    assert row(done.stdout, "token_perplexity/news")[1:3] == ["20.0000", "30.0000"]
    assert (project / "diff.png").read_bytes().startswith(b"\x89PNG")


def test_the_json_is_stable(project):
    first, again = (command(project, "first", "HEAD", "--json").stdout for _ in range(2))
    assert first == again
    assert first == json.dumps(json.loads(first), indent=2, sort_keys=True, ensure_ascii=False) + "\n"


def test_an_error_is_a_message_and_status_1(project):
    done = command(project, "nothing", "dense")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: 'nothing' is nothing that can be compared:\n")
