"""From a budget to a setting of the dials: the profile that `infmoe frontier` writes, and what is picked from it."""

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from infmoe.errors import InfMoEError
from infmoe.layers.point import Point
from infmoe.ops import dispatch
from infmoe.provenance import machine

_VERSION = 2
_MACHINE = ("system", "cpu", "cpu_capability", "threads", "accelerator")  # what a latency hangs on
_SAMPLED = 64  # entries of each tensor that the fingerprint looks at, about
_FIGURES = ("loss", "increase", "increase_at_most", "token_ms", "token_ms_p95")
# What changes neither loss nor time at a profile's points, which say themselves what the dials are.
_WITHOUT_BEARING = {
    *("bos_token_id", "eos_token_id", "pad_token_id", "use_cache"),
    *("num_samples", "keep_ratio", "num_experts_per_tok"),
}


@dataclass(frozen=True)
class Measured:
    """One point of a profile.

    Attributes:
        point: its dials.
        loss: held out, in nats per token.
        increase: of the loss over that at the checkpoint's own dials, paired over windows.
        increase_at_most: what the increase lies below, 19 times in 20; of this point by itself: see
            `upper_increase`.
        token_ms: median time of a generated token, in ms.
        token_ms_p95: what 95 of 100 tokens take at most, with some certainty: see `upper_p95`.
    """

    point: Point
    loss: float
    increase: float
    increase_at_most: float
    token_ms: float
    token_ms_p95: float


@dataclass(frozen=True)
class Choice:
    """What was picked, and why.

    Attributes:
        picked: the point with its figures.
        reason: one sentence.
    """

    picked: Measured
    reason: str

    @property
    def point(self) -> Point:
        """The dials; `choice.point.routing()` runs them."""
        return self.picked.point


@dataclass(frozen=True)
class Profile:
    """Loss and latency of one checkpoint over its dials, on one machine.

    Attributes:
        points: in the order in which they were measured.
        checkpoint: `fingerprint` of the model.
        machine: where, and how the model ran: see `surroundings`.
        rows: sequences that were generated at once.
        cached_tokens: in the cache, at the first timed token and at the last.
        source: the checkpoint's path, as it was given.
        path: the profile's file.
    """

    points: tuple[Measured, ...]
    checkpoint: str
    machine: dict[str, Any]
    rows: int
    cached_tokens: tuple[int, int]
    source: str
    path: Path

    @staticmethod
    def load(path: Path | str, rows: int = 1) -> "Profile":
        """Read a file that `infmoe frontier` wrote.

        Args:
            path: the file, or the folder that it is in.
            rows: which of a folder's profiles.

        Raises:
            InfMoEError: no such file, or a damaged one; names the command that makes it.
        """
        path = Path(path)
        if path.is_dir():
            path = path / profile_name(rows)
        try:
            values = json.loads(path.read_text())
        except OSError as error:
            raise InfMoEError(f"no profile at {path}: {_remedy(rows=rows)}") from error
        except ValueError as error:
            raise InfMoEError(f"{path} is damaged (no JSON): {_remedy(rows=rows)}") from error
        return Profile.of(values, path)

    @staticmethod
    def of(values: Any, path: Path) -> "Profile":
        """From a file's content.

        Raises:
            InfMoEError: it is no profile; names the command that makes one.
        """
        if not isinstance(values, dict) or values.get("version") != _VERSION:
            raise InfMoEError(f"{path} is no profile of this version: {_remedy()}")
        try:
            points = tuple(_measured(row) for row in values["points"])
            first, last = values["cached_tokens"]
            profile = Profile(
                points,
                str(values["checkpoint"]),
                dict(values["machine"]),
                int(values["rows"]),
                (int(first), int(last)),
                str(values["model"]),
                path,
            )
        except (KeyError, TypeError, ValueError, AttributeError, InfMoEError) as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise InfMoEError(f"{path} is damaged ({type(error).__name__}: {reason}): {_remedy()}") from error
        if not points:
            raise InfMoEError(f"{path} holds no points: {_remedy()}")
        return profile

    def check(self, model: nn.Module) -> None:
        """Raise unless this is a profile of `model`, here.

        Raises:
            InfMoEError: it is of another checkpoint or another machine; names the command that makes one.
        """
        here = surroundings(model)
        if here["dtype"] not in ("float32", "bfloat16"):
            raise InfMoEError(f"profiles are of float32 and bfloat16, this model is in {here['dtype']}: open it in one")
        remedy = _remedy(self.source, self.rows, "measure again", model)
        if fingerprint(model) != self.checkpoint:
            raise InfMoEError(f"{self.path} is of other weights, or another configuration, than this model's: {remedy}")
        other = [name for name in here if self.machine.get(name) != here[name]]
        if other:
            differences = ", ".join(f"{name} {self.machine.get(name)} there, {here[name]} here" for name in other)
            raise InfMoEError(f"{self.path} was measured otherwise than here ({differences}): {remedy}")

    def choose(self, *, latency_budget_ms: float | None = None, max_loss_increase: float | None = None) -> Choice:
        """The point of lowest loss within a latency, or of least time within a loss.

        Args:
            latency_budget_ms: what 95 of 100 tokens may take at most.
            max_loss_increase: nats per token over the checkpoint's own dials, at most; the upper end of what was
                measured is held to it (19 times in 20), not its middle.

        Raises:
            InfMoEError: not exactly one of the two, or one that no point meets; names the nearest that one does.
        """
        if (latency_budget_ms is None) == (max_loss_increase is None):
            raise InfMoEError("give either latency_budget_ms or max_loss_increase")
        if latency_budget_ms is not None:
            if not _is_number(latency_budget_ms) or not latency_budget_ms > 0:
                raise InfMoEError(f"latency_budget_ms must be a number above 0, got {latency_budget_ms!r}")
            fitting = [p for p in self.points if p.token_ms_p95 <= latency_budget_ms]
            if not fitting:
                nearest = min(self.points, key=lambda p: p.token_ms_p95)
                raise InfMoEError(
                    f"no setting takes at most {latency_budget_ms:g} ms a token: the nearest is "
                    f"{nearest.point.label()} with {nearest.token_ms_p95:.2f} ms (95 of 100 tokens)"
                )
            best = min(fitting, key=lambda p: (p.loss, p.token_ms))
            reason = (
                f"{best.point.label()}: of {_count(fitting)} within {latency_budget_ms:g} ms a token the lowest loss, "
                f"{best.loss:.4f} nats ({best.increase:+.4f}); 95 of 100 tokens take at most "
                f"{best.token_ms_p95:.2f} ms, the median {best.token_ms:.2f}, with "
                f"{self.cached_tokens[0]} to {self.cached_tokens[1]} tokens cached"
            )
            return Choice(best, reason)
        assert max_loss_increase is not None
        if not _is_number(max_loss_increase) or math.isnan(max_loss_increase):
            raise InfMoEError(f"max_loss_increase must be a number, got {max_loss_increase!r}")
        fitting = [p for p in self.points if p.increase_at_most <= max_loss_increase]
        if not fitting:
            nearest = min(self.points, key=lambda p: p.increase_at_most)
            raise InfMoEError(
                f"no setting loses at most {max_loss_increase:g} nats: the nearest is {nearest.point.label()} "
                f"with {nearest.increase_at_most:+.4f} at most"
            )
        best = min(fitting, key=lambda p: (p.token_ms, p.loss))
        reason = (
            f"{best.point.label()}: of {_count(fitting)} that lose at most {max_loss_increase:g} nats the quickest, "
            f"{best.token_ms:.2f} ms a token (95 of 100 at most {best.token_ms_p95:.2f}); loss {best.loss:.4f} nats "
            f"({best.increase:+.4f}, at most {best.increase_at_most:+.4f})"
        )
        return Choice(best, reason)


_WITHOUT_DIALS = ("dense", "switch")


def profile_name(rows: int) -> str:
    """The profile's file name: one for each number of sequences at once."""
    return "frontier.json" if rows == 1 else f"frontier-rows{rows}.json"


def upper_p95(milliseconds: Sequence[float]) -> float:
    """What 95 of 100 tokens stay below: an upper bound that holds 19 times in 20, were they independent.

    The plain percentile of a few hundred tokens is too low every other time. Of fewer than 59 it is the longest.
    """
    ordered = sorted(milliseconds)
    count = len(ordered)
    rank = math.ceil(0.95 * count + 1.645 * math.sqrt(0.05 * 0.95 * count))
    return ordered[min(rank, count) - 1]


def upper_increase(increase: float, standard_error: float, windows: int) -> float:
    """What an increase that was measured over so many windows lies below, 19 times in 20 (Student's t)."""
    z, degrees = 1.6449, max(windows - 1, 1)
    # Cornish and Fisher's expansion of t's quantile; within a hundredth from 6 windows on
    t = z + (z**3 + z) / (4 * degrees) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * degrees**2)
    return increase + t * standard_error


def surroundings(model: nn.Module) -> dict[str, Any]:
    """What a latency hangs on beside the weights: the machine, and how the model runs there."""
    here, parameter = machine(), next(model.parameters())
    return {name: here[name] for name in _MACHINE} | {
        "torch": torch.__version__,
        "device": parameter.device.type,
        "dtype": _dtype(parameter),
        "attention": str(getattr(model.config, "_attn_implementation", None)),
        "backend": dispatch.requested(None),
    }


def _measured(row: dict[str, Any]) -> Measured:
    measured = Measured(Point.of(row), *(float(row[name]) for name in _FIGURES))
    if not all(math.isfinite(getattr(measured, name)) for name in _FIGURES):
        raise ValueError(f"figures that are not finite at {measured.point.label()}")
    measured.point.routing()  # refuses dials that mean nothing
    return measured


def _dtype(parameter: nn.Parameter) -> str:
    return str(parameter.dtype).removeprefix("torch.")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _remedy(source: str = "DIR", rows: int = 1, verb: str = "make it", model: nn.Module | None = None) -> str:
    """The command that makes a profile, of this model if there is one."""
    more = "" if rows == 1 else f" --rows {rows}"
    if model is not None:
        parameter = next(model.parameters())
        more += f" --dtype {_dtype(parameter)}"
        if parameter.device.type == "cpu" and torch.cuda.is_available():
            more += " --device cpu"
    return f"{verb} with `infmoe frontier {source}{more}`"


def _count(points: list[Measured]) -> str:
    return f"{len(points)} setting{'s' if len(points) != 1 else ''}"


def profile_values(model: nn.Module, rows: list[dict[str, Any]], *, num_rows: int, source: str) -> dict[str, Any]:
    """What a profile's file holds of these measured points, to be completed by how they were measured."""
    return {
        "version": _VERSION,
        "model": source,
        "checkpoint": fingerprint(model),
        "machine": surroundings(model),
        "rows": num_rows,
        "points": rows,
    }


@torch.no_grad()
def fingerprint(model: nn.Module) -> str:
    """A hash that tells checkpoints apart: of the configuration, and of some entries of every parameter.

    Of the entries as bfloat16, so that a checkpoint is itself in float32 and in bfloat16.
    """
    digest = hashlib.sha256()
    names = [name for name in type(model.config).__annotations__ if name not in _WITHOUT_BEARING]  # of its own
    own = {name: getattr(model.config, name) for name in names}
    digest.update(json.dumps(own, sort_keys=True, default=str).encode())
    for name, param in sorted(model.named_parameters()):
        flat = param.detach().reshape(-1)
        every = max(1, flat.numel() // _SAMPLED) | 1  # odd: or it would look at one column of most matrices
        digest.update(f"{name} {tuple(param.shape)}".encode())
        digest.update(flat[::every].bfloat16().view(torch.int16).cpu().numpy().tobytes())
    return digest.hexdigest()


def pick(model: Any, profile: Profile | Path | str | None, *, rows: int, **budget: float | None) -> Choice:
    """The dials that `generate` runs a budget with.

    Args:
        model: an `InfMoEForCausalLM`.
        profile: a profile, its file, or its folder; None: beside the checkpoint that the model came from, or in the
            run's folder.
        rows: sequences that are generated at once; a loss budget takes the profile of one row where there is none.
        **budget: see `Profile.choose`.

    Raises:
        InfMoEError: no profile, one that does not fit, or a budget that can't be met.
    """
    if model.config.ffn in _WITHOUT_DIALS:
        raise InfMoEError(f"a budget turns dials, and ffn={model.config.ffn!r} has none: leave it out")
    timed = budget.get("latency_budget_ms") is not None
    if not isinstance(profile, Profile):
        profile = _find(model, profile, rows, timed)
    profile.check(model)
    if timed and rows != profile.rows:
        remedy = _remedy(profile.source, rows, "measure that", model)
        raise InfMoEError(f"{profile.path} was measured with {profile.rows} row(s) at once, not {rows}: {remedy}")
    return profile.choose(**budget)


def _find(model: Any, place: Path | str | None, rows: int, timed: bool) -> Profile:
    if place is not None:
        places = [Path(place)]
    else:
        source = str(getattr(model.config, "_name_or_path", ""))
        if not source or not Path(source).is_dir():
            raise InfMoEError("a budget needs a profile: run `infmoe frontier DIR`, and pass profile=DIR")
        checkpoint = Path(source).resolve()
        places = [checkpoint, *checkpoint.parents[:2]]  # a run's checkpoints lie two folders down
    names = list(dict.fromkeys([profile_name(rows), *([] if timed else [profile_name(1)])]))
    for place in places:
        for name in names:
            if place.is_file() or (place / name).is_file():
                return Profile.load(place if place.is_file() else place / name)
    return Profile.load(places[0] / names[0] if places[0].is_dir() else places[0], rows)
