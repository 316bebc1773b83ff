"""A disk that is full at chosen places, under every stage and command that writes.

``python -m tests.faults.disk --n 200`` makes a small project on a small file system of its own (so it needs root, or a
user namespace: ``unshare -Urm``), runs everything on too little space, and prints a table::

    tried       so often, each with another number of free pages, all too few for what is to be written
    survived    it ended in exit status 1 and one message that names a path and says that the disk is full; every file
                was then as before, and nothing half or hidden was left; with space again, the same bytes came out
    lost        anything else
"""

import contextlib
import importlib
import io
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

from drank.cli import commands
from drank.project.command import run_app, run_stage
from tests.faults.campaign import campaign, check, contents

PAGE = 4096
VARIANT = "kfac-80"
MODEL = f"data/models/{VARIANT}"


class Writes(NamedTuple):
    """Something that writes.

    Attributes:
        arguments: of the command line.
        outputs: paths that it writes, each as a whole; what is tried leaves too little space for the first.
        command: True for a command of drank, False for a stage.
        fresh: that there must be nothing yet where it writes.
    """

    arguments: tuple[str, ...]
    outputs: tuple[str, ...]
    command: bool = False
    fresh: bool = False


WRITES = {
    "raw": Writes((), ("data/raw/text", "data/raw/model")),
    "sampling": Writes((), ("data/sampling",)),
    "covariance": Writes(("0",), ("data/covariance/0",)),
    "spectrum": Writes(("kfac",), ("data/spectrum/kfac",)),
    "allocation": Writes((VARIANT,), (f"data/allocation/{VARIANT}.json", f"data/allocation/{VARIANT}.csv")),
    "compression": Writes((VARIANT,), (f"data/compression/{VARIANT}",)),
    "evaluation": Writes((VARIANT,), (f"results/{VARIANT}.json", f"data/evaluation/{VARIANT}.json")),
    "release": Writes((VARIANT,), (MODEL,)),
    "report": Writes((), ("results/summary.csv", "results/figures", "results/report.html")),
    "export": Writes((MODEL, "plain", "--dense"), ("plain",), command=True, fresh=True),
    "diff": Writes((VARIANT, "d-rank-80", "--picture", "ranks.png"), ("ranks.png",), command=True),
}


@contextlib.contextmanager
def small_disk(project: Path, place: Path, spare: int = 16 * 2**20) -> Iterator[Path]:
    """A copy of a project, without its cache, on a file system of its own with so many bytes to spare.

    Raises:
        PermissionError: this user may mount nothing.
    """
    size = sum(file.stat().st_size + PAGE for file in project.rglob("*") if file.is_file()) + spare
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", place], capture_output=True)
    if mounted.returncode != 0:
        raise PermissionError(f"mount: {mounted.stderr.decode().strip()}")
    try:
        root = place / "project"
        shutil.copytree(project, root, symlinks=True, ignore=shutil.ignore_patterns("cache", "__pycache__"))
        yield root
    finally:
        subprocess.run(["umount", "--lazy", place], check=True)


@contextlib.contextmanager
def free_pages(root: Path, n_pages: int) -> Iterator[None]:
    """No more than so many pages of the file system are free for a while."""
    assert root.parent.is_mount(), f"{root.parent}: not the small file system, and the machine's own must not be filled"
    filler = root.parent / "filler"
    with filler.open("wb") as stream:
        os.posix_fallocate(stream.fileno(), 0, shutil.disk_usage(root).free - n_pages * PAGE)
    try:
        yield
    finally:
        filler.unlink()


def run(root: Path, name: str) -> tuple[int, str]:
    """A stage or command in the project, in this process: its exit status, and what it said on standard error."""
    writes, before, arguments = WRITES[name], Path.cwd(), sys.argv
    os.chdir(root)
    sys.argv = [name, *[name] * writes.command, *writes.arguments]
    try:
        with contextlib.redirect_stderr(io.StringIO()) as said, contextlib.redirect_stdout(io.StringIO()):
            if writes.command:
                run_app(commands)
            else:
                run_stage(importlib.import_module(f"stages.{name}").main)
    except SystemExit as end:
        return int(end.code or 0), said.getvalue()
    finally:
        os.chdir(before)
        sys.argv = arguments
    raise AssertionError("a command line ends in SystemExit")


def n_pages(path: Path) -> int:
    """Pages that a file or folder takes."""
    files = [file for file in (path, *path.rglob("*")) if file.is_file()]
    return sum(-(-file.stat().st_size // PAGE) for file in files)


class Disk:
    """Stages and commands in a project on a small disk, on too little space."""

    def __init__(self, root: Path, seed: int) -> None:
        self.root, self.draw = root, random.Random(seed)
        self.expected: dict[str, tuple[dict[str, str], int]] = {}

    def once(self, name: str) -> tuple[dict[str, str], int]:
        """The command on enough space: all files after it, and the pages of its first output."""
        if name not in self.expected:
            status, said = run(self.root, name)
            assert status == 0, said
            self.expected[name] = contents(self.root, "."), n_pages(self.root / WRITES[name].outputs[0])
        return self.expected[name]

    def full(self, name: str) -> tuple[str]:
        """The command on fewer pages than its first output takes; the outputs are there before, or are not.

        Raises:
            Lost: see the columns above.
        """
        (after, pages), writes = self.once(name), WRITES[name]
        if writes.fresh or self.draw.random() < 0.5:
            self._remove(writes.outputs)
        before = contents(self.root, ".")
        with free_pages(self.root, self.draw.randrange(pages)):
            status, said = run(self.root, name)
        left = contents(self.root, ".")
        check(status == 1 and said.count("error: ") == 1 and "Traceback" not in said, said)
        check("the disk is full" in said and any(output in said for output in writes.outputs), said)
        check(before.keys() <= left.keys(), "files are gone")
        check(all(after.get(file) == left[file] for file in left if before.get(file) != left[file]), "files are torn")
        check(run(self.root, name)[0] == 0 and contents(self.root, ".") == after, "not recovered")
        if writes.fresh:
            self._remove(writes.outputs)
            self.expected.pop(name)
        return ("survived",)

    def _remove(self, outputs: tuple[str, ...]) -> None:
        for output in outputs:
            path = self.root / output
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def main() -> None:
    with campaign(__doc__, 110, ("tried", "survived", "lost")) as work:
        (work.scratch / "disk").mkdir()
        with small_disk(work.project(), work.scratch / "disk") as root:
            disk = Disk(root, work.asked.seed)
            work.try_each({name: partial(disk.full, name) for name in WRITES})


if __name__ == "__main__":
    main()
