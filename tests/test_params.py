"""params.yaml: the shipped file is valid, and every mistake is named with its key, its value and the rule."""

from pathlib import Path

import pytest
import yaml

from drank.project.dvc import LockError, parse_lock
from drank.project.params import ParamsError, read_params
from drank.project.plain_yaml import load
from drank.project.state import check_params

SHIPPED = Path(__file__).parent.parent / "params.yaml"


@pytest.fixture
def read(tmp_path):
    """Reads params.yaml from its text, or from a document."""

    def read(content):
        text = content if isinstance(content, str) else yaml.safe_dump(content)
        (tmp_path / "params.yaml").write_text(text)
        return read_params(tmp_path / "params.yaml")

    return read


def changed(key, value):
    """The shipped parameters with one value set; key is a path, value None removes it."""
    document = yaml.safe_load(SHIPPED.read_text())
    *parents, last = key.split("/")
    section = document
    for parent in parents:
        section = section[parent]
    if value is None:
        del section[last]
    else:
        section[last] = value
    return document


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
        ("covariance/processes", None, None),  # files older than a key
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
        ("covariance/gradient_clip", [0.1, 0.5], r"gradient_clip = \[0.1, 0.5\]; the rule: .* from 1 on"),
        ("covariance/gradient_margin", 0.1, "gradient_margin = 0.1, gradient_clip = None, .*; the rule"),
        ("covariance/gradient_clip", [0.1, 10.0], None),
        ("spectrum/kfac/sensitivity_scores", "divergence", "with units 'block', which ignores it"),
        ("spectrum/clipped", {"calibration_seed": 0, "metric": "kfac_clipped", "units": "matrix"},
         "spectrum.clipped: metric = 'kfac_clipped'; the rule: Metric `kfac_clipped` needs `covariance.gradient_clip`"),
        ("presets/mine", {"spectrum": "input", "allocation": "lems", "storage": "factors"}, "'lems' needs depth_slope"),
        ("presets/mine", {"spectrum": "input", "allocation": "lems", "storage": "factors", "depth_slope": 1.0},
         "presets.mine: allocation = 'lems', spectrum = 'input'; the rule: .* `sensitivity_scores: divergence`"),
        ("presets/d-rank/allocation", "efective_rank", "presets.d-rank.allocation"),
        ("sampling/n_windows", "many", "'sampling.n_windows' = 'many'"),
        ("sampling/held_out_share", 1.0, "held_out_share"),
        ("sampling/n_test_windows", "most", "'sampling.n_test_windows.literal.*' = 'most': Input should be 'whole' or"),
        ("sampling/test_begin", "line", "'sampling.test_begin' = 'line': Input should be 'window', 'document' or"),
        ("sampling/calibration_text", "nwes", "sampling.calibration_text = 'nwes' is not in section 'text'"),
        ("model/source", "SmolLM2", "model.source"),
        ("model/sha256", "bcc8", "model.sha256"),
        ("evaluation/processes", 1.5, "'evaluation.processes' = 1.5"),
        ("evaluation/tasks", ["last_word", ""], r"'evaluation.tasks.1' = ''.*at least 1 character"),
        ("covariance/targets", ["Linear", "re:("], r"covariance: re:\(: .*; the rule: Patterns behind `re:` are"),
        ("covariance/ignore", ["re:*"], r"covariance: re:\*: nothing to repeat"),
        ("model", None, "'model' is missing"),
    ],
)  # fmt: skip
def test_mistakes_are_named(read, key, value, message):
    if message is None:
        assert read(changed(key, value))
    else:
        with pytest.raises(ParamsError, match=message):
            read(changed(key, value))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", "not YAML"),
        ("- 1", "one section per step, found list"),
        ("", "found NoneType"),
        ("2026-11-30: 1", "date; keys are names"),
    ],
)
def test_files_that_hold_no_parameters_are_named(read, text, message):
    with pytest.raises(ParamsError, match=message):
        read(text)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ParamsError, match="not found; run from the folder"):
        read_params(tmp_path / "params.yaml")


def test_a_calibration_text_of_which_nothing_is_held_out_needs_another_to_test_on(read):
    document = changed("sampling/held_out_share", 0.0)
    assert read(document).sampling.held_out_share == 0
    del document["text"]["commons"]
    with pytest.raises(
        ParamsError, match="held_out_share = 0.0, sampling.calibration_text = 'news'; .* a second text to test on"
    ):
        read(document)


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
        ("80", "YAML reads this as int; write 'my-80'"),
        (80, "YAML reads this as int"),
        ("1e5", "'100000.0': .*letters, digits"),
        ("2026-11-30", "YAML reads this as date"),
        ("null", "YAML reads this as NoneType"),
        ("KFAC-80", "(?i:kfac-80 beside .*kfac-80); the rule: Names of a section differ in more"),
        ("135m_dense-2", None),
    ],
)
def test_a_name_that_another_program_or_a_file_system_would_refuse_is_refused_at_once(read, name, message):
    document = yaml.safe_load(SHIPPED.read_text())
    document["variants"][name] = document["variants"]["kfac-80"]
    if message is None:
        assert str(name) in read(document).variants
    else:
        with pytest.raises(ParamsError, match=f"(?s)variants.*{message}"):
            read(document)


@pytest.mark.parametrize("section", ["text", "spectrum", "presets"])
def test_names_of_every_section_follow_one_rule(read, section):
    document = yaml.safe_load(SHIPPED.read_text())
    document[section]["a.b"] = next(iter(document[section].values()))
    with pytest.raises(ParamsError, match=f"{section}.*write 'a-b' in its place"):
        read(document)


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


def test_factors_offered_in_comments_are_valid_once_the_hash_sign_is_gone(read):
    before, after = SHIPPED.read_text().split("`dvc repro` builds them.\n")
    before = before.replace(
        "\ncovariance:\n", "\ncovariance:\n  gradient_clip: [0.1, 10.0]\n"
    )  # as kfac-svd's comment says
    commented, rest = after.split("\n\n", 1)
    offered = "\n".join(line.removeprefix("#") for line in commented.splitlines())
    params = read(f"{before}`dvc repro` builds them.\n{offered}\n\n{rest}")
    needed = {preset.spectrum for preset in params.presets.values()}
    assert needed <= set(params.spectrum), "every preset can be used"
