"""Upper bounds of what was measured: what a budget may rest on."""

import math
import statistics
from collections.abc import Sequence

_LEAST_TURNS = 59  # of fewer, no token but the latest bounds the quantile


def upper_quantile(values: Sequence[float], share: float, draws: int | None = None) -> float:
    """An upper bound of a quantile that holds 19 times in 20; where there are too few values for one, the largest.

    Args:
        values: measured.
        share: below the quantile.
        draws: so many of the values count as independent; None: all.
    """
    ordered = sorted(values)
    share += 1.645 * math.sqrt(share * (1 - share) / (draws or len(ordered)))
    return ordered[min(math.ceil(share * len(ordered)), len(ordered)) - 1]


def upper_p95s(milliseconds: Sequence[Sequence[float]], per_turn: int = 1) -> list[float]:
    """What 95 of 100 tokens of each of several settings stay below, timed in turns: an upper bound.

    A token is late because of the machine more than of its setting, and those of a turn are late together. A bound
    from a setting's own few turns is too low as often as not for the setting whose bound came out lowest, which a
    tight budget picks. So the ratio of the quantile to the median is bounded over all settings, their turns as the
    draws (which leaves out that the machine may be slow for several turns), and multiplied by a bound of the setting's
    median; what its own tokens say counts where that is more, or where there are too few turns to say anything else.

    Args:
        milliseconds: of each token of each setting.
        per_turn: tokens in a row of one setting.

    Returns:
        Milliseconds; each factor holds 19 times in 20 by itself.
    """
    own = [upper_quantile(spent, 0.95) for spent in milliseconds]
    turns = sum(len(spent) for spent in milliseconds) // per_turn
    if turns < _LEAST_TURNS:
        return own
    medians = [statistics.median(spent) for spent in milliseconds]
    ratios = [time / median for spent, median in zip(milliseconds, medians, strict=True) for time in spent]
    late = upper_quantile(ratios, 0.95, turns)
    middles = [upper_quantile(spent, 0.5, max(1, len(spent) // per_turn)) for spent in milliseconds]
    return [max(alone, late * middle) for alone, middle in zip(own, middles, strict=True)]


def upper_increase(increase: float, standard_error: float, windows: int) -> float:
    """What an increase that was measured over so many windows lies below, 19 times in 20 (Student's t)."""
    z, degrees = 1.6449, max(windows - 1, 1)
    # Cornish and Fisher's expansion of t's quantile; within a hundredth from 6 windows on
    t = z + (z**3 + z) / (4 * degrees) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * degrees**2)
    return increase + t * standard_error
