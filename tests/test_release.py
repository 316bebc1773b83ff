"""Files that travel with a model: the card as the hub reads it, the statement as in-toto's library reads it, sums."""

import json
import shutil
import subprocess

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
}
ALLOCATION = {
    "preset": "kfac", "allocation": "least_loss", "storage": "pivot", "size_ratio": 0.6, "kept_ratio": 0.5999,
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
    assert card.data.base_model == "some/model"
    assert card.data.model_name == "small-60"
    measured = {(r.dataset_name, r.metric_type): r.metric_value for r in card.data.eval_results}
    assert measured == {("news", "token_perplexity"): 45.2449, ("last_word", "acc"): 0.26}


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
    protocol = RESULTS["protocol"] | {"not_measured": {"news_rolling": "there is no begin token"}}
    text = release.card(PARAMETERS, ALLOCATION, RESULTS | {"protocol": protocol})
    assert "by rolling windows. Not measured: news_rolling, there is no begin token." in text


def test_the_card_lists_what_is_left_as_it_is():
    row = {"name": "model.layers.*.mlp.experts.down_proj", "reason": "no linear, but MixtralExperts", "tensors": 2}
    text = release.card(PARAMETERS, ALLOCATION | {"left_dense": [row | {"parameters": 16384}]}, RESULTS)
    assert "| `model.layers.*.mlp.experts.down_proj` | 16,384 | no linear, but MixtralExperts |\n\n## Limits" in text
    assert "Left as it is" not in release.card(PARAMETERS, ALLOCATION, RESULTS)


def test_a_base_model_that_the_hub_does_not_have_is_named_in_the_text_alone():
    text = release.card(PARAMETERS | {"model": {"source": "local:source/model"}}, ALLOCATION, RESULTS)
    assert ModelCard(text).data.base_model is None
    assert "`local:source/model`" in text


def test_the_statement_is_one_of_in_toto():
    digests = {"model.safetensors": "a" * 64, "config.json": "b" * 64}
    material = {"name": "model", "uri": "hub:some/model@main", "digest": {"sha256": "c" * 64}}
    types = {"covariance": "bfloat16", "evaluation": "float32"}
    document = release.statement(digests, PARAMETERS, [material], RESULTS, types)
    assert document["predicate"]["buildDefinition"]["internalParameters"] == {"computed_in": types}
    subjects = [ResourceDescriptor(name=s["name"], digest=s["digest"]).pb for s in document["subject"]]
    statement = Statement(subjects, document["predicateType"], document["predicate"])
    statement.validate()
    again = ParseDict(document, type(statement.pb)())
    assert again == statement.pb
    assert [subject["name"] for subject in document["subject"]] == ["config.json", "model.safetensors"]


def test_checksums_are_what_sha256sum_prints_and_checks(tmp_path):
    for name, content in (("b.txt", "b"), ("a.txt", "a")):
        (tmp_path / name).write_text(content)
    digests = {name: file_sha256(tmp_path / name) for name in ("b.txt", "a.txt")}
    printed = subprocess.run(["sha256sum", "a.txt", "b.txt"], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert release.checksums(digests) == printed.stdout


def test_a_released_folder_is_the_compressed_one_and_three_files_more(project):
    source, released = (project / f"data/{step}/kfac-80" for step in ("compression", "models"))
    names = {file.name for file in released.iterdir()}
    assert names - {file.name for file in source.iterdir()} == {release.CARD, release.STATEMENT, release.CHECKSUMS}
    for file in source.iterdir():
        assert file.read_bytes() == (released / file.name).read_bytes()
    subprocess.run(
        ["sha256sum", "--check", "--strict", release.CHECKSUMS], cwd=released, check=True, capture_output=True
    )
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
