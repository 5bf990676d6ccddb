"""review_consistency.py: counts, latent scores, reviewer calibration, simulation, and the tool."""

import csv
import json
import math
import os
import signal
import subprocess
import sys
import time
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



@pytest.fixture(autouse=True)
def one_thread():
    """Most of this is small float64 work, in which threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# -------------------------------------------------------------------------------------------------------- 1. the mathematics

TABLE = {  # name: (2014, 2021), from the counts by hand
    "inconsistency": (43 / 166, 203 / 882), "acceptance rate": (87 / 332, 401 / 1764), "arbitrariness": (43 / 87, 203 / 401),
    "accept precision": (44 / 87, 198 / 401), "reject precision": (202 / 245, 1160 / 1363), "agreed accept rate": (22 / 123, 99 / 679),
    "overlap (Jaccard)": (22 / 65, 99 / 302), "arbitrariness of lots": (1 - 87 / 332, 1 - 401 / 1764)}


def test_metrics():
    for i, year in enumerate(("2014", "2021")):
        found = rc.consistency(rc.NEURIPS[year])
        for name, values in TABLE.items():
            assert found[name] == pytest.approx(values[i], abs=1e-12), name
        rounded = {name: round(float(value), 4) for name, value in found.items()}
        assert [rounded[name] for name in ("inconsistency", "arbitrariness", "reject precision", "relative arbitrariness")] == [
            [0.259, 0.4943, 0.8245, 0.6698], [0.2302, 0.5062, 0.8511, 0.6552]][i]
    found = rc.consistency(rc.NEURIPS["2014"])
    assert found["arbitrariness, mean of directions"] == pytest.approx((22 / 44 + 21 / 43) / 2)


def test_metrics_paper_by_paper():
    """The same numbers from two lists of decisions, counted one paper at a time."""
    rng = np.random.default_rng(0)
    a, b = rng.random(200) < 0.3, rng.random(200) < 0.5
    found = rc.consistency([sum(a & b), sum(a & ~b), sum(b & ~a), sum(~a & ~b)])
    differ = sum(x != y for x, y in zip(a, b))
    assert found["inconsistency"] == pytest.approx(differ / 200)
    turned = [y == 0 for x, y in zip(a, b) if x] + [x == 0 for x, y in zip(a, b) if y]  # over accepts: does the other one reject?
    assert found["arbitrariness"] == pytest.approx(np.mean(turned))
    kept = [y == 0 for x, y in zip(a, b) if not x] + [x == 0 for x, y in zip(a, b) if not y]
    assert found["reject precision"] == pytest.approx(np.mean(kept))
    lots = np.mean([x != y for x, y in product(a, b)])  # the second committee's decisions dealt out at random
    assert found["inconsistency of lots"] == pytest.approx(lots)
    assert found["Cohen's kappa"] == pytest.approx(1 - differ / 200 / lots)
    swapped = rc.consistency([sum(a & b), sum(b & ~a), sum(a & ~b), sum(~a & ~b)])
    assert all(found[name] == pytest.approx(float(swapped[name])) for name in found)


def test_undefined_is_nan_never_inf():
    for cells in ([0, 0, 0, 5], [5, 0, 0, 0], [0, 0, 3, 4], [0, 3, 4, 0]):
        assert not any(np.isinf(value) for value in rc.consistency(cells).values())
    assert np.isnan(rc.consistency([0, 0, 0, 5])["arbitrariness"]) and rc.consistency([0, 0, 3, 4])["arbitrariness"] == 1


def exact_tail(k, n, p):
    return sum(math.comb(n, j) * Fraction(p) ** j * (1 - Fraction(p)) ** (n - j) for j in range(k, n + 1))


def test_clopper_pearson():
    for (k, n), (low, high) in {(43, 166): (0.1942, 0.3326), (203, 882): (0.2028, 0.2594), (43, 87): (0.3853, 0.6036),
                                (203, 401): (0.4562, 0.5562)}.items():
        assert rc.clopper_pearson(k, n) == pytest.approx((low, high), abs=5e-5)
    for k, n in ((3, 11), (10, 12), (1, 7)):
        low, high = rc.clopper_pearson(k, n)
        assert float(exact_tail(k, n, low)) == pytest.approx(0.025, abs=1e-9)
        assert float(1 - exact_tail(k + 1, n, high)) == pytest.approx(0.025, abs=1e-9)
    assert rc.clopper_pearson(0, 10) == (0.0, pytest.approx(1 - 0.025**0.1)) and rc.clopper_pearson(10, 10)[1] == 1.0


def test_clopper_pearson_covers():
    intervals = [rc.clopper_pearson(k, 20) for k in range(21)]
    for p in np.linspace(0.01, 0.99, 99):
        covered = sum(math.comb(20, k) * p**k * (1 - p) ** (20 - k) for k, (low, high) in enumerate(intervals) if low <= p <= high)
        assert 0.95 <= covered < 1


def test_wilson_newcombe_fisher():
    z = 1.959963984540054
    for k, n in ((43, 166), (0, 9), (5, 5)):
        for p in rc.wilson(k, n):  # both ends solve |k/n − p| = z·√(p(1 − p)/n)
            assert (k / n - p) ** 2 == pytest.approx(z * z * p * (1 - p) / n, abs=1e-12)
    assert rc.wilson(203, 882) == pytest.approx((0.2036, 0.2591), abs=1e-4)
    assert rc.newcombe(56, 70, 48, 80) == pytest.approx((0.0524, 0.3339), abs=1e-4)  # Newcombe 1998, table II (a), method 10
    assert rc.fisher_test(3, 4, 1, 4) == pytest.approx(34 / 70)  # the lady tasting tea
    for k1, n1, k2, n2 in ((2, 9, 7, 11), (43, 166, 203, 882)):
        ways = {j: math.comb(n1, j) * math.comb(n2, k1 + k2 - j) for j in range(max(0, k1 + k2 - n2), min(n1, k1 + k2) + 1)}
        rarer = sum(w for w in ways.values() if w <= ways[k1])
        assert rc.fisher_test(k1, n1, k2, n2) == pytest.approx(rarer / sum(ways.values()), rel=1e-6)


def test_bootstrap_and_posterior():
    """Bootstrap se of arbitrariness D/(2A + D) within 5 % of the delta method, √(4ad(a + d)/n)/(2a + d)²; Dirichlet moments exact."""
    rng = np.random.default_rng(1)
    for year, interval in (("2014", (0.3735, 0.6316)), ("2021", (0.448, 0.568))):
        both, first, second, neither = (float(x) for x in rc.four_cells(rc.NEURIPS[year]))
        n = both + first + second + neither
        a, d = both / n, (first + second) / n
        draws = rc.consistency(rc.bootstrap_papers(rc.NEURIPS[year], 20_000, rng))["arbitrariness"]
        assert draws.std() == pytest.approx(math.sqrt(4 * a * d * (a + d) / n) / (2 * a + d) ** 2, rel=0.05)
        assert rc.percentiles(draws) == pytest.approx(interval, abs=0.008)
        shares = rc.dirichlet_posterior(rc.NEURIPS[year], 40_000, rng)
        alpha = np.array([both + 1, first + second + 1, neither + 1])
        mean = alpha / (n + 3)
        sd = np.sqrt(alpha * (n + 3 - alpha) / ((n + 3) ** 2 * (n + 4)))
        assert shares.mean(0) == pytest.approx(mean, abs=5 * sd.max() / 200) and shares.std(0) == pytest.approx(sd, rel=0.02)
    assert np.sqrt([23 * 146 / (169**2 * 170), 44 * 125 / (169**2 * 170), 102 * 67 / (169**2 * 170)]) == pytest.approx(
        rc.dirichlet_posterior(rc.NEURIPS["2014"], 40_000, rng).std(0), rel=0.02)


def test_bivariate_normal_closed_forms():
    for rho in np.linspace(-0.9, 0.9, 13):
        assert rc.both_above(0, 0, rho) == pytest.approx(0.25 + math.asin(rho) / (2 * math.pi), abs=1e-12)
    h1, h2 = np.array([0.3, -1.2, 2.0]), np.array([1.1, 0.4, -0.5])
    assert rc.both_above(h1, h2, 0.0) == pytest.approx(phi(-h1) * phi(-h2), abs=1e-14)
    assert rc.both_above(h1, h2, 0.7) == pytest.approx(rc.both_above(h2, h1, 0.7), abs=1e-14)
    assert rc.both_above(h1, h2, 0.7) + rc.both_above(h1, -h2, -0.7) == pytest.approx(phi(-h1), abs=1e-13)  # X₂ above or below h₂


@pytest.mark.parametrize("rho", [-0.95, -0.3, 0.5, 0.9, 0.99, 0.9999])
def test_bivariate_normal_by_conditioning(rho):
    """B = ∫ φ(x)·Φ((ρx − h₂)/√(1 − ρ²)) dx over x > h₁: another integral, by panels around the step at x = h₂/ρ."""
    nodes, weights = np.polynomial.legendre.leggauss(60)
    for h1, h2 in ((0.5, 0.5), (0.5, 0.7), (-0.6, 1.0), (1.0, 1.02)):
        width, step = math.sqrt(1 - rho * rho), h2 / rho
        edges = sorted({h1, 12.0, *(min(max(h1, step + k * width), 12.0) for k in (-30, -12, -6, -3, -1, 0, 1, 3, 6, 12, 30))})
        edges = sorted({*edges, *(h1 + (12 - h1) * i / 8 for i in range(9))})
        value = sum((b - a) / 2 * weights @ (np.exp(-x * x / 2) / math.sqrt(2 * math.pi) * phi((rho * x - h2) / width))
                    for a, b in zip(edges, edges[1:]) for x in [(a + b) / 2 + (b - a) / 2 * nodes])
        assert rc.both_above(h1, h2, rho) == pytest.approx(value, abs=1e-10)


def test_bivariate_normal_by_simulation():
    g = torch.Generator().manual_seed(0)
    x, e = torch.randn(2, 10**7, generator=g)
    hits = int(((x > 0.7) & (0.55 * x + math.sqrt(1 - 0.55**2) * e > 0.4)).sum())
    p = float(rc.both_above(0.7, 0.4, 0.55))
    assert abs(hits / 1e7 - p) < 4 * math.sqrt(p * (1 - p) / 1e7)


def test_tetrachoric():
    for p1, p2, rho in ((0.2, 0.3, 0.55), (0.5, 0.1, -0.4), (0.26, 0.26, 0.95), (0.05, 0.9, 0.1)):
        h1, h2 = rc.normal_quantile(1 - p1), rc.normal_quantile(1 - p2)
        both = float(rc.both_above(h1, h2, rho))
        assert rc.tetrachoric([both, p1 - both, p2 - both, 1 - p1 - p2 + both]) == pytest.approx(rho, abs=1e-8)
    for cells, rho in (((22, 22, 21, 101), 0.52665), ((22, 43, 101), 0.52652), (rc.NEURIPS["2021"], 0.55707), ((12, 8, 10, 21), 0.4210),
                       ((11, 6, 1, 33), 0.9161), ((10, 7, 1, 33), 0.8931), ((30, 10, 10, 30), math.sin(math.pi / 4))):
        assert rc.tetrachoric(cells) == pytest.approx(rho, abs=1e-4)
    many = rc.tetrachoric([[22, 22, 21, 101], [12, 8, 10, 21]])
    assert many == pytest.approx([0.52665, 0.4210], abs=1e-4)
    assert rc.tetrachoric([5, 0, 0, 20]) == pytest.approx(rc.tetrachoric([5.5, 0.5, 0.5, 20.5]), abs=1e-10)


def test_polychoric():
    esa = [[2, 1, 1, 0, 0], [0, 9, 6, 1, 0], [0, 6, 4, 1, 2], [0, 2, 0, 0, 3], [0, 2, 2, 0, 9]]
    assert rc.polychoric(esa)[0] == pytest.approx(0.6649, abs=1e-4)
    rho, low, high = rc.polychoric([[22, 22], [21, 101]])
    assert rho == pytest.approx(0.52665, abs=1e-4)  # two levels: the tetrachoric one
    cuts1, cuts2 = np.array([-9, -0.5, 0.4, 1.1, 9]), np.array([-9, -0.9, 0.9, 9])  # exact cells of a known model
    above = rc.both_above(cuts1[::-1, None], cuts2[::-1], 0.6)
    cells = 1e4 * np.diff(np.diff(above, axis=0), axis=1)
    assert rc.polychoric(cells)[0] == pytest.approx(0.6, abs=1e-6)

    def log_likelihood(r):
        h = [rc.normal_quantile(1 - 44 / 166), rc.normal_quantile(1 - 43 / 166)]
        b = float(rc.both_above(*h, r))
        return np.sum([[22, 22], [21, 101]] * np.log([[b, 44 / 166 - b], [43 / 166 - b, 1 - 87 / 166 + b]]))

    for end in (low, high):
        assert log_likelihood(rho) - log_likelihood(end) == pytest.approx(1.9207, abs=1e-4)


@pytest.mark.parametrize("family", rc.FAMILIES)
def test_families_by_simulation(family):
    """Arbitrariness of two committees drawn as the docstring says, at a rate and correlation, to 4 standard errors."""
    rng, n, strength, rate = np.random.default_rng(3), 10**6, 0.5, 0.2
    if family == "beta-binomial":  # κ = 0.5: α + β = 1
        q = rng.beta(rate, 1 - rate, n)
        a, b = rng.random((2, n)) < q
    else:
        t3, logistic, normal = (rng.standard_t(3, (3, n)) / math.sqrt(3), rng.logistic(0, math.sqrt(3) / math.pi, (2, n)),
                                rng.standard_normal((3, n)))
        quality = t3[2] if family == "t3 quality" else normal[2]
        opinions = dict(zip(rc.FAMILIES, (normal, logistic, t3, normal)))[family]
        x, y = (math.sqrt(strength) * quality + math.sqrt(1 - strength) * opinions[i] for i in range(2))
        h = np.quantile(np.concatenate([x, y]), 1 - rate)
        a, b = x > h, y > h
    simulated = 1 - 2 * (a & b).sum() / (a.sum() + b.sum())
    assert rc.arbitrariness(np.array([rate]), strength, family)[0] == pytest.approx(simulated, abs=4 * math.sqrt(0.5 / (rate * n)))
    q, weight = rc.accept_chances(family, np.array([rate, 0.6]), strength)
    assert (q * weight).sum(1) == pytest.approx([rate, 0.6], abs=1e-9) and weight.sum(1) == pytest.approx([1, 1])
    assert rc.fit_family(family, rate, float(rc.arbitrariness(np.array([rate]), strength, family)[0])) == pytest.approx(strength, abs=1e-6)


def test_families_agree_with_closed_forms():
    rates = np.array([0.05, 0.2273, 0.5, 0.9])
    q, weight = rc.accept_chances("normal", rates, 0.557)
    assert 1 - (q * q * weight).sum(1) / rates == pytest.approx(rc.arbitrariness(rates, 0.557), abs=1e-10)
    assert rc.arbitrariness(rates, 0.3448, "beta-binomial") == pytest.approx((1 - 0.3448) * (1 - rates), abs=1e-8)
    assert rc.arbitrariness(0.5, 0.5) == pytest.approx(1 / 3, abs=1e-12)
    assert rc.arbitrariness(rates, 0.0) == pytest.approx(1 - rates, abs=1e-12)
    assert (rc.arbitrariness(rates, 0.99999) < 0.01).all()
    grid = rc.arbitrariness(np.linspace(0.01, 0.99, 99), np.linspace(0.01, 0.99, 50)[:, None])
    assert (np.diff(grid, axis=0) < 0).all() and (np.diff(grid, axis=1) < 0).all()  # falls with ρ and with the rate
    assert math.isnan(rc.fit_family("t3 quality", 0.2, 0.85)) and math.isnan(rc.fit_family("normal", 0.2, 0.0))


DESIGNS = {  # papers, reviewers of each review
    "more papers": (np.repeat(np.arange(30), 3), lambda rng: np.concatenate([rng.permutation(12)[:3] for _ in range(30)])),
    "more reviewers": (np.repeat(np.arange(10), 4), lambda rng: np.concatenate([rng.permutation(25)[:4] for _ in range(10)])),
    "disconnected": (np.repeat(np.arange(12), 2), lambda rng: np.repeat(np.arange(12) // 4, 2) * 2 + np.tile([0, 1], 12)),
    "single reviews": (np.array([0, 0, 0, 1, 2, 2, 3, 4, 4, 5]), lambda rng: np.array([0, 1, 2, 0, 1, 3, 4, 0, 5, 6])),
}


def design(name, seed=0):
    rng = np.random.default_rng(seed)
    paper, make = DESIGNS[name]
    reviewer = np.unique(make(rng), return_inverse=True)[1]
    quality, offset = rng.normal(0, 1.2, paper.max() + 1), rng.normal(0, 0.6, reviewer.max() + 1)
    return paper, reviewer, 5 + quality[paper] + offset[reviewer] + rng.normal(0, 1.1, len(paper))


def dense(paper, reviewer, y, variances, mean):
    """The negative log-likelihood from the full matrix. → (nll, μ, K)"""
    z, w, n = np.eye(paper.max() + 1)[paper], np.eye(reviewer.max() + 1)[reviewer], len(y)
    k = variances[0] * z @ z.T + variances[1] * w @ w.T + variances[2] * np.eye(n)
    inverse, ones = np.linalg.inv(k), np.ones(n)
    mu = y.mean() if mean == "plain" else ones @ inverse @ y / (ones @ inverse @ ones)
    nll = 0.5 * (n * math.log(2 * math.pi) + np.linalg.slogdet(k)[1] + (y - mu) @ inverse @ (y - mu))
    return nll + (0.5 * math.log(ones @ inverse @ ones / (2 * math.pi)) if mean == "reml" else 0), mu, k


@pytest.mark.parametrize("mean", ["plain", "gls", "reml"])
@pytest.mark.parametrize("name", DESIGNS)
def test_likelihood_gradient_hessian(name, mean):
    """Schur complement against the dense matrix, at 1e-9; gradient and Hessian in log variances against central differences of it."""
    paper, reviewer, y = design(name)
    tensors = [torch.as_tensor(x) for x in (paper, reviewer, y)]
    theta = np.log([1.3, 0.35, 1.1])
    state = rc.mixed_model(rc.calibration_design(*tensors[:2]), tensors[2], np.exp(theta).tolist(), mean)
    nll, mu, _ = dense(paper, reviewer, y, np.exp(theta), mean)
    assert state["nll"] == pytest.approx(nll, rel=1e-9) and state["mu"] == pytest.approx(mu, rel=1e-9)
    step = 1e-3 * np.eye(3)

    def f(t):
        return dense(paper, reviewer, y, np.exp(t), mean)[0]

    for i in range(3):
        assert state["gradient"][i] == pytest.approx(
            (8 * (f(theta + step[i]) - f(theta - step[i])) - f(theta + 2 * step[i]) + f(theta - 2 * step[i])) / 12e-3, abs=1e-8)
        for j in range(3):
            a, b = step[i], step[j]
            second = f(theta + a + b) - f(theta + a - b) - f(theta - a + b) + f(theta - a - b)
            assert state["hessian"][i, j] == pytest.approx(second / 4e-6, abs=1e-4)


def test_inverse_and_logdet_by_halves():
    a = torch.randn(1201, 1300, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    matrix = a @ a.T / 1300 + torch.eye(1201, dtype=torch.float64)
    inverse, logdet = rc.inverse_and_logdet(matrix)
    assert torch.allclose(inverse, torch.linalg.inv(matrix), atol=1e-10) and torch.allclose(logdet, torch.logdet(matrix), rtol=1e-12)


@pytest.mark.parametrize("name", ["more papers", "more reviewers"])
def test_posterior_against_dense_formulas(name):
    """E[f | y], E[b | y] and their sds by Gaussian conditioning on the dense covariance; joint draws have those moments."""
    paper, reviewer, y = design(name, 4)
    tensors = [torch.as_tensor(x) for x in (paper, reviewer, y)]
    fit = rc.calibrate(*tensors)
    nll, mu, k = dense(paper, reviewer, y, fit["variances"], "plain")
    assert fit["nll"] == pytest.approx(nll, abs=1e-8) and min(fit["variances"]) > 0.01
    for index, alpha, key in ((paper, fit["variances"][0], "effect"), (reviewer, fit["variances"][1], "offset")):
        z = np.eye(index.max() + 1)[index]
        gain = alpha * z.T @ np.linalg.inv(k)
        assert fit[key].numpy() == pytest.approx(gain @ (y - mu), abs=1e-8)
        assert fit[f"{key}_sd"].numpy() == pytest.approx(np.sqrt(alpha - np.diag(gain @ z) * alpha), abs=1e-8)
    assert fit["calibrated"].numpy() == pytest.approx(y - fit["offset"].numpy()[reviewer])
    # P(accept) from a brute-force draw of (f, b) from their joint posterior
    z, w = np.eye(paper.max() + 1)[paper], np.eye(reviewer.max() + 1)[reviewer]
    effects = np.hstack([z, w])
    prior = np.diag(np.repeat(fit["variances"][:2], [z.shape[1], w.shape[1]]))
    gain = prior @ effects.T @ np.linalg.inv(k)
    rng = np.random.default_rng(0)
    draws = rng.multivariate_normal(gain @ (y - mu), prior - gain @ effects @ prior, 20_000)
    f, b = draws[:, : z.shape[1]], draws[:, z.shape[1] :]
    held = (y - b[:, reviewer]) @ z / z.sum(0)
    rerun = f + rng.normal(0, math.sqrt(fit["variances"][2] / 2), f.shape)
    found = rc.acceptance_draws(fit, 4, 2, 20_000, torch.Generator().manual_seed(0))
    for scores, ours in zip((held, rerun), found):
        chance = (np.argsort(np.argsort(-scores, 1), 1) < 4).mean(0)
        assert np.abs(chance - ours.numpy()).max() < 4 * math.sqrt(2 * 0.25 / 20_000) and float(ours.sum()) == pytest.approx(4)


def test_calibration_equivariance_and_optimum():
    paper, reviewer, y = design("more papers", 2)
    tensors = [torch.as_tensor(x) for x in (paper, reviewer)]
    fits = [rc.calibrate(*tensors, torch.as_tensor(values)) for values in (y, 3 * y + 7)]
    assert fits[1]["variances"] == pytest.approx(9 * np.array(fits[0]["variances"]), rel=1e-5)
    assert fits[1]["mu"] == pytest.approx(3 * fits[0]["mu"] + 7) and fits[1]["se"] == pytest.approx(9 * np.array(fits[0]["se"]), rel=1e-4)
    best = fits[0]["nll"]
    for i, factor in product(range(3), (0.9, 1.1)):  # a minimum, by the dense likelihood
        moved = np.array(fits[0]["variances"])
        moved[i] *= factor
        assert dense(paper, reviewer, y, moved, "plain")[0] > best + 1e-6
    # standard errors from the curvature of the dense likelihood in the variances themselves
    v, h = np.array(fits[0]["variances"]), 1e-3
    steps = h * np.diag(v)

    def f(x):
        return dense(paper, reviewer, y, x, "plain")[0]

    hessian = [[(f(v + a + b) - f(v + a - b) - f(v - a + b) + f(v - a - b)) / 4 / a.max() / b.max() for b in steps] for a in steps]
    assert fits[0]["se"] == pytest.approx(np.sqrt(np.diag(np.linalg.inv(hessian))), rel=1e-3)


def test_calibration_at_the_boundary():
    """No offsets in the data, and more agreement between a reviewer's papers than chance is impossible: α_b = 0, no error bar."""
    paper, reviewer = np.repeat(np.arange(20), 2), np.tile([0, 1], 20)
    y = np.random.default_rng(0).normal(0, 1, 20)[paper] + np.tile([0.5, -0.5, -0.5, 0.5], 10)  # each reviewer's mean residual is zero
    steps = []
    fit = rc.calibrate(*(torch.as_tensor(x) for x in (paper, reviewer, y)), progress=lambda *_: steps.append(1))
    assert len(steps) < 9  # it jumps to the boundary; step by step it takes a score of evaluations
    assert fit["variances"][1] == 0 and math.isnan(fit["se"][1]) and fit["variances"][0] > 0.3
    assert float(fit["offset"].abs().max()) == 0
    nll = dense(paper, reviewer, y, fit["variances"], "plain")[0]
    assert fit["nll"] == pytest.approx(nll, abs=1e-6)


def test_one_way():
    """Balanced: ANOVA by hand; REML without offsets is the same estimator. Unbalanced: expectations, by simulation."""
    rng = np.random.default_rng(0)
    y = rng.normal(0, 1.1, (40, 3)) + rng.normal(0, 1, (40, 1))
    paper = np.repeat(np.arange(40), 3)
    within = y.var(1, ddof=1).mean()
    between = y.mean(1).var(ddof=1) - within / 3
    assert rc.one_way(paper, y.ravel()) == pytest.approx((between, within, between / (between + within)))
    fit = rc.calibrate(torch.as_tensor(paper), None, torch.as_tensor(y.ravel()), "reml")
    assert fit["variances"] == pytest.approx([between, 0, within], rel=1e-4)
    ml = rc.calibrate(torch.as_tensor(paper), None, torch.as_tensor(y.ravel()))
    among = 3 * y.mean(1).var(ddof=0)
    assert ml["variances"] == pytest.approx([(among - within) / 3, 0, within], rel=1e-4)
    paper = np.repeat(np.arange(21), [2] * 20 + [40])
    found = np.array([rc.one_way(paper, rng.normal(0, 1, 21)[paper] + rng.normal(0, 1, len(paper)))[:2] for _ in range(4000)])
    assert np.abs(found.mean(0) - 1).max() < 4 * found.std(0).max() / math.sqrt(4000) < 0.05


def test_overlaps():
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 3, 17, generator=g)
    found = rc.overlaps(a, b, g)
    for row, m in product(range(3), range(1, 18)):
        top = [set(np.argsort(-x[row].numpy())[:m]) for x in (a, b)]
        assert found[row, m - 1] == len(top[0] & top[1])
    assert rc.ranks(torch.tensor([3.0, 9.0, 5.0]), g).tolist() == [2, 0, 1]
    equal = torch.zeros(20)  # all tied: two lists of 5 of 20 share 5·5/20 on average, not 5
    shared = np.array([int(rc.overlaps(equal, equal, g)[4]) for _ in range(2000)])
    assert shared.mean() == pytest.approx(1.25, abs=4 * shared.std() / math.sqrt(2000))


def test_simulated_conference_is_the_model():
    """Covariances of the mean scores of two committees and panel sizes, and the Likert scale."""
    g = torch.Generator().manual_seed(0)
    means = rc.simulate_conference(400_000, 3, (1.2, 0.3, 0.9), 0.25, 2, 0, g, "cpu", torch.float64)
    assert means.shape == (2, 3, 400_000)
    flat = torch.cov(means.flatten(0, 1)).numpy()
    for (c, r), (d, s) in product(product((0, 1), (1, 2, 3)), repeat=2):
        expected = 1.2 + (c == d) * (0.25 + 1.2 / max(r, s))  # the larger panel holds the smaller
        assert flat[3 * c + r - 1, 3 * d + s - 1] == pytest.approx(expected, abs=0.02)
    likert = rc.simulate_conference(1000, 1, (1.0, 0.0, 8.0), 0.0, 2, 10, g, "cpu", torch.float64)
    assert set(likert.unique().tolist()) == set(range(1, 11))


def test_correlations():
    x, y = np.array([1.0, 2, 2, 4, 7]), np.array([2.0, 1, 3, 3, 9])
    r, se, low, high, n = rc.pearson(x, y)
    dx, dy = x - 3.2, y - 3.6
    assert r == pytest.approx((dx @ dy) / math.sqrt((dx @ dx) * (dy @ dy))) and se == pytest.approx(math.sqrt((1 - r * r) / 3)) and n == 5
    assert (math.atanh(high) - math.atanh(low)) / 2 == pytest.approx(1.95996 / math.sqrt(2), rel=1e-4)
    assert (math.atanh(high) + math.atanh(low)) / 2 == pytest.approx(math.atanh(r))
    pairs = [(i, j) for i in range(5) for j in range(i)]
    signs = [np.sign(x[i] - x[j]) * np.sign(y[i] - y[j]) for i, j in pairs]
    ties = [sum(v[i] != v[j] for i, j in pairs) for v in (x, y)]
    assert rc.kendall_tau_b(x, y) == pytest.approx(sum(signs) / math.sqrt(ties[0] * ties[1]))
    assert math.isnan(rc.pearson(x, np.ones(5))[0]) and rc.pearson(x, x)[0] == 1
    assert rc.implied_correlation(1.278, 0.24, 1.268, 3, True) == pytest.approx(0.7515, abs=1e-4)
    assert rc.implied_correlation(1.278, 0.24, 1.268, 3, False) == pytest.approx(0.7177, abs=1e-4)


def test_split_halves():
    paper = np.repeat(np.arange(3), [2, 3, 4])
    y = np.arange(9.0) ** 2
    halves = rc.split_halves(paper, y, 200, np.random.default_rng(0))
    assert {tuple(sorted(x)) for x in halves[:, :, 0].T} == {(0, 1)}
    assert {round(x, 6) for x in halves[0, :, 1]} == {4, 9, 16, 6.5, 10, 12.5}  # one of three reviews, or two of them
    sums = [y[5:].sum() - 2 * x for x in halves[0, :, 2]]
    assert halves[1, :, 2] * 2 == pytest.approx(sums)


def test_levels():
    found = [rc.level_of(text) for text in ("Accept (Oral)", "accept: poster", "Spotlight", "Reject", "Withdrawn", "1", "no", "maybe")]
    assert [None if i is None else rc.LEVELS[i] for i in found] == [
        "oral", "poster", "spotlight", "reject", "withdraw", "accept", "reject", None]
    labels, square = ["oral", "poster", "reject", "withdrawn"], np.arange(16).reshape(4, 4)
    cuts = rc.cuts_of(labels, square)
    assert cuts["poster or better"] == [0 + 1 + 4 + 5, 2 + 3 + 6 + 7, 8 + 9 + 12 + 13, 10 + 11 + 14 + 15]
    assert rc.headline_cut(labels, cuts) == "poster or better"
    assert rc.headline_cut(["a", "b", "c"], rc.cuts_of("abc", square[:3, :3])) == "a or better"
    names, joined = rc.drop_withdrawn(labels, square, "reject")
    assert names == labels[:3] and joined.sum() == square.sum() and joined[2].tolist() == [8 + 12, 9 + 13, 10 + 11 + 14 + 15]
    assert rc.drop_withdrawn(labels, square, "drop")[1].tolist() == square[:3, :3].tolist()


def test_shown():
    assert [rc.shown(x) for x in (0.25, -0.00001, math.nan, math.inf)] == ["0.2500", "0.0000", "undefined", "undefined"]
    found = rc.review_json(dict(a=np.array([1.5, math.nan]), b=(np.float64(math.inf), 2), rho_draws=[1]))
    assert found == {"a": [1.5, None], "b": [None, 2]}


# --------------------------------------------------------------------------------------------------------- 2. the claims


def test_more_selective_more_arbitrary():
    """The paper's conclusion, from 2021's one correlation; and that it hangs on the family: with heavy-tailed quality it fails."""
    rho = float(rc.tetrachoric(rc.NEURIPS["2021"]))
    rates = np.array([0.03, 0.05, 0.10, 0.15, 0.20, 0.2273, 0.25, 0.30, 0.40, 0.50, 0.70, 0.90])
    golden = [0.766, 0.7197, 0.6394, 0.5800, 0.5306, 0.5063, 0.4871, 0.4476, 0.3765, 0.3119, 0.192, 0.071]
    assert rc.arbitrariness(rates, rho) == pytest.approx(golden, abs=1e-3)
    figures = dict(metrics={"acceptance rate": 401 / 1764}, rho=rho, rho_draws=np.full(10, rho))
    curves = rc.selectivity(figures, np.array([0.02, 0.05, 401 / 1764]))["curves"]
    at = {family: curve["arbitrariness"] for family, curve in curves.items()}
    assert list(at) == list(rc.FAMILIES) and all(x[2] == pytest.approx(203 / 401, abs=1e-6) for x in at.values())
    assert at["t3 opinions"][1] > at["logistic opinions"][1] > at["normal"][1] > at["beta-binomial"][1] > at["t3 quality"][1] + 0.05
    assert at["t3 quality"][0] < 203 / 401 < at["t3 quality"][1] < 0.56


def test_intervals_cover():
    """800 experiments of 166 papers from a known model: the paper bootstrap covers the arbitrariness in about 95 %, the binomial
    interval that takes accepts for independent in fewer, although it is exact for what it assumes."""
    rng, p, rho = np.random.default_rng(0), 0.25, 0.55
    h = rc.normal_quantile(1 - p)
    both, true = float(rc.both_above(h, h, rho)), float(rc.arbitrariness(p, rho))
    covered = np.zeros(2)
    for cells in rng.multinomial(166, [both, p - both, p - both, 1 - 2 * p + both], 800):
        low, high = rc.percentiles(rc.consistency(rc.bootstrap_papers(cells, 500, rng))["arbitrariness"])
        differ, accepts = cells[1] + cells[2], 2 * cells[0] + cells[1] + cells[2]
        covered += [low <= true <= high, (lambda ends: ends[0] <= true <= ends[1])(rc.clopper_pearson(int(differ), int(accepts)))]
    bootstrap, binomial = covered / 800
    assert 0.915 <= bootstrap <= 0.975 and binomial < bootstrap - 0.01, (bootstrap, binomial)


def test_recovery_at_the_size_of_2014():
    """1,678 papers, 1,474 reviewers, 3.5 reviews a paper: all three variances within 3 of their own standard errors."""
    g = torch.Generator().manual_seed(0)
    paper = torch.repeat_interleave(torch.arange(1678), 3 + torch.randint(2, (1678,), generator=g))
    reviewer = torch.cat([torch.randperm(1474, generator=g) for _ in range(5)])[: len(paper)]
    quality, offset, opinion = (torch.randn(n, generator=g, dtype=torch.float64) * math.sqrt(v)
                                for n, v in ((1678, 1.278), (1474, 0.24), (len(paper), 1.268)))
    y = 5.2 + quality[paper] + offset[reviewer] + opinion
    assert rc.start_values(paper, reviewer, y, True) == pytest.approx([1.278, 0.24, 1.268], rel=0.25)  # moments: unbiased, not exact
    fit = rc.calibrate(paper, reviewer, y)
    assert np.abs((np.array(fit["variances"]) - [1.278, 0.24, 1.268]) / fit["se"]).max() < 3
    assert torch.corrcoef(torch.stack([fit["offset"], offset]))[0, 1] > 0.5 and max(fit["se"]) < 0.08


def test_simulator_against_closed_form():
    """The reference's simulation (50 % subjective): its exact values; ours within 4 standard errors; the two limits."""
    g = torch.Generator().manual_seed(0)
    corr = [rc.implied_correlation(0.5, 0, 0.5, r, True) for r in range(1, 7)]
    assert [1 - float(rc.arbitrariness(0.23, c)) for c in corr] == pytest.approx([0.4635, 0.5646, 0.6241, 0.6644, 0.6940, 0.7170], abs=1e-4)
    rates = np.array([0.05, 0.10, 0.15, 0.20, 0.25, 0.30, 0.40, 0.50])
    assert 1 - rc.arbitrariness(rates, 0.5) == pytest.approx([0.2438, 0.3240, 0.3846, 0.4358, 0.4811, 0.5226, 0.5978, 0.6667], abs=1e-4)
    means = rc.simulate_conference(100_000, 6, (0.5, 0.0, 0.5), 0.0, 2, 0, g, "cpu", torch.float32)
    overlap = rc.overlaps(means[0], means[1], g)[:, 22_999].numpy() / 23_000
    assert overlap == pytest.approx([0.4635, 0.5646, 0.6241, 0.6644, 0.6940, 0.7170], abs=4 * math.sqrt(0.25 / 23_000))
    for v, expected in ((0.0, 1.0), (1.0, 0.23)):
        means = rc.simulate_conference(100_000, 1, (1 - v, 0.0, v), 0.0, 2, 0, g, "cpu", torch.float64)
        assert int(rc.overlaps(means[0], means[1], g)[0, 22_999]) / 23_000 == pytest.approx(expected, abs=0.012 * v)


def test_empirical_selectivity():
    """On two committees' normal scores it follows the model's curve; the bands hold the truth; ties do not bias it."""
    rng = np.random.default_rng(5)
    n = 2000
    quality = rng.normal(0, 1, n)
    a, b = (quality + rng.normal(0, 0.9, n) for _ in range(2))
    rates, curve, band = rc.empirical_selectivity(a, b, 200, torch.Generator().manual_seed(0))
    model = rc.arbitrariness(rates[:-1], 1 / 1.81)
    assert np.abs(curve[200:-1] - model[200:]).max() < 0.05 and curve[-1] == 0 and rates[-1] == 1
    inside = (band[0, 100:-1] <= model[100:]) & (model[100:] <= band[1, 100:-1])
    assert inside.mean() > 0.85
    _, tied, _ = rc.empirical_selectivity(np.zeros(n), np.zeros(n), 100, torch.Generator().manual_seed(0))
    assert np.abs(tied[200:] - (1 - rates[200:])).max() < 0.03


@needs_data
def test_the_synthetic_file():
    columns = rc.review_columns(DATA / "synthetic_calibration.csv", ("paper", "reviewer", "score"))
    paper, reviewer = (torch.as_tensor(rc.numbered(columns[name])[0]) for name in ("paper", "reviewer"))
    fit = rc.calibrate(paper, reviewer, torch.as_tensor(rc.float_column(columns, "score", "file")))
    assert fit["variances"] == pytest.approx([1.03387629, 0.24238404, 1.19010680], rel=1e-4)
    assert fit["nll"] == pytest.approx(1277.43523290, abs=1e-6) and fit["mu"] == pytest.approx(4.980488866667)
    assert fit["mu"] + float(fit["effect"][0]) == pytest.approx(5.22159233, abs=1e-4)
    assert float(fit["calibrated"][0]) == pytest.approx(4.03323677, abs=1e-4)
    names = rc.numbered(columns["reviewer"])[1]
    assert float(fit["offset"][names.index("r0")]) == pytest.approx(-0.19585903, abs=1e-4)


@needs_data
def test_esa():
    expected = {1: ([12, 8, 10, 21], 0.7441), 2: ([11, 6, 1, 33], 0.6874), 3: ([10, 7, 1, 33], 0.6746)}
    for phase, (cells, r) in expected.items():
        both = [rc.esa_scores(DATA / f"esa2018_scores-phase{phase}-pc{i}.tsv") for i in (1, 2)]
        first, second = (np.array([rc.esa_level(reviews) <= 1 for reviews in papers]) for papers in both)
        assert [sum(first & second), sum(first & ~second), sum(second & ~first), sum(~first & ~second)] == cells
        means = [[np.mean([s for s, _ in reviews]) for reviews in papers] for papers in both]
        assert rc.pearson(*means)[0] == pytest.approx(r, abs=5e-5)


@needs_data
@pytest.mark.parametrize("name, papers, reviews, between, within, icc", [
    ("iclr2021_ratings.tsv", 2965, 11452, 0.7357, 1.2971, 0.3619), ("iclr2022_ratings.tsv", 3262, 12733, 1.2949, 1.8113, 0.4169)])
def test_iclr(name, papers, reviews, between, within, icc):
    paper, y, accepted, gone = rc.iclr_ratings(DATA / name)
    assert (len(accepted), len(y), paper.max() + 1) == (papers, reviews, papers) and not (accepted & gone).any()
    assert rc.one_way(paper, y) == pytest.approx((between, within, icc), abs=5e-5)


@needs_data
def test_iclr_lists():
    paper, y, accepted, gone = rc.iclr_ratings(DATA / "iclr2023_20230210.csv")
    with open(DATA / "iclr2023_20230210.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if json.loads(row["ratings"])]
    assert y.tolist() == [r for row in rows for r in json.loads(row["ratings"])] and len(accepted) == len(rows)
    assert accepted.sum() == sum(row["decision"].startswith("Accept") for row in rows)


# ----------------------------------------------------------------------------------------------------------- 3. the tool


def command(*args, cwd, launcher=(), **popen):
    env = {**os.environ, "OMP_NUM_THREADS": "1", "NANOPAPERS_CACHE": str(cwd / "cache")}
    return subprocess.Popen([sys.executable, *launcher, str(HOUSE / "review_consistency.py"), *map(str, args)], cwd=cwd, env=env, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, **popen)


def finished(process, code=0):
    out, err = process.communicate(timeout=300)
    assert process.returncode == code, out + err
    return out, err


def in_process(args, tmp_path, monkeypatch, capsys):
    """main() here, which saves the start of a process → (stdout, results)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["review_consistency.py", *map(str, args)])
    rc.main()
    out = capsys.readouterr().out
    assert "nan" not in out.split() and "inf" not in out.split()
    path = next(word for word in reversed(out.split()) if word.endswith("results.json"))
    return out, json.loads((tmp_path / path).read_text(), parse_constant=lambda x: pytest.fail(f"{x} is not JSON"))


def test_default_run(tmp_path):
    start = time.time()
    out, err = finished(command(cwd=tmp_path))
    assert time.time() - start < 60 and err == ""
    for word in ("0.2590", "0.2302", "0.4943", "0.5062", "0.8245", "0.8511", "0.5266", "0.5571", "0.1942 to 0.3326", "one point only",
                 "0.7515", "116 papers", "25.0 %", "t3 quality", "needs the split"):
        assert word in out, word
    results, figure = (tmp_path / path for path in out.split()[-2:])
    table = json.loads(results.read_text())
    assert table["experiments"]["2021"]["rho"] == pytest.approx(0.55707, abs=1e-5) and {"seed", "command", "revision"} <= set(table)
    assert table["experiments"]["2021"]["metrics"]["arbitrariness, mean of directions"] is None and figure.stat().st_size > 30_000
    assert table["reviews"]["noise"] == pytest.approx(1.278 / 0.526646 - 1.278 - 1.268 / 3, abs=1e-4)


def test_table(tmp_path, monkeypatch, capsys):
    flags = ("--against", 99, 203, 580, "--accept", "0.18,0.3", "--no_plot")
    out, results = in_process(["table", 22, 22, 21, 101, *flags], tmp_path, monkeypatch, capsys)
    assert results["comparison"]["fisher_p"] == pytest.approx(0.425, abs=1e-3) and results["selectivity"]["rates"] == [0.18, 0.3]
    assert "0.1800" in out and "no figure" in out
    out, _ = in_process(["table", 0, 0, 3, 10], tmp_path, monkeypatch, capsys)  # a committee that accepts nothing
    assert "undefined" in out and "no latent model" in out
    out, results = in_process(["table", 0, 5, 0, "--no_plot"], tmp_path, monkeypatch, capsys)  # always disagreeing
    assert results["selectivity"]["curves"]["normal"]["ceiling"] is None and list(results["selectivity"]["curves"]) == ["normal"]
    out, results = in_process(["table", 5, 0, 0, 20, "--no_plot"], tmp_path, monkeypatch, capsys)
    assert "zero cell" in out and results["experiments"]["your table"]["rho"] < 1
    out, _ = in_process(["table", 34, 7, 17, 62, "--no_plot"], tmp_path, monkeypatch, capsys)
    assert "0.3417 and 0.4250" in out  # one committee is stricter
    (tmp_path / "levels.csv").write_text(
        ",oral,poster,reject,withdrawn\noral,3,5,4,0\nposter,4,30,40,2\nreject,6,38,200,10\nwithdrawn,0,1,12,20\n")
    out, results = in_process(["table", "levels.csv"], tmp_path, monkeypatch, capsys)
    assert "withdrawn as rejects: n = 375" in out and "withdrawn left out: n = 330" in out
    assert results["labels"] == ["oral", "poster", "reject"]
    assert results["experiments"]["poster or better"]["cells"] == [42, 46, 45, 242]
    _, dropped = in_process(["table", "levels.csv", "--withdrawn", "drop", "--no_plot"], tmp_path, monkeypatch, capsys)
    assert dropped["experiments"]["poster or better"]["cells"] == [42, 44, 44, 200]
    (tmp_path / "bare.csv").write_text("3,5\n4,30\n")
    _, results = in_process(["table", "bare.csv", "--no_plot"], tmp_path, monkeypatch, capsys)
    assert results["experiments"]["level 1 or better"]["cells"] == [3, 5, 4, 30] and results["exact_agreement"] == pytest.approx(33 / 42)
    assert results["weighted_kappa"] == pytest.approx(rc.consistency([3, 5, 4, 30])["Cohen's kappa"])  # two levels: weights are 0 and 1


def write_reviews(path, seed=0, papers=60, committees=False):
    rng = np.random.default_rng(seed)
    offset, rows = rng.normal(0, 0.7, 30), []
    for i in range(papers):
        quality = rng.normal()
        for j, r in enumerate(rng.permutation(30)[:6]):
            rows.append((f"p{i}", f"r{r}", "AB"[j % 2], round(5 + quality + offset[r] + rng.normal(), 2)))
    decided = {}
    for paper, _, committee, score in rows:
        decided.setdefault((paper, committee), []).append(score)
    with open(path, "w") as file:
        print("paper,reviewer,score" + ",committee,decision" * committees, file=file)
        for paper, reviewer, committee, score in rows:
            extra = (committee, int(np.mean(decided[paper, committee]) > 5.5)) if committees else ()
            print(paper, reviewer, score, *extra, sep=",", file=file)


def test_scores(tmp_path, monkeypatch, capsys):
    write_reviews(tmp_path / "reviews.csv", committees=True)
    out, results = in_process(["scores", "reviews.csv", "--accept", "0.25", "--quiet"], tmp_path, monkeypatch, capsys)
    assert "grey zone" in out and "committee noise to match" in out and len(results["variances"]) == 3
    with open(tmp_path / "out/review_consistency/scores/papers.csv") as file:
        papers = list(csv.DictReader(file))
    assert len(papers) == 60 and sum(float(row["p_accept"]) for row in papers) == pytest.approx(15, abs=0.01)
    assert sum(float(row["p_accept_rerun"]) for row in papers) == pytest.approx(15, abs=0.01)
    means = [float(row["calibrated_mean"]) for row in papers]
    assert means == sorted(means, reverse=True) and float(papers[0]["p_accept"]) > 0.9 > 0.1 > float(papers[-1]["p_accept"])
    with open(tmp_path / "out/review_consistency/scores/reviewers.csv") as file:
        assert sum(int(row["reviews"]) for row in csv.DictReader(file)) == 360
    columns = rc.review_columns(tmp_path / "reviews.csv", ("paper", "score", "committee"))
    cells = {}
    for paper, score, committee in zip(columns["paper"], columns["score"], columns["committee"]):
        cells.setdefault((paper, committee), []).append(float(score))
    r = np.corrcoef([np.mean(cells[f"p{i}", "A"]) for i in range(60)], [np.mean(cells[f"p{i}", "B"]) for i in range(60)])[0, 1]
    assert results["committees"]["raw"][0] == pytest.approx(r)
    write_reviews(tmp_path / "plain.csv")
    lines = (tmp_path / "plain.csv").read_text().splitlines()
    (tmp_path / "unnamed.csv").write_text("\n".join(",".join(line.split(",")[::2]) for line in lines))  # without reviewers: one-way
    out, results = in_process(["scores", "unnamed.csv", "--quiet", "--no_plot"], tmp_path, monkeypatch, capsys)
    assert results["variances"][1] == 0 and "unnamed reviewers" in out and results["rate"] == 0.23
    (tmp_path / "parts.csv").write_text("paper,reviewer,score\n" + "".join(
        f"p{i},r{3 * (i // 4) + j},{(i * 7 + j * 5 + i * j) % 11}\n" for i in range(12) for j in range(3)))
    out, _ = in_process(["scores", "parts.csv", "--quiet", "--no_plot"], tmp_path, monkeypatch, capsys)
    assert "falls into 3 parts" in out


def test_duplicates(tmp_path, monkeypatch, capsys):
    write_reviews(tmp_path / "reviews.csv", committees=True)
    out, results = in_process(["duplicates", "reviews.csv"], tmp_path, monkeypatch, capsys)
    rows = rc.review_columns(tmp_path / "reviews.csv", ("paper", "committee", "decision"))
    decision = {(p, c): int(d) for p, c, d in zip(rows["paper"], rows["committee"], rows["decision"])}
    pairs = [(decision[f"p{i}", "A"], decision[f"p{i}", "B"]) for i in range(60)]
    assert results["experiments"]["accept or better"]["cells"] == [pairs.count(x) for x in ((1, 1), (1, 0), (0, 1), (0, 0))]
    assert "scores: arbitrariness of the best by score" in out and len(results["scores"]["arbitrariness"]) == 60
    (tmp_path / "three.csv").write_text("paper,committee,decision\n" + "".join(
        f"p{i},{c},{'accept' if (i * k) % 3 else 'reject'}\n" for i in range(1, 9) for k, c in enumerate("ABC", 1)))
    out, results = in_process(["duplicates", "three.csv", "--no_plot"], tmp_path, monkeypatch, capsys)
    assert "all 24 pairs of 8 papers" in out and sum(results["experiments"]["accept or better"]["cells"]) == 24


def test_citations(tmp_path, monkeypatch, capsys):
    rng = np.random.default_rng(0)
    score, cited = rng.normal(5, 1, 80).round(2), rng.integers(0, 300, 80)
    (tmp_path / "c.csv").write_text("score,citations,accepted\n" + "".join(f"{s},{c},{int(s > 5.5)}\n" for s, c in zip(score, cited)))
    _, results = in_process(["citations", "c.csv"], tmp_path, monkeypatch, capsys)
    for name, group in (("all", score > 0), ("accepted", score > 5.5), ("rejected", score <= 5.5)):
        found = results["correlations"][name]
        assert found["r"] == pytest.approx(np.corrcoef(score[group], np.log10(1 + cited[group]))[0, 1]) and found["n"] == group.sum()
    (tmp_path / "few.csv").write_text("score,citations\n1,2\n2,3\n")
    out, results = in_process(["citations", "few.csv", "--no_plot"], tmp_path, monkeypatch, capsys)
    assert "undefined" in out and results["correlations"]["all"]["r"] is None


@needs_data
def test_public_data(tmp_path, monkeypatch, capsys):
    out, results = in_process(["esa", "--data", DATA], tmp_path, monkeypatch, capsys)
    assert results["phase 1"]["polychoric"][0] == pytest.approx(0.6649, abs=1e-4) and "0.9161" in out
    for year, icc in ((2021, 0.3619), (2022, 0.4169)):
        out, results = in_process(["iclr", "--year", year, "--data", DATA], tmp_path, monkeypatch, capsys)
        assert results["icc"] == pytest.approx(icc, abs=5e-5) and "split halves" in out
        assert results["rho"] == pytest.approx(results["between"] / (results["between"] + results["within"] / results["reviews"]))
    _, dropped = in_process(["iclr", "--data", DATA, "--withdrawn", "drop", "--no_plot"], tmp_path, monkeypatch, capsys)
    assert dropped["papers"] < results["papers"] and dropped["rate"] > results["rate"]


def test_simulate_under_torchrun(tmp_path):
    """The same counts, to the unit, on one rank and on two; more committees, Likert and noise; the closed form beside them."""
    flags = ("simulate", "--papers", "2e3", "--replicates", 5, "--reviewers", 3, "--committees", 3, "--quiet", "--variances", 1.278, 0.24,
             1.268, "--noise", 0.5, "--accept", "0.1:0.5:0.1")
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    jobs = [command(*flags, "--out", name, cwd=tmp_path, launcher=launcher) for name, launcher in (("one", ()), ("two", torchrun))]
    one, two = (finished(job)[0] for job in jobs)
    results = [json.loads((tmp_path / name / "results.json").read_text()) for name in ("one", "two")]
    assert results[0]["overlaps"] == results[1]["overlaps"] and results[0]["pairs"] == 15 and results[0]["sd"] == results[1]["sd"]
    assert one.split()[-2:] == ["one/results.json", "one/simulate.png"] and len(two.split("accept precision (closed form)")) == 2
    precision, exact, sd = (np.array(results[0][key]) for key in ("accept_precision", "closed_form", "sd"))
    assert (np.abs(precision - exact) < 4 * np.maximum(sd, 0.01) / math.sqrt(5)).all()
    rho = 1.278 / (1.278 + (0.24 + 1.268) / 3 + 0.5)
    assert exact[2] == pytest.approx(1 - rc.arbitrariness(np.array([0.1, 0.2, 0.3, 0.4, 0.5]), rho), abs=1e-9)


def test_simulate_options(tmp_path, monkeypatch, capsys):
    base = ["simulate", "--papers", 20_000, "--replicates", 1, "--reviewers", 2, "--quiet", "--no_plot", "--accept", 0.2]
    variances = ["--variances", 1, 1, 1]
    _, raw = in_process([*base, *variances], tmp_path, monkeypatch, capsys)
    _, calibrated = in_process([*base, *variances, "--calibrated"], tmp_path, monkeypatch, capsys)
    assert raw["correlation"] == pytest.approx([1 / 3, 1 / 2]) and calibrated["correlation"] == pytest.approx([1 / 2, 2 / 3])
    assert calibrated["accept_precision"][1][0] > raw["accept_precision"][1][0] + 0.03
    out, likert = in_process([*base, "--likert", 3], tmp_path, monkeypatch, capsys)
    assert "no Likert scale" in out and likert["accept_precision"][0][0] < likert["closed_form"][0][0] - 0.01 and likert["sd"] is None
    _, again = in_process([*base, *variances], tmp_path, monkeypatch, capsys)
    _, other = in_process([*base, *variances, "--seed", 1], tmp_path, monkeypatch, capsys)
    assert again["overlaps"] == raw["overlaps"] != other["overlaps"]


def test_interrupt(tmp_path):
    def hear_sigint():  # a shell makes its background jobs deaf to it
        signal.signal(signal.SIGINT, signal.default_int_handler)

    process = command("simulate", "--papers", "1e5", "--replicates", 100_000, cwd=tmp_path, preexec_fn=hear_sigint)
    while "conferences" not in process.stderr.readline(200) and process.poll() is None:
        pass
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 2 and "error: stopped" in err and "Traceback" not in err


FILES = {
    "odd.csv": "paper,reviewer,score\np1,r1,5\np1,r2,0.8F\n",
    "nan.csv": "paper,reviewer,score\np1,r1,5\np1,r2,nan\n",
    "gap.csv": "paper,reviewer,score\np1,r1,5\np2,,6\n",
    "short.csv": "paper,reviewer,score\np1,r1\n",
    "nothing.csv": "paper,reviewer,score\n",
    "header.csv": "paper,referee,points\np1,r1,5\n",
    "twice.csv": "paper,reviewer,score\np1,r1,5\np2,r1,4\np1,r1,6\np3,r2,3\n",
    "constant.csv": "paper,reviewer,score\np1,r1,5\np1,r2,5\np2,r1,5\n",
    "once.csv": "paper,reviewer,score\np1,r1,5\np2,r1,4\np3,r2,3\n",
    "strangers.csv": "paper,reviewer,score\np1,r1,5\np1,r2,4\np2,r3,3\n" + "p3,r4,1\np2,r5,2\n",
    "fine.csv": "paper,reviewer,score\n" + "".join(f"p{i},r{j},{(i * 5 + j * 3) % 8}\n" for i in range(5) for j in range(3)),
    "alike.csv": "paper,reviewer,score\n" + "".join(f"p{i},r{j},{(i + 2 * j) % 3}\n" for i in range(3) for j in range(3)),
    "lonely.csv": "paper,committee,decision\np1,A,accept\np1,B,reject\np2,A,accept\n",
    "sameboth.csv": "paper,committee,decision,reviewer\np1,A,accept,r1\np1,B,reject,r1\n",
    "again.csv": "paper,committee,decision\np1,A,accept\np1,B,reject\np1,A,reject\n",
    "changes.csv": "paper,committee,decision,reviewer\np1,A,accept,r1\np1,A,reject,r2\np1,B,reject,r3\n",
    "vague.csv": "paper,committee,decision\np1,A,accept\np1,B,perhaps\n",
    "allin.csv": "paper,committee,decision\np1,A,accept\np1,B,accept\n",
    "neither.csv": "paper,committee\np1,A\np1,B\n",
    "flat.csv": "paper,committee,score\np1,A,3\np1,B,3\np2,A,3\np2,B,3\n",
    "cited.csv": "score,citations,accepted\n5,10,1\n6,-3,0\n",
    "unsure.csv": "score,citations,accepted\n5,10,1\n6,3,later\n",
    "wide.csv": "1,2,3\n4,5,6\n",
    "swapped.csv": ",oral,reject\nreject,1,2\noral,3,4\n",
    "half.csv": ",oral,reject\noral,1,2.5\nreject,3,4\n",
    "minus.csv": ",oral,reject\noral,1,2\nreject,-3,4\n",
    "empty.csv": ",oral,reject\noral,0,0\nreject,0,0\n",
    "single.csv": "7\n",
    "gone.csv": ",accept,withdrawn\naccept,3,1\nwithdrawn,2,2\n",
}


@pytest.mark.parametrize("args, words", [
    (["nonsense"], "neurips"),
    (["neurips", "extra"], "neurips takes no 'extra'"),
    (["table"], "table needs counts"),
    (["table", "1", "2"], "3 or 4 counts"),
    (["table", "1", "2", "3", "4", "5"], "3 or 4 counts"),
    (["table", "1", "2", "x"], "count 3"),
    (["table", "1", "2", "-3"], "count 3"),
    (["table", "1", "2.5", "3"], "'2.5', is not a whole number"),
    (["table", "0", "0", "0"], "all zero"),
    (["table", "1", "2", "3", "--against", "1", "2"], "3 or 4 counts"),
    (["table", "nowhere.csv"], "nowhere.csv"),
    (["table", "wide.csv"], "row 1: 3 counts in a table of 2 rows"),
    (["table", "swapped.csv"], "row 2, column 1: 'reject' where the header has 'oral'"),
    (["table", "half.csv"], "row 2, column 'reject': 2.5 is not a whole number"),
    (["table", "minus.csv"], "row 3, column 'oral': -3 is outside"),
    (["table", "empty.csv"], "0 papers"),
    (["table", "single.csv"], "two levels"),
    (["table", "gone.csv", "--withdrawn", "drop"], "1 level"),
    (["scores"], "scores takes one file"),
    (["scores", "nowhere.csv"], "nowhere.csv cannot be read"),
    (["scores", "odd.csv"], "row 3, column 'score': '0.8F' is not a number"),
    (["scores", "nan.csv"], "row 3, column 'score'"),
    (["scores", "gap.csv"], "row 3, column 'reviewer': empty"),
    (["scores", "short.csv"], "row 2: 2 cells, but the header has 3"),
    (["scores", "nothing.csv"], "no rows"),
    (["scores", "header.csv"], "row 1: no column 'score'"),
    (["scores", "twice.csv"], "row 4, column 'reviewer': paper 'p1' and reviewer 'r1' stand in row 2 already"),
    (["scores", "constant.csv"], "all scores are 5"),
    (["scores", "once.csv"], "no paper has two reviews"),
    (["scores", "strangers.csv"], "no reviewer has two reviews"),
    (["scores", "fine.csv", "--accept", "0.1"], "takes 0 of 5 papers"),
    (["scores", "fine.csv", "--scale", "1", "10"], "row 2, column 'score': 0 is outside 1 to 10"),
    (["scores", "fine.csv", "--scale", "5", "1"], "--scale"),
    (["scores", "alike.csv", "--quiet", "--accept", "0.4"], "quality variance is zero"),
    (["duplicates", "lonely.csv"], "row 4, column 'committee': paper 'p2' has one committee, 'A'"),
    (["duplicates", "sameboth.csv"], "row 3, column 'reviewer'"),
    (["duplicates", "again.csv"], "row 4, column 'committee'"),
    (["duplicates", "changes.csv"], "row 3, column 'decision': committee 'A' has two decisions"),
    (["duplicates", "vague.csv"], "row 3, column 'decision': 'perhaps'"),
    (["duplicates", "allin.csv"], "every decision is 'accept'"),
    (["duplicates", "neither.csv"], "neither a column 'decision' nor"),
    (["duplicates", "flat.csv"], "all mean scores are 3"),
    (["citations", "cited.csv"], "row 3, column 'citations': -3 is outside"),
    (["citations", "unsure.csv"], "row 3, column 'accepted': 'later'"),
    (["simulate", "--papers", "10", "--accept", "0.05"], "no paper at all"),
    (["simulate", "--accept", "0"], "between 0 and 1"),
    (["simulate", "--accept", "0.5:0.1:0.1"], "--accept"),
    (["simulate", "--accept", "half"], "--accept"),
    (["simulate", "--papers", "many"], "--papers"),
    (["simulate", "--subjectivity", "2"], "--subjectivity"),
    (["simulate", "--variances", "0", "0", "0"], "same score"),
    (["simulate", "--device", "abacus"], "--device abacus"),
    (["esa", "--data", "."], "no files like *scores-phase1-pc1.tsv"),
    (["iclr", "--year", "1999"], "--year"),
    (["table", "5", "5", "5", "--out", "odd.csv"], "odd.csv: File exists; give an --out"),
    (["iclr", "--data", "nowhere"], "no files like"),
])
def test_mistakes_end_in_one_line(args, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name, text in FILES.items():
        Path(name).write_text(text)
    monkeypatch.setattr(sys, "argv", ["review_consistency.py", *args])
    with pytest.raises(SystemExit) as stop:
        rc.main()
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.count("\n") == 1 and err.startswith("error: ") and words in err, err
    assert not Path("out").exists(), "nothing may be written"


def test_exit_code_without_traceback(tmp_path):
    out, err = finished(command("table", "1", "x", "3", cwd=tmp_path), 2)
    assert out == "" and err.count("\n") == 1


def test_download_is_pinned(tmp_path, monkeypatch):
    """esa and iclr ask for the files of fixed commits, and for their sha256."""
    asked = []
    monkeypatch.setattr(rc, "download", lambda url, sha256: asked.append((url, sha256)) or rc.fail("stop"))
    for task in (["esa"], ["iclr"], ["iclr", "--year", "2021"], ["iclr", "--year", "2023"]):
        monkeypatch.setattr(sys, "argv", ["review_consistency.py", *task])
        with pytest.raises(SystemExit):
            rc.main()
    assert len(asked) == 4 and all(url.startswith("https://raw.githubusercontent.com/") and len(sha256) >= 12 for url, sha256 in asked)
    assert all(any(len(part) == 40 for part in url.split("/")) for url, _ in asked)


def test_help_names_every_flag(capsys):
    with pytest.raises(SystemExit) as stop:
        rc.parse_args(["--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0
    for flag in "device dtype seed out data no_plot quiet accept against withdrawn mean scale reviewers papers year draws".split():
        assert f"--{flag}" in text
