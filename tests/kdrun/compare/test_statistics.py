"""The verdicts keep their promises: hand-computed numbers, scipy, and simulated families."""

from __future__ import annotations

import math

import numpy as np
import pytest
from synthetic import BASELINE, arm, record, records_of

from kdrun.compare.statistics import (
    LEVEL,
    MOST_SEEDS,
    family_tests,
    holm,
    needed_seeds,
    power,
    upper_standard_deviation,
)
from kdrun.compare.verdicts import compare_all
from kdrun.evaluation.yardsticks import YARDSTICKS

stats = pytest.importorskip("scipy.stats")

CE = next(y for y in YARDSTICKS if y.name == "ce")
TOP1 = next(y for y in YARDSTICKS if y.name == "top1_agreement")
FAMILIES = 40_000
DISTRIBUTIONS = {
    "normal": lambda rng, shape: rng.normal(size=shape),
    "lognormal": lambda rng, shape: rng.lognormal(sigma=1.0, size=shape),
    "exponential": lambda rng, shape: rng.exponential(size=shape),
}
FORWARD, REVERSE, JSD = (arm(name) for name in ("forward_kl", "reverse_kl", "generalized_jsd"))


def lower_bound(errors, families):
    """95 % Clopper-Pearson lower bound of a proportion."""
    return stats.beta.ppf(0.05, errors, families - errors + 1) if errors else 0.0


def streams(count, seed):
    """Generators whose streams do not overlap: one for each arm."""
    return [np.random.default_rng(child) for child in np.random.SeedSequence(seed).spawn(count)]


def simulate(draw, arms, seeds, offsets=0.0, families=FAMILIES, seed=0):
    """Tests of families ``[families, arms]``, each arm and the baseline from its own stream."""
    base, *others = (draw(rng, (families, seeds)) for rng in streams(arms + 1, seed))
    differences = np.stack(others, axis=1) - base[:, None]
    return differences + np.broadcast_to(offsets, (arms,))[:, None]


def family_of(differences, delta):
    return family_tests(
        differences.mean(-1),
        differences.std(-1, ddof=1),
        differences.shape[-1],
        delta,
        differences.shape[-2],
    )


# Agreement with others


def test_numbers_agree_with_scipy():
    rng = np.random.default_rng(1)
    values = {
        BASELINE: rng.normal(size=5).tolist(),
        FORWARD: rng.normal(size=5).tolist(),
        REVERSE: rng.normal(size=5).tolist(),
    }
    verdicts = compare_all(records_of(values), BASELINE, CE, 0.02)
    for verdict in verdicts:
        expected = stats.ttest_rel(values[verdict.arm], values[BASELINE])
        found = verdict.comparison
        assert found.t == pytest.approx(expected.statistic)
        assert found.p == pytest.approx(expected.pvalue)
        interval = expected.confidence_interval(1 - LEVEL / 2)
        assert found.interval == pytest.approx((interval.low, interval.high))
        short = expected.confidence_interval(1 - 2 * LEVEL / 2)
        assert found.equivalence_interval == pytest.approx((short.low, short.high))


def test_numbers_computed_by_hand():
    # d = (1, 2, 3): mean 2, s = 1, se = 1 / sqrt 3, t = 2 sqrt 3 = 3.4641, two degrees of freedom.
    # With two, P(|T| > t) = 1 - t / sqrt(2 + t^2): 1 - 3.4641 / sqrt 14 = 0.0741799.
    # t(0.025; 2) = 4.302653: 2 -+ 4.302653 / sqrt 3.
    values = {BASELINE: [1.0, 1.0, 1.0], FORWARD: [2.0, 3.0, 4.0]}
    (verdict,) = compare_all(records_of(values), BASELINE, CE, 0.5)
    found = verdict.comparison
    assert found.differences == (1.0, 2.0, 3.0)
    assert (found.mean, found.standard_deviation) == (2.0, 1.0)
    assert found.t == pytest.approx(3.4641016)
    assert found.p == pytest.approx(0.0741799)
    assert found.p_adjusted == found.p
    assert found.interval == pytest.approx((2 - 2.4841377, 2 + 2.4841377))
    # The one-sided test of a mean of 0.5 or more: t = (0.5 - 2) sqrt 3 = -2.598076, and
    # P(T > t) = 1/2 + 2.598076 / (2 sqrt(2 + 6.75)).
    assert found.equivalence_p == pytest.approx(0.9391550)
    assert verdict.verdict == "undecided"


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.2, 0.001, 0.03, 0.9]) == pytest.approx([0.4, 0.004, 0.09, 0.9])
    assert holm([[0.6, 0.7], [0.01, 0.01]]) == pytest.approx(np.array([[1, 1], [0.02, 0.02]]))


def test_upper_bound_by_hand():
    # chi2(0.2; 2) = -2 ln 0.8 = 0.446287; sqrt(2 / 0.446287) = 2.116937.
    assert upper_standard_deviation(0.5, 3) == pytest.approx(0.5 * 2.116937, rel=1e-5)


# Errors under the null and at the boundary


@pytest.mark.parametrize("arms", [1, 3, 6])
@pytest.mark.parametrize("seeds", [3, 5])
@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_family_wise_error_under_the_null(name, seeds, arms):
    found = family_of(simulate(DISTRIBUTIONS[name], arms, seeds), delta=1e-9)
    errors = int(found.differs.any(-1).sum())
    assert lower_bound(errors, FAMILIES) <= LEVEL, errors / FAMILIES


@pytest.mark.parametrize("seeds", [3, 5])
@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_family_wise_error_where_some_arms_differ(name, seeds):
    """Holm's later steps: true nulls beside arms whose difference is certain to be found."""
    offsets = np.array([50.0, 0, 0, -50])
    found = family_of(simulate(DISTRIBUTIONS[name], 4, seeds, offsets), delta=1e-9)
    errors = int(found.differs[:, 1:3].any(-1).sum())
    assert lower_bound(errors, FAMILIES) <= LEVEL, errors / FAMILIES


def test_arms_of_unequal_noise_and_few_seeds_left_out():
    rng = np.random.default_rng(3)
    counts = np.array([2, 3, 5])
    mean, deviation = np.empty((2, FAMILIES, 3))
    base = rng.normal(size=(FAMILIES, 5))
    for place, count in enumerate(counts):
        values = rng.normal(size=(FAMILIES, count)) * 10.0**-place - base[:, :count]
        mean[:, place], deviation[:, place] = values.mean(-1), values.std(-1, ddof=1)
    found = family_tests(mean, deviation, counts, 1e-9, 3)
    assert lower_bound(int(found.differs.any(-1).sum()), FAMILIES) <= LEVEL


@pytest.mark.parametrize("seeds", [3, 5])
def test_verdicts_of_whole_comparisons_under_the_null(seeds):
    families = 300
    arms = (BASELINE, FORWARD, REVERSE, JSD)
    drawn = [rng.normal(4, 0.01, (families, seeds)) for rng in streams(4, seed=seeds)]
    errors = 0
    for place in range(families):
        values = {of: column[place].tolist() for of, column in zip(arms, drawn, strict=True)}
        verdicts = compare_all(records_of(values), BASELINE, CE, 1e-4)
        errors += any(verdict.verdict in ("better", "worse") for verdict in verdicts)
    assert lower_bound(errors, families) <= LEVEL


@pytest.mark.parametrize("seeds", [3, 5])
@pytest.mark.parametrize("name", DISTRIBUTIONS)
@pytest.mark.parametrize("delta", [0.5, 2.0, 6.0, 20.0])
def test_equivalence_is_rare_at_the_boundary(name, seeds, delta):
    offsets = np.array([delta, -delta, delta])
    found = family_of(simulate(DISTRIBUTIONS[name], 3, seeds, offsets), delta)
    errors = int(found.equivalent.any(-1).sum())
    assert lower_bound(errors, FAMILIES) <= LEVEL, errors / FAMILIES


# What is there is found


@pytest.mark.parametrize(("seeds", "effect"), [(3, 9.0), (5, 3.2)])
def test_power_at_a_stated_effect(seeds, effect):
    """Three arms; an effect of 9 (3 seeds) or 3.2 (5 seeds) standard deviations of d is found."""
    offsets = np.array([-effect * math.sqrt(2), 0, 0])  # d has twice the variance of an arm
    found = family_of(simulate(DISTRIBUTIONS["normal"], 3, seeds, offsets), delta=1e-9)
    assert found.differs[:, 0].mean() >= 0.8
    assert power(seeds, 1.0, effect, arms=3) >= 0.8
    assert power(seeds, 1.0, effect, arms=3) == pytest.approx(found.differs[:, 0].mean(), abs=0.02)


def test_equivalence_is_found():
    found = family_of(simulate(DISTRIBUTIONS["normal"], 3, 5), delta=6.0)
    assert (found.equivalent.mean(0) > 0.8).all()


@pytest.mark.parametrize(("deviation", "arms"), [(0.01, 1), (0.02, 3), (0.05, 6)])
def test_needed_seeds_are_enough_and_no_more(deviation, arms):
    delta, families = 0.02, 20_000
    needed = needed_seeds(deviation, delta, arms)
    for seeds, enough in ((needed, True), (needed - 1, False)):
        rng = np.random.default_rng(seeds)
        differences = rng.normal(delta, deviation, (families, 1, seeds))
        found = family_tests(
            differences.mean(-1), differences.std(-1, ddof=1), seeds, delta, arms
        ).differs.mean()
        assert (found > 0.79) if enough else (found < 0.81)


def test_needed_seeds_of_pilots_suffice_four_times_of_five():
    deviations = np.random.default_rng(0).normal(size=(20_000, 3)).std(-1, ddof=1)
    bounds = [upper_standard_deviation(deviation, 3) for deviation in deviations]
    assert np.mean(np.array(bounds) >= 1) == pytest.approx(0.8, abs=0.01)


def test_needed_seeds_at_the_ends():
    assert needed_seeds(1e-9, 0.02, 3) == 2
    assert needed_seeds(10.0, 0.02, 3) is None
    assert power(MOST_SEEDS, 10.0, 0.02, 3) < 0.8


# Intervals


@pytest.mark.parametrize("seeds", [3, 5])
@pytest.mark.parametrize("offsets", [(0, 0, 0), (0.5, 1, 1.5), (5, 10, 0), (30, 20, 40)])
def test_intervals_hold_all_true_differences_at_once(seeds, offsets):
    truth = np.array(offsets, dtype=float)
    found = family_of(simulate(DISTRIBUTIONS["normal"], 3, seeds, truth), delta=1.0)
    cut = ((found.low == 0) | (found.high == 0)).any(-1)
    missed = ((truth < found.low) | (truth > found.high)).any(-1)
    wrongly_cut = (((found.low == 0) | (found.high == 0)) & (truth == 0)).any(-1)
    assert lower_bound(int((missed & ~cut).sum()), FAMILIES) <= LEVEL
    assert lower_bound(int((missed | wrongly_cut).sum()), FAMILIES) <= 2 * LEVEL


def test_no_interval_contradicts_a_verdict():
    rng = np.random.default_rng(0)
    offsets = rng.normal(scale=4, size=(FAMILIES, 4, 1))
    differences = rng.normal(size=(FAMILIES, 4, 3)) + offsets
    found = family_of(differences, delta=4.0)
    holds_zero = (found.low < 0) & (found.high > 0)
    assert (holds_zero == ~found.differs).all()
    within = (found.equivalence_low > -4) & (found.equivalence_high < 4)
    assert (within == found.equivalent).all()
    assert found.differs.any()
    assert found.equivalent.any()
    assert ((found.low == 0) | (found.high == 0)).any()  # a cut occurs


# Verdicts in words


def test_verdicts_follow_the_direction_of_the_yardstick():
    low, high = [0.500, 0.501, 0.502], [0.600, 0.6012, 0.602]
    values = {BASELINE: low, FORWARD: high}
    (verdict,) = compare_all(records_of(values), BASELINE, CE, 0.02)
    assert (verdict.verdict, verdict.done) == ("worse", 3)
    assert "higher" in verdict.reason
    records = [
        record(of, seed, {"top1_agreement": value})
        for of, column in values.items()
        for seed, value in enumerate(column)
    ]
    (verdict,) = compare_all(records, BASELINE, TOP1, 0.02)
    assert verdict.verdict == "better"
    (verdict,) = compare_all(records, FORWARD, TOP1, 0.02)
    assert (verdict.arm, verdict.verdict) == (BASELINE, "worse")


def test_a_found_but_small_difference_is_equivalent():
    values = {BASELINE: [1.0, 1.1, 1.2], FORWARD: [1.005, 1.1051, 1.2051]}
    (verdict,) = compare_all(records_of(values), BASELINE, CE, 0.02)
    assert verdict.verdict == "equivalent"
    assert verdict.comparison.p_adjusted < LEVEL
    assert "smaller than 0.02" in verdict.reason


def test_undecided_names_the_seeds_needed():
    values = {BASELINE: [1.0, 1.1, 1.2], FORWARD: [1.05, 1.08, 1.26]}
    (verdict,) = compare_all(records_of(values), BASELINE, CE, 0.02)
    assert verdict.verdict == "undecided"
    bound = upper_standard_deviation(verdict.comparison.standard_deviation, 3)
    assert verdict.needed_seeds == needed_seeds(bound, 0.02, 1)
    assert f"about {verdict.needed_seeds} seeds" in verdict.reason
    (verdict,) = compare_all(records_of(values), BASELINE, CE, 1e-5)
    assert verdict.needed_seeds is None
    assert "more than 10000 seeds" in verdict.reason


def test_seeds_that_are_already_enough_are_said_so():
    noise = np.random.default_rng(0).normal(size=20)
    noise = (noise - noise.mean()) / noise.std(ddof=1) * math.sqrt(20)  # standard error 1
    values = {BASELINE: [0.0] * 20, FORWARD: (noise + 1.9).tolist()}
    (verdict,) = compare_all(records_of(values), BASELINE, CE, 3.6)
    assert verdict.verdict == "undecided"
    assert verdict.needed_seeds <= 20
    assert "20 seeds would show a difference of 3.6, so it is likely smaller" in verdict.reason


def test_no_difference_at_all_is_identical():
    values = {BASELINE: [1.0, 1.1, 1.2], FORWARD: [1.0, 1.1, 1.2 + 1e-15]}
    (verdict,) = compare_all(records_of(values), BASELINE, CE, 0.02)
    assert verdict.verdict == "identical"
    assert verdict.comparison.interval == (0, 0)


def test_the_same_difference_at_every_seed_is_no_verdict():
    values = {BASELINE: [1.0, 1.1, 1.2], FORWARD: [1.3, 1.4, 1.5]}
    (verdict,) = compare_all(records_of(values), BASELINE, CE, 0.02)
    assert (verdict.verdict, verdict.comparison) == ("no verdict", None)
    assert "not replicates" in verdict.reason


def test_diverged_seeds_count_against_their_arm():
    values = {BASELINE: [1.0, 1.1, 1.2], FORWARD: [0.1, 0.21]}
    records = [*records_of(values), record(FORWARD, 2, {}, status="diverged", reason="NaN")]
    (verdict,) = compare_all(records, BASELINE, CE, 0.02)
    assert (verdict.verdict, verdict.done, verdict.diverged) == ("diverged", 2, 1)
    assert verdict.reason == "diverged in 1 of 3 seeds"
    (verdict,) = compare_all(records, FORWARD, CE, 0.02)
    assert verdict.verdict == "no verdict"
    assert "the baseline diverged in 1 of 3" in verdict.reason


def test_an_infinite_measure_is_a_divergence():
    values = {BASELINE: [1.0, 1.1, 1.2], FORWARD: [0.1, 0.21, math.inf]}
    (verdict,) = compare_all(records_of(values), BASELINE, CE, 0.02)
    assert verdict.verdict == "diverged"


def test_a_failed_trial_is_a_missing_seed():
    values = {BASELINE: [1.0, 1.1, 1.2], FORWARD: [0.5, 0.61]}
    records = [*records_of(values), record(FORWARD, 2, {}, status="failed", reason="memory")]
    (verdict,) = compare_all(records, BASELINE, CE, 0.02)
    assert (verdict.verdict, verdict.failed, verdict.comparison.seeds) == ("better", 1, (0, 1))


@pytest.mark.parametrize(
    ("records", "reason"),
    [
        ([record(BASELINE, 0, 1.0), record(FORWARD, 0, 1.1)], "one seed finished by both"),
        ([record(BASELINE, 0, 1.0), record(FORWARD, 1, 1.1)], "no seed finished by both"),
        ([], "no seed finished by both"),
        (
            [record(FORWARD, seed, {}, status="failed") for seed in (0, 1)],
            "2 of 2 trials of this arm failed",
        ),
        (
            [record(of, seed, {"rouge_l": 1.0}) for of in (BASELINE, FORWARD) for seed in (0, 1)],
            "cross-entropy was not measured",
        ),
    ],
)
def test_fewer_than_two_seeds_give_no_verdict(records, reason):
    (verdict,) = compare_all(records, BASELINE, CE, 0.02, arms=[BASELINE, FORWARD])
    assert verdict.verdict == "no verdict"
    assert reason in verdict.reason


def test_planned_arms_count_before_they_run():
    values = {BASELINE: [1.0, 1.1, 1.2], FORWARD: [0.9, 1.02, 1.1]}
    (alone,) = compare_all(records_of(values), BASELINE, CE, 0.02)
    first, second = compare_all(records_of(values), BASELINE, CE, 0.02, arms=[FORWARD, REVERSE])
    assert first.comparison.p_adjusted == pytest.approx(2 * alone.comparison.p)
    assert second.verdict == "no verdict"


def test_tuning_trials_do_not_count():
    values = {BASELINE: [1.0, 1.1], FORWARD: [0.9, 1.02]}
    tuning = [record(FORWARD, seed, 99.0, stage="tuning") for seed in (0, 1, 2)]
    plain = compare_all(records_of(values), BASELINE, CE, 0.02)
    assert compare_all([*records_of(values), *tuning], BASELINE, CE, 0.02) == plain


def test_a_difference_of_interest_must_be_positive():
    with pytest.raises(ValueError, match="positive"):
        compare_all([], BASELINE, CE, 0.0)
