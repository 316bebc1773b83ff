"""The reference of params.yaml, from its types: a page to read, and a JSON schema for editors.

``drank params`` prints them. docs/params.md and docs/params.schema.json are what it printed; tests/test_reference.py
compares.
"""

import inspect
import json
import re
from collections.abc import Iterator, Mapping
from typing import Any, get_args

from pydantic.json_schema import GenerateJsonSchema

from drank.project.params import (
    PRESET_TABLES,
    SPECTRUM_TABLES,
    Name,
    Params,
    Section,
    Sha256,
    SourceName,
    readers_of,
)

Schema = Mapping[str, Any]
TABLES: dict[str, Mapping[str, Mapping[str, Any]]] = {"spectrum": SPECTRUM_TABLES, "presets": PRESET_TABLES}
PATTERNS = {
    get_args(kind)[1].pattern: words
    for kind, words in ((Name, "name"), (Sha256, "64 hexadecimal digits"), (SourceName, "source"))
}

HEAD = """# params.yaml: every key

Made by `drank params > docs/params.md` from the types in `src/drank/project/params.py`, which also check the file; do
not edit it. `docs/params.schema.json` (`drank params --schema`) is the same for editors: by the first line of
`params.yaml`, those that speak to a YAML language server complete keys, show these sentences, and underline mistakes.

A key without a default has to be there; an unknown one is refused. A name is one of your own: letters, digits, `.`, `_`
and `-`, with a letter or digit first. The file is YAML 1.2: `1e-4` is a number, `yes` and `on` are texts.
[choices.md](choices.md) explains the four choices of a method.
"""


class UndescribedError(ValueError):
    """A key of params.yaml has no sentence that describes it; the message names it."""


class _ForEditors(GenerateJsonSchema):
    """Without titles, which would repeat the keys; names of one's own have to keep the rule of names."""

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False

    def dict_schema(self, schema: Any) -> dict[str, Any]:
        return super().dict_schema(schema) | {"additionalProperties": False}


def json_schema() -> dict[str, Any]:
    """JSON schema (draft 2020-12) of params.yaml: keys, types, ranges, defaults, descriptions.

    Rules between keys are not in it; they are checked when the file is read (``rules``).
    """
    schema = Params.model_json_schema(schema_generator=_ForEditors)
    return {"$schema": GenerateJsonSchema.schema_dialect} | _one_line(schema) | {"title": "params.yaml of drank"}


def rules(section: type[Section]) -> list[str]:
    """Rules of a section between its keys: the bullets in the docstrings of its validators."""
    found = []
    for validator in section.__pydantic_decorators__.model_validators.values():
        _, *bullets = re.split(r"^\* ", inspect.getdoc(validator.func) or "", flags=re.MULTILINE)
        found += [" ".join(bullet.split()) for bullet in bullets]
    return found


def markdown() -> str:
    """The page: a table of keys a section, then the rules between keys.

    Raises:
        UndescribedError: a key has no description.
    """
    return "\n".join([HEAD, *_sections(), "## Rules between sections", *_bullets(Params), ""])


def _sections() -> Iterator[str]:
    schema = json_schema()
    for key, described in schema["properties"].items():
        name = f"{key}.<name>" if "patternProperties" in described else key
        yield from _section(name, _definition(described), _description(key, described), schema["$defs"])


def _section(key: str, section: str, description: str, definitions: Schema) -> Iterator[str]:
    yield f"## `{key}`"
    yield f"{description}\n"
    yield "| key | value | default | meaning |\n|---|---|---|---|"
    inner = {}
    for name, entry in definitions[section]["properties"].items():
        if any("$ref" in option for option in entry.get("anyOf", ())):
            inner[name] = entry
        required = name in definitions[section].get("required", ())
        cells = (
            f"`{name}`",
            _values(entry),
            "" if required else _default(entry),
            _description(f"{key}.{name}", entry) + _read_by(key.partition(".")[0], name),
        )
        yield f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"
    yield ""
    yield from _bullets(next(cls for cls in Section.__subclasses__() if cls.__name__ == section))
    for name, entry in inner.items():
        yield from _section(f"{key}.{name}", _definition(entry), _description(f"{key}.{name}", entry), definitions)


def _read_by(section: str, name: str) -> str:
    """The choices that read a parameter, where only some do."""
    readers = [f"{kind} `{row}`" for kind, row in readers_of(name, TABLES.get(section, {}))]
    return f" Read by {', '.join(readers)}." if readers else ""


def _definition(described: Schema) -> str:
    """The class of a section, or of every entry of a section of names."""
    (reference,) = set(re.findall(r"#/\$defs/(\w+)", json.dumps(described)))
    return reference


def _bullets(section: type[Section]) -> list[str]:
    return [*(f"* {rule}" for rule in rules(section)), ""] if rules(section) else []


def _description(key: str, schema: Schema) -> str:
    if "description" not in schema:
        raise UndescribedError(
            f"'{key}' of params.yaml has no description; write one below its field in src/drank/project/params.py"
        )
    return schema["description"]


def _default(schema: Schema) -> str:
    return "none" if schema["default"] is None else f"`{json.dumps(schema['default'])}`"


def _values(schema: Schema) -> str:
    """Type and range in words: ``number in (0, 1]``, ``integer, at least 1``, ``list of texts``."""
    if "anyOf" in schema:
        return "; or ".join(_values(option) for option in schema["anyOf"] if option != {"type": "null"})
    if "$ref" in schema:
        return "a section of its own, below"
    if "enum" in schema:
        return ", ".join(f"`{value}`" for value in schema["enum"])
    if "const" in schema:
        return f"`{schema['const']}`"
    match schema["type"]:
        case "array":
            each = re.sub(r"^(text|number|integer)", r"\1s", _values(schema["items"]))
            return f"list of {each}" + ("; not empty" if schema.get("minItems") else "")
        case "boolean":
            return "`true` or `false`"
        case "string":
            pattern = schema.get("pattern")
            return PATTERNS.get(pattern, f"text like `{pattern}`") if pattern else "text"
        case kind:
            return kind + _range(schema)


def _range(schema: Schema) -> str:
    low, high = (
        schema.get(a, schema.get(b)) for a, b in (("minimum", "exclusiveMinimum"), ("maximum", "exclusiveMaximum"))
    )
    if high is None:
        return "" if low is None else f", at least {low}" if "minimum" in schema else f", above {low}"
    return f" in {'[' if 'minimum' in schema else '('}{low}, {high}{']' if 'maximum' in schema else ')'}"


def _one_line(schema: Any) -> Any:
    """The schema with every description as one line: docstrings are broken where a line of code has to end."""
    if isinstance(schema, dict):
        return {
            key: " ".join(value.split()) if key == "description" and isinstance(value, str) else _one_line(value)
            for key, value in schema.items()
        }
    return [_one_line(item) for item in schema] if isinstance(schema, list) else schema
