"""Run token windows through a model and hand what enters, or what comes back to, chosen modules to a callback.

Knows nothing of covariances: what is done with activations and gradients is the callback's business.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

Callback = Callable[[str, Tensor], None]


@contextmanager
def watching_inputs(modules: Mapping[str, nn.Module], callback: Callback) -> Iterator[None]:
    """Inside the block, every forward pass calls callback(name, x) with x (tokens, in), the module's flattened input.

    Hooks of others are left alone, ours are gone afterwards, whatever happened inside.
    """

    def on_input(name: str, _module: nn.Module, args: tuple[Any, ...]) -> None:
        callback(name, args[0].detach().flatten(0, -2))

    with ExitStack() as hooks:
        for name, module in modules.items():
            hooks.enter_context(module.register_forward_pre_hook(partial(on_input, name)))
        yield


@contextmanager
def watching_output_gradients(modules: Mapping[str, nn.Module], callback: Callback) -> Iterator[None]:
    """Inside the block, every backward pass calls callback(name, g), g (tokens, out) the gradient of the output."""

    def on_output(name: str, _module: nn.Module, _args: tuple[Any, ...], output: Tensor) -> None:
        if output.requires_grad:  # a router's output may need none; callers check that every linear got one
            output.register_hook(lambda gradient: callback(name, gradient.detach().flatten(0, -2)))

    with ExitStack() as hooks:
        for name, module in modules.items():
            hooks.enter_context(module.register_forward_hook(partial(on_output, name)))
        yield


class Batch(NamedTuple):
    """Token windows that pass together: ids (n, length), the first of which is window number ``first`` of all.

    ``backward`` tells whether gradients flow back from them too, where gradients are asked for.
    """

    first: int
    ids: Tensor
    backward: bool = True


def split_windows(
    windows: Tensor, batch_windows: int, part: slice = slice(None), n_backward: int | None = None
) -> list[Batch]:
    """Windows (n, length) in batches, the first ``n_backward`` of them (all, where None) with a backward pass.

    ``part`` takes some batches: ``slice(rank, None, n_ranks)`` is the share of a process.
    """
    n_backward = len(windows) if n_backward is None else n_backward
    batches, first = [], 0
    for some, backward in ((windows[:n_backward], True), (windows[n_backward:], False)):
        for ids in some.split(batch_windows) if len(some) else ():
            batches.append(Batch(first, ids, backward))
            first += len(ids)
    return batches[part]


def run_batches(model: nn.Module, batches: Iterable[Batch], fisher: str = "none", seed: int = 0) -> Iterator[int]:
    """Passes of all batches; yields how many windows each has.

    Forwards only the decoder runs: the output head of a small model costs as much as its layers, and nothing needs
    logits. Backwards goes the summed token loss, through activations alone: gradients flow from the embeddings' output
    on, and no weight needs one, which saves a third of the pass.

    Args:
        fisher, seed: those of :func:`send_back`; "none" asks for no gradient.
    """
    model.requires_grad_(False)
    for batch in batches:
        if batch.backward and fisher != "none":
            send_back(run_from_embeddings(model, batch.ids).logits, batch, fisher, seed)
        else:
            with torch.inference_mode():
                run_decoder(model, batch.ids)
        yield len(batch.ids)


def run_decoder(model: nn.Module, ids: Tensor) -> Any:
    """A forward pass without the output head."""
    decoder_of: Any = getattr(model, "get_decoder", None)
    return (decoder_of() if decoder_of else model)(input_ids=ids, use_cache=False)


def run_from_embeddings(model: nn.Module, ids: Tensor) -> Any:
    """A forward pass whose graph begins behind the embeddings; the model's output, which has logits."""
    embeddings: Any = getattr(model, "get_input_embeddings")()  # noqa: B009  mypy takes an attribute for a submodule

    def begin_graph(_module: nn.Module, _args: tuple[Any, ...], output: Tensor) -> Tensor:
        return output.detach().requires_grad_(True).clone()  # some models scale it in place, which a leaf forbids

    # Not by inputs_embeds: some models look at the ids too.
    with embeddings.register_forward_hook(begin_graph):
        return model(input_ids=ids, use_cache=False)


def send_back(logits: Tensor, batch: Batch, fisher: str, seed: int = 0) -> None:
    r"""Backward pass from logits (n, length, vocabulary), all but those of each window's last token.

    Args:
        fisher: what flows back from the logits of a token with prediction p. "empirical": the gradient p - e_y of the
            loss of the text's own next token y. "sampled": the same with y drawn from p. "gaussian":
            :math:`\sqrt p \circ ε - p (\sqrt p \cdot ε)` with standard normal ε. The last two have the covariance
            diag(p) - p pᵀ of the Fisher matrix; the gaussian one has light tails.
        seed: of the draws. Each window has its own generator, from the seed and its number, so draws depend neither
            on the batching nor on which process has the window.
    """
    logits = logits.float()
    gradient = logits.detach().softmax(-1)
    for index, window in enumerate(gradient):
        p = window[:-1]
        stream = np.random.SeedSequence((seed, batch.first + index))  # hashed, so neighbours are unrelated
        generator = torch.Generator(p.device).manual_seed(int(stream.generate_state(1)[0]))
        if fisher == "gaussian":
            noise = torch.randn(p.shape, generator=generator, device=p.device).mul_(p.sqrt())
            p.mul_(-noise.sum(-1, keepdim=True)).add_(noise)
        else:
            scores = logits[index, :-1].detach()
            labels = batch.ids[index, 1:].to(p.device) if fisher == "empirical" else _draw(scores, generator)
            p.scatter_add_(-1, labels[:, None], p.new_full((len(p), 1), -1.0))
    gradient[:, -1] = 0  # nothing to cut off, whose backward would copy the logits
    logits.backward(gradient)


def _draw(logits: Tensor, generator: torch.Generator) -> Tensor:
    """One label per row by the Gumbel trick, whose memory is that of the logits."""
    uniform = torch.rand(logits.shape, generator=generator, device=logits.device)
    return (logits - uniform.clamp_min(torch.finfo(torch.float32).tiny).log().neg().log()).argmax(-1)
