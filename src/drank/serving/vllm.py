"""vLLM serves a compressed folder as it is. Its entry point ``vllm.general_plugins`` calls :func:`register`, in every
process; nothing here is imported unless vLLM runs.

vLLM puts linears that share their input into one layer (queries, keys and values; gate and up), and gives each tensor
of a checkpoint to that layer together with the name of its part. Here such a layer holds our own modules, one per
part, and calls them one after the other; so every form is served, at any precision, by the arithmetic of
``drank.model.layers``.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from vllm.distributed import get_tensor_model_parallel_world_size
from vllm.model_executor.layers.linear import LinearBase, LinearMethodBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

from drank.model.format import SCALES, FormatError, Spec, parse
from drank.model.forms import check_specs, class_of, embedding_shapes, grid_of, keys_of

# Fused layer of vLLM -> the modules of a folder that it is made of, by what vLLM calls the part. A folder may have a
# module of the fused name itself (Phi-3); then it is one part.
FUSED: dict[str, Mapping[Any, str]] = {
    "qkv_proj": {"q": "q_proj", "k": "k_proj", "v": "v_proj"},
    "gate_up_proj": {0: "gate_proj", 1: "up_proj"},
}


class UnsupportedError(ValueError):
    """vLLM was asked for something that the factors cannot do there; the message says what, and the way out."""


def register() -> None:
    """Make vLLM know the quantisation method ``drank``."""
    register_quantization_config("drank")(Factored)


class Factored(QuantizationConfig):
    """``quantization_config`` of a compressed folder, and the modules made of it by name, whose bases may be shared."""

    def __init__(self, specs: Mapping[str, Spec]) -> None:
        super().__init__()
        self.specs, self.parts = dict(specs), dict[str, Any]()

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "Factored":
        specs = parse(config).modules
        check_specs(specs)
        return cls(specs)

    @staticmethod
    def get_name() -> str:
        return "drank"

    @staticmethod
    def get_supported_act_dtypes() -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        return 0

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """How a layer computes; None leaves it to vLLM."""
        if isinstance(layer, VocabParallelEmbedding):
            return Embedding(self.specs[prefix]) if prefix in self.specs else None
        if not isinstance(layer, LinearBase):
            return None
        parent, _, own = prefix.rpartition(".")
        fused = {} if prefix in self.specs else FUSED.get(own, {})
        names = {part: f"{parent}.{module}" for part, module in fused.items()} or {None: prefix}
        if not self.specs.keys() & set(names.values()):
            return UnquantizedLinearMethod()
        return Parts(self, names)


class Parts(LinearMethodBase):
    """The modules of a layer: their outputs, one behind the other."""

    def __init__(self, config: Factored, names: Mapping[Any, str]) -> None:
        self.config, self.names = config, names

    def create_weights(
        self,
        layer: nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: Sequence[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **_: Any,
    ) -> None:
        refuse_tensor_parallel()
        sizes = dict(zip(self.names, output_partition_sizes, strict=True))
        made = {part: self._module(part, input_size, sizes[part], params_dtype) for part in self.names}
        layer.parts = nn.ModuleList(made.values())
        # vLLM looks for tensors in the layer itself; it is given empty ones whose loader knows where they belong.
        self.inlets = sorted({tensor for module in made.values() for tensor in _tensors(module)})
        for tensor in self.inlets:
            _inlet(layer, tensor, made)
        self.config.parts |= {self.names[part]: module for part, module in made.items()}

    def _module(self, part: Any, n_in: int, n_out: int, dtype: torch.dtype) -> nn.Module:
        spec = self.config.specs.get(self.names[part])
        if spec is None:
            return nn.Linear(n_in, n_out, bias=False, dtype=dtype)
        n_in, n_out = spec.in_features, spec.out_features
        if spec.form == "dense" and spec.bits is None:
            return nn.Linear(n_in, n_out, bias=False, dtype=dtype)
        return class_of(spec)(n_in, n_out, spec.rank or 0, False, dtype=dtype, grid=grid_of(spec), **keys_of(spec))

    def process_weights_after_loading(self, layer: Any) -> None:
        for name, module in zip(self.names.values(), layer.parts, strict=True):
            spec = self.config.specs.get(name)
            if spec is not None and spec.basis not in (None, name):
                _share(module, self.config.parts[spec.basis])
        for tensor in self.inlets:
            del layer._parameters[tensor]
        layer.weight = layer.parts[0].weight  # vLLM looks at its type and device

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        y = torch.cat([module(x) for module in layer.parts], -1) if len(layer.parts) > 1 else layer.parts[0](x)
        return y if bias is None else y + bias


class Embedding(QuantizeMethodBase):
    """Embeddings or a head in 8 bits, multiplied out once: vLLM looks rows up in a table, and ties it to the head."""

    def __init__(self, spec: Spec) -> None:
        self.tokens, self.stored = spec.out_features, dict[str, Tensor]()

    def create_weights(
        self,
        layer: nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: Sequence[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **_: Any,
    ) -> None:
        refuse_tensor_parallel()
        table = nn.Parameter(
            torch.zeros(sum(output_partition_sizes), input_size_per_partition, dtype=params_dtype), requires_grad=False
        )
        scales = nn.Parameter(torch.empty(0), requires_grad=False)

        def keep(key: str) -> Callable[..., None]:
            def load(_: Tensor, loaded: Tensor) -> None:
                self.stored[key] = loaded
                if len(self.stored) == len(embedding_shapes(1, 1)):
                    rows = self.stored["weight"][..., 0] * self.stored[f"weight{SCALES}"]
                    table.data[: self.tokens] = rows  # vLLM may have rounded the number of tokens up
                    self.stored.clear()

            return load

        for key, parameter in (("weight", table), (f"weight{SCALES}", scales)):
            parameter.weight_loader = keep(key)  # type: ignore[attr-defined]
            layer.register_parameter(key, parameter)

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        delattr(layer, f"weight{SCALES}")

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return F.linear(x, layer.weight, bias)

    def embedding(self, layer: Any, ids: Tensor) -> Tensor:
        return F.embedding(ids, layer.weight)


def refuse_tensor_parallel() -> None:
    """Raises UnsupportedError where vLLM cuts layers among several devices."""
    if (n := get_tensor_model_parallel_world_size()) > 1:
        raise UnsupportedError(
            f"tensor_parallel_size is {n}: factors are not cut among devices; serve with tensor_parallel_size 1, or the "
            f"folder that 'drank export --dense' writes"
        )


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    return dict(module.named_parameters()) | dict(module.named_buffers())


def _inlet(layer: nn.Module, tensor: str, parts: Mapping[Any, nn.Module]) -> None:
    """An empty parameter of the layer, whose loader fills that tensor of a part."""

    def load(_: Tensor, loaded: Tensor, part: Any = None) -> None:
        own = _tensors(parts[part]).get(tensor)
        if own is None or own.shape != loaded.shape:
            told = "none" if own is None else tuple(own.shape)
            raise FormatError(
                f"{tensor} has shape {tuple(loaded.shape)} where config.json makes it {told}: the folder is damaged, "
                f"copy it again"
            )
        own.data.copy_(loaded)

    inlet = nn.Parameter(torch.empty(0), requires_grad=False)
    inlet.weight_loader = load  # type: ignore[attr-defined]
    # register_parameter refuses dots; a part may have a `basis`, and another of the same layer a `basis.weight`.
    layer._parameters[tensor] = inlet


def _share(module: Any, owner: Any) -> None:
    """Give a module the basis of its owner."""
    holder, _, own = module.basis_name.rpartition(".")
    for name, tensor in owner.get_submodule(holder).named_parameters(recurse=False):
        if name.startswith(own):
            setattr(module.get_submodule(holder), name, tensor)
