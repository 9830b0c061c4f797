"""Measured times of the tiny arms, from `infmoe bench variants`."""

from dataclasses import dataclass
from typing import Any

from infmoe.errors import InfMoEError
from infmoe.reproduce.checks import is_count, is_number
from infmoe.reproduce.store import Store, read_json

VARIANTS = "variants.json"


def _rows(store: Store) -> list[dict[str, Any]]:
    path = store.folder.parent.parent / VARIANTS
    if store.scale.name != "tiny" or not path.is_file():
        return []
    rows = read_json(path).get("rows")
    if not isinstance(rows, list) or not rows or not all(map(_is_row, rows)):
        raise InfMoEError(f"{path} is damaged: restore it, or make it again with `infmoe bench variants --out {path}`")
    return rows


def _is_row(row: Any) -> bool:
    """Whether a row has what is read of it: an arm, figures above 0 with their unit, and dials or none."""
    if not isinstance(row, dict) or not isinstance(row.get("arm"), str):
        return False
    if not all(is_number(row.get(of)) and row[of] > 0 for of in ("median", "q1", "q3")):
        return False
    if row.get("unit") == "tokens/s":
        return row.get("precision") in ("bf16", "fp32")
    ratio = row.get("keep_ratio")
    dials = ratio is None or (is_number(ratio) and 0 < ratio <= 1 and is_count(row.get("num_samples")))
    return row.get("unit") == "ms" and dials


@dataclass(frozen=True)
class Time:
    """Median and quartiles."""

    median: float
    q1: float
    q3: float


def speeds(store: Store) -> dict[str, dict[str, Time]]:
    """Arm -> µs per token of training in bfloat16 (`train_us`) and float32 (`train_us_fp32`), ms per token of decoding.

    Empty where nothing was measured.

    Raises:
        InfMoEError: the file is damaged.
    """
    found: dict[str, dict[str, Time]] = {}
    for row in _rows(store):
        if row["unit"] == "tokens/s":
            key = "train_us" if row.get("precision") == "bf16" else "train_us_fp32"
            time = Time(*(1e6 / row[of] for of in ("median", "q3", "q1")))
        elif row["unit"] == "ms" and row.get("keep_ratio") is None:
            key, time = "decode_ms", Time(row["median"], row["q1"], row["q3"])
        else:
            continue
        found.setdefault(row["arm"], {})[key] = time
    return found


def decode_over_dials(store: Store) -> dict[tuple[int, float], float]:
    """(K, keep ratio) -> ms per token of decoding with ∞-MoE; empty where nothing was measured."""
    return {
        (row["num_samples"], row["keep_ratio"]): row["median"]
        for row in _rows(store)
        if row["unit"] == "ms" and row.get("keep_ratio") is not None
    }
