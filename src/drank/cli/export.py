"""``drank export``: a model in the form of another program, with the papers that an audit follows."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


class GgufType(StrEnum):
    """Numbers of a GGUF file, as llama.cpp's converter names them."""

    BF16 = "bf16"
    F16 = "f16"
    F32 = "f32"
    Q8_0 = "q8_0"


def export(
    model: Annotated[Path, typer.Argument(metavar="MODEL_DIR", help="The folder of a model.")],
    destination: Annotated[Path, typer.Argument(help="The folder to write; there must be nothing yet.")],
    dense: Annotated[bool, typer.Option("--dense", help="Plain, multiplied out, for tools without factors.")] = False,
    onnx: Annotated[bool, typer.Option("--onnx", help="ONNX with its factors, for ONNX Runtime.")] = False,
    openvino: Annotated[bool, typer.Option("--openvino", help="OpenVINO with its factors.")] = False,
    gguf: Annotated[GgufType | None, typer.Option(help="GGUF, multiplied out, for llama.cpp.")] = None,
    remote_code: Annotated[
        bool, typer.Option("--remote-code", help="The compressed folder, with two lines for trust_remote_code=True.")
    ] = False,
    int8: Annotated[bool, typer.Option("--int8", help="Weights in 8 bits (--onnx, --openvino).")] = False,
) -> None:
    """Write a model in exactly one other form.

    Programs that can `import drank` take MODEL_DIR as it is. `drank audit DESTINATION` leads back to MODEL_DIR.
    """
    asked = {"dense": dense, "onnx": onnx, "openvino": openvino, "gguf": gguf, "remote-code": remote_code}
    form = check(model, destination, [name for name, value in asked.items() if value])
    from drank.project.files import replacing_folder
    from drank.serving.export import FORMS, describe, write

    options = {name: value for name, value in {"int8": int8, "type": gguf and gguf.value}.items() if value}
    papers = describe(model, form, options)
    typer.echo(f"{model}: writing it as {form} into {destination} ...", err=True)
    with replacing_folder(destination) as folder:
        write(model, folder, papers)
    made = FORMS[form]
    for place, pattern, told in ((model, "*.safetensors", "as it is"), (destination, made.weights, made.told)):
        typer.echo(f"{place}: {sum(file.stat().st_size for file in place.glob(pattern)) / 1e6:.1f} MB, {told}")


def check(model: Path, destination: Path, forms: list[str]) -> str:
    """Refuse what cannot be exported before anything is loaded; the form that was asked for.

    Raises:
        ExportError: the folder is no model's, or the destination is taken or inside it, or not one form is asked.
        FileError: a file of the folder is damaged, or another program's.
    """
    from drank.audit.folder import Folder
    from drank.serving.export import FORMS, ExportError

    if not (model / "config.json").is_file():
        raise ExportError(f"{model}: no config.json, so not the folder of a model")
    if not Folder(model).stored:
        raise ExportError(f"{model}: no weights (*.safetensors); copy it again")
    if len(forms) != 1:
        raise ExportError(
            f"{model}: loads with plain from_pretrained after `import drank`, so copy it as it is (docs/loading.md); "
            f"for other programs ask for exactly one of {', '.join(f'--{form}' for form in FORMS)}"
        )
    if destination.exists() or destination.resolve().is_relative_to(model.resolve()):
        raise ExportError(f"{destination}: exists already, or is inside the folder that is exported; name another")
    return forms[0]
