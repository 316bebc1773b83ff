"""How differently two models predict the same text. Knows tensors and modules; files belong to the caller."""

import torch
from jaxtyping import Int
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
    total = 0.0
    for window in windows:
        log_p, log_q = (m(window[None]).logits.float().log_softmax(-1) for m in (model, other))
        total += float((log_p.exp() * (log_p - log_q)).sum(dtype=torch.float64))
    return total / windows.numel()
