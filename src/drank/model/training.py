r"""Healing: a compressed model is trained for a little while, at the size that it has.

:data:`TRAINED` is the table of what is trained: an adapter B A of rank r beside every matrix of the decoder layers
(LoRA, arXiv:2106.09685, by peft), or a factor per row and column of every matrix and per gain of every norm. The stored
numbers do not move meanwhile; at the end M + alpha / r B A, or diag(a) M diag(b), is rounded to the dtype of M. The
loss is that of the text, or what the dense model's predictions lose (distillation, arXiv:1503.02531, at temperature 1).

Knows models and tensors, no files: where training stands is a dict of tensors, from which it goes on to the same bits.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Int64
from torch import Tensor, nn
from torch.nn.utils import parametrize

from drank.model.divergence import divergence
from drank.model.linears import layer_index

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


class Adapters:
    """Low-rank matrices beside all matrices: W + alpha / rank B A."""

    def __init__(self, rank: int, alpha: int) -> None:
        self.rank, self.alpha = rank, alpha

    def add(self, model: nn.Module) -> Any:
        """The model with adapters, everything else frozen. The first factor is drawn by torch's generator."""
        from peft import LoraConfig, get_peft_model

        names = matrices(model)
        return get_peft_model(
            model, LoraConfig(r=self.rank, lora_alpha=self.alpha, target_modules=[], target_parameters=names)
        )

    def merge(self, model: Any) -> Any:
        return model.merge_and_unload()


class Scales:
    """Factors of rows and columns: diag(a) W diag(b) for a matrix, a g for the gains of a norm, and for biases."""

    def add(self, model: nn.Module) -> Any:
        """The model with factors of 1, everything else frozen."""
        vectors = [name for name, parameter in model.named_parameters() if parameter.ndim == 1]
        model.requires_grad_(False)
        for name in (*matrices(model), *vectors):
            holder, _, own = name.rpartition(".")
            module = model.get_submodule(holder)
            parametrize.register_parametrization(module, own, _Scaled(getattr(module, own)))
        return model

    def merge(self, model: Any) -> Any:
        for module in list(model.modules()):
            for own in list(module.parametrizations) if parametrize.is_parametrized(module) else ():
                parametrize.remove_parametrizations(module, own)
        return model


class _Scaled(nn.Module):
    """A factor per place along each axis of a tensor."""

    def __init__(self, like: Tensor) -> None:
        super().__init__()
        device = like.device
        self.factors = nn.ParameterList(nn.Parameter(torch.ones(length, device=device)) for length in like.shape)

    def forward(self, stored: Tensor) -> Tensor:
        rows, *columns = self.factors
        scaled = stored * rows.view(-1, *[1] * len(columns))
        for factors in columns:
            scaled = scaled * factors
        return scaled.to(stored.dtype)


# What params.yaml may name, as it is made of the parameters of section `healing`.
TRAINED: dict[str, Callable[..., Adapters | Scales]] = {
    "adapters": lambda rank, alpha: Adapters(rank, alpha),
    "scales": lambda rank, alpha: Scales(),
}


class Training:
    """A compressed model, what is trained in it, and how far it is.

    Args:
        model: changed in place: what is trained is added, everything else is frozen.
        teacher: the dense model, to learn the predictions of; None learns the text.
        windows: token windows (n, length) to learn from.
    """

    def __init__(
        self,
        model: nn.Module,
        teacher: nn.Module | None,
        windows: Int64[Tensor, "n length"],
        plan: Plan,
        added: Adapters | Scales,
    ) -> None:
        torch.manual_seed(plan.seed)
        self.added, self.model = added, added.add(model)
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
        """The model of its old sizes, with all that was trained in its tensors; this object is spent."""
        return self.added.merge(self.model)

    def state(self) -> dict[str, Tensor]:
        """Everything that the rest of the steps depends on."""
        tensors: dict[str, Tensor] = {"n_taken": torch.tensor(self.n_taken)}
        for name, parameter in self.trained.items():
            tensors[f"trained/{name}"] = parameter.detach()
            for key in ("exp_avg", "exp_avg_sq"):
                if self.n_taken:
                    tensors[f"{key}/{name}"] = self.optimizer.state[parameter][key]
        return tensors

    def resume(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what :meth:`state` gave, with the same model, windows and plan."""
        self.n_taken = int(state["n_taken"])
        for name, parameter in self.trained.items():
            parameter.data.copy_(state[f"trained/{name}"])
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
    """Names of the matrices in the numbered layers, each once: a basis that modules share stays as it is, since what
    one module trained would not be the others'."""
    seen: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if parameter.ndim == 2 and layer_index(name) is not None:
            seen.setdefault(id(parameter), []).append(name)
    return [names[0] for names in seen.values() if len(names) == 1]
