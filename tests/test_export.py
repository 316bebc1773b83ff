"""drank export: plain folders that predict what the compressed ones predict, and whatever their weights' files are."""

import json
import os
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version

import pytest
import torch
from stages import compression, release
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from drank.audit import audit
from drank.audit.exported import parse_metadata
from drank.cli.export import GgufType, export
from drank.project.files import FileError, file_sha256, read_json, weights_sha256
from drank.project.sources import SourceError
from drank.serving.export import EXPORT, FORMS, ExportError, describe
from drank.serving.gguf import CONVERTER
from drank.steps.release import CHECKSUMS, STATEMENT
from tests import compressed, tiny

IDS = torch.arange(2, 50).view(2, 24)
VARIANT = "kfac-80"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Compressed folders by architecture."""
    return {
        name: compressed.write(dense(), specs, tmp_path_factory.mktemp(name))
        for name, (dense, specs) in compressed.MODELS.items()
    }


@pytest.fixture
def llama(folders):
    return folders["llama"]


@torch.no_grad()
def logits(folder, dtype=torch.float32):
    model, loading = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, output_loading_info=True)
    assert not any(loading.values())
    return model(input_ids=IDS).logits


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_the_plain_folder_has_the_architectures_modules_and_the_same_logits(architecture, folders, tmp_path):
    folder = folders[architecture]
    export(folder, tmp_path / "plain", dense=True)
    torch.testing.assert_close(logits(tmp_path / "plain"), logits(folder), rtol=0, atol=1e-4)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    original = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path / "plain"))
    assert [(n, type(m)) for n, m in plain.named_modules()] == [(n, type(m)) for n, m in original.named_modules()]
    assert "quantization_config" not in read_json(tmp_path / "plain/config.json")
    if architecture == "llama":  # channels that are gone come back as zeros, in every layer as many as it lost
        for layer, kept in zip(plain.model.layers, (40, 24), strict=True):
            for channels in (layer.mlp.gate_proj.weight, layer.mlp.up_proj.weight, layer.mlp.down_proj.weight.T):
                assert channels.shape == (64, 32)
                assert channels[:kept].abs().amin(0).gt(0).all()
                assert not channels[kept:].any()


def test_weights_in_shards_give_shards_that_are_no_larger(llama, tmp_path):
    AutoModelForCausalLM.from_pretrained(llama).save_pretrained(tmp_path / "shards", max_shard_size="30KB")
    tiny.tokenizer().save_pretrained(tmp_path / "shards")
    export(tmp_path / "shards", tmp_path / "plain", dense=True)
    sizes = [[file.stat().st_size for file in (tmp_path / name).glob("*.safetensors")] for name in ("shards", "plain")]
    assert all(len(files) > 1 for files in sizes)
    # The limit is one on tensors; a file has a header besides.
    assert max(sizes[1]) < max(sizes[0]) + 2000
    export(llama, tmp_path / "whole", dense=True)
    assert torch.equal(logits(tmp_path / "plain"), logits(tmp_path / "whole"))


@pytest.mark.pipeline
def test_a_released_folder_becomes_a_plain_one_with_the_same_bytes_each_time(project, tmp_path, capsys):
    model = project / "data/models" / VARIANT
    for name in ("first", "second"):
        export(model, tmp_path / name, dense=True)
    assert tiny.folder_sha256(tmp_path / "first") == tiny.folder_sha256(tmp_path / "second")
    base = project / "data/raw/model"
    size = (base / "model.safetensors").stat().st_size / 1e6
    assert f"{tmp_path / 'first'}: {size:.1f} MB, plain; nothing is saved in size" in capsys.readouterr().out
    papers = {"README.md", "allocation.json", STATEMENT, EXPORT, CHECKSUMS}
    assert {f.name for f in (tmp_path / "first").iterdir()} == {f.name for f in base.iterdir()} | papers
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "first")
    assert {parameter.dtype for parameter in plain.parameters()} == {torch.bfloat16}
    # In float32 arithmetic, where the rounding of the products to bfloat16 is all that differs: 2^-9 of a weight.
    a, b = logits(model), logits(tmp_path / "first")
    assert (a - b).square().mean().sqrt() < 2**-7 * a.std()
    text = "Kalo min tudra."
    assert AutoTokenizer.from_pretrained(tmp_path / "first")(text) == AutoTokenizer.from_pretrained(base)(text)
    told = (tmp_path / "first/README.md").read_text()
    for file in (model / CHECKSUMS, model / "allocation.json", base / "model.safetensors"):
        assert f"`{file_sha256(file)}`" in told
    assert all(path.stat().st_mode & 0o777 == 0o644 for path in (tmp_path / "first").iterdir())


@pytest.mark.pipeline
def test_a_base_model_in_shards_is_named_by_one_hash_that_the_audit_finds_again(project, tmp_path):
    root = shutil.copytree(
        project, tmp_path / "project", symlinks=True, ignore=shutil.ignore_patterns(".git", ".dvc", "dvc.lock")
    )
    base = root / "data/raw/model"
    AutoModelForCausalLM.from_pretrained(base).save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    shards = {file.name: file_sha256(file) for file in (tmp_path / "shards").glob("*.safetensors")}
    assert len(shards) > 1
    before = tiny.folder_sha256(root / "data/compression" / VARIANT)
    compression.main(VARIANT, root)
    assert tiny.folder_sha256(root / "data/compression" / VARIANT) == before
    (base / "model.safetensors").unlink()
    for file in (tmp_path / "shards").glob("model*"):
        shutil.copy(file, base)
    compression.main(VARIANT, root)
    release.main(VARIANT, root)
    folder = root / "data/models" / VARIANT
    recorded = read_json(folder / "config.json")["quantization_config"]["provenance"]["base_model_sha256"]
    assert recorded == weights_sha256(shards)
    assert recorded not in shards.values()
    findings = {link.name: link.finding for link in audit(folder, None).links}
    assert findings["allocation"] == findings["ranks"] == findings["sizes"] == "holds"


def edit(**changes):
    """Spoils config.json: the quantization_config with these changes, or without it."""

    def spoil(folder):
        config = read_json(folder / "config.json")
        section = config.pop("quantization_config")
        config |= {"quantization_config": section | changes} if changes else {}
        (folder / "config.json").write_text(json.dumps(config))

    return spoil


def without_tokenizer(folder):
    for file in folder.glob("token*"):
        file.unlink()


def test_a_folder_is_not_exported_into_itself(llama, tmp_path):
    """It would be another folder then, which no audit knows."""
    (tmp_path / "link").symlink_to(shutil.copytree(llama, tmp_path / "model"))
    with pytest.raises(ExportError, match="inside the folder that is exported"):
        export(tmp_path / "model", tmp_path / "link/plain", dense=True)


SPOILT = {
    "no config.json": (lambda f: (f / "config.json").unlink(), ExportError, r"no config\.json, so not the folder"),
    "plain": (edit(), ExportError, "not compressed, so plain already"),
    "another method": (
        edit(quant_method="gptq"), FileError,
        "config.json: quantization_config.quant_method: Input should be 'drank'",
    ),
    "without --dense": (lambda f: None, ExportError, "`import drank`, so copy it as it is .* exactly one of --dense, "),
    "there already": (lambda f: (f.parent / "plain").mkdir(), ExportError, "plain: exists already"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), ExportError, "no weights"),
    "no tokenizer": (without_tokenizer, SourceError, "its tokenizer cannot be loaded; copy that of the base"),
    "torn": (lambda f: (f / "model.safetensors").write_bytes(b"torn"), FileError, r"model\.safetensors: damaged"),
}  # fmt: skip


@pytest.mark.parametrize("case", SPOILT)
def test_what_cannot_be_exported_is_explained_and_nothing_is_written(llama, tmp_path, case):
    spoil, error, message = SPOILT[case]
    shutil.copytree(llama, tmp_path / "model")
    spoil(tmp_path / "model")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(error, match=message):
        export(tmp_path / "model", tmp_path / "plain", dense=case != "without --dense")
    assert sorted(tmp_path.rglob("*")) == before


def test_forms_and_options_that_do_not_fit_are_refused_by_name(llama, tmp_path, monkeypatch):
    monkeypatch.delenv(CONVERTER, raising=False)
    for asked, message in (
        ({"dense": True, "remote_code": True}, "exactly one of --dense, --onnx, --openvino, --gguf, --remote-code"),
        ({"dense": True, "int8": True}, "int8 True: --dense takes no option"),
        ({"gguf": GgufType.BF16}, r"no convert_hf_to_gguf\.py there; DRANK_GGUF_CONVERTER must name the folder"),
    ):
        with pytest.raises(ExportError, match=message):
            export(llama, tmp_path / "plain", **asked)
    assert not (tmp_path / "plain").exists()


@pytest.mark.parametrize("form", [form for form in FORMS if FORMS[form].extra])
def test_a_missing_package_is_named_with_its_extra_before_anything_is_loaded(form, llama, monkeypatch):
    def installed(name):
        if name == "onnx":
            raise PackageNotFoundError(name)
        return version("drank")

    monkeypatch.setattr("drank.serving.export.version", installed)
    with pytest.raises(ExportError, match=rf"--{form} needs the package onnx: pip install 'drank\[{form}\]'"):
        describe(llama, form, {})


@pytest.mark.skipif(not os.environ.get(CONVERTER), reason=f"{CONVERTER} names no folder of llama.cpp's converter")
@pytest.mark.parametrize(("kind", "least", "most"), [("f32", 0, 1e-6), ("bf16", 1e-3, 1e-2), ("q8_0", 1e-3, 5e-2)])
def test_a_gguf_file_predicts_what_the_plain_folder_predicts(kind, least, most, llama, tmp_path):
    """But for the rounding of this folder's numbers of 32 bits; twice the same bytes."""
    model = shutil.copytree(llama, tmp_path / "model")
    tiny.byte_tokenizer().save_pretrained(model)
    export(model, tmp_path / "plain", dense=True)
    for name in ("first", "second"):
        export(model, tmp_path / name, gguf=GgufType(kind))
    assert tiny.folder_sha256(tmp_path / "first") == tiny.folder_sha256(tmp_path / "second")
    options = {"gguf_file": "model.gguf", "dtype": torch.float32}
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "first", **options)(input_ids=IDS).logits
    expected = logits(tmp_path / "plain")
    distance = ((found - expected).square().mean().sqrt() / expected.std()).item()
    assert least <= distance < most
    papers = read_json(tmp_path / "first" / EXPORT)
    assert (papers["form"], papers["options"], papers["variant"]) == ("gguf", {"type": kind}, VARIANT)
    assert parse_metadata(tmp_path / "first/model.gguf").model_dump(exclude_none=True) == papers


@pytest.mark.skipif(not os.environ.get(CONVERTER), reason=f"{CONVERTER} names no folder of llama.cpp's converter")
def test_what_llama_cpps_converter_refuses_is_told_in_its_words(llama, tmp_path):
    with pytest.raises(ExportError, match="failed with status 1: (.|\n)*BPE pre-tokenizer was not recognized"):
        export(llama, tmp_path / "gguf", gguf=GgufType.BF16)
    assert not (tmp_path / "gguf").exists()


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_remote_code_loads_in_a_process_that_never_imported_drank_and_only_where_it_is_trusted(
    architecture, folders, tmp_path
):
    export(folders[architecture], tmp_path / "model", remote_code=True)
    load = "import sys; from transformers import AutoModelForCausalLM as A; assert 'drank' not in sys.modules; "
    load += f"print(A.from_pretrained({str(tmp_path / 'model')!r}, trust_remote_code={{}}).config.quantization_config)"
    home = {"HF_HOME": str(tmp_path / "hf"), "PYTHONPATH": os.pathsep.join(sys.path)}
    done = [
        subprocess.run(
            [sys.executable, "-c", load.format(trust)], env=os.environ | home, capture_output=True, text=True
        )
        for trust in (True, False)
    ]
    assert "DrankConfig" in done[0].stdout, done[0].stderr
    assert "Unknown quantization type, got drank" in done[1].stderr
    assert torch.equal(logits(tmp_path / "model"), logits(folders[architecture]))
