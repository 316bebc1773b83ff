"""Watching activations and gradients: nothing is left behind, batching does not matter, gradients are autograd's."""

import pytest
import torch
import torch.nn.functional as F

from drank.model.capture import (
    run_backward,
    run_windows,
    split_windows,
    watching_inputs,
    watching_output_gradients,
)
from tests import tiny


def test_watched_inputs_do_not_depend_on_the_batching_and_hooks_are_gone_afterwards():
    model = tiny.llama()
    windows = torch.randint(0, 300, (5, 16))
    modules = {"down": model.model.layers[0].mlp.down_proj}
    seen = []
    for batch in (1, 2, 5):
        parts = []
        with watching_inputs(modules, lambda _, x, parts=parts: parts.append(x)):
            assert sum(run_windows(model, windows, batch)) == 5
        seen.append(torch.cat(parts))
        assert not modules["down"]._forward_pre_hooks
    assert seen[0].shape == (80, 64)
    torch.testing.assert_close(seen[1], seen[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(seen[2], seen[0], rtol=1e-5, atol=1e-6)


def test_hooks_are_gone_after_an_error_and_those_of_others_stay():
    model = tiny.llama()
    module = model.model.layers[0].mlp.down_proj
    module.register_forward_pre_hook(lambda *_: None)
    with pytest.raises(RuntimeError, match="stop"), watching_inputs({"x": module}, lambda *_: None):
        raise RuntimeError("stop")
    assert len(module._forward_pre_hooks) == 1


@pytest.mark.parametrize("batch_windows", [1, 2, 3])
def test_output_gradients_give_the_weight_gradient_of_the_summed_loss(batch_windows):
    model = tiny.llama()
    windows = torch.randint(0, 300, (3, 12))
    module = model.model.layers[1].mlp.up_proj
    module.weight.requires_grad_(True)
    loss = F.cross_entropy(model(windows).logits[:, :-1].flatten(0, 1), windows[:, 1:].flatten(), reduction="sum")
    (expected,) = torch.autograd.grad(loss, module.weight)
    inputs, gradients = [], []
    with (
        watching_inputs({"up": module}, lambda _, x: inputs.append(x)),
        watching_output_gradients({"up": module}, lambda _, g: gradients.append(g)),
    ):
        assert sum(run_backward(model, windows, batch_windows, "empirical")) == 3
    assert not module._forward_hooks
    torch.testing.assert_close(torch.cat(gradients).T @ torch.cat(inputs), expected, rtol=1e-4, atol=1e-5)


def test_gaussian_gradients_at_the_logits_have_the_covariance_of_the_fisher_matrix():
    model = tiny.llama(vocab_size=7, tie_word_embeddings=False)
    windows = torch.randint(0, 7, (1, 3)).repeat(4000, 1)
    head, logits, drawn = model.lm_head, [], []
    head.register_forward_hook(lambda _m, _a, output: logits.append(output.detach()[0]))
    with watching_output_gradients({"head": head}, lambda _, g: drawn.append(g)):
        list(run_backward(model, windows, 1000, "gaussian"))
    rows = torch.cat(drawn).unflatten(0, (4000, 3))
    assert torch.all(rows[:, 2] == 0), "the last token of a window has no next one"
    p = logits[0][0].softmax(-1)
    torch.testing.assert_close(rows[:, 0].sum(-1), torch.zeros(4000), atol=1e-5, rtol=0)
    torch.testing.assert_close(rows[:, 0].T @ rows[:, 0] / 4000, torch.diag(p) - torch.outer(p, p), atol=0.015, rtol=0)


def test_sampled_labels_follow_the_models_own_prediction_and_their_seed():
    model = tiny.llama()
    windows = torch.randint(0, 300, (2, 12))
    module = model.model.layers[0].self_attn.q_proj

    def gradients(seed):
        parts = []
        with watching_output_gradients({"q": module}, lambda _, g: parts.append(g)):
            list(run_backward(model, windows, 1, "sampled", seed))
        return torch.cat(parts)

    assert torch.equal(gradients(0), gradients(0))
    assert not torch.equal(gradients(0), gradients(1))


@pytest.mark.parametrize("fisher", ["gaussian", "sampled"])
def test_draws_depend_neither_on_the_batching_nor_on_who_has_the_window(fisher):
    model, windows = tiny.llama(), torch.randint(0, 300, (1, 6)).repeat(5, 1)  # one text, draws of their own

    def gradients(batch_windows, part=slice(None)):
        parts = []
        with watching_output_gradients({"head": model.lm_head}, lambda _, g: parts.append(g)):
            list(run_backward(model, windows, batch_windows, fisher, 7, part))
        return torch.cat(parts).unflatten(0, (-1, 6))

    whole = gradients(5)
    assert not torch.equal(whole[0], whole[1])
    for batch_windows in (1, 2):
        torch.testing.assert_close(gradients(batch_windows), whole, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(gradients(2, slice(1, None, 2)), whole[2:4], rtol=1e-3, atol=1e-5)


def test_shares_of_the_batches_are_all_windows_once():
    windows = torch.arange(14).unflatten(0, (7, 2))
    assert [(batch.first, len(batch.ids)) for batch in split_windows(windows, 2)] == [(0, 2), (2, 2), (4, 2), (6, 1)]
    shares = [split_windows(windows, 2, slice(rank, None, 3)) for rank in range(3)]
    assert [[batch.first for batch in share] for share in shares] == [[0, 6], [2], [4]]
    for batch in split_windows(windows, 3):
        assert torch.equal(batch.ids, windows[batch.first : batch.first + 3])


@pytest.mark.parametrize("read", ["ids", "embeddings"])
def test_the_graph_begins_behind_the_embeddings_whatever_the_model_does_with_ids_and_embeddings(read):
    model = tiny.llama()
    ids = torch.randint(0, 300, (1, 12))
    forward = model.model.forward

    def peculiar(input_ids, **options):
        if read == "ids":  # as with hash routing, or with further embeddings in each layer
            return forward(input_ids=input_ids.clone(), **options)
        embedded = model.model.embed_tokens(input_ids)
        embedded *= 2
        return forward(**options | {"inputs_embeds": embedded})

    model.model.forward = peculiar
    seen = []
    with watching_output_gradients({"up": model.model.layers[0].mlp.up_proj}, lambda _, g: seen.append(g)):
        assert sum(run_backward(model, ids, 1, "empirical")) == 1
    assert seen[0].any()
    assert not model.model.embed_tokens._forward_hooks
    assert all(parameter.grad is None for parameter in model.parameters())


def test_an_output_that_has_no_gradient_shows_none():
    model = tiny.llama()
    mlp = model.model.layers[1].mlp
    mlp.forward = lambda x: x + mlp.up_proj(x.detach()).argmax()
    seen = []
    with watching_output_gradients(
        {"up": mlp.up_proj, "q": model.model.layers[0].self_attn.q_proj}, lambda n, _: seen.append(n)
    ):
        assert sum(run_backward(model, torch.randint(0, 300, (1, 12)), 1, "empirical")) == 1
    assert seen == ["q"]
