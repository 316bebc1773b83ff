"""Where a long training stands, on the disk: a killed stage goes on from there."""

import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from drank.project import files
from drank.project.files import FileError, file_sha256

log = logging.getLogger("drank.checkpoint")
Curve = list[dict[str, Any]]  # rows of step, loss and learning_rate


class Checkpoint:
    """State and loss curve of a training, beside all that it depends on: that of another training is not read.

    Nor is a damaged one: the training starts anew, and the log says so.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any]) -> None:
        self.folder, self.identity = folder, dict(identity)

    def read(self) -> tuple[Curve, dict[str, Tensor]] | None:
        """Loss curve and state; None where no checkpoint of this identity lies whole."""
        if not self.folder.exists():
            return None
        state = self.folder / "state.safetensors"
        try:
            described = files.read_json(self.folder / "checkpoint.json")
            if described["identity"] != self.identity:
                return None
            if not state.is_file() or described["sha256"] != file_sha256(state):
                raise FileError(f"{state}: damaged: not the file that its checkpoint.json is of")
            tensors = files.read_tensors(state)
        except FileError as error:
            log.warning("%s; training starts anew", error)
            return None
        rows = tensors.pop("curve").tolist()
        return [{"step": int(step), "loss": loss, "learning_rate": rate} for step, loss, rate in rows], tensors

    def write(self, curve: Curve, state: Mapping[str, Tensor]) -> None:
        """Take the place of the one before, whole or not at all."""
        with files.replacing_folder(self.folder) as folder:
            rows = torch.tensor([list(row.values()) for row in curve], dtype=torch.float64)
            tensors = {key: tensor.cpu() for key, tensor in state.items()} | {"curve": rows}
            files.write_tensors(folder / "state.safetensors", tensors)
            sha256 = file_sha256(folder / "state.safetensors")
            files.write_json(folder / "checkpoint.json", {"identity": self.identity, "sha256": sha256})

    def remove(self) -> None:
        if self.folder.exists():
            shutil.rmtree(self.folder)
