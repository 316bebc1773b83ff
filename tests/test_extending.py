"""docs/extending.md as it stands: its rows are added to a copy of the package, and a variant is built with them."""

import os
import re
import shutil
import sys

import yaml

from drank.project.files import read_json
from tests import tiny
from tests.conftest import REPOSITORY, run

PAGE = (REPOSITORY / "docs/extending.md").read_text()
BLOCKS = dict(re.findall(r"```(?:python|yaml)\n# (\S+)\n(.*?)```", PAGE, re.DOTALL))
STAGES = """
# The process that this is a fork of has the package without the rows.
import sys
from pathlib import Path
from transformers.quantizers import auto

for mapping in (auto.AUTO_QUANTIZER_MAPPING, auto.AUTO_QUANTIZATION_CONFIG_MAPPING):
    mapping.pop("drank", None)
for name in [name for name in sys.modules if name.partition(".")[0] == "drank"]:
    del sys.modules[name]

from stages import allocation, compression, covariance, evaluation, raw, release, report, sampling, spectrum

raw.main(); sampling.main(); covariance.main("0"); spectrum.main("moments")
for stage in (allocation, compression, evaluation, release):
    stage.main("mine-80")
report.main()

from drank.audit import audit
from transformers import AutoModelForCausalLM

folder = Path("data/models/mine-80")
assert {link.name: link.finding for link in audit(folder, None).links}["ranks"] == "holds"
model = AutoModelForCausalLM.from_pretrained(folder)
model.save_pretrained("again")
assert Path("again/model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
ids = model.dummy_inputs["input_ids"]
logits = model(ids).logits
difference = (model.dequantize()(ids).logits - logits).norm() / logits.norm()
assert difference < 0.05, difference
"""


def test_a_metric_a_rule_and_a_storage_of_ones_own_are_rows(tmp_path):
    tiny.project(tmp_path)
    for folder in ("src", "stages"):
        shutil.copytree(
            REPOSITORY / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info")
        )
    (imported,) = re.findall(r"^with `(from drank\.\S+ import [^`]*)`", PAGE, re.MULTILINE)
    for name, code in BLOCKS.items():
        if name.endswith(".py"):
            assert code.count("\n") <= 30
            file = tmp_path / name
            file.write_text(f"{file.read_text()}\n\n{imported if 'choices' in name else ''}\n{code}")
    document = yaml.safe_load(tiny.PARAMS)
    for section, rows in yaml.safe_load(BLOCKS["params.yaml"]).items():
        document[section] |= rows
    for section, name in (("variants", "mine-80"), ("spectrum", "moments"), ("presets", "mine")):
        document[section] = {name: document[section][name]}
    document["covariance"]["fisher"] = "none"
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(document))
    (tmp_path / "stages/everything.py").write_text(STAGES)
    run(tmp_path, sys.executable, "-m", "stages.everything", path=f"{tmp_path}{os.pathsep}{tmp_path / 'src'}")
    allocation = read_json(tmp_path / "data/allocation/mine-80.json")
    assert allocation["allocation"] == "equal_energy"
    assert {row["form"] for row in allocation["units"]} >= {"columns"}
    assert allocation["price"] <= allocation["budget"]
    dropped = [row["relative_loss"] for row in allocation["units"] if row["form"] != "dense"]
    assert max(dropped) < 1.0
    assert read_json(tmp_path / "results/mine-80.json")["kept_ratio"] > 0.7
    assert "mine-80" in (tmp_path / "results/report.html").read_text()
