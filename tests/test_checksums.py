"""A released folder that is damaged is refused by from_pretrained, by name."""

import hashlib

import pytest
from transformers import AutoModelForCausalLM

from drank.model.checksums import ChecksumError, check_released
from tests import compressed, tiny


def release(folder):
    lines = [f"{hashlib.sha256(file.read_bytes()).hexdigest()}  {file.name}\n" for file in sorted(folder.iterdir())]
    (folder / "SHA256SUMS").write_text("".join(lines))


@pytest.fixture
def released(tmp_path):
    compressed.write(tiny.llama(), compressed.LLAMA, tmp_path / "model")
    release(tmp_path / "model")
    return tmp_path / "model"


def flip(file, position=-1):
    content = bytearray(file.read_bytes())
    content[position] ^= 1
    file.write_bytes(content)


def test_a_flipped_bit_of_the_weights_or_a_changed_number_of_the_configuration_is_refused(released):
    with (released / "SHA256SUMS").open("a") as file:
        file.write("0" * 64 + "  README.md\n")  # listed and not loaded, so not asked for
    for name in ("tokenizer_config.json", "tokenizer.json"):  # what does not change the model may change
        flip(released / name, 2)
    AutoModelForCausalLM.from_pretrained(released)
    config = released / "config.json"
    before = config.read_text()
    config.write_text(before.replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-05'))
    with pytest.raises(ChecksumError, match="config.json"):
        AutoModelForCausalLM.from_pretrained(released)
    config.write_text(before)
    flip(released / "model.safetensors")
    with pytest.raises(ChecksumError, match="model.safetensors: damaged, or changed since it was released"):
        AutoModelForCausalLM.from_pretrained(released)


def test_a_shard_is_named(tmp_path):
    model = AutoModelForCausalLM.from_pretrained(compressed.write(tiny.llama(), compressed.LLAMA, tmp_path / "one"))
    model.save_pretrained(tmp_path / "shards", max_shard_size="20kB")
    release(tmp_path / "shards")
    shards = sorted((tmp_path / "shards").glob("*.safetensors"))
    assert len(shards) > 1
    AutoModelForCausalLM.from_pretrained(tmp_path / "shards")
    flip(shards[1])
    with pytest.raises(ChecksumError, match=shards[1].name):
        AutoModelForCausalLM.from_pretrained(tmp_path / "shards")


def test_one_may_say_that_it_is_another_model_now(released, monkeypatch):
    flip(released / "model.safetensors")
    monkeypatch.setenv("DRANK_CHECKSUMS", "0")
    AutoModelForCausalLM.from_pretrained(released)
    monkeypatch.delenv("DRANK_CHECKSUMS")
    (released / "SHA256SUMS").unlink()
    AutoModelForCausalLM.from_pretrained(released)


@pytest.mark.parametrize("content", ["", "no hash\n", "0" * 63 + "  model.safetensors\n", "\xff\xfe"])
def test_checksums_that_are_none_are_refused(released, content):
    (released / "SHA256SUMS").write_text(content, encoding="latin-1")
    with pytest.raises(ChecksumError, match="SHA256SUMS: damaged"):
        check_released([released / "model.safetensors"])
