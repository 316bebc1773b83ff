"""Where a long training stands, on the disk: a killed stage goes on from there."""

import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from drank.project.files import (
    FileError,
    file_sha256,
    read_json,
    read_tensors,
    replacing_folder,
    write_json,
    write_tensors,
    write_text,
)

log = logging.getLogger("drank.checkpoint")
FILES = ("state.safetensors", "curve.csv")


class Checkpoint:
    """State and loss curve of a training, beside all that it depends on: that of another training is not read.

    Nor is a damaged one: the training starts anew, and the log says so.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any]) -> None:
        self.folder, self.identity = folder, dict(identity)

    def read(self) -> tuple[list[str], dict[str, Tensor]] | None:
        """Rows of the curve and the state; None where no checkpoint of this identity lies whole."""
        if not self.folder.exists():
            return None
        try:
            described = read_json(self.folder / "checkpoint.json")
        except FileError as error:
            log.warning("%s; training starts anew", error)
            return None
        if described["identity"] != self.identity:
            return None
        if described["sha256"] != _sha256(self.folder):
            log.warning("%s: damaged: not the files that its checkpoint.json is of; training starts anew", self.folder)
            return None
        curve = (self.folder / "curve.csv").read_text(encoding="utf-8").splitlines(keepends=True)
        return curve, read_tensors(self.folder / "state.safetensors")

    def write(self, curve: list[str], state: Mapping[str, Tensor]) -> None:
        """Take the place of the one before, whole or not at all."""
        with replacing_folder(self.folder) as folder:
            write_tensors(folder / "state.safetensors", {key: tensor.cpu() for key, tensor in state.items()})
            write_text(folder / "curve.csv", "".join(curve))
            write_json(folder / "checkpoint.json", {"identity": self.identity, "sha256": _sha256(folder)})

    def remove(self) -> None:
        if self.folder.exists():
            shutil.rmtree(self.folder)


def _sha256(folder: Path) -> dict[str, str]:
    return {name: file_sha256(folder / name) for name in FILES if (folder / name).is_file()}
