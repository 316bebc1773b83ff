"""OpenVINO: a folder with the intermediate representation (IR) of a model, with the factors in it."""

from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

GRAPH = "openvino_model.xml"  # weights are beside it, in openvino_model.bin
PROVENANCE = "drank"  # the section of rt_info that has the provenance


def write(model: Path, folder: Path, *, int8: bool = False, provenance: Mapping[str, str]) -> None:
    """Write a compressed or dense model into an empty folder.

    `openvino_model.xml` and `.bin` have the inputs and outputs of :func:`drank.serving.onnx.write`, of whose graph in
    float32 they are made; the weights are stored in float16, and computed with in what the processor takes.
    config.json and the tokenizer are beside them. ``Model.get_rt_info(["drank", key])`` gives back the provenance.

    Args:
        int8: weights as integers of 8 bits with a scale per output feature (NNCF's int8_sym).
        provenance: put into the IR's rt_info as it is.

    Raises:
        GraphError: a model whose graph cannot be written; the message says why.
    """
    from drank.serving.onnx import write as write_onnx

    with TemporaryDirectory(dir=folder.parent) as graph:
        write_onnx(model, Path(graph), provenance={})
        convert(Path(graph), folder, int8=int8, provenance=provenance)


def convert(graph: Path, folder: Path, *, int8: bool = False, provenance: Mapping[str, str]) -> None:
    """The same, of a folder that :func:`drank.serving.onnx.write` wrote in float32."""
    import shutil

    import openvino

    converted = _with_plain_gathers(openvino.convert_model(graph / "model.onnx"))
    if int8:
        import nncf

        converted = nncf.compress_weights(converted, mode=nncf.CompressWeightsMode.INT8_SYM)
    for number, operation in enumerate(converted.get_ordered_ops()):  # OpenVINO counts all that a process has made
        if operation.get_type_name() not in ("Parameter", "Result"):
            operation.set_friendly_name(f"{operation.get_type_name()}_{number}")
    for key, value in provenance.items():
        converted.set_rt_info(value, [PROVENANCE, key])
    openvino.save_model(converted, folder / GRAPH)
    for file in graph.iterdir():
        if not file.name.startswith(("model.onnx", "genai_config")):
            shutil.copy(file, folder)


def _with_plain_gathers(model: Any) -> Any:
    """Outputs put in order by one index for all tokens, where ONNX Runtime is faster with one for each."""
    from openvino import opset13

    for node in model.get_ordered_ops():
        if node.get_type_name() == "GatherElements":
            order = node.input_value(1).get_node().input_value(0)  # before it is repeated for every token
            node.output(0).replace(opset13.gather(node.input_value(0), order, opset13.constant(-1)).output(0))
    return model
