"""params.yaml as frozen objects that refuse unknown keys and impossible values.

Every knob is described in params.yaml itself; this module holds the types and the rules. A stage reads one section
and passes plain arguments on: no object of this module reaches a numerical function.
"""

import json
from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator
from pydantic_core import ErrorDetails

Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
SourceName = Annotated[str, StringConstraints(pattern=r"^(pypi|hub|local):.+$")]
Share = Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]
Device = Literal["cpu", "cuda"]


class ParamsError(ValueError):
    """params.yaml is wrong; the message names the key, the value and the rule."""


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class ModelSource(Section):
    source: SourceName
    sha256: Sha256 | None = None
    member: str | None = None


class TextSource(Section):
    source: SourceName
    sha256: Sha256 | None = None
    member: str | None = None
    column: str = "text"
    split: str | None = None


Seed = Annotated[int, Field(ge=0)]


class Sampling(Section):
    seed: Seed
    calibration_text: Name
    calibration_seeds: Annotated[tuple[Seed, ...], Field(min_length=1)]
    n_windows: Count
    window_length: Annotated[int, Field(ge=2)]
    held_out_share: Annotated[float, Field(gt=0, lt=1)]
    n_test_windows: Count
    n_task_items: Count


class Covariance(Section):
    batch_windows: Count
    threads: Count
    fisher: Literal["none", "empirical", "sampled", "gaussian"]
    fisher_seed: Seed = 0
    offload: bool = False
    processes: Count = 1
    device: Device = "cpu"
    targets: tuple[str, ...]
    ignore: tuple[str, ...] = ()


class Spectrum(Section):
    calibration_seed: Seed
    metric: Literal["none", "diagonal", "input", "kfac"]
    units: Literal["matrix", "group", "block"]
    alpha: Annotated[float, Field(gt=0, le=2)] | None = None
    damping: Annotated[float, Field(ge=0, le=1)] = 0.0
    layers: Count = 1
    even_with_grouped_heads: bool = False
    cuts: tuple[Annotated[float, Field(ge=0, lt=1)], ...] = ()
    sensitivity_windows: Annotated[int, Field(ge=0)] = 0
    sensitivity_ratios: tuple[Annotated[float, Field(gt=0, lt=1)], ...] = ()

    @model_validator(mode="after")
    def _belongs(self) -> "Spectrum":
        if (self.alpha is not None) != (self.metric == "diagonal"):
            raise ValueError(
                f"alpha = {self.alpha} with metric '{self.metric}': metric 'diagonal' needs it, no other takes it"
            )
        if (self.layers > 1) != (self.units == "group"):
            raise ValueError(
                f"layers = {self.layers} with units '{self.units}': units 'group' needs 2 or more, no other takes it"
            )
        if bool(self.cuts) != (self.units == "block"):
            raise ValueError(
                f"cuts = {list(self.cuts)} with units '{self.units}': units 'block' needs shares of channels to "
                f"remove, such as [0.0, 0.25, 0.5]; no other takes them"
            )
        if self.cuts and (self.cuts[0] != 0 or list(self.cuts) != sorted(set(self.cuts))):
            raise ValueError(f"cuts = {list(self.cuts)} must begin with 0.0 and rise")
        if bool(self.sensitivity_windows) != bool(self.sensitivity_ratios):
            raise ValueError(
                f"sensitivity_windows = {self.sensitivity_windows} with sensitivity_ratios = "
                f"{list(self.sensitivity_ratios)}: measuring perplexities needs both, windows to read and ratios to try"
            )
        if self.sensitivity_windows and self.units != "matrix":
            raise ValueError(f"sensitivity_windows with units '{self.units}': only single matrices are measured")
        if self.units == "block" and self.metric != "kfac":
            raise ValueError(
                f"units 'block' with metric '{self.metric}': channels and ranks compete in nats, which only 'kfac' has"
            )
        return self


class Preset(Section):
    spectrum: Name
    allocation: Literal["dense", "uniform", "effective_rank", "released", "sensitivity", "least_loss"]
    storage: Literal["factors", "pivot"]
    beta: Annotated[float, Field(ge=0, lt=1)] | None = None
    scores: Literal["stable_rank", "perplexity"] | None = None
    floor: Annotated[float, Field(ge=0, lt=1)] = 0.0
    cap: Share = 1.0
    dense_option: bool = True
    multiple_of: Count = 1

    @model_validator(mode="after")
    def _beta_belongs_to_effective_rank(self) -> "Preset":
        if self.beta is not None and self.allocation not in ("effective_rank", "released"):
            raise ValueError(
                f"beta = {self.beta} means something to allocation 'effective_rank' and 'released' only, "
                f"not to '{self.allocation}'"
            )
        if (self.scores is not None) != (self.allocation == "sensitivity"):
            raise ValueError(
                f"scores = {self.scores} with allocation '{self.allocation}': 'sensitivity' needs 'stable_rank' or "
                f"'perplexity', no other takes it"
            )
        if self.scores == "perplexity" and self.storage != "factors":
            raise ValueError(f"storage = '{self.storage}': perplexities are measured at the ranks of storage 'factors'")
        if self.floor >= self.cap:
            raise ValueError(f"floor = {self.floor} leaves no rank below cap = {self.cap}")
        return self


class Variant(Section):
    preset: Name
    spectrum: Name
    size_ratio: Share


class Evaluation(Section):
    batch_windows: Count
    threads: Count
    processes: Count = 1
    device: Device = "cpu"
    tasks: tuple[str, ...]


class Params(Section):
    """All of params.yaml, cross-checked: every name that a variant uses exists in the section it points to."""

    model: ModelSource
    text: dict[Name, TextSource]
    sampling: Sampling
    covariance: Covariance
    spectrum: dict[Name, Spectrum]
    presets: dict[Name, Preset]
    variants: dict[Name, Variant]
    evaluation: Evaluation

    @model_validator(mode="after")
    def _names_exist(self) -> "Params":
        _known("sampling.calibration_text", self.sampling.calibration_text, self.text, "text")
        needy = [name for name, spectrum in self.spectrum.items() if spectrum.metric == "kfac"]
        if needy and self.covariance.fisher == "none":
            raise ValueError(
                f"spectrum.{needy[0]}.metric = 'kfac' needs output gradients, but covariance.fisher = 'none': "
                f"write 'fisher: empirical' or 'fisher: sampled'"
            )
        for name, spectrum in self.spectrum.items():
            if spectrum.calibration_seed not in self.sampling.calibration_seeds:
                raise ValueError(
                    f"spectrum.{name}.calibration_seed = {spectrum.calibration_seed} is not among "
                    f"sampling.calibration_seeds = {list(self.sampling.calibration_seeds)}: add it there"
                )
        for name, preset in self.presets.items():
            used = self.spectrum.get(preset.spectrum)
            if used and used.units == "block" and preset.allocation != "least_loss":
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
        return self

    def variant(self, name: str) -> tuple[Variant, Preset]:
        """The variant of that name and its preset.

        Raises:
            ParamsError: params.yaml has no such variant.
        """
        if name not in self.variants:
            raise ParamsError(f"no variant {name!r} in params.yaml; it has: {', '.join(self.variants)}")
        return self.variants[name], self.presets[self.variants[name].preset]


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
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ParamsError(f"{path}: not found; run from the folder that holds params.yaml") from None
    except yaml.YAMLError as error:
        raise ParamsError(f"{path}: not YAML: {error}") from None
    if not isinstance(document, dict):
        raise ParamsError(f"{path}: expected one section a step, found {type(document).__name__}")
    try:
        return Params.model_validate_json(json.dumps(document, default=str))
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
