"""Which allocation produced this model? The chain from a folder of weights back to its sources, link by link.

``folder`` checks what the folder says of itself, ``repository`` what git, dvc.lock and DVC's cache say of it,
``rebuilt`` compares it with one that was built again, ``exported`` leads from an export to the folder it was made of.
Each link holds, does not hold, or cannot be checked here.
"""

import shlex
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from drank.audit.exported import check_exported, check_weights, exported_at
from drank.audit.folder import Folder, check_folder
from drank.audit.ledger import BrokenLinkError, Ledger, Link, Source, UncheckableError
from drank.audit.repository import Record, check_repository, find_record
from drank.project.files import FileError, check_plain
from drank.project.git import origin

if TYPE_CHECKING:
    from drank.tracking import VariantRun

__all__ = ["Audit", "Link", "audit", "find_root"]


@dataclass(frozen=True)
class Audit:
    """Result of an audit.

    Attributes:
        folder: the folder as it was named.
        links: every claim that was looked at, in order.
        chain: what made the model, as far as it is known: a JSON document.
        without: sources whose links may stay unchecked.
    """

    folder: str
    links: tuple[Link, ...]
    chain: dict[str, Any]
    without: tuple[Source, ...] = ()

    @property
    def broken(self) -> tuple[Link, ...]:
        return tuple(link for link in self.links if link.finding == "does not hold")

    @property
    def unchecked(self) -> tuple[Link, ...]:
        """Links that nobody looked at and nobody gave up. MLflow's is none of them: runs are made from dvc.lock."""
        free = (*self.without, "mlflow")
        return tuple(x for x in self.links if x.finding == "cannot be checked here" and x.source not in free)

    @property
    def holds(self) -> bool:
        """True if every link was checked and holds, but for those that may stay unchecked."""
        return not self.broken and not self.unchecked


def audit(path: Path, root: Path | None, rebuilt: Path | None = None, without: tuple[Source, ...] = ()) -> Audit:
    """Check a model folder against itself and, where ``root`` is a drank repository, against what that knows.

    Args:
        path: the folder, at any place; or an export of it, a folder or a file.
        root: the folder of dvc.lock; None where there is none.
        rebuilt: a folder that was built again, to compare with; for an export, the released folder.
        without: sources whose links may stay unchecked; MLflow is then not asked at all.

    Raises:
        FileError: ``path`` is no file and no folder with files, or holds what is no file.
    """
    exported, ledger = exported_at(path), Ledger()
    if exported is None and not (path.is_dir() and any(path.iterdir())):
        raise FileError(f"{path}: no folder with files in it; give a model folder, such as data/models/kfac-80")
    folder = exported or Folder(path)
    if folder.path.is_dir():
        check_plain(folder.path)
    if exported:
        check_exported(ledger, exported)
    else:
        check_folder(ledger, folder)
    record = None
    runs: list[VariantRun] = []
    if root is None:
        ledger.check("dvc.lock", _no_repository, source="git")
    else:
        record = find_record(ledger, folder, root, "export" if exported else "files")
        if record and not (exported and exported.file):
            check_repository(ledger, folder, root, record)
        if "mlflow" not in without:
            ledger.check("MLflow", lambda: _mlflow(folder, root, runs), needs=("allocation",), source="mlflow")
    if exported:
        check_weights(ledger, exported, record, root, rebuilt)
    elif rebuilt is not None:
        from drank.audit.rebuilt import check_rebuilt

        windows = root / "data/sampling/test.safetensors" if root else None
        ledger.check("rebuilt", lambda: check_rebuilt(folder, Folder(rebuilt), windows), ("allocation",), "rebuilt")
    chain = _chain(folder) if ledger.holds("allocation") else {}
    if chain and exported:
        chain["export"] = exported.papers.model_dump(exclude_none=True)
    if chain and record and root:
        chain |= _made_by(record, root)
    if runs:
        chain["mlflow"] = [asdict(run) for run in runs]
    return Audit(str(path), tuple(ledger), chain, without)


def find_root(near: Path) -> Path | None:
    """The closest folder around ``near`` (itself included) that holds dvc.yaml and params.yaml."""
    around = (near.resolve(), *near.resolve().parents)
    return next((f for f in around if (f / "dvc.yaml").is_file() and (f / "params.yaml").is_file()), None)


def _no_repository() -> str:
    raise UncheckableError("no repository here: call it from a clone, or name one with --root")


def _mlflow(folder: Folder, root: Path, runs: "list[VariantRun]") -> str:
    from drank.tracking import TrackingError, find_runs

    try:
        found = find_runs(root, folder.md5)
    except TrackingError as error:
        raise UncheckableError(str(error)) from None
    if not found:
        raise UncheckableError("MLflow has no run of this folder: `drank track` in the commit above makes one")
    runs += found
    sha256 = folder.digests["allocation.json"]
    for run in found:
        if run.allocation_sha256 != sha256:
            raise BrokenLinkError(f"run {run.run_id} has an allocation of sha256 {run.allocation_sha256}, not {sha256}")
    newest = found[0]
    version = "" if newest.version is None else f", version {newest.version} of the registered model"
    return f"run {newest.name} {newest.run_id}{version}{', which is champion' if newest.champion else ''}"


def _chain(folder: Folder) -> dict[str, Any]:
    """The origin of the folder, as the folder alone tells it."""
    statement, allocation = folder.statement, folder.allocation
    made = {
        "sha256": folder.digests["allocation.json"],
        "n_units": len(allocation.units),
        "n_compressed": sum(unit.form != "dense" for unit in allocation.units),
        "removed_channels": sum(block.full_channels - block.channels for block in allocation.blocks),
    }
    return {
        "variant": statement.variant,
        "model_md5": folder.md5,
        "allocation": allocation.model_dump(exclude={"units", "blocks", "inputs"}, exclude_none=True) | made,
        "materials": [r.model_dump(exclude_none=True, exclude={"annotations"}) for r in statement.materials],
        "parameters": statement.parameters,
        "results": statement.results,
        "computed_in": statement.computed_in,
    }


def _made_by(record: Record, root: Path) -> dict[str, Any]:
    """The origin as the repository tells it, and commands that build the same folder again in an empty one."""
    commit, rebuild = record.commit, f"dvc repro {record.stage}"
    if commit is None:
        return {"stages": list(record.stages), "commit": None, "rebuild": [rebuild]}
    fetch = [] if commit.on_head else ["git fetch origin '+refs/exps/*:refs/exps/*'"]
    return {
        "stages": list(record.stages),
        "commit": {"sha": commit.sha, "date": commit.date, "subject": commit.subject},
        "rebuild": [
            f"git clone {shlex.quote(origin(root))} rebuild",
            "cd rebuild",
            *fetch,
            f"git checkout {commit.sha}",
            "make .venv/installed",
            f"PATH=$PWD/.venv/bin:$PATH {rebuild}",
        ],
    }
