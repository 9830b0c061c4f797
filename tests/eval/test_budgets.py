"""Budgets of a profile, tried."""

import dataclasses
import json
import os
import shutil

import pytest

from infmoe.cli import main
from infmoe.eval.budgets import check_budgets
from infmoe.hf.budget import Profile


def test_budgets_are_checked_through_generate(profile_dir, opened):
    profile = Profile.load(profile_dir)
    first, last = check_budgets(opened.model, profile, count=2, steps=16, prompt_length=8)
    quickest = min(profile.points, key=lambda p: p.token_ms_p95)
    best = min(profile.points, key=lambda p: p.loss)
    assert (first["picked"], last["picked"]) == (quickest.point.label(), best.point.label())
    assert last["budget_ms"] == max(p.token_ms_p95 for p in profile.points)
    assert first["steps"] == last["steps"] == 16
    assert last["regret"] is None or last["regret"] <= 0.0  # nothing has a lower loss
    slow = dataclasses.replace(profile, points=tuple(_timed(p, 1e5) for p in profile.points))
    assert [row["met"] for row in check_budgets(opened.model, slow, count=1, steps=16, prompt_length=8)] == [1.0]
    quick = dataclasses.replace(profile, points=tuple(_timed(p, 1e-5) for p in profile.points))
    (row,) = check_budgets(opened.model, quick, count=1, steps=16, prompt_length=8)
    assert (row["met"], row["regret"]) == (0.0, None)


def test_the_budgets_of_a_profile_are_tried_again(profile_dir, tiny_run, tmp_path, capsys):
    before = (profile_dir / "frontier.json").read_bytes()
    words = ["budgets", str(tiny_run.run), "--profile", str(profile_dir), "--count", "2", "--steps", "15"]
    assert main([*words, "--out", str(tmp_path)]) == 0
    first, last, where = capsys.readouterr().out.splitlines()
    values = json.loads((tmp_path / "budgets.json").read_text())
    assert [row["steps"] for row in values["budgets"]] == [15, 15]  # a turn of the context that is left
    profile = Profile.load(profile_dir)
    ends = [f(p.token_ms_p95 for p in profile.points) for f in (min, max)]
    for line, row, end in zip((first, last), values["budgets"], ends, strict=True):
        assert row["budget_ms"] == end
        assert line.startswith(f"budget {end:.2f} ms: met by {row['met']:.1%} of 15 tokens with {row['picked']};")
    assert where.endswith(f"profile: {os.path.relpath(profile.path)} of {profile.time}")
    assert profile.time == json.loads(before)["provenance"]["time"] == values["profile_time"]
    assert main([*words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rows"] == 1
    assert (profile_dir / "budgets.json").is_file()  # beside the profile, which stays
    assert (profile_dir / "frontier.json").read_bytes() == before


@pytest.mark.parametrize(
    ("more", "named"),
    [
        ([], "no profile at"),
        (["--profile", "PROFILE", "--rows", "2"], "frontier-rows2.json: make it with"),
        (["--profile", "PROFILE/frontier.json", "--rows", "2"], "measured with 1 row(s) at once, not 2"),
        (["--profile", "PROFILE", "--set", "mask_scale=rms"], "another configuration, than this"),
        (["--profile", "PROFILE", "--dtype", "bfloat16"], "dtype float32 there, bfloat16 here"),
        (["--count", "1"], "--count"),
    ],
)
def test_budgets_without_a_profile_that_fits(profile_dir, tiny_run, tmp_path, capsys, more, named):
    run = shutil.copytree(tiny_run.run, tmp_path / "run")
    words = [word.replace("PROFILE", str(profile_dir)) for word in more]
    assert main(["budgets", str(run), "--out", str(tmp_path / "out"), *words]) == 2
    assert named in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out").exists()


def _timed(point, ms):
    return dataclasses.replace(point, token_ms=ms, token_ms_p95=ms)
