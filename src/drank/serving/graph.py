"""A decoder with its cache as inputs and outputs, as the graphs of other runtimes have it.

Factors stay factors: :func:`graph_model` puts every compressed layer into operations that any graph has. Integers of
few bits are multiplied out, matrix by matrix, which undoes the rounding's saving and nothing else.
"""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from drank.model.layers import (
    LowRankLinear,
    PivotLinear,
    RoundedEmbedding,
    RoundedHead,
    RoundedLinear,
    SharedPivotLinear,
)
from drank.model.shown import linear

ATTENTION = "drank_graph"  # a name among transformers' ways to compute attention


class GraphError(ValueError):
    """A model that has no graph of this kind; the message says why and what to do."""


class Steps(nn.Module):
    r"""A compressed layer for a graph: y = [h; C h] in the order of outputs + b, with h = K x.

    It computes what its :class:`LowRankLinear` computes. K and C are plain linears, `inner` and `outer`.
    """

    order: Tensor | None

    def __init__(self, layer: LowRankLinear, inner: nn.Linear, outer: nn.Linear) -> None:
        super().__init__()
        self.inner, self.outer, self.bias = inner, outer, layer.bias
        self.kept: slice | None = None
        if isinstance(layer, PivotLinear):
            self.kept = slice(layer.rank)
        elif isinstance(layer, SharedPivotLinear):
            self.kept = slice(layer.first, layer.first + layer.kept)
        self.register_buffer("order", None if layer.places is None else layer.places.long())

    def forward(self, x: Tensor) -> Tensor:
        h = self.inner(x)
        y = self.outer(h)
        if self.kept is not None:
            y = torch.cat([h[..., self.kept], y], -1)
        if self.order is not None:
            # As in layers.py; ONNX Runtime's Gather with one index for all tokens takes four times as long.
            y = y.gather(-1, self.order.expand_as(y))
        return y if self.bias is None else y + self.bias


class CachedDecoder(nn.Module):
    """Logits of the last position, and the cache, of token ids and the cache so far.

    Logits of other positions are left out: a runtime that continues a text reads none of them, and a head of 49,152
    tokens would take a fifth of the time of a prompt.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, past: list[tuple[Tensor, Tensor]]
    ) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """(batch, 1, tokens) and (batch, heads, past + n, width) per layer, of n ids each; the mask has past + n."""
        from transformers import DynamicCache

        cache = DynamicCache()
        for layer, (keys, values) in enumerate(past):
            cache.update(keys, values, layer)
        found = self.model(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, past_key_values=cache,
            use_cache=True, logits_to_keep=1,
        )  # fmt: skip
        return found.logits, [(layer.keys, layer.values) for layer in cache.layers]


def load(folder: Path, bits: int = 32) -> Any:
    """The model of a folder, ready for :func:`graph_model`, in floating-point numbers of this many bits.

    Raises:
        GraphError: bits that no runtime on a CPU computes in.
    """
    from transformers import AutoModelForCausalLM

    dtypes = {32: torch.float32, 16: torch.float16}
    if bits not in dtypes:
        raise GraphError(f"bits is {bits}; a graph has floating-point numbers of 32 or 16 bits")
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtypes[bits], local_files_only=True, trust_remote_code=False, use_safetensors=True
    ).eval()


def graph_model(model: Any) -> Any:
    """The model with layers and attention that a graph has, in place. A shared matrix stays one Parameter."""
    made: dict[int, nn.Parameter] = {}
    for name, module in list(model.named_modules()):
        if isinstance(module, RoundedEmbedding):
            model.set_submodule(name, nn.Embedding.from_pretrained(_matrix(module, made)))
        elif isinstance(module, RoundedHead | RoundedLinear):
            model.set_submodule(name, linear(_matrix(module, made), module.bias))
        elif isinstance(module, LowRankLinear):
            factors = (module.spanning or "", module.combining or "")  # a form of two matrices names both
            inner, outer = (linear(_matrix(module, made, key)) for key in factors)
            model.set_submodule(name, Steps(module, inner, outer))
    _register_attention()
    if model.config._attn_implementation != "eager":  # what can be replaced is not eager where it was loaded
        model.set_attn_implementation(ATTENTION)
    return model.eval()


def example(model: Any) -> tuple[Any, ...]:
    """Arguments of a :class:`CachedDecoder` of this model: two texts, three tokens each behind five.

    Raises:
        GraphError: a layer whose memory is no pair of keys and values.
    """
    from transformers import DynamicCache

    cache = DynamicCache()
    ids = torch.ones(2, 5, dtype=torch.long)
    with torch.no_grad():
        try:
            model(input_ids=ids, past_key_values=cache, use_cache=True)
            past = [(layer.keys, layer.values) for layer in cache.layers]
        except GraphError:
            raise
        except (AttributeError, TypeError, ValueError) as error:
            raise GraphError(f"{type(model).__name__}: no cache of keys and values alone: {error}") from None
    n_layers = model.config.get_text_config().num_hidden_layers
    if len(past) != n_layers:
        raise GraphError(
            f"{type(model).__name__}: {len(past)} of its {n_layers} layers have keys and values, which a graph needs "
            "of all; `drank export --dense` writes a plain folder for other programs"
        )
    return ids[:, :3], torch.ones(2, 8, dtype=torch.long), torch.arange(5, 8).expand(2, 3).contiguous(), past


def _matrix(module: Any, made: dict[int, nn.Parameter], key: str = "weight") -> nn.Parameter:
    """A matrix of the module, made of its integers if it has any; one Parameter for one stored tensor."""
    holder, _, own = key.rpartition(".")
    stored = getattr(module.get_submodule(holder), own)
    if id(stored) not in made:
        matrix = module.matrix(key) if isinstance(module, LowRankLinear) else module.dense_weight()
        made[id(stored)] = nn.Parameter(matrix.detach(), requires_grad=False)
    return made[id(stored)]


def _register_attention() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(ATTENTION, _attention)
    AttentionMaskInterface.register(ATTENTION, _mask)


def _mask(*arguments: Any, **keys: Any) -> Tensor | None:
    """A mask always, True where a token is seen; transformers leaves it out where a kernel of torch's knows it."""
    from transformers.masking_utils import sdpa_mask

    return sdpa_mask(*arguments, **keys | {"allow_is_causal_skip": False})


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    scaling: float | None = None,
    **more: Any,
) -> tuple[Tensor, None]:
    """Attention in which heads of queries that share keys and values are further rows of one head.

    Keys and values need not be repeated then, and every runtime takes that, where OpenVINO wants as many heads of the
    one as of the other.
    """
    special = [name for name in ("softcap", "s_aux", "position_bias") if more.get(name) is not None]
    if special:
        raise GraphError(f"{type(module).__name__}: its attention has {special[0]}, which no graph here computes")
    n_batch, n_heads, n, width = query.shape
    shared = n_heads // key.shape[1]
    rows = query.reshape(n_batch, key.shape[1], shared * n, width)
    mask = attention_mask.repeat(1, 1, shared, 1) if shared > 1 else attention_mask
    y = F.scaled_dot_product_attention(rows, key, value, attn_mask=mask, scale=scaling)
    return y.reshape(n_batch, n_heads, n, -1).transpose(1, 2).contiguous(), None
