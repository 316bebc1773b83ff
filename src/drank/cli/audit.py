"""``drank audit``: which allocation produced this model, and does every link of the answer hold?"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from drank.cli.options import CommandError

if TYPE_CHECKING:
    from drank.audit import Audit, Link

MARKS = {
    "holds": ("holds", "green"),
    "does not hold": ("DOES NOT HOLD", "red"),
    "cannot be checked here": ("not checked", "yellow"),
}
# Lines about the chain from the model to its sources, filled in by ``told``.
LINES = """\
model|variant {variant}: {results[parameters]:,} parameters, {megabytes:.1f} MB
allocation|{a[allocation]}, preset {a[preset]}, storage {a[storage]}: {a[n_compressed]} of {a[n_units]} units \
compressed, {a[removed_channels]} channels removed
|sha256 {a[sha256]}
budget|{a[budget]:,} of {a[targeted_parameters]:,} parameters ({asked} asked), {a[price]:,} spent \
({a[kept_ratio]:.4f} kept)
objective|{a[objective][value]:.6g}, at most {a[objective][gap]:.2g} of it above the optimum
spectrum|{a[spectrum]}: {listed[spectrum]}
covariance|{listed[covariance]}
calibration|{parameters[sampling][n_windows]} windows of {parameters[sampling][window_length]} tokens of \
{parameters[sampling][calibration_text]}, seed {parameters[spectrum][calibration_seed]}
"""


class Missing(StrEnum):
    """Sources that links are checked against; any of them may be left out."""

    CARD = "card"
    GIT = "git"
    ARTEFACTS = "artefacts"
    MLFLOW = "mlflow"


def audit(
    model_dir: Annotated[
        Path, typer.Argument(help="A folder such as data/models/kfac-80, a copy of it, or an export, folder or file.")
    ],
    root: Annotated[
        Path | None,
        typer.Option(help="The repository to ask; by default the one around the current folder, or around MODEL_DIR."),
    ] = None,
    rebuilt: Annotated[
        Path | None,
        typer.Option(help="The same variant built again, to compare with; of an export, the released folder."),
    ] = None,
    without: Annotated[
        list[Missing] | None, typer.Option(help="What need not be at hand, so that its links may stay unchecked.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document instead of text.")] = False,
) -> None:
    """Say what made a model, and verify every link.

    Exit status: 0 if every link holds, 1 if one does not, 2 if one was not checked and --without does not allow that.
    """
    from drank.audit import audit as run
    from drank.audit import find_root

    root = root or find_root(Path()) or find_root(model_dir)
    found = run(model_dir, root, rebuilt, tuple(source.value for source in without or ()))
    if as_json:
        typer.echo(json.dumps({"holds": found.holds, **asdict(found)}, indent=2, sort_keys=True, ensure_ascii=False))
    else:
        show(found)
    if found.broken:
        raise CommandError(f"{model_dir}: {len(found.broken)} broken: {_names(found.broken)}")
    if found.unchecked:
        options = " ".join(f"--without {source}" for source in dict.fromkeys(link.source for link in found.unchecked))
        typer.echo(
            f"{model_dir}: nothing is broken, but {len(found.unchecked)} of {len(found.links)} links were not checked: "
            f"{_names(found.unchecked)}. Mend what they lack, or leave them out: {options}",
            err=True,
        )
        raise typer.Exit(2)


def _names(links: "Iterable[Link]") -> str:
    return ", ".join(link.name for link in links)


def show(found: "Audit") -> None:
    """The chain from the model to its sources, then every link, then how to build it again."""
    for label, text in told(found.chain) if found.chain else ():
        typer.echo(f"{label:14}{text}")
    typer.echo()
    width = max(len(link.name) for link in found.links) + 2
    for link in found.links:
        mark, color = MARKS[link.finding]
        typer.echo(f"{typer.style(f'{mark:14}', fg=color)}{link.name:{width}}{link.detail}")
    if "rebuild" in found.chain:
        typer.echo("\nTo build it again, in an empty folder:")
        for command in found.chain["rebuild"]:
            typer.echo(f"  {command}")
        typer.echo("and compare: drank audit FOLDER --rebuilt THAT_FOLDER")


def told(chain: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Lines about the chain, from the model to its sources."""
    from drank.project.params import asked

    if "export" in chain:
        yield "export", "{form}, by drank {versions[drank]}, of the model below".format(**chain["export"])
    results = chain["results"]
    listed = {section: _listed(values) for section, values in chain["parameters"].items()}
    for line in LINES.splitlines():
        label, _, text = line.partition("|")
        more = {"megabytes": results["bytes"] / 1e6, "listed": listed, "asked": asked(chain["allocation"])}
        yield label, text.format(**chain, a=chain["allocation"], **more)
    for material in chain["materials"]:
        if "uri" in material:
            label = "base model" if material["name"] == "model" else material["name"].replace(".", " ")
            digest = f", sha256 {material['digest']['sha256']}" if "digest" in material else ""
            yield label, f"{material['uri']}{digest}"
    if "commit" in chain:
        commit = chain["commit"]
        yield "commit", "{sha} of {date}, “{subject}”".format(**commit) if commit else "none that is known here"
    yield "results", _listed({k: v for k, v in results.items() if k.startswith(("token_perplexity/", "acc/"))})
    if types := dict(chain["computed_in"]):
        measured = types.pop("evaluation", "an unknown type")
        yield "", "; ".join([f"measured in {measured}", *(f"{passes} in {dtype}" for passes, dtype in types.items())])
    yield from (("MLflow", run["link"]) for run in chain.get("mlflow", ())[:1])


def _listed(values: dict[str, Any]) -> str:
    """Fields with their values, but those that are zero, empty or off."""
    set_ = {key: f"{value:.4g}" if isinstance(value, float) else value for key, value in values.items() if value}
    return ", ".join(f"{key} {value}" for key, value in set_.items())
