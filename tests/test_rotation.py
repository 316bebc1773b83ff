"""Rotation of the residual stream: function kept, grid gone, tied heads stay tied, refused where it is not exact."""

import pytest
import torch
from stages import raw
from transformers import AutoModelForCausalLM

from drank.model.linears import find_linears
from drank.model.rotation import RotationError, _orthogonal, rotate
from tests import tiny

IDS = torch.arange(60)[None] * 5


def ready(model, gains=(0.5, 1.0, 1.5, -2.0)):
    """The model with weights on a grid of 16 values per block of 32 inputs, and gains of few values."""
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1 and "norm" in name:
            parameter.data = torch.tensor(gains)[torch.randint(len(gains), parameter.shape)]
        elif parameter.ndim == 1:
            parameter.data = torch.randn_like(parameter)
    for linear in find_linears(model, ["re:.*"]):
        blocks = 4 * linear.weight.detach().reshape(len(linear.weight), -1, 32)
        step = (blocks.amax(-1, True) - blocks.amin(-1, True)) / 15
        linear.weight.data = ((blocks / step).round() * step).view(linear.weight.shape)
    return model


def distinct(model):
    """Fewest and most distinct numbers in a row's block of 32 inputs, in bfloat16, where a few coincide."""
    blocks = [x.weight.detach().bfloat16().reshape(-1, 32) for x in find_linears(model, ["re:.*"])]
    counts = [len(block.unique()) for matrix in blocks for block in matrix]
    return min(counts), max(counts)


@torch.no_grad()
def logits(model):
    return model(IDS).logits


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_the_function_stays_the_grid_goes_and_where_the_head_is_tied_only_equal_gains_are_mixed(tied):
    model = ready(tiny.llama(tie_word_embeddings=tied))
    gains, embedded = model.model.norm.weight.detach().clone(), model.model.embed_tokens.weight.detach().double()
    before, names = logits(model), [name for name, _ in model.named_parameters()]
    assert distinct(model)[1] <= 17  # zero is a 17th where rounding makes two ends of 15 steps
    rotate(model, 0)
    assert distinct(model)[0] >= 25
    torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-4)
    assert before.std() > 0.1
    assert [name for name, _ in model.named_parameters()] == names
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    Q = torch.linalg.lstsq(embedded, model.model.embed_tokens.weight.detach().double()).solution
    torch.testing.assert_close(Q.T @ Q, torch.eye(32, dtype=torch.float64), rtol=0, atol=1e-5)
    mixed = Q.abs() > 1e-5
    assert torch.equal(mixed, gains[:, None] == gains) if tied else mixed.all()
    assert torch.equal(model.model.norm.weight, gains if tied else torch.ones(32))


def test_a_channel_alone_keeps_its_place_and_others_are_turned_within_theirs():
    Q = _orthogonal([torch.tensor([1]), torch.tensor([0, 2])], torch.Generator().manual_seed(0))
    assert Q[1].abs().tolist() == [0, 1, 0]
    (a, _, b), _, (c, _, d) = Q.tolist()
    assert (abs(a), abs(b)) == (pytest.approx(abs(d)), pytest.approx(abs(c)))
    assert a * a + b * b == pytest.approx(1)
    assert a * c + b * d == pytest.approx(0)


def test_a_head_that_is_untied_is_rotated_with_all_channels_and_saved(tmp_path):
    model = ready(tiny.llama())
    before = logits(model)
    rotate(model, 0, untie_head=True)
    torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-4)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.lm_head.weight is not again.model.embed_tokens.weight
    torch.testing.assert_close(logits(again), before, rtol=1e-4, atol=1e-4)
    assert torch.equal(again.model.norm.weight, torch.ones(32))


def test_a_seed_decides_the_bytes():
    models = [ready(tiny.llama()) for _ in range(3)]
    for model, seed in zip(models, (0, 0, 1), strict=True):
        rotate(model, seed)
    first, again, other = (model.model.embed_tokens.weight for model in models)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("architecture", ["qwen2", "qwen3", "phi3", "gemma"])
def test_biases_norms_of_heads_fused_matrices_and_gains_plus_one_are_no_obstacle(architecture):
    model = ready(tiny.decoder(architecture))
    before = logits(model)
    rotate(model, 0)
    torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-4 * float(before.std()))
    assert distinct(model)[0] >= 25


@pytest.mark.parametrize(
    ("architecture", "message"),
    [
        ("gpt2", "LayerNorm is no RMSNorm with a gain per channel"),
        ("cohere", "CohereLayerNorm is no RMSNorm"),
        ("gemma2", "logits change by .* of their standard deviation"),  # norms on what is written to the stream
        ("mixtral", "logits change"),  # experts in one tensor
    ],
)
def test_what_cannot_be_rotated_is_refused(architecture, message):
    with pytest.raises(RotationError, match=rf"model.rotation_seed: the residual stream of .* {message}"):
        rotate(ready(tiny.decoder(architecture)), 0)


def test_a_tied_head_behind_gains_that_all_differ_is_refused():
    with pytest.raises(RotationError, match="tied to the embedding, and only 2 channels of 32 share their gain"):
        rotate(ready(tiny.llama(), gains=[1.0, *(torch.arange(400) / 100 + 1).tolist()]), 0)


def test_raw_rotates_what_params_yaml_asks_for_and_nothing_else(tmp_path):
    tiny.project(tmp_path, ready(tiny.llama()))
    folder, params = tmp_path / "data/raw/model", tmp_path / "params.yaml"
    raw.main(tmp_path)
    plain, files = AutoModelForCausalLM.from_pretrained(folder), [path.name for path in folder.iterdir()]
    params.write_text(params.read_text().replace("local:source/model\n", "local:source/model\n  rotation_seed: 0\n", 1))
    raw.main(tmp_path)
    rotated = AutoModelForCausalLM.from_pretrained(folder)
    assert sorted(path.name for path in folder.iterdir()) == sorted(files)
    assert rotated.lm_head.weight is rotated.model.embed_tokens.weight
    assert distinct(plain)[1] <= 17 < 25 <= distinct(rotated)[0]
    assert float((logits(rotated) - logits(plain)).square().mean().sqrt() / logits(plain).std()) < 0.02  # bfloat16
