"""Healing: a compressed model is trained a while, and goes on from where a killed run stood."""

from collections.abc import Callable, Mapping
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from drank.model.lora import Healing as Training
from drank.model.lora import Plan
from drank.model.text import draw_windows
from drank.model.vocabulary import check_windows
from drank.project.params import Healing

STEPS_PER_CHECKPOINT = 10

Curve = list[dict[str, Any]]


@runtime_checkable
class Checkpoint(Protocol):
    """Where a training stands, kept for a later run."""

    def read(self) -> tuple[Curve, dict[str, Tensor]] | None: ...
    def write(self, curve: Curve, state: Mapping[str, Tensor]) -> None: ...


def heal(
    model: Any,
    teacher: Any | None,
    text: Mapping[str, Tensor],
    asked: Healing,
    checkpoint: Checkpoint,
    progress: Callable[..., Any],
) -> tuple[Any, Curve]:
    """The trained model, its adapters merged, and the loss curve: ``step``, ``loss``, ``learning_rate``.

    Args:
        model: compressed, in the type that passes are computed in; changed in place.
        teacher: the dense model, to learn the predictions of; None learns the text.
        text: ``tokens`` and, if windows have it in front, the ``begin`` token.
    """
    begin = int(text["begin"]) if "begin" in text else None
    windows = draw_windows(text["tokens"].long(), asked.n_windows, asked.window_length, asked.seed, begin)
    check_windows(model, windows, "data/sampling/calibration_text.safetensors", "healing.window_length")
    plan = Plan(asked.n_windows, asked.batch_windows, asked.epochs, asked.learning_rate, asked.seed)
    training = Training(model, teacher, windows.to(asked.device), plan, asked.rank, asked.alpha)
    curve: Curve = []
    if found := checkpoint.read():
        curve, state = found
        training.resume(state)
    with progress(desc="healing", unit="steps", total=plan.n_steps, initial=training.n_taken) as bar:
        for step in training.steps():
            curve.append({"step": step.number, "loss": step.loss, "learning_rate": step.learning_rate})
            bar.set_postfix(loss=f"{step.loss:.3f}", refresh=False)
            bar.update()
            if step.number % STEPS_PER_CHECKPOINT == 0:
                checkpoint.write(curve, training.state())
    return training.merge(), curve
