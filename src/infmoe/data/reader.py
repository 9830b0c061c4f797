"""Reading prepared data: windows of tokens straight from the mapped shards."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from infmoe.data.manifest import Manifest, Split, SplitInfo
from infmoe.data.shards import MEND, check_shard, map_shard, sha256
from infmoe.data.tokenizer import TOKENIZER_FILE, TOKENIZER_FOLDER
from infmoe.errors import InfMoEError

# Hashing this much takes about a quarter of a second.
_VERIFY_BELOW_BYTES = 256 * 2**20


class TokenData:
    """A prepared data folder, opened with `TokenData.open`.

    A window is `length` consecutive tokens of one shard: windows do not overlap, and the tokens left over at
    a shard's end belong to none. Labels are the same tokens; the model shifts them.

    Attributes:
        folder: the folder.
        manifest: its manifest.
    """

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder = folder
        self.manifest = manifest
        self._shards = {
            split: [map_shard(folder / shard.file) for shard in info.shards] for split, info in manifest.splits.items()
        }

    def __reduce__(self) -> tuple[type["TokenData"], tuple[Path, Manifest]]:
        # Another process maps the files anew; a pickled map would carry all of the tokens.
        return TokenData, (self.folder, self.manifest)

    @classmethod
    def open(cls, folder: str | Path, *, verify: bool | None = None) -> "TokenData":
        """Opens a prepared folder and checks it against its manifest.

        File sizes and headers are always checked.

        Args:
            folder: the folder `prepare` wrote.
            verify: whether to check every SHA-256 too; by default when the shards are under 256 MiB in all.

        Raises:
            InfMoEError: the folder is no prepared data, or a file of it is missing, truncated or changed.
        """
        folder = Path(folder)
        manifest = Manifest.read(folder)
        if verify is None:
            verify = 2 * sum(info.tokens for info in manifest.splits.values()) < _VERIFY_BELOW_BYTES
        for info in manifest.splits.values():
            for shard in info.shards:
                check_shard(folder / shard.file, shard, verify=verify)
        tokenizer = folder / TOKENIZER_FOLDER / TOKENIZER_FILE
        if not tokenizer.is_file() or sha256(tokenizer) != manifest.tokenizer.sha256:
            raise InfMoEError(f"{tokenizer} is missing or was changed: {MEND}")
        return cls(folder, manifest)

    @property
    def vocab_size(self) -> int:
        """How many tokens the tokenizer knows; every token is below it."""
        return self.manifest.tokenizer.vocab_size

    @property
    def eot_id(self) -> int:
        """The id of the end-of-text token, which precedes every document."""
        return self.manifest.tokenizer.eot_id

    def info(self, split: Split) -> SplitInfo:
        """Documents, tokens, bytes of text and shards of a split."""
        return self.manifest.splits[split]

    def num_windows(
        self,
        split: Split,
        length: int,
        *,
        at_least: int = 1,
        remedy: str = "shorten the context, shrink the batch or prepare more text",
    ) -> int:
        """How many windows of `length` tokens a split holds.

        Args:
            split: "train" or "val".
            length: tokens per window, at least 1.
            at_least: how many windows the caller needs, for instance one batch.
            remedy: what helps the caller where there are fewer.

        Raises:
            InfMoEError: the split holds fewer than `at_least` windows.
        """
        count = sum(shard.size // length for shard in self._shards[split])
        if count < at_least:
            tokens = self.info(split).tokens
            raise InfMoEError(
                f"the {split} split of {self.folder} has {tokens} tokens, so {count} windows of {length}, "
                f"and {at_least} are needed: {remedy}"
            )
        return count

    def window(self, split: Split, index: int, length: int) -> NDArray[np.int64]:
        """Window `index` of a split: tokens of shape (length,), int64.

        Raises:
            IndexError: `index` is not in [0, num_windows(split, length)).
        """
        place = index
        for shard in self._shards[split]:
            count = shard.size // length
            if 0 <= place < count:
                return shard[place * length : (place + 1) * length].astype(np.int64)
            place -= count
        raise IndexError(f"window {index} of {self.num_windows(split, length, at_least=0)}")

    def windows(self, split: Split, indices: NDArray[np.int64], length: int) -> NDArray[np.int64]:
        """The windows `indices`, shape (n,), of a split: tokens of shape (n, length), int64.

        Raises:
            IndexError: one of `indices` is not in [0, num_windows(split, length)).
        """
        return np.stack([self.window(split, int(index), length) for index in indices])
