"""The compiled CPU kernels: built once with the system's C++ compiler, kept in a cache, loaded on first use.

Nothing needs them: where there is no compiler, or the build fails, `load` says so once and returns False, and
everything runs on the plain path. All loops run on torch's own threads; which instructions are used is decided
when a library is loaded.
"""

import contextlib
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import torch

from infmoe.cache import cache_dir

_HERE = Path(__file__).parent
_TORCH = Path(torch.__file__).parent
_COMMON = ["-std=c++17", "-O3", "-fPIC", "-Wno-psabi"]
_AVX2 = ["-mavx2", "-mfma", "-mpopcnt"]
_AVX512 = [*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512"]
# What the compiler needs to make vectors of plain loops.
_LOOPS = ["-fopenmp-simd", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast"]
# library -> source -> flags; one object per instruction set, chosen among when loaded.
_LIBRARIES: dict[str, dict[str, list[str]]] = {
    # the first stable ABI with a parallel loop is torch 2.10's
    "masked_ffn": {
        "ops.cpp": ["-DTORCH_TARGET_VERSION=0x020a000000000000"],
        "isa_scalar.cpp": [],
        "isa_avx2.cpp": _AVX2,
        "isa_avx512.cpp": _AVX512,
        "bf16_matmul.cpp": [*_AVX512, "-mavx512bf16", "-mamx-tile", "-mamx-bf16"],
    },
    # calls torch's own products, which the stable ABI does not offer with an output; -fopenmp is for torch's
    # parallel loop, a header, and is left out at linking: the symbols are those of the runtime torch brought
    "experts": {
        "experts.cpp": ["-std=c++20", "-O2", "-fopenmp", f"-I{_TORCH / 'include/torch/csrc/api/include'}"],
        "experts_scalar.cpp": _LOOPS,
        "experts_avx2.cpp": [*_LOOPS, *_AVX2],
        "experts_avx512.cpp": [*_LOOPS, *_AVX512],
    },
}
_TIMEOUT_S = 600


class _BuildError(Exception):
    """Why there are no kernels, in one line."""


@cache
def load(library: str = "masked_ffn") -> bool:
    """Whether a library's operators `infmoe::*` are there; builds and loads it at the first call.

    Where they can't be had, one line on stderr says why, and how to get them.
    """
    try:
        torch.ops.load_library(str(_path(library)))
    except (_BuildError, OSError, subprocess.SubprocessError) as error:
        print(
            f"infmoe: no compiled CPU kernels for {library} ({error}); running the plain path, slower. Install g++ to "
            "have them built at the next start, or set INFMOE_BACKEND=eager to leave them out.",
            file=sys.stderr,
        )
        return False
    return True


def build() -> str | None:
    """What tells one build of the kernels from another, or None where there is none."""
    return _path("masked_ffn").parent.name if load() else None


def isa() -> str | None:
    """The instructions that the kernels use here ("amx", "avx512_bf16", "avx512", "avx2", "scalar"), or None."""
    return torch.ops.infmoe.isa() if load() else None


def _path(library: str) -> Path:
    """The shared library's file; builds it unless it is there."""
    compiler = os.environ.get("CXX") or "g++"
    if shutil.which(compiler) is None:
        raise _BuildError(f"compiler {compiler!r} not found")
    if platform.machine() not in ("x86_64", "AMD64"):
        raise _BuildError(f"built for x86-64 only so far, this is {platform.machine()}")
    folder = cache_dir() / "kernels" / _fingerprint(compiler, library)
    path = folder / "libinfmoe.so"
    if path.exists():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder / "lock"):
        if not path.exists():  # another process may have built it meanwhile
            print(f"infmoe: building the CPU kernels for {library}, once (a minute)", file=sys.stderr)
            _build(compiler, library, path)
    return path


def _fingerprint(compiler: str, library: str) -> str:
    """Of everything that the library depends on."""
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, timeout=60).stdout
    digest = hashlib.sha256(f"{version}\n{torch.__version__}\n{_COMMON}\n{_LIBRARIES[library]}".encode())
    for source in sorted((_HERE / library).iterdir()):
        if source.suffix in (".cpp", ".h"):
            digest.update(source.name.encode() + source.read_bytes())
    return digest.hexdigest()[:16]


def _build(compiler: str, library: str, path: Path) -> None:
    """Compile the sources side by side and put the library in its place in one step."""
    sources, include = _LIBRARIES[library], f"-I{_TORCH / 'include'}"
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        commands = [
            [compiler, *_COMMON, *flags, include, "-c", str(_HERE / library / name), "-o", f"{scratch}/{name}.o"]
            for name, flags in sources.items()
        ]
        jobs = [subprocess.Popen(c, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for c in commands]
        try:
            outputs = [job.communicate(timeout=_TIMEOUT_S)[0] for job in jobs]
        except subprocess.TimeoutExpired as error:
            for job in jobs:
                job.kill()
            raise _BuildError(f"{compiler} took longer than {_TIMEOUT_S} s") from error
        built = f"{scratch}/libinfmoe.so"
        objects = [f"{scratch}/{name}.o" for name in sources]
        link = [compiler, "-shared", "-o", built, *objects, f"-L{_TORCH / 'lib'}", "-ltorch_cpu", "-lc10"]
        failed = [output for job, output in zip(jobs, outputs, strict=True) if job.returncode]
        if not failed:
            try:
                linked = subprocess.run(link, capture_output=True, text=True, timeout=_TIMEOUT_S)
            except subprocess.TimeoutExpired as error:
                raise _BuildError(f"{compiler} took longer than {_TIMEOUT_S} s") from error
            failed = [linked.stderr] if linked.returncode else []
        if failed:
            log = path.parent / "build.log"
            log.write_text("\n".join(failed))
            raise _BuildError(f"{compiler} failed, see {log}")
        os.replace(built, path)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold the file's lock, so that of two processes one builds and the other waits."""
    import fcntl

    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
