"""params.yaml: the shipped file is valid, and every mistake is named with its key, its value and the rule."""

from pathlib import Path

import pytest
import yaml

from drank.project.dvc import LockError, parse_lock
from drank.project.params import ParamsError, read_params
from drank.project.plain_yaml import load
from drank.project.state import check_params

SHIPPED = Path(__file__).parent.parent / "params.yaml"


def changed(tmp_path, key, value):
    """The shipped params.yaml with one value set; key is a dotted path, value None removes it."""
    document = yaml.safe_load(SHIPPED.read_text())
    *parents, last = key.split("/")
    section = document
    for parent in parents:
        section = section[parent]
    if value is None:
        del section[last]
    else:
        section[last] = value
    path = tmp_path / "params.yaml"
    path.write_text(yaml.safe_dump(document))
    return path


@pytest.mark.parametrize(
    ("key", "left_out"),
    [("covariance/processes", 1), ("covariance/offload", False), ("evaluation/processes", 1)],
)
def test_files_older_than_a_key_are_read_as_before(tmp_path, key, left_out):
    section, name = key.split("/")
    assert getattr(getattr(read_params(changed(tmp_path, key, None)), section), name) == left_out


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("sampling/n_window", 3, "unknown key 'sampling.n_window' .value 3."),
        ("variants/d-rank-80/ratio", 0.8, "unknown key 'variants.d-rank-80.ratio'"),
        ("variants/d-rank-80/size_ratio", 0, "'variants.d-rank-80.size_ratio' = 0.* greater than 0"),
        ("variants/d-rank-80/size_ratio", 1.2, "'variants.d-rank-80.size_ratio' = 1.2.* less than or equal to 1"),
        ("variants/d-rank-80/size_ratio", float("nan"), "size_ratio"),
        ("variants/d-rank-80/preset", "d-rnk", "preset = 'd-rnk' is not in section 'presets', which has asvd, "),
        ("variants/d-rank-80/spectrum", "kfac", "d-rank-80: spectrum = 'kfac', preset = 'd-rank'; the rule: "),
        ("variants/d-rank-80/spectrum", "kfca", "variants.d-rank-80.spectrum = 'kfca' is not in section 'spectrum'"),
        ("variants/..", {"preset": "dense", "spectrum": "input", "size_ratio": 1.0}, "variants"),
        ("presets/svd-llm/beta", 0.2, "svd-llm: beta = 0.2 with allocation 'uniform', .*: it goes with .* 'eff"),
        ("presets/d-rank/scores", "stable_rank", "scores = 'stable_rank' with allocation 'effective_rank'"),
        ("presets/asvd/scores", None, "presets.asvd: allocation 'sensitivity' needs scores, which is None"),
        ("presets/svd-llm/cap", 0.0, "'presets.svd-llm.cap' = 0.* greater than 0"),
        ("presets/svd-llm/floor", 0.5, None),
        ("presets/svd-llm", {"spectrum": "input", "allocation": "uniform", "storage": "factors", "floor": 0.5,
                             "cap": 0.4}, "presets.svd-llm: floor = 0.5, cap = 0.4; the rule: `floor` is below `cap`"),
        ("presets/svd", {"spectrum": "kfac", "allocation": "uniform", "storage": "pivot"}, "know no blocks"),
        ("presets/asvd/scores", "perplexity", None),  # a spectrum that is not there may measure them
        ("spectrum/input/alpha", 0.5, "alpha = 0.5 with metric 'input'"),
        ("spectrum/input/layers", 2, "layers = 2 with units 'matrix', which ignores it: it goes with units 'group'"),
        ("spectrum/kfac/cuts", [0.25, 0.5], r"kfac: cuts = \[0.25, 0.5\]; the rule: .* begin with 0.0 and rise"),
        ("spectrum/kfac/metric", "input", "gradient_damping = 0.1 with metric 'input', which ignores it"),
        ("spectrum/kfac/damping", 0.0, "units 'block' needs damping, which is 0.0"),
        ("presets/dense/multiple_of", 8, "multiple_of = 8 with allocation 'dense'"),
        ("variants", {}, "'variants' = .*at least 1 item"),
        ("presets/gptq-4/precision", 5, r"presets.gptq-4.precision.* = 5: Input should be 16, 8, 4, 3, 2 or 'mixed'"),
        ("presets/gptq-4/precision", 16, None),
        ("presets/int4/precision", 16, "rounding = 'nearest' with no precision, which ignores it: it goes with prec"),
        ("presets/svd/group_size", 32, "group_size = 32 with no precision"),
        ("presets/gptq-4/group_size", 0, "presets.gptq-4.group_size.* = 0: Input should be greater"),
        ("presets/gptq-4/rounding", "up", "presets.gptq-4.rounding.* = 'up': Input should be 'feedback' or 'nearest'"),
        ("presets/gptq-4/embedding_bits", 4, "presets.gptq-4.embedding_bits.* = 4: Input should be 8 or 16"),
        ("presets/kfac-aligned/precision", 8, None),
        ("presets/d-rank-released/storage", "pivot", "storage = 'pivot', allocation = 'released'"),
        ("presets/asvd/dense_option", False, "dense_option = False with allocation 'sensitivity'"),
        ("spectrum/input/sensitivity_windows", 2, r"sensitivity_windows = 2, sensitivity_ratios = \[\]; .* needs both"),
        ("spectrum/input/calibration_seed", 7, "spectrum.input: calibration_seed = 7; .*: add it there"),
        ("covariance/fisher", "none", "spectrum.kfac: metric = 'kfac'; the rule: Metric `kfac` needs output gradients"),
        ("covariance/fisher_windows", 999, "covariance.fisher_windows = 999, .* sampling.n_windows = 24; the rule"),
        ("presets/d-rank/allocation", "efective_rank", "presets.d-rank.allocation"),
        ("sampling/n_windows", "many", "'sampling.n_windows' = 'many'"),
        ("sampling/held_out_share", 1.0, "held_out_share"),
        ("sampling/n_test_windows", "most", "'sampling.n_test_windows.literal.*' = 'most': Input should be 'whole' or"),
        ("sampling/test_begin", "line", "'sampling.test_begin' = 'line': Input should be 'window', 'document' or"),
        ("sampling/calibration_text", "nwes", "sampling.calibration_text = 'nwes' is not in section 'text'"),
        ("model/source", "SmolLM2", "model.source"),
        ("model/sha256", "bcc8", "model.sha256"),
        ("evaluation/processes", 1.5, "'evaluation.processes' = 1.5"),
        ("model", None, "'model' is missing"),
    ],
)  # fmt: skip
def test_mistakes_are_named(tmp_path, key, value, message):
    if message is None:
        assert read_params(changed(tmp_path, key, value))
    else:
        with pytest.raises(ParamsError, match=message):
            read_params(changed(tmp_path, key, value))


@pytest.mark.parametrize(
    ("text", "message"),
    [("a: [", "not YAML"), ("- 1", "one section per step, found list"), ("", "found NoneType")],
)
def test_files_that_hold_no_parameters_are_named(tmp_path, text, message):
    path = tmp_path / "params.yaml"
    path.write_text(text)
    with pytest.raises(ParamsError, match=message):
        read_params(path)


def test_a_calibration_text_of_which_nothing_is_held_out_needs_another_to_test_on(tmp_path):
    path = changed(tmp_path, "sampling/held_out_share", 0.0)
    assert read_params(path).sampling.held_out_share == 0
    document = yaml.safe_load(path.read_text())
    del document["text"]["commons"]
    path.write_text(yaml.safe_dump(document))
    with pytest.raises(
        ParamsError, match="held_out_share = 0.0, sampling.calibration_text = 'news'; .* a second text to test on"
    ):
        read_params(path)


def test_what_dvc_writes_for_a_small_number_is_read_as_that_number(tmp_path):
    """``dvc exp run -S spectrum.kfac.damping=0.00001`` writes 1e-05, to params.yaml and to dvc.lock."""
    from dvc.utils.serialize import dumps_yaml, modify_yaml

    path = tmp_path / "params.yaml"
    path.write_text(SHIPPED.read_text())
    with modify_yaml(path) as document:
        document["spectrum"]["kfac"]["damping"] = 0.00001
        document["text"]["no"] = {"source": "local:on", "column": "yes"}
    assert "damping: 1e-05" in path.read_text()
    params = read_params(path)
    assert params.spectrum["kfac"].damping == 1e-05
    assert params.text["no"].column == "yes"

    written = load(path.read_text())
    row = {"params": {"params.yaml": {key: written[key] for key in ("spectrum", "text")}}}
    stages = parse_lock(dumps_yaml({"stages": {"spectrum": row}}), "dvc.lock")
    assert stages["spectrum"] == row
    check_params(stages, written, "params.yaml")
    written["spectrum"]["kfac"]["damping"] = 2e-05
    with pytest.raises(LockError, match="spectrum.kfac.damping is 2e-05, but spectrum ran with 1e-05"):
        check_params(stages, written, "params.yaml")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("svd-llm-0.8", "DVC reads a dot as the way to a key; write 'svd-llm-0-8' in its place"),
        ("kfac/80", "letters, digits.*; write 'kfac-80'"),
        ("k" * 65, "1 to 64 letters"),
        ("größe", "letters, digits.*; write 'gr-e'"),
        ("AUX", "Windows keeps this name for a device; write 'my-AUX'"),
        ("lpt1", "Windows keeps this name for a device"),
        ("80", "YAML reads this as int; write 'my-80'"),
        (80, "YAML reads this name as int; begin it with a letter"),
        ("1e5", "YAML reads this name as float"),
        ("2026-11-30", "YAML reads this as date"),
        ("null", "YAML reads this as NoneType"),
        (
            "SVD-LLM-80",
            "(?i:svd-llm-80 beside .*svd-llm-80); the rule: Names of a section differ in more",
        ),
        ("135m_dense-2", None),
    ],
)
@pytest.mark.parametrize("section", ["text", "spectrum", "presets", "variants"])
def test_a_name_that_another_program_or_a_file_system_would_refuse_is_refused_at_once(tmp_path, section, name, message):
    document = yaml.safe_load(SHIPPED.read_text())
    first = "svd-llm-80" if name == "SVD-LLM-80" else next(iter(document[section]))
    entry = next(iter(document[section].values()))
    document[section] |= {first: document[section].get(first, entry), name: entry}
    path = tmp_path / "params.yaml"
    path.write_text(yaml.safe_dump(document))
    if message is None:
        assert str(name) in getattr(read_params(path), section)
    else:
        with pytest.raises(ParamsError, match=f"(?s){section}.*{message}"):
            read_params(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ParamsError, match="not found; run from the folder"):
        read_params(tmp_path / "params.yaml")


def test_unknown_variants_factors_and_draws_are_named_with_those_there_are():
    params = read_params(SHIPPED)
    with pytest.raises(ParamsError, match="no variant 'd-rnk-80' .* d-rank-80"):
        params.variant("d-rnk-80")
    assert params.factors("kfac").metric == "kfac"
    with pytest.raises(ParamsError, match=r"no spectrum '\.\./kfac' .* it has: .*kfac"):
        params.factors("../kfac")
    params.check_seed("0")
    for seed in ("00", "-1", "../0", ""):
        with pytest.raises(ParamsError, match=f"no calibration seed '{seed}' .* has: 0"):
            params.check_seed(seed)


def test_factors_offered_in_comments_are_valid_once_the_hash_sign_is_gone(tmp_path):
    before, after = SHIPPED.read_text().split("`dvc repro` builds them.\n")
    commented, rest = after.split("\n\n", 1)
    offered = "\n".join(line.removeprefix("#") for line in commented.splitlines())
    path = tmp_path / "params.yaml"
    path.write_text(f"{before}`dvc repro` builds them.\n{offered}\n\n{rest}")
    params = read_params(path)
    needed = {preset.spectrum for preset in params.presets.values()}
    assert needed <= set(params.spectrum), "every preset can be used"
