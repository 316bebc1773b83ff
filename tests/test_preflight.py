"""Findings before anything computes: every finding provoked for real, and the cost of finding nothing."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import yaml

from drank.preflight import preflight
from drank.preflight.facts import Facts
from drank.project.params import read_params
from tests import tiny
from tests.conftest import run

IDENTITY = {"GIT_COMMITTER_NAME": "someone", "GIT_COMMITTER_EMAIL": "someone@example.org"}


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    root = tmp_path_factory.mktemp("preflight") / "project"
    tiny.project(root)
    run(root, "git", "init", "-q")
    return root


@pytest.fixture
def project(small, tmp_path, monkeypatch):
    """A project in which nothing is found, away from the user's own git and hub."""
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    variables = {"HOME": str(tmp_path), "HF_HOME": str(tmp_path / "hub"), "GIT_CONFIG_NOSYSTEM": "1", **IDENTITY}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    return shutil.copytree(small, tmp_path / "project")


def found(root):
    return [(finding.level, finding.text) for finding in preflight(root)]


def change(root, **sections):
    document = yaml.safe_load((root / "params.yaml").read_text())
    for section, values in sections.items():
        document[section] |= values
    (root / "params.yaml").write_text(yaml.safe_dump(document, sort_keys=False))


def edit(root, name, **values):
    file = root / "source/model" / name
    document = json.loads(file.read_text()) | values
    file.write_text(json.dumps({key: value for key, value in document.items() if value is not None}))


def test_a_good_project_has_nothing_to_say(project):
    assert found(project) == []


LARGE = {"hidden_size": 8192, "num_hidden_layers": 80, "intermediate_size": 28672, "vocab_size": 32000}
LLAVA = {"text_config": {"max_position_embeddings": 32, "rope_theta": 1.0}}


def pointer(root, name):
    (root / "source" / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")


def without_tokenizer_json(root):
    (root / "source/model/tokenizer.json").rename(root / "source/model/tekken.json")


def large(root):
    (root / "source/model/model.safetensors").unlink()
    edit(root, "config.json", **LARGE)


def gpt2(root):
    tiny.gpt2().config.save_pretrained(root / "source/model")
    change(root, sampling={"window_length": 300})


@pytest.mark.parametrize(
    ("provoke", "level", "words"),
    [
        (lambda root: (root / "source/news.jsonl").unlink(), "error", "text.news.source = 'local:source/news.jsonl'"),
        (lambda root: pointer(root, "news.jsonl"), "error", "git lfs pull"),
        (lambda root: pointer(root, "model/model.safetensors"), "error", "model.safetensors: a pointer of Git LFS"),
        (lambda root: change(root, model={"source": "hub:some/model"}), "error", "HF_HUB_OFFLINE is set"),
        (lambda root: change(root, model={"source": "hub:some/model"}), "cannot say", "no config.json is here yet"),
        (lambda root: change(root, evaluation={"tasks": ["arc_esy"]}), "error", "did you mean arc_easy"),
        (lambda root: change(root, evaluation={"tasks": ["mmlu", "gsm8k"]}), "error", "HF_HUB_OFFLINE is set"),
        (lambda root: change(root, evaluation={"tasks": ["ifeval"]}), "warning", "ifeval imports"),
        (lambda root: change(root, sampling={"n_task_items": 0}), "error", "sampling.n_task_items = 0, and each of"),
        (lambda root: edit(root, "tokenizer_config.json", eos_token=None), "warning", "news_rolling: lm-eval begins"),
        (lambda root: edit(root, "config.json", pad_token_id=320), "error", "pad_token_id = 320, and embeddings end"),
        (lambda root: edit(root, "config.json", vocab_size=300), "warning", "ids up to 319, and embeddings end at 299"),
        (gpt2, "error", "sampling.window_length = 300: the model has 256 positions, and it has no others"),
        (lambda root: edit(root, "config.json", **LLAVA), "warning", "sampling.window_length = 64: the model has 32"),
        (without_tokenizer_json, "error", "`pip install mistral_common`"),
        (lambda root: change(root, covariance={"device": "cuda"}), "error", "device = cuda, and there is no GPU"),
        (large, "error", "covariance.offload: true"),
        (large, "error", "will be written (half of it DVC's copy: "),
        (lambda root: edit(root, "config.json", num_hidden_layers=None), "cannot say", "does not tell the model's"),
        (lambda root: shutil.rmtree(root / ".git"), "remark", "is in no git repository"),
        (lambda root: change(root, sampling={"n_windows": 0}), "error", "n_windows"),
    ],
)  # fmt: skip
def test_each_finding(project, monkeypatch, provoke, level, words):
    if "there is no" in words and Path("/dev/nvidiactl").exists():
        pytest.skip("there is a GPU")
    monkeypatch.setitem(sys.modules, "mistral_common", None)  # as if it were not installed
    provoke(project)
    told = found(project)
    assert any(level == one and words in text for one, text in told), told
    if level == "error":
        assert told[0][0] == "error"


@pytest.mark.parametrize(
    ("variables", "level", "words"),
    [
        ({"GIT_TEST_ASSUME_DIFFERENT_OWNER": "1"}, "warning", "git config --global --add safe.directory"),
        ({"GIT_COMMITTER_NAME": "", "GIT_COMMITTER_EMAIL": ""}, "warning", "git config user.name"),
        ({"PATH": "/nowhere"}, "warning", "git is not installed"),
    ],
)
@pytest.mark.parametrize("known", [True, False])
def test_what_is_around(project, monkeypatch, variables, level, words, known):
    """It is said beside what is wrong with params.yaml, too."""
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    if not known:
        (project / "params.yaml").write_text("a: [")
    *_, told = found(project)
    assert len(found(project)) == 1 + (not known)
    assert told[0] == level
    assert words in told[1]


def test_what_was_fetched_is_looked_at(project):
    """A model of the hub, once the first stage has written it, but not that of other parameters."""
    change(project, model={"source": "hub:some/model"})
    texts = {name: {"source": f"local:source/{name}.jsonl"} for name in ("news", "commons")}
    lock = {"raw": {"params": {"params.yaml": {"model": {"source": "hub:some/model"}, "text": texts}}}}
    (project / "dvc.lock").write_text(yaml.safe_dump({"stages": lock}))
    shutil.copytree(project / "source/model", project / "data/raw/model")
    facts = Facts(project, read_params(project / "params.yaml"))
    assert facts.folder == project / "data/raw/model"
    assert "raw" not in facts.costs  # it is there
    shutil.rmtree(project / "source")
    assert found(project) == []  # nothing is fetched
    change(project, model={"source": "hub:some/other"})
    assert Facts(project, read_params(project / "params.yaml")).folder is None


def test_run_ends_before_anything_computes_and_says_all(project):
    (project / "source/news.jsonl").unlink()
    edit(project, "config.json", pad_token_id=320)
    for command in (("check", "--before"), ("run",)):
        done = run(project, "drank", *command, check=False)
        assert done.returncode == 1
        told = done.stdout + done.stderr
        assert "text.news.source" in told
        assert "pad_token_id" in told
        assert "nothing was started (2 error)" in done.stderr
    assert not (project / "data").exists()


def test_to_find_nothing_takes_less_than_three_seconds(project):
    """Of processor time, with a task of lm-eval, which has 14,000 files."""
    change(project, evaluation={"tasks": ["arc_easy", "news_rolling"]})
    (project.parent / "hub/hub/datasets--allenai--ai2_arc/snapshots/0").mkdir(parents=True)
    program = (
        "import sys, time; from pathlib import Path; begun = time.process_time()\n"
        "from drank.preflight import preflight\n"
        "print(preflight(Path()), time.process_time() - begun)\n"
        "print({'torch', 'transformers', 'mlflow', 'lm_eval'} & set(sys.modules))"
    )
    told, heavy = run(project, sys.executable, "-c", program, real=True).stdout.splitlines()
    assert told.startswith("[] ")
    assert float(told.split()[1]) < 3
    assert heavy == "set()"
