"""Which kernels run a layer: `eager`, `fused`, `sparse` or `triton`, and how `auto` decides.

N tokens of all rows, D model width, F neurons.

`auto` looks at nothing but what is known before the call: device, dtype, threads, tokens, and the share of
neurons that a token's masks are expected to leave. Dense and sparse differ in what they read and multiply, so
which is faster turns on the number of tokens and that share alone; the crossover is measured once per geometry
on the machine at hand, over as many copies of the weights as a model has layers, and kept in the cache folder.
"""

import bisect
import contextlib
import itertools
import json
import math
import os
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache, cached_property, lru_cache
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from infmoe.cache import cache_dir
from infmoe.errors import InfMoEError, unknown_name
from infmoe.ops import native, triton
from infmoe.ops.masked_ffn import compiled, few_tokens, fused
from infmoe.ops.tracing import ENVIRONMENT, constant, plain_wanted

Backend = Literal["auto", "eager", "fused", "sparse", "triton"]
BACKENDS: tuple[Backend, ...] = ("auto", "eager", "fused", "sparse", "triton")
# Below this many bytes of W1 and W2 a layer lies in the cache, and its time is the calls' overhead.
_SMALLEST_BYTES = 1 << 20
MAX_TRITON_UNITS = 16384  # a row of scores stays in a program's registers
MAX_SPARSE_TOKENS = 64  # a sparse path for few tokens; never faster beyond, so never measured there
_CALIBRATION_VERSION = 1  # of what is measured, and how
_TOKENS = (1, 2, 4, 8, 16, 32, 64)
_DENSITIES = (0.03, 0.06, 0.125, 0.25, 0.44, 0.7, 1.0)
_WARMUP, _ROUNDS, _POINT_SECONDS = 2, 15, 0.2


class Site(NamedTuple):
    """What a choice depends on.

    Attributes:
        tokens: N.
        density: expected share of the neurons that the union of a token's masks keeps.
        hidden_size: D.
        width: F.
        matrices: 2, or 3 for a gated activation.
        dtype: of weights and input, "float32" or "bfloat16".
        threads: torch's.
    """

    tokens: int
    density: float
    hidden_size: int
    width: int
    matrices: int
    dtype: str
    threads: int

    @property
    def geometry(self) -> str:
        """What a calibration is made for."""
        return f"{self.hidden_size}x{self.width}x{self.matrices} {self.dtype}, {self.threads} threads"

    @property
    def weight_bytes(self) -> int:
        return self.matrices * self.hidden_size * self.width * (2 if self.dtype == "bfloat16" else 4)


def check_backend(name: str) -> None:
    """Raise unless `name` is a backend."""
    if name not in BACKENDS:
        raise unknown_name("backend", name, BACKENDS)


def requested(argument: str | None) -> str:
    """The backend that the call asks for, else the environment, else "auto"."""
    if argument is not None:
        return argument
    name = os.environ.get(ENVIRONMENT) or "auto"
    if name not in BACKENDS:
        raise InfMoEError(f"{ENVIRONMENT}={name!r} is no backend: set it to one of {', '.join(BACKENDS)}")
    return name


@constant
def use_kernels() -> bool:
    """Whether operators that have no backend of their own (the noise) run compiled."""
    return not plain_wanted() and compiled.available()


def resolve(
    argument: str | None,
    *,
    device: str,
    dtype: torch.dtype,
    gradients: bool,
    plain: bool,
    tokens: int,
    density: float,
    hidden_size: int,
    width: int,
    matrices: int,
) -> str:
    """The backend that runs a call.

    Under torch.compile, where the number of tokens may be a symbol, "auto" does not look at it, and so never
    takes the sparse path; by name it runs there too.

    Args:
        argument: the backend that the call asks for, or None.
        device: the input's device type.
        dtype: what W1 computes in.
        gradients: whether autograd records the call.
        plain: W1, W2 and W3 are plain linear maps of `dtype`, not wrapped, quantised or cast by autocast.
        tokens, density, hidden_size, width, matrices: see `Site`.

    Raises:
        InfMoEError: the backend asked for can't run this call; names those that can.
    """
    if torch.compiler.is_compiling():
        return _able(argument, device, dtype, gradients, plain, None)
    wanted = requested(argument)
    site = Site(tokens, density, hidden_size, width, matrices, _name(dtype), torch.get_num_threads())
    choose = _chosen if type(tokens) is int else _chosen.__wrapped__  # what traces by symbols can't be remembered by
    return choose(wanted, device, dtype, gradients, plain, site)


@lru_cache(maxsize=4096)  # the layers of a model ask the same
def _chosen(wanted: str, device: str, dtype: torch.dtype, gradients: bool, plain: bool, site: Site) -> str:
    name = _able(wanted, device, dtype, gradients, plain, site.width)
    if name != "fused" or wanted != "auto" or site.tokens > MAX_SPARSE_TOKENS:
        return name
    if _sparse_reason(device, dtype, gradients, plain) is not None:
        return name
    return "sparse" if _sparse_wins(site) else "fused"


@constant
def _able(
    argument: str | None, device: str, dtype: torch.dtype, gradients: bool, plain: bool, num_units: int | None
) -> str:
    """The backend asked for, if it can run; of those that always can, the best for "auto"."""
    name = requested(argument)
    if name == "eager":
        return name

    def reason(backend: str) -> str | None:
        if backend == "triton":
            return _triton_reason(device, dtype, num_units)
        return _sparse_reason(device, dtype, gradients, plain) if backend == "sparse" else _fused_reason(device, dtype)

    if name == "auto":
        if reason("triton") is None:
            return "triton"
        return "fused" if reason("fused") is None else "eager"
    if (why := reason(name)) is not None:
        able = ["eager", *(other for other in ("fused", "sparse", "triton") if reason(other) is None)]
        raise InfMoEError(f"backend {name!r} can't run this call: {why}; those that can: {', '.join(able)}")
    return name


@cache  # making the text takes longer than the rest of a choice
def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _fused_reason(device: str, dtype: torch.dtype) -> str | None:
    """Why the compiled dense path can't run, or None."""
    if device != "cpu":
        return f"it runs on the CPU, the input is on {device!r}"
    if dtype not in compiled.DTYPES:
        return f"it computes in float32 and bfloat16, not {_name(dtype)}"
    return None if compiled.available() else "there are no compiled kernels on this machine"


def _sparse_reason(device: str, dtype: torch.dtype, gradients: bool, plain: bool) -> str | None:
    if gradients:
        return "it has no gradients; call it under torch.no_grad()"
    if not plain:
        return "W1 or W2 is wrapped, quantised or under autocast"
    return _fused_reason(device, dtype)


def _triton_reason(device: str, dtype: torch.dtype, num_units: int | None) -> str | None:
    if device != "cuda":
        return "it needs a CUDA device"
    if dtype not in compiled.DTYPES:
        return f"it computes in float32 and bfloat16, not {_name(dtype)}"
    if num_units is not None and num_units > MAX_TRITON_UNITS:
        return f"it selects among at most {MAX_TRITON_UNITS} units, this layer has {num_units}"
    able, reason = triton.available()
    return None if able else reason


def _sparse_wins(site: Site) -> bool:
    if site.tokens > MAX_SPARSE_TOKENS or site.weight_bytes < _SMALLEST_BYTES or site.tokens == 0:
        return False
    return calibration(site).ratio(site.tokens, site.density) < 1.0


@dataclass(frozen=True)
class Calibration:
    """Sparse over dense time of one geometry, on a grid of tokens and densities.

    Attributes:
        tokens: the grid's numbers of tokens, rising.
        densities: its densities, rising.
        ratios: for each number of tokens, for each density: time of the sparse path over the dense one's.
    """

    tokens: tuple[int, ...]
    densities: tuple[float, ...]
    ratios: tuple[tuple[float, ...], ...]

    def ratio(self, tokens: int, density: float) -> float:
        """Interpolated in log tokens and log density; beyond the grid its edge holds."""
        log_tokens, log_densities, log_ratios = self._logs
        i, s = _between(log_tokens, math.log(tokens))
        j, t = _between(log_densities, math.log(max(density, 1e-6)))
        low = (1 - t) * log_ratios[i][j] + t * log_ratios[i][j + 1]
        high = (1 - t) * log_ratios[i + 1][j] + t * log_ratios[i + 1][j + 1]
        return math.exp((1 - s) * low + s * high)

    @cached_property
    def _logs(self) -> tuple[list[float], list[float], list[list[float]]]:
        """Of the grid and of what was measured on it."""
        ratios = [[math.log(r) for r in row] for row in self.ratios]
        return [math.log(n) for n in self.tokens], [math.log(d) for d in self.densities], ratios


def _between(grid: list[float], x: float) -> tuple[int, float]:
    """The cell that holds x, and where in it x lies, in [0, 1]."""
    i = min(max(bisect.bisect_right(grid, x) - 1, 0), len(grid) - 2)
    return i, min(max((x - grid[i]) / (grid[i + 1] - grid[i]), 0.0), 1.0)


_calibrations: dict[str, Calibration] = {}


def calibration(site: Site) -> Calibration:
    """The geometry's calibration: from memory, from the cache folder, or measured now (a few seconds)."""
    known = _calibrations.get(site.geometry)
    if known is None:
        known = _read().get(site.geometry)
        if known is None:
            print(f"infmoe: calibrating the dispatcher for {site.geometry}, once", file=sys.stderr)
            known = calibrate(site)
            _write(site.geometry, known)
        _calibrations[site.geometry] = known
    return known


@torch.inference_mode(False)
def calibrate(site: Site) -> Calibration:
    """Measure a geometry: dense and sparse take turns over random weights and masks.

    Weights are held in up to 12 copies (at most 256 MiB) and used in rotation, as a model's layers are: what
    does not fit the cache there must not lie in it here.
    """
    dtype = torch.bfloat16 if site.dtype == "bfloat16" else torch.float32
    D, width = site.hidden_size, site.width
    copies = max(1, min(12, (256 << 20) // site.weight_bytes))
    generator = torch.Generator().manual_seed(0)

    def normal(rows: int, columns: int) -> Tensor:
        return torch.randn(rows, columns, generator=generator, dtype=torch.float32)

    def weight(rows: int, columns: int) -> Tensor:
        return normal(rows, columns).mul_(columns**-0.5).to(dtype)

    third = site.matrices == 3
    layers = [(weight(width, D), weight(width, D) if third else None, weight(D, width)) for _ in range(copies)]
    activation = "swiglu" if third else "gelu_new"

    def dense(turn: int, x_ND: Tensor, mask_NF: Tensor) -> None:
        w1, w3, w2 = layers[turn % copies]
        pre = few_tokens.linear(x_ND, w1, None)
        gate = None if w3 is None else few_tokens.linear(x_ND, w3, None)
        few_tokens.linear(fused.gate(pre, None, gate, None, mask_NF.to(dtype), activation), w2, None)

    def sparse(turn: int, x_ND: Tensor, mask_NF: Tensor) -> None:
        w1, w3, w2 = layers[turn % copies]
        few_tokens.sparse_ffn(x_ND, mask_NF, w1, None, w3, None, w2, None, activation)

    def ratio(N: int, density: float) -> float:
        x_ND = normal(N, D).to(dtype)
        mask_NF = normal(N, width)
        mask_NF *= torch.rand(N, width, generator=generator) < density
        seconds: dict[Callable, list[float]] = {dense: [], sparse: []}
        deadline = time.perf_counter() + _POINT_SECONDS
        for turn in range(_WARMUP + _ROUNDS):
            if turn >= _WARMUP + 3 and time.perf_counter() > deadline:
                break
            for arm, times in seconds.items():
                begin = time.perf_counter()
                arm(turn, x_ND, mask_NF)
                times.append(time.perf_counter() - begin)
        dense_s, sparse_s = (min(times[_WARMUP:]) for times in seconds.values())  # noise only adds
        return sparse_s / dense_s

    ratios: list[tuple[float, ...]] = []
    with torch.no_grad():
        for w1, w3, w2 in layers:  # the transposed copies are made now
            few_tokens.sparse_ffn(
                torch.zeros(1, D, dtype=dtype), normal(1, width) * 0, w1, None, w3, None, w2, None, activation
            )
        for N in _TOKENS:
            hopeless = bool(ratios) and min(ratios[-1]) > 1.5  # more tokens won't mend it
            ratios.append(ratios[-1] if hopeless else tuple(ratio(N, density) for density in _DENSITIES))
    return Calibration(_TOKENS, _DENSITIES, tuple(ratios))


def explain() -> str:
    """What `auto` has to choose from here, and every calibration it has, as text."""
    lines = [f"kernels: {native.isa() or 'none'}   threads: {torch.get_num_threads()}   cache: {cache_dir()}"]
    if os.environ.get(ENVIRONMENT):
        lines.append(f"{ENVIRONMENT}={os.environ[ENVIRONMENT]} decides for calls that name no backend")
    calibrations = _read() | _calibrations
    if not calibrations:
        lines.append("no calibration yet: the first call of few tokens without gradients makes one")
    for geometry, known in calibrations.items():
        lines.append(f"\n{geometry}: time of sparse over fused, by tokens (down) and share of neurons kept (across)")
        lines.append("tokens " + "".join(f"{d:>8.3g}" for d in known.densities) + "   sparse up to a share of")
        for tokens, row in zip(known.tokens, known.ratios, strict=True):
            wins = [d for d, r in zip(known.densities, row, strict=True) if r < 1.0]
            verdict = f"{max(wins):.3g}" if wins else "never: fused"
            lines.append(f"{tokens:>6} " + "".join(f"{r:>8.2f}" for r in row) + f"   {verdict}")
        if not any(r < 1.0 for row in known.ratios for r in row):
            lines.append("sparsity can't help at this geometry on this machine")
    return "\n".join(lines)


@cache
def _machine() -> str:
    """What a calibration is valid on."""
    model = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo") as file:
            model = next((line.split(":", 1)[1].strip() for line in file if line.startswith("model name")), model)
    except OSError:
        pass
    return f"{model}, {native.isa()}, kernels {native.build()}, torch {torch.__version__}, v{_CALIBRATION_VERSION}"


def _read() -> dict[str, Calibration]:
    """This machine's calibrations in the cache folder; what makes no sense is left out, and so measured again."""
    known = {}
    for geometry, entry in _entries(_content()).items():
        try:
            known[geometry] = _parse(entry)
        except (ValueError, TypeError, KeyError, OverflowError):
            continue
    return known


def _content() -> dict[str, Any]:
    """The whole file, machine -> geometry -> calibration; empty where it can't be read."""
    try:
        content = json.loads((cache_dir() / "calibration.json").read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _entries(content: dict[str, Any]) -> dict[str, Any]:
    mine = content.get(_machine())
    return mine if isinstance(mine, dict) else {}


def _parse(entry: dict[str, Any]) -> Calibration:
    known = Calibration(
        tuple(int(t) for t in entry["tokens"]),
        tuple(float(d) for d in entry["densities"]),
        tuple(tuple(float(r) for r in row) for row in entry["ratios"]),
    )
    for grid in (known.tokens, known.densities):
        rising = all(a < b for a, b in itertools.pairwise(grid))
        if len(grid) < 2 or not rising or grid[0] <= 0 or not grid[-1] < math.inf:
            raise ValueError("a grid must rise, from above 0")
    if [len(row) for row in known.ratios] != [len(known.densities)] * len(known.tokens):
        raise ValueError("a calibration that is no grid")
    if any(not 0 < r < math.inf for row in known.ratios for r in row):
        raise ValueError("a calibration with a ratio that is none")
    return known


def _write(geometry: str, known: Calibration) -> None:
    """Add one calibration to the file, in one step; a folder that can't be written is left alone."""
    path = cache_dir() / "calibration.json"
    content = _content()
    content[_machine()] = _entries(content) | {geometry: asdict(known)}
    scratch = path.with_suffix(f".{os.getpid()}")
    try:
        scratch.write_text(json.dumps(content, indent=1))
        os.replace(scratch, path)
    except OSError:
        with contextlib.suppress(OSError):
            scratch.unlink(missing_ok=True)
