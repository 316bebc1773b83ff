"""The libraries whose insides drank uses, at the oldest versions that pyproject.toml allows, or at the newest.

``python -m tests.versions oldest`` prints them for pip, such as ``mlflow==3.13``; ``newest`` prints their ranges, of
which ``pip install --upgrade`` takes the newest; ``installed`` says what this environment has.
"""

import argparse
import tomllib
from importlib.metadata import version
from pathlib import Path

import typer
from packaging.requirements import Requirement

LIBRARIES = ("transformers", "mlflow", "dvc", "lm-eval")
PYPROJECT = Path(__file__).parent.parent / "pyproject.toml"


def ranges() -> dict[str, Requirement]:
    """The range that pyproject.toml asks of each of them."""
    lines = tomllib.loads(PYPROJECT.read_text(encoding="utf-8"))["project"]["dependencies"]
    asked = {requirement.name: requirement for requirement in map(Requirement, lines)}
    return {name: asked[name] for name in LIBRARIES}


def oldest(requirement: Requirement) -> str:
    """Its lower bound, as a requirement."""
    (bound,) = [specifier.version for specifier in requirement.specifier if specifier.operator == ">="]
    return f"{requirement.name}=={bound}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("which", choices=("oldest", "newest", "installed"))
    which = parser.parse_args().which
    for name, requirement in ranges().items():
        shown = {"oldest": oldest(requirement), "newest": str(requirement), "installed": f"{name}=={version(name)}"}
        typer.echo(shown[which])


if __name__ == "__main__":
    main()
