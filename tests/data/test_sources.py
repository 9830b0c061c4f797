"""Where documents come from, and what is said when they cannot be had."""

import json
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from infmoe.data import FileSource, HubSource, MemorySource, Source, StdlibSource, parse_source
from infmoe.errors import InfMoEError


def read(*patterns: Path | str, **options: object) -> list[str]:
    return list(FileSource(tuple(map(str, patterns)), **options).documents())  # type: ignore[arg-type]


def test_stdlib_is_the_library_without_its_tests(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("b.py", "a.py", "pkg/c.py", "test/t.py", "pkg/tests/t.py", "idlelib/idle_test/t.py"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    (tmp_path / "site-packages").mkdir()
    (tmp_path / "site-packages" / "s.py").write_text("s")
    (tmp_path / "notes.txt").write_text("n")
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    assert list(StdlibSource().documents()) == ["a.py", "b.py", "pkg/c.py"]


def test_stdlib_holds_this_python() -> None:
    assert Path(json.__file__).read_text() in set(StdlibSource().documents())


def test_text_file_is_one_document(tmp_path: Path) -> None:
    (tmp_path / "a.md").write_bytes("# é\r\n\nx".encode())
    assert read(tmp_path / "a.md") == ["# é\r\n\nx"]


def test_long_text_file_is_cut_at_line_ends(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\ntwo\nthree\nfour\n")
    assert read(tmp_path / "a.txt", document_bytes=5) == ["one\ntwo\n", "three\n", "four\n"]


def test_folder_is_read_recursively_in_order_without_hidden_files(tmp_path: Path) -> None:
    for name in ("b.txt", "a/z.txt", ".hidden.txt", ".git/x.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    assert read(tmp_path) == ["a/z.txt", "b.txt"]


def test_glob_is_read_in_order(tmp_path: Path) -> None:
    for name in ("2.txt", "1.txt", "3.md"):
        (tmp_path / name).write_text(name)
    assert read(tmp_path / "*.txt") == ["1.txt", "2.txt"]


def test_file_named_twice_is_read_once(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    assert read(tmp_path / "a.txt", tmp_path) == ["a"]


def test_jsonl_field(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"body": "x"}\n\n{"body": null}\n{"body": "é"}')
    assert read(tmp_path / "a.jsonl", text_field="body") == ["x", "", "é"]


def test_parquet_column(tmp_path: Path) -> None:
    pq.write_table(pa.table({"id": [1, 2], "body": ["x", "y"]}), tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet", text_field="body") == ["x", "y"]


def test_hub_dataset_is_streamed_from_a_local_stand_in(tmp_path: Path) -> None:
    lines = [json.dumps({"text": f"document {number}"}) for number in range(5)]
    (tmp_path / "train.jsonl").write_text("\n".join(lines))
    source = HubSource(str(tmp_path), max_documents=2)
    assert list(source.documents()) == ["document 0", "document 1"]


def test_hub_dataset_that_is_a_script(tmp_path: Path) -> None:
    (tmp_path / "scripted").mkdir()
    (tmp_path / "scripted" / "scripted.py").write_text("import datasets\n")
    with pytest.raises(InfMoEError, match=r"cannot load .*scripted' from the Hub.*: Dataset scripts are no longer"):
        list(HubSource(str(tmp_path / "scripted")).documents())


def test_hub_record_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "train-0.jsonl").write_text('{"text": "x"}\n{"text": "y"}\n')
    (tmp_path / "train-1.jsonl").write_text('{"text": "z"\n')
    documents = HubSource(str(tmp_path)).documents()
    assert [next(documents), next(documents)] == ["x", "y"]
    with pytest.raises(InfMoEError, match=rf"cannot read '{tmp_path}' from the Hub, record 2; try again"):
        next(documents)


def test_records_beyond_the_last_wanted_are_not_read(tmp_path: Path) -> None:
    (tmp_path / "train-0.jsonl").write_text('{"text": "x"}\n')
    (tmp_path / "train-1.jsonl").write_text('{"text": "z"\n')
    assert list(HubSource(str(tmp_path), max_documents=1).documents()) == ["x"]


def test_hub_options_reach_load_dataset(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[object] = []

    def load_dataset(*args: object, **options: object) -> list[dict[str, str]]:
        calls.append((args, options))
        return [{"body": "x"}]

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    source = parse_source("hub:some/one", subset="small", split="test", text_field="body", max_documents=3)
    assert source == HubSource("some/one", "small", "test", "body", 3)
    assert list(source.documents()) == ["x"]
    assert calls == [(("some/one",), {"name": "small", "split": "test", "streaming": True})]


@pytest.mark.parametrize("source", ["stdlib", "a.txt"])
@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"subset": "small"}, "subset 'small' is for a dataset of the Hub"),
        ({"split": "train"}, "split 'train' is for a dataset of the Hub"),
        ({"max_documents": 3}, "max documents 3 is for a dataset of the Hub"),
        ({"text_field": "text"}, r"text field 'text' is for \.jsonl, \.ndjson, \.parquet and the Hub: leave it out"),
    ],
)
def test_options_that_would_do_nothing(
    source: str, option: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.txt").write_text("x")
    with pytest.raises(InfMoEError, match=message):
        parse_source(source, **option)


def test_a_text_field_is_for_records_among_other_files(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / "b.jsonl").write_text('{"body": "y"}')
    assert list(parse_source(str(tmp_path), text_field="body").documents()) == ["x", "y"]


@pytest.mark.parametrize("name", ["stdlib", "hub:a/b"])
def test_sources_that_stand_alone(name: str, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(InfMoEError, match=f"'{name}': stands alone: name no other source beside it"):
        parse_source([str(tmp_path / "a.txt"), name])


@pytest.mark.parametrize(
    ("change", "differs"),
    [
        pytest.param(lambda path: path.write_text("b"), True, id="content"),
        pytest.param(lambda path: path.touch(), False, id="time"),
    ],
)
def test_description_follows_the_content(tmp_path: Path, change: Callable[[Path], None], differs: bool) -> None:
    path = tmp_path / "a.txt"
    path.write_text("a")
    source = FileSource((str(path),))
    before = source.describe()
    change(path)
    assert (source.describe() != before) == differs


def test_description_tells_where_documents_end() -> None:
    assert MemorySource(("ab", "c")).describe() != MemorySource(("a", "bc")).describe()


@pytest.mark.parametrize(
    ("text", "source"),
    [
        ("stdlib", StdlibSource()),
        ("hub:a/b", HubSource("a/b")),
        (["x.txt", "*.md"], FileSource(("x.txt", "*.md"))),
    ],
)
def test_parse_source(text: str | list[str], source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("x.txt", "y.md"):
        Path(name).write_text(name)
    assert parse_source(text) == source


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("stdlab", "unknown source"),
        ("owner/name", "unknown source.*hub:NAME"),
        ("*.txt", "no files match"),
        ("empty", "holds no files"),
    ],
)
def test_source_that_is_not_there(pattern: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    with pytest.raises(InfMoEError, match=message):
        parse_source(pattern)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"text\0more", r"a\.txt is binary \(NUL at byte 4\)"),
        ("a.txt", b"caf\xe9 au lait", r"a\.txt is not UTF-8 at byte 3"),
        ("a.jsonl", b'{"text": "x"}\n{"text": "\xe9"}\n', r"a\.jsonl is not UTF-8 at byte 24"),
        ("a.jsonl", b'{"text": "x"}\n{"text": \n', r"a\.jsonl:2: bad JSON"),
        ("a.jsonl", b'{"text": "x"}\n{"body": "y"}\n', r"a\.jsonl:2: no field 'text'.*body"),
        ("a.jsonl", b'{"text": 5}\n', r"a\.jsonl:1: field 'text' holds int"),
        ("a.jsonl", b'["x"]\n', r"a\.jsonl:1: not a JSON object"),
        ("a.parquet", b"PAR1 not really", r"a\.parquet is not a Parquet file"),
    ],
)
def test_file_that_cannot_be_read(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InfMoEError, match=message):
        read(tmp_path / name)


def test_bad_byte_is_counted_from_the_start_of_the_file(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"line\nline\nli\xffe\n")
    with pytest.raises(InfMoEError, match="byte 12"):
        read(tmp_path / "a.txt", document_bytes=4)


def test_parquet_without_the_column(tmp_path: Path) -> None:
    pq.write_table(pa.table({"id": [1], "body": ["x"]}), tmp_path / "a.parquet")
    with pytest.raises(InfMoEError, match=r"no column 'text'.*id, body"):
        read(tmp_path / "a.parquet")


def test_hub_dataset_that_cannot_be_loaded(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text('{"text": "x"}')
    with pytest.raises(InfMoEError, match=r"check name, subset and split: .*nope"):
        list(HubSource(str(tmp_path), split="nope").documents())


@pytest.mark.parametrize(
    ("module", "source"), [("datasets", HubSource("a/b")), ("pyarrow", FileSource(("a.parquet",)))]
)
def test_missing_extra_names_the_install(
    module: str, source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.parquet").touch()
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(InfMoEError, match=r"pip install 'infmoe\[data\]'"):
        list(source.documents())
