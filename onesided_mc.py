"""One-sided matrix completion from two observations per row (Cao, Liang, Valiant; ICML 2023, arXiv 2306.04049).

The problem. X has m rows, d ≪ m columns and rank r, and each row shows only k ≥ 2 entries, often fewer than r. Then X
cannot be completed: r − k directions of every row are free. Yet one side, the r right singular vectors, can be had.

The idea. They are the top eigenvectors of Θ = XᵀX/m, only d×d, and a row that shows columns a and b is a noisy sample
of Θ_ab, Θ_aa, Θ_bb. So Θ is completed instead. Three d×d sums are all that is kept of the rows (PairStats); they add
up over blocks, files and machines, and no solver sees a row. Two estimators read them:

    paper       min over V (d, r)          Σ W∘(V·Vᵀ − H)²,  H = Σ x_a·x_b / N                squared_loss, eq. 2
    likelihood  min over V (d, R), σ²      Σ_{a<b} N_ab·log det Σ_ab + tr(Σ_ab⁻¹·C_ab)         pair_likelihood (ours)
                Σ_ab: the 2×2 block of V·Vᵀ + σ²·I, R = min(d, 64) columns, of which the top r are reported

Run.

    python onesided_mc.py                        error against rows, all methods: table and figure (25 s of one core)
    python onesided_mc.py robust | impossible    noise and endless spectra; why the other side cannot be had
    python onesided_mc.py genome --data FILE.vcf.gz [--panel FILE]     people's ancestry from a few genotypes a site
    python onesided_mc.py fit FILE [--center columns --scores OUT.csv]    a table with gaps, or row,column,value
    torchrun --nproc_per_node=8 onesided_mc.py --columns 1000 --rank 5 --rows 100000000

Measured (one core of a CPU, torch 2.13; row-space error, 0 to 2r; mean of seeds 0-2), d = 50, r = 3, k = 2:

                                    3,000 rows   12,000   50,000   200,000   1,000,000
    direct SVD of the zero-filled X       3.33     3.17     3.33      3.33        3.27
    inverse propensity, spectral          .978     .179    .0373     .0100       .0016
    pairwise mean, spectral               1.13     .185    .0261     .0093       .0013
    paper, V of 3 columns                 .382     .109    .0197     .0063       .0009
    likelihood, V of 3 columns           .0554    .0086    .0020     .0007       .0002
    likelihood, V of 50 columns          .0584    .0097    .0023     .0008       .0002
    completion of X, ridge 0.01           4.48     4.32     4.40
    completion of X, best of 5 ridges     .313     .045    .0172    (the ridge chosen with the truth in hand)

    robust, 50,000 rows            noise sd 0     0.5       1       2   spectrum j^−1.5
    pairwise mean, spectral             .0261   .0404   .0935    .503              .179
    paper, V of 3 (of 50) columns       .0197   .0410   .172     .850 (.481)       .272 (.154)
    likelihood, V of 3 columns          .0020   .0106   .0419    .432              .182
    likelihood, V of 50 columns         .0023   .0147   .0642    .548             .0736

    genome, coalescent people, 7,561 linked sites, error of 4 (seed 0)            k = 8      12      20
    direct SVD                                                                     .370    .125    .055
    pairwise mean                                                                  .237    .096    .041
    paper, V of 3                                                                  .308    .170    .141
    likelihood, V of 60 (chosen by held-out sites)                                 .192    .083    .035

`genome` as it comes (Balding–Nichols, 3 × 20 people, 94,355 sites, 5 seen a site): direct SVD .055, pairwise mean
.039, paper, V of 3, which held-out sites choose, .026, likelihood, V of 60, .034. `impossible` (r = 5, k = 2, a million
rows): error .0014 of 10, and .606 of the variance of unseen entries is missed, with the true V too. Ratings like
people's, a fifth hidden (tests, `-k ratings -s`): RMSE 1.00 by the film's mean, .950 by biases of film and user, .767
by 4 components. Two tables without a rank (scikit-learn's, tests, `-k rank -s`), likelihood, paper, pairwise mean:
breast cancer .044, .299, .069; digits .087, .204, .087.

What did not hold. "Completing X fails" is true without a good ridge; with the best of five it is ahead of the paper's
estimator at 12,000 rows (elsewhere within the spread of the seeds). On linked genotypes and endless spectra the paper's
V of r columns is worse than the pairwise mean, which costs nothing; V of more columns, cut to r, mends it. At R = r
the likelihood too is bad off its model (genome, k = 12: .413). At noise sd 2, and with 3,000 rows at sd 1, it is not
clearly ahead of the spectral methods. With R near d, σ² goes into V: read residual_variance. Real genomes and MovieLens
itself: not measured. GPU: not measured since the sums changed.

Try:
    --k 4 --rows 12000                       four entries a row: likelihood .0021, paper .0177, best ridge .0092
    robust --rows 3000 --seeds 2             noise sd 1 beats them all: likelihood 1.87, paper 2.09, propensity 2.08
    take `- 1` out of few_genotypes; genome   direct SVD .055 → .581, paper .026 → .113, likelihood .034 → .035
"""

import argparse
import csv
import gzip
import io
import json
import math
import os
import sys
import zlib
from collections import defaultdict
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

try:
    from kernels.pair_gram import pair_gram_ as fused_pair_gram_
except ImportError:  # copied alone, or no Triton here: the plain version computes the same
    fused_pair_gram_ = None

# ==================================================================================== the statistics


def pair_gram_(table, columns, values):
    """table (3, d, d) += Σ x_a·x_b, Σ 1, Σ x_a² over the rows that show both a and b; the plain version of the kernel.

    table float64; columns (rows, k) int64, −1 = nothing here; values (rows, k) float64. Memory: 24·rows·k² bytes."""
    seen, at = (columns >= 0).double(), columns.clamp(min=0)
    x = values * seen
    cell = (at[:, :, None] * table.shape[1] + at[:, None]).flatten()  # ordered pairs, each entry with itself too
    for sums, (left, right) in zip(table, ((x, x), (seen, seen), (x**2, seen))):
        sums.view(-1).index_add_(0, cell, (left[:, :, None] * right[:, None]).flatten())


class PairStats:
    """Three d×d sums over the rows that show both a and b: Σ x_a·x_b, how many rows, Σ x_a² (not symmetric). All that
    is kept of the rows. Blocks, files and machines are added; total − block leaves a block out.

        stats = PairStats(d)
        for columns, values in chunks:       # (rows, k) integers and floats; −1 pads rows that show fewer
            stats.update(columns, values)
        stats.all_reduce()                   # under torchrun, where each rank saw its own rows
        model = fit(stats, rank=3)

    d: columns. means (d,): taken off the columns first (a first pass over the rows finds them); None takes nothing off.
    table (3, d, d) float64: counts are exact integers, the same for any split of the rows.
    """

    def __init__(self, d, means=None, table=None, device="cpu"):
        self.d = d
        self.table = torch.zeros(3, d, d, dtype=torch.float64, device=device) if table is None else table
        self.means = self.table.new_zeros(d) if means is None else torch.as_tensor(means).to(self.table)

    def update(self, columns, values):
        """Add rows. columns (rows, k) integers, −1 where a row shows fewer than k, any order; values (rows, k) floats.
        ValueError names the first row that cannot be taken."""
        columns = torch.as_tensor(columns).to(self.table.device, torch.int64)
        values = torch.as_tensor(values).to(self.table)
        seen, ordered = columns >= 0, columns.sort(1).values
        wrong = ((columns < -1) | (columns >= self.d) | seen & ~values.isfinite()).any(1)
        wrong |= ((ordered.diff(dim=1) == 0) & (ordered[:, 1:] >= 0)).any(1)
        if wrong.any():
            raise ValueError(f"row {int(wrong.int().argmax())} has a column outside 0..{self.d - 1}, one twice, or a "
                             "value that is not finite")
        centred = torch.where(seen, values - self.means[columns.clamp(min=0)], 0.0)
        fused = self.table.is_cuda and fused_pair_gram_ is not None
        (fused_pair_gram_ if fused else pair_gram_)(self.table, columns, centred)
        return self

    def all_reduce(self):
        """Under torchrun: the sum over all ranks, on every rank, in one message of 24·d² bytes."""
        if dist.is_initialized():
            dist.all_reduce(self.table)
        return self

    def __add__(self, other):
        return PairStats(self.d, self.means, self.table + other.table)

    def __sub__(self, other):
        return PairStats(self.d, self.means, self.table - other.table)


def inverse_propensity(stats):
    """Unbiased for XᵀX/m (d, d): each sum over its expected count, a pair's as the product of its columns' counts."""
    sums, counts, _ = stats.table
    often = counts.diagonal()
    expected = torch.outer(often, often)
    expected *= (counts.sum() - often.sum()) / (expected.sum() - (often**2).sum())
    expected.diagonal().copy_(often)
    return sums / expected.clamp(min=1e-9)  # a column that these rows never show: 0


# ==================================================================================== two losses of Θ = V·Vᵀ + σ²·I


def squared_loss(theta, table):
    """The paper's equation 2 in sums: Σ W∘(Θ − H)², H = Σ x_a·x_b / N; W = N/ΣN off the diagonal, and again on it.

    theta (d, d), table (3, d, d) → loss, G = ∂loss/∂Θ (d, d), so that ∂loss/∂V = 2·G·V and ∂loss/∂σ² = trace G."""
    sums, counts, _ = table
    weights = counts / (counts.sum() - counts.trace())
    weights.diagonal().copy_(counts.diagonal() / counts.trace())
    residual = theta - sums / counts.clamp(min=1)
    return (weights * residual**2).sum(), 2 * weights * residual


def pair_likelihood(theta, table):
    """Two entries of a row are N(0, Σ_ab), Σ_ab the 2×2 block of Θ; −2·log likelihood, the mean over pairs:

    Σ_{a<b} N_ab·log det Σ_ab + tr(Σ_ab⁻¹·C_ab),  C_ab = Σ over rows (x_a, x_b)ᵀ(x_a, x_b),  det = Θ_aa·Θ_bb − Θ_ab².
    Two columns that nearly agree pin Θ_ab far better than two that do not: least squares does not use that."""
    sums, counts, squares = table
    s = theta.diagonal()
    det = (s[:, None] * s - theta**2).fill_diagonal_(1)  # a pair is two columns: the diagonal has no part
    trace = ((squares * s + (squares * s).T - 2 * theta * sums) / det).fill_diagonal_(0)
    slope = ((counts - trace) / det).fill_diagonal_(0)  # of the loss with det
    gradient = -theta * slope - sums / det
    gradient.diagonal().copy_(slope @ s + (squares / det).fill_diagonal_(0).sum(0))
    pairs = (counts.sum() - counts.trace()) / 2
    return ((counts * det.log() + trace).sum() / 2) / pairs, gradient / pairs


# ==================================================================================== the fit


@dataclass
class Model:
    stats: PairStats  # what it was fitted to
    V: torch.Tensor  # (d, R): XᵀX/m ≈ V·Vᵀ + noise_variance·I, means taken off
    rank: int  # r ≤ R: components to report
    noise_variance: float = 0.0  # σ²; 0 for the paper's estimator
    converged: bool = True

    def components(self, center=None, n=None):
        """The n (default: rank) largest eigenvalues, descending, and eigenvectors (d, n) of V·Vᵀ: X's squared singular
        values over m, and right singular vectors. center "rows": each row less its mean, V → (1 − 11ᵀ/d)·V."""
        V, n = self.V - self.V.mean(0) if center == "rows" else self.V, n or self.rank
        Q, s, _ = torch.linalg.svd(V, full_matrices=False)
        return s[:n] ** 2, (Q * Q.gather(0, Q.abs().argmax(0, keepdim=True)).sign())[:, :n]

    @property
    def residual_variance(self):
        """Mean square that the r components leave: noise, and components beyond r. At least a thousandth of all."""
        eigenvalues, Q = self.components()
        squares, seen = self.stats.table[0].diagonal(), self.stats.table[1].diagonal()
        left = squares - seen * (Q**2 @ eigenvalues)
        return float(max(left.sum(), 1e-3 * squares.sum()) / seen.sum())

    def transform(self, columns, values):
        """Rows → (scores (rows, r), whole rows (rows, d)): the conditional mean of Gaussian rows, a ridge regression of
        the entries on L = Q·√λ: z = (LᵀL + ψ·I)⁻¹·Lᵀ·(x − μ), ψ the residual variance. Below r entries: a guess."""
        eigenvalues, Q = self.components()
        columns, means = torch.as_tensor(columns).to(Q.device, torch.int64), self.stats.means
        seen, at, loadings = columns >= 0, columns.clamp(min=0), Q * eigenvalues.sqrt()
        L = loadings[at] * seen[..., None]  # (rows, k, r)
        x = torch.where(seen, torch.as_tensor(values).to(Q) - means[at], 0.0)
        ridge = self.residual_variance * torch.eye(self.rank).to(Q)
        z = torch.linalg.solve(L.mT @ L + ridge, L.mT @ x[..., None])[..., 0]
        return z * eigenvalues.sqrt(), means + z @ loadings.T


def top_eigenvectors(matrix, n):
    """The n largest eigenvalues, descending, and eigenvectors (d, n)."""
    eigenvalues, Q = torch.linalg.eigh(matrix)
    return eigenvalues.flip(0)[:n], Q.flip(1)[:, :n]


def check_columns(counts, names):
    """ValueError where counts (d, d) of pairs leave open how the columns, of these names, lie to one another."""
    reached = torch.zeros_like(counts[0], dtype=torch.bool)
    reached[counts.diagonal().argmax()] = True
    while (more := counts[reached].sum(0) > 0).sum() > reached.sum():  # whatever a row shows beside one that is reached
        reached = more
    if not reached.all():
        first = str(names[int(reached.int().argmin())])
        raise ValueError(f"no row links column {first!r} and {int((~reached).sum()) - 1} more of {len(names)} to the "
                         "others: leave them out")


def fit(stats, rank, fit_rank=None, estimator="likelihood", max_steps=500):
    """V (d, R) and σ² that minimise the loss, by L-BFGS from the spectral estimate → a Model.

    rank: r, components to report. fit_rank: R ≥ r, columns of V. estimator: "paper", squared_loss, σ² = 0, R = r; or
    "likelihood", pair_likelihood, R = min(d, 64), σ² fitted and at least a thousandth of the mean square (where columns
    are proportional it is unbounded at 0). subtle: R = r is far worse off the model, a large R hardly worse on it.
    ValueError: r and R that do not fit, columns that no rows link, zeros alone.
    """
    d, likelihood = stats.d, estimator == "likelihood"
    R = fit_rank or (max(rank, min(d, 64)) if likelihood else rank)
    sums, counts, squares = stats.table
    if not 1 <= rank <= R <= d:
        raise ValueError(f"rank = {rank} and fit_rank = {R}; want 1 ≤ rank ≤ fit_rank ≤ {d}, the number of columns")
    check_columns(counts, range(d))
    mean_square = float(sums.trace() / counts.trace())
    if mean_square == 0:
        raise ValueError("every value is zero")
    table = torch.stack([sums / mean_square, counts, squares / mean_square])  # in units of the mean square
    eigenvalues, Q = top_eigenvectors(inverse_propensity(stats) / mean_square, R)
    start = Q * eigenvalues.clamp(min=1e-6).sqrt()
    unit = sums.new_ones(d, 1)
    if likelihood:  # subtle: a column's error counts in units of the column's own spread, so steps are taken in these
        unit = (table[0].diagonal() / counts.diagonal()).clamp(min=1e-6).sqrt()[:, None]
    W = (start / unit).contiguous().requires_grad_()
    log_noise = sums.new_tensor(math.log(0.1)).requires_grad_(likelihood)

    @torch.no_grad()
    def closure():
        V, noise = unit * W, 1e-3 + log_noise.exp() if likelihood else 0.0
        theta = V @ V.T
        theta.diagonal().add_(noise)
        loss, G = (pair_likelihood if likelihood else squared_loss)(theta, table)
        # subtle: torch's L-BFGS drops a step whose (gradient change)·(step) is below 1e-10: so in large units
        W.grad, log_noise.grad = 1e9 * 2 * unit * (G @ V), 1e9 * log_noise.exp() * G.trace()
        return 1e9 * loss

    optimizer = torch.optim.LBFGS([W, log_noise] if likelihood else [W], max_iter=20, history_size=20,
                                  tolerance_grad=0, tolerance_change=0, line_search_fn="strong_wolfe")
    before, converged = math.inf, False
    while not converged and optimizer.state[W].get("n_iter", 0) < max_steps:
        optimizer.step(closure)
        loss = float(closure())
        converged, before = before - loss <= 1e-6 * abs(loss) + 1e-12, loss
    noise_variance = (1e-3 + float(log_noise.detach().exp())) * mean_square if likelihood else 0.0
    return Model(stats, (unit * W).detach() * mean_square**0.5, rank, noise_variance, converged)


# ==================================================================================== how good is it


def rowspace_error(A, B):
    """min over rotations R of ‖A·R − B‖², A, B (d, r) orthonormal: 0 for one space, 2r for orthogonal ones (eq. 4)."""
    return max(0.0, float(2 * A.shape[1] - 2 * torch.linalg.svdvals(A.T @ B).sum()))


def pair_fit(model, block, center=None):
    """−Σ N_ab·(Θ_ab − H_ab)² / Σ N_ab over the pairs a ≠ b of other rows, Θ of the first 1, 2, … components, (R,).

    Chooses the rank: a component that is not there costs, as does one that is missing. It may not choose R or the
    estimator: it scores all of Θ, and two that fit pairs alike can differ much in the space that is reported."""
    sums, counts = (t - t.diagonal().diag() for t in block.table[:2])
    theta, scores = torch.zeros_like(sums), []
    eigenvalues, Q = model.components(n=model.V.shape[1])
    for eigenvalue, q in zip(eigenvalues, Q.T):
        theta += eigenvalue * torch.outer(q, q)
        scores.append(-(counts * (theta - sums / counts.clamp(min=1)) ** 2).sum() / counts.sum())
    return torch.stack(scores)


def explained(model, block, center=None):
    """tr(QᵀTQ)/tr T, T unbiased for XᵀX/m of other rows: the share of their variance in the first 1, 2, … components.

    Compares estimators and fit_rank at a given rank: it scores the space that is reported, and nothing else. It may not
    choose the rank, for it grows with it."""
    T, Q = inverse_propensity(block), model.components(center, n=model.V.shape[1])[1]
    if center == "rows":
        T = T - T.mean(0) - T.mean(1)[:, None] + T.mean()
    return (Q * (T @ Q)).sum(0).cumsum(0) / T.trace()


def held_out(blocks, score, rank=1, center=None, max_steps=100, **settings):
    """Fit all blocks of rows but one, score that one, each in turn: (blocks, R), by how many components are reported.

    blocks: PairStats of disjoint blocks of rows (neighbours together where neighbours are alike). score: pair_fit or
    explained. settings: of fit."""
    total = sum(blocks[1:], blocks[0])
    return torch.stack([score(fit(total - block, rank, max_steps=max_steps, **settings), block, center)
                        for block in blocks])


def block_error(scores):
    """Standard error of a mean over blocks (blocks, …): the delete-one jackknife. Rows, not pairs, are independent."""
    return scores.std(0) / len(scores) ** 0.5


def first_near_best(scores):
    """Scores (blocks, n) → the first of the n within one standard error of the best, and the best."""
    best = int(scores.mean(0).argmax())
    behind = scores[:, best : best + 1] - scores
    return int((behind.mean(0) <= block_error(behind)).nonzero()[0, 0]), best


def choose_rank(blocks, fit_rank=64):
    """The smallest rank within one standard error of the best in pairs of held-out rows → rank, at_bound.

    One fit of many columns scores all ranks, for components are nested; the columns double if the best is the last.
    at_bound: the loss still fell at rank d, so no rank below the number of columns was found."""
    d = blocks[0].d
    first, best = first_near_best(held_out(blocks, pair_fit, fit_rank=min(fit_rank, d)))
    if best + 1 == fit_rank < d:
        return choose_rank(blocks, 2 * fit_rank)
    return first + 1, best + 1 == d


def choose_fit(blocks, rank, center=None, shown=None):
    """Settings of fit by the variance of held-out rows that the first `shown` (default: rank) components explain.

    Of four the first within one standard error of the best → its name, {name: Model of all rows}, {name: shares}."""
    wide, models, shares = max(rank, min(blocks[0].d, 64)), {}, {}
    for estimator, R in ("likelihood", wide), ("paper", wide), ("paper", rank), ("likelihood", rank):
        models[label(estimator, R)] = fit(sum(blocks[1:], blocks[0]), rank, R, estimator)
        scores = held_out(blocks, explained, rank, center, estimator=estimator, fit_rank=R)
        shares[label(estimator, R)] = scores[:, (shown or rank) - 1]
    first, _ = first_near_best(torch.stack(list(shares.values()), 1))
    return list(models)[first], models, shares


# ==================================================================================== baselines

SPECTRAL = {  # the matrix whose top eigenvectors are taken
    "direct SVD": lambda stats: stats.table[0],
    "zero diagonal": lambda stats: stats.table[0] - stats.table[0].diagonal().diag(),
    "inverse propensity": inverse_propensity,
    "pairwise mean": lambda stats: stats.table[0] / stats.table[1].clamp(min=1),
}


def spectral(stats, rank, matrix):
    """The Model of a matrix's top eigenvectors."""
    eigenvalues, Q = top_eigenvectors(matrix(stats), rank)
    return Model(stats, Q * eigenvalues.clamp(min=0).sqrt(), rank)


def complete(columns, values, d, rank, ridges, seed=0, steps=30):
    """Completion of X itself: min over U (m, r), V (d, r) of Σ over the entries seen (u_i·v_j − x_ij)²/|E| +
    ridge·(‖U‖²/m + ‖V‖²/d), by alternating exact least squares → bases of V (d, r), one for each ridge.

    columns, values (m, k). ridges: in units of the mean square; each starts from the solution of the one before."""
    (m, k), values, bases = columns.shape, values.double(), []
    V = torch.randn(d, rank, generator=torch.Generator().manual_seed(seed + 2**20)).to(values)  # not the truth
    add = lambda terms: V.new_zeros(d, *terms.shape[2:]).index_add_(0, columns.flatten(), terms.flatten(0, 1))
    for ridge in ridges:
        eye = ridge * values.square().mean() * torch.eye(rank).to(V)
        for _ in range(steps):
            L = V[columns]  # (m, k, r)
            U = torch.linalg.solve(L.mT @ L + k * eye, L.mT @ values[..., None])[..., 0]  # (m, r)
            outer = (U[:, :, None] * U[:, None])[:, None].expand(-1, k, -1, -1)  # (m, k, r, r)
            V = torch.linalg.solve(add(outer) + m * k / d * eye, add(values[..., None] * U[:, None]))
        bases.append(torch.linalg.qr(V)[0])
    return bases


# ==================================================================================== people's files

MISSING = {"", "na", "n/a", "nan", "null", "none", ".", "?", "-"}
NOT_TEXT = {b"PK": "a zip archive (.npz and .xlsx are): unpack it, or save it as text, and give the text file",
            b"<": "a web page, not a table: download the file again", b"\xff\xfe": "UTF-16 text: save it as UTF-8"}


def unzipped(path):
    """A file's lines, bytes, gzipped or not."""
    with open(path, "rb") as file:
        zipped = file.read(2) == b"\x1f\x8b"
    with (gzip.open if zipped else open)(path, "rb") as file:
        try:
            yield from file
        except (EOFError, zlib.error):
            raise ValueError(f"{path} is cut off or damaged: download it again") from None


def read_text(path):
    """The text of a UTF-8 file less its byte-order mark; what else people give is refused by name."""
    raw = b"".join(unzipped(path))
    for start, what in NOT_TEXT.items():
        if raw.lstrip().startswith(start):
            raise ValueError(f"{path} is {what}")
    try:
        return raw.decode("utf-8-sig").lstrip("\r\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text (byte {error.start:,}): save it as UTF-8") from None


def to_number(cell):
    """NaN where the cell is missing, infinity where it is no number."""
    try:
        return math.inf if "_" in cell else float(cell)  # float("1_000") is 1000.0
    except ValueError:
        return math.nan if cell.strip().lower() in MISSING else math.inf


def number_labels(labels):
    """Strings → (their numbers, in order of first appearance, and the different strings)."""
    number = defaultdict(count().__next__)
    return np.fromiter(map(number.__getitem__, labels), np.int64, len(labels)), list(number)


def read_entries(path, layout=None):
    """A text file → (row, column, value, row labels, column labels): arrays (entries,) sorted by row, lists of strings.

    long: lines of row, column, value (a fourth field is ignored), in any order, with a header or without. wide: a
    header of names, then a line a row; blank and NA cells are missing. Comma, semicolon, tab, space or `::` between
    cells, quoted or not. layout: "long", "wide", or None: long where lines have three or four fields and the first
    ones repeat. Prints what was read as what. Raises ValueError that names row, column and remedy."""
    text = read_text(path)
    if "::" in text.split("\n", 1)[0]:
        text = text.replace("::", "\t")
    first = text.split("\n", 1)[0]
    delimiter = max("\t;, ", key=lambda mark: len(next(csv.reader([first], delimiter=mark), [])))
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True)
    names, cells = next(reader, []), []
    width = len(names)
    if width < 3:
        raise ValueError(f"{path}, line 1 has {width} fields: want row, column, value, or a table of three or more")
    for line in reader:
        if line and len(line) != width:
            raise ValueError(f"{path}, line {reader.line_num} has {len(line)} fields, line 1 has {width}: put cells "
                             f"that hold {delimiter!r} in quotes")
        cells += line  # subtle: flat; a million small lists cost seconds of garbage collection
    header = any(map(str.isalpha, names[2])) and to_number(names[2]) == math.inf
    if not header:
        cells, names = names + cells, [f"field {i + 1}" for i in range(width)]
    firsts = cells[::width]
    if layout == "long" or layout is None and width <= 4 and len(set(firsts)) < len(firsts):
        (row, rows), (column, columns), cells = number_labels(firsts), number_labels(cells[1::width]), cells[2::width]
        what = f"long: row {names[0]!r}, column {names[1]!r}, value {names[2]!r}" + f", not {names[3:]}" * (width > 3)
    else:
        if not header:
            raise ValueError(f"{path}, line 1 has no names of columns: add them (y2019, not 2019), or say layout long")
        named = names[0].lower() in ("", "row", "name", "id") or names[0].endswith(("_id", " id", "Id", "ID"))
        labelled = named or any(to_number(cell) == math.inf for cell in firsts)
        rows, columns = firsts if labelled else list(map(str, range(1, len(firsts) + 1))), names[labelled:]
        cells = [cell for i, cell in enumerate(cells) if i % width >= labelled]
        row, column = np.divmod(np.arange(len(cells)), len(columns))
        what = f"wide: columns {columns[0]!r} to {columns[-1]!r}" + f", rows by {names[0]!r}" * labelled
    value = np.array(list(map(to_number, cells)))
    key = row * len(columns) + column
    order = np.argsort(key, kind="stable")
    order = order[~np.isnan(value[order])]
    twice = order[1:][np.diff(key[order]) == 0]
    for wrong, problem in ((np.flatnonzero(np.isinf(value)), "no number: write 1.5, not 1,5 (or say layout long)"),
                           (twice, "there twice: keep one, or their mean (or is this a table? say layout wide)")):
        if len(wrong):
            where = f"row {rows[row[wrong[0]]]!r}, column {columns[column[wrong[0]]]!r}"
            raise ValueError(f"{path}, {where}: {cells[wrong[0]]!r} is {problem}")
    print(f"{path}: {what}, separated by {delimiter!r}; {len(rows):,} rows, {len(columns):,} columns, "
          f"{len(order):,} entries, {len(cells) - len(order):,} missing")
    return row[order], column[order], value[order], rows, columns


def row_batches(row, column, value):
    """Entries sorted by row → (row numbers (n,), columns (n, k), values (n, k)), n rows of the same length."""
    first = np.flatnonzero(np.r_[True, row[1:] != row[:-1]])
    length = np.diff(np.r_[first, len(row)])
    for k in np.unique(length):
        same = first[length == k]
        for some in np.array_split(same, -(-len(same) * k * k // 2**22)):
            at = some[:, None] + np.arange(k)
            yield row[some], column[at], value[at]


GENOTYPES = {b"0": 0, b"1": 2, b".": -1} | {  # copies of the second allele, −1 missing; one letter: a haploid call
    (a + mark + b).encode(): -1 if "." in a + b else int(a) + int(b) for a in "01." for mark in "|/" for b in "01."}


def genotypes(text, people):
    """The cells of a VCF line → (people,) int8. All `a|b`: read at fixed places; else cell by cell."""
    others = text[::2].translate(None, b"01.") + text[1::2].translate(None, b"|/\t")
    if len(text) == 4 * people - 1 and not others:
        a, b = (np.frombuffer(text[start::4], np.int8) - 48 for start in (0, 2))
        return np.where((a < 0) | (b < 0), -1, a + b)
    return np.array([GENOTYPES[cell.split(b":", 1)[0]] for cell in text.split(b"\t")], np.int8)


def read_vcf(path, rank=0, world=1):
    """A VCF, gzipped or not: first the samples' names, then (chunk number, genotypes (sites, people) int8: 0, 1, 2, −1
    missing) of this rank's chunks, 512 neighbouring SNPs of two alleles each. ValueError names the line."""
    samples, chunk, sites, left_out = None, [], 0, 0
    for n, line in enumerate(unzipped(path), 1):
        if line.startswith(b"##"):
            continue
        cells = line.rstrip(b"\r\n").split(b"\t", 9)
        if samples is None:
            if cells[0] != b"#CHROM" or len(cells) < 10:
                raise ValueError(f"{path}, line {n}: want the header #CHROM … FORMAT and samples; make a VCF by "
                                 "`bcftools view` or `plink2 --export vcf`")
            yield (samples := cells[9].decode().split("\t"))
        elif len(cells) < 10 or cells[8].split(b":")[0] != b"GT":
            raise ValueError(f"{path}, line {n}: no genotypes (want GT first in FORMAT), or cut off")
        elif len(cells[3]) != 1 or cells[4].upper() not in (b"A", b"C", b"G", b"T"):
            left_out += 1  # not a SNP of two alleles
        else:
            if sites // 512 % world == rank:
                try:
                    chunk.append(genotypes(cells[9], len(samples)))
                except KeyError as error:
                    raise ValueError(f"{path}, line {n}: {error} is no genotype such as 0|1, 0/1 or .") from None
                if len(chunk[-1]) != len(samples):
                    raise ValueError(f"{path}, line {n}: {len(chunk[-1])} genotypes, {len(samples)} samples: cut off?")
            sites += 1
            if chunk and sites % 512 == 0:
                yield sites // 512 - 1, np.array(chunk)
                chunk = []
    if not sites:
        raise ValueError(f"{path} has no SNP of two alleles")
    if chunk:
        yield sites // 512, np.array(chunk)
    print(f"{path}: {len(samples):,} samples, {sites:,} SNPs of two alleles, {left_out:,} other sites left out")


def read_panel(path, samples):
    """Populations of these samples, from lines of sample, population; of 1000 Genomes' panel its super_pop."""
    text = read_text(path)
    mark, at = next((mark for mark in "\t," if mark in text), None), 2 if "super_pop" in text else 1
    lines = [line.split(mark) for line in text.splitlines()]
    people = {line[0].strip(): line[at].strip() for line in lines if len(line) > at}
    if unknown := [sample for sample in samples if sample not in people]:
        raise ValueError(f"{path} has no population of {unknown[0]!r} ({len(unknown)} of {len(samples)} samples)")
    return [people[sample] for sample in samples]


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


def set_up(args):
    """Seeds, device and torchrun's process group → (device, rank, world)."""
    rank, local = int(os.environ.get("RANK", 0)), int(os.environ.get("LOCAL_RANK", 0))
    world = int(os.environ.get("WORLD_SIZE", 1))
    try:
        device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(1, device=device)
        if device.type == "cuda":
            torch.cuda.set_device(device := torch.device("cuda", device.index or local))
            torch.set_float32_matmul_precision("high")
    except (RuntimeError, AssertionError) as error:
        fail(f"--device {args.device} cannot be had here: {error}")
    if world > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    torch.manual_seed(args.seed)
    torch.set_flush_denormal(True)  # a denormal slows a CPU matmul tenfold
    return device, rank, world


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


def begin(args):
    """set_up → device, rank, world; only rank 0 speaks."""
    device, rank, world = set_up(args)
    if device.type == "cpu":
        torch.set_num_threads(1)  # subtle: on small matrices more threads bring little, and cost much beside other work
    if rank > 0:
        sys.stdout = open(os.devnull, "w")
    return device, rank, world


def finish(args, rank, header, rows, draw=None, **figures):
    """Rank 0 prints the table and the paths of results.json and the figure; the ranks part."""
    if rank == 0:
        print_table(header, rows)
        save_results(args.out, args, header=header, rows=rows, **figures)
        if draw:
            figure(args.out / f"{args.out.name}.png", args, draw, (7.5, 5.2))
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def write_csv(path, header, lines):
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *lines])
    print(path)


def mean_sd(values):
    return f"{np.mean(values):.4f}" + (f" ± {np.std(values, ddof=1):.4f}" if len(values) > 1 else "")


def label(estimator, fit_rank):
    return f"{estimator}, V of {fit_rank} columns"


def right_factor(d, rank, seed, device="cpu"):
    """V ~ N(0, 1/r), (d, r): entries of X then have variance 1."""
    return torch.randn(d, rank, generator=torch.Generator().manual_seed(seed)).to(device) / rank**0.5


def low_rank_rows(V, m, k, seed, noise_sd=0.0, rank=0, world=1):
    """The paper's synthetic rows x = V·u + noise, u ~ N(0, 1), of which k entries are shown: (u, columns, values) in
    chunks, this rank's share. A chunk depends on seed and its number alone: any number of ranks makes the same rows."""
    (d, r), size = V.shape, max(1024, 2**22 // len(V))
    for chunk in range(rank, -(-m // size), world):
        of_chunk = int(np.random.default_rng((seed, chunk)).integers(2**31))  # subtle: torch takes 32 bits of a seed
        n, generator = min(size, m - chunk * size), torch.Generator(V.device).manual_seed(of_chunk)
        u, noise = (torch.randn(n, width, device=V.device, generator=generator) for width in (r, k))
        columns = torch.rand(n, d, device=V.device, generator=generator).topk(k, 1).indices  # k different ones, uniform
        yield u, columns, (V[columns] @ u[..., None])[..., 0] + noise_sd * noise


def make_rows(args, V, m, seed, noise_sd=0.0, rank=0, world=1):
    """PairStats of m synthetic rows, made by all ranks."""
    stats = PairStats(len(V), device=V.device)
    for _, columns, values in low_rank_rows(V, m, args.k, seed, noise_sd, rank, world):
        stats.update(columns, values)
    return stats.all_reduce()


def check_sizes(args):
    if not (2 <= args.k <= args.columns >= args.rank >= 1 and min(args.rows) >= 100):
        fail(f"--rows {args.rows}, --columns {args.columns}, --k {args.k}, --rank {args.rank}: want 100 rows or more, "
             "k in 2 to the number of columns, rank in 1 to that")


def compare(args, cases):
    """Row-space errors of all methods; completion of X up to 50,000 rows.

    cases: {name: (rows, sd of noise, whether the spectrum falls as j^−1.5 without end)} → rank, header and rows of a
    table, {method: {case: errors of the seeds}}."""
    check_sizes(args)
    device, rank, world = begin(args)
    d, r, errors = args.columns, args.rank, {}
    jobs = [(case, seed) for case in cases for seed in range(args.seed, args.seed + args.seeds)]
    for case, seed in tqdm(jobs, disable=args.quiet or rank > 0):
        m, noise_sd, endless = cases[case]
        V = right_factor(d, d if endless else r, seed, device)
        if endless:
            V = torch.linalg.qr(V)[0] * torch.arange(1, d + 1, device=device) ** -0.75 * d**0.5
        stats, truth = make_rows(args, V, m, seed, noise_sd, rank, world), torch.linalg.svd(V.double())[0][:, :r]
        models = {name: spectral(stats, r, matrix) for name, matrix in SPECTRAL.items()}
        for estimator in "paper", "likelihood":
            for R in sorted({r, max(r, min(d, 64))}):
                models[label(estimator, R)] = fit(stats, r, R, estimator)
        figures = {name: rowspace_error(model.components()[1], truth) for name, model in models.items()}
        if m <= 50_000:
            _, columns, values = (torch.cat(x) for x in zip(*low_rank_rows(V, m, args.k, seed, noise_sd)))
            for name, ridges in ("ridge 0.01", [0.01]), ("best of 5 ridges", [0.5, 0.3, 0.2, 0.15, 0.1]):
                bases = complete(columns, values, d, r, ridges, seed)  # subtle: the truth chooses, more than a user has
                figures[f"completion of X, {name}"] = min(rowspace_error(Q, truth) for Q in bases)
        figures["σ² fitted (V of r columns)"] = models[label("likelihood", r)].noise_variance
        for name, value in figures.items():
            errors.setdefault(name, {}).setdefault(case, []).append(value)
    header = [f"row-space error, 0 to {2 * r}; d = {d}, r = {r}, k = {args.k}", *cases]
    rows = [[name, *(mean_sd(by[case]) if case in by else "" for case in cases)] for name, by in errors.items()]
    return rank, header, rows, errors


def synthetic(args):
    """Section 5.1: row-space error against the number of rows. X = U·Vᵀ, U ~ N(0, 1), V ~ N(0, 1/r)."""
    rank, header, rows, errors = compare(args, {f"{m:,} rows": (m, 0.0, False) for m in args.rows})
    curves = {name: (args.rows[: len(by)], [np.mean(e) for e in by.values()]) for name, by in errors.items()}
    header.append("slope")  # of log error against log rows
    for row, (m, e) in zip(rows, curves.values()):
        row.append(float(np.polyfit(np.log(m), np.log(e), 1)[0]) if len(m) > 1 else math.nan)

    def draw(fig):
        ax = fig.subplots()
        for name, curve in list(curves.items())[:-1]:
            ax.loglog(*curve, "o-" if name.startswith(("paper", "likelihood")) else "s--", ms=4, label=name)
        ax.set(xlabel="rows", ylabel=f"row-space error (0 to {2 * args.rank})",
               title=f"{args.k} of {args.columns} entries seen in each row, rank {args.rank}")
        fig.legend(fontsize=8, loc="outside right upper")

    finish(args, rank, header, rows, draw, errors=errors)


def robust(args):
    """Off the paper's model: noise on the entries, and a spectrum that falls as j^−1.5 and never ends."""
    if len(args.rows) > 1:
        fail(f"--rows {args.rows}: robust takes one number of rows")
    noise = {f"noise sd {sd:g}": (args.rows[0], sd, False) for sd in (0.0, 0.5, 1.0, 2.0)}
    rank, header, rows, errors = compare(args, noise | {"no end": (args.rows[0], 0.0, True)})
    finish(args, rank, header, rows, errors=errors)


def impossible(args):
    """Why one side only: what k < r entries of a row leave open, no number of rows tells.
    r − k directions of a row are free: the best guess of its other entries, made with the true V, misses (r − k)/r of
    their variance. The row space comes ever closer all the while."""
    check_sizes(args)
    device, rank, world = begin(args)
    d, r, k, rows = args.columns, args.rank, args.k, []
    V = right_factor(d, r, args.seed, device)
    truth = torch.linalg.qr(V.double())[0]
    u, columns, values = next(low_rank_rows(V, 2000, k, args.seed + 1000))  # new rows
    x = u.double() @ V.double().T
    unseen = torch.ones_like(x, dtype=torch.bool).scatter_(1, columns, False)
    missed = lambda model: float((model.transform(columns, values)[1] - x)[unseen].norm() / x[unseen].norm()) ** 2
    for m in args.rows:
        stats = make_rows(args, V, m, args.seed, 0.0, rank, world)
        model, oracle = fit(stats, r), Model(stats, V.double(), r)
        error = f"{rowspace_error(model.components()[1], truth):.4f}"
        rows.append((f"{m:,}", error, missed(model), missed(oracle), max(0.0, (r - k) / r)))
    header = (f"rows; d = {d}, r = {r}, k = {k}", f"row-space error, 0 to {2 * r}", "unseen variance missed, V fitted",
              "V true", "(r − k)/r")
    finish(args, rank, header, rows)


def balding_nichols(sites, population, fst, seed, rank=0, world=1):
    """Genotypes of unrelated people, population (people,) integers → (chunk number, (512 sites, people) int8): at each
    site an ancestral frequency p ~ U(0.05, 0.95), in each population one of Beta(p·(1 − F)/F, (1 − p)·(1 − F)/F)."""
    for chunk in range(rank, sites // 512, world):
        rng, odds = np.random.default_rng((seed, chunk, 1)), (1 - fst) / fst
        p = rng.uniform(0.05, 0.95, (512, 1)).repeat(population.max() + 1, 1)
        yield chunk, rng.binomial(2, rng.beta(p * odds, (1 - p) * odds)[:, population]).astype(np.int8)


def few_genotypes(x, k, maf, rng):
    """Genotypes x (sites, people) in 0, 1, 2, −1 missing → (columns (n, k), values (n, k)) of k people a site, and all
    coded values (n, people), missing ones as the site's mean; sites whose minor allele has frequency maf or more.

    subtle: coded x − 1. A site's mean is taken off later, so any origin is unbiased; this one has far less variance."""
    known = x >= 0
    frequency = np.where(known, x, 0).sum(1) / 2 / known.sum(1).clip(1)
    common = (frequency >= maf) & (frequency <= 1 - maf)
    x, known, frequency = x[common], known[common], frequency[common]
    coded = np.where(known, x, 2 * frequency[:, None]) - 1
    columns = np.argpartition(rng.random(x.shape, np.float32) + 2 * ~known, k - 1, 1)[:, :k]  # missing ones come last
    values, known = (np.take_along_axis(everyone, columns, 1) for everyone in (coded, known))
    return np.where(known, columns, -1), values, coded


def genome(args):
    """Section 5.2: people's ancestry from k genotypes a site. Rows are sites, columns are people.
    --data FILE.vcf.gz, or 3 × 20 simulated people (Balding–Nichols, F = 0.1, as of continents). Writes people.csv:
    sample, population, PC1, …"""
    device, rank, world = begin(args)
    if args.data:
        sites = read_vcf(args.data, rank, world)
        samples = next(sites)
        labels = read_panel(args.panel, samples) if args.panel else ["?"] * len(samples)
    else:
        samples, labels = range(1, 61), np.arange(60) // 20
        sites = balding_nichols(args.sites, labels, 0.1, args.seed, rank, world)
    names, population = np.unique(labels, return_inverse=True)
    d, n = len(samples), len(names) - 1 or 2  # n components; one more is fitted, for the sites' means
    if not 2 <= args.k <= d or n >= d:
        fail(f"--k {args.k}, {d} people, {len(names)} populations: want a k of 2 to the people, and fewer populations")
    everyone, *blocks = (PairStats(d, device=device) for _ in range(6))
    for number, x in tqdm(sites, disable=args.quiet or rank > 0):
        columns, values, coded = few_genotypes(x, args.k, args.maf, np.random.default_rng((args.seed, number)))
        blocks[number % 5].update(columns, values)  # a block: runs of neighbouring sites
        coded = torch.from_numpy(coded - coded.mean(1, keepdims=True)).to(device)
        everyone.table[0] += coded.T @ coded
        everyone.table[1] += len(coded)
    for part in everyone, *blocks:
        part.all_reduce()
    if not all(block.table[1].any() for block in blocks):
        fail(f"want {5 * 512:,} sites or more: settings are chosen by five blocks, runs of 512 neighbouring sites")
    print(f"{everyone.table[1, 0, 0]:,.0f} sites have a minor allele frequency of {args.maf} or more")
    stats, rows = sum(blocks[1:], blocks[0]), []
    chosen, fits, shares = choose_fit(blocks, n + 1, "rows", n)
    models = {"all genotypes": spectral(everyone, n, SPECTRAL["direct SVD"])}
    models |= {name: spectral(stats, n + 1, matrix) for name, matrix in SPECTRAL.items()}
    points = {name: model.components("rows", n)[1] for name, model in (models | fits).items()}
    for name, Q in points.items():
        row = [name, rowspace_error(Q, points["all genotypes"]), neighbours_agree(Q, population), ""]
        if name in shares:
            row[3] = f"{shares[name].mean():.4f} ± {block_error(shares[name]):.4f}" + ", chosen" * (name == chosen)
        rows.append(row)
    if rank == 0:
        write_csv(args.out / "people.csv", ["sample", "population", *(f"PC{i + 1}" for i in range(n))],
                  [(*who, *at) for *who, at in zip(samples, labels, points[chosen].tolist())])
    header = f"{d} people, {args.k} seen a site", f"error, 0 to {2 * n}", "neighbours agree", "held-out share explained"
    finish(args, rank, header, rows)


def neighbours_agree(points, population):
    """Share of people whose nearest neighbour among points (n, d) is of their own population (n,)."""
    nearest = (torch.cdist(points, points) + 9 * torch.eye(len(points)).to(points)).argmin(1)
    return float((population == population[nearest.cpu().numpy()]).mean())


def fit_file(args):
    """Your own data: a text file of entries (lines of row, column, value) or a table with gaps.
    Writes model.npz (columns, components, values, V, means, noise_variance), and on demand the scores of the rows."""
    device, rank, world = begin(args)
    if args.center == "rows" and args.scores:
        fail("--scores goes with --center columns or none: a row's mean is not seen")
    row, column, value, rows, columns = read_entries(args.file, args.layout)
    keep = np.bincount(column, minlength=len(columns)) >= args.least
    row, column, value = row[keep[column]], (np.cumsum(keep) - 1)[column[keep[column]]], value[keep[column]]
    columns, shown = np.array(columns)[keep], np.bincount(row, minlength=len(rows))
    d = len(columns)
    none, alone = ((shown == n).sum() for n in (0, 1))
    print(f"left out: {(~keep).sum():,} columns with fewer than {args.least} entries (--least), {none:,} rows without "
          f"any other; {alone:,} rows show one entry, which tells no pair")
    if not max(3, args.rank or 0) <= d <= 10_000:
        fail(f"{args.file}: {d:,} columns have {args.least} entries or more; want 10,000 at most (filter columns: "
             "raise --least), 3 at least, and --rank of them")
    means = np.bincount(column, value) / np.bincount(column) if args.center == "columns" else None
    blocks = [PairStats(d, means, device=device) for _ in range(5)]
    for numbers, at, x in row_batches(row, column, value):
        for i, block in enumerate(blocks):  # 50 runs of neighbouring rows, dealt to five blocks
            mine = (numbers * 50 // len(rows) % 5 == i) & (numbers % world == rank)
            block.update(at[mine], x[mine])
    for block in blocks:
        block.all_reduce()
    stats, r = sum(blocks[1:], blocks[0]), args.rank
    check_columns(stats.table[1], columns)
    if not r:
        if (shown > 1).sum() < 50:
            fail(f"{args.file}: {(shown > 1).sum()} rows show a pair, choosing a rank takes 50: give --rank")
        try:
            r, at_bound = choose_rank(blocks)
        except ValueError as error:
            fail(f"{args.file}: a rank is chosen by fits without a fifth of the rows, but then {error}, or give --rank")
        print(f"rank {r} by held-out rows" + ": their loss fell to the last column, there may be no rank" * at_bound)
    model = fit(stats, r, estimator=args.estimator)
    eigenvalues, Q = (x.cpu().numpy() for x in model.components(args.center))
    print(f"mean square beyond the {r} components: {model.residual_variance:.4g}"
          + "; the solver stopped before it converged" * (not model.converged))
    if rank == 0:
        np.savez(args.out / "model.npz", columns=columns, components=Q, values=eigenvalues, V=model.V.cpu(),
                 means=stats.means.cpu(), noise_variance=model.noise_variance)
        print(args.out / "model.npz")
    if rank == 0 and args.scores:
        scores = np.zeros((len(rows), r))
        for numbers, at, x in row_batches(row, column, value):
            scores[numbers] = model.transform(at, x)[0].cpu()
        write_csv(args.scores, ["row", *(f"score {i + 1}" for i in range(r))], [(i, *z) for i, z in zip(rows, scores)])
    table = []
    for i, q in enumerate(Q.T):
        largest = ", ".join(f"{columns[j]} {q[j]:+.2f}" for j in np.abs(q).argsort()[:-5:-1])
        table.append((f"component {i + 1}", f"{eigenvalues[i]:.4g}", largest))
    finish(args, rank, ("", "eigenvalue", "largest entries"), table)


# ==================================================================================== command line


def row_counts(text):
    """3000,12000 → [3000, 12000]."""
    return sorted({int(part) for part in text.split(",")})


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], epilog="TASK --help: its flags; all "
                                     "have --device, --seed, --out, --no_plot, --quiet. Without TASK: synthetic.")
    parser.error = fail
    tasks = parser.add_subparsers(required=True, metavar="TASK")
    flags = {
        "rows": dict(type=row_counts, help="numbers of rows, as in 3000,12000 (%(default)s)"),
        "columns": dict(type=int, default=50, help="columns of X (%(default)s)"),
        "rank": dict(type=int, default=3, help="components (3; impossible: 5; fit: by held-out rows)"),
        "k": dict(type=int, default=2, help="entries seen in a row (%(default)s; the paper's theorem: 2)"),
        "seeds": dict(type=int, default=3, help="number of seeds, from --seed on (%(default)s)"),
        "data": dict(help="a VCF, gzipped or not (simulated people)"),
        "panel": dict(help="populations of its samples: lines of sample, population, or 1000 Genomes' panel"),
        "maf": dict(type=float, default=0.05, help="least minor allele frequency of a site (%(default)s)"),
        "sites": dict(type=int, default=100_000, help="simulated sites, in whole chunks of 512 (%(default)s)"),
        "center": dict(choices=("rows", "columns"), help="take off the mean of each row or column (neither)"),
        "estimator": dict(choices=("likelihood", "paper"), default="likelihood", help="(%(default)s)"),
        "layout": dict(choices=("long", "wide"), help="lines of row, column, value, or a table (by the file)"),
        "least": dict(type=int, default=10, help="leave out columns with fewer entries (%(default)s)"),
        "scores": dict(type=Path, help="write the scores of the rows to this .csv"),
        "device": dict(help="cpu or cuda (cuda where there is one)"),
        "seed": dict(type=int, default=0, help="of everything that is drawn (%(default)s)"),
        "out": dict(type=Path, help="folder for results (%(default)s)"),
        "no_plot": dict(action="store_true", help="write no figure"),
        "quiet": dict(action="store_true", help="no progress bars"),
    }

    def task(function, names, **defaults):
        name = function.__name__.removesuffix("_file")
        sub = tasks.add_parser(name, help=function.__doc__.split("\n")[0], description=function.__doc__)
        sub.error = fail
        for flag in f"{names} device seed out no_plot quiet".split():
            sub.add_argument(f"--{flag}", **flags[flag])
        sub.set_defaults(task=function, out=Path("out/onesided_mc") / name, **defaults)
        return sub

    task(synthetic, "rows columns rank k seeds", rows="3000,12000,50000,200000,1000000")
    task(genome, "data panel maf k sites", k=5)
    task(fit_file, "center rank estimator layout least scores", rank=None).add_argument(
        "file", type=Path, help="lines of row, column, value, or a table with gaps (text, .gz)")
    task(robust, "rows columns rank k seeds", rows="50000")
    task(impossible, "rows columns rank k", rows="10000,50000,250000,1000000", rank=5)
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0].startswith("-") and argv[0] not in ("-h", "--help"):
        argv = ["synthetic", *argv]
    args = parser.parse_args(argv)
    if getattr(args, "seeds", 1) < 1:
        fail(f"--seeds {args.seeds} must be above 0")
    return args


def main():
    try:
        run(parse_args())
    except ValueError as error:  # what the readers and fit say of the data
        fail(error)


if __name__ == "__main__":
    main()
