"""params.yaml: the shipped file is valid, and every mistake is named with its key, its value and the rule."""

from functools import reduce

import pytest
import yaml

from drank.project.dvc import LockError, parse_lock
from drank.project.files import read_json
from drank.project.params import Params, ParamsError, read_params
from drank.project.plain_yaml import load
from drank.project.state import check_params
from tests.conftest import REPOSITORY

SHIPPED = REPOSITORY / "params.yaml"


COMMITTED = [SHIPPED, REPOSITORY / "study/params.yaml", *sorted((REPOSITORY / "experiments").glob("*.yaml"))]


def read(content):
    """Parameters from the text of params.yaml, or from a document."""
    return Params.parse((content if isinstance(content, str) else yaml.safe_dump(content)).encode(), "params.yaml")


def changed(key, value):
    """The shipped parameters with one value set; key is a path, value None removes it."""
    document = yaml.safe_load(SHIPPED.read_text())
    *parents, last = key.split("/")
    section = reduce(dict.__getitem__, parents, document)
    section[last] = value
    if value is None:
        del section[last]
    return document


@pytest.fixture(scope="module")
def validator():
    jsonschema = pytest.importorskip("jsonschema")
    schema = read_json(REPOSITORY / "docs/params.schema.json")
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("sampling/n_window", 3, "unknown key 'sampling.n_window' .value 3."),
        ("variants/d-rank-80/ratio", 0.8, "unknown key 'variants.d-rank-80.ratio'"),
        ("variants/d-rank-80/size_ratio", 0, "'variants.d-rank-80.size_ratio' = 0.* greater than 0"),
        ("variants/d-rank-80/size_ratio", 1.2, "'variants.d-rank-80.size_ratio' = 1.2.* less than or equal to 1"),
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
        ("variants/d-rank-80/size_ratio", "0.8", "size_ratio' = '0.8'.* valid number"),
        ("variants/d-rank-80/size_ratio", 1, None),
        ("presets/d-rank/beta", 1.0, "'presets.d-rank.beta' = 1.0: .*less than 1"),
        ("presets/d-rank/storage", None, "'presets.d-rank.storage' is missing"),
        ("presets/svd-llm/multiple_of", 8, None),
        ("spectrum/kfac/cuts", [0.0, 1.0], "'spectrum.kfac.cuts.1' = 1.0: .*less than 1"),
        ("sampling/calibration_seeds", [], "calibration_seeds' = .*at least 1 item"),
        ("sampling/calibration_seeds", [0, 1, 2], None),
        ("sampling/window_length", 1, "'sampling.window_length' = 1: .*greater than or equal to 2"),
        ("covariance/offload", "some", "'covariance.offload' = 'some': .*valid boolean"),
        ("covariance/targets", "re:.*", "'covariance.targets' = 're:.*': .*valid (array|tuple)"),
        ("evaluation/tasks", [], None),
        ("model/sha256", None, None),
    ],
)  # fmt: skip
def test_mistakes_are_named_and_the_schema_knows_all_but_rules_between_keys(validator, key, value, message):
    document = changed(key, value)
    if message is None:
        assert read(document)
        assert validator.is_valid(document)
    else:
        with pytest.raises(ParamsError, match=message) as error:
            read(document)
        assert validator.is_valid(document) == ("the rule: " in str(error.value))


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.relative_to(REPOSITORY).as_posix())
def test_committed_parameters_have_the_schema(validator, path):
    assert [error.message for error in validator.iter_errors(yaml.safe_load(path.read_text()))] == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", "not YAML"),
        ("- 1", "one section per step, found list"),
        ("", "found NoneType"),
        ("2026-11-30: 1", "keys must be str.* date"),
    ],
)
def test_files_that_hold_no_parameters_are_named(tmp_path, text, message):
    with pytest.raises(ParamsError, match="not found; run from the folder"):
        read_params(tmp_path / "params.yaml")
    with pytest.raises(ParamsError, match=message):
        read(text)


def test_a_calibration_text_of_which_nothing_is_held_out_needs_another_to_test_on():
    document = changed("sampling/held_out_share", 0.0)
    assert read(document).sampling.held_out_share == 0
    del document["text"]["commons"]
    with pytest.raises(ParamsError, match="share = 0.0, .*calibration_text = 'news'; .* a second text to test on"):
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
def test_a_name_that_another_program_or_a_file_system_would_refuse_is_refused_at_once(name, message):
    document = yaml.safe_load(SHIPPED.read_text())
    document["variants"][name] = document["variants"]["kfac-80"]
    if message is None:
        assert str(name) in read(document).variants
    else:
        with pytest.raises(ParamsError, match=f"(?s)variants.*{message}"):
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


@pytest.mark.parametrize("section", ["text", "spectrum", "presets"])
def test_names_of_every_section_follow_one_rule(section):
    with pytest.raises(ParamsError, match=f"{section}.*write 'a-b' in its place"):
        read(changed(f"{section}/a.b", {}))


def test_factors_offered_in_comments_are_valid_once_the_hash_sign_is_gone():
    before, after = SHIPPED.read_text().split("`dvc repro` builds them.\n")
    before = before.replace(
        "\ncovariance:\n", "\ncovariance:\n  gradient_clip: [0.1, 10.0]\n"
    )  # as kfac-svd's comment says
    commented, rest = after.split("\n\n", 1)
    offered = "\n".join(line.removeprefix("#") for line in commented.splitlines())
    params = read(f"{before}`dvc repro` builds them.\n{offered}\n\n{rest}")
    needed = {preset.spectrum for preset in params.presets.values()}
    assert needed <= set(params.spectrum), "every preset can be used"
