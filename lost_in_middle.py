"""Lost in the middle: how language models use long contexts (Liu, Lin, Hewitt, Paranjape, Bevilacqua, Petroni, Liang; arXiv 2307.03172).

The problem. A model that accepts a long context need not use all of it. A benchmark with one number cannot tell: it mixes what the
model knows, what it reads, and where the answer happens to stand.

The idea. Fix a question and k items, exactly one of which (the gold) answers it, and move only that one:

    context(g) = others[:g] + [gold] + others[g:]         g = 0 … k − 1; the others, and their order, stay
    accuracy(g) = mean over questions of right(answer(context(g)))
    spread = best − worst    primacy = first − lowest of the middle    recency = last − lowest of the middle

Two tasks: documents and a question about one (multi-document QA), and JSON pairs of random UUIDs of which one is asked for (key-value
retrieval; no knowledge helps). The prompts here are the authors' to the byte, and so are the metrics `subspan` and `kv`.

What is easily misread, and what this file does about it. The best of many noisy positions always beats the worst: `flat_p` is the
p-value of the spread. Positions are compared on the same questions only: whatever one of them could not be asked (a prompt beyond the
window, a failed call) leaves all of them, and is named. A model that always copies the first item has accuracy 1 at g = 0:

    beyond habit(g) = P(answers item g | gold at g) − P(answers item g | gold elsewhere)

and the matrix of where the gold stood against which item was answered is printed beside the curve. A substring is a generous metric:
stricter ones stand beside it.

How to run it.

    python lost_in_middle.py                                      why a curve bends: readers trained here (73 seconds)
    python lost_in_middle.py lab --pos alibi --pairs 8            a reader of your own; --full: all seeds of the dear panels
    python lost_in_middle.py run --model http:NAME --base_url http://127.0.0.1:8000/v1 --keys 75      your model, pairs; --dry_run first
    python lost_in_middle.py run --model gpt2 --setting qa --controls       documents, with closed-book and oracle
    python lost_in_middle.py run --setting qa --data paper --docs 20 --model http:NAME --compare_paper gpt-3.5-turbo
    python lost_in_middle.py score | plot | report | show RUN …   again, without asking; --metric em; --wrong --position 3
    python lost_in_middle.py needle | odqa | make_kv | make_qa    depth × length; more documents (section 5); data in the authors' format

The laboratory. Readers of 1 to 3 layers and width 64 learn k1 v1 … kN vN, key → value. One pass asks for every pair of a context: each
query sees the context and itself, which equals N single passes. `smear` adds a key's embedding to its value's, which spares them the
long plateau before they find out. What bends the curve, and what does not (accuracy in %, mean of seeds 0 to 2, of seed 0 where marked
¹; 73 s on 2 cores of an AMD EPYC, torch 2.13.0):

    python lost_in_middle.py                                               first   lowest middle    last
    uniform data, ALiBi, 2 layers, no smear   step 150                        84              58      77    a U that nobody put in
                                              step 300¹, 550¹             99, 100          91, 96  95, 98   it passes
    data that favour both ends, 1 layer       step 100                       100               9     100    U
    data that favour the last pairs           step 100                         8               9     100    recency
    the same two                              step 150                   100, 99          97, 99     100    flat: it passes
    uniform data                              step 100                       100             100     100    flat
    a window of 8 pairs                       step 150                         3               3     100    recency, for good
    RoPE, trained on 16 pairs, asked on 48    step 300                        55              64     100    recency
    no positions, the same                    step 150                       100             100     100    flat
    3 layers that see 4 pairs, query last     step 500¹                       34              20     100    recency
    the same, query first and last            step 500¹                       99              97     100    flat: section 4.2's cure

These are mechanisms in miniature, no replication of the curves of large models. Why uniform data give a passing U under ALiBi we have
not isolated.

A real model. Gemma 3 of 270M weights (4 bits, base) behind llama-cpp-python's server, 8 short pairs, 40 examples at each position:

    run --model http --base_url http://127.0.0.1:8011/v1 --keys 8 --key_style short --limit 40 --max_tokens 8
    gold at 0, 2, 4, 5, 7     100, 20, 50, 35, 45     beyond habit 85, 19, 42, 29, 38; with the gold at 2, 40 % are answers of item 0

What the paper reports (appendix G, in `PAPER`; 2023's models, 2,655 questions of NaturalQuestions): GPT-3.5-Turbo on 20 documents 75.8,
57.2, 53.8, 55.4, 63.2 at 0, 4, 9, 14, 19, below its 56.1 without any document; query-aware prompts make key-value retrieval near
perfect and change QA little; from 20 to 50 documents readers gain 1 to 1.5 points while recall keeps growing.

Where this file differs from the authors' scripts: a shuffled order is seeded example by example, not by one global stream, so that
--limit and resuming change nothing; k − 1 distractors suffice (they ask for k); leading blank lines of an answer go before the cut at
its first line (--no_lstrip keeps them); UUIDs are seeded, values distinct too. Ours, not the paper's: the laboratory, the answered-item
matrix, `flat_p`, ranking the candidates (--scoring rank), short keys, the invented facts of --data builtin, needle.
"""

import argparse
import email.utils
import gzip
import hashlib
import http.client
import json
import math
import os
import platform
import queue
import random
import re
import signal
import string
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
import uuid
import zlib
from collections import Counter
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import islice
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from einops import rearrange
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

# ============================================================================================== the method

UUID, WORD = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}", re.I), re.compile(r"[\w-]+")
QA_INSTRUCTION = ("Write a high-quality answer for the given question using only the provided search results (some of which might be "
                  "irrelevant).")
KV_INSTRUCTION = "Extract the value corresponding to the specified key in the JSON object below."
PAPER_POSITIONS = {  # indices from 0 by the number of documents or pairs
    10: (0, 4, 9), 20: (0, 4, 9, 14, 19), 30: (0, 4, 9, 14, 19, 24, 29),
    75: (0, 24, 49, 74), 140: (0, 34, 69, 104, 139), 300: (0, 49, 99, 149, 199, 249, 299),
}
PAPER = {  # accuracy in % at PAPER_POSITIONS: tables of appendix G; * = from the authors' repository
    ("qa", 10): {"claude-1.3": (62.9, 58.3, 59.7), "claude-1.3-100k": (63.1, 58.3, 59.7), "gpt-3.5-turbo": (76.8, 61.2, 62.4),
                 "gpt-3.5-turbo-16k": (76.9, 61.0, 62.5), "mpt-30b-instruct": (60.2, 56.2, 59.7), "longchat-13b-16k": (72.1, 58.9, 58.5)},
    ("qa", 20): {"claude-1.3": (59.9, 55.9, 56.8, 57.2, 60.1), "claude-1.3-100k": (59.8, 55.9, 57.0, 57.4, 60.0),
                 "gpt-3.5-turbo": (75.8, 57.2, 53.8, 55.4, 63.2), "gpt-3.5-turbo-16k": (75.7, 57.3, 54.1, 55.4, 63.1),
                 "mpt-30b-instruct": (53.7, 51.8, 52.2, 52.7, 56.3), "longchat-13b-16k": (68.6, 57.4, 55.3, 52.5, 55.0),
                 "llama-2-70b-chat": (56.8, 53.3, 54.1, 59.7, 69.5)},  # *
    ("qa", 30): {"claude-1.3": (59.1, 55.1, 54.8, 55.7, 56.4, 56.2, 59.9), "claude-1.3-100k": (59.1, 55.1, 54.9, 55.7, 56.6, 56.1, 60.0),
                 "gpt-3.5-turbo-16k": (73.4, 55.1, 50.5, 50.9, 51.8, 54.9, 63.7),
                 "mpt-30b-instruct": (51.6, 51.3, 51.2, 49.0, 49.6, 51.3, 54.1),
                 "longchat-13b-16k": (66.9, 54.8, 52.5, 52.9, 52.2, 51.3, 55.1)},
    ("kv", 140): {"mpt-30b-instruct": (100.0, 93.6, 88.6, 80.4, 96.2), "longchat-13b-16k": (37.0, 38.2, 35.4, 65.6, 88.6)},  # *
}
PAPER_CONTROLS = {  # closed-book, oracle, in % (table 1)
    "longchat-13b-16k": (35.0, 83.4), "mpt-30b-instruct": (31.5, 81.9), "gpt-3.5-turbo": (56.1, 88.3), "gpt-3.5-turbo-16k": (56.0, 88.6),
    "claude-1.3": (48.3, 76.1), "claude-1.3-100k": (48.2, 76.4),
}


# ---------------------------------------------------------------------------------------------- prompts


def place(others, gold, index):
    """The one controlled change of the paper: the gold item stands at index (from 0), the others keep their order."""
    if not 0 <= index <= len(others):
        raise ValueError(f"index {index} is not within 0 to {len(others)}")
    return [*others[:index], gold, *others[index:]]


def qa_prompt(question, docs, query_aware=False, mention_random_order=False):
    """Multi-document QA, to the byte the authors' template. docs: dicts with title and text; [] gives the closed-book prompt."""
    end = f"Question: {question}\nAnswer:"
    if not docs:
        return end
    if query_aware and mention_random_order:
        raise ValueError("there is no prompt that is query-aware and mentions the random order")
    lines = "\n".join(f"Document [{i}](Title: {doc['title']}) {doc['text']}" for i, doc in enumerate(docs, 1))
    start = QA_INSTRUCTION + (" The search results are ordered randomly." if mention_random_order else "")
    return "\n\n".join([start, *([f"Question: {question}"] if query_aware else []), lines, end])


def kv_prompt(key, records, query_aware=False):
    """Key-value retrieval, to the byte the authors' template. records: (key, value) pairs, printed as one JSON object."""
    data = "{" + ",\n ".join(f'"{k}": "{v}"' for k, v in records) + "}"
    front = [f'Key: "{key}"'] if query_aware else []
    return "\n\n".join([KV_INSTRUCTION, *front, f"JSON data:\n{data}", f'Key: "{key}"\nCorresponding value:'])


# ---------------------------------------------------------------------------------------------- metrics


def normalise(text):
    """Lower case, without ASCII punctuation, without the words a, an and the, single spaces. Unicode dashes and quotes stay."""
    text = re.sub(r"\b(a|an|the)\b", " ", text.lower().translate(str.maketrans("", "", string.punctuation)))
    return " ".join(text.split())


def score_answer(metric, text, answers, lstrip=True):
    """One model answer against the gold answers → 0.0 to 1.0.

    subspan (the paper's for QA): a normalised gold answer is a substring of the first line; an answer that normalises to nothing is
    in every line. word_subspan: the same at word boundaries ("2" is not in "2018"). em: equal. f1: of the words, the best.
    kv (the paper's for pairs): the value is a substring of all the text. kv_first: the first UUID, or for other values the first run
    of letters, digits and hyphens, is the value. lstrip: leading blank space goes before the first line is cut (the authors' Llama-2
    script does so, their MPT and LongChat scripts do not).
    """
    if metric == "kv":
        return float(any(value.lower() in text.lower() for value in answers))
    if metric == "kv_first":
        firsts = [((UUID if UUID.fullmatch(value) else WORD).search(text), value) for value in answers]
        return float(any(first and first[0].lower() == value.lower() for first, value in firsts))
    line = normalise((text.lstrip() if lstrip else text).split("\n")[0])
    golds = [normalise(answer) for answer in answers]
    if metric == "subspan":
        return float(any(gold in line for gold in golds))
    if metric == "word_subspan":
        return float(any(f" {gold} " in f" {line} " for gold in golds))
    if metric == "em":
        return float(line in golds)
    overlaps = [(sum((Counter(line.split()) & Counter(gold.split())).values()), len(line.split()) + len(gold.split())) for gold in golds]
    return max(2 * common / total if total else 1.0 for common, total in overlaps)  # f1


METRICS = ("subspan", "word_subspan", "em", "f1", "kv", "kv_first")


def answered_index(text, values):
    """Which item was answered: the index of the value that occurs first in the text, −1 for none. values: one for each item in order."""
    places = [(text.lower().find(value.lower()), -len(value), i) for i, value in enumerate(values)]
    return min((p for p in places if p[0] >= 0), default=(0, 0, -1))[2]


def answer_matrix(gold, answered, positions, total):
    """Counts (positions, total + 1): row = where the gold stood, column = which item was answered, the last column = none."""
    matrix = np.zeros((len(positions), total + 1), int)
    for g, a in zip(gold, answered):
        matrix[list(positions).index(g), a] += 1  # subtle: −1, none, is the last column
    return matrix


def corrected(matrix, positions):
    """Retrieval beyond habit, for each gold position g: P(answers item g | gold at g) − P(answers item g | gold elsewhere). A model that
    always copies the first value has accuracy 1 at index 0 and scores 0 here. None with a single position."""
    shares = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
    hits = [shares[i, g] for i, g in enumerate(positions)]
    false = [np.delete(shares[:, g], i).mean() if len(positions) > 1 else None for i, g in enumerate(positions)]
    return [None if f is None else float(h - f) for h, f in zip(hits, false)]


# ---------------------------------------------------------------------------------------------- statistics


def paired_bootstrap(correct, statistic, seed=0, draws=2000):
    """95 % interval of statistic(mean accuracy by position), questions drawn anew with replacement, each with all its positions.

    correct: (questions, positions) in 0 to 1; statistic: (…, positions) → (…). → (value, low, high)
    """
    n, rng = len(correct), np.random.default_rng((seed, 1))
    weights = rng.multinomial(n, np.full(n, 1 / n), draws) / n  # (draws, questions)
    return float(statistic(correct.mean(0))), *map(float, np.percentile(statistic(weights @ correct), (2.5, 97.5)))


def mcnemar(a, b):
    """Exact two-sided McNemar test: p-value that paired 0/1 outcomes a and b (n,) differ only by chance; binomial in the discordant."""
    first, second = int(((a == 1) & (b == 0)).sum()), int(((a == 0) & (b == 1)).sum())
    n = first + second
    tail = sum(math.comb(n, k) for k in range(min(first, second) + 1))
    return min(1.0, 2 * tail / 2**n)


def flat_p(correct, seed=0, draws=2000):
    """p-value of the spread (best − worst position) if position did not matter: each question's outcomes are shuffled among the
    positions. The best of many noisy positions always beats the worst; this says by how much."""
    rng, mean = np.random.default_rng((seed, 2)), correct.mean(0)
    spread, reached = np.ptp(mean), 0
    for _ in range(draws):
        reached += np.ptp(rng.permuted(correct, axis=1).mean(0)) >= spread - 1e-12
    return (1 + reached) / (1 + draws)


def curve_shape(correct, seed=0, draws=2000):
    """Names a curve by a rule. correct: (questions, positions). flat: the spread is at most 5 points. undecided: it is more, but flat_p
    is above 0.05. Else U, primacy or recency: both ends, only the first, only the last lie above the mean of the middle (paired
    bootstrap, 95 %); else uneven. Fewer than three positions have no middle: primacy or recency by the sign."""
    mean = correct.mean(0)
    if np.ptp(mean) <= 0.05:
        return "flat"
    if flat_p(correct, seed, draws) > 0.05:
        return "undecided"
    if len(mean) < 3:
        return "primacy" if mean[0] > mean[-1] else "recency"
    first, last = (paired_bootstrap(correct, lambda m, i=i: m[..., i] - m[..., 1:-1].mean(-1), seed, draws)[1] > 0 for i in (0, -1))
    return {(True, True): "U", (True, False): "primacy", (False, True): "recency"}.get((first, last), "uneven")


def summarise(correct, positions, seed=0):
    """Best, worst, spread = best − worst, primacy = first − lowest of the middle, recency = last − lowest of the middle, each with its
    paired bootstrap interval, p of the spread, McNemar's p of best against worst, and the shape. correct: (questions, positions)."""
    mean = correct.mean(0)
    best, worst = int(mean.argmax()), int(mean.argmin())
    found = dict(best=float(mean[best]), best_position=positions[best], worst=float(mean[worst]), worst_position=positions[worst])
    found["spread"] = paired_bootstrap(correct, lambda m: np.ptp(m, axis=-1), seed)
    if len(positions) > 2:
        for name, end in (("primacy", 0), ("recency", -1)):
            found[name] = paired_bootstrap(correct, lambda m, end=end: m[..., end] - m[..., 1:-1].min(-1), seed)
    found["flat_p"] = flat_p(correct, seed)
    if set(np.unique(correct)) <= {0, 1}:
        found["mcnemar_p"] = mcnemar(correct[:, best], correct[:, worst])
    return dict(found, shape=curve_shape(correct, seed))


N_KEYS, N_VALUES = 64, 32  # symbols of the laboratory; chance is 1/32, guessing among the values present about 1/N


class ReaderBlock(nn.Module):
    """Pre-norm attention and MLP. bias: (heads or 1, seq, seq) added to the logits; rotate: RoPE as a function of (…, seq, head_dim)."""

    def __init__(self, d_model, n_head):
        super().__init__()
        self.n_head = n_head
        self.norm1, self.norm2 = nn.LayerNorm(d_model), nn.LayerNorm(d_model)
        self.qkv, self.proj = nn.Linear(d_model, 3 * d_model), nn.Linear(d_model, d_model)
        self.up, self.down = nn.Linear(d_model, 2 * d_model), nn.Linear(2 * d_model, d_model)

    def forward(self, x, bias, rotate):
        q, k, v = rearrange(self.qkv(self.norm1(x)), "b t (three h c) -> three b h t c", three=3, h=self.n_head)
        attended = F.scaled_dot_product_attention(rotate(q), rotate(k), v, attn_mask=bias)
        x = x + self.proj(rearrange(attended, "b h t c -> b t (h c)"))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class PairReader(nn.Module):
    """A transformer that reads k1 v1 … kN vN, then is asked for the values of M keys.

    pos: learned, rope, alibi, none. alibi: head i of h has slope 2^(−alibi·i/h); smaller is steeper. window: attend to the last so
    many tokens, oneself included. smear: each token also carries its predecessor's embedding, so that a value knows its key.
    query_aware: the query stands in front as well. mask: causal or bidirectional. sink: all see the first token, window or not.
    """

    def __init__(self, max_pairs, layers=2, d_model=64, n_head=4, pos="learned", alibi=8, window=None, smear=False, query_aware=False,
                 mask="causal", sink=False):
        super().__init__()
        self.pos, self.alibi, self.window, self.smear, self.query_aware = pos, alibi, window, smear, query_aware
        self.mask, self.sink, self.n_head, self.single = mask, sink, n_head, query_aware or mask == "bidirectional"
        self.embed = nn.Embedding(N_KEYS + N_VALUES, d_model)
        self.is_query = nn.Parameter(torch.zeros(d_model))
        self.place = nn.Embedding(2 * max_pairs + 2, d_model) if pos == "learned" else None  # rows past the trained length stay random
        self.blocks = nn.ModuleList(ReaderBlock(d_model, n_head) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(d_model), nn.Linear(d_model, N_VALUES)
        for p in self.parameters():
            if p.ndim > 1:
                nn.init.normal_(p, std=0.05)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)

    def attention_bias(self, position, n_query):
        """(heads or 1, seq, seq): 0 or ALiBi's penalty where a token may look, −inf elsewhere. position: (seq,)"""
        distance = position[:, None] - position
        see = torch.ones_like(distance, dtype=torch.bool)
        if self.mask == "causal":
            see = distance >= 0
            see[:, -n_query:] = False  # no query is seen by another …
            see.fill_diagonal_(True)  # … but by itself
        if self.window:
            near = distance.abs() < self.window
            near[:, 0] |= self.sink
            see = see & near
        bias = torch.zeros(1, *see.shape)
        if self.pos == "alibi":
            slopes = 2.0 ** (-self.alibi * torch.arange(1, self.n_head + 1) / self.n_head)
            bias = -slopes[:, None, None] * distance.abs()
        return bias.masked_fill(~see, -math.inf)

    def forward(self, keys, values, queries):
        """keys, values: (batch, N) symbols; queries: (batch, M) keys → logits of their values (batch, M, 32).

        One pass answers M queries on one context. Each sees the context and itself, and all have the position that follows the context:
        the same as M passes, unless earlier tokens may see the query (query_aware, bidirectional): then M must be 1.
        """
        n_query = queries.shape[1]
        if self.single and n_query > 1:
            raise ValueError("a context that sees its query can have only one")
        key, value = self.embed(keys), self.embed(N_KEYS + values)
        x = rearrange([key, value + key if self.smear else value], "two b n d -> b (n two) d")
        query = self.embed(queries) + self.is_query
        x = torch.cat([query, x, query] if self.query_aware else [x, query], 1)  # (batch, seq, d_model)
        n_context = x.shape[1] - n_query
        position = torch.cat([torch.arange(n_context), torch.full((n_query,), n_context)])
        if self.pos == "learned":
            x = x + self.place(position)
        bias, rotate = self.attention_bias(position, n_query), rotary(position) if self.pos == "rope" else lambda t: t
        for block in self.blocks:
            x = block(x, bias, rotate)
        return self.head(self.norm(x[:, n_context:]))


def rotary(position, base=10000.0):
    """RoPE: turns channel pairs (c, c + half) of (…, seq, channels) by position·base^(−c/half)."""

    def rotate(x):
        half = x.shape[-1] // 2
        angle = position[:, None] * base ** (-torch.arange(half) / half)
        a, b = x.split(half, -1)
        return torch.cat([a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()], -1)

    return rotate


def position_weights(kind, n):
    """(n,) relative frequency with which pair i of n is queried in training; the rarest is e⁶ ≈ 400 times rarer than the commonest."""
    x = torch.arange(n) / (n - 1)
    return {"uniform": torch.ones(n), "ushape": torch.exp(6 * ((2 * x - 1).abs() - 1)), "recency": torch.exp(6 * (x - 1)),
            "primacy": torch.exp(-6 * x)}[kind]


def draw_contexts(batch, n, generator, n_values=N_VALUES):
    """→ keys (batch, n), distinct within a context, and values (batch, n), drawn with replacement."""
    keys = torch.rand(batch, N_KEYS, generator=generator).argsort(1)[:, :n]
    return keys, torch.randint(n_values, (batch, n), generator=generator)


@torch.no_grad()
def measure_reader(model, n, contexts, seed, n_values=N_VALUES):
    """Asks for every pair of each context → correct (contexts, n) of bool: all positions on the same contexts."""
    keys, values = draw_contexts(contexts, n, torch.Generator().manual_seed(counter_seed(seed, n, 2)), n_values)
    correct = []
    for k, v in zip(keys.split(100), values.split(100)):
        if model.single:  # one query a context
            logits = model(k.repeat_interleave(n, 0), v.repeat_interleave(n, 0), k.reshape(-1, 1)).view(*k.shape, -1)
        else:
            logits = model(k, v, k)
        correct.append(logits.argmax(-1) == v)
    return torch.cat(correct).numpy()


def train_reader(job):
    """Trains one reader and measures it at job["checkpoints"] → dict(job, correct={(step, pairs): (contexts, pairs)}, seconds=CPU time).

    AdamW at 2e-3 (betas 0.9, 0.98, decay 0.01), warm-up over 50 steps, clip 1, 64 contexts a step with as many queries as pairs each
    (one where the context sees its query); the loss is on the answers alone.
    """
    torch.manual_seed(job["seed"])
    n, n_values, generator = job["pairs"], job.get("n_values", N_VALUES), torch.Generator().manual_seed(counter_seed(job["seed"], 1))
    model = PairReader(max(n, *job["test_pairs"]), **job["reader"])
    opt = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.01)
    weights, correct, start = position_weights(job["train_positions"], n).expand(64, n), {}, time.process_time()
    n_query = 1 if model.single or job.get("one_query") else n
    for step in range(1, max(job["checkpoints"]) + 1):
        opt.param_groups[0]["lr"] = job.get("lr", 2e-3) * min(1, step / 50)
        keys, values = draw_contexts(64, n, generator, n_values)
        asked = torch.multinomial(weights, n_query, job["train_positions"] != "uniform", generator=generator)  # (64, M); uniform: each once
        loss = F.cross_entropy(model(keys, values, keys.gather(1, asked)).flatten(0, 1), values.gather(1, asked).flatten())
        opt.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        opt.step()
        if step in job["checkpoints"]:
            for pairs in job["test_pairs"]:
                correct[step, pairs] = measure_reader(model, pairs, job["contexts"], job["seed"], n_values)
    return dict(job, correct=correct, seconds=time.process_time() - start)


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


def read_safetensors(path):
    """{name: tensor} of a .safetensors file: 8 bytes of header length, a JSON header, then raw memory."""
    dtypes = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
              "I32": torch.int32, "U8": torch.uint8, "BOOL": torch.bool}
    raw = np.memmap(path, np.uint8, "c")
    try:
        start = 8 + int(raw[:8].view(np.uint64)[0])
        header = json.loads(raw[8:start].tobytes())
        header.pop("__metadata__", None)
        return {name: torch.from_numpy(raw[start + about["data_offsets"][0] : start + about["data_offsets"][1]])
                .view(dtypes[about["dtype"]]).view(about["shape"]) for name, about in header.items()}
    except (ValueError, KeyError, RuntimeError) as error:
        fail(f"{path} is not a whole safetensors file ({error})")


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


def wilson(k, n, z=1.959963984540054):
    middle, half = (k + z * z / 2) / (n + z * z), z * math.sqrt(k * (n - k) / n + z * z / 4) / (n + z * z)
    return middle - half, middle + half


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


# ---------------------------------------------------------------------------------------------- GPT-2, likewise


@dataclass
class GPTConfig:
    block_size: int = 1024  # longest context, tokens
    vocab_size: int = 50304  # rows of the embedding: GPT-2's 50257 padded to a multiple of 64
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    bias: bool = False  # in linear layers and layer norms; OpenAI's weights have them
    scale_attn_by_layer: bool = False  # divide attention logits of layer i by i + 1 as well


GPT_SIZES = {
    "tiny": dict(n_layer=4, n_head=4, n_embd=128, block_size=128),
    "30M": dict(n_layer=6, n_head=6, n_embd=384),
    "gpt2": dict(n_layer=12, n_head=12, n_embd=768),
    "gpt2-medium": dict(n_layer=24, n_head=16, n_embd=1024),
    "gpt2-large": dict(n_layer=36, n_head=20, n_embd=1280),
    "gpt2-xl": dict(n_layer=48, n_head=25, n_embd=1600),
}


class SelfAttention(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.n_head, self.layer = config.n_head, layer
        self.scale = (config.n_embd // config.n_head) ** -0.5 / (layer + 1 if config.scale_attn_by_layer else 1)

    def forward(self, x, cache=None):
        q, k, v = (t.unflatten(-1, (self.n_head, -1)).transpose(1, 2) for t in self.c_attn(x).chunk(3, -1))
        if cache is not None:  # (batch, head, seq, head_dim) of every token so far, this layer's pair at cache[layer]
            if len(cache) > self.layer:
                k, v = (torch.cat(pair, 2) for pair in zip(cache[self.layer], (k, v)))
            cache[self.layer : self.layer + 1] = [(k, v)]
        n_query, n_key = q.size(2), k.size(2)
        mask = None
        if 1 < n_query < n_key:  # several new tokens after a cached prefix: query i sees keys up to its own position
            mask = torch.ones(n_query, n_key, dtype=torch.bool, device=x.device).tril(n_key - n_query)
        y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=n_query == n_key, scale=self.scale)
        return self.c_proj(y.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x):
        return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))


class Block(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attn = SelfAttention(config, layer)
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)

    def forward(self, x, cache=None):
        x = x + self.attn(self.ln_1(x), cache)
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """GPT-2: learned positions, pre-norm blocks, head tied to the token embedding. Module names are nanoGPT's."""

    def __init__(self, config):
        super().__init__()
        if config.n_embd % config.n_head:
            raise ValueError(f"GPT: width {config.n_embd} is not a multiple of {config.n_head} heads")
        self.config = config
        self.transformer = nn.ModuleDict(dict(
            wte=nn.Embedding(config.vocab_size, config.n_embd),
            wpe=nn.Embedding(config.block_size, config.n_embd),
            h=nn.ModuleList(Block(config, i) for i in range(config.n_layer)),
            ln_f=nn.LayerNorm(config.n_embd, bias=config.bias),
        ))
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.lm_head.weight = self.transformer.wte.weight
        for name, p in self.named_parameters():
            if p.dim() == 2:
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * config.n_layer) if name.endswith("c_proj.weight") else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def trunk(self, idx, cache=None):
        """idx: (batch, seq) int64 → (batch, seq, n_embd), all but the head. cache: a list, empty at first, that keeps every
        layer's keys and values; later calls pass only the new tokens."""
        start = cache[0][0].size(2) if cache else 0
        if start + idx.size(1) > self.config.block_size:
            raise ValueError(f"GPT: {start + idx.size(1)} tokens exceed the context of {self.config.block_size}")
        x = self.transformer.wte(idx) + self.transformer.wpe.weight[start : start + idx.size(1)]
        for block in self.transformer.h:
            x = block(x, cache)
        return self.transformer.ln_f(x)

    def forward(self, idx, cache=None):
        """idx: (batch, seq) int64 → logits (batch, seq, vocab_size)."""
        return self.lm_head(self.trunk(idx, cache))

    @classmethod
    def from_pretrained(cls, name):
        """OpenAI's public weights of gpt2, gpt2-medium, gpt2-large or gpt2-xl, downloaded once (0.5 to 6 GB)."""
        if not name.startswith("gpt2"):
            fail(f"there are public weights of {', '.join(size for size in GPT_SIZES if size.startswith('gpt2'))}, none of {name}")
        url = f"https://huggingface.co/openai-community/{name}/resolve/main/model.safetensors"
        return cls(GPTConfig(**GPT_SIZES[name], vocab_size=50257, bias=True)).load_openai(read_safetensors(download(url)))

    def load_openai(self, weights):
        """Copy OpenAI's tensors, {name: tensor}, into this model (bias=True, vocab_size=50257). KeyError names a missing one."""
        weights = {name.removeprefix("transformer."): w for name, w in weights.items()}
        with torch.no_grad():
            for name, p in self.transformer.named_parameters():
                w = weights[name]
                if name.endswith((".c_attn.weight", ".c_proj.weight", ".c_fc.weight")):
                    w = w.t()  # OpenAI's Conv1D keeps (in, out)
                if w.shape != p.shape:
                    raise ValueError(f"GPT: {name} is {tuple(w.shape)} in the file and {tuple(p.shape)} in the model")
                p.copy_(w)
        return self


# ------------------------------------------------------------------- the model client, the same in lost_in_middle.py and neqa.py

# A request is a dict of id (a str of its own), prompt (str) and either max_tokens (int: generate greedily; logprobs=N: give the N
# likeliest first tokens too; stop: a list of str that end the answer) or choices (a list of str: score each as the prompt's
# continuation). Other keys are the caller's. An answer is a dict of id and text, logprobs {token: log-probability} or scores
# [log-probability of each choice, nats], with usage; or of skipped="overflow" where the model's window is too short; or of error.
RETRIED = {408, 409, 425, 429, 500, 502, 503, 504, 529}  # HTTP statuses that pass
BACKOFF, TRIES = 1.0, 8  # seconds before the second try, doubled at each further one up to 60, and drawn from 0 to that


def client_flags(flag):
    """The flags that `ask` reads. flag: parser.add_argument."""
    flag("--model", help="gpt2, gpt2-medium, gpt2-large, gpt2-xl (public weights, run here); http or http:NAME (an OpenAI-compatible "
         "server: OpenAI, vLLM, Ollama, llama.cpp); echo:… (a fake of known accuracy)")
    flag("--base_url", default=os.environ.get("OPENAI_BASE_URL", "https://api.openai.com/v1"), help="http: the server, as "
         "http://127.0.0.1:8011/v1 (environment: OPENAI_BASE_URL)")
    flag("--api", choices=("completions", "chat"), default="completions", help="http: /completions, or /chat/completions with the "
         "prompt as one user message")
    flag("--api_key_env", default="OPENAI_API_KEY", help="http: the environment variable that holds the key")
    flag("--concurrency", type=number(int, 1, 256), default=8, help="http: calls under way at once")
    flag("--timeout", type=number(float, 0.1), default=120.0, help="http: seconds to wait for an answer")
    flag("--price_in", type=number(float, 0), default=0.0, help="dollars for a million prompt tokens")
    flag("--price_out", type=number(float, 0), default=0.0, help="dollars for a million answer tokens")
    flag("--max_prompt_tokens", type=number(int, 1), default=5_000_000, help="http: a run that sends more than this needs --yes")
    flag("--yes", action="store_true", help="http: yes, send them all")
    flag("--dry_run", action="store_true", help="print calls, tokens, cost and one whole prompt; ask nothing")
    flag("--refresh", action="store_true", help="ask again what is in the cache")


class ServerError(Exception):
    """What a server answered instead of an answer; args: status (0: no connection, or nothing that can be read), its message."""


def post(url, body, key="", timeout=120.0, patient=True):
    """JSON to url → JSON back. What may pass is tried again, at the time that Retry-After names or after a random, growing wait;
    where patient is false a server that is not there is not waited for. body None: GET. Raises ServerError."""
    headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {key}"} if key else {})}
    request = urllib.request.Request(url, None if body is None else json.dumps(body).encode(), headers)
    for attempt in range(TRIES):
        wait = random.uniform(0, min(60.0, BACKOFF * 2**attempt))
        try:
            with urllib.request.urlopen(request, timeout=timeout) as reply:
                return json.loads(reply.read())
        except urllib.error.HTTPError as error:
            status, message, after = error.code, error.read().decode(errors="replace"), error.headers.get("Retry-After")
            try:
                message = json.loads(message)
                message = message.get("error", message)
                message = message.get("message", message) if isinstance(message, dict) else message
            except (ValueError, AttributeError):
                message = message or error.reason
            if status not in RETRIED:
                break
            if after:
                try:
                    wait = float(after)
                except ValueError:
                    wait = max(0.0, (email.utils.parsedate_to_datetime(after) - datetime.now(UTC)).total_seconds())
        except (OSError, http.client.HTTPException, ValueError) as error:  # no connection, a timeout, half a reply, no JSON
            status, message = 0, f"{type(error).__name__}: {error}"
            if not patient and isinstance(error, urllib.error.URLError):
                break
        if attempt < TRIES - 1:
            time.sleep(wait)
    message = " ".join(str(message).split())[:400]
    raise ServerError(status, message.replace(key, "[key]") if key else message)


def first_token(choice):
    """{token: log-probability} at the first generated position, from the shape of /completions or that of /chat/completions, which
    some servers give at the other address; empty where there is none."""
    shape = choice.get("logprobs") or {}
    if shape.get("content"):
        first = shape["content"][0]
        return {entry["token"]: entry["logprob"] for entry in [first, *(first.get("top_logprobs") or [])]}
    top = (shape.get("top_logprobs") or [None])[0] or {}
    return {**top, **dict(zip((shape.get("tokens") or [])[:1], (shape.get("token_logprobs") or [])[:1]))}


def echoed(choice, text, start):
    """Log-probability of text[start:] after text[:start], from a reply that echoes text with its log-probabilities. ValueError
    where the reply does not hold them: a server that leaves echo out would otherwise score every choice alike."""
    shape = choice.get("logprobs") or {}
    tokens, logprobs = shape.get("tokens"), shape.get("token_logprobs")
    if shape.get("content"):
        tokens, logprobs = zip(*((entry["token"], entry["logprob"]) for entry in shape["content"]))
    if not tokens or not choice.get("text", "").startswith(text):
        raise ValueError("the server does not echo the prompt with its log-probabilities")
    offsets = shape.get("text_offset") or np.cumsum([0, *map(len, tokens)]).tolist()
    if offsets[0] != 0 or len(tokens) < 2 or None in logprobs[1:]:
        raise ValueError("the server gives no log-probabilities of the prompt")
    picked = [logprob for offset, logprob in zip(offsets, logprobs) if start <= offset < len(text)]
    if not picked or None in picked:
        raise ValueError(f"the server's tokens do not part at {text[start:]!r}")
    return sum(picked)


class Server:
    """Answers requests by an OpenAI-compatible server. The key is read from the environment and goes nowhere else."""

    def __init__(self, args, name):
        self.url, self.api, self.timeout = args.base_url.rstrip("/"), args.api, args.timeout
        self.key, self.changes, self.key_env = os.environ.get(args.api_key_env, ""), {}, args.api_key_env
        if not self.url.startswith(("http://", "https://")):
            fail(f"--base_url {self.url} is no address: http://127.0.0.1:8011/v1 is one")
        self.name = name or self.only_model()
        self.where = [self.url, self.api, self.name]

    def only_model(self):
        """The name of the server's only model."""
        try:
            models = [model["id"] for model in post(f"{self.url}/models", None, self.key, self.timeout, patient=False)["data"]]
        except (ServerError, KeyError, TypeError) as error:
            fail(f"no list of models at {self.url}/models ({self.explain(error)}): name one, as in --model http:NAME")
        if len(models) != 1:
            fail(f"{self.url} has {len(models)} models: name one, as in --model http:{models[0] if models else 'NAME'} "
                 f"({', '.join(models[:10])})")
        return models[0]

    def explain(self, error):
        if not isinstance(error, ServerError):
            return str(error)
        status, message = error.args
        cure = {0: f"; is the server running at {self.url}?", 401: f"; the key is read from ${self.key_env}",
                404: "" if self.url.endswith("/v1") else "; addresses mostly end in /v1"}.get(status, "")
        return f"{f'status {status}: ' if status else ''}{message}{cure}"

    def call(self, request, patient, **extra):
        body = dict(model=self.name, max_tokens=request.get("max_tokens", 1), temperature=0, top_p=1, **extra)
        if self.api == "chat":
            body["messages"] = [dict(role="user", content=body.pop("prompt"))]
        while True:
            for old, new in self.changes.items():
                if old in body:
                    value = body.pop(old)
                    body.update({new: value} if new else {})
            try:
                return post(f"{self.url}/{'chat/completions' if self.api == 'chat' else 'completions'}", body, self.key, self.timeout,
                            patient)
            except ServerError as error:  # some models refuse a parameter: leave it out, or take the name that they want
                refused = [name for name in ("max_tokens", "temperature", "top_p") if name in body and name in str(error.args[1])]
                if error.args[0] != 400 or not refused or is_overflow(error):
                    raise
                self.changes[refused[0]] = "max_completion_tokens" if refused[0] == "max_tokens" else None
                print(f"{self.name} refuses {refused[0]}: asked without it ({error.args[1]})", file=sys.stderr)

    def answer(self, request, patient=True):
        usage, top = dict(prompt_tokens=0, completion_tokens=0), request.get("logprobs")

        def add_up(reply):
            for name in usage:
                usage[name] += (reply.get("usage") or {}).get(name) or 0
            return reply["choices"][0]

        if "choices" in request:
            if self.api == "chat":
                fail("a chat endpoint gives no log-probability of a given text: use --api completions, or score what is generated")
            scores = []
            for text in (request["prompt"] + choice for choice in request["choices"]):
                choice = add_up(self.call({}, patient, prompt=text, echo=True, logprobs=1))
                scores.append(echoed(choice, text, len(request["prompt"])))
            return dict(scores=scores, usage=usage)
        extra = dict(prompt=request["prompt"], **({"stop": request["stop"]} if request.get("stop") else {}))
        if top:
            extra.update(dict(logprobs=True, top_logprobs=top) if self.api == "chat" else dict(logprobs=top))
        choice = add_up(self.call(request, patient, **extra))
        text = choice["text"] if "text" in choice else (choice.get("message") or {}).get("content") or ""
        answer = dict(text=text, finish=choice.get("finish_reason"), usage=usage)
        if top:
            answer["logprobs"] = first_token(choice)
            if not answer["logprobs"]:
                raise ValueError("the server gives no log-probabilities")
        return answer


def is_overflow(error):
    """Does this ServerError say that the prompt is longer than the model's window?"""
    status, message = error.args
    return status in (400, 413, 422, 500) and bool(re.search(r"(?i)context.{0,40}(length|window|size)|maximum.{0,20}(context|length)|"
                                                             r"(exceed|too long).{0,60}(context|token)", message))


class Local:
    """Answers requests by a GPT in this process. What a prompt shares with the one before is not read again: its keys and values
    are still in the cache."""

    def __init__(self, model, encode, decode, name):
        self.model, self.encode, self.decode, self.where = model.eval(), encode, decode, ["local", name]
        self.ids, self.cache = [], []

    def read(self, ids, n):
        """Log-probabilities (n, vocab) of what follows each of the last n ids."""
        shared = next((i for i, (a, b) in enumerate(zip(self.ids, ids)) if a != b), min(len(self.ids), len(ids)))
        shared = min(shared, len(ids) - n)
        self.cache[:] = [(k[:, :, :shared], v[:, :, :shared]) for k, v in self.cache] if shared else []
        with torch.inference_mode():
            new = torch.tensor([ids[shared:]], device=self.model.lm_head.weight.device)
            logits = self.model.lm_head(self.model.trunk(new, self.cache)[0, -n:])
            self.ids = list(ids)
            return logits.float().log_softmax(-1)

    def answer(self, request, patient=True):
        prompt, window = self.encode(request["prompt"]), self.model.config.block_size
        choices = [self.encode(choice) for choice in request.get("choices", ())]
        longest = max([request.get("max_tokens", 0), *map(len, choices)])
        usage = dict(prompt_tokens=len(prompt), completion_tokens=0)
        if len(prompt) + longest > window:
            return dict(skipped="overflow", usage=usage, detail=f"{len(prompt)} + {longest} tokens, window {window}")
        if choices:
            return dict(usage=usage, scores=[self.read((prompt + ids)[:-1], len(ids)).gather(
                1, torch.tensor(ids, device=self.model.lm_head.weight.device)[:, None]).sum().item() for ids in choices])
        ids, text, top = list(prompt), "", {}
        while len(ids) < len(prompt) + request["max_tokens"]:
            logprobs = self.read(ids, 1)[0]
            if len(ids) == len(prompt):
                best = logprobs.topk(request.get("logprobs") or 1)
                top = {self.decode([token]): value for value, token in zip(best.values.tolist(), best.indices.tolist())}
            ids.append(int(logprobs.argmax()))
            text = self.decode(ids[len(prompt):])
            stops = [text.index(stop) for stop in request.get("stop") or () if stop in text]
            if stops or ids[-1] == 50256:  # GPT-2's end of text
                text = text[: min(stops, default=len(text))].removesuffix("<|endoftext|>")
                break
        usage["completion_tokens"] = len(ids) - len(prompt)
        return dict(text=text, usage=usage, **({"logprobs": top} if request.get("logprobs") else {}))


class Echo:
    """Answers requests by the caller's function of (what stands after "echo:", request) → a text, {token: log-probability} of the
    first token, or a list of scores."""

    def __init__(self, function, spec):
        self.function, self.spec, self.where = function, spec, ["echo", spec]

    def answer(self, request, patient=True):
        said = self.function(self.spec, request)
        name = {list: "scores", dict: "logprobs"}.get(type(said), "text")
        return {"text": "", name: said, "usage": dict(prompt_tokens=0, completion_tokens=0)}


def connect(args, device, name, echo=None):
    """--model's name → a Server, Local or Echo."""
    kind, _, rest = (name or "").partition(":")
    if kind == "http":
        return Server(args, rest)
    if kind == "echo" and echo:
        return Echo(echo, rest)
    if kind not in GPT_SIZES or not kind.startswith("gpt2"):
        fail(f"--model {name}: choose from {', '.join(size for size in GPT_SIZES if size.startswith('gpt2'))}, http, http:NAME, echo:…")
    try:
        import tiktoken

        gpt2 = tiktoken.get_encoding("gpt2")
    except Exception as error:  # tiktoken lets through whatever its downloader raises
        fail(f"--model {name} needs tiktoken's one-time download of gpt2 ({type(error).__name__}); --model http and echo:… do not")
    return Local(GPT.from_pretrained(name).to(device), gpt2.encode_ordinary, gpt2.decode, name)


def announce(args, requests):
    """Calls, tokens and dollars to come, from at most 200 of the requests; stops here on --dry_run."""
    sample = requests[:: -(-len(requests) // 200)]
    try:
        import tiktoken

        gpt2, how = tiktoken.get_encoding("gpt2"), "counted as GPT-2 does"
        sizes = [sum(len(gpt2.encode_ordinary(r["prompt"] + choice)) for choice in r.get("choices", ("",))) for r in sample]
    except Exception:  # no download of tiktoken's here
        sizes, how = [sum(len(r["prompt"] + choice) for choice in r.get("choices", ("",))) / 4 for r in sample], "characters / 4"
    total, answers = sum(sizes) / len(sample) * len(requests), sum(request.get("max_tokens", 0) for request in requests)
    cost = (total * args.price_in + answers * args.price_out) / 1e6
    if args.dry_run:
        if int(os.environ.get("RANK", 0)) == 0:
            calls = sum(len(request.get("choices", ("",))) for request in requests)
            print(f"{requests[0]['prompt']}\n\n{calls:,} calls to {args.model}: about {total:,.0f} prompt tokens ({how}), the longest "
                  f"{max(sizes):,.0f}, and at most {answers:,} answer tokens: at most about ${cost:.2f}. Above is one prompt. Nothing "
                  "was asked.")
        raise SystemExit(0)
    if "http" in args.model and total > args.max_prompt_tokens and not args.yes:
        fail(f"this sends about {total:,.0f} prompt tokens to {args.base_url}, about ${cost:.2f}: add --yes, or ask for less")


def read_answers(out):
    """{key: answer} of every whole line of out/answers*.jsonl; a line that a killed run left torn is not counted."""
    answers = {}
    for path in sorted(out.glob("answers*.jsonl")):
        for line in path.read_bytes().split(b"\n"):
            try:
                answer = json.loads(line)
                answers[answer["key"]] = answer
            except (ValueError, KeyError, TypeError):
                if line.strip():
                    print(f"{path}: a torn line is left out", file=sys.stderr)
    return answers


def ask(args, model, requests, out):
    """→ an answer for each request, in order. Every answer is appended to out/answers.jsonl as it comes, so that a killed run goes
    on where it stopped and a finished one asks nothing. Under torchrun the ranks share the requests, each with a file of its own."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    fields = ("prompt", "max_tokens", "choices", "stop", "logprobs", *(["id"] if isinstance(model, Echo) else []))
    keys = [hashlib.sha256(json.dumps([model.where, [request.get(name) for name in fields]]).encode()).hexdigest()
            for request in requests]
    out.mkdir(parents=True, exist_ok=True)
    known = {} if args.refresh else read_answers(out)
    todo = [i for i in dict(zip(reversed(keys), reversed(range(len(keys))))).values() if keys[i] not in known]
    if todo:
        announce(args, [requests[i] for i in sorted(todo)])
    if world > 1:
        dist.barrier()  # all have read the cache before one writes
    todo = sorted(todo)[rank::world]
    fresh, started = {}, time.time()
    work, done = queue.SimpleQueue(), queue.SimpleQueue()

    def answer(i, patient=True):
        try:
            return model.answer(requests[i], patient)
        except ServerError as error:
            return dict(skipped="overflow", detail=error.args[1]) if is_overflow(error) else dict(error=model.explain(error))
        except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:  # a reply of another shape
            return dict(error=f"{type(error).__name__}: {error}" if not isinstance(error, ValueError) else str(error))

    def loop():
        while True:
            i = work.get()
            done.put((i, answer(i)))

    first = answer(todo[0], patient=False) if isinstance(model, Server) and todo else None  # alone: a wrong key, name or address
    if first and "error" in first:  # would fail every call
        fail(f"{model.name} at {model.url}: {first['error']}")
    path = out / f"answers{f'.{rank}' if world > 1 else ''}.jsonl"
    torn = path.exists() and not path.read_bytes().endswith(b"\n") and path.stat().st_size > 0
    try:
        with open(path, "a") as file, tqdm(total=len(todo), desc=model.where[-1], disable=args.quiet or rank > 0) as bar:
            file.write("\n" * torn)

            def keep(i, result):
                fresh[keys[i]] = dict(key=keys[i], id=requests[i]["id"], model=model.where[-1], time=round(time.time(), 3), **result)
                if "error" not in result:  # what failed is asked again next time
                    file.write(json.dumps(fresh[keys[i]]) + "\n")
                    file.flush()
                bar.update()

            if first:
                keep(todo[0], first)
                for _ in range(min(args.concurrency, len(todo))):
                    threading.Thread(target=loop, daemon=True).start()
                for i in todo[1:]:
                    work.put(i)
                for _ in todo[1:]:
                    keep(*done.get())
            else:
                for i in todo:
                    keep(i, answer(i))
    except KeyboardInterrupt:
        fail(f"stopped; {len(fresh)} new answers are in {path}: run the command again to go on")
    if world > 1:
        shares = [None] * world
        dist.all_gather_object(shares, fresh)
        fresh = {key: value for share in shares for key, value in share.items()}
    answers = [fresh.get(key) or known[key] for key in keys]
    if rank == 0 and not args.quiet:
        used = [sum(answer.get("usage", {}).get(name, 0) for answer in fresh.values()) for name in ("prompt_tokens", "completion_tokens")]
        failed, skipped = (sum(name in answer for answer in answers) for name in ("error", "skipped"))
        print(f"{model.where[-1]}: {len(fresh):,} answers asked, {len(requests) - len(fresh):,} from {out}; {used[0]:,} prompt and "
              f"{used[1]:,} answer tokens, ${(used[0] * args.price_in + used[1] * args.price_out) / 1e6:.2f}, "
              f"{time.time() - started:.0f} s; {skipped:,} too long for the window, {failed:,} failed", file=sys.stderr)
    return [{**answer, "id": request["id"]} for answer, request in zip(answers, requests)]


# ============================================================================================== questions and pairs

ORIGIN = "https://raw.githubusercontent.com/nelson-liu/lost-in-the-middle/main/"
RETRIEVED = "https://nlp.stanford.edu/data/nfliu/lost-in-the-middle/nq-open-contriever-msmarco-retrieved-documents.jsonl.gz"
FACTS = (  # title, question, passage of the built-in set; every name is invented, so that nobody knows an answer by heart
    ("{s} (town)", "who founded the town of {s}",
     "{s} is a market town on the upper reaches of a slow brown river. It was founded by {a}, a cloth trader, who bought the ford and "
     "built the first mill. Much of the old wall still stands, and a fair is held below it."),
    ("{s} (island)", "what is the largest settlement on the island of {s}",
     "{s} is an island that is reached by a weekly ferry. Its largest settlement is {a}, built around a natural harbour. Sheep outnumber "
     "people, and most of the interior is wet moor."),
    ("{s} (composer)", "which opera made the composer {s} famous",
     "{s} was a composer who began as a church organist. The opera {a} made the composer famous within one season and was played in "
     "forty theatres. The later string quartets are seldom heard today."),
    ("{s} (alloy)", "which metal hardens the alloy {s}",
     "{s} is a pale grey alloy that is used for springs and small gears. It is hardened by a trace of the metal {a}, which is added to "
     "the melt shortly before casting. The alloy takes a high polish but is hard to weld."),
    ("{s} (ship)", "who was the first captain of the ship {s}",
     "The {s} was a three-masted survey ship with an iron hull. The first captain of the ship was {a}, who commanded her for nine "
     "years. She charted reefs and currents until she was sold as a coal hulk."),
    ("{s} (beetle)", "on which plant does the beetle {s} feed",
     "The {s} is a small green beetle of dry uplands. Its larvae and adults feed on the plant {a} and on nothing else, so that both are "
     "found together. It flies in early summer, on warm evenings."),
)
HEADS = "Ard Bov Cem Dul Eskr Fenn Gorv Hask Ilm Jorr Keld Lumb Morv Nask Orl Pesk Quill Rund Solv Tarn".split()


def invented(i):
    """The i-th of 400 invented names; none is part of another."""
    return HEADS[i % 20] + "a e i o u".split()[i % 5] + "dran lith mund pell stor venn wick zor gast tham brel cott".split()[i % 12] + (
        "ish", "on", "um", "ey", "ax", "or", "ine")[i % 7]


def words_of(text):
    return set(normalise(text).split())


def by_overlap(question, docs):
    """docs in order of the words they share with the question, each weighted by −log of the share of docs that hold it; a plain
    retriever. Ties stay in order."""
    sets = [words_of(f"{doc['title']} {doc['text']}") for doc in docs]
    counts = Counter(word for words in sets for word in words)
    scores = [sum(math.log(len(docs) / counts[word]) for word in words & words_of(question)) for words in sets]
    return [docs[i] for i in sorted(range(len(docs)), key=lambda i: -scores[i])]


def builtin_facts():
    """60 rows of question, answers and gold (title, text, answer)."""
    rows = []
    for i in range(60):
        title, question, passage = FACTS[i % len(FACTS)]
        s, a = invented(2 * i), invented(2 * i + 1)
        gold = dict(title=title.format(s=s), text=passage.format(s=s, a=a), answer=a, hasanswer=True)
        rows.append(dict(id=f"fact{i}", question=question.format(s=s), answers=[a], gold=gold))
    return rows


def has_answer(doc, answers):
    text = normalise(doc["text"])
    return any(gold in text for gold in map(normalise, answers) if gold)


def read_examples(path):
    """Yields (where, dict) of a .jsonl or .jsonl.gz file; `where` is file:line."""
    number_of = 0
    try:
        with (gzip.open if open(path, "rb").read(2) == b"\x1f\x8b" else open)(path, "rt", encoding="utf-8") as file:
            for number_of, line in enumerate(file, 1):
                if line.strip():
                    row = json.loads(line)
                    if not isinstance(row, dict):
                        raise ValueError("not a JSON object")
                    yield f"{path}:{number_of}", row
    except FileNotFoundError:
        fail(f"{path} is not there: --data paper downloads the authors' files, make_kv and make_qa make some, builtin needs none")
    except (EOFError, OSError, UnicodeDecodeError, zlib.error) as error:
        fail(f"{path} cannot be read after line {number_of} ({error}): fetch it again")
    except ValueError as error:
        fail(f"{path}:{number_of or 1} is not a line of JSON ({error})")


def check_question(row, where):
    """→ dict(question, answers, ctxs) of a row of the authors' files, or a sentence that says what it lacks."""
    question, answers, docs = row.get("question"), row.get("answers"), row.get("ctxs")
    if not isinstance(question, str) or not question.strip():
        fail(f"{where} has no question")
    if not isinstance(answers, list) or not answers or not all(isinstance(a, str) for a in answers):
        fail(f"{where} has no list of answers")
    if not isinstance(docs, list) or not all(isinstance(doc, dict) and isinstance(doc.get("title"), str)
                                             and isinstance(doc.get("text"), str) for doc in docs):
        fail(f"{where} has no list ctxs of documents with title and text")
    return dict(question=question, answers=answers, ctxs=docs)


def qa_example(row, where):
    """A row of the authors' files → dict(id, question, answers, gold, others). With isgold the other ctxs are the distractors; in
    the file of retrieval results they are those without an answer, and the gold is the annotated chunk."""
    example = check_question(row, where)
    docs = example.pop("ctxs")
    golds, chunk = [doc for doc in docs if doc.get("isgold")], row.get("nq_annotated_gold") or {}
    if not golds and chunk.get("chunked_long_answer"):
        golds = [dict(title=chunk["title"], text=chunk["chunked_long_answer"], hasanswer=True)]
        docs = [doc for doc in docs if not doc.get("hasanswer")]
    if len(golds) != 1:
        fail(f"{where} has {len(golds)} documents with isgold, needs 1 (or retrieval results with nq_annotated_gold)")
    return dict(example, id=where.rsplit(":", 1)[1], gold=golds[0], others=[doc for doc in docs if doc is not golds[0]])


def load_qa(args, docs):
    """→ examples with docs − 1 others each, in the order that --distractors and --order ask for."""
    if args.data == "builtin":
        rows = [dict(row, others=None) for row in builtin_facts()]
    else:
        path = args.data if args.data != "paper" else download(
            f"{ORIGIN}qa_data/{docs}_total_documents/nq-open-{docs}_total_documents_gold_at_0.jsonl.gz" if docs > 1 else
            f"{ORIGIN}qa_data/nq-open-oracle.jsonl.gz")
        rows = [qa_example(row, where) for where, row in read_examples(path)]
    if not rows:
        fail(f"{args.data} has no rows")
    pool = [doc for row in rows for doc in [row["gold"], *(row["others"] or [])]]
    for row in rows[: args.limit]:
        rng = random.Random(f"{args.seed} {row['id']}")  # of its own: a resumed or shortened run sees the same order
        if row["others"] is None or args.distractors == "random":
            near = rng.sample(pool, len(pool)) if args.distractors == "random" else by_overlap(row["question"], pool)
            usable = (doc for doc in near if doc is not row["gold"] and not has_answer(doc, row["answers"]))
            row["others"] = [dict(doc, isgold=False, hasanswer=False) for doc in islice(usable, docs - 1)]
        if len(row["others"]) < docs - 1:
            fail(f"{args.data}, row {row['id']} has {len(row['others'])} distractors, --docs {docs} needs {docs - 1}: lower --docs, or "
                 "--distractors random takes other rows' documents")
        row["others"] = row["others"][: docs - 1]
        if args.order == "shuffled":
            rng.shuffle(row["others"])
    return rows[: args.limit]


def make_pairs(n, k, seed, style="uuid"):
    """n rows of k random pairs, one of them asked for, in the authors' format. Keys and values are all distinct within a row, and row
    i depends on seed, k and i alone. style: uuid (version 4), or short: k and 4 digits → 4 digits, for small models."""
    rows = []
    for i in range(n):
        rng = random.Random(f"{seed} {k} {i}")
        if style == "short":
            names = [str(x) for x in rng.sample(range(1000, 10000), 2 * k)]
            records = [[f"k{a}", b] for a, b in zip(names[::2], names[1::2])]
        else:
            records = [[str(uuid.UUID(int=rng.getrandbits(128), version=4)) for _ in range(2)] for _ in range(k)]
        key, value = rng.choice(records)
        rows.append(dict(ordered_kv_records=records, key=key, value=value))
    return rows


def kv_example(row, where):
    """A row of the authors' files → dict(id, key, value, gold, others)."""
    records, key = row.get("ordered_kv_records"), row.get("key")
    if not isinstance(records, list) or not all(isinstance(r, list) and list(map(type, r)) == [str, str] for r in records):
        fail(f"{where} has no ordered_kv_records, a list of [key, value]")
    keys = [k for k, _ in records]
    if len(set(keys)) < len(keys):
        fail(f"{where} has the key {next(k for k in keys if keys.count(k) > 1)} twice")
    if key not in keys:
        fail(f"{where}: its key {key} is not among its {len(keys)} records")
    gold = records[keys.index(key)]
    if row.get("value", gold[1]) != gold[1]:
        fail(f"{where}: its value is not the one that the records give for {key}")
    return dict(id=where.rsplit(":", 1)[1], key=key, answers=[gold[1]], gold=gold, others=[r for r in records if r is not gold])


def load_kv(args, keys):
    if args.data == "builtin":
        rows = [(f"made:{i}", row) for i, row in enumerate(make_pairs(args.limit or args.examples, keys, args.seed, args.key_style), 1)]
    else:
        url = f"{ORIGIN}kv_retrieval_data/kv-retrieval-{keys}_keys.jsonl.gz"
        rows = read_examples(download(url) if args.data == "paper" else args.data)
    examples = [kv_example(row, where) for where, row in islice(rows, args.limit)]
    for example in examples:
        if len(example["others"]) < keys - 1:
            fail(f"{args.data}, row {example['id']} has {len(example['others']) + 1} pairs, --keys {keys} asks for more")
        example["others"] = example["others"][: keys - 1]
    if not examples:
        fail(f"{args.data} has no rows")
    return examples


# ============================================================================================== asking a model


ECHOES = {  # curves of the fake models over depth x, from 0 at the first item to 1 at the last
    "flat": lambda x: 1, "recency": lambda x: (1 + x) / 2, "primacy": lambda x: (2 - x) / 2, "u": lambda x: 1 - 2 * x * (1 - x),
    "first": lambda x: 0,
}


def parse_echo(spec):
    """ "u:0.9" → ("u", 0.9)"""
    kind, _, p = spec.partition(":")
    try:
        p = float(p or 1)
    except ValueError:
        p = math.nan
    if kind not in ECHOES or not 0 <= p <= 1:
        fail(f"--model echo:{spec}: there are echo:flat:0.8, echo:recency:0.9, echo:primacy:0.9, echo:u:0.9 (accuracies from 0 to 1) and "
             "echo:first")
    return kind, p


def echo_answer(spec, request):
    """The fake model of --model echo:…: with a probability that depends on where the gold stands it answers right, else it gives the
    value of another item. flat:p; recency:p and primacy:p: p at one end, p/2 at the other; u:p: p at both ends, p/2 in the middle;
    first: always the first value. The curve is known, so the whole pipeline can be checked on it."""
    kind, p = parse_echo(spec)
    x = request.get("place", request["position"]) / max(1, request.get("among", request["total"]) - 1)
    draw = random.Random(f"{spec} {request['id']}")
    values = request["values"] or ["I do not know"]
    if kind == "first":
        value = values[0]
    elif request["closed"]:
        value = "I do not know"
    else:
        wrong = [v for v in values if v != request["gold"]] or ["I do not know"]
        value = request["gold"] if draw.random() < p * (ECHOES[kind](x) if request["total"] > 1 else 1) else draw.choice(wrong)
    return [0.0 if v == value else -5.0 for v in values] if "choices" in request else f" {value}"


def parse_positions(text, total):
    """auto: the paper's for this many items, else five from first to last; all; or a list of indices from 0."""
    if text == "all":
        return list(range(total))
    if text == "auto":
        return list(PAPER_POSITIONS.get(total, sorted({round(i * (total - 1) / 4) for i in range(5)})))
    try:
        positions = sorted({int(p) for p in text.split(",")})
    except ValueError:
        fail(f"--positions {text}: auto, all, or indices from 0 as in 0,4,9")
    if not all(0 <= p < total for p in positions):
        fail(f"--positions {text}: with {total} items the indices go from 0 to {total - 1}")
    return positions


def requests_of(args, setting, examples, total, positions):
    """One request for each example and position. closedbook and oracle have a single position, 0."""
    requests = []
    for example in examples:
        for g in positions:
            items = [] if setting == "closedbook" else place(example["others"], example["gold"], g)
            if setting == "kv":
                prompt, values = kv_prompt(example["key"], items, args.query_aware), [value for _, value in items]
            else:
                prompt = qa_prompt(example["question"], items, args.query_aware and setting == "qa",
                                   args.mention_random_order and setting == "qa")
                values = [doc.get("answer") for doc in items]
                values = values if all(values) else []
            request = dict(id=f"{setting} {example['id']} {g}", example=example["id"], setting=setting, position=g, total=total,
                           prompt=prompt, values=values, gold=example["answers"][0], answers=example["answers"],
                           closed=setting == "closedbook")
            if args.scoring == "rank":
                if len(values) < 2:
                    fail(f"--scoring rank needs candidates: --setting kv, or qa with --data builtin, not {setting} with {args.data}")
                request["choices"] = [f' "{v}"' if setting == "kv" else f" {v}" for v in values]
            else:
                request["max_tokens"] = args.max_tokens
            requests.append(request)
    return requests


def ask_all(args, device, requests, out):
    """→ rows for responses.jsonl: what was asked, the answer's text, which item it names, or why there is none."""
    rows = []
    for request, answer in zip(requests, ask(args, connect(args, device, args.model, echo_answer), requests, out)):
        row = {key: request[key] for key in ("example", "setting", "position", "total", "answers")}
        if "scores" in answer:
            answer["text"] = request["values"][int(np.argmax(answer["scores"]))]
        if "text" in answer:
            whole = len(request["values"]) == request["total"]  # each item has a value by which an answer names it
            row |= dict(text=answer["text"], answered=answered_index(answer["text"], request["values"]) if whole else None)
        else:
            row["missing"] = "overflow" if answer.get("skipped") else answer["error"]
            if answer.get("skipped") and args.on_overflow == "error":
                fail(f"example {row['example']}, position {row['position']}, does not fit the model's window ({answer.get('detail', '')}): "
                     "fewer --docs or --keys, or --on_overflow skip")
        rows.append(row)
    return rows


def analyse_curve(rows, metric, lstrip=True, seed=0):
    """Rows of one setting → everything about its curve. Only examples answered at every position count, so that all positions
    are measured on the same questions; the others are listed with their reason."""
    positions = sorted({row["position"] for row in rows})
    missing = {row["example"]: row["missing"] for row in rows if "missing" in row}
    whole = {}
    for row in rows:
        if row["example"] not in missing:
            whole.setdefault(row["example"], {})[row["position"]] = row
    whole = {i: cells for i, cells in whole.items() if len(cells) == len(positions)}
    if not whole:
        fail(f"no example was answered at every position ({dict(Counter(missing.values()).most_common(2))}): fewer --docs or --keys fit "
             "a short window")
    kept = [cells[p] for cells in whole.values() for p in positions]
    correct = np.array([score_answer(metric, row["text"], row["answers"], lstrip) for row in kept]).reshape(-1, len(positions))
    found = dict(setting=rows[0]["setting"], metric=metric, n=len(whole), total=rows[0]["total"], positions=positions,
                 accuracy=correct.mean(0).tolist(), interval=[wilson(k, len(correct)) for k in correct.sum(0)],
                 mean_words=float(np.mean([len(row["text"].split()) for row in kept])), left_out=missing, ids=list(whole),
                 empty_answers=sum(any(not normalise(a) for a in cells[positions[0]]["answers"]) for cells in whole.values()))
    if len(positions) > 1:
        found["summary"] = summarise(correct, positions, seed)
        if all(row.get("answered") is not None for row in kept):
            matrix = answer_matrix([row["position"] for row in kept], [row["answered"] for row in kept], positions, rows[0]["total"])
            found |= dict(matrix=matrix.tolist(), corrected=corrected(matrix, positions))
    return found, correct


# ============================================================================================== the experiments

BARS = " ▁▂▃▄▅▆▇█"
BOUND = dict(layers=1, smear=True)  # keys bound to their values by hand: the plateau before retrieval is gone
FAR = dict(once=True, pairs=8, n_values=16, lr=3e-3, one_query=True, checkpoints=(250, 500))
LAB = {  # panel: (title, {arm: what differs from PLAIN}); every checkpoint of every arm is a curve
    "emergent": ("Uniform data, ALiBi: a U that nobody put in", {
        "ALiBi": dict(reader=dict(pos="alibi"), checkpoints=(150,), long=(300, 550))}),
    "data": ("The training data: which pairs were asked for", {
        "uniform": dict(reader=BOUND, checkpoints=(100,)),
        "ends favoured": dict(reader=BOUND, train_positions="ushape", checkpoints=(100, 150)),
        "last favoured": dict(reader=BOUND, train_positions="recency", checkpoints=(100, 150))}),
    "window": ("A window of 17 tokens: the last 8 pairs", {"window 17": dict(reader=dict(BOUND, window=17), checkpoints=(150,))}),
    "length": ("More pairs than the 16 of training", {
        name: dict(reader=dict(BOUND, pos=pos), test_pairs=(16, 48), contexts=400, checkpoints=(steps,))
        for name, pos, steps in (("RoPE", "rope", 300), ("no positions", "none", 150))}),
    "query": ("Three layers that see 4 pairs: where the query stands", {
        name: dict(FAR, reader=dict(layers=3, smear=True, window=9, query_aware=aware))
        for name, aware in (("query last", False), ("query first and last", True))}),
}
PLAIN = dict(pairs=16, train_positions="uniform", contexts=1000)
KNOBS = "train_positions pos alibi window smear query_aware mask sink layers pairs test_pairs steps".split()


def start_lab_worker():
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)


def lab_pool():
    """A process for each core. They ignore Ctrl-C: this process hears it, and leaving the pool ends them."""
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)  # inherited
    pool = get_context("spawn").Pool(os.cpu_count(), start_lab_worker)
    signal.signal(signal.SIGINT, handler)
    return pool


def train_all(args, jobs):
    """train_reader of every job, in order: shared among torchrun's ranks, or among the cores, a thread each."""
    world = dist.get_world_size() if dist.is_initialized() else 1
    rank, results = dist.get_rank() if world > 1 else 0, []
    order = sorted(range(len(jobs)), key=lambda i: -max(jobs[i]["checkpoints"]) * jobs[i]["reader"].get("layers", 2))  # the dear first
    with tqdm(total=len(jobs), desc="readers", unit="reader", disable=args.quiet or rank > 0) as bar:
        with lab_pool() if world == 1 else nullcontext() as pool:
            todo = [jobs[i] for i in order[rank::world]]
            for result in pool.imap(train_reader, todo) if world == 1 else map(train_reader, todo):
                results.append(result)
                bar.update(world)
    if world > 1:
        shares = [None] * world
        dist.all_gather_object(shares, results)
        results = [shares[i % world][i // world] for i in range(len(jobs))]
    return [result for _, result in sorted(zip(order, results), key=lambda pair: pair[0])]


def lab_jobs(args):
    """The default panels, or one reader by the flags that say how it is built."""
    given = {name: getattr(args, name) for name in KNOBS if getattr(args, name) not in (None, False)}
    seeds = range(args.seed, args.seed + (args.seeds or 3))
    if not given:
        jobs = []
        for panel, (_, arms) in LAB.items():
            for arm, settings in arms.items():
                settings = dict(settings)
                late, once = settings.pop("long", ()), settings.pop("once", False)  # the dear ones: the first seed alone
                for seed in seeds if args.full or not once else seeds[:1]:
                    checkpoints = settings["checkpoints"] + (late if seed == seeds[0] or args.full else ())
                    jobs.append({**PLAIN, "test_pairs": (settings.get("pairs", PLAIN["pairs"]),), **settings, "checkpoints": checkpoints,
                                 "panel": panel, "arm": arm, "seed": seed})
        return jobs, {panel: title for panel, (title, _) in LAB.items()}
    reader = {name: given[name] for name in KNOBS[1:9] if name in given}
    pairs, steps = given.get("pairs", 16), given.get("steps", 300)
    if reader.get("mask") == "bidirectional" and reader.get("layers", 2) == 1:
        fail("--mask bidirectional with --layers 1 changes nothing: only the query's row is read")
    if "alibi" in reader and reader.get("pos") != "alibi":
        fail("--alibi is the slope of --pos alibi: give both")
    if "sink" in reader and "window" not in reader:
        fail("--sink lets all see the first token beyond a window: give --window too")
    tests = sorted({pairs, given.get("test_pairs", pairs)})
    job = dict(PLAIN, pairs=pairs, test_pairs=tests, reader=reader, train_positions=given.get("train_positions", "uniform"),
               checkpoints=sorted({max(1, round(steps * i / args.checkpoints)) for i in range(1, args.checkpoints + 1)}), panel="yours",
               arm="yours")
    about = ", ".join(f"{name} {value}" for name, value in given.items())
    return [dict(job, seed=seed) for seed in seeds], {"yours": f"One reader: {about}"}


def lab_curves(results):
    """→ one dict a panel, arm, step and number of pairs: its seeds' accuracies (seeds, pairs), shape over all contexts, flat or not."""
    groups = {}
    for result in results:
        for (step, pairs), correct in result["correct"].items():
            groups.setdefault((result["panel"], result["arm"], step, pairs), []).append((result["seed"], correct))
    return [dict(panel=panel, arm=arm, step=step, pairs=pairs, seeds=[seed for seed, _ in group],
                 accuracy=[correct.mean(0).tolist() for _, correct in group],
                 shape=curve_shape(np.concatenate([correct for _, correct in group]).astype(float), draws=200))
            for (panel, arm, step, pairs), group in groups.items()]


def lab_claims(curves):
    """What the default panels should show → (claim, measured, holds). Every seed alone must pass; the thresholds come from pilot runs."""
    at = {(c["arm"], c["step"], c["pairs"]): 100 * np.array(c["accuracy"]) for c in curves}
    claims = []

    def claim(text, values, holds):
        claims.append((text, ", ".join(f"{v:.0f}" for v in values), bool(holds)))

    def ends(a):
        return np.minimum(a[:, 0], a[:, -1]) - a[:, 1:-1].min(1)

    v = ends(at["ALiBi", 150, 16])
    claim("uniform data, ALiBi, step 150: both ends stand above the lowest middle pair by over 10 points", v, min(v) > 10)
    v = at["ALiBi", 550, 16].min(1)
    claim("the same reader at step 550: no pair under 85", v, min(v) >= 85)
    v = at["uniform", 100, 16].min(1)
    claim("uniform data, all in view, step 100: flat, no pair under 95", v, min(v) >= 95)
    v = ends(at["ends favoured", 100, 16])
    claim("data that favour both ends, step 100: the ends above the lowest middle pair by over 80", v, min(v) > 80)
    v = at["last favoured", 100, 16][:, -1] - at["last favoured", 100, 16][:, 0]
    claim("data that favour the end, step 100: last above first by over 85", v, min(v) > 85)
    v = at["window 17", 150, 16][:, :8].max(1)
    claim("a window of 8 pairs: the first 8 pairs under 10", v, max(v) < 10)
    v = at["window 17", 150, 16][:, 8:].min(1)
    claim("and the last 8 at 95 or more", v, min(v) >= 95)
    v = at["RoPE", 300, 48][:, -1] - at["RoPE", 300, 48][:, 0]
    claim("RoPE, 48 pairs after training on 16: last above first by over 25", v, min(v) > 25)
    v = at["no positions", 150, 48].min(1)
    claim("no positions, 48 pairs: flat, no pair under 99", v, min(v) >= 99)
    v = at["query last", 500, 8][:, :4].mean(1)
    claim("three layers that see 4 pairs, query last, step 500: the pairs out of sight average under 50", v, max(v) < 50)
    v = at["query first and last", 500, 8][:, :4].mean(1)
    claim("the same with the query first and last: they average over 85", v, min(v) > 85)
    return claims


def lab(args):
    """Why would a curve bend? Small readers, trained here on key-value retrieval, each with one thing that bends it, and some with none.

    A demonstration of mechanisms, not a replication of the curves of large models: a fully trained reader with everything in view and
    uniform data is flat, and this task shows that too.
    """
    _, _, rank, world = set_up(args)
    out = Path(args.out or "out/lost_in_middle/lab")
    jobs, titles = lab_jobs(args)
    results = train_all(args, jobs)
    leave_group(world)
    if rank:
        return
    curves = lab_curves(results)
    rows = []
    for curve in curves:
        mean = np.mean(curve["accuracy"], 0)
        bars = "".join(BARS[round(8 * x)] for x in mean[np.linspace(0, len(mean) - 1, min(16, len(mean))).round().astype(int)])
        rows.append((f"{curve['panel']}: {curve['arm']}", curve["step"], curve["pairs"], len(curve["seeds"]), f"|{bars}|",
                     *(f"{100 * x:.0f}" for x in (mean[0], mean[1:-1].min(), mean[-1])), curve["shape"]))
    print_table(("reader", "step", "pairs", "seeds", "accuracy, first … last pair", "first", "lowest middle", "last", "shape"), rows)
    claims = lab_claims(curves) if titles.keys() != {"yours"} else []
    print()
    for text, measured, holds in claims:
        print(f"{'holds' if holds else 'FAILS'}: {text} ({measured}; a seed each)")
    if claims:
        print("So the U comes here from training data that favour the ends, or for a while in the middle of training; recency from a\n"
              "reader that cannot see far or is asked beyond its trained length. With time, all in view and uniform data the curve\n"
              "is flat. A guess at the U of uniform data: early pairs have few tokens before them to be taken for, late ones pay the\n"
              "smallest penalty.")
    seconds = sum(result["seconds"] for result in results)
    figures = dict(curves=curves, claims=claims, readers=len(results), cpu_seconds=seconds)
    path = save_results(out, args, figures)
    print(f"{len(results)} readers, {seconds:.0f} CPU seconds; chance is 3 %, a guess among the values present 1 in the number of pairs")
    print(path, plot_readers(out, args, curves, titles), sep="\n")


def leave_group(world):
    """A rank that leaves first can abort the others."""
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()


def save_rows(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".tmp").write_text("".join(json.dumps(row) + "\n" for row in rows))
    os.replace(path.with_suffix(".tmp"), path)


def percent(x):
    return f"{100 * x:.1f}"


def p_text(p):
    return f"= {p:.4f}" if p >= 0.001 else "< 0.001"


def print_analysis(name, found):
    """The curve, what it amounts to, and which item was answered. found: {metric: analysis} of one setting, the headline metric first."""
    first = next(iter(found.values()))
    others = [other for other in found if other != first["metric"]]
    print(f"{name}: {first['setting']}, {first['total']} item{'s' * (first['total'] != 1)}, n = {first['n']} at every position, answers of "
          f"{first['mean_words']:.1f} words on average")
    print_table((f"gold at ({first['metric']}, %)", "accuracy", "95 % interval", *others), [
        (str(p) if len(first["positions"]) > 1 else first["setting"], percent(a), "{} – {}".format(*map(percent, span)),
         *(percent(found[other]["accuracy"][i]) for other in others))
        for i, (p, a, span) in enumerate(zip(first["positions"], first["accuracy"], first["interval"]))])
    if s := first.get("summary"):
        words = ["{} {} [{}, {}]".format(what, *map(percent, s[what])) for what in ("spread", "primacy", "recency") if what in s]
        print(f"shape: {s['shape']}. In points: {', '.join(words)}. p that the position does not matter {p_text(s['flat_p'])}"
              + (f"; McNemar, best against worst, p {p_text(s['mcnemar_p'])}" if "mcnemar_p" in s else "") + ".")
    if "matrix" in first:
        matrix, positions = np.array(first["matrix"]), first["positions"]
        rest = [i for i in range(first["total"]) if i not in positions]
        print("which item was answered (rows: where the gold stood):")
        print_table(("gold at", *map(str, positions), *(["elsewhere"] if rest else []), "none", "accuracy beyond habit, %"), [
            (str(g), *map(str, row[positions]), *([str(row[rest].sum())] if rest else []), str(row[-1]), percent(c))
            for g, row, c in zip(positions, matrix, first["corrected"])])
        habit = np.array(first["accuracy"]) - first["corrected"]
        most = int(habit.argmax())
        if habit[most] > 0.1:
            print(f"a habit, not retrieval: {percent(habit[most])} of the {percent(first['accuracy'][most])} points with the gold at "
                  f"{positions[most]} are answers of item {positions[most]} wherever the gold stands")
    if first["left_out"]:
        reasons = Counter(first["left_out"].values()).most_common(2)
        print(f"left out at all positions: {len(first['left_out'])} ({', '.join(f'{n} × {why[:80]}' for why, n in reasons)}): "
              f"{', '.join(list(first['left_out'])[:8])}{' …' * (len(first['left_out']) > 8)}")
    if first["empty_answers"] and first["metric"] == "subspan":
        print(f"questions with an answer that normalises to nothing, so that any text counts as right (as in the authors' script): "
              f"{first['empty_answers']}")


def metrics_for(setting, metric=None):
    usual = ("kv", "kv_first") if setting == "kv" else ("subspan", "word_subspan", "em", "f1")
    return (metric, *(other for other in usual if other != metric)) if metric else usual


def analyse_run(rows, args):
    """→ {setting: {metric: analysis}}, {setting: correct under the first metric}"""
    found, correct = {}, {}
    for setting in dict.fromkeys(row["setting"] for row in rows):
        own = [row for row in rows if row["setting"] == setting]
        for metric in metrics_for(setting, args.metric):
            analysis, scores = analyse_curve(own, metric, not args.no_lstrip, args.seed)
            found.setdefault(setting, {})[metric] = analysis
            correct.setdefault(setting, scores)
    return found, correct


def report_run(name, found):
    for analyses in found.values():
        print_analysis(name, analyses)
    curve = next(iter(found.values()))
    curve = next(iter(curve.values()))
    for control in ("closedbook", "oracle"):
        if control in found and curve["setting"] != control:
            value = next(iter(found[control].values()))["accuracy"][0]
            print(f"{control} {percent(value)}; the worst position is {percent(min(curve['accuracy']) - value)} points from it")


def run(args):
    """Sections 2 and 3: one curve of accuracy against the position of the gold item, for one model."""
    device, _, rank, world = set_up(args)
    out = Path(args.out or f"out/lost_in_middle/{args.setting}")
    if args.data == "paper" and args.setting == "qa" and args.docs not in (10, 20, 30):
        fail(f"--docs {args.docs}: the authors' files have 10, 20 or 30 documents")
    if args.data == "paper" and args.setting == "kv" and args.keys not in (75, 140, 300):
        fail(f"--keys {args.keys}: the authors' files have 75, 140 or 300 pairs")
    if args.compare_paper:  # before anything is asked
        paper_curve(args, args.setting, {"kv": args.keys, "qa": args.docs}.get(args.setting))
    settings = [args.setting, *(["closedbook", "oracle"] if args.controls and args.setting == "qa" else [])]
    total = {"kv": args.keys, "qa": args.docs}.get(args.setting, 1)
    examples = load_kv(args, total) if args.setting == "kv" else load_qa(args, total)
    requests = requests_of(args, args.setting, examples, total, parse_positions(args.positions, total))
    for control in settings[1:]:
        requests += requests_of(args, control, [dict(example, others=[]) for example in examples], 1, [0])
    rows = ask_all(args, device, requests, out)
    leave_group(world)
    if rank:
        return
    save_rows(out / "responses.jsonl", rows)
    found, correct = analyse_run(rows, args)
    report_run(args.model, found)
    report_failures(rows, save_results(out, args, dict(analysis=found)), plot_curves(out, args, {args.model: found}))


def report_failures(rows, *paths):
    """Prints the paths, last on stdout; exit status 1 where calls failed."""
    print(*paths, sep="\n")
    failed = [row for row in rows if row.get("missing") not in (None, "overflow")]
    if failed:
        print(f"{len(failed)} calls failed ({failed[0]['missing']}): run the command again to ask them alone", file=sys.stderr)
        raise SystemExit(1)


def finish_run(out, args, figures):
    print(save_results(out, args, dict(analysis=figures)), plot_curves(out, args, figures), sep="\n")


def load_runs(args):
    """{folder: rows of its responses.jsonl}"""
    if not args.runs:
        fail(f"{args.task} needs the folder of a run, as in: {args.task} out/lost_in_middle/kv")
    runs = {}
    for folder in args.runs:
        path = Path(folder) / "responses.jsonl"
        if not path.exists():
            fail(f"{folder} has no responses.jsonl: it is not the folder of a run (one that `run` or `needle` wrote)")
        runs[folder] = [row for _, row in read_examples(path)]
        if not runs[folder] or not all({"example", "setting", "position", "total", "answers"} <= row.keys() for row in runs[folder]):
            fail(f"{path} is not the responses of a run")
    return runs


def score(args):
    """Scores cached answers again, under any metric; asks nobody."""
    out, figures = Path(args.out or "out/lost_in_middle/score"), {}
    for folder, rows in load_runs(args).items():
        figures[folder], _ = analyse_run(rows, args)
        report_run(folder, figures[folder])
    finish_run(out, args, figures)


def plot(args):
    """The curves of several runs in one figure, with the paper's as overlay."""
    figures = {folder: analyse_run(rows, args)[0] for folder, rows in load_runs(args).items()}
    finish_run(Path(args.out or "out/lost_in_middle/plot"), args, figures)


def report(args):
    """A table in Markdown of several runs, and each run against the first on the examples that both have, paired."""
    out, figures, base, lines = Path(args.out or "out/lost_in_middle/report"), {}, None, []
    for folder, rows in load_runs(args).items():
        figures[folder], correct = analyse_run(rows, args)
        setting = next(iter(correct))
        a, scores = next(iter(figures[folder][setting].values())), correct[setting]
        spread, named = (percent(a["summary"]["spread"][0]), a["summary"]["shape"]) if "summary" in a else ("–", "–")
        lines += [f"| run | setting | metric | n | {' | '.join(f'{p}' for p in a['positions'])} | spread | shape |",
                  f"|{'---|' * (len(a['positions']) + 6)}",
                  f"| {folder} | {setting}, {a['total']} | {a['metric']} | {a['n']} | {' | '.join(map(percent, a['accuracy']))} | "
                  f"{spread} | {named} |", ""]
        place_of = dict(zip(a["ids"], range(a["n"])))
        if base is None:
            base = folder, place_of, scores, a["positions"]
            continue
        shared = [i for i in base[1] if i in place_of]
        if a["positions"] != base[3] or not shared:
            lines += [f"{folder} and {base[0]} share no examples at the same positions: not compared.", ""]
            continue
        gain = scores[[place_of[i] for i in shared]] - base[2][[base[1][i] for i in shared]]
        spans = [paired_bootstrap(gain[:, [j]], lambda m: m[..., 0], args.seed) for j in range(gain.shape[1])]
        lines += [f"{folder} less {base[0]}, points, on {len(shared)} shared examples: " + "; ".join(
            f"at {p} {percent(v)} [{percent(low)}, {percent(high)}]" for p, (v, low, high) in zip(a["positions"], spans)) + ".", ""]
    print("\n".join(lines))
    out.mkdir(parents=True, exist_ok=True)
    (out / "report.md").write_text("\n".join(lines))
    finish_run(out, args, figures)


def show(args):
    """The raw answers of a run: --position, --wrong, --limit."""
    for folder, rows in load_runs(args).items():
        shown = 0
        for row in rows:
            metric = metrics_for(row["setting"], args.metric)[0]
            right = "text" in row and score_answer(metric, row["text"], row["answers"], not args.no_lstrip)
            if args.position not in (None, row["position"]) or args.wrong and right or shown == (args.limit or 10):
                continue
            shown += 1
            print(f"{folder}: {row['setting']}, example {row['example']}, gold at {row['position']} of {row['total']}, "
                  f"{'no answer' if 'text' not in row else 'right' if right else 'wrong'}\n  gold {' | '.join(row['answers'])}\n"
                  f"  said {row.get('text', row.get('missing'))!r}")
        if not shown:
            print(f"{folder}: no such answer")


def write_set(args, name, rows, figures):
    """rows as .jsonl.gz, byte by byte the same for the same seed."""
    out = Path(args.out or f"out/lost_in_middle/{args.task}")
    out.mkdir(parents=True, exist_ok=True)
    with open(out / name, "wb") as raw, gzip.GzipFile("", "wb", 9, raw, mtime=0) as file:
        file.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())
    digest = hashlib.sha256((out / name).read_bytes()).hexdigest()
    print(f"{len(rows)} rows, sha256 {digest[:16]}")
    print(save_results(out, args, dict(rows=len(rows), sha256=digest, **figures)), out / name, sep="\n")


def make_kv(args):
    """Section 3: random pairs in the authors' format."""
    set_up(args)
    rows = make_pairs(args.limit or args.examples, args.keys, args.seed, args.key_style)
    write_set(args, f"kv-retrieval-{args.keys}_keys.jsonl.gz", rows, dict(keys=args.keys, key_style=args.key_style))


def make_qa(args):
    """A multi-document set in the authors' format, with the gold at --gold_index: from retrieval results (--retrieved), from the
    oracle file (--from_oracle: distractors are other questions' passages), or from --data."""
    set_up(args)
    if args.retrieved and args.from_oracle:
        fail("--retrieved and --from_oracle: give one")
    args.data = download(RETRIEVED) if args.retrieved == "paper" else args.retrieved or args.from_oracle or args.data
    args.distractors = "random" if args.from_oracle else args.distractors
    if args.gold_index >= args.docs:
        fail(f"--gold_index {args.gold_index}: with --docs {args.docs} the indices go from 0 to {args.docs - 1}")
    rows = []
    for example in load_qa(args, args.docs):
        docs = place(example["others"], dict(example["gold"], hasanswer=True), args.gold_index)
        rows.append(dict(question=example["question"], answers=example["answers"],
                         ctxs=[dict(doc, isgold=i == args.gold_index) for i, doc in enumerate(docs)]))
    write_set(args, f"qa-{args.docs}_documents_gold_at_{args.gold_index}.jsonl.gz", rows, dict(docs=args.docs, gold_index=args.gold_index))


def whole_numbers(text, flag_name, low, high=10**6):
    """ "1,5,10" → sorted ints in a range."""
    try:
        found = sorted({int(x) for x in text.split(",")})
    except ValueError:
        fail(f"{flag_name} {text}: whole numbers, as in 1,5,10")
    if not all(low <= x <= high for x in found):
        fail(f"{flag_name} {text}: numbers from {low} to {high}")
    return found


def needle(args):
    """A needle in a haystack: an invented fact at some depth of the help texts that every Python ships. Ours, not the paper's."""
    from pydoc_data.topics import topics

    device, _, rank, world = set_up(args)
    out = Path(args.out or "out/lost_in_middle/needle")
    depths, lengths = whole_numbers(args.depths, "--depths", 0, 100), whole_numbers(args.lengths, "--lengths", 10, 60_000)
    manual = " ".join(topics[name] for name in sorted(topics)).split()
    requests = []
    for length in lengths:
        words = manual[:length]
        breaks = [0, *(i for i, word in enumerate(words, 1) if word[-1] in ".:"), len(words)]  # between sentences
        for fact in builtin_facts()[: args.limit or 10]:
            for depth in depths:
                at = min(breaks, key=lambda i: abs(i - depth / 100 * length))
                text = " ".join(place(words, fact["gold"]["text"], at))
                requests.append(dict(
                    id=f"needle {length} {fact['id']} {depth}", example=fact["id"], setting=f"needle {length}", position=depth, total=101,
                    prompt=f"Answer the question from the text alone.\n\n{text}\n\nQuestion: {fact['question']}\nAnswer:", closed=False,
                    values=fact["answers"], gold=fact["answers"][0], answers=fact["answers"], max_tokens=args.max_tokens))
    rows = ask_all(args, device, requests, out)
    leave_group(world)
    if rank:
        return
    save_rows(out / "responses.jsonl", rows)
    grid = np.full((len(lengths), len(depths)), np.nan)
    for i, length in enumerate(lengths):
        for j, depth in enumerate(depths):
            cell = [score_answer(args.metric or "subspan", r["text"], r["answers"]) for r in rows
                    if r["setting"] == f"needle {length}" and r["position"] == depth and "text" in r]
            grid[i, j] = np.mean(cell) if cell else np.nan
    print_table(("words", *(f"depth {d} %" for d in depths)),
                [(str(length), *("–" if x != x else percent(x) for x in row)) for length, row in zip(lengths, grid)])
    missing = [r for r in rows if "missing" in r]
    if missing:
        print(f"{len(missing)} of {len(rows)} without an answer ({missing[0]['missing']}); a cell is the mean of those that have one")
    cells = [[None if x != x else x for x in row] for row in grid.tolist()]
    report_failures(rows, save_results(out, args, dict(lengths=lengths, depths=depths, accuracy=cells)),
                    plot_needle(out, args, grid, lengths, depths))


def odqa(args):
    """Section 5: as more documents are retrieved, does the reader gain what the retriever finds?"""
    device, _, rank, world = set_up(args)
    out, ks = Path(args.out or "out/lost_in_middle/odqa"), whole_numbers(args.k, "--k", 1)
    if args.retrieved:
        path = download(RETRIEVED) if args.retrieved == "paper" else args.retrieved
        rows = [dict(check_question(row, where), id=where.rsplit(":", 1)[1]) for where, row in islice(read_examples(path), args.limit)]
    else:
        rows = builtin_facts()
        pool = [row["gold"] for row in rows]
        for i, row in enumerate(rows):  # a retriever that reads no names: it knows the kind of passage, and no more
            shuffled = random.Random(f"{args.seed} {row['id']}").sample(pool, len(pool))
            row["ctxs"] = by_overlap(FACTS[i % len(FACTS)][1].format(s=""), shuffled)
        rows = rows[: args.limit]
    requests, found_at = [], []
    for row in rows:
        if len(row["ctxs"]) < ks[-1]:
            fail(f"row {row['id']} has {len(row['ctxs'])} documents, --k {args.k} needs {ks[-1]}")
        hits = [has_answer(doc, row["answers"]) for doc in row["ctxs"]]
        found_at.append(hits.index(True) if any(hits) else len(hits))
        for k in ks:
            docs = row["ctxs"][:k]
            if args.order == "shuffled":
                docs = random.Random(f"{args.seed} {row['id']} {k}").sample(docs, k)
            elif args.order == "ends":  # the most relevant at both ends, the least in the middle
                docs = docs[::2] + docs[1::2][::-1]
            hits = [has_answer(doc, row["answers"]) for doc in docs]
            values = [doc.get("answer") for doc in docs]
            requests.append(dict(
                id=f"odqa {row['id']} {k} {args.order}", example=row["id"], setting="odqa", position=k, total=ks[-1],
                answers=row["answers"], prompt=qa_prompt(row["question"], docs, args.query_aware, args.mention_random_order),
                values=values if all(values) else [], gold=row["answers"][0], closed=not any(hits), among=k,
                place=hits.index(True) if any(hits) else 0, max_tokens=args.max_tokens))
    rows = ask_all(args, device, requests, out)
    leave_group(world)
    if rank:
        return
    save_rows(out / "responses.jsonl", rows)
    found, correct = analyse_curve(rows, args.metric or "subspan", not args.no_lstrip, args.seed)
    recall = [float(np.mean([at < k for at in found_at])) for k in ks]
    print_table(("documents", "recall, %", "reader, %", "95 % interval"), [
        (str(k), percent(r), percent(a), "{} – {}".format(*map(percent, span)))
        for k, r, a, span in zip(ks, recall, found["accuracy"], found["interval"])])
    for low, high in zip(range(len(ks) - 1), range(1, len(ks))):
        gain = paired_bootstrap(correct, lambda m, i=low, j=high: m[..., j] - m[..., i], args.seed)
        print(f"from {ks[low]} to {ks[high]} documents: recall {percent(recall[high] - recall[low])}, reader {percent(gain[0])} "
              f"[{percent(gain[1])}, {percent(gain[2])}] points")
    report_failures(rows, save_results(out, args, dict(k=ks, recall=recall, reader=found)), plot_odqa(out, args, ks, recall, found))


# ============================================================================================== figures


def plot_readers(out, args, curves, titles):
    panels = list(dict.fromkeys(curve["panel"] for curve in curves))

    def draw(axes):
        for ax in axes.flat[len(panels):]:
            ax.axis("off")
        for ax, panel in zip(axes.flat, panels):
            own = [curve for curve in curves if curve["panel"] == panel]
            arms, steps = (list(dict.fromkeys(curve[key] for curve in own)) for key in ("arm", "step"))
            for i, curve in enumerate(own):
                of_arm = [c for c in own if c["arm"] == curve["arm"]]
                color = f"C{arms.index(curve['arm']) if len(arms) > 1 else i}"
                style = ("-", "--", ":", "-.")[(len(of_arm) - 1 - of_arm.index(curve)) % 4] if len(arms) > 1 else "-"
                x, accuracy = range(curve["pairs"]), 100 * np.array(curve["accuracy"])
                if len(accuracy) > 1:
                    ax.plot(x, accuracy.T, color=color, ls=style, lw=0.6, alpha=0.4)
                label = ", ".join([*([curve["arm"]] if len(arms) > 1 else []), *([f"step {curve['step']}"] if len(steps) > 1 else []),
                                   *([f"{curve['pairs']} pairs"] if len({c["pairs"] for c in own}) > 1 else [])])
                ax.plot(x, accuracy.mean(0), color=color, ls=style, lw=2, label=label or f"step {curve['step']}")
            ax.set(title=titles[panel], xlabel="which pair is asked for (0 = first read)", ylabel="accuracy, %", ylim=(-3, 104))
            ax.grid(alpha=0.3)
            ax.legend(fontsize=7, title="thin: single seeds", title_fontsize=7)

    rows = -(-len(panels) // 3)
    return figure(out, "lab.png", args, draw, nrows=rows, ncols=min(3, len(panels)), squeeze=False,
                  figsize=(5 * min(3, len(panels)), 3.9 * rows))


def paper_curve(args, setting, total):
    """(indices, accuracies in %) of --compare_paper."""
    table = PAPER.get((setting, total), {})
    if args.compare_paper not in table:
        have = "; ".join(f"{s} with {n}: {', '.join(models)}" for (s, n), models in PAPER.items())
        fail(f"--compare_paper {args.compare_paper}: the paper has no such curve of {setting} with {total} items ({have})")
    return PAPER_POSITIONS[total], table[args.compare_paper]


def plot_curves(out, args, runs):
    """runs: {name: {setting: {metric: analysis}}}"""
    headline = {name: [next(iter(found.values())) for found in settings.values()] for name, settings in runs.items()}
    first = next(iter(headline.values()))[0]
    matrix = np.array(first["matrix"]) if "matrix" in first and len(runs) == 1 else None

    def draw(axes):
        ax = axes[0][0]
        for i, (name, analyses) in enumerate(headline.items()):
            for a in analyses:
                accuracy, span = 100 * np.array(a["accuracy"]), 100 * np.array(a["interval"])
                if len(a["positions"]) > 1:
                    ax.errorbar(a["positions"], accuracy, abs(span.T - accuracy), marker="o", capsize=3,
                                color=f"C{i}", label=f"{name} (n = {a['n']})")
                else:
                    style = ":" if a["setting"] == "closedbook" else "--"
                    ax.axhline(accuracy[0], color=f"C{i}", ls=style, label=f"{name}, {a['setting']}")
        if args.compare_paper:
            ax.plot(*paper_curve(args, first["setting"], first["total"]), "k^-", alpha=0.6, label=f"paper: {args.compare_paper}")
            for value, style, what in zip(PAPER_CONTROLS.get(args.compare_paper, ()), (":", "--"), ("closed-book", "oracle")):
                if first["setting"] == "qa":
                    ax.axhline(value, color="k", ls=style, alpha=0.4, label=f"paper: {what}")
        ax.set(xlabel=f"index of the gold item (0 to {first['total'] - 1})", ylabel=f"accuracy ({first['metric']}), %, 95 % intervals",
               ylim=(-3, 104), title={"kv": "Key-value retrieval", "qa": "Multi-document QA"}.get(first["setting"], first["setting"]))
        ax.grid(alpha=0.3)
        ax.legend(fontsize=8)
        if matrix is not None:
            ax, rest = axes[0][1], [i for i in range(first["total"]) if i not in first["positions"]]
            shown = np.column_stack([matrix[:, first["positions"]], matrix[:, rest].sum(1), matrix[:, -1]]) / matrix.sum(1, keepdims=True)
            ax.imshow(shown, cmap="Blues", vmin=0, vmax=1, aspect="auto")
            for (i, j), share in np.ndenumerate(shown):
                ax.text(j, i, f"{100 * share:.0f}", ha="center", va="center", color="white" if share > 0.5 else "black")
            ax.set_xticks(range(shown.shape[1]), [*first["positions"], "other", "none"])
            ax.set_yticks(range(len(shown)), first["positions"])
            ax.set(xlabel="item that was answered", ylabel="where the gold stood", title="What was answered, % of each row")

    return figure(out, "curve.png", args, draw, ncols=1 + (matrix is not None), squeeze=False, figsize=(6 + 5 * (matrix is not None), 4))


def plot_needle(out, args, grid, lengths, depths):
    def draw(ax):
        ax.imshow(100 * grid, cmap="RdYlGn", vmin=0, vmax=100, aspect="auto")
        for (i, j), value in np.ndenumerate(grid):
            ax.text(j, i, "–" if value != value else f"{100 * value:.0f}", ha="center", va="center")
        ax.set_xticks(range(len(depths)), depths)
        ax.set_yticks(range(len(lengths)), lengths)
        ax.set(xlabel="depth of the needle, % of the text", ylabel="length of the text, words",
               title=f"Needle in a haystack, {args.model}: % found")

    return figure(out, "needle.png", args, draw, figsize=(6.5, 1.6 + 0.5 * len(lengths)))


def plot_odqa(out, args, ks, recall, found):
    def draw(ax):
        accuracy, span = 100 * np.array(found["accuracy"]), 100 * np.array(found["interval"])
        ax.plot(ks, 100 * np.array(recall), "k^--", label="retriever: recall")
        ax.errorbar(ks, accuracy, abs(span.T - accuracy), marker="o", capsize=3,
                    label=f"reader: {args.model}, {args.order}")
        ax.set_xticks(ks, ks)
        ax.set(xlabel="documents retrieved", ylabel="%", ylim=(-3, 104), title="More documents: what is found and what is used")
        ax.grid(alpha=0.3)
        ax.legend()

    return figure(out, "odqa.png", args, draw, figsize=(6, 4))


# ============================================================================================== command line

TASKS = dict(lab=lab, run=run, score=score, plot=plot, report=report, show=show, make_kv=make_kv, make_qa=make_qa, needle=needle, odqa=odqa)


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.error = fail  # one line, exit code 2
    flag, count = parser.add_argument, number(int, 1)
    flag("task", nargs="?", choices=TASKS, default="lab", help="lab (default): why a curve bends, on readers trained here; run: a model's "
         "curve; score, plot, report, show: runs again, asking nobody; make_kv, make_qa: data; needle: depth × length; odqa: section 5")
    flag("runs", nargs="*", help="score, plot, report, show: folders that run wrote")
    client_flags(flag)
    flag("--setting", choices=("kv", "qa", "closedbook", "oracle"), default="kv", help="run: key-value pairs (default), documents, no "
         "documents, the gold document alone")
    flag("--data", default="builtin", help="builtin (default: pairs made here, 60 invented facts), paper (the authors' files, a "
         "download), or a .jsonl or .jsonl.gz file in their format")
    flag("--docs", type=count, help="qa: documents (10; gpt2: 5; the paper's 10, 20, 30)")
    flag("--keys", type=number(int, 2, 4500), help="kv: pairs (75; gpt2: 15; the paper's 75, 140, 300)")
    flag("--key_style", choices=("uuid", "short"), help="kv, made here: UUIDs (the paper's), or 4 digits, the default for gpt2: better "
         "below a billion weights")
    flag("--positions", default="auto", help="run: indices of the gold item from 0, as 0,4,9; all; auto: the paper's, else five")
    flag("--limit", type=count, help="the first so many examples; show: so many answers (10); needle: so many needles (10)")
    flag("--examples", type=count, default=500, help="kv, made here: how many, if no --limit (500, the paper's)")
    flag("--query_aware", action="store_true", help="run, odqa, lab: the query also in front (section 4.2)")
    flag("--order", choices=("ranked", "shuffled", "ends"), default="ranked", help="of the other documents; ends, odqa: the best "
         "at both ends")
    flag("--mention_random_order", action="store_true", help="qa: the prompt says that the order is random (appendix C)")
    flag("--distractors", choices=("retrieved", "random"), default="retrieved", help="qa: near misses, or other questions' "
         "documents (appendix B)")
    flag("--controls", action="store_true", help="run qa: ask closed-book and with the gold document alone, too")
    flag("--scoring", choices=("generate", "rank"), default="generate", help="run: what the model writes, or which value of the context it "
         "finds likeliest")
    flag("--max_tokens", type=count, default=100, help="of an answer (100, the paper's)")
    flag("--on_overflow", choices=("skip", "error"), default="skip", help="a prompt beyond the window: leave its example out at "
         "all positions, or stop")
    flag("--metric", choices=METRICS, help="the headline metric (kv: kv; else subspan: the paper's)")
    flag("--no_lstrip", action="store_true", help="keep blank lines before an answer, as two of the authors' scripts do")
    flag("--compare_paper", metavar="MODEL", help="run, score, plot: overlay the paper's curve, as gpt-3.5-turbo or mpt-30b-instruct")
    flag("--position", type=number(int, 0), help="show: only answers with the gold here")
    flag("--wrong", action="store_true", help="show: only wrong answers")
    flag("--retrieved", metavar="FILE", help="odqa, make_qa: retrieval results, or paper (a large download)")
    flag("--from_oracle", metavar="FILE", help="make_qa: the oracle file; the distractors are its other passages")
    flag("--gold_index", type=number(int, 0), default=0, help="make_qa: where the gold document stands, from 0")
    flag("--k", default="1,2,5,10,20", help="odqa: numbers of documents")
    flag("--depths", default="0,25,50,75,100", help="needle: percent of the text before it")
    flag("--lengths", default="100,250,500", help="needle: words of text")
    flag("--full", action="store_true", help="lab: all seeds of the dear panels to their end")
    flag("--seeds", type=number(int, 1, 100), help="lab: number of seeds (3)")
    flag("--train_positions", choices=("uniform", "ushape", "recency", "primacy"), help="lab: which pairs are asked for in training. This "
         "and the next ten train one reader of your own")
    flag("--pos", choices=("learned", "rope", "alibi", "none"), help="lab: position encoding (learned)")
    flag("--alibi", type=number(float, 0.1), help="lab: head i of h has slope 2^(−alibi·i/h) (8); smaller is steeper")
    flag("--window", type=number(int, 2), help="lab: tokens that a token sees, itself included (all)")
    flag("--smear", action="store_true", help="lab: a value's token carries its key too")
    flag("--mask", choices=("causal", "bidirectional"), help="lab: bidirectional lets the context see the query")
    flag("--sink", action="store_true", help="lab: all see the first token, window or not")
    flag("--layers", type=number(int, 1, 12), help="lab: 2")
    flag("--pairs", type=number(int, 3, 64), help="lab: pairs in training (16)")
    flag("--test_pairs", type=number(int, 3, 64), help="lab: pairs in a second test")
    flag("--steps", type=count, help="lab: training steps (300)")
    flag("--checkpoints", type=count, default=4, help="lab: measured so many times on the way")
    flag("--device", default="auto", help="gpt2: auto is cuda, else mps, else cpu; lab: a CPU")
    flag("--dtype", choices=("auto", "float32", "bfloat16"), default="auto", help="gpt2: auto is what its weights are, float32")
    flag("--seed", type=number(int, 0, 2**31 - 1), default=0, help="of pairs, orders, bootstrap and readers")
    flag("--out", help="folder for answers, results and figure (out/lost_in_middle/<task or setting>)")
    flag("--no_plot", action="store_true", help="write no figure")
    flag("--quiet", action="store_true", help="no progress bars")
    args = parser.parse_args(argv)
    local = (args.model or "").startswith("gpt2")
    args.docs = (args.docs or (5 if local else 10)) if args.setting != "oracle" or args.task != "run" else 1
    args.keys, args.key_style = args.keys or (15 if local else 75), args.key_style or ("short" if local else "uuid")
    if args.out and Path(args.out).is_file():
        fail(f"--out {args.out} is a file, and a folder is needed")
    if args.runs and args.task not in ("score", "plot", "report", "show"):
        fail(f"{args.task} takes no {args.runs[0]}: folders of runs are for score, plot, report and show")
    if args.task in ("run", "needle", "odqa") and not args.model:
        fail(f"{args.task} needs --model: gpt2, http, http:NAME, or a fake as echo:u:0.9, echo:recency:0.9, echo:first")
    if (args.model or "").startswith("echo:"):
        parse_echo(args.model.removeprefix("echo:"))
    if args.order == "ends" and args.task != "odqa":
        fail("--order ends is for odqa: in run the gold document stands where --positions says")
    if args.query_aware and args.mention_random_order:
        fail("--query_aware and --mention_random_order together have no prompt in the paper: choose one")
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
