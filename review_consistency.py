"""How arbitrary is peer review? The NeurIPS 2021 consistency experiment (Beygelzimer et al., arXiv 2306.03262).

The problem. NeurIPS sent a tenth of its submissions of 2021 to two independent committees, as it had in 2014 (Cortes,
Lawrence; arXiv 2109.09774). The committees disagreed on 23 % of the papers. That sounds little, but most papers are
rejected by everybody: of the papers that one committee accepted, the other rejected half. How sure is that half, what
would another acceptance rate do to it, and does it follow from what reviewers are known to disagree on?

The idea. Count papers: both accept, one accepts, neither. The paper's number is arbitrariness, a share of the
accepted list:

    A = one / (2·both + one)         inconsistency = one / n         by lots: A = 1 − p,  p = (2·both + one) / 2n

One correlation ρ of two latent normal scores, both accepted above one threshold, turns the table into a curve over
rates p:

    A(p) = 1 − P(X₁ > h, X₂ > h) / p,     h = Φ⁻¹(1 − p)        in general A(p) = 1 − E[q²]/E[q], q a paper's own chance

Reviews predict ρ without any experiment: score = μ + quality f + the reviewer's offset b + opinion ε, three variances
by maximum likelihood; means of R reviews correlate by α_f / (α_f + (α_b + σ²)/R), without α_b once the offsets are
known.

How to run it.

    python review_consistency.py                          both experiments: every summary, exact intervals, figure (3 s)
    python review_consistency.py --accept 0.18            my conference takes 18 %: how arbitrary, by these tables?
    python review_consistency.py table 22 22 21 101       your counts, an L×L table, or a file of decisions
    python review_consistency.py scores FILE.csv          paper, score[, reviewer, committee]: calibration
    python review_consistency.py simulate                 conferences of known variances beside the closed form
    python review_consistency.py esa FOLDER               ESA 2018, two whole programme committees

What was measured (`python review_consistency.py`, exact 95 % intervals, no random numbers).

                                        2014 (n = 166)             2021 (n = 882)            published
    inconsistency                       0.259 (0.194 to 0.333)     0.230 (0.203 to 0.259)    25.9 %; 23 %
    arbitrariness                       0.494 (0.364 to 0.632)     0.506 (0.445 to 0.568)    49.5 %; 50.6 %
    latent correlation ρ                0.527 (0.249 to 0.738)     0.557 (0.446 to 0.655)    0.55 (scores, 2014)
    arbitrariness at 5 %, normal        0.740 (0.572 to 0.878)     0.720 (0.647 to 0.788)    "more arbitrary"
      t3 opinions, t3 quality, beta     0.813, 0.567, 0.636        0.789, 0.553, 0.622

"More selective is more arbitrary" holds: all four families exceed 2021's 0.506 at every rate from 3 to 20 %. How much
more, a table does not say: at 3 % they go from 0.520 (t3 quality, whose curve turns at 8 %) to 0.860. Papers
that either accepted are one draw each; of 1,000 simulated tables the interval of A covers 95.6 % (n = 166) and 95.2 %
(882), that of ρ 97.6 and 96.3 %. Accepts taken for independent draws cover 90.4 and 88.4 %.

Calibration (CPU, one thread): 5,891 reviews 0.4 s, 37,200 reviews of 9,000 papers by 9,000 reviewers 3.5 s of CPU
time; 720 reviews 0.27 s where statsmodels' MixedLM takes 1.1 s, 1,440 reviews 1.2 s against 5.3 s, same variances; on
5,891 it had not ended after 400 s. Of 1,000 random designs of 300 to 900 reviews none failed to converge, and the
likelihood was at worst 3e-6 short of the best that L-BFGS-B found (213 had a variance of zero). μ is the mean score,
as in the reference: on those 720 reviews α_b is 0.2424, with a maximum-likelihood mean 0.2428, by restricted
likelihood 0.2449 (standard error 0.068), which is why there is one mean and no REML.

What did not hold. 2014's own review model implies ρ = 0.718 for means of three raw reviews and 0.751 once offsets are
known; its decisions show 0.527. The published comparison sets the single-review 0.502 beside 0.55. Noise that
committees add would explain it, of variance 0.73, but by ρ's interval anything from 0.03 to 3.4; a fourth review is
then worth 1.4 points of arbitrariness (0.2 to 3.8): the data do not say whether committees or reviewers are the
noise. ICLR 2021, 2022, 2023 (`scores`, no reviewers' names): implied arbitrariness at the actual rate 0.382, 0.323,
0.354, a lower bound of the same kind. P(accept) of "new" reviewers takes their offsets for known. 2021's counts are
derived (see NEURIPS), the split by direction is not public; 2014 left its withdrawn papers out.

Try:
    python review_consistency.py --accept 0.03            2021: normal 0.766 (0.694 to 0.831), t3 quality 0.520
    python review_consistency.py simulate --variances 1.278 0.24 1.268      at 20 %: 3 reviews 0.425, 6 reviews 0.322
    in calibrate, clip `step` itself, not in its eigenbasis: of 60 designs one ends elsewhere and says converged
"""

import argparse
import csv
import gzip
import io
import json
import math
import os
import re
import sys
from pathlib import Path

import numpy as np
import torch

# ==================================================================================== the method: counts

# (both accept, first alone, second alone, neither), or (both, one alone, neither) where the split is not public.
NEURIPS = {
    "2021": (99, 203, 580),  # derived: of 882 papers 23 % differ, and of the accepted 50.6 %; no other counts give both
    "2014": (22, 22, 21, 101),  # arXiv 2109.09774: 166 of 170 papers; four were withdrawn or rejected without review
    "2021, no withdrawn": (99, 203, 462),  # inferred, not published: some 118 withdrawn papers count as rejected above
}
FIT_2014 = (1.278, 0.240, 1.268)  # quality, offset, opinion: 2109.09774's fit to about 6,000 reviews, 3 or so a paper


def four_cells(cells):
    """Counts (3,) or (4,) → four floats: both, first alone, second alone, neither. An unknown split counts as even."""
    both, *differ, neither = np.asarray(cells, float)
    return (both, *differ, neither) if len(differ) == 2 else (both, differ[0] / 2, differ[0] / 2, neither)


def consistency(cells):
    """Every summary of two committees' decisions. cells: counts or shares, 3 or 4 of them → {name: float}; 0/0 is nan.

    Names are the field's, not those of arXiv 2109.09774, whose "accept precision" is the chance of being rejected.
    """
    both, first, second, neither = four_cells(cells)
    n, differ = both + first + second + neither, first + second
    with np.errstate(all="ignore"):
        p1, p2, p = (both + first) / n, (both + second) / n, (2 * both + differ) / (2 * n)
        arbitrary, chance = differ / (2 * both + differ), p1 * (1 - p2) + p2 * (1 - p1)
        directions = (first / (both + first) + second / (both + second)) / 2
        return {
            "inconsistency": differ / n,
            "acceptance rate": p,
            "arbitrariness": arbitrary,
            "arbitrariness, mean of directions": directions if len(cells) == 4 else np.nan,  # needs the split
            "accept precision": 1 - arbitrary,
            "reject precision": 2 * neither / (2 * neither + differ),
            "agreed accept rate": both / (both + neither),
            "overlap (Jaccard)": both / (both + differ),
            "inconsistency of lots": chance,
            "arbitrariness of lots": 1 - p,
            "relative arbitrariness": arbitrary / (1 - p),  # share of the way to lots
            "Cohen's kappa": 1 - differ / n / chance,
        }


def bisect(function, target, low, high):
    """x in [low, high] with function(x) = target, function increasing; arrays go elementwise."""
    low, high = np.full_like(target, low, float), np.full_like(target, high, float)
    for _ in range(60):
        middle = (low + high) / 2
        below = function(middle) < target
        low, high = np.where(below, middle, low), np.where(below, high, middle)
    return (low + high) / 2


def clopper_pearson(k, n):
    """Exact interval of a share k/n: P(X ≥ k | low) = P(X ≤ k | high) = 2.5 %, X ~ Binomial(n, p). It covers ≥ 95 %."""

    def at_least(k, p):
        j, p = torch.arange(k, n + 1).double(), torch.as_tensor(p)
        log_choose = math.lgamma(n + 1) - torch.lgamma(j + 1) - torch.lgamma(n - j + 1)
        return (log_choose + torch.special.xlogy(j, p) + torch.special.xlog1py(n - j, -p)).exp().sum().numpy()

    low = float(bisect(lambda p: at_least(k, p), 0.025, 0, 1)) if k else 0.0
    return low, float(bisect(lambda p: at_least(k + 1, p), 0.975, 0, 1)) if k < n else 1.0


def arbitrariness_interval(differ, either):
    """Exact 95 % interval of the arbitrariness; committees differ on `differ` of the `either` papers that any accepted.

    Their number is binomial given `either`. With x = differ/either, A = x / (2 − x), and so are Clopper-Pearson's ends.
    subtle: accepts are not independent draws, for both accepts of a paper are one. Papers are. nan without accepts.
    """
    return tuple(x / (2 - x) for x in clopper_pearson(differ, either)) if either else (math.nan, math.nan)


# ==================================================================================== the method: latent scores

NODES, WEIGHTS = np.polynomial.legendre.leggauss(64)
GRID = np.linspace(-14, 14, 1001)  # sinh(GRID) covers the line with heavy tails; the trapezoid rule is exact to 1e-12
FAMILIES = ("normal", "t3 opinions", "t3 quality", "beta-binomial")


def normal_cdf(x):
    """Φ, float64. subtle: no further than ±26, so that its square is no denormal number, which is slow."""
    return torch.special.ndtr(torch.as_tensor(x, dtype=torch.float64).clamp(-26, 26)).numpy()


def normal_quantile(p):
    return torch.special.ndtri(torch.as_tensor(p, dtype=torch.float64)).numpy()


def both_above(h1, h2, rho):
    """B = P(X₁ > h1, X₂ > h2), standard bivariate normal; arrays broadcast. Error below 1e-10 to |ρ| = 0.9999.

    B = Φ(−h1)·Φ(−h2) + 1/2π ∫₀^{asin ρ} exp(−(h1² + h2² − 2·h1·h2·sin θ) / (2·cos² θ)) dθ        by Gauss-Legendre
    """
    h1, h2, top = np.asarray(h1)[..., None], np.asarray(h2)[..., None], np.arcsin(rho)
    theta = np.multiply.outer(top, (NODES + 1) / 2)  # (…, nodes)
    heights = np.exp((2 * h1 * h2 * np.sin(theta) - h1 * h1 - h2 * h2) / (2 * np.cos(theta) ** 2))
    return normal_cdf(-h1[..., 0]) * normal_cdf(-h2[..., 0]) + top / (4 * np.pi) * (heights * WEIGHTS).sum(-1)


def tetrachoric(cells):
    """The latent correlation ρ of 3 or 4 counts: thresholds from the margins, ρ from the share that both accept.

    → (ρ, low, high), a 95 % interval by arbitrariness_interval at the same margins. nan: a committee takes all or none.
    subtle: a table with a zero cell may have its ρ at ±1, the likeliest; its interval says how little that means.
    """
    both, first, second, neither = four_cells(cells)
    n = both + first + second + neither
    p1, p2 = (both + first) / n, (both + second) / n
    if not 0 < min(p1, p2) <= max(p1, p2) < 1:
        return (math.nan,) * 3
    low, high = arbitrariness_interval(round(first + second), round(n - neither))
    shares = np.array([both / n, (1 - high) * (p1 + p2) / 2, (1 - low) * (p1 + p2) / 2])
    h1, h2 = normal_quantile(1 - p1), normal_quantile(1 - p2)
    return tuple(bisect(lambda rho: both_above(h1, h2, rho), shares, -1 + 1e-9, 1 - 1e-9).tolist())


def polychoric(table):
    """ρ of an L×L table of ordered levels, best first: thresholds from the margins, maximum likelihood in ρ."""
    table = np.asarray(table, float)
    tops = [np.clip(np.cumsum(table.sum(axis))[:-1] / table.sum(), 1e-12, 1 - 1e-12) for axis in (1, 0)]
    h1, h2 = (np.concatenate([[40.0], -normal_quantile(top), [-40.0]]) for top in tops)

    def likelihood(rho):
        above = both_above(h1[:, None], h2, rho)
        return (table * np.log(np.maximum(np.diff(np.diff(above, axis=0), axis=1), 1e-300))).sum()

    return float(bisect(lambda rho: likelihood(rho - 1e-5) - likelihood(rho + 1e-5), 0.0, -0.9999, 0.9999))


def arbitrariness(p, strength, family="normal"):
    """A = 1 − P(both accept)/p at acceptance rates p (array), under a latent model of the given strength.

    Committees are independent given the paper, whose own chance of acceptance is q: A = 1 − E[q²]/E[q], p = E[q].
    X = √ρ·S + √(1−ρ)·e of quality S and opinion e, variances 1, q = P(X > h | S); strength is ρ. beta-binomial:
    q ~ Beta(α, β), α + β = 1/κ − 1 at every rate; strength is κ, the correlation of two decisions.
    """
    p = np.asarray(p, float)
    if family == "normal":
        h = normal_quantile(1 - p)
        return 1 - both_above(h, h, strength) / p
    if family == "beta-binomial":
        return (1 - strength) * (1 - p)  # E[q²] = p² + κ·p·(1 − p)
    s = np.sinh(GRID)
    density = 1 / (1 + s * s) ** 2 if family == "t3 quality" else np.exp(-s * s / 2)  # t3, of variance 1
    weight = density * np.cosh(GRID)
    weight /= weight.sum()

    def chances(h):  # q of each quality s, (…, nodes)
        x = (math.sqrt(strength) * s - h[..., None]) / math.sqrt(1 - strength)
        return 0.5 + (x / (1 + x * x) + np.arctan(x)) / np.pi if family == "t3 opinions" else normal_cdf(x)

    h = bisect(lambda h: -(chances(h) * weight).sum(-1), -p, -60, 60)
    return 1 - (chances(h) ** 2 * weight).sum(-1) / p


def fit_family(family, p, observed):
    """The strength at which `family` has arbitrariness `observed` at rate p; nan where lots explain it (≥ 1 − p)."""
    if not 0 < observed < 1 - p:
        return math.nan
    return float(bisect(lambda strength: -arbitrariness(p, strength, family), -observed, 1e-4, 0.9999))


# ==================================================================================== the method: reviewer calibration

EXACT = 600  # papers or reviewers whose trace is computed unit by unit


def same_unit(unit, x):
    """ZZᵀ·x: each review gets the sum over its paper's (or reviewer's) reviews. x: (reviews, columns)."""
    return torch.zeros(int(unit.max()) + 1, x.shape[1], dtype=x.dtype).index_add_(0, unit, x)[unit]


def covariance_times(index, variances, x):
    """K·x for K = α_f·ZZᵀ + α_b·WWᵀ + σ²·I, where Z and W are never written as matrices."""
    return sum(variance * same_unit(unit, x) for variance, unit in zip(variances, index)) + variances[-1] * x


def solve(index, variances, b, tolerance=1e-5):
    """K⁻¹·b by conjugate gradients, all columns at once: 10 to 40 rounds, for K's eigenvalues are σ² to σ² + a few α.

    subtle: what is left of b is below tolerance·|b|; the error of bᵀ·solve(b), which traces need, is that squared.
    """
    x, r = torch.zeros_like(b), b.clone()
    p, rr = r, (r * r).sum(0)
    stop = tolerance**2 * rr
    while (rr > stop).any():
        kp = covariance_times(index, variances, p)
        step = rr / (p * kp).sum(0).clamp_min(1e-300)
        x, r = x + step * p, r - step * kp
        rr, old = (r * r).sum(0), rr
        p = r + rr / old.clamp_min(1e-300) * p
    return x


def calibrate(index, y, rounds=100, generator=None):
    """Maximum likelihood of y ~ N(μ·1, K): score = μ + f[paper] + b[reviewer] + opinion, μ the mean of all scores.

    index: [paper, reviewer] or [paper], int64 (reviews,), from 0; y: float64 (reviews,). With θ = log(α_f, α_b, σ²),
    v = K⁻¹(y − μ) and Vᵢ the part of K that variance i makes:

        ∂/∂θᵢ = ½·(tr K⁻¹Vᵢ − vᵀVᵢv)         average information  Iᵢⱼ = ½·vᵀVᵢK⁻¹Vⱼv  (Gilmour, Thompson, Cullis 1995)

    Steps I⁻¹·∂ are clipped in the eigenbasis of I: clipped by coordinate, a step can turn uphill. Traces are exact
    up to EXACT units, else by 32 random signs: an error of a few % of a standard error. A variance that falls below
    1e-4 of the largest is zero. → variances, their standard errors (nan at zero), v, converged.
    """
    probes = []  # of each effect, (reviews, columns)
    for unit in index:
        units = int(unit.max()) + 1
        signs = torch.randint(0, 2, (units, 32), generator=generator).to(y) * 2 - 1
        probes.append((torch.eye(units, dtype=y.dtype) if units <= EXACT else signs / math.sqrt(32))[unit])
    variances, centred = y.var().expand(len(index) + 1) / (len(index) + 1), (y - y.mean())[:, None]
    for _ in range(rounds):
        v = solve(index, variances, centred, 1e-10)
        solved = solve(index, variances, torch.cat(probes, 1)).split([z.shape[1] for z in probes], 1)
        traces = [variance * (z * kz).sum() for variance, z, kz in zip(variances, probes, solved)]
        traces = torch.stack([*traces, len(y) - sum(traces)])  # Σᵢ Vᵢ = K
        w = variances * torch.cat([*(same_unit(unit, v) for unit in index), v], 1)  # Vᵢv
        gradient, information = (traces - (w * v).sum(0)) / 2, w.T @ solve(index, variances, w) / 2
        free = (variances > 1e-4 * variances.max()).nonzero()[:, 0]
        values, vectors = torch.linalg.eigh(information[free][:, free])
        step = vectors @ ((vectors.T @ gradient[free]) / values).clamp(-1, 1)
        converged = gradient[free] @ step < 1e-9
        if converged or len(index) not in free:  # without opinions the likelihood has no maximum
            break
        variances = variances.index_copy(0, free, variances[free] * (-step).exp())
    found, se = torch.zeros_like(variances), torch.full_like(variances, math.nan)
    found[free] = variances[free]
    se[free] = variances[free] * (vectors.square() / values).sum(1).sqrt()  # from the diagonal of I⁻¹
    return found, se, v[:, 0], bool(converged) and len(index) in free


def posterior_draws(index, variances, y, draws, generator):
    """Joint draws of quality and offset given the scores → one (units, draws) for each of index.

    Draw all from the prior, scores too, then move by what the real scores say of the difference (Matheron's rule).
    """

    def normal(*shape):
        return torch.randn(*shape, dtype=y.dtype, generator=generator)

    prior = [v.sqrt() * normal(int(unit.max()) + 1, draws) for v, unit in zip(variances, index)]
    fake = sum(u[unit] for u, unit in zip(prior, index)) + variances[-1].sqrt() * normal(len(y), draws)
    gap = solve(index, variances, (y - y.mean())[:, None] - fake)
    return [u + v * torch.zeros_like(u).index_add_(0, unit, gap) for u, v, unit in zip(prior, variances, index)]


def acceptance(index, variances, y, accepted, generator):
    """P(accept): shares of 1,000 posterior draws in which a paper is among the `accepted` best → (2, papers).

    held: the same reviews, mean calibrated score, where only the offsets are uncertain. rerun: as many reviews by new
    reviewers of known offset, whose opinions are new.
    """
    paper, k = index[0], torch.bincount(index[0]).to(y)[:, None]
    chances = torch.zeros(2, len(k))
    for _ in range(10):
        quality, *offsets = posterior_draws(index, variances, y, 100, generator)
        score = y[:, None].expand(-1, 100) - sum(offset[reviewer] for offset, reviewer in zip(offsets, index[1:]))
        held = torch.zeros_like(quality).index_add_(0, paper, score) / k
        opinions = torch.randn(quality.shape, dtype=y.dtype, generator=generator)
        for chance, means in zip(chances, (held, quality + (variances[-1] / k).sqrt() * opinions)):
            chance += torch.bincount(means.topk(accepted, 0).indices.flatten(), minlength=len(k)) / 1000
    return chances.numpy()


def implied_correlation(quality, offset, opinion, reviews, noise=0.0):
    """Between mean scores of two committees of `reviews` reviewers each: α_f / (α_f + (α_b + σ²)/R + τ²).

    offset: α_b for raw scores, 0 where calibration knows the offsets; noise: τ², what a committee adds after averaging.
    """
    return quality / (quality + (offset + opinion) / reviews + noise)


# ==================================================================================== the method: two lists of scores


def shared(first, second, sizes, rng):
    """How many papers are among the best M by both scores, for each M of sizes; ties at random. Scores: (papers,)."""
    worst = np.zeros(len(first), int)
    for scores in (first, second):
        rank = np.empty(len(scores), int)
        rank[np.lexsort((rng.random(len(scores)), -scores))] = np.arange(len(scores))
        worst = np.maximum(worst, rank)
    return np.searchsorted(np.sort(worst), sizes)


def pearson(x, y):
    """Correlation with Fisher's 95 % interval → (r, low, high); nan where there is none."""
    if len(x) < 4 or np.ptp(x) * np.ptp(y) == 0:
        return (math.nan,) * 3
    z, half = np.arctanh(np.corrcoef(x, y)[0, 1].clip(-1, 1)), 1.96 / math.sqrt(len(x) - 3)
    return tuple(np.tanh([z, z - half, z + half]).tolist())

# ==================================================================================== the same in every file


def fail(message):
    """For what a user can mend: one line on stderr, exit code 2."""
    print("error: " + " ".join(str(message).split()), file=sys.stderr)
    raise SystemExit(2)


def run(args):
    """args.task(args), with a folder. What a user can mend ends in one line (exit code 2), Ctrl-C in none (130)."""
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        args.task(args)
        sys.stdout.flush()
        if "RANK" in os.environ:  # subtle: a rank aborted now and then while torch took its threads down
            os._exit(0)
    except BrokenPipeError:  # `| head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    except OSError as error:
        fail(error)
    except KeyboardInterrupt:
        raise SystemExit(130) from None


def save_results(folder, args, **figures):
    """folder/results.json: the command, versions, device and every figure of the table."""
    device = torch.cuda.get_device_name() if torch.cuda.is_initialized() else f"CPU, {torch.get_num_threads()} threads"
    about = dict(command=sys.argv, args=vars(args), python=sys.version, torch=torch.__version__, device=device)
    plain = lambda x: x.tolist() if hasattr(x, "tolist") else getattr(x, "__name__", str(x))
    (folder / "results.json").write_text(json.dumps(about | figures, indent=1, default=plain))
    print(folder / "results.json")


def print_table(header, rows):
    """Rows of strings and numbers as aligned text, the first column left. NaN: what the data do not identify."""
    text = lambda x: str(x) if not isinstance(x, float) else "undefined" if x != x else f"{x:.3f}"
    cells = [[text(x) for x in row] for row in [header, *rows]]
    widths = [max(map(len, column)) for column in zip(*cells)]
    for first, *others in cells:
        print(first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(others, widths[1:])), sep="  ")


def figure(path, args, draw, size=(7, 4.5)):
    """draw(fig) on a matplotlib figure of this size in inches, saved as path."""
    if args.no_plot:
        return
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    fig = plt.figure(figsize=size, layout="constrained")
    draw(fig)
    fig.savefig(path, dpi=120)
    plt.close(fig)
    print(path)

# ==================================================================================== reading people's files

LEVELS = {  # best first; a decision is one of these phrases, in any case, punctuation aside
    "oral": r"(accept(ed)? (as )?)?(oral|talk|notable top 5)",
    "spotlight": r"(accept(ed)? (as )?)?(spotlight|notable top 25)",
    "poster": r"(accept(ed)? (as )?)?poster",
    "accept": r"accept(ed)?|yes|true|1",
    "reject": r"(desk )?reject(ed)?|no|false|0",
    "withdrawn": r"|withdrawn?|unknown",  # a blank one too
}
REJECT, WITHDRAWN = 4, 5
COLUMNS = {  # what the file may call them, in any case; scores and decisions may stand in several columns
    "paper": r"paper|paper_id|id", "reviewer": r"reviewer|reviewer_id", "committee": r"committee",
    "score": r"score|ratings?|(score|rating)?[ _]?\d+", "decision": r"decision[ _]?[12]?",
}


def read_rows(path):
    """A comma, semicolon or tab separated text file, perhaps .gz → [(line, cells)] without its empty rows."""
    with (gzip.open if str(path).endswith(".gz") else open)(path, "rt", encoding="utf-8-sig", newline="") as file:
        try:
            text = file.read()
            delimiter = max(",;\t", key=text.partition("\n")[0].count)
            file = io.StringIO(text, newline="")  # lines end at CR and LF alone
            reader = csv.reader(file, delimiter=delimiter, strict=True)
            rows = [(reader.line_num, [cell.strip() for cell in row]) for row in reader if "".join(row).strip()]
        except UnicodeDecodeError:
            fail(f"{path} is not UTF-8 text: save it as CSV UTF-8")
        except csv.Error as error:
            fail(f"{path}, row {reader.line_num}: {error}: is a quote above not closed?")
    return rows or fail(f"{path} is empty")


def number(text, where):
    """A number, alone or before a colon, as in "6: marginally above the threshold"."""
    match = re.fullmatch(r"([-+]?(?:\d+\.?\d*|\.\d+))\s*(?::.*)?", text, re.DOTALL)
    return float(match[1]) if match else fail(f"{where}: '{text}' is not a number (5.5; what is missing stays blank)")


def mapping(pairs, flag, allowed):
    """["score=rating", …] → {"rating": "score", …}, names checked."""
    found = {}
    for name, equal, text in (pair.partition("=") for pair in pairs):
        if name not in allowed or not equal:
            fail(f"{flag} {name}{equal}{text}: give NAME=TEXT with a name of {', '.join(allowed)}")
        found[text.lower()] = name
    return found


def read_columns(path, rows, args, needed):
    """Rows under a header → [(line, {name: list of cells})]. Prints which column was taken as what."""
    named, taken, header = mapping(args.columns, "--columns", COLUMNS), {}, rows[0][1]
    for i, cell in enumerate(header):
        fitting = (name for name, pattern in COLUMNS.items()
                   if name not in named.values() and re.fullmatch(pattern, cell, re.IGNORECASE))
        taken.setdefault(named.get(cell.lower()) or next(fitting, "not used"), []).append(i)
    shown = (f"{name}: {', '.join(header[i] for i in found)}" for name, found in taken.items())
    print(f"{path}: {len(rows) - 1} rows;", "; ".join(shown))
    taken.pop("not used", None)
    for name in {*needed, *named.values(), *taken}:
        found = taken.get(name, [])
        if not found or len(found) > 1 and not all(header[i][-1:].isdigit() for i in found):
            fail(f"{path}, row 1: {len(found)} columns '{name}' in {', '.join(header)}: give it as --columns {name}=…")
    for line, cells in rows:
        if len(cells) != len(header):
            fail(f"{path}, row {line}: {len(cells)} cells, but the header has {len(header)}")
    return [(line, {name: [cells[i] for i in found] for name, found in taken.items()}) for line, cells in rows[1:]]


def level_of(text, named=()):
    """A decision → index into LEVELS, or None for a phrase that is not known. named: {further phrase: level}."""
    if text.lower() in named:
        return list(LEVELS).index(named[text.lower()])
    phrase = re.sub(r"\W+", " ", text.lower()).strip()
    return next((i for i, pattern in enumerate(LEVELS.values()) if re.fullmatch(pattern, phrase)), None)


def decision_levels(path, texts, args):
    """Decisions → indices into LEVELS. Phrases that are not known are listed and refused."""
    named = mapping(args.decisions, "--decisions", LEVELS)
    levels = [level_of(text, named) for text in texts]
    if strange := [text for text, level in zip(texts, levels) if level is None]:
        fail(f"{path}: unknown decisions {sorted(set(strange))}: say what each is by --decisions 'reject={strange[0]}'")
    print(f"{levels.count(WITHDRAWN)} decisions are withdrawn, unknown or blank: --withdrawn {args.withdrawn}")
    return levels


def read_reviews(path, args):
    """One row a review, or one row a paper with its scores in several columns or in a list "[5, 6, 8]".

    → paper, reviewer (empty without names), committee, score, one entry a review; {(paper, committee): level}.
    """
    records = read_columns(path, read_rows(path), args, ("paper", "score"))
    levels = [None] * len(records)
    if records and "decision" in records[0][1]:
        levels = decision_levels(path, [record["decision"][0] for _, record in records], args)
    reviews, decided, unscored = {}, {}, 0
    for (line, record), level in zip(records, levels):
        paper, committee, texts = record["paper"][0], record.get("committee", [""])[0], record["score"]
        if level == WITHDRAWN and args.withdrawn == "drop":
            continue
        if texts[0].startswith("["):
            texts = re.findall(r"[^\s,\[\]'\"]+", texts[0])
        scores = [number(text, f"{path}, row {line}") for text in texts if text]
        paper = paper or f"row {line}" * (len(scores) > 1)  # a row of several scores is a paper, whatever its name
        if not paper or record.get("reviewer") == [""]:
            fail(f"{path}, row {line}: no name of the paper or of the reviewer; fill it in or leave the row out")
        unscored += not scores
        if scores and level is not None and decided.setdefault((paper, committee), level) != level:
            fail(f"{path}, row {line}: a row above has another decision on {paper!r}")
        for i, score in enumerate(scores):
            key = paper, record["reviewer"][0] if "reviewer" in record else (line, i)
            if key in reviews:
                fail(f"{path}, row {line}: {key[1]!r} reviews {key[0]!r} a second time; leave one out")
            reviews[key] = committee, score
    print(f"{unscored} rows without a score left out; {len(reviews)} reviews read")
    if not reviews:
        fail(f"{path} has no scores")
    (paper, reviewer), (committee, score) = zip(*reviews), zip(*reviews.values())
    return paper, reviewer if "reviewer" in records[0][1] else (), committee, np.array(score), decided


def two_committees(path, rows):
    """(paper, committee, value) rows → [(first's values, second's values)] of the papers that two committees judged."""
    found = {}
    for paper, committee, value in rows:
        found.setdefault(paper, {}).setdefault(committee, []).append(value)
    for paper, committees in found.items():
        if len(committees) > 2 or len(committees) == 2 and "" in committees:
            fail(f"{path}: {paper!r} has the committees {list(committees)}; two are the most, and each needs a name")
    pairs = [[committees[name] for name in sorted(committees)] for committees in found.values() if len(committees) == 2]
    print(f"{len(pairs)} of {len(found)} papers have two committees")
    return pairs


def read_levels(path, args):
    """A file of two committees' decisions → (labels, array (levels, levels)), best level first. One of three forms:

    a square table of counts, with or without labels on both axes; paper, committee, decision with one row a decision;
    paper, decision1, decision2 with one row a paper. Papers that one committee judged are left out.
    """
    rows = read_rows(path)
    if args.columns or any(re.fullmatch(COLUMNS["decision"], cell.lower()) for cell in rows[0][1]):
        records = read_columns(path, rows, args, ("paper", "decision"))
        cells = [(record["paper"][0], *cell) for _, record in records
                 for cell in zip(record.get("committee", "12"), record["decision"])]
        papers, committees, texts = zip(*cells)
        pairs = two_committees(path, zip(papers, committees, decision_levels(path, texts, args)))
        if not pairs or max(len(side) for pair in pairs for side in pair) > 1:
            fail(f"{path}: no paper has two committees, or one committee has two decisions on a paper")
        used, levels = np.unique(pairs, return_inverse=True)
        square = np.zeros((len(used), len(used)))
        np.add.at(square, tuple(levels.reshape(-1, 2).T), 1)
        return [list(LEVELS)[i] for i in used], square
    labels = [f"level {i + 1}" for i in range(len(rows))]
    if re.search("[a-z]", rows[0][1][-1], re.IGNORECASE):
        header, labels = rows[0][1], [cells[0] for _, cells in rows[1:]]
        rows = [(line, cells[1:]) for line, cells in rows[1:]]
        if header[-len(labels) :] != labels:
            fail(f"{path}: the header has labels {header}, the rows {labels}; they must be the same in the same order")
    if any(len(cells) != len(rows) for _, cells in rows):
        fail(f"{path}: {len(rows)} rows with {[len(cells) for _, cells in rows]} counts; a table must be square")
    return labels, np.array([[number(cell, f"{path}, row {line}") for cell in cells] for line, cells in rows])

# ==================================================================================== the experiments


def strengths(cells):
    """{family: strength} of the latent models that agree with the table at its own rate.

    The others are fitted to the normal one's value there: what the table says of two equally strict committees.
    """
    rho, p = tetrachoric(cells)[0], consistency(cells)["acceptance rate"]
    return {"normal": rho} | {family: fit_family(family, p, arbitrariness(p, rho)) for family in FAMILIES[1:]}


def summary(cells, rate):
    """{name: figure or (low, high)} of a table of counts; families say what another acceptance rate would do."""
    n, differ, (rho, *ends) = sum(cells), sum(cells[1:-1]), tetrachoric(cells)
    return {
        "papers": n, **consistency(cells),
        "inconsistency, 95 %": clopper_pearson(differ, n),
        "arbitrariness, 95 %": arbitrariness_interval(differ, n - cells[-1]),
        "latent correlation ρ": rho, "ρ, 95 %": tuple(ends),
        **{f"arbitrariness at {rate:g}, {family}": arbitrariness(rate, strength, family)
           for family, strength in strengths(cells).items()},
        f"arbitrariness at {rate:g}, normal, 95 %": tuple(arbitrariness(rate, x) for x in reversed(ends)),
    }


def report(tables, args, more=()):
    """Named tables of counts: summaries printed and returned. more: rows to print beneath."""
    if not 0 < args.accept < 1:
        fail(f"--accept {args.accept}: an acceptance rate lies between 0 and 1")
    found = {name: summary(cells, args.accept) for name, cells in tables.items()}
    span = lambda x: x if not isinstance(x, tuple) else "undefined" if math.isnan(x[0]) else f"{x[0]:.3f} to {x[1]:.3f}"
    rows = [(key, *(span(f[key]) for f in found.values())) for key in next(iter(found.values()))]
    print_table(("two committees", *found), [*rows, *more])
    return found


def curves(tables, found, args):
    """The figure: the first table's point, and every family through it."""

    def draw(fig):
        ax, rates, (name, cells) = fig.gca(), np.linspace(0.02, 0.98, 97), next(iter(tables.items()))
        for family, x in strengths(cells).items():
            ax.plot(rates, arbitrariness(rates, x, family), label=f"{family}, through {name}")
        band = [arbitrariness(rates, x) for x in found[name]["ρ, 95 %"]]
        ax.fill_between(rates, *band, alpha=0.2, label="normal, 95 %")
        for label, f in found.items():
            a, ends = f["arbitrariness"], np.array(f["arbitrariness, 95 %"])
            ax.errorbar(f["acceptance rate"], a, abs(ends[:, None] - a), fmt="o", label=label)
        ax.plot([0, 1], [1, 0], label="lots")
        ax.set(xlabel="acceptance rate", ylabel="arbitrariness: accepted papers that a rerun rejects")
        ax.legend()

    figure(args.out / "arbitrariness.png", args, draw)


def neurips(args):
    """Both NeurIPS experiments from their counts: every summary, exact intervals, other rates; what reviews predict."""
    found, (quality, offset, opinion), gains = report(NEURIPS, args), FIT_2014, []
    for rho in (found["2014"]["latent correlation ρ"], *found["2014"]["ρ, 95 %"]):
        noise = quality / rho - quality - opinion / 3  # solves implied_correlation(…, noise) = ρ
        three, four = (arbitrariness(0.23, implied_correlation(quality, 0, opinion, r, noise)) for r in (3, 4))
        gains.append((rho, noise, three - four))
    raw, known = (implied_correlation(quality, x, opinion, 3) for x in (offset, 0))
    print(f"\n2014's review model, means of three reviews: ρ {raw:.3f} raw, {known:.3f} with known offsets. To show "
          "the ρ of decisions\n(low end, high end) committees must add noise; at rate 0.23 a fourth review brings:")
    print_table(("ρ of 2014", "noise variance", "gain in arbitrariness"), gains)
    save_results(args.out, args, tables=found, implied=(raw, known), noise=gains)
    curves(NEURIPS, found, args)


def conclude(tables, args, more):
    found = report(tables, args, more)
    save_results(args.out, args, tables=found, cells=tables, more=more)
    curves(tables, found, args)


def cells_at(square, accepted):
    """The 2×2 counts of an L×L table where the best `accepted` levels are accepted."""
    parts = slice(accepted), slice(accepted, None)
    return [int(square[first, second].sum()) for first in parts for second in parts]


def table(args):
    """Your own decisions: counts (3, 4, or L×L of ordered levels, best first), or a file of counts or of decisions."""
    if len(args.input) == 1:
        labels, square = read_levels(args.input[0], args)
    else:
        square = np.array([number(text, f"count {i + 1}") for i, text in enumerate(args.input)])
        size = math.isqrt(len(square))
        if len(square) != 3 and size * size != len(square):
            fail(f"{len(square)} counts: give 3 (both accept, one alone, neither), 4 (both, first alone, second alone, "
                 "neither), or L×L of ordered levels")
        labels, square = [f"level {i + 1}" for i in range(size)], square.reshape(size, -1)  # 3 counts: (1, 3)
    if len(labels) > 1 and level_of(labels[-1]) == WITHDRAWN:
        if args.withdrawn == "reject":  # they join the level above
            square[-2] += square[-1]
            square[:, -2] += square[:, -1]
        labels, square = labels[:-1], square[:-1, :-1]
    if square.size < 3 or square.sum() == 0 or (square < 0).any() or (square % 1).any():
        fail(f"{square.tolist()} is no table: counts are whole numbers from 0, not all 0, of two levels at least")
    tables = {f"{labels[i - 1]} or better": cells_at(square, i) for i in range(len(labels) - 1, 0, -1)}
    tables = tables or {"your table": square[0].astype(int).tolist()}
    more = [("polychoric ρ of all levels", *[polychoric(square)] * len(tables))] if len(labels) > 2 else []
    conclude(tables, args, more)


def write_csv(path, header, lines):
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *lines])
    print(path)


def scores(args):
    """From single reviews: three variances, calibrated scores, P(accept), what they imply for a second committee."""
    papers, reviewers, committees, y, decided = read_reviews(args.file, args)
    (papers, paper, k), (reviewers, reviewer, load) = (np.unique(x, False, True, True) for x in (papers, reviewers))
    if len(k) < 3 or k.max() < 2 or np.ptp(y) == 0 or max(load, default=2) < 2:
        fail(f"{args.file}: fewer than 3 papers, or one score throughout, or no paper with two reviews, or no reviewer "
             "with two: variances cannot be told apart (where each reviewer has one review, leave the reviewers out)")
    of_decisions = np.mean([level < REJECT for level in decided.values()]) if decided else 0.23
    rate = args.accept if args.accept is not None else of_decisions
    accepted = round(rate * len(k))
    if not 0 < accepted < len(k):
        fail(f"an acceptance rate of {rate:g} takes {accepted} of {len(k)} papers; give another --accept")
    pairs = two_committees(args.file, zip(paper.tolist(), committees, range(len(y))))
    index, scored = [torch.as_tensor(x) for x in (paper, reviewer) if len(x)], torch.as_tensor(y)
    generator = torch.Generator().manual_seed(args.seed)
    variances, se, v, converged = calibrate(index, scored, generator=generator)
    quality, *offset, opinion = variances.tolist()
    if not converged or quality == 0:
        fail(f"{args.file}: variances {variances.tolist()}, converged: {converged}; no ranking follows")
    names = ("paper quality α_f", "reviewer offset α_b", "opinion σ²")
    print_table((f"{len(y)} reviews, {len(k)} papers, {len(reviewers) or 'unnamed'} reviewers", "variance", "se"),
                list(zip(names if offset else names[::2], variances.tolist(), se.tolist())))
    effect, *offsets = (variance * torch.bincount(unit, v) for variance, unit in zip(variances, index))
    calibrated = y - offsets[0].numpy()[reviewer] if offsets else y
    sizes, rows = [len(side) for pair in pairs for side in pair] or k, []
    for name, left, x in (("raw means", sum(offset), y), ("calibrated (implied: offsets known)", 0.0, calibrated)):
        rho = implied_correlation(quality, left, opinion, 1 / np.mean(1 / np.array(sizes)))
        means = np.array([[x[side].mean() for side in pair] for pair in pairs]).reshape(-1, 2)
        rows.append((name, rho, arbitrariness(rate, rho), *pearson(*means.T)))
    print_table((f"two committees, rate {rate:.3f}", "implied ρ", "arbitrariness", "observed ρ", "low", "high"), rows)
    held, rerun = acceptance(index, variances, scored, accepted, generator)
    grey = [int(((x > 0.1) & (x < 0.9)).sum()) for x in (held, rerun)]
    print(f"P(accept), best {accepted}: 0.1 to 0.9 for {grey[0]} papers with the same reviews, {grey[1]} with new ones")
    means = [np.bincount(paper, x) / k for x in (calibrated, y)]
    header = "paper reviews calibrated_mean mean effect p_accept p_accept_rerun".split()
    ranked = sorted(zip(papers, k, *means, effect.tolist(), held, rerun), key=lambda row: -row[2])
    write_csv(args.out / "papers.csv", header, ranked)
    if offsets:
        header = "reviewer reviews offset".split()
        write_csv(args.out / "reviewers.csv", header, zip(reviewers, load, offsets[0].tolist()))
    save_results(args.out, args, variances=variances, se=se, rate=rate, committees=rows, grey_zone=grey)


def simulate(args):
    """A conference of known variances: how much two committees' lists differ, by rate and panel; closed form beside."""
    papers, (quality, offset, opinion) = 100_000, args.variances  # the reference's 100,000 submissions
    if min(args.variances) < 0 or quality * (offset + opinion) == 0:
        fail("--variances must not be negative, and papers and reviews must vary")
    rates = np.array([0.05, 0.1, 0.2, 0.3, 0.5])
    rng, total, rows = np.random.default_rng(args.seed), np.zeros((2, papers)), []
    paper, lists = math.sqrt(quality) * rng.standard_normal(papers), (rates * papers).round()
    for panel in range(1, args.reviewers + 1):
        total += math.sqrt(offset + opinion) * rng.standard_normal(total.shape)  # one review more
        seen = 1 - shared(*(paper + total / panel), lists, rng) / lists
        exact = arbitrariness(rates, implied_correlation(quality, offset, opinion, panel))
        rows.append((f"{panel} reviews", *(f"{a:.3f} ({b:.3f})" for a, b in zip(seen, exact))))
    print_table(("arbitrariness (closed form) at rate", *rates.tolist()), rows)
    save_results(args.out, args, rates=rates, arbitrariness=rows)


def esa_committee(path):
    """One committee in one phase → (levels, mean scores) of its papers. Cells are score, confidence, up to four times.

    Levels are the organisers': 0 all +2; 1 some +2; 2 some +1; 3 no −2; 4 else. A ±2 of confidence below 3 is a ±1.
    """
    levels, means = [], []
    for line, cells in read_rows(path):
        pairs = [[number(x, f"{path}, row {line}") for x in cells[i : i + 2]]
                 for i in range(0, min(8, len(cells)), 2) if i == 0 or cells[i].strip("_")]
        s = [math.copysign(1, x) if abs(x) == 2 and confidence < 3 else x for x, confidence in pairs]
        levels.append(0 if min(s) == 2 else 1 if max(s) == 2 else 2 if max(s) == 1 else 3 if min(s) > -2 else 4)
        means.append(np.mean([x for x, _ in pairs]))
    return levels, means


def esa(args):
    """ESA 2018, track B: 51 papers, two whole programme committees, three phases (alone; discussed; voted on).

    The folder holds scores-phase1-pc1.tsv to scores-phase3-pc2.tsv of github.com/ad-freiburg/esa2018-experiment.
    """
    tables, rho, r = {}, [], []
    for phase in (1, 2, 3):
        (first, x), (second, y) = (esa_committee(args.folder / f"scores-phase{phase}-pc{i}.tsv") for i in (1, 2))
        square = np.zeros((5, 5))
        np.add.at(square, (first, second), 1)
        tables[f"phase {phase}"] = cells_at(square, 2)  # accept: some +2
        rho.append(polychoric(square))
        r.append(pearson(x, y)[0])
    conclude(tables, args, [("polychoric ρ of five levels", *rho), ("correlation of mean scores", *r)])


# ==================================================================================== command line


def parse_args(argv=None):
    """The command line → args. Without a task: neurips."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.error = fail  # one line, exit code 2
    tasks = parser.add_subparsers(required=True, metavar="TASK")
    flags = {
        "accept": dict(type=float, help="acceptance rate, a share (0.05; scores: of the decisions, else 0.23)"),
        "withdrawn": dict(choices=("reject", "drop"), default="reject", help="withdrawn papers: rejects, or left out"),
        "columns": dict(action="append", default=[], metavar="NAME=TEXT",
                        help="the file's name of a column: score=rating (may be repeated)"),
        "decisions": dict(action="append", default=[], metavar="LEVEL=TEXT",
                          help="what a phrase means: accept='minor revision' (may be repeated)"),
        "reviewers": dict(type=int, default=6, help="panels of 1 to this many reviewers"),
        "variances": dict(type=float, nargs=3, default=(1.0, 0.0, 1.0), metavar=("QUALITY", "OFFSET", "OPINION"),
                          help="of a review's parts (the reference's 50 %% opinion; 2014: 1.278 0.24 1.268)"),
        "seed": dict(type=int, default=0, help="of random numbers"),
        "out": dict(type=Path, help="folder for results and figures (%(default)s)"),
        "no_plot": dict(action="store_true", help="write no figure"),
    }

    def task(function, names, **defaults):
        sub = tasks.add_parser(function.__name__, help=function.__doc__.split("\n")[0], description=function.__doc__)
        sub.error = fail
        for name in names.split():
            sub.add_argument(f"--{name}", **flags[name])
        sub.set_defaults(task=function, out=Path("out/review_consistency") / function.__name__, **defaults)
        return sub

    task(neurips, "accept out no_plot", accept=0.05)
    task(table, "accept withdrawn columns decisions out no_plot", accept=0.05).add_argument(
        "input", nargs="+", help="counts, or a file: square counts; paper, committee, decision; or paper, decision1, …")
    task(scores, "accept withdrawn columns decisions seed out").add_argument(
        "file", help="columns paper, score[, reviewer, committee, decision]; or one row a paper, scores in 0, 1, …")
    task(simulate, "reviewers variances seed out")
    task(esa, "accept out no_plot", accept=0.05).add_argument("folder", type=Path, help="where the six files are")
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0].startswith("-") and argv[0] not in ("-h", "--help"):
        argv = ["neurips", *argv]
    return parser.parse_args(argv)


def main():
    run(parse_args())


if __name__ == "__main__":
    main()
