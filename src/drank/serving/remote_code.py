"""The compressed folder itself, which says ``import drank`` where its receiver allows a folder to run code."""

import re
import shutil
from collections.abc import Mapping
from pathlib import Path

from drank.project.files import write_text
from drank.serving.export import ExportError
from drank.steps.release import CHECKSUMS

MODULE = "configuration_drank"
# transformers knows a configuration's models by its class: a re-exported one is known, a subclass would not be.
CODE = "import drank\nfrom {module} import {name}\n"
KEY = '  "auto_map": {{"AutoConfig": "' + MODULE + '.{name}"}},\n'
WRITTEN = re.compile(re.escape(CODE).replace(r"\{module\}", r"transformers(\.\w+)*").replace(r"\{name\}", r"\w+Config"))


def write(model: Path, folder: Path, *, provenance: Mapping[str, str]) -> None:
    """Copy the folder, add the two lines of code, and name them in config.json.

    Raises:
        ExportError: the configuration's class is another package's, or config.json names code already.
    """
    from transformers import AutoConfig

    kind = type(AutoConfig.from_pretrained(model, local_files_only=True, trust_remote_code=False))
    code = CODE.format(module=kind.__module__, name=kind.__name__)
    text = (model / "config.json").read_text(encoding="utf-8")
    if "auto_map" in text or not WRITTEN.fullmatch(code):
        raise ExportError(f"{model}: its model has code of its own, which config.json names")
    for file in model.iterdir():
        if file.name != CHECKSUMS:
            shutil.copyfile(file, folder / file.name)
    write_text(folder / f"{MODULE}.py", code)
    write_text(folder / "config.json", text.replace("{\n", "{\n" + KEY.format(name=kind.__name__), 1))


def released_config(text: str) -> str:
    """config.json as it was before :func:`write` named the code in it."""
    return re.sub(re.escape(KEY.format(name="@")).replace("@", r"\w+Config"), "", text, count=1)
