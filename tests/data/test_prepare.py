"""Preparing data: what lands in the folder, when it lands there, and what stops it."""

import errno
import json
import os
import subprocess
import sys
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, models

from infmoe.data import (
    EOT,
    MemorySource,
    Progress,
    TokenData,
    TokenizerFile,
    TrainBPE,
    load_tokenizer,
    pipeline,
    prepare,
    shards,
)
from infmoe.errors import InfMoEError

BPE = TrainBPE(300)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def tokens(data: TokenData, split: str) -> list[int]:
    """All tokens of a split, read from the files by hand."""
    paths = sorted(data.folder.glob(f"{split}-*.bin"))
    return [int(token) for path in paths for token in np.fromfile(path, dtype="<u2", offset=1024)]


def documents(data: TokenData, split: str) -> list[str]:
    """The documents of a split, in order, from its tokens."""
    text = load_tokenizer(data.folder).decode(tokens(data, split))
    assert isinstance(text, str)
    return text.split(EOT)[1:]


def test_shards_have_the_layout_of_llm_c(data: TokenData) -> None:
    for split in ("train", "val"):
        paths = sorted(data.folder.glob(f"{split}-*.bin"))
        headers = [np.fromfile(path, dtype="<i4", count=256).tolist() for path in paths]
        sizes = [500] * (len(paths) - 1) + [(paths[-1].stat().st_size - 1024) // 2]
        assert headers == [[20240520, 1, size] + [0] * 253 for size in sizes]


def test_the_splits_give_every_document_back(data: TokenData, texts: tuple[str, ...]) -> None:
    train, val = documents(data, "train"), documents(data, "val")
    assert sorted(train + val) == sorted(texts)
    assert [text for text in texts if text in set(val)] == val


def test_the_end_of_text_token_precedes_each_document(data: TokenData, texts: tuple[str, ...]) -> None:
    ids = tokens(data, "train")
    assert ids[0] == data.eot_id
    assert ids[-1] != data.eot_id
    assert ids.count(data.eot_id) == data.info("train").documents


def test_manifest_tells_what_was_written(data: TokenData) -> None:
    manifest = json.loads((data.folder / "manifest.json").read_text())
    for split in ("train", "val"):
        texts = documents(data, split)
        info = manifest["splits"][split]
        assert info["documents"] == len(texts)
        assert info["text_bytes"] == sum(len(text.encode()) for text in texts)
        assert info["tokens"] == len(tokens(data, split)) == sum(shard["tokens"] for shard in info["shards"])
        assert [shard["file"] for shard in info["shards"]] == sorted(p.name for p in data.folder.glob(f"{split}-*"))


def test_same_corpus_and_settings_make_identical_folders(corpus: MemorySource, tmp_path: Path) -> None:
    first, second = (prepare(corpus, tmp_path / name, tokenizer=BPE, val_fraction=0.2) for name in "ab")
    assert contents(first.folder) == contents(second.folder)


def test_batching_does_not_change_the_tokens(
    corpus: MemorySource, data: TokenData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "_BATCH_CHARS", 100)
    monkeypatch.setattr(pipeline, "_PIECE_CHARS", 10)
    other = prepare(corpus, tmp_path / "other", tokenizer=BPE, val_fraction=0.2, shard_tokens=500)
    assert contents(other.folder) == contents(data.folder)


def test_added_documents_move_none(texts: tuple[str, ...], tmp_path: Path) -> None:
    few = prepare(MemorySource(texts[::2]), tmp_path / "few", tokenizer=BPE, val_fraction=0.3)
    many = prepare(MemorySource(texts), tmp_path / "many", tokenizer=BPE, val_fraction=0.3)
    assert set(documents(few, "train")) <= set(documents(many, "train"))
    assert set(documents(few, "val")) <= set(documents(many, "val"))


def test_the_split_has_the_fraction_asked_for() -> None:
    splits = [pipeline.split_of(str(number).encode(), 0.25) for number in range(4000)]
    # 1000 expected, standard deviation 27
    assert 870 < splits.count("val") < 1130


def test_text_of_a_special_token_stays_text(tmp_path: Path) -> None:
    source = MemorySource((f"say {EOT} aloud",) * 2)
    data = prepare(source, tmp_path / "data", tokenizer=BPE, val_fraction=0)
    assert tokens(data, "train").count(data.eot_id) == 2
    assert load_tokenizer(data.folder).decode(tokens(data, "train")) == f"{EOT}say {EOT} aloud" * 2


def test_empty_documents_are_left_out(texts: tuple[str, ...], tmp_path: Path) -> None:
    data = prepare(MemorySource(("", *texts[:3], "")), tmp_path / "data", tokenizer=BPE, val_fraction=0)
    assert data.info("train").documents == 3


def test_no_validation_split_when_none_is_asked_for(corpus: MemorySource, tmp_path: Path) -> None:
    data = prepare(corpus, tmp_path / "data", tokenizer=BPE, val_fraction=0)
    assert data.info("val").shards == ()


def test_model_max_length_is_stated(corpus: MemorySource, tmp_path: Path) -> None:
    data = prepare(corpus, tmp_path / "data", tokenizer=BPE, val_fraction=0.2, model_max_length=77)
    assert load_tokenizer(data.folder).model_max_length == 77


def test_names_do_for_source_and_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("some text to tell")
    data = prepare(str(tmp_path / "a.txt"), tmp_path / "data", tokenizer="bpe:270", val_fraction=0)
    assert documents(data, "train") == ["some text to tell"]


def test_progress_ends_at_the_whole(corpus: MemorySource, tmp_path: Path) -> None:
    told: list[Progress] = []
    data = prepare(corpus, tmp_path / "data", tokenizer=BPE, val_fraction=0.2, progress=told.append)
    train, val = data.info("train"), data.info("val")
    assert told[0] == Progress("tokenizer")
    assert told[-1] == Progress(
        "tokens",
        train.documents + val.documents,
        train.text_bytes + val.text_bytes,
        train.tokens + val.tokens,
    )


def test_memory_does_not_grow_with_the_corpus(data: TokenData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "_BATCH_CHARS", 20_000)
    tokenizer = TokenizerFile(data.folder / "tokenizer" / "tokenizer.json")

    class Endless:
        def __init__(self, count: int) -> None:
            self.count = count

        def describe(self) -> dict[str, Any]:
            return {"count": self.count}

        def documents(self) -> Iterator[str]:
            return (f"{number} " + "quick brown fox " * 300 for number in range(self.count))

    def peak(count: int) -> int:
        tracemalloc.start()
        prepare(Endless(count), tmp_path / str(count), tokenizer=tokenizer, val_fraction=0)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return peak

    peak(2)  # what is imported or cached on first use does not count
    assert peak(160) < 1.2 * peak(16)


def test_the_same_dataset_is_not_made_again(corpus: MemorySource, tmp_path: Path) -> None:
    first = prepare(corpus, tmp_path / "data", tokenizer=BPE, val_fraction=0.2)
    before = {path: path.stat().st_mtime_ns for path in first.folder.rglob("*")}
    told: list[Progress] = []
    again = prepare(corpus, tmp_path / "data", tokenizer=BPE, val_fraction=0.2, progress=told.append)
    assert told == [Progress("already there")]
    assert again.manifest == first.manifest
    assert {path: path.stat().st_mtime_ns for path in first.folder.rglob("*")} == before


def test_another_dataset_is_not_overwritten(corpus: MemorySource, tmp_path: Path) -> None:
    out = prepare(corpus, tmp_path / "data", tokenizer=BPE, val_fraction=0.2).folder
    before = contents(out)
    with pytest.raises(InfMoEError, match=r"holds another dataset \(tokenizer, val_fraction\)"):
        prepare(corpus, out, tokenizer=TrainBPE(310), val_fraction=0.3)
    assert contents(out) == before


def test_a_folder_of_other_things_is_not_touched(corpus: MemorySource, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(InfMoEError, match="is no prepared data"):
        prepare(corpus, tmp_path, tokenizer=BPE)
    assert contents(tmp_path) == {"thesis.txt": b"mine"}


def test_an_empty_folder_is_filled(corpus: MemorySource, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    data = prepare(corpus, tmp_path / "data", tokenizer=BPE, val_fraction=0.2)
    assert data.info("train").documents > 0


def test_a_folder_made_meanwhile_is_kept(corpus: MemorySource, tmp_path: Path) -> None:
    out = tmp_path / "data"

    def meddle(_: Progress) -> None:
        out.mkdir(exist_ok=True)
        (out / "theirs").write_text("theirs")

    with pytest.raises(InfMoEError, match="made by another process"):
        prepare(corpus, out, tokenizer=BPE, val_fraction=0.2, progress=meddle)
    assert contents(tmp_path) == {"data/theirs": b"theirs"}


def test_a_full_disk_leaves_nothing_behind(
    corpus: MemorySource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "old").write_text("old")

    def full(_: Path) -> str:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(shards, "sha256", full)
    with pytest.raises(InfMoEError, match="no space left"):
        prepare(corpus, tmp_path / "data", tokenizer=BPE, val_fraction=0.2)
    assert contents(tmp_path) == {"old": b"old"}


def test_an_interrupt_leaves_nothing_behind(corpus: MemorySource, tmp_path: Path) -> None:
    def interrupt(progress: Progress) -> None:
        if progress.stage == "tokens":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(corpus, tmp_path / "data", tokenizer=BPE, val_fraction=0.2, progress=interrupt)
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written(corpus: MemorySource, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InfMoEError, match="cannot write to"):
        prepare(corpus, tmp_path / "file" / "data", tokenizer=BPE)


@pytest.mark.parametrize("texts", [(), ("", "")])
def test_an_empty_corpus(texts: tuple[str, ...], tmp_path: Path) -> None:
    with pytest.raises(InfMoEError, match="the corpus is empty"):
        prepare(MemorySource(texts), tmp_path / "data", tokenizer=BPE)


def test_an_empty_validation_split(tmp_path: Path) -> None:
    with pytest.raises(InfMoEError, match=r"validation split is empty.*raise the val fraction"):
        prepare(MemorySource(("one",)), tmp_path / "data", tokenizer=BPE)


def test_an_empty_train_split(tmp_path: Path) -> None:
    with pytest.raises(InfMoEError, match=r"train split is empty.*lower the val fraction"):
        prepare(MemorySource(("one",)), tmp_path / "data", tokenizer=BPE, val_fraction=0.9999)


def test_half_a_surrogate_pair(tmp_path: Path) -> None:
    with pytest.raises(InfMoEError, match="document 1 has half of a surrogate pair at character 2"):
        prepare(MemorySource(("fine", "ab\ud800")), tmp_path / "data", tokenizer=BPE)


@pytest.mark.parametrize("fraction", [-0.1, 1.0, float("nan")])
def test_val_fraction_out_of_range(fraction: float, corpus: MemorySource, tmp_path: Path) -> None:
    with pytest.raises(InfMoEError, match="val fraction"):
        prepare(corpus, tmp_path / "data", tokenizer=BPE, val_fraction=fraction)


@pytest.mark.parametrize("count", [0, 2**31])
def test_shard_tokens_out_of_range(count: int, corpus: MemorySource, tmp_path: Path) -> None:
    with pytest.raises(InfMoEError, match="tokens per shard"):
        prepare(corpus, tmp_path / "data", tokenizer=BPE, shard_tokens=count)


@pytest.mark.parametrize(("highest", "fits"), [(65535, True), (65536, False)])
def test_a_vocabulary_that_uint16_can_or_cannot_hold(highest: int, fits: bool, tmp_path: Path) -> None:
    tokenizer = Tokenizer(models.BPE({"a": 0, EOT: highest}, []))
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    source, spec = MemorySource(("aaa",)), TokenizerFile(tmp_path / "tokenizer.json")
    if fits:
        data = prepare(source, tmp_path / "data", tokenizer=spec, val_fraction=0)
        assert tokens(data, "train") == [highest, 0, 0, 0]
    else:
        with pytest.raises(InfMoEError, match="65537 tokens, and uint16 shards hold 65536"):
            prepare(source, tmp_path / "data", tokenizer=spec, val_fraction=0)


def test_the_import_is_light() -> None:
    heavy = "{'torch', 'transformers', 'tokenizers', 'datasets', 'pyarrow'}"
    code = f"import sys, infmoe.data; print({heavy} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
