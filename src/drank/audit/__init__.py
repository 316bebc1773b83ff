"""Which allocation produced this model? The chain from a folder of weights back to its sources, link by link.

``folder`` checks what the folder says of itself, ``repository`` what git, dvc.lock and DVC's cache say of it,
``rebuilt`` compares it with one that was built again. Each link holds, does not hold, or cannot be checked here.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from drank.audit.folder import Folder, check_folder
from drank.audit.ledger import BrokenLinkError, Ledger, Link, UncheckableError
from drank.audit.repository import Record, check_repository
from drank.project.files import check_plain
from drank.project.git import origin

if TYPE_CHECKING:
    from drank.tracking import VariantRun

__all__ = ["Audit", "AuditError", "Link", "audit", "find_root"]


class AuditError(ValueError):
    """There is nothing to audit at this place."""


@dataclass(frozen=True)
class Audit:
    """Result of an audit.

    Attributes:
        folder: the folder as it was named.
        links: every claim that was looked at, in order.
        chain: what made the model, as far as it is known: a JSON document.
    """

    folder: str
    links: tuple[Link, ...]
    chain: dict[str, Any]

    @property
    def holds(self) -> bool:
        """Whether nothing that could be checked is broken."""
        return all(link.finding != "does not hold" for link in self.links)


def audit(path: Path, root: Path | None, rebuilt: Path | None = None) -> Audit:
    """Check a model folder against itself and, where ``root`` is a drank repository, against what that knows.

    Args:
        path: the folder, at any place.
        root: the folder of dvc.lock; None where there is none.
        rebuilt: a folder that was built again, to compare with.

    Raises:
        AuditError: ``path`` is no folder with a model.
        FileError: it holds what is no file.
    """
    if not path.is_dir() or not any(path.iterdir()):
        raise AuditError(f"{path}: no folder with files in it; give a model folder, such as data/models/kfac-80")
    check_plain(path)
    folder, ledger = Folder(path), Ledger()
    check_folder(ledger, folder)
    record = None
    runs: list[VariantRun] = []
    if root is None:
        ledger.check("dvc.lock", _no_repository)
    else:
        record = check_repository(ledger, folder, root)
        ledger.check("MLflow", lambda: _mlflow(folder, root, runs), needs=("allocation",))
    if rebuilt is not None:
        from drank.audit.rebuilt import check_rebuilt

        windows = root / "data/sampling/test.safetensors" if root else None
        ledger.check("rebuilt", lambda: check_rebuilt(folder, Folder(rebuilt), windows), needs=("allocation",))
    chain = _chain(folder, record, root) if ledger.holds("allocation") else {}
    if runs:
        chain["mlflow"] = [asdict(run) for run in runs]
    return Audit(str(path), tuple(ledger), chain)


def find_root(near: Path) -> Path | None:
    """The closest folder around ``near`` (itself included) that holds dvc.yaml and params.yaml."""
    for folder in (near.resolve(), *near.resolve().parents):
        if (folder / "dvc.yaml").is_file() and (folder / "params.yaml").is_file():
            return folder
    return None


def _no_repository() -> str:
    raise UncheckableError("no repository here: call it from a clone, or name one with --root")


def _mlflow(folder: Folder, root: Path, runs: "list[VariantRun]") -> str:
    from drank.tracking import TrackingError, find_runs

    try:
        found = find_runs(root, folder.md5)
    except TrackingError as error:
        raise UncheckableError(str(error)) from None
    if found is None:
        raise UncheckableError("no MLflow store here: `drank track` makes one")
    if not found:
        raise UncheckableError("MLflow has no run of this folder: `drank track` in the commit above makes one")
    runs += found
    for run in found:
        if run.allocation_sha256 != folder.digests["allocation.json"]:
            raise BrokenLinkError(
                f"run {run.run_id} has an allocation of sha256 {run.allocation_sha256}, the folder has "
                f"{folder.digests['allocation.json']}"
            )
    newest = found[0]
    version = "" if newest.version is None else f", version {newest.version} of the registered model"
    return f"run {newest.name} {newest.run_id}{version}{', which is champion' if newest.champion else ''}"


def _chain(folder: Folder, record: Record | None, root: Path | None) -> dict[str, Any]:
    statement, allocation = folder.statement, folder.allocation
    header = allocation.model_dump(exclude={"units", "blocks", "inputs"})
    compressed = [unit for unit in allocation.units if unit.form != "dense"]
    document: dict[str, Any] = {
        "variant": statement.variant,
        "model_md5": folder.md5,
        "allocation": header
        | {
            "sha256": folder.digests["allocation.json"],
            "n_units": len(allocation.units),
            "n_compressed": len(compressed),
            "removed_channels": sum(block.full_channels - block.channels for block in allocation.blocks),
        },
        "materials": [
            r.model_dump(exclude_none=True, exclude={"annotations"}) for r in statement.predicate.build.dependencies
        ],
        "parameters": statement.parameters,
        "results": statement.results,
        "computed_in": statement.computed_in,
    }
    if record is not None and root is not None:
        commit = record.commit
        document |= {
            "stages": list(record.stages),
            "commit": None if commit is None else {"sha": commit.sha, "date": commit.date, "subject": commit.subject},
            "rebuild": rebuild_commands(record, root),
        }
    return document


def rebuild_commands(record: Record, root: Path) -> list[str]:
    """Commands that, in an empty folder, build the same folder again."""
    if record.commit is None:
        return [f"dvc repro {record.stage}"]
    fetch = [] if record.commit.on_head else ["git fetch origin '+refs/exps/*:refs/exps/*'"]
    return [
        f"git clone {origin(root)} rebuild",
        "cd rebuild",
        *fetch,
        f"git checkout {record.commit.sha}",
        "make .venv/installed",
        f"PATH=$PWD/.venv/bin:$PATH dvc repro {record.stage}",
    ]
