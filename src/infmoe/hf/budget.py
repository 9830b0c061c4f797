"""From a budget to a setting of the dials: the profile that `infmoe frontier` writes, and what is picked from it."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from infmoe.errors import InfMoEError
from infmoe.hf.identity import fingerprint, home, measure_command, opened_with, surroundings, usual_places
from infmoe.layers.point import Point

_VERSION = 5
_FIGURES = ("loss", "increase", "increase_at_most", "token_ms", "token_ms_p95")
_ENOUGH = 16  # tokens, from which on it is said that they missed the budget
REACH = 2  # times the longest cache that was timed: a request that goes further is refused
# How a model runs, where the caller may choose it: what makes it run as the profile did.
_MATCH = {
    "device": "open it on {0!r} (--device {0})",
    "dtype": "open it in {0} (--dtype {0})",
    "threads": "set OMP_NUM_THREADS={0} or torch.set_num_threads({0})",
    "attention": "open it with attn_implementation={0!r}",
    "backend": "set INFMOE_BACKEND={0}",
}


@dataclass(frozen=True)
class Measured:
    """One point of a profile.

    Attributes:
        point: its dials.
        loss: held out, in nats per token.
        increase: of the loss over that at the checkpoint's own dials, paired over windows.
        increase_at_most: what the increase lies below, 19 times in 20; of this point by itself: see
            `bounds.upper_increase`.
        token_ms: median time of a generated token, in ms.
        token_ms_p95: an upper bound of what 95 of 100 tokens take at most: see `bounds.upper_p95s`.
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
        token_ms: under a latency budget, how long each token took but the first, this time; filled in by `generate`.
        met: the share of those that the budget was met by; None where none was timed.
    """

    picked: Measured
    reason: str
    token_ms: tuple[float, ...] = ()
    met: float | None = None

    @property
    def point(self) -> Point:
        """The dials; `choice.point.routing()` runs them."""
        return self.picked.point

    def timed(self, token_ms: Sequence[float], budget_ms: float) -> "Choice":
        """The same, with what the tokens took."""
        met = sum(ms <= budget_ms for ms in token_ms) / len(token_ms) if token_ms else None
        return replace(self, token_ms=tuple(token_ms), met=met)

    def missed(self, budget_ms: float) -> str | None:
        """A line for the reader where clearly fewer than 95 of 100 tokens met the budget."""
        count = len(self.token_ms)
        if self.met is None or count < _ENOUGH or self.met >= 0.95 - 1.645 * math.sqrt(0.95 * 0.05 / count):
            return None
        return (
            f"{self.met:.0%} of {count} tokens met the budget of {budget_ms:g} ms: the machine is busier or slower "
            "than when its profile was measured (measure it anew with `infmoe frontier`), or a streamer or stopping "
            "criterion takes the time"
        )


@dataclass(frozen=True)
class Profile:
    """Loss and latency of one checkpoint over its dials, on one machine.

    Attributes:
        points: in the order in which they were measured.
        checkpoint: `fingerprint` of the model.
        machine: where, and how the model ran: see `surroundings`.
        options: the variant's, that the model was opened with in place of its checkpoint's.
        rows: sequences that were generated at once.
        cached_tokens: in the cache, at the first timed token and at the last.
        source: the checkpoint's path, as it was given.
        path: the profile's file.
        time: when it was measured; None: not said.
    """

    points: tuple[Measured, ...]
    checkpoint: str
    machine: dict[str, Any]
    options: dict[str, Any]
    rows: int
    cached_tokens: tuple[int, int]
    source: str
    path: Path
    time: str | None = None

    @staticmethod
    def load(path: Path | str, rows: int = 1, model: nn.Module | None = None) -> "Profile":
        """Read a file that `infmoe frontier` wrote.

        Args:
            path: the file, or the folder that it is in.
            rows: which of a folder's profiles.
            model: whose it is to be, for the command that an error names.

        Raises:
            InfMoEError: no such file, or a damaged one; names the command that makes it.
        """
        path = Path(path)
        if path.is_dir():
            path = path / profile_name(rows)
        try:
            return Profile.of(json.loads(path.read_text()), path)
        except (OSError, ValueError) as error:
            place = path.parent if path.suffix == ".json" or path.is_file() else path
            remedy = f"make it with {measure_command(model, rows, place=place)}"
            raise InfMoEError(f"{_unusable(path, error)}: {remedy}") from error

    @staticmethod
    def of(values: Any, path: Path) -> "Profile":
        """From a file's content.

        Raises:
            InfMoEError: it is no profile.
        """
        if not isinstance(values, dict) or values.get("version") != _VERSION:
            raise InfMoEError(f"{path} is no profile of this version")
        try:
            points = tuple(_measured(row) for row in values["points"])
            first, last = values["cached_tokens"]
            profile = Profile(
                points,
                str(values["checkpoint"]),
                dict(values["machine"]),
                dict(values["options"]),
                int(values["rows"]),
                (int(first), int(last)),
                str(values["model"]),
                path,
                values.get("provenance", {}).get("time"),
            )
        except (KeyError, TypeError, ValueError, AttributeError, InfMoEError) as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise InfMoEError(f"{path} is damaged ({type(error).__name__}: {reason})") from error
        if not points:
            raise InfMoEError(f"{path} holds no points")
        return profile

    def check(self, model: nn.Module) -> None:
        """Raise unless this is a profile of `model`, here.

        Raises:
            InfMoEError: it is of another checkpoint, or was measured otherwise than the model runs here; names what
                makes it fit, and the command that measures one that does.
        """
        here = surroundings(model)
        if here["dtype"] not in ("float32", "bfloat16"):
            raise InfMoEError(f"profiles are of float32 and bfloat16, this model is in {here['dtype']}: open it in one")
        if fingerprint(model) != self.checkpoint:
            raise InfMoEError(
                f"{self.path}, measured on {self.source}, is of other weights, or another configuration, than this "
                f"model's: {self._own(model)}"
            )
        other = self._differs(here)
        if other:
            differences = ", ".join(f"{name} {self.machine.get(name)} there, {here[name]} here" for name in other)
            remedy = self._fitting(model, {name: here[name] for name in other})
            raise InfMoEError(f"{self.path} was measured otherwise than here ({differences}): {remedy}")

    def keep(self, model: nn.Module) -> None:
        """Raise where a profile of `model`, here, would take the place of one that is still of use.

        That is one of the same checkpoint on this machine, opened with other options or run otherwise. What was
        measured before the checkpoint was trained further, or on another machine, is of none.

        Raises:
            InfMoEError: it would; names what differs.
        """
        other, options = self._differs(surroundings(model)), opened_with(model)
        if set(other) - set(_MATCH) or (self.options == options and self.checkpoint != fingerprint(model)):
            return
        differs = [f"{name} {self.machine.get(name)}" for name in other]
        differs += [
            f"{name} {self.options.get(name, 'as saved')}"
            for name in {**self.options, **options}
            if self.options.get(name) != options.get(name)
        ]
        if differs:
            raise InfMoEError(
                f"{self.path} is the checkpoint's profile with {', '.join(differs)}: give --out another folder to keep "
                f"it, or --out {self.path.parent} to replace it"
            )

    def _differs(self, here: dict[str, Any]) -> list[str]:
        """The names of what is otherwise here (see `surroundings`)."""
        other = [name for name in here if self.machine.get(name) != here[name]]
        if {"device", "backend"} & set(other):
            other = [name for name in other if name != "kernels"]  # they follow from those
        return other

    def check_rows(self, model: nn.Module, rows: int) -> None:
        """Raise unless the times are of so many sequences at once.

        Raises:
            InfMoEError: they are not; names the command that measures them.
        """
        if rows != self.rows:
            command = measure_command(model, rows, place=self.path.parent)
            raise InfMoEError(
                f"{self.path} was measured with {self.rows} row(s) at once, not {rows}: measure that with {command}"
            )

    def check_length(self, model: Any, positions: int) -> None:
        """Raise where a request goes further than this profile says anything about.

        Args:
            model: whose profile this is.
            positions: tokens of the prompt and of the text that is asked for.

        Raises:
            InfMoEError: more than twice as many as were cached at the last timed token.
        """
        first, last = self.cached_tokens
        positions = min(positions, model.config.max_position_embeddings)
        if positions > REACH * last:
            longer = f"--prompt-length {max(1, positions - (last - first))}"
            command = measure_command(model, self.rows, place=self.path.parent, more=longer)
            raise InfMoEError(
                f"{self.path} was timed with {first} to {last} tokens cached, and says nothing of {positions}, which "
                f"prompt and new tokens come to: measure longer prompts with {command}"
            )

    def _own(self, model: nn.Module) -> str:
        """How a model of other weights comes by a profile; this one stays where it may be another model's."""
        changed = opened_with(model)
        if changed:
            return self._apart(model, changed)
        if self.path.parent.resolve() in usual_places(model):
            return (
                f"measure again with {measure_command(model, self.rows, place=self.path.parent)}; where the weights "
                "were changed since they were loaded, save the model to a folder of its own first, and measure that"
            )
        then = "pass that folder as profile" if home(model) is None else "leave profile out"
        return f"measure this model with {measure_command(model, self.rows)}, and {then}"

    def _fitting(self, model: nn.Module, here: dict[str, Any]) -> str:
        """What to do where a profile of the same weights was measured otherwise.

        Args:
            model: its own.
            here: what differs, as it is here.
        """
        match = {name: _MATCH[name].format(self.machine.get(name)) for name in here if name in _MATCH}
        threads = here.get("threads")
        if len(match) < len(here):  # another machine: nothing is lost with the old figures
            again = measure_command(model, self.rows, place=self.path.parent, threads=threads)
            return f"measure again with {again}"
        if "attention" in here:  # no option of the command's
            return "; ".join(match.values())
        return f"{'; '.join(match.values())}; or {self._apart(model, here, threads)}"

    def _apart(self, model: nn.Module, settings: dict[str, Any], threads: int | None = None) -> str:
        """How to measure the model in a folder of its own, so that this profile stays."""
        name = "-".join(f"{name}-{value}" for name, value in settings.items())
        place = (home(model) or self.path.parent) / name
        command = measure_command(model, self.rows, place=place, threads=threads)
        return f"measure it with {command}, and pass that folder as profile"

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


def require_dials(model: Any) -> None:
    """Raise where a budget has nothing to choose.

    Raises:
        InfMoEError: the model has no dials.
    """
    if model.config.ffn in _WITHOUT_DIALS:
        raise InfMoEError(f"a budget turns dials, and ffn={model.config.ffn!r} has none: leave it out")


def profile_name(rows: int) -> str:
    """The profile's file name: one for each number of sequences at once."""
    return "frontier.json" if rows == 1 else f"frontier-rows{rows}.json"


def _unusable(path: Path, error: OSError | ValueError) -> str:
    if isinstance(error, InfMoEError):
        return str(error)
    if isinstance(error, FileNotFoundError | NotADirectoryError):
        return f"no profile at {path}"
    if isinstance(error, OSError):
        return f"cannot read {path} ({error.strerror})"
    return f"{path} is damaged (no JSON)"


def _measured(row: dict[str, Any]) -> Measured:
    measured = Measured(Point.of(row), *(float(row[name]) for name in _FIGURES))
    if not all(math.isfinite(getattr(measured, name)) for name in _FIGURES):
        raise ValueError(f"figures that are not finite at {measured.point.label()}")
    measured.point.routing()  # refuses dials that mean nothing
    return measured


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _count(points: list[Measured]) -> str:
    return f"{len(points)} setting{'s' if len(points) != 1 else ''}"


def profile_values(model: nn.Module, rows: list[dict[str, Any]], *, num_rows: int, source: str) -> dict[str, Any]:
    """What a profile's file holds of these measured points, to be completed by how they were measured."""
    return {
        "version": _VERSION,
        "model": source,
        "checkpoint": fingerprint(model),
        "machine": surroundings(model),
        "options": opened_with(model),
        "rows": num_rows,
        "points": rows,
    }


def pick(
    model: Any,
    profile: Profile | Path | str | None,
    *,
    rows: int,
    positions: int,
    **budget: float | None,
) -> Choice:
    """The dials that `generate` runs a budget with.

    Args:
        model: an `InfMoEForCausalLM`.
        profile: a profile, its file, or its folder; None: beside the checkpoint that the model came from, or in the
            run's folder.
        rows: sequences that are generated at once; a loss budget takes the profile of one row where there is none.
        positions: tokens of the prompt and of the text that is asked for, which a latency is checked against.
        **budget: see `Profile.choose`.

    Raises:
        InfMoEError: no profile, one that does not fit, a budget that can't be met, or a model in train mode.
    """
    require_dials(model)
    if model.training:
        raise InfMoEError("a profile is of the model in eval mode, this one is in train mode: call model.eval() first")
    timed = budget.get("latency_budget_ms") is not None
    if not isinstance(profile, Profile):
        profile = find_profile(model, profile, rows, timed=timed)
    profile.check(model)
    if timed:
        profile.check_rows(model, rows)
        profile.check_length(model, positions)
    return profile.choose(**budget)


def find_profile(model: Any, place: Path | str | None, rows: int, *, timed: bool = True) -> Profile:
    """The profile of a model, which need not fit it (see `Profile.check`).

    Args:
        model: an `InfMoEForCausalLM`.
        place: the file, or its folder; None: beside the checkpoint that the model came from, or in the run's folder.
        rows: sequences that are generated at once.
        timed: only one of so many rows serves; else that of one row does too.

    Raises:
        InfMoEError: there is none, or a damaged one; names the command that makes it.
    """
    places = [Path(place)] if place is not None else usual_places(model)
    if not places:
        raise InfMoEError(
            f"a budget needs a profile: make it with {measure_command(model, rows)}, and pass profile=DIR"
        )
    names = list(dict.fromkeys([profile_name(rows), *([] if timed else [profile_name(1)])]))
    for folder in places:
        for name in names:
            if folder.is_file() or (folder / name).is_file():
                return Profile.load(folder if folder.is_file() else folder / name, rows, model)
    return Profile.load(places[0] if place is not None else home(model) or places[0], rows, model)
