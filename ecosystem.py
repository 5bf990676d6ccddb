"""Ecosystem-level analysis of deployed machine learning (Toups and others, NeurIPS 2023; arXiv 2307.05862).

The problem. A person meets all the models that are deployed for a need: every screener of résumés, every voice API.
Accuracy looks at one model, a column of the table of outcomes. What a person lives through is a row.

The idea. Stack the outcomes of k models on n people, 1 = this model fails this person, and count rows. With errors e_j
(the means of columns) and the number of failures T_i of person i,

    P_obs(t) = #{i : T_i = t} / n                 observed
    P_exp    = PoissonBinomial(e_1 … e_k)         expected, if the models failed independently
    systemic failure P(k): all fail; consistent success P(0): none fails; homogeneous outcome: either
    D = observed − expected; phi = D / (min e − expected), systemic: 0 independent, 1 as nested as the errors allow

D > 0: the same people are failed again and again. The unique rows and how many people have each, `outcome_profiles`,
carry everything. Observed rates have exact intervals; those of D, ratios and contrasts join two intervals into one
(`mover`), because normal and bootstrap intervals fail where few people are failed by all. p-values shuffle each model's
outcomes among the people. They are two-sided: outcomes can also be less homogeneous than chance.

How to run it.

    python ecosystem.py                    four classifiers of Unicode characters, offline (12 s of CPU)
    python ecosystem.py report FILE…       your table, a row a person: a label and a column of answers for each model,
                                           or --outcome correct|fail and columns of 0 and 1
    python ecosystem.py improve FILE…      columns model@time: who gains when a model improves
    python ecosystem.py ddi FILE           section 5: skin tones, models and dermatologists
    python ecosystem.py hapi               sections 3 and 4: the paper's eleven datasets (205 MB)

The reader never guesses: it prints what it took for what, and refuses what is no label with the way to say what it is.

What we measured (--seed 0, 1, 2; 8,000 characters of Unicode 14; CPU). The paper: homogeneous outcomes exceed the
expected ones on all eleven datasets; a tenth of improvements (as quoted by others) reach people whom all others fail.

    systemic failure        1.69, 1.75, 1.74 %; expected 0.0023, 0.0025, 0.0022 %. Seed 0: 727 times [595, 878]
    homogeneous outcomes    82.2, 82.4, 82.8 %; expected 70.6, 70.4, 71.1 %. Seed 0: D = 11.6 points [10.6, 12.6]
    who gains               32, 31, 29 % of a model's failures are systemic, 19, 19, 16 % of its improvements
    are some people hard?   systemic failure if independent within categories: 0.19, 0.12, 0.16 %; if a factor common to
                            all errors made people hard: at most 0.48, 0.53, 0.50 %; Rasch: 1.61, 1.71, 1.63 %

Both findings hold here. A common factor cannot make 1.7 %: it ends where the worst model always fails. A difficulty on
log odds (Rasch) can, but it is fitted to the outcomes and cannot tell hard people from flaws that models share: from
four copies of one model, 5 % of outcomes flipped, it makes 6.7 of 8.7 %, and nobody was hard.

Coverage of 95 % intervals (1,000 tables each; 100 and 1,000 people; k = 2, 3, 6; expected counts 0.3 to 100; models
independent, or half of the people hard): at least 93.1 %. Tests at 5 %: shuffles reject at most 5.6 %, contrasts 4.7 %.

What did not hold. Expected rate and ratio of homogeneous outcomes have no interval: the delta method fails near errors
of ½. For a model that never fails, all but the observed systemic rate is undefined; with less than one expected failure
of a model, the interval of the expected rate does not hold (100 people, errors 0.005 and 0.3: 88 %). We did not run
HAPI and DDI themselves. The paper has a hard class too; its formula here, other nulls, phi and intervals are ours.

Try: --epochs 1: worse models, S = 3.8 %, and yet the ratio to the expected rate is only 44 where it was 727.
Last line of PROVIDERS "words, MLP again": (lambda name: name.split(), 64), a copy: κ = 1, S = 1.86 %, and the ratio
jumps to 2,800, since the expected rate falls. Ratios of different ecosystems do not compare; phi is 0.45, was 0.41.
N_FEATURES = 256: words collide, and alike for models that have the same features: S = 3.3 %, phi = 0.48.
"""

import argparse
import functools
import gzip
import json
import math
import os
import re
import sys
import tarfile
import unicodedata
import zlib
from collections import Counter
from dataclasses import dataclass
from itertools import combinations, product
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

CACHE = Path(os.environ.get("NANOPAPERS_CACHE", "~/.cache/nanopapers")).expanduser()

# ==================================================================================== observed against chance

# a person's outcome: all models fail, none fails, or either → cells of P(t)
KINDS = {"systemic": [-1], "consistent": [0], "homogeneous": [0, -1]}


def outcome_profiles(failed):
    """The one data structure. failed (n, k) 0/1, 1 = this model fails this person → profiles (P, k), the different rows
    of failed, and counts (P,), how many people have each; int64."""
    packed = np.packbits(failed, axis=1).copy()
    rows = packed.view(f"V{packed.shape[1]}")[:, 0]  # a packed row sorts as one item, faster than as k numbers
    _, first, counts = np.unique(rows, return_index=True, return_counts=True)
    return failed[first].astype(np.int64), counts


def tally(profiles, counts):
    """counts (…, P) → people by number of failures T, hist (…, k + 1), and failures by model, columns (…, k)."""
    return counts @ np.eye(profiles.shape[1] + 1, dtype=np.int64)[profiles.sum(1)], counts @ profiles


def poisson_binomial(errors):
    """P(t), the number of failures of independent models: errors (…, k) → (…, k + 1). Model after model,
    P(t) ← P(t)·(1 − e) + P(t − 1)·e."""
    errors = np.asarray(errors, float)
    p = np.ones((*errors.shape[:-1], 1))
    for e in np.moveaxis(errors, -1, 0)[..., None]:
        p = np.concatenate([p * (1 - e), 0 * e], -1) + np.concatenate([0 * e, p * e], -1)
    return p


def homogeneity(profiles, counts, kind):
    """Share of people whom all models fail ("systemic"), none fails ("consistent"), or either ("homogeneous").

    counts (P,) → {observed, expected of independent models with the same errors, difference D = observed − expected,
    ratio, and of systemic failure phi = D / (min e − expected), 0 independent, 1 as nested as the errors allow: each
    (estimate, low, high), NaN = undefined; influence (P,): what one more person of each profile does to D, times n}.

    Delta method: Var(D) = Σ counts·influence² / n². Its normal interval fails where few people are failed by all; so
    the observed rate's interval is exact, the expected one's is on log odds, and `mover` joins the two."""
    n, k = int(counts.sum()), profiles.shape[1]
    errors, inside = counts @ profiles / n, np.eye(k + 1)[profiles.sum(1)][:, KINDS[kind]].sum(1)
    observed, expected = counts @ inside / n, poisson_binomial(errors)[KINDS[kind]].sum()
    # P_exp is linear in every error, so ∂P_exp / ∂e_j = P_exp(e_j = 1) − P_exp(e_j = 0)
    one, zero = (poisson_binomial(np.where(np.eye(k), x, errors))[:, KINDS[kind]].sum(1) for x in (1, 0))
    influence = np.stack([inside - observed, (profiles - errors) @ (one - zero)])  # on the two rates, (2, P)
    (variance_o, covariance), (_, variance_e) = influence * counts @ influence.T / n**2
    interval_o = exact_interval(int(counts @ inside), n)
    result = dict.fromkeys(("expected", "difference", "ratio", "phi"), (math.nan,) * 3)
    result |= dict(observed=(observed, *interval_o), influence=influence[0] - influence[1])
    if not 0 < expected < 1:  # a model that never (or always) fails: nothing is known of the spread
        return result
    # expected: delta method on log odds, logit p ± 1.96·se / (p(1 − p))
    odds = expected / (1 - expected)
    factor = math.exp(1.96 * math.sqrt(variance_e) / (expected * (1 - expected)))
    interval_e = odds / factor / (1 + odds / factor), odds * factor / (1 + odds * factor)
    # subtle: from one or two people failed by all, ρ comes out too high; take it at the limits of the interval
    rho = covariance / math.sqrt(variance_o * variance_e or math.inf)
    rho = rho * np.sqrt([interval_o[0] / (observed or 1), (1 - interval_o[1]) / (1 - observed or 1)])
    difference = observed - expected, *mover(observed, interval_o, expected, interval_e, rho)
    logs = (np.log(np.maximum(x, 1e-300)) for x in (observed, interval_o, expected, interval_e))
    ratio = observed / expected, *np.exp(mover(*logs, rho)) * [observed > 0, 1]
    if kind == "homogeneous":  # its slopes in e cancel near e = ½: the delta method fails for these, not for D
        interval_e, ratio = (math.nan, math.nan), (ratio[0], math.nan, math.nan)
    result |= dict(expected=(expected, *interval_e), difference=difference, ratio=ratio)
    # subtle: the least of several errors comes out too low; the room may be what the best model's upper limit leaves
    best = int((counts @ profiles).min())
    room = np.array([best / n, exact_interval(best, n)[1]]) - expected
    if kind == "systemic" and room[0] > 1e-12:
        result["phi"] = (difference[0] / room[0], min(difference[1] / room), min(max(difference[2] / room), 1.0))
    return result


def contrast(first, second, kind, paired=False):
    """D of one group less D of another or, paired, of two ecosystems on the same people. first, second: (profiles,
    counts), paired: the same counts → (estimate, low, high). They differ where 0 lies outside."""
    one, two = (homogeneity(*ecosystem, kind) for ecosystem in (first, second))
    both = one["influence"], two["influence"]
    variances = np.cov(*both, ddof=0, fweights=first[1]) if paired else np.eye(2)
    rho = variances[0, 1] / math.sqrt(variances[0, 0] * variances[1, 1] or math.inf)
    (a, *a_interval), (b, *b_interval) = one["difference"], two["difference"]
    return a - b, *mover(a, a_interval, b, b_interval, rho)


# ==================================================================================== intervals


def binomial_tail(x, n, p):
    """P(X ≥ x), X ~ Binomial(n, p), p < x / n: P(x)·(1 + P(x + 1)/P(x) + …), to 20 standard deviations."""
    i = np.arange(x, min(n, x + 10 * math.isqrt(n) + 60))
    log_choose = math.lgamma(n + 1) - math.lgamma(x + 1) - math.lgamma(n - x + 1)
    first = math.exp(log_choose + x * math.log(p) + (n - x) * math.log1p(-p))
    return first * (1 + np.cumprod((n - i) / (i + 1) * (p / (1 - p))).sum())


@functools.cache
def lower_limit(x, n):
    """The p for which x or more has probability 2.5 %, by bisection; 0 if x is 0."""
    low, high = 0.0, x / n
    for _ in range(60 if x else 0):
        p = (low + high) / 2
        low, high = (p, high) if binomial_tail(x, n, p) < 0.025 else (low, p)
    return low


def exact_interval(x, n):
    """Exact 95 % interval of a rate: the p for which neither "x of n or more" nor "x or fewer" is rarer than 2.5 %."""
    return lower_limit(x, n), 1 - lower_limit(n - x, n)


def mover(a, a_interval, b, b_interval, rho):
    """Interval of a − b from the intervals of a and b and their correlation ρ, one or (at the lower, the upper limit).

    Method of variance estimates recovery (Zou and Donner 2008): the lower limit is a − b − √(x² + y² − 2ρxy) with
    x = a − low(a), y = high(b) − b; the upper one a − b + the same of x = high(a) − a, y = b − low(b)."""
    x, y = np.array([a - a_interval[0], a_interval[1] - a]), np.array([b_interval[1] - b, b - b_interval[0]])
    low, high = np.sqrt(np.maximum(x * x + y * y - 2 * rho * x * y, 0))
    return a - b - low, a - b + high


# ==================================================================================== tests and other nulls


def permutation_null(n, failures, n_draws, rng):
    """Shuffle each model's outcomes among n people, errors fixed. failures (k,) of each model → people whom all models
    fail and people whom none fails, (n_draws,) each. No table is shuffled: a model's failures fall on those failed by
    all so far, on those failed by none, or on others, and how many is hypergeometric."""
    all_fail = np.full(n_draws, failures[0])
    none_fails = n - all_fail
    for f in failures[1:]:
        hit = rng.hypergeometric(all_fail, n - all_fail, f)
        none_fails = none_fails - rng.hypergeometric(none_fails, n - all_fail - none_fails, f - hit)
        all_fail = hit
    return all_fail, none_fails


def p_value(observed, draws):
    """Two-sided: twice the smaller tail, the observed one counted as a draw. Monte Carlo, yet exact: P(p ≤ α) ≤ α."""
    return min(1.0, 2 * (1 + min(np.sum(draws <= observed), np.sum(draws >= observed))) / (1 + len(draws)))


def two_class_null(errors, alpha, delta):
    """A share α of people is harder, every error times 1 + Δ, the others easier so that every error stays → (k + 1,):
    P = α·PB((1 + Δ)e) + (1 − α)·PB((1 − αΔ/(1 − α))e). ValueError where a probability would leave [0, 1].

    The worst model caps it. Of all distributions of a factor common to all errors, α = max e with Δ = 1 / max e − 1
    (the worst model fails all the hard, none fails the others) has most systemic failure, Π e / (max e)^(k − 1)."""
    errors = np.asarray(errors, float)
    most = 1 / max(errors.max(), alpha) - 1
    if not 0 <= delta <= most + 1e-12:
        raise ValueError(f"Δ = {delta} with α = {alpha}: these errors allow 0 to {most:.4f}")
    hard, easy = np.minimum((1 + delta) * errors, 1), np.maximum((1 - alpha * delta / (1 - alpha)) * errors, 0)
    return alpha * poisson_binomial(hard) + (1 - alpha) * poisson_binomial(easy)


def stratified_null(failed, stratum):
    """Independence within strata, Σ_s w_s·PB(e(s)): failed (n, k), stratum (n,) integers from 0 → (k + 1,)."""
    sizes = np.bincount(stratum)
    columns = np.stack([np.bincount(stratum, column) for column in failed.T], 1)
    return sizes / sizes.sum() @ poisson_binomial(columns / np.maximum(sizes, 1)[:, None])


Z = torch.linspace(-8, 8, 241, dtype=torch.float64)  # difficulty, by the trapezoid rule
LOG_W = -(Z**2) / 2 - 0.5 * math.log(2 * math.pi) + math.log(float(Z[1] - Z[0]))


def fit_rasch(hist, columns):
    """One shared difficulty, P(model j fails i) = σ(b_j + a·z_i), z ~ N(0, 1), by marginal likelihood. hist (k + 1,)
    and columns (k,) of `tally` suffice → a, its standard error (NaN near 0), fitted P (k + 1,). None, undefined: a
    model that always or never fails (leave it out); identical or nested models, whose a has no end; no convergence.

    It is fitted to hist, so coming close to hist proves nothing: four copies of one model fit too."""
    n, k = hist.sum(), len(columns)
    if columns.min() == 0 or columns.max() == n:
        return None
    h, c, t = torch.from_numpy(hist / n), torch.from_numpy(columns / n), torch.arange(k + 1)

    def loss(theta):  # of a person: −b·c − Σ_t h(t)·log ∫ w(z)·e^{a·t·z} Π_j (1 − p_j(z))
        none_fails = LOG_W - F.softplus(theta[:k] + theta[k] * Z[:, None]).sum(1)
        return -(theta[:k] @ c) - h @ torch.logsumexp(none_fails + theta[k] * t[:, None] * Z, 1)

    def closure():
        theta.grad = torch.autograd.grad(value := loss(theta), theta)[0]
        return value

    theta = torch.cat([torch.logit(c), torch.ones(1)]).requires_grad_()
    options = dict(max_iter=500, tolerance_grad=1e-9, tolerance_change=0, line_search_fn="strong_wolfe")
    torch.optim.LBFGS([theta], **options).step(closure)
    closure()
    a, hessian = abs(theta[k].item()), torch.autograd.functional.hessian(loss, theta.detach())
    if not a < 15 or theta.grad.abs().max() > 1e-6 or torch.linalg.eigvalsh(hessian)[0] < 1e-9:
        return None
    error = torch.linalg.inv(n * hessian)[k, k].sqrt().item()
    p = torch.sigmoid(theta[:k] + theta[k] * Z[:, None]).detach().numpy()
    return a, error if a > 2 * error else math.nan, LOG_W.exp().numpy() @ poisson_binomial(p)


# ==================================================================================== pairs and improvement


def agreement(profiles, counts):
    """Pairs of models → P(both fail) (k, k), and error consistency (Geirhos et al. 2020) κ = (c − c_ind) / (1 − c_ind),
    c = P(both right or both wrong), (k, k): 0 independent, 1 copies, NaN undefined."""
    both = profiles.T * counts @ profiles / counts.sum()
    e = np.diag(both)
    chance = 1 - e[:, None] - e + 2 * np.outer(e, e)
    return both, 2 * (both - np.outer(e, e)) / np.where(chance < 1, 1 - chance, math.nan)


def improvement(before, after, j, n_draws, rng):
    """Who gains when model j improves (section 4)? before (n, k), after (n,): failures at a time, and of j at the next.

    → initial (failures of j), improved, declined, each (k,): people by the number of other models that fail them, the
    last cell systemic; p, two-sided: do improvements strike j's failures at random (hypergeometric)?"""
    others, failed, fails = before.sum(1, dtype=np.int64) - before[:, j], before[:, j] > 0, after > 0
    cells = (failed, failed & ~fails, ~failed & fails)
    initial, improved, declined = (np.bincount(others[who], minlength=before.shape[1]) for who in cells)
    draws = rng.hypergeometric(initial[-1], initial[:-1].sum(), improved.sum(), n_draws)
    return dict(initial=initial, improved=improved, declined=declined, p=p_value(improved[-1], draws))


# ==================================================================================== a table, never guessed

IDS = ("instance_id", "example_id", "image_id", "person_id", "doc_id", "id", "")  # "": the index that pandas writes
NO_MODELS = (*IDS, "ddi_id", "ddi_file", "disease")  # the last three: of DDI, see the task ddi
NOTHING = ("na", "n/a", "nan", "null", "none", "-", "?")  # an answer, or none? The reader asks


@dataclass
class Table:
    models: list  # their names
    failed: np.ndarray  # (times, n, k) uint8, 1 = this model fails this person
    labels: np.ndarray  # (n,) numbers
    group: np.ndarray  # (n,) numbers of groups
    groups: list
    times: list  # of columns model@time, in order, or [""]


def value_of(text, threshold=None):
    """What a cell says: True, 1 and 1.0 are "1". Any other text stays as it is, 007 and digits beyond 2^53 too. With a
    threshold, a number from 0 to 1 is a probability: "1" above the threshold, else "0"."""
    text = {"true": "1", "false": "0"}.get(text.strip().lower(), text.strip())
    if threshold is not None and re.fullmatch(r"\d*\.?\d+(e-?\d+)?", text) and float(text) <= 1:
        return str(int(float(text) > threshold))
    whole = re.fullmatch(r"[+]?(-?(0|[1-9][0-9]*))(\.0*)?", text)
    return whole[1] if whole else text


def coded(column, absent, classes=None, threshold=None):
    """Texts → numbers of their classes (if none are given, those that occur), −1 absent, −2 none; classes; values."""
    value = {text: value_of(text, threshold) for text in set(column)}
    classes = sorted({*value.values()} - absent) if classes is None else classes
    number = {x: i for i, x in enumerate(classes)} | dict.fromkeys(absent, -1)
    code = {text: number.get(x, -2) for text, x in value.items()}
    return np.fromiter(map(code.__getitem__, column), np.int32, len(column)), classes, value


def load_columns(path):
    """.csv or .tsv (comma, semicolon, tab), .jsonl (an object a line), .gz or not → {column: its texts}."""
    lines = ".jsonl" in path.name.lower()
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8-sig") as file:
            text = file.read()
        if not text.strip() or text.count('"') % 2 and not lines:
            fail(f"{path}: {'a quote is opened and not closed' if text.strip() else 'empty'}")
        if lines:
            rows = [json.loads(line, parse_int=str, parse_float=str) for line in text.split("\n") if line.strip()]
            header = list(dict.fromkeys(name for row in rows for name in row.keys()))
            columns = [["" if row.get(name) is None else str(row[name]) for row in rows] for name in header]
        else:  # quotes, CRLF, blank lines; a row of another length is an error
            delimiter = max(",;\t", key=text.partition("\n")[0].count)
            table = np.loadtxt(path, object, None, delimiter, quotechar='"', encoding="utf-8-sig", ndmin=2)
            header, columns = [name.strip() for name in table[0]], table[1:].T.tolist()
    except (OSError, EOFError, ValueError, AttributeError, zlib.error) as error:
        fail(f"{path}: want .csv, .tsv or .jsonl in UTF-8, .gz or not: {str(error).partition('; use')[0]}")
    if not columns[0]:
        fail(f"{path}: no rows")
    if len(set(header)) < len(header) or "" in header[1:]:
        fail(f"{path}: each column needs a name of its own: {', '.join(header)}")
    return dict(zip(header, columns))


def order_of_times(path, names):
    """Columns model@time → models; times in order, whole numbers (9, 10) or dates; columns by time. Without times
    names, [""], [names]."""
    pairs = [name.rpartition("@") for name in names if "@" in name]
    models, times = (list(dict.fromkeys(pair[i] for pair in pairs)) for i in (0, 2))
    if len(models) == len(pairs):  # no model comes twice: an @ is part of a name
        return names, [""], [names]
    if odd := {f"{model}@{time}" for model in models for time in times} ^ set(names):
        fail(f"{path}: columns model@time want every model at every time, and no other column; see {min(odd)}")
    if not all(re.fullmatch(r"\d+|\d{4}-\d\d(-\d\d)?", time) for time in times):
        fail(f"{path}: {', '.join(times)}: in which order? Write whole numbers or dates like 2020-03-29")
    times.sort(key=lambda time: [int(part) for part in re.findall(r"\d+", time)])
    return models, times, [[f"{model}@{time}" for model in models] for time in times]


def first_few(texts):
    return ", ".join(texts[:12]) + (f", … {len(texts) - 12:,} more" if len(texts) > 12 else "")


def read_outcomes(path, columns, label=None, group=None, models=None, outcome=None, missing=None, threshold=None):
    """columns of `load_columns`, a row for each person → Table. What was read is printed; what is unclear ends the
    program with its row, its column and its remedy. path: for messages.

    label, group, models: columns (those called label, group, and all others). Every answer must be a label; with
    outcome "correct" or "fail", what a 1 means, 0 or 1; with a threshold, a probability of label 1. missing: "drop" the
    person or count a "fail" where the cell is empty or, "drop:NA,-", one of these words."""
    label = label or ("label" if "label" in columns else None)
    group = group or ("group" if "group" in columns else None)
    names = models or [name for name in columns if name not in (label, group) and name.lower() not in NO_MODELS]
    index = next((name for name in columns if name.lower() in IDS and name not in (label, group, *names)), None)
    wanted = [name for name in (label, group, *names) if name]
    if odd := [name for name in wanted if name not in columns or wanted.count(name) > 1]:
        fail(f"{path}: {odd[0]}: no such column, or wanted twice; there are {first_few([*columns])}")
    n = len(next(iter(columns.values())))
    long = [x for x in columns if x.lower() == "model" and not models or x == index and len(set(columns[x])) < n]
    if long:
        fail(f'{path}: column "{long[0]}" repeats: want a row for each person, a column for each model. A long table? '
             'Choose one filter, one trial, then df.pivot(index="id", columns="model", values="prediction")')
    if len(names) < 2:
        fail(f"{path}: {len(names)} model column ({first_few(names)}): an ecosystem needs two")
    if not label and not outcome:
        fail(f"{path}: no column label: --label NAME; if a 1 says right or wrong: --outcome correct or --outcome fail")
    way, listed, words = (missing or "").partition(":")
    absent = {"", *words.split(",")} if listed else {""}

    truth, classes, said = np.full(n, int(outcome == "correct")), ["0", "1"], {}
    if not outcome:
        truth, classes, said = coded(columns[label], absent)
        if odd := [x for x in classes if x.lower() in NOTHING and not listed]:
            fail(f'{path}: label "{odd[0]}": a class? --missing drop: (with the colon). None? --missing drop:{odd[0]}')
    if threshold is not None and classes != ["0", "1"]:
        fail(f"{path}: --threshold wants labels 0 and 1; here they are {first_few(classes)}")
    member, groups, _ = coded(columns[group] if group else ["all"] * n, absent)
    holes, failed = {"label": truth < 0, "group": member < 0}, np.empty((len(names), n), np.uint8)
    for row, name in zip(failed, names):
        answers, _, value = coded(columns[name], absent, classes, threshold)
        row[:], holes[name] = answers != truth, answers == -1
        said |= value
        if answers.min() == -2:  # probabilities, age, other words for the labels, N/A
            i = int(answers.argmin())
            odd = columns[name][i].strip()
            fail(f'{path}: person {i + 1}, column "{name}": {odd} is no label ({first_few(classes)}). No model? Name '
                 "the models: --models A,B. A probability? --threshold 0.5. Another word for a label? Write the label. "
                 f"No answer? --missing drop:{odd} or, to count it as wrong, fail:{odd}")
    lost, wrong = {}, {}
    for what, who in holes.items():
        if who.any():
            if way not in ("drop", "fail"):
                fail(f'{path}: person {who.argmax() + 1}, column "{what}": empty. --missing drop leaves such people '
                     "out; --missing fail counts no answer as wrong, and leaves out who has no label or no group")
            (wrong if way == "fail" and what in names else lost)[what] = who
    keep = ~np.any([np.zeros(n, bool), *lost.values()], axis=0)
    if not keep.any():
        fail(f"{path}: nobody is left: {first_few([*lost])} empty")
    models, times, by_time = order_of_times(path, names)
    sizes = [f"{g}: {size:,}" for g, size in zip(groups, np.bincount(member[keep], minlength=len(groups)))]
    unused = [name for name in columns if name not in (group, index, *names) and (name != label or outcome)]
    same = [f"{text} = {x}" for text, x in said.items() if text != x]
    without = lambda columns: first_few([f"{who.sum():,} without {what}" for what, who in columns.items()])
    when = f"at {' → '.join(times)}" if times[0] else ""
    print(f"{path}: {keep.sum():,} of {n:,} people, {len(models)} models", when)
    for what, text in {
        "models": ", ".join(f"{name} (error {row[keep].mean():.4f})" for name, row in zip(names, failed)),
        "label": f"1 is {outcome}" if outcome else f"{label}: {first_few(classes)}",
        "read as": first_few(same),
        "group": f"{group}: {first_few(sizes)}" if group else "",
        "not used": first_few(unused),
        "dropped": without(lost),
        "as wrong": without(wrong),
    }.items():
        print(f"  {what:9}", text or "–")
    at = [[names.index(name) for name in row] for row in by_time]
    return Table(models, failed[at][..., keep].transpose(0, 2, 1), truth[keep], member[keep], groups, times)


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


def download(url, sha256=None):
    """Fetch a file once → its path in the cache. Under torchrun rank 0 does, others wait. OSError: not to be had."""
    path = CACHE / url.split("://")[1]
    if int(os.environ.get("LOCAL_RANK", 0)) == 0 and not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(url, str(path), sha256)  # to another name first; sha256: its first digits
        except Exception as error:  # whatever it was, the file is not there
            print(f"{url}: {error}", file=sys.stderr)
    if dist.is_initialized():
        dist.barrier()
    if not path.exists():
        raise OSError(f"no {path}: fetch {url} by other means and put it there")
    return path


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


# ==================================================================================== the experiments

DRAWS = 20_000  # shuffles for p-values


def show(x, low=math.nan, high=math.nan):
    """Three digits and, if there is one, the interval. NaN: what the data do not identify."""
    text = f"{x:.3g}" if x == x else "undefined"
    return text if low != low else f"{text} [{low:.3g}, {high:.3g}]"


def measure(ecosystems, args):
    """{name: failed (n, k)} → {name: rates, intervals, p-values}, printed as one table."""
    figures, rows, rates = {}, [], ("observed", "expected", "difference", "ratio")
    for name, failed in ecosystems.items():
        n, (profiles, counts) = len(failed), outcome_profiles(failed)
        hist, columns = tally(profiles, counts)
        figures[name] = m = dict(
            people=n, errors=columns / n, observed=hist / n, expected=poisson_binomial(columns / n),
            rasch=fit_rasch(hist, columns))
        m["both fail"], m["kappa"] = agreement(profiles, counts)
        all_fail, none_fails = permutation_null(n, columns, DRAWS, np.random.default_rng(args.seed))
        for kind, draws in zip(KINDS, (all_fail, none_fails, all_fail + none_fails)):
            m[kind] = homogeneity(profiles, counts, kind) | dict(p=p_value(hist[KINDS[kind]].sum(), draws))
            del m[kind]["influence"]
            estimates = (show(*m[kind][x]) for x in rates)
            rows.append([name, kind, f"{n:,}", *estimates, f"{m[kind]['p']:.2g}"])
    print_table(["share of people [95 %]", "", "people", *rates, "p"], rows)
    print("systemic: all models fail; consistent: none; homogeneous: either. Expected: independent, same errors\n")
    return figures


def hard_people(names, failed, m, stratum):
    """Is it that some people are hard? Prints and returns what other nulls give, {name: P (k + 1,)}. failed (n, k), m
    of `measure`, stratum (n,): people's label, or group."""
    k, nulls = len(names), {"observed": m["observed"], "independent models": m["expected"]}
    kappa = np.where(np.tri(k) + np.isnan(m["kappa"]), -2, m["kappa"])
    a, b = np.unravel_index(kappa.argmax(), kappa.shape)
    print(f"phi {show(*m['systemic']['phi'])} (0 independent, 1 nested as the errors allow)\n"
          f"most alike: {names[a]} and {names[b]}, κ {show(m['kappa'][a, b])} (0 independent, 1 copies)\n")
    if np.ptp(stratum):
        nulls[f"independent within {len(set(stratum)):,} labels or groups"] = stratified_null(failed, stratum)
    if 0 < (worst := m["errors"].max()) < 1:
        nulls["a factor common to all errors, at most"] = two_class_null(m["errors"], worst, 1 / worst - 1)
    a, error, fitted = m["rasch"] or (math.nan, math.nan, np.full(k + 1, math.nan))
    nulls[f"one difficulty (Rasch), a {show(a)} ± {show(error)}"] = fitted
    print_table(["is it that some people are hard?", *KINDS],
                [[name, *(show(p[cells].sum()) for cells in KINDS.values())] for name, p in nulls.items()])
    print("Rasch is fitted to these outcomes: it cannot tell hard people from flaws that the models share\n")
    return nulls


def by_group(sides, failed, group, groups):
    """Section 5: are one group's outcomes more homogeneous than its errors explain? sides {name: columns of failed}: an
    ecosystem or two. Prints and returns D in the four largest groups, and its differences between groups and sides."""
    largest, rows, found, of = [g for g, _ in Counter(group).most_common(4)], [], {}, {}
    for g in largest:
        profiles, counts = outcome_profiles(failed[group == g])
        of[g] = {side: (profiles[:, columns], counts) for side, columns in sides.items()}
        for side, (part, _) in of[g].items():
            d = found[f"{groups[g]}, {side}"] = homogeneity(part, counts, "homogeneous")["difference"]
            errors = first_few([f"{e:.3f}" for e in counts @ part / counts.sum()])
            rows.append([f"{groups[g]}, {side}", f"{counts.sum():,}", errors, show(*d)])
    for a, b in combinations(largest[:3], 2):
        pair = {side: contrast(of[a][side], of[b][side], "homogeneous") for side in sides}
        if len(sides) == 2:  # of the ecosystems within a group, on the same people; then of two groups
            (x, *x_interval), (y, *y_interval) = (contrast(*of[g].values(), "homogeneous", paired=True) for g in (a, b))
            pair[" less ".join(sides)] = x - y, *mover(x, x_interval, y, y_interval, 0)  # difference in differences
        for side, d in pair.items():
            found[f"{groups[a]} less {groups[b]}, {side}"] = d
            rows.append([f"{groups[a]} less {groups[b]}, {side}", "", "", show(*d)])
    print_table(["group", "people", "errors", "homogeneous, observed less expected [95 %]"], rows)
    print()
    return found


def improvements(tables, args):
    """Section 4: who gains when a model improves? {name: Table} → cases, printed: one for each model and two times (the
    other models are taken at the earlier)."""
    cases, rows, kept, rng = {}, [], [], np.random.default_rng(args.seed)
    for name, table in tables.items():
        for t, j in product(range(len(table.times) - 1), range(len(table.models))):
            case = improvement(table.failed[t], table.failed[t + 1][:, j], j, DRAWS, rng)
            initial, improved, declined = (case[x] for x in ("initial", "improved", "declined"))
            case["systemic"] = shares = [float(x[-1] / (x.sum() or math.nan)) for x in (initial, improved)]
            cases[title := f"{name} {table.models[j]}, {table.times[t]} → {table.times[t + 1]}".strip()] = case
            if improved.sum() - declined.sum() >= 0.005 * len(table.labels):
                kept.append(shares)
            by_others = " ".join(f"{x}/{y}" for x, y in zip(improved, initial))
            rows.append([title, f"{declined.sum():,}", f"{improved.sum():,}/{initial.sum():,}", by_others, *shares,
                         f"{case['p']:.2g}"])
    mean = np.mean(kept, axis=0).tolist() if kept else [math.nan] * 2
    rows.append([f"mean of {len(kept)} whose error falls by 0.005 or more", "", "", "", *mean, ""])
    print_table(["who gains when a model improves?", "declined", "improved/failures", "by other models that fail",
                 "systemic, of failures", "of improved", "p"], rows)
    return cases


def analyse(name, table, args):
    """The report on one table, at its last time → figures. Columns human:NAME are a second ecosystem."""
    failed, human = table.failed[-1], np.array([model.startswith("human:") for model in table.models])
    sides = {side: np.flatnonzero(who) for side, who in (("models", ~human), ("humans", human)) if who.any()}
    if min(map(len, sides.values())) < 2:
        fail(f"{name}: an ecosystem of one. Want two models or more and, called human:NAME, no human or two")
    print(f"\n{name} {table.times[-1]}")
    figures = measure({side: failed[:, columns] for side, columns in sides.items()}, args)
    stratum = table.labels if np.ptp(table.labels) else table.group
    for side, columns in sides.items():
        names = [table.models[j] for j in columns]
        figures[side] |= dict(names=names, nulls=hard_people(names, failed[:, columns], figures[side], stratum))
    if np.ptp(table.group):
        figures["groups"] = by_group(sides, failed, table.group, table.groups)
    if len(table.times) > 1:
        figures["improvements"] = improvements({"": table}, args)
    return figures


def plot(figures):
    """→ draw(fig): what is observed and what every null gives, of the first ecosystem."""

    def draw(fig):
        ax = fig.add_subplot()
        for name, p in next(iter(figures.values()))["nulls"].items():
            ax.plot(p, "o-" if name == "observed" else "--", label=name)
        ax.set(yscale="log", ylim=(1e-6, 1.5), xlabel="models that fail a person", ylabel="share of people")
        ax.xaxis.get_major_locator().set_params(integer=True)
        ax.legend()

    return draw


ALGORITHMIC = ("CJK", "HANGUL SYLLABLE", "TANGUT", "NUSHU", "KHITAN")  # characters' names made by a rule
PROVIDERS = {  # name: (features of a character's name, width of the hidden layer or 0 = linear)
    "words, linear": (lambda name: name.split(), 0),
    "words, MLP": (lambda name: name.split(), 64),
    "trigrams, MLP": (lambda name: [f"  {name} "[i : i + 3] for i in range(len(name) + 1)], 64),
    "last words, linear": (lambda name: name.split()[-3:], 0),
}
YEARS = {"year 1": 0.25, "year 2": 0.5, "year 3": 1.0}  # and the share of the training data that there is by then
N_FEATURES, N_TEST = 4096, 8000


def hashed(names, features):
    """Names → (n, longest) int64 numbers of their features, padded with 0."""
    rows = [[1 + zlib.crc32(feature.encode()) % (N_FEATURES - 1) for feature in features(name)] for name in names]
    return nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True)


def train_provider(x, y, test, hidden, n_classes, epochs, seed):
    """A bag of features, linear or with one hidden layer, trained by Adam → answers on test, (n_test,)."""
    torch.manual_seed(seed)
    net = nn.EmbeddingBag(N_FEATURES, hidden or n_classes, mode="sum", padding_idx=0)
    if hidden:
        net = nn.Sequential(net, nn.ReLU(), nn.Linear(hidden, n_classes))
    optimizer = torch.optim.Adam(net.parameters(), 0.01, fused=True)
    for _ in range(epochs):
        for rows in torch.randperm(len(x)).split(128):
            loss = F.cross_entropy(net(x[rows]), y[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    with torch.no_grad():
        return net(test).argmax(1)


def unicode(args):
    """Four classifiers guess a Unicode character's category from its name, at three times with more and more data."""
    torch.set_num_threads(1)  # for matrices as small as these more threads only wait for each other
    named = {unicodedata.name(c, ""): unicodedata.category(c) for c in map(chr, range(sys.maxunicode + 1))}
    names = [name for name in named if name and not name.startswith(ALGORITHMIC)]
    classes = sorted({named[name] for name in names})
    y = torch.tensor([classes.index(named[name]) for name in names])
    test, train = np.split(np.random.default_rng(args.seed).permutation(len(names)), [N_TEST])
    failed = np.zeros((len(YEARS), len(test), len(PROVIDERS)), np.uint8)
    for j, (features, hidden) in enumerate(tqdm(PROVIDERS.values(), "train")):
        x = hashed(names, features)
        for t, available in enumerate(YEARS.values()):
            rows = train[: int(len(train) * available)]
            answers = train_provider(x[rows], y[rows], x[test], hidden, len(classes), args.epochs, args.seed)
            failed[t, :, j] = answers != y[test]
    table = Table(list(PROVIDERS), failed, y[test].numpy(), np.zeros(N_TEST, int), ["all"], list(YEARS))
    figures = analyse("characters", table, args)
    save_results(args.out, args, **figures)
    figure(args.out / "unicode.png", args, plot(figures))


def read_files(args):
    return {str(path): read_outcomes(path, load_columns(path), args.label, args.group, args.models, args.outcome,
                                  args.missing, args.threshold) for path in args.files}


def report(args):
    """Your tables: who is failed by all, and is it more than chance?"""
    figures = {path: analyse(path, table, args) for path, table in read_files(args).items()}
    save_results(args.out, args, tables=figures)
    for i, one in enumerate(figures.values(), 1):
        figure(args.out / f"report_{i}.png", args, plot(one))


def improve(args):
    """Who gains when a model improves? Columns model@time, a row a person."""
    tables = read_files(args)
    for path, table in tables.items():
        if len(table.times) < 2:
            fail(f"{path}: columns want names model@time, two times or more; there are {', '.join(table.models)}")
    save_results(args.out, args, improvements=improvements(tables, args))


def ddi(args):
    """Section 5: models and dermatologists by skin tone.

    A report on DDI's ddi_metadata.csv (ddi-dataset.github.io) with a column of answers for each model and, called
    human:NAME, for each dermatologist."""
    report(args)


HAPI = "https://storage.googleapis.com/hapi-data/hapi.tar.gz"  # Chen et al. 2022, 205 MB
HAPI_FILE = re.compile(  # the paper's part: tasks/sa/yelp/labels.json, tasks/sa/yelp/amazon_sa/20-03-29.json
    r"(?:^|/)tasks/(fer/(?:rafdb|afnet|expw|ferplus)|scr/(?:fluent|digit|amnist)|sa/(?:shop|yelp|imdb|waimai))/"
    r"(?:labels|(google|facepp|microsoft|ibm|amazon|baidu)_(?:fer|scr|sa)/(\d\d-\d\d-\d\d))\.json$")


def read_hapi(path):
    """The paper's part of HAPI's archive → {"task/dataset": Table}. Joined by example_id. No answer, or one that is no
    label, counts as wrong; how many is printed."""
    found, tables = {}, {}
    try:
        with tarfile.open(path) as archive:
            for member in archive:
                if match := HAPI_FILE.search(member.name):
                    dataset, api, date = match.groups()
                    rows, key = json.load(archive.extractfile(member)), "predicted_label" if api else "true_label"
                    answers = {str(row["example_id"]): value_of(str(row[key])) for row in rows}
                    found.setdefault(dataset, {})[f"{api}@20{date}" if api else "label"] = answers
    except (tarfile.TarError, EOFError, zlib.error, ValueError, KeyError, TypeError) as error:
        fail(f"{path}: not HAPI's archive ({HAPI}): {type(error).__name__}: {error}")
    for dataset, answers in sorted(found.items()):
        labels, columns = answers.get("label") or fail(f"{path}: no labels.json of {dataset}"), {}
        for name in sorted(answers):  # label; api@2020-03-29
            if (year := name.partition("-")[0]) in columns:
                print(f"{dataset}: two dates for {year}; {name} is used")
            known = {*labels.values()}
            columns[year] = [x if x in known else "" for x in map(answers[name].get, labels)]
        tables[dataset] = read_outcomes(dataset, columns, missing="fail:")
    return tables or fail(f"{path}: no tasks/fer|scr|sa/DATASET/API/DATE.json as {HAPI} has them")


def hapi(args):
    """Sections 3 and 4: eleven datasets, three commercial APIs each, 2020 to 2022 (205 MB)."""
    tables = read_hapi(args.data or download(HAPI))
    figures = measure({f"{name} {time}": failed for name, table in tables.items()
                       for time, failed in zip(table.times, table.failed)}, args)
    above = sum(m["homogeneous"]["difference"][0] > 0 for m in figures.values())
    print(f"the paper: homogeneous outcomes exceed the expected ones everywhere. Here: {above} of {len(figures)}")
    cases = improvements(tables, args)
    print("the paper, as quoted by others: a tenth of improvements are on people whom all others fail")
    save_results(args.out, args, datasets=figures, improvements=cases)


# ==================================================================================== command line


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.error = fail
    tasks = parser.add_subparsers(required=True, metavar="TASK")
    flags = {
        "label": dict(help="column of the truth (label; ddi: malignant)"),
        "group": dict(help="column of groups (group, if there is one; ddi: skin_tone)"),
        "models": dict(type=lambda text: text.split(","), help="columns of models (all others)"),
        "outcome": dict(choices=("correct", "fail"), help="cells are 0 and 1 and a 1 means this; no label then"),
        "missing": dict(help="empty cells: drop the person, or count as fail; drop:NA,- such words too"),
        "threshold": dict(type=float, help="answers are probabilities of label 1; above it they say 1"),
        "epochs": dict(type=int, default=8, help="passes over the training characters (%(default)s)"),
        "data": dict(type=Path, help="HAPI's archive, instead of the download"),
        "seed": dict(type=lambda text: int(text) % 2**32, default=0, help="of split, nets and shuffles (%(default)s)"),
        "out": dict(type=Path, help="folder for results.json and figure (%(default)s)"),
        "no_plot": dict(action="store_true", help="write no figure"),
    }

    def task(function, names, **defaults):
        sub = tasks.add_parser(function.__name__, help=function.__doc__.split("\n")[0], description=function.__doc__)
        sub.error = fail
        if "label" in names:
            sub.add_argument("files", nargs="+", type=Path, help=".csv, .tsv or .jsonl, .gz or not")
        for name in names.split():
            sub.add_argument(f"--{name}", **flags[name])
        sub.set_defaults(task=function, out=Path("out/ecosystem") / function.__name__, **defaults)

    task(unicode, "epochs seed out no_plot")
    task(report, "label group models outcome missing threshold seed out no_plot")
    task(improve, "label models outcome missing threshold seed out", group=None)
    task(ddi, "label group models missing threshold seed out no_plot",
         label="malignant", group="skin_tone", outcome=None)
    task(hapi, "data seed out")
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0].startswith("-") and argv[0] not in ("-h", "--help"):
        argv = ["unicode", *argv]
    args = parser.parse_args(argv)
    if getattr(args, "epochs", 1) < 1:
        fail(f"--epochs {args.epochs} must be above 0")
    return args


def main():
    run(parse_args())


if __name__ == "__main__":
    main()
