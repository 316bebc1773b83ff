"""Cost of covariances beside the passes that they watch. Ratio to the bare forward, or forward and backward, pass.

``python -m benchmarks.covariance_overhead``, in a project where ``dvc repro sampling`` ran. The limit is arithmetic: a
covariance of d channels takes d (d + 1) multiplications and additions a token if symmetry is used, 2 d² if not; a
linear takes 2 out·in.
"""

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from benchmarks.measure import arguments, begin, interleaved, print_table, ratios, seconds, shown
from drank.method.covariance import SecondMoment
from drank.model.capture import run_batches, split_windows, watching_inputs, watching_output_gradients
from drank.model.linears import Linear, find_linears, shared_inputs
from drank.model.precision import compute_dtype, has_units
from drank.project.files import read_tensors

Moments = dict[str, SecondMoment]
Add = Callable[[SecondMoment, Tensor], None]


def main() -> None:
    parser = arguments(__doc__, rounds=7)
    parser.add_argument("--windows", type=int, default=4)
    asked = parser.parse_args()
    begin(asked)
    windows = read_tensors(Path("data/sampling/calibration/0.safetensors"))["windows"][: asked.windows]
    model = AutoModelForCausalLM.from_pretrained("data/raw/model", dtype=compute_dtype("auto", "cpu")).eval()
    linears = find_linears(model, ["re:.*"])
    owners = shared_inputs(model, linears, windows[:1, :8])
    adding: dict[str, list[float]] = {"none": [], "gaussian": []}

    def timed(fisher: str) -> None:
        total = [0.0]

        def add(moment: SecondMoment, x: Tensor) -> None:
            total[0] += seconds(lambda: moment.add(x))

        collect(model, windows, linears, owners, fisher, add)
        adding[fisher].append(total[0])

    times = interleaved(
        {
            "forward": lambda: bare(model, windows, "none"),
            "forward, inputs seen": lambda: collect(model, windows, linears, owners, "none", ignore),
            "forward, covariances": lambda: timed("none"),
            "both ways": lambda: bare(model, windows, "gaussian"),
            "both ways, tensors seen": lambda: collect(model, windows, linears, owners, "gaussian", ignore),
            "both ways, covariances": lambda: timed("gaussian"),
        },
        asked.rounds,
    )
    tokens = windows.numel()
    print(f"{list(windows.shape)} tokens\n")
    rows = []
    for bare_name, fisher in (("forward", "none"), ("both ways", "gaussian")):
        seen = next(name for name in times if name.startswith(bare_name) and name.endswith("seen"))
        full = f"{bare_name}, covariances"
        products = tokens * covariance_flops(linears, owners, fisher)
        speed = [products / s / 1e9 for s in adding[fisher][-asked.rounds :]]
        passes = tokens * pass_flops(model, linears, fisher)
        rows.append(
            [
                bare_name, shown(times[bare_name]), shown(ratios(times, seen, bare_name)),
                shown(ratios(times, full, bare_name)), f"{products / passes:.2f}", f"{products / passes / 2:.2f}",
                shown(speed, digits=0), shown([passes / s / 1e9 for s in times[bare_name]], digits=0),
            ]
        )  # fmt: skip
    print_table(
        [
            "pass", "seconds", "with hooks that do nothing, ratio", "with covariances, ratio",
            "FLOPs of covariances / of linears", "the same, by symmetry", "GFLOP/s adding", "GFLOP/s of the bare pass",
        ],
        rows,
    )  # fmt: skip


def ignore(moment: SecondMoment, x: Tensor) -> None:
    """Hooks and the flattening of tensors, by themselves."""


def bare(model: Any, windows: Tensor, fisher: str, batch_windows: int = 4) -> None:
    for _ in run_batches(model, split_windows(windows, batch_windows), fisher):
        pass


def collect(
    model: Any,
    windows: Tensor,
    linears: list[Linear],
    owners: dict[str, str],
    fisher: str,
    add: Add = SecondMoment.add,
    batch_windows: int = 4,
) -> tuple[Moments, Moments]:
    """The middle of the stage covariance: the moments of inputs and of output gradients."""
    modules = {linear.name: linear.module for linear in linears}
    moment = partial(SecondMoment, bfloat16_units=has_units(torch.bfloat16, "cpu"))
    inputs = {x.name: moment(x.in_features) for x in linears if owners[x.name] == x.name}
    gradients = {x.name: moment(x.out_features, magnitudes=False) for x in linears if fisher != "none"}
    with ExitStack() as stack:
        stack.enter_context(watching_inputs({n: modules[n] for n in inputs}, lambda n, x: add(inputs[n], x)))
        stack.enter_context(
            watching_output_gradients({n: modules[n] for n in gradients}, lambda n, g: add(gradients[n], g))
        )
        bare(model, windows, fisher, batch_windows)
    return inputs, gradients


def covariance_flops(linears: list[Linear], owners: dict[str, str], fisher: str) -> int:
    """A token, without use of symmetry."""
    inputs = sum(2 * x.in_features**2 for x in linears if owners[x.name] == x.name)
    return inputs + (0 if fisher == "none" else sum(2 * x.out_features**2 for x in linears))


def pass_flops(model: Any, linears: list[Linear], fisher: str) -> int:
    """A token, of the linears and, where it runs, the output head; attention is left out."""
    forward = sum(2 * x.in_features * x.out_features for x in linears)
    if fisher == "none":
        return forward
    return 2 * (forward + 2 * model.get_output_embeddings().weight.numel())


if __name__ == "__main__":
    main()
