"""``drank params``: params.yaml as a JSON schema, which docs/params.schema.json is and docs/params.md is made of."""

import json
from typing import Any

import typer


def params() -> None:
    """Print the JSON schema of params.yaml: types, ranges, defaults, descriptions; editors complete keys by it."""
    typer.echo(json.dumps(json_schema(), indent=2, ensure_ascii=False))


def json_schema() -> dict[str, Any]:
    """JSON schema (draft 2020-12) of params.yaml. Rules between keys are not in it; the reader of the file has them."""
    from pydantic.json_schema import GenerateJsonSchema

    from drank.project.params import Params

    class ForEditors(GenerateJsonSchema):
        """Without titles, which would repeat the keys; names of one's own have to keep the rule of names."""

        def field_title_should_be_set(self, schema: Any) -> bool:
            return False

        def dict_schema(self, schema: Any) -> dict[str, Any]:
            return super().dict_schema(schema) | {"additionalProperties": False}

    schema = json.dumps(Params.model_json_schema(schema_generator=ForEditors))
    one_line = json.loads(schema.replace("\\n", " "))  # docstrings are broken where a line of code has to end
    return {"$schema": GenerateJsonSchema.schema_dialect} | one_line | {"title": "params.yaml of drank"}
