"""A folder against one that was built again: the same bytes, or how far apart the matrices are."""

from drank.release import STATEMENT
from drank.workflow.audit.folder import Folder
from drank.workflow.audit.ledger import BrokenLinkError
from drank.workflow.files import FileError

# Rounding to bfloat16 alone moves a matrix in pivot form by .006 on the mean and .010 at worst (docs/method.md, 4).
TOLERANCE = 0.02


def check_rebuilt(folder: Folder, other: Folder) -> str:
    """Whether another build of the same variant gave the same bytes, or else matrices that are as good as equal.

    Other processors round covariances and factors otherwise, so that the last bits, and sometimes a rank, differ.
    """
    if not other.path.is_dir():
        raise FileError(f"{other.path}: no folder; build it with the command that audit prints")
    differing = sorted(
        name
        for name in folder.digests.keys() | other.digests.keys()
        if folder.digests.get(name) != other.digests.get(name)
    )
    if not differing:
        return f"the same bytes in all {len(folder.digests)} files"
    if folder.statement.parameters != other.statement.parameters:
        raise BrokenLinkError(f"{other.path} is of other parameters: compare them with `drank diff`")
    if folder.digests["allocation.json"] != other.digests.get("allocation.json"):
        ranks = {unit.name: (unit.form, unit.rank) for unit in other.allocation.units}
        moved = [u.name for u in folder.allocation.units if ranks.get(u.name) != (u.form, u.rank)]
        told = f"; {len(moved)} of {len(folder.allocation.units)} ranks differ" if moved else "; all ranks are equal"
    else:
        told = "; the allocation is the same file"
    distances = _distances(folder, other)
    worst = max(distances, key=lambda name: distances[name])
    mean = sum(distances.values()) / len(distances)
    message = (
        f"not the same bytes ({', '.join(name for name in differing if name != STATEMENT)} differ){told}; weights "
        f"differ by {mean:.2g} on the mean, {distances[worst]:.2g} at most ({worst}), as relative Frobenius norms"
    )
    if distances[worst] > TOLERANCE:
        raise BrokenLinkError(
            f"{message}; {TOLERANCE} is the most that rounding explains: another processor, or other libraries?"
        )
    return f"{message}: within {TOLERANCE}, which rounding on another processor explains"


def _distances(folder: Folder, other: Folder) -> dict[str, float]:
    """Relative Frobenius distance of every weight, both models multiplied out."""
    from transformers import AutoModelForCausalLM

    import drank  # noqa: F401  registers the format

    states = []
    for path in (folder.path, other.path):
        model = AutoModelForCausalLM.from_pretrained(path)
        if hasattr(model, "hf_quantizer"):
            model.dequantize()
        states.append(model.state_dict())
    ours, theirs = states
    return {
        name: float((ours[name].double() - theirs[name].double()).norm() / ours[name].double().norm().clamp(min=1e-30))
        for name in ours
    }
