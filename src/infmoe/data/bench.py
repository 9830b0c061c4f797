"""How fast `prepare` is, beside what the `tokenizers` library does alone."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

from infmoe.data.pipeline import prepare
from infmoe.data.sources import MemorySource, Source, parse_source
from infmoe.data.tokenizer import TokenizerFile, TokenizerSpec, parse_tokenizer, save_tokenizer


def tokenize_speed(
    tokenizer: TokenizerSpec | str,
    source: Source | str = "stdlib",
    *,
    max_bytes: int = 4 * 2**20,
    repeats: int = 5,
) -> dict[str, Any]:
    """Times `prepare`, writing included, against `Tokenizer.encode_batch` on the same documents.

    The two take turns, each from a freshly loaded tokenizer whose cache is cold, so that a machine that slows
    down meanwhile slows both.

    Args:
        tokenizer: the tokenizer, or what `parse_tokenizer` takes; one that is trained is trained beforehand.
        source: the documents, or what `parse_source` takes.
        max_bytes: how much text to read, in UTF-8 bytes; whole documents, at least one.
        repeats: how many turns each takes.

    Returns:
        `documents`, `text_bytes` and `tokens` of one turn; `cores`, which both may use; `encode_batch` and
        `prepare`, each the median, min and max of tokens per second; `ratio`, the same of prepare's speed
        over encode_batch's, turn by turn.

    Raises:
        InfMoEError: the tokenizer or the documents cannot be had.
    """
    source = parse_source(source) if isinstance(source, str) else source
    spec = parse_tokenizer(tokenizer) if isinstance(tokenizer, str) else tokenizer
    texts = tuple(_take(source.documents(), max_bytes))
    with TemporaryDirectory() as scratch:
        folder = Path(scratch)
        path = save_tokenizer(spec.build(texts), folder / "tokenizer", eot=spec.eot, model_max_length=None)
        saved = TokenizerFile(path, eot=spec.eot)
        alone, ours = [], []
        for turn in range(repeats):
            encoder = saved.build(())
            start = perf_counter()
            encoder.encode_batch(texts, add_special_tokens=False)
            alone.append(perf_counter() - start)
            start = perf_counter()
            data = prepare(MemorySource(texts), folder / str(turn), tokenizer=saved, val_fraction=0)
            ours.append(perf_counter() - start)
    info = data.info("train")
    return {
        "documents": info.documents,
        "text_bytes": info.text_bytes,
        "tokens": info.tokens,
        "cores": os.cpu_count(),
        "encode_batch": _summary([info.tokens / seconds for seconds in alone]),
        "prepare": _summary([info.tokens / seconds for seconds in ours]),
        "ratio": _summary([theirs / own for theirs, own in zip(alone, ours, strict=True)]),
    }


def _take(documents: Iterator[str], max_bytes: int) -> Iterator[str]:
    """The first documents, until they have `max_bytes` bytes or more."""
    taken = 0
    for text in documents:
        yield text
        taken += len(text.encode())
        if taken >= max_bytes:
            return


def _summary(values: Sequence[float]) -> dict[str, float]:
    return {"median": median(values), "min": min(values), "max": max(values)}
