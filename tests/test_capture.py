"""Watching activations and gradients: nothing is left behind, batching does not matter, gradients are autograd's."""

import pytest
import torch
import torch.nn.functional as F

from drank.model.capture import run_batches, split_windows, watching_inputs, watching_output_gradients
from tests import tiny


def windows(n, length, seed=0):
    return torch.randint(0, 300, (n, length), generator=torch.Generator().manual_seed(seed))


def gradients(model, module, ids, fisher, batch_windows=1, seed=0, part=slice(None)):
    """Output gradients of a module (tokens, out), of all windows."""
    rows, batches, others = [], split_windows(ids, batch_windows, part), list(module._forward_hooks)
    with watching_output_gradients({"it": module}, lambda _, g: rows.append(g)):
        assert sum(run_batches(model, batches, fisher, seed)) == sum(len(batch.ids) for batch in batches)
    assert list(module._forward_hooks) == others
    return torch.cat(rows)


def test_watched_inputs_do_not_depend_on_the_batching_and_hooks_are_gone_afterwards_with_those_of_others_kept():
    model, ids, seen = tiny.llama(), windows(5, 16), []
    module = model.model.layers[0].mlp.down_proj
    module.register_forward_pre_hook(lambda *_: None)
    for batch in (1, 5):
        parts = []
        with watching_inputs({"down": module}, lambda _, x, parts=parts: parts.append(x)):
            assert sum(run_batches(model, split_windows(ids, batch))) == 5
        seen.append(torch.cat(parts))
    with pytest.raises(RuntimeError, match="stop"), watching_inputs({"x": module}, lambda *_: None):
        raise RuntimeError("stop")
    assert len(module._forward_pre_hooks) == 1
    assert seen[0].shape == (80, 64)
    torch.testing.assert_close(seen[1], seen[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("batch_windows", [1, 2])
def test_output_gradients_give_the_weight_gradient_of_the_summed_loss(batch_windows):
    model, ids, inputs = tiny.llama(), windows(3, 12), []
    module = model.model.layers[1].mlp.up_proj
    module.weight.requires_grad_(True)
    loss = F.cross_entropy(model(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")
    (expected,) = torch.autograd.grad(loss, module.weight)
    with watching_inputs({"up": module}, lambda _, x: inputs.append(x)):
        found = gradients(model, module, ids, "empirical", batch_windows)
    torch.testing.assert_close(found.T @ torch.cat(inputs), expected, rtol=1e-4, atol=1e-5)


def test_gaussian_gradients_at_the_logits_have_the_covariance_of_the_fisher_matrix():
    model, logits = tiny.llama(vocab_size=7, tie_word_embeddings=False), []
    model.lm_head.register_forward_hook(lambda _m, _a, output: logits.append(output.detach()[0]))
    ids = torch.randint(0, 7, (1, 3)).repeat(4000, 1)
    rows = gradients(model, model.lm_head, ids, "gaussian", 1000).unflatten(0, (4000, 3))
    assert torch.all(rows[:, 2] == 0), "the last token of a window has no next one"
    p = logits[0][0].softmax(-1)
    torch.testing.assert_close(rows[:, 0].sum(-1), torch.zeros(4000), atol=1e-5, rtol=0)
    torch.testing.assert_close(rows[:, 0].T @ rows[:, 0] / 4000, torch.diag(p) - torch.outer(p, p), atol=0.015, rtol=0)


@pytest.mark.parametrize("fisher", ["gaussian", "sampled"])
def test_draws_depend_on_the_seed_and_neither_on_the_batching_nor_on_who_has_the_window(fisher):
    model, ids = tiny.llama(), windows(1, 6).repeat(5, 1)  # one text, draws of its own for each window

    def drawn(batch_windows, seed=7, part=slice(None)):
        return gradients(model, model.lm_head, ids, fisher, batch_windows, seed, part).unflatten(0, (-1, 6))

    whole = drawn(5)
    assert torch.equal(whole, drawn(5))
    assert not torch.equal(whole, drawn(5, seed=8))
    assert not torch.equal(whole[0], whole[1])
    for batch_windows in (1, 2):
        torch.testing.assert_close(drawn(batch_windows), whole, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(drawn(2, part=slice(1, None, 2)), whole[2:4], rtol=1e-3, atol=1e-5)


def test_shares_of_the_batches_are_all_windows_once():
    ids = torch.arange(14).unflatten(0, (7, 2))
    assert [(batch.first, len(batch.ids)) for batch in split_windows(ids, 2)] == [(0, 2), (2, 2), (4, 2), (6, 1)]
    shares = [split_windows(ids, 2, slice(rank, None, 3)) for rank in range(3)]
    assert [[batch.first for batch in share] for share in shares] == [[0, 6], [2], [4]]
    assert all(torch.equal(batch.ids, ids[batch.first : batch.first + 3]) for batch in split_windows(ids, 3))


@pytest.mark.parametrize("read", ["ids", "embeddings"])
def test_the_graph_begins_behind_the_embeddings_whatever_the_model_does_with_ids_and_embeddings(read):
    model = tiny.llama()
    forward = model.model.forward

    def peculiar(input_ids, **options):
        if read == "ids":  # as with hash routing, or with further embeddings in each layer
            return forward(input_ids=input_ids.clone(), **options)
        embedded = model.model.embed_tokens(input_ids)
        embedded *= 2
        return forward(**options | {"inputs_embeds": embedded})

    model.model.forward = peculiar
    assert gradients(model, model.model.layers[0].mlp.up_proj, windows(1, 12), "empirical").any()
    assert not model.model.embed_tokens._forward_hooks
    assert all(parameter.grad is None for parameter in model.parameters())


def test_an_output_that_has_no_gradient_shows_none():
    model, seen = tiny.llama(), []
    mlp, q = model.model.layers[1].mlp, model.model.layers[0].self_attn.q_proj
    mlp.forward = lambda x: x + mlp.up_proj(x.detach()).argmax()
    with watching_output_gradients({"up": mlp.up_proj, "q": q}, lambda name, _: seen.append(name)):
        assert sum(run_batches(model, split_windows(windows(1, 12), 1), "empirical")) == 1
    assert seen == ["q"]
