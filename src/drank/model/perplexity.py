"""Token perplexity as the literature defines it, of a loaded model, which is left as it was."""

import math
from collections.abc import Callable, Iterable, Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Int64
from torch import Tensor, nn


class NotFiniteLossError(ValueError):
    """The loss is NaN or infinite: the model is numerically broken. No mean over the rest is reported."""


def window_nats(
    model: nn.Module,
    windows: Int64[Tensor, "n_windows window_length"],
    batch_windows: int,
    progress: Callable[[Iterable[Tensor]], Iterable[Tensor]] = iter,
) -> list[float]:
    r"""Nats of all tokens of each window w but its first, :math:`-\sum_{t \ge 2} \log p(x_{w,t} \mid x_{w,<t})`.

    No window sees another. Logits are taken to float32 before the log-softmax, and nats are summed in float32 within a
    window. ``progress`` wraps the batches (tqdm).

    Raises:
        NotFiniteLossError: a window's loss is not finite; the message names the first such window.
    """
    nats: list[float] = []
    device = next(model.parameters()).device
    with torch.inference_mode():
        for batch in progress(windows.split(batch_windows)):
            logits = model(batch.to(device), use_cache=False).logits
            # One window at a time: in float32, a batch of logits over a large vocabulary takes gigabytes.
            for window, scores in zip(batch, logits, strict=True):
                targets = window[1:].to(scores.device)
                nats.append(F.cross_entropy(scores[:-1].float(), targets, reduction="sum").item())
                if not math.isfinite(nats[-1]):
                    raise NotFiniteLossError(
                        f"window {len(nats) - 1}: the loss is {nats[-1]}; the model's weights or activations overflow "
                        f"or are NaN. Load it in a wider dtype, or look at how it was compressed"
                    )
    return nats


def perplexity(nats: Sequence[float], window_length: int, last_length: int | None = None) -> float:
    r"""Token perplexity from the nats of each window, summed in float64.

    .. math:: \mathrm{PPL} = \exp\Bigl(\frac1N \sum_w \mathrm{nats}_w\Bigr), \qquad
        N = n_\mathrm{windows} (\mathrm{window\_length} - 1)

    The size of the vocabulary for a model that gives every token the same probability. With ``last_length``, 2 or more,
    the last window is shorter than the others and counts as much as any: the mean over tokens becomes a mean over
    windows of means over their tokens. So the released code of Basis Sharing and D-Rank has it; SVD-LLM's and GPTQ's
    leave that window out.

    Raises:
        NotFiniteLossError: beyond float64.
    """
    full = nats if last_length is None else nats[:-1]
    mean = sum(full) / (len(nats) * (window_length - 1))
    if last_length is not None:
        mean += nats[-1] / (len(nats) * (last_length - 1))
    try:
        return math.exp(mean)
    except OverflowError:
        raise NotFiniteLossError(f"{mean:g} nats per token: the perplexity is beyond float64") from None
