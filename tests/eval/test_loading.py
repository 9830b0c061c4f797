"""Opening checkpoints, and refusing what is damaged or does not fit."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from helpers import tiny_config, tiny_model
from safetensors.torch import load_file, save_file

from infmoe.data import MemorySource, TokenizerFile, TrainBPE, prepare
from infmoe.errors import InfMoEError
from infmoe.eval.loading import open_model


def test_a_run_a_checkpoint_and_a_saved_model_are_the_same(tiny_run, opened, tmp_path):
    opened.model.save_pretrained(tmp_path)
    for place in (tiny_run.run, tiny_run.checkpoint, tmp_path):
        again = open_model(place)
        assert not again.model.training
        for name, tensor in opened.model.state_dict().items():
            assert torch.equal(again.model.state_dict()[name], tensor), name
    assert opened.checkpoint == tiny_run.checkpoint


def test_the_data_of_a_run_is_found(tiny_run, opened, monkeypatch):
    assert opened.data().folder == tiny_run.data
    monkeypatch.chdir(tiny_run.checkpoint)
    assert open_model(".").data().folder == tiny_run.data


def test_a_damaged_newest_checkpoint_is_passed_over(tiny_run, tmp_path, capsys):
    run = shutil.copytree(tiny_run.run, tmp_path / "run")
    weights = run / "checkpoints" / "step-000004" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    assert open_model(run).checkpoint.name == "step-000002"
    out, err = capsys.readouterr()
    assert out == ""
    assert "skipping step-000004" in err


def flip(path):
    """Change the lowest bit in the middle of a file."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut(path):
    path.write_bytes(path.read_bytes()[:-100])


def drop_weight(path):
    tensors = load_file(path)
    del tensors["transformer.h.0.mlp.w1.weight"]
    save_file(tensors, path, metadata={"format": "pt"})


def garble(path):
    path.write_bytes(b"\xff" * 200)


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        ("model.safetensors", flip),
        ("model.safetensors", cut),
        ("config.json", cut),
        ("optimizer.safetensors", garble),
        ("manifest.json", garble),
    ],
)
def test_damage_to_a_checkpoint_is_found(tiny_run, tmp_path, file, damage):
    checkpoint = shutil.copytree(tiny_run.checkpoint, tmp_path / "checkpoint")
    damage(checkpoint / file)
    with pytest.raises(InfMoEError, match="take another checkpoint"):
        open_model(checkpoint)


@pytest.mark.parametrize("damage", [cut, drop_weight, garble])
def test_damage_to_a_saved_model_is_found(tmp_path, damage):
    tiny_model().save_pretrained(tmp_path)
    damage(tmp_path / "model.safetensors")
    with pytest.raises(InfMoEError, match=r"weights in .* do not fit|cannot load a model from") as caught:
        open_model(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": "wide"}, "hidden_size"),
        ({"hidden_size": 64}, "size mismatch|do not fit|cannot load"),
        ({"ffn": "dense", "z_dim": None}, "ffn='dense' has no option|do not fit"),
        ({"num_sample": 3}, "did you mean 'num_samples'"),
        ({"keep_ratio": 2.0}, "keep_ratio must lie in"),
        ({"model_type": "gpt2"}, "holds a 'gpt2' model"),
    ],
)
def test_a_config_of_another_model_is_refused(tmp_path, change, message):
    tiny_model().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(InfMoEError, match=message) as caught:
        open_model(tmp_path)
    assert "\n" not in str(caught.value)


def test_no_weights(tmp_path):
    tiny_config().save_pretrained(tmp_path)
    with pytest.raises(InfMoEError, match=r"no \*\.safetensors weights"):
        open_model(tmp_path)


def test_a_tokenizer_must_be_there_and_fit(tmp_path, tiny_run):
    tiny_model().save_pretrained(tmp_path)  # a vocabulary of 61
    with pytest.raises(InfMoEError, match=r"no tokenizer\.json"):
        open_model(tmp_path).tokenizer()
    shutil.copy(tiny_run.checkpoint / "tokenizer.json", tmp_path)
    with pytest.raises(InfMoEError, match="the tokenizer has 300 tokens, the model 61"):
        open_model(tmp_path).tokenizer()
    with pytest.raises(InfMoEError, match=r"the data in .* has 300 tokens, the model 61"):
        open_model(tmp_path).data(tiny_run.data)
    with pytest.raises(InfMoEError, match="give --data"):
        open_model(tmp_path).data()


def test_data_of_another_tokenizer_is_refused(opened, tiny_run, tmp_path):
    texts = MemorySource(("other words than those",) * 3 + ("and more of them",))
    other = prepare(texts, tmp_path / "other", tokenizer=TrainBPE(270), val_fraction=0)
    with pytest.raises(InfMoEError, match="another tokenizer than the model's"):
        opened.data(other.folder)
    # written otherwise, but the same tokens
    rewritten = tmp_path / "tokenizer.json"
    rewritten.write_text(json.dumps(json.loads((tiny_run.checkpoint / "tokenizer.json").read_text())))
    same = prepare(texts, tmp_path / "same", tokenizer=TokenizerFile(rewritten), val_fraction=0)
    shutil.copytree(same.folder, tmp_path / "copy")
    assert opened.data(tmp_path / "copy").vocab_size == 300


@pytest.mark.parametrize("text", ["", "{}", '{"config": {}}', "[1]"])
def test_a_broken_run_file(tiny_run, tmp_path, text):
    run = shutil.copytree(tiny_run.run, tmp_path / "run")
    (run / "run.json").write_text(text)
    with pytest.raises(InfMoEError, match=r"run\.json is not readable: give --data"):
        open_model(run).data()


@pytest.fixture
def says_data(tiny_run, tmp_path):
    """A copy of the run whose record names another folder."""

    def change(folder, **more):
        run = shutil.copytree(tiny_run.run, tmp_path / "run", dirs_exist_ok=True)
        record = json.loads((tiny_run.run / "run.json").read_text())
        record["config"]["data"]["dir"] = folder
        (run / "run.json").write_text(json.dumps(record | more))
        return run

    return change


def test_data_that_is_gone(says_data, tmp_path, monkeypatch):
    with pytest.raises(InfMoEError, match=f"{tmp_path / 'gone'}.* is gone: give --data"):
        open_model(says_data(str(tmp_path / "gone"))).data()
    with pytest.raises(InfMoEError, match="does not say what the run was trained on: give --data"):
        open_model(says_data(None)).data()
    monkeypatch.chdir(tmp_path)  # a run of before paths were stored whole
    with pytest.raises(InfMoEError, match=f"{tmp_path / 'gone'}.* is gone: give --data"):
        open_model(says_data("gone")).data()


def test_other_data_in_its_place(says_data, tiny_run, tmp_path, monkeypatch):
    shutil.copytree(tiny_run.data, tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    assert open_model(says_data("data")).data().folder == Path("data")
    assert open_model(says_data(str(tmp_path / "data"))).data().folder == Path("data")  # nothing of this machine
    manifest = tmp_path / "data" / "manifest.json"
    manifest.write_text(manifest.read_text() + "\n")
    for run in (says_data("data"), says_data(str(tmp_path / "data"))):
        with pytest.raises(InfMoEError, match=f"{tmp_path / 'data'} is not the data that the run was trained on: give"):
            open_model(run).data()
        assert open_model(run).data(tmp_path / "data").folder == tmp_path / "data"  # on purpose
    run = says_data("data", data_sha256=None)
    assert open_model(run).data().folder == Path("data")  # it did not say


def test_options_in_place_of_the_checkpoints(tmp_path):
    tiny_model("moe").save_pretrained(tmp_path)
    config = open_model(tmp_path, overrides=["rank_damping=0.25", "gate_norm = all"]).model.config
    assert (config.rank_damping, config.gate_norm) == (0.25, "all")
    assert open_model(tmp_path).model.config.rank_damping == 1.0
    tiny_model("switch", capacity_factor=1.0).save_pretrained(tmp_path / "switch")
    assert open_model(tmp_path / "switch", overrides=["capacity_factor=null"]).model.config.capacity_factor is None


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("rank_damping", "write it as name=value"),
        ("rank_dampin=0.5", "unknown option of ffn='moe' 'rank_dampin'; did you mean 'rank_damping'?"),
        ("mask=1", "known: balance_loss_weight, coactivation_prob, .*rank_damping"),
        ("vocab_size=9", "unknown option of ffn='moe' 'vocab_size'"),
        ("z_dim=9", "unknown option of ffn='moe' 'z_dim'"),
        ("num_experts_per_tok=3", "num_experts_per_tok is a dial: give --num-experts-per-tok"),
        ("rank_damping=2", "rank_damping must lie in"),
        ("rank_damping=much", "rank_damping"),
        ("num_experts=2", "do not fit|cannot load"),
    ],
)
def test_options_that_the_model_cannot_take(tmp_path, override, message):
    tiny_model("moe").save_pretrained(tmp_path)
    with pytest.raises(InfMoEError, match=message) as caught:
        open_model(tmp_path, overrides=[override])
    assert "\n" not in str(caught.value)
