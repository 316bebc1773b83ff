"""Healing: a compressed model is trained a while, and goes on from where a killed run stood."""

import math
from collections.abc import Callable, Mapping
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from drank.model.precision import compute_dtype, name_of
from drank.model.text import draw_windows
from drank.model.training import TRAINED, Plan, Training
from drank.model.vocabulary import check_windows
from drank.project.params import Healing
from drank.project.processes import process_group

STEPS_PER_CHECKPOINT = 10

Curve = list[dict[str, Any]]


class HealingError(ValueError):
    """A model cannot be healed; the message says why."""


@runtime_checkable
class Checkpoint(Protocol):
    """Where a training stands, kept for a later run."""

    def read(self) -> tuple[Curve, dict[str, Tensor]] | None: ...
    def write(self, curve: Curve, state: Mapping[str, Tensor]) -> None: ...


def heal(
    load: Callable[[str, torch.dtype], Any],
    text: Mapping[str, Tensor],
    asked: Healing,
    compute: str,
    sha256: Mapping[str, str],
    open_checkpoint: Callable[[Mapping[str, Any]], Checkpoint],
    progress: Callable[..., Any],
) -> tuple[Any, Curve]:
    """The trained model in its stored types, and the loss curve: ``step``, ``loss``, ``learning_rate``.

    Args:
        load: (name, dtype) -> the model, on the CPU; the name is ``compressed``, or ``dense`` of the teacher.
        text: ``tokens`` and, if windows have it in front, the ``begin`` token.
        compute: the type of passes, or ``auto``.
        sha256: of the weights, by name as of ``load``, and of the ``text``; that of ``compressed`` goes to config.json.
        open_checkpoint: that of the training that these inputs make.

    Raises:
        HealingError: no matrix was compressed, the text is shorter than a window, or the loss is not finite.
        TokenError: the model lacks an embedding of the text.
    """
    with process_group(asked.threads, asked.device):
        torch.use_deterministic_algorithms(True)
        passes = compute_dtype(compute, asked.device)
        identity = {"inputs": dict(sha256), "healing": asked.model_dump(mode="json"), "dtype": name_of(passes)}
        return _heal(load, text, asked, passes, sha256["compressed"], open_checkpoint(identity), progress)


def _heal(
    load: Callable[[str, torch.dtype], Any], text: Mapping[str, Tensor], asked: Healing, passes: torch.dtype,
    before: str, checkpoint: Checkpoint, progress: Callable[..., Any],
) -> tuple[Any, Curve]:  # fmt: skip
    begin = int(text["begin"]) if "begin" in text else None
    if (n_tokens := len(text["tokens"])) < asked.window_length - ("begin" in text):
        raise HealingError(
            f"healing.window_length = {asked.window_length}, and the calibration text has {n_tokens} tokens: lower it, "
            f"or take a longer text"
        )
    windows = draw_windows(text["tokens"].long(), asked.n_windows, asked.window_length, asked.seed, begin)
    model = load("compressed", passes).eval().to(asked.device)
    if getattr(model.config, "quantization_config", None) is None:
        raise HealingError(
            "healing: no matrix was compressed, so there is nothing to heal; lower size_ratio, or leave `healing` out"
        )
    check_windows(model, windows, "data/sampling/calibration_text.safetensors", "healing.window_length")
    teacher = load("dense", passes).eval().to(asked.device) if asked.objective == "distillation" else None
    plan = Plan(asked.n_windows, asked.batch_windows, asked.epochs, asked.learning_rate, asked.seed)
    added = TRAINED[asked.trains](asked.rank, asked.alpha)
    training = Training(model, teacher, windows.to(asked.device), plan, added)
    curve: Curve = []
    if found := checkpoint.read():
        curve, state = found
        training.resume(state)
    with progress(desc="healing", unit="steps", total=plan.n_steps, initial=training.n_taken) as bar:
        for step in training.steps():
            if not math.isfinite(step.loss):
                raise HealingError(
                    f"healing: the loss of step {step.number} is {step.loss}: lower healing.learning_rate = "
                    f"{asked.learning_rate}"
                )
            curve.append({"step": step.number, "loss": step.loss, "learning_rate": step.learning_rate})
            bar.set_postfix(loss=f"{step.loss:.3f}", refresh=False)
            bar.update()
            if step.number % STEPS_PER_CHECKPOINT == 0:
                checkpoint.write(curve, training.state())
    stored = load("compressed", torch.bfloat16)
    stored.load_state_dict(training.merge().state_dict())  # rounds every tensor to its stored type
    section = stored.config.quantization_config
    section.provenance = section.provenance | {"healed_from_sha256": before, "healed_in": name_of(passes)}
    return stored, curve
