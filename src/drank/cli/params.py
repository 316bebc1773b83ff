"""``drank params``: the reference of params.yaml."""

import json
from typing import Annotated

import typer


def params(
    schema: Annotated[bool, typer.Option("--schema", help="Print the JSON schema for editors instead.")] = False,
) -> None:
    """Print what every key of params.yaml means: type, range, default, and the rules between keys."""
    from drank.project.reference import json_schema, markdown

    typer.echo(json.dumps(json_schema(), indent=2, ensure_ascii=False) if schema else markdown(), nl=schema)
