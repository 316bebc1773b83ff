"""One budget in bytes: bits, ranks and channels compete. By hand, brute force, degenerate budgets, errors."""

from dataclasses import replace
from itertools import pairwise, product

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from drank.method.allocation.knapsack import InfeasibleBudgetError
from drank.method.allocation.rules import least_loss
from drank.method.allocation.units import Block, Menu, Unit, budget_of, loss
from drank.method.precisions import FULL, bytes_of
from drank.project.params import ParamsError, Preset, Variant, read_params
from drank.steps.allocation import HEADER, allocation
from tests.conftest import REPOSITORY

BITS = (2, 4, 8, FULL)
MIXED = Menu("pivot", bits=BITS, group=8, in_bytes=True)


def unit(name, shape, energies, rounding, base_loss=0.0):
    energies = np.sort(np.array(energies, dtype=float))[::-1].copy()
    return Unit(name, "up_proj", "up", 0, *shape, energies, 1.0, base_loss, rounding)


def test_by_hand():
    """Two matrices of 4 x 8 in groups of 8 inputs, budget for 4 bits in both: the second takes 8 bits, the first 2.

    A row of 8 takes b bytes of integers, 2 of scale and 1 of zero point: 4 rows 20, 28 and 44 bytes at 2, 4 and 8 bits,
    and 64 at 16.
    """
    sizes = [bytes_of("dense", 4, 8, 0, bits, 8) for bits in BITS]
    assert sizes == [20, 28, 44, 64]
    units = [
        unit("cheap", (4, 8), np.full(4, 100.0), {2: 0.5, 4: 0.2, 8: 0.01}),
        unit("dear", (4, 8), np.full(4, 100.0), {2: 9.0, 4: 4.0, 8: 1.0}),
    ]
    found = least_loss(units, 65 / 128, MIXED)
    assert {name: (c.form, c.bits) for name, c in found.choices.items()} == {
        "cheap": ("dense", 2),
        "dear": ("dense", 8),
    }
    assert found.objective == pytest.approx(1.5)
    assert (found.bytes_budget, found.budget, found.price) == (65, 64, 64)


def random_units(seed):
    """A matrix, and an MLP of two matrices at two numbers of channels."""
    rng = np.random.default_rng(seed)

    def made(name, shape, base_loss=0.0):
        first = rng.uniform(0.1, 30)
        rounding = {bits: first * 4.0**-bits * rng.uniform(0.5, 2) for bits in BITS[:-1]}
        return unit(name, shape, rng.uniform(0.1, 10, min(shape)), rounding, base_loss)

    cuts = tuple((made("up", (m, 5)), made("down", (5, m), base_loss)) for m, base_loss in ((6, 0.0), (4, 3.0)))
    return [made("matrix", (4, 7)), Block("mlp", cuts)]


def every_choice(units, menu):
    """(bytes, loss) of all combinations of cut, form, rank and bits."""
    for cuts in product(*(u.cuts for u in units)):
        options = []
        for m in (m for cut in cuts for m in cut):
            ranks = [*menu.ranks(m).tolist(), None]
            options.append(
                [
                    (
                        int(menu.weight(m, k, bits)),
                        m.base_loss + (0 if k is None else m.energies[k:].sum()) + float(m.rounded(k, bits)),
                    )
                    for k in ranks
                    for bits in menu.bits
                ]
            )
        for pick in product(*options):
            yield sum(size for size, _ in pick), sum(lost for _, lost in pick)


def size_of(found, units, menu):
    """Bytes of all choices, from the definition."""
    chosen = [(m, found.choices[m.name]) for m in found.matrices(units)]
    return sum(bytes_of(c.form, m.out_features, m.in_features, c.rank, c.bits, menu.group) for m, c in chosen)


@given(st.integers(0, 10_000), st.floats(0.3, 1.0), st.sampled_from(["factors", "pivot"]))
@settings(max_examples=30, deadline=None)
def test_against_brute_force(seed, share, storage):
    units, menu = random_units(seed), replace(MIXED, storage=storage, multiple_of=2)
    budget = budget_of(units, share, in_bytes=True)
    best = min((lost for size, lost in every_choice(units, menu) if size <= budget), default=None)
    if best is None:
        with pytest.raises(InfeasibleBudgetError):
            least_loss(units, share, menu)
        return
    found = least_loss(units, share, menu)
    matrices = found.matrices(units)
    assert size_of(found, units, menu) <= budget == found.bytes_budget
    assert found.bound - 1e-9 <= best <= found.objective + 1e-9
    assert found.objective == pytest.approx(sum(loss(m, found.choices[m.name]) for m in matrices))
    assert found.price == sum(found.choices[m.name].price for m in matrices)


@given(st.integers(0, 1000), st.lists(st.floats(0.4, 1), min_size=2, max_size=5))
@settings(max_examples=30, deadline=None)
def test_the_bound_falls_with_the_budget(seed, shares):
    units = random_units(seed)
    bounds = [least_loss(units, share, MIXED).bound for share in sorted(shares)]
    assert all(first >= second - 1e-9 for first, second in pairwise(bounds))


def test_the_whole_budget_loses_nothing_and_the_least_takes_the_smallest_of_everything():
    units = random_units(0)
    whole = least_loss(units, 1.0, MIXED)
    assert (whole.objective, whole.kept_ratio, {c.bits for c in whole.choices.values()}) == (0.0, 1.0, {FULL})
    sizes = [size for size, _ in every_choice(units, MIXED)]
    least = min(sizes) / budget_of(units, 1.0, in_bytes=True)
    found = least_loss(units, least + 1e-9, MIXED)
    assert size_of(found, units, MIXED) == min(sizes)
    with pytest.raises(InfeasibleBudgetError) as refused:
        least_loss(units, least - 0.01, MIXED)
    assert refused.value.least == min(sizes)


PRESET = Preset(spectrum="s", allocation="least_loss", storage="pivot", precision="mixed", group_size=8)
ROUNDING = {"2": 9.0, "4": 4.0, "8": 1.0}


def described(**size):
    """The allocation step on two matrices of 4 x 8 beside 1000 numbers in bfloat16 and 20 embeddings of 8."""
    rows = [
        {
            "name": name, "members": [name], "factors": name, "kind": "up_proj", "role": "up", "layer": layer,
            "out_features": 4, "in_features": 8, "effective_rank": 1.0, "base_loss": 0.0, "rounding": ROUNDING,
        }
        for layer, name in enumerate("ab")
    ]  # fmt: skip
    rest = {"embeddings": [[20, 8]], "others": 1000}
    summary = {"units": rows, "blocks": [], "rest": rest, "computed_in": {}, "left_dense": []}
    values = {name: np.full(4, 10.0) for name in "ab"}
    return allocation("v", Variant(preset="mixed", spectrum="s", **size), PRESET, values, summary)


OUTSIDE = 2 * (1000 + 20 * 8) + 2 * HEADER


def test_the_document_has_bits_and_bytes_and_the_sizes_that_were_asked():
    found = described(bytes_ratio=0.57)
    assert (found["bytes_budget"], found["bytes"]) == (72, 72)
    rows = found["units"]
    assert sorted((row["form"], row["bits"], row["bytes"]) for row in rows) == [("dense", 4, 28), ("dense", 8, 44)]
    assert found["bytes_ratio"] == 0.57
    assert not {"size_ratio", "megabytes"} & found.keys()
    assert (found["budget"], found["price"], found["kept_ratio"]) == (64, 64, 1.0)
    assert sorted(row["relative_loss"] for row in rows) == [1 / 400, 4 / 400]
    in_megabytes = described(megabytes=(OUTSIDE + 72) / 1e6)
    assert in_megabytes["units"] == rows


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ({"bytes_ratio": 0.05}, "bytes_ratio 0.05: the smallest .* take 40 bytes, .*; raise bytes_ratio to 0.3125"),
        ({"megabytes": 0.001}, r"megabytes 0.001: .*; raise megabytes to 0\.0044"),
    ],
)
def test_a_budget_that_is_too_small_names_the_nearest_that_is_not(size, message):
    with pytest.raises(InfeasibleBudgetError, match=message):
        described(**size)
    if "bytes_ratio" in size:
        assert described(bytes_ratio=0.3125)["bytes"] == 40


@pytest.mark.parametrize(
    ("sizes", "preset", "spectrum", "message"),
    [
        ({}, {}, {}, "size_ratio = None, bytes_ratio = None, megabytes = None; .* has one size"),
        ({"size_ratio": 0.5, "megabytes": 60.0}, {}, {}, "size_ratio = 0.5, .* megabytes = 60.0; .* has one size"),
        ({"megabytes": 0.0}, {}, {}, "greater than 0"),
        ({"bytes_ratio": 1.5}, {}, {}, "less than or equal to 1"),
        ({"size_ratio": 0.5}, {}, {}, "Precision `mixed` needs a size in bytes"),
        ({"bytes_ratio": 0.5}, {}, {"bits": None}, "needs a spectrum that has `bits`"),
        ({"bytes_ratio": 0.5}, {"precision": 8}, {}, "those of the preset's `precision` among them"),
        ({"bytes_ratio": 0.5}, {"allocation": "uniform"}, {"units": "matrix"}, "goes with allocation `least_loss`"),
        ({"bytes_ratio": 0.5}, {"storage": "factors"}, {}, "Precision `mixed` goes with storage `pivot`"),
        ({"bytes_ratio": 0.5}, {"precision": 5}, {}, "precision"),
        ({"bytes_ratio": 0.5}, {}, {"bits": [4, 3]}, r"bits = \[4, 3\]; the rule: `bits` rise"),
        (
            {"bytes_ratio": 0.5},
            {},
            {"group_size": 64},
            "mixed: group_size = 128, .* has the `group_size` of its spectrum",
        ),
        ({"bytes_ratio": 0.5}, {}, {"bits": [1]}, "greater than or equal to 2"),
        ({"bytes_ratio": 0.5}, {}, {"bits": []}, "at least 1 item"),
        ({"bytes_ratio": 0.5}, {}, {"metric": "input", "units": "matrix"}, "bits = .* with metric 'input'"),
        ({"bytes_ratio": 0.5}, {}, {}, None),
        ({"megabytes": 60}, {"precision": 4}, {}, None),
        ({"bytes_ratio": 0.5}, {"precision": 16}, {}, None),
        ({"size_ratio": 0.5}, {"precision": 4}, {"bits": None}, None),
    ],
)
def test_mistakes_are_named(tmp_path, sizes, preset, spectrum, message):
    document = yaml.safe_load((REPOSITORY / "params.yaml").read_text())
    asked = {"calibration_seed": 0, "metric": "kfac", "units": "block", "damping": 1e-4, "cuts": [0.0, 0.5]}
    asked |= {"bits": [3, 4], "group_size": 128} | spectrum
    if asked["bits"] is None:
        del asked["group_size"]
    if asked["units"] == "matrix":
        del asked["cuts"]
    document["spectrum"]["kfac-bits"] = {key: value for key, value in asked.items() if value is not None}
    document["presets"]["mixed"] |= preset
    if preset.get("precision") == FULL:
        del document["presets"]["mixed"]["group_size"]
    if document["presets"]["mixed"]["allocation"] != "least_loss":
        document["presets"]["mixed"]["precision"] = 4
    document["variants"]["small"] = {"preset": "mixed", "spectrum": "kfac-bits", **sizes}
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(document))
    if message is None:
        assert read_params(tmp_path / "params.yaml").variant("small")[0].size == sizes
    else:
        with pytest.raises(ParamsError, match=f"(?s){message}"):
            read_params(tmp_path / "params.yaml")
