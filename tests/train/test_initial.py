"""Starting from a trained model's weights."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from infmoe.checkpoint import checkpoints, resolve_checkpoint
from infmoe.errors import InfMoEError
from infmoe.hf import InfMoEForCausalLM
from infmoe.hf.identity import fingerprint
from infmoe.train import run
from infmoe.train.session import Session


def weights(folder):
    return load_file(resolve_checkpoint(folder) / "model.safetensors")


@pytest.fixture(scope="module")
def trained(small, tmp_path_factory):
    """A run of another seed and other dials, whose weights the others start from."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    run(small("seed=5", "model.keep_ratio=0.5"), folder)
    return folder


def test_a_run_starts_from_the_weights_and_trains_on_them(small, trained, tmp_path, capsys):
    config = small(f"init={trained}", "model.keep_ratio=0.125", "model.num_samples=1")
    session = Session.start(config, tmp_path / "begun", resume=False)
    before = weights(trained)
    state = session.model.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in before.items())
    layer = session.model.transformer.h[0].mlp
    assert (layer.keep_ratio, layer.trained_keep_ratio, layer.num_samples) == (0.125, 0.125, 1)
    line = f"starting from the weights in {resolve_checkpoint(trained)}; the model changes: num_samples 2 -> 1, "
    assert line + "keep_ratio 0.5 -> 0.125, trained_keep_ratio 0.5 -> 0.125" in capsys.readouterr().err
    out = tmp_path / "run"
    assert run(config, out).exit_code == 0
    after = weights(out)
    assert after.keys() == before.keys()
    assert any(not torch.equal(after[name], before[name]) for name in before)
    said = json.loads((out / "run.json").read_text())["init"]
    assert said["checkpoint"] == str(resolve_checkpoint(trained))
    assert said["fingerprint"] == fingerprint(InfMoEForCausalLM.from_pretrained(resolve_checkpoint(trained)))


def test_it_goes_on_without_what_it_started_from(small, trained, tmp_path):
    source, whole, cut = tmp_path / "source", tmp_path / "whole", tmp_path / "cut"
    shutil.copytree(trained, source)
    config = small(f"init={source}", "checkpoint.every=2", "checkpoint.keep_last=null")
    assert run(config, whole).exit_code == 0
    shutil.copytree(whole, cut)
    for later in checkpoints(cut)[1:]:
        shutil.rmtree(later)
    shutil.rmtree(source)
    elsewhere = Path("/elsewhere", *source.parts[-3:])  # moved with what lies around it
    moved = small(f"init={elsewhere}", "checkpoint.every=2", "checkpoint.keep_last=null")
    assert run(moved, cut, resume=True).exit_code == 0
    a, b = weights(whole), weights(cut)
    assert all(torch.equal(a[name], b[name]) for name in a)
    records = [json.loads((out / "run.json").read_text())["init"] for out in (whole, cut)]
    assert records[0] == records[1]
    namesake = small("init=/elsewhere/source")  # a checkpoint of another run may have the same name
    for other in (small(), small(f"init={trained}"), namesake):
        with pytest.raises(InfMoEError, match=r"started with other values of .*init"):
            run(other, cut, resume=True)


def test_before_its_first_checkpoint_it_starts_from_what_is_there_then(small, trained, tmp_path):
    source, out = tmp_path / "source", tmp_path / "out"
    shutil.copytree(trained, source)
    config = small(f"init={source}")
    Session.start(config, out, resume=False)  # and is killed
    first = json.loads((out / "run.json").read_text())["init"]
    shutil.rmtree(source)
    assert run(small("seed=6", "model.keep_ratio=0.5"), source).exit_code == 0
    session = Session.start(config, out, resume=True)
    said = json.loads((out / "run.json").read_text())["init"]
    assert said == session.record["init"]
    assert said["fingerprint"] == fingerprint(InfMoEForCausalLM.from_pretrained(resolve_checkpoint(source)))
    assert said["fingerprint"] != first["fingerprint"]


def test_two_processes_start_from_the_same_weights(small, trained, two_processes_train_as_one):
    config = small(f"init={trained}", "micro_batch_size=4")
    two_processes_train_as_one(config)


@pytest.mark.parametrize(
    ("variant", "settings", "named"),
    [
        ("infinity", ("model.z_dim=4", "model.wz_weight_decay=0.0"), "--set model.z_dim=8$"),
        ("infinity", ("model.num_attention_heads=4",), "--set model.num_attention_heads=2$"),
        ("infinity", ("model.num_hidden_layers=1", "model.num_samples=1"), "--set model.num_hidden_layers=2$"),
        ("moe", (), "take a recipe of the variant 'infinity'"),
        ("infinity", ("init=nowhere",), "nowhere is no folder"),
    ],
)
def test_what_does_not_fit_is_named_before_anything_is_written(small, trained, tmp_path, variant, settings, named):
    config = small(f"init={trained}", *settings, variant=variant)
    with pytest.raises(InfMoEError, match=named):
        run(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_an_untied_output_is_not_written_over_the_embeddings(small, trained, tmp_path):
    untied = tmp_path / "untied"
    assert run(small("model.tie_word_embeddings=false"), untied).exit_code == 0
    with pytest.raises(InfMoEError, match=r"--set model\.tie_word_embeddings=false$"):
        run(small(f"init={untied}"), tmp_path / "run")
    config = small(f"init={trained}", "model.tie_word_embeddings=false")  # one becomes two
    state = Session.start(config, tmp_path / "run", resume=False).model.state_dict()
    assert torch.equal(state["lm_head.weight"], state["transformer.wte.weight"])


def test_another_tokenizer_is_refused_and_so_is_none(small, trained, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(resolve_checkpoint(trained), source)
    (source / "manifest.json").unlink()
    (source / "trainer_state.json").unlink()
    tokenizer = json.loads((source / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    a, b = [token for token in vocabulary if len(token) == 1][:2]
    vocabulary[a], vocabulary[b] = vocabulary[b], vocabulary[a]
    (source / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(InfMoEError, match="made with another tokenizer than the model's: prepare it with"):
        run(small(f"init={source}"), tmp_path / "run")
    (source / "tokenizer.json").unlink()
    with pytest.raises(InfMoEError, match=r"holds no tokenizer\.json: copy the one it was trained with there"):
        run(small(f"init={source}"), tmp_path / "run")
