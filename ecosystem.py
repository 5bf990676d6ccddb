"""Ecosystem-level analysis of deployed machine learning (Toups, Bommasani, Creel, Bana, Jurafsky, Liang; arXiv 2307.05862).

The problem. A person meets all the models that are deployed for a need, every screener of résumés, every voice interface. Accuracy
looks at one model at a time: the columns of the table of outcomes. What a person lives through is a row.

The idea. Stack the outcomes of k models on N people into a 0/1 matrix F, 1 = this model fails this person, and look at rows. With errors
e_j (column means) and the number of failures T_i = Σ_j F_ij,

    P_obs(t) = #{i : T_i = t} / N               observed outcome profile, t = 0 … k
    P_exp    = PoissonBinomial(e_1 … e_k)       the same if the models failed independently
    systemic failure S = P(k), all fail; consistent success C = P(0), none fails; homogeneous outcome H = S + C

Observed rates above expected ones mean that the same people are failed again and again. Both come from the same people, so both are
recomputed in every bootstrap resample. Then: is it only that some people are hard (four nulls that say what hardness alone would give)?
Who gains when one model improves? Is one group's outcome more homogeneous than its errors explain?

How to run it.

    python ecosystem.py                           four classifiers of Unicode characters, offline: the whole report (15 s, 2 CPU cores)
    python ecosystem.py report FILE…              your table: predictions and a label column, or --outcome correct|fail for 0 and 1
    python ecosystem.py improve FILE              columns named model@time: who gains when a model improves
    python ecosystem.py ddi FILE                  the paper's section 5: skin tones, models and dermatologists (prefix human:)
    python ecosystem.py hapi | alpaca             the paper's eleven datasets, language models (downloads)
    python ecosystem.py simulate | bench          known truth; speed

A .csv is wide (a row a person, a column a model) or long (id, model, prediction|correct|fail and where wanted time, label, group); .npz
has the same arrays; .npy is read block by block, memory does not grow with the people, and torchrun shares the blocks out.

What the paper reports: homogeneous outcomes above the baseline on all eleven datasets of HAPI (three commercial APIs each, 2020 to 2022);
and, as quoted by readers, on average 10 % of a model's improvements are on people whom all others fail.

What we measured (`python ecosystem.py --seed 0`, then 1 and 2; Unicode 14 of Python 3.11, 8,000 test characters, CPU):

    systemic failure     1.58 % observed, 0.0026 % expected: 596 times [497, 714]; seeds 1, 2: 614 and 553 times
    homogeneous          81.4 % observed, 70.6 % expected: + 10.7 points [9.7, 11.7]; + 11.7 and + 10.9
    only hard people?    independent within the 26 true categories: S = 0.19 %, H = 74.0 %. No two-class null, α = 0.1 … 0.5, reaches S. One
                         shared difficulty (Rasch, a = 2.92 ± 0.08) gives S = 1.33 %, H = 81.3 %: nearly all of it
    who gains            26.7 % of a model's failures are systemic, but 14.1 % of its improvements (27.6 and 14.1; 26.4 and 13.4)

So at our scale both findings hold, and the sharpest alternative, a single difficulty common to all models, explains most of the first.
`bench`: 10,000,000 people × 64 models, packed, are counted in 0.33 s on 2 cores of an AMD EPYC (one byte an outcome: 2.9 s).

What is ours. The paper's own code and appendix could not be had, so the formulas of these are our definitions: the two-class hardness null,
φ, the ragged mode, which improvements are kept (--min_drop), contrasts between groups and their tests. The bootstrap's buckets (see
`resample`), the permutation chain, the stratified and the Rasch null are ours too. Error consistency, CAPA, Holm, Fréchet: as cited.
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
import tarfile
import time
import unicodedata
import urllib.request
import zlib
from collections import Counter
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

try:
    from kernels.popcount_histogram import popcount_histogram as fused_popcount_histogram
except ImportError:  # copied alone, or no Triton here: the plain version below computes the same
    fused_popcount_histogram = None

# ============================================================================================== the method: one pass over the people

N_BUCKETS = 4096  # of the bootstrap
BLOCK = 1 << 16  # people at a time


def pack_bits(failed):
    """(n, k) 0/1 array → (n, ⌈k/32⌉) int32 words: model j is bit j % 32 of word j // 32, unused bits are 0."""
    padded = np.pad(np.asarray(failed, np.uint8), ((0, 0), (0, -failed.shape[1] % 32)))
    return np.ascontiguousarray(np.packbits(padded, axis=1, bitorder="little")).view("<i4")


def unpack_bits(words, k):
    """The inverse of pack_bits → (n, k) uint8."""
    return np.unpackbits(np.ascontiguousarray(words).view(np.uint8), axis=1, count=k, bitorder="little")


def popcount_histogram(words, k, group=None, n_groups=1):
    """How many people failed t times, and how often each model failed, from packed outcomes.

    words: (n, ⌈k/32⌉) int32, as pack_bits makes them; group: (n,) integers below n_groups, or None for one group.
    Returns hist (n_groups, k + 1) and columns (n_groups, k), int64. subtle: neither unpacks. A word's ones are counted by adding
    neighbouring bits, then pairs, then nibbles, all of them at once in one integer; a column's ones by adding words masked to every
    eighth bit, so that four counters of 8 bits live in one integer and hold for 255 rows."""
    hist = torch.zeros(n_groups, k + 1, dtype=torch.int64, device=words.device)
    columns = torch.zeros(n_groups, 32 * words.shape[1], dtype=torch.int64, device=words.device)
    step = 255 * max(1, 2**16 // 255 // words.shape[1])  # what fits the cache
    for part in range(0, len(words), step):
        w = words[part : part + step]
        x = w - ((w >> 1) & 0x55555555)
        x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
        x = (((x + (x >> 4)) & 0x0F0F0F0F) * 0x01010101) >> 24
        t = sum(x.unbind(1)).long()
        if n_groups > 1:
            g = group[part : part + step].long()
            t += g * (k + 1)
        hist += torch.bincount(t, minlength=hist.numel()).view_as(hist)
        for i in range(n_groups):
            chosen = w[g == i] if n_groups > 1 else w
            chosen = F.pad(chosen, (0, 0, 0, -len(chosen) % 255)).view(-1, 255, words.shape[1])
            for shift in range(8):
                lanes = ((chosen >> shift) & 0x01010101).sum(1, dtype=torch.int32)  # (rows / 255, words)
                for byte in range(4):
                    columns[i, 8 * byte + shift :: 32] += ((lanes >> 8 * byte) & 255).sum(0)
    return hist, columns[:, :k]


def bucket(i, n):
    """Rows i of n → buckets of the bootstrap: one for each person while there are enough, else the row number's hash chooses.
    subtle: the choice must owe nothing to the order of the rows, for tables come sorted."""
    z = i.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(32))) * np.uint64(0xD6E8FEB86659FD93)
    return i if n <= N_BUCKETS else ((z ^ (z >> np.uint64(32))) % np.uint64(N_BUCKETS)).astype(np.int64)


def tally(failed, group=None, n_groups=1, detail=True, device="cpu"):
    """One pass over the people. Everything else in this file is computed from these integers, which add over blocks and over ranks.

    failed: (n, k) array of 0 and 1 (1 = this model failed this person), or `Mapped`; group: (n,) or None.
    Returns int64 arrays. hist (G, k + 1): people by number of failures; columns (G, k): failures by model; and with detail joint
    (k, k): people whom both models fail; profiles (G, 2^k) for k ≤ 10: people by who failed them; buckets (G, 4096, 2k + 1): hist and
    columns of each bucket. The people of rank r are blocks r, r + W, …; the only message is one all_reduce."""
    n, k = failed.shape
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    sums = dict(hist=(n_groups, k + 1), columns=(n_groups, k))
    if detail:
        sums |= dict(joint=(k, k), profiles=(n_groups, 2**k if k <= 10 else 0), buckets=(n_groups, N_BUCKETS, 2 * k + 1))
    sums = {name: torch.zeros(shape, dtype=torch.int64) for name, shape in sums.items()}
    count = fused_popcount_histogram if fused_popcount_histogram and torch.device(device).type == "cuda" else popcount_histogram
    for first in range(rank * BLOCK, n, world * BLOCK):
        rows = slice(first, min(first + BLOCK, n))
        words = failed.words(rows) if isinstance(failed, Mapped) else pack_bits(failed[rows])
        g = torch.from_numpy(np.asarray(group[rows], np.int64)) if n_groups > 1 else torch.zeros(len(words), dtype=torch.int64)
        hist, columns = count(torch.from_numpy(np.array(words)).to(device), k, g.to(device), n_groups)
        sums["hist"] += hist.cpu()
        sums["columns"] += columns.cpu()
        if detail:
            bits = torch.from_numpy(unpack_bits(words, k))
            real = bits.float()
            sums["joint"] += (real.T @ real).long()  # exact: a block is shorter than 2^24
            if k <= 10:
                code = torch.from_numpy(words[:, 0].astype(np.int64)) + g * 2**k
                sums["profiles"] += torch.bincount(code, minlength=n_groups * 2**k).view(n_groups, -1)
            row = g * N_BUCKETS + torch.from_numpy(bucket(np.arange(rows.start, rows.stop), n))
            features = torch.cat([F.one_hot(bits.sum(1, dtype=torch.int64), k + 1), bits.long()], 1)
            sums["buckets"].view(-1, 2 * k + 1).index_add_(0, row, features)
    if world > 1:
        flat = torch.cat([value.flatten() for value in sums.values()]).to(device)
        dist.all_reduce(flat)
        parts = flat.cpu().split([value.numel() for value in sums.values()])
        sums = {name: part.view(value.shape) for (name, value), part in zip(sums.items(), parts)}
    return {name: value.numpy() for name, value in sums.items()}


# ============================================================================================== the method: what chance would give


def poisson_binomial(errors):
    """Distribution of the number of failures of independent models. errors (…, k), each in [0, 1] → (…, k + 1), float64. Exact: adds
    one model after the other, P(t) ← P(t)·(1 − e) + P(t − 1)·e."""
    errors = np.asarray(errors, float)
    p = np.ones((*errors.shape[:-1], 1))
    for e in np.moveaxis(errors, -1, 0)[..., None]:
        p = np.concatenate([p * (1 - e), 0 * e], -1) + np.concatenate([0 * e, p * e], -1)
    return p


def divide(a, b):
    """a / b, and NaN, printed as "undefined", where b is 0."""
    a, b = np.broadcast_arrays(np.asarray(a, float), np.asarray(b, float))
    return np.divide(a, b, out=np.full(a.shape, np.nan), where=b > 0)


def homogeneity(hist, columns):
    """Rates of the three outcomes, observed and under independence with the same errors, and indices that allow comparing ecosystems
    of different size. hist (…, k + 1), columns (…, k) → {name: (…)}; NaN where undefined.

    systemic: all k fail, S; consistent: none fails, C; homogeneous: H = S + C. phi = (S_obs − S_exp) / (min e − S_exp): 0 for
    independent models, 1 when failures are nested as far as the errors allow. dispersion = Var(T) / Σ e(1 − e): 1 for independent
    models, k for identical ones."""
    n, k = hist.sum(-1), columns.shape[-1]
    observed, errors = hist / n[..., None], columns / n[..., None]
    expected = poisson_binomial(errors)
    t = np.arange(k + 1)
    variance = (observed * t**2).sum(-1) - (observed * t).sum(-1) ** 2
    rates = {}
    for name, cells in (("systemic", [k]), ("consistent", [0]), ("homogeneous", [0, k])):
        o, e = observed[..., cells].sum(-1), expected[..., cells].sum(-1)
        rates |= {f"{name} observed": o, f"{name} expected": e, f"{name} difference": o - e, f"{name} ratio": divide(o, e)}
    rates["phi"] = divide(rates["systemic difference"], errors.min(-1) - rates["systemic expected"])
    rates["dispersion"] = divide(variance, (errors * (1 - errors)).sum(-1))
    return rates


def resample(buckets, n_boot, seed):
    """Joint bootstrap of people: (4096, 2k + 1) bucket sums → hist (n_boot, k + 1) and columns (n_boot, k) of resamples.

    Buckets are drawn with replacement. Up to 4096 people a bucket is a person, so this is the usual bootstrap; beyond, buckets are
    random sets of people, whose resampling has the same variance. Observed and expected rates must both be recomputed from a
    resample: errors and profile come from the same people. The same seed draws the same people, for paired comparisons."""
    k = buckets.shape[1] // 2
    full = buckets[buckets[:, : k + 1].sum(1) > 0].astype(float)
    rng, sums = np.random.default_rng(seed), []
    for part in range(0, n_boot, 250):
        b = min(250, n_boot - part)
        draws = rng.integers(len(full), size=(b, len(full))) + len(full) * np.arange(b)[:, None]
        sums.append(np.bincount(draws.ravel(), minlength=b * len(full)).reshape(b, -1) @ full)
    sums = np.concatenate(sums)
    return sums[:, : k + 1], sums[:, k + 1 :]


def interval(samples):
    """95 % percentile interval over the first axis, ignoring undefined resamples → (low, high)."""
    samples = samples[np.isfinite(samples)]
    return tuple(np.quantile(samples, [0.025, 0.975])) if len(samples) else (np.nan, np.nan)


def permutation_null(n, failures, n_draws, rng):
    """Shuffle every model's outcomes among the n people, margins fixed: the numbers of people whom all models fail, and whom none
    fails, in n_draws shuffles. No shuffling is needed: a model's failures fall on those whom all have failed so far, on those whom
    none has failed, and on the rest, by two hypergeometric draws. For two models this is Fisher's exact test."""
    all_fail = np.full(n_draws, failures[0])
    none_fails = n - all_fail
    for f in failures[1:]:
        hit = rng.hypergeometric(all_fail, n - all_fail, f)
        lost = rng.hypergeometric(none_fails, n - all_fail - none_fails, f - hit)
        all_fail, none_fails = hit, none_fails - lost
    return all_fail, none_fails


def p_value(observed, draws):
    """One-sided: the share of draws at least as large, the observed one counted among them."""
    return (1 + np.sum(draws >= observed)) / (1 + len(draws))


def chi_square_tail(x, dof):
    return float(torch.special.gammaincc(torch.tensor(dof / 2, dtype=torch.float64), torch.tensor(x / 2, dtype=torch.float64)))


def goodness_of_fit(counts, expected, n_fitted):
    """Pearson's χ² and G² with cells of expectation below 5 pooled → (chi2, g2, degrees of freedom, p of G²)."""
    small = expected < 5
    o, e = (np.append(x[~small], x[small].sum()) for x in (counts, expected))
    o, e = o[e > 0], e[e > 0]
    chi2, g2 = float(((o - e) ** 2 / e).sum()), float(2 * (o * np.log(np.where(o > 0, o, 1) / e)).sum())
    dof = len(o) - 1 - n_fitted
    return chi2, g2, dof, chi_square_tail(max(g2, 0), dof) if dof > 0 else math.nan


def profile_probabilities(errors):
    """Independent models: probability of every subset of failing models, (2^k,), model j = bit j."""
    p = np.ones(1)
    for e in errors:
        p = np.concatenate([p * (1 - e), p * e])
    return p


# ============================================================================================== the method: is it only hard cases?


def two_class_null(errors, alpha, delta):
    """A share α of people is harder by the factor 1 + Δ, the others easier so that every model's error stays; independent within
    both: P = α·PB((1 + Δ)e) + (1 − α)·PB((1 − αΔ/(1 − α))e). Our definition (the paper's formula could not be verified).
    Raises ValueError where a probability would leave [0, 1]."""
    errors = np.asarray(errors, float)
    largest = largest_delta(errors, alpha)
    if not 0 <= delta <= largest + 1e-12:
        raise ValueError(f"Δ = {delta} with α = {alpha}: these errors allow 0 to {largest:.4f}")
    hard, easy = np.minimum((1 + delta) * errors, 1), np.maximum((1 - alpha * delta / (1 - alpha)) * errors, 0)
    return alpha * poisson_binomial(hard) + (1 - alpha) * poisson_binomial(easy)


def largest_delta(errors, alpha):
    return min(1 / max(errors) - 1, (1 - alpha) / alpha)


def two_class_frontier(errors, alpha, cells, target):
    """The smallest Δ whose P, summed over cells, reaches target; None if no feasible Δ does. P grows with Δ: bisection."""
    low, high = 0.0, largest_delta(errors, alpha)
    if two_class_null(errors, alpha, high)[cells].sum() < target:
        return None
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (low, middle) if two_class_null(errors, alpha, middle)[cells].sum() >= target else (middle, high)
    return high


def stratified_null(columns, sizes):
    """Independence within each stratum: Σ_s w_s·PB(e(s)). columns (S, k), sizes (S,) → (k + 1,)."""
    return sizes / sizes.sum() @ poisson_binomial(columns / sizes[:, None])


Z = torch.linspace(-8, 8, 241, dtype=torch.float64)  # difficulty; the trapezoid rule is exact to about 1e-14 for a Gaussian
LOG_W = -(Z**2) / 2 - 0.5 * math.log(2 * math.pi) + math.log(float(Z[1] - Z[0]))


def fit_rasch(hist, columns):
    """Shared difficulty (Rasch, 1-PL): P(model j fails person i) = σ(b_j + a·z_i), z ~ N(0, 1), by marginal maximum likelihood. hist
    (k + 1,) and columns (k,) are sufficient. Newton's method in float64.

    Returns a, its standard error, P (k + 1,) fitted, and pairs (k, k): the probability that both fail. Models that always or
    never fail are left out of the fit and put back in."""
    n, k = hist.sum(), len(columns)
    kept, always = (columns > 0) & (columns < n), int((columns == n).sum())
    h, c = (torch.tensor(x / n, dtype=torch.float64) for x in (hist[always : always + kept.sum() + 1], columns[kept]))
    t = torch.arange(len(h), dtype=torch.float64)

    def negative_log_likelihood(theta):  # a person; the answers enter only through T and the column sums
        b, a = theta[:-1], theta[-1]
        log_zero = LOG_W - F.softplus(b + a * Z[:, None]).sum(1)  # log of w(z)·P(no failure | z), (nodes,)
        return -(b @ c) - h @ torch.logsumexp(log_zero + a * t[:, None] * Z, 1)

    theta = torch.cat([torch.logit(c), torch.ones(1, dtype=torch.float64)])
    loss = negative_log_likelihood(theta)
    for _ in range(100):
        gradient = torch.autograd.functional.jacobian(negative_log_likelihood, theta)
        hessian = torch.autograd.functional.hessian(negative_log_likelihood, theta)
        values, vectors = torch.linalg.eigh(hessian)
        step = vectors @ ((vectors.T @ gradient) / values.abs().clamp_min(1e-6))  # downhill also where the curvature is negative
        size = 1.0
        while size > 1e-9 and not negative_log_likelihood(theta - size * step) <= loss:
            size /= 2
        theta = theta - size * step
        loss = negative_log_likelihood(theta)
        if float(gradient.abs().max()) < 1e-10 or size <= 1e-9:
            break
    error = float(torch.linalg.pinv(hessian * n)[-1, -1].clamp_min(0).sqrt())
    p = torch.zeros(len(Z), k, dtype=torch.float64)
    p[:, torch.from_numpy(columns == n)] = 1
    p[:, torch.from_numpy(kept)] = torch.sigmoid(theta[:-1] + theta[-1] * Z[:, None])
    w = LOG_W.exp()
    pairs = (w[:, None] * p).T @ p
    return abs(float(theta[-1])), error, w.numpy() @ poisson_binomial(p.numpy()), pairs.numpy()


# ============================================================================================== the method: pairs, subsets, improvement


def agreement(joint, columns, n):
    """Pairs of models from counts → {name: (k, k)}. ratio: P(both fail) / (e_a·e_b); correlation: φ of the failures; kappa: error
    consistency (Geirhos et al. 2020), (c_obs − c_ind) / (1 − c_ind), c = both right or both wrong."""
    e, both = columns / n, joint / n
    independent = np.outer(e, e)
    observed, chance = 1 - e[:, None] - e + 2 * both, 1 - e[:, None] - e + 2 * independent
    spread = np.sqrt(np.outer(e * (1 - e), e * (1 - e)))
    return dict(ratio=divide(both, independent), correlation=divide(both - independent, spread),
                kappa=divide(observed - chance, 1 - chance))


def answer_agreement(answers, labels, n_classes):
    """Pairs of models from their answers (n, k) and the truth (n,), integer codes, 0 = none → {name: (k, k)}. same_wrong: P(same answer |
    both wrong) (Kim, Garg, Peng, Garg 2025; chance is 1 / (C − 1)); capa: κ_p of Goel et al. 2025 for single answers,
    (c_obs − c_ind) / (1 − c_ind), c_obs = P(same answer), c_ind = p_a·p_b + (1 − p_a)(1 − p_b) / (C − 1), p = accuracy."""
    right = answers == labels[:, None]
    answers = np.where(answers == 0, -1 - np.arange(answers.shape[1]), answers)  # two that say nothing do not agree
    same = np.stack([(answers == answers[:, [j]]).mean(0) for j in range(answers.shape[1])])
    both_right = right.T.astype(float) @ right / len(labels)
    p = right.mean(0)
    both_wrong = 1 - p[:, None] - p + both_right
    chance = np.outer(p, p) + np.outer(1 - p, 1 - p) / (n_classes - 1)
    return dict(same_wrong=divide(same - both_right, both_wrong), capa=divide(same - chance, 1 - chance))


def subset_curve(hist, errors):
    """S_m: the share of people whom m models fail, all of them, averaged over all subsets of m = 1 … k models; and the same under
    independence, the mean of Π e over subsets (elementary symmetric polynomial over C(k, m)). → two (k,) arrays."""
    k = len(errors)
    observed = [sum(hist[t] * (math.comb(t, m) / math.comb(k, m)) for t in range(m, k + 1)) / hist.sum() for m in range(1, k + 1)]
    symmetric = np.zeros(k + 1)
    symmetric[0] = 1
    for e in errors:
        symmetric[1:] += e * symmetric[:-1]
    return np.array(observed), np.array([symmetric[m] / math.comb(k, m) for m in range(1, k + 1)])


def best_subset(failed, m):
    """The m models that fail the fewest people all together → (columns, S, whether exact). All C(k, m) subsets up to 100,000; beyond,
    one model after the other is added."""
    n, k = failed.shape
    bits = np.packbits(np.asarray(failed[:]), axis=0).T.copy()  # (k, n / 8): a model's failures as a bit string
    exact = math.comb(k, m) <= 100_000

    def all_fail(subset):
        return int(np.bitwise_count(np.bitwise_and.reduce(bits[list(subset)])).sum())

    if exact:
        best = min(combinations(range(k), m), key=all_fail)
    else:
        best = ()
        while len(best) < m:
            best = min(((*best, j) for j in range(k) if j not in best), key=all_fail)
    return sorted(best), all_fail(best) / n, exact


def hypergeometric_tail(x, n, n_marked, n_drawn):
    """P(X ≤ x) for X marked ones among n_drawn out of n of which n_marked are marked. Exact, by the sum of its terms."""
    i = torch.arange(max(0, n_drawn - (n - n_marked)), min(n_marked, n_drawn) + 1, dtype=torch.float64)

    def log_choose(a, b):
        a, b = (torch.as_tensor(x, dtype=torch.float64) for x in (a, b))
        return torch.lgamma(a + 1) - torch.lgamma(b + 1) - torch.lgamma(a - b + 1)

    p = (log_choose(n_marked, i) + log_choose(n - n_marked, n_drawn - i) - log_choose(n, n_drawn)).exp()
    return min(1.0, float(p[i <= x].sum()))


def improvement(before, after, j):
    """Who gains when model j improves (the paper's section 4)? before (n, k): failures at time t; after (n,): model j at t + 1.

    Counts people by the number of *other* models that fail them at time t, 0 … k − 1: initial (failures of j), improved, declined.
    The last cell are the systemic failures. If improvements struck j's failures at random, the number among the systemic ones
    would be hypergeometric: its mean, and p = P(as few or fewer)."""
    k = before.shape[1]
    others = before.sum(1, dtype=np.int64) - before[:, j]
    failed, fails = before[:, j] > 0, np.asarray(after) > 0
    initial, improved, declined = (np.bincount(others[x], minlength=k) for x in (failed, failed & ~fails, ~failed & fails))
    n_failed, n_improved = int(initial.sum()), int(improved.sum())
    return dict(initial=initial, improved=improved, declined=declined, net=n_improved - int(declined.sum()),
                systemic_share=float(divide(improved[-1], n_improved)), initial_share=float(divide(initial[-1], n_failed)),
                expected=float(divide(n_improved * int(initial[-1]), n_failed)),
                p=hypergeometric_tail(int(improved[-1]), n_failed, int(initial[-1]), n_improved))


def ragged_homogeneity(outcomes, weights=None):
    """When each person met other models. outcomes (n, k): 1 failure, 0 none, 2 not met; weights (n,) integers or None.

    A model's rate r_j is over those who met it; a person who met the set J is expected to be failed by all with probability Π_{j∈J} r_j
    and by none with Π_{j∈J} (1 − r_j). Returns rates (k,), and for systemic and consistent the (n,) observed 0/1 and expected."""
    seen, failed = outcomes != 2, outcomes == 1
    w = np.ones(len(outcomes)) if weights is None else weights
    rates = divide(w @ failed, w @ seen)
    rates = np.nan_to_num(rates)  # nobody in this resample met the model: it weighs nothing either
    with np.errstate(divide="ignore"):
        systemic, consistent = (np.exp(np.where(seen, np.log(r), 0).sum(1)) for r in (rates, 1 - rates))
    t, met = failed.sum(1), seen.sum(1)
    return rates, dict(systemic=(t == met, systemic), consistent=(t == 0, consistent))


def holm(p):
    """Holm's step-down adjustment of p-values."""
    p = np.asarray(p, float)
    order = np.argsort(p)
    adjusted = np.minimum(1, np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)))
    return adjusted[np.argsort(order)]


def permute_groups(profiles_a, profiles_b, n_draws, rng):
    """Differences D_a − D_b, D = H_obs − H_exp, when people are dealt to the two groups at random. profiles (2^k,) counts."""
    total, n_a = profiles_a + profiles_b, int(profiles_a.sum())
    k = len(total).bit_length() - 1
    bits = np.arange(2**k)[:, None] >> np.arange(k) & 1
    features = np.concatenate([np.eye(k + 1)[bits.sum(1)], bits], 1)
    a = rng.multivariate_hypergeometric(total, n_a, n_draws)
    d = [homogeneity(sums[:, : k + 1], sums[:, k + 1 :])["homogeneous difference"] for sums in (a @ features, (total - a) @ features)]
    return d[0] - d[1]


# ============================================================================================== the offline ecosystem

ALGORITHMIC = ("CJK", "HANGUL SYLLABLE", "TANGUT", "NUSHU", "KHITAN")  # names made by a rule


def unicode_data(seed, n_test=8000):
    """Characters' names and general categories, as this Python's Unicode knows them → (names, categories, (train, test) indices)."""
    pairs = [(unicodedata.name(c), unicodedata.category(c)) for c in map(chr, range(sys.maxunicode + 1)) if unicodedata.name(c, "")]
    names, categories = zip(*((name, category) for name, category in pairs if not name.startswith(ALGORITHMIC)))
    order = np.random.default_rng(seed).permutation(len(names))
    return names, categories, (order[n_test:], order[:n_test])


PROVIDERS = {  # name: (features of a character's name, width of the hidden layer or 0 = linear, share of the training data it has)
    "words linear": (lambda name: name.split(), 0, 1.0),
    "trigrams MLP": (lambda name: [f"  {name} "[i : i + 3] for i in range(len(name) + 1)], 64, 1.0),
    "words MLP, half the data": (lambda name: name.split(), 64, 0.5),
    "ends linear": (lambda name: [f"{i}{word}" for i, word in zip((0, 1, 2), (name.split()[:1] + name.split()[-2:]))], 0, 1.0),
}
N_FEATURES, BATCH, EPOCHS = 4096, 128, 8
YEARS = {"year 1": 0.25, "year 2": 0.5, "year 3": 1.0}  # and the share of the training data that there is by then


def hashed(names, features):
    """Names → (n, longest) int64 numbers of their features, padded with 0."""
    rows = [[1 + zlib.crc32(f.encode()) % (N_FEATURES - 1) for f in features(name)] for name in names]
    table = np.zeros((len(rows), max(map(len, rows))), np.int64)
    for i, row in enumerate(rows):
        table[i, : len(row)] = row
    return torch.from_numpy(table)


def train_provider(x, y, test, hidden, n_classes, seed, device):
    """A bag of features, linear or with one hidden layer, trained with Adam and falling learning rate → answers on test, (n_test,)."""
    torch.manual_seed(seed)
    net = nn.EmbeddingBag(N_FEATURES, hidden or n_classes, mode="sum", padding_idx=0)
    if hidden:
        net = nn.Sequential(net, nn.ReLU(), nn.Linear(hidden, n_classes))
    net = net.to(device)
    steps = EPOCHS * len(x) // BATCH
    optimizer = torch.optim.Adam(net.parameters(), 0.01, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.02, total_steps=steps)
    order = torch.cat([torch.randperm(len(x)) for _ in range(EPOCHS + 1)])
    for i in range(steps):
        rows = order[BATCH * i : BATCH * (i + 1)]
        loss = F.cross_entropy(net(x[rows].to(device)), y[rows].to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        return net(test.to(device)).argmax(1).cpu()


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


# ============================================================================================== tables

IDS = ("instance_id", "example_id", "image_id", "person_id", "applicant_id", "instance", "id")
MISSING = {"", "na", "nan", "null"}  # in whatever case
OUTCOMES = {"0": 0, "1": 1, "false": 0, "true": 1}


@dataclass
class Outcomes:
    """A table of outcomes. failed: (n, k) uint8, 1 = failure, 0 = none, 2 = not seen, or `Mapped`; answers (n, k) and labels (n,): integer
    codes of the texts in values; columns: {name: n texts} of groups and strata; ids, lines: a person's name and place in the file."""

    name: str
    models: list
    failed: object
    answers: np.ndarray = None
    labels: np.ndarray = None
    values: list = None
    columns: dict = field(default_factory=dict)
    ids: list = None
    lines: list = None


class Mapped:
    """A .npy file read block by block, so that memory does not grow with the people: (n, k) 0/1, or packed words (n, ⌈k/32⌉)."""

    def __init__(self, path, array, k, flip):
        self.path, self.array, self.flip, self.packed = path, array, flip, k is not None
        self.shape = (len(array), k or array.shape[1])

    def words(self, rows):
        if not self.packed:
            return pack_bits(self[rows])
        words, used = np.asarray(self.array[rows]), self.shape[1] % 32
        if used and len(bad := np.flatnonzero(words[:, -1].view(np.uint32) >> np.uint32(used))):
            fail(f"{self.path}: row {(rows.start or 0) + bad[0] + 1}: a bit above model {self.shape[1]} is set; unused bits must be 0")
        return words

    def __getitem__(self, rows):
        if self.packed:
            return unpack_bits(self.words(rows), self.shape[1])
        part = np.asarray(self.array[rows])
        if part.dtype != bool and len(bad := np.argwhere(part > 1)):
            i, j = bad[0]
            fail(f"{self.path}: row {(rows.start or 0) + i + 1}, column {j + 1}: {part[i, j]} is neither 0 nor 1")
        return part.astype(np.uint8) ^ np.uint8(self.flip)


def read_table(path, args):
    """.csv (wide or long), .npz or .npy → Outcomes. What is wrong with a table ends the program with its row and column."""
    path = Path(path)
    if not path.is_file():
        fail(f"{path}: no such file")
    data = {".npy": read_npy, ".npz": read_npz}.get(path.suffix, read_outcome_csv)(path, args)
    n, k = data.failed.shape
    if n == 0:
        fail(f"{path}: no rows")
    if k < 2:
        fail(f"{path}: {k} model column{'s'[k:]}: with a single model observed and expected are the same; an ecosystem needs two or more")
    if k > 4096:
        fail(f"{path}: {k} models, at most 4096 fit")
    return data


def is_number(text):
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def read_npy(path, args):
    try:
        array = np.load(path, mmap_mode="r")
    except (ValueError, OSError) as error:
        fail(f"{path}: not an .npy file ({error})")
    packed = array.dtype in (np.int32, np.uint32)
    if array.ndim != 2 or not (packed or array.dtype in (bool, np.uint8)):
        fail(f"{path}: {array.dtype} {array.shape}; want bool or uint8 (people, models), or packed int32 words (people, models / 32)")
    if packed:
        most = 32 * array.shape[1]
        if not most - 32 < (args.k or 0) <= most:
            fail(f"{path}: packed words, {array.shape[1]} a person: how many models? Say --k, {most - 31} to {most}")
        array = array.view(np.int32)
    elif not args.outcome:
        fail(f"{path}: does a 1 mean success or failure? Say --outcome correct or --outcome fail")
    fails = Mapped(path, array, args.k if packed else None, not packed and args.outcome == "correct")
    return Outcomes(path.name, [f"model {j}" for j in range(fails.shape[1])], fails)


class Cells:
    """Texts of cells → small integers, 0 for a missing one. Numbers are compared as numbers: 1, 1.0 and 01 are one class."""

    def __init__(self):
        self.codes, self.values, self.first = {}, {"": 0}, [None]  # of texts; of what they mean; where each value was met first

    def __call__(self, text, row, column):
        if text not in self.codes:
            value = text.strip()
            value = "" if value.lower() in MISSING else value
            try:
                value = repr(float(value)).removesuffix(".0") if value else ""
            except ValueError:
                pass
            if value not in self.values:
                self.values[value] = len(self.values)
                self.first.append(f'row {row}, column "{column}"')
            self.codes[text] = self.values[value]
        return self.codes[text]


def read_npz(path, args):
    """Arrays fail or correct (n, k), or predictions (n, k) and labels (n,); where wanted also models, ids, group, …"""
    try:
        arrays = dict(np.load(path))
    except (ValueError, OSError) as error:
        fail(f"{path}: not an .npz file ({error})")
    kind = next((name for name in ("fail", "correct", "predictions") if name in arrays), None)
    if kind is None or arrays[kind].ndim != 2 or kind == "predictions" and "labels" not in arrays:
        fail(f"{path}: holds {', '.join(arrays) or 'nothing'}; want fail or correct (people, models), or predictions and labels")
    table = arrays.pop(kind)
    models = [str(name) for name in arrays.pop("models", [f"model {j}" for j in range(table.shape[1])])]
    for name, array in [("models", models), *arrays.items()]:
        want = table.shape[1:] if name == "models" else table.shape[:1]
        if np.shape(array) != want:
            fail(f"{path}: {name} has shape {np.shape(array)}, want {want} beside {kind} {table.shape}")
    columns = {{"labels": "label"}.get(name, name): list(map(str, array)) for name, array in arrays.items()}
    rows = [[str(x) for x in row] for row in (table.astype(int) if table.dtype == bool else table)]
    return outcomes_of(path, args, models, rows, range(1, len(rows) + 1), columns, columns.pop("ids", None), kind)


def read_outcome_csv(path, args):
    """Wide: a row for each person, a column for each model, and label, group, id. Long: columns id, model, prediction or correct or
    fail, and where wanted time, label, group; a model at a time is the column model@time."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file)
            header = [name.strip() for name in next(reader, [])]
            lines, table = [], []
            for row in reader:
                if row:
                    if len(row) != len(header):
                        fail(f"{path}: row {reader.line_num} has {len(row)} cells, the header {len(header)}")
                    lines.append(reader.line_num)
                    table.append(row)
    except (UnicodeDecodeError, csv.Error) as error:
        fail(f"{path}: not a CSV file in UTF-8 ({error})")
    if header and not header[0] and "id" not in header:
        header[0] = "id"  # as pandas writes its index
    for i, name in enumerate(header):
        if not name or name in header[:i]:
            fail(f"{path}: column {i + 1} of the header is {'empty' if not name else f'another {name}'}")
    index = args.id or next((name for name in header if name.lower() in IDS), None)
    for name in filter(None, (index, args.label, args.group, args.strata, *(args.models or ()))):
        if name not in header and not (name in (args.models or ()) and "model" in header):
            fail(f"{path}: no column {name}; there are {', '.join(header)}")
    others = {name for name in (args.label or "label", args.group or "group", args.strata) if name in header}
    kind = next((name for name in ("prediction", "correct", "fail") if name in header), None)
    if "model" in header and kind:
        if index is None:
            fail(f"{path}: a long table needs a column that names the person: {', '.join(IDS)}, or --id COLUMN")
        header, table, lines = widen(path, header, table, lines, index, kind, others)
    models = args.models or [name for name in header if name not in others and name != index]
    at = [header.index(name) for name in models]
    columns = {name: [row[header.index(name)].strip() for row in table] for name in others}
    ids = index and [row[header.index(index)].strip() for row in table]
    rows = [[row[j] for j in at] for row in table]
    return outcomes_of(path, args, models, rows, lines, columns, ids, kind)


def widen(path, header, table, lines, index, kind, others):
    """A long table as a wide one; the line number of a person is that of the first row."""
    at = {name: header.index(name) for name in (index, "model", kind, *others, *(["time"] if "time" in header else []))}
    people, models, cells = {}, {}, {}
    for line, row in zip(lines, table):
        get = {name: row[j].strip() for name, j in at.items()}
        model = get["model"] + (f"@{get['time']}" if "time" in get else "")
        person = people.setdefault(get[index], (line, [get[name] for name in others]))
        for name, value in zip(others, person[1]):
            if get[name] != value:
                fail(f'{path}: row {line}, column "{name}": {get[name]}, but {value} for the same person in row {person[0]}')
        models.setdefault(model, len(models))
        if cells.setdefault((get[index], model), (line, get[kind]))[0] != line:
            fail(f"{path}: row {line}: {get[index]} with {model} again, first in row {cells[get[index], model][0]}")
    rows = [[name, *person[1], *(cells.get((name, model), (0, ""))[1] for model in models)] for name, person in people.items()]
    return [index, *others, *models], rows, [person[0] for person in people.values()]


def outcomes_of(path, args, models, rows, lines, columns, ids, kind):
    """Texts → Outcomes. kind: what the cells of the table are, as far as it says so itself: prediction(s), correct, fail, or None."""
    cells, label = Cells(), args.label or "label"
    codes = np.array([[cells(text, line, model) for text, model in zip(row, models)] for line, row in zip(lines, rows)], np.int32)
    codes = codes.reshape(len(rows), len(models))
    kind = args.outcome or (kind if kind in ("correct", "fail") else None)
    labels = None
    if kind:
        meaning = np.full(len(cells.values), 2, np.uint8)
        for value, code in cells.values.items():
            if code and value.lower() not in OUTCOMES:
                fail(f"{path}: {cells.first[code]}: {value} is neither 0 nor 1")
            meaning[code] = OUTCOMES[value.lower()] ^ (kind == "correct") if code else 2
        failures = meaning[codes]
    elif label in columns:
        labels = np.array([cells(text, line, label) for text, line in zip(columns[label], lines)])
        if (labels == 0).any():
            fail(f'{path}: row {lines[int(np.argmin(labels))]}, column "{label}": the label is missing')
        values = list(cells.values)
        if all(is_number(values[code]) for code in set(labels.tolist())):
            for value, code in cells.values.items():
                if value[:1].isdigit() and not is_number(value):
                    fail(f"{path}: {cells.first[code]}: {value} begins like a number and is none, while the labels are numbers")
        failures = np.where(codes == 0, 2, codes != labels[:, None]).astype(np.uint8)
        if not (failures == 0).any():
            fail(f"{path}: no model is ever right: its cells and the column {label} have no value in common. Are the cells outcomes? "
                 "Then say --outcome correct or --outcome fail")
    else:
        fail(f"{path}: no column {label}: name the one with the truth by --label; if the cells are 0 and 1, say --outcome correct or "
             "--outcome fail")
    for j, model in enumerate(models):
        if len(rows) and (failures[:, j] == 2).all():
            fail(f'{path}: column "{model}" is empty')
    if ids and len(set(ids)) < len(ids):
        first = {}
        i = next(i for i, name in enumerate(ids) if first.setdefault(name, i) != i)
        fail(f"{path}: {len(ids) - len(set(ids))} duplicate ids, the first in row {lines[i]}: {ids[i]}, also in row {lines[first[ids[i]]]}")
    if (failures == 2).any():
        i, j = np.argwhere(failures == 2)[0]
        if args.missing is None:
            fail(f'{path}: row {lines[i]}, column "{models[j]}": no outcome. --missing fail counts it as a failure, drop leaves the person '
                 "out, ignore compares everybody with the models that they met")
        if args.missing == "fail":
            failures[failures == 2] = 1
        if args.missing == "drop":
            keep = (failures != 2).all(1)
            failures, codes, lines = failures[keep], codes[keep], [x for x, k in zip(lines, keep) if k]
            labels, ids = None if labels is None else labels[keep], ids and [x for x, k in zip(ids, keep) if k]
            columns = {name: [x for x, k in zip(column, keep) if k] for name, column in columns.items()}
    ids = ids or [f"row {line}" for line in lines]
    return Outcomes(path.name, models, failures, None if labels is None else codes, labels, list(cells.values), columns, ids, lines)

# ============================================================================================== the report

KINDS = {"systemic": "systemic failure (all fail)", "consistent": "consistent success (none fails)", "homogeneous": "homogeneous outcome"}


def show(x, digits=4):
    """A figure as text: fixed digits where they say something, else scientific; NaN is "undefined"."""
    if x is None or not math.isfinite(x):
        return "undefined"
    return f"{x:.{digits}f}" if x == 0 or 10**-digits <= abs(x) < 1e5 else f"{x:.3g}"


def between(pair, digits=4):
    return f"[{show(pair[0], digits)}, {show(pair[1], digits)}]"


def estimate(x, pair, digits=4):
    return f"{show(x, digits)} {between(pair, digits)}" if math.isfinite(x) else "undefined"


def less(p, n):
    """A p-value from n random draws, which cannot be smaller than 1 / (n + 1)."""
    return f"< {2 / n:.0e}" if p <= 1.5 / (n + 1) else f"{p:.4f}"


def plain(x):
    """For JSON: numpy → Python, NaN → null."""
    if isinstance(x, dict):
        return {str(key): plain(value) for key, value in x.items()}
    x = x.tolist() if isinstance(x, (np.ndarray, np.generic)) else x
    if isinstance(x, (list, tuple)):
        return [plain(value) for value in x]
    return None if isinstance(x, float) and not math.isfinite(x) else x


def measure(sums, args):
    """Everything about one ecosystem that needs no second one: rates, bounds, joint bootstrap intervals, permutation p-values."""
    hist, columns = sums["hist"].sum(0), sums["columns"].sum(0)
    n, k = int(hist.sum()), len(columns)
    errors = columns / n
    m = dict(n=n, k=k, errors=errors, observed=hist / n, expected=poisson_binomial(errors), **homogeneity(hist, columns))
    m["bounds"] = dict(systemic=(max(0, errors.sum() - (k - 1)), errors.min()), consistent=(max(0, 1 - errors.sum()), 1 - errors.max()))
    h, c = resample(sums["buckets"].sum(0), args.boot, args.seed)
    m["interval"] = {name: interval(values) for name, values in homogeneity(h, c).items()}
    m["profile interval"] = [interval(values) for values in (h / h.sum(1, keepdims=True)).T]
    m["expected interval"] = [interval(values) for values in poisson_binomial(c / h.sum(1, keepdims=True)).T]
    all_fail, none_fails = permutation_null(n, columns, args.permutations, np.random.default_rng([args.seed, 1]))
    m["p"] = dict(systemic=p_value(hist[k], all_fail), consistent=p_value(hist[0], none_fails),
                  homogeneous=p_value(hist[0] + hist[k], all_fail + none_fails))
    if k <= 10:
        profiles = sums["profiles"].sum(0)
        chi2, g2, dof, p = goodness_of_fit(profiles, n * profile_probabilities(errors), k)
        m["goodness of fit"] = dict(chi2=chi2, g2=g2, dof=dof, p=p)
    return m


def print_measures(title, names, m, args):
    n, k = m["n"], m["k"]
    print(f"\n{title}: {n:,} people, {k} models")
    if k <= 12:
        print_table(["", *names], [["error", *map(show, m["errors"])]])
    else:
        print(f"errors from {show(min(m['errors']))} to {show(max(m['errors']))}, mean {show(m['errors'].mean())}")
    print()
    cells = list(range(k + 1)) if k <= 12 else [0, 1, 2, k - 2, k - 1, k]
    print_table(["models that fail", "people observed", "95 %", "if independent", "ratio"],
                [[str(t), show(m["observed"][t]), between(m["profile interval"][t]), show(m["expected"][t]),
                  show(float(divide(m["observed"][t], m["expected"][t])), 2)] for t in cells])
    print()
    rows = []
    for kind, text in KINDS.items():
        o, e, d, r = (f"{kind} {name}" for name in ("observed", "expected", "difference", "ratio"))
        rows.append([text, show(m[o]), show(m[e]), estimate(m[d], m["interval"][d]), estimate(m[r], m["interval"][r], 2),
                     less(m["p"][kind], args.permutations)])
    print_table(["", "observed", "expected", "difference [95 %]", "ratio [95 %]", "p"], rows)
    print(f"p: one-sided, {args.permutations:,} shuffles of every model's failures among the people. Systemic failure lies between "
          f"{show(m['bounds']['systemic'][0])} and {show(m['bounds']['systemic'][1])} whatever the dependence (Fréchet).")
    print(f"size-free: phi {estimate(m['phi'], m['interval']['phi'], 3)} (0 independent, 1 nested); dispersion "
          f"{estimate(m['dispersion'], m['interval']['dispersion'], 3)} (1 independent, {k} identical)")
    if "goodness of fit" in m:
        fit = m["goodness of fit"]
        print(f"independence of all {2**k} profiles: " + (
            f"G² = {fit['g2']:,.1f}, χ² = {fit['chi2']:,.1f}, {fit['dof']} degrees of freedom (cells below 5 pooled), p "
            f"{'=' if fit['p'] else '<'} {fit['p'] or 1e-300:.2g}" if fit["dof"] > 0 else "too few people to test"))


def hardness(sums, m, names, strata):
    """Is it only that some people are hard? What four nulls give, beside what is observed."""
    hist, columns, cells = sums["hist"].sum(0), sums["columns"].sum(0), [0, m["k"]]
    a, error, p, both = fit_rasch(hist, columns)
    rows = [["observed", show(m["systemic observed"]), show(m["homogeneous observed"])],
            ["independent", show(m["systemic expected"]), show(m["homogeneous expected"])]]
    nulls = dict(independent=m["expected"])
    if strata:
        name, table = strata
        nulls[f"within each {name}"] = stratified_null(table["columns"], table["hist"].sum(1))
    nulls["shared difficulty (Rasch)"] = p
    rows += [[name, show(q[-1]), show(q[cells].sum())] for name, q in list(nulls.items())[1:]]
    frontier = {}
    for alpha in (0.1, 0.2, 0.3, 0.4, 0.5):
        largest = largest_delta(m["errors"], alpha) if m["errors"].max() > 0 else 0
        reach = [two_class_frontier(m["errors"], alpha, chosen, m[f"{kind} observed"]) if largest else None
                 for kind, chosen in (("systemic", [m["k"]]), ("homogeneous", cells))]
        frontier[alpha] = dict(largest=largest, systemic=reach[0], homogeneous=reach[1])
        rows.append([f"{alpha:.0%} are harder by 1 + Δ", *(f"Δ ≥ {x:.3f}" if x is not None else f"no Δ ≤ {largest:.3f}" for x in reach)])
    print("\nIs it only that some people are hard? The observed rate beside what models give that are independent given a difficulty")
    print_table(["", "systemic", "homogeneous"], rows)
    e = m["errors"]
    residual = divide(sums["joint"] / m["n"] - both, np.sqrt(np.outer(e * (1 - e), e * (1 - e))))
    np.fill_diagonal(residual, np.nan)
    print(f"Rasch: a = {a:.3f} ± {error:.3f} (0 = no shared difficulty)", end="")
    if np.isfinite(residual).any():
        i, j = np.unravel_index(np.nanargmax(np.abs(residual)), residual.shape)
        print(f"; the pair it misses most: {names[i]}, {names[j]}, correlation left {residual[i, j]:+.3f}", end="")
    print()
    return dict(rasch=dict(a=a, error=error), nulls=nulls, two_class=frontier, residual_correlation=residual)


def pairs(sums, m, data, names, columns, args):
    """Agreement of every two models, and warnings of near-identical ones."""
    k = m["k"]
    found = agreement(sums["joint"], sums["columns"].sum(0), m["n"])
    upper = np.triu_indices(k, 1)
    if data.answers is not None:
        found |= answer_agreement(data.answers[:, columns], data.labels, args.classes or len(set(data.labels.tolist())))
    ranked = sorted((found["kappa"][i, j], i, j) for i, j in zip(*upper) if np.isfinite(found["kappa"][i, j]))
    print(f"\nPairs of models, mean over {len(upper[0])}")
    text = dict(ratio="P(both fail) / expected", correlation="correlation of failures", kappa="error consistency κ",
                same_wrong="same answer when both wrong", capa="CAPA κ_p")
    with np.errstate(invalid="ignore"):
        means = {name: float(np.nanmean(table[upper])) if np.isfinite(table[upper]).any() else math.nan for name, table in found.items()}
    print_table(["", *(text[name] for name in found)], [["mean", *(show(x, 3) for x in means.values())]])
    if ranked:
        for word, (kappa, i, j) in (("most", ranked[-1]), ("least", ranked[0])):
            print(f"{word} alike: {names[i]}, {names[j]} (κ = {kappa:.3f})")
    for kappa, i, j in ranked:
        if kappa > 0.98:
            print(f"warning: {names[i]} and {names[j]} are nearly the same (κ = {kappa:.3f}); such a pair dominates every figure above")
    return found | dict(mean=means)


def systemic_answers(data, columns, args):
    """Whom do all models fail, and with what answers?"""
    failures = data.failed[:, columns] == 1
    rows = np.flatnonzero(failures.all(1))
    if not len(rows):
        return {}
    answers = data.answers[np.ix_(rows, columns)]
    same = (answers == answers[:, :1]).all(1)
    print(f"\n{len(rows):,} people are failed by all; to {same.sum():,} of them all models give the same wrong answer (a wrong label?)")
    shown = rows[np.argsort(~same, kind="stable")][: args.examples]
    modal = [np.bincount(data.answers[i, columns]).argmax() for i in shown]
    print_table(["for instance", "truth", "most frequent answer", "models that give it"],
                [[data.ids[i][:60], data.values[data.labels[i]], data.values[v], str(int((data.answers[i, columns] == v).sum()))]
                 for i, v in zip(shown, modal)])
    return dict(people=len(rows), same_wrong_answer=int(same.sum()))


def by_group(ecosystems, groups, chosen, args):
    """The paper's section 5: is one group's outcome more homogeneous, beyond what its errors give? D = H_obs − H_exp within a group.

    ecosystems: {name: tally}. The contrast of two groups has an interval (people resampled within groups) and a p-value (people dealt
    anew to the two groups); of two ecosystems on the same people, the difference of the contrasts, the same people resampled."""
    out, boot, sizes = {}, {}, next(iter(ecosystems.values()))["hist"].sum(1)
    shown = np.argsort(-sizes)[:12]
    for name, sums in ecosystems.items():
        rows = []
        for g in shown:
            d = homogeneity(sums["hist"][g], sums["columns"][g])
            draws = homogeneity(*resample(sums["buckets"][g], args.boot, [args.seed, g]))
            boot[name, g] = draws["homogeneous difference"]
            e = sums["columns"][g] / sizes[g]
            out[f"{name}, {groups[g]}"] = dict(n=sizes[g], errors=e, **d, interval=interval(boot[name, g]))
            rows.append([groups[g], f"{sizes[g]:,}", " ".join(f"{x:.3f}" for x in e) if len(e) <= 6 else f"{e.min():.3f} to {e.max():.3f}",
                         show(d["systemic difference"]), show(d["consistent difference"]),
                         f"{show(d['homogeneous observed'])} − {show(d['homogeneous expected'])} = {show(d['homogeneous difference'])} "
                         f"{between(interval(boot[name, g]))}"])
        print(f"\n{name} by {args.group}: observed less expected within the group")
        print_table([args.group, "people", "errors", "systemic", "consistent", "homogeneous [95 %]"], rows)
    if len(shown) < len(groups):
        print(f"({len(groups) - len(shown)} smaller groups not shown)")
    contrasts, n_draws = [], min(args.permutations, 2000)
    for a, b in chosen:
        row = dict(groups=(groups[a], groups[b]))
        for name, sums in ecosystems.items():
            d = out[f"{name}, {groups[a]}"]["homogeneous difference"] - out[f"{name}, {groups[b]}"]["homogeneous difference"]
            row[name] = dict(contrast=d, interval=interval(boot[name, a] - boot[name, b]))
            if sums["profiles"].size:
                rng = np.random.default_rng([args.seed, a, b])
                row[name]["p"] = p_value(abs(d), abs(permute_groups(sums["profiles"][a], sums["profiles"][b], n_draws, rng)))
        if len(ecosystems) == 2:
            x, y = ecosystems
            row["difference"] = dict(value=row[x]["contrast"] - row[y]["contrast"],
                                     interval=interval(boot[x, a] - boot[x, b] - boot[y, a] + boot[y, b]))
        contrasts.append(row)
    for name in ecosystems:
        tested = [row[name] for row in contrasts if "p" in row[name]]
        for test, p in zip(tested, holm([test["p"] for test in tested])):
            test["holm"] = p
    if contrasts:
        print(f"\nContrasts of two groups, D_a − D_b [95 %], p from {n_draws:,} deals (Holm)")
        print_table(["a, b", *ecosystems, *(["difference of the two"] if len(ecosystems) == 2 else [])],
                    [[", ".join(row["groups"]),
                      *(estimate(row[name]["contrast"], row[name]["interval"])
                        + (f" {row[name]['p']:.4f} ({row[name]['holm']:.4f})" if "p" in row[name] else "") for name in ecosystems),
                      *([estimate(*row["difference"].values())] if "difference" in row else [])] for row in contrasts])
    return dict(groups=out, contrasts=contrasts)


def times_of(data):
    """Columns named model@time → {time: {model: column}} in the order of time; without @ one time ""."""
    times = {}
    for j, name in enumerate(data.models):
        model, _, when = name.rpartition("@") if "@" in name else (name, "", "")
        times.setdefault(when, {})[model] = j
    everyone = list(dict.fromkeys(model for models in times.values() for model in models))
    for when, models in times.items():
        for model in everyone:
            if model not in models:
                has = next(other for other in times if model in times[other])
                fail(f'{data.name}: column "{model}{has and "@" + has}" does not pair up: there is no "{model}{when and "@" + when}"')
    return {when: {model: times[when][model] for model in everyone} for when in sorted(times)}


def mean_share(cases, name):
    shares = [case[name] for case in cases if math.isfinite(case[name])]
    return float(np.mean(shares)) if shares else math.nan


def improvements(data, times, args, tables):
    """Who gained when a model improved? One case for each model and each two consecutive times; others are taken at the earlier."""
    cases, whens = [], list(times)
    for t, later in zip(whens, whens[1:]):
        before = np.asarray(data.failed[:])[:, list(times[t].values())]
        for j, model in enumerate(times[t]):
            case = improvement(before, data.failed[:, times[later][model]], j)
            cases.append(dict(model=model, times=(t, later), drop=case["net"] / len(before), **case))
    kept = [case for case in cases if case["drop"] >= args.min_drop]
    print(f"\nWho gains when a model improves? {len(kept)} of {len(cases)} cases lower the error by {args.min_drop:g} or more; all others "
          "are left out")
    if not kept:
        return dict(cases=cases)
    print_table(["model, from, to", "failures", "improved", "declined", "systemic: of failures", "of improved", "count", "if random", "p"],
                [[f"{case['model']}, {case['times'][0]}, {case['times'][1]}", *(str(int(case[x].sum())) for x in ("initial", "improved",
                  "declined")), show(case["initial_share"], 3), show(case["systemic_share"], 3), str(case["improved"][-1]),
                  show(case["expected"], 1), f"{case['p']:.2g}"] for case in kept])
    shares = [mean_share(kept, x) for x in ("initial_share", "systemic_share")]
    print(f"mean: {show(shares[0], 3)} of a model's failures are systemic, and {show(shares[1], 3)} of its improvements. p: so few or "
          "fewer, were the improvements a random draw from its failures (hypergeometric)")
    for case in kept if tables else ():
        print(f"\n{case['model']}, {case['times'][0]} to {case['times'][1]}, by the number of other models that fail")
        print_table(["", *map(str, range(len(case["initial"])))],
                    [[x, *map(str, case[x])] for x in ("initial", "improved", "declined")])
    return dict(cases=cases, initial_share=shares[0], systemic_share=shares[1])


def over_time(data, times):
    rows = []
    for when, models in times.items():
        sums = tally(data.failed[:, list(models.values())], detail=False)
        rates = homogeneity(sums["hist"][0], sums["columns"][0])
        rows.append(dict(time=when, mean_error=sums["columns"].mean() / len(data.failed), **rates))
    print("\nOver time")
    print_table(["time", "mean error", "systemic", "expected", "homogeneous", "expected", "dispersion"],
                [[row["time"], show(row["mean_error"]), show(row["systemic observed"]), show(row["systemic expected"]),
                  show(row["homogeneous observed"]), show(row["homogeneous expected"]), show(row["dispersion"], 3)] for row in rows])
    return rows


def how_many(m, hist):
    """How many models must a user try?"""
    observed, independent = subset_curve(hist, m["errors"])
    chosen = [i for i in range(m["k"]) if i < 6 or i == m["k"] - 1]
    print("\nHow many models must a user try? Share of people whom m models fail, all of them, mean over all choices of m")
    print_table(["m", *(str(i + 1) for i in chosen)], [["observed", *(show(observed[i]) for i in chosen)],
                                                       ["if independent", *(show(independent[i]) for i in chosen)]])
    return dict(observed=observed, independent=independent)


def coded(data, column, least=1):
    """A column of texts → (codes, their texts in order of appearance)."""
    texts = data.columns[column]
    names = {text: code for code, text in enumerate(dict.fromkeys(texts))}
    codes = np.array([names[text] for text in texts])
    sizes = np.bincount(codes)
    if sizes.min() < least:
        i = int(np.flatnonzero(codes == sizes.argmin())[0])
        fail(f'{data.name}: row {data.lines[i]}, column "{column}": "{texts[i]}" is a group of one; merge it with another or drop the row')
    if len(names) > 256:
        fail(f'{data.name}: column "{column}" has {len(names)} different values: is it a group?')
    return codes, list(names)


def ragged_report(data, names, args):
    """Each person met other models: by the number of models met, observed and expected (our definition; see ragged_homogeneity)."""
    failures = data.failed[(data.failed != 2).any(1)]
    met, n = (failures != 2).sum(1), len(failures)
    rates, found = ragged_homogeneity(failures)
    rng, draws = np.random.default_rng(args.seed), []
    for _ in tqdm(range(args.boot), "bootstrap", disable=args.quiet):
        w = np.bincount(rng.integers(n, size=n), minlength=n)
        rates_b, again = ragged_homogeneity(failures, w)
        draws.append([[w @ observed / n, w @ expected / n] for observed, expected in again.values()])
    draws = np.array(draws)  # (resamples, kind, observed and expected)
    probabilities = poisson_binomial(np.where(failures != 2, rates, 0))
    print(f"\n{data.name}: {n:,} people, {len(names)} models, each person met {met.min()} to {met.max()} of them")
    rows, sizes, total = [], {}, np.zeros(2)
    for size in range(1, met.max() + 1):
        who = met == size
        if who.any():
            counts = np.bincount((failures[who] == 1).sum(1), minlength=size + 1)
            chi2, _, dof, _ = goodness_of_fit(counts, probabilities[who, : size + 1].sum(0), 0)
            total += chi2, dof
            sums = {kind: [float(x[who].sum()) for x in pair] for kind, pair in found.items()}
            sizes[size] = dict(people=int(who.sum()), **sums)
            rows.append([str(size), f"{who.sum():,}", *(text for o, e in sums.values() for text in (f"{o:,.0f}", f"{e:,.1f}")),
                         show(chi2, 1) if dof else "–", str(dof)])
    print_table(["models met", "people", "failed by all", "expected", "failed by none", "expected", "χ²", "degrees of freedom"], rows)
    figures = dict(rates=rates, sizes=sizes, chi2=total[0], dof=total[1], p=chi_square_tail(*total) if total[1] else math.nan)
    print(f"all sizes: χ² = {total[0]:,.1f} on {total[1]:.0f} degrees of freedom, p = {figures['p']:.2g} (conservative: the rates are "
          "those of the same people)\n")
    rows = []
    for i, (kind, (observed, expected)) in enumerate(found.items()):
        o, e = draws[:, i].T
        d, r = interval(o - e), interval(divide(o, e))
        figures[kind] = dict(observed=observed.mean(), expected=expected.mean(), difference=d, ratio=r)
        o, e = observed.mean(), expected.mean()
        rows.append([KINDS[kind], show(o), show(e), estimate(o - e, d), estimate(float(divide(o, e)), r, 2)])
    print_table(["", "observed", "expected", "difference [95 %]", "ratio [95 %]"], rows)
    return figures


def analyse(data, args, device):
    """The whole report on one table → its figures."""
    times = times_of(data)
    now = list(times)[-1]
    names, columns = list(times[now]), list(times[now].values())
    mapped = isinstance(data.failed, Mapped)
    if not mapped and (data.failed == 2).any():
        return ragged_report(data, names, args)
    by = args.group or "group"
    group, groups = coded(data, by, least=2) if by in data.columns else (None, ["all"])
    args.group = by if by in data.columns else None
    sides = {"models": [j for j, name in enumerate(names) if not (args.second and name.startswith(args.second))]}
    if args.second:
        sides[args.second.rstrip(":_ ")] = [j for j in range(len(names)) if j not in sides["models"]]
    figures, tallies = {}, {}
    for title, side in sides.items():
        if len(side) < 2:
            fail(f"{data.name}: {len(side)} column of {title}: an ecosystem needs two or more")
        at, called = [columns[j] for j in side], [names[j] for j in side]
        table = data.failed if mapped else data.failed[:, at]
        sums = tallies[title] = tally(table, group, len(groups), device=device)
        m = measure(sums, args)
        print_measures(f"{data.name}{now and ', ' + now}{', ' + title if args.second else ''}", called, m, args)
        stratum = args.strata or next((name for name in (args.label or "label", by) if name in data.columns), None)
        strata = None
        if stratum:
            codes, which = coded(data, stratum)
            strata = stratum, tally(table, codes, len(which), detail=False, device=device)
        out = dict(measures=m, hardness=hardness(sums, m, called, strata), pairs=pairs(sums, m, data, called, at, args),
                   users=how_many(m, sums["hist"].sum(0)))
        if args.best_subset:
            if not 1 <= args.best_subset < len(side):
                fail(f"--best_subset {args.best_subset}: want 1 to {len(side) - 1}")
            chosen, s, exact = best_subset(table, args.best_subset)
            print(f"best {args.best_subset} of {len(side)} together ({'all subsets tried' if exact else 'greedy'}): "
                  f"{', '.join(called[j] for j in chosen)}; {show(s)} are failed by all of them")
            out["best_subset"] = dict(models=[called[j] for j in chosen], systemic=s, exact=exact)
        if data.answers is not None:
            out["answers"] = systemic_answers(data, at, args)
        figures[title] = dict(names=called, **out)
    if args.group:
        for name in args.contrast or ():
            if name not in groups:
                fail(f'{data.name}: --contrast {name}: no such group; there are {", ".join(groups)}')
        largest = np.argsort(-np.bincount(group), kind="stable")[:4]
        contrast = [tuple(map(groups.index, args.contrast))] if args.contrast else list(combinations(largest, 2))
        figures["groups"] = by_group(tallies, groups, contrast, args)
    if len(times) > 1:
        figures["time"] = over_time(data, times)
        figures["improvement"] = improvements(data, times, args, args.task == "improve")
    return figures


def write_report(args, figures, draw):
    """results.json and the figure of a task; their paths are the last thing printed."""
    if dist.is_initialized() and dist.get_rank():
        return
    out = Path(args.out or f"out/ecosystem/{args.task}")
    path = save_results(out, args, plain(figures))
    print("\n" + str(path), draw(out))


def unicode(args):
    """The offline ecosystem: four classifiers that differ in features, model and data predict a character's category from its name."""
    device, _, rank, world = set_up(args)
    torch.set_num_threads(1)  # for matrices as small as these more threads only wait for each other
    names, categories, (train, test) = unicode_data(args.seed)
    classes = sorted(set(categories))
    y = torch.tensor([classes.index(c) for c in categories])
    jobs = [(provider, year) for provider in PROVIDERS for year in YEARS]
    answers = {}
    for provider, year in tqdm(jobs[rank::world], "train", disable=args.quiet or rank > 0):
        features, hidden, share = PROVIDERS[provider]
        x = hashed(names, features)
        rows = train[: int(len(train) * YEARS[year])]
        rows = rows[: int(len(rows) * share)]
        answers[f"{provider}@{year}"] = train_provider(x[rows], y[rows], x[test], hidden, len(classes), args.seed, device).numpy()
    if world > 1:
        everyone = [None] * world
        dist.all_gather_object(everyone, answers)
        answers = {name: column for share in everyone for name, column in share.items()}
    models = [f"{provider}@{year}" for provider, year in jobs]
    table = 1 + np.stack([answers[model] for model in models], 1)
    first = [names[i].split()[0] for i in test]
    common = {name for name, _ in Counter(first).most_common(6)}
    group = [name if name in common else "other" for name in first]
    labels = 1 + y[test].numpy()
    data = Outcomes("characters", models, (table != labels[:, None]).astype(np.uint8), table, labels, ["", *classes],
                    dict(script=group, category=[categories[i] for i in test]), [names[i] for i in test], list(range(len(test))))
    args.group, args.strata = "script", "category"
    figures = analyse(data, args, device)
    write_report(args, figures, lambda out: plot_report(out, args, figures))


def report(args):
    """Analyse the given tables; several of them are compared at the end."""
    device, *_ = set_up(args)
    if not args.files:
        fail(f"{args.task}: which file? python ecosystem.py {args.task} FILE.csv")
    group, everything, rows = args.group, {}, []
    for path in args.files:
        args.group = group
        data = read_table(path, args)
        if args.task == "improve" and len(times_of(data)) < 2:
            fail(f"{path}: columns must be named model@time, with two times or more; there are {', '.join(data.models)}")
        everything[data.name] = figures = analyse(data, args, device)
        if "models" in figures:
            m = figures["models"]["measures"]
            rows.append([data.name, str(m["k"]), f"{m['n']:,}", *(f"{m[f'{kind} {x}']:.3g}" for kind in ("systemic", "homogeneous")
                                                                  for x in ("observed", "expected")), show(m["dispersion"], 3)])
    if len(rows) > 1:
        print("\nAll tables")
        print_table(["", "models", "people", "systemic", "expected", "homogeneous", "expected", "dispersion"], rows)
    first = next(iter(everything.values()))
    write_report(args, everything, lambda out: (plot_report if "models" in first else plot_ragged)(out, args, first))


def ddi(args):
    """The paper's section 5. Columns image_id, skin_tone, malignant, one for each model, and one for each dermatologist with the prefix
    human: (Daneshjou et al. 2022; the images need registration at ddi-dataset.github.io)."""
    args.label, args.group, args.second = args.label or "malignant", args.group or "skin_tone", args.second or "human:"
    report(args)


HAPI = "https://storage.googleapis.com/hapi-data/hapi.tar.gz"  # Chen et al. 2022, 205 MB
HAPI_TASKS = {  # task: (providers, datasets) of the paper
    "fer": (("google", "facepp", "microsoft"), ("rafdb", "afnet", "expw", "ferplus")),
    "scr": (("google", "ibm", "microsoft"), ("fluent", "digit", "amnist")),
    "sa": (("google", "amazon", "baidu"), ("shop", "yelp", "imdb", "waimai")),
}


def read_hapi(root):
    """The paper's part of HAPI, from the archive or the folder that it unpacks to → {(task, dataset): {api@year or "labels": {example:
    answer}}}. Joined by example_id, never by order."""
    pattern = re.compile(r"(?:^|/)tasks/(fer|scr|sa)/([^/]+)/(?:labels|([a-z]+)_\1/(\d\d)-\d\d-\d\d)\.json$")
    found = {}

    def add(name, raw):
        match = pattern.search(name)
        if match and match[2] in HAPI_TASKS[match[1]][1] and match[3] in (None, *HAPI_TASKS[match[1]][0]):
            column = f"{match[3]}@20{match[4]}" if match[3] else "labels"
            try:
                answers = {str(row["example_id"]): str(row["predicted_label" if match[3] else "true_label"]) for row in json.loads(raw())}
            except (ValueError, KeyError, TypeError) as error:
                fail(f"{name}: not a list of example_id and label as HAPI has it ({type(error).__name__}: {error})")
            found.setdefault((match[1], match[2]), {})[column] = answers

    try:
        if root.is_dir():
            for path in sorted(root.rglob("*.json")):
                add(path.as_posix(), path.read_bytes)
        else:
            with tarfile.open(root) as archive:
                for member in archive:
                    add(member.name, lambda member=member: archive.extractfile(member).read())
    except (tarfile.TarError, OSError, EOFError) as error:
        fail(f"{root}: neither a folder nor a whole archive ({error}); the archive is {HAPI}, 205 MB")
    if not found:
        fail(f"{root}: no files tasks/fer|scr|sa/<dataset>/<api>/<date>.json in it, as {HAPI} has them")
    return found


def hapi(args):
    """The paper's section 3 and 4: eleven datasets, three commercial APIs each, 2020 to 2022."""
    device, *_ = set_up(args)
    root = Path(args.data) if args.data else download(HAPI)
    rows, figures, gains, points = [], {}, [], []
    for (task, dataset), columns in sorted(read_hapi(root).items()):
        labels = columns.pop("labels", None) or fail(f"{root}: no labels.json of {task}/{dataset}")
        models = sorted(columns, key=lambda name: name.split("@")[::-1])
        people = sorted(set(labels).intersection(*columns.values()))
        if not people or len(models) < 2:
            fail(f"{root}: {task}/{dataset} has {len(models)} columns and {len(people)} examples in all of them")
        table = np.array([[columns[model][i] != labels[i] for model in models] for i in people], np.uint8)
        data = Outcomes(f"{task}/{dataset}", models, table, ids=people)
        times = times_of(data)
        for when, at in times.items():
            m = measure(tally(table[:, list(at.values())], device=device), args)
            figures[f"{data.name} {when}"] = m
            points.append((task, m))
            rows.append([f"{data.name} {when}", f"{m['n']:,}", " ".join(f"{e:.3f}" for e in m["errors"]),
                         *(show(m[f"{kind} {x}"]) for kind in ("systemic", "homogeneous") for x in ("observed", "expected")),
                         less(m["p"]["homogeneous"], args.permutations)])
        if len(times) > 1:
            print(f"\n{data.name}", end="")
            gains += [dict(dataset=data.name, **case) for case in improvements(data, times, args, False)["cases"]]
    adjusted = holm([m["p"]["homogeneous"] for _, m in points])
    print("\nEvery dataset and year")
    print_table(["", "people", "errors", "systemic", "expected", "homogeneous", "expected", "p", "Holm"],
                [[*row, less(p, args.permutations)] for row, p in zip(rows, adjusted)])
    above = sum(m["homogeneous observed"] > m["homogeneous expected"] for _, m in points)
    kept = [case for case in gains if case["drop"] >= args.min_drop]
    print(f"\nThe paper's first finding, homogeneous outcomes above the baseline everywhere: {above} of {len(points)}")
    if kept:
        improved, initial = (show(mean_share(kept, x), 3) for x in ("systemic_share", "initial_share"))
        print("Its second, as quoted by others: on average a tenth of improvements are on people whom all others fail. Here "
              f"{improved} of improvements and {initial} of failures, mean over {len(kept)} cases")
    write_report(args, dict(datasets=figures, improvements=gains), lambda out: plot_datasets(out, args, points))


ALPACA = "https://raw.githubusercontent.com/tatsu-lab/alpaca_eval/main/results/{}/weighted_alpaca_eval_gpt4_turbo/annotations.json"
ALPACA_MODELS = ("gpt-4o-2024-05-13", "claude-3-5-sonnet-20240620", "Meta-Llama-3-70B-Instruct", "Qwen1.5-72B-Chat", "mistral-large-2402")


def alpaca(args):
    """Language models on AlpacaEval 2: a model fails a person's instruction when the judge prefers the reference's answer."""
    device, *_ = set_up(args)
    columns, datasets = {}, {}
    for model in args.models or ALPACA_MODELS:
        path = Path(args.data) / model / "annotations.json" if args.data else download(ALPACA.format(model))
        try:
            rows = json.loads(path.read_bytes())
            columns[model] = {row["instruction"]: row["preference"] <= 1.5 for row in rows if row["preference"] is not None}
            datasets |= {row["instruction"]: row.get("dataset") or "none" for row in rows}
        except (OSError, ValueError, KeyError, TypeError) as error:
            fail(f"{path}: no list of instruction and preference as AlpacaEval has it ({type(error).__name__}: {error})")
    people = [x for x in datasets if all(x in column for column in columns.values())]
    if len(columns) < 2 or not people:
        fail(f"{len(columns)} models and {len(people)} instructions in all of them: want two models or more, and one instruction")
    table = np.array([[columns[model][x] for model in columns] for x in people], np.uint8)
    data = Outcomes("AlpacaEval 2", list(columns), table, columns=dict(group=[datasets[x] for x in people]), ids=people,
                    lines=list(range(1, len(people) + 1)))
    figures = analyse(data, args, device)
    write_report(args, figures, lambda out: plot_report(out, args, figures))


class Simulated:
    """People drawn block by block from (seed, block), so that memory does not grow and any number of ranks draws the same people.

    copula: failure when √ρ·z + √(1 − ρ)·ε < Φ⁻¹(e_j), with a z for each person; rasch: with probability σ(logit(e_j) + a·z)."""

    def __init__(self, n, errors, truth, strength, seed):
        self.shape, self.errors, self.truth, self.strength, self.seed = (n, len(errors)), errors, truth, strength, seed

    def probability(self, z):
        """P(failure | z): (…, 1) → (…, k), float64."""
        e = torch.tensor(self.errors, dtype=torch.float64)
        if self.truth == "rasch":
            return torch.sigmoid(torch.logit(e) + self.strength * z)
        return torch.special.ndtr((torch.special.ndtri(e) - math.sqrt(self.strength) * z) / math.sqrt(1 - self.strength))

    def expected(self):
        """Distribution of the number of failures (k + 1,), and every model's error (k,), by quadrature over z."""
        p, w = self.probability(Z[:, None]).numpy(), LOG_W.exp().numpy()
        return w @ poisson_binomial(p), w @ p

    def __getitem__(self, rows):
        rng = np.random.default_rng([self.seed, rows.start // BLOCK])
        z = torch.from_numpy(rng.standard_normal((rows.stop - rows.start, 1)))
        return (rng.random((len(z), self.shape[1])) < self.probability(z).numpy()).astype(np.uint8)


def simulate(args):
    """Known truth: does the report find it?"""
    device, *_ = set_up(args)
    errors = np.linspace(*args.errors, args.k or 5)
    people = Simulated(int(args.n or 1e5), errors, args.truth, args.rho if args.truth == "copula" else args.a, args.seed)
    sums = tally(people, device=device)
    m, names = measure(sums, args), [f"model {j}" for j in range(len(errors))]
    print_measures(f"simulated, {args.truth} {people.strength:g}", names, m, args)
    truth, real = people.expected()
    truth = homogeneity(truth, real)
    hard = hardness(sums, m, names, None)
    print("\nThe truth beside the estimates")
    rows = [[name, show(float(truth[name])), show(float(m[name])), between(m["interval"][name]),
             "inside" if m["interval"][name][0] <= truth[name] <= m["interval"][name][1] else "outside"]
            for name in truth if not name.endswith("expected")]
    print_table(["", "truth", "estimate", "95 %", "truth is"], rows)
    figures = {"models": dict(names=names, measures=m, hardness=hard, truth=truth,
                              pairs=agreement(sums["joint"], sums["columns"].sum(0), m["n"]), users=how_many(m, sums["hist"].sum(0)))}
    write_report(args, figures, lambda out: plot_report(out, args, figures))


def bench(args):
    """The packed pass against counting unpacked outcomes."""
    device, *_ = set_up(args)
    n, k = int(args.n or 1e7), args.k or 64
    words = torch.randint(-(2**31), 2**31, (n, -(-k // 32)), dtype=torch.int32)
    if k % 32:
        words[:, -1] &= 2 ** (k % 32) - 1
    bits = torch.from_numpy(unpack_bits(words[: n // 10].numpy(), k))
    words = words.to(device)
    rows, figures = [], {}

    def clock(name, people, run):
        best = math.inf
        for _ in range(3):
            start = time.perf_counter()
            result = run()
            if device.type == "cuda":
                torch.cuda.synchronize()
            best = min(best, time.perf_counter() - start)
        figures[name] = dict(seconds=best * n / people, people_a_second=people / best)
        rows.append([name, f"{best * n / people:.3f}", f"{people / best / 1e6:,.1f}"])
        return result

    hist, columns = clock("packed, plain", n, lambda: popcount_histogram(words, k))
    if fused_popcount_histogram and device.type == "cuda":
        fused = clock("packed, kernel", n, lambda: fused_popcount_histogram(words, k))
        assert torch.equal(fused[0], hist) and torch.equal(fused[1], columns)
    clock("one byte an outcome (a tenth of the people, × 10)", len(bits),
          lambda: (torch.bincount(bits.sum(1, dtype=torch.int64), minlength=k + 1), bits.sum(0, dtype=torch.int64)))
    print(f"histogram of failures and errors of {n:,} people and {k} models on {device}")
    print_table(["", "seconds", "million people a second"], rows)
    write_report(args, figures, lambda out: "no figure (bench)")


# ============================================================================================== figures


def plot_report(out, args, figures):
    """Six panels on one ecosystem: profile, nulls, users, pairs, groups, improvement; those that there are."""
    side = figures["models"]
    m, k = side["measures"], side["measures"]["k"]
    t = np.arange(k + 1)

    def profile(ax):
        observed, low, high = m["observed"], *np.transpose(m["profile interval"])
        ax.bar(t - 0.2, observed, 0.4, label="observed (95 %)", yerr=[observed - low, high - observed], capsize=2, color="C0")
        ax.bar(t + 0.2, m["expected"], 0.4, label="if models failed independently", color="C7")
        seen = np.concatenate([observed[observed > 0], m["expected"][m["expected"] > 1e-9]])
        ax.set(yscale="log", ylim=(seen.min() / 2, 12), xlabel="number of models that fail a person", ylabel="share of people",
               title="More people are failed by all, and by none")
        ax.xaxis.get_major_locator().set_params(integer=True)
        ax.legend()

    def nulls(ax):
        rates = {"observed": m["systemic observed"], **{name: p[-1] for name, p in side["hardness"]["nulls"].items()}}
        ax.barh(list(rates)[::-1], list(rates.values())[::-1], color=["C7"] * (len(rates) - 1) + ["C0"])
        ax.set(xlabel="share of people failed by all", title="Is it only that some are hard?", xscale="log")
        ax.set_xlim(max(min(x for x in rates.values() if x > 0) / 3, 1e-9))

    def users(ax):
        for name, style in (("observed", "C0o-"), ("independent", "C7s--")):
            ax.plot(range(1, k + 1), np.maximum(side["users"][name], 1e-12), style, label=name, ms=4)
        ax.set(yscale="log", xlabel="models that a user tries", ylabel="share failed by all of them",
               title="How many models must a user try?")
        ax.xaxis.get_major_locator().set_params(integer=True)
        ax.legend()

    def pairs(ax):
        kappa = np.where(np.eye(k, dtype=bool), np.nan, side["pairs"]["kappa"])
        image = ax.imshow(kappa, cmap="viridis", vmin=min(0, np.nanmin(kappa)), vmax=1)
        ax.set(title="Error consistency κ of two models")
        if k <= 12:
            ax.set_xticks(range(k), side["names"], rotation=30, ha="right", fontsize=7)
            ax.set_yticks(range(k), side["names"], fontsize=7)
            for i, j in np.argwhere(np.isfinite(kappa)):
                ax.text(j, i, f"{kappa[i, j]:.2f}", ha="center", va="center", color="white" if kappa[i, j] < 0.6 else "black", fontsize=8)
        ax.figure.colorbar(image, ax=ax, shrink=0.8)

    def groups(ax):
        sides = list(dict.fromkeys(name.split(", ")[0] for name in figures["groups"]["groups"]))
        for i, side_name in enumerate(sides):
            rows = {name.split(", ", 1)[1]: g for name, g in figures["groups"]["groups"].items() if name.startswith(side_name + ", ")}
            d = np.array([g["homogeneous difference"] for g in rows.values()])
            low, high = np.transpose([g["interval"] for g in rows.values()])
            ax.errorbar(d, np.arange(len(d)) + 0.15 * i, xerr=[d - low, high - d], fmt="os"[i], capsize=3, label=side_name)
            ax.set_yticks(range(len(rows)), rows)
        ax.invert_yaxis()
        ax.axvline(0, color="C7")
        ax.set(xlabel="homogeneous outcomes, observed less expected", title=f"By {args.group}")
        if len(sides) > 1:
            ax.legend()

    def gains(ax):
        cases = [case for case in figures["improvement"]["cases"] if case["drop"] >= args.min_drop]
        initial, improved = (sum(case[x] for case in cases) for x in ("initial", "improved"))
        ax.bar(t[:-1] - 0.2, initial / initial.sum(), 0.4, label="a model's failures", color="C7")
        ax.bar(t[:-1] + 0.2, improved / max(improved.sum(), 1), 0.4, label="those it mends later", color="C0")
        ax.set(xlabel="number of other models that fail the person", ylabel="share", title="Who gains when a model improves?")
        ax.xaxis.get_major_locator().set_params(integer=True)
        ax.legend()

    panels = [profile, nulls, users, pairs]
    panels += [groups] if "groups" in figures else []
    panels += [gains] if any(case["drop"] >= args.min_drop for case in figures.get("improvement", {}).get("cases", [])) else []
    columns = 2 if len(panels) == 4 else 3

    def draw(axes):
        for ax, panel in zip(axes.flat, panels):
            panel(ax)
        for ax in axes.flat[len(panels) :]:
            ax.axis("off")

    return figure(out, "report.png", args, draw, ncols=columns, nrows=-(-len(panels) // columns), squeeze=False, figsize=(5 * columns, 7.6))


def plot_ragged(out, args, figures):
    def draw(axes):
        for ax, kind in zip(axes[0], ("systemic", "consistent")):
            sizes = list(figures["sizes"])
            observed, expected = np.array([np.divide(row[kind], row["people"]) for row in figures["sizes"].values()]).T
            ax.plot(sizes, observed, "C0o-", label="observed")
            ax.plot(sizes, expected, "C7s--", label="if models failed independently")
            ax.set(xlabel="number of models that a person met", ylabel="share of people", title=KINDS[kind])
            ax.xaxis.get_major_locator().set_params(integer=True)
            ax.legend()

    return figure(out, "report.png", args, draw, ncols=2, squeeze=False, figsize=(10, 4))


def plot_datasets(out, args, points):
    """Observed against expected rates, a point for each dataset and year: the paper's figure 2 in one picture."""

    def draw(axes):
        for ax, kind in zip(axes[0], ("systemic", "homogeneous")):
            for i, task in enumerate(HAPI_TASKS):
                mine = [m for name, m in points if name == task]
                ax.plot([m[f"{kind} expected"] for m in mine], [m[f"{kind} observed"] for m in mine], "os^"[i], label=task, alpha=0.7)
            top = max(m[f"{kind} observed"] for _, m in points)
            ax.plot([0, top], [0, top], "k-", lw=0.8)
            ax.set(xlabel="if models failed independently", ylabel="observed share of people", title=KINDS[kind])
            ax.legend()

    return figure(out, "hapi.png", args, draw, ncols=2, squeeze=False, figsize=(10, 4.4))


# ============================================================================================== command line

TASKS = dict(unicode=unicode, report=report, improve=report, hapi=hapi, ddi=ddi, alpaca=alpaca, simulate=simulate, bench=bench)


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.error = fail  # one line, exit code 2
    flag, count = parser.add_argument, number(int, 1)

    def names(text):
        return [name.strip() for name in text.split(",")]

    flag("task", nargs="?", choices=TASKS, default="unicode", help="unicode (default): the offline ecosystem; report FILE…: your tables; "
         "improve FILE: who gains when a model improves; hapi: the paper's eleven datasets (download); ddi FILE: dermatology by skin tone; "
         "alpaca: language models (download); simulate: known truth; bench: speed of the packed pass")
    flag("files", nargs="*", help="report, improve, ddi: .csv, .npz or .npy")
    flag("--label", help="column with the truth (label; ddi: malignant)")
    flag("--outcome", choices=("correct", "fail"), help="cells are 0 and 1; what a 1 means")
    flag("--group", help="column with groups (group, if there is one; ddi: skin_tone)")
    flag("--strata", help="column within which models may be independent, as a null (the label, else the group)")
    flag("--id", help=f"column that names a person ({', '.join(IDS)})")
    flag("--models", type=names, help="columns to take, with commas (all the others); alpaca: names of models")
    flag("--second", metavar="PREFIX", help="columns that begin so are a second ecosystem on the same people (ddi: human:)")
    flag("--contrast", type=names, metavar="A,B", help="two groups to compare (all pairs of the four largest)")
    flag("--missing", choices=("fail", "drop", "ignore"), help="empty cells: count as failures, leave the person out, or compare everybody "
         "with the models that they met")
    flag("--best_subset", type=count, metavar="M", help="find the M models that together fail the fewest people")
    flag("--classes", type=number(int, 2), help="number of possible answers, for CAPA (those among the labels)")
    flag("--min_drop", type=number(float, -1, 1), default=0.005, help="least fall of an error to count as improvement (0.005; -1: any)")
    flag("--boot", type=number(int, 20), default=2000, help="bootstrap resamples (2000)")
    flag("--permutations", type=count, default=100_000, help="shuffles for p-values (100000)")
    flag("--examples", type=number(int, 0), default=5, help="people failed by all to show (5)")
    flag("--n", type=number(float, 2, 1e9), help="people: simulate (1e5), bench (1e7)")
    flag("--k", type=number(int, 1, 4096), help="models: simulate (5), bench (64), packed .npy")
    flag("--truth", choices=("copula", "rasch"), default="copula", help="simulate: Gaussian copula or shared difficulty")
    flag("--rho", type=number(float, 0, 0.999), default=0.3, help="simulate: correlation in the copula (0.3)")
    flag("--a", type=number(float, 0, 10), default=1.0, help="simulate: discrimination of the Rasch model (1)")
    flag("--errors", type=number(float, 0.0001, 0.9999), nargs=2, default=(0.05, 0.3), metavar=("LOW", "HIGH"), help="simulate: errors of "
         "the best and the worst model (0.05 0.3)")
    flag("--data", help="hapi: the archive or its folder; alpaca: a folder of <model>/annotations.json; instead of a download")
    flag("--device", default="auto", help="auto is cuda, else mps, else cpu")
    flag("--dtype", choices=("auto", "float32"), default="auto", help="of the classifiers")
    flag("--seed", type=number(int, 0, 2**31), default=0, help="of data split, classifiers, bootstrap, shuffles (0)")
    flag("--out", help="folder for results and figure (out/ecosystem/<task>)")
    flag("--no_plot", action="store_true", help="write no figure")
    flag("--quiet", action="store_true", help="no progress bars")
    args = parser.parse_args(argv)
    if args.contrast and len(args.contrast) != 2:
        fail(f"--contrast {','.join(args.contrast)}: want two groups, A,B")
    if args.files and args.task not in ("report", "improve", "ddi"):
        fail(f"{args.task} reads no files; report, improve and ddi do")
    return args


def main():
    args = parse_args()
    if int(os.environ.get("RANK", 0)):
        sys.stdout = open(os.devnull, "w")  # rank 0 speaks for all
    try:
        TASKS[args.task](args)
        if dist.is_initialized():
            dist.barrier()  # a rank that leaves while another goes on can abort at its exit
            dist.destroy_process_group()
    except KeyboardInterrupt:
        fail("stopped")


if __name__ == "__main__":
    main()
