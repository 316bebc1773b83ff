"""vLLM serves a compressed folder as it is. Its entry point ``vllm.general_plugins`` calls :func:`register` in each of
its processes; nothing here is imported unless vLLM runs.

vLLM puts linears that share their input into one layer (queries, keys and values; gate and up). Here such a layer holds
drank's own modules, one per linear of the folder, and calls them one after the other: every form is served, at any
precision, by the arithmetic of ``drank.model.layers``.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig, get_current_vllm_config
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.linear import (
    LinearBase,
    LinearMethodBase,
    QKVParallelLinear,
    UnquantizedLinearMethod,
)
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

from drank.model.checksums import check_released
from drank.model.format import FormatError, Spec
from drank.model.forms import class_of, grid_of, keys_of
from drank.model.layers import RoundedEmbedding, RoundedHead
from drank.model.quantizer import DrankConfig


class UnsupportedError(ValueError):
    """vLLM was asked for something that it cannot do with factors; the message names it, and the way out."""


def register() -> None:
    """Make vLLM know the quantisation method ``drank``."""
    register_quantization_config("drank")(Factored)


class Factored(QuantizationConfig):
    """``quantization_config`` of a compressed folder, and the modules made of it by name, whose bases may be shared."""

    def __init__(self, specs: Mapping[str, Spec]) -> None:
        super().__init__()
        self.specs, self.modules = dict(specs), dict[str, nn.Module]()

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "Factored":
        return cls(DrankConfig(**config).specs)

    def maybe_update_config(self, model_name: str, hf_config: Any = None, revision: str | None = None) -> None:
        """Compares the folder with its checksums: vLLM calls this once it knows where the folder is."""
        check_released(Path(model_name).glob("*.safetensors"))
        if getattr(hf_config, "model_type", None) == "gpt2":
            raise UnsupportedError(f"gpt2: vLLM transposes the matrices as it reads them, factors too; {WAY_OUT}")

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
        vllm = get_current_vllm_config()
        refuse_unsupported(vllm)
        if isinstance(layer, VocabParallelEmbedding):
            # Some architectures tell only their head its name; the other embedding is that inside the decoder.
            inside = (name for name, spec in self.specs.items() if spec.form == "embedding" and "." in name)
            tied = isinstance(layer, ParallelLMHead) and vllm.model_config.hf_text_config.tie_word_embeddings
            name = next(inside, "") if tied or not prefix else prefix
            return Embedding(name, self.specs[name]) if name in self.specs else None
        if isinstance(layer, RoutedExperts):
            raise UnsupportedError(f"{prefix}: mixtures of experts are not served in factors; {WAY_OUT}")
        if not isinstance(layer, LinearBase):
            return None
        names = self._names(layer, prefix)
        return Linears(self, names) if self.specs.keys() & {*names.values()} else UnquantizedLinearMethod()

    def _names(self, layer: LinearBase, prefix: str) -> dict[Any, str]:
        """The folder's linears in a layer, by what vLLM calls each part of it. A folder may have the layer's own name
        (Phi-3's fused queries, keys and values); else the table of the architecture says what is fused."""
        parent, _, own = prefix.rpartition(".")
        fused = self.packed_modules_mapping.get(own, [own])
        if prefix in self.specs or fused == [own]:
            return {None: prefix}
        parts = "qkv" if isinstance(layer, QKVParallelLinear) else range(len(fused))
        return {part: f"{parent}.{name}" for part, name in zip(parts, fused, strict=True)}


class Linears(LinearMethodBase):
    """The linears of a layer: their outputs, one behind the other."""

    def __init__(self, config: Factored, names: Mapping[Any, str]) -> None:
        self.config, self.names = config, names

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: Sequence[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **_: Any,
    ) -> None:
        sizes = output_partition_sizes if len(self.names) > 1 else [output_size]
        modules = {
            part: self._module(name, input_size, size, layer.has_bias, params_dtype)
            for (part, name), size in zip(self.names.items(), sizes, strict=True)
        }
        kept = {module.out_features / size for module, size in zip(modules.values(), sizes, strict=True)}
        if len(kept) > 1:
            raise FormatError(f"{', '.join(self.names.values())} keep different shares of their outputs: {kept}")
        self.missing = _hold(layer, modules, self.names)
        self.config.modules |= {self.names[part]: module for part, module in modules.items()}

    def _module(self, name: str, n_in: int, n_out: int, bias: bool, dtype: torch.dtype) -> Any:
        spec = self.config.specs.get(name)
        if spec is None:
            return nn.Linear(n_in, n_out, bias, dtype=dtype)
        n_in, n_out = spec.in_features, spec.out_features
        if spec.form == "dense" and spec.bits is None:
            return nn.Linear(n_in, n_out, bias, dtype=dtype)
        return class_of(spec)(n_in, n_out, spec.rank or 0, bias, dtype=dtype, grid=grid_of(spec), **keys_of(spec))

    def process_weights_after_loading(self, layer: Any) -> None:
        for name, module in zip(self.names.values(), layer.linears, strict=True):
            spec = self.config.specs.get(name)
            if spec is not None and spec.basis not in (None, name):
                shared = _basis(self.config.modules[spec.basis])
                for key, tensor in shared.items():
                    parent, _, own = key.rpartition(".")
                    setattr(module.get_submodule(parent), own, tensor)
                self.missing -= {f"{name}.{key}" for key in shared}
        _refuse_missing(self.missing)
        layer.bias = None  # vLLM's own, which nothing filled: each linear has its part of it

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return layer.linears[0](x) if len(layer.linears) == 1 else torch.cat([part(x) for part in layer.linears], -1)


class Embedding(QuantizeMethodBase):
    """Embeddings in 8 bits, an output head, or both where they are tied."""

    def __init__(self, name: str, spec: Spec) -> None:
        self.name, self.spec = name, spec

    def create_weights(self, layer: Any, *_: Any, params_dtype: torch.dtype, **__: Any) -> None:
        sizes = self.spec.in_features, self.spec.out_features
        table, head = RoundedEmbedding(*sizes, dtype=params_dtype), RoundedHead(*sizes, dtype=params_dtype)
        head.weight, head.weight_scales = table.weight, table.weight_scales
        self.missing = _hold(layer, {None: table}, {None: self.name})
        layer.head = head

    def tie_weights(self, layer: Any, embed_tokens: Any) -> Any:
        layer.linears, layer.head, self.missing = embed_tokens.linears, embed_tokens.head, set()
        return layer

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        _refuse_missing(self.missing)

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return layer.head(x) if bias is None else layer.head(x) + bias

    def embedding(self, layer: Any, ids: Tensor) -> Tensor:
        return layer.linears[0](ids)


WAY_OUT = "serve the folder that 'drank export --dense' writes"


def refuse_unsupported(config: VllmConfig) -> None:
    """Raises UnsupportedError where vLLM would cut or change the layers."""
    parallel = config.parallel_config
    asked = {
        f"tensor_parallel_size is {parallel.tensor_parallel_size}": parallel.tensor_parallel_size > 1,
        f"pipeline_parallel_size is {parallel.pipeline_parallel_size}": parallel.pipeline_parallel_size > 1,
        "enable_lora is on": config.lora_config is not None,
        "speculative_config is given": config.speculative_config is not None,
    }
    for option in (option for option, given in asked.items() if given):
        raise UnsupportedError(
            f"{option}: a compressed folder is served on one device, without adapters and drafts; leave it out, or "
            f"{WAY_OUT}"
        )


def _hold(layer: Any, modules: Mapping[Any, nn.Module], names: Mapping[Any, str]) -> set[str]:
    """Give a layer these modules and vLLM's loader a way into them; the tensors that are to come, by full name.

    The loader hands a layer its tensors under their own names, each with the part that it is of. vLLM's own loading of
    fused layers would look for one parameter per name, and has no place for a `basis` in one part and a `basis.weight`
    in another.
    """
    layer.linears = nn.ModuleList(modules.values()).requires_grad_(False)
    missing = {f"{names[part]}.{key}" for part, module in modules.items() for key in module.state_dict()}

    def load(weights: Iterable[tuple[str, Tensor]]) -> Iterator[str]:
        for key, loaded in weights:
            part = getattr(loaded, "shard_id", None)
            name, own = f"{names[part]}.{key}", modules[part].state_dict().get(key)
            if own is None or (own.shape, own.is_floating_point()) != (loaded.shape, loaded.is_floating_point()):
                told = "has none" if own is None else f"makes it {own.dtype} of shape {tuple(own.shape)}"
                raise FormatError(
                    f"{name} is stored as {loaded.dtype} of shape {tuple(loaded.shape)}, but config.json {told}: it is "
                    f"not that of these weights, copy the folder again"
                )
            own.copy_(loaded)
            missing.discard(name)
            yield key

    layer.load_weights = load
    return missing


def _basis(module: nn.Module) -> dict[str, nn.Parameter]:
    """The tensors of a basis, rounded or not, in a module that shares it."""
    return {key: tensor for key, tensor in module.named_parameters() if key.startswith("basis")}


def _refuse_missing(names: set[str]) -> None:
    if names:
        raise FormatError(f"{min(names)} is in no weight file: the folder is incomplete, copy it again")
