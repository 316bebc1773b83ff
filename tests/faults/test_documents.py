"""Documents that nobody should write, a few hundred of each kind (see ``documents``, which tries as many as asked)."""

import gzip
import importlib
import io
import json
import os
import struct
import zipfile
from pathlib import Path

import pytest

from drank.audit import audit
from drank.project.dvc import LockError, parse_lock
from drank.project.files import FileError, read_rows
from drank.project.params import ParamsError, read_params
from drank.project.sources import SourceError
from drank.views.compared import compare_targets
from tests.faults.documents import FRAGMENTS, Tries, outcome
from tests.test_sources import fetch_model, fetch_text
from tests.tiny import PARAMS


@pytest.fixture(scope="module")
def tries(reproduced, tmp_path_factory):
    return Tries(tmp_path_factory.mktemp("documents"), reproduced).all()


COUNTS = {
    "params": 150, "folder documents": 60, "folder bytes": 40, "tensors": 200, "texts": 100, "gguf": 5, "config": 200,
    "config file": 25, "lock": 12, "published": 12,
}  # fmt: skip


@pytest.mark.parametrize(("kind", "n"), COUNTS.items())
def test_a_document_is_read_or_refused_in_one_message(tries, kind, n):
    outcomes = {seed: outcome(tries[kind], seed) for seed in range(n)}
    assert {seed: error for seed, (came, error) in outcomes.items() if came == "traceback"} == {}
    assert any(came == "refused" for came, _ in outcomes.values())


@pytest.mark.parametrize("fragment", [f for f in FRAGMENTS if f not in ("...", "&a", "\ufeff", "%YAML 9.9")])
def test_no_fragment_of_yaml_is_more_than_a_mistake(tmp_path, fragment):
    path = tmp_path / "params.yaml"
    path.write_text(PARAMS + fragment + "\n")
    with pytest.raises(ParamsError, match="params"):
        read_params(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("  seed: 0\n", "  seed: 0\n  seed: 1\n"), 'duplicate key "seed"'),
        (("batch_windows: 4", "offload: yes\n  batch_windows: 4"), "offload' = 'yes'.*valid boolean"),
        (("  seed: 0\n", "  seed: 0\n  2020-01-01: 1\n"), "keys must be str.* date"),
        (("threads: 1", "threads: " + "9" * 30), "beyond 64 bits"),
        (("  news:", "  ../news:"), "text.../news"),
        (("  d-rank-80:", "  ../../d-rank-80:"), "variants.../../d-rank-80"),
    ],
)
def test_what_dvc_would_read_otherwise_or_could_not_name_a_file_by_is_refused(tmp_path, change, message):
    path = tmp_path / "params.yaml"
    assert change[0] in PARAMS
    path.write_text(PARAMS.replace(*change, 1))
    with pytest.raises(ParamsError, match=f"(?s){message}"):
        read_params(path)
    path.write_bytes(PARAMS.encode("utf-16"))
    with pytest.raises(ParamsError, match="not UTF-8"):
        read_params(path)


def packed(name, content, **attributes):
    entry, stream = zipfile.ZipInfo(name), io.BytesIO()
    for key, value in attributes.items():
        setattr(entry, key, value)
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr(entry, content)
    return stream.getvalue()


@pytest.mark.parametrize(
    ("name", "attributes"),
    [("../../../out.txt", {}), ("/drank-was-here/out.txt", {}), ("link.txt", {"external_attr": 0o120777 << 16})],
    ids=["slip", "absolute", "symlink"],
)
def test_names_in_an_archive_are_never_paths(tmp_path, name, attributes):
    folder = tmp_path / "a/b"
    folder.mkdir(parents=True)
    (folder / "t.zip").write_bytes(packed(name, "hello", **attributes))
    fetch_text("local:t.zip", folder / "texts/out.jsonl", folder / "downloads", root=folder)
    written = sorted(file.relative_to(tmp_path).as_posix() for file in tmp_path.rglob("*") if file.is_file())
    assert written == ["a/b/t.zip", "a/b/texts/out.jsonl"]
    assert not Path("/drank-was-here").exists()
    assert (folder / "texts/out.jsonl").read_text() == '{"text": "hello"}\n'


def packed_zeros(method):
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", method) as archive, archive.open("t.txt", "w") as member:
        for _ in range(5):
            member.write(bytes(2**24))
    return stream.getvalue()


@pytest.mark.parametrize(
    ("name", "pack"),
    [
        ("t.zip", lambda: packed_zeros(zipfile.ZIP_DEFLATED)),
        ("t.zip", lambda: packed_zeros(zipfile.ZIP_BZIP2)),
        ("t.txt.gz", lambda: gzip.compress(bytes(5 * 2**24), 1)),
        ("t.csv.gz.gz", lambda: gzip.compress(gzip.compress(b"text\n" + bytes(5 * 2**24)))),
    ],
)
def test_an_archive_that_unpacks_without_end_is_refused(tmp_path, name, pack):
    (tmp_path / name).write_bytes(pack())
    with pytest.raises(SourceError, match=r"unpacks to more than \d+ bytes, 200 times its size"):
        fetch_text(f"local:{name}", tmp_path / "out.jsonl", tmp_path, root=tmp_path)
    assert not (tmp_path / "out.jsonl").exists()


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("x" * 300, "not a path that can be read: .*too long"),
        ("~nobody-of-this-name/x.txt", "not a path that can be read"),
        ("a\0b", "not a path that can be read"),
        ("/dev/zero", "neither a file nor a folder"),
        ("pipe", "neither a file nor a folder"),
        ("loop.txt", "not a path that can be read: .*symbolic links"),
        ("file/x.txt", "not found"),
    ],
    ids=["long", "nobody", "zero byte", "device", "pipe", "loop", "within a file"],
)
def test_a_path_that_cannot_be_read_to_its_end_is_refused(tmp_path, path, message):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop.txt").symlink_to("loop.txt")
    (tmp_path / "file").touch()
    for fetch, out in ((fetch_text, "out.jsonl"), (fetch_model, "out")):
        with pytest.raises(SourceError, match=message):
            fetch(f"local:{path}", tmp_path / out, tmp_path, root=tmp_path)
        assert not (tmp_path / out).exists()


@pytest.mark.parametrize(
    ("name", "target"),
    [("zero", "/dev/zero"), ("gone", "nowhere"), ("loop", "loop"), ("up", ".."), ("provenance.json", "/dev/zero")],
)
def test_a_link_in_a_folder_that_leads_to_no_file_is_refused(tmp_path, name, target):
    (tmp_path / "model").mkdir()
    (tmp_path / "model/weights").touch()
    (tmp_path / "model" / name).symlink_to(target)
    with pytest.raises(FileError, match=f"model/{name}: neither a file, a folder nor a link to a file"):
        audit(tmp_path / "model", None)


def test_a_pipe_and_a_name_in_bytes_are_refused_in_a_folder(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(FileError, match="pipe: neither"):
        audit(tmp_path, None)
    (tmp_path / "pipe").unlink()
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff")).touch()
    with pytest.raises(FileError, match=r"\\udcff: the name is not UTF-8"):
        audit(tmp_path, None)


@pytest.mark.parametrize("stage", ["spectrum", "covariance", "allocation", "evaluation", "compression", "release"])
@pytest.mark.parametrize("name", ["../../out", "..", "", "nosuch", "{}/out", "a\n", "\u202ekfac", "KFAC", "-x"])
def test_a_stage_asked_for_a_name_that_is_not_in_params_writes_nothing(tmp_path, stage, name):
    root = tmp_path / "a/b"
    root.mkdir(parents=True)
    (root / "params.yaml").write_text(PARAMS)
    with pytest.raises(ParamsError, match="no .* in"):
        importlib.import_module(f"stages.{stage}").main(name.format(tmp_path), root)  # an absolute path among them
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [root / "params.yaml"]


def test_a_tensor_of_a_type_that_torch_packs_is_refused_by_name(tmp_path):
    header = json.dumps({"a": {"dtype": "F4", "shape": [8, 8], "data_offsets": [0, 32]}}).encode()
    (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(32))
    with pytest.raises(FileError, match="x.safetensors: damaged"):
        read_rows(tmp_path / "x.safetensors", 2)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.jsonl", b'{"text": ' + b"[" * 100_000 + b"\n", "cannot be read as .jsonl"),
        ("t.jsonl", b'{"text": "half \\ud800"}\n', "document 1 holds .*half of a character"),
        ("t.zip", packed("t.txt", "x").replace(b"\x14\x00\x00\x00", b"\x14\x00\x01\x00"), "encrypted"),
        ("t.zip", packed("t.txt", "x").replace(b"\x00\x00\x00\x00!", b"\x00\x63\x00\x00!"), "damaged|not supported"),
    ],
    ids=["nested without end", "half a character", "password", "rare method"],
)
def test_a_text_that_would_be_misread_or_cannot_be_is_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(SourceError, match=message):
        fetch_text(f"local:{name}", tmp_path / "out.jsonl", tmp_path, root=tmp_path)
    assert not (tmp_path / "out.jsonl").exists()


@pytest.mark.parametrize(
    "text",
    ["stages: 3", "stages: [a]", "stages: {a: 1}", "stages: {a: {outs: [{path: x}]}}", "stages: {a: {outs: 3}}",
     "stages: {a: {deps: [{path: x, md5: 3}]}}", "a: 2020-13-45", "stages: {a: {outs: [[]]}}",
     "stages: {a: {params: {params.yaml: true}}}", "stages: {a: {outs: [{path: x, md5: ../../x.dir}]}}",
     *(f"stages: {{a: {{outs: [{{path: {path}, md5: {'0' * 32}}}]}}}}" for path in ("/etc/passwd", "a/../../b")),
     "stages: " + "[" * 200_000, "stages: " + "{a: " * 200_000],  # libyaml would end the process
)  # fmt: skip
def test_a_lock_that_is_none_is_named(text):
    with pytest.raises(LockError, match="dvc.lock"):
        parse_lock(text, "dvc.lock")


def test_a_damaged_allocation_is_named_by_the_key_that_is_wrong(tmp_path):
    (tmp_path / "allocation.json").write_text(json.dumps({"format_version": 1, "variant": 3}))
    with pytest.raises(FileError, match=r"allocation\.json: variant: Input should be a valid string"):
        compare_targets(tmp_path, str(tmp_path), str(tmp_path))
