"""The linears of a decoder: which are compressed, what each one does, which of them read the same tensor, and what else
the model holds, which stays as it is.

All knowledge of architectures is here. Sizes come from the modules themselves and shared inputs from one probing
forward pass; only the *role* of a linear (needed by rules that speak of queries, keys and values) is looked up.
"""

import copy
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from drank.model.experts import ExpertsAsLinears

# Ends of modules' names by role. A linear that is not listed is compressed like any other; only rules that name a role
# (query/key -> value rebalancing, groups, MLPs that lose channels) pass it by.
ENDS = {
    "query": "q_proj Wq",
    "key": "k_proj Wk",
    "value": "v_proj Wv",
    # Multi-head latent attention (DeepSeek): what makes a latent of the residual stream, and what reads one.
    "query_latent": "q_a_proj",
    "key_value_latent": "kv_a_proj_with_mqa",
    "query_of_latent": "q_b_proj",
    "key_value_of_latent": "kv_b_proj",
    "query_key_value": "qkv_proj query_key_value c_attn Wqkv",
    "output": "o_proj out_proj attn.Wo attention.dense self_attention.dense self_attn.dense attn.c_proj",
    "gate": "gate_proj feed_forward.w1",
    "up": "up_proj fc1 fc_in c_fc dense_h_to_4h feed_forward.w3",
    "gate_up": "gate_up_proj mlp.Wi",
    "down": "down_proj fc2 fc_out dense_4h_to_h mlp.c_proj mlp.Wo feed_forward.w2",
}
# Rows per channel of the matrices before an MLP's nonlinearity.
PARTS = {"gate": 1, "up": 1, "gate_up": 2}
ROLES = {end: role for role, ends in ENDS.items() for end in ends.split()}


class NoTargetsError(ValueError):
    """Nothing in the model matches the patterns of linears to compress."""


class PatternError(ValueError):
    """A pattern of `targets` or `ignore` that matches nothing, or is no regular expression."""


class UnreachedError(ValueError):
    """Calibration shows nothing of some linears; the message names them, and the patterns that leave them out."""


@dataclass(frozen=True)
class Linear:
    """A targeted linear layer y = W x: where it is and what it does.

    Attributes:
        kind: the end of its name that tells it from the other linears of a layer: `q_proj`, but `attn.c_proj` where
            there also is an `mlp.c_proj`.
    """

    name: str
    kind: str
    role: str | None
    layer: int
    out_features: int
    in_features: int
    module: nn.Module

    @property
    def weight(self) -> Tensor:
        """W with shape (out, in); transformers' Conv1D stores the transpose."""
        return _weight(self.module)


@dataclass(frozen=True)
class LeftDense:
    """Parameters that stay as they are, and why.

    Attributes:
        name: of the parameter, with `*` for numbers, so that one row speaks of all layers; "vectors" for norms,
            biases and everything else of one dimension.
    """

    name: str
    reason: str
    tensors: int
    parameters: int


def is_conv1d(module: nn.Module) -> bool:
    """GPT-2 style linears: transformers' Conv1D, whose weight is (in, out)."""
    return type(module).__name__ == "Conv1D"


def find_linears(model: nn.Module, targets: Sequence[str], ignore: Sequence[str] = ()) -> list[Linear]:
    """Linears to compress, in the model's order; :func:`survey` without what is left.

    Raises:
        NoTargetsError, PatternError: as :func:`survey` does.
    """
    return survey(model, targets, ignore)[0]


def survey(
    model: nn.Module, targets: Sequence[str], ignore: Sequence[str] = ()
) -> tuple[list[Linear], list[LeftDense]]:
    """Linears to compress, in the model's order, and all other parameters with the reason why they stay.

    Never compressed, whatever the patterns: the output head, what is outside a numbered layer, weights of which
    another module has the same, modules that do more than W x + b, and matrices of one row or column. Weights that
    belong to no linear are those of experts, as transformers keeps them (experts, out, in) and ``experts.unfuse`` has
    not taken them apart, of routers and of convolutions.

    Args:
        targets: class names (``Linear``), module names or ends of them (``q_proj``, ``mlp.up_proj``), or regular
            expressions behind ``re:`` that match from the beginning of the name on: the vocabulary of
            compressed-tensors and llm-compressor, and ends of names.
        ignore: patterns of the same kind, taken out again; one may also match what no pattern could target.

    Raises:
        NoTargetsError: nothing is left; the message says what the model has.
        PatternError: a pattern matches nothing.
    """
    owners = {n: m for n, m in model.named_modules() if any(p.ndim > 1 for p in m.parameters(recurse=False))}
    linears = {name: module for name, module in owners.items() if _is_linear(module)}
    _check_patterns("targets", targets, linears)
    _check_patterns("ignore", ignore, owners)
    reasons = _reasons(model, owners, targets, ignore)
    kinds = _kinds([name for name in linears if layer_index(name) is not None])
    chosen = [
        Linear(name, kinds[name], role_of(name), layer, *_shape(module), module)
        for name, module in linears.items()
        if name not in reasons and (layer := layer_index(name)) is not None
    ]
    left = _left_dense(model, reasons)
    if not chosen:
        found = "; ".join(f"{row.name} ({row.reason})" for row in left if row.name != "vectors") or "nothing"
        raise NoTargetsError(
            f"no linear layer is left to compress with targets {list(targets)} and ignore {list(ignore)}; the model "
            f"has: {found}"
        )
    return chosen, left


def role_of(name: str) -> str | None:
    """The role of a linear of that dotted name; None where the table does not say."""
    parts = name.split(".")
    return ROLES.get(".".join(parts[-2:]), ROLES.get(parts[-1]))


def layer_index(name: str) -> int | None:
    """Index of the decoder layer in a dotted name: its first number; None where there is none."""
    number = re.search(r"(?:^|\.)(\d+)(?:\.|$)", name)
    return int(number[1]) if number else None


@torch.no_grad()
def shared_inputs(model: nn.Module, linears: Sequence[Linear], ids: Tensor) -> dict[str, str]:
    """For each linear the name of the first linear that reads the same tensor (itself, where it reads alone).

    Found by looking, not by name: one forward pass over ids (batch, tokens), comparing the very tensor objects. An
    expert, a linear in a numbered list within its layer, may see none of these few tokens; it then reads alone, but for
    those of ``ExpertsAsLinears``, each of which is shown a token.

    Raises:
        UnreachedError: a linear that is no expert is not called in the forward pass.
    """
    seen: dict[str, Tensor] = {}

    def remember(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        return lambda _module, args: seen.update({name: seen.get(name, args[0])})

    with ExitStack() as hooks:
        for linear in linears:
            hooks.enter_context(linear.module.register_forward_pre_hook(remember(linear.name)))
        model(input_ids=ids, use_cache=False)
        for experts in model.modules():
            if isinstance(experts, ExpertsAsLinears):
                experts.show_all()
    missed = [x.name for x in linears if x.name not in seen and not in_list(x.name)]
    if missed:
        raise unreached("no token went through", missed)
    owners: dict[int, str] = {}
    return {x.name: owners.setdefault(id(seen.get(x.name, x.module)), x.name) for x in linears}


def in_list(name: str) -> bool:
    """True for a linear in a numbered list within its layer, as experts are."""
    return len(re.findall(r"\.\d+\.", name)) > 1


def unreached(what: str, names: Sequence[str]) -> UnreachedError:
    """The error to raise where calibration shows nothing of these linears; ``what`` did not happen to them."""
    patterns = dict.fromkeys("re:" + re.sub(r"(?<=\\\.)\d+(?=\\\.)", r"\\d+", re.escape(name)) for name in names)
    return UnreachedError(
        f"{what} {', '.join(names[:3])} ({len(names)} linears), so there is nothing to compress by. Either the model "
        f"uses their weights in its own way, or its router chose other experts: calibrate on more tokens, or leave "
        f"them out with covariance.ignore: [{', '.join(patterns)}]"
    )


def _weight(module: nn.Module) -> Tensor:
    weight = module.get_parameter("weight")
    return weight.T if is_conv1d(module) else weight


def _shape(module: nn.Module) -> tuple[int, int]:
    n_out, n_in = _weight(module).shape
    return n_out, n_in


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or is_conv1d(module)


def _reasons(
    model: nn.Module, owners: Mapping[str, nn.Module], targets: Sequence[str], ignore: Sequence[str]
) -> dict[str, str]:
    """Why modules with matrices stay as they are, by name; linears that are compressed are not in it."""
    head_of: Any = getattr(model, "get_output_embeddings", None)
    head = head_of() if head_of else None
    places = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        places[id(parameter)].append(name)
    peculiar = _peculiar_classes(filter(_is_linear, owners.values()))

    def reasons(name: str, module: nn.Module) -> Iterator[Any]:
        kind = type(module)
        yield isinstance(module, nn.Embedding) and "embedding"
        yield module is head and "output head"
        yield layer_index(name) is None and "outside the layers"
        yield not _is_linear(module) and f"no linear, but {kind.__name__}"
        others = [place for place in places[id(module.weight)] if place != f"{name}.weight"]
        yield others and f"the same tensor as {_starred(others[0])}"
        yield kind in peculiar and f"{kind.__name__} computes something else than W x + b"
        yield min(_shape(module)) == 1 and "a single row or column: no rank is smaller"
        yield not any(matches(pattern, name, module) for pattern in targets) and "matches no target"
        yield from (f"ignored: {pattern}" for pattern in ignore if matches(pattern, name, module))

    found = {name: next(filter(None, reasons(name, module)), None) for name, module in owners.items()}
    return {name: reason for name, reason in found.items() if reason}


def _peculiar_classes(modules: Iterable[nn.Module]) -> set[type[nn.Module]]:
    """Classes derived from nn.Linear whose forward pass is another: found by trying the smallest of each."""
    smallest: dict[type[nn.Module], nn.Module] = {}
    for module in sorted(modules, key=lambda m: -m.get_parameter("weight").numel()):
        if type(module).forward is not nn.Linear.forward and not is_conv1d(module):
            smallest[type(module)] = module
    return {kind for kind, module in smallest.items() if not _is_affine(module)}


@torch.no_grad()
def _is_affine(module: Any) -> bool:
    """True if the module gives W x + b on weights of our own, since those of a model may be on no device."""
    n_out, n_in = module.weight.shape
    weight, x = torch.arange(n_out * n_in).sin().view(n_out, n_in), torch.arange(3 * n_in).cos().view(1, 3, n_in)
    own = {"weight": weight} | ({} if module.bias is None else {"bias": torch.arange(n_out).cos()})
    bare = copy.copy(module)
    vars(bare).pop("forward", None)  # accelerate's, if any, which would fetch the module's own weights
    try:
        y = torch.func.functional_call(bare, own, (x,))
    except (RuntimeError, TypeError, ValueError, IndexError):  # it takes another kind of input
        return False
    return isinstance(y, Tensor) and torch.allclose(y, F.linear(x, **own), atol=1e-4)


def _kinds(names: Sequence[str]) -> dict[str, str]:
    """The shortest end of every name, numbers left out, that no other path has."""
    paths = {name: tuple(part for part in name.split(".") if not part.isdigit()) for name in names}
    ends: dict[tuple[str, ...], set[tuple[str, ...]]] = defaultdict(set)
    for path in paths.values():
        for n in range(1, len(path) + 1):
            ends[path[-n:]].add(path)
    lengths = {
        path: next((n for n in range(1, len(path)) if len(ends[path[-n:]]) == 1), len(path)) for path in paths.values()
    }
    return {name: ".".join(path[-lengths[path] :]) for name, path in paths.items()}


def _left_dense(model: nn.Module, reasons: Mapping[str, str]) -> list[LeftDense]:
    rows: dict[tuple[str, str], list[int]] = defaultdict(list)
    for name, parameter in model.named_parameters():
        if parameter.ndim < 2:
            rows["vectors", "norms, biases and the like"].append(parameter.numel())
        elif reason := reasons.get(name.rpartition(".")[0]):
            rows[_starred(name), reason].append(parameter.numel())
    return [LeftDense(*key, len(sizes), sum(sizes)) for key, sizes in rows.items()]


def _starred(name: str) -> str:
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", name)


def _check_patterns(key: str, patterns: Iterable[str], modules: Mapping[str, nn.Module]) -> None:
    for pattern in patterns:
        try:
            found = any(matches(pattern, name, module) for name, module in modules.items())
        except re.error as error:
            raise PatternError(f"covariance.{key}: {pattern!r} is no regular expression: {error}") from None
        if not found:
            ends = sorted({name.rpartition(".")[2] for name in modules})
            raise PatternError(
                f"covariance.{key}: {pattern!r} matches nothing in this model. A pattern is a class name, a module's "
                f"name or its end, or 're:' and an expression that matches from the name's beginning on ('re:.*'). "
                f"Ends of names here: {', '.join(ends) or 'there is no linear'}"
            )


def matches(pattern: str, name: str, module: nn.Module) -> bool:
    """True if a pattern of ``targets`` or ``ignore`` is of the module of that name."""
    if pattern.startswith("re:"):
        return re.match(pattern.removeprefix("re:"), name) is not None
    if name == pattern or name.endswith("." + pattern):
        return True
    return any(kind.__name__ == pattern for kind in type(module).__mro__ if issubclass(kind, nn.Module))
