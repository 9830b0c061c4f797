"""What a profile belongs to: a checkpoint, and how it runs here; and the command that measures just that."""

import contextlib
import hashlib
import importlib
import json
import shlex
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from infmoe import checkpoint as ckpt
from infmoe.errors import InfMoEError
from infmoe.layers import ffn_class
from infmoe.layers.routing import DIALS
from infmoe.ops import dispatch, native, triton
from infmoe.provenance import machine

# what a latency hangs on
_MACHINE = ("system", "cpu", "cpu_kind", "cores", "cpu_capability", "threads", "accelerator")
_SAMPLED = 64  # entries of each tensor that the fingerprint looks at, about
_SHAPE = {
    *("ffn", "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"),
    "max_position_embeddings",
}
# What changes neither loss nor time at a profile's points, which say themselves what the dials are.
_WITHOUT_BEARING = {"bos_token_id", "eos_token_id", "pad_token_id", "use_cache", *DIALS}


@torch.no_grad()
def fingerprint(model: nn.Module) -> str:
    """A hash that tells checkpoints apart: of the configuration, and of some entries of every parameter.

    Of the entries as bfloat16, so that a checkpoint is itself in float32 and in bfloat16. Of the configuration the
    shape and what differs from the variant's defaults, so that an option that is new changes no hash.
    """
    digest = hashlib.sha256()
    digest.update(json.dumps(_bearing(model.config), sort_keys=True, default=str).encode())
    for name, param in sorted(model.named_parameters()):
        flat = param.detach().reshape(-1)
        every = max(1, flat.numel() // _SAMPLED) | 1  # odd: or it would look at one column of most matrices
        digest.update(f"{name} {tuple(param.shape)}".encode())
        digest.update(flat[::every].bfloat16().view(torch.int16).cpu().numpy().tobytes())
    return digest.hexdigest()


def surroundings(model: nn.Module) -> dict[str, Any]:
    """What a latency hangs on beside the weights: the machine, and how the model runs there."""
    here, parameter = machine(), next(model.parameters())
    device = parameter.device.type
    return {name: here[name] for name in _MACHINE} | {
        "torch": torch.__version__,
        "device": device,
        "dtype": _dtype(parameter),
        "attention": str(getattr(model.config, "_attn_implementation", None)),
        "backend": dispatch.requested(None),
        "kernels": _kernels(device),
    }


def opened_from(model: Any) -> Path | None:
    """The folder that a model was loaded from; None where it was made in memory, or the folder is gone."""
    source = str(getattr(getattr(model, "config", None), "_name_or_path", ""))
    return Path(source) if source and (Path(source) / "config.json").is_file() else None


def home(model: Any) -> Path | None:
    """Where `infmoe frontier` writes the model's profile unless told otherwise; None where it has to be told."""
    source = opened_from(model)
    try:
        return None if source is None else ckpt.results_folder(source).resolve()
    except InfMoEError:
        return None


def usual_places(model: Any) -> list[Path]:
    """Where a profile of the model is looked for: in its folder, and in its run's, two folders up."""
    source = opened_from(model)
    return [] if source is None else [source.resolve(), *source.resolve().parents[:2]]


def opened_with(model: Any) -> dict[str, Any]:
    """The variant's options, dials aside, that the model was opened with in place of its checkpoint's."""
    source = opened_from(model)
    if source is None:
        return {}
    saved = type(model.config).from_pretrained(source)
    names = [name for name in ffn_class(model.config.ffn).option_defaults() if name not in _WITHOUT_BEARING]
    return {name: value for name in names if (value := getattr(model.config, name)) != getattr(saved, name, None)}


def measure_command(
    model: Any = None, rows: int = 1, *, place: Path | None = None, threads: int | None = None, more: str = ""
) -> str:
    """The command that measures a profile of the model as it runs here, in backticks.

    Args:
        model: whose; None, or one without a folder: DIR stands for that.
        rows: sequences that are generated at once.
        place: the folder for the profile; named only where it would not go there by itself.
        threads: what OMP_NUM_THREADS is to be; None: as it is.
        more: further options.
    """
    source = opened_from(model)
    there = home(model)
    if model is None and place is not None and ((place / ckpt.FOLDER).is_dir() or (place / "config.json").is_file()):
        source, there = place, place.resolve()
    words = ["infmoe", "frontier", "DIR" if source is None else str(source), *_data_option(source), *more.split()]
    words += [] if rows == 1 else ["--rows", str(rows)]
    if model is not None:
        parameter = next(model.parameters())
        words += ["--dtype", _dtype(parameter)]
        if parameter.device.type != ("cuda" if torch.cuda.is_available() else "cpu"):
            words += ["--device", parameter.device.type]
        for name, value in opened_with(model).items():
            words += ["--set", f"{name}={value if isinstance(value, str) else json.dumps(value)}"]
    if source is not None and there is None:  # a sealed checkpoint outside of a run
        words += ["--out", "ELSEWHERE"]
    elif place is not None and place.resolve() != there:
        words += ["--out", str(place)]
    environment = [] if threads is None else [f"OMP_NUM_THREADS={threads} "]
    if (backend := dispatch.requested(None)) != "auto":
        environment.append(f"{dispatch.ENVIRONMENT}={backend} ")
    return f"`{''.join(environment)}{shlex.join(words)}`"


def _data_option(source: Path | None) -> list[str]:
    """What has to be said where no run says what the model was trained on."""
    if source is not None:
        with contextlib.suppress(InfMoEError):
            ckpt.training_data(source)
            return []
    return ["--data", "DATA"]


def _bearing(config: Any) -> dict[str, Any]:
    """What of a configuration decides the outputs, by name; numbers as floats, so that 1 and 1.0 are the same."""
    defaults = {name: getattr(type(config), name) for name in type(config).__annotations__}
    defaults |= ffn_class(config.ffn).option_defaults()
    values = {name: getattr(config, name) for name in defaults if name not in _WITHOUT_BEARING}
    return {
        name: float(value) if isinstance(value, int) and not isinstance(value, bool) else value
        for name, value in values.items()
        if name in _SHAPE or value != defaults[name]
    }


def _kernels(device: str) -> str | None:
    """The compiled kernels that run on a device; None: the plain path."""
    if device == "cuda":
        return f"triton {importlib.import_module('triton').__version__}" if triton.available()[0] else None
    return _build() if device == "cpu" and dispatch.use_kernels() else None


@cache  # asks the compiler for its version
def _build() -> str:
    return f"{native.isa()}, build {native.build()}"


def _dtype(parameter: nn.Parameter) -> str:
    return str(parameter.dtype).removeprefix("torch.")
