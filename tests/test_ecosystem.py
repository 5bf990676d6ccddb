"""ecosystem.py: its mathematics by other routes, coverage and size of what it prints, tables that could be misread."""

import contextlib
import gzip
import inspect
import io
import json
import math
import os
import subprocess
import sys
import tarfile
from collections import Counter
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch

import ecosystem as eco

HOUSE = Path(__file__).parent.parent
DATA = Path(os.environ.get("NANOPAPERS_TEST_DATA", "")) / "ecosystem"
needs_data = pytest.mark.skipif(not (DATA / "digits_predictions.csv").is_file(), reason="no NANOPAPERS_TEST_DATA")
ERRORS = (0.161857, 0.284818, 0.343789, 0.357591, 0.473024)


def every_profile(errors):
    """All 2^k profiles and their probabilities for independent models."""
    profiles = np.array(list(product((0, 1), repeat=len(errors))))
    return profiles, np.where(profiles, errors, 1 - np.asarray(errors)).prod(1)


def rasch_table(n, b, a, seed):
    rng = np.random.default_rng(seed)
    return (rng.random((n, len(b))) < 1 / (1 + np.exp(-(np.array(b) + a * rng.normal(size=(n, 1)))))).astype(np.uint8)


# ---------------------------------------------------------------------------------------------- mathematics


def test_poisson_binomial_sums_over_all_profiles():
    for errors in (ERRORS, (0.0, 1.0, 0.5), (0.3,) * 8):
        profiles, probability = every_profile(errors)
        want = np.bincount(profiles.sum(1), probability, minlength=len(errors) + 1)
        np.testing.assert_allclose(eco.poisson_binomial(errors), want, atol=1e-15)
        np.testing.assert_allclose(eco.poisson_binomial([errors[::-1], errors])[1], want, atol=1e-15)


@pytest.mark.parametrize("k", [1, 3, 8, 9, 20])
def test_profiles_count_one_by_one(k):
    failed = (np.random.default_rng(k).random((300, k)) < 0.3).astype(np.uint8)
    for table in (failed, np.asfortranarray(failed)):
        profiles, counts = eco.outcome_profiles(table)
        assert dict(zip(map(tuple, profiles.tolist()), counts)) == Counter(map(tuple, failed.tolist()))
    hist, columns = eco.tally(profiles, counts)
    assert (hist == np.bincount(failed.sum(1, dtype=int), minlength=k + 1)).all() and (columns == failed.sum(0)).all()


def test_rates_by_hand():
    nested, disjoint = (eco.outcome_profiles(np.array(f, np.uint8)) for f in ([[1, 1], [0, 0]], [[1, 0], [0, 1]]))
    m = eco.homogeneity(*nested, "systemic")
    assert [m[x][0] for x in ("observed", "expected", "difference", "ratio", "phi")] == [0.5, 0.25, 0.25, 2, 1]
    assert eco.homogeneity(*disjoint, "systemic")["phi"][0] == -1 and eco.agreement(*disjoint)[1][0, 1] == -1
    assert eco.homogeneity(*nested, "homogeneous")["difference"][0] == 0.5 and eco.agreement(*nested)[1][0, 1] == 1
    profiles, probability = every_profile((0.5, 0.25))  # the product design is independent
    for kind in eco.KINDS:
        assert abs(eco.homogeneity(profiles, (8 * probability).astype(int), kind)["difference"][0]) < 1e-15


def test_undefined_is_nan_and_shown_so():
    m = eco.homogeneity(*eco.outcome_profiles(np.array([[0, 1], [0, 0], [0, 1]], np.uint8)), "systemic")
    assert m["observed"][0] == 0 and 0.5 < m["observed"][2] < 1 and all(map(math.isnan, (*m["difference"], *m["phi"])))
    assert eco.show(*m["ratio"]) == "undefined"


def test_exact_interval():
    beta = pytest.importorskip("scipy.stats").beta
    for x, n in ((0, 10), (1, 10), (10, 10), (3, 400), (50_000, 100_000), (1, 10**6)):
        low, high = eco.exact_interval(x, n)
        want = beta.ppf(0.025, x, n - x + 1) if x else 0, beta.ppf(0.975, x + 1, n - x) if x < n else 1
        np.testing.assert_allclose((low, high), want, rtol=1e-9, atol=1e-12)


def test_influence_gives_the_variance_of_the_bootstrap():
    profiles, probability = every_profile(ERRORS)
    rng = np.random.default_rng(0)
    counts = rng.multinomial(2000, probability)
    hist, columns = eco.tally(profiles, rng.multinomial(2000, counts / 2000, size=4000))
    for kind, cells in eco.KINDS.items():
        boot = (hist[:, cells] / 2000 - eco.poisson_binomial(columns / 2000)[:, cells]).sum(1).std()
        influence = eco.homogeneity(profiles, counts, kind)["influence"]
        assert abs(math.sqrt(counts @ influence**2) / 2000 / boot - 1) < 0.05


def test_permutation_null_is_shuffling():
    rng, failures = np.random.default_rng(0), np.array([12, 20, 17])
    shuffled = np.array([[rng.permutation(30) < f for f in failures] for _ in range(4000)]).sum(1)  # (draws, people)
    for drawn, t in zip(eco.permutation_null(30, failures, 20_000, rng), (3, 0)):
        want = np.bincount((shuffled == t).sum(1), minlength=31) / 4000
        assert np.abs(np.bincount(drawn, minlength=31) / 20_000 - want).max() < 0.03
    both, neither = eco.permutation_null(30, failures[:2], 100, rng)
    assert (neither == 30 - 12 - 20 + both).all() and both.std() > 0  # drawn together, not each by itself
    assert abs(eco.permutation_null(797, np.array([129, 227, 274, 285, 377]), 50_000, rng)[0].mean() - 2.137) < 0.03


def test_nulls_against_references():
    for alpha, delta, last in ((0.3, 1.0, 0.02585), (0.1, 0.5, 0.00385), (0.5, 1.0, 0.04289)):
        p = eco.two_class_null(ERRORS, alpha, delta)
        assert abs(p[-1] - last) < 5e-6 and abs(p @ np.arange(6) - sum(ERRORS)) < 1e-12
    np.testing.assert_allclose(eco.two_class_null(ERRORS, 0.3, 0), eco.poisson_binomial(ERRORS), atol=1e-15)
    with pytest.raises(ValueError, match="allow 0 to 1.1141"):
        eco.two_class_null(ERRORS, 0.1, 1.12)
    rng, worst = np.random.default_rng(0), max(ERRORS)
    most = eco.two_class_null(ERRORS, worst, 1 / worst - 1)[-1]
    assert math.isclose(most, np.prod(ERRORS) / worst**4)
    for _ in range(200):  # no distribution of a common factor gives more
        weights, factors = rng.dirichlet(np.ones(6)), rng.random(6)
        factors /= weights @ factors  # mean 1: every error stays
        if factors.max() <= 1 / worst:
            assert weights @ eco.poisson_binomial(np.outer(factors, ERRORS))[:, -1] <= most + 1e-12
    failed = rasch_table(200, [-1, -0.5, 0], 1.5, 0)
    np.testing.assert_allclose(eco.stratified_null(failed, np.zeros(200, int)), eco.poisson_binomial(failed.mean(0)))
    want = [eco.poisson_binomial(part.mean(0)) for part in (failed[:150], failed[150:])]
    np.testing.assert_allclose(eco.stratified_null(failed, np.arange(200) // 150), 0.75 * want[0] + 0.25 * want[1])
    each = eco.stratified_null(failed, np.arange(200))
    np.testing.assert_allclose(each, np.bincount(failed.sum(1, dtype=int), minlength=4) / 200, atol=1e-12)


def test_rasch_maximises_the_likelihood():
    """By Gauss-Hermite quadrature over all profiles: no step from the fit goes up; the slope is found."""
    b, a = [-2, -1, -1.5, 0], 1.5
    profiles, counts = eco.outcome_profiles(rasch_table(4000, b, a, 1))
    slope, error, fitted = eco.fit_rasch(*eco.tally(profiles, counts))
    assert abs(slope - a) < 3 * error < 0.4
    z, w = np.polynomial.hermite_e.hermegauss(61)

    def minus_log_likelihood(theta):
        p = 1 / (1 + np.exp(-(theta[:-1] + theta[-1] * z[:, None])))  # (nodes, models)
        of_profile = np.where(profiles[:, None], p, 1 - p).prod(2) @ w / w.sum()
        return -counts @ np.log(of_profile), of_profile

    minimize = pytest.importorskip("scipy.optimize").minimize
    best = minimize(lambda x: minus_log_likelihood(x)[0], [*b, 1.0], method="Nelder-Mead",
                    options=dict(maxiter=4000, xatol=1e-6, fatol=1e-8))
    assert abs(abs(best.x[-1]) - slope) < 1e-3
    np.testing.assert_allclose(np.bincount(profiles.sum(1), minus_log_likelihood(best.x)[1]), fitted, atol=1e-4)


def test_rasch_says_undefined():
    one = rasch_table(1000, [-2], 0, 2)
    few = np.concatenate([np.zeros_like(one), np.zeros_like(one), one], 1)
    for failed in (np.repeat(one, 4, 1), few, np.zeros((50, 3), np.uint8), np.ones((50, 2), np.uint8)):
        assert eco.fit_rasch(*eco.tally(*eco.outcome_profiles(failed))) is None
    a, error, _ = eco.fit_rasch(*eco.tally(*eco.outcome_profiles(rasch_table(5000, [-1, 0, 1], 0, 3))))
    assert a < 0.25 and (math.isnan(error) or error < a)
    rng = np.random.default_rng(4)
    fits = [eco.fit_rasch(*eco.tally(*eco.outcome_profiles(rasch_table(200, rng.normal(-1, 1, 4), 1.5, i))))
            for i in range(60)]
    assert sum(fit is None for fit in fits) <= 3 and all(0 <= fit[0] < 15 for fit in fits if fit)


def test_improvement_by_hand():
    before = np.array([[1, 1, 1], [1, 1, 1], [1, 0, 1], [1, 0, 0], [0, 1, 1], [0, 0, 0]])
    case = eco.improvement(before, np.array([0, 1, 0, 1, 1, 0]), 0, 20_000, np.random.default_rng(0))
    assert [case[x].tolist() for x in ("initial", "improved", "declined")] == [[1, 1, 2], [0, 1, 1], [0, 0, 1]]
    assert case["p"] == 1  # of 4 failures 2 are systemic and 2 are mended: 1 systemic is what chance gives
    before = np.concatenate([np.ones((30, 2), int), np.tile([1, 0], (70, 1))])
    p = eco.improvement(before, np.arange(100) < 50, 0, 50_000, np.random.default_rng(0))["p"]
    hypergeometric = pytest.importorskip("scipy.stats").hypergeom(100, 30, 50)
    assert p <= 5e-5 and hypergeometric.cdf(0) < 1e-9  # nobody whom both fail is among the 50 mended
    p = eco.improvement(before, np.r_[np.arange(30) < 20, np.arange(70) < 30], 0, 50_000, np.random.default_rng(0))["p"]
    assert abs(p - 2 * hypergeometric.cdf(10)) < 0.005


# ---------------------------------------------------------------------------------------------- coverage and size


@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize("count, k", [(0.3, 2), (0.3, 6), (1, 3), (3, 3), (10, 6)])
def test_intervals_cover_at_small_counts(count, k, hard):
    """100 people, few of them failed by all: the intervals of S hold the truth, for independent models and where half
    of the people are hard; and shuffles reject independent models in 5 %."""
    e, rng, sims = (count / 100) ** (1 / k), np.random.default_rng(5), 400
    profiles, probability = every_profile([e] * k)
    if hard:
        d = min(0.8 * e, 1 - e)
        probability = (every_profile([e + d] * k)[1] + every_profile([e - d] * k)[1]) / 2
    s, expected = probability[-1], e**k
    truth = dict(observed=s, expected=expected, difference=s - expected, ratio=s / expected)
    truth["phi"] = (s - expected) / (e - expected)
    held, rejected = [], 0
    for counts in rng.multinomial(100, probability, size=sims):
        m, (hist, columns) = eco.homogeneity(profiles, counts, "systemic"), eco.tally(profiles, counts)
        outside = np.array([max(m[x][1] - value, value - m[x][2]) for x, value in truth.items()])
        held.append(np.where(np.isnan(outside), np.nan, outside < 1e-12))
        draws = eco.permutation_null(100, columns, 199, rng)[0]
        rejected += eco.p_value(hist[-1], draws) <= 0.05
    assert np.nanmean(held, axis=0).min() >= 0.92, np.nanmean(held, axis=0)
    assert hard or rejected / sims <= 0.07


@pytest.mark.parametrize("n, e, k", [(100, 0.5, 2), (100, 0.1, 3), (1000, 0.1, 6)])
def test_contrasts_of_equal_groups_hold_zero(n, e, k):
    """D = 0 in both groups; sizes and errors differ. A test of equal profiles rejects a quarter of such tables."""
    profiles, probability = every_profile([e] * k)
    other, rng = every_profile([0.1] * k)[1], np.random.default_rng(6)
    for kind in ("systemic", "homogeneous"):
        limits = [eco.contrast((profiles, a), (profiles, b), kind)[1:]
                  for a, b in zip(rng.multinomial(n, probability, size=300), rng.multinomial(1000, other, size=300))]
        assert np.nanmean(np.prod(limits, -1) > 0) <= 0.07


def test_difference_in_differences_covers():
    """Two models and two humans share a difficulty, in two groups with other errors."""
    rng, held, z = np.random.default_rng(7), [], np.linspace(-6, 6, 241)
    w = np.exp(-(z**2) / 2) / np.exp(-(z**2) / 2).sum()
    groups = {0: [-1.5, -1, -2, -1], 1: [0, -0.5, -1, 0.5]}
    slope = {0: [2, 2, 1, 1], 1: [1, 1, 1, 1]}
    truth = 0
    for g in groups:
        p = 1 / (1 + np.exp(-(np.array(groups[g]) + np.array(slope[g]) * z[:, None])))
        for sign, side in ((1, [0, 1]), (-1, [2, 3])):
            d = (w @ eco.poisson_binomial(p[:, side]) - eco.poisson_binomial(w @ p[:, side]))[[0, -1]].sum()
            truth += sign * d * (1 - 2 * g)
    group = np.repeat([0, 1], [150, 100])
    for _ in range(300):
        at = np.array([groups[g] for g in group]) + np.array([slope[g] for g in group]) * rng.normal(size=(250, 1))
        failed = (rng.random((250, 4)) < 1 / (1 + np.exp(-at))).astype(np.uint8)
        with contextlib.redirect_stdout(io.StringIO()):
            found = eco.by_group({"models": [0, 1], "humans": [2, 3]}, failed, group, ["a", "b"])
        _, low, high = found["a less b, models less humans"]
        held.append(low <= truth <= high)
    assert np.mean(held) >= 0.93
    same, apart = (eco.contrast(*[eco.outcome_profiles(failed[:, :2])] * 2, "homogeneous", paired=x) for x in (1, 0))
    assert same[0] == 0 and same[2] - same[1] < 0.1 * (apart[2] - apart[1])  # an ecosystem less itself


def test_p_values_see_less_homogeneity_than_chance():
    failed = np.repeat(np.array([[1, 0], [0, 1]], np.uint8), 50, 0)
    m = eco.measure({"models": failed}, eco.parse_args(["--seed", "0"]))["models"]
    m = m["homogeneous"]
    assert m["observed"][0] == 0 and m["p"] < 0.001 and m["difference"][2] < 0


# ---------------------------------------------------------------------------------------------- the tool


def tool(tmp_path, *arguments):
    """A task, in this process → what it prints, and its results.json."""
    with contextlib.redirect_stdout(io.StringIO()) as text:
        eco.run(eco.parse_args([*map(str, arguments), "--out", str(tmp_path / "out")]))
    return text.getvalue(), json.loads((tmp_path / "out" / "results.json").read_text())


def test_the_default_run_made_small(tmp_path, monkeypatch):
    monkeypatch.setattr(eco, "YEARS", {"year 1": 0.25, "year 2": 1.0})
    text, figures = tool(tmp_path, "--epochs", 1)
    m, cases = figures["models"], figures["improvements"]
    assert m["systemic"]["observed"][0] > 20 * m["systemic"]["expected"][0] and m["homogeneous"]["difference"][1] > 0.03
    assert m["homogeneous"]["p"] < 0.001 and len(cases) == 4 and text.count("\n") < 45
    shares = np.mean([case["systemic"] for case in cases.values()], axis=0)
    assert shares[1] < 0.8 * shares[0]  # others counted at the later time turn it round
    assert Path(text.split()[-1]).stat().st_size > 10_000 and text.split()[-2].endswith("results.json")


def test_training_under_autocast():
    x, y = torch.randint(1, 4096, (512, 5)), torch.arange(512) % 3
    x[:, 0] = 1 + y
    with torch.autocast("cpu", torch.bfloat16):
        answers = eco.train_provider(x, y, x, 16, 3, 40, 0)
    assert (answers == y).float().mean() > 0.9


def test_the_method_can_be_copied():
    names = "outcome_profiles poisson_binomial homogeneity mover binomial_tail lower_limit exact_interval"
    copied, space = "\n".join(inspect.getsource(getattr(eco, name)) for name in names.split()), {}
    exec(f"import functools, math\nimport numpy as np\nKINDS = {eco.KINDS}\n{copied}", space)
    failed = rasch_table(300, [-1, -1, 0], 2, 8)
    got = space["homogeneity"](*space["outcome_profiles"](failed), "systemic")
    want = eco.homogeneity(*eco.outcome_profiles(failed), "systemic")
    assert all(np.array_equal(got[x], want[x]) for x in want)


def lines(text):
    return text.replace(" / ", "\n").encode()


RIGHT = [  # name, text, flags, errors of the two models: what must be read, and right
    ("a.csv", "id,label,x,y / 1,1,1.0,True / 2,0,0,False", "", [0, 0]),
    ("a.csv", "id,label,x,y / 1,9007199254740992,9007199254740993,7 / 2,7,7,9007199254740992",
     "--missing fail:9007199254740993", [0.5, 1]),
    ("a.csv", "id;label;x;y / 1;1;1;1 / 2;0;0;1", "", [0, 0.5]),
    ("a.tsv", "id\tlabel\tx\ty\r / 1\t1\t1\t1\r / \r / 2\t0\t0\t1\r", "", [0, 0.5]),
    ("a.csv", '\ufeffid,label,x,y / 1,"a, b","a, b",c / 2,c,c,c', "", [0, 0.5]),
    ("a.jsonl", '{"id": 1, "label": 1, "x": true, "y": 1.0} / {"id": 2, "y": 1, "label": 0, "x": 0}', "", [0, 0.5]),
    ("a.jsonl", '{"x": 1, "y": null} / {"x": 0, "y": 1}', "--outcome correct --missing fail", [0.5, 0.5]),
    ("a.jsonl", '{"x": 1, "y": null} / {"x": 0, "y": 1}', "--outcome correct --missing drop", [1, 0]),
    ("a.csv", "id,label,x,y / 1,NA,NA,EU / 2,EU,NA,EU", "--missing drop:", [0.5, 0.5]),
    ("a.csv", "id,label,x,y / 1,1,1,- / 2,0,0,N/A / 3,0,0,1 / 4,1,1,1", "--missing drop:-,N/A", [0, 0.5]),
    ("a.csv", "id,label,group,x,y / 1,1,a,1,1 / 2,,b,0,1 / 3,0,c,0,1", "--missing drop", [0, 0.5]),
    ("a.csv", "id,label,x@home,y / 1,1,1,1 / 2,0,0,1", "", [0, 0.5]),
    ("a.csv", "id,label,x@9,y@9,x@10,y@10 / 1,1,0,0,1,1 / 2,0,1,0,0,1", "", [0, 0.5]),
    ("a.csv", "id,label,x,y / 1,1,0.6,.7 / 2,0,5e-1,0.7", "--threshold 0.5", [0, 0.5]),
    ("a.csv", "id,label,x,y,age / 1,1,1,1,30 / 2,0,0,1,40", "--models x,y", [0, 0.5]),
    ("a.csv", "id,label,x,y / 1,0,1,1 / 2,0,0,1", "--outcome fail", [0.5, 1]),
    ("a.csv", " / ".join(["id,label,x,y", *(f"{i},{i},{i},{i - i % 2}" for i in range(300))]), "", [0, 0.5]),
]


@pytest.mark.parametrize("name, text, flags, errors", RIGHT)
def test_tables_are_read_right(name, text, flags, errors, tmp_path, monkeypatch):
    monkeypatch.setattr(eco, "DRAWS", 100)
    (tmp_path / name).write_bytes(lines(text))
    (tmp_path / f"{name}.gz").write_bytes(gzip.compress(lines(text)))
    for path in (tmp_path / name, tmp_path / f"{name}.gz"):
        said, figures = tool(tmp_path, "report", path, *flags.split(), "--no_plot")
        m = figures["tables"][str(path)]["models"]
        np.testing.assert_allclose(m["errors"], errors, atol=1e-12)
        assert len(m["names"]) == 2 and all(f"{model} (error" in said.replace("@10", "") for model in m["names"])


def test_times_are_said_in_order(tmp_path):
    (tmp_path / "a.csv").write_bytes(lines("label,x@10,y@10,x@9,y@9,x@11,y@11 / 1,1,0,0,1,1,1 / 0,1,1,0,0,0,0"))
    said, figures = tool(tmp_path, "improve", tmp_path / "a.csv")
    assert "2 people, 2 models at 9 → 10 → 11\n" in said and len(figures["improvements"]) == 4


GOOD = "id,label,x,y / 1,1,1,1 / 2,0,0,1"
WRONG = [  # text, flags, the line: refused, never guessed
    ("id,label,x,y,age / 1,1,1,1,30 / 2,0,0,1,40", "", 'person 1, column "age": 30 is no label (0, 1)'),
    ("id,label,x,y / 1,1,0.9,1 / 2,0,0.2,1", "", "A probability? --threshold 0.5"),
    ("id,label,x,y / 1,1,1,1 / 2,0,0,neg", "", 'person 2, column "y": neg is no label (0, 1)'),
    ("id,label,x,y / 1,1,None,1 / 2,0,0,1", "--missing drop", "--missing drop:None or, to count it as wrong"),
    ("id,label,x,y / 1,NA,NA,EU / 2,EU,NA,EU", "", 'label "NA": a class? --missing drop:'),
    ("id,label,x,y / 1,1,1,1 / 2,0, ,1", "", 'person 2, column "x": empty. --missing drop'),
    ("id,x,y / 1,1,2 / 2,0,1", "--outcome fail", 'person 1, column "y": 2 is no label'),
    ("id,x,y / 1,1,0", "", "if a 1 says right or wrong: --outcome correct or --outcome fail"),
    ("doc_id,model,filter,label / 1,m,strict,1 / 1,m,flexible,1", "", "df.pivot(index="),
    ("doc_id,label,x,y / 1,1,1,1 / 1,1,1,1", "", 'column "doc_id" repeats'),
    ("id,label,x / 1,1,1", "", "1 model column (x): an ecosystem needs two"),
    ("id,label,x@1,y@1,x@2 / 1,1,1,1,1", "", "want every model at every time, and no other column; see y@2"),
    ("id,label,x@may,x@june / 1,1,1,1", "", "in which order? Write whole numbers or dates"),
    ("id,label,x,x / 1,1,1,1", "", "each column needs a name of its own"),
    ("id,label,x,y / 1,1,1,1 / 2,1,1", "", "want .csv, .tsv or .jsonl in UTF-8"),
    (GOOD + ' / 3,1,"1,1', "", "a quote is opened and not closed"), ("id,label,x,y", "", "no rows"), ("", "", "empty"),
    (GOOD, "--models x,z", "z: no such column, or wanted twice; there are id, label, x, y"),
    (GOOD, "--models x,x", "x: no such column, or wanted twice"),
    ("label,x,y / 2,1,0 / 1,1,1 / 0,1,1", "--threshold 0.5", "wants labels 0 and 1; here they are 0, 1, 2"),
    ("id,label,x,y,human:z / 1,1,1,1,1", "", "an ecosystem of one"),
]


@pytest.mark.parametrize("text, flags, message", WRONG)
def test_bad_tables_are_refused(text, flags, message, tmp_path, capsys):
    path = tmp_path / "t.csv"
    path.write_bytes(lines(text))
    with pytest.raises(SystemExit) as stop:
        tool(tmp_path, "report", path, *flags.split())
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.startswith("error: ") and message in err and err.count("\n") == 1, err


@pytest.mark.parametrize("arguments, message", [
    ("--epochs 0", "--epochs 0 must"), ("unicode --epochs=-1", "--epochs -1 must"),
    ("nonsense", "invalid choice: 'nonsense'"), ("--label x", "unrecognized arguments: --label x"), ("report", "files"),
    ("report nowhere.csv", "nowhere.csv"), ("report a.csv --outcome maybe", "invalid choice: 'maybe'"),
    ("improve a.csv", "columns want names model@time"), ("improve a.csv --no_plot", "unrecognized arguments"),
    ("ddi a.csv", "malignant: no such column"), ("hapi --data a.csv", "not HAPI's archive"),
    ("report a.csv --threshold much", "invalid float value: 'much'"), ("report a.csv --out a.csv", "a.csv"),
    ("hapi --data b.gz", "b.gz"),
])
def test_mistakes_end_in_one_line(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("a.csv").write_bytes(lines(GOOD))
    with pytest.raises(SystemExit) as stop:
        eco.run(eco.parse_args(arguments.split()))
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.startswith("error: ") and message in err and err.count("\n") == 1, err


def test_two_files_of_one_name_stay_apart(tmp_path):
    for folder, text in (("a", "x,y / 1,1 / 1,1"), ("b", "x,y / 1,0 / 1,0")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "t.csv").write_bytes(lines(text))
    command = [sys.executable, HOUSE / "ecosystem.py", "report", "a/t.csv", "b/t.csv", "--outcome", "fail"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    *_, results, first, second = done.stdout.split()
    tables = json.loads((tmp_path / results).read_text())["tables"]
    assert [tables[name]["models"]["errors"] for name in ("a/t.csv", "b/t.csv")] == [[1, 1], [1, 0]]
    assert first != second and (tmp_path / first).is_file() and (tmp_path / second).is_file()


def test_ddi_takes_its_real_columns(tmp_path):
    """True/False labels, 0/1 and probabilities, columns that are no models; models homogeneous in one group only."""
    rng = np.random.default_rng(0)
    tone, shared = np.repeat([12, 56], 400), rng.random(800) < 0.4
    truth = rng.random(800) < 0.5
    models = [truth ^ np.where(tone == 56, shared, rng.random(800) < 0.4) for _ in range(2)]
    humans = [truth ^ (rng.random(800) < 0.3) for _ in range(2)]
    rows = [f"{i},{i + 1},{i}.png,{tone[i]},{truth[i]},nevus,{0.1 + 0.8 * models[0][i]:.1f},{int(models[1][i])},{a},{b}"
            for i, (a, b) in enumerate(zip(*humans))]
    path = tmp_path / "ddi.csv"
    path.write_text("\n".join([",DDI_ID,DDI_file,skin_tone,malignant,disease,m1,m2,human:a,human:b", *rows]))
    text, figures = tool(tmp_path, "ddi", path, "--threshold", 0.7, "--no_plot")
    found = figures["tables"][str(path)]["groups"]
    estimate, low, high = found["12 less 56, models less humans"]
    assert found["56, models"][1] > 0.35 and -0.65 < low < estimate < high < -0.2
    assert math.isclose(estimate, found["12 less 56, models"][0] - found["12 less 56, humans"][0])
    assert "not used  DDI_ID, DDI_file, disease" in text


def test_hapi_joins_by_id_and_says_what_it_lacks(tmp_path):
    rng, example, wrong = np.random.default_rng(1), [f"e{i}" for i in range(120)], {}
    truth, files = rng.integers(2, size=120), {}
    files["labels"] = [dict(example_id=e, true_label=int(y)) for e, y in zip(example, truth)]
    for api, date in product(("google_sa", "amazon_sa", "baidu_sa", "other_sa"), ("20-03-01", "21-02-05", "21-11-30")):
        wrong[api, date] = rng.random(120) < 0.3
        rows = [dict(example_id=e, predicted_label=float(y ^ x)) for e, y, x in zip(example, truth, wrong[api, date])]
        rows = rows[9:] if (api, date) == ("baidu_sa", "21-11-30") else rows  # the first nine get no answer
        files[f"{api}/{date}"] = [rows[i] for i in rng.permutation(len(rows))]
    with tarfile.open(tmp_path / "hapi.tar.gz", "w:gz") as archive:
        for name, rows in files.items():
            raw = json.dumps(rows).encode()
            member = tarfile.TarInfo(f"hapi/tasks/sa/waimai/{name}.json")
            member.size = len(raw)
            archive.addfile(member, io.BytesIO(raw))
    text, figures = tool(tmp_path, "hapi", "--data", tmp_path / "hapi.tar.gz")
    wrong["baidu_sa", "21-11-30"][:9] = True
    want = [wrong[api, "21-11-30"].mean() for api in ("amazon_sa", "baidu_sa", "google_sa")]  # the year's later date
    np.testing.assert_allclose(figures["datasets"]["sa/waimai 2021"]["errors"], want)
    assert "two dates for google@2021; google@2021-11-30 is used" in text and "9 without baidu@2021" in text
    assert len(figures["improvements"]) == 3 and list(figures["datasets"]) == ["sa/waimai 2020", "sa/waimai 2021"]


@needs_data
def test_digits(tmp_path):
    path = DATA / "digits_predictions.csv"
    m = tool(tmp_path, "report", path, "--no_plot")[1]["tables"][str(path)]
    models, found = m["models"], m["improvements"]
    errors = [0.036667, 0.012222, 0.102222, 0.146667, 0.042222, 0.013333]
    np.testing.assert_allclose(models["errors"], errors, atol=1e-6)
    assert abs(models["expected"][0] - 0.6889038538) < 1e-10
    assert abs(models["homogeneous"]["ratio"][0] - 1.1419106716536311) < 1e-12
    groups = [m["groups"][f"{g}, models"][0] for g in ("straight", "curved")]
    np.testing.assert_allclose(groups, [0.0660520342057126, 0.12991013157709885], atol=1e-12)
    case = found["logreg, 2020 → 2022"]
    assert case["improved"] == [1, 8, 7, 10, 7, 19] and case["initial"] == [1, 9, 9, 16, 15, 30]
    np.testing.assert_allclose(found["gnb, 2020 → 2022"]["systemic"], [0.2, 12 / 91], atol=1e-12)
    i, j = models["names"].index("svm"), models["names"].index("forest")
    assert abs(models["kappa"][i][j] - 0.3059335873707124) < 1e-12  # by the package lm-sim 0.1.1


@needs_data
def test_alpaca_best_five(tmp_path):
    path = DATA / "alpaca_eval2_wins.csv"
    table = eco.read_outcomes(path, eco.load_columns(path), outcome="correct")
    best = [table.models[j] for j in np.argsort(table.failed[0].mean(0), kind="stable")[:5]]
    flags = ("--outcome", "correct", "--models", ",".join(best), "--no_plot")
    m = tool(tmp_path, "report", path, *flags)[1]["tables"][str(path)]["models"]
    want = [0.32622334, 0.20577164, 0.1718946, 0.13927227, 0.13048934, 0.02634881]
    np.testing.assert_allclose(m["observed"], want, atol=1e-8)
    assert abs(m["systemic"]["ratio"][0] - 9.828794156868115) < 1e-10
    assert abs(m["systemic"]["expected"][0] - 0.0026807773) < 1e-10
    assert "undefined" in tool(tmp_path, "report", path, "--outcome", "correct", "--no_plot")[0]
