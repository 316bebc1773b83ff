"""Token ids that a model has no embedding for, found before torch fails on them. Knows tensors and modules only."""

from typing import Any

from torch import Tensor


class TokenError(ValueError):
    """Token ids outside a model's vocabulary; the message has the first of them and where they came from."""


def check_ids(model: Any, ids: Tensor, where: str) -> None:
    """Refuse token ids for which the model has no embedding; ``where`` names the file they are from.

    Raises:
        TokenError: an id is negative, or not below the number of embeddings.
    """
    n = len(model.get_input_embeddings().weight)
    outside = ids[(ids < 0) | (ids >= n)]
    if len(outside):
        raise TokenError(
            f"{where}: holds token id {int(outside[0])}, and the model has embeddings for 0 to {n - 1}: the file is "
            f"damaged, or the tokenizer is another model's; run sampling again"
        )
