"""OpenVINO folders predict what the compressed folder predicts."""

import pytest
import torch

from drank.serving import onnx
from drank.serving.openvino import convert
from tests import graphs

REASON = "not installed: pip install 'drank[openvino]'"
openvino = pytest.importorskip("openvino", reason=REASON)
for name in ("onnx", "onnxscript", "nncf"):
    pytest.importorskip(name, reason=REASON)

PROVENANCE = {"variant": "kfac-80", "allocation_sha256": "0" * 64}
N = 8


@pytest.fixture(scope="module", params=graphs.MODELS)
def folder(request, tmp_path_factory):
    return graphs.write(request.param, tmp_path_factory.mktemp("compressed"))


@pytest.fixture(scope="module")
def graph(folder, tmp_path_factory):
    written = tmp_path_factory.mktemp("onnx")
    onnx.write(folder, written, provenance={})
    return written


class Compiled:
    """A model compiled for the CPU in float32, and heads and width of its cached tensors by name."""

    def __init__(self, folder):
        options = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
        self.model = openvino.Core().compile_model(folder / "openvino_model.xml", "CPU", options)
        shapes = {i.get_any_name(): i.partial_shape for i in self.model.inputs}
        self.shapes = {n: (s[1].get_length(), s[3].get_length()) for n, s in shapes.items() if n.startswith("past_")}

    def __call__(self, inputs):
        found = self.model(inputs)
        return [found[i].copy() for i in range(len(self.model.outputs))]


@torch.no_grad()
@pytest.mark.parametrize(("int8", "limit"), [(False, 0.005), (True, 0.05)])
def test_it_gives_the_tokens_of_generate_and_int8_is_close(folder, graph, tmp_path, int8, limit):
    convert(graph, tmp_path, int8=int8, provenance=PROVENANCE)
    ids, run = graphs.prompt(), Compiled(tmp_path)
    logits = run(graphs.feed(run.shapes, ids))[0][:, 0]
    assert 0 < graphs.error(logits, graphs.loaded(folder)(ids).logits[:, -1].numpy()) < limit
    if not int8:
        assert graphs.greedy(run, run.shapes, ids, N) == graphs.generated(folder, ids, N)
    saved = openvino.Core().read_model(tmp_path / "openvino_model.xml")
    assert {key: saved.get_rt_info(["drank", key]).value for key in PROVENANCE} == PROVENANCE
    assert {f.name for f in tmp_path.iterdir()} >= {"openvino_model.bin", "config.json", "tokenizer.json"}
