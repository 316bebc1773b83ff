"""The pipeline under real DVC on a tiny real model: what runs again and what does not, same bytes, dvc.yaml as text."""

import ast
import hashlib
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
import yaml

from drank.method.spectrum import factors
from drank.project.files import read_json, read_rows, read_tensors
from tests.conftest import REPOSITORY, build, run

STAGES = yaml.safe_load((REPOSITORY / "dvc.yaml").read_text())["stages"]
VARIANTS = ("dense", "svd-llm-80", "d-rank-80", "kfac-80")


def repro(root, *arguments):
    """Stages that dvc repro really executed."""
    lines = run(root, sys.executable, "-m", "dvc", "repro", *arguments).stdout.splitlines()
    return [line.split("'")[1] for line in lines if line.startswith("Running stage")]


def set_ratio(root, variant, ratio):
    document = yaml.safe_load((root / "params.yaml").read_text())
    document["variants"][variant]["size_ratio"] = ratio
    (root / "params.yaml").write_text(yaml.safe_dump(document, sort_keys=False))


def digests(root):
    files = [
        f for d in ("data", "results") for f in (root / d).rglob("*") if f.is_file() and "downloads" not in f.parts
    ]
    return {f.relative_to(root).as_posix(): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


def test_everything_is_there_and_up_to_date(project):
    assert repro(project) == []
    table = (project / "results/summary.csv").read_text().splitlines()
    assert [row.split(",")[0] for row in table] == ["variant", *VARIANTS]
    names = ("budget", "losses", "perplexity", "ranks", "spectra-input", "spectra-kfac")
    assert {f.name for f in (project / "results/figures").iterdir()} == {f"{name}.png" for name in names}


def test_the_ranks_of_all_compressed_variants_are_one_chart_of_dvc(project):
    spec = json.loads(run(project, sys.executable, "-m", "dvc", "plots", "show", "ranks", "--show-vega").stdout)
    drawn = {point["filename"] for point in spec["data"]["values"]}
    assert drawn == {f"{name}.csv" for name in VARIANTS if name != "dense"}
    params = yaml.safe_load((REPOSITORY / "params.yaml").read_text())
    assert drawn == {f"{name}.csv" for name, variant in params["variants"].items() if variant["preset"] != "dense"}


def test_a_new_ratio_runs_that_variant_alone_and_the_old_one_runs_nothing(project):
    before = digests(project)
    set_ratio(project, "d-rank-80", 0.6)
    steps = ("allocation", "compression", "evaluation", "release")
    assert sorted(repro(project)) == sorted([*(f"{step}@d-rank-80" for step in steps), "report"])
    changed = {name for name, digest in digests(project).items() if before.get(name) != digest}
    assert changed == {
        "data/allocation/d-rank-80.csv",
        "data/allocation/d-rank-80.json",
        "data/evaluation/d-rank-80.json",
        *(
            f"data/{folder}/d-rank-80/{file}"
            for folder in ("compression", "models")
            for file in ("allocation.json", "config.json", "model.safetensors")
        ),
        *(f"data/models/d-rank-80/{file}" for file in ("README.md", "SHA256SUMS", "provenance.json")),
        *(f"results/{file}" for file in ("d-rank-80.json", "summary.csv", "report.html")),
        *(f"results/figures/{name}.png" for name in ("budget", "losses", "perplexity", "ranks")),
    }
    set_ratio(project, "d-rank-80", 0.8)
    assert repro(project) == []
    assert digests(project) == before


def test_every_stage_run_again_writes_the_same_bytes(project):
    """Here one after the other in one process; in processes of their own: tests/faults/test_determinism.py."""
    before = digests(project)
    for folder in ("data", "results"):
        shutil.rmtree(project / folder)
    build(project)
    assert digests(project) == before


def test_an_edit_of_an_error_text_would_run_nothing_and_one_of_pivot_the_compressions(project):
    files = [project / "src/drank" / name for name in ("project/refusals.py", "method/pivot.py")]
    for file, stages in zip(files, ([], [f"compression@{name}" for name in sorted(VARIANTS)]), strict=True):
        before = file.read_text()
        file.write_text(f"{before}# edited\n")
        assert sorted(repro(project, "--dry")) == stages
        file.write_text(before)


def test_saved_models_are_the_base_model_and_allocated_slices_of_the_cached_factors(project):
    source, dense = (
        read_tensors(project / folder / "model.safetensors") for folder in ("source/model", "data/models/dense")
    )
    assert source.keys() == dense.keys()
    assert all(torch.equal(source[name], dense[name]) for name in source)
    assert read_json(project / "results/dense.json")["kept_ratio"] == 1.0
    allocation = read_json(project / "data/allocation/d-rank-80.json")
    assert allocation["price"] <= allocation["budget"] == int(0.8 * allocation["targeted_parameters"])
    weights = read_tensors(project / "data/models/d-rank-80/model.safetensors")
    base = read_tensors(project / "data/raw/model/model.safetensors")
    factored = [unit for unit in allocation["units"] if unit["form"] == "factors"]
    assert factored
    for unit in factored:
        rows = read_rows(project / f"data/spectrum/input/factors/{unit['factors']}.safetensors", unit["rank"])
        left, right = factors(base[f"{unit['name']}.weight"], **rows)
        assert torch.equal(weights[f"{unit['name']}.weight"], left.bfloat16())
        assert torch.equal(weights[f"{unit['name']}.basis"], right.bfloat16())


@pytest.mark.parametrize(
    ("change", "stage", "message"),
    [
        (("n_windows: 8", "n_window: 8"), "sampling", "unknown key 'sampling.n_window'"),
        (("size_ratio: 0.8", "size_ratio: 1.2"), "allocation@svd-llm-80", "less than or equal to 1"),
        (("size_ratio: 0.8", "size_ratio: 0.001"), "allocation@svd-llm-80", "less than its smallest rank costs"),
        (("- re:.*", "- no_such_proj"), "covariance@0", "'no_such_proj' matches nothing in this model"),
        (("window_length: 64", "window_length: 200000"), "sampling", "200000"),
        (("local:source/model", "hub:some/model"), "raw", "some/model"),
        (("local:source/model", "local:nowhere"), "raw", "error: local:nowhere: not found"),
        (("local:source/model", "ftp://x"), "raw", "'model.source' = 'ftp://x'"),
        (("local:source/news.jsonl", "local:source/nwes.jsonl"), "raw", "nwes.jsonl"),
    ],
)
def test_mistakes_end_in_one_clear_message_and_leave_nothing_behind(project, change, stage, message):
    before, params = digests(project), (project / "params.yaml").read_text()
    assert change[0] in params
    (project / "params.yaml").write_text(params.replace(*change, 1))
    step, _, variant = stage.partition("@")
    done = run(project, sys.executable, "-m", f"stages.{step}", *([variant] if variant else []), check=False)
    (project / "params.yaml").write_text(params)
    assert done.returncode == 1
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert digests(project) == before


def imported_by(path):
    """Files of the repository that a module imports, at its top or in its functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [f"{node.module}.{alias.name}" for alias in node.names] if isinstance(node, ast.ImportFrom) else []
        for name in filter(None, names):
            for base in (REPOSITORY / "src", REPOSITORY):
                place = base / Path(*name.split("."))
                found |= {file for file in (place.with_suffix(".py"), place / "__init__.py") if file.is_file()}
    return found


def imports(path, seen=None):
    """Files of the layers that decide which a module imports, and what those import in turn."""
    seen = set() if seen is None else seen
    for file in imported_by(path) - seen:
        if layer(file) in DECIDING and file.name != "__init__.py":
            seen.add(file)
            imports(file, seen)
    return seen


DECIDING = ("method", "model", "steps", "views")  # layers whose code decides numbers or pixels
FORMAT = {"src/drank/project/files.py": ["FORMAT"]}


def layer(file):
    package = REPOSITORY / "src/drank"
    return file.relative_to(package).parts[0] if file.is_relative_to(package) else ""


@pytest.mark.parametrize("name", STAGES)
def test_deps_of_a_stage_are_its_script_and_what_that_imports_of_the_layers_that_decide(name):
    stage = STAGES[name].get("do", STAGES[name])
    script = REPOSITORY / "stages" / f"{name}.py"
    needed = {script, *imports(script)}
    if name == "raw":  # they decide how weights and texts are read
        needed |= {REPOSITORY / f"src/drank/project/{name}.py" for name in ("models", "texts")}
    declared = {dep for dep in stage["deps"] if dep.endswith(".py")}
    assert declared == {file.relative_to(REPOSITORY).as_posix() for file in needed}
    assert stage["cmd"].startswith(f"python -m stages.{script.stem}")
    assert FORMAT in stage["params"]


# What a layer may import; stages, cli, audit, tracking, planning and views put the floors together.
LAYERS = {
    "method": {"method"},
    "model": {"model", "method"},
    "project": {"project", "method", "model"},  # the tables of choices; of models the format of config.json alone
    "steps": {"method", "model", "project"},  # of the project its parameters and processes alone
    "views": {"views", "project"},
    "planning": {"planning", "project", "model", "steps", "method"},
    "preflight": {"preflight", "planning", "project", "tracking"},
    "tracking": {"tracking", "project", "views"},
    "serving": {"serving", "project", "model", "steps"},
    "audit": {"audit", "serving", "project", "model", "steps", "tracking"},
    "cli": {"cli", "audit", "serving", "tracking", "planning", "preflight", "project", "model", "steps", "views"},
}


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_imports_what_it_may_and_only_tracking_imports_mlflow(name):
    package = REPOSITORY / "src/drank"
    assert {path.parent.name for path in package.glob("*/__init__.py")} == {*LAYERS}
    for path in sorted((package / name).rglob("*.py")):
        if name in DECIDING and path.stem == "__init__":  # no stage depends on more than the modules that it names
            assert [type(node) for node in ast.parse(path.read_text()).body] == [ast.Expr], path
        assert {layer(file) for file in imported_by(path)} - {"__init__.py", ""} <= LAYERS[name], path
        assert name == "tracking" or "import mlflow" not in path.read_text(), path
        if name == "project":
            assert {file.stem for file in imported_by(path) if layer(file) == "model"} <= {"format", "__init__"}, path
        if name == "steps":
            of_project = {file.stem for file in imported_by(path) if layer(file) == "project"}
            assert of_project <= {"params", "processes", "__init__"}, path
            assert not [file for file in imported_by(path) if layer(file) == "steps" and file.stem != "__init__"], path
