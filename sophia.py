"""Sophia: a second-order clipped optimizer for language-model pre-training (Liu, Li, Hall, Liang, Ma; arXiv 2305.14342).

The problem. Curvature differs by orders of magnitude between the coordinates of a language model's loss. Sign-like methods (and
Adam nearly is one) move every coordinate by about the learning rate: flat ones crawl, sharp ones bounce. Newton's method would
scale each step by the curvature, but it runs to saddle points where curvature is negative, trusts a quadratic model far beyond
its range, and needs a Hessian.

The idea. Keep two moving averages, of the gradient and of a cheap unbiased estimate ĥ of the Hessian's diagonal, refreshed every
k = 10 steps; divide one by the other; and clip every coordinate of the ratio to [−1, 1]. Where curvature is large the step is
Newton's; where it is tiny, negative or wrong the clip turns it into a step of η along the sign of the momentum.

    m ← β1·m + (1 − β1)·g                            at every step; g: gradient, clipped to norm 1
    h ← β2·h + (1 − β2)·ĥ                            at steps 1, k + 1, 2k + 1, …
    θ ← θ·(1 − η·λ)                                  decoupled weight decay
    θ ← θ − η·clip(m / max(γ·h, ε), 1)               Algorithm 3; γ sets how many coordinates are clipped

    Sophia-G   ĥ = B·ĝ², ĝ the gradient of the loss with labels ŷ ~ softmax(logits) drawn from the model (Gauss-Newton-Bartlett,
               Algorithm 2; unbiased for the Gauss-Newton diagonal, never negative; B counts tokens, not sequences)
    Sophia-H   ĥ = u·(∇²L·u) for a random u (Hutchinson, Algorithm 1; unbiased for the Hessian diagonal)

How to run it.

    python sophia.py                             AdamW against Sophia, tuned alike: table, verdict, figure (2 minutes, 2 CPU cores)
    python sophia.py toy | ablate | bench        figure 2 of the paper; what matters and what does not; the cost of a step
    python sophia.py train --steps 50            train a tiny GPT on the text that Python ships; then: python sophia.py sample
    python sophia.py --model gpt2-medium --data fineweb:100          the paper's recipe on one GPU, or under torchrun on many

What the paper reports: AdamW's validation loss in half the steps for GPT-2 of 125M to 770M parameters, at about 5 % extra time.

What we measured (2 cores of an AMD EPYC, torch 2.13.0, seeds 0-2; 8 tuning trials on two other seeds for each optimizer and a cosine
schedule for each length; loss in nats a byte; speed-up in steps over AdamW, interpolated between AdamW's runs at T/2, T and 2T):

    python sophia.py                             AdamW T   Sophia-G        Sophia-H        Signum          AdamW 2T
    small GPT, 1,024 tokens a step, T = 64       2.836     2.750 (1.17x)   2.756 (1.16x)   2.877 (0.94x)   2.466
    convex bigram model, the same                2.503     2.522 (0.79x)   2.521 (0.79x)   2.522 (0.79x)   2.472
    python sophia.py compare --problem gpt --batch_size 64 --steps 200
    small GPT, 4,096 tokens a step, T = 200      2.094     2.069 (1.05x)   2.098 (0.99x)   2.082 (1.03x)   1.776

What did not hold at this scale: the factor of 2. In steps Sophia is now ahead of AdamW, now behind, by about a fifth; in time it is
behind everywhere, since its steps take 1.2 to 1.9 times as long (two in ten of them refresh the curvature, from all of the batch).
`ablate` says what decides (small GPT, 1,024 tokens a step, 200 steps, seeds 0-2): warm-up and momentum. From 2.328 ± 0.006 the loss
rises to 2.547 with a warm-up over 5 % instead of 40 % of the run and to 2.904 with β1 = 0.96 instead of 0.6 (2.845 for both at a
third of the learning rate). Curvature hardly matters there: refreshed every 1, 5, 10 or 50 steps 2.325 to 2.328, by Hutchinson 2.328,
from true labels (biased) 2.335, not at all (γ → 0, which is Signum) 2.329. The clip is vital: without it 64,541. A learning rate of
1e-4 was among the small GPT's trials (AdamW's apart) and never won. Larger models and longer runs we have not measured.

What others found later. A. Defazio (issue 31 of the authors' repository): 125M, one script for both, AdamW 2.869, Sophia-G 2.876. Zhao et
al. 2407.07972: tuned Adam, Lion, Adafactor and Sophia end alike, Signum near them. Wen et al. 2509.02046 (two of the authors): tuned
AdamW takes most of the claimed 1.4-2x away. Semenov et al. 2509.01440: Sophia worse in long 124M runs, in a variant whose h is too
small. The authors' AdamW script does not divide the loss by the number of accumulation steps; our baselines do.

Cost of a step over gpt2's 124M parameters (`bench`, same machine): torch's fused AdamW 63 ms; Sophia tensor by tensor 929, in blocks
that fit the cache 202, compiled (`fused=True`) 47; a refresh of h 60. On a GPU: not measured.

Where this file differs from the paper: ĝ is squared for each micro-batch, not once for the mean (same expectation, less variance);
Hutchinson's u is ±1, not Gaussian (likewise); `compare` corrects m and h for their start at zero, needed in short runs.
"""

import argparse
import ast
import hashlib
import json
import math
import os
import platform
import subprocess
import sys
import sysconfig
import time
import urllib.request
import warnings
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

try:
    from kernels.linear_cross_entropy import linear_cross_entropy as fused_linear_cross_entropy
    from kernels.sophia_update import hessian_ema_ as fused_hessian_ema_
    from kernels.sophia_update import sophia_update_ as fused_sophia_update_
except ImportError:  # copied alone, or no Triton here: the plain versions below compute the same
    fused_linear_cross_entropy = fused_hessian_ema_ = fused_sophia_update_ = None

# ============================================================================================== the method: the optimizer


def sophia_rule_(p, g, m, h, lr, beta1, gamma, eps, weight_decay, clip):
    """Algorithm 3 on one tensor, in place and in the dtype of m. Returns the win count: coordinates that were not clipped.

    p, g, m, h: parameter, gradient, momentum, curvature, of one shape. The rest: floats, or 0-d tensors of m's dtype.
    """
    m.lerp_(g.to(m.dtype), 1 - beta1)  # m ← β1·m + (1 − β1)·g
    u = torch.div(m, (gamma * h).clamp_(min=eps)).clamp_(-clip, clip)  # u = clip(m / max(γ·h, ε), 1)
    p.copy_(p.to(m.dtype).mul(1 - lr * weight_decay).sub_(lr * u))  # θ ← θ·(1 − η·λ) − η·u
    return (u.abs_() < clip).sum(dtype=torch.int32)


def blocks(tensors, size):
    """Tensors of one shape, side by side in flat pieces. subtle: a rule of several passes over a tensor makes several trips to memory
    on a CPU, unless the piece fits the cache; elsewhere, with size None, and for other memory layouts the piece is the whole."""
    if not all(t.is_contiguous() for t in tensors):
        return [tensors]
    size = size if size and tensors[0].is_cpu else max(1, tensors[0].numel())
    return zip(*(t.view(-1).split(size) for t in tensors))


def sophia_update_(params, grads, momenta, hessians, lr, beta1, gamma, eps, weight_decay, clip=1.0, rule=sophia_rule_):
    """One Sophia step over lists of tensors, in place. Returns the win count, a 0-d int64 tensor."""
    wins = []
    for tensors in zip(params, grads, momenta, hessians):
        for p, g, m, h in blocks(tensors, 2**17 if rule is sophia_rule_ else None):
            wins.append(rule(p, g, m, h, lr, beta1, gamma, eps, weight_decay, clip))
    return torch.stack(wins).sum()


@lru_cache(1)
def compiled_sophia_rule_():
    return torch.compile(sophia_rule_, dynamic=True)


def compiled_sophia_update_(params, grads, momenta, hessians, *scalars):
    """sophia_update_ with the rule compiled into one pass over memory; on a CPU this needs a C++ compiler."""
    scalars = [torch.tensor(s, dtype=momenta[0].dtype, device=momenta[0].device) for s in scalars]  # a new float recompiles
    return sophia_update_(params, grads, momenta, hessians, *scalars, rule=compiled_sophia_rule_())


def hessian_ema_(hessians, estimates, beta2, n_terms=None):
    """h ← β2·h + (1 − β2)·ĥ over lists of tensors, in place. With n_terms = B the estimates are gradients ĝ, and ĥ = B·ĝ²."""
    for pair in zip(hessians, estimates):
        for h, e in blocks(pair, 2**17):
            e = e.to(h.dtype)
            h.lerp_(e if n_terms is None else n_terms * e * e, 1 - beta2)


class Sophia(torch.optim.Optimizer):
    """Algorithm 3. On any model, with no other part of this file than what stands above and sample_labels or hutchinson:

        opt = Sophia(model.parameters(), lr=6e-4, betas=(0.96, 0.99), gamma=0.05, weight_decay=0.2, k=10)
        for x, y in batches:                                          # classes; for a language model flatten (batch, seq) first
            if opt.hessian_due:                                       # every k steps, before the step
                logits = model(x)
                sampled = F.cross_entropy(logits, sample_labels(logits))             # not y: labels drawn from the model
                opt.update_hessian(torch.autograd.grad(sampled, opt.params), n_terms=len(logits))                # Sophia-G
                # or: opt.update_hessian(hutchinson(F.cross_entropy(model(x), y), opt.params))                   # Sophia-H
            F.cross_entropy(model(x), y).backward()
            torch.nn.utils.clip_grad_norm_(opt.params, 1.0)
            opt.step()
            opt.zero_grad()

        # regression: with the loss ((f - y)**2 / 2).mean(), a label drawn from the model is f plus unit noise, so
        # sampled = ((f - (f.detach() + torch.randn_like(f)))**2 / 2).mean() and n_terms = f.numel()

    betas, gamma, eps, weight_decay, k: β1, β2, γ, ε, λ, k; the defaults are section 3.1's for Sophia-G (Sophia-H: γ = 0.01).
    clip: the paper's 1. The first version of the paper has η₁·clip(m/max(h, ε), ρ₁): that is lr = η₁·ρ₁, gamma = ρ₁. The authors'
    code keeps B out of h and multiplies by it in the step: the same gamma. bias_correction: divide m by 1 − β1ᵗ and h by 1 − β2ⁿ
    (n refreshes) as Adam does; the paper does not, and then h starts at a hundredth of its size and nearly all is clipped for a
    while. fused: None = the Triton kernel for CUDA tensors where there is one; False = never; True = where there is none, compile
    the rule. Raises ValueError for a setting out of range and for sparse or complex gradients.
    """

    fused, wins, seen, warned = None, (), 0, False  # not part of the state: a copied or unpickled optimizer starts from these

    def __init__(self, params, lr=6e-4, betas=(0.96, 0.99), gamma=0.05, eps=1e-12, weight_decay=0.2, k=10, clip=1.0,
                 bias_correction=False, fused=None):
        for name, value, valid in (
            ("lr", lr, lr >= 0), ("beta1", betas[0], 0 <= betas[0] < 1), ("beta2", betas[1], 0 <= betas[1] < 1),
            ("gamma", gamma, gamma > 0), ("eps", eps, eps > 0), ("weight_decay", weight_decay, weight_decay >= 0),
            ("k", k, k >= 1), ("clip", clip, clip > 0),
        ):
            if not valid:
                raise ValueError(f"Sophia: {name} = {value} is out of range")
        group = dict(lr=lr, betas=tuple(betas), gamma=gamma, eps=eps, weight_decay=weight_decay, k=k, clip=clip)
        super().__init__(params, dict(**group, bias_correction=bias_correction, steps=0, refreshes=0))
        self.fused = fused

    @property
    def params(self):
        """All parameters, in the order in which update_hessian takes their estimates."""
        return [p for group in self.param_groups for p in group["params"]]

    @property
    def hessian_due(self):
        """True before the steps 1, k+1, 2k+1, …: the paper's t mod k = 1."""
        return self.param_groups[0]["steps"] % self.param_groups[0]["k"] == 0

    def averages(self, p):
        """(m, h) of one parameter: float32 or wider whatever the parameter's dtype, zero at the start."""
        state = self.state[p]
        if not state:
            for name in ("momentum", "hessian"):
                state[name] = torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32))
        return state["momentum"], state["hessian"]

    def has_kernel(self, p):
        return fused_sophia_update_ is not None and self.fused is not False and p.is_cuda and p.dtype != torch.float64

    @torch.no_grad()
    def update_hessian(self, estimates, n_terms=None):
        """h ← β2·h + (1 − β2)·ĥ. Call it when hessian_due, before step().

        estimates: one tensor a parameter in the order of self.params (None: leave it): ĥ itself, or, when n_terms is given,
        the gradient ĝ of the loss on sampled labels. n_terms: B, how many terms that loss is the mean of: tokens, not
        sequences; ignored targets do not count.
        """
        estimates = list(estimates)
        if len(estimates) != len(self.params):
            raise ValueError(f"Sophia: {len(estimates)} curvature estimates for {len(self.params)} parameters")
        if n_terms is not None and n_terms <= 0:
            raise ValueError(f"Sophia: n_terms = {n_terms}, but B counts the terms (tokens) that the sampled loss averages")
        estimates = iter(estimates)
        for group in self.param_groups:
            pairs = [(self.averages(p)[1], e) for p, e in zip(group["params"], estimates) if e is not None]
            for h, e in pairs:
                if h.shape != e.shape:
                    raise ValueError(f"Sophia: an estimate of shape {tuple(e.shape)} for a parameter of {tuple(h.shape)}")
            ema = fused_hessian_ema_ if group["params"] and self.has_kernel(group["params"][0]) else hessian_ema_
            ema([h for h, _ in pairs], [e for _, e in pairs], group["betas"][1], n_terms)
            group["refreshes"] += 1

    @torch.no_grad()
    def step(self, closure=None):
        """One update from every p.grad. Returns the closure's loss, if one is given."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.wins, self.seen = [], 0
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            for p in params:
                if p.grad.is_sparse or p.is_complex():
                    raise ValueError("Sophia takes dense real gradients, neither sparse nor complex ones")
            group["steps"] += 1
            if not params:
                continue
            if group["steps"] > 2 * group["k"] and not group["refreshes"] and not self.warned:
                self.warned = True
                warnings.warn("Sophia: no update_hessian in 2k steps: h is zero and this is sign-momentum", stacklevel=2)
            momenta, hessians = zip(*(self.averages(p) for p in params))
            gamma, eps, (beta1, beta2) = group["gamma"], group["eps"], group["betas"]
            if group["bias_correction"]:  # m/c_m over max(γ·h/c_h, ε) = m over max(γ·(c_m/c_h)·h, c_m·ε)
                c_m, c_h = 1 - beta1 ** group["steps"], 1 - beta2 ** max(group["refreshes"], 1)
                gamma, eps = gamma * c_m / c_h, eps * c_m
            fallback = compiled_sophia_update_ if self.fused else sophia_update_
            update = fused_sophia_update_ if self.has_kernel(params[0]) else fallback
            self.wins.append(update(params, [p.grad for p in params], momenta, hessians, group["lr"], beta1, gamma, eps,
                                    group["weight_decay"], group["clip"]))
            self.seen += sum(p.numel() for p in params)
        return loss

    @property
    def win_rate(self):
        """Share of coordinates that the last step did not clip (a float). The paper aims at 0.1 to 0.5 by choice of γ."""
        return sum(map(float, self.wins)) / self.seen if self.seen else math.nan

    def load_state_dict(self, state_dict):
        for state in state_dict["state"].values():
            if set(state) != {"momentum", "hessian"}:
                raise ValueError(f"Sophia: a state with {', '.join(map(str, state))} is not Sophia's momentum and hessian")
        super().load_state_dict(state_dict)
        for i, p in enumerate(self.params):  # subtle: torch has cast the averages to the parameter's dtype; take them unrounded
            for name, value in state_dict["state"].get(i, {}).items():
                self.state[p][name] = value.to(p.device, copy=True)


def sample_labels(logits, generator=None):
    """ŷ ~ softmax(logits): float logits (..., classes) to int64 labels (...). An entry of −inf is never drawn."""
    probs = logits.detach().float().softmax(-1)
    return torch.multinomial(probs.reshape(-1, logits.size(-1)), 1, generator=generator).view(logits.shape[:-1])


def hutchinson(loss, params, generator=None):
    """ĥ = u ⊙ (∇²L·u), one tensor a parameter, with u uniform on {−1, +1}: unbiased for diag ∇²L (section 2.3, option 1).

    The paper draws u ~ N(0, I), also unbiased; with signs the diagonal itself adds no variance. The loss must be twice
    differentiable: run attention under sdpa_kernel(SDPBackend.MATH), and nothing compiled.
    """
    grads = torch.autograd.grad(loss, params, create_graph=True)
    signs = [torch.empty_like(p).bernoulli_(0.5, generator=generator).mul_(2).sub_(1) for p in params]
    return [u * hu for u, hu in zip(signs, torch.autograd.grad(grads, params, signs))]


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


class Lion(torch.optim.Optimizer):
    """Lion (Chen et al. 2023): θ ← θ·(1 − η·λ) − η·sign(β1·m + (1 − β1)·g), m ← β2·m + (1 − β2)·g. With β1 = β2: Signum."""

    def __init__(self, params, lr=1e-4, betas=(0.95, 0.98), weight_decay=0.2):
        super().__init__(params, dict(lr=lr, betas=tuple(betas), weight_decay=weight_decay))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for p in (p for p in group["params"] if p.grad is not None):
                if not self.state[p]:
                    self.state[p]["momentum"] = torch.zeros_like(p)
                m = self.state[p]["momentum"]
                p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(group["lr"] * torch.lerp(m, p.grad, 1 - beta1).sign_())
                m.lerp_(p.grad, 1 - beta2)


# ============================================================================================== the model


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


def counter_seed(*counter):
    """A random seed below 2^31 that depends on the counter alone."""
    return int(np.random.default_rng(counter).integers(2**31))


# ============================================================================================== training

NAMES = {"adamw": "AdamW", "signum": "Signum", "lion": "Lion", "sophiag": "Sophia-G", "sophiah": "Sophia-H"}
RECIPES = {  # the paper's and its repository's constants (section 3.1)
    "adamw": dict(beta1=0.9, beta2=0.95, weight_decay=0.1),
    "lion": dict(beta1=0.95, beta2=0.98, weight_decay=0.2),
    "signum": dict(beta1=0.95, weight_decay=0.2),
    "sophiag": dict(beta1=0.96, beta2=0.99, weight_decay=0.2, gamma=0.05, k=10),
    "sophiah": dict(beta1=0.96, beta2=0.99, weight_decay=0.2, gamma=0.01, k=10),
}
LEARNING_RATES = {  # peak, by model: adamw, lion and signum, sophia (the paper's; tiny: ours; gpt2-xl: the paper's 1.5B)
    "tiny": (2e-3, 5e-4, 5e-4), "30M": (1.2e-3, 4e-4, 1e-3), "gpt2": (6e-4, 1.5e-4, 6e-4), "gpt2-medium": (3e-4, 6e-5, 4e-4),
    "gpt2-large": (2e-4, 8e-5, 3e-4), "gpt2-xl": (1.5e-4, 5e-5, 1.2e-4),
}
PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "L40": 181e12, "4090": 165e12}  # bfloat16, dense, data sheets


def make_optimizer(name, model, lr, beta1, weight_decay, beta2=None, gamma=None, k=10, clip=1.0, bias_correction=False, fused=None):
    """One of RECIPES. Decay reaches the linear layers, not embeddings, norms and biases (the authors' grouping, for all alike)."""
    linear = {m.weight for m in model.modules() if isinstance(m, nn.Linear)} - {model.lm_head.weight}
    groups = [dict(params=[p for p in model.parameters() if p in linear]),
              dict(params=[p for p in model.parameters() if p not in linear], weight_decay=0.0)]
    groups = [group for group in groups if group["params"]]
    if name == "adamw":
        return torch.optim.AdamW(groups, lr, (beta1, beta2), weight_decay=weight_decay, fused=True)
    if name in ("lion", "signum"):
        return Lion(groups, lr, (beta1, beta1 if name == "signum" else beta2), weight_decay)
    return Sophia(groups, lr, (beta1, beta2), gamma, weight_decay=weight_decay, k=k, clip=clip, bias_correction=bias_correction,
                  fused=fused)


def lr_at(step, steps, lr, warmup):
    """Learning rate of update 0 ≤ step < steps: linear from lr/warmup to lr over warmup updates, then a cosine to 0.05·lr."""
    if step < warmup:
        return lr * (step + 1) / warmup
    return lr * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - 1 - warmup))))


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


def curvature(estimator, loss_of, params, batches):
    """ĥ for params: the mean over micro-batches (idx, targets, seed) of one estimate each.

    Squaring ĝ by micro-batch, not the mean ĝ of all as the paper does, has the same expectation and with M of them 1/M of the
    variance: each square is about σ²·χ²₁, however large its batch. estimator: "bartlett", "hutchinson", or "fisher" (the Bartlett
    formula with the true labels; biased, for the ablation).
    """
    total = [torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32)) for p in params]
    for i, (idx, targets, seed) in enumerate(batches):
        if estimator == "hutchinson":
            with sdpa_kernel(SDPBackend.MATH):
                loss, n_terms = loss_of(idx, targets, plain=True)[0], None
                estimate = hutchinson(loss, params, torch.Generator(idx.device).manual_seed(seed))
        else:
            loss, n_terms = loss_of(idx, targets, seed if estimator == "bartlett" else None)
            estimate = torch.autograd.grad(loss, params)
        hessian_ema_(total, estimate, i / (i + 1), n_terms)  # a running mean is a moving average with β2 = i/(i + 1)
    return total


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


def plan(model, batch, micro, seq, steps, device, dtype):
    """Say what a run will take on this device, refuse what cannot fit → (flops a token, peak FLOP/s of the device)."""
    n, config = sum(p.numel() for p in model.parameters()), model.config
    flops = 6 * n + 12 * config.n_layer * config.n_embd * seq  # forward and backward, a token
    # weights, gradients, m, h and at a refresh one more gradient and its square; then activations, and logits with gradients
    need = 24 * n + micro * seq * (17 * dtype.itemsize * config.n_layer * config.n_embd + 12 * config.vocab_size)
    a, seconds = torch.randn(2048, 2048, device=device, dtype=dtype), []
    for _ in range(5):
        start = time.perf_counter()
        float((a @ a)[0, 0])  # waits for the device
        seconds.append(time.perf_counter() - start)
    rate, card = 2 * 2048**3 / min(seconds), device.type
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else need
    if device.type == "cuda":
        memory, card = torch.cuda.mem_get_info(device)[0], torch.cuda.get_device_name(device)
    step_seconds = flops * batch * seq / rate
    print(f"{n / 1e6:.1f}M parameters, about {need / 1e9:.1f} GB. {batch} × {seq} tokens a step are {flops * batch * seq / 1e12:.3g} "
          f"TFLOP: at best {step_seconds:.2g} s at the {rate / 1e12:.2g} TFLOP/s of this {card}, "
          f"{steps * step_seconds / 3600:.2g} h for {steps:,} steps", flush=True)
    if need > memory:
        fail(f"{need / 1e9:.1f} GB do not fit into {memory / 1e9:.1f}: take a smaller --model, --micro_batch_size or --seq")
    return flops, next((peak for name, peak in PEAK_FLOPS.items() if name in card), rate)


def train(args):
    """Section 3: pre-train a GPT. One loop for a laptop, a GPU, or the many of torchrun."""
    device, dtype, rank, world = set_up(args)
    name, on_gpu = args.model or "tiny", device.type == "cuda"
    out = Path(args.out or f"out/sophia/train-{name}-{args.optimizer}")
    seq = args.seq or GPT_SIZES[name].get("block_size", 1024)
    batch = args.batch_size or (480 if on_gpu else 8)  # sequences a step, over all ranks
    micro = args.micro_batch_size or math.gcd(batch // world, 8) or 1
    steps = args.steps or (100_000 if on_gpu else 300)
    warmup = min(2000, steps // 20) if args.warmup is None else args.warmup
    if batch % (micro * world):
        fail(f"--batch_size {batch} is not a multiple of --micro_batch_size {micro} × {world} ranks")
    if args.pretrained and args.scale_attn_by_layer:
        fail("--pretrained and --scale_attn_by_layer exclude each other: OpenAI's models were trained without")
    if warmup >= steps:
        fail(f"--warmup {warmup} leaves nothing of --steps {steps}")
    accumulate = batch // (micro * world)
    eval_tokens = (10_485_760 if on_gpu else 0 if name == "tiny" else 16 * seq) if args.eval_tokens is None else args.eval_tokens
    hess_batch = args.hess_batch or batch // (2 if args.optimizer == "sophiag" else 15)  # the paper's 240 and 32 of 480
    n_hess = max(1, math.ceil(hess_batch / (micro * world)))  # micro-batches of a curvature estimate on each rank
    shards, val_shards, tokenizer = load_tokens(args.data, args.tokenizer or ("bytes" if name == "tiny" else "auto"), seq)

    if args.pretrained:
        model = GPT.from_pretrained(name)
    else:
        rows = N_VOCAB[tokenizer] if name == "tiny" else 50304
        size = dict(GPT_SIZES[name], block_size=seq, vocab_size=rows)
        model = GPT(GPTConfig(**size, scale_attn_by_layer=args.scale_attn_by_layer))
    model.to(device)
    recipe = dict(RECIPES[args.optimizer], lr=LEARNING_RATES[name][{"adamw": 0, "lion": 1, "signum": 1}.get(args.optimizer, 2)])
    recipe |= {key: getattr(args, key) for key in recipe if getattr(args, key) is not None}
    opt = make_optimizer(args.optimizer, model, **recipe, fused=args.compile or None)
    settings = dict(**asdict(model.config), optimizer=args.optimizer, **recipe, batch_size=batch, hess_batch=hess_batch, steps=steps,
                    warmup=warmup, seed=args.seed, data=args.data, tokenizer=tokenizer, corpus=corpus_hash(shards))
    first, clips = 0, 0
    if args.resume:
        saved = load_checkpoint(out / "checkpoint.pt", device)
        for key, value in settings.items():
            if saved["settings"].get(key) != value:
                fail(f"{out / 'checkpoint.pt'} was made with {key} = {saved['settings'].get(key)}, this run has {value}")
        model.load_state_dict(saved["model"])
        opt.load_state_dict(saved["optimizer"])
        first, clips = saved["step"], saved["clips"]
    flops, peak = plan(model, batch, micro, seq, steps, device, dtype) if rank == 0 else (0, 1)
    if on_gpu if args.compile is None else args.compile:
        model.trunk = torch.compile(model.trunk)
    loss_of = Loss(model, N_VOCAB[tokenizer])
    ddp = nn.parallel.DistributedDataParallel(loss_of) if world > 1 else loss_of
    params = list(model.parameters())
    autocast = partial(torch.autocast, device.type, dtype, enabled=dtype != torch.float32)

    out.mkdir(parents=True, exist_ok=True)
    log, records = out / "log.jsonl", []
    if rank == 0:
        if args.resume and log.exists():  # what came after the checkpoint happens again; a line cut short by the kill is dropped
            records = [r for r in map(json.loads, log.read_text().split("\n")[:-1]) if r["step"] <= first]
        elif not args.resume and (out / "checkpoint.pt").exists():
            os.replace(out / "checkpoint.pt", out / "previous.pt")  # of another run
        log.write_text("".join(json.dumps(record) + "\n" for record in records))

    def note(**record):
        records.append(record)
        if rank == 0:
            with open(log, "a") as file:
                file.write(json.dumps(record) + "\n")

    def micro_batches(step, n):  # this rank's n of the n × world micro-batches, each with a seed for drawn labels or signs
        for i in range(rank * n, rank * n + n):
            yield *get_batch(shards, micro, seq, device, args.seed, step, i), counter_seed(args.seed, step, i, 1)

    start = time.perf_counter()
    try:
        for step in tqdm(range(first, steps), "train", steps, initial=first, disable=args.quiet or rank > 0):
            for group in opt.param_groups:
                group["lr"] = lr_at(step, steps, recipe["lr"], warmup)
            if isinstance(opt, Sophia) and opt.hessian_due:
                with autocast():
                    estimator = "hutchinson" if args.optimizer == "sophiah" else "bartlett"
                    estimates = curvature(estimator, loss_of, opt.params, micro_batches(step, n_hess))
                for estimate in estimates if world > 1 else ():
                    dist.all_reduce(estimate)
                    estimate /= world
                opt.update_hessian(estimates)
            total = torch.zeros((), device=device)
            for i, (idx, targets, _) in enumerate(micro_batches(step, accumulate)):
                with ddp.no_sync() if world > 1 and i < accumulate - 1 else nullcontext():
                    with autocast():
                        loss = ddp(idx, targets)[0] / accumulate
                    loss.backward()
                total += loss.detach()
            norm = float(nn.utils.clip_grad_norm_(params, 1.0))
            if not math.isfinite(norm):
                bad = next((n for n, p in model.named_parameters() if not p.grad.isfinite().all()), "the norm")
                fail(f"step {step}: the gradient of {bad} is not finite: start anew with a lower --lr or a higher --gamma")
            opt.step()
            opt.zero_grad()
            done, clips = step + 1, clips + (norm > 1)
            if done % args.log_every == 0 or done == steps:
                if world > 1:
                    dist.all_reduce(total)
                speed = (done - first) * batch * seq / (time.perf_counter() - start)
                note(step=done, loss=float(total) / world, lr=opt.param_groups[0]["lr"], norm=norm, clip_rate=clips / done,
                     win_rate=opt.win_rate if isinstance(opt, Sophia) else None, tokens_per_s=speed,
                     mfu=speed * flops / (peak * world))
            if done % args.eval_every == 0 or done == steps:
                with autocast():
                    note(step=done, val_loss=evaluate(loss_of, val_shards, micro, seq, device, rank, world, eval_tokens))
            if rank == 0 and (done % args.save_every == 0 or done == steps):
                state = dict(model=model.state_dict(), optimizer=opt.state_dict(), step=done, clips=clips, settings=settings)
                save_checkpoint(out / "checkpoint.pt", state)
    except KeyboardInterrupt:
        if rank == 0:
            print(f"\nstopped; the checkpoint of every {args.save_every} steps is kept: the same command with --resume goes on")
        raise SystemExit(130) from None
    if rank == 0:
        last = {key: value for record in records for key, value in record.items()}
        shown = ("step", "loss", "val_loss", "tokens_per_s", "mfu", "clip_rate", "win_rate")
        print_table((name, NAMES[args.optimizer]), [(key, f"{last[key]:.4g}") for key in shown if last.get(key) is not None])
        print(save_results(out, args, dict(settings=settings, **last)), plot_train(out, args, records), log, out / "checkpoint.pt",
              sep="\n")
    if world > 1:
        dist.barrier()  # a rank that leaves while another goes on can abort at its exit
        dist.destroy_process_group()


def sample(args):
    """Continue a prompt, from the last checkpoint of `train`, or with --model gpt2… from OpenAI's weights."""
    device, _, _, _ = set_up(args)
    if args.model:
        model, tokenizer = GPT.from_pretrained(args.model), "gpt2"
    else:
        runs = sorted(Path(args.out or "out/sophia").glob("**/checkpoint.pt"), key=os.path.getmtime)
        if not runs:
            fail(f"no checkpoint in {args.out or 'out/sophia'}: first python sophia.py train, or one of OpenAI's with --model")
        saved = load_checkpoint(runs[-1])
        model = GPT(GPTConfig(**{key: saved["settings"][key] for key in GPTConfig.__dataclass_fields__}))
        model.load_state_dict(saved["model"])
        tokenizer = saved["settings"]["tokenizer"]
    _, encode, decode = get_tokenizer(tokenizer)
    ids = encode(args.prompt or "\n").tolist()
    print(decode(generate(model.to(device), ids, args.tokens, args.temperature, args.top_k, args.seed, N_VOCAB[tokenizer])))


# ============================================================================================== the experiments


class Bigram(nn.Module):
    """A convex language model: the next token's logits are one row of a table, zero at the start."""

    def __init__(self, n_vocab):
        super().__init__()
        self.lm_head = nn.Linear(n_vocab, n_vocab, bias=False)
        nn.init.zeros_(self.lm_head.weight)

    def trunk(self, idx):
        return F.one_hot(idx, self.lm_head.in_features).float()  # (batch, seq, n_vocab)


PROBLEMS = ("gpt", "bigram")  # bytes; the GPT has 2 layers, width 64, 4 heads, context 64


@lru_cache(2)
def cached_tokens(data, seq):
    return load_tokens(data, "bytes", seq)


def run_once(job):
    """One short run of `compare` or `ablate` → dict(loss, seconds, win_rate): loss in nats a token on 32,768 validation tokens.

    job: problem, data, device, optimizer, steps, seed, warmup (share of the steps), estimator, and the optimizer's settings.
    """
    job = dict(job)
    problem, data, device, optimizer, steps, seed, warmup = map(
        job.pop, ("problem", "data", "device", "optimizer", "steps", "seed", "warmup"))
    estimator = job.pop("estimator", "hutchinson" if optimizer == "sophiah" else "bartlett")
    batch, seq = job.pop("batch_size"), 64
    shards, val_shards, _ = cached_tokens(data, seq)
    torch.manual_seed(seed)
    torch.set_flush_denormal(True)
    size = dict(block_size=seq, vocab_size=256, n_layer=2, n_head=4, n_embd=64)
    model = (Bigram(256) if problem == "bigram" else GPT(GPTConfig(**size))).to(device)
    opt, loss_of = make_optimizer(optimizer, model, **job), Loss(model, 256)
    win_rates, start = [], time.perf_counter()
    for step in range(steps):
        for group in opt.param_groups:
            group["lr"] = lr_at(step, steps, job["lr"], max(1, round(warmup * steps)))
        idx, targets = get_batch(shards, batch, seq, device, seed, step)
        if isinstance(opt, Sophia) and opt.hessian_due:  # four micro-batches, together the batch
            seeds = [counter_seed(seed, step, i) for i in range(4)]
            opt.update_hessian(curvature(estimator, loss_of, opt.params, zip(idx.chunk(4), targets.chunk(4), seeds)))
        loss, _ = loss_of(idx, targets)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        opt.step()
        opt.zero_grad()
        if isinstance(opt, Sophia) and opt.hessian_due:
            win_rates.append(opt.win_rate)
    seconds = time.perf_counter() - start
    with torch.no_grad():
        final = [loss_of(*get_batch(val_shards, 64, seq, device, 2**31, i))[0] for i in range(8)]
    final = float(torch.stack(final).mean())
    final = final if math.isfinite(final) else math.inf
    return dict(loss=final, seconds=seconds, win_rate=float(np.mean(win_rates)) if win_rates else math.nan)


@contextmanager
def workers(args, device, n_jobs):
    """Yields run(jobs) → results in order: shared out among torchrun's ranks, among the cores of a CPU, or one by one on a GPU."""
    world = dist.get_world_size() if dist.is_initialized() else 1
    alone = world > 1 or device.type != "cpu"
    pool = None if alone else ProcessPoolExecutor(os.cpu_count(), get_context("spawn"), torch.set_num_threads, (1,))

    def run(jobs):
        if world > 1:
            shares = [None] * world
            dist.all_gather_object(shares, [run_once(job) for job in jobs[dist.get_rank() :: world]])
            bar.update(len(jobs))
            return [shares[i % world][i // world] for i in range(len(jobs))]
        results = []
        for result in (pool.map if pool else map)(run_once, jobs):
            bar.update()
            results.append(result)
        return results

    with tqdm(total=n_jobs, desc=args.task, unit="run", disable=args.quiet or world > 1 and dist.get_rank() > 0) as bar:
        with pool or nullcontext():
            yield run
    if world > 1:
        dist.barrier()  # a rank that leaves while another goes on can abort at its exit
        dist.destroy_process_group()


# Every optimizer is tuned by the same search with the same number of trials: from a start, one setting after the other, the best
# value so far kept. A trial is T steps on each of two seeds of its own, for one lucky run is no tuning. (start, [(setting, values
# tried), …]); warmup: share of T.
CURVED = dict(beta1=0.6, beta2=0.95, warmup=0.6, weight_decay=0.1, gamma=0.02, k=5, bias_correction=True)
SIGNS = [("lr", (1e-4, 1.5e-3, 3e-3, 6e-3)), ("beta1", (0.4, 0.9)), ("warmup", (0.4,))]  # most coordinates move by the whole lr
CONVEX = [("lr", (0.03, 0.07, 0.1, 0.14)), ("beta1", (0.4, 0.9)), ("warmup", (0.05,))]
SEARCH = {
    "gpt": {
        "adamw": (dict(beta1=0.6, beta2=0.95, warmup=0.6, weight_decay=0.1),
                  [("lr", (2e-3, 4e-3, 8e-3, 1.6e-2)), *SIGNS[1:], ("beta2", (0.9,))]),
        "signum": (dict(beta1=0.6, warmup=0.6, weight_decay=0.1), [*SIGNS, ("lr", (4.5e-3,))]),
        "lion": (dict(beta1=0.6, beta2=0.9, warmup=0.6, weight_decay=0.1), [*SIGNS, ("beta2", (0.8,))]),
        "sophiag": (CURVED, [*SIGNS, ("gamma", (0.005,))]),
        "sophiah": (CURVED, [*SIGNS, ("gamma", (0.005,))]),
    },
    "bigram": {  # convex and undecayed: larger steps
        "adamw": (dict(beta1=0.6, beta2=0.95, warmup=0.2, weight_decay=0.0),
                  [("lr", (0.1, 0.2, 0.4, 0.7)), *CONVEX[1:], ("beta2", (0.99,))]),
        "signum": (dict(beta1=0.6, warmup=0.2, weight_decay=0.0), [*CONVEX, ("lr", (0.12,))]),
        "lion": (dict(beta1=0.6, beta2=0.9, warmup=0.2, weight_decay=0.0), [*CONVEX, ("beta2", (0.8,))]),
        "sophiag": (dict(CURVED, warmup=0.2, weight_decay=0.0), [*CONVEX, ("gamma", (0.1,))]),
        "sophiah": (dict(CURVED, warmup=0.2, weight_decay=0.0), [*CONVEX, ("gamma", (0.1,))]),
    },
}
N_TRIALS = 8
TUNED = ("lr", "beta1", "warmup", "beta2", "gamma")


def tune(problem, shared, run):
    """→ {optimizer: (settings, names of the settings whose best value is the lowest or highest tried)}."""
    seeds = shared["seed"], shared["seed"] + 1
    tried = {name: [(math.inf, dict(start, lr=rows[0][1][0]))] for name, (start, rows) in SEARCH[problem].items()}
    for row in range(len(SEARCH[problem]["adamw"][1])):  # the same row of all optimizers at once: they share the cores
        candidates = []
        for name, (_, rows) in SEARCH[problem].items():
            best, (setting, values) = min(tried[name], key=lambda trial: trial[0])[1], rows[row]
            candidates += [(name, {**best, setting: value}) for value in values]
        results = iter(run([{**shared, "optimizer": name, "seed": seed, **settings} for name, settings in candidates for seed in seeds]))
        for name, settings in candidates:
            tried[name].append((sum(next(results)["loss"] for _ in seeds), settings))
    tuned = {}
    for name, trials in tried.items():
        settings = min(trials, key=lambda trial: trial[0])[1]
        values = {key: {trial[key] for _, trial in trials[1:]} for key in settings}
        tuned[name] = settings, [key for key, seen in values.items() if len(seen) > 1 and settings[key] in (min(seen), max(seen))]
    return tuned


def speedup(loss, losses):
    """How many times T steps the baseline needs for this loss, given its losses after T/2, T and 2T steps, each run with its own
    schedule: on the curve L = a + b·T^−c through the three. −inf or inf outside them: no extrapolation."""
    first, second = losses[0] - losses[1], losses[1] - losses[2]
    if not min(losses) <= loss <= losses[0]:
        return math.inf if loss < losses[0] else -math.inf
    if min(first, second) <= 0 or first == second:  # no such curve: straight lines in log T
        doublings = (losses[0] - loss) / first if first > 0 and loss >= losses[1] else 1 + (losses[1] - loss) / second
    else:
        r = second / first  # L(T/2) − L falls short of its limit by r = 2^−c for each doubling
        doublings = math.log(1 - (losses[0] - loss) * (1 - r) / first) / math.log(r)
    return 2 ** (doublings - 1)


def spread(factors):
    """Speed-ups of several seeds in words: mean ± sd, or from – to where some lie outside the baseline's runs."""
    if all(map(math.isfinite, factors)):
        return f"{np.mean(factors):.2f} ± {np.std(factors, ddof=len(factors) > 1):.2f}"
    ends = ["under 0.5" if f == -math.inf else "over 2" if f == math.inf else f"{f:.2f}" for f in (min(factors), max(factors))]
    return " to ".join(dict.fromkeys(ends))


def compare(args):
    """Section 3.2's question, asked fairly: how many steps of AdamW is one step of Sophia worth?

    Equal tuning budgets, at T steps and on another seed; every run has a cosine schedule over just its own length; AdamW at T/2, T
    and 2T, the others at T. Tuning and results use the same validation tokens.
    """
    device, _, rank, _ = set_up(args)
    problems = PROBLEMS if args.problem == "both" else [args.problem]
    out, seeds, ddof = Path(args.out or "out/sophia/compare"), range(args.seed, args.seed + args.seeds), int(args.seeds > 1)
    half = max(1, (args.steps or 64) // 2)
    lengths, steps, rows, lines = [half, 2 * half, 4 * half], 2 * half, [], []
    corpus = corpus_hash(cached_tokens(args.data, 64)[0])  # here, so that unusable data stops us before the workers start
    with workers(args, device, len(problems) * (len(NAMES) * N_TRIALS * 2 + (len(NAMES) + 2) * len(seeds))) as run:
        for problem in problems:
            shared = dict(problem=problem, data=args.data, device=str(device), batch_size=args.batch_size or 16)
            tuned = tune(problem, dict(shared, steps=steps, seed=args.seed + 1000), run)
            finals = [("adamw", n) for n in lengths] + [(name, steps) for name in tuned if name != "adamw"]
            jobs = [dict(shared, optimizer=name, steps=n, seed=seed, **tuned[name][0]) for name, n in finals for seed in seeds]
            results, done = iter(run(jobs)), {}
            for name, n in finals:
                group = [next(results) for _ in seeds]
                done[name, n] = dict(problem=problem, optimizer=name, steps=n, **{key: [r[key] for r in group] for key in group[0]})
                done[name, n] |= dict(zip(("settings", "edges"), tuned[name]), trials=N_TRIALS)
            adam = np.array([done["adamw", n]["loss"] for n in lengths])  # (length, seed)
            for row in done.values():
                row["speedup"] = [speedup(loss, adam[:, i]) for i, loss in enumerate(row["loss"])]
            rows += done.values()
            for name in ("sophiag", "sophiah"):
                ours = done[name, steps]
                gap, cost = np.array(ours["loss"]) - adam[1], np.sum(ours["seconds"]) / np.sum(done["adamw", steps]["seconds"])
                sure, holds = abs(gap.mean()) > gap.std(ddof=ddof), np.mean(ours["loss"]) <= adam[2].mean()
                side = "level with" if not sure else "behind" if gap.mean() > 0 else "ahead of"
                lines.append(
                    f"{problem}: {NAMES[name]} {side} AdamW at {steps} steps, {gap.mean():+.3f} ± {gap.std(ddof=ddof):.3f} (paired, n = "
                    f"{len(seeds)}); speed-up {spread(ours['speedup'])} in steps, each of which takes {cost:.2f} times as long. The "
                    f"paper's factor of 2 {'holds' if holds else 'fails'} here: AdamW at {2 * steps} steps has {adam[2].mean():.3f}.")
    if rank == 0:
        print_table(
            ("problem", "optimizer", "steps", "loss", "± sd", "speed-up", "win rate", "s a run", "settings (* = edge of those tried)"),
            [(row["problem"], NAMES[row["optimizer"]], row["steps"], np.mean(row["loss"]).item(), np.std(row["loss"], ddof=ddof).item(),
              spread(row["speedup"]), np.mean(row["win_rate"]).item(), np.mean(row["seconds"]).item(), " ".join(
                  f"{key}{'*' if key in row['edges'] else ''}={row['settings'][key]:g}" for key in TUNED if key in row["settings"]))
             for row in rows])
        print(*lines, save_results(out, args, dict(table=rows, verdicts=lines, corpus=corpus)), plot_compare(out, args, rows), sep="\n")


def toy(args):
    """Figure 2: why clip. L(a, b) = 8(a − 1)²(1.3a² + 2a + 1) + (b − 4)²/2, from (0.2, 0), 50 steps, exact derivatives.

    The paper gives neither start nor rates; these are ours. Sophia without averages: θ ← θ − 0.3·clip(g/max(0.3·h, ε), 1).
    """
    out = Path(args.out or "out/sophia/toy")

    def loss(p):
        return 8 * (p[0] - 1) ** 2 * (1.3 * p[0] ** 2 + 2 * p[0] + 1) + (p[1] - 4) ** 2 / 2

    def grad(p):
        return np.array([41.6 * p[0] ** 3 - 14.4 * p[0] ** 2 - 27.2 * p[0], p[1] - 4])

    def hess(p):
        return np.array([124.8 * p[0] ** 2 - 28.8 * p[0] - 27.2, 1.0])

    m, v = np.zeros(2), np.zeros(2)  # Adam's

    def adam(p, t):
        m[:], v[:] = 0.9 * m + 0.1 * grad(p), 0.95 * v + 0.05 * grad(p) ** 2
        return 0.3 * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.95**t)) + 1e-8)

    rules = {
        "GD": lambda p, t: 0.015 * grad(p),
        "SignGD": lambda p, t: 0.3 * np.sign(grad(p)),
        "Adam": adam,
        "Newton": lambda p, t: grad(p) / hess(p),
        "Sophia": lambda p, t: 0.3 * np.clip(grad(p) / np.maximum(0.3 * hess(p), 1e-12), -1, 1),
    }
    paths = {}
    for name, rule in rules.items():
        path = [np.array([0.2, 0.0])]
        for t in range(1, 51):
            path.append(path[-1] - rule(path[-1], t))
        paths[name] = np.array(path)
    rows = []
    for name, path in paths.items():
        below = [t for t, p in enumerate(path) if loss(p) < 1e-3]
        rows.append((name, *path[-1], loss(path[-1]), below[0] if below else "never"))
    print_table(("50 steps", "a", "b", "loss", "steps to loss < 0.001"), rows)
    print("minimum (1, 4) loss 0; saddle (0, 4) loss 8, where Newton ends; second minimum (-0.654, 4) loss 5.428")
    print(save_results(out, args, dict(table=rows)), plot_toy(out, args, paths, loss), sep="\n")


def ablate(args):
    """Section 3.4 on the small GPT: how often to refresh the curvature, by which estimate, whether to clip; and what decided our
    own comparison, momentum and warm-up."""
    device, _, rank, _ = set_up(args)
    out, seeds = Path(args.out or "out/sophia/ablate"), range(args.seed, args.seed + args.seeds)
    base = dict(CURVED, optimizer="sophiag", lr=3e-3, warmup=0.4)
    variants = {
        f"Sophia-G, k = {base['k']}": {}, "k = 1": dict(k=1), "k = 10": dict(k=10), "k = 50": dict(k=50),
        "Hutchinson's estimate": dict(optimizer="sophiah"), "empirical Fisher (true labels)": dict(estimator="fisher"),
        "no curvature: all clipped": dict(gamma=1e-12), "no clipping": dict(clip=math.inf),
        "no bias correction": dict(bias_correction=False), "gamma = 0.2": dict(gamma=0.2),
        "beta1 = 0.96, the paper's": dict(beta1=0.96), "warm-up over 5 %": dict(warmup=0.05),
        "both": dict(beta1=0.96, warmup=0.05), "both, lr = 0.001": dict(beta1=0.96, warmup=0.05, lr=1e-3),
    }
    shared = dict(base, problem="gpt", data=args.data, device=str(device), batch_size=args.batch_size or 16, steps=args.steps or 200)
    with workers(args, device, len(variants) * len(seeds)) as run:
        results = iter(run([{**shared, "seed": seed, **variant} for variant in variants.values() for seed in seeds]))
    if rank == 0:
        rows = []
        for name in variants:
            group = [next(results) for _ in seeds]
            loss, wins, seconds = (np.array([r[key] for r in group]) for key in ("loss", "win_rate", "seconds"))
            rows.append((name, loss.mean().item(), loss.std(ddof=int(len(seeds) > 1)).item(), wins.mean().item(), seconds.mean().item()))
        print_table((f"small GPT, {shared['steps']} steps", "loss", "± sd", "win rate", "s a run"), rows)
        print(save_results(out, args, dict(settings=base, table=rows)))


def bench(args):
    """Section 3.3: what an update costs over the tensors of a model, each optimizer in a process of its own, one after another.
    (The output head with and without its kernel: python -m kernels.linear_cross_entropy.)"""
    device, *_ = set_up(args)
    name, out = args.model or "gpt2", Path(args.out or "out/sophia/bench")
    rows = []
    kinds = ("AdamW fused", "AdamW foreach", "Lion", "Sophia, tensor by tensor", "Sophia", "Sophia fused")
    for kind in tqdm(kinds, "bench", disable=args.quiet):
        with ProcessPoolExecutor(1, get_context("spawn")) as pool:
            rows.append((kind, *pool.submit(time_steps, kind, name, str(device)).result()))
    base = rows[0][1]
    print_table((f"optimizer step, {name}, {device.type}", "ms", "of AdamW fused", "refresh of h, ms", "state, GB", "peak memory, GB"),
                [(row[0], row[1], row[1] / base, *row[2:]) for row in rows])
    print(save_results(out, args, dict(table=rows)))


def time_steps(kind, name, device):
    """→ (ms a step, ms a curvature refresh, GB of state, GB at the peak), the least of ten steps after two to warm up."""
    torch.set_flush_denormal(True)
    params = list(GPT(GPTConfig(**GPT_SIZES[name])).to(device).parameters())
    for p in params:
        p.grad = torch.randn_like(p) * 1e-3
    grads = [p.grad for p in params]

    def seconds(function):
        times = []
        for _ in range(12):
            start = time.perf_counter()
            function()
            if params[0].is_cuda:
                torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
        return min(times[2:])

    if kind.startswith("AdamW"):
        opt = torch.optim.AdamW(params, 1e-4, fused=kind.endswith("fused"), foreach=kind.endswith("foreach"))
    elif kind == "Lion":
        opt = Lion(params)
    else:
        opt = Sophia(params, fused=kind == "Sophia fused")
    step, refresh = opt.step, math.nan
    if isinstance(opt, Sophia):
        refresh = seconds(lambda: opt.update_hessian(grads, n_terms=1000))
        if kind == "Sophia, tensor by tensor":
            settings = (1e-4, 0.96, 0.05, 1e-12, 0.2, 1.0)
            step = torch.no_grad()(lambda: [sophia_rule_(p, p.grad, *opt.averages(p), *settings) for p in params])
    step_seconds = seconds(step)
    state = sum(t.nbytes for state in opt.state.values() for t in state.values() if torch.is_tensor(t))
    if params[0].is_cuda:
        peak = torch.cuda.max_memory_allocated()
    else:
        from resource import RUSAGE_SELF, getrusage  # Unix

        peak = getrusage(RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return step_seconds * 1e3, refresh * 1e3, state / 1e9, peak / 1e9


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


def plot_compare(out, args, rows):
    def draw(axes):
        for ax, problem in zip(axes[0], dict.fromkeys(row["problem"] for row in rows)):
            for name in NAMES:
                runs = [row for row in rows if (row["problem"], row["optimizer"]) == (problem, name)]
                shift = 1 if name == "adamw" else 1.025 ** (list(NAMES).index(name) - 2.5)  # side by side
                ax.errorbar([row["steps"] * shift for row in runs], *zip(*((np.mean(row["loss"]), np.std(row["loss"])) for row in runs)),
                            marker="o", capsize=3, label=NAMES[name], color="black" if name == "adamw" else None)
            ax.set(xscale="log", xlabel="steps, each run with its own schedule",
                   title={"gpt": "small GPT", "bigram": "convex bigram model"}[problem] + ": below the line is ahead of AdamW")
            ax.set_xticks(ticks := sorted({row["steps"] for row in rows}), map(str, ticks))
            ax.minorticks_off()
            ax.legend()
        axes[0][0].set_ylabel("validation loss, nats a byte")

    return figure(out, "compare.png", args, draw, ncols=len({row["problem"] for row in rows}), squeeze=False, figsize=(11, 4.2))


def plot_toy(out, args, paths, loss):
    def draw(ax):
        a, b = np.meshgrid(np.linspace(-1.1, 1.5, 300), np.linspace(-0.5, 5.2, 300))
        ax.contour(a, b, np.log1p(loss((a, b))), 25, cmap="Greys", alpha=0.6)
        for (name, path), marker in zip(paths.items(), "os^Dv"):
            ax.plot(*path.T, marker=marker, ms=4, lw=1, label=name)
        ax.plot(1, 4, "k*", ms=14, zorder=5)
        ax.set(xlabel="a (sharp)", ylabel="b (flat)", title="50 steps from (0.2, 0); the star is the minimum")
        ax.legend()

    return figure(out, "toy.png", args, draw, figsize=(6, 4.6))


def plot_train(out, args, records):
    def draw(ax):
        for key, style in (("loss", "-"), ("val_loss", "o--")):
            points = [(r["step"], r[key]) for r in records if key in r]
            ax.plot(*zip(*points), style, label={"loss": "training", "val_loss": "validation"}[key])
        ax.set(xlabel="steps", ylabel="loss, nats a token", title=f"{args.model or 'tiny'}, {NAMES[args.optimizer]}")
        ax.legend()

    return figure(out, "train.png", args, draw, figsize=(6, 4))


# ============================================================================================== command line

TASKS = {"compare": compare, "train": train, "toy": toy, "ablate": ablate, "bench": bench, "sample": sample}


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.error = fail  # one line, exit code 2
    flag, count, share = parser.add_argument, number(int, 1), number(float, 0, 0.999999)
    flag("task", nargs="?", choices=TASKS, help="compare (the default): what is a step of Sophia worth in steps of AdamW; train (the "
         "default with --model): pre-train a GPT; toy: figure 2; ablate: section 3.4; bench: cost of a step; sample: continue --prompt")
    flag("--model", choices=GPT_SIZES, help="train, sample, bench: size of the GPT (train: tiny; bench: gpt2)")
    flag("--optimizer", choices=RECIPES, default="sophiag", help="train: which optimizer")
    flag("--data", default="stdlib", help="stdlib (default), prose, code; shakespeare, fineweb:N (downloads; N shards); a "
         "text file; a folder of .bin shards")
    flag("--tokenizer", choices=("auto", "bytes", "gpt2"), help="train: bytes for tiny, else auto (gpt2 where tiktoken has it)")
    flag("--problem", choices=(*PROBLEMS, "both"), default="both", help="compare: which problem")
    flag("--seeds", type=count, default=3, help="compare, ablate: number of seeds, from --seed on")
    flag("--steps", type=count, help="updates; compare: T = 64; ablate: 200; train: 100,000 on a GPU (the paper's), 300 on a CPU")
    flag("--batch_size", type=count, help="train: sequences an update, over all ranks (480 on a GPU, the paper's; 8 on a CPU)")
    flag("--hess_batch", type=count, help="train: of them in a curvature estimate, rounded up to whole micro-batches on every rank (the "
         "paper's share: a half for Sophia-G, a fifteenth for Sophia-H)")
    flag("--micro_batch_size", type=count, help="train: sequences a forward pass (8, if it divides)")
    flag("--seq", type=number(int, 2), help="train: context in tokens (1024, the paper's; tiny: 128)")
    flag("--lr", type=number(float, 0), help="train: peak learning rate (the paper's for the model; tiny: tuned by us)")
    flag("--beta1", type=share, help="train: decay of the momentum (0.96; AdamW 0.9; Lion, Signum 0.95)")
    flag("--beta2", type=share, help="train: decay of the curvature (0.99; AdamW 0.95; Lion 0.98)")
    flag("--weight_decay", type=number(float, 0), help="train: decoupled (0.2; AdamW 0.1)")
    flag("--gamma", type=number(float, 1e-12), help="train: lower = more coordinates clipped (Sophia-G 0.05, Sophia-H 0.01)")
    flag("--k", type=count, help="train: updates between two refreshes of the curvature (10)")
    flag("--warmup", type=number(int, 0), help="train: updates of linear warm-up (2000, the paper's, or a twentieth of --steps)")
    flag("--scale_attn_by_layer", action="store_true", help="train: divide the attention logits of layer i by i + 1, as "
         "the paper's baselines need")
    flag("--pretrained", action="store_true", help="train: start from OpenAI's weights (download)")
    flag("--eval_every", type=count, default=1000, help="train: updates between validations")
    flag("--eval_tokens", type=number(int, 0), help="train: validation tokens, the first so many; 0 = all (10,485,760 on a GPU; on a CPU "
         "all for tiny, else 16 windows)")
    flag("--save_every", type=count, default=1000, help="train: updates between checkpoints")
    flag("--log_every", type=count, default=10, help="train: updates between lines of log.jsonl")
    flag("--resume", action="store_true", help="train: go on from the checkpoint in --out")
    flag("--prompt", default="The ", help="sample: the text to continue")
    flag("--tokens", type=count, default=200, help="sample: how many to draw")
    flag("--temperature", type=number(float, 0), default=0.8, help="sample: 0 = always the likeliest")
    flag("--top_k", type=count, default=50, help="sample: draw among the k likeliest")
    flag("--device", default="auto", help="auto is cuda, else mps, else cpu")
    flag("--dtype", choices=("auto", "float32", "bfloat16"), default="auto", help="train: of matmuls; auto: bfloat16 on cuda")
    flag("--seed", type=number(int, 0, 2**31), default=0, help="of weights, data order and drawn labels")
    flag("--out", help="folder for results, figures and checkpoints (out/sophia/<task>…)")
    flag("--compile", action=argparse.BooleanOptionalAction, help="train: torch.compile; on for cuda, on a CPU needs a C++ compiler")
    flag("--no_plot", action="store_true", help="write no figure")
    flag("--quiet", action="store_true", help="no progress bars")
    args = parser.parse_args(argv)
    args.task = args.task or ("train" if args.model else "compare")
    if args.resume and args.task != "train":
        fail("--resume goes with train alone")
    return args


def main():
    args = parse_args()
    try:
        TASKS[args.task](args)
    except KeyboardInterrupt:
        fail("stopped")


if __name__ == "__main__":
    main()
