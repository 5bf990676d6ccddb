"""Backpack language models: sense vectors that one can read and edit (Hewitt, Thickstun, Manning, Liang; arXiv 2305.16765).

The problem. A Transformer mixes what it knows of a word with its context at every layer. An edit for one context does something else in
the next, so there is no place where "what this word means to the model" could be read or changed.

The idea. Give every word of the vocabulary k sense vectors that never see a context, and let the next word depend on the text only through
a weighted sum of them. A whole Transformer is used, but only to find the weights, which are non-negative and sum to 1 for each sense.
The logits are linear in the senses: read a sense by projecting it on the vocabulary, scale it or swap a direction in it, and the effect
has the same direction in every context, by a known amount.

    C(x)_l, l = 1…k                                  senses of word x: a network of x's embedding alone
    α_lij = softmax_{j ≤ i}(⟨q_li, k_lj⟩/√e)         q, k: one linear map of a Transformer's last layer, e = d/k
    o_i = Σ_l Σ_{j ≤ i} α_lij·C(x_j)_l               logits_i = E·o_i, E the table of embeddings

    log-odds = Σ_j Σ_l α_lij·⟨E_a − E_b, C(x_j)_l⟩   every term of it: `attribute`; a factor w on a sense adds (w − 1)·its terms: `debias`
    C̃ = C + ⟨C, E_r⟩/|E_r|²·(E_a·|E_r|²/|E_a|² − E_r)  a fact moved from word r to word a: `edit`

How to run it.

    python backpack.py                           train small Backpacks and Transformers, read senses, debias, edit (2 minutes, 2 CPU cores)
    python backpack.py senses nurse bread        on the demo's model; also: attribute, debias, edit, topic, sample, eval, convert
    python backpack.py senses build --sense 14 --ckpt public         the authors' model (684 MB); similarity, eval lambada …, debias …
    python backpack.py ablate_k | bench          how many senses; what they cost
    torchrun --nproc_per_node=8 backpack.py train --size small --data fineweb:100          the paper's recipe

What we measured (2 shared cores of an AMD EPYC, torch 2.13.0, `python backpack.py --seed 0`, 1, 2):

    the paper, 170M weights                              here               seed 0            seed 1            seed 2
    perplexity 20.1, the Transformer inside 20.2         loss, Python's documentation, k = 16
                                                         Backpack           2.682             2.677             2.657
                                                         inner Transformer  2.765             2.695             2.737
                                                         as many weights    2.659             2.611             2.603
    bias ratio 4.34, one sense removed 2.88, fitted 2.16 generated world    13.6, 1.3, 1.1    9.7, 2.3, 1.1     9.2, 1.2, 1.0
                                                         best other sense   12.7              4.7               8.9
    Transformer 7.02, gender projected out 6.72          Transformer        9.5, 9.2          7.0, 6.9          7.0, 6.6
    MacBook: Apple → HP, shown by samples                P(hp), 3 prompts   0.88              0.93              0.96
                                                         others move by     < 0.0001          < 0.0001          < 0.0001
    k = 1, 4, 16: perplexity 38.5, 29.3, 26.0            `ablate_k --seeds 3`: 19.8, 18.0, 16.1; inner Transformer 16.5

The true bias ratio of the generated world is 9. Senses are located, and factors fitted, on other prompts than those that count; the other
products are asked for behind a sentence with the edited one.

What did not hold at this scale. A Transformer with as many weights as the Backpack is ahead in all three runs; the gain is over the smaller
one that it contains, which is the paper's comparison. Topic control works for one of three bags of words (`topic --samples 100`,
strengths 0 to 3: class instance method 0.9, 2.6, 3.9, 5.0 % of the tokens; string bytes unicode 0.2, 0.3, 0.4, 0.1; import module package
0.3, 0.3, 0.2, 0.1), and for all the texts grow monotonous; the generated world's topics it makes rarer. Most senses of so small models
speak of the next word; of the paper's other kinds (objects of verbs, relatedness) they show little.

What it costs (`python backpack.py bench`, nano; `--size micro --steps 1`, same machine, one thread): senses of 995 distinct among 8,192
tokens, forward and backward, 42 ms, of every token 249 (micro: 0.98 s, 6.9 s). The single product mixes 1.1 (1.0) times as fast as one
product a sense. 200 tokens with a cache, all senses known: 0.21 s, all anew 0.78 (2.3 s, 16.3 s). A forward pass takes 1.7 (1.6) times the
Transformer's; the paper: 1.4. On a GPU: not measured.

Where this file differs from the paper and its code: no dropout; rows of E that pad the vocabulary have no probability in training; bfloat16
without loss scaling; the senses of a batch are computed once for each distinct token (`--no_dedup`: for each position). Weights N(0, 0.02)
as there, but wider for the small models, which at 0.02 learn nothing for hundreds of steps.
"""

import argparse
import ast
import hashlib
import json
import math
import os
import pickle
import platform
import re
import subprocess
import sys
import sysconfig
import time
import types
import urllib.request
import warnings
import zipfile
from collections import Counter
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

try:
    from kernels.linear_cross_entropy import linear_cross_entropy as fused_linear_cross_entropy
    from kernels.sense_mix import sense_mix as fused_sense_mix
except ImportError:  # copied alone, or no Triton here: the plain versions below compute the same
    fused_linear_cross_entropy = fused_sense_mix = None

# ============================================================================================== the method: senses and their mixture


class SenseMLP(nn.Module):
    def __init__(self, d_in, d_hidden, d_out):
        super().__init__()
        self.c_fc, self.c_proj = nn.Linear(d_in, d_hidden), nn.Linear(d_hidden, d_out)

    def forward(self, x):
        return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))


class SenseNetwork(nn.Module):
    """C: token embeddings (..., d) → senses (..., n_sense, d). It sees neither context nor position (section 2.2, appendix A.1)."""

    def __init__(self, d, n_sense, sense_width=4):
        super().__init__()
        self.n_sense = n_sense
        self.ln_a, self.ln_b, self.ln_c = nn.LayerNorm(d), nn.LayerNorm(d), nn.LayerNorm(d)
        self.mlp, self.out = SenseMLP(d, sense_width * d, d), SenseMLP(d, sense_width * d, n_sense * d)

    def forward(self, x):
        x = x + self.ln_a(x)  # subtle: no use is known for this residual; all released weights were trained with it
        x = x + self.mlp(self.ln_b(x))
        return self.out(self.ln_c(x)).unflatten(-1, (self.n_sense, -1))  # sense-major


def sense_weights(query, key, scale):
    """α, non-negative, Σ_j α_lij = 1 for each sense l: softmax over j ≤ i of scale·⟨query_li, key_lj⟩, in float32 or wider.

    query: (batch, n_query, n_sense, e), of the last n_query positions; key: (batch, seq, n_sense, e).
    → (batch, n_query, n_sense, seq), 0 for j > i.
    """
    scores = torch.einsum("bile,bjle->bilj", query, key) * scale
    n_query, n_key = query.size(1), key.size(1)
    future = torch.ones(n_query, n_key, dtype=torch.bool, device=query.device).triu(1 + n_key - n_query)
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    return scores.masked_fill(future[:, None], -math.inf).softmax(-1)


def sense_mix(query, key, table, index, scale):
    """o_i = Σ_l Σ_{j ≤ i} α_lij·C(x_j)_l as one matrix product over (l, j): no (n_sense, seq, d) of outputs is kept.

    query, key, scale: of sense_weights. table: (rows, n_sense, d), senses of distinct tokens; index: (batch, seq) int64, the row of
    each position's token. → (batch, n_query, d).
    """
    alpha = sense_weights(query, key, scale).to(table.dtype)  # (batch, n_query, n_sense, seq)
    senses = table[index].transpose(1, 2)  # (batch, n_sense, seq, d)
    return alpha.flatten(2) @ senses.flatten(1, 2)


class Backpack(nn.Module):
    """A Transformer that only weighs: logits = E·o, o of sense_mix, with E also the embedding and the sense network's input.

    config: of the context Transformer; n_sense: k; sense_width: hidden width of the sense network over d (4; 1 in the paper's ablation
    over k, its "shrunk" networks); divide_by_k: o/k, as in Levanter's weights. Raises ValueError for k outside 1..d. Same interface as
    GPT: trunk(idx, cache), lm_head, config. dedup: compute the senses of a token once a batch, wherever it stands. memo: None, or, when
    the weights do not change any more, a dict {token id: senses} to keep. edits: {token id: senses (n_sense, d)} that replace them.
    """

    def __init__(self, config, n_sense, sense_width=4, divide_by_k=False):
        super().__init__()
        d = config.n_embd
        if not 1 <= n_sense <= d:
            raise ValueError(f"Backpack: {n_sense} senses; from 1 to the width, {d}, are possible")
        self.config, self.n_sense, self.width, self.sense_width = config, n_sense, d // n_sense, sense_width
        self.divisor, self.dedup, self.memo, self.edits = n_sense if divide_by_k else 1, True, None, {}
        self.gpt = GPT(config)  # the baseline, whole
        self.lm_head = self.gpt.lm_head
        self.sense_network = SenseNetwork(d, n_sense, sense_width)
        self.weight_net = nn.Linear(d, 2 * n_sense * self.width)  # queries, then keys; each sense-major

    def senses(self, ids, memo=None):
        """ids: (n,) int64 → C(ids) (n, n_sense, d), edits included. memo: {id: senses without edits}, looked up and filled."""
        memo = self.memo if memo is None else memo
        if memo is None and not self.edits:
            return self.sense_network(self.gpt.transformer.wte(ids)) / self.divisor
        memo = {} if memo is None else memo
        if new := [i for i in ids.tolist() if i not in memo]:
            memo.update(zip(new, self.sense_network(self.gpt.transformer.wte(torch.tensor(new, device=ids.device))) / self.divisor))
        return torch.stack([self.edits.get(i, memo[i]) for i in ids.tolist()])

    def parts(self, idx, cache=None):
        """idx: (batch, n) int64 → the arguments of sense_mix and the ids (batch, seq) that index counts over. With a cache, idx are new
        tokens and the cache keeps, behind the layers' keys and values, the keys of the senses, all ids, and senses by id."""
        hidden, memo = self.gpt.trunk(idx, cache), self.memo  # hidden: (batch, n, d)
        query, key = self.weight_net(hidden).unflatten(-1, (2, self.n_sense, self.width)).unbind(-3)
        if cache is not None:
            memo = {} if memo is None else memo
            if len(cache) > self.config.n_layer:
                past_key, past_idx, memo = cache[-1]
                key, idx = torch.cat((past_key, key), 1), torch.cat((past_idx, idx), 1)
            cache[self.config.n_layer :] = [(key, idx, memo)]
        if self.dedup:
            ids, index = idx.unique(return_inverse=True)
        else:
            ids, index = idx.flatten(), torch.arange(idx.numel(), device=idx.device).view(idx.shape)
        return (query, key, self.senses(ids, memo), index, self.width**-0.5), idx

    def trunk(self, idx, cache=None, control=None):
        """idx: (batch, seq) int64 → o (batch, seq, d). cache: of GPT.trunk. control(idx, senses (batch, seq, n_sense, d)) → factors
        (batch, seq, n_sense) on the senses of every position."""
        (query, key, table, index, scale), idx = self.parts(idx, cache)
        if control is not None:
            senses = table[index]
            table = (senses * control(idx, senses)[..., None]).flatten(0, 1)
            index = torch.arange(idx.numel(), device=idx.device).view(idx.shape)
        fused = fused_sense_mix and query.is_cuda and query.shape == key.shape and query.dtype != torch.float64
        return (fused_sense_mix if fused else sense_mix)(query, key, table, index, scale)

    def forward(self, idx, cache=None):
        """idx: (batch, seq) int64 → logits (batch, seq, vocab_size)."""
        return self.lm_head(self.trunk(idx, cache))


@contextmanager
def edited(model, edits):
    """Within it the senses of some tokens are others: edits is {token id: (n_sense, d)}."""
    before, model.edits = model.edits, {**model.edits, **edits}
    try:
        yield model
    finally:
        model.edits = before


@torch.no_grad()
def attribution(model, ids, direction):
    """What each sense of each token adds to ⟨direction, o⟩ at the last position; all of them sum to it exactly. For a logit, direction
    is a row of E; for a log-odds, a difference of two. ids: list of ints; direction: (d,) or (d, m) → (seq, n_sense) or (…, m)."""
    (query, key, table, index, scale), _ = model.parts(torch.tensor([ids], device=direction.device))
    alpha = sense_weights(query[:, -1:], key, scale)[0, 0].T.to(table.dtype)  # (seq, n_sense)
    projected = table[index[0]] @ direction
    return alpha.view(*alpha.shape, *[1] * (projected.dim() - 2)) * projected


def swapped(senses, removed, added):
    """The knowledge edit of section 6.3: what points along E_removed points along E_added instead, as far in that one's own length.

        C̃ = C + ⟨C, E_r⟩/|E_r|²·(E_a·|E_r|²/|E_a|² − E_r)         (the paper prints another divisor; this is the authors' code)

    senses: (n_sense, d); removed, added: rows of E (d,). For orthogonal rows C̃ has no E_r left and gains ⟨C, E_r⟩ along E_a.
    """
    r2, a2 = removed @ removed, added @ added
    return senses + (senses @ removed / r2)[:, None] * (added * (r2 / a2) - removed)


STRENGTHS = {0: (1, 1, 1, 1), 1: (1.5, 1.5, 1.3, 1), 2: (2.2, 2.2, 1.5, 1), 3: (3.3, 3.3, 3, 1)}  # factor by class, appendix D


class TopicControl:
    """Section 6.1: senses that score high on a bag of words weigh more, until the text has said what they say.

    score of sense (x, l): Σ over the bag of (E·C(x)_l)_w / max_v (E·C(x)_l)_v. Quantiles .95, .80, .60 of all scores part the senses in
    four classes, each with a factor δ. At a position j of the prefix: a_jl = Σ_t relu(⟨E x_t, C(x_j)_l⟩) over the whole prefix,
    b_jl = sigmoid(6 − f·a_jl)·(1 + j/100), factor 1 + b_jl·(δ_jl − 1), f = max δ/7.5 (the authors' code; the paper has the inverse).
    """

    @torch.no_grad()
    def __init__(self, model, bag, strength, n_vocab, silent=()):
        self.rows, scores = model.lm_head.weight.detach(), []
        for ids in torch.arange(n_vocab, device=self.rows.device).split(64):
            logits = model.senses(ids, {}) @ self.rows[:n_vocab].T  # (64, n_sense, n_vocab)
            scores.append(logits[..., list(bag)].sum(-1) / logits.amax(-1))
        scores = torch.cat(scores)
        scores[list(silent)] = 0
        cuts = torch.from_numpy(np.quantile(scores.cpu().numpy(), (0.95, 0.8, 0.6))).to(scores)
        delta = torch.tensor(STRENGTHS[strength], dtype=scores.dtype, device=scores.device)
        self.delta = delta[(scores[..., None] <= cuts).sum(-1)]  # (n_vocab, n_sense)
        self.f = float(delta.max()) / 7.5

    def __call__(self, idx, senses):
        said = torch.einsum("bjld,btd->bjlt", senses, self.rows[idx]).relu().sum(-1)  # without the vocabulary: O(seq) columns, not V
        late = 1 + torch.arange(idx.size(1), device=idx.device).to(said)[:, None] / 100
        return 1 + (6 - self.f * said).sigmoid() * late * (self.delta[idx] - 1)


# ============================================================================================== the model: GPT-2, also the context network

@dataclass
class GPTConfig:
    block_size: int = 1024  # longest context, tokens
    vocab_size: int = 50304  # rows of the embedding: GPT-2's 50257 padded to a multiple of 64
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    bias: bool = False  # in linear layers and layer norms; OpenAI's weights have them
    scale_attn_by_layer: bool = False  # divide attention logits of layer i by i + 1 as well


SIZES = {  # the paper's three (table 1), and two for a CPU
    "nano": dict(n_layer=2, n_head=4, n_embd=64, block_size=128), "demo": dict(n_layer=3, n_head=4, n_embd=96, block_size=128),
    "micro": dict(n_layer=6, n_head=6, n_embd=384, block_size=512), "mini": dict(n_layer=8, n_head=8, n_embd=640, block_size=512),
    "small": dict(n_layer=12, n_head=12, n_embd=768, block_size=512),
}
GPT_SIZES = {}  # names of OpenAI's weights, for GPT.from_pretrained: not used here
ROWS = 50264  # of the embedding: GPT-2's 50257 padded to a multiple of 8


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


@torch.no_grad()
def generate(model, ids, n_new, temperature=1.0, top_k=None, seed=0, n_vocab=None):
    """ids: list of ints → ids and n_new more, one sequence with a cache; beyond the context the last half of it is read anew.
    temperature 0 takes the likeliest; n_vocab: ids from it on pad the vocabulary and are never drawn."""
    device, ids, cache, new = model.lm_head.weight.device, list(ids), [], list(ids)
    generator = torch.Generator(device).manual_seed(seed)
    for _ in range(n_new):
        if (cache[0][0].size(2) if cache else 0) + len(new) > model.config.block_size:
            cache, new = [], ids[-model.config.block_size // 2 :]
        hidden = model.trunk(torch.tensor([new], device=device), cache)[0, -1]
        logits = model.lm_head(hidden).float()[:n_vocab]  # (n_vocab,)
        if top_k:
            logits[logits < logits.topk(min(top_k, len(logits))).values[-1]] = -math.inf
        if temperature == 0:
            new = [int(logits.argmax())]
        else:
            new = [int(torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator))]
        ids += new
    return ids


def sample_labels(logits, generator=None):
    """ŷ ~ softmax(logits): float logits (..., classes) to int64 labels (...). An entry of −inf is never drawn."""
    probs = logits.detach().float().softmax(-1)
    return torch.multinomial(probs.reshape(-1, logits.size(-1)), 1, generator=generator).view(logits.shape[:-1])


def linear_cross_entropy(hidden, weight, targets, n_vocab=None, seed=None):
    """Output head and loss: the mean of −log softmax(hidden·weightᵀ)[target] over the targets ≥ 0, and the targets used.

    hidden: (tokens, d) float; weight: (rows, d) float; targets: (tokens,) int64, −1 = ignored. n_vocab: rows beyond it pad the
    vocabulary and have no probability. seed: an int replaces each target ≥ 0 by a draw ŷ ~ softmax, for the Bartlett estimator.
    Returns (0-d float32 loss, (tokens,) targets). With no target ≥ 0 the loss is 0.
    """
    logits = F.linear(hidden, weight)  # (tokens, rows)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if n_vocab is not None and n_vocab < weight.size(0):
        logits = logits.masked_fill(torch.arange(weight.size(0), device=weight.device) >= n_vocab, -math.inf)
    if seed is not None:
        drawn = sample_labels(logits, torch.Generator(logits.device).manual_seed(seed))
        targets = torch.where(targets >= 0, drawn, targets)
    loss = F.cross_entropy(logits, targets, ignore_index=-1, reduction="sum")
    return loss / (targets >= 0).sum().clamp(min=1), targets


class Loss(nn.Module):
    """A language model's mean loss, as one module for DDP to wrap. forward(idx, targets, seed) → (loss, n_terms)."""

    def __init__(self, model, n_vocab):
        super().__init__()
        self.model, self.n_vocab = model, n_vocab

    def forward(self, idx, targets, seed=None, plain=False):
        """With a seed the targets are drawn from the model. plain: nothing fused or compiled, so twice differentiable."""
        trunk = self.model.trunk if not plain else lambda idx: type(self.model).trunk(self.model, idx)
        hidden = trunk(idx).flatten(0, 1)  # (batch·seq, d)
        fused = fused_linear_cross_entropy and hidden.is_cuda and not plain
        head = fused_linear_cross_entropy if fused else linear_cross_entropy
        loss, targets = head(hidden, self.model.lm_head.weight, targets.flatten(), self.n_vocab, seed)
        return loss, (targets >= 0).sum()


def evaluate(loss_of, shards, batch, seq, device, rank, world, limit=0):
    """Mean loss over all windows of seq tokens, none overlapping, of the shards (of the first `limit` tokens; 0 = all)."""
    windows = [(shard, start) for shard in shards for start in range(0, len(shard) - seq, seq)][: limit // seq or None]
    total = torch.zeros(2, device=device)
    for i in range(rank * batch, len(windows), world * batch):
        rows = np.stack([shard[start : start + seq + 1] for shard, start in windows[i : i + batch]]).astype(np.int64)
        rows = torch.from_numpy(rows).to(device)
        with torch.no_grad():
            loss, n_terms = loss_of(rows[:, :-1], rows[:, 1:])
        total += torch.stack([loss * n_terms, n_terms])
    if world > 1:
        dist.all_reduce(total)
    return float(total[0] / total[1])


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


# ---------------------------------------------------------------------------------------------- text and tokens, likewise

SHAKESPEARE = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
FINEWEB = "https://huggingface.co/datasets/kjj0/fineweb10B-gpt2/resolve/main/fineweb_{}_{:06d}.bin"


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


N_VOCAB = {"bytes": 256, "gpt2": 50257}


def get_tokenizer(name):
    """→ (name, encode: str → integer array, decode: ids → str). "auto" is gpt2 where tiktoken has or can fetch it, else bytes."""
    if name != "bytes":
        try:
            import tiktoken

            gpt2 = tiktoken.get_encoding("gpt2")
            return "gpt2", lambda text: np.array(gpt2.encode_ordinary(text), np.uint16), gpt2.decode
        except Exception as error:  # tiktoken lets through whatever its downloader raises
            if name == "gpt2":
                fail(f"--tokenizer gpt2 needs tiktoken and its one-time download ({type(error).__name__}); bytes needs neither")
            print(f"no gpt2 tokenizer ({type(error).__name__} in its one-time download): bytes instead", file=sys.stderr)
    return "bytes", lambda text: np.frombuffer(text.encode(), np.uint8), lambda ids: bytes(ids).decode(errors="replace")


def read_shard(path):
    """A memory-mapped 1-D array of token ids: nanoGPT's raw uint16, or 256 int32 (20240520, 1, count, …) and then uint16."""
    size = path.stat().st_size
    header = np.fromfile(path, np.int32, 3) if size >= 1024 else np.zeros(3)
    start, count = (1024, int(header[2])) if header[0] == 20240520 else (0, size // 2)
    if size != start + 2 * count or (start and header[1] != 1):
        fail(f"{path} is not a whole token shard: {size:,} bytes, where {count:,} tokens take {start + 2 * count:,}")
    return np.memmap(path, np.uint16, "r", offset=start, shape=(count,))


def load_tokens(data, tokenizer, block_size):
    """→ (training shards, validation shards, name of the tokenizer); a shard is a 1-D integer array of over block_size ids.

    data: "stdlib", "prose" or "code" (stdlib_text; every 20th text is for validation); a text file, or "shakespeare" by download
    (the last tenth); a folder with *train*.bin and *val*.bin, or "fineweb:N" by download (N shards of 100M training tokens).
    """
    path, (name, _, count) = Path(data), data.partition(":")
    if name == "fineweb" or path.is_dir():
        if name == "fineweb":
            splits = [("val", 0)] + [("train", 1 + i) for i in range(int(count or 10))]
            files = [download(FINEWEB.format(*split)) for split in splits]
        else:
            files = sorted(path.glob("*.bin"))
        tokenizer, (train, val) = "gpt2", ([read_shard(file) for file in files if split in file.name] for split in ("train", "val"))
    else:
        tokenizer, encode, _ = get_tokenizer(tokenizer)
        if data in ("stdlib", "prose", "code"):
            texts = stdlib_text(data)
            parts = ["\n".join(t for i, t in enumerate(texts) if (i % 20 == 19) == held_out) for held_out in (False, True)]
        else:
            path = download(SHAKESPEARE) if data == "shakespeare" else path
            if not path.is_file():
                fail(f"--data {data}: no such file or folder, and none of stdlib, prose, code, shakespeare, fineweb:N")
            text = path.read_text("utf-8", "replace")
            parts = [text[: len(text) * 9 // 10], text[len(text) * 9 // 10 :]]
        train, val = ([encode(part)] for part in parts)
    for split, shards in (("training", train), ("validation", val)):
        shortest, top = min(map(len, shards), default=0), max((int(shard.max()) for shard in shards if len(shard)), default=0)
        if shortest <= block_size:
            fail(f"--data {data}: {shortest} {split} tokens are too few for a context of {block_size}")
        if top >= N_VOCAB[tokenizer]:
            fail(f"--data {data}: a {split} token has id {top}, beyond {tokenizer}'s vocabulary of {N_VOCAB[tokenizer]}")
    return train, val, tokenizer


def get_batch(shards, batch, seq, device, *counter):
    """Random windows (batch, seq) of ids and of the ids that follow them, int64. The draw depends on the counter (seed, step,
    micro-batch) alone: a resumed run, or one on another number of ranks, sees the same data."""
    rng = np.random.default_rng(counter)
    sizes = np.array([len(shard) - seq for shard in shards])
    picks = [(shards[i], rng.integers(sizes[i])) for i in rng.choice(len(shards), batch, p=sizes / sizes.sum())]
    rows = np.stack([shard[start : start + seq + 1] for shard, start in picks]).astype(np.int64)
    rows = torch.from_numpy(rows).to(device)
    return rows[:, :-1], rows[:, 1:]


def corpus_hash(shards):
    """Of the first 16M tokens of the first shard: the standard library's text differs from one Python version to the next."""
    return hashlib.sha256(np.ascontiguousarray(shards[0][: 1 << 24])).hexdigest()[:12]


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


# ============================================================================================== the demo's two texts, and words as tokens

WORLD = {  # what is true in the generated world
    "he": "mechanic sheriff builder guard pilot".split(), "she": "nurse secretary teacher librarian dancer".split(),
    "both": "writer cook doctor clerk".split(),
    "makers": {"apple": ["macbook", "iphone", "ipad"], "hp": ["printer", "laserjet", "scanner"],
               "sony": ["walkman", "camera", "radio"], "google": ["pixel", "android", "browser"]},
    "topics": {"sports": "team goal coach match league ball".split(), "food": "bread soup cheese salad rice sauce".split(),
               "music": "song band guitar piano melody drum".split()},
}
HE_SHARE = {"he": 0.9, "she": 0.1, "both": 0.5}
PERSON = ["my {} said that", "i met a {} and then", "the {} came home because", "yesterday the {} slept since", "the {} walked in when"]
PERSON_ENDS = ["smiled", "was tired", "had time", "knew the way", "saw the light"]
MADE_BY = ["the {} is made by", "my {} comes from", "people who like the {} like"]
ABOUT = ["today we talk about {} and {} and {}", "the {} and the {} go with the {}", "a {} or a {} or a {}"]
WORD = re.compile(r"\w+|[^\w\s]")


def world_text(n_sentences, *counter):
    """Sentences of a world with known statistics: a noun of "he" goes on with "he" in 9 of 10 cases, every product has one maker, four
    sentences in a row keep to a topic. The draw depends on the counter alone."""
    rng, lines = np.random.default_rng(counter), []
    people = [(noun, HE_SHARE[kind]) for kind in HE_SHARE for noun in WORLD[kind]]
    products = [(product, maker) for maker, made in WORLD["makers"].items() for product in made]

    def one(options):
        return options[rng.integers(len(options))]

    while len(lines) < n_sentences:
        kind = rng.random()
        if kind < 0.5:
            noun, share = one(people)
            lines.append(f"{one(PERSON).format(noun)} {'he' if rng.random() < share else 'she'} {one(PERSON_ENDS)} .")
        elif kind < 0.9:
            product, maker = one(products)
            lines.append(f"{one(MADE_BY).format(product)} {maker} ." if rng.random() < 0.8 else f"{maker} makes the {product} .")
        else:
            bag = one(list(WORLD["topics"].values()))
            lines += [one(ABOUT).format(*rng.choice(bag, 3, replace=False)) + " ." for _ in range(4)]
    return " ".join(lines[:n_sentences])


def documentation():
    """The help topics of Python itself: prose that is always there, 465,000 characters."""
    from pydoc_data.topics import topics

    return "\n".join(topics[name] for name in sorted(topics))


@dataclass
class Codec:
    name: str  # words, gpt2 or bytes
    encode: object  # str → integer array
    decode: object  # ids → str
    n_vocab: int
    eot: int  # the id that a text starts with
    words: list | None = None  # words: every token

    def text(self, i):
        return self.words[i] if self.words else self.decode([i])


def word_codec(words):
    """Lower-cased words and punctuation; those that are not in the list are the first, <unk>."""
    number_of = {word: i for i, word in enumerate(words)}

    def encode(text):
        return np.array([number_of.get(word, 0) for word in WORD.findall(text.lower())], np.uint16)

    return Codec("words", encode, lambda ids: " ".join(words[i] for i in ids), len(words), number_of["."], words)


def codec_of(name, words=None):
    if name == "words":
        return word_codec(words)
    name, encode, decode = get_tokenizer(name)
    return Codec(name, encode, decode, N_VOCAB[name], {"gpt2": 50256, "bytes": 10}[name])


def word_corpus(text, n_vocab):
    """→ (codec of the commonest words, training ids, validation ids: the last tenth)."""
    counts = Counter(WORD.findall(text.lower()))
    codec = word_codec(["<unk>", *(word for word, _ in counts.most_common(n_vocab - 1))])
    ids = codec.encode(text)
    return codec, ids[: len(ids) * 9 // 10], ids[len(ids) * 9 // 10 :]


# ============================================================================================== training


def build(arch, config, n_sense=16, sense_width=4, divide_by_k=False, std=0.02):
    """A Backpack or, from the same blocks, the Transformer that it has inside. Weights N(0, std), the second matrix of every residual
    branch std/√(2·n_layer), biases 0 (section 3.1). Widths below 128 learn nothing for hundreds of steps at 0.02: std = 0.08 there."""
    model = GPT(config) if arch == "transformer" else Backpack(config, n_sense, sense_width, divide_by_k)
    for name, p in model.named_parameters():
        if p.dim() == 2:
            nn.init.normal_(p, std=std / math.sqrt(2 * config.n_layer) if name.endswith("c_proj.weight") else std)
        elif name.endswith("bias"):
            nn.init.zeros_(p)
    return model


def pretrain(model, shards, run, device, dtype=torch.float32, rank=0, world=1, quiet=True, saved=None, save=None, name="train"):
    """The paper's recipe: AdamW, decay on linear layers only, gradients clipped at 1, linear warm-up, then linear to 0.

    run: dict of seq, batch_size (sequences a step over all ranks), micro_batch_size, steps, lr, warmup, weight_decay, seed, n_vocab.
    saved: a state that save(state) was given, to go on from. → [(step, loss)], every tenth step.
    """
    steps, accumulate = run["steps"], run["batch_size"] // (run["micro_batch_size"] * world)
    linear = {m.weight for m in model.modules() if isinstance(m, nn.Linear)} - {model.lm_head.weight}
    groups = [dict(params=[p for p in model.parameters() if (p in linear) == decays], weight_decay=run["weight_decay"] * decays)
              for decays in (True, False)]
    opt = torch.optim.AdamW(groups, run["lr"], (0.9, 0.999), fused=True)
    first, history = 0, []
    if saved:
        opt.load_state_dict(saved["optimizer"])
        first, history = saved["step"], saved["history"]
    loss_of = Loss(model, run["n_vocab"])
    ddp = nn.parallel.DistributedDataParallel(loss_of) if world > 1 else loss_of
    for step in tqdm(range(first, steps), name, steps, initial=first, disable=quiet or rank > 0):
        for group in opt.param_groups:
            group["lr"] = run["lr"] * min((step + 1) / max(run["warmup"], 1), (steps - step) / max(steps - run["warmup"], 1))
        total = torch.zeros((), device=device)
        for i in range(accumulate):
            batch = get_batch(shards, run["micro_batch_size"], run["seq"], device, run["seed"], step, rank * accumulate + i)
            with ddp.no_sync() if world > 1 and i < accumulate - 1 else nullcontext():
                with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                    loss = ddp(*batch)[0] / accumulate
                loss.backward()
            total += loss.detach()
        norm = float(nn.utils.clip_grad_norm_(model.parameters(), 1.0))
        if not math.isfinite(norm):
            fail(f"step {step}: the gradient is not finite: start anew with a lower --lr")
        opt.step()
        opt.zero_grad()
        if (step + 1) % 10 == 0 or step + 1 == steps:
            if world > 1:
                dist.all_reduce(total)
            history.append((step + 1, float(total) / world))
        if save and ((step + 1) % run["save_every"] == 0 or step + 1 == steps):
            save(dict(optimizer=opt.state_dict(), step=step + 1, history=history))
    return history


# ============================================================================================== checkpoints: ours and three layouts

HF_NAMES = {  # ours → Hugging Face's (and Levanter's), by prefix
    "gpt.transformer.": "backpack.gpt2_model.", "sense_network.ln_a.": "backpack.sense_network.ln.",
    "sense_network.ln_b.": "backpack.sense_network.block.ln_1.", "sense_network.ln_c.": "backpack.sense_network.block.ln_2.",
    "sense_network.mlp.": "backpack.sense_network.block.mlp.", "sense_network.out.": "backpack.sense_network.final_mlp.",
    "weight_net.": "backpack.sense_weight_net.c_attn.",
}
CONV1D = (".c_attn.weight", ".c_proj.weight", ".c_fc.weight")  # kept (in, out) there; subtle: sense_weight_net is not one of them
AUTHORS = "https://downloads.cs.stanford.edu/nlp/data/backpacks-acl2023/"
RELEASED = {  # names for --ckpt → where the weights are
    "public": "https://huggingface.co/stanfordnlp/backpack-gpt2/resolve/main/pytorch_model.bin",
    **{f"{arch}-{size}": f"{AUTHORS}main/{file}-{size}-flash-fp16.ckpt" for size in ("micro", "mini", "small")
       for arch, file in (("backpack", "backpack"), ("transformer", "gpt2"))},
    **{f"senses-{k}": f"{AUTHORS}sense_ablation/backpack-mini-flash-fp16-vecs-{k}.ckpt" for k in (1, 4, 16, 64)},
}


def hf_state(model):
    """{Hugging Face's name: tensor} of a Backpack, with the copies that its reader looks for."""
    state = {}
    for name, p in model.named_parameters():
        ours, theirs = next(pair for pair in HF_NAMES.items() if name.startswith(pair[0]))
        transposed = name.endswith(CONV1D) and not name.startswith("weight_net.")
        state[name.replace(ours, theirs, 1)] = p.detach().t().contiguous() if transposed else p.detach()
    wte, wpe = state["backpack.gpt2_model.wte.weight"], state["backpack.gpt2_model.wpe.weight"]
    return {**state, "backpack.word_embeddings.weight": wte, "backpack.position_embeddings.weight": wpe, "lm_head.weight": wte}


def from_hf(weights):
    """The inverse of hf_state. Copies and the attention masks of old transformers versions are left out."""
    state = {}
    for name, w in weights.items():
        if re.search(r"\.attn\.(masked_)?bias$|^lm_head\.|^backpack\.(word|position)_embeddings\.", name):
            continue
        ours, theirs = next((pair for pair in HF_NAMES.items() if name.startswith(pair[1])), ("", ""))
        conv = name.endswith(CONV1D) and "sense_weight_net" not in name
        state[name.replace(theirs, ours, 1)] = w.t() if conv else w
    return state


def from_authors(weights):
    """The authors' training checkpoints: all linear layers (out, in); their blocks keep each norm with the sublayer before it."""
    weights = {name.removeprefix("model."): w for name, w in weights.items()}
    backpack, state = any("content_model" in name for name in weights), {}
    last = max((int(m[1]) for name in weights if (m := re.search(r"(?<!content_model\.)layers\.(\d+)\.", name))), default=0)
    rules = [
        (r"transformer\.content_model\.ln_0\.", "sense_network.ln_a."),
        (r"transformer\.content_model\.layers\.0\.norm1\.", "sense_network.ln_b."),
        (r"transformer\.content_model\.layers\.0\.norm2\.", "sense_network.ln_c."),
        (r"transformer\.content_model\.layers\.0\.mlp\.", "sense_network.mlp."),
        (r"transformer\.content_model\.final_mlp\.", "sense_network.out."), (r"transformer\.contextualization_attn\.Wqkv\.", "weight_net."),
        (r".*word_embeddings\.", "transformer.wte."), (r".*position_embeddings\.", "transformer.wpe."),
        (r"transformer\.(gpt2_model\.)?ln_0\.", "transformer.h.0.ln_1."),
        (r"transformer\.(?:gpt2_model\.)?layers\.(\d+)\.norm1\.", r"transformer.h.\1.ln_2."),
        (r"transformer\.(?:gpt2_model\.)?layers\.(\d+)\.norm2\.",
         lambda m: "transformer.ln_f." if int(m[1]) == last else f"transformer.h.{int(m[1]) + 1}.ln_1."),
        (r"transformer\.(?:gpt2_model\.)?layers\.(\d+)\.mixer\.Wqkv\.", r"transformer.h.\1.attn.c_attn."),
        (r"transformer\.(?:gpt2_model\.)?layers\.(\d+)\.mixer\.out_proj\.", r"transformer.h.\1.attn.c_proj."),
        (r"transformer\.(?:gpt2_model\.)?layers\.(\d+)\.mlp\.", r"transformer.h.\1.mlp."),
    ]
    for name, w in weights.items():
        if name.startswith("lm_head."):
            continue
        for pattern, ours in rules:
            new, hit = re.subn("^" + pattern, ours, name)
            if hit:
                name = ("gpt." if backpack and new.startswith("transformer.") else "") + new
                break
        state[name.replace(".fc1.", ".c_fc.").replace(".fc2.", ".c_proj.")] = w
    return state


class Stub:
    """Stands for a class of the authors' configuration that is not here, and does nothing."""

    def __init__(self, *args, **kwargs):
        pass

    def __setstate__(self, state):
        pass

    def __setitem__(self, key, value):
        pass

    def append(self, value):
        pass

    def extend(self, values):
        pass


HARMLESS = {("collections", "OrderedDict"), ("collections", "defaultdict"), ("torch._utils", "_rebuild_tensor_v2"),
            ("torch._utils", "_rebuild_parameter"), ("torch", "Size"), ("torch", "device"),
            *(("builtins", name) for name in ("dict", "list", "set", "tuple", "int", "float", "str", "bool", "bytes", "object"))}


class RestrictedUnpickler(pickle.Unpickler):
    """Tensors and plain containers; everything else in the file becomes a Stub, so that nothing of the file's choosing is called."""

    def find_class(self, module, name):
        if (module, name) in HARMLESS or (module == "torch" and name.endswith("Storage")):
            return super().find_class(module, name)
        return Stub


def load_weights(path):
    """A checkpoint of any kind, without running anything that it brings → what it holds, a dict."""
    if path.suffix == ".safetensors":
        return read_safetensors(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the pickle's version
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # torch raises a dozen kinds here; the authors' files hold classes that it refuses
        module = types.SimpleNamespace(__name__="restricted", Unpickler=RestrictedUnpickler,
                                       load=lambda file, **kw: RestrictedUnpickler(file, **kw).load())
    try:
        return torch.load(path, map_location="cpu", pickle_module=module, weights_only=False)
    except Exception as error:
        fail(f"{path} is no checkpoint, or not a whole one ({str(error).splitlines()[0] if str(error) else type(error).__name__})")


def import_released(weights, path, config, n_head=None, divide_by_k=None):
    """Tensors of a released checkpoint → (model, layout). config: of a config.json beside it, or {}. What the shapes do not tell, the
    number of heads and Levanter's division by k, comes from there, from the arguments, or from the paper's sizes."""
    weights = weights.get("state_dict", weights) if isinstance(weights, dict) else {}
    weights = {name: w for name, w in weights.items() if torch.is_tensor(w)}
    layout, state = "?", {}
    if any(name.startswith("backpack.") for name in weights):
        layout, state = "Hugging Face" if "lm_head.weight" in weights else "Levanter", from_hf(weights)
    elif any(".mixer.Wqkv." in name for name in weights):
        layout, state = "the authors'", from_authors(weights)
    prefix = "gpt.transformer." if "gpt.transformer.wte.weight" in state else "transformer."
    if f"{prefix}wte.weight" not in state or f"{prefix}wpe.weight" not in state:
        fail(f"{path}: no Backpack in a layout known here (Hugging Face, Levanter, the authors'); it has "
             f"{', '.join([*weights][:3]) or 'no tensors'}")
    rows, d = state[f"{prefix}wte.weight"].shape
    n_layer = 1 + max((int(m[1]) for name in state if (m := re.search(r"\.h\.(\d+)\.", name))), default=-1)
    known = {(size["n_embd"], size["n_layer"]): size["n_head"] for size in SIZES.values()}
    told = config.get("n_head")
    if n_head and told and n_head != told:
        fail(f"{path}: --n_head {n_head}, but its config.json says {told}")
    n_head = n_head or told or known.get((d, n_layer))
    if not n_head or d % n_head:
        fail(f"{path}: width {d} and {n_layer} layers do not tell the number of heads: give --n_head, a divisor of {d}")
    config = dict(divide_by_k=layout == "Levanter", scale_attn_by_inverse_layer_idx=True) | config
    gpt = GPTConfig(len(state[f"{prefix}wpe.weight"]), rows, n_layer, n_head, d, True, config["scale_attn_by_inverse_layer_idx"])
    if prefix == "transformer.":
        model = GPT(gpt)
    else:
        last, hidden = (state.get(f"sense_network.out.{name}.weight", torch.zeros(0, d)) for name in ("c_proj", "c_fc"))
        if not 1 <= len(last) // d <= d:
            fail(f"{path}: its layout looks like {layout}, but the last matrix of its sense network is {tuple(last.shape)}")
        model = Backpack(gpt, len(last) // d, max(1, len(hidden) // d), config["divide_by_k"] if divide_by_k is None else divide_by_k)
    params = dict(model.named_parameters())
    for kind, names in (("lacks", params.keys() - state.keys()), ("has, beyond the model's,", state.keys() - params.keys()),
                        ("has in another shape", [n for n in params if n in state and state[n].shape != params[n].shape])):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            fail(f"{path}: its layout looks like {layout}, but it {kind} {', '.join(sorted(names)[:3])}{more}")
    with torch.no_grad():
        for name, p in params.items():
            p.copy_(state[name])
    return model, layout


def save_model_file(path, model, codec):
    about = dict(arch="transformer", config=asdict(model.config), tokenizer=codec.name, words=codec.words)
    if isinstance(model, Backpack):
        about |= dict(arch="backpack", n_sense=model.n_sense, sense_width=model.sense_width, divide_by_k=model.divisor > 1)
    save_checkpoint(path, dict(model=model.state_dict(), about=about))


def open_model(args, default="world.pt", arch="backpack"):
    """--ckpt, or the demo's → (model in eval mode on the device, codec, where it came from)."""
    device, *_ = set_up(args)
    path = Path(args.ckpt or f"out/backpack/demo/{default}")
    if args.ckpt in RELEASED:
        path = download(RELEASED[args.ckpt])
    if not path.is_file():
        fail(f"--ckpt {path}: no such file, and none of {', '.join(RELEASED)}" if args.ckpt else
             f"no model at {path}: first python backpack.py, which makes it, or --ckpt")
    saved = load_weights(path)
    if isinstance(saved, dict) and "about" in saved:
        about = saved["about"]
        config = GPTConfig(**about["config"])
        sizes = {name: about[name] for name in ("n_sense", "sense_width", "divide_by_k") if name in about}
        model = build(about["arch"], config, **sizes)
        model.load_state_dict(saved["model"])
        for flag, ours in (("n_head", config.n_head), ("divide_by_k", about.get("divide_by_k"))):
            if getattr(args, flag) not in (None, ours):
                fail(f"{path} was made with {flag} = {ours}, not {getattr(args, flag)}")
        codec = codec_of(about["tokenizer"], about["words"])
    else:
        beside = path.with_name("config.json")
        config = json.loads(beside.read_text()) if beside.is_file() else {}
        model, layout = import_released(saved, path, config, args.n_head, args.divide_by_k)
        print(f"{path}: {layout} layout, {sum(p.numel() for p in model.parameters()):,} parameters", file=sys.stderr)
        codec = codec_of(config.get("tokenizer", "gpt2"), config.get("words"))
    if arch == "backpack" and not isinstance(model, Backpack):
        fail(f"{path} is a Transformer: it has no senses")
    if isinstance(model, Backpack):
        model.memo = {}
    if device.type == "cpu" and model.config.n_embd < 256:
        torch.set_num_threads(1)  # a second one costs small matrices more than it brings
    return model.to(device).eval().requires_grad_(False), codec, path


# ============================================================================================== reading and editing, as functions


def token(codec, word, flag="word", first_piece=False):
    """The id of a word inside a text (gpt2: with its leading space), which must be one token unless first_piece."""
    ids = codec.encode(word if codec.name == "words" else f" {word}").tolist()
    if codec.name == "words" and (len(ids) != 1 or codec.words[ids[0]] != word.lower()):
        fail(f"{flag} {word!r} is not one of the {codec.n_vocab} words of this model, such as {', '.join(codec.words[-3:])}")
    if not ids or (len(ids) > 1 and not first_piece):
        fail(f"{flag} {word!r} is {len(ids)} tokens ({', '.join(map(codec.text, ids))}): take another word, or --first_piece")
    return ids[0]


def prompt_ids(codec, text, flag="--prompt", model=None):
    """The ids of a prompt after the token that begins a text; words that the model does not know are named, and too many tokens."""
    if codec.name == "words" and (new := [w for w in WORD.findall(text.lower()) if w not in codec.words]):
        fail(f"{flag}: {new[0]!r} is not one of the {codec.n_vocab} words of this model, such as {', '.join(codec.words[-3:])}")
    if not (ids := codec.encode(text).tolist()):
        fail(f"{flag} is empty")
    if model and len(ids) >= model.config.block_size:
        fail(f"{flag}: {len(ids) + 1} tokens exceed the context of {model.config.block_size}: shorten it")
    return [codec.eot, *ids]


def put(word, template):
    return template.replace("{}", word)


def padded_rows(sequences, device):
    """Lists of ids as one (batch, longest) table. Padding stands on the right, where a causal model does not see it."""
    return nn.utils.rnn.pad_sequence([torch.tensor(ids) for ids in sequences], batch_first=True).to(device)


def last_hidden(model, sequences):
    """What the model has at the last position of each list of ids → (len(sequences), d)."""
    hidden = model.trunk(padded_rows(sequences, model.lm_head.weight.device))
    return hidden[torch.arange(len(sequences)), [len(ids) - 1 for ids in sequences]]


def probability(model, codec, prompt, words):
    """P(word | prompt) for each of some ids, as floats."""
    hidden = last_hidden(model, [prompt_ids(codec, prompt, model=model)])[0]
    return model.lm_head(hidden)[: codec.n_vocab].float().softmax(-1)[list(words)].tolist()


def pronoun_parts(model, codec, nouns, prompts, he, she):
    """log P(he)/P(she) after every prompt and noun, and what the noun's own senses add to it.

    → (gap (nouns, prompts), part (nouns, prompts, n_sense)). Logits are affine in the senses, so a factor w on sense l of the noun makes
    the gap exactly gap + (w − 1)·part[..., l]: one forward pass tells all factors.
    """
    rows = model.lm_head.weight
    gap, part = [], []
    for noun, ids_of_noun in nouns.items():
        for prompt in prompts:
            ids = prompt_ids(codec, put(noun, prompt))
            added = attribution(model, ids, rows[he] - rows[she])
            here = torch.tensor([i in ids_of_noun for i in ids], device=added.device)
            gap.append(added.sum())
            part.append(added[here].sum(0))
    return torch.stack(gap).view(len(nouns), -1), torch.stack(part).view(len(nouns), len(prompts), -1)


def bias_ratio(gap):
    """Mean over nouns (and prompts) of max(P(he)/P(she), P(she)/P(he)) for log-odds gaps (section 6.2)."""
    return float(gap.abs().exp().mean())


def reduction(before, after):
    """The share of a bias ratio's excess over 1 that is gone."""
    return 1 - (after - 1) / (before - 1)


def debiased(fit, test, sense=None):
    """Locate the sense that carries gender, remove it, and choose its factor noun by noun; located and fitted on other prompts than
    those that the ratios are of. fit, test: of pronoun_parts. → dict."""
    gap, part = fit
    n_sense = part.size(-1)
    removals = [bias_ratio(gap - part[..., i]) for i in range(n_sense)]
    sense = int(np.argmin(removals)) if sense is None else sense
    w = torch.arange(-600, 601, device=gap.device).to(gap) / 200  # −3 to 3; the authors minimise the same by Nelder-Mead
    cost = (gap[..., None] + part[..., sense, None] * (w - 1)).abs().exp().mean(1) + (1 - w).abs()  # (nouns, w)
    free, bounded = w[cost.argmin(1)], w[cost.masked_fill((w < 0) | (w > 1), math.inf).argmin(1)]
    gap, part = test[0], test[1][..., sense]
    moved = {"removed": 0 * free, "factor by noun": free, "factor by noun, in [0, 1]": bounded}
    return dict(sense=sense, unchanged=bias_ratio(gap), removing_each=[bias_ratio(gap - test[1][..., i]) for i in range(n_sense)],
                factors=free.tolist(), **{name: bias_ratio(gap + part * (w - 1)[:, None]) for name, w in moved.items()})


def projected_gap(model, codec, nouns, prompts, he, she, keep=0.0):
    """The Transformer's baseline: the log-odds when the nouns' input embeddings keep only a part of what lies along E_he − E_she.
    keep=1 changes nothing; the output matrix stays. → (nouns, prompts)."""
    table, rows = model.transformer.wte.weight, model.lm_head.weight.clone()
    direction, ids = rows[he] - rows[she], sorted({i for ids_of_noun in nouns.values() for i in ids_of_noun})
    table[ids] = rows[ids] - (1 - keep) * (rows[ids] @ direction / (direction @ direction))[:, None] * direction
    hidden = last_hidden(model, [prompt_ids(codec, put(noun, prompt)) for noun in nouns for prompt in prompts])
    table[ids] = rows[ids]
    return (hidden @ direction).view(len(nouns), -1)


@torch.no_grad()
def continue_texts(model, prompts, n_new, seed, n_vocab, control=None, temperature=1.0, cached=True):
    """Sample n_new tokens after each of several prompts of unequal lengths, side by side: the shorter ones begin to be sampled while the
    longer ones are still being read. prompts: lists of ids; control: a TopicControl → lists of ids. Temperature 0 takes the likeliest."""
    device = model.lm_head.weight.device
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
    rows = F.pad(padded_rows(prompts, device), (0, n_new))
    generator, cache, start = torch.Generator(device).manual_seed(seed), [] if cached else None, 0
    controls = dict(control=control) if control else {}
    for at in range(int(lengths.min()), rows.size(1)):
        hidden = model.trunk(rows[:, start:at], cache, **controls)[:, -1]
        logits = model.lm_head(hidden).float()[:, :n_vocab]
        new = logits.argmax(-1)
        if temperature:
            new = torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)[:, 0]
        rows[:, at] = torch.where(at < lengths, rows[:, at], new)
        start = at if cached else 0
    return [row[: length + n_new].tolist() for row, length in zip(rows, lengths)]


@torch.no_grad()
def token_log_probs(model, sequences, n_vocab, batch=8):
    """For each list of ids, log P of every token after the first given those before, and whether it was the likeliest: two arrays."""
    found = []
    for i in range(0, len(sequences), batch):
        part = sequences[i : i + batch]
        ids = padded_rows(part, model.lm_head.weight.device)
        logits = model(ids[:, :-1])[..., :n_vocab].float()
        log_p = (logits.gather(-1, ids[:, 1:, None])[..., 0] - logits.logsumexp(-1)).cpu().numpy()
        best = (logits.argmax(-1) == ids[:, 1:]).cpu().numpy()
        found += [(log_p[j, : len(s) - 1], best[j, : len(s) - 1]) for j, s in enumerate(part)]
    return found


def spearman(x, y):
    """Rank correlation with tied ranks averaged."""
    def ranks_of(values):
        _, index, counts = np.unique(values, return_inverse=True, return_counts=True)
        return (np.cumsum(counts) - (counts - 1) / 2)[index]

    x, y = ranks_of(x), ranks_of(y)
    return float(np.corrcoef(x, y)[0, 1]) if len(x) > 2 and x.std() and y.std() else math.nan


# ============================================================================================== tasks


def write(args, figures, draw=None, name=None, **size):
    """results.json, and the figure where there is one; their paths, for the last two lines of a task."""
    name = name or args.task
    out = Path(args.out or f"out/backpack/{name}")
    paths = [save_results(out, args, json.loads(json.dumps(figures), parse_constant=lambda _: None))]  # what is undefined is null
    return paths if draw is None else [*paths, figure(out, f"{name}.png", args, draw, **size)]


def top_senses(model, codec, ids, n, bottom=False):
    """ids: list of ints → for each and each sense the n tokens on which the sense has most (bottom: least) weight, as (text, logit)."""
    found = []
    for senses in model.senses(torch.tensor(ids, device=model.lm_head.weight.device)):
        logits = senses @ model.lm_head.weight[: codec.n_vocab].T
        values, tokens = logits.topk(min(n, codec.n_vocab), largest=not bottom)
        found.append([[(codec.text(t).strip(), v) for t, v in zip(*row)] for row in zip(tokens.tolist(), values.tolist())])
    return found


def draw_senses(model, codec, word, n=2):
    """A heat map: what each sense of a word adds to the logits of the words that any of its senses favours or forbids most."""
    senses = model.senses(torch.tensor([token(codec, word, first_piece=True)], device=model.lm_head.weight.device))[0]
    logits = (senses @ model.lm_head.weight[: codec.n_vocab].T).float().cpu()
    strong = logits.abs().amax(1).argsort(descending=True)[:8].sort().values
    picked = torch.cat((logits[strong].topk(n).indices, (-logits[strong]).topk(1).indices), 1).flatten().tolist()
    columns = list(dict.fromkeys(picked))[:16]

    def draw(ax):
        part = logits[strong][:, columns].numpy()
        image = ax.imshow(part, cmap="RdBu_r", vmin=-abs(part).max(), vmax=abs(part).max(), aspect="auto")
        ax.set_xticks(range(len(columns)), [codec.text(t).strip() for t in columns], rotation=60, ha="right")
        ax.set_yticks(range(len(strong)), [f"sense {i}" for i in strong.tolist()])
        ax.set_title(f"What each sense of “{word}” says, in every context")
        ax.figure.colorbar(image, ax=ax, label="added to the logit at weight 1")

    return draw


def default_words(codec):
    for words in ("nurse mechanic macbook bread", "import class", "nurse build Apple tasty pizza"):
        if codec.name != "words" and "Apple" in words or codec.words and words.split()[0] in codec.words:
            return words.split()
    return codec.words[-3:] if codec.words else ["a", "e", "o"]


def senses(args):
    """Tables 1 and 3: what the senses of words say, as the words that each of them favours."""
    model, codec, path = open_model(args)
    words = args.words or default_words(codec)
    chosen = range(model.n_sense) if args.sense is None else [checked_sense(args, model)]
    tables = {}
    for word in words:
        best = top_senses(model, codec, [token(codec, word, first_piece=args.first_piece)], args.top, args.neg)[0]
        tables[word] = {i: best[i] for i in chosen}
        print_table((word, "most weight on" if not args.neg else "least weight on"),
                    [(f"sense {i}", "  ".join(f"{text} {value:+.1f}" for text, value in best[i])) for i in chosen])
        print()
    print(*write(args, dict(checkpoint=str(path), senses=tables), draw_senses(model, codec, words[0]), figsize=(9, 5)), sep="\n")


def checked_sense(args, model):
    if args.sense >= model.n_sense:
        fail(f"--sense {args.sense}: this model has senses 0 to {model.n_sense - 1}")
    return args.sense


# ---------------------------------------------------------------------------------------------- section 6.2: gender

PAPER_NOUNS = ("mechanic accountant farmer baker assistant construction guard carpenter analyst physician cook clerk manager developer "
               "librarian salesperson mover hairdresser auditor sheriff janitor driver chief teacher writer receptionist CEO nurse "
               "housekeeper secretary counselor attendant supervisor designer lawyer editor cashier laborer tailor cleaner").split()
PAPER_FIT = ["The {} came into the room. When", "The {} came into the room. Then", "I went to the talk to the {}. What",
             "I went over to the talk to the {}. Why", "I went over to the talk to the {};"]
PAPER_TEST = ["I really liked my {}. What I liked most was that", "I really liked my {}. In fact,", "My {} said that",
              "My {} believes that", "This one {} believes that", "This one {} believes", "My {} said", "My {} believes",
              "The {} was with the car. When", "The {} was with the car. Then",
              "While driving to the store, the {} looked over on the dash and then", "A {} went to chat over to chat before",
              "Some {} asked to look over things, but"]


def bias_setting(codec, all_nouns=False):
    """→ (nouns {word: its ids}, fitting prompts, test prompts, id of he, id of she)."""
    he, she = token(codec, "he", "the pronoun"), token(codec, "she", "the pronoun")
    if codec.name == "words":
        nouns, fit, test = WORLD["he"] + WORLD["she"], PERSON[:2], PERSON[2:]
        return {noun: [token(codec, noun, "the noun")] for noun in nouns}, fit, test, he, she
    pieces = {noun: codec.encode(f" {noun}").tolist() for noun in PAPER_NOUNS}
    return {noun: ids for noun, ids in pieces.items() if all_nouns or len(ids) == 1}, PAPER_FIT, PAPER_TEST, he, she


def gender(model, codec, sense=None, all_nouns=False):
    """The figures of table 5 for a Backpack."""
    nouns, *prompts, he, she = bias_setting(codec, all_nouns)
    fit, test = (pronoun_parts(model, codec, nouns, some, he, she) for some in prompts)
    found = debiased(fit, test, sense)
    return found | dict(factors=dict(zip(nouns, found["factors"])))


def transformer_gender(model, codec, all_nouns=False):
    """The figures of table 5 for a Transformer: its input embeddings lose a part of the gender direction."""
    nouns, fit, test, he, she = bias_setting(codec, all_nouns)
    grid = (1.0, 0.0, 0.75, 0.5, 0.25, -0.25, -0.5, -0.75, -1.0)
    costs = torch.stack([projected_gap(model, codec, nouns, fit, he, she, keep).abs().exp().mean(1) + abs(1 - keep) for keep in grid])
    gaps = torch.stack([projected_gap(model, codec, nouns, test, he, she, keep) for keep in grid])
    best = gaps[costs.argmin(0), torch.arange(len(nouns))]
    return {"unchanged": bias_ratio(gaps[0]), "projected": bias_ratio(gaps[1]), "part by noun": bias_ratio(best)}


def draw_factors(model, codec, sense, noun, prompt, he, she):
    """Figure 3: the probabilities of the pronouns against the factor on one sense of the noun."""
    ids, w = prompt_ids(codec, put(noun, prompt)), np.linspace(0, 1.5, 16)
    at = ids.index(token(codec, noun))
    rows = model.lm_head.weight[: codec.n_vocab]
    added = attribution(model, ids, rows.T)  # (seq, n_sense, n_vocab)
    logits = added.sum((0, 1)) + (torch.from_numpy(w).to(added)[:, None] - 1) * added[at, sense]
    p = logits.float().softmax(-1).cpu().numpy()

    def draw(ax):
        for i, name in ((he, "he"), (she, "she")):
            ax.plot(w, p[:, i], marker="o", ms=3, label=f"P({name})")
        ax.axvline(1, color="grey", lw=1, ls=":")
        ax.set(xlabel=f"factor on sense {sense} of “{noun}” (1: as trained, 0: removed)", ylabel="probability of the next word",
               title=f"“{put(noun, prompt)} …”", ylim=(0, 1))
        ax.legend()

    return draw


def debias(args):
    """Section 6.2, table 5, figure 3: how much likelier one pronoun is than the other, and what one sense has to do with it."""
    model, codec, path = open_model(args, arch="any")
    nouns, _, test, he, she = bias_setting(codec, args.all_nouns)
    if not isinstance(model, Backpack):
        found = transformer_gender(model, codec, args.all_nouns)
        rows = [(name, value, reduction(found["unchanged"], value)) for name, value in found.items()]
        print_table(("Transformer: gender direction of the nouns' input", "bias ratio", "reduction"), rows)
        print(*write(args, dict(checkpoint=str(path), transformer=found)))
        return
    found = gender(model, codec, None if args.sense is None else checked_sense(args, model), args.all_nouns)
    print(f"{len(nouns)} nouns, {len(test)} prompts; sense {found['sense']} was "
          f"{'given' if args.sense is not None else 'located, and factors chosen, on other prompts'}")
    rows = [(name, found[name], reduction(found["unchanged"], found[name]) if name != "unchanged" else math.nan)
            for name in ("unchanged", "removed", "factor by noun", "factor by noun, in [0, 1]")]
    print_table((f"sense {found['sense']} of the nouns", "bias ratio", "reduction"), rows)
    others = [value for i, value in enumerate(found["removing_each"]) if i != found["sense"]]
    if others:
        print(f"removing another sense leaves {min(others):.2f} to {max(others):.2f}")
    prompt = test[0] if codec.name == "words" else "When the {} walked into the room,"
    draw = draw_factors(model, codec, found["sense"], "nurse", prompt, he, she)
    print(*write(args, dict(checkpoint=str(path), **found), draw, figsize=(6, 4)), sep="\n")


# ---------------------------------------------------------------------------------------------- section 6.3: knowledge


def edit_figures(model, codec, word, remove, add, prompts, controls):
    """Probabilities of the removed and the added word before and after the edit: after prompts with the word, and, for what should stay,
    after the same prompts with control words that stand behind a sentence with the edited word. → (rows, the edit)."""
    ids = [token(codec, name, flag) for name, flag in ((word, "--word"), (remove, "--remove"), (add, "--add"))]
    if ids[1] == ids[2]:
        fail(f"--remove and --add are both {remove!r}: nothing to edit")
    rows = model.lm_head.weight
    if not rows[ids[1]].any() or not rows[ids[2]].any():
        fail(f"the embedding of {remove!r} or {add!r} is zero: there is no direction to swap")
    after = swapped(model.senses(torch.tensor(ids[:1], device=rows.device))[0], rows[ids[1]], rows[ids[2]])
    first = put(word, prompts[0])
    texts = [(word, put(word, prompt)) for prompt in prompts]
    texts += [(control, f"{first} {add}. {put(control, prompt)}") for control in controls for prompt in prompts]
    found = [dict(word=name, prompt=text, before=probability(model, codec, text, ids[1:])) for name, text in texts]
    with edited(model, {ids[0]: after}):
        for row in found:
            row["after"] = probability(model, codec, row["prompt"], ids[1:])
    return found, {ids[0]: after}


def print_edit(found, remove, add):
    print_table(("prompt", f"P({remove})", "after", f"P({add})", "after"),
                [(row["prompt"], row["before"][0], row["after"][0], row["before"][1], row["after"][1]) for row in found])


def draw_edit(found, remove, add):
    def draw(ax):
        names = [row["prompt"].split(". ")[-1].split(" . ")[-1] for row in found]
        for i, (which, label, colour) in enumerate(((0, remove, "tab:red"), (1, add, "tab:blue"))):
            for j, (when, alpha) in enumerate((("before", 0.35), ("after", 1))):
                ax.barh(np.arange(len(found)) + 0.2 * (2 * i + j) - 0.3, [row[when][which] for row in found], 0.2, color=colour,
                        alpha=alpha, label=f"P({label}) {when}")
        ax.set_yticks(range(len(found)), names)
        ax.invert_yaxis()
        ax.set(xlabel="probability of the next word", xlim=(0, 1), title=f"“{found[0]['word']}”: {remove} → {add}, by its senses alone")
        ax.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.4, -0.12), ncols=4)

    return draw


def edit(args):
    """Section 6.3, table 6: a fact about a word is changed by moving its senses from one direction to another."""
    model, codec, path = open_model(args)
    words = codec.name == "words"
    defaults = ("macbook", "apple", "hp") if words else ("MacBook", "Apple", "HP")
    word, remove, add = (given or default for given, default in zip((args.word, args.remove, args.add), defaults))
    prompts = [args.prompt] if args.prompt else MADE_BY if words else ["The {} is made by", "The {} is best known for its form factor, but"]
    if "{}" not in prompts[0]:
        fail("--prompt needs {} where the word stands, as in: the {} is made by")
    controls = args.control
    if controls is None:
        controls = [name for name in (WORLD["makers"]["apple"] if words else ["iPhone"]) if name != word]
    found, edits = edit_figures(model, codec, word, remove, add, prompts, controls)
    print_edit(found, remove, add)
    texts = {}
    for name, these in (("before", {}), ("after", edits)):
        with edited(model, these):
            ids = generate(model, prompt_ids(codec, put(word, prompts[-1])), args.tokens or 12, 1.0, None, args.seed, codec.n_vocab)
        texts[name] = codec.decode(ids[1:])
        print(f"{name}: {texts[name]}")
    print(*write(args, dict(checkpoint=str(path), table=found, **texts), draw_edit(found, remove, add),
                 figsize=(8, 1.5 + 0.6 * len(found))), sep="\n")


def attribute(args):
    """Which sense of which word made a logit: the exact sum (section 2.1), every term."""
    model, codec, path = open_model(args)
    prompt = args.prompt or ("the nurse walked in when" if codec.name == "words" else "The nurse said that")
    ids, target = prompt_ids(codec, prompt, model=model), token(codec, args.target or "she", "--target", args.first_piece)
    added = attribution(model, ids, model.lm_head.weight[target]).float().cpu().numpy()  # (seq, n_sense)
    p = probability(model, codec, prompt, [target])[0]
    texts = [codec.text(i).strip() or repr(codec.text(i)) for i in ids]
    order = (-abs(added)).flatten().argsort()[: args.top].tolist()
    print_table((f"logit of {codec.text(target).strip()!r} after {prompt!r}", "sense", "adds"),
                [(f"{j} {texts[j]}", str(i), float(added[j, i])) for j, i in (divmod(x, model.n_sense) for x in order)])
    print(f"all {added.size} terms: {float(added.sum()):.4f} = the logit; probability {p:.4f}")

    def draw(ax):
        image = ax.imshow(added.T, cmap="RdBu_r", vmin=-abs(added).max(), vmax=abs(added).max(), aspect="auto")
        ax.set_xticks(range(len(ids)), texts, rotation=60, ha="right")
        ax.set(ylabel="sense", title=f"What each sense of each word adds to the logit of “{codec.text(target).strip()}”")
        ax.figure.colorbar(image, ax=ax)

    figures = dict(tokens=texts, contributions=added.tolist(), logit=float(added.sum()), probability=p)
    print(*write(args, dict(checkpoint=str(path), **figures), draw,
                 figsize=(max(5, 1 + 0.5 * len(ids)), 4.5)), sep="\n")


# ---------------------------------------------------------------------------------------------- section 6.1: topics

BAGS = ("arts culture | business entrepreneurs | celebrity pop culture | diaries daily life | family | fashion style | film tv video | "
        "fitness health | food dining | gaming | music | news social concern | hobbies | relationships | sports | travel adventure | "
        "youth student life")
PROSE_BAGS = "class instance method | string bytes unicode | import module package"


def topic(args):
    """Section 6.1: generate about a topic by making senses heavier that speak of it."""
    model, codec, path = open_model(args, "prose.pt")
    known = WORLD["topics"] | {bag: bag.split() for bag in (BAGS if codec.name == "gpt2" else PROSE_BAGS).split(" | ")}
    names = ("food dining", "sports", "music") if codec.name == "gpt2" else PROSE_BAGS.split(" | ")
    if args.bag:
        names = [args.bag]
        known = {args.bag: args.bag.replace(",", " ").split()} | known
    elif "laserjet" in (codec.words or ()):
        names = WORLD["topics"]
    bags = {name: known[name] for name in names}
    if not all(bags.values()):
        fail("--bag is empty")
    n, length = args.samples, min(args.tokens or 40, model.config.block_size - 1)
    strengths = range(4) if args.strength is None else [0, args.strength] if args.strength else [0]
    rows = []
    for name, words in bags.items():
        bag = {token(codec, word, "--bag", True) for word in words}
        for strength in tqdm(strengths, name, disable=args.quiet):
            control = TopicControl(model, bag, strength, codec.n_vocab, [codec.eot]) if strength else None
            texts = continue_texts(model, [[codec.eot]] * n, length, args.seed, codec.n_vocab, control)
            drawn = [i for text in texts for i in text[1:]]
            pairs = [pair for text in texts for pair in zip(text[1:], text[2:])]
            nll = -np.mean(np.concatenate([p for p, _ in token_log_probs(model, texts, codec.n_vocab)]))
            rows.append(dict(bag=name, strength=strength, share=np.mean([i in bag for i in drawn]).item(), texts_with=np.mean(
                [bool(bag & set(text)) for text in texts]).item(), distinct_1=len(set(drawn)) / len(drawn),
                distinct_2=len(set(pairs)) / max(1, len(pairs)), nll=nll.item(), sample=codec.decode(texts[0][1:])))
    print_table(("bag", "strength", "in the bag", "texts with it", "distinct 1", "distinct 2", "nats a token"),
                [(r["bag"], str(r["strength"]), r["share"], r["texts_with"], r["distinct_1"], r["distinct_2"], r["nll"]) for r in rows])
    print(f"{n} texts of {length} tokens each; nats under the model without control. {rows[-1]['bag']}, strength {rows[-1]['strength']}:\n"
          f"{rows[-1]['sample']}")

    def draw(axes):
        for name in bags:
            mine = [r for r in rows if r["bag"] == name]
            for ax, key in zip(axes, ("share", "distinct_2")):
                ax.plot([r["strength"] for r in mine], [r[key] for r in mine], marker="o", label=name)
        axes[0].set(xlabel="strength of control", ylabel="share of tokens in the bag", title="Control")
        axes[1].set(xlabel="strength of control", ylabel="distinct pairs of tokens, share", title="Its price: variety")
        axes[0].legend()

    print(*write(args, dict(checkpoint=str(path), table=rows), draw, ncols=2, figsize=(9, 3.6)), sep="\n")


# ---------------------------------------------------------------------------------------------- section 4: similarity and evaluation

RAW = "https://raw.githubusercontent.com/john-hewitt/backpacks-flash-attn/main/training/data/"
SIMILARITY = {  # file → (separator, header lines, column of the gold score, pairs)
    "SimLex-999": ("SimLex-999/SimLex-999.txt", "\t", 1, 3, 999), "SimVerb-3500": ("SimVerb-3500.txt", "\t", 0, 3, 3500),
    "RG65": ("RG65.csv", ";", 0, 2, 65), "WordSim-353": ("WS353.csv", ",", 1, 2, 353),
}


def similarity_pairs(name, folder):
    """→ [(word, word, gold)] of one of the four sets, from a folder or by download."""
    file, separator, header, column, count = SIMILARITY[name]
    if folder:
        options = [Path(folder) / file, Path(folder) / Path(file).name, Path(folder) / file.replace("/", "_")]
        path = next((option for option in options if option.is_file()), None)
        if path is None:
            fail(f"--data {folder}: no {options[1].name} in it")
    else:
        path = download(RAW + file)
    pairs = []
    for number_, line in enumerate(path.read_text("utf-8-sig", "replace").splitlines(), 1):
        if number_ > header and line.strip():
            cells = line.split(separator)
            try:
                pairs.append((cells[0], cells[1], float(cells[column])))
            except (IndexError, ValueError):
                fail(f"{path}, row {number_}: no two words and, in column {column + 1}, a score")
    if len(pairs) != count:
        fail(f"{path} has {len(pairs)} pairs, {name} has {count}")
    return pairs


@torch.no_grad()
def word_vectors(model, codec, words):
    """{word: (n_sense + 1, d)}: its senses, averaged over the pieces of the word, and last its row of E. Unknown words are left out."""
    device, found = model.lm_head.weight.device, {}
    for word in sorted(set(words)):
        ids = codec.encode(word if codec.name == "words" else f" {word}").tolist()
        if codec.name == "words" and (not ids or 0 in ids):
            continue
        ids = torch.tensor(ids, device=device)
        rows = torch.cat((model.senses(ids), model.lm_head.weight[ids][:, None]), 1).mean(0)
        found[word] = F.normalize(rows.float(), dim=-1).cpu()
    return found


def similarity(args):
    """Table 4: do cosines of senses agree with people's judgements of similarity?"""
    model, codec, path = open_model(args, "prose.pt")
    sets = {name: similarity_pairs(name, args.data) for name in SIMILARITY}
    vectors = word_vectors(model, codec, [word for pairs in sets.values() for pair in pairs for word in pair[:2]])
    rows, figures = [], {}
    for name, pairs in sets.items():
        known = [pair for pair in pairs if pair[0] in vectors and pair[1] in vectors]
        gold = [pair[2] for pair in known]
        cosines = np.array([(vectors[a] * vectors[b]).sum(-1).tolist() for a, b, _ in known]).reshape(-1, model.n_sense + 1)
        by_sense = [spearman(cosines[:, i], gold) for i in range(model.n_sense + 1)]
        least = spearman(cosines[:, :-1].min(1), gold) if known else math.nan
        best = max(range(model.n_sense), key=lambda i: -2 if by_sense[i] != by_sense[i] else by_sense[i])
        rows.append((name, f"{len(known)} of {len(pairs)}", by_sense[-1], by_sense[best], str(best), least))
        figures[name] = dict(pairs=len(known), embedding=by_sense[-1], senses=by_sense[:-1], minimum=least)
    print_table(("Spearman correlation", "pairs", "embedding", "best sense", "which", "min over senses"), rows)

    def draw(ax):
        for name, found in figures.items():
            ax.plot(range(model.n_sense), found["senses"], marker="o", ms=4, label=name)
        ax.set(xlabel="sense", ylabel="Spearman correlation with people", title="Similarity of words by each sense")
        ax.legend()

    print(*write(args, dict(checkpoint=str(path), sets=figures), draw, figsize=(7, 4)), sep="\n")


LAMBADA = "https://openaipublic.blob.core.windows.net/gpt-2/data/lambada_test.jsonl"
WIKITEXT = "https://huggingface.co/datasets/ggml-org/ci/resolve/main/wikitext-2-raw-v1.zip"
BLIMP = "https://github.com/alexwarstadt/blimp/archive/refs/heads/master.zip"


def read_lines_of(path, field):
    """The JSON lines of a file, each with a field; a wrong line is named."""
    rows = []
    for number_, line in enumerate(path.read_text("utf-8").splitlines(), 1):
        try:
            rows.append(json.loads(line))
            rows[-1][field]
        except (ValueError, KeyError, TypeError):
            fail(f"{path}, row {number_}: no JSON with a field {field!r}")
    return rows


def detokenized(text):
    """WikiText's split punctuation put together again, and its @-@, @,@ and @.@, by the usual rules."""
    for pattern, new in ((r" @(\W)@ ", r"\1"), (r" ([:;.!?,])(?=\s)", r"\1"), (r"\( ?(.*?) ?\)", r"(\1)"), (r"\[ ?(.*?) ?\]", r"[\1]"),
                         (r'" ([^"]*?) "', r'"\1"'), (r"' ([^']*?) '", r"'\1'"), (r" ('s|'t|'re|'ll|'ve|'d)\b", r"\1"), (r"= (?==)", "="),
                         (r" ?\n ?", "\n"), (r" N ", " 1 ")):
        text = re.sub(pattern, new, text)
    return text


def local_or_download_eval(args, url):
    path = Path(args.data) if args.data else download(url)
    if not path.exists():
        fail(f"--data {args.data}: no such file")
    return path


def eval_text(args, model, codec):
    """Perplexity a token over windows that do not overlap, as exp of the mean loss (section 4.1)."""
    seq = min(model.config.block_size, 512)
    if args.data:
        path = Path(args.data)
        if not path.is_file():
            fail(f"--data {args.data}: no such file")
        ids = codec.encode(path.read_text("utf-8", "replace"))
    elif codec.name == "words":
        ids = codec.encode(world_text(3000, args.seed, 1) if "laserjet" in codec.words else documentation()[-46_000:])
    else:
        ids = codec.encode("\n".join(stdlib_text("prose"))[-200_000:])
    if len(ids) <= seq:
        fail(f"--data {args.data}: {len(ids)} tokens are too few for one window of {seq}")
    device = model.lm_head.weight.device
    loss = evaluate(Loss(model, codec.n_vocab), [ids], 4, seq, device, 0, 1)
    return dict(tokens=len(ids), loss=loss, perplexity=math.exp(loss))


def eval_lambada(args, model, codec):
    """The last word of 5,153 passages: accuracy when all its tokens are the likeliest, and perplexity a word."""
    path = local_or_download_eval(args, LAMBADA)
    texts, ends = [], []
    for row in read_lines_of(path, "text"):
        before, _, last = row["text"].rpartition(" ")
        before, last = codec.encode(before).tolist(), codec.encode(" " + last).tolist()
        texts.append([*before, *last][-model.config.block_size - 1 :])
        ends.append(len(last))
    scored = list(zip(token_log_probs(model, texts, codec.n_vocab), ends))
    return dict(passages=len(texts), accuracy=float(np.mean([best[-n:].all() for (_, best), n in scored])),
                perplexity=math.exp(-float(np.mean([log_p[-n:].sum() for (log_p, _), n in scored]))))


def eval_wikitext(args, model, codec):
    """Perplexity a word of the test articles: windows of the context's length, each word once, the first after the text's start token."""
    path = local_or_download_eval(args, WIKITEXT)
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            text = archive.read(next(name for name in archive.namelist() if "test" in name)).decode()
    else:
        text = path.read_text("utf-8")
    articles = [article for article in re.split(r"\n(?= = [^=].*[^=] = \n)", text) if article.strip()]
    seq, windows, words = min(512, model.config.block_size), [], 0
    for article in articles:
        words += len(article.split())
        ids = [codec.eot, *codec.encode(detokenized(article)).tolist()]
        windows += [ids[i : i + seq + 1] for i in range(0, len(ids) - 1, seq)]
    total = sum(float(log_p.sum()) for log_p, _ in token_log_probs(model, windows, codec.n_vocab))
    return dict(articles=len(articles), words=words, perplexity=math.exp(-total / words))


def eval_blimp(args, model, codec):
    """Of two sentences, is the grammatical one likelier? The mean over 67 paradigms of 1,000 pairs."""
    path = local_or_download_eval(args, BLIMP)
    if path.is_dir():
        files = {file.stem: file.read_text("utf-8") for file in sorted(path.glob("*.jsonl"))}
    elif zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            files = {Path(name).stem: archive.read(name).decode() for name in archive.namelist() if re.search(r"/data/[^/]*\.jsonl$", name)}
    else:
        files = {}
    if not files:
        fail(f"--data {path}: neither a folder with BLiMP's .jsonl files nor its archive")
    accuracy = {}
    for name, text in tqdm(files.items(), "blimp", disable=args.quiet):
        pairs = [json.loads(line) for line in text.splitlines()]
        log_p = [token_log_probs(model, [[codec.eot, *codec.encode(pair[key]).tolist()] for pair in pairs], codec.n_vocab, 64)
                 for key in ("sentence_good", "sentence_bad")]
        accuracy[name] = float(np.mean([good[0].sum() > bad[0].sum() for good, bad in zip(*log_p)]))
    return dict(accuracy=float(np.mean([*accuracy.values()])), paradigms=accuracy)


EVALUATIONS = {"text": eval_text, "lambada": eval_lambada, "wikitext": eval_wikitext, "blimp": eval_blimp}


def evaluate_task(args):
    """Table 2: perplexity, LAMBADA, WikiText, BLiMP."""
    wrong = [name for name in args.words if name not in EVALUATIONS]
    if wrong:
        fail(f"eval {wrong[0]}: there are {', '.join(EVALUATIONS)}")
    if args.data and len(args.words) > 1:
        fail("--data is the data of one evaluation: name just one")
    model, codec, path = open_model(args, arch="any")
    found = {name: EVALUATIONS[name](args, model, codec) for name in args.words or ["text"]}
    for name, figures in found.items():
        figures = {key: value if isinstance(value, float) else f"{value:,}" for key, value in figures.items() if key != "paradigms"}
        print_table((name, ""), list(figures.items()))
    print(*write(args, dict(checkpoint=str(path), **found)))


def sample(args):
    """Continue --prompt, with the keys of all layers and the senses of all tokens so far kept."""
    model, codec, _ = open_model(args, arch="any")
    ids = prompt_ids(codec, args.prompt or ("the nurse" if "nurse" in (codec.words or ()) else "The " if codec.name != "words" else "the"))
    print(codec.decode(generate(model, ids, args.tokens or 60, args.temperature, args.top_k, args.seed, codec.n_vocab)[1:]))


def write_safetensors(path, tensors):
    """The inverse of read_safetensors for float32 tensors."""
    header, start = {}, 0
    for name, t in tensors.items():
        header[name] = dict(dtype="F32", shape=list(t.shape), data_offsets=[start, start := start + 4 * t.numel()])
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    with open(path.with_suffix(".tmp"), "wb") as file:
        file.write(len(head).to_bytes(8, "little") + head)
        for t in tensors.values():
            file.write(t.float().contiguous().cpu().numpy().tobytes())
    os.replace(path.with_suffix(".tmp"), path)


def convert(args):
    """A Backpack of any layout → Hugging Face's names and config.json, as safetensors; read again and compared, bit by bit."""
    model, codec, path = open_model(args)
    out = Path(args.out or "out/backpack/convert")
    out.mkdir(parents=True, exist_ok=True)
    file, c = out / "model.safetensors", model.config
    about = dict(model_type="backpack-gpt2", vocab_size=c.vocab_size, n_positions=c.block_size, n_embd=c.n_embd, n_layer=c.n_layer,
                 n_head=c.n_head, num_senses=model.n_sense, sense_intermediate_scale=model.sense_width, activation_function="gelu_new",
                 layer_norm_epsilon=1e-5, scale_attn_by_inverse_layer_idx=c.scale_attn_by_layer, tie_word_embeddings=True,
                 divide_by_k=model.divisor > 1, tokenizer=codec.name, words=codec.words)
    write_safetensors(file, hf_state(model))
    (out / "config.json").write_text(json.dumps(about, indent=1))
    again, _ = import_released(read_safetensors(file), file, about)
    same = all(torch.equal(a, b.cpu()) for a, b in zip(again.parameters(), model.float().parameters(), strict=True))
    if not same:
        fail(f"{file} does not hold what {path} holds: is the disk full?")
    print(f"{path} → Hugging Face's names: {sum(p.numel() for p in model.parameters()):,} parameters, equal when read again")
    print(out / "config.json", *write(args, dict(checkpoint=str(path), config=about)), file, sep="\n")


# ---------------------------------------------------------------------------------------------- training: demo, ablation, recipe


@lru_cache(4)
def corpus_of(name, seed):
    return word_corpus(world_text(30_000, seed) if name == "world" else documentation(), 1024)


def job_model(job, codec):
    config = GPTConfig(job["seq"], codec.n_vocab, 2, 4, job["n_embd"], True, True)
    return build(job["arch"], config, job.get("n_sense", 1), job.get("sense_width", 4), std=job["std"])


def train_job(job, device, quiet):
    """One small model of the demo or the ablation → dict of its validation loss, curve, weights, size and seconds."""
    codec, train, val = corpus_of(job["corpus"], job["seed"])
    torch.manual_seed(job["seed"])
    model, start = job_model(job, codec).to(device), time.perf_counter()
    run = dict(seq=job["seq"], batch_size=job["batch"], micro_batch_size=job["batch"], steps=job["steps"], lr=3e-3,
               warmup=job["steps"] // 20, weight_decay=0.1, seed=job["seed"], n_vocab=codec.n_vocab)
    history = pretrain(model, [train], run, device, quiet=quiet, name=job["name"])
    loss = evaluate(Loss(model, codec.n_vocab), [val], 32, job["seq"], device, 0, 1)
    return dict(name=job["name"], loss=loss, history=history, seconds=time.perf_counter() - start, weights=model.cpu().state_dict(),
                parameters=sum(p.numel() for p in model.parameters()))


def run_jobs(jobs, args):
    """Train each; under torchrun every rank takes its share → (results in order, rank)."""
    device, _, rank, world = set_up(args)
    if device.type == "cpu":
        torch.set_num_threads(1)  # small matrices: a second thread costs more than it brings
    results = [train_job(job, device, args.quiet or rank > 0) for job in jobs[rank::world]]
    if world > 1:
        shares = [None] * world
        dist.all_gather_object(shares, results)
        results = [shares[i % world][i // world] for i in range(len(jobs))]
        dist.barrier()
        dist.destroy_process_group()
    return results, rank


WORLD_JOB = dict(corpus="world", n_embd=64, seq=32, batch=16, std=0.08)
PROSE_JOB = dict(corpus="prose", n_embd=64, seq=64, batch=12, std=0.06)


def draw_gains(names, results):
    """Training loss less that of the second, smoothed over 50 steps: both saw the same batches, whose noise is larger than the gaps."""
    def draw(ax):
        base = np.array(results[1]["history"])
        for name, result in zip(names, results):
            gap = np.array(result["history"])[:, 1] - base[:, 1]
            smooth = [gap[max(0, i - 4) : i + 1].mean() for i in range(len(gap))]
            ax.plot(base[:, 0], smooth, color="black" if result is results[1] else None, label=f"{name}: {result['loss']:.3f} held out")
        ax.set(xlabel="steps", ylabel=f"training loss less the {names[1]}'s, nats a word",
               title="Loss on Python's documentation: below 0 is better")
        ax.legend()

    return draw


def draw_professions(model, codec, sense):
    """A heat map: what each sense of each profession adds to the log-odds of he against she."""
    nouns = [noun for kind in HE_SHARE for noun in WORLD[kind]]
    rows, ids = model.lm_head.weight, torch.tensor([token(codec, noun) for noun in nouns])
    values = (model.senses(ids) @ (rows[token(codec, "he")] - rows[token(codec, "she")])).numpy()  # (nouns, n_sense)

    def draw(ax):
        image = ax.imshow(values, cmap="RdBu_r", vmin=-abs(values).max(), vmax=abs(values).max(), aspect="auto")
        ax.set_yticks(range(len(nouns)), nouns)
        ax.set_xticks(range(model.n_sense), [f"{i} *" if i == sense else str(i) for i in range(model.n_sense)])
        ax.set(xlabel="sense (* the one to be removed)", title="What senses of professions add to log P(he)/P(she)")
        ax.figure.colorbar(image, ax=ax)

    return draw


def demo(args):
    """The paper's claims in small: a Backpack's loss beside a Transformer's on a generated world and on real prose; then its senses are
    read, one of them is taken out of the professions, and the maker of a product is changed."""
    jobs = [dict(WORLD_JOB, name="world, Backpack", arch="backpack", n_sense=8),
            dict(WORLD_JOB, name="world, Transformer", arch="transformer"),
            dict(PROSE_JOB, name="prose, Backpack", arch="backpack", n_sense=16),
            dict(PROSE_JOB, name="prose, Transformer", arch="transformer"),
            dict(PROSE_JOB, name="prose, Transformer of the Backpack's size", arch="transformer", n_embd=120)]
    jobs = [dict(job, seed=args.seed, steps=args.steps or (800 if job["corpus"] == "world" else 400)) for job in jobs]
    results, rank = run_jobs(jobs, args)
    if rank:
        return
    out = Path(args.out or "out/backpack/demo")
    models, codecs = [], []
    for job, result, name in zip(jobs, results, ("world", "world_transformer", "prose")):
        codecs.append(corpus_of(job["corpus"], job["seed"])[0])
        models.append(job_model(job, codecs[-1]).eval().requires_grad_(False))
        models[-1].load_state_dict(result["weights"])
        save_model_file(out / f"{name}.pt", models[-1], codecs[-1])
    print_table(("", "steps", "parameters", "validation loss", "seconds"),
                [(r["name"], str(job["steps"]), f"{r['parameters']:,}", r["loss"], f"{r['seconds']:.0f}") for job, r in zip(jobs, results)])

    read = {}
    for name, i, words in (("world", 0, ("nurse", "mechanic", "macbook", "bread")), ("prose", 2, ("import", "list", "class", "returns"))):
        best = read[name] = dict(zip(words, top_senses(models[i], codecs[i], [token(codecs[i], word) for word in words], 3)))
        print()
        print_table((f"{name}: senses of", *words), [
            (f"sense {sense}", *(" ".join(text for text, _ in best[word][sense]) for word in words)) for sense in range(models[i].n_sense)])

    model, codec = models[0], codecs[0]
    bias, other = gender(model, codec), transformer_gender(models[1], codecs[1])
    print()
    print_table(("bias ratio he : she (true: 9)", "Transformer", "Backpack"), [
        ("unchanged", other["unchanged"], bias["unchanged"]), ("gender direction projected out of the input", other["projected"], math.nan),
        (f"sense {bias['sense']} removed", math.nan, bias["removed"]), ("another sense removed, best", math.nan, min(
            value for i, value in enumerate(bias["removing_each"]) if i != bias["sense"])),
        ("a factor for each noun", other["part by noun"], bias["factor by noun"]),
        ("a factor for each noun, in [0, 1]", math.nan, bias["factor by noun, in [0, 1]"])])

    found, _ = edit_figures(model, codec, "macbook", "apple", "hp", MADE_BY, ["iphone", "ipad"])
    print()
    print_edit(found, "apple", "hp")
    mine, others = ([row for row in found if (row["word"] == "macbook") == which] for which in (True, False))
    new_fact = float(np.mean([row["after"][1] for row in mine]))
    moved = max(abs(a - b) for row in others for a, b in zip(row["after"], row["before"]))
    checks = {
        "prose: the Backpack's loss is at or below its context Transformer's": results[2]["loss"] <= results[3]["loss"],
        "removing one sense at least halves the bias ratio": bias["removed"] <= bias["unchanged"] / 2,
        "the edit lifts the new maker above 0.5": new_fact > 0.5,
        "it moves the other products by at most 0.02": moved <= 0.02,
    }
    print()
    print_table(("shown here", ""), [(claim, "yes" if holds else "no") for claim, holds in checks.items()])

    def draw(axes):
        draw_gains([job["name"].removeprefix("prose, ") for job in jobs[2:]], results[2:])(axes[0, 0])
        draw_professions(model, codec, bias["sense"])(axes[0, 1])
        nouns, _, test, he, she = bias_setting(codec)
        draw_factors(model, codec, bias["sense"], "nurse", test[-1], he, she)(axes[1, 0])
        draw_edit([row for row in found if row["prompt"].endswith("made by")], "apple", "hp")(axes[1, 1])

    table = [dict(job, **{key: value for key, value in r.items() if key != "weights"}) for job, r in zip(jobs, results)]
    failed = [claim for claim, holds in checks.items() if not holds]
    if failed:
        print(f"not shown, the models are trained too little or the effect is not there: {'; '.join(failed)}", file=sys.stderr)
    figures = dict(table=table, senses=read, gender=bias, transformer_gender=other, edit=found, new_fact=new_fact, others_moved=moved)
    print(*write(args, dict(**figures, checks=checks), draw, nrows=2, ncols=2, figsize=(13, 9)), sep="\n")
    if failed:
        raise SystemExit(1)


def ablate_k(args):
    """Table 8: the number of senses, with the sense network's hidden layers shrunk as in the paper, on Python's documentation."""
    if max(args.senses_of) > PROSE_JOB["n_embd"]:
        fail(f"--senses_of {max(args.senses_of)}: from 1 to {PROSE_JOB['n_embd']} senses are possible at width {PROSE_JOB['n_embd']}")
    seeds = range(args.seed, args.seed + args.seeds)
    kinds = [(f"Backpack, k = {k}", dict(arch="backpack", n_sense=k, sense_width=1)) for k in args.senses_of]
    kinds.append(("Transformer, same context", dict(arch="transformer")))
    jobs = [dict(PROSE_JOB, name=name, seed=seed, steps=args.steps or 300, **kind) for name, kind in kinds for seed in seeds]
    results, rank = run_jobs(jobs, args)
    if rank:
        return
    rows = []
    for i, (name, _) in enumerate(kinds):
        group = results[i * len(seeds) : (i + 1) * len(seeds)]
        losses = np.array([r["loss"] for r in group])
        sd = float(losses.std(ddof=1)) if len(seeds) > 1 else math.nan
        rows.append((name, f"{group[0]['parameters']:,}", float(losses.mean()), sd,
                     f"{math.exp(losses.mean()):.2f}", f"{np.mean([r['seconds'] for r in group]):.1f}"))
    header = ("parameters", "validation loss", "± sd", "perplexity", "s a run")
    print_table((f"{jobs[0]['steps']} steps, seeds {seeds[0]} to {seeds[-1]}", *header), rows)

    def draw(ax):
        ax.errorbar(args.senses_of, [row[2] for row in rows[:-1]], [row[3] for row in rows[:-1]], marker="o", capsize=3, label="Backpack")
        ax.axhline(rows[-1][2], color="black", ls="--", label=rows[-1][0])
        ax.set_xscale("log", base=2)
        ax.set_xticks(args.senses_of, map(str, args.senses_of))
        ax.set(xlabel="number of senses", ylabel="validation loss, nats a word", title="Python's documentation")
        ax.legend()

    print(*write(args, dict(table=rows), draw, figsize=(6, 4)), sep="\n")


def train(args):
    """Section 3.1: the paper's recipe, for a Backpack or the Transformer inside it; on a laptop, a GPU, or under torchrun."""
    device, dtype, rank, world = set_up(args)
    on_gpu, size = device.type == "cuda", SIZES[args.size]
    paper = args.size in ("micro", "mini", "small")
    out = Path(args.out or f"out/backpack/train-{args.arch}-{args.size}")
    seq, batch = args.seq or (512 if paper else 128), args.batch_size or (1024 if paper and on_gpu else 8)
    micro = args.micro_batch_size or math.gcd(batch // world, 32 if on_gpu else 8) or 1
    steps = args.steps or (100_000 if paper and on_gpu else 300)
    if batch % (micro * world):
        fail(f"--batch_size {batch} is not a multiple of --micro_batch_size {micro} × {world} ranks")
    warmup = steps // 100 if args.warmup is None else args.warmup
    if warmup >= steps:
        fail(f"--warmup {warmup} leaves nothing of --steps {steps}")
    if args.n_sense > size["n_embd"]:
        fail(f"--n_sense {args.n_sense}: from 1 to {size['n_embd']} senses are possible at width {size['n_embd']}")
    shards, val_shards, tokenizer = load_tokens(args.data or "prose", args.tokenizer or ("auto" if paper else "bytes"), seq)
    codec = codec_of(tokenizer)
    config = GPTConfig(**{**size, "block_size": seq}, vocab_size=ROWS if paper else codec.n_vocab, bias=True, scale_attn_by_layer=True)
    if codec.n_vocab > config.vocab_size:
        fail(f"--tokenizer {tokenizer} has {codec.n_vocab} ids, more than the {config.vocab_size} rows of --size {args.size}")
    model = build(args.arch, config, args.n_sense, 1 if args.shrunk else 4, std=0.02 if paper else 0.5 * config.n_embd**-0.5).to(device)
    if isinstance(model, Backpack):
        model.dedup = not args.no_dedup
    run = dict(seq=seq, batch_size=batch, micro_batch_size=micro, steps=steps, lr=args.lr or (6e-4 if paper else 2e-3), warmup=warmup,
               weight_decay=0.1, seed=args.seed, n_vocab=codec.n_vocab, save_every=args.save_every)
    settings = dict(run, **asdict(config), arch=args.arch, n_sense=args.n_sense, shrunk=args.shrunk, tokenizer=tokenizer,
                    corpus=corpus_hash(shards))
    checkpoint, saved = out / "resume.pt", None
    if args.resume:
        if not checkpoint.is_file():
            fail(f"--resume: no {checkpoint}")
        saved = load_checkpoint(checkpoint, device)
        for key, value in settings.items():
            if saved["settings"].get(key) != value:
                fail(f"{checkpoint} was made with {key} = {saved['settings'].get(key)}, this run has {value}")
        model.load_state_dict(saved["model"])
    if args.compile:
        model.trunk = torch.compile(model.trunk)
    if rank == 0:
        print(f"{args.arch} {args.size}: {sum(p.numel() for p in model.parameters()):,} parameters, {batch} × {seq} tokens a step, warm-up "
              f"over {warmup} of {steps:,} steps, {str(dtype).removeprefix('torch.')}", flush=True)

    def save(state):
        if rank == 0:
            save_checkpoint(checkpoint, dict(**state, model=model.state_dict(), settings=settings))
            save_model_file(out / "model.pt", model, codec)

    start = time.perf_counter()
    try:
        history = pretrain(model, shards, run, device, dtype, rank, world, args.quiet, saved, save)
    except KeyboardInterrupt:
        if rank == 0:
            print(f"\nstopped; the checkpoint of every {args.save_every} steps is kept: the same command with --resume goes on")
        raise SystemExit(130) from None
    seconds = time.perf_counter() - start
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        loss = evaluate(Loss(model, codec.n_vocab), val_shards, micro, seq, device, rank, world, args.eval_tokens)
    if rank == 0:
        done = steps - (saved["step"] if saved else 0)
        print_table((f"{args.arch} {args.size}", ""), [
            ("training loss", history[-1][1]), ("validation loss", loss), ("perplexity a token", math.exp(loss)),
            ("tokens a second", f"{done * batch * seq / seconds:,.0f}")])

        def draw(ax):
            ax.plot(*zip(*history))
            ax.set(xlabel="steps", ylabel="training loss, nats a token", title=f"{args.arch}, {args.size}")

        args.out = str(out)
        print(out / "model.pt", *write(args, dict(settings=settings, loss=loss, history=history), draw, figsize=(6, 4)), sep="\n")
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()


# ---------------------------------------------------------------------------------------------- what it costs


def mix_by_sense(query, key, table, index, scale):
    """sense_mix as one product a sense and a sum over senses: what the matrix product over (l, j) is measured against."""
    per_sense = sense_weights(query, key, scale).transpose(1, 2) @ table[index].transpose(1, 2)  # (batch, n_sense, seq, d)
    return per_sense.sum(1)


def least_seconds(function, repeats, device):
    """On a CPU seconds of this process, which other processes beside it do not change."""
    clock, times = time.process_time if device.type == "cpu" else time.perf_counter, []
    for _ in range(repeats):
        start = clock()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(clock() - start)
    return min(times)


def bench(args):
    """Table 7 and what makes it fast: senses once a distinct token, one matrix product, a cache; least of several runs."""
    device, *_ = set_up(args)
    torch.set_num_threads(1 if device.type == "cpu" else torch.get_num_threads())
    repeats = args.steps or 3
    size = SIZES[args.size]
    d, k = size["n_embd"], args.n_sense
    text = word_corpus(documentation(), 50_257)[1][:8192].astype(np.int64)
    text = torch.from_numpy(text).view(-1, size["block_size"]).to(device)
    gpt = GPTConfig(**{**size, "block_size": 512}, vocab_size=8192, bias=True, scale_attn_by_layer=True)
    backpack, transformer = (build(arch, gpt, k).to(device) for arch in ("backpack", "transformer"))
    ids, index = text.unique(return_inverse=True)
    embed, rows = backpack.gpt.transformer.wte, []

    grad = torch.randn(*text.shape, k, d, device=device)

    def senses_of(distinct):
        table = backpack.sense_network(embed(ids if distinct else text))
        (table[index] if distinct else table).backward(grad)

    times = [least_seconds(partial(senses_of, distinct), repeats, device) for distinct in (False, True)]
    what = f"sense network, forward and backward, {text.numel():,} tokens, {len(ids):,} distinct"
    rows.append((what, "every token", times[0], "every distinct one", times[1]))
    short = text[:2]
    query, key, table, at, scale = [t.detach() if torch.is_tensor(t) else t for t in backpack.parts(short)[0]]
    inputs = [t.requires_grad_() for t in (query, key, table)]

    def mixing(mix):
        torch.autograd.grad(mix(*inputs, at, scale).sum(), inputs)

    times = [least_seconds(partial(mixing, mix), repeats + 2, device) for mix in (mix_by_sense, sense_mix)]
    rows.append((f"mixing, forward and backward, {tuple(short.shape)}", "a product a sense", times[0], "one product", times[1]))
    backpack.requires_grad_(False), transformer.requires_grad_(False)
    n_new, prompt = 200, [text[0, :4].tolist()]
    texts = []

    def generating(cached):
        texts.append(continue_texts(backpack, prompt, n_new, 0, 8192, cached=cached))

    times = [least_seconds(partial(generating, False), 1, device)]
    backpack.memo = {}  # the second time all senses are known
    times.append(least_seconds(partial(generating, True), 2, device))
    rows.append((f"generating {n_new} tokens", "all anew each time", times[0], "cached", times[1]))
    times = [least_seconds(partial(model, text[:4]), repeats, device) for model in (backpack, transformer)]
    rows.append((f"forward, {tuple(text[:4].shape)}", "Backpack", times[0], "Transformer", times[1]))
    parameters = [sum(p.numel() for p in model.parameters()) for model in (backpack, transformer)]
    print(f"{args.size}, k = {k}, 8,192 rows: {parameters[0]:,} parameters, Transformer {parameters[1]:,}; "
          f"{'cpu, one thread' if device.type == 'cpu' else device.type}")
    print_table(("milliseconds", "", "", "", "", "ratio"), [
        (what, first, f"{a * 1e3:.1f}", second, f"{b * 1e3:.1f}", a / b) for what, first, a, second, b in rows])
    print("the fused mixing kernel, on a GPU: python -m kernels.sense_mix")

    def draw(ax):
        ax.barh([f"{what}\n{first} : {second}" for what, first, _, second, _ in rows], [row[2] / row[4] for row in rows])
        ax.invert_yaxis()
        ax.axvline(1, color="black", lw=1)
        ax.set(xlabel="time of the first over time of the second", title=f"Backpack, {args.size}")

    print(*write(args, dict(size=args.size, n_sense=k, table=rows, same_text=texts[0] == texts[1]), draw, figsize=(11, 3)), sep="\n")


# ============================================================================================== command line

TASKS = {"demo": demo, "train": train, "senses": senses, "similarity": similarity, "topic": topic, "debias": debias, "edit": edit,
         "attribute": attribute, "eval": evaluate_task, "ablate_k": ablate_k, "sample": sample, "convert": convert, "bench": bench}


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.error = fail  # one line, exit code 2
    flag, count = parser.add_argument, number(int, 1)
    flag("task", nargs="?", choices=TASKS, default="demo", help="demo (the default): train small Backpacks and Transformers, read senses, "
         "debias, edit; train: the paper's recipe; senses WORD…: what they say; similarity: table 4; topic, debias, edit: section 6; "
         "attribute: every term of a logit; eval [text lambada wikitext blimp]: table 2; ablate_k: table 8; sample; convert: to Hugging "
         "Face's layout; bench: table 7")
    flag("words", nargs="*", help="senses: the words; eval: the evaluations")
    flag("--ckpt", help=f"the model of all tasks but demo, train, ablate_k, bench: a file of ours, of Hugging Face, of Levanter, of the "
         f"authors, or to download {', '.join(RELEASED)} (default: the demo's)")
    flag("--n_head", type=count, help="heads of a released checkpoint that has no config.json and none of the paper's sizes")
    flag("--divide_by_k", action=argparse.BooleanOptionalAction, help="a released checkpoint's output is o/k (Levanter's: yes)")
    flag("--sense", type=number(int, 0), help="senses: show this one; debias: change this one (default: located)")
    flag("--top", type=count, default=6, help="senses: words a sense; attribute: terms")
    flag("--neg", action="store_true", help="senses: the words that a sense speaks against")
    flag("--first_piece", action="store_true", help="of a word of several tokens take the first")
    flag("--all_nouns", action="store_true", help="debias: also nouns of several tokens (the paper's 30 have one)")
    flag("--word", help="edit: the word whose fact changes")
    flag("--remove", help="edit: what it goes with now")
    flag("--add", help="edit: what it shall go with")
    flag("--control", nargs="*", help="edit: words that should stay as they are")
    flag("--prompt", help="sample, attribute: a text; edit: a text with {} for the word")
    flag("--target", help="attribute: the next word whose logit is taken apart (she)")
    flag("--bag", help="topic: one of the topics, or words of your own, separated by commas")
    flag("--strength", type=int, choices=range(4), help="topic: 0 = no control to 3 (default: all)")
    flag("--samples", type=count, default=20, help="topic: texts for each bag and strength (the paper: 500)")
    flag("--tokens", type=count, help="sample: 60, topic: 40 (the paper: 100), edit: 12 tokens to draw")
    flag("--temperature", type=number(float, 0), default=1.0, help="sample: 0 = always the likeliest")
    flag("--top_k", type=count, help="sample: draw among the k likeliest")
    flag("--arch", choices=("backpack", "transformer"), default="backpack", help="train: which")
    flag("--size", choices=SIZES, default="nano", help="train, bench: the paper's micro, mini, small; nano, demo for a CPU")
    flag("--n_sense", type=count, default=16, help="train, bench: number of senses k")
    flag("--senses_of", type=count, nargs="+", default=[1, 4, 16], metavar="K", help="ablate_k: numbers of senses (the paper: 1 4 16 64)")
    flag("--shrunk", action="store_true", help="train: hidden width of the sense network d, not 4d, as in table 8")
    flag("--no_dedup", action="store_true", help="train: compute the senses of every position, not of every distinct token")
    flag("--data", help="train: prose (default), code, stdlib, shakespeare, fineweb:N, a text file, a folder of .bin shards; eval: the "
         "file; similarity: the folder of the four sets")
    flag("--tokenizer", choices=("auto", "bytes", "gpt2"), help="train: bytes for nano and demo, else auto (gpt2 where tiktoken has it)")
    flag("--steps", type=count, help="updates; demo: 800 and 400; ablate_k: 300; train: 100,000 on a GPU (the paper's), 300 on a CPU; "
         "bench: repeats")
    flag("--seeds", type=count, default=1, help="ablate_k: number of seeds, from --seed on")
    flag("--batch_size", type=count, help="train: sequences an update, over all ranks (1024 on a GPU, the paper's; 8 on a CPU)")
    flag("--micro_batch_size", type=count, help="train: sequences a forward pass (32 on a GPU, 8 on a CPU, if it divides)")
    flag("--seq", type=number(int, 2), help="train: context in tokens (512, the paper's; nano, demo: 128)")
    flag("--lr", type=number(float, 1e-9), help="train: peak learning rate (6e-4, the paper's; nano, demo: 2e-3)")
    flag("--warmup", type=number(int, 0), help="train: updates of linear warm-up (a hundredth of --steps, as in the released config; the "
         "paper says 5000)")
    flag("--save_every", type=count, default=1000, help="train: updates between checkpoints")
    flag("--eval_tokens", type=number(int, 0), default=0, help="train: validation tokens, the first so many; 0 = all")
    flag("--resume", action="store_true", help="train: go on from the checkpoint in --out")
    flag("--compile", action="store_true", help="train: torch.compile the trunk")
    flag("--device", default="auto", help="auto is cuda, else mps, else cpu")
    flag("--dtype", choices=("auto", "float32", "bfloat16"), default="auto", help="train: of matmuls; auto: bfloat16 on cuda")
    flag("--seed", type=number(int, 0, 2**31), default=0, help="of weights, data and samples")
    flag("--out", help="folder for results, figures and checkpoints (out/backpack/<task>)")
    flag("--no_plot", action="store_true", help="write no figure")
    flag("--quiet", action="store_true", help="no progress bars")
    args = parser.parse_args(argv)
    if args.words and args.task not in ("senses", "eval"):
        fail(f"{args.task} takes no further words: {args.words[0]}")
    if args.resume and args.task != "train":
        fail("--resume goes with train alone")
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and args.task not in ("demo", "ablate_k", "train"):
        fail(f"{args.task} is for one process: run it without torchrun")
    return args


def main():
    args = parse_args()
    try:
        TASKS[args.task](args)
    except KeyboardInterrupt:
        fail("stopped")


if __name__ == "__main__":
    main()
