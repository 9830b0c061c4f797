"""Profiles: what one belongs to, what its bounds say, and what becomes of a damaged one."""

import json
import math
import re

import pytest
import torch
from fake_profile import written
from helpers import tiny_model, tokens
from transformers import GenerationConfig

from infmoe.errors import InfMoEError
from infmoe.hf import identity
from infmoe.hf.bounds import upper_increase, upper_p95s, upper_quantile
from infmoe.hf.budget import Profile, profile_name
from infmoe.hf.identity import fingerprint
from infmoe.ops import dispatch

pytestmark = pytest.mark.usefixtures("on_a_cpu")
COMMAND = "infmoe frontier {0} --data DATA --dtype float32"  # in a folder {0}


@pytest.fixture
def saved(tmp_path):
    """A model in a folder of its own, with its profile; `saved(**how)` opens it."""
    folder = tmp_path / "mine"
    tiny_model("moe").save_pretrained(folder)

    def load(**how):
        return type(tiny_model()).from_pretrained(folder, **how).eval()

    written(folder, load())
    return load


def refusal(profile, model):
    with pytest.raises(InfMoEError) as caught:
        profile.check(model)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_other_weights_are_refused_and_the_command_measures_the_model_that_was_opened(saved, tmp_path):
    model = saved()
    mine, other = tmp_path / "mine", tmp_path / "other"
    profile = Profile.load(mine)
    profile.check(model)
    with torch.no_grad():
        model.transformer.h[1].mlp.router.weight += 1e-2
    line = refusal(profile, model)
    assert f"{mine / profile_name(1)}, measured on runs/mine, is of other weights" in line
    assert f"measure again with `infmoe frontier {mine} --data DATA --dtype float32`; " in line
    assert line.endswith("save the model to a folder of its own first, and measure that")
    model.save_pretrained(other)
    line = refusal(profile, type(model).from_pretrained(other))
    command = f"`infmoe frontier {other} --data DATA --dtype float32`"
    assert line.endswith(f"measure this model with {command}, and leave profile out")
    line = refusal(profile, saved(rank_damping=0.25, gate_norm="all"))
    assert line.endswith(
        f"measure it with `infmoe frontier {mine} --data DATA --dtype float32 --set gate_norm=all "
        f"--set rank_damping=0.25 --out {mine}/gate_norm-all-rank_damping-0.25`, and pass that folder as profile"
    )


def test_a_profile_of_another_machine_is_measured_again(saved, tmp_path):
    path = tmp_path / "elsewhere" / profile_name(1)
    path.parent.mkdir()
    values = json.loads((tmp_path / "mine" / profile_name(1)).read_text())
    values["machine"] |= {"cpu": "Abacus", "threads": 77}
    path.write_text(json.dumps(values))
    line = refusal(Profile.load(path), saved())
    assert re.search(r"otherwise than here \(cpu Abacus there, .* here, threads 77 there, 1 here\)", line)
    command = f"OMP_NUM_THREADS=1 infmoe frontier {tmp_path}/mine --data DATA --dtype float32 --out {path.parent}"
    assert line.endswith(f"measure again with `{command}`")


@pytest.mark.parametrize(
    ("name", "there", "match", "apart"),
    [
        (
            *("threads", 2, "set OMP_NUM_THREADS=2 or torch.set_num_threads(2)"),
            f"OMP_NUM_THREADS=1 {COMMAND} --out {{0}}/threads-1",
        ),
        ("dtype", "bfloat16", "open it in bfloat16", f"{COMMAND} --out {{0}}/dtype-float32"),
        ("backend", "eager", "set INFMOE_BACKEND=eager", f"{COMMAND} --out {{0}}/backend-auto"),
        ("device", "cuda", "open it on 'cuda'", f"{COMMAND} --out {{0}}/device-cpu"),
        ("attention", "eager", "open it with attn_implementation='eager'", None),
    ],
)
def test_a_model_that_runs_otherwise_is_told_what_to_match(saved, tmp_path, name, there, match, apart):
    path = tmp_path / "mine" / profile_name(1)
    values = json.loads(path.read_text())
    values["machine"][name] = there
    path.write_text(json.dumps(values))
    line = refusal(Profile.load(path), saved())
    assert f"({name} {there} there, " in line
    assert f"here): {match}" in line
    if apart is None:
        assert "infmoe frontier" not in line
    else:  # nothing overwrites the profile that is there
        remedy = f"or measure it with `{apart.format(path.parent)}`, and pass that folder as profile"
        assert line.endswith(remedy)
        (path.parent / "apart").mkdir()
        path = path.rename(path.parent / "apart" / path.name)
        assert refusal(Profile.load(path), saved()).endswith(remedy)  # beside it, not in it


def test_the_command_runs_the_backend_that_the_environment_asks_for(saved, tmp_path, monkeypatch):
    monkeypatch.setenv("INFMOE_BACKEND", "eager")
    mine = tmp_path / "mine"
    command = f"INFMOE_BACKEND=eager infmoe frontier {mine} --data DATA --dtype float32 --out {mine}/backend-eager"
    line = refusal(Profile.load(mine), saved())
    assert "(backend auto there, eager here): set INFMOE_BACKEND=auto; or" in line
    assert line.endswith(f"measure it with `{command}`, and pass that folder as profile")


def test_compiled_kernels_are_part_of_the_surroundings(saved, tmp_path, monkeypatch):
    monkeypatch.setattr(dispatch, "use_kernels", lambda: True)
    monkeypatch.setattr(identity, "_build", lambda: "avx9, build 1")
    written(tmp_path / "mine", saved())
    profile = Profile.load(tmp_path / "mine")
    profile.check(saved())
    monkeypatch.setattr(dispatch, "use_kernels", lambda: False)
    line = refusal(profile, saved())
    assert "(kernels avx9, build 1 there, None here): measure again with `infmoe frontier" in line


def test_the_kernels_of_a_gpu_are_tritons(monkeypatch):
    version = pytest.importorskip("triton").__version__
    for able, kernels in ((True, f"triton {version}"), (False, None)):
        monkeypatch.setattr(identity.triton, "available", lambda able=able: (able, ""))
        assert identity._kernels("cuda") == kernels


def test_a_missing_profile_names_the_command_of_the_model(saved, tmp_path):
    ids, places = tokens(1, 4), (None, tmp_path / "none")
    (tmp_path / "mine" / profile_name(1)).unlink()
    for profile, more in zip(places, ("", f" --out {tmp_path}/none"), strict=True):
        command = f"`infmoe frontier {tmp_path}/mine --data DATA --dtype float32{more}`"
        with pytest.raises(InfMoEError, match=f"no profile at .*: {re.escape(f'make it with {command}')}"):
            saved().generate(ids, max_new_tokens=2, latency_budget_ms=5.5, profile=profile)
    with pytest.raises(InfMoEError, match=re.escape(f"make it with `infmoe frontier {tmp_path}/mine --data DATA`")):
        Profile.load(tmp_path / "mine")


@pytest.mark.parametrize("there", [True, False])
def test_the_command_names_no_data_where_the_run_does(tmp_path, there):
    data, checkpoint = tmp_path / "data", tmp_path / "run" / "checkpoints" / "step-000001"
    data.mkdir()
    tiny_model("moe").save_pretrained(checkpoint)
    (tmp_path / "run" / "run.json").write_text(json.dumps({"config": {"data": {"dir": str(data)}}}))
    if not there:
        data.rmdir()
    option = "" if there else " --data DATA"
    with pytest.raises(InfMoEError, match=re.escape(f"`infmoe frontier {checkpoint}{option} --dtype float32`")):
        type(tiny_model()).from_pretrained(checkpoint).generate(tokens(1, 4), latency_budget_ms=5.5)
    with pytest.raises(InfMoEError, match=re.escape(f"`infmoe frontier {tmp_path / 'run'}{option}`")):
        Profile.load(tmp_path / "run")


@pytest.mark.parametrize(
    ("prompt", "given", "positions"),
    [
        (5, {"max_new_tokens": 8}, 13),
        (5, {"max_length": 13}, 13),
        (5, {}, 25),
        (5, {"max_new_tokens": 500}, 32),  # the context
        (13, {"generation_config": GenerationConfig(max_new_tokens=1)}, 14),
    ],
)
def test_a_latency_is_of_caches_about_as_long_as_those_that_were_timed(saved, tmp_path, prompt, given, positions):
    path = tmp_path / "mine" / profile_name(1)
    values = json.loads(path.read_text())
    for last in (-(-positions // 2), -(-positions // 2) - 1):
        path.write_text(json.dumps(values | {"cached_tokens": [2, last]}))
        profile = Profile.load(path)
        if 2 * last >= positions:
            profile.check_length(saved(), positions)
            continue
        with pytest.raises(InfMoEError) as caught:
            saved().generate(tokens(1, prompt), latency_budget_ms=5.5, profile=profile, **given)
        longer = f"--data DATA --prompt-length {positions - last + 2} --dtype float32"
        assert f"timed with 2 to {last} tokens cached, and says nothing of {positions}, which" in str(caught.value)
        assert str(caught.value).endswith(f"measure longer prompts with `infmoe frontier {tmp_path}/mine {longer}`")


def test_the_fingerprint_is_of_the_checkpoint_however_it_is_opened(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path)
    for how in ({}, {"dtype": torch.bfloat16}, {"keep_ratio": 0.5, "num_samples": 3}, {"pad_token_id": 0}):
        assert fingerprint(type(model).from_pretrained(tmp_path, **how)) == fingerprint(model)


def test_no_profile_is_of_half_precision(tmp_path):
    with pytest.raises(InfMoEError, match=r"this model is in float16: open it in one"):
        Profile.load(written(tmp_path, tiny_model())).check(tiny_model().half())


def test_a_bound_is_students():
    assert upper_increase(0.1, 0.0, 2) == 0.1
    for windows, t in ((6, 2.015), (11, 1.812), (128, 1.657), (10**6, 1.645)):
        assert upper_increase(0.1, 0.01, windows) == pytest.approx(0.1 + 0.01 * t, abs=2e-4)


def test_the_fingerprint_tells_checkpoints_apart():
    assert fingerprint(tiny_model()) == fingerprint(tiny_model())
    assert fingerprint(tiny_model()) != fingerprint(tiny_model(num_hidden_layers=3))
    assert fingerprint(tiny_model("moe")) != fingerprint(tiny_model("moe", gate_norm="all"))
    assert fingerprint(tiny_model()) != fingerprint(tiny_model(keep_ratio=0.5))
    wide = tiny_model(hidden_size=128, intermediate_size=1024)
    before = fingerprint(wide)
    with torch.no_grad():
        wide.transformer.h[0].mlp.w1.weight[:, 1:] += 1.0
    assert fingerprint(wide) != before
    small_step = fingerprint(wide)
    with torch.no_grad():
        for parameter in wide.parameters():
            parameter += 1e-5
    assert fingerprint(wide) != small_step


@pytest.mark.parametrize(
    ("ffn", "options", "digest"),
    [
        ("infinity", {}, "24b4655de1b724e46a0ef64f71ef6e2942ef27621da49d432e18df49ec5e2761"),
        ("infinity", {"mask_scale": "rms"}, "3d0ae66a94c7180bc35e94aa3f8717da9ffe7f70e215b48fa749908a6926505a"),
        ("moe", {}, "9d2cfcbc88c2fa5608552e8e545b52f29be3702daf5b6ddff5cb20e9d09f7c84"),
        ("moe", {"rank_damping": 0.25}, "e51e87315cff1b6093d7a699b09fb99b9fb72963904013adf3f5f37354666758"),
    ],
)
def test_the_fingerprint_stays_what_it_was(ffn, options, digest):
    """A new field of the config must leave it alone: measured profiles hang on it."""
    model = tiny_model(ffn, **options)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_((torch.arange(parameter.numel()) % 251 / 256).view_as(parameter))  # exact in bfloat16
    assert fingerprint(model) == digest


def test_a_number_is_the_same_as_an_integer_and_as_a_float():
    assert fingerprint(tiny_model("moe", routed_scaling_factor=2)) == fingerprint(
        tiny_model("moe", routed_scaling_factor=2.0)
    )


def test_the_bound_lies_above_the_percentile_nineteen_times_in_twenty():
    draw = torch.Generator().manual_seed(0)
    true = -math.log(0.05)  # of the exponential distribution
    for count in (100, 200, 1000):
        samples = torch.empty(400, count).exponential_(generator=draw)
        held = sum(upper_quantile(row.tolist(), 0.95) >= true for row in samples) / 400
        assert 0.92 < held < 0.985, count
    assert upper_quantile([3.0, 1.0, 2.0], 0.95) == 3.0


def test_the_setting_with_the_lowest_bound_keeps_to_it():
    """Tokens of a turn are late together: settings of one speed get bounds that differ, the lowest by luck."""
    draw = torch.Generator().manual_seed(0)

    def times(settings):
        turns = 1 + 0.1 * torch.empty(settings, 16, 1).exponential_(generator=draw)
        return 10 * turns * (1 + 0.02 * torch.rand(settings, 16, 16, generator=draw))

    later = times(1000).flatten()
    kept, alone = 0, 0
    for _ in range(50):
        spent = times(16).flatten(1).tolist()
        kept += (later <= min(upper_p95s(spent, 16))).float().mean().item() >= 0.95
        alone += (later <= min(upper_quantile(own, 0.95) for own in spent)).float().mean().item() >= 0.95
    assert kept >= 47
    assert alone <= 5


def test_a_setting_that_is_late_more_often_keeps_a_bound_of_its_own():
    steady, late = [10.0] * 256, [20.0] * 200 + [40.0] * 56
    assert upper_p95s([steady] * 9 + [late]) == [10.0] * 9 + [40.0]
    assert upper_p95s([late], 16) == [upper_quantile(late, 0.95)]


def test_a_hiccup_of_few_turns_bounds_no_other_setting():
    steady = [10.0 + 0.01 * i for i in range(96)]
    hiccup = [*steady[:-1], 100.0]
    for settings, rounds in ((4, 12), (1, 12), (16, 2)):
        spent = [steady[: 8 * rounds]] * (settings - 1) + [hiccup[-8 * rounds :]]
        bounds = upper_p95s(spent, 8)
        assert max(bounds[:-1], default=0.0) < 11.0, (settings, rounds)
        assert min(bounds) >= 10.0
    assert upper_p95s([[3.0], [4.0]], 16) == [3.0, 4.0]


@pytest.mark.parametrize(
    ("changes", "model_options", "named"),
    [
        ({}, {}, None),
        ({"checkpoint": "trained further since"}, {}, None),
        ({"machine": {"cpu": "Abacus", "dtype": "bfloat16"}}, {}, None),
        ({"machine": {"dtype": "bfloat16"}}, {}, "dtype bfloat16"),
        ({"machine": {"device": "cuda", "kernels": "triton 9"}}, {}, "device cuda"),
        ({"machine": {"backend": "eager"}}, {}, "backend eager"),
        ({"machine": {"threads": 77}}, {}, "threads 77"),
        ({"options": {"rank_damping": 0.25}, "checkpoint": "so opened"}, {}, "rank_damping 0.25"),
        ({}, {"rank_damping": 0.25}, "rank_damping as saved"),
        ({"options": {"rank_damping": 0.25}, "checkpoint": "then"}, {"rank_damping": 0.25}, None),
    ],
)
def test_a_profile_that_is_of_use_keeps_its_place(saved, tmp_path, changes, model_options, named):
    path = tmp_path / "mine" / profile_name(1)
    values = json.loads(path.read_text())
    path.write_text(json.dumps(values | changes | {"machine": values["machine"] | changes.get("machine", {})}))
    there, model = Profile.load(path), saved(**model_options)
    if named is None:
        there.keep(model)
        return
    with pytest.raises(InfMoEError) as caught:
        there.keep(model)
    assert str(caught.value) == (
        f"{path} is the checkpoint's profile with {named}: give --out another folder to keep it, or "
        f"--out {path.parent} to replace it"
    )


ROW = {
    "keep_ratio": 0.25,
    "loss": 3.0,
    "increase": 0.0,
    "increase_at_most": 0.0,
    "token_ms": 1.0,
    "token_ms_p95": 2.0,
}
EMPTY = {
    "version": 5,
    "points": [],
    "checkpoint": "a",
    "machine": {},
    "options": {},
    "rows": 1,
    "model": "m",
    "cached_tokens": [1, 2],
}


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (None, "no profile at"),
        ("{", "no JSON"),
        ("[]", "no profile of this version"),
        ('{"version": 99}', "no profile of this version"),
        ('{"version": 3, "points": [{}]}', "no profile of this version"),
        ('{"version": 5, "points": [{}]}', "damaged"),
        (json.dumps(EMPTY), "no points"),
        (json.dumps(EMPTY | {"points": [ROW | {"loss": float("nan")}]}), "not finite"),
        (json.dumps(EMPTY | {"points": [ROW | {"keep_ratio": "abc"}]}), "damaged"),
        (json.dumps(EMPTY | {"points": [ROW | {"num_samples": 0}]}), "damaged"),
        (json.dumps(EMPTY | {"points": [ROW], "cached_tokens": 3}), "damaged"),
    ],
)
def test_damaged_profiles_are_one_line_with_the_command(tmp_path, content, named):
    if content is not None:
        (tmp_path / profile_name(1)).write_text(content)
    with pytest.raises(InfMoEError, match=named) as caught:
        Profile.load(tmp_path)
    assert f"`infmoe frontier DIR --data DATA --out {tmp_path}`" in str(caught.value)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_profile_that_can_not_be_read_is_not_called_missing(tmp_path):
    (tmp_path / profile_name(1)).mkdir()
    with pytest.raises(InfMoEError, match=r"^cannot read .*frontier.json \(Is a directory\): make it with"):
        Profile.load(tmp_path)
