"""Speed of `infmoe data`."""

from infmoe.bench.common import Measured
from infmoe.data.bench import tokenize_speed


def tokenize(*, quick: bool = False) -> Measured:
    """Tokens per second of `prepare`, writing included, and of `encode_batch` alone, taking turns."""
    result = tokenize_speed("bpe:2048", max_bytes=(1 if quick else 4) * 2**20, repeats=3 if quick else 9)
    rows = [{"arm": arm, "unit": "tokens/s", **result[arm]} for arm in ("prepare", "encode_batch")]
    return rows, {
        "prepare_over_encode_batch": result["ratio"]["median"],
        "limit": 0.8,
        "tokens": result["tokens"],
    }
