"""From the words of a command line to routings."""

import pytest
from helpers import tiny_config

from infmoe.errors import InfMoEError
from infmoe.eval.dials import grid, parse_ints, parse_mode, parse_ratios, parse_setting
from infmoe.eval.sweep import default_grid, points_of
from infmoe.layers.point import Point, ratio_text


def test_lists():
    assert parse_ints("1,2, 8", "--k") == (1, 2, 8)
    assert parse_ratios("0.0625,1/4, .5,1", "--r") == (0.0625, 0.25, 0.5, 1.0)
    assert parse_ints("4|2,3", "--k") == ((4, 2), 3)
    assert parse_ratios("1/4, 1/4|1/8|1", "--r") == (0.25, (0.25, 0.125, 1.0))
    assert parse_ints(None, "--k") is None
    assert parse_ratios(None, "--r") is None
    assert parse_mode("mu") == "mu"
    assert parse_mode(None) is None


@pytest.mark.parametrize("text", ["", "1,", "two", "1.5", "1/2", "1 2", "1|", "1|,2"])
def test_no_integers(text):
    with pytest.raises(InfMoEError, match="--k takes integers separated by commas"):
        parse_ints(text, "--k")


@pytest.mark.parametrize("text", ["", "1,", "half", "1/0", "nan", "inf", "1e999", "1//2", "1/2|"])
def test_no_numbers(text):
    with pytest.raises(InfMoEError, match="--r takes numbers separated by commas"):
        parse_ratios(text, "--r")


@pytest.mark.parametrize("ratio", [0.25, (0.25, 0.0625), (0.1875, 0.0313, 1.0)])
def test_one_setting_as_tables_print_it(ratio):
    assert parse_setting(ratio_text(ratio), "--r", parse_ratios) == (ratio,)
    assert parse_setting("4|2", "--k", parse_ints) == ((4, 2),)
    assert parse_setting(None, "--k", parse_ints) is None


@pytest.mark.parametrize(
    ("text", "message"),
    [("1/4,1/2", "takes one value here"), ("1|2,3", "takes one value here"), ("1/4|", "numbers"), ("a|b", "numbers")],
)
def test_no_setting(text, message):
    with pytest.raises(InfMoEError, match=message):
        parse_setting(text, "--r", parse_ratios)


def test_an_unknown_mode_finds_the_nearest():
    with pytest.raises(InfMoEError, match="did you mean 'antithetic'"):
        parse_mode("antithetik")
    with pytest.raises(InfMoEError, match="--mode takes one mode here, got 'sample,mu'"):
        parse_mode("sample,mu")


def test_sampled_points_and_the_mean_stand_side_by_side():
    points = points_of(tiny_config(), "1,2", "1/8,1/4", None, "sample, mu,sample")
    assert [point.label() for point in points] == [
        *("K=1 keep=1/8", "K=1 keep=1/4", "K=2 keep=1/8", "K=2 keep=1/4", "mu keep=1/8", "mu keep=1/4"),
    ]
    shown = points_of(tiny_config(), None, "1/4", None, "mu,antithetic", full_grid=True)
    assert shown == [Point(None, 0.25, mode="mu"), *(Point(k, 0.25, mode="antithetic") for k in (1, 2, 4, 8))]
    with pytest.raises(InfMoEError, match="unknown mode 'nu'"):
        points_of(tiny_config(), None, None, None, "sample,nu")


def test_labels():
    assert Point(2, 0.25).label() == "K=2 keep=1/4"
    assert Point(2, 0.3, mode="sample").label() == "K=2 keep=0.3"
    assert Point(keep_ratio=1 / 16, mode="mu").label() == "mu keep=1/16"
    assert Point(4, 1.0, mode="antithetic").label() == "antithetic K=4 keep=1"
    assert Point(num_experts_per_tok=2).label() == "k=2"
    assert Point().label() == "-"
    assert ratio_text(1 / 3) == "1/3"


def test_all_combinations_in_order():
    points = grid(tiny_config(), num_samples=(1, 4), keep_ratios=(0.125, 0.5))
    assert [(p.num_samples, p.keep_ratio) for p in points] == [(1, 0.125), (1, 0.5), (4, 0.125), (4, 0.5)]
    assert grid(tiny_config()) == [Point(2, 0.25)]
    assert grid(tiny_config(), mode="mu") == [Point(None, 0.25, mode="mu")]
    assert grid(tiny_config(num_samples=1, sigma_activation="none")) == [Point(None, 0.25)]
    assert grid(tiny_config("moe"), num_experts_per_tok=(1, 2)) == [
        Point(num_experts_per_tok=1),
        Point(num_experts_per_tok=2),
    ]
    assert grid(tiny_config("dense")) == [Point()]
    assert grid(tiny_config(keep_ratio=[0.5, 0.25])) == [Point(2, (0.5, 0.25))]


@pytest.mark.parametrize(
    ("ffn", "options", "dials", "message"),
    [
        ("dense", {}, {"num_samples": (1,)}, "has no dial 'num_samples'"),
        ("switch", {}, {"keep_ratios": (0.5,)}, "has no dial 'keep_ratio'"),
        ("moe", {}, {"num_samples": (1,)}, "has no dial 'num_samples'"),
        ("moe", {}, {"mode": "mu"}, "has no dial 'mode'"),
        ("moe", {}, {"num_experts_per_tok": (1, 5)}, "5"),
        ("infinity", {}, {"num_experts_per_tok": (1,)}, "has no dial 'num_experts_per_tok'"),
        ("infinity", {}, {"num_samples": (1, 0)}, "num_samples must be"),
        ("infinity", {}, {"keep_ratios": ((0.5, 0.25, 0.5),)}, "keep_ratio has 3 values for 2 layers: give one"),
        ("moe", {}, {"num_experts_per_tok": ((1, 5),)}, "5 is more than the layer's 4 experts"),
        ("infinity", {}, {"keep_ratios": (0.5, 1.5)}, "keep_ratio must lie in"),
        ("infinity", {}, {"keep_ratios": (0.0,)}, "keep_ratio must lie in"),
        ("infinity", {}, {"num_samples": (2,), "mode": "mu"}, "leave num_samples out"),
        ("infinity", {"routing_mode": "mu"}, {"num_samples": (2,)}, "leave num_samples out"),
        ("infinity", {"sigma_activation": "none"}, {"mode": "sample"}, "no sigma"),
    ],
)
def test_what_a_model_cannot_run_is_refused_before_anything_is_measured(ffn, options, dials, message):
    with pytest.raises(InfMoEError, match=message):
        grid(tiny_config(ffn, **options), **dials)


def test_a_sweep_shows_the_dials_that_there_are():
    four = (1 / 16, 1 / 8, 1 / 4, 1 / 2)
    assert default_grid(tiny_config(), None, None, None, None) == ((1, 2, 4, 8), four, None)
    assert default_grid(tiny_config(), None, None, None, "mu") == (None, four, None)
    assert default_grid(tiny_config(), (3,), (0.5,), None, None) == ((3,), (0.5,), None)
    assert default_grid(tiny_config("moe", num_experts=4), None, None, None, None) == (None, None, [1, 2, 3, 4])
    assert default_grid(tiny_config("dense"), None, None, None, None) == (None, None, None)
