"""How arbitrary is peer review? Duplicate-review experiments (Beygelzimer, Dauphin, Liang, Wortman Vaughan; arXiv 2306.03262).

The problem. NeurIPS sent a tenth of its submissions of 2021 to two independent committees, as it had in 2014 (Cortes, Lawrence; arXiv
2109.09774). The committees disagreed on 23 % of the papers. That sounds little, but most papers are rejected by everybody: of the
papers that one committee accepted, the other rejected half. How sure is that half, what would another acceptance rate do to it, and
does it follow from what reviewers are known to disagree on?

The idea. Count papers: both accept, one accepts, neither. The paper's number is arbitrariness, a share of the list of accepted papers:

    A = one / (2·both + one)         inconsistency = one / n         by lots: A = 1 − p,  p = (2·both + one) / 2n

One correlation ρ of two latent normal scores, each accepted above the same threshold, turns the table into a curve over rates p:

    A(p) = 1 − P(X₁ > h, X₂ > h) / p,     h = Φ⁻¹(1 − p)            in general A(p) = 1 − E[q²]/E[q], q a paper's own chance

and reviews predict ρ without any experiment: score = μ + quality f + the reviewer's offset b + opinion ε, three variances, fitted by
exact likelihood; means of R reviews correlate by α_f / (α_f + σ²/R) once the offsets are known (calibration).

How to run it.

    python review_consistency.py                                  both experiments: table, intervals, curve, sources (3 s); figure
    python review_consistency.py --accept 0.18                    my conference takes 18 %: how arbitrary, by 2021's table?
    python review_consistency.py table 22 22 21 101 --against 99 203 580        your counts; or an L×L table of levels: table FILE.csv
    python review_consistency.py scores FILE.csv                  calibrate reviewers: variances, P(accept), grey zone, implied ρ
    python review_consistency.py duplicates FILE.csv              two committees' decisions or scores, paper by paper
    python review_consistency.py simulate --reviewers 6           conferences with known noise (torchrun shards them)
    python review_consistency.py esa | iclr --year 2022           public data; citations FILE.csv: did the scores see them coming?

What the paper reports (abstract, the chairs' post): 23 % disagreement; about half of the accepted list would change; "more selective
would increase the arbitrariness". The paper's own cross table of levels and its survey were not at hand; its counts are derived (see
SOURCES, which lists the places where the publications disagree with themselves).

What we measured (`python review_consistency.py`, torch 2.13.0; brackets: 95 % by drawing papers anew, seed 0):

                                        2014 (n = 166)             2021 (n = 882)            published
    inconsistency, Clopper-Pearson      0.2590 (0.194-0.333)       0.2302 (0.203-0.259)      25.9 %; 23 %
    arbitrariness                       0.4943 (0.366-0.634)       0.5062 (0.448-0.566)      49.5 %; 50.6 %
    share of the way to lots            0.6698                     0.6552
    latent correlation ρ                0.527 (0.29-0.73)          0.557 (0.46-0.64)         0.55 ± 0.065 (scores, 2014)
    arbitrariness at 5 %, normal                                   0.720 (0.66-0.78)         "more selective, more arbitrary"
      opinions t3, logistic                                        0.789, 0.745
      beta-binomial; quality t3                                    0.622; 0.553
    ESA 2018, phases 1, 2, 3 (`esa`)    arbitrariness 0.429, 0.241, 0.286 of 51 papers; ρ 0.42, 0.92, 0.89
    ICLR 2021, 2022, 2023 (`iclr`)      one-way ICC 0.362, 0.417, 0.384; implied arbitrariness at the actual rate 0.382, 0.323, 0.354

What did not hold. A table is one point of a curve. That more selective is more arbitrary is so for normal scores and more so when
opinions have heavy tails; when quality has them, arbitrariness at 3 % is what it is at 23 %, and the same table is fitted. (ICLR's
scores, split in halves, follow the normal curve from 5 % on.) Relative to lots, arbitrariness is least at 50 % and the same at p and
1 − p; inconsistency is largest there: three summaries, three rankings of policies. 2014's own review model implies ρ = 0.75 for three
reviews; its committees show 0.53. The published comparison sets the single-review 0.502 beside 0.55. What is missing is a noise of
variance 0.73 that committees add after averaging, and with it a fourth review takes 1.4 points off the arbitrariness, not 4.

Intervals: accepts are not independent draws, since both accepts of one paper are one. Of 800 simulated experiments of 2014's size the
paper bootstrap's 95 % covered 95.0 %, the exact binomial one over accepts 89.9 %.

Speed (2 cores of an AMD EPYC): 5,891 reviews by 1,474 reviewers calibrated in 0.3 s, in 1.2 s beside other work; 37,200 reviews,
9,000 papers, 9,000 reviewers in 100 to 114 s beside other work (alone: not measured); 100,000 papers at 20 rates and 6 panel sizes
simulated in 0.1 s.

Ours, not the papers': all families but the normal, the bootstrap over papers, Newcombe's and Fisher's comparison of the years, P(accept)
of a new committee, the split halves, the fit by Newton's method on a Schur complement (the reference inverts the matrix of all reviews).
"""

import argparse
import csv
import hashlib
import json
import math
import os
import platform
import re
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

# ============================================================================================== the method: counts

# Counts: (both accept, first alone, second alone, neither), or (both, one alone, neither) where the split is not public.
NEURIPS = {
    "2014": (22, 22, 21, 101),  # arXiv 2109.09774; 166 of the 170 papers: four were withdrawn or rejected without review
    "2021": (99, 203, 580),  # 882 papers; see "Where the sources disagree" for how the counts follow from what was published
    "2021, no withdrawn": (99, 203, 462),  # inferred, not published: about 118 withdrawn papers counted as rejected above
}
FIT_2014 = dict(quality=1.278, offset=0.240, opinion=1.268, reviews=3)  # the authors' fit to about 6,000 reviews, 3 or so a paper


def four_cells(cells):
    """Counts (…, 3) or (…, 4) → four float arrays both, first, second, neither; an unknown split counts as even."""
    cells = np.asarray(cells, float)
    if cells.shape[-1] == 3:
        return cells[..., 0], cells[..., 1] / 2, cells[..., 1] / 2, cells[..., 2]
    return tuple(np.moveaxis(cells, -1, 0))


def consistency(cells):
    """Every summary of two committees' decisions. cells: counts or shares, (…, 3) or (…, 4) → {name: array (…)}; 0/0 is nan.

    Names are the field's, not those of arXiv 2109.09774, whose "accept precision" is the chance of being rejected.
    """
    both, first, second, neither = four_cells(cells)
    n, differ = both + first + second + neither, first + second
    with np.errstate(divide="ignore", invalid="ignore"):
        p1, p2, p = (both + first) / n, (both + second) / n, (2 * both + differ) / (2 * n)
        arbitrary, chance = differ / (2 * both + differ), p1 * (1 - p2) + p2 * (1 - p1)
        return {
            "inconsistency": differ / n,
            "acceptance rate": p,
            "arbitrariness": arbitrary,
            "arbitrariness, mean of directions": (first / (both + first) + second / (both + second)) / 2,
            "accept precision": 1 - arbitrary,
            "reject precision": 2 * neither / (2 * neither + differ),
            "agreed accept rate": both / (both + neither),
            "overlap (Jaccard)": both / (both + differ),
            "inconsistency of lots": chance,
            "arbitrariness of lots": 1 - p,
            "relative arbitrariness": arbitrary / (1 - p),  # share of the way to lots
            "Cohen's kappa": 1 - differ / n / chance,
        }


def binomial_tail(k, n, p):
    """P(X ≥ k) for X ~ Binomial(n, p), by the sum over all terms within 40 standard deviations; k, n: ints, p: float."""
    reach = 40 * math.sqrt(n * p * (1 - p)) + 100
    first, last = max(k, math.floor(n * p - reach)), min(n, math.ceil(n * p + reach))
    if first > last:
        return 0.0
    j = torch.arange(first, last + 1, dtype=torch.float64)
    log_choose = math.lgamma(n + 1) - torch.lgamma(j + 1) - torch.lgamma(n - j + 1)
    return float((log_choose + torch.special.xlogy(j, p) + torch.special.xlog1py(n - j, -torch.tensor(p, dtype=torch.float64))).exp().sum())


def bisect(function, target, low, high, steps=60):
    """x in [low, high] with function(x) = target, function increasing; arrays go elementwise."""
    low, high = np.zeros_like(target) + low, np.zeros_like(target) + high
    for _ in range(steps):
        middle = (low + high) / 2
        below = function(middle) < target
        low, high = np.where(below, middle, low), np.where(below, high, middle)
    return (low + high) / 2


def clopper_pearson(k, n, level=0.95):
    """Exact interval of a share k/n: P(X ≥ k | low) = P(X ≤ k | high) = (1 − level)/2. Covers at least `level`."""
    tail = np.array((1 - level) / 2)
    low = 0.0 if k == 0 else float(bisect(lambda p: binomial_tail(k, n, float(p)), tail, 0, 1))
    high = 1.0 if k == n else float(bisect(lambda p: binomial_tail(k + 1, n, float(p)), 1 - tail, 0, 1))
    return low, high


def wilson(k, n, z=1.959963984540054):
    middle, half = (k + z * z / 2) / (n + z * z), z * math.sqrt(k * (n - k) / n + z * z / 4) / (n + z * z)
    return middle - half, middle + half


def newcombe(k1, n1, k2, n2):
    """Interval of the difference k1/n1 − k2/n2 of two independent shares (Newcombe's hybrid of two Wilson intervals)."""
    p1, p2, (low1, high1), (low2, high2) = k1 / n1, k2 / n2, wilson(k1, n1), wilson(k2, n2)
    return p1 - p2 - math.hypot(p1 - low1, high2 - p2), p1 - p2 + math.hypot(high1 - p1, p2 - low2)


def fisher_test(k1, n1, k2, n2):
    """Two-sided p-value that two shares are one: the probability of all 2×2 tables no likelier than this one."""
    j = torch.arange(max(0, k1 + k2 - n2), min(n1, k1 + k2) + 1, dtype=torch.float64)
    k = k1 + k2 - j
    log_p = -(torch.lgamma(j + 1) + torch.lgamma(n1 - j + 1) + torch.lgamma(k + 1) + torch.lgamma(n2 - k + 1))
    p = log_p.softmax(0)
    return float(p[p <= p[j == k1] * (1 + 1e-9)].sum())


def bootstrap_papers(cells, draws, rng):
    """Tables (draws, 3 or 4) of as many papers drawn with replacement: a paper is the unit, both of its decisions go together."""
    cells = np.asarray(cells)
    return rng.multinomial(cells.sum(), cells / cells.sum(), draws)


def dirichlet_posterior(cells, draws, rng):
    """Draws (draws, 3) of the shares (both, one, neither) under a flat prior: Dirichlet(counts + 1)."""
    both, first, second, neither = four_cells(cells)
    return rng.dirichlet([both + 1, first + second + 1, neither + 1], draws)


# ============================================================================================== the method: latent scores

NODES, WEIGHTS = np.polynomial.legendre.leggauss(64)
GRID = np.linspace(-14, 14, 1001)  # sinh(GRID) covers the line, heavy tails too; the trapezoid rule is exact to 1e-12 there
FAMILIES = ("normal", "logistic opinions", "t3 opinions", "t3 quality", "beta-binomial")


def normal_cdf(x):
    """Φ, float64. subtle: no further than ±26, so that its square is no denormal number, which would slow all that follows."""
    return torch.special.ndtr(torch.as_tensor(x, dtype=torch.float64).clamp(-26, 26)).numpy()


def normal_quantile(p):
    return torch.special.ndtri(torch.as_tensor(p, dtype=torch.float64)).numpy()


def both_above(h1, h2, rho):
    """B = P(X₁ > h1, X₂ > h2) of a standard bivariate normal with correlation rho; arrays broadcast. Error below 1e-10 to |ρ| = 0.9999.

    B = Φ(−h1)·Φ(−h2) + 1/2π ∫₀^{asin ρ} exp(−(h1² + h2² − 2·h1·h2·sin θ) / (2·cos² θ)) dθ,   Gauss-Legendre, 64 nodes
    """
    h1, h2, rho = np.broadcast_arrays(*(np.asarray(x, float) for x in (h1, h2, rho)))
    top = np.arcsin(rho)
    theta = top[..., None] * (NODES + 1) / 2
    squares, product = (h1 * h1 + h2 * h2)[..., None], (2 * h1 * h2)[..., None]
    integral = np.einsum("...i,i", np.exp((product * np.sin(theta) - squares) / (2 * np.cos(theta) ** 2)), WEIGHTS)  # on one thread
    return normal_cdf(-h1) * normal_cdf(-h2) + top / (4 * np.pi) * integral


def tetrachoric(cells):
    """The latent correlation ρ of 2×2 tables (…, 3 or 4): both_above(h1, h2, ρ) = share accepted by both, h from the margins.

    subtle: a table with a zero cell has its ρ at ±1 or nowhere; ½ is added to all of its cells.
    """
    both, first, second, neither = (np.where(np.min(four_cells(cells), 0) == 0, x + 0.5, x) for x in four_cells(cells))
    n = both + first + second + neither
    h1, h2, share = normal_quantile((second + neither) / n), normal_quantile((first + neither) / n), both / n
    low, high = np.full(share.shape, -np.pi / 2), np.full(share.shape, np.pi / 2)
    theta = np.zeros(share.shape)  # ρ = sin θ: in θ the derivative is the integrand
    for _ in range(60):  # Newton's step where it stays in the bracket, else halve the bracket
        excess = both_above(h1, h2, np.sin(theta)) - share
        low, high = np.where(excess < 0, theta, low), np.where(excess < 0, high, theta)
        slope = np.exp((2 * h1 * h2 * np.sin(theta) - h1 * h1 - h2 * h2) / (2 * np.cos(theta) ** 2)) / (2 * np.pi)
        new = theta - excess / np.maximum(slope, 1e-300)
        new = np.where((new > low) & (new < high), new, (low + high) / 2)
        if np.all(abs(new - theta) < 1e-13):
            break
        theta = new
    return np.sin(new)


def polychoric(table):
    """ρ of an L×L table of ordered levels, best first: thresholds from the margins, then maximum likelihood in ρ alone (two steps).

    → (ρ, low, high): the estimate and where the likelihood falls by 1.92 (95 %, thresholds held). Merge empty levels before.
    """
    table = np.asarray(table, float)
    h1, h2 = (np.concatenate([[40.0], -normal_quantile(np.cumsum(table.sum(axis))[:-1] / table.sum()), [-40.0]]) for axis in (1, 0))

    def likelihood(rho):  # (grid,) → (grid,)
        above = both_above(h1[:, None], h2, np.asarray(rho)[:, None, None])
        return (table * np.log(np.maximum(np.diff(np.diff(above, axis=1), axis=2), 1e-300))).sum((1, 2))

    low, high = -0.9999, 0.9999
    for _ in range(8):
        grid = np.linspace(low, high, 41)
        best = np.argmax(likelihood(grid))
        low, high = grid[max(best - 1, 0)], grid[min(best + 1, 40)]
    rho = (low + high) / 2
    floor = likelihood([rho])[0] - 1.920729
    ends = bisect(lambda x: likelihood(x) * [1, -1], np.array([floor, -floor]), np.array([-0.9999, rho]), np.array([rho, 0.9999]))
    return rho, *ends


def accept_chances(family, p, strength):
    """How a paper's own chance q of acceptance is spread over papers → (q, weight), each (rates, nodes); weights sum to 1.

    Two committees are independent given the paper, so B = E[q²], arbitrariness A = 1 − E[q²]/E[q], at rates p = E[q], (rates,).
    All but the last: X = √ρ·S + √(1−ρ)·e of unit-variance quality S and opinion e, q = P(X > h | S). strength: ρ.
    beta-binomial: q ~ Beta(α, β), α + β = 1/κ − 1 at every rate. strength: κ, the correlation of two decisions.
    """
    p = np.asarray(p, float)[:, None]
    s = np.sinh(GRID)
    if family == "beta-binomial":
        alpha, beta = p * (1 / strength - 1), (1 - p) * (1 / strength - 1)
        u = np.sinh(GRID * 0.55)  # q = σ(u); u to ±1,100
        log_w = -alpha * np.logaddexp(0, -u) - beta * np.logaddexp(0, u) + np.log(np.cosh(GRID * 0.55))
        weight = np.exp(log_w - log_w.max(1, keepdims=True))
        return 1 / (1 + np.exp(-np.clip(u, -700, 700))) + 0 * p, weight / weight.sum(1, keepdims=True)
    density = (2 / np.pi) / (1 + s * s) ** 2 if family == "t3 quality" else np.exp(-s * s / 2)
    weight = density * np.cosh(GRID)
    weight = weight / weight.sum()

    def chances(h):
        x = (math.sqrt(strength) * s - h) / math.sqrt(1 - strength)
        if family == "logistic opinions":
            return 0.5 + 0.5 * np.tanh(x * np.pi / math.sqrt(12))
        return 0.5 + (x / (1 + x * x) + np.arctan(x)) / np.pi if family == "t3 opinions" else normal_cdf(x)

    h = bisect(lambda h: -np.einsum("ri,i->r", chances(h), weight)[:, None], -p, -60.0, 60.0, 50)
    return chances(h), weight + 0 * p


def arbitrariness(p, strength, family="normal"):
    """A = 1 − P(both accept)/p at acceptance rates p (array), for correlation `strength` (for beta-binomial: κ)."""
    p = np.asarray(p, float)
    if family == "normal":
        h = normal_quantile(1 - p)
        return 1 - both_above(h, h, strength) / p
    q, weight = accept_chances(family, p.ravel(), strength)
    return 1 - ((q * q * weight).sum(1) / p.ravel()).reshape(p.shape)


def fit_family(family, p, observed):
    """The strength at which `family` has arbitrariness `observed` at rate p; nan where lots explain it (observed ≥ 1 − p)."""
    if not 0 < observed < 1 - p:
        return math.nan
    if family == "beta-binomial":
        return 1 - observed / (1 - p)
    return float(bisect(lambda rho: -arbitrariness(np.array([p]), float(rho[0]), family), np.array([-observed]), 1e-4, 0.9999, 36)[0])


# ============================================================================================== the method: reviewer calibration


def calibration_design(paper, reviewer):
    """Index structure of y_ij = μ + f_i + b_j + ε_ij. paper, reviewer: int64 (reviews,), numbered from 0.

    The larger of the two effects is eliminated, for its block of the system is diagonal; left is a Schur complement of the smaller
    one's size, whose pattern is all pairs of reviews under one unit of the larger effect.
    """
    counts = [torch.bincount(index) for index in (paper, reviewer)]
    swap = len(counts[1]) > len(counts[0])
    (big, small), (n_big, n_small) = ((reviewer, paper), counts[::-1]) if swap else ((paper, reviewer), counts)
    order = torch.argsort(big, stable=True)
    k = n_big[big[order]]  # of each review, in order: how many reviews its unit has
    first = torch.repeat_interleave(torch.arange(len(big), device=big.device), k)
    within = torch.arange(len(first), device=big.device) - torch.repeat_interleave(k.cumsum(0) - k, k)
    second = torch.repeat_interleave((n_big.cumsum(0) - n_big)[big[order]], k) + within
    rows, cols = small[order][first], small[order][second]
    return dict(swap=swap, big=big, small=small, n_big=n_big.double(), n_small=n_small.double(), rows=rows, cols=cols,
                group=big[order][first])


def inverse_and_logdet(matrix):
    """Inverse and log determinant of a symmetric positive definite matrix, by halves: nearly all of the work is matrix products."""
    n = len(matrix)
    if n <= 512:
        factor = torch.linalg.cholesky(matrix)
        return torch.cholesky_inverse(factor), 2 * factor.diagonal().log().sum()
    half = n // 2
    inverse = torch.empty_like(matrix)
    corner, logdet = inverse_and_logdet(matrix[:half, :half])
    across = corner @ matrix[:half, half:]  # A⁻¹B
    inverse[half:, half:], rest = inverse_and_logdet(matrix[half:, half:] - matrix[half:, :half] @ across)
    inverse[:half, half:] = -across @ inverse[half:, half:]
    inverse[half:, :half] = inverse[:half, half:].T
    inverse[:half, :half] = corner - inverse[:half, half:] @ across.T
    return inverse, logdet + rest


def mixed_model(design, y, variances, mean="plain"):
    """Exact likelihood of y ~ N(μ·1, K), K = α_f·ZZᵀ + α_b·WWᵀ + σ²·I, with gradient and Hessian in θ = log(α_f, α_b, σ²).

    y: float64 (reviews,); variances: (α_f, α_b, σ²). mean: "plain" is the mean of the scores (the reference's), "gls" the maximum
    likelihood one, "reml" that with the restricted likelihood. With λ = α/σ², M = I + Λ^½·[Z W]ᵀ[Z W]·Λ^½ in blocks D (diagonal) and
    E, and S = M_small − EᵀD⁻¹E:

        log|K| = N·log σ² + log|D| + log|S|              y'K⁻¹y by elimination with R = S⁻¹
        ∂/∂θᵢ = ½·(tᵢ − qᵢ)                               t = tr(K⁻¹Vᵢ) = units − tr of M⁻¹'s block, qᵢ = v'Vᵢv, v = K⁻¹(y − μ)
        ∂²/∂θᵢ∂θⱼ = −½·tr(K⁻¹VᵢK⁻¹Vⱼ) + v'VᵢK⁻¹Vⱼv + δᵢⱼ·∂/∂θᵢ      (Vᵢ: the part of K with variance i, scaled by it)
    """
    big, small, rows, cols, group = (design[key] for key in ("big", "small", "rows", "cols", "group"))
    n_big, n_small, n = design["n_big"], design["n_small"], len(y)
    sigma2 = variances[2]
    at = (1, 0, 2) if design["swap"] else (0, 1, 2)  # where big, small and noise stand in θ
    lam_big, lam_small = variances[at[0]] / sigma2, variances[at[1]] / sigma2
    cross = math.sqrt(lam_big * lam_small)
    d = 1 + lam_big * n_big
    schur = torch.diag(1 + lam_small * n_small)
    schur.index_put_((rows, cols), -(cross * cross) / d[group], accumulate=True)
    inverse, logdet = inverse_and_logdet(schur)
    del schur

    def total(index, units, values):  # Zᵀ or Wᵀ times values (reviews, columns)
        return torch.zeros(len(units), values.shape[1], dtype=values.dtype, device=values.device).index_add_(0, index, values)

    def solve(values):  # K⁻¹·values
        r_big, r_small = math.sqrt(lam_big) * total(big, d, values), math.sqrt(lam_small) * total(small, n_small, values)
        x_small = inverse @ (r_small - cross * total(small, n_small, (r_big / d[:, None])[big]))
        x_big = (r_big - cross * total(big, d, x_small[small])) / d[:, None]
        return (values - math.sqrt(lam_big) * x_big[big] - math.sqrt(lam_small) * x_small[small]) / sigma2

    ones = torch.ones(n, 1, dtype=y.dtype, device=y.device)
    solved = solve(torch.cat([y[:, None], ones], 1))
    mu = y.mean() if mean == "plain" else solved[:, 0].sum() / solved[:, 1].sum()
    u, c = solved[:, 1:], solved[:, 1].sum()
    v = solved[:, :1] - mu * u  # K⁻¹(y − μ)

    def parts(x):  # Vᵢx for the three variances, (reviews, 3) in the order big, small, noise
        return torch.cat([variances[at[0]] * total(big, d, x)[big], variances[at[1]] * total(small, n_small, x)[small], sigma2 * x], 1)

    pairs = inverse[rows, cols]  # R where two reviews meet
    p1 = torch.sparse_coo_tensor(torch.stack([rows, cols]), cross * cross / d[group] ** 2, inverse.shape, check_invariants=False)  # EᵀD⁻²E
    p1r = torch.sparse.mm(p1, inverse)
    trace_big = (1 / d).sum() + (pairs * cross * cross / d[group] ** 2).sum()
    square_big = (1 / d**2).sum() + 2 * (pairs * cross * cross / d[group] ** 3).sum() + (p1r * p1r.T).sum()
    t = [len(d) - trace_big, len(n_small) - inverse.trace()]
    tt = torch.zeros(3, 3, dtype=y.dtype, device=y.device)
    tt[0, 0], tt[1, 1] = len(d) - 2 * trace_big + square_big, len(n_small) - 2 * inverse.trace() + (inverse * inverse).sum()
    tt[0, 1] = tt[1, 0] = (p1r * inverse).sum()
    del p1r
    t = torch.stack([*t, n - sum(t)])  # Σᵢ Vᵢ = K gives what belongs to the noise
    tt[2, :2] = tt[:2, 2] = t[:2] - tt[:2, :2].sum(1)
    tt[2, 2] = t[2] - tt[2, :2].sum()

    w = parts(v)
    solved_w = solve(w)
    q, qq = w.T @ v[:, 0], w.T @ solved_w
    nll = 0.5 * (n * math.log(2 * math.pi * sigma2) + d.log().sum() + logdet + ((y - mu) * v[:, 0]).sum())
    if mean != "plain":  # μ moves with θ
        x = w.T @ u
        qq = qq - x @ x.T / c
    if mean == "reml":  # + ½·log(1'K⁻¹1), and P = K⁻¹ − uu'/c for K⁻¹
        wu = parts(u)
        z, zz = wu.T @ u, wu.T @ solve(wu)
        t, tt = t - z[:, 0] / c, tt - 2 * zz / c + z @ z.T / c**2
        nll = nll + 0.5 * c.log() - 0.5 * math.log(2 * math.pi)
    gradient = (t - q) / 2
    hessian = -tt / 2 + qq + torch.diag(gradient)
    order = torch.tensor(at, device=y.device)  # back to α_f, α_b, σ²; the swap is its own inverse
    block_big = 1 / d + torch.zeros_like(d).index_add_(0, group, pairs * cross * cross) / d**2  # diagonal of M⁻¹
    return dict(nll=float(nll), mu=float(mu), gradient=gradient[order].cpu().numpy(), hessian=hessian[order][:, order].cpu().numpy(),
                v=v[:, 0], inverse=inverse, spread=[(block_big, inverse.diagonal())[i] for i in at[:2]], variances=list(variances))


def start_values(paper, reviewer, y, offsets):
    """Unbiased moments: reviews that share only a paper covary by α_f, those that share only a reviewer by α_b."""
    r = y - y.mean()
    shares = []
    for index in (paper, reviewer):
        k, s = torch.bincount(index).double(), torch.bincount(index, r)
        shares.append(float((s * s).sum() - (r * r).sum()) / max(float((k * (k - 1)).sum()), 1.0))
    whole = float(r @ r) / len(y)
    quality, offset = (min(max(share, 0.02 * whole), 0.9 * whole) for share in shares)
    offset = offset if offsets else 0.0
    return [quality, offset, max(whole - quality - offset, 0.1 * whole)]


FLOOR = 1e-9  # of σ²: the search goes no lower; what ends below 1e-4 of σ² counts as zero


def calibrate(paper, reviewer, y, mean="plain", progress=None):
    """Fit the three variances by Newton's method. paper, reviewer: int64; reviewer None: one-way model. y: float64 (reviews,).

    → the dict of mixed_model at the optimum, with `se` (of α_f, α_b, σ², from the observed information; nan at the boundary),
    `effect`, `effect_sd` (E[f_i | y], papers), `offset`, `offset_sd` (E[b_j | y], reviewers) and `calibrated` = y − E[b_j | y] =
    μ + E[f_i + ε_ij | y], which takes the reviewer's offset away and leaves the reviewer's private opinion in.
    """
    offsets = reviewer is not None
    reviewer = reviewer if offsets else torch.zeros_like(paper)
    design = calibration_design(paper, reviewer)
    variances = start_values(paper, reviewer, y, offsets)
    if not offsets:
        variances[1] = 0.0
    state = mixed_model(design, y, variances, mean)
    for _ in range(60):
        free = np.array([True, offsets, True])
        for i in (0, 1):  # subtle: at the floor with the likelihood still rising downwards, a variance is zero
            if state["variances"][i] <= FLOOR * state["variances"][2] * 1.001 and state["gradient"][i] >= 0:
                free[i] = False
        values, vectors = np.linalg.eigh(state["hessian"][np.ix_(free, free)])
        gradient = vectors.T @ state["gradient"][free]
        values = np.maximum(abs(values), 1e-12 * abs(values).max())
        step = np.zeros(3)
        step[free] = -np.clip(vectors @ (gradient / values), -2, 2)
        for i in (0, 1):  # subtle: Newton's step in log α tends to −1 where α tends to zero; go there at once
            share = state["variances"][i] / state["variances"][2]
            if free[i] and share < 0.01 and state["gradient"][i] > 0:
                step[i] = math.log(FLOOR / share)
        decrement = float((gradient**2 / values).sum())
        if progress:
            progress(state, decrement)
        if decrement < 1e-7:
            break
        old = state
        for shrink in range(30):
            moved = np.array(old["variances"]) * np.exp(step * 0.5**shrink)
            moved[:2] = np.where(free[:2], np.maximum(moved[:2], FLOOR * moved[2]), moved[:2])
            state = mixed_model(design, y, [float(x) for x in moved], mean)
            if state["nll"] <= old["nll"] + 1e-9 * abs(old["nll"]):
                break
    information = state["hessian"][np.ix_(free, free)] - np.diag(state["gradient"][free])  # the gradient is not quite zero
    alpha = np.array(state["variances"])
    se = np.full(3, math.nan)
    se[free] = np.sqrt(np.maximum(np.diag(np.linalg.inv(information)), 0)) * alpha[free]
    zero = alpha[:2] < 1e-4 * alpha[2]
    alpha[:2][zero], se[:2][zero] = 0.0, math.nan
    v, spread = state["v"], state["spread"]
    effect, offset = (a * torch.bincount(index, v) for a, index in zip(alpha, (paper, reviewer)))
    sds = [torch.sqrt(a * s) for a, s in zip(alpha, spread)]
    return dict(state, design=design, variances=alpha.tolist(), se=se.tolist(), effect=effect, offset=offset, effect_sd=sds[0],
                offset_sd=sds[1], calibrated=y - offset[reviewer], paper=paper, reviewer=reviewer, y=y)


def acceptance_draws(fit, accepted, reviews, draws, generator):
    """Chances that each paper is among the `accepted` best, from joint posterior draws of effects and offsets → two arrays (papers,).

    as reviewed: the same reviews, mean calibrated score, where only the reviewers' offsets are uncertain. rerun: a new committee with
    `reviews` calibrated reviews of each paper, whose opinions are new.
    """
    design, (quality, offset, sigma2) = fit["design"], fit["variances"]
    paper, reviewer, y, k = fit["paper"], fit["reviewer"], fit["y"], torch.bincount(fit["paper"]).double()
    alpha_small, alpha_big = (quality, offset) if design["swap"] else (offset, quality)
    mean_small = fit["effect"] if design["swap"] else fit["offset"]

    def normal(*shape):
        return torch.randn(*shape, dtype=y.dtype, device=y.device, generator=generator)

    scale = torch.linalg.cholesky(fit["inverse"])  # of the small effect: its posterior covariance is α·S⁻¹
    small = mean_small[:, None] + math.sqrt(alpha_small) * (scale @ normal(len(scale), draws))
    weight = 1 / (design["n_big"] + sigma2 / max(alpha_big, 1e-300))  # the big effect given the small one: independent normals
    rest = (y - fit["mu"])[:, None] - small[design["small"]]
    big = torch.zeros(len(weight), draws, dtype=y.dtype, device=y.device).index_add_(0, design["big"], rest) * weight[:, None]
    big += (sigma2 * weight).sqrt()[:, None] * normal(len(weight), draws)
    effects, offsets = (small, big) if design["swap"] else (big, small)
    held = torch.zeros_like(effects).index_add_(0, paper, y[:, None] - offsets[reviewer]) / k[:, None]
    rerun = effects + math.sqrt(sigma2 / reviews) * normal(*effects.shape)
    return [torch.zeros(len(k), dtype=y.dtype, device=y.device).index_add_(
        0, scores.topk(accepted, 0).indices.flatten(), torch.ones(accepted * draws, dtype=y.dtype, device=y.device)) / draws
        for scores in (held, rerun)]


def implied_correlation(quality, offset, opinion, reviews, calibrated, noise=0.0):
    """Between the mean scores of two committees of `reviews` reviewers each; noise: a committee's own variance, after averaging."""
    return quality / (quality + (opinion + (0 if calibrated else offset)) / reviews + noise)


def one_way(paper, y):
    """ANOVA of unbalanced groups → (between-paper variance, within, ICC(1)); n₀ = (N − Σk²/N)/(a − 1) reviews a paper. numpy arrays."""
    k = np.bincount(paper)
    means, n, a = np.bincount(paper, y) / k, len(y), len(k)
    within = ((y - means[paper]) ** 2).sum() / (n - a)
    among = (k * (means - y.mean()) ** 2).sum() / (a - 1)
    between = (among - within) / ((n - (k * k).sum() / n) / (a - 1))
    return between, within, between / (between + within)


# ============================================================================================== the method: rank and simulate


def ranks(scores, generator):
    """Rank of each paper (…, papers) by score, best 0, ties broken at random (else agreement of discrete scores is biased)."""
    mixed = torch.randperm(scores.shape[-1], generator=generator, device=scores.device)
    order = mixed[torch.argsort(scores[..., mixed], dim=-1, descending=True, stable=True)]
    return torch.empty_like(order).scatter_(-1, order, torch.arange(scores.shape[-1], device=scores.device).expand_as(order))


def overlaps(first, second, generator):
    """Papers that are in the top M by both scores, for every M at once: int64 (…, papers), entry M − 1.

    A paper is in both lists from M = max(rank₁, rank₂) + 1 on: count those, and add up.
    """
    worst = torch.maximum(ranks(first, generator), ranks(second, generator))
    return torch.zeros_like(worst).scatter_add_(-1, worst, torch.ones_like(worst)).cumsum(-1)


def simulate_conference(papers, reviewers, variances, noise, committees, likert, generator, device, dtype):
    """Mean scores (committees, panel sizes 1..reviewers, papers) of one conference reviewed by independent committees.

    A review is quality + offset + opinion, with the variances given; with likert = L whole numbers 1 to L (mean 5.2, as in 2014).
    The panel of R is the first R reviewers of its committee. noise: variance of what a committee adds after averaging.
    """
    quality, offset, opinion = (math.sqrt(x) for x in variances)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, device=device, dtype=dtype)

    reviews = quality * normal(papers) + math.sqrt(offset**2 + opinion**2) * normal(committees, reviewers, papers)
    if likert:
        reviews = (reviews + 5.2).round().clamp(1, likert)
    sizes = torch.arange(1, reviewers + 1, device=device, dtype=dtype)[:, None]
    return reviews.cumsum(1) / sizes + math.sqrt(noise) * normal(committees, 1, papers)


# ============================================================================================== the same in every file

CACHE = Path(os.environ.get("NANOPAPERS_CACHE", "~/.cache/nanopapers")).expanduser()


def fail(message):
    """For what a user can mend: one line on stderr, exit code 2."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


def number(kind, low=-math.inf, high=math.inf):
    """An argparse type: an int or a float from low to high, both included."""

    def parse(text):
        value = kind(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text} is not between {low} and {high}")
        return value

    parse.__name__ = kind.__name__  # argparse says: invalid int value
    return parse


def set_up(args):
    """Seeds, device, dtype and torchrun's process group → (device, dtype, rank, world)."""
    rank, world, local = (int(os.environ.get(name, n)) for name, n in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    best = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(best if args.device == "auto" else args.device)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        fail(f"--device {args.device} cannot be had here, {best} can ({str(error).splitlines()[0]})")
    if device.type == "cuda":
        device = torch.device("cuda", local if device.index is None else device.index)
        torch.cuda.set_device(device)
    dtype = {"auto": torch.bfloat16 if device.type == "cuda" else torch.float32}.get(args.dtype) or getattr(torch, args.dtype)
    if world > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    torch.manual_seed(args.seed)
    torch.set_flush_denormal(True)  # a denormal slows a CPU matmul tenfold
    torch.set_float32_matmul_precision("high")
    return device, dtype, rank, world


def download(url, sha256=""):
    """Fetch url into the cache, once, and return its path. A broken download goes on where it stopped; a file counts only when
    its length and, where given, its sha256 (a prefix will do) are right."""
    path = CACHE / url.split("://")[1]
    part = path.with_name(path.name + ".part")
    if path.exists():
        return path
    part.parent.mkdir(parents=True, exist_ok=True)
    have = part.stat().st_size if part.exists() else 0
    try:
        request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
        with urllib.request.urlopen(request, timeout=30) as reply, open(part, "ab" if reply.status == 206 else "wb") as file:
            length = int(reply.headers.get("Content-Length") or 0) + file.tell()
            with tqdm(total=length, initial=file.tell(), unit="B", unit_scale=True, desc=path.name) as bar:
                while chunk := reply.read(1 << 20):
                    bar.update(file.write(chunk))
    except OSError as error:
        if getattr(error, "code", 0) == 416:  # nothing is left to send, yet the file never passed the checks below
            part.unlink()
        fail(f"no download of {url} ({error}): try again, or fetch it elsewhere and put it at {path}")
    if part.stat().st_size < length:
        fail(f"{url} broke off at {part.stat().st_size:,} of {length:,} bytes: run the command again to go on")
    with open(part, "rb") as file:
        if not hashlib.file_digest(file, "sha256").hexdigest().startswith(sha256):
            part.unlink()
            fail(f"{url} has another sha256 than {sha256}: removed")
    os.replace(part, path)
    return path


def save_results(folder, args, figures):
    """folder/results.json: the command, git revision, versions, device, seed and every figure of the table. Returns its path."""
    git = subprocess.run(["git", "-C", Path(__file__).parent, "rev-parse", "HEAD"], capture_output=True, text=True)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.processor() or platform.machine()} CPU"
    about = dict(command=" ".join(["python", *sys.argv]), revision=git.stdout.strip() or "unknown", torch=torch.__version__,
                 python=platform.python_version(), device=device, seed=args.seed)
    folder.mkdir(parents=True, exist_ok=True)
    strict = json.loads(json.dumps(dict(**about, **figures)), parse_constant=str)  # JSON has no NaN and no Infinity
    (folder / "results.json").write_text(json.dumps(strict, indent=1))
    return folder / "results.json"


def print_table(header, rows):
    """Rows of strings and numbers as aligned plain text, first column left, the others right."""
    rows = [[f"{x:.3f}" if isinstance(x, float) and x == x else "–" if x != x else str(x) for x in row] for row in [header, *rows]]
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows:
        print(row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:])), sep="  ")


def counter_seed(*counter):
    """A random seed below 2^31 that depends on the counter alone."""
    return int(np.random.default_rng(counter).integers(2**31))


# ============================================================================================== tables in, tables out


def review_columns(path, needed, optional=()):
    """A CSV or TSV file with a header → {column: list of texts}, with "row" the line of each record. Names in any case."""
    try:
        text = Path(path).read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        fail(f"{path} cannot be read ({error.strerror if isinstance(error, OSError) else 'not UTF-8 text'}): give a CSV file with columns "
             f"{', '.join(needed)}")
    reader = csv.reader(text.splitlines(), delimiter="\t" if "\t" in text.partition("\n")[0] else ",")
    header = [name.strip().lower() for name in next(reader, [])]
    for name in needed:
        if header.count(name) != 1:
            fail(f"{path}, row 1: {'no column' if name not in header else 'more than one column'} '{name}' in the header "
                 f"({', '.join(header)}); needed are {', '.join(needed)}")
    columns = {"row": []} | {name: [] for name in (*needed, *optional) if name in header}
    for record in reader:
        if not any(cell.strip() for cell in record):
            continue
        if len(record) != len(header):
            fail(f"{path}, row {reader.line_num}: {len(record)} cells, but the header has {len(header)}")
        columns["row"].append(reader.line_num)
        for name in columns:
            if name != "row":
                columns[name].append(record[header.index(name)].strip())
                if not columns[name][-1]:
                    fail(f"{path}, row {reader.line_num}, column '{name}': empty; fill it in or leave the row out")
    if not columns["row"]:
        fail(f"{path} has a header and no rows")
    return columns


def to_float(text, path, row, column, low=-math.inf, high=math.inf):
    try:
        value = float(text) if "_" not in text else math.nan
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        fail(f"{path}, row {row}, column '{column}': '{text}' is not a number")
    if not low <= value <= high:
        fail(f"{path}, row {row}, column '{column}': {text} is outside {low:g} to {high:g}")
    return value


def float_column(columns, name, path, low=-math.inf, high=math.inf):
    return np.array([to_float(text, path, row, name, low, high) for row, text in zip(columns["row"], columns[name])])


def numbered(labels):
    """Labels → (int64 codes in order of appearance, the distinct labels)."""
    codes = {}
    return np.array([codes.setdefault(label, len(codes)) for label in labels]), list(codes)


def unique_rows(path, columns, names):
    """Refuse a second row with the same values in the columns `names`."""
    seen = {}
    for row, *key in zip(columns["row"], *(columns[name] for name in names)):
        if tuple(key) in seen:
            fail(f"{path}, row {row}, column '{names[-1]}': {' and '.join(f'{n} {k!r}' for n, k in zip(names, key))} stand in row "
                 f"{seen[tuple(key)]} already; a pair may come once")
        seen[tuple(key)] = row


LEVELS = ("oral", "talk", "spotlight", "poster", "accept", "reject", "withdraw", "desk")  # best first


def level_of(text):
    """Where a decision stands: "Accept (Oral)" → 0 … by the first of LEVELS in it; None if it has none. 1/0 and yes/no will do."""
    text = {"1": "accept", "yes": "accept", "0": "reject", "no": "reject"}.get(text.lower(), text.lower())
    return next((i for i, name in enumerate(LEVELS) if name in text), None)


def table_file(path):
    """A square CSV of counts, with or without labels on both axes, best level first → (labels, int array (levels, levels))."""
    try:
        text = Path(path).read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError):
        fail(f"{path} cannot be read: give 3 or 4 counts, or a square CSV file of them")
    rows = [[cell.strip() for cell in row] for row in csv.reader(text.splitlines(), delimiter="\t" if "\t" in text else ",") if any(row)]
    labels, first = None, 1
    if rows and not re.fullmatch(r"[-+.\deE]+", rows[0][-1]):
        labels, rows, first = [cell for cell in rows[0] if cell][-(len(rows) - 1):], rows[1:], 2
        names = [row[0] for row in rows]
        if names != labels:
            wrong = next((i for i, (a, b) in enumerate(zip(names, labels)) if a != b), min(len(names), len(labels)))
            fail(f"{path}, row {wrong + 2}, column 1: '{''.join(names[wrong : wrong + 1])}' where the header has "
                 f"'{''.join(labels[wrong : wrong + 1])}'; rows and columns need the same labels in the same order")
        rows = [row[1:] for row in rows]
    for i, row in enumerate(rows):
        if len(row) != len(rows):
            fail(f"{path}, row {i + first}: {len(row)} counts in a table of {len(rows)} rows; it must be square")
    table = np.array([[to_float(cell, path, i + first, labels[j] if labels else j + 1, 0) for j, cell in enumerate(row)]
                      for i, row in enumerate(rows)])
    if len(table) < 2:
        fail(f"{path} has {len(table)} rows of counts; two levels are the least")
    for i, j in np.argwhere(table != table.round())[:1]:
        fail(f"{path}, row {i + first}, column '{labels[j] if labels else j + 1}': {table[i, j]:g} is not a whole number")
    return labels or [f"level {i + 1}" for i in range(len(table))], table.astype(int)


def shown(x, digits=4):
    """A number as text; "undefined" for nan, without the minus sign of a rounded zero."""
    return "undefined" if not math.isfinite(x) else f"{round(float(x), digits) + 0.0:.{digits}f}"


def span(ends, digits=4):
    return "undefined" if not np.all(np.isfinite(ends)) else f"{shown(ends[0], digits)} to {shown(ends[1], digits)}"


def review_json(x):
    """Figures as JSON takes them: arrays to lists, nan and infinities to null."""
    if isinstance(x, dict):
        return {str(key): review_json(value) for key, value in x.items() if key != "rho_draws"}
    if isinstance(x, (list, tuple, np.ndarray, torch.Tensor)):
        return [review_json(value) for value in (x.tolist() if hasattr(x, "tolist") else x)]
    x = x.item() if isinstance(x, np.generic) else x
    return None if isinstance(x, float) and not math.isfinite(x) else x


# ============================================================================================== reports


def percentiles(x):
    """The middle 95 % along the first axis, of the values that are defined."""
    x = np.asarray(x, float)
    kept = np.isfinite(x).reshape(len(x), -1).all(1)
    return np.percentile(x[kept], [2.5, 97.5], 0) if kept.any() else np.full((2, *x.shape[1:]), math.nan)


def report_counts(tables, args):
    """Metrics, intervals and latent correlation of named tables of counts (3 or 4 cells), printed → figures for results.json."""
    rng, figures = np.random.default_rng(args.seed), {}
    for name, cells in tables.items():
        cells = np.array(cells)
        both, first, second, neither = (float(x) for x in four_cells(cells))
        n, differ, accepts = int(cells.sum()), int(cells[1:-1].sum()), int(2 * both + first + second)
        metrics = {key: float(value) for key, value in consistency(cells).items()}
        if len(cells) == 3:
            metrics["arbitrariness, mean of directions"] = math.nan  # needs the split
        draws = bootstrap_papers(cells, args.draws, rng)
        posterior = consistency(dirichlet_posterior(cells, args.draws, rng))
        rerun = {key: percentiles(value) for key, value in consistency(draws).items()}
        defined = min(both + first, both + second, neither + first, neither + second) > 0
        rhos = tetrachoric(draws) if defined else np.full(1, math.nan)
        figures[name] = dict(
            n=n, cells=cells, metrics=metrics, bootstrap=rerun, rho=float(tetrachoric(cells)) if defined else math.nan, rho_draws=rhos,
            rho_se=float(np.std(rhos[np.isfinite(rhos)])) if defined else math.nan, rho_interval=percentiles(rhos),
            rates=((both + first) / n, (both + second) / n), zero_cell=bool(defined and cells.min() == 0),
            posterior={key: (float(value.mean()), float(value.std())) for key, value in posterior.items()},
            intervals={
                "inconsistency: Clopper-Pearson *": clopper_pearson(differ, n), "inconsistency: Wilson": wilson(differ, n),
                "arbitrariness: paper bootstrap *": rerun["arbitrariness"],
                "arbitrariness: Dirichlet posterior": percentiles(posterior["arbitrariness"]),
                "arbitrariness: accepts as if independent": clopper_pearson(differ, accepts) if accepts else (math.nan, math.nan)})
    columns = list(figures.values())
    print_table(("two committees", *figures), [("papers", *(f["n"] for f in columns)), *(
        (key, *("needs the split" if len(f["cells"]) == 3 and "mean of" in key else shown(f["metrics"][key]) for f in columns))
        for key in columns[0]["metrics"])])
    print()
    print_table(("95 % intervals (* = the one to trust)", *figures), [
        *((key, *(span(f["intervals"][key]) for f in columns)) for key in columns[0]["intervals"]),
        *((f"{key}: posterior mean ± sd", *("{} ± {}".format(*(shown(x) for x in f["posterior"][key])) for f in columns))
          for key in ("accept precision", "reject precision", "agreed accept rate")),
        ("latent correlation ρ (tetrachoric)", *(shown(f["rho"]) for f in columns)),
        ("ρ: paper bootstrap *", *(span(f["rho_interval"]) for f in columns)),
        ("ρ: standard error", *(shown(f["rho_se"]) for f in columns))])
    print("Not to be trusted: accepts as if independent. Both accepts of one paper are one draw; the bootstrap draws papers.\n"
          "Clopper-Pearson is exact and covers at least 95 %. ρ needs normal scores.")
    for name, f in figures.items():
        if f["zero_cell"]:
            print(f"note: {name} has a zero cell; its ρ is that of the counts with ½ added to each.")
    return figures


def report_baselines(name, figures):
    """Simple stories that would have made the same table, printed."""
    m = figures["metrics"]
    p, arbitrary, differ = m["acceptance rate"], m["arbitrariness"], m["inconsistency"]
    if not 0 < arbitrary < 1:
        return
    print(f"\n{name} as lots among the good: a share Q = p/(1 − A) = {shown(p / (1 - arbitrary))} of papers is good enough.")
    low, high = differ / (2 * (1 - p)), 1 - arbitrary  # chance in the middle class, without sure rejects and without sure accepts
    if low <= high:
        print(f"{name} as sure accepts, sure rejects and lots for the rest: from {shown(p - differ / (2 - 2 * low))} sure accepts, no sure "
              f"rejects and\nchance {shown(low)} to no sure accepts, {shown(1 - p / high)} sure rejects and chance "
              f"{shown(high)}.")
    print(f"{name}, one committee judged by the other: balanced accuracy {shown((m['accept precision'] + m['reject precision']) / 2)}.")


def selectivity(figures, rates):
    """Arbitrariness at other acceptance rates by every family that agrees with the table at its own rate → figures.

    Families are fitted to the normal one's value there: what the table says of two committees that are equally strict.
    """
    p, rho = figures["metrics"]["acceptance rate"], figures["rho"]
    if not math.isfinite(rho):
        return dict(rates=rates, band=None, curves={})
    curves, point = {}, float(arbitrariness(p, rho))
    for family in FAMILIES:
        strength = rho if family == "normal" else fit_family(family, p, point)
        if math.isfinite(strength):
            q, weight = accept_chances(family, np.array([p]), strength) if strength > 0 else (math.nan, np.ones(1))
            curves[family] = dict(strength=strength, arbitrariness=arbitrariness(rates, strength, family),
                                  ceiling=float((np.maximum(q, 1 - q) * weight).sum()))
    return dict(rates=rates, point=(p, point), band=percentiles(arbitrariness(rates, figures["rho_draws"][:1000, None])), curves=curves)


def report_selectivity(name, figures, args):
    """The paper's conclusion with what it hangs on, printed → figures."""
    p = figures["metrics"]["acceptance rate"]
    rates = args.accept if args.accept is not None else np.unique([0.03, 0.05, 0.1, 0.15, 0.2, p, 0.25, 0.3, 0.4, 0.5, 0.7, 0.9])
    found = selectivity(figures, rates)
    curves = found["curves"]
    if not curves:
        print(f"\n{name}: a committee accepted nothing or everything: no latent model, no selectivity curve.")
        return found
    base, others = curves["normal"]["arbitrariness"], [f for f in curves if f != "normal"]
    print()
    print_table((f"{name}: arbitrariness at rate", "normal", "95 % band", *others, "relative", "inconsistency"), [
        (shown(rate), shown(base[i]), span(found["band"][:, i], 3), *(shown(curves[f]["arbitrariness"][i]) for f in others),
         shown(base[i] / (1 - rate)), shown(2 * rate * base[i])) for i, rate in enumerate(rates)])
    print_table(("fitted to the same point", *curves), [
        ("correlation (ρ; beta-binomial: κ)", *(shown(c["strength"]) for c in curves.values())),
        ("accuracy of an oracle that knows each paper's q", *(shown(c["ceiling"], 3) for c in curves.values()))])
    print(f"The data identify one point only, {shown(found['point'][1])} at rate {shown(p)}; the rest of each curve is its family's. "
          "Relative (to lots) and\ninconsistency are the normal family's. These three summaries rank the same policies differently.")
    if abs(found["point"][1] - figures["metrics"]["arbitrariness"]) > 0.5 * 10**-3:
        print(f"note: the committees accept {shown(figures['rates'][0])} and {shown(figures['rates'][1])}; the point is that of two "
              "equally strict ones.")
    return found


def compare_tables(first, second, tables):
    """Do two experiments differ? Prints the difference of their inconsistencies, its interval and the exact test → figures."""
    (k1, n1), (k2, n2) = ((int(np.sum(tables[name][1:-1])), int(np.sum(tables[name]))) for name in (first, second))
    result = dict(difference=k1 / n1 - k2 / n2, newcombe=newcombe(k1, n1, k2, n2), fisher_p=fisher_test(k1, n1, k2, n2))
    print(f"\n{first} minus {second}: inconsistency {shown(result['difference'])}, 95 % {span(result['newcombe'])} (Newcombe); "
          f"Fisher's exact test p = {shown(result['fisher_p'])}")
    return result


SOURCES = """Where the sources disagree with themselves, and what we print instead
- The counts of 2021 are derived: 882 papers and "50.6 % of the accepted" are the chairs'; a public list of the accepted papers
  (weigq/neurips2021_stats) has 298 duplicated ones, 199 of them with one reject, so 99 have two accepts; then 203 is the only
  number of disagreements that gives 50.6 %, and it gives their 23 %. The split of the 203 by direction is not public.
- "Without withdrawn papers" is inferred from figures that others computed, not published. Withdrawn papers counted as agreed
  rejects lower the inconsistency (26.6 % to 23.0 %); 2014 left its four out.
- 2109.09774 calls 43 of 166 papers "25.0 %" (25.9 %), prints a reject precision of .175 where its formula gives .825, and the
  agreed accept rate as 22/123 and as 22/101; its "accept precision" is the chance of being rejected. Talks, spotlights and posters
  sum to 413, the text says 414. Its notebook's Dirichlet variance has a wrong sign (sd .030 .0437 .0752; right: .026 .033 .038).
- The chairs' post on 2021 says that 2014 "included only 116 papers"; it was 166.
- 57 % for 2014 (E. Price) and 49.5 % are one quantity on two denominators: the planned rate of 22.5 %, the accepts there were.
- 2109.09774 compares the correlation of single reviews, .502, with that of means of three, .55, and finds them consistent. What
  belongs beside .55 is .75, by its own fit: committees agree less than their reviewers' variances explain.
- "Half would change" is about the list, not about a given paper. ρ of scores and ρ of decisions are two things."""


def report_reviews(rho, interval):
    """What 2014's fitted review model predicts of committees, and what the duplicates show (2109.09774 has both) → figures."""
    quality, offset, opinion, reviews = FIT_2014.values()
    noise = quality / rho - quality - opinion / reviews  # solves implied_correlation(…, noise) = ρ
    rates, rows = (0.1, 0.18, 0.23, 0.3), []
    for kind, calibrated, tau2 in (("raw", False, 0), ("calibrated", True, 0), ("calibrated, with noise", True, noise)):
        for r in range(1, 7):
            corr = implied_correlation(quality, offset, opinion, r, calibrated, tau2)
            rows.append((f"{r}, {kind}", corr, *arbitrariness(rates, corr)))
    print()
    print_table(("reviews a paper, if 2014's review model were all", "ρ", *(f"at rate {r}" for r in rates)),
                [(row[0], *(shown(x) for x in row[1:])) for row in rows])
    print(f"Three calibrated reviews imply ρ = {shown(rows[8][1])}. The decisions of 2014 show {shown(rho)} ({span(interval, 3)}), its "
          f"mean scores 0.55 ± 0.065.\nMissing is noise that a committee adds after averaging, of variance {shown(noise)} (an opinion has "
          f"{opinion}), or what reviewers of one\npaper share. At rate 0.23 a fourth review takes {shown(rows[8][4] - rows[9][4])} "
          f"off the arbitrariness without that noise, {shown(rows[14][4] - rows[15][4])} with it.")
    return dict(noise=noise, rows=rows)


# ============================================================================================== the experiments


def out_folder(args):
    return Path(args.out or f"out/review_consistency/{args.task}")


def neurips(args):
    """Both NeurIPS experiments from their counts: the paper's figures, their uncertainty, and what its conclusion rests on."""
    *_, rank, _ = set_up(args)
    if rank:
        return
    figures = report_counts(NEURIPS, args)
    test = compare_tables("2014", "2021", NEURIPS)
    for name in ("2014", "2021"):
        report_baselines(name, figures[name])
    curve = report_selectivity("2021", figures["2021"], args)
    reviews = report_reviews(figures["2014"]["rho"], figures["2014"]["rho_interval"])
    print(f"\n{SOURCES}")
    write_review(args, dict(experiments=figures, comparison=test, selectivity=curve, reviews=reviews),
                 draw_selectivity({name: figures[name] for name in ("2021", "2014")}), "neurips")


def write_review(args, figures, draw, name):
    """results.json and the figure; their paths come last."""
    out = out_folder(args)
    print(save_results(out, args, review_json(figures)), figure(out, f"{name}.png", args, draw, **draw.size), sep="\n")


def cuts_of(labels, square):
    """An L×L table of ordered levels, best first, as 2×2 tables: {"level or better": four cells}."""
    return {f"{labels[i]} or better": [square[: i + 1, : i + 1].sum(), square[: i + 1, i + 1 :].sum(), square[i + 1 :, : i + 1].sum(),
                                       square[i + 1 :, i + 1 :].sum()] for i in range(len(labels) - 1)}


def headline_cut(labels, cuts):
    """The cut that is acceptance: below the last label that reads as an accept; without such labels, the first cut."""
    accepts = [i for i, level in enumerate(map(level_of, labels[:-1])) if level is not None and level < LEVELS.index("reject")]
    return list(cuts)[accepts[-1] if accepts else 0]


def drop_withdrawn(labels, square, how):
    """Withdrawn papers joined to the last other level ("reject") or left out ("drop") → (labels, square)."""
    gone = np.array([level_of(label) == LEVELS.index("withdraw") for label in labels])
    if not gone.any() or gone.all():
        return labels, square
    join = np.eye(len(labels))[:, ~gone]
    if how == "reject":
        join[gone, -1] = 1
    return [label for label, g in zip(labels, gone) if not g], (join.T @ square @ join).astype(int)


def report_ordered(labels, square, args):
    """Agreement on L ordered levels, best first, printed → (figures, cuts). With withdrawn papers, both headlines."""
    if any(level_of(label) == LEVELS.index("withdraw") for label in labels):
        for how, words in (("reject", "as rejects"), ("drop", "left out")):
            names, other = drop_withdrawn(labels, square, how)
            if len(names) > 1 and other.sum():
                cut = cuts_of(names, other)
                print(f"withdrawn {words}: n = {other.sum()}, inconsistency "
                      f"{shown(consistency(cut[headline_cut(names, cut)])['inconsistency'])}")
        labels, square = drop_withdrawn(labels, square, args.withdrawn)
    if len(labels) < 2 or square.sum() == 0:
        fail(f"a table of {len(labels)} level{'s' * (len(labels) != 1)} and {square.sum()} papers: two levels and one paper are the least")
    n, steps = square.sum(), np.arange(len(labels)) / (len(labels) - 1)
    weights = 1 - np.subtract.outer(steps, steps) ** 2
    agreement, by_lots = (weights * square).sum() / n, (weights * np.outer(square.sum(1), square.sum(0))).sum() / n**2
    kappa, exact = (agreement - by_lots) / (1 - by_lots) if by_lots < 1 else math.nan, np.trace(square) / n
    kept = (square.sum(0) > 0) & (square.sum(1) > 0)
    rho = polychoric(square[np.ix_(kept, kept)]) if kept.sum() > 1 else (math.nan,) * 3
    print_table(("first committee \\ second", *labels), [(label, *map(int, row)) for label, row in zip(labels, square)])
    print(f"exact agreement {shown(exact)}, quadratic-weighted κ {shown(kappa)}, polychoric ρ {shown(rho[0])} "
          f"({span(rho[1:], 3)}{'' if kept.all() else '; without the levels that a committee never used'})\n")
    return dict(labels=labels, table=square, exact_agreement=exact, weighted_kappa=kappa, polychoric=rho), cuts_of(labels, square)


def parse_counts(texts):
    """3 or 4 counts from the command line → ints."""
    if len(texts) not in (3, 4):
        fail(f"3 or 4 counts (both accept, one alone, neither; or both, first alone, second alone, neither), not {len(texts)}")
    cells = [to_float(text, "the command line", 1, f"count {i + 1}", 0, 1e7) for i, text in enumerate(texts)]
    for i, x in enumerate(cells):
        if x != int(x):
            fail(f"count {i + 1}, '{texts[i]}', is not a whole number")
    if sum(cells) == 0:
        fail("the counts are all zero")
    return [int(x) for x in cells]


def table(args):
    """Your own counts: 2×2, or L×L of ordered levels, from the command line or a CSV file."""
    *_, rank, _ = set_up(args)
    if rank:
        return
    if not args.input:
        fail("table needs counts: both accept, first alone, second alone, neither (or both, one alone, neither), or a square CSV file")
    if len(args.input) == 1 and not re.fullmatch(r"[-+.\d]+", args.input[0]):
        extra, tables = report_ordered(*table_file(args.input[0]), args)
        head = headline_cut(extra["labels"], tables)
    else:
        extra, head = {}, "your table"
        tables = {head: parse_counts(args.input)}
    if args.against:
        tables = tables | {"against": parse_counts(args.against)}
    figures = report_counts(tables, args)
    test = compare_tables(head, "against", tables) if args.against else None
    report_baselines(head, figures[head])
    curve = report_selectivity(head, figures[head], args)
    points = {name: figures[name] for name in (head, *(["against"] if args.against else []))}
    write_review(args, dict(extra, experiments=figures, comparison=test, selectivity=curve), draw_selectivity(points), "table")


# ---------------------------------------------------------------------------------------------- two committees, one by one


def pearson(x, y):
    """Correlation, standard error √((1 − r²)/(n − 2)), Fisher-z interval → (r, se, low, high, n); nan where undefined."""
    n = len(x)
    if n < 4 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return (math.nan,) * 4 + (n,)
    r = float(np.clip(np.corrcoef(x, y)[0, 1], -1, 1))
    z, half = math.atanh(max(min(r, 1 - 1e-15), -1 + 1e-15)), 1.959963984540054 / math.sqrt(n - 3)
    return r, math.sqrt((1 - r * r) / (n - 2)), math.tanh(z - half), math.tanh(z + half), n


def kendall_tau_b(x, y):
    """τ-b, ties allowed for; O(n²)."""
    a, b = (np.sign(np.subtract.outer(v, v)) for v in (x, y))
    scale = math.sqrt(float((a * a).sum()) * float((b * b).sum()))
    return float((a * b).sum()) / scale if scale else math.nan


def empirical_selectivity(first, second, draws, generator):
    """Arbitrariness of the top M by score at every M, with its paper bootstrap. first, second: float64 (papers,) or (splits, papers).

    → (rates (papers,), mean over random tie-breaks (and splits), band (2, papers)).
    """
    first, second = (torch.as_tensor(x, dtype=torch.float64).reshape(-1, np.shape(x)[-1]) for x in (first, second))
    splits, n = first.shape
    lists, repeats = torch.arange(1, n + 1, dtype=torch.float64), max(1, 50 // splits)
    mean = sum(1 - overlaps(first, second, generator).double().mean(0) / lists for _ in range(repeats)) / repeats
    again = []
    for start in range(0, draws, 100):
        index = torch.randint(n, (min(100, draws - start), n), generator=generator)
        split = torch.randint(splits, (len(index), 1), generator=generator)
        again.append(1 - overlaps(first[split, index], second[split, index], generator).double() / lists)
    return (lists / n).numpy(), mean.numpy(), np.quantile(torch.cat(again).numpy(), [0.025, 0.975], 0)


def report_scores(name, first, second, args, rho=None):
    """Two committees' mean scores of the same papers: agreement and the empirical selectivity curve, printed → figures."""
    generator = torch.Generator().manual_seed(args.seed)
    r, se, low, high, n = pearson(np.ravel(first), np.ravel(second))
    tau = kendall_tau_b(first, second) if np.ndim(first) == 1 and n <= 5000 else math.nan
    rho = r if rho is None else rho
    rates, curve, band = empirical_selectivity(first, second, min(args.draws, 500), generator)
    if np.ndim(first) == 1:
        print(f"{name}: correlation of mean scores {shown(r)} ± {shown(se)} ({span((low, high), 3)}), Kendall τ-b {shown(tau)}")
    at = args.accept if args.accept is not None else np.array([0.1, 0.2, 0.25, 0.3, 0.4, 0.5])
    picks = np.maximum(np.floor(at * len(rates) + 1e-9).astype(int), 1) - 1
    print_table((f"{name}: arbitrariness of the best by score", "empirical", "paper bootstrap", f"normal, ρ {shown(rho, 3)}", "lots"), [
        (f"best {i + 1} of {len(rates)}", shown(curve[i]), span(band[:, i], 3), shown(
            float(arbitrariness(rates[i], rho)) if 0 <= rho < 1 and rates[i] < 1 else math.nan), shown(1 - rates[i]))
        for i in dict.fromkeys(picks.tolist())])
    return dict(pearson=dict(r=r, se=se, low=low, high=high), kendall_tau_b=tau, rates=rates, arbitrariness=curve, band=band, rho=rho)


def one_file(args, columns):
    if len(args.input) != 1:
        fail(f"{args.task} takes one file: python review_consistency.py {args.task} FILE.csv, with columns {columns}")
    return args.input[0]


def decision_levels(columns, path):
    """Column "decision" → int levels as in LEVELS."""
    found = [level_of(text) for text in columns["decision"]]
    for row, text, level in zip(columns["row"], columns["decision"], found):
        if level is None:
            fail(f"{path}, row {row}, column 'decision': '{text}' is no decision known here ({', '.join(LEVELS[:-1])}; 1 or 0)")
    return np.array(found)


def one_reviewer_one_committee(path, columns):
    """A reviewer of one paper in both committees makes them dependent: refused."""
    seen = {}
    for row, paper, committee, reviewer in zip(*(columns[name] for name in ("row", "paper", "committee", "reviewer"))):
        other, where = seen.setdefault((paper, reviewer), (committee, row))
        if other != committee:
            fail(f"{path}, row {row}, column 'reviewer': {reviewer!r} reviews {paper!r} in committee {committee!r} and, row {where}, in "
                 f"{other!r}; the committees are not independent: leave the paper or the reviewer out")


def committee_cells(columns, path):
    """Rows by (paper, committee) → (cell of each row, cells' (paper, committee) names, pairs (pairs, 2) of cells: all in a paper)."""
    cell, names = numbered(list(zip(columns["paper"], columns["committee"])))
    order = {committee: i for i, committee in enumerate(sorted(set(columns["committee"])))}
    by_paper = {}
    for i, (paper, _) in enumerate(names):
        by_paper.setdefault(paper, []).append(i)
    for paper, group in by_paper.items():
        if len(group) < 2:
            row = columns["row"][int(np.argmax(cell == group[0]))]
            fail(f"{path}, row {row}, column 'committee': paper {paper!r} has one committee, {names[group[0]][1]!r}; every paper needs two")
    pairs = [(a, b) for group in by_paper.values() for ordered in [sorted(group, key=lambda i: order[names[i][1]])]
             for j, a in enumerate(ordered) for b in ordered[j + 1 :]]
    if len(pairs) > len(by_paper):
        print(f"note: some papers have more than two committees: all {len(pairs)} pairs of {len(by_paper)} papers count, as if independent")
    return cell, names, np.array(pairs)


def duplicates(args):
    """Papers that two committees judged, one row a decision or a review: tables, and the selectivity curve by score."""
    *_, rank, _ = set_up(args)
    path = one_file(args, "paper, committee, decision and/or score, perhaps reviewer")
    columns = review_columns(path, ("paper", "committee"), ("decision", "score", "reviewer"))
    if "decision" not in columns and "score" not in columns:
        fail(f"{path}, row 1: neither a column 'decision' nor a column 'score' in the header")
    if "reviewer" in columns:
        one_reviewer_one_committee(path, columns)
        unique_rows(path, columns, ("paper", "reviewer"))
    elif "score" not in columns:
        unique_rows(path, columns, ("paper", "committee"))
    cell, names, pairs = committee_cells(columns, path)
    if rank:
        return
    result, draw = {}, None
    if "score" in columns:
        y = float_column(columns, "score", path, *args.scale)
        means = np.bincount(cell, y) / np.bincount(cell)
        if np.ptp(means) == 0:
            fail(f"{path}, column 'score': all mean scores are {means[0]:g}; nothing to rank by")
        result["scores"] = report_scores("scores", *means[pairs.T], args)
        print()
    if "decision" in columns:
        levels = decision_levels(columns, path)
        level = np.full(len(names), -1)
        for row, i, value in zip(columns["row"], cell, levels):
            if level[i] not in (-1, value):
                fail(f"{path}, row {row}, column 'decision': committee {names[i][1]!r} has two decisions on {names[i][0]!r}")
            level[i] = value
        used = np.unique(level)
        labels, square = [LEVELS[i] for i in used], np.zeros((len(used),) * 2, int)
        np.add.at(square, tuple(np.searchsorted(used, level[pairs.T])), 1)
        if len(used) == 1:
            fail(f"{path}, column 'decision': every decision is '{labels[0]}'; agreement needs two")
        result["levels"], cuts = report_ordered(labels, square, args)
        result["experiments"] = report_counts(cuts, args)
        head = headline_cut(result["levels"]["labels"], cuts)
        report_baselines(head, result["experiments"][head])
        result["selectivity"] = report_selectivity(head, result["experiments"][head], args)
        draw = draw_selectivity({head: result["experiments"][head]}, result.get("scores"))
    write_review(args, result, draw or draw_empirical({"scores": result["scores"]}), "duplicates")


ESA = "https://raw.githubusercontent.com/ad-freiburg/esa2018-experiment/d0961f79e73a0e57c4fc6018b645d88957a6cd07/scores-phase{}-pc{}.tsv"
ESA_SHA256 = {(1, 1): "3b224a487e91", (1, 2): "8e5961823a9b", (2, 1): "bfa15f30dcdb", (2, 2): "eb1305dec4f2", (3, 1): "8f11878e0ed9",
              (3, 2): "df3e0576a1bd"}
ICLR = {
    2021: ("https://raw.githubusercontent.com/evanzd/ICLR2021-OpenReviewData/4aed86cd1729694a41ff57119af458b9187cce49/ratings.tsv",
           "ddb934f307e5", "*iclr2021*.tsv"),
    2022: ("https://raw.githubusercontent.com/fedebotu/ICLR2022-OpenReviewData/c8d8697921cb00bcdb87edc0ebaaec15906cac8d/ratings.tsv",
           "f5b9332fe66f", "*iclr2022*.tsv"),
    2023: ("https://raw.githubusercontent.com/fedebotu/ICLR2023-OpenReviewData/4fdff168e15e687da5725c366e016ccea0952211/data/"
           "iclr2023_20230210.csv", "b77a2441b19c", "*iclr2023*.csv"),
}


def local_or_download(args, pattern, url, sha256):
    """The one file in the folder --data that matches, or a download."""
    if not args.data:
        return download(url, sha256)
    found = sorted(Path(args.data).glob(pattern))
    if len(found) != 1:
        fail(f"--data {args.data}: {len(found) or 'no'} files like {pattern} there; wanted is the one of {url}")
    return found[0]


def esa_scores(path):
    """One committee in one phase → list over papers of [(score, confidence), …]. Blanks are "__" and "_"; votes are left out."""
    papers = []
    for row, line in enumerate(Path(path).read_text("utf-8").splitlines(), 1):
        cells = line.split("\t")
        pairs = [(i, *cells[i : i + 2]) for i in range(0, min(len(cells) - 1, 8), 2) if cells[i].strip("_ ")]
        if not pairs:
            fail(f"{path}, row {row}: no score; each row needs score and confidence, up to four times")
        papers.append([(to_float(s, path, row, f"{i + 1}", -2, 2), to_float(c, path, row, f"{i + 2}", 1, 5)) for i, s, c in pairs])
    return papers


def esa_level(reviews):
    """ESA's rule, 0 (best) to 4: all +2; some +2; some +1; no −2; else. A ±2 of confidence below 3 counts as ±1."""
    s = [math.copysign(1, x) if abs(x) == 2 and confidence < 3 else x for x, confidence in reviews]
    return 0 if min(s) == 2 else 1 if max(s) == 2 else 2 if max(s) == 1 else 3 if min(s) > -2 else 4


def esa(args):
    """ESA 2018, track B: 51 papers, two whole programme committees, three phases (alone; discussed; voted on)."""
    *_, rank, _ = set_up(args)
    if rank:
        return
    labels, result, tables, curves = ["+2", "+1", "0", "-1", "-2"], {}, {}, {}
    for phase in (1, 2, 3):
        both = [esa_scores(local_or_download(args, f"*scores-phase{phase}-pc{i}.tsv", ESA.format(phase, i), ESA_SHA256[phase, i]))
                for i in (1, 2)]
        if len(both[0]) != len(both[1]):
            fail(f"phase {phase}: {len(both[0])} papers in one file, {len(both[1])} in the other; the rows must pair")
        square = np.zeros((5, 5), int)
        np.add.at(square, tuple(np.array([[esa_level(r) for r in papers] for papers in both])), 1)
        print(f"phase {phase}")
        extra, cuts = report_ordered(labels, square, args)
        tables[f"phase {phase}"] = cuts["+1 or better"]  # accept: some +2 of confidence 3 or more
        curves[f"phase {phase}"] = report_scores(
            f"phase {phase}", *(np.array([np.mean([s for s, _ in r]) for r in papers]) for papers in both), args)
        result[f"phase {phase}"] = dict(extra, scores=curves[f"phase {phase}"])
        print()
    figures = report_counts(tables, args)
    print("Accept: +1 or better by the organisers' rule (a +2 of confidence 3 or more). Committees agree more on who is in after they have "
          "talked,\nalthough they never spoke with each other; their mean scores do not.")
    write_review(args, dict(result, experiments=figures), draw_empirical(curves), "esa")


def iclr_ratings(path):
    """ratings.tsv (paper_id, 0, 1, …, decision) or the CSV with a list in column ratings → (paper, score, decisions, withdrawn)."""
    columns = list(csv.reader(Path(path).read_text("utf-8").splitlines(), delimiter="\t" if str(path).endswith(".tsv") else ","))
    header, papers, scores, decisions, gone = columns[0], [], [], [], []
    for row, record in enumerate(columns[1:], 2):
        if len(record) != len(header):
            fail(f"{path}, row {row}: {len(record)} cells, but the header has {len(header)}")
        named = dict(zip(header, record))
        ratings = re.findall(r"[^\s,\[\]]+", named["ratings"]) if "ratings" in named else [r for r in record[1:-1] if r]
        if ratings:
            papers += [len(decisions)] * len(ratings)
            scores += [to_float(r, path, row, "ratings", 0, 10) for r in ratings]
            decisions.append(named["decision"].startswith("Accept"))
            gone.append(named.get("withdraw") == "1" or named["decision"] in ("", "Unknown"))
    return np.array(papers), np.array(scores), np.array(decisions), np.array(gone)


def split_halves(paper, y, splits, rng):
    """Each paper's reviews dealt at random into two committees, `splits` times → mean scores (2, splits, papers). k ≥ 2 reviews each."""
    n, k = paper.max() + 1, np.bincount(paper)
    start, halves = np.cumsum(k) - k, np.empty((2, splits, n))
    for i in range(splits):
        order = np.lexsort((rng.random(len(y)), paper))
        place = np.arange(len(y)) - start[paper[order]]
        small = (k + rng.integers(2, size=n)) // 2  # the odd review goes to either side
        first = place < small[paper[order]]
        for j, side in enumerate((first, ~first)):
            halves[j, i] = np.bincount(paper[order][side], y[order][side], n) / np.bincount(paper[order][side], minlength=n)
    return halves


def iclr(args):
    """ICLR's public scores have no reviewers' names and one committee: predict arbitrariness from the reviews' own spread."""
    *_, rank, _ = set_up(args)
    url, sha256, pattern = ICLR[args.year]
    paper, y, accepted, gone = iclr_ratings(local_or_download(args, pattern, url, sha256))
    if rank:
        return
    if args.withdrawn == "drop":
        kept = ~gone[paper]
        paper, y, accepted = numbered(paper[kept].tolist())[0], y[kept], accepted[~gone]
    rng, k = np.random.default_rng(args.seed), np.bincount(paper)
    between, within, icc = one_way(paper, y)
    rate = float(accepted.mean()) if args.accept is None else float(args.accept[0])
    reviews = 1 / np.mean(1 / k)
    rho = between / (between + within / reviews)
    print_table((f"ICLR {args.year}, withdrawn papers {'left out' if args.withdrawn == 'drop' else 'as rejects'}", ""), [
        ("papers with a review, of them withdrawn or undecided", f"{len(k)}, {0 if args.withdrawn == 'drop' else int(gone.sum())}"),
        ("reviews, and a paper (harmonic mean)", f"{len(y)}, {shown(reviews, 3)}"), ("between-paper variance (ANOVA)", shown(between)),
        ("within", shown(within)), ("ICC(1): correlation of two single reviews", shown(icc)),
        ("acceptance rate", shown(rate)), ("implied correlation of two such committees' means", shown(rho)),
        ("implied arbitrariness of a rerun at that rate, normal", shown(float(arbitrariness(rate, rho))))])
    several = (k > 1)[paper]
    halves = split_halves(numbered(paper[several].tolist())[0], y[several], 20, rng)
    half = between / (between + within * float(np.mean(1 / np.concatenate([k[k > 1] // 2, (k[k > 1] + 1) // 2]))))
    print()
    args.accept = np.unique([0.05, 0.1, 0.2, round(rate, 4), 0.3, 0.5])
    found = report_scores(f"split halves, {halves.shape[2]} papers", *halves, args, half)
    print("Half a committee is not a committee: the curve of whole ones is the normal one with the ρ above. Neither holds what a committee "
          "adds\nafter averaging, nor what reviewers of one paper share through discussion.")
    curves = {f"random halves of the reviews (ρ {shown(half, 3)})": found}
    write_review(args, dict(year=args.year, between=between, within=within, icc=icc, rate=rate, rho=rho, reviews=reviews, papers=len(k),
                            n_reviews=len(y), arbitrariness=float(arbitrariness(rate, rho)), split_half=found),
                 draw_empirical(curves, {f"whole committees, ρ {shown(rho, 3)}": rho}), f"iclr{args.year}")


# ---------------------------------------------------------------------------------------------- reviewers


def parts_of(paper, reviewer):
    """Number of connected parts of the graph of papers and reviewers. int64 tensors."""
    label = torch.arange(int(paper.max()) + 1, device=paper.device)
    while True:
        low = torch.full((int(reviewer.max()) + 1,), len(label), device=paper.device).scatter_reduce(0, reviewer, label[paper], "amin")
        new = label.scatter_reduce(0, paper, low[reviewer], "amin")
        new = new[new]
        if torch.equal(new, label):
            return len(label.unique())
        label = new


def scores(args):
    """Reviewer calibration by the exact mixed model, and what it implies for who gets in."""
    device, _, rank, _ = set_up(args)
    path = one_file(args, "paper, score, perhaps reviewer, committee, decision")
    columns = review_columns(path, ("paper", "score"), ("reviewer", "committee", "decision"))
    y = float_column(columns, "score", path, *args.scale)
    paper, papers = numbered(columns["paper"])
    reviewer, reviewers = numbered(columns["reviewer"]) if "reviewer" in columns else (None, [])
    k = np.bincount(paper)
    if np.ptp(y) == 0:
        fail(f"{path}, column 'score': all scores are {y[0]:g}; there is nothing to fit")
    if k.max() < 2:
        fail(f"{path}, column 'paper': no paper has two reviews, so quality and opinion cannot be told apart")
    if len(papers) < 3:
        fail(f"{path}, column 'paper': {len(papers)} papers; three are the least")
    if reviewers:
        if "committee" in columns:
            one_reviewer_one_committee(path, columns)
        unique_rows(path, columns, ("paper", "reviewer"))
        if np.bincount(reviewer).max() < 2:
            fail(f"{path}, column 'reviewer': no reviewer has two reviews, so offset and opinion cannot be told apart; leave out the "
                 "column 'reviewer' for a one-way fit")
    rate = 0.23 if args.accept is None else float(args.accept[0])
    if "decision" in columns and args.accept is None:
        rate = float(np.mean(decision_levels(columns, path) < LEVELS.index("reject")))
    accepted = math.floor(rate * len(papers) + 1e-9)
    if not 0 < accepted < len(papers):
        fail(f"an acceptance rate of {rate:g} takes {accepted} of {len(papers)} papers; give another --accept")
    cell, names, pairs = committee_cells(columns, path) if "committee" in columns else (None, None, None)
    if rank:
        return
    device = torch.device("cpu") if device.type == "mps" else device  # float64 is needed
    tensors = [None if x is None else torch.as_tensor(x, device=device) for x in (paper, reviewer, y)]
    start = time.perf_counter()
    with tqdm(desc="likelihood evaluations", disable=args.quiet) as bar:
        fit = calibrate(*tensors, args.mean, lambda *_: bar.update())
    seconds = time.perf_counter() - start
    quality, offset, opinion = fit["variances"]
    reviews = args.reviewers or max(1, round(len(y) / len(papers)))
    between, within, icc = one_way(paper, y)
    rows = [("paper quality α_f", quality, fit["se"][0], "1.278"), ("reviewer offset α_b", offset, fit["se"][1], "0.240"),
            ("opinion σ²", opinion, fit["se"][2], "1.268")]
    print_table((f"{len(y)} reviews, {len(papers)} papers, {len(reviewers) or 'unnamed'} reviewers", "variance", "± se", "2014 (authors)"),
                [(name, shown(a), "–" if a == 0 or not math.isfinite(s) else shown(s), ref) for name, a, s, ref in rows if reviewers or a])
    print(f"mean μ {shown(fit['mu'])}, negative log-likelihood {shown(fit['nll'])}, {shown(seconds, 2)} s; objective share α_f/(α_f + σ²) "
          f"{shown(quality / (quality + opinion))}; one-way ICC(1) {shown(icc)}")
    if reviewers and offset == 0:
        print("note: the best offset variance is zero; every reviewer is as strict as the others")
    if reviewers and (parts := parts_of(*tensors[:2])) > 1:
        print(f"note: the graph of papers and reviewers falls into {parts} parts; offsets of different parts meet only in the prior")
    if quality == 0:
        fail(f"{path}: the best quality variance is zero, reviews of one paper agree no more than others; no ranking follows")
    print()
    print_table((f"a committee of R, at rate {shown(rate, 3)}", "ρ, raw", "ρ, calibrated", "arbitrariness, raw", "calibrated"), [
        (f"R = {r}{' (here)' if r == reviews else ''}", *(shown(c) for c in corr), *(shown(float(arbitrariness(rate, c))) for c in corr))
        for r in sorted({1, 2, 3, 4, 5, 6, reviews})
        for corr in [[implied_correlation(quality, offset, opinion, r, calibrated) for calibrated in (False, True)]]])
    generator = torch.Generator(device).manual_seed(args.seed)
    held, rerun = (x.cpu().numpy() for x in acceptance_draws(fit, accepted, reviews, 1000, generator))
    calibrated = np.bincount(paper, fit["calibrated"].cpu().numpy()) / k
    best = np.argsort(-calibrated, kind="stable")[:accepted]
    grey = [int(((x > 0.1) & (x < 0.9)).sum()) for x in (held, rerun)]
    print(f"\nP(accept), {accepted} of {len(papers)} papers: grey zone (0.1 to 0.9) of {grey[0]} papers when only offsets are uncertain, "
          f"{grey[1]} with a new committee\nof {reviews} reviews. Of today's best {accepted}, a new committee is expected to take "
          f"{shown(rerun[best].mean(), 3)}.")
    result = dict(variances=fit["variances"], se=fit["se"], mu=fit["mu"], nll=fit["nll"], seconds=seconds, icc=icc, between=between,
                  within=within, reviews=reviews, rate=rate, grey_zone=grey, rerun_share=float(rerun[best].mean()))
    if cell is not None:
        observed = {}
        for kind, value in (("raw", y), ("calibrated", fit["calibrated"].cpu().numpy())):
            means = np.bincount(cell, value) / np.bincount(cell)
            observed[kind] = pearson(*means[pairs.T])
            r, se, low, high, n = observed[kind]
            a_committee = 1 / np.mean(1 / np.bincount(cell))
            predicted = implied_correlation(quality, offset, opinion, a_committee, kind == "calibrated")
            print(f"mean {kind} scores of {n} pairs of committees: ρ {shown(r)} ± {shown(se)} ({span((low, high), 3)}), the model implies "
                  f"{shown(predicted)}; committee noise to match {shown(quality / r - quality / predicted if r > 0 else math.nan)}")
        result["committees"] = observed
    out = out_folder(args)
    out.mkdir(parents=True, exist_ok=True)
    means, effect, sd = np.bincount(paper, y) / k, fit["effect"].cpu().numpy(), fit["effect_sd"].cpu().numpy()
    with open(out / "papers.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow("paper reviews mean calibrated_mean effect effect_sd p_accept p_accept_rerun".split())
        for i in np.argsort(-calibrated, kind="stable"):
            writer.writerow([papers[i], k[i], *(f"{x[i]:.4f}" for x in (means, calibrated, effect, sd, held, rerun))])
    if reviewers:
        with open(out / "reviewers.csv", "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow("reviewer reviews offset offset_sd".split())
            for i, (b, s) in enumerate(zip(fit["offset"].tolist(), fit["offset_sd"].tolist())):
                writer.writerow([reviewers[i], int((reviewer == i).sum()), f"{b:.4f}", f"{s:.4f}"])
    print(f"every paper: {out / 'papers.csv'}" + (f"; every reviewer: {out / 'reviewers.csv'}" if reviewers else ""))
    write_review(args, result, draw_scores(calibrated, held, rerun, accepted), "scores")


# ---------------------------------------------------------------------------------------------- conferences that were not held


def simulate(args):
    """Conferences with known noise: accept precision against rate and panel size, beside the closed form. torchrun shards replicates."""
    device, dtype, rank, world = set_up(args)
    rates = args.accept if args.accept is not None else np.arange(1, 11) / 20
    papers, sizes = args.papers, args.reviewers or 6
    if args.variances:
        quality, offset, opinion = args.variances
    else:
        quality, offset, opinion = 2.55 * (1 - args.subjectivity), 0.0, 2.55 * args.subjectivity
    offset_kept = 0.0 if args.calibrated else offset
    if quality + offset_kept + opinion + args.noise == 0:
        fail("--variances, --noise: all are zero; every paper would have the same score")
    lists = torch.tensor([math.floor(p * papers + 1e-9) for p in rates])
    if lists.min() < 1:
        fail(f"--accept {rates[int(lists.argmin())]:g} of --papers {papers} is no paper at all: more papers or a higher rate")
    start = time.perf_counter()
    counts = torch.zeros(2, sizes, len(rates), dtype=torch.int64, device=device)  # Σ overlap, Σ overlap²
    for replicate in tqdm(range(rank, args.replicates, world), "conferences", disable=args.quiet or rank > 0):
        generator = torch.Generator(device).manual_seed(counter_seed(args.seed, replicate))
        means = simulate_conference(papers, sizes, (quality, offset_kept, opinion), args.noise, args.committees, args.likert, generator,
                                    device, dtype)
        for i in range(args.committees):
            for j in range(i + 1, args.committees):
                both = overlaps(means[i], means[j], generator)[:, (lists - 1).to(device)]
                counts += torch.stack([both, both**2])
    if world > 1:
        dist.all_reduce(counts)
    if rank:
        return
    seconds, n = time.perf_counter() - start, args.replicates * args.committees * (args.committees - 1) // 2
    total, squares = counts.double().cpu().numpy()
    precision = total / n / lists.numpy()
    sd = np.sqrt(np.maximum(squares / n - (total / n) ** 2, 0)) * math.sqrt(n / max(n - 1, 1)) / lists.numpy()
    corr = [implied_correlation(quality, offset_kept, opinion, r, False, args.noise) for r in range(1, sizes + 1)]
    analytic = 1 - np.array([arbitrariness(lists.numpy() / papers, min(c, 0.999999)) for c in corr])
    print_table(("accept precision (closed form) at rate", *(f"R = {r}" for r in range(1, sizes + 1))), [
        (f"{p:g}: {lists[i]} of {papers}", *(f"{shown(precision[r, i])} ({shown(analytic[r, i])})" for r in range(sizes)))
        for i, p in enumerate(rates)])
    print(f"{args.replicates} conference{'s' * (args.replicates > 1)}, {seconds:.2f} s; arbitrariness is 1 − accept precision, "
          "inconsistency 2·rate·(1 − accept precision)." + ("" if n < 2 else f" sd of one conference: up to {shown(sd.max())}.")
          + (" The closed form has no Likert scale." if args.likert else ""))
    write_review(args, dict(rates=rates, papers=papers, accept_precision=precision, sd=sd if n > 1 else None, closed_form=analytic,
                            correlation=corr, overlaps=counts[0], pairs=n, seconds=seconds),
                 draw_simulation(rates, precision, sd if n > 1 else None, analytic, bool(args.likert)), "simulate")


def citations(args):
    """Did the scores see it coming? Pearson's r of score and log10(1 + citations), for accepted and rejected papers apart."""
    *_, rank, _ = set_up(args)
    path = one_file(args, "score, citations, accepted (1 or 0)")
    columns = review_columns(path, ("score", "citations"), ("accepted",))
    score, cited = float_column(columns, "score", path, *args.scale), np.log10(1 + float_column(columns, "citations", path, 0))
    accepted = np.zeros(len(score), bool)
    for i, text in enumerate(columns.get("accepted", ())):
        level = level_of(text)
        if level is None:
            fail(f"{path}, row {columns['row'][i]}, column 'accepted': '{text}' is neither 1 nor 0, accept nor reject")
        accepted[i] = level < LEVELS.index("reject")
    if rank:
        return
    groups = {"all": np.ones(len(score), bool)}
    if "accepted" in columns:
        groups |= {"accepted": accepted, "rejected": ~accepted}
    found = {name: pearson(score[g], cited[g]) for name, g in groups.items()}
    print_table(("score and log10(1 + citations)", "papers", "r", "± se", "95 % (Fisher z)"), [
        (name, n, shown(r), shown(se), span((low, high))) for name, (r, se, low, high, n) in found.items()])
    print("For comparison, 2014 after seven years (2109.09774): accepted 0.051 ± 0.049 (414 papers), rejected 0.22 ± 0.038 (680).\n"
          "Within the accepted the range of scores is cut off, which lowers r by itself.")
    write_review(args, dict(correlations={name: dict(zip(("r", "se", "low", "high", "n"), x)) for name, x in found.items()}),
                 draw_citations(score, cited, accepted if "accepted" in columns else None), "citations")


# ============================================================================================== figures


def figure(out, name, args, draw, **size):
    """draw(axes) on a matplotlib figure saved as out/name → its path, or "no figure" with --no_plot."""
    if args.no_plot:
        return "no figure (--no_plot)"
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    fig, axes = plt.subplots(constrained_layout=True, **size)
    draw(axes)
    fig.savefig(out / name, dpi=120)
    plt.close(fig)
    return out / name


def sized(**size):
    """Marks a drawing function with its figure's size."""

    def mark(draw):
        draw.size = size
        return draw

    return mark


STYLES = dict(zip(FAMILIES, ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)))))


def draw_selectivity(experiments, scored=None):
    """Left: what each family says of other rates. Right: three summaries of the normal one. experiments: the first gives the curves."""
    rates = np.sin(np.linspace(0.14, 1.43, 31)) ** 2  # 0.02 to 0.98, closer at the ends
    name, first = next(iter(experiments.items()))
    found = selectivity(first, rates)

    @sized(ncols=2, figsize=(12, 4.8))
    def draw(axes):
        left, right = axes
        for family, curve in found["curves"].items():
            left.plot(rates, curve["arbitrariness"], linestyle=STYLES[family], lw=2.2 if family == "normal" else 1.2,
                      label=f"{family} ({'κ' if family == 'beta-binomial' else 'ρ'} = {curve['strength']:.2f})")
        if found["band"] is not None:
            left.fill_between(rates, *found["band"], color="C0", alpha=0.18, label="normal: 95 % paper bootstrap")
        left.plot(rates, 1 - rates, color="grey", lw=1, label="lots")
        if scored:
            left.plot(scored["rates"], scored["arbitrariness"], color="black", lw=1, label="best by score, empirical")
            left.fill_between(scored["rates"], *scored["band"], color="black", alpha=0.12)
        for (label, f), marker in zip(experiments.items(), "os^"):
            p, a = f["metrics"]["acceptance rate"], f["metrics"]["arbitrariness"]
            if math.isfinite(a):
                ends = np.abs(np.array(f["intervals"]["arbitrariness: paper bootstrap *"]) - a)[:, None]
                left.errorbar([p], [a], ends, fmt=marker, color="black", capsize=3, zorder=5, label=f"{label}, observed")
        left.set(xlabel="acceptance rate", ylabel="arbitrariness: accepted papers that a rerun rejects", ylim=(0, 1), xlim=(0, 1),
                 title=f"{name}: one observed point, and what each model makes of it")
        left.legend(fontsize=8)
        if "normal" in found["curves"]:
            a = found["curves"]["normal"]["arbitrariness"]
            for y, label in ((a, "arbitrariness"), (a / (1 - rates), "relative to lots"), (2 * rates * a, "inconsistency")):
                right.plot(rates, y, label=label)
            right.legend(fontsize=8)
        right.set(xlabel="acceptance rate", ylabel="share", ylim=(0, 1), xlim=(0, 1),
                  title="normal scores: three summaries, three rankings of policies")

    return draw


def draw_empirical(curves, models=()):
    """Empirical selectivity curves with their bands, the normal curve of the same correlation, and further normal curves {label: ρ}."""

    @sized(figsize=(7, 4.8))
    def draw(ax):
        rates = np.sin(np.linspace(0.14, 1.43, 61)) ** 2
        for i, (name, curve) in enumerate(curves.items()):
            seen = curve["rates"] >= 0.02
            ax.plot(curve["rates"][seen], curve["arbitrariness"][seen], color=f"C{i}", label=f"{name}: best by score")
            if i == 0:  # one band is enough to see how wide they are
                ax.fill_between(curve["rates"][seen], *curve["band"][:, seen], color=f"C{i}", alpha=0.15)
            if 0 <= curve["rho"] < 1:
                ax.plot(rates, arbitrariness(rates, curve["rho"]), "--", color=f"C{i}", lw=1, label=f"normal model, ρ = {curve['rho']:.2f}")
        for label, rho in dict(models).items():
            ax.plot(rates, arbitrariness(rates, rho), color="black", lw=1.5, label=label)
        ax.plot(rates, 1 - rates, color="grey", lw=1, label="lots")
        ax.set(xlabel="acceptance rate", ylabel="arbitrariness", ylim=(0, 1), xlim=(0, 1),
               title="accepted papers that the other committee rejects (band: 95 %, the first)")
        ax.legend(fontsize=8)

    return draw


def draw_scores(calibrated, held, rerun, accepted):
    @sized(figsize=(7, 4.5))
    def draw(ax):
        order = np.argsort(-calibrated)
        ax.plot(np.arange(1, len(order) + 1), rerun[order], ".", ms=3, color="C1", label="a new committee")
        ax.plot(np.arange(1, len(order) + 1), held[order], ".", ms=3, color="C0", label="the same reviews, offsets uncertain")
        ax.axvline(accepted + 0.5, color="black", lw=1, label=f"the best {accepted}")
        ax.axhspan(0.1, 0.9, color="grey", alpha=0.12, label="grey zone")
        ax.set(xlabel="papers, best mean calibrated score first", ylabel="P(accept)", title="how sure is each paper's place?")
        ax.legend(fontsize=8)

    return draw


def draw_simulation(rates, precision, sd, analytic, likert):
    @sized(figsize=(7, 4.8))
    def draw(ax):
        for r in range(len(precision)):
            ax.plot(rates, analytic[r], color=f"C{r}", lw=1)
            ax.errorbar(rates, precision[r], None if sd is None else 1.96 * sd[r], fmt="o", ms=3, capsize=2, color=f"C{r}",
                        label=f"R = {r + 1}")
        ax.plot(rates, rates, color="grey", lw=1, label="lots")
        ax.set(xlabel="acceptance rate", ylabel="accept precision", ylim=(0, 1),
               title="simulated (95 % of conferences) and closed form" + (", which has no Likert scale" if likert else ""))
        ax.legend(fontsize=8)

    return draw


def draw_citations(score, cited, accepted):
    @sized(figsize=(6.5, 4.5))
    def draw(ax):
        groups = (("", np.ones(len(score), bool)),) if accepted is None else (("accepted", accepted), ("rejected", ~accepted))
        for label, g in groups:
            ax.plot(score[g], cited[g], ".", ms=4, alpha=0.6, label=label)
        ax.set(xlabel="score", ylabel="log10(1 + citations)", title="score and later citations")
        if accepted is not None:
            ax.legend()

    return draw


# ============================================================================================== command line

TASKS = {"neurips": neurips, "table": table, "scores": scores, "duplicates": duplicates, "simulate": simulate, "esa": esa, "iclr": iclr,
         "citations": citations}


def rates_type(text):
    """Acceptance rates: 0.2, or 0.1,0.2, or from:to:step."""
    if ":" in text:
        low, high, step = (float(x) for x in text.split(":"))
        if not (step > 0 and low <= high and (high - low) / step < 10_000):
            raise argparse.ArgumentTypeError(f"{text} is not from:to:step")
        rates = low + step * np.arange(math.floor((high - low) / step + 1e-9) + 1)
    else:
        rates = np.array([float(x) for x in text.split(",")])
    if not np.all((rates > 0) & (rates < 1)):
        raise argparse.ArgumentTypeError(f"{text}: an acceptance rate lies between 0 and 1, both excluded")
    return rates


def whole(text):
    """1e5 is a whole number too."""
    if float(text) != int(float(text)):
        raise ValueError
    return int(float(text))


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.error = fail  # one line, exit code 2
    rates_type.__name__ = "rate"
    flag, count, share = parser.add_argument, number(whole, 1), number(float, 0, 1)
    flag("task", nargs="?", choices=TASKS, default="neurips", help="neurips (the default): the experiments of 2014 and 2021; table: your "
         "counts; scores: calibrate reviewers; duplicates: two committees' decisions or scores; simulate: conferences with known noise; "
         "esa, iclr: public data (download, or --data); citations: scores against citations")
    flag("input", nargs="*", help="table: both accept, first alone, second alone, neither (or both, one alone, neither), or a square CSV, "
         "best level first; scores: CSV with paper, score[, reviewer, committee, decision]; duplicates: paper, committee, decision and/or "
         "score[, reviewer]; citations: score, citations[, accepted]")
    flag("--accept", type=rates_type, help="acceptance rates: 0.18, or 0.1,0.2, or 0.05:0.5:0.05 (simulate: 0.05 to 0.5 by 0.05; scores, "
         "iclr: the first, else that of the decisions, else 0.23)")
    flag("--against", nargs="+", help="table: the counts of another experiment, to test the difference")
    flag("--withdrawn", choices=("reject", "drop"), default="reject", help="withdrawn papers count as rejects, or are left out")
    flag("--mean", choices=("plain", "gls", "reml"), default="plain", help="scores: μ is the mean score (the reference's), the maximum "
         "likelihood one, or that with the restricted likelihood")
    flag("--scale", type=float, nargs=2, default=(-math.inf, math.inf), metavar=("LOW", "HIGH"), help="the scale that scores must keep to")
    flag("--reviewers", type=count, help="simulate: panels of 1 to this many (6); scores: reviews of a new committee (the mean number)")
    flag("--papers", type=count, default=100_000, help="simulate: submissions (100,000, the reference's)")
    flag("--replicates", type=count, default=10, help="simulate: conferences")
    flag("--committees", type=number(whole, 2, 20), default=2, help="simulate: committees a conference; all pairs are compared")
    flag("--subjectivity", type=share, default=0.5, help="simulate: share of opinion in the variance of a review (0.5, the reference's)")
    flag("--variances", type=number(float, 0), nargs=3, metavar=("QUALITY", "OFFSET", "OPINION"), help="simulate: instead of "
         "--subjectivity (2014: 1.278 0.24 1.268)")
    flag("--calibrated", action="store_true", help="simulate: take the offsets away, as perfect calibration would")
    flag("--noise", type=number(float, 0), default=0.0, help="simulate: variance that a committee adds after averaging (2014: 0.728)")
    flag("--likert", type=number(whole, 0, 100), default=0, help="simulate: round reviews to whole numbers 1 to this; 0: do not")
    flag("--year", type=int, choices=ICLR, default=2022, help="iclr: which")
    flag("--draws", type=number(whole, 100, 1_000_000), default=4000, help="bootstrap and posterior draws")
    flag("--data", help="esa, iclr: a folder with the files, instead of the download")
    flag("--device", default="auto", help="scores, simulate: auto is cuda, else mps, else cpu")
    flag("--dtype", choices=("float32", "float64"), default="float32", help="simulate: of the scores; all else is float64")
    flag("--seed", type=number(int, 0, 2**31), default=0, help="of bootstrap, simulation and ties")
    flag("--out", help="folder for results and figures (out/review_consistency/<task>)")
    flag("--no_plot", action="store_true", help="write no figure")
    flag("--quiet", action="store_true", help="no progress bars")
    args = parser.parse_args(argv)
    if args.input and args.task in ("neurips", "simulate", "esa", "iclr"):
        fail(f"{args.task} takes no '{args.input[0]}'")
    if args.scale[0] >= args.scale[1]:
        fail(f"--scale {args.scale[0]:g} {args.scale[1]:g}: low must be below high")
    return args


def main():
    args = parse_args()
    if args.task not in ("scores", "simulate"):
        torch.set_num_threads(1)  # small float64 work, in which threads only wait for each other
    try:
        TASKS[args.task](args)
        if dist.is_initialized():
            dist.barrier()  # a rank that leaves while another goes on can abort at its exit
            dist.destroy_process_group()
    except KeyboardInterrupt:
        fail("stopped")
    except BrokenPipeError:  # the reader of our output has left, as head does
        os._exit(1)
    except OSError as error:
        fail(f"{error.filename}: {error.strerror}; give an --out that can be written")


if __name__ == "__main__":
    main()
