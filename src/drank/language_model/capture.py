"""Run token windows through a model and hand what enters, or what comes back to, chosen modules to a callback.

Knows nothing of covariances: what is done with activations and gradients is the callback's business.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

Callback = Callable[[str, Tensor], None]


@contextmanager
def watching_inputs(modules: Mapping[str, nn.Module], callback: Callback) -> Iterator[None]:
    """Inside the block, every forward pass calls callback(name, x) with x (tokens, in), the module's flattened input.

    Hooks of others are left alone, ours are gone afterwards, whatever happened inside.
    """

    def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        return lambda _module, args: callback(name, args[0].detach().flatten(0, -2))

    with _removed_afterwards([m.register_forward_pre_hook(hook(name)) for name, m in modules.items()]):
        yield


@contextmanager
def watching_output_gradients(modules: Mapping[str, nn.Module], callback: Callback) -> Iterator[None]:
    """Inside the block, every backward pass calls callback(name, g), g (tokens, out) the gradient of the output."""

    def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...], Tensor], None]:
        def on_gradient(gradient: Tensor) -> None:
            callback(name, gradient.detach().flatten(0, -2))

        def on_forward(_module: nn.Module, _args: tuple[Any, ...], output: Tensor) -> None:
            output.register_hook(on_gradient)

        return on_forward

    with _removed_afterwards([m.register_forward_hook(hook(name)) for name, m in modules.items()]):
        yield


@contextmanager
def _removed_afterwards(handles: list[RemovableHandle]) -> Iterator[None]:
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.inference_mode()
def run_windows(model: nn.Module, windows: Tensor, batch_windows: int) -> Iterator[int]:
    """Forward passes over windows (n, length) in batches; yields how many windows each batch had.

    Only the decoder runs: the output head of a small model costs as much as its layers, and nothing here needs logits.
    """
    decoder_of: Any = getattr(model, "get_decoder", None)
    decoder = decoder_of() if decoder_of else model
    for batch in windows.split(batch_windows):
        decoder(input_ids=batch, use_cache=False)
        yield len(batch)


def run_backward(model: nn.Module, windows: Tensor, batch_windows: int, fisher: str, seed: int = 0) -> Iterator[int]:
    r"""Forward and backward passes of the summed token loss through activations alone; yields each batch's size.

    Gradients flow from the embeddings' output on; no weight needs one, which saves a third of the backward pass.

    Args:
        fisher: what flows back from the logits of a token with prediction p. "empirical": the gradient p - e_y of the
            loss of the text's own next token y. "sampled": the same with y drawn from p. "gaussian":
            :math:`\sqrt p \circ ε - p (\sqrt p \cdot ε)` with standard normal ε. The last two have the covariance
            diag(p) - p pᵀ of the Fisher matrix; the gaussian one has light tails.
        seed: of the draws.
    """
    generator = torch.Generator().manual_seed(seed)
    embeddings: Any = getattr(model, "get_input_embeddings")()  # noqa: B009  mypy takes an attribute for a submodule
    model.requires_grad_(False)
    for batch in windows.split(batch_windows):
        inputs = embeddings(batch).detach().requires_grad_(True)
        logits = model(inputs_embeds=inputs, use_cache=False).logits[:, :-1].float().flatten(0, 1)
        if fisher == "gaussian":
            logits.backward(_gaussian(logits.detach(), generator))
        else:
            labels = batch[:, 1:].flatten() if fisher == "empirical" else _draw(logits, generator)
            F.cross_entropy(logits, labels, reduction="sum").backward()
        yield len(batch)


def _gaussian(logits: Tensor, generator: torch.Generator) -> Tensor:
    """A draw of mean zero and covariance diag(p) - p pᵀ for every row."""
    noise = torch.randn(logits.shape, generator=generator)
    p = logits.softmax(-1)
    noise.mul_(p.sqrt())
    return noise.addcmul_(p, noise.sum(-1, keepdim=True), value=-1)


def _draw(logits: Tensor, generator: torch.Generator) -> Tensor:
    """One label a row by the Gumbel trick, whose memory is that of the logits."""
    with torch.no_grad():
        uniform = torch.rand(logits.shape, generator=generator).clamp_min(torch.finfo(torch.float32).tiny)
        return (logits - uniform.log().neg().log()).argmax(-1)
