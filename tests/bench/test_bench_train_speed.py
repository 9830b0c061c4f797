"""Training speed beside what FLOPs allow."""

import pytest

from infmoe.bench import train_speed
from infmoe.recipes import recipe
from infmoe.train.config import hf_config


@pytest.fixture
def train_setting() -> train_speed.Setting:
    settings = ("model.hidden_size=32", "model.num_hidden_layers=2", "model.vocab_size=61")
    return train_speed.Setting("tiny", 256, settings=(*settings, "model.max_position_embeddings=32"))


def test_flops_of_a_step_by_hand():
    # GPT-2 small: four D x D products, attention over half of the context, two D x F products, the output layer
    layer = 2 * 4 * 768**2 + 2 * 2 * 768 * 512 + 2 * 2 * 768 * 6144
    assert train_speed.train_flops(hf_config(recipe("small/dense-wide"))) == 3 * (12 * layer + 2 * 768 * 50257)


@pytest.mark.parametrize(
    ("z_dim", "rival", "allowed"),
    [(256, "moe", 0.573), (64, "moe", 0.664), (256, "dense-wide", 0.817), (64, "dense-wide", 0.947)],
)
def test_what_flops_allow(z_dim, rival, allowed):
    from infmoe.train.config import apply_overrides

    ours = hf_config(apply_overrides(recipe("small/infinity"), [f"model.z_dim={z_dim}"]))
    theirs = hf_config(recipe(f"small/{rival}"))
    assert train_speed.train_flops(theirs) / train_speed.train_flops(ours) == pytest.approx(allowed, abs=1e-3)


def test_rows_and_summary(train_setting, monkeypatch):
    bare = {"arm": "grouped products", "median": 1.0}
    monkeypatch.setattr(train_speed, "moe_over_gemms", lambda *, quick: ([bare], {"over_gemms_max": 1.1}))
    rows, summary = train_speed.train_speed(quick=True, settings=(train_setting,))
    assert summary["moe_over_gemms_max"] == 1.1
    for rival in ("moe", "dense_wide"):
        for precision in ("bf16", "fp32"):
            key = f"tiny_{rival}_{precision}"
            assert summary[f"reached_{key}"] == pytest.approx(summary[f"ratio_{key}"] / summary[f"allowed_{key}"])
            assert summary[f"passes_reached_{key}"] > 0
    steps = [row for row in rows if row["part"] == "step"]
    assert len(steps) == 6
    assert all(0 < row["optimizer_share"] < 1 for row in steps)
    assert rows[-1] == {"part": "moe over its products", **bare}
