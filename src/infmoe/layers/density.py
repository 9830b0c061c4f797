"""How much of a layer a token is expected to need, for the dispatcher."""

import torch

from infmoe.layers.mask_weights import Dials
from infmoe.ops.masked_ffn.result import MaskStats

State = tuple[int, ...]


class UnionDensity:
    """The share of units in the union of a token's masks: as measured at a setting's first call, else expected.

    What was measured holds while the router's weights stay as they are: `state` changes with them.
    """

    def __init__(self) -> None:
        self._measured: dict[tuple, float] = {}

    def expected(self, dials: Dials, state: State) -> float:
        """Of the row with most of them: as measured, else for independent masks.

        Before a score cut is measured, as if it kept `keep_ratio`.
        """
        return max(
            [
                self._measured.get((k, ratio, dials.score_cut, state), 1.0 - (1.0 - ratio) ** k)
                for ratio in dials.keep_ratios
                for k in dials.num_samples
            ]
        )

    def measure(self, mask: MaskStats, dials: Dials, state: State, num_tokens: int) -> None:
        """Remember what a setting's first call found, where all rows run the same one, on the CPU."""
        one_setting = len(dials.num_samples) == len(dials.keep_ratios) == 1
        if not one_setting or num_tokens == 0 or torch.compiler.is_compiling():
            return
        setting = (dials.num_samples[0], dials.keep_ratios[0], dials.score_cut, state)
        if setting not in self._measured and mask.union.device.type == "cpu":
            share = float(mask.union) / num_tokens
            if 0.0 < share <= 1.0:
                self._measured[setting] = share
