"""Covariance: second moments of the linears' inputs and, if asked, of the gradients of their outputs."""

import logging
import math
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import asdict
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from drank.method.covariance import NotFiniteError, SecondMoment, clipped
from drank.model.capture import Callback, split_windows, watching_inputs, watching_output_gradients
from drank.model.experts import expert_of, fused_experts, unfuse
from drank.model.linears import LeftDense, Linear, matches, shared_inputs, survey, unreached
from drank.model.offload import sweeps
from drank.model.precision import has_units, name_of
from drank.model.vocabulary import check_windows
from drank.project.params import Covariance
from drank.project.processes import Group

Tensors = Mapping[str, Tensor]
NOTHING = {"inputs": "nothing entered", "gradients": "no gradient came back to"}
NOT_FINITE = {"inputs": "activations entering", "gradients": "gradients leaving"}

log = logging.getLogger("drank.covariance")


class UnevenTokensError(ValueError):
    """A linear that does not see every token of every window; the message names it."""


def collect(
    model: Any,
    windows: Tensor,
    asked: Covariance,
    group: Group,
    store: MutableMapping[str, Tensors],
    hidden_states: MutableMapping[str, Tensors],
) -> dict[str, Any]:
    """Every linear's covariance into ``store``: ``inputs/<owner>`` and, with gradients, ``gradients/<linear>``.

    Linears that share their input share its covariance, under the name of the first of them. With
    ``asked.gradient_clip``, gradients also have the covariance ``clipped``, that of
    :func:`drank.method.covariance.clipped`.

    Experts of a mixture are taken apart first (``model.experts``), unless an ignored pattern is of their module, blocks
    are offloaded, or gradients clipped, which takes whole windows. The input covariance of an expert is the mean over
    all tokens, the others counted as zeros; that of its gradients, over its own. So its loss is one per token like
    others. An expert of which some covariance has more rows than it saw tokens is left alone.

    Args:
        model: as ``offload.load_for_sweeps`` loads it.
        windows: (n, length) token ids, on the same device.
        hidden_states: store of an offloaded pass for the states between blocks.

    Returns:
        The summary: ``fisher``, ``fisher_windows``, ``owners``, ``n_tokens``, ``n_windows``, ``dtype``, ``left_dense``.

    Raises:
        TargetError: a linear that no window reaches.
        UnevenTokensError: gradients are to be clipped, and a linear does not see whole windows.
        NotFiniteError: the model overflows.
    """
    check_windows(model, windows, "data/sampling/calibration")
    if not (asked.offload or asked.gradient_clip):
        mixtures = fused_experts(model).items()
        unfuse(model, [name for name, m in mixtures if not any(matches(p, name, m) for p in asked.ignore)])
    linears, left = survey(model, asked.targets, asked.ignore)
    parameters = sum(linear.weight.numel() for linear in linears)
    log.info("%d linears with %s parameters to compress; left as it is:", len(linears), f"{parameters:,}")
    for row in left:
        log.info("  %14s  %s: %s", f"{row.parameters:,}", row.name, row.reason)
    moment = partial(SecondMoment, device=asked.device, bfloat16_units=has_units(torch.bfloat16, asked.device))
    owners = shared_inputs(model, linears, windows[:1, :8])
    batches = split_windows(windows, asked.batch_windows, group.share, asked.fisher_windows)
    experts = _Experts(model, linears, windows.numel())
    states, length = hidden_states if asked.offload else None, windows.shape[1]
    planned = sweeps(model, linears, batches, asked.fisher, asked.fisher_seed, states)
    bar = group.progress(desc="covariance", unit="windows", total=sum(sweep.n_windows for sweep in planned))
    for sweep in planned:
        within = {linear.name: linear for linear in linears if linear.name.startswith(sweep.prefix)}
        owning = {name: linear for name, linear in within.items() if owners[name] == name}
        inputs = {n: moment(a.in_features) for n, a in owning.items() if sweep.inputs}
        gradients = {n: moment(a.out_features, magnitudes=False) for n, a in within.items() if sweep.gradients}
        bounded = {n: moment(within[n].out_features, magnitudes=False) for n in gradients if asked.gradient_clip}
        with (
            watching_inputs({name: within[name].module for name in inputs}, _add_to(inputs)),
            watching_output_gradients({name: within[name].module for name in gradients}, _add_to(gradients)),
            watching_output_gradients(
                {name: within[name].module for name in bounded}, _clip_into(bounded, asked, length)
            ),
        ):
            for n_windows in sweep.passes:
                bar.update(n_windows)
        _write("inputs", inputs, group, store, experts)
        _write("gradients", gradients, group, store, experts, bounded)
    bar.close()
    left += experts.left(linears)
    owners = {name: owner for name, owner in owners.items() if experts.of.get(name) not in experts.starved}
    if not owners:
        raise unreached("too few tokens went through", list(experts.of))
    summary = {"fisher": asked.fisher, "owners": owners, "n_tokens": windows.numel(), "n_windows": len(windows)}
    if asked.fisher != "none":
        summary["fisher_windows"] = asked.fisher_windows or len(windows)
    return summary | {"dtype": name_of(model.dtype), "left_dense": [asdict(row) for row in left]}


class _Experts:
    """Experts of a mixture, which see some of the tokens.

    Attributes:
        of: linear -> its expert, of those that belong to one.
        n_tokens: that all windows have.
        starved: expert -> the fewest tokens that one of its linears saw, and how many that needs.
    """

    def __init__(self, model: Any, linears: Sequence[Linear], n_tokens: int) -> None:
        found = {linear.name: expert_of(model, linear.name) for linear in linears}
        self.of = {name: expert for name, expert in found.items() if expert}
        self.n_tokens = n_tokens
        self.starved: dict[str, tuple[int, int]] = {}

    def starves(self, name: str, moment: SecondMoment) -> bool:
        """True if a linear of an expert saw fewer tokens than its second moment has rows, which is singular then."""
        if name not in self.of or moment.n_tokens >= len(moment.total):
            return False
        seen = moment.n_tokens, len(moment.total)
        self.starved[self.of[name]] = min(seen, self.starved.get(self.of[name], seen))
        return True

    def left(self, linears: Sequence[Linear]) -> list[LeftDense]:
        rows = []
        for expert, (seen, needed) in self.starved.items():
            sizes = [linear.weight.numel() for linear in linears if self.of.get(linear.name) == expert]
            told = f"an expert that saw {seen} tokens or gradients, fewer than the {needed} rows of their covariance"
            log.warning("left as it is: %s: %s", expert, told)
            rows.append(LeftDense(expert, told, len(sizes), sum(sizes)))
        return rows


def _add_to(moments: dict[str, SecondMoment]) -> Callback:
    return lambda name, rows: moments[name].add(rows)


def _clip_into(moments: dict[str, SecondMoment], asked: Covariance, length: int) -> Callback:
    low, high = asked.gradient_clip or (0.0, math.inf)

    def add(name: str, rows: Tensor) -> None:
        if len(rows) % length:
            raise UnevenTokensError(
                f"{name} sees {len(rows)} tokens of windows of {length}: covariance.gradient_clip needs linears that "
                f"see every token; leave this one out by covariance.ignore, or take covariance.gradient_clip away"
            )
        moments[name].add(clipped(rows.unflatten(0, (-1, length)), low, high, asked.gradient_margin or 0.0))

    return add


def _write(
    kind: str,
    moments: dict[str, SecondMoment],
    group: Group,
    store: MutableMapping[str, Tensors],
    experts: "_Experts",
    bounded: Mapping[str, SecondMoment] = MappingProxyType({}),
) -> None:
    """Means over the tokens of all processes; inputs also have magnitudes, and gradients those that are bounded."""
    missed = []
    for name, moment in moments.items():
        for each in (moment, *([bounded[name]] if bounded else [])):
            n_tokens = torch.tensor(each.n_tokens)
            group.sum(each.total, n_tokens, *([] if each.magnitude is None else [each.magnitude]))
            each.n_tokens = int(n_tokens)
        if not group.is_first:
            continue
        if experts.starves(name, moment):
            continue
        if not moment.total.diagonal().any():  # no token, or zeros alone: every matrix would be as good as none
            missed.append(name)
            continue
        try:
            H = moment.mean()
            if kind == "inputs" and name in experts.of:
                H *= moment.n_tokens / experts.n_tokens
            tensors = {"covariance": H, "magnitude": moment.mean_magnitude()}
            tensors |= {"clipped": bounded[name].mean()} if bounded else {}
        except NotFiniteError as error:
            raise NotFiniteError(f"{NOT_FINITE[kind]} {name}: {error}") from None
        store[f"{kind}/{name}"] = {key: t.float().cpu() for key, t in tensors.items() if t is not None}
    if missed:
        raise unreached(NOTHING[kind], missed)
