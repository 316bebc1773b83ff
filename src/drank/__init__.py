"""drank: truncated SVD of a language model's linear layers, with a rank chosen for every layer.

The method on one page (docs/method.md derives it; the letters are the code's names):

    y = W x                 W (out, in): a targeted linear layer
    H = E[x xᵀ]             input covariance over calibration tokens               covariance.py
    G = E[g gᵀ]             output-gradient covariance (G = I where not used)
    Z = G^½ W H^½ = U S Vᵀ  dropping singular values costs the sum of their squares  spectrum.py
    R = exp(-Σ p log p)     effective rank, p = S² / ΣS²                             spectrum.py
    min Σ_u f_u(k_u)        ranks k_u within a parameter budget                      allocation.py
    W_k = A_k B_k           the rank-k slice of cached factors                       compression.py

``import drank`` imports nothing heavy. It asks to be called when transformers' loader is first imported, and then
registers the format, so that plain ``from_pretrained`` loads a compressed folder; and when peft is, for LoRA on it.
"""

from importlib import import_module
from typing import Any

from wrapt import register_post_import_hook

__version__ = "0.1.0"

# Imported, not called by name: where the plug-in is what imports transformers, it is half-way through here.
register_post_import_hook(lambda _: import_module("drank.model.quantizer"), "transformers.quantizers.auto")
register_post_import_hook(lambda _: import_module("drank.model.adapters"), "peft")


def as_linears(model: Any) -> Any:
    """Show the inner products of every compressed layer as ``nn.Linear``, in place, for quantisers and adapters of
    others; a basis of several layers is shown once, and outputs stay the same bit by bit (drank.model.shown)."""
    return import_module("drank.model.shown").as_linears(model)


def as_compressed(model: Any) -> Any:
    """Turn what :func:`as_linears` shows back into compressed layers, in place, so that ``save_pretrained`` works."""
    return import_module("drank.model.shown").as_compressed(model)
