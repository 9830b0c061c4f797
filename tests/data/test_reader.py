"""Reading prepared data back, and noticing when it is not what was prepared."""

import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from infmoe.data import TokenData
from infmoe.errors import InfMoEError


def shard(data: TokenData, name: str) -> np.ndarray:
    return np.fromfile(data.folder / name, dtype="<u2", offset=1024)


def flip_last_byte(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)


def test_windows_follow_one_another_within_a_shard(data: TokenData) -> None:
    windows = [data.window("train", index, 64) for index in range(500 // 64)]
    np.testing.assert_array_equal(np.concatenate(windows), shard(data, "train-000000.bin")[: 500 // 64 * 64])


def test_windows_go_on_in_the_next_shard(data: TokenData) -> None:
    np.testing.assert_array_equal(data.window("train", 500 // 64, 64), shard(data, "train-000001.bin")[:64])


def test_every_window_has_its_length(data: TokenData) -> None:
    count = data.num_windows("train", 64)
    assert count == sum(info.tokens // 64 for info in data.info("train").shards)
    assert {data.window("train", index, 64).shape for index in range(count)} == {(64,)}


def test_several_windows_at_once(data: TokenData) -> None:
    batch = data.windows("val", np.array([2, 0]), 32)
    assert batch.dtype == np.int64
    np.testing.assert_array_equal(batch, [data.window("val", 2, 32), data.window("val", 0, 32)])


@pytest.mark.parametrize("past", [-1, 0])
def test_window_out_of_range(data: TokenData, past: int) -> None:
    index = -1 if past else data.num_windows("train", 64)
    with pytest.raises(IndexError):
        data.window("train", index, 64)


def test_fewer_tokens_than_one_window(data: TokenData) -> None:
    with pytest.raises(InfMoEError, match=r"0 windows of 5000, and 1 are needed: shorten the context"):
        data.num_windows("val", 5000)


def test_fewer_windows_than_one_batch(data: TokenData) -> None:
    count = data.num_windows("val", 64)
    with pytest.raises(InfMoEError, match=f"{count} windows of 64, and {count + 1} are needed.*shrink the batch"):
        data.num_windows("val", 64, at_least=count + 1)


def test_tokens_are_mapped_and_not_pickled(data: TokenData) -> None:
    packed = pickle.dumps(data)
    shutil.rmtree(data.folder)
    with pytest.raises(FileNotFoundError):
        pickle.loads(packed)


def test_unpickled_data_reads_the_same(data: TokenData) -> None:
    copy = pickle.loads(pickle.dumps(data))
    np.testing.assert_array_equal(copy.window("train", 5, 64), data.window("train", 5, 64))


def test_vocab_size_bounds_the_tokens(data: TokenData) -> None:
    assert shard(data, "train-000000.bin").max() < data.vocab_size == 300


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-2])


def _lengthen(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0\0")


def _other_magic(path: Path) -> None:
    path.write_bytes(b"\1" + path.read_bytes()[1:])


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("train-000001.bin", _truncate, r"train-000001\.bin is truncated"),
        ("train-000001.bin", _lengthen, r"train-000001\.bin is too long"),
        ("val-000000.bin", _other_magic, r"val-000000\.bin does not start with the header"),
        ("val-000000.bin", Path.unlink, r"cannot read .*val-000000\.bin"),
        ("tokenizer/tokenizer.json", flip_last_byte, r"tokenizer\.json is missing or was changed"),
        ("tokenizer/tokenizer.json", Path.unlink, r"tokenizer\.json is missing or was changed"),
        ("manifest.json", Path.unlink, "no prepared data in"),
        (
            "manifest.json",
            lambda path: path.write_text("{}"),
            r"manifest\.json is not a manifest of this format",
        ),
        ("manifest.json", _truncate, r"manifest\.json is not a manifest of this format"),
    ],
)
def test_damage_is_noticed_without_hashing(
    data: TokenData, name: str, damage: Callable[[Path], None], message: str
) -> None:
    damage(data.folder / name)
    with pytest.raises(InfMoEError, match=message):
        TokenData.open(data.folder, verify=False)


def test_a_flipped_bit_is_noticed_in_small_data(data: TokenData) -> None:
    flip_last_byte(data.folder / "train-000000.bin")
    with pytest.raises(InfMoEError, match=r"train-000000\.bin was changed: its SHA-256"):
        TokenData.open(data.folder)


def test_large_data_is_hashed_on_demand_only(data: TokenData, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("infmoe.data.reader._VERIFY_BELOW_BYTES", 1000)
    flip_last_byte(data.folder / "train-000000.bin")
    TokenData.open(data.folder)
    with pytest.raises(InfMoEError, match="SHA-256"):
        TokenData.open(data.folder, verify=True)


def test_data_of_another_format(data: TokenData) -> None:
    path = data.folder / "manifest.json"
    path.write_text(path.read_text().replace('"format": 1', '"format": 2'))
    with pytest.raises(InfMoEError, match=r"format: .*prepare the data again"):
        TokenData.open(data.folder)
