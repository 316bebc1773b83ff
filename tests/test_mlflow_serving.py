"""MLflow's own server over released folders, against transformers' `generate`."""

import json
import os
import socket
import subprocess
import sys
import tempfile
import urllib.request
from contextlib import contextmanager

import mlflow
import pytest
import torch
import yaml
from mlflow.models import ModelSignature, infer_signature
from transformers import AutoModelForCausalLM, AutoTokenizer

from drank.model.checksums import ChecksumError
from drank.model.precision import compute_dtype
from drank.steps.release import mlmodel
from tests import conftest, toy

PROMPTS = ["the committee said that", "news"]


@contextmanager
def mlflow_serving(model, root):
    """The address of `mlflow models serve` on a free port of the loopback interface."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    command = [sys.executable, "-m", "mlflow", "models", "serve", "-m", model, "--env-manager", "local", "-p", port]
    environment = os.environ | conftest.QUIET | {"MLFLOW_TRACKING_URI": f"sqlite:///{root / 'mlflow.db'}"}
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, cwd=root, env=environment, stdout=log, stderr=log, start_new_session=True)
        try:
            toy.wait_for(f"http://127.0.0.1:{port}/ping", process, seconds=300)
            yield f"http://127.0.0.1:{port}"
        finally:
            os.killpg(process.pid, 9)
            process.wait()


def asked(address, document):
    request = urllib.request.Request(f"{address}/invocations", json.dumps(document).encode())
    request.add_header("Content-Type", "application/json")
    with urllib.request.urlopen(request, timeout=120) as answer:
        return json.load(answer)["predictions"]


def continued(folder, prompt, max_new_tokens):
    """The continuation that `generate` gives."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=compute_dtype("auto", "cpu"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokens = tokenizer(prompt, return_tensors="pt")
    with torch.no_grad():
        out = model.generate(**tokens, max_new_tokens=max_new_tokens, do_sample=False)
    return tokenizer.decode(out[0, tokens["input_ids"].shape[1] :], skip_special_tokens=True)


@pytest.mark.pipeline
def test_mlflow_serves_the_champion_from_its_folder_and_leaves_that_as_it_is(project, monkeypatch):
    folder = project / "data/models/kfac-80"
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    conftest.run(project, "drank", "promote", "kfac-80")
    with mlflow_serving("models:/drank@champion", project) as address:
        answers = asked(address, {"inputs": PROMPTS, "params": {"max_new_tokens": 7}})
        (default,) = asked(address, {"dataframe_split": {"columns": [0], "data": [PROMPTS[:1]]}})
    assert answers == [continued(folder, prompt, 7) for prompt in PROMPTS]
    assert default == continued(folder, PROMPTS[0], 20)
    assert len(set(answers)) == 2
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    assert not list((project / "mlartifacts").rglob("*.safetensors"))
    # Another model at that path is not the registered one.
    sums = folder / "SHA256SUMS"
    sums.rename(kept := project / "kept")
    sums.write_text(kept.read_text().upper())
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{project / 'mlflow.db'}")
    with pytest.raises(ChecksumError, match="another model than the registered one"):
        mlflow.pyfunc.load_model("models:/drank@champion")
    sums.unlink()
    kept.rename(sums)


def test_the_mlmodel_of_a_release_serves_a_copy_of_the_folder_and_has_the_signature_that_mlflow_infers(project):
    folder = project / "data/models/dense"
    assert (folder / "MLmodel").read_text() == mlmodel()
    loaded = mlflow.pyfunc.load_model(str(folder))
    assert loaded.predict(PROMPTS, params={"max_new_tokens": 3}) == [continued(folder, p, 3) for p in PROMPTS]
    inferred = infer_signature(PROMPTS, PROMPTS, params={"max_new_tokens": 20})
    assert ModelSignature.from_dict(yaml.safe_load(mlmodel())["signature"]) == inferred
