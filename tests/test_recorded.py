"""Damage at rest: what DVC does not see, a stage refuses to read, and ``drank check`` finds and takes away."""

import hashlib
import json
import os
import shutil
import stat

import pytest
import yaml

from drank.audit.ledger import Ledger
from drank.cli.check import check
from drank.cli.options import CommandError
from drank.project.damage import find_damage
from drank.project.dvc import ConfigurationError, DamageError, Inputs, LockError, cache_folder, dvc_md5, entry
from drank.project.files import write_text
from tests.conftest import run


def md5(text):
    return hashlib.md5(text.encode()).hexdigest()


def record(root, outs, prefix=""):
    """A dvc.lock, and the cache's lists of folders, of what lies there now."""
    (root / ".dvc").mkdir(exist_ok=True)
    rows = {stage: {"outs": [{"path": prefix + path, "md5": dvc_md5(root / path)}]} for stage, path in outs.items()}
    for path in outs.values():
        if (root / path).is_dir():
            files = sorted(f for f in (root / path).rglob("*") if f.is_file())
            rows_of = [{"md5": dvc_md5(f), "relpath": f.relative_to(root / path).as_posix()} for f in files]
            write_text(entry(cache_folder(root), dvc_md5(root / path)), json.dumps(rows_of))
    write_text(root / "dvc.lock", yaml.safe_dump({"stages": rows}))


@pytest.fixture
def small(tmp_path):
    for name in ("data/a.json", "data/b/x.txt", "data/b/deep/y.txt"):
        write_text(tmp_path / name, name)
    record(tmp_path, {"first": "data/a.json", "second": "data/b"})
    return tmp_path


def test_what_is_as_recorded_is_a_path(small):
    inputs = Inputs(small)
    for name in ("data/a.json", "data/b", "data/b/x.txt", "data/b/deep", "data/b/deep/y.txt"):
        assert inputs / name == small / name
    assert inputs / "data/c.json" == small / "data/c.json"  # nobody wrote it; the reader says that it is not there
    assert inputs / "data/b/z.txt" == small / "data/b/z.txt"


@pytest.mark.parametrize(
    ("damaged", "read", "named"),
    [
        ("data/a.json", "data/a.json", "data/a.json"),
        ("data/b/x.txt", "data/b/x.txt", "data/b/x.txt"),
        ("data/b/deep/y.txt", "data/b", "data/b/deep/y.txt"),
        ("data/b/deep/y.txt", "data/b/deep", "data/b/deep/y.txt"),
    ],
)
def test_what_differs_is_named(small, damaged, read, named):
    write_text(small / damaged, "data")
    with pytest.raises(DamageError) as caught:
        Inputs(small) / read
    assert str(caught.value).startswith(f"{small / named}: damaged, or changed since ")
    assert md5("data") in str(caught.value) or dvc_md5(small / "data/b") in str(caught.value)


def test_of_a_folder_only_what_is_read_is_compared(small):
    write_text(small / "data/b/deep/y.txt", "data")
    write_text(small / "data/b/new.txt", "data")
    assert (Inputs(small) / "data/b/x.txt").is_file()
    with pytest.raises(DamageError, match="data/b/new.txt"):
        Inputs(small) / "data/b/new.txt"


@pytest.mark.parametrize("damaged", [False, True])
def test_without_the_list_of_a_folder_all_of_it_is_compared(small, damaged):
    shutil.rmtree(cache_folder(small))
    if damaged:
        write_text(entry(cache_folder(small), dvc_md5(small / "data/b")), "[]")
    assert (Inputs(small) / "data/b/x.txt").is_file()
    write_text(small / "data/b/deep/y.txt", "data")
    with pytest.raises(DamageError, match="data/b: damaged"):
        Inputs(small) / "data/b/x.txt"


def test_of_two_stages_with_one_out_either_may_have_written_it(small):
    lock = yaml.safe_load((small / "dvc.lock").read_text())
    lock["stages"]["healing"] = {"outs": [{"path": "data/a.json", "md5": md5("healed")}]}
    write_text(small / "dvc.lock", yaml.safe_dump(lock))
    assert (Inputs(small) / "data/a.json").is_file()
    write_text(small / "data/a.json", "healed")
    assert (Inputs(small) / "data/a.json").is_file()
    write_text(small / "data/a.json", "neither")
    with pytest.raises(DamageError):
        Inputs(small) / "data/a.json"


def test_a_root_below_the_folder_where_its_stages_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    root = tmp_path.__class__("study")
    write_text(root / "data/a.json", "a")
    record(root, {"first": "data/a.json"}, prefix="study/")
    assert (Inputs(root) / "data/a.json").is_file()
    write_text(root / "data/a.json", "b")
    with pytest.raises(DamageError, match="study/data/a.json"):
        Inputs(root) / "data/a.json"


def test_without_a_lock_nothing_is_compared_and_a_bad_lock_is_refused(tmp_path):
    write_text(tmp_path / "data/a.json", "a")
    assert (Inputs(tmp_path) / "data/a.json").is_file()
    write_text(tmp_path / "dvc.lock", "stages: [")
    with pytest.raises(LockError, match="dvc.lock"):
        Inputs(tmp_path)


def test_what_cannot_be_compared_is_counted_and_never_called_as_recorded(small, capsys):
    check(small)
    told = capsys.readouterr().out
    assert told.startswith("2 outs are as recorded here; 2 of them have no whole copy in DVC's cache")
    assert "data/a.json, data/b" in told
    shutil.rmtree(cache_folder(small))
    (small / "data/a.json").unlink()
    with pytest.raises(CommandError, match="^1 outs could not be compared$"):
        check(small)
    assert "data/a.json: cannot say: not here, nor in DVC's cache; `dvc pull` or `dvc repro`" in capsys.readouterr().out
    (small / "data/b/x.txt").write_text("other")
    with pytest.raises(CommandError, match="^1 files are not as recorded and 1 outs could not be compared; "):
        check(small)


def test_nothing_is_taken_away_where_git_cannot_say_what_it_keeps(small, capsys, monkeypatch):
    run(small, "git", "init", "-q")
    write_text(small / "data/a.json", "edited")
    monkeypatch.setenv("GIT_TEST_ASSUME_DIFFERENT_OWNER", "1")
    with pytest.raises(CommandError, match="1 files are not as recorded; 0 taken away"):
        check(small, mend=True)
    assert "cannot say what git keeps" in capsys.readouterr().out
    assert (small / "data/a.json").read_text() == "edited"


def test_a_file_that_outs_share_in_the_cache_is_damaged_once(small):
    shutil.copytree(small / "data/b", small / "data/c")
    record(small, {"first": "data/b", "second": "data/c"})
    shared = entry(cache_folder(small), dvc_md5(small / "data/b/x.txt"))
    write_text(shared, "damaged")
    assert [damage.path for damage in find_damage(small).damages] == [shared]


def test_a_configuration_of_dvc_that_cannot_be_read_is_told_and_says_nothing_of_the_bytes(small):
    (small / ".dvc/config").write_text("[cache\n    dir = x")
    with pytest.raises(ConfigurationError, match=r"\.dvc/config: DVC's configuration cannot be read: "):
        check(small)
    ledger = Ledger()
    ledger.check("data", lambda: str(cache_folder(small)))
    assert ledger.links["data"].finding == "cannot be checked here"


def test_the_cache_is_where_dvc_config_says(tmp_path, monkeypatch):
    for level in ("GLOBAL", "SYSTEM"):
        (tmp_path / level).mkdir()
        monkeypatch.setenv(f"DVC_{level}_CONFIG_DIR", str(tmp_path / level))
    (tmp_path / "project/.dvc").mkdir(parents=True)
    assert cache_folder(tmp_path / "project") == tmp_path / "project/.dvc/cache/files/md5"
    shutil.rmtree(tmp_path / "project/.dvc")
    run(tmp_path / "project", "dvc", "init", "--no-scm")
    for flag, place in (
        ("--system", str(tmp_path / "system")), ("--global", str(tmp_path / "mine")), ("--global", "../relative"),
        ("--project", "../shared"), ("--local", str(tmp_path / "own")),
    ):  # fmt: skip
        run(tmp_path / "project", "dvc", "cache", "dir", flag, place)
        told = run(tmp_path / "project", "dvc", "cache", "dir").stdout.strip()
        assert cache_folder(tmp_path / "project").resolve() == (tmp_path / "project" / told / "files/md5").resolve()


def flip(file):
    """One bit, with the file's size, times and mode as before."""
    status = file.stat()
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.chmod(0o644)
    file.write_bytes(content)
    file.chmod(stat.S_IMODE(status.st_mode))
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.mark.pipeline
def test_a_bit_that_flips_at_rest_is_refused_found_taken_away_and_made_again(project):
    windows = project / "data/sampling/test.safetensors"
    before, lock = windows.read_bytes(), (project / "dvc.lock").read_bytes()
    copy = entry(cache_folder(project), dvc_md5(windows))
    assert run(project, "drank", "check").stdout.strip() == "every file is as recorded"
    clean = "Data and pipelines are up to date."
    assert run(project, "dvc", "status").stdout.strip() == clean  # and now DVC knows the times of every file

    for file in (copy, windows):
        if file.read_bytes() == before:  # a link to the other has been flipped already
            flip(file)
    assert run(project, "dvc", "status").stdout.strip() == clean
    found = run(project, "drank", "check", check=False)
    assert found.returncode == 1
    assert {(project / line.split(": ")[0]).resolve() for line in found.stdout.splitlines()} == {windows, copy}

    figures = project / "data/evaluation/kfac-80.json"
    found = dvc_md5(figures)
    refused = run(project, "dvc", "repro", "--force", "--single-item", "evaluation@kfac-80", check=False)
    assert refused.returncode != 0, refused.stdout
    assert f"error: {windows.relative_to(project)}: damaged" in refused.stderr
    assert not figures.exists()  # DVC has taken it away; it is in the cache

    mended = run(project, "drank", "check", "--mend")
    assert mended.stdout.splitlines()[-1] == "2 taken away; `dvc repro` makes them again"
    run(project, "dvc", "repro")
    assert windows.read_bytes() == before
    assert dvc_md5(figures) == found
    assert (project / "dvc.lock").read_bytes() == lock
    assert run(project, "drank", "check").stdout.strip() == "every file is as recorded"


@pytest.mark.pipeline
def test_what_git_keeps_is_named_and_not_taken_away(project):
    run(project, "git", "init", "-q")
    edited, cached = project / "results/kfac-80.json", project / "data/sampling/test.safetensors"
    before = edited.read_text()
    edited.write_text(before + "\n")
    flip(cached)
    told = run(project, "drank", "check", "--mend", check=False)
    assert told.returncode == 1
    (line,) = (line for line in told.stdout.splitlines() if line.startswith("results"))
    assert "`git checkout -- results/kfac-80.json` or `dvc repro -f evaluation@kfac-80` brings it back" in line
    assert edited.read_text() == before + "\n"
    assert not cached.exists()
    edited.write_text(before)
    run(project, "dvc", "repro")
    assert run(project, "drank", "check").stdout.strip() == "every file is as recorded"


@pytest.mark.pipeline
def test_notes_of_dvc_that_a_kill_has_torn_are_told_deleted_and_made_anew(project):
    lock, rwlock = project / "dvc.lock", project / ".dvc/tmp/rwlock"
    before = lock.read_bytes()
    lock.write_bytes(before[: len(before) // 2].rpartition(b"md5: ")[0])
    rwlock.write_text("")
    refused = run(project, "drank", "run", check=False)
    assert refused.returncode == 1
    assert "dvc.lock: " in refused.stderr.splitlines()[-1]
    assert "`drank check --mend`" in refused.stderr.splitlines()[-1]
    told = run(project, "drank", "check", check=False)
    assert told.returncode == 1
    assert [line.split(": ")[0] for line in told.stdout.splitlines()] == ["dvc.lock", ".dvc/tmp/rwlock"]
    assert "2 deleted" in run(project, "drank", "check", "--mend").stdout
    assert "Running stage" not in run(project, "dvc", "repro").stdout  # it remembers
    assert lock.read_bytes() == before
