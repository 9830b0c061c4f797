"""The .bin token shards of llm.c and modded-nanogpt.

A shard is 256 int32 (magic, version, token count, zeros) followed by the tokens as uint16, all little-endian.
"""

import hashlib
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

import numpy as np
from numpy.typing import NDArray

from infmoe.data.manifest import Shard
from infmoe.errors import InfMoEError

MAGIC = 20240520
VERSION = 1
HEADER_BYTES = 256 * 4
MEND = "delete the folder and prepare the data again"
TOKEN = np.dtype("<u2")
MAX_VOCAB = 2**16
# The header counts tokens in an int32.
MAX_SHARD_TOKENS = 2**31 - 1


def _header(tokens: int) -> bytes:
    header = np.zeros(HEADER_BYTES // 4, dtype="<i4")
    header[:3] = MAGIC, VERSION, tokens
    return header.tobytes()


class ShardWriter:
    """Writes a stream of tokens as `{split}-000000.bin`, `{split}-000001.bin`, ...; a context manager.

    Tokens go to disk as they come, so memory does not grow with the shard.

    Args:
        folder: where the shards go.
        split: the first part of their names.
        shard_tokens: how many tokens each shard but the last holds.
    """

    def __init__(self, folder: Path, split: str, shard_tokens: int) -> None:
        self._folder = folder
        self._split = split
        self._shard_tokens = shard_tokens
        self._file: BinaryIO | None = None
        self._count = 0
        self._shards: list[Shard] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()

    @property
    def tokens(self) -> int:
        """How many tokens were written so far, over all shards."""
        return sum(shard.tokens for shard in self._shards) + self._count

    def write(self, tokens: NDArray[np.uint16]) -> None:
        """Appends `tokens`, shape (n,), starting new shards as they fill up."""
        while tokens.size:
            if self._file is None:
                name = f"{self._split}-{len(self._shards):06d}.bin"
                self._file = (self._folder / name).open("wb")
                self._file.write(_header(0))
            part, tokens = np.split(tokens, [self._shard_tokens - self._count])
            self._file.write(part.astype(TOKEN, copy=False).tobytes())
            self._count += part.size
            if self._count == self._shard_tokens:
                self._finish(self._file)

    def finish(self) -> tuple[Shard, ...]:
        """Ends the last shard and returns what was written, in order."""
        if self._file is not None:
            self._finish(self._file)
        return tuple(self._shards)

    def _finish(self, file: BinaryIO) -> None:
        # Only now is the count known, and it stands before the tokens: so the hash is taken from the file.
        file.seek(0)
        file.write(_header(self._count))
        file.close()
        path = Path(file.name)
        self._shards.append(Shard(file=path.name, tokens=self._count, sha256=sha256(path)))
        self._file, self._count = None, 0


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_shard(path: Path, shard: Shard, *, verify: bool) -> None:
    """Checks a shard against its manifest entry.

    Args:
        path: the shard's file.
        shard: what the manifest says of it.
        verify: whether to hash the whole file, and not only look at its size and header.

    Raises:
        InfMoEError: the file is missing, cut short, too long, of another format, or changed.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            header = file.read(HEADER_BYTES)
    except OSError as error:
        raise InfMoEError(f"cannot read {path} ({error.strerror}): {MEND}") from error
    due = HEADER_BYTES + TOKEN.itemsize * shard.tokens
    if size != due:
        what = "truncated" if size < due else "too long"
        raise InfMoEError(f"{path} is {what} ({size} bytes, not {due}): {MEND}")
    if header != _header(shard.tokens):
        raise InfMoEError(f"{path} does not start with the header of {shard.tokens} tokens: {MEND}")
    if verify and sha256(path) != shard.sha256:
        raise InfMoEError(f"{path} was changed: its SHA-256 is not the manifest's: {MEND}")


def map_shard(path: Path) -> NDArray[np.uint16]:
    """The tokens of a shard, mapped read-only and not loaded: shape (tokens,), uint16."""
    return np.memmap(path, dtype=TOKEN, mode="r", offset=HEADER_BYTES)
