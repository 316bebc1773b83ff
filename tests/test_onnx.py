"""ONNX folders: ONNX Runtime and onnxruntime-genai predict what the compressed folder predicts."""

import numpy as np
import pytest
import torch

from drank.serving.graph import GraphError
from drank.serving.onnx import write
from tests import graphs

REASON = "not installed: pip install 'drank[onnx]'"
onnx = pytest.importorskip("onnx", reason=REASON)
pytest.importorskip("onnxscript", reason=REASON)
onnxruntime = pytest.importorskip("onnxruntime", reason=REASON)
onnxruntime_genai = pytest.importorskip("onnxruntime_genai", reason=REASON)

PROVENANCE = {"drank.variant": "kfac-80", "drank.allocation_sha256": "0" * 64}
N = 8


@pytest.fixture(scope="module", params=graphs.MODELS)
def folder(request, tmp_path_factory):
    return graphs.write(request.param, tmp_path_factory.mktemp("compressed"))


@pytest.fixture(scope="module")
def graph(folder, tmp_path_factory):
    written = tmp_path_factory.mktemp("onnx")
    write(folder, written, provenance=PROVENANCE)
    return written


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return graphs.write("llama", tmp_path_factory.mktemp("llama"))


class Session:
    """A graph in ONNX Runtime, and heads and width of its cached tensors by name."""

    def __init__(self, folder):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = 1, 3
        self.session = onnxruntime.InferenceSession(folder / "model.onnx", options, providers=["CPUExecutionProvider"])
        cached = [i for i in self.session.get_inputs() if i.name.startswith("past_key_values.")]
        self.shapes = {i.name: (i.shape[1], i.shape[3]) for i in cached}
        self.dtype = np.float16 if cached[0].type == "tensor(float16)" else np.float32

    def __call__(self, inputs):
        return self.session.run(None, inputs)


def by_genai(folder, ids, n):
    """Token ids by onnxruntime-genai, from the folder alone."""
    model = onnxruntime_genai.Model(str(folder))
    asked = onnxruntime_genai.GeneratorParams(model)
    asked.set_search_options(max_length=ids.shape[1] + n, min_length=ids.shape[1] + n, do_sample=False)
    generator = onnxruntime_genai.Generator(model, asked)
    generator.append_tokens(ids.numpy().astype(np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    return generator.get_sequence(0).tolist()[ids.shape[1] :]


@torch.no_grad()
def test_both_runtimes_give_the_tokens_of_generate_from_factors_that_no_one_multiplied_out(folder, graph):
    ids = graphs.prompt()
    expected = graphs.generated(folder, ids, N)
    run = Session(graph)
    assert graphs.greedy(run, run.shapes, ids, N) == expected
    assert by_genai(graph, ids, N) == expected
    logits = run(graphs.feed(run.shapes, ids))[0]
    np.testing.assert_allclose(logits[:, 0], graphs.loaded(folder)(ids).logits[:, -1], rtol=1e-5, atol=2e-5)
    saved = onnx.load(graph / "model.onnx")
    assert {entry.key: entry.value for entry in saved.metadata_props}.items() >= PROVENANCE.items()
    sizes = {tuple(each.dims) for each in saved.graph.initializer}
    assert (32, 9) in sizes  # q: its inner product, of rank 9
    assert "quantization_config" not in (graph / "config.json").read_text()


@torch.no_grad()
def test_texts_of_two_lengths_in_one_pass(llama, tmp_path):
    write(llama, tmp_path, provenance={})
    run, long, short = Session(tmp_path), graphs.prompt(9), graphs.prompt(4)
    ids = torch.cat([long, torch.cat([torch.zeros(1, 5, dtype=torch.long), short], 1)])
    mask = np.ones((2, 9), np.int64)
    mask[1, :5] = 0
    logits = run(graphs.feed(run.shapes, ids, mask=mask))[0]
    model = graphs.loaded(llama)
    for found, alone in zip(logits, (long, short), strict=True):
        np.testing.assert_allclose(found, model(alone).logits[0, -1:], rtol=1e-5, atol=2e-5)


@torch.no_grad()
@pytest.mark.parametrize(("options", "limit"), [({"int8": True}, 0.05), ({"bits": 16}, 0.01)])
def test_int8_and_float16_are_close_and_smaller(llama, tmp_path, options, limit):
    for name, how in (("plain", {}), ("small", options)):
        (tmp_path / name).mkdir()
        write(llama, tmp_path / name, **how, provenance={})
    run, ids = Session(tmp_path / "small"), graphs.prompt()
    logits = run(graphs.feed(run.shapes, ids, dtype=run.dtype))[0][:, 0].astype(np.float32)
    assert 0 < graphs.error(logits, graphs.loaded(llama)(ids).logits[:, -1].numpy()) < limit
    sizes = [(tmp_path / name / "model.onnx.data").stat().st_size for name in ("plain", "small")]
    assert sizes[1] < 0.6 * sizes[0]
    assert len(by_genai(tmp_path / "small", ids, N)) == N


def test_bfloat16_is_refused(llama, tmp_path):
    with pytest.raises(GraphError, match="bits is 8; a graph has floating-point numbers of 32 or 16 bits"):
        write(llama, tmp_path, bits=8, provenance={})
    assert not list(tmp_path.iterdir())
