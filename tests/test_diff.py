"""What differs: by hand, as properties, and over real git repositories, DVC experiments and folders anywhere."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.image import imread
from rich.console import Console

from drank.cli.diff import document, heat_map, rendered, save
from drank.project.files import FileError, write_json
from drank.project.params import read_params
from drank.project.resolved import resolved
from drank.project.tolerance import DTYPE_TOLERANCE
from drank.views.compared import Comparison, DifferenceError, compare_targets, parameters_of
from drank.views.difference import Figure, Parameter, Side, by_kind, compare, flat, layer_ranges, text_of

REPOSITORY = Path(__file__).parent.parent


def unit(layer, kind, rank, full=4, form="factors", shape=(4, 6), members=None):
    block = "mlp" if kind in ("up_proj", "down_proj") else "self_attn"
    name = f"model.layers.{layer}.{block}.{kind}"
    return {
        "name": name, "kind": kind, "layer": layer, "rank": rank, "full_rank": full, "form": form,
        "out_features": shape[0], "in_features": shape[1], "members": members or [name],
    }  # fmt: skip


def block(layer, channels, full=6):
    return {"name": f"model.layers.{layer}.mlp", "channels": channels, "full_channels": full, "loss": 0.0}


def allocation(units, blocks=(), **header):
    return {
        "variant": "v", "preset": "p", "spectrum": "s", "size_ratio": 0.5, "allocation": "uniform", "beta": None,
        "kept_ratio": 0.5, "price": 50, "targeted_parameters": 100, "units": units, "blocks": list(blocks), **header,
    }  # fmt: skip


def side(label="a", parameters=None, units=(), blocks=(), results=None, complete=True, **header):
    found = allocation(list(units), blocks, **header) if units else None
    return Side(label, parameters or {}, complete, found, results)


# By hand -------------------------------------------------------------------------------------------------------------


def test_parameters_that_differ_are_listed_and_one_that_a_side_lacks_has_no_value():
    a = side(parameters={"x": "1", "y": "2", "z": "3"})
    b = side(parameters={"x": "1", "y": "5", "w": "4"})
    expected = (Parameter("w", None, "4"), Parameter("y", "2", "5"), Parameter("z", "3", None))
    assert compare(a, b).parameters == expected


def test_of_incomplete_parameters_only_what_both_record_is_compared():
    a = side(parameters={"x": "1", "y": "2", "z": "3"})
    partial = side(parameters={"y": "5", "z": None}, complete=False)
    assert compare(a, partial).parameters == (Parameter("y", "2", "5"), Parameter("z", "3", None))
    assert compare(partial, replace(partial, parameters={"x": "9", "y": "5"})).parameters == ()


def test_the_base_model_is_compared_where_both_record_it():
    a, b = replace(side(), base_model="aa"), replace(side(), base_model="bb")
    assert compare(a, b).parameters == (Parameter("base_model_sha256", "aa", "bb"),)
    assert compare(a, side()).parameters == ()


def test_metrics_have_a_change_and_a_ratio_and_sizes_are_apart():
    a = side(
        results={"token_perplexity/news": 20.0, "acc/x": 0.5, "only": 1, "bytes": 100, "preset": "p", "flag": True}
    )
    b = side(results={"token_perplexity/news": 30.0, "acc/x": 0.5, "bytes": 80, "preset": "q", "flag": False})
    found = compare(a, b)
    assert found.metrics == (Figure("only", 1, None), Figure("token_perplexity/news", 20.0, 30.0))
    assert (found.metrics[1].change, found.metrics[1].ratio) == (10.0, 1.5)
    assert (found.metrics[0].change, found.metrics[0].ratio) == (None, None)
    assert [(f.name, f.change, f.ratio) for f in found.sizes] == [("bytes", -20, 0.8)]
    assert Figure("zero", 0, 1).ratio is None


def test_metrics_that_were_measured_differently_are_remarked():
    a = side(results={"m": 1.0, "protocol": {"test_windows": {"news": [32, 512]}}})
    b = side(results={"m": 1.0, "protocol": {"test_windows": {"news": [16, 512]}}})
    assert compare(a, b).remarks == (
        "the metrics were measured differently: test_windows.news is [32, 512] in A and [16, 512] in B",
    )


def test_metrics_of_different_types_are_remarked_with_the_tolerance():
    a, b = (side(results={"m": 1.0, "protocol": {"dtype": dtype}}) for dtype in ("float32", "bfloat16"))
    assert compare(a, b).remarks == (
        "the metrics were measured differently: dtype is float32 in A and bfloat16 in B",
        f"Measured in different types, bfloat16 and float32: a difference of less than {DTYPE_TOLERANCE:.1%} in token "
        f"perplexity may come from the type alone.",
    )
    assert compare(a, a).remarks == ()


def test_ranks_forms_and_channels_that_differ_are_summed_up_by_kind_and_depth():
    a = side(
        units=[unit(n, "q_proj", 2) for n in range(6)] + [unit(n, "down_proj", 4, form="dense") for n in range(6)],
        blocks=[block(n, 6) for n in range(6)],
    )
    b = side(
        units=[unit(n, "q_proj", 2 + (n == 1) - 2 * (n == 5), full=4) for n in range(6)]
        + [unit(n, "down_proj", 4 - n // 3, form="pivot" if n > 2 else "dense", shape=(4, 6)) for n in range(6)],
        blocks=[block(n, 6 - 3 * (n == 4)) for n in range(6)],
    )
    found = compare(a, b)
    kept = (*found.matrices, *found.blocks)
    assert layer_ranges(kept) == [range(2), range(2, 4), range(4, 6)]
    q, down, channels = by_kind(kept, layer_ranges(kept))
    assert (q.kind, q.n, q.n_changed, q.mean_a, q.full) == ("q_proj", 6, 2, 2.0, 4)
    assert q.mean_b == pytest.approx(11 / 6)
    assert q.by_depth == (0.5, 0.0, -1.0)
    assert (q.largest.layer, q.largest.a, q.largest.b, q.largest.share) == (5, 2, 0, -0.5)
    assert (down.n_changed, down.by_depth, down.forms) == (3, (0.0, -0.5, -1.0), {("dense", "pivot"): 3})
    assert (channels.kind, channels.n_changed, channels.mean_b, channels.largest.layer) == ("mlp channels", 1, 5.5, 4)


def test_a_matrix_of_the_same_rank_in_another_form_has_changed():
    found = compare(side(units=[unit(0, "q_proj", 4, form="dense")]), side(units=[unit(0, "q_proj", 4, form="pivot")]))
    (summary,) = by_kind(found.matrices, layer_ranges(found.matrices))
    assert not found.empty
    assert (summary.n_changed, summary.largest, summary.forms) == (1, None, {("dense", "pivot"): 1})


def test_a_side_without_blocks_keeps_every_channel():
    units = [unit(layer, "up_proj", 2) for layer in (0, 1)]
    cut = [unit(0, "up_proj", 2, full=3, shape=(3, 6)), unit(1, "up_proj", 2)]
    found = compare(side(units=units), side(units=cut, blocks=[block(0, 3), block(1, 6)]))
    assert [(k.name, k.a, k.b, k.full_a, k.changed) for k in found.blocks] == [
        ("model.layers.0.mlp", 6, 3, 6, True),
        ("model.layers.1.mlp", 6, 6, 6, False),
    ]
    assert found.matrices[0].share == pytest.approx(2 / 3 - 2 / 4)  # rank 2 of what 3 channels leave
    assert found.reshaped == ()


def test_groups_are_compared_member_by_member_and_that_is_said():
    members = ["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"]
    pair = unit(0, "q_proj", 3, full=6, shape=(8, 6), members=members)
    found = compare(side(units=[pair]), side(units=[unit(0, "q_proj", 2), unit(1, "q_proj", 4)]))
    assert [(k.name, k.layer, k.a, k.full_a, k.b, k.full_b) for k in found.matrices] == [
        (members[0], 0, 3, 6, 2, 4),
        (members[1], 1, 3, 6, 4, 4),
    ]
    assert found.remarks[0].startswith("2 matrices share their basis with other layers on one side")
    assert found.reshaped == ()


def test_other_models_are_not_compared_matrix_by_matrix():
    a = side(units=[unit(0, "q_proj", 2), unit(0, "k_proj", 2)], blocks=[block(0, 5)])
    b = side(units=[unit(0, "q_proj", 2, shape=(8, 8)), unit(0, "o_proj", 2)], blocks=[block(0, 7, full=8)])
    found = compare(a, b)
    assert (found.matrices, found.blocks) == ((), ())
    assert found.only_a == ("model.layers.0.self_attn.k_proj",)
    assert found.only_b == ("model.layers.0.self_attn.o_proj",)
    assert found.reshaped == ("model.layers.0.self_attn.q_proj", "model.layers.0.mlp")
    assert not found.empty


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        ([], []),
        ([3], [[3]]),
        ([0, 1], [[0], [1]]),
        ([2, 5], [[2], [3], [4, 5]]),
        (range(7), [[0, 1], [2, 3], [4, 5, 6]]),
    ],
)
def test_layers_are_cut_into_thirds(layers, expected):
    units = [unit(layer, "q_proj", 1) for layer in layers]
    kept = compare(side(units=units), side(units=units)).matrices
    assert [list(part) for part in layer_ranges(kept)] == expected


@pytest.mark.parametrize(
    ("value", "text"),
    [(1, "1"), (1.0, "1"), (1.0e-4, "0.0001"), (True, "true"), ("news", "news"), (0.1, "0.1"),
     ([0.0, 0.5], "[0, 0.5]"), ([], "[]")],
)  # fmt: skip
def test_equal_parameters_have_one_text_however_they_are_written(value, text):
    assert text_of(value) == text


def test_null_is_no_value():
    assert flat({"a": {"b": None, "c": 1}, "d": [1, 2]}) == {"a.c": "1", "d": "[1, 2]"}


# Properties ----------------------------------------------------------------------------------------------------------

KINDS = ("q_proj", "up_proj")
FORMS = st.sampled_from(["dense", "factors", "pivot"])
RANKS = st.lists(st.tuples(st.integers(1, 4), FORMS), min_size=8, max_size=8)
TEXTS = st.dictionaries(st.sampled_from("abcd"), st.sampled_from("xyz"))
NUMBERS = st.dictionaries(st.sampled_from(["m", "n", "bytes"]), st.integers(-9, 9) | st.floats(-9, 9))


@st.composite
def sides(draw):
    """Arguments of a Side, which is made in the test: type checks of ours draw random numbers, hypothesis minds."""
    units = [
        unit(layer, kind, rank, form=form)
        for (layer, kind), (rank, form) in zip([(n, k) for n in range(4) for k in KINDS], draw(RANKS), strict=True)
    ]
    present = draw(st.sets(st.integers(0, 7), min_size=1))
    channels = draw(st.lists(st.integers(1, 6), max_size=4))
    blocks = [block(layer, n) for layer, n in enumerate(channels)]
    results = draw(st.none() | NUMBERS)
    found = allocation([units[n] for n in sorted(present)], blocks)
    return {
        "label": "a", "parameters": draw(TEXTS), "complete": draw(st.booleans()), "results": results,
        "allocation": draw(st.sampled_from([found, found, None])),
    }  # fmt: skip


@given(sides())
def test_nothing_differs_from_itself(a):
    assert compare(Side(**a), Side(**a)).empty


@given(sides(), sides())
def test_swapping_the_sides_negates_every_change(a, b):
    there, back = compare(Side(**a), Side(**b)), compare(Side(**b), Side(**a))
    assert [(p.key, p.a, p.b) for p in there.parameters] == [(p.key, p.b, p.a) for p in back.parameters]
    for figures, mirrored in ((there.metrics, back.metrics), (there.sizes, back.sizes)):
        assert [(f.name, f.a, f.b) for f in figures] == [(f.name, f.b, f.a) for f in mirrored]
        assert all(f.change is None or f.change == -m.change for f, m in zip(figures, mirrored, strict=True))
    for kept, mirrored in ((there.matrices, back.matrices), (there.blocks, back.blocks)):
        assert {k.name: k.share for k in kept} == {k.name: -k.share for k in mirrored}
    assert (set(there.only_a), set(there.only_b)) == (set(back.only_b), set(back.only_a))
    assert there.empty == back.empty


@given(sides(), sides())
def test_every_changed_matrix_is_counted_and_changes_of_the_thirds_add_up(a, b):
    kept = compare(Side(**a), Side(**b)).matrices
    summaries = by_kind(kept, layer_ranges(kept))
    assert sum(row.n_changed for row in summaries) == sum(item.changed for item in kept)
    for row in summaries:
        items = [item for item in kept if item.kind == row.kind]
        counts = [sum(item.layer in depth for item in items) for depth in layer_ranges(kept)]
        total = sum(n * (mean or 0.0) for n, mean in zip(counts, row.by_depth, strict=True))
        assert total == pytest.approx(row.n * (row.mean_b - row.mean_a))


@given(sides(), sides())
def test_the_document_is_json_with_every_change(a, b):
    found = compare(Side(**a), Side(**b))
    text = json.dumps(document(Comparison({"v": found})), allow_nan=False)
    read = json.loads(text)["variants"]["v"]
    assert {row["name"]: row["b"] for row in read["matrices"]} == {k.name: k.b for k in found.matrices if k.changed}
    assert read["metrics"].keys() == {figure.name for figure in found.metrics}
    assert read["empty"] == found.empty


# What is printed and drawn -------------------------------------------------------------------------------------------


def printed(*differences) -> str:
    console = Console(width=140, highlight=False, markup=False)
    with console.capture() as capture:
        for part in rendered(Comparison({str(n): difference for n, difference in enumerate(differences)})):
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
    assert row(text, "acc/x") == ["acc/x", "0.5000 ± 0.0500", "0.2500 ± 0.0400", "-0.2500", ""]
    assert "acc_stderr" not in text
    ranks = ["q_proj", "3 of 3", "4", "3.0", "2.0", "+0.0", "-1.0", "-2.0", "3 to 1, layer 2", "3 factors to pivot"]
    assert row(text, "q_proj") == ranks


def test_no_difference_is_said():
    same = side(units=[unit(0, "q_proj", 3)])
    assert "no difference" in printed(compare(same, same))
    assert "no difference" not in printed(compare(same, side(units=[unit(0, "q_proj", 2)])))


def test_a_long_list_of_unmatched_matrices_is_cut():
    found = compare(side(units=[unit(n, "q_proj", 3) for n in range(9)]), side(units=[unit(0, "q_proj", 3)]))
    assert "only in A: model.layers.1.self_attn.q_proj, " in printed(found)
    assert "model.layers.3.self_attn.q_proj and 5 more" in printed(found).replace("\n", " ")


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
    there, nothing = (
        compare(side(units=[unit(0, "q_proj", 1)]), side(units=[unit(0, "q_proj", 1)])),
        compare(side(), side()),
    )
    save(tmp_path / "new/picture.png", Comparison({"a": there, "b": nothing}))
    assert imread(tmp_path / "new/picture.png").ndim == 3
    with pytest.raises(DifferenceError, match="none.png: not drawn: no matrix has a rank on both sides"):
        save(tmp_path / "none.png", Comparison({"b": nothing}))
    assert not (tmp_path / "none.png").exists()


# Files and git -------------------------------------------------------------------------------------------------------

PARAMS = {
    "model": {"source": "local:m"},
    "text": {"news": {"source": "local:t.txt"}},
    "sampling": {"seed": 0, "calibration_text": "news", "n_windows": 4},
    "spectrum": {"s": {"metric": "input", "units": "matrix"}, "t": {"metric": "none", "units": "matrix"}},
    "presets": {
        "p": {"spectrum": "s", "allocation": "uniform", "storage": "factors"},
        "q": {"spectrum": "t", "allocation": "uniform", "storage": "factors"},
    },
    "variants": {
        "small": {"preset": "p", "spectrum": "s", "size_ratio": 0.5},
        "other": {"preset": "q", "spectrum": "t", "size_ratio": 0.5},
    },
}


def write_variant(root, name, rank, perplexity, **header):
    found = allocation([unit(0, "q_proj", rank), unit(1, "q_proj", 2)], variant=name, storage="factors", **header)
    write_json(root / f"data/allocation/{name}.json", found)
    write_json(root / f"results/{name}.json", {"variant": name, "token_perplexity/news": perplexity, "bytes": 1000})


def write_params(root, change=lambda params: None):
    params = json.loads(json.dumps(PARAMS))
    change(params)
    (root / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))


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
    """Two commits, the first tagged `first`, with another size_ratio, rank and perplexity of `small`."""
    root = tmp_path / "project"
    root.mkdir()
    git(root, "init", "--quiet", "--initial-branch", "main")
    write_params(root)
    write_variant(root, "small", 3, 20.0, preset="p", spectrum="s")
    write_variant(root, "other", 1, 40.0, preset="q", spectrum="t")
    commit(root, "first")
    git(root, "tag", "first")
    write_params(root, lambda params: params["variants"]["small"].update(size_ratio=0.25))
    write_variant(root, "small", 1, 30.0, preset="p", spectrum="s", size_ratio=0.25)
    commit(root, "second")
    return root


def write_model(folder, source, **files):
    folder.mkdir(parents=True)
    shutil.copy(source, folder / "allocation.json")
    for name, value in files.items():
        write_json(folder / f"{name}.json", value)
    (folder / "model.safetensors").write_bytes(bytes(1000))


def test_two_variants_of_the_working_tree(project):
    found = compare_targets(project, "small", "other").differences["small"]
    assert [(p.key, p.a, p.b) for p in found.parameters] == [
        ("preset.spectrum", "s", "t"),
        ("spectrum.metric", "input", "none"),
        ("variant.preset", "p", "q"),
        ("variant.size_ratio", "0.25", "0.5"),
        ("variant.spectrum", "s", "t"),
    ]
    assert found.metrics == (Figure("token_perplexity/news", 30.0, 40.0),)
    assert [k.b - k.a for k in found.matrices] == [0, 0]
    assert found.remarks == ()


def test_two_revisions_are_compared_variant_by_variant(project):
    comparison = compare_targets(project, "HEAD~1", "main")
    assert list(comparison.differences) == ["small", "other"]
    small = comparison.differences["small"]
    assert small.parameters == (Parameter("variant.size_ratio", "0.5", "0.25"),)
    assert [(k.a, k.b) for k in small.matrices] == [(3, 1), (2, 2)]
    assert comparison.differences["other"].empty
    first = git(project, "rev-parse", "first")
    assert small.a == f"HEAD~1 ({first[:7]}):small"
    assert compare_targets(project, first, "HEAD").differences["small"].a == f"{first[:7]}:small"


@pytest.mark.parametrize(("a", "b"), [("first", "small"), ("first:small", "HEAD"), ("first:small", "small")])
def test_a_revision_and_a_variant(project, a, b):
    found = compare_targets(project, a, b).differences["small"]
    assert [(k.a, k.b) for k in found.matrices] == [(3, 1), (2, 2)]
    assert found.metrics == (Figure("token_perplexity/news", 20.0, 30.0),)


def test_the_working_tree_is_read_as_it_is_and_never_checked_out(project):
    write_variant(project, "small", 4, 30.0, preset="p", spectrum="s", size_ratio=0.25)
    before = git(project, "status", "--porcelain"), git(project, "rev-parse", "HEAD")
    found = compare_targets(project, "HEAD", "small").differences["small"]
    assert [(k.a, k.b) for k in found.matrices] == [(1, 4), (2, 2)]
    assert (git(project, "status", "--porcelain"), git(project, "rev-parse", "HEAD")) == before


def test_a_project_below_the_top_of_its_repository(project, tmp_path):
    (project / "study").mkdir()
    write_params(project / "study")
    write_variant(project / "study", "small", 2, 21.0, preset="p", spectrum="s")
    commit(project, "study")
    found = compare_targets(project / "study", "HEAD:small", "small").differences["small"]
    assert found.empty
    assert [k.a for k in found.matrices] == [2, 2]
    with pytest.raises(DifferenceError, match="first .*: has no params.yaml at the place of .*study; was it elsewhere"):
        compare_targets(project / "study", "first", "HEAD")


def test_variants_that_one_revision_lacks_are_named(project):
    write_params(project, lambda params: params["variants"].update(new=params["variants"].pop("other")))
    commit(project, "third")
    comparison = compare_targets(project, "first", "HEAD")
    assert (list(comparison.differences), comparison.only_a, comparison.only_b) == (["small"], ("other",), ("new",))


def test_results_that_a_revision_lacks_are_remarked_and_the_rest_is_compared(project):
    (project / "results/small.json").unlink()
    commit(project, "no results")
    found = compare_targets(project, "first:small", "HEAD").differences["small"]
    (remark,) = found.remarks
    assert remark.endswith(":small: no results/small.json, so no metrics to compare")
    assert found.metrics == ()
    assert [k.b - k.a for k in found.matrices] == [-2, 0]


def test_parameters_that_an_allocation_was_not_made_with_are_remarked(project):
    write_params(project, lambda params: params["variants"]["small"].update(size_ratio=0.9))
    (remark,) = compare_targets(project, "small", "HEAD:small").differences["small"].remarks
    assert remark == "small: variant.size_ratio is 0.9, but its allocation was made with 0.25; run `dvc repro`"


def test_a_revision_of_another_schema_is_compared_as_it_is_written(project):
    def old(params):
        params["sampling"]["forgotten_key"] = "1e-3"
        del params["text"], params["presets"]["p"]["storage"]

    write_params(project, old)
    commit(project, "an old schema")
    found = {
        p.key: (p.a, p.b) for p in compare_targets(project, "HEAD:small", "first:small").differences["small"].parameters
    }
    assert found["sampling.forgotten_key"] == ("0.001", None)
    assert found["text.news.source"] == (None, "local:t.txt")
    assert found["preset.storage"] == (None, "factors")
    assert "preset.floor" not in found


def test_parameters_are_those_that_the_pipeline_resolves():
    params = read_params(REPOSITORY / "params.yaml")
    written = yaml.safe_load((REPOSITORY / "params.yaml").read_text())
    for name in params.variants:
        expected = flat(resolved(params, name))
        del expected["variant.name"]
        assert parameters_of(written, name) == expected


def test_an_experiment_of_dvc_is_a_revision(tmp_path):
    root = tmp_path / "project"
    root.mkdir()
    git(root, "init", "--quiet")
    write_params(root)
    write_variant(root, "small", 3, 20.0, preset="p", spectrum="s")
    program = (
        "import json, yaml\n"
        "share = yaml.safe_load(open('params.yaml'))['variants']['small']['size_ratio']\n"
        "path = 'data/allocation/small.json'\n"
        "found = json.load(open('source.json'))\n"
        "found['size_ratio'], found['units'][0]['rank'] = share, int(share * 4)\n"
        "json.dump(found, open(path, 'w'))\n"
    )
    (root / "step.py").write_text(program)
    shutil.copy(root / "data/allocation/small.json", root / "source.json")
    (root / "data/allocation/small.json").unlink()
    stage = {
        "cmd": f"{sys.executable} step.py",
        "deps": ["step.py", "source.json"],
        "params": ["variants.small"],
        "outs": [{"data/allocation/small.json": {"cache": False}}],
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
    dvc("exp", "run", "--quiet", "--temp", "--name", "larger", "-S", "variants.small.size_ratio=0.75")
    found = compare_targets(root, "HEAD", "larger").differences["small"]
    assert found.parameters == (Parameter("variant.size_ratio", "0.5", "0.75"),)
    assert [(k.a, k.b) for k in found.matrices] == [(2, 3), (2, 2)]
    commit_of_another = git(root, "commit-tree", "HEAD^{tree}", "-m", "another")
    git(root, "update-ref", f"refs/exps/{commit_of_another[:2]}/{commit_of_another[2:]}/larger", commit_of_another)
    with pytest.raises(
        DifferenceError, match="'larger' names 2 experiments: refs/exps/.*/larger, .*write one of these"
    ):
        compare_targets(root, "HEAD", "larger")


def test_the_folder_of_a_model_anywhere_knows_what_its_allocation_records(project, tmp_path, monkeypatch):
    config = {"quantization_config": {"provenance": {"base_model_sha256": "ab"}}}
    write_model(tmp_path / "far/away", project / "data/allocation/small.json", config=config)
    outside = tmp_path / "outside"
    outside.mkdir()
    monkeypatch.chdir(outside)
    found = compare_targets(Path(), "../far/away", "../far/away").differences["small"]
    assert found.empty
    found = compare_targets(project, "../far/away", "small").differences["small"]
    assert found.empty
    assert found.remarks == (
        "../far/away: no provenance.json: of its parameters only those in allocation.json are compared",
        "../far/away: no results in provenance.json, so no metrics to compare",
    )
    found = compare_targets(project, "../far/away", "first").differences["small"]
    assert found.parameters == (Parameter("variant.size_ratio", "0.25", "0.5"),)
    assert [f for f in found.sizes if f.name == "bytes"] == [Figure("bytes", 1000, 1000)]


def test_a_folder_with_provenance_has_every_parameter_and_its_results(project, tmp_path):
    parameters = {"variant": {"name": "small", "size_ratio": 0.25, "preset": "p", "spectrum": "s"}}
    results = {"token_perplexity/news": 33.0, "bytes": 1000}
    statement = {
        "predicate": {
            "buildDefinition": {"externalParameters": parameters | {"sampling": {"seed": 7}}},
            "runDetails": {"byproducts": [{"name": "results/small.json", "annotations": results}]},
        }
    }
    write_model(tmp_path / "model", project / "data/allocation/small.json", provenance=statement)
    found = compare_targets(project, str(tmp_path / "model"), "HEAD").differences["small"]
    assert Parameter("sampling.seed", "7", "0") in found.parameters
    assert Parameter("spectrum.metric", None, "input") in found.parameters
    assert found.metrics == (Figure("token_perplexity/news", 33.0, 30.0),)
    assert found.remarks == ()


def test_a_folder_goes_before_a_variant_and_a_variant_before_a_revision(project, monkeypatch):
    git(project, "branch", "small", "first")
    monkeypatch.chdir(project)
    found = compare_targets(Path(), "small", "other").differences["small"]
    assert (found.a, found.matrices[0].a) == ("small", 1)  # the variant; the branch has 3
    write_model(project / "small", project / "data/allocation/other.json")
    found = compare_targets(Path(), "small", "other").differences["other"]
    assert found.remarks[0].startswith("small: no provenance.json")


def test_a_branch_may_have_a_separator_in_its_name(project):
    git(project, "branch", "feature/x", "first")
    assert compare_targets(project, "feature/x:small", "first:small").differences["small"].empty


@pytest.mark.parametrize(
    ("names", "change", "error", "message"),
    [
        (("smal", "small"), None, DifferenceError,
         "'smal' is nothing that can be compared:\n  no model: there is no folder smal\n"
         "  no variant: .*params.yaml has small, other\n  no git revision and no experiment: smal$"),
        (("data/models/small", "small"), None, DifferenceError, "no model: there is no folder data/models/small"),
        (("FOLDER", "small"), None, DifferenceError, "no model: the folder .*project has no allocation.json"),
        (("first:smal", "small"), None, DifferenceError, "no variant 'smal' to compare: first .* has small, other"),
        (("never:small", "small"), None, DifferenceError, "no git revision and no experiment: never"),
        (("first", "HEAD"), lambda root: write_params(root, lambda p: p.update(variants={"new": {}})),
         DifferenceError, "no variant in common: first .* has small, other, HEAD .* has new; name one of each, as fir"),
        (("small", "other"), lambda root: (root / "data/allocation/other.json").write_text("{"),
         DifferenceError, "data/allocation/other.json: damaged, not JSON"),
        (("small", "other"), lambda root: (root / "data/allocation/other.json").write_text("[]"),
         DifferenceError, "data/allocation/other.json: damaged, not an allocation: it has no list of 'units'"),
        (("first:other", "HEAD:other"), lambda root: (root / "results/other.json").write_text("{"),
         DifferenceError, "HEAD .*: results/other.json: damaged, not JSON"),
        (("small", "other"), lambda root: (root / "params.yaml").write_text("a: ["), DifferenceError, "not YAML"),
        (("small", "other"), lambda root: (root / "params.yaml").write_text("a: 1"), DifferenceError,
         "params.yaml: has no section 'variants'"),
        (("HEAD", "first"), lambda root: (root / "params.yaml").unlink(), DifferenceError,
         "HEAD .*: has no params.yaml"),
        (("FOLDER", "small"), lambda root: (root / "allocation.json").write_text("{"), FileError,
         "allocation.json: damaged, not JSON"),
        (("FOLDER", "small"), lambda root: (root / "allocation.json").write_text("{}"), DifferenceError,
         "allocation.json: damaged, not an allocation"),
    ],
)  # fmt: skip
def test_what_cannot_be_compared_ends_in_one_message(project, names, change, error, message):
    if change:
        change(project)
        commit(project, "change")
    with pytest.raises(error, match=message):
        compare_targets(project, *(str(project) if name == "FOLDER" else name for name in names))


def test_outside_of_a_repository_that_is_said(tmp_path):
    with pytest.raises(DifferenceError, match="no variant: there is no .*params.yaml.*\n.*is in no git repository"):
        compare_targets(tmp_path, "HEAD", "HEAD")


# The command ---------------------------------------------------------------------------------------------------------


def command(root, *arguments):
    program = [str(Path(sys.executable).parent / "drank"), "diff", *arguments]
    return subprocess.run(program, cwd=root, capture_output=True, text=True)


def test_the_command_prints_draws_and_ends_well(project):
    done = command(project, "first:small", "small", "--picture", "diff.png")
    assert (done.returncode, done.stderr) == (0, "")
    assert row(done.stdout, "token_perplexity/news")[1:3] == ["20.0000", "30.0000"]
    assert (project / "diff.png").read_bytes().startswith(b"\x89PNG")
    same = command(project, "HEAD", "HEAD")
    assert (same.returncode, same.stdout.count("no difference")) == (0, 2)


def test_the_json_is_stable(project):
    first, again = (command(project, "first", "HEAD", "--json").stdout for _ in range(2))
    assert first == again
    found = json.loads(first)
    assert first == json.dumps(found, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    assert found["variants"]["small"]["parameters"] == {"variant.size_ratio": {"a": "0.5", "b": "0.25"}}
    assert found["variants"]["small"]["matrices"][0]["share"] == -0.5
    assert found["variants"]["other"]["empty"]


def test_an_error_is_a_message_and_status_1(project):
    done = command(project, "nothing", "small")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: 'nothing' is nothing that can be compared:\n")
    assert "Traceback" not in done.stderr
