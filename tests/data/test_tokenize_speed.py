"""The measurement of tokenization speed."""

import pytest

from infmoe.data import MemorySource, TrainBPE
from infmoe.data.bench import tokenize_speed


@pytest.fixture(scope="module")
def measured(texts: tuple[str, ...]) -> dict[str, object]:
    return tokenize_speed(TrainBPE(300), MemorySource(texts), max_bytes=1000, repeats=3)


def test_it_reads_as_many_documents_as_it_takes(measured: dict[str, object], texts: tuple[str, ...]) -> None:
    sizes = [len(text.encode()) for text in texts]
    count = next(count for count in range(1, 40) if sum(sizes[:count]) >= 1000)
    assert (measured["documents"], measured["text_bytes"]) == (count, sum(sizes[:count]))


@pytest.mark.parametrize("name", ["encode_batch", "prepare", "ratio"])
def test_it_gives_median_and_spread(measured: dict[str, dict[str, float]], name: str) -> None:
    assert 0 < measured[name]["min"] <= measured[name]["median"] <= measured[name]["max"]
