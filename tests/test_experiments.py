"""The literature's experiments: the protocol against the released code's computation, files, verdicts, stand-ins."""

import json
import re
import shutil
import sys
from functools import cache
from pathlib import Path

import lm_eval
import pytest
import torch
import yaml
from experiments.tools.copies import FOLDER, prepare
from experiments.tools.published import (
    ZERO_SHOT,
    Finding,
    Published,
    compare,
    outcome,
    read_published,
    read_results,
)
from experiments.tools.reproduce import app, totals
from lm_eval.tasks import TaskManager
from safetensors.torch import load_file
from stages import sampling
from tokenizers.processors import TemplateProcessing
from transformers import LlamaConfig
from typer.testing import CliRunner

from drank.planning import footprint
from drank.planning.estimate import costs
from drank.project.dvc import dvc_md5
from drank.project.files import read_json
from drank.project.params import ParamsError, read_params
from tests import tiny
from tests.conftest import REPOSITORY, build, run

# By name: parameters of the checkpoint; per layer, projections of 4096 x 4096, and parameters of the MLP over 4096.
SIZES = {
    "llama-7b": (6_738_415_616, 4.0, 3 * 11008), "llama-2-7b": (6_738_415_616, 4.0, 3 * 11008),
    "llama-3-8b": (8_030_261_248, 2.5, 3 * 14336), "mistral-7b": (7_241_732_096, 2.5, 3 * 14336),
    "opt-6.7b": (6_658_473_984, 4.0, 2 * 16384),
}  # fmt: skip
LENGTH = 32  # tokens per window of the stand-ins
TASK_FOLDERS = ("openbookqa", "arc", "winogrande", "hellaswag", "piqa", "mathqa")  # of lm-eval; all would take long


def beginning_tokenizer():
    """The tiny tokenizer, putting a begin token before every text as those of LLaMA do."""
    tokenizer = tiny.tokenizer()
    tokenizer.bos_token = "<|end|>"
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing("<|end|> $A", special_tokens=[("<|end|>", 0)])
    return tokenizer


def lines_of(seed):
    """Lines as WikiText has them: some empty, some twice, some with white space at their ends."""
    texts = tiny.documents(40, seed)
    return [line for text in texts for line in ("", f" {text} \n", f" = {text.split()[0]} = \n")] + ["", " \n"]


def write_lines(path, lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))


def edited(name, **sections):
    """A shipped experiment with keys of its sections replaced."""
    document = yaml.safe_load((REPOSITORY / f"{FOLDER}/{name}.yaml").read_text())
    for section, changes in sections.items():
        document[section] |= changes
    return document


@pytest.fixture(scope="module")
def sampled(tmp_path_factory):
    """The folder that the sampling stage of llama-7b's file leaves of small texts, with some of its keys changed."""

    @cache
    def folder(**changes):
        root = tmp_path_factory.mktemp("sampled")
        document = edited("llama-7b", sampling={"n_windows": 5, "window_length": LENGTH} | changes)
        (root / "params.yaml").write_text(yaml.safe_dump(document))
        tokenizer = beginning_tokenizer()
        tokenizer.save_pretrained(root / "data/raw/model")
        LlamaConfig(vocab_size=len(tokenizer)).save_pretrained(root / "data/raw/model")
        for i, name in enumerate(document["text"]):
            write_lines(root / f"data/raw/text/{name}.jsonl", lines_of(i))
        sampling.main(root)
        return root / "data/sampling"

    return folder


def released_perplexity(model, tokenizer, lines, drop_short):
    """compute_ppl of Basis Sharing and D-Rank, stride = window; without the short window, ppl_eval of SVD-LLM."""
    ids = tokenizer("\n\n".join(lines), return_tensors="pt").input_ids
    losses = []
    for window in ids.split(LENGTH, dim=1):
        if window.shape[1] == LENGTH or not drop_short:
            with torch.no_grad():
                losses.append(model(window, labels=window).loss)
    return torch.exp(torch.stack(losses).mean()).item(), len(losses)


@pytest.mark.parametrize(("n_test_windows", "drop_short"), [("all", False), ("whole", True)])
def test_test_perplexity_is_that_of_the_released_code(sampled, n_test_windows, drop_short):
    # Weights so large that every token of the context matters.
    model = tiny.llama(initializer_range=0.3, tie_word_embeddings=False)
    folder = sampled(n_test_windows=n_test_windows)
    tests = load_file(folder / "test.safetensors")
    last = load_file(folder / "last.safetensors") if not drop_short else {}
    assert set(tests) == {"wikitext2", "ptb", "c4"}
    for i, name in enumerate(("wikitext2", "ptb", "c4"), start=1):
        perplexity, nats = tiny.token_perplexity(model, tests[name], 4, last=last.get(name))
        expected, n_windows = released_perplexity(model, beginning_tokenizer(), lines_of(i), drop_short)
        assert perplexity == pytest.approx(expected, rel=1e-4)
        assert len(nats) == n_windows


def test_calibration_windows_are_those_that_the_released_code_draws(sampled):
    folder = sampled(n_test_windows="all")
    tokenizer = beginning_tokenizer()
    stream = [token for line in lines_of(0) for token in tokenizer(line).input_ids]
    chunks = [stream[i : i + LENGTH] for i in range(0, len(stream) // LENGTH * LENGTH, LENGTH)]
    torch.manual_seed(2023)
    chosen = [chunks[i] for i in torch.randperm(len(chunks))[:5]]
    assert load_file(folder / "calibration/2023.safetensors")["windows"].tolist() == chosen
    assert stream[:2] == [0, 0], "an empty line is a begin token"
    # Nothing of the calibration text is a test, and no item is made of it.
    assert {path.stem for path in (folder / "tasks").iterdir()} == {"wikitext2_rolling", "ptb_rolling", "c4_rolling"}
    counts = read_json(folder / "summary.json")["texts"]["wikitext2-train"]
    assert counts["calibration_documents"] == len(lines_of(0))
    assert "test_documents" not in counts


def test_the_variant_of_svd_llm_begins_every_window_and_reads_the_lines_joined(sampled):
    folder = sampled(calibration_begin="window", calibration_draw="offsets")
    windows = load_file(folder / "calibration/2023.safetensors")["windows"]
    joined = beginning_tokenizer().encode("\n\n".join(lines_of(0)), add_special_tokens=False)
    assert (windows[:, 0] == 0).all()
    pieces = [joined[i : i + LENGTH - 1] for i in range(len(joined))]
    assert all(window in pieces for window in windows[:, 1:].tolist())


def test_lm_eval_has_the_seven_tasks_and_measures_acc():
    folders = [Path(lm_eval.__file__).with_name("tasks") / name for name in TASK_FOLDERS]
    manager = TaskManager(include_defaults=False, include_path=folders)
    for task in ZERO_SHOT:
        assert "acc" in {metric["metric"] for metric in manager.task_index[task].cfg["metric_list"]}


@pytest.mark.parametrize("name", SIZES)
def test_every_spectrum_and_preset_is_used_and_rows_are_of_variants(name):
    params, published = read_params(REPOSITORY / f"{FOLDER}/{name}.yaml"), read_published(REPOSITORY, name)
    assert {variant.preset for variant in params.variants.values()} == set(params.presets)
    assert {variant.spectrum for variant in params.variants.values()} == set(params.spectrum)
    assert set(params.evaluation.tasks) == set(ZERO_SHOT)
    metrics = {"acc", *(f"acc/{task}" for task in ZERO_SHOT), *(f"token_perplexity/{text}" for text in params.text)}
    assert {metric for row in published.rows for metric in row.figures} <= metrics
    for row in published.rows:  # .8 of the linears' parameters is 80 in a name
        size = params.variants[row.variant].size_ratio
        assert row.variant.endswith(f"-{round(100 * size)}") or (row.variant, size) == ("dense", 1.0)


@pytest.mark.parametrize("name", SIZES)
def test_sizes_from_the_config_alone_are_those_of_the_checkpoint(name):
    model = read_published(REPOSITORY, name).model(name)
    parameters, projections, mlp = SIZES[name]
    assert round(model.parameters * footprint.model_parameters(model.shape)) == parameters
    assert model.shape.n_layers * model.shape.n_parameters == 32 * 4096 * (projections * 4096 + mlp)


def test_figures_of_d_rank_in_table_3():
    rows = [row for row in read_published(REPOSITORY, "llama-7b").rows if row.source.endswith("Table 3")]
    wikitext2 = {row.variant: row.figures["token_perplexity/wikitext2"] for row in rows}
    assert [wikitext2[f"d-rank-{size}"] for size in (80, 70, 60, 50)] == [7.45, 8.97, 11.99, 19.82]
    (headline,) = (row.figures for row in rows if row.variant == "d-rank-80")
    tasks = [headline[f"acc/{task}"] for task in ZERO_SHOT]
    assert sum(tasks) / 7 == pytest.approx(headline["acc"], abs=0.005), "the printed mean is that of the printed tasks"


def test_dvc_takes_the_prepared_pipeline(tmp_path):
    for file in ("dvc.yaml", ".dvcignore"):
        shutil.copy(REPOSITORY / file, tmp_path)
    for folder in (FOLDER, "stages", "src"):
        shutil.copytree(REPOSITORY / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    run(tmp_path, "git", "init", "-q")
    run(tmp_path, sys.executable, "-m", "dvc", "init", "-q")
    folder = prepare(tmp_path, "opt-6.7b")
    listed = run(tmp_path, sys.executable, "-m", "dvc", "stage", "list", "--name-only", f"{folder}/dvc.yaml").stdout
    stages = {line.split(":")[-1] for line in listed.split()}
    assert {"raw", "covariance@2023", "spectrum@kfac", "evaluation@d-rank-80", "report"} <= stages
    assert not {stage for stage in stages if stage.startswith("release")}


@pytest.mark.parametrize(
    ("metric", "ours", "verdict"),
    [
        ("token_perplexity/a", 10.3, "reached"),
        ("token_perplexity/a", 9.7, "reached"),
        ("token_perplexity/a", 10.31, "higher"),
        ("token_perplexity/a", 9.69, "lower"),
        ("acc/a", 0.48, "reached"),
        ("acc", 0.501, "higher"),
        ("acc/a", None, "not run"),
    ],
)
def test_perplexities_hold_within_a_share_and_accuracies_within_a_difference(metric, ours, verdict):
    published, tolerance = (0.49, 0.01) if metric.startswith("acc") else (10.0, 0.03)
    assert Finding("v", metric, "s", published, tolerance, ours).verdict == verdict


def published_with(*rows):
    """The file of an experiment whose rows are (variant, {metric: figure})."""
    rows = tuple({"variant": variant, "source": "Table 1", "figures": figures} for variant, figures in rows)
    return Published(config={}, test_tokens=1000, tolerance={"token_perplexity": 0.1, "acc": 0.01}, rows=rows)


def test_where_sources_disagree_it_is_enough_to_reach_one():
    x = "token_perplexity/x"
    published = published_with(("a", {x: 10.0}), ("a", {x: 20.0}), ("b", {x: 10.0}), ("c", {x: 10.0}))
    results = {"a": {x: 19.0}, "b": {x: 19.0}}
    findings = compare(published, results)
    assert [found.verdict for found in findings] == ["higher", "reached", "higher", "not run"]
    assert list(outcome(findings).values()) == ["reached", "missed", "not run"]
    assert list(outcome(compare(published, results, ["a"]))) == [("a", x)]


def test_acc_is_the_mean_over_the_seven_tasks_and_is_not_known_of_fewer():
    seven = {f"acc/{task}": 0.1 * i for i, task in enumerate(ZERO_SHOT, start=1)}
    published = published_with(("a", {"acc": 0.4}))
    (found,) = compare(published, {"a": seven | {"acc/last_word": 1.0}})
    assert found.ours == pytest.approx(0.4)
    del seven["acc/piqa"]
    assert compare(published, {"a": seven})[0].verdict == "not run"


@pytest.fixture
def small(tmp_path):
    """A repository with one experiment, of which nothing has run."""
    (tmp_path / f"{FOLDER}/published").mkdir(parents=True)
    for file in ("mistral-7b.yaml", "published/mistral-7b.yaml"):
        shutil.copy(REPOSITORY / FOLDER / file, tmp_path / FOLDER / file)
    shutil.copy(REPOSITORY / "dvc.yaml", tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("variant: d-rank-80", "variant: d-rank-75"), "d-rank-75: no such variant"),
        (("token_perplexity/wikitext2: 7.41", "token_perplexity/wikitext2: 0"), "greater than 0"),
        (("test_tokens: 8000000", "tokens: 8000000"), "unknown key 'tokens'"),
    ],
)
def test_mistakes_in_published_figures_are_named(small, change, message):
    with pytest.raises(ParamsError, match=r"no experiment 'llama' in .*; known: mistral-7b"):
        read_published(small, "llama")
    with pytest.raises(ParamsError, match=r"kfac-80: no published figure here; there are some for svd-llm-80,"):
        compare(read_published(small, "mistral-7b"), {}, ["kfac-80"])
    file = small / f"{FOLDER}/published/mistral-7b.yaml"
    assert change[0] in file.read_text()
    file.write_text(file.read_text().replace(*change, 1))
    with pytest.raises(ParamsError, match=message):
        read_published(small, "mistral-7b")


def lock(root, name):
    """Write the lock that DVC would have of the results that are there: their parameters and hashes."""
    folder = f"{FOLDER}/{name}"
    params = yaml.safe_load((root / folder / "params.yaml").read_text())
    stages = {
        f"evaluation@{path.stem}": {
            "params": {f"{folder}/params.yaml": params},
            "outs": [{"path": f"{folder}/results/{path.name}", "md5": dvc_md5(path)}],
        }
        for path in (root / folder / "results").glob("*.json")
    }
    (root / folder / "dvc.lock").write_text(yaml.safe_dump({"schema": "2.0", "stages": stages}))


def test_results_of_other_parameters_and_edited_ones_do_not_count(small, caplog):
    folder = small / prepare(small, "mistral-7b")
    assert read_results(small, "mistral-7b") == {}
    (folder / "results").mkdir()
    (folder / "results/d-rank-80.json").write_text('{"token_perplexity/wikitext2": 7.41}')
    assert read_results(small, "mistral-7b") == {}, "no DVC has run"
    lock(small, "mistral-7b")
    assert read_results(small, "mistral-7b") == {"d-rank-80": {"token_perplexity/wikitext2": 7.41}}

    file = small / f"{FOLDER}/mistral-7b.yaml"
    shipped = file.read_text()
    file.write_text(shipped.replace("n_windows: 256", "n_windows: 128"))
    assert read_results(small, "mistral-7b") == {}
    assert "d-rank-80 is not counted: experiments/mistral-7b.yaml: sampling.n_windows is 128" in caplog.text
    file.write_text(shipped)
    (folder / "results/d-rank-80.json").write_text('{"token_perplexity/wikitext2": 7.40}')
    assert read_results(small, "mistral-7b") == {}
    assert "edited or stale" in caplog.text


@pytest.mark.parametrize("name", SIZES)
def test_the_table_of_the_page_is_what_the_dry_run_says(name):
    params, published = read_params(REPOSITORY / f"{FOLDER}/{name}.yaml"), read_published(REPOSITORY, name)
    found = totals(costs(params, published.model(name), published.test_tokens // params.sampling.window_length))
    memory, disk, hours = found["all"]
    cells = [f"{SIZES[name][0] / 1e9:.2f} B", f"{memory / 1e9:.0f} GB", f"{disk / 1e9:.0f} GB", f"{hours:.1f}"]
    row = " | ".join([name, *cells, f"{found['evaluation'][2]:.1f}"])
    assert f"| {row} |" in (REPOSITORY / "docs/protocol.md").read_text()


def test_the_dry_run_prints_sizes_and_steps_and_needs_no_weights():
    done = CliRunner().invoke(app, ["llama-7b", "--dry-run", "--root", str(REPOSITORY)])
    assert done.exit_code == 0, done.output
    smaller = SIZES["llama-7b"][0] - round(0.2 * 32 * (4 * 4096**2 + 3 * 4096 * 11008))
    assert re.search(rf"\bd-rank-80 .* {smaller:,} ", done.output)
    assert all(f"{step} " in done.output for step in ("raw", "covariance", "spectrum", "evaluation", "all"))


# Stand-ins: files through the whole pipeline, with a small model of their architecture: key/value heads in groups, and
# biases with learned positions.

STAND_INS = ("llama-3-8b", "opt-6.7b")
RUN = ("dense", "asvd-80", "svd-llm-80", "basis-sharing-80", "d-rank-80", "d-rank-released-80", "kfac-80")


def stand_in(name):
    """The one place where an experiment is made small: sources, sizes of texts and windows, device, hub tasks."""
    document = edited(
        name,
        sampling={"n_windows": 8, "window_length": LENGTH},
        covariance={"device": "cpu", "threads": 1},
        evaluation={"device": "cpu", "threads": 1, "tasks": []},
    )
    document["model"] = {"source": "local:source/model"}
    document["text"] = {text: {"source": f"local:source/{text}.jsonl"} for text in document["text"]}
    document["variants"] = {variant: document["variants"][variant] for variant in RUN}
    used = {variant["spectrum"] for variant in document["variants"].values()}
    document["spectrum"] = {key: spectrum for key, spectrum in document["spectrum"].items() if key in used}
    return document


@pytest.fixture(scope="module", params=STAND_INS)
def standing_in(request, tmp_path_factory):
    """A repository in small with one experiment, whose stages ran in its own folder."""
    name, root = request.param, tmp_path_factory.mktemp("standing_in")
    source, document = root / FOLDER / name / "source", stand_in(name)
    model_type = yaml.safe_load((REPOSITORY / f"{FOLDER}/published/{name}.yaml").read_text())["config"]["model_type"]
    tiny.decoder(model_type).to(torch.bfloat16).save_pretrained(source / "model")
    beginning_tokenizer().save_pretrained(source / "model")
    for i, text in enumerate(document["text"]):
        write_lines(source / f"{text}.jsonl", lines_of(i))
    (root / FOLDER / f"{name}.yaml").write_text(yaml.safe_dump(document, sort_keys=False))
    shutil.copy(REPOSITORY / "dvc.yaml", root)
    folder = root / prepare(root, name)
    build(folder, ship=False)
    lock(root, name)
    return name, root


def publish(root, name, rows):
    """Published figures of a stand-in: the shipped file with other rows."""
    document = yaml.safe_load((REPOSITORY / f"{FOLDER}/published/{name}.yaml").read_text()) | {"rows": rows}
    path = root / f"{FOLDER}/published/{name}.yaml"
    path.parent.mkdir(exist_ok=True)
    path.write_text(yaml.safe_dump(document))


def test_an_experiment_runs_and_says_what_it_reached(standing_in):
    name, root = standing_in
    results = read_results(root, name)
    assert set(results) == set(RUN)
    texts = [f"token_perplexity/{text}" for text in ("wikitext2", "ptb", "c4")]
    for variant in RUN:
        assert set(texts) < set(results[variant])
        assert results[variant]["kept_ratio"] <= (1.0 if variant == "dense" else 0.8)
    assert set(results["dense"]["protocol"]["last_windows"]) == {"wikitext2", "ptb", "c4"}

    def reproduced(*arguments):
        return CliRunner().invoke(app, [name, *arguments, "--root", str(root)])

    reached = {"variant": "dense", "source": "us", "figures": {text: results["dense"][text] for text in texts}}
    publish(root, name, [reached])
    done = reproduced()
    assert done.exit_code == 0, done.output
    assert done.output.count(" reached ") == len(texts)

    missed = {"variant": "kfac-80", "source": "nobody", "figures": {texts[0]: 2 * results["kfac-80"][texts[0]]}}
    publish(root, name, [reached, missed])
    done = reproduced()
    assert "missed, lower" in done.output
    assert f"{name}: of 4 published figures 3 reached, 1 missed, 0 not run" in str(done.exception)
    assert reproduced("dense").exit_code == 0

    file = root / f"{FOLDER}/{name}/results/kfac-80.json"
    file.rename(root / file.name)
    done = reproduced("kfac-80", "--json")
    (root / file.name).rename(file)
    document = json.loads(done.output)
    assert [figure["verdict"] for figure in document["figures"]] == ["not run"]
    assert document["holds"] is False
    assert done.exit_code == 1
