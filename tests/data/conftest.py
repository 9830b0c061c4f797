"""A small corpus and a small prepared folder that the data tests share."""

import json
from pathlib import Path

import pytest

from infmoe.data import MemorySource, TokenData, TrainBPE, prepare

WORDS = [
    "the",
    "quick",
    "brown",
    "fox",
    "jumps",
    "over",
    "a",
    "lazy",
    "dog",
    "while",
    "seven",
    "wizards",
    "brew",
]


def document(number: int, words: int = 60) -> str:
    """A deterministic text that differs from every other number's."""
    picked = [WORDS[(number * 7 + place * place) % len(WORDS)] for place in range(words)]
    return f"Chapter {number}.\n\n" + " ".join(picked) + "!\n"


@pytest.fixture(scope="session")
def texts() -> tuple[str, ...]:
    """Forty documents."""
    return tuple(document(number) for number in range(40))


@pytest.fixture
def corpus(texts: tuple[str, ...]) -> MemorySource:
    """The forty documents as a source."""
    return MemorySource(texts)


@pytest.fixture
def data(corpus: MemorySource, tmp_path: Path) -> TokenData:
    """The corpus, prepared with a small tokenizer into several shards."""
    return prepare(corpus, tmp_path / "data", tokenizer=TrainBPE(300), val_fraction=0.2, shard_tokens=500)


@pytest.fixture
def gpt2_folder(data: TokenData, tmp_path: Path) -> Path:
    """A small tokenizer of GPT-2's kind as `vocab.json` and `merges.txt`, taken from a trained one."""
    model = json.loads((data.folder / "tokenizer" / "tokenizer.json").read_text())["model"]
    folder = tmp_path / "gpt2"
    folder.mkdir()
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
    merges = "".join(f"{left} {right}\n" for left, right in model["merges"])
    (folder / "merges.txt").write_text("#version: 0.2\n" + merges)
    return folder
