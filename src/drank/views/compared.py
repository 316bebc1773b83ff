"""Targets of ``drank diff``: variants of the working tree, model folders anywhere, git revisions. Reads only.

Nothing is checked out. Files of a revision (params.yaml, allocations, results) are read from git itself. The
parameters are read as plain YAML, not as :class:`~drank.project.params.Params`: an old revision may have keys that
are refused today.
"""

import json
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from drank.project.files import read_json
from drank.project.git import file_at, has_history, resolve
from drank.project.params import (
    Compute,
    Covariance,
    Evaluation,
    Healing,
    ModelSource,
    Preset,
    Sampling,
    Spectrum,
    TextSource,
)
from drank.project.plain_yaml import YamlError, load
from drank.views.difference import Difference, Side, compare, flat, text_of

OF_PRESET = ("allocation", "storage", "beta", "scores", "floor", "cap", "dense_option", "multiple_of")
OF_VARIANT = ("preset", "spectrum", "size_ratio")
Document = Mapping[str, Any]


class DifferenceError(ValueError):
    """A side of the comparison is missing or damaged; the message says what was looked for."""


class _Unit(BaseModel, strict=True):
    """A unit as :func:`~drank.views.difference.compare` reads it; of a revision of any age, so no more is asked."""

    name: str
    kind: str
    layer: int
    rank: int
    full_rank: int
    form: str
    out_features: int
    in_features: int
    members: list[str] = []


class _Block(BaseModel, strict=True):
    name: str
    channels: int
    full_channels: int


class _Allocation(BaseModel, strict=True):
    units: list[_Unit]
    blocks: list[_Block] = []


@dataclass(frozen=True)
class Comparison:
    """Differences by variant, and the variants that one side alone has."""

    differences: dict[str, Difference]
    only_a: tuple[str, ...] = ()
    only_b: tuple[str, ...] = ()


@dataclass(frozen=True)
class Target:
    """The meaning of a name on the command line.

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


@dataclass(frozen=True)
class Tree:
    """The documents of a repository, in its working tree or at a revision.

    Attributes:
        read: the text at a path, None where there is none.
        name: what goes before a path in messages.
    """

    read: Callable[[str], str | None]
    name: str

    def params(self) -> dict[str, Any] | None:
        """params.yaml as it is written, with a section of variants; None where there is no such file."""
        text, where = self.read("params.yaml"), f"{self.name}params.yaml"
        if text is None:
            return None
        try:
            document = load(text)
        except YamlError as error:
            raise DifferenceError(f"{where}: {error}") from None
        if not isinstance(document, dict) or not isinstance(document.get("variants"), dict):
            raise DifferenceError(f"{where}: has no section 'variants', so there is nothing to compare")
        return document

    def document(self, path: str) -> Any:
        """A JSON document; None where there is no such file."""
        text = self.read(path)
        try:
            return None if text is None else json.loads(text)
        except (ValueError, RecursionError) as error:
            raise DifferenceError(f"{self.name}{path}: damaged, not JSON: {error}") from None

    def side(self, params: Document, label: str, variant: str) -> Side:
        """A variant of these documents."""
        paths = {"ranks": f"data/allocation/{variant}.json", "metrics": f"results/{variant}.json"}
        allocation = _checked(self.document(paths["ranks"]), f"{self.name}{paths['ranks']}")
        results = self.document(paths["metrics"])
        if results is not None and not isinstance(results, dict):
            raise DifferenceError(f"{self.name}{paths['metrics']}: damaged, not a variant's figures; build it again")
        parameters = parameters_of(params, variant)
        found = {"ranks": allocation, "metrics": results}
        remarks = [f"{label}: no {paths[key]}, so no {key} to compare" for key in paths if found[key] is None]
        if allocation is not None:
            remarks += _stale(label, parameters, allocation)
        return Side(label, parameters, True, allocation, results, remarks=tuple(remarks))


def compare_targets(root: Path, a: str, b: str) -> Comparison:
    """Find what two names stand for, and compare: the variant that one of them names, else all that both sides have.

    A name is tried as the folder of a model, as a variant of params.yaml, as a git revision or DVC experiment, and as
    REVISION:VARIANT, in this order.

    Raises:
        DifferenceError: a name stands for nothing, a document is damaged, or no variant is in both sides.
        FileError: a file of a model folder is damaged.
    """
    left, right = find(root, a), find(root, b)
    if left.variant is not None or right.variant is not None:
        ours, theirs = left.variant or right.variant or "", right.variant or left.variant or ""
        return Comparison({ours: compare(_side(left, ours), _side(right, theirs))})
    common = [name for name in left.variants if name in right.variants]
    if not common:
        raise DifferenceError(
            f"no variant in common: {_having(left)}, {_having(right)}; name one of each, as {a}:{left.variants[0]}"
        )
    return Comparison(
        {name: compare(left.side(name), right.side(name)) for name in common},
        tuple(name for name in left.variants if name not in common),
        tuple(name for name in right.variants if name not in common),
    )


def find(root: Path, name: str) -> Target:
    """The meaning of a name on the command line.

    Raises:
        DifferenceError: nothing; the message lists what was tried.
        FileError: a file of a model folder is damaged.
    """
    tried: list[str] = []
    revision, _, variant = name.rpartition(":")
    target = (
        _folder(Path(name), tried)
        or _variant(root, name, tried)
        or _revision(root, name, None, tried)
        or (_revision(root, revision, variant, tried) if revision else None)
    )
    if target is None:
        raise DifferenceError(f"{name!r} is nothing that can be compared:" + "".join(f"\n  {line}" for line in tried))
    return target


def parameters_of(params: Document, name: str) -> dict[str, str | None]:
    """Every parameter that a variant comes from, as text by dotted key, under keys that do not have its name in them.

    The keys are those of :func:`~drank.project.resolved.resolved`, but nothing is checked, so that params.yaml may be
    of any age. A key left out counts as today's default.
    """
    healing = _section(params, "healing", name)
    variant = _section(params, "variants", healing.get("variant", name))
    sections = {
        "variant": variant,
        "preset": _with_defaults(_section(params, "presets", variant.get("preset")), Preset),
        "spectrum": _with_defaults(_section(params, "spectrum", variant.get("spectrum")), Spectrum),
        "covariance": _with_defaults(_section(params, "covariance"), Covariance),
        "compute": _with_defaults(_section(params, "compute"), Compute),
        "sampling": _with_defaults(_section(params, "sampling"), Sampling),
        "evaluation": _with_defaults(_section(params, "evaluation"), Evaluation),
        "model": _with_defaults(_section(params, "model"), ModelSource),
        "text": {key: _with_defaults(_section(params, "text", key), TextSource) for key in _section(params, "text")},
    }
    if healing:
        sections["healing"] = _with_defaults(healing, Healing)
    return {**flat(sections)}


def _names(params: Document) -> tuple[str, ...]:
    return (*params["variants"], *_section(params, "healing"))


def _folder(folder: Path, tried: list[str]) -> Target | None:
    if not folder.is_dir():
        tried.append(f"no model: there is no folder {folder}")
    elif not (folder / "allocation.json").is_file():
        tried.append(f"no model: the folder {folder} has no allocation.json")
    else:
        side = _side_of_folder(folder)
        variant = str((side.allocation or {}).get("variant", folder.name))
        return Target(str(folder), variant, (variant,), lambda _: side)
    return None


def _side_of_folder(folder: Path) -> Side:
    allocation = _checked(read_json(folder / "allocation.json"), str(folder / "allocation.json"))
    statement = _optional(folder / "provenance.json")
    build = _section(statement, "predicate", "buildDefinition", "externalParameters")
    run = _section(statement, "predicate", "runDetails").get("byproducts")
    named = {str(_section(row).get("name")): row for row in (run if isinstance(run, list) else ())}
    results = next((_section(row, "annotations") for name, row in named.items() if name.startswith("results/")), None)
    parameters: Mapping[str, str | None] = _known(allocation or {})
    remarks = []
    if build:
        parameters = {key: value for key, value in flat(build).items() if key != "variant.name"}
    else:
        remarks.append(f"{folder}: no provenance.json: of its parameters only those in allocation.json are compared")
    if results is None:
        remarks.append(f"{folder}: no results in provenance.json, so no metrics to compare")
        results = {"bytes": sum(file.stat().st_size for file in folder.glob("*.safetensors"))}
    config = _optional(folder / "config.json")
    base = _section(config, "quantization_config", "provenance").get("base_model_sha256")
    known = base if isinstance(base, str) else None
    return Side(str(folder), parameters, bool(build), allocation, results, known, tuple(remarks))


def _variant(root: Path, name: str, tried: list[str]) -> Target | None:
    def read(path: str) -> str | None:
        file = root / path
        return file.read_text(encoding="utf-8", errors="replace") if file.is_file() else None

    tree = Tree(read, "" if root == Path() else f"{root}/")
    params = tree.params()
    if params is None:
        tried.append(f"no variant: there is no {tree.name}params.yaml; --root is the folder that holds it")
    elif name not in _names(params):
        tried.append(f"no variant: {tree.name}params.yaml has {', '.join(params['variants'])}")
    else:
        return Target(name, name, _names(params), lambda variant: tree.side(params, variant, variant))
    return None


def _revision(root: Path, name: str, variant: str | None, tried: list[str]) -> Target | None:
    commit = _commit(root, name, tried)
    if commit is None:
        return None

    def read(path: str) -> str | None:
        content = file_at(root, commit, path)
        return None if content is None else content.decode(errors="replace")

    label = commit[:7] if len(name) >= 7 and commit.startswith(name) else f"{name} ({commit[:7]})"
    tree = Tree(read, f"{label}: ")
    params = tree.params()
    if params is None:
        raise DifferenceError(f"{label}: has no params.yaml at the place of {root.absolute()}; was it elsewhere then?")
    return Target(label, variant, _names(params), lambda chosen: tree.side(params, f"{label}:{chosen}", chosen))


def _commit(root: Path, name: str, tried: list[str]) -> str | None:
    """The commit of a revision in git's sense, or of a DVC experiment, which git knows by its full name only."""
    if not has_history(root):
        tried.append(f"no git revision: {root.absolute()} is in no git repository, or in one without commits")
        return None
    commit = resolve(root, name)
    if commit is not None:
        return commit
    experiments = _experiments(root, name)
    if len(experiments) > 1:
        raise DifferenceError(
            f"{name!r} names {len(experiments)} experiments: {', '.join(experiments)}; write one of these in full"
        )
    if not experiments:
        tried.append(f"no git revision and no experiment: {name}")
        return None
    return resolve(root, experiments[0])


def _experiments(root: Path, name: str) -> list[str]:
    """Full names of the experiments of this name: refs/exps/<2 digits>/<38 digits>/<name>, after their base commit."""
    command = ["git", "for-each-ref", "--format=%(refname)", f"refs/exps/??/*/{name}"]
    return subprocess.run(command, cwd=root, capture_output=True, text=True).stdout.split()


def _side(target: Target, variant: str) -> Side:
    if variant not in target.variants:
        raise DifferenceError(f"no variant {variant!r} to compare: {_having(target)}")
    return target.side(variant)


def _having(target: Target) -> str:
    return f"{target.label} has {', '.join(target.variants)}"


def _checked(allocation: Any, where: str) -> Document | None:
    """An allocation, which has units; None stays None."""
    if allocation is None:
        return None
    damaged = f"{where}: damaged, not an allocation:"
    if not isinstance(allocation, dict) or not isinstance(allocation.get("units"), list):
        raise DifferenceError(f"{damaged} it has no list of 'units'; fetch or build it again")
    try:
        _Allocation.model_validate(allocation)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise DifferenceError(f"{damaged} {key}: {first['msg']}; fetch or build it again") from None
    return allocation


def _known(allocation: Document) -> dict[str, str | None]:
    """The parameters that an allocation records, under the keys of params.yaml; null where one was not set."""
    keys = {key: f"variant.{key}" for key in OF_VARIANT} | {key: f"preset.{key}" for key in OF_PRESET}
    return {
        dotted: None if allocation[key] is None else text_of(allocation[key])
        for key, dotted in keys.items()
        if key in allocation
    }


def _stale(label: str, parameters: Mapping[str, str | None], allocation: Document) -> list[str]:
    """Where the parameters beside an allocation are not those that it was made with."""
    return [
        f"{label}: {key} is {parameters.get(key, 'not set')}, but its allocation was made with {used}; run `dvc repro`"
        for key, used in _known(allocation).items()
        if used != parameters.get(key)
    ]


def _section(document: Any, *keys: Any) -> Document:
    """A section of a document of unknown age; empty where it has none."""
    for key in keys:
        document = document.get(key) if isinstance(document, Mapping) else None
    return document if isinstance(document, Mapping) else {}


def _with_defaults(section: Document, model: type[BaseModel]) -> dict[str, Any]:
    fields = model.model_fields.items() if section else ()
    return {name: field.default for name, field in fields if not field.is_required()} | dict(section)


def _optional(path: Path) -> Any:
    return read_json(path) if path.is_file() else {}
