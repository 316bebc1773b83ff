"""The literature's experiments: parameter files, what was published for them, and what was reached.

``experiments/<name>.yaml`` is a params.yaml, ``experiments/published/<name>.yaml`` has the figures of the papers, and
``experiments/<name>/`` is where the experiment runs: a root of its own with the stages of the top-level pipeline.
"""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any, Literal

from pydantic import Field

from drank.planning.estimate import Model, read_shape
from drank.planning.footprint import model_parameters
from drank.project.dvc import LockError, read_lock
from drank.project.files import read_json
from drank.project.params import Name, ParamsError, Section, Share, read_params
from drank.project.plain_yaml import load
from drank.project.state import check_order, check_params, check_written, lineage
from experiments.tools.copies import FOLDER

log = logging.getLogger(__name__)

ZERO_SHOT = ("openbookqa", "arc_easy", "winogrande", "hellaswag", "arc_challenge", "piqa", "mathqa")

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Verdict = Literal["reached", "higher", "lower", "not run"]


class Tolerance(Section):
    """How far from a published figure is still reached: perplexities by a share of it, accuracies by a difference."""

    token_perplexity: Share
    acc: Share


class PublishedRow(Section):
    """Figures of a variant in one source, by the names that results/<variant>.json has.

    ``acc`` without a task is the mean over ``ZERO_SHOT``.
    """

    variant: Name
    source: str
    figures: Annotated[dict[str, Positive], Field(min_length=1)]
    tolerance: Tolerance | None = None


class Published(Section):
    """Published figures of an experiment, and the facts that foresee its cost without any weights."""

    config: dict[str, Any]
    """Sizes of the model, in the words of its config.json."""
    test_tokens: Annotated[int, Field(ge=0)]
    """Tokens that evaluation reads, of test texts and zero-shot tasks together; about, for the dry run alone."""
    tolerance: Tolerance
    rows: Annotated[tuple[PublishedRow, ...], Field(min_length=1)]

    def model(self, name: str) -> Model:
        """The model's shape, and its parameters as transformers counts them."""
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM

        shape = read_shape(self.config, name)
        assert shape is not None, "the shipped files have all sizes"
        with torch.device("meta"):
            n_parameters = AutoModelForCausalLM.from_config(AutoConfig.for_model(**self.config)).num_parameters()
        return Model(shape, n_parameters / model_parameters(shape))


@dataclass(frozen=True)
class Finding:
    """A published figure beside ours."""

    variant: str
    metric: str
    source: str
    published: float
    tolerance: float
    ours: float | None

    @property
    def ratio(self) -> float | None:
        return None if self.ours is None else self.ours / self.published

    @property
    def verdict(self) -> Verdict:
        """``higher`` and ``lower`` miss the figure: one that is much better was measured in another way, too."""
        if self.ours is None:
            return "not run"
        unit = self.published if self.metric.startswith("token_perplexity") else 1.0
        # The last digit of an accuracy is its tolerance's: .49 and .48 differ by .01, which floats do not say.
        if abs(self.ours - self.published) <= self.tolerance * unit + 1e-12:
            return "reached"
        return "higher" if self.ours > self.published else "lower"


def names(root: Path) -> list[str]:
    """The experiments that have published figures."""
    return sorted(path.stem for path in (root / FOLDER / "published").glob("*.yaml"))


def read_published(root: Path, name: str) -> Published:
    """Published figures of an experiment, each of a variant that its parameters have.

    Raises:
        ParamsError: no such experiment, one of its two files is wrong, or a row is of a variant that it lacks.
    """
    if name not in names(root):
        known = ", ".join(names(root)) or "none; run in a clone of the repository, or give --root"
        raise ParamsError(f"no experiment '{name}' in {root / FOLDER}; known: {known}")
    published = Published.read(root / FOLDER / f"published/{name}.yaml")
    variants = read_params(root / FOLDER / f"{name}.yaml").variants
    if lacking := sorted({row.variant for row in published.rows}.difference(variants)):
        raise ParamsError(
            f"{FOLDER}/published/{name}.yaml: {', '.join(lacking)}: no such variant in {FOLDER}/{name}.yaml; "
            f"it has: {', '.join(variants)}"
        )
    return published


def read_results(root: Path, name: str) -> dict[str, dict[str, Any]]:
    """results/<variant>.json of an experiment, of the variants that DVC ran with the parameters of its file.

    Results of other parameters, or edited ones, are left out, with a warning that says what differs.

    Raises:
        LockError: the experiment's dvc.lock is damaged.
    """
    folder = f"{FOLDER}/{name}"
    if not (root / folder / "dvc.lock").is_file():
        return {}
    locked = read_lock(root / folder / "dvc.lock")
    document = load((root / FOLDER / f"{name}.yaml").read_text(encoding="utf-8"))
    results = {}
    for path in sorted((root / folder / "results").glob("*.json")):
        try:
            stages = lineage(locked, check_written(root, locked, f"{folder}/results/{path.name}"))
            check_order(stages, f"{folder}/dvc.lock")
            check_params(stages, document, f"{FOLDER}/{name}.yaml", f"{folder}/params.yaml")
            results[path.stem] = read_json(path)
        except LockError as error:
            log.warning("%s is not counted: %s", path.stem, error)
    return results


def compare(
    published: Published, results: Mapping[str, Mapping[str, Any]], variants: Sequence[str] = ()
) -> list[Finding]:
    """Every published figure of these variants (none given: of all) beside ours.

    Raises:
        ParamsError: nothing was published of a variant that is asked for.
    """
    if lacking := sorted(set(variants).difference(row.variant for row in published.rows)):
        has = ", ".join(dict.fromkeys(row.variant for row in published.rows))
        raise ParamsError(f"{', '.join(lacking)}: no published figure here; there are some for {has}")
    return [
        Finding(
            row.variant, metric, row.source, figure,
            getattr(row.tolerance or published.tolerance, "acc" if metric.startswith("acc") else "token_perplexity"),
            _figure(results.get(row.variant, {}), metric),
        )
        for row in published.rows
        if not variants or row.variant in variants
        for metric, figure in row.figures.items()
    ]  # fmt: skip


def outcome(findings: Sequence[Finding]) -> dict[tuple[str, str], Literal["reached", "missed", "not run"]]:
    """Verdict per figure, a metric of a variant. Where sources disagree about it, it is enough to reach one of them."""
    verdicts: dict[tuple[str, str], set[Verdict]] = {}
    for found in findings:
        verdicts.setdefault((found.variant, found.metric), set()).add(found.verdict)
    return {
        figure: "reached" if "reached" in seen else "not run" if "not run" in seen else "missed"
        for figure, seen in verdicts.items()
    }


def _figure(results: Mapping[str, Any], metric: str) -> float | None:
    if metric != "acc":
        return results.get(metric)
    measured = [results[f"acc/{task}"] for task in ZERO_SHOT if f"acc/{task}" in results]
    return fmean(measured) if len(measured) == len(ZERO_SHOT) else None


def document(findings: Sequence[Finding]) -> str:
    """One JSON document of the findings."""
    rows = [vars(found) | {"ratio": found.ratio, "verdict": found.verdict} for found in findings]
    holds = set(outcome(findings).values()) == {"reached"}
    return json.dumps({"holds": holds, "figures": rows}, indent=2, sort_keys=True)
