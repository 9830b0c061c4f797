"""What the measurements share."""

import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from infmoe.data import MemorySource, StdlibSource, prepare
from infmoe.recipes import recipe
from infmoe.train.config import RunConfig, apply_overrides

Rows = list[dict[str, Any]]
Measured = tuple[Rows, dict[str, Any]]


@contextmanager
def tiny_run(variant: str = "infinity", *settings: str) -> Iterator[tuple[RunConfig, Path]]:
    """A tiny recipe over a little of the standard library's source, and a scratch folder; both vanish after."""
    with TemporaryDirectory() as scratch:
        folder = Path(scratch)
        documents = [text for i, text in enumerate(StdlibSource().documents()) if i % 8 == 0]
        prepare(MemorySource(tuple(documents)), folder / "data", tokenizer="bpe:2048", val_fraction=0.05)
        yield apply_overrides(recipe(f"tiny/{variant}"), [f"data.dir={folder / 'data'}", *settings]), folder


def spread(values: Sequence[float], prefix: str = "") -> dict[str, float]:
    """Median and quartiles of at least two values."""
    low, median, high = statistics.quantiles(values, n=4)
    return {f"{prefix}median": median, f"{prefix}q1": low, f"{prefix}q3": high}


def paired_ratio(numerator: Sequence[float], denominator: Sequence[float]) -> dict[str, float]:
    """Median and quartiles of the ratios, round by round."""
    return spread([a / b for a, b in zip(numerator, denominator, strict=True)], "ratio_")
