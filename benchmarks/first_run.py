"""How fast are covariance and spectrum (input metric), against what D-Rank's released code does for them?

``python -m benchmarks.first_run``, in a project where ``dvc repro covariance`` ran. Yardstick: benchmarks/yardstick.py,
with the model in float32 and its output head run, as released. Linear algebra and passes alone, no files on either
side. Some windows and some layers are timed; the last table scales both to the whole. The limit: the fastest matrix
product that this machine shows in each precision.
"""

import argparse
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from benchmarks import yardstick
from benchmarks.covariance_overhead import collect
from benchmarks.measure import Times, arguments, begin, interleaved, print_table, product, shown, speeds
from benchmarks.ratio_sweep import yardstick_layers
from drank.method.covariance import SecondMoment
from drank.method.spectrum import Metric, whitened_spectrum
from drank.model.capture import run_batches, split_windows, watching_inputs
from drank.model.linears import Linear, find_linears, shared_inputs
from drank.model.precision import compute_dtype, has_units
from drank.project.files import read_tensors

# Operations over d³ in a symmetric eigenproblem, whatever the matrix: reduction to tridiagonal form, 4/3, and
# transformation of the vectors back, 2. Divide and conquer between the two costs up to 8/3 more; it is not counted.
EIGH = 10 / 3

SIZE = 1536
LIMITS = {str(dtype): product(dtype, SIZE) for dtype in (torch.bfloat16, torch.float32, torch.float64)}


def main() -> None:
    parser = arguments(__doc__, rounds=5)
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--layers", nargs="+", type=int, default=[5, 15, 25])
    asked = parser.parse_args()
    begin(asked)
    windows = read_tensors(Path("data/sampling/calibration/0.safetensors"))["windows"]
    ours = AutoModelForCausalLM.from_pretrained("data/raw/model", dtype=compute_dtype("auto", "cpu")).eval()
    accumulation(ours, windows[: asked.windows], asked)
    theirs = AutoModelForCausalLM.from_pretrained("data/raw/model", dtype=torch.float32).eval()
    covariance = covariance_times(ours, theirs, windows[: asked.windows], asked)
    spectrum, n_layers = spectrum_times(asked)
    whole = {
        name: [
            len(windows) / asked.windows * c + n_layers / len(asked.layers) * s
            for c, s in zip(covariance[name], spectrum[name], strict=True)
        ]
        for name in ("ours", "yardstick", "yardstick, once")
    }
    print(f"Whole first run: {len(windows)} windows, {n_layers} layers, scaled; seconds:\n")
    rows = []
    for name, total in whole.items():
        c = [len(windows) / asked.windows * x for x in covariance[name]]
        s = [n_layers / len(asked.layers) * x for x in spectrum[name]]
        rows.append([name, shown(c, digits=1), shown(s, digits=1), shown(total, digits=1), *times_ours(whole, name)])
    print_table(["", "covariance", "spectrum", "both", "times ours"], rows)


def times_ours(times: dict[str, list[float]], name: str) -> list[str]:
    return [shown([a / b for a, b in zip(times[name], times["ours"], strict=True)])]


def print_limits(times: Times) -> None:
    print(f"Products of {SIZE} x {SIZE} matrices, GFLOP/s:\n")
    print_table([str(d) for d in LIMITS], [[shown(speeds(2 * SIZE**3, times[d]), digits=0) for d in LIMITS]])


def of_limit(times: Times, name: str, flops: float, dtype: torch.dtype) -> str:
    """Speed as a percentage of a matrix product's, round by round."""
    ours, limit = speeds(flops, times[name]), speeds(2 * SIZE**3, times[str(dtype)])
    return shown([100 * a / b for a, b in zip(ours, limit, strict=True)], digits=0)


def accumulation(model: Any, windows: Tensor, asked: argparse.Namespace) -> None:
    """The products alone, on what enters one layer."""
    linears = find_linears(model, ["re:.*"])
    owners = shared_inputs(model, linears, windows[:1, :8])
    layer = [x for x in linears if x.layer == asked.layers[0]]
    seen: dict[str, Tensor] = {}
    with watching_inputs({x.name: x.module for x in layer}, lambda name, x: seen.update({name: x.clone()})):
        for _ in run_batches(model, split_windows(windows, len(windows))):
            pass
    shared = [seen[x.name] for x in layer if owners[x.name] == x.name]
    units = has_units(torch.bfloat16, "cpu")
    moments = [SecondMoment(x.shape[1], bfloat16_units=units) for x in shared]
    sums = {
        name: [torch.zeros(x.shape[1], x.shape[1]) for x in of] for name, of in (("4", shared), ("7", seen.values()))
    }
    doubles = [total.double() for total in sums["7"]]
    everything, precise = list(seen.values()), (torch.bfloat16, torch.float32, torch.float32, torch.float64)
    runs = {
        "ours: bfloat16 in, float32 total, 4 a layer, upper half": lambda: [
            m.add(x) for m, x in zip(moments, shared, strict=True)
        ],
        "as released: float32, 4 a layer": lambda: [
            yardstick.accumulated(t, x) for t, x in zip(sums["4"], shared, strict=True)
        ],
        "float32, every linear": lambda: [
            yardstick.accumulated(t, x) for t, x in zip(sums["7"], everything, strict=True)
        ],
        "float64, every linear": lambda: [
            t.add_(x.double().T @ x.double()) for t, x in zip(doubles, everything, strict=True)
        ],
    }
    flops = {
        name: sum(2 * len(x) * x.shape[1] ** 2 for x in (everything if "every" in name else shared)) for name in runs
    }
    times = interleaved(runs | LIMITS, asked.rounds)
    rows = [
        [
            name,
            shown(times[name], 1000, 1),
            shown(speeds(flops[name], times[name]), digits=0),
            of_limit(times, name, flops[name], dtype),
        ]
        for name, dtype in zip(runs, precise, strict=True)
    ]
    print_limits(times)
    print(f"Accumulation, layer {asked.layers[0]}, {windows.numel()} tokens:\n")
    print_table(["", "ms", "GFLOP/s", "% of a product in that precision"], rows)


def covariance_times(ours: Any, theirs: Any, windows: Tensor, asked: argparse.Namespace) -> dict[str, list[float]]:
    linears = find_linears(ours, ["re:.*"])
    owners = shared_inputs(ours, linears, windows[:1, :8])
    released = {x.name: x.module for x in find_linears(theirs, ["re:.*"]) if owners[x.name] == x.name}
    times = interleaved(
        {
            "ours": lambda: collect(ours, windows, linears, owners, "none"),
            "yardstick": lambda: released_covariance(theirs, released, windows),
        },
        asked.rounds,
    )
    print(f"Covariance, passes included, {len(windows)} windows; seconds:\n")
    print_table(
        ["ours", "yardstick", "times ours"],
        [[shown(times["ours"]), shown(times["yardstick"]), *times_ours(times, "yardstick")]],
    )
    return times | {"yardstick, once": times["yardstick"]}


@torch.inference_mode()
def released_covariance(model: Any, modules: dict[str, nn.Module], windows: Tensor) -> dict[str, Tensor]:
    totals: dict[str, Tensor] = {}

    def add(name: str, x: Tensor) -> None:
        totals[name] = yardstick.accumulated(totals.get(name), x)

    with watching_inputs(modules, add):
        model(input_ids=windows, use_cache=False)
    return totals


def spectrum_times(asked: argparse.Namespace) -> tuple[dict[str, list[float]], int]:
    n_layers, layers = yardstick_layers(Path(), asked.layers)
    runs = {
        "ours": lambda: our_spectra(layers),
        "whiten": lambda: [yardstick.whitened(H) for _, H in layers],
        "yardstick, once": lambda: [released_spectrum(x, H) for x, H in layers],
        "eigenproblems": partial(eigenproblems, layers),
    }
    times = interleaved(runs | LIMITS, asked.rounds)
    times["yardstick"] = [a + b for a, b in zip(times["yardstick, once"], times["whiten"], strict=True)]
    eigen = sum(EIGH * n**3 for n in orders(layers))
    flops = eigen + sum(product_flops(x) for x, _ in layers)
    print(f"Spectrum, layers {asked.layers}; seconds (the yardstick whitens twice, in 'once' once):\n")
    print_table(
        ["ours", "yardstick", "yardstick, once", "once, times ours"],
        [[*(shown(times[k]) for k in ("ours", "yardstick", "yardstick, once")), *times_ours(times, "yardstick, once")]],
    )
    rows = [
        [label, shown(speeds(f, times[name]), digits=0), of_limit(times, name, f, torch.float64)]
        for label, name, f in (("ours, all", "ours", flops), ("eigenproblems alone", "eigenproblems", eigen))
    ]
    print_limits(times)
    print_table(["", "GFLOP/s", "% of a float64 product"], rows)
    return times, n_layers


def our_spectra(layers: list[tuple[Linear, Tensor]]) -> None:
    """As the stage has it: linears that share an input share its metric, which is dropped after the last of them."""
    read: Tensor | None = None
    for linear, H in layers:
        if H is not read:
            read, metric = H, Metric(H)
        whitened_spectrum(linear.weight.detach(), metric)


def released_spectrum(linear: Linear, xtx: Tensor) -> None:
    weight = linear.weight.detach()
    S, S_inverse = yardstick.whitened(xtx)
    yardstick.singular_values(weight, S)
    yardstick.factors(weight, S, S_inverse)


def orders(layers: list[tuple[Linear, Tensor]]) -> list[int]:
    """FLOPs of the symmetric eigenproblems: the smaller side of every linear, and H, once if shared, where that is the
    inputs'."""
    tall = {id(H): len(H) for x, H in layers if x.out_features > x.in_features}
    return [min(x.out_features, x.in_features) for x, _ in layers] + list(tall.values())


def eigenproblems(layers: list[tuple[Linear, Tensor]]) -> None:
    widest = max((H for _, H in layers), key=len)
    for n in orders(layers):
        torch.linalg.eigh(widest[:n, :n].double())


def product_flops(linear: Linear) -> float:
    """FLOPs of the products in whitened_spectrum, input metric; symmetric ones count as full, roots are left out."""
    out, n = linear.out_features, linear.in_features
    if out <= n:  # W H Wᵀ, Wᵀ c, W H Wᵀ c
        return 2 * out * n**2 + 2 * out**2 * n + 2 * out**2 * n + 2 * out**3
    return 2 * out * n**2 + 4 * n**3 + 2 * n**3 + 2 * out * n**2 + 2 * n**3


if __name__ == "__main__":
    main()
