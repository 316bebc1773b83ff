"""How differently two models predict the same text. Knows tensors and modules; files belong to the caller."""

import torch
import torch.nn.functional as F
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


def divergence(expected: Float[Tensor, "tokens vocabulary"], found: Float[Tensor, "tokens vocabulary"]) -> Tensor:
    r"""Mean over tokens of :math:`\sum_v p_v (\log p_v - \log q_v)` in nats; logits of p are expected, of q found."""
    p, q = expected.float().log_softmax(-1), found.float().log_softmax(-1)
    return F.kl_div(q, p, log_target=True, reduction="sum") / len(found)
