"""``drank audit``: which allocation produced this model, and does every link of the answer hold?"""

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from drank.cli.options import CommandError

if TYPE_CHECKING:
    from rich.console import Console

    from drank.audit import Audit

MARKS = {
    "holds": "[green]holds[/]",
    "does not hold": "[bold red]DOES NOT HOLD[/]",
    "cannot be checked here": "[yellow]not checked[/]",
}


def audit(
    model_dir: Annotated[
        Path, typer.Argument(help="A folder of weights, such as data/models/kfac-80 or a copy of it.")
    ],
    root: Annotated[
        Path | None,
        typer.Option(help="The repository to ask; by default the one around the current folder, or around MODEL_DIR."),
    ] = None,
    rebuilt: Annotated[
        Path | None,
        typer.Option(help="The same variant built again: are the bytes the same, or how far apart are they?"),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document instead of text.")] = False,
) -> None:
    """Say what made a model, and verify every link; exit status 0 only if all that could be checked holds."""
    from drank.audit import audit as run
    from drank.audit import find_root

    found = run(model_dir, root or find_root(Path()) or find_root(model_dir), rebuilt)
    if as_json:
        typer.echo(json.dumps({"holds": found.holds, **asdict(found)}, indent=2, sort_keys=True, ensure_ascii=False))
    else:
        from rich.console import Console

        show(found, Console(width=None if sys.stdout.isatty() else 140, highlight=False))
    if not found.holds:
        broken = [link.name for link in found.links if link.finding == "does not hold"]
        raise CommandError(f"{model_dir}: {len(broken)} broken: {', '.join(broken)}")


def show(found: "Audit", console: "Console") -> None:
    """The chain from the model to its sources, then every link, then how to build it again."""
    from rich.markup import escape
    from rich.table import Table

    if found.chain:
        chain = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
        chain.add_column(no_wrap=True, style="bold")
        chain.add_column(overflow="fold")
        for label, text in told(found.chain):
            chain.add_row(label, escape(text))
        console.print(chain)
        console.print()
    links = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    for _ in range(2):
        links.add_column(no_wrap=True)
    links.add_column(overflow="fold")
    for link in found.links:
        links.add_row(MARKS[link.finding], link.name, escape(link.detail))
    console.print(links)
    if "rebuild" in found.chain:
        console.print("\nTo build it again, in an empty folder:", style="bold")
        for command in found.chain["rebuild"]:
            console.print(f"  {command}", markup=False, soft_wrap=True)
        console.print("and compare: drank audit FOLDER --rebuilt THAT_FOLDER", soft_wrap=True)


def told(chain: dict[str, Any]) -> list[tuple[str, str]]:
    """Lines about the chain, from the model to its sources."""
    allocation, results, parameters = chain["allocation"], chain["results"], chain["parameters"]
    objective, spectrum, sampling = allocation["objective"], parameters["spectrum"], parameters["sampling"]
    rows = [
        ("model", f"variant {chain['variant']}: {results['parameters']:,} parameters, {results['bytes'] / 1e6:.1f} MB"),
        (
            "allocation",
            f"{allocation['allocation']}, preset {allocation['preset']}, storage {allocation['storage']}: "
            f"{allocation['n_compressed']} of {allocation['n_units']} units compressed, "
            f"{allocation['removed_channels']} channels removed",
        ),
        ("", f"sha256 {allocation['sha256']}"),
        (
            "budget",
            f"{allocation['budget']:,} of {allocation['targeted_parameters']:,} parameters ({allocation['size_ratio']} "
            f"asked), {allocation['price']:,} spent ({allocation['kept_ratio']:.4f} kept)",
        ),
        ("objective", f"{objective['value']:.6g}, at most {objective['gap']:.2g} of it above the optimum"),
        ("spectrum", f"{allocation['spectrum']}: {_listed(_set(spectrum))}"),
        ("covariance", _listed(_set(parameters["covariance"]))),
        (
            "calibration",
            f"{sampling['n_windows']} windows of {sampling['window_length']} tokens of {sampling['calibration_text']}, "
            f"seed {spectrum['calibration_seed']}",
        ),
    ]
    for material in chain["materials"]:
        if "uri" in material:
            label = "base model" if material["name"] == "model" else material["name"].replace(".", " ")
            rows.append((label, f"{material['uri']}{_digest(material)}"))
    if "commit" in chain:
        commit = chain["commit"]
        rows.append(
            ("commit", f"{commit['sha']} of {commit['date']}, “{commit['subject']}”" if commit else "no git here")
        )
    rows += [("results", _listed({k: v for k, v in results.items() if k.startswith(("token_perplexity/", "acc/"))}))]
    rows += [("", _types(chain["computed_in"]))] if chain.get("computed_in") else []
    rows += [("MLflow", run["link"]) for run in chain.get("mlflow", ())[:1]]
    return rows


def _types(computed_in: dict[str, str]) -> str:
    others = ", ".join(f"{passes} in {dtype}" for passes, dtype in computed_in.items() if passes != "evaluation")
    return f"measured in {computed_in.get('evaluation', 'an unknown type')}" + (f"; {others}" if others else "")


def _listed(values: dict[str, Any]) -> str:
    told = {key: f"{value:.4g}" if isinstance(value, float) else str(value) for key, value in values.items()}
    return ", ".join(f"{key} {text}" for key, text in told.items())


def _set(values: dict[str, Any]) -> dict[str, Any]:
    """Fields not zero, empty or off."""
    return {key: value for key, value in values.items() if value}


def _digest(material: dict[str, Any]) -> str:
    return f", sha256 {material['digest']['sha256']}" if "digest" in material else ""
