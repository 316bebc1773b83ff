"""Files that travel with a model: the card as the hub reads it, the statement as in-toto's library reads it, sums."""

import json
import shutil
import subprocess
from collections import Counter
from pathlib import Path

import pytest
import stages.release
from google.protobuf.json_format import ParseDict
from huggingface_hub import ModelCard
from in_toto_attestation.v1.resource_descriptor import ResourceDescriptor
from in_toto_attestation.v1.statement import Statement

from drank.model.precision import compute_dtype, name_of
from drank.project.files import file_sha256, read_json
from drank.steps import release
from tests.conftest import run

PARAMETERS = {
    "variant": {"name": "small-60", "preset": "kfac", "spectrum": "kfac", "size_ratio": 0.6},
    "preset": {"allocation": "least_loss", "storage": "pivot"},
    "spectrum": {"metric": "kfac", "units": "block", "calibration_seed": 0},
    "sampling": {"n_windows": 64, "window_length": 512, "calibration_text": "news"},
    "model": {"source": "hub:some/model@main"},
    "text": {"news": {"source": "pypi:news==1", "sha256": "e" * 64}},
}
ALLOCATION = {
    "preset": "kfac", "allocation": "least_loss", "storage": "pivot", "size_ratio": 0.6, "kept_ratio": 0.5999,
    "spectrum": "kfac", "inputs": {"summary.json": "f" * 64}, "computed_in": {"covariance": "float32"},
    "units": [{"form": "pivot"}, {"form": "dense"}, {"form": "factors"}],
    "blocks": [{"channels": 6, "full_channels": 8}, {"channels": 8, "full_channels": 8}],
}  # fmt: skip
RESULTS = {
    "parameters": 92_047_680, "bytes": 184_685_120, "token_perplexity/news": 45.2449, "acc/last_word": 0.26,
    "acc_stderr/last_word": 0.0439, "variant": "small-60", "size_ratio": 0.6,
    "protocol": {
        "dtype": "bfloat16", "lm_eval_max_length": 2048, "tasks": ["last_word"],
        "test_windows": {"news": [32, 512], "commons": [16, 512]},
    },
}  # fmt: skip


def test_the_card_is_read_by_the_hubs_own_parser_with_its_results():
    card = ModelCard(release.card(PARAMETERS, ALLOCATION, RESULTS))
    assert (card.data.base_model, card.data.model_name) == ("some/model", "small-60")
    measured = {(r.dataset_name, r.metric_type): r.metric_value for r in card.data.eval_results}
    assert measured == {("news", "token_perplexity"): 45.2449, ("last_word", "acc"): 0.26}
    elsewhere = ModelCard(release.card(PARAMETERS | {"model": {"source": "local:source/model"}}, ALLOCATION, RESULTS))
    assert elsewhere.data.base_model is None
    assert "`local:source/model`" in elsewhere.text


def test_the_card_has_licence_language_and_origins_where_they_are_known_and_none_else():
    known = {"license": "apache-2.0", "language": "en", "base_model": "org/original"}
    texts = {"news": {"source": "hub:org/texts@0123"}, "commons": {"source": "hub:org/tested-on"}}
    parameters = PARAMETERS | {"model": {"source": "local:source/model"} | known, "text": texts}
    told = ModelCard(release.card(parameters, ALLOCATION, RESULTS)).data
    origins = {"base_model_relation": "quantized", "datasets": "org/texts"}
    assert (known | origins).items() <= told.to_dict().items()
    unknown = PARAMETERS | {"model": {"source": "local:source/model"}}
    assert not {*known, *origins} & ModelCard(release.card(unknown, ALLOCATION, RESULTS)).data.to_dict().keys()


def test_the_card_tells_method_size_results_protocol_and_limits():
    text = release.card(PARAMETERS, ALLOCATION, RESULTS)
    for told in (
        "preset `kfac`: metric kfac, units block, allocation least_loss, storage pivot",
        "2 of 3 matrices, 2 channels of MLPs removed",
        "0.5999 (0.6 asked)",
        "92,047,680",
        "184.7 MB",
        "64 windows of 512 tokens of `news`",
        "| acc/last_word | 0.2600 | 0.0439 |",
        "| token_perplexity/news | 45.2449 |  |",
        "32 windows of 512 tokens of `news`, 16 windows of 512 tokens of `commons`, held out, in bfloat16",
        "texts that were never calibrated on: `commons`",
    ):
        assert told in text
    assert "acc_stderr" not in text
    assert "Left as it is" not in text
    protocol = RESULTS["protocol"] | {"not_measured": {"news_rolling": "there is no begin token"}}
    left = {"name": "layers.*.experts", "reason": "no linear, but MixtralExperts", "parameters": 16384, "tensors": 2}
    text = release.card(PARAMETERS, ALLOCATION | {"left_dense": [left]}, RESULTS | {"protocol": protocol})
    assert "by rolling windows. Not measured: news_rolling, there is no begin token." in text
    assert "| `layers.*.experts` | 16,384 | no linear, but MixtralExperts |\n\n## Limits" in text


def test_the_statement_is_one_of_in_toto():
    subjects = {"model.safetensors": "a" * 64, "config.json": "b" * 64}
    healed = {"healed_in": "float16", "healed_from_sha256": "c" * 64}
    config = {"quantization_config": {"provenance": healed}}
    document = release.statement(PARAMETERS, subjects, {"data/x": "d" * 64}, ALLOCATION, RESULTS, config)
    build = document["predicate"]["buildDefinition"]
    types = {"covariance": "float32", "healing": "float16", "evaluation": "bfloat16"}
    assert build["internalParameters"] == {"computed_in": types}
    assert build["resolvedDependencies"] == [
        {"name": "model", "uri": "hub:some/model@main"},
        {"name": "text.news", "uri": "pypi:news==1", "digest": {"sha256": "e" * 64}},
        {"name": "data/x", "digest": {"sha256": "d" * 64}},
        {"name": "small-60 before healing", "digest": {"sha256": "c" * 64}},
        {"name": "data/spectrum/kfac/summary.json", "digest": {"sha256": "f" * 64}},
    ]
    subjects = [ResourceDescriptor(name=s["name"], digest=s["digest"]).pb for s in document["subject"]]
    statement = Statement(subjects, document["predicateType"], document["predicate"])
    statement.validate()
    again = ParseDict(document, type(statement.pb)())
    assert again == statement.pb
    assert [subject["name"] for subject in document["subject"]] == ["config.json", "model.safetensors"]


def test_a_released_folder_is_the_compressed_one_and_four_files_more(project):
    source, released = (project / f"data/{step}/kfac-80" for step in ("compression", "models"))
    names = {file.name for file in released.iterdir()}
    added = {release.CARD, release.STATEMENT, release.CHECKSUMS, release.SERVED}
    assert names - {file.name for file in source.iterdir()} == added
    for file in source.iterdir():
        assert file.read_bytes() == (released / file.name).read_bytes()
    command = ["sha256sum", *sorted(names - {release.CHECKSUMS})]
    printed = subprocess.run(command, cwd=released, check=True, capture_output=True, text=True).stdout
    assert (released / release.CHECKSUMS).read_text() == printed
    document = read_json(released / release.STATEMENT)
    used = read_json(project / "results/kfac-80.json")["protocol"]["dtype"]
    build = document["predicate"]["buildDefinition"]
    assert build["externalParameters"]["compute"] == {"dtype": "auto"}
    assert build["internalParameters"]["computed_in"] == {"covariance": used, "evaluation": used}
    assert used == name_of(compute_dtype("auto", "cpu"))
    versions = document["predicate"]["runDetails"]["builder"]["version"]
    assert {"drank", "torch", "transformers", "lm_eval"} < set(versions)
    materials = {m["name"]: m for m in build["resolvedDependencies"]}
    items = {f"data/sampling/tasks/{task}.jsonl" for task in ("last_word", "next_sentence", "news_rolling")}
    assert items < set(materials)
    assert materials["model"] == {"name": "model", "uri": "local:source/model"}
    for name, material in materials.items():
        if name.startswith("data/"):
            assert material["digest"]["sha256"] == file_sha256(project / name)
    text = json.dumps(document) + (released / release.CARD).read_text()
    assert str(project) not in text


def test_a_killed_release_leaves_the_old_folder(project, tmp_path):
    root = tmp_path / "half"
    shutil.copytree(
        project, root, symlinks=True, ignore=shutil.ignore_patterns(".dvc", ".git", "spectrum", "covariance")
    )
    before = {f.name: file_sha256(f) for f in (root / "data/models/kfac-80").iterdir()}
    (root / "results/kfac-80.json").write_text("{")
    done = run(root, "python", "-m", "stages.release", "kfac-80", check=False)
    assert done.returncode == 1
    assert "error: results/kfac-80.json: damaged, or changed since evaluation@kfac-80 wrote it" in done.stderr
    assert {f.name: file_sha256(f) for f in (root / "data/models/kfac-80").iterdir()} == before


@pytest.mark.pipeline
def test_release_reads_weights_once_for_dvc_and_once_for_its_own_hashes(project, monkeypatch):
    opened, real = Counter(), Path.open

    def counted(self, *arguments, **options):
        opened[self.parent.name, self.name] += 1
        return real(self, *arguments, **options)

    monkeypatch.setattr(Path, "open", counted)
    stages.release.main("kfac-80", project)
    assert opened["kfac-80", "model.safetensors"] == 2
    assert opened["model", "model.safetensors"] == 2
