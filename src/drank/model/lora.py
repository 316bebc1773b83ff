r"""Healing: a compressed model is trained for a little while through low-rank adapters, which are then merged.

An adapter B A of rank r beside every matrix of the decoder layers, factors and dense ones alike (LoRA,
arXiv:2106.09685, by peft); the matrices themselves do not move. Merging rounds W + alpha / r B A to W's dtype, so the
model has its old sizes. The loss is that of the text, or what the dense model's predictions lose (distillation,
arXiv:1503.02531, at temperature 1).

Knows models and tensors, no files: where training stands is a dict of tensors, from which it goes on to the same bits.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Int64
from torch import Tensor, nn

from drank.model.divergence import divergence
from drank.model.linears import layer_index

CURVE = "healing.json"  # the loss by step, in the folder of a healed model
WARM_UP = 0.05  # share of the steps in which the learning rate rises; then it falls, linearly, to zero


@dataclass(frozen=True)
class Plan:
    """How long and how fast: ``epochs`` passes over the windows in new orders, ``batch_windows`` of them per step."""

    n_windows: int
    batch_windows: int
    epochs: int
    learning_rate: float
    seed: int

    @property
    def n_steps(self) -> int:
        return self.epochs * -(-self.n_windows // self.batch_windows)

    def rate(self, step: int) -> float:
        """Learning rate of step 0 ... n_steps - 1."""
        rising = max(1, round(WARM_UP * self.n_steps))
        return self.learning_rate * min((step + 1) / rising, (self.n_steps - step) / (self.n_steps - rising + 1), 1.0)

    def batches(self) -> list[Tensor]:
        """Indices of the windows of every step."""
        draw = torch.Generator().manual_seed(self.seed)
        orders = [torch.randperm(self.n_windows, generator=draw) for _ in range(self.epochs)]
        return [batch for order in orders for batch in order.split(self.batch_windows)]


@dataclass(frozen=True)
class Step:
    """A step that was taken: its number from 1 on, the loss before it in nats per token, and its learning rate."""

    number: int
    loss: float
    learning_rate: float


class Healing:
    """A compressed model with adapters, and how far they are trained.

    Args:
        model: changed in place: its matrices get adapters, everything else is frozen.
        teacher: the dense model, to learn the predictions of; None learns the text.
        windows: token windows (n, length) to learn from.
        rank, alpha: of the adapters.
    """

    def __init__(
        self,
        model: nn.Module,
        teacher: nn.Module | None,
        windows: Int64[Tensor, "n length"],
        plan: Plan,
        rank: int,
        alpha: int,
    ) -> None:
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(plan.seed)  # peft draws the first factor of an adapter from the global generator
        adapted = LoraConfig(r=rank, lora_alpha=alpha, target_modules=[], target_parameters=matrices(model))
        self.model: Any = get_peft_model(model, adapted)
        self.teacher, self.windows, self.plan = teacher, windows, plan
        self.trained = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        self.optimizer = torch.optim.AdamW(self.trained.values(), lr=plan.learning_rate, weight_decay=0.0)
        self.n_taken = 0

    def steps(self) -> Iterator[Step]:
        """Take the steps that are left, one at a time."""
        for batch in self.plan.batches()[self.n_taken :]:
            for group in self.optimizer.param_groups:
                group["lr"] = self.plan.rate(self.n_taken)
            loss = self._loss(self.windows[batch])
            loss.backward()
            nn.utils.clip_grad_norm_(self.trained.values(), 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            self.n_taken += 1
            yield Step(self.n_taken, float(loss.detach()), self.plan.rate(self.n_taken - 1))

    def merge(self) -> Any:
        """The model with its adapters merged, without them; this object is spent."""
        return self.model.merge_and_unload()

    def state(self) -> dict[str, Tensor]:
        """Everything that the rest of the steps depends on."""
        tensors: dict[str, Tensor] = {"n_taken": torch.tensor(self.n_taken)}
        for name, parameter in self.trained.items():
            tensors[f"adapter/{name}"] = parameter.detach()
            for key in ("exp_avg", "exp_avg_sq"):
                if self.n_taken:
                    tensors[f"{key}/{name}"] = self.optimizer.state[parameter][key]
        return tensors

    def resume(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what :meth:`state` gave, with the same model, windows and plan."""
        self.n_taken = int(state["n_taken"])
        for name, parameter in self.trained.items():
            parameter.data.copy_(state[f"adapter/{name}"])
            if self.n_taken:
                moments = {key: state[f"{key}/{name}"].to(parameter) for key in ("exp_avg", "exp_avg_sq")}
                self.optimizer.state[parameter] = {"step": torch.tensor(float(self.n_taken))} | moments

    def _loss(self, ids: Tensor) -> Tensor:
        logits = self.model(input_ids=ids, use_cache=False).logits
        if self.teacher is None:
            return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())
        with torch.inference_mode():
            expected = self.teacher(input_ids=ids, use_cache=False).logits
        # Window by window: a vocabulary's worth of float32 per token is the largest thing here.
        return torch.stack([divergence(theirs, ours) for theirs, ours in zip(expected, logits, strict=True)]).mean()


def matrices(model: nn.Module) -> list[str]:
    """Names of the matrices in the numbered layers, each once: a basis that modules share stays as it is, as adapters
    of its own in every module would be several bases."""
    seen: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if parameter.ndim == 2 and layer_index(name) is not None:
            seen.setdefault(id(parameter), []).append(name)
    return [names[0] for names in seen.values() if len(names) == 1]
