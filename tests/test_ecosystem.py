"""ecosystem.py: the mathematics by brute force and closed forms, the claims in miniature, the tool as a user runs it."""

import contextlib
import io
import json
import math
import os
import subprocess
import sys
import tarfile
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import ecosystem as eco

HOUSE = Path(__file__).parent.parent
DATA = Path(os.environ.get("NANOPAPERS_TEST_DATA", "")) / "ecosystem"
needs_data = pytest.mark.skipif(not os.environ.get("NANOPAPERS_TEST_DATA"), reason="NANOPAPERS_TEST_DATA is not set")
ERRORS = [0.161857, 0.284818, 0.343789, 0.357591, 0.473024]


def sums_of(failed, **options):
    return eco.tally(np.asarray(failed, np.uint8), **options)


def rates_of(failed):
    sums = sums_of(failed, detail=False)
    return eco.homogeneity(sums["hist"][0], sums["columns"][0])


def by_subsets(errors):
    """Distribution of the number of failures by adding up all 2^k outcomes."""
    p = np.zeros(len(errors) + 1)
    for outcome in product((0, 1), repeat=len(errors)):
        p[sum(outcome)] += math.prod(e if x else 1 - e for e, x in zip(errors, outcome))
    return p


def with_hardness(n, k, seed, slope=1.5):
    """People of different difficulty, drawn without anything of ecosystem.py."""
    rng = np.random.default_rng(seed)
    z = rng.standard_normal((n, 1))
    return (rng.random((n, k)) < 1 / (1 + np.exp(2 - slope * z - np.linspace(-0.5, 1, k)))).astype(np.uint8)


# ---------------------------------------------------------------------------------------------- the mathematics


@pytest.mark.parametrize("errors", [[0.3], [0.0, 1.0, 0.5], ERRORS, list(np.linspace(0.01, 0.9, 11))])
def test_poisson_binomial_is_the_sum_over_outcomes(errors):
    p = eco.poisson_binomial(errors)
    np.testing.assert_allclose(p, by_subsets(errors), atol=1e-14)
    np.testing.assert_allclose(p, eco.poisson_binomial(errors[::-1]), atol=1e-14)
    t, e = np.arange(len(p)), np.array(errors)
    assert math.isclose(p @ t, e.sum()) and math.isclose(p @ t**2 - (p @ t) ** 2, (e * (1 - e)).sum(), abs_tol=1e-12)


def test_poisson_binomial_of_equal_errors_is_binomial_and_batches():
    k, e = 40, 0.13
    want = [math.comb(k, t) * e**t * (1 - e) ** (k - t) for t in range(k + 1)]
    np.testing.assert_allclose(eco.poisson_binomial([e] * k), want, rtol=1e-12)
    batch = np.random.default_rng(0).random((3, 2, 5))
    np.testing.assert_allclose(eco.poisson_binomial(batch)[2, 1], by_subsets(batch[2, 1]), atol=1e-14)


def test_nested_and_disjoint_failures():
    nested, disjoint = rates_of([[1, 1], [0, 0]]), rates_of([[1, 0], [0, 1]])
    want = dict(homogeneous=(1, 0.5), systemic=(0.5, 0.25), consistent=(0.5, 0.25))
    for kind, (observed, expected) in want.items():
        assert (nested[f"{kind} observed"], nested[f"{kind} expected"]) == (observed, expected)
        assert nested[f"{kind} difference"] == observed - expected and nested[f"{kind} ratio"] == 2
    assert nested["phi"] == 1 and nested["dispersion"] == 2
    assert disjoint["homogeneous observed"] == 0 and disjoint["phi"] == -1 and disjoint["dispersion"] == 0
    for failed, kappa in (([[1, 1], [0, 0]], 1), ([[1, 0], [0, 1]], -1)):
        sums = sums_of(failed)
        assert eco.agreement(sums["joint"], sums["columns"][0], 2)["kappa"][0, 1] == kappa


def test_all_combinations_once_are_independent():
    rates = rates_of(list(product((0, 1), repeat=5)))
    for kind in ("systemic", "consistent", "homogeneous"):
        assert abs(rates[f"{kind} difference"]) < 1e-15
    assert math.isclose(rates["dispersion"], 1) and abs(rates["phi"]) < 1e-15


def test_invariances():
    failed = with_hardness(500, 4, 0)
    rates, rng = rates_of(failed), np.random.default_rng(1)
    for other in (failed[rng.permutation(500)][:, [2, 0, 3, 1]], np.repeat(failed, 3, axis=0)):
        for name, value in rates_of(other).items():
            assert math.isclose(value, rates[name], rel_tol=1e-12), name
    flipped = rates_of(1 - failed)
    for name in ("observed", "expected", "ratio"):
        assert math.isclose(flipped[f"systemic {name}"], rates[f"consistent {name}"], rel_tol=1e-12)
    assert math.isclose(flipped["dispersion"], rates["dispersion"])


def test_undefined_is_nan_and_shown_so():
    rates = rates_of([[0, 1], [0, 0], [0, 1]])  # a model that never fails: S_exp = 0
    assert math.isnan(rates["systemic ratio"]) and math.isnan(rates["phi"])
    assert [eco.show(x) for x in (0.0, 0.25, 2.6e-5, 2e6)] == ["0.0000", "0.2500", "2.6e-05", "2e+06"]
    assert eco.show(rates["phi"]) == eco.estimate(math.nan, (1, 2)) == "undefined"
    assert eco.plain(dict(a=np.array([np.nan, 1.0]), b=np.array(np.inf))) == dict(a=[None, 1.0], b=None)


@pytest.mark.parametrize("k", [1, 2, 31, 32, 33, 64, 100])
@pytest.mark.parametrize("n_groups", [1, 3])
def test_packed_counts_are_the_unpacked_ones(k, n_groups):
    rng = np.random.default_rng(k)
    n = 70_001 if k == 33 else 777  # more than one block, and no multiple of anything
    failed = (rng.random((n, k)) < np.linspace(0, 1, k)).astype(np.uint8)
    group = rng.integers(n_groups, size=n)
    words = eco.pack_bits(failed)
    assert words.shape == (n, -(-k // 32)) and np.array_equal(eco.unpack_bits(words, k), failed)
    hist, columns = eco.popcount_histogram(torch.from_numpy(words.copy()), k, torch.from_numpy(group), n_groups)
    for g in range(n_groups):
        assert np.array_equal(hist[g], np.bincount(failed[group == g].sum(1, dtype=int), minlength=k + 1))
        assert np.array_equal(columns[g], failed[group == g].sum(0, dtype=int))
    sums = eco.tally(failed, group, n_groups)
    assert np.array_equal(sums["hist"], hist) and np.array_equal(sums["columns"], columns)
    real = failed.astype(int)
    assert np.array_equal(sums["joint"], real.T @ real) and np.array_equal(np.diag(sums["joint"]), columns.sum(0))
    assert np.array_equal(sums["buckets"].sum(1), np.concatenate([hist, columns], 1))


def test_a_word_with_its_sign_bit_set():
    hist, columns = eco.popcount_histogram(torch.full((3, 1), -1, dtype=torch.int32), 32)
    assert hist[0, 32] == 3 and hist.sum() == 3 and (columns == 3).all()


def test_profiles_count_who_failed_whom():
    failed, group = with_hardness(400, 3, 2), np.arange(400) % 2
    profiles = eco.tally(failed, group, 2)["profiles"]
    for g, outcome in product((0, 1), product((0, 1), repeat=3)):
        assert profiles[g, outcome[0] + 2 * outcome[1] + 4 * outcome[2]] == ((failed == outcome).all(1) & (group == g)).sum()


def test_buckets():
    assert np.array_equal(eco.bucket(np.arange(4096), 4096), np.arange(4096))  # a person each
    sizes = np.bincount(eco.bucket(np.arange(100_000), 100_000), minlength=4096)
    assert len(sizes) == 4096 and 0.8 < sizes.var() / sizes.mean() < 1.2  # like balls thrown into urns: Poisson


def test_bootstrap_has_the_variance_of_the_mean():
    """Of the observed rate, binomial; up to 4,096 people exactly the usual bootstrap, beyond by buckets. 4 standard errors of an sd."""
    for n in (1000, 30_000):
        failed = with_hardness(n, 3, 5)
        failed = failed[np.argsort(failed.sum(1))]  # sorted people: buckets must not be runs of them
        sums = sums_of(failed)
        h, c = eco.resample(sums["buckets"][0], 4000, 0)
        p = sums["hist"][0] / n
        error = np.sqrt(p * (1 - p) / n)
        got = (h / h.sum(1, keepdims=True)).std(0)
        assert (abs(got / error - 1) < 4 * math.sqrt(1 / 8000 + 1 / (2 * 4096))).all(), got / error
        assert np.allclose(c.mean(0) / n, failed.mean(0), rtol=0.02)


def test_bootstrap_covers():
    """H_obs − H_exp of 300 independent ecosystems: its 95 % interval holds 0 in 91 to 98 % of them. Resampling only the observed rate
    (the usual mistake) gives intervals twice as wide and coverage 1."""
    rng, inside, wide = np.random.default_rng(0), 0, 0
    for i in range(300):
        failed = rng.random((500, 3)) < [0.2, 0.3, 0.4]
        sums = sums_of(failed)
        h, c = eco.resample(sums["buckets"][0], 300, i)
        low, high = eco.interval(eco.homogeneity(h, c)["homogeneous difference"])
        inside += low <= 0 <= high
        fixed = eco.homogeneity(sums["hist"][0], sums["columns"][0])["homogeneous expected"]
        low, high = eco.interval((h[:, 0] + h[:, 3]) / h.sum(1) - fixed)
        wide += low <= 0 <= high
    assert 0.91 <= inside / 300 <= 0.98, inside
    assert wide > inside


def test_paired_resamples_draw_the_same_people():
    failed = with_hardness(300, 4, 3)
    a, b = (sums_of(failed[:, columns])["buckets"][0] for columns in ([0, 1], [1, 0]))
    assert np.array_equal(eco.resample(a, 50, 7)[1], eco.resample(b, 50, 7)[1][:, ::-1])


def test_permutation_null():
    n, failures, rng = 797, np.round(np.array(ERRORS) * 797).astype(int), np.random.default_rng(0)
    all_fail, none_fails = eco.permutation_null(n, failures, 100_000, rng)
    mean = n * math.prod(failures / n)
    assert abs(all_fail.mean() - mean) < 4 * 1.43 / math.sqrt(1e5) and abs(all_fail.std() - 1.43) < 0.02
    assert abs(none_fails.mean() - n * math.prod(1 - failures / n)) < 4 * none_fails.std() / math.sqrt(1e5)
    columns = [np.arange(n) < f for f in failures]  # by shuffling
    shuffled = np.array([np.sum([rng.permutation(column) for column in columns], 0) for _ in range(3000)])
    both = np.array([(shuffled == 5).sum(1), (shuffled == 0).sum(1)])
    assert np.allclose(both.mean(1), [all_fail.mean(), none_fails.mean()], atol=4 * both.std(1).max() / math.sqrt(3000))
    assert abs((both.sum(0)).std() / (all_fail + none_fails).std() - 1) < 4 / math.sqrt(2 * 3000)  # jointly drawn


def test_permutation_null_of_two_models_is_fishers():
    n, a, b = 30, 12, 9
    all_fail, none_fails = eco.permutation_null(n, [a, b], 200_000, np.random.default_rng(0))
    assert np.array_equal(none_fails, n - a - b + all_fail)
    for x in range(10):
        p = math.comb(a, x) * math.comb(n - a, b - x) / math.comb(n, b)
        assert abs((all_fail == x).mean() - p) < 4 * math.sqrt(p * (1 - p) / 2e5) + 1e-12
        tail = sum(math.comb(a, i) * math.comb(n - a, b - i) / math.comb(n, b) for i in range(x + 1))
        assert math.isclose(eco.hypergeometric_tail(x, n, a, b), tail, rel_tol=1e-10)
    assert eco.p_value(5, np.array([1, 5, 7, 2])) == 3 / 5


def test_goodness_of_fit():
    e = np.array([0.3, 0.6])
    np.testing.assert_allclose(eco.profile_probabilities(e), [0.28, 0.12, 0.42, 0.18])
    counts, expected = np.array([30, 10, 40, 20]), 100 * eco.profile_probabilities(e)
    chi2, g2, dof, p = eco.goodness_of_fit(counts, expected, 2)
    assert math.isclose(chi2, 4 / 28 + 4 / 12 + 4 / 42 + 4 / 18) and dof == 1
    assert math.isclose(g2, 2 * sum(o * math.log(o / e) for o, e in zip(counts, expected)))
    assert math.isclose(p, math.erfc(math.sqrt(g2 / 2)), rel_tol=1e-9)  # χ² with one degree of freedom is a squared normal
    pooled = eco.goodness_of_fit(np.array([50, 45, 3, 2]), np.array([50, 44, 4, 2]), 0)
    assert pooled[2] == 2 and math.isclose(pooled[0], 1 / 44 + 1 / 6)


@pytest.mark.parametrize("alpha, delta, last", [(0.3, 1.0, 0.02585), (0.1, 0.5, 0.00385), (0.5, 1.0, 0.04289)])
def test_two_class_null(alpha, delta, last):
    p = eco.two_class_null(ERRORS, alpha, delta)
    hard = [(1 + delta) * e for e in ERRORS]
    easy = [(1 - alpha * delta / (1 - alpha)) * e for e in ERRORS]
    np.testing.assert_allclose(p, alpha * by_subsets(hard) + (1 - alpha) * by_subsets(easy), atol=1e-12)
    assert abs(p[5] - last) < 5e-6 and math.isclose(p @ np.arange(6), sum(ERRORS))
    np.testing.assert_allclose(eco.two_class_null(ERRORS, alpha, 0), eco.poisson_binomial(ERRORS), atol=1e-15)


def test_two_class_frontier():
    target = eco.two_class_null(ERRORS, 0.3, 0.7)[5]
    assert math.isclose(eco.two_class_frontier(ERRORS, 0.3, [5], target), 0.7, rel_tol=1e-9)
    assert eco.two_class_frontier(ERRORS, 0.3, [5], 0.9) is None
    assert math.isclose(eco.largest_delta(ERRORS, 0.3), 1 / 0.473024 - 1) and math.isclose(eco.largest_delta([0.1], 0.5), 1)
    with pytest.raises(ValueError, match="allow 0 to 1.1141"):
        eco.two_class_null(ERRORS, 0.3, 1.2)


def test_stratified_null():
    failed = with_hardness(60, 3, 4)
    whole = eco.stratified_null(failed.sum(0)[None], np.array([60]))
    np.testing.assert_allclose(whole, eco.poisson_binomial(failed.mean(0)), atol=1e-15)
    one_each = eco.stratified_null(failed.astype(int), np.ones(60, int))
    np.testing.assert_allclose(one_each, np.bincount(failed.sum(1), minlength=4) / 60, atol=1e-15)
    two = eco.stratified_null(np.stack([failed[:20].sum(0), failed[20:].sum(0)]), np.array([20, 40]))
    want = by_subsets(failed[:20].mean(0)) / 3 + by_subsets(failed[20:].mean(0)) * 2 / 3
    np.testing.assert_allclose(two, want, atol=1e-14)


def test_rasch_finds_the_slope():
    for slope in (0.0, 1.5):
        failed = with_hardness(5000, 6, 8, slope)
        hist, columns = np.bincount(failed.sum(1), minlength=7), failed.sum(0, dtype=int)
        a, error, p, both = eco.fit_rasch(hist, columns)
        # at slope 0 the data speak of a², through pair correlations of about 0.15·a²: 15 pairs, 5,000 people, 4 standard errors
        assert a**2 < 4 / math.sqrt(15 * 5000) / 0.15 if slope == 0 else abs(a - slope) < 3 * error and 0.02 < error < 0.08
        assert abs(p - hist / 5000).max() < 4 * math.sqrt(0.25 / 5000)
        np.testing.assert_allclose(np.diag(both) if slope == 0 else p @ np.arange(7),
                                   failed.mean(0) ** 2 if slope == 0 else failed.mean(0).sum(), atol=2e-3)
    pair = (failed[:, 0] & failed[:, 4]).mean()
    assert abs(both[0, 4] - pair) < 4 * math.sqrt(pair / 5000)


def test_rasch_likelihood_is_at_its_maximum():
    """Against a likelihood over people and answers, with a sum over z of its own; the fit uses sufficient statistics only."""
    failed = with_hardness(300, 3, 9)
    a, _, p, _ = eco.fit_rasch(np.bincount(failed.sum(1), minlength=4), failed.sum(0, dtype=int))
    z = np.linspace(-7, 7, 1001)
    w = np.exp(-(z**2) / 2) / np.exp(-(z**2) / 2).sum()

    def log_likelihood(b, a):
        q = 1 / (1 + np.exp(-(np.array(b)[:, None] + a * z)))  # (k, nodes)
        return sum(math.log(np.prod([q[j] if row[j] else 1 - q[j] for j in range(3)], 0) @ w) for row in failed)

    def easiness(error, a):  # the b whose model fails that share of people, by bisection
        low, high = -20.0, 20.0
        for _ in range(60):
            low, high = ((low + high) / 2, high) if w @ (1 / (1 + np.exp(-((low + high) / 2 + a * z)))) < error else (low, (low + high) / 2)
        return low

    def profile(a):
        return log_likelihood([easiness(e, a) for e in failed.mean(0)], a)

    assert profile(a) > max(profile(a * 0.9), profile(a * 1.1)) and profile(a) > profile(0.01) + 2
    assert math.isclose(p.sum(), 1, rel_tol=1e-9)


def test_rasch_with_a_model_that_always_fails_and_one_that_never_does():
    failed = with_hardness(2000, 3, 10)
    plain = eco.fit_rasch(np.bincount(failed.sum(1), minlength=4), failed.sum(0, dtype=int))
    wider = np.concatenate([np.ones((2000, 1), np.uint8), failed, np.zeros((2000, 1), np.uint8)], 1)
    a, _, p, both = eco.fit_rasch(np.bincount(wider.sum(1), minlength=6), wider.sum(0, dtype=int))
    assert math.isclose(a, plain[0], rel_tol=1e-8) and p[0] == 0 and p[5] == 0
    np.testing.assert_allclose(p[1:5], plain[2], atol=1e-10)
    assert math.isclose(both[0, 1], failed[:, 0].mean(), abs_tol=2e-3)


def test_agreement_by_hand():
    answers = np.array([[1, 1], [2, 1], [3, 3], [2, 3], [1, 2], [2, 2]])
    labels = np.array([1, 1, 1, 2, 2, 2])
    right = answers == labels[:, None]  # 1 0 0 1 0 1 and 1 1 0 0 1 1
    sums = sums_of(~right)
    found = eco.agreement(sums["joint"], sums["columns"][0], 6) | eco.answer_agreement(answers, labels, 3)
    assert math.isclose(found["ratio"][0, 1], (1 / 6) / (1 / 2 * 1 / 3))
    assert math.isclose(found["kappa"][0, 1], (3 / 6 - 1 / 2) / (1 / 2), abs_tol=1e-12)
    assert math.isclose(found["correlation"][0, 1], np.corrcoef(right.T)[0, 1], abs_tol=1e-12)
    assert found["same_wrong"][0, 1] == 1  # both wrong once, with the same answer
    chance = 1 / 2 * 2 / 3 + 1 / 2 * 1 / 3 / 2
    assert math.isclose(found["capa"][0, 1], (3 / 6 - chance) / (1 - chance))
    silent = eco.answer_agreement(np.where(answers == 3, 0, answers), labels, 3)
    assert math.isclose(silent["same_wrong"][0, 1], 0, abs_tol=1e-12)  # two missing answers are no agreement


def test_subset_curve_is_the_mean_over_subsets():
    from itertools import combinations

    failed = with_hardness(200, 5, 11)
    observed, independent = eco.subset_curve(np.bincount(failed.sum(1), minlength=6), failed.mean(0))
    for m in range(1, 6):
        subsets = list(combinations(range(5), m))
        assert math.isclose(observed[m - 1], np.mean([failed[:, s].all(1).mean() for s in subsets]))
        assert math.isclose(independent[m - 1], np.mean([failed[:, s].mean(0).prod() for s in subsets]))


def test_best_subset():
    failed = with_hardness(203, 6, 12)
    from itertools import combinations

    chosen, s, exact = eco.best_subset(failed, 3)
    want = min(failed[:, c].all(1).mean() for c in combinations(range(6), 3))
    assert exact and math.isclose(s, want) and math.isclose(failed[:, chosen].all(1).mean(), s)
    many = with_hardness(203, 60, 13)
    chosen, s, exact = eco.best_subset(many, 5)  # 5.5 million subsets: greedy
    assert not exact and len(set(chosen)) == 5 and math.isclose(many[:, chosen].all(1).mean(), s)
    assert s <= min(many[:, c].all(1).mean() for c in ([0, 1, 2, 3, 4], [55, 56, 57, 58, 59]))
    many[:, 0], many[:, 1] = 1 - many[:, 7], many[:, 7]  # two models that never fail the same person: nothing is left to gain
    chosen, s, _ = eco.best_subset(many, 5)
    assert s == 0 and len(set(chosen)) == 5


def test_improvement_by_hand():
    before = np.array([[1, 1, 1], [1, 1, 1], [1, 0, 1], [1, 0, 0], [1, 0, 0], [0, 1, 1], [0, 0, 0]], np.uint8)
    after = np.array([1, 0, 0, 0, 1, 1, 0], np.uint8)
    case = eco.improvement(before, after, 0)
    assert case["initial"].tolist() == [2, 1, 2] and case["improved"].tolist() == [1, 1, 1] and case["declined"].tolist() == [0, 0, 1]
    assert case["net"] == 2 == before[:, 0].sum(dtype=int) - after.sum(dtype=int)
    assert case["systemic_share"] == 1 / 3 and case["initial_share"] == 2 / 5 and case["expected"] == 3 * 2 / 5
    assert math.isclose(case["p"], 1 - math.comb(2, 2) * math.comb(3, 1) / math.comb(5, 3))  # P(X ≤ 1) = 1 − P(X = 2)
    none = eco.improvement(before, before[:, 0], 0)
    assert math.isnan(none["systemic_share"]) and none["p"] == 1


def test_ragged_with_everybody_met_is_the_plain_case():
    failed = with_hardness(300, 3, 14)
    rates, found = eco.ragged_homogeneity(failed)
    plain = rates_of(failed)
    for kind, (observed, expected) in found.items():
        assert math.isclose(observed.mean(), plain[f"{kind} observed"]) and math.isclose(expected.mean(), plain[f"{kind} expected"])
    outcomes = np.array([[1, 2], [1, 1], [0, 0], [2, 1], [0, 1]])
    rates, found = eco.ragged_homogeneity(outcomes)
    assert rates.tolist() == [1 / 2, 3 / 4]
    assert found["systemic"][0].tolist() == [True, True, False, True, False]
    np.testing.assert_allclose(found["systemic"][1], [1 / 2, 3 / 8, 3 / 8, 3 / 4, 3 / 8])
    np.testing.assert_allclose(found["consistent"][1], [1 / 2, 1 / 8, 1 / 8, 1 / 4, 1 / 8])
    weighted = eco.ragged_homogeneity(outcomes, np.array([1, 2, 0, 1, 3]))[0]
    np.testing.assert_allclose(weighted, [3 / 6, 6 / 6])


def test_holm():
    np.testing.assert_allclose(eco.holm([0.01, 0.04, 0.03, 0.5]), [0.04, 0.09, 0.09, 0.5])
    np.testing.assert_allclose(eco.holm([0.9, 0.8]), [1, 1])


def test_dealing_people_to_groups():
    """Against shuffling the labels of people one by one."""
    failed, group = with_hardness(120, 2, 15), np.arange(120) < 50
    profiles = eco.tally(failed, group.astype(int), 2)["profiles"]
    rng = np.random.default_rng(0)
    draws = eco.permute_groups(profiles[1], profiles[0], 4000, rng)

    def contrast(group):
        d = [rates_of(failed[who])["homogeneous difference"] for who in (group, ~group)]
        return d[0] - d[1]

    shuffled = np.array([contrast(rng.permutation(group)) for _ in range(1000)])
    assert abs(draws.mean() - shuffled.mean()) < 4 * shuffled.std() / math.sqrt(1000)
    assert abs(draws.std() / shuffled.std() - 1) < 4 / math.sqrt(2000)


@pytest.mark.parametrize("truth, strength", [("copula", 0.4), ("rasch", 1.2)])
def test_simulated_truth(truth, strength):
    people = eco.Simulated(300_000, np.array([0.1, 0.2, 0.4]), truth, strength, 3)
    sums = eco.tally(people, detail=False)
    p, errors = people.expected()
    observed = sums["hist"][0] / 300_000
    assert (abs(observed - p) < 4 * np.sqrt(p * (1 - p) / 3e5)).all()
    assert truth == "rasch" or np.allclose(errors, [0.1, 0.2, 0.4], atol=1e-9)
    again = eco.Simulated(300_000, np.array([0.1, 0.2, 0.4]), truth, strength, 3)[slice(eco.BLOCK, 2 * eco.BLOCK)]
    assert np.array_equal(again, people[slice(eco.BLOCK, 2 * eco.BLOCK)]) and not np.array_equal(again, people[slice(0, eco.BLOCK)])


# ---------------------------------------------------------------------------------------------- the claims


def run(*command, cwd=HOUSE, **env):
    command = [sys.executable, *map(str, command)]
    return subprocess.run(command, cwd=cwd, env={**os.environ, **env}, capture_output=True, text=True, timeout=300)


FEW = ("--quiet", "--boot", 200, "--permutations", 2000)


def tool(tmp_path, *arguments):
    """A task, in this process → what it prints, and its results.json."""
    args = eco.parse_args([str(x) for x in (*arguments, *FEW, "--out", tmp_path / "out")])
    with contextlib.redirect_stdout(io.StringIO()) as text:
        eco.TASKS[args.task](args)
    return text.getvalue(), json.loads((tmp_path / "out" / "results.json").read_text())


def test_the_default_run_shows_the_paper(tmp_path):
    done = run(HOUSE / "ecosystem.py", *FEW, "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    text, figures = done.stdout, json.loads((tmp_path / "out" / "results.json").read_text())
    m = figures["models"]["measures"]
    assert m["systemic observed"] > 20 * m["systemic expected"] and m["homogeneous ratio"] > 1.1  # broken joins give about 1
    assert m["interval"]["homogeneous difference"][0] > 0.05 and m["p"]["homogeneous"] < 0.001
    assert figures["models"]["hardness"]["nulls"]["within each category"][-1] < m["systemic observed"] / 3
    gain = figures["improvement"]
    assert len(gain["cases"]) == 8 and gain["systemic_share"] < 0.75 * gain["initial_share"]  # counting at t + 1 turns it round
    assert [row["time"] for row in figures["time"]] == ["year 1", "year 2", "year 3"]
    assert text.split()[-1].endswith("report.png") and Path(text.split()[-1]).stat().st_size > 20_000
    assert "nan" not in text.lower().replace("other, ", "").split() and "inf" not in text.split()


# ---------------------------------------------------------------------------------------------- the tool


def write(path, header, rows):
    path.write_text("\n".join(",".join(map(str, row)) for row in [header, *rows]) + "\n")
    return path


def test_wide_long_npz_and_npy_agree(tmp_path):
    failed = with_hardness(400, 3, 20)
    group = np.array(["a", "b"])[np.arange(400) % 2]
    models = ["x", "y", "z"]
    wide = write(tmp_path / "wide.csv", ["id", *models, "group"], [[i, *row, g] for i, (row, g) in enumerate(zip(1 - failed, group))])
    long = write(tmp_path / "long.csv", ["model", "id", "group", "fail"],
                 [[models[j], i, group[i], failed[i, j]] for j in (0, 1, 2) for i in range(400)])
    labelled = write(tmp_path / "labels.csv", ["id", "label", "group", *models],
                     [[i, i % 5, group[i], *((i + f) % 5 for f in failed[i].tolist())] for i in range(400)])
    np.savez(tmp_path / "a.npz", correct=failed == 0, models=models, group=group, ids=np.arange(400))
    np.save(tmp_path / "b.npy", failed.astype(bool))
    np.save(tmp_path / "c.npy", eco.pack_bits(failed))
    files = [(wide, "--outcome", "correct"), (long,), (labelled,), (tmp_path / "a.npz",), (tmp_path / "b.npy", "--outcome", "fail"),
             (tmp_path / "c.npy", "--k", 3)]
    found = []
    for file, *flags in files:
        _, figures = tool(tmp_path, "report", file, *flags, "--no_plot")
        found.append(figures[file.name])
        assert found[-1]["models"]["measures"] == found[0]["models"]["measures"], file
        assert file.suffix == ".npy" or found[-1]["groups"] == found[0]["groups"], file
    want = rates_of(failed)
    for name, value in want.items():
        assert math.isclose(found[0]["models"]["measures"][name], value), name
    assert np.isclose(found[0]["groups"]["groups"]["models, b"]["homogeneous difference"], rates_of(failed[1::2])["homogeneous difference"])


def test_an_npy_file_is_mapped_not_read(tmp_path):
    failed = with_hardness(70_000, 5, 21)
    np.save(tmp_path / "a.npy", failed)
    data = eco.read_table(tmp_path / "a.npy", SimpleNamespace(k=None, outcome="correct"))
    assert isinstance(data.failed.array, np.memmap)
    assert np.array_equal(eco.tally(data.failed)["hist"], eco.tally(1 - failed)["hist"])


def test_missing_cells(tmp_path):
    path = write(tmp_path / "a.csv", ["id", "x", "y", "z"], [["a", 0, 1, 1], ["b", 1, "", 0], ["c", 1, 1, 1], ["d", 0, 0, 1],
                                                           ["e", 0, 0, 0]])
    one = tool(tmp_path, "report", path, "--outcome", "fail", "--missing", "fail")[1]["a.csv"]["models"]["measures"]
    assert np.allclose(one["errors"], [2 / 5, 3 / 5, 3 / 5]) and one["n"] == 5
    two = tool(tmp_path, "report", path, "--outcome", "fail", "--missing", "drop")[1]["a.csv"]["models"]["measures"]
    assert np.allclose(two["errors"], [1 / 4, 2 / 4, 3 / 4]) and two["n"] == 4
    text, figures = tool(tmp_path, "report", path, "--outcome", "fail", "--missing", "ignore")
    assert np.allclose(figures["a.csv"]["rates"], [2 / 5, 2 / 4, 3 / 5]) and "met 2 to 3" in text
    assert math.isclose(figures["a.csv"]["systemic"]["observed"], 1 / 5)


def test_improve_prints_the_tables(tmp_path):
    rows = [[i, *np.random.default_rng(i).integers(2, size=4)] for i in range(60)]
    path = write(tmp_path / "a.csv", ["id", "x@2020", "y@2020", "x@2021", "y@2021"], rows)
    text, figures = tool(tmp_path, "improve", path, "--outcome", "fail", "--min_drop", -1)
    cases = figures["a.csv"]["improvement"]["cases"]
    assert [case["model"] for case in cases] == ["x", "y"] and text.count("by the number of other models") == 2
    table = np.array(rows)
    assert cases[1]["improved"][1] == ((table[:, 2] == 1) & (table[:, 4] == 0) & (table[:, 1] == 1)).sum()


def test_two_ecosystems_on_the_same_people(tmp_path):
    """Models homogeneous in one group only, humans alike in both: the difference in differences is the contrast of the models."""
    rng = np.random.default_rng(0)
    tone, shared = np.repeat([12, 56], 400), rng.random(800) < 0.4
    truth = rng.integers(2, size=800)
    models = [np.where(tone == 56, shared, rng.random(800) < 0.4) for _ in range(2)]
    humans = [rng.random(800) < 0.3 for _ in range(2)]
    rows = zip(range(800), tone, truth, *(truth ^ x for x in models + humans))
    path = write(tmp_path / "a.csv", ["image_id", "skin_tone", "malignant", "m1", "m2", "human:a", "human:b"], rows)
    text, figures = tool(tmp_path, "ddi", path, "--contrast", "56,12")
    [row] = figures["a.csv"]["groups"]["contrasts"]
    assert row["models"]["contrast"] > 0.35 and row["models"]["p"] < 0.01 and abs(row["human"]["contrast"]) < 0.12
    assert math.isclose(row["difference"]["value"], row["models"]["contrast"] - row["human"]["contrast"])
    assert row["difference"]["interval"][0] > 0.2 and "difference of the two" in text
    assert figures["a.csv"]["human"]["names"] == ["human:a", "human:b"]


def test_the_same_ecosystem_twice_differs_by_nothing(tmp_path):
    """Not even in a resample: both sides draw the same people."""
    failed, group = with_hardness(200, 2, 30), np.arange(200) % 2
    path = write(tmp_path / "a.csv", ["id", "group", "x", "y", "human:x", "human:y"],
                 [[i, g, *row, *row] for i, (g, row) in enumerate(zip(group, failed))])
    _, figures = tool(tmp_path, "report", path, "--outcome", "fail", "--second", "human:", "--no_plot")
    [row] = figures["a.csv"]["groups"]["contrasts"]
    assert row["difference"] == dict(value=0, interval=[0, 0]) and row["models"]["interval"][1] - row["models"]["interval"][0] > 0.01


def hapi_folder(root, rng):
    """A small archive in HAPI's layout, with rows in another order in every file, and the counts it must give."""
    truth, want = rng.integers(2, size=120), {}
    folder = root / "tasks" / "sa" / "waimai"
    folder.mkdir(parents=True)
    example = [f"e{i}" for i in range(120)]
    labels = [dict(example_id=e, true_label=int(y)) for e, y in [*zip(example, truth), ("nobody predicts this one", 0)]]
    (folder / "labels.json").write_text(json.dumps(labels))
    for api in ("google_sa", "amazon_sa", "baidu_sa", "microsoft_sa"):
        (folder / api).mkdir()
        for date in ("20-03-01", "21-02-05"):
            wrong = rng.random(120) < 0.3
            want[api, date[:2]] = wrong.mean()
            rows = [dict(example_id=e, predicted_label=int(y ^ w), confidence=0.5) for e, y, w in zip(example, truth, wrong)]
            (folder / api / f"{date}.json").write_text(json.dumps([rows[i] for i in rng.permutation(120)]))
    return want


def test_hapi_from_folder_and_archive(tmp_path):
    want = hapi_folder(tmp_path / "hapi", np.random.default_rng(1))
    with tarfile.open(tmp_path / "hapi.tar.gz", "w:gz") as archive:
        archive.add(tmp_path / "hapi", "hapi")
    texts = []
    for root in (tmp_path / "hapi", tmp_path / "hapi.tar.gz"):
        text, figures = tool(tmp_path, "hapi", "--data", root, "--min_drop", -1)
        texts.append(text)
        m = figures["datasets"]["sa/waimai 2021"]
        assert np.allclose(m["errors"], [want[f"{api}_sa", "21"] for api in ("amazon", "baidu", "google")])  # by id, not by order
        assert len(figures["improvements"]) == 3 and m["k"] == 3  # the fourth provider is none of the paper's
    assert texts[0] == texts[1] and "homogeneous outcomes above the baseline everywhere" in texts[0]


def test_alpaca_from_folder(tmp_path):
    for model, shift in (("a", 0), ("b", 1), ("c", 2)):
        (tmp_path / model).mkdir()
        rows = [dict(instruction=f"q{i}", preference=None if i == shift else 1 + (i * 7 + shift) % 10 / 9, dataset="koala")
                for i in range(30)]
        (tmp_path / model / "annotations.json").write_text(json.dumps(rows))
    _, figures = tool(tmp_path, "alpaca", "--data", tmp_path, "--models", "a,b,c")
    m = figures["models"]["measures"]
    assert m["n"] == 27  # three without a preference
    assert math.isclose(m["errors"][1], np.mean([1 + (i * 7 + 1) % 10 / 9 <= 1.5 for i in range(3, 30)]))


def test_simulate_says_where_the_truth_lies(tmp_path):
    text, figures = tool(tmp_path, "simulate", "--n", 20000, "--k", 4, "--rho", 0.5)
    m, truth = figures["models"]["measures"], figures["models"]["truth"]
    assert text.count("inside") >= 9 and m["interval"]["dispersion"][0] < truth["dispersion"] < m["interval"]["dispersion"][1]


def test_torchrun_gives_the_same_integers(tmp_path):
    """200,000 people are four blocks: shared out between two or three processes, every figure stays the same."""
    np.save(tmp_path / "a.npy", with_hardness(200_000, 6, 22))
    command = ["ecosystem.py", "report", tmp_path / "a.npy", "--outcome", "fail", "--no_plot", *FEW]
    texts = [run(*command, "--out", tmp_path / "1").stdout]
    for n in (2, 3):
        launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={n}"]
        done = run(*launch, *command, "--out", tmp_path / str(n), OMP_NUM_THREADS="1")
        assert done.returncode == 0, done.stderr
        texts.append(done.stdout)
    assert len({text.rsplit("\n", 2)[0] for text in texts}) == 1 and "200,000 people" in texts[0]
    results = [json.loads((tmp_path / n / "results.json").read_text())["a.npy"] for n in "123"]
    assert results[0] == results[1] == results[2]


GOOD = ["a,0,1", "b,1,0", "c,1,1", "d,0,0"]


@pytest.mark.parametrize("lines, flags, message", [
    (["id,x,y", *GOOD], [], "no column label: name the one with the truth by --label; if the cells are 0 and 1, say --outcome correct"),
    (["id,x,y", "a,0,1", "b,0.8F,0"], ["--outcome", "fail"], 'row 3, column "x": 0.8F is neither 0 nor 1'),
    (["id,x,y", "a,0,1", "b,2,0"], ["--outcome", "correct"], 'row 3, column "x": 2 is neither 0 nor 1'),
    (["id,label,x,y", "a,1,1,1", "b,2,1,0.8F"], [], 'row 3, column "y": 0.8F begins like a number and is none'),
    (["id,label,x,y", "a,1,1,1", "b,,1,2"], [], 'row 3, column "label": the label is missing'),
    (["id,label,x,y", "a,cat,1,0", "b,dog,0,1"], [], "no model is ever right"),
    (["id,x,y", *GOOD, "b,1,1"], ["--outcome", "fail"], "1 duplicate ids, the first in row 6: b, also in row 3"),
    (["id,x,y", "a,0,1", "b,1"], ["--outcome", "fail"], "row 3 has 2 cells, the header 3"),
    (["id,x,y", "a,0,1", "b,,1"], ["--outcome", "fail"], 'row 3, column "x": no outcome. --missing fail'),
    (["id,label,x,y", "a,1,1,1", "b,2,1,"], [], 'row 3, column "y": no outcome. --missing fail'),
    (["id,x,y", "a,0,", "b,1,"], ["--outcome", "fail", "--missing", "ignore"], 'column "y" is empty'),
    (["id,x", "a,0", "b,1"], ["--outcome", "fail"], "1 model column: with a single model observed and expected are the same"),
    (["id,x,y"], ["--outcome", "fail"], "no rows"),
    (["id,x,x", *GOOD], ["--outcome", "fail"], "column 3 of the header is another x"),
    (["id,x,,y", "a,0,1,1"], ["--outcome", "fail"], "column 3 of the header is empty"),
    (["id,group,x,y", "a,g,0,1", "b,g,0,1", "c,h,1,0"], ["--outcome", "fail"], 'row 4, column "group": "h" is a group of one'),
    (["id,group,x,y", "a,g,0,1", "b,g,0,1"], ["--outcome", "fail", "--contrast", "g,h"], "--contrast h: no such group; there are g"),
    (["id,x@1,y@1,x@2", "a,0,1,1"], ["--outcome", "fail"], 'column "y@1" does not pair up: there is no "y@2"'),
    (["id,x,y", *GOOD], ["--outcome", "fail", "--group", "g"], "no column g; there are id, x, y"),
    (["id,x,y", *GOOD], ["--outcome", "fail", "--models", "x,q"], "no column q; there are id, x, y"),
    (["id,x,y", *GOOD], ["--outcome", "fail", "--best_subset", "2"], "--best_subset 2: want 1 to 1"),
    (["id,x,y", *GOOD], ["--outcome", "fail", "--second", "human:"], "0 column of human"),
    (["id,model,correct", "a,x,1", "a,y,0", "a,x,0"], [], "row 4: a with x again, first in row 2"),
    (["id,model,correct,group", "a,x,1,g", "a,y,0,h"], [], 'row 3, column "group": h, but g for the same person in row 2'),
    (["who,model,correct", "a,x,1", "a,y,0"], [], "a long table needs a column that names the person"),
])
def test_bad_tables(lines, flags, message, tmp_path, capsys):
    path = tmp_path / "t.csv"
    path.write_text("\n".join(lines) + "\n")
    args = eco.parse_args(["report", str(path), "--boot", "20", "--permutations", "10", "--out", str(tmp_path), *flags])
    with pytest.raises(SystemExit) as stop:
        eco.report(args)
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.startswith("error: ") and message in err and err.count("\n") == 1, err


def test_bad_arrays(tmp_path, capsys):
    np.savez(tmp_path / "empty.npz", x=np.ones(3))
    np.savez(tmp_path / "short.npz", fail=np.ones((3, 2), bool), group=["a", "b"])
    np.save(tmp_path / "two.npy", np.array([[0, 1], [1, 2]], np.uint8))
    np.save(tmp_path / "float.npy", np.ones((3, 2)))
    np.save(tmp_path / "packed.npy", np.array([[5], [9]], np.int32))
    (tmp_path / "broken.npy").write_text("x")
    for name, flags, message in [
        ("empty.npz", [], "holds x; want fail or correct (people, models), or predictions and labels"),
        ("short.npz", [], "group has shape (2,), want (3,) beside fail (3, 2)"), ("two.npy", [], "does a 1 mean success or failure"),
        ("two.npy", ["--outcome", "fail"], "row 2, column 2: 2 is neither 0 nor 1"), ("float.npy", [], "want bool or uint8"),
        ("packed.npy", [], "how many models? Say --k, 1 to 32"), ("packed.npy", ["--k", "3"], "row 2: a bit above model 3 is set"),
        ("broken.npy", [], "not an .npy file"), ("none.csv", [], "no such file"),
    ]:
        with pytest.raises(SystemExit):
            eco.report(eco.parse_args(["report", str(tmp_path / name), "--boot", "20", "--out", str(tmp_path), *flags]))
        err = capsys.readouterr().err
        assert message in err and err.count("\n") == 1, err


@pytest.mark.parametrize("arguments, message", [
    (["report"], "which file?"), (["nothing"], "invalid choice"), (["hapi", "--data", "nowhere"], "neither a folder nor a whole archive"),
    (["hapi", "--data", "."], "no files tasks/fer|scr|sa"), (["alpaca", "--data", "."], "no list of instruction and preference"),
    (["report", "a.csv", "--contrast", "a"], "want two groups, A,B"), (["simulate", "x.csv"], "reads no files"),
    (["--boot", "3"], "3 is not between 20"), (["--device", "abacus"], "--device abacus cannot be had here"),
    (["improve", "a.csv", "--outcome", "fail"], "columns must be named model@time"),
])
def test_bad_commands(arguments, message, tmp_path):
    write(tmp_path / "a.csv", ["id", "x", "y"], [row.split(",") for row in GOOD])
    done = run(HOUSE / "ecosystem.py", *arguments, cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith("error: ") and message in done.stderr, done.stderr


# ---------------------------------------------------------------------------------------------- real tables


@needs_data
def test_digits(tmp_path):
    text, figures = tool(tmp_path, "report", DATA / "digits_predictions.csv", "--no_plot")
    figures = figures["digits_predictions.csv"]
    m = figures["models"]["measures"]
    np.testing.assert_allclose(m["errors"], [0.036667, 0.012222, 0.102222, 0.146667, 0.042222, 0.013333], atol=1e-6)
    want = [0.78222222, 0.14333333, 0.04222222, 0.01666667, 0.00666667, 0.00444444, 0.00444444]
    np.testing.assert_allclose(m["observed"], want, atol=1e-8)
    assert abs(m["expected"][0] - 0.6889038538) < 1e-10 and abs(m["homogeneous ratio"] - 1.1419106716536311) < 1e-12
    assert abs(m["dispersion"] - 2.2494932314359604) < 1e-12
    case = next(case for case in figures["improvement"]["cases"] if case["model"] == "logreg")
    assert case["improved"] == [1, 8, 7, 10, 7, 19] and case["initial"] == [1, 9, 9, 16, 15, 30] and sum(case["declined"]) == 5
    pairs, names = figures["models"]["pairs"], figures["models"]["names"]
    i, j = names.index("svm"), names.index("forest")  # by the package lm-sim 0.1.1
    assert abs(pairs["kappa"][i][j] - 0.3059335873707124) < 1e-12 and abs(pairs["capa"][i][j] - 0.27180101887923264) < 1e-12


@needs_data
def test_alpaca_table(tmp_path):
    path = DATA / "alpaca_eval2_wins.csv"
    data = eco.read_table(path, eco.parse_args(["report", str(path), "--outcome", "correct"]))
    best = np.argsort(data.failed.mean(0), kind="stable")[:5]
    sums = sums_of(data.failed[:, best])
    rates = eco.homogeneity(sums["hist"][0], sums["columns"][0])
    observed = sums["hist"][0] / 797
    np.testing.assert_allclose(observed, [0.32622334, 0.20577164, 0.1718946, 0.13927227, 0.13048934, 0.02634881], atol=1e-8)
    assert abs(rates["systemic expected"] - 0.0026807773) < 1e-10 and abs(rates["systemic ratio"] - 9.828794156868115) < 1e-10
    assert abs(rates["dispersion"] - 2.170085836133212) < 1e-12
    text, figures = tool(tmp_path, "report", path, "--outcome", "correct", "--no_plot")
    assert "undefined" in text and " nan" not in text.lower() and " inf" not in text.lower()
