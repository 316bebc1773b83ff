"""`drank bench`: what is counted, in which order, and what comes out. No test looks at how long anything took."""

import inspect
import itertools
import json
import statistics
import sys
from importlib.metadata import version

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mlflow import MlflowClient
from rich.console import Console
from typer.testing import CliRunner

from drank.cli import commands
from drank.cli.bench import BenchError, find_targets
from drank.model.benchmark import FIGURES, PARTS, BenchmarkError, Quartiles, Subject, measure, round_robin
from drank.project.params import ParamsError
from drank.tracking import TrackingError, find_runs, log_speed
from drank.views.speed import SHOWN, bars, table
from tests import tiny
from tests.conftest import run

POSITIVE = st.floats(1e-6, 1e6)
PROMPT = torch.arange(12)[None]
BATCH = torch.arange(24).reshape(3, 8)


@pytest.fixture(autouse=True)
def no_store_named(monkeypatch):
    for name in ("MLFLOW_TRACKING_URI", "DVC_ROOT"):
        monkeypatch.delenv(name, raising=False)


def clock_of(*times):
    return iter(times).__next__


def subject(model=None, prompt=PROMPT, batch=BATCH, new_tokens=4, **options):
    return Subject(model or tiny.llama(), prompt, batch, new_tokens, **options)


# Statistics


def test_quartiles_by_hand():
    assert Quartiles.of([4.0, 1.0, 3.0, 2.0, 5.0]) == Quartiles(2.0, 3.0, 4.0)
    assert Quartiles.of([1.0, 2.0]) == Quartiles(1.25, 1.5, 1.75)
    assert Quartiles.of([7.0]) == Quartiles(7.0, 7.0, 7.0)


@given(st.lists(POSITIVE, min_size=1, max_size=20))
def test_quartiles_are_those_of_numpy_and_of_statistics(samples):
    found = Quartiles.of(samples)
    assert found.median == pytest.approx(statistics.median(samples))
    assert (found.lower, found.upper) == pytest.approx(tuple(np.quantile(samples, [0.25, 0.75])))


def test_ratios_are_taken_within_a_round():
    """Half-way through, the machine gets ten times as slow: the ratio of medians would be 2 * 5.5 / 1."""
    assert Quartiles.of_ratios([2.0, 20.0, 20.0], [1.0, 10.0, 10.0]) == Quartiles(2.0, 2.0, 2.0)
    assert Quartiles.of_ratios([1.0, 4.0, 9.0], [1.0, 2.0, 3.0]) == Quartiles(1.5, 2.0, 2.5)


@given(st.lists(POSITIVE, min_size=1, max_size=20))
def test_the_ratio_to_itself_is_one(samples):
    assert Quartiles.of_ratios(samples, samples) == Quartiles(1.0, 1.0, 1.0)


# Order


def test_round_robin_takes_turns_and_drops_the_first_rounds():
    calls = []

    def case(name):
        return lambda: calls.append(name) or len(calls)

    found = round_robin({name: case(name) for name in "abc"}, repeats=2, warmup=1)
    assert "".join(calls) == "abcabcabc"
    assert found == {"a": [4, 7], "b": [5, 8], "c": [6, 9]}


def test_every_model_does_a_part_before_any_does_the_next():
    calls = []

    def model(name):
        def do(part):
            calls.append((part, name))
            return {figure: 1.0 for figure in FIGURES if figure in GIVEN[part]}

        return do

    rounds = []
    found = measure({name: model(name) for name in "ab"}, 2, progress=lambda rows: rounds.extend(rows) or rows)
    assert calls == 3 * list(itertools.product(PARTS, "ab"))
    assert found == {name: {figure: [1.0, 1.0] for figure in FIGURES} for name in "ab"}
    assert rounds == [0, 1, 2]


GIVEN = {"prefill": {"prefill"}, "generation": {"first_token", "decode"}, "forward": {"forward_only"}}


# What is counted


def test_figures_by_hand_from_a_clock_of_ours():
    """Of 12 tokens in 2 s, of 4 new ones after 5, 6, 8 and 11 s, of 3 windows of 8 tokens in 4 s."""
    timed = subject(clock=clock_of(10.0, 12.0, 0.0, 5.0, 6.0, 8.0, 11.0, 100.0, 104.0))
    assert timed("prefill") == {"prefill": 6.0}
    assert timed("generation") == {"first_token": 5.0, "decode": 3 / 6}
    assert timed("forward") == {"forward_only": 6.0}
    with pytest.raises(StopIteration):
        timed.clock()


@pytest.mark.parametrize("make", [tiny.llama, tiny.gpt2])
def test_what_the_model_is_asked(make):
    """Prefill fills a cache and gives one row of logits; the forward-only pass has all logits and no cache."""
    model, passes = make(), []
    forward = model.forward

    def watched(*arguments, **options):
        done = forward(*arguments, **options)
        ids = arguments[0] if arguments else options["input_ids"]
        passes.append((tuple(ids.shape), tuple(done.logits.shape[:2]), done.past_key_values is not None))
        return done

    watched.__signature__ = inspect.signature(forward)
    model.forward = watched
    timed = subject(model)
    for part in PARTS:
        timed(part)
    prefill, decoding, plain = ((1, 12), (1, 1), True), ((1, 1), (1, 1), True), ((3, 8), (3, 8), False)
    assert passes == [prefill, prefill, decoding, decoding, decoding, plain]


def test_the_end_of_text_does_not_end_a_generation():
    """A model whose every next token is the end of text, were that not barred."""
    model = tiny.llama(eos_token_id=7)
    with torch.no_grad():
        model.lm_head.weight.zero_()[7] = 1
        model.model.norm.weight.zero_()
    model.generation_config.eos_token_id = list(range(319))
    ticks = itertools.count(0.0)
    timed = subject(model, new_tokens=9, clock=ticks.__next__)
    assert timed("generation") == {"first_token": 1.0, "decode": 1.0}
    assert next(ticks) == 10.0  # the start, and nine tokens


def test_a_model_is_left_as_it_was():
    model = tiny.llama()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for part in PARTS:
        subject(model)(part)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


def test_peak_memory_counts_what_was_freed(tmp_path):
    """In a process of its own, where nothing else has grown before; 200 MB at once count, one after another too."""
    program = (
        "import torch; from drank.model.benchmark import peak_memory as peak\n"
        "cpu = torch.device('cpu'); start = peak(cpu)\n"
        "for _ in range(3): torch.ones(200_000_000, dtype=torch.uint8)\n"
        "print(peak(cpu) - start)"
    )
    assert 190_000_000 < int(run(tmp_path, sys.executable, "-c", program).stdout) < 300_000_000


# Errors


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (lambda: round_robin({}, 0), "repeats = 0"),
        (lambda: round_robin({}, 3, -1), "warmup = -1"),
        (lambda: measure({"a": subject()}, repeats=-2), "repeats = -2"),
        (lambda: subject(new_tokens=1), "1 new tokens: .* ask for 2 or more"),
        (lambda: subject(prompt=torch.zeros(1, 253, dtype=torch.long)), "253 tokens and 4 new .* 256 positions"),
        (lambda: subject(batch=torch.zeros(2, 257, dtype=torch.long)), "windows of 257, but the model has 256"),
    ],
)
def test_what_cannot_be_timed(asked, message):
    with pytest.raises(BenchmarkError, match=message):
        asked()


def test_a_prompt_that_just_fits():
    subject(prompt=torch.zeros(1, 252, dtype=torch.long), batch=torch.zeros(2, 256, dtype=torch.long))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A root with the params.yaml of `tiny`, the folders of two of its variants, and a folder of a larger model."""
    root = tmp_path_factory.mktemp("folders")
    (root / "params.yaml").write_text(tiny.PARAMS)
    model = tiny.llama().to(torch.bfloat16)
    for name in ("dense", "kfac-80"):
        model.save_pretrained(root / "data/models" / name)
    tiny.llama(intermediate_size=4096).save_pretrained(root / "elsewhere/larger")
    (root / "empty").mkdir()
    return root


def test_a_name_is_a_folder_or_else_a_variant(folders):
    larger = str(folders / "elsewhere/larger")
    found = find_targets(folders, [larger, "kfac-80", "dense", "kfac-80"])
    assert [(target.name, target.dense) for target in found] == [(larger, False), ("kfac-80", False), ("dense", True)]
    assert [target.folder for target in found[1:]] == [folders / "data/models" / name for name in ("kfac-80", "dense")]


@pytest.mark.parametrize(
    ("names", "error", "message"),
    [
        (["kfac-8"], ParamsError, "no variant 'kfac-8' in params.yaml; it has: dense, svd-llm-80"),
        (["svd-llm-80"], BenchError, "data/models/svd-llm-80: not found; fetch it with `dvc checkout`"),
        ([], BenchError, "data/models/svd-llm-80: not found"),
        (["{root}/empty"], BenchError, "empty: not the folder of a model: it has no config.json"),
        (["{root}/nowhere"], BenchError, "nowhere: not the folder of a model"),
        (["dense", "--device", "tpu"], BenchError, "device 'tpu': it must be cpu or cuda"),
        (["dense", "--prompt-tokens", "240"], BenchmarkError, "240 tokens and 32 new ones.* has 256 positions"),
    ],
)
def test_mistakes_are_told(folders, names, error, message):
    arguments = [name.format(root=folders) for name in names]
    with pytest.raises(error, match=message):
        bench(folders, *arguments)


@pytest.mark.parametrize("option", ["--repeats=0", "--new-tokens=1", "--batch-size=0", "--threads=0", "--dtype=int4"])
def test_options_out_of_range_are_refused_at_once(folders, option):
    done = CliRunner().invoke(commands, ["bench", "dense", "--root", str(folders), option])
    assert done.exit_code == 2
    assert option.split("=")[0] in done.output


# The command

SMALL = ("--prompt-tokens", "16", "--new-tokens", "4", "--batch-size", "2", "--repeats", "3", "--threads", "1")


def bench(root, *arguments):
    """What the command prints; its error, if it has one, is raised."""
    done = CliRunner().invoke(commands, ["bench", "--root", str(root), "--device", "cpu", *arguments])
    if done.exception:
        raise done.exception
    return done.output


@pytest.fixture(scope="module")
def timed(folders):
    """What the command printed and wrote about the dense variant and, before it, a larger model."""
    arguments = (str(folders / "elsewhere/larger"), "dense", *SMALL, "--dtype", "float32")
    output = bench(folders, *arguments, "--json", str(folders / "new/b.json"), "--picture", str(folders / "new/b.png"))
    return output, json.loads((folders / "new/b.json").read_text())


def test_the_document_is_complete(timed, folders):
    document, larger = timed[1], str(folders / "elsewhere/larger")
    assert document["reference"] == "dense"
    assert document["folders"] == {larger: larger, "dense": str(folders / "data/models/dense")}
    assert document["conditions"] == {
        "device": "cpu", "dtype": "float32", "threads": 1, "prompt_tokens": 16, "new_tokens": 4, "batch_size": 2,
        "repeats": 3,
    }  # fmt: skip
    assert document["environment"]["torch"] == version("torch")
    assert document["environment"]["device"]
    assert set(document["units"]) == set(SHOWN)
    dense = document["models"]["dense"]
    for figures in document["models"].values():
        assert set(figures) == set(SHOWN)
        for name in FIGURES:
            figure = figures[name]
            assert len(figure["samples"]) == 3
            assert min(figure["samples"]) > 0
            assert figure["median"] == sorted(figure["samples"])[1]
            by_round = [a / b for a, b in zip(figure["samples"], dense[name]["samples"], strict=True)]
            assert figure["over_reference"]["median"] == sorted(by_round)[1]
    for name, figures in document["models"].items():
        weights = [file.stat().st_size for file in (folders / document["folders"][name]).glob("*.safetensors")]
        assert figures["disk"]["median"] == sum(weights)
    # 2 layers x 3 matrices x 32 x (4096 - 64) more in float32, which the file has and memory must hold at once.
    extra = 4 * 2 * 3 * 32 * (4096 - 64)
    assert document["models"][larger]["memory"]["median"] - dense["memory"]["median"] > 0.5 * extra
    assert dense["memory"]["over_reference"]["median"] == dense["disk"]["over_reference"]["median"] == 1.0


def test_the_table_tells_ratios_and_figures(timed, folders):
    output, document = timed
    larger = document["models"][str(folders / "elsewhere/larger")]
    console = Console(width=200)
    with console.capture() as capture:
        console.print(table(document))
    decode = larger["decode"]
    ratio = decode["over_reference"]
    assert f"x{ratio['median']:.2f} [{ratio['lower']:.2f}, {ratio['upper']:.2f}]" in capture.get()
    assert f"{decode['median']:,.1f}" in capture.get()
    assert f"{1000 * larger['first_token']['median']:,.0f}" in capture.get()
    assert "x: ratio to dense within a round, median [quartiles] of 3 rounds" in output
    assert "Memory: growth of the peak resident memory" in output


def test_the_picture_has_a_bar_a_model_and_figure(timed, folders):
    assert (folders / "new/b.png").read_bytes().startswith(b"\x89PNG")
    panels = bars(timed[1]).axes
    assert [panel.get_title().partition(",")[0].replace(" ", "_") for panel in panels] == list(SHOWN)
    for panel, name in zip(panels, SHOWN, strict=True):
        medians = [figures[name]["over_reference"]["median"] for figures in timed[1]["models"].values()]
        assert [bar.get_width() for bar in panel.patches] == medians


def test_without_a_dense_variant_the_first_is_the_reference(folders):
    output = bench(folders, "kfac-80", str(folders / "data/models/dense"), *SMALL)
    assert "x: ratio to kfac-80" in output


# MLflow


@pytest.mark.pipeline
def test_medians_and_ratios_land_on_the_runs_of_a_tracked_project(project):
    """The console program on compressed models: metrics on each variant's run; a hint before there is one."""
    hint = run(project, "drank", "bench", "dense", *SMALL, "--track").stdout
    assert "dense: no MLflow run has this folder; `drank track` makes one for each variant" in hint
    assert not (project / "mlflow.db").exists()

    run(project, "drank", "track")
    told = run(project, "drank", "bench", *SMALL, "--track", "--json", "b.json").stdout
    document = json.loads((project / "b.json").read_text())
    client = MlflowClient(tracking_uri=f"sqlite:///{project / 'mlflow.db'}")
    runs = client.search_runs([client.get_experiment_by_name("drank").experiment_id])
    variants = {run.info.run_name: run for run in runs if run.data.tags["drank.run"] == "variant"}
    assert set(variants) == set(document["models"]) == {"dense", "svd-llm-80", "d-rank-80", "kfac-80"}
    for name, logged in variants.items():
        metrics = {key: value for key, value in logged.data.metrics.items() if key.startswith("speed/")}
        figures = document["models"][name]
        assert set(metrics) == {f"speed/{figure}{suffix}" for figure in SHOWN for suffix in ("", "_ratio")}
        assert metrics["speed/decode"] == figures["decode"]["median"]
        assert metrics["speed/decode_ratio"] == figures["decode"]["over_reference"]["median"]
        assert metrics["speed/disk"] == figures["disk"]["median"]
        conditions = json.loads(logged.data.tags["speed.conditions"])
        assert conditions["conditions"] == document["conditions"]
        assert conditions["reference"] == "dense"
        assert f"{name}: speed added to http" in told

    md5 = variants["dense"].data.tags["model.dvc_md5"]
    assert log_speed(project, md5, {"speed/decode": 5.0}, {}).name == "dense"
    (found,) = find_runs(project, md5)
    history = client.get_metric_history(found.run_id, "speed/decode")
    assert [metric.value for metric in history] == [document["models"]["dense"]["decode"]["median"], 5.0]
    assert client.get_run(found.run_id).data.metrics["speed/decode"] == 5.0
    assert log_speed(project, "0" * 32 + ".dir", {"speed/decode": 5.0}, {}) is None


def test_a_store_that_cannot_be_used_is_told(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:1")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(TrackingError, match="MLFLOW_TRACKING_URI"):
        log_speed(tmp_path, "0" * 32 + ".dir", {}, {})
