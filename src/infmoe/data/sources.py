"""Where documents come from: Python's standard library, local files, the Hub, or memory.

A source can be read again and again, gives its documents one at a time in a fixed order, and describes
itself: equal descriptions mean equal documents.
"""

import glob
import hashlib
import json
import platform
import sysconfig
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any, Protocol

from infmoe.errors import InfMoEError

_NOT_LIBRARY = {"test", "tests", "idle_test", "site-packages", "dist-packages"}
_INSTALL = "pip install 'infmoe[data]'"
_JSON_LINES = (".jsonl", ".ndjson")
_RECORDS = (*_JSON_LINES, ".parquet")


class Source(Protocol):
    """A corpus that `prepare` can read."""

    def describe(self) -> dict[str, Any]:
        """What the manifest says of this source, as JSON values; equal for equal documents only."""

    def documents(self) -> Iterator[str]:
        """Reads the documents from the start, in a fixed order."""


@dataclass(frozen=True)
class MemorySource:
    """Documents that are already in memory."""

    texts: tuple[str, ...]

    def describe(self) -> dict[str, Any]:
        """See `Source.describe`."""
        digest = hashlib.sha256()
        for text in self.texts:
            digest.update(f"{len(text)}:{text}".encode(errors="surrogatepass"))
        return {"kind": "memory", "documents": len(self.texts), "sha256": digest.hexdigest()}

    def documents(self) -> Iterator[str]:
        """See `Source.documents`."""
        return iter(self.texts)


@dataclass(frozen=True)
class StdlibSource:
    """The source code of Python's standard library, one document per module, without its tests."""

    def _files(self) -> list[Path]:
        root = Path(sysconfig.get_paths()["stdlib"])
        found = sorted(root.rglob("*.py"))
        return [path for path in found if not _NOT_LIBRARY.intersection(path.relative_to(root).parts[:-1])]

    def describe(self) -> dict[str, Any]:
        """See `Source.describe`."""
        return {"kind": "stdlib", "python": platform.python_version(), **_digest(self._files())}

    def documents(self) -> Iterator[str]:
        """See `Source.documents`."""
        for path in self._files():
            yield _decode(path.read_bytes(), path)


@dataclass(frozen=True)
class FileSource:
    """Local files: `.jsonl` and `.parquet` hold a document per record, any other file is UTF-8 text.

    Args:
        patterns: files, folders (read recursively, but for hidden files) and glob patterns (`**` recurses).
            Within a pattern files are read in sorted order.
        text_field: the field or column that holds a record's text. Records whose text is null are skipped.
        document_bytes: a text file longer than this is read as several documents, cut at line ends, so that
            memory stays bounded and one large file can be split into train and val.
    """

    patterns: tuple[str, ...]
    text_field: str = "text"
    document_bytes: int = 16 * 2**20

    def _files(self) -> list[Path]:
        # dict, not set: it drops repeats and keeps the order
        return list(dict.fromkeys(path for pattern in self.patterns for path in _match(pattern)))

    def describe(self) -> dict[str, Any]:
        """See `Source.describe`.

        Raises:
            InfMoEError: a pattern matches no file, or a file cannot be read.
        """
        settings = {"text_field": self.text_field, "document_bytes": self.document_bytes}
        return {"kind": "files", "patterns": list(self.patterns), **settings, **_digest(self._files())}

    def documents(self) -> Iterator[str]:
        """See `Source.documents`.

        Raises:
            InfMoEError: a file cannot be read, is no UTF-8 text, or holds a record without text.
        """
        for path in self._files():
            if path.suffix in _JSON_LINES:
                yield from _jsonl(path, self.text_field)
            elif path.suffix == ".parquet":
                yield from _parquet(path, self.text_field)
            else:
                yield from _text(path, self.document_bytes)


@dataclass(frozen=True)
class HubSource:
    """A dataset of the Hugging Face Hub, streamed with `datasets`.

    Args:
        name: the dataset, e.g. "HuggingFaceFW/fineweb-edu"; or a local folder that `datasets` can load.
        subset: which of its configurations; None for the default one.
        split: which of its splits.
        text_field: the column that holds a record's text. Records whose text is null are skipped.
        max_documents: stop after so many records; None for all.
    """

    name: str
    subset: str | None = None
    split: str = "train"
    text_field: str = "text"
    max_documents: int | None = None

    def describe(self) -> dict[str, Any]:
        """See `Source.describe`; two are equal though the dataset was changed on the Hub in between."""
        return {"kind": "hub", **vars(self)}

    def documents(self) -> Iterator[str]:
        """See `Source.documents`.

        Raises:
            InfMoEError: `datasets` is not installed, or the dataset cannot be loaded or read, or has no such column.
        """
        try:
            import datasets
        except ImportError as error:
            raise InfMoEError(f"reading from the Hub needs the `datasets` package: {_INSTALL}") from error
        try:
            records = iter(datasets.load_dataset(self.name, name=self.subset, split=self.split, streaming=True))
        except Exception as error:  # its own, the Hub's and the network's have no class in common
            raise InfMoEError(
                f"cannot load {self.name!r} from the Hub; check name, subset and split: {_reason(error)}"
            ) from error
        for number in count() if self.max_documents is None else range(self.max_documents):
            try:
                record = next(records)
            except StopIteration:
                return
            except Exception as error:  # those of every file format too
                raise InfMoEError(
                    f"cannot read {self.name!r} from the Hub, record {number}; try again, or take fewer documents or "
                    f"another dataset: {_reason(error)}"
                ) from error
            yield _field(record, self.text_field, f"{self.name} record {number}")


def parse_source(
    text: str | Sequence[str],
    *,
    subset: str | None = None,
    split: str | None = None,
    text_field: str | None = None,
    max_documents: int | None = None,
) -> Source:
    """The source that a command line names.

    Args:
        text: "stdlib", "hub:NAME", or one or more paths, folders and glob patterns.
        subset: the configuration of a Hub dataset.
        split: the split of a Hub dataset; None: "train".
        text_field: the field that holds the text of a record, for `.jsonl`, `.parquet` and the Hub; None: "text".
        max_documents: stop after so many records of a Hub dataset.

    Raises:
        InfMoEError: `text` names no source, or matches no file, or an option that does nothing for it.
    """
    names = (text,) if isinstance(text, str) else tuple(text)
    if len(names) == 1 and names[0].startswith("hub:"):
        return HubSource(
            names[0].removeprefix("hub:"),
            subset=subset,
            split="train" if split is None else split,
            text_field="text" if text_field is None else text_field,
            max_documents=max_documents,
        )
    for option, value in (("subset", subset), ("split", split), ("max documents", max_documents)):
        if value is not None:
            raise InfMoEError(f"{option} {value!r} is for a dataset of the Hub, 'hub:NAME': leave it out")
    files = [] if names == ("stdlib",) else [path for name in names for path in _match(name)]
    if text_field is not None and not any(path.suffix in _RECORDS for path in files):
        raise InfMoEError(f"text field {text_field!r} is for {', '.join(_RECORDS)} and the Hub: leave it out")
    if names == ("stdlib",):
        return StdlibSource()
    return FileSource(names, text_field="text" if text_field is None else text_field)


def _match(pattern: str) -> list[Path]:
    """The files that a path, folder or glob pattern stands for, sorted; never empty."""
    path = Path(pattern)
    if path.is_dir():
        below = sorted(path.rglob("*"))
        shown = (p for p in below if not any(part.startswith(".") for part in p.relative_to(path).parts))
        files = [p for p in shown if p.is_file()]
        hint = "the folder holds no files; put text in it or name another"
    elif glob.has_magic(pattern) and not path.exists():
        files = sorted(p for p in map(Path, glob.glob(pattern, recursive=True)) if p.is_file())
        hint = "no files match this pattern; check it"
    else:
        files = [path] if path.is_file() else []
        hint = "unknown source: give 'stdlib', 'hub:NAME', or a file, folder or pattern that is there"
        if pattern == "stdlib" or pattern.startswith("hub:"):
            hint = "stands alone: name no other source beside it"
    if not files:
        raise InfMoEError(f"{pattern!r}: {hint}")
    return files


def _reason(error: Exception) -> str:
    """The first line of what an error says."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _digest(files: Sequence[Path]) -> dict[str, Any]:
    """Count, bytes and one SHA-256 of the contents of `files`, in order."""
    total, digest = 0, hashlib.sha256()
    for path in files:
        try:
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
                total += file.tell()
        except OSError as error:
            raise InfMoEError(f"cannot read {path} ({error.strerror}): mend or leave out the file") from error
    return {"files": len(files), "bytes": total, "sha256": digest.hexdigest()}


def _decode(raw: bytes, path: Path, offset: int = 0) -> str:
    """`raw`, which stands at byte `offset` of `path`, as text."""
    nul = raw.find(b"\0")
    if nul >= 0:
        raise InfMoEError(
            f"{path} is binary (NUL at byte {offset + nul}): leave it out, or name a pattern like '*.txt'"
        )
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InfMoEError(f"{path} is not UTF-8 at byte {offset + error.start}: convert it or leave it out") from error


def _text(path: Path, document_bytes: int) -> Iterator[str]:
    with path.open("rb") as file:
        offset = 0
        while raw := file.read(document_bytes):
            raw += file.readline()
            yield _decode(raw, path, offset)
            offset += len(raw)


def _jsonl(path: Path, field: str) -> Iterator[str]:
    with path.open("rb") as file:
        offset = 0
        for number, line in enumerate(file, start=1):
            text = _decode(line, path, offset)
            offset += len(line)
            if not text.strip():
                continue
            try:
                record = json.loads(text)
            except json.JSONDecodeError as error:
                raise InfMoEError(
                    f"{path}:{number}: bad JSON, {error.msg} at column {error.colno}: mend the line"
                ) from error
            yield _field(record, field, f"{path}:{number}")


def _parquet(path: Path, field: str) -> Iterator[str]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise InfMoEError(f"reading {path} needs the `pyarrow` package: {_INSTALL}") from error
    try:
        with parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if field not in names:
                raise InfMoEError(f"{path} has no column {field!r}: set the text field to one of {', '.join(names)}")
            for batch in file.iter_batches(batch_size=256, columns=[field]):
                for row in batch.to_pylist():
                    yield _field(row, field, str(path))
    except pyarrow.ArrowInvalid as error:
        raise InfMoEError(f"{path} is not a Parquet file that can be read: replace it or leave it out") from error


def _field(record: object, field: str, where: str) -> str:
    """The text of a record; empty where it is null."""
    if not isinstance(record, Mapping):
        raise InfMoEError(f"{where}: not a JSON object: give records like {{{field!r}: ...}}")
    if field not in record:
        raise InfMoEError(f"{where}: no field {field!r}: set the text field to one of {', '.join(record)}")
    text = record[field]
    if text is None:
        return ""
    if not isinstance(text, str):
        raise InfMoEError(f"{where}: field {field!r} holds {type(text).__name__}, not text: set another text field")
    return text
