"""A model folder in its repository: the commit, the chain of stages, and the artefacts that are at hand."""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from drank.audit.artefacts import Artefact, locate
from drank.audit.folder import Folder
from drank.audit.ledger import BrokenLinkError, Ledger, UncheckableError
from drank.project.documents import AllocationDocument, SpectrumSummary, read_document
from drank.project.dvc import LockError, Stages, parse_lock, read_lock
from drank.project.files import FileError, file_sha256, read_tensors
from drank.project.git import Commit, file_at, find_commits, has_history, is_shallow
from drank.project.params import Params, ParamsError
from drank.project.plain_yaml import YamlError, load
from drank.project.progress import progress
from drank.project.state import check_order, check_params, flat, lineage, outs_of, writers
from drank.steps.release import STATEMENT


@dataclass(frozen=True)
class Record:
    """The stages that made a folder, and the commit whose dvc.lock says so; None where the workspace's says it."""

    stages: Stages
    stage: str
    path: str
    commit: Commit | None


def find_record(ledger: Ledger, folder: Folder, root: Path, needs: str) -> Record | None:
    """The links ``dvc.lock``, which rests on another, and ``chain``: what was found of the folder in the history."""
    found: list[Record] = []
    present = present_stages(root)
    ledger.check("dvc.lock", lambda: _find(folder.md5, root, present, found), (needs,), "git")
    if not found and ledger.holds(needs) and ledger.links["dvc.lock"].finding == "cannot be checked here":
        found += _records(present, folder.md5, None)
    if not found:
        return None
    ledger.check("chain", lambda: _chain(found[0]), (), "git")
    return found[0]


def present_stages(root: Path) -> Stages:
    try:
        return read_lock(root / "dvc.lock")
    except LockError:  # which says nothing of the folder
        return {}


def check_repository(ledger: Ledger, folder: Folder, root: Path, record: Record) -> None:
    """Every link from the folder to what made it."""
    present = present_stages(root)
    ledger.check("recorded parameters", lambda: _recorded_parameters(folder, record, root), ("parameters",), "git")
    located: dict[str, Artefact] = {}
    commit = record.commit.sha if record.commit else None
    find = partial(locate, root, present=outs_of(present), commit=commit)
    for path, md5 in progress(outs_of(record.stages).items(), desc="artefacts", unit="outs", leave=False):
        if path != record.path:
            check = partial(_artefact, folder, find, located, path, md5)
            ledger.check(path, check, (), "artefacts")
    ledger.check("loss", lambda: _loss(folder.allocation, located), ("ranks",), "artefacts")
    ledger.check("results", lambda: _results(folder, located), ("allocation",), "artefacts")


def _find(md5: str, root: Path, present: Stages, found: list[Record]) -> str:
    """The commit whose dvc.lock has the folder."""
    is_here = md5 in outs_of(present).values()
    if in_git := has_history(root):
        for commit in find_commits(root, md5, "dvc.lock"):
            if records := _records(_stages_at(root, commit.sha), md5, commit):
                found += records
                return f"{found[0].stage} at commit {commit.sha[:10]} of {commit.date}, “{commit.subject}”"
        if is_shallow(root):
            raise UncheckableError(f"no dvc.lock of this shallow clone has {md5}; `git fetch --unshallow`")
        if is_here:
            raise BrokenLinkError("dvc.lock of the working tree has it, and no commit does: commit dvc.lock first")
    if is_here:
        raise UncheckableError("dvc.lock has it, but no git history here says which commit; audit in a clone")
    if not present and not in_git:
        raise UncheckableError("neither a git history nor a dvc.lock here; audit in a clone")
    raise BrokenLinkError(f"no dvc.lock in the history has a folder of md5 {md5}: edited since, or made elsewhere")


def _stages_at(root: Path, commit: str) -> Stages:
    """The stages of a commit's dvc.lock; none of one that cannot be read: one with a conflict in it has no say."""
    try:
        return parse_lock((file_at(root, commit, "dvc.lock") or b"").decode(errors="replace"), commit)
    except LockError:
        return {}


def _records(stages: Stages, md5: str, commit: Commit | None) -> list[Record]:
    """A record for each stage that wrote a folder of this hash."""
    wrote = [(out["path"], name) for name, row in stages.items() for out in row.get("outs", ()) if out["md5"] == md5]
    return [Record(lineage(stages, stage), stage, path, commit) for path, stage in wrote]


def _chain(record: Record) -> str:
    check_order(record.stages, f"dvc.lock of {record.stage}")
    for stage, row in record.stages.items():
        for path in (dependency["path"] for dependency in row.get("deps", ())):
            if path.startswith("data/") and not writers(record.stages, path):
                raise BrokenLinkError(f"{stage} read {path}, which no stage of this dvc.lock wrote")
    return " <- ".join(reversed(record.stages))


def _recorded_parameters(folder: Folder, record: Record, root: Path) -> str:
    """The values in dvc.lock against params.yaml of that commit, and that against the folder's statement."""
    where = f"params.yaml at {record.commit.sha[:10]}" if record.commit else "params.yaml"
    here = root / "params.yaml"
    there = here.read_bytes() if here.is_file() else None
    text = file_at(root, record.commit.sha, "params.yaml") if record.commit else there
    if text is None:
        raise BrokenLinkError(f"{where}: not found")
    try:
        check_params(record.stages, load(text), where)
        then = Params.parse(text, where).parameters_of(folder.statement.variant)
    except (ParamsError, YamlError) as error:
        raise UncheckableError(f"{where} is not of this version of drank: {error}") from None
    told = flat(folder.statement.parameters)
    _agree(told, flat(then), where)
    return f"{len(told)} values: {where}, dvc.lock and {STATEMENT} agree"


def _artefact(
    folder: Folder, find: Callable[[str, str], Artefact], located: dict[str, Artefact], path: str, md5: str
) -> str:
    """An artefact's bytes against DVC's hash of them, and against what the folder's statement has of its files."""
    artefact = located[path] = find(path, md5)
    told = {name.removeprefix(path).removeprefix("/"): d for name, d in folder.statement.digests.items()}
    compared = [name for name in told if name in artefact.files]
    for name in compared:
        if (found := file_sha256(artefact.files[name])) != told[name]:
            raise BrokenLinkError(f"{path}/{name}: sha256 {found}, but {STATEMENT} has {told[name]}")
    also = f", and {len(compared)} sha256 of {STATEMENT}" if compared else ""
    return f"md5 {md5}, recomputed in the {artefact.origin}{also}"


def _loss(allocation: AllocationDocument, located: Mapping[str, Artefact]) -> str:
    """The loss of the ranks, from the singular values that they were chosen by."""
    spectrum = located.get(f"data/spectrum/{allocation.spectrum}")
    if spectrum is None:
        raise UncheckableError(f"data/spectrum/{allocation.spectrum} is not at hand")
    try:
        summary = read_document(spectrum.file("summary.json"), SpectrumSummary)
    except FileError as error:  # its bytes are those of the stage
        raise UncheckableError(f"the spectrum is not of this version of drank: {error}") from None
    values = read_tensors(spectrum.file("singular_values.safetensors"))
    described = {(row.name, row.out_features, row.in_features): row for row in summary.matrices}
    for unit in allocation.units:
        row = described.get((unit.name, unit.out_features, unit.in_features))
        if row is None:
            raise BrokenLinkError(f"{unit.name}: {unit.out_features} x {unit.in_features} is not in the spectrum")
        energies = (values[row.factors] ** 2).numpy()
        dropped = 0.0 if unit.form == "dense" else float(energies[unit.rank :].sum())
        lost, rounded = row.base_loss + dropped, row.rounded(unit)
        whole = float(energies.sum()) + row.base_loss
        _close(f"relative_loss of {unit.name}", unit.relative_loss, (lost + rounded) / whole if whole else 0.0)
        # Rules whose objective is one of loss or effective rank; of the others, the share is no function of these.
        # Ranks for a budget of parameters know nothing of bits.
        of_ranks = lost + rounded * (allocation.bytes_budget is not None)
        shares = {"least_loss": of_ranks, "effective_rank": unit.effective_rank / (unit.rank or 1)}
        if allocation.allocation in shares:
            _close(f"objective_share of {unit.name}", unit.objective_share, shares[allocation.allocation])
    objective = allocation.objective
    gap = max(0.0, objective.value - objective.bound) / abs(objective.value) if objective.value else 0.0
    _close("gap", objective.gap, gap)
    return f"{len(allocation.units)} units recomputed; objective {objective.value:.6g}, gap {objective.gap:.2g}"


def _close(what: str, told: float, found: float) -> None:
    if not math.isclose(told, found, rel_tol=1e-9, abs_tol=1e-15):
        raise BrokenLinkError(f"{what} is {told} in allocation.json, its spectrum and bound give {found}")


def _results(folder: Folder, located: Mapping[str, Artefact]) -> str:
    path = f"results/{folder.statement.variant}.json"
    if path not in located:
        raise UncheckableError(f"{path} is not at hand")
    recorded: dict[str, Any] = json.loads(located[path].read())
    _agree(folder.statement.results, recorded, path)
    return f"{len(recorded)} figures, those of {path}"


def _agree(told: Mapping[str, Any], found: Mapping[str, Any], where: str) -> None:
    for key in sorted(told.keys() | found.keys()):
        if told.get(key) != found.get(key):
            raise BrokenLinkError(f"{key} is {told.get(key)} in {STATEMENT}, but {found.get(key)} in {where}")
