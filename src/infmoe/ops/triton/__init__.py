"""Triton kernels of the ∞-MoE layer for CUDA: fused selection (forward, backward) and sparse decoding.

Importing this package imports no triton; the first use of a kernel does. Ask `available()` before that.
"""

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from infmoe.ops.triton.ops import gated_linear as gated_linear
    from infmoe.ops.triton.ops import gated_mask as gated_mask
    from infmoe.ops.triton.ops import mean_mask as mean_mask
    from infmoe.ops.triton.ops import sparse_ffn as sparse_ffn

_API = ("gated_linear", "gated_mask", "mean_mask", "sparse_ffn")


def available() -> tuple[bool, str]:
    """Whether the kernels run in this process, and if not, why: one clause that names the fix."""
    if importlib.util.find_spec("triton") is None:
        return False, "triton is not installed: pip install 'infmoe[triton]'"
    from triton import knobs

    if knobs.runtime.interpret:  # TRITON_INTERPRET=1: any device, slowly
        return True, ""
    if not torch.cuda.is_available():
        return False, "torch sees no CUDA device"
    if torch.version.hip is None and torch.cuda.get_device_capability() < (8, 0):
        return False, "the CUDA device is older than compute capability 8.0"
    return True, ""


def __getattr__(name: str) -> Any:
    if name not in _API:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.ops"), name)
