"""One setting of the dials: a value that can be written to a file, put in a table, and run."""

from dataclasses import asdict, dataclass
from fractions import Fraction
from typing import Any, TypeVar

from infmoe.layers.routing import Mode, PerLayer, Routing

V = TypeVar("V")


@dataclass(frozen=True)
class Point:
    """One setting of the dials; None where the variant does not have the dial or the mode ignores it.

    A tuple has one value for each layer, first layer first.
    """

    num_samples: int | tuple[int, ...] | None = None
    keep_ratio: float | tuple[float, ...] | None = None
    num_experts_per_tok: int | tuple[int, ...] | None = None
    mode: Mode | None = None

    @staticmethod
    def of(values: dict[str, Any]) -> "Point":
        """The point that a row of results has; what else it holds is not looked at."""
        dials: dict[str, Any] = {}
        for name in Point.__dataclass_fields__:
            value = values.get(name)
            dials[name] = tuple(value) if isinstance(value, list) else value
        return Point(**dials)

    def by_layer(self) -> dict[str, tuple]:
        """The dials that differ from layer to layer."""
        return {name: value for name, value in asdict(self).items() if isinstance(value, tuple)}

    def dials(self) -> dict[str, Any]:
        """What `Routing` takes."""
        return {name: PerLayer(v) if isinstance(v, tuple) else v for name, v in asdict(self).items()}

    def routing(self, max_stats_tokens: int | None = None) -> Routing:
        """The routing of this point."""
        return Routing(**self.dials(), max_stats_tokens=max_stats_tokens)

    def label(self) -> str:
        """Short text for tables: "K=2 keep=1/4", "k=2", "mu keep=1/4", "keep=1/4|1/8", "-"."""
        parts = []
        if self.num_experts_per_tok is not None:
            parts.append(f"k={_text(self.num_experts_per_tok)}")
        if self.mode is not None and self.mode != "sample":
            parts.append(self.mode)
        if self.num_samples is not None:
            parts.append(f"K={_text(self.num_samples)}")
        if self.keep_ratio is not None:
            parts.append(f"keep={ratio_text(self.keep_ratio)}")
        return " ".join(parts) or "-"


def _text(values: int | tuple[int, ...]) -> str:
    return "|".join(map(str, values)) if isinstance(values, tuple) else f"{values}"


def ratio_text(ratio: float | tuple[float, ...] | list[float]) -> str:
    """1/16 rather than 0.0625, 3/16 rather than 0.1875, where that is what it is; layers apart by bars."""
    if isinstance(ratio, tuple | list):
        return "|".join(ratio_text(r) for r in ratio)
    fraction = Fraction(ratio).limit_denominator(128)
    return (
        f"{fraction.numerator}/{fraction.denominator}"
        if float(fraction) == ratio
        and fraction.denominator > 1
        and (fraction.numerator == 1 or fraction.denominator in (4, 8, 16, 32, 64, 128))
        else f"{ratio:g}"
    )
