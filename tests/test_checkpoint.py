"""Checkpoints: read back as written, by the same training only, and never when damaged."""

import pytest
import torch

from drank.project.checkpoint import Checkpoint

STATE = {"weights": torch.arange(6.0).reshape(2, 3), "n_taken": torch.tensor(10)}
CURVE = [{"step": 1, "loss": 0.1, "learning_rate": 0.001}, {"step": 2, "loss": 0.25, "learning_rate": 1 / 3}]


@pytest.fixture
def written(tmp_path):
    checkpoint = Checkpoint(tmp_path / ".a.checkpoint", {"seed": 0})
    checkpoint.write(CURVE, STATE)
    return checkpoint


def test_what_was_written_is_read_and_then_removed(written):
    curve, state = written.read()
    assert curve == CURVE
    assert state.keys() == STATE.keys()
    assert all(torch.equal(state[name], STATE[name]) for name in STATE)
    written.remove()
    assert written.read() is None
    assert not written.folder.exists()


def test_that_of_another_training_is_not_read(written):
    assert Checkpoint(written.folder, {"seed": 1}).read() is None


@pytest.mark.parametrize("name", ["state.safetensors", "checkpoint.json"])
@pytest.mark.parametrize("cut", [False, True])
def test_a_damaged_one_is_not_read_and_the_log_says_so(written, caplog, name, cut):
    file = written.folder / name
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content[: len(content) // 2] if cut else content)
    assert written.read() is None
    assert "training starts anew" in caplog.text


def test_a_missing_file_is_damage(written):
    (written.folder / "state.safetensors").unlink()
    assert written.read() is None
