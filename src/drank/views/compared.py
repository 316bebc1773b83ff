"""Both sides of ``drank diff``, read only: variants of the working tree, folders of models, revisions of git.

Nothing is checked out: params.yaml, allocations and results of a revision are read from git itself.
"""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from drank.project import git, plain_yaml
from drank.project.documents import (
    AllocationDocument,
    Read,
    Results,
    StatementDocument,
    parse_document,
    read_document,
)
from drank.project.params import Params, ParamsError
from drank.views.difference import DifferenceError, Side, compare

Sides = dict[str, Callable[[], Side]]  # readers by variant


def compare_targets(root: Path, a: str, b: str) -> dict[str, Any]:
    """Compare what two names stand for: two variants, one in two places, or all that two places have in common.

    Raises:
        DifferenceError: a name stands for nothing, or no variant is in both sides.
        FileError: a document is damaged.
    """
    left, right = find(root, a), find(root, b)
    is_one = len(left) == len(right) == 1
    pairs = zip(left, right, strict=True) if is_one else ((name, name) for name in left if name in right)
    variants = {one: compare(left[one](), right[other]()) for one, other in pairs}
    if not variants:
        told = (f"{name} has {', '.join(sides) or 'none'}" for name, sides in ((a, left), (b, right)))
        raise DifferenceError(f"no variant in common: {'; '.join(told)}")
    both = len(left) > 1 and len(right) > 1  # no variant was asked for by name
    only_a, only_b = ([n for n in one if both and n not in other] for one, other in ((left, right), (right, left)))
    return {"format_version": 1, "only_a": only_a, "only_b": only_b, "variants": variants}


def find(root: Path, name: str) -> Sides:
    """The variants that a name on the command line stands for.

    A name is tried as the folder of a model, as a variant of params.yaml, and as a git revision or DVC experiment.

    Raises:
        DifferenceError: none of these; the message lists what was tried.
        FileError: a file of a model folder is damaged.
    """
    if (Path(name) / "allocation.json").is_file():
        side = _folder(Path(name))
        return {side.allocation.variant if side.allocation else name: lambda: side}
    here = _tree(root)
    if name in here:
        return {name: here[name]}
    if commit := git.resolve(root, name) or _experiment(root, name):
        return _tree(root, commit, f"{name} ({commit[:7]})")
    shallow = " is a shallow clone, which cannot say what was before it; `git fetch --unshallow`"
    raise DifferenceError(
        f"{name!r} is nothing that can be compared:\n  no folder of a model: no {Path(name) / 'allocation.json'}\n"
        f"  no variant: {root / 'params.yaml'} has {', '.join(here) or 'none, or is not there'}\n"
        f"  no git revision and no experiment of {root.absolute()}{shallow if git.is_shallow(root) else ''}"
    )


def _folder(folder: Path) -> Side:
    allocation, parameters, results = read_document(folder / "allocation.json", AllocationDocument), None, None
    if (folder / "provenance.json").is_file():
        statement = read_document(folder / "provenance.json", StatementDocument)
        parameters = statement.parameters
        results = parse_document(json.dumps(statement.results), f"{folder}/provenance.json: results", Results)
    return Side(str(folder), parameters, allocation, results)


def _tree(root: Path, commit: str = "", label: str = "") -> Sides:
    """The working tree, or a commit; its params.yaml may be of any age, since names are all that it must have."""
    within = f"{label}: " if commit else f"{root}/"

    def read(path: str) -> bytes | None:
        if commit:
            return git.file_at(root, commit, path)
        return (root / path).read_bytes() if (root / path).is_file() else None

    def document(path: str, kind: type[Read]) -> Read | None:
        found = read(path)
        return None if found is None else parse_document(found, within + path, kind)

    def side(variant: str) -> Side:
        try:
            parameters = Params.parse(params, f"{within}params.yaml").parameters_of(variant)
        except ParamsError:  # another version's
            parameters = None
        return Side(
            f"{label}:{variant}" if commit else variant,
            parameters,
            document(f"data/allocation/{variant}.json", AllocationDocument),
            document(f"results/{variant}.json", Results),
        )

    params = read("params.yaml") or b"variants: {}"
    try:
        return {str(name): partial(side, str(name)) for name in dict(plain_yaml.load(params)["variants"])}
    except (KeyError, TypeError, ValueError) as error:
        raise DifferenceError(f"{within}params.yaml: not YAML with a section 'variants': {error}") from None


def _experiment(root: Path, name: str) -> str | None:
    """The commit of the newest DVC experiment of a name: refs/exps/<2 digits>/<38 digits>/<name>."""
    if not git.has_history(root):
        return None
    found = git.run(root, "for-each-ref", "--sort=-creatordate", "--format=%(objectname)", f"refs/exps/*/*/{name}")
    return next(iter(found.decode().split()), None)
