"""From documents to token shards."""

import errno
import hashlib
import os
import platform
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from infmoe.data.manifest import MANIFEST, SPLITS, Manifest, Split, SplitInfo, TokenizerInfo
from infmoe.data.reader import TokenData
from infmoe.data.shards import MAX_SHARD_TOKENS, MAX_VOCAB, TOKEN, ShardWriter, sha256
from infmoe.data.sources import Source, parse_source
from infmoe.data.tokenizer import (
    TOKENIZER_FOLDER,
    TokenizerSpec,
    parse_tokenizer,
    pieces,
    save_tokenizer,
    splits_at_words,
)
from infmoe.errors import InfMoEError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# Text is encoded a batch at a time, which bounds memory: an encoding takes over a hundred bytes per token.
_BATCH_CHARS = 2 * 2**20
# tokenizers is a quarter faster on short texts than on whole books, and they share the cores evenly.
_PIECE_CHARS = 4096


@dataclass(frozen=True)
class Progress:
    """How far `prepare` is.

    Attributes:
        stage: "tokenizer" while it is built, "tokens" while documents are encoded, "already there" when the
            folder holds this very dataset and nothing is done.
        documents: documents encoded so far.
        text_bytes: their UTF-8 bytes.
        tokens: tokens written so far.
    """

    stage: Literal["tokenizer", "tokens", "already there"]
    documents: int = 0
    text_bytes: int = 0
    tokens: int = 0


class _Document(NamedTuple):
    text: str
    split: Split
    text_bytes: int


class _Piece(NamedTuple):
    text: str
    split: Split
    opens: bool  # whether it starts its document


@dataclass
class _Count:
    documents: int = 0
    text_bytes: int = 0


def prepare(
    source: Source | str,
    out: str | Path,
    *,
    tokenizer: TokenizerSpec | str,
    val_fraction: float = 0.01,
    shard_tokens: int = 100_000_000,
    model_max_length: int | None = None,
    progress: Callable[[Progress], None] = lambda _: None,
) -> TokenData:
    """Tokenizes a corpus into a folder of shards, a tokenizer and a manifest.

    The folder appears at the end, whole, or not at all. Each document goes to train or val by the hash of its
    text alone, so that adding documents moves none. Memory does not grow with the corpus (but training a
    tokenizer keeps the corpus's distinct words). The same corpus and settings make byte-identical folders.

    Args:
        source: the documents, or what `parse_source` takes.
        out: the folder to make. One that already holds this very dataset is opened and returned as it is.
        tokenizer: the tokenizer, or what `parse_tokenizer` takes.
        val_fraction: the chance of a document to go to val, in [0, 1); 0 for no validation split.
        shard_tokens: how many tokens each shard but a split's last holds.
        model_max_length: the context length, in tokens, to state in the tokenizer.
        progress: is told how far the work is, some times a second.

    Returns:
        The folder, opened.

    Raises:
        InfMoEError: a setting is out of range, the corpus cannot be read, it or a split of it is empty, the
            tokenizer cannot be had, `out` holds something else, or the disk is full.
    """
    source = parse_source(source) if isinstance(source, str) else source
    spec = parse_tokenizer(tokenizer) if isinstance(tokenizer, str) else tokenizer
    out = Path(out).resolve()
    if not 0 <= val_fraction < 1:
        raise InfMoEError(f"val fraction {val_fraction} is out of range: give 0 for none, or one below 1")
    if not 1 <= shard_tokens <= MAX_SHARD_TOKENS:
        raise InfMoEError(f"{shard_tokens} tokens per shard is out of range: give one of 1 .. {MAX_SHARD_TOKENS}")
    settings: dict[str, Any] = {
        "source": source.describe(),
        "tokenizer": spec.describe(),
        "val_fraction": val_fraction,
        "shard_tokens": shard_tokens,
        "model_max_length": model_max_length,
    }
    if out.exists() and not _is_empty_folder(out):
        _require_same(out, settings)
        progress(Progress("already there"))
        return TokenData.open(out)
    with _appearing(out) as folder:
        progress(Progress("tokenizer"))
        documents = _documents(source, val_fraction)
        encoder = spec.build(document.text for document in documents if document.split == "train")
        info = _save(encoder, spec.eot, folder / TOKENIZER_FOLDER, model_max_length)
        documents = _documents(source, val_fraction)
        splits = _encode(documents, encoder, info.eot_id, folder, shard_tokens, progress)
        _require_text(splits, val_fraction)
        Manifest(settings=settings, tokenizer=info, splits=splits, versions=_versions()).write(folder)
    return TokenData.open(out)


def split_of(raw: bytes, val_fraction: float) -> Split:
    """The split of the document whose UTF-8 text is `raw`: a function of these bytes alone."""
    place = int.from_bytes(hashlib.sha256(raw).digest()[:8], "big") / 2**64
    return "val" if place < val_fraction else "train"


def _documents(source: Source, val_fraction: float) -> Iterator[_Document]:
    """The documents that are not empty, each with its split."""
    for number, text in enumerate(source.documents()):
        try:
            raw = text.encode()
        except UnicodeEncodeError as error:
            raise InfMoEError(
                f"document {number} has half of a surrogate pair at character {error.start}: mend its text"
            ) from error
        if raw:
            yield _Document(text, split_of(raw, val_fraction), len(raw))


def _save(tokenizer: "Tokenizer", eot: str, folder: Path, model_max_length: int | None) -> TokenizerInfo:
    # Not the count of tokens: a vocabulary may have gaps.
    vocab = tokenizer.get_vocab()
    vocab_size = max(vocab.values()) + 1
    if vocab_size > MAX_VOCAB:
        raise InfMoEError(
            f"the tokenizer has {vocab_size} tokens, and uint16 shards hold {MAX_VOCAB}: take a smaller one"
        )
    path = save_tokenizer(tokenizer, folder, eot=eot, model_max_length=model_max_length)
    return TokenizerInfo(sha256=sha256(path), vocab_size=vocab_size, eot_id=vocab[eot])


def _encode(
    documents: Iterable[_Document],
    tokenizer: "Tokenizer",
    eot_id: int,
    folder: Path,
    shard_tokens: int,
    progress: Callable[[Progress], None],
) -> dict[Split, SplitInfo]:
    """Writes the shards of both splits."""
    # A document that happens to spell out a special token has it encoded as the plain text that it is.
    tokenizer.encode_special_tokens = True
    counts: dict[Split, _Count] = {split: _Count() for split in SPLITS}
    with ExitStack() as stack:
        writers = {split: stack.enter_context(ShardWriter(folder, split, shard_tokens)) for split in SPLITS}
        for batch in _batches(_cut(documents, counts, whole=not splits_at_words(tokenizer))):
            encodings = tokenizer.encode_batch_fast([piece.text for piece in batch], add_special_tokens=False)
            ids: dict[Split, list[int]] = {split: [] for split in SPLITS}
            for piece, encoding in zip(batch, encodings, strict=True):
                if piece.opens:
                    ids[piece.split].append(eot_id)
                ids[piece.split].extend(encoding.ids)
            for split, writer in writers.items():
                writer.write(np.array(ids[split], dtype=TOKEN))
            progress(
                Progress(
                    "tokens",
                    documents=sum(count.documents for count in counts.values()),
                    text_bytes=sum(count.text_bytes for count in counts.values()),
                    tokens=sum(writer.tokens for writer in writers.values()),
                )
            )
        return {
            split: SplitInfo(tokens=writer.tokens, shards=writer.finish(), **vars(counts[split]))
            for split, writer in writers.items()
        }


def _cut(documents: Iterable[_Document], counts: dict[Split, _Count], *, whole: bool) -> Iterator[_Piece]:
    """The documents' pieces in order, counting the documents on the way."""
    for text, split, text_bytes in documents:
        counts[split].documents += 1
        counts[split].text_bytes += text_bytes
        for number, piece in enumerate((text,) if whole else pieces(text, _PIECE_CHARS)):
            yield _Piece(piece, split, opens=number == 0)


def _batches(pieces: Iterable[_Piece]) -> Iterator[list[_Piece]]:
    """Groups pieces, in order, until a group has `_BATCH_CHARS` characters or more."""
    batch: list[_Piece] = []
    chars = 0
    for piece in pieces:
        batch.append(piece)
        chars += len(piece.text)
        if chars >= _BATCH_CHARS:
            yield batch
            batch, chars = [], 0
    if batch:
        yield batch


def _require_text(splits: dict[Split, SplitInfo], val_fraction: float) -> None:
    documents = sum(info.documents for info in splits.values())
    if not documents:
        raise InfMoEError("the corpus is empty: give a source that holds text")
    if not splits["train"].documents:
        raise InfMoEError(f"the train split is empty ({documents} documents): lower the val fraction {val_fraction}")
    if val_fraction and not splits["val"].documents:
        raise InfMoEError(
            f"the validation split is empty ({documents} documents): raise the val fraction {val_fraction}, "
            "or split the text into more documents"
        )


def _require_same(out: Path, settings: dict[str, Any]) -> None:
    """Refuses an existing folder that is not the dataset of `settings`."""
    if not (out / MANIFEST).is_file():
        raise InfMoEError(f"{out} exists and is no prepared data: choose another folder")
    there = Manifest.read(out).settings
    differing = [name for name, value in settings.items() if there.get(name) != value]
    if differing:
        raise InfMoEError(f"{out} holds another dataset ({', '.join(differing)}): choose another folder or delete it")


def _is_empty_folder(path: Path) -> bool:
    return path.is_dir() and not any(path.iterdir())


@contextmanager
def _appearing(out: Path) -> Iterator[Path]:
    """A new folder beside `out` that becomes `out` at the end, and is removed if anything fails before."""
    folder = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir()
    except OSError as error:
        raise InfMoEError(f"cannot write to {out.parent} ({error.strerror}): choose another folder") from error
    try:
        yield folder
        try:
            folder.rename(out)
        except OSError as error:
            raise InfMoEError(f"{out} was made by another process meanwhile: choose another folder") from error
    except BaseException as error:
        shutil.rmtree(folder, ignore_errors=True)
        if isinstance(error, OSError) and error.errno in {errno.ENOSPC, errno.EDQUOT}:
            raise InfMoEError(f"no space left for {out}: free some, or choose a folder on another disk") from error
        raise


def _versions() -> dict[str, str]:
    return {"python": platform.python_version(), **{name: version(name) for name in ("numpy", "tokenizers")}}
