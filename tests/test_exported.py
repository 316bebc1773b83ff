"""drank audit of exports: every form leads back to the released folder; every change tried breaks a link, named."""

import importlib.util
import json
import os
import random
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from drank.audit import audit
from drank.cli.export import GgufType, export
from drank.project.files import file_sha256, read_json
from drank.serving.export import EXPORT
from drank.serving.gguf import CONVERTER
from drank.serving.remote_code import MODULE
from drank.steps.release import CHECKSUMS, STATEMENT, checksums
from tests import tiny
from tests.conftest import reproduce, run
from tests.test_audit import BYTE_CHANGES, OTHER, VARIANT, broken, edit, findings, link_of

pytestmark = pytest.mark.pipeline

FORMS = {
    "dense": ({"dense": True}, ""),
    "remote-code": ({"remote_code": True}, ""),
    "onnx": ({"onnx": True}, "" if importlib.util.find_spec("onnx") else "the package onnx is not installed"),
    "openvino": ({"openvino": True}, "" if importlib.util.find_spec("openvino") else "openvino is not installed"),
    "gguf": ({"gguf": GgufType.BF16}, "" if os.environ.get(CONVERTER) else f"{CONVERTER} names no converter"),
}


@pytest.fixture(scope="module")
def project(request, tmp_path_factory):
    """The reproduced project; with a tokenizer that llama.cpp's converter knows, another one, where there is one."""
    root = tmp_path_factory.mktemp("module") / "project"
    if FORMS["gguf"][1]:
        shutil.copytree(request.getfixturevalue("reproduced"), root, symlinks=True)
    else:
        reproduce(root, with_bytes)
    return root


def with_bytes(root):
    tiny.project(root)
    tiny.byte_tokenizer().save_pretrained(root / "source/model")


@pytest.fixture(scope="module")
def exports(project, tmp_path_factory):
    """Exports of the released folder by form, each made when it is first asked for."""
    made = {}

    def get(form):
        options, lacking = FORMS[form]
        if lacking:
            pytest.skip(lacking)
        if form not in made:
            made[form] = tmp_path_factory.mktemp("export") / form
            export(project / "data/models" / VARIANT, made[form], **options)
        return made[form]

    return get


@pytest.fixture(params=FORMS)
def exported(request, exports, tmp_path):
    """A copy of an export, away from the repository."""
    return Path(shutil.copytree(exports(request.param), tmp_path / "delivered"))


def seal(folder):
    """A forger's last step: SHA256SUMS of the files as they are now."""
    (folder / CHECKSUMS).write_text(
        checksums({f.name: file_sha256(f) for f in folder.iterdir() if f.name != CHECKSUMS})
    )


def test_an_untouched_export_leads_back_to_variant_allocation_commit_and_weights(project, exported):
    found = audit(exported, project)
    assert found.holds, found.unchecked or found.broken
    states = findings(found)
    assert states.pop("MLflow") == "cannot be checked here"
    assert set(states.values()) == {"holds"}
    needed = {"files", "export", "allocation", "parameters", "ranks", "dvc.lock", "loss", "released folder", "weights"}
    assert needed <= states.keys()
    assert found.chain["commit"]["sha"] == run(project, "git", "rev-parse", "HEAD").stdout.strip()
    assert found.chain["variant"] == VARIANT
    assert found.chain["allocation"]["sha256"] == file_sha256(project / f"data/allocation/{VARIANT}.json")
    for paper in (STATEMENT, "allocation.json"):
        assert (exported / paper).read_bytes() == (project / "data/models" / VARIANT / paper).read_bytes()


def test_without_the_released_folder_nobody_says_that_the_weights_are_its(exported, project):
    found = audit(exported, None)
    states = findings(found)
    is_the_folder = (exported / f"{MODULE}.py").exists()  # whose files' hashes the statement has
    assert states.pop("weights") == ("holds" if is_the_folder else "cannot be checked here")
    assert (states.pop("released folder"), states.pop("dvc.lock")) == ("cannot be checked here",) * 2
    assert set(states.values()) == {"holds"}
    assert not replace(found, without=("git",)).holds
    assert replace(found, without=("git", "artefacts")).holds
    told = audit(exported, None, project / "data/models" / VARIANT)
    assert findings(told)["weights"] == findings(told)["released folder"] == "holds"
    other = link_of(audit(exported, None, project / "data/models" / OTHER), "released folder")
    assert (other.finding, "another folder" in other.detail) == ("cannot be checked here", True)


def test_the_released_folder_is_found_in_dvcs_cache(project, exports, tmp_path):
    root = Path(shutil.copytree(project, tmp_path / "root", symlinks=True))
    shutil.rmtree(root / "data/models" / VARIANT)
    assert findings(audit(exports("dense"), root))["weights"] == "holds"


@pytest.mark.parametrize("change", ["bit 0", "last byte gone", "missing", "renamed"])
def test_every_change_of_a_file_breaks_the_link_files_and_names_the_file(exported, change):
    contents = {file: file.read_bytes() for file in exported.iterdir() if file.name != EXPORT}
    for file, content in contents.items():
        BYTE_CHANGES[change](file, random.Random(f"{file.name} {change}"))
        assert file.name in broken(exported, None).get("files", "")
        for added in set(exported.iterdir()) - contents.keys() - {exported / EXPORT}:
            added.unlink()
        file.write_bytes(content)


def test_papers_that_are_gone_or_edited_are_named(exported):
    edit(exported / EXPORT, "variant", "better-80")
    assert f"changed: {EXPORT}" in broken(exported, None)["files"]
    seal(exported)
    assert "variant of export.json is better-80" in broken(exported, None)["export"]
    (exported / EXPORT).write_text("{}")
    seal(exported)
    assert "export.json: form" in broken(exported, None)["export"]


PAPERS = {
    "variant": OTHER, "allocation_sha256": "0" * 64, "base_model_sha256": "1" * 64, "sha256sums": "2" * 64,
}  # fmt: skip


@pytest.mark.parametrize("key", PAPERS)
def test_papers_resealed_contradict_the_statement(exported, key):
    edit(exported / EXPORT, key, PAPERS[key])
    seal(exported)
    assert "export" in broken(exported, None)


def test_papers_that_name_another_folder_or_form_are_belied_by_the_repository(project, exports, tmp_path):
    folder = Path(shutil.copytree(exports("dense"), tmp_path / "delivered"))
    edit(folder / EXPORT, "model_md5", "0" * 32 + ".dir")
    seal(folder)
    assert "no dvc.lock in the history" in broken(folder, project)["dvc.lock"]
    shutil.copy(exports("dense") / EXPORT, folder)
    for form, told in (("better", "must be one of dense"), ("remote-code", "other bytes|is not beside it")):
        edit(folder / EXPORT, "form", form)
        seal(folder)
        found = audit(folder, project)
        assert not found.holds
        assert re.search(told, " ".join(link.detail for link in found.links))


def test_an_edited_allocation_is_not_the_statements(exported):
    edit(exported / "allocation.json", "units.0.rank", lambda rank: rank - 1)
    edit(exported / EXPORT, "allocation_sha256", file_sha256(exported / "allocation.json"))
    seal(exported)
    assert "allocation" in broken(exported, None)


def flip_weights(exported):
    """One number of the weights, in the largest file."""
    file = max((f for f in exported.iterdir() if f.suffix != ".json"), key=lambda f: f.stat().st_size)
    if file.suffix == ".safetensors":
        tensors = load_file(file)
        next(t for name, t in sorted(tensors.items()) if t.is_floating_point()).view(-1)[0] += 1
        save_file(tensors, file, metadata={"format": "pt"})
    else:
        content = bytearray(file.read_bytes())
        content[-100] ^= 1
        file.write_bytes(content)


def test_other_weights_resealed_are_not_the_released_folders(project, exported):
    flip_weights(exported)
    seal(exported)
    told = broken(exported, project)
    assert set(told) == {"weights"}
    assert "other bytes in" in told["weights"] or "sha256 of model.safetensors" in told["weights"]


def test_weights_made_by_other_versions_are_left_open(project, exports, tmp_path):
    folder = Path(shutil.copytree(exports("dense"), tmp_path / "delivered"))
    flip_weights(folder)
    edit(folder / EXPORT, "versions.torch", "2.6.0")
    seal(folder)
    link = link_of(audit(folder, project), "weights")
    assert (link.finding, "made by torch 2.6.0, here " in link.detail) == ("cannot be checked here", True)


@pytest.mark.parametrize("form", ["gguf", "onnx", "openvino"])
def test_metadata_lead_back_from_a_file_alone_and_must_not_disagree(form, project, exports, tmp_path):
    folder = exports(form)
    (file,) = [f for f in folder.iterdir() if f.suffix in (".gguf", ".onnx", ".xml")]
    assert audit(file, project).holds  # stands for its folder
    for beside in folder.glob(f"{file.stem}.*"):
        shutil.copy(beside, tmp_path)
    alone = tmp_path / file.name
    found = audit(alone, project)
    states = findings(found)
    assert {states[name] for name in ("export", "dvc.lock", "chain", "released folder", "weights")} == {"holds"}
    assert f"variant {VARIANT}" in link_of(found, "export").detail
    assert findings(audit(alone, None))["weights"] == "cannot be checked here"
    content = file.read_bytes()
    alone.write_bytes(content.replace(VARIANT.encode(), b"kfac-99"))
    assert not audit(alone, project).holds
    forged = Path(shutil.copytree(folder, tmp_path / "forged"))
    (forged / file.name).write_bytes(alone.read_bytes())
    seal(forged)
    assert f"variant in the metadata of {file.name} is kfac-99" in broken(forged, None)["metadata"]


def test_a_file_without_metadata_of_ours_is_none_of_ours(project, exports, tmp_path):
    file = Path(shutil.copy(exports("dense") / "model.safetensors", tmp_path))
    link = link_of(audit(file, project), "export")
    assert (link.finding, "audit the folder around it" in link.detail) == ("cannot be checked here", True)
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    assert "damaged" in broken(tmp_path / "model.gguf", None)["export"]


def test_code_that_is_not_the_two_lines_is_named(exports, tmp_path):
    for name, code in ((f"{MODULE}.py", "import drank\nimport os\n"), ("modeling.py", "")):
        folder = Path(shutil.copytree(exports("remote-code"), tmp_path / name))
        (folder / name).write_text(code)
        seal(folder)
        assert set(broken(folder, None)) == {"weights"}


def test_the_command_tells_an_exports_form_and_its_status(project, exports, tmp_path):
    done = run(project, "drank", "audit", str(exports("dense")), "--json")
    assert json.loads(done.stdout)["chain"]["export"] == read_json(exports("dense") / EXPORT)
    done = run(tmp_path, "drank", "audit", str(exports("dense")), check=False)
    assert done.returncode == 2
    assert "export        dense, by drank" in done.stdout
