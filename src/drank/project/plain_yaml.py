"""YAML 1.2 by the library that DVC has for it, so that both find the same values; plain data alone."""

from typing import Any

from ruamel.yaml import YAML, YAMLError
from ruamel.yaml.nodes import Node

LONGEST = 2**20  # characters of a document with its aliases written out; of the study's there are 2**16
LONGEST_NUMBER = 18  # digits of an integer: torch takes 64 bits


class YamlError(ValueError):
    """The text is no YAML, or not plain; the message says where."""


def load(content: str | bytes) -> Any:
    """The document that a text holds: mappings, lists and scalars.

    Raises:
        YamlError: not UTF-8 or YAML, a tag that is not plain, a key that is there twice, an integer beyond 64 bits,
            nesting without end, or aliases that do: nine lines of them can stand for gigabytes.
    """
    yaml = YAML(typ="safe", pure=True)
    try:
        node = yaml.compose(content if isinstance(content, str) else content.decode())
        if node and _length(node, {}) >= LONGEST:
            raise YamlError(f"longer than {LONGEST} characters with its aliases (*) written out")
        return node and yaml.constructor.construct_document(node)
    except UnicodeDecodeError as error:
        raise YamlError(f"not UTF-8: {error}; save it in that encoding") from None
    except YAMLError as error:
        raise YamlError(f"not YAML: {str(error).partition('To suppress')[0].rstrip()}") from None
    except RecursionError:
        raise YamlError("nested too deeply; sections are three levels deep at most") from None
    except YamlError:
        raise
    except (ValueError, AttributeError, KeyError, TypeError) as error:  # ruamel's own, of 2020-13-45 or !!bool x
        raise YamlError(f"holds a value that cannot be read: {error}") from None


def _length(node: Node, known: dict[Node, int]) -> int:
    """Characters of a node with its aliases written out; each node is measured once, one within itself is endless."""
    if node not in known:
        known[node] = LONGEST
        if node.tag == "tag:yaml.org,2002:int" and len(node.value) > LONGEST_NUMBER:
            raise YamlError(f"an integer beyond 64 bits{node.start_mark}")
        inner = [] if isinstance(node.value, str) else node.value
        parts = (part for row in inner for part in (row if isinstance(row, tuple) else (row,)))
        known[node] = len(node.value) + sum(_length(part, known) for part in parts)
    return known[node]
