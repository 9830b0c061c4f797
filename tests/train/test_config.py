"""The run's configuration and its overrides."""

import json
import subprocess
import sys

import pytest

from infmoe.errors import InfMoEError
from infmoe.recipes import recipe
from infmoe.train.config import apply_overrides, differing_keys, load_config

TINY = recipe("tiny/dense")


@pytest.mark.parametrize(
    ("override", "read", "value"),
    [
        ("optim.lr=1e-3", lambda c: c.optim.lr, 1e-3),
        ("steps=7", lambda c: c.steps, 7),
        ("optim.clip_norm=none", lambda c: c.optim.clip_norm, None),
        ("optim.betas=[0.8, 0.9]", lambda c: c.optim.betas, (0.8, 0.9)),
        ("log.tensorboard=True", lambda c: c.log.tensorboard, True),
        ("precision=fp32", lambda c: c.precision, "fp32"),
        ("data.dir=some/folder=1", lambda c: c.data.dir, "some/folder=1"),
        ("model.hidden_act=relu", lambda c: c.model.get("hidden_act"), "relu"),
        ("model.initializer_range=0.03", lambda c: c.model.get("initializer_range"), 0.03),
        ("model.initializer_range=1/32", lambda c: c.model.get("initializer_range"), 0.03125),
        ("elastic.keep_ratio=[1/4, 0.1, 1/8]", lambda c: c.elastic.keep_ratio, (0.25, 0.1, 0.125)),
        ("data.dir=2026/10", lambda c: c.data.dir, "2026/10"),
        ("init=1/2", lambda c: c.init, "1/2"),
    ],
)
def test_override(override, read, value):
    assert read(TINY) != value
    assert read(apply_overrides(TINY, [override])) == value


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim.lrr=1", "unknown setting 'optim.lrr'; did you mean 'optim.lr'?"),
        ("lr=1", "unknown setting 'lr'; did you mean 'optim.lr'?"),
        ("optm.lr=1", "unknown setting 'optm.lr'; did you mean 'optim.lr'?"),
        ("model.hiden_size=8", "unknown config key 'hiden_size'; did you mean 'hidden_size'?"),
        ("model.z_dim=8", "ffn='dense' has no option 'z_dim': leave it out"),
        ("elastic.keep_ratio=1/4,1/8", "setting 'elastic.keep_ratio' takes a list in brackets"),
        ("elastic.keep_ratio=[1/0]", "setting 'elastic.keep_ratio' takes a list in brackets, elastic.keep_ratio=[...]"),
        ("elastic.keep_ratio=[1/2/4]", "setting 'elastic.keep_ratio' takes a list in brackets"),
        ("optim.lr", "cannot read 'optim.lr': write it as key=value, e.g. optim.lr=1e-3"),
        ("optim=3", "'optim' is a section: set one of its keys, e.g. optim.betas=..."),
        ("steps=0", "setting 'steps': input should be greater than or equal to 1, got 0"),
        ("steps=soon", "setting 'steps': input should be a valid integer"),
        ("precision=fp8", "setting 'precision': input should be 'bf16' or 'fp32', got 'fp8'"),
        ("data.window=129", "data.window=129 exceeds model.max_position_embeddings=128: lower it"),
        ("model.max_position_embeddings=null", "model.max_position_embeddings must be an integer"),
    ],
)
def test_override_refused(override, message):
    with pytest.raises(InfMoEError) as caught:
        apply_overrides(TINY, [override])
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_a_section_cannot_hide_an_unknown_key():
    with pytest.raises(InfMoEError, match=r"unknown setting 'eval\.evry'; did you mean 'eval\.every'"):
        load_config(TINY.to_dict() | {"eval": {"evry": 3}})


def test_overrides_leave_the_original_alone():
    apply_overrides(TINY, ["model.hidden_size=64", "optim.lr=1"])
    assert recipe("tiny/dense") == TINY


def test_json_round_trip():
    assert load_config(json.loads(json.dumps(TINY.to_dict()))) == TINY


@pytest.mark.parametrize(("micro", "processes", "expected"), [(32, 1, 1), (8, 1, 4), (8, 2, 2), (16, 2, 1)])
def test_accumulation_follows_from_the_batch(micro, processes, expected):
    assert apply_overrides(TINY, [f"micro_batch_size={micro}"]).accumulation(processes) == expected


@pytest.mark.parametrize(("tokens", "micro", "nearest"), [(4000, 32, 4096), (5000, 8, 5120), (10, 8, 1024)])
def test_indivisible_batch_names_the_nearest_that_fits(tokens, micro, nearest):
    config = apply_overrides(TINY, [f"batch_tokens={tokens}", f"micro_batch_size={micro}"])
    with pytest.raises(InfMoEError, match=f"take batch_tokens={nearest},"):
        config.accumulation(1)
    assert apply_overrides(config, [f"batch_tokens={nearest}"]).accumulation(1) >= 1


def test_only_settings_that_decide_the_weights_differ():
    reporting = ["name=x", "data.dir=elsewhere", "eval.every=7", "log.every=3", "checkpoint.keep_last=9"]
    assert differing_keys(TINY.to_dict(), apply_overrides(TINY, reporting).to_dict()) == []
    deciding = ["seed=1", "optim.lr=1", "steps=9", "data.window=64", "model.hidden_act=relu"]
    differing = differing_keys(TINY.to_dict(), apply_overrides(TINY, deciding).to_dict())
    assert differing == ["data.window", "model.hidden_act", "optim.lr", "seed", "steps"]


def test_configuration_and_recipes_import_no_torch():
    code = "import sys, infmoe.recipes, infmoe.train; print([m for m in sys.modules if m in sys.argv])"
    done = subprocess.run(
        [sys.executable, "-c", code, "torch", "transformers", "accelerate", "numpy"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "[]"
