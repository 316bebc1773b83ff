"""A folder against one that was built again: the same bytes, or how differently the two models predict."""

from pathlib import Path

from drank.audit.folder import Folder
from drank.audit.ledger import BrokenLinkError, UncheckableError
from drank.project.files import read_tensors
from drank.project.tolerance import other_dtypes
from drank.steps.release import STATEMENT

# Nats per token. Building kfac-80 of the default model with AVX2 in the place of AVX-512 moved 29 of 210 ranks and gave
# .0056 and .0065 on the two test texts, where compression itself costs .14 and .20 (docs/log.md).
TOLERANCE = 0.02
N_WINDOWS = 4


def check_rebuilt(folder: Folder, other: Folder, test_windows: Path | None) -> str:
    """Compare another build of the same variant: the same bytes, or else a model that predicts as good as the same.

    Other processors round covariances otherwise, and a rank chosen by its loss may then move. Matrices cannot be
    compared one by one, since one removed channel more or less shifts all that follow: predictions can.
    """
    if not other.path.is_dir():
        raise UncheckableError(f"{other.path}: no folder; build it with the commands that audit prints")
    names = folder.digests.keys() | other.digests.keys()
    differing = sorted(name for name in names if folder.digests.get(name) != other.digests.get(name))
    if not differing:
        return f"the same bytes in all {len(folder.digests)} files"
    if folder.statement.parameters != other.statement.parameters:
        raise BrokenLinkError(f"{other.path} is of other parameters: compare them with `drank diff`")
    ranks = {unit.name: (unit.form, unit.rank) for unit in other.allocation.units}
    moved = [unit.name for unit in folder.allocation.units if ranks.get(unit.name) != (unit.form, unit.rank)]
    figures, again = folder.statement.results, other.statement.results
    measured = [key for key in sorted(figures.keys() & again.keys()) if key.startswith("token_perplexity/")]
    types = other_dtypes(results.get("protocol", {}) for results in (figures, again))
    told = [
        f"not the same bytes ({', '.join(name for name in differing if name != STATEMENT)} differ)",
        f"{len(moved)} of {len(ranks)} ranks differ",
        *(f"{key} {figures[key]:.4f} and {again[key]:.4f}" for key in measured),
        *([types.rstrip(".")] if types else []),
    ]
    if test_windows is None or not test_windows.exists():
        raise UncheckableError(f"{'; '.join(told)}; predictions are compared by data/sampling, which is not at hand")
    divergences = _divergences(folder, other, test_windows)
    told += [f"divergence on {text} {value:.2g} nats per token" for text, value in divergences.items()]
    if max(divergences.values()) > TOLERANCE:
        raise BrokenLinkError(f"{'; '.join(told)}: more than {TOLERANCE}, which rounding would explain")
    return f"{'; '.join(told)}: within {TOLERANCE}, which rounding on another processor explains"


def _divergences(folder: Folder, other: Folder, test_windows: Path) -> dict[str, float]:
    from transformers import AutoModelForCausalLM

    import drank.model.quantizer  # noqa: F401  registers the format
    from drank.model.divergence import token_divergence
    from drank.model.precision import compute_dtype

    # Folders may be of others: nothing is fetched, unpickled or run, and nobody is asked.
    plain = {"local_files_only": True, "trust_remote_code": False, "use_safetensors": True}
    dtype = compute_dtype("auto", "cpu")
    ours, theirs = (AutoModelForCausalLM.from_pretrained(f.path, dtype=dtype, **plain).eval() for f in (folder, other))
    texts = read_tensors(test_windows)
    return {text: token_divergence(ours, theirs, windows[:N_WINDOWS]) for text, windows in texts.items()}
