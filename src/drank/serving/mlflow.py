"""MLflow: a released folder as a model of flavour ``python_function``, which continues prompts.

The folder's ``MLmodel`` names this module, so ``mlflow models serve -m FOLDER --env-manager local`` needs no more than
drank in its environment. MLflow itself is not imported.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import drank  # noqa: F401  registers the format
from drank.model.checksums import CHECKSUMS, ChecksumError
from drank.project.files import file_sha256

if TYPE_CHECKING:
    import pandas as pd

RELEASED = "released"  # key of MLmodel's `config`: the SHA-256 of the SHA256SUMS of the folder that it means


class Prompts:
    """A model and its tokenizer, with the ``predict`` that MLflow calls."""

    def __init__(self, folder: Path) -> None:
        import torch
        from transformers import AutoTokenizer

        from drank.model.precision import compute_dtype, load_model

        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model = load_model(folder, compute_dtype("auto", device), device)
        self.tokenizer = AutoTokenizer.from_pretrained(folder)

    def predict(self, prompts: "pd.DataFrame", params: Mapping[str, Any]) -> list[str]:
        """The likeliest continuation of each prompt, token by token, of at most ``max_new_tokens``.

        Args:
            prompts: one column of texts.
        """
        return [self._continued(prompt, params["max_new_tokens"]) for prompt in prompts.iloc[:, 0]]

    def _continued(self, prompt: str, max_new_tokens: int) -> str:
        tokens = self.tokenizer(prompt, return_tensors="pt").to(self.model.device)
        out = self.model.generate(**tokens, max_new_tokens=max_new_tokens, do_sample=False)
        return self.tokenizer.decode(out[0, tokens["input_ids"].shape[1] :], skip_special_tokens=True)


def _load_pyfunc(path: str, config: Mapping[str, str] | None = None) -> Prompts:
    """The model of a folder; MLflow calls this by name.

    Raises:
        ChecksumError: the folder has another model than the one that was registered.
    """
    folder = Path(path)
    if config and file_sha256(folder / CHECKSUMS) != config[RELEASED]:
        raise ChecksumError(
            f"{folder}: another model than the registered one: its {CHECKSUMS} has another hash; bring the registered "
            f"one back with git and `dvc checkout`, or promote what is there now"
        )
    return Prompts(folder)
