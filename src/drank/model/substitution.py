"""How much worse does a model get when one of its linears is truncated? ASVD's measurement (arXiv:2312.05821).

Each linear is taken by itself: its rank-k product stands in for the weight, the model is scored, and the weight is put
back bit for bit. Knows a loaded model and a way to read vectors; nothing of files or allocations.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from drank.method.spectrum import factors
from drank.model.linears import Linear
from drank.model.perplexity import NotFiniteLossError


@torch.no_grad()
def measure_sensitivity(
    model: nn.Module,
    linears: Sequence[Linear],
    read_vectors: Callable[[str, int], Mapping[str, Tensor]],
    score: Callable[[], float],
    ratios: Sequence[float],
    menu_rank: Callable[[str, float], int | None],
    progress: Callable[[Iterable[Linear]], Iterable[Linear]] = iter,
) -> dict[str, dict[float, float]]:
    r"""The model's score with one linear truncated, by the linear's name and by ratio.

    .. math:: W_k = \mathrm{left}_k \, \mathrm{right}_k, \qquad k = \mathrm{menu\_rank}(\mathrm{name}, \mathrm{ratio})

    The product is formed in float32 and rounded to the weight's dtype. The cost is len(linears) * len(ratios) scores.

    Args:
        read_vectors: (name, k) -> the first k rows of what a :class:`drank.method.spectrum.Spectrum` has of the linear,
            ``vectors`` and ``duals``, the latter only where they differ.
        score: reads a few windows with the model as it is then: its perplexity, or how far its predictions have moved.
        ratios: shares of a linear's parameters that are kept.
        menu_rank: (name, ratio) -> rank; None where no rank is offered, and the pair is left out.
        progress: wraps the linears (tqdm).

    Raises:
        NotFiniteLossError: a truncated model breaks numerically; the message names linear, ratio and window.
    """
    scores: dict[str, dict[float, float]] = {}
    for linear in progress(linears):
        ranks = {ratio: rank for ratio in ratios if (rank := menu_rank(linear.name, ratio)) is not None}
        scores[linear.name] = {}
        weight = linear.weight.detach()
        own = weight.clone()
        try:
            for ratio, rank in ranks.items():
                vectors = {key: rows.to(own.device) for key, rows in read_vectors(linear.name, rank).items()}
                left, right = factors(own, **vectors)
                weight.copy_(left @ right)
                scores[linear.name][ratio] = score()
        except NotFiniteLossError as error:
            raise NotFiniteLossError(f"{linear.name} at ratio {ratio} (rank {rank}): {error}") from error
        finally:
            weight.copy_(own)
    return scores
