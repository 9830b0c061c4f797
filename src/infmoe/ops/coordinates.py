"""What a token's noise is a function of, as the operators take it."""

from torch import Tensor

NoiseCoordinates = tuple[Tensor, Tensor, int, Tensor, Tensor]  # seed, step, layer, streams, positions
