"""The passes of ``capture`` with one decoder block at a time: outputs of a block wait in a store until they are used.

A block sees what the model itself gives it. The model's own forward runs for every batch and block; blocks before that
one stand aside, and the pass ends behind it. So masks, positions and whatever else the model makes are its own, and
nothing here knows an architecture. Weights of blocks come and go with ``device_map`` (:func:`disk_map`).
"""

import re
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from drank.model.capture import Batch, run_batches, run_decoder, run_from_embeddings, send_back
from drank.model.linears import Linear, find_linears
from drank.model.precision import agreed_dtype, load_model


class OffloadError(ValueError):
    """The model cannot be run a block at a time; the message says why."""


Store = MutableMapping[str, Mapping[str, Tensor]]  # out of the way: a folder of files, or a dict


class Sweep(NamedTuple):
    """Passes over batches, in which modules below ``prefix`` run once with each."""

    prefix: str
    inputs: bool  # True if their inputs are to be taken in this sweep
    gradients: bool  # True if their output gradients are
    n_windows: int
    passes: Iterator[int]  # yields each batch's number of windows


def find_blocks(model: nn.Module, linears: Sequence[Linear]) -> str:
    """Name of the list of decoder blocks: where all the linears are.

    Raises:
        OffloadError: they are in several places, or in no list.
    """
    names = sorted({re.split(r"\.\d+(?:\.|$)", linear.name)[0] for linear in linears})
    if len(names) > 1 or not isinstance(model.get_submodule(names[0]), nn.ModuleList):
        raise OffloadError(
            f"linears to compress are in {', '.join(names)}, but offloading runs one list of decoder blocks: list what "
            f"is outside it under covariance.ignore, or set covariance.offload: false"
        )
    return names[0]


def disk_map(model: nn.Module, blocks: str, device: str = "cpu") -> dict[str, str]:
    """``device_map`` for ``from_pretrained``: blocks stay on disk, everything else is loaded."""
    n_blocks = len(list(model.get_submodule(blocks).children()))
    placed = {f"{blocks}.{i}": "disk" for i in range(n_blocks)}
    path = blocks.split(".")
    for depth, inside in enumerate(path):
        siblings = [name for name, _ in model.get_submodule(".".join(path[:depth])).named_children() if name != inside]
        placed |= {".".join([*path[:depth], name]): device for name in siblings}
    return placed


def load_for_sweeps(
    folder: Path,
    asked: str,
    device: str,
    gather: Callable[[str], list[str]],
    targets: Sequence[str],
    ignore: Sequence[str],
    weights: Path | None,
) -> Any:
    """The model of a folder on the device, in ``precision.agreed_dtype``.

    Args:
        weights: a folder on the disk for the decoder blocks; None keeps them on the device, too.

    Raises:
        OffloadError: see :func:`find_blocks`.
    """
    dtype = agreed_dtype(asked, device, gather)
    if weights is None:
        return load_model(folder, dtype, device)
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    places = disk_map(skeleton, find_blocks(skeleton, find_linears(skeleton, targets, ignore)), device)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, device_map=places, offload_folder=weights).eval()


def sweeps(
    model: nn.Module,
    linears: Sequence[Linear],
    batches: Sequence[Batch],
    fisher: str,
    seed: int,
    store: Store | None,
) -> list[Sweep]:
    """All passes in one sweep or, with a store, one per block forwards and, unless fisher is "none", one for the head
    and one per block backwards.

    Exhaust a sweep's ``passes`` before the next sweep's. With a store every input and gradient is what
    :func:`drank.model.capture.run_batches` shows, to the bit on the same machine. Forwards, it holds the outputs of one
    block; with gradients, of all of them: blocks * tokens * hidden size * bytes of the dtype.

    Raises:
        OffloadError: a block hands on more than hidden states; see also :func:`find_blocks`.
    """
    n_all = sum(len(batch.ids) for batch in batches)
    if store is None:
        return [Sweep("", True, fisher != "none", n_all, run_batches(model, batches, fisher, seed))]
    model.requires_grad_(False)
    blocks, returning = find_blocks(model, linears), [batch for batch in batches if batch.backward]
    stack = _Stack(model, blocks, differentiable=fisher != "none")
    n_blocks = len(stack.blocks)

    def forward(i: int) -> Iterator[int]:
        for batch in batches:
            before = f"{i - 1}-{batch.first}"
            with torch.no_grad():
                hidden = stack.run(i, batch, store[before]["states"].to(batch.ids.device) if i else None)
            store[f"{i}-{batch.first}"] = {"states": hidden}
            if i and (fisher == "none" or not batch.backward):
                del store[before]
            yield len(batch.ids)

    def backward(i: int) -> Iterator[int]:
        for batch in returning:
            before, gradient = f"{i - 1}-{batch.first}", f"gradient-{batch.first}"
            entering = store[before]["states"].to(batch.ids.device).requires_grad_(True) if i else None
            with torch.enable_grad():
                output = stack.run(i, batch, entering)
            if i == n_blocks:
                send_back(output, batch, fisher, seed)
            else:
                output.backward(store[gradient]["states"].to(output.device))
            if entering is not None:
                assert entering.grad is not None
                store[gradient] = {"states": entering.grad}
                del store[before]
            yield len(batch.ids)

    found = [Sweep(f"{blocks}.{i}.", True, False, n_all, forward(i)) for i in range(n_blocks)]
    if fisher != "none":
        n_back = sum(len(batch.ids) for batch in returning)
        found.append(Sweep("head", False, False, n_back, backward(n_blocks)))
        found += [Sweep(f"{blocks}.{i}.", False, True, n_back, backward(i)) for i in reversed(range(n_blocks))]
    return found


class _Done(Exception):  # noqa: N818  no error: the pass has reached what it was run for
    def __init__(self, output: Tensor) -> None:
        self.output = output


class _Stack:
    """A model whose blocks run one at a time."""

    def __init__(self, model: nn.Module, blocks: str, differentiable: bool) -> None:
        self.model, self.name = model, blocks
        self.run_model = run_from_embeddings if differentiable else run_decoder
        self.blocks = list(model.get_submodule(blocks).children())
        self.others: dict[int, list[Any]] = {}  # what blocks that return a tuple return beside the hidden states

    def run(self, i: int, batch: Batch, entering: Tensor | None) -> Tensor:
        """Output of block i, or of the head behind the last, where the block before put out ``entering``."""
        with ExitStack() as changes:
            for j in range(i):
                assert entering is not None
                # A model that uses earlier hidden states, or what comes with them, meets NaN and is refused.
                hidden = entering if j == i - 1 else _nan_like(entering)
                told = (hidden, *self.others[j]) if j in self.others else hidden
                changes.enter_context(_forward(self.blocks[j], lambda *_args, _told=told, **_kwargs: _told))
            if i < len(self.blocks):
                changes.enter_context(_forward(self.blocks[i], self._last(i, entering)))
            try:
                output = self.run_model(self.model, batch.ids)
            except _Done as done:
                return done.output
        if i < len(self.blocks):
            raise OffloadError(f"{self.name}.{i} did not run: offloading needs a model that runs its blocks in order")
        self._refuse_leaks(i, entering, [output.logits])
        return output.logits

    def _last(self, i: int, entering: Tensor | None) -> Any:
        forward = self.blocks[i].forward

        def run(*args: Any, **kwargs: Any) -> None:
            self._refuse_leaks(i, entering, [*args, *kwargs.values()])
            output = forward(*args, **kwargs)
            hidden = output
            if isinstance(output, tuple):
                hidden, *others = output
                self.others[i] = [_nan_like(other) if isinstance(other, Tensor) else None for other in others]
            raise _Done(hidden)

        return run

    def _refuse_leaks(self, i: int, entering: Tensor | None, values: Sequence[Any]) -> None:
        leaked = any(bool(tensor.isnan().any()) for tensor in _tensors(values))
        if leaked and entering is not None and not bool(entering.isnan().any()):
            where = f"{self.name}.{i} takes" if i < len(self.blocks) else "the output head takes"
            raise OffloadError(
                f"{where} in NaN, though the block before put out none: either it reads what earlier blocks put out, "
                f"which offloading has not kept, or the model overflows there; set covariance.offload: false to see"
            )


@contextmanager
def _forward(block: nn.Module, forward: Any) -> Iterator[None]:
    own = vars(block).get("forward")  # accelerate's, if any
    block.forward = forward
    try:
        yield
    finally:
        del block.forward
        if own is not None:
            block.forward = own


def _nan_like(tensor: Tensor) -> Tensor:
    """One number in memory, whatever the shape."""
    return tensor.new_full((), torch.nan).expand(tensor.shape)


def _tensors(values: Sequence[Any]) -> Iterator[Tensor]:
    """Floating-point tensors, in nested tuples and lists too."""
    for value in values:
        if isinstance(value, Tensor) and value.is_floating_point():
            yield value
        elif isinstance(value, tuple | list):
            yield from _tensors(value)
