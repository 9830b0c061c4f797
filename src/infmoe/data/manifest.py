"""`manifest.json`: what a prepared data folder holds and how it was made."""

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from infmoe.errors import InfMoEError

MANIFEST = "manifest.json"
Split = Literal["train", "val"]
SPLITS: tuple[Split, ...] = ("train", "val")


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Shard(_Record):
    """One shard: its file name in the folder, how many tokens it holds, and the SHA-256 of the whole file."""

    file: str
    tokens: int
    sha256: str


class SplitInfo(_Record):
    """One split: how many documents and tokens, from how many bytes of UTF-8 text, in which shards."""

    documents: int
    tokens: int
    text_bytes: int
    shards: tuple[Shard, ...]


class TokenizerInfo(_Record):
    """The tokenizer: its `tokenizer.json`'s SHA-256, its size, and the id that precedes every document."""

    sha256: str
    vocab_size: int
    eot_id: int


class Manifest(_Record):
    """The whole manifest.

    `settings` holds what was asked for (source, tokenizer, split, shard size): the same settings make
    byte-identical shards under the same `versions`.
    """

    format: Literal[1] = 1
    settings: dict[str, Any]
    tokenizer: TokenizerInfo
    splits: dict[Split, SplitInfo]
    versions: dict[str, str]

    def write(self, folder: Path) -> None:
        """Writes `manifest.json` into `folder`."""
        (folder / MANIFEST).write_text(self.model_dump_json(indent=2) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> "Manifest":
        """Reads the `manifest.json` of `folder`.

        Raises:
            InfMoEError: there is none, or it is not one of this format.
        """
        path = folder / MANIFEST
        try:
            return cls.model_validate_json(path.read_bytes())
        except OSError as error:
            raise InfMoEError(
                f"no prepared data in {folder} ({MANIFEST}: {error.strerror}): make it with `infmoe data`"
            ) from error
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"])) or "file"
            raise InfMoEError(
                f"{path} is not a manifest of this format ({where}: {first['msg']}): prepare the data again"
            ) from error
