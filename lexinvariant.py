"""Lexinvariant language models: no fixed token embeddings (Huang, Zelikman, Chen, Wu, Valiant, Liang; arXiv 2305.16349).

The problem. A language model knows its symbols: row v of a table is what v means. Could it do without, reading every text as a cipher
whose symbols mean nothing but what this text makes of them?

The idea. Give every sequence a fresh random table. Equal symbols share a vector inside a sequence and never across sequences; the same
table reads out, so the model points at a symbol of this context instead of naming a known one. What it learns is then the same for any
renaming π of the alphabet,

    p(x_1 … x_T) = p(π(x_1) … π(x_T)),        and the best such p of a language q is p′(x) = mean over π of q(πx)

The theorem. Not knowing d symbols costs little. The paper bounds the average L1 distance of p′ to q by Õ((d/T)^¼). One line gives more:
q is one of the d! terms of the mean, so p′(x) ≥ q(x)/d!, and for every text, whatever its length,

    −ln p′(x) ≤ −ln q(x) + ln d!              in all: 64.6 nats for 27 symbols; hence L1 ≤ √(2·ln d!/T) a symbol on average (Pinsker)

The compact head. At position t a lexinvariant p can tell apart only the n symbols seen so far; all others must have the same probability.
So a softmax over n pointers and one entry NEW loses nothing (see pointer_cross_entropy) and needs no table at all.

How to run it.

    python lexinvariant.py                        the theorem, a model at the exact optimum, English, a cipher (4 minutes, 2 CPU cores)
    python lexinvariant.py decipher --text "wkh txlfn eurzq …"    your substitution cipher, by the model and by a classical solver
    python lexinvariant.py curve | tasks | bayes_gap | theorem | posterior | semi | rename | bench
    python lexinvariant.py train --preset paper      150M weights on ASCII, as the paper has it; --data pile; torchrun for many GPUs

The authors published no code. Ours, not the paper's: the bound ln d!, canonical ranks, the compact head, counter-based rows (no table is
stored), the read-out matrix that starts at zero, and three things that make minutes on a CPU enough: smeared keys, matched initial weights,
a curriculum that permutes few symbols first (see RelativeAttention, curriculum; --preset paper has none of them).

What we measured (2 shared cores of an AMD EPYC, torch 2.13.0, seeds 0, 1, 2; nats a character of the standard library's English):

    python lexinvariant.py        positions 0 to 8         32 to 64                 128 to 192              best reader of single
    none of 27 permuted           2.68, 2.64, 2.65         1.99, 2.10, 2.16         1.86, 1.92, 2.12        symbols: 2.84
    6 permuted                    2.92, 2.89, 2.91         2.37, 2.44, 2.51         2.12, 2.15, 2.36
    all permuted                  3.31, 3.34, 3.32         2.80, 2.84, 2.88         2.44, 2.42, 2.64

    the exact p′ pays 1.792, 3.178, 4.787, 6.579 nats for 3 to 6 symbols: ln d!, reached within 75 symbols
    bayes_gap     a trained canonical model and that optimum: 0.022, 0.042, 0.046 nats apart at most, past position 4 (90 CPU s)
    tasks         LookUp, symbols never seen in training: canonical 0.999, standard 0.026 (chance 0.032); Permutation 0.982 and 0.000
    classical solver, 256 characters: 1.00, 0.94, 0.96 of them right

The paper (150M weights, 8 billion characters of the Pile): perplexity 3.38 lexinvariant and 2.00 standard after 511 characters, 99.6 % of
a cipher's key read by a probe; LookUp 91.8 against 48.5 %, Permutation 59.4 against 27.7 %.

What did not hold at this scale. The model uses the cipher's statistics long before it can name a letter: all permuted, the probe
reads 0.22, 0.21, 0.21 of the characters at positions 128 to 192, always the space would be 0.17; with 6 permuted it reads 0.21, 0.18, 0.28
of those, up from 0.05, 0.07, 0.05 at the start. `decipher --minutes 30 --probe_steps 1500` (seed 0; about 12 CPU minutes of the 30, the
machine was shared): loss 3.29 to 2.35 by position, 0.23 and 0.32 read right at 128 to 192, key precision 0.11: the trend, not the level. In
`tasks`, gaussian rows and permuted ids have not learnt the rules in the steps that canonical ranks need (LookUp 0.12 and 0.19, Permutation
0.23 and 0.37): there even the separators have no stable name. GPU and --preset gpu, paper: not measured.
"""

import argparse
import ast
import hashlib
import importlib
import io
import itertools
import json
import keyword
import math
import os
import platform
import re
import subprocess
import sys
import sysconfig
import time
import tokenize
import urllib.request
import warnings
import zipfile
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import rearrange
from torch import nn
from tqdm import tqdm

try:
    from kernels.pointer_cross_entropy import pointer_cross_entropy as fused_pointer_cross_entropy
except ImportError:  # copied alone, or no Triton here: the plain version below computes the same
    fused_pointer_cross_entropy = None

# ============================================================================================== the method: symbols without a meaning

MASK = 0xFFFFFFFF


def philox(c0, c1, c2, c3, key, rounds=10):
    """Philox4x32 (Salmon et al. 2011): a counter of four 32-bit words (int64 tensors that broadcast, or ints) and a 64-bit key → four
    32-bit words. subtle: int64 products wrap mod 2⁶⁴, yet shifting and masking them still gives the right high word."""
    k0, k1 = key & MASK, key >> 32 & MASK
    for _ in range(rounds):
        a, b = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (b >> 32 & MASK) ^ c1 ^ k0, b & MASK, (a >> 32 & MASK) ^ c3 ^ k1, a & MASK
        k0, k1 = k0 + 0x9E3779B9 & MASK, k1 + 0xBB67AE85 & MASK
    return c0, c1, c2, c3


def gaussian(radius, angle):
    """Box-Muller: √(−2 ln u)·(cos θ, sin θ), u = (23 bits + ½)/2²³ never 0, θ = 24 bits of a turn. |z| ≤ 5.77."""
    u = ((radius >> 9).float() + 0.5) * 2.0**-23
    r, theta = (-2 * u.log()).sqrt(), (angle >> 8).float() * (2 * math.pi * 2.0**-24)
    return r * theta.cos(), r * theta.sin()


def uniforms(samples, n, seed, kind):
    """Numbers in [0, 1) that belong to (seed, kind, sample, index) alone: samples (batch,) int64 → (batch, n) float64."""
    words = philox(torch.arange(n, device=samples.device), 0, samples[:, None] & MASK, samples[:, None] >> 32, seed | kind << 32)
    return words[0].double() / 2**32


def random_rows(tokens, samples, seed, d):
    """The vector N(0, I_d) of a token in a sequence, from the counter (dimension div 4, token, sample) and the key seed: no table, and
    the same whatever else is in the batch. tokens (batch, n) and samples (batch,) int64 → (batch, n, d) float32; d a multiple of 4."""
    sample = samples[:, None, None]
    w = philox(torch.arange(d // 4, device=tokens.device), tokens[..., None], sample & MASK, sample >> 32, seed)
    return torch.stack([*gaussian(w[0], w[1]), *gaussian(w[2], w[3])], -1).flatten(2)


def permutations(samples, n_vocab, seed, n_permuted=None):
    """A random permutation of the vocabulary for each sequence; of n_permuted (batch,) randomly chosen symbols only, the others stay, if
    given. samples (batch,) int64 → (batch, n_vocab) int64, π[v]."""
    ids = torch.arange(n_vocab, device=samples.device).expand(len(samples), -1)
    count = torch.full_like(samples, n_vocab) if n_permuted is None else n_permuted
    chosen = uniforms(samples, n_vocab, seed, 1).argsort(1).argsort(1) < count[:, None]
    old = torch.where(chosen, ids, n_vocab + ids).argsort(1)  # the chosen ones in order, then the others
    new = torch.where(chosen, uniforms(samples, n_vocab, seed, 2), 2.0 + ids).argsort(1)  # the chosen ones shuffled, the others as above
    return torch.empty_like(old).scatter_(1, old, new)


def first_occurrences(ids):
    """(batch, seq) → position at which the symbol of each position stands first, (batch, seq) int64."""
    order = ids.argsort(dim=1, stable=True)
    ordered = ids.gather(1, order)
    starts = F.pad(ordered[:, 1:] != ordered[:, :-1], (1, 0), value=True)
    run = torch.where(starts, torch.arange(ids.shape[1], device=ids.device), 0).cummax(1).values
    return torch.empty_like(ids).scatter_(1, order, order.gather(1, run))


def pointers(symbols):
    """What the compact head must know of (batch, seq + 1) symbols → first (batch, seq), target (batch, seq), n_seen (batch, seq): the
    position of a target's first occurrence, −1 if it is new, and the number of distinct symbols up to a position. Looks at no later one."""
    first, position = first_occurrences(symbols), torch.arange(symbols.shape[1], device=symbols.device)
    target = torch.where(first[:, 1:] < position[1:], first[:, 1:], -1)
    return first[:, :-1], target, (first == position)[:, :-1].cumsum(1)


def pointer_cross_entropy(query, rows, first, target, new, n_seen, n_vocab):
    """Loss of the compact head, (batch, seq) nats: a softmax over the distinct symbols seen so far and one entry NEW.

    query (batch, seq, d); rows (batch, seq, d), the vector of each position's symbol; first, target, n_seen as `pointers` makes them;
    new (batch, seq), the logit of NEW; z[t, s] = ⟨query_t, rows_s⟩/√d at first occurrences s ≤ t.

        −log p(y) = log(Σ_s e^z[t,s] + e^new_t) − z[t, first(y)]                       y has been seen
                                                − new_t + ln(n_vocab − n_seen_t)       y is new, one of those not seen

    Why nothing is lost: a lexinvariant p is p(x) = p(πx) for every π. Take a π that moves only symbols not in x_1 … x_t: the context stays,
    so p(y | x_1…x_t) = p(πy | x_1…x_t), the same for all unseen y. What is left to predict is n_seen + 1 numbers, which are these."""
    z = query @ rows.transpose(1, 2) / math.sqrt(query.shape[-1])  # (batch, seq, seq)
    position = torch.arange(z.shape[1], device=z.device)
    seen = (first == position)[:, None] & (position <= position[:, None])
    z = z.masked_fill(~seen, -math.inf)
    new = new.masked_fill(n_seen == n_vocab, -math.inf)  # nothing is left to be new
    chosen = z.gather(2, target.clamp_min(0)[..., None]).squeeze(2)
    novel = new - (n_vocab - n_seen).clamp_min(1).to(new.dtype).log()
    return torch.logaddexp(z.logsumexp(2), new) - torch.where(target >= 0, chosen, novel)


MODES = ("standard", "gaussian", "permute", "canonical")


class LexinvariantEmbedding(nn.Module):
    """Input vectors and read-out of a language model whose symbols mean nothing beforehand, around any causal trunk:

        symbols = embedding.relabel(x, samples)                     # x (batch, seq + 1) ids; samples (batch,): each sequence's number
        hidden = trunk(embedding.embed(symbols[:, :-1], samples))   # (batch, seq, d_model)
        loss = embedding.loss(hidden, symbols, samples)             # (batch, seq), nats

    gaussian   a fresh row of N(0, I) for each symbol of each sequence, input and read-out (the paper's section 2); made of
               counters, so there is no table, no optimizer state and nothing to send. Invariant on average over the draw
    permute    a fresh permutation of the ids of each sequence, then an ordinary model (appendix G at p = 1). Likewise; p < 1 permutes
               each symbol with probability p: semi-lexinvariant (section 3.6), p = 0 the ordinary model to the bit
    canonical  each symbol's id is the rank of its first occurrence. Invariant to the bit in every pass (not in the paper)
    standard   an ordinary tied embedding

    head: "compact" (gaussian, canonical; see pointer_cross_entropy) or "dense", a softmax over the vocabulary: in gaussian mode with
    the sequence's own table, (batch, n_vocab, d_model), as the paper has it. readout: "linear", a matrix that starts at zero (loss ln V
    at step 0), or "identity", the paper's. max_symbols: canonical, the largest number of distinct symbols of a sequence."""

    def __init__(self, n_vocab, d_model, mode="gaussian", head=None, readout="linear", p=1.0, max_symbols=None, seed=0):
        super().__init__()
        if mode not in MODES or d_model % 4:
            raise ValueError(f"mode {mode!r} (one of {', '.join(MODES)}), d_model {d_model} (a multiple of 4)")
        self.n_vocab, self.d_model, self.mode, self.p, self.seed = n_vocab, d_model, mode, p, seed
        self.compact = (head or ("compact" if mode in ("gaussian", "canonical") else "dense")) == "compact"
        self.table = self.scale = self.new = None
        if mode == "gaussian":
            self.scale, self.bias = nn.Parameter(torch.ones(d_model)), nn.Parameter(torch.zeros(d_model))  # appendix B
        else:
            rows = min(n_vocab, max_symbols or n_vocab) if mode == "canonical" else n_vocab
            self.table = nn.Parameter(torch.randn(rows, d_model))
        self.readout = nn.Linear(d_model, d_model, bias=False) if readout == "linear" else nn.Identity()
        for p_ in self.readout.parameters():
            nn.init.zeros_(p_)
        if self.compact:
            self.new = nn.Linear(d_model, 1)
            nn.init.zeros_(self.new.weight)
            nn.init.zeros_(self.new.bias)

    def relabel(self, x, samples, n_permuted=None):
        """Ids (batch, seq) → the symbols that the model sees. n_permuted (batch,): permute just so many (a curriculum, or a cipher)."""
        if self.mode == "permute":
            pi = permutations(samples, self.n_vocab, self.seed, n_permuted)
            if self.p < 1 and n_permuted is None:
                ids = torch.arange(self.n_vocab, device=x.device)
                pi = torch.where(uniforms(samples, self.n_vocab, self.seed, 3) < self.p, pi, ids)
            return pi.gather(1, x)
        if self.mode == "canonical":
            first = first_occurrences(x)
            distinct = (first == torch.arange(x.shape[1], device=x.device)).cumsum(1)
            if int(distinct[:, -1].max()) > len(self.table) + 1:  # the last symbol is only a target
                raise ValueError(f"canonical: {int(distinct.max())} distinct symbols in a sequence, max_symbols is {len(self.table)}")
            return distinct.gather(1, first) - 1
        return x

    def rows(self, symbols, samples):
        """(batch, seq) → the vectors that the read-out compares with, (batch, seq, d_model)."""
        return random_rows(symbols, samples, self.seed, self.d_model) if self.mode == "gaussian" else self.table[symbols]

    def embed(self, symbols, samples):
        rows = self.rows(symbols, samples)
        return rows * self.scale + self.bias if self.mode == "gaussian" else rows

    def logits(self, hidden, samples):
        """Dense read-out, (batch, seq, n_vocab)."""
        everything = torch.arange(self.n_vocab, device=hidden.device).expand(len(hidden), -1)
        table = self.rows(everything, samples) if self.mode == "gaussian" else self.table
        return self.readout(hidden) @ table.mT / math.sqrt(self.d_model)

    def loss(self, hidden, symbols, samples):
        """−log p of symbols[:, 1:], (batch, seq)."""
        if not self.compact:
            return F.cross_entropy(self.logits(hidden, samples).transpose(1, 2), symbols[:, 1:], reduction="none")
        first, target, n_seen = pointers(symbols)
        head = fused_pointer_cross_entropy if fused_pointer_cross_entropy and hidden.is_cuda else pointer_cross_entropy
        rows = self.rows(symbols[:, :-1], samples)
        return head(self.readout(hidden), rows, first, target, self.new(hidden).squeeze(2), n_seen, self.n_vocab)

    def log_probs(self, hidden, symbols, samples):
        """log p of every id at every position, (batch, seq, n_vocab), for small vocabularies. canonical: of ranks, those not seen equal."""
        if not self.compact:
            return self.logits(hidden, samples).log_softmax(2)
        rows, position = self.rows(symbols[:, :-1], samples), torch.arange(hidden.shape[1], device=hidden.device)
        _, _, n_seen = pointers(symbols)
        z = self.readout(hidden) @ rows.mT / math.sqrt(self.d_model)
        z = z.masked_fill(position > position[:, None], -math.inf)
        index = symbols[:, None, :-1].expand_as(z)
        scores = torch.full((*z.shape[:2], self.n_vocab), -math.inf, device=z.device).scatter_reduce(2, index, z, "amax")
        new = self.new(hidden).masked_fill((n_seen == self.n_vocab)[..., None], -math.inf)
        unseen = new - (self.n_vocab - n_seen).clamp_min(1)[..., None].log()
        return torch.where(scores > -math.inf, scores, unseen).log_softmax(2)


# ============================================================================================== the method: the best predictor there is


def bayes_losses(transition, x):
    """Losses of a Markov chain p and of its lexinvariant p′(x) = mean over all d! permutations π of p(πx), exactly.

    transition (d, d): rows sum to 1, the first symbol is uniform; x (n, T) → two (n, T) arrays of nats. p′ is the best that a model can do
    which does not know the alphabet. It pays ln d! nats for that at most, in all: p′(x) ≥ p(x)/d!, one term of the mean."""
    d = len(transition)
    log_p = np.log(transition)
    pi = np.array(list(itertools.permutations(range(d))))  # (d!, d)
    known = np.concatenate([np.full((len(x), 1), math.log(d)), -log_p[x[:, :-1], x[:, 1:]]], 1)
    weight, losses, before = np.zeros((len(x), len(pi))), [np.full(len(x), math.log(d))], math.log(len(pi))
    for t in range(1, x.shape[1]):
        weight += log_p[pi[:, x[:, t - 1]], pi[:, x[:, t]]].T
        after = np.logaddexp.reduce(weight, 1)
        losses.append(before - after)
        before = after
    return known, np.stack(losses, 1)


def random_chain(d, rng, concentration=0.4):
    chain = rng.dirichlet(np.full(d, concentration), d) + 1e-3
    return chain / chain.sum(1, keepdims=True)


def chain_text(transition, n, length, rng):
    """n sequences from a chain, first symbol uniform → (n, length) int64."""
    cumulative, x = transition.cumsum(1), np.empty((n, length), np.int64)
    x[:, 0] = rng.integers(len(transition), size=n)
    for t in range(1, length):
        x[:, t] = (rng.random((n, 1)) > cumulative[x[:, t - 1]]).sum(1).clip(max=len(transition) - 1)
    return x


# ============================================================================================== the model


def relative_buckets(seq, n=32, far=128, device=None):
    """T5's causal buckets of the distance t − s, (seq, seq): one each up to n/2, then logarithmic up to far, then the last."""
    distance = (torch.arange(seq, device=device)[:, None] - torch.arange(seq, device=device)).clamp_min(0)
    large = n // 2 + (torch.log(distance.clamp_min(1) / (n // 2)) / math.log(far / (n // 2)) * (n // 2)).long()
    return torch.where(distance < n // 2, distance, large.clamp_max(n - 1))


class RelativeAttention(nn.Module):
    """Causal attention with a learned bias for each bucket of distance. qk_norm: unit queries and keys, a learned scale a head.

    smear: a key is mixed with the key before it, by a learned share a head; so "what followed this symbol last time?" takes one layer,
    not two. matched: keys start equal to queries and the output as the transpose of the values, so that at step 0 equal symbols attend
    to each other and are copied. Both are ours, for small models; the paper's preset has neither."""

    def __init__(self, d_model, n_head, qk_norm, smear, matched, dropout):
        super().__init__()
        self.n_head, self.dropout = n_head, dropout
        self.qkv = nn.Linear(d_model, 3 * d_model, bias=False)
        self.out = nn.Linear(d_model, d_model, bias=False)
        self.bias = nn.Embedding(32, n_head)
        self.scale = nn.Parameter(torch.ones(n_head)) if qk_norm else None
        self.smear = nn.Parameter(torch.zeros(n_head)) if smear else None
        for weight in (self.qkv.weight, self.out.weight):
            nn.init.trunc_normal_(weight, std=d_model**-0.5)
        nn.init.zeros_(self.bias.weight)
        if matched:
            with torch.no_grad():
                q, k, v = self.qkv.weight.chunk(3)
                k.copy_(q)
                self.out.weight.copy_(v.T)

    def forward(self, x, buckets):
        q, k, v = rearrange(self.qkv(x), "b t (three h d) -> three b h t d", three=3, h=self.n_head)
        if self.smear is not None:
            share = torch.sigmoid(self.smear)[:, None, None]
            k = torch.cat([k[:, :, :1], torch.lerp(k[:, :, 1:], k[:, :, :-1], share)], 2)
        if self.scale is not None:
            q, k = F.normalize(q, dim=-1) * self.scale[:, None, None], F.normalize(k, dim=-1)
        future = torch.full(buckets.shape, -math.inf, device=x.device).triu(1)
        mask = (self.bias(buckets).permute(2, 0, 1) + future).to(q.dtype).expand(len(x), -1, -1, -1)
        y = F.scaled_dot_product_attention(q, k, v, mask, self.dropout * self.training, scale=1.0 if self.scale is not None else None)
        return self.out(rearrange(y, "b h t d -> b t (h d)"))


class TrunkLayer(nn.Module):
    def __init__(self, d_model, n_head, d_ff, qk_norm, smear, matched, dropout):
        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(d_model, eps=1e-6), nn.RMSNorm(d_model, eps=1e-6)
        self.attention = RelativeAttention(d_model, n_head, qk_norm, smear, matched, dropout)
        self.up, self.down, self.drop = nn.Linear(d_model, d_ff, bias=False), nn.Linear(d_ff, d_model, bias=False), nn.Dropout(dropout)
        nn.init.trunc_normal_(self.up.weight, std=d_model**-0.5)
        nn.init.zeros_(self.down.weight) if matched else nn.init.trunc_normal_(self.down.weight, std=d_ff**-0.5)

    def forward(self, x, buckets):
        x = x + self.drop(self.attention(self.norm1(x), buckets))
        return x + self.drop(self.down(F.relu(self.up(self.norm2(x)))))


class LexinvariantLM(nn.Module):
    """A decoder with T5's relative positions (the paper's section 3.1) between the two ends of a LexinvariantEmbedding."""

    def __init__(self, n_vocab, mode="gaussian", d_model=64, n_layer=3, n_head=2, d_ff=256, qk_norm=False, smear=True, matched=True,
                 dropout=0.0, **embedding):
        super().__init__()
        self.config = dict(n_vocab=n_vocab, mode=mode, d_model=d_model, n_layer=n_layer, n_head=n_head, d_ff=d_ff, qk_norm=qk_norm,
                           smear=smear, matched=matched, dropout=dropout, **embedding)
        self.embedding = LexinvariantEmbedding(n_vocab, d_model, mode, **embedding)
        self.layers = nn.ModuleList(TrunkLayer(d_model, n_head, d_ff, qk_norm, smear, matched, dropout) for _ in range(n_layer))
        self.norm = nn.RMSNorm(d_model, eps=1e-6)

    def trunk(self, x):
        buckets = relative_buckets(x.shape[1], device=x.device)
        for layer in self.layers:
            x = layer(x, buckets)
        return self.norm(x)

    def forward(self, x, samples, n_permuted=None):
        """x (batch, seq + 1) ids, samples (batch,) → loss (batch, seq) in nats, hidden (batch, seq, d_model), symbols (batch, seq + 1)."""
        symbols = self.embedding.relabel(x, samples, n_permuted)
        hidden = self.trunk(self.embedding.embed(symbols[:, :-1], samples))
        return self.embedding.loss(hidden.float(), symbols, samples), hidden, symbols


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


def save_checkpoint(path, state):
    """torch.save under a temporary name, then rename: a killed run leaves the old checkpoint whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(state, path.with_suffix(".tmp"))
    os.replace(path.with_suffix(".tmp"), path)


def load_checkpoint(path, device="cpu"):
    try:
        return torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # torch raises a dozen kinds here
        fail(f"{path} is not a checkpoint of this program ({str(error).splitlines()[0]})")


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


def stdlib_text(kind):
    """What every Python ships, as a list of texts in a fixed order: kind is "prose" (help topics, docstrings), "code" (sources),
    or "stdlib" (help topics and sources)."""
    from pydoc_data.topics import topics

    root, skip = Path(sysconfig.get_path("stdlib")), {"test", "tests", "idle_test", "site-packages", "pydoc_data"}
    sources = [p.read_text("utf-8", "ignore") for p in sorted(root.rglob("*.py")) if not skip & set(p.relative_to(root).parts)]
    if kind == "prose":
        warnings.simplefilter("ignore", SyntaxWarning)
        trees = [ast.walk(ast.parse(source)) for source in sources]
        documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
        sources = ["\n\n".join(filter(None, (ast.get_docstring(n) for n in tree if isinstance(n, documented)))) for tree in trees]
    return ([] if kind == "code" else [topics[name] for name in sorted(topics)]) + sources


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


# ============================================================================================== text

LETTERS = " abcdefghijklmnopqrstuvwxyz"  # az27: lower case, everything else is one space
DOWNLOADS = {
    "text8": "http://mattmahoney.net/dc/text8.zip", "enwik8": "http://mattmahoney.net/dc/enwik8.zip",
    "pile": "https://huggingface.co/datasets/monology/pile-uncopyrighted/resolve/main/val.jsonl.zst",
}


def to_ids(text, alphabet):
    """Text → ids: az27 (0 the space, 1 to 26 the letters), or ascii (0 to 127; other characters are dropped)."""
    if alphabet == "az27":
        raw = np.frombuffer(re.sub("[^a-z]+", " ", text.lower()).encode(), np.uint8)
        return np.where(raw == 32, 0, raw - 96).astype(np.int64)
    return np.frombuffer(text.encode("ascii", "ignore"), np.uint8).astype(np.int64)


def read_pile(path):
    """The texts of a .jsonl.zst, the Pile's format."""
    try:
        zstd = importlib.import_module("compression.zstd" if sys.version_info >= (3, 14) else "zstandard")
    except ImportError:
        fail("--data pile is packed with zstd: Python 3.14 reads it, an older one with the package zstandard")
    with zstd.open(path, "rt", encoding="utf-8") as file:
        return "\n".join(json.loads(line)["text"] for line in file)


def load_symbols(data, alphabet, seq):
    """→ training ids, validation ids (1-D), size of the alphabet. prose and code: every 20th text is for validation; else the last 20th."""
    if data in ("prose", "code", "stdlib"):
        texts = stdlib_text(data)
        parts = ["\n".join(t for i, t in enumerate(texts) if (i % 20 == 19) == held_out) for held_out in (False, True)]
    else:
        path = download(DOWNLOADS[data]) if data in DOWNLOADS else Path(data)
        if not path.is_file():
            fail(f"--data {data}: no such file, and none of prose, code, stdlib, {', '.join(DOWNLOADS)}")
        if path.suffix == ".zip":
            with zipfile.ZipFile(path) as archive:
                text = archive.read(archive.namelist()[0]).decode("utf-8", "ignore")
        else:
            text = read_pile(path) if path.suffix == ".zst" else path.read_text("utf-8", "ignore")
        parts = [text[: len(text) * 19 // 20], text[len(text) * 19 // 20 :]]
    train, val = (to_ids(part, alphabet) for part in parts)
    if alphabet == "ascii" and (lost := sum(map(len, parts)) - len(train) - len(val)):
        print(f"note: {lost:,} characters beyond ASCII are left out", file=sys.stderr)
    for name, ids in (("training", train), ("validation", val)):
        if len(ids) < seq + 2:
            fail(f"--data {data}: {len(ids)} {name} characters are too few for sequences of {seq + 1}")
    return train, val, 27 if alphabet == "az27" else 128


def windows(ids, n, seq, *counter):
    """Random windows (n, seq + 1) that depend on the counter alone."""
    starts = np.random.default_rng(counter).integers(len(ids) - seq, size=n)
    return torch.from_numpy(ids[starts[:, None] + np.arange(seq + 1)])


# ============================================================================================== training

PRESETS = {
    "cpu": dict(d_model=64, n_layer=3, n_head=2, d_ff=256, seq=192, batch=8, steps=2000, lr=4e-3),
    "gpu": dict(d_model=512, n_layer=6, n_head=8, d_ff=2048, seq=512, batch=64, steps=12_000, lr=1e-3),
    "paper": dict(d_model=1024, n_layer=12, n_head=8, d_ff=4096, seq=512, batch=64, steps=250_000, lr=0.01, qk_norm=True, smear=False,
                  matched=False, dropout=0.05, readout="identity", head="dense"),
}


def curriculum(done, n_vocab, samples, seed):
    """How many symbols to permute in each sequence, (batch,): a most that grows from 0 to all over the first 60 % of training, for 6 in 10
    sequences that most and for the others any number up to it; then all. The model stays an ordinary one at 0 on the way."""
    most = int(n_vocab * min(1, done / 0.6))
    u = uniforms(samples, 2, seed, 4)
    return torch.where(u[:, 0] < 0.6, most, (u[:, 1] * (most + 1)).long())


def fit_model(model, batch_of, steps, lr, args, minutes=0, optimizer="adamw", name="train", columns=slice(None)):
    """Train on batch_of(step, share done) → (x, samples, n_permuted), for so many steps or minutes, on all predictions or columns."""
    world = dist.get_world_size() if dist.is_initialized() and args.task == "train" else 1
    run = nn.parallel.DistributedDataParallel(model, broadcast_buffers=False) if world > 1 else model
    if optimizer == "adafactor":
        update = torch.optim.Adafactor(model.parameters(), lr)
    else:
        update = torch.optim.AdamW(model.parameters(), lr, betas=(0.9, 0.98), weight_decay=0.1)
    step, start = 0, time.monotonic()
    with tqdm(total=None if minutes else steps, desc=name, disable=args.quiet) as bar:
        while True:
            done = (time.monotonic() - start) / 60 / minutes if minutes else step / steps
            if done >= 1:
                return
            for group in update.param_groups:
                group["lr"] = lr * min(1, (step + 1) / 50) * (0.55 + 0.45 * math.cos(math.pi * done))
            loss = run(*batch_of(step, done))[0][:, columns].mean()
            if not math.isfinite(float(loss.detach())):
                fail(f"{name}: the loss is not finite at step {step} (lr {lr}): lower --lr")
            update.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            update.step()
            step += 1
            bar.update()


def save_lm(path, model, about):
    save_checkpoint(path, dict(config=model.config, model=model.state_dict(), about=about))


def load_lm(path, device):
    if not Path(path).is_file():
        fail(f"--model {path}: no such file; python lexinvariant.py train writes one")
    state = load_checkpoint(path, device)
    if not {"config", "model", "about"} <= set(state):
        fail(f"--model {path} is no model of lexinvariant.py")
    model = LexinvariantLM(**state["config"]).to(device)
    model.load_state_dict(state["model"])
    return model.eval(), state["about"]


def english_model(args, device, mode="permute", p=1.0):
    """--model, or a model trained by the preset on --data: mode permute by the curriculum → (model, training ids, validation ids)."""
    preset = PRESETS[args.preset]
    if args.model:
        model, about = load_lm(args.model, device)
        args.alphabet, args.seq = about["alphabet"], args.seq or about["seq"]
        return model, *load_symbols(args.data, args.alphabet, args.seq)[:2]
    args.seq = args.seq or preset["seq"]
    train, val, n_vocab = load_symbols(args.data, args.alphabet, args.seq)
    torch.manual_seed(args.seed)
    shape = {key: value for key, value in preset.items() if key not in ("seq", "batch", "steps", "lr")}
    shape = {key: value for key, value in shape.items() if mode in ("gaussian", "canonical") or key != "head"}
    model = LexinvariantLM(n_vocab, mode, **shape, p=p, seed=args.seed).to(device)
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() and args.task == "train" else (0, 1)
    batch = args.batch_size or preset["batch"]
    if batch % world:
        fail(f"--batch_size {batch} does not divide among {world} ranks")
    if args.minutes and world > 1:
        fail("--minutes is for one process, whose clock it is: torchrun takes --steps")

    def batch_of(step, done):
        rows = slice(rank, None, world)  # a sequence has the same number, and so the same permutation, on any number of ranks
        samples = torch.arange(batch * step, batch * (step + 1))[rows].to(device)
        n_permuted = curriculum(done, n_vocab, samples, args.seed) if mode == "permute" and args.curriculum else None
        return windows(train, batch, args.seq, args.seed, 1, step)[rows].to(device), samples, n_permuted

    fit_model(model, batch_of, args.steps or preset["steps"], args.lr or preset["lr"], args, args.minutes,
              "adafactor" if args.preset == "paper" else "adamw", f"{args.data}, {mode}")
    return model.eval(), train, val


EVALUATION = 10**12  # numbers of evaluation sequences start here: no permutation of the training comes back


@torch.no_grad()
def evaluate_lm(model, ids, seq, n, n_permuted, device, seed=0, batch=50):
    """Losses on n validation windows with n_permuted symbols permuted (permute mode): loss (n, seq), new (n, seq) whether the target
    stands there for the first time, hidden (n, seq, d_model), x and symbols, what the model saw of it, (n, seq + 1)."""
    x, parts = windows(ids, n, seq, seed, 2), []
    for first in range(0, n, batch):
        part = x[first : first + batch].to(device)
        samples = torch.arange(EVALUATION + first, EVALUATION + first + len(part), device=device)
        count = torch.full_like(samples, n_permuted) if n_permuted is not None else None
        loss, hidden, symbols = model(part, samples, count)
        parts.append((loss, pointers(symbols)[1] < 0, hidden, symbols))
    loss, new, hidden, symbols = (torch.cat(part).cpu() for part in zip(*parts))
    return loss, new, hidden, x, symbols


EDGES = (0, 8, 16, 32, 64, 96, 128, 192, 256, 384, 512, 1024)


def by_position(values, weights=None):
    """(n, seq) → {"0-8": mean, …} over ranges of positions."""
    weights = torch.ones_like(values) if weights is None else weights.float()
    spans = [(a, b) for a, b in zip(EDGES, EDGES[1:]) if b <= values.shape[1]]
    return {f"{a}-{b}": float((values * weights)[:, a:b].sum() / weights[:, a:b].sum()) if weights[:, a:b].sum() else math.nan
            for a, b in spans}


def unigram_entropy(ids, n_vocab):
    """Entropy of the symbols' frequencies, nats: no predictor that looks at single symbols only beats it on average."""
    p = np.bincount(ids, minlength=n_vocab) / len(ids)
    return float(-(p[p > 0] * np.log(p[p > 0])).sum())


# ============================================================================================== deciphering


class Probe(nn.Module):
    """The paper's section 3.2: a frozen model's hidden states → logits of the plain symbol, two layers against a learned stable table."""

    def __init__(self, d_model, n_vocab):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(d_model, 4 * d_model), nn.GELU(), nn.Linear(4 * d_model, n_vocab))

    def forward(self, hidden):
        return self.net(hidden)


def train_probe(model, ids, seq, n_permuted, steps, args, device):
    """Fit a Probe of the current symbol on enciphered text; the model stays as it is."""
    torch.manual_seed(args.seed)
    probe = Probe(model.config["d_model"], model.config["n_vocab"]).to(device)
    update = torch.optim.AdamW(probe.parameters(), 2e-3)
    for step in tqdm(range(steps), f"probe, {n_permuted} permuted", disable=args.quiet):
        x = windows(ids, 16, seq, args.seed, 3, step).to(device)
        samples = torch.arange(16, device=device) + EVALUATION // 2 + 16 * step
        with torch.no_grad():
            _, hidden, _ = model(x, samples, torch.full_like(samples, n_permuted))
        loss = F.cross_entropy(probe(hidden).transpose(1, 2), x[:, :-1])
        update.zero_grad()
        loss.backward()
        update.step()
        for group in update.param_groups:
            group["lr"] = 2e-3 * (1 - (step + 1) / steps)
    return probe.eval()


def key_precision(cipher, plain, guess, start, width):
    """The paper's measure: in the window, each cipher symbol is read as the plain symbol that most of its positions say. (n, seq) each →
    the share of right readings in each sequence, (n,)."""
    n, size = len(cipher), int(max(cipher.max(), plain.max(), guess.max())) + 1
    part = slice(start, start + width)
    votes, truth = torch.zeros(n, size * size), torch.zeros(n, size, dtype=torch.int64)
    votes.scatter_add_(1, cipher[:, part] * size + guess[:, part], torch.ones(n, width))
    truth.scatter_(1, cipher[:, part], plain[:, part])
    votes = votes.view(n, size, size)
    present = votes.sum(2) > 0
    return ((votes.argmax(2) == truth) & present).sum(1) / present.sum(1)


def ngram_table(ids, n_vocab=27):
    """log P of four characters in a row, smoothed → (n_vocab^4,) float32."""
    code = ((ids[:-3] * n_vocab + ids[1:-2]) * n_vocab + ids[2:-1]) * n_vocab + ids[3:]
    counts = np.bincount(code, minlength=n_vocab**4) + 0.01
    return np.log(counts / counts.sum()).astype(np.float32)


def solve_cipher(cipher, table, frequency, rng, restarts=10, n_vocab=27):
    """The classical solver: a key that maximises the text's four-gram probability, by the best swap of two readings until none helps.

    cipher (n,) ids; frequency (n_vocab,) of plain symbols, whose order gives the start, with noise after the first → key (n_vocab,): the
    plain symbol of each cipher symbol."""
    grams, counts = np.unique(np.stack([cipher[i : len(cipher) - 3 + i] for i in range(4)], 1), axis=0, return_counts=True)
    pairs = np.array(list(itertools.combinations(range(n_vocab), 2)))
    place, best = np.array([n_vocab**3, n_vocab**2, n_vocab, 1]), (-math.inf, None)
    seen = np.bincount(cipher, minlength=n_vocab)
    for restart in range(restarts):
        noise_ = rng.random(n_vocab) if restart == 0 else rng.exponential(0.5, n_vocab) * (seen.max() / 8)
        key = np.empty(n_vocab, np.int64)
        key[np.argsort(-(seen + noise_))] = np.argsort(-frequency)
        score = -math.inf
        while True:
            keys = np.repeat(key[None], len(pairs) + 1, 0)
            i = np.arange(len(pairs))
            keys[i, pairs[:, 0]], keys[i, pairs[:, 1]] = key[pairs[:, 1]], key[pairs[:, 0]]
            scores = table[keys[:, grams] @ place] @ counts
            if scores.max() <= score + 1e-6:
                break
            key, score = keys[scores.argmax()], float(scores.max())
        if score > best[0]:
            best = score, key
    return best[1]


# ============================================================================================== the experiments


def write_lex(args, figures, draw):
    """results.json and the figure of a task; their paths are the last thing printed."""
    if dist.is_initialized() and dist.get_rank():
        return
    out = Path(args.out or f"out/lexinvariant/{args.task}")
    path = save_results(out, args, figures)
    print(f"\n{path} {draw(out) if draw else 'no figure'}")


def print_curves(curves):
    """{name: {range of positions: loss}} as a table."""
    print_table(["nats a symbol, by position", *next(iter(curves.values()))],
                [[name, *(f"{x:.3f}" if math.isfinite(x) else "–" for x in row.values())] for name, row in curves.items()])


def regret(args, alphabets=(3, 4, 5, 6), length=200, n=20):
    """Cumulative loss of the exact p′ over that of p on random chains → {d: dict(bound: ln d!, most and end: at most, and on average
    after length symbols, mean: (length,))}."""
    rng, found = np.random.default_rng([args.seed, 1]), {}
    for d in alphabets:
        chain = random_chain(d, rng)
        known, best = bayes_losses(chain, chain_text(chain, n, length, rng))
        paid = (best - known).cumsum(1)
        found[d] = dict(bound=math.lgamma(d + 1), most=float(paid.max()), end=float(paid[:, -1].mean()), mean=paid.mean(0).tolist())
    return found


def theorem(args):
    """Section 2.3: a predictor that does not know the alphabet pays for it once."""
    set_up(args)
    found = regret(args)
    print_regret(found)
    write_lex(args, dict(regret=found), lambda out: figure(out, "theorem.png", args, lambda ax: draw_regret(ax, found), figsize=(6, 4)))


def print_regret(found):
    print("The price of not knowing the alphabet: cumulative loss of the exact lexinvariant p′ over that of p, 20 texts of 200 symbols "
          "from a random Markov chain")
    print_table(["symbols d", "most ever paid", "mean at the end", "the bound ln d!", "so L1 a symbol at most", "the paper's rate"],
                [[str(d), f"{row['most']:.4f}", f"{row['end']:.4f}", f"{row['bound']:.4f}", f"{math.sqrt(2 * row['bound'] / 200):.3f}",
                  f"(d/T)^¼ = {(d / 200) ** 0.25:.3f} × logs"] for d, row in found.items()])


def bayes_gap(args):
    """A trained model against the best predictor there is, position by position."""
    device, *_ = set_up(args)
    torch.set_num_threads(1)
    found = chain_run(args, device)
    print_gap(found)
    write_lex(args, found, lambda out: figure(out, "bayes_gap.png", args, lambda ax: draw_gap(ax, found), figsize=(6, 4)))


def chain_run(args, device, d=4, seq=64, batch=32):
    """Train on texts of one random chain whose symbols are renamed anew in each, and compare with bayes_losses on 2,000 new texts."""
    rng = np.random.default_rng([args.seed, 2])
    chain = random_chain(d, rng)
    torch.manual_seed(args.seed)
    mode = args.mode or "canonical"
    model = LexinvariantLM(d, mode, d_model=48, n_layer=3, n_head=2, d_ff=192, seed=args.seed).to(device)

    def batch_of(step, done):
        x = torch.from_numpy(chain_text(chain, batch, seq + 1, np.random.default_rng([args.seed, 3, step]))).to(device)
        return x, torch.arange(batch * step, batch * (step + 1), device=device)

    steps = args.steps or 2000
    fit_model(model, batch_of, steps, args.lr or 5e-3, args, name=f"{mode} on a chain")
    x = chain_text(chain, 2000, seq + 1, np.random.default_rng([args.seed, 4]))
    known, best = bayes_losses(chain, x)
    with torch.no_grad():
        loss = torch.cat([model(torch.from_numpy(x[i : i + 500]).to(device), EVALUATION + torch.arange(i, i + 500, device=device))[0].cpu()
                          for i in range(0, 2000, 500)])
    curves = dict(known=known[:, 1:].mean(0).tolist(), best=best[:, 1:].mean(0).tolist(), model=loss.mean(0).tolist())
    gap = (loss - torch.from_numpy(best[:, 1:])).mean(0)
    return dict(mode=mode, steps=steps, **curves, gap=gap.tolist(), largest_gap=float(gap[4:].max()))


def print_gap(found):
    print(f"\nA trained {found['mode']} model ({found['steps']} steps) and the exact Bayes-optimal lexinvariant predictor, a random chain "
          "of 4 symbols")
    rows = {"p, which knows the alphabet": found["known"], "p′, the best without": found["best"], "the model": found["model"]}
    print_curves({name: by_position(torch.tensor([row])) for name, row in rows.items()})
    print(f"largest gap to p′ at a position past 4: {found['largest_gap']:.3f} nats")


FEW = 6  # symbols permuted where the table says few


def english_run(args, device):
    """One model trained by the curriculum, read with no, few and all symbols permuted → (model, training ids, validation ids, figures)."""
    model, train, val = english_model(args, device)
    n_vocab, curves = model.config["n_vocab"], {}
    for name, k in (("none permuted", 0), (f"{FEW} permuted", FEW), ("all permuted", n_vocab)):
        loss, new, *_ = evaluate_lm(model, val, args.seq, 400, k, device, args.seed)
        curves[name] = by_position(loss)
        if k == n_vocab:
            curves["  targets seen before"], curves["  new targets"] = by_position(loss, ~new), by_position(loss, new)
    return model, train, val, dict(curves=curves, unigram=unigram_entropy(val, n_vocab))


def decipher_run(model, train, val, args, device, probe_steps=600):
    """The paper's probe for few and all symbols permuted, and the classical solver → figures."""
    n_vocab, found = model.config["n_vocab"], {}
    for name, k in ((f"{FEW} permuted", FEW), ("all permuted", n_vocab)):
        probe = train_probe(model, train, args.seq, k, probe_steps, args, device)
        _, _, hidden, x, symbols = evaluate_lm(model, val, args.seq, 400, k, device, args.seed)
        guess, plain, cipher = probe(hidden.to(device)).argmax(2).cpu(), x[:, :-1], symbols[:, :-1]
        width = min(100, args.seq // 4)
        starts = range(0, args.seq - width + 1, width)
        found[name] = dict(
            changed=by_position((guess == plain).float(), cipher != plain), every=by_position((guess == plain).float()),
            precision={f"{s}-{s + width}": [float(p.mean()), float(p.std())] for s in starts
                       for p in [key_precision(cipher, plain, guess, s, width)]})
        if k == n_vocab:
            found["probe"] = probe
    table, frequency = ngram_table(train), np.bincount(train, minlength=n_vocab)
    rng = np.random.default_rng([args.seed, 5])
    for length in (64, 128, 256, 512):
        right = []
        for _ in range(20):
            start, pi = rng.integers(len(val) - length), rng.permutation(n_vocab)
            plain = val[start : start + length]
            right.append(float((solve_cipher(pi[plain], table, frequency, rng)[pi[plain]] == plain).mean()))
        found.setdefault("solver", {})[str(length)] = float(np.mean(right))
    return found


def print_deciphering(found):
    print("\nReading the cipher: accuracy of the probe on permuted symbols, by position (chance 0.04, always the space 0.17)")
    names = [name for name in found if name.endswith("permuted")]
    print_table(["", *found[names[0]]["changed"]], [[name, *(f"{x:.2f}" for x in found[name]["changed"].values())] for name in names])
    print("key precision in a window, the paper's majority vote (99.6 % there, after 8 billion characters of training)")
    print_table(["", *found[names[0]]["precision"]],
                [[name, *(f"{m:.2f}" for m, _ in found[name]["precision"].values())] for name in names])
    print("classical solver (four-grams, best swaps, 10 starts): characters right in a text of "
          + ", ".join(f"{n}: {x:.2f}" for n, x in found["solver"].items()))


def demo(args):
    """The paper in four pictures: the theorem, a model at its limit, English without an alphabet, a cipher read on the way."""
    device, *_ = set_up(args)
    torch.set_num_threads(1)
    paid = regret(args)
    print_regret(paid)
    alone = device.type == "cpu" and not dist.is_initialized()
    shorter = dict(steps=args.steps and min(args.steps, 2000), lr=None, mode=None, quiet=alone or args.quiet)
    chain_args = argparse.Namespace(**{**vars(args), **shorter})
    with ProcessPoolExecutor(1, get_context("spawn")) if alone else nullcontext() as pool:  # a CPU has more than one core
        waiting = pool.submit(chain_job, chain_args) if alone else None
        model, train, val, english = english_run(args, device)
        cipher = decipher_run(model, train, val, args, device)
        gap = waiting.result() if alone else chain_run(chain_args, device)
    print_gap(gap)
    print(f"\nEnglish without an alphabet: one model, {args.data}, symbols permuted anew in every sequence")
    print_curves(english["curves"])
    print(f"a reader of single symbols, in or out of context, has {english['unigram']:.3f}; not knowing 27 symbols costs at most ln 27! = "
          "64.6 nats in all")
    print_deciphering(cipher)
    cipher.pop("probe")

    def draw(axes):
        draw_regret(axes[0, 0], paid)
        draw_gap(axes[0, 1], gap)
        draw_curves(axes[1, 0], english)
        draw_cipher(axes[1, 1], cipher)

    write_lex(args, dict(regret=paid, bayes_gap=gap, english=english, decipher=cipher),
              lambda out: figure(out, "demo.png", args, draw, nrows=2, ncols=2, figsize=(11, 8)))


def chain_job(args):
    """bayes_gap in a process of its own."""
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    return chain_run(args, torch.device("cpu"))


def curve(args):
    """Figure 3: perplexity against the length of the context."""
    device, *_ = set_up(args)
    torch.set_num_threads(1)
    mode = args.mode or "permute"
    model, _, val = english_model(args, device, mode)
    n_vocab, smooth, found = model.config["n_vocab"], min(100, args.seq // 4), {}
    for name, k in (("none permuted", 0), ("all permuted", n_vocab)) if mode == "permute" else ((mode, None),):
        loss, new, *_ = evaluate_lm(model, val, args.seq, 400, k, device, args.seed)
        running = F.avg_pool1d(loss[:, None], smooth, 1).squeeze(1).exp()  # (n, seq − smooth + 1): exp of the mean over a window
        found[name] = dict(curve=by_position(loss), seen=by_position(loss, ~new), new=by_position(loss, new),
                           perplexity=running.mean(0).tolist(), sd=running.std(0).tolist())
    print_curves({f"{name}{part}": row[key] for name, row in found.items()
                  for key, part in (("curve", ""), ("seen", ", seen before"), ("new", ", new"))})
    print_table([f"perplexity over {smooth} symbols after", "0", str(args.seq - smooth)],
                [[name, f"{row['perplexity'][0]:.2f}", f"{row['perplexity'][-1]:.2f}"] for name, row in found.items()])

    def draw(ax):
        for name, row in found.items():
            mean, sd = np.array(row["perplexity"]), np.array(row["sd"])
            ax.plot(mean, label=name)
            ax.fill_between(range(len(mean)), mean - sd, mean + sd, alpha=0.2)
        ax.set(xlabel="symbols of context", ylabel=f"perplexity of the next {smooth} symbols", title="Figure 3: mean ± sd over texts",
               yscale="log")
        ax.legend()

    write_lex(args, found, lambda out: figure(out, "curve.png", args, draw, figsize=(6, 4)))


def decipher(args):
    """Figures 4 and 5: a frozen model and a probe read a substitution cipher; beside them the classical solver."""
    device, *_ = set_up(args)
    torch.set_num_threads(1)
    if args.alphabet != "az27":
        fail("decipher reads the letters a to z: --alphabet az27")
    model, train, val, english = english_run(args, device)
    if model.config["mode"] != "permute":
        fail(f"decipher needs a model trained in permute mode, this one is {model.config['mode']}")
    print_curves(english["curves"])
    found = decipher_run(model, train, val, args, device, args.probe_steps)
    print_deciphering(found)
    probe = found.pop("probe")
    if args.text:
        ids = to_ids(args.text, "az27")
        if len(ids) < 20:
            fail(f"--text: {len(ids)} letters and spaces are too few to decipher")
        key = solve_cipher(ids, ngram_table(train), np.bincount(train, minlength=27), np.random.default_rng(args.seed), 30)
        print("\nthe cipher: " + "".join(LETTERS[i] for i in ids))
        print("the solver: " + "".join(LETTERS[i] for i in key[ids]))
        part = torch.from_numpy(ids[: args.seq + 1])[None].to(device)
        with torch.no_grad():
            hidden = model(part, torch.tensor([EVALUATION], device=device), torch.tensor([27], device=device))[1]
        votes = torch.zeros(27, 27)
        votes.index_add_(0, part[0, :-1].cpu(), probe(hidden)[0].log_softmax(1).cpu())
        print("the model:  " + "".join(LETTERS[i] for i in votes.argmax(1)[part[0, :-1].cpu()]))
    out = Path(args.out or f"out/lexinvariant/{args.task}")
    save_lm(out / "model.pt", model, dict(alphabet=args.alphabet, seq=args.seq))
    write_lex(args, dict(english=english, decipher=found),
              lambda out: figure(out, "decipher.png", args, lambda axes: (draw_curves(axes[0], english), draw_cipher(axes[1], found)),
                                 ncols=2, figsize=(11, 4)))


def posterior(args):
    """Figure 6: what the model takes one symbol for, each time it occurs."""
    device, *_ = set_up(args)
    torch.set_num_threads(1)
    text = args.text or ("the old man put the zoz on the table and looked at the zozzle of the zread he had zought for his zrother and "
                         "then he went to the zedroom to find the zook azout zirds that his zoy had left zehind")
    ids = to_ids(text, "az27")
    if args.symbol not in LETTERS[1:] or LETTERS.index(args.symbol) not in ids:
        fail(f"--symbol {args.symbol}: no letter of the text")
    model, train, _ = english_model(args, device)
    probe = train_probe(model, train, args.seq, model.config["n_vocab"], args.probe_steps, args, device)
    x = torch.from_numpy(ids[: args.seq + 1])[None].to(device)
    with torch.no_grad():
        log_p = probe(model(x, torch.tensor([EVALUATION], device=device), torch.tensor([model.config["n_vocab"]], device=device))[1])[0]
    rows = []
    for n, t in enumerate(np.flatnonzero(ids[: len(log_p)] == LETTERS.index(args.symbol))):
        p, best = log_p[t].softmax(0).topk(4)
        rows.append([f"occurrence {n + 1}", "…" + "".join(LETTERS[i] for i in ids[max(0, t - 12) : t + 1]),
                     *(f"{LETTERS[i] if i else 'space'} {q:.2f}" for i, q in zip(best.tolist(), p.tolist()))])
    print_table([f"the symbol {args.symbol}", "at", "1st", "2nd", "3rd", "4th"], rows)
    write_lex(args, dict(text=text, rows=rows), None)


def semi(args):
    """Section 3.6: each symbol permuted with probability p in training, a regulariser; what the models lose when all are."""
    device, *_ = set_up(args)
    torch.set_num_threads(1)
    args.curriculum, args.steps, found = False, args.steps or 700, {}
    for p in sorted({0.0, args.p, 1.0}):
        model, _, val = english_model(args, device, "permute", p)
        found[f"p = {p:g}"] = {name: float(evaluate_lm(model, val, args.seq, 200, k, device, args.seed)[0].mean())
                               for name, k in (("plain", 0), ("all permuted", model.config["n_vocab"]))}
    print_table(["trained with", "loss on plain text, nats", "with all symbols permuted"],
                [[name, *(f"{x:.3f}" for x in row.values())] for name, row in found.items()])
    write_lex(args, found, None)


def python_tokens(n_vocab):
    """The standard library's code as token ids → (ids, is_name (n_vocab,) bool: identifiers that are no keywords). The last id is for
    all rare tokens; layout and comments are left out."""
    texts, skip = [], {tokenize.COMMENT, tokenize.NL, tokenize.ENCODING, tokenize.ENDMARKER}
    for source in stdlib_text("code")[:120]:
        try:
            for token in tokenize.generate_tokens(io.StringIO(source).readline):
                if token.type not in skip:
                    word = token.string if token.type in (tokenize.NAME, tokenize.OP) else tokenize.tok_name[token.type]
                    texts.append((word, token.type == tokenize.NAME and not keyword.iskeyword(word)))
        except (tokenize.TokenError, SyntaxError):
            continue
    common = [word for word, _ in Counter(texts).most_common(n_vocab - 1)]
    code = {word: i for i, word in enumerate(common)}
    return np.array([code.get(word, n_vocab - 1) for word in texts]), np.array([is_name for _, is_name in common] + [False])


def rename(args):
    """Rename the identifiers of Python code: a standard model minds, a lexinvariant one cannot tell."""
    device, *_ = set_up(args)
    torch.set_num_threads(1)
    n_vocab, seq, batch = 512, 96, 16
    ids, is_name = python_tokens(n_vocab)
    train, val = ids[: len(ids) * 19 // 20], ids[len(ids) * 19 // 20 :]
    x = windows(val, 200, seq, args.seed, 6)
    rng, names = np.random.default_rng([args.seed, 7]), np.flatnonzero(is_name)
    renamed = x.clone()
    for i in range(len(x)):
        to = np.arange(n_vocab)
        to[names] = rng.permutation(names)
        renamed[i] = torch.from_numpy(to[x[i].numpy()])
    found = {}
    for name, mode, p in (("standard", "standard", 1.0), (f"semi-lexinvariant, p = {args.p:g}", "permute", args.p),
                          ("lexinvariant, canonical", "canonical", 1.0)):
        torch.manual_seed(args.seed)
        model = LexinvariantLM(n_vocab, mode, p=p, seed=args.seed, **({"max_symbols": seq} if mode == "canonical" else {})).to(device)

        def batch_of(step, done):
            return windows(train, batch, seq, args.seed, 8, step).to(device), torch.arange(batch * step, batch * (step + 1), device=device)

        fit_model(model, batch_of, args.steps or 400, args.lr or 4e-3, args, name=name)
        samples = EVALUATION + torch.arange(len(x), device=device)
        with torch.no_grad():
            plain, other = (float(model(part.to(device), samples, torch.zeros_like(samples))[0].mean()) for part in (x, renamed))
        found[name] = dict(plain=plain, renamed=other, change=other - plain)
    print_table([f"{len(names)} identifiers renamed, {seq} tokens", "loss, nats a token", "renamed", "change"],
                [[name, *(f"{x:.4f}" for x in row.values())] for name, row in found.items()])
    write_lex(args, found, None)


def lookup_batch(n, symbols, rng, pairs=8, queries=8):
    """Section 3.4's LookUp, `A>2⏎C>4⏎G>5⏎C>` then `4`; for training more queries follow. → (n, length) ids, the predictions to train on
    (all answers) and to score (the first). 0 is >, 1 the line's end."""
    keys = np.stack([rng.permutation(symbols)[:pairs] for _ in range(n)])
    values, asked = rng.choice(symbols, (n, pairs)), rng.integers(pairs, size=(n, queries))
    left, right = (np.concatenate([x, np.take_along_axis(x, asked, 1)], 1) for x in (keys, values))
    lines = np.stack([left, np.zeros_like(left), right, np.ones_like(left)], 2)  # (n, lines, 4)
    return lines.reshape(n, -1), list(range(4 * pairs + 1, 4 * (pairs + queries), 4)), [4 * pairs + 1]


def permutation_batch(n, symbols, rng, length=3, keep=2, demos=4):
    """Section 3.4's Permutation, `A 2 C>C A⏎4 1 D>` then `D 4`: the same rearrangement of part of the symbols in every line. Returns as
    above; trained on every line but the first."""
    order = np.stack([rng.permutation(length)[:keep] for _ in range(n)])  # (n, keep)
    lines = []
    for _ in range(demos + 1):
        words = np.stack([rng.permutation(symbols)[:length] for _ in range(n)])
        lines += [words, np.zeros((n, 1), int), np.take_along_axis(words, order, 1), np.ones((n, 1), int)]
    x, line = np.concatenate(lines[:-1], 1), length + keep + 2
    answers = [line * i + length + j for i in range(demos + 1) for j in range(keep)]
    return x, answers[keep:], answers[-keep:]


def tasks(args):
    """Table 1: LookUp and Permutation, with symbols that training never showed."""
    device, *_ = set_up(args)
    torch.set_num_threads(1)
    n_vocab, batch, found = 64, 32, {}
    old, new = np.arange(2, 33), np.arange(33, 64)
    modes = [args.mode] if args.mode else list(MODES)
    for task, make, steps in (("LookUp", lookup_batch, 2500), ("Permutation", permutation_batch, 1000)):
        for mode in modes:
            torch.manual_seed(args.seed)
            model = LexinvariantLM(n_vocab, mode, n_layer=2, d_model=args.d_model, d_ff=2 * args.d_model, seed=args.seed).to(device)

            def batch_of(step, done, make=make):
                x, *_ = make(batch, old, np.random.default_rng([args.seed, 9, step]))
                return torch.from_numpy(x).to(device), torch.arange(batch * step, batch * (step + 1), device=device)

            _, answers, scored = make(1, old, np.random.default_rng(0))
            fit_model(model, batch_of, args.steps or steps, args.lr or 4e-3, args, name=f"{task}, {mode}", columns=answers)
            row = found.setdefault(f"{task}, {mode}", {})
            for kind, symbols in (("seen in training", old), ("never seen", new)):
                x, *_ = make(1000, symbols, np.random.default_rng([args.seed, 10]))
                x, right = torch.from_numpy(x).to(device), []
                for i in range(0, 1000, 250):
                    samples = EVALUATION + torch.arange(i, i + 250, device=device)
                    with torch.no_grad():
                        _, hidden, relabelled = model(x[i : i + 250], samples)
                        guess = model.embedding.log_probs(hidden, relabelled, samples).argmax(2)
                    right.append((guess == relabelled[:, 1:])[:, scored].float())
                row[kind] = float(torch.cat(right).mean())
    print_table(["accuracy of the answer's symbols", "symbols seen in training", "symbols never seen"],
                [[name, *(f"{x:.3f}" for x in row.values())] for name, row in found.items()])
    print("The paper's table 1 (text models, 1,000 examples, characters, the Pile): LookUp 48.5 % standard, 91.8 % lexinvariant; "
          "Permutation 27.7, 59.4. Chance here 1 in 31")
    write_lex(args, found, None)


def train(args):
    """Train one model and keep it: --preset, --mode; torchrun shares the batch out."""
    device, dtype, rank, world = set_up(args)
    if device.type == "cpu":
        torch.set_num_threads(max(1, torch.get_num_threads() // world))
        if args.preset != "cpu":
            print(f"warning: --preset {args.preset} is made for a GPU; on a CPU this takes days", file=sys.stderr)
    mode = args.mode or ("gaussian" if args.preset == "paper" else "permute")
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        model, _, val = english_model(args, device, mode)
        loss = {name: float(evaluate_lm(model, val, args.seq, 100, k, device, args.seed)[0].mean())
                for name, k in (("none permuted", 0), ("all permuted", model.config["n_vocab"]))} if mode == "permute" else {
                    mode: float(evaluate_lm(model, val, args.seq, 100, None, device, args.seed)[0].mean())}
    if rank == 0:
        print_table([f"{args.preset}, {mode}: validation", "nats a symbol"], [[name, f"{x:.3f}"] for name, x in loss.items()])
        out = Path(args.out or f"out/lexinvariant/{args.task}")
        save_lm(out / "model.pt", model, dict(alphabet=args.alphabet, seq=args.seq))
        path = save_results(out, args, dict(mode=mode, loss=loss))
        print(f"\n{path} {out / 'model.pt'}")
    if world > 1:
        dist.barrier()  # a rank that leaves while another goes on can abort at its exit
        dist.destroy_process_group()


def bench(args):
    """The heads: time of a forward and backward pass, and the bytes of table and logits."""
    device, *_ = set_up(args)
    batch, seq, d, rows, found = (8, 512, 512, [], {}) if device.type == "cuda" else (2, 256, 64, [], {})
    for n_vocab in (128, 32_128):
        x = torch.from_numpy(np.random.default_rng(0).integers(n_vocab, size=(batch, seq + 1))).to(device)
        samples = torch.arange(batch, device=device)
        for mode, head in (("standard", "dense"), ("permute", "dense"), ("gaussian", "dense"), ("gaussian", "compact"),
                           ("canonical", "compact")):
            torch.manual_seed(0)
            embedding = LexinvariantEmbedding(n_vocab, d, mode, head, max_symbols=seq).to(device)
            best = math.inf
            for _ in range(3):
                start = time.perf_counter()
                symbols = embedding.relabel(x, samples)
                embedding.loss(embedding.embed(symbols[:, :-1], samples), symbols, samples).mean().backward()
                if device.type == "cuda":
                    torch.cuda.synchronize()
                best = min(best, time.perf_counter() - start)
            table = 4 * d * n_vocab * (batch if mode == "gaussian" else 1) if head == "dense" else 4 * d * seq * (mode == "canonical")
            logits = 4 * batch * seq * (n_vocab if head == "dense" else seq)
            found[f"{mode}, {head}, {n_vocab}"] = dict(ms=best * 1e3, table_bytes=table, logits_bytes=logits)
            rows.append([f"{mode}, {head}, {n_vocab:,} symbols", f"{best * 1e3:.1f}", f"{table / 1e6:.1f}", f"{logits / 1e6:.1f}"])
    print_table([f"two ends of a model, {batch} × {seq}, d = {d}, {device}", "ms", "MB of table", "MB of logits"], rows)
    write_lex(args, found, None)


# ============================================================================================== figures


def draw_regret(ax, found):
    for (d, row), color in zip(found.items(), ("C0", "C1", "C2", "C3")):
        ax.plot(row["mean"], color=color, label=f"d = {d}")
        ax.axhline(row["bound"], color=color, ls=":", lw=1)
    ax.set(xlabel="symbols read", ylabel="nats lost to p, in all", title="The price of not knowing the alphabet: at most ln d! (dotted)")
    ax.legend()


def draw_gap(ax, found):
    for name, style, label in (("known", "C7:", "knows the alphabet"), ("best", "k-", "best without (exact)"),
                               ("model", "C0--", f"{found['mode']} model")):
        ax.plot(found[name], style, label=label)
    ax.set(xlabel="position", ylabel="nats a symbol", title="A trained model against the exact optimum, 4 symbols")
    ax.legend()


def draw_curves(ax, english):
    for name, row in english["curves"].items():
        if not name.startswith(" "):
            spans = [span.split("-") for span in row]
            ax.plot([(int(a) + int(b)) / 2 for a, b in spans], list(row.values()), "o-", label=name)
    ax.axhline(english["unigram"], color="C7", ls=":", label="best reader of single symbols")
    ax.set(xlabel="symbols of context", ylabel="nats a symbol", title="English, one model, symbols permuted anew in each text")
    ax.legend()


def draw_cipher(ax, found):
    for name in (name for name in found if name.endswith("permuted")):
        row = found[name]["changed"]
        spans = [span.split("-") for span in row]
        ax.plot([(int(a) + int(b)) / 2 for a, b in spans], list(row.values()), "o-", label=f"model and probe, {name}")
    ax.plot([int(n) for n in found["solver"]], list(found["solver"].values()), "k^--", label="classical solver, all permuted")
    ax.axhline(1 / 27, color="C7", ls=":", label="chance")
    ax.set(xlabel="symbols read", ylabel="permuted symbols read right", title="Reading the cipher", ylim=(0, 1.02))
    ax.legend()


# ============================================================================================== command line

TASKS = dict(demo=demo, curve=curve, decipher=decipher, tasks=tasks, theorem=theorem, bayes_gap=bayes_gap, posterior=posterior, semi=semi,
             rename=rename, train=train, bench=bench)


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.error = fail  # one line, exit code 2
    flag, count = parser.add_argument, number(int, 1)
    flag("task", nargs="?", choices=TASKS, default="demo", help="demo (default): all of it in minutes; curve: figure 3; decipher: figures "
         "4 and 5; tasks: table 1; theorem: section 2.3; bayes_gap: a model against the exact optimum; posterior: figure 6; semi: section "
         "3.6; rename: identifiers in Python code; train: one model; bench: cost of the heads")
    flag("--mode", choices=MODES, help="curve, train, tasks, bayes_gap: the construction (permute; bayes_gap: canonical; tasks: all; "
         "--preset paper: gaussian)")
    flag("--preset", choices=PRESETS, default="cpu", help="size, length, batch, steps, rate: cpu (154,000 weights), gpu (19M, meant for 20 "
         "minutes on one GPU), paper (151M, 250,000 steps)")
    flag("--data", default="prose", help="prose (default), code, stdlib; text8, enwik8, pile (downloads); a text file")
    flag("--alphabet", choices=("az27", "ascii"), default="az27", help="a to z and the space; or ASCII, 128 (the paper's)")
    flag("--model", help="a model.pt of train or decipher, instead of training one")
    flag("--steps", type=count, help="updates (the preset's 2,000, 12,000 or 250,000; bayes_gap 2,000; tasks 2,500 and 1,000; semi 700; "
         "rename 400)")
    flag("--minutes", type=number(float, 0), default=0, help="train for so long instead")
    flag("--batch_size", type=count, help="sequences an update (the preset's 8 or 64)")
    flag("--seq", type=number(int, 16), help="symbols of context (the preset's 192 or 512)")
    flag("--lr", type=number(float, 0), help="peak learning rate (the preset's)")
    flag("--d_model", type=number(int, 16), default=64, help="tasks: width (64)")
    flag("--p", type=number(float, 0, 1), default=0.2, help="semi, rename: probability that a symbol is permuted (0.2, the paper's)")
    flag("--curriculum", action=argparse.BooleanOptionalAction, default=True, help="permute mode: permute few symbols first")
    flag("--probe_steps", type=count, default=600, help="decipher, posterior: updates of the probe (600; the paper's 10,000)")
    flag("--text", help="decipher: your cipher, letters and spaces; posterior: a text")
    flag("--symbol", default="z", help="posterior: the letter to follow (z)")
    flag("--device", default="auto", help="auto is cuda, else mps, else cpu")
    flag("--dtype", choices=("auto", "float32", "bfloat16"), default="auto", help="train: of matmuls; auto: bfloat16 on cuda")
    flag("--seed", type=number(int, 0, 2**31 - 1), default=0, help="of weights, data order, permutations and rows")
    flag("--out", help="folder for results, figure and model (out/lexinvariant/<task>)")
    flag("--no_plot", action="store_true", help="write no figure")
    flag("--quiet", action="store_true", help="no progress bars")
    args = parser.parse_args(argv)
    if args.preset == "paper" and args.alphabet == "az27" and args.task == "train":
        args.alphabet = "ascii"
    return args


def main():
    args = parse_args()
    if int(os.environ.get("RANK", 0)):
        sys.stdout = open(os.devnull, "w")  # rank 0 speaks for all
    try:
        TASKS[args.task](args)
    except KeyboardInterrupt:
        fail("stopped")


if __name__ == "__main__":
    main()
