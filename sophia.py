"""Sophia: a second-order clipped optimizer for language-model pre-training (Liu and others, arXiv 2305.14342).

The problem. Curvature differs by orders of magnitude between the coordinates of a language model's loss. Sign-like
methods (and Adam nearly is one) move every coordinate by about the learning rate: flat ones crawl, sharp ones bounce.
Newton's method would scale each step by the curvature, but it runs to saddle points where curvature is negative, trusts
a quadratic model far beyond its range, and needs a Hessian.

The idea. Keep two moving averages, of the gradient and of a cheap unbiased estimate ĥ of the Hessian's diagonal,
refreshed every k = 10 steps; divide one by the other; clip every coordinate of the ratio to [−1, 1]. Where curvature is
large the step is Newton's; where it is tiny, negative or wrong it is a step of η along the sign of the momentum.

    m ← β1·m + (1 − β1)·g                            at every step; g: gradient, clipped to norm 1
    h ← β2·h + (1 − β2)·ĥ                            at steps 1, k + 1, 2k + 1, …
    θ ← θ·(1 − η·λ)                                  decoupled weight decay
    θ ← θ − η·clip(m / max(γ·h, ε), 1)               Algorithm 3; γ sets how many coordinates are clipped

    Sophia-G   ĥ = B·ĝ², ĝ the gradient of the loss with labels ŷ ~ softmax(logits) drawn from the model (Algorithm 2,
               Gauss-Newton-Bartlett; unbiased for the Gauss-Newton diagonal, never negative; B counts tokens)
    Sophia-H   ĥ = u·(∇²L·u) for a random u (Algorithm 1, Hutchinson; unbiased for the Hessian's diagonal)

How to run it.

    python sophia.py                        AdamW against Sophia, tuned alike: table, verdict, figure (2 minutes)
    python sophia.py toy | ablate | bench   figure 2 of the paper; what matters and what does not; the cost of a step
    python sophia.py train --steps 50       a tiny GPT on Python's sources; Ctrl-C and --resume
    python sophia.py --model gpt2-medium    the paper's recipe: on a GPU with FineWeb by download; also by torchrun

What the paper reports: AdamW's validation loss in half the steps for GPT-2 of 125M to 770M, at about 5 % extra time.

What we measured (2 cores of an AMD EPYC, torch 2.13.0, seeds 0 to 2, loss in nats a byte, small GPT of 0.1M weights,
1,024 tokens a step; each entrant tries the same 4 learning rates × 2 β1 on two other seeds):

    python sophia.py        steps     loss            worth AdamW steps     CPU time a step
    AdamW                   32        2.972 ± 0.014   0.5
    AdamW                   64        2.883 ± 0.026   1                     1
    AdamW                   128       2.567 ± 0.011   2
    Signum, Lion            64        2.901, 2.906    0.83, 0.90            0.9 to 1.0
    Sophia-G                64        2.892 ± 0.031   0.91                  1.05 to 1.4
    Sophia-H                64        2.885 ± 0.020   0.97                  1.6 to 2.1

What did not hold at this scale: the factor of 2. Sophia is level with AdamW in steps, behind in time. AdamW at T/2 and
2T is tuned for its own length. Nobody's warm-up, β2, γ, weight decay and k are tuned; where they move, so does the gap:
with `--warmup 0.1` Sophia-G and -H are worth 0.70 and 0.68 AdamW steps, with `--gamma 0.05` 0.77 and 0.93.

`ablate` says what decides (200 steps, seeds 0 to 2, β1 = 0.6, warm-up over half of the run):

    Sophia-G, k = 5             2.395 ± 0.010          Hutchinson's estimate       2.387 ± 0.002
    k = 1, 10, 50               2.386, 2.400, 2.395    true labels (biased)        2.395 ± 0.008
    no clipping                 1,014                  no curvature: all clipped   2.394 ± 0.013
    β1 = 0.96, the paper's      2.767 ± 0.028          warm-up over 5 %            2.589 ± 0.016

Momentum, warm-up and the clip decide here; curvature hardly matters.

What others found later. A. Defazio (issue 31 of the authors' repository): 125M, one script for both, AdamW 2.869,
Sophia-G 2.876. Zhao et al. 2407.07972: tuned Adam, Lion, Adafactor and Sophia end alike. Wen et al. 2509.02046 (two of
the authors): tuned AdamW takes most of the claimed 1.4-2x away.

Cost of a step over gpt2's 124M parameters, nothing compiled (`bench`, one thread of the same machine, others at work):
1.98 times torch's fused AdamW; Algorithm 3 written tensor by tensor takes 6.0 times as long; a refresh of h 0.41.

On a GPU (NVIDIA H100, torch 2.11, 25 November 2026, an earlier loop, gpt2-medium, 96 × 1,024 tokens a step): AdamW
0.544 s a step, Sophia-G 0.576 on average, 5.9 % more; steady 180,000 tokens/s, MFU 44 %. This loop (loss in one
compiled graph, bfloat16 residual stream, micro-batch by memory): its parts had 54.6 % on an H200; the whole: not
measured.

Where this file differs from the paper: ĝ is squared for each micro-batch, not once for the mean (same expectation, less
variance); Hutchinson's u is ±1, not Gaussian (likewise). Not here: dividing attention logits by the layer's number,
which the paper's AdamW and Lion need at 355M.

Try:
    python sophia.py compare --warmup 0.1           Sophia falls behind: it is worth 0.7 AdamW steps instead of 0.9
    in toy, gamma=1e-9 for Sophia's 0.3             SignGD's path: it ends at (0.8, 4.2), loss 1.118, not at (1, 4)
    python sophia.py train --steps 50, then the same with --optimizer adamw     validation loss 3.234 and 2.939
"""

import argparse
import json
import math
import os
import signal
import sys
import sysconfig
import time
import warnings
from collections import deque
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from functools import lru_cache
from importlib import import_module
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.benchmark import Timer
from tqdm import tqdm

# ==================================================================================== the method: the optimizer


def sophia_update_(p, g, m, h, lr, beta1, gamma, eps, weight_decay):
    """Algorithm 3 on one tensor, in place.

    p, g, m, h: parameter, gradient, momentum and curvature, of one shape; m and h in float32 or wider. The rest:
    floats. """
    m.lerp_(g.to(m.dtype), 1 - beta1)  # m ← β1·m + (1 − β1)·g
    u = (gamma * h).clamp_(min=eps)
    u = torch.div(m, u, out=u).clamp_(-1, 1)  # u = clip(m / max(γ·h, ε), 1)
    p.copy_(p.to(m.dtype).mul_(1 - lr * weight_decay).sub_(u, alpha=lr))  # θ ← θ·(1 − η·λ) − η·u, rounded once


def pieces(*tensors):
    """subtle: each operation above is a trip to memory on a CPU, unless the piece fits the cache."""
    if tensors[0].is_cpu and tensors[0].numel() > 2**17 and all(t.is_contiguous() for t in tensors):
        return zip(*(t.view(-1).split(2**17) for t in tensors))
    return [tensors]


@lru_cache
def kernel(name):
    """The Triton version of a function of this file, or None where this file was copied alone or there is no Triton."""
    try:
        return getattr(import_module(f"kernels.{name.strip('_')}"), name)
    except ImportError:
        return None


class Sophia(torch.optim.Optimizer):
    """Algorithm 3, for any model. What it takes to copy it: this section, and sample_labels or hutchinson below.

        opt = Sophia(model.parameters(), lr=6e-4, betas=(0.96, 0.99), gamma=0.05, weight_decay=0.2, k=10)
        for x, y in batches:                                    # y: classes; flatten (batch, seq) of a language model
            if opt.hessian_due:                                 # every k steps, before the step
                logits = model(x)
                sampled = F.cross_entropy(logits, sample_labels(logits))  # not y: labels drawn from the model
                grads = torch.autograd.grad(sampled, opt.params, allow_unused=True)
                opt.update_hessian(grads, n_terms=len(logits))                                    # Sophia-G
                # or: opt.update_hessian(hutchinson(F.cross_entropy(model(x), y), opt.params))    # Sophia-H
            F.cross_entropy(model(x), y).backward()
            torch.nn.utils.clip_grad_norm_(opt.params, 1.0)
            opt.step()
            opt.zero_grad()

    Under DDP: the same on every rank, with ddp.module(x) in the refresh; update_hessian averages over the ranks.
    Frozen parameters are left out, and so are parameters without a gradient. Regression with the loss ((f −
    y)²/2).mean(): a label drawn from the model is f.detach() + torch.randn_like(f), and n_terms = f.numel().

    betas, gamma, eps, weight_decay, k: β1, β2, γ, ε, λ, k; the defaults are section 3.1's for Sophia-G (Sophia-H: γ =
    0.01). The paper's first version, η₁·clip(m/max(h, ε), ρ₁), is lr = η₁·ρ₁ and gamma = ρ₁. Raises ValueError for
    settings out of range, and for as many estimates as there are not parameters. """

    def __init__(self, params, lr=6e-4, betas=(0.96, 0.99), gamma=0.05, eps=1e-12, weight_decay=0.2, k=10):
        if not (lr >= 0 and 0 <= min(betas) <= max(betas) < 1 and min(gamma, eps) > 0 <= weight_decay and k >= 1):
            raise ValueError(f"Sophia: out of range: {lr=} {betas=} {gamma=} {eps=} {weight_decay=} {k=}")
        settings = dict(lr=lr, betas=betas, gamma=gamma, eps=eps, weight_decay=weight_decay, k=k)
        super().__init__(params, settings | dict(steps=0))
        self.refreshed = False

    @property
    def params(self):
        """The trainable parameters, in the order in which update_hessian takes their estimates."""
        return [p for group in self.param_groups for p in group["params"] if p.requires_grad]

    @property
    def hessian_due(self):
        """True before the steps 1, k+1, 2k+1, …: the paper's t mod k = 1."""
        return self.param_groups[0]["steps"] % self.param_groups[0]["k"] == 0

    def averages(self, p):
        """(m, h) of one parameter: float32 or wider whatever the parameter's dtype, zero at the start."""
        state = self.state[p]
        for name in ("momentum", "hessian"):
            if name not in state:
                state[name] = torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32))
        return state["momentum"], state["hessian"]

    @torch.no_grad()
    def update_hessian(self, estimates, n_terms=None):
        """h ← β2·h + (1 − β2)·ĥ. Call it when hessian_due, before step(); under DDP on all ranks: it averages.

        estimates: one tensor for each of self.params (None: leave it, on all ranks alike): ĥ itself, or, with n_terms
        = B, the gradient ĝ of the loss on drawn labels, a mean over B tokens (not sequences), and then ĥ = B·ĝ². """
        beta2 = {p: group["betas"][1] for group in self.param_groups for p in group["params"]}
        self.refreshed = True
        for p, estimate in zip(self.params, estimates, strict=True):
            if estimate is None:
                continue
            h = self.averages(p)[1]
            for part, e in pieces(h, estimate):
                e = e.to(h.dtype)
                part.lerp_(e if n_terms is None else n_terms * e.square(), 1 - beta2[p])
            if dist.is_initialized() and dist.get_world_size() > 1:  # h is linear in ĥ: its mean is the mean's h
                mean = h.contiguous()
                dist.all_reduce(mean)
                h.copy_(mean / dist.get_world_size())

    @torch.no_grad()
    def step(self, closure=None):
        """One update from every p.grad. Returns the closure's loss, if one is given."""
        with torch.enable_grad():
            loss = closure() if closure else None
        for group in self.param_groups:
            group["steps"] += 1
            if group["steps"] == 2 * group["k"] and not self.refreshed:
                warnings.warn("Sophia: no update_hessian in 2k steps: this is sign-momentum", stacklevel=2)
            settings = group["lr"], group["betas"][0], group["gamma"], group["eps"], group["weight_decay"]
            rows = [(p, p.grad, *self.averages(p)) for p in group["params"] if p.grad is not None]
            if rows and rows[0][0].is_cuda and rows[0][2].dtype == torch.float32 and kernel("sophia_update_"):
                kernel("sophia_update_")(*zip(*rows), *settings)
                continue
            for row in rows:
                for piece in pieces(*row):
                    sophia_update_(*piece, *settings)
        return loss

    def load_state_dict(self, state_dict):
        super().load_state_dict(state_dict)
        self.refreshed = True
        for i, p in enumerate(p for group in self.param_groups for p in group["params"]):
            for name, value in state_dict["state"].get(i, {}).items():  # subtle: torch has rounded them to p's dtype
                self.state[p][name] = value.to(p.device, copy=True)

    @property
    def win_rate(self):
        """Share of coordinates that are not clipped. The paper aims at 0.1 to 0.5 by choice of γ."""
        rows = [(*self.averages(p), group["gamma"]) for group in self.param_groups for p in group["params"]]
        return float(sum((m.abs() < gamma * h).sum() for m, h, gamma in rows)) / sum(m.numel() for m, _, _ in rows)


# ==================================================================================== the method: curvature


def sample_labels(logits, generator=None):
    """ŷ ~ softmax(logits): float logits (..., classes) to int64 labels (...). An entry of −inf is never drawn."""
    probs = logits.detach().float().softmax(-1)
    return torch.multinomial(probs.flatten(0, -2), 1, generator=generator).view(logits.shape[:-1])


def hutchinson(loss, params, generator=None):
    """ĥ = u ⊙ (∇²L·u), one tensor a parameter, with u uniform on {−1, +1}: unbiased for diag ∇²L (Algorithm 1).

    The paper draws u ~ N(0, I), also unbiased; with signs the diagonal itself adds no variance. None for a parameter
    that the loss does not use. The loss must be twice differentiable: attention under sdpa_kernel(SDPBackend.MATH),
    nothing compiled. """
    grads = torch.autograd.grad(loss, params, create_graph=True, allow_unused=True)
    signs = [torch.empty_like(p).bernoulli_(0.5, generator=generator).mul_(2).sub_(1) for p in params]
    slope = sum((g * u).sum() for g, u in zip(grads, signs) if g is not None)  # ⟨∇L, u⟩; its gradient is ∇²L·u
    products = torch.autograd.grad(slope, params, materialize_grads=True)
    return [None if g is None else u * product for g, u, product in zip(grads, signs, products)]


def linear_cross_entropy(hidden, weight, targets, n_vocab=None, seed=None):
    """Output head and loss: the mean of −log softmax(hidden·weightᵀ)[target] over the targets ≥ 0.

    hidden (tokens, d), weight (rows, d), targets (tokens,) int64, −1 = ignored. Rows from n_vocab on are padding.
    With a seed (an int) each target ≥ 0 is replaced by a draw ŷ ~ softmax. Returns (0-d loss, (tokens,) targets); no
    target: loss 0. """
    logits = F.linear(hidden, weight)[:, :n_vocab]  # (tokens, n_vocab)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if seed is not None:
        drawn = sample_labels(logits, torch.Generator(logits.device).manual_seed(seed))
        targets = torch.where(targets >= 0, drawn, targets)
    total = F.cross_entropy(logits, targets, ignore_index=-1, reduction="sum")
    return total / (targets >= 0).sum().clamp(min=1), targets


class Lion(torch.optim.Optimizer):
    """Lion (Chen et al. 2023): θ ← θ·(1 − η·λ) − η·sign(β1·m + (1 − β1)·g), m ← β2·m + (1 − β2)·g. Signum: β1 = β2."""

    def __init__(self, params, lr=1e-4, betas=(0.95, 0.98), weight_decay=0.2):
        super().__init__(params, dict(lr=lr, betas=betas, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                m = self.state[p].setdefault("momentum", torch.zeros_like(p))
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.sub_(torch.lerp(m, p.grad, 1 - group["betas"][0]).sign_(), alpha=group["lr"])
                m.lerp_(p.grad, 1 - group["betas"][1])


# ==================================================================================== the model

SIZES = {  # layers, heads, width, context; the paper's peak rates of adamw, lion and signum, sophia (tiny: ours)
    "tiny": (4, 4, 128, 128, (2e-3, 5e-4, 5e-4)),
    "30M": (6, 6, 384, 1024, (1.2e-3, 4e-4, 1e-3)),
    "gpt2": (12, 12, 768, 1024, (6e-4, 1.5e-4, 6e-4)),
    "gpt2-medium": (24, 16, 1024, 1024, (3e-4, 6e-5, 4e-4)),
    "gpt2-large": (36, 20, 1280, 1024, (2e-4, 8e-5, 3e-4)),
    "gpt2-xl": (48, 25, 1600, 1024, (1.5e-4, 5e-5, 1.2e-4)),  # the paper's rates for its 1.5B
}


class Block(nn.Module):
    def __init__(self, width, n_head):
        super().__init__()
        self.n_head = n_head
        self.ln_1, self.ln_2 = nn.LayerNorm(width, bias=False), nn.LayerNorm(width, bias=False)
        self.c_attn = nn.Linear(width, 3 * width, bias=False)
        self.c_proj = nn.Linear(width, width, bias=False)
        self.c_fc = nn.Linear(width, 4 * width, bias=False)
        self.c_out = nn.Linear(4 * width, width, bias=False)

    def forward(self, x):  # (batch, seq, width)
        q, k, v = (t.unflatten(-1, (self.n_head, -1)).transpose(1, 2) for t in self.c_attn(self.ln_1(x)).chunk(3, -1))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # (batch, head, seq, head width)
        x = x + self.c_proj(y.transpose(1, 2).flatten(2))
        return x + self.c_out(F.gelu(self.c_fc(self.ln_2(x)), approximate="tanh"))


class GPT(nn.Module):
    """GPT-2: learned positions, pre-norm blocks, head tied to the token embedding, no biases. It returns its loss."""

    def __init__(self, n_layer, n_head, width, seq, n_vocab):
        super().__init__()
        self.seq, self.n_vocab = seq, n_vocab
        self.wte = nn.Embedding(-(-n_vocab // 64) * 64, width)  # rows: a multiple of 64
        self.wpe = nn.Embedding(seq, width)
        self.blocks = nn.ModuleList(Block(width, n_head) for _ in range(n_layer))
        self.ln_f = nn.LayerNorm(width, bias=False)
        for name, p in self.named_parameters():
            if p.dim() == 2:
                into_residual = name.endswith(("c_proj.weight", "c_out.weight"))
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * n_layer) if into_residual else 0.02)

    def trunk(self, ids):  # (batch, seq) → (batch, seq, width)
        x = self.wte(ids) + self.wpe.weight[: ids.size(1)]
        if torch.is_autocast_enabled(x.device.type):  # the residual stream in bfloat16, too
            x = x.to(torch.get_autocast_dtype(x.device.type))
        for block in self.blocks:
            x = block(x)
        return self.ln_f(x)

    def forward(self, ids, targets, seed=None, plain=False):
        """Mean loss over (batch, seq) targets, with a seed over labels drawn from the model. plain: not compiled."""
        hidden = (GPT.trunk(self, ids) if plain else self.trunk(ids)).flatten(0, 1)
        head = linear_cross_entropy
        if seed is not None and hidden.is_cuda:
            head = kernel("linear_cross_entropy") or head
        return head(hidden, self.wte.weight, targets.flatten(), self.n_vocab, seed)[0]


def curvature(estimator, model, params, micro_batches, n):
    """ĥ for params, one tensor each: the sum of one estimate a micro-batch (ids, targets, seed), divided by n.

    Squaring ĝ by micro-batch, not the mean ĝ of all as the paper does, has the same expectation and 1/n of the
    variance. estimator: "bartlett", "hutchinson" or "fisher" (the true labels: biased). """
    total = [torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32)) for p in params]
    for ids, targets, seed in micro_batches:
        if estimator == "hutchinson":
            with sdpa_kernel(SDPBackend.MATH):
                loss = model(ids, targets, plain=True)
                estimate = hutchinson(loss, params, torch.Generator(ids.device).manual_seed(seed))
        else:
            loss = model(ids, targets, seed if estimator == "bartlett" else None)
            estimate = [targets.numel() * g.float().square() for g in torch.autograd.grad(loss, params)]
        for t, e in zip(total, estimate):
            t += e
    return [t / n for t in total]


# ==================================================================================== the same in every file

CACHE = Path(os.environ.get("NANOPAPERS_CACHE", "~/.cache/nanopapers")).expanduser()


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


def stdlib_sources():
    """The sources that every Python ships, a list of texts in a fixed order."""
    root, skip = Path(sysconfig.get_path("stdlib")), {"test", "tests", "idle_test", "site-packages", "pydoc_data"}
    files = [p for p in sorted(root.rglob("*.py")) if not skip & set(p.relative_to(root).parts)]
    return [p.read_text("utf-8", "ignore") for p in files]


# ==================================================================================== data

FINEWEB = "https://huggingface.co/datasets/kjj0/fineweb10B-gpt2/resolve/main/fineweb_{}_{:06d}.bin"


def read_shard(path):
    """Memory-mapped gpt2 tokens of a .bin: nanoGPT's raw uint16, or uint16 behind 256 int32 (20240520, 1, …)."""
    headed = list(np.fromfile(path, np.int32, 2)) == [20240520, 1]
    try:
        shard = np.memmap(path, np.uint16, "r", offset=1024 if headed else 0)
    except ValueError as error:  # empty, or of an odd length
        fail(f"{path}: {error}")
    start = shard[:1_000_000]
    if start.max() > 50256 or not start[1::2].any():
        fail(f"{path} does not hold 16-bit gpt2 tokens: ids up to {start.max()}, in every second place up to "
             f"{start[1::2].max(initial=0)} (32-bit ids? np.fromfile(path, np.uint32).astype(np.uint16).tofile(path))")
    return shard


@lru_cache
def load_tokens(data):
    """→ (training shards, validation shards, n_vocab): lists of arrays of ids.

    data: "stdlib" (Python's sources) or a text file, as bytes, the last tenth for validation; a folder of *train*.bin
    and *val*.bin shards of gpt2 tokens; or "fineweb:N" (N shards of 100M gpt2 tokens by download). """
    if data.startswith("fineweb:") and data[8:].isdigit():
        files = [download(FINEWEB.format("val", 0))]
        files += [download(FINEWEB.format("train", i + 1)) for i in range(int(data[8:]))]
        return [read_shard(file) for file in files[1:]], [read_shard(files[0])], 50257
    if data == "stdlib" or Path(data).is_file():
        text = "\n".join(stdlib_sources()).encode() if data == "stdlib" else Path(data).read_bytes()
        ids = np.frombuffer(text, np.uint8)
        return [ids[: len(ids) * 9 // 10]], [ids[len(ids) * 9 // 10 :]], 256
    train, val = ([read_shard(p) for p in sorted(Path(data).glob(f"*{split}*.bin"))] for split in ("train", "val"))
    if not train or not val:
        fail(f"--data {data}: no text file, and no folder of *train*.bin and *val*.bin")
    return train, val, 50257


def get_batch(shards, sequences, seq, device, *counter):
    """Windows of ids and of the ids that follow, (sequences, seq) int64 each. Sequence i depends on (counter, i)
    alone: the data are the same whatever the micro-batch and the number of ranks."""
    lengths, rows = np.array([len(shard) for shard in shards]), []
    for i in sequences:
        rng = np.random.default_rng((*counter, i))
        shard = shards[rng.choice(len(shards), p=lengths / lengths.sum())]
        start = rng.integers(len(shard) - seq)
        rows.append(shard[start : start + seq + 1].astype(np.int64))
    rows = torch.from_numpy(np.stack(rows)).to(device)
    return rows[:, :-1], rows[:, 1:]


# ==================================================================================== training

RECIPES = {  # section 3.1: β1, β2, weight decay, γ; column of SIZES' learning rates
    "adamw": (0.9, 0.95, 0.1, None, 0),
    "lion": (0.95, 0.98, 0.2, None, 1),
    "signum": (0.95, None, 0.2, None, 1),
    "sophiag": (0.96, 0.99, 0.2, 0.05, 2),
    "sophiah": (0.96, 0.99, 0.2, 0.01, 2),
}


def make_optimizer(name, model, lr, beta1, beta2, weight_decay, gamma=None, k=10):
    """Decay reaches the matrices of the blocks, not embeddings and norms (the authors' grouping, for all alike)."""
    matrices = [p for p in model.blocks.parameters() if p.dim() == 2]
    rest = [p for p in model.parameters() if not any(p is q for q in matrices)]
    groups = [dict(params=matrices), dict(params=rest, weight_decay=0.0)]
    if name == "adamw":
        return torch.optim.AdamW(groups, lr, (beta1, beta2), weight_decay=weight_decay, fused=True)
    if name in ("lion", "signum"):
        return Lion(groups, lr, (beta1, beta1 if name == "signum" else beta2), weight_decay)
    return Sophia(groups, lr, (beta1, beta2), gamma, weight_decay=weight_decay, k=k)


def lr_at(step, steps, lr, warmup):
    """Linear from lr/warmup to lr over warmup updates, then a cosine to 0.05·lr at the last."""
    if step < warmup:
        return lr * (step + 1) / warmup
    return lr * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - 1 - warmup))))


@torch.no_grad()
def evaluate(model, shards, n):
    """Mean loss over n windows of the context's length, evenly spaced, none overlapping."""
    device, total = model.wte.weight.device, 0.0
    windows = [shard[i : i + model.seq + 1] for shard in shards for i in range(0, len(shard) - model.seq, model.seq)]
    windows = windows[:: max(1, len(windows) // n)][:n]
    for i in range(0, len(windows), 8):
        rows = torch.from_numpy(np.stack(windows[i : i + 8]).astype(np.int64)).to(device)
        total += float(model(rows[:, :-1], rows[:, 1:], plain=True)) * len(rows)
    return total / len(windows)


@torch.no_grad()
def sample(model, ids, n_new, temperature=0.8):
    """ids (1, seq) int64 → the same with n_new more, drawn from the model one by one."""
    for _ in range(n_new):
        hidden = GPT.trunk(model, ids[:, -model.seq :])[:, -1]  # (1, width)
        logits = F.linear(hidden, model.wte.weight)[:, : model.n_vocab]
        ids = torch.cat([ids, sample_labels(logits / temperature)[:, None]], 1)
    return ids


def to_text(ids, n_vocab):
    """A list of ids as text: bytes, or gpt2 tokens, whose vocabulary tiktoken downloads at its first use."""
    import tiktoken

    try:
        return bytes(ids).decode("utf-8", "replace") if n_vocab == 256 else tiktoken.get_encoding("gpt2").decode(ids)
    except OSError as error:
        return f"(no gpt2 vocabulary to print the sample with: {error})"


def choose_data(args, device, n_tokens):
    """--data, or for the gpt2 sizes on a GPU as much of FineWeb as the run reads, or what every Python ships."""
    if args.data:
        return args.data
    if device.type == "cuda" and args.model.startswith("gpt2"):
        n = min(103, math.ceil(n_tokens / 1e8))
        print(f"data: FineWeb, {n} shards of 100M gpt2 tokens, {0.2 * (n + 1):.1f} GB in {CACHE}")
        try:
            load_tokens(f"fineweb:{n}")
            return f"fineweb:{n}"
        except OSError as error:
            print(f"FineWeb cannot be had ({error})")
    print("data: Python's own sources, byte by byte, for want of --data")
    return "stdlib"


def choose_micro_batch(model, device, per_rank):
    """Sequences a forward pass: the largest divisor of per_rank that fits. Bytes a token as measured on an H100."""
    most = torch.tensor(512 // model.seq, device=device)  # on a CPU larger ones are no faster
    if device.type == "cuda":
        free = torch.cuda.mem_get_info()[0] - 24 * sum(p.numel() for p in model.parameters())
        most += free // (model.seq * (24 * len(model.blocks) * model.wpe.weight.size(1) + 10 * model.n_vocab))
    if dist.is_initialized():
        dist.all_reduce(most, dist.ReduceOp.MIN)
    return max(m for m in range(1, per_rank + 1) if per_rank % m == 0 and m <= max(most, 1))


def train(args):
    """Section 3: pre-train a GPT. One loop for a laptop, a GPU, or the many of torchrun."""
    device, rank, world = set_up(args)
    on_gpu = device.type == "cuda"
    n_layer, n_head, width, seq, rates = SIZES[args.model]
    steps, batch = args.steps or (100_000 if on_gpu else 300), args.batch_size or (480 if on_gpu else 16)
    data = choose_data(args, device, steps * batch * seq)
    shards, val_shards, n_vocab = load_tokens(data)
    if (shortest := min(map(len, shards + val_shards))) <= seq + 1:
        fail(f"--data {data}: a part has {shortest} tokens, too few for a context of {seq}")
    model = GPT(n_layer, n_head, width, seq, n_vocab).to(device)
    micro = args.micro_batch_size or choose_micro_batch(model, device, batch // world or 1)
    if batch % (micro * world):
        fail(f"--batch_size {batch} is not a multiple of --micro_batch_size {micro} × {world} ranks")
    beta1, beta2, decay, gamma, column = RECIPES[args.optimizer]
    lr, gamma = args.lr or rates[column], args.gamma or gamma
    opt = make_optimizer(args.optimizer, model, lr, beta1, beta2, decay, gamma, args.k)
    estimator, hess_batch, hess_micro = "bartlett", batch // 2, micro  # the paper's 240 of 480 sequences
    if args.optimizer == "sophiah":
        estimator, hess_batch, hess_micro = "hutchinson", batch // 15, 1  # 32 of 480; second derivatives take memory
    n_hess = max(1, hess_batch // hess_micro)  # micro-batches of a refresh, over all ranks

    free = dict.fromkeys(("task", "out", "resume", "quiet", "device", "micro_batch_size", "eval_every"))
    settings = vars(args) | free | dict(data=data, steps=steps, batch_size=batch)  # what a resumed run must share
    checkpoint, log, first = args.out / "checkpoint.pt", args.out / "log.jsonl", 0
    if args.resume:
        saved = torch.load(checkpoint, map_location="cpu", weights_only=True)
        if other := {name: value for name, value in saved["settings"].items() if value != settings[name]}:
            fail(f"{checkpoint} is of another run, with {other}")
        model.load_state_dict(saved["model"])
        opt.load_state_dict(saved["optimizer"])
        first = saved["step"]
        del saved  # or a second copy of the model and its averages would stay
    elif rank == 0:
        log.write_text("")
    n_params, n_tokens = sum(p.numel() for p in model.parameters()), batch * seq
    flops = n_tokens * (6 * n_params + 12 * n_layer * width * seq)  # of a step without refresh
    if rank == 0:
        print(f"{n_params / 1e6:.1f}M parameters; {steps:,} steps of {batch} × {seq:,} tokens, micro-batch {micro}; "
              f"{steps * n_tokens / 1e6:,.1f}M tokens in all, {steps * n_tokens / sum(map(len, shards)):.2g} epochs of "
              f"{data}; {flops / 1e12:.3g} TFLOP a step", flush=True)
    if on_gpu:
        model.trunk = torch.compile(model.trunk)  # for the drawn labels, whose head is a kernel
    ddp = nn.parallel.DistributedDataParallel(model) if world > 1 else model
    loss_of = torch.compile(ddp) if on_gpu else ddp  # trunk, head and loss in one graph
    cast = torch.autocast("cuda", torch.bfloat16) if on_gpu else nullcontext()

    def micro_batches(step, n, size):  # this rank's share of the first n·size sequences of the step
        for i in range(rank * size, n * size, world * size):
            yield *get_batch(shards, range(i, i + size), seq, device, args.seed, step), step * batch + i

    interrupted = []  # subtle: a step is finished first, and all ranks leave after the same one
    signal.signal(signal.SIGINT, lambda *_: interrupted.append(signal.signal(signal.SIGINT, signal.SIG_DFL)))
    seconds, saved_at = deque(maxlen=20), time.perf_counter()
    for step in (bar := tqdm(range(first, steps), "train", steps, initial=first, disable=args.quiet or rank > 0)):
        start = time.perf_counter()
        for group in opt.param_groups:
            group["lr"] = lr_at(step, steps, lr, min(2000, steps // 20))
        if isinstance(opt, Sophia) and opt.hessian_due:
            with cast:
                parts = micro_batches(step, n_hess, hess_micro)
                opt.update_hessian(curvature(estimator, model, opt.params, parts, n_hess / world))
        total = torch.tensor([0.0, len(interrupted)], device=device)  # loss; ranks that were interrupted
        for i, (ids, targets, _) in enumerate(micro_batches(step, batch // micro, micro), 1):
            with cast, ddp.no_sync() if i * micro * world < batch and world > 1 else nullcontext():
                loss = loss_of(ids, targets) * (micro * world / batch)
                loss.backward()
            total[0] += loss.detach() / world
        if world > 1:
            dist.all_reduce(total)
        norm = float(nn.utils.clip_grad_norm_(model.parameters(), 1.0))
        if not math.isfinite(norm):
            fail(f"step {step + 1}: the gradient is not finite: start anew with a lower --lr or a higher --gamma")
        opt.step()
        opt.zero_grad()
        seconds.append(time.perf_counter() - start)
        record = dict(step=step + 1, loss=float(total[0]), lr=opt.param_groups[0]["lr"], norm=norm)
        last = step + 1 == steps or total[1] > 0
        if last or (step + 1) % args.eval_every == 0:
            record["val_loss"] = evaluate(model, val_shards, 2048 if on_gpu else 64)
            record["tokens_per_s"] = n_tokens * len(seconds) / sum(seconds)  # of the last 20 steps
            record["tflop_per_s"] = record["tokens_per_s"] * flops / n_tokens / 1e12
            if isinstance(opt, Sophia):
                record["win_rate"] = opt.win_rate
        if rank == 0:
            bar.set_postfix(loss=record["loss"])
            with open(log, "a") as file:
                print(json.dumps(record), file=file)
            if "val_loss" in record or time.perf_counter() - saved_at > 600:
                state = dict(settings=settings, model=model.state_dict(), optimizer=opt.state_dict(), step=step + 1)
                torch.save(state, args.out / "checkpoint.tmp")
                os.replace(args.out / "checkpoint.tmp", checkpoint)
                saved_at = time.perf_counter()
        if last:
            break
    if rank == 0:
        print_table(list(record), [list(record.values())])
        prompt = torch.from_numpy(val_shards[0][None, :16].astype(np.int64)).to(device)
        print(to_text(sample(model, prompt, 200)[0].tolist(), n_vocab))
        save_results(args.out, args, last=record)
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()
    if step + 1 < steps:
        print(f"interrupted after step {step + 1} of {steps}: the same command with --resume goes on", file=sys.stderr)
        raise SystemExit(130)


# ==================================================================================== the experiments

NAMES = {"adamw": "AdamW", "signum": "Signum", "lion": "Lion", "sophiag": "Sophia-G", "sophiah": "Sophia-H"}
TOY_GPT = (2, 4, 64, 64)  # layers, heads, width, context


def run_once(job):
    """One short run of the toy GPT on Python's sources → (validation loss in nats a byte, CPU seconds)."""
    job = dict(job)
    optimizer, steps, seed, warmup = (job.pop(key) for key in ("optimizer", "steps", "seed", "warmup"))
    estimator = job.pop("estimator", "hutchinson" if optimizer == "sophiah" else "bartlett")
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    torch.manual_seed(seed)
    shards, val_shards, n_vocab = load_tokens("stdlib")
    model = GPT(*TOY_GPT, n_vocab)
    opt, start = make_optimizer(optimizer, model, **job), time.process_time()
    for step in range(steps):
        for group in opt.param_groups:
            group["lr"] = lr_at(step, steps, job["lr"], max(1, round(warmup * steps)))
        ids, targets = get_batch(shards, range(16), model.seq, "cpu", seed, step)
        if isinstance(opt, Sophia) and opt.hessian_due:  # four micro-batches, together the batch
            parts = zip(ids.chunk(4), targets.chunk(4), range(4 * step, 4 * step + 4))
            opt.update_hessian(curvature(estimator, model, opt.params, parts, 4))
        model(ids, targets).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        opt.step()
        opt.zero_grad()
    seconds = time.process_time() - start
    loss = evaluate(model, val_shards, 256)
    return loss if math.isfinite(loss) else math.inf, seconds


def run_all(jobs, args):
    """run_once for every job, on all cores → array (job, 2)."""
    ignore_interrupt = signal.signal, (signal.SIGINT, signal.SIG_IGN)  # the parent hears it
    with ProcessPoolExecutor(os.cpu_count(), get_context("spawn"), *ignore_interrupt) as pool:
        try:
            return np.array(list(tqdm(pool.map(run_once, jobs), "runs", len(jobs), disable=args.quiet)))
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def speedup(loss, losses):
    """How many times T steps the baseline needs for this loss, given its losses after T/2, T and 2T steps: straight
    lines in log T, and outside them no extrapolation, but 0.5 or 2."""
    return float(2 ** np.interp(-loss, -np.maximum.accumulate(losses[::-1])[::-1], [-1, 0, 1]))


def compare(args):
    """Section 3.2's question, asked fairly: how many steps of AdamW is one step of Sophia worth?

    Each optimizer, and AdamW at T/2 and 2T steps for itself, tries the same four learning rates with the same two β1
    on the same two seeds; the best goes on to other seeds. Each run has a schedule over just its own length. Not
    tuned, for none: warm-up, β2, γ, weight decay and k. """
    entrants = [("adamw", args.steps // 2), ("adamw", 2 * args.steps)] + [(name, args.steps) for name in NAMES]
    shared = dict(beta2=0.95, gamma=args.gamma, warmup=args.warmup, weight_decay=0.1, k=5)
    trials = [dict(lr=lr, beta1=beta1) for lr in (1.5e-3, 3e-3, 6e-3, 1.2e-2) for beta1 in (0.6, 0.9)]
    jobs = [dict(optimizer=name, steps=n, seed=args.seed + 1000 + i, **shared, **trial)
            for name, n in entrants for trial in trials for i in range(2)]
    tried = run_all(jobs, args)[:, 0].reshape(len(entrants), len(trials), 2).mean(2)
    best = [trials[i] for i in tried.argmin(1)]
    seeds = range(args.seed, args.seed + args.seeds)
    jobs = [dict(optimizer=name, steps=n, seed=seed, **shared, **trial)
            for (name, n), trial in zip(entrants, best) for seed in seeds]
    results = run_all(jobs, args).reshape(len(entrants), len(seeds), 2)
    losses, cost = results[:, :, 0], results[:, :, 1].mean(1) / [n for _, n in entrants]  # seconds a step
    adam = losses[[0, 2, 1]]  # (T/2 T 2T, seed)
    factors = [np.mean([speedup(loss, adam[:, i]) for i, loss in enumerate(row)]) for row in losses]
    rows = [(NAMES[name], n, loss.mean(), loss.std(), factor, step / cost[2], f"{trial['lr']:g}", trial["beta1"])
            for (name, n), loss, factor, step, trial in zip(entrants, losses, factors, cost, best)]
    print_table(("optimizer", "steps", "loss", "± sd", "worth AdamW steps", "CPU time a step", "lr", "β1"), rows)
    for i, (name, _) in enumerate(entrants):
        if name.startswith("sophia"):
            verdict = "holds" if losses[i].mean() <= adam[2].mean() else "does not hold"
            print(f"{NAMES[name]} - AdamW, both at {args.steps} steps: {(losses[i] - adam[1]).mean():+.3f} ± "
                  f"{(losses[i] - adam[1]).std():.3f}; the paper's factor of 2 in steps {verdict} here")
    save_results(args.out, args, table=rows, trials=trials, tried=tried, losses=losses)

    def draw(fig):
        ax = fig.subplots()
        for i, (name, label) in enumerate(NAMES.items()):  # side by side, for they would hide one another
            mine = [(n * 1.03**i, x.mean(), x.std()) for (other, n), x in zip(entrants, losses) if other == name]
            ax.errorbar(*zip(*sorted(mine)), marker="o", capsize=3, label=label)
        ax.set(xscale="log", xlabel="steps, each run with its own schedule", ylabel="validation loss, nats a byte")
        ax.set_xticks(sorted({n for _, n in entrants}), sorted({n for _, n in entrants}), minor=False)
        ax.minorticks_off()
        ax.legend()

    figure(args.out / "compare.png", args, draw)


def ablate(args):
    """Section 3.4 on the toy GPT: how often to refresh the curvature, by which estimate, whether to clip."""
    base = dict(optimizer="sophiag", lr=3e-3, beta1=0.6, beta2=0.95, gamma=0.02, k=5, warmup=0.5, weight_decay=0.1)
    variants = {
        "Sophia-G, k = 5": {}, "k = 1": dict(k=1), "k = 10": dict(k=10), "k = 50": dict(k=50),
        "Hutchinson's estimate": dict(optimizer="sophiah"), "empirical Fisher (true labels)": dict(estimator="fisher"),
        "no curvature: all clipped": dict(gamma=1e-12),
        "no clipping": dict(lr=3e-3 * 1e9, gamma=0.02 * 1e9, weight_decay=0.0),  # both 1e9 times larger: η·m/γh
        "β1 = 0.96, the paper's": dict(beta1=0.96), "warm-up over 5 %": dict(warmup=0.05),
    }
    seeds = range(args.seed, args.seed + args.seeds)
    jobs = [base | variant | dict(steps=args.steps, seed=seed) for variant in variants.values() for seed in seeds]
    results = run_all(jobs, args).reshape(len(variants), len(seeds), 2)
    rows = [(name, r[:, 0].mean(), r[:, 0].std(), r[:, 1].mean()) for name, r in zip(variants, results)]
    print_table(("toy GPT", "loss", "± sd", "s a run"), rows)
    save_results(args.out, args, table=rows)


def toy(args):
    """Figure 2: why clip. 50 steps from (0.2, 0) on 8(a − 1)²(1.3a² + 2a + 1) + (b − 4)²/2, with exact derivatives."""
    loss = lambda p: 8 * (p[0] - 1) ** 2 * (1.3 * p[0] ** 2 + 2 * p[0] + 1) + (p[1] - 4) ** 2 / 2
    rules = {
        "GD": lambda p: torch.optim.SGD(p, 0.015),
        "SignGD": lambda p: Lion(p, 0.3, (0.0, 0.0), 0.0),
        "Adam": lambda p: torch.optim.Adam(p, 0.3, (0.9, 0.95)),
        "Newton": lambda p: torch.optim.SGD(p, 1.0),  # of the gradient divided by the curvature, see below
        "Sophia": lambda p: Sophia(p, 0.3, (0.0, 0.0), gamma=0.3, weight_decay=0.0),
    }
    paths = {}
    for name, make in rules.items():
        p = torch.tensor([0.2, 0.0], dtype=torch.float64)
        opt, paths[name] = make([p.requires_grad_()]), [p.tolist()]
        for _ in range(50):
            p.grad, h = torch.func.grad(loss)(p.detach()), torch.func.hessian(loss)(p.detach()).diagonal()
            if name == "Newton":
                p.grad /= h
            if name == "Sophia":
                opt.update_hessian([h])
            opt.step()
            paths[name].append(p.tolist())
    rows = [(name, *path[-1], loss(path[-1])) for name, path in paths.items()]
    print_table(("50 steps", "a", "b", "loss"), rows)
    print("minimum (1, 4) loss 0; saddle (0, 4) loss 8, where Newton ends; second minimum (-0.654, 4) loss 5.428")
    save_results(args.out, args, table=rows)

    def draw(fig):
        ax = fig.subplots()
        a, b = np.meshgrid(np.linspace(-1.1, 1.5, 300), np.linspace(-0.5, 5.2, 300))
        ax.contour(a, b, np.log1p(loss((a, b))), 25, cmap="Greys", alpha=0.6)
        for name, path in paths.items():
            ax.plot(*zip(*path), marker="o", ms=4, lw=1, label=name)
        ax.set(xlabel="a (sharp)", ylabel="b (flat)", title="50 steps from (0.2, 0); the minimum is (1, 4)")
        ax.legend()

    figure(args.out / "toy.png", args, draw)


def bench(args):
    """Section 3.3: what an update and a refresh cost over the tensors of a model."""
    device, _, _ = set_up(args)
    params = list(GPT(*SIZES[args.model][:4], 50257).to(device).parameters())
    for p in params:
        p.grad = torch.randn_like(p) * 1e-3
    grads, opt = [p.grad for p in params], Sophia(params)
    rows = [(p, p.grad, *opt.averages(p)) for p in params]

    @torch.no_grad()
    def as_it_reads():  # Algorithm 3, tensor by tensor
        for p, g, m, h in rows:
            m.copy_(0.96 * m + (1 - 0.96) * g)
            p.copy_(p - 6e-4 * 0.2 * p - 6e-4 * torch.clamp(m / torch.clamp(0.05 * h, min=1e-12), -1, 1))

    runs = {"AdamW, torch's fused": torch.optim.AdamW(params, fused=True).step, "Sophia": opt.step,
            "Sophia, as Algorithm 3 reads": as_it_reads,
            "Sophia, a refresh of h": lambda: opt.update_hessian(grads, n_terms=1000)}
    table = []
    for name, call in runs.items():
        timer = Timer("call()", globals=dict(call=call), num_threads=torch.get_num_threads())
        ms = 1e3 * min(timer.timeit(1).mean for _ in range(12))
        table.append((name, ms, ms / table[0][1] if table else 1.0))
    print_table((f"{args.model}, {device.type}, the least of 12", "ms", "of fused AdamW"), table)
    save_results(args.out, args, table=table)


# ==================================================================================== command line


def parse_args(argv=None):
    argv = sys.argv[1:] if argv is None else list(argv)
    if not argv or argv[0].startswith("-") and argv[0] not in ("-h", "--help"):
        argv.insert(0, "train" if any(word.split("=")[0] == "--model" for word in argv) else "compare")
    about = __doc__.split("\n\n")[0]
    parser = argparse.ArgumentParser(description=about, epilog="Without TASK: compare; with --model: train.")
    parser.error = fail
    tasks = parser.add_subparsers(required=True, metavar="TASK")
    flags = {
        "model": dict(choices=SIZES, help="size of the GPT (%(default)s)"),
        "optimizer": dict(choices=RECIPES, default="sophiag", help="with the paper's settings (%(default)s)"),
        "data": dict(help="stdlib, a text file, a folder of *train*.bin and *val*.bin shards of gpt2 tokens, or "
                     "fineweb:N (default: FineWeb for gpt2 sizes on a GPU, else stdlib)"),
        "steps": dict(type=int, help="updates (compare 64, ablate 200, train 100,000 on a GPU, the paper's, else 300)"),
        "batch_size": dict(type=int, help="sequences an update, over all ranks (480 on a GPU, the paper's; else 16)"),
        "micro_batch_size": dict(type=int, help="sequences a forward pass (what the device takes)"),
        "lr": dict(type=float, help="peak learning rate (the paper's for the model)"),
        "gamma": dict(type=float, help="lower = more coordinates clipped (the paper: Sophia-G 0.05, Sophia-H 0.01)"),
        "k": dict(type=int, default=10, help="updates between two refreshes of h (%(default)s, the paper's)"),
        "eval_every": dict(type=int, default=1000, help="updates between validations (%(default)s). A checkpoint then, "
                           "every 10 minutes, at Ctrl-C and at the end"),
        "resume": dict(action="store_true", help="go on from the checkpoint in --out"),
        "seeds": dict(type=int, default=3, help="number of seeds, from --seed on (%(default)s)"),
        "warmup": dict(type=float, default=0.3, help="share of the run in which the learning rate rises (%(default)s)"),
        "seed": dict(type=int, default=0, help="of weights, data order and drawn labels (%(default)s)"),
        "device": dict(help="cuda or cpu (cuda where there is one)"),
        "out": dict(type=Path, help="folder for results, figures and checkpoints (out/sophia/…)"),
        "no_plot": dict(action="store_true", help="write no figure"),
        "quiet": dict(action="store_true", help="no progress bars"),
    }

    def task(function, names, **defaults):
        about = function.__doc__.strip()
        sub = tasks.add_parser(function.__name__, help=about.split("\n")[0], description=about)
        sub.error = fail
        for name in names.split():
            sub.add_argument(f"--{name}", **flags[name])
        sub.set_defaults(task=function, **dict(out=Path(f"out/sophia/{function.__name__}")) | defaults)

    task(compare, "steps seeds gamma warmup seed out no_plot quiet", steps=64, gamma=0.02)
    task(train, "model optimizer data steps batch_size micro_batch_size lr gamma k eval_every resume "
         "seed device out quiet", model="tiny", out=None)
    task(toy, "out no_plot")
    task(ablate, "steps seeds seed out quiet", steps=200)
    task(bench, "model seed device out", model="gpt2")
    args = parser.parse_args(argv)
    for name in "steps batch_size micro_batch_size lr gamma k eval_every seeds".split():
        if getattr(args, name, None) is not None and not getattr(args, name) > 0:
            fail(f"--{name} {getattr(args, name)} must be above 0")
    args.out = args.out or Path(f"out/sophia/train-{args.model}-{args.optimizer}")
    return args


def main():
    run(parse_args())


if __name__ == "__main__":
    main()
