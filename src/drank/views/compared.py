"""Both sides of ``drank diff``, read only: variants of the working tree, folders of models, revisions of git.

Nothing is checked out: params.yaml, allocations and results of a revision are read from git itself.
"""

import json
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
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
from drank.project.git import file_at, has_history, is_shallow, resolve
from drank.project.params import Params, ParamsError, parse_as
from drank.views.difference import DifferenceError, Side, compare


@dataclass(frozen=True)
class Place:
    """A working tree, a commit, or the folder of a model.

    Attributes:
        label: its name in messages.
        chosen: the variant that the command line names; None for all of them.
        variants: names of the variants that it has.
        side: reads one of them.
    """

    label: str
    chosen: str | None
    variants: tuple[str, ...]
    side: Callable[[str], Side]


def compare_targets(root: Path, a: str, b: str) -> dict[str, Any]:
    """Compare what two names stand for: the variant that one of them names, else all that both sides have.

    A name is tried as the folder of a model, as a variant of params.yaml, as a git revision or DVC experiment, and as
    REVISION:VARIANT, in this order.

    Raises:
        DifferenceError: a name stands for nothing, or no variant is in both sides.
        FileError: a document is damaged.
    """
    left, right = find(root, a), find(root, b)
    chosen = left.chosen or right.chosen
    common = [name for name in left.variants if name in right.variants]
    pairs = [(left.chosen or chosen, right.chosen or chosen)] if chosen else [(name, name) for name in common]
    lacks = [(p, name) for pair in pairs for p, name in zip((left, right), pair, strict=True) if name not in p.variants]
    if lacks or not pairs:
        wanted = f"no variant {lacks[0][1]!r} to compare" if lacks else "no variant in common"
        raise DifferenceError("; ".join([wanted, *(f"{p.label} has {', '.join(p.variants)}" for p in (left, right))]))
    only_a, only_b = ([n for n in p.variants if n not in common and not chosen] for p in (left, right))
    variants = {one: compare(left.side(one), right.side(other)) for one, other in pairs}
    return {"format_version": 1, "only_a": only_a, "only_b": only_b, "variants": variants}


SHALLOW = " is a shallow clone, which cannot say what was before it; `git fetch --unshallow`"


def find(root: Path, name: str) -> Place:
    """The place that a name on the command line stands for.

    Raises:
        DifferenceError: none; the message lists what was tried.
        FileError: a file of a model folder is damaged.
    """
    if (Path(name) / "allocation.json").is_file():
        return _folder(Path(name))
    here = _tree(root, None)
    if name in here.variants:
        return Place(name, name, here.variants, here.side)
    revision, _, variant = name.rpartition(":")
    for revised, chosen in ((name, None), (revision, variant)):
        if revised and has_history(root) and (commit := resolve(root, revised) or _experiment(root, revised)):
            return _tree(root, chosen, commit, f"{revised} ({commit[:7]})")
    raise DifferenceError(
        f"{name!r} is nothing that can be compared:\n  no folder of a model: no {Path(name) / 'allocation.json'}\n"
        f"  no variant: {root / 'params.yaml'} has {', '.join(here.variants) or 'none, or is not there'}\n"
        f"  no git revision and no experiment{'' if has_history(root) else ': no repository with a commit'}: "
        f"{root.absolute()}{SHALLOW if has_history(root) and is_shallow(root) else ''}"
    )


def _folder(folder: Path) -> Place:
    allocation, parameters, results = read_document(folder / "allocation.json", AllocationDocument), None, None
    if (folder / "provenance.json").is_file():
        statement = read_document(folder / "provenance.json", StatementDocument)
        parameters = statement.parameters
        results = parse_document(json.dumps(statement.results), f"{folder}/provenance.json: results", Results)
    side = Side(str(folder), parameters, allocation, results)
    return Place(str(folder), allocation.variant, (allocation.variant,), lambda _: side)


def _tree(root: Path, chosen: str | None, commit: str = "", label: str = "") -> Place:
    """The working tree, or a commit; its params.yaml may be of any age, since names are all that it must have."""
    within = f"{label}: " if commit else f"{root}/"

    def read(path: str) -> bytes | None:
        if commit:
            return file_at(root, commit, path)
        return (root / path).read_bytes() if (root / path).is_file() else None

    def document(path: str, kind: type[Read]) -> Read | None:
        found = read(path)
        return None if found is None else parse_document(found, within + path, kind)

    def side(variant: str) -> Side:
        try:
            parameters = parse_as(content or b"", f"{within}params.yaml", Params).parameters_of(variant)
        except ParamsError:  # another version's
            parameters = None
        return Side(
            f"{label}:{variant}" if commit else variant,
            parameters,
            document(f"data/allocation/{variant}.json", AllocationDocument),
            document(f"results/{variant}.json", Results),
        )

    content = read("params.yaml")
    if content is None and commit:
        raise DifferenceError(f"{label}: has no params.yaml at the place of {root.absolute()}; was it elsewhere then?")
    try:
        names = {} if content is None else dict(plain_yaml.load(content.decode())["variants"])
    except (plain_yaml.YamlError, UnicodeDecodeError, KeyError, TypeError, ValueError) as error:
        raise DifferenceError(f"{within}params.yaml: not YAML with a section 'variants': {error}") from None
    return Place(label, chosen, tuple(map(str, names)), side)


def _experiment(root: Path, name: str) -> str | None:
    """The commit of a DVC experiment: refs/exps/<2 digits>/<38 digits>/<name>, after its base commit."""
    command = ["git", "for-each-ref", "--format=%(objectname)", f"refs/exps/??/*/{name}"]
    found = subprocess.run(command, cwd=root, capture_output=True, text=True).stdout.split()
    if len(found) > 1:
        raise DifferenceError(f"{name!r} names {len(found)} experiments: name the commit of one, {' or '.join(found)}")
    return found[0] if found else None
