"""The floating-point type that passes through a model are computed in. Knows torch and the processor.

Weights are stored in bfloat16, which float32 holds exactly. So a pass may be computed in either type, whichever the
processor multiplies faster.
"""

import logging
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

log = logging.getLogger("drank.precision")

CPU_FACTS = Path("/proc/cpuinfo")  # Linux only
X86 = ("x86_64", "amd64", "i386", "i686")


def compute_dtype(asked: str, device: str) -> torch.dtype:
    """The type of passes on a device: the one asked for, or for ``auto`` bfloat16 where ``has_units``, else float32.

    Facts of the processor decide, never a timing: the same machine gives the same bytes on every run. A type that is
    slow on this device is allowed, and a warning tells so.

    Args:
        asked: "auto", "float32", "bfloat16" or "float16".
        device: "cpu", "cuda" or "cuda:0".

    """
    if asked == "auto":
        return torch.bfloat16 if has_units(torch.bfloat16, device) else torch.float32
    dtype: torch.dtype = getattr(torch, asked)
    if not has_units(dtype, device):
        log.warning(
            "%s is slow on this processor, which has no fast units for it: passes take 2 to 20 times as long as in "
            "float32. To be fast, ask for auto or float32 (compute.dtype in params.yaml, --dtype of drank bench).",
            asked,
        )
    return dtype


def agreed_dtype(asked: str, device: str, gather: Callable[[str], list[str]]) -> torch.dtype:
    """``compute_dtype``, the same in all processes of a group: float32 if their processors choose differently.

    Args:
        gather: every process's value, given this one's.
    """
    chosen = set(gather(name_of(compute_dtype(asked, device))))
    return getattr(torch, chosen.pop()) if len(chosen) == 1 else torch.float32


def load_model(folder: Path, dtype: torch.dtype | str, device: str) -> Any:
    """The model of a folder on a device, for passes in this type, without dropout."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval().to(device)


def has_units(dtype: torch.dtype, device: str) -> bool:
    """True if the device multiplies matrices of this type at least as fast as those of float32.

    float32: always. On CUDA: bfloat16 if the GPU has it in hardware, and float16. On a CPU: float16 if oneDNN has
    kernels for it, and bfloat16 by this rule:

    * oneDNN has kernels for it (on x86 it asks for AVX-512);
    * on x86, AMX is there, or AVX512-BF16 on a processor that is not Intel's; elsewhere nothing more.

    Measured, GFLOP/s in bfloat16 and in float32 of a product of 2048 x 576 and 576 x 1536 numbers: 867 and 210 on an
    AMD EPYC (Zen 5) with AVX512-BF16, two threads; 166 and 311 on an Intel Xeon with AVX512-BF16 and without AMX, two
    threads; 10.6 and 65.8 on an AMD EPYC with AVX2, one thread. A processor with AMX was not measured.
    """
    if dtype == torch.float32:
        return True
    if device.startswith("cuda"):
        return dtype == torch.float16 or torch.cuda.is_bf16_supported(including_emulation=False)
    if dtype == torch.float16:
        return _told(lambda: torch.ops.mkldnn._is_mkldnn_fp16_supported())
    if not _told(lambda: torch.ops.mkldnn._is_mkldnn_bf16_supported()):
        return False
    if platform.machine().lower() not in X86:
        return True
    avx512_bf16 = _told(lambda: torch.cpu._is_avx512_bf16_supported()) and "intel" not in cpu_fact("vendor_id").lower()
    return avx512_bf16 or _told(lambda: torch.cpu._is_amx_tile_supported())


def name_of(dtype: torch.dtype) -> str:
    """The name of a type as params.yaml and results have it, such as "float32"."""
    return str(dtype).removeprefix("torch.")


def _told(fact: Callable[[], bool]) -> bool:
    try:
        return bool(fact())
    except (AttributeError, RuntimeError):  # torch's private functions: another version may lack them
        return False


def cpu_fact(name: str) -> str:
    """A fact of the first processor from Linux, such as its "model name"; elsewhere the kind that Python knows."""
    lines = CPU_FACTS.read_text(errors="replace").splitlines() if CPU_FACTS.is_file() else []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith(name))
    return next(named, platform.processor())
