"""Means over seeds, and differences paired by seed, with 95 % intervals."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

# 97.5 % quantile of Student's t, by degrees of freedom from 1
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)
_T_BEYOND = 2.13  # a little wide for more than 15


@dataclass(frozen=True)
class Interval:
    """A mean with its 95 % interval.

    Attributes:
        mean: of the values.
        half_width: None for a single value.
        count: how many values.
    """

    mean: float
    half_width: float | None
    count: int

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
    return _T[degrees - 1] if degrees <= len(_T) else _T_BEYOND


def paired(ours: Mapping[int, float], theirs: Mapping[int, float]) -> Interval | None:
    """The interval of ours minus theirs over the seeds that both have; None where there is none."""
    seeds = sorted(ours.keys() & theirs.keys())
    return interval([ours[seed] - theirs[seed] for seed in seeds]) if seeds else None
