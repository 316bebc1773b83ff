"""Windows that a model has no embeddings for, found before torch fails on them. Knows tensors, modules and configs."""

from typing import Any

from torch import Tensor


class TokenError(ValueError):
    """Token ids outside a model's vocabulary, or windows longer than it has positions; the message says which."""


def check_windows(model: Any, windows: Tensor, where: str, key: str = "sampling.window_length") -> None:
    """Refuse windows (n, length) of token ids for which the model has no embeddings.

    Args:
        model: the model, or its config before it is loaded.
        where: the file that the windows are from.
        key: the parameter that says how long they are.

    Raises:
        TokenError: an id is negative, or not below the number of embeddings; or a window has more tokens than the model
            has learned positions. Rotary positions and ALiBi go on where training ended.
    """
    config, length = getattr(model, "config", model), windows.shape[-1]
    text, most = config.get_text_config(), n_positions(config)
    n: int | None = getattr(text, "vocab_size", None)  # the number of embeddings, after resize_token_embeddings too
    learned = not any(key.startswith(("rope", "rotary", "alibi")) for key in vars(text))
    if learned and most is not None and length > most:
        raise TokenError(
            f"{key} is {length}, but the model has {most} positions (config.json): set {key} to at most {most}"
        )
    outside = windows[(windows < 0) | (windows >= n)] if n is not None else windows[windows < 0]
    if len(outside):
        known = "ids are never negative" if n is None else f"the model has embeddings for 0 to {n - 1}"
        raise TokenError(
            f"{where}: holds token id {int(outside[0])}, and {known}: the tokenizer has tokens that the model lacks "
            f"(resize_token_embeddings adds them), or is another model's, or the file is damaged; run sampling again"
        )


def n_positions(config: Any) -> int | None:
    """Tokens that a window may have; None where the config sets no limit."""
    text = config.get_text_config()
    found = (getattr(text, name, None) for name in ("max_position_embeddings", "n_positions", "max_seq_len"))
    return next((n for n in found if isinstance(n, int) and n > 0), None)
