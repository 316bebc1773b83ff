"""How differently two models predict the same text. Knows tensors and modules; files belong to the caller."""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn


@torch.no_grad()
def token_divergence(model: nn.Module, other: nn.Module, windows: Int[Tensor, "windows tokens"]) -> float:
    r"""Mean Kullback-Leibler divergence of next-token distributions, in nats per token.

    .. math:: \frac{1}{T} \sum_t \sum_v p_t(v) \log \frac{p_t(v)}{q_t(v)}

    Args:
        model: gives p; both give logits over the same vocabulary, in any dtype.
        other: gives q.
        windows: token ids; every position of every window counts, T of them in all.
    """
    total = sum(float(divergence(model(ids[None]).logits[0], other(ids[None]).logits[0])) for ids in windows)
    return total / len(windows)


@torch.inference_mode()
def divergence_from(model: nn.Module, windows: Int[Tensor, "windows tokens"]) -> Callable[[nn.Module], float]:
    """:func:`token_divergence` of any model, this one when it has changed too, from this one's predictions of now.

    Logits of now are held: tokens * vocabulary numbers in the model's dtype.
    """
    expected = [model(ids[None]).logits[0] for ids in windows]

    @torch.inference_mode()
    def of(other: nn.Module) -> float:
        pairs = zip(expected, windows, strict=True)
        return sum(float(divergence(p, other(ids[None]).logits[0])) for p, ids in pairs) / len(windows)

    return of


def divergence(expected: Float[Tensor, "tokens vocabulary"], found: Float[Tensor, "tokens vocabulary"]) -> Tensor:
    r"""Mean over tokens of :math:`\sum_v p_v (\log p_v - \log q_v)` in nats; logits of p are expected, of q found.

    Its gradient, (q - p) / tokens, goes to ``found`` alone, in the dtype of those logits.
    """
    return _Divergence.apply(expected, found)


class _Divergence(torch.autograd.Function):
    """The gradient is made with the loss, so that nothing of a vocabulary's width waits in float32."""

    @staticmethod
    def forward(ctx: Any, expected: Tensor, found: Tensor) -> Tensor:
        log_p, log_q = expected.float().log_softmax(-1), found.float().log_softmax(-1)
        p = log_p.exp()
        loss = (p * log_p.sub_(log_q)).sum() / len(found)
        if ctx.needs_input_grad[1]:
            ctx.save_for_backward(log_q.exp_().sub_(p).div_(len(found)).to(found.dtype))
        return loss

    @staticmethod
    def backward(ctx: Any, *of_loss: Tensor) -> tuple[None, Tensor]:
        (gradient,) = ctx.saved_tensors
        return None, gradient * of_loss[0]
