"""The dials of one ∞-MoE call: what a routing asks for, with the layer's own where it says nothing."""

from typing import Any, Literal, NamedTuple

from infmoe.errors import InfMoEError
from infmoe.layers.routing import Mode, PerLayer, Routing

MaskScale = Literal["none", "fixed", "rms"]
MASK_SCALES: tuple[MaskScale, ...] = ("none", "fixed", "rms")
Ints = tuple[int, ...]
Floats = tuple[float, ...]


class Cut(NamedTuple):
    """Where a token's masks end, in place of a fixed share.

    Attributes:
        dial: "score_cut": units that score at least `at`; "score_mass": the fewest that hold `at` of the positive
            scores' sum.
        at: the value.
    """

    dial: Literal["score_cut", "score_mass"]
    at: float


class Dials(NamedTuple):
    """What one call of one layer runs with.

    Attributes:
        num_samples: K; one value for all rows or one per row.
        keep_ratios: likewise.
        mode: how the K samples are drawn.
        cut: keep what this says instead of a share, or None.
        min_sigma_to_mu: tokens whose router is surer than this take one sample; 0: none does.
    """

    num_samples: Ints
    keep_ratios: Floats
    mode: Mode
    cut: Cut | None = None
    min_sigma_to_mu: float = 0.0

    @classmethod
    def of_call(
        cls,
        routing: Routing,
        *,
        num_samples: Any,
        keep_ratio: Any,
        mode: Mode,
        mask_scale: MaskScale,
        has_sigma: bool,
        batch_size: int,
    ) -> "Dials":
        """A layer's routing, with the layer's own dials where it says nothing.

        Args:
            routing: of this layer (`Routing.at_layer`).
            num_samples, keep_ratio, mode, mask_scale: the layer's own.
            has_sigma: whether its router can draw.
            batch_size: rows of the call.

        Raises:
            InfMoEError: dials that contradict each other, or that this layer can't honour.
        """
        mode = routing.mode or mode
        if not has_sigma and mode != "mu":
            raise InfMoEError(f"this layer has no sigma (sigma_activation='none'), so mode {mode!r} means nothing")
        if mode == "mu" and routing.num_samples is not None:
            raise InfMoEError("this layer routes by z = mu and draws nothing: leave num_samples out")
        cut = _cut_of(routing)
        if cut is not None and mask_scale != "none":
            raise InfMoEError(f"{cut.dial} keeps no fixed ratio, which mask_scale={mask_scale!r} scales by")
        if routing.min_sigma_to_mu is not None and mode == "mu":
            raise InfMoEError("z = mu draws nothing: leave min_sigma_to_mu out")
        samples = _per_row(routing.num_samples, num_samples)
        ratios = _per_row(routing.keep_ratio, keep_ratio)
        for name, dial in (("num_samples", samples), ("keep_ratio", ratios)):
            if len(dial) not in (1, batch_size):
                raise InfMoEError(f"{name} has {len(dial)} values for a batch of {batch_size} rows: give one per row")
        bound = routing.min_sigma_to_mu or 0.0
        assert not isinstance(bound, PerLayer)  # `at_layer` took it apart
        if bound and max(samples) == 1:
            raise InfMoEError("min_sigma_to_mu spares sure tokens the further samples: give num_samples of 2 or more")
        return cls((1,) if mode == "mu" else samples, ratios, mode, cut, bound)


def _per_row(dial: Any, default: Any) -> tuple:
    """The dial, or the default, as one value for all rows or one per row."""
    value = default if dial is None else dial
    return value if isinstance(value, tuple) else (value,)


def num_kept(keep_ratios: Floats, num_units: int) -> Ints:
    """How many units each ratio keeps: the nearest whole number, one at least."""
    return tuple(max(1, round(ratio * num_units)) for ratio in keep_ratios)


def _cut_of(routing: Routing) -> Cut | None:
    """What a layer's routing gives in place of a fixed share."""
    assert not isinstance(routing.score_cut, PerLayer)  # `Routing.at_layer` took it apart
    assert not isinstance(routing.score_mass, PerLayer)
    if routing.score_cut is not None:
        return Cut("score_cut", routing.score_cut)
    return None if routing.score_mass is None else Cut("score_mass", routing.score_mass)
