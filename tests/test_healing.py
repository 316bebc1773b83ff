"""Healing: adapters that are trained, merged and gone; the same bits after a killed run; a stage like the others."""

import copy
import shutil
import sys
from functools import partial

import pytest
import torch
import torch.nn.functional as F
import yaml
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from stages import compression
from transformers import AutoModelForCausalLM

from drank.audit import audit
from drank.model.layers import FactorLinear, PivotLinear
from drank.model.saved import CURVE
from drank.model.training import Adapters, Plan, Scales, Training, matrices
from drank.project.checkpoint import Checkpoint
from drank.project.files import file_sha256, read_json, write_json, write_text
from drank.project.params import Healing as HealingSection
from drank.project.params import ParamsError, read_params
from drank.project.progress import progress
from drank.steps.healing import HealingError, heal
from drank.steps.release import CHECKSUMS, STATEMENT, checksums
from drank.tracking import track
from tests import tiny
from tests.compressed import LLAMA, filled, write
from tests.conftest import run

SHA256 = {"compressed": "0" * 64, "dense": "1" * 64, "text": "2" * 64}
PLAN = Plan(n_windows=6, batch_windows=2, epochs=2, learning_rate=1e-2, seed=0)


def compressed():
    """A tiny Llama with a matrix in two factors and one in pivot form."""
    model = tiny.llama()
    layer = model.model.layers[0]
    W = layer.self_attn.q_proj.weight.detach()
    U, S, V = torch.linalg.svd(W)
    layer.self_attn.q_proj = filled(FactorLinear, {"weight": U[:, :9] * S[:9], "basis": V[:9]})
    kept, rest = layer.mlp.up_proj.weight.detach()[:12], torch.randn(52, 12) / 10
    tensors = {"weight": kept, "coefficients": rest, "places": torch.randperm(64)}
    layer.mlp.up_proj = filled(PivotLinear, tensors, in_order=False)
    return model.bfloat16()


def windows(n=6, length=16):
    return torch.randint(0, 320, (n, length), generator=torch.Generator().manual_seed(3))


def test_the_plan_by_hand():
    plan = Plan(n_windows=5, batch_windows=2, epochs=2, learning_rate=1.0, seed=0)
    assert plan.n_steps == 6
    batches = plan.batches()
    assert [len(batch) for batch in batches] == [2, 2, 1, 2, 2, 1]
    for epoch in (batches[:3], batches[3:]):
        assert sorted(torch.cat(epoch).tolist()) == [0, 1, 2, 3, 4]
    assert torch.cat(batches[:3]).tolist() != torch.cat(batches[3:]).tolist()
    assert [plan.rate(step) for step in range(6)] == pytest.approx([1.0, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6])


@given(st.integers(1, 300), st.integers(1, 8), st.integers(1, 4))
def test_the_learning_rate_rises_once_and_falls_and_is_never_zero(n_windows, batch, epochs):
    plan = Plan(n_windows, batch, epochs, learning_rate=0.5, seed=0)
    rates = [plan.rate(step) for step in range(plan.n_steps)]
    top = rates.index(max(rates))
    assert 0 < min(rates) <= max(rates) <= 0.5
    assert rates == sorted(rates[: top + 1]) + sorted(rates[top + 1 :], reverse=True)


BOTH = pytest.mark.parametrize("added", [Adapters(rank=2, alpha=4), Scales()])


@BOTH
def test_merging_gives_the_model_that_was_trained_without_a_new_tensor(added):
    model, ids = compressed().float(), windows()
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    untouched = {name: t.clone() for name, t in model.state_dict().items() if "layers" not in name and t.ndim > 1}
    before = model(input_ids=ids).logits
    healing = Training(model, compressed().float(), ids, PLAN, added)
    assert torch.equal(healing.model(input_ids=ids).logits, before)
    list(healing.steps())
    trained = healing.model(input_ids=ids).logits
    merged = healing.merge()
    assert type(merged) is type(model)
    torch.testing.assert_close(merged(input_ids=ids).logits, trained, rtol=1e-4, atol=1e-4)
    assert {name: tensor.shape for name, tensor in merged.state_dict().items()} == shapes
    for name, tensor in untouched.items():
        assert torch.equal(merged.state_dict()[name], tensor)


@pytest.mark.parametrize(("added", "share"), [(Adapters(rank=4, alpha=8), 0.98), (Scales(), 0.996)])
@pytest.mark.parametrize("objective", ["text", "distillation"])
def test_what_is_learned_gets_better(objective, added, share):
    ids, teacher = windows(), tiny.llama(initializer_range=0.2).bfloat16()
    model = compressed()
    plan = Plan(n_windows=6, batch_windows=2, epochs=8, learning_rate=2e-2, seed=0)
    healing = Training(model, teacher if objective == "distillation" else None, ids, plan, added)

    @torch.no_grad()
    def loss():
        logits = healing.model(input_ids=ids).logits.float()
        if objective == "text":
            return float(F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()))
        expected = teacher(input_ids=ids).logits.float().softmax(-1)
        return float((expected * (expected.log() - logits.log_softmax(-1))).sum(-1).mean())

    before = loss()
    steps = list(healing.steps())
    assert [step.number for step in steps] == list(range(1, 25))
    assert loss() < share * before


@BOTH
def test_an_interrupted_run_ends_with_the_same_bits(added):
    whole, first, second = (Training(compressed(), None, windows(), PLAN, added) for _ in range(3))
    losses, steps = [step.loss for step in whole.steps()], first.steps()
    begun = [next(steps).loss for _ in range(4)]
    second.resume(copy.deepcopy(first.state()))
    assert begun + [step.loss for step in second.steps()] == losses
    ours, theirs = whole.merge().state_dict(), second.merge().state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_scales_by_hand():
    """diag(a) W diag(b) of a matrix, a g of a norm's gains; all else is frozen, and nothing is left of them."""
    model = compressed().float()
    layer, ids = model.model.layers[0], windows()
    norm, W = layer.input_layernorm.weight.clone(), layer.self_attn.q_proj.weight.clone()
    training = Training(model, None, ids, PLAN, Scales())
    linear, gains = layer.self_attn.q_proj, layer.input_layernorm
    a, b = linear.parametrizations.weight[0].factors
    (c,) = gains.parametrizations.weight[0].factors
    with torch.no_grad():
        a[3], b[2], c[1] = 2.0, 3.0, 5.0
    scaled = [p for name, p in compressed().named_parameters() if "layers" in name or p.ndim == 1]
    assert sum(p.numel() for p in training.trained.values()) == sum(sum(p.shape) for p in scaled)
    merged = training.merge()
    assert linear.weight[3, 2] == pytest.approx(6 * float(W[3, 2]))
    assert linear.weight[3, 5] == pytest.approx(2 * float(W[3, 5]))
    assert linear.weight[0, 2] == pytest.approx(3 * float(W[0, 2]))
    assert gains.weight[1] == 5 * norm[1]
    assert merged.state_dict().keys() == compressed().state_dict().keys()


def test_a_basis_of_several_modules_is_left_as_it_is():
    model, basis = tiny.llama(), torch.nn.Parameter(torch.randn(5, 32))
    for layer in model.model.layers:
        weight = layer.self_attn.q_proj.weight.detach()[:, :5]
        layer.self_attn.q_proj = filled(FactorLinear, {"weight": weight, "basis": basis})
    names = matrices(model)
    assert {f"model.layers.{i}.self_attn.q_proj.weight" for i in (0, 1)} < set(names)
    assert not [name for name in names if name.endswith("basis") or "layers" not in name]


HEALED = {
    "objective": "distillation", "n_windows": 12, "window_length": 32, "epochs": 4,
    "batch_windows": 2, "learning_rate": 1.0e-2, "rank": 4, "alpha": 8, "threads": 1,
}  # fmt: skip


@pytest.fixture(scope="module")
def healed(project):
    """The project with a healed variant, reproduced and committed; and the stages that ran for it."""
    document = yaml.safe_load((project / "params.yaml").read_text())
    document["variants"]["kfac-80-healed"] = document["variants"]["kfac-80"] | {"healing": HEALED}
    (project / "params.yaml").write_text(yaml.safe_dump(document, sort_keys=False))
    printed = run(project, sys.executable, "-m", "dvc", "repro").stdout
    run(project, "git", "add", ".")
    run(project, "git", "commit", "-q", "-m", "A healed variant")
    return project, [line.split("'")[1] for line in printed.splitlines() if line.startswith("Running stage")]


@pytest.mark.pipeline
def test_a_healed_variant_has_the_same_size_and_is_audited_like_the_rest(healed):
    root, ran = healed
    steps = ("allocation", "compression", "evaluation", "release")
    assert sorted(ran) == sorted([*(f"{step}@kfac-80-healed" for step in steps), "report"])
    before, after = (read_json(root / f"results/{name}.json") for name in ("kfac-80", "kfac-80-healed"))
    assert after["parameters"] == before["parameters"]
    assert after["bytes"] == pytest.approx(before["bytes"], abs=200)  # the header of the file may be padded otherwise
    assert after["token_perplexity/news"] != before["token_perplexity/news"]
    curve = read_json(root / "data/models/kfac-80-healed" / CURVE)
    assert [row["step"] for row in curve] == list(range(1, 25))
    assert all(set(row) == {"step", "loss", "learning_rate"} for row in curve)
    found = audit(root / "data/models/kfac-80-healed", root)
    assert {link.name: link.detail for link in found.links if link.finding == "does not hold"} == {}
    assert "compression@kfac-80-healed" in found.chain["stages"]
    assert found.chain["parameters"]["healing"]["objective"] == "distillation"
    assert "data/sampling/calibration_text.safetensors" in {row["name"] for row in found.chain["materials"]}
    assert "trained afterwards" in (root / "data/models/kfac-80-healed/README.md").read_text()


@pytest.mark.pipeline
def test_weights_that_were_healed_from_others_are_found_out(healed, tmp_path):
    root, _ = healed
    folder = shutil.copytree(root / "data/models/kfac-80-healed", tmp_path / "model")
    config = read_json(folder / "config.json")
    config["quantization_config"]["provenance"]["healed_from_sha256"] = "0" * 64
    write_json(folder / "config.json", config)
    statement = read_json(folder / STATEMENT)
    digests = {f.name: file_sha256(f) for f in folder.iterdir() if f.name not in (STATEMENT, CHECKSUMS)}
    statement["subject"] = [{"name": name, "digest": {"sha256": d}} for name, d in sorted(digests.items())]
    write_json(folder / STATEMENT, statement)
    write_text(folder / CHECKSUMS, checksums(digests | {STATEMENT: file_sha256(folder / STATEMENT)}))
    broken = {link.name: link.detail for link in audit(folder, None).links if link.finding == "does not hold"}
    assert "weights of config.json that were healed" in broken["allocation"]


@pytest.mark.pipeline
def test_mlflow_has_the_loss_curve(healed, tmp_path, monkeypatch):
    import mlflow

    root, _ = healed
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.chdir(tmp_path)
    assert "kfac-80-healed" in track(root).created
    (run_,) = mlflow.search_runs(
        experiment_names=["drank"], filter_string="attributes.run_name = 'kfac-80-healed'", output_format="list"
    )
    client = mlflow.MlflowClient()
    curve = client.get_metric_history(run_.info.run_id, "healing/loss")
    rows = read_json(root / "data/compression/kfac-80-healed" / CURVE)
    assert sorted((m.step, m.value) for m in curve) == [(row["step"], row["loss"]) for row in rows]
    assert run_.data.params["healing.objective"] == "distillation"


class Killed(BaseException):
    """Comes instead of SIGKILL, which tests.faults sends."""


@pytest.mark.pipeline
def test_a_killed_stage_goes_on_and_ends_with_the_same_bytes(healed, monkeypatch):
    root, _ = healed
    folder = root / "data/compression/kfac-80-healed"
    weights, curve = ((folder / name).read_bytes() for name in ("model.safetensors", CURVE))
    checkpoint, write = root / "data/compression/.kfac-80-healed.checkpoint", Checkpoint.write

    def killed(self, curve, state):
        write(self, curve, state)
        raise Killed

    monkeypatch.setattr(Checkpoint, "write", killed)
    with pytest.raises(Killed):
        compression.main("kfac-80-healed", root)
    monkeypatch.setattr(Checkpoint, "write", write)
    assert int(load_file(checkpoint / "state.safetensors")["n_taken"]) == 10
    assert (folder / "model.safetensors").read_bytes() == weights  # the folder is untouched
    shutil.rmtree(folder)
    compression.main("kfac-80-healed", root)
    assert (folder / "model.safetensors").read_bytes() == weights
    assert (folder / CURVE).read_bytes() == curve
    assert not checkpoint.exists()


def test_a_model_of_which_nothing_was_compressed_is_refused_before_it_is_trained(tmp_path):
    """Such as a variant at size_ratio 1.0, or one whose ranks on offer all cost more than its matrices."""
    text, asked = {"tokens": torch.arange(300)}, HealingSection(**HEALED | {"n_windows": 2, "window_length": 16})
    with pytest.raises(HealingError, match="no matrix was compressed"):
        heal(lambda *_: tiny.llama(), text, asked, "float32", SHA256, partial(Checkpoint, tmp_path), progress)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"window_length": 301}, "healing.window_length = 301, and the calibration text has 300 tokens: lower it"),
        ({"learning_rate": 1e30}, r"the loss of step \d+ is (nan|inf): lower healing.learning_rate = 1e\+30"),
    ],
)
def test_a_text_too_short_and_a_loss_that_is_no_number_are_told_by_their_parameter(tmp_path, change, message):
    """And nothing is written: a result without a finite loss would be no result."""
    text = {"tokens": torch.arange(300)}
    asked = HealingSection(**HEALED | {"n_windows": 2, "window_length": 16, "objective": "text"} | change)
    folder, kept = write(tiny.llama(), LLAMA, tmp_path / "model"), partial(Checkpoint, tmp_path / "checkpoint")
    with pytest.raises(HealingError, match=message):
        heal(lambda *_: AutoModelForCausalLM.from_pretrained(folder), text, asked, "float32", SHA256, kept, progress)


def test_the_dense_model_is_not_healed(tmp_path):
    document = yaml.safe_load(tiny.PARAMS)
    document["variants"]["better"] = document["variants"]["dense"] | {"healing": HEALED}
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(document))
    told = "variants.better: preset = 'dense'; the rule: A variant of allocation `dense` is not healed"
    with pytest.raises(ParamsError, match=told):
        read_params(tmp_path / "params.yaml")
