"""A project in no time: real DVC on stages with the names, files and formats of ours, and what a store has of it."""

import hashlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import yaml
from mlflow import MlflowClient

from tests import conftest

REPOSITORY = Path(__file__).parent.parent
VARIANTS = ("dense", "d-rank-80")
STORE = ("MLFLOW_TRACKING_URI", "MLFLOW_RUN_ID", "MLFLOW_EXPERIMENT_ID", "DVC_ROOT")  # variables that name another one

# Stages with the names, files and formats of the real ones, and numbers that depend on the parameters alone.
STEP = """
import hashlib, json, sys
from pathlib import Path
import yaml

def write(path, value):
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(value if isinstance(value, str) else json.dumps(value))

params = yaml.safe_load(open("params.yaml"))
step, name = sys.argv[1], sys.argv[-1]
variant = params["variants"].get(name, {})
if step == "sampling":
    write("data/sampling/calibration/0.safetensors", "windows")
    write("data/sampling/test.safetensors", "test windows")
    write("data/sampling/tasks/last_word.jsonl", "")
    write("data/sampling/summary.json", {"texts": {"news": {"documents": 9}, "commons": {"documents": 7}}})
if step == "covariance":
    write("data/covariance/h.safetensors", "h")
if step == "allocation":
    preset, ratio = params["presets"][variant["preset"]], variant["size_ratio"]
    units = [
        {"name": f"model.layers.{layer}.{kind}", "kind": kind, "role": None, "layer": layer, "full_rank": 10,
         "members": [f"model.layers.{layer}.{kind}"], "factors": f"{layer}.{kind}", "rank": int(ratio * (layer + 5)),
         "effective_rank": layer + 0.5, "relative_loss": 1 - ratio, "objective_share": 0.1, "form": "factors",
         "price": 20, "out_features": 10, "in_features": 10}
        for layer in range(3) for kind in ("q_proj", "up_proj")
    ]
    objective = {"value": 10 * ratio, "bound": 9 * ratio, "gap": 0.1}
    totals = {"objective": objective, "budget": 100, "price": 90, "slack": 10, "kept_ratio": ratio, "units": units}
    totals |= {"format_version": 1, "targeted_parameters": 900, "blocks": [], "inputs": {}}
    write(f"data/allocation/{name}.json", {"variant": name, **preset, **variant, **totals})
if step == "compression":
    write(f"data/compression/{name}/model.safetensors", f"weights of {name}")
    write(f"data/compression/{name}/allocation.json", open(f"data/allocation/{name}.json").read())
if step == "evaluation":
    ratio = variant["size_ratio"]
    sizes = {"size_ratio": ratio, "kept_ratio": ratio, "parameters": 1000, "bytes": 2000000}
    figures = {"token_perplexity/news": 20 / ratio, "protocol": {"windows": 1, "dtype": "float32"}}
    figures |= {"acc/last_word": 0.25, "acc_stderr/last_word": 0.01, "word_perplexity/news": 9.0}
    figures |= {"bits_per_byte/news": 1.5, "targeted_parameters": 900, "exact_match,strict-match/gsm8k": 0.5}
    write(f"results/{name}.json", {"variant": name, "preset": variant["preset"], **sizes, **figures})
    write(f"data/evaluation/{name}.json", {"nats": []})
if step == "release":
    source, target = Path(f"data/compression/{name}"), f"data/models/{name}"
    for file in source.iterdir():
        write(f"{target}/{file.name}", file.read_text())
    digest = hashlib.sha256((source / "allocation.json").read_bytes()).hexdigest()
    write(f"{target}/MLmodel", {"flavors": {"python_function": {"data": ".", "loader_module": "drank.serving.mlflow"}}})
    write(f"{target}/SHA256SUMS", f"{digest}  allocation.json\\n")
    write(f"{target}/provenance.json", {"subject": [{"name": "allocation.json", "digest": {"sha256": digest}}]})
if step == "report":
    rows = [json.loads(Path(f"results/{name}.json").read_text()) for name in params["variants"]]
    columns = [key for key, value in rows[0].items() if not isinstance(value, dict)]
    lines = [columns, *([str(row[key]) for key in columns] for row in rows)]
    write("results/summary.csv", "".join(",".join(f'"{cell}"' for cell in line) + "\\n" for line in lines))
    write("results/figures/ranks.png", "picture")
    write("results/report.html", "<h1>variants</h1>")
"""

DVC_YAML = """
stages:
  sampling:
    cmd: python step.py sampling
    params: [text, sampling]
    outs: [data/sampling]
  covariance:
    cmd: python step.py covariance
    deps: [data/sampling/calibration/0.safetensors]
    params: [covariance]
    outs: [data/covariance]
  allocation:
    foreach: ${variants}
    do:
      cmd: python step.py allocation ${key}
      deps: [data/covariance]
      params: ["presets.${item.preset}", "variants.${key}"]
      metrics: [{"data/allocation/${key}.json": {cache: false}}]
  compression:
    foreach: ${variants}
    do:
      cmd: python step.py compression ${key}
      deps: ["data/allocation/${key}.json"]
      outs: ["data/compression/${key}"]
  evaluation:
    foreach: ${variants}
    do:
      cmd: python step.py evaluation ${key}
      deps: ["data/compression/${key}", data/sampling]
      params: [evaluation, "variants.${key}"]
      outs: ["data/evaluation/${key}.json"]
      metrics: [{"results/${key}.json": {cache: false}}]
  release:
    foreach: ${variants}
    do:
      cmd: python step.py release ${key}
      deps: ["data/compression/${key}", "data/allocation/${key}.json", "results/${key}.json"]
      outs: ["data/models/${key}"]
  report:
    cmd: python step.py report
    deps: [data/evaluation]
    params: [variants]
    outs: [results/report.html]
    plots:
      - results/summary.csv: {cache: false, x: bytes, y: token_perplexity/news}
      - results/figures: {cache: false}
artifacts:
  champion:
    path: data/models/d-rank-80
    type: model
"""


def run(root: Path, *command: str) -> str:
    return conftest.run(root, *command, path=REPOSITORY / "src").stdout


def repro(root: Path, *targets: str) -> str:
    return run(root, sys.executable, "-m", "dvc", "repro", *targets)


def executed(output: str) -> list[str]:
    return [line.split("'")[1] for line in output.splitlines() if line.startswith("Running stage")]


def edit_params(root: Path, *keys: str, value: object) -> None:
    document = yaml.safe_load((root / "params.yaml").read_text())
    section = document
    for key in keys[:-1]:
        section = section[key]
    section[keys[-1]] = value
    (root / "params.yaml").write_text(yaml.safe_dump(document, sort_keys=False))


def write_project(root: Path) -> None:
    """The pipeline above in a git repository with one commit, not yet run."""
    document = yaml.safe_load((REPOSITORY / "params.yaml").read_text())
    document["variants"] = {name: document["variants"][name] for name in VARIANTS}
    root.mkdir()
    (root / "params.yaml").write_text(yaml.safe_dump(document, sort_keys=False))
    (root / "step.py").write_text(STEP)
    (root / "dvc.yaml").write_text(DVC_YAML)
    (root / ".gitignore").write_text("/mlflow.db*\n/mlartifacts/\n")
    run(root, "git", "init", "-q")
    for key, value in (("name", "someone"), ("email", "someone@example.org")):
        run(root, "git", "config", f"user.{key}", value)
    run(root, sys.executable, "-m", "dvc", "init", "-q")
    commit(root)


def made(root: Path) -> Path:
    """The project reproduced and committed, with a store that has the tables alone, since making them takes long."""
    write_project(root)
    repro(root)
    commit(root)
    Runs(root)
    return root


def commit(root: Path) -> str:
    run(root, "git", "add", ".")
    run(root, "git", "commit", "-q", "--allow-empty", "-m", "results")
    return run(root, "git", "rev-parse", "HEAD").strip()


class Runs:
    """The runs of a store, by what they are."""

    def __init__(self, root: Path) -> None:
        self.uri = f"sqlite:///{root / 'mlflow.db'}"
        self.client = MlflowClient(tracking_uri=self.uri)
        self.experiment = self.client.get_experiment_by_name("drank")
        self.all = self.client.search_runs([self.experiment.experiment_id]) if self.experiment else []
        self.pipelines = [run for run in self.all if run.data.tags["drank.run"] == "pipeline"]

    def variants(self, pipeline):
        children = [r for r in self.all if r.data.tags.get("mlflow.parentRunId") == pipeline.info.run_id]
        assert len({run.info.run_name for run in children}) == len(children)
        return {run.info.run_name: run for run in children}

    def artifacts(self, run, folder=None):
        found = self.client.list_artifacts(run.info.run_id, folder)
        return sorted(path for a in found for path in (self.artifacts(run, a.path) if a.is_dir else [a.path]))

    def one_state(self):
        (pipeline,) = self.pipelines
        variants = self.variants(pipeline)
        assert {run.info.status for run in (pipeline, *variants.values())} == {"FINISHED"}
        return pipeline, variants


def copied(project: Path, folder: Path) -> Path:
    return Path(shutil.copytree(project, folder / "project", symlinks=True))


def lock_sha256(root: Path) -> str:
    stages = yaml.safe_load((root / "dvc.lock").read_text())["stages"]
    return hashlib.sha256(json.dumps(stages, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


@contextmanager
def serving(uri: str, folder: Path):
    """The address of `mlflow server` over a store, on a free port of the loopback interface."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", port, "--workers", "1"]
    with tempfile.TemporaryFile() as log:
        command += ["--backend-store-uri", uri]
        process = subprocess.Popen(command, cwd=folder, stdout=log, stderr=log, start_new_session=True)
        try:
            wait_for(f"http://127.0.0.1:{port}/health", process)
            yield f"http://127.0.0.1:{port}"
        finally:
            os.killpg(process.pid, signal.SIGKILL)  # it would wait for its clients
            process.wait()


def wait_for(address: str, process: subprocess.Popen[bytes], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end and process.poll() is None:
        try:
            urllib.request.urlopen(address, timeout=5).close()
            return
        except OSError:
            time.sleep(0.2)
    raise AssertionError(f"no answer from {address}; mlflow server ended with {process.poll()}")
