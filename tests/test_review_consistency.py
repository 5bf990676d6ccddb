"""review_consistency.py: counts, latent scores, reviewer calibration, simulation, and the tool."""

import csv
import functools
import gzip
import json
import math
import os
import subprocess
import sys
from fractions import Fraction
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch

import review_consistency as rc

HOUSE = Path(__file__).parent.parent
DATA = Path(os.environ.get("NANOPAPERS_TEST_DATA", "")) / "review_consistency"
needs_data = pytest.mark.skipif("NANOPAPERS_TEST_DATA" not in os.environ, reason="NANOPAPERS_TEST_DATA is not set")
phi = np.vectorize(lambda x: 0.5 * math.erfc(-x / math.sqrt(2)))  # the normal distribution function by another library

# --------------------------------------------------------------------------------------------- 1. the mathematics

TABLE = {  # name: (2014, 2021), from the counts by hand
    "inconsistency": (43 / 166, 203 / 882),
    "acceptance rate": (87 / 332, 401 / 1764),
    "arbitrariness": (43 / 87, 203 / 401),
    "accept precision": (44 / 87, 198 / 401),
    "reject precision": (202 / 245, 1160 / 1363),
    "agreed accept rate": (22 / 123, 99 / 679),
    "overlap (Jaccard)": (22 / 65, 99 / 302),
    "arbitrariness of lots": (1 - 87 / 332, 1 - 401 / 1764),
}


def test_metrics():
    """The published tables by hand; and the same numbers from two lists of decisions, counted one paper at a time."""
    for i, year in enumerate(("2014", "2021")):
        found = rc.consistency(rc.NEURIPS[year])
        assert all(found[name] == pytest.approx(values[i], abs=1e-12) for name, values in TABLE.items())
        assert found["relative arbitrariness"] == pytest.approx((0.6698, 0.6552)[i], abs=5e-5)
    assert rc.consistency(rc.NEURIPS["2014"])["arbitrariness, mean of directions"] == (22 / 44 + 21 / 43) / 2
    rng = np.random.default_rng(0)
    a, b = rng.random(200) < 0.3, rng.random(200) < 0.5
    cells = [sum(a & b), sum(a & ~b), sum(b & ~a), sum(~a & ~b)]
    found, swapped = rc.consistency(cells), rc.consistency([cells[i] for i in (0, 2, 1, 3)])
    turned = [not y for x, y in zip(a, b) if x] + [not x for x, y in zip(a, b) if y]
    lots = np.mean([x != y for x, y in product(a, b)])  # the second committee's decisions dealt out at random
    assert found["arbitrariness"] == pytest.approx(np.mean(turned)) and found == pytest.approx(swapped)
    assert found["inconsistency of lots"] == pytest.approx(lots)
    assert found["Cohen's kappa"] == pytest.approx(1 - np.mean(a != b) / lots)
    for cells in ([0, 0, 0, 5], [5, 0, 0, 0], [0, 0, 3, 4], [0, 3, 4, 0]):
        assert not any(np.isinf(value) for value in rc.consistency(cells).values())
    assert np.isnan(rc.consistency([0, 0, 0, 5])["arbitrariness"])


def test_clopper_pearson():
    def tail(k, n, p):
        return float(sum(math.comb(n, j) * Fraction(p) ** j * (1 - Fraction(p)) ** (n - j) for j in range(k, n + 1)))

    for (k, n), ends in {(43, 166): (0.1942, 0.3326), (203, 882): (0.2028, 0.2594)}.items():
        assert rc.clopper_pearson(k, n) == pytest.approx(ends, abs=5e-5)
    for k, n in ((3, 11), (10, 12), (1, 7)):
        low, high = rc.clopper_pearson(k, n)
        assert tail(k, n, low) == pytest.approx(0.025, abs=1e-9) and tail(k + 1, n, high) == pytest.approx(
            0.975, abs=1e-9
        )
    assert rc.clopper_pearson(0, 10) == (0.0, pytest.approx(1 - 0.025**0.1)) and rc.clopper_pearson(10, 10)[1] == 1.0
    intervals = [rc.clopper_pearson(k, 20) for k in range(21)]
    for p in np.linspace(0.01, 0.99, 99):
        chances = [math.comb(20, k) * p**k * (1 - p) ** (20 - k) for k in range(21)]
        assert sum(c for c, (low, high) in zip(chances, intervals) if low <= p <= high) >= 0.95


def test_intervals_cover(monkeypatch):
    """Arbitrariness, ρ and the extrapolated arbitrariness, for few and many accepts, uneven committees."""
    assert rc.arbitrariness_interval(43, 65) == pytest.approx((0.3638, 0.6317), abs=5e-5)
    assert rc.arbitrariness_interval(203, 302) == pytest.approx((0.4452, 0.5685), abs=5e-5)
    monkeypatch.setattr(rc, "clopper_pearson", functools.cache(rc.clopper_pearson))
    rng, draws = np.random.default_rng(0), 200
    for n, p1, p2, rho in ((166, 0.26, 0.26, 0.55), (40, 0.1, 0.1, 0.9), (100, 0.45, 0.3, 0.3)):
        both = float(rc.both_above(rc.normal_quantile(1 - p1), rc.normal_quantile(1 - p2), rho))
        true, at_5 = 1 - 2 * both / (p1 + p2), rc.arbitrariness(0.05, rho)
        covered = []
        for cells in rng.multinomial(n, [both, p1 - both, p2 - both, 1 - p1 - p2 + both], draws).tolist():
            _, low, high = rc.tetrachoric(cells)
            if low == low:  # some tables of 40 papers have a committee that accepts none
                ends = rc.arbitrariness_interval(cells[1] + cells[2], n - cells[3])
                far = [rc.arbitrariness(0.05, x) for x in (high, low)]
                covered.append([ends[0] <= true <= ends[1], low <= rho <= high, far[0] - 1e-9 <= at_5 <= far[1] + 1e-9])
        assert len(covered) > 0.9 * draws and (np.mean(covered, 0) > 0.92).all(), (
            n,
            np.mean(covered, 0),
        )  # 0.95 − 2 errors
    x = rng.standard_normal((2000, 2, 12))
    x[:, 1] = 0.6 * x[:, 0] + 0.8 * x[:, 1]
    inside = np.mean([low <= 0.6 <= high for _, low, high in (rc.pearson(*pair) for pair in x)])
    assert 0.935 < inside < 0.975  # Fisher's interval, at 12 pairs
    assert np.isnan(rc.pearson(x[0, 0], np.ones(12))).all() and np.isnan(rc.pearson([1.0, 2], [2.0, 1])).all()


@pytest.mark.parametrize("rho", [-0.95, -0.3, 0.5, 0.9, 0.9999])
def test_bivariate_normal(rho):
    """B = ∫ φ(x)·Φ((ρx − h₂)/√(1 − ρ²)) dx over x > h₁: another integral, by panels; and the median split."""
    nodes, weights = np.polynomial.legendre.leggauss(60)
    assert rc.both_above(0, 0, rho) == pytest.approx(0.25 + math.asin(rho) / (2 * math.pi), abs=1e-12)
    for h1, h2 in ((0.5, 0.5), (0.5, 0.7), (-0.6, 1.0), (1.0, 1.02)):
        width, step = math.sqrt(1 - rho * rho), h2 / rho
        edges = {h1, 12.0, *(min(max(h1, step + k * width), 12.0) for k in (-30, -12, -6, -3, -1, 0, 1, 3, 6, 12, 30))}
        edges = sorted({*edges, *(h1 + (12 - h1) * i / 8 for i in range(9))})
        value = sum(
            (b - a) / 2 * weights @ (np.exp(-x * x / 2) / math.sqrt(2 * math.pi) * phi((rho * x - h2) / width))
            for a, b in zip(edges, edges[1:])
            for x in [(a + b) / 2 + (b - a) / 2 * nodes]
        )
        assert rc.both_above(h1, h2, rho) == pytest.approx(value, abs=1e-10)


def test_tetrachoric_and_polychoric():
    for p1, p2, rho in ((0.2, 0.3, 0.55), (0.5, 0.1, -0.4), (0.26, 0.26, 0.95), (0.05, 0.9, 0.1)):
        both = float(rc.both_above(rc.normal_quantile(1 - p1), rc.normal_quantile(1 - p2), rho))
        counts = 1e9 * np.array([both, p1 - both, p2 - both, 1 - p1 - p2 + both])
        assert rc.polychoric(counts.reshape(2, 2)) == pytest.approx(rho, abs=1e-5)
    for cells, rho in (
        ((22, 22, 21, 101), 0.52665),
        ((22, 43, 101), 0.52652),
        (rc.NEURIPS["2021"], 0.55707),
        ((12, 8, 10, 21), 0.4210),
        ((11, 6, 1, 33), 0.9161),
        ((30, 10, 10, 30), math.sin(math.pi / 4)),
    ):
        assert rc.tetrachoric(cells)[0] == pytest.approx(rho, abs=1e-4)
    rho, low, high = rc.tetrachoric([5, 0, 0, 20])  # no paper differs: the likeliest ρ is 1, and the interval is wide
    assert rho > 0.999 and high > 0.999 and low < 0.85
    assert np.isnan(rc.tetrachoric([0, 0, 3, 10])).all() and np.isnan(rc.tetrachoric([10, 0, 0])).all()
    esa = [[2, 1, 1, 0, 0], [0, 9, 6, 1, 0], [0, 6, 4, 1, 2], [0, 2, 0, 0, 3], [0, 2, 2, 0, 9]]
    assert rc.polychoric(esa) == pytest.approx(0.6649, abs=1e-4)
    cuts1, cuts2 = np.array([-9, -0.5, 0.4, 1.1, 9]), np.array([-9, -0.9, 0.9, 9])  # exact cells of a known model
    above = rc.both_above(cuts1[::-1, None], cuts2[::-1], 0.6)
    assert rc.polychoric(1e4 * np.diff(np.diff(above, axis=0), axis=1)) == pytest.approx(0.6, abs=1e-5)


@pytest.mark.parametrize("family", rc.FAMILIES)
def test_families_by_simulation(family):
    """Arbitrariness of two committees drawn as the docstring says, to 4 standard errors; the fit finds back."""
    rng, n, strength, rate = np.random.default_rng(3), 500_000, 0.5, 0.2
    if family == "beta-binomial":  # κ = 0.5: α + β = 1
        a, b = rng.random((2, n)) < rng.beta(rate, 1 - rate, n)
    else:
        t3, normal = rng.standard_t(3, (3, n)) / math.sqrt(3), rng.standard_normal((3, n))
        opinions = t3 if family == "t3 opinions" else normal
        x = math.sqrt(strength) * (t3 if family == "t3 quality" else normal)[2] + math.sqrt(1 - strength) * opinions[:2]
        a, b = x > np.quantile(x, 1 - rate)
    simulated = 1 - 2 * (a & b).sum() / (a.sum() + b.sum())
    exact = float(rc.arbitrariness(rate, strength, family))
    assert exact == pytest.approx(simulated, abs=4 * math.sqrt(0.5 / (rate * n)))
    assert rc.fit_family(family, rate, exact) == pytest.approx(strength, abs=1e-6)
    assert math.isnan(rc.fit_family(family, 0.2, 0.85))  # worse than lots


def design(seed, low=40, high=110):
    """A small random conference → (paper, reviewer, y); some have no offsets, some hardly any quality."""
    rng = np.random.default_rng(seed)
    n, k = int(rng.integers(low, high)), int(rng.integers(2, 6))
    paper = np.repeat(np.arange(n // k), k)
    pool = max(int(len(paper) / rng.uniform(1.5, 8)), k + 1)
    reviewer = np.unique(np.concatenate([rng.permutation(pool)[:k] for _ in range(n // k)]), return_inverse=True)[1]
    quality, offset = rng.choice([0.05, 0.3, 1, 2]), rng.choice([0, 0.02, 0.1, 0.3, 1])
    y = (
        5
        + math.sqrt(quality) * rng.normal(size=n // k)[paper]
        + math.sqrt(offset) * rng.normal(size=pool)[reviewer]
        + rng.normal(size=len(paper))
    )
    return paper, reviewer, y


def dense(paper, reviewer, y):
    """The negative log-likelihood as a function of the three variances, from the full matrix of reviews."""
    same = [np.equal.outer(unit, unit).astype(float) for unit in (paper, reviewer)]
    r = y - y.mean()

    def nll(variances):
        lower = np.linalg.cholesky(variances[0] * same[0] + variances[1] * same[1] + variances[2] * np.eye(len(y)))
        return (
            0.5 * (len(y) * math.log(2 * math.pi) + (np.linalg.solve(lower, r) ** 2).sum())
            + np.log(np.diag(lower)).sum()
        )

    return nll


def fitted(paper, reviewer, y, **flags):
    found = rc.calibrate([torch.as_tensor(paper), torch.as_tensor(reviewer)], torch.as_tensor(y), **flags)
    return dict(zip(("variances", "se", "v", "converged"), found))


def test_calibration_is_at_the_optimum():
    """200 random designs: a search from the fit, by the dense likelihood, finds nothing that is 1e-4 better."""
    zeros = 0
    for seed in range(200):
        fit, nll = fitted(*design(seed)), dense(*design(seed))
        best = found = nll(fit["variances"].numpy())
        zeros += bool((fit["variances"][:2] == 0).any())
        theta, step = np.log(fit["variances"].numpy().clip(1e-5)), 0.5
        while step > 0.01:
            around = [theta + s * step * e for e in np.eye(3) for s in (1, -1)]
            values = [nll(np.exp(t)) for t in around]
            if min(values) < best:
                best, theta = min(values), around[int(np.argmin(values))]
            else:
                step /= 3
        assert fit["converged"] and found - best < 1e-4, (seed, found - best)
    assert 30 < zeros < 150  # the edge is well visited


def test_calibration_says_when_it_did_not_converge():
    assert not fitted(*design(0), rounds=2)["converged"]
    paper, reviewer, _ = design(1)
    additive = (
        5.0 + np.arange(paper.max() + 1)[paper] % 7 + np.arange(reviewer.max() + 1)[reviewer] % 3
    )  # no opinions at all
    assert not fitted(paper, reviewer, additive)["converged"]


def test_random_traces_and_equivariance(monkeypatch):
    """Traces by signs move an estimate by a small part of its standard error; 3·y + 7 has nine times the variances."""
    paper, reviewer, y = design(3, 890, 900)
    exact, scaled = fitted(paper, reviewer, y), fitted(paper, reviewer, 3 * y + 7)
    assert scaled["variances"].numpy() == pytest.approx(9 * exact["variances"].numpy(), rel=1e-5)
    monkeypatch.setattr(rc, "EXACT", 0)
    by_signs = fitted(paper, reviewer, y, generator=torch.Generator().manual_seed(0))
    assert (exact["variances"] > 0).all() and (
        (by_signs["variances"] - exact["variances"]).abs() / exact["se"]
    ).max() < 0.1


def test_standard_errors_and_recovery():
    """60 conferences of one design: estimates are unbiased, and spread as their standard errors say."""
    rng = np.random.default_rng(0)
    paper, reviewer, _ = design(3, 180, 190)
    found, se = [], []
    true = np.array([1.2, 0.4, 1.0])
    for _ in range(60):
        y = (
            math.sqrt(1.2) * rng.normal(size=paper.max() + 1)[paper]
            + math.sqrt(0.4) * rng.normal(size=reviewer.max() + 1)[reviewer]
        )
        fit = fitted(paper, reviewer, y + rng.normal(size=len(paper)))
        found.append(fit["variances"].numpy())
        se.append(fit["se"].numpy())
    spread = np.std(found, 0)
    assert (np.abs(np.mean(found, 0) - true) < 3.5 * spread / math.sqrt(60)).all()
    assert (np.abs(np.nanmean(se, 0) / spread - 1) < 0.3).all()


def test_posterior_and_acceptance():
    """Draws have the moments of Gaussian conditioning on the dense covariance; P(accept) is that of draws there."""
    paper, reviewer, y = design(4, 60, 70)
    index, scored, variances = (
        [torch.as_tensor(paper), torch.as_tensor(reviewer)],
        torch.as_tensor(y),
        torch.tensor([1.1, 0.4, 0.9]).double(),
    )
    effects = np.hstack([np.eye(paper.max() + 1)[paper], np.eye(reviewer.max() + 1)[reviewer]])
    n = paper.max() + 1
    prior = np.diag(np.repeat([1.1, 0.4], [n, effects.shape[1] - n]))
    gain = prior @ effects.T @ np.linalg.inv(effects @ prior @ effects.T + 0.9 * np.eye(len(y)))
    mean, covariance = gain @ (y - y.mean()), prior - gain @ effects @ prior
    draws = torch.cat(rc.posterior_draws(index, variances, scored, 20_000, torch.Generator().manual_seed(0))).numpy()
    assert np.abs(draws.mean(1) - mean).max() < 5 * math.sqrt(covariance.max() / 20_000)
    assert np.abs(np.cov(draws) - covariance).max() < 0.05
    rng = np.random.default_rng(0)
    b = rng.multivariate_normal(mean, covariance, 10_000)
    held = (y - b[:, n:][:, reviewer]) @ effects[:, :n] / effects[:, :n].sum(0)
    rerun = b[:, :n] + rng.normal(size=(10_000, n)) * np.sqrt(0.9 / effects[:, :n].sum(0))
    for ours, means in zip(rc.acceptance(index, variances, scored, 4, torch.Generator().manual_seed(0)), (held, rerun)):
        chance = (np.argsort(np.argsort(-means, 1), 1) < 4).mean(0)
        assert np.abs(chance - ours).max() < 0.065 and ours.sum() == pytest.approx(4, abs=1e-4)
    paper, _, y = design(7)  # without names of reviewers: one index
    variances = rc.calibrate([torch.as_tensor(paper)], torch.as_tensor(y))[0]
    k = np.bincount(paper)[0]
    within = np.array([y[paper == i].var(ddof=1) for i in range(paper.max() + 1)]).mean()
    among = k * np.array([y[paper == i].mean() for i in range(paper.max() + 1)]).var()
    assert variances.numpy() == pytest.approx([(among - within) / k, within], rel=1e-4)  # balanced: closed form
    chances = rc.acceptance([torch.as_tensor(paper)], variances, torch.as_tensor(y), 4, torch.Generator())
    assert set(chances[0].round(3)) == {0.0, 1.0} and chances[1].sum() == pytest.approx(4, abs=1e-4)


def test_shared():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 17))
    tops = [[set(np.argsort(-x)[:m]) for x in (a, b)] for m in range(1, 18)]
    assert rc.shared(a, b, range(1, 18), rng).tolist() == [len(x & y) for x, y in tops]
    ties = [int(rc.shared(np.zeros(20), np.zeros(20), [5], rng)[0]) for _ in range(2000)]
    assert np.mean(ties) == pytest.approx(1.25, abs=4 * np.std(ties) / math.sqrt(2000))  # 5·5/20, not 5


# ----------------------------------------------------------------------------------------------- 2. the claims


def test_more_selective_is_more_arbitrary():
    """The paper's conclusion: from 2021's one correlation, and by all four families at every rate from 3 to 20 %."""
    rho = rc.tetrachoric(rc.NEURIPS["2021"])[0]
    rates = np.array([0.03, 0.05, 0.10, 0.15, 0.20, 0.2273, 0.25, 0.30, 0.40, 0.50, 0.70, 0.90])
    golden = [0.766, 0.7197, 0.6394, 0.5800, 0.5306, 0.5063, 0.4871, 0.4476, 0.3765, 0.3119, 0.192, 0.071]
    assert rc.arbitrariness(rates, rho) == pytest.approx(golden, abs=1e-3)
    for family, strength in rc.strengths(rc.NEURIPS["2021"]).items():
        curve = rc.arbitrariness(np.arange(3, 21) / 100, strength, family)
        assert (curve > 203 / 401).all(), family
        assert rc.arbitrariness(401 / 1764, strength, family) == pytest.approx(203 / 401, abs=1e-6)
        if family != "t3 quality":  # whose arbitrariness is largest at 8 %
            assert (np.diff(curve) < 0).all()


def test_review_model_and_simulation():
    """The reference's 50 % subjective reviews: exact values, and ours simulated; what 2014's reviews imply."""
    rhos = [rc.implied_correlation(0.5, 0, 0.5, r) for r in range(1, 7)]
    exact = [0.4635, 0.5646, 0.6241, 0.6644, 0.6940, 0.7170]
    assert [1 - float(rc.arbitrariness(0.23, rho)) for rho in rhos] == pytest.approx(exact, abs=1e-4)
    quality, offset, opinion = rc.FIT_2014
    assert rc.implied_correlation(quality, offset, opinion, 3) == pytest.approx(0.7177, abs=1e-4)
    assert rc.implied_correlation(quality, 0, opinion, 3) == pytest.approx(0.7515, abs=1e-4)
    assert rc.implied_correlation(quality, 0, opinion, 3, 0.726) == pytest.approx(0.5266, abs=1e-3)


# --------------------------------------------------------------------------------------------------- 3. the tool


def in_process(args, tmp_path, monkeypatch, capsys):
    """main() here, which saves the start of a process → (stdout, results)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["review_consistency.py", *map(str, args)])
    rc.main()
    out = capsys.readouterr().out
    assert "nan" not in out.split() and out.split()[-1].endswith("results.json")
    return out, json.loads((tmp_path / out.split()[-1]).read_text())


def test_default_run(tmp_path):
    done = subprocess.run(
        [sys.executable, HOUSE / "review_consistency.py"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0 and done.stderr == ""
    for word in (
        "0.259",
        "0.230",
        "0.494",
        "0.506",
        "0.364 to 0.632",
        "0.445 to 0.568",
        "0.751",
        "t3 quality",
        "undefined",
    ):
        assert word in done.stdout, word
    results, figure = (
        tmp_path / "out/review_consistency/neurips" / name for name in ("results.json", "arbitrariness.png")
    )
    tables = json.loads(results.read_text())["tables"]
    assert tables["2021"]["latent correlation ρ"] == pytest.approx(0.55707, abs=1e-5) and figure.stat().st_size > 30_000


LEVELS_CSV = ",oral,poster,reject,withdrawn\noral,3,5,4,0\nposter,4,30,40,2\nreject,6,38,200,10\nwithdrawn,0,1,12,20\n"
LONG = "paper,committee,decision\n" + "".join(
    f"p{i},{c},{d}\n"
    for i, pair in enumerate(
        (
            ("Accept (Oral)", "Accepted"),
            ("accept", "Reject"),
            ("Reject", "Rejected"),
            ("Accept: poster", "desk reject"),
            ("Withdrawn", "Reject"),
            ("", "reject"),
        )
    )
    for c, d in zip("AB", pair)
)
DECISIONS = {  # file: (text, flags, the cells of acceptance that it must give)
    "levels.csv": (LEVELS_CSV, [], [42, 46, 45, 242]),
    "drop.csv": (LEVELS_CSV, ["--withdrawn", "drop"], [42, 44, 44, 200]),
    "bare.tsv": ("3\t5\r\n4\t30\r\n", [], [3, 5, 4, 30]),
    "long.csv": (LONG + "p9,A,reject\n", [], [1, 2, 0, 3]),
    "long_drop.csv": (LONG, ["--withdrawn", "drop"], [1, 2, 0, 1]),
    "wide.csv": (
        "\ufeffPaper;Decision1;Decision2\r\n1;True;False\r\n2;TRUE;true\r\n\r\n3;False;False\r\n",
        [],
        [1, 1, 0, 1],
    ),
    "named.csv": (
        "forum,pc,verdict\n1,A,yes\n1,B,no\n2,A,no\n2,B,no\n",
        ["--columns", "paper=forum", "--columns", "committee=PC", "--columns", "decision=verdict"],
        [0, 1, 0, 1],
    ),
    "words.csv": (
        "paper,decision1,decision2\n1,Not accepted,Invite to talk\n2,accept,Not accepted\n",
        ["--decisions", "reject=not accepted", "--decisions", "accept=Invite to talk"],
        [0, 1, 1, 0],
    ),
}


@pytest.mark.parametrize("name", DECISIONS)
def test_table_reads(name, tmp_path, monkeypatch, capsys):
    text, flags, cells = DECISIONS[name]
    (tmp_path / name).write_text(text, newline="")
    out, results = in_process(["table", name, *flags, "--no_plot"], tmp_path, monkeypatch, capsys)
    assert next(iter(results["cells"].values())) == cells, out


def test_table_counts(tmp_path, monkeypatch, capsys):
    out, results = in_process(["table", 22, 22, 21, 101, "--accept", 0.18, "--no_plot"], tmp_path, monkeypatch, capsys)
    summary = results["tables"]["level 1 or better"]
    assert (
        summary["latent correlation ρ"] == pytest.approx(0.52665, abs=1e-5)
        and "arbitrariness at 0.18, normal" in summary
    )
    _, results = in_process(["table", *(3, 5, 4, 4, 30, 40, 6, 38, 200), "--no_plot"], tmp_path, monkeypatch, capsys)
    assert results["cells"] == {"level 2 or better": [42, 44, 44, 200], "level 1 or better": [3, 9, 10, 308]}
    for cells in (
        (0, 0, 3, 10),
        (0, 5, 0),
        (5, 0, 0, 20),
        (10, 0, 0),
    ):  # nothing accepted, always apart, never apart, all in
        in_process(["table", *cells, "--no_plot"], tmp_path, monkeypatch, capsys)


def write_reviews(path, duplicated=20):
    """60 papers of 3 reviews (12: one accepted in four); the first `duplicated` have a second committee of 3."""
    rng = np.random.default_rng(0)
    offset, rows = rng.normal(0, 0.7, 30), []
    for i in range(60):
        quality = rng.normal()
        for j, r in enumerate(rng.permutation(30)[: 6 if i < duplicated else 3]):
            rows.append(
                (
                    f"p{i}",
                    f"r{r}",
                    "AB"[j // 3] if i < duplicated else "",
                    round(5 + quality + offset[r] + rng.normal(), 2),
                    "accept" if i % 4 == 0 else "reject",
                )
            )
    path.write_text(
        "paper,reviewer,committee,score,decision,confidence\n"
        + "".join(",".join(map(str, row)) + ",3\n" for row in rows)
    )
    return rows


def test_scores(tmp_path, monkeypatch, capsys):
    """Partial committees: calibrate on all, correlate the duplicated; the rate is of papers, not reviews."""
    rows = write_reviews(tmp_path / "reviews.csv")
    out, results = in_process(["scores", "reviews.csv"], tmp_path, monkeypatch, capsys)
    assert "not used: confidence" in out and "20 of 60 papers have two committees" in out and "240 rows" in out
    cells = {}
    for paper, _, committee, score, _ in rows:
        cells.setdefault((paper, committee), []).append(score)
    pairs = [[np.mean(cells[f"p{i}", c]) for c in "AB"] for i in range(20)]
    assert results["committees"][0][3] == pytest.approx(np.corrcoef(np.array(pairs).T)[0, 1])
    index = [np.unique([row[i] for row in rows], return_inverse=True)[1] for i in (0, 1)]
    y = np.array([row[3] for row in rows])
    assert dense(*index, y)(np.array(results["variances"])) < dense(*index, y)(np.array([1.0, 0.5, 1.0]))
    with open(tmp_path / "out/review_consistency/scores/papers.csv") as file:
        papers = list(csv.DictReader(file))
    assert len(papers) == 60 and sum(float(row["p_accept"]) for row in papers) == pytest.approx(15, abs=0.01)
    quality, offset, opinion = results["variances"]
    assert results["committees"][0][1] == pytest.approx(quality / (quality + (offset + opinion) / 3))  # committees of 3
    assert results["committees"][1][1] == pytest.approx(quality / (quality + opinion / 3))
    with open(tmp_path / "out/review_consistency/scores/reviewers.csv") as file:
        offsets = {row["reviewer"]: float(row["offset"]) for row in csv.DictReader(file)}
    best = papers[0]["paper"]
    calibrated = [score - offsets[reviewer] for paper, reviewer, _, score, _ in rows if paper == best]
    assert float(papers[0]["calibrated_mean"]) == pytest.approx(np.mean(calibrated))
    strict = {r: np.mean([score for _, reviewer, _, score, _ in rows if reviewer == r]) for r in offsets}
    assert np.corrcoef([offsets[r] for r in strict], list(strict.values()))[0, 1] > 0.5
    means = [float(row["calibrated_mean"]) for row in papers]
    assert means == sorted(means, reverse=True)
    with gzip.open(
        tmp_path / "more.csv.gz", "wt"
    ) as file:  # 25 accepted papers of 6 reviews, 75 rejected of 3: the rate is a quarter
        print("id;rating;decision", file=file)
        for i, j in product(range(100), range(6)):
            if j < 3 or i < 25:
                print(f"p{i};{i % 7 + j % 2}: {'clear accept' if j else 'marginal'}" + f";{i < 25}", file=file)
    out, results = in_process(["scores", "more.csv.gz"], tmp_path, monkeypatch, capsys)
    assert results["rate"] == 0.25 and "375 reviews" in out and len(results["variances"]) == 2


def test_scores_wide_and_withdrawn(tmp_path, monkeypatch, capsys):
    """ICLR's forms with columns moved; a blank score, a cell with a line separator, a withdrawn paper left out."""
    (tmp_path / "wide.tsv").write_text(
        "decision\tpaper_id\t1\t0\t2\n"
        + "".join(
            f"{('Accept (Poster)', 'Reject', 'Unknown')[i % 3]}\tp{i}\t{i % 5}.0\t{i * 3 % 7}\t{'' if i % 2 else 4}\n"
            for i in range(12)
        ),
        encoding="utf-8",
    )
    _, kept = in_process(["scores", "wide.tsv", "--accept", 0.4], tmp_path, monkeypatch, capsys)
    _, results = in_process(["scores", "wide.tsv"], tmp_path, monkeypatch, capsys)
    out, dropped = in_process(["scores", "wide.tsv", "--withdrawn", "drop"], tmp_path, monkeypatch, capsys)
    assert (kept["rate"], results["rate"], dropped["rate"]) == (0.4, pytest.approx(1 / 3), 0.5) and "of 8 papers" in out
    (tmp_path / "list.csv").write_text(
        "id,title,ratings,decision\n"
        + "".join(
            f'p{i},An\u2028odd one,"[{i}, {i + i % 3}, {i - 1}]",{"Reject" if i % 3 else "Accept: notable-top-5%"}\n'
            for i in range(9)
        ),
        encoding="utf-8",
    )
    out, results = in_process(["scores", "list.csv", "--accept", 0.3], tmp_path, monkeypatch, capsys)
    assert "9 rows" in out and "27 reviews" in out


@needs_data
def test_the_data(tmp_path, monkeypatch, capsys):
    out, results = in_process(["scores", DATA / "synthetic_calibration.csv"], tmp_path, monkeypatch, capsys)
    assert results["variances"] == pytest.approx([1.03387629, 0.24238404, 1.19010680], rel=1e-4)
    with open(tmp_path / "out/review_consistency/scores/papers.csv") as file:
        first = next(row for row in csv.DictReader(file) if row["paper"] == "p0")
    assert 4.980488866667 + float(first["effect"]) == pytest.approx(5.22159233, abs=1e-4)
    lines = (
        (DATA / "synthetic_calibration.csv").read_text().splitlines()[:301]
    )  # a fit that stops early gives α_b 0.0896 here
    (tmp_path / "head.csv").write_text("\n".join(lines))
    _, results = in_process(["scores", "head.csv"], tmp_path, monkeypatch, capsys)
    index = [np.unique([line.split(",")[i] for line in lines[1:]], return_inverse=True)[1] for i in (0, 1)]
    nll = dense(*index, np.array([float(line.split(",")[2]) for line in lines[1:]]))(np.array(results["variances"]))
    assert results["variances"][1] == pytest.approx(0.1724, abs=1e-4) and nll == pytest.approx(521.3846, abs=1e-3)
    for year, papers, reviews, implied in ((2021, 2965, 11452, 0.382), (2022, 3262, 12733, 0.323)):
        out, results = in_process(["scores", DATA / f"iclr{year}_ratings.tsv"], tmp_path, monkeypatch, capsys)
        assert f"{reviews} reviews, {papers} papers" in out and results["committees"][0][2] == pytest.approx(
            implied, abs=6e-4
        )
    out, results = in_process(["scores", DATA / "iclr2023_20230210.csv"], tmp_path, monkeypatch, capsys)
    assert "4872 papers" in out and results["committees"][0][2] == pytest.approx(0.354, abs=6e-4)
    for path in DATA.glob("esa2018_*.tsv"):
        (tmp_path / path.name.removeprefix("esa2018_")).write_bytes(path.read_bytes())
    out, results = in_process(["esa", tmp_path, "--no_plot"], tmp_path, monkeypatch, capsys)
    assert list(results["cells"].values()) == [[12, 8, 10, 21], [11, 6, 1, 33], [10, 7, 1, 33]]
    assert results["more"][0][1] == pytest.approx(0.6649, abs=1e-4)
    assert results["more"][1][1:] == pytest.approx([0.7441, 0.6874, 0.6746], abs=5e-5)


def test_simulate(tmp_path, monkeypatch, capsys):
    """The reference's conference: its exact values, and ours simulated; offsets count as opinion."""
    _, results = in_process(["simulate", "--reviewers", 2], tmp_path, monkeypatch, capsys)
    cells = np.array(
        [[cell.strip("()") for cell in text.split()] for text in results["arbitrariness"][0][1:]], float
    )  # (rates, 2)
    assert 1 - cells[:, 1] == pytest.approx([0.2438, 0.3240, 0.4358, 0.5226, 0.6667], abs=6e-4)
    assert (abs(cells[:, 0] - cells[:, 1]) < 4 * np.sqrt(0.25 / np.array(results["rates"]) / 1e5) + 1e-3).all()
    _, raw = in_process(["simulate", "--variances", 1, 1, 1], tmp_path, monkeypatch, capsys)
    assert raw["arbitrariness"][1][3].endswith(f"({float(rc.arbitrariness(0.2, 1 / 2)):.3f})")


FILES = {
    "odd.csv": "paper,reviewer,score\np1,r1,5\np1,r2,0.8F\n",
    "comma.csv": "paper;score\np1;5,5\np1;6\n",
    "gap.csv": "paper,reviewer,score\np1,r1,5\np2,,6\n",
    "short.csv": "paper,reviewer,score\np1,r1\n",
    "header.csv": "paper,referee,points\np1,r1,5\n",
    "two.csv": "paper,id,score\np1,1,5\n",
    "twice.csv": "paper,reviewer,score\np1,r1,5\np2,r1,4\np1,r1,6\np3,r2,3\n",
    "once.csv": "paper,reviewer,score\np1,r1,5\np1,r2,4\np2,r3,3\np3,r4,1\n",
    "quote.csv": 'paper,reviewer,score\np1,"r1,5\np1,r2,4\n',
    "three.csv": "paper,committee,score\n" + "".join(f"p{i},{c},{i}\n" for i in range(4) for c in "ABC"),
    "fine.csv": "paper,reviewer,score\n"
    + "".join(f"p{i},r{j},{(i * 5 + j * 3) % 8}\n" for i in range(5) for j in range(3)),
    "changes.csv": "paper,committee,decision\np1,A,accept\np1,B,reject\np1,A,reject\n",
    "vague.csv": "paper,committee,decision\np1,A,accept\np1,B,Withdrawn after accept\np2,A,Not accepted\n"
    'p2,B,"Rejected, invite to poster session"\n',
    "swapped.csv": ",oral,reject\nreject,1,2\noral,3,4\n",
    "half.csv": ",oral,reject\noral,1,2.5\nreject,3,4\n",
    "oblong.csv": "1,2,3\n4,5,6\n",
    "latin.csv": "paper,score\nm\u00fcller,3\n".encode("latin-1"),
}


@pytest.mark.parametrize(
    "args, words",
    [
        ("nonsense", "nonsense"),
        ("neurips extra", "extra"),
        ("table", "input"),
        ("table 1 2", "2 counts"),
        ("table 1 2 x", "count 3: 'x'"),
        ("table 1 2 -3", "whole numbers from 0"),
        ("table 0 0 0", "not all 0"),
        ("table nowhere.csv", "nowhere.csv"),
        ("table oblong.csv", "square"),
        ("table swapped.csv", "same order"),
        ("table half.csv", "whole numbers"),
        ("table changes.csv", "two decisions"),
        ("table vague.csv", "['Not accepted', 'Rejected, invite to poster session', 'Withdrawn after accept']"),
        ("table vague.csv --decisions maybe=x", "--decisions maybe=x"),
        ("table 5 5 5 --accept 1.5", "--accept 1.5"),
        ("neurips --accept 0.2,0.5", "0.2,0.5"),
        ("scores fine.csv --accept 0.2,0.5", "0.2,0.5"),
        ("scores fine.csv --accept 0.01", "takes 0 of 5"),
        ("scores odd.csv", "row 3: '0.8F' is not a number"),
        ("scores comma.csv", "row 2: '5,5'"),
        ("scores gap.csv", "row 3: no name"),
        ("scores short.csv", "row 2: 2 cells"),
        ("scores header.csv", "columns 'score'"),
        ("scores two.csv", "2 columns 'paper'"),
        ("scores header.csv --columns points=score", "--columns points=score"),
        ("scores twice.csv", "row 4: 'r1' reviews 'p1'"),
        ("scores once.csv", "no reviewer with two"),
        ("scores quote.csv", "not closed"),
        ("scores three.csv", "two are the most"),
        ("scores latin.csv", "UTF-8"),
        ("simulate --variances 1 0 0", "--variances"),
        ("simulate --likert 3", "--likert"),
        ("esa nowhere", "nowhere"),
        ("table 5 5 5 --out odd.csv", "odd.csv"),
    ],
)
def test_mistakes_end_in_one_line(args, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name, text in FILES.items():
        Path(name).write_bytes(text if isinstance(text, bytes) else text.encode())
    monkeypatch.setattr(sys, "argv", ["review_consistency.py", *args.split()])
    with pytest.raises(SystemExit) as stop:
        rc.main()
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.count("\n") == 1 and words in err, err
    assert not list(tmp_path.rglob("results.json"))
