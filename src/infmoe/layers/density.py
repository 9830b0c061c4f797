"""How much of a layer a token is expected to need, for the dispatcher."""

import torch

from infmoe.layers.dials import Dials
from infmoe.layers.metrics import RoutingStats

State = tuple[int, ...]


class UnionDensity:
    """The share of units in the union of a token's masks: as measured at a setting's first call, else expected.

    What was measured holds while the router's weights stay as they are: `state` changes with them.
    """

    def __init__(self) -> None:
        self._measured: dict[tuple, float] = {}

    def expected(self, dials: Dials, state: State) -> float:
        """Of the row with most of them: as measured, else for independent masks.

        Before a cut is measured, as if it kept `keep_ratio`.
        """
        return max(
            [
                self._measured.get((k, ratio, dials.cut, dials.min_sigma_to_mu, state), 1.0 - (1.0 - ratio) ** k)
                for ratio in dials.keep_ratios
                for k in dials.num_samples
            ]
        )

    def is_settled(self, dials: Dials, state: State) -> bool:
        """Whether what is expected stays: it was measured, or never will be."""
        return not _one_setting(dials) or _setting(dials, state) in self._measured

    def measure(self, stats: RoutingStats, dials: Dials, state: State, num_tokens: int) -> None:
        """Remember what a setting's first call found, where all rows run the same one, on the CPU."""
        if not _one_setting(dials) or num_tokens == 0 or torch.compiler.is_compiling():
            return
        setting = _setting(dials, state)
        if setting not in self._measured and stats.union.device.type == "cpu":
            share = float(stats.union) / num_tokens
            if 0.0 < share <= 1.0:
                self._measured[setting] = share


def _one_setting(dials: Dials) -> bool:
    return len(dials.num_samples) == len(dials.keep_ratios) == 1


def _setting(dials: Dials, state: State) -> tuple:
    return dials.num_samples[0], dials.keep_ratios[0], dials.cut, dials.min_sigma_to_mu, state
