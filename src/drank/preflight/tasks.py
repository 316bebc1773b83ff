"""Tasks of evaluation: whether lm-eval has them, and whether their data can be fetched."""

import ast
import os
import re
import socket
from collections.abc import Iterator
from difflib import get_close_matches
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import urlsplit

from drank.planning.facts import Facts, cached_snapshot, offline
from drank.preflight.finding import Finding

SAMPLED = ("last_word", "next_sentence")
PATIENCE = 1.0  # seconds


def tasks(facts: Facts) -> Iterator[Finding]:
    """Tasks and groups that lm-eval does not have, or whose data cannot be fetched."""
    evaluation, n_items = facts.params.evaluation, facts.params.sampling.n_task_items
    if (sampled := [task for task in evaluation.tasks if task in SAMPLED]) and n_items < evaluation.processes:
        yield Finding(
            "error",
            f"evaluation.tasks: {', '.join(sampled)}: sampling.n_task_items = {n_items}, and each of "
            f"evaluation.processes = {evaluation.processes} needs one; raise it, or take the tasks out",
        )
    ours = {*SAMPLED, *(f"{name}_rolling" for name in facts.params.text)}
    asked = [task for task in evaluation.tasks if task not in ours]
    if not asked:
        return
    if (spec := find_spec("lm_eval")) is None or not spec.submodule_search_locations:
        yield Finding("error", "evaluation.tasks: lm-eval is not installed; `pip install lm-eval`")
        return
    known = lm_eval_names(Path(spec.submodule_search_locations[0], "tasks"))
    for task in asked:
        if task not in known:
            like = get_close_matches(task, [*known, *ours], 3)
            hint = f"; did you mean {', '.join(like)}?" if like else ""
            yield Finding("error", f"evaluation.tasks: '{task}' is neither a task or group of lm-eval nor ours{hint}")
    found = [task for task in asked if task in known]
    for task in found:
        if missing := missing_packages(known[task].parent):
            yield Finding("warning", f"evaluation.tasks: {task} imports {', '.join(missing)}: `pip install` them first")
    if found:
        named = f"evaluation.tasks: {', '.join(found)}: lm-eval fetches their data from the hub"
        missing = [task for task in found if not has_data(known[task])]
        if missing and offline():
            yield Finding("error", f"{named}; {', '.join(missing)} is not in the cache, and HF_HUB_OFFLINE is set")
        elif missing and not reachable(os.environ.get("HF_ENDPOINT", "https://huggingface.co")):
            yield Finding("error", f"{named}, which cannot be reached; take {', '.join(missing)} out")


def lm_eval_names(folder: Path) -> dict[str, Path]:
    """Every name that a file of lm-eval's tasks gives to a task, a group or a tag, and that file.

    lm-eval's own index takes 12 s to make.
    """
    names: dict[str, Path] = {}
    for file in folder.rglob("*.yaml"):
        for indent, key, here, below in NAMED.findall(file.read_text(encoding="utf-8", errors="replace")):
            listed = [*here.strip("[] ").split(","), *ITEM.findall(below)]
            for name in (one.strip(" '\"") for one in listed):
                if indent or (key == "task" and below):  # a group names what others define
                    names.setdefault(name, file)
                else:
                    names[name] = file
    return names


NAMED = re.compile(r"^( *(?:- )?)['\"]?(task|group|tag)['\"]?: *([^\n#]*)((?:\n *- +[^\s:]+ *$)*)", re.MULTILINE)
ITEM = re.compile(r"^ *- +(?:task: *)?([^\s:]+) *$", re.MULTILINE)
DATA = re.compile(r"^['\"]?dataset_path['\"]?: *['\"]?([^\s'\"#]+)", re.MULTILINE)


def has_data(file: Path) -> bool:
    """True if the hub's cache has the data sets that a task names, or else one that another task of its folder does."""

    def cached(other: Path) -> list[bool]:
        names = DATA.findall(other.read_text(encoding="utf-8", errors="replace"))
        return [cached_snapshot("datasets", name) is not None for name in names]

    around = [found for other in file.parent.glob("*yaml") for found in cached(other)]
    return all(own) if (own := cached(file)) else any(around) or not around


def missing_packages(folder: Path) -> list[str]:
    """Packages that the code beside a task's description imports and that are not installed."""
    names: set[str] = set()
    for file in folder.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_bytes())):
            if isinstance(node, ast.Import):
                names |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                names.add(node.module.partition(".")[0])
    return sorted(name for name in names if not (folder / f"{name}.py").is_file() and find_spec(name) is None)


def reachable(address: str) -> bool:
    place = urlsplit(address)
    try:
        port = place.port or (443 if place.scheme == "https" else 80)
        socket.create_connection((place.hostname or "", port), PATIENCE).close()
    except OSError:
        return bool(os.environ.get("HTTPS_PROXY") or os.environ.get("https_proxy"))  # which may reach it
    return True
