"""Names and values as MLflow takes them: everything that drank logs passes here.

MLflow takes letters, digits, spaces and ``_ - . : /`` in the name of a metric, a parameter or a tag, at most 250 of
them, and no name that would mean another path, such as ``a//b``. Tasks, texts and files have other names too. So every
other character is percent-encoded, with ``:`` in the place of ``%``: ``exact_match,strict-match/gsm8k`` is logged as
``exact_match:2Cstrict-match/gsm8k``. ``:`` itself is ``:3A``, so two names never become one. A name or a value that is
too long keeps its beginning and ends in ``::`` and the SHA-256 of the whole.
"""

import hashlib
import re
from collections.abc import Mapping

LONGEST_NAME, LONGEST_PARAM, LONGEST_TAG = 250, 6000, 8000  # characters; MLflow cuts values, and two may become one
OTHER = re.compile(r"[^/\w.\- ]")
# Segments of dots, slashes at an end or in a row, and nothing at all.
PATHS = re.compile(r"(?<![^/])\.{1,2}(?![^/])|^\.\.|^/|/$|(?<=/)/|^$")


def name_of(text: str) -> str:
    """The name under which MLflow has a metric, a parameter or a tag."""
    return _fitting(PATHS.sub(_encoded, OTHER.sub(_encoded, text)), LONGEST_NAME)


def named(values: Mapping[str, str], longest: int) -> dict[str, str]:
    """Parameters or tags as MLflow takes them, values of at most ``longest`` characters."""
    return {name_of(key): _fitting(value, longest) for key, value in values.items()}


def _encoded(found: re.Match[str]) -> str:
    return "".join(f":{byte:02X}" for byte in found[0].encode(errors="surrogatepass")) or ":"


def _fitting(text: str, longest: int) -> str:
    ending = f"::{hashlib.sha256(text.encode(errors='surrogatepass')).hexdigest()}"
    return text if len(text) <= longest else text[: longest - len(ending)] + ending
