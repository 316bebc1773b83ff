"""The cost of an experiment, stage by stage, before anything is fetched: from its parameters and a model's shape."""

from dataclasses import dataclass

from drank.planning import footprint
from drank.planning.footprint import Setting, Shape
from drank.project.params import Params, Spectrum

# Shares of the speed of large matrix products that passes and eigenproblems reached on two CPU cores
# (docs/performance.md). No GPU was measured, and eigenproblems in float64 are what GPUs are least good at.
PASSES, SPECTRA = 0.45, 0.21


@dataclass(frozen=True)
class Cost:
    """A stage, or one of its items: bytes of memory on its device, bytes on disk at its end (those of an offloaded pass
    are temporary), hours. Zero is next to nothing."""

    stage: str
    memory: int = 0
    disk: int = 0
    hours: float = 0.0


@dataclass(frozen=True)
class Size:
    """A variant as it will be: parameters of the whole model and bytes of its weights."""

    variant: str
    size_ratio: float
    parameters: int
    n_bytes: int


def sizes(params: Params, shape: Shape) -> list[Size]:
    """The size of every variant, as if its size ratio were met exactly."""
    return [
        Size(
            name,
            variant.ratio,
            footprint.compressed_parameters(shape, variant.ratio),
            footprint.compressed_folder(shape, variant.ratio, _is_pivot(params, name)),
        )
        for name, variant in params.variants.items()
    ]


def costs(params: Params, shape: Shape, test_tokens: int, bf16: float, float64: float) -> list[Cost]:
    """The cost of every stage. raw is the model that is kept; compression and evaluation count all variants together.

    Args:
        test_tokens: tokens that evaluation reads.
        bf16, float64: FLOP/s of large matrix products in bfloat16 and in float64, of which ``PASSES`` and ``SPECTRA``
            are counted on.
    """
    on, setting = params.covariance, _setting(params)
    gradients = on.fisher != "none"
    passes, spectra = PASSES * bf16 * 3600, SPECTRA * float64 * 3600
    weights = 2 * footprint.model_parameters(shape)
    found = [Cost("raw", memory=weights, disk=weights)]
    for seed in params.sampling.calibration_seeds:
        held = sum(footprint.memory(shape, setting, gradients, on.offload).values())
        flops = footprint.covariance_flops(shape, setting, gradients, on.offload)
        written = footprint.covariance_files(shape, gradients)
        written += footprint.hidden_states(shape, setting, gradients) * on.offload
        found.append(Cost(f"covariance@{seed}", held, written, flops / passes))
    for key, spectrum in params.spectrum.items():
        kfac, blocks, layers = spectrum.metric == "kfac", spectrum.units == "block", _layers(spectrum, shape)
        cut = _setting(params, spectrum)
        held = sum(footprint.spectrum_memory(shape, blocks).values())
        written = footprint.spectrum_files(shape, cut, blocks, layers)
        hours = footprint.spectra_flops(shape, cut, kfac, blocks, layers) / spectra
        found.append(Cost(f"spectrum@{key}", held, written, hours))
    variants = sizes(params, shape)
    pivots = sum(footprint.pivot_flops(shape, v.size_ratio) for v in variants if _is_pivot(params, v.variant))
    # Factors come from the spectrum a matrix at a time, so compression holds the model and little else.
    found.append(Cost("compression", weights, sum(v.n_bytes for v in variants), pivots / spectra))
    logits = footprint.evaluation_peak(shape, setting, params.evaluation.batch_windows)
    read = sum(footprint.evaluation_flops(shape, v.size_ratio, test_tokens, setting.window_length) for v in variants)
    found.append(Cost("evaluation", max(v.n_bytes for v in variants) + logits, hours=read / passes))
    return found


def _is_pivot(params: Params, variant: str) -> bool:
    return params.variant(variant)[1].storage == "pivot"


def _setting(params: Params, spectrum: Spectrum | None = None) -> Setting:
    sampling = params.sampling
    cuts = spectrum.cuts if spectrum else ()
    return Setting(sampling.n_windows, sampling.window_length, params.covariance.batch_windows, cuts)


def _layers(spectrum: Spectrum, shape: Shape) -> int:
    """Layers that share a basis: 1 where key/value heads are grouped and that was not overruled."""
    grouped = shape.kv_heads < shape.heads
    return 1 if grouped and not spectrum.even_with_grouped_heads else spectrum.layers
