"""Release: a model card, a provenance statement, and checksums of every file, which travel with a compressed model.

Nothing here says when, where or by whom a model was made, so a rebuilt folder is the same folder; the commit that made
it is found from the folder's hash instead (``drank audit``).
"""

import json
from collections.abc import Collection, Mapping, Sequence
from importlib.metadata import version
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCardData

from drank import __version__
from drank.project.params import asked

STATEMENT = "provenance.json"
CHECKSUMS = "SHA256SUMS"
CARD = "README.md"
SERVED = "MLmodel"
BUILD_TYPE = "urn:drank:pipeline:1"
LIBRARIES = ("datasets", "lm_eval", "numpy", "scipy", "torch", "transformers")  # whose versions decide numbers

Document = Mapping[str, Any]


def inputs_of(parameters: Document, there: Collection[str]) -> list[str]:
    """Paths of the files that a variant was made from and measured on.

    Args:
        parameters: everything of params.yaml that makes the variant.
        there: paths of the base model's files of weights, and of the tasks that sampling wrote.
    """
    sampling, variant = parameters["sampling"], parameters["variant"]["name"]
    drawn = [f"calibration/{parameters['spectrum']['calibration_seed']}.safetensors", "test.safetensors"]
    drawn += ["last.safetensors"] if sampling["n_test_windows"] == "all" else []
    tasks = [f"data/sampling/tasks/{task}.jsonl" for task in parameters["evaluation"]["tasks"]]
    return [
        *sorted(path for path in there if path.startswith("data/raw/model/")),
        *(f"data/raw/text/{name}.jsonl" for name in parameters["text"]),
        *(f"data/sampling/{name}" for name in drawn),
        *(task for task in tasks if task in there),
        *(["data/sampling/calibration_text.safetensors"] if "healing" in parameters else []),
        f"data/allocation/{variant}.json",
    ]


def statement(
    parameters: Document,
    subjects: Mapping[str, str],
    files: Mapping[str, str],
    allocation: Document,
    results: Document,
    config: Document,
) -> dict[str, Any]:
    """An in-toto statement (v1) whose predicate is SLSA provenance (v1).

    Sources, with the hash that was asked for, and files as they were are SLSA's ``resolvedDependencies``; the
    floating-point type of each kind of pass, which ``parameters`` may leave to the processor, its
    ``internalParameters``. SLSA's optional invocation id and times are left out: the same inputs give the same bytes.

    Args:
        parameters: everything of params.yaml that makes the variant; SLSA's ``externalParameters``.
        subjects: SHA-256 of every file of the folder but this statement and the checksums, by name.
        files: SHA-256 of every file of :func:`inputs_of`, by path.
        results: the document of the evaluation, as the annotations of a by-product.
        config: the model's config.json, which has the hash of the weights that were healed.
    """
    variant = parameters["variant"]["name"]
    provenance = config.get("quantization_config", {}).get("provenance", {})
    types, digests = dict(allocation["computed_in"]), dict(files)
    if "healed_in" in provenance:
        types["healing"] = provenance["healed_in"]
        digests[f"{variant} before healing"] = provenance["healed_from_sha256"]
    spectrum = f"data/spectrum/{allocation['spectrum']}"
    digests |= {f"{spectrum}/{file}": digest for file, digest in sorted(allocation["inputs"].items())}
    sources = {"model": parameters["model"]} | {f"text.{name}": text for name, text in parameters["text"].items()}
    dependencies: list[dict[str, Any]] = [
        {"name": name, "uri": source["source"]}
        | ({"digest": {"sha256": source["sha256"]}} if "sha256" in source else {})
        for name, source in sources.items()
    ]
    dependencies += [{"name": file, "digest": {"sha256": digest}} for file, digest in digests.items()]
    return {
        "_type": "https://in-toto.io/Statement/v1",
        "subject": [{"name": name, "digest": {"sha256": digest}} for name, digest in sorted(subjects.items())],
        "predicateType": "https://slsa.dev/provenance/v1",
        "predicate": {
            "buildDefinition": {
                "buildType": BUILD_TYPE,
                "externalParameters": dict(parameters),
                "internalParameters": {"computed_in": types | {"evaluation": results["protocol"]["dtype"]}},
                "resolvedDependencies": dependencies,
            },
            "runDetails": {
                "builder": {"id": BUILD_TYPE, "version": {"drank": __version__} | {n: version(n) for n in LIBRARIES}},
                "byproducts": [{"name": f"results/{variant}.json", "annotations": dict(results)}],
            },
        },
    }


def mlmodel() -> str:
    """MLflow's description of the folder as a model of flavour ``python_function``: texts in, continuations out.

    Left out are MLflow's optional run id, time and uuid: the same folder gives the same bytes.
    """
    text = [{"type": "string", "required": True}]
    length = [{"name": "max_new_tokens", "type": "long", "default": 20, "shape": None}]
    signature = {"inputs": text, "outputs": text, "params": length}
    document = {
        "flavors": {"python_function": {"data": ".", "loader_module": "drank.serving.mlflow"}},
        "signature": {name: json.dumps(columns) for name, columns in signature.items()},
    }
    return yaml.safe_dump(document)


def checksums(digests: Mapping[str, str]) -> str:
    """The lines that ``sha256sum`` prints, sorted by name; ``sha256sum --check`` reads them."""
    return "".join(f"{digest}  {name}\n" for name, digest in sorted(digests.items()))


def card(parameters: Document, allocation: Document, results: Document) -> str:
    """A Hugging Face model card: metadata, method, size, results with their protocol, limits, and how to check it."""
    model, protocol = parameters["model"], results["protocol"]
    base = _hub_name(model["source"]) or model["source"]
    split = [(*key.partition("/"), value) for key, value in sorted(results.items()) if "/" in key]
    figures = [(metric, name, float(value)) for metric, _, name, value in split if not metric.endswith("_stderr")]
    on_hub = model.get("base_model", _hub_name(model["source"]))
    n_compressed, precision = sum(unit["form"] != "dense" for unit in allocation["units"]), _precision(allocation)
    data = ModelCardData(
        license=model.get("license"),
        language=model.get("language"),
        base_model=on_hub,
        # Of the hub's four relations the one that a compressed model has; dense weights are the model itself.
        base_model_relation="quantized" if on_hub and (n_compressed or precision) else None,
        datasets=_hub_name(parameters["text"][parameters["sampling"]["calibration_text"]]["source"]),
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["drank", "compression", "low-rank", "svd"],
        model_name=parameters["variant"]["name"],
        eval_results=[
            EvalResult("text-generation", name, name, metric, value, metric_name=f"{metric}/{name}")
            for metric, name, value in figures
        ],
    )
    removed = sum(block["full_channels"] - block["channels"] for block in allocation["blocks"])
    outside = [f"`{name}`" for name in protocol["test_windows"] if name != parameters["sampling"]["calibration_text"]]
    return CARD_TEMPLATE.format(
        parameters=parameters,
        allocation=allocation,
        asked=asked(allocation),
        results=results,
        metadata=data.to_yaml(),
        base=base,
        n_compressed=n_compressed,
        n_units=len(allocation["units"]),
        removed=f", {removed} channels of MLPs removed" if removed else "",
        precision=precision,
        stored=STORED_ROUNDED if "precision" in allocation else "Weights are stored in bfloat16.",
        megabytes=results["bytes"] / 1e6,
        rows="".join(_row(*figure, results.get(f"{figure[0]}_stderr/{figure[1]}")) for figure in figures),
        protocol=_protocol(protocol),
        training=_training(parameters.get("healing")),
        left=_left(allocation.get("left_dense", [])),
        outside=", ".join(outside) or "none",
    )


def _hub_name(source: str) -> str | None:
    """`org/name` of a source on the hub."""
    scheme, _, name = source.partition(":")
    return name.partition("@")[0] if scheme == "hub" else None


CARD_TEMPLATE = """---
{metadata}
---
# {parameters[variant][name]}

`{base}`, compressed by truncated SVD with a rank chosen for every layer ([D-Rank](https://arxiv.org/abs/2509.25622)
and what followed from it), {training}.

| | |
|---|---|
| base model | `{base}` |
| method | preset `{allocation[preset]}`: metric {parameters[spectrum][metric]}, units {parameters[spectrum][units]}, \
allocation {allocation[allocation]}, storage {allocation[storage]} |
| compressed | {n_compressed} of {n_units} matrices{removed} |
{precision}| kept of the compressed linears' parameters | {allocation[kept_ratio]:.4f} \
({asked} asked) |
| parameters of the whole model | {results[parameters]:,} |
| weights on disk | {megabytes:.1f} MB |
| calibrated on | {parameters[sampling][n_windows]} windows of {parameters[sampling][window_length]} tokens of \
`{parameters[sampling][calibration_text]}` |

## Use
```python
import drank  # registers the format
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("path/to/this/folder")
tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")
```
Without `import drank` loading stops with an error, but for the dense variant, which is a plain model.
{stored} On a processor without bfloat16 units add `dtype=torch.float32`: the same weights,
several times faster.

## Results
| figure | value | standard error |
|---|---|---|
{rows}
{protocol}
{left}
## Limits
* Measured in the two ways above and in no other: not for other languages, longer contexts, instructions or safety.
* Calibrated on one text; texts that were never calibrated on: {outside}.
* Whatever holds of the base model's licence, biases and intended use holds here.
* Smaller, not necessarily faster: no speed was measured for this card.

## What made it
`allocation.json` has the rank of every matrix, `provenance.json` is an in-toto statement (SLSA provenance) of the
parameters and of what went in, and `sha256sum --check SHA256SUMS` compares the files. `drank audit FOLDER` verifies
all of it, finds the commit whose `dvc.lock` made the folder, and says how to rebuild it.
"""


STORED_ROUNDED = "Weights are stored as integers, multiplied out as they are used, and not trained any more."


def _precision(allocation: Document) -> str:
    """The row of the card on few bits; none where all numbers have 16."""
    told = []
    if "precision" in allocation:
        how = "with error feedback" if allocation["rounding"] == "feedback" else "to nearest"
        bits = sorted({unit["bits"] for unit in allocation["units"]})
        several = "" if len(bits) == 1 else f" to {bits[-1]}"
        told = [f"{bits[0]}{several} bits in groups of {allocation['group_size']}, rounded {how}"]
    if "embedding_bits" in allocation:
        told.append(f"embeddings {allocation['embedding_bits']} bits")
    return f"| precision | {', '.join(told)} |\n" if told else ""


def _training(healing: Document | None) -> str:
    if healing is None:
        return "without training"
    learned = {"text": "the next tokens", "distillation": "the base model's predictions"}[healing["objective"]]
    windows = f"{healing['n_windows']} windows of {healing['window_length']} tokens of the calibration text"
    return (
        f"trained afterwards, through adapters of rank {healing['rank']} that are "
        f"merged, to give {learned} of {windows}, {healing['epochs']} times"
    )


def _left(rows: Sequence[Document]) -> str:
    """The parameters that no rank was asked for; * stands for any number."""
    if not rows:
        return ""
    lines = [f"| `{row['name']}` | {row['parameters']:,} | {row['reason']} |\n" for row in rows]
    head = "\n## Left as it is\nNot among the matrices above, for the reason given; `*` is any number.\n\n"
    return f"{head}| parameters of | how many | why |\n|---|---|---|\n{''.join(lines)}"


def _row(metric: str, name: str, value: float, error: float | None) -> str:
    return f"| {metric}/{name} | {value:.4f} | {'' if error is None else f'{error:.4f}'} |\n"


def _protocol(protocol: Document) -> str:
    windows = protocol["test_windows"].items()
    counts = ", ".join(f"{n} windows of {length} tokens of `{name}`" for name, (n, length) in windows)
    tasks = ", ".join(f"`{task}`" for task in protocol["tasks"])
    missing = "".join(f" Not measured: {name}, {why}." for name, why in protocol.get("not_measured", {}).items())
    return (
        f"Token perplexity: {counts}, held out, in {protocol['dtype']}. Everything else: lm-eval, tasks {tasks}, "
        f"context {protocol['lm_eval_max_length']}; word perplexity and bits per byte by rolling windows.{missing}"
    )
