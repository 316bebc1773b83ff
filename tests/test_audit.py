"""drank audit: an untouched folder passes wherever it lies; every change tried breaks a link, which is named."""

import errno
import json
import os
import random
import shutil
import sys
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from mlflow import MlflowClient
from safetensors.torch import load_file, save_file

from drank.audit import audit, find_root
from drank.project.dvc import dvc_md5
from drank.project.files import FileError, file_sha256, read_json
from drank.steps.release import CHECKSUMS, STATEMENT, checksums
from drank.tracking import track
from tests.conftest import REPOSITORY, run

VARIANT, OTHER = "kfac-80", "svd-llm-80"


def findings(found):
    return {link.name: link.finding for link in found.links}


def broken(folder, root):
    return {link.name: link.detail for link in audit(folder, root).broken}


def link_of(found, name):
    return next(link for link in found.links if link.name == name)


@pytest.fixture
def folder(project, tmp_path):
    """A copy of the model folder, away from the repository."""
    return Path(shutil.copytree(project / "data/models" / VARIANT, tmp_path / "delivered"))


@pytest.fixture
def root(project, tmp_path):
    """A copy of the repository, to be changed."""
    return Path(shutil.copytree(project, tmp_path / "c# root", symlinks=True))


def commit_lock(root, change, *arguments):
    (root / "dvc.lock").write_text(change((root / "dvc.lock").read_text()))
    run(root, "git", "commit", "-q", "-a", "-m", "Another state", *arguments)


def reseal(folder):
    """A careful forger's next step after an edit: make every hash inside the folder fit again."""
    digest = file_sha256(folder / "allocation.json")
    if "quantization_config" in read_json(folder / "config.json"):
        edit(folder / "config.json", "quantization_config.provenance.allocation_sha256", digest)
    materials = read_json(folder / STATEMENT)["predicate"]["buildDefinition"]["resolvedDependencies"]
    (index,) = (i for i, material in enumerate(materials) if material["name"].startswith("data/allocation/"))
    edit(folder / STATEMENT, f"predicate.buildDefinition.resolvedDependencies.{index}.digest.sha256", digest)
    seal(folder)


def seal(folder):
    """The sums of all files, as they are, in the statement and in the list."""
    names = sorted(f.name for f in folder.iterdir() if f.name not in (STATEMENT, CHECKSUMS))
    edit(folder / STATEMENT, "subject", [{"name": n, "digest": {"sha256": file_sha256(folder / n)}} for n in names])
    digests = {f.name: file_sha256(f) for f in folder.iterdir() if f.name != CHECKSUMS}
    (folder / CHECKSUMS).write_text(checksums(digests))


# An untouched folder.


def test_an_untouched_folder_holds_in_every_link_inside_its_repository(project):
    found = audit(project / "data/models" / VARIANT, project)
    assert found.holds
    states = findings(found)
    assert states.pop("MLflow") == "cannot be checked here"
    assert set(states.values()) == {"holds"}
    assert {"files", "statement", "allocation", "parameters", "ranks", "sizes", "model card", "dvc.lock"} <= set(states)
    assert {"chain", "recorded parameters", "loss", "results", "data/covariance/0"} <= set(states)
    commit = run(project, "git", "rev-parse", "HEAD").stdout.strip()
    assert found.chain["commit"]["sha"] == commit
    assert found.chain["allocation"]["sha256"] == file_sha256(project / f"data/allocation/{VARIANT}.json")
    assert f"git checkout {commit}" in found.chain["rebuild"]
    assert f"PATH=$PWD/.venv/bin:$PATH dvc repro release@{VARIANT}" in found.chain["rebuild"]


def test_every_variant_holds_as_a_copy_under_another_name(project, tmp_path):
    for variant in ("dense", OTHER, "d-rank-80"):
        assert audit(Path(shutil.copytree(project / "data/models" / variant, tmp_path / variant[::-1])), project).holds


def test_a_copy_without_a_repository_holds_where_that_may_be_missing(folder):
    found = audit(folder, None)
    assert not found.holds
    assert replace(found, without=("git",)).holds
    states = findings(found)
    assert states.pop("dvc.lock") == "cannot be checked here"
    assert set(states.values()) == {"holds"}
    assert find_root(folder) is None


def test_a_fresh_clone_has_the_commit_the_allocation_and_the_results_and_says_what_it_lacks(project, folder, tmp_path):
    run(project, "git", "clone", "-q", str(project), str(tmp_path / "clone"))
    found = audit(folder, tmp_path / "clone")
    assert not found.holds
    assert {link.source for link in found.unchecked} == {"artefacts"}
    assert replace(found, without=("artefacts",)).holds
    states = findings(found)
    for held in ("dvc.lock", "chain", f"data/allocation/{VARIANT}.json", f"results/{VARIANT}.json", "results"):
        assert states[held] == "holds"
    for lacking in ("data/raw/model", "data/spectrum/kfac", "data/covariance/0", "loss"):
        assert states[lacking] == "cannot be checked here"


def test_without_the_workspace_the_cache_is_read_and_a_damaged_entry_of_it_named(root, folder):
    md5 = dvc_md5(root / "data/spectrum/kfac/summary.json")
    shutil.rmtree(root / "data/spectrum")
    found = audit(folder, root)
    assert findings(found)["loss"] == "holds"
    assert "recomputed in the cache" in link_of(found, "data/spectrum/kfac").detail
    entry = root / ".dvc/cache/files/md5" / md5[:2] / md5[2:]
    entry.chmod(0o644)
    entry.write_text("{}")
    assert "damaged in DVC's cache" in broken(folder, root)["data/spectrum/kfac"]


def test_states_of_the_history_and_of_an_experiments_own_ref_are_found_and_uncommitted_ones_said_to_be_so(
    root, folder, tmp_path
):
    first = run(root, "git", "rev-parse", "HEAD").stdout.strip()
    document = yaml.safe_load((root / "params.yaml").read_text())
    document["variants"][VARIANT]["size_ratio"] = 0.6
    (root / "params.yaml").write_text(yaml.safe_dump(document, sort_keys=False))
    run(root, sys.executable, "-m", "dvc", "repro", f"release@{VARIANT}")
    experiment = Path(shutil.copytree(root / "data/models" / VARIANT, tmp_path / "experiment"))
    assert "commit dvc.lock first" in broken(experiment, root)["dvc.lock"]
    assert audit(folder, root).holds, "work that is not committed belies no older folder"

    run(root, "git", "commit", "-q", "-a", "-m", "At 0.6")
    run(root, "git", "update-ref", f"refs/exps/{first[:2]}/{first[2:]}/smaller", "HEAD")
    run(root, "git", "reset", "-q", "--hard", first)
    found = audit(experiment, root)
    assert found.holds
    assert found.chain["rebuild"][0] == f"git clone '{root}' rebuild"
    assert any("refs/exps" in command for command in found.chain["rebuild"])
    assert found.chain["allocation"]["size_ratio"] == 0.6

    commit_lock(root, lambda lock: lock.replace(dvc_md5(folder), "0" * 32 + ".dir"))
    later = audit(folder, root)
    assert later.chain["commit"]["sha"] == first
    assert findings(later)["dvc.lock"] == "holds"


def test_the_run_in_mlflow_is_found_and_belied_by_another_allocation(root, folder, monkeypatch):
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


def test_a_clone_whose_git_turns_line_ends_has_the_same_bytes(root, folder, tmp_path):
    shutil.copy(REPOSITORY / ".gitattributes", root)
    (root / "windows.csv").write_bytes(b"text\r\none\r\n")
    for setting in ("core.autocrlf=true", "core.autocrlf=input", "core.eol=crlf"):
        run(root, "git", "-c", setting, "add", ".")
        run(root, "git", "commit", "-q", "--allow-empty", "-m", "A file of another system")
        clone = tmp_path / setting
        run(root, "git", "clone", "-q", "-c", setting, str(root), str(clone))
        kept = run(root, "git", "ls-files").stdout.split()
        assert [name for name in kept if (root / name).read_bytes() != (clone / name).read_bytes()] == []
        assert audit(folder, clone, without=("artefacts",)).holds


# Nobody can say.


def no_git(root, monkeypatch):
    monkeypatch.setenv("PATH", str(root))


def another_owner(root, monkeypatch):
    monkeypatch.setenv("GIT_TEST_ASSUME_DIFFERENT_OWNER", "1")
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.devnull)


def out_of_reach(root, monkeypatch):
    """A clone that fetches what it is asked for, from a remote that is gone."""
    run(root, "git", "config", "uploadpack.allowFilter", "true")
    partial = root.with_name("partial")
    run(root.parent, "git", "clone", "-q", "--no-checkout", "--filter=blob:none", f"file://{root}", str(partial))
    run(partial, "git", "remote", "set-url", "origin", "../gone")
    shutil.rmtree(root / ".git")
    (partial / ".git").rename(root / ".git")


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        (no_git, "git is not installed"),
        (another_owner, "safe.directory"),
        (out_of_reach, "says: "),
        (lambda root, _: (root / ".git/HEAD").unlink(), "not a git repository"),
        (lambda root, _: shutil.rmtree(root / ".git"), "no git history here"),
    ],
)
def test_what_git_cannot_say_neither_holds_nor_breaks(root, folder, monkeypatch, fault, told):
    fault(root, monkeypatch)
    found = audit(folder, root)
    link = link_of(found, "dvc.lock")
    assert (link.finding, link.source) == ("cannot be checked here", "git")
    assert told in link.detail
    assert not found.holds
    assert found.broken == ()
    assert replace(found, without=("git",)).holds
    assert findings(found)["chain"] == findings(found)["loss"] == "holds"


def test_a_shallow_clone_cannot_say_what_was_before_it(root, folder, tmp_path):
    commit_lock(root, lambda lock: lock.replace(dvc_md5(folder), "0" * 32 + ".dir"))
    run(root, "git", "clone", "-q", "--depth", "1", f"file://{root}", str(tmp_path / "shallow"))
    found = audit(folder, tmp_path / "shallow")
    assert ([link.name for link in found.unchecked], found.broken) == (["dvc.lock"], ())
    assert "git fetch --unshallow" in found.unchecked[0].detail


def test_a_disk_that_fails_says_nothing_of_the_artefact(project, folder, monkeypatch):
    def fail(path):
        raise OSError(errno.EIO, "Input/output error", str(path))

    monkeypatch.setattr("drank.audit.artefacts.dvc_md5", fail)
    found = audit(folder, project)
    assert found.broken == ()
    assert {link.source for link in found.unchecked} == {"artefacts"}
    assert "data/raw/model: the disk fails to read or write" in found.unchecked[0].detail


def test_a_lock_that_a_merge_has_made_is_found(root):
    """It is in neither parent; a lock with a conflict in it is passed over."""
    folder, whole = root / "data/models" / VARIANT, (root / "dvc.lock").read_text()
    commit_lock(root, lambda lock: lock.replace(dvc_md5(folder), "0" * 32 + ".dir"), "--amend")
    run(root, "git", "checkout", "-q", "-b", "side")
    commit_lock(root, lambda lock: f"<<<<<<<\n{whole}")
    run(root, "git", "checkout", "-q", "main")
    run(root, "git", "merge", "-q", "--no-ff", "--no-commit", "side")
    commit_lock(root, lambda lock: whole)
    found = audit(folder, root)
    assert findings(found)["dvc.lock"] == "holds"
    assert found.chain["commit"]["sha"] == run(root, "git", "rev-parse", "HEAD").stdout.strip()


def test_a_folder_of_a_newer_drank_cannot_be_checked_by_this_one(project, folder):
    edit(folder / "allocation.json", "format_version", 9)
    reseal(folder)
    found = audit(folder, None, without=("git", "card"))
    assert (found.broken, found.unchecked[0].name) == ((), "allocation")
    assert "another version of drank wrote it" in found.unchecked[0].detail


# Tampering with the folder: at every file, bytes, presence and name.


def flip(path, draw):
    content = bytearray(path.read_bytes())
    content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    path.write_bytes(content)


BYTE_CHANGES = {
    **{f"bit {i}": flip for i in range(4)},
    "first byte gone": lambda path, draw: path.write_bytes(path.read_bytes()[1:]),
    "last byte gone": lambda path, draw: path.write_bytes(path.read_bytes()[:-1]),
    "a newline more": lambda path, draw: path.write_bytes(path.read_bytes() + b"\n"),
    "empty": lambda path, draw: path.write_bytes(b""),
    "missing": lambda path, draw: path.unlink(),
    "renamed": lambda path, draw: path.rename(path.with_name(f"{path.stem}-1{path.suffix}")),
    "upper case": lambda path, draw: path.rename(path.with_name(f"{path.name}.BAK")),
}


@pytest.mark.parametrize("change", BYTE_CHANGES)
def test_every_change_of_a_file_breaks_the_link_files_and_names_the_file(folder, change):
    contents = {file: file.read_bytes() for file in folder.iterdir()}
    assert len(contents) == 10
    for file, content in contents.items():
        BYTE_CHANGES[change](file, random.Random(f"{file.name} {change}"))
        assert file.name in broken(folder, None).get("files", "")
        for added in set(folder.iterdir()) - contents.keys():
            added.unlink()
        file.write_bytes(content)


def test_extra_files_are_named(folder):
    (folder / "deep/er").mkdir(parents=True)
    for name in (".hidden", "deep/er/file.json", "extra.txt"):
        (folder / name).write_text("")
    assert "not listed: .hidden, deep/er/file.json, extra.txt" in broken(folder, None)["files"]


@pytest.mark.parametrize(
    ("file", "link"),
    [
        ("README.md", "model card"), ("allocation.json", "allocation"), ("config.json", "allocation"),
        ("model.safetensors", "ranks"), ("provenance.json", "allocation"),
    ],
)  # fmt: skip
def test_a_folder_of_two_variants_is_no_folder_of_either_though_its_hashes_fit(project, folder, file, link):
    shutil.copyfile(project / "data/models" / OTHER / file, folder / file)
    reseal(folder)
    told = broken(folder, project)
    assert {link, "dvc.lock"} <= set(told)


# A careful forger, who makes every hash inside the folder fit: the folder contradicts itself, and no commit has it.


def test_an_edited_rank_of_any_unit_contradicts_the_weights(folder, tmp_path):
    names = [unit["name"] for unit in read_json(folder / "allocation.json")["units"]]
    assert len(names) == 14
    for index, name in enumerate(names):
        copy = Path(shutil.copytree(folder, tmp_path / str(index)))
        edit(copy / "allocation.json", f"units.{index}.rank", lambda rank: rank - 1)
        reseal(copy)
        assert name in broken(copy, None)["ranks"]


GONE = object()
PARAMETERS = "predicate.buildDefinition.externalParameters"
BYPRODUCT = "predicate.runDetails.byproducts.0"
EXTRA_MODULE = {"form": "dense", "out_features": 1, "in_features": 1}


def edit(path, keys, value):
    """Set, take away, or change by a function what dotted keys lead to; `*` is the first key there is."""
    document = read_json(path)
    *parents, last = keys.split(".")
    parent = document
    for key in parents:
        parent = parent[int(key)] if isinstance(parent, list) else parent[next(iter(parent)) if key == "*" else key]
    last = next(iter(parent)) if last == "*" else int(last) if isinstance(parent, list) else last
    if value is GONE:
        del parent[last]
    else:
        parent[last] = value(parent[last]) if callable(value) else value
    path.write_text(json.dumps(document, indent=2, sort_keys=True, ensure_ascii=False) + "\n")


def more(number):
    return number + 1


@pytest.mark.parametrize(
    ("file", "link", "keys", "value"),
    [
        ("allocation.json", "ranks", "units.0.price", more),
        ("allocation.json", "ranks", "units.3.form", lambda form: "dense" if form != "dense" else "pivot"),
        ("allocation.json", "ranks", "units.0", GONE),
        ("allocation.json", "ranks", "units.0.rank", 0),
        ("allocation.json", "ranks", "units.0.full_rank", more),
        ("allocation.json", "sizes", "price", more),
        ("allocation.json", "sizes", "slack", more),
        ("allocation.json", "sizes", "kept_ratio", 0.7),
        ("allocation.json", "sizes", "objective.value", 0.5),
        ("allocation.json", "parameters", "size_ratio", 0.9),
        ("allocation.json", "allocation", "variant", "better-80"),
        ("allocation.json", "allocation", "inputs.*", "0" * 64),
        ("allocation.json", "allocation", "objective", GONE),
        ("allocation.json", "allocation", "targeted_parameters", 0),
        ("config.json", "allocation", "quantization_config.provenance.base_model_sha256", "1" * 64),
        ("config.json", "allocation", "quantization_config.quant_method", "other"),
        ("config.json", "ranks", "quantization_config.modules", {}),
        ("config.json", "ranks", "quantization_config.modules.*.out_features", 1),
        ("config.json", "ranks", "quantization_config.modules.lm_head", EXTRA_MODULE),
        ("config.json", "ranks", "quantization_config", GONE),
        (STATEMENT, "allocation", f"{PARAMETERS}.variant", GONE),
        (STATEMENT, "parameters", f"{PARAMETERS}.variant.size_ratio", 0.9),
        (STATEMENT, "model card", f"{PARAMETERS}.sampling.n_windows", 64),
        (STATEMENT, "model card", f"{BYPRODUCT}.annotations.token_perplexity/news", 1.0),
        (STATEMENT, "model card", f"{BYPRODUCT}.annotations.protocol", "none"),
        (STATEMENT, "sizes", f"{BYPRODUCT}.annotations.bytes", 1),
        (STATEMENT, "sizes", f"{BYPRODUCT}.annotations.parameters", 1),
        (STATEMENT, "allocation", f"{BYPRODUCT}.name", "results/dense.json"),
        (STATEMENT, "statement", "_type", "https://in-toto.io/Statement/v0.1"),
        (STATEMENT, "statement", "predicate.buildDefinition", GONE),
    ],
)
def test_an_edited_document_breaks_the_link_that_it_belies(folder, file, link, keys, value):
    edit(folder / file, keys, value)
    (reseal if file == "allocation.json" else seal)(folder)
    assert link in broken(folder, None)


def test_a_folder_above_the_megabytes_that_were_asked_is_over_its_budget(folder):
    n_bytes = (folder / "model.safetensors").stat().st_size
    for asked, told in ((n_bytes, ""), (n_bytes - 1, f"have {n_bytes:,} bytes, above the budget")):
        edit(folder / "allocation.json", "megabytes", asked / 1e6)
        edit(folder / STATEMENT, f"{PARAMETERS}.variant.megabytes", asked / 1e6)
        reseal(folder)
        found = broken(folder, None)
        assert "parameters" not in found
        assert told in found.get("sizes", "")
        assert ("sizes" in found) == bool(told)


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


@contextmanager
def edited(file, change):
    """A file with other bytes; not through a link, which would carry the edit into DVC's cache."""
    content = file.read_bytes()
    file.unlink()
    file.write_bytes(content)
    change(file)
    yield
    file.write_bytes(content)


def test_a_lock_that_was_made_to_fit_a_forged_folder_is_committed_by_nobody(repository, folder):
    before = dvc_md5(folder)
    (folder / "tokenizer_config.json").write_text("{}")
    reseal(folder)
    with edited(repository / "dvc.lock", lambda f: f.write_text(f.read_text().replace(before, dvc_md5(folder)))):
        assert "no commit does" in broken(folder, repository)["dvc.lock"]


def test_a_lock_of_the_workspace_that_is_none_belies_no_folder_of_a_commit(repository, folder):
    with edited(repository / "dvc.lock", lambda file: file.write_text("stages: {")):
        found = audit(folder, repository)
    assert found.holds
    assert findings(found)["loss"] == "holds"


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


@pytest.mark.parametrize(
    ("path", "change"),
    [*((path, "bit 0") for path in ARTEFACTS), ("data/sampling", "last byte gone"), ("data/sampling", "empty")],
)
def test_an_artefact_that_was_edited_is_the_link_that_breaks(repository, folder, path, change):
    draw = random.Random(f"{path} {change}")
    with edited(repository / path / ARTEFACTS[path], lambda file: BYTE_CHANGES[change](file, draw)):
        told = broken(folder, repository)
    assert "edited or damaged" in told[path]
    assert set(told) == {path}


def test_parameters_committed_without_a_run_are_not_those_of_the_model(root):
    """An honest folder whose commit was amended: params.yaml there says what dvc.lock does not."""
    text = (root / "params.yaml").read_text()
    (root / "params.yaml").write_text(text.replace("n_windows: 8", "n_windows: 9"))
    commit_lock(root, str, "--amend")
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
    alone = run(folder.parent, "drank", "audit", str(folder), "--json", check=False)
    as_json = json.loads(alone.stdout)
    assert (alone.returncode, as_json["holds"], as_json["chain"]["variant"]) == (2, False, VARIANT)
    assert as_json["chain"]["computed_in"] == {"covariance": used, "evaluation": used}
    assert alone.stderr.endswith(
        "1 of 8 links were not checked: dvc.lock. Mend what they lack, or leave them out: --without git\n"
    )
    assert run(folder.parent, "drank", "audit", str(folder), "--without", "git").stderr == ""
    (folder / "extra").write_text("")
    failed = run(project, "drank", "audit", str(folder), check=False)
    assert failed.returncode == 1
    assert "DOES NOT HOLD" in failed.stdout
    assert failed.stderr.endswith(f"error: {folder}: 1 broken: files\n")


def test_what_is_no_released_folder_of_a_model_is_refused(project, tmp_path):
    with pytest.raises(FileError, match="no folder with files in it"):
        audit(tmp_path, None)
    assert "the stage release did not write it" in broken(project / "data/compression" / VARIANT, project)["files"]


# Built again.


def test_a_rebuilt_folder_of_the_same_bytes_holds_and_one_of_another_variant_is_refused(project, folder):
    same, other = (link_of(audit(folder, project, project / "data/models" / v), "rebuilt") for v in (VARIANT, OTHER))
    assert "the same bytes in all 9 files" in same.detail
    assert (other.finding, "other parameters" in other.detail) == ("does not hold", True)


@pytest.mark.parametrize(("noise", "finding"), [(0.01, "holds"), (3.0, "does not hold")])
def test_a_rebuilt_folder_of_other_bytes_is_compared_by_its_predictions(project, folder, tmp_path, noise, finding):
    other = Path(shutil.copytree(folder, tmp_path / "rebuilt"))
    tensors = load_file(other / "model.safetensors")
    tensors["model.norm.weight"] = (tensors["model.norm.weight"].float() * (1 + noise)).bfloat16()
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    seal(other)
    link = link_of(audit(folder, project, other), "rebuilt")
    assert link.finding == finding
    assert "not the same bytes (model.safetensors differ); 0 of 14 ranks differ" in link.detail
    assert "divergence on commons" in link.detail
    alone = link_of(audit(folder, None, other), "rebuilt")
    assert (alone.finding, "not at hand" in alone.detail) == ("cannot be checked here", True)
