"""Token perplexity as the literature defines it, of a loaded model, which is left as it was."""

import math
from collections.abc import Callable, Iterable, Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Int64
from torch import Tensor, nn


class NotFiniteLossError(ValueError):
    """The loss is NaN or infinite: the model is numerically broken. No mean over the rest is reported."""


def token_perplexity(
    model: nn.Module,
    windows: Int64[Tensor, "n_windows window_length"],
    batch_windows: int,
    progress: Callable[[Iterable[Tensor]], Iterable[Tensor]] = iter,
    last: Int64[Tensor, "last_length"] | None = None,
) -> tuple[float, list[float]]:
    r"""Token perplexity, and the nats of each window behind it.

    .. math:: \mathrm{PPL} = \exp\Bigl(-\frac1N \sum_w \sum_{t \ge 2} \log p(x_{w,t} \mid x_{w,<t})\Bigr),
        \qquad N = n_\mathrm{windows} (\mathrm{window\_length} - 1)

    The size of the vocabulary for a model that gives every token the same probability. No window sees another.
    Logits are taken to float32 before the log-softmax; nats are summed in float32 within a window and in
    float64 across windows. ``progress`` wraps the batches (tqdm).

    A ``last`` window, shorter than the others and of 2 tokens or more, counts as much as any: the mean over tokens
    becomes a mean over windows of means over their tokens, and the last of the nats are its own. So the released code
    of Basis Sharing and D-Rank has it; SVD-LLM's and GPTQ's leave that window out.

    Raises:
        NotFiniteLossError: a window's loss is not finite; the message names the first such window.
    """
    nats = window_nats(model, windows, batch_windows, progress)
    if last is not None:
        nats += window_nats(model, last[None], 1)
    return perplexity(nats, windows.shape[1], None if last is None else len(last)), nats


def window_nats(
    model: nn.Module,
    windows: Int64[Tensor, "n_windows window_length"],
    batch_windows: int,
    progress: Callable[[Iterable[Tensor]], Iterable[Tensor]] = iter,
) -> list[float]:
    """Nats of all tokens of each window but its first; see :func:`token_perplexity`.

    Raises:
        NotFiniteLossError: a window's loss is not finite; the message names the first such window.
    """
    nats: list[float] = []
    with torch.inference_mode():
        for batch in progress(windows.split(batch_windows)):
            logits = model(batch.to(_device(model)), use_cache=False).logits
            # One window at a time: in float32, a batch of logits over a large vocabulary takes gigabytes.
            for window, scores in zip(batch, logits, strict=True):
                nats.append(_window_nats(scores, window, len(nats)))
    return nats


def perplexity(nats: Sequence[float], window_length: int, last_length: int | None = None) -> float:
    """Token perplexity from the nats of each window; with ``last_length``, the last of them are of a shorter window.

    Raises:
        NotFiniteLossError: beyond float64.
    """
    full = nats if last_length is None else nats[:-1]
    mean = sum(full) / (len(nats) * (window_length - 1))
    if last_length is not None:
        mean += nats[-1] / (len(nats) * (last_length - 1))
    return _exp(mean)


def _window_nats(scores: Tensor, window: Tensor, index: int) -> float:
    targets = window[1:].to(scores.device)
    nats = F.cross_entropy(scores[:-1].float(), targets, reduction="sum").item()
    if not math.isfinite(nats):
        raise NotFiniteLossError(
            f"window {index}: the loss is {nats}; the model's weights or activations overflow or are NaN. "
            f"Load it in a wider dtype, or look at how it was compressed"
        )
    return nats


def _exp(nats_per_token: float) -> float:
    try:
        return math.exp(nats_per_token)
    except OverflowError:
        raise NotFiniteLossError(f"{nats_per_token:g} nats per token: the perplexity is beyond float64") from None


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device
