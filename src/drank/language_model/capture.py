"""Run token windows through a model and hand the input of chosen modules to a callback.

Knows nothing of covariances: what is done with the activations is the callback's business.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


@contextmanager
def watching_inputs(modules: Mapping[str, nn.Module], callback: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Inside the block, every forward pass calls callback(name, x) with x (tokens, in), the module's flattened input.

    Hooks of others are left alone, ours are gone afterwards, whatever happened inside.
    """

    def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        return lambda _module, args: callback(name, args[0].detach().flatten(0, -2))

    handles = [module.register_forward_pre_hook(hook(name)) for name, module in modules.items()]
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
