"""From a budget to a setting of the dials: the profile that `infmoe frontier` writes, and what is picked from it."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from infmoe.errors import InfMoEError
from infmoe.layers.point import Point
from infmoe.provenance import machine

PROFILE = "frontier.json"
_VERSION = 1
_MACHINE = ("system", "cpu", "cpu_capability", "threads", "accelerator")  # what a latency hangs on
_SAMPLED = 64  # entries of each tensor that the fingerprint looks at
_FIGURES = ("loss", "increase", "token_ms", "token_ms_p95")


@dataclass(frozen=True)
class Measured:
    """One point of a profile.

    Attributes:
        point: its dials.
        loss: held out, in nats per token.
        increase: of the loss over that at the checkpoint's own dials, paired over windows.
        token_ms: median time of a generated token, in ms.
        token_ms_p95: what 95 of 100 tokens take at most.
    """

    point: Point
    loss: float
    increase: float
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
        machine: where; see `infmoe.provenance.machine`.
        rows: sequences that were generated at once.
        source: the checkpoint's path, as it was given.
        path: the profile's file.
    """

    points: tuple[Measured, ...]
    checkpoint: str
    machine: dict[str, Any]
    rows: int
    source: str
    path: Path

    @staticmethod
    def load(path: Path | str) -> "Profile":
        """Read a file that `infmoe frontier` wrote.

        Raises:
            InfMoEError: no such file, or a damaged one; names the command that makes it.
        """
        path = Path(path)
        if path.is_dir():
            path = path / PROFILE
        try:
            values = json.loads(path.read_text())
        except OSError as error:
            raise InfMoEError(f"no profile at {path}: {_remedy(path)}") from error
        except ValueError as error:
            raise InfMoEError(f"{path} is damaged (no JSON): {_remedy(path)}") from error
        return Profile.of(values, path)

    @staticmethod
    def of(values: Any, path: Path) -> "Profile":
        """From a file's content.

        Raises:
            InfMoEError: it is no profile; names the command that makes one.
        """
        if not isinstance(values, dict) or values.get("version") != _VERSION:
            raise InfMoEError(f"{path} is no profile of this version: {_remedy(path)}")
        try:
            points = tuple(
                Measured(Point.of(row), *(float(row[name]) for name in _FIGURES)) for row in values["points"]
            )
            profile = Profile(
                points,
                str(values["checkpoint"]),
                dict(values["machine"]),
                int(values["rows"]),
                str(values["model"]),
                path,
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise InfMoEError(f"{path} is damaged ({error!r}): {_remedy(path)}") from error
        if not points:
            raise InfMoEError(f"{path} holds no points: {_remedy(path)}")
        return profile

    def check(self, model: nn.Module) -> None:
        """Raise unless this is a profile of `model`, here.

        Raises:
            InfMoEError: it is of another checkpoint or another machine; names the command that makes one.
        """
        remedy = f"measure again with `infmoe frontier {self.source}`"
        if fingerprint(model) != self.checkpoint:
            raise InfMoEError(f"{self.path} is of other weights than this model's: {remedy}")
        here = machine()
        other = [name for name in _MACHINE if self.machine.get(name) != here[name]]
        if other:
            differences = ", ".join(f"{name} {self.machine.get(name)} there, {here[name]} here" for name in other)
            raise InfMoEError(f"{self.path} is of another machine ({differences}): {remedy}")

    def choose(self, *, latency_budget_ms: float | None = None, max_loss_increase: float | None = None) -> Choice:
        """The point of lowest loss within a latency, or of least time within a loss.

        Args:
            latency_budget_ms: what 95 of 100 tokens may take at most.
            max_loss_increase: nats per token over the checkpoint's own dials, at most.

        Raises:
            InfMoEError: not exactly one of the two, or one that no point meets; names the nearest that one does.
        """
        if (latency_budget_ms is None) == (max_loss_increase is None):
            raise InfMoEError("give either latency_budget_ms or max_loss_increase")
        if latency_budget_ms is not None:
            if not latency_budget_ms > 0:
                raise InfMoEError(f"latency_budget_ms must be above 0, got {latency_budget_ms}")
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
                f"{best.token_ms_p95:.2f} ms, the median {best.token_ms:.2f}"
            )
            return Choice(best, reason)
        assert max_loss_increase is not None
        fitting = [p for p in self.points if p.increase <= max_loss_increase]
        if not fitting:
            nearest = min(self.points, key=lambda p: p.increase)
            raise InfMoEError(
                f"no setting loses at most {max_loss_increase:g} nats: the nearest is {nearest.point.label()} "
                f"with {nearest.increase:+.4f}"
            )
        best = min(fitting, key=lambda p: (p.token_ms, p.loss))
        reason = (
            f"{best.point.label()}: of {_count(fitting)} that lose at most {max_loss_increase:g} nats the quickest, "
            f"{best.token_ms:.2f} ms a token (95 of 100 at most {best.token_ms_p95:.2f}); loss {best.loss:.4f} nats "
            f"({best.increase:+.4f})"
        )
        return Choice(best, reason)


def _remedy(path: Path) -> str:
    return f"make it with `infmoe frontier {path.parent}`"


def _count(points: list[Measured]) -> str:
    return f"{len(points)} setting{'s' if len(points) != 1 else ''}"


def profile_values(model: nn.Module, rows: list[dict[str, Any]], *, num_rows: int, source: str) -> dict[str, Any]:
    """What a profile's file holds of these measured points, to be completed by how they were measured."""
    return {
        "version": _VERSION,
        "model": source,
        "checkpoint": fingerprint(model),
        "machine": machine(),
        "rows": num_rows,
        "points": rows,
    }


@torch.no_grad()
def fingerprint(model: nn.Module) -> str:
    """A hash that tells checkpoints apart: of every parameter's name, shape, dtype and some of its entries."""
    digest = hashlib.sha256()
    for name, param in sorted(model.named_parameters()):
        flat = param.detach().reshape(-1)
        every = max(1, flat.numel() // _SAMPLED)
        digest.update(f"{name} {tuple(param.shape)} {param.dtype}".encode())
        digest.update(flat[::every].double().cpu().numpy().tobytes())
    return digest.hexdigest()


def pick(model: Any, profile: Profile | Path | str | None, *, batch_size: int | None, **budget: float | None) -> Choice:
    """The dials that `generate` runs a budget with.

    Args:
        model: an `InfMoEForCausalLM`.
        profile: a profile, its file, or its folder; None: beside the checkpoint that the model came from.
        batch_size: rows that are generated at once, where known.
        **budget: see `Profile.choose`.

    Raises:
        InfMoEError: no profile, one that does not fit, or a budget that can't be met.
    """
    if profile is None:
        source = getattr(model.config, "_name_or_path", "")
        if not source:
            raise InfMoEError("a budget needs a profile: run `infmoe frontier DIR`, and pass profile=DIR")
        profile = Path(source)
    if not isinstance(profile, Profile):
        profile = Profile.load(profile)
    profile.check(model)
    choice = profile.choose(**budget)
    if budget.get("latency_budget_ms") is not None and batch_size not in (None, profile.rows):
        raise InfMoEError(
            f"{profile.path} was measured with {profile.rows} row(s) at once, and this is a batch of {batch_size}: "
            f"measure with `infmoe frontier {profile.source} --rows {batch_size}`"
        )
    return choice
