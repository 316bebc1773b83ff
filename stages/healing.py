"""Healing: a variant's folder, the dense model and the calibration text -> data/compression/<name>/, trained a while.

A killed run goes on from its last checkpoint, data/healing/.<name>.checkpoint, if nothing that it depends on changed.
"""

import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import drank.model.quantizer  # noqa: F401  the format of data/compression, seen by DVC's dependencies
from drank.model.lora import Healing, Plan, Step
from drank.model.precision import compute_dtype, name_of
from drank.model.text import draw_windows
from drank.project.checkpoint import Checkpoint
from drank.project.command import run_stage
from drank.project.dvc import Inputs
from drank.project.files import (
    file_sha256,
    folder_sha256,
    read_json,
    read_tensors,
    replacing_folder,
    weights_sha256,
    write_json,
    write_text,
)
from drank.project.params import Healing as Asked
from drank.project.params import read_params
from drank.project.progress import progress

STEPS_A_CHECKPOINT = 10


def main(name: str, root: Path = Path()) -> None:
    params = read_params(root / "params.yaml")
    asked = params.healed(name)
    dtype = compute_dtype(params.compute.dtype, asked.device)
    torch.set_num_threads(asked.threads)
    torch.use_deterministic_algorithms(True)
    inputs = Inputs(root)
    source, text, dense = (
        inputs / f"data/{name}" for name in (f"compression/{asked.variant}", "sampling", "raw/model")
    )
    stream = read_tensors(text / "calibration_text.safetensors")["tokens"].long()
    drawn = read_json(text / "summary.json")
    begin = drawn["begin_token"] if drawn.get("calibration_begin", "window") == "window" else None
    windows = draw_windows(stream, asked.n_windows, asked.window_length, asked.seed, begin).to(asked.device)
    teacher = load(dense, asked, dtype) if asked.objective == "distillation" else None
    plan = Plan(asked.n_windows, asked.batch_windows, asked.epochs, asked.learning_rate, asked.seed)
    healing = Healing(load(source, asked, dtype), teacher, windows, plan, asked.rank, asked.alpha)
    read = [folder_sha256(source), folder_sha256(dense), folder_sha256(text)]
    identity = {"inputs": read, "healing": asked.model_dump(mode="json"), "dtype": name_of(dtype)}
    checkpoint = Checkpoint(root / f"data/healing/.{name}.checkpoint", identity)
    curve = take_steps(healing, checkpoint, name)
    write_text(root / f"data/healing/{name}.csv", "step,loss,learning_rate\n" + "".join(curve))
    save(name, healing.merge(), dtype, source, root)
    checkpoint.remove()


def load(folder: Path, asked: Asked, dtype: torch.dtype) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval().to(asked.device)


def take_steps(healing: Healing, checkpoint: Checkpoint, name: str) -> list[str]:
    """The rest of the steps; returns the rows of the loss curve, those of before the checkpoint among them."""
    curve: list[str] = []
    if found := checkpoint.read():
        curve, state = found
        healing.resume(state)
    n_steps, before = healing.plan.n_steps, healing.n_taken
    with progress(desc=f"healing {name}", unit="steps", total=n_steps, initial=before) as bar:
        for step in healing.steps():
            curve.append(row(step))
            bar.set_postfix(loss=f"{step.loss:.3f}", refresh=False)
            bar.update()
            if step.number % STEPS_A_CHECKPOINT == 0:
                checkpoint.write(curve, healing.state())
    return curve


def row(step: Step) -> str:
    return f"{step.number},{step.loss!r},{step.learning_rate!r}\n"


def save(name: str, trained: Any, dtype: torch.dtype, source: Path, root: Path) -> None:
    """The format and types of the source, with the allocation that the sizes still are of, and what was trained, and in
    which type, in the provenance."""
    allocation = read_json(source / "allocation.json") | {"variant": name}
    described = root / f"data/allocation/{name}.json"
    write_json(described, allocation)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    model.load_state_dict(trained.state_dict())  # rounds every tensor to its stored type
    section = model.config.quantization_config
    section.provenance = section.provenance | {
        "variant": name,
        "allocation_sha256": file_sha256(described),
        "healed_from_sha256": weights_sha256({file.name: file_sha256(file) for file in source.glob("*.safetensors")}),
        "healed_in": name_of(dtype),
    }
    with replacing_folder(root / "data/compression" / name) as folder:
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(source).save_pretrained(folder)
        shutil.copyfile(described, folder / "allocation.json")


if __name__ == "__main__":
    run_stage(main)
