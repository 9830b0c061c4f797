"""Checkpoints are whole, verified and free of code."""

import errno
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from infmoe import checkpoint as ckpt
from infmoe.errors import InfMoEError


def fill(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "infmoe"}')
    save_file({"w": torch.arange(100.0)}, folder / "model.safetensors")
    (folder / ckpt.TRAINER_STATE).write_text('{"step": 1}')


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run with checkpoints at steps 1, 2 and 10."""
    for step in (1, 2, 10):
        ckpt.write_checkpoint(tmp_path, step, fill)
    return tmp_path


def flip_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def entries(run_dir: Path) -> list[str]:
    return sorted(p.name for p in (run_dir / ckpt.FOLDER).iterdir())


def test_newest_is_found_by_number(run_dir):
    assert ckpt.resolve_checkpoint(run_dir).name == "step-000010"
    assert ckpt.resolve_checkpoint(run_dir / ckpt.FOLDER / "step-000002").name == "step-000002"


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", ckpt.TRAINER_STATE])
def test_every_flipped_bit_is_found(run_dir, name):
    damaged = run_dir / ckpt.FOLDER / "step-000010"
    flip_bit(damaged / name)
    with pytest.raises(InfMoEError, match=rf"{name} is damaged"):
        ckpt.resolve_checkpoint(damaged)
    lines: list[str] = []
    assert ckpt.resolve_checkpoint(run_dir, lines.append).name == "step-000002"
    (line,) = lines
    assert line.startswith("skipping step-000010")
    assert name in line


def test_missing_files_are_found(run_dir):
    newest = run_dir / ckpt.FOLDER / "step-000010"
    (newest / "model.safetensors").unlink()
    with pytest.raises(InfMoEError, match=r"model\.safetensors is missing"):
        ckpt.verify(newest)
    (newest / ckpt.MANIFEST).unlink()
    with pytest.raises(InfMoEError, match=r"no readable manifest\.json"):
        ckpt.resolve_checkpoint(newest)


def test_nothing_that_verifies(run_dir):
    for folder in ckpt.checkpoints(run_dir):
        flip_bit(folder / "model.safetensors")
    with pytest.raises(InfMoEError, match="no checkpoint that verifies"):
        ckpt.resolve_checkpoint(run_dir, lambda _: None)


def test_a_half_written_checkpoint_is_never_seen(run_dir):
    leftover = run_dir / ckpt.FOLDER / ".tmp-step-000020"
    leftover.mkdir()
    fill(leftover)
    assert ckpt.resolve_checkpoint(run_dir).name == "step-000010"
    ckpt.prune(run_dir, 10, keep_last=2)
    assert entries(run_dir) == ["step-000002", "step-000010"]


def test_pruning_never_counts_a_damaged_newer_one(run_dir):
    flip_bit(run_dir / ckpt.FOLDER / "step-000010" / "model.safetensors")
    ckpt.write_checkpoint(run_dir, 4, fill)  # what a run writes that resumed at step 2
    ckpt.prune(run_dir, 4, keep_last=1)
    assert entries(run_dir) == ["step-000004", "step-000010"]
    assert ckpt.resolve_checkpoint(run_dir, lambda _: None).name == "step-000004"


def test_a_full_disk_leaves_the_last_good_one(run_dir):
    def fill_disk(folder: Path) -> None:
        fill(folder)
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(InfMoEError, match=r"checkpoint of step 20 .*: No space left on device; make room"):
        ckpt.write_checkpoint(run_dir, 20, fill_disk)
    assert entries(run_dir) == ["step-000001", "step-000002", "step-000010"]
    assert ckpt.resolve_checkpoint(run_dir).name == "step-000010"


def test_safetensors_own_error_is_one_line_too(run_dir):
    def write_nowhere(folder: Path) -> None:
        save_file({"w": torch.zeros(1)}, folder / "absent" / "model.safetensors")

    with pytest.raises(InfMoEError, match="No such file") as caught:
        ckpt.write_checkpoint(run_dir, 20, write_nowhere)
    assert "\n" not in str(caught.value)


def test_a_damaged_checkpoint_is_replaced(run_dir):
    flip_bit(run_dir / ckpt.FOLDER / "step-000010" / "model.safetensors")
    assert ckpt.write_checkpoint(run_dir, 10, fill).name == "step-000010"
    ckpt.verify(run_dir / ckpt.FOLDER / "step-000010")
    assert entries(run_dir) == ["step-000001", "step-000002", "step-000010"]


def test_plain_model_folder(tmp_path):
    fill(tmp_path)
    (tmp_path / ckpt.TRAINER_STATE).unlink()
    assert ckpt.resolve_checkpoint(tmp_path) == tmp_path
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(InfMoEError, match=r"holds no \*\.safetensors"):
        ckpt.resolve_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (json.dumps({"model_type": "gpt2"}), "holds a 'gpt2' model: give one of model_type 'infmoe'"),
        ("{}", "no readable config.json"),
        ("[1]", "no readable config.json"),
        ("{", "no readable config.json"),
    ],
)
def test_other_architectures_are_refused(tmp_path, config, message):
    fill(tmp_path)
    (tmp_path / ckpt.TRAINER_STATE).unlink()
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(InfMoEError, match=message):
        ckpt.resolve_checkpoint(tmp_path)


def test_no_folder(tmp_path):
    with pytest.raises(InfMoEError, match="is no folder"):
        ckpt.resolve_checkpoint(tmp_path / "absent")
    with pytest.raises(InfMoEError, match=r"no readable config\.json"):
        ckpt.resolve_checkpoint(tmp_path)


def test_a_file_that_the_manifest_does_not_list_is_refused(run_dir):
    newest = run_dir / ckpt.FOLDER / "step-000010"
    (newest / "adapter_config.json").write_text("{}")
    with pytest.raises(InfMoEError, match=r"adapter_config\.json is not in the checkpoint's manifest"):
        ckpt.resolve_checkpoint(newest)


def test_a_manifest_without_a_model_is_refused(run_dir):
    newest = run_dir / ckpt.FOLDER / "step-000010"
    (newest / ckpt.MANIFEST).write_text('{"files": {}}')
    with pytest.raises(InfMoEError, match="lists no model"):
        ckpt.verify(newest)
