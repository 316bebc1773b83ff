"""What ``drank diff`` compares: variants of the working tree, model folders anywhere, git revisions. Reads only.

Nothing is checked out: what git holds of a revision (params.yaml, allocations, results) is read from git itself.
"""

import json
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from drank.project import plain_yaml
from drank.project.documents import (
    AllocationDocument,
    Read,
    Results,
    StatementDocument,
    parse_document,
    read_document,
)
from drank.project.git import file_at, has_history, resolve
from drank.project.params import Params, ParamsError, parse_as
from drank.project.state import flat
from drank.views.difference import Side, compare


class DifferenceError(ValueError):
    """What was to be compared is not there; the message says what was looked for."""


@dataclass(frozen=True)
class Target:
    """What a name on the command line stands for.

    Attributes:
        label: what it is called in messages.
        variant: the variant it stands for; None for a whole revision.
        variants: names of the variants that it has.
        side: reads one of them.
    """

    label: str
    variant: str | None
    variants: tuple[str, ...]
    side: Callable[[str], Side]

    def __str__(self) -> str:
        return f"{self.label} has {', '.join(self.variants)}"

    def read(self, variant: str) -> Side:
        if variant not in self.variants:
            raise DifferenceError(f"no variant {variant!r} to compare: {self}")
        return self.side(variant)


@dataclass(frozen=True)
class Tree:
    """The documents of a repository: of its working tree or, under a label, of a commit."""

    root: Path
    commit: str = ""
    label: str = ""

    def read(self, path: str) -> bytes | None:
        if self.commit:
            return file_at(self.root, self.commit, path)
        return (self.root / path).read_bytes() if (self.root / path).is_file() else None

    def name(self, path: str) -> str:
        return f"{self.label}: {path}" if self.label else str(self.root / path)

    @cached_property
    def variants(self) -> tuple[str, ...]:
        """Names in params.yaml, of which nothing else is read, since it may be of any age; none without the file."""
        content = self.read("params.yaml")
        if content is None:
            return ()
        try:
            document = plain_yaml.load(content.decode())
        except (plain_yaml.YamlError, UnicodeDecodeError) as error:
            raise DifferenceError(f"{self.name('params.yaml')}: not YAML: {error}") from None
        sections = [document.get(key) for key in ("variants", "healing")] if isinstance(document, dict) else []
        if not sections or not isinstance(sections[0], dict):
            raise DifferenceError(f"{self.name('params.yaml')}: has no section 'variants', so nothing to compare")
        return tuple(str(name) for section in sections if isinstance(section, dict) for name in section)

    def side(self, variant: str) -> Side:
        label = f"{self.label}:{variant}" if self.label else variant
        remarks: list[str] = []
        allocation = self._document(f"data/allocation/{variant}.json", AllocationDocument)
        results = self._document(f"results/{variant}.json", Results)
        if allocation is None:
            remarks.append(f"{label}: no data/allocation/{variant}.json, so no ranks to compare")
        if results is None:
            remarks.append(f"{label}: no results/{variant}.json, so no metrics to compare")
        parameters = None
        try:
            params = parse_as(self.read("params.yaml") or b"", self.name("params.yaml"), Params)
            parameters = _parameters(params.parameters_of(variant))
        except ParamsError:
            remarks.append(
                f"{label}: params.yaml is not of this version of drank, so its parameters are not compared; "
                f"`dvc params diff` does"
            )
        if parameters and allocation:
            remarks += _stale(label, parameters, allocation)
        return Side(label, parameters, allocation, results, tuple(remarks))

    def _document(self, path: str, kind: type[Read]) -> Read | None:
        content = self.read(path)
        return None if content is None else parse_document(content, self.name(path), kind)


def compare_targets(root: Path, a: str, b: str) -> dict[str, Any]:
    """Compare what two names stand for: the variant that one of them names, else all that both sides have.

    A name is tried as the folder of a model, as a variant of params.yaml, as a git revision or DVC experiment, and as
    REVISION:VARIANT, in this order.

    Raises:
        DifferenceError: a name stands for nothing, or no variant is in both sides.
        FileError: a document is damaged.
    """
    left, right = find(root, a), find(root, b)
    if left.variant or right.variant:
        ours, theirs = left.variant or right.variant or "", right.variant or left.variant or ""
        return _document([], [], {ours: compare(left.read(ours), right.read(theirs))})
    common = [name for name in left.variants if name in right.variants]
    if not common:
        raise DifferenceError(
            f"no variant in common: {left}, {right}; name one of each, as {a}:{(*left.variants, 'VARIANT')[0]}"
        )
    only_a, only_b = ([name for name in side.variants if name not in common] for side in (left, right))
    return _document(only_a, only_b, {name: compare(left.read(name), right.read(name)) for name in common})


def find(root: Path, name: str) -> Target:
    """What a name on the command line stands for.

    Raises:
        DifferenceError: nothing; the message lists what was tried.
        FileError: a file of a model folder is damaged.
    """
    if (Path(name) / "allocation.json").is_file():
        return _folder(Path(name))
    tree = Tree(root)
    if name in tree.variants:
        return Target(name, name, tree.variants, tree.side)
    revision, _, variant = name.rpartition(":")
    for revised, chosen in ((name, None), (revision, variant)):
        if revised and has_history(root) and (commit := resolve(root, revised) or _experiment(root, revised)):
            return _revision(root, revised, commit, chosen)
    history = "no git revision and no experiment" if has_history(root) else "in no git repository with a commit"
    raise DifferenceError(
        f"{name!r} is nothing that can be compared:\n  no folder of a model: no {Path(name) / 'allocation.json'}\n"
        f"  no variant: {tree.name('params.yaml')} has {', '.join(tree.variants) or 'none, or is not there'}\n"
        f"  {history}: {root.absolute()}"
    )


def _document(only_a: list[str], only_b: list[str], variants: dict[str, Any]) -> dict[str, Any]:
    return {"format_version": 1, "only_a": only_a, "only_b": only_b, "variants": variants}


def _folder(folder: Path) -> Target:
    allocation = read_document(folder / "allocation.json", AllocationDocument)
    if (folder / "provenance.json").is_file():
        statement = read_document(folder / "provenance.json", StatementDocument)
        results = parse_document(json.dumps(statement.results), f"{folder}/provenance.json: results", Results)
        side = Side(str(folder), _parameters(statement.parameters), allocation, results)
    else:
        remark = f"{folder}: no provenance.json, so neither parameters nor metrics to compare"
        side = Side(str(folder), None, allocation, None, (remark,))
    return Target(str(folder), allocation.variant, (allocation.variant,), lambda _: side)


def _revision(root: Path, name: str, commit: str, variant: str | None) -> Target:
    label = commit[:7] if len(name) >= 7 and commit.startswith(name) else f"{name} ({commit[:7]})"
    tree = Tree(root, commit, label)
    if tree.read("params.yaml") is None:
        raise DifferenceError(f"{label}: has no params.yaml at the place of {root.absolute()}; was it elsewhere then?")
    return Target(label, variant, tree.variants, tree.side)


def _experiment(root: Path, name: str) -> str | None:
    """The commit of a DVC experiment: refs/exps/<2 digits>/<38 digits>/<name>, after its base commit."""
    command = ["git", "for-each-ref", "--format=%(refname)", f"refs/exps/??/*/{name}"]
    found = subprocess.run(command, cwd=root, capture_output=True, text=True).stdout.split()
    if len(found) > 1:
        raise DifferenceError(
            f"{name!r} names {len(found)} experiments: {', '.join(found)}; write one of these in full"
        )
    return resolve(root, found[0]) if found else None


def _parameters(document: dict[str, Any]) -> dict[str, str]:
    """As text by dotted key, under keys that do not have the variant's name in them."""
    return {key: value for key, value in flat(document).items() if key != "variant.name"}


def _stale(label: str, parameters: dict[str, str], allocation: AllocationDocument) -> list[str]:
    """Where the parameters beside an allocation are not those that it was made with."""
    used = {f"variant.{key}": str(getattr(allocation, key)) for key in ("preset", "spectrum", "size_ratio")}
    return [
        f"{label}: {key} is {parameters[key]}, but its allocation was made with {value}; run `dvc repro`"
        for key, value in used.items()
        if value != parameters[key]
    ]
