"""``python -m experiments.tools.depth VARIANT``: tries weights of depth for a variant of allocation ``lems``."""

from collections.abc import Callable, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer

from drank.cli.options import CommandError, Root
from drank.model.divergence import divergence_from
from drank.model.precision import agreed_dtype, load_model
from drank.project.command import run_app
from drank.project.files import TensorFolder, read_arrays, read_json, read_tensors
from drank.project.params import Params, read_params
from drank.steps.allocation import allocation
from drank.steps.compression import compress

SLOPES, EXPONENTS = (0.0, 7.0), (0.0, 3.0)  # ranges of LEMS's search, whose first ten trials are uniform draws
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    variant: Annotated[str, typer.Argument(help="A variant of allocation lems, whose spectrum is there.")],
    trials: Annotated[int, typer.Option(help="Draws of slope and exponent.")] = 10,
    n_windows: Annotated[int, typer.Option("--windows", help="Calibration windows to read, the last ones.")] = 8,
    seed: Annotated[int, typer.Option(help="Seed of the draws.")] = 0,
    root: Root = Path(),
) -> None:
    """Print how far each draw leaves the compressed model from the dense one, and the best one for params.yaml."""
    params = read_params(root / "params.yaml")
    if params.variant(variant)[1].allocation != "lems":
        raise CommandError(f"{variant}: no other allocation than lems weighs depth; name a variant of that")
    (low, high), draw = zip(SLOPES, EXPONENTS, strict=True), np.random.default_rng(seed)
    drawn = draw.uniform(np.array(low), np.array(high), (trials, 2)).round(2)
    measure, found = trial(params, variant, n_windows, root), {}
    for slope, exponent in drawn.tolist():
        found[slope, exponent] = nats = measure(slope, exponent)
        typer.echo(f"depth_slope: {slope:.2f}, depth_exponent: {exponent:.2f}   {nats:.6g} nats per token")
    typer.echo("best: depth_slope: {:.2f}, depth_exponent: {:.2f}".format(*min(found, key=found.__getitem__)))


def trial(params: Params, variant: str, n_windows: int, root: Path) -> Callable[[float, float], float]:
    """(slope, exponent) -> how far the variant's model is from the dense one on calibration windows, nats per token."""
    asked, preset = params.variant(variant)
    on, spectrum = params.covariance, root / "data/spectrum" / asked.spectrum
    store, summary = TensorFolder(spectrum), read_json(spectrum / "summary.json")
    values = read_arrays(spectrum / "singular_values.safetensors")
    seed = params.spectrum[asked.spectrum].calibration_seed
    windows = read_tensors(root / f"data/sampling/calibration/{seed}.safetensors")["windows"][-n_windows:]
    torch.set_num_threads(on.threads)
    dtype = agreed_dtype(params.compute.dtype, on.device, lambda own: [own])
    model = load_model(root / "data/raw/model", dtype, on.device)
    divergence = divergence_from(model, windows.to(on.device))

    def measure(slope: float, exponent: float) -> float:
        weighed = preset.model_copy(update={"depth_slope": slope, "depth_exponent": exponent})
        units: Sequence[Any] = allocation(variant, asked, weighed, values, summary)["units"]
        return divergence(compress(deepcopy(model), units, store, {"variant": variant}))

    return measure


if __name__ == "__main__":
    run_app(app)
