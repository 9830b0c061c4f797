"""Which window each training sample reads, as a pure function of the sample's number.

There is no shuffled list and no iterator state: a resumed run, or one on another number of processes,
reads exactly what the first would have read.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from infmoe.errors import InfMoEError

_GOLDEN = 0x9E3779B97F4A7C15
_ROUNDS = 8


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of splitmix64, a bijection: every output bit hangs on every input bit."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@dataclass(frozen=True)
class DataOrder:
    """A shuffle of `num_windows` windows, drawn anew in every epoch, in O(1) time and memory per sample.

    Samples are numbered from 0 over the whole run: sample `i` belongs to epoch `i // num_windows`, and within
    an epoch every window is read once. The order hangs on nothing but `(num_windows, seed)`.

    Args:
        num_windows: how many windows there are, at least 1.
        seed: any integer in [0, 2**64).

    Raises:
        InfMoEError: `num_windows` or `seed` is out of range.
    """

    num_windows: int
    seed: int = 0

    def __post_init__(self) -> None:
        if self.num_windows < 1:
            raise InfMoEError(f"there are {self.num_windows} windows to order: give at least one")
        if not 0 <= self.seed < 2**64:
            raise InfMoEError(f"seed {self.seed} is out of range: give one of 0 .. 2**64 - 1")

    @staticmethod
    def samples(step: int, batch: int) -> NDArray[np.int64]:
        """The global sample numbers of the batch of `step`: shape (batch,), `step * batch` onwards."""
        return np.arange(step * batch, (step + 1) * batch, dtype=np.int64)

    def index(self, sample: int) -> int:
        """The window that global sample number `sample` (>= 0) reads."""
        return int(self.indices(np.array([sample], dtype=np.int64))[0])

    def indices(self, samples: NDArray[np.int64]) -> NDArray[np.int64]:
        """The windows that the global sample numbers read.

        Args:
            samples: sample numbers, each >= 0, shape (n,).

        Returns:
            Window numbers in [0, num_windows), shape (n,), int64.
        """
        number = samples.astype(np.uint64)
        seed = _mix(np.array([self.seed], dtype=np.uint64))
        keys = _mix(seed + number // np.uint64(self.num_windows) * np.uint64(_GOLDEN))
        window = self._permute(number % np.uint64(self.num_windows), keys)
        # Cycle walking: the grid is a little larger than the range, so step on until back inside. This ends,
        # as a permutation's cycle leads back to its start, which is inside.
        outside = np.flatnonzero(window >= self.num_windows)
        while outside.size:
            window[outside] = self._permute(window[outside], keys[outside])
            outside = outside[window[outside] >= self.num_windows]
        return window.astype(np.int64)

    def _permute(self, x: NDArray[np.uint64], keys: NDArray[np.uint64]) -> NDArray[np.uint64]:
        """A keyed permutation of a grid of `num_windows` cells or slightly more: a Feistel network.

        Each round shifts one coordinate, modulo its range, by a hash of the other, which can be undone.
        """
        side = math.isqrt(self.num_windows - 1) + 1
        rows, columns = np.uint64(side), np.uint64(-(-self.num_windows // side))
        row, column = x // columns, x % columns
        for turn in range(_ROUNDS):
            round_keys = _mix(keys + np.uint64((turn + 1) * _GOLDEN % 2**64))
            if turn % 2:
                row = (row + _mix(column ^ round_keys) % rows) % rows
            else:
                column = (column + _mix(row ^ round_keys) % columns) % columns
        return row * columns + column
