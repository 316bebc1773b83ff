"""MLflow as a projection of dvc.lock: one run per variant, all of them under one run per state of the lock.

``track`` reads what ``dvc repro`` left and runs nothing, so a variant that DVC restored from its cache is there like
one that was computed. The runs of a state are found by the hash of the lock's stages: the same state makes nothing
the second time, and runs that a killed call left unfinished are made anew. ``drank promote`` moves the alias
``champion`` of a registered model to a variant, and ``find_runs`` goes back from a model folder to its runs. This
package is the only one that imports mlflow.

Runs have what MLflow's pages can show at once; the rest is in the artifacts:

* Metrics are the figures of results/<variant>.json under the same names, which MLflow groups by ``/``; characters that
  it refuses are encoded (``names``), as in ``exact_match:2Cstrict-match/gsm8k``. Left out are standard errors, no
  figures to sort by; word perplexities, which are functions of the bits per byte; and what is the same for every
  variant or a parameter already. Added are ``ppl_over_dense/<text>``, token perplexities over the dense variant's; the
  gap of the allocation; and ``rank/<kind>``, whose step is the layer, so that MLflow draws the rank profile.
* Parameters of a variant are those that can make two variants differ, under keys without its name and present in
  every run, so that "show diff only" says what differs. Whatever all variants of a state share is with the parent run.
* No weights: those stay in DVC, whose hash of the model folder is a tag of the run and of its registered version.
* The experiment has a saved view "Variants", with columns and charts chosen, since MLflow by itself shows neither
  metrics nor child runs. It lists the variants of the state that was tracked last.
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
