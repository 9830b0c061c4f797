"""Finished runs on disk: one JSON file each, which later measures are added to, never mixed up."""

import json
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from infmoe.errors import InfMoEError
from infmoe.provenance import write_json
from infmoe.recipes import recipe
from infmoe.reproduce.arms import Arm, arm_named
from infmoe.reproduce.checks import check_run, data_damage
from infmoe.reproduce.plan import TUNING_SEED, Group, RunSpec, Scale, groups
from infmoe.reproduce.statistics import Interval, Spread, paired, spread


@dataclass(frozen=True)
class Finished:
    """A finished run.

    Attributes:
        spec: what was to be trained.
        path: its file.
        values: the file's content.
    """

    spec: RunSpec
    path: Path
    values: dict[str, Any]

    @property
    def diverged(self) -> bool:
        """Whether training met a loss that is not finite; then there is no model and nothing to measure."""
        return bool(self.values.get("diverged"))

    @property
    def loss(self) -> float:
        """Held-out loss at the run's own dials, in nats per token; infinity where training diverged."""
        if self.diverged:
            return math.inf
        return self.values["measures"]["held_out"][0]["loss"]

    def measure(self, name: str) -> list[dict[str, Any]] | None:
        """The points of one measure (see `measures`), or None where it was not taken."""
        return self.values["measures"].get(name)

    @property
    def processor(self) -> str:
        """Of the machine that trained it; in older files, of the one that measured it, which was the same."""
        made = self.values["provenance"]
        return made["training"].get("machine", made["machine"])["cpu"]

    @property
    def cost(self) -> dict[str, int]:
        """Parameters and FLOPs (see `ModelCost`)."""
        return self.values["cost"]


MAX_SEEDS = 16


class Store:
    """The results of one scale: `DIR/SCALE/runs/*.json`.

    `data.json` beside them says what they were trained on, `tasks.json` which files zero-shot scores are of.
    """

    def __init__(self, out: Path, scale: Scale):
        self.scale = scale
        self.folder = out / scale.name
        self._known: dict[str, Finished] = {}

    def path(self, spec: RunSpec) -> Path:
        """Where a run's file is, or will be."""
        return self.folder / "runs" / f"{spec.slug}.json"

    @property
    def any_runs(self) -> bool:
        """Whether there is the file of a run."""
        return any((self.folder / "runs").glob("*.json"))

    @property
    def data(self) -> dict[str, Any] | None:
        """What all runs were trained on; None before the first."""
        path = self.folder / "data.json"
        if not path.exists():
            if self.any_runs:
                raise InfMoEError(f"{path} is missing, which says what the runs beside it were trained on: restore it")
            return None
        data = read_json(path)
        if (damage := data_damage(data)) is not None:
            raise InfMoEError(f"{path} is damaged ({damage}): restore it")
        return data

    def claim_data(self, data: dict[str, Any]) -> None:
        """Say what the runs are trained on; while there are none, anew.

        Raises:
            InfMoEError: those that are there were trained on something else, or nothing says on what.
        """
        if not self.any_runs:
            write_json(self.folder / "data.json", data)
            return
        known = self.data
        if known is None or known["sha256"] != data["sha256"]:
            raise InfMoEError(
                f"the runs in {self.folder} were trained on other data ({self.folder / 'data.json'}): "
                "give that, or another --out"
            )

    @property
    def tasks(self) -> dict[str, str] | None:
        """The zero-shot tasks' files that all runs are scored on, name -> SHA-256; None before the first."""
        path = self.folder / "tasks.json"
        if not path.exists():
            return None
        files = read_json(path).get("files")
        if not isinstance(files, dict) or not files or not all(isinstance(digest, str) for digest in files.values()):
            raise InfMoEError(f"{path} is damaged: restore it")
        return files

    def claim_tasks(self, files: dict[str, str]) -> None:
        """Say which files the runs are scored on.

        Raises:
            InfMoEError: those that are there were scored on others.
        """
        known = self.tasks
        if known is None:
            write_json(self.folder / "tasks.json", {"files": files})
        elif known != files:
            changed = sorted(name for name in known.keys() | files.keys() if known.get(name) != files.get(name))
            raise InfMoEError(
                f"the runs in {self.folder} were scored on other files than {', '.join(changed)} of --tasks-dir "
                f"({self.folder / 'tasks.json'}): give those, or another --out"
            )

    def get(self, spec: RunSpec) -> Finished | None:
        """A finished run, checked; None where it has not been finished.

        Raises:
            InfMoEError: its file is damaged, or of another configuration or other data (see `check_run`).
        """
        path = self.path(spec)
        if spec.slug in self._known:
            return self._known[spec.slug]
        if not path.exists():
            return None
        values = read_json(path)
        check_run(path, spec, values, self.tasks or {})
        data = self.data
        if data is not None and values["data"] != data:
            raise InfMoEError(f"{path} was trained on other data than {self.folder / 'data.json'} says: move it away")
        self._known[spec.slug] = Finished(spec, path, values)
        return self._known[spec.slug]

    def put(self, spec: RunSpec, values: dict[str, Any]) -> Path:
        """Write a run's file, whole or not at all."""
        path = self.path(spec)
        write_json(path, values)
        self._known.pop(spec.slug, None)
        return path

    def fresh(self, spec: RunSpec) -> Finished | None:
        """As `get`, read again: another worker may have written it."""
        self._known.pop(spec.slug, None)
        return self.get(spec)

    # Learning rates

    def tuning(self, arm: Arm) -> list[RunSpec]:
        """The runs that an arm's learning rate is chosen by; none where the recipe's is taken."""
        root = arm if arm.tuned_as is None else arm_named(arm.tuned_as)
        return [RunSpec(self.scale, root, self.scale.tune_tokens, lr, TUNING_SEED) for lr in self.scale.lr_grid]

    def lr(self, arm: Arm) -> float | None:
        """The learning rate of an arm; None while its tuning runs are not finished."""
        specs = self.tuning(arm)
        if not specs:
            return recipe(f"{self.scale.name}/{arm.variant}").optim.lr * arm.lr_factor
        done = [self.get(spec) for spec in specs]
        if not all(done):
            return None
        best = min((run for run in done if run is not None), key=lambda run: run.loss)
        if best.diverged:
            raise InfMoEError(
                f"every learning rate of {specs[0].arm.name} diverged ({best.path}): widen the grid downwards"
            )
        return best.spec.lr * arm.lr_factor

    def base(self, spec: RunSpec) -> RunSpec | None:
        """The run whose model a run starts from; None where the seed draws its weights."""
        if spec.arm.init is None:
            return None
        arm = arm_named(spec.arm.init)
        lr = self.lr(arm)
        assert lr is not None  # both are tuned by the same runs
        return RunSpec(spec.scale, arm, spec.scale.tokens, lr, spec.seed)

    # Comparisons

    def run(self, arm_name: str, tokens: int, seed: int) -> Finished | None:
        """The finished run of an arm; None while it, or its learning rate, is missing."""
        arm = arm_named(arm_name)
        lr = self.lr(arm)
        return None if lr is None else self.get(RunSpec(self.scale, arm, tokens, lr, seed))

    def runs(self, arm_name: str, tokens: int) -> list[Finished]:
        """All finished runs of an arm at one length, by seed; diverged ones too."""
        seeds = range(TUNING_SEED + 1, TUNING_SEED + 1 + MAX_SEEDS)
        return [run for seed in seeds if (run := self.run(arm_name, tokens, seed)) is not None]

    def losses(self, arm_name: str, tokens: int) -> dict[int, float]:
        """Held-out loss by seed, of the runs that did not diverge."""
        return {run.spec.seed: run.loss for run in self.runs(arm_name, tokens) if not run.diverged}

    def difference(self, arm: str, other: str, tokens: int) -> Interval | None:
        """The loss of an arm minus another's, paired by seed; a single one by the spread of the others too."""
        found = paired(self.losses(arm, tokens), self.losses(other, tokens))
        if found is None or found.count > 1 or tokens != self.scale.tokens or self.spread is None:
            return found
        return replace(found, pooled=self.spread.half_width())

    @cached_property
    def spread(self) -> Spread | None:
        """How far single runs of the standard length scatter; None: too few arms have their seeds.

        Arms that share their first steps with another one would count twice, and are left out.
        """
        scale = self.scale
        names = dict.fromkeys(n for g in groups("all", scale) if g.tokens == scale.tokens for n in g.arms)
        own = (n for n in names if not any(s.startswith("elastic.start=") for s in arm_named(n).settings))
        seeds = range(TUNING_SEED + 1, TUNING_SEED + 1 + scale.side_seeds)
        losses = (self.losses(name, scale.tokens) for name in own)
        return spread([[loss[seed] for seed in seeds] for loss in losses if loss.keys() >= set(seeds)])

    def seeds_wanted(self, group: Group) -> int:
        """How many seeds a group needs, by what is known of it: more while an interval is too wide."""
        least, most = group.seeds
        wanted = least
        while wanted < most and self._too_wide(group, wanted):
            wanted += 1
        return wanted

    def _too_wide(self, group: Group, seeds: int) -> bool:
        """Whether these seeds are all there, and leave an interval of the first arm against another too wide.

        A seed that diverged is there, and narrows nothing.
        """
        first, *others = group.arms
        for other in others:
            found = [
                [run for run in self.runs(name, group.tokens) if run.spec.seed <= TUNING_SEED + seeds]
                for name in (first, other)
            ]
            if any(len(runs) < seeds for runs in found):
                return False
            difference = paired(*({run.spec.seed: run.loss for run in runs if not run.diverged} for runs in found))
            if difference is None or difference.half_width is None or difference.half_width > self.scale.half_width:
                return True
        return False

    def missing(self, wanted: Sequence[Group]) -> Iterator[RunSpec]:
        """The runs that are still to be trained, in order; what hangs on a missing learning rate comes later."""
        named: set[str] = set()
        for group in wanted:
            arms = [arm_named(name) for name in group.trained]
            specs = [spec for arm in arms for spec in self.tuning(arm)]
            seeds = range(TUNING_SEED + 1, TUNING_SEED + 1 + self.seeds_wanted(group))
            for seed in seeds:
                for arm in arms:
                    lr = self.lr(arm)
                    if lr is not None:
                        specs.append(RunSpec(self.scale, arm, group.tokens, lr, seed))
            for spec in specs:
                if spec.slug not in named and self.get(spec) is None:
                    named.add(spec.slug)
                    yield spec


def read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text())
    except OSError as error:
        raise InfMoEError(f"cannot read {path}: {error.strerror or os.strerror(error.errno or 0)}") from error
    except (ValueError, RecursionError) as error:
        raise InfMoEError(f"{path} is damaged (no JSON): restore it, or move it away") from error
    if not isinstance(values, dict):
        raise InfMoEError(f"{path} is damaged (no object): restore it, or move it away")
    return values
