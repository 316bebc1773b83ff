"""Windows that a model has no embeddings for are refused by name, whatever its config calls their numbers."""

import shutil
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from stages import sampling

from drank.model.vocabulary import TokenError, check_windows, n_positions
from drank.project.checkpoint import Checkpoint
from drank.project.params import Healing
from drank.project.progress import progress
from drank.steps.healing import heal
from tests import tiny

IDS = torch.tensor([[0, 319], [5, 6]])
HEALING = {
    "objective": "text", "n_windows": 2, "window_length": 300, "epochs": 1, "batch_windows": 1,
    "learning_rate": 1e-3, "rank": 2, "alpha": 2, "threads": 1,
}  # fmt: skip


PASSING = {
    "llama": [IDS, torch.empty(0, 8, dtype=torch.int64), torch.zeros(1, 9999, dtype=torch.int64)],
    "gptj": [torch.zeros(1, 9999, dtype=torch.int64)],  # positions that turn
    "falcon": [torch.zeros(1, 9999, dtype=torch.int64)],
    "mamba": [torch.zeros(1, 9999, dtype=torch.int64)],
    "gpt2": [torch.zeros(1, 256, dtype=torch.int64)],
}


@pytest.mark.parametrize("architecture", PASSING)
def test_windows_that_the_model_has_embeddings_for_pass(architecture):
    model = tiny.decoder(architecture)
    for windows in PASSING[architecture]:
        check_windows(model, windows, "windows")
        check_windows(model.config, windows, "windows")
    assert n_positions(tiny.decoder("bloom").config) is None


@pytest.mark.parametrize("outside", [-1, 320, 2**31 - 1])
def test_an_id_outside_is_named_with_its_file_and_the_vocabulary(outside):
    windows = torch.tensor([[0, 1], [outside, 2]])
    for model in (tiny.llama(), tiny.llama().config):
        with pytest.raises(TokenError, match=rf"windows: holds token id {outside}, .* embeddings for 0 to 319"):
            check_windows(model, windows, "windows")


def test_a_config_without_a_vocabulary_size_says_nothing_of_ids_above():
    config = SimpleNamespace(get_text_config=SimpleNamespace)
    check_windows(config, torch.tensor([[10**6]]), "windows")
    with pytest.raises(TokenError, match="holds token id -1, and ids are never negative"):
        check_windows(config, torch.tensor([[-1]]), "windows")


# Learned positions, which a longer window would run out of, under two names; a table of slopes.
@pytest.mark.parametrize("architecture", ["gpt2", "opt", "mpt", "biogpt"])
def test_a_window_longer_than_the_positions_is_refused_by_its_parameter(architecture):
    changes = {"max_seq_len": 256} if architecture == "mpt" else {}
    model = tiny.decoder(architecture, **changes)
    for known in (model, model.config):
        with pytest.raises(TokenError, match="sampling.window_length is 257, but the model has 256 positions"):
            check_windows(known, torch.zeros(1, 257, dtype=torch.int64), "windows")


def test_sampling_refuses_windows_that_no_later_stage_could_run(tmp_path):
    tiny.project(tmp_path, tiny.gpt2())
    shutil.copytree(tmp_path / "source/model", tmp_path / "data/raw/model")
    (tmp_path / "data/raw/text").mkdir()
    for name in ("news", "commons"):
        shutil.copy(tmp_path / f"source/{name}.jsonl", tmp_path / "data/raw/text")
    params = (tmp_path / "params.yaml").read_text()
    (tmp_path / "params.yaml").write_text(params.replace("window_length: 64", "window_length: 300"))
    with pytest.raises(TokenError, match="sampling.window_length is 300, but the model has 256 positions"):
        sampling.main(tmp_path)
    assert not (tmp_path / "data/sampling").exists()


def test_healing_refuses_its_own_window_length_and_ids_of_another_vocabulary(tmp_path):
    def healed(asked, token):
        model, text = tiny.gpt2(), {"tokens": torch.full((900,), token)}
        model.config.quantization_config = {"quant_method": "drank"}
        kept, sha256 = partial(Checkpoint, tmp_path), {"compressed": "0" * 64}
        heal(lambda name, dtype: model.to(dtype), text, asked, "float32", sha256, kept, progress)

    asked = Healing(**HEALING)
    with pytest.raises(TokenError, match="healing.window_length is 300, but the model has 256 positions"):
        healed(asked, 0)
    with pytest.raises(TokenError, match="calibration_text.safetensors: holds token id 999"):
        healed(asked.model_copy(update={"window_length": 16}), 999)
