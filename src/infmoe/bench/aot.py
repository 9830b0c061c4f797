"""The Triton kernels compiled ahead of time, on any machine: what they ask of a GPU, before there is one."""

import importlib.util
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from infmoe.bench.common import Measured, Rows
from infmoe.errors import InfMoEError

ARCHITECTURES = (80, 90)  # A100, H100
# (units, activation, statistical selection)
_GEOMETRIES = ((6144, "gelu_new", False), (6144, "gelu_new", True), (6144, "swiglu", False), (16384, "gelu_new", False))
_REGISTERS_PER_SM = 65536
_THREADS_PER_SM = 2048
_SHARED_BYTES_PER_SM = {80: 164 * 1024, 90: 228 * 1024}


def launches(
    num_units: int, *, dtype: torch.dtype, act: str, hidden_size: int = 768, statistical: bool = False
) -> list:
    """What one layer of `num_units` neurons launches: selection forward and backward, mean mask, sparse decoding.

    Nothing runs: the tensors have no storage.
    """
    from infmoe.ops.triton import ops
    from infmoe.ops.triton.launch import recording

    N, K, U, D = 4, 2, num_units, hidden_size

    def empty(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    gated = ops.ACTS[act][1]
    scores, weight = empty(N, K, U, dtype=torch.float32), empty(N, K, dtype=torch.float32)
    num_kept = empty(N, dtype=torch.int32)
    pre = empty(N, U).requires_grad_()
    gate = empty(N, U) if gated else None
    with recording() as recorded:
        w2, b2 = empty(D, U).requires_grad_(), empty(D)
        y, _, _ = ops.gated_linear(pre, scores, num_kept, weight, w2, b2, gate, act=act, statistical=statistical)
        y.backward(empty(N, D))
        mask, _, _ = ops.mean_mask(scores, num_kept, weight, statistical=statistical)
        w3 = (empty(U, D), empty(U)) if gated else ()
        ops.sparse_ffn(empty(N, D), mask, empty(U, D), empty(U), empty(U, D), empty(D), *w3, act=act)
    return recorded


def kernel_name(launch: Any) -> str:
    """The kernel, and which of the uses it is specialised for."""
    name = launch.kernel.__name__.removesuffix("_kernel")
    if name == "select" and not launch.options["HAS_PRE"]:
        return "select (mask alone)"
    if name == "select_backward" and launch.options["WANT_GATED"]:
        return "select_backward (and W2's input)"
    return name


def compile_launch(launch: Any, architecture: int) -> Any:
    """Compile what `launch` would run, specialised as a launch on tensors that are aligned to 16 bytes is."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.int32: "*i32", torch.uint8: "*u8"}
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict[tuple[int], list] = {}
    options = dict(launch.options)
    settings = {name: options.pop(name) for name in ("num_warps", "maxnreg") if name in options}
    for i, (name, value) in enumerate(zip(launch.kernel.arg_names, (*launch.args, *options.values()), strict=True)):
        assert i < len(launch.args) or name in options
        if isinstance(value, Tensor):
            signature[name] = names[value.dtype]
        elif i < len(launch.args) and value != 1:
            signature[name] = "i32"
        else:
            signature[name] = "constexpr"
            constants[name] = value
        if isinstance(value, Tensor) or (signature[name] == "i32" and value % 16 == 0):
            attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(launch.kernel, signature, constants, attributes)
    return triton.compile(
        source, target=GPUTarget("cuda", architecture, 32), options=settings | {"enable_fp_fusion": True}
    )


def resources(compiled: Any, architecture: int) -> dict[str, int]:
    """Registers of a thread, bytes spilled, shared memory of a program, and programs that fit on one SM."""
    from triton.backends.nvidia.compiler import get_ptxas

    suffix = "a" if architecture >= 90 else ""
    with tempfile.TemporaryDirectory() as scratch:
        ptx = Path(scratch) / "kernel.ptx"
        ptx.write_text(compiled.asm["ptx"])
        command = [get_ptxas(architecture).path, "-v", f"--gpu-name=sm_{architecture}{suffix}", str(ptx)]
        report = subprocess.run([*command, "-o", "/dev/null"], capture_output=True, text=True, check=True).stderr
    found = {
        key: re.search(pattern, report)
        for key, pattern in (
            ("registers", r"Used (\d+) registers"),
            ("spill_store_bytes", r"(\d+) bytes spill stores"),
            ("spill_load_bytes", r"(\d+) bytes spill loads"),
        )
    }
    if not all(found.values()):
        raise InfMoEError(f"this ptxas reports resources in another form: {report.strip()[:200]!r}")
    used = {key: int(match[1]) for key, match in found.items() if match}
    shared, threads = compiled.metadata.shared, 32 * compiled.metadata.num_warps
    registers = -(-used["registers"] // 8) * 8  # granted in eights
    programs = min(
        32,
        _THREADS_PER_SM // threads,
        _REGISTERS_PER_SM // (registers * threads),
        _SHARED_BYTES_PER_SM[architecture] // (shared + 1024),  # CUDA takes 1 KiB a program
    )
    return used | {"shared_bytes": shared, "warps": compiled.metadata.num_warps, "programs_per_sm": programs}


def aot(*, quick: bool = False) -> Measured:
    """Registers, spills and shared memory of every kernel, for A100 and H100, from ptxas.

    Geometries: the paper's small model (6144 neurons, D = 768) and the most units that a row may have.

    Raises:
        InfMoEError: triton is not installed, or only interprets.
    """
    if importlib.util.find_spec("triton") is None:
        raise InfMoEError("triton is not installed: pip install 'infmoe[triton]'")
    import triton

    if triton.knobs.runtime.interpret:
        raise InfMoEError("TRITON_INTERPRET is set, and then nothing is compiled: unset it")
    rows: Rows = []
    for num_units, act, statistical in _GEOMETRIES:
        for dtype in (torch.bfloat16,) if quick else (torch.bfloat16, torch.float32):
            for launch in launches(num_units, dtype=dtype, act=act, statistical=statistical):
                options = launch.options
                where = {"kernel": kernel_name(launch), "units": num_units, "dtype": str(dtype).removeprefix("torch.")}
                where |= {"act": options["ACT"], "gate": options["HAS_GATE"]} if options.get("ACT") else {}
                where |= {"statistical": options["STATISTICAL"]} if "STATISTICAL" in options else {}
                for architecture in ARCHITECTURES:
                    used = resources(compile_launch(launch, architecture), architecture)
                    row = {**where, "arch": f"sm_{architecture}", **used}
                    if row not in rows:  # not every kernel knows of the activation and of the mode
                        rows.append(row)
    summary = {
        "triton": triton.__version__,
        "kernels_compiled": len(rows),
        "registers_max": max(row["registers"] for row in rows),
        "spill_bytes_max": max(row["spill_store_bytes"] for row in rows),
        "shared_bytes_max": max(row["shared_bytes"] for row in rows),
    }
    return rows, summary
