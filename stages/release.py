"""Release: a variant's weights, with model card, provenance and checksums -> data/models/<variant>/."""

from pathlib import Path
from typing import Any

from drank.project.command import run_stage
from drank.project.dvc import Inputs
from drank.project.files import copy_files, file_sha256, read_json, replacing_folder, write_json, write_text
from drank.project.params import ModelSource, Params, TextSource, read_params
from drank.project.resolved import resolved
from drank.steps.release import CARD, CHECKSUMS, STATEMENT, card, checksums, statement


def main(variant: str, root: Path = Path()) -> None:
    params, inputs = read_params(root / "params.yaml"), Inputs(root)
    parameters = resolved(params, variant)
    allocation = read_json(inputs / f"data/allocation/{variant}.json")
    results = read_json(inputs / f"results/{variant}.json")
    with replacing_folder(root / "data/models" / variant) as folder:
        copy_files(inputs / f"data/compression/{variant}", folder)
        write_text(folder / CARD, card(parameters, allocation, results))
        materials = dependencies(inputs, variant, params, allocation)
        types = computed_in(inputs, variant, params, allocation, results)
        digests = {file.name: file_sha256(file) for file in folder.iterdir()}
        write_json(folder / STATEMENT, statement(digests, parameters, materials, results, types))
        write_text(folder / CHECKSUMS, checksums(digests | {STATEMENT: file_sha256(folder / STATEMENT)}))


def dependencies(inputs: Inputs, variant: str, params: Params, allocation: dict[str, Any]) -> list[dict[str, Any]]:
    """Resource descriptors: sources with the hash that was asked for, then files as they were."""
    seed = params.spectrum[allocation["spectrum"]].calibration_seed
    weights = sorted((inputs / "data/raw/model").glob("*.safetensors"))
    files = [f"data/raw/model/{file.name}" for file in weights]
    files += [f"data/raw/text/{name}.jsonl" for name in params.text]
    files += [f"data/sampling/calibration/{seed}.safetensors", "data/sampling/test.safetensors"]
    files += [f"data/allocation/{variant}.json"]
    healed = []
    if variant in params.healing:
        config = read_json(inputs / f"data/compression/{variant}/config.json")
        trained = config["quantization_config"]["provenance"]["healed_from_sha256"]
        healed = [{"name": f"data/compression/{params.healing[variant].variant}", "digest": {"sha256": trained}}]
    sources: list[tuple[str, ModelSource | TextSource]] = [("model", params.model)]
    sources += [(f"text.{name}", text) for name, text in params.text.items()]
    spectrum = f"data/spectrum/{allocation['spectrum']}"
    return [
        *(
            {"name": name, "uri": source.source, **({"digest": {"sha256": source.sha256}} if source.sha256 else {})}
            for name, source in sources
        ),
        *({"name": file, "digest": {"sha256": file_sha256(inputs / file)}} for file in files),
        *healed,
        *({"name": f"{spectrum}/{file}", "digest": {"sha256": d}} for file, d in sorted(allocation["inputs"].items())),
    ]


def computed_in(
    inputs: Inputs, variant: str, params: Params, allocation: dict[str, Any], results: dict[str, Any]
) -> dict[str, str]:
    """The type that each kind of pass was computed in, as the stages recorded it."""
    healed = {}
    if variant in params.healing:
        config = read_json(inputs / f"data/compression/{variant}/config.json")
        healed = {"healing": config["quantization_config"]["provenance"]["healed_in"]}
    return allocation["computed_in"] | healed | {"evaluation": results["protocol"]["dtype"]}


if __name__ == "__main__":
    run_stage(main)
