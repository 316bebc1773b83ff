"""A disk that is full at chosen places, under every stage and command that writes.

``python -m tests.faults.disk --n 200`` makes a small project on a small file system of its own (so it needs root, or a
user namespace: ``unshare -Urm``), runs everything on too little space, and prints a table::

    tried       so often, each with another number of free pages, all too few for what is to be written
    told        ended in exit status 1 and one message that names a path and says that the disk is full
    kept        every file was then as before, and nothing half or hidden was left
    recovered   with space again, the same command gave the same bytes
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
from dataclasses import dataclass
from pathlib import Path

from drank.cli import commands
from drank.project.command import run_app, run_stage
from tests.faults.campaign import campaign, contents

PAGE = 4096
VARIANT = "kfac-80"
MODEL = f"data/models/{VARIANT}"


@dataclass(frozen=True)
class Writes:
    """Something that writes.

    Attributes:
        arguments: of the command line.
        outputs: paths that it writes, each as a whole; what is tried leaves too little space for the first.
        fresh: that there must be nothing yet where it writes.
    """

    arguments: tuple[str, ...]
    outputs: tuple[str, ...]
    fresh: bool = False


STAGES = {
    "raw": Writes((), ("data/raw/text", "data/raw/model")),
    "sampling": Writes((), ("data/sampling",)),
    "covariance": Writes(("0",), ("data/covariance/0",)),
    "spectrum": Writes(("kfac",), ("data/spectrum/kfac",)),
    "allocation": Writes((VARIANT,), (f"data/allocation/{VARIANT}.json", f"data/allocation/{VARIANT}.csv")),
    "compression": Writes((VARIANT,), (f"data/compression/{VARIANT}",)),
    "evaluation": Writes((VARIANT,), (f"results/{VARIANT}.json", f"data/evaluation/{VARIANT}.json")),
    "release": Writes((VARIANT,), (MODEL,)),
    "report": Writes((), ("results/summary.csv", "results/figures", "results/report.html")),
}
COMMANDS = {
    "export": Writes((MODEL, "plain", "--dense"), ("plain",), fresh=True),
    "diff": Writes((VARIANT, "d-rank-80", "--picture", "ranks.png"), ("ranks.png",)),
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
    before, arguments = Path.cwd(), sys.argv
    os.chdir(root)
    sys.argv = [name, *(STAGES[name].arguments if name in STAGES else (name, *COMMANDS[name].arguments))]
    try:
        with contextlib.redirect_stderr(io.StringIO()) as said, contextlib.redirect_stdout(io.StringIO()):
            if name in STAGES:
                run_stage(importlib.import_module(f"stages.{name}").main)
            else:
                run_app(commands)
    except SystemExit as end:
        return int(end.code or 0), said.getvalue()
    finally:
        os.chdir(before)
        sys.argv = arguments
    raise AssertionError("a command line ends in SystemExit")


def n_pages(root: Path, output: str) -> int:
    """Pages that an output takes."""
    files = [file for file in (root / output, *(root / output).rglob("*")) if file.is_file()]
    return sum(-(-file.stat().st_size // PAGE) for file in files)


@dataclass(frozen=True)
class Seen:
    """One try: see the columns above."""

    name: str
    free: int
    message: str
    told: bool
    kept: bool
    recovered: bool


class Disk:
    """Stages and commands in a project on a small disk, on too little space."""

    def __init__(self, root: Path, seed: int) -> None:
        self.root, self.draw = root, random.Random(seed)
        self.expected: dict[str, dict[str, str]] = {}
        self.pages: dict[str, int] = {}

    def once(self, name: str) -> dict[str, str]:
        """The command on enough space: all files after it."""
        if name not in self.expected:
            status, said = run(self.root, name)
            assert status == 0, said
            self.expected[name] = contents(self.root, ".")
            self.pages[name] = n_pages(self.root, self._writes(name).outputs[0])
        return self.expected[name]

    def full(self, name: str) -> Seen:
        """The command on fewer pages than its first output takes; the outputs are there before, or are not."""
        after = self.once(name)
        writes = self._writes(name)
        if writes.fresh or self.draw.random() < 0.5:
            for output in writes.outputs:
                remove(self.root / output)
        before = contents(self.root, ".")
        free = self.draw.randrange(self.pages[name])
        with free_pages(self.root, free):
            status, said = run(self.root, name)
        left = contents(self.root, ".")
        told = status == 1 and said.count("error: ") == 1 and "the disk is full" in said and "Traceback" not in said
        named = any(f"{output}" in said for output in writes.outputs)
        whole = all(after.get(file) == digest for file, digest in left.items() if before.get(file) != digest)
        recovered = run(self.root, name)[0] == 0 and contents(self.root, ".") == after
        if writes.fresh:
            for output in writes.outputs:
                remove(self.root / output)
            self.expected.pop(name)
        return Seen(name, free, said, told and named, whole and before.keys() <= left.keys(), recovered)

    def _writes(self, name: str) -> Writes:
        return (STAGES | COMMANDS)[name]


def remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def main() -> None:
    with campaign(__doc__, 110, ("tried", "told", "kept", "recovered")) as work:
        (work.scratch / "disk").mkdir()
        with small_disk(work.project(), work.scratch / "disk") as root:
            disk, names = Disk(root, work.asked.seed), [*STAGES, *COMMANDS]
            for i in range(work.asked.n):
                seen = disk.full(names[i % len(names)])
                found = {"told": seen.told, "kept": seen.kept, "recovered": seen.recovered}
                work.counts.rows[seen.name].update(tried=1, **found)
                if not all(found.values()):
                    work.counts.lost("lost", seen)


if __name__ == "__main__":
    main()
