r"""Rotation of the residual stream: the same function by weights that lie on no grid.

RMSNorm without gains, :math:`n(h) = h \sqrt{d} / \|h\|`, commutes with every orthogonal Q (d, d):
:math:`n(Q^\top h) = Q^\top n(h)`. A gain g moves into the linears behind its norm, W diag(g); then

=====================  =========================
embedding (tokens, d)  E Q
reads the stream       W diag(g) Q, the head too
writes to the stream   Qᵀ W, and Qᵀ b of its bias
=====================  =========================

gives the same logits (SliceGPT, arXiv:2401.15024, theorem 1; QuaRot, arXiv:2404.00456). Q is random: a weight that was
dequantised is afterwards a sum of many numbers of many grids.

A tied head has no room for the last gain: E diag(g) Q is another matrix than E Q, and a second one costs tokens x d
numbers. So where the head is tied, the gain stays and Q mixes only channels of equal gain: diag(g) Q = Q diag(g), and
the head stays tied. Gains that were trained in bfloat16 have few values, which makes groups of tens of channels.
"""

import logging
from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

log = logging.getLogger(__name__)

TOLERANCE = 1e-3  # of the logits' standard deviation; thirty layers in float32 differ by 1e-5
LEAST_MIXED = 0.5  # share of the channels that a tied model has to rotate
TOKENS = 64


class RotationError(ValueError):
    """The model's residual stream cannot be rotated without changing its function."""


@torch.no_grad()
def rotate(model: Any, seed: int, untie_head: bool = False) -> None:
    """Rotate a float32 causal language model in place by the orthogonal matrix of a seed.

    Products are computed in float64 and stored in float32. A forward pass shows which linears read the stream, namely
    those behind a norm of its width; other linears of as many outputs write to it. Whatever else touches the stream
    (norms on what is written, means subtracted, experts stored as one tensor) shows in the logits of random tokens.

    Args:
        untie_head: a tied head becomes a matrix of its own first, so that all channels are mixed.

    Raises:
        RotationError: the logits change, a norm is no RMSNorm, or the head is tied and few gains are equal.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if untie_head:
        head.weight = nn.Parameter(head.weight.clone())
        model.config.tie_word_embeddings = False
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(len(embedding.weight), (1, TOKENS), generator=generator)
    before, readers = _logits_and_readers(model, ids)
    tied = getattr(head, "weight", None) is embedding.weight
    last = next((norm for norm, linears in readers.items() if head in linears), None)
    if last is None:
        raise RotationError(_refused(model, "no norm is directly before the output head"))
    Q = _orthogonal(_alike(model, _gain(model, last)) if tied else [torch.arange(embedding.weight.shape[1])], generator)
    _rotate_columns(embedding, Q)
    for norm, linears in readers.items():
        gain = _gain(model, norm)
        for linear in linears:
            if not (tied and linear is head):
                _rotate_columns(linear, gain[:, None] * Q)
        if not (tied and norm is last):
            norm.weight.fill_(1.0 - _offset(model, norm))
    reading = {linear for linears in readers.values() for linear in linears}
    for linear in model.modules():
        if isinstance(linear, nn.Linear) and linear.out_features == len(Q) and linear not in reading:
            linear.weight.copy_(Q.T @ linear.weight.double())
            if linear.bias is not None:
                linear.bias.copy_(Q.T @ linear.bias.double())
    after, _ = _logits_and_readers(model, ids)
    changed = float((after - before).abs().max() / before.std())
    if not changed <= TOLERANCE:  # NaN, too
        raise RotationError(
            _refused(model, f"logits change by {changed:.2g} of their standard deviation, at most {TOLERANCE} is noise")
        )
    log.info("residual stream rotated by seed %d: logits change by %.1e of their standard deviation", seed, changed)


def _refused(model: nn.Module, why: str) -> str:
    return (
        f"model.rotation_seed: the residual stream of {type(model).__name__} cannot be rotated without changing its "
        f"function: {why}. It can be where RMSNorms with gains, directly before the linears that read the stream, are "
        f"all the norms on it (Llama, Mistral, Qwen 2, Qwen 3, Phi-3); leave the key out"
    )


def _logits_and_readers(model: Any, ids: Int[Tensor, "1 tokens"]) -> tuple[Tensor, dict[Any, list[nn.Linear]]]:
    """Logits of the tokens, and the linears that read what each norm returns."""
    width = model.get_input_embeddings().weight.shape[1]
    outputs: dict[int, tuple[nn.Module, Tensor]] = {}  # of norms, by their address: the head reads a view
    readers: dict[Any, list[nn.Linear]] = {}

    def seen(module: nn.Module, arguments: tuple[Any, ...], result: Any) -> None:
        if isinstance(module, nn.Linear):
            if found := outputs.get(arguments[0].data_ptr()):
                readers.setdefault(found[0], []).append(module)
        elif isinstance(result, Tensor):  # it is kept, so that no later one has its address
            outputs[result.data_ptr()] = module, result

    handles = [module.register_forward_hook(seen) for module in _probed(model, width)]
    try:
        return model(input_ids=ids, use_cache=False).logits.clone(), readers
    finally:
        for handle in handles:
            handle.remove()


def _probed(model: nn.Module, width: int) -> Iterator[nn.Module]:
    """Linears, and modules with nothing but a gain of the stream's width, or a gain and a bias."""
    for module in model.modules():
        shapes = [tuple(parameter.shape) for parameter in module.parameters(recurse=False)]
        if isinstance(module, nn.Linear) or shapes in ([(width,)], [(width,)] * 2):
            yield module


def _gain(model: nn.Module, norm: Any) -> Float[Tensor, " d"]:
    return norm.weight.double() + _offset(model, norm)


def _offset(model: nn.Module, norm: Any) -> float:
    """The number that the norm adds to its weight to have its gain: 0, or 1 as in Gemma.

    A vector of ones, whose root mean square is 1, comes out as the gain.
    """
    weight = norm.weight
    found = norm(torch.ones_like(weight))
    for offset in (0.0, 1.0):
        if torch.allclose(found, weight + offset, rtol=1e-2, atol=1e-4):
            return offset
    raise RotationError(_refused(model, f"{type(norm).__name__} is no RMSNorm with a gain per channel"))


def _alike(model: nn.Module, gain: Float[Tensor, " d"]) -> list[Tensor]:
    """Channels by their gain."""
    groups = [(gain == value).nonzero()[:, 0] for value in gain.unique()]
    mixed = sum(len(group) for group in groups if len(group) > 1)
    if mixed < LEAST_MIXED * len(gain):
        why = (
            f"the head is tied to the embedding, and only {mixed} channels of {len(gain)} share their gain in the last "
            f"norm with another"
        )
        raise RotationError(_refused(model, why))
    log.info("the head is tied: %d channels of %d are mixed, with those of equal gain alone", mixed, len(gain))
    return groups


def _orthogonal(groups: list[Tensor], generator: torch.Generator) -> Float[Tensor, "d d"]:
    """A random orthogonal matrix that mixes no channels of different groups; uniform (Haar) within each."""
    width = sum(map(len, groups))
    Q = torch.zeros(width, width, dtype=torch.float64)
    for group in groups:
        normal = torch.randn(len(group), len(group), dtype=torch.float64, generator=generator)
        basis, triangle = torch.linalg.qr(normal)
        Q[group[:, None], group] = basis * triangle.diagonal().sign()  # without the signs it would not be uniform
    return Q


def _rotate_columns(module: Any, Q: Float[Tensor, "d d"]) -> None:
    module.weight.copy_(module.weight.double() @ Q)
