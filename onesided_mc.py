"""One-sided matrix completion from two observations per row (Cao, Liang, Valiant; ICML 2023, arXiv 2306.04049).

The problem. X has m rows, d ≪ m columns and rank r, and each row shows only k ≥ 2 of its entries, often fewer than r. Then X cannot be
completed: r − k directions of every row are free, whatever the method. Yet one side of it, the r right singular vectors, can be had.

The idea. They are the eigenvectors of Θ = XᵀX/m, which is only d×d. A row that shows columns a and b gives one noisy sample x_a·x_b of
Θ_ab, and x_a², x_b² of the diagonal. So complete Θ instead, a low-rank positive matrix whose entries are seen with noise:

    S_ab = Σ x_a·x_b, N_ab = Σ 1 over the rows that show a and b;  H = S/N                 one pass over the rows, O(d²) memory
    minimise over V (d, r):   F(V) = Σ_ab W_ab·((V·Vᵀ)_ab − H_ab)²                          equation 2, in sums instead of rows
    W_ab = N_ab/Σ_{a≠b} N off the diagonal, N_aa/Σ_a N_aa on it                            each row's pairs and squares weigh the same
    answer: the top eigenvectors of V·Vᵀ

The rows enter by S and N alone, since Σ (θ − x_a·x_b)² = N·(θ − S/N)² + a constant: the loss of the paper, row by row, is a weighted
least squares on d×d sums. They add up over chunks, files and machines; the solver (L-BFGS from a spectral start) never sees a row.

How to run it.

    python onesided_mc.py                        error against rows, nine methods: table, slopes, figure (half a minute)
    python onesided_mc.py genome | noise | rank | impossible | bench | ratings (a download)
    python onesided_mc.py fit data.csv           your own rows: lines of row, column, value → components, eigenvalues, standard errors
    torchrun --nproc_per_node=8 onesided_mc.py --columns 1000 --rank 5 --rows 100000000

What the paper says, as far as we could verify it (abstract, and texts that quote it): m of order r²·d·log d rows suffice, and the row
space comes out clearly better than by completing X or by direct factorisation, on synthetic and on genome data. Its figures' numbers, step
sizes and data splits we could not read; equation 2 and the Gaussian data are as independent re-implementations give them.

What we measured (2 cores of an AMD EPYC, torch 2.13.0; row-space error min_R ‖Q̂R − Q‖², 0 to 2r; mean of seeds 0-2):

    python onesided_mc.py     d = 50, r = 3, k = 2, rows:  3,000   12,000   50,000   200,000   1,000,000   slope in log-log
    low rank (paper)                                        0.363    0.082   0.0167    0.0051      0.0009   −1.02
    the same, weights N/variance (ours)                     0.208    0.047   0.0110    0.0033      0.0006   −1.00
    low rank, 0/1 weights (Hájek)                           0.598    0.135   0.0267    0.0068      0.0013   −1.06
    inverse propensity, spectral                            0.675    0.140   0.0301    0.0079      0.0015   −1.04
    zero diagonal, spectral (biased)                        0.711    0.145   0.0390    0.0176      0.0109   −0.72
    direct SVD of the zero-filled X                         3.227    3.430   3.4704    3.4371      3.4381    0.01
    completion of X, ridge 0.01                             4.541    4.537   4.4948
    completion of X, ridge by held-out rows                 0.118    0.057   0.0382                         −0.40
    soft-impute, threshold 0.3·σ₁                           0.334    0.102   0.0509                         −0.67

    python onesided_mc.py bench     d = 1000, r = 5, k = 2, 2,000,000 rows: error 0.041, sums 0.4 s, solver 0.7 s, peak 0.7 GB

What did not hold. "Completing X fails" is true of completion with little or no regularisation. With a ridge that predicts held-out entries
well (or, for soft-impute, the best threshold of four, chosen with the truth in hand), the same loss finds the row space too, though never
X: it is better than the paper's estimator below about 20,000 rows here. It is biased, so more rows stop helping, and it needs every row at
every step. Inverse propensity, from the same one pass, is within a factor of two in this table.

What is ours. Weights N/variance, with Gaussian rows' variance of a product from a first fit: a third less error (table). Noise on the
entries adds σ² to the diagonal of Θ alone; fitting it jointly (`noise`, 50,000 rows, sd 1): error 0.124 → 0.050, σ² = 0.992 ± 0.011. Rows
not exactly of rank r keep a bias with r columns of V, because the diagonal holds all the rest: more columns, then truncation (`rank`,
power-law spectrum, 200,000 rows): 0.160 → 0.036, inverse propensity 0.040. Rank and columns by held-out rows with a paired standard error.
A quarter of the row-space error between fits to two halves of the rows estimates the error without the truth: 0.0160 at 50,000 rows.
`genome` (Balding–Nichols, 3 × 20 people, F = 0.1, 100,000 sites, 5 seen a site, seed 0; error of 4, adjusted Rand index): low rank 0.090,
1.00; inverse propensity 0.303, 0.90; direct SVD 0.516, 0.90. Real genomes and MovieLens: readers tested, not measured.

What it assumes. Which columns a row shows does not depend on its values or on its kind. Unequal columns are fine (counts weigh them).
"""

import argparse
import gzip
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
import warnings
import zipfile
from collections import namedtuple
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

try:
    from kernels.pair_gram import pair_gram_ as fused_pair_gram_
except ImportError:  # copied alone, or no Triton here: the plain version below computes the same
    fused_pair_gram_ = None


# ============================================================================================== the method: statistics


def row_pairs(cols, vals, weights, d):
    """All pairs (a, b), a ≤ b, that the rows show, in k batches: (a·d + b, weight of the row, x_a·x_b), each one-dimensional.

    cols (rows, k) int64, ascending in each row, −1 = nothing here; vals (rows, k) float64; weights (rows,) float64 or None.
    """
    k = cols.shape[1]
    for shift in range(k):  # 0: the diagonal; 1: neighbours; …
        a, b = cols[:, : k - shift], cols[:, shift:]
        seen = a >= 0
        w = torch.ones_like(vals[:1, :1]) if weights is None else weights[:, None]
        yield (a * d + b)[seen], w.expand_as(a)[seen], (vals[:, : k - shift] * vals[:, shift:])[seen]


def pair_gram_(table, cols, vals, weights=None):
    """table += Σ over rows and pairs a ≤ b of w·(x_a·x_b, 1, (x_a·x_b)²) at cell a·d + b. table (3, d·d) float64, the rest as in
    row_pairs; vals in any float dtype. The plain version of kernels/pair_gram.py."""
    for cell, w, product in row_pairs(cols, vals.double(), weights, math.isqrt(table.shape[1])):
        table[0].index_add_(0, cell, w * product)
        table[1].index_add_(0, cell, w)
        table[2].index_add_(0, cell, w * product**2)


class Entries(namedtuple("Entries", "d rows cols table diagonal")):
    """The statistics as a symmetric matrix, flattened: all d² entries (rows and cols are None), or both triangles of the pairs that
    were seen. table (3, n): sums, counts, squares; diagonal (d,): where the diagonal's entries lie."""

    def predict(self, V):
        """(V·Vᵀ) at the entries, (n,)."""
        if self.rows is None:
            return (V @ V.T).flatten()
        return sum(v[self.rows] * v[self.cols] for v in V.T.contiguous())

    def times(self, values, V):
        """The matrix with these values at the entries, times V: (d, columns of V)."""
        if self.rows is None:
            return values.view(self.d, self.d) @ V
        starts = torch.searchsorted(self.rows, torch.arange(self.d + 1, device=values.device)).int()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch calls its CSR matrices a beta
            return torch.sparse_csr_tensor(starts, self.cols.int(), values, (self.d, self.d)) @ V

    def off_diagonal(self, values):
        """values (…, n) with zeros on the diagonal, a copy."""
        values = values.clone()
        values[..., self.diagonal] = 0
        return values

    def top(self, values, n):
        """The n largest eigenvalues, descending, and eigenvectors (d, n) of the matrix with these values: exact where it is dense,
        by subspace iteration where it is not."""
        if self.rows is None:
            w, Q = torch.linalg.eigh(values.view(self.d, self.d))
        else:
            Q = torch.randn(self.d, min(self.d, n + 10), dtype=values.dtype, device=values.device,
                            generator=torch.Generator(values.device).manual_seed(0))
            for _ in range(50):
                Q = torch.linalg.qr(self.times(values, Q))[0]
            w, U = torch.linalg.eigh(Q.T @ self.times(values, Q))
            Q = Q @ U
        return w.flip(0)[:n], Q.flip(1)[:, :n]


class PairStats:
    """All that the method reads of the rows: for each pair of columns a ≤ b, over the rows that show both, Σ w·x_a·x_b, Σ w and
    Σ w·(x_a·x_b)²; for each column Σ w·x_a; and the number of rows. Memory does not depend on the number of rows.

        stats = PairStats(d)
        for cols, vals in chunks:            # (rows, k) int and float; −1 in cols pads rows that show fewer
            stats.update(cols, vals)
        stats.all_reduce()                   # under torchrun, where each rank saw its own rows
        model = fit(stats, rank=3)

    d: columns. storage: "dense" (24·d² bytes), "pairs" (about 32 bytes for each pair that was seen), "auto" (pairs above 2,048
    columns). Everything is float64: counts stay exact integers to 2^53, so that they are the same for any chunks and any number of
    ranks. A row of weight 2 counts as two rows.
    """

    def __init__(self, d, storage="auto", device="cpu"):
        if d < 2 or storage not in ("auto", "dense", "pairs"):
            raise ValueError(f"PairStats: d = {d} and storage = {storage!r}; want d ≥ 2 and auto, dense or pairs")
        self.d, self.dense = d, storage == "dense" or storage == "auto" and d <= 2048
        cells = d * d if self.dense else 0
        self.flat = torch.zeros(3 * cells + d + 1, dtype=torch.float64, device=device)  # one buffer: one all_reduce
        self.table = self.flat[: 3 * cells].view(3, cells)
        self.firsts, self.n_rows = self.flat[-d - 1 : -1], self.flat[-1:]
        self.keys = torch.zeros(0, dtype=torch.int64, device=device)  # pairs: the cell of each column of the table, ascending
        self.pending, self.n_pending = [], 0

    def update(self, cols, vals, weights=None):
        """Add rows. cols (rows, k) integers, −1 where a row shows fewer than k entries, in any order; vals (rows, k) floats;
        weights (rows,) ≥ 0 or None. Raises ValueError naming the row of: a column out of range or twice in a row, a value that is
        not finite, a weight that is not ≥ 0; and for shapes or dtypes that do not fit."""
        device = self.flat.device
        cols, vals = torch.as_tensor(cols, device=device), torch.as_tensor(vals, device=device)
        weights = None if weights is None else torch.as_tensor(weights, dtype=torch.float64, device=device)
        fits = cols.ndim == 2 and cols.shape == vals.shape and (weights is None or weights.shape == cols.shape[:1])
        if cols.is_floating_point() or not fits:
            raise ValueError(f"update: cols {cols.dtype} {tuple(cols.shape)}, vals {tuple(vals.shape)}, weights "
                             f"{None if weights is None else tuple(weights.shape)}; want integers (rows, k), (rows, k), (rows,) or None")
        step = max(1, 2**20 // max(1, cols.shape[1]))
        for first in range(0, len(cols), step):
            block = slice(first, first + step)
            self._update(cols[block].long(), vals[block], None if weights is None else weights[block], first)
        return self

    def _update(self, cols, vals, weights, first):
        cols, order = cols.sort(1)
        vals = vals.gather(1, order)
        seen = cols >= 0
        vals = torch.where(seen, vals, 0)
        twice = torch.zeros_like(seen)
        twice[:, 1:] = (cols[:, 1:] == cols[:, :-1]) & seen[:, 1:]
        for wrong, what in (((cols < -1) | (cols >= self.d), f"which is not in 0..{self.d - 1}"), (twice, "twice"),
                            (~vals.isfinite(), "whose value is not finite")):
            if wrong.any():
                row, at = wrong.nonzero()[0].tolist()
                raise ValueError(f"row {first + row} shows column {int(cols[row, at])}, {what}")
        if weights is not None and not (weights >= 0).all():
            raise ValueError(f"row {first + int((~(weights >= 0)).nonzero()[0])} has a weight that is not ≥ 0")
        if self.dense:
            fused = cols.is_cuda and fused_pair_gram_ is not None
            (fused_pair_gram_ if fused else pair_gram_)(self.table, cols, vals, weights)
        else:
            for cell, w, product in row_pairs(cols, vals.double(), weights, self.d):
                self._add(cell, torch.stack([w * product, w, w * product**2]))
        w = seen.double() if weights is None else seen * weights[:, None]
        self.firsts.index_add_(0, cols.clamp(min=0).flatten(), (w * vals).flatten())
        self.n_rows += len(cols)

    def _add(self, keys, table):
        self.pending.append((keys, table))
        self.n_pending += len(keys)
        if self.n_pending > max(2**22, len(self.keys)):  # each pair is sorted a few times in all, however long the stream
            self._compact()

    def _compact(self):
        keys, tables = zip((self.keys, self.table), *self.pending)
        self.keys, at = torch.cat(keys).unique(return_inverse=True)
        self.table = self.flat.new_zeros(3, len(self.keys)).index_add_(1, at, torch.cat(tables, 1))
        self.pending, self.n_pending = [], 0
        return self

    def merge(self, other):
        """Add another's statistics, of other rows of the same table. Returns self."""
        if (self.d, self.dense) != (other.d, other.dense):
            raise ValueError(f"merge: {self.d} and {other.d} columns, dense {self.dense} and {other.dense}; want the same")
        if not self.dense:
            self._add(other._compact().keys, other.table)
        self.flat += other.flat
        return self

    def all_reduce(self):
        """Under torchrun: the sum over all ranks, on every rank. Returns self. One message of 8·(3·d² + d + 1) bytes."""
        if dist.is_initialized():
            dist.all_reduce(self.flat)
            if not self.dense:
                self._compact()
                shares = [None] * dist.get_world_size()
                dist.all_gather_object(shares, (self.keys.cpu(), self.table.cpu()))
                self.keys, self.table = self.keys[:0], self.table[:, :0]
                self.pending = [(keys.to(self.flat.device), table.to(self.flat.device)) for keys, table in shares]
                self._compact()
        return self

    def save(self, path):
        """An .npz, under a temporary name first."""
        if not self.dense:
            self._compact()
        arrays = dict(d=self.d, dense=self.dense, keys=self.keys, table=self.table, firsts=self.firsts, n_rows=self.n_rows)
        save_arrays(path, {name: np.asarray(torch.as_tensor(x).cpu()) for name, x in arrays.items()})

    @classmethod
    def load(cls, path, device="cpu"):
        with np.load(path) as arrays:
            stats = cls(int(arrays["d"]), "dense" if arrays["dense"] else "pairs", device)
            if stats.dense:
                stats.table.copy_(torch.from_numpy(arrays["table"]))
            else:
                stats.keys, stats.table = (torch.from_numpy(arrays[name]).to(device) for name in ("keys", "table"))
            stats.firsts.copy_(torch.from_numpy(arrays["firsts"]))
            stats.n_rows.copy_(torch.from_numpy(arrays["n_rows"]))
        return stats

    def entries(self):
        """The statistics as Entries. Raises ValueError where the data cannot say anything: a column that was never seen, no row with
        two columns."""
        keys = torch.arange(self.d**2, device=self.flat.device) if self.dense else self._compact().keys
        diagonal = keys[(keys // self.d == keys % self.d) & (self.table[1] > 0)] // self.d
        if len(diagonal) < self.d:
            missing = sorted(set(range(self.d)) - set(diagonal.tolist()))
            raise ValueError(f"column {missing[0]} is never seen ({len(missing)} of {self.d} are not): leave it out, or see more rows")
        if self.dense:
            rows, cols, diagonal = None, None, diagonal * (self.d + 1)
            upper = self.table.view(3, self.d, self.d)
            table = (upper + upper.mT).view(3, -1)
            table[:, diagonal] /= 2
        else:
            a, b = keys // self.d, keys % self.d
            lower = (a < b).nonzero()[:, 0]
            rows, cols = torch.cat([a, b[lower]]), torch.cat([b, a[lower]])
            order = (rows * self.d + cols).argsort()
            rows, cols, table = rows[order], cols[order], self.table[:, torch.cat([torch.arange(len(a), device=a.device), lower])[order]]
            diagonal = (rows == cols).nonzero()[:, 0]
        found = Entries(self.d, rows, cols, table, diagonal)
        if not found.off_diagonal(table[1]).any():
            raise ValueError("no row shows two columns: then only the diagonal of XᵀX is ever seen, and its eigenvectors cannot be had")
        return found


# ============================================================================================== the method: the fit


def inverse_propensity(entries):
    """An unbiased estimate of XᵀX/m, as values at the entries: each sum over its expected count, with the pair's chance to be seen
    taken as proportional to how often each of the two columns is."""
    sums, counts, _ = entries.table
    often = counts[entries.diagonal][:, None]  # (d, 1)
    expected = entries.off_diagonal(entries.predict(often))
    seen = entries.off_diagonal(counts).sum()
    total = often.sum() ** 2 - (often**2).sum()  # of expected, over all pairs a ≠ b, seen or not
    expected *= seen / total
    expected[entries.diagonal] = often[:, 0]
    return sums / expected


def weigh(entries, weights, diag_weight, theta=None):
    """The weights W of the loss at the entries. "counts", the paper's: proportional to counts, off the diagonal with sum 1, on it with
    sum diag_weight (equation 2 has 1). "seen", Hájek's: the same for every entry that was seen. "variance", ours: count over the
    variance of one product x_a·x_b for Gaussian rows with second moments theta, θ_aa·θ_bb + θ_ab²."""
    counts = entries.table[1]
    if weights == "counts":
        W = entries.off_diagonal(counts)
        W = W / W.sum()
        W[entries.diagonal] = counts[entries.diagonal] / counts[entries.diagonal].sum()
    elif weights == "seen":
        W = (counts > 0).double()
    else:
        variance = entries.predict(theta[entries.diagonal][:, None]) + theta**2
        W = counts / variance.clamp(min=0.01 * float((counts * variance).sum() / counts.sum()))
    W[entries.diagonal] *= diag_weight
    return W / W.sum()


def loss_and_gradient(V, H, W, entries, noise):
    """F(V) = Σ W∘(V·Vᵀ + σ²·I − H)², its gradient 4·(W∘(V·Vᵀ + σ²·I − H))·V, and σ², which is the best for this V (so that the
    gradient needs no term for it) or, without noise, zero. V (d, R) float64; H, W (n,) at the entries."""
    residual = entries.predict(V).sub_(H)
    sigma2 = 0.0
    if noise:
        on = W[entries.diagonal]
        sigma2 = float(-(on * residual[entries.diagonal]).sum() / on.sum())
        residual[entries.diagonal] += sigma2
    weighted = W * residual
    return weighted @ residual, 4 * entries.times(weighted, V), sigma2


def minimise(V, H, W, entries, noise=False, max_steps=500):
    """L-BFGS from V until 20 steps lower the loss by less than a part in 10⁹. Returns V, σ², the loss, the steps, whether it ended by
    itself."""
    V = V.clone().requires_grad_()
    # subtle: torch's L-BFGS forgets a step whose (gradient change)·(step) is below 1e-10, so the loss is given to it in large units
    optimizer = torch.optim.LBFGS([V], max_iter=20, history_size=20, tolerance_grad=1e-6, tolerance_change=1e-14,
                                  line_search_fn="strong_wolfe")
    steps, before, converged = 0, math.inf, False

    @torch.no_grad()
    def closure():
        loss, gradient, _ = loss_and_gradient(V, H, W, entries, noise)
        V.grad = 1e9 * gradient
        return 1e9 * loss

    while steps < max_steps and not converged:
        optimizer.step(closure)
        loss, _, sigma2 = loss_and_gradient(V.detach(), H, W, entries, noise)
        converged = before - float(loss) <= 1e-9 * float(loss) + 1e-26
        steps, before = optimizer.state[V]["n_iter"], float(loss)
    return V.detach(), sigma2, float(loss), steps, converged


@dataclass
class Model:
    """What fit found: XᵀX/m ≈ V·Vᵀ + noise_variance·I."""

    V: torch.Tensor  # (d, R), in units of x
    rank: int  # r ≤ R: components to report
    noise_variance: float  # σ², in units of x²; a little below 0 where there is none
    means: torch.Tensor  # (d,): mean of the values seen in each column
    loss: float  # Σ W∘(V·Vᵀ + σ²·I − H)² over the squared mean of H's diagonal, ΣW = 1
    steps: int
    converged: bool

    def theta(self):
        """The estimate of XᵀX/m without noise, (d, d)."""
        return self.V @ self.V.T

    def components(self, center="none", n=None):
        """The first n (default: rank) eigenvalues, descending, and eigenvectors (d, n) of the estimate; each eigenvector's largest
        entry is positive. The right singular vectors of X, and its squared singular values over m.

        center, after the fact: "rows" of X − the mean of each whole row, (1 − 11ᵀ/d)·Θ·(1 − 11ᵀ/d); "columns": Θ − μμᵀ, μ the means.
        No d×d matrix is made: O(d·R²).
        """
        factor, signs = self.V, torch.ones_like(self.V[0])
        if center == "rows":
            factor = self.V - self.V.mean(0)
        elif center == "columns":
            factor, signs = torch.cat([self.V, self.means[:, None]], 1), torch.cat([signs, -signs[:1]])
        Q, T = torch.linalg.qr(factor)
        values, U = torch.linalg.eigh(T * signs @ T.T)
        values, Q = values.flip(0)[: n or self.rank], Q @ U.flip(1)[:, : n or self.rank]
        return values, Q * Q.gather(0, Q.abs().argmax(0, keepdim=True)).sign()

    def transform(self, cols, vals, center="none", least_noise=1e-10):
        """New rows → (scores (rows, r), whole rows (rows, d), their variance (rows, d), determined (rows,) bool).

        Conditional mean and variance for Gaussian rows with the covariance that was fitted, given the entries seen (cols as in
        PairStats.update). center: "none" or "columns". determined: at least r entries are seen. Where fewer are, no method
        can know the row, the mean is a guess and the variance says so. least_noise: σ² is taken as no less than this part of the
        mean second moment; more than the default steadies rows with about r entries when V is not exact.
        """
        cols, vals = torch.as_tensor(cols, device=self.V.device).long(), torch.as_tensor(vals, device=self.V.device).double()
        values, Q = self.components(center)
        means = self.means if center == "columns" else torch.zeros_like(self.means)
        loadings = Q * values.clamp(min=0).sqrt()  # x = μ + loadings·z + noise, z ~ N(0, 1)
        sigma2 = max(self.noise_variance, least_noise * float((self.V**2).sum(1).mean()))
        seen = cols >= 0
        L = loadings[cols.clamp(min=0)] * seen[..., None]  # (rows, k, r)
        x = torch.where(seen, vals - means[cols.clamp(min=0)], 0)
        precision = L.mT @ L / sigma2 + torch.eye(L.shape[2], dtype=L.dtype, device=L.device)
        z = torch.linalg.solve(precision, L.mT @ x[..., None] / sigma2)[..., 0]
        variance = (loadings @ torch.linalg.inv(precision) * loadings).sum(2)
        return z * values.clamp(min=0).sqrt(), means + z @ loadings.T, variance, seen.sum(1) >= self.rank


def connected(entries):
    """Sizes of the connected parts of the graph whose edges are the pairs of columns seen together, largest first."""
    edges = (entries.table[1] > 0).nonzero()[:, 0]
    a, b = (edges // entries.d, edges % entries.d) if entries.rows is None else (entries.rows[edges], entries.cols[edges])
    label = torch.arange(entries.d, device=a.device)
    while True:
        new = label.scatter_reduce(0, a, label[b], "amin")
        new = new[new]
        if torch.equal(new, label):
            return sorted(label.unique(return_counts=True)[1].tolist(), reverse=True)
        label = new


def fit(stats, rank, fit_rank=None, noise=False, weights="counts", diag_weight=1.0, start=None, max_steps=500, allow_disconnected=False):
    """The paper's estimator: weighted low-rank least squares on the statistics, factored, by L-BFGS from the spectral estimate.

    stats: a PairStats (after all_reduce). rank: r, components to report. fit_rank: R ≥ r, columns of V; more than r where the data are
    not exactly of low rank. noise: fit a variance σ² that independent noise adds to the diagonal. weights, diag_weight: see weigh;
    "variance" fits with counts first. start: V (d, R) to start from. Returns a Model. Raises ValueError for a rank that is not in
    1..d, for statistics that cannot determine the answer (PairStats.entries) and for columns that fall into parts never seen together.
    """
    R, d = fit_rank or rank, stats.d
    if not 1 <= rank <= R <= d:
        raise ValueError(f"rank = {rank} and fit_rank = {R}; want 1 ≤ rank ≤ fit_rank ≤ {d}, the number of columns")
    if weights not in ("counts", "seen", "variance") or not diag_weight >= 0 or noise and diag_weight == 0:
        raise ValueError(f"weights = {weights!r}, diag_weight = {diag_weight}, noise = {noise}; want counts, seen or variance, a weight "
                         "≥ 0, and > 0 with noise")
    entries = stats.entries()
    parts = connected(entries)
    if len(parts) > 1 and not allow_disconnected:
        sizes = ", ".join(map(str, parts[:5])) + "…" * (len(parts) > 5)
        raise ValueError(f"the columns fall into {len(parts)} parts of {sizes} columns that no row links: how the parts lie to one another "
                         "cannot be had; fit them apart, or allow_disconnected")
    sums, counts, _ = entries.table
    H = torch.where(counts > 0, sums / counts.clamp(min=1e-300), 0.0)
    scale = float(H[entries.diagonal].mean())
    if scale == 0:
        raise ValueError("every value is zero")
    H = H / scale
    if start is None:
        eigenvalues, Q = entries.top(inverse_propensity(entries) / scale, R)
        start = Q * eigenvalues.clamp(min=1e-6).sqrt()
    else:
        start = start / scale**0.5
    solution = minimise(start, H, weigh(entries, "counts" if weights == "variance" else weights, diag_weight), entries, noise, max_steps)
    if weights == "variance":
        theta = entries.predict(solution[0])
        theta[entries.diagonal] += solution[1]
        solution = minimise(solution[0], H, weigh(entries, weights, diag_weight, theta), entries, noise, max_steps)
    V, sigma2, *rest = solution
    return Model(V * scale**0.5, rank, sigma2 * scale, stats.firsts / counts[entries.diagonal], *rest)


# ============================================================================================== how good is it, without the truth


def rowspace_error(A, B):
    """min over rotations R of ‖A·R − B‖² for orthonormal A, B (d, r): 0 for the same space, 2r for orthogonal ones (equation 4)."""
    return max(0.0, float(2 * A.shape[1] - 2 * torch.linalg.svdvals(A.T @ B).sum()))


def standard_errors(stats):
    """Of each entry of the pairwise mean H = sums/counts, (d, d), from the spread of the products; NaN where fewer than two rows show
    the pair. Dense storage alone."""
    sums, counts, squares = stats.entries().table
    H = sums / counts
    return torch.where(counts > 1, (squares / counts - H**2).clamp(min=0) / (counts - 1), torch.nan).sqrt().view(stats.d, stats.d)


def split_half(halves, rank, center="none", **settings):
    """Row-space error between fits to two halves of the rows. Each has twice the squared error of a fit to all of them, and the errors
    are independent: so a quarter of the result estimates the row-space error of the fit to all, bias apart."""
    return rowspace_error(*(fit(half, rank, **settings).components(center)[1] for half in halves))


def held_out(halves, candidates):
    """Fit each candidate (a dict of fit's arguments) to one half of the rows, score it on the pairs a ≠ b of the other, both ways.

    The score is the mean of (θ_ab − x_a·x_b)² over held-out pairs. Returns (index of the choice, scores, standard errors of each score
    minus the best one). The choice: the first candidate within one standard error of the best. Rows are split, not pairs: pairs of one
    row share entries.
    """
    tests = [half.entries() for half in halves]
    tables = [test.off_diagonal(test.table) for test in tests]
    total = float(sum(table[1].sum() for table in tables))
    predictions = []  # of each candidate, for each half
    for candidate in candidates:
        models = [fit(half, **candidate).components() for half in halves[::-1]]
        predictions.append([test.predict(Q * values.clamp(min=0).sqrt()) for test, (values, Q) in zip(tests, models)])

    def squares(theta, table):
        """Σ over rows of (θ − x_a·x_b)², at each entry."""
        return table[2] - 2 * theta * table[0] + table[1] * theta**2

    scores = np.array([sum(float(squares(theta, table).sum()) for theta, table in zip(thetas, tables)) for thetas in predictions]) / total
    best = predictions[int(scores.argmin())]
    # a row adds (θ − y)² − (θ' − y)², whose variance over rows is 4·(θ − θ')²·var y; twice that, for both triangles hold the same pairs
    spread = np.array([sum(8 * float(((theta - other) ** 2 * squares(other, table)).sum())
                           for theta, other, table in zip(thetas, best, tables)) for thetas in predictions]) ** 0.5 / total
    chosen = next(i for i in range(len(candidates)) if scores[i] <= scores.min() + spread[i])
    return chosen, scores, spread


# ============================================================================================== baselines


def complete(cols, vals, d, rank, ridge, V, steps=30):
    """Completion of X itself: min over U (m, r), V (d, r) of Σ over the entries seen (u_i·v_j − x_ij)²/|E| + ridge·(‖U‖²/m + ‖V‖²/d), by
    alternating exact least squares from V. cols (m, k), no padding; vals (m, k) float64. Returns V."""
    m, k = cols.shape
    eye, flat = ridge * torch.eye(rank, dtype=vals.dtype, device=vals.device), cols.flatten()

    def per_column(terms):
        """(m, k, n) → sums over the entries of each column, (d, n)."""
        return torch.zeros(d, terms.shape[2], dtype=vals.dtype, device=vals.device).index_add_(0, flat, terms.flatten(0, 1))

    for _ in range(steps):
        shown = V[cols]  # (m, k, r)
        U = torch.linalg.solve(shown.mT @ shown + k * eye, shown.mT @ vals[..., None])[..., 0]  # (m, r)
        outer = (U[:, :, None] * U[:, None]).flatten(1)[:, None].expand(-1, k, -1)
        V = torch.linalg.solve(per_column(outer).view(d, rank, rank) + m * k / d * eye, per_column(vals[..., None] * U[:, None]))
    return V


def full_completion(cols, vals, d, rank, ridges=(0.5, 0.3, 0.2, 0.15, 0.1), seed=0):
    """complete with the ridge (in units of the mean square of vals) that predicts best: fitted to four fifths of the rows, scored on
    each entry of the others, predicted from the rest of its row. Each ridge starts from the solution of the one before. Returns an
    orthonormal basis of V (d, rank) and the ridge."""
    vals = vals.double()
    unit, n = float(vals.square().mean()), len(cols) * 4 // 5
    start = torch.randn(d, rank, dtype=vals.dtype, generator=torch.Generator().manual_seed(seed)).to(vals.device)

    def path(cols, vals):
        V = start
        for ridge in ridges:
            yield (V := complete(cols, vals, d, rank, ridge * unit, V))

    def score(V, ridge):
        total, k = 0.0, cols.shape[1]
        for hidden in range(k):
            others = [i for i in range(k) if i != hidden]
            L = V[cols[n:, others]]
            eye = ridge * unit * (k - 1) * torch.eye(rank, dtype=vals.dtype, device=vals.device)
            u = torch.linalg.solve(L.mT @ L + eye, L.mT @ vals[n:, others, None])[..., 0]
            total += float(((u * V[cols[n:, hidden]]).sum(1) - vals[n:, hidden]).square().mean())
        return total

    scores = [score(V, ridge) for V, ridge in zip(path(cols[:n], vals[:n]), ridges)] if len(ridges) > 1 else [0]
    best = int(np.argmin(scores))
    return torch.linalg.qr(next(islice(path(cols, vals), best, None)))[0], ridges[best]


def soft_impute(cols, vals, d, rank, shrink=0.3, steps=100):  # of 0.02, 0.1, 0.3 and 0.5 the best at all numbers of rows tried
    """Completion of X itself by soft-thresholded singular values (threshold: shrink times the largest of the zero-filled matrix), every
    step with the entries seen put back. Memory O(m·d). Returns its top right singular vectors (d, rank)."""
    X = torch.zeros(len(cols), d, device=vals.device).scatter_(1, cols, vals.float())
    seen = torch.zeros_like(X, dtype=torch.bool).scatter_(1, cols, True)
    Z, threshold = X, None
    for _ in range(steps):
        w, Q = torch.linalg.eigh((Z.mT @ Z).double())
        s = w.clamp(min=1e-12).sqrt()
        threshold = threshold or shrink * float(s[-1])
        Z = torch.where(seen, X, Z @ ((Q * (1 - threshold / s).clamp(min=0)) @ Q.mT).float())
    return Q.flip(1)[:, :rank]


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


def counter_seed(*counter):
    """A random seed below 2^31 that depends on the counter alone."""
    return int(np.random.default_rng(counter).integers(2**31))


# ============================================================================================== rows: made, and read from files


def save_arrays(path, arrays):
    """An .npz of these arrays, under a temporary name first."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(part := path.with_name(path.name + ".part"), "wb") as file:
        np.savez(file, **arrays)
    os.replace(part, path)


def draw_columns(n, d, k, generator):
    """n rows of k different columns of d, uniform, (n, k) int64."""
    device = generator.device
    if k * k > d:
        return torch.rand(n, d, generator=generator, device=device).topk(k, 1).indices
    cols = torch.randint(d, (n, k), generator=generator, device=device)
    while (again := (cols.sort(1).values.diff(dim=1) == 0).any(1).nonzero()[:, 0]).numel():  # rejection of whole rows stays uniform
        cols[again] = torch.randint(d, (len(again), k), generator=generator, device=device)
    return cols


def low_rank_rows(V, m, k, seed, noise_sd=0.0, rank=0, world=1):
    """The paper's synthetic rows x = V·u + noise, u ~ N(0, 1), of which k uniformly drawn entries are shown: (u, cols, vals) in chunks,
    this rank's share of them. A chunk depends on seed and its number alone, so any number of ranks makes the same rows."""
    size = max(1024, min(2**17, 2**25 // len(V)))
    for chunk in range(rank, -(-m // size), world):
        n, generator = min(size, m - chunk * size), torch.Generator(V.device).manual_seed(counter_seed(seed, chunk))
        u = torch.randn(n, V.shape[1], dtype=V.dtype, device=V.device, generator=generator)
        cols = draw_columns(n, len(V), k, generator)
        vals = sum(V[:, j][cols] * u[:, j, None] for j in range(V.shape[1]))
        if noise_sd:
            vals += noise_sd * torch.randn(n, k, dtype=V.dtype, device=V.device, generator=generator)
        yield u, cols, vals


def right_factor(d, rank, seed, device, dtype):
    """V ~ N(0, 1/r), (d, r): entries of X then have variance 1."""
    return torch.randn(d, rank, generator=torch.Generator().manual_seed(counter_seed(seed))).to(device, dtype) / rank**0.5


def accumulate(d, chunks, halves=1, storage="auto", device="cpu"):
    """PairStats over (…, cols, vals) chunks: one, or one for every other row; summed over torchrun's ranks."""
    stats = [PairStats(d, storage, device) for _ in range(halves)]
    for *_, cols, vals in chunks:
        for i, half in enumerate(stats):
            half.update(cols[i::halves], vals[i::halves])
    return [half.all_reduce() for half in stats]


def balding_nichols(sites, per_population, populations, fst, seed, rank=0, world=1):
    """Genotypes of unrelated people, (chunk of sites, people) int8 in 0, 1, 2: at each site an ancestral frequency p ~ U(0.05, 0.95), in
    each population one of Beta(p·(1 − F)/F, (1 − p)·(1 − F)/F), two draws for each person. Chunks as in low_rank_rows."""
    for chunk in range(rank, -(-sites // 8192), world):
        rng = np.random.default_rng(counter_seed(seed, chunk))
        p = rng.uniform(0.05, 0.95, (min(8192, sites - chunk * 8192), 1)).repeat(populations, 1)
        frequency = rng.beta(p * (1 - fst) / fst, (1 - p) * (1 - fst) / fst)
        yield rng.binomial(2, frequency.repeat(per_population, 1)).astype(np.int8)


PAGE_1000G = "https://ftp.1000genomes.ebi.ac.uk/vol1/ftp/release/20130502/"
MOVIELENS = "https://files.grouplens.org/datasets/movielens/{}.zip"


def read_lines(path):
    """(line number from 1, line) of a text file, gzipped or not."""
    try:
        with (gzip.open if str(path).endswith(".gz") else open)(path, "rt") as file:
            yield from enumerate(file, 1)
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read as text ({error})") from None


def read_panel(path):
    """{sample: population} of a 1000 Genomes panel: sample, pop, super_pop, gender, with a header; the super-population is taken."""
    people = {}
    for n, line in read_lines(path):
        fields = line.split()
        if len(fields) < 3:
            raise ValueError(f"{path}, line {n}: {len(fields)} columns; want sample, pop, super_pop")
        people[fields[0]] = fields[2]
    return people


def read_vcf(path, people, least_maf, rank=0, world=1):
    """Genotypes of a VCF: (chunk of sites, people) int8 in 0, 1, 2, −1 where missing; SNPs with two alleles and at least this minor
    allele frequency. people: {sample: population}; all samples of the file must be there. First yields the samples' populations."""
    chunk, number_of_chunk, samples, codes = [], 0, None, {"0": 0, "1": 1, ".": -9}
    for n, line in read_lines(path):
        if line.startswith("##"):
            continue
        fields = line.rstrip("\n").split("\t")
        if samples is None:
            samples = fields[9:]
            if fields[0] != "#CHROM" or not samples:
                raise ValueError(f"{path}, line {n}: want the header #CHROM … FORMAT and at least one sample; is it a VCF?")
            unknown = [s for s in samples if s not in people]
            if unknown:
                raise ValueError(f"{path}: sample {unknown[0]} ({len(unknown)} of {len(samples)}) is not in the panel: use the panel of "
                                 f"the same release, {PAGE_1000G}")
            yield [people[s] for s in samples]
            continue
        if len(fields) != 9 + len(samples):
            raise ValueError(f"{path}, line {n}: {len(fields)} columns, the header has {9 + len(samples)}: the file is cut off or damaged")
        if len(fields[3]) != 1 or len(fields[4]) != 1 or fields[4] not in "ACGT":
            continue  # not a SNP, or more than two alleles
        try:
            alleles = [[codes[a] for a in field.split(":", 1)[0].replace("|", "/").split("/")] for field in fields[9:]]
        except KeyError:
            bad = next(i for i, field in enumerate(fields[9:]) if not re.match(r"[01.]([|/][01.])*(:|$)", field))
            raise ValueError(f"{path}, line {n}: genotype {fields[9 + bad]!r} of sample {samples[bad]}; want 0, 1 or . as in 0|1") from None
        x = np.array([sum(a) * 2 // len(a) if min(a) >= 0 else -1 for a in alleles], np.int8)
        frequency = x[x >= 0].mean() / 2 if (x >= 0).any() else 0
        if least_maf <= frequency <= 1 - least_maf:
            chunk.append(x)
        if len(chunk) == 4096:
            if number_of_chunk % world == rank:
                yield np.array(chunk)
            chunk, number_of_chunk = [], number_of_chunk + 1
    if samples is None:
        raise ValueError(f"{path} has no line #CHROM: is it a VCF?")
    if chunk and number_of_chunk % world == rank:
        yield np.array(chunk)


def read_triplets(path, columns, block=2**20):
    """A text file of row, column, value (comma, tab, semicolon or space; more fields are ignored; a header is skipped) → arrays (row
    number, column number, value) in blocks of whole rows. columns: {label: number}, which grows. The entries of a row stand together;
    to see that they do, the rows' labels are kept in memory. Raises ValueError with the line number for what is wrong."""
    rows, cols, vals, labels, in_row, last, separator = [], [], [], set(), set(), None, None
    for n, line in read_lines(path):
        if not line.strip():
            continue
        separator = separator or next((s for s in ",\t;" if s in line), " ")
        fields, at = [field.strip() for field in line.split(None if separator == " " else separator)], f"{path}, line {n}"
        try:
            value = float(fields[2])
        except IndexError:
            raise ValueError(f"{at}: {len(fields)} field{'s' * (len(fields) != 1)}; want row, column, value") from None
        except ValueError:
            if n == 1:
                continue  # a header
            raise ValueError(f"{at}: {fields[2]!r} is no number") from None
        row, label = fields[:2]
        if not math.isfinite(value):
            raise ValueError(f"{at}: row {row}, column {label} has the value {fields[2]}: leave that line out")
        if row != last:
            if row in labels:
                raise ValueError(f"{at}: row {row} comes again; the entries of a row must stand together: sort the file by row")
            if len(vals) >= block:
                yield tuple(map(np.array, (rows, cols, vals)))
                rows, cols, vals = [], [], []
            last, in_row = row, set()
            labels.add(row)
        if label in in_row:
            raise ValueError(f"{at}: row {row} has column {label} twice: keep one, or their mean")
        in_row.add(label)
        rows.append(len(labels) - 1), cols.append(columns.setdefault(label, len(columns))), vals.append(value)
    if not vals:
        raise ValueError(f"{path} has no line with row, column, value")
    yield tuple(map(np.array, (rows, cols, vals)))


def padded(rows, cols, vals, cells=2**20):
    """Triplets sorted by row → (row numbers (n,), cols (n, k), vals (n, k)) in batches of rows of similar length; −1 pads."""
    starts = np.flatnonzero(np.r_[True, rows[1:] != rows[:-1]])
    lengths = np.diff(np.r_[starts, len(rows)])
    order = np.argsort(lengths, kind="stable")
    while len(order):
        n = min(max(1, int(cells / (1.25 * lengths[order[0]] + 1))), np.searchsorted(lengths[order], 1.25 * lengths[order[0]] + 1, "right"))
        first, length, order = starts[order[:n], None], lengths[order[:n], None], order[n:]
        at = first + np.arange(length.max())
        inside, at = at < first + length, np.minimum(at, len(rows) - 1)
        yield rows[first[:, 0]], np.where(inside, cols[at], -1), np.where(inside, vals[at], 0.0)


# ============================================================================================== the experiments

METHODS = {  # the matrix whose top eigenvectors a spectral baseline takes, as values at the entries
    "direct SVD": lambda e: e.table[0],
    "zero diagonal": lambda e: e.off_diagonal(e.table[0]),
    "inverse propensity": inverse_propensity,
}
OURS, REWEIGHTED, HAJEK = "low rank (paper)", "low rank, 1/variance", "low rank, 0/1 (Hájek)"
FITS = {HAJEK: dict(weights="seen"), OURS: {}, REWEIGHTED: dict(weights="variance")}


def from_matrix(stats, values, rank):
    """A Model of the top eigenvectors of a baseline's matrix, so that it is centred and used as ours is."""
    entries = stats.entries()
    eigenvalues, Q = entries.top(values, rank)
    V = Q * eigenvalues.clamp(min=0).sqrt()
    diagonal = (entries.table[0] / entries.table[1])[entries.diagonal]
    return Model(V, rank, float((diagonal - (V**2).sum(1)).mean()), stats.firsts / entries.table[1][entries.diagonal], math.nan, 0, True)


def all_models(stats, rank):
    """{method: Model} of every method that needs the statistics alone."""
    entries = stats.entries()
    spectral = {name: from_matrix(stats, matrix(entries), rank) for name, matrix in METHODS.items()}
    return spectral | {name: fit(stats, rank, **settings) for name, settings in FITS.items()}


def begin(args, d):
    """set_up for d columns."""
    device, dtype, rank, world = set_up(args)
    device = torch.device("cpu") if device.type == "mps" else device  # it has no float64
    if device.type == "cpu" and d <= 1024:
        torch.set_num_threads(1)  # subtle: on small matrices more threads bring little, and cost much where others want the cores
    return device, dtype, rank, world


def mean_sd(values):
    return f"{np.mean(values):.4f}" + (f" ± {np.std(values, ddof=1):.4f}" if len(values) > 1 else "")


def finish(args, rank, table, figures, draw, **size):
    """Rank 0 prints the table and the paths of results.json and the figure."""
    if rank == 0:
        out = Path(args.out or f"out/onesided_mc/{args.task}")
        print_table(*table)
        for line in figures.get("notes", []):
            print(line)
        print(save_results(out, args, figures), figure(out, f"{args.task}.png", args, draw, **size), sep="\n")


def progress(args, items, rank):
    return tqdm(items, args.task, disable=args.quiet or rank > 0)


def synthetic(args):
    """Section 5.1: row-space error against the number of rows, for every method. X = U·Vᵀ, U ~ N(0, 1), V ~ N(0, 1/r)."""
    device, dtype, rank, world = begin(args, args.d)
    d, r, k = args.d, args.rank or 3, args.k
    completions = {
        "soft-impute": lambda cols, vals, seed: soft_impute(cols, vals, d, r),
        "full completion, ridge 0.01": lambda cols, vals, seed: full_completion(cols, vals, d, r, (0.01,), seed)[0],
        "full completion, ridge tuned": lambda cols, vals, seed: full_completion(cols, vals, d, r, seed=seed)[0],
    }
    jobs = [(m, seed) for m in args.rows for seed in range(args.seed, args.seed + args.seeds)]
    done, seconds = [], []
    for i, (m, seed) in enumerate(progress(args, jobs, rank)):
        V = right_factor(d, r, seed, device, dtype)
        start = time.perf_counter()
        halves = accumulate(d, low_rank_rows(V, m, k, seed, args.noise_sd, rank, world), 2, args.storage, device)
        seconds.append(time.perf_counter() - start)
        if i % world != rank:  # rows are shared out, then the fits
            continue
        truth = torch.linalg.qr(V.double())[0]
        estimate = split_half(halves, r) / 4
        models = all_models(halves[0].merge(halves[1]), r)
        errors = {name: rowspace_error(model.components()[1], truth) for name, model in models.items()}
        if m <= args.complete_rows:
            rows = [(cols, vals) for _, cols, vals in low_rank_rows(V, m, k, seed, args.noise_sd)]
            cols, vals = (torch.cat(parts) for parts in zip(*rows))
            errors |= {name: rowspace_error(solve(cols, vals, seed), truth) for name, solve in completions.items()}
        done.append(dict(rows=m, seed=seed, errors=errors, halves=estimate, statistics_s=seconds[-1], steps=models[OURS].steps))
    if world > 1:
        shares = [None] * world
        dist.all_gather_object(shares, done)
        done = sorted(sum(shares, []), key=lambda run: (run["rows"], run["seed"]))
    names = [*completions, *METHODS, *FITS]
    errors = {name: {m: [run["errors"][name] for run in done if run["rows"] == m and name in run["errors"]] for m in args.rows}
              for name in names}
    slopes = {name: slope([(m, np.mean(e)) for m, e in by_rows.items() if e]) for name, by_rows in errors.items()}
    table = [(name, *(mean_sd(errors[name][m]) if errors[name][m] else "–" for m in args.rows), slopes[name]) for name in names]
    table.append(("ours, from two halves", *(mean_sd([run["halves"] for run in done if run["rows"] == m]) for m in args.rows), math.nan))
    header = (f"row-space error, 0 to {2 * r}; d = {d}, r = {r}, k = {k}", *(f"{m:,} rows" for m in args.rows), "slope")

    def draw(ax):
        for name in names:
            points = [(m, np.mean(e), np.std(e)) for m, e in errors[name].items() if e]
            if points:
                ours = name in (OURS, REWEIGHTED)
                ax.errorbar(*zip(*points), marker="o", ms=4, capsize=2, lw=2.5 if ours else 1.2, ls="-" if ours else "--", label=name)
        m, e = min(args.rows), np.mean(errors[OURS][min(args.rows)])
        ax.plot([m, max(args.rows)], [e, e * m / max(args.rows)], "k:", lw=1, label="slope −1")
        ax.set(xscale="log", yscale="log", xlabel="rows", ylabel=f"row-space error (0 to {2 * r})",
               title=f"{k} of {d} entries seen in each row, rank {r}")
        ax.legend(fontsize=8)

    finish(args, rank, (header, table), dict(table=done, slopes=slopes), draw, figsize=(7.5, 5.2))


def slope(points):
    """Of log error against log rows, least squares; NaN for one point, or where an error is zero."""
    return float(np.polyfit(*np.log(points).T, 1)[0]) if len(points) > 1 and min(e for _, e in points) > 0 else math.nan


def genome(args):
    """Section 5.2: people's ancestry from k genotypes a site. Rows are sites, columns are people: what is wanted are the right singular
    vectors. Offline: the Balding–Nichols model; --data FILE.vcf.gz --panel FILE: 1000 Genomes."""
    device, _, rank, world = begin(args, args.people)
    if args.data:
        if not args.panel:
            fail(f"--data needs --panel, samples and populations: integrated_call_samples_v3.20130502.ALL.panel at {PAGE_1000G}")
        sites = read_vcf(args.data, read_panel(args.panel), args.maf, rank, world)
        names, population = np.unique(next(sites), return_inverse=True)
    else:
        each = max(1, args.people // args.populations)
        names, population = [f"population {i + 1}" for i in range(args.populations)], np.arange(args.populations).repeat(each)
        sites = balding_nichols(args.sites, each, args.populations, args.fst, args.seed, rank, world)
    d, K = len(population), len(names)
    if not 2 <= args.k <= d or K < 2:
        fail(f"--k {args.k} of {d} people in {K} populations: want 2 ≤ k ≤ people and two populations or more")
    halves, gram = [PairStats(d, "dense", device) for _ in range(2)], torch.zeros(d, d, dtype=torch.float64)
    for i, x in enumerate(progress(args, sites, rank)):
        rng = np.random.default_rng((args.seed, rank + i * world))  # the chunk's own: any number of ranks keeps the same genotypes
        keys = rng.random(x.shape, np.float32) + 2 * (x < 0)  # people without a genotype come last
        cols = np.argpartition(keys, args.k - 1, 1)[:, : args.k]
        vals = np.take_along_axis(x, cols, 1)
        cols = np.where(vals < 0, -1, cols)
        for i, half in enumerate(halves):
            half.update(cols[i::2], vals[i::2])
        known = np.where(x < 0, np.where(x < 0, 0, x).sum(1, keepdims=True) / (x >= 0).sum(1, keepdims=True), x)
        gram += torch.from_numpy(known.T.astype(np.float32) @ known.astype(np.float32)).double()
    halves = [half.all_reduce() for half in halves]
    if world > 1:
        gram = gram.to(device)
        dist.all_reduce(gram)
    n = K - 1
    full = top_centred(gram.cpu(), n)
    sizes = sorted({min(d, K * factor) for factor in (1, 2, 4)})
    candidates = [dict(rank=K, fit_rank=R, noise=noise) for R in sizes for noise in (False, True)]
    chosen, scores, _ = held_out(halves, candidates)
    stats = halves[0].merge(halves[1])
    models = all_models(stats, K)
    name = f"low rank, held out chose R = {candidates[chosen]['fit_rank']}{', noise' * candidates[chosen]['noise']}"
    models[name] = fit(stats, **candidates[chosen])
    scatter = {"all genotypes": full} | {name: model.components("rows", n)[1].cpu() for name, model in models.items()}
    rows = [(name, rowspace_error(Q, full), adjusted_rand(k_means(Q, K, args.seed), population)) for name, Q in scatter.items()]
    header = (f"{int(stats.n_rows):,} sites, {d} people, {args.k} seen a site", f"error, 0 to {2 * n}", "adjusted Rand index")

    def draw(axes):
        for ax, name in zip(axes, ("all genotypes", "direct SVD", "inverse propensity", OURS)):
            Q = scatter[name]
            turn = torch.linalg.svd(Q.T @ full)  # components come with any rotation and sign
            Q = (Q @ turn.U @ turn.Vh).numpy()
            for i, label in enumerate(names):
                ax.scatter(Q[population == i, 0], Q[population == i, min(1, n - 1)], s=14, label=label)
            ax.set(title=name, xlabel="component 1", ylabel="component 2")
        axes[0].legend(fontsize=8)

    finish(args, rank, (header, rows), dict(table=rows, candidates=candidates, held_out=scores.tolist()), draw, ncols=4, figsize=(14, 3.8))


def top_centred(gram, n):
    """Top n eigenvectors of (1 − 11ᵀ/d)·G·(1 − 11ᵀ/d)."""
    center = torch.eye(len(gram), dtype=gram.dtype) - 1 / len(gram)
    return torch.linalg.eigh(center @ gram @ center)[1].flip(1)[:, :n]


def k_means(points, k, seed, restarts=20):
    """Lloyd's algorithm from k-means++ starts; the labels (n,) of the best."""
    points, rng, best = np.asarray(points), np.random.default_rng(seed), (math.inf, None)
    for _ in range(restarts):
        centres = points[[rng.integers(len(points))]]
        while len(centres) < k:
            distance = ((points[:, None] - centres) ** 2).sum(2).min(1) + 1e-30
            centres = np.vstack([centres, points[rng.choice(len(points), p=distance / distance.sum())]])
        for _ in range(50):
            distance = ((points[:, None] - centres) ** 2).sum(2)
            label = distance.argmin(1)
            centres = np.array([points[label == j].mean(0) if (label == j).any() else centres[j] for j in range(k)])
        best = min(best, (distance.min(1).sum(), label), key=lambda pair: pair[0])
    return best[1]


def adjusted_rand(a, b):
    """Adjusted Rand index of two labellings: 1 the same partition, 0 what chance gives."""
    table = np.zeros((max(a) + 1, max(b) + 1))
    np.add.at(table, (a, b), 1)
    together, first, second, all_pairs = ((x * (x - 1) / 2).sum() for x in (table, table.sum(1), table.sum(0), np.array([len(a)])))
    expected = first * second / all_pairs
    return float((together - expected) / ((first + second) / 2 - expected)) if first + second != 2 * expected else 1.0


def noise(args):
    """Ours, not the paper's: entries with independent noise. It adds its variance to the diagonal of XᵀX/m and to nothing else; the
    paper's diagonal terms then mislead V, leaving them out wastes them, fitting one variance jointly does neither."""
    device, dtype, rank, world = begin(args, args.d)
    d, r, m = args.d, args.rank or 3, args.rows[-1]
    variants = {"low rank (paper)": {}, "without the diagonal": dict(diag_weight=0.0), "noise fitted": dict(noise=True),
                "noise fitted, 1/variance": dict(noise=True, weights="variance")}
    levels, runs = (0.0, 0.5, 1.0, 2.0), []
    for sd in progress(args, levels, rank):
        for seed in range(args.seed, args.seed + args.seeds):
            V = right_factor(d, r, seed, device, dtype)
            stats, = accumulate(d, low_rank_rows(V, m, args.k, seed, sd, rank, world), 1, args.storage, device)
            truth = torch.linalg.qr(V.double())[0]
            models = {name: fit(stats, r, **settings) for name, settings in variants.items()}
            runs += [dict(noise_sd=sd, seed=seed, method=name, variance=model.noise_variance,
                          error=rowspace_error(model.components()[1], truth)) for name, model in models.items()]

    def cells(name, key):
        return [[run[key] for run in runs if (run["method"], run["noise_sd"]) == (name, sd)] for sd in levels]

    table = [(name, *map(mean_sd, cells(name, "error"))) for name in variants]
    table += [(f"σ² by {name}", *map(mean_sd, cells(name, "variance"))) for name in list(variants)[2:]]
    header = (f"row-space error; {m:,} rows, d = {d}, r = {r}, k = {args.k}", *(f"noise sd {sd:g}" for sd in levels))

    def draw(ax):
        for name in variants:
            ax.errorbar(levels, *zip(*((np.mean(e), np.std(e)) for e in cells(name, "error"))), marker="o", capsize=2, label=name)
        ax.set(yscale="log", xlabel="sd of the noise (entries without it have sd 1)", ylabel=f"row-space error (0 to {2 * r})",
               title=f"Noise on the entries, {m:,} rows")
        ax.legend()

    finish(args, rank, (header, table), dict(table=runs), draw, figsize=(7, 4.6))


def rank(args):
    """How many components, and how many columns of V: by held-out rows. First for rows of exact rank, then for rows whose spectrum decays
    as j^−1.5 and never ends, where V needs more columns than the components that are wanted."""
    device, dtype, rank_, world = begin(args, args.d)
    d, r, m = args.d, args.rank or 3, args.rows[-1]
    power = torch.linalg.qr(right_factor(d, d, args.seed, device, torch.float64))[0] * torch.arange(1, d + 1, device=device) ** -0.75
    data = {"exact rank": right_factor(d, r, args.seed, device, dtype), "power law": power.to(dtype) * d**0.5}
    settings = {"exact rank": [dict(rank=i) for i in range(1, min(d, 2 * r + 2) + 1)],
                "power law": [dict(rank=r, fit_rank=R) for R in sorted({min(d, r * f) for f in (1, 2, 3, 4, 8)})]}
    rows, notes, curves = [], [], {}
    for name, V in progress(args, data.items(), rank_):
        halves = accumulate(d, low_rank_rows(V, m, args.k, args.seed, 0.0, rank_, world), 2, args.storage, device)
        chosen, scores, spread = held_out(halves, settings[name])
        stats = halves[0].merge(halves[1])
        truth = torch.linalg.svd(V.double(), full_matrices=False)[0][:, :r]
        errors = []
        for setting in settings[name]:
            Q = fit(stats, **setting).components()[1]
            errors.append(rowspace_error(Q, truth) if Q.shape[1] == r else math.nan)
        curves[name] = [s.get("fit_rank", s["rank"]) for s in settings[name]], scores, spread, errors, chosen
        rows += [(f"{name}, r = {s['rank']}, R = {R}", f"{score:.4f}", f"{sd:.4f}", error, "chosen" * (i == chosen))
                 for i, (s, R, score, sd, error) in enumerate(zip(settings[name], *curves[name][:4]))]
        spectral = rowspace_error(from_matrix(stats, inverse_propensity(stats.entries()), r).components()[1], truth)
        notes.append(f"{name}: inverse propensity has a row-space error of {spectral:.3f}")
    header = (f"{m:,} rows, d = {d}, k = {args.k}", "held-out loss", "se to best", f"row-space error, 0 to {2 * r}", "")

    def draw(axes):
        for ax, (name, (R, scores, spread, errors, chosen)) in zip(axes, curves.items()):
            ax.errorbar(R, scores, spread, marker="o", capsize=2, label="held-out loss")
            ax.plot(R[chosen], scores[chosen], "ks", ms=10, mfc="none", label="chosen")
            ax.set(xlabel="columns of V (R)", ylabel="held-out loss", title={"exact rank": f"exact rank {r}: r = R",
                   "power law": f"power-law spectrum: r = {r} of R components"}[name])
            if name == "power law":
                other = ax.twinx()
                other.plot(R, errors, "C1^--", label="row-space error")
                other.set_ylabel(f"row-space error (0 to {2 * r})")
                other.legend(loc="upper right")
            ax.legend(loc="center right")

    finish(args, rank_, (header, rows), dict(table=rows, notes=notes), draw, ncols=2, figsize=(11, 4.2))


def impossible(args):
    """Why one side only. With k < r entries seen, r − k directions of a row are free: the best guess of the others, made with the true
    V, misses (r − k)/r of their variance whatever the number of rows, while the row space comes ever closer."""
    device, dtype, rank, world = begin(args, args.d)
    d, r, k = args.d, args.rank or 5, args.k
    V = right_factor(d, r, args.seed, device, dtype)
    oracle = Model(V.double(), r, 0.0, torch.zeros(d, dtype=torch.float64, device=device), 0.0, 0, True)
    truth, rows, models = torch.linalg.qr(V.double())[0], [], {}

    def unseen_error(model, shown):
        """Mean square of the error over the mean square of the values, on cells that are not seen, of 2,000 new rows."""
        u, cols, vals = next(low_rank_rows(V, 2000, shown, args.seed + 1000))
        x, unseen = u.double() @ V.double().T, torch.ones(len(u), d, dtype=torch.bool, device=device).scatter_(1, cols, False)
        least_noise = 1e-10 if model is oracle else 1e-2
        return float(((model.transform(cols, vals, least_noise=least_noise)[1] - x)[unseen] ** 2).sum() / (x[unseen] ** 2).sum())

    for m in progress(args, args.rows, rank):
        stats, = accumulate(d, low_rank_rows(V, m, k, args.seed, 0.0, rank, world), 1, args.storage, device)
        models[m] = fit(stats, r)
        rows.append((f"{m:,}", rowspace_error(models[m].components()[1], truth), unseen_error(models[m], k), unseen_error(oracle, k),
                     max(0.0, (r - k) / r)))
    header = (f"rows; d = {d}, r = {r}, k = {k}", f"row-space error, 0 to {2 * r}", "unseen cells, V fitted", "V true", "(r − k)/r")
    shown = range(1, min(d - 1, 2 * r) + 1)
    curves = {f"V from {m:,} rows": [unseen_error(models[m], n) for n in shown] for m in (args.rows[0], args.rows[-1])}
    curves["true V"] = [unseen_error(oracle, n) for n in shown]

    def draw(axes):
        m, space, unseen, best, _ = zip(*rows)
        axes[0].loglog(args.rows, space, "o-", lw=2, label="row-space error")
        axes[0].loglog(args.rows, unseen, "s-", label="error of unseen cells, V fitted")
        axes[0].loglog(args.rows, best, "k--", label="the same with the true V")
        axes[0].set(xlabel="rows", ylabel="error", title=f"{k} entries a row, rank {r}: one side can be had")
        for name, curve in curves.items():
            axes[1].plot(shown, curve, "k--" if name == "true V" else "o-", label=name)
        axes[1].axvline(r, color="grey", lw=1)
        axes[1].set(yscale="log", ylim=(1e-4, 2), xlabel="entries seen of a new row (line: r)",
                    ylabel="relative error of unseen cells", title="A row needs r entries")
        for ax in axes:
            ax.legend(fontsize=8)

    finish(args, rank, (header, rows), dict(table=rows, curves=curves), draw, ncols=2, figsize=(11, 4.2))


def choose_settings(args, halves, d):
    """(settings, their held-out loss): the rank by held-out rows where --rank is not given, then the columns of V and the noise."""
    shared = dict(weights=args.weights, allow_disconnected=args.allow_disconnected)
    r = args.rank or held_out(halves, [dict(shared, rank=i) for i in range(1, min(d, 10) + 1)])[0] + 1
    sizes = sorted({min(d, r * factor) for factor in (1, 2, 4)})
    candidates = [dict(shared, rank=r, fit_rank=R, noise=noise) for R in sizes for noise in (False, True)]
    chosen, scores, _ = held_out(halves, candidates)
    return candidates[chosen], scores[chosen]


def ratings(args):
    """MovieLens: columns are films with at least --min_count ratings, a row is a user. A fifth of the ratings is hidden: the second
    moments of the others predict them. Films' means are taken off first. What people rate is no random draw: no claim of the paper."""
    _, _, rank, world = begin(args, 1000)
    path = Path(args.data or "ml-latest-small")
    if not path.suffix:
        archive = download(MOVIELENS.format(path))
        path = archive.parent / path.name / "ratings.csv"
        if not path.exists():
            with zipfile.ZipFile(archive) as file:
                file.extract(f"{path.parent.name}/ratings.csv", archive.parent)
    rows, cols, vals = map(np.concatenate, zip(*read_triplets(path, {})))
    often = np.bincount(cols) >= args.min_count
    keep = often[cols]
    rows, cols, vals, d = rows[keep], (np.cumsum(often) - 1)[cols[keep]], vals[keep], int(often.sum())
    if d < 3:
        fail(f"{path}: {d} columns have {args.min_count} ratings or more: lower --min_count")
    hidden = np.random.default_rng(args.seed).random(len(rows)) < 0.2
    counts = np.bincount(cols[~hidden], minlength=d)
    means = np.bincount(cols[~hidden], vals[~hidden], minlength=d) / np.maximum(counts, 1)
    centred = vals - means[cols]
    halves = [PairStats(d, args.storage) for _ in range(2)]
    seen = [column[~hidden] for column in (rows, cols, centred)]
    for number, batch, x in padded(*seen):
        for i, half in enumerate(halves):
            half.update(batch[number % 2 == i], x[number % 2 == i])
    settings, loss = choose_settings(args, halves, d)
    stats, r = halves[0].merge(halves[1]), settings["rank"]
    models = {f"low rank, R = {settings['fit_rank']}{', noise' * settings['noise']}": fit(stats, **settings)}
    models |= {name: from_matrix(stats, matrix(stats.entries()), r) for name, matrix in METHODS.items()}
    error = {"the column's mean": centred[hidden]}
    for name, model in models.items():
        scores, Q = np.zeros((rows.max() + 1, r)), model.components()[1].numpy()
        for number, batch, x in padded(*seen, cells=2**17):
            scores[number] = model.transform(batch, x)[0].numpy()
        error[name] = centred[hidden] - (scores[rows[hidden]] * Q[cols[hidden]]).sum(1)
    table = [(name, float(np.sqrt(np.mean(e**2)))) for name, e in error.items()]
    notes = [f"rank {r} by held-out pairs, loss {loss:.4f}" if not args.rank else f"rank {r}; held-out loss {loss:.4f}"]
    header = (f"{path}: {rows.max() + 1:,} rows, {d} columns, {len(rows):,} values", "RMSE of the hidden fifth")

    def draw(ax):
        ax.barh([name for name, _ in table][::-1], [e for _, e in table][::-1])
        low = min(e for _, e in table)
        ax.set(xlabel="root mean square error of hidden values", title=f"{path.parent.name}: rank {r}", xlim=(0.9 * low, None))

    finish(args, rank, (header, table), dict(table=table, settings=settings, notes=notes), draw, figsize=(8, 3))


def fit_file(args):
    """Your own data: a file of row, column, value → model.npz with the columns' components, and a figure. The file is read twice, in
    blocks: first for its columns, then for the sums."""
    device, _, rank, world = begin(args, 1000)
    if not args.file:
        fail("fit needs a file: python onesided_mc.py fit FILE, with a line row, column, value for each entry")
    columns, n_values = {}, 0
    for block in progress(args, read_triplets(args.file, columns), rank):
        n_values += len(block[0])
    d = len(columns)
    if not (args.rank or 1) <= d or d < 2:
        fail(f"{args.file} has {d} column{'s' * (d > 1)}: " + (f"--rank must be in 1..{d}" if d > 1 else "want two or more"))
    halves = [PairStats(d, args.storage, device) for _ in range(2)]
    for rows, cols, vals in read_triplets(args.file, columns):
        for number, batch, x in padded(rows, cols, vals):
            for i, half in enumerate(halves):
                mine = number % (2 * world) == 2 * rank + i
                half.update(batch[mine], x[mine])
    halves = [half.all_reduce() for half in halves]
    stats = PairStats(d, args.storage, device).merge(halves[0]).merge(halves[1])
    plain = dict(rank=args.rank or 1, weights=args.weights, allow_disconnected=args.allow_disconnected)
    model = fit(stats, **plain)  # here, so that what is wrong with the whole is said of the whole
    try:
        settings, loss = choose_settings(args, halves, d)
        agreement = split_half(halves, center=args.center, **settings)
        model = fit(stats, **settings)
    except ValueError as error:
        if not args.rank:
            fail(f"half of the rows is too little to choose the rank by ({error}): give --rank")
        settings, loss, agreement = plain, math.nan, math.nan
    r = settings["rank"]
    values, Q = model.components(args.center)
    out, labels = Path(args.out or f"out/onesided_mc/{args.task}"), np.array(list(columns))
    halved = f"differ by {agreement:.3f} (0 to {2 * r}): the row-space error of the fit to all is about {agreement / 4:.3f}"
    notes = [f"{int(stats.n_rows):,} rows, {n_values:,} values, {d} columns; rank {r}, V of {model.V.shape[1]} columns"
             + (f", noise variance {model.noise_variance:.4g}" if settings.get("noise") else ""),
             "fits to two halves of the rows " + (halved if agreement == agreement else "cannot be had: too few rows")]
    if not model.converged:
        notes.append(f"the solver stopped after {model.steps} steps, before it converged")
    if stats.n_rows < r * r * d * math.log(d):
        notes.append(f"fewer rows than r²·d·log d = {r * r * d * math.log(d):,.0f}, the paper's order of what is needed")
    gaps = (values[:-1] - values[1:]) / values[0]
    if len(gaps) and gaps.min() < 0.01:
        at = int(gaps.argmin()) + 1
        notes.append(f"eigenvalues {at} and {at + 1} are nearly equal: the space of both is meaningful, each component alone is not")
    if rank == 0:
        arrays = dict(columns=labels, components=Q, eigenvalues=values, V=model.V, noise_variance=model.noise_variance, means=model.means)
        if stats.dense:
            arrays["standard_errors"] = standard_errors(stats)
        save_arrays(out / "model.npz", {name: x.cpu().numpy() if torch.is_tensor(x) else x for name, x in arrays.items()})
        stats.save(out / "stats.npz")
        notes.append(f"written: {out / 'model.npz'} ({', '.join(arrays)}) and {out / 'stats.npz'}, the sums")
    largest = Q.abs().argsort(0, descending=True)[:4].T.tolist()
    table = [(f"component {i + 1}", float(values[i]), ", ".join(f"{labels[j]} {Q[j, i]:+.2f}" for j in largest[i])) for i in range(r)]

    def draw(axes):
        x, y = Q[:, 0].cpu(), Q[:, min(1, r - 1)].cpu()
        axes[0].bar(list(map(str, range(1, r + 1))), values.cpu())
        axes[0].set(xlabel="component", ylabel="eigenvalue of XᵀX/m", title=f"{Path(args.file).name}: rank {r}")
        axes[1].scatter(x, y, s=12)
        for j in range(d if d <= 40 else 0):
            axes[1].annotate(labels[j], (x[j], y[j]), fontsize=7)
        axes[1].set(xlabel="component 1", ylabel=f"component {min(2, r)}", title="the columns")

    finish(args, rank, (("", "eigenvalue", "largest entries"), table),
           dict(table=table, settings=settings, held_out=float(loss), split_half=agreement, notes=notes), draw, ncols=2, figsize=(11, 4.4))


def bench(args):
    """What the pass over the rows and the solver cost, and the peak of memory."""
    device, dtype, rank, world = begin(args, 1000)
    m, table = args.rows[-1], []
    shapes = [(50, 3, 2, "dense"), (1000, 5, 2, "dense"), (1000, 5, 5, "dense"), (5000, 3, 2, "pairs")]
    for d, r, k, storage in progress(args, shapes, rank):
        V = right_factor(d, r, args.seed, device, dtype)
        stats, update = PairStats(d, storage, device), 0.0
        for _, cols, vals in low_rank_rows(V, m, k, args.seed, 0.0, rank, world):
            start = time.perf_counter()
            stats.update(cols, vals)
            if device.type == "cuda":
                torch.cuda.synchronize()
            update += time.perf_counter() - start
        start = time.perf_counter()
        stats.all_reduce()
        update += time.perf_counter() - start
        start = time.perf_counter()
        model = fit(stats, r)
        solve = time.perf_counter() - start
        error = rowspace_error(model.components()[1], torch.linalg.qr(V.double())[0])
        table.append((f"d = {d:,}, r = {r}, k = {k}, {storage}", update, m / update / 1e6, solve, model.steps, error, peak_memory() / 1e9))
    header = (f"{m:,} rows, {device.type}, {world} process{'es' * (world > 1)}", "statistics, s", "million rows a s", "solver, s", "steps",
              "row-space error", "peak GB so far")

    def draw(ax):
        at = np.arange(len(table))
        ax.barh(at + 0.2, [row[1] for row in table], 0.4, label="statistics")
        ax.barh(at - 0.2, [row[3] for row in table], 0.4, label="solver")
        ax.set_yticks(at, [row[0] for row in table])
        ax.set(xlabel="seconds", title=f"{m:,} rows")
        ax.legend()

    finish(args, rank, (header, table), dict(table=table), draw, figsize=(8, 3.6))


def peak_memory():
    """Bytes: of the GPU's tensors, or of this process (Unix)."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    from resource import RUSAGE_SELF, getrusage

    return getrusage(RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


# ============================================================================================== command line

TASKS = {"synthetic": synthetic, "genome": genome, "ratings": ratings, "noise": noise, "rank": rank, "impossible": impossible,
         "fit": fit_file, "bench": bench}
ROWS = {"synthetic": [3000, 12_000, 50_000, 200_000, 1_000_000], "impossible": [10_000, 50_000, 250_000, 1_000_000], "noise": [50_000],
        "rank": [200_000], "bench": [2_000_000]}


def row_counts(text):
    """3000,12000 → [3000, 12000]."""
    if not all(part.strip().isdecimal() and int(part) >= 100 for part in text.split(",")):
        raise argparse.ArgumentTypeError(f"{text!r} is no list of row counts of at least 100, such as 3000,12000")
    return sorted({int(part) for part in text.split(",")})


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.error = fail  # one line, exit code 2
    flag, count = parser.add_argument, number(int, 1)
    flag("task", nargs="?", choices=TASKS, default="synthetic", help="synthetic (the default): error against rows, all methods; genome: "
         "ancestry from a few genotypes a site; ratings: MovieLens (download); noise, rank: what real data need; impossible: why the left "
         "side cannot be had; fit FILE: your own data; bench: speed and memory")
    flag("file", nargs="?", help="fit: lines of row, column, value, entries of a row together (.csv, .tsv, .gz)")
    flag("--rows", type=row_counts, help="numbers of rows, as in 3000,12000 (synthetic: 3000 to 1000000; noise: 50000; rank: 200000; "
         "bench: 2000000; impossible: 10000 to 1000000)")
    flag("--columns", "--d", dest="d", type=number(int, 3), default=50, help="columns of the synthetic rows (under torchrun write "
         "--columns)")
    flag("--rank", type=count, help="components (synthetic, noise, rank: 3; impossible: 5; ratings, fit: by held-out rows)")
    flag("--k", type=number(int, 2), help="entries seen in a row (2, the paper's; genome: 5)")
    flag("--noise_sd", type=number(float, 0, 1e6), default=0.0, help="synthetic: sd of noise on the entries, which have sd 1")
    flag("--seeds", type=count, default=3, help="synthetic, noise: number of seeds, from --seed on")
    flag("--complete_rows", type=number(int, 0), default=50_000, help="synthetic: complete X itself up to so many rows")
    flag("--storage", choices=("auto", "dense", "pairs"), default="auto", help="of the sums: d×d, or only the pairs seen (auto: above "
         "2,048 columns)")
    flag("--sites", type=count, default=100_000, help="genome, simulated: rows")
    flag("--people", type=number(int, 4), default=60, help="genome, simulated: columns")
    flag("--populations", type=number(int, 2, 20), default=3, help="genome, simulated: of equal size")
    flag("--fst", type=number(float, 1e-4, 0.9), default=0.1, help="genome, simulated: how far populations differ (humans: about 0.1)")
    flag("--data", help=f"genome: a VCF, as at {PAGE_1000G}; ratings: ml-latest-small (default), ml-25m, ml-32m or a .csv")
    flag("--panel", help="genome: the panel that goes with the VCF (sample, pop, super_pop)")
    flag("--maf", type=number(float, 0, 0.5), default=0.05, help="genome, VCF: least minor allele frequency")
    flag("--min_count", type=count, default=20, help="ratings: least number of ratings of a column")
    flag("--weights", choices=("counts", "variance"), default="counts", help="fit, ratings: the paper's weights, or counts over "
         "variances (ours)")
    flag("--allow_disconnected", action="store_true", help="fit: go on where parts of the columns are never seen together")
    flag("--center", choices=("none", "rows", "columns"), default="none", help="fit: take off the mean of each row or column, "
         "after the fact")
    flag("--device", default="auto", help="auto is cuda, else cpu")
    flag("--dtype", choices=("float32", "float64"), default="float32", help="of the synthetic rows; the sums are float64")
    flag("--seed", type=number(int, 0, 2**31), default=0, help="of everything that is drawn")
    flag("--out", help="folder for results and figures (out/onesided_mc/<task>)")
    flag("--no_plot", action="store_true", help="write no figure")
    flag("--quiet", action="store_true", help="no progress bars")
    args = parser.parse_args(argv)
    args.rows, args.k = args.rows or ROWS.get(args.task), args.k or (5 if args.task == "genome" else 2)
    if args.file and args.task != "fit":
        fail(f"a file goes with fit alone, not with {args.task}")
    if args.task in ROWS and args.task != "bench" and not max(args.k, args.rank or 1) <= args.d:
        fail(f"--k {args.k} and --rank {args.rank or 1} must be at most --columns {args.d}")
    return args


def main():
    args = parse_args()
    try:
        TASKS[args.task](args)
        if dist.is_initialized():
            dist.barrier()  # a rank that leaves while another goes on can abort at its exit
    except KeyboardInterrupt:
        fail("stopped")
    except (ValueError, OSError) as error:  # what the methods say about data, and what the disk does
        fail(error)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
