"""The way ahead, as `drank run` tells it: the stages that will run, by real DVC, and their times, by hand."""

import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from safetensors.torch import save_file

from drank.method import covariance, threads
from drank.model import text
from drank.planning import estimate, footprint, plan
from drank.planning.estimate import Model, costs, seconds
from drank.planning.footprint import Shape
from drank.planning.machine import Speed
from drank.planning.plan import Plan, duration, planned, speeds
from drank.project.params import read_params
from tests import tiny
from tests.conftest import PROGRAMS, QUIET, REPOSITORY
from tests.toy import VARIANTS, edit_params, executed, repro, write_project


@pytest.fixture(scope="module", autouse=True)
def _quick():
    """DVC starts at once (see ``tests.warm``)."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan, "sys", SimpleNamespace(executable=f"{os.environ[PROGRAMS]}/python"))
        for name, value in QUIET.items():
            patch.setenv(name, value)
        yield


@pytest.fixture(scope="module")
def reproduced(tmp_path_factory):
    """A project of stages that take no time, before and after its `dvc repro`."""
    root = tmp_path_factory.mktemp("planned") / "project"
    write_project(root)
    fresh = planned(root, [])
    return root, fresh, executed(repro(root))


@pytest.fixture
def project(reproduced, tmp_path):
    return shutil.copytree(reproduced[0], tmp_path / "project", symlinks=True)


def test_of_a_fresh_project_everything_runs_and_of_an_up_to_date_one_nothing(reproduced):
    root, fresh, ran = reproduced
    assert fresh == ran
    said = []
    assert Plan(root, [], said.append).left == {}  # and nothing is measured
    assert said == ["nothing to run: every stage is up to date"]


def test_a_changed_ratio_runs_that_variant_alone(project):
    edit_params(project, "variants", "d-rank-80", "size_ratio", value=0.5)
    expected = [f"{step}@d-rank-80" for step in ("allocation", "compression", "evaluation", "release")]
    assert sorted(planned(project, [])) == sorted([*expected, "report"])
    assert planned(project, ["evaluation@d-rank-80"]) == expected[:3]


def test_what_dvc_has_in_its_cache_runs_at_most(project):
    shutil.rmtree(project / "data")
    assert set(planned(project, [])) >= {"sampling", "covariance", *(f"release@{name}" for name in VARIANTS)}
    assert executed(repro(project)) == []


def test_what_is_wrong_with_a_project_is_left_for_dvc_to_say(project):
    assert planned(project, ["no-such-stage"]) is None
    (project / "dvc.yaml").write_text("stages: [")
    said = []
    assert Plan(project, [], said.append).left == {}
    assert said == []


@pytest.fixture
def ahead(monkeypatch, tmp_path):
    """A project with three stages that take 5, 4 and 40 seconds, and what is said of it."""
    names, said = ["raw", "sampling", "covariance@0"], []
    monkeypatch.setattr(plan, "planned", lambda root, targets: names)
    monkeypatch.setattr(plan, "speeds", lambda params: {(1, "cpu"): SLOW})
    monkeypatch.setattr(plan, "seconds", lambda costs, speed: dict(zip(names, (5.0, 4.0, 40.0), strict=True)))

    def start(source, fetched):
        (tmp_path / "params.yaml").write_text(tiny.PARAMS.replace("local:source/model", source))
        (tmp_path / fetched).mkdir(parents=True)
        tiny.llama().config.save_pretrained(tmp_path / fetched)
        return Plan(tmp_path, [], said.append), said

    return start


def fetched_as(source, root):
    texts = {name: {"source": f"local:source/{name}.jsonl"} for name in ("news", "commons")}
    params = {"params.yaml": {"model": {"source": source}, "text": texts}}
    (root / "dvc.lock").write_text(yaml.safe_dump({"stages": {"raw": {"params": params}}}))


def test_time_is_told_when_the_model_is_there(ahead):
    told, said = ahead("hub:some/model", "data/raw/model")
    told.follow("Running stage 'raw':\n")
    assert said == [
        "up to 3 stages to run (time is told when the model is there): raw, sampling, covariance@0",
        "[1 of 3] raw",
    ]
    told.follow("> python -m stages.raw")
    fetched_as("hub:some/model", told.root)
    told.follow("Stage 'sampling' didn't change, skipping")
    told.follow("Running stage 'covariance@0':")
    assert said[2:] == [
        "1 stage to run, about 40 s here:\n  covariance@0  40 s",
        "[3 of 3] covariance@0, about 40 s; about 40 s left",
    ]


def test_a_local_model_has_its_times_from_the_start(ahead):
    told, said = ahead("local:source/model", "source/model")
    assert said == [
        "up to 3 stages to run, about 50 s here:\n  raw           5 s\n  sampling      4 s\n  covariance@0  40 s"
    ]
    told.follow("Stage 'raw' is cached - skipping run, checking out outputs")
    told.follow("Running stage 'sampling':")
    assert said[1:] == ["[2 of 3] sampling, about 4 s; about 40 s left"]


def test_durations():
    told = [duration(s) for s in (0.2, 5.4, 44.0, 94.0, 100.0, 3000.0, 5000.0, 9000.0)]
    assert told == ["1 s", "5 s", "40 s", "90 s", "2 min", "50 min", "83 min", "2.5 h"]


SHAPE = Shape("tiny", 2, 32, 64, 4, 2, 320)
FAST = 1e30
SLOW = Speed("float32", 1e9, 1e9, 1e9)


def times(tmp_path, model=None, text=tiny.PARAMS, **speeds):
    (tmp_path / "params.yaml").write_text(text)
    speed = Speed(**{"dtype": "float32", "passes": FAST, "float64": FAST, "eigenproblem": FAST} | speeds)
    found = costs(read_params(tmp_path / "params.yaml"), model or Model(SHAPE))
    return seconds(found, lambda threads, device: speed)


def test_a_pass_takes_its_flops_in_the_type_that_it_is_computed_in(tmp_path):
    # Without output gradients, and so without the spectrum that needs them and its variant.
    document = yaml.safe_load(tiny.PARAMS)
    document["covariance"]["fisher"] = "none"
    for section, name in (("spectrum", "kfac"), ("presets", "kfac"), ("variants", "kfac-80")):
        del document[section][name]
    text = yaml.safe_dump(document)
    # Per token and layer: 2 * 9216 of linears, 2 * 32 * 64 of attention, 3 * 2 * 32² + 2 * 64² of sums.
    flops = 8 * 64 * 2 * (18_432 + 4_096 + 14_336)
    for dtype, passes, share in (("float32", 1e6, 0.6), ("bfloat16", 1e7, 0.45)):
        found = times(tmp_path, text=text, dtype=dtype, passes=passes)["covariance@0"]
        assert found == pytest.approx(4 + flops / (share * passes), rel=1e-3)


def test_a_spectrum_takes_its_eigenproblems(tmp_path):
    # Sides of 32 in a layer: queries, output, gate, up and down; of 16: keys, values.
    flops = 2 * 10 / 3 * (5 * 32**3 + 2 * 16**3)
    found = times(tmp_path, eigenproblem=1e5)
    assert found["spectrum@input"] == pytest.approx(4 + flops / 1e5, rel=1e-3)
    assert found["spectrum@kfac"] > 1.5 * flops / 1e5  # and every cut


def test_an_evaluation_takes_its_windows_texts_and_items(tmp_path):
    tokens = 4 * 2 * 64 + 32_768 // 4 + 8 * 80 + 4 * 8 * 80  # test windows, news_rolling, last_word, next_sentence
    flops = tokens * (2 * (2 * 9216 + 4096) + 2 * 320 * 32)
    found, thrice = (times(tmp_path, Model(SHAPE, n), passes=1e6)["evaluation@dense"] for n in (1.0, 3.0))
    assert found == pytest.approx(7 + flops / 0.6e6, rel=1e-3)
    assert thrice - 7 == pytest.approx(3 * (found - 7), rel=1e-3)  # another architecture counts by its parameters


def test_every_stage_has_a_time_and_a_healed_variant_its_training_besides(tmp_path):
    asked = {"objective": "distillation", "n_windows": 4, "window_length": 64, "epochs": 2, "batch_windows": 2}
    asked |= {"learning_rate": 0.001, "rank": 2, "alpha": 4, "threads": 1}
    document = yaml.safe_load(tiny.PARAMS)
    document["variants"]["healed"] = document["variants"]["kfac-80"] | {"healing": asked}
    found = times(tmp_path, text=yaml.safe_dump(document, sort_keys=False), passes=1e9)
    stages = yaml.safe_load((REPOSITORY / "dvc.yaml").read_text())["stages"]
    assert {name.partition("@")[0] for name in found} == set(stages)
    assert all(time > 0 for time in found.values())
    assert found["compression@healed"] > found["compression@kfac-80"]
    assert found["evaluation@healed"] == found["evaluation@kfac-80"]


def test_numbers_that_are_written_twice_since_their_modules_import_torch():
    assert covariance.PANEL == footprint.PANEL
    assert threads.SMALL == footprint.SMALL
    assert estimate.REQUESTS["next_sentence"] == text.N_CHOICES
    assert text.ROLLING_CHARACTERS == 4 * estimate.ROLLING


def test_a_shape_is_read_from_the_config_and_parameters_from_the_headers(tmp_path):
    model = tiny.llama().bfloat16()
    model.save_pretrained(tmp_path / "llama")
    found = estimate.read_model(tmp_path / "llama")
    assert found.shape == Shape("llama", 2, 32, 64, 4, 2, 320, tied=True)
    assert found.parameters == 1
    tiny.gpt2().save_pretrained(tmp_path / "gpt2")
    found = estimate.read_model(tmp_path / "gpt2")
    assert found.shape == Shape("gpt2", 2, 32, 128, 4, 4, 320, gated=False, tied=found.shape.tied)
    assert found.parameters == pytest.approx(1, abs=0.3)
    (tmp_path / "other").mkdir()
    (tmp_path / "other/config.json").write_text(json.dumps({"model_type": "unheard-of"}))
    save_file({"x": model.lm_head.weight.clone()}, tmp_path / "other/model.safetensors")
    assert estimate.read_model(tmp_path / "other") is None


def test_a_machine_is_measured(tmp_path):
    (tmp_path / "params.yaml").write_text(tiny.PARAMS)
    ((place, speed),) = speeds(read_params(tmp_path / "params.yaml")).items()
    assert place == (1, "cpu")
    assert speed.passes > speed.eigenproblem > 1e6


def test_windows_without_a_number_are_guessed_from_the_texts(tmp_path):
    (tmp_path / "params.yaml").write_text(tiny.PARAMS.replace("n_test_windows: 4", "n_test_windows: all"))
    folder = Path(tmp_path / "data/raw/text")
    folder.mkdir(parents=True)
    (folder / "news.jsonl").write_text("x" * 10_000)
    (folder / "commons.jsonl").write_text("x" * 1_000)
    params = read_params(tmp_path / "params.yaml")
    assert estimate.read_test_windows(params, tmp_path) == int((0.3 * 10_000 + 1_000) / 4 / 64)
