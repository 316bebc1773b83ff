"""Files: whole or not at all, equal bytes for equal content, errors that name the file."""

import errno
import hashlib
import json
import math
import re
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save

from drank.project.files import (
    FileError,
    JsonLinesFolder,
    TensorFolder,
    file_sha256,
    read_json,
    read_rows,
    read_tensors,
    replacing_folder,
    scratch_folder,
    weights_sha256,
    write_bytes,
    write_json,
    write_tensors,
    write_text,
)
from drank.project.refusals import refusal

documents = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
).filter(lambda value: "\\ud" not in json.dumps(value))  # lone surrogates are not text


CUT = save({"x": torch.zeros(100)})[:-1]


def names(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


def test_json_is_sorted_indented_and_ends_in_a_newline(tmp_path):
    write_json(tmp_path / "deep" / "er" / "a.json", {"b": [1, "é"], "a": None})
    assert (tmp_path / "deep/er/a.json").read_text() == '{\n  "a": null,\n  "b": [\n    1,\n    "é"\n  ]\n}\n'


@given(documents)
def test_json_comes_back_as_it_was(tmp_path_factory, value):
    path = tmp_path_factory.mktemp("json") / "a.json"
    write_json(path, value)
    assert read_json(path) == value


@pytest.mark.parametrize("value", [{"a": {"b": [1.0, math.nan]}}, {"loss": math.inf}, (-math.inf,), "\ud800"])
def test_json_that_cannot_be_written_leaves_the_old_file_and_no_litter(tmp_path, value):
    path = tmp_path / "a.json"
    write_json(path, 1)
    with pytest.raises(ValueError, match=r"a\.json: not written: a number in it is NaN or infinite|surrogates"):
        write_json(path, value)
    assert read_json(path) == 1
    assert names(tmp_path) == ["a.json"]


def test_writing_over_a_link_replaces_the_link_and_not_the_file_it_points_to(tmp_path):
    cached = tmp_path / "cached"
    cached.write_text("cached")
    (tmp_path / "out").symlink_to(cached)
    write_text(tmp_path / "out", "new")
    assert cached.read_text() == "cached"
    assert not (tmp_path / "out").is_symlink()


def test_tensors_come_back_with_shape_and_dtype_also_from_a_slice(tmp_path):
    whole = torch.arange(12.0).reshape(3, 4)
    tensors = {
        "slice": whole[:, 1:3],
        "transposed": whole.T,
        "half": whole.bfloat16(),
        "order": torch.tensor([2, 0]),
    }
    write_tensors(tmp_path / "a.safetensors", tensors)
    back = read_tensors(tmp_path / "a.safetensors")
    assert back.keys() == tensors.keys()
    for name, tensor in tensors.items():
        torch.testing.assert_close(back[name], tensor, rtol=0, atol=0)
    assert mode(tmp_path / "a.safetensors") == 0o644


def test_equal_tensors_give_equal_bytes_in_any_order_and_process(tmp_path):
    program = (
        "import sys, torch, pathlib; from drank.project.files import write_tensors\n"
        "t = {'c': torch.arange(3), 'b': torch.ones(2, 2), 'a': torch.arange(6.)}\n"
        "write_tensors(pathlib.Path(sys.argv[1]), t)"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path / "cba")], check=True)
    write_tensors(tmp_path / "abc", {"a": torch.arange(6.0), "b": torch.ones(2, 2), "c": torch.arange(3)})
    assert (tmp_path / "abc").read_bytes() == (tmp_path / "cba").read_bytes()


@pytest.mark.parametrize("read", [read_json, read_tensors])
@pytest.mark.parametrize("content", [None, b"", b"{", b"\xff\xfe\x00 neither", b"\x08" + bytes(20), CUT])
def test_a_missing_or_damaged_file_is_named(tmp_path, read, content):
    path = tmp_path / "broken.file"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(FileError, match=r"broken\.file: " + ("not found" if content is None else "damaged")):
        read(path)


def test_hashes_are_what_sha256sum_prints(tmp_path):
    (tmp_path / "b").write_bytes(b"abc")
    abc = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-2, appendix B.1
    assert file_sha256(tmp_path / "b") == weights_sha256({"b": abc}) == abc
    assert weights_sha256({"b": "1", "a": "2"}) == hashlib.sha256(b"2  a\n1  b\n").hexdigest()


def fill(destination: Path, *texts: str) -> None:
    with replacing_folder(destination) as folder:
        for text in texts:
            (folder / text).write_text(text)


def test_a_folder_is_replaced_as_a_whole(tmp_path):
    fill(tmp_path / "up" / "out", "old")
    fill(tmp_path / "up" / "out", "new")
    assert names(tmp_path) == ["up", "up/out", "up/out/new"]


def test_a_folder_gets_readable_modes_all_the_way_down(tmp_path):
    with replacing_folder(tmp_path / "out") as folder:
        (folder / "sub").mkdir(mode=0o700)
        (folder / "sub" / "private").write_text("")
        (folder / "sub" / "private").chmod(0o600)
    assert mode(tmp_path / "out" / "sub" / "private") == 0o644
    assert mode(tmp_path / "out" / "sub") == mode(tmp_path / "out") == 0o755


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_failure_leaves_the_old_folder_and_no_litter(tmp_path, error):
    def half() -> None:
        with replacing_folder(tmp_path / "out") as folder:
            (folder / "half").write_text("")
            raise error

    fill(tmp_path / "out", "old")
    with pytest.raises(error):
        half()
    assert names(tmp_path) == ["out", "out/old"]


def test_a_run_killed_between_the_two_renames_is_repaired(tmp_path):
    fill(tmp_path / ".out.old", "old")
    with pytest.raises(KeyError), replacing_folder(tmp_path / "out"):
        raise KeyError
    assert names(tmp_path) == ["out", "out/old"]


@pytest.mark.parametrize("left", ["", "/inside"])
def test_a_scratch_folder_starts_empty_and_goes_away(tmp_path, left):
    write_text(tmp_path / f"s{left}", "left by a killed run")
    with scratch_folder(tmp_path / "s") as folder:
        assert names(folder) == []
        (folder / "x").write_text("")
    assert names(tmp_path) == []


def caused(cause):
    """Wrapped, as libraries do."""
    wrapped = RuntimeError("the library has failed")
    wrapped.__cause__ = cause
    return wrapped


@pytest.mark.parametrize(
    ("error", "named"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), r"^out/a\.json: the disk is full \([\d,]+ bytes are left\)"),
        (OSError(errno.EDQUOT, "Quota", "b/.c.json.partial"), r"^b/c\.json: the disk quota is used up \("),
        (PermissionError(errno.EACCES, "denied", "x.json"), r"^x\.json: permission denied; let this user"),
        (OSError(errno.EROFS, "Read-only", "x", None, "y/.z.partial/w"), r"^y/z/w: the file system is read-only; "),
        (caused(OSError(errno.EISDIR, "Is a directory", "model")), "^model: a folder is where a file should be"),
        (RuntimeError("I/O error: No space left on device (os error 28)"), r"^out/a\.json: the disk is full"),
        (RuntimeError("(sqlite3.OperationalError) database or disk is full\nSQL"), r"^out/a\.json: the disk is full"),
    ],
)
def test_what_the_system_refuses_names_the_file_the_rule_and_the_fix(error, named):
    told = refusal(error, Path("out/a.json"))
    assert isinstance(told, FileError)
    assert re.search(named, str(told))
    assert str(told).endswith(", then run the same command again")


@pytest.mark.parametrize(
    "error", [KeyError("k"), ValueError("28"), FileNotFoundError(errno.ENOENT, "no", "x"), OSError()]
)
def test_a_bug_is_no_refusal(error):
    assert refusal(error, Path("x")) is None


@pytest.mark.parametrize(
    ("write", "value"),
    [(write_text, "text"), (write_json, {}), (write_bytes, b""), (write_tensors, {"a": torch.zeros(2)})],
)
def test_a_folder_or_a_file_in_the_way_is_named_and_left(tmp_path, write, value):
    (tmp_path / "folder/inside").mkdir(parents=True)
    (tmp_path / "file").write_text("kept")
    with pytest.raises(FileError, match=r"/folder: a folder is where a file should be"):
        write(tmp_path / "folder", value)
    with pytest.raises(FileError, match=r"/file: a file is where a folder should be"):
        write(tmp_path / "file/a", value)
    assert names(tmp_path) == ["file", "folder", "folder/inside"]
    for read in (read_json, read_tensors, lambda path: read_rows(path, 1)):
        with pytest.raises(FileError, match="a folder is where a file should be"):
            read(tmp_path)


def test_a_folder_of_tensors_or_lines_is_a_mapping(tmp_path):
    tensors, lines = TensorFolder(tmp_path), JsonLinesFolder(tmp_path)
    tensors["inputs/a.b"] = {"x": torch.arange(6).reshape(3, 2)}
    lines["news"] = [{"text": "ä"}, 3]
    assert (list(tensors), list(lines), len(tensors)) == (["inputs/a.b"], ["news"], 1)
    assert torch.equal(tensors["inputs/a.b"]["x"], torch.arange(6).reshape(3, 2))
    assert tensors.rows("inputs/a.b", 2)["x"].shape == (2, 2)
    assert lines["news"] == [{"text": "ä"}, 3]
    assert "inputs/a.b" in tensors
    assert "nosuch" not in tensors
    with pytest.raises(FileError, match="nosuch.jsonl: not found"):
        lines["nosuch"]
    (tmp_path / "news.jsonl").write_text("{")
    with pytest.raises(FileError, match="news.jsonl: damaged, not JSON lines"):
        lines["news"]
    del tensors["inputs/a.b"]
    assert list(tensors) == []
