"""Figures of zero-shot items: what belongs together, errors, balanced margins, the sign test."""

import dataclasses
import itertools
import random
import statistics

import pytest

pytest.importorskip("lm_eval", reason="the `eval` extra is not installed")

from infmoe.eval.zero_shot import figures as figures_of
from infmoe.eval.zero_shot import items
from infmoe.eval.zero_shot.tasks import ALL


def test_the_sign_test_is_a_count_over_all_outcomes():
    sign_test = figures_of._sign_test
    assert sign_test([0.0, 0.0], [0, 1]) == 1.0
    for better, worse in ((1, 0), (3, 1), (5, 0), (4, 4), (1, 6)):
        sides = [sum(outcome) for outcome in itertools.product((0, 1), repeat=better + worse)]
        far = abs(better - worse)
        extreme = sum(abs(2 * s - better - worse) >= far for s in sides)
        changes = [1.0] * better + [0.0] + [-1.0] * worse
        expected = pytest.approx(extreme / len(sides))
        assert sign_test(changes, range(len(changes))) == expected, (better, worse)
        # a passage's items are one draw: twice the same tells no more, for and against cancel out
        assert sign_test([*changes, *changes, 1.0, -1.0], [*range(len(changes)), *range(len(changes)), -1, -1]) == (
            expected
        )


def test_errors_take_a_passage_as_one_draw():
    draw = random.Random(0)
    values = [draw.gauss(1, 2) for _ in range(60)]
    mean, error = figures_of.mean_and_error(values, range(60))
    assert mean == pytest.approx(statistics.fmean(values))
    assert error == pytest.approx(statistics.stdev(values) / 60**0.5)
    # every value three times, on one passage: the same mean, the same error
    assert figures_of.mean_and_error(values * 3, [*range(60)] * 3) == pytest.approx((mean, error))
    assert figures_of.mean_and_error(values * 3, range(180))[1] < 0.6 * error


def test_too_few_items_have_no_error_and_an_answer_that_is_never_right_no_margin():
    assert figures_of.mean_and_error([1.0, 2.0, 3.0], [0, 0, 0]) == (2.0, None)
    assert figures_of.mean_and_error([1.0, 2.0, 3.0], [0, 1, 2], [0, 0, 1]) == (2.25, None)

    def summary(golds, passages, shift=0.0):
        made = [items.Item(i, (0.0, 1.0 + shift), (2, 3), g, p) for i, (g, p) in enumerate(zip(golds, passages))]  # noqa: B905
        scored = items.Scored(made, 2.0, 0, {})
        base = items.Scored([dataclasses.replace(i, log_likelihoods=(0.0, 1.0)) for i in made], 2.0, 0, {})
        return figures_of.summary(ALL["boolq"], [scored], base, "file", 1.0)

    one_passage = summary([0, 1, 1], "aaa", shift=0.5)
    assert one_passage["acc_se"] is one_passage["margin_se"] is one_passage["margin_within_noise"] is None
    assert one_passage["acc_within_noise"] is None
    all_yes = summary([1, 1, 1, 1], "abcd", shift=0.5)
    assert all_yes["acc_se"] == 0
    assert all_yes["margin"] is all_yes["margin_change"] is all_yes["margin_within_noise"] is None
    assert all_yes["margin_by_seed"] == []


@pytest.mark.parametrize(("sizes", "shared"), [((10, 30), 1), ((3, 40), 1), ((20, 20), 4)])
def test_the_errors_of_balanced_means_are_their_spread(sizes, shared):
    """Classes of unequal size and spread, passages of several items: as drawn anew many times."""
    draw = random.Random(1)
    classes = [kind for kind, size in enumerate(sizes) for _ in range(size)]
    draw.shuffle(classes)
    passages = [i // shared for i in range(len(classes))]
    means, variances = [], []
    for _ in range(1500):
        common = [draw.gauss(0, 1) if shared > 1 else 0.0 for _ in range(len(classes))]
        values = [common[p] + draw.gauss(0, 1 + 2 * kind) for p, kind in zip(passages, classes, strict=True)]
        mean, error = figures_of.mean_and_error(values, passages, classes)
        means.append(mean)
        variances.append(error**2)
    assert statistics.fmean(variances) ** 0.5 == pytest.approx(statistics.stdev(means), rel=0.1)


def test_what_belongs_together():
    shared = items._shared
    question = "Cats purr.\nQuestion: do cats purr?\nAnswer:"
    assert shared([question, question], "\nQuestion:") == ["Cats purr."]
    assert shared([question, question], "\nQ:") == [question]  # no such mark: by itself
    twins = [
        shared([f"Ann left Eve because {name}" for name in ("Ann", "Eve")], None),
        shared([f"Ann left Eve although {name}" for name in ("Eve", "Ann")], None),
    ]
    assert twins[0] == twins[1]
    assert shared(["So Ann", "So Eve"], None) != shared(["So Joe", "So Eve"], None)
    longer = [
        shared([f"It was clear that {name}" for name in pair], None)
        for pair in (("Ann", "Ann Lee"), ("Ann Lee", "Ann"))
    ]
    assert longer[0] == longer[1]
    bakeries = [f"They chose it because the {name}" for name in ("bakery", "bank")]
    assert shared(bakeries, None) == ["They", "chose", "bakery", "bank"]


def test_a_blind_preference_for_an_answer_is_no_margin():
    """Where all items have the same answers, the mean is over the right answers' means."""

    def made(bias, skill, golds):
        """A model that likes the second answer by `bias`, and the right one by `skill`."""
        return [
            items.Item(i, tuple(bias * a + skill * (a == gold) for a in range(2)), (2, 3), gold, f"{i}")
            for i, gold in enumerate(golds)
        ]

    golds = [0] * 10 + [1] * 30
    scored = items.Scored(made(5.0, 0.25, golds), 2.0, 0, {})
    figures = figures_of.summary(ALL["boolq"], [scored], scored, "file", 1.0)
    assert figures["margin"] == pytest.approx(0.25)
    assert figures["margin_se"] == pytest.approx(0)
    plain = figures_of.summary(ALL["winogrande"], [scored], scored, "file", 1.0)
    assert plain["margin"] == pytest.approx((10 * (0.25 - 5) + 30 * (0.25 + 5)) / 40)
    other = items.Scored(made(-3.0, 0.5, golds), 2.0, 0, {})
    changed = figures_of.summary(ALL["boolq"], [other], scored, "file", 1.0)
    assert changed["margin_change"] == pytest.approx(0.25)
    assert not changed["margin_within_noise"]
