"""drank audit: an untouched folder passes wherever it lies; every change tried breaks a link, which is named."""

import json
import random
import shutil
import sys
from pathlib import Path

import pytest
import yaml
from mlflow import MlflowClient
from safetensors.torch import load_file, save_file

from drank.audit import AuditError, audit, find_root
from drank.project.dvc import dvc_md5
from drank.project.files import file_sha256, read_json
from drank.steps.release import CHECKSUMS, STATEMENT, checksums
from drank.tracking import track
from tests.conftest import run

VARIANT, OTHER = "kfac-80", "svd-llm-80"
FILES = (
    "README.md", "SHA256SUMS", "allocation.json", "config.json", "generation_config.json", "model.safetensors",
    "provenance.json", "tokenizer.json", "tokenizer_config.json",
)  # fmt: skip


def findings(found):
    return {link.name: link.finding for link in found.links}


def broken(folder, root):
    return {link.name: link.detail for link in audit(folder, root).links if link.finding == "does not hold"}


@pytest.fixture
def folder(project, tmp_path):
    """A copy of the model folder, away from the repository."""
    return Path(shutil.copytree(project / "data/models" / VARIANT, tmp_path / "delivered"))


@pytest.fixture(scope="module")
def clone(project, tmp_path_factory):
    """A fresh clone, which has neither DVC's cache nor any of its artefacts."""
    root = tmp_path_factory.mktemp("clone") / "clone"
    run(project, "git", "clone", "-q", str(project), str(root))
    return root


def reseal(folder):
    """What a careful forger would do after an edit: make every hash inside the folder fit again."""
    digest = file_sha256(folder / "allocation.json")
    config = read_json(folder / "config.json")
    if "quantization_config" in config:
        config["quantization_config"]["provenance"]["allocation_sha256"] = digest
        (folder / "config.json").write_text(json.dumps(config))
    statement = read_json(folder / STATEMENT)
    for material in statement["predicate"]["buildDefinition"]["resolvedDependencies"]:
        if material["name"].startswith("data/allocation/"):
            material["digest"]["sha256"] = digest
    (folder / STATEMENT).write_text(json.dumps(statement))
    seal(folder)


def seal(folder):
    """The sums of all files, as they are, in the statement and in the list."""
    statement = read_json(folder / STATEMENT)
    names = sorted(f.name for f in folder.iterdir() if f.name not in (STATEMENT, CHECKSUMS))
    statement["subject"] = [{"name": n, "digest": {"sha256": file_sha256(folder / n)}} for n in names]
    (folder / STATEMENT).write_text(json.dumps(statement))
    digests = {f.name: file_sha256(f) for f in folder.iterdir() if f.name != CHECKSUMS}
    (folder / CHECKSUMS).write_text(checksums(digests))


def edit(path, change):
    document = read_json(path)
    change(document)
    path.write_text(json.dumps(document, indent=2, sort_keys=True, ensure_ascii=False) + "\n")


# An untouched folder.


def test_an_untouched_folder_holds_in_every_link_inside_its_repository(project):
    found = audit(project / "data/models" / VARIANT, project)
    assert found.holds
    states = findings(found)
    assert states.pop("MLflow") == "cannot be checked here"
    assert set(states.values()) == {"holds"}
    assert {"files", "statement", "allocation", "parameters", "ranks", "sizes", "model card", "dvc.lock"} <= set(states)
    assert {"working tree", "chain", "recorded parameters", "loss", "results", "data/covariance/0"} <= set(states)
    commit = run(project, "git", "rev-parse", "HEAD").stdout.strip()
    assert found.chain["commit"]["sha"] == commit
    assert found.chain["allocation"]["sha256"] == file_sha256(project / f"data/allocation/{VARIANT}.json")
    assert f"git checkout {commit}" in found.chain["rebuild"]
    assert f"PATH=$PWD/.venv/bin:$PATH dvc repro release@{VARIANT}" in found.chain["rebuild"]


def test_every_variant_holds(project):
    for variant in ("dense", OTHER, "d-rank-80"):
        assert audit(project / "data/models" / variant, project).holds


def test_a_copy_under_another_name_holds(project, folder):
    assert audit(folder, project).holds


def test_a_copy_without_a_repository_holds_as_far_as_it_goes(folder):
    found = audit(folder, None)
    assert found.holds
    states = findings(found)
    assert states.pop("dvc.lock") == "cannot be checked here"
    assert set(states.values()) == {"holds"}
    assert find_root(folder) is None


def test_a_fresh_clone_has_the_commit_the_allocation_and_the_results_and_says_what_it_lacks(clone, folder):
    found = audit(folder, clone)
    assert found.holds
    states = findings(found)
    for held in ("dvc.lock", "chain", f"data/allocation/{VARIANT}.json", f"results/{VARIANT}.json", "results"):
        assert states[held] == "holds"
    for lacking in ("data/raw/model", "data/spectrum/kfac", "data/covariance/0", "loss"):
        assert states[lacking] == "cannot be checked here"


def test_without_the_workspace_the_cache_is_read(project, folder, tmp_path):
    root = Path(shutil.copytree(project, tmp_path / "bare", symlinks=True))
    shutil.rmtree(root / "data/spectrum")
    found = audit(folder, root)
    assert findings(found)["data/spectrum/kfac"] == findings(found)["loss"] == "holds"
    assert "recomputed in the cache" in next(link for link in found.links if link.name == "data/spectrum/kfac").detail


def test_an_older_state_is_found_in_the_history_and_an_experiment_on_its_own_ref(project, folder, tmp_path):
    root = Path(shutil.copytree(project, tmp_path / "later", symlinks=True))
    first = run(root, "git", "rev-parse", "HEAD").stdout.strip()
    run(root, sys.executable, "-m", "dvc", "exp", "run", "-S", f"variants.{VARIANT}.size_ratio=0.6")
    experiment = Path(shutil.copytree(root / "data/models" / VARIANT, tmp_path / "experiment"))
    run(root, "git", "checkout", "-q", ".")
    found = audit(experiment, root)
    assert found.holds
    assert any("refs/exps" in command for command in found.chain["rebuild"])
    assert found.chain["allocation"]["size_ratio"] == 0.6
    lock = (root / "dvc.lock").read_text()
    (root / "dvc.lock").write_text(lock.replace(dvc_md5(folder), "0" * 32 + ".dir"))
    run(root, "git", "commit", "-q", "-a", "-m", "A later state")
    later = audit(folder, root)
    assert later.chain["commit"]["sha"] == first
    assert findings(later)["dvc.lock"] == "holds"


def test_a_lock_that_is_not_committed_is_said_to_be_so(project, tmp_path):
    root = Path(shutil.copytree(project, tmp_path / "uncommitted", symlinks=True))
    document = yaml.safe_load((root / "params.yaml").read_text())
    document["variants"][VARIANT]["size_ratio"] = 0.7
    (root / "params.yaml").write_text(yaml.safe_dump(document, sort_keys=False))
    run(root, sys.executable, "-m", "dvc", "repro", f"release@{VARIANT}")
    assert "commit dvc.lock first" in broken(root / "data/models" / VARIANT, root)["dvc.lock"]
    run(root, "git", "commit", "-q", "-a", "-m", "At 0.7")
    assert audit(root / "data/models" / VARIANT, root).holds


def test_the_run_in_mlflow_is_found_and_belied_by_another_allocation(project, folder, tmp_path, monkeypatch):
    root = Path(shutil.copytree(project, tmp_path / "tracked", symlinks=True))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    track(root)
    found = audit(folder, root)
    (run,) = found.chain["mlflow"]
    assert findings(found)["MLflow"] == "holds"
    assert (run["name"], run["allocation_sha256"]) == (VARIANT, found.chain["allocation"]["sha256"])
    client = MlflowClient(tracking_uri=f"sqlite:///{root / 'mlflow.db'}")
    client.set_tag(run["run_id"], "allocation.sha256", "0" * 64)
    assert run["run_id"] in broken(folder, root)["MLflow"]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:////nowhere/at/all.db")
    assert findings(audit(folder, root))["MLflow"] == "cannot be checked here"


# Tampering with the folder: at every file, bytes, presence and name.


def flip(path, draw):
    content = bytearray(path.read_bytes())
    content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    path.write_bytes(content)


BYTE_CHANGES = {
    **{f"bit {i}": flip for i in range(12)},
    "first byte gone": lambda path, draw: path.write_bytes(path.read_bytes()[1:]),
    "last byte gone": lambda path, draw: path.write_bytes(path.read_bytes()[:-1]),
    "a newline more": lambda path, draw: path.write_bytes(path.read_bytes() + b"\n"),
    "empty": lambda path, draw: path.write_bytes(b""),
    "missing": lambda path, draw: path.unlink(),
    "renamed": lambda path, draw: path.rename(path.with_name(f"{path.stem}-1{path.suffix}")),
    "upper case": lambda path, draw: path.rename(path.with_name(f"{path.name}.BAK")),
}


@pytest.mark.parametrize("change", BYTE_CHANGES)
@pytest.mark.parametrize("file", FILES)
def test_every_change_of_a_file_breaks_the_link_files_and_names_the_file(project, folder, file, change):
    BYTE_CHANGES[change](folder / file, random.Random(f"{file} {change}"))
    for root in (project, None):
        told = broken(folder, root)
        assert "files" in told
        assert file in told["files"]


def test_the_files_of_the_list_are_all_the_files_there_are(project):
    assert {file.name for file in (project / "data/models" / VARIANT).iterdir()} == set(FILES)


@pytest.mark.parametrize(
    "name", ["extra.txt", ".hidden", "deep/er/file.json", "model-00002-of-00002.safetensors", "pickle.bin"]
)
def test_an_extra_file_is_named(project, folder, name):
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text("")
    assert f"not listed: {name}" in broken(folder, project)["files"]


@pytest.mark.parametrize("sealed", [False, True])
@pytest.mark.parametrize(
    "file", ["README.md", "allocation.json", "config.json", "model.safetensors", "provenance.json"]
)
def test_a_folder_of_two_variants_is_no_folder_of_either(project, folder, file, sealed):
    shutil.copyfile(project / "data/models" / OTHER / file, folder / file)
    if sealed:
        reseal(folder)
    expected = {
        "README.md": "model card", "allocation.json": "allocation", "config.json": "allocation",
        "model.safetensors": "ranks", "provenance.json": "allocation",
    }  # fmt: skip
    alone, inside = broken(folder, None), broken(folder, project)
    assert (expected[file] if sealed else "files") in alone
    assert ("dvc.lock" if sealed else "files") in inside


# A careful forger, who makes every hash inside the folder fit: the folder contradicts itself, and no commit has it.


def units_of(project):
    return [unit["name"] for unit in read_json(project / f"data/models/{VARIANT}/allocation.json")["units"]]


def lower(unit):
    unit["rank"] -= 1


def test_an_edited_rank_of_any_unit_contradicts_the_weights(project, folder, tmp_path):
    names = units_of(project)
    for index, name in enumerate(names):
        copy = Path(shutil.copytree(folder, tmp_path / str(index)))
        edit(
            copy / "allocation.json",
            lambda document, i=index: document["units"][i].update(rank=document["units"][i]["rank"] - 1),
        )
        reseal(copy)
        told = broken(copy, project)
        assert "dvc.lock" in told
        assert name in broken(copy, None)["ranks"]
    assert len(names) == 14


@pytest.mark.parametrize(
    ("link", "change"),
    [
        ("ranks", lambda a: a["units"][0].update(price=a["units"][0]["price"] + 1)),
        ("ranks", lambda a: a["units"][3].update(form="dense" if a["units"][3]["form"] != "dense" else "pivot")),
        ("ranks", lambda a: a["units"].pop()),
        ("ranks", lambda a: a["units"][0].update(full_rank=a["units"][0]["full_rank"] + 1)),
        ("sizes", lambda a: a.update(price=a["price"] - 1)),
        ("sizes", lambda a: a.update(budget=a["budget"] + 1)),
        ("sizes", lambda a: a.update(slack=a["slack"] + 1)),
        ("sizes", lambda a: a.update(kept_ratio=a["kept_ratio"] - 0.1)),
        ("sizes", lambda a: a["objective"].update(value=a["objective"]["value"] * 0.5)),
        ("sizes", lambda a: a["units"][0].update(objective_share=0.5)),
        ("parameters", lambda a: a.update(size_ratio=0.9)),
        ("parameters", lambda a: a.update(preset="d-rank")),
        ("parameters", lambda a: a.update(storage="factors")),
        ("parameters", lambda a: a.update(allocation="uniform")),
        ("allocation", lambda a: a.update(variant="better-80")),
        ("allocation", lambda a: a["inputs"].update({"summary.json": "0" * 64})),
        ("allocation", lambda a: a.pop("objective")),
        ("allocation", lambda a: a.update(units="none")),
    ],
)
def test_an_edited_allocation_breaks_the_link_that_it_belies(project, folder, link, change):
    edit(folder / "allocation.json", change)
    reseal(folder)
    assert link in broken(folder, None)
    assert "dvc.lock" in broken(folder, project)


GONE = object()
PARAMETERS = "predicate.buildDefinition.externalParameters"
BYPRODUCT = "predicate.runDetails.byproducts.0"
EXTRA_MODULE = {"form": "dense", "out_features": 1, "in_features": 1}


def put(document, keys, value):
    """Set, or take away, what dotted keys lead to; `*` is the first key there is."""
    *path, last = keys.split(".")
    for key in path:
        document = (
            document[int(key)] if isinstance(document, list) else document[next(iter(document)) if key == "*" else key]
        )
    if value is GONE:
        del document[last]
    else:
        document[next(iter(document)) if last == "*" else last] = value


@pytest.mark.parametrize(
    ("file", "link", "keys", "value"),
    [
        ("config.json", "allocation", "quantization_config.provenance.variant", "better-80"),
        ("config.json", "allocation", "quantization_config.provenance.base_model_sha256", "1" * 64),
        ("config.json", "allocation", "quantization_config.provenance", GONE),
        ("config.json", "allocation", "quantization_config.quant_method", "other"),
        ("config.json", "ranks", "quantization_config.modules", {}),
        ("config.json", "ranks", "quantization_config.modules.*.out_features", 1),
        ("config.json", "ranks", "quantization_config.modules.*.rank", 1),
        ("config.json", "ranks", "quantization_config.modules.lm_head", EXTRA_MODULE),
        ("config.json", "ranks", "quantization_config", GONE),
        (STATEMENT, "allocation", f"{PARAMETERS}.variant.name", "better-80"),
        (STATEMENT, "allocation", f"{PARAMETERS}.variant", GONE),
        (STATEMENT, "parameters", f"{PARAMETERS}.variant.size_ratio", 0.9),
        (STATEMENT, "parameters", f"{PARAMETERS}.preset.storage", "factors"),
        (STATEMENT, "model card", f"{PARAMETERS}.sampling.n_windows", 64),
        (STATEMENT, "model card", f"{PARAMETERS}.sampling", GONE),
        (STATEMENT, "model card", f"{BYPRODUCT}.annotations.token_perplexity/news", 1.0),
        (STATEMENT, "model card", f"{BYPRODUCT}.annotations.protocol", "none"),
        (STATEMENT, "sizes", f"{BYPRODUCT}.annotations.bytes", 1),
        (STATEMENT, "sizes", f"{BYPRODUCT}.annotations.parameters", 1),
        (STATEMENT, "allocation", f"{BYPRODUCT}.name", "results/dense.json"),
        (STATEMENT, "statement", "_type", "https://in-toto.io/Statement/v0.1"),
        (STATEMENT, "statement", "predicateType", "https://slsa.dev/provenance/v0.2"),
        (STATEMENT, "statement", "predicate.buildDefinition", GONE),
    ],
)
def test_an_edited_document_breaks_the_link_that_it_belies(project, folder, file, link, keys, value):
    edit(folder / file, lambda document: put(document, keys, value))
    seal(folder)
    assert link in broken(folder, None)
    assert "dvc.lock" in broken(folder, project)


def test_other_weights_of_the_same_shapes_are_no_commits_weights(project, folder):
    tensors = load_file(folder / "model.safetensors")
    name = next(name for name in tensors if name.endswith("coefficients"))
    tensors[name][0, 0] += 1
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    reseal(folder)
    assert broken(folder, None) == {}  # consistent in itself: only what lies outside the folder can tell
    assert "no dvc.lock in the history" in broken(folder, project)["dvc.lock"]


# Tampering with the repository: the lock, the artefacts, the cache, the history.


@pytest.fixture(scope="module")
def repository(project, tmp_path_factory):
    return Path(shutil.copytree(project, tmp_path_factory.mktemp("tampered") / "project", symlinks=True))


def lineage_rows(document):
    steps = [f"{step}@{VARIANT}" for step in ("release", "evaluation", "compression", "allocation")]
    return ["raw", "sampling", "covariance@0", "spectrum@kfac", *steps]


def lock_edits():
    def md5(row, kind, index):
        before, _, folder = row[kind][index]["md5"].partition(".")
        after = before.translate(str.maketrans("0123456789abcdef", "123456789abcdef0"))
        row[kind][index]["md5"] = f"{after}.{folder}" if folder else after

    yield "md5 of the first dep", lambda row: md5(row, "deps", 0)
    yield "md5 of the last dep", lambda row: md5(row, "deps", -1)
    yield "md5 of the first out", lambda row: md5(row, "outs", 0)
    yield "md5 of the last out", lambda row: md5(row, "outs", -1)
    yield "size", lambda row: row["outs"][0].update(size=1)
    yield "dep gone", lambda row: row["deps"].pop()
    yield "path", lambda row: row["deps"][-1].update(path="data/elsewhere")
    yield "command", lambda row: row.update(cmd="python -m stages.other")


@pytest.mark.parametrize("change", dict(lock_edits()))
def test_an_edited_lock_breaks_the_chain_wherever_it_is_edited(repository, folder, change):
    path = repository / "dvc.lock"
    text = path.read_text()
    for row in lineage_rows(text):
        document = yaml.safe_load(text)
        dict(lock_edits())[change](document["stages"][row])
        path.write_text(yaml.safe_dump(document, sort_keys=False))
        told = broken(folder, repository)
        path.write_text(text)
        assert row in told["working tree"], row


@pytest.mark.parametrize(
    "key", ["variants", "presets", "spectrum", "sampling", "covariance", "compute", "evaluation", "model"]
)
def test_an_edited_parameter_of_the_lock_breaks_the_chain(repository, folder, key):
    path = repository / "dvc.lock"
    text = path.read_text()
    document = yaml.safe_load(text)
    params = document["stages"][f"release@{VARIANT}"]["params"]["params.yaml"]
    name = next(name for name in params if name.partition(".")[0] == key)
    params[name] = params[name] | {"edited": 1}
    path.write_text(yaml.safe_dump(document, sort_keys=False))
    told = broken(folder, repository)
    path.write_text(text)
    assert f"release@{VARIANT}" in told["working tree"]


def test_a_lock_that_was_made_to_fit_a_forged_folder_is_committed_by_nobody(repository, folder):
    path = repository / "dvc.lock"
    text, before = path.read_text(), dvc_md5(folder)
    (folder / "tokenizer_config.json").write_text("{}")
    reseal(folder)
    path.write_text(text.replace(before, dvc_md5(folder)))
    told = broken(folder, repository)
    path.write_text(text)
    assert "no commit does" in told["dvc.lock"]


@pytest.mark.parametrize("content", [None, "", "stages: {", "schema: '2.0'\n"])
def test_a_lock_that_is_none_is_said_to_be_so(repository, folder, content):
    path = repository / "dvc.lock"
    text = path.read_text()
    path.unlink()
    if content is not None:
        path.write_text(content)
    told = broken(folder, repository)
    path.write_text(text)
    assert "dvc.lock" in told["working tree"]


ARTEFACTS = {
    "data/raw/model": "model.safetensors",
    "data/raw/text": "news.jsonl",
    "data/sampling": "calibration/0.safetensors",
    "data/covariance/0": "summary.json",
    "data/spectrum/kfac": "singular_values.safetensors",
    f"data/compression/{VARIANT}": "config.json",
    f"data/allocation/{VARIANT}.json": "",
    f"data/allocation/{VARIANT}.csv": "",
    f"data/evaluation/{VARIANT}.json": "",
    f"results/{VARIANT}.json": "",
}


@pytest.mark.parametrize("change", ["bit 0", "bit 1", "last byte gone", "a newline more", "empty"])
@pytest.mark.parametrize("path", ARTEFACTS)
def test_an_artefact_that_was_edited_is_the_link_that_breaks(repository, folder, path, change):
    file = repository / path / ARTEFACTS[path]
    content = file.read_bytes()
    file.unlink()
    file.write_bytes(content)  # a link into DVC's cache would carry the edit there
    BYTE_CHANGES[change](file, random.Random(f"{path} {change}"))
    told = broken(folder, repository)
    file.write_bytes(content)
    assert "edited or damaged" in told[path]
    assert set(told) == {path}


def test_a_damaged_entry_of_the_cache_is_named(project, folder, tmp_path):
    root = Path(shutil.copytree(project, tmp_path / "damaged", symlinks=True))
    md5 = dvc_md5(root / "data/spectrum/kfac/summary.json")
    shutil.rmtree(root / "data/spectrum")
    entry = root / ".dvc/cache/files/md5" / md5[:2] / md5[2:]
    entry.chmod(0o644)
    entry.write_text("{}")
    assert "damaged in DVC's cache" in broken(folder, root)["data/spectrum/kfac"]


def test_parameters_committed_without_a_run_are_not_those_of_the_model(project, tmp_path):
    """An honest folder whose commit was amended: params.yaml there says what dvc.lock does not."""
    root = Path(shutil.copytree(project, tmp_path / "amended", symlinks=True))
    text = (root / "params.yaml").read_text()
    (root / "params.yaml").write_text(text.replace("n_windows: 8", "n_windows: 9"))
    run(root, "git", "commit", "-q", "-a", "--amend", "-m", "Amended")
    run(root, "git", "reflog", "expire", "--expire=now", "--all")
    told = broken(root / "data/models" / VARIANT, root)
    assert "sampling.n_windows is 9" in told["recorded parameters"]


# The command, and what is no model.


def test_the_command_prints_the_chain_and_its_status_tells(project, folder):
    done = run(project, "drank", "audit", str(folder))
    for told in (VARIANT, "local:source/model", "least_loss", "holds", "dvc repro release@", "token_perplexity/news"):
        assert told in done.stdout
    used = read_json(project / f"results/{VARIANT}.json")["protocol"]["dtype"]
    assert f"measured in {used}; covariance in {used}" in done.stdout
    as_json = json.loads(run(project, "drank", "audit", str(folder), "--json").stdout)
    assert as_json["holds"]
    assert as_json["chain"]["variant"] == VARIANT
    assert as_json["chain"]["computed_in"] == {"covariance": used, "evaluation": used}
    (folder / "extra").write_text("")
    failed = run(project, "drank", "audit", str(folder), check=False)
    assert failed.returncode == 1
    assert "DOES NOT HOLD" in failed.stdout
    assert failed.stderr.endswith(f"error: {folder}: 1 broken: files\n")
    assert not json.loads(run(project, "drank", "audit", str(folder), "--json", check=False).stdout)["holds"]


@pytest.mark.parametrize("make", [lambda path: None, lambda path: path.mkdir(), lambda path: path.write_text("")])
def test_what_is_no_folder_of_a_model_is_refused(tmp_path, make):
    make(tmp_path / "thing")
    with pytest.raises(AuditError, match="no folder with files in it"):
        audit(tmp_path / "thing", None)


def test_a_folder_that_drank_did_not_release_says_so(project):
    assert "the stage release did not write it" in broken(project / "data/compression" / VARIANT, project)["files"]


# Built again.


def test_a_rebuilt_folder_of_the_same_bytes_holds(project, folder):
    found = audit(folder, project, project / "data/models" / VARIANT)
    assert "the same bytes in all 8 files" in next(link.detail for link in found.links if link.name == "rebuilt")


@pytest.mark.parametrize(("noise", "finding"), [(0.01, "holds"), (3.0, "does not hold")])
def test_a_rebuilt_folder_of_other_bytes_is_compared_by_its_predictions(project, folder, tmp_path, noise, finding):
    other = Path(shutil.copytree(folder, tmp_path / "rebuilt"))
    tensors = load_file(other / "model.safetensors")
    tensors["model.norm.weight"] = (tensors["model.norm.weight"].float() * (1 + noise)).bfloat16()
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    seal(other)
    link = next(link for link in audit(folder, project, other).links if link.name == "rebuilt")
    assert link.finding == finding
    assert "not the same bytes (model.safetensors differ); 0 of 14 ranks differ" in link.detail
    assert "divergence on commons" in link.detail
    assert "cannot be compared" in next(k for k in audit(folder, None, other).links if k.name == "rebuilt").detail


def test_a_rebuilt_folder_of_another_variant_is_refused(project, folder):
    link = next(k for k in audit(folder, project, project / "data/models" / OTHER).links if k.name == "rebuilt")
    assert (link.finding, "other parameters" in link.detail) == ("does not hold", True)
