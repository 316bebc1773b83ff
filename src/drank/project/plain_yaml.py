"""YAML that means the same to everyone who reads it, and no more than it says.

Plain data only: no tag makes an object. Refused is what DVC, which reads YAML 1.2, would take for another value than
PyYAML, which reads 1.1; a repeated key, of which PyYAML takes the last; and what aliases blow up.
"""

import json
import re
from typing import Any

import yaml

OF_YAML_1_1 = re.compile(r"(?i:yes|no|on|off)|[-+]?0[0-9_]+|[-+]?[0-9][0-9_]*(:[0-5]?[0-9])+(\.[0-9_]*)?")
LONGEST = 2**22  # characters of a document with its aliases written out; of the study's there are 2**16
LONGEST_NUMBER = 18  # digits of an integer: torch takes 64 bits
MOST_KEYS = 10_000  # of a mapping, with what is merged into it


class YamlError(ValueError):
    """The text is no YAML, or means more than one thing; the message says where."""


def load(text: str) -> Any:
    """The document that a text holds: mappings, lists and scalars.

    Raises:
        YamlError: not YAML, a tag that is not plain, a value of which versions 1.1 and 1.2 make different ones, a key
            that is there twice, an integer beyond 64 bits, or nesting without end.
    """
    try:
        return yaml.load(text, Loader)
    except yaml.YAMLError as error:
        raise YamlError(f"not YAML: {error}") from None
    except (ValueError, AttributeError, KeyError) as error:  # PyYAML's own, for dates such as 2020-13-45 or !!bool x
        raise YamlError(f"holds a value that cannot be read: {error}") from None
    except RecursionError:
        raise YamlError("nested too deeply; sections are three levels deep at most") from None


def to_json(document: Any) -> str:
    """A document as JSON, with its aliases written out, piece by piece: nine lines of them can stand for gigabytes.

    Raises:
        YamlError: an alias within what it names, more than 4 million characters, or a key that is no name.
    """
    pieces, length = [], 0
    try:
        for piece in json.JSONEncoder(default=str).iterencode(document):
            pieces.append(piece)
            length += len(piece)
            if length > LONGEST:
                break
    except (ValueError, RecursionError) as error:  # an alias inside what it names, or an endless integer
        raise YamlError(f"holds what cannot be written out: {error}") from None
    except TypeError as error:  # a key that is a date or bytes
        raise YamlError(f"{error}; keys are names") from None
    if length > LONGEST:
        raise YamlError(f"longer than {LONGEST} characters with its aliases (*) written out")
    return "".join(pieces)


class Loader(yaml.SafeLoader):
    """PyYAML's safe loader with the rules of this module."""

    def compose_scalar_node(self, anchor: Any) -> yaml.ScalarNode:
        node = super().compose_scalar_node(anchor)
        if node.style is None and OF_YAML_1_1.fullmatch(node.value):
            raise yaml.composer.ComposerError(
                f"'{node.value}' is one value in YAML 1.1 and another in 1.2, which DVC reads",
                node.start_mark,
                "write true or false, a number without leading zeros and colons, or quotes around a name",
                node.start_mark,
            )
        if len(node.value) > LONGEST_NUMBER and node.tag == "tag:yaml.org,2002:int":
            raise yaml.composer.ComposerError(None, None, "an integer beyond 64 bits", node.start_mark)
        return node

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        first: dict[str, yaml.ScalarNode] = {}
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key is not first.setdefault(key.value, key):
                raise yaml.composer.ComposerError(
                    f"key '{key.value}'", first[key.value].start_mark, "is there again", key.start_mark
                )
        return node

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        super().flatten_mapping(node)
        if len(node.value) > MOST_KEYS:
            raise yaml.constructor.ConstructorError(None, None, "merge keys (<<) repeat too much", node.start_mark)
