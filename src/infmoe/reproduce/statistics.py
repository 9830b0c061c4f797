"""Means over seeds, and differences paired by seed, with 95 % intervals."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

# 97.5 % quantile of Student's t, by degrees of freedom from 1
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)
_T_BEYOND = {60: 2.000, 40: 2.021, 30: 2.042, 20: 2.086, 0: 2.120}  # from so many on, a little wide between them
_MIN_DEGREES = 10  # below which a pooled spread is known too badly to judge by


@dataclass(frozen=True)
class Interval:
    """A mean with its 95 % interval.

    Attributes:
        mean: of the values.
        half_width: None for a single value.
        count: how many values.
        pooled: of a single value, the half-width that the spread of other arms gives it; None: not known.
    """

    mean: float
    half_width: float | None
    count: int
    pooled: float | None = None

    @property
    def low(self) -> float:
        """The interval's lower end; minus infinity for a single value."""
        return -math.inf if self.half_width is None else self.mean - self.half_width

    @property
    def high(self) -> float:
        """The interval's upper end; infinity for a single value."""
        return math.inf if self.half_width is None else self.mean + self.half_width

    def text(self, digits: int = 3, *, sign: bool = False) -> str:
        """ "3.649 ± 0.004"."""
        mean = f"{self.mean:{'+' if sign else ''}.{digits}f}"
        return mean if self.half_width is None else f"{mean} ± {self.half_width:.{digits}f}"


def interval(values: Sequence[float]) -> Interval:
    """Mean and interval of at least one value."""
    n = len(values)
    if n < 2:
        return Interval(values[0], None, n)
    half_width = t_quantile(n - 1) * statistics.stdev(values) / math.sqrt(n)
    return Interval(statistics.fmean(values), half_width, n)


def t_quantile(degrees: int) -> float:
    """The 97.5 % quantile of Student's t, with so many degrees of freedom."""
    return _T[degrees - 1] if degrees <= len(_T) else next(t for least, t in _T_BEYOND.items() if degrees >= least)


@dataclass(frozen=True)
class Spread:
    """How far single runs scatter about what their arm and their seed make of them.

    Attributes:
        deviation: standard deviation of what is left of a loss when its arm's and its seed's mean are taken off.
        degrees: of freedom.
        arms: how many of them.
        seeds: of each.
    """

    deviation: float
    degrees: int
    arms: int
    seeds: int

    def half_width(self, count: int = 1) -> float:
        """Of the 95 % interval of the difference of two arms over so many common seeds, if they spread alike."""
        return t_quantile(self.degrees) * math.sqrt(2 / count) * self.deviation


def spread(losses: Sequence[Sequence[float]]) -> Spread | None:
    """The spread of arms that all have the same seeds: the residual of a randomized block design.

    Args:
        losses: of each arm, seed by seed.

    Returns:
        None where the arms are too few to say.
    """
    arms, seeds = len(losses), len(losses[0]) if losses else 0
    degrees = (arms - 1) * (seeds - 1)
    if degrees < _MIN_DEGREES:
        return None
    of_arm = [statistics.fmean(row) for row in losses]
    mean = statistics.fmean(of_arm)
    of_seed = [statistics.fmean(column) - mean for column in zip(*losses, strict=True)]
    left = [loss - of_arm[i] - of_seed[j] for i, row in enumerate(losses) for j, loss in enumerate(row)]
    return Spread(math.sqrt(sum(x * x for x in left) / degrees), degrees, arms, seeds)


def paired(ours: Mapping[int, float], theirs: Mapping[int, float]) -> Interval | None:
    """The interval of ours minus theirs over the seeds that both have; None where there is none."""
    seeds = sorted(ours.keys() & theirs.keys())
    return interval([ours[seed] - theirs[seed] for seed in seeds]) if seeds else None
