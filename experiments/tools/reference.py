"""``python -m experiments.tools.reference > docs/params.md``: every key of params.yaml, from its types.

The committed page is what it printed; tests/test_reference.py compares.
"""

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any, get_args

import typer

from drank.cli.params import json_schema
from drank.project import params
from drank.project.params import Section, readers_of

Schema = Mapping[str, Any]
PATTERNS = {
    params.PATTERN: "name",
    get_args(params.Sha256)[1].pattern: "64 hexadecimal digits",
    get_args(params.SourceName)[1].pattern: "source",
}

HEAD = """# params.yaml: every key

Made by `python -m experiments.tools.reference > docs/params.md` from the types in `src/drank/project/params.py`, which
also check the file; do not edit it. `docs/params.schema.json` (`drank params`) is the same for editors: by the first
line of `params.yaml`, those that speak to a YAML language server complete keys, show these sentences, and underline
mistakes.

A key without a default has to be there; an unknown one is refused. A name is one of your own, of at most 64 letters,
digits, `_` and `-`, with a letter or digit first; none that YAML reads as a number or a date (`80`, `1e5`). The file is
YAML 1.2: `1e-4` is a number, `yes` and `on` are texts.
[choices.md](choices.md) explains the five choices of a method.
"""


def markdown() -> str:
    """The page: a table of keys per section, then the rules between keys."""
    schema = json_schema()
    lines = [HEAD]
    for key, described in schema["properties"].items():
        name = f"{key}.<name>" if "patternProperties" in described else key
        lines += _section(name, described, schema["$defs"])
    return "\n".join([*lines, "## Rules between sections", *_rules(params.Params), ""])


def _section(key: str, described: Schema, definitions: Schema) -> Iterator[str]:
    (section,) = set(re.findall(r"#/\$defs/(\w+)", json.dumps(described)))
    yield f"## `{key}`\n{described['description']}\n\n| key | value | default | meaning |\n|---|---|---|---|"
    keys = definitions[section]["properties"]
    for name, entry in keys.items():
        readers = [f"{kind} `{row}`" for kind, row in readers_of(key.partition(".")[0], name)]
        meaning = entry["description"] + (f" Read by {', '.join(readers)}." if readers else "")
        default = f"`{json.dumps(entry['default'])}`".replace("`null`", "none") if "default" in entry else ""
        cells = (f"`{name}`", _values(entry), default, meaning)
        yield f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"
    yield ""
    yield from _rules(getattr(params, section))
    for name, entry in keys.items():
        if any("$ref" in option.get("items", option) for option in entry.get("anyOf", ())):
            yield from _section(f"{key}.{name}", entry, definitions)


def _rules(section: type[Section]) -> list[str]:
    return [*(f"* {rule}" for rule in section.rules), ""] if section.rules else []


def _values(schema: Schema) -> str:
    """Type and range in words: ``number in (0, 1]``, ``integer, at least 1``, ``list of texts``."""
    if "anyOf" in schema:
        return "; or ".join(_values(option) for option in schema["anyOf"] if option != {"type": "null"})
    if "$ref" in schema:
        return "a section of its own, below"
    if "enum" in schema or "const" in schema:
        return ", ".join(f"`{value}`" for value in schema.get("enum", [schema.get("const")]))
    if schema["type"] == "array":
        each = re.sub(r"^(?:a )?(text|number|integer|section)\b", r"\1s", _values(schema["items"]))
        return f"list of {each}" + ("; not empty" if schema.get("minItems") else "")
    if schema["type"] == "string":
        return PATTERNS[schema["pattern"]] if "pattern" in schema else "text"
    return "`true` or `false`" if schema["type"] == "boolean" else schema["type"] + _range(schema)


def _range(schema: Schema) -> str:
    low, high = (
        schema.get(a, schema.get(b)) for a, b in (("minimum", "exclusiveMinimum"), ("maximum", "exclusiveMaximum"))
    )
    if high is None:
        return "" if low is None else f", at least {low}" if "minimum" in schema else f", above {low}"
    return f" in {'[' if 'minimum' in schema else '('}{low}, {high}{']' if 'maximum' in schema else ')'}"


if __name__ == "__main__":
    typer.echo(markdown(), nl=False)
