"""What the measurements share."""

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from infmoe.data import MemorySource, StdlibSource, prepare
from infmoe.recipes import recipe
from infmoe.train.config import RunConfig, apply_overrides

if TYPE_CHECKING:
    import torch

    from infmoe.hf import InfMoEConfig

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


def training_step(
    model: Any, config: RunConfig, forward: Callable[[Any], Any], optimizer: Any = None
) -> Callable[[], None]:
    """One training step of `model`, without gradient accumulation.

    Args:
        model: what trains.
        config: the run's precision and optimizer.
        forward: the model's output, with its loss.
        optimizer: one to share with another step of the same model; None: its own.
    """
    import torch

    from infmoe.train.optim import build_optimizer

    optimizer = build_optimizer(model, config.optim) if optimizer is None else optimizer

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=config.precision == "bf16"):
            loss = forward(model).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def random_model(config: "InfMoEConfig", dtype: "torch.dtype") -> Any:
    """A model in eval mode that starts as `InfMoEForCausalLM(config)` does, in less than half the time.

    torch's own initialization, which the model's replaces, is left out.
    """
    import torch

    from infmoe.hf import InfMoEForCausalLM

    with torch.device("meta"):
        model: Any = InfMoEForCausalLM(config)
    model.to_empty(device="cpu")
    model.tie_weights()
    for module in reversed(list(model.modules())):  # children first, as in transformers
        model._init_weights(module)
    return model.to(dtype).eval()


def spread(values: Sequence[float], prefix: str = "") -> dict[str, float]:
    """Median and quartiles of at least two values."""
    low, median, high = statistics.quantiles(values, n=4)
    return {f"{prefix}median": median, f"{prefix}q1": low, f"{prefix}q3": high}


def paired_ratio(
    numerator: Sequence[float], denominator: Sequence[float], *, prefix: str = "ratio_"
) -> dict[str, float]:
    """Median and quartiles of the ratios, round by round."""
    return spread([a / b for a, b in zip(numerator, denominator, strict=True)], prefix)


class Budget:
    """A share of time for each of several measurements, so that a first look ends when it said it would."""

    def __init__(self, seconds: float | None, parts: int):
        """Start the clock.

        Args:
            seconds: for all parts together; None: no limit.
            parts: how many there are.
        """
        self._end = None if seconds is None else time.perf_counter() + seconds
        self._left = parts

    def share(self, parts: int = 1) -> float | None:
        """Seconds that the next so many parts may take: what is left, divided evenly."""
        left, self._left = self._left, self._left - parts
        return None if self._end is None else max(0.0, (self._end - time.perf_counter()) * parts / max(left, parts))


def table(rows: Rows) -> str:
    """Rows as aligned columns; a new heading wherever the columns change."""
    blocks: list[list[list[str]]] = []
    keys: tuple[str, ...] = ()
    for row in rows:
        if tuple(row) != keys:
            keys = tuple(row)
            blocks.append([list(keys)])
        blocks[-1].append([f"{v:.4g}" if isinstance(v, float) else str(v) for v in row.values()])
    lines = []
    for block in blocks:
        widths = [max(map(len, column)) for column in zip(*block, strict=True)]
        lines += ["  ".join(map(str.ljust, cells, widths)).rstrip() for cells in block]
    return "\n".join(lines)
