"""MLflow as a projection of dvc.lock: one run per variant, all of them under one run per state of the lock.

``track`` reads what ``dvc repro`` left and runs nothing, so a variant that DVC restored from its cache is there like
one that was computed. The same state makes nothing the second time, and runs that a killed call left unfinished are
made anew. This package is the only one that imports mlflow.

* Metrics are the figures of results/<variant>.json under the same names, encoded where MLflow refuses them (``names``).
  Left out are standard errors, word perplexities, which follow from the bits per byte, and parameters. ``bytes`` are
  those of all weights on disk. Added are ``ppl_over_dense/<text>``, token perplexities over the dense variant's, and
  their logarithms ``nats_over_dense/<text>``; the gap of the allocation; and ``rank/<kind>``, whose step is the layer.
* Parameters of a variant are those that can make two variants differ, under keys without its name and present in
  every run, so that "show diff only" says what differs. Whatever all variants of a state share is with the parent run,
  beside the report and its pictures, ``figures/precision.png`` ("What a byte buys") among them.
* No weights: those stay in DVC, whose hash of the model folder is a tag of the run and of its registered version.
* The experiment has a saved view "Variants" of the state that was tracked last, since MLflow by itself shows neither
  metrics nor child runs.
"""

from drank.tracking.projection import Tracked, track
from drank.tracking.registry import Promotion, PromotionError, VariantRun, find_runs, prepare, set_champion
from drank.tracking.store import TrackingError, open_store

__all__ = [
    "Promotion",
    "PromotionError",
    "Tracked",
    "TrackingError",
    "VariantRun",
    "find_runs",
    "open_store",
    "prepare",
    "set_champion",
    "track",
]
