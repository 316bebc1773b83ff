"""Findings before anything computes: every finding provoked for real, and the cost of finding nothing."""

import json
import shutil
import sys
import threading
from collections import namedtuple
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import yaml

from drank.planning.facts import Facts
from drank.preflight import preflight
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
    """A project in which nothing is found, away from the user's own git, hub and MLflow."""
    for name in ("MLFLOW_TRACKING_URI", "DVC_ROOT", "HF_HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)
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
HEALING = {
    "objective": "text", "n_windows": 8, "window_length": 99999, "epochs": 1, "batch_windows": 4,
    "learning_rate": 1e-3, "rank": 4, "alpha": 8, "threads": 1,
}  # fmt: skip
GPTQ = {"quant_method": "gptq", "bits": 4}
LLAVA = {"text_config": {"max_position_embeddings": 32, "rope_theta": 1.0}}

MIXTURE = {"num_local_experts": 256, "num_experts_per_tok": 2}


def mixture_offloaded(root):
    edit(root, "config.json", **MIXTURE)
    change(root, covariance={"offload": True})


def pointer(root, name):
    (root / "source" / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")


def large(root):
    (root / "source/model/model.safetensors").unlink()
    edit(root, "config.json", **LARGE)


def gpt2(root):
    tiny.gpt2().config.save_pretrained(root / "source/model")
    change(root, sampling={"window_length": 300})


def cache_in(root, folder):
    (root / ".dvc").mkdir()
    (root / ".dvc/config").write_text(f"[cache]\n    dir = {root / folder}/cache\n")


def long_windows_to_heal_on(root):
    variant = yaml.safe_load((root / "params.yaml").read_text())["variants"]["kfac-80"]
    change(root, variants={"kfac-80": variant | {"healing": HEALING}})


def only_an_adapter(root):
    (root / "source/model/config.json").unlink()
    (root / "source/model/adapter_config.json").write_text('{"base_model_name_or_path": "org/base"}')


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
        (lambda root: change(root, model={"source": "local:gone"}), "error", "gone is not there"),
        (lambda root: edit(root, "config.json", pad_token_id=320), "error", "pad_token_id = 320 is no token"),
        (gpt2, "error", "sampling.window_length = 300: the model has 256 positions, and it has no others"),
        (lambda root: edit(root, "config.json", **LLAVA), "warning", "sampling.window_length = 64: the model has 32"),
        (lambda root: edit(root, "config.json", **MIXTURE), "warning", "n_windows = 8: an expert of the model sees 4 "),
        (lambda root: edit(root, "config.json", **MIXTURE), "warning", "the average is that at 128 windows"),
        (mixture_offloaded, "remark", "covariance.offload is set: the model's 256 experts per layer stay dense"),
        (lambda root: change(root, covariance={"device": "cuda"}), "error", "device = cuda, and there is no GPU"),
        (large, "error", "covariance.offload: true"),
        (large, "error", "will be written (half of it DVC's copy: "),
        (lambda root: edit(root, "config.json", num_hidden_layers=None), "cannot say", "does not tell the model's"),
        (lambda root: shutil.rmtree(root / ".git"), "remark", "is in no git repository"),
        (lambda root: run(root, "git", "config", "tag.gpgSign", "true"), "warning", "(tag.gpgSign = true)"),
        (lambda root: change(root, sampling={"n_windows": 0}), "error", "n_windows"),
        (lambda root: (root / "mlflow.db").write_text("a text"), "warning", "is no SQLite file"),
        (lambda root: (root / ".gitignore").write_text("*.json"), "warning", "git ignores results/a.json, data/alloc"),
        (long_windows_to_heal_on, "error", "variants.kfac-80.healing.window_length = 99999: "),
        (lambda root: (root / "results").write_text(""), "error", "results: a file is where stages write a folder"),
        (lambda root: (root / "data").symlink_to("gone/data"), "error", "data: a link to gone/data, which is"),
        (lambda root: cache_in(root, "params.yaml"), "error", "params.yaml: a file is where stages"),
        (lambda root: edit(root, "config.json", quantization_config=GPTQ), "error", "compressed already (gptq)"),
        (lambda root: (root / "source/model/model.safetensors").unlink(), "error", "has no *.safetensors"),
        (only_an_adapter, "error", "a peft adapter of org/base; merge it first"),
        (lambda root: (root / "source/news.jsonl").write_text('{"body": "a"}'), "error", "document 1 has no column"),
        (lambda root: change(root, text={"news": {"source": "local:source"}}), "error", "a folder; a text is one file"),
        (lambda root: change(root, text={"news": {"source": "local:params.yaml"}}), "error", "'.yaml' is not a text"),
    ],
)  # fmt: skip
def test_each_finding(project, monkeypatch, provoke, level, words):
    if "there is no" in words and Path("/dev/nvidiactl").exists():
        pytest.skip("there is a GPU")
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
        ({"MLFLOW_TRACKING_URI": "http://me:secret@127.0.0.1:1"}, "warning", "http://127.0.0.1:1 does not answer"),
        ({"MLFLOW_TRACKING_URI": "postgresql://here/mlflow"}, "cannot say", "a store of postgresql"),
        ({"MLFLOW_TRACKING_URI": "127.0.0.1:5000"}, "warning", "no address of a server; begin it with http://"),
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
    *others, told = found(project)
    assert len(others) == (not known)
    assert told[0] == level
    assert words in told[1]
    assert "secret" not in told[1]


@pytest.mark.parametrize(
    ("status", "body", "words"),
    [(503, b"", ["answers 503"]), (401, b"", []), (200, b"OK", []), (200, b"<html>log in</html>", ["a web page"])],
)
def test_a_server_of_mlflow_is_asked(project, monkeypatch, status, body, words):
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{server.server_port}")
        told = found(project)
        server.shutdown()
    assert len(told) == len(words)
    assert all(word in text for word, (_, text) in zip(words, told, strict=True))


def test_the_disk_is_that_of_the_data_and_that_of_the_cache(project, tmp_path, monkeypatch):
    """Both may lie elsewhere, behind a link and by DVC's configuration; a disk that holds neither does not count."""
    disk = namedtuple("disk", "free")
    places = {name: tmp_path / name for name in ("large", "cache")}
    for place in places.values():
        place.mkdir()
    (project / "data").symlink_to(places["large"])
    cache_in(project, "../cache")
    free = {tmp_path / "large": 10**12, tmp_path / "cache": 10**4, project: 10**4}
    monkeypatch.setattr("drank.preflight.machine.shutil.disk_usage", lambda path: disk(free[Path(path).resolve()]))
    monkeypatch.setattr("drank.preflight.machine.device_of", str)
    ((level, text),) = found(project)
    assert level == "error"
    assert f"free in {tmp_path / 'cache'}" in text
    free[tmp_path / "cache"] = 10**12
    assert found(project) == []


def test_only_stages_that_processes_share_are_counted_once_per_process(project, monkeypatch):
    change(project, covariance={"processes": 4})
    monkeypatch.setattr("drank.preflight.machine.memory_limit", lambda: 3e9)
    assert {text.split()[1].partition("@")[0] for _, text in found(project)} == {"covariance", "spectrum"}


def test_what_was_fetched_is_looked_at(project):
    """A model of the hub, once the first stage has written it, but not that of other parameters."""
    change(project, model={"source": "hub:some/model"})
    texts = {name: {"source": f"local:source/{name}.jsonl"} for name in ("news", "commons")}
    lock = {"raw": {"params": {"params.yaml": {"model": {"source": "hub:some/model"}, "text": texts}}}}
    (project / "dvc.lock").write_text(yaml.safe_dump({"stages": lock}))
    shutil.copytree(project / "source/model", project / "data/raw/model")
    facts = Facts(project)
    assert facts.folder == project / "data/raw/model"
    assert "raw" not in facts.left  # it is there
    shutil.rmtree(project / "source")
    assert found(project) == []  # nothing is fetched
    change(project, model={"source": "hub:some/other"})
    assert Facts(project).folder is None


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
    """Seconds of processor time, with a task of lm-eval, which has 14,000 files."""
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
