"""`drank bench`: what is counted, in which order, and what comes out. No test looks at how long anything took."""

import inspect
import itertools
import json
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from multiprocessing import get_context

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from drank.cli import commands
from drank.cli.bench import BenchError, find_models
from drank.model.benchmark import FIGURES, BenchmarkError, Subject, peak_memory, quartiles, round_robin
from drank.project.params import ParamsError
from drank.project.processes import ProcessError
from drank.views.speed import SHOWN, table
from tests import compressed, tiny

WINDOWS = torch.arange(36).reshape(3, 12)
PARTS = ("prefill", "generation", "forward")


def clock_of(*times):
    return iter(times).__next__


def subject(model=None, windows=WINDOWS, new_tokens=4, **options):
    return Subject(model or tiny.llama(), windows, new_tokens, **options)


def test_quartiles_by_hand():
    for samples, expected in (
        ([4.0, 1.0, 3.0, 2.0, 5.0], (2.0, 3.0, 4.0)),
        ([1.0, 2.0], (1.25, 1.5, 1.75)),
        ([7.0], (7.0, 7.0, 7.0)),
    ):
        assert quartiles(samples) == dict(zip(("lower", "median", "upper"), expected, strict=True))


def test_round_robin_takes_turns_and_drops_the_first_round():
    calls, rounds = [], []

    def case(name):
        return lambda: calls.append(name) or len(calls)

    found = round_robin({name: case(name) for name in "abc"}, 2, lambda rows: rounds.extend(rows) or rows)
    assert "".join(calls) == "abcabcabc"
    assert found == {"a": [4, 7], "b": [5, 8], "c": [6, 9]}
    assert rounds == [0, 1, 2]


def test_figures_by_hand_from_a_clock_of_ours():
    """12 tokens in 2 s; 4 new ones after 5, 6, 8 and 11 s, the prompt before them; 3 windows of 12 tokens in 4 s."""
    timed = subject(clock=clock_of(10.0, 12.0, 0.0, 1.0, 5.0, 6.0, 8.0, 11.0, 100.0, 104.0))
    assert timed("prefill") == {"prefill": 6.0}
    assert timed("generation") == {"first_token": 5.0, "decode": 3 / 6}
    assert timed("forward") == {"forward_only": 9.0}
    with pytest.raises(StopIteration):
        timed.clock()


@pytest.mark.parametrize("make", [tiny.llama, tiny.gpt2])
def test_what_the_model_is_asked(make):
    """Prefill fills a cache and gives one row of logits; the forward-only pass has all logits and no cache."""
    model, passes = make(), []
    forward = model.forward

    def watched(*arguments, **options):
        done = forward(*arguments, **options)
        ids = arguments[0] if arguments else options["input_ids"]
        passes.append((tuple(ids.shape), tuple(done.logits.shape[:2]), done.past_key_values is not None))
        return done

    watched.__signature__ = inspect.signature(forward)
    model.forward = watched
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    timed = subject(model)
    for part in PARTS:
        timed(part)
    prefill, decoding, plain = ((1, 12), (1, 1), True), ((1, 1), (1, 1), True), ((3, 12), (3, 12), False)
    assert passes == [prefill, prefill, decoding, decoding, decoding, plain]
    # The model is left as it was.
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


def test_the_end_of_text_does_not_end_a_generation():
    """A model whose every next token is the end of text, were that not barred."""
    model = tiny.llama(eos_token_id=7)
    with torch.no_grad():
        model.lm_head.weight.zero_()[7] = 1
        model.model.norm.weight.zero_()
    model.generation_config.eos_token_id = list(range(319))
    ticks = itertools.count(0.0)
    assert subject(model, new_tokens=9, clock=ticks.__next__)("generation") == {"first_token": 2.0, "decode": 1.0}
    assert next(ticks) == 11.0  # the start, the prompt, and nine tokens


def grown():
    cpu = torch.device("cpu")
    start = peak_memory(cpu)
    for _ in range(3):
        torch.ones(200_000_000, dtype=torch.uint8)
    return peak_memory(cpu) - start


def test_peak_memory_counts_what_was_freed():
    """In a process of its own, where nothing else has grown before; 200 MB at once count, one after another too."""
    with ProcessPoolExecutor(1, get_context("fork")) as process:
        assert 190_000_000 < process.submit(grown).result() < 300_000_000


def test_a_prompt_must_fit():
    subject(windows=torch.zeros(2, 252, dtype=torch.long))
    with pytest.raises(BenchmarkError, match="253 tokens and 4 new ones, but the model has 256 positions"):
        subject(windows=torch.zeros(1, 253, dtype=torch.long))


# The command

SMALL = ("--prompt-tokens", "16", "--new-tokens", "4", "--repeats", "3", "--threads", "1")


def bench(root, *arguments):
    """Output of the command; its error, if it has one, is raised."""
    done = CliRunner().invoke(commands, ["bench", "--root", str(root), "--device", "cpu", *arguments])
    if done.exception:
        raise done.exception
    return done.output


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A root with the params.yaml of `tiny`, the folders of two of its variants, and a folder of a larger model."""
    root = tmp_path_factory.mktemp("folders")
    (root / "params.yaml").write_text(tiny.PARAMS)
    tiny.llama().to(torch.bfloat16).save_pretrained(root / "data/models/dense")
    compressed.write(tiny.llama(), compressed.LLAMA, root / "data/models/kfac-80")
    tiny.llama(intermediate_size=4096).save_pretrained(root / "elsewhere/larger")
    (root / "empty").mkdir()
    return root


def test_a_name_is_a_folder_or_else_a_variant_and_ratios_are_to_the_dense_one(folders):
    larger, models = folders / "elsewhere/larger", folders / "data/models"
    expected = {str(larger): larger, "kfac-80": models / "kfac-80", "dense": models / "dense"}
    assert find_models(folders, [str(larger), "kfac-80", "dense", "kfac-80"]) == (expected, "dense")
    assert find_models(folders, ["kfac-80", str(larger)])[1] == "kfac-80"  # the first, without a dense one


@pytest.mark.parametrize(
    ("names", "error", "message"),
    [
        (["kfac-8"], ParamsError, "no variant 'kfac-8' in params.yaml; it has: dense, svd-llm-80"),
        ([], BenchError, "data/models/svd-llm-80: not the folder of a model.*fetch a variant with `dvc checkout`"),
        (["{root}/empty"], BenchError, "empty: not the folder of a model: it has no config.json"),
        (["{root}/nowhere"], BenchError, "nowhere: not the folder of a model"),
        (["dense", "--prompt-tokens", "240"], BenchmarkError, "240 tokens and 32 new ones.* has 256 positions"),
        *([(["dense", "--device", "cuda"], ProcessError, "finds no GPU")] if not torch.cuda.is_available() else []),
    ],
)
def test_mistakes_are_told(folders, names, error, message):
    with pytest.raises(error, match=message):
        bench(folders, *(name.format(root=folders) for name in names))


@pytest.fixture(scope="module")
def timed(folders):
    """Output and document of the command about a dense variant, a compressed one and, before both, a larger model."""
    arguments = (str(folders / "elsewhere/larger"), "dense", "kfac-80", *SMALL, "--dtype", "float32")
    output = bench(folders, *arguments, "--json", str(folders / "new/b.json"))
    return output, json.loads((folders / "new/b.json").read_text())


def test_the_document_is_complete(timed, folders):
    document, larger = timed[1], str(folders / "elsewhere/larger")
    assert document["reference"] == "dense"
    assert document["folders"][larger] == larger
    assert document["conditions"] == {
        "device": "cpu", "dtype": "float32", "threads": 1, "prompt_tokens": 16, "new_tokens": 4, "batch_size": 4,
        "repeats": 3,
    }  # fmt: skip
    assert document["environment"]["torch"] == version("torch")
    assert document["environment"]["device"]
    assert set(document["units"]) == set(SHOWN)
    dense = document["models"]["dense"]
    for name, figures in document["models"].items():
        assert set(figures) == set(SHOWN)
        for figure in FIGURES:
            value = figures[figure]
            assert len(value["samples"]) == 3
            assert min(value["samples"]) > 0
            assert value["median"] == sorted(value["samples"])[1]
            by_round = [a / b for a, b in zip(value["samples"], dense[figure]["samples"], strict=True)]
            assert value["over_reference"]["median"] == sorted(by_round)[1]
        weights = [file.stat().st_size for file in (folders / document["folders"][name]).glob("*.safetensors")]
        assert figures["disk"]["median"] == sum(weights)
    # 2 layers x 3 matrices x 32 x (4096 - 64) more in float32, which the file has and memory must hold at once.
    extra = 4 * 2 * 3 * 32 * (4096 - 64)
    assert document["models"][larger]["memory"]["median"] - dense["memory"]["median"] > 0.5 * extra
    assert dense["memory"]["over_reference"]["median"] == dense["disk"]["over_reference"]["median"] == 1.0


def test_the_table_tells_ratios_and_figures(timed):
    output, document = timed
    decode = document["models"]["kfac-80"]["decode"]
    ratio = decode["over_reference"]
    assert f"x{ratio['median']:.2f} [{ratio['lower']:.2f}, {ratio['upper']:.2f}]" in output
    assert f"{decode['median']:,.1f}" in output
    assert f"{1000 * document['models']['kfac-80']['first_token']['median']:,.0f}" in output
    assert "x: ratio to dense within a round, median [quartiles] of 3 rounds" in output
    assert "Memory: growth of the peak resident memory" in output


def test_a_name_is_shown_as_it_is(timed):
    """A folder may be called what rich takes for its markup."""
    figures = timed[1]["models"]["dense"]
    console = Console(width=140)
    with console.capture() as capture:
        console.print(table({"models": {"a[/b]": figures, "[red]c": figures}}))
    assert "a[/b]" in capture.get()
    assert "[red]c" in capture.get()
